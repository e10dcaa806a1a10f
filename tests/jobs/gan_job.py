"""A generator and a discriminator with an optimizer each; the JSON argument says how they are updated.

`updates`: "alternating", "simultaneous", or "critic": the discriminator makes three steps for each of the generator.
`plain`: nothing in it that plain torch would do in another order: neither dropout nor spectral norm.
`scaler`: in float16, by autocast. `stop`: training ends after that step.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import everstep

SAMPLES = [
    (
        torch.randn(4, generator=torch.Generator().manual_seed(i)),
        torch.rand(3, generator=torch.Generator().manual_seed(i)),
    )
    for i in range(24)
]
EVERY = [3, 1]
TOLD = nn.functional.binary_cross_entropy_with_logits


def models(plain):
    g = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    first = nn.Linear(4, 6)
    if not plain:
        first = nn.utils.parametrizations.spectral_norm(first)
    return g, nn.Sequential(first, nn.ReLU(), nn.Dropout(0.0 if plain else 0.2), nn.Linear(6, 1))


def optimizers(g, d):
    opt_g = torch.optim.SGD(g.parameters(), lr=0.1, momentum=0.9)
    opt_d = torch.optim.Adam([{"params": d[0].parameters()}, {"params": d[3].parameters(), "lr": 3e-3}], lr=1e-2)
    return (opt_g, opt_d), (ExponentialLR(opt_g, 0.9), StepLR(opt_d, 2, 0.5))


def scaler_of(enabled):
    """Its scale is too large at first, and becomes so again."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2, enabled=enabled)


def loss_of_d(d, real, fake):
    return TOLD(d(real), torch.ones(len(real), 1)) + TOLD(d(fake.detach()), torch.zeros(len(real), 1))


def loss_of_g(d, fake):
    return TOLD(d(fake), torch.ones(len(fake), 1))


def train(run, out, plain, updates, scaled=False, stop=None):
    g, d = models(plain)
    (opt_g, opt_d), (rate_g, rate_d) = optimizers(g, d)
    average = run.average(g, 0.75)
    scaler = scaler_of(scaled)
    buffers = None if plain else {"*._u": "last", "*._v": "last"}
    (g, d), (opt_g, opt_d), batches = run.prepare(
        [g, d],
        [opt_g, opt_d],
        torch.utils.data.DataLoader(SAMPLES, batch_size=8),
        updates="simultaneous" if updates == "simultaneous" else "alternating",
        buffers=buffers,
        every=EVERY if updates == "critic" else None,
        scaler=scaler,
    )
    norms = run.state.setdefault("norms", [])

    @run.on_step
    def note(step):
        norms.append(str(step.gradient_norm))  # which compares NaN as equal
        if step.index == stop:
            run.stop("as the job is told")

    draws = []
    for real, noise in batches:
        draws.append(torch.rand(2))
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            fake = g(noise)
            loss = loss_of_d(d.requires_grad_(True), real, fake)
        opt_d.zero_grad()
        scaler.scale(loss).backward()
        if not plain:
            run.clip_grad_norm_(0.4)
        scaler.step(opt_d)
        d.requires_grad_(False)
        if run.is_due(opt_g):
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                loss = loss_of_g(d, fake)
            opt_g.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt_g)
        scaler.update()
        rate_g.step()
        rate_d.step()
    state = {"g": g.state_dict(), "d": d.state_dict(), "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict()}
    state["average"] = average.state_dict()
    state["scaler"], state["skipped"] = scaler.state_dict(), run.skipped_steps
    torch.save({**state, "norms": norms, "draws": draws}, out / f"state-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    config = json.loads(sys.argv[1])
    everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=5)(train)(
        Path(config["out"]), config["plain"], config["updates"], config.get("scaler", False), config.get("stop")
    )
