"""What a script says about the gradient of a step: clipping, batches that are left out, tokens."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine

from .loop import Batches


class Gradients:
    """The part of `Run` that is about gradients."""

    _batches: Batches | None

    def _trained(self) -> Engine:
        raise NotImplementedError

    def clip_grad_norm_(self, max_norm: float) -> None:
        """Clip the step's whole gradient to this norm; call it in place of `torch.nn.utils.clip_grad_norm_`."""
        self._trained().adjustments.clip["norm"] = float(max_norm)

    def clip_grad_value_(self, limit: float) -> None:
        """Clip each element of the step's gradient to [-limit, limit], like `torch.nn.utils.clip_grad_value_`."""
        self._trained().adjustments.clip["value"] = float(limit)

    def skip(self) -> None:
        """Skip the current micro-batch, in a loop over `prepare`'s batches; then `continue`.

        Its gradient counts as zero, so the step's mean is still over all its micro-batches.
        """
        if self._batches is None:
            raise UsageError(
                "run.skip() is for a loop over run.prepare's batches; with run.steps(..., skip_nonfinite=True) a step "
                "whose gradient is not finite is left out"
            )
        self._batches.skip()

    def gather_batch(self, embeddings: Tensor) -> Tensor:
        """The embeddings of the whole global batch, of (global_batch_size, embedding_size), in the order of samples.

        For a loss over all samples of a step, such as a contrastive one, in a loop over
        `prepare(..., embedding_size=)`'s batches: called once in each turn, before the loss, with the embeddings of the
        turn's micro-batch, of (micro_batch_size, embedding_size). Their gradient flows through the result; those of the
        other micro-batches are values. Raises UsageError for another shape or place.
        """
        if self._batches is None:
            raise UsageError("run.gather_batch(embeddings) is for a loop over run.prepare's batches")
        return self._batches.gather(embeddings)

    def is_due(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer steps in the batch of this turn of the loop, with `prepare(..., every=)`.

        In the other batches its `step()` does nothing, and what leads to it may be left out. `optimizer`: one that
        `prepare` returned.
        """
        if self._batches is None:
            raise UsageError("run.is_due(optimizer) is for a loop over run.prepare's batches")
        return self._batches.is_due(optimizer)

    @property
    def is_collecting(self) -> bool:
        """Whether this turn of a loop with `run.gather_batch` is one in which the batch's embeddings are put together.

        What the script computes of them then, such as the loss, has no meaning, and no gradient of it is used.
        """
        return self._batches is not None and self._batches.is_collecting

    def count_tokens(self, count: int | Tensor) -> None:
        """Say how many tokens the loss of this micro-batch is a sum over, with `loss_reduction="tokens"`.

        For a loop over `prepare`'s batches, before `optimizer.step()`: a whole number, or a tensor with one element.
        Several calls in one turn add up. The step's gradient is divided by the number of all tokens of the step.
        """
        if self._batches is None:
            raise UsageError(
                "run.count_tokens(n) is for a loop over run.prepare's batches; with run.steps the loss_fn returns "
                "(sum, number of tokens)"
            )
        self._batches.count_tokens(count)

    @property
    def is_step_end(self) -> bool:
        """Whether this turn of the loop over `prepare`'s batches ends a step here.

        Before `optimizer.step()`: whether the micro-batch is the last one of the step on this rank; after it: whether
        the step was committed. If a rank is lost in between, others may get more micro-batches of the step; so what has
        to happen once per step belongs into a function of `run.on_step`.
        """
        return self._batches is not None and self._batches.is_step_end

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out since their gradient was not finite: with `scaler=` or `skip_nonfinite`.

        Equal on all ranks between steps, saved and restored.
        """
        return self._trained().reduction.loss_scale.skipped
