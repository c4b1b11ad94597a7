"""Connections that keep a call's deadline.

The deadline is kept by the sockets: each of their operations waits at most for what is left of the call. This needs
neither a timer thread nor signals, so it is the same in prefork processes and in threads.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse
from urllib3.util import create_urllib3_context

from taskplatform.addresses import AllowList, is_public
from taskplatform.http.calls import RefusedError, http_date

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_LONGEST_WAIT = 1_000_000.0
"""Seconds. `poll` counts milliseconds in a C int, and Python 3.11 hands it what is left of a longer time."""

_POOLED_HOSTS = 32
"""Hosts to which a thread keeps a connection; a thread makes one call at a time."""


# --- one call in progress ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What is known of the call that this thread is making."""

    ends: float
    """On the monotonic clock."""
    connect_timeout: float
    allowed: AllowList
    connecting: bool = False
    redirected: bool = False
    at_public: bool = False
    """The connection of the current request is to a public address."""
    after_public: bool = False
    """One of the targets that redirected the call was at a public address."""
    reused: bool = False
    """The request goes out on a connection that served an earlier one."""
    received: int = 0
    """Bytes of the answer to the current request."""
    head_ended: bool = False
    """The empty line after the headers has been received."""
    tail: bytes = b""
    status: int | None = None
    retry_after: str | None = None
    date: datetime | None = None
    """When the target sent the answer, by its own clock: that is the one which a date in Retry-After goes by."""
    encoding: str = ""
    body: bytearray = field(default_factory=bytearray)
    cut: bool = False
    """There is more than `body`."""
    aborted: bool = False
    used: socket.socket | None = None
    """The socket of the operation that is made now, or was last."""

    def abort(self) -> None:
        """From another thread: what this one waits for on its socket ends now, and what it would do next fails."""
        self.aborted = True
        if self.used is not None:
            with suppress(OSError):
                # past the method of TLS sockets, which would take the connection's state away under the other thread
                socket.socket.shutdown(self.used, socket.SHUT_RDWR)

    def uses(self, one: socket.socket) -> None:
        """Note the socket before the next operation on it. Raises OSError where that must not be made any more."""
        # noted first: either `abort` sees it, or this sees what `abort` set
        self.used = one
        if self.aborted:
            raise OSError(errno.ECONNABORTED, "aborted")

    def left(self) -> float:
        """The timeout for one operation. Raises TimeoutError at the deadline."""
        if time.monotonic() >= self.ends:
            raise TimeoutError("deadline")
        return _within(self.ends)

    def begin_request(self) -> None:
        # On a new connection, connect() sets `reused` to False.
        self.connecting, self.reused, self.received, self.head_ended, self.tail = False, True, 0, False, b""
        self.status = self.retry_after = self.date = None

    def receive(self, data: memoryview) -> None:
        self.received += len(data)
        if not self.head_ended:
            seen = self.tail + bytes(data)
            self.head_ended, self.tail = b"\n\r\n" in seen or b"\n\n" in seen, seen[-2:]

    def answered(self, response: requests.Response) -> None:
        self.status = response.status_code
        self.retry_after = response.headers.get("Retry-After")
        self.date = http_date(response.headers.get("Date"))
        self.encoding = response.headers.get("Content-Encoding", "").strip().lower()


class _Active(threading.local):
    run: Run | None = None


active = _Active()


# --- the way from `requests` to our sockets --------------------------------------------------------------------------


def tls_context() -> ssl.SSLContext:
    context = create_urllib3_context()
    context.sslsocket_class = _TlsSocket
    # The machine's store has the operator's own authorities; slim images have no store.
    context.load_default_certs()
    context.load_verify_locations(certifi.where())
    return context


def new_session(tls: ssl.SSLContext) -> requests.Session:
    session = _Session()
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(tls))
    return session


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """Hide redirects: to prepare the next request, `requests` would read and decompress the whole body of this one."""


class _Adapter(HTTPAdapter):
    """The way from `requests` to our connections."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        super().__init__(pool_connections=_POOLED_HOSTS, pool_maxsize=1)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._tls, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing to do: the context verifies. The original would load the authorities again for every connection."""


