"""One HTTP call: rendered from a definition and a job, sent within a deadline, its answer classified.

What it promises:

- `render` lets a job's values fill the path, the query, headers and the body, and never change the host, the number of
  path segments, the set of headers or the keys of a JSON body. Values are substituted once and never scanned again.
- `Client.send` returns an Outcome whatever the network or the target does, at most moments after its deadline. The
  deadline holds for the whole call: name lookup, connect, TLS, sending, every byte of headers and body, redirects.
- An answer is read up to a limit, never decompressed and never held beyond that limit.
- What came from the environment is in no reason, excerpt, repr or log record.

The deadline is kept by the sockets: each of their operations waits at most for what is left of the call. This needs
neither a timer thread nor signals, so it is the same in prefork processes and in threads.
"""

from __future__ import annotations

import base64
import codecs
import errno
import html
import http.client
import json
import logging
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import lru_cache
from http.cookiejar import DefaultCookiePolicy
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, unquote, urljoin

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import create_urllib3_context

from taskplatform.errors import HttpError, InvalidInput
from taskplatform.model import HttpConfig, format_duration

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

USER_AGENT = f"taskplatform/{version('taskplatform')}"
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = timedelta(hours=24)
MIN_SECRET_LENGTH = 4
"""A shorter value from the environment is not redacted: it would be found everywhere, and it protects nothing."""

PLATFORM_HEADERS = frozenset({"x-job-id", "x-user-id", "x-task-type", "idempotency-key"})
"""Set for every call; what a definition says of them is not taken."""

FRAMING_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Set by the client, because answers are read as they are and a wrong one would break the connection for the next call."""


@dataclass(frozen=True, slots=True)
class Call:
    """What to send, with all values filled in. Its repr shows none of them."""

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """The values that came from the environment."""


class OutcomeKind(StrEnum):
    COMPLETED = "completed"
    RETRY = "retry"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call."""

    kind: OutcomeKind
    reason: str
    """Such as "HTTP 503", "connection refused" or "deadline of 25m exceeded"."""
    status: int | None
    """Of the last answer; None if there was none."""
    duration_ms: int
    excerpt: str
    """The first characters of the answer, printable and without secrets."""
    retry_after: timedelta | None
    """When the target wants to be asked again; from 0 to 24 hours."""
    timed_out: bool

    @property
    def detail(self) -> dict[str, Any]:
        """What the history keeps. What there is nothing to say of is left out."""
        detail: dict[str, Any] = {"duration_ms": self.duration_ms}
        if self.status is not None:
            detail["status"] = self.status
        if self.excerpt:
            detail["excerpt"] = self.excerpt
        return detail


def render(
    config: HttpConfig, *, job_id: str, user: str, definition: str, params: Mapping[str, Any], environment: Mapping[str, str]
) -> Call:
    """Fill a definition's `${NAME}` from `environment`, and `{{user}}`, `{{job_id}}` and `{{params.x}}` from the job.

    Values of the environment are the operator's and go in as they are. Values of the job are percent-encoded in the URL
    and in a form body and escaped in a JSON body. A string of a JSON body that is exactly one `{{params.x}}` becomes the
    parameter itself, of whatever type.

    Raises InvalidInput that names the variable or parameter, never a value: it is missing, would add a header or change
    the path, or cannot be written where it is used.
    """
    values = _Values({"user": user, "job_id": job_id, **{f"params.{name}": value for name, value in params.items()}}, environment)
    url, userinfo = _render_url(config.endpoint, values)
    headers = _render_headers(config.headers, values)
    body = _render_body(config.body, headers, values)
    if userinfo:
        headers.setdefault("Authorization", f"Basic {base64.b64encode(userinfo.encode()).decode()}")
        values.secrets.update(dict.fromkeys((userinfo, userinfo.partition(":")[2])))
    for name, value in (("X-Job-ID", job_id), ("X-User-ID", user), ("X-Task-Type", definition), ("Idempotency-Key", job_id)):
        headers[name] = _header_value(value, name)
    return Call(config.method, url, dict(headers), body, tuple(value for value in values.secrets if value))


