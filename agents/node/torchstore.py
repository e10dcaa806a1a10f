"""Torch's own store (TCPStore) for scripts that rendezvous by MASTER_ADDR and MASTER_PORT.

It lives in the agent of the first node, as torchrun's does, so that a coordinator's death does not touch it.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from everstep.comms.base import addresses


class TorchStores:
    """Stores that this node may have to serve: one per attempt, like torchrun, since torch does not prefix the keys.

    Only the first node of a job serves them. Until it does, connecting clients wait.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._reserved: dict[int, socket.socket] = {}
        self._open: list[TCPStore] = []

    def reserve(self) -> int:
        """Reserve a port for one more store, on this node's address only."""
        listener = addresses.listen(self._host, 0, backlog=2048)
        port = int(listener.getsockname()[1])
        self._reserved[port] = listener
        return port

    def open(self, port: int) -> None:
        """Serve on a reserved port; does nothing if the port is not reserved or is served already."""
        listener = self._reserved.pop(port, None)
        if listener is not None:
            at = (self._host, port)
            store = TCPStore(*at, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
            self._open.append(store)

    def close(self) -> None:
        """Close them all."""
        for listener in self._reserved.values():
            listener.close()
        self._reserved.clear()
        self._open.clear()
