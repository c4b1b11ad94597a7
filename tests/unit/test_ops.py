"""The server of `/health`, `/ready` and `/metrics`: what it answers, and that nothing which calls it can hold it up."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from taskplatform import ops
from taskplatform.errors import SettingsError
from taskplatform.local import find_port
from taskplatform.ops import Check, OpsServer, Process
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings, load_settings
from tests.support import wait_until


class Seconds:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def pulse(clock: Seconds) -> Pulse:
    return Pulse("release", clock=clock)


@contextmanager
def serving(process: Process, port: str | None = None) -> Iterator[OpsServer]:
    server = OpsServer(process, Settings(ops_port=port or str(find_port())))
    server.start()
    try:
        wait_until(lambda: server.port)
        yield server
    finally:
        server.stop()


def a_process(pulse: Pulse, **more: Any) -> Process:
    return Process(role="worker", pulses=[pulse], patience=60, fresh=15, **more)


def get(server: OpsServer, path: str, **options: Any) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{server.port}{path}", timeout=60, **options)


def ask(server: OpsServer, path: str) -> tuple[int, str]:
    """The status, and what is wrong."""
    answer = get(server, path)
    content = answer.json()
    faults = [one["fault"] for one in content["checks"] if not one["ok"]]
    assert content["ok"] is not bool(faults)
    return answer.status_code, "; ".join(faults)


def test_health_is_progress_and_ready_is_success(pulse: Pulse, clock: Seconds) -> None:
    with serving(a_process(pulse)) as server:
        assert ask(server, "/health") == (200, "")
        assert ask(server, "/ready") == (503, "its loop release has not begun yet")
        pulse.succeeded()
        assert ask(server, "/ready") == (200, "")
        # without Redis it goes round, and fails
        pulse.failed("Redis cannot be reached")
        assert ask(server, "/health") == (200, "")
        assert ask(server, "/ready") == (503, "its loop release failed the last time: Redis cannot be reached")
        clock.now += 59
        pulse.failed("Redis cannot be reached")
        clock.now += 59
        assert ask(server, "/health") == (200, "")
        clock.now += 1.5
        assert ask(server, "/health") == (503, "its loop release stands still for 60.5 s, 60 s is the longest")
        pulse.step()
        assert ask(server, "/health") == (200, "")
        pulse.succeeded()
        clock.now += 16
        assert ask(server, "/ready") == (503, "its loop release has not succeeded for 16.0 s, 15 s is the longest")
        assert ask(server, "/health") == (200, "")


def test_a_process_that_stops_is_alive_and_not_ready(pulse: Pulse, clock: Seconds) -> None:
    pulse.succeeded()
    with serving(a_process(pulse, stopping=lambda: True)) as server:
        assert ask(server, "/ready") == (503, "it is about to end")
        clock.now += 100
        assert ask(server, "/health") == (200, "")


def test_what_a_role_needs_and_tells(pulse: Pulse) -> None:
    pulse.succeeded()
    looks_at = lambda: [Check("queues", "it serves no queue", {"queues": []})]  # noqa: E731
    with serving(a_process(pulse, looks_at=looks_at, facts=lambda: {"slots": 3})) as server:
        assert ask(server, "/ready") == (503, "it serves no queue")
        assert get(server, "/ready").json() == {
            "ok": False,
            "role": "worker",
            "slots": 3,
            "checks": [
                {"check": "stopping", "ok": True},
                {"check": "release", "ok": True, "success_age_seconds": 0.0, "limit_seconds": 15},
                {"check": "queues", "ok": False, "fault": "it serves no queue", "queues": []},
            ],
        }


def test_metrics_say_the_same(pulse: Pulse) -> None:
    pulse.failed("Redis cannot be reached")
    with serving(a_process(pulse)) as server:
        for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
            answer = get(server, "/metrics", headers={"Accept": accept})
            assert answer.headers["Content-Type"].startswith(accept.partition(";")[0])
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(answer.text)
                for sample in family.samples
            }
            assert (samples["taskplatform_live",], samples["taskplatform_ready",]) == (1, 0)
            assert samples["taskplatform_loop_rounds_total", "release"] == 1
            assert samples["process_resident_memory_bytes",] > 1e6


def test_other_requests(pulse: Pulse) -> None:
    with serving(a_process(pulse)) as server:
        assert get(server, "/health?a=1").status_code == 200
        answer = get(server, "/../etc/passwd")
        assert (answer.status_code, answer.json()) == (404, {"error": "there are /health, /ready and /metrics"})
        assert requests.post(f"http://127.0.0.1:{server.port}/health", data="x" * 1000, timeout=60).status_code == 501
        head = requests.head(f"http://127.0.0.1:{server.port}/health", timeout=60)
        assert (head.status_code, head.text) == (200, "")
        for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port or 0), 10) as one:
                with suppress(OSError):  # it may be cut as soon as the server has seen enough
                    one.sendall(garbage)
                    one.shutdown(socket.SHUT_WR)
                while True:
                    try:
                        if not one.recv(1000):
                            break
                    except ConnectionError:
                        break
        assert ask(server, "/health")[0] == 200


def test_a_look_that_breaks_is_an_answer_and_no_end(pulse: Pulse, caplog: pytest.LogCaptureFixture) -> None:
    def breaks() -> dict[str, object]:
        raise ValueError("broken")

    with serving(a_process(pulse, facts=breaks)) as server:
        answer = get(server, "/health")
        assert (answer.status_code, answer.json()) == (500, {"error": "broken"})
        assert get(server, "/metrics").status_code == 200
    assert "cannot answer '/health'" in caplog.text


def test_slow_clients_hold_up_nobody(pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_LONGEST_SECONDS", 1.0)
    with serving(a_process(pulse)) as server, ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port or 0), 10)) for _ in range(60)]
        for one in slow:
            _send(one, b"GET /hea")
        assert ask(server, "/health") == (200, "")
        # of these no more than so many were kept, and none for long
        wait_until(lambda: server._server is not None and not server._server._open, message="a slow client is still served")
        assert ask(server, "/health") == (200, "")


def _send(one: socket.socket, data: bytes) -> None:
    with suppress(ConnectionError):  # it was closed for a newer one
        one.sendall(data)


def test_a_port_that_is_taken_is_said_and_tried_again(
    pulse: Pulse, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_LISTEN_AGAIN_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = OpsServer(a_process(pulse), Settings(ops_port=str(port)))
        server.start()
        wait_until(lambda: "trying again" in caplog.text)
    wait_until(lambda: server.port == port)
    try:
        assert ask(server, "/health")[0] == 200
    finally:
        server.stop()
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1
    assert f"127.0.0.1:{port}: Address already in use" in said[0].getMessage()
    assert "TASKPLATFORM_OPS_PORT" in said[0].getMessage()


def test_the_first_free_port_of_a_range(pulse: Pulse) -> None:
    ports = _neighbours(3)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(a_process(pulse), f"{ports[0]} - {ports[-1]}")) for _ in ports]
        assert [server.port for server in servers] == ports


def _neighbours(count: int) -> list[int]:
    for _ in range(50):
        first = find_port()
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return list(range(first, first + count))
    raise AssertionError("no free ports side by side")


@pytest.mark.parametrize(("host", "fault"), [("203.0.113.7", "Cannot assign requested address"), ("a..b", "label empty or too long")])
def test_an_address_that_is_none_is_said(pulse: Pulse, caplog: pytest.LogCaptureFixture, host: str, fault: str) -> None:
    server = OpsServer(a_process(pulse), Settings(ops_port="8081", ops_host=host))
    server.start()
    wait_until(lambda: "serves no /health" in caplog.text)
    server.stop()
    assert f"{host}:8081: " in caplog.text
    assert fault in caplog.text


def test_without_a_port_there_is_no_thread(pulse: Pulse) -> None:
    server = OpsServer(a_process(pulse), Settings())
    server.start()
    assert server._thread is None
    server.stop()


def test_stopping_closes_the_port_at_once(pulse: Pulse) -> None:
    with serving(a_process(pulse)) as server:
        port = server.port
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=60)


@pytest.mark.parametrize(
    ("text", "ports"),
    [("0", []), ("8081", [8081]), ("8092-8094", [8092, 8093, 8094]), ("8092 - 8092", [8092]), ("65535", [65535])],
)
def test_ports_of_the_setting(text: str, ports: list[int]) -> None:
    assert list(Settings(ops_port=text).ops_ports) == ports


@pytest.mark.parametrize("text", ["65536", "-1", "8094-8092", "80-", "-80", "0-10", "1-2000", "http", "8080,8081", "1-2-3", "²"])
def test_what_is_no_port_is_told(text: str) -> None:
    with pytest.raises(SettingsError, match=r"ops_port.*it takes a port, a range of at most 1000 such as 8092-8099, or 0 for none"):
        load_settings(ops_port=text)


def test_answers_are_json_lines(pulse: Pulse) -> None:
    with serving(a_process(pulse)) as server:
        text = get(server, "/health").text
    assert text.endswith("}\n")
    assert json.loads(text)["role"] == "worker"
