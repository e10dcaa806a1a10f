"""`python -m everstep.agents.node.gpu_checkup`: matrix products on every GPU against those of the processor, as JSON.

Whole numbers again, small enough that products and sums are exact in float32 and, as inputs, in bfloat16; so the
results must be equal to the last bit, in bfloat16 after one rounding. Each product is made several times, since what is
flaky is not always wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch

SIZE, RUNS = 2048, 8
RANGE = 16  # entries of five bits: sums of 2048 products stay below 2^24


def check(devices: Sequence[torch.device], size: int = SIZE) -> dict[str, float]:
    """How many products were made, how many were wrong, and the rate of the slowest device; nothing without any."""
    generator = torch.Generator().manual_seed(7)
    left, right = (torch.randint(-RANGE, RANGE, (size, size), generator=generator).float() for _ in range(2))
    expected = (left.double() @ right.double()).float()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    wrong = runs = 0
    slowest = float("inf")
    for device in devices:
        for kind in (torch.float32, torch.bfloat16):
            a, b, reference = (matrix.to(device, kind) for matrix in (left, right, expected))
            least_s = float("inf")
            for _ in range(RUNS):
                began_s = time.perf_counter()
                product = a @ b
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                least_s = min(least_s, time.perf_counter() - began_s)
                wrong += not torch.equal(product, reference)
                runs += 1
            slowest = min(slowest, 2 * size**3 / least_s)
    return {"gpu_wrong": wrong, "gpu_runs": runs, "gpu_product_flops": slowest} if runs else {}


def gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(check(gpus())) + "\n")
