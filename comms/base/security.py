"""Authentication of connections: mutual TLS with certificates of one authority, and the job's token.

With certificates every connection between hosts is TLS, and both ends present a certificate that the authority signed.
Without, only loopback addresses may be bound, unless the user declares the network trusted (--es-insecure-network).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import hmac
import os
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import addresses

if TYPE_CHECKING:
    import grpc


NAME = "everstep"  # the subject's alternative name in every certificate: the job trusts its authority, not host names
CERTIFICATES, TOKEN_FILE, TOKEN, TRUST = (
    "EVERSTEP_CERTS",
    "EVERSTEP_TOKEN_FILE",
    "EVERSTEP_JOB_TOKEN",
    "EVERSTEP_INSECURE_NETWORK",
)
FILES = ("ca.pem", "cert.pem", "key.pem")
TOKEN_ASKED = f"it requires the job's token: set {TOKEN} or {TOKEN_FILE}"
_METADATA = "everstep-token"  # of a gRPC call


class SecurityError(Exception):
    """Certificates or a token that cannot be used, or an address that may not be bound."""


@dataclass(frozen=True)
class Security:
    """A process's credentials, also required of its peers. `token` is empty if the coordinator has to generate one."""

    token: str = ""
    folder: Path | None = None  # of ca.pem, cert.pem and key.pem
    trusted_network: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Security:
        """From environment variables. Raises SecurityError for files that are missing or empty."""
        folder = Path(environment[CERTIFICATES]) if environment.get(CERTIFICATES) else None
        for name in FILES if folder is not None else ():
            assert folder is not None
            if not os.access(folder / name, os.R_OK):
                raise SecurityError(f"{CERTIFICATES}={folder}: {name} cannot be read (make some: everstep certs DIR)")
        if folder is not None:
            _check(folder)
        return cls(_token(environment), folder, environment.get(TRUST, "") == "1")

    @property
    def encrypts(self) -> bool:
        return self.folder is not None

    def environment(self) -> dict[str, str]:
        """The variables from which `of` restores this in a child process."""
        found = {CERTIFICATES: str(self.folder)} if self.folder is not None else {}
        found |= {TOKEN: self.token} if self.token else {}
        return {**found, TRUST: "1"} if self.trusted_network else found

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata for a gRPC call that proves that the caller has the token."""
        return ((_METADATA, digest_of(self.token)),) if self.token else ()

    def admits(self, digest: str) -> bool:
        """Whether a digest is that of this job's token. A job without a token admits every caller."""
        return not self.token or hmac.compare_digest(digest.encode(), digest_of(self.token).encode())

    def admits_call(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether the caller of a gRPC call has the token."""
        return self.admits(str(dict(metadata).get(_METADATA, "")))

    def admits_request(self, authorization: str) -> bool:
        """Whether an HTTP request's Authorization, its bytes as Latin-1, has the token: as Bearer (RFC 6750), or as the
        password of any user (RFC 7617)."""
        scheme, _, shown = authorization.partition(" ")
        token = b""
        with contextlib.suppress(ValueError):
            if scheme.lower() == "basic":
                token = base64.b64decode(shown).partition(b":")[2]
            elif scheme.lower() == "bearer":
                token = shown.strip().encode("latin-1")
        return self.admits(digest_of(token.decode(errors="replace")))

    def check_bind(self, host: str) -> None:
        """Raises SecurityError for an address that other hosts could reach without authentication."""
        if self.encrypts or self.trusted_network or addresses.is_loopback(host):
            return
        raise SecurityError(
            f"{host} can be reached from other hosts, and connections would be neither encrypted nor authenticated: "
            f"give certificates ({CERTIFICATES}=DIR, see everstep certs), or declare this network trusted "
            f"(--es-insecure-network, or {TRUST}=1)"
        )

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For gRPC; None without certificates."""
        if self.folder is None:
            return None
        import grpc

        authority, certificate, key = (Path(self.folder / name).read_bytes() for name in FILES)
        return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For gRPC; None without certificates."""
        if self.folder is None:
            return None
        import grpc

        authority, certificate, key = (Path(self.folder / name).read_bytes() for name in FILES)
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def accept(self, connection: socket.socket) -> socket.socket:
        """The server's end of a connection; blocks for the handshake. Raises OSError (ssl.SSLError is one)."""
        if self.folder is None:
            return connection
        return self.context(ssl.Purpose.CLIENT_AUTH).wrap_socket(connection, server_side=True)

    def connect(self, connection: socket.socket) -> socket.socket:
        """The client's end of a connection; blocks for the handshake. Raises OSError (ssl.SSLError is one)."""
        if self.folder is None:
            return connection
        return self.context(ssl.Purpose.SERVER_AUTH).wrap_socket(connection, server_hostname=NAME)

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """For one end of a connection; only with certificates. Raises OSError."""
        assert self.folder is not None
        return _context(self.folder, purpose)


@functools.cache
def _context(folder: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    authority, certificate, key = (folder / name for name in FILES)
    context = ssl.create_default_context(purpose, cafile=str(authority))
    context.load_cert_chain(certificate, key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if purpose is ssl.Purpose.CLIENT_AUTH:
        context.num_tickets = 0  # session tickets would arrive unexpectedly: no reader waits for them
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@functools.cache
def own() -> Security:
    """This process's security settings. Raises SecurityError."""
    return Security.of(os.environ)


def digest_of(token: str) -> str:
    """A digest that identifies a token without disclosing it."""
    return hashlib.sha256(b"everstep attach\0" + token.encode()).hexdigest()


def _check(folder: Path) -> None:
    """Raises SecurityError for certificates that no peer would accept."""
    from cryptography import x509  # costs a while, and is needed only here

    for name in ("ca.pem", "cert.pem"):
        try:
            certificate = x509.load_pem_x509_certificate((folder / name).read_bytes())
        except ValueError as error:
            raise SecurityError(f"{folder / name} is not a certificate in PEM form: {error}") from None
        now, until = datetime.datetime.now(datetime.UTC), certificate.not_valid_after_utc
        if now > until:
            renew = "renew it (everstep certs DIR, on the machine that has ca-key.pem)"
            raise SecurityError(f"{folder / name} has expired at {until:%Y-%m-%d %H:%M:%S} UTC: {renew}")
        if now < certificate.not_valid_before_utc:
            since = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC"
            raise SecurityError(f"{folder / name} is valid from {since} on: is this machine's clock right?")
    try:
        _context(folder, ssl.Purpose.CLIENT_AUTH)
    except OSError as error:
        raise SecurityError(f"{folder}: cert.pem and key.pem do not go together, or cannot be used: {error}") from None


def explain_unreachable(address: str, security: Security, timeout_s: float = 2.0) -> str:
    """A probable cause why a coordinator cannot be reached; empty if none is found."""
    try:
        with socket.create_connection(addresses.parse(address), timeout_s) as connection:
            if security.encrypts:
                with security.connect(connection) as encrypted:
                    encrypted.recv(1)  # TLS 1.3 reports only now whether the server accepts our certificate
                return ""
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            if connection.recv(1) in (b"", b"\x15"):  # it hangs up, or sends a TLS alert
                return f"it takes no connections without TLS, and this node has no certificates: set {CERTIFICATES}"
    except ssl.SSLError as error:
        reason = str(error.reason or error).replace("_", " ").lower()
        return f"it does not accept our certificate, or we not its ({reason}): take both from one authority"
    except OSError:
        return ""
    return ""


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
