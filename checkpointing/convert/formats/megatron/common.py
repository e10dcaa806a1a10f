"""What a Megatron checkpoint holds beside its tensors: arguments, iteration, schedule, the optimizers' settings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.carrying import OURS
from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files import torchfile
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.unpickling import Unpickled
from everstep.checkpointing.convert.formats.dcp import json_values
from everstep.checkpointing.convert.formats.dcp import tensors as dcp_tensors
from everstep.checkpointing.convert.formats.dcp.metadata import Index

from .names import Naming

TRACKER = "latest_checkpointed_iteration.txt"
SPEC = "everstep_spec"  # what we note in what we write: how the live modules were named
HF = "everstep_hf"  # and, as JSON, the configuration of the Hugging Face model that they were converted from
_OBJECT = "common_state/shard_0_1"  # where megatron-core 0.20 keeps what common.pt held


def iteration_folder(path: Path) -> Path:
    """The folder of one iteration: `path`, or the folder that the tracker file in it names."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text().strip()
    if text != "release" and not text.isdecimal():
        raise ConversionError(f"{tracker}: holds {text[:40]!r}; expected the number of an iteration")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ConversionError(f"{folder}: there is no such folder, but {tracker.name} says that it is the latest")
    return folder


def backend(folder: Path) -> str:
    """The writer of the tensors according to metadata.json; "" if there is none."""
    path = folder / "metadata.json"
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text())["sharded_backend"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: not as megatron-core writes it: {error!r}") from error


@dataclass
class Common:
    """`values` as stored; `args`: the fields of its Namespace; `dropped`: what could not be kept, by path."""

    values: dict[str, Any]
    args: dict[str, Any]
    iteration: int
    dropped: list[str] = field(default_factory=list)

    def argument(self, name: str, default: int) -> int:
        value = self.args.get(name)
        return default if value is None else int(value)


def read_common(folder: Path, index: Index) -> Common:
    """common.pt, or what took its place. Raises ConversionError if its iteration is not the folder's."""
    if _OBJECT in index.objects:
        values = dcp_tensors.load_object(index, _OBJECT)
    elif (folder / "common.pt").is_file():
        values = torchfile.load(folder / "common.pt")
    else:
        raise ConversionError(f"{folder}: no common.pt; expected it, or {_OBJECT}, beside the tensors")
    while isinstance(values, list | tuple) and len(values) == 1:
        values = values[0]
    if isinstance(values, Unpickled):
        values = values.fields
    if not isinstance(values, dict):
        raise ConversionError(f"{folder}: its common state is a {type(values).__name__}; expected a dictionary")
    if not all(isinstance(key, str) for key in values):
        raise ConversionError(f"{folder}: its common state has keys that are not names: {list(values)[:4]}")
    return _checked(folder, values)


def _checked(folder: Path, values: dict[str, Any]) -> Common:
    args = values.get("args")
    fields = args.fields if isinstance(args, Unpickled) else {}
    iteration = int(values.get("iteration", fields.get("iteration", 0)) or 0)
    named = re.fullmatch(r"iter_(\d+)", folder.name)
    if named and "iteration" in values and int(named[1]) != iteration:
        raise ConversionError(f"{folder}: mixed: it holds iteration {iteration}; its name says {int(named[1])}")
    return Common(values, fields, iteration)


def naming(common: Common, index: Index, settings: dict[str, str]) -> Naming:
    """The naming of the live modules: the user's setting, else the stored arguments, else derived from the names."""
    implementation = settings.get("spec") or common.args.get("transformer_impl") or common.values.get(SPEC)
    if implementation not in (None, "local", "transformer_engine"):
        raise ConversionError(f"spec is {implementation!r}; expected local or transformer_engine")
    if implementation is None:
        engine = any("core_attention._extra_state" in name for name in index.objects)
        implementation = "transformer_engine" if engine else "local"
    grouped = bool(common.args.get("moe_grouped_gemm"))
    stacked = not any(re.search(r"(^|\.)layers\.\d+\.", name) for name in index.tensors)
    return Naming(implementation == "local", grouped, stacked)


@dataclass(frozen=True)
class Chain:
    """One optimizer of a checkpoint. `groups`: its settings, with `names` unknown; `step`: its updates so far."""

    prefix: str
    expert: bool
    step: float | int | None
    groups: list[dict[str, Any]]
    sharding: str


def chains(common: Common, index: Index) -> list[Chain]:
    """The optimizers, in order: that of the experts has its own."""
    stored = common.values.get("optimizer")
    if not isinstance(stored, dict):
        return []
    if 0 in stored:
        return [_chain(f"chained_{at}.", stored[at], index) for at in sorted(stored)]
    return [_chain("", stored, index)]


def _chain(prefix: str, stored: dict[str, Any], index: Index) -> Chain:
    sharding = str(stored.get("param_state_sharding_type", ""))
    if sharding == "dp_reshardable":
        stored = stored | _of_buckets(prefix, index)
    inner = stored.get("optimizer", stored)
    groups = inner.get("param_groups", []) if isinstance(inner, dict) else []
    step = (inner.get("state") or {}).get("common_step") if isinstance(inner, dict) else None
    if isinstance(step, FileTensor):
        step = step.read().item()
    for group in groups:
        step = group.get("step", step)
    groups = [{name: value for name, value in group.items() if name != "step"} for group in groups]
    expert = bool(groups) and all(group.get("is_expert_parallel") for group in groups)
    return Chain(prefix, expert, step, groups, sharding)


def _of_buckets(prefix: str, index: Index) -> dict[str, Any]:
    name = f"{prefix}optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1"
    if name not in index.objects:
        raise ConversionError(f"{index.folder}: no {name}; expected it beside the optimizer's buckets")
    value = dcp_tensors.load_object(index, name)
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return {"optimizer": value}


def configuration(common: Common) -> dict[str, Any]:
    """That of the Hugging Face model which the checkpoint was converted from, if it was."""
    try:
        found = json.loads(common.values.get(HF, "{}"))
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


RANDOM_STATES = "random states of the ranks that saved, which are no others'"
_OF_CHAIN = ("optimizer", "param_groups", "state", "param_state", "param_state_sharding_type", "step")


def _beside(common: Common) -> dict[str, Any]:
    """What optimizers keep beside groups and states, by their numbers: the scale of the loss."""
    stored = common.values.get("optimizer")
    if not isinstance(stored, dict):
        return {}
    chains_ = stored if 0 in stored else {0: stored}
    beside = {
        str(at): {
            key: json_values.encode(value, common.dropped, f"optimizer.{key}")
            for key, value in chain.items()
            if key not in _OF_CHAIN
        }
        for at, chain in chains_.items()
        if isinstance(chain, dict)
    }
    return {at: values for at, values in beside.items() if values}


def kept(common: Common) -> dict[str, Any]:
    """What is not understood, as JSON, to be written back."""
    skipped = ("args", "optimizer", "rng_state", "opt_param_scheduler", HF, OURS)
    rest = {key: value for key, value in common.values.items() if key not in skipped}
    return {
        "optimizer": _beside(common),
        "args": json_values.encode(common.args, common.dropped, "args"),
        "common": {key: json_values.encode(value, common.dropped, key) for key, value in rest.items()},
        "vocab_size": common.args.get("vocab_size"),
        "padded_vocab_size": common.args.get("padded_vocab_size"),
    }
