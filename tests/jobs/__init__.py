"""Runs real jobs under the real launcher, for tests, and reads their results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from everstep.comms.base.process import die_with_parent

from .interpreter import (
    HANG_S,
    MARKER,
    PROTECTION,
    Ended,
    Forked,
    Interpreter,
    launchers,
    references,
    scripts,
    surroundings,
)

__all__ = ["HANG_S", "MARKER", "PROTECTION", "Ended"]

JOBS = Path(__file__).parent


@dataclass
class Result:
    """The results of a job."""

    status: int
    output: str
    events: list[dict[str, Any]]
    out: Path
    workers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def losses(self) -> dict[int, float]:
        """step -> loss; asserts that all workers that saw a step saw the same."""
        found: dict[int, float] = {}
        for lines in self.workers.values():
            for line in lines:
                assert found.setdefault(line["step"], line["loss"]) == line["loss"], (line, found)
        return dict(sorted(found.items()))

    def state(self, rank: int = 0) -> dict[str, Any]:
        return torch.load(self.out / f"state-{rank}.pt", weights_only=True)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


def launch(
    script: Path | str,
    arguments: list[str],
    flags: list[str],
    environment: dict[str, str] | None = None,
    inside: Sequence[str] = (),
    program: Sequence[str | Path] = ("-m", "everstep"),
    python: str | Path = sys.executable,
    forked: bool = False,
    network: str = "",
    **popen: Any,
) -> subprocess.Popen[str] | Forked:
    """Start `everstep run` in a session of its own, so that all of it can be killed; `inside` precedes the command.

    `forked`: as a fork of an interpreter that has imported torch, in the network namespace that `network` names, if the
    environment lets a fork be as a process of its own. That saves half of what a small job costs.
    """
    env = surroundings(environment or {})
    if forked and launchers.suits(env):
        return launchers.start(["run", *flags, str(script), *arguments], env, network=network)
    command = [*inside, python, *program, "run", *flags, str(script), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
        preexec_fn=die_with_parent,
        **popen,
    )


def finish(process: subprocess.Popen[str] | Forked, timeout_s: float = HANG_S) -> str:
    """Wait for a launcher; kills its whole session if it hangs. Returns its output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the job hung for {timeout_s:g} s:\n{output[-4000:]}") from None
    return output


def command(arguments: list[str], environment: dict[str, str] | None = None, timeout_s: float = HANG_S) -> Ended:
    """Run a Python command line in a session of its own; kills the session if it hangs."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(environment or {}),
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"hung for {timeout_s:g} s: {arguments}\n{stdout[-2000:]}\n{stderr[-4000:]}") from None
    return Ended(process.returncode, stdout, stderr)


def everstep(*arguments: str, environment: dict[str, str] | None = None, timeout_s: float = HANG_S) -> Ended:
    """Run the `everstep` command; `everstep run` as a fork, as in `launch`."""
    if arguments[0] == "run" and launchers.suits(surroundings(environment or {})):
        return launchers.run(arguments, environment or {}, timeout_s)
    return command(["-m", "everstep", *arguments], environment, timeout_s)


def run_job(
    *,
    nproc: int,
    stages: int = 1,
    steps: int = 8,
    faults: list[dict[str, Any]] | None = None,
    script: str = "gpt_job.py",
    flags: list[str] | None = None,
    timeout_s: float = HANG_S,
    interpreter: Interpreter = launchers,
    **config: Any,
) -> Result:
    """Run a job to its end and read its results.

    The launcher is a fork of an interpreter that has imported torch, which saves half of what a small job costs.
    """
    out = Path(tempfile.mkdtemp(prefix="everstep-test-"))
    events = out / "events.jsonl"
    arguments = [json.dumps({"out": str(out), "steps": steps, "stages": stages, **config})]
    flags = ["--nproc-per-node", str(nproc), "--es-events", str(events), *(flags or [])]
    environment = {"EVERSTEP_FAULTS": json.dumps(faults or [])}
    ended = interpreter.run(["run", *flags, str(JOBS / script), *arguments], environment, timeout_s, mixed=True)
    return read_result(out, ended.status, ended.stdout)


@lru_cache(maxsize=16)
def reference(steps: int, **config: Any) -> Result:
    """The undisturbed run, with other hashes of strings; its layout does not affect its bytes, as other tests show.

    Run once for all tests.
    """
    result = run_job(nproc=2, steps=steps, interpreter=references, **config)
    assert result.status == 0, result.output[-4000:]
    return result


def read_result(out: Path, status: int, output: str) -> Result:
    """The results of a job, from its folder."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    workers = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("worker-*.jsonl")
    }
    return Result(status, output, events, out, workers)


@contextlib.contextmanager
def slowly(out: Path) -> Iterator[None]:
    """Steps of the job that writes there take longer meanwhile, so that some are left for what the test does."""
    slow = out / "slow"
    slow.touch()
    try:
        yield
    finally:
        slow.unlink()


def state_alone(job: str, out: Path, environment: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    """What rank 0 of a job script has saved, after a run without the launcher: one process."""
    out.mkdir()
    ended = scripts.run([str(JOBS / job), json.dumps({"out": str(out), **config})], environment or {}, HANG_S)
    assert ended.status == 0, ended.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


def same(found: Any, expected: Any) -> bool:
    """Equal, to the last bit."""
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """`torch.equal` on every parameter, every master and every optimizer state."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.get("masters", {}).items():
        assert torch.equal(found["masters"][name], tensor), f"the master of {name} differs"
    assert found["model"].keys() == expected["model"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), f"parameter {name} differs"
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, states in expected["optimizer"].items():
        assert found["optimizer"][name].keys() == states.keys()
        for kind, tensor in states.items():
            assert same(found["optimizer"][name][kind], tensor), f"{kind} of {name} differs"


def assert_same_run(found: Result, reference: Result) -> None:
    """The same losses, to the last bit, and the same final state, whichever ranks were there to write it."""
    assert found.status == 0, found.output[-4000:]
    ledgers = [[(e["step"], e["loss"], e["digest"]) for e in r.named("committed")] for r in (found, reference)]
    assert ledgers[0] == ledgers[1], "the ledgers differ"
    losses, expected = found.losses(), reference.losses()
    assert losses == {step: expected[step] for step in losses}
    states = list(found.out.glob("state-*.pt"))
    assert states, "no rank wrote its final state"
    for path in states:
        assert_same_state(torch.load(path, weights_only=True), reference.state())


def processes_of(marker: str) -> list[int]:
    """Live processes whose environment or command line has `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if marker.encode() in text and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
