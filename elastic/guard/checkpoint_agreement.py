"""A worker's part in checkpoints: the members agree in the step when one is due; a saver process writes it.

The saver of each node writes what its workers own, from keeper memory, while training continues; the last saver to
finish commits. A save that fails is reported and counted, and attempted again when the next checkpoint is due.
"""

from __future__ import annotations

import functools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from everstep import __version__
from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.record import ShardRecord, ShardState
from everstep.checkpointing.saving.part import finish, save_part, saved_bytes
from everstep.checkpointing.saving.request import Parameter, SaveRequest, ShardPiece
from everstep.checkpointing.universal.lineage import Lineage, begun_s
from everstep.checkpointing.universal.manifest import (
    OTHER,
    Array,
    CheckpointError,
    chunk_shape,
    path_of,
)
from everstep.checkpointing.universal.store import StoreError, open_store
from everstep.checkpointing.universal.writer import ChunkWriter, folder_name
from everstep.comms.mesh.tensors import raw
from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.contract.settings import Settings
from everstep.elastic.contract.stateful import digests_in
from everstep.elastic.holding.stack import LayerStack, plain_name
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.agreement import Saving
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.layout import Layout
from everstep.resharding.units import ParameterSpec, Shard

STALLS_S = 20.0  # without progress: then a warning is due
WAITS_S = 10.0  # how long the end of training waits for a checkpoint before it reports the wait
TRIES = 3  # of a save whose saver or keeper is lost
CONSTANT_CHUNK_BYTES = 16 << 20


def contents_path(digest: str) -> str:
    """The path of a piece of the script's large values."""
    return path_of(OTHER, f"registered/{digest}")


@dataclass
class _Waiting:
    """A version that is to be saved, and its parts that are missing. `records`: its shards', where no keeper runs."""

    name: str
    version: int
    terms: Terms
    layout: Layout
    rank: int
    sealed: bool = False
    after: dict[str, Any] | None = None
    contents: Mapping[str, bytes] = field(default_factory=dict)  # what `after` refers to, on the lowest rank
    started: bool = False
    records: dict[int, memoryview] = field(default_factory=dict)


