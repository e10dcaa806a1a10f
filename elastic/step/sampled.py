"""The order that a DataLoader's sampler gives, as a function of (seed, epoch): each rank works it out for itself.

A copy of the sampler is iterated over with generators that are seeded for the epoch. So the order is the same on all
ranks and after a resume, if the sampler draws from torch's, NumPy's or Python's global generators, or from its own
`generator`, and keeps nothing from one iteration to the next.

A script may change a sampler between epochs, such as its weights. Then a worker that joins has another sampler, unless
the script gives it what the others' depends on. So in `run.epochs` ranks agree on the order of each epoch when its
batches begin, and a rank whose sampler gives another one gets it from those whose sampler has given all so far.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, WarningChannel, warn

from .devices import generators_kept, seed_generators
from .order import derive_seed

SAMPLER = "sampler"  # its name among the registered objects
SENT = 1 << 22  # samples: longer orders are compared, and not sent to ranks that lack them
KEPT = 2  # epochs whose order is kept

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Trust(IntEnum):
    """What a rank knows of its own sampler."""

    WRONG = 0  # it gives another order of an epoch than the job has
    UNKNOWN = 1  # the rank, or the job, begins here, and the sampler gives another order of the epoch before
    RIGHT = 2  # it has given the job's order of the last epoch


class Drawn(NamedTuple):
    """The digest of the order that a rank's sampler gives for an epoch, and how far it may be that of the job."""

    digest: str
    trust: Trust


def has_fixed_batches(loader: DataLoader[Any]) -> bool:
    """Whether a loader cuts batches of one size out of the order of its samples, as torch's and torchdata's do."""
    return loader.batch_size is not None and _is_torchs(loader.batch_sampler, BatchSampler)


def is_permutation(sampler: Any) -> bool:
    """Whether it is what `shuffle=True` gives: every sample once, in a random order."""
    random = _is_torchs(sampler, RandomSampler)
    return random and not sampler.replacement and bool(sampler.num_samples == len(sampler.data_source))


def _is_torchs(found: object, kind: type) -> bool:
    """Whether it is of exactly this class of torch's, or of the one with this name that torchdata's loaders have."""
    own = type(found)
    return own is kind or (own.__name__ == kind.__name__ and own.__module__.startswith("torchdata."))


