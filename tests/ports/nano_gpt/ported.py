"""A character GPT at module level, in nanoGPT's manner: gradients are accumulated, the rate is set by hand."""

import math
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

out = Path(sys.argv[1])
block_size, batch_size, accumulate, max_iters, warmup = 16, 4, 4, 80, 8
run = everstep.join(steps=max_iters, global_batch_size=16, micro_batch_size=batch_size, seed=3)
text = "the quick brown fox jumps over the lazy dog; " * 30
letters = sorted(set(text))
tokens = torch.tensor([letters.index(letter) for letter in text])
windows = [(tokens[i : i + block_size], tokens[i + 1 : i + 1 + block_size]) for i in range(1280)]


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(len(letters), 16), nn.Embedding(block_size, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, len(letters), bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(block_size)
        return self.head(self.block(self.tokens(x) + self.places.weight, src_mask=mask, is_causal=True))


def get_lr(iteration):
    if iteration < warmup:
        return 1e-2 * (iteration + 1) / warmup
    return 1e-3 + 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (max_iters - warmup))) * 9e-3


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
loader = torch.utils.data.DataLoader(windows, batch_size=batch_size, shuffle=True, drop_last=True)
model, optimizer, loader = run.prepare(model, optimizer, loader, accumulation=accumulate)
for turn, (x, y) in enumerate(loader):
    iteration = run.step
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iteration)
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accumulate
    loss.backward()
    if run.is_step_end:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "gpt.pt")