def classify(status: int) -> OutcomeKind:
    """2xx completes; 408, 425, 429 and 5xx are worth another try; the rest, redirects that were not followed included, is not."""
    if 200 <= status <= 299:
        return OutcomeKind.COMPLETED
    if status in (408, 425, 429) or 500 <= status <= 599:
        return OutcomeKind.RETRY
    return OutcomeKind.FAILED


def parse_retry_after(value: str | None, *, now: datetime) -> timedelta | None:
    """The wait that a `Retry-After` asks for: seconds or an HTTP date (RFC 9110, 10.2.3), from 0 to 24 hours; else None."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(timedelta(seconds=int(text)), MAX_RETRY_AFTER) if len(text) <= 9 else MAX_RETRY_AFTER
    moment = _http_date(text)
    try:
        return None if moment is None else min(max(moment - now, timedelta()), MAX_RETRY_AFTER)
    except OverflowError:
        return None


def _http_date(text: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text or "")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Put `***` for each secret, also where it is percent-encoded, escaped for JSON or HTML, or inside base64."""
    pattern = _pattern(secrets)
    return pattern.sub("***", text) if pattern else text


class CallAborted(HttpError):
    """Another thread broke the call off."""


class Abort:
    """Lets another thread break off one call, before it begins or while it is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fired = False
        self._run: _Run | None = None
        self._over = False

    def fire(self) -> bool:
        """Break the call off; one that has not begun will not. False when it had ended by itself. Said twice is once."""
        with self._lock:
            if not self._over:
                self._fired = True
                if self._run is not None:
                    self._run.abort()
            return self._fired

    def _begin(self, run: _Run) -> None:
        with self._lock:
            self._run = run
            if self._fired:
                run.abort()

    def _end(self) -> bool:
        """Whether it was broken off. From here on the thread's sockets are not this call's."""
        with self._lock:
            self._run, self._over = None, True
            return self._fired


class Client:
    """Sends calls. One for a process; every thread has its own pooled connections.

    Cookies, netrc, and proxies from the environment are not used. Certificates are checked against the machine's trust
    store and that of `certifi`.
    """

    def __init__(self, *, connect_timeout: timedelta, max_response: int, excerpt: int) -> None:
        """`connect_timeout` is for DNS, TCP and TLS of one connection, `max_response` in bytes, `excerpt` in characters."""
        self._connect_timeout = connect_timeout
        self._max_response = max_response
        self._excerpt = excerpt
        self._tls = _tls_context()
        self._own = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()

    def send(self, call: Call, *, deadline: timedelta, abort: Abort | None = None) -> Outcome:
        """Make the call, its redirects included, within `deadline`. Raises CallAborted when `abort` was fired before its end.

        It raises for nothing that the network or the target does. An exception that a signal raises meanwhile, such as a
        soft time limit, passes through and leaves no connection in an unknown state.
        """
        started = time.monotonic()
        run = _Run(ends=started + deadline.total_seconds(), connect_timeout=self._connect_timeout.total_seconds())
        timed_out = False
        _active.run = run
        if abort is not None:
            abort._begin(run)
        try:
            kind, reason = self._follow(call, run)
        except _RefusedError as refusal:
            kind, reason = OutcomeKind.FAILED, str(refusal)
        except _FAULTS as fault:
            kind = OutcomeKind.RETRY
            reason, timed_out = _explain(fault, run, deadline=deadline, connect_timeout=self._connect_timeout)
        finally:
            _active.run = None
            broken_off = abort is not None and abort._end()
        if broken_off:
            raise CallAborted("broken off")
        return Outcome(
            kind=kind,
            reason=redact(reason, call.secrets),
            status=run.status,
            duration_ms=round((time.monotonic() - started) * 1000),
            excerpt=_excerpt(run, secrets=call.secrets, length=self._excerpt),
            retry_after=parse_retry_after(run.retry_after, now=run.date or datetime.now(UTC)) if kind is OutcomeKind.RETRY else None,
            timed_out=timed_out,
        )

    def close(self) -> None:
        """Close the pooled connections of all threads. Not while a call is in progress."""
        for session in list(self._sessions):
            session.close()

    def _follow(self, call: Call, run: _Run) -> tuple[OutcomeKind, str]:
        url, headers = call.url, dict(call.headers)
        for _ in range(MAX_REDIRECTS + 1):
            with self._request(_prepared(call, url, headers), run) as response:
                run.answered(response)
                target = _redirect_target(call.method, url, response)
                if target is None:
                    _read(response, run, limit=self._max_response)
                    return classify(response.status_code), f"HTTP {response.status_code}"
                # leaving the block closes the connection: what a redirect says beside its target is not worth reading
            if _crosses(url, target):
                headers = _without_credentials(headers, call)
            url = target
        raise _RefusedError(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, request: requests.PreparedRequest, run: _Run) -> requests.Response:
        """Send and wait for the headers of the answer.

        A pooled connection that the target closed just as it was used again says nothing about the target, so the call
        is sent once more, on a new connection. That is not done after any byte of an answer. The target cannot have
        answered, but it may, rarely, have read the request: then it gets it twice with the same Idempotency-Key, which
        is what the platform's retry of a lost connection does too.
        """
        try:
            return self._request_once(request, run)
        except _FAULTS:
            if not run.reused or run.received or run.aborted:
                raise
        return self._request_once(request, run)

    def _request_once(self, request: requests.PreparedRequest, run: _Run) -> requests.Response:
        run.begin_request()
        # The sockets keep the deadline. This timeout is for one that would not be ours.
        response = self._session().send(request, stream=True, timeout=run.left(), allow_redirects=False)
        if not run.head_ended:
            response.close()
            # http.client takes the end of the connection for the end of the headers, and the answer for a complete one
            raise http.client.IncompleteRead(b"")
        return response

    def _session(self) -> requests.Session:
        """This thread's session. A forked process must not speak on its parent's connections, so it gets new ones."""
        if getattr(self._own, "pid", None) != os.getpid():
            self._own.session, self._own.pid = _new_session(self._tls), os.getpid()
            self._sessions.add(self._own.session)
        session: requests.Session = self._own.session
        return session


# --- rendering -------------------------------------------------------------------------------------------------------

_PIECE = re.compile(r"\$\{(?P<env>[A-Za-z_][A-Za-z0-9_]*)\}|\{\{\s*(?P<job>user|job_id|params\.[A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_URL = re.compile(
    r"(?P<scheme>https?)://(?:(?P<userinfo>[^/?#@]*)@)?"
    r"(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE,
)
_NOT_IN_URL = re.compile(r"[\x00-\x1f\x7f\\]")
_NOT_IN_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_JOB_MARK = "\0"


class _Values:
    """What templates refer to. Remembers which values of the environment were used."""

    def __init__(self, job: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._job = job
        self._environment = environment
        self.secrets: dict[str, None] = {}

    def fill(self, template: str, where: str, *, env: Callable[[str, str], str], job: Callable[[Any, str], str]) -> str:
        """Substitute in one pass, so that no value is scanned for templates. `env` and `job` turn a value, with its label, into text."""

        def replacement(match: re.Match[str]) -> str:
            if match["env"]:
                return env(self._variable(match["env"], where), f"{where}: environment variable {match['env']}")
            return job(self.of_job(match["job"], where), f"{where}: {match['job']}")

        return _PIECE.sub(replacement, template)

    def of_job(self, name: str, where: str) -> Any:
        if name not in self._job:
            raise InvalidInput(f"{where}: {name} is missing")
        value = self._job[name]
        if isinstance(value, str) and not _is_unicode(value):
            raise InvalidInput(f"{where}: {name} holds half of a surrogate pair, which is not text")
        return value

    def _variable(self, name: str, where: str) -> str:
        if name not in self._environment:
            raise InvalidInput(f"{where}: environment variable {name} is not set")
        self.secrets[self._environment[name]] = None
        return self._environment[name]


def _render_url(template: str, values: _Values) -> tuple[str, str]:
    """The URL without user info and fragment, and the user info, decoded."""
    url = values.fill(template, "endpoint", env=_as_it_is, job=lambda value, label: quote(_plain(value, label), safe=""))
    # The same with a mark for each job value: where they are is where they must not change anything.
    shape = values.fill(template, "endpoint", env=_as_it_is, job=lambda _value, _label: _JOB_MARK)
    used = ", ".join(dict.fromkeys(match["env"] or match["job"] for match in _PIECE.finditer(template)))
    with_used = f" with {used}" if used else ""
    parts, marked = _URL.fullmatch(url), _URL.fullmatch(shape)
    if not parts or not marked or _NOT_IN_URL.search(url) or not _is_unicode(url) or int(parts["port"] or 0) > 65535:
        raise InvalidInput(f"endpoint{with_used} is not an http or https URL with a host")
    if any(_JOB_MARK in (marked[part] or "") for part in ("scheme", "userinfo", "host", "port")):
        raise InvalidInput(f"endpoint{with_used}: the host cannot come from the job, only the path and query can")
    for segment, shape_segment in zip((parts["path"] or "").split("/"), (marked["path"] or "").split("/"), strict=True):
        if _JOB_MARK in shape_segment and not _keeps_path(segment):
            raise InvalidInput(f"endpoint{with_used} gives a path segment that is empty or holds '.' or '..', which would change the path")
    host = parts["host"] + (f":{parts['port']}" if parts["port"] else "")
    return f"{parts['scheme']}://{host}{parts['path'] or '/'}{parts['query'] or ''}", unquote(parts["userinfo"] or "")


def _keeps_path(segment: str) -> bool:
    """Whether a segment stays one.

    Clients and servers remove dot segments, whether percent-encoded or not, and some servers decode slashes first.
    """
    decoded = unquote(segment)
    return bool(decoded) and not {".", ".."} & set(re.split(r"[/\\]", decoded))


def _render_headers(templates: Mapping[str, str], values: _Values) -> CaseInsensitiveDict[str]:
    headers: CaseInsensitiveDict[str] = CaseInsensitiveDict({"User-Agent": USER_AGENT})
    for name, template in templates.items():
        if name.lower() in PLATFORM_HEADERS | FRAMING_HEADERS:
            continue
        where = f"headers.{name}"
        text = values.fill(template, where, env=_header_piece, job=lambda value, label: _header_piece(_plain(value, label), label))
        headers[name] = _header_value(text.strip(" \t"), where)
    return headers


def _header_value(text: str, where: str) -> str:
    if text[:1].isspace():
        raise InvalidInput(f"{where} begins with a space, which a header cannot")
    return _header_piece(text, where)


def _header_piece(text: str, label: str) -> str:
    if _NOT_IN_HEADER.search(text):
        raise InvalidInput(f"{label} holds a line break or another control character, which a header cannot")
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        raise InvalidInput(f"{label} holds characters outside of Latin-1, which a header cannot") from None
    return text


def _render_body(template: Any, headers: CaseInsensitiveDict[str], values: _Values) -> bytes | None:
    if template is None:
        return None
    if isinstance(template, str):
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        text = values.fill(template, "body", env=_as_it_is, job=_escape_for(kind))
        if not _is_unicode(text):
            raise InvalidInput("body: a value from the environment is not UTF-8")
        return text.encode()
    headers.setdefault("Content-Type", "application/json")
    return _json(_render_json(template, "body", values), "body").encode()


def _render_json(template: Any, where: str, values: _Values) -> Any:
    if isinstance(template, str):
        whole = _PIECE.fullmatch(template)
        if whole and whole["job"]:
            return values.of_job(whole["job"], where)
        return values.fill(template, where, env=_as_it_is, job=_text)
    if isinstance(template, list | tuple):
        return [_render_json(item, f"{where}[{index}]", values) for index, item in enumerate(template)]
    if not isinstance(template, Mapping):
        return template
    rendered: dict[Any, Any] = {}
    for key, item in template.items():
        name = values.fill(key, where, env=_as_it_is, job=_text) if isinstance(key, str) else key
        if name in rendered:
            raise InvalidInput(f"{where}: two keys become the same with the job's values")
        rendered[name] = _render_json(item, f"{where}.{key}", values)
    return rendered


def _escape_for(content_type: str) -> Callable[[Any, str], str]:
    """How a job value is written into a text body, so that it stays one value where the content type tells what that is."""
    if content_type == "application/x-www-form-urlencoded":
        return lambda value, label: quote(_text(value, label), safe="")
    if content_type == "application/json" or content_type.endswith("+json"):
        return lambda value, label: _json(value, label)[1:-1] if isinstance(value, str) else _json(value, label)
    return _text


def _as_it_is(value: str, _label: str) -> str:
    return value


def _text(value: Any, label: str) -> str:
    return value if isinstance(value, str) else _json(value, label)


def _plain(value: Any, label: str) -> str:
    """Text for a URL or a header, where a null or a list is a mistake rather than a value."""
    if not isinstance(value, str | int | float):
        raise InvalidInput(f"{label} is {type(value).__name__}; text, a number or true or false can be used here")
    return _text(value, label)


def _json(value: Any, label: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        raise InvalidInput(f"{label} cannot be written as JSON") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- redaction -------------------------------------------------------------------------------------------------------

_RESERVED = "!#$%&'()*+,/:;=?@[]~"
"""What `requests` leaves as it is in a URL."""


@lru_cache(maxsize=1000)
def _pattern(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds the secrets, however they are written. Kept, because all calls of a definition have the same."""
    forms = _forms(secrets)
    return re.compile("|".join(map(re.escape, forms))) if forms else None


