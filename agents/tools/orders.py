"""`everstep drain`, `quarantine`, `release` and `relayout`: an operator's orders to a running job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from everstep.comms.base.security import Security
from everstep.comms.control import everstep_pb2 as pb

from .client import Endpoints
from .status import ENDPOINT, told

DESCRIPTIONS = {
    "drain": "Have a node hand over to the others, and leave the job.",
    "quarantine": "Keep a host out of the job for some time; its nodes hand over when the job can spare them.",
    "release": "End the quarantine of a host.",
    "relayout": "Change the number of pipeline stages, while training continues.",
}
HOUR_S = 3600.0


def order(command: str, arguments: Sequence[str]) -> int:
    """Give the order `command`; returns the exit status."""
    parse = argparse.ArgumentParser(prog=f"everstep {command}", description=DESCRIPTIONS[command])
    parse.add_argument("endpoint", **ENDPOINT)
    if command == "drain":
        parse.add_argument("node", metavar="NODE", help="its name or its host, as `everstep status` shows them")
    elif command == "relayout":
        parse.add_argument(
            "--stages", required=True, metavar="N", help="the number of stages from then on; auto: the planner chooses"
        )
    else:
        parse.add_argument("host", metavar="HOST", help="as `everstep status` shows it")
    if command == "quarantine":
        parse.add_argument("--for", dest="seconds", type=float, default=HOUR_S, metavar="SECONDS", help="how long")
    if command in ("drain", "quarantine"):
        parse.add_argument("--why", default="", metavar="TEXT", help="for the event log")
    own = parse.parse_args(list(arguments))
    if command == "drain":
        request = pb.OrderRequest(drain=pb.Drain(node=own.node, why=own.why))
    elif command == "quarantine":
        request = pb.OrderRequest(quarantine=pb.Quarantine(host=own.host, seconds=own.seconds, why=own.why))
    elif command == "relayout":
        if own.stages != "auto" and not (own.stages.isdecimal() and 0 < int(own.stages) < 1 << 31):
            parse.error(f"--stages {own.stages}: give a whole number of at least 1, or auto")
        request = pb.OrderRequest(relayout=pb.Relayout(stages=0 if own.stages == "auto" else int(own.stages)))
    else:
        request = pb.OrderRequest(release=pb.Release(host=own.host))

    def give() -> int:
        print(Endpoints(own.endpoint, Security.of(os.environ)).order(request))
        return 0

    return told(give)
