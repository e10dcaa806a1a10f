"""Several optimizers in one loop: what each call of `step()` takes, and the mistakes that are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from everstep.elastic.api.updates import Updates, as_one, check_several, taking_turns
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import Settings
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import check_optimizer
from everstep.elastic.step.gradients import GradientWatch
from everstep.elastic.step.order import DataOrder
from everstep.elastic.step.taking_turns import TakingTurns

SGD = torch.optim.SGD


def pair() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    models: list[nn.Module] = [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))]
    return models, [SGD(model.parameters(), lr=0.1) for model in models]


def updates_of(models: list[nn.Module], optimizers: list[torch.optim.Optimizer], *, alternating: bool) -> Updates:
    stack = LayerStack(nn.ModuleList(models), cut=False)
    order = DataOrder(samples=8, global_batch_size=4, micro_batch_size=2, seed=0, turns=TakingTurns((1, 1)))
    updates = Updates(stack, optimizers, GradientWatch(stack), order.due if alternating else None)
    updates.begin(0)
    return updates


def backward(models: list[nn.Module], *, detached: bool = False) -> None:
    out = models[0](torch.ones(3, 2))
    models[1](out.detach() if detached else out).square().sum().backward()


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [p.grad for p in model.parameters()]


def test_one_model_stays_what_it_is() -> None:
    (model, _), (optimizer, _) = pair()
    assert as_one(model, optimizer, "alternating") == (model, optimizer)


def lists(models: Any, optimizers: Any, updates: str = "alternating") -> None:
    model, optimizer = as_one(models, optimizers, updates)
    check_optimizer(optimizer, model)


def test_lists_that_do_not_fit() -> None:
    (g, d), (opt_g, opt_d) = pair()
    both = SGD([*g.parameters(), *d.parameters()], lr=0.1)
    lists([g, d], [both])  # lists of any length
    lists((g, d), (opt_g, opt_d))
    lists([g, nn.Sequential(g, d)], [opt_g, opt_d])  # models that share parameters, each of one optimizer
    for (models, optimizers), text in (
        (([g, d], opt_g), "a list of models and a list of optimizers: the optimizers are a SGD"),
        ((g, [opt_g]), "a list of models and a list of optimizers: the models are a Linear"),
        (([], [opt_g]), "the models are an empty list"),
        (([g, d], []), "the optimizers are an empty list"),
        (([g, "d"], [opt_g, opt_d]), "models[1] of run.prepare must be a torch Module, got a str"),
        (([g, d], [opt_g, None]), "optimizers[1] of run.prepare must be a torch Optimizer, got a NoneType"),
        (([g, g], [opt_g]), "models[1] of run.prepare stands in the list twice"),
        (([g, d], [opt_d, opt_d]), "optimizers[1] of run.prepare stands in the list twice"),
        (
            ([g, d], [opt_g, both]),
            "optimizers[0] and optimizers[1] of run.prepare both have a parameter of shape (2, 2)",
        ),
        (([g], [opt_g, opt_d]), "has a parameter of shape (1, 2) that the model lacks"),
        (([g, d], [opt_g, torch.optim.LBFGS(d.parameters())]), "LBFGS is not supported: it evaluates the loss"),
    ):
        with pytest.raises(UsageError) as error:
            lists(models, optimizers)
        assert text in str(error.value), (text, error.value)
    with pytest.raises(UsageError, match="updates must be 'alternating' or 'simultaneous', got 'both'"):
        lists([g, d], [opt_g, opt_d], "both")


def test_what_several_optimizers_do_not_take() -> None:
    settings = Settings(steps=7, global_batch_size=4, micro_batch_size=1)
    tokens = Settings(steps=8, global_batch_size=4, micro_batch_size=1, loss_reduction="tokens")
    together, what = TakingTurns(), "several optimizers"
    check_several(settings, together, 1, what=what)
    for arguments, text in (
        ((settings, TakingTurns((1, 1)), 1), "steps=7 must be a multiple of 2"),
        (
            (settings, TakingTurns((5, 1)), 1),
            "steps=7 must be a multiple of 6: with several optimizers that is how",
        ),
        ((settings, together, 4), "does not take accumulation=4"),
        ((tokens, together, 1), 'does not take loss_reduction="tokens"'),
    ):
        with pytest.raises(UsageError) as error:
            check_several(*arguments, what=what)
        assert text in str(error.value), (text, error.value)


def test_in_every_how_many_batches() -> None:
    _, optimizers = pair()
    assert taking_turns(optimizers, "alternating", None) == TakingTurns((1, 1))
    assert taking_turns(optimizers, "simultaneous", None) == TakingTurns()
    assert taking_turns(optimizers, "alternating", [5, 1]) == TakingTurns((5, 1))
    for every in ([5], [2, 2], [0, 1], [1, 1.5], [True, 1], "11", 5):
        with pytest.raises(UsageError, match="a whole number for each of the 2 optimizers, in every how many batches"):
            taking_turns(optimizers, "alternating", every)  # type: ignore[arg-type]
    for some, updates in ((optimizers[:1], "alternating"), (optimizers, "simultaneous")):
        with pytest.raises(UsageError, match="is for several optimizers that take turns"):
            taking_turns(some, updates, [1] * len(some))


def test_what_is_not_due_does_nothing() -> None:
    """The generator, which steps in every third batch; in the others its call may be there or not."""
    models, optimizers = pair()
    stack = LayerStack(nn.ModuleList(models), cut=False)
    order = DataOrder(samples=8, global_batch_size=4, micro_batch_size=2, seed=0, turns=TakingTurns((3, 1)))
    updates = Updates(stack, optimizers, GradientWatch(stack), order.due)
    for step, due, called, taken in ((0, 2, (1, 0), 1), (1, 2, (1, 0), 0), (2, 1, (1, 0), 1), (3, 1, (1,), 1)):
        updates.begin(step)
        assert updates.is_due(0) == (due == 2)
        backward(models)
        assert [number for number in called if updates.step(number, step)] == [taken]
        assert updates.restores_buffers(step) == (step == 0)
        assert all(gradient is None for gradient in gradients(models[0])) or taken == 0
        updates.check_called()
        updates.end()


def test_an_alternating_step_takes_the_gradients_of_one() -> None:
    models, optimizers = pair()
    updates = updates_of(models, optimizers, alternating=True)
    for step, order in ((0, (1, 0)), (1, (1, 0)), (2, (1, 0))):
        updates.begin(step)
        taken = []
        for number in order:
            backward(models, detached=number == 1)
            taken.append(updates.step(number, step))
            if taken[-1]:
                assert all(gradient is not None for gradient in gradients(models[number]))
                assert gradients(models[1 - number]) == [None] * len(gradients(models[1 - number]))
            for model in models:
                model.zero_grad()
        assert taken == [step % 2 == 0, step % 2 == 1]


def test_simultaneous_updates_take_each_at_its_call() -> None:
    """What the loss of the generator leaves in the discriminator does not count, nor whether it is frozen by then."""
    models, optimizers = pair()
    updates = updates_of(models, optimizers, alternating=False)
    backward(models, detached=True)
    of_d = [gradient.clone() for gradient in gradients(models[1]) if gradient is not None]
    assert not updates.step(1, 0)
    assert gradients(models[1]) == [None] * 4
    backward(models)
    models[1].requires_grad_(False)
    assert updates.step(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(models[1]), of_d, strict=True) if a is not None)
    assert all(gradient is not None for gradient in (*gradients(models[0]), *gradients(models[1])))
    assert all(parameter.requires_grad for parameter in models[1].parameters())


def test_a_gradient_that_was_clipped_is_found_at_its_call() -> None:
    models, optimizers = pair()
    updates = updates_of(models, optimizers, alternating=False)
    backward(models)
    nn.utils.clip_grad_value_(models[1].parameters(), 1e-6)
    with pytest.raises(UsageError, match=r"the gradient of '1.0.weight' was changed between backward\(\) and"):
        updates.step(1, 0)


def test_buffers_are_lent_to_the_rest_of_a_turn() -> None:
    """What it makes of them is dropped, once the turn is over."""
    models, optimizers = pair()
    norm = models[1][1]  # type: ignore[index]
    mean, before = norm.running_mean, norm.running_mean.clone()
    updates = updates_of(models, optimizers, alternating=True)
    assert updates.restores_buffers(0)
    assert not updates.restores_buffers(1)
    updates.step(1, 0)
    updates.lend()
    backward(models)
    assert not torch.equal(norm.running_mean, before)
    updates.end()
    assert norm.running_mean is mean
    assert torch.equal(mean, before)


@pytest.mark.parametrize("alternating", [True, False])
def test_each_turn_calls_each_step_once(alternating: bool) -> None:
    updates = updates_of(*pair(), alternating=alternating)
    updates.step(1, 0)
    with pytest.raises(UsageError, match=r"optimizers\[1\].step\(\) was called twice in a turn"):
        updates.step(1, 0)
    with pytest.raises(UsageError, match=r"optimizers\[0\].step\(\) was not called in a turn of the loop"):
        updates.check_called()
    updates.step(0, 0)
    updates.check_called()
    updates.begin(2)
    if alternating:
        with pytest.raises(
            UsageError, match=r"came at place 0 of a turn, where optimizers\[1\].step\(\) was in the turns"
        ):
            updates.step(0, 2)
    else:
        updates.step(0, 2)
