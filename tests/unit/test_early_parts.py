"""Partial sums that are posted during the last backward: the bytes of the plain form, whatever arrives in which order.

Ranks are threads, with the pipeline and the exchange of a job; parts of any size are posted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.elastic.contract.progress import Progress
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.step import early_parts
from everstep.elastic.step.canonical import TreeSum
from everstep.elastic.step.early_parts import EarlyParts
from everstep.elastic.step.exchange import Exchange
from everstep.elastic.step.order import StepSize
from everstep.elastic.step.pipeline import Pipeline
from everstep.elastic.step.steps import StepState
from everstep.elastic.step.stream_states import StreamStates
from everstep.resharding.planners import initial_layout
from everstep.resharding.work import Leg
from tests.ranks import at_once

MICRO_BATCHES = 7


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(early_parts, "LEAST_BYTES", 600)  # some parts wait for others, and the last for the end


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("leaves", range(1, 12))
def test_sums_with_a_leaf_are_what_they_are_once_it_is_added(leaves):
    rng = random.Random(leaves)
    generator = torch.Generator().manual_seed(leaves)
    for _ in range(10):
        order = rng.sample(range(leaves), rng.randint(1, leaves))
        tree = TreeSum(leaves)
        for micro_batch in order:
            gradients = [torch.randn(9, generator=generator), torch.randn(40, generator=generator)]
            before = {node: [t.clone() for t in tensors] for node, tensors in tree.nodes.items()}
            found = tree.with_leaf(micro_batch, gradients[1][5:30], 1, 5, 30)
            assert before.keys() == tree.nodes.keys()
            assert all(
                torch.equal(a, b) for node in before for a, b in zip(before[node], tree.nodes[node], strict=True)
            )
            found = {node: part.clone() for node, part in found.items()}
            tree.add(micro_batch, gradients)
            assert found.keys() == tree.nodes.keys()
            assert all(torch.equal(bits(part), bits(tree.nodes[node][1][5:30])) for node, part in found.items())


class Shuffled(MemoryCommunicator):
    """Partial sums of this rank arrive in a random order, once it waits for others'."""

    shuffle: random.Random | None = None

    def __init__(self, rank: int, network: MemoryNetwork) -> None:
        super().__init__(rank, 0, network=network)
        self.posted: list[Key] = []
        self._held: list[tuple[int, Key, list[Tensor]]] = []

    def post(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        self.posted.append(key)
        super().post(to, key, payload)

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        if self.shuffle is None or key.kind is not Kind.PARTIAL:
            super().send(to, key, payload)
        else:
            self._held.append((to, key, [tensor.clone() for tensor in payload]))

    def receive_any(self, wanted: Any) -> Any:
        if self.shuffle is not None:
            self.shuffle.shuffle(self._held)
        while self._held:
            super().send(*self._held.pop())
        return super().receive_any(wanted)


class Odd(nn.Module):
    """A parameter without a gradient, one that is no matrix, and one with another memory order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.unused = nn.Parameter(torch.ones(40, 8))
        self.scale = nn.Parameter(torch.ones(()))
        self.turned = nn.Parameter(torch.randn(24, 24).t())

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.linear(inputs) * self.scale) @ self.turned


class Rank:
    """One rank; `early`: it posts."""

    def __init__(self, rank: int, network: MemoryNetwork, dtype: torch.dtype, *, early: bool) -> None:
        torch.manual_seed(0)
        self.stack = LayerStack(nn.Sequential(Odd(), Odd(), Odd()).to(dtype), cut=True)
        self.comm = Shuffled(rank, network)
        self.layout: Any = None
        self.early = EarlyParts(self.stack, self.comm, lambda: self.layout if early else None)
        reduction: Any = SimpleNamespace(
            weight=lambda size, micro_batch: size.weight(micro_batch),
            measured=lambda returned, *_: (returned, 0),
            loss_scale=SimpleNamespace(scaled=lambda loss: loss),
            densifies=False,
        )
        what: Any = (0, self.fetch, nn.functional.mse_loss, reduction, print, self.early)
        self.dtype = dtype
        self.pipeline = Pipeline(self.stack, self.comm, Progress(None, rank, 0, []), *what, StreamStates())
        self.exchange = Exchange(self.stack, self.comm, self.early)

    def fetch(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * step + micro_batch)
        inputs, targets = torch.randn(2, 2, 24, generator=generator).to(self.dtype)
        return (inputs[:1], targets[:1]) if micro_batch == MICRO_BATCHES - 1 else (inputs, targets)

    def enter(self, generation: int, layout: Any, peers: Any) -> None:
        self.comm.edit(generation, peers)
        self.layout = layout

    def compute(self, step: int) -> StepState:
        state = StepState.begin(step, self.comm.rank, self.layout.work, StepSize(2 * MICRO_BATCHES - 1, 2))
        self.pipeline.begin_step()
        self.pipeline.run(state, 2)
        return state

    def reduce(self, state: StepState) -> dict[int, Tensor]:
        spec = self.stack.spec
        owned = self.layout.index(spec).owned(self.comm.rank)
        gradients = {s.index: torch.full((s.elements,), torch.nan, dtype=self.exchange.accumulation(s)) for s in owned}
        self.exchange.reduce(state, self.layout, gradients, 1.0)
        return gradients


class Job:
    """Some ranks, over `stages` stages."""

    def __init__(self, size: int, stages: int = 1, dtype: torch.dtype = torch.float32, *, early: bool) -> None:
        network = MemoryNetwork()
        self.ranks = [Rank(rank, network, dtype, early=early) for rank in range(size)]
        self.stages = stages
        self.generation = 0
        self.enter()

    def enter(self) -> None:
        self.generation += 1
        spec = self.ranks[0].stack.spec
        layout = initial_layout(spec, range(len(self.ranks)), self.stages, MICRO_BATCHES)
        layout = replace(layout, generation=self.generation)
        peers = {rank.comm.rank: rank.comm.peer for rank in self.ranks}
        for rank in self.ranks:
            rank.enter(self.generation, layout, peers)

    def each(self, act: Callable[[Rank], Any]) -> list[Any]:
        return at_once(self.ranks, act)

    def gradients(self, step: int = 0) -> dict[int, Tensor]:
        """Of all shards, from their owners."""
        found: dict[int, Tensor] = {}
        for gradients in self.each(lambda rank: rank.reduce(rank.compute(step))):
            found |= gradients
        return found


def assert_equal(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for shard, gradient in expected.items():
        assert torch.equal(bits(found[shard]), bits(gradient)), f"shard {shard} differs"


def left(job: Job) -> list[Any]:
    """Messages that no rank took."""
    return [name for rank in job.ranks for box in rank.comm._mailbox._mailbox._boxes.values() for name in box]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (3, 1), (4, 2), (5, 2), (3, 3)])
def test_gradients_are_those_of_the_plain_form(size, stages, dtype):
    expected = Job(size, stages, dtype, early=False)
    job = Job(size, stages, dtype, early=True)
    for step in range(3):
        for rank in job.ranks:
            rank.comm.shuffle = random.Random(step) if stages == 1 else None
        assert_equal(job.gradients(step), expected.gradients(step))
    posts = [len(rank.comm.posted) for rank in job.ranks]
    assert all(posts) if size > stages else not any(posts)
    assert not any(rank.comm.posted for rank in expected.ranks)
    assert not left(job)


def test_most_bytes_are_posted_before_the_last_backward_is_over():
    job = Job(2, early=True)
    job.each(lambda rank: rank.compute(0))
    for rank in job.ranks:
        posted = rank.early.posted_to(1 - rank.comm.rank, 0)
        shards = rank.layout.index(rank.stack.spec).owned(1 - rank.comm.rank)
        spec = rank.stack.spec
        counting = sum(spec.shards[shard].elements for _, shard in posted.counts)
        trained = sum(s.elements for s in shards if "unused" not in spec.parameters[s.parameter].name)
        assert posted.messages > 1
        assert 0.8 * trained < counting <= trained


def halve_in_place(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.data.mul_(0.5)  # which no version counter shows


def replace_it(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad * 3


def drop_it(parameter: nn.Parameter) -> None:
    parameter.grad = None


@pytest.mark.parametrize("change", [halve_in_place, replace_it, drop_it])
def test_what_changes_behind_the_backward_is_sent_again(change):
    """The gradient counts that the runtime takes; who has posted another one posts no more."""

    def changed(rank: Rank) -> dict[int, Tensor]:
        last = max(leg.micro_batch for leg in rank.layout.work.spans_of(rank.comm.rank))
        harvest = rank.pipeline.harvest

        def changing(state: StepState, span: Leg, *others: Any) -> None:
            if span.micro_batch == last:
                for held in rank.stack.layers[1].parameters:
                    if held.tensor.grad is not None:
                        change(held.tensor)
            harvest(state, span, *others)

        rank.pipeline.harvest = changing  # type: ignore[method-assign]
        found = rank.reduce(rank.compute(0))
        rank.pipeline.harvest = harvest  # type: ignore[method-assign]
        return found

    job, expected = Job(2, early=True), Job(2, early=False)
    for rank in job.ranks:
        rank.comm.shuffle = random.Random(0)
    for mine, plain in zip(job.each(changed), expected.each(changed), strict=True):
        assert_equal(mine, plain)
    posted = [len(rank.comm.posted) for rank in job.ranks]
    assert all(posted)
    assert_equal(job.gradients(1), expected.gradients(1))
    again = [len(rank.comm.posted) > before for rank, before in zip(job.ranks, posted, strict=True)]
    assert again == [change is drop_it] * 2, "a micro-batch that is left out says nothing of the next"
    assert not left(job)


def test_parts_of_a_generation_that_is_given_up_do_not_count():
    """Posted, then the generation ends: in the next one all is sent again, and nothing of the old one is left."""
    expected = Job(3, early=False).gradients()
    job = Job(3, early=True)
    states = job.each(lambda rank: rank.compute(0))
    assert left(job)
    for rank in job.ranks:
        rank.comm.abort()
    job.enter()
    assert not left(job)
    assert all(rank.early.posted_to(owner, 0).messages == 0 for rank in job.ranks for owner in range(3))
    found: dict[int, Tensor] = {}
    for gradients in job.each(lambda rank: rank.reduce(states[rank.comm.rank])):
        found |= gradients
    assert_equal(found, expected)
    assert not left(job)


def test_an_abort_within_the_backward_is_for_later():
    """Autograd calls the hook: the backward goes on without posts, and the next call of the runtime raises."""
    job, undisturbed = Job(2, early=True), Job(2, early=True)
    undisturbed.each(lambda rank: rank.compute(0))
    rank = job.ranks[0]
    middle = rank.stack.model[1].linear.weight
    middle.register_hook(lambda gradient: rank.comm.abort() if len(state.held) == legs - 1 else None)
    state = StepState.begin(0, 0, rank.layout.work, StepSize(2 * MICRO_BATCHES - 1, 2))
    legs = len(state.todo)
    rank.pipeline.begin_step()
    rank.pipeline.run(state, 2)
    assert state.done
    assert 0 < len(rank.comm.posted) < len(undisturbed.ranks[0].comm.posted)
    with pytest.raises(Aborted):
        rank.reduce(state)


def test_a_backward_behind_the_step_posts_nothing():
    """As of a script that looks at gradients between steps: no rank would take it, in any step."""
    job = Job(2, early=True)

    def act(rank: Rank) -> tuple[int, int]:
        rank.reduce(rank.compute(0))
        posted = len(rank.comm.posted)
        sum(layer.unused.sum() for layer in rank.stack.model).backward()  # which the step has posted nothing of
        return posted, len(rank.comm.posted)

    assert all(before == behind > 0 for before, behind in job.each(act))
    assert not left(job)


def test_a_loop_with_two_backwards_posts_once_and_sums_both():
    job, expected = Job(2, early=True), Job(2, early=False)

    def turns(rank: Rank, step: int) -> StepState:
        """As the user's own loop: the runtime learns of the turn's beginning and of its end."""
        state = StepState.begin(step, rank.comm.rank, rank.layout.work, StepSize(2 * MICRO_BATCHES - 1, 2))
        rank.pipeline.begin_step()
        while state.todo:
            span = state.todo[0]
            inputs, targets = rank.fetch(step, span.micro_batch)
            rank.pipeline.begin_backward(state, span)
            outputs = rank.stack.model(inputs)
            nn.functional.mse_loss(outputs, targets).backward(retain_graph=True)
            outputs.square().mean().backward()
            rank.pipeline.harvest(state, span, {})
        return state

    for step in range(3):
        found = job.each(lambda rank, step=step: rank.reduce(turns(rank, step)))
        plain = expected.each(lambda rank, step=step: rank.reduce(turns(rank, step)))
        for gradients, others in zip(found, plain, strict=True):
            assert_equal(gradients, others)
        if step == 0:
            posted = [len(rank.comm.posted) for rank in job.ranks]
    assert all(posted)
    assert posted == [len(rank.comm.posted) for rank in job.ranks], "who was wrong once posts no more"
    assert not left(job)
