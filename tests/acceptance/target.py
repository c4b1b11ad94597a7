"""The API that the jobs call. It logs every request, and so it is the judge of what really ran, when and how often."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support import wait_until


@dataclass(frozen=True)
class Answer:
    """What a request gets: `after_seconds`, and not before `until` is set. With `hang` it gets nothing, until the target closes."""

    status: int = 200
    body: str = "done"
    headers: Mapping[str, str] = field(default_factory=dict)
    after_seconds: float = 0.0
    hang: bool = False
    until: threading.Event | None = None


@dataclass(frozen=True)
class Call:
    """A request as it arrived, and when it ended."""

    at_ms: int
    at_seconds: float
    """The same by a clock that nobody sets, for spans."""
    method: str
    path: str
    headers: Mapping[str, str]
    body: str
    caller: socket.socket | None = field(default=None, repr=False, compare=False)
    beside: tuple[Call, ...] = field(default=(), repr=False, compare=False)
    """Calls of the same job whose callers still waited for their answers when this one came."""
    answered: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set when the answer was sent to a caller that was still there."""
    number: int = 0
    """The how manieth it is."""
    ended_seconds: float | None = None
    """Just before the answer was sent, or when the caller was found to be gone, by the same clock; None while neither is."""

    @property
    def job(self) -> str:
        return self.headers.get("X-Job-ID", "")

    @property
    def user(self) -> str:
        return self.headers.get("X-User-ID", "")

    @property
    def key(self) -> str:
        return self.headers.get("Idempotency-Key", "")


class Target:
    """An HTTP server on the loopback interface, for `with`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._ended: dict[int, int] = {}
        self._answers: dict[str, list[Answer]] = {}
        self._open: dict[str, list[Call]] = {}
        self._closed = threading.Event()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Target:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="target", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, user: str, *answers: Answer) -> None:
        """What the user's requests get in turn; the last answer is for all that follow. Without this it is a plain 200."""
        with self._lock:
            self._answers[user] = list(answers)

    def calls(self, *, user: str | None = None, job: str | None = None) -> list[Call]:
        """In the order of arrival."""
        with self._lock:
            return [call for call in self._calls if user in (None, call.user) and job in (None, call.job)]

    def ended_ms(self, call: Call) -> int | None:
        """When the answer to a call was about to be sent, or the caller was found to be gone. None: not yet."""
        with self._lock:
            return self._ended.get(call.number)

    def end(self, call: Call, at_ms: int, at_seconds: float) -> None:
        """Log that a call was over then."""
        with self._lock:
            self._ended[call.number] = at_ms
            self._calls[call.number] = replace(call, ended_seconds=at_seconds)

    @contextmanager
    def together(self, user: str, count: int) -> Iterator[None]:
        """The user's requests get their answers when the block has ended and so many have come: they must run at the same time."""
        all_here = threading.Event()
        self.answer(user, Answer(until=all_here))
        try:
            yield
            wait_until(lambda: len(self.calls(user=user)) >= count, message=f"{count} calls do not run at the same time")
        finally:
            all_here.set()

    def take(self, call: Call) -> tuple[Call, Answer | None]:
        """Log a request and choose its answer. Returns when it is to be sent; None when the caller has gone before."""
        with self._lock:
            opened = self._open.setdefault(call.job, [])
            # by the sockets, now: the threads of earlier calls may not have seen yet that theirs were closed
            beside = tuple(other for other in opened if call.job and not _has_gone(other))
            call = replace(call, beside=beside, number=len(self._calls))
            self._calls.append(call)
            opened.append(call)
            answers = self._answers.get(call.user, [Answer()])
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        stays = self._wait(call, answer)
        with self._lock:
            opened[:] = [other for other in opened if other is not call]
            if stays and not answer.hang:
                call.answered.set()
        return call, answer if stays else None

    def _wait(self, call: Call, answer: Answer) -> bool:
        end = math.inf if answer.hang else time.monotonic() + answer.after_seconds
        while not self._closed.is_set():
            rest = min(0.2, end - time.monotonic())
            if rest <= 0:
                if answer.until is None or answer.until.is_set():
                    break
                rest = 0.02
            if call.caller is not None and select.select([call.caller], [], [], rest)[0] and _has_gone(call):
                return False
        return not _has_gone(call)


def _has_gone(call: Call) -> bool:
    """Whether the caller has closed its connection."""
    if call.caller is None:
        return False
    try:
        return call.caller.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, target: Target) -> None:
        self.target = target
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers that are killed in the midst of a request belong to the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        at_ms, at_seconds = time.time_ns() // 1_000_000, time.monotonic()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        arrived = Call(at_ms, at_seconds, self.command, self.path, dict(self.headers.items()), body, self.connection)
        call, answer = self.server.target.take(arrived)
        # before the caller can have it: else the next call could come before this thread has looked at the clock
        at_ms, at_seconds = time.time_ns() // 1_000_000, time.monotonic()
        try:
            self._answer(answer)
        finally:
            self.server.target.end(call, at_ms, at_seconds)

    def _answer(self, answer: Answer | None) -> None:
        if answer is None or answer.hang:
            self.close_connection = True
            return
        content = answer.body.encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _handle  # noqa: N815 - the names are the base class's

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `calls`."""