class _Connection(HTTPConnection):
    """Connects within the connect timeout, and only to addresses that are allowed."""

    public = False

    def connect(self) -> None:
        if active.run:
            active.run.connecting, active.run.reused = True, False
        super().connect()
        if active.run:
            active.run.connecting = False

    def _new_conn(self) -> socket.socket:
        opened, self.public = _open(self._dns_host, self.port or self.default_port, self.socket_options or ())
        return opened

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # urllib3 has its own kind
        if active.run:
            active.run.at_public = self.public
        return super().getresponse()


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _open(host: str, port: int, options: Any) -> tuple[socket.socket, bool]:
    """A connected socket whose timeout is what is left for TLS, and whether it is to a public address.

    Each address that is allowed gets its share of the time.

    An address is judged here, where it goes to the socket, so a name server that answers otherwise the next time changes
    nothing. A pooled connection was judged when it was opened, for the same host and port, and the allow list does not change.
    Raises RefusedError where the host has addresses and none is allowed.
    """
    run = active.run
    if run is None:
        raise OSError("a connection is opened only during a call")
    ends = min(time.monotonic() + run.connect_timeout, run.ends)
    found = _lookups.addresses(host.strip("[]"), port, within=_within(ends))
    refusals = [run.allowed.refusal(host, port, _zoned(address), after_public=run.after_public) for *_, address in found]
    addresses = [entry for entry, refusal in zip(found, refusals, strict=True) if refusal is None]
    if refusals and not addresses:
        raise RefusedError(f"redirect: {refusals[0]}" if run.redirected else refusals[0])
    failure: OSError = OSError("the name has no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        share = _within(ends, parts=len(addresses) - index)
        try:
            opened = _connected(_Socket(family, kind, protocol), address, options, timeout=share)
        except OSError as fault:
            failure = fault
            if run.aborted:
                break
        else:
            opened.settimeout(_within(ends))
            return opened, is_public(_zoned(address))
    raise failure


def _zoned(address: Any) -> str:
    """The address in what `getaddrinfo` gives, with its zone."""
    text = str(address[0])
    return f"{text}%{address[3]}" if len(address) == 4 and address[3] and "%" not in text else text


def _connected(opened: socket.socket, address: Any, options: Any, *, timeout: float) -> socket.socket:
    try:
        for option in options:
            opened.setsockopt(*option)
        opened.settimeout(timeout)
        if active.run:
            active.run.uses(opened)
        opened.connect(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _within(ends: float, *, parts: int = 1) -> float:
    """A timeout that a socket takes: not 0, which means not to wait and raises another error, and not too long."""
    return min(max((ends - time.monotonic()) / parts, 0.001), _LONGEST_WAIT)


class _Socket(socket.socket):
    """Waits in no operation for longer than the call in progress has left."""

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        _limit(self)
        super().sendall(data, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        _limit(self)
        return _count(buffer, super().recv_into(buffer, nbytes, flags))


class _TlsSocket(ssl.SSLSocket):
    """The same for TLS, whose `sendall` calls `send`. The handshake has the socket's timeout as a whole."""

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        _limit(self)
        return super().send(data, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        _limit(self)
        return _count(buffer, super().recv_into(buffer, nbytes, flags))


def _limit(used: socket.socket) -> None:
    if active.run:
        active.run.uses(used)
        used.settimeout(active.run.left())


def _count(buffer: WriteableBuffer, size: int) -> int:
    if active.run:
        active.run.receive(memoryview(buffer).cast("B")[:size])
    return size


class _Lookups:
    """Name lookups with a time limit.

    `getaddrinfo` cannot be interrupted, so it runs in a thread that may outlive the call. Calls that wait for the same
    name share one thread, so a dead name server costs a thread for a name, not for a call.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget lookups in progress: a forked process does not have their threads."""
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[list[Any]]] = {}

    def addresses(self, host: str, port: int, *, within: float) -> list[Any]:
        """As `getaddrinfo` gives them. Raises TimeoutError, gaierror, or UnicodeError for a name that cannot be one."""
        with suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return self._lookup(host, port).result(within)

    def _lookup(self, host: str, port: int) -> Future[list[Any]]:
        with self._lock:
            if (host, port) not in self._running:
                future: Future[list[Any]] = Future()
                try:
                    threading.Thread(target=self._work, args=(host, port, future), name=f"lookup {host}", daemon=True).start()
                except RuntimeError as fault:
                    raise OSError(errno.EAGAIN, "no thread for a name lookup") from fault
                self._running[host, port] = future
            return self._running[host, port]

    def _work(self, host: str, port: int, future: Future[list[Any]]) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except BaseException as fault:
            self._forget(host, port)
            future.set_exception(fault)
        else:
            self._forget(host, port)
            future.set_result(found)

    def _forget(self, host: str, port: int) -> None:
        with self._lock:
            self._running.pop((host, port), None)


_lookups = _Lookups()
os.register_at_fork(after_in_child=_lookups.reset)


# --- logs ------------------------------------------------------------------------------------------------------------


def _not_during_a_call(_record: logging.LogRecord) -> bool:
    return active.run is None


for _name in ("connection", "connectionpool", "poolmanager", "response", "util.retry"):
    # They write URLs, which may hold secrets, into the log: at level debug each one, at level warning where headers are odd.
    logging.getLogger(f"urllib3.{_name}").addFilter(_not_during_a_call)
