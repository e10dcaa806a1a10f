"""The values that the simulator computes instead of tensors: hashes, so that equal bytes can be checked.

Every value is a hash of all its inputs: an activation of the layer's parameter values and its input; a leaf of a step's
sum of the activation and the output's gradient; a new parameter value of the old one and the whole sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from everstep.elastic.protocol.terms import Terms
from everstep.resharding.units import ModelSpec, Shard


def mixed(*parts: object) -> str:
    """One short hash of all parts."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class ShardState(NamedTuple):
    """A shard's parameter values and its optimizer's state."""

    value: str
    optimizer: str


def initial(shard: int) -> ShardState:
    """Version 0, made from the seed."""
    return ShardState(mixed("value", shard), "")


def updated(state: ShardState, gradient: str) -> ShardState:
    """One step of the optimizer."""
    optimizer = mixed(state.optimizer, gradient)
    return ShardState(mixed(state.value, optimizer), optimizer)


def made_up(neighbors: Mapping[int, ShardState]) -> ShardState:
    """The approximation of a lost shard."""
    return ShardState(mixed("made up", *(state.value for _, state in sorted(neighbors.items()))), "")


def forwarded(layer: int, values: Sequence[str], value: str) -> str:
    """A layer's output."""
    return mixed("forward", layer, values, value)


def loss_gradient(step: int, micro_batch: int, output: str) -> str:
    """The gradient of the loss with respect to the model's output."""
    return mixed("loss", step, micro_batch, output)


def backwarded(layer: int, values: Sequence[str], value: str, gradient: str) -> tuple[str, str]:
    """The gradients with respect to a layer's input and to its parameters (the leaf)."""
    return mixed("backward", layer, values, value, gradient), mixed("leaf", layer, values, value, gradient)


def summed(shard: Shard, leaves: Sequence[Sequence[str]]) -> str:
    """A shard's gradient: its part of the leaves in canonical order, for each layer that holds its parameter."""
    return mixed("sum", shard.index, leaves)


def digest_of(gradients: Mapping[int, str]) -> int:
    """A digest of the gradients of some shards; those of all add up (xor) to the same under any ownership."""
    total = 0
    for shard, gradient in gradients.items():
        total ^= int(mixed(shard, gradient), 16)
    return total


def agreement_of(step: int, digest: int, *, generation: int = 0, protected: int = -1, every: int = 1) -> str:
    """The agreement of the members in a step. Only what is named depends on the course of the run."""
    nothing: dict[str, Any] = {"loss": None, "norm": None, "scale": None, "groups": [], "registered": {}}
    nothing |= {"generation": generation, "protected": protected, "every": every}
    return Terms(step=step, digest=f"{digest:016x}", **nothing).to_text()


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: the agreement of each step, and every shard's state at each version."""

    agreements: tuple[str, ...]
    states: tuple[tuple[ShardState, ...], ...]


def reference(spec: ModelSpec, micro_batches: int, steps: int) -> Reference:
    """The whole run on one worker, written as plainly as possible."""
    return continued(spec, micro_batches, steps, Reference((), (tuple(initial(s.index) for s in spec.shards),)))


def continued(spec: ModelSpec, micro_batches: int, steps: int, past: Reference) -> Reference:
    """The rest of a run whose first steps are done."""
    agreements, versions = list(past.agreements), list(past.states)
    for step in range(len(agreements), steps):
        states = versions[-1]
        values = [tuple(states[s.index].value for s in shards) for shards in spec.shards_of_layer]
        leaves: list[list[str]] = [[] for _ in range(spec.layers)]
        for micro_batch in range(micro_batches):
            inputs = [mixed("data", step, micro_batch)]
            for layer in range(spec.layers):
                inputs.append(forwarded(layer, values[layer], inputs[-1]))
            gradient = loss_gradient(step, micro_batch, inputs[-1])
            for layer in reversed(range(spec.layers)):
                gradient, leaf = backwarded(layer, values[layer], inputs[layer], gradient)
                leaves[layer].append(leaf)
        gradients = {
            s.index: summed(s, [leaves[layer] for layer in spec.parameters[s.parameter].layers]) for s in spec.shards
        }
        versions.append(tuple(updated(state, gradients[i]) for i, state in enumerate(states)))
        agreements.append(agreement_of(step, digest_of(gradients)))
    return Reference(tuple(agreements), tuple(versions))
