"""Checkpoints of DeepSpeed engines: without ZeRO and with each of its stages; pipelines, model parallelism, experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.carrying import OURS, take_up
from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.masters import checked, is_trusted
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.unpickling import Unpickled
from everstep.checkpointing.convert.formats.dcp.json_values import encode
from everstep.checkpointing.convert.rules.sharding import Replicated

from .files import (
    Files,
    Sizes,
    check_complete,
    check_same,
    entries,
    find,
    holds_files,
    read_state,
    sizes,
    tag_folder,
)
from .modules import (
    Module,
    divided_module,
    expert_tensors,
    layered_modules,
    pipeline_layers,
    resolve_ties,
    take_unclaimed,
    whole_module,
)
from .partitions import (
    FP32,
    Experts,
    HeldTogether,
    counted_states,
    partitioned_states,
    placed_elements,
)
from .rules import (
    INFO,
    Shardings,
    for_state,
    is_round_robin,
)
from .unpartitioned import unpartitioned
from .writing import write

__all__ = ["detect", "fill_extra", "merge_groups", "merge_rooms", "read", "write"]

# What of a model state is understood here; the rest is what the user gave to save with it.
_OWN = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
        *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
        *("ds_config", "ds_version", "skipped_steps", "global_steps", "global_samples", "dp_world_size"),
        *("mp_world_size", "checkpoint_parallel_dimensions", "num_experts", "ds_autoep_layers"),
    }
)
_KEPT = ("ds_version", "ds_config", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "num_experts")
_NOT_KEPT = ("data_sampler", "random_ltd", "ds_autoep_layers")
# Entries of an optimizer's state that describe its layout, or repeat what is read elsewhere.
_LAYOUT = frozenset(
    {
        *("base_optimizer_state", "base_optimizer_state_step", "single_partition_of_fp32_groups", "zero_stage"),
        *("group_paddings", "param_alignment_paddings", "partition_count", "param_slice_mappings", "ds_version"),
        *("fp32_flat_groups", "optimizer_state_dict", "ds_zero_partition_groups", "param_groups", "state"),
    }
)
_OF_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


def detect(path: Path) -> bool:
    """Whether `path` is a folder of DeepSpeed's save_checkpoint, or a tag in it."""
    try:
        if not path.is_dir() or (path / "zero").is_dir():
            return False
        if holds_files(path):
            return True
        latest = path / "latest"
        if not latest.is_file():
            return False
        tag = latest.read_text().strip()
        return holds_files(path / tag) or not any(entry.is_dir() for entry in entries(path))
    except (OSError, UnicodeDecodeError, ConversionError):
        return False


def read(path: Path, options: Options) -> Content:
    """The checkpoint at `path`: a folder with `latest`, or one tag's. Settings: `frozen`, for those without ZeRO."""
    folder = tag_folder(path)
    files = find(folder)
    states = {path: read_state(path) for path in (files.models or files.model_parts).values()}
    layout = sizes(states[files.first], files)
    check_complete(files, layout)
    for key in ("global_steps", "ds_version", "dp_world_size", "mp_world_size"):
        check_same(states, key)
    first = states[files.first]
    optimizers = {path: _optimizer_state(path, first) for path in files.optimizers.values()}
    modules = _modules(files, layout, states, optimizers)
    held = _held(files, layout, states, optimizers, modules, options)
    for ours, module in zip(held, modules, strict=True):
        resolve_ties(module, ours.tensors.get(FP32, {}))
    for tensor, layers in pipeline_layers(files).items():
        take_unclaimed(modules[tensor :: layout.tensor], layers)
    if not is_trusted(options.settings):
        for ours, module in zip(held, modules, strict=True):
            _check_masters(ours, module)
    shardings = Shardings(_info(first, optimizers.values()), layout.tensor, options.rules, folder)
    content = Content(step=int(first["global_steps"]))
    _merge(content, layout, held, modules, shardings)
    _fill(content, first, next(iter(optimizers.values()), {}), modules, expert_tensors(files))
    content.extra["deepspeed"]["tensor_parallel"] = layout.tensor
    if optimizers and any(set(group) <= {"params", "step"} for group in content.groups):
        content.warnings.append(
            f"{folder}: keeps no settings of the optimizer (learning rate, betas, weight decay): elastic_checkpoint "
            "leaves them out"
        )
    return content


