"""Bytes between nodes that each kind of protection adds to a step, counted by the kernel at their interfaces.

Three nodes in network namespaces, one worker each, a version protected at every step: parity is made of stripes of two
shards and one parity block. What the step itself sends (partial sums, values) is what a job without protection sends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODES = ("none", "parity", "replicate", "replay")
NODES = 3
FIRST, LAST = 10, 60  # steps between which bytes are counted


def bytes_on_the_wire() -> dict[str, Any]:
    """Bytes per parameter and step, by kind of protection, beyond a step without it; or why it was not measured."""
    sys.path.insert(0, str(ROOT))
    from tests.jobs.hosts import Hosts
    from tests.jobs.networks import available

    able, reason = available()
    if not able:
        return {"not_measured": reason}
    counted: dict[str, float] = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder, Hosts(NODES, namespaces=True) as hosts:
            counted[mode] = _count(hosts, Path(folder), mode)
    added = {mode: round(counted[mode] - counted["none"], 2) for mode in MODES[1:]}
    return {"added_per_parameter_and_step": added, "step_itself": round(counted["none"], 2), "losses": 1}


def _count(hosts: Any, folder: Path, mode: str) -> float:
    import torch

    from tests.jobs.hosts import HostJob

    job = HostJob(hosts, folder, nnodes=f"{NODES}:{NODES}", steps=LAST + 5)
    flags = [f"--es-protection={mode}", "--es-snapshot-every=1", "--es-verify-every=0", f"--log-dir={folder}/logs"]
    job.launch(*range(NODES), flags=flags)
    job.reaches(FIRST)
    first, before = job.committed(), _sent()
    job.reaches(LAST)
    last, after = job.committed(), _sent()
    job.result()
    state = torch.load(folder / "state-0.pt", weights_only=True)
    parameters = sum(tensor.numel() for tensor in state["model"].values())
    return (after - before) / (last - first) / parameters


def _sent() -> int:
    """Bytes sent by the interfaces of all hosts so far."""
    from tests.jobs.networks import own_namespaces

    total = 0
    for name in own_namespaces():
        text = subprocess.run(["ip", "-n", name, "-s", "-j", "link"], capture_output=True, check=True, text=True).stdout
        links = [link for link in json.loads(text) if link["ifname"] == "eth0"]
        total += sum(link["stats64"]["tx"]["bytes"] for link in links)
    return total


if __name__ == "__main__":
    print(json.dumps(bytes_on_the_wire(), indent=2))
