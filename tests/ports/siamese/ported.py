"""A siamese network: two inputs through one encoder, a pair at a time; accuracy over pairs after each epoch."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import everstep


class Pairs(Dataset):
    def __init__(self, count, shift):
        self.count, self.shift = count, shift

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.shift + index)
        kinds = torch.randint(0, 3, (2,), generator=generator)
        first, second = (torch.randn(10, generator=generator) + 2.0 * torch.eye(10)[kind] for kind in kinds)
        return first, second, (kinds[0] == kinds[1]).float()


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 8))
        self.head = nn.Linear(16, 1)

    def forward(self, first, second):
        return self.head(torch.cat([self.encoder(first), self.encoder(second)], 1)).squeeze(1)


out = Path(sys.argv[1])
run = everstep.join(epochs=6, global_batch_size=16, micro_batch_size=4, seed=10)
loader, test_set = DataLoader(Pairs(128, 0), batch_size=4, shuffle=True), Pairs(64, 1000)
model = Siamese()
optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
model, optimizer, loader = run.prepare(model, optimizer, loader, scheduler_every="epoch")
log = run.state.setdefault("log", [])
for epoch in run.epochs():
    model.train()
    for first, second, same in loader:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(first, second), same)
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        hits = [bool((model(a[None], b[None]) > 0) == same) for a, b, same in (test_set[i] for i in range(64))]
    log.append(f"epoch {epoch}: {sum(hits)} of {len(hits)}")
(out / "log.json").write_text(json.dumps(log))
torch.save(model.state_dict(), out / "siamese.pt")
