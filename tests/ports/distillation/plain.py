"""A small student learns from a frozen teacher; batches are named tuples; the rate follows a cosine after a warmup."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader


class Batch(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


def collate(samples):
    inputs, labels = zip(*samples, strict=True)
    return Batch(torch.stack(inputs), torch.tensor(labels))


out, epochs, temperature = Path(sys.argv[1]), 6, 2.0
torch.manual_seed(20)
samples = [
    (torch.randn(8, generator=torch.Generator().manual_seed(i)) + torch.eye(8)[i % 4], i % 4) for i in range(144)
]
train, held_out = DataLoader(samples[:128], batch_size=16, shuffle=True, collate_fn=collate), collate(samples[128:])
teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).eval().requires_grad_(False)
student = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 4))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
warmup = LinearLR(optimizer, 0.1, total_iters=8)
scheduler = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 8 * epochs - 8)], milestones=[8])
agreement = []
for epoch in range(epochs):
    for batch in train:
        with torch.no_grad():
            soft = (teacher(batch.inputs) / temperature).softmax(1)
        logits = student(batch.inputs)
        loss = nn.functional.kl_div((logits / temperature).log_softmax(1), soft, reduction="batchmean")
        loss = 0.7 * temperature**2 * loss + 0.3 * nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    student.eval()
    with torch.no_grad():
        same = student(held_out.inputs).argmax(1) == teacher(held_out.inputs).argmax(1)
    student.train()
    agreement.append(float(same.float().mean()))
torch.save({"student": student.state_dict(), "agreement": agreement}, out / "student.pt")