def _forms(secrets: tuple[str, ...]) -> list[str]:
    """Every way in which the secrets may be written, the longest first, so that none is left with a visible rest."""
    forms: set[str] = set()
    for secret in secrets:
        if len(secret) >= MIN_SECRET_LENGTH:
            plain = secret.encode("utf-8", "replace")
            encoded = {quote(plain, safe=""), quote(plain, safe="/"), quote(plain, safe=_RESERVED), quote_plus(plain)}
            escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
            forms |= {secret, html.escape(secret), html.escape(secret, quote=False), *encoded, *escaped, *_base64_forms(plain)}
            forms |= {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), text) for text in encoded}
            forms |= {text.replace("/", "\\/") for text in escaped}
    return sorted((form for form in forms if len(form) >= MIN_SECRET_LENGTH), key=lambda form: (-len(form), form))


def _base64_forms(plain: bytes) -> Iterator[str]:
    """Base64 of the secret alone, and what is the same of it wherever it begins in a longer text, as in `user:secret`."""
    yield base64.b64encode(plain).decode()
    yield base64.urlsafe_b64encode(plain).decode()
    for shift, first in ((0, 0), (1, 2), (2, 3)):
        last = (shift + len(plain)) * 8 // 6
        yield base64.b64encode(b"\0" * shift + plain)[first:last].decode()
        yield base64.urlsafe_b64encode(b"\0" * shift + plain)[first:last].decode()


