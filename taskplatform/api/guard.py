"""What stands before the application: nothing that a client sends, or does not send, takes the process down or holds it up.

`Guard` bounds each request's body and how long it may take to come, and how many requests are answered at a time; it gives each an id,
answers what nobody foresaw, adds the headers that every answer has, counts, and writes one line for the log. In that line are no query,
no headers and no body.

`GuardedProtocol` bounds what the application never sees: a client that does not send its headers, or does not read its answer. Such a
connection is cut. uvicorn itself bounds only idle connections.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from taskplatform.api.metrics import Requests
from taskplatform.api.problem import Problem, request_id, unforeseen, with_status

log = logging.getLogger(__name__)

#: Requests that are answered at a time; most of them wait for a thread then.
MOST_REQUESTS = 200
MOST_CONNECTIONS = 1000
MOST_HEADER_BYTES = 16_384
#: Of a body that is too large so many times the limit is read and forgotten, so that the client hears why it is refused.
_FORGOTTEN = 4

_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)
_CLOSE = {"Connection": "close"}
#: A client has so many seconds to end its side of TLS too. One that holds a connection for later reads nothing and does not;
#: asyncio would wait half a minute for it, and so would the end of the process.
_LINGER = 1.0


class Guard:
    """An ASGI application around another. `timeout` is in seconds."""

    def __init__(self, app: Any, *, requests: Requests, max_body: int, timeout: float) -> None:
        self._app = app
        self._requests = requests
        self._max_body = max_body
        self._timeout = timeout
        self._in_flight = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["taskplatform.request_id"] = uuid.uuid4().hex
        answer = _Answer(scope, send)
        began = time.monotonic()
        self._in_flight += 1
        try:
            with self._requests.in_flight():
                await self._answer(scope, receive, answer)
        finally:
            self._in_flight -= 1
            taken = time.monotonic() - began
            self._requests.answered(scope, answer.status, taken)
            _log(scope, answer.status, taken)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Any, answer: _Answer) -> None:
        body = _Body(scope, receive, most=self._max_body, timeout=self._timeout)
        try:
            if self._in_flight > MOST_REQUESTS and scope["path"] != "/health":
                raise with_status(503, "too many requests at a time", headers={"Retry-After": "1"})
            _check_head(scope)
            await self._app(scope, body.receive, answer.send)
        except Problem as problem:
            await answer.refuse(problem)
        except Exception as fault:
            # where the application has answered already, as it does with what it did not foresee, its log has this too
            if not answer.started:
                await answer.refuse(unforeseen(fault, request_id(scope)))


def _check_head(scope: MutableMapping[str, Any]) -> None:
    """h11 bounds what it has to wait for, and not what comes at once."""
    size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"]) + len(scope["query_string"])
    if size > MOST_HEADER_BYTES:
        raise with_status(431, f"path, query and headers have more than {MOST_HEADER_BYTES} bytes", headers=_CLOSE)


class _Body:
    """What a client sends, up to a size and until a time. Nobody is read whom the application does not ask for more: who has no key."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Any, *, most: int, timeout: float) -> None:
        self._receive = receive
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        self._announced = int(lengths[0]) if lengths else 0
        self._most = most
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._size = 0
        self._complete = False

    async def receive(self) -> Any:
        """The next piece. Raises Problem: 413, 408."""
        if self._complete:
            return await self._receive()  # until the client goes
        if self._announced > self._most:  # it says so itself
            await self._forget()
            raise self._too_large
        left = self._deadline - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except TimeoutError:
            raise with_status(408, f"the request did not arrive within {self._timeout:g} s", headers=_CLOSE) from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body")
        if self._size > self._most:
            if message.get("more_body"):
                await self._forget()
            raise self._too_large
        return message

    async def _forget(self) -> None:
        """Who is still sending does not read."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.0, self._deadline - time.monotonic())):
                while self._size <= _FORGOTTEN * self._most:
                    message = await self._receive()
                    self._size += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return

    @property
    def _too_large(self) -> Problem:
        return with_status(413, f"the body is larger than {self._most} bytes", headers=_CLOSE)


class _Answer:
    """What is sent back."""

    def __init__(self, scope: MutableMapping[str, Any], send: Any) -> None:
        self._scope = scope
        self._send = send
        self.status = 499  # nobody waited for an answer
        self.started = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            given = list(message.get("headers", ()))
            # a page says itself what it may load
            own = [(name, value) for name, value in _HEADERS if name not in dict(given)]
            message["headers"] = [*given, *own, (b"x-request-id", request_id(self._scope).encode())]
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem, if nothing has been answered."""
        if not self.started:
            await problem.response(self._scope, None, self.send)  # type: ignore[arg-type] # a whole body needs nothing to be received


def _log(scope: MutableMapping[str, Any], status: int, taken: float) -> None:
    client = scope["client"][0] if scope.get("client") else "-"
    # as it was sent: h11 lets only printable ASCII pass
    path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")
    actor = scope.get("taskplatform.actor", "-")
    level = logging.WARNING if status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
    log.log(level, "%s %s %s %s %d %.0f ms %s", client, actor, scope["method"], path[:500], status, taken * 1000, request_id(scope))


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with a deadline for each request, from the first byte, or the connection, to the end of the answer."""

    timeout: float = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._extended = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        # so that `flow` tells whether anything waits to be read by the client
        transport.set_write_buffer_limits(high=1, low=0)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """It went."""
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It sent something."""
        if self._deadline is None:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """It was answered."""
        self._end_if_done()
        super().on_response_complete()
        self._abandon()
        if self._deadline is None and not self.cycle.response_complete:
            self._begin()  # the next one came together with the last

    def shutdown(self) -> None:
        """The server ends."""
        super().shutdown()
        self._abandon()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for a while."""
        super().timeout_keep_alive_handler()
        self._abandon()

    def resume_writing(self) -> None:
        """It has read all."""
        super().resume_writing()
        self._end_if_done()
        self._abandon()

    def send_400_response(self, msg: str) -> None:
        """It does not speak HTTP, or has too long headers."""
        problem = with_status(400, f"{msg} Headers may have {MOST_HEADER_BYTES} bytes.")
        headers = [(name.encode(), value.encode()) for name, value in (*problem.response.headers.items(), *_CLOSE.items())]
        try:
            for event in (
                h11.Response(status_code=400, headers=[*headers, *_HEADERS], reason=b"Bad Request"),
                h11.Data(data=problem.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # it is being answered already
        self.transport.close()

    def _begin(self) -> None:
        self._extended = False
        self._deadline = self.loop.call_later(self.timeout, self._cut)

    def _end_if_done(self) -> None:
        """Unless it has to read its answer, or still sends a body that nobody reads."""
        answered = self.cycle is not None and self.cycle.response_complete
        if answered and not self.flow.write_paused and self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.IDLE):
            self._end()

    def _abandon(self) -> None:
        """Once all is sent on a connection that is being closed, it is not waited for long."""
        if self._deadline is None and self.transport.is_closing():
            self._deadline = self.loop.call_later(_LINGER, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        """Once the headers are there, as long again is for the rest; what goes on beyond that is cut, whatever is still to be sent."""
        self._deadline = None
        waits = self.cycle is not None and not self.cycle.response_complete
        if waits and not self._extended:
            self._extended = True
            self._deadline = self.loop.call_later(self.timeout, self._cut)
            return
        log.info("%s: too slow, its connection is cut", self.client[0] if self.client else "-")
        self.transport.abort()
