"""T9. How fast are the checksum and the fused fold?

Question  GB/s of a Triton kernel that takes two 64-bit sums over a tensor, and of one that folds 2, 4 or 8 tensors
          along the canonical tree in one pass, against a chain of torch.add; do both give the right bits?
Method    Kernels of kernels.py on 1 GiB (checksum) and 256 MiB a leaf (fold), timed by events; bits compared with
          numpy and with the tree on the CPU (denormals, infinities, -0, NaN). A checksum in plain torch for
          comparison.
Meaning   Near memory bandwidth: a snapshot can be summed on the GPU before it leaves, and the fold costs (1 + 1/n) of
          the gradient's bytes. Wrong denormals would forbid Triton for the fold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy
from driver import GIB, MIB
from options import Options
from processes import Channel, ended_after, start
from report import Report, rounded
from t6_determinism import equal_but_nan_payload, hard_leaves, tree_sum

WAYS = (2, 4, 8)


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    if options.rehearsal:
        report.fail("triton", "not rehearsed: Triton has no CPU back end here")
    parts = {"bandwidth": _bandwidth, "checksum": _checksum, "fold": _fold}
    for name, work in parts.items():
        if options.rehearsal and name != "bandwidth":
            continue
        with report.part(name), ended_after() as children:
            child = start(name, _in_child(work, options))
            children.append(child)
            answer = child.hear(timeout_s=40)
            report.measure(name, answer)
            report.find(answer["finding"])


def _in_child(work: Callable[[Options], dict[str, Any]], options: Options) -> Any:
    def role(channel: Channel) -> None:
        channel.send(work(options))

    return role


def _rate(moved_bytes: int, work: Callable[[], Any]) -> float:
    from gpu import device_seconds

    times = sorted(device_seconds(work, repeats=15, warm_up=3))
    return rounded(moved_bytes / times[len(times) // 2] / 1e9)


def _bandwidth(options: Options) -> dict[str, Any]:
    """The ceiling: a device-to-device copy."""
    import torch
    from gpu import device

    size = options.pick(full=GIB, quick=GIB, rehearsal=MIB)
    source = torch.ones(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    rate = _rate(2 * size, lambda: target.copy_(source))
    return {"copy_gb_per_s": rate, "finding": f"Device-to-device copy, bytes read and written: {rate} GB/s."}


def _checksum(options: Options) -> dict[str, Any]:
    import torch
    from gpu import device
    from kernels import checksum

    words = numpy.random.default_rng(5).integers(0, 2**64, 1_000_003, dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        expected = [int(words.sum()), int((words * numpy.arange(1, len(words) + 1, dtype=numpy.uint64)).sum())]
    began = time.monotonic()
    sums = checksum(torch.from_numpy(words.view(numpy.int64).copy()).to(device()))
    right = [value % 2**64 for value in sums.tolist()] == expected
    compile_s = rounded(time.monotonic() - began)

    size = GIB
    data = torch.randint(-(2**62), 2**62, (size // 8,), dtype=torch.int64, device=device())
    weights = torch.arange(1, size // 8 + 1, dtype=torch.int64, device=device())
    rates = {
        "triton_gb_per_s": _rate(size, lambda: checksum(data)),
        "torch_gb_per_s": _rate(size, lambda: (data.sum(), (data * weights).sum())),
    }
    host = data.cpu().numpy().view(numpy.uint64)
    began = time.monotonic()
    with numpy.errstate(over="ignore"):
        on_host = int(host.sum())
    host_rate = rounded(size / (time.monotonic() - began) / 1e9)
    right = right and checksum(data)[0].item() % 2**64 == on_host
    again = len({tuple(checksum(data).tolist()) for _ in range(5)}) == 1
    finding = (
        f"Checksum: right: {right}, the same in five runs: {again}; GB/s: Triton {rates['triton_gb_per_s']}, torch "
        f"{rates['torch_gb_per_s']}, plain sum by numpy {host_rate}; first call (compilation) {compile_s} s."
    )
    return rates | {
        "right": right,
        "compile_s": compile_s,
        "numpy_sum_gb_per_s": host_rate,
        "finding": finding,
    }


def _fold(options: Options) -> dict[str, Any]:
    import torch
    from gpu import device
    from kernels import fold

    answer: dict[str, Any] = {}
    size = options.pick(full=256 * MIB, quick=64 * MIB, rehearsal=MIB)
    for ways in WAYS:
        hard = hard_leaves(ways, 1 << 16)
        on_device = [leaf.to(device()) for leaf in hard]
        out = torch.empty_like(on_device[0])
        fold(on_device, out)
        right = equal_but_nan_payload(out.cpu(), tree_sum(hard))
        leaves = [torch.randn(size // 4, device=device()) for _ in range(ways)]
        whole = torch.empty_like(leaves[0])

        def chain(parts: list[Any] = leaves) -> None:
            """The tree by torch.add in place, as the product sums today. The values grow, which does not matter."""
            level = list(parts)
            while len(level) > 1:
                level = [level[i].add_(level[i + 1]) for i in range(0, len(level), 2)]

        fused = _rate((ways + 1) * size, lambda parts=leaves, o=whole: fold(parts, o))
        fused_s = (ways + 1) * size / fused / 1e9
        chain_s = 3 * (ways - 1) * size / _rate(3 * (ways - 1) * size, chain) / 1e9
        answer[f"{ways}_way"] = {
            "right": right,
            "fused_gb_per_s": fused,
            "fused_ms_per_gb_of_leaf": rounded(1000 * fused_s / (size / 1e9)),
            "chain_ms_per_gb_of_leaf": rounded(1000 * chain_s / (size / 1e9)),
            "chain_over_fused": rounded(chain_s / fused_s),
        }
    text = "; ".join(
        f"{name}: bits right: {a['right']}, {a['fused_gb_per_s']} GB/s, a chain of torch.add takes "
        f"{a['chain_over_fused']} times as long"
        for name, a in answer.items()
    )
    return answer | {"finding": f"Fused fold, {text}."}
