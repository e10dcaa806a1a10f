"""Addresses: HOST:PORT as text, IPv6 addresses in brackets, and sockets for them.

A name may have addresses of both families. Listeners and clients choose the same one: an IPv4 address if the name has
any, because all hosts of most clusters can reach those.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, NamedTuple

DEFAULT_PORT = 29400  # of a job's coordinator; torchrun's, too


class BadAddress(ValueError):
    """A text that is not HOST:PORT."""


class Address(NamedTuple):
    """A host, a name or an address without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return join(self.host, self.port)


def parse(text: str, *, port: int | None = None, host: str = "") -> Address:
    """HOST:PORT, [ADDRESS]:PORT, and, as torch reads it, ADDRESS:PORT of an IPv6 address without brackets.

    `port` and `host` are defaults for parts that the text omits; without them both are required. Raises BadAddress.
    """
    bracketed, closing, rest = text.rpartition("]")
    if closing:
        named, given = bracketed.removeprefix("["), rest
        if not bracketed.startswith("[") or not _is_v6(named) or (given and not given.startswith(":")):
            raise BadAddress(f"{text!r} is not [IPv6 ADDRESS]:PORT, and not HOST:PORT")
        number = given[1:] if given else None
    else:
        named, colon, given = text.rpartition(":")
        number = given if colon else None
        if not colon:
            named = text
    if number is None and port is not None:
        number = str(port)
    named = named or host
    if number is None or not named or not (number.isascii() and number.isdigit()) or int(number) > 65535:
        raise BadAddress(f"{text!r} is not HOST:PORT")
    if ":" in named and not _is_v6(named):
        raise BadAddress(f"{text!r} is not HOST:PORT; an IPv6 address stands in brackets: [::1]:{number}")
    return Address(named, int(number))


def join(host: str, port: int | str) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def unbracketed(host: str) -> str:
    """A host as sockets want it."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def is_literal(host: str) -> bool:
    """Whether a host is given as an address, not by name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host's addresses are such that only this host reaches them."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def resolve(host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[int, Any]:
    """The family and the socket address of a host. Raises OSError for a name that has none."""
    try:
        found = socket.getaddrinfo(host, port, type=kind)
    except UnicodeError as error:  # an empty or overlong label
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from None
    found.sort(key=lambda item: item[0] != socket.AF_INET)  # stable: the resolver's own order within a family
    family, _, _, _, place = found[0]
    return family, place


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """A TCP socket that listens at a host's address (port 0: any). Raises OSError."""
    family, place = resolve(host, port)
    return socket.create_server(place, family=family, backlog=backlog)


def is_own(host: str) -> bool:
    """Whether an address is this machine's: something can be bound to it."""
    try:
        with listen(host, 0):
            return True
    except OSError:
        return False


def towards(host: str, port: int) -> str:
    """Our own address on the way to a host. Nothing is sent. Raises OSError where there is no way."""
    family, place = resolve(host, port, socket.SOCK_DGRAM)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # addresses for documentation (RFC 5737, RFC 3849): never this machine's


def outward() -> str:
    """The address of this machine that others are most likely to reach, by its default route; empty without one."""
    for elsewhere in _ELSEWHERE:
        try:
            return towards(elsewhere, 9)
        except OSError:
            continue
    return ""


def _is_v6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return False
    return True
