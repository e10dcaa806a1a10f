"""`everstep demo`: a job that loses its workers again and again, and the same job left alone; then the comparison."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..comms.process import die_with_parent
from ..elastic.order import DataOrder
from ..elastic.progress import Fault
from . import job

WORKERS = 4
NODES = 2
TIMEOUT_S = 600.0
FAULTS = (
    Fault(rank=1, step=5, phase="compute", after=2),
    Fault(rank=2, step=12, phase="reduce"),
    Fault(rank=0, step=19, phase="update"),
    Fault(rank=1, step=26, phase="agree", incarnation=1),  # these two at once,
    Fault(rank=3, step=26, phase="agree"),  # one of each stage
    Fault(rank=2, step=33, phase="commit", incarnation=1),
    Fault(rank=3, step=40, phase="compute", incarnation=1, after=1),
    Fault(rank=0, step=40, phase="recover", incarnation=1),  # while the one before is recovered from
    Fault(rank=1, step=47, phase="compute", incarnation=2, kind="stop"),  # hangs instead of dying
    Fault(rank=2, step=53, phase="restore", incarnation=2),
    Fault(rank=3, step=53, phase="compute", incarnation=2),
)


class DemoError(Exception):
    """The demo's job did not run to its end."""


@dataclass(frozen=True)
class Outcome:
    """What one run of the job left: its events, and the digest of what it learned."""

    events: list[dict[str, Any]]
    digest: str
    parameters: int

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]


def demo(arguments: Sequence[str]) -> int:
    """Run the demo; exit status 1 if the two runs are not identical."""
    parse = argparse.ArgumentParser(prog="everstep demo", description="Lose workers on purpose, and compare.")
    parse.add_argument("--json", action="store_true", help="print one JSON object last")
    own = parse.parse_args(list(arguments))
    console = Console(stderr=own.json, width=None if sys.stdout.isatty() else 130)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        console.print(
            f"A byte-level GPT on {WORKERS} workers, {job.STAGES} stages, {NODES} node agents, {job.STEPS} steps. "
            f"{len(FAULTS)} faults are injected."
        )
        disturbed = _run(FAULTS, console, "with faults")
        console.print("The same job, left alone:")
        reference = _run((), console, "undisturbed")
    except DemoError as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
    summary = summarise(disturbed, reference)
    _show(summary, console)
    if own.json:
        print(json.dumps(summary))
    return 0 if summary["identical"] else 1


# ---------------------------------------------------------------- running


def _run(faults: Sequence[Fault], console: Console, title: str) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="everstep-demo-") as folder:
        events, summary = Path(folder, "events.jsonl"), Path(folder, "summary.json")
        events.touch()
        launchers = _launch(faults, events, summary, Path(folder))
        try:
            lines = list(_watch(launchers, events, console, title))
        finally:
            for launcher in launchers:
                launcher.kill()
                launcher.wait()
        if any(launcher.returncode != 0 for launcher in launchers) or not summary.exists():
            raise DemoError(f"the job ended early:\n{Path(folder, 'log').read_text()[-3000:]}")
        result = json.loads(summary.read_text())
        return Outcome(lines, result["digest"], result["parameters"])


def _launch(faults: Sequence[Fault], events: Path, summary: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "everstep", "run", "--nnodes", str(NODES), "--rdzv-backend", "c10d"]
    command += ["--rdzv-id", "demo", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--nproc-per-node", str(WORKERS // NODES)]
    script = [str(Path(job.__file__)), str(summary)]
    environment = {**os.environ, Fault.VARIABLE: json.dumps([vars(fault) for fault in faults])}
    log = (folder / "log").open("ab")

    def start(flags: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, *flags, *script], env=environment, stdout=log, stderr=log, preexec_fn=die_with_parent
        )

    first = start(["--es-events", str(events)])
    deadline = time.monotonic() + 60
    while not _listens(port) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return [first, *(start([]) for _ in range(NODES - 1))]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _watch(
    launchers: Sequence[subprocess.Popen[bytes]], events: Path, console: Console, title: str
) -> Iterator[dict[str, Any]]:
    """Yield the job's events as they come, and show them."""
    deadline = time.monotonic() + TIMEOUT_S
    with events.open() as stream, console.status("starting ...") as status:
        while True:
            running = any(launcher.poll() is None for launcher in launchers)
            for line in stream:
                event = json.loads(line)
                _tell(event, console, status, title)
                yield event
            if not running:
                return
            if time.monotonic() > deadline:
                raise DemoError(f"the job did not end within {TIMEOUT_S:g} s")
            time.sleep(0.05)


