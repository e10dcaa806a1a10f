"""--master-addr and --master-port: torch's own rendezvous there, beside the coordinator, as under torchrun."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.jobs import JOBS, everstep, finish, launch, wait_until
from tests.jobs.ports import free_port

MEETING = """
import os, sys, time, torch, torch.distributed as dist
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
method = sys.argv[1]
place = {} if method == "env://" else {"rank": rank, "world_size": world}
dist.init_process_group("gloo", init_method=method, **place)
total = torch.ones(1) * (rank + 1)
dist.all_reduce(total)
os.write(1, f"sum {total.item()} attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n".encode())  # one write: a line
if len(sys.argv) > 2 and rank == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(9)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def meeting(tmp_path: Path) -> Path:
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    return script


@pytest.mark.parametrize("method", ["tcp", "env"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_script_meets_at_the_master_port(meeting: Path, method: str, host: str) -> None:
    port = free_port()
    shown = f"[{host}]" if ":" in host else host
    url = f"tcp://{shown}:{port}" if method == "tcp" else "env://"
    process = launch(meeting, [url], ["--nproc-per-node=2", f"--master-addr={host}", f"--master-port={port}"])
    output = finish(process)
    assert (process.returncode, output.count("sum 3.0")) == (0, 2), output


@pytest.mark.soak
def test_two_nodes_meet_there_and_again_after_a_failure(meeting: Path) -> None:
    """Each attempt finds an empty store, although it has the same address."""
    port = free_port()
    flags = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=1"]
    url = f"tcp://127.0.0.1:{port}"
    nodes = [launch(meeting, [url, "fail"], [*flags, f"--node-rank={rank}"]) for rank in range(2)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert all("sum 3.0 attempt 1" in output for output in outputs), outputs


def test_the_coordinator_is_there_as_well(tmp_path: Path) -> None:
    """It gets its requests there, and replaces a worker through it."""
    port = free_port()
    at = f"127.0.0.1:{port}"
    flags = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    faults = json.dumps([{"rank": 1, "phase": "compute", "step": 3}])
    arguments = [json.dumps({"out": str(tmp_path), "steps": 1_000_000, "stages": 1})]
    process = launch(JOBS / "gpt_job.py", arguments, flags, {"EVERSTEP_FAULTS": faults})
    try:
        wait_until(lambda: any(path.read_text() for path in tmp_path.glob("worker-*")), 60, "a step")
        wait_until(lambda: stepped(at) > 5, 60, "a step after the one in which a worker died")
    finally:
        process.terminate()
        output = finish(process)
    assert "counts as lost" not in output


def stepped(at: str) -> int:
    ended = everstep("status", at, "--json")
    return int(json.loads(ended.stdout)["committed_step"]) if ended.status == 0 else -1


def test_a_master_port_that_is_taken(meeting: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ended = everstep("run", "--nproc-per-node=1", f"--master-port={port}", "--master-addr=127.0.0.1", str(meeting))
    assert ended.status == 2
    assert f"127.0.0.1:{port} is in use: choose another port in --master-port" in ended.error()


TAKEN_BY_TORCH = (
    "timeout=900,close_timeout=30,heartbeat_timeout=5,keep_alive_interval=5,keep_alive_max_attempt=3,read_timeout=60,"
    "store_type=tcp,use_libuv=1,join_timeout=60,last_call_timeout=1,is_host=1"
)


def test_settings_of_torchs_rendezvous_are_taken(meeting: Path) -> None:
    flags = ["--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    process = launch(meeting, ["env://"], [*flags, f"--rdzv-conf={TAKEN_BY_TORCH}"])
    output = finish(process)
    assert (process.returncode, output.count("sum 3.0")) == (0, 2), output
