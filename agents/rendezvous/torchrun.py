"""The entry point `torchrun.handlers`, which plain torchrun loads for every --rdzv-backend.

So nothing is imported here, and its process and its workers' environment stay as they are, until the backend is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousHandler,
        RendezvousHandlerCreator,
        RendezvousParameters,
    )


def handler() -> RendezvousHandlerCreator:
    """The factory for torch's registry: makes a handler from `torchrun`'s parameters."""
    return _everstep


def _everstep(parameters: RendezvousParameters) -> RendezvousHandler:
    from .torchrun_handler import EverstepRendezvous

    return EverstepRendezvous(parameters)
