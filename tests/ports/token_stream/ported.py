"""A small language model on a stream of windows of text, in the manner of llama2.c."""

import math
import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import everstep

out = Path(sys.argv[1])
max_iters, batch_size = 60, 4
run = everstep.join(steps=max_iters, global_batch_size=16, micro_batch_size=batch_size, seed=8)
tokens = (torch.arange(3000) ** 2 % 23).long()


class Windows(IterableDataset):
    def __iter__(self):
        generator = random.Random(42)
        for _ in range(6):
            starts = list(range(0, len(tokens) - 17, 16))
            generator.shuffle(starts)
            for start in starts:
                yield tokens[start : start + 16], tokens[start + 1 : start + 17]


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(23, 16), nn.RMSNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True, bias=False)
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.head = nn.Linear(16, 23, bias=False)

    def forward(self, x):
        h = self.norm(self.tokens(x))
        mask = nn.Transformer.generate_square_subsequent_mask(16)
        h = h + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return self.head(h + self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


model = Llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
loader = DataLoader(Windows(), batch_size=batch_size)
model, optimizer, loader = run.prepare(model, optimizer, loader)
for iteration, (x, y) in enumerate(loader):
    for group in optimizer.param_groups:
        group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * run.step / max_iters))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "llama.pt")