def _excerpt(run: _Run, *, secrets: tuple[str, ...], length: int) -> str:
    # Whitespace may shrink and secrets are longer than their stars, so more than `length` characters are looked at.
    window = bytes(run.body[: 8 * length + 4096])
    cut = run.cut or len(window) < len(run.body)
    if run.encoding not in ("", "identity"):
        text = f"[{run.encoding}]" if window else ""
    else:
        # Without NUL, UTF-16 reads as text; with them, a secret in it would not be found.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(window.replace(b"\0", b""), final=not cut)
    text = redact(text, secrets)
    if cut:
        text = _without_begun_secret(text, secrets)
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:length]


def _without_begun_secret(text: str, secrets: tuple[str, ...]) -> str:
    """Where the text was cut off, the first part of a secret may be left."""
    begun = (size for form in _forms(secrets) for size in range(len(form) - 1, MIN_SECRET_LENGTH - 1, -1) if text.endswith(form[:size]))
    size = max(begun, default=0)
    return f"{text[:-size]}***" if size else text


# --- one call in progress --------------------------------------------------------------------------------------------


class _RefusedError(HttpError):
    """The call cannot succeed however often it is tried. The message is the reason."""


@dataclass(slots=True)
class _Run:
    """What is known of the call that this thread is making."""

    ends: float
    """On the monotonic clock."""
    connect_timeout: float
    connecting: bool = False
    reused: bool = False
    """The request goes out on a connection that served an earlier one."""
    received: int = 0
    """Bytes of the answer to the current request."""
    head_ended: bool = False
    """The empty line after the headers has been received."""
    tail: bytes = b""
    status: int | None = None
    retry_after: str | None = None
    date: datetime | None = None
    """When the target sent the answer, by its own clock: that is the one which a date in Retry-After goes by."""
    encoding: str = ""
    body: bytearray = field(default_factory=bytearray)
    cut: bool = False
    """There is more than `body`."""
    aborted: bool = False
    used: socket.socket | None = None
    """The socket of the operation that is made now, or was last."""

    def abort(self) -> None:
        """From another thread: what this one waits for on its socket ends now, and what it would do next fails."""
        self.aborted = True
        if self.used is not None:
            with suppress(OSError):
                # past the method of TLS sockets, which would take the connection's state away under the other thread
                socket.socket.shutdown(self.used, socket.SHUT_RDWR)

    def uses(self, one: socket.socket) -> None:
        """Note the socket before the next operation on it. Raises OSError where that must not be made any more."""
        # noted first: either `abort` sees it, or this sees what `abort` set
        self.used = one
        if self.aborted:
            raise OSError(errno.ECONNABORTED, "aborted")

    def left(self) -> float:
        """The timeout for one operation. Raises TimeoutError at the deadline."""
        if time.monotonic() >= self.ends:
            raise TimeoutError("deadline")
        return _within(self.ends)

    def begin_request(self) -> None:
        # On a new connection, connect() sets `reused` to False.
        self.connecting, self.reused, self.received, self.head_ended, self.tail = False, True, 0, False, b""
        self.status = self.retry_after = self.date = None

    def receive(self, data: memoryview) -> None:
        self.received += len(data)
        if not self.head_ended:
            seen = self.tail + bytes(data)
            self.head_ended, self.tail = b"\n\r\n" in seen or b"\n\n" in seen, seen[-2:]

    def answered(self, response: requests.Response) -> None:
        self.status = response.status_code
        self.retry_after = response.headers.get("Retry-After")
        self.date = _http_date(response.headers.get("Date"))
        self.encoding = response.headers.get("Content-Encoding", "").strip().lower()


