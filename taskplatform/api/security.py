"""Who may call the API, and what is kept of it: keys, wrong keys, the audit log.

    install(app, platform)

    @app.get("/jobs/{job_id}")
    def get_job(job_id: str, key: Annotated[ApiKey, Depends(requires(Scope.READ))]) -> Job: ...

The gate stands before everything else: before a route is looked for, and before a byte of a body is read. Without a valid key every path,
also one that does not exist, is answered the same. Only OPEN_PATHS are answered to anybody. A route that says with no `requires` which
scope it takes keeps the application from starting.

Under /ui a browser shows the cookie of a session in place of a key (`sessions`), and who has none is led to the page that takes a key.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache, partial
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, cast

import anyio
from fastapi import FastAPI, Request, Security
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from taskplatform.api.pages import frame
from taskplatform.api.problem import RETRY_SECONDS, Problem
from taskplatform.api.sessions import OPEN_PAGES, Session, Sessions, is_page
from taskplatform.errors import StoreError
from taskplatform.keys import BOOTSTRAP, TOKEN, ApiKey, KeyRefused, Scope, digest
from taskplatform.platform import Platform
from taskplatform.store.access import AuditEntry

if TYPE_CHECKING:
    from fastapi.dependencies.models import Dependant
    from starlette.types import ASGIApp, Message, Receive, Send
    from starlette.types import Scope as Connection

log = logging.getLogger(__name__)

#: What is answered to anybody, to GET and HEAD.
OPEN_PATHS = frozenset({"/health", "/ready"})
#: They change nothing, and are not in the audit log.
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
#: Requests whose keys are looked at, or that are told to the audit log, at a time. They have threads of their own, so that they do not
#: wait for those of the routes, nor take them when Redis does not answer.
_THREADS = 16
#: What the gate and those around it say of a request to each other.
_REQUEST_ID, _ACTOR, _KEY, _ABOUT, _SESSION = (f"taskplatform.{name}" for name in ("request_id", "actor", "key", "about", "session"))
_CREDENTIALS = re.compile(r"bearer +([!-~]+)", re.IGNORECASE | re.ASCII)
_LONGEST_TOKEN = 256
_NOBODY = "0" * 64

_BEARER = HTTPBearer(
    scheme_name="key", description="An API key: `taskplatform keys create NAME --scope read`.", bearerFormat="tpk_…", auto_error=False
)


def install(app: FastAPI, platform: Platform) -> None:
    """Let nobody in without a key, and keep the audit log.

    Call it after all other middleware was added, so that it stands before that: who is refused is answered by the gate alone. Raises
    ValueError for a route that is there already and says no scope; one that is added later keeps the application from starting.
    """
    _check_routes(app)
    app.state.door = door = Door(platform)
    app.add_middleware(cast("Any", _Gate), api=app, door=door)


@lru_cache(maxsize=len(Scope))
def requires(scope: Scope) -> Callable[..., Awaitable[ApiKey]]:
    """A dependency that gives the caller's key, or answers 403 when that has not this scope."""

    # for the document: the gate has read the header
    shown = Security(_BEARER, scopes=[str(scope)])

    async def caller(request: Request, _shown: HTTPAuthorizationCredentials | None = shown) -> ApiKey:
        key = request.scope.get(_KEY)
        if not isinstance(key, ApiKey):
            # a route on one of OPEN_PATHS, or an application without the gate
            raise _refused()
        if not key.allows(scope):
            raise Problem(
                403,
                "Forbidden",
                f"this takes a key with the scope {scope}; the key {key.name!r} has {', '.join(key.scopes)}",
                headers={"WWW-Authenticate": f'Bearer realm="taskplatform", error="insufficient_scope", scope="{scope}"'},
                scope=str(scope),
            )
        return key

    _REQUIREMENTS.add(caller)
    return caller


_REQUIREMENTS: set[Callable[..., Awaitable[ApiKey]]] = set()


def note(request: Request, **about: str) -> None:
    """Tell the audit log what a request was about, beside the ids in its path: `note(request, job=job.id)`. No secrets."""
    request.scope.setdefault(_ABOUT, {}).update(about)


def session_of(request: Request) -> Session:
    """The session with which a page is asked for. Raises Problem where it is not."""
    session = request.scope.get(_SESSION)
    if not isinstance(session, Session):
        raise _refused()
    return session


