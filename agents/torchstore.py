"""Torch's own store (TCPStore) for scripts that rendezvous by MASTER_ADDR and MASTER_PORT.

It lives in the agent of the first node, as torchrun's does, so that a coordinator's death does not touch it.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]


class TorchStores:
    """Stores on this node: one for every attempt, as torchrun has, since torch prefixes no keys by it."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._open: list[TCPStore] = []

    def open(self) -> int:
        """Open one more, on this node's address only; returns its port."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, 0), family=family, backlog=2048)
        port = int(listener.getsockname()[1])
        store = TCPStore(self._host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self._open.append(store)
        return port

    def close(self) -> None:
        """Close them all."""
        self._open.clear()
