"""The networks of a test's hosts: network namespaces behind a switch, or addresses of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import psutil

from tests.jobs import processes_of

COORDINATOR = -1  # the host that has only the coordinator
NAMESPACES = Path("/run/netns")
_BRIDGE = "switch"


def own_namespaces() -> set[str]:
    """Network namespaces that this process made and has not removed."""
    return {path.name for path in NAMESPACES.glob(f"es{os.getpid()}-*")}


class Cannot(Exception):
    """This machine, or this kind of network, does not support that."""


class Namespaces:
    """Each host has a network namespace with one interface, whose other end is a port of a switch in another namespace.

    The names contain this process's id, so runs do not collide, and remains of a killed run are found and removed.
    """

    kind = "namespaces"

    def __init__(self, count: int) -> None:
        _sweep()
        unique = f"es{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._names = {host: f"{unique}-{host}" for host in range(count)} | {COORDINATOR: f"{unique}-c"}
        self._switch = f"{unique}-s"
        self._subnet = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
        self._inodes: dict[int, int] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self._add(self._switch)
        _ip("-n", self._switch, "link", "add", _BRIDGE, "type", "bridge")
        _ip("-n", self._switch, "link", "set", _BRIDGE, "up")
        for host, name in self._names.items():
            self._add(name)
            self._inodes[host] = (NAMESPACES / name).stat().st_ino
            port = _port(host)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", _BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _add(self, name: str) -> None:
        _ip("netns", "add", name)
        self._stack.callback(_ip, "netns", "del", name)

    def address(self, host: int) -> str:
        return f"{self._subnet}.{250 if host == COORDINATOR else host + 1}"

    def enter(self, host: int) -> list[str]:
        """The prefix of a command that is to run on this host."""
        return ["ip", "netns", "exec", self._names[host]]

    def namespace(self, host: int) -> str:
        """The name of its network namespace; empty if it has none."""
        return self._names[host]

    def environment(self, host: int) -> dict[str, str]:
        return {}

    def pids(self, host: int) -> set[int]:
        """The live processes of a host; a zombie has no namespace any more."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if (entry / "ns/net").stat().st_ino == self._inodes[host]:
                        found.add(int(entry.name))
        return found

    def partition(self, host: int) -> None:
        """Unplug the host from the switch. Its own interface stays up, so no socket on either side gets an error."""
        _ip("-n", self._switch, "link", "set", _port(host), "nomaster")

    def degrade(self, host: int, *, loss: float, delay_s: float) -> None:
        """Drop packets of a host, each with probability `loss`, and delay the others, in both directions."""
        self._clear(host)
        port = _port(host)
        if delay_s:
            if not has_netem():
                raise Cannot("this kernel has no netem, which delays packets")
            netem = ("root", "netem", "delay", f"{delay_s * 1e6:.0f}us", "limit", "100000")
            _tc("-n", self._switch, "qdisc", "add", "dev", port, *netem)
            _tc("-n", self._names[host], "qdisc", "add", "dev", "eth0", *netem)
        if loss:
            _tc("-n", self._switch, "qdisc", "add", "dev", port, "clsact")
            for direction in ("ingress", "egress"):
                action = ("bpf", "direct-action", "bytecode", _dropping(loss))
                _tc("-n", self._switch, "filter", "add", "dev", port, direction, *action)

    def limit(self, host: int, bits_per_s: float) -> None:
        """Limit what a host sends, and what it receives, to a rate."""
        self._clear(host)
        bucket = ("root", "tbf", "rate", f"{bits_per_s:.0f}bit", "burst", "256kb", "latency", "100ms")
        _tc("-n", self._switch, "qdisc", "add", "dev", _port(host), *bucket)
        _tc("-n", self._names[host], "qdisc", "add", "dev", "eth0", *bucket)

    def heal(self, host: int) -> None:
        """Undo `partition`, `degrade` and `limit`."""
        self._clear(host)
        _ip("-n", self._switch, "link", "set", _port(host), "master", _BRIDGE)

    def _clear(self, host: int) -> None:
        for place, device in ((self._switch, _port(host)), (self._names[host], "eth0")):
            for queue in ("root", "clsact"):
                command = ["tc", "-n", place, "qdisc", "del", "dev", device, queue]
                subprocess.run(command, capture_output=True, check=False)  # it may have none

    def close(self) -> None:
        """Remove everything; the interfaces go with their namespaces."""
        self._stack.close()


class Loopback:
    """A substitute where namespaces cannot be made: every host is an address of this host. It has no cables."""

    kind = "loopback"

    def __init__(self, count: int) -> None:
        self._marker = f"es{os.getpid()}-{uuid.uuid4().hex[:6]}"

    def address(self, host: int) -> str:
        return f"127.0.0.{host + 2}"

    def enter(self, host: int) -> list[str]:
        return []

    def namespace(self, host: int) -> str:
        return ""

    def environment(self, host: int) -> dict[str, str]:
        return {"EVERSTEP_TEST_HOST": f"{self._marker}-host-{host}-"}

    def pids(self, host: int) -> set[int]:
        return set(processes_of(self.environment(host)["EVERSTEP_TEST_HOST"]))

    def partition(self, host: int) -> None:
        raise Cannot("hosts that are addresses of one interface cannot be unplugged")

    def degrade(self, host: int, *, loss: float, delay_s: float) -> None:
        raise Cannot("hosts that are addresses of one interface have no packets of their own to lose")

    def limit(self, host: int, bits_per_s: float) -> None:
        raise Cannot("hosts that are addresses of one interface have no links of their own to limit")

    def heal(self, host: int) -> None:
        return

    def close(self) -> None:
        return


def _port(host: int) -> str:
    return "hc" if host == COORDINATOR else f"h{host}"


def _dropping(loss: float) -> str:
    """A classic BPF program, as tc reads it: load a random word; drop (2) below a threshold, else pass (0).

    Drops packets on kernels without netem too.
    """
    random_word = 0x1_0000_0000 - 0x1000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM
    return f"4,32 0 0 {random_word},53 0 1 {round(loss * 0xFFFF_FFFF)},6 0 0 0,6 0 0 2"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Cannot(f"{' '.join(command)}: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _tc(*arguments: str) -> None:
    _run("tc", *arguments)


def _stale() -> Iterator[str]:
    for path in NAMESPACES.glob("es[0-9]*-*"):
        pid = path.name[2:].partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            yield path.name


def _sweep() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for name in list(_stale()):
        with contextlib.suppress(Cannot):  # another run was faster
            _ip("netns", "del", name)


@lru_cache(maxsize=1)
def available() -> tuple[bool, str]:
    """Whether hosts can be namespaces here, or the reason why not."""
    if os.geteuid() != 0:
        return False, "only root may make network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return False, f"{tool} is not installed (Debian: apt-get install iproute2)"
    try:
        probe = Namespaces(1)
        try:
            _run(*probe.enter(0), "true")
        finally:
            probe.close()
    except Cannot as error:
        return False, f"network namespaces cannot be made here: {error}"
    return True, ""


@lru_cache(maxsize=1)
def has_netem() -> bool:
    """Whether this kernel can delay packets."""
    probe = Namespaces(1)
    try:
        _run(*probe.enter(0), "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except Cannot:
        return False
    finally:
        probe.close()
    return True
