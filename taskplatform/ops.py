"""`/health`, `/ready` and `/metrics` of one process, over HTTP on a port of its own.

- `/health` (liveness): each loop of the process gets on. 503 means that starting the process anew may help. While Redis is away
  loops go round and find it away, so that is no reason.
- `/ready`: the process can do its work: its loops succeed, and what its role asks for is so. 503 passes by itself, or the process stops.
- `/metrics`: for Prometheus, see `metrics`.

Nothing here can end the process or hold it up: it is served by threads that end with it, few at a time and each for a bounded time. A
port that is taken is said in the log, and tried again. Processes of a pool do not keep the port open.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from weakref import WeakSet

from prometheus_client import disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector as ResourceCollector
from prometheus_client.registry import Collector, CollectorRegistry

from taskplatform.metrics import ProcessCollector
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings

log = logging.getLogger(__name__)

#: More connections than this are not served at a time: the oldest is closed for the newest.
_MOST_CONNECTIONS = 16
#: A connection is closed after so many seconds, however slow its other end is; a request comes within fewer.
_LONGEST_SECONDS = 10.0
_REQUEST_SECONDS = 5.0
#: A port that is taken is tried again after so many seconds.
_LISTEN_AGAIN_SECONDS = 5.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    fault: str
    """What is wrong; "" where it is as it should be."""
    found: Mapping[str, object]
    """What was seen, for the answer."""

    @property
    def answer(self) -> dict[str, object]:
        """As JSON."""
        return {"check": self.name, "ok": not self.fault, **({"fault": self.fault} if self.fault else {}), **self.found}


@dataclass(frozen=True, kw_only=True)
class Process:
    """How a process is judged.

    Each of the `pulses` must get on within `patience` seconds (liveness), and must have succeeded the last time, not longer than `fresh`
    seconds ago (readiness). `looks_at` gives what else is needed for readiness, `facts` what else is told. A process that is `stopping`
    is alive, because its end is bounded, and not ready. `before` is called before each look.
    """

    role: str
    pulses: Sequence[Pulse]
    patience: float
    fresh: float
    looks_at: Callable[[], Iterable[Check]] = lambda: ()
    facts: Callable[[], Mapping[str, object]] = dict
    stopping: Callable[[], bool] = lambda: False
    before: Callable[[], None] = lambda: None
    metrics: Callable[[], Iterable[Metric]] = lambda: ()

    def liveness(self) -> list[Check]:
        """For `/health`."""
        self.before()
        return [self._gets_on(pulse) for pulse in self.pulses]

    def readiness(self) -> list[Check]:
        """For `/ready`."""
        self.before()
        stopping = Check("stopping", "it is about to end", {}) if self.stopping() else Check("stopping", "", {})
        return [stopping, *map(self._succeeds, self.pulses), *self.looks_at()]

    def collector(self) -> Collector:
        """What it tells of itself in metrics."""
        return ProcessCollector(
            self.role,
            self.pulses,
            live=lambda: not any(one.fault for one in self.liveness()),
            ready=lambda: not any(one.fault for one in self.readiness()),
            more=self.metrics,
        )

    def _gets_on(self, pulse: Pulse) -> Check:
        age = pulse.age_seconds
        late = age > self.patience and not self.stopping()
        fault = f"its loop {pulse.name} stands still for {age:.1f} s, {self.patience:g} s is the longest" if late else ""
        return Check(pulse.name, fault, {"age_seconds": round(age, 3), "limit_seconds": self.patience, "rounds": pulse.rounds})

    def _succeeds(self, pulse: Pulse) -> Check:
        age = pulse.success_age_seconds
        fault = pulse.fault and f"its loop {pulse.name} failed the last time: {pulse.fault}"
        if not fault and age is None:
            fault = f"its loop {pulse.name} has not begun yet"
        elif not fault and age is not None and age > self.fresh:
            fault = f"its loop {pulse.name} has not succeeded for {age:.1f} s, {self.fresh:g} s is the longest"
        return Check(pulse.name, fault, {"success_age_seconds": None if age is None else round(age, 3), "limit_seconds": self.fresh})


class OpsServer:
    """Serves one process. With port 0 in the settings it does nothing."""

    def __init__(self, process: Process, settings: Settings, *, collectors: Iterable[Collector] = ()) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._process = process
        self._host = settings.ops_host
        self._ports = settings.ops_ports
        self.registry = CollectorRegistry()
        """Of all that `/metrics` tells."""
        self.registry.register(process.collector())
        self.registry.register(ResourceCollector(registry=None))
        for collector in collectors:
            self.registry.register(collector)
        self._stopped = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port: int | None = None
        """Where it listens, once it does."""

    def start(self) -> None:
        """Listen from soon on. Never raises."""
        if self._ports:
            self._thread = threading.Thread(target=self._run, name="platform-ops", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(2 * _POLL_SECONDS + 1)

    def _run(self) -> None:
        said = False
        while not self._stopped.is_set():
            try:
                self._server = server = self._listen()
            except OSError as fault:
                if not said:
                    log.error(
                        "this process serves no /health, /ready and /metrics: %s; trying again. "
                        "Set TASKPLATFORM_OPS_PORT to a free port, or to a range for all processes of a machine, such as 8092-8099",
                        fault,
                    )
                    said = True
                self._stopped.wait(_LISTEN_AGAIN_SECONDS)
                continue
            said = False
            log.info("/health, /ready and /metrics on http://%s:%d", self._host, self.port)
            try:
                # not `serve_forever`: who ends it waits for ever if it has not begun
                while not self._stopped.is_set():
                    server.handle_request()
                    server.service_actions()
            except Exception:
                log.exception("the server of /health, /ready and /metrics failed; it is started again")
                self._stopped.wait(_LISTEN_AGAIN_SECONDS)
            finally:
                self._server = self.port = None
                server.server_close()

    def _listen(self) -> _Server:
        faults = []
        for port in self._ports:
            try:
                server = _Server((self._host, port), partial(_Handler, ops=self))
            except (OSError, UnicodeError) as fault:  # the latter of a host whose name is none
                faults.append(f"{self._host}:{port}: {getattr(fault, 'strerror', None) or fault}")
            else:
                self.port = server.server_address[1]
                return server
        raise OSError("; ".join(faults if len(faults) < 3 else [faults[0], "…", faults[-1]]))

    # answers

    def answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body for a path."""
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return HTTPStatus.OK, kind, encode(self.registry)
        if path in ("/health", "/ready"):
            process = self._process
            checks = process.liveness() if path == "/health" else process.readiness()
            good = not any(one.fault for one in checks)
            body = {"ok": good, "role": process.role, **process.facts(), "checks": [one.answer for one in checks]}
            return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, "application/json", _json(body)
        return HTTPStatus.NOT_FOUND, "application/json", _json({"error": "there are /health, /ready and /metrics"})


