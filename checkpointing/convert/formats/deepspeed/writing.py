"""Writing checkpoints that DeepSpeed engines with ZeRO-1 or 2 load, for a given number of data-parallel ranks.

A group's parameters are concatenated, padded at the end to a multiple of twice the ranks, and cut evenly
(`stage_1_and_2.py`). One model-parallel rank; modules that are no pipeline.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.convert.files.torchwriting import Instance, Stream, save

from .modules import TIED
from .rules import is_round_robin
from .universal_writing import (
    as_dtype,
    as_float32,
    check_experts,
    decoded,
    grouped,
    kept_settings,
    model_state,
    number,
    settings_of_groups,
)

_ALIGNMENT = 2  # nccl_start_alignment_factor


@dataclass(frozen=True)
class FlatLayout:
    """Where each of a group's parameters begins in the flat group, and how much of it a rank has."""

    starts: dict[str, int]
    elements: int
    share: int

    def range(self, rank: int) -> tuple[int, int]:
        """The elements of a rank, without padding."""
        return min(rank * self.share, self.elements), min((rank + 1) * self.share, self.elements)


def layout_of(tensors: dict[str, Lazy], names: Sequence[str], ranks: int) -> FlatLayout:
    """The layout of the parameters `names` over the ranks."""
    starts: dict[str, int] = {}
    elements = 0
    for name in names:
        starts[name] = elements
        elements += tensors[name].elements
    step = _ALIGNMENT * ranks
    return FlatLayout(starts, elements, -(-elements // step) * step // ranks)


def write(content: Content, out: Path, options: Options, work: PieceWork) -> None:
    """Write `out`/latest and the folder it names. Settings: `dp`, the ranks (1); `stage`, 1 or 2 (1)."""
    ranks, stage = _number(options, "dp", 1, 1 << 16), _number(options, "stage", 1, 2)
    check_experts(content, spread_only=False)
    _check_settings(content)
    named = {name for group in grouped(content) for name in group["params"]}
    if left := [name for name in content.params if name not in named]:
        raise ConversionError(f"in no group of the optimizer: {', '.join(left)}")
    if any(name.startswith(TIED) or name.partition(".")[0].isdecimal() for name in content.params):
        content.warnings.append("names are those of a DeepSpeed pipeline; written for a module that is none")
    extra = content.extra.get("deepspeed", {})
    if is_round_robin(decoded(extra.get("ds_config"))):
        content = replace(content, groups=[_dealt(group, ranks) for group in content.groups])
    folder = out / f"global_step{content.step}"
    work.make(folder)
    types = {name: content.dtypes.get(name, tensor.dtype) for name, tensor in content.params.items()}
    weights = {name: as_dtype(tensor, types[name]) for name, tensor in content.params.items()}
    state = model_state(content, extra, weights, ranks)
    prefix = "bf16_" if any(tensor.dtype == "bfloat16" for tensor in weights.values()) else ""
    largest = 2 * max((4 * tensor.elements for _, _, tensor in content.tensors()), default=0)
    model = folder / "mp_rank_00_model_states.pt"
    pieces = [Piece(model.name, largest, lambda: save(model, state))]
    for rank in range(ranks):
        path = folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        pieces.append(Piece(path.name, largest, _saving(path, content, extra, rank, ranks, stage)))
    work.run(pieces)
    work.run([Piece("latest", 0, lambda: (out / "latest").write_text(folder.name))])


def _check_settings(content: Content) -> None:
    """Raise ConversionError if an engine would have no settings for its optimizer: those stored replace its own."""
    if content.optimizer and any(set(group) <= {"params", "step"} for group in grouped(content)):
        raise ConversionError(
            "the source keeps no settings of the optimizer's groups (learning rate, betas, weight decay), and a "
            "DeepSpeed engine takes them from the checkpoint: write deepspeed-universal, with which it keeps its own"
        )


def _dealt(group: dict[str, Any], ranks: int) -> dict[str, Any]:
    """A group with its parameters as an engine with `round_robin_gradients` deals them out to its ranks."""
    names = group["params"]
    return {**group, "params": [name for rank in range(ranks) for name in names[rank::ranks]]}


def _number(options: Options, name: str, least: int, most: int) -> int:
    text = options.settings.get(name, "1")
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ConversionError(f"{name}={text}: expected a number from {least} to {most}")
    return int(text)


def _saving(path: Path, content: Content, extra: dict[str, Any], rank: int, ranks: int, stage: int) -> Any:
    return lambda: save(path, optimizer_state(content, extra, rank, ranks, stage))


def optimizer_state(content: Content, extra: dict[str, Any], rank: int, ranks: int, stage: int) -> dict[str, Any]:
    """The file of one rank."""
    groups = grouped(content)
    flats: list[Stream] = []
    states: dict[int, dict[str, Any]] = {}
    placed: list[OrderedDict[str, Instance]] = []
    for index, group in enumerate(groups):
        names = [name for name in group["params"] if name in content.params]
        layout = layout_of(content.params, names, ranks)
        flats.append(_flat(content.params, layout, rank, padded=False))
        states[index] = {
            state: _flat(found, layout, rank, padded=True)
            for state, found in content.optimizer.items()
            if _complete(found, names, state)
        }
        for state, numbers in content.scalars.items():
            values = {numbers[name] for name in names if name in numbers}
            if len(values) > 1:
                raise ConversionError(f"group {index}: {state} differs between its parameters: DeepSpeed keeps one")
            for value in values:
                states[index][state] = number(value)
        placed.append(_placed(content.params, layout, rank))
    inner = {
        **kept_settings(extra),
        "base_optimizer_state": {"state": states, "param_groups": settings_of_groups(groups)},
        "single_partition_of_fp32_groups": flats,
        "zero_stage": stage,
        "group_paddings": [end_padding(content, group["params"], rank, ranks) for group in groups],
        "partition_count": [ranks] * len(groups),
        "param_slice_mappings": placed,
    }
    return {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": inner["ds_version"]}


def end_padding(content: Content, names: Sequence[str], rank: int, ranks: int) -> int:
    """The padding of a group, which the last rank has."""
    layout = layout_of(content.params, [name for name in names if name in content.params], ranks)
    return layout.share * ranks - layout.elements if rank == ranks - 1 else 0


def _complete(found: dict[str, Lazy], names: Sequence[str], state: str) -> bool:
    missing = [name for name in names if name not in found]
    if missing and len(missing) < len(names):
        raise ConversionError(f"{state} of the optimizer is there for some of a group and not for {', '.join(missing)}")
    return not missing


def _placed(tensors: dict[str, Lazy], layout: FlatLayout, rank: int) -> OrderedDict[str, Instance]:
    first, last = layout.range(rank)
    placed: OrderedDict[str, Instance] = OrderedDict()
    for name, start in layout.starts.items():
        begin, end = max(start, first), min(start + tensors[name].elements, last)
        if begin < end:
            fields = {"numel": end - begin, "start": begin - first}
            placed[name] = Instance("deepspeed.utils.tensor_fragment", "fragment_address", fields)
    return placed


def _flat(tensors: dict[str, Lazy], layout: FlatLayout, rank: int, *, padded: bool) -> Stream:
    """A rank's elements of a flat group. DeepSpeed keeps the padding of moments, and of parameters not."""
    first, last = layout.range(rank)
    padding = layout.share - (last - first) if padded else 0

    def chunks() -> Iterator[np.ndarray]:
        for name, start in layout.starts.items():
            begin, end = max(start, first), min(start + tensors[name].elements, last)
            if begin < end:
                yield as_float32(tensors[name]).read().reshape(-1)[begin - start : end - start]
        yield np.zeros(padding, np.float32)

    return Stream(last - first + padding, "float32", chunks)
