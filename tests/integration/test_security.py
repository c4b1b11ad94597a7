"""The gate before the API: a small application under a real uvicorn, with a real server, asked over raw sockets."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPResponse
from typing import Annotated, Any, cast

import pytest
import redis
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel

from taskplatform.api.problem import Problem
from taskplatform.api.security import OPEN_PATHS, install, note, requires, source_of
from taskplatform.catalogue import Catalogue
from taskplatform.errors import StoreUnavailable
from taskplatform.keys import ApiKey, Scope, new_token
from taskplatform.local import EmbeddedServer, embedded_server
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from taskplatform.store import Store
from taskplatform.store.connection import connect
from tests.support import wait_until

BOOTSTRAP = "bootstrap-secret-of-32-characters"
WRONG_KEYS = 5
Reader = Annotated[ApiKey, Depends(requires(Scope.READ))]
Submitter = Annotated[ApiKey, Depends(requires(Scope.SUBMIT))]


class Order(BaseModel):
    count: int


def application(platform: Platform) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(Problem)
    def say(request: Request, problem: Problem) -> JSONResponse:
        return JSONResponse({"title": problem.title, "detail": problem.detail}, problem.status, problem.headers)

    @app.get("/health")
    def health() -> str:
        return "well"

    @app.get("/who")
    def who(key: Reader) -> str:
        return key.name

    @app.post("/jobs/{job_id}/orders")
    def order(job_id: str, order: Order, request: Request, key: Submitter) -> int:
        note(request, made="o1")
        return order.count

    admin = APIRouter(prefix="/admin", dependencies=[Depends(requires(Scope.ADMIN))])

    @admin.delete("/{name}")
    def drop(name: str) -> str:
        if name == "bad":
            raise RuntimeError("on purpose")
        return name

    app.include_router(admin)
    install(app, platform)
    return app


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any
    """As JSON has it, where it is."""


@dataclass(frozen=True)
class Site:
    port: int
    store: Store

    def raw(self, request: bytes) -> Answer:
        """What is answered to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            response = HTTPResponse(connection)
            response.begin()
            body = response.read()
            is_json = "json" in response.headers.get("content-type", "")
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, headers, json.loads(body) if is_json else body)

    def ask(self, path: str, *headers: bytes, method: str = "GET", body: bytes = b"") -> Answer:
        lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
        if body:
            lines += [b"Content-Type: application/json", f"Content-Length: {len(body)}".encode()]
        return self.raw(b"\r\n".join([*lines, b"", body]))

    def make(self, *scopes: str, name: str = "ci", lifetime: timedelta | None = None) -> tuple[ApiKey, bytes]:
        """A key, and the header that shows it."""
        key, token = self.store.access.create_key(name, set(scopes), lifetime=lifetime, actor="test", log_size=1000)
        return key, bearer(token)

    def refusals(self) -> list[str]:
        """Why somebody was not let in, the oldest first."""
        return [entry.about for entry in reversed(self.store.access.audit()) if entry.kind == "refused"]


