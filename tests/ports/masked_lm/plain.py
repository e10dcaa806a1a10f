"""A masked language model on batches that are dictionaries, as long as their longest text; its perplexity."""

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

PAD, MASK, WORDS = 0, 1, 20
out = Path(sys.argv[1])
torch.manual_seed(6)
texts = [torch.arange(i, i + 4 + i % 7) % (WORDS - 2) + 2 for i in range(140)]


def collate(texts):
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
    chosen = (torch.rand(ids.shape) < 0.3) & (ids != PAD)
    chosen[:, 0] = True
    labels = torch.where(chosen, ids, -100)
    return {"input_ids": torch.where(chosen, MASK, ids), "attention_mask": ids != PAD, "labels": labels}


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16, padding_idx=PAD), nn.Embedding(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, WORDS)

    def forward(self, input_ids, attention_mask, labels):
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        logits = self.head(self.layer(x, src_key_padding_mask=~attention_mask))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


loader = DataLoader(texts[:128], batch_size=4, shuffle=True, collate_fn=collate)
held_out = collate(texts[128:])
model = Bert()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
history = []
for epoch in range(5):
    for batch in loader:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        history.append({"epoch": epoch, "perplexity": math.exp(model(**held_out))})
    model.train()
(out / "history.json").write_text(json.dumps(history))
torch.save(model.state_dict(), out / "bert.pt")
