"""The API that the jobs of a chaos run call: it is sometimes slow, fails or hangs up, by a seed, and it logs what it did."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.chaos.evidence import Call

#: Status and how many of a hundred calls get it; 0 hangs up. The rest get 200.
ANSWERS = ((500, 4), (429, 3), (0, 4))
#: Under this path nothing goes wrong.
STEADY = "/steady"


def now_ms() -> int:
    """By this machine's clock, which is the server's too."""
    return time.time_ns() // 1_000_000


class Target:
    """An HTTP server on the loopback interface, for `with`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._numbers: Counter[str] = Counter()
        self._calls: list[Call] = []
        self._under_way = 0
        self._server = _Server(self)
        self.port: int = self._server.server_port

    def __enter__(self) -> Target:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="target", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def calls(self) -> list[Call]:
        """Those that have ended."""
        with self._lock:
            return list(self._calls)

    @property
    def under_way(self) -> int:
        """Calls that have not ended."""
        with self._lock:
            return self._under_way

    def begin(self, job: str, path: str) -> tuple[float, int]:
        """How long the answer to this call takes, and its status: by the seed, the job and how often that called."""
        with self._lock:
            self._under_way += 1
            self._numbers[job] += 1
            rng = random.Random(f"{self._seed} {job} {self._numbers[job]}")
        seconds, lot = rng.uniform(0.01, 0.3), rng.randrange(100)
        for status, share in ANSWERS if not path.startswith(STEADY) else ():
            if lot < share:
                return seconds, status
            lot -= share
        return seconds, 200

    def end(self, call: Call) -> None:
        """Log it."""
        with self._lock:
            self._under_way -= 1
            self._calls.append(call)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, target: Target) -> None:
        self.target = target
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers that are killed in the midst of a request belong to the run."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        arrived_ms, job = now_ms(), self.headers.get("X-Job-ID", "")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seconds, status = self.server.target.begin(job, self.path)
        time.sleep(seconds)
        sent, ended_ms = False, 0
        try:
            if status:
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                # before the answer is out: the next run may come the moment after
                ended_ms = now_ms()
                self.wfile.write(b"{}")
                sent = True
            else:
                self.close_connection = True
        finally:
            call = Call(
                job, self.headers.get("Idempotency-Key", ""), self.headers.get("X-Node", ""), arrived_ms, ended_ms or now_ms(), status, sent
            )
            self.server.target.end(call)

    do_GET = do_POST = _handle  # noqa: N815 - the names are the base class's

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `calls`."""
