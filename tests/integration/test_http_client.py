"""`taskplatform.http.Client` against servers that misbehave, over real sockets on loopback.

A server is a function that is given each connection, so a test says in a few lines what goes over the wire. Times are
upper bounds with much room: a call with a deadline of a fraction of a second returns within seconds, not never.
"""

from __future__ import annotations

import base64
import gc
import gzip
import logging
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme
from standardwebhooks.webhooks import Webhook

from taskplatform import addresses
from taskplatform.addresses import AllowList, Target
from taskplatform.http import MAX_REDIRECTS, USER_AGENT, Abort, Call, CallAborted, Client, Outcome, OutcomeKind, render
from taskplatform.local import find_port
from taskplatform.model import HttpConfig
from tests.support import wait_until

DEADLINE = timedelta(seconds=0.3)
AMPLE = timedelta(seconds=20)
SOON = 15.0
"""Seconds within which a call with DEADLINE must have returned, also where the machine stands still. Else it takes AMPLE or longer."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
LOOPBACK = AllowList([Target.parse("127.0.0.0/8"), Target.parse("::1")])
LIMIT = 2000
"""Bytes of an answer that the client of these tests reads."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a server received."""

    connection: int
    line: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """A server's side of one connection."""

    def __init__(self, server: Server, connection: socket.socket, number: int) -> None:
        self.server = server
        self.connection = connection
        self.number = number
        self._unread = b""

    def request(self) -> Request | None:
        """The next request; None when the client has closed."""
        while b"\r\n\r\n" not in self._unread:
            if not self._receive():
                return None
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (text.partition(": ") for text in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._unread) < length:
            if not self._receive():
                return None
        body, self._unread = self._unread[:length], self._unread[length:]
        request = Request(self.number, line, headers, body)
        self.server.requests.append(request)
        return request

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def drip(self, data: bytes, rest: bytes = b"x") -> None:
        """Send `data`, then `rest` again and again, slowly, until the client has gone."""
        self.send(data)
        while not self.server.stopping.wait(0.02):
            self.send(rest)

    def flood(self, data: bytes, rest: bytes = b"x" * 65_536) -> None:
        """Send `data`, then `rest` again and again, fast, until the client has gone."""
        self.send(data)
        while not self.server.stopping.is_set():
            self.send(rest)

    def idle(self) -> None:
        self.server.stopping.wait(60)

    def reset(self) -> None:
        """Close so that the client gets a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _receive(self) -> bool:
        data = self.connection.recv(65_536)
        self._unread += data
        return bool(data)


Handler = Callable[[Peer], None]


@dataclass
class Server:
    """A listening socket on a free port, and a thread for each connection."""

    handler: Handler
    address: str = "127.0.0.1"
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    ended: int = 0
    """Connections whose handler has returned, or found the client gone."""
    faults: list[BaseException] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server((self.address, 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def stop(self) -> None:
        self.stopping.set()
        with suppress(OSError):
            socket.create_connection((self.address, self.port), timeout=5).close()
        for peer in list(self._peers):
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()
        assert not self.faults

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self.stopping.is_set():
                connection.close()
                return
            self.connections += 1
            self._peers.append(Peer(self, connection, self.connections))
            thread = threading.Thread(target=self._serve, args=(self._peers[-1],))
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: Peer) -> None:
        try:
            self.handler(peer)
        except OSError:
            pass  # the client has gone
        except BaseException as fault:
            self.faults.append(fault)
        finally:
            self.ended += 1
            peer.connection.close()


Serve = Callable[..., Server]
MakeClient = Callable[..., Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(handler: Handler, address: str = "127.0.0.1") -> Server:
        servers.append(Server(handler, address))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    client = Client(connect_timeout=timedelta(seconds=10), max_response=LIMIT, excerpt=200, allowed=LOOPBACK)
    yield client
    client.close()
    # so that a connection that was left open fails this module, not a later one
    gc.collect()


@pytest.fixture
def make_client() -> Iterator[MakeClient]:
    """For a client with other options, or one that trusts another certificate."""
    made: list[Client] = []

    def make(**options: Any) -> Client:
        made.append(Client(**{"connect_timeout": AMPLE, "max_response": LIMIT, "excerpt": 200, "allowed": LOOPBACK, **options}))
        return made[-1]

    yield make
    for client in made:
        client.close()


def always(answer: bytes) -> Handler:
    """Answers each request of a connection with the same bytes."""

    def handler(peer: Peer) -> None:
        while peer.request():
            peer.send(answer)

    return handler


def once(answer: bytes) -> Handler:
    """Answers one request and closes."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(answer)

    return handler


def get(client: Client, url: str, *, deadline: timedelta = AMPLE, method: str = "GET", **fields: Any) -> Outcome:
    return client.send(Call(method, url, fields.pop("headers", {}), **fields), deadline=deadline)


def eventually(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_call_and_its_answer(serve: Serve, client: Client) -> None:
    server = serve(always(b'HTTP/1.1 201 Created\r\nContent-Length: 19\r\n\r\n{"id":\r\n \x00 5}!\x1b[31m'))
    headers = {"Idempotency-Key": "job-1", "Content-Type": "application/json"}
    outcome = get(client, f"{server.url}/jobs?a=%2F..", method="POST", headers=headers, body=b'{"n":1}')
    assert (outcome.kind, outcome.reason, outcome.status) == (OutcomeKind.COMPLETED, "HTTP 201", 201)
    assert (outcome.excerpt, outcome.retry_after, outcome.timed_out) == ('{"id": 5}! [31m', None, False)
    assert 0 <= outcome.duration_ms < 10_000
    (request,) = server.requests
    assert (request.line, request.body) == ("POST /jobs?a=%2F.. HTTP/1.1", b'{"n":1}')
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": USER_AGENT,
        "idempotency-key": "job-1",
        "content-type": "application/json",
        "content-length": "7",
    }


@pytest.mark.parametrize(
    ("head", "kind", "wait"),
    [
        (b"204 No Content\r\n", OutcomeKind.COMPLETED, None),
        (b"200 OK\r\nRetry-After: 5\r\nContent-Length: 0\r\n", OutcomeKind.COMPLETED, None),
        (b"404 Not Found\r\nRetry-After: 5\r\nContent-Length: 0\r\n", OutcomeKind.FAILED, None),
        (b"304 Not Modified\r\n", OutcomeKind.FAILED, None),
        (b"301 Moved\r\nContent-Length: 0\r\n", OutcomeKind.FAILED, None),
        (b"429 Slow Down\r\nRetry-After: 90\r\nContent-Length: 0\r\n", OutcomeKind.RETRY, 90),
        (b"503 Later\r\nretry-after: whenever\r\nContent-Length: 0\r\n", OutcomeKind.RETRY, None),
        (b"500 Oh\r\nContent-Length: 0\r\n", OutcomeKind.RETRY, None),
    ],
)
def test_status_decides(serve: Serve, client: Client, head: bytes, kind: OutcomeKind, wait: int | None) -> None:
    server = serve(always(b"HTTP/1.1 " + head + b"\r\n"))
    for _ in range(2):
        outcome = get(client, server.url)
        assert (outcome.kind, outcome.reason, outcome.status) == (kind, f"HTTP {head[:3].decode()}", int(head[:3]))
        assert outcome.retry_after == (None if wait is None else timedelta(seconds=wait))
    assert server.connections == 1


