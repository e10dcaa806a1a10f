"""What `run.average` returns: it stands where a script has an `AveragedModel` of `torch.optim.swa_utils`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from everstep.elastic.contract.errors import UsageError


class MovingAverage:
    """The moving averages of a model's parameters, which the runtime keeps."""

    def __init__(self, model: nn.Module, decay: float, whole_state: Callable[[], dict[str, Any]]) -> None:
        self._model = model
        self._decay = decay
        self._trained = model  # what is trained, of which the model may be a part
        self._whole_state = whole_state

    def train_within(self, trained: nn.Module) -> tuple[float, nn.Module]:
        """The decay and the model, which is what is trained or one of several. Raises UsageError if it is neither."""
        if trained is not self._model and not (isinstance(trained, nn.ModuleList) and self._model in list(trained)):
            raise UsageError("run.average was called with another model than run.prepare or run.steps")
        self._trained = trained
        return self._decay, self._model

    @property
    def module(self) -> MovingAverage:
        """Itself, since scripts write `average.module.state_dict()`."""
        return self

    def update_parameters(self, model: nn.Module) -> None:
        """Does nothing: the runtime averages once per step."""

    def state_dict(self) -> dict[str, Any]:
        """The averages under the names of the model's `state_dict()`; buffers and frozen parameters as they are."""
        averages = self._whole_state()["average"]
        first = {parameter: name for name, parameter in self._trained.named_parameters()}
        named = self._model.named_parameters(remove_duplicate=False)  # a tied parameter has several names
        ours = {name: averages[first[p]] for name, p in named if first[p] in averages}
        return {**self._model.state_dict(), **ours}
