"""Losses that are sums, a loss scaler and accumulation, on one rank in this process: the numbers are torch's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader, Dataset

import everstep
from everstep import UsageError
from everstep.elastic.step.loss_scale import LossScale
from everstep.elastic.step.order import DataOrder
from everstep.elastic.step.reduction import is_visibly_a_sum, whole_count
from tests.terms import agreed

STEPS, BATCH = 5, 4
TOKENS = {"loss_reduction": "tokens"}


class Sentences(Dataset[Any]):
    """A sample: words, and targets of which some are to be ignored."""

    def __init__(self, known: int = 3) -> None:
        self.known = known

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        targets = torch.randint(0, 5, (6,), generator=generator)
        targets[index % 4 + self.known :] = -1
        return torch.randn(6, 4, generator=generator), targets


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def counted_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return sum_loss(outputs, targets), (targets >= 0).sum()


class Trained:
    """A model and its optimizer; what a job with it has yielded."""

    def __init__(self, lr: float = 0.1) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.steps: list[Any] = []
        self.turns_that_end_a_step = 0
        self.skipped = 0

    def same(self, other: Trained) -> bool:
        return all(map(torch.equal, self.model.parameters(), other.model.parameters()))

    def close(self, other: Trained) -> bool:
        return all(map(torch.allclose, self.model.parameters(), other.model.parameters()))


def job(body: Callable[[everstep.Run], None], **settings: Any) -> None:
    given = {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 1, **settings}
    everstep.elastic(**given)(body)()


def in_steps(loss_fn: Any, lr: float = 0.1, known: int = 3, settings: Any = None, **how: Any) -> Trained:
    """Train with `run.steps`."""
    trained = Trained(lr)

    def body(run: everstep.Run) -> None:
        loader = DataLoader(Sentences(known), batch_size=run.settings.micro_batch_size)
        trained.steps += run.steps(trained.model, trained.optimizer, loader, loss_fn=loss_fn, **how)
        trained.skipped = run.skipped_steps

    job(body, **(settings or {}))
    return trained


def in_a_loop(turn: Callable[..., None], settings: Any = None, **how: Any) -> Trained:
    """Train with a loop over prepared batches; `turn` is called with run, number, model, optimizer and batch."""
    trained = Trained()

    def body(run: everstep.Run) -> None:
        run.on_step(trained.steps.append)
        loader = DataLoader(Sentences(), batch_size=(settings or {}).get("micro_batch_size", 1))
        model, optimizer, batches = run.prepare(trained.model, trained.optimizer, loader, **how)
        for number, batch in enumerate(batches):
            turn(run, number, model, optimizer, batch)
            trained.turns_that_end_a_step += run.is_step_end
        trained.skipped = run.skipped_steps

    job(body, **(settings or {}))
    return trained


def plainly(gradient: Callable[[nn.Module, Tensor, Tensor], Tensor], lr: float = 0.1) -> Trained:
    """An ordinary training in whole batches."""
    trained = Trained(lr)
    for inputs, targets in DataLoader(Sentences(), batch_size=BATCH):
        trained.optimizer.zero_grad()
        gradient(trained.model, inputs, targets).backward()
        trained.optimizer.step()
    return trained


# ---------------------------------------------------------------- losses that are sums


def test_a_sum_is_not_divided() -> None:
    """The same bits as a mean at another rate, since there are four micro-batches."""
    found = in_steps(sum_loss, 0.01, settings={"loss_reduction": "sum"})
    means = in_steps(sum_loss, 0.01 * BATCH)
    assert found.same(means)
    assert found.close(plainly(lambda model, inputs, targets: sum_loss(model(inputs), targets), 0.01))
    assert [step.loss for step in found.steps] == [BATCH * step.loss for step in means.steps]


def flat(criterion: Any) -> Any:
    return lambda outputs, targets: criterion(outputs.flatten(0, 1), targets.flatten())


class Halved(nn.CrossEntropyLoss):
    """Has the attributes of torch's, and another loss."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs.transpose(1, 2), targets.clamp(min=0)) / 2


