"""TLS on sockets that do not block, with the calls that links make of plain ones (RFC 8446; Python's ssl, OpenSSL).

A plain socket that is empty raises BlockingIOError; so does this one, and `wants_read` says whether it is bytes from
the peer that are missing, also where it was asked to write: in a handshake. What was decrypted and not yet taken is
shown by `pending`, since no poll reports it.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence

from everstep.comms.base.security import NAME, Security

_JOIN_BYTES = 64 << 10  # small buffers are encrypted together
_SMALL_BYTES = 16 << 10


class TlsSocket:
    """One end of a connection. The handshake is made by the first reads and writes."""

    def __init__(self, sock: socket.socket, security: Security, *, server: bool) -> None:
        """Takes `sock` over; its descriptor stays the same."""
        context = security.context(ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH)
        self.family = sock.family
        self.wants_read = False
        self._socket = context.wrap_socket(
            sock, server_side=server, do_handshake_on_connect=False, server_hostname=None if server else NAME
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:
        self._socket.setblocking(flag)

    def close(self) -> None:
        self._socket.close()

    def pending(self) -> int:
        """Bytes that can be read though no poll says so."""
        return self._socket.pending()

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Write what goes; how much of `buffers` it was. After BlockingIOError, pass the same bytes again."""
        first: memoryview | bytes = buffers[0]
        if len(first) < _SMALL_BYTES:
            joined = bytearray()
            for buffer in buffers:
                joined += buffer
                if len(joined) >= _JOIN_BYTES:
                    break
            first = bytes(joined)
        return self.send(first)

    def send(self, data: bytes | memoryview) -> int:
        try:
            sent = self._socket.send(data)
        except ssl.SSLWantReadError:
            self.wants_read = True
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            self.wants_read = False
            raise BlockingIOError from None
        self.wants_read = False
        return sent

    def recv(self, limit: int) -> bytes:
        data = bytearray(limit)
        return bytes(data[: self.recv_into(memoryview(data))])

    def recv_into(self, target: memoryview) -> int:
        """Fill `target` as far as bytes have come; 0 at the connection's end."""
        filled = 0
        while filled < len(target):
            try:
                count = self._socket.recv_into(target[filled:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if filled:
                    return filled
                raise BlockingIOError from None
            except ssl.SSLEOFError:
                return filled  # closed without a word, as a process that is killed does
            if count == 0:
                return filled
            filled += count
        return filled
