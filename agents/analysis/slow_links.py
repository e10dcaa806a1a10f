"""Finds slow links by the time per received byte, from a message's first byte to its last.

The wait for the first byte shows only that the peer was late, not that the link is slow. The links of a pair of hosts
are pooled, and compared with the faster pairs of their kind (between hosts, within a host); if there are too few to
compare, with their own past. A link is judged only while it takes a relevant share of the time and while neither end
is a straggler: otherwise the bytes are late because the sending or receiving process is.

A host is blamed if all judged links to it, or from it, are slow, while the hosts at their other ends have links that
are not. With two hosts this cannot be decided, and no host is blamed. A link with high latency but full bandwidth shows
only in waits, which every rank has, and is not found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .verdicts import Finding, Hysteresis, SlowLimits

LIMITS = SlowLimits(slow=3.0, level=2.0, patience=4, patience_s=3.0)  # messages of telemetry
WINDOWS = 6  # messages of telemetry that count
LEAST_BYTES = 16 << 10  # in one of them, to count
LEAST_SHARE = 0.1  # of the time that passes, to matter
LINKS_KEPT = 10_000
FORGET_S = 120.0


class Pair(NamedTuple):
    """From one node to another, or within one."""

    source: str
    target: str


class _Window(NamedTuple):
    received_bytes: int
    receive_s: float
    elapsed_s: float


@dataclass
class _Link:
    """Recent traffic received over one link: the windows and their sums."""

    heard_s: float = 0.0
    windows: deque[_Window] = field(default_factory=deque)
    received_bytes: int = 0
    receive_s: float = 0.0
    share: float = 0.0  # of the time
    new: int = 0

    def add(self, window: _Window) -> None:
        self.windows.append(window)
        if len(self.windows) > WINDOWS:
            self.windows.popleft()
        self.received_bytes = sum(window.received_bytes for window in self.windows)
        self.receive_s = sum(window.receive_s for window in self.windows)
        self.share = self.receive_s / sum(window.elapsed_s for window in self.windows)
        self.new += 1

    def clear(self) -> None:
        self.windows.clear()
        self.new = 0


@dataclass
class _Group:
    """The links of a pair of nodes, as one."""

    rank: int = -1  # the receiver of the most expensive link
    peer: int = -1
    share: float = 0.0  # of the time, likewise
    receive_s: float = 0.0
    received_bytes: int = 0
    new: int = 0
    full: bool = False
    ratio: float = 0.0
    with_s: float = 0.0
    against: str = ""

    @property
    def byte_s(self) -> float:
        return self.receive_s / max(1, self.received_bytes)


class SlowLinks:
    """`add` takes the agents' measurements of links; `compare` judges them. Bounded by LINKS_KEPT."""

    def __init__(self) -> None:
        self.findings: dict[tuple[str, ...], Finding] = {}
        self._links: dict[tuple[int, int], _Link] = {}
        self._past_s: dict[Pair, float] = {}  # of a byte, the best so far
        self._hysteresis = Hysteresis(LIMITS)
        self._blamed: dict[Pair, tuple[str, ...]] = {}  # slow pair -> nodes that it blames
        self._windows: dict[Pair, int] = {}  # for how many messages it has been slow
        self._layout: object = None

    def add(self, rank: int, peer: int, received_bytes: int, receive_s: float, elapsed_s: float, now_s: float) -> None:
        """Add the bytes that a rank received from a peer since its last report."""
        if received_bytes < LEAST_BYTES or elapsed_s <= 0 or peer < 0:
            return
        link = self._links.get((rank, peer))
        if link is None:
            if len(self._links) >= LINKS_KEPT:
                return  # keep the known links: each needs some messages to be judged
            link = self._links[rank, peer] = _Link()
        link.add(_Window(received_bytes, receive_s, elapsed_s))
        link.heard_s = now_s

    def compare(self, node_of: Mapping[int, str], disturbed: Collection[int], layout: object, now_s: float) -> None:
        """Compare all pairs. `disturbed`: ranks that are slow themselves; a new `layout` resets all measurements."""
        if layout != self._layout:
            self._layout = layout
            self._links.clear()
            self._past_s.clear()
        groups = self._groups(node_of, disturbed, now_s)
        for within in (False, True):
            self._rate({pair: group for pair, group in groups.items() if (pair.source == pair.target) is within})
        judged = {pair: group for pair, group in groups.items() if group.ratio}
        nodes = set(node_of.values())
        self._hysteresis.keep({*judged, *(pair for pair in self._blamed if nodes >= set(pair))})
        for pair, group in judged.items():
            least = LEAST_SHARE / 2 if pair in self._hysteresis.slow else LEAST_SHARE
            ratio = group.ratio if group.share >= least else 0.0
            if group.new:
                self._windows[pair] = self._windows.get(pair, 0) + group.new if ratio > LIMITS.level else 0
                self._hysteresis.see(pair, ratio, now_s, group.new)
        self._find(judged, now_s)

    def _groups(self, node_of: Mapping[int, str], disturbed: Collection[int], now_s: float) -> dict[Pair, _Group]:
        groups: dict[Pair, _Group] = {}
        for (rank, peer), link in list(self._links.items()):
            if now_s - link.heard_s > FORGET_S or rank not in node_of or peer not in node_of:
                del self._links[rank, peer]
                continue
            if rank in disturbed or peer in disturbed:
                link.clear()
                continue
            if not link.windows:
                continue
            group = groups.setdefault(Pair(node_of[peer], node_of[rank]), _Group())
            if link.share >= group.share:
                group.rank, group.peer, group.share = rank, peer, link.share
            group.receive_s += link.receive_s
            group.received_bytes += link.received_bytes
            group.new = max(group.new, link.new)
            group.full |= len(link.windows) == WINDOWS
            link.new = 0
        return groups

    def _rate(self, groups: Mapping[Pair, _Group]) -> None:
        """Give each its ratio: to the better quarter of the others, or, where there is one at most, to its past."""
        ranked = sorted(group.byte_s for group in groups.values())
        for pair, group in groups.items():
            past_s = self._past_s.get(pair, 0.0)
            if len(groups) > 2:
                quarter = (len(ranked) - 2) // 4
                with_s = ranked[quarter + (group.byte_s <= ranked[quarter])]
                against = "others"
            elif past_s:
                with_s, against = past_s, "past"
            else:
                with_s, against = 0.0, ""
            if group.full:
                self._past_s[pair] = min(past_s or group.byte_s, group.byte_s)
            if with_s > 0:
                group.ratio, group.with_s, group.against = group.byte_s / with_s, with_s, against

    def _find(self, judged: Mapping[Pair, _Group], now_s: float) -> None:
        slow = {pair for pair in judged if pair in self._hysteresis.slow} | {
            pair for pair in self._blamed if pair in self._hysteresis.slow
        }
        for pair in slow & judged.keys():
            if self._blamed.get(pair, ("between",))[0] == "between":  # it may be clear by now
                self._blamed[pair] = _blame(pair, judged)
        for pair in [pair for pair in self._blamed if pair not in slow]:
            del self._blamed[pair]
        self._windows = {pair: count for pair, count in self._windows.items() if pair in judged or pair in slow}
        worst: dict[tuple[str, ...], Pair] = {}
        for pair, whom in self._blamed.items():
            if pair in judged and (whom not in worst or judged[pair].ratio > judged[worst[whom]].ratio):
                worst[whom] = pair
        kept = {whom: finding for whom, finding in self.findings.items() if whom in self._blamed.values()}
        for whom, pair in worst.items():
            since_s = kept[whom].since_s if whom in kept else now_s
            count = sum(one == whom for one in self._blamed.values())
            kept[whom] = _finding(pair, judged[pair], whom, count, self._windows.get(pair, 0), since_s)
        self.findings = kept