@pytest.mark.parametrize("value", [b"7200", b"99999999999999999999", b"Fri, 31 Dec 2999 23:59:59 GMT"])
def test_retry_after_is_cut_to_what_is_accepted(serve: Serve, make_client: MakeClient, value: bytes) -> None:
    server = serve(always(b"HTTP/1.1 429 Slow Down\r\nRetry-After: " + value + b"\r\nContent-Length: 0\r\n\r\n"))
    assert get(make_client(), server.url).retry_after == timedelta(hours=1)
    assert get(make_client(max_retry_after=timedelta(minutes=5)), server.url).retry_after == timedelta(minutes=5)


def test_retry_after_as_a_date(serve: Serve, client: Client) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True).encode()
    server = serve(always(b"HTTP/1.1 503 Later\r\nRetry-After: " + date + b"\r\nContent-Length: 0\r\n\r\n"))
    wait = get(client, server.url).retry_after
    assert wait is not None
    assert timedelta(minutes=59) < wait <= timedelta(hours=1)


def test_retry_after_as_a_date_goes_by_the_clock_of_the_target(serve: Serve, client: Client) -> None:
    """Or by none that is known to be right: this machine's may be an hour off."""
    target_now = datetime.now(UTC) - timedelta(hours=5)
    sent, date = (format_datetime(moment, usegmt=True).encode() for moment in (target_now, target_now + timedelta(minutes=2)))
    server = serve(always(b"HTTP/1.1 503 Later\r\nDate: " + sent + b"\r\nRetry-After: " + date + b"\r\nContent-Length: 0\r\n\r\n"))
    assert get(client, server.url).retry_after == timedelta(minutes=2)


def test_a_body_longer_than_the_limit_is_not_read_on(serve: Serve, client: Client) -> None:
    server = serve(lambda peer: peer.flood(b"HTTP/1.1 200 OK\r\n\r\nbegin "))
    outcome = get(client, server.url)
    assert (outcome.kind, outcome.reason) == (OutcomeKind.COMPLETED, "HTTP 200")
    assert outcome.excerpt == ("begin " + "x" * 200)[:200]
    eventually(lambda: server.ended == 1)


@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 100])
def test_a_body_of_about_the_limit(serve: Serve, client: Client, length: int) -> None:
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length))
    for _ in range(2):
        assert get(client, server.url).kind is OutcomeKind.COMPLETED
    assert server.connections == (1 if length <= LIMIT else 2)


@pytest.mark.parametrize("length", [1024, 1025, 1040])
def test_no_more_than_the_limit_is_kept(serve: Serve, make_client: MakeClient, length: int) -> None:
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length))
    assert get(make_client(max_response=1024, excerpt=4096), server.url).excerpt == "x" * 1024


def test_a_compressed_body_is_not_expanded(serve: Serve, client: Client) -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb))
    outcome = get(client, server.url)
    assert (outcome.kind, outcome.excerpt) == (OutcomeKind.COMPLETED, "[gzip]")


def test_a_body_that_is_not_compressed_as_it_says_is_no_fault(serve: Serve, client: Client) -> None:
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"))
    assert get(client, server.url).kind is OutcomeKind.COMPLETED


