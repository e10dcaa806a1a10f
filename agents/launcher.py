"""`everstep run`: torchrun's command line, with our coordinator, agents and workers behind it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

from ..comms.rpc import AgentStream, Unreachable
from ..elastic.protocol.liveness import FLOOR_S
from ..elastic.protocol.state import Config
from .coordinator import CoordinatorServer, PortTaken
from .logs import WorkerLogs, discard
from .memory import available, parse_size
from .node import AgentError, NodeAgent, NodeConfig, Outcome

CONNECT_TIMEOUT_S = 60.0  # torchrun waits as long for its store
DEFAULT_PORT = 29400
REJOIN_S = 60.0
_OVERRIDES = (
    *("steps", "stages", "global-batch-size", "micro-batch-size", "seed", "node-losses", "verify-every"),
    *("checkpoint-every", "checkpoint-keep"),
)
_CHOSEN = (
    *("protection", "snapshot-every", "snapshot-budget", "on-loss", "on-corruption"),
    *("checkpoint", "checkpoint-keep-s", "checkpoint-options", "resume", "on-damage"),
)
_STOP_GRACE: dict[str, Any] = {
    "type": float,
    "default": Config().stop_grace_s,
    "metavar": "SECONDS",
    "help": "how long a job that is told to stop may take to save a checkpoint",
}


class LaunchError(Exception):
    """A command line that cannot be carried out."""


@dataclass(frozen=True)
class Command:
    """A parsed command line: torch's part and ours."""

    torch: LaunchConfig
    program: dict[str, Any]
    own: argparse.Namespace
    node_rank: int
    endpoint: str  # empty: one node, with a coordinator of its own
    log_dir_chosen: bool  # else torch makes one, of which nothing need stay


def parser() -> argparse.ArgumentParser:
    """Torchrun's own parser, with our flags added."""
    parse: argparse.ArgumentParser = get_args_parser()
    parse.prog = "everstep run"
    parse.description = "Run a training script on this node. Every torchrun flag is accepted; ours begin with --es-."
    own = parse.add_argument_group("everstep")
    for name in _OVERRIDES:
        own.add_argument(f"--es-{name}", type=int, metavar="N", help=f"overrides {name.replace('-', '_')}")
    for name in _CHOSEN:
        own.add_argument(f"--es-{name}", metavar="VALUE", help=f"overrides {name.replace('-', '_')}")
    own.add_argument(
        "--es-keeper-memory", default="", metavar="SIZE", help="memory of this node for protection, such as 8GiB"
    )
    own.add_argument(
        "--es-keeper-linger",
        type=float,
        default=os.environ.get("EVERSTEP_KEEPER_LINGER", "30"),
        metavar="SECONDS",
        help="how long this node's keeper waits for a new agent after its own was killed",
    )
    own.add_argument("--es-stop-grace", **_STOP_GRACE)
    own.add_argument("--es-events", metavar="FILE", help="append every event of the job to FILE, one JSON a line")
    own.add_argument("--es-config", metavar="FILE", help="TOML file with an [everstep] table of settings")
    own.add_argument(
        "--es-preload", default="", metavar="MODULES", help="comma-separated modules to import before forks"
    )
    own.add_argument("--es-hang-timeout", type=float, default=FLOOR_S, metavar="SECONDS", help="least hang timeout")
    own.add_argument("--es-tcp", action="store_true", help="do not share memory between ranks of one host")
    return parse


def parse_command(arguments: Sequence[str]) -> Command:
    """Parse a command line. Raises LaunchError for what torch's configuration refuses."""
    parsed = parser().parse_args(list(arguments))
    if not (parsed.module or parsed.no_python) and not Path(parsed.training_script).is_file():
        raise LaunchError(f"no such script: {parsed.training_script}")
    _node_range(parsed.nnodes)
    with _quiet_torch():
        try:
            config, target, rest = config_from_args(parsed)
        except (AssertionError, ValueError) as error:
            raise LaunchError(str(error)) from None
    own = argparse.Namespace(**{k: v for k, v in vars(parsed).items() if k.startswith("es_")})
    program = _program(parsed, target, rest)
    endpoint = _chosen_endpoint(parsed, config.max_nodes)
    return Command(config, program, own, int(parsed.node_rank), endpoint, bool(parsed.log_dir))


def _node_range(text: str) -> tuple[int, int]:
    """The least and the greatest number of nodes in N or MIN:MAX."""
    low, _, high = str(text).partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 0 < int(low) <= int(high or low):
        raise LaunchError(f"--nnodes must be N or MIN:MAX, got {text!r}")
    return int(low), int(high or low)


