"""Buffers that forwards change: which rule each has, and what that gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.buffer_rules import RULES, Rule, after_step, leaf
from everstep.elastic.holding.stack import LayerStack


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    made[0].register_buffer("moving", torch.zeros(2))
    made[0].register_buffer("counts", torch.zeros(2, dtype=torch.int64))
    made[0].register_buffer("hidden", torch.zeros(2), persistent=False)
    made[0].register_buffer("mask", torch.zeros(2, dtype=torch.bool))
    return made


def rules(**declared: Any) -> dict[str, Rule | None]:
    buffers = {name.replace("__", ".").replace("ANY", "*"): rule for name, rule in declared.items()}
    stack = LayerStack(model(), cut=True, buffers=buffers)
    return {spec.name: stack.rule(index) for index, spec in enumerate(stack.spec.parameters) if stack.is_buffer(index)}


def test_batch_norms_have_one_and_others_are_declared() -> None:
    known: dict[str, Rule | None] = {f"1.{n}": "mean" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert rules() == known
    assert rules(ANY__moving="last", ANYcounts="sum") == known | {"0.moving": "last", "0.counts": "sum"}
    assert rules(ANY__running_mean="last")["1.running_mean"] == "last"


def test_spectral_norm_has_one_too() -> None:
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    stack = LayerStack(nn.Sequential(norm, nn.Conv2d(1, 1, 1)), cut=True)
    found = {spec.name: stack.rule(index) for index, spec in enumerate(stack.spec.parameters) if stack.is_buffer(index)}
    assert found == {f"0.parametrizations.weight.0.{name}": "last" for name in ("_u", "_v")}


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"0__moving": "min"}, r"buffers=\{'0.moving': 'min'\}: the rule must be one of mean, sum, max, last"),
        ({"movin": "mean"}, "no buffer of the model has such a name; it has 0.counts, 0.hidden, 0.mask, 0.moving"),
        ({"0__hidden": "mean"}, "'0.hidden' is not saved: register it as persistent"),
        ({"ANYmask": "last"}, "'0.mask' has torch.bool, which has no sum and no largest value"),
    ],
)
def test_what_cannot_be_is_refused(declared: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        rules(**declared)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_step(rule: Rule, dtype: torch.dtype) -> None:
    """Three micro-batches, each from the value before the step."""
    before = torch.tensor([4.0, -8.0]).to(dtype)
    after = [torch.tensor(values).to(dtype) for values in ([5.0, -8.0], [7.0, -2.0], [6.0, 1.0])]
    wide = torch.float64 if dtype == torch.int64 else dtype
    leaves = torch.stack(
        [leaf(rule, before.to(wide), value.to(wide), is_last=at == 2) for at, value in enumerate(after)]
    )
    total = leaves.amax(0) if rule == "max" else leaves.sum(0)
    found = after_step(rule, before, total / 3 if rule == "mean" else total)
    expected = {"mean": [6.0, -3.0], "sum": [10.0, 7.0], "max": [7.0, 1.0], "last": [6.0, 1.0]}[rule]
    assert found.tolist() == expected
    assert before.tolist() == [4.0, -8.0]


def test_the_bits_of_a_largest_value_do_not_depend_on_where_it_lies() -> None:
    """Torch's vectorised and its scalar code choose another one of two equal zeros, and another NaN."""
    size = 37
    zeros, others = torch.zeros(size), -torch.zeros(size)
    found = [after_step("max", zeros, torch.maximum(*pair)) for pair in ((zeros, others), (others, zeros))]
    assert torch.equal(found[0].view(torch.int32), found[1].view(torch.int32))
    odd = torch.full((size,), 0x7FC00123, dtype=torch.int32).view(torch.float32)
    bits = after_step("max", zeros, torch.maximum(odd, zeros)).view(torch.int32)
    assert bits.unique().tolist() == torch.tensor([float("nan")]).view(torch.int32).tolist()
