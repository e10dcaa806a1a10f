"""T6. Same micro-batch, same bits?

Question  Do four processes at once on one GPU, twice each, give bitwise equal loss and gradients of one micro-batch?
          What changes the bits: alignment of the parameters, cuBLAS workspace, attention back end, a busy side
          stream? Are the AdamW implementations equal to each other and to the CPU's? Does a tree of additions on the
          GPU equal the CPU's, with denormals, infinities, -0 and NaN?
Method    Six processes: four alike, two with other CUBLAS_WORKSPACE_CONFIG. Each runs the same list of cases and
          sends digests of loss and gradients. The conductor compares. Tree: leaves 1 to 9, folded by torch.add on
          both.
Meaning   Equal over processes and runs: replay and reroute on GPUs keep the claim of equal bits. What changes bits
          goes into the numerics identity. A file of digests taken on H100 and on H200 tells whether the two may be
          mixed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from options import Options
from processes import Channel, ended_after, start
from report import Report

ALIKE = 4
OTHER_WORKSPACES = (":16:8", ":0:0")
DEFAULT_WORKSPACE = ":4096:8"
SHIFTS_BYTES = (4, 16, 32, 64, 128, 256)
LEAVES = (1, 2, 3, 4, 5, 7, 8, 9)


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    import torch

    del torch
    with ended_after() as children:
        settings = [DEFAULT_WORKSPACE] * ALIKE + list(OTHER_WORKSPACES)
        for number, workspace in enumerate(settings):
            children.append(start(f"{number} ({workspace})", _micro_batches(options, workspace)))
        tables: list[dict[str, list[str]]] = []
        for child in children:
            try:
                tables.append(child.hear(timeout_s=70))
            except Exception as error:
                report.fail(child.name, error)
                tables.append({})
    report.measure("digests_of_process_0", {case: runs[0] for case, runs in tables[0].items() if runs})
    _compare(report, tables)
    for name, role in (("optimizers", _optimizers), ("tree", _tree)):
        with report.part(name), ended_after() as children:
            child = start(name, role)
            children.append(child)
            answer = child.hear(timeout_s=40)
            report.measure(name, answer)
            report.find(answer["finding"])


def _compare(report: Report, tables: list[dict[str, list[str]]]) -> None:
    alike = tables[:ALIKE]
    cases = list(tables[0])
    unequal_runs = _unequal_runs(alike)
    unequal_processes = [c for c in cases if len({d for t in alike for d in t.get(c, [])}) > 1]
    unsupported = [c for c in cases if not tables[0][c]]
    report.find(f"Same bits in two runs of one process: all but {unequal_runs or 'none'}.")
    report.find(
        f"Same bits in {ALIKE} processes at once: all but {unequal_processes or 'none'}; "
        f"not run: {unsupported or 'none'}."
    )
    for kind in ("bf16", "fp32"):
        base = tables[0].get(f"{kind} plain")
        changed = [
            c
            for c in cases
            if c.startswith(kind) and tables[0][c] and base and tables[0][c][0] != base[0] and "flags off" not in c
        ]
        report.find(f"{kind}: cases whose bits differ from the plain case: {changed or 'none'}.")
    for workspace, table in zip(OTHER_WORKSPACES, tables[ALIKE:], strict=True):
        if unequal := _unequal_runs([table]):
            report.find(f"CUBLAS_WORKSPACE_CONFIG={workspace}: bits differ in two runs of one process: {unequal}.")
        changed = [c for c in cases if table.get(c) and tables[0][c] and table[c][0] != tables[0][c][0]]
        report.find(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} instead of {DEFAULT_WORKSPACE} changes: {changed or 'nothing'}."
        )


def _unequal_runs(tables: list[dict[str, list[str]]]) -> list[str]:
    return sorted({case for table in tables for case, runs in table.items() if len(set(runs)) > 1})


@contextmanager
def _fixed(workspace: str) -> Iterator[None]:
    """Deterministic algorithms, no TF32, no cuDNN attention; the cuBLAS workspace is set before the first handle."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    import torch

    torch.use_deterministic_algorithms(True, warn_only=workspace == ":0:0")  # torch refuses cuBLAS without workspace
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield


def _micro_batches(options: Options, workspace: str) -> Any:
    def role(channel: Channel) -> None:
        with _fixed(workspace):
            channel.send(_run_cases(options))

    return role


