"""Digits by a small convolutional net with dropout; the rate falls once per epoch; accuracy after each epoch."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everstep

out = Path(sys.argv[1])
run = everstep.join(epochs=10, global_batch_size=16, micro_batch_size=4, seed=1)
images, labels = torch.randn(160, 1, 8, 8), torch.arange(160) % 10
images[torch.arange(160), 0, labels % 8] += 1.5
train_loader = DataLoader(TensorDataset(images[:128], labels[:128]), batch_size=16, shuffle=True)
test_loader = DataLoader(TensorDataset(images[128:], labels[128:]), batch_size=16)

model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(), nn.Linear(36, 10), nn.LogSoftmax(1)
)
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)


def test():
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(data).argmax(1) == target).sum()) for data, target in test_loader)
    model.train()
    return correct / len(test_loader.dataset)


model, optimizer, train_loader = run.prepare(model, optimizer, train_loader, scheduler_every="epoch")
log = run.state.setdefault("log", [])
for epoch in run.epochs():
    for data, target in train_loader:
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(data), target)
        loss.backward()
        optimizer.step()
    scheduler.step()
    log.append({"epoch": epoch, "accuracy": test(), "rate": scheduler.get_last_lr()[0]})
(out / "log.json").write_text(json.dumps(log))
torch.save(model.state_dict(), out / "mnist.pt")
