"""A variational autoencoder, whose loss is a sum over the batch."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy
from torch.utils.data import DataLoader

out = Path(sys.argv[1])
torch.manual_seed(4)
images = torch.rand(160, 36)
train_loader = DataLoader(images, batch_size=16, shuffle=True)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.log_variance = nn.Linear(36, 16), nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 36), nn.Sigmoid())

    def forward(self, x):
        hidden = torch.relu(self.hidden(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def loss_function(decoded, x, mean, log_variance):
    divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
    return binary_cross_entropy(decoded, x, reduction="sum") + divergence


model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for epoch in range(6):
    for data in train_loader:
        optimizer.zero_grad()
        decoded, mean, log_variance = model(data)
        loss = loss_function(decoded, data, mean, log_variance)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sample = model.decoder(torch.randn(4, 4, generator=torch.Generator().manual_seed(epoch)))
    torch.save(sample, out / f"sample-{epoch}.pt")
torch.save(model.state_dict(), out / "vae.pt")
