"""Transfer learning: a frozen backbone in evaluation mode, a new head, OneCycleLR over all steps."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

out = Path(sys.argv[1])
torch.manual_seed(7)
inputs = torch.randn(160, 12)
labels = (inputs[:, :4].sum(1) > 0).long()
loader = DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True)

backbone = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
backbone.requires_grad_(False)
backbone.eval()
model = nn.Sequential(backbone, nn.Linear(16, 2))
optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=5 * len(loader))
for epoch in range(5):
    model[1].train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        print(epoch, float((model(inputs).argmax(1) == labels).float().mean()))
(out / "rates.json").write_text(json.dumps(scheduler.get_last_lr()))
torch.save(model.state_dict(), out / "model.pt")
