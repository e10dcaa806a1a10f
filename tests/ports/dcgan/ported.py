"""A DCGAN: two models, each with an optimizer of its own, and pictures of the generator after each epoch."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import everstep

out = Path(sys.argv[1])
run = everstep.join(epochs=6, global_batch_size=16, micro_batch_size=4, seed=21)
images = torch.rand(80, 1, 8, 8) * 2 - 1
dataloader = DataLoader(images, batch_size=16, shuffle=True)
fixed_noise = torch.randn(4, 6, 1, 1)


def weights_init(m):
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


netG = nn.Sequential(
    nn.ConvTranspose2d(6, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh()
)
netD = nn.Sequential(
    nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8),
    nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4), nn.Flatten(0), nn.Sigmoid()
)  # fmt: skip
netG.apply(weights_init)
netD.apply(weights_init)
criterion = nn.BCELoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
(netG, netD), (optimizerG, optimizerD), dataloader = run.prepare([netG, netD], [optimizerG, optimizerD], dataloader)
for epoch in run.epochs():
    for real in dataloader:
        # train with real
        netD.zero_grad()
        label = torch.full((real.size(0),), 1.0)
        errD_real = criterion(netD(real), label)
        errD_real.backward()
        # train with fake
        noise = torch.randn(real.size(0), 6, 1, 1)
        fake = netG(noise)
        errD_fake = criterion(netD(fake.detach()), label.fill_(0.0))
        errD_fake.backward()
        optimizerD.step()
        # update G: maximize log(D(G(z)))
        netG.zero_grad()
        errG = criterion(netD(fake), label.fill_(1.0))
        errG.backward()
        optimizerG.step()
    netG.eval()
    with torch.no_grad():
        torch.save(netG(fixed_noise), out / f"fake_samples-{epoch}.pt")
    netG.train()
torch.save(netG.state_dict(), out / "netG.pt")
torch.save(netD.state_dict(), out / "netD.pt")
