"""Free ports."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

FIRST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """On loopback, for TCP and UDP; none that the kernel may assign to a connection before they are used."""
    low = int(_RANGE.read_text().split()[0])
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            port = random.SystemRandom().randrange(FIRST, low)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    return free_ports(1)[0]
