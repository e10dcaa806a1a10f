"""A small language model over Megatron's pair of files, as a script in nanoGPT's manner would train it."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.data import TokenFile

config = json.loads(sys.argv[1])
out = Path(config["out"])
VOCABULARY = 32


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=1)
def train(run):
    data = TokenFile(config["tokens"], 6, stride=1, vocabulary=VOCABULARY)
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, batches = run.prepare(model, optimizer, loader)
    for inputs, targets in batches:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    torch.save(run.full_state_dict(), out / f"state-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    train()
