"""Which launcher gets the coordinator's address, when several on a host try at the same moment."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from everstep.agents.coordinator.server import NoSuchAddress, PortTaken, _reserve
from tests.jobs.ports import free_port

ROUNDS = 300


def test_one_of_two_gets_the_address() -> None:
    """At least one of them: otherwise both would wait for the other's coordinator."""
    port = free_port()
    winners = []
    barrier = threading.Barrier(2)
    lock = threading.Lock()

    def try_it() -> None:
        for number in range(ROUNDS):
            barrier.wait(10)
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(PortTaken):
                    tcp, udp = _reserve("127.0.0.1", port)
                    stack.enter_context(udp)
                    tcp.close()
                    with contextlib.suppress(OSError):  # as gRPC would
                        stack.enter_context(socket.create_server(("127.0.0.1", port)))
                        with lock:
                            winners.append(number)
                barrier.wait(10)

    threads = [threading.Thread(target=try_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert winners == list(range(ROUNDS))


def test_addresses_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken, pytest.raises(PortTaken):
        _reserve("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(NoSuchAddress, match=r"^cannot listen at 192\.0\.2\.1:1234: Cannot assign requested address$"):
        _reserve("192.0.2.1", 1234)
    with pytest.raises(NoSuchAddress, match=r"no\.such\.host"):
        _reserve("no.such.host.invalid", 1234)
    tcp, udp = _reserve("127.0.0.1", 0)
    with tcp, udp:
        assert tcp.getsockname() == udp.getsockname()
