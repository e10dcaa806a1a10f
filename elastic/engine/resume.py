"""Resuming from a checkpoint: which checkpoints exist, whether one fits this job, and the state of its shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from everstep.checkpointing.universal.lineage import Lineage, lineage_of, strangers
from everstep.checkpointing.universal.manifest import (
    CheckpointError,
    Manifest,
    path_of,
    room_and_name,
)
from everstep.checkpointing.universal.reader import (
    Checkpoint,
    committed,
    load,
)
from everstep.checkpointing.universal.store import Store, StoreError, open_store
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, WarningChannel, warn
from everstep.elastic.contract.settings import Settings
from everstep.elastic.guard.checkpoint_agreement import constants, contents_path
from everstep.elastic.holding.hyperparameters import Groups, same, unpack
from everstep.elastic.holding.stack import LayerStack, plain_name
from everstep.elastic.protocol.codec import Unreadable
from everstep.elastic.protocol.events import Saved
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.step.loss_scale import LOSS_SCALE
from everstep.elastic.step.sampled import SAMPLER
from everstep.elastic.step.stream_states import STREAM_STATE
from everstep.elastic.step.streams import STREAM
from everstep.resharding.units import Shard

if TYPE_CHECKING:
    from .engine import Engine

REMEMBERED_CHUNKS = 6
LOOKED_AT = 32  # checkpoints of a folder whose run is determined
CANDIDATES = 3  # checkpoints that a job may fall back to


class Resumption:
    """Finds the checkpoints of a job, and refuses those that would not continue it with the same numbers."""

    def __init__(
        self, settings: Settings, stack: LayerStack, engine: Engine, data: dict[str, Any], channel: WarningChannel
    ) -> None:
        self._settings = settings
        self._stack = stack
        self._birth = engine.birth
        self._masters = engine.optimizer.masters()
        self._driven = engine.registered.driven
        self._data = data
        self._channel = channel
        self._looked_at = False  # whether the newest checkpoint has been examined

    def find(self) -> list[Saved]:
        """The checkpoints that the job may resume from, newest first. Raises UsageError for one that does not fit."""
        settings = self._settings
        if settings.resume == "never":
            self._look_for_others()
            return []
        try:
            found = self._own() if settings.checkpoint else []
            if not found and settings.resume != "auto":
                checkpoint = _opened(settings.resume, settings)
                for remark in checkpoint.remarks:
                    warn(self._channel, Notice.FOREIGN_CHECKPOINT, f"{checkpoint.url}: {remark}")
                self._compare_data(checkpoint.manifest, checkpoint.url)
                found = [self._entry(checkpoint, settings.resume)]
        except (CheckpointError, StoreError) as error:
            raise UsageError(f"resume: {error}") from None
        if found and found[0].version >= settings.steps:
            text = (
                f"checkpoint {found[0].name} has {found[0].version} steps, and the job {settings.steps}: nothing is "
                "left to train; give another job another folder, or resume='never'"
            )
            warn(self._channel, Notice.NOTHING_LEFT, text)
        return found

    def _look_for_others(self) -> None:
        """The job starts from step 0 in a folder that has checkpoints."""
        settings = self._settings
        if not settings.checkpoint:
            return
        try:
            names = committed(open_store(settings.checkpoint, _options(settings)))
        except StoreError:
            return  # the attempt to save reports that
        if names:
            text = (
                f"{settings.checkpoint} has checkpoints of another run ({names[0]}), and resume='never': they are left "
                "alone, and a restart of this job will ask which to resume from; give each job a folder of its own"
            )
            warn(self._channel, Notice.CHECKPOINT_FOLDER, text)

    def _family(self, store: Store, names: list[str]) -> list[str]:
        """The job's checkpoints, newest first, in a folder that should have no others.

        Raises UsageError where there are others; resume=URL of a checkpoint chooses the run of that one.
        """
        chosen = self._settings.resume.rstrip("/").rpartition("/")[2]
        newest = chosen if chosen in names else names[0]
        own = lineage_of(store, newest)
        if own is None:
            return names  # damaged: reading it reports that
        others = strangers(store, names[:LOOKED_AT], own)
        if others and chosen not in names:
            raise UsageError(
                f"{self._settings.checkpoint} has checkpoints of several runs, {newest} and {others[0]}: choose with "
                f"resume=URL of one of them, and give each job a folder of its own"
            )
        return [name for name in names if name not in others]

    def _own(self) -> list[Saved]:
        """The checkpoints in the job's own folder."""
        settings = self._settings
        store = open_store(settings.checkpoint, _options(settings))
        found: list[Saved] = []
        names = committed(store)
        for name in (self._family(store, names) if names else [])[:CANDIDATES]:
            try:
                checkpoint = load(store.inside(name))
            except CheckpointError:
                if settings.on_damage == "stop":
                    raise
                continue
            if checkpoint is not None:
                if not found:  # older ones serve only as a fallback, for a job that resumes from the newest
                    self._compare_data(checkpoint.manifest, checkpoint.url)
                found.append(self._entry(checkpoint, name))
        return found

    def _entry(self, checkpoint: Checkpoint, name: str) -> Saved:
        manifest = checkpoint.manifest
        terms: Terms | None = None
        if manifest.agreement:
            try:
                terms = Terms.of(manifest.agreement)
            except Unreadable as error:
                raise UsageError(
                    f"{checkpoint.url} does not continue this job: another version of Everstep wrote what was agreed "
                    f"in its last step: {error}"
                ) from None
        for problem in self._problems(manifest, terms):
            raise UsageError(f"{checkpoint.url} does not continue this job: {problem}")
        if terms is None:
            return Saved(manifest.step, name, self._first_agreement(manifest.step))
        return Saved(manifest.step, name, self._next_agreement(manifest, terms, checkpoint.url))

    def _problems(self, manifest: Manifest, terms: Terms | None) -> list[str]:
        problems: list[str] = []
        for index, parameter in enumerate(self._stack.spec.parameters):
            room = "buffers" if self._stack.is_buffer(index) else "params"
            stored = resolve(manifest, room, parameter.name)
            array = manifest.arrays.get(path_of(room, stored))
            if array is None:
                problems.append(f"it has no {room}/{parameter.name}")
            elif array.shape != parameter.shape:
                problems.append(f"{parameter.name} has the shape {array.shape} there, and {parameter.shape} here")
            elif terms and (there := manifest.dtypes.get(stored, array.dtype)) != parameter.dtype:
                problems.append(f"{parameter.name} is {there} there, and {parameter.dtype} here")
        here = len(unpack(self._birth["groups"]))
        if terms and (groups := len(unpack(terms.groups))) != here:
            problems.append(f"its optimizer has {groups} parameter groups, and there are {here} here")
        return problems

    def _compare_data(self, manifest: Manifest, url: str) -> None:
        """Refuse other data than the checkpoint was trained on, or warn of it where the difference is to be ignored."""
        if not manifest.data:
            return  # another framework's: it does not say
        ours = {"global_batch_size": self._settings.global_batch_size, "samples": self._data["samples"]}
        ours |= {"micro_batch_size": self._settings.micro_batch_size, "seed": self._settings.seed}
        ours |= {"shuffle": self._data["shuffle"], "last_batch": self._data["last_batch"]}
        former = {"shuffle": True, "last_batch": "none", **manifest.data}
        changed = [
            f"{name} was {former[name]}, and is {value} now"
            for name, value in ours.items()
            if former.get(name, value) != value
        ]
        digests, theirs = self._data["sample_digests"], former.get("sample_digests", [])
        if changed and self._settings.resume_data == "check":
            raise UsageError(
                f"{url} does not continue this job: {changed[0]}: the order of the data would change (to continue "
                "anyway, with the order of the new data from here on: --es-resume-data=ignore, or "
                'resume_data="ignore")'
            )
        if changed:
            text = f"{url} is continued with other data: {', '.join(changed)}; the order of the data changes here"
            warn(self._channel, Notice.RESUME_DATA, text)
        elif digests and theirs and digests != theirs:
            text = (
                "the first, the middle or the last sample of the dataset, or the order of its sampler, is not the one "
                f"that {url} was trained on"
            )
            warn(self._channel, Notice.RESUME_DATA, text)

    def _next_agreement(self, manifest: Manifest, terms: Terms, url: str) -> str:
        """Settings with a checkpoint of ours: its own, or the script's; the clipping limits are always the script's."""
        after = {**(terms.after or {}), "clip": self._birth["clip"]}
        terms = replace(terms, clip=self._birth["clip"], after=after if terms.after is not None else None, end="")
        if self._settings.resume_data == "ignore":
            terms = replace(terms, registered={n: state for n, state in terms.registered.items() if n != SAMPLER})
        began = unpack(terms.script or _unscheduled(after.get("groups", terms.groups), terms.registered))
        found = differences(began, unpack(self._birth["groups"]))
        if self._settings.resume_hyperparameters == "script":
            if "scheduler" in {**terms.registered, **after.get("users", {})} and "scheduler" not in self._driven:
                raise UsageError(
                    "resume_hyperparameters=script: the rates come from a scheduler that the script steps by itself; "
                    "hand it over, so that it can be stepped again: run.steps(..., scheduler=scheduler)"
                )
            born, own = self._birth["registered"], (LOSS_SCALE, SAMPLER, STREAM, STREAM_STATE)  # no hyper-parameters
            driven = {name: state for name, state in born.items() if name in self._driven and name not in own}
            terms = replace(
                terms,
                groups=self._birth["groups"],
                registered={**terms.registered, **driven},
                advance=manifest.step,
                after={"users": after.get("users", {})},
                script=self._birth["groups"],
            )
        elif found and not self._looked_at:  # older ones are examined, too
            text = (
                f"the script has other settings than the one that saved {url}: {'; '.join(found[:3])}. The "
                "checkpoint's are used. To take the script's: --es-resume-hyperparameters=script"
            )
            warn(self._channel, Notice.HYPERPARAMETERS_DIFFER, text)
        if not self._looked_at:
            self._compare_masters(manifest, url)
        self._looked_at = True
        return terms.to_text()

    def _compare_masters(self, manifest: Manifest, url: str) -> None:
        """Warn if the precision in which parameters are stepped changes."""
        if bool(manifest.dtypes) == bool(self._masters):
            return
        if self._masters:
            change = "was saved without float32 masters, which begin with its values"
            way = "To continue without them: --es-master-dtype=none"
        else:
            change = "has float32 masters, which are rounded, since the job has master_dtype=none"
            way = "To continue with them: --es-master-dtype=float32"
        warn(self._channel, Notice.HYPERPARAMETERS_DIFFER, f"{url} {change}; the numbers change here. {way}")

    def _first_agreement(self, step: int) -> str:
        """Settings with a checkpoint of another framework: the script's, and the scheduler is stepped up."""
        if step == 0:
            return ""
        unknown: dict[str, Any] = {"loss": None, "norm": None, "scale": None, "digest": "", "protected": -1, "every": 1}
        return Terms(step=step - 1, **unknown, **self._birth, advance=step).to_text()


