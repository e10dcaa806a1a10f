"""Optimizers that torch lacks, as their papers have them, in the usual form: state by parameter, a loop over groups.

`ALL`: those by name, and torch's own, each built from the parameters of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Written(torch.optim.Optimizer):
    """What the optimizers below have in common: `update` steps one parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


def trust(p: Tensor, update: Tensor) -> Tensor:
    """The ratio of LARS and LAMB: of the whole parameter's length to the update's."""
    lengths = p.norm(), update.norm()
    return torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], torch.ones(()))


class Lion(Written):
    """Chen et al., 2023."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (first, second), average = group["betas"], state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (average * first + g * (1 - first)).sign())
        average.mul_(second).add_(g, alpha=1 - second)


class Lars(Written):
    """You, Gitman and Ginsburg, 2017."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decayed = g + group["weight_decay"] * p
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["betas"][0]).add_(trust(p, decayed) * decayed)
        p.sub_(group["lr"] * buffer)


class Lamb(Written):
    """You et al., 2020; the number of steps is a Python number."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (first, second), step = group["betas"], state.get("step", 0) + 1
        mean, square = (state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
        state["step"] = step
        mean.mul_(first).add_(g, alpha=1 - first)
        square.mul_(second).addcmul_(g, g, value=1 - second)
        update = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + 1e-6)
        update += group["weight_decay"] * p
        p.sub_(group["lr"] * trust(p, update) * update)


class Shampoo(Written):
    """Gupta, Koren and Singer, 2018: a square matrix for each dimension of the parameter."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        update = g
        for at, size in enumerate(p.shape):
            sides = g.transpose(0, at).reshape(size, -1)
            precondition = state.setdefault(f"precondition_{at}", 0.1 * torch.eye(size))
            precondition.add_(sides @ sides.t())
            values, vectors = torch.linalg.eigh(precondition)
            root = vectors @ torch.diag(values.clamp(min=1e-6) ** (-0.5 / p.dim())) @ vectors.t()
            update = (root @ update.transpose(0, at).reshape(size, -1)).reshape(update.transpose(0, at).shape)
            update = update.transpose(0, at)
        p.sub_(group["lr"] * update)


class Adam8bit(Written):
    """Adam with moments in eight bits, a scale for each block of 64 elements (Dettmers et al., 2022)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        moments = []
        for name, new, beta in zip(("exp_avg", "exp_avg_sq"), (g, g * g), group["betas"], strict=True):
            moment = self.wide(state, name, p) * beta + new * (1 - beta)
            blocks = nn.functional.pad(moment.reshape(-1), (0, -moment.numel() % 64)).view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127
            state[name], state[f"{name}_scale"] = (blocks / scale).round().to(torch.int8), scale
            moments.append(moment / (1 - beta ** float(state["step"])))
        p.sub_(group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + 1e-8))

    def wide(self, state: dict[str, Any], name: str, p: Tensor) -> Tensor:
        if name not in state:
            return torch.zeros_like(p)
        found: Tensor = state[name] * state[f"{name}_scale"]
        return found.view(-1)[: p.numel()].view(p.shape)


def muon(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """As it is used: for matrices, with AdamW for the rest."""
    matrices, rest = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


Build = Callable[[list[nn.Parameter]], Any]
ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop")
WHOLE: dict[str, Build] = {
    "muon": muon,
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.02),
    **{
        kind.__name__.lower(): lambda parameters, kind=kind: kind(parameters, lr=0.02)
        for kind in (Lion, Lars, Lamb, Shampoo, Adam8bit)
    },
}
ALL = {name: getattr(torch.optim, name) for name in ELEMENTWISE} | WHOLE
