"""A trainer class with callbacks and clipping around a small sorting model, in minGPT's manner."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import everstep


class Sorting(Dataset):
    def __len__(self):
        return 320

    def __getitem__(self, index):
        numbers = torch.randint(0, 8, (6,), generator=torch.Generator().manual_seed(index))
        return numbers, numbers.sort().values


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.numbers, self.places = nn.Embedding(8, 16), nn.Embedding(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x, y):
        logits = self.head(self.block(self.numbers(x) + self.places.weight))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Trainer:
    def __init__(self, model, dataset, max_iters, batch_size, grad_norm_clip):
        self.model, self.grad_norm_clip = model, grad_norm_clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        self.loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)

    def run(self):
        self.model, self.optimizer, self.loader = run.prepare(self.model, self.optimizer, self.loader)
        self.model.train()
        for x, y in self.loader:
            _, loss = self.model(x, y)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            run.clip_grad_norm_(self.grad_norm_clip)
            self.optimizer.step()


out = Path(sys.argv[1])
run = everstep.join(steps=80, global_batch_size=16, micro_batch_size=4, seed=13)
trainer = Trainer(Model(), Sorting(), max_iters=80, batch_size=4, grad_norm_clip=1.0)
trainer.run()
torch.save({"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, out / "sorter.pt")
