"""Targets that misbehave, called by real workers with processes and with threads: each call ends in time, and its slot is free.

What each fault on the wire gives is in `tests/integration/test_http_client.py`; here it is what becomes of the job and of the worker.
"""

from __future__ import annotations

import gzip
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from taskplatform.model import JobState
from tests.acceptance.nodes import Guard
from tests.acceptance.site import Site, base_environment, running_site

DEADLINE_MS = 1000
TOO_LATE_MS = 15_000
"""More than a deadline, and much less than the servers would go on."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
BOMB = gzip.compress(b"\0" * 20_000_000)

#: What a target does, by the path that is called, and how the job must end.
ENDINGS = {
    "never_answers": (JobState.TIMED_OUT, "deadline of 1s exceeded"),
    "drips_headers": (JobState.TIMED_OUT, "deadline of 1s exceeded"),
    "drips_body": (JobState.TIMED_OUT, "deadline of 1s exceeded"),
    "floods_headers": (JobState.FAILED, "answer is not HTTP"),
    "floods_body": (JobState.COMPLETED, "HTTP 200"),
    "bomb": (JobState.COMPLETED, "HTTP 200"),
    "loop": (JobState.FAILED, "more than 5 redirects"),
    "reset": (JobState.FAILED, "connection reset"),
    "cut_off": (JobState.FAILED, "answer is cut off"),
}

REFUSALS = {
    "inside": "address 127.0.0.1 (loopback) of host 0x7f.1 is not allowed; http_allow can allow it",
    "to_inside": "redirect: address 127.0.0.1 (loopback) is not allowed; http_allow can allow it",
}

DEFINITIONS = """
defaults:
  timeout: 20s
  retries: 0
  max_duration: 1s
tasks:
  - &call
    id: hostile
    name: A call
    cron: "0 0 29 2 *"
    config: {endpoint: "${TARGET}/{{params.path}}"}
  - <<: *call
    id: hostile_tls
    config: {endpoint: "https://127.0.0.1:HOSTILE/"}
  - <<: *call
    id: inside
    retries: 3
    config: {endpoint: "http://0x7f.1:INSIDE/"}
  - <<: *call
    id: to_inside
    retries: 3
    config: {endpoint: "${TARGET}/to_inside"}
"""


class Hostile:
    """A listening socket, a thread for each connection, and a way to misbehave for each path."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._inside = socket.create_server(("127.0.0.1", 0))
        self.port, self.inside_port = (each.getsockname()[1] for each in (self._listener, self._inside))
        self._closed = threading.Event()
        self._both = threading.Barrier(2)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._both.abort()
        self._listener.close()
        self._inside.close()

    def inside_was_called(self) -> bool:
        self._inside.setblocking(False)
        with suppress(BlockingIOError):
            self._inside.accept()[0].close()
            return True
        return False

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, threading.BrokenBarrierError), connection:
            head = connection.recv(65_536)
            if not head.startswith(b"POST /"):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")  # to TLS
                return
            self._misbehave(connection, head.split()[1].decode().strip("/"))

    def _misbehave(self, connection: socket.socket, how: str) -> None:
        match how:
            case "never_answers":
                self._closed.wait()
            case "drips_headers":
                self._go_on(connection, b"HTTP/1.1 200 OK\r\nX-A: ", b"x", every=0.1)
            case "drips_body":
                self._go_on(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", every=0.1)
            case "floods_headers":
                self._go_on(connection, b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 100)
            case "floods_body":
                self._go_on(connection, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536)
            case "bomb":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB)
            case "loop":
                connection.sendall(b"HTTP/1.1 307 Again\r\nLocation: /loop\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            case "reset":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "cut_off":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
            case "to_inside":
                location = f"http://127.0.0.1:{self.inside_port}/".encode()
                connection.sendall(b"HTTP/1.1 307 Moved\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")
            case "both":
                self._both.wait()
                connection.sendall(OK)

    def _go_on(self, connection: socket.socket, data: bytes, rest: bytes, *, every: float = 0.0) -> None:
        connection.sendall(data)
        while not self._closed.wait(every):
            connection.sendall(rest)


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    made = Hostile()
    yield made
    made.close()


@pytest.fixture(scope="module")
def own_site(guard: Guard, hostile: Hostile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Its workers may call the hostile target, and nothing else that is here."""
    folder = tmp_path_factory.mktemp("definitions")
    text = DEFINITIONS.replace("HOSTILE", str(hostile.port)).replace("INSIDE", str(hostile.inside_port))
    (folder / "hostile.yaml").write_text(text)
    own = {"TASKPLATFORM_TASKS_DIR": str(folder), "TASKPLATFORM_HTTP_ALLOW": f"127.0.0.1:{hostile.port}"}
    environment = {**base_environment(f"http://127.0.0.1:{hostile.port}", guard.environment), **own}
    with running_site(tmp_path_factory.mktemp("site"), environment) as site:
        yield site


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_every_call_ends_in_time_and_leaves_its_slot(own_site: Site, hostile: Hostile, pool: str) -> None:
    site = own_site
    worker = site.worker("--pool", pool, "--concurrency", "2")
    worker.ready()
    user = site.user()

    def call(path: str) -> str:
        return site.platform.enqueue("hostile", user=user, params={"path": path}).id

    calls = {how: call(how) for how in ENDINGS}
    endings = {how: site.wait_for(job_id) for how, job_id in calls.items()}
    assert {how: (job.state, job.reason) for how, job in endings.items()} == ENDINGS
    for how, job in endings.items():
        detail = site.changes(job.id)[-1].detail
        timed_out = job.state is JobState.TIMED_OUT
        assert (DEADLINE_MS if timed_out else 0) <= detail["duration_ms"] < TOO_LATE_MS, how
        assert len(detail.get("excerpt", "")) <= 200
    assert site.changes(calls["bomb"])[-1].detail["excerpt"] == "[gzip]"

    broken = site.wait_for(site.platform.enqueue("hostile_tls", user=user).id)
    assert (broken.state, broken.reason) == (JobState.FAILED, "TLS failed")

    for definition, reason in REFUSALS.items():
        job = site.wait_for(site.platform.enqueue(definition, user=user).id)
        assert (job.state, job.reason, job.attempt) == (JobState.FAILED, reason, 1)
    assert not hostile.inside_was_called()

    # the answer comes only to two calls at a time
    after = [call("both"), call("both")]
    assert {job.state for job in site.wait_for_all(after)} == {JobState.COMPLETED}
    site.remove(worker)
