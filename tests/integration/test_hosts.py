"""Nodes on separate hosts, with a network between them, and the faults that a test can inject into such hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from everstep.comms.base.process import host_id
from tests.jobs import assert_same_run, reference, slowly, wait_until
from tests.jobs.hosts import COORDINATOR, HostJob, Hosts, available
from tests.jobs.networks import NAMESPACES, own_namespaces
from tests.jobs.processes import those

STEPS = 14


KINDS = pytest.mark.parametrize(
    "namespaces", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["namespaces", "loopback"]
)


@KINDS
def test_three_hosts_lose_a_worker(tmp_path: Path, namespaces: bool) -> None:
    """The run is that of one host, bit for bit; only the lost worker is replaced."""
    with Hosts(3, namespaces=namespaces) as hosts:
        job = HostJob(hosts, tmp_path, nnodes="3", steps=STEPS)
        job.launch(0, 2)
        job.launch(1, faults=[{"rank": rank, "phase": "compute", "step": 5} for rank in range(3)])
        wait_until(lambda: job.events("worker_died"), 60, "the worker is lost")
        with slowly(tmp_path):  # so that steps are left for the replacement
            wait_until(lambda: job.events("joined"), 60, "its replacement trains")
        result = job.result()
        assert job.coordinator.wait(timeout=10) == 0
        assert not hosts.pids(*hosts.hosts, COORDINATOR)
    assert_same_run(result, reference(STEPS))
    assert {event["host"] for event in result.named("node_joined")} == {hosts.address(host) for host in hosts.hosts}
    assert len(result.named("worker_died")) == 1
    assert sorted(len({line["pid"] for line in lines}) for lines in result.workers.values()) == [1, 1, 1, 1]


# Sends back what it receives, one connection after the other, with a helper process beside it.
ECHO = """
import socket, subprocess, sys
server = socket.create_server((sys.argv[1], 0))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(server.getsockname()[1], flush=True)
while True:
    connection = server.accept()[0]
    while data := connection.recv(1000):
        connection.sendall(data)
"""

# For every line of input, a number of seconds: sends a word, and says what came back within that time.
ASK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for line in sys.stdin:
    connection.settimeout(float(line))
    try:
        connection.sendall(b"word")
        print("answer" if connection.recv(1000) else "closed", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""

# Counts the datagrams that arrive until none has for a while.
COUNT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], 0))
    print(sock.getsockname()[1], flush=True)
    sock.settimeout(1)
    count = 0
    try:
        while sock.recv(10):
            count += 1
    except TimeoutError:
        print(count, flush=True)
"""

FLOOD = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for _ in range(400):
        sock.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
        time.sleep(0.0005)
