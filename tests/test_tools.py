"""What stands around the package: the lock that the set-up installs, and what it tells while it does."""

import importlib.util
import io
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements/lock.txt").read_text(), re.MULTILINE)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    """All but what has an environment of its own (tools/ray.sh)."""
    extras = [group for name, group in PROJECT["optional-dependencies"].items() if name != "ray"]
    return sorted({text for group in [PROJECT["dependencies"], *extras] for text in group})


@pytest.mark.parametrize("text", [text for text in declared() if Requirement(text).name != "torch"])
def test_the_lock_holds_a_version_that_the_declared_range_allows(text):
    """A range was changed and `make lock` forgotten: the set-up would install what the package then refuses."""
    requirement = Requirement(text)
    versions = [Version(version) for name, version in LOCKED if canonical(name) == canonical(requirement.name)]
    assert versions, f"{requirement.name} is not in requirements/lock.txt; run make lock"
    assert all(version in requirement.specifier for version in versions), f"run make lock: {versions} for {text}"


def test_torch_is_pinned_beside_the_lock_within_its_range_and_for_the_resolver_alike():
    """PyTorch in the lock would bring CUDA's build; pinned outside of its range or differently, a broken set-up."""
    (pin,) = [Requirement(line) for line in (ROOT / "requirements/torch.txt").read_text().split("\n") if "==" in line]
    (wanted,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == "torch"]
    version = str(pin.specifier).removeprefix("==")
    assert Version(version) in wanted.specifier
    (metadata,) = tomllib.loads((ROOT / "requirements/uv.toml").read_text())["dependency-metadata"]
    assert (metadata["name"], metadata["version"]) == ("torch", version)
    assert not [name for name, _ in LOCKED if canonical(name) == "torch" or name.startswith(("nvidia", "triton"))]


def test_the_ray_that_tests_run_with_is_one_that_users_may_have():
    (wanted,) = map(Requirement, PROJECT["optional-dependencies"]["ray"])
    pin = Requirement(re.search(r"^ray=\('(.+)'\)$", (ROOT / "tools/ray.sh").read_text(), re.MULTILINE)[1])
    assert (pin.name, pin.extras) == (wanted.name, wanted.extras)
    assert Version(str(pin.specifier).removeprefix("==")) in wanted.specifier


def test_every_locked_version_has_a_hash():
    """A version without a hash could be replaced by anything that the index serves under its name."""
    text = (ROOT / "requirements/lock.txt").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(LOCKED) > 50
    assert all("--hash=sha256:" in entry for entry in entries)


class Screen(io.StringIO):
    def __init__(self, *, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_set_up_says_how_far_it_is():
    """Minutes of silence, the first thing that a new user sees."""
    spec = importlib.util.spec_from_file_location("pip_progress", ROOT / "tools/pip_progress.py")
    progress = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(progress)
    names = [f"package-{index}" for index in range(20)]
    said = [f"Collecting {name}==1.{index} (from -r lock (line {index}))\n" for index, name in enumerate(names)]
    said[3] = "Processing /wheels/package_3-1.3-py3-none-any.whl (from -r lock)\n"
    said[4] = "Ignoring package-4: markers 'sys_platform == \"win32\"' don't match your environment\n"
    said.insert(6, "  Downloading package_5-1.5-py3-none-any.whl (16.8 MB)\n")
    said.append("Installing collected packages: one, two\n")
    shown = Screen(terminal=True)
    progress.follow(said, shown, total=20)
    assert [line.split("\033[K")[-1].strip() for line in shown.getvalue().split("\r")][4:8] == [
        "[4/20] package_3",
        "[5/20] package-4",
        "[6/20] package-5",
        "[6/20] package-5, 16.8 MB",
    ]
    printed = Screen(terminal=False)
    progress.follow(said, printed, total=20)
    assert printed.getvalue() == "  [10/20] package-9\n  [20/20] package-19\n  installing 2 packages …\n"
