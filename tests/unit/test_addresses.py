"""Addresses as text, and the sockets that belong to them."""

from __future__ import annotations

import socket

import pytest

from everstep.comms.base import addresses
from everstep.comms.base.addresses import Address, BadAddress, parse


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("node1:29500", "node1", 29500),
        ("10.0.0.1:0", "10.0.0.1", 0),
        ("[::1]:29400", "::1", 29400),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("::1:29400", "::1", 29400),  # as torch reads it: the last colon is the port's
        ("node1", "node1", 7),
        ("[::1]", "::1", 7),
    ],
)
def test_what_is_read(text: str, host: str, port: int) -> None:
    assert parse(text, port=7) == Address(host, port)
    assert parse(str(parse(text, port=7))) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    ["", ":29", "node1:", "node1:x", "node1:65536", "node1:²", "[::1]29", "[node1]:29", "a:b:29", "::1]:29", "[]:1"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadAddress, match="not HOST:PORT"):
        parse(text, port=7)


def test_nothing_is_guessed_without_a_default() -> None:
    for text in ("node1", "[::1]", ":29"):
        with pytest.raises(BadAddress):
            parse(text)
    assert parse(":29", host="127.0.0.1") == Address("127.0.0.1", 29)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_who_listens_is_found_by_the_same_text(host: str) -> None:
    with addresses.listen(host, 0) as listener:
        at = addresses.join(host, listener.getsockname()[1])
        family, place = addresses.resolve(*parse(at))
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.connect(place)
        assert addresses.is_loopback(addresses.towards(*parse(at)))
        assert addresses.is_own(host)
        assert addresses.is_loopback(host)


def test_a_name_of_both_families_is_one_address_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::9", 1, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.9", 1)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: list(both))
    assert addresses.resolve("both", 1) == (socket.AF_INET, ("10.0.0.9", 1))
    del both[1]
    assert addresses.resolve("both", 1) == (socket.AF_INET6, ("fd00::9", 1, 0, 0))
    assert not addresses.is_loopback("both")


def test_names_that_are_none() -> None:
    assert not addresses.is_own("no.such.host.invalid")
    assert not addresses.is_loopback("no.such.host.invalid")
    with pytest.raises(socket.gaierror):
        addresses.resolve("a" * 70 + ".invalid", 1)  # a label that is too long
