"""Train the GPT of docs/examples/megatron_gpt.py in other forms, in one process each time: a JSON object of losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[3] / "docs" / "examples")]
import megatron_gpt  # noqa: E402

import everstep  # noqa: E402
from everstep.integrations import megatron  # noqa: E402

FORMS = {  # settings of the configuration
    "as it is": {},
    "recompute": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "recompute all": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
SMALL = ["--layers=2", "--width=32"]
elastic = everstep.elastic(steps=3, global_batch_size=16, micro_batch_size=4, seed=0)
found: dict[str, list[float]] = {}


def data() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(megatron_gpt.Sequences(), batch_size=16)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def steps(run: everstep.Run, model: Any) -> list[float]:
    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model.compute_language_model_loss(labels, logits).mean()

    return [step.loss for step in run.steps(megatron.staged(model), adam(model), data(), loss_fn=loss_fn)]


@elastic
def staged(run: everstep.Run, name: str, *flags: str) -> None:
    megatron.initialize()
    model = megatron_gpt.gpt(megatron_gpt.parser.parse_args([*SMALL, *flags]))
    for setting, value in FORMS.get(name, {}).items():
        setattr(model.config, setting, value)
    found[name] = steps(run, model)


@elastic
def looped(run: everstep.Run) -> None:
    megatron.initialize()
    model = megatron_gpt.gpt(megatron_gpt.parser.parse_args([*SMALL, "--dropout=0"]))
    model, optimizer, loader = run.prepare(model, adam(model), data())
    length, losses = megatron_gpt.LENGTH, []
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    for tokens, labels in loader:
        loss = model(tokens, torch.arange(length).expand_as(tokens), mask, labels=labels).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    found["loop"] = [sum(losses[at : at + 4]) / 4 for at in range(0, len(losses), 4)]


if __name__ == "__main__":
    for form in FORMS:
        staged(form)
    staged("without dropout", "--dropout=0")
    looped()
    print(json.dumps(found))
