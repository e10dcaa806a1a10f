"""Where torchrun's agents meet, decided without a clock or a network."""

from __future__ import annotations

import random

import pytest

from everstep.agents.rendezvous.machine import (
    Action,
    Answer,
    Group,
    RoundLimits,
    RoundPhase,
    RoundPlace,
    Said,
    expire,
    over,
    step,
)

LIMITS = RoundLimits(min_nodes=2, max_nodes=4, last_call_s=3.0, lost_after_s=5.0)


class Meeting:
    """A group, and what its nodes have heard last."""

    def __init__(self, limits: RoundLimits = LIMITS) -> None:
        self.group, self.limits, self.now = Group(), limits, 0.0
        self.places: dict[str, RoundPlace] = {}

    def says(self, node: str, action: Action, after_s: float = 0.1, store: str = "") -> Answer:
        self.now += after_s
        place = self.places.get(node, RoundPlace())
        said = Said(node=node, action=action, limits=self.limits, place=place, store=(store, 1 if store else 0))
        self.group, answer = step(self.group, said, self.now)
        if answer.phase is RoundPhase.FORMED:
            self.places[node] = answer.place
        elif action is Action.JOIN:
            self.places.pop(node, None)
        return answer

    def join(self, *nodes: str) -> Answer:
        return [self.says(node, Action.JOIN) for node in nodes][-1]

    def stay(self, *nodes: str, after_s: float = 0.1) -> Answer:
        answers = []
        for node in nodes:
            answers.append(self.says(node, Action.STAY, after_s))
            if answers[-1].place.rank == 0 and not answers[-1].store[0]:
                answers.append(self.says(node, Action.STAY, 0.0, store=f"store of {node}"))
        return answers[-1]


def test_all_that_may_come() -> None:
    m = Meeting()
    assert m.join("a", "b", "c").phase is RoundPhase.WAITING
    assert m.join("d").place == RoundPlace(1, 3, 4)
    assert m.stay("a").place == RoundPlace(1, 0, 4)
    assert m.stay("b").store == ("store of a", 1)


def test_the_least_and_a_last_call() -> None:
    m = Meeting()
    m.join("a", "b")
    assert m.stay("a", after_s=2.0).phase is RoundPhase.WAITING
    assert m.stay("b", after_s=2.0).place == RoundPlace(1, 1, 2)


def test_one_that_comes_later() -> None:
    """The members of the round see that it waits, and join again; while there is no room, the round is undisturbed."""
    m = Meeting(RoundLimits(min_nodes=1, max_nodes=2, last_call_s=0.0, lost_after_s=5.0))
    m.join("a")
    assert m.stay("a").place == RoundPlace(1, 0, 1)
    assert m.join("b").phase is RoundPhase.WAITING
    assert m.stay("a").waiting == 1
    m.join("a")
    assert m.stay("a", "b").place.world_size == 2
    m.join("c")
    assert m.stay("a").waiting == 0


def test_workers_of_one_fail() -> None:
    """It joins again, the others see it, and the next round has a store of its own."""
    m = Meeting()
    m.join("a", "b", "c", "d")
    m.stay("a", "b", "c", "d")
    assert m.join("c").phase is RoundPhase.WAITING
    assert m.stay("a").waiting == 1
    assert m.join("d", "b", "a").phase is RoundPhase.FORMED
    assert m.says("d", Action.STAY).store == ("", 0)
    assert m.stay("c", "d").store == ("store of c", 1)
    assert m.places["a"].round == 2


def test_a_lost_agent() -> None:
    """The others are notified, and meet without it; with fewer than the minimum they wait."""
    m = Meeting()
    m.join("a", "b", "c", "d")
    m.stay("a", "b", "c", "d")
    for _ in range(6):
        answer = m.stay("a", "b", "c", after_s=0.4)
    assert answer.waiting == 1
    m.join("a", "b", "c")
    assert m.stay("b", after_s=3.1).place == RoundPlace(2, 1, 3)


def test_rank_0_is_lost_before_it_opens_the_store() -> None:
    m = Meeting(RoundLimits(min_nodes=2, max_nodes=3, last_call_s=0.0, lost_after_s=5.0))
    m.join("a", "b")
    assert m.says("b", Action.STAY).place.rank == 1
    m.says("b", Action.STAY, after_s=4.0)
    assert m.says("b", Action.STAY, after_s=4.0).phase is RoundPhase.WAITING
    assert m.join("c").phase is RoundPhase.FORMED
    assert m.stay("b").store == ("store of b", 1)


def test_the_end() -> None:
    m = Meeting()
    m.join("a", "b", "c", "d")
    m.stay("a")
    m.says("a", Action.CLOSE)
    assert m.stay("b").phase is RoundPhase.CLOSED
    assert m.join("b").phase is RoundPhase.CLOSED
    assert not over(m.group)
    m.says("b", Action.LEAVE)
    assert over(expire(m.group, m.now + 5.1))


def test_a_coordinator_that_has_just_started_learns_the_round() -> None:
    m = Meeting()
    m.join("a", "b", "c", "d")
    m.stay("a", "b", "c", "d")
    m.group = Group()
    said = Said(node="a", action=Action.STAY, limits=LIMITS, place=RoundPlace(1, 0, 4), store=("store of a", 1))
    m.group, answer = step(m.group, said, m.now)
    assert (answer.place, answer.waiting) == (RoundPlace(1, 0, 4), 0)
    m.stay("c")
    m.stay("b", after_s=2.0)
    m.stay("a", "c")
    assert m.stay("b", after_s=3.5).waiting == 1, "d is lost"
    m.join("a", "b", "c", "e")
    assert m.places["e"].round == 2


@pytest.mark.parametrize("limits", [RoundLimits(min_nodes=1, max_nodes=4, last_call_s=3.0, lost_after_s=5.0)])
def test_other_limits_are_refused(limits: RoundLimits) -> None:
    m = Meeting()
    m.join("a")
    m.limits = limits
    answer = m.join("b")
    assert answer.phase is RoundPhase.REFUSED
    assert answer.why == "the others have nnodes 2:4, this node 1:4"


@pytest.mark.parametrize("seed", range(30))
def test_any_order(seed: int) -> None:
    """Ranks are 0..n-1, each once; an agent that keeps joining and staying is in a round in the end."""
    rng, m = random.Random(seed), Meeting()
    nodes = [f"n{i}" for i in range(6)]
    for _ in range(300):
        node = rng.choice(nodes)
        action = rng.choice((Action.JOIN, Action.STAY, Action.STAY, Action.STAY, Action.LEAVE))
        m.says(node, action, rng.choice((0.01, 0.3, 2.0)), store=node if rng.random() < 0.5 else "")
        ranks = sorted(m.group.members.values())
        assert len(set(ranks)) == len(ranks) <= LIMITS.max_nodes
        assert not set(m.group.members) & set(m.group.waiting)
    live = nodes[:4]
    for _ in range(60):
        for node in live:
            if m.stay(node, after_s=0.1).waiting or node not in m.group.members:
                m.join(node)
    assert sorted(m.group.members[node] for node in live) == [0, 1, 2, 3]
