"""The coordinator's flags, shared by `everstep run` and `everstep coordinator`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TextIO

from everstep.agents.monitoring.story import LOGS
from everstep.comms.base import addresses as hosts
from everstep.elastic.protocol.state import Config

from .quarantine_flag import policy

WATCHED = "serve the job's web page (/) and its Prometheus metrics (/metrics) there"


class LaunchError(Exception):
    """A command line that cannot be carried out."""


def add_coordinator_flags(group: argparse._ActionsContainer, *, log: str) -> None:
    """Declare them; `log` is the default of --es-log."""
    group.add_argument(
        "--es-stop-grace",
        type=float,
        default=Config().stop_grace_s,
        metavar="SECONDS",
        help="how long a job may take to save a checkpoint when it is stopped",
    )
    group.add_argument(
        "--es-spares",
        type=int,
        default=Config().spares,
        metavar="N",
        help="how many nodes beyond the most of --nnodes may wait, prepared, to take the place of one that is lost",
    )
    group.add_argument(
        "--es-rebalance-after",
        type=float,
        default=Config().rebalance_after_s,
        metavar="SECONDS",
        help="how long a layout has to last before a faster one is looked for and taken, at a step boundary (0: never)",
    )
    group.add_argument(
        "--es-node-mtbf-hours",
        type=float,
        default=Config().node_mtbf_h,
        metavar="HOURS",
        help="how long a node works until it fails, on average: to forecast how often the job goes back to storage",
    )
    group.add_argument(
        "--es-prefetch",
        choices=("on", "off"),
        default="on",
        help="whether what a rebalance moves is copied ahead, while training continues (off: it is read at the switch)",
    )
    group.add_argument(
        "--es-quarantine",
        type=policy,
        default=policy("off"),
        metavar="N/SECONDS[/SECONDS]",
        help="keep a host out after N failures or slownesses within so many seconds, for as many, or for the second "
        "number (off: never)",
    )
    group.add_argument(
        "--es-store",
        default="",
        metavar="FILE or URL",
        help="where the coordinator keeps its state: a file (SQLite), or etcd://HOST:PORT[,HOST:PORT...]",
    )
    group.add_argument(
        "--es-events", default="", metavar="FILE", help="append every event of the job to FILE, one JSON a line"
    )
    group.add_argument(
        "--es-log",
        default=log,
        choices=LOGS,
        help="lines on standard error, from the node that has the coordinator: warnings and alarms, or every event of "
        "importance as text or JSON",
    )
    group.add_argument(
        "--es-insecure-network",
        action="store_true",
        help="bind addresses that other hosts reach, without certificates: for trusted networks only",
    )


def node_range(text: str) -> tuple[int, int]:
    """The least and the greatest number of nodes in N or MIN:MAX."""
    low, _, high = str(text).partition(":")
    if not low.isdigit() or not (high or low).isdigit() or not 0 < int(low) <= int(high or low):
        raise LaunchError(f"--nnodes must be N or MIN:MAX, got {text!r}")
    return int(low), int(high or low)


def open_events(path: str) -> TextIO:
    try:
        return Path(path).open("a")
    except OSError as error:
        raise LaunchError(f"--es-events {path}: {error.strerror}") from None


def parse_endpoint(endpoint: str, flag: str = "--rdzv-endpoint") -> hosts.Address:
    try:
        return hosts.parse(endpoint.strip(), port=hosts.DEFAULT_PORT)
    except hosts.BadAddress:
        hint = " (an IPv6 address in brackets: [::1]:29400)" if endpoint.count(":") > 1 else ""
        raise LaunchError(f"{flag} must be HOST:PORT, got {endpoint!r}{hint}") from None
