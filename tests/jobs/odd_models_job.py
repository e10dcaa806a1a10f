"""Models with unusual memory layouts or parameters; the JSON argument names one, or several to train alone.

Two micro-batches a step, so their sum has only one order, and plain torch, run beside it, gives the same bytes.
"""

import fnmatch
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.elastic.step.order import DataOrder

config = json.loads(sys.argv[1])
out = Path(config["out"])
MICRO, GLOBAL, SAMPLES, SEED = 3, 6, 30, 2
BUFFERS = {
    "buffers": {"moving": "mean", "count*": "sum", "amax*": "max", "seen": "last"},
    "codebook": {"codes.*": "mean"},
    "experts": {"experts.load": "sum", "experts.seen": "last", "experts.bias": "last"},
    "spectral": {"*._u": "last", "*._v": "last"},
}


class Codes(nn.Module):
    """A vector-quantized layer, whose codebook follows what it is used for: a moving average in the forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sizes", torch.ones(5))
        self.register_buffer("sums", torch.randn(5, 8) * 0.3)

    def forward(self, hidden):
        found = hidden.permute(0, 2, 3, 1).reshape(-1, 8)
        book = self.sums / self.sizes.clamp(min=1e-3)[:, None]
        chosen = torch.cdist(found, book).argmin(1)
        with torch.no_grad():
            used = nn.functional.one_hot(chosen, 5).float()
            self.sizes.lerp_(used.sum(0), 0.1)
            self.sums.lerp_(used.T @ found, 0.1)
        found = found + (book[chosen] - found).detach()
        return found.view(hidden.shape[0], 6, 6, 8).permute(0, 3, 1, 2)


class Experts(nn.Module):
    """A mixture whose biases even out how often each expert is chosen, as DeepSeek-V3's: by the load of a step."""

    def __init__(self):
        super().__init__()
        self.router, self.scales = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8))
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("load", torch.zeros(4, dtype=torch.int64))  # since the beginning
        self.register_buffer("seen", torch.zeros(4, dtype=torch.int64))  # of it, what `bias` has taken into account

    def forward(self, hidden):
        scores = torch.sigmoid(self.router(hidden.mean((2, 3))))
        step = (self.load - self.seen).float()  # the load of the step before, of all micro-batches
        self.bias = self.bias + 0.01 * torch.sign(step.mean() - step)
        self.seen = self.load
        chosen = (scores + self.bias).topk(2).indices
        self.load = self.load + chosen.flatten().bincount(minlength=4)
        return hidden * (scores.gather(1, chosen)[:, :, None] * self.scales[chosen]).sum(1)[:, :, None, None]


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 36, 2)
        if kind == "transposed":
            self.out.weight = nn.Parameter(torch.randn(8 * 36, 2).mul_(0.1).t())
        elif kind == "sliced":
            self.out.weight = nn.Parameter(torch.randn(2, 8 * 36 * 2).mul_(0.1)[:, ::2])
        elif kind == "empty":
            self.nothing = nn.Parameter(torch.empty(0, 5))
        elif kind in ("unused", "sometimes"):
            self.extra = nn.Linear(2, 2)
        elif kind == "weight_norm":
            self.conv = nn.utils.parametrizations.weight_norm(self.conv)
        elif kind == "tied":
            self.again = nn.Conv2d(3, 8, 3, padding=1)
            self.again.weight = self.conv.weight
        elif kind == "lazy":
            self.out = nn.LazyLinear(2)
        elif kind == "spectral":
            self.conv = nn.utils.parametrizations.spectral_norm(self.conv)
        elif kind == "codebook":
            self.codes = Codes()
        elif kind == "experts":
            self.experts = Experts()
        elif kind == "buffers":
            self.register_buffer("moving", torch.zeros(8))
            self.register_buffer("counts", torch.zeros(8, dtype=torch.int64))
            self.register_buffer("amax_history", torch.zeros(4, 8))
            self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        hidden = self.conv(x)
        if self.kind == "tied":
            hidden = hidden + self.again(x)
        if self.kind in ("codebook", "experts"):
            hidden = (self.codes if self.kind == "codebook" else self.experts)(hidden)
        if self.kind == "buffers":
            found = hidden.detach().mean((0, 2, 3))
            self.moving.lerp_(found, 0.1)
            self.counts += found > 0
            self.seen = self.seen * 0.5 + found
            self.amax_history = torch.cat((hidden.detach().abs().amax((0, 2, 3))[None], self.amax_history[:-1]))
            hidden = hidden / (1 + self.amax_history.amax())
            hidden = hidden - self.moving[:, None, None] + 0.01 * self.counts[:, None, None] + self.seen.mean()
        y = self.out(torch.relu(self.norm(hidden)).flatten(1))
        if self.kind == "empty":
            y = y + self.nothing.sum()
        if self.kind == "sometimes" and float(x[0, 0, 0, 0]) > 0:
            y = y + self.extra(y)
        return y


