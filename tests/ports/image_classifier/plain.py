"""An image classifier with batch norm, augmented as samples are read; the weights of the best epoch are kept."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):
    def __init__(self, first, count, augment):
        self.first, self.count, self.augment = first, count, augment

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % 5
        picture = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(self.first + index))
        picture[:, label] += 2.0
        if self.augment and torch.rand(()) < 0.5:
            picture = picture.flip(2)
        if self.augment:
            picture = picture.roll(int(torch.randint(-1, 2, ())), 2) + 0.1 * torch.randn(3, 8, 8)
        return picture, label


out = Path(sys.argv[1])
torch.manual_seed(2)
train_loader = DataLoader(Pictures(0, 120, augment=True), batch_size=20, shuffle=True, num_workers=0)
test_loader = DataLoader(Pictures(1000, 50, augment=False), batch_size=10)
model = nn.Sequential(
    nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def validate():
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(pictures).argmax(1) == labels).sum()) for pictures, labels in test_loader)
    model.train()
    return correct / len(test_loader.dataset)


record = {"best": 0.0, "epoch": -1}
for epoch in range(8):
    for pictures, labels in train_loader:
        loss = nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = validate()
    if accuracy > record["best"]:
        record.update(best=accuracy, epoch=epoch)
        torch.save(model.state_dict(), out / "best.pt")
(out / "record.json").write_text(json.dumps(record))
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, out / "last.pt")