def source_of(address: str) -> str:
    """What wrong keys are counted by: an IPv4 address, or the /64 of an IPv6 one, which is what one customer has."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return "local"
    if isinstance(found, IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped is not None else f"{IPv6Address(int(found) >> 64 << 64)}/64"
    return str(found)


# --- the gate --------------------------------------------------------------------------------------------------------


class _Gate:
    def __init__(self, app: ASGIApp, *, api: FastAPI, door: Door) -> None:
        self._app = app
        self._api = api
        self._door = door
        self._threads = anyio.CapacityLimiter(_THREADS)
        self._checked = False

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        if not self._checked:
            try:
                _check_routes(self._api)
            except ValueError as fault:
                if connection["type"] != "lifespan":
                    raise
                # an exception would tell a server that there is nothing to start, and not that it failed
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(fault)})
                return
            self._checked = True
        if connection["type"] == "http":
            await self._answer(connection, receive, send)
        elif connection["type"] == "lifespan":
            await self._app(connection, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, connection: Connection, receive: Receive, send: Send) -> None:
        if _REQUEST_ID not in connection:
            connection[_REQUEST_ID] = secrets.token_hex(16)
            send = _with_header(send, b"x-request-id", connection[_REQUEST_ID].encode())
        if connection["path"] in OPEN_PATHS and connection["method"] in ("GET", "HEAD"):
            await self._app(connection, receive, send)
            return
        if is_page(connection["path"]):
            await self._show(connection, receive, send)
            return
        try:
            key = await self._in_thread(partial(self._door.admit, connection))
        except Problem as problem:
            await problem.response(connection, receive, send)
            return
        await self._let_in(key, connection, receive, send)

    async def _show(self, connection: Connection, receive: Receive, send: Send) -> None:
        """A page, to who has a session."""
        if connection["path"] in OPEN_PAGES:
            await self._app(connection, receive, send)
            return
        try:
            session = await self._in_thread(partial(self._door.session, connection))
        except Problem as problem:
            await frame.of_problem(problem)(connection, receive, send)
            return
        if session is None:
            await frame.to_sign_in(connection)(connection, receive, send)
            return
        connection[_SESSION] = session
        await self._let_in(session.key, connection, receive, send)

    async def _let_in(self, key: ApiKey, connection: Connection, receive: Receive, send: Send) -> None:
        connection[_KEY], connection[_ACTOR] = key, key.name
        if connection["method"] in _READING:
            await self._app(connection, receive, send)
        else:
            await self._recorded(connection, receive, send, key)

    async def _recorded(self, connection: Connection, receive: Receive, send: Send, key: ApiKey) -> None:
        """The audit log is told before the answer goes out: what was answered is in it."""
        answered = False

        async def record(status: int) -> None:
            nonlocal answered
            answered = True
            await self._in_thread(partial(self._door.record, connection, key, status))

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start" and not answered:
                await record(message["status"])
            await send(message)

        try:
            await self._app(connection, receive, send_recorded)
        finally:
            if not answered:
                with anyio.CancelScope(shield=True):
                    await record(500)

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await anyio.to_thread.run_sync(call, limiter=self._threads)


class Door:
    """Who is let in, and what is kept of it. Its methods ask Redis: they are for threads."""

    def __init__(self, platform: Platform) -> None:
        self._access = platform.store.access
        self._settings = platform.settings
        given = platform.settings.api_key
        self._bootstrap_secret = given.get_secret_value() if given is not None else ""
        self._bootstrap = digest(self._bootstrap_secret) if self._bootstrap_secret else _NOBODY
        self._bootstrap_key = ApiKey(BOOTSTRAP, BOOTSTRAP, (Scope.ADMIN,), time.time_ns() // 1_000_000, "TASKPLATFORM_API_KEY")
        self._complained = float("-inf")
        self.sessions = Sessions(self._access, self._settings, self._bootstrap_key, self._bootstrap_secret)

    def admit(self, connection: Connection) -> ApiKey:
        """The key that the request shows in its header. Raises Problem."""
        shown = [value for name, value in connection["headers"] if name == b"authorization"]
        return self._known(connection, partial(self._key_of, shown), guesses=bool(shown))

    def admit_token(self, connection: Connection, token: str) -> ApiKey:
        """The key that somebody who signs in shows; who shows wrong ones is told to wait as by `admit`. Raises Problem."""
        return self._known(connection, partial(self._key_of, [f"Bearer {token.strip()}".encode("utf-8", "replace")]), guesses=True)

    def session(self, connection: Connection) -> Session | None:
        """That of the request's cookie. None: there is none, or its key has ended, of which the audit log is told. Raises Problem."""
        try:
            return self.sessions.find(connection)
        except KeyRefused as refused:
            # nobody guesses here: the session was right
            self._refuse(connection, refused, guesses=False)
            return None
        except StoreError as fault:
            raise self._away(fault) from fault

    def sign_in(self, key: ApiKey) -> Session:
        """A new session. Raises Problem."""
        try:
            return self.sessions.open(key)
        except StoreError as fault:
            raise self._away(fault) from fault

    def _known(self, connection: Connection, look: Callable[[], ApiKey], *, guesses: bool) -> ApiKey:
        try:
            return look()
        except KeyRefused as refused:
            wait_ms = self._refuse(connection, refused, guesses=guesses)
        except StoreError as fault:
            raise self._away(fault) from fault
        if wait_ms and guesses:
            seconds = -(-wait_ms // 1000)
            detail = (
                f"{self._settings.api_wrong_keys} wrong keys in a minute are the most for one address; a right one is let in at any time"
            )
            raise Problem(429, "Too Many Requests", detail, headers={"Retry-After": str(seconds)})
        raise _refused()

    def _refuse(self, connection: Connection, refused: KeyRefused, *, guesses: bool) -> int:
        """For how many ms the address has to wait before it may show another wrong key."""
        address = _address(connection)
        # who shows nothing does not guess, and is not kept from it; its lines in the log are bounded all the same
        source = source_of(address) if guesses else f"{source_of(address)} none"
        entry = AuditEntry(
            at_ms=0,
            kind="refused",
            action=self._action(connection),
            key=refused.key.name if refused.key else "",
            key_id=refused.key.id if refused.key else "",
            address=address,
            about=refused.why,
            request=connection[_REQUEST_ID],
        )
        return self._count(source, entry)

    def _key_of(self, shown: list[bytes]) -> ApiKey:
        if len(shown) != 1:
            raise KeyRefused("more than one Authorization header" if shown else "no Authorization header")
        match = _CREDENTIALS.fullmatch(shown[0].decode("latin-1").strip())
        if match is None or len(match[1]) > _LONGEST_TOKEN:
            raise KeyRefused("the Authorization header has no bearer token")
        if hmac.compare_digest(digest(match[1]), self._bootstrap):
            return self._bootstrap_key
        return self._access.authenticate(match[1])

    def _count(self, source: str, entry: AuditEntry) -> int:
        try:
            return self._access.refuse(source, entry, per_minute=self._settings.api_wrong_keys, log_size=self._settings.audit_size)
        except StoreError as fault:
            raise self._away(fault) from fault

    def _away(self, fault: StoreError) -> Problem:
        """Nobody is let in whose key cannot be looked at. Why is for our log, not for who asked."""
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.error("API keys cannot be looked at, so nobody is let in: %s", fault)
        return Problem(503, "Service Unavailable", "keys cannot be looked at for now", headers={"Retry-After": str(RETRY_SECONDS)})

    def record(self, connection: Connection, key: ApiKey, status: int) -> None:
        """Tell the audit log what was answered to what somebody changed."""
        about = {**connection.get("path_params", {}), **connection.get(_ABOUT, {})}
        entry = AuditEntry(
            at_ms=0,
            # a key that may do less has a log of its own, so that it pushes nothing out of that of the others
            kind="admin" if key.allows(Scope.ADMIN) else "requests",
            action=self._action(connection),
            status=status,
            key=key.name,
            key_id=key.id,
            address=_address(connection),
            about=self._clean(" ".join(f"{name}={value}" for name, value in about.items())),
            request=connection[_REQUEST_ID],
        )
        try:
            self._access.record(entry, log_size=self._settings.audit_size)
        except StoreError as fault:
            # what was done is done: the answer must say so
            log.error("the audit log does not take an entry (%s), it is: %s", fault, entry)

    def _action(self, connection: Connection) -> str:
        return self._clean(f"{connection['method']} {connection['path']}")

    def _clean(self, text: str) -> str:
        """Without what somebody put into a path that belongs into a header, and not longer than a line."""
        if self._bootstrap_secret:
            text = text.replace(self._bootstrap_secret, "…")
        return json.dumps(TOKEN.sub("tpk_…", text), ensure_ascii=False)[1:-1][:500]


def _with_header(send: Send, name: bytes, value: bytes) -> Send:
    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (name, value)]
        await send(message)

    return send_with_header


