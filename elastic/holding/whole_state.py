"""`optimizer.state_dict()` and `model.state_dict()` of a running job: the whole state, on any rank.

A rank holds the optimizer state of its own shards, and of several stages only its own layers. Hooks of torch's public
interface add the rest from the snapshot keepers, on request. Loading into a running job is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from everstep.elastic.contract.errors import UsageError

from .stack import LayerStack

Gather = Callable[[], dict[str, Any]]  # {"model": {name: tensor}, "optimizer": {name: {state: value}}}


def complete_optimizer(optimizer: Optimizer, stack: LayerStack, gather: Gather) -> None:
    """Make the optimizer's `state_dict()` return what torch's would, and its `load_state_dict()` raise."""
    names = {id(tensor): stack.spec.parameters[index].name for index, tensor in stack.parameter_of.items()}

    def add_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states: Mapping[str, Any] = gather()["optimizer"]
        found: dict[int, Any] = {}
        for group, numbers in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], numbers["params"], strict=True):
                name = names.get(id(parameter), "")
                if name in states:
                    found[number] = states[name]
        return {**state_dict, "state": found}

    def refuse(optimizer: Optimizer, state_dict: dict[str, Any]) -> NoReturn:
        raise UsageError(
            "optimizer.load_state_dict() was called after run.prepare or run.steps: the state of a running job is "
            "shared among its ranks. To resume from a checkpoint, let the job resume it (checkpoint=, resume=; "
            "everstep convert reads torch's); to change a rate, set it in optimizer.param_groups"
        )

    optimizer.register_state_dict_post_hook(add_state)
    optimizer.register_load_state_dict_pre_hook(refuse)


def complete_model(stack: LayerStack, gather: Gather) -> None:
    """Make `state_dict()` of the model, and of each of its modules, include the layers of other stages."""
    whole = {name: tensor.shape for name, tensor in stack.model.named_parameters(remove_duplicate=False)}

    def hook_of(path: str) -> Callable[..., None]:
        def add_layers(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
            if stack.reading or (path and prefix):  # a module within the requested one
                return
            names = {prefix + name.removeprefix(path): name for name in whole if name.startswith(path)}
            lacking = [key for key, name in names.items() if _shape(state_dict.get(key)) not in (None, whole[name])]
            if lacking:
                model = gather()["model"]
                state_dict.update({key: model[names[key]] for key in lacking})

        return add_layers

    for name, module in stack.model.named_modules():
        module.register_state_dict_post_hook(hook_of(f"{name}." if name else ""))


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