def _chosen_endpoint(parsed: argparse.Namespace, max_nodes: int) -> str:
    """Where the user wants the nodes to meet; empty for a job of one node that names no place."""
    if parsed.standalone:
        return ""
    if parsed.rdzv_endpoint:
        return str(parsed.rdzv_endpoint)
    if parsed.master_port is None and max_nodes == 1:
        return ""
    return f"{parsed.master_addr}:{parsed.master_port or DEFAULT_PORT}"


def _program(parsed: argparse.Namespace, target: Any, rest: list[str]) -> dict[str, Any]:
    """What a worker runs. `rest` is torch's command after the interpreter: flags, script, arguments."""
    script = parsed.training_script
    arguments = list(rest[rest.index(script) + 1 :]) if script in rest else list(rest)
    if parsed.no_python:
        return {"kind": "command", "target": str(target), "arguments": arguments}
    if parsed.module:
        return {"kind": "module", "target": script, "arguments": arguments}
    return {"kind": "script", "target": script, "arguments": arguments}


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch's launcher warns of defaults (OMP_NUM_THREADS=1) that are documented here."""
    logger = logging.getLogger("torch.distributed.run")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(arguments: Sequence[str]) -> int:
    """Run a node of a job to its end; returns the exit status."""
    try:
        outcome = _run_node(parse_command(arguments))
    except (LaunchError, AgentError) as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the agent listens to signals
        print("everstep: error: stopped by SIGINT", file=sys.stderr)
        return 1
    return _conclude(outcome)


def _conclude(outcome: Outcome) -> int:
    if outcome.succeeded:
        return 0
    if outcome.detail:
        print(outcome.detail, file=sys.stderr, end="")
    where = f" (rank {outcome.rank})" if outcome.rank >= 0 else ""
    why = outcome.why.partition("\n")[0] if outcome.detail else " ".join(outcome.why.split())
    print(f"everstep: error: {why}{where}", file=sys.stderr)
    return 1


def _run_node(command: Command) -> Outcome:
    outcome = None
    try:
        with contextlib.ExitStack() as stack:
            job = str(command.torch.run_id)
            if not command.endpoint:
                job = uuid.uuid4().hex[:12] if job == "none" else job
            address = _coordinate(command, job, stack)
            first = _connect(address, _join_timeout(command))
            agent = NodeAgent(_node_config(command, job, address), lambda wait_s: AgentStream(address, wait_s), first)
            _stop_on_signals(agent, _signals(command))
            outcome = agent.run()
            return outcome
    finally:
        if not command.log_dir_chosen and command.torch.logs_specs is not None:
            discard(command.torch.logs_specs, succeeded=outcome is not None and outcome.succeeded)


def _connect(address: str, join_timeout_s: float) -> AgentStream:
    timeout_s = min(CONNECT_TIMEOUT_S, join_timeout_s)
    try:
        return AgentStream(address, timeout_s)
    except Unreachable:
        raise LaunchError(
            f"no coordinator answers at {address} within {timeout_s:g} s: check --rdzv-endpoint, and that the first "
            "node is up (if the port is in use by something else, choose another)"
        ) from None


def _coordinate(command: Command, job: str, stack: contextlib.ExitStack) -> str:
    """The coordinator's address; starts it here if this is the node to have it."""
    host, port = _endpoint(command.endpoint) if command.endpoint else ("127.0.0.1", 0)
    if not _is_local(host):
        return f"{host}:{port}"
    events = None
    if command.own.es_events:
        events = stack.enter_context(_open_events(command.own.es_events))
    config = Config(
        min_nodes=command.torch.min_nodes,
        max_nodes=command.torch.max_nodes,
        max_restarts=command.torch.max_restarts,
        join_timeout_s=_join_timeout(command),
        stop_grace_s=command.own.es_stop_grace,
    )
    try:
        server = CoordinatorServer(job, config, f"{host}:{port}", events=events, store_host=host)
    except PortTaken:
        if command.torch.max_nodes == 1:
            raise LaunchError(f"{host}:{port} is in use: choose another port in --rdzv-endpoint") from None
        return f"{host}:{port}"  # another node on this host was first
    stack.callback(server.close)
    return f"{host}:{server.port}"


def _join_timeout(command: Command) -> float:
    text = command.torch.rdzv_configs.get("join_timeout", 600)
    try:
        return float(text)
    except ValueError:
        raise LaunchError(f"--rdzv-conf join_timeout must be a number of seconds, got {text!r}") from None


def _open_events(path: str) -> TextIO:
    try:
        return Path(path).open("a")
    except OSError as error:
        raise LaunchError(f"--es-events {path}: {error.strerror}") from None