class AbsoluteSum(nn.Module):
    """An L1 loss, of which the autograd node does not tell that it is a criterion's sum."""

    reduction = "sum"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(2) - targets).abs().sum()


@pytest.mark.parametrize(
    ("loss_fn", "settings", "warned"),
    [
        (sum_loss, {}, True),
        (flat(nn.CrossEntropyLoss(reduction="sum", ignore_index=-1)), {}, True),
        (lambda o, t: nn.functional.mse_loss(o[..., 0], t.float(), reduction="sum"), {}, True),
        (mean_loss, {}, False),
        (sum_loss, {"loss_reduction": "sum"}, False),
        (lambda o, t: sum_loss(o, t) / len(o), {}, False),
        (Halved(reduction="sum"), {}, False),
        (AbsoluteSum(), {}, False),
        (sum_loss, {"micro_batch_size": 1}, False),  # a sum over what one sample has
        (sum_loss, {"micro_batch_size": 4}, False),  # the mean of one sum
    ],
)
def test_a_loss_that_is_visibly_a_sum(
    loss_fn: Any, settings: Any, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is warned of once where a mean is wanted."""
    size = settings.get("micro_batch_size", 2)
    in_steps(loss_fn, settings={"micro_batch_size": size, **settings})
    said = capsys.readouterr().err
    assert said.count("[loss-is-a-sum]") == warned
    assert ('give the job loss_reduction="sum", or the loss its mean' in said) == warned


def test_criteria_say_what_they_are() -> None:
    """Some losses are computed of parts, so that their last autograd node tells nothing."""
    criteria: list[Any] = [nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss]
    for criterion in criteria:
        for reduction in ("sum", "mean"):
            made = criterion(reduction=reduction)
            loss = made(torch.ones(2, requires_grad=True), torch.ones(2))
            assert is_visibly_a_sum(loss, made) == (reduction == "sum"), made
    smoothed = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    assert is_visibly_a_sum(smoothed(torch.ones(2, 2, requires_grad=True), torch.zeros(2).long()), smoothed)


def test_a_mean_over_the_tokens_of_the_step() -> None:
    found = in_steps(counted_loss, settings=TOKENS)
    plain = plainly(lambda model, inputs, targets: mean_loss(model(inputs), targets))
    assert found.close(plain)
    assert not found.close(in_steps(mean_loss)), "micro-batches have different numbers of tokens"

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        loss, count = counted_loss(model(batch[0]), batch[1])
        run.count_tokens(count - 1)
        run.count_tokens(1)
        loss.backward()
        optimizer.step()

    loop = in_a_loop(turn, TOKENS)
    assert found.same(loop)
    assert [s.gradient_norm for s in loop.steps] == [s.gradient_norm for s in found.steps]


def test_the_loss_and_the_norm_of_a_step_of_tokens() -> None:
    (step, *_) = in_steps(counted_loss, settings=TOKENS).steps
    trained = Trained()
    inputs, targets = next(iter(DataLoader(Sentences(), batch_size=BATCH)))
    loss = mean_loss(trained.model(inputs), targets)
    loss.backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    norms = [p.grad.norm() for p in trained.model.parameters() if p.grad is not None]
    assert step.gradient_norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-6)


def test_a_step_without_tokens_changes_nothing() -> None:
    found = in_steps(counted_loss, known=-9, settings=TOKENS)
    assert found.same(Trained())
    assert all(math.isnan(step.loss) and step.gradient_norm == 0 for step in found.steps)
    assert found.skipped == 0, "their gradients were finite"


def test_statistics_of_a_batch_norm_are_means_of_micro_batches() -> None:
    """Whatever gradients are divided by."""

    def statistics(**how: Any) -> list[Tensor]:
        torch.manual_seed(7)
        norm = nn.BatchNorm1d(6)
        model = nn.Sequential(norm, nn.Linear(4, 5))

        def body(run: everstep.Run) -> None:
            loader = DataLoader(Sentences(), batch_size=1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in run.steps(model, optimizer, loader, loss_fn=how.get("loss_fn", mean_loss), scaler=how["scaler"]):
                pass

        job(body, **how.get("settings", {}))
        return [norm.running_mean, norm.running_var]  # type: ignore[list-item]

    expected = statistics(scaler=None)
    assert not torch.equal(expected[0], torch.zeros(6))
    for how in ({"settings": {"loss_reduction": "sum"}}, {"settings": TOKENS, "loss_fn": counted_loss}):
        assert all(map(torch.equal, statistics(scaler=GradScaler("cpu"), **how), expected))


# ---------------------------------------------------------------- a loss scaler


def test_a_scale_that_is_a_power_of_two_changes_no_bit() -> None:
    found = in_steps(counted_loss, settings=TOKENS, scaler=GradScaler("cpu"), clip_grad_norm=0.1)
    expected = in_steps(counted_loss, settings=TOKENS, clip_grad_norm=0.1)
    assert found.same(expected)
    assert found.steps == expected.steps


class Overflowing:
    """A loss that is infinite in some batches."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return mean_loss(outputs, targets) * (math.inf if self.calls in (1, 4) else 1)


def scaled_turn(loss_fn: Any, scaler: GradScaler) -> Callable[..., None]:
    """The part of an ordinary loop that is about the scaler, line by line."""

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        loss = loss_fn(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return turn


def test_an_ordinary_loop_with_a_scaler() -> None:
    """With one micro-batch to a step all is as in torch: the bits, the scale, and which steps are left out."""
    ours, theirs = (GradScaler("cpu", init_scale=2.0**8, growth_interval=2) for _ in range(2))
    found = in_a_loop(scaled_turn(Overflowing(), ours), {"micro_batch_size": BATCH}, scaler=ours)
    plain, turn = Trained(), scaled_turn(Overflowing(), theirs)
    for number, batch in enumerate(DataLoader(Sentences(), batch_size=BATCH)):
        turn(None, number, plain.model, plain.optimizer, batch)
    assert found.same(plain)
    assert ours.state_dict() == theirs.state_dict()
    assert ours.get_scale() == 2.0**7
    assert found.skipped == 2


@pytest.mark.parametrize("rates", ["checkpoint", "script"])
def test_a_resumed_job_goes_on_with_the_scale(rates: str, tmp_path: Path) -> None:
    """Also where rates and other settings are the script's."""

    def trained(calls: int, **settings: Any) -> tuple[Trained, dict[str, Any]]:
        scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        settings |= {"micro_batch_size": BATCH, "resume_hyperparameters": rates}
        found = in_a_loop(scaled_turn(Overflowing(calls), scaler), settings, scaler=scaler)
        return found, scaler.state_dict()

    expected, scale = trained(0)
    trained(0, steps=2, checkpoint=str(tmp_path))
    found, restored = trained(2, checkpoint=str(tmp_path))
    assert [step.index for step in found.steps] == [2, 3, 4]
    assert found.same(expected)
    assert restored == scale
    assert found.skipped == expected.skipped == 2


def test_a_disabled_scaler_is_none() -> None:
    scaler = GradScaler("cpu", enabled=False)
    found = in_a_loop(scaled_turn(mean_loss, scaler), scaler=scaler)
    assert found.same(in_steps(mean_loss))


@pytest.mark.parametrize("seed", range(3))
def test_the_scale_changes_as_torchs_does(seed: int) -> None:
    rng = random.Random(seed)
    how = {"init_scale": 3.0, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 3}
    ours, theirs = (GradScaler("cpu", **how) for _ in range(2))  # type: ignore[arg-type]
    scale, parameter = LossScale(ours), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    order = DataOrder(samples=8, global_batch_size=4, micro_batch_size=2, seed=0)
    for _ in range(60):
        if rng.random() < 0.2:  # as in a recovery, or a replacement
            saved, ours = scale.state_dict(), GradScaler("cpu")
            scale = LossScale(ours)
            scale.load_state_dict(saved)
        value = rng.choice([1.0] * 4 + [math.inf, math.nan])
        theirs.scale(parameter.sum() * value).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        scale.advance(agreed(norm=value, skip=not math.isfinite(value)), order)
        assert ours.state_dict() == theirs.state_dict()


# ---------------------------------------------------------------- accumulation


def accumulating(every: int, scaler: GradScaler | None = None) -> Callable[..., None]:
    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        (mean_loss(model(batch[0]), batch[1]) / every).backward()
        if (number + 1) % every == 0:
            run.clip_grad_norm_(0.05)
            optimizer.step()
            optimizer.zero_grad()

    return turn


def test_the_loss_is_divided_and_the_optimizer_stepped_every_few_turns() -> None:
    expected = in_steps(mean_loss, clip_grad_norm=0.05)
    for every in (2, 4):
        found = in_a_loop(accumulating(every), accumulation=every)
        assert found.same(expected)
        assert [step.index for step in found.steps] == list(range(STEPS))
        assert found.turns_that_end_a_step == STEPS


def test_the_turn_that_ends_a_step() -> None:
    """A loop that asks, in place of counting."""
    ends = []

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        (mean_loss(model(batch[0]), batch[1]) / BATCH).backward()
        if run.is_step_end:
            optimizer.step()
            assert run.is_step_end
            ends.append(number)

    found = in_a_loop(turn, accumulation=BATCH)
    assert found.same(in_steps(mean_loss))
    assert ends == [BATCH * step + 3 for step in range(STEPS)]


def halving(every: int, *, calls: bool = True) -> Trained:
    """A loop with a scheduler, which it calls where it calls the optimizer."""
    trained = Trained()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(trained.optimizer, 0.5)

    def body(run: everstep.Run) -> None:
        loader = DataLoader(Sentences(), batch_size=1)
        model, optimizer, batches = run.prepare(trained.model, trained.optimizer, loader, accumulation=every)
        for inputs, targets in batches:
            (mean_loss(model(inputs), targets) / every).backward()
            if run.is_step_end or every == 1:
                optimizer.step()
                if calls:
                    scheduler.step()

    job(body)
    return trained


def test_a_scheduler_in_a_loop_that_accumulates() -> None:
    """It is stepped once per step, and has to be called where the optimizer is."""
    found = halving(4)
    assert found.same(halving(1))
    assert found.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**STEPS
    with pytest.raises(SystemExit, match=r"ExponentialLR was built on the optimizer, and its step\(\) was not called"):
        halving(4, calls=False)


def test_a_batch_that_is_skipped_has_no_tokens() -> None:
    """It is left out of the step; where it is the step's only one, so is the step."""

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        loss, count = counted_loss(model(batch[0]), batch[1])
        if number % 2:
            run.skip()
            return
        run.count_tokens(count)
        loss.backward()
        optimizer.step()

    skipping = in_a_loop(turn, {**TOKENS, "global_batch_size": 2})
    halved = Trained()
    for number, (inputs, targets) in enumerate(DataLoader(Sentences(), batch_size=1)):
        if number % 2 == 0 and number < 2 * STEPS:
            halved.optimizer.zero_grad()
            mean_loss(halved.model(inputs), targets).backward()
            halved.optimizer.step()
    assert skipping.close(halved)


# ---------------------------------------------------------------- mistakes


def wrong(**changes: Any) -> Callable[..., None]:
    """A turn with a mistake."""

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        for name, value in changes.items():
            if name == "tokens":
                run.count_tokens(value)
        loss = mean_loss(model(batch[0]), batch[1])
        scaler = changes.get("scaler")
        if "backward" not in changes:
            (scaler.scale(loss) if scaler and "unscaled" not in changes else loss).backward()
        if scaler:
            scaler.step(changes.get("optimizer", optimizer))
            scaler.update(changes.get("update"))
        elif "step" not in changes:
            optimizer.step()
        if "late" in changes:
            run.count_tokens(1)

    return turn


def test_clipping_behind_unscale_is_refused() -> None:
    """The line to write in its place is in the message."""
    scaler = GradScaler("cpu")

    def turn(run: Any, number: int, model: nn.Module, optimizer: Any, batch: Any) -> None:
        scaler.scale(mean_loss(model(batch[0]), batch[1])).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)

    with pytest.raises(SystemExit, match=r"write run.clip_grad_norm_\(x\) for torch.nn.utils.clip_grad_norm_"):
        in_a_loop(turn, scaler=scaler)


def a_scaler() -> dict[str, Any]:
    scaler = GradScaler("cpu", init_scale=4.0)
    return {"scaler": scaler}


OTHER = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize(
    ("changes", "how", "settings", "message"),
    [
        ({}, {"scaler": 2.0**16}, {}, "scaler= takes a torch.amp.GradScaler, got float"),
        ({}, {"accumulation": 0}, {}, "accumulation must be a whole number of at least 1, got 0"),
        ({}, {"accumulation": 3}, {}, "accumulation=3: a step has 4 micro-batches"),
        ({}, {}, {"loss_reduction": "median"}, "loss_reduction must be one of mean, sum, tokens, got 'median'"),
        ({}, {}, TOKENS, r"call run.count_tokens\(n\), with the number of tokens that the loss is a sum over"),
        ({"tokens": 2.5}, {}, TOKENS, r"run.count_tokens\(n\): a number of tokens is a whole number .*, got 2.5"),
        ({"tokens": -1}, {}, TOKENS, "a number of tokens is a whole number of at least 0, got -1"),
        ({"tokens": 1, "late": 1}, {}, TOKENS, "call it in a turn of the loop, before optimizer.step"),
        ({"tokens": 1}, {}, {}, 'losses that are sums over tokens: give the decorator loss_reduction="tokens"'),
        ({"step": 0}, {}, {}, "optimizer.step\\(\\) was not called for the last micro-batch"),
        ({"step": 0, "backward": 0}, {"accumulation": 2}, {}, "a turn of the loop ended without backward"),
        ({"update": 2.0}, a_scaler(), {}, r"scaler.update\(new_scale\): all ranks agree on the scale"),
        ({"unscaled": 1}, a_scaler(), {}, r"scaler.scale\(loss\) was not called for a micro-batch of step 0"),
        ({"optimizer": OTHER}, a_scaler(), {}, "another optimizer than the one that run.prepare returned"),
    ],
)
def test_mistakes_in_a_loop(changes: Any, how: Any, settings: Any, message: str) -> None:
    turn = wrong(**changes, **({"scaler": how["scaler"]} if isinstance(how.get("scaler"), GradScaler) else {}))
    with pytest.raises((SystemExit, UsageError), match=message):
        in_a_loop(turn, settings, **how)


@pytest.mark.parametrize(
    ("loss_fn", "reduction", "message"),
    [
        (mean_loss, "tokens", r"loss_fn must return \(the sum of the losses .*, their number\), got "),
        (lambda o, t: (o, 1), "tokens", r"one element \(the sum of the losses first\), got a tensor of shape"),
        (lambda o, t: (o.sum(), 0.5), "tokens", "loss_fn: a number of tokens is a whole number of at least 0, got 0.5"),
        (counted_loss, "sum", r"one element \(the micro-batch's loss\), got a tuple"),
    ],
)
def test_mistakes_of_a_loss(loss_fn: Any, reduction: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        in_steps(loss_fn, settings={"loss_reduction": reduction})


def test_tokens_are_counted_by_the_loss_in_steps() -> None:
    def body(run: everstep.Run) -> None:
        trained = Trained()
        for _ in run.steps(trained.model, trained.optimizer, Sentences(), loss_fn=mean_loss):
            run.count_tokens(3)

    with pytest.raises(SystemExit, match=r"with run.steps the loss_fn returns \(sum, number of tokens\)"):
        job(body)


def test_counts() -> None:
    assert whole_count(torch.tensor(7.0), "x") == 7
    assert whole_count(torch.tensor([[3]]), "x") == 3
    for wrong_one in (True, "3", torch.tensor([1, 2]), math.nan, math.inf, 1 << 60, None):
        with pytest.raises(UsageError, match="a number of tokens is a whole number"):
            whole_count(wrong_one, "x")