"""


def python(hosts: Hosts, host: int, script: str, *arguments: object) -> subprocess.Popen[str]:
    return hosts.run(host, sys.executable, "-c", script, *map(str, arguments))


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def echo(hosts: Hosts, host: int) -> int:
    """Start the echo on a host: its port."""
    port = int(line_of(python(hosts, host, ECHO, hosts.address(host))))
    wait_until(lambda: len(hosts.pids(host)) == 2, 10, "its helper runs")
    return port


class Asking:
    """A connection from one host to the echo of another."""

    def __init__(self, hosts: Hosts, host: int, target: int, port: int) -> None:
        self._process = python(hosts, host, ASK, hosts.address(target), port)

    def __call__(self, timeout_s: float = 10.0) -> str:
        assert self._process.stdin is not None
        print(timeout_s, file=self._process.stdin, flush=True)
        return line_of(self._process)


@KINDS
def test_a_killed_host_has_no_process_and_the_others_live(namespaces: bool) -> None:
    with Hosts(3, namespaces=namespaces) as hosts:
        ports = [echo(hosts, host) for host in hosts.hosts]
        asking = Asking(hosts, COORDINATOR, 0, ports[0])
        assert asking() == "answer"
        hosts.kill(0, 2)
        assert not hosts.pids(0, 2)
        assert len(hosts.pids(1)) == 2
        assert asking() in ("closed", "ConnectionResetError", "BrokenPipeError")
        assert Asking(hosts, 2, 1, ports[1])() == "answer"
    assert not own_namespaces()


@KINDS
def test_a_stopped_host_is_silent_until_it_goes_on(namespaces: bool) -> None:
    with Hosts(2, namespaces=namespaces) as hosts:
        asking = Asking(hosts, 0, 1, echo(hosts, 1))
        assert asking() == "answer"
        hosts.stop(1)
        assert {psutil.Process(pid).status() for pid in hosts.pids(1)} == {psutil.STATUS_STOPPED}
        assert asking(0.3) == "TimeoutError"
        hosts.cont(1)
        assert asking() == "answer"


def test_a_partition_gives_no_socket_an_error() -> None:
    with Hosts(3) as hosts:
        hosts.require("partition")
        cut_off, other = Asking(hosts, 0, 1, echo(hosts, 1)), Asking(hosts, 0, 2, echo(hosts, 2))
        assert cut_off() == other() == "answer"
        hosts.partition(1)
        assert cut_off(0.5) == "TimeoutError"
        assert other() == "answer"
        hosts.heal(1)
        assert cut_off() == "answer"


def test_nobody_hears_of_a_power_cut() -> None:
    with Hosts(2) as hosts:
        hosts.require("partition")
        asking = Asking(hosts, 0, 1, echo(hosts, 1))
        assert asking() == "answer"
        hosts.power_off(1)
        assert not hosts.pids(1)
        assert asking(0.5) == "TimeoutError"
        hosts.heal(1)
        assert Asking(hosts, 0, 1, echo(hosts, 1))() == "answer"


def test_a_bad_cable_loses_packets() -> None:
    with Hosts(2) as hosts:
        hosts.require("loss")

        def arrived() -> int:
            counting = python(hosts, 1, COUNT, hosts.address(1))
            python(hosts, 0, FLOOD, hosts.address(1), line_of(counting)).wait(timeout=30)
            return int(line_of(counting))

        Asking(hosts, 0, 1, echo(hosts, 1))()  # the hosts know each other's hardware addresses
        hosts.degrade(1, loss=0.4)
        assert 170 < arrived() < 310  # 240 expected
        hosts.heal(1)
        assert arrived() == 400


def test_a_long_cable_takes_its_time() -> None:
    with Hosts(2) as hosts:
        hosts.require("delay")
        asking = Asking(hosts, 0, 1, echo(hosts, 1))
        assert asking() == "answer"
        hosts.degrade(1, delay_s=0.2)
        assert asking(0.3) == "TimeoutError"
        assert asking() == "answer"


@KINDS
def test_nothing_is_left_of_a_test_that_fails(namespaces: bool) -> None:
    pids: set[int] = set()

    def test() -> None:
        with Hosts(2, namespaces=namespaces) as hosts:
            echo(hosts, 0)
            pids.update(hosts.pids(0))
            raise RuntimeError("as a test does")

    with pytest.raises(RuntimeError, match="as a test does"):
        test()
    assert len(pids) == 2
    assert not own_namespaces()
    assert not those(pids, lambda process: process.status() != psutil.STATUS_ZOMBIE)


def test_what_a_killed_run_left_is_removed() -> None:
    possible, why = available()
    if not possible:
        pytest.skip(why)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = NAMESPACES / f"es{ended.pid}-abcdef-0"
    subprocess.run(["ip", "netns", "add", left.name], check=True)
    with Hosts(1):
        assert not left.exists()


def test_hosts_are_different_to_the_links() -> None:
    """Abstract unix sockets end at a namespace's border, so its processes must not look for others beyond it."""
    with Hosts(2, namespaces=True) as hosts:
        script = "from everstep.comms.base.process import host_id; print(host_id())"
        ids = [line_of(python(hosts, host, script)) for host in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert host_id() not in ids