class SampledOrder:
    """The indices of each epoch by `sampler`, for a dataset of `length` samples. Raises UsageError.

    Where ranks agree on the order of an epoch: `draw` it, `choose` one, and `take` that.
    """

    def __init__(self, sampler: Any, length: int, batch_size: int, seed: int, channel: WarningChannel) -> None:
        self._sampler = sampler
        self._channel = channel
        self._name = type(sampler).__name__
        self._length = length
        self._seed = seed
        self._unchanged = lru_cache(maxsize=KEPT)(self._draw_unchanged)
        self._agreed: dict[int, Indices] = {}  # epoch -> the order that ranks agreed on
        self._own: tuple[int, str, Indices] | None = None  # the order that was drawn last: epoch, digest, indices
        self._trust = Trust.RIGHT
        self._state: dict[str, Any] = {"epoch": -1, "digest": ""}  # of the newest order that was agreed on
        self.first = self._draw(0)  # what ranks compare
        self.samples = len(self.first)
        if self.samples < batch_size:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives {self.samples} samples, fewer than one batch "
                f"(global_batch_size = {batch_size}): let it give more, or choose a smaller batch"
            )
        if not np.array_equal(self.first, self._draw(0)):
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives another order when it is iterated over again: draw "
                "random numbers from torch's, NumPy's or Python's global generators, or from its attribute generator, "
                "which are seeded for each epoch, and keep no position in it"
            )

    def sample(self, epoch: int, offset: int) -> int:
        """The index of a sample of an epoch."""
        agreed = self._agreed.get(epoch)
        return int((self._unchanged(epoch) if agreed is None else agreed)[offset])

    def draw(self, epoch: int) -> Drawn:
        """The order that this rank's sampler gives now."""
        indices = self._draw(epoch)
        self._check_length(indices, epoch)
        digest = _digest(indices)
        self._own = epoch, digest, indices
        last = self._state["epoch"]
        if last == epoch:
            self._trust = Trust.RIGHT if self._state["digest"] == digest else Trust.WRONG
        elif last >= 0 and not self._agreed:  # of a rank that joined, or a job that was resumed
            self._trust = Trust.RIGHT if self._state["digest"] == _digest(self._draw(last)) else Trust.UNKNOWN
        return Drawn(digest, self._trust)

    def choose(self, drawn: Mapping[int, Drawn], epoch: int) -> int:
        """The rank whose order is that of the job. Raises UsageError if there is none, or more than one order."""
        trust = max(one.trust for one in drawn.values())
        if trust is Trust.WRONG:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives another order of epoch {epoch} than the one with which "
                "the job had begun it, and no rank is left that has that: what the sampler depends on, such as weights "
                "that the script changes, must be in run.state, and be given to it in front of the loop over the "
                "batches"
            )
        found = {rank: one.digest for rank, one in sorted(drawn.items()) if one.trust is trust}
        first, *others = found
        other = next((rank for rank in others if found[rank] != found[first]), None)
        if other is not None:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives one order of epoch {epoch} on rank {first}, and "
                f"another on rank {other}: what it depends on must be equal on all ranks"
            )
        return first

    def own(self, epoch: int) -> Indices | None:
        """The order that was drawn here for an epoch, for ranks that lack it; None if it is too long to be sent."""
        assert self._own is not None
        assert self._own[0] == epoch
        return self._own[2].astype(np.int32 if self._length < 1 << 31 else np.int64) if self.samples <= SENT else None

    def take(self, epoch: int, digest: str, order: Indices | None) -> None:
        """The ranks agreed on an order. Raises UsageError if it is not there."""
        if self._own is None or self._own[0] != epoch:
            self.draw(epoch)
        assert self._own is not None
        own = self._own[2]
        if self._own[1] == digest:
            self._warn_of_doubt(epoch)
            self._trust = Trust.RIGHT
        elif order is None:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives another order of epoch {epoch} here than on the other "
                f"ranks, and orders of more than {SENT} samples are not sent: keep what it depends on in run.state, "
                "and give it to the sampler in front of the loop over the batches"
            )
        else:
            self._trust, own = Trust.WRONG, order.astype(np.int64)
            warn(
                self._channel,
                Notice.SAMPLER_DIFFERS,
                f"the DataLoader's sampler ({self._name}) gives another order of epoch {epoch} here than on the ranks "
                "that were there before, and theirs is used; if they are all lost, the job ends with an error. Keep "
                "what the sampler depends on, such as weights that the script changes, in run.state, and give it to "
                "the sampler in front of the loop over the batches",
            )
        self._agreed[epoch] = own
        for old in sorted(self._agreed)[:-KEPT]:
            del self._agreed[old]
        self._state = {"epoch": epoch, "digest": digest}

    def _warn_of_doubt(self, epoch: int) -> None:
        if self._trust is Trust.UNKNOWN and not self._agreed:
            warn(
                self._channel,
                Notice.SAMPLER_DIFFERS,
                f"the DataLoader's sampler ({self._name}) gives another order of epoch {self._state['epoch']} than the "
                f"one that the job had, so whether that of epoch {epoch} is right was not checked: if the script "
                "changes the sampler, such as its weights, it must keep them in run.state, and give them to it in "
                "front of the loop over the batches",
            )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)

    def _draw(self, epoch: int) -> Indices:
        return draw(self._sampler, self._length, derive_seed("sampler", self._seed, epoch), epoch)

    def _draw_unchanged(self, epoch: int) -> Indices:
        """The order of an epoch, where it may be drawn at any time, and so must not depend on when that is."""
        indices = self._draw(epoch)
        self._check_length(indices, epoch)
        if not np.array_equal(self.first, self._draw(0)):
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) was changed, such as its weights, and gives another order of "
                "epoch 0 than it did: change it in a loop over run.epochs(), in front of the loop over run.prepare's "
                "batches, where all ranks take its order"
            )
        return indices

    def _check_length(self, indices: Indices, epoch: int) -> None:
        if len(indices) != self.samples:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives {len(indices)} samples in epoch {epoch}, and "
                f"{self.samples} in the first: let it give as many in each"
            )


def _digest(indices: Indices) -> str:
    return hashlib.sha256(indices.tobytes()).hexdigest()


def draw(sampler: Any, length: int, seed: int, epoch: int | None = None) -> Indices:
    """The indices that a sampler gives in one iteration with generators of this seed, of `length` samples.

    `epoch`: for the `set_epoch` of one that has it. This process's generators stay as they were. Raises UsageError.
    """
    with generators_kept():
        seed_generators(seed)
        copied = copy.copy(sampler)
        if isinstance(getattr(copied, "generator", None), torch.Generator):
            copied.generator = torch.Generator(copied.generator.device).manual_seed(seed)
        if epoch is not None and callable(getattr(copied, "set_epoch", None)):
            copied.set_epoch(epoch)
        drawn = np.fromiter((int(index) for index in copied), np.int64)
    wrong = drawn[(drawn < 0) | (drawn >= length)]
    if wrong.size:
        raise UsageError(
            f"the DataLoader's sampler ({type(sampler).__name__}) gives index {wrong[0]}, and the dataset has {length} "
            "samples"
        )
    return drawn
