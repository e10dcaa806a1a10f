"""Who may talk to whom: mutual TLS by certificates of one authority, and the job's token.

With certificates every connection between hosts is TLS in which both ends show one that the authority signed. Without,
nothing but loopback addresses may be bound, unless the user says by name that the network is trusted.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

NAME = "everstep"  # the subject's alternative name in every certificate: the job trusts its authority, not host names
CERTIFICATES, TOKEN_FILE, TOKEN, TRUST = (
    "EVERSTEP_CERTS",
    "EVERSTEP_TOKEN_FILE",
    "EVERSTEP_JOB_TOKEN",
    "EVERSTEP_INSECURE_NETWORK",
)
FILES = ("ca.pem", "cert.pem", "key.pem")


class SecurityError(Exception):
    """Certificates or a token that cannot be used, or an address that may not be bound."""


@dataclass(frozen=True)
class Security:
    """What a process shows and asks for. `token` is empty where the coordinator is to make one up."""

    token: str = ""
    folder: Path | None = None  # of ca.pem, cert.pem and key.pem
    trusted_network: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Security:
        """What the environment says. Raises SecurityError for files that are missing or empty."""
        folder = Path(environment[CERTIFICATES]) if environment.get(CERTIFICATES) else None
        for name in FILES if folder is not None else ():
            assert folder is not None
            if not os.access(folder / name, os.R_OK):
                raise SecurityError(f"{CERTIFICATES}={folder}: {name} cannot be read (make some: everstep certs DIR)")
        return cls(_token(environment), folder, environment.get(TRUST, "") == "1")

    @property
    def encrypts(self) -> bool:
        return self.folder is not None

    def environment(self) -> dict[str, str]:
        """What `of` makes this of again, in a process of ours."""
        found = {CERTIFICATES: str(self.folder)} if self.folder is not None else {}
        found |= {TOKEN: self.token} if self.token else {}
        return {**found, TRUST: "1"} if self.trusted_network else found

    def check_bind(self, host: str) -> None:
        """Raises SecurityError for an address that others can reach, where nobody would have to show who he is."""
        if self.encrypts or self.trusted_network or is_loopback(host):
            return
        raise SecurityError(
            f"{host} can be reached from other hosts, and connections would be neither encrypted nor authenticated: "
            f"give certificates ({CERTIFICATES}=DIR, see everstep certs), or say that this network is trusted "
            f"(--es-insecure-network, or {TRUST}=1)"
        )

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For gRPC; None without certificates."""
        if self.folder is None:
            return None
        authority, certificate, key = (Path(self.folder / name).read_bytes() for name in FILES)
        return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For gRPC; None without certificates."""
        if self.folder is None:
            return None
        authority, certificate, key = (Path(self.folder / name).read_bytes() for name in FILES)
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def accept(self, connection: socket.socket) -> socket.socket:
        """The server's end of a connection; blocks for the handshake. Raises OSError (ssl.SSLError is one)."""
        if self.folder is None:
            return connection
        return _context(self.folder, ssl.Purpose.CLIENT_AUTH).wrap_socket(connection, server_side=True)

    def connect(self, connection: socket.socket) -> socket.socket:
        """The client's end of a connection; blocks for the handshake. Raises OSError (ssl.SSLError is one)."""
        if self.folder is None:
            return connection
        return _context(self.folder, ssl.Purpose.SERVER_AUTH).wrap_socket(connection, server_hostname=NAME)


@functools.cache
def _context(folder: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    authority, certificate, key = (folder / name for name in FILES)
    context = ssl.create_default_context(purpose, cafile=str(authority))
    context.load_cert_chain(certificate, key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def digest_of(token: str) -> str:
    """What stands for a token where it is shown, so that the token itself is not."""
    return hashlib.sha256(b"everstep attach\0" + token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this host reaches."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _token(environment: Mapping[str, str]) -> str:
    path = environment.get(TOKEN_FILE)
    if not path:
        return environment.get(TOKEN, "")
    try:
        token = Path(path).read_text().strip()
    except OSError as error:
        raise SecurityError(f"{TOKEN_FILE}={path}: {error.strerror}") from None
    if not token:
        raise SecurityError(f"{TOKEN_FILE}={path}: the file is empty")
    return token
