"""A member in a process of its own; see `backends.Victim`."""

import json
import sys

from backends import GlooBackend, MeshBackend, die_with_parent
from torch.distributed import TCPStore

from everstep.comms.mesh.communicator import (
    Key,
    Kind,
    Peer,
)
from everstep.comms.mesh.gather import barrier
from everstep.comms.mesh.gloo import GlooCommunicator


def main() -> None:
    die_with_parent()
    arguments = json.loads(sys.argv[1])
    rank = arguments["rank"]
    if arguments["backend"] == GlooBackend.name:
        comm = GlooCommunicator(rank, 1, store=TCPStore("127.0.0.1", arguments["port"], is_master=False))
    else:
        comm = MeshBackend(arguments["shared_memory"]).make(rank, 1)
    print(json.dumps(comm.peer.__dict__), flush=True)
    plan = json.loads(sys.stdin.readline())
    peers = {peer["rank"]: Peer(**peer) for peer in plan["peers"]}
    comm.edit(plan["generation"], peers)
    barrier(comm, plan["generation"], 0)
    print("waiting", flush=True)
    comm.receive(min(peers), Key(Kind.USER, -1))


if __name__ == "__main__":
    main()