def bearer(token: str) -> bytes:
    return f"Authorization: Bearer {token}".encode()


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[int]:
    """The application under uvicorn, and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio sets it only on sockets that say which protocol they are of
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))

    def run() -> None:
        with contextlib.suppress(SystemExit):  # how uvicorn says that the start failed
            server.run(sockets=[listener])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), seconds=30)
        yield listener.getsockname()[1] if server.started else 0
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def end(server: EmbeddedServer) -> None:
    with contextlib.suppress(StoreUnavailable):
        connect(server.url).shutdown(nosave=True)


def platform_at(url: str, **changes: Any) -> Platform:
    settings = load_settings(redis_url=url, api_key=BOOTSTRAP, api_wrong_keys=WRONG_KEYS, audit_size=1000, **changes)
    return Platform(Store.connect(url), Catalogue(), settings, actor="test")


@pytest.fixture(scope="module")
def running(server: EmbeddedServer) -> Iterator[Site]:
    platform = platform_at(server.url)
    with served(application(platform)) as port:
        assert port
        yield Site(port, platform.store)
    platform.close()


@pytest.fixture
def site(running: Site, client: redis.Redis) -> Site:
    """The application with an emptied server."""
    return running


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_a_right_key_is_let_in(site: Site) -> None:
    _, right = site.make("read")
    assert site.ask("/who", right).body == "ci"
    assert site.ask("/who", right.replace(b"Bearer ", b"bEARER   ")).body == "ci"
    assert site.ask("/who", bearer(BOOTSTRAP)).body == "bootstrap"
    assert site.refusals() == []


def spoiled(token: bytes) -> list[tuple[str, list[bytes], str]]:
    """What is wrong, the headers, and what the audit log says."""
    text = token.removeprefix(b"Authorization: Bearer ")
    none, several = "the Authorization header has no bearer token", "more than one Authorization header"
    return [
        ("none", [], "no Authorization header"),
        ("empty", [b"Authorization:"], none),
        ("no token", [b"Authorization: Bearer"], none),
        ("other scheme", [b"Authorization: Basic " + text], none),
        ("no scheme", [b"Authorization: " + text], none),
        ("glued", [b"Authorization: Bearer" + text], none),
        ("two tokens", [token + b" " + text], none),
        ("list", [token + b", Bearer " + text], none),
        ("not ASCII", [b"Authorization: Bearer " + "schlüssel".encode()], none),
        ("not UTF-8", [b"Authorization: Bearer \xff\xfe" + text], none),
        ("a tab", [b"Authorization: Bearer\t" + text], none),
        ("very long", [b"Authorization: Bearer " + b"x" * 30_000], none),
        ("two headers", [token, token], several),
        ("two different ones", [token, b"authorization: Basic eDp5"], several),
        ("unknown", [bearer(new_token()[1])], "no such key"),
        ("cut", [token[:-1]], "not a token"),
        ("longer", [token + b"a"], "not a token"),
        ("bootstrap, cut", [bearer(BOOTSTRAP[:-1])], "not a token"),
        ("in another header", [b"X-Api-Key: " + text, b"Cookie: key=" + text], "no Authorization header"),
    ]


CASES = [(case, number) for number, (case, _, _) in enumerate(spoiled(b""))]


@pytest.mark.parametrize(("case", "number"), CASES, ids=[case for case, _ in CASES])
def test_anything_else_is_refused_with_the_same_answer(site: Site, case: str, number: int) -> None:
    _, right = site.make("admin")
    _, headers, why = spoiled(right)[number]
    answer = site.ask("/who", *headers)
    assert answer.status == 401, case
    assert answer.headers["www-authenticate"] == 'Bearer realm="taskplatform"'
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.body == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "this takes the header `Authorization: Bearer <key>`, with a key that is neither expired nor revoked",
    }
    assert site.refusals() == [why]
    entry = site.store.access.audit(limit=1)[0]
    assert (entry.action, entry.address, entry.request) == ("GET /who", "127.0.0.1", answer.headers["x-request-id"])


def test_a_key_that_ended_is_refused_and_only_the_audit_log_says_why(site: Site) -> None:
    expired, at_end = site.make("read", name="old", lifetime=timedelta(milliseconds=1))
    revoked, gone = site.make("read", name="lost")
    site.store.access.revoke_key("lost", actor="test", log_size=1000)
    wait_until(lambda: site.store.now_ms() > (expired.expires_ms or 0))
    answers = [site.ask("/who", header) for header in (at_end, gone, bearer(new_token()[1]))]
    assert [answer.status for answer in answers] == [401] * 3
    assert answers[0].body == answers[1].body == answers[2].body
    assert site.refusals() == ["the key is expired", "the key is revoked", "no such key"]
    assert [entry.key_id for entry in site.store.access.audit(limit=3)] == ["", revoked.id, expired.id]


def test_after_a_rotation_both_are_let_in_until_the_old_one_ends(site: Site) -> None:
    _, old = site.make("read")
    new = bearer(site.store.access.rotate_key("ci", overlap=timedelta(hours=1), actor="test", log_size=1000)[1])
    assert [site.ask("/who", one).status for one in (old, new)] == [200, 200]
    newest = bearer(site.store.access.rotate_key("ci", overlap=timedelta(), actor="test", log_size=1000)[1])
    assert [site.ask("/who", one).status for one in (old, new, newest)] == [401, 401, 200]


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [(["read"], [200, 403, 403]), (["submit"], [403, 200, 403]), (["read", "submit"], [200, 200, 403]), (["admin"], [200, 200, 200])],
)
def test_a_key_can_do_what_its_scopes_allow(site: Site, scopes: list[str], allowed: list[int]) -> None:
    _, right = site.make(*scopes)
    answers = [
        site.ask("/who", right),
        site.ask("/jobs/j1/orders", right, method="POST", body=b'{"count": 3}'),
        site.ask("/admin/x", right, method="DELETE"),
    ]
    assert [answer.status for answer in answers] == allowed
    for answer, scope in zip(answers, ("read", "submit", "admin"), strict=True):
        if answer.status == 403:
            assert answer.headers["www-authenticate"].endswith(f'error="insufficient_scope", scope="{scope}"')
            assert answer.body["detail"] == f"this takes a key with the scope {scope}; the key 'ci' has {', '.join(scopes)}"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("PATCH", "/who"),
        ("OPTIONS", "/who"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("POST", "/health"),
        ("GET", "/health/"),
    ],
)
def test_every_other_path_takes_a_key_too(site: Site, method: str, path: str) -> None:
    answer = site.ask(path, method=method)
    assert answer.status == 401
    _, right = site.make("read")
    assert site.ask(path, right, method=method).status != 401


def test_health_is_open_also_with_a_wrong_key(site: Site) -> None:
    assert "/ready" in OPEN_PATHS
    assert site.ask("/health").body == "well"
    assert site.ask("/health", bearer("wrong")).body == "well"
    assert site.refusals() == []


def test_nobody_is_read_who_has_no_key(site: Site) -> None:
    """The answer comes before the body, of which not a byte is waited for."""
    head = b"POST /jobs/j1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n"
    assert site.raw(head + b"\r\n").status == 401
    assert site.raw(head + b"Expect: 100-continue\r\n\r\n").status == 401


# --- wrong keys ------------------------------------------------------------------------------------------------------


def test_an_address_that_shows_wrong_keys_is_told_to_wait_and_right_keys_are_let_in(site: Site) -> None:
    _, right = site.make("read")
    wrong = bearer(new_token()[1])
    answers = [site.ask("/who", wrong) for _ in range(WRONG_KEYS + 2)]
    assert [answer.status for answer in answers] == [401] * WRONG_KEYS + [429] * 2
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
    assert "5 wrong keys in a minute" in answers[-1].body["detail"]
    assert len(site.refusals()) == WRONG_KEYS
    assert site.ask("/who", right).status == 200
    assert site.ask("/health").status == 200


def test_who_shows_no_key_is_never_told_to_wait_and_does_not_fill_the_log(site: Site) -> None:
    assert {site.ask("/who").status for _ in range(WRONG_KEYS + 5)} == {401}
    assert len(site.refusals()) == WRONG_KEYS
    assert site.ask("/who", bearer("wrong")).status == 401


def test_two_processes_count_together(site: Site, server: EmbeddedServer) -> None:
    platform = platform_at(server.url)
    with served(application(platform)) as port:
        other = Site(port, platform.store)
        statuses = [each.ask("/who", bearer("wrong")).status for _ in range(WRONG_KEYS) for each in (site, other)]
    platform.close()
    assert statuses == [401] * WRONG_KEYS + [429] * WRONG_KEYS


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "local"),
        ("/run/socket with blanks", "local"),
    ],
)
def test_what_attempts_are_counted_by(address: str, source: str) -> None:
    assert source_of(address) == source


# --- the audit log ---------------------------------------------------------------------------------------------------


def test_the_audit_log_has_each_request_that_changes_something(site: Site) -> None:
    key, right = site.make("submit")
    boss, all_ = site.make("admin", name="ops")
    site.ask("/who", all_)
    site.ask("/jobs/report:u1:m1/orders", right, method="POST", body=b'{"count": 3}')
    site.ask("/jobs/report:u1:m2/orders", right, method="POST", body=b'{"count": "many"}')
    site.ask("/admin/u%0A1", right, method="DELETE")
    last = site.ask("/admin/u2?token=s3cret", all_, method="DELETE")
    entries = [entry for entry in site.store.access.audit() if entry.kind in ("admin", "requests")][::-1]
    assert [(one.kind, one.key, one.key_id, one.action, one.status, one.about) for one in entries] == [
        ("requests", "ci", key.id, "POST /jobs/report:u1:m1/orders", 200, "job_id=report:u1:m1 made=o1"),
        ("requests", "ci", key.id, "POST /jobs/report:u1:m2/orders", 422, "job_id=report:u1:m2"),
        ("requests", "ci", key.id, "DELETE /admin/u\\n1", 403, "name=u\\n1"),
        ("admin", "ops", boss.id, "DELETE /admin/u2", 200, "name=u2"),
    ]
    assert entries[-1].request == last.headers["x-request-id"]
    assert {one.address for one in entries} == {"127.0.0.1"}


def test_a_request_that_breaks_a_route_is_in_the_audit_log_too(site: Site) -> None:
    assert site.ask("/admin/bad", bearer(BOOTSTRAP), method="DELETE").status == 500
    entry = site.store.access.audit(limit=1)[0]
    assert (entry.key, entry.action, entry.status) == ("bootstrap", "DELETE /admin/bad", 500)


def test_no_secret_is_in_the_audit_log_wherever_it_was_put(site: Site, client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _, right = site.make("admin")
    token = right.split()[-1].decode()
    for secret in (token, BOOTSTRAP):
        site.ask(f"/admin/{secret}?key={secret}", right, b"X-Key: " + secret.encode(), method="DELETE")
        site.ask(f"/{secret}", b"Authorization: Basic " + secret.encode())
        site.ask("/who", bearer(secret + "x"))
    told = repr(site.store.access.audit())
    assert told.count("DELETE /admin/") == 2
    for secret in (token, BOOTSTRAP):
        assert secret not in told
        # uvicorn's own log of requests has their paths
        assert all(secret not in record.getMessage() for record in caplog.records if record.name.startswith("taskplatform"))
        for name in cast("list[str]", client.keys("*")):
            assert secret.encode() not in cast("Any", client).execute_command("DUMP", name, NEVER_DECODE=True)


# --- Redis is away ---------------------------------------------------------------------------------------------------


def test_without_redis_nobody_is_let_in_but_with_the_key_of_the_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    with embedded_server(tmp_path_factory.mktemp("away")) as server:
        platform = platform_at(server.url)
        _, token = platform.store.access.create_key("ci", {"admin"}, actor="test", log_size=1000)
        with served(application(platform)) as port:
            site = Site(port, platform.store)
            assert site.ask("/who", bearer(token)).status == 200
            end(server)
            for headers in ([bearer(token)], [bearer(new_token()[1])], [bearer("wrong")], []):
                answer = site.ask("/who", *headers)
                assert answer.status == 503, headers
                assert int(answer.headers["retry-after"]) > 0
                assert answer.body["detail"] == "keys cannot be looked at for now", "nothing of where Redis is"
            assert site.ask("/who", bearer(BOOTSTRAP)).body == "bootstrap"
            assert site.ask("/health").status == 200
        platform.close()


def test_an_entry_that_redis_does_not_take_is_in_the_log_of_the_process(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with embedded_server(tmp_path_factory.mktemp("away")) as server:
        platform = platform_at(server.url)
        with served(application(platform)) as port:
            end(server)
            assert Site(port, platform.store).ask("/admin/x", bearer(BOOTSTRAP), method="DELETE").body == "x"
        platform.close()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "taskplatform.api.security"]
    assert "DELETE /admin/x" in said
    assert "key='bootstrap'" in said


# --- no route without a scope ----------------------------------------------------------------------------------------


def spare(kind: str) -> Callable[[FastAPI], None]:
    def add(app: FastAPI) -> None:
        if kind == "route":
            app.get("/spare")(lambda: "x")
        elif kind == "included":
            inner, outer = APIRouter(), APIRouter(prefix="/outer")
            inner.get("/spare")(lambda: "x")
            outer.include_router(inner)
            app.include_router(outer)
        elif kind == "mounted":
            app.mount("/spare", FastAPI())
        else:
            app.add_route("/spare", lambda _: JSONResponse("x"))

    return add


@pytest.mark.parametrize("kind", ["route", "included", "mounted", "plain"])
def test_an_application_with_a_route_that_says_no_scope_does_not_start(
    server: EmbeddedServer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    platform = platform_at(server.url)
    early = FastAPI()
    spare(kind)(early)
    with pytest.raises(ValueError, match=r"have no `requires\(scope\)`: .*/spare"):
        install(early, platform)
    late = application(platform)
    spare(kind)(late)
    with served(late) as port:
        assert port == 0, "it started"
    platform.close()
    assert re.search(r"have no `requires\(scope\)`: .*/spare", caplog.text)


def test_the_document_says_that_a_key_is_needed(site: Site) -> None:
    document = site.ask("/openapi.json", bearer(BOOTSTRAP)).body
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) is (path not in OPEN_PATHS)
    assert {context.path for context in iter_route_contexts(FastAPI().routes)} >= {"/docs"}
