"""The HTTP server that the verification's jobs call: it judges when calls really arrived. Answers nothing but 200, 404 and 411."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from taskplatform.drills import CALL_PATH

#: More calls than a verification makes are not kept, whoever makes them.
_MOST_CALLS = 10_000
_MOST_BODY = 4096


class Target:
    """For `with`. It listens where jobs have to call it; raises OSError when that cannot be."""

    def __init__(self, host: str, port: int) -> None:
        self._calls: list[tuple[float, str]] = []
        self._lock = threading.Lock()
        self._server = _Server((host, port), self)

    def __enter__(self) -> Target:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="verify-target", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def take(self, job: str) -> None:
        """Note a call that arrived just now."""
        with self._lock:
            if len(self._calls) < _MOST_CALLS:
                self._calls.append((time.monotonic() * 1000, job))

    def calls(self, jobs: set[str]) -> list[tuple[float, str]]:
        """(when, in ms of a clock that nobody sets, job) of the calls of these jobs, in the order of arrival."""
        with self._lock:
            return [call for call in self._calls if call[1] in jobs]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], target: Target) -> None:
        self.target = target
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that goes away is no matter for a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: _Server

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MOST_BODY:
            self.close_connection = True
            self._answer(411)
            return
        if self.path == CALL_PATH:
            # when it arrived, not when its body was read
            self.server.target.take(self.headers.get("Idempotency-Key", ""))
        self.rfile.read(int(length))
        self._answer(200 if self.path == CALL_PATH else 404)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """What came is in `calls`."""
