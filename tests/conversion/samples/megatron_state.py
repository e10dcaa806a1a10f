"""The live tensors of a Megatron world, whole and by name; saves and loads that world's checkpoints."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron_world import PADDED, SEQUENCE, VOCABULARY, Case

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def global_name(name: str, case: Case, config: Any) -> str:
    """The name a parameter of this stage and expert rank would have in a model that is in one process."""
    name = name.removeprefix("module.")
    offset = get_transformer_layer_offset(config)
    name = re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + offset}.", name)
    if case.experts:
        first = parallel_state.get_expert_model_parallel_rank() * (case.experts // case.ep)
        name = re.sub(r"local_experts\.(\d+)\.", lambda found: f"local_experts.{int(found[1]) + first}.", name)
    return name


def pieces_of(case: Case, model: Any, optimizer: Any, config: Any) -> dict[str, dict[str, Any]]:
    """This process's part of every parameter: {name: {state: (start, flat tensor), shape, dimension, model}}."""
    found: dict[str, dict[str, Any]] = {}
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    for name, weight in model.named_parameters():
        parallel = getattr(weight, "tensor_model_parallel", False)
        entry: dict[str, Any] = {
            "shape": tuple(weight.shape),
            "dimension": weight.partition_dim if parallel else None,
            "gated": case.swiglu and "linear_fc1" in name and parallel,
            "model": weight.detach().clone(),
            "tp": parallel_state.get_tensor_model_parallel_rank(),
        }
        for one in inner:
            entry.update(states_of(one, weight))
        found[global_name(name, case, config)] = entry
    return found


def states_of(optimizer: Any, weight: Any) -> dict[str, Any]:
    """{state: (start in the flattened parameter, elements)} that an optimizer holds of a parameter here."""
    if hasattr(optimizer, "model_param_gbuf_map"):
        if weight not in optimizer.model_param_gbuf_map:
            return {}
        span = optimizer._get_model_param_range_map(weight)["param"]
        tensors = dict(optimizer._get_main_param_and_optimizer_states(weight))
        tensors["fp32"] = tensors.pop("param")
        return {state: (span.start, tensors[state].detach().clone().flatten()) for state in STATES}
    for half, main in zip(
        getattr(optimizer, "float16_groups", []), getattr(optimizer, "fp32_from_float16_groups", []), strict=True
    ):
        for low, high in zip(half, main, strict=True):
            if low is weight:
                state = optimizer.optimizer.state[high]
                return {
                    name: (0, (high if name == "fp32" else state[name]).detach().clone().flatten()) for name in STATES
                }
    if weight in optimizer.optimizer.state:
        state = optimizer.optimizer.state[weight]
        return {name: (0, (weight if name == "fp32" else state[name]).detach().clone().flatten()) for name in STATES}
    return {}


def steps_of(optimizer: Any) -> set[float]:
    steps = set()
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in one.optimizer.state.values():
            steps.add(float(state["step"]))
    return steps


def gather(case: Case, model: Any, optimizer: Any, config: Any) -> dict[str, Any] | None:
    """{state: {name: whole tensor}, "model": {name: weight as computed with}, "steps"}, on rank 0."""
    mine = (pieces_of(case, model, optimizer, config), steps_of(optimizer))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
    if dist.get_rank():
        return None
    truth: dict[str, Any] = {state: {} for state in (*STATES, "model")}
    for name in {name: None for pieces, _ in everyone for name in pieces}:
        entries = [pieces[name] for pieces, _ in everyone if name in pieces]
        for state in truth:
            truth[state][name] = whole(entries, state)
    truth["steps"] = set().union(*(steps for _, steps in everyone))
    return truth


def whole(entries: list[dict[str, Any]], state: str) -> torch.Tensor:
    """The parameter put together of its data-parallel and then its tensor-parallel parts."""
    parts: dict[int, torch.Tensor] = {}
    for entry in entries:
        part = parts.setdefault(entry["tp"], torch.full(entry["shape"], float("nan")).to(entry["model"].dtype))
        if state == "model":
            parts[entry["tp"]] = entry["model"]
        elif state in entry:
            start, elements = entry[state]
            part = parts[entry["tp"]] = part.to(elements.dtype)
            part.view(-1)[start : start + len(elements)] = elements
    shards = [parts[rank] for rank in sorted(parts)]
    assert not any(shard.isnan().any() for shard in shards)
    if entries[0]["dimension"] is None:
        assert all(torch.equal(shards[0], shard) for shard in shards)
        return shards[0]
    if entries[0]["gated"]:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, dim=entries[0]["dimension"])


def arguments(case: Case) -> Namespace:
    return Namespace(
        num_layers=case.layers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        group_query_attention=True,
        swiglu=case.swiglu,
        num_experts=case.experts or None,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED,
        max_position_embeddings=SEQUENCE,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        untie_embeddings_and_output_weights=not case.tied,
        use_distributed_optimizer=bool(case.sharding),
        bf16=case.bf16,
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        iteration=3,
        consumed_train_samples=24,
        overlap_grad_reduce=case.bucket is not None,
        ddp_bucket_size=case.bucket,
    )


def scheduler(optimizer: Any) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        0.0,
        1e-2,
        1e-3,
        2,
        100,
        "cosine",
        0.1,
        0.1,
        100,
        "constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def sharded(case: Case, model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """The state dictionary that Megatron-LM's training loop gives to dist_checkpointing."""
    metadata = {"distrib_optim_sharding_type": case.sharding or None, "singleton_local_shards": False}
    tensors = model.module.sharded_state_dict(metadata=metadata)
    state = {
        "args": arguments(case),
        "checkpoint_version": 3.0,
        "iteration": 3,
        "model": tensors,
        "optimizer": optimizer.sharded_state_dict({"model": tensors}, is_loading=loading, metadata=metadata),
        "opt_param_scheduler": scheduler(optimizer).state_dict(),
    }
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    if not loading:
        state["rng_state"] = ShardedObject(
            "rng_state",
            [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}],
            (case.pp, case.tp),
            (pp, tp),
            replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
    return state


def save(case: Case, model: Any, optimizer: Any, root: Path) -> None:
    folder = root / "iter_0000003"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded(case, model, optimizer, loading=False), folder)
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()


def save_legacy(case: Case, model: Any, optimizer: Any, root: Path) -> None:
    """Save live objects as Megatron-LM does with `--ckpt-format torch`, which megatron-core lacks."""
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if case.pp > 1 else "")
    folder = root / "iter_0000003" / name
    if parallel_state.get_data_parallel_rank() == 0:
        folder.mkdir(parents=True)
        state = {
            "args": arguments(case),
            "checkpoint_version": 3.0,
            "iteration": 3,
            "model": model.module.state_dict_for_save_checkpoint(),
            "optimizer": optimizer.state_dict(),
            "opt_param_scheduler": scheduler(optimizer).state_dict(),
            "rng_state": [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}],
        }
        torch.save(state, folder / "model_optim_rng.pt")
    if case.sharding:
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    if dist.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()


def restore(case: Case, model: Any, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into a world of another shape; returns its common state."""
    state = dist_checkpointing.load(sharded(case, model, optimizer, loading=True), folder)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state