def _check_masters(held: HeldTogether, module: Module) -> None:
    """Have the master weights compared with the module's, where it has them whole, when they are read."""
    masters = held.tensors.get(FP32, {})
    for name, master in masters.items():
        own = module.tensors.get(name)
        if own is not None and own.shape == master.shape:
            masters[name] = checked(name, master, own.read, own.dtype)


def _optimizer_state(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    state = read_state(path)
    if state.get("ds_version") != model.get("ds_version"):
        raise ConversionError(
            f"{path}: mixed checkpoints: written by DeepSpeed {state.get('ds_version')}, and the model states by "
            f"{model.get('ds_version')}"
        )
    inner = state.get("optimizer_state_dict")
    if not isinstance(inner, dict):
        raise ConversionError(f"{path}: has no optimizer_state_dict")
    return inner


def _info(model: dict[str, Any], optimizers: Any) -> dict[str, Any] | None:
    for state in (model, *optimizers):
        if state.get(INFO):
            info: dict[str, Any] = state[INFO]
            return info
    return None


def _modules(
    files: Files, layout: Sizes, states: dict[Path, dict[str, Any]], optimizers: dict[Path, dict[str, Any]]
) -> list[Module]:
    """The modules of the model-parallel ranks, in order."""
    if files.model_parts:
        paths = [[files.model_parts[data, rank] for data in range(layout.data)] for rank in range(layout.model)]
        return [divided_module({path: states[path] for path in ours}) for ours in paths]
    layers = pipeline_layers(files)
    if layers and not optimizers:
        stages = [states[files.models[rank]] for rank in range(layout.model)]
        return [module for tensor in layers for module in layered_modules(files.folder, stages, layers[tensor])]
    made = []
    for rank in range(layout.model):
        ours = [optimizers[files.optimizers[data, rank]] for data in range(layout.data)] if optimizers else []
        path, of_rank = files.models[rank], layers.get(rank % layout.tensor, {})
        made.append(whole_module(path, states[path], of_rank, placed_elements(ours)))
    return made


def _held(
    files: Files,
    layout: Sizes,
    states: dict[Path, dict[str, Any]],
    optimizers: dict[Path, dict[str, Any]],
    modules: Sequence[Module],
    options: Options,
) -> list[HeldTogether]:
    """What the optimizers hold, for the model-parallel ranks in order."""
    if not files.optimizers:
        if files.experts:
            raise ConversionError(
                f"{files.folder}: experts without ZeRO: each expert-parallel rank's optimizer numbers its own "
                "parameters, and that is not read; save it with ZeRO stage 1 or 2"
            )
        if layout.model > 1 and not (files.layers and layout.tensor == 1):
            raise ConversionError(f"{files.folder}: tensor parallelism without ZeRO is not read")
        paths = [files.models[rank] for rank in range(layout.model)]
        frozen = options.settings.get("frozen")
        return [unpartitioned(path, states[path], ours, frozen) for path, ours in zip(paths, modules, strict=True)]
    config = states[files.first].get("ds_config")
    experts = Experts(isinstance(config, dict) and bool(config.get("use_data_before_expert_parallelism")))
    made = []
    for rank, module in enumerate(modules):
        ours = {files.optimizers[data, rank]: optimizers[files.optimizers[data, rank]] for data in range(layout.data)}
        if files.model_parts:
            made.append(counted_states(ours, module.shapes))
        else:
            made.append(partitioned_states(ours, module.shapes, experts, round_robin=is_round_robin(config)))
    return made


def _merge(
    content: Content, layout: Sizes, held: Sequence[HeldTogether], modules: Sequence[Module], shardings: Shardings
) -> None:
    """Put the ranks' pieces together, tensor-parallel ranks first and then the stages of the pipeline."""
    stages: dict[tuple[str, str], list[Lazy]] = {}
    for stage in range(layout.pipeline):
        ranks = range(stage * layout.tensor, (stage + 1) * layout.tensor)
        for state in {state for rank in ranks for state in held[rank].tensors}:
            named = [held[rank].tensors.get(state, {}) for rank in ranks]
            for name in named[0]:
                pieces = [_of_rank(named, name, rank, state) for rank in range(layout.tensor)]
                sharding, why = shardings.of(name)
                whole = for_state(sharding, state, name).consolidate(name, pieces)
                stages.setdefault((state, name), []).append(whole)
                if state == FP32:
                    content.notes[name] = f"{held[ranks[0]].notes[name]}; {why}"
        for rank in ranks:
            content.unknown += held[rank].unknown
            for state, scalars in held[rank].scalars.items():
                _merge_scalars(content.scalars.setdefault(state, {}), scalars, state)
        merge_rooms(content, [modules[rank] for rank in ranks], shardings)
        merge_groups(content.groups, held[ranks[0]].groups)
    for (state, name), copies in stages.items():
        if len(copies) > 1:
            content.notes[name] += f"; {len(copies)} stages of the pipeline hold it: checked equal"
        tensor = Replicated().consolidate(name, copies) if len(copies) > 1 else copies[0]
        if state == FP32:
            content.params[name] = tensor
        else:
            content.optimizer.setdefault(state, {})[name] = tensor


def merge_rooms(content: Content, modules: Sequence[Module], shardings: Shardings) -> None:
    """Buffers, frozen and tied parameters of one stage, from the modules of its tensor-parallel ranks."""
    for room, found, of in (
        (content.buffers, [module.buffers for module in modules], shardings.buffer),
        (content.frozen, [module.frozen for module in modules], lambda name: shardings.of(name)[0]),
    ):
        for name in found[0]:
            pieces = [_of_rank(found, name, rank, "a tensor") for rank in range(len(modules))]
            room[name] = of(name).consolidate(name, pieces)
    content.unknown += dict.fromkeys(name for module in modules for name in module.unknown)
    content.tied.update(modules[0].tied)
    content.layers.update(modules[0].layers)


def _of_rank(named: Sequence[dict[str, Lazy]], name: str, rank: int, what: str) -> Lazy:
    if name not in named[rank]:
        raise ConversionError(f"{name}: tensor-parallel rank 0 has {what} of it, and rank {rank} has not")
    return named[rank][name]


def _merge_scalars(made: dict[str, Scalar], found: dict[str, Scalar], state: str) -> None:
    for name, value in found.items():
        if made.setdefault(name, value) != value:
            raise ConversionError(f"mixed checkpoints: {state} of {name} is {made[name].value} and {value.value}")


def merge_groups(made: list[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    """The groups of another stage of the pipeline: the same settings, other parameters."""
    if not made:
        made.extend(dict(group) for group in found)
        return
    for group, more in zip(made, found, strict=True):
        group["params"] = list(dict.fromkeys([*group["params"], *more["params"]]))


def _fill(
    content: Content,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    modules: Sequence[Module],
    experts: dict[str, FileTensor],
) -> None:
    """What goes with the tensors: types, scheduler, and what is kept without being understood."""
    own = [*(module.tensors for module in modules), experts]
    types = {name: tensor.dtype for tensors in own for name, tensor in tensors.items()}
    content.dtypes = {
        name: types[name] for name, tensor in content.params.items() if types.get(name, tensor.dtype) != tensor.dtype
    }
    fill_extra(content, model, optimizer)


def fill_extra(content: Content, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """The entries of model and optimizer states that are no tensors: the scheduler, and entries only carried along."""
    dropped: list[str] = []
    scheduler = model.get("lr_scheduler")
    if isinstance(scheduler, dict):
        content.scheduler = encode(scheduler, dropped, "lr_scheduler")
    client = {key: value for key, value in model.items() if key not in _OWN and key not in (INFO, OURS)}
    kept = {key: optimizer[key] for key in _OF_OPTIMIZER if key in optimizer}
    fields = {
        key: {"class": value.kind.rpartition(".")[2], "fields": value.fields} if isinstance(value, Unpickled) else value
        for key, value in kept.items()
    }
    content.extra["deepspeed"] = {
        **{key: encode(model[key], dropped, key) for key in _KEPT if model.get(key) is not None},
        **({INFO: encode(model[INFO], dropped, INFO)} if model.get(INFO) else {}),
        "optimizer": encode(fields, dropped, "optimizer"),
        "client_state": encode(client, dropped, "client_state", content.other),
    }
    content.unknown += [*dropped, *(key for key in _NOT_KEPT if model.get(key))]
    content.unknown += [f"optimizer.{key}" for key in optimizer if key not in (*_OF_OPTIMIZER, *_LAYOUT, INFO)]
    take_up(content, model.get(OURS))
