"""`everstep demo`: a job whose workers are killed repeatedly, the same job without faults, and a comparison."""

from __future__ import annotations

import argparse
import json
import os
import signal
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

from everstep.comms.base.process import die_with_parent
from everstep.elastic.contract.faults import Fault
from everstep.elastic.step.order import DataOrder

from . import job

WORKERS = 4
NODES = 4
TIMEOUT_S = 600.0
FAULTS = (
    Fault(rank=1, step=5, phase="compute", after=2),
    Fault(rank=2, step=9, phase="reduce"),
    Fault(rank=3, step=14, phase="update", kind="node"),  # agent, keeper and worker at the same instant
    Fault(rank=0, step=20, phase="update"),
    Fault(rank=1, step=26, phase="agree", incarnation=1),  # these two at once,
    Fault(rank=2, step=26, phase="agree", incarnation=1),  # one of each stage
    Fault(rank=0, step=31, phase="commit", incarnation=1),
    Fault(rank=2, step=36, phase="compute", incarnation=2, after=1, kind="node"),
    Fault(rank=1, step=42, phase="compute", incarnation=2, after=1),
    Fault(rank=0, step=42, phase="recover", incarnation=2),  # during the recovery from the one before
    Fault(rank=1, step=48, phase="compute", incarnation=3, kind="stop"),  # hangs instead of dying
    Fault(rank=0, step=54, phase="restore", incarnation=3),
    Fault(rank=1, step=54, phase="compute", incarnation=4),
)


class DemoError(Exception):
    """The demo's job failed."""


@dataclass(frozen=True)
class DemoRun:
    """The result of one run of the job: its events, and the digest of the trained state."""

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
            f"{len(FAULTS)} faults are injected: workers and whole nodes are killed."
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


def _run(faults: Sequence[Fault], console: Console, title: str) -> DemoRun:
    with tempfile.TemporaryDirectory(prefix="everstep-demo-") as folder:
        cluster = _Cluster(Path(folder), faults)
        try:
            lines = list(_watch(cluster, console, title))
        finally:
            cluster.close()
        summary = Path(folder, "summary.json")
        if not lines or not lines[-1].get("succeeded") or not summary.exists():
            raise DemoError(f"the job ended early:\n{Path(folder, 'log').read_text()[-3000:]}")
        result = json.loads(summary.read_text())
        return DemoRun(lines, result["digest"], result["parameters"])


class _Cluster:
    """A coordinator and some nodes, all on this machine; a node that is killed is started again."""

    def __init__(self, folder: Path, faults: Sequence[Fault]) -> None:
        self.events = folder / "events.jsonl"
        self.events.touch()
        self._log = (folder / "log").open("ab")
        self._environment = {**os.environ, Fault.VARIABLE: json.dumps([vars(fault) for fault in faults])}
        own = ["coordinator", "--bind", "127.0.0.1:0", "--nnodes", str(NODES), "--rdzv-id", "demo"]
        own += ["--es-store", str(folder / "store.sqlite")]  # a demo that was killed leaves none to a later one
        self._coordinator = self._start([*own, "--es-events", str(self.events)], subprocess.PIPE)
        assert self._coordinator.stdout is not None
        address = self._coordinator.stdout.readline().decode().split()[-1:]
        if not address:
            raise DemoError(f"the coordinator did not start:\n{(folder / 'log').read_text()[-3000:]}")
        run = ["run", "--nnodes", str(NODES), "--nproc-per-node", str(WORKERS // NODES), "--rdzv-backend", "c10d"]
        run += ["--rdzv-id", "demo", "--rdzv-endpoint", address[0], "--log-dir", str(folder / "logs")]
        self._run = [*run, "--es-snapshot-every", "1", str(Path(job.__file__)), str(folder / "summary.json")]
        self._nodes = [self._start(self._run, self._log) for _ in range(NODES)]

    def _start(self, arguments: list[str], stdout: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "everstep", *arguments]
        environment = self._environment
        return subprocess.Popen(command, env=environment, stdout=stdout, stderr=self._log, preexec_fn=die_with_parent)

    def runs(self) -> bool:
        """Whether the job is running; restarts killed nodes, as a cluster manager does."""
        if self._coordinator.poll() is not None:
            return False
        for number, node in enumerate(self._nodes):
            if node.poll() == -signal.SIGKILL:
                self._nodes[number] = self._start(self._run, self._log)
        return any(node.poll() is None for node in self._nodes)

    def close(self) -> None:
        """End the remaining processes."""
        for process in (*self._nodes, self._coordinator):
            process.kill()
            process.wait()
        if self._coordinator.stdout is not None:
            self._coordinator.stdout.close()
        self._log.close()


def _watch(cluster: _Cluster, console: Console, title: str) -> Iterator[dict[str, Any]]:
    """Yield the job's events as they arrive, and print them."""
    deadline = time.monotonic() + TIMEOUT_S
    with cluster.events.open() as stream, console.status("starting ...") as status:
        while True:
            running = cluster.runs()
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
    elif kind == "node_lost":
        console.print(f"  [red]node {event['node']}[/red] lost, with rank {event['ranks'][0]}", highlight=False)
    elif kind == "node_joined" and event["order"] >= 0:
        status.update(f"{title}: node {event['node']} is there")
    elif kind == "recovered":
        console.print(
            f"  recovered in {event['total_s']:.3f} s, of which {event['recompute_s']:.3f} s compute; "
            f"{event['redone_micro_batches']} micro-batches redone",
            highlight=False,
        )
    elif kind == "joined":
        console.print(f"  rank {event['ranks'][0]} is back: {event['layout']}", highlight=False)


# ---------------------------------------------------------------- comparing


def summarise(disturbed: DemoRun, reference: DemoRun) -> dict[str, Any]:
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
        "nodes": NODES,
        "kills": len(disturbed.named("worker_died")),
        "nodes_lost": len(disturbed.named("node_lost")),
        "faults": [_fault(event) for event in disturbed.named("recovered")],
        "samples_used_once": _samples_used_once([step for step, _, _ in ledgers[0]]),
        "digest": disturbed.digest,
        "digest_reference": reference.digest,
        "identical": ledgers[0] == ledgers[1] and disturbed.digest == reference.digest and len(losses) == job.STEPS,
    }


_TIMES = ("detect_s", "abort_s", "agree_s", "edit_s", "restore_s", "recompute_s", "total_s")


def _fault(event: dict[str, Any]) -> dict[str, Any]:
    ranks = ",".join(f"rank {rank}" for rank in event["ranks"])
    return {
        "step": event["interrupted_step"] if event["interrupted_step"] >= 0 else event["step"],
        "kind": "node" if event["nodes"] else "hang" if event["reason"] == "worker_hung" else "kill",
        "target": f"node of {ranks}" if event["nodes"] else ranks,
        "phase": event["phase"],
        **{name: round(event[name], 4) for name in _TIMES},
        # The finished part of a lost node's step is lost, too.
        "redone_micro_batches": None if event["nodes"] else event["redone_micro_batches"],
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
        redone = fault["redone_micro_batches"]
        table.add_row(*named, *times, "-" if redone is None else str(redone), str(fault["lost_steps"]))
    console.print(table)
    console.print(
        f"{summary['steps']} steps, loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}, "
        f"{summary['kills']} workers and {summary['nodes_lost']} nodes lost, "
        f"samples used once: {'yes' if summary['samples_used_once'] else 'NO'}",
        highlight=False,
    )
    console.print(f"digest     {summary['digest']}\nreference  {summary['digest_reference']}", highlight=False)
    console.print(f"identical: {'yes' if summary['identical'] else 'NO'}", style="bold")
