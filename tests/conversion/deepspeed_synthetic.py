"""Checkpoints in DeepSpeed's layout that it cannot write on CPU, or that few jobs have: fp16, uneven fused
parameters, padded vocabularies, averaged slices, the elastic form, experts in the other order of ranks.

Written with our own writer of torch's files, after the layouts in DeepSpeed's sources; the samples that DeepSpeed
itself writes are in `samples`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import Lazy
from everstep.checkpointing.convert.files.torchwriting import Instance, Size, save

STATES = ("fp32", "exp_avg", "exp_avg_sq")
Pieces = Mapping[str, Sequence[np.ndarray]]  # of each parameter, by tensor-parallel rank


def lazy(array: np.ndarray, dtype: str = "float32") -> Lazy:
    stored = cast(np.ascontiguousarray(array), dtype)
    return Lazy(stored.shape, dtype, lambda: stored, "synthetic")


def state_of(array: np.ndarray, state: str) -> np.ndarray:
    """A moment that is computed exactly from the parameter: float32 can represent it."""
    return array + np.float32({"fp32": 0, "exp_avg": 1000, "exp_avg_sq": 2000}[state])


@dataclass
class Job:
    """A synthetic job. `groups`: names by optimizer group; `settings`: of each group."""

    pieces: Pieces
    data: int = 2
    prefix: str = "bf16_"
    dtype: str = "bfloat16"
    info: dict[str, Any] | None = None
    elastic: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tensor(self) -> int:
        return len(next(iter(self.pieces.values())))


def write(job: Job, root: Path) -> Path:
    """Write the checkpoint of a job: `latest`, model states and optimizer states."""
    folder = root / "global_step5"
    folder.mkdir(parents=True)
    (root / "latest").write_text(folder.name)
    for tensor in range(job.tensor):
        arrays = {name: pieces[tensor] for name, pieces in job.pieces.items()}
        save(folder / f"mp_rank_{tensor:02d}_model_states.pt", model_state(job, arrays))
        flat = {state: np.concatenate([state_of(a, state).reshape(-1) for a in arrays.values()]) for state in STATES}
        share = -(-flat["fp32"].size // job.data)
        for data in range(job.data):
            name = f"{job.prefix}zero_pp_rank_{data}_mp_rank_{tensor:02d}_optim_states.pt"
            here = slice(data * share, (data + 1) * share)
            save(folder / name, optimizer_state(job, arrays, {key: value[here] for key, value in flat.items()}, here))
    return root


def model_state(job: Job, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "module": OrderedDict((name, lazy(array, job.dtype)) for name, array in arrays.items()),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, Size(array.shape)) for name, array in arrays.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 5,
        "global_samples": 10,
        "dp_world_size": job.data,
        "mp_world_size": job.tensor,
        "ds_config": job.config,
        "ds_version": "0.19.8",
        **({"universal_checkpoint_info": job.info} if job.info else {}),
    }


def optimizer_state(
    job: Job, arrays: Mapping[str, np.ndarray], flat: Mapping[str, np.ndarray], here: slice
) -> dict[str, Any]:
    """One rank's file: its run of the flattened parameters, and where in it each of them is."""
    placed: OrderedDict[str, Instance] = OrderedDict()
    start = 0
    for name, array in arrays.items():
        first, last = max(start, here.start), min(start + array.size, here.stop)
        if first < last:
            placed[name] = fragment(first - here.start, last - first)
        start += array.size
    moments = {key: lazy(np.append(flat[key], [0, 0, 0])) for key in ("exp_avg", "exp_avg_sq")}  # padding behind
    settings = {"lr": 0.5, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": [0]}
    base: Any = {"state": {0: {"step": lazy(np.array(5.0)), **moments}}, "param_groups": [settings]}
    if job.elastic:
        base = [moments]
    return {
        "optimizer_state_dict": {
            "loss_scaler": Instance(
                "deepspeed.runtime.fp16.loss_scaler",
                "DynamicLossScaler" if job.dtype == "float16" else "LossScaler",
                {"cur_scale": 65536.0, "dynamic": job.dtype == "float16"},
            ),
            "dynamic_loss_scale": job.dtype == "float16",
            "overflow": False,
            "clip_grad": 1.0,
            "base_optimizer_state": base,
            **({"base_optimizer_state_step": 5} if job.elastic else {}),
            "single_partition_of_fp32_groups": [lazy(flat["fp32"])],
            "zero_stage": 1,
            "param_slice_mappings": [placed],
            "ds_version": "0.19.8",
        },
        "ds_version": "0.19.8",
    }


def fragment(start: int, count: int) -> Instance:
    return Instance("deepspeed.utils.tensor_fragment", "fragment_address", {"numel": count, "start": start})


def numbered(*shape: int, start: int = 1) -> np.ndarray:
    """Distinct numbers, exact in bfloat16 no more; exact in float32."""
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def cut(whole: np.ndarray, ranks: int, dim: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(part) for part in np.array_split(whole, ranks, axis=dim)]