def _endpoint(endpoint: str) -> tuple[str, int]:
    host, separator, port = endpoint.rpartition(":")
    if not separator:
        host, port = endpoint, str(DEFAULT_PORT)
    if not host or not port.isdigit() or int(port) > 65535:
        raise LaunchError(f"--rdzv-endpoint must be HOST:PORT, got {endpoint!r}")
    return host, int(port)


def _is_local(host: str) -> bool:
    """Whether an address is this machine's: something can be bound to it."""
    try:
        with socket.create_server((socket.gethostbyname(host), 0)):
            return True
    except OSError:
        return False


def _node_config(command: Command, job: str, address: str) -> NodeConfig:
    torch, own = command.torch, command.own
    environment = {**os.environ, "TORCHELASTIC_SIGNALS_TO_HANDLE": _signals(command)}
    for name in (*_OVERRIDES, *_CHOSEN):
        value = getattr(own, f"es_{name.replace('-', '_')}")
        if value is not None:
            environment[f"EVERSTEP_{name.replace('-', '_').upper()}"] = str(value)
    if own.es_config:
        environment["EVERSTEP_CONFIG"] = own.es_config
    assert torch.logs_specs is not None
    logs = WorkerLogs(torch.logs_specs, torch.nproc_per_node, torch.role, torch.log_line_prefix_template)
    return NodeConfig(
        job=job,
        node=f"{socket.gethostname()}-{os.getpid()}",
        host=torch.local_addr or _address_towards(address),
        slots=torch.nproc_per_node,
        order=command.node_rank if torch.rdzv_backend == "static" else -1,
        program=command.program,
        logs=logs,
        environment=environment,
        preload=tuple(name for name in own.es_preload.split(",") if name),
        role=torch.role,
        max_restarts=torch.max_restarts,
        max_nodes=torch.max_nodes,
        memory_bytes=_keeper_memory(own.es_keeper_memory),
        keeper_linger_s=own.es_keeper_linger,
        rejoin_s=min(_join_timeout(command), REJOIN_S),
        hang_timeout_s=own.es_hang_timeout,
        shutdown_timeout_s=float(getattr(torch, "shutdown_timeout", 30)),
        shared_memory=not own.es_tcp,
    )


def _keeper_memory(text: str) -> int:
    if not text:
        return available()
    try:
        return parse_size(text)
    except ValueError as error:
        raise LaunchError(f"--es-keeper-memory: {error}") from None


def _address_towards(address: str) -> str:
    """Our own address on the way to the coordinator."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        name: str = probe.getsockname()[0]
    return name


def _signals(command: Command) -> str:
    """Torchrun's --signals-to-handle, which newer versions of torch have."""
    return str(getattr(command.torch, "signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"))


def _stop_on_signals(agent: NodeAgent, names: str) -> None:
    def stop(number: int, frame: Any) -> None:
        agent.stop(f"stopped by {signal.Signals(number).name}")

    for name in names.split(","):
        if name.strip() not in signal.Signals.__members__:
            raise LaunchError(f"--signals-to-handle: there is no signal {name.strip()!r}")
        signal.signal(signal.Signals[name.strip()], stop)


def coordinate(arguments: Sequence[str]) -> int:
    """`everstep coordinator`: a coordinator by itself, for one job."""
    parse = argparse.ArgumentParser(prog="everstep coordinator", description="Coordinate one job.")
    parse.add_argument("--bind", default=f"127.0.0.1:{DEFAULT_PORT}", metavar="HOST:PORT")
    parse.add_argument("--nnodes", default="1", metavar="N or MIN:MAX")
    parse.add_argument("--rdzv-id", default="none")
    parse.add_argument("--max-restarts", type=int, default=0)
    parse.add_argument("--es-stop-grace", **_STOP_GRACE)
    parse.add_argument("--es-events", metavar="FILE")
    own = parse.parse_args(list(arguments))
    try:
        host, port = _endpoint(own.bind)
        low, high = _node_range(own.nnodes)
        config = Config(min_nodes=low, max_nodes=high, max_restarts=own.max_restarts, stop_grace_s=own.es_stop_grace)
        with contextlib.ExitStack() as stack:
            events = stack.enter_context(_open_events(own.es_events)) if own.es_events else None
            server = CoordinatorServer(own.rdzv_id, config, f"{host}:{port}", events=events, store_host=host)
            stack.callback(server.close)
            print(f"coordinator of job {own.rdzv_id} at {host}:{server.port}", flush=True)
            server.ended.wait()
    except PortTaken as error:
        print(f"everstep: error: {error} is in use: choose another port in --bind", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
    return 0
