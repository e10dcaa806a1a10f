"""The node agent's snapshot keeper: started, or adopted from an agent that died, and ended.

A keeper outlives its agent by a while (its *linger*), so that what it holds is still there when the agent is started
again: the new agent finds it by a name that only this job on this host makes, and takes the leash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from everstep.checkpointing.access.keeper_protocol import PROTOCOL, Failure, KeeperStart, NameTaken, greeting
from everstep.comms.base import addresses
from everstep.comms.base.process import own_command

from .cgroups import OutOfMemory
from .config import AgentError, NodeConfig

MOST_PER_HOST = 64  # agents of one job on one host
ANSWER_S = 5.0


class KeeperCannotServe(Exception):
    """Why a keeper ended before it served."""


class EarlierKeeper(Exception):
    """A keeper of this job that another version of everstep left on this host, for people."""


@dataclass
class KeeperProcess:
    """A keeper that ends with its leash. `process` is None for an adopted keeper; then `leash` is the connection."""

    name: str
    port: int
    pid: int
    process: subprocess.Popen[str] | None = None
    leash: socket.socket | None = None

    def gone(self) -> bool:
        """Whether it has ended."""
        if self.process is not None:
            return self.process.poll() is not None
        assert self.leash is not None
        return bool(select.select([self.leash], [], [], 0)[0])  # carries no data: only its end matters

    def kill(self) -> None:
        """End it, and what it holds."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
        elif not self.gone():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.leash is not None:
            self.leash.close()


def keeper_name(token: str, host: str, number: int) -> str:
    """The unix socket (abstract namespace) of the `number`-th keeper of a job on a host."""
    return f"everstep-{hashlib.sha256(f'keeper {token} {host}'.encode()).hexdigest()[:32]}-{number}"


def obtain(node: str, host: str, token: str, linger_s: float) -> KeeperProcess:
    """A keeper for `node`: an orphaned keeper of this job, else a new one.

    Raises KeeperCannotServe, and EarlierKeeper.
    """
    for number in range(MOST_PER_HOST):
        name = keeper_name(token, host, number)
        try:
            found = _take_over(name, node, token)
        except ConnectionRefusedError:  # no keeper has the name
            try:
                return start(name, node, host, 0, token, linger_s)
            except NameTaken:
                continue  # another agent was faster
        if found is not None:
            return found
    raise KeeperCannotServe(f"{MOST_PER_HOST} agents of this job run on {host} already")


def start(name: str, node: str, host: str, port: int, token: str, linger_s: float) -> KeeperProcess:
    """Start a keeper on a name and a port (0: any)."""
    command = own_command("everstep.checkpointing.keeper.service", "--node", node, "--name", name)
    command += ["--host", host, "--port", str(port), "--linger", str(linger_s)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end is the end of the leash
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "EVERSTEP_TOKEN": token},
    )
    assert process.stdout is not None
    started = KeeperStart.of(process.stdout.readline())
    if started.failure is None:
        return KeeperProcess(name, started.port, process.pid, process)
    status = process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    if started.failure is Failure.NAME_TAKEN:
        raise NameTaken(name)
    raise KeeperCannotServe(started.why or f"it ended with status {status}")


def _take_over(name: str, node: str, token: str) -> KeeperProcess | None:
    """The keeper with this name, if its agent is gone; None if the agent lives.

    Raises ConnectionRefusedError when there is none, EarlierKeeper for one of another everstep.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_S)
    try:
        connection.connect("\0" + name)
        connection.sendall(greeting(token))
        connection.sendall(json.dumps({"op": "adopt", "node": node}).encode() + b"\n")
        with connection.makefile("rb") as stream:
            answer = json.loads(stream.readline() or b"{}")
    except ConnectionRefusedError:
        connection.close()
        raise
    except (OSError, ValueError):
        connection.close()
        return None
    if not answer.get("adopted"):
        connection.close()
        return None
    version, pid = answer.get("protocol", 1), answer["pid"]
    if version != PROTOCOL:
        connection.close()
        raise EarlierKeeper(
            f"the snapshot keeper that an earlier launcher left here (process {pid}) speaks version {version} of the "
            f"keeper protocol, and this everstep version {PROTOCOL}: end that process, or wait until it ends by itself "
            "(--es-keeper-linger)"
        )
    return KeeperProcess(name, answer["port"], pid, leash=connection)


class NodeKeeper:
    """The keeper of a node that is in a job; none otherwise."""

    def __init__(self, config: NodeConfig, memory: OutOfMemory) -> None:
        self._config = config
        self._memory = memory
        self._process: KeeperProcess | None = None
        self._node = self._token = ""

    def obtain(self, node: str, token: str) -> int:
        """Adopt this host's keeper of the job, or start one. Returns its port. Raises AgentError."""
        self._node, self._token = node, token
        config = self._config
        with self._serving():
            self._process = obtain(node, config.host, token, config.keeper_linger_s)
            return self._process.port

    def restart(self) -> None:
        """Start a replacement with the port and the name of the keeper that ended. Raises AgentError."""
        former, config = self._process, self._config
        assert former is not None
        former.kill()
        with self._serving():
            place = (former.name, self._node, config.host, former.port)
            self._process = start(*place, self._token, config.keeper_linger_s)

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        try:
            yield
        except EarlierKeeper as error:
            raise AgentError(str(error)) from None
        except (KeeperCannotServe, NameTaken) as error:
            raise AgentError(
                f"the snapshot keeper of node {self._node} cannot serve on {self._config.host}: {error} (choose "
                "this node's address with --local-addr)"
            ) from None

    def end(self) -> None:
        """End it, and what it holds."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def lost(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.gone()

    @property
    def name(self) -> str:
        """Its unix socket; empty if there is none."""
        return self._process.name if self._process is not None else ""

    @property
    def place(self) -> tuple[str, str] | None:
        """Its address, and the token to authenticate with. May be read from any thread."""
        process = self._process
        return (addresses.join(self._config.host, process.port), self._token) if process is not None else None

    def how_it_ended(self) -> str:
        """In words."""
        process = self._process.process if self._process is not None else None
        status = process.returncode if process is not None else None
        if status is None:
            return "has ended"
        if status >= 0:
            return f"has ended with status {status}"
        killer = self._memory.explain() if status == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{killer and ' '}{killer}"
