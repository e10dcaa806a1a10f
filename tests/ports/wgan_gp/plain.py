"""A Wasserstein GAN with gradient penalty: the critic makes five steps for each of the generator."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

out, latent_dim, n_critic, lambda_gp = Path(sys.argv[1]), 4, 5, 10.0
torch.manual_seed(24)
angles = torch.rand(160) * 6.28
loader = DataLoader(torch.stack([angles.cos(), angles.sin()], 1), batch_size=16, shuffle=True)
G = nn.Sequential(nn.Linear(latent_dim, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2))
D = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
opt_G = torch.optim.Adam(G.parameters(), lr=2e-3, betas=(0.5, 0.9))
opt_D = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.9))


def compute_gradient_penalty(real, fake):
    alpha = torch.rand(real.size(0), 1)
    between = (alpha * real + (1 - alpha) * fake).requires_grad_(True)
    found = D(between)
    (gradients,) = torch.autograd.grad(found, between, torch.ones_like(found), create_graph=True, retain_graph=True)
    return ((gradients.norm(2, dim=1) - 1) ** 2).mean()


for epoch in range(5):
    for i, real in enumerate(loader):
        # train the critic
        opt_D.zero_grad()
        z = torch.randn(real.size(0), latent_dim)
        fake = G(z).detach()
        penalty = compute_gradient_penalty(real, fake)
        d_loss = -D(real).mean() + D(fake).mean() + lambda_gp * penalty
        d_loss.backward()
        opt_D.step()
        # train the generator every n_critic steps
        if i % n_critic == 0:
            opt_G.zero_grad()
            g_loss = -D(G(z)).mean()
            g_loss.backward()
            opt_G.step()
    with torch.no_grad():
        torch.save(G(torch.linspace(-1, 1, 8 * latent_dim).view(8, -1)), out / f"points-{epoch}.pt")
torch.save({"G": G.state_dict(), "D": D.state_dict()}, out / "wgan.pt")
