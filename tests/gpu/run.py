"""`make gpu`: training with kills on one GPU, then the probe; prints one JSON object, and keeps it in docs/gpu/.

Without a GPU it says so in one line, and ends with status 0. With `--device cpu` only the training runs, on the CPU:
that tries the comparison, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PROBE = Path(__file__).with_name("probe") / "probe.py"
BUDGET_S = 470.0  # for everything; `make gpu` is to take eight minutes at most
TRAINING_S = 300.0
PROBE_LEAST_S = 60.0
STEPS = 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if everything that ran went well, or nothing could run; 1 if bytes differ or a part failed."""
    options = _parse(arguments)
    if options.device == "cuda" and (reason := why_no_gpu()):
        print(f"make gpu: skipped, no GPU: {' '.join(reason.split())}")
        return 0
    make_importable()
    began_s = time.monotonic()
    results: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "machine": machine(options.device),
    }
    place = options.json or (ROOT / "docs" / "gpu" / name_of(results) if options.device == "cuda" else None)
    if options.only in ("", "training"):
        results["training"] = _train(options)
        _write(place, results)
    if options.device == "cuda" and options.only in ("", "probe"):
        left_s = options.budget_s - (time.monotonic() - began_s)
        results["probe"] = _probe(left_s) if left_s >= PROBE_LEAST_S else {"skipped": "the time is used up"}
    results["wall_s"] = round(time.monotonic() - began_s, 1)
    _write(place, results)
    print(json.dumps(results))
    return 0 if _went_well(results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="where the results go (default for a GPU: docs/gpu/DEVICE-DATE.json)")
    parser.add_argument("--only", choices=("training", "probe"), default="", help="leave the other part out")
    parser.add_argument("--case", action="append", default=[], help="of the training, by name (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a smaller model")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything")
    return parser.parse_args(arguments)


def why_no_gpu() -> str:
    """Why there is no GPU that torch can use; empty if there is. Asked in a process of its own."""
    ask = "import torch; print(torch.zeros(1, device='cuda').device if torch.version.cuda else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return "" if done.stdout.strip() else "this torch is built without CUDA"


def make_importable() -> None:
    """Where everstep is not installed, as on a machine that was lent: from the sources."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def machine(device: str) -> dict[str, str]:
    """What the results hold for."""
    ask = "import torch; print(torch.__version__)"
    if device == "cuda":
        ask += "; print(torch.cuda.get_device_name(0)); print(torch.version.cuda)"
    answers = _output(sys.executable, "-c", ask).splitlines()
    names = ("torch", "device", "cuda")
    found = {**dict(zip(names, answers, strict=False)), "python": platform.python_version()}
    if device == "cuda":
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def name_of(results: dict[str, Any]) -> str:
    """A file name of the device and the date."""
    device = "-".join(results["machine"].get("device", "gpu").lower().split())
    return f"{device}-{results['started'][:10]}.json"


def _train(options: argparse.Namespace) -> dict[str, Any]:
    from tests.gpu.training import compare

    budget_s = options.budget_s if options.only else min(TRAINING_S, options.budget_s)
    return compare(options.device, options.steps, small=options.small, budget_s=budget_s, cases=options.case)


def _probe(budget_s: float) -> dict[str, Any]:
    command = [sys.executable, str(PROBE), "--quick", "--budget-s", str(budget_s - 15)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=budget_s)
    except subprocess.TimeoutExpired:
        return {"failed": "it did not end in time"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"failed": f"status {done.returncode}: {done.stdout[-1000:]}"}
    return {**answer, "status": done.returncode}


def _went_well(results: dict[str, Any]) -> bool:
    trained, probed = results.get("training"), results.get("probe")
    return (trained is None or trained["identical"]) and (probed is None or probed.get("status", 0) == 0)


def _write(place: Path | None, results: dict[str, Any]) -> None:
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(results, indent=1) + "\n")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that `tests` is found
    sys.exit(main())
