"""Checkpoints of Megatron-LM before dist_checkpointing (`--ckpt-format torch`): a file for each model-parallel rank.

Read only. Tensor-parallel parts are put together by the rules in rules/megatron_tp.toml; rule files of the user come
before them. What has no names is checked: masters must round to the weights, replicas must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.files import torchfile
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.unpickling import Unpickled
from everstep.checkpointing.convert.formats.dcp import json_values
from everstep.checkpointing.convert.rules.patterns import Match, Table, describe
from everstep.checkpointing.convert.rules.rulefile import ShardRule, built_in, read_rules

from .common import RANDOM_STATES, iteration_folder
from .flat import (
    MAIN,
    Member,
    bucket_elements,
    flat,
    groups_of,
    listed,
    step_of,
)
from .groups import add_groups

EXTRA = "megatron"
_RANK = re.compile(r"mp_rank_(?P<tp>\d+)(?:_(?P<pp>\d+))?(?:_(?P<ep>\d+))?")
_MODEL = "model_optim_rng.pt"
_UNDERSTOOD = ("args", "optimizer", "opt_param_scheduler", "rng_state")
_FLAT = "distrib_optim.pt"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?layers)\.(?P<layer>\d+)\.")


def detect(path: Path) -> bool:
    """Whether `path` is such a checkpoint, or the folder of several."""
    if not path.is_dir():
        return False
    folders = [path, *path.glob("iter_*"), path / "release"]
    return any(any(folder.glob("mp_rank_*")) for folder in folders)


def read(path: Path, options: Options) -> Content:
    """The checkpoint at `path`; the latest, if it is a folder of several."""
    ranks = _ranks(iteration_folder(path))
    content = Content(step=ranks[0].iteration)
    parts: dict[str, _Parts] = {}
    offsets = _layer_offsets(ranks)
    for rank in ranks:
        for name, states in rank.tensors(offsets).items():
            parts.setdefault(name, {}).setdefault(rank.pp, []).append(states)
    _join(content, parts, ranks[0], options)
    _settings(content, ranks[0])
    return content


# pipeline stage -> of each tensor rank, by state; the weight is "model"
_Parts = dict[int, list[dict[str, Any]]]


@dataclass(frozen=True)
class _Rank:
    """One file's content. `chunks`: the model, which interleaved pipelines have in several parts."""

    folder: Path
    tp: int
    pp: int
    values: dict[str, Any]
    args: dict[str, Any]

    @property
    def iteration(self) -> int:
        return int(self.values.get("iteration") or 0)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        if "model" in self.values:
            return [self.values["model"]]
        numbers = [key.removeprefix("model") for key in self.values if re.fullmatch(r"model\d+", str(key))]
        return [self.values[f"model{number}"] for number in sorted(numbers, key=int)]

    def argument(self, name: str) -> int:
        return int(self.args.get(name) or 1)

    def members(self, chunk: int, offsets: dict[tuple[int, int], int]) -> list[Member]:
        """The parameters of a chunk, in the model's order and by their names in the whole model."""
        untied = bool(self.args.get("untie_embeddings_and_output_weights"))
        shared = not untied and self.argument("pipeline_model_parallel_size") > 1
        found = []
        for name, tensor in self.chunks[chunk].items():
            if not isinstance(tensor, FileTensor):
                continue  # extra states
            whole = _LAYER.sub(lambda at: f"{at['stem']}.{int(at['layer']) + offsets[chunk, self.pp]}.", name)
            found.append(Member(whole, tensor, shared and name in (_EMBEDDING, _OUTPUT)))
        return found

    def tensors(self, offsets: dict[tuple[int, int], int]) -> dict[str, dict[str, Any]]:
        """Of each parameter, the weight ("model") and what the optimizer has, by state."""
        chunks = [self.members(chunk, offsets) for chunk in range(len(self.chunks))]
        states = self._states(chunks)
        return {
            member.name: {"model": member.weight, **states.get(member.name, {})}
            for members in chunks
            for member in members
        }

    def _states(self, chunks: list[list[Member]]) -> dict[str, dict[str, Any]]:
        optimizer = self.values.get("optimizer")
        if optimizer is None:
            return {}
        if not isinstance(optimizer, dict):
            raise ConversionError(
                f"{self.folder / _MODEL}: {len(optimizer)} optimizers, as a model with experts has; expected one: "
                "save it as torch_dist (--ckpt-format torch_dist) with Megatron"
            )
        file = self.folder / _FLAT
        if not self.args.get("use_distributed_optimizer") and not file.exists():
            return listed([member for members in chunks for member in members], optimizer, str(self.folder / _MODEL))
        stored = torchfile.load(file)
        states: dict[str, dict[str, Any]] = {}
        for at, members in enumerate(chunks):
            if not isinstance(stored, dict) or at not in stored:
                raise ConversionError(f"{file}: no buffer {at}; expected one for each of {len(chunks)} chunks")
            states |= flat(members, stored[at], bucket_elements(self.args, self.pp, at), str(file))
        return states


