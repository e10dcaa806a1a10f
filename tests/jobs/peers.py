"""The frameworks whose checkpoints are converted: run in a separate environment, `make peers`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"


def run_peer(script: Path, *arguments: str | Path, timeout_s: float = 240) -> str:
    """Run a script with the frameworks' interpreter; returns what it printed. Skips the test if there is none."""
    if not PYTHON.exists():
        pytest.skip("the environment of the peers is not installed: make peers")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [PYTHON, script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{script.name} {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
