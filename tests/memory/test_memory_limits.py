"""How much memory is left, on machines and in control groups that are only files here."""

from __future__ import annotations

from pathlib import Path

import pytest

from shuteye.memory.limits import available_bytes

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Eight GiB available, no control groups."""
    meminfo = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
    return write(tmp_path, {"proc/meminfo": meminfo, "proc/self/cgroup": ""})


def test_without_cgroups_the_machines_memory_is_the_limit(machine: Path) -> None:
    assert available_bytes(machine) == 8 * GIB


def test_cgroup_v2_reclaimable_page_cache_counts_as_free(machine: Path) -> None:
    write(machine, {
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
    })  # fmt: skip
    assert available_bytes(machine) == GIB + GIB + GIB // 2


def test_a_tighter_ancestor_decides(machine: Path) -> None:
    write(machine, {
        "proc/self/cgroup": "0::/pod/job\n",
        "sys/fs/cgroup/pod/job/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/pod/memory.stat": "inactive_file 0\n",
    })  # fmt: skip
    assert available_bytes(machine) == GIB


def test_inside_a_container_the_cgroup_mount_itself_is_read(machine: Path) -> None:
    write(machine, {
        "proc/self/cgroup": "0::/only/known/outside\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": "0\n",
        "sys/fs/cgroup/memory.stat": "",
    })  # fmt: skip
    assert available_bytes(machine) == GIB


def test_cgroup_v1_file_names_and_its_value_for_no_limit_are_understood(machine: Path) -> None:
    write(machine, {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    })  # fmt: skip
    assert available_bytes(machine) == 2 * GIB


def test_a_group_over_its_limit_has_nothing_left(machine: Path) -> None:
    write(machine, {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "10\n",
        "sys/fs/cgroup/memory.current": "20\n",
        "sys/fs/cgroup/memory.stat": "",
    })  # fmt: skip
    assert available_bytes(machine) == 0


def test_this_machine_has_some_memory() -> None:
    assert 0 < available_bytes() < 1 << 50
