"""Hosts with IPv6 addresses only, with names for these only, and with a loopback address for their own name."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from everstep.comms.base import addresses
from tests.jobs import JOBS, everstep, finish, launch, wait_until
from tests.jobs.ports import free_port

SCRIPT = JOBS / "gpt_job.py"
STEPS = 6


def has_ipv6() -> bool:
    return addresses.is_own("::1")


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def named(tmp_path: Path, hosts: str) -> list[str]:
    """The prefix of a command for which /etc/hosts has these lines; skips the test where that is impossible."""
    file = tmp_path / "hosts"
    file.write_text(hosts)
    inside = ["unshare", "-m", "sh", "-c", f'mount --bind {file} /etc/hosts && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return inside


def job(tmp_path: Path, name: str = "out") -> list[str]:
    out = tmp_path / name
    out.mkdir()
    return [json.dumps({"out": str(out), "steps": STEPS, "stages": 1})]


@pytest.mark.parametrize("form", ["[::1]:PORT", "::1:PORT"])
def test_an_ipv6_endpoint_is_where_the_nodes_meet(tmp_path: Path, form: str) -> None:
    """Coordinator, keepers, links between ranks, heartbeats and torch's store: two nodes, all of it by ::1 alone."""
    endpoint = form.replace("PORT", str(free_port()))
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=six", "--es-tcp", f"--rdzv-endpoint={endpoint}"]
    events = tmp_path / "events"
    flags.append(f"--es-events={events}")  # written by the node that has the coordinator
    first, second = launch(SCRIPT, job(tmp_path), flags), launch(SCRIPT, job(tmp_path, "other"), flags)
    outputs = [finish(first), finish(second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    joined = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "node_joined"]
    assert {event["host"] for event in joined} == {"::1"}


def test_a_name_with_an_ipv6_address_only(tmp_path: Path) -> None:
    inside = named(tmp_path, "127.0.0.1 localhost\n::1 six\n")
    flags = ["--nproc-per-node=2", f"--rdzv-endpoint=six:{free_port()}", "--rdzv-conf=join_timeout=30"]
    process = launch(SCRIPT, job(tmp_path), flags, inside=inside)
    output = finish(process)
    assert process.returncode == 0, output


def test_torchs_own_store_is_reached_by_ipv6(tmp_path: Path) -> None:
    script = tmp_path / "gloo.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "t = torch.ones(1) * (dist.get_rank() + 1)\n"
        "dist.all_reduce(t)\n"
        "print('sum', t.item(), os.environ['MASTER_ADDR'], flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    process = launch(script, [], ["--nproc-per-node=2", f"--rdzv-endpoint=[::1]:{free_port()}"])
    output = finish(process)
    assert (process.returncode, output.count("sum 3.0 ::1")) == (0, 2), output


def test_a_coordinator_and_its_pages_at_ipv6_addresses(tmp_path: Path) -> None:
    port, page = free_port(), free_port()
    command = [sys.executable, "-m", "everstep", "coordinator", "--bind", f"[::1]:{port}", "--rdzv-id=six"]
    coordinator = subprocess.Popen(
        [*command, f"--es-store={tmp_path}/store", f"--es-metrics=[::1]:{page}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert coordinator.stdout is not None
        said = [coordinator.stdout.readline(), coordinator.stdout.readline()]
        assert any(f"coordinator of job six at [::1]:{port}" in line for line in said), said
        status = everstep("status", f"[::1]:{port}", "--json")
        assert (status.status, json.loads(status.stdout)["job"]) == (0, "six"), status
        wait_until(lambda: urllib.request.urlopen(f"http://[::1]:{page}/metrics").status == 200, 20, "its metrics")
    finally:
        coordinator.kill()
        coordinator.communicate()


def test_an_address_of_this_node_in_brackets(tmp_path: Path) -> None:
    process = launch(SCRIPT, job(tmp_path), ["--nproc-per-node=2", "--local-addr=[::1]"])
    output = finish(process)
    assert process.returncode == 0, output


def test_a_host_that_is_a_loopback_address_to_itself(tmp_path: Path) -> None:
    """Debian's 127.0.1.1: the coordinator listens where others can reach it, or a message says that they cannot."""
    if not addresses.outward():
        pytest.skip("this machine has no address that others reach")
    inside = named(tmp_path, "127.0.0.1 localhost\n127.0.1.1 box\n")
    flags = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-conf=join_timeout=30,last_call_timeout=1"]
    for trusted, expected in (("1", f"listens at {addresses.outward()}"), ("", "do not reach the coordinator")):
        environment = {"EVERSTEP_INSECURE_NETWORK": trusted}
        arguments = job(tmp_path, f"out{trusted}")
        endpoint = f"--rdzv-endpoint=box:{free_port()}"
        process = launch(SCRIPT, arguments, [*flags, endpoint], environment, inside=inside)
        output = finish(process)
        assert process.returncode == 0, output
        assert "everstep: warning: box is 127.0.1.1 on this host" in output
        assert expected in output