def _unscheduled(groups: Any, registered: Mapping[str, Any]) -> Groups:
    """The settings that no scheduler changes, of a checkpoint that does not contain the script's initial ones."""
    scheduled = {"lr", "initial_lr", "momentum", "betas"} if "scheduler" in registered else set()
    return [{name: value for name, value in group.items() if name not in scheduled} for group in unpack(groups)]


def differences(there: Groups, here: Groups) -> list[str]:
    """The differences between the settings of groups, in words."""
    found = []
    for number, (old, new) in enumerate(zip(there, here, strict=False)):
        for name in sorted(old.keys() & new.keys(), key=lambda name: (name == "initial_lr", name)):
            double = name == "initial_lr" and not same(old.get("lr"), new.get("lr"))
            if not double and not same(old[name], new[name]):
                found.append(f"{name} of parameter group {number} is {new[name]}, and was {old[name]}")
    return found


def resolve(manifest: Manifest, room: str, name: str) -> str:
    """The name under which a parameter is stored: its own, or that of the parameter it is tied to."""
    if path_of(room, name) in manifest.arrays:
        return name
    # An older version of Everstep saved it, from a compiled model.
    if any("_orig_mod." in path for path in manifest.arrays):
        compiled = next((n for n in _names_in(manifest, room) if plain_name(n) == name), None)
        if compiled is not None:
            return compiled
    owners = {**manifest.tied, **{owner: alias for alias, owner in manifest.tied.items()}}
    return owners.get(name, name)