def _blame(pair: Pair, judged: Mapping[Pair, _Group]) -> tuple[str, ...]:
    """("out", node) or ("in", node) where it is clear which end it is, else the pair."""
    if pair.source == pair.target:
        return ("within", pair.source)

    def slow(matches: Callable[[Pair], bool]) -> tuple[int, int]:
        found = [group.ratio > LIMITS.level for other, group in judged.items() if other != pair and matches(other)]
        return sum(found), len(found)

    out_slow, outs = slow(lambda other: other.source == pair.source and other.target != pair.source)
    in_slow, ins = slow(lambda other: other.target == pair.target and other.source != pair.target)
    if outs and ins and out_slow == outs and in_slow < ins:
        return ("out", pair.source)
    if outs and ins and in_slow == ins and out_slow < outs:
        return ("in", pair.target)
    return ("between", *pair)


def _finding(pair: Pair, group: _Group, whom: tuple[str, ...], count: int, windows: int, since_s: float) -> Finding:
    side, node = whom[0], whom[-1]  # of a pair, the receiver
    sender = side == "out"
    rate, with_rate = 1e-6 / group.byte_s, 1e-6 / group.with_s
    place = {
        "out": f"what node {node} sends",
        "in": f"what node {node} receives",
        "within": f"between the ranks of node {node}",
        "between": f"from node {pair.source} to node {pair.target}",
    }[side]
    with_what = "the better ones of the other links have" if group.against == "others" else "it had before"
    evidence = (
        f"{place} comes at {rate:.4g} MB/s, {with_what} {with_rate:.4g} MB/s ({group.ratio:.1f} times); "
        f"rank {group.rank} receives from rank {group.peer} for {100 * group.share:.0f}% of the time, "
        f"in {windows} messages of telemetry in a row"
    )
    fields = {
        "side": {"out": "sender", "in": "receiver"}.get(side, side),
        "bytes_per_s": round(1e6 * rate),
        "compared_bytes_per_s": round(1e6 * with_rate),
        "against": group.against,
        "share": round(group.share, 3),
        "links": count,
        "windows": windows,
    }
    return Finding(
        what="link",
        rank=group.peer if sender else group.rank,
        peer=group.rank if sender else group.peer,
        node=node,
        factor=group.ratio,
        evidence=evidence,
        fields=fields,
        since_s=since_s,
        blamed=side != "between",
    )
