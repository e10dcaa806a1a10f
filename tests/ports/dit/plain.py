"""A diffusion transformer (DiT) with a moving average of its parameters, and labels that are dropped."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader


class DiTBlock(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(approximate="tanh"), nn.Linear(2 * size, size))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, 2)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, size=16, classes=4):
        super().__init__()
        self.patches, self.places = nn.Linear(4, size), nn.Parameter(torch.randn(1, 4, size) * 0.02)
        self.times, self.labels = nn.Embedding(20, size), nn.Embedding(classes + 1, size)
        self.blocks = nn.ModuleList(DiTBlock(size) for _ in range(2))
        self.head = nn.Linear(size, 4)

    def forward(self, x, t, y):
        condition, h = self.times(t) + self.labels(y), self.patches(x.unflatten(1, (4, 4))) + self.places
        for block in self.blocks:
            h = block(h, condition)
        return self.head(h).flatten(1)


out = Path(sys.argv[1])
torch.manual_seed(19)
pictures = [(torch.sin(torch.arange(16) * (1 + i % 4) / 4 + i), i % 4) for i in range(128)]
loader = DataLoader(pictures, batch_size=16, shuffle=True, drop_last=True)
alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.2, 20), 0)
model = DiT()
ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
for epoch in range(6):
    for x, y in loader:
        y = torch.where(torch.rand(len(y)) < 0.1, 4, y)
        t = torch.randint(0, 20, (len(x),))
        noise = torch.randn_like(x)
        noisy = alphas[t].sqrt()[:, None] * x + (1 - alphas[t]).sqrt()[:, None] * noise
        loss = nn.functional.mse_loss(model(noisy, t, y), noise)
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update_parameters(model)
state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "opt": opt.state_dict()}
torch.save(state, out / "dit.pt")
