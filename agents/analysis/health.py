"""Whether a node is fit to join: judges its self-test's figures; all thresholds are here.

The thresholds find broken machines, not slow ones: a node refused by mistake costs more than a node that turns out to
be a straggler. A node that differs from the others is reported, but not refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .verdicts import low_median

Figures = Mapping[str, float]
"""What was measured, by name, in base units; a figure that could not be measured is not in it."""

ODD_RATIO = 0.5  # of what the others have in the middle
ODD_CLOCK_S = 1.0
_RATES = {  # figure -> what it is called, unit, how many base units that is
    "product_flops": ("computes", "GFLOP/s", 1e9),
    "copy_bytes_per_s": ("copies memory", "GB/s", 1e9),
    "loopback_bytes_per_s": ("moves bytes through its own sockets", "GB/s", 1e9),
    "interface_bits_per_s": ("has a network interface", "Gbit/s", 1e9),
}


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """The least, and the most, that a node may show."""

    product_flops: float = 5e7
    copy_bytes_per_s: float = 5e7
    loopback_bytes_per_s: float = 5e6
    memory_bytes: float = 64 << 20
    disk_bytes: float = 32 << 20
    clock_s: float = 120.0  # that its clock may differ from the coordinator's: certificates and logs are dated


def judge(figures: Figures, fitness: Fitness | None = None) -> list[str]:
    """Why a node should not join, each with its evidence; nothing if it is fit."""
    least = fitness or Fitness()
    return [*_wrong(figures), *_slow(figures, least), *_short(figures, least), *_clock(figures, least)]


def _wrong(figures: Figures) -> list[str]:
    found = []
    for name, what in (
        ("product", "matrix products"),
        ("copy", "copies of memory"),
        ("gpu", "matrix products on GPUs"),
    ):
        if wrong := figures.get(f"{name}_wrong", 0):
            of = f" of {figures[f'{name}_runs']:.0f}" if f"{name}_runs" in figures else ""
            found.append(f"{wrong:.0f}{of} {what} came out wrong: its processor or memory is damaged")
    return found


def _slow(figures: Figures, least: Fitness) -> list[str]:
    found = []
    for name in ("product_flops", "copy_bytes_per_s", "loopback_bytes_per_s"):
        what, unit, scale = _RATES[name]
        if name in figures and figures[name] < getattr(least, name):
            needed = getattr(least, name) / scale
            found.append(f"it {what} at {figures[name] / scale:.3g} {unit}, which is less than {needed:.3g}")
    return found


def _short(figures: Figures, least: Fitness) -> list[str]:
    places = {
        "memory_available_bytes": ("memory", least.memory_bytes),
        "work_free_bytes": ("disk in its working folder", least.disk_bytes),
        "temporary_free_bytes": ("disk in its temporary folder", least.disk_bytes),
    }
    return [
        f"there are {figures[name] / (1 << 20):.0f} MiB of {what} left, which is less than {needed / (1 << 20):.0f}"
        for name, (what, needed) in places.items()
        if name in figures and figures[name] < needed
    ]


def _clock(figures: Figures, least: Fitness) -> list[str]:
    ahead_s = figures.get("clock_ahead_s", 0.0)
    if abs(ahead_s) <= least.clock_s:
        return []
    side = "ahead of" if ahead_s > 0 else "behind"
    return [f"its clock is {abs(ahead_s):.0f} s {side} the coordinator's: set both by NTP"]


def odd(nodes: Mapping[str, Figures]) -> dict[str, list[str]]:
    """Which nodes are unlike the others, and in what; where there are three at least that measured the same."""
    found: dict[str, list[str]] = {}
    for name, (what, unit, scale) in _RATES.items():
        values = {node: figures[name] for node, figures in nodes.items() if figures.get(name)}
        if len(values) < 3:
            continue
        middle = low_median(list(values.values()))
        for node, value in values.items():
            if value < ODD_RATIO * middle:
                said = f"{what} at {value / scale:.3g} {unit}, others {middle / scale:.3g}"
                found.setdefault(node, []).append(said)
    clocks = {node: figures["clock_ahead_s"] for node, figures in nodes.items() if "clock_ahead_s" in figures}
    if len(clocks) >= 3:
        middle = low_median(list(clocks.values()))
        for node, ahead_s in clocks.items():
            if abs(ahead_s - middle) > ODD_CLOCK_S:
                found.setdefault(node, []).append(f"its clock differs by {ahead_s - middle:+.1f} s from the others'")
    return found