class _Active(threading.local):
    run: _Run | None = None


_active = _Active()


_DEFAULT_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}


def _read(response: requests.Response, run: _Run, *, limit: int) -> None:
    """Read up to `limit` bytes. If there are more, the connection is left to be closed."""
    raw = response.raw
    while len(run.body) <= limit:
        # one byte more than the limit tells whether there is more
        data = raw.read1(limit + 1 - len(run.body), decode_content=False)
        if not data:
            return
        run.body += data
    del run.body[limit:]
    run.cut = True


def _prepared(call: Call, url: str, headers: Mapping[str, str]) -> requests.PreparedRequest:
    """Past the session, whose own headers, cookies and login would only be merged with nothing, for a fifth of a call's work."""
    request = requests.PreparedRequest()
    try:
        if _URL.fullmatch(url):
            request.prepare(call.method, url, headers=CaseInsensitiveDict({**_DEFAULT_HEADERS, **headers}), data=call.body)
            return request
    except (requests.RequestException, ValueError):
        pass
    raise _RefusedError("not a valid request" if url == call.url else "redirect to a URL that is not accepted")


def _redirect_target(method: str, url: str, response: requests.Response) -> str | None:
    """Where to go on with the same method and body; None if the answer is final. Raises _RefusedError."""
    status, location = response.status_code, response.headers.get("Location")
    if location is None or status not in (301, 302, 303, 307, 308):
        return None
    if method not in ("GET", "HEAD") and status not in (307, 308):
        raise _RefusedError(f"HTTP {status}: a redirect that would turn {method} into GET is not followed")
    try:
        # http.client gives header bytes as Latin-1; servers mean UTF-8
        target = urljoin(url, location.encode("latin-1").decode("utf-8"))
    except ValueError:
        target = ""
    parts = _URL.fullmatch(target)
    if not parts or parts["userinfo"] is not None or _NOT_IN_URL.search(target):
        raise _RefusedError(f"HTTP {status}: redirect to a URL that is not accepted")
    if url.lower().startswith("https:") and parts["scheme"].lower() != "https":
        raise _RefusedError(f"HTTP {status}: redirect from https to http is not followed")
    return target


