"""A node of `everstep run`: our coordinator and agent behind torchrun's command line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from everstep.agents.base.patience import Wait
from everstep.agents.coordinator.etcd import is_etcd
from everstep.agents.coordinator.process import (
    END_S,
    CoordinatorFailed,
    CoordinatorProcess,
)
from everstep.agents.monitoring.pages import AddressTaken
from everstep.agents.node.config import AgentError, NodeConfig
from everstep.agents.node.logs import WorkerLogs, discard
from everstep.agents.node.memory_budget import available
from everstep.agents.node.node import NodeAgent
from everstep.agents.node.preloader import Preloader
from everstep.comms.base import addresses as hosts
from everstep.comms.base.process import SAME_S
from everstep.comms.base.security import (
    TRUST,
    Security,
    SecurityError,
    explain_unreachable,
)
from everstep.comms.control.attach import Attachment, Unreachable
from everstep.elastic.contract.sizes import parse_size
from everstep.elastic.protocol.agent_events import NodeOutcome
from everstep.elastic.protocol.state import Config

from . import domain_flag
from .command import SIGNALS, Command, overrides
from .coordinate import coordinator_task
from .coordinator_flags import LaunchError, open_events, parse_endpoint
from .masterport import MasterPort

LOOPBACK = hosts.Address("127.0.0.1", 0)
TORCH_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
CONNECT_TIMEOUT_S = 60.0  # torchrun waits as long for its store
REJOIN_S = 60.0
LOST = 3  # the exit status of a job that has trained, and has lost something all the same


def launch(command: Command, preloader: Preloader) -> int:
    """Run a node of a job to its end; returns the exit status. Raises LaunchError for what keeps it from running."""
    try:
        return _conclude(_run_node(command, preloader))
    except AgentError as error:
        raise LaunchError(str(error)) from None
    except AddressTaken as error:
        raise LaunchError(f"--es-metrics {error}") from None


def _conclude(outcome: NodeOutcome) -> int:
    """Report how the job ended; returns the exit status, which docs/guarantees.md explains."""
    for lost in outcome.lost:
        if lost != outcome.why:
            print(f"everstep: error: {lost}", file=sys.stderr)
    if outcome.succeeded:
        return LOST if outcome.lost else 0
    if outcome.detail:
        print(outcome.detail, file=sys.stderr, end="")
    where = f" (rank {outcome.rank})" if outcome.rank >= 0 else ""
    why = outcome.why.partition("\n")[0] if outcome.detail else " ".join(outcome.why.split())
    print(f"everstep: error: {why}{where}", file=sys.stderr)
    return LOST if outcome.lost else 1


def _run_node(command: Command, preloader: Preloader) -> NodeOutcome:
    outcome = None
    try:
        with contextlib.ExitStack() as stack:
            job = str(command.torch.run_id)
            if not command.endpoint:
                job = uuid.uuid4().hex[:12] if job == "none" else job
            security = _security(command)
            addresses, coordinator, master = _coordinate(command, job, security, stack)
            link = Attachment(addresses, job, security)
            address = _reach(link, _join_timeout(command))
            on_store = master.serve_store if master is not None else None
            agent = NodeAgent(_node_config(command, job, address), link, preloader, on_store)
            others = len(addresses) > (coordinator is not None)  # coordinators, that stay when this node goes
            _stop_on_signals(agent, _signals(command), leaves=signal.SIGTERM if others else None)
            # A coordinator that ends with this node would only warn that the node is lost.
            outcome = agent.run(lambda: None if coordinator is None or others else coordinator.close())
            if coordinator is not None and (outcome.unfit or (others and outcome.left)):
                coordinator.close()  # so that another coordinator takes over
            elif coordinator is not None:
                _see_off(coordinator, agent, outcome)
            return outcome
    finally:
        if not command.log_dir_chosen and command.torch.logs_specs is not None:
            discard(command.torch.logs_specs, succeeded=outcome is not None and outcome.succeeded)


def _security(command: Command) -> Security:
    if command.own.es_insecure_network:
        os.environ[TRUST] = "1"
    try:
        return Security.of(os.environ)
    except SecurityError as error:
        raise LaunchError(str(error)) from None


def _reach(link: Attachment, join_timeout_s: float) -> str:
    timeout_s = min(CONNECT_TIMEOUT_S, join_timeout_s)
    where = ", ".join(link.addresses)
    wait = Wait(f"this node looks for a coordinator at {where}, where none answers; it gives up after {timeout_s:g} s")
    try:
        return link.reach(timeout_s, wait.look)
    except Unreachable as error:
        hint = "check --rdzv-endpoint, and that the first node is up (if the port is in use by something else, "
        hint = (
            _unknown(link.addresses)
            or explain_unreachable(link.addresses[0], link.security)
            or f"{hint}choose another)"
        )
        raise LaunchError(f"no coordinator answers at {error} within {timeout_s:g} s: {hint}") from None


def _see_off(coordinator: CoordinatorProcess, agent: NodeAgent, outcome: NodeOutcome) -> None:
    """Wait for the coordinator, which ends when all nodes know that the job is over: other nodes may still need it."""
    try:
        if not coordinator.wait(END_S) and outcome.succeeded:
            print("everstep: this node is done, and continues to coordinate the others", file=sys.stderr)
            agent.when_over(coordinator.close)
            coordinator.wait(None)
    except KeyboardInterrupt:
        coordinator.close()


def _coordinate(
    command: Command, job: str, security: Security, stack: contextlib.ExitStack
) -> tuple[list[str], CoordinatorProcess | None, MasterPort | None]:
    """The coordinators' addresses; starts one here if this is a node to have one."""
    endpoints = [parse_endpoint(one) for one in command.endpoint.split(",")] if command.endpoint else [LOOPBACK]
    here = _is_host(command)
    own = next((one for one in endpoints if hosts.is_own(one.host)), endpoints[0] if here else None)
    if own is None or here is False:
        return [str(one) for one in endpoints], None, None
    at = _reachable(command, security, own)
    endpoints = [at if one == own else one for one in endpoints]
    only = bool(here) or (command.torch.max_nodes == 1 and len(endpoints) == 1)  # or another may be there already
    if len(endpoints) > 1 and not is_etcd(command.own.es_store):
        raise LaunchError(
            f"--rdzv-endpoint names {len(endpoints)} coordinators, which can only stand by for one another with a "
            "store that they share: give --es-store=etcd://HOST:PORT"
        )
    if command.own.es_events:
        open_events(command.own.es_events).close()
    store = command.own.es_store
    if not store:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="everstep-", ignore_cleanup_errors=True))
        store = f"{folder}/store.sqlite"
    task = coordinator_task(
        command.own,
        job,
        at,
        store,
        command.own.es_coordinator_metrics,
        min_nodes=command.torch.min_nodes,
        max_nodes=command.torch.max_nodes,
        max_restarts=command.torch.max_restarts,
        join_timeout_s=_join_timeout(command),
        last_call_s=_seconds(command, "last_call_timeout", Config().last_call_s),
    )
    master: MasterPort | None = None
    try:
        if command.shares_port:
            master = _master_port(at, security, stack)
            at = at._replace(port=master.port)
            task = replace(task, port=at.port, behind=0)
            endpoints = [at]
        coordinator = CoordinatorProcess(task, security)
    except CoordinatorFailed as error:
        if master is not None:
            master.close()
        if error.taken and only:
            flag = "--master-port" if command.shares_port else "--rdzv-endpoint"
            raise LaunchError(f"{at} is in use: choose another port in {flag}") from None
        if error.taken:
            return [str(one) for one in endpoints], None, None  # another node on this host was first
        raise LaunchError(str(error)) from None
    stack.callback(coordinator.close)
    if master is not None:
        master.start(coordinator.port)
    addresses = [str(one if one.port else one._replace(port=coordinator.port)) for one in endpoints]
    return addresses, coordinator, master


