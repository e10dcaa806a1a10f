"""From sums over the micro-batches of a step to its gradient and its loss (`loss_reduction`).

    mean    a micro-batch's loss is a mean over its samples; the step's is the mean over its micro-batches, with their
            numbers of samples as weights: these differ only in the last step of an epoch with last_batch="short"
    sum     it is a sum, and so is the step's
    tokens  it is a sum over tokens, which the script counts; the step's is the sum, divided by the count of all

The count of a step is known when the step is agreed on. So with "tokens" the gradient that keepers hold is the sum, and
the optimizer divides it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, WarningChannel, warn
from everstep.elastic.contract.settings import Settings
from everstep.elastic.protocol.agreement import Share

from .loss_scale import LossScale
from .order import StepSize

_SUM = 2  # torch's number for reduction="sum" in the autograd nodes of its loss functions


class Reduction:
    """How a job's gradients and losses are reduced.

    `accumulation`: by how much the script divides the loss of each micro-batch, where it is a mean. `skip_nonfinite`:
    a step whose gradient is not finite is left out; with a loss scaler it always is. `sparse_gradients`: whether a
    sparse gradient is made "dense", or refused ("refuse").
    """

    def __init__(
        self,
        settings: Settings,
        loss_scale: LossScale,
        channel: WarningChannel,
        *,
        skip_nonfinite: bool,
        accumulation: int,
        sparse_gradients: str,
    ) -> None:
        self.counts_tokens = settings.loss_reduction == "tokens"
        self._means = settings.loss_reduction == "mean"
        self._channel = channel
        self._looks = self._means and settings.micro_batches > 1 and settings.micro_batch_size > 1
        self._accumulation = accumulation
        self.loss_scale = loss_scale
        self.skip_nonfinite = skip_nonfinite or loss_scale.scaler is not None
        if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
            raise UsageError(f"accumulation must be a whole number of at least 1, got {accumulation!r}")
        if sparse_gradients not in ("refuse", "dense"):
            raise UsageError(f"sparse_gradients must be 'refuse' or 'dense', got {sparse_gradients!r}")
        self.densifies = sparse_gradients == "dense"
        if settings.micro_batches % accumulation:
            raise UsageError(
                f"accumulation={accumulation}: a step has {settings.micro_batches} micro-batches (global_batch_size / "
                "micro_batch_size), which must be a multiple of it"
            )

    def describe(self) -> str:
        """What has to be equal on all ranks, as text."""
        scaler = " with a loss scaler" if self.loss_scale.scaler is not None else ""
        return f"{scaler} accumulating over {self._accumulation}" if self._accumulation > 1 else scaler

    def weight(self, size: StepSize, micro_batch: int) -> float:
        """What the loss and the gradient of a micro-batch are multiplied by in the sums over a step of this size."""
        return size.weight(micro_batch) if self._means else 1.0

    def divisor(self, size: StepSize, *, scaled: bool) -> float:
        """What the sum of the gradients of a step's micro-batches is divided by, before the step is agreed on.

        `scaled`: they are of scaled losses.
        """
        scale = self.loss_scale.scale if scaled else 1.0
        return scale * (size.weights / self._accumulation if self._means else 1)

    def measured(self, returned: Any, loss_fn: object, step: int, micro_batch: int) -> tuple[Tensor, int]:
        """The loss and the number of tokens (or 0) of a micro-batch, of what `loss_fn` returned. Raises UsageError."""
        if not self.counts_tokens:
            _check_loss(returned, "the micro-batch's loss", step, micro_batch)
            if self._looks:
                self._looks = False
                if is_visibly_a_sum(returned, loss_fn):
                    text = (
                        'loss_fn gives a sum over the samples of a micro-batch (reduction="sum"), and the job has '
                        'loss_reduction="mean": the gradient is the mean of these sums, which grows with '
                        'micro_batch_size; give the job loss_reduction="sum", or the loss its mean'
                    )
                    warn(self._channel, Notice.LOSS_IS_A_SUM, text)
            return returned, 0
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise UsageError(
                f'loss_reduction="tokens": loss_fn must return (the sum of the losses of the micro-batch\'s tokens, '
                f"their number), got {_described(returned)}"
            )
        _check_loss(returned[0], "the sum of the losses first", step, micro_batch)
        return returned[0], whole_count(returned[1], "loss_fn")

    def agreed(self, share: Share, limit: float | None, size: StepSize) -> dict[str, Any]:
        """The fields of the agreement that concern loss and gradient. `limit`: of the gradient's norm."""
        tokens = share.tokens if self.counts_tokens else None
        norm = math.sqrt(share.norm.rounded()) / (tokens or 1)
        loss: float | None = None
        if share.losses:
            loss = share.loss.rounded()
            if self.counts_tokens:
                loss = loss / share.tokens if share.tokens else math.nan
            elif self._means:
                loss /= size.weights
        return {
            "loss": loss,
            "norm": norm,
            "scale": None if limit is None else min(1.0, limit / (norm + 1e-6)),
            "skip": tokens == 0 or (share.skip_nonfinite and not math.isfinite(norm)),
            "tokens": tokens,
        }


def is_visibly_a_sum(loss: Tensor, loss_fn: object) -> bool:
    """Whether a loss is, unscaled, what a loss function of torch gives with `reduction="sum"`."""
    if isinstance(loss_fn, nn.Module) and type(loss_fn).__module__ == nn.MSELoss.__module__:
        return bool(getattr(loss_fn, "reduction", None) == "sum")
    return bool(getattr(loss.grad_fn, "_saved_reduction", None) == _SUM)


def whole_count(count: Any, where: str) -> int:
    """A number of tokens, as an integer. Raises UsageError."""
    number = count.item() if isinstance(count, Tensor) and count.numel() == 1 else count
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1 << 53 or number % 1:
        raise UsageError(f"{where}: a number of tokens is a whole number of at least 0, got {_described(count)}")
    return int(number)


def _check_loss(loss: Any, what: str, step: int, micro_batch: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(f"loss_fn must return a tensor with one element ({what}), got {_described(loss)}")
    if not loss.requires_grad:
        raise UsageError(
            f"the loss of micro-batch {micro_batch} of step {step} depends on no trainable parameter (it has no "
            "grad_fn): nothing would be trained. Look for detach(), item(), torch.no_grad() or argmax between the "
            "model and the loss"
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.numel() != 1 else f"{value.item()}"
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"