def _crosses(url: str, target: str) -> bool:
    """Whether the target is another server: another host or port, but for the step from http to https on their usual ports."""
    (host, port), (new_host, new_port) = _authority(url), _authority(target)
    return host != new_host or (port != new_port and (port, new_port) != (80, 443))


def _authority(url: str) -> tuple[str, int]:
    parts = _URL.fullmatch(url)
    assert parts
    return parts["host"].lower(), int(parts["port"] or (443 if parts["scheme"].lower() == "https" else 80))


def _without_credentials(headers: Mapping[str, str], call: Call) -> dict[str, str]:
    """The headers that another server may see. Raises _RefusedError if the body is not for it."""
    if call.body and _holds_secret(call.body.decode("utf-8", "replace"), call.secrets):
        raise _RefusedError("redirect to another host is not followed: the body holds a value from the environment")
    dropped = {"authorization", "cookie", "host", "proxy-authorization"}
    return {
        name: value
        for name, value in headers.items()
        if name.lower() in PLATFORM_HEADERS or (name.lower() not in dropped and not _holds_secret(value, call.secrets))
    }


def _holds_secret(text: str, secrets: tuple[str, ...]) -> bool:
    return any(form in text for form in _forms(secrets))


# --- what went wrong -------------------------------------------------------------------------------------------------

