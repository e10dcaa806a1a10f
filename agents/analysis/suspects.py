"""The search for slow ranks and links in a running job: takes telemetry and reports each finding's start and end once.

The reports are events for the coordinator's machine, which logs and counts them (`elastic/protocol/troubles.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.events import SpeedsMeasured, StragglerFound, StragglerGone
from everstep.elastic.protocol.rebalancing import differ
from everstep.elastic.protocol.state import State

from .slow_links import SlowLinks
from .stragglers import LIMITS, Stragglers
from .verdicts import Finding

AGAIN_S = 300.0  # a finding that lasts this long is reported and counted again
NEWS_KEPT = 256
SLOWER, LEVEL = 1.2, 1.1  # times its stage's compute time: from where on a rank counts as slower, and as level again
SLOW_STEPS = 2  # for which a rank has to be slower, by the median of a window, until it is reported

Key = tuple[object, ...]


class Suspects:
    """Not thread-safe: the observer's lock guards it. Bounded by the world size and LINKS_KEPT."""

    def __init__(self) -> None:
        self.stragglers = Stragglers()
        self.links = SlowLinks()
        self._told: dict[Key, tuple[Finding, float]] = {}  # and when it was last reported
        self._by_past: set[int] = set()  # ranks alone in their stage whose speed was found by their own past there
        self._news: deque[StragglerFound | StragglerGone | SpeedsMeasured] = deque(maxlen=NEWS_KEPT)

    def take(self, telemetry: pb.Telemetry, elapsed_s: float, now_s: float) -> None:
        """Take an agent's report; `elapsed_s`: time since its last report by its own clock, 0 for the first."""
        for step in telemetry.steps:
            self.stragglers.add(
                step.rank, step.compute_s, step.micro_batches, wait_s=step.wait_s, generation=step.generation
            )
        for link in telemetry.links:
            self.links.add(link.rank, link.peer, link.received_bytes, link.receive_s, elapsed_s, now_s)

    def compare(self, state: State, now_s: float) -> None:
        """Judge all ranks and links, and note new findings."""
        layout = state.layout
        if layout is None:
            return
        places = [((stage.start, stage.stop), stage.ranks) for stage in layout.stages]
        self.stragglers.compare(places, now_s)
        ratios = self.stragglers.ratios
        disturbed = self.stragglers.slow | {rank for rank, ratio in ratios.items() if ratio > LIMITS.slow}
        nodes = {rank: worker.node for rank, worker in state.workers.items()}
        self.links.compare(nodes, disturbed, places, now_s)
        self._note(state, now_s)
        if (measured := self._measured(state.speeds)) is not None:
            self._news.append(measured)

    def findings(self) -> list[Finding]:
        """The current findings. Only links name nodes: the coordinator's state has the node of a rank."""
        return [*self.stragglers.findings.values(), *self.links.findings.values()]

    def poll(self) -> StragglerFound | StragglerGone | SpeedsMeasured | None:
        """The next report."""
        return self._news.popleft() if self._news else None

    def _measured(self, known: Mapping[int, float]) -> SpeedsMeasured | None:
        """The speeds of the ranks that are slower than their stage, if they differ from those that are known.

        A rank that cannot be compared keeps its speed. That includes one that is alone in its stage and was known to be
        slow before: its own past there is as slow.
        """
        speeds = dict(known)
        self._by_past &= self.stragglers.alone
        for rank, ratio in self.stragglers.ratios.items():
            if rank in self.stragglers.alone and rank in known and rank not in self._by_past:
                continue
            if ratio >= SLOWER and (rank in known or self.stragglers.slow_steps(rank) >= SLOW_STEPS):
                speeds[rank] = 1 / ratio
                if rank in self.stragglers.alone:
                    self._by_past.add(rank)
            elif ratio <= LEVEL:
                speeds.pop(rank, None)
        return SpeedsMeasured(speeds) if differ(speeds, known) else None

    def _present(self, nodes: Mapping[int, str]) -> dict[Key, Finding]:
        found: dict[Key, Finding] = {("link", *whom): finding for whom, finding in self.links.findings.items()}
        for rank, finding in self.stragglers.findings.items():
            found["compute", rank] = Finding(**{**vars(finding), "node": nodes.get(rank, "")})
        return found

    def _note(self, state: State, now_s: float) -> None:
        present = self._present({rank: worker.node for rank, worker in state.workers.items()})
        for key, finding in present.items():
            said_s = self._told[key][1] if key in self._told else None
            if said_s is None or now_s - said_s >= AGAIN_S:
                fields: dict[str, Any] = {**finding.fields, "for_s": round(now_s - finding.since_s, 1)}
                self._news.append(
                    StragglerFound(
                        finding.node,
                        finding.rank,
                        finding.what,
                        finding.factor,
                        finding.evidence,
                        peer=finding.peer,
                        fields=fields,
                        again=said_s is not None,
                        blamed=finding.blamed,
                    )
                )
                said_s = now_s
            self._told[key] = (finding, said_s)
        for key in [key for key in self._told if key not in present]:
            finding, _ = self._told.pop(key)
            self._news.append(self._gone(finding, now_s))

    def _gone(self, finding: Finding, now_s: float) -> StragglerGone:
        ratio = self.stragglers.ratios.get(finding.rank) if finding.what == "compute" else None
        why = f"{ratio:.2f} times what it is compared with" if ratio else "level again, or not to be compared any more"
        evidence = f"{why}, after {now_s - finding.since_s:.0f} s"
        return StragglerGone(finding.node, finding.rank, finding.what, evidence, peer=finding.peer)
