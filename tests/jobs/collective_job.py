"""A script with its own process group, in which it averages a value after each step."""

import json
import sys

import torch
import torch.distributed as dist

import everstep

config = json.loads(sys.argv[1])


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2)
def train(run):
    dist.init_process_group("gloo")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = [(torch.full((4,), i / 64), torch.full((1,), i / 64)) for i in range(64)]
    for step in run.steps(model, optimizer, data, loss_fn=torch.nn.functional.mse_loss):
        total = torch.tensor([float(step.index)])
        dist.all_reduce(total)
        assert total.item() == step.index * run.world_size
    print("all averaged", flush=True)


if __name__ == "__main__":
    train()
