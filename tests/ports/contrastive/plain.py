"""CLIP's manner: two encoders and a learned temperature; each pair is told from all other pairs of the global batch."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 6))
        self.text = nn.Sequential(nn.EmbeddingBag(20, 16), nn.ReLU(), nn.Linear(16, 6))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, texts):
        return torch.cat([normalize(self.image(images), dim=1), normalize(self.text(texts), dim=1)], 1)


out = Path(sys.argv[1])
torch.manual_seed(23)
texts = torch.randint(0, 20, (112, 5))
images = nn.functional.one_hot(texts, 20).float().sum(1) @ torch.randn(20, 12) + 0.1 * torch.randn(112, 12)
loader = DataLoader(TensorDataset(images[:96], texts[:96]), batch_size=16, shuffle=True)
model = Towers()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(8):
    for image, text in loader:
        embeddings = model(image, text)
        of_images, of_texts = embeddings.chunk(2, 1)
        logits = model.logit_scale.exp() * of_images @ of_texts.T
        labels = torch.arange(len(logits))
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
model.eval()
with torch.no_grad():
    of_images, of_texts = model(images[96:], texts[96:]).chunk(2, 1)
found = int(((of_images @ of_texts.T).argmax(1) == torch.arange(16)).sum())
(out / "found.json").write_text(json.dumps(found))
torch.save(model.state_dict(), out / "towers.pt")
