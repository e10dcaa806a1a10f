"""Deliberate faults in the state machines, and whether the simulator finds them: `python -m tests.sim.mutations`.

Each mutation changes one line of the worker's machine or of the coordinator's recovery, as a mistake would: a guard is
removed, two instructions are swapped, a version is off by one. The simulator runs the package with that change, seed
after seed, until a check fails. A mutation that no seed finds is a gap in the simulator.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SEEDS = 200
SHAPES = ("2x2", "uneven", "growing", "3 nodes", "4 nodes", "4 nodes, leaving", "leaving early, growing")
HUNT = """
import sys
from everstep.elastic.sim.run import SHAPES, circumstances, run
names = sys.argv[2:]
for seed in range(int(sys.argv[1])):
    for name in names:
        try:
            run(seed, SHAPES[name], circumstances(seed, SHAPES[name]))
        except Exception as error:
            print(seed, name, type(error).__name__, str(error).splitlines()[0][:200], sep="\\t")
            sys.exit(0)
sys.exit(1)
"""


class Mutation(NamedTuple):
    """One changed line of a file, in which `old` occurs exactly once."""

    name: str
    file: str  # in elastic/protocol
    old: str
    new: str
    shapes: tuple[str, ...] = SHAPES


class Caught(NamedTuple):
    """The first seed that found a mutation."""

    seed: int
    shape: str
    error: str


MUTATIONS = (
    Mutation(
        "parity does not respect failure domains",
        "protection.py",
        "domains={name: state.nodes[name].domains for name in stages},",
        "domains={},",
        ("2 racks", "3 racks", "2 racks, replay"),
    ),
    Mutation(
        "an owner that did not carry the agreed step out is not brought forward",
        "worker.py",
        "elif not entering.fresh and holding.owned_version == version - 1:",
        "elif not entering.fresh and holding.owned_version == version - 2:",
    ),
    Mutation(
        "shards that are gained count as held",
        "worker.py",
        "kept = frozenset() if discard else shards - gained",
        "kept = frozenset() if discard else shards",
    ),
    Mutation(
        "values of layers that a rank has just gained count as there",
        "worker.py",
        "values_version=TORN if moved and not seeded else holding.values_version",
        "values_version=holding.values_version",
        ("4 nodes, leaving",),
    ),
    Mutation(
        "the version of owned shards is one behind after the optimizer",
        "worker.py",
        "owned_version=step + 1, values_version=TORN",
        "owned_version=step, values_version=TORN",
    ),
    Mutation(
        "values are published before the optimizer runs",
        "worker.py",
        "return state, [*instructions, Publish(step + 1, layout)]",
        "return state, [*instructions[:-1], Publish(step + 1, layout), instructions[-1]]",
    ),
    Mutation(
        "a step that is agreed on but not committed here is not committed in the recovery",
        "worker.py",
        "behind = not entering.fresh and before == version - 1",
        "behind = not entering.fresh and before == version - 2",
    ),
    Mutation(
        "micro-batches whose forward is done are reported as finished",
        "worker_state.py",
        "held=tuple(sorted(work.held)) if valid else (),",
        "held=tuple(sorted(work.held | work.running)) if valid else (),",
    ),
    Mutation(
        "a step is resumed with values of the version before",
        "worker.py",
        "current = not discard and holding.values_version == version and not plan.stand_ins",
        "current = not discard and holding.values_version >= version - 1 and not plan.stand_ins",
    ),
    Mutation(
        "a rank that has refreshed its values resumes the step it was in",
        "worker.py",
        "if entering.current and plan.version is not None:",
        "if not entering.fresh and plan.version is not None:",
    ),
    Mutation(
        "a switch that was agreed on outlives the abort of its generation",
        "worker.py",
        "phase=WorkerPhase.WAITING, entering=None, switch=None)",
        "phase=WorkerPhase.WAITING, entering=None)",
        ("leaving early, growing",),
    ),
    Mutation(
        "a generation that is entered already is offered again",
        "worker.py",
        "return proposal if proposal is not None and proposal.generation > known else None",
        "return proposal",
    ),
    Mutation(
        "a rank that goes back keeps the agreement that is given up",
        "worker.py",
        "state = replace(state, version=version, agreed=version - 1, agreement=agreement)\n        holding",
        "state = replace(state, version=version)\n        holding",
        ("3 nodes, seldom", "4 nodes, seldom", "5 nodes", "6 nodes"),
    ),
    Mutation(
        "a plan is made before all that were asked have reported",
        "recovering.py",
        "if any(worker not in recovery.reports for worker in recovery.awaited & live):",
        "if all(worker not in recovery.reports for worker in recovery.awaited & live):",
    ),
    Mutation(
        "what was agreed on before a rollback counts",
        "recovering.py",
        "for r in reports if r.generation >= state.rolled_back",
        "for r in reports if r.generation >= 0",
        ("3 nodes, seldom",),
    ),
    Mutation(
        "the coordinator forgets what it knows to be agreed on",
        "recovering.py",
        "furthest = max([state.agreed, *(report.agreed for report in reports)]) + 1",
        "furthest = max(report.agreed for report in reports) + 1",
    ),
    Mutation(
        "a joiner that has carried out its plan is not asked",
        "recovering.py",
        "w for w in state.workers.values() if w.status is Status.READY and w.id.rank in state.join.layout.ranks",
        "w for w in () if w.status is Status.READY and w.id.rank in state.join.layout.ranks",
    ),
    Mutation(
        "those that were asked in an interrupted recovery are not asked again",
        "recovering.py",
        "asked += [w for w in state.workers.values() if w.id in earlier.awaited and w not in asked]",
        "asked += []",
        ("joining",),
    ),
    Mutation(
        "a rollback is not remembered",
        "recovering.py",
        "            rolled_back=state.generation,\n",
        "            rolled_back=state.rolled_back,\n",
        ("3 nodes, seldom", "4 nodes, seldom", "5 nodes", "6 nodes"),
    ),
    Mutation(
        "shards that were found to be wrong are reported as held",
        "worker.py",
        "holding = replace(state.holding, owned=state.holding.owned - event.shards)",
        "holding = replace(state.holding, owned=state.holding.owned)",
        ("differing",),
    ),
    Mutation(
        "what was computed before shards were made up counts",
        "recovering.py",
        "    if recovery.substitutes:  #",
        "    if False and recovery.substitutes:  #",
        ("made up", "made up, seldom"),
    ),
    Mutation(
        "records of the line before an approximation count",
        "recovering.py",
        "lines = forked(recovery.lines, plan.version, plan.generation)",
        "lines = recovery.lines",
        ("made up", "made up, seldom"),
    ),
    Mutation(
        "version 0 is made from the seed although shards of it were approximated",
        "worker.py",
        "approximated = since(plan.lines_before, 0) > 0",
        "approximated = False",
        ("made up",),
    ),
    Mutation(
        "the oldest checkpoint counts as the newest",
        "checkpoints.py",
        "saved=(*newer, event.saved, *older)",
        "saved=(*older, event.saved, *newer)",
        ("full checkpoint storage, 3 nodes",),
    ),
    Mutation(
        "the job does not say that its last state is not saved",
        "ending.py",
        "if state.job.checkpoints and not _saved(state, version):",
        "if False and not _saved(state, version):",
        ("full checkpoint storage",),
    ),
    Mutation(
        "copies of what was not backed up here before count as level",
        "backing_up.py",
        "self.in_sync = set() if discard else self.in_sync.intersection(self.mine)",
        "self.in_sync = set() if discard else set(self.mine)",
        ("3 nodes, replay", "4 nodes, replay", "4 nodes, replay, leaving"),
    ),
    Mutation(
        "in replay a lost node takes the newest version along",
        "protection.py",
        "candidates.append(newest)",
        "candidates.append(-1)",
        ("3 nodes, replay", "4 nodes, replay", "4 nodes, replay, leaving"),
    ),
    Mutation(
        "a copy made ahead of a rebalance counts as newer than it is",
        "prefetching.py",
        "self.versions[shard] = wanted.version + wanted.gradient",
        "self.versions[shard] = wanted.version + 1",
        ("rebalancing, growing", "rebalancing, saving"),
    ),
    Mutation(
        "a relayout is offered while a recovery is under way",
        "relayout.py",
        'what = "a recovery is under way"',
        'what = ""',
        ("relayouts", "relayouts, 5 nodes"),
    ),
)


@contextmanager
def mutated(mutation: Mutation | None) -> Iterator[Path]:
    """A folder from which the pure rooms of Everstep can be imported, with a mutation in them."""
    with tempfile.TemporaryDirectory(prefix="everstep-mutation-") as name:
        package = Path(name) / "everstep"
        (package / "elastic").mkdir(parents=True)
        for path in (package / "__init__.py", package / "elastic" / "__init__.py"):
            path.touch()
        (package / "resharding").symlink_to(ROOT / "resharding")
        (package / "elastic" / "sim").symlink_to(ROOT / "elastic" / "sim")
        protocol = package / "elastic" / "protocol"
        shutil.copytree(ROOT / "elastic" / "protocol", protocol, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            text = (protocol / mutation.file).read_text()
            if text.count(mutation.old) != 1:
                raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once")
            (protocol / mutation.file).write_text(text.replace(mutation.old, mutation.new))
        yield Path(name)


def hunt(mutation: Mutation | None, seeds: int = SEEDS) -> Caught | None:
    """Simulate until a seed finds the mutation; None if none does."""
    shapes = mutation.shapes if mutation is not None else SHAPES
    with mutated(mutation) as folder:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", "-c", HUNT, str(seeds), *shapes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 1 and not done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr)
    seed, shape, kind, message = done.stdout.strip().split("\t")
    return Caught(int(seed), shape, f"{kind}: {message}")


def main() -> int:
    """Try all mutations, or those whose name contains a text; the status is the number that were not found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("text", nargs="?", default="", help="only mutations whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    missed = 0
    for mutation in MUTATIONS:
        if arguments.text in mutation.name:
            caught = hunt(mutation, arguments.seeds)
            missed += caught is None
            print(f"{'NOT FOUND' if caught is None else f'seed {caught.seed}, {caught.shape}'}: {mutation.name}")
            if caught is not None:
                print(f"    {caught.error}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
