"""Where the workers of a node keep what `torch.compile` has made: in one folder of the job, as long as it runs.

A replacement finds there what the lost worker has compiled. Torch makes the folder when it compiles something, and
writes each file under another name first, so a worker that is killed leaves no half of one.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
PREFIX = "everstep-compiled-"


def new_folder(environment: Mapping[str, str]) -> str:
    """Where the folder of one node is to be; empty where the user has chosen one, which is left alone."""
    return "" if VARIABLE in environment else str(Path(tempfile.gettempdir(), PREFIX + secrets.token_hex(8)))


def remove(folder: str) -> None:
    """Remove a folder of ours, if there is one; what a process still writes there is not waited for."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
