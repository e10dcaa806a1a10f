"""Losses that are sums, a loss scaler, accumulation: the JSON argument picks the loop and what is in it.

`reduction`: "mean", "sum" or "tokens". `stages`: more than one with `run.steps`. `scaler`: in float16, by autocast; the
loss of one sample overflows in each pass over the data. `accumulation`: the loss is divided by it, and the optimizer
stepped in every so many turns.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
TOKENS = config["reduction"] == "tokens"
EVERY = config.get("accumulation", 1)


class Sentences(torch.utils.data.Dataset):
    """Words of which some are padding; sample 9 has weights that overflow in float16 once they are scaled."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(0, 12, (7,), generator=generator)
        words[7 - index % 6 :] = -1
        weight = 1e4 if index == 9 and config.get("scaler") else 1.0
        return words.clamp(min=0), (words, torch.full((7,), weight))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(8, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, inputs):
        with torch.autocast("cpu", torch.float16, enabled=bool(config.get("scaler"))):
            return self.drop(torch.tanh(self.layer(inputs))) * 4


def loss_of(outputs, targets):
    """The loss, and over how many tokens it is a sum."""
    words, weights = targets
    known = words >= 0
    outputs = outputs.float().flatten(0, 1)
    losses = nn.functional.cross_entropy(outputs, words.flatten(), ignore_index=-1, reduction="none")
    total = (losses * weights.flatten()).sum()
    if TOKENS:
        return total, known.sum()
    return total if config["reduction"] == "sum" else total / known.sum().clamp(min=1)


def own_loop(run, model, optimizer, scaler):
    optimizer_steps = 0
    model, optimizer, batches = run.prepare(model, optimizer, Sentences(), scaler=scaler, accumulation=EVERY)
    for turn, (words, targets) in enumerate(batches):
        loss = loss_of(model(words), targets)
        if TOKENS:
            loss, tokens = loss
            run.count_tokens(tokens)
        scaler.scale(loss / EVERY).backward()
        if (turn + 1) % EVERY == 0:
            scaler.unscale_(optimizer)
            run.clip_grad_norm_(50.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer_steps += run.is_step_end


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=1, seed=3)
def train(run):
    model = nn.Sequential(nn.Embedding(12, 8), Layer(8), Layer(8), Layer(12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2, enabled=bool(config.get("scaler")))
    if config.get("stages", 1) > 1:
        for step in run.steps(model, optimizer, Sentences(), loss_fn=loss_of, scaler=scaler, clip_grad_norm=50.0):
            run.state["losses"] = [*run.state.get("losses", []), [step.loss, step.gradient_norm]]
    else:
        own_loop(run, model, optimizer, scaler)
    told = {"shared": dict(run.state), "scaler": scaler.state_dict(), "skipped": run.skipped_steps}
    torch.save({**run.full_state_dict(), **told}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