_FAULTS = (OSError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError)
"""What the network or a target can make `requests`, urllib3 and http.client raise; `requests` makes its own from OSError."""

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "host name cannot be resolved"),
    (UnicodeError, "host name cannot be resolved"),
    (ssl.SSLCertVerificationError, "TLS certificate is not accepted"),
    (ssl.SSLError, "TLS failed"),
    (ConnectionRefusedError, "connection refused"),
    (http.client.RemoteDisconnected, "connection closed without an answer"),
    (ConnectionError, "connection reset"),
    (http.client.IncompleteRead, "answer is cut off"),
    (http.client.HTTPException, "answer is not HTTP"),
    (urllib3.exceptions.InvalidHeader, "answer is not HTTP"),
)


def _explain(fault: BaseException, run: _Run, *, deadline: timedelta, connect_timeout: timedelta) -> tuple[str, bool]:
    """The reason in our own words, since messages of libraries hold the URL; and whether it is that time ran out."""
    if time.monotonic() >= run.ends:
        return f"deadline of {format_duration(deadline)} exceeded", True
    causes = list(_causes(fault))
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return (f"no connection within {format_duration(connect_timeout)}" if run.connecting else "connection timed out"), True
    for kind, reason in _REASONS:
        if any(isinstance(cause, kind) for cause in causes):
            return reason, False
    codes = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
    if {errno.EHOSTUNREACH, errno.ENETUNREACH} & set(codes):
        return "host unreachable", False
    return f"connection failed ({errno.errorcode.get(codes[0], str(codes[0])) if codes else type(causes[-1]).__name__})", False


def _causes(fault: BaseException) -> Iterator[BaseException]:
    """The fault and all that libraries have wrapped in it: as cause, context, argument or `reason`."""
    waiting, seen = [fault], {id(fault)}
    while waiting:
        current = waiting.pop()
        yield current
        for inner in (current.__cause__, current.__context__, getattr(current, "reason", None), *current.args):
            if isinstance(inner, BaseException) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)


# --- connections -----------------------------------------------------------------------------------------------------

_LONGEST_WAIT = 1_000_000.0
"""Seconds. `poll` counts milliseconds in a C int, and Python 3.11 hands it what is left of a longer time."""

_POOLED_HOSTS = 32
"""Hosts to which a thread keeps a connection; a thread makes one call at a time."""


def _tls_context() -> ssl.SSLContext:
    context = create_urllib3_context()
    context.sslsocket_class = _TlsSocket
    # The machine's store has the operator's own authorities; slim images have no store.
    context.load_default_certs()
    context.load_verify_locations(certifi.where())
    return context


def _new_session(tls: ssl.SSLContext) -> requests.Session:
    session = _Session()
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(tls))
    return session


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """Hide redirects: to prepare the next request, `requests` would read and decompress the whole body of this one."""


class _Adapter(HTTPAdapter):
    """The way from `requests` to our connections."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        super().__init__(pool_connections=_POOLED_HOSTS, pool_maxsize=1)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **pool_kwargs: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._tls, **pool_kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing to do: the context verifies. The original would load the authorities again for every connection."""


