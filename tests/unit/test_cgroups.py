"""Memory limits of control groups, and the processes killed because of them."""

from __future__ import annotations

from pathlib import Path

from everstep.agents.node.cgroups import OutOfMemory, groups, left

MIB = 1 << 20


def v2(folder: Path, limit: int | None, used: int, inactive: int = 0, kills: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("max\n" if limit is None else f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    (folder / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\n")


def v1(folder: Path, limit: int, used: int, inactive: int = 0, kills: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {inactive}\n")
    (folder / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(text)
    return path


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    root.mkdir()
    (root / "cgroup.controllers").write_text("memory\n")
    v2(root / "pods", 100 * MIB, 90 * MIB)
    v2(root / "pods" / "job", None, 50 * MIB)
    v2(root / "pods" / "job" / "step", 80 * MIB, 40 * MIB, inactive=5 * MIB)
    me = own(tmp_path, "0::/pods/job/step\n")
    assert [group.left_bytes() for group in groups(root, me)] == [45 * MIB, None, 10 * MIB]
    assert left(groups(root, me)) == 10 * MIB


def test_version_1(tmp_path: Path) -> None:
    """Version 1, mounted beside version 2, with its own value for "no limit"."""
    root = tmp_path / "fs"
    v1(root / "memory", 9223372036854771712, 900 * MIB)
    v1(root / "memory" / "job", 100 * MIB, 60 * MIB, inactive=10 * MIB)
    me = own(tmp_path, "4:cpu:/\n3:memory,hugetlb:/job\n0::/\n")
    assert left(groups(root, me)) == 50 * MIB


def test_a_container_does_not_see_the_path_of_its_group(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    v1(root / "memory", 100 * MIB, 60 * MIB)
    assert left(groups(root, own(tmp_path, "3:memory:/kubepods/pod17/abc\n"))) == 40 * MIB


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert groups(tmp_path / "none", tmp_path / "nothing") == []
    assert left([]) is None


def test_a_kill_explains_one_process(tmp_path: Path) -> None:
    root, vmstat = tmp_path / "fs", tmp_path / "vmstat"
    vmstat.write_text("oom_kill 3\n")
    v1(root / "memory" / "job", 100 * MIB, 60 * MIB, kills=3)
    watch = OutOfMemory(root, own(tmp_path, "3:memory:/job\n"), vmstat)
    assert watch.explain() == ""
    v1(root / "memory" / "job", 100 * MIB, 60 * MIB, kills=5)
    for _ in range(2):
        assert f"control group {root}/memory/job is limited to 100 MiB" in watch.explain()
    assert watch.explain() == ""
    vmstat.write_text("oom_kill 4\n")
    assert watch.explain() == "by the kernel's OOM killer: memory has run out"
