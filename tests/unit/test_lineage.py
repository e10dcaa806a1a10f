"""Which run saved the checkpoints in a folder: this run, an ancestor, or another run, whose files are left alone."""

from __future__ import annotations

from pathlib import Path

from everstep.checkpointing.universal.lineage import (
    Lineage,
    begun_s,
    lineage_of,
    strangers,
)
from everstep.checkpointing.universal.manifest import Manifest
from everstep.checkpointing.universal.reader import committed
from everstep.checkpointing.universal.store import Store, open_store
from everstep.checkpointing.universal.writer import commit, folder_name, retain

FIRST, SECOND, OTHER = "a" * 16, "b" * 16, "c" * 16


def saved(store: Store, lineage: Lineage, step: int, at_s: float) -> str:
    name = folder_name(step, at_s, lineage.unique("01234567"))
    commit(store.inside(name), Manifest(step=step, run=lineage.to_json()))
    return name


def test_a_run_owns_what_it_goes_on_from(tmp_path: Path) -> None:
    """But no checkpoint that the ancestor's job has saved since: that is another branch."""
    store, first = open_store(str(tmp_path)), Lineage(FIRST)
    names = [saved(store, first, step, 1000.0 + step) for step in (1, 2)]
    second = first.continued(SECOND, begun_s(names[1]))
    names.append(saved(store, second, 3, 1003.0))
    assert strangers(store, names, second) == []
    late = saved(store, first, 4, 1004.0)
    assert strangers(store, [*names, late], second) == [late]
    other = saved(store, Lineage(OTHER), 9, 1009.0)
    assert strangers(store, [*names, other], second) == [other]


def test_lineage_survives_the_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    lineage = Lineage(FIRST).continued(SECOND, 5.0).continued(OTHER, 7.0)
    assert lineage_of(store, saved(store, lineage, 1, 8.0)) == lineage
    assert Lineage.from_json({}) == Lineage("")
    assert lineage.continued(OTHER, 9.0) == lineage, "a return to a checkpoint of the same run"


def test_retention_leaves_strangers_alone(tmp_path: Path) -> None:
    """Other runs' checkpoints are kept, whole or not; only those under this run's name are deleted."""
    store, own, other = open_store(str(tmp_path)), Lineage(FIRST), Lineage(OTHER)
    mine = [saved(store, own, step, 1000.0 + step) for step in (1, 2, 3)]
    theirs = [saved(store, other, step, 1000.5 + step) for step in (1, 2)]
    for lineage in (own, other):
        store.inside(folder_name(1, 1000.25, lineage.unique("89abcdef"))).put("params/half", [b"1"])

    def is_mine(name: str) -> bool:
        lineage = lineage_of(store, name)
        return own.has_named(name) if lineage is None else own.owns(lineage.run, begun_s(name))

    retained = retain(store, count=1, age_s=0.0, now_s=2000.0, mine=is_mine)
    assert sorted(retained.strangers) == sorted(theirs)
    assert set(committed(store)) == {mine[2], *theirs}
    assert [name for name in store.folders() if OTHER[:8] in name and name not in theirs], "a stranger's unfinished one"
    assert not [name for name in store.folders() if FIRST[:8] in name and name not in mine]
