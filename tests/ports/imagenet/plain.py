"""The ImageNet script's manner on generated pictures: arguments, residual blocks, top-1 and top-5, the best kept."""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--print-freq", type=int, default=4)


class FakeData(Dataset):
    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = (self.first + index) % 8
        picture = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(self.first + index))
        picture[label % 3, label : label + 4] += 1.5
        return picture, label


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def accuracy(output, target, topk):
    hits = output.topk(max(topk), 1).indices == target[:, None]
    return [float(hits[:, :k].any(1).sum()) for k in topk]


def validate(loader, model):
    model.eval()
    with torch.no_grad():
        found = [accuracy(model(images), target, (1, 5)) for images, target in loader]
    model.train()
    return [100.0 * sum(part) / len(loader.dataset) for part in zip(*found, strict=True)]


def main():
    args = parser.parse_args()
    torch.manual_seed(17)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(8), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 8)
    )
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    train_loader = DataLoader(FakeData(160, 0), batch_size=args.batch_size, shuffle=True)
    val_loader = DataLoader(FakeData(48, 5000), batch_size=args.batch_size)
    best = {"acc1": 0.0}
    for epoch in range(args.epochs):
        for images, target in train_loader:
            loss = nn.functional.cross_entropy(model(images), target, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        acc1, acc5 = validate(val_loader, model)
        scheduler.step()
        is_best = acc1 > best["acc1"]
        best["acc1"] = max(acc1, best["acc1"])
        if is_best:
            torch.save({"epoch": epoch + 1, "state_dict": model.state_dict(), **best}, args.out / "model_best.pt")
    torch.save({"state_dict": model.state_dict(), "acc5": acc5, **best}, args.out / "checkpoint.pt")


if __name__ == "__main__":
    main()