def _ranks(folder: Path) -> list[_Rank]:
    """Every rank, stage by stage. Raises ConversionError if one is missing, or is of another iteration."""
    found = {}
    for each in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(each.name)
        if match is None:
            continue
        if match["ep"] and int(match["ep"]):
            raise ConversionError(f"{each}: experts in parallel; expected none: save it as torch_dist with Megatron")
        if not (each / _MODEL).exists():
            raise ConversionError(f"{each}: no {_MODEL}: half written, or the file is missing")
        values = torchfile.load(each / _MODEL)
        args = values.get("args") if isinstance(values, dict) else None
        if not isinstance(args, Unpickled) or not isinstance(values, dict):
            raise ConversionError(f"{each / _MODEL}: holds no args; expected what Megatron-LM saves")
        rank = _Rank(each, int(match["tp"]), int(match["pp"] or 0), values, args.fields)
        found[rank.pp, rank.tp] = rank
    if not found:
        raise ConversionError(f"{folder}: no mp_rank_* folders")
    first = next(iter(found.values()))
    stages = first.argument("pipeline_model_parallel_size")
    wanted = [(pp, tp) for pp in range(stages) for tp in range(first.argument("tensor_model_parallel_size"))]
    missing = [f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if stages > 1 else "") for pp, tp in wanted if (pp, tp) not in found]
    if missing or len(found) != len(wanted):
        raise ConversionError(f"{folder}: {len(found)} ranks; expected {len(wanted)}; missing: {', '.join(missing)}")
    for rank in found.values():
        if rank.iteration != first.iteration:
            raise ConversionError(
                f"{rank.folder}: mixed: iteration {rank.iteration}, but {first.folder.name} has {first.iteration}"
            )
    return [found[at] for at in wanted]


def _layer_offsets(ranks: list[_Rank]) -> dict[tuple[int, int], int]:
    """(chunk, stage) -> the number of its first layer: chunks go around all stages before the next begins."""
    offsets: dict[tuple[int, int], int] = {}
    before = 0
    stages = [rank for rank in ranks if rank.tp == 0]
    for chunk in range(len(stages[0].chunks)):
        for rank in stages:
            offsets[chunk, rank.pp] = before
            matches = (_LAYER.match(name) for name in rank.chunks[chunk])
            before += len({match["layer"] for match in matches if match})
    return offsets


def _rules(rank: _Rank, options: Options) -> Iterator[Table[ShardRule]]:
    gated = "megatron_gated" if rank.args.get("swiglu") else "megatron_ungated"
    for path in options.rules:
        yield Table(read_rules(path).shards)
    yield Table((*read_rules(built_in("megatron_tp")).shards, *read_rules(built_in(gated)).shards))


def _rule(tables: list[Table[ShardRule]], name: str) -> Match[ShardRule]:
    for table in tables:
        if table.matches(name):
            return table.resolve([name])[name]
    raise ConversionError(f"{name}: no rule says how tensor-parallel ranks cut it; give one with --rules")


