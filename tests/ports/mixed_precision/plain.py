"""Regression under autocast with a loss scaler, whose scale begins so high that steps are skipped."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

out = Path(sys.argv[1])
torch.manual_seed(9)
inputs = torch.randn(160, 8)
loader = DataLoader(TensorDataset(inputs, inputs.sin() @ torch.randn(8, 2)), batch_size=4, shuffle=True)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)
for epoch in range(6):
    for x, y in loader:
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
torch.save({"model": model.state_dict(), "scale": torch.tensor(scaler.get_scale())}, out / "model.pt")
