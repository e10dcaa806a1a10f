"""Objects that stay for the life of a process, such as those of imported modules, and Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Have the garbage collector never traverse what is made here: not meanwhile, nor later, nor in forks.

    Importing torch makes 200,000 objects. Collections meanwhile are an eighth of the import's time, and each full one
    later takes 0.2 s, in a worker in the middle of a step or of a recovery, and copies the pages that a fork shares.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
