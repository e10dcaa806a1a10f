"""Diffusion over points in the plane, with a moving average of the parameters (EMA)."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import everstep

out = Path(sys.argv[1])
run = everstep.join(epochs=6, global_batch_size=16, micro_batch_size=4, seed=5)
angles = torch.rand(160) * 6.283
points = torch.stack([angles.cos(), angles.sin()], 1)
loader = DataLoader(points, batch_size=4, shuffle=True)
noise_left = torch.cumprod(1 - torch.linspace(1e-4, 0.1, 30), 0)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(30, 16)
        self.enter, self.leave = (
            nn.Linear(2, 16),
            nn.Sequential(nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 2)),
        )

    def forward(self, x, t):
        return self.leave(self.enter(x) + self.time(t))


model = Denoiser()
average = run.average(model, 0.95)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = run.prepare(model, optimizer, loader)
for epoch in run.epochs():
    for clean in loader:
        t = torch.randint(0, 30, (len(clean),))
        noise = torch.randn_like(clean)
        noisy = noise_left[t].sqrt()[:, None] * clean + (1 - noise_left[t]).sqrt()[:, None] * noise
        loss = nn.functional.mse_loss(model(noisy, t), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
torch.save({"model": model.state_dict(), "average": average.module.state_dict()}, out / "diffusion.pt")