def _master_port(at: hosts.Address, security: Security, stack: contextlib.ExitStack) -> MasterPort:
    """Listen where torchrun has torch's store. Raises CoordinatorFailed as the coordinator itself would."""
    try:
        security.check_bind(at.host)
        master = MasterPort(at)
    except SecurityError as error:
        raise CoordinatorFailed(str(error)) from None
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise CoordinatorFailed(f"cannot listen at {at}: {error.strerror or error}", taken=taken) from None
    stack.callback(master.close)
    return master


def _is_host(command: Command) -> bool | None:
    """Whether this node is to have a coordinator, by --rdzv-conf; None: if an endpoint's address is this machine's."""
    from torch.distributed.elastic.rendezvous.api import RendezvousParameters

    given = {name: value for name, value in command.torch.rdzv_configs.items() if name == "is_host"}
    try:
        return RendezvousParameters("static", "", "", 1, 1, **given).get_as_bool("is_host")
    except ValueError:
        raise LaunchError(f"--rdzv-conf is_host must be true or false, got {given['is_host']!r}") from None


def _join_timeout(command: Command) -> float:
    return _seconds(command, "join_timeout", 600.0)


def _seconds(command: Command, name: str, default: float) -> float:
    text = command.torch.rdzv_configs.get(name, default)
    try:
        return float(text)
    except ValueError:
        raise LaunchError(f"--rdzv-conf {name} must be a number of seconds, got {text!r}") from None


def _reachable(command: Command, security: Security, endpoint: hosts.Address) -> hosts.Address:
    """An endpoint as other hosts reach it, if its name resolves to a loopback address on this host.

    Debian's /etc/hosts maps the host's own name to 127.0.1.1; on other hosts the name resolves to the real address.
    """
    host = endpoint.host
    alone = command.torch.max_nodes == 1 or hosts.is_literal(host) or host == "localhost"
    if alone or host.startswith("localhost.") or not hosts.is_loopback(host):
        return endpoint
    _, place = hosts.resolve(*endpoint)
    found = hosts.outward()
    if found:
        with contextlib.suppress(SecurityError):
            security.check_bind(found)
            print(
                f"everstep: warning: {host} is {place[0]} on this host, which others do not reach: the coordinator "
                f"listens at {found} (give that address in --rdzv-endpoint, or mend /etc/hosts)",
                file=sys.stderr,
            )
            return hosts.Address(found, endpoint.port)
    print(
        f"everstep: warning: {host} is {place[0]} on this host, where nodes on other hosts do not reach the "
        "coordinator: give an address of this host in --rdzv-endpoint",
        file=sys.stderr,
    )
    return endpoint