def test_chunks(serve: Serve, client: Client) -> None:
    server = serve(always(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"))
    assert [get(client, server.url).excerpt for _ in range(2)] == ["hello", "hello"]
    assert server.connections == 1


def test_head_has_no_body(serve: Serve, client: Client) -> None:
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"))
    assert [get(client, server.url, method="HEAD").kind for _ in range(2)] == [OutcomeKind.COMPLETED] * 2
    assert server.connections == 1


def test_interim_answers_are_passed_over(serve: Serve, client: Client) -> None:
    server = serve(always(b"HTTP/1.1 100 Continue\r\n\r\n" + OK))
    assert get(client, server.url).excerpt == "hello"


def test_utf16_and_broken_text_are_readable(serve: Serve, client: Client) -> None:
    body = "s3cret-token ok".encode("utf-16-le") + b"\xff"
    server = serve(always(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
    assert get(client, server.url, secrets=("s3cret-token",)).excerpt == "*** ok\N{REPLACEMENT CHARACTER}"


# --- deadline --------------------------------------------------------------------------------------------------------


def never_answers(peer: Peer) -> None:
    peer.request()
    peer.idle()


def never_reads(peer: Peer) -> None:
    peer.idle()


def drips_status(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 200 O")


def drips_headers(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 200 OK\r\nX-A: ")


def drips_whole_headers(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n")


def drips_body(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")


def floods_whole_headers(peer: Peer) -> None:
    peer.request()
    peer.flood(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 1000)


def floods_one_header(peer: Peer) -> None:
    peer.request()
    peer.flood(b"HTTP/1.1 200 OK\r\nX-A: ")


def floods_status(peer: Peer) -> None:
    peer.request()
    peer.flood(b"HTTP/1.1 200 ")


def drips_chunk_length(peer: Peer) -> None:
    peer.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0")


def floods_trailers(peer: Peer) -> None:
    peer.flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n")


def floods_interim_answers(peer: Peer) -> None:
    peer.flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n")


@pytest.mark.parametrize(
    "handler",
    [
        never_answers,
        never_reads,
        drips_status,
        drips_headers,
        drips_whole_headers,
        drips_body,
        drips_chunk_length,
        floods_trailers,
        floods_interim_answers,
    ],
)
def test_one_deadline_for_every_phase(serve: Serve, client: Client, handler: Handler) -> None:
    server, good = serve(handler), serve(always(OK))
    body = b"x" * 30_000_000 if handler is never_reads else b"x"
    started = time.monotonic()
    outcome = get(client, server.url, method="POST", body=body, deadline=DEADLINE)
    assert time.monotonic() - started < SOON
    assert (outcome.kind, outcome.reason, outcome.timed_out) == (OutcomeKind.RETRY, "deadline of 300ms exceeded", True)
    assert outcome.duration_ms >= 300
    eventually(lambda: server.connections == 1)
    # the thread is free, and the connection is gone where the server can see it
    assert get(client, good.url).kind is OutcomeKind.COMPLETED
    if handler not in (never_answers, never_reads):
        eventually(lambda: server.ended == 1)


@pytest.mark.parametrize("handler", [never_reads, never_answers, drips_headers, drips_body])
def test_another_thread_breaks_a_call_off(serve: Serve, client: Client, handler: Handler) -> None:
    _break_off(client, serve(handler), "http://127.0.0.1", b"x" * 30_000_000 if handler is never_reads else b"x")
    # the thread is free
    assert get(client, serve(always(OK)).url).kind is OutcomeKind.COMPLETED


def _break_off(client: Client, server: Server, url: str, body: bytes = b"x") -> None:
    abort = Abort()

    def fire() -> None:
        eventually(lambda: server.connections == 1)
        time.sleep(0.1)  # into the phase that the handler is for
        assert abort.fire()
        assert abort.fire(), "to say it again is the same"

    with ThreadPoolExecutor() as other:
        fired = other.submit(fire)
        started = time.monotonic()
        with pytest.raises(CallAborted):
            client.send(Call("POST", f"{url}:{server.port}/", {}, body), deadline=AMPLE, abort=abort)
        fired.result()
    assert time.monotonic() - started < SOON
    assert server.connections == 1
    assert abort.fire(), "nor does it matter that it has ended since"


def test_a_call_that_was_broken_off_before_it_began_is_not_made(serve: Serve, client: Client) -> None:
    server, abort = serve(always(OK)), Abort()
    assert get(client, server.url).kind is OutcomeKind.COMPLETED
    assert abort.fire()
    with pytest.raises(CallAborted):
        client.send(Call("GET", server.url, {}), deadline=AMPLE, abort=abort)
    assert len(server.requests) == 1


def test_a_call_that_has_ended_cannot_be_broken_off(serve: Serve, client: Client) -> None:
    """Nor the next one, on the same connection."""
    server, abort = serve(always(OK)), Abort()
    assert client.send(Call("GET", server.url, {}), deadline=AMPLE, abort=abort).kind is OutcomeKind.COMPLETED
    assert not abort.fire()
    assert get(client, server.url).kind is OutcomeKind.COMPLETED
    assert server.connections == 1


def test_a_call_that_is_broken_off_on_a_pooled_connection_is_not_sent_again(serve: Serve, client: Client) -> None:
    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        peer.request()
        peer.idle()

    server, abort = serve(handler), Abort()
    assert get(client, server.url).kind is OutcomeKind.COMPLETED

    def fire() -> None:
        eventually(lambda: len(server.requests) == 2)
        assert abort.fire()

    with ThreadPoolExecutor() as other:
        fired = other.submit(fire)
        with pytest.raises(CallAborted):
            client.send(Call("GET", server.url, {}), deadline=AMPLE, abort=abort)
        fired.result()
    assert [request.connection for request in server.requests] == [1, 1]


def test_what_arrived_before_the_deadline_is_told(serve: Serve, client: Client) -> None:
    server = serve(drips_body)

    def told() -> Outcome | None:
        outcome = get(client, server.url, deadline=DEADLINE)
        return outcome if outcome.status else None  # where all stood still for so long, nothing had arrived

    outcome = wait_until(told)
    assert outcome is not None
    assert outcome.status == 200
    assert set(outcome.excerpt) == {"x"}


@pytest.mark.parametrize("greeting", [b"", b"\x16\x03\x03\x40\x00"])
def test_the_deadline_holds_for_the_tls_handshake(serve: Serve, client: Client, greeting: bytes) -> None:
    server = serve(lambda peer: peer.drip(greeting, b"\0") if greeting else peer.idle())
    started = time.monotonic()
    outcome = get(client, server.url.replace("http:", "https:"), deadline=DEADLINE)
    assert time.monotonic() - started < SOON
    assert (outcome.reason, outcome.timed_out) == ("deadline of 300ms exceeded", True)


def test_the_connect_timeout_holds_for_the_tls_handshake(serve: Serve, make_client: MakeClient) -> None:
    impatient = make_client(connect_timeout=DEADLINE)
    started = time.monotonic()
    outcome = get(impatient, serve(never_reads).url.replace("http:", "https:"))
    assert time.monotonic() - started < SOON
    assert (outcome.kind, outcome.reason, outcome.timed_out) == (OutcomeKind.RETRY, "no connection within 300ms", True)


def test_the_deadline_holds_over_redirects(serve: Serve, client: Client) -> None:
    def slow(peer: Peer) -> None:
        while peer.request() and not peer.server.stopping.wait(0.15):
            peer.send(b"HTTP/1.1 302 Found\r\nLocation: /next\r\nContent-Length: 0\r\n\r\n")

    outcome = get(client, serve(slow).url, deadline=DEADLINE)
    assert (outcome.reason, outcome.timed_out) == ("deadline of 300ms exceeded", True)


def test_no_time_at_all(serve: Serve, client: Client) -> None:
    server = serve(always(OK))
    outcome = get(client, server.url, deadline=timedelta())
    assert (outcome.reason, outcome.timed_out) == ("deadline of 0s exceeded", True)
    assert not server.requests


def test_a_deadline_longer_than_sockets_can_wait(serve: Serve, client: Client) -> None:
    """Milliseconds in 32 bits: what is left of such a deadline would be half a second."""

    def handler(peer: Peer) -> None:
        while peer.request() and not peer.server.stopping.wait(0.7):
            peer.send(OK)

    outcome = get(client, serve(handler).url, deadline=timedelta(milliseconds=2**32 + 500))
    assert outcome.reason == "HTTP 200"


# --- connections that fail -------------------------------------------------------------------------------------------


def resets_mid_body(peer: Peer) -> None:
    peer.request()
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    peer.server.stopping.wait(0.1)
    peer.reset()


def resets_at_once(peer: Peer) -> None:
    peer.request()
    peer.reset()


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (resets_mid_body, "connection reset"),
        (resets_at_once, "connection reset"),
        (once(b""), "connection closed without an answer"),
        (once(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc"), "answer is cut off"),
        (once(b"HTTP/1.1 404 No\r\nContent-Length: 100\r\n\r\nabc"), "answer is cut off"),
        (once(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"), "answer is cut off"),
        (once(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"), "answer is cut off"),
        (once(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "answer is cut off"),
        (once(b"HTTP/1.1 200 OK\r\nServ"), "answer is cut off"),
        (once(b"HTTP/1.1 200 OK\r\n"), "answer is cut off"),
        (once(b"SSH-2.0-OpenSSH\r\n"), "answer is not HTTP"),
        (once(b"HTTP/1.1 abc\r\n\r\n"), "answer is not HTTP"),
        (once(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"), "answer is not HTTP"),
        (once(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000 + b"\r\n\r\n"), "answer is not HTTP"),
        (once(b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello"), "answer is not HTTP"),
        (floods_status, "answer is not HTTP"),
        (floods_one_header, "answer is not HTTP"),
        (floods_whole_headers, "answer is not HTTP"),
    ],
)
def test_a_broken_answer_is_worth_another_try(serve: Serve, client: Client, handler: Handler, reason: str) -> None:
    server = serve(handler)
    outcome = get(client, server.url, method="POST")
    assert (outcome.kind, outcome.reason, outcome.timed_out) == (OutcomeKind.RETRY, reason, False)
    assert len(server.requests) == 1


def test_more_than_was_announced_is_not_part_of_the_answer(serve: Serve, client: Client) -> None:
    def handler(peer: Peer) -> None:
        while peer.request():
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel")
            peer.server.stopping.wait(0.05)
            peer.send(b"loHTTP/1.1 500 Smuggled\r\n\r\n")

    server = serve(handler)
    for _ in range(2):
        outcome = get(client, server.url)
        assert (outcome.reason, outcome.excerpt) == ("HTTP 200", "hello")
    assert server.connections == 2


def test_refused(client: Client) -> None:
    port = find_port()
    outcome = get(client, f"http://127.0.0.1:{port}/")
    assert (outcome.kind, outcome.reason, outcome.status, outcome.excerpt) == (OutcomeKind.RETRY, "connection refused", None, "")


@pytest.mark.parametrize("host", ["name.invalid", "a..b"])
def test_a_name_that_does_not_resolve(client: Client, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    real = socket.getaddrinfo

    def fail(name: str, *args: Any, **options: Any) -> Any:
        if name == "name.invalid" and not options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(name, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    outcome = get(client, f"http://{host}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "host name cannot be resolved")


def test_a_name_server_that_hangs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = threading.Event(), []

    def hang(name: str, *_: Any, **options: Any) -> Any:
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not an address")
        asked.append(name)
        answer.wait(100)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    started = time.monotonic()
    outcomes = [get(client, "http://slow.invalid/", deadline=DEADLINE) for _ in range(3)]
    assert time.monotonic() - started < 3 * SOON
    assert [(outcome.reason, outcome.timed_out) for outcome in outcomes] == [("deadline of 300ms exceeded", True)] * 3
    assert asked == ["slow.invalid"]
    answer.set()
    eventually(lambda: not any(thread.name == "lookup slow.invalid" for thread in threading.enumerate()))
    assert get(client, "http://slow.invalid/").reason == "host name cannot be resolved"
    assert asked == ["slow.invalid"] * 2


def test_the_next_address_is_tried(serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(OK))
    closed = ("127.0.0.1", find_port())
    real = socket.getaddrinfo

    def two(name: str, port: int, *args: Any, **options: Any) -> Any:
        if name != "two.invalid" or options.get("flags"):
            return real(name, port, *args, **options)
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        unknown = (9999, socket.SOCK_STREAM, 0, "", ("::1", port, 0, 0))
        return [unknown, (*kind, closed), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert get(client, f"http://two.invalid:{server.port}/").excerpt == "hello"
    assert server.requests[0].headers["host"] == f"two.invalid:{server.port}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a listener that drops connections when its queue is full")
def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    serve: Serve, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = serve(always(OK)), make_client(connect_timeout=timedelta(seconds=5))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        addresses = [full.getsockname(), ("127.0.0.1", server.port)]
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*kind, address) for address in addresses])
        outcome = get(client, f"http://two.invalid:{server.port}/")
        assert outcome.excerpt == "hello"
        assert outcome.duration_ms < 5000
        del addresses[1]
        outcome = get(make_client(connect_timeout=DEADLINE), "http://full.invalid/")
        assert (outcome.kind, outcome.reason, outcome.timed_out) == (OutcomeKind.RETRY, "no connection within 300ms", True)


def test_what_cannot_be_sent_fails_for_good(client: Client) -> None:
    for call in (
        Call("GET", "http://*.example/", {}),
        Call("GET", "http://a.example/", {"X-A": "a\r\nb: c"}),
        Call("GET", "mailto:a@b", {}),
    ):
        outcome = client.send(call, deadline=AMPLE)
        assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, "not a valid request")


# --- pooled connections ----------------------------------------------------------------------------------------------


def test_a_connection_serves_call_after_call(serve: Serve, client: Client) -> None:
    server = serve(always(OK))
    for _ in range(3):
        assert get(client, server.url).excerpt == "hello"
    assert [request.connection for request in server.requests] == [1, 1, 1]


def test_threads_and_forked_processes_do_not_share_connections(serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(OK))
    get(client, server.url)
    thread = threading.Thread(target=get, args=(client, server.url))
    thread.start()
    thread.join()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    get(client, server.url)
    assert [request.connection for request in server.requests] == [1, 2, 3]


def test_threads_do_not_mix_up_their_answers(serve: Serve, client: Client) -> None:
    def echo(peer: Peer) -> None:
        while request := peer.request():
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n" + request.line.split()[1].encode())

    server = serve(echo)
    with ThreadPoolExecutor(8) as pool:
        paths = [f"/{number:05}" for number in range(200)]
        assert list(pool.map(lambda path: get(client, server.url + path).excerpt, paths)) == paths
    assert server.connections <= 8


def test_a_connection_that_was_closed_while_idle_is_replaced(serve: Serve, client: Client) -> None:
    server = serve(once(OK))
    for number in (1, 2):
        assert get(client, server.url, method="POST").kind is OutcomeKind.COMPLETED
        eventually(lambda number=number: server.ended == number)  # type: ignore[misc]
    assert [request.connection for request in server.requests] == [1, 2]


@pytest.mark.parametrize("ending", [Peer.reset, lambda _peer: None])
def test_a_connection_that_closes_as_it_is_used_again_is_replaced_once(serve: Serve, client: Client, ending: Handler) -> None:
    """The race that cannot be seen beforehand: the target's idle time ends while the next request is on its way."""

    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        peer.request()
        ending(peer)

    server = serve(handler)
    for _ in range(2):
        outcome = get(client, server.url, method="POST", headers={"Idempotency-Key": "job-1"}, body=b"x")
        assert outcome.kind is OutcomeKind.COMPLETED
    assert [request.connection for request in server.requests] == [1, 1, 2]
    assert {(request.headers["idempotency-key"], request.body) for request in server.requests} == {("job-1", b"x")}


def test_a_request_is_sent_again_only_once(serve: Serve, client: Client) -> None:
    def handler(peer: Peer) -> None:
        if peer.request() and peer.number == 1:
            peer.send(OK)
            peer.request()

    server = serve(handler)
    get(client, server.url)
    outcome = get(client, server.url)
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "connection closed without an answer")
    assert [request.connection for request in server.requests] == [1, 1, 2]


@pytest.mark.parametrize("second", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_a_request_is_not_sent_again_after_any_byte_of_an_answer(serve: Serve, client: Client, second: bytes) -> None:
    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        peer.request()
        peer.send(second)

    server = serve(handler)
    get(client, server.url)
    assert get(client, server.url).kind is OutcomeKind.RETRY
    assert len(server.requests) == 2


def test_a_request_is_not_sent_again_after_the_deadline(serve: Serve, client: Client) -> None:
    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        never_answers(peer)

    server = serve(handler)
    get(client, server.url)
    assert get(client, server.url, deadline=DEADLINE).timed_out
    assert len(server.requests) <= 2  # it was not sent at all, where the machine stood still for so long


def test_an_exception_from_a_signal_passes_through(serve: Serve, client: Client) -> None:
    """As Celery's soft time limit does it. What the interrupted call was waiting for must not reach the next one."""

    class SoftLimit(Exception):
        pass

    def on_signal(*_: Any) -> None:
        raise SoftLimit

    def handler(peer: Peer) -> None:
        while peer.request():
            if len(peer.server.requests) == 1:
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nst")
                os.kill(os.getpid(), signal.SIGUSR1)
                peer.idle()
            peer.send(OK)

    server = serve(handler)
    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with pytest.raises(SoftLimit):
            get(client, server.url)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert get(client, server.url).excerpt == "hello"
    assert [request.connection for request in server.requests] == [1, 2]


# --- redirects -------------------------------------------------------------------------------------------------------


def redirecting(status: int, location: str, rest: bytes = b"Content-Length: 0\r\n\r\n") -> Handler:
    """Redirects requests for / and answers all others."""

    def handler(peer: Peer) -> None:
        while request := peer.request():
            moved = f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\n".encode() + rest
            peer.send(moved if request.line.split()[1] == "/" else OK)

    return handler


def lines(server: Server) -> list[str]:
    return [request.line.removesuffix(" HTTP/1.1") for request in server.requests]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_reads_follow_redirects(serve: Serve, client: Client, method: str, status: int) -> None:
    server = serve(redirecting(status, "moved/here?a=b#part"))
    assert get(client, f"{server.url}/", method=method).reason == "HTTP 200"
    assert lines(server) == [f"{method} /", f"{method} /moved/here?a=b"]


@pytest.mark.parametrize("status", [307, 308])
def test_writes_follow_redirects_that_keep_the_method(serve: Serve, client: Client, status: int) -> None:
    server = serve(redirecting(status, "/moved"))
    assert get(client, f"{server.url}/", method="POST", body=b"data", headers={"Authorization": "x"}).kind is OutcomeKind.COMPLETED
    assert lines(server) == ["POST /", "POST /moved"]
    assert [(request.body, request.headers["authorization"]) for request in server.requests] == [(b"data", "x")] * 2


@pytest.mark.parametrize("status", [301, 302, 303])
def test_writes_do_not_become_reads(serve: Serve, client: Client, status: int) -> None:
    server = serve(redirecting(status, "/moved"))
    outcome = get(client, f"{server.url}/", method="POST")
    assert (outcome.kind, outcome.status) == (OutcomeKind.FAILED, status)
    assert outcome.reason == f"HTTP {status}: a redirect that would turn POST into GET is not followed"
    assert lines(server) == ["POST /"]


def test_a_location_is_read_as_utf8(serve: Serve, client: Client) -> None:
    server = serve(redirecting(302, "/größe"))
    assert get(client, f"{server.url}/").kind is OutcomeKind.COMPLETED
    assert lines(server) == ["GET /", "GET /gr%C3%B6%C3%9Fe"]


def test_a_status_is_that_of_the_last_request(serve: Serve, client: Client) -> None:
    port = find_port()
    server = serve(redirecting(302, f"http://127.0.0.1:{port}/", b"Retry-After: 60\r\nContent-Length: 0\r\n\r\n"))
    outcome = get(client, f"{server.url}/")
    assert (outcome.reason, outcome.status, outcome.retry_after) == ("connection refused", None, None)


def test_a_redirect_loop_over_two_hosts_ends(serve: Serve, client: Client) -> None:
    first = serve(lambda peer: handle(peer))
    other = serve(redirecting(302, f"{first.url}/"))

    def handle(peer: Peer) -> None:
        redirecting(302, f"{other.url}/")(peer)

    outcome = get(client, f"{first.url}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, "more than 5 redirects")
    assert len(first.requests) + len(other.requests) == MAX_REDIRECTS + 1


def test_a_redirect_loop_ends(serve: Serve, client: Client) -> None:
    server = serve(redirecting(302, "/"))
    outcome = get(client, f"{server.url}/")
    assert (outcome.kind, outcome.reason, outcome.status) == (OutcomeKind.FAILED, "more than 5 redirects", 302)
    assert len(server.requests) == MAX_REDIRECTS + 1


def test_the_body_of_a_redirect_is_not_read(serve: Serve, client: Client) -> None:
    def handler(peer: Peer) -> None:
        while request := peer.request():
            if request.line.startswith("GET /end"):
                peer.send(OK)
            else:
                peer.flood(b"HTTP/1.1 302 Found\r\nLocation: /end\r\n\r\n")

    assert get(client, serve(handler).url).excerpt == "hello"


@pytest.mark.parametrize(
    "location",
    [
        "ftp://a.example/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://u:p@127.0.0.1/",
        "http://a.example\\@b/",
        "http://a.example\\b/",
        "http://[::1",
        "http://*.example/",
    ],
)
def test_a_redirect_to_what_is_no_http_url_fails(serve: Serve, client: Client, location: str) -> None:
    outcome = get(client, f"{serve(redirecting(302, location)).url}/")
    assert outcome.kind is OutcomeKind.FAILED
    assert "redirect to a URL that is not accepted" in outcome.reason


def test_another_host_gets_no_credentials(serve: Serve, client: Client) -> None:
    other = serve(always(OK))
    first = serve(redirecting(307, f"{other.url}/there"))
    headers = {
        "Authorization": "Bearer plain",
        "Cookie": "a=b",
        "Host": "first.example",
        "X-Key": "key s3cret-token",
        "X-Plain": "stays",
        "X-Job-ID": "job-s3cret-token",
    }
    outcome = get(client, f"{first.url}/", method="POST", headers=headers, body=b"data", secrets=("s3cret-token",))
    assert outcome.kind is OutcomeKind.COMPLETED
    assert {"authorization", "cookie", "x-key"} <= set(first.requests[0].headers)
    assert first.requests[0].headers["host"] == "first.example"
    received = other.requests[0].headers
    assert not {"authorization", "cookie", "x-key"} & set(received)
    assert (received["host"], received["x-plain"], received["x-job-id"]) == (f"127.0.0.1:{other.port}", "stays", "job-s3cret-token")


def test_credentials_stay_dropped_on_the_way_back(serve: Serve, client: Client) -> None:
    first = serve(lambda peer: handle(peer))
    other = serve(redirecting(307, f"{first.url}/back"))

    def handle(peer: Peer) -> None:
        redirecting(307, f"{other.url}/")(peer)

    assert get(client, f"{first.url}/", headers={"Authorization": "x"}).kind is OutcomeKind.COMPLETED
    assert ["authorization" in request.headers for request in first.requests] == [True, False]


def test_a_body_with_a_secret_does_not_go_to_another_host(serve: Serve, client: Client) -> None:
    other = serve(always(OK))
    first = serve(redirecting(307, f"{other.url}/"))
    outcome = get(client, f"{first.url}/", method="POST", body=b'{"key":"s3cret\\"token"}', secrets=('s3cret"token',))
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason == "redirect to another host is not followed: the body holds a value from the environment"
    assert not other.requests


def test_another_host_does_not_get_the_signature(serve: Serve, client: Client) -> None:
    other = serve(always(OK))
    first = serve(redirecting(307, f"{other.url}/there"))
    config = HttpConfig.model_validate({"endpoint": f"{first.url}/", "body": {"a": "ü"}, "sign": "${HOOK}"})
    hook = "whsec_" + base64.b64encode(b"a-key-of-more-than-24-bytes").decode()
    call = render(config, job_id="report:u1:1", user="u1", definition="report", params={}, environment={"HOOK": hook})
    assert client.send(call, deadline=AMPLE).kind is OutcomeKind.COMPLETED
    Webhook(hook).verify(first.requests[0].body, first.requests[0].headers)  # as it came over the wire
    assert not [name for name in other.requests[0].headers if name.startswith("webhook-")]
    assert other.requests[0].headers["x-job-id"] == "report:u1:1"


# --- which addresses are called --------------------------------------------------------------------------------------

Name = Callable[..., None]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Name:
    """Says what addresses a name has: a list for each time that it is asked, the last one from then on."""
    real = socket.getaddrinfo
    answers: dict[str, list[list[str]]] = {}

    def resolve(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host not in answers:
            return real(host, port, *args, **options)
        if options.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not an address")
        current = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return [entry for address in current for entry in real(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]

    def answer(name: str, *times: list[str]) -> None:
        answers[name] = list(times)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return answer


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that sockets were told to connect to."""
    addresses: list[str] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        addresses.append(address[0])
        real(self, address)

    monkeypatch.setattr("taskplatform.http.connections._Socket.connect", connect, raising=False)
    return addresses


def allow(*entries: str) -> AllowList:
    return AllowList(map(Target.parse, entries))


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1", "address 127.0.0.1 (loopback) is not allowed; http_allow can allow it"),
        ("127.1", "address 127.0.0.1 (loopback) of host 127.1 is not allowed; http_allow can allow it"),
        ("0x7f.1", "address 127.0.0.1 (loopback) of host 0x7f.1 is not allowed; http_allow can allow it"),
        ("2130706433", "address 127.0.0.1 (loopback) of host 2130706433 is not allowed; http_allow can allow it"),
        ("017700000001", "address 127.0.0.1 (loopback) of host 017700000001 is not allowed; http_allow can allow it"),
        ("%31%32%37.0.0.1", None),
        ("①②⑦.⓪.⓪.①", None),
        ("localhost", None),
        ("localhost.", None),
        ("LOCALHOST", None),
        ("0", "address 0.0.0.0 (unspecified) of host 0 is not allowed; http_allow can allow it"),
        ("0.0.0.0", "address 0.0.0.0 (unspecified) is not allowed; http_allow can allow it"),
        ("[::]", "address :: (unspecified) is not allowed; http_allow can allow it"),
        ("[::1]", "address ::1 (loopback) is not allowed; http_allow can allow it"),
        ("[::ffff:127.0.0.1]", "address ::ffff:127.0.0.1 (loopback) is not allowed; http_allow can allow it"),
        ("[0:0:0:0:0:ffff:7f00:1]", None),
        ("[64:ff9b::127.0.0.1]", None),
        ("10.0.0.5", "address 10.0.0.5 (private) is not allowed; http_allow can allow it"),
        ("169.254.169.254", "address 169.254.169.254 (cloud metadata) is not allowed; only the address itself in http_allow can allow it"),
        ("[fd00:ec2::254]", None),
        ("224.0.0.1", "address 224.0.0.1 (multicast) is not allowed; http_allow can allow it"),
        ("255.255.255.255", "address 255.255.255.255 (reserved) is not allowed; http_allow can allow it"),
    ],
)
def test_no_spelling_of_an_inside_address_gets_through(
    serve: Serve, make_client: MakeClient, name_server: Name, dialled: list[str], host: str, reason: str | None
) -> None:
    server = serve(always(OK))
    name_server("localhost.", ["127.0.0.1"])  # not every system knows it
    outcome = get(make_client(allowed=allow()), f"http://{host}:{server.port}/", deadline=timedelta(seconds=5))
    assert (outcome.kind, outcome.status, outcome.timed_out) == (OutcomeKind.FAILED, None, False)
    assert (outcome.reason == reason) if reason else ("is not allowed" in outcome.reason or outcome.reason == "not a valid request")
    assert dialled == []
    assert server.connections == 0


def test_a_name_with_an_inside_address_is_refused(serve: Serve, make_client: MakeClient, name_server: Name, dialled: list[str]) -> None:
    server = serve(always(OK))
    name_server("inside.example", ["10.0.0.5"])
    outcome = get(make_client(), f"http://inside.example:{server.port}/")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason == "address 10.0.0.5 (private) of host inside.example is not allowed; http_allow can allow it"
    assert dialled == []


def test_a_name_that_changes_its_address_is_judged_each_time(
    serve: Serve, make_client: MakeClient, name_server: Name, dialled: list[str]
) -> None:
    """DNS rebinding: what is judged is what is dialled, and there is no second lookup between the two."""
    server = serve(once(OK))
    name_server("rebind.example", ["127.0.0.1"], ["169.254.169.254"], ["127.0.0.1"], ["::ffff:10.0.0.5"])
    client = make_client(allowed=allow("127.0.0.1"))
    kinds = []
    for number in range(4):
        kinds.append(get(client, f"http://rebind.example:{server.port}/").kind)
        eventually(lambda number=number: server.ended == number // 2 + 1)  # type: ignore[misc]
    assert kinds == [OutcomeKind.COMPLETED, OutcomeKind.FAILED] * 2
    assert dialled == ["127.0.0.1"] * 2


def test_of_several_addresses_those_that_are_allowed_are_used(
    serve: Serve, make_client: MakeClient, name_server: Name, dialled: list[str]
) -> None:
    server, client = serve(once(OK)), make_client(allowed=allow("127.0.0.1"))
    name_server("mixed.example", ["10.0.0.5", "::1", "127.0.0.1", "169.254.169.254"])
    assert get(client, f"http://mixed.example:{server.port}/").excerpt == "hello"
    assert dialled == ["127.0.0.1"]
    name_server("none.example", ["10.0.0.5", "::1"])
    assert get(client, f"http://none.example:{server.port}/").reason.startswith("address 10.0.0.5 (private) of host none.example")
    assert dialled == ["127.0.0.1"]


def test_an_allowed_address_that_does_not_answer_is_a_fault_of_the_network(make_client: MakeClient, name_server: Name) -> None:
    """Worth another try, although the other address is refused."""
    port = find_port()
    name_server("mixed.example", ["127.0.0.1", "10.0.0.5"])
    outcome = get(make_client(allowed=allow("127.0.0.1")), f"http://mixed.example:{port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "connection refused")


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:{port}/", "//2130706433:{port}/", "http://hidden.example:{port}/", "http://[::ffff:7f00:1]:{port}/"]
)
def test_a_redirect_does_not_lead_to_a_refused_address(serve: Serve, make_client: MakeClient, name_server: Name, location: str) -> None:
    name_server("hidden.example", ["127.0.0.1"])
    inside = serve(always(OK))
    server = serve(redirecting(302, location.format(port=inside.port)))
    outcome = get(make_client(allowed=allow(f"127.0.0.1:{server.port}")), f"{server.url}/")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.startswith("redirect: address ")
    assert "(loopback)" in outcome.reason
    assert inside.connections == 0


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this machine that counts as a public one during the test."""
    if sys.platform != "linux":
        pytest.skip("needs a second loopback address")
    known = tuple((name, nets) if name != "loopback" else (name, (ip_network("127.0.0.1/32"),)) for name, nets in addresses._networks())
    monkeypatch.setattr(addresses, "_networks", lambda: known)
    return "127.0.0.2"


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("through", ["", "/again"])
def test_a_public_target_does_not_redirect_to_an_inside_one(
    serve: Serve, make_client: MakeClient, outside: str, status: int, through: str
) -> None:
    """Although inside ones may be called, and there is even a pooled connection to it."""
    inside = serve(always(OK))

    def redirect(peer: Peer) -> None:
        while request := peer.request():
            onward = f"{inside.url}/" if not through or request.line.split()[1] == through else through
            peer.send(f"HTTP/1.1 {status} Moved\r\nLocation: {onward}\r\nContent-Length: 0\r\n\r\n".encode())

    public = serve(redirect, outside)
    client = make_client(allowed=allow("127.0.0.1"))
    for _ in range(2):
        assert get(client, inside.url).kind is OutcomeKind.COMPLETED
        outcome = get(client, f"{public.url}/")
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.reason == "redirect: address 127.0.0.1 (loopback) is not allowed; a public target may redirect only to public ones"
    assert (inside.connections, len(inside.requests)) == (1, 2)


def test_other_redirects_go_on(serve: Serve, make_client: MakeClient, outside: str) -> None:
    """From an inside target to a public and to an inside one, and from a public to a public one."""
    client = make_client(allowed=allow("127.0.0.1"))
    inside, public = serve(always(OK)), serve(always(OK), outside)
    for start, end in (("127.0.0.1", public), ("127.0.0.1", inside), (outside, public)):
        assert get(client, f"{serve(redirecting(302, f'{end.url}/end'), start).url}/").excerpt == "hello"


def test_an_entry_is_for_its_name_and_port_also_where_a_connection_is_pooled(
    serve: Serve, make_client: MakeClient, name_server: Name
) -> None:
    server, other = serve(always(OK)), serve(always(OK))
    for name in ("named.example", "unnamed.example"):
        name_server(name, ["127.0.0.1"])
    client = make_client(allowed=allow(f"named.example:{server.port}"))
    for url, kind in (
        (f"http://named.example:{server.port}/", OutcomeKind.COMPLETED),
        (f"http://NAMED.example:{server.port}/", OutcomeKind.COMPLETED),
        (f"http://named.example.:{server.port}/", OutcomeKind.COMPLETED),
        (f"http://unnamed.example:{server.port}/", OutcomeKind.FAILED),
        (f"http://127.0.0.1:{server.port}/", OutcomeKind.FAILED),
        (f"http://named.example:{other.port}/", OutcomeKind.FAILED),
    ):
        if url.startswith("http://named.example.:"):
            name_server("named.example.", ["127.0.0.1"])
        assert get(client, url).kind is kind, url
    assert other.connections == 0


def test_a_host_header_does_not_pretend_to_be_an_allowed_host(serve: Serve, make_client: MakeClient) -> None:
    server = serve(always(OK))
    client = make_client(allowed=allow("named.example"))
    assert get(client, server.url, headers={"Host": "named.example"}).kind is OutcomeKind.FAILED
    assert server.connections == 0


def test_an_allowed_name_does_not_lead_to_cloud_metadata(make_client: MakeClient, name_server: Name, dialled: list[str]) -> None:
    name_server("inside.example", ["169.254.169.254", "fd00:ec2::254"])
    outcome = get(make_client(allowed=allow("inside.example", "0.0.0.0/0", "::/0")), "http://inside.example/")
    assert outcome.kind is OutcomeKind.FAILED
    assert outcome.reason.startswith("address 169.254.169.254 (cloud metadata) of host inside.example is not allowed; only the address")
    assert dialled == []


# --- what must not leak ----------------------------------------------------------------------------------------------


def test_cookies_are_not_kept(serve: Serve, client: Client) -> None:
    server = serve(redirecting(302, "/next", b"Set-Cookie: session=1; Path=/\r\nContent-Length: 0\r\n\r\n"))
    for _ in range(2):
        get(client, f"{server.url}/")
    assert len(server.requests) == 4
    assert not any("cookie" in request.headers for request in server.requests)
    get(client, f"{server.url}/", headers={"Cookie": "own=1"})
    assert [request.headers.get("cookie") for request in server.requests[4:]] == ["own=1", "own=1"]


def test_a_user_s_call_leaves_nothing_for_the_next_one_on_its_connection(serve: Serve, client: Client) -> None:
    """A server that would know the first user again, by every means that a header gives it."""

    def handler(peer: Peer) -> None:
        while request := peer.request():
            cookies = b"".join(
                b"Set-Cookie: session-%d=%s; Path=/%s\r\n" % (number, request.headers["x-user-id"].encode(), attributes)
                for number, attributes in enumerate((b"", b"; Max-Age=9999", b"; HttpOnly; SameSite=None", b"; Domain=127.0.0.1"))
            )
            memory = b'ETag: "seen"\r\nLast-Modified: Sun, 01 Mar 2026 12:00:00 GMT\r\nWWW-Authenticate: Basic realm="x"\r\n'
            peer.send(b"HTTP/1.1 200 OK\r\n" + cookies + memory + b"Content-Length: 5\r\n\r\nhello")

    server = serve(handler)

    def call(user: str, **fields: Any) -> None:
        config = HttpConfig.model_validate({"endpoint": server.url.replace("//", fields.pop("login", "//")), "method": "GET", **fields})
        made = render(config, job_id=f"report:{user}:1", user=user, definition="report", params={}, environment={"KEY": "s3cret-of-ann"})
        assert client.send(made, deadline=AMPLE).excerpt == "hello"

    call("ann", login="//ann:s3cret-of-ann@", headers={"Cookie": "own=ann", "X-Key": "${KEY}"})
    call("bob")
    first, second = server.requests
    assert (first.connection, second.connection) == (1, 1), "it is the same connection"
    assert {"authorization", "cookie", "x-key"} <= first.headers.keys()
    expected = {"accept", "accept-encoding", "host", "idempotency-key", "user-agent", "x-job-id", "x-task-type", "x-user-id"}
    assert second.headers.keys() == expected
    assert "ann" not in str(second)


def test_proxies_and_netrc_are_not_used(serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = serve(always(OK))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get(client, server.url).kind is OutcomeKind.COMPLETED
    assert "authorization" not in server.requests[0].headers


def test_secrets_do_not_come_back_in_the_excerpt(serve: Serve, client: Client) -> None:
    def echo(peer: Peer) -> None:
        while request := peer.request():
            text = f"{request.line} {request.headers['authorization']} {request.body.decode()}".encode()
            peer.send(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(text) + text)

    secret = 's3cret/"token"'
    outcome = get(
        client,
        f"{serve(echo).url}/?key=s3cret%2F%22token%22",
        method="POST",
        headers={"Authorization": f"Bearer {secret}"},
        body=b'{"k": "s3cret/\\"token\\""}',
        secrets=(secret,),
    )
    assert outcome.excerpt == 'POST /?key=*** HTTP/1.1 Bearer *** {"k": "***"}'


def test_a_secret_that_is_cut_off_by_the_limit_is_not_shown(serve: Serve, make_client: MakeClient) -> None:
    secret = "abcdefghijklmnopqrstuvwxyz"
    client = make_client(max_response=1024, excerpt=4096)
    server = serve(lambda peer: echo_path(peer))

    def echo_path(peer: Peer) -> None:
        while request := peer.request():
            body = b"." * int(request.line.split()[1].strip("/")) + secret.encode() * 50
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    for dots in range(1024 - 30, 1024):
        outcome = get(client, f"{server.url}/{dots}", secrets=(secret,))
        assert outcome.kind is OutcomeKind.COMPLETED
        assert "abcd" not in outcome.excerpt
        assert outcome.excerpt.startswith("." * dots)


def test_secrets_do_not_go_into_the_log(serve: Serve, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """urllib3 logs each URL at level debug, and at level warning when headers are odd."""
    caplog.set_level(logging.DEBUG)
    odd = serve(always(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nno colon\r\nA: b\r\n\r\nhello"))
    for url in (odd.url, serve(once(b"")).url):
        outcome = get(client, f"{url}/s3cret-path?key=s3cret-token", secrets=("s3cret-token", "s3cret-path"))
        assert "s3cret" not in repr(outcome)
    assert "s3cret" not in caplog.text
    logging.getLogger("urllib3.connectionpool").debug("of others")
    assert "of others" in caplog.text


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, which is its own authority, and its key."""
    if not shutil.which("openssl"):
        if os.environ.get("CI"):
            pytest.fail("openssl is needed")
        pytest.skip("openssl is needed")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True, timeout=60)
    return paths


@pytest.fixture
def over_tls(certificate: tuple[Path, Path], serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """As `serve`, but with TLS. A client that is made during the test trusts the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    def start(handler: Handler) -> Server:
        def encrypted(peer: Peer) -> None:
            peer.connection = context.wrap_socket(peer.connection, server_side=True)
            handler(peer)

        return serve(encrypted)

    return start


def test_tls(over_tls: Serve, make_client: MakeClient) -> None:
    server, client = over_tls(always(OK)), make_client()
    url = f"https://localhost:{server.port}/"
    assert [get(client, url).excerpt for _ in range(2)] == ["hello", "hello"]
    assert server.connections == 1


@pytest.mark.parametrize("handler", [drips_headers, drips_body, never_answers])
def test_tls_keeps_the_deadline(over_tls: Serve, make_client: MakeClient, handler: Handler) -> None:
    server, client = over_tls(handler), make_client()
    started = time.monotonic()
    outcome = get(client, f"https://localhost:{server.port}/", deadline=DEADLINE)
    assert time.monotonic() - started < SOON
    assert (outcome.reason, outcome.timed_out) == ("deadline of 300ms exceeded", True)


@pytest.mark.parametrize("handler", [drips_body, never_answers])
def test_another_thread_breaks_a_call_over_tls_off(over_tls: Serve, make_client: MakeClient, handler: Handler) -> None:
    _break_off(make_client(), over_tls(handler), "https://localhost")


def test_a_tls_connection_that_closes_as_it_is_used_again_is_replaced(over_tls: Serve, make_client: MakeClient) -> None:
    def handler(peer: Peer) -> None:
        peer.request()
        peer.send(OK)
        peer.request()

    server, client = over_tls(handler), make_client()
    for _ in range(2):
        assert get(client, f"https://localhost:{server.port}/").kind is OutcomeKind.COMPLETED
    assert [request.connection for request in server.requests] == [1, 1, 2]


def _tls_server(serve: Serve, certificate: trustme.LeafCert, *, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of versions that no client should speak
        context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, newest
    context.set_ciphers("ALL:@SECLEVEL=0")
    certificate.configure_cert(context)

    def encrypted(peer: Peer) -> None:
        peer.connection = context.wrap_socket(peer.connection, server_side=True)
        always(OK)(peer)

    return serve(encrypted)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """An authority that clients trust which are made during the test."""
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return made


def test_a_certificate_of_a_trusted_authority_is_accepted(serve: Serve, make_client: MakeClient, authority: trustme.CA) -> None:
    """So that the refusals below are about what they say."""
    server = _tls_server(serve, authority.issue_cert("localhost"))
    assert get(make_client(), f"https://localhost:{server.port}/").excerpt == "hello"


BAD_CERTIFICATES: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "its authority is not known": lambda _authority: trustme.CA().issue_cert("localhost"),
    "it has expired": lambda authority: authority.issue_cert("localhost", not_after=datetime(2020, 1, 1, tzinfo=UTC)),
    "it is not valid yet": lambda authority: authority.issue_cert("localhost", not_before=datetime(2099, 1, 1, tzinfo=UTC)),
    "it is for another host name": lambda authority: authority.issue_cert("other.example"),
}


@pytest.mark.parametrize("problem", BAD_CERTIFICATES)
def test_a_bad_certificate_is_refused(serve: Serve, make_client: MakeClient, authority: trustme.CA, problem: str) -> None:
    server = _tls_server(serve, BAD_CERTIFICATES[problem](authority))
    outcome = get(make_client(), f"https://localhost:{server.port}/", headers={"Authorization": "Bearer s3cret"})
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, f"TLS certificate is not accepted: {problem}")
    assert not server.requests


def test_a_self_signed_certificate_is_refused(over_tls: Serve, client: Client) -> None:
    server = over_tls(always(OK))
    outcome = get(client, f"https://localhost:{server.port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "TLS certificate is not accepted: it is self-signed")
    assert not server.requests


def test_a_certificate_for_another_address_is_refused(serve: Serve, make_client: MakeClient, authority: trustme.CA) -> None:
    server = _tls_server(serve, authority.issue_cert("localhost"))
    outcome = get(make_client(), f"https://127.0.0.1:{server.port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "TLS certificate is not accepted: it is for another address")


def test_no_tls_older_than_1_2(serve: Serve, make_client: MakeClient, authority: trustme.CA) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server = _tls_server(serve, authority.issue_cert("localhost"), newest=ssl.TLSVersion.TLSv1_1)
    outcome = get(make_client(), f"https://localhost:{server.port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "TLS failed")
    assert not server.requests


def test_a_server_without_tls(serve: Serve, client: Client) -> None:
    server = serve(lambda peer: peer.send(b"HTTP/1.1 400 Bad\r\n\r\n"))
    outcome = get(client, f"https://localhost:{server.port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "TLS failed")


def test_no_redirect_from_https_to_http(over_tls: Serve, serve: Serve, make_client: MakeClient) -> None:
    plain = serve(always(OK))
    server = over_tls(redirecting(302, f"{plain.url}/"))
    outcome = get(make_client(), f"https://localhost:{server.port}/")
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, "HTTP 302: redirect from https to http is not followed")
    assert not plain.requests
