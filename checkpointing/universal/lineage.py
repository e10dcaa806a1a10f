"""The owner of a checkpoint: this run, an ancestor that this run continues, or a foreign run that shares the folder.

A run is one start of a job. The checkpoint that it resumes from defines its ancestors: the run of that checkpoint, up
to that checkpoint, and the ancestors of that run. Everything else in the folder belongs to another job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .manifest import NAME, CheckpointError, Manifest
from .store import Store
from .writer import parse_folder

ANCESTORS_KEPT = 64  # the nearest
NAMED = 8  # digits of a run in the names of its checkpoints


@dataclass(frozen=True)
class Lineage:
    """A run and its ancestors: (run, when the checkpoint that was resumed from was begun)."""

    run: str
    ancestors: tuple[tuple[str, float], ...] = ()

    def owns(self, run: str, begun_s: float) -> bool:
        """Whether a checkpoint of `run` that was begun at `begun_s` (seconds since 1970) belongs to this run."""
        return run == self.run or any(run == one and begun_s <= until_s for one, until_s in self.ancestors)

    def unique(self, random: str) -> str:
        """The unique part of a checkpoint's name (hexadecimal); it names the owner before the manifest exists."""
        return f"{self.run[:NAMED]}{random}"

    def has_named(self, name: str) -> bool:
        """Whether a checkpoint's folder got its name from this run, or from an ancestor."""
        runs = tuple(run[:NAMED] for run in (self.run, *(run for run, _ in self.ancestors)) if len(run) >= NAMED)
        return name.rpartition("-")[2].startswith(runs)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.run, "ancestors": [list(item) for item in self.ancestors]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Lineage:
        """From a manifest's `run`; a converted checkpoint names none, and gets an empty lineage."""
        ancestors = tuple((str(run), float(until_s)) for run, until_s in raw.get("ancestors", ()))
        return cls(str(raw.get("id", "")), ancestors)

    def continued(self, run: str, begun_s: float) -> Lineage:
        """The lineage of a run that resumes from a checkpoint of this run."""
        if run == self.run:
            return self
        return Lineage(run, ((self.run, begun_s), *self.ancestors)[:ANCESTORS_KEPT])


def begun_s(name: str) -> float:
    """When the checkpoint in a folder of this name was begun."""
    parsed = parse_folder(name)
    return parsed[0] if parsed else 0.0


def lineage_of(store: Store, name: str) -> Lineage | None:
    """That of the checkpoint in the folder `name`; None if it is not committed, or cannot be read."""
    data = store.inside(name).get(NAME)
    try:
        return Lineage.from_json(Manifest.from_bytes(data, name).run) if data is not None else None
    except CheckpointError:
        return None


def strangers(store: Store, names: Iterable[str], own: Lineage) -> list[str]:
    """Those of the folders `names` that are of other runs than `own` and its ancestors."""
    found = [(name, lineage_of(store, name)) for name in names]
    return [name for name, lineage in found if lineage is not None and not own.owns(lineage.run, begun_s(name))]
