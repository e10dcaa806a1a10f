"""A word language model: the rate is divided where the loss on held-out text stops falling."""

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

out = Path(sys.argv[1])
torch.manual_seed(18)
words = (torch.arange(2100) ** 3 % 31 + torch.arange(2100) % 2).long()
pieces = [(words[i : i + 12], words[i + 1 : i + 13]) for i in range(0, 2064, 12)]
train_data = DataLoader(pieces[:160], batch_size=16, shuffle=True)
val_data = pieces[160:]


class RNNModel(nn.Module):
    def __init__(self, ntoken, size):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(ntoken, size)
        self.rnn, self.decoder = (
            nn.LSTM(size, size, num_layers=2, dropout=0.2, batch_first=True),
            nn.Linear(size, ntoken),
        )
        self.decoder.weight = self.encoder.weight

    def forward(self, text):
        hidden, _ = self.rnn(self.drop(self.encoder(text)))
        return self.decoder(self.drop(hidden))


def evaluate():
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(text[None])[0], target).item() for text, target in val_data]
    model.train()
    return sum(losses) / len(losses)


model = RNNModel(32, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
progress = {"best": math.inf, "lines": [], "lr": 2.0}
for epoch in range(6):
    for text, target in train_data:
        loss = nn.functional.cross_entropy(model(text).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    val_loss = evaluate()
    progress["lines"].append(f"end of epoch {epoch}: loss {val_loss:.6f}, perplexity {math.exp(val_loss):.4f}")
    if val_loss < progress["best"]:
        progress["best"] = val_loss
        torch.save(model.state_dict(), out / "model.pt")
    else:
        progress["lr"] /= 4.0
        for group in optimizer.param_groups:
            group["lr"] = progress["lr"]
(out / "log.txt").write_text("\n".join(progress["lines"]))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "last.pt")
