"""A small HTTP server: pages by path, generated per request. Metrics are one of them.

With certificates it is HTTPS, and clients need a certificate of the same authority; without, listening on an address
that other hosts can reach needs --es-insecure-network. If the job has a token, clients need that, too.
"""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import socketserver
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from everstep.comms.base import addresses
from everstep.comms.base.security import NAME, Security, SecurityError

CONNECTIONS = 64  # at a time
REQUEST_TIMEOUT_S = 10.0  # of a client that sends nothing


class Page(NamedTuple):
    """What is answered."""

    content_type: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


class Negotiated(NamedTuple):
    """A page of which there are several forms: made for a request's Accept header (RFC 9110)."""

    make: Callable[[str], Page]


Maker = Callable[[], Page] | Negotiated
Taker = Callable[[bytes], tuple[int, str]]
"""Takes the body of a POST request; the status (RFC 9110) and a text for the user are the answer."""

ORDER_HEADER = "X-Everstep-Order"
"""Pages of other origins cannot set it without being asked first, so their scripts cannot give orders in a browser."""
MOST_BODY_BYTES = 4096


class AddressTaken(Exception):
    """Pages cannot be served; the text is for the user."""


class PageServer:
    """Serves GET requests for `pages` (path -> its maker) at HOST:PORT (no host: loopback, port 0: any) until `close`.

    POST requests are for `takers` (path -> what takes the body), for clients that show the job's token.
    Raises AddressTaken, whose text names the address, when it cannot listen there.
    """

    def __init__(
        self,
        address: str,
        pages: Mapping[str, Maker],
        security: Security,
        takers: Mapping[str, Taker] = MappingProxyType({}),
    ) -> None:
        try:
            host, port = addresses.parse(address, host="127.0.0.1")
        except addresses.BadAddress as error:
            raise AddressTaken(str(error)) from None
        served = {"pages": dict(pages), "takers": dict(takers), "security": security}
        served["local"] = addresses.is_loopback(host)
        handler = type("Handler", (_Handler,), served)
        try:
            security.check_bind(host)
            self._server = _Server((host, port), handler, security)
        except SecurityError as error:
            raise AddressTaken(str(error)) from None
        except (OSError, OverflowError) as error:
            raise AddressTaken(f"{address}: {getattr(error, 'strerror', None) or error}") from None
        self.address = addresses.join(host, self._server.server_address[1])
        self.url = f"http{'s' if security.encrypts else ''}://{self.address}"
        threading.Thread(target=self._server.serve_forever, args=(0.2,), name="everstep-pages", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: Any, security: Security) -> None:
        self._security = security
        self.address_family, place = addresses.resolve(*address)
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(place, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(REQUEST_TIMEOUT_S)
        with self._security.accept(request) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    pages: Mapping[str, Maker]
    takers: Mapping[str, Taker]
    security: Security
    local: bool  # this host alone reaches it
    timeout = REQUEST_TIMEOUT_S
    server_version = "everstep"
    sys_version = ""

    def do_GET(self) -> None:
        self._send(*(self._refusal() or self._answer()))

    def do_POST(self) -> None:
        self._send(*(self._refusal() or self._take()))

    def _send(self, status: int, page: Page) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            for name, value in page.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page.body)

    def _refusal(self) -> tuple[int, Page] | None:
        """The answer to a client that may not ask."""
        if self.local and not _is_local_name(self.headers.get("Host", "")):
            return 421, _text("this address is for this host alone, and the request is for another name")
        if not self.security.admits_request(self.headers.get("Authorization", "")):
            asked = {"WWW-Authenticate": 'Basic realm="everstep: any user, the job token as password", charset="UTF-8"'}
            return 401, _text("the job's token is required: as a password (of any user), or as a Bearer", asked)
        return None

    def _take(self) -> tuple[int, Page]:
        taker = self.takers.get(self.path.partition("?")[0])
        if taker is None:
            return 404, _text("there is nothing to change here")
        if not self.security.token:
            return 403, _text(
                "orders need the job's token, which this job does not have: set EVERSTEP_JOB_TOKEN for it"
            )
        if self.headers.get(ORDER_HEADER, "") != "1":
            return 403, _text(f"an order has the header {ORDER_HEADER}: 1")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            return 413, _text(f"an order has at most {MOST_BODY_BYTES} bytes, and says how many")
        status, text = taker(self.rfile.read(int(length)))
        return status, _text(text)

    def _answer(self) -> tuple[int, Page]:
        maker = self.pages.get(self.path.partition("?")[0])
        if maker is None:
            return 404, _text("there is no such page")
        if isinstance(maker, Negotiated):
            return 200, maker.make(", ".join(self.headers.get_all("Accept", [])))
        return 200, maker()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are no news."""


def _text(text: str, headers: Mapping[str, str] = MappingProxyType({})) -> Page:
    return Page("text/plain; charset=utf-8", f"{text}\n".encode(), headers)


def _is_local_name(host: str) -> bool:
    """Whether a Host header names this host, or is absent.

    A foreign name that resolves to a loopback address may belong to a web page elsewhere, whose script would read our
    pages in the user's browser (DNS rebinding).
    """
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name in ("", "localhost", NAME) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
