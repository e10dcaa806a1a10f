"""`last_batch="short"`: the numbers of plain torch, whose DataLoader has a smaller last batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

import everstep
from everstep.elastic.step.order import StepSize
from everstep.elastic.step.steps import StepState
from everstep.resharding.work import AssignedLeg, Leg, Work

SAMPLES, EPOCHS, BATCH = 22, 2, 8
DRAWS = torch.Generator().manual_seed(0)
DATA: Any = [(torch.randn(6, generator=DRAWS), torch.randn(2, generator=DRAWS)) for _ in range(SAMPLES)]
Loss = Callable[[Any, Any], Any]


class Trained:
    """A model, its optimizer, and the losses of the steps that trained it."""

    def __init__(self, *layers: nn.Module) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.losses: list[float | None] = []

    def same(self, other: Trained) -> bool:
        theirs = other.model.state_dict()
        return all(torch.equal(value, theirs[name]) for name, value in self.model.state_dict().items())


def job(body: Callable[[everstep.Run], None], **settings: Any) -> None:
    given = {"epochs": EPOCHS, "global_batch_size": BATCH, "micro_batch_size": 2, "last_batch": "short", **settings}
    everstep.elastic(**given)(body)()


def in_steps(loss_fn: Loss, workers: int = 0, **settings: Any) -> Trained:
    trained = Trained()

    def body(run: everstep.Run) -> None:
        loader = DataLoader(DATA, batch_size=run.settings.micro_batch_size, num_workers=workers)
        steps = run.steps(trained.model, trained.optimizer, loader, loss_fn=loss_fn)
        trained.losses += [step.loss for step in steps]

    job(body, **settings)
    return trained


def in_a_loop(turn: Callable[..., None], trained: Trained, how: Any = None, **settings: Any) -> int:
    """Train in a loop over prepared batches; returns the number of steps."""
    seen: list[int] = []

    def body(run: everstep.Run) -> None:
        loader = DataLoader(DATA, batch_size=run.settings.micro_batch_size)
        model, optimizer, batches = run.prepare(trained.model, trained.optimizer, loader, **(how or {}))
        assert len(batches) == -(-SAMPLES // run.settings.global_batch_size)
        numbers = itertools.count()
        for _ in run.epochs():
            for batch in batches:
                turn(run, next(numbers), model, optimizer, batch)
        seen.append(run.step)

    job(body, **settings)
    return seen[0]


def tree(leaves: list[Tensor]) -> Tensor:
    """Their sum, pair by pair."""
    while len(leaves) > 1:
        leaves = [torch.stack(leaves[at : at + 2]).sum(0) for at in range(0, len(leaves), 2)]
    return leaves[0]


def plain(
    loss_fn: Loss,
    *layers: nn.Module,
    divisor: Callable[[int], int] | None = None,
    batch: int = BATCH,
    micro_batch_size: int = 2,
) -> Trained:
    """In plain torch. `divisor`: of a step's number of samples, what the sum is divided by where losses are sums."""
    trained = Trained(*layers)
    parameters = list(trained.model.parameters())
    buffers = [buffer for buffer in trained.model.buffers() if buffer.is_floating_point()]
    for _, start in itertools.product(range(EPOCHS), range(0, SAMPLES, batch)):
        step = list(DataLoader(DATA[start : start + batch], batch_size=micro_batch_size))
        sizes = [len(inputs) for inputs, _ in step]
        shares = [size / sizes[0] for size in sizes]
        weights = [1.0] * len(step) if divisor else shares
        over = divisor(sum(sizes)) if divisor else sum(sizes) / sizes[0]
        before, losses, after = [buffer.clone() for buffer in buffers], [], []
        for inputs, targets in step:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.data.copy_(value)
            losses.append(loss_fn(trained.model(inputs), targets))
            after.append([buffer.clone() for buffer in buffers])
        gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
        for parameter, leaves in zip(parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = tree([leaf * weight for leaf, weight in zip(leaves, weights, strict=True)]) / over
        trained.optimizer.step()
        for buffer, values in zip(buffers, zip(*after, strict=True), strict=True):
            total = tree([value * share for value, share in zip(values, shares, strict=True)])
            buffer.data.copy_(total / (sum(sizes) / sizes[0]))
        total_loss = sum(weight * float(loss.detach()) for weight, loss in zip(weights, losses, strict=True))
        trained.losses.append(total_loss / over)
    return trained


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets, reduction="sum")


@pytest.mark.parametrize(("batch", "micro_batch_size"), [(8, 1), (8, 2), (8, 4), (9, 3), (7, 7), (21, 7)])
def test_the_gradient_is_the_mean_over_the_samples(batch: int, micro_batch_size: int) -> None:
    found = in_steps(mean, global_batch_size=batch, micro_batch_size=micro_batch_size)
    expected = plain(mean, batch=batch, micro_batch_size=micro_batch_size)
    assert found.same(expected)
    assert found.losses == pytest.approx(expected.losses, rel=1e-12)


def test_one_micro_batch_is_what_a_loader_of_torch_gives() -> None:
    found, expected = in_steps(mean, micro_batch_size=BATCH), Trained()
    for inputs, targets in itertools.chain(*[DataLoader(DATA, batch_size=BATCH)] * EPOCHS):
        expected.optimizer.zero_grad()
        loss = mean(expected.model(inputs), targets)
        loss.backward()
        expected.optimizer.step()
        expected.losses.append(float(loss.detach()))
    assert found.same(expected)
    assert found.losses == expected.losses