class _Connection(HTTPConnection):
    """Connects within the connect timeout. An address guard belongs into `_open`, which sees every address before it is used."""

    def connect(self) -> None:
        if _active.run:
            _active.run.connecting, _active.run.reused = True, False
        super().connect()
        if _active.run:
            _active.run.connecting = False

    def _new_conn(self) -> socket.socket:
        return _open(self._dns_host, self.port or self.default_port, self.socket_options or ())


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def _open(host: str, port: int, options: Any) -> socket.socket:
    """A connected socket whose timeout is what is left for TLS. Each address gets its share of the time."""
    run = _active.run
    if run is None:
        raise OSError("a connection is opened only during a call")
    ends = min(time.monotonic() + run.connect_timeout, run.ends)
    addresses = _lookups.addresses(host.strip("[]"), port, within=_within(ends))
    failure: OSError = OSError("the name has no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        share = _within(ends, parts=len(addresses) - index)
        try:
            opened = _connected(_Socket(family, kind, protocol), address, options, timeout=share)
        except OSError as fault:
            failure = fault
            if run.aborted:
                break
        else:
            opened.settimeout(_within(ends))
            return opened
    raise failure


def _connected(opened: socket.socket, address: Any, options: Any, *, timeout: float) -> socket.socket:
    try:
        for option in options:
            opened.setsockopt(*option)
        opened.settimeout(timeout)
        if _active.run:
            _active.run.uses(opened)
        opened.connect(address)
    except BaseException:
        opened.close()
        raise
    return opened


def _within(ends: float, *, parts: int = 1) -> float:
    """A timeout that a socket takes: not 0, which means not to wait and raises another error, and not too long."""
    return min(max((ends - time.monotonic()) / parts, 0.001), _LONGEST_WAIT)


class _Socket(socket.socket):
    """Waits in no operation for longer than the call in progress has left."""

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        _limit(self)
        super().sendall(data, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        _limit(self)
        return _count(buffer, super().recv_into(buffer, nbytes, flags))


class _TlsSocket(ssl.SSLSocket):
    """The same for TLS, whose `sendall` calls `send`. The handshake has the socket's timeout as a whole."""

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        _limit(self)
        return super().send(data, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        _limit(self)
        return _count(buffer, super().recv_into(buffer, nbytes, flags))


def _limit(used: socket.socket) -> None:
    if _active.run:
        _active.run.uses(used)
        used.settimeout(_active.run.left())


def _count(buffer: WriteableBuffer, size: int) -> int:
    if _active.run:
        _active.run.receive(memoryview(buffer).cast("B")[:size])
    return size


class _Lookups:
    """Name lookups with a time limit.

    `getaddrinfo` cannot be interrupted, so it runs in a thread that may outlive the call. Calls that wait for the same
    name share one thread, so a dead name server costs a thread for a name, not for a call.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget lookups in progress: a forked process does not have their threads."""
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], Future[list[Any]]] = {}

    def addresses(self, host: str, port: int, *, within: float) -> list[Any]:
        """As `getaddrinfo` gives them. Raises TimeoutError, gaierror, or UnicodeError for a name that cannot be one."""
        with suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return self._lookup(host, port).result(within)

    def _lookup(self, host: str, port: int) -> Future[list[Any]]:
        with self._lock:
            if (host, port) not in self._running:
                future: Future[list[Any]] = Future()
                try:
                    threading.Thread(target=self._work, args=(host, port, future), name=f"lookup {host}", daemon=True).start()
                except RuntimeError as fault:
                    raise OSError(errno.EAGAIN, "no thread for a name lookup") from fault
                self._running[host, port] = future
            return self._running[host, port]

    def _work(self, host: str, port: int, future: Future[list[Any]]) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except BaseException as fault:
            self._forget(host, port)
            future.set_exception(fault)
        else:
            self._forget(host, port)
            future.set_result(found)

    def _forget(self, host: str, port: int) -> None:
        with self._lock:
            self._running.pop((host, port), None)


_lookups = _Lookups()
os.register_at_fork(after_in_child=_lookups.reset)


# --- logs ------------------------------------------------------------------------------------------------------------


def _not_during_a_call(_record: logging.LogRecord) -> bool:
    return _active.run is None


for _name in ("connection", "connectionpool", "poolmanager", "response", "util.retry"):
    # They write URLs, which may hold secrets, into the log: at level debug each one, at level warning where headers are odd.
    logging.getLogger(f"urllib3.{_name}").addFilter(_not_during_a_call)
