"""A masked autoencoder: random patches are hidden and rebuilt; the rate is set by hand in each step, with warmup."""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

out = Path(sys.argv[1])
epochs, batch_size = 5, 4
torch.manual_seed(11)
patches = torch.randn(128, 16, 1).cumsum(1).repeat(1, 1, 6) + 0.1 * torch.randn(128, 16, 6)
loader = DataLoader(patches, batch_size=batch_size, shuffle=True)


class MaskedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Linear(6, 16), nn.Parameter(0.02 * torch.randn(16, 16))
        self.hidden = nn.Parameter(torch.zeros(16))
        self.encoder, self.decoder = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        order = torch.rand(x.shape[:2]).argsort(1)
        mask = (order.argsort(1) >= 4).unsqueeze(2)
        seen = order[:, :4, None].expand(-1, -1, 16)
        encoded = self.encoder((self.embed(x) + self.places).gather(1, seen))
        full = self.hidden.expand(len(x), 16, 16).scatter(1, seen, encoded) + self.places
        return ((self.head(self.decoder(full)) - x).pow(2) * mask).sum() / (mask.sum() * 6)


def adjust_learning_rate(optimizer, step, total, warmup=6, base=5e-3):
    rate = base * step / warmup if step < warmup else base * 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


model = MaskedAutoencoder()
matrices = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim <= 1]
groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0, "lr_scale": 0.5}]
optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95))
for epoch in range(epochs):
    for i, x in enumerate(loader):
        adjust_learning_rate(optimizer, epoch * len(loader) + i, epochs * len(loader))
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "mae.pt")
