"""Groups under ThreadSanitizer: `stress.cpp`, threads as ranks, suspended and aborted at random. `make test-tsan`."""

import random
import subprocess
from pathlib import Path

import pytest

from shuteye.native.build import COMMON_FLAGS, SOURCES, BuildFailed, find_compiler

STRESS = Path(__file__).with_name("stress.cpp")
PARTS = ("group.cpp", "pool.cpp", "kernels_portable.cpp")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_access_of_one_rank_races_with_another(tmp_path):
    """A slot or message used while another rank still has it, memory orders that are too weak, a wake that is lost."""
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))
    flags = [*COMMON_FLAGS, "-O1", "-g", "-fsanitize=thread", f"-I{SOURCES}"]
    program = tmp_path / "stress"
    parts = [str(SOURCES / part) for part in PARTS]
    subprocess.run([*compiler, *flags, "-o", str(program), str(STRESS), *parts], check=True)
    for _ in range(3):
        seed = str(random.randrange(1 << 30))
        done = subprocess.run([str(program), seed, "2000"], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"seed {seed}:\n{done.stderr[:8000]}"
        assert "ThreadSanitizer" not in done.stderr
