"""The folder of compiled code: one of the job, unless the user has chosen one."""

from __future__ import annotations

from pathlib import Path

from everstep.agents.node.compile_cache import VARIABLE, new_folder, remove


def test_a_folder_of_the_job() -> None:
    one, other = new_folder({}), new_folder({"PATH": "/bin"})
    assert one != other, "each node has its own"
    assert not Path(one).exists(), "torch makes it, when it compiles something"
    remove(one)
    Path(one, "fxgraph").mkdir(parents=True)
    remove(one)
    assert not Path(one).exists()


def test_the_users_folder_is_left_alone(tmp_path: Path) -> None:
    chosen = new_folder({VARIABLE: str(tmp_path)})
    assert not chosen
    remove(chosen)
    assert tmp_path.exists()
