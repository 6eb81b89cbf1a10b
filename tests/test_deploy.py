"""deploy/: the unit and the container files against the tools that read them, and against the project."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from shuteye.cli.serve import variables

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    """Catches a misspelt setting, which systemd ignores with a line in a log."""
    unit = (DEPLOY / "shuteye.service").read_text()
    assert "/opt/shuteye/bin/shuteye serve" in unit
    copy = tmp_path / "shuteye.service"
    copy.write_text(unit.replace("/opt/shuteye/bin/shuteye", "/bin/true"))  # a program that is there
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_variables_of_the_files_are_read_by_serve():
    """Catches a setting that is silently none: its variable was renamed, or misspelt."""
    known = {*variables()}
    for file in ("shuteye.service", "Dockerfile", "compose.yaml"):
        found = set(re.findall(r"SHUTEYE_[A-Z_]+", (DEPLOY / file).read_text()))
        assert found, file
        assert found <= known, f"{file}: {found - known}"


def test_the_container_has_what_the_build_needs():
    """Catches a file that the build reads and that is not copied, or that .dockerignore keeps out."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", "src", "requirements", build["project"]["readme"], "LICENSE", "hatch_build.py"}
    copied = {
        name
        for names in re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for name in names.split()
    }
    allowed = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert copied == needed == {*allowed}


def test_the_container_gets_the_locked_versions_for_its_python():
    """Catches a lock of several Pythons whose versions, without their conditions, contradict each other."""
    command = re.search(r"(sed -En '.+') requirements/lock\.txt", (DEPLOY / "Dockerfile").read_text())
    lock = ROOT / "requirements" / "lock.txt"
    done = subprocess.run(["sh", "-c", f"{command[1]} {lock}"], capture_output=True, text=True, check=True)
    constraints = [Requirement(line) for line in done.stdout.splitlines()]
    assert len(constraints) == len(re.findall(r"^[A-Za-z0-9._-]+==", lock.read_text(), re.MULTILINE))
    for version in ("3.11", "3.12"):
        python = {"python_version": version, "python_full_version": f"{version}.0"}
        names = [one.name for one in constraints if one.marker is None or one.marker.evaluate(python)]
        assert len(names) == len({*names})
        assert "numpy" in names


def test_the_composed_service_stops_in_its_own_time():
    """Catches a container killed while its requests still have their grace."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["shuteye"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= 30 + 2 + 10
    assert service["ports"] == ["127.0.0.1:8000:8000"]