def _join(content: Content, parts: dict[str, _Parts], first: _Rank, options: Options) -> None:
    """Put the tensor-parallel parts of every parameter together."""
    tables = list(_rules(first, options))
    tied = not first.args.get("untie_embeddings_and_output_weights")
    if tied and _EMBEDDING in parts:
        parts.pop(_OUTPUT, None)  # what the last stage has of the first one's embedding
        content.tied[_OUTPUT] = _EMBEDDING
    for name, stages in parts.items():
        ranks = stages[min(stages)]
        match = _rule(tables, name)
        content.notes[name] = f"{describe(match)}: {match.rule.sharding.describe()}"
        whole = {
            state: match.rule.sharding.consolidate(name, [_lazy(name, rank[state]) for rank in ranks])
            for state, tensor in ranks[0].items()
            if isinstance(tensor, FileTensor) and (tensor.shape or not ranks[0]["model"].shape)
        }
        layer = _LAYER.match(name)
        if layer:
            content.layers[name] = int(layer["layer"])
        _add(content, name, whole, ranks[0], first)


def _lazy(name: str, tensor: FileTensor) -> Lazy:
    return tensor.lazy(f"{tensor.path.parent.name}/{tensor.path.name}:{name}")


def _add(content: Content, name: str, whole: dict[str, Lazy], stored: dict[str, Any], first: _Rank) -> None:
    model = whole.pop("model")
    main = whole.pop(MAIN, None)
    content.params[name] = model if main is None else _checked(name, main, model)
    if main is not None and main.dtype != model.dtype:
        content.dtypes[name] = model.dtype
    for state, tensor in whole.items():
        content.optimizer.setdefault(state, {})[name] = tensor
    step = stored.get("step")
    if isinstance(step, FileTensor):
        step = step.read().item()
    optimizer = first.values.get("optimizer")
    if isinstance(optimizer, dict) and step is None:
        step = step_of(optimizer)
    if whole:
        step = first.iteration if step is None else step
        content.scalars.setdefault("step", {})[name] = Scalar("float32" if isinstance(step, float) else "int64", step)


def _checked(name: str, main: Lazy, model: Lazy) -> Lazy:
    """The optimizer names nothing: its copy of a parameter must round to the weight that the model has."""

    def read() -> np.ndarray:
        array = main.read()
        if cast(array, model.dtype).tobytes() != model.read().tobytes():
            raise ConversionError(
                f"{name}: what the optimizer has in its place ({main.origin}) is not the model's weight; the order of "
                "this model's parameters is not known: save it as torch_dist with Megatron"
            )
        return array

    return Lazy(main.shape, main.dtype, read, main.origin)


def _is_kept(key: str) -> bool:
    """Whether a value of the common state is kept as it is: what is not understood elsewhere."""
    return key not in _UNDERSTOOD and not re.fullmatch(r"model\d*", key)


def _settings(content: Content, first: _Rank) -> None:
    dropped: list[str] = []
    optimizer = first.values.get("optimizer")
    groups = groups_of(optimizer) if isinstance(optimizer, dict) else []
    add_groups(content, {name: tensor.shape for name, tensor in content.params.items()}, groups)
    schedule = first.values.get("opt_param_scheduler")
    if isinstance(schedule, dict):
        content.scheduler = json_values.encode(schedule, dropped, "opt_param_scheduler")
    content.extra[EXTRA] = {
        "args": json_values.encode(first.args, dropped, "args"),
        "common": {
            key: json_values.encode(value, dropped, key) for key, value in first.values.items() if _is_kept(key)
        },
        "vocab_size": first.args.get("vocab_size"),
        "padded_vocab_size": first.args.get("padded_vocab_size"),
    }
    content.dropped += [(name, "a class of Megatron's own") for name in dropped if name.startswith("args.")]
    content.unknown += [name for name in dropped if not name.startswith("args.")]
    if "rng_state" in first.values:
        content.dropped.append(("rng_state", RANDOM_STATES))
