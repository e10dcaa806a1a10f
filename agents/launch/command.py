"""The command line of `everstep run`: torchrun's, with our flags added."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, determine_local_world_size, get_args_parser, run_script_path

from everstep.agents.node.checkup import LEVELS
from everstep.agents.node.environment import variables
from everstep.agents.node.forkable import in_a_fork
from everstep.agents.node.imports import AUTO, Import, chosen, script_of
from everstep.agents.node.preemption import PROVIDERS
from everstep.comms.base.addresses import DEFAULT_PORT
from everstep.comms.base.process import STOPS
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import SETTINGS, Setting
from everstep.elastic.protocol.liveness import FLOOR_S, USER_S

from .coordinator_flags import WATCHED, LaunchError, add_coordinator_flags, node_range

BACKENDS = ("static", "c10d", "everstep")
RENDEZVOUS = ("join_timeout", "last_call_timeout", "is_host")  # of --rdzv-conf; torch adds rank and timeout by itself
WITHOUT_EFFECT = (  # what torch's own rendezvous takes, about connections that there are none of here
    *("timeout", "close_timeout", "heartbeat_timeout", "keep_alive_interval", "keep_alive_max_attempt"),
    *("read_timeout", "store_type", "use_libuv"),
)
SIGNALS = ",".join(number.name for number in STOPS)  # that are handled, unless --signals-to-handle names others
COORDINATOR_WAIT_S = 300.0
SIGNALS_VARIABLE = "PET_SIGNALS_TO_HANDLE"  # torch's, for a default of its own


@dataclass(frozen=True)
class Command:
    """A parsed command line: torch's part and ours."""

    torch: LaunchConfig
    program: dict[str, Any]
    own: argparse.Namespace
    node_rank: int
    endpoint: str  # empty: one node, with a coordinator of its own
    shares_port: bool  # the endpoint is --master-addr and --master-port, where scripts find torch's store
    log_dir_chosen: bool  # else torch makes one, of which nothing need stay


def parser() -> argparse.ArgumentParser:
    """Torchrun's own parser, with our flags added."""
    parse: argparse.ArgumentParser = get_args_parser()
    parse.prog = "everstep run"
    if SIGNALS_VARIABLE not in os.environ and parse.get_default("signals_to_handle") is not None:
        parse.set_defaults(signals_to_handle=SIGNALS)  # torch's four, and what schedulers give notice by
    parse.description = "Run a training script on this node. Every torchrun flag is accepted; ours begin with --es-."
    own = parse.add_argument_group("everstep")
    for known in SETTINGS:
        own.add_argument(known.flag, type=_text_of(known), metavar=_metavar(known), help=_help(known.about.plain))
    add_coordinator_flags(own, log="warnings")
    own.add_argument("--es-metrics", default="", metavar="HOST:PORT", help="serve this node's Prometheus metrics there")
    own.add_argument(
        "--es-coordinator-metrics",
        default="",
        metavar="HOST:PORT",
        help=f"{WATCHED}, on the node that has the coordinator",
    )
    own.add_argument(
        "--es-keeper-memory", default="", metavar="SIZE", help="memory of this node for protection, such as 8GiB"
    )
    own.add_argument(
        "--es-domain",
        action="append",
        default=[],
        metavar="KIND=VALUE",
        help="a failure domain that this node is in, such as rack=7; may be given several times",
    )
    own.add_argument(
        "--es-keeper-linger",
        type=float,
        default=os.environ.get("EVERSTEP_KEEPER_LINGER", "30"),
        metavar="SECONDS",
        help="how long this node's keeper waits for a new agent after its own was killed",
    )
    own.add_argument(
        "--es-preemption",
        default="none",
        choices=("none", *PROVIDERS),
        help="whose metadata service this node asks whether it will be taken away; it then hands over and leaves",
    )
    own.add_argument(
        "--es-preemption-endpoint",
        default="",
        metavar="URL",
        help="where that service is, if not at the provider's own address",
    )
    own.add_argument(
        "--es-health-check",
        default="quick",
        choices=LEVELS,
        help="what this node tries of itself before it joins: full has larger sizes, and the GPUs",
    )
    own.add_argument(
        "--es-coordinator-wait",
        type=float,
        default=COORDINATOR_WAIT_S,
        metavar="SECONDS",
        help="how long this node's workers may make no progress without a coordinator before they are stopped",
    )
    own.add_argument("--es-config", metavar="FILE", help="TOML file with an [everstep] table of settings")
    own.add_argument(
        "--es-preload",
        default=AUTO,
        metavar="MODULES",
        help="comma-separated modules to import before workers are forked; auto: the packages that the script imports",
    )
    own.add_argument("--es-hang-timeout", type=float, default=FLOOR_S, metavar="SECONDS", help="least hang timeout")
    own.add_argument("--es-share-gpu", action="store_true", help="let workers of this node share a GPU")
    own.add_argument(
        "--es-user-timeout",
        type=float,
        default=USER_S,
        metavar="SECONDS",
        help="how long your own code (dataset, loop) may show no progress, signs of life provided",
    )
    own.add_argument("--es-tcp", action="store_true", help="do not share memory between ranks of one host")
    return parse


def _text_of(known: Setting) -> Callable[[str], str]:
    """The text of a flag, which a worker reads; refused here where it cannot."""

    def text_of(text: str) -> str:
        try:
            known.parse(text, "the value")
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return text_of


