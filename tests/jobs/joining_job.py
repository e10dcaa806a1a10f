"""A script without a training function; the JSON argument says how it ends: by its last line, exit, raise, nothing."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
ends = config.get("ends", "")

run = everstep.join(steps=config["steps"], global_batch_size=16, micro_batch_size=2, seed=3)
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randn(64, 2))
if ends == "nothing":
    sys.exit(0)
if ends == "twice":
    everstep.join(steps=1, global_batch_size=1, micro_batch_size=1)
model, optimizer, batches = run.prepare(model, optimizer, data)
for inputs, targets in batches:
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
    if ends == "raise" and run.step == 3:
        raise ValueError("the user's own mistake")
torch.save(run.full_state_dict(), out / f"state-{mine}.pt")
with (out / f"worker-{mine}-{os.getpid()}.jsonl").open("w") as log:
    log.write(json.dumps({"step": run.step - 1, "loss": 0.0}) + "\n")
if ends == "exit":
    sys.exit(0)
