"""Writing DeepSpeed's universal checkpoints, which its engines load at any number of ranks (`load_universal`)."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.carrying import OURS, carried
from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.convert.files.torchwriting import (
    Instance,
    Size,
    save,
    save_all,
)
from everstep.checkpointing.convert.files.unpickling import Dtype
from everstep.checkpointing.convert.formats.dcp.json_values import NONE
from everstep.checkpointing.convert.rules.affine import Affine
from everstep.checkpointing.convert.rules.sharding import (
    Fused,
    Replicated,
    Sharding,
    Vocabulary,
)
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .rules import (
    INFO,
    Shardings,
    Stripped,
    is_round_robin,
)

LATEST = "latest_universal"
VERSION = "0.19.8"  # of DeepSpeed, for what did not come from it
_SMALL_BYTES = 1 << 20
_EXPERT = re.compile(r"\bdeepspeed_experts\.\d+\.")


def write(content: Content, out: Path, options: Options, work: PieceWork) -> None:
    """Write `out`/latest_universal and the folder it names. Parameters are stored in float32, as DeepSpeed has them."""
    check_experts(content, spread_only=True)
    tag = f"global_step{content.step}_universal"
    folder = out / tag
    work.make(folder / "zero")
    extra = content.extra.get("deepspeed", {})
    if is_round_robin(decoded(extra.get("ds_config"))):
        content.warnings.append(
            "the source was saved with round_robin_gradients: DeepSpeed puts universal checkpoints into wrong places "
            "where that is set; load it with round_robin_gradients false"
        )
    info = extra.get(INFO)
    ranks = max(int(extra.get("tensor_parallel", 1)), 2)  # their cut is described even if they are not cut
    shardings = Shardings(decoded(info) if info else None, ranks, options.rules, out)
    pieces = [_parameter(content, name, folder, shardings) for name in content.params]
    state = model_state(content, extra, _emptied_module(content), 1)
    whole = _largest(content)
    pieces.append(Piece("mp_rank_00_model_states.pt", whole, _saving(folder / "mp_rank_00_model_states.pt", state)))
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # what an engine with ZeRO-3 looks for
    pieces.append(Piece(name, _SMALL_BYTES, _saving(folder / name, {**state, "module": OrderedDict()})))
    optimizer = _optimizer_state(content, extra)
    pieces.append(Piece("optimizer_state.pt", _SMALL_BYTES, _saving(folder / "zero" / "optimizer_state.pt", optimizer)))
    work.run(pieces)
    work.run([Piece(LATEST, 0, lambda: (out / LATEST).write_text(tag))])


def check_experts(content: Content, *, spread_only: bool) -> None:
    """Raise ConversionError for experts that DeepSpeed would not find, or confuse: each rank numbers its own locally.
    With `spread_only`, experts that every rank has in full are accepted."""
    spread = [name for name in content.params if _EXPERT.search(name)]
    single = [name for group in content.groups if group.get("name") == "ep_size_1" for name in group.get("params", ())]
    left = sorted(set(spread) - set(single)) if spread_only else spread
    if left:
        raise ConversionError(
            f"{left[0]} and {len(left) - 1} more are experts: DeepSpeed keeps them by the numbers that each rank has "
            "for its own, and they are not written so; write universal or dcp"
        )


def _saving(path: Path, value: Any) -> Any:
    return lambda: save(path, value)


def _largest(content: Content) -> int:
    return 2 * max((tensor.nbytes for _, _, tensor in content.tensors()), default=0)


def _parameter(content: Content, name: str, folder: Path, shardings: Shardings) -> Piece:
    """The folder of one parameter. Raises ConversionError for a name that is no folder's."""
    for each in (name, *content.optimizer, *content.scalars):
        if "/" in each or "\0" in each or each in ("", ".", "..", "optimizer_state.pt"):
            raise ConversionError(f"{each!r}: what has this name has no place in a DeepSpeed universal checkpoint")
    place = folder / "zero" / name
    tensor = content.params[name]
    keys = _keys(shardings.of(name)[0]) if shardings.knows else {"cat_dim": 0}
    files: dict[str, Any] = {"fp32.pt": {"param": as_float32(tensor), **keys}}
    for state, found in content.optimizer.items():
        if name in found:
            files[f"{state}.pt"] = {"param": found[name], **keys}
    for state, numbers in content.scalars.items():
        if name in numbers:
            files[f"{state}.pt"] = number(numbers[name])

    def do() -> None:
        place.mkdir(exist_ok=True)
        save_all({place / file: value for file, value in files.items()})

    return Piece(f"zero/{name}", 2 * tensor.elements * 4, do)


def _keys(sharding: Sharding) -> dict[str, Any]:
    """The entries of a file from which DeepSpeed cuts its parameter again."""
    if isinstance(sharding, Stripped):
        return {**_keys(sharding.inner), "vocab_tensor": True}
    if isinstance(sharding, Vocabulary):
        return {"cat_dim": 0, "vocab_tensor": True}
    if isinstance(sharding, Fused) and sharding.parts > 1:
        return {"cat_dim": sharding.dim, "param_n_sub_params": sharding.parts}
    if isinstance(sharding, Fused) and (sharding.sizes or sharding.widths):
        shape = list(sharding.view or (-1,) * (sharding.dim + 1))
        sizes = sharding.sizes or tuple(sum(part) for part in sharding.widths)
        fields = {"patterns": [], "shape": (*shape[: sharding.dim], sizes, *shape[sharding.dim + 1 :])}
        module = "deepspeed.checkpoint.universal_checkpoint"
        return {"sub_param_shape": Instance(module, "SubparamShape", {**fields, "partition_dim": sharding.dim})}
    if isinstance(sharding, Fused):
        return {"cat_dim": sharding.dim}
    return {} if isinstance(sharding, Replicated | Affine) else {"cat_dim": 0}