def _run_cases(options: Options) -> dict[str, list[str]]:
    """Digests of each case, one for each run; an empty list where the case is not supported."""
    import torch
    from gpu import device, new_stream, on, synchronise
    from small_gpt import TINY, Shape, build, gradients, leaf_digest, micro_batch, move_parameters
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = TINY if options.rehearsal else Shape(layers=2)
    ids = micro_batch(shape, 0, device())
    plain = move_parameters(build(shape), device())
    table: dict[str, list[str]] = {}

    def case(name: str, kind: str, model: Any, within: Callable[[], Any] = nullcontext) -> None:
        digests = []
        try:
            for _ in range(2):
                with within():
                    digests.append(leaf_digest(model, gradients(model, ids, autocast=kind == "bf16")))
        except RuntimeError as error:
            print(f"{kind} {name}: {error}")
            digests = []
        table[f"{kind} {name}"] = digests

    backends = {
        "math attention": SDPBackend.MATH,
        "flash attention": SDPBackend.FLASH_ATTENTION,
        "efficient attention": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn attention": SDPBackend.CUDNN_ATTENTION,
    }
    for kind in ("bf16", "fp32"):
        case("plain", kind, plain)
        for name, backend in backends.items():
            case(name, kind, plain, lambda b=backend: sdpa_kernel(b))
        for shift in SHIFTS_BYTES:
            case(f"parameters at +{shift} B", kind, move_parameters(build(shape), device(), shift_bytes=shift))

        side = new_stream()
        square = torch.randn(
            2048 if not options.rehearsal else 16, 2048 if not options.rehearsal else 16, device=device()
        )
        synchronise()
        with on(side):
            for _ in range(200):
                square @ square
        case("busy side stream", kind, plain)
        synchronise()
    return table


def _optimizers(channel: Channel) -> None:
    """Three steps of each AdamW on the same numbers."""
    import torch
    from gpu import device
    from small_gpt import tensor_digest

    generator = torch.Generator().manual_seed(3)
    start_value = torch.randn(1 << 20, generator=generator)
    gradient_values = [torch.randn(1 << 20, generator=generator) * 1e-2 for _ in range(3)]

    def digest(where: torch.device, **how: bool) -> str:
        parameter = torch.nn.Parameter(start_value.clone().to(where))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, **how)  # type: ignore[arg-type]
        for values in gradient_values:
            parameter.grad = values.to(where)
            optimizer.step()
        state = optimizer.state[parameter]
        return tensor_digest(parameter, state["exp_avg"], state["exp_avg_sq"])

    ways = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    cpu = torch.device("cpu")
    digests = {f"device {name}": digest(device(), **how) for name, how in ways.items()}
    digests |= {f"cpu {name}": digest(cpu, **how) for name, how in ways.items()}
    groups: dict[str, list[str]] = {}
    for name, value in digests.items():
        groups.setdefault(value, []).append(name)
    finding = "AdamW, groups with equal bits: " + " | ".join(" = ".join(names) for names in groups.values()) + "."
    channel.send({"digests": digests, "finding": finding})


def hard_leaves(count: int, size: int) -> list[Any]:
    """Leaves with denormals, infinities, -0 and NaN among ordinary numbers of very different sizes."""
    import torch

    leaves = []
    for leaf in range(count):
        generator = torch.Generator().manual_seed(100 + leaf)
        values = torch.randn(size, generator=generator) * torch.exp2(
            torch.randint(-120, 100, (size,), generator=generator).float()
        )
        values[0::64] = 1e-42 * (leaf + 1)  # denormal
        values[1::64] = -1e-44
        values[2::64] = -0.0
        values[3::512] = float("inf") if leaf % 2 else float("-inf")
        values[4::512] = float("nan") if leaf == count - 1 else 1.0
        values[5::64] = 2.0**-126 * (1 if leaf % 2 else -1)  # differences fall below the normal range
        values[6::64] = 3e38
        leaves.append(values)
    return leaves


def tree_sum(leaves: list[Any]) -> Any:
    """The canonical sum: pairs by index; a right child beyond the end does not exist."""
    level = [leaf.clone() for leaf in leaves]
    while len(level) > 1:
        level = [level[i].add_(level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def equal_but_nan_payload(a: Any, b: Any) -> bool:
    """Same bits, where any NaN equals any NaN."""
    import torch

    same = a.view(torch.int32) == b.view(torch.int32)
    return bool((same | (a.isnan() & b.isnan())).all())


def _tree(channel: Channel) -> None:
    from gpu import device

    unequal, payload = [], []
    for count in LEAVES:
        leaves = hard_leaves(count, 1 << 16)
        on_cpu, on_device = tree_sum(leaves), tree_sum([leaf.to(device()) for leaf in leaves]).cpu()
        if not equal_but_nan_payload(on_cpu, on_device):
            unequal.append(count)
        if on_cpu.numpy().tobytes() != on_device.numpy().tobytes():
            payload.append(count)
    denormals = int(
        ((tree_sum(hard_leaves(4, 1 << 16)).abs() < 2**-126) & (tree_sum(hard_leaves(4, 1 << 16)) != 0)).sum()
    )
    finding = (
        f"Tree of additions over {LEAVES} leaves, device unlike CPU: {unequal or 'never'}; "
        f"NaN bits differ for {payload or 'none'}; denormal sums checked: {denormals}."
    )
    channel.send({"unequal": unequal, "nan_bits_differ": payload, "denormal_sums": denormals, "finding": finding})
