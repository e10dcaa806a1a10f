"""Layers whose gradients are large enough to leave a rank during its last backward, in which ranks kill themselves.

The JSON argument: `kills`, [rank, step, layer]: in its last micro-batch of a step, when the gradient of a layer is
there, a rank dies, once. Before, it writes how many messages it has posted in the step.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.elastic.step.early_parts import EarlyParts

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
WIDTH, LAYERS = 272, 5
posted = []


def counting(post):
    def counted(self, now, owner, places):
        posted.append(now.state.step)
        post(self, now, owner, places)

    return counted


EarlyParts._post = counting(EarlyParts._post)


def die_in_backward(run, model):
    """Behind the runtime's own hooks, which came first."""

    def hook(layer):
        def reached(parameter):
            for rank, step, at in config["kills"]:
                done = out / f"killed-{rank}-{step}-{at}"
                if (str(rank), step, at) == (mine, run.step, layer) and run.is_step_end and not done.exists():
                    done.write_text(str(posted.count(step)))
                    os.kill(os.getpid(), signal.SIGKILL)

        return reached

    for number, layer in enumerate(model):
        layer.bias.register_post_accumulate_grad_hook(hook(number))


@everstep.elastic(steps=config["steps"], global_batch_size=14, micro_batch_size=2, seed=3)
def train(run):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    plain = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1)))
    model, optimizer, batches = run.prepare(model, optimizer, data)
    die_in_backward(run, plain)
    for (inputs,) in batches:
        torch.tanh(model(inputs)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")
    (out / f"posted-{mine}").write_text(str(len(posted)))


train()