def as_float32(tensor: Lazy) -> Lazy:
    return as_dtype(tensor, "float32")


def as_dtype(tensor: Lazy, dtype: str) -> Lazy:
    if tensor.dtype == dtype:
        return tensor
    return Lazy(tensor.shape, dtype, lambda: cast(tensor.read(), dtype), tensor.origin)


def _emptied(dtype: str) -> Lazy:
    return Lazy((0,), dtype, lambda: np.empty(0, numpy_dtype(dtype)), "emptied")


def number(value: Scalar) -> Any:
    """A number as the tensor that torch's optimizers keep it in."""
    array = np.array(value.value, numpy_dtype(value.dtype))
    return Lazy((), value.dtype, lambda: array, "step")


def decoded(value: Any, tensors: Mapping[str, Lazy] = NONE) -> Any:
    """Decode values that JSON cannot represent (see json_values) to the form written here."""
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decoded(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {decoded(key): decoded(item, tensors) for key, item in value["$dict"]}
    if "$other" in value:
        return tensors.get(value["$other"])
    if "$dtype" in value:
        return Dtype(value["$dtype"])
    if "$tensor" in value:
        tensor = value["$tensor"]
        array = np.array(tensor["values"]).astype(numpy_dtype(tensor["dtype"])).reshape(tensor["shape"])
        return Lazy(array.shape, tensor["dtype"], lambda: array, "a value")
    return {key: decoded(item, tensors) for key, item in value.items()}


def grouped(content: Content) -> list[dict[str, Any]]:
    """The groups of the optimizer; a single one with all parameters, if none are known."""
    return content.groups or [{"params": list(content.params)}]


def settings_of_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for index, group in enumerate(groups):
        found = {key: decoded(value) for key, value in group.items() if key != "params"}
        if isinstance(found.get("betas"), list):
            found["betas"] = tuple(found["betas"])
        made.append({**found, "params": [index]})
    return made


def kept_settings(extra: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer's wrapper keeps beside its tensors, of a checkpoint that came from DeepSpeed."""
    kept = {key: decoded(value) for key, value in extra.get("optimizer", {}).items()}
    scaler = kept.pop("loss_scaler", None) or {}
    if scaler.get("class") in ("LossScaler", "DynamicLossScaler"):
        kept["loss_scaler"] = Instance("deepspeed.runtime.fp16.loss_scaler", scaler["class"], scaler["fields"])
    return {**kept, "ds_version": extra.get("ds_version", VERSION)}


def _optimizer_state(content: Content, extra: dict[str, Any]) -> dict[str, Any]:
    """What is not of one parameter. Both as ZeRO-1 and 2 look for it, and as ZeRO-3 does."""
    groups = settings_of_groups(grouped(content))
    steps = list(content.scalars.get("step", {}).values())
    state = {index: {"step": number(steps[0])} for index in range(len(groups))} if steps else {}
    return {
        **kept_settings(extra),
        "param_groups": groups,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
    }


def _emptied_module(content: Content) -> dict[str, Lazy]:
    """The types that the module computes in, in tensors as empty as ZeRO-3 leaves them: an engine takes the values from
    the parameters' own files.
    """
    return {name: _emptied(content.dtypes.get(name, tensor.dtype)) for name, tensor in content.params.items()}


def model_state(content: Content, extra: dict[str, Any], weights: dict[str, Lazy], ranks: int) -> dict[str, Any]:
    """What mp_rank_00_model_states.pt holds, with these weights of what is trained."""
    module = OrderedDict({**weights, **content.frozen, **content.buffers})
    module.update({alias: module[owner] for alias, owner in content.tied.items() if owner in module})
    return {
        OURS: carried(content, "deepspeed"),
        **decoded(extra.get("client_state", {}), content.other),
        "module": module,
        "buffer_names": list(content.buffers),
        "optimizer": None,
        "param_shapes": [_shapes(content.params, names) for names in (group["params"] for group in grouped(content))],
        "frozen_param_shapes": _shapes(content.frozen, list(content.frozen)) if content.frozen else None,
        "shared_params": dict(content.tied),
        "frozen_param_fragments": None,
        "lr_scheduler": decoded(content.scheduler),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": int(extra.get("skipped_steps", 0)),
        "global_steps": content.step,
        "global_samples": int(extra.get("global_samples", 0)),
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": decoded(extra.get("ds_config", {})),
        "ds_version": extra.get("ds_version", VERSION),
        INFO: decoded(extra.get(INFO)) or {"universal_checkpoint_version": 0.2},
    }


def _shapes(tensors: dict[str, Lazy], names: Sequence[str]) -> OrderedDict[str, Size]:
    return OrderedDict((name, Size(tensors[name].shape)) for name in names if name in tensors)
