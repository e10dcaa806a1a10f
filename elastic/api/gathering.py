"""The embeddings of a whole global batch, for losses that compare all of its samples, such as contrastive ones.

A turn of the loop has one micro-batch, and a loss over the global batch needs the embeddings of the others. So each
batch is handed out twice, as to two optimizers that take turns: in the first turns each micro-batch gives its
embeddings, and in the second ones each finds those of all, with the gradient of its own (GradCache: Gao et al., 2021).
Between the two lies a step of the job, which sums the embeddings as it sums gradients: they are the gradient of a
parameter with a row for each sample, and its optimizer takes the gradient for the value. So a loss of ranks costs
nothing of its own here: embeddings are agreed on, protected and recovered as parameters are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import Settings
from everstep.elastic.holding.several_optimizers import Collector, SeveralOptimizers


class BatchEmbeddings(nn.Module):
    """`rows`: the embeddings of a global batch of samples, in their order, each of `size` numbers in float32."""

    def __init__(self, settings: Settings, size: int, like: Tensor) -> None:
        super().__init__()
        self._each, self._parts = settings.micro_batch_size, settings.micro_batches
        self.rows = nn.Parameter(torch.zeros(settings.global_batch_size, size, device=like.device))

    def give(self, own: Tensor, micro_batch: int) -> None:
        """Make a micro-batch's embeddings the gradient of its rows. Raises UsageError."""
        expected = (self._each, self.rows.shape[1])
        if not isinstance(own, Tensor) or tuple(own.shape) != expected:
            got = f"one of shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"a {type(own).__name__}"
            raise UsageError(
                f"run.gather_batch(embeddings) takes a tensor of shape {expected}, (micro_batch_size, embedding_size), "
                f"got {got}"
            )
        rows = torch.zeros_like(self.rows)
        rows[self._place(micro_batch)] = own.detach() * self._parts  # the step's gradient is the mean
        self.rows.grad = rows

    def whole(self, own: Tensor, micro_batch: int, *, given: bool) -> Tensor:
        """The embeddings of the batch, with the gradient of a micro-batch's own.

        `given`: all have given theirs. Else its own stand in for those of the others: they are finite, and no more.
        """
        if not given:
            return own.repeat(self._parts, 1)
        place, rows = self._place(micro_batch), self.rows.detach().to(own.dtype)
        live = own.view_as(own)
        if live.requires_grad:
            live.register_hook(self._times_parts)  # type: ignore[no-untyped-call]
        return torch.cat([rows[: place.start], live, rows[place.stop :]])

    def _times_parts(self, gradient: Tensor) -> Tensor:
        """Each micro-batch has a part of the gradient, of which the step takes the mean."""
        return gradient * self._parts

    def _place(self, micro_batch: int) -> slice:
        return slice(micro_batch * self._each, (micro_batch + 1) * self._each)


def with_embeddings(
    models: Any, optimizer: Any, settings: Settings, size: int, updates: str
) -> tuple[nn.ModuleList, SeveralOptimizers, BatchEmbeddings]:
    """The model or models (as a ModuleList) and the optimizer, with the embeddings and what collects them in front.

    Raises UsageError for what a loop that gathers embeddings cannot have.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"embedding_size is how many numbers run.gather_batch takes of a sample, got {size!r}")
    if settings.loss_reduction != "mean":
        raise UsageError(
            f'embedding_size={size} needs loss_reduction="mean", got {settings.loss_reduction!r}: each micro-batch '
            "computes the loss of the whole batch, and the step takes their mean"
        )
    if settings.epochs and settings.last_batch == "short":
        raise UsageError(f'embedding_size={size} needs batches of one size: last_batch="drop" or "pad", got "short"')
    if isinstance(optimizer, SeveralOptimizers) and len(optimizer.parts) > 1:
        raise UsageError(f"embedding_size={size}: run.prepare takes one optimizer then, got {len(optimizer.parts)}")
    if updates != "alternating":
        raise UsageError(f"embedding_size={size} needs updates='alternating', got {updates!r}")
    parameter = next(iter(models.parameters()), None) if isinstance(models, nn.Module) else None
    if parameter is None:
        raise UsageError(
            f"the model of run.prepare must be a torch Module with parameters, got {type(models).__name__}"
        )
    embeddings = BatchEmbeddings(settings, size, parameter)
    trained = list(models) if isinstance(models, nn.ModuleList) else [models]
    parts = optimizer.parts if isinstance(optimizer, SeveralOptimizers) else [optimizer]
    collector = Collector([embeddings.rows])
    return nn.ModuleList([*trained, embeddings]), SeveralOptimizers([collector, *parts], alternating=True), embeddings