def _refused() -> Problem:
    """One answer for all, so that nobody learns from it what was wrong with a key."""
    return Problem(
        401,
        "Unauthorized",
        "this takes the header `Authorization: Bearer <key>`, with a key that is neither expired nor revoked",
        headers={"WWW-Authenticate": 'Bearer realm="taskplatform"'},
    )


def _address(connection: Connection) -> str:
    client = connection.get("client")
    return str(client[0]) if client else "local"


def _check_routes(app: FastAPI) -> None:
    """Raises ValueError for routes that say no scope."""
    documents = {app.openapi_url, app.docs_url, app.redoc_url, app.swagger_ui_oauth2_redirect_url}
    faults = []
    for route in iter_route_contexts(app.routes):
        if isinstance(route.original_route, APIRoute):
            fine = route.path in OPEN_PATHS | OPEN_PAGES or any(call in _REQUIREMENTS for call in _calls(route.dependant))
        else:
            fine = route.path in documents
        if not fine:
            faults.append(f"{' '.join(sorted(route.methods or ()))} {route.path}".strip())
    if faults:
        raise ValueError(f"these routes have no `requires(scope)`: {', '.join(faults)}")


def _calls(dependant: Dependant) -> Iterator[object]:
    for dependency in dependant.dependencies:
        yield dependency.call
        yield from _calls(dependency)
