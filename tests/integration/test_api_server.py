"""The API's server against clients that are too large, too slow, or unknown; without Redis; and how it starts and ends."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import requests

from taskplatform.api import guard
from taskplatform.api.server import tls_context
from taskplatform.errors import SettingsError
from taskplatform.keys import new_token
from taskplatform.local import EmbeddedServer, embedded_server, find_port
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from taskplatform.store.acl import Role, rules
from tests.conftest import ROOT
from tests.integration.apiserver import KEY, TASKS, Api, certificates, running_api
from tests.support import wait_until

MAX_BODY = 4096
AUTHORIZATION = f"Authorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url, api_max_body=MAX_BODY) as api:
        yield api


@pytest.fixture(scope="module")
def impatient(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """It waits for nobody for long: for tests in which the client itself cannot be too slow."""
    with running_api(tmp_path_factory.mktemp("impatient"), server.url, send_buffer=4096, api_timeout="1500ms") as api:
        yield api


@pytest.fixture
def api(served: Api, client: redis.Redis) -> Api:
    served.platform.publish_missing()
    served.platform.create_user("u1")
    return served


def read_all(connection: ssl.SSLSocket) -> bytes:
    """Until the other end closes; a connection that is cut may say so in any way."""
    found = b""
    try:
        while data := connection.recv(65_536):
            found += data
    except (ConnectionError, ssl.SSLError):
        pass
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def problem_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    found: dict[str, Any] = json.loads(body)
    assert found["status"] == status_of(answer)
    return found


# --- sizes -----------------------------------------------------------------------------------------------------------


def body_of(size: int) -> bytes:
    """A submission of just so many bytes."""
    text = json.dumps({"definition": "sync", "user": "u1", "params": {"x": ""}})
    return text.replace('""', '"' + "y" * (size - len(text)) + '"').encode()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, 201), (MAX_BODY + 1, 413), (3 * MAX_BODY, 413)])
def test_a_body_has_a_most(api: Api, size: int, status: int, chunked: bool) -> None:
    body = body_of(size)
    pieces = (body[place : place + 1000] for place in range(0, size, 1000))
    answer = api.raw("POST", "/v1/jobs", data=pieces if chunked else body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["detail"] == f"the body is larger than {MAX_BODY} bytes"
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_without_end_is_cut(api: Api) -> None:
    with api.connect() as connection:
        connection.sendall(f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\n{AUTHORIZATION}Transfer-Encoding: chunked\r\n\r\n".encode())

        def pour() -> None:
            for _ in range(25_000):
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")

        with pytest.raises(OSError):  # noqa: PT011 - reset, closed or broken: each is the end of it
            pour()
    assert api("GET", "/health") == {"status": "ok"}


def test_a_body_that_nobody_asked_for_is_bounded_too(api: Api) -> None:
    """Also without a key, and where no body is taken."""
    for path, headers, status in (("/health", None, 200), ("/v1/users", None, 401), ("/v1/users", f"Bearer {KEY}", 413)):
        answer = api.raw("GET", path, data=b"x" * (MAX_BODY + 1), headers={"Authorization": headers})
        assert answer.status_code == status


def test_nobody_is_read_who_has_no_key(api: Api) -> None:
    """The answer comes before the body, of which not a byte is waited for, however large it says that it is."""
    for length in (MAX_BODY, 1_000_000_000):
        with api.connect() as connection:
            connection.sendall(f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode())
            assert status_of(connection.recv(65_536)) == 401


@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\r\nHost: a\r\nX: " + "y" * 20_000 + "\r\n\r\n",
        "GET /health?" + "y" * 20_000 + " HTTP/1.1\r\nHost: a\r\n\r\n",
        "NONSENSE\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        "GET /health HTTP/1.1\r\n\r\n",
        "GET /he\x00alth HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
        "\r\n\r\n\x16\x03\x01",
    ],
)
def test_what_is_no_http_is_a_problem_and_the_end(api: Api, head: str) -> None:
    with api.connect() as connection:
        connection.sendall(head.encode())
        answer = read_all(connection)
    assert status_of(answer) in (400, 431)
    assert problem_of(answer)["detail"]
    assert api("GET", "/health") == {"status": "ok"}


# --- slowness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["", "GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_a_client_that_does_not_send_its_headers_is_cut(impatient: Api, said: str) -> None:
    with impatient.connect() as connection:
        connection.sendall(said.encode())
        assert read_all(connection) == b""


def test_a_client_that_drips_its_headers_is_cut(impatient: Api) -> None:
    with impatient.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: ")
        closed = threading.Event()

        def drip() -> None:
            try:
                while not closed.wait(0.05):
                    connection.sendall(b"y")
            except OSError:
                pass

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert read_all(connection) == b""
        finally:
            closed.set()
            thread.join()


def test_a_body_that_does_not_come_is_a_problem(impatient: Api) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: a\r\n{AUTHORIZATION}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"

    def asked() -> bytes:
        with impatient.connect() as connection, suppress(OSError):  # it is cut if it is held up before it has sent this
            connection.sendall(head.encode() + b'{"user"')
            return read_all(connection)
        return b""

    answer = wait_until(asked)
    assert "did not arrive within 1.5 s" in problem_of(answer)["detail"]
    assert status_of(answer) == 408


def test_a_client_that_does_not_read_its_answer_is_cut(impatient: Api, client: redis.Redis) -> None:
    api = impatient
    api.platform.create_users([f"{number:03}{'x' * 120}" for number in range(500)])
    request = f"GET /v1/users?limit=500 HTTP/1.1\r\nHost: a\r\n{AUTHORIZATION}\r\n".encode()
    host, port = api.url.removeprefix("https://").split(":")
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect((host, int(port)))
    with ssl.create_default_context(cafile=api.ca).wrap_socket(plain, server_hostname=host) as connection:
        place = connection.getsockname()
        # asyncio holds some 64 KB back without telling; more than that is seen
        connection.sendall(3 * request)

        def held() -> bool:
            return any(cast("Any", one).client == place for one in list(api.server.server_state.connections))

        wait_until(held)
        wait_until(lambda: not held(), seconds=60, message="it is still held")


def test_a_quick_client_keeps_its_connection(api: Api) -> None:
    with api.connect() as connection:
        for _ in range(20):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            assert status_of(answer) == 200
        # two at once, and the second is answered too
        connection.sendall(2 * b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while answer.count(b'{"status":"ok"}') < 2:
            answer += connection.recv(65_536)


def test_no_more_are_answered_at_a_time_than_can_be(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_REQUESTS", 0)
    answer = api.raw("GET", "/v1/users")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["detail"] == "too many requests at a time"
    assert api("GET", "/health") == {"status": "ok"}


def test_no_more_connections_are_held_than_can_be(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.session.close()
    wait_until(lambda: not api.server.server_state.connections)
    monkeypatch.setattr(guard, "MOST_CONNECTIONS", 0)
    with pytest.raises(requests.ConnectionError):
        api.raw("GET", "/health")
    monkeypatch.undo()
    assert api("GET", "/health") == {"status": "ok"}


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_path_or_a_method_that_is_not_there(api: Api) -> None:
    for path in ("/", "/v1", "/v1/", "/v1/jobs/", "/v2/jobs", "/docs", "/openapi.json", "/v1/jobs/a/b/c"):
        answer = api.raw("GET", path)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json"), path
    for method, path, allowed in (
        ("DELETE", "/v1/jobs", "GET, POST"),
        ("POST", "/v1/jobs/sync:u1:m0", "GET"),
        ("HEAD", "/health", "GET"),
        ("PROPFIND", "/v1/users/u1", "DELETE, GET"),
        ("GET", "/v1/users/u1/pause", "POST"),
    ):
        answer = api.raw(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), f"{method} {path}"
        assert answer.headers["content-type"] == "application/problem+json"


def test_every_answer_has_the_same_headers(api: Api) -> None:
    for path, status in (("/health", 200), ("/v1/users", 200), ("/nothing", 404), ("/v1/jobs/a", 404)):
        answer = api.raw("GET", path)
        assert answer.status_code == status
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert "server" not in answer.headers


def test_a_fault_tells_nothing_but_an_id_that_the_log_has(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Platform) -> None:
        raise ZeroDivisionError("planted-secret")

    monkeypatch.setattr(Platform, "workers", broken)
    answer = api.raw("GET", "/v1/nodes")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    found = answer.json()
    id_ = found["instance"].removeprefix("urn:taskplatform:request:")
    assert id_ == answer.headers["x-request-id"]
    assert "planted" not in answer.text
    assert "Error" not in found["detail"]
    (line,) = [record for record in caplog.records if record.exc_info and id_ in record.getMessage()]
    assert "planted-secret" in str(line.exc_info)


def test_a_line_of_the_log_has_no_secret(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "taskplatform.api")
    answer = api.raw("GET", "/v1/jobs%0D%0Aforged?token=planted-query", headers={"Cookie": "planted-cookie"})
    api.raw("GET", "/v1/users?limit=1")
    wait_until(lambda: "/v1/users" in caplog.text)
    assert "planted" not in caplog.text
    assert KEY not in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if answer.headers["x-request-id"] in record.getMessage()]
    assert re.fullmatch(rf"127\.0\.0\.1 bootstrap GET /v1/jobs%0D%0Aforged 404 \d+ ms {answer.headers['x-request-id']}", line)
    assert re.search(r"127\.0\.0\.1 bootstrap GET /v1/users 200 \d+ ms", caplog.text)


# --- without Redis ---------------------------------------------------------------------------------------------------


def test_without_redis_it_says_so_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    with embedded_server(tmp_path / "first") as first:
        port = int(first.url.rpartition(":")[2].partition("/")[0])
        with running_api(tmp_path / "api", first.url) as api:
            api.platform.publish_missing()
            api("GET", "/v1/users")
            found = api.raw("GET", "/ready")
            assert (found.status_code, found.json()) == (503, {"ready": False, "redis": True, "leader": False, "workers": 0})
            api.platform.store.planner_tick(planned=0)
            wait_until(lambda: api.raw("GET", "/ready").status_code == 200)
            first.stop()
            answer = api.raw("GET", "/v1/users")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
            assert (answer.headers["content-type"], answer.json()["outage"]) == ("application/problem+json", "unreachable")
            answer = api.raw("POST", "/v1/users", {"id": "u1"}, headers={"Idempotency-Key": "k"})
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
            wait_until(lambda: api.raw("GET", "/ready").json() == {"ready": False, "redis": False, "leader": None, "workers": None})
            assert "taskplatform_figures_read 0.0" in api.raw("GET", "/metrics").text
            assert api("GET", "/health") == {"status": "ok"}
            with embedded_server(tmp_path / "second", port=port):
                wait_until(lambda: api.raw("GET", "/v1/users").status_code == 200)


def test_the_rights_that_the_platform_has_at_redis_are_enough(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    acl = cast("Any", client).execute_command
    acl("ACL", "SETUSER", "platform", "reset", "on", ">a-password", *rules(Role.PLATFORM).split())
    acl("ACL", "LOG", "RESET")
    (tmp_path / "api").mkdir()
    try:
        with running_api(tmp_path / "api", server.url.replace("//", "//platform:a-password@")) as api:
            api.platform.publish_missing()
            headers = {**api.key("admin"), "Idempotency-Key": "k"}
            api("POST", "/v1/users", {"id": "u1"}, status=201, headers=headers)
            assert api.raw("POST", "/v1/users", {"id": "u1"}, headers=headers).headers["idempotent-replayed"] == "true"
            del headers["Idempotency-Key"]
            job = api("POST", "/v1/jobs", {"definition": "sync", "user": "u1"}, status=201, headers=headers)["id"]
            api("PUT", "/v1/users/u1/subscriptions/sync", {}, headers=headers)
            for method, path, body in (
                ("POST", f"/v1/jobs/{job}/cancel", None),
                ("PUT", "/v1/limits/total", {"rate": "5/s"}),
                ("POST", "/v1/breakers/api.example/open", {"span": "1m"}),
                ("POST", "/v1/breakers/api.example/reset", None),
                ("POST", "/v1/definitions/sync/pause", {}),
                ("DELETE", "/v1/users/u1", None),
                ("DELETE", "/v1/garbage", None),
            ):
                api(method, path, body, headers=headers)
            for path, methods in api("GET", "/v1/openapi.json")["paths"].items():
                if "get" in methods and "{" not in path and path != "/ready":
                    api.raw("GET", path, headers=headers).raise_for_status()
            for _ in range(12):
                assert api.raw("GET", "/metrics", headers={"Authorization": "Bearer wrong"}).status_code in (401, 429)
            api.platform.store.access.rotate_key("admin", overlap=timedelta(), actor="test", log_size=1000)
            api.platform.store.access.revoke_key("admin", actor="test", log_size=1000)
            assert len(api.platform.store.access.audit()) > 10
            assert len(api.platform.store.access.list_keys()) == 2
        # redis-py says who it is, and does without where it may not
        assert {one["object"] for one in acl("ACL", "LOG")} <= {"client|setinfo"}
    finally:
        acl("ACL", "DELUSER", "platform")


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_old_tls_and_plain_http_are_not_spoken(api: Api) -> None:
    host, port = api.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=api.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as connection:
        assert connection.version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError), socket.create_connection((host, int(port))) as plain:
        context.wrap_socket(plain, server_hostname=host)
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP/1.1 200" not in plain.recv(1000)


def test_client_certificates(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "api").mkdir()
    ca, _ = certificates(tmp_path / "clients")
    ca.issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "client.pem"))
    with running_api(tmp_path / "api", server.url, api_tls_client_ca=str(tmp_path / "clients" / "ca.pem")) as api:
        with pytest.raises(requests.ConnectionError):
            api.raw("GET", "/health")
        api.session.cert = str(tmp_path / "client.pem")
        assert api("GET", "/health") == {"status": "ok"}
        assert api.raw("GET", "/v1/users", headers={"Authorization": None}).status_code == 401


@pytest.mark.parametrize(
    ("given", "insecure", "says"),
    [
        ({}, False, "api_tls_cert and api_tls_key: not set, and the API speaks TLS"),
        ({"api_tls_cert": "cert.pem"}, False, "api_tls_key: not set"),
        ({"api_tls_cert": "cert.pem", "api_tls_key": "nothing.pem"}, False, "nothing.pem cannot be read: No such file"),
        ({"api_tls_cert": "cert.pem", "api_tls_key": "ca.pem"}, False, "cannot be used"),
        ({"api_tls_cert": "key.pem", "api_tls_key": "key.pem"}, False, "cannot be used"),
        ({"api_tls_cert": "cert.pem", "api_tls_key": "key.pem", "api_tls_client_ca": "key.pem"}, False, "api_tls_client_ca"),
        ({"api_tls_cert": "cert.pem", "api_tls_key": "key.pem"}, True, "plain HTTP excludes"),
        ({"api_host": "0.0.0.0"}, True, "is no loopback address"),
        ({"api_host": "::"}, True, "is no loopback address"),
        ({"api_host": "example.com"}, True, "is no loopback address"),
    ],
)
def test_it_does_not_start_where_it_would_not_be_safe(tmp_path: Path, given: dict[str, str], insecure: bool, says: str) -> None:
    certificates(tmp_path)
    settings = load_settings(**{name: str(tmp_path / value) if "tls" in name else value for name, value in given.items()})
    with pytest.raises(SettingsError) as caught:
        tls_context(settings, insecure_http=insecure)
    assert says in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_plain_http_on_a_loopback_address(host: str) -> None:
    assert tls_context(load_settings(api_host=host), insecure_http=True) is None


def test_plain_http_elsewhere_where_it_is_wanted() -> None:
    assert tls_context(load_settings(api_host="0.0.0.0", api_insecure_http=True), insecure_http=False) is None


# --- as a process ----------------------------------------------------------------------------------------------------


@contextmanager
def started(folder: Path, *options: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "tasks.yaml").write_text(TASKS, encoding="utf-8")
    own = {f"TASKPLATFORM_{name.upper()}": value for name, value in {"api_key": KEY, "log_format": "console", **settings}.items()}
    command = [sys.executable, "-c", "import sys; from taskplatform.cli import main; sys.exit(main())", "api", "--port", "0", *options]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **own},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(server: EmbeddedServer, client: redis.Redis, tmp_path: Path, number: signal.Signals) -> None:
    _, tls = certificates(tmp_path)
    with started(tmp_path, redis_url=server.url, **tls) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if "listening on" in line:
                break
        found = re.search(r"listening on (https://\S+)", lines[-1])
        assert found is not None, lines
        with requests.Session() as session:
            session.trust_env = False
            session.verify = str(tmp_path / "ca.pem")
            session.headers["Authorization"] = f"Bearer {KEY}"
            wait_until(lambda: session.get(f"{found[1]}/v1/definitions").status_code == 200)
            token = new_token()[1]
            for secret in (KEY, token):
                session.get(f"{found[1]}/v1/users/{secret}?key={secret}", headers={"X-Key": secret})
            process.send_signal(number)
            # the session holds its connection, and says nothing: it is not waited for
            assert process.wait(60) == 0
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "exceeded" not in rest
        assert "GET /v1/definitions 200" in rest
        assert "GET /v1/users/*** " in rest
        assert "GET /v1/users/tpk_*** " in rest
        assert KEY not in rest
        assert token not in rest


def test_a_signal_ends_it_also_while_it_waits_for_redis(tmp_path: Path) -> None:
    _, tls = certificates(tmp_path)
    with started(tmp_path, redis_url=f"redis://127.0.0.1:{find_port()}/0", **tls) as process:
        assert process.stderr is not None
        assert "the start" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_it_says_as_much_as_the_settings_want(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    _, tls = certificates(tmp_path)
    port = find_port()
    with started(tmp_path, "--port", str(port), redis_url=server.url, log_level="WARNING", **tls) as process:
        with requests.Session() as session:
            session.trust_env = False
            session.verify = str(tmp_path / "ca.pem")

            def asked() -> int:
                with suppress(requests.ConnectionError):
                    return session.get(f"https://127.0.0.1:{port}/v1/users").status_code
                return 0

            assert wait_until(asked, seconds=60) == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_without_a_certificate_it_says_what_to_do(server: EmbeddedServer, tmp_path: Path) -> None:
    with started(tmp_path, redis_url=server.url) as process:
        assert process.wait(60) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.startswith("error: api_tls_cert and api_tls_key: not set, and the API speaks TLS. `taskplatform certs` makes")
    assert len(said.splitlines()) == 1
