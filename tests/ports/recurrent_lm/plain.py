"""A word language model by truncated backpropagation: each column of the text carries its hidden state on."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

out = Path(sys.argv[1])
torch.manual_seed(19)
bptt, columns = 12, 16
words = (torch.arange(2105) ** 3 % 31 + torch.arange(2105) % 2).long()


def batchify(data, count):
    """One row for each column of the text, which windows of `bptt` words are cut out of."""
    return data[: len(data) // count * count].view(count, -1)


def windows(rows):
    """(text, target) of the first window of every row, then of the second one."""
    return [(row[i : i + bptt], row[i + 1 : i + 1 + bptt]) for i in range(0, rows.size(1) - 1, bptt) for row in rows]


train_data = DataLoader(windows(batchify(words[:1936], columns)), batch_size=columns)
val_data = DataLoader(windows(batchify(words[1936:], 1)))


class RNNModel(nn.Module):
    def __init__(self, ntoken, size):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(ntoken, size)
        self.rnn = nn.LSTM(size, size, num_layers=2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(size, ntoken)

    def forward(self, text, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(text)), hidden)
        return self.decoder(self.drop(output)), hidden


def repackage_hidden(hidden):
    """The same values, without the history that led to them."""
    return None if hidden is None else tuple(value.detach() for value in hidden)


def evaluate():
    model.eval()
    hidden, total = None, 0.0
    with torch.no_grad():
        for text, target in val_data:
            output, hidden = model(text, hidden)
            total += nn.functional.cross_entropy(output.flatten(0, 1), target.flatten()).item()
    model.train()
    return total / len(val_data)


model = RNNModel(32, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
for epoch in range(6):
    hidden = None
    for text, target in train_data:
        output, hidden = model(text, repackage_hidden(hidden))
        loss = nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
(out / "log.txt").write_text(f"valid loss {evaluate():.6f}")
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "model.pt")