def _metavar(known: Setting) -> str:
    if known.about.choices:
        return "|".join(known.about.choices)
    return "N" if known.kind == "int" else known.about.unit.upper() or "VALUE"


def _help(text: str) -> str:
    return text.replace("%", "%%")


def overrides(own: argparse.Namespace) -> dict[str, str]:
    """The variables of the settings that flags give."""
    given = {known.variable: getattr(own, known.flag.removeprefix("--").replace("-", "_")) for known in SETTINGS}
    return {name: text for name, text in given.items() if text is not None}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, touching no device. Raises LaunchError for what is refused so far."""
    parsed = parser().parse_args(list(arguments))
    if not (parsed.module or parsed.no_python) and not Path(parsed.training_script).exists():
        raise LaunchError(f"no such script: {parsed.training_script}")
    _, most = node_range(parsed.nnodes)
    if parsed.standalone and most > 1:
        raise LaunchError(f"--standalone is a job of one node, and --nnodes={parsed.nnodes}: leave one of them out")
    if parsed.rdzv_backend not in BACKENDS:
        raise LaunchError(
            f"--rdzv-backend={parsed.rdzv_backend}: nodes meet at everstep's own coordinator; {', '.join(BACKENDS)} "
            "all mean that (several coordinators may share an etcd: --es-store)"
        )
    if parsed.event_log_handler != "null":
        raise LaunchError("--event-log-handler: torch's events are not made; everstep has its own, see --es-events")
    return parsed


def preloads(parsed: argparse.Namespace) -> list[Import]:
    """What is imported before workers are forked."""
    program = None if parsed.no_python else script_of(parsed.training_script, module=parsed.module)
    return chosen(parsed.es_preload, program)


def configure(parsed: argparse.Namespace) -> Command:
    """The configuration of a parsed command line. Raises LaunchError for values that torch refuses."""
    _count_devices(parsed)
    chosen = bool(parsed.log_dir)
    parsed.log_dir = parsed.log_dir or tempfile.mkdtemp(prefix="torchelastic_")  # as torch would, but not left behind
    with _quiet_torch(), _unseen_devices():
        try:
            config, target, rest = config_from_args(parsed)
        except (AssertionError, ValueError) as error:
            _discard(parsed.log_dir, chosen)
            raise LaunchError(str(error)) from None
    try:
        _check(config)
    except LaunchError:
        _discard(parsed.log_dir, chosen)
        raise
    own = argparse.Namespace(**{k: v for k, v in vars(parsed).items() if k.startswith("es_")})
    program = _program(parsed, target, rest)
    endpoint = _chosen_endpoint(parsed, config.max_nodes)
    shares_port = bool(endpoint) and not parsed.rdzv_endpoint
    return Command(config, program, own, int(parsed.node_rank), endpoint, shares_port, chosen)


def _discard(log_dir: str, chosen: bool) -> None:
    if not chosen:
        shutil.rmtree(log_dir, ignore_errors=True)


def _count_devices(parsed: argparse.Namespace) -> None:
    """Let torch resolve --nproc-per-node=gpu, auto and the like, in a process that then ends.

    Counting devices may initialise their driver, which must not happen in this process: forks cannot use it then.
    """
    asked = str(parsed.nproc_per_node)
    if asked.removeprefix("-").isdigit():
        if int(asked) < 1:
            raise LaunchError(f"--nproc-per-node={asked}: expected at least one worker")
        return
    with _quiet_torch():
        count, error = in_a_fork(lambda: determine_local_world_size(parsed.nproc_per_node))
    if error:
        raise LaunchError(f"--nproc-per-node={parsed.nproc_per_node}: {error}")
    if not count:
        raise LaunchError(f"--nproc-per-node={parsed.nproc_per_node}: there are no such devices")
    parsed.nproc_per_node = str(count)


def _check(config: LaunchConfig) -> None:
    """Raise LaunchError for flags that torch accepts, and Everstep cannot implement."""
    unknown = sorted(config.rdzv_configs.keys() - {*RENDEZVOUS, *WITHOUT_EFFECT, "rank"})
    if unknown:
        raise LaunchError(
            f"--rdzv-conf: there are {', '.join((*RENDEZVOUS, *WITHOUT_EFFECT))}, not {', '.join(unknown)}"
        )
    if getattr(config, "numa_options", None) is not None and not in_a_fork(torch.cuda.is_available)[0]:
        raise LaunchError("--numa-binding binds workers to the processors near their GPUs, and no GPU is available")
    parent = os.environ.get("CUDA_VISIBLE_DEVICES")
    if getattr(config, "virtual_local_rank", False) and parent is not None:
        count = len(parent.split(","))
        if count < config.nproc_per_node:
            raise LaunchError(
                f"--virtual-local-rank gives each of {config.nproc_per_node} workers a GPU of its own, and "
                f"CUDA_VISIBLE_DEVICES={parent} names {count}"
            )


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
    if parsed.no_python and not parsed.run_path:
        return {"kind": "command", "target": str(target), "arguments": arguments}
    if target not in (sys.executable, run_script_path):  # PYTHON_EXEC: another interpreter
        return {"kind": "command", "target": str(target), "arguments": list(rest)}
    if parsed.module:
        return {"kind": "module", "target": script, "arguments": arguments}
    return {"kind": "script", "target": script, "arguments": arguments}


def _unseen_devices() -> AbstractContextManager[None]:
    """Torch checks for CUDA when it makes a LaunchConfig. Inside, the check fails without touching the driver."""
    return variables({"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"})


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