def _tell(event: dict[str, Any], console: Console, status: Any, title: str) -> None:
    kind = event["event"]
    if kind == "committed":
        text = f"{title}: step {event['step'] + 1}/{job.STEPS}  loss {event['loss']:.4f}  {event['layout']}"
        status.update(text)
        if (event["step"] + 1) % 10 == 0:
            console.print(text, highlight=False)
    elif kind == "worker_died":
        console.print(
            f"  [red]rank {event['rank']}[/red] lost in step {event['step']} ({event['phase']}): {event['cause']}",
            highlight=False,
        )
    elif kind == "recovered":
        console.print(
            f"  recovered in {event['total_s']:.3f} s, of which {event['recompute_s']:.3f} s compute; "
            f"{event['redone_micro_batches']} micro-batches redone",
            highlight=False,
        )
    elif kind == "joined":
        console.print(f"  rank {event['ranks'][0]} is back: {event['layout']}", highlight=False)


# ---------------------------------------------------------------- comparing


def summarise(disturbed: Outcome, reference: Outcome) -> dict[str, Any]:
    """The demo's JSON object."""
    ledgers = [[(e["step"], e["loss"], e["digest"]) for e in run.named("committed")] for run in (disturbed, reference)]
    losses = [loss for _, loss, _ in ledgers[0]]
    return {
        "steps": len(losses),
        "workers": WORKERS,
        "stages": job.STAGES,
        "parameters": disturbed.parameters,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "kills": len(disturbed.named("worker_died")),
        "faults": [_fault(event) for event in disturbed.named("recovered")],
        "samples_used_once": _samples_used_once([step for step, _, _ in ledgers[0]]),
        "digest": disturbed.digest,
        "digest_reference": reference.digest,
        "identical": ledgers[0] == ledgers[1] and disturbed.digest == reference.digest and len(losses) == job.STEPS,
    }


_TIMES = ("detect_s", "abort_s", "agree_s", "edit_s", "restore_s", "recompute_s", "total_s")


def _fault(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": event["interrupted_step"],
        "kind": "hang" if event["why"].startswith("hung") else "kill",
        "target": ",".join(f"rank {rank}" for rank in event["ranks"]),
        "phase": event["phase"],
        **{name: round(event[name], 4) for name in _TIMES},
        "redone_micro_batches": event["redone_micro_batches"],
        "lost_steps": event["lost_steps"],
    }


def _samples_used_once(steps: Sequence[int]) -> bool:
    """Audit the ledger: every step once, and no sample twice (the run is shorter than an epoch)."""
    from .text import SourceText

    order = DataOrder(
        samples=len(SourceText(job.CONFIG.context)),
        global_batch_size=job.GLOBAL_BATCH_SIZE,
        micro_batch_size=job.MICRO_BATCH_SIZE,
        seed=job.SEED,
    )
    used = [i for step in steps for batch in range(order.micro_batches) for i in order.indices(step, batch)]
    return list(steps) == list(range(len(steps))) and len(set(used)) == len(used)


def _show(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="Faults", caption="seconds from the fault to the next committed step")
    columns = ("step", "kind", "target", "phase", "detect", "abort", "agree", "edit", "restore", "compute", "total")
    for column in (*columns, "redone", "lost steps"):
        table.add_column(column, justify="left" if column in ("kind", "target", "phase") else "right")
    for fault in summary["faults"]:
        times = [f"{fault[name]:.3f}" for name in _TIMES]
        named = [str(fault["step"]), fault["kind"], fault["target"], fault["phase"]]
        table.add_row(*named, *times, str(fault["redone_micro_batches"]), str(fault["lost_steps"]))
    console.print(table)
    console.print(
        f"{summary['steps']} steps, loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, "
        f"{summary['kills']} workers lost, samples used once: {'yes' if summary['samples_used_once'] else 'NO'}",
        highlight=False,
    )
    console.print(f"digest     {summary['digest']}\nreference  {summary['digest_reference']}", highlight=False)
    console.print(f"identical: {'yes' if summary['identical'] else 'NO'}", style="bold")
