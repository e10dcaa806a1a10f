"""Which ranks are slow themselves and which only wait, from synthetic series; compute and links."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.agents.analysis.slow_links import LIMITS as LINK_LIMITS
from everstep.agents.analysis.slow_links import LINKS_KEPT, WINDOWS, SlowLinks
from everstep.agents.analysis.stragglers import (
    LIMITS,
    WARM_UP_STEPS,
    WINDOW_STEPS,
    Stragglers,
)

SLOW_WITHIN = WINDOW_STEPS // 2 + LIMITS.patience + 2  # steps until a slow rank is reported, and until it is cleared

Stage = tuple[tuple[int, int], Sequence[int]]


class Job:
    """Steps of a synthetic job: `cost(rank, step)` is the compute time of a micro-batch."""

    def __init__(self, *stages: Stage, looks_every: int = 1) -> None:
        self.stages, self.stragglers = list(stages), Stragglers()
        self.step, self.generation, self.looks_every = 0, 1, looks_every

    def train(self, steps: int, cost: Callable[[int, int], float]) -> set[int]:
        for _ in range(steps):
            ranks = [rank for _, stage in self.stages for rank in stage]
            longest = max(cost(rank, self.step) for rank in ranks)
            for rank in ranks:
                own = cost(rank, self.step)
                wait_s = 4 * (longest - own)
                self.stragglers.add(rank, 4 * own, 4, wait_s=wait_s, generation=self.generation)
            self.step += 1
            if self.step % self.looks_every == 0:
                self.stragglers.compare(self.stages, float(self.step))
        return self.stragglers.slow


def flat(slow: dict[int, float] | None = None, base: float = 0.1) -> Callable[[int, int], float]:
    return lambda rank, step: base * (slow or {}).get(rank, 1.0)


def noisy(slow: dict[int, float] | None = None, seed: int = 0) -> Callable[[int, int], float]:
    def cost(rank: int, step: int) -> float:
        return 0.1 * (slow or {}).get(rank, 1.0) * random.Random(f"{seed} {rank} {step}").uniform(0.9, 1.15)

    return cost


# ---------------------------------------------------------------- compute


@pytest.mark.parametrize("looks_every", [1, 3, 20])
def test_one_of_a_stage_is_slow_and_the_others_wait(looks_every: int) -> None:
    job = Job(((0, 2), (0, 1, 2)), ((2, 4), (3, 4, 5)), looks_every=looks_every)
    assert not job.train(30, noisy())
    assert job.train(SLOW_WITHIN + 2 * looks_every, noisy({1: 3.0})) == {1}
    finding = job.stragglers.findings[1]
    assert finding.factor == pytest.approx(3.0, rel=0.3)
    assert finding.fields["against"] == "stage"
    assert finding.fields["micro_batch_s"] == pytest.approx(0.3, rel=0.2)
    assert finding.fields["compared_s"] == pytest.approx(0.1, rel=0.2)
    assert finding.fields["steps"] >= LIMITS.patience
    assert finding.fields["wait_s"] < finding.fields["others_wait_s"]
    assert finding.fields["held_up_s"] == pytest.approx(0.8, rel=0.3)
    assert "the 2 others of its stage" in finding.evidence
    assert not job.train(SLOW_WITHIN + 2 * looks_every, noisy())


def test_stages_of_different_cost_are_not_compared() -> None:
    job = Job(((0, 1), (0, 1)), ((1, 8), (2, 3)))
    assert not job.train(60, flat({2: 7.0, 3: 7.0}))
    assert job.train(SLOW_WITHIN, flat({2: 7.0, 3: 14.0})) == {3}


def test_alone_in_its_stage_a_rank_is_compared_with_its_past() -> None:
    job = Job(((0, 1), (0,)), ((1, 8), (1,)), ((8, 9), (2,)))
    assert not job.train(40, flat({1: 7.0}))
    assert job.train(SLOW_WITHIN, flat({1: 7.0, 2: 2.5})) == {2}
    assert job.stragglers.findings[2].fields["against"] == "past"
    assert job.stragglers.findings[2].factor == pytest.approx(2.5)
    assert not job.train(SLOW_WITHIN, flat({1: 7.0}))


def test_when_all_become_slower_it_is_the_work() -> None:
    job = Job(((0, 1), (0,)), ((1, 2), (1,)), ((2, 3), (2,)))
    job.train(30, flat())
    assert not job.train(60, flat(base=0.3)), "longer sequences, say"
    assert job.train(SLOW_WITHIN, flat({0: 2.0}, base=0.3)) == {0}


def test_a_job_of_one_rank_has_no_straggler() -> None:
    job = Job(((0, 4), (0,)))
    job.train(30, flat())
    assert not job.train(60, flat(base=0.5))
    assert job.stragglers.ratios == {}


def test_pauses_do_not_count() -> None:
    """Three steps in a row take ten times as long, repeatedly."""
    job = Job(((0, 4), (0, 1, 2)))
    for _ in range(10):
        assert not job.train(9, flat())
        assert not job.train(3, flat({1: 10.0}))


def test_nor_do_the_first_steps_of_a_generation() -> None:
    job = Job(((0, 4), (0, 1, 2)))
    for _ in range(20):
        assert not job.train(WARM_UP_STEPS, flat({1: 10.0}))
        assert not job.train(3, flat())
        job.generation += 1


def test_nor_does_a_moment_in_which_steps_are_short() -> None:
    """A hundred slow steps of ten milliseconds are one second of a machine that was busy."""
    stragglers = Stragglers()
    slow: list[set[int]] = []
    for step in range(600):
        for rank in range(3):
            stragglers.add(rank, 3.0 if rank == 1 and 100 <= step % 300 < 200 else 1.0, 1)
        stragglers.compare([("all", range(3))], step / 100)
        slow.append(stragglers.slow)
    assert not any(slow)


def test_between_the_thresholds_it_stays_what_it_is() -> None:
    job = Job(((0, 4), (0, 1, 2)))
    between = (LIMITS.slow + LIMITS.level) / 2
    assert not job.train(100, flat({1: between}))
    assert job.train(SLOW_WITHIN, flat({1: 2.0})) == {1}
    since_s = job.stragglers.findings[1].since_s
    assert job.train(100, flat({1: between})) == {1}
    assert job.stragglers.findings[1].since_s == since_s


def test_a_changed_layout() -> None:
    """More layers than before are no slowness; a slow rank stays slow in its new place until it is measured there."""
    job = Job(((0, 2), (0,)), ((2, 4), (1, 2)))
    job.train(30, flat())
    assert job.train(SLOW_WITHIN, flat({2: 2.0})) == {2}
    job.stages, job.generation = [((0, 1), (0,)), ((1, 4), (1, 2))], 2
    costs = {0: 0.5, 1: 1.5, 2: 3.0}
    assert job.train(2, flat(costs)) == {2}
    assert job.train(60, flat(costs)) == {2}
    job.stages, job.generation = [((0, 3), (0,)), ((3, 4), (1,))], 3
    assert not job.train(60, flat({0: 3.0})), "rank 2 is gone, rank 0 has other work"
    assert set(job.stragglers.per_micro_batch_s) == {0, 1}


@settings(max_examples=40, deadline=None)
@given(
    stages=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    factor=st.floats(1.9, 8.0),
    seed=st.integers(0, 1000),
    looks_every=st.integers(1, 10),
    data=st.data(),
)
def test_whoever_is_slow_is_found_and_nobody_else(stages, factor, seed, looks_every, data) -> None:
    """Any layout, any rank, noise of a quarter: reported while it lasts, and not before or after."""
    first, layout = 0, []
    for number, count in enumerate(stages):
        layout.append(((number, number + 1), range(first, first + count)))
        first += count
    victim = data.draw(st.integers(0, first - 1))
    job = Job(*layout, looks_every=looks_every)
    costs = {rank: 1.0 + number for number, (_, ranks) in enumerate(layout) for rank in ranks}
    sick = {**costs, victim: costs[victim] * factor}
    bound = SLOW_WITHIN + 2 * looks_every + 4
    assert not job.train(40, noisy(costs, seed))
    assert job.train(bound, noisy(sick, seed)) == {victim}
    assert not job.train(bound, noisy(costs, seed))


# ---------------------------------------------------------------- links


class Wires:
    """Telemetry of links between hosts of one rank each: `rate(sender, receiver)` in bytes a second."""

    def __init__(self, hosts: int, ranks_per_host: int = 1) -> None:
        self.links, self.now = SlowLinks(), 0.0
        self.nodes = {rank: f"n{rank // ranks_per_host}" for rank in range(hosts * ranks_per_host)}
        self.layout: object = "one"

    def run(
        self,
        seconds: int,
        rate: Callable[[int, int], float] = lambda sender, receiver: 1e8,
        *,
        moved: int = 20_000_000,
        disturbed: Sequence[int] = (),
    ) -> set[tuple[str, ...]]:
        for _ in range(seconds):
            self.now += 1.0
            for receiver in self.nodes:
                for sender in self.nodes:
                    if sender != receiver:
                        took_s = moved / rate(sender, receiver)
                        self.links.add(receiver, sender, moved, took_s, max(1.0, took_s), self.now)
            self.links.compare(self.nodes, disturbed, self.layout, self.now)
        return set(self.links.findings)


WITHIN = WINDOWS + LINK_LIMITS.patience + 2


@pytest.mark.parametrize("hosts", [3, 4, 6])
@pytest.mark.parametrize(("side", "blamed"), [("out", "sender"), ("in", "receiver")])
def test_the_end_that_is_slow_is_named(hosts: int, side: str, blamed: str) -> None:
    def rate(sender: int, receiver: int) -> float:
        return 1e7 if (sender if side == "out" else receiver) == 1 else 1e8

    wires = Wires(hosts)
    assert not wires.run(20)
    assert wires.run(WITHIN, rate) == {(side, "n1")}
    (finding,) = wires.links.findings.values()
    assert (finding.rank, finding.node, finding.what, finding.blamed) == (1, "n1", "link", True)
    assert finding.fields["side"] == blamed
    assert finding.fields["links"] == hosts - 1
    assert finding.fields["bytes_per_s"] == pytest.approx(1e7, rel=0.3)
    assert finding.fields["compared_bytes_per_s"] == pytest.approx(1e8, rel=0.1)
    assert not wires.run(WITHIN)


def test_a_host_whose_card_is_slow_both_ways() -> None:
    wires = Wires(3)
    wires.run(10)
    assert wires.run(WITHIN, lambda *ends: 1e7 if 2 in ends else 1e8) == {("out", "n2"), ("in", "n2")}


def test_a_single_path_blames_nobody() -> None:
    wires = Wires(4)
    found = wires.run(WITHIN, lambda sender, receiver: 1e7 if (sender, receiver) == (0, 3) else 1e8)
    assert found == {("between", "n0", "n3")}
    (finding,) = wires.links.findings.values()
    assert (finding.rank, finding.peer, finding.blamed) == (3, 0, False)


def test_when_it_becomes_clear_which_end_it_is_that_is_said() -> None:
    """First one link is slow, then all links of its sender."""
    wires = Wires(4)
    wires.run(10)
    assert wires.run(WITHIN, lambda *ends: 1e7 if ends == (2, 0) else 1e8) == {("between", "n2", "n0")}
    (finding,) = wires.links.findings.values()
    assert (finding.node, finding.rank) == ("n0", 0)
    assert wires.run(WITHIN, lambda sender, receiver: 1e7 if sender == 2 else 1e8) == {("out", "n2")}


def test_two_hosts_are_compared_with_their_past() -> None:
    wires = Wires(2)
    assert not wires.run(20)
    found = wires.run(WITHIN, lambda *ends: 1e7)
    assert found == {("between", "n0", "n1"), ("between", "n1", "n0")}
    assert {finding.fields["against"] for finding in wires.links.findings.values()} == {"past"}
    assert not wires.run(WITHIN)


def test_links_within_a_host_are_not_compared_with_those_between_hosts() -> None:
    def rate(sender: int, receiver: int) -> float:
        return 1e10 if sender // 2 == receiver // 2 else 1e8

    assert not Wires(3, ranks_per_host=2).run(30, rate)


def test_what_costs_no_time_is_not_slow() -> None:
    assert not Wires(4).run(30, lambda sender, receiver: 1e6 if sender == 1 else 1e9, moved=50_000)


def test_ends_that_are_slow_themselves_explain_their_links() -> None:
    wires = Wires(4)
    wires.run(10)
    assert not wires.run(30, lambda *ends: 1e7 if 1 in ends else 1e8, disturbed=[1])


def test_one_burst_is_not_enough_and_another_layout_begins_anew() -> None:
    wires = Wires(4)
    wires.run(10)
    for _ in range(5):
        assert not wires.run(1, lambda sender, receiver: 2e7 if sender == 1 else 1e8)
        assert not wires.run(9)
    wires = Wires(2)
    wires.run(10)
    wires.layout = "two"
    assert not wires.run(30, lambda *ends: 2e7), "other messages"


def test_links_are_bounded() -> None:
    links = SlowLinks()
    for peer in range(LINKS_KEPT + 10):
        links.add(0, peer, 1 << 20, 0.1, 1.0, 1.0)
    assert len(links._links) == LINKS_KEPT
    links.compare({0: "a"}, (), "", 2.0)
    assert not links._links
