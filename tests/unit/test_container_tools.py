"""What containers run beside the roles: the probe, the forwarder, the preparation, the mock API's module."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from taskplatform import certs, forward, prepare, probe
from taskplatform.errors import Conflict
from taskplatform.local import find_port
from taskplatform.store.acl import DEFAULT_USER, Role, rules

DAY_MS = 86_400_000


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"path": self.path}).encode()
        self.send_response(503 if self.path == "/bad" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers 200 with the path, and 503 at /bad."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def _probe(*words: str, port: object = "") -> tuple[int, str]:
    environment = {**os.environ, "TASKPLATFORM_OPS_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-m", "taskplatform.probe", *words], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_probe_tells_well_from_not(server: ThreadingHTTPServer) -> None:
    port = server.server_address[1]
    assert _probe(port=port) == (0, '{"path": "/ready"}\n')
    assert _probe("--path", "/bad", port=port) == (1, '503: {"path": "/bad"}\n')
    assert _probe(f"http://127.0.0.1:{port}/else") == (0, '{"path": "/else"}\n')


def test_the_probe_says_what_is_wrong_with_a_call() -> None:
    code, text = _probe(f"http://127.0.0.1:{find_port()}/ready")
    assert code == 1
    assert "no answer" in text
    for port in ("", "0", "8092-8099"):
        code, text = _probe(port=port)
        assert code == 2
        assert "TASKPLATFORM_OPS_PORT" in text
    code, text = _probe("ftp://x/")
    assert code == 1
    assert "is expected" in text


def test_the_probe_imports_little() -> None:
    """It runs every few seconds for each container."""
    code = "import sys; before = set(sys.modules); import taskplatform.probe; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "celery", "redis", "requests", "http.client", "ssl", "click"} & set(loaded)


def test_the_probe_gives_up_on_who_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        probe.ask(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.1)


def test_the_probe_verifies_a_certificate(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    certs.make(tmp_path, hosts=["localhost"])
    certs.make(tmp_path / "other", hosts=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_address[1]}/ready"
    assert probe.ask(url, ca=str(tmp_path / "ca.crt")) == (200, '{"path": "/ready"}')
    with pytest.raises(ssl.SSLCertVerificationError):
        probe.ask(url, ca=str(tmp_path / "other/ca.crt"))


def test_the_forwarder_leads_each_port_to_its_own_target(server: ThreadingHTTPServer) -> None:
    there, nowhere = find_port(), 0
    nowhere = find_port(avoid={there})
    words = [f"{there}=localhost:{server.server_address[1]}", f"{nowhere}=no-such-host.invalid:1"]
    with subprocess.Popen([sys.executable, "-m", "taskplatform.forward", *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline().split()[1] for _ in words] == [str(there), str(nowhere)]
            for _ in range(3):
                assert requests.get(f"http://127.0.0.1:{there}/x", timeout=60).json() == {"path": "/x"}
            with pytest.raises(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{nowhere}/x", timeout=60)
            assert requests.get(f"http://127.0.0.1:{there}/x", timeout=60).ok  # it went on
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("word", ["", "8092", "8092=", "8092=x", "8092=x:", "x=y:1", "0=y:1", "8092=y:70000", "8092=:1", "²=y:1"])
def test_the_forwarder_says_what_it_takes(word: str) -> None:
    with pytest.raises(ValueError, match="is expected"):
        forward.parse([word])


def test_the_forwarder_takes_a_port_once() -> None:
    assert forward.parse(["1=a:2", "3=b:4"]) == {1: ("a", 2), 3: ("b", 4)}
    with pytest.raises(ValueError, match="twice"):
        forward.parse(["1=a:2", "1=b:2"])


PASSWORDS = {"REDIS_PASSWORD": "a" * 8, "REDIS_FLOWER_PASSWORD": "b-._~123", "REDIS_ADMIN_PASSWORD": "c" * 48}


def test_the_users_of_redis_have_the_rights_of_their_roles() -> None:
    lines = prepare.acl(PASSWORDS, namespace="ns").splitlines()
    digests = [hashlib.sha256(password.encode()).hexdigest() for password in PASSWORDS.values()]
    assert lines == [
        DEFAULT_USER,
        f"user platform on #{digests[0]} {rules(Role.PLATFORM, namespace='ns')}",
        f"user flower on #{digests[1]} {rules(Role.OBSERVER, namespace='ns')}",
        f"user admin on #{digests[2]} ~* &* +@all",
    ]


@pytest.mark.parametrize("password", ["", "short", "with space", "sla/sh-sla/sh", "p@ssword", "a:colon:b", "umlaut-ü-umlaut"])
def test_a_password_that_would_not_stand_in_a_url_is_refused(password: str) -> None:
    with pytest.raises(Conflict, match="REDIS_PASSWORD"):
        prepare.acl({**PASSWORDS, "REDIS_PASSWORD": password})


def test_the_certificate_is_made_anew_when_it_must_be(tmp_path: Path) -> None:
    authority, served = tmp_path / "pki", tmp_path / "tls"
    served.mkdir()
    hosts = [*certs.LOCAL_HOSTS, "api"]

    def now_ms(days: int) -> int:
        return certs.show(authority)[1].valid_from_ms + days * DAY_MS

    assert prepare.certificate(authority, served, hosts, now_ms=0) == ["ca", "server"]
    assert sorted(one.name for one in served.iterdir()) == ["ca.crt", "server.crt", "server.key"]
    assert (served / "server.key").stat().st_mode & 0o777 == 0o600
    first = (served / "server.crt").read_bytes()
    assert prepare.certificate(authority, served, hosts, now_ms=now_ms(300)) == []
    assert (served / "server.crt").read_bytes() == first
    assert prepare.certificate(authority, served, hosts, now_ms=now_ms(380)) == ["server"]
    second = (served / "server.crt").read_bytes()
    assert second != first
    assert prepare.certificate(authority, served, [*hosts, "tasks.example.com"], now_ms=now_ms(1)) == ["server"]
    assert (served / "server.crt").read_bytes() != second
    assert (served / "server.crt").read_bytes() == (authority / "server.crt").read_bytes()
