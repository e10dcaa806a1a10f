"""`everstep coordinator`, and what `everstep run` shares with it. Nothing here imports torch, which takes a second."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everstep.agents.coordinator.process import CoordinatorFailed, EndAsked, Task, serve
from everstep.comms.base import addresses as hosts
from everstep.comms.base.security import TRUST, Security, SecurityError
from everstep.elastic.protocol.state import Config

from .coordinator_flags import (
    WATCHED,
    LaunchError,
    add_coordinator_flags,
    node_range,
    open_events,
    parse_endpoint,
)


def coordinate(arguments: Sequence[str]) -> int:
    """`everstep coordinator`: a coordinator by itself, for one job."""
    parse = argparse.ArgumentParser(prog="everstep coordinator", description="Coordinate one job.")
    parse.add_argument("--bind", default=f"127.0.0.1:{hosts.DEFAULT_PORT}", metavar="HOST:PORT")
    parse.add_argument("--nnodes", default="1", metavar="N or MIN:MAX")
    parse.add_argument("--rdzv-id", default="none")
    parse.add_argument("--max-restarts", type=int, default=0)
    add_coordinator_flags(parse, log="text")
    parse.add_argument("--es-metrics", default="", metavar="HOST:PORT", help=WATCHED)
    own = parse.parse_args(list(arguments))
    logging.basicConfig(format="everstep: %(message)s", level=logging.INFO)
    try:
        at = parse_endpoint(own.bind, "--bind")
        low, high = node_range(own.nnodes)
        if own.es_events:
            open_events(own.es_events).close()
        if own.es_insecure_network:
            os.environ[TRUST] = "1"
        store = own.es_store or str(_default_store(own.rdzv_id, at.host, at.port))
        nodes = {"min_nodes": low, "max_nodes": high, "max_restarts": own.max_restarts}
        task = coordinator_task(own, own.rdzv_id, at, store, own.es_metrics, **nodes)

        def serves(port: int) -> None:
            print(f"coordinator of job {own.rdzv_id} at {hosts.join(at.host, port)}", flush=True)

        asked = EndAsked()
        asked.listen()
        return serve(task, Security.of(os.environ), serves, asked)
    except CoordinatorFailed as error:
        hint = ": choose another port in --bind" if error.taken else ""
        print(f"everstep: error: {error}{hint}", file=sys.stderr)
    except (LaunchError, SecurityError) as error:
        print(f"everstep: error: {error}", file=sys.stderr)
    return 2


def _default_store(job: str, host: str, port: int) -> Path:
    """Where `everstep coordinator` keeps a job's state, so that the same command finds it again."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "everstep"
    name = f"{host}-{port}" if job == "none" else job
    return folder / f"{urllib.parse.quote(name, safe='')}.sqlite"


def coordinator_task(
    own: argparse.Namespace, job: str, at: hosts.Address, store: str, metrics: str, **nodes: Any
) -> Task:
    """What a coordinator at `at` is to do; `nodes`: the fields of Config that are no flags of these."""
    if not 0 <= own.es_rebalance_after < math.inf:
        raise LaunchError(f"--es-rebalance-after {own.es_rebalance_after:g}: give seconds, or 0 for never")
    if not 0 < own.es_node_mtbf_hours < math.inf:
        raise LaunchError(f"--es-node-mtbf-hours {own.es_node_mtbf_hours:g}: give hours, more than none")
    if own.es_spares < 0:
        raise LaunchError(f"--es-spares {own.es_spares}: give a number of nodes, or 0 for none")
    if own.es_spares and nodes["max_nodes"] == 1:
        raise LaunchError(
            f"--es-spares {own.es_spares}: a job of one node (--nnodes) ends with that node: spares are for jobs of "
            "two nodes or more, which protect each other's state"
        )
    config = Config(
        **nodes,
        spares=own.es_spares,
        node_mtbf_h=own.es_node_mtbf_hours,
        stop_grace_s=own.es_stop_grace,
        rebalance_after_s=own.es_rebalance_after,
        prefetch=own.es_prefetch == "on",
        **own.es_quarantine.config(),
    )
    return Task(
        job=job,
        config=config,
        host=at.host,
        port=at.port,
        store=store,
        events=own.es_events,
        metrics=metrics,
        log=own.es_log,
    )