class Checkpoints:
    """When this job's state is saved, and this rank's part in it. Does nothing in a job without checkpoints."""

    def __init__(
        self,
        settings: Settings,
        stack: LayerStack,
        snapshots: Snapshots,
        membership: Membership,
        run: dict[str, Any],
        link: KeeperLink | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        self._settings = settings
        self._stack = stack
        self._snapshots = snapshots
        self._membership = membership
        self._run = run  # the run that owns the checkpoints, as the manifest names it
        self.link = link
        self.lineage = lineage or Lineage(secrets.token_hex(8))  # equal on all ranks of a run
        self.newest = -1  # the newest version that is known to be saved
        self.failures = 0
        self._asked_after: int | None = None  # the newest saved version when a checkpoint was requested
        self._open: dict[str, str] = {}  # writer -> name, of saves in progress
        self._terms: dict[str, tuple[int, str]] = {}  # name -> version, agreement
        self._attempt: tuple[int, int] = (0, 0)  # version and generation of the last save that began
        self._results: list[dict[str, Any]] = []  # of saves in this process
        self._waiting: _Waiting | None = None
        self._requests: dict[str, SaveRequest] = {}  # name -> request to the saver
        self._again = 0  # how often a save was requested again
        self._handed_over = ""  # the last name that the keeper received
        self._lock = threading.Lock()
        self._kept: tuple[int, dict[int, memoryview]] = (-1, {})  # the last version, where no keeper runs
        self._moved_s: dict[str, float] = {}  # writer -> last progress of its save, of those in progress
        self._why = ""  # the reason for the last failure of a save

    def unique(self) -> str:
        """The time, for the name of a checkpoint."""
        return self.lineage.unique(secrets.token_hex(4))

    @property
    def active(self) -> bool:
        """Whether the job saves checkpoints."""
        return bool(self._settings.checkpoint)

    # ------------------------------------------------------------ agreeing

    def share(self, generation: int, rank: int) -> Saving | None:
        """This rank's contribution to the agreement of a step; None in a job without checkpoints."""
        if not self.active:
            return None
        self.poll()
        version, attempted_in = self._attempt
        return Saving(
            free=not self._open,
            asked=self._asked(),
            again=version > self.newest and attempted_in not in (0, generation),
            newest=self.newest,
            tried=version,
            first=(rank, time.time(), self.unique()),
        )

    def agreed(self, step: int, merged: Saving | None, ancestors: Iterable[tuple[str, float]]) -> dict[str, Any]:
        """Evaluate the members' merged shares: whether the state after `step` is saved, and under which name.

        `ancestors`: the runs before this one, also for a rank that joined later.
        """
        if merged is None:
            return {"save": "", "saved": -1, "ancestors": ()}
        version, every = step + 1, self._settings.checkpoint_every
        due = version // every > merged.tried // every or version == self._settings.steps
        begins = (due or merged.asked or merged.again) and version > merged.newest and merged.free
        name = folder_name(version, *merged.first[1:]) if begins else ""
        return {"save": name, "saved": merged.newest, "ancestors": tuple(ancestors)}

    def _asked(self) -> bool:
        """Whether a checkpoint was requested, and none has been saved since."""
        if self._membership.save_asked and self._asked_after is None:
            self._asked_after = self.newest
        if self._asked_after is not None and self.newest > self._asked_after:
            self._membership.save_answered()
            self._asked_after = None
        return self._asked_after is not None

    # ------------------------------------------------------------ saving

    def begin(self, terms: Terms, layout: Layout, rank: int) -> Callable[[], None] | None:
        """Prepare a save of the version after the step, if one was agreed. Returns what to call once the keeper has it.

        The save begins once the keeper has the version and `settle` has been called with the state of the user's code.
        """
        self.newest = max(self.newest, terms.saved)
        known = {"id": self.lineage.run, "ancestors": terms.ancestors}
        self.lineage = Lineage.from_json(known)
        name, version = terms.save, terms.step + 1
        if not name:
            return None
        self._attempt = (version, layout.generation)
        self._snapshots.begin_saving(version)
        self._opened(f"rank-{rank}", name)
        waiting = self._waiting = _Waiting(name, version, terms, layout, rank)
        if rank == layout.ranks[0]:
            self._membership.note("checkpoint_begun", {"version": version, "name": name})

        def sealed() -> None:
            with self._lock:
                waiting.sealed = True
            self._start(waiting)

        return sealed

    def begin_alone(self, terms: Terms, layout: Layout, states: Callable[[int], ShardState]) -> None:
        """Without the launcher there is no keeper: copy the state here, and let a thread of this process save it."""
        sealed = self.begin(terms, layout, 0)
        if sealed is None:
            return
        assert self._waiting is not None
        version, records = self._kept
        self._waiting.records = records if version == self._waiting.version else self._copies(states)
        sealed()

    def _copies(self, states: Callable[[int], ShardState]) -> dict[int, memoryview]:
        copies: dict[int, memoryview] = {}
        for shard in self._stack.spec.shards:
            record = ShardRecord(states(shard.index))
            data = copies[shard.index] = memoryview(bytearray(record.length))
            record.write(data)
        return copies

    def keep(self, version: int, states: Callable[[int], ShardState]) -> None:
        """Copy the last version where no keeper runs, before the script may change the model."""
        if self.active and version > max(0, self.newest):
            self._kept = (version, self._copies(states))

    def settle(self, after: dict[str, Any], contents: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """The next step begins: the state of the user's code after the last one ("groups", "users").

        `contents`: on the lowest rank, the pieces of large values that this refers to.
        """
        waiting = self._waiting
        if waiting is not None:
            with self._lock:
                waiting.after, waiting.contents = after, contents
            self._waiting = None
            self._start(waiting)

    @property
    def unsettled(self) -> bool:
        """Whether a version that is to be saved waits for `settle`."""
        return self._waiting is not None

    def abandon(self) -> None:
        """The job goes back to an older version: later versions will be saved again."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._open.clear()
            self._moved_s.clear()
            self._snapshots.end_saving()

    def _start(self, waiting: _Waiting) -> None:
        with self._lock:
            if not waiting.sealed or waiting.after is None or waiting.started:
                return
            waiting.started = True
        # In the run that resumes, no version is protected yet.
        # The user's code may have replaced what large values had when the step was agreed on.
        registered = {**waiting.terms.registered, **waiting.after["users"]}
        terms = replace(waiting.terms, registered=registered, after=waiting.after, shown=True, protected=-1)
        terms = replace(terms, script=self._run["settings"])
        agreement = terms.to_text()
        self._terms[waiting.name] = (waiting.version, agreement)
        writer = f"rank-{waiting.rank}"
        others = [*(path for path, _, _ in constants(self._stack))]
        others += [contents_path(digest) for digest in digests_in(registered)]
        request = self._request(waiting, agreement, writer, others)
        if waiting.rank == waiting.layout.ranks[0] and others:
            second = f"{writer}-constants"
            self._opened(second, waiting.name)
            save_others = functools.partial(self._save_others, request, second, waiting.contents)
            self._in_thread(request, second, save_others)
        if self.link is None:
            records = waiting.records

            def save(warned: Callable[[str], None]) -> bool:
                moves = functools.partial(self._moves, writer)
                return save_part(request, lambda shards: {s: records[s] for s in shards}, moved=moves, warned=warned)

            self._in_thread(request, writer, save)
            return
        self._requests[waiting.name], self._again = request, 0
        self._hand_over(request)

    def _hand_over(self, request: SaveRequest) -> None:
        assert self.link is not None
        try:
            self.link.save(request.to_json())
            self._handed_over = request.name
        except OSError as error:
            self._ended({"writer": request.writer, "name": request.name, "error": str(error)})

    def _opened(self, writer: str, name: str) -> None:
        self._open[writer] = name
        self._moves(writer)

    def _moves(self, writer: str) -> None:
        self._moved_s[writer] = time.monotonic()

    def _in_thread(self, request: SaveRequest, writer: str, action: Callable[[Callable[[str], None]], bool]) -> None:
        warnings: list[str] = []

        def work() -> None:
            started = time.monotonic()
            result: dict[str, Any] = {"writer": writer, "name": request.name, "committed": False, "error": ""}
            result["warnings"] = warnings
            try:
                result["committed"] = action(warnings.append)
                result["bytes"] = saved_bytes(request) if result["committed"] else 0
            except (StoreError, CheckpointError, OSError) as error:
                result["error"] = str(error)
            self._ended({**result, "seconds": time.monotonic() - started})

        threading.Thread(target=work, name="everstep-checkpoint", daemon=True).start()

    def _ended(self, result: dict[str, Any]) -> None:
        with self._lock:
            self._results.append(result)

    def _save_others(
        self, request: SaveRequest, name: str, contents: Mapping[str, bytes], warned: Callable[[str], None]
    ) -> bool:
        """Frozen parameters, buffers and the script's large values: all ranks hold them, and the lowest writes them."""
        folder = open_store(request.url, request.options).inside(request.name)
        writer = ChunkWriter(folder)
        for path, tensor_name, tensor in constants(self._stack):
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            array = Array(shape, dtype, chunk_shape(shape, dtype, CONSTANT_CHUNK_BYTES)).named(tensor_name)
            writer.declare(path, array)
            for number in range(array.chunks):
                first = number * array.chunk_rows
                rows = tensor[first : first + array.chunk_rows] if shape else tensor
                writer.put(path, number, raw(rows))
                self._moves(name)
        for digest, piece in contents.items():
            writer.declare(contents_path(digest), Array((len(piece),), "uint8", (len(piece),)))
            writer.put(contents_path(digest), 0, piece)
            self._moves(name)
        writer.finish(name)
        return finish(request, folder, warned=warned)

    def _request(self, waiting: _Waiting, agreement: str, writer: str, others: Sequence[str]) -> SaveRequest:
        settings, spec = self._settings, self._stack.spec
        first: dict[int, Shard] = {}
        pieces: list[ShardPiece] = []
        for shard in spec.shards:
            number = shard.index - first.setdefault(shard.parameter, shard).index
            if waiting.layout.owners[shard.index] == waiting.rank:
                pieces.append(ShardPiece(shard.index, shard.parameter, number, shard.elements))
        parameters = tuple(
            Parameter(p.name, "buffers" if self._stack.is_buffer(i) else "params", p.shape, _rows(p, first[i]))
            for i, p in enumerate(spec.parameters)
        )
        expected = [*(path_of(p.room, p.name) for p in parameters), *others]
        return SaveRequest(
            url=open_store(settings.checkpoint, json.loads(settings.checkpoint_options)).url,
            options=json.loads(settings.checkpoint_options),
            name=waiting.name,
            writer=writer,
            writers=len(waiting.layout.ranks) + bool(others),
            version=waiting.version,
            parameters=parameters,
            pieces=tuple(pieces),
            expected=tuple(expected),
            manifest=self._manifest(waiting.version, agreement, waiting.layout),
            keep=settings.checkpoint_keep,
            keep_s=settings.checkpoint_keep_s,
            lines=self._snapshots.lines,
        )

    def _manifest(self, version: int, agreement: str, layout: Layout) -> dict[str, Any]:
        settings, spec = self._settings, self._stack.spec
        terms = Terms.of(agreement)
        assert terms.after is not None
        registered = terms.registered
        return {
            "step": version,
            "tied": self._stack.aliases,
            "layers": {p.name: list(p.layers) for p in spec.parameters},
            "dtypes": self._run["dtypes"],
            "optimizer": {"name": self._run["optimizer"], "groups": terms.after["groups"]},
            "scheduler": registered.get("scheduler"),
            "registered": registered,
            "data": {
                **self._run["data"],
                "global_batch_size": settings.global_batch_size,
                "micro_batch_size": settings.micro_batch_size,
                "seed": settings.seed,
                "position": version * settings.global_batch_size,
            },
            "run": {
                **self.lineage.to_json(),
                "layout": layout.describe(),
                "world_size": len(layout.ranks),
                "generation": layout.generation,
                "everstep": __version__,
                "torch": torch.__version__,
            },
            "agreement": agreement,
        }

    # ------------------------------------------------------------ what became of it

    def poll(self) -> None:
        """Check whether saves have ended. A failure is reported, and does not affect training otherwise."""
        if not self._open:
            return
        handed_over = self._handed_over
        with self._lock:
            results, self._results = self._results, []
        for writer, name in list(self._open.items()):
            told = self.link.saves(writer) if self.link is not None and not writer.endswith("-constants") else None
            if told is not None:
                results += [{"writer": writer, **result} for result in told["results"]]
                known = any(r["writer"] == writer and r["name"] == name for r in results)
                if name in told["still_s"]:
                    self._moved_s[writer] = time.monotonic() - told["still_s"][name]
                if not known and name not in told["open"] and name == handed_over:
                    lost = "the snapshot keeper that was saving it was lost"
                    results.append({"writer": writer, "name": name, "error": lost, "lost": True})
        ended = {(result["writer"], result["name"]) for result in results}
        results += [self._given_up(*item) for item in self._open.items() if item not in ended and self._stalls(*item)]
        for result in results:
            self._take(result)
        if not self._open:
            self._snapshots.end_saving()

    def _stalls(self, writer: str, name: str) -> bool:
        """Whether a save has made no progress for too long; a warning precedes that."""
        if name not in self._terms and self._waiting is not None and self._waiting.name == name:
            self._moves(writer)  # it has not begun: the user's code is still in the step that it belongs to
        still_s, limit_s = time.monotonic() - self._moved_s[writer], self._settings.checkpoint_timeout
        if still_s > min(STALLS_S, limit_s / 2) and name in self._terms:
            version = self._terms[name][0]
            text = (
                f"the storage has accepted nothing of the checkpoint of {version} steps for a while: after {limit_s:g}"
                " s without progress it is given up (checkpoint_timeout)"
            )
            warn(self._membership, Notice.SAVE_STALLS, text, version=version, name=name)
        return still_s > limit_s

    def _given_up(self, writer: str, name: str) -> dict[str, Any]:
        if self.link is not None and not writer.endswith("-constants"):
            self.link.abandon(writer, name)
        why = (
            f"no progress for {self._settings.checkpoint_timeout:g} s: the storage does not answer (checkpoint_timeout)"
        )
        return {"writer": writer, "name": name, "error": why}

    def _take(self, result: dict[str, Any]) -> None:
        writer, name = result["writer"], result["name"]
        if self._open.get(writer) != name:
            return
        del self._open[writer]
        self._moved_s.pop(writer, None)
        version, agreement = self._terms.get(name, (-1, ""))
        for text in result.get("warnings", ()):
            warn(self._membership, Notice.CHECKPOINT_FOLDER, text)
        if result.get("error"):
            self.failures += 1
            self._why = str(result["error"])
            fields = {"version": version, "name": name, "why": result["error"], "failures": self.failures}
            self._membership.note("checkpoint_failed", fields)
            request = self._requests.get(name)
            if result.get("lost") and request is not None and self._again < TRIES:  # only the saver is lost
                self._again += 1
                self._opened(writer, name)
                self._hand_over(request)
        elif result.get("committed"):
            self.newest = max(self.newest, version)
            fields = {"seconds": round(result.get("seconds", 0.0), 3), "bytes": result.get("bytes", 0)}
            saved = e.Saved(version, name, agreement)
            self._membership.tell(e.CheckpointSaved(self._membership.worker, saved, fields))
        self._terms = {n: t for n, t in self._terms.items() if n in self._open.values()}
        self._requests = {n: r for n, r in self._requests.items() if n in self._open.values()}

    def save_last(
        self,
        terms: Terms,
        layout: Layout,
        rank: int,
        after: tuple[dict[str, Any], Mapping[str, bytes]],
        states: Callable[[int], ShardState],
        on_wait: Callable[[], None],
    ) -> str:
        """Save the last version, which the keeper holds, once more. Returns why this rank could not, if so."""
        self.conclude(on_wait)
        if self._open:
            return self._why
        self._why = ""
        if self.link is None:
            self.begin_alone(terms, layout, states)
        else:
            sealed = self.begin(terms, layout, rank)
            assert sealed is not None
            sealed()
        self.settle(*after)
        self.conclude(on_wait)
        return self._why

    def resumed(self, version: int, script: Any, name: str, lineage: Lineage) -> None:
        """The job resumes from the checkpoint `name` of `version`, saved by a run with this `lineage`.

        `script`: the settings that its script began with, if known.
        """
        self._run["settings"] = script or self._run["settings"]
        self.lineage = lineage.continued(self.lineage.run, begun_s(name.rstrip("/").rpartition("/")[2]))
        self.newest = version
        self._attempt = (version, 0)

    def conclude(self, on_wait: Callable[[], None]) -> None:
        """Wait for saves in progress, as long as they make progress."""
        started = time.monotonic()
        while self._open:
            on_wait()
            time.sleep(0.01)
            self.poll()
            if self._open and time.monotonic() - started > WAITS_S:
                limit_s = self._settings.checkpoint_timeout
                text = f"training has ended, and waits for the last checkpoint; {limit_s:g} s without progress end that"
                warn(self._membership, Notice.SAVE_WAITED_FOR, text)


def _rows(parameter: ParameterSpec, shard: Shard) -> int:
    return max(1, shard.elements * parameter.rows // max(1, parameter.elements))


def constants(stack: LayerStack) -> list[tuple[str, str, Any]]:
    """(path, name, tensor) of what training does not change: frozen parameters, and buffers other than statistics."""
    frozen = {plain_name(name) for name, _ in stack.model.named_parameters(remove_duplicate=False)}
    return [
        (path_of("frozen" if name in frozen else "buffers", name), name, tensor) for name, tensor in stack.constants()
    ]
