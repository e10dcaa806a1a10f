"""An ordinary training loop over `run.prepare`; the JSON argument picks the model, the optimizer and the numbers."""

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


class Dictionaries(torch.utils.data.Dataset):
    """Map-style samples that the default collation would not do."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(6, generator=generator), "y": index % 3, "name": f"sample {index}"}


def collate(samples):
    return torch.stack([s["x"] for s in samples]).to(DTYPE), torch.tensor([s["y"] for s in samples])


DTYPE = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[config.get("dtype", "float32")]


class Tower(nn.Module):
    """Batch norm, dropout, a frozen layer, a constant buffer, and a parameter that is no matrix."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if config.get("batch_norm", True) else nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("shift", torch.full((8,), 0.25))
        self.scale = nn.Parameter(torch.ones(()))
        self.last = nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = torch.relu(self.norm(self.first(inputs)))
        return self.last(self.drop(self.frozen(hidden) * self.scale + self.shift))


class Whole(torch.optim.Optimizer):
    """An optimizer that looks at whole parameters: the update is as long as the parameter is."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["calls"] = 0
                state["calls"] += 1
                state["momentum"].mul_(0.9).add_(parameter.grad)
                length = state["momentum"].norm() + 1e-6
                parameter.sub_(state["momentum"] * (group["lr"] * (parameter.norm() + 1e-3) / length))


def optimizer_of(model):
    kind = config.get("optimizer", "sgd")
    if kind == "whole":
        return Whole([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if kind == "adam":
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


@everstep.elastic(steps=config["steps"], global_batch_size=14, micro_batch_size=2, seed=3)
def train(run):
    model = Tower().to(DTYPE)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    seen = 0
    model, optimizer, batches = run.prepare(model, optimizer, Dictionaries(), collate_fn=collate, scheduler=scheduler)
    for inputs, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.get("autocast", False)):
            loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        run.clip_grad_norm_(0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seen += 1
    state = run.full_state_dict()
    torch.save(state, out / f"state-{mine}.pt")
    live = model.state_dict()
    assert all(torch.equal(live[name], state["model"][name]) for name in live), "the live model is another"
    line = {"seen": seen, "lr": optimizer.param_groups[0]["lr"], "pid": os.getpid(), "world_size": run.world_size}
    (out / f"worker-{mine}-{os.getpid()}.jsonl").write_text(json.dumps({**line, "step": run.step, "loss": 0}) + "\n")


if __name__ == "__main__":
    train()
