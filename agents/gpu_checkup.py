"""`python -m everstep.agents.gpu_checkup`: matrix products on every GPU against those of the processor, as JSON.

Whole numbers again, small enough that products and sums are exact in float32 and, as inputs, in bfloat16; so the
results must be equal to the last bit. Each product is made several times, since what is flaky is not always wrong.
"""

from __future__ import annotations

import json
import sys
import time

import torch

SIZE, RUNS = 2048, 8
RANGE = 16  # entries of five bits: sums of 2048 products stay below 2^24


def check() -> dict[str, float]:
    """How many products were made, how many were wrong, and the rate of the slowest GPU."""
    if not torch.cuda.is_available():
        return {}
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randint(-RANGE, RANGE, (SIZE, SIZE), generator=generator).float() for _ in range(2))
    expected = (left.double() @ right.double()).float()
    wrong = runs = 0
    slowest = float("inf")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for kind in (torch.float32, torch.bfloat16):
            a, b, reference = left.to(device, kind), right.to(device, kind), expected.to(device)
            for _ in range(RUNS):
                torch.cuda.synchronize(device)
                began_s = time.perf_counter()
                product = a @ b if kind is torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
                torch.cuda.synchronize(device)
                took_s = time.perf_counter() - began_s
                wrong += not torch.equal(product, reference)
                runs += 1
            slowest = min(slowest, 2 * SIZE**3 / took_s)
    return {"gpu_wrong": wrong, "gpu_runs": runs, "gpu_product_flops": slowest}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(check()) + "\n")