def test_workers_of_a_loader_fetch_no_empty_micro_batch() -> None:
    assert in_steps(mean, workers=1).same(plain(mean))


def test_losses_that_are_sums() -> None:
    assert in_steps(total, loss_reduction="sum").same(plain(total, divisor=lambda samples: 1))
    counted = in_steps(lambda outputs, targets: (total(outputs, targets), len(targets)), loss_reduction="tokens")
    expected = plain(total, divisor=int)
    assert counted.same(expected)
    assert counted.losses == pytest.approx(expected.losses, rel=1e-12)


def test_a_loop_that_accumulates_and_scales() -> None:
    """By powers of two, so that both are exact."""
    scaler = GradScaler("cpu", init_scale=1024.0)

    def turn(run: everstep.Run, number: int, model: Any, optimizer: Any, batch: Any) -> None:
        scaler.scale(mean(model(batch[0]), batch[1]) / 2).backward()
        if number % 2:
            scaler.step(optimizer)
            scaler.update()

    found = Trained()
    assert in_a_loop(turn, found, {"accumulation": 2, "scaler": scaler}) == EPOCHS * 3
    assert found.same(plain(mean))


def test_several_optimizers_take_turns_on_the_last_batch() -> None:
    found, expected = (Trained(), Trained()), (Trained(), Trained())

    def train(models: Any, optimizers: Any, batch: Any) -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            mean(model(batch[0]), batch[1]).backward()
            optimizer.step()

    def body(run: everstep.Run) -> None:
        loader = DataLoader(DATA, batch_size=BATCH)
        models, optimizers, batches = run.prepare([t.model for t in found], [t.optimizer for t in found], loader)
        for batch in batches:
            train(models, optimizers, batch)
        assert run.step == 2 * 3 * EPOCHS

    job(body, micro_batch_size=BATCH)
    for batch in itertools.chain(*[DataLoader(DATA, batch_size=BATCH)] * EPOCHS):
        train([t.model for t in expected], [t.optimizer for t in expected], batch)
    assert all(map(Trained.same, found, expected))


class Noting(nn.Module):
    """Its buffers note what has passed by."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "last", "largest"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.count = self.count + len(inputs)
        self.last = inputs.detach().sum()
        self.largest = torch.maximum(self.largest, inputs.detach().abs().amax())
        return inputs


def test_buffers_are_what_the_samples_make_of_them() -> None:
    """A batch norm's are the mean, in which a micro-batch counts by its samples."""
    found = Trained(nn.BatchNorm1d(8), Noting())
    seen: list[Tensor] = []

    def turn(run: everstep.Run, number: int, model: Any, optimizer: Any, batch: Any) -> None:
        outputs = model[:2](batch[0])
        seen.append(outputs.detach())
        mean(model[2:](outputs), batch[1]).backward()
        optimizer.step()

    rules = {"2.count": "sum", "2.last": "last", "2.largest": "max"}
    in_a_loop(turn, found, {"buffers": rules}, global_batch_size=16, micro_batch_size=4)
    assert [len(hidden) for hidden in seen] == [4, 4, 4, 4, 4, 2] * EPOCHS
    state = found.model.state_dict()
    expected = plain(mean, nn.BatchNorm1d(8), batch=16, micro_batch_size=4).model.state_dict()
    for name in ("0.weight", "1.running_mean", "1.running_var", "1.weight"):
        assert torch.equal(state[name], expected[name]), name
    assert int(state["1.num_batches_tracked"]) == EPOCHS * 2
    assert int(state["2.count"]) == EPOCHS * SAMPLES
    assert torch.equal(state["2.last"], seen[-1].sum())
    assert torch.equal(state["2.largest"], torch.stack([hidden.abs().amax() for hidden in seen]).amax())


def test_a_loader_that_drops_the_samples() -> None:
    def body(run: everstep.Run) -> None:
        trained = Trained()
        run.prepare(trained.model, trained.optimizer, DataLoader(DATA, batch_size=2, drop_last=True))

    with pytest.raises(SystemExit, match="the DataLoader has drop_last=True, and the job last_batch='short'"):
        job(body)


def test_nothing_is_done_for_an_empty_micro_batch() -> None:
    """From the beginning, and when it comes from a lost rank; the others are computed.

    It is not held either: ranks that switch to a join at different times would both hold it.
    """
    own, others = [AssignedLeg(0, m, 0, 2) for m in (0, 1)], [AssignedLeg(1, m, 0, 2) for m in (2, 3)]
    state = StepState.begin(7, 0, Work([*own, *others]), StepSize(5, 2))
    other = StepState.begin(7, 1, Work([*own, *others]), StepSize(5, 2))
    assert state.todo == [Leg(0, 0, 2), Leg(1, 0, 2)]
    assert (other.todo, other.held) == ([Leg(2, 0, 2)], set())
    state.resume(Work([*own, *(leg._replace(rank=0) for leg in others)]), ())
    assert state.todo == [Leg(0, 0, 2), Leg(1, 0, 2), Leg(2, 0, 2)]
    assert state.held == set()
