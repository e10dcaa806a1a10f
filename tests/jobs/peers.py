"""The frameworks whose checkpoints are converted: run in a separate environment, `make peers`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from . import finish, launch

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def elastic_peer(script: Path, *arguments: str | Path, flags: Sequence[str], faults: Sequence[Any] = ()) -> str:
    """Run a job whose script uses the frameworks, under `everstep run`; returns what was printed."""
    check_installed()
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EVERSTEP_FAULTS": json.dumps(list(faults))}
    process = launch(script, [*map(str, arguments)], [*flags], environment, python=PYTHON)
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    return output


def check_installed() -> None:
    """Skip the test if the frameworks are not there."""
    if not PYTHON.exists():
        pytest.skip("the environment of the peers is not installed: make peers")


def run_peer(script: Path, *arguments: str | Path, timeout_s: float = 240) -> str:
    """Run a script with the frameworks' interpreter; returns what it printed. Skips the test if there is none."""
    check_installed()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    environment.update(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [PYTHON, script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{script.name} {arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