def build(kind):
    """`synced`: a model for DistributedDataParallel, whose batch norms are those of all ranks there."""
    torch.manual_seed(0)
    net = Net(kind)
    if kind == "synced":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if kind in ("channels_last", "tied", "compiled"):
        net = net.to(memory_format=torch.channels_last)
    if kind == "compiled" and not config.get("uncompiled"):
        net = torch.compile(net, backend="eager")
    if kind == "lazy":
        net(torch.ones(2, 3, 6, 6))
    return net, torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(index))
        return x, torch.stack((x.sum(), x.mean()))


def collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x.contiguous(memory_format=torch.channels_last), y


def with_everstep(kind, steps):
    found = {}

    @everstep.elastic(steps=steps, global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=SEED)
    def train(run):
        net, optimizer = build(kind)
        how = {
            "loss_fn": nn.functional.mse_loss,
            "collate_fn": collate,
            "buffers": BUFFERS[kind] if kind in BUFFERS and kind != "spectral" else None,
        }
        for _ in run.steps(net, optimizer, Pictures(), **how):
            pass
        found.update(run.full_state_dict())
        assert net.conv.weight.is_contiguous() == (kind not in ("channels_last", "tied", "compiled"))

    train()
    return found


def combined(kind, name, before, values):
    rule = next((rule for key, rule in BUFFERS.get(kind, {}).items() if fnmatch.fnmatch(name, key)), "mean")
    if rule == "sum":
        return before + ((values[0] - before) + (values[1] - before))
    if rule == "max":
        return torch.maximum(*values)
    return (values[0] + values[1]) / 2 if rule == "mean" else values[1]


def with_torch(kind, steps):
    """Batch-norm statistics start at each micro-batch where the step did, and are averaged, as everstep has them."""
    net, optimizer = build("plain" if kind == "synced" else kind)
    order = DataOrder(samples=SAMPLES, global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=SEED)
    data = Pictures()
    for step in range(steps):
        before = [buffer.clone() for buffer in net.buffers()]
        after = []
        for micro_batch in range(GLOBAL // MICRO):
            with torch.no_grad():
                for buffer, value in zip(net.buffers(), before, strict=True):
                    buffer.copy_(value)
            x, y = collate([data[i] for i in order.indices(step, micro_batch)])
            (nn.functional.mse_loss(net(x), y) / 2).backward()
            after.append([buffer.clone() for buffer in net.buffers()])
        with torch.no_grad():
            for (name, buffer), first, values in zip(
                net.named_buffers(), before, zip(*after, strict=True), strict=True
            ):
                buffer.copy_(combined(kind, name, first, values))
        optimizer.step()
        optimizer.zero_grad()
    names = [name.replace("_orig_mod.", "") for name, _ in net.named_parameters()]
    states = [optimizer.state.get(parameter) for parameter in net.parameters()]
    model = {name.replace("_orig_mod.", ""): tensor for name, tensor in net.state_dict().items()}
    return {"model": model, "optimizer": {n: s for n, s in zip(names, states, strict=True) if s}}


if __name__ == "__main__":
    for kind in config["kinds"]:
        state = with_everstep(kind, config["steps"])
        torch.save(state, out / f"state-{kind}-{os.environ.get('RANK', 'alone')}.pt")
        if "plain" in config:
            torch.save(with_torch(kind, config["steps"]), out / f"plain-{kind}.pt")
