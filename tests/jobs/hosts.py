"""Hosts that can be lost: nodes of a job in separate network namespaces, for tests that read like a script.

    with Hosts(3) as hosts:
        hosts.require("partition")
        job = HostJob(hosts, tmp_path, nnodes="2:3", steps=200)
        job.launch(0, 1, 2)
        job.reaches(5)
        hosts.kill(1)              # every process of the host at one instant; its kernel closes the connections
        hosts.power_off(2)         # ... and no peer is notified
        assert_same_run(job.result(0), reference)

Where namespaces cannot be made, hosts are addresses of the loopback interface: tests that need a cable are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from everstep.comms.base.process import die_with_parent
from tests.jobs import HANG_S, JOBS, Result, finish, launch, read_result, wait_until
from tests.jobs.interpreter import Forked, launchers, surroundings
from tests.jobs.networks import COORDINATOR, Cannot, Loopback, Namespaces, available, has_netem

__all__ = ["COORDINATOR", "HostJob", "Hosts", "available"]

_GONE_S = 10.0


class Hosts:
    """`count` hosts, numbered from 0, and one more for the coordinator (`COORDINATOR`). Leaves nothing behind."""

    def __init__(self, count: int, *, namespaces: bool | None = None, forked: bool = True) -> None:
        """`namespaces`: None takes what is available; True skips the test where they are not.

        `forked`: `everstep` commands on hosts that are namespaces are forks, as in `tests.jobs.launch`.
        """
        possible, why = available()
        if namespaces and not possible:
            pytest.skip(why)
        self.hosts = tuple(range(count))
        self.endpoint = ""  # of the coordinator, once it has been started
        self.launchers: dict[int, subprocess.Popen[str] | Forked] = {}  # the last one of each host
        self._network = Namespaces(count) if possible and namespaces is not False else Loopback(count)
        self._forked = forked and self._network.kind == "namespaces"
        self._started: list[subprocess.Popen[str] | Forked] = []
        self._state = tempfile.TemporaryDirectory(prefix="everstep-test-")

    def _environment(self, host: int) -> dict[str, str]:
        state = {"XDG_STATE_HOME": self._state.name, "EVERSTEP_INSECURE_NETWORK": "1"}
        return {**self._network.environment(host), **state}

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.kill(*self.hosts, COORDINATOR)
        finally:
            for process in self._started:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            self._network.close()
            self._state.cleanup()

    def require(self, *abilities: str) -> None:
        """Skip the test, saying why, unless this machine can do all of: "partition", "loss", "delay"."""
        for ability in abilities:
            if self._network.kind == "loopback":
                pytest.skip(f"no {ability} between addresses of one interface: {available()[1] or 'as was asked for'}")
            if ability == "delay" and not has_netem():
                pytest.skip("no delay: this kernel has no netem")

    def address(self, host: int) -> str:
        """The IPv4 address of a host."""
        return self._network.address(host)

    def pids(self, *hosts: int) -> set[int]:
        """The live processes of these hosts."""
        return set().union(*(self._network.pids(host) for host in hosts))

    # ------------------------------------------------------------ processes

    def coordinator(self, nnodes: str, *flags: str) -> subprocess.Popen[str] | Forked:
        """Start `everstep coordinator` on its own host; again after it was killed, at the same endpoint."""
        bind = self.endpoint or f"{self.address(COORDINATOR)}:0"
        command = ["coordinator", f"--bind={bind}", f"--nnodes={nnodes}", *flags]
        command.append(f"--es-store={self._state.name}/store.sqlite")
        process = self.everstep(COORDINATOR, *command)
        assert process.stdout is not None
        said = process.stdout.readline()
        self.endpoint = said.split()[-1] if said else ""
        assert self.endpoint.startswith(self.address(COORDINATOR)), f"the coordinator did not start: {said!r}"
        return process

    def launch(
        self,
        host: int,
        script: Path | str,
        arguments: Sequence[str] = (),
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
    ) -> subprocess.Popen[str] | Forked:
        """Start `everstep run` on a host, for the coordinator that was started."""
        assert self.endpoint, "start the coordinator first"
        own = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", f"--local-addr={self.address(host)}"]
        process = launch(
            script,
            list(arguments),
            [*own, *flags],
            {**self._environment(host), **(environment or {})},
            inside=self._network.enter(host),
            python=python,
            forked=self._forked and python == sys.executable,
            network=self._network.namespace(host),
        )
        self._started.append(process)
        self.launchers[host] = process
        return process

    def everstep(self, host: int, *arguments: str) -> subprocess.Popen[str] | Forked:
        """Start an `everstep` command on a host, with pipes as for `run`: a fork, if hosts are namespaces."""
        env = surroundings(self._environment(host))
        if not self._forked or not launchers.suits(env):
            return self.run(host, sys.executable, "-m", "everstep", *arguments)
        process = launchers.start(arguments, env, network=self._network.namespace(host), piped=True)
        self._started.append(process)
        return process

    def run(self, host: int, *command: str) -> subprocess.Popen[str]:
        """Start any command on a host, with pipes to its input and from its output; it dies with this process."""
        process = subprocess.Popen(
            [*self._network.enter(host), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self._environment(host)},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._started.append(process)
        return process

    # ------------------------------------------------------------ what happens to hosts

    def kill(self, *hosts: int) -> float:
        """SIGKILL every process of these hosts as if at one instant; returns when (monotonic seconds).

        They are all stopped first, so that none of them sees another one dead. Returns once all are gone.
        """
        self.stop(*hosts)
        killed_s = time.monotonic()
        wait_until(lambda: not self._signal(self.pids(*hosts), signal.SIGKILL), _GONE_S, f"hosts {hosts} are dead")
        return killed_s

    def power_off(self, *hosts: int) -> float:
        """Like `kill`, but no peer is notified: the hosts are unplugged first. `heal` before they start again."""
        self.stop(*hosts)
        for host in hosts:
            self.partition(host)
        return self.kill(*hosts)

    def stop(self, *hosts: int) -> None:
        """SIGSTOP every process of these hosts, also those that they start meanwhile; returns once all are stopped."""
        stopped: set[int] = set()
        while running := self.pids(*hosts) - stopped:
            self._signal(running, signal.SIGSTOP)
            wait_until(lambda pids=running: all(map(_stands_still, pids)), _GONE_S, f"hosts {hosts} stand still")
            stopped |= running

    def cont(self, *hosts: int) -> None:
        """SIGCONT every process of these hosts."""
        self._signal(self.pids(*hosts), signal.SIGCONT)

    def partition(self, *hosts: int) -> None:
        """Cut each of these hosts off from all others, silently."""
        self._attempt(lambda host: self._network.partition(host), hosts)

    def degrade(self, *hosts: int, loss: float = 0.0, delay_s: float = 0.0) -> None:
        """Lose or delay the packets of these hosts, in both directions."""
        self._attempt(lambda host: self._network.degrade(host, loss=loss, delay_s=delay_s), hosts)

    def limit(self, *hosts: int, bits_per_s: float) -> None:
        """Limit the links of these hosts, in both directions. Raises Cannot where that is not possible."""
        for host in hosts:
            self._network.limit(host, bits_per_s)

    def heal(self, *hosts: int) -> None:
        """Undo `partition`, `degrade`, `limit` and the cut of `power_off`."""
        for host in hosts:
            self._network.heal(host)

    @staticmethod
    def _attempt(action: Any, hosts: Sequence[int]) -> None:
        for host in hosts:
            try:
                action(host)
            except Cannot as error:
                pytest.skip(str(error))

    @staticmethod
    def _signal(pids: set[int], number: signal.Signals) -> set[int]:
        reached = set()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                reached.add(pid)
        return reached


def _stands_still(pid: int) -> bool:
    """Whether all threads of a process are stopped, or have ended: the signal reaches them one by one."""
    threads = Path(f"/proc/{pid}/task")
    try:
        stats = [(thread / "stat").read_text() for thread in threads.iterdir()]
    except OSError:  # one of them ended just now, or all did
        return not threads.exists()
    return all(stat.rpartition(")")[2].split()[0] in "TtZX" for stat in stats)


class HostJob:
    """The small GPT of `gpt_job.py`, on hosts, with the coordinator on its own."""

    def __init__(
        self, hosts: Hosts, out: Path, *, nnodes: str, steps: int, stages: int | str = 1, **config: Any
    ) -> None:
        self.hosts = hosts
        self.out = out
        self._nnodes = nnodes
        self._arguments = [json.dumps({"out": str(out), "steps": steps, "stages": stages, **config})]
        self._events = out / "events.jsonl"
        self._seen: list[dict[str, Any]] = []
        self._read_bytes = 0
        self.coordinator = self.start_coordinator()

    def start_coordinator(self) -> subprocess.Popen[str] | Forked:
        """Start the coordinator; the constructor has done so the first time."""
        self.coordinator = self.hosts.coordinator(self._nnodes, f"--es-events={self._events}")
        return self.coordinator

    def launch(self, *hosts: int, workers: int = 1, flags: Sequence[str] = (), faults: Sequence[Any] = ()) -> None:
        """Start a node with `workers` workers on each of these hosts."""
        environment = {"EVERSTEP_FAULTS": json.dumps(list(faults))}
        own = [f"--nnodes={self._nnodes}", f"--nproc-per-node={workers}", *flags]
        for host in hosts:
            self.hosts.launch(host, JOBS / "gpt_job.py", self._arguments, own, environment)

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What the coordinator recorded so far: all events, or those of one name."""
        if self._events.exists():
            with self._events.open() as stream:  # only what is new: this is polled
                stream.seek(self._read_bytes)
                new = stream.read()
            whole = new[: new.rfind("\n") + 1]
            self._read_bytes += len(whole.encode())
            self._seen += [json.loads(line) for line in whole.splitlines()]
        return [event for event in self._seen if not name or event["event"] == name]

    def committed(self) -> int:
        """The last step that was committed, or -1."""
        return max((event["step"] for event in self.events("committed")), default=-1)

    def reaches(self, step: int, timeout_s: float = 60.0) -> None:
        """Wait until a step is committed."""
        wait_until(lambda: self.committed() >= step, timeout_s, f"step {step} is committed")

    def result(self, *hosts: int, timeout_s: float = HANG_S) -> Result:
        """Wait for the nodes of these hosts (default: all that were launched) and read what the job left."""
        chosen = hosts or tuple(self.hosts.launchers)
        launchers = [self.hosts.launchers[host] for host in chosen]
        outputs = [finish(launcher, timeout_s) for launcher in launchers]
        return read_result(self.out, max(abs(p.returncode) for p in launchers), "\n".join(outputs))


def lose_a_node(script: str, fault: Mapping[str, Any], folder: Path, *, every: int, **config: Any) -> Result:
    """Run a job on three hosts, one worker each, of which a fault takes one; asserts that it alone is lost.

    `every`: the steps between versions that outlive nodes.
    """
    out = folder / "lost"
    out.mkdir()
    faults = {"EVERSTEP_FAULTS": json.dumps([{**fault, "kind": "node"}])}
    flags = ["--nnodes=3", "--nproc-per-node=1", f"--es-snapshot-every={every}", f"--log-dir={folder}/logs"]
    with Hosts(3) as hosts:
        hosts.coordinator("3", f"--es-events={out}/events.jsonl")
        arguments = [json.dumps({"out": str(out), **config})]
        nodes = [hosts.launch(host, JOBS / script, arguments, flags, faults) for host in hosts.hosts]
        outputs = [finish(node) for node in nodes]
    assert sorted(node.returncode for node in nodes) == [-signal.SIGKILL, 0, 0], outputs
    result = read_result(out, 0, "\n".join(outputs))
    assert len(result.named("node_lost")) == 1, result.output
    assert len(list(out.glob("state-*.pt"))) == 2, result.output
    return result
