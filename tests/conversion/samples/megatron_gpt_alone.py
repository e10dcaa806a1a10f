"""Train the GPT of docs/examples/megatron_gpt.py by megatron-core's own schedule and optimizer, in one process.

Usage: megatron_gpt_alone.py FOLDER. Makes FOLDER/<case>/{losses.json, state.pt}, and a checkpoint in the middle.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_state
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron_world import Case, launch, start, stop

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[3] / "docs" / "examples")]
import megatron_gpt  # noqa: E402

STEPS, SAVED, MICRO_BATCHES, MICRO_BATCH = 20, 10, 8, 2
CASES = {"tied": [], "untied": ["--untied", "--rope"]}
SMALL = ["--layers=2", "--width=32", "--dropout=0"]


def build(options: Namespace) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = megatron_gpt.gpt(options)
    model.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(check_for_nan_in_grad=False)
    model = DistributedDataParallel(model.config, settings, model)
    adam = {"optimizer": "adam", "lr": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}
    return model, get_megatron_optimizer(OptimizerConfig(**adam, clip_grad=0.0), [model])


def train(model: Any, optimizer: Any, save: Callable[[], None]) -> list[float]:
    """The loss of each step."""
    data, length = megatron_gpt.Sequences(), megatron_gpt.LENGTH
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    losses = []

    def forward(batches: Any, model: Any) -> tuple[Any, Any]:
        tokens, labels = next(batches)
        positions = torch.arange(length).expand_as(tokens)
        out = model(tokens, positions, mask, labels=labels)
        return out, lambda output: (output.mean(), {"loss": float(output.mean())})

    for step in range(STEPS):
        if step == SAVED:
            save()
        first = step * MICRO_BATCHES * MICRO_BATCH
        samples = [data[first + i] for i in range(MICRO_BATCHES * MICRO_BATCH)]
        loader = torch.utils.data.DataLoader(samples, batch_size=MICRO_BATCH)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(loader),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=length,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        optimizer.step()
        losses.append(sum(one["loss"] for one in found) / len(found))
    return losses


def save(case: Case, model: Any, optimizer: Any, options: Namespace, root: Path) -> None:
    settings = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    state = megatron_state.sharded(case, model, optimizer, loading=False)  # with a scheduler, which sets these
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    arguments = {
        "num_layers": options.layers,
        "hidden_size": options.width,
        "num_attention_heads": 4,
        "vocab_size": megatron_gpt.VOCABULARY,
        "padded_vocab_size": megatron_gpt.VOCABULARY,
        "untie_embeddings_and_output_weights": options.untied,
        "iteration": SAVED,
    }
    folder = root / f"iter_{SAVED:07d}"
    folder.mkdir(parents=True)
    dist_checkpointing.save({**state, "args": Namespace(**arguments), "iteration": SAVED}, folder)
    (root / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


def main(root: Path) -> None:
    for name, flags in CASES.items():
        case, out = Case(name, bf16=False, tied=name == "tied"), root / name
        out.mkdir(parents=True)
        options = megatron_gpt.parser.parse_args([*SMALL, *flags])
        start(case)
        model, optimizer = build(options)

        def in_the_middle() -> None:
            save(case, model, optimizer, options, out / "megatron")  # noqa: B023

        losses = train(model, optimizer, in_the_middle)
        (out / "losses.json").write_text(json.dumps(losses))
        torch.save(dict(model.module.named_parameters()), out / "state.pt")
        stop()


if __name__ == "__main__":
    launch(1, lambda: main(Path(sys.argv[1])))
