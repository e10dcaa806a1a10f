"""A contrastive loss over the global batch, with a learned temperature and clipping; the JSON argument has options.

`mistake`: what the script does wrong. `scaler`: in float16, by autocast. `stop`: training ends after that step.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import everstep

BATCH, BATCHES, CLIP = 12, 6, 0.5
GENERATOR = torch.Generator().manual_seed(0)
PAIRS = [torch.randn(2, 5, generator=GENERATOR) * 0.4 + torch.randn(1, 5, generator=GENERATOR) for _ in range(24)]


class Encoder(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pairs):
        return normalize(self.layers(pairs), dim=2).flatten(1)


def loss_of(model, embeddings):
    """Of embeddings of shape (samples, 6), two views each: a view is told from those of all other samples."""
    one, other = embeddings.chunk(2, 1)
    logits = model.scale.exp() * one @ other.T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def train(run, out, dropout, mistake=None, scaled=False, stop=None):
    model = Encoder(dropout)
    optimizer = optimizer_of(model)
    size = None if mistake == "no size" else 0 if mistake == "empty" else 6
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=BATCH)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2, enabled=scaled)
    model, optimizer, batches = run.prepare(model, optimizer, loader, embedding_size=size, scaler=scaler)
    seen, norms, scales = [], [], []

    @run.on_step
    def note(step):
        norms.append(step.gradient_norm)
        if step.index == stop:
            run.stop("as the job is told")

    for pairs in batches:
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            embeddings = model(pairs)
        if mistake == "shape":
            embeddings = embeddings[:, :4]
        if mistake != "no call":
            embeddings = run.gather_batch(embeddings)
        if mistake == "twice":
            embeddings = run.gather_batch(embeddings[: len(pairs)])
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = loss_of(model, embeddings)
        if not run.is_collecting:
            seen.append((run.step, float(loss)))
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        run.clip_grad_norm_(CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": seen}
    state["scaler"], state["skipped"] = scaler.state_dict(), run.skipped_steps
    state["norms"], state["scales"] = norms, scales
    torch.save(state, out / f"state-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    reduction = "sum" if config.get("mistake") == "reduction" else "mean"
    length = {"epochs": 2, "last_batch": "short"} if config.get("mistake") == "short" else {"steps": config["steps"]}
    everstep.elastic(**length, global_batch_size=BATCH, micro_batch_size=4, seed=5, loss_reduction=reduction)(train)(
        Path(config["out"]), config["dropout"], config.get("mistake"), config.get("scaler", False), config.get("stop")
    )
