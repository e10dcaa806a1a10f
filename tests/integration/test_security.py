"""Certificates and tokens: which connections they accept and refuse, and the messages to the user."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from everstep.agents.launch.certs import make
from everstep.comms.base.addresses import is_loopback
from everstep.comms.base.security import NAME, Security, SecurityError
from tests.jobs import JOBS, Result, assert_same_run, everstep, finish, launch, read_result, reference, wait_until
from tests.jobs.ports import free_ports
from tests.jobs.processes import each

STEPS = 14
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make(folder, 1.0)
    return folder


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Nodes that a test starts; none outlives it."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def node(
    launched: list[subprocess.Popen[str]], out: Path, port: int, environment: dict[str, str], *flags: str
) -> subprocess.Popen[str]:
    arguments = [json.dumps({"out": str(out), "stages": 2, "steps": STEPS})]
    own = ["--nnodes=2", "--nproc-per-node=2", f"--rdzv-endpoint={LOOPBACK}:{port}", "--rdzv-backend=c10d", "--es-tcp"]
    own += [f"--es-events={out}/events.jsonl", f"--log-dir={out}/logs", "--es-metrics=127.0.0.1:0"]
    launched.append(launch(JOBS / "gpt_job.py", arguments, [*own, *flags], environment))
    return launched[-1]


def listening(*launchers: subprocess.Popen[str]) -> Iterator[int]:
    """Every TCP port that any process of the job listens on."""
    for launcher in launchers:
        root = psutil.Process(launcher.pid)
        family = [root, *root.children(recursive=True)]
        for process, connections in each(family, lambda process: process.net_connections("tcp")):
            for connection in connections:
                if connection.status == psutil.CONN_LISTEN:
                    assert is_loopback(connection.laddr.ip.removeprefix("::ffff:")), f"{process}: {connection}"
                    yield connection.laddr.port


def takes_plain_bytes(port: int) -> bool:
    """Whether a port answers a client that does not speak TLS."""
    try:
        with socket.create_connection((LOOPBACK, port), 5) as connection:
            connection.settimeout(1.0)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(4096))
            answer = connection.recv(64)
    except OSError:  # it hangs up, or does not answer a stranger; or its process was replaced meanwhile
        return False
    return bool(answer) and answer[0] != 0x15  # a TLS alert


def takes_no_certificate(port: int, authority: Path) -> bool:
    """Whether a port accepts a client without a certificate."""
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with socket.create_connection((LOOPBACK, port), 5) as plain:
            plain.settimeout(2.0)
            with context.wrap_socket(plain, server_hostname=NAME) as connection:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
                return bool(connection.recv(64))
    except (ssl.SSLError, OSError):
        return False


@pytest.mark.soak
def test_everything_is_encrypted(certificates: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]) -> None:
    """Two nodes with certificates and a token, no shared memory; a worker is lost. No port answers strangers."""
    (port,) = free_ports(1)
    faults = json.dumps([{"rank": 1, "phase": "compute", "step": 4}])
    secrets = {"EVERSTEP_CERTS": str(certificates), "EVERSTEP_JOB_TOKEN": "the job's own token"}
    environment = {**secrets, "EVERSTEP_FAULTS": faults}
    (tmp_path / "slow").touch()
    first = node(launched, tmp_path, port, environment)
    second = node(launched, tmp_path, port, environment)
    events = tmp_path / "events.jsonl"
    wait_until(lambda: events.exists() and '"recovered"' in events.read_text(), 60, "a worker was lost and replaced")
    ports = sorted(set(listening(first, second)))
    with ThreadPoolExecutor(len(ports)) as pool:
        plain = list(pool.map(takes_plain_bytes, ports))
        anybody = list(pool.map(lambda port: takes_no_certificate(port, certificates / "ca.pem"), ports))
    stores = {port for port, *talks in zip(ports, plain, anybody, strict=True) if any(talks)}
    assert len(ports) >= 8, f"coordinator, keepers, four workers, metrics: {ports}"
    # Torch's own store, for scripts that rendezvous by it, has neither; it is bound to this node's address.
    assert len(stores) <= 1, f"of {ports}, these talk to strangers: {stores}"
    status = everstep("status", f"{LOOPBACK}:{port}", "--json", environment=environment)
    assert status.status == 0, status
    assert everstep("status", f"{LOOPBACK}:{port}").status == 2, "without certificates"
    (tmp_path / "slow").unlink()
    outputs = [finish(first), finish(second)]
    result: Result = read_result(tmp_path, max(first.returncode, second.returncode), "\n".join(outputs))
    assert_same_run(result, reference(STEPS))
    assert result.named("worker_died")


@pytest.mark.soak
def test_who_is_kept_out(certificates: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]) -> None:
    """A wrong token; no certificates; those of another authority: one line each, without effect on the job."""
    other = tmp_path / "other"
    make(other, 1.0)
    (port,) = free_ports(1)
    environment = {"EVERSTEP_CERTS": str(certificates), "EVERSTEP_JOB_TOKEN": "the job's own token"}
    first = node(launched, tmp_path, port, environment, "--rdzv-conf=join_timeout=30")
    events = tmp_path / "events.jsonl"
    wait_until(lambda: events.exists() and '"node_joined"' in events.read_text(), 30, "the first node is there")
    strangers = {
        "its token is not this job's": {**environment, "EVERSTEP_JOB_TOKEN": "another"},
        "it takes no connections without TLS, and this node has no certificates": {
            "EVERSTEP_JOB_TOKEN": "the job's own token"
        },
        "it does not accept our certificate": {**environment, "EVERSTEP_CERTS": str(other)},
    }
    flag = "--rdzv-conf=join_timeout=2"
    strange = {why: node(launched, tmp_path / "none", port, stranger, flag) for why, stranger in strangers.items()}
    for why, stranger in strange.items():
        output = finish(stranger)
        assert stranger.returncode != 0
        (line,) = [line for line in output.splitlines() if line.startswith("everstep: error:")]
        assert why in line, output
        assert "Traceback" not in output
    assert first.poll() is None
    second = node(launched, tmp_path, port, environment)
    assert [finish(first), finish(second)]
    assert (first.returncode, second.returncode) == (0, 0)


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    make(tmp_path / "a", 1.0)
    make(tmp_path / "b", 1.0)
    (tmp_path / "a" / "key.pem").write_bytes((tmp_path / "b" / "key.pem").read_bytes())
    with pytest.raises(SecurityError, match=r"cert\.pem and key\.pem do not go together"):
        Security.of({"EVERSTEP_CERTS": str(tmp_path / "a")})
    make(tmp_path / "c", 1e-9)
    with pytest.raises(SecurityError, match="has expired at"):
        Security.of({"EVERSTEP_CERTS": str(tmp_path / "c")})
    with pytest.raises(SecurityError, match="everstep certs"):
        Security.of({"EVERSTEP_CERTS": str(tmp_path / "nowhere")})
    (tmp_path / "token").write_text("\n")
    with pytest.raises(SecurityError, match="the file is empty"):
        Security.of({"EVERSTEP_TOKEN_FILE": str(tmp_path / "token")})


def test_addresses_that_others_reach_are_not_bound_without_authentication(tmp_path: Path) -> None:
    for flags in (["coordinator", "--bind=0.0.0.0:0"], ["run", "--rdzv-endpoint=0.0.0.0:0", str(JOBS / "gpt_job.py")]):
        ended = everstep(*flags, environment={"XDG_STATE_HOME": str(tmp_path)})
        assert ended.status == 2
        assert "0.0.0.0 can be reached from other hosts" in ended.error()
        assert "--es-insecure-network" in ended.error()
    with pytest.raises(SecurityError):
        Security().check_bind("0.0.0.0")
    for host in (LOOPBACK, "localhost", "::1"):
        Security().check_bind(host)
    Security(trusted_network=True).check_bind("0.0.0.0")