def _unknown(addresses: Sequence[str]) -> str:
    """The names among some addresses that this host cannot resolve, as an error text; empty if it resolves all."""
    unknown = []
    for host in {hosts.parse(address).host for address in addresses}:
        try:
            hosts.resolve(host, 0)
        except OSError as error:
            unknown.append(f"this host knows no address of {host} ({error.strerror})")
    return "; ".join(sorted(unknown))


def _own_address(chosen: str | None, coordinator: str) -> str:
    """This node's address: the user's choice, or that of the interface that routes to the coordinator."""
    return hosts.unbracketed(chosen) if chosen else hosts.towards(*hosts.parse(coordinator))


def _node_config(command: Command, job: str, address: str) -> NodeConfig:
    torch, own = command.torch, command.own
    handled = _signals(command)
    # By default workers find there what torchrun gives them, though this launcher handles more.
    environment = {**os.environ, "TORCHELASTIC_SIGNALS_TO_HANDLE": TORCH_SIGNALS if handled == SIGNALS else handled}
    environment |= overrides(own)
    if own.es_config:
        environment["EVERSTEP_CONFIG"] = own.es_config
    assert torch.logs_specs is not None
    filters = tuple(getattr(torch, f"duplicate_{name}_filters", None) or () for name in ("stdout", "stderr"))
    template = torch.log_line_prefix_template
    logs = WorkerLogs(torch.logs_specs, torch.nproc_per_node, torch.role, template, (filters[0], filters[1]))
    numa = getattr(torch, "numa_options", None)
    return NodeConfig(
        job=job,
        node=f"{socket.gethostname()}-{os.getpid()}",
        host=_own_address(torch.local_addr, address),
        slots=torch.nproc_per_node,
        order=command.node_rank if torch.rdzv_backend == "static" else -1,
        program=command.program,
        logs=logs,
        environment=environment,
        role=torch.role,
        max_restarts=torch.max_restarts,
        max_nodes=torch.max_nodes,
        domains=domain_flag.labels(own.es_domain, os.environ),
        memory_bytes=_keeper_memory(own.es_keeper_memory),
        worker_memory_bytes=available() // 2 // max(1, torch.nproc_per_node),  # the keeper needs as much
        keeper_linger_s=own.es_keeper_linger,
        rejoin_s=min(_join_timeout(command), REJOIN_S),
        coordinator_wait_s=command.own.es_coordinator_wait,
        hang_timeout_s=own.es_hang_timeout,
        user_timeout_s=own.es_user_timeout,
        shutdown_timeout_s=float(getattr(torch, "shutdown_timeout", 30)),
        shared_memory=not own.es_tcp,
        share_gpu=own.es_share_gpu,
        virtual_local_rank=bool(getattr(torch, "virtual_local_rank", False)),
        numa_binding=numa.affinity_mode.value if numa is not None else "",
        preemption="" if own.es_preemption == "none" else own.es_preemption,
        preemption_endpoint=_metadata_service(own.es_preemption_endpoint),
        metrics=own.es_metrics,
        health_check=own.es_health_check,
    )


def _metadata_service(text: str) -> str:
    if text and not re.fullmatch(r"https?://[^/\s]+/?", text):
        raise LaunchError(f"--es-preemption-endpoint: expected http://HOST[:PORT], got {text!r}")
    return text


def _keeper_memory(text: str) -> int:
    if not text:
        return available()
    try:
        return parse_size(text)
    except ValueError as error:
        raise LaunchError(f"--es-keeper-memory: {error}") from None


def _signals(command: Command) -> str:
    """Torchrun's --signals-to-handle, which newer versions of torch have."""
    return str(getattr(command.torch, "signals_to_handle", SIGNALS))


def _stop_on_signals(agent: NodeAgent, names: str, *, leaves: signal.Signals | None) -> None:
    """Signals stop the job; but the signals in `leaves` drain this node, and the job continues without it.

    A signal that was ignored when this process started stays ignored, as under nohup; except SIGINT and SIGQUIT, since
    a shell without job control starts all background processes with these ignored.
    """
    asked_s = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal asked_s
        if asked_s and time.monotonic() - asked_s < SAME_S:
            return
        asked_s = time.monotonic()
        ask = agent.leave if number == leaves else agent.stop
        ask(f"stopped by {signal.Signals(number).name}", signal.Signals(number))

    for name in map(str.strip, names.split(",")):
        if name not in signal.Signals.__members__:
            raise LaunchError(f"--signals-to-handle: there is no signal {name!r}")
        number = signal.Signals[name]
        if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, stop)
