"""The folder of compiled code: torch's variable, unless the user has set it."""

from __future__ import annotations

from pathlib import Path

from everstep.agents.node.compile_cache import VARIABLE, CompileCache, remove


def test_a_folder_of_the_job() -> None:
    one, other = CompileCache({}), CompileCache({VARIABLE: ""})
    assert one.folder != other.folder, "each node has its own"
    assert one.variables() == {VARIABLE: one.folder}
    assert not Path(one.folder).exists(), "torch makes it, when it compiles something"
    remove(one.folder)
    Path(one.folder, "fxgraph").mkdir(parents=True)
    remove(one.folder)
    assert not Path(one.folder).exists()


def test_the_users_folder_is_left_alone(tmp_path: Path) -> None:
    chosen = CompileCache({VARIABLE: str(tmp_path)})
    assert chosen.variables() == {}
    remove(chosen.folder)
    assert tmp_path.exists()