def _names_in(manifest: Manifest, room: str) -> Iterator[str]:
    for path in manifest.arrays:
        found, name = room_and_name(path)
        if found == room:
            yield name


def _options(settings: Settings) -> Mapping[str, Any]:
    options: dict[str, Any] = json.loads(settings.checkpoint_options)
    return options


def _own(name: str, settings: Settings) -> Checkpoint:
    """A checkpoint in the job's own folder."""
    found = load(open_store(settings.checkpoint, _options(settings)).inside(name))
    if found is None:
        raise CheckpointError(f"{settings.checkpoint}/{name}: the manifest no longer exists")
    return found


def _opened(url: str, settings: Settings) -> Checkpoint:
    """The checkpoint of Everstep, or of another framework, at `url`."""
    from everstep.checkpointing.convert.drive.inplace import open_any  # formats of other frameworks, needed by few

    return open_any(url, _options(settings))


class CheckpointStates:
    """The states of shards, and the constants, in a checkpoint. Raises CheckpointError or StoreError."""

    def __init__(self, settings: Settings, stack: LayerStack, name: str) -> None:
        self.name = name
        self._stack = stack
        found = _opened(name, settings) if "/" in name else _own(name, settings)
        # One of another framework has no chunks, and remembers what it has read.
        self._checkpoint = _Remembering(found.store, found.manifest) if type(found) is Checkpoint else found

    @property
    def lineage(self) -> Lineage:
        """The run that saved the checkpoint."""
        return Lineage.from_json(self._checkpoint.manifest.run)

    def state(self, shard: Shard) -> dict[str, Any]:
        """A shard's parameter values ("value") and optimizer state, in the form of a keeper's record."""
        manifest, spec = self._checkpoint.manifest, self._stack.spec
        parameter = spec.parameters[shard.parameter]
        room = "buffers" if self._stack.is_buffer(shard.parameter) else "params"
        name = resolve(manifest, room, parameter.name)
        state = {"value": self._rows(path_of(room, name), shard)}
        for item in manifest.states if room == "params" else ():
            if path_of(f"optimizer/{item}", name) in manifest.arrays:
                state[item] = self._rows(path_of(f"optimizer/{item}", name), shard)
        for item, values in manifest.scalars.items():
            if name in values:
                state[item] = _number(values[name])
        return state

    def _rows(self, path: str, shard: Shard) -> Tensor:
        array, parameter = self._checkpoint.array(path), self._stack.spec.parameters[shard.parameter]
        if array.shape != parameter.shape:  # a state whose shape is not the parameter's
            return tensor_of(self._checkpoint.read(path))
        row = max(1, parameter.elements // max(1, parameter.rows))
        part = tensor_of(self._checkpoint.read(path, shard.start // row, -(-shard.stop // row)))
        return part if self._stack.spec.whole else part.reshape(-1)

    def contents(self, digests: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The pieces of large values of the script."""
        for digest in digests:
            yield digest, self._checkpoint.read(contents_path(digest)).tobytes()

    def load_constants(self) -> None:
        """Read frozen parameters and buffers into the model; those that it lacks keep their initial values."""
        for path, _, tensor in constants(self._stack):
            if path in self._checkpoint.manifest.arrays:
                with torch.no_grad():
                    tensor.copy_(tensor_of(self._checkpoint.read(path)))


@dataclass(frozen=True)
class _Remembering(Checkpoint):
    """Caches the last few chunks: another framework's may be larger than shards, and then serve several of them."""

    held: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def chunk(self, path: str, number: int) -> bytes:
        data = self.held.pop((path, number), None)
        self.held[(path, number)] = data if data is not None else super().chunk(path, number)
        while len(self.held) > REMEMBERED_CHUNKS:
            del self.held[next(iter(self.held))]
        return self.held[(path, number)]


def tensor_of(array: np.ndarray) -> Tensor:
    """A numpy array as a tensor that shares its memory; bfloat16 and fp8 too."""
    dtype = getattr(torch, str(array.dtype))
    if not array.size:
        return torch.empty(array.shape, dtype=dtype)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).view(array.shape)


def _number(scalar: Mapping[str, Any]) -> Any:
    if not scalar["dtype"]:
        return scalar["value"]
    return torch.tensor(scalar["value"], dtype=getattr(torch, scalar["dtype"]))