def _json(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, default=str).encode() + b"\n"


# --- HTTP ------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    timeout = _POLL_SECONDS
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)
        _servers.add(self)

    def server_bind(self) -> None:
        # http.server's also asks DNS for the name of the address, which may take long
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_POLL_SECONDS)  # such as no more files: the connection would be asked for again and again
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = time.monotonic()
            if len(self._open) > _MOST_CONNECTIONS:
                _cut(next(iter(self._open)))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        now = time.monotonic()
        with self._lock:
            for request, since in self._open.items():
                if now - since > _LONGEST_SECONDS:
                    _cut(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("a request for /health, /ready or /metrics broke off", exc_info=True)

    def forget_in_child(self) -> None:
        """After a fork: what the parent listens on and serves is none of the child's."""
        for one in (self.socket, *self._open):
            with suppress(OSError):
                os.close(one.detach())


def _cut(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_SECONDS
    server_version = "taskplatform"
    sys_version = ""

    def __init__(self, *args: Any, ops: OpsServer) -> None:
        self._ops = ops
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer."""
        try:
            status, kind, body = self._ops.answer(self.path.partition("?")[0], self.headers.get("Accept", ""))
        except Exception as fault:
            log.exception("cannot answer %.100r", self.path)
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", _json({"error": str(fault)})
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, format: str, *args: Any) -> None:
        """Not for people: a line each few seconds from each prober."""
        log.debug(format, *args)


_servers: WeakSet[_Server] = WeakSet()


def _forget_all() -> None:
    for server in tuple(_servers):
        server.forget_in_child()


os.register_at_fork(after_in_child=_forget_all)
