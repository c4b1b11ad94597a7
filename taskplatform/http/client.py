"""Sends calls, within a deadline, and follows their redirects."""

from __future__ import annotations

import codecs
import errno
import http.client
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import urljoin

import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from taskplatform.addresses import AllowList
from taskplatform.errors import HttpError
from taskplatform.http.calls import (
    NOT_IN_URL,
    PLATFORM_HEADERS,
    URL,
    USER_AGENT,
    Call,
    Outcome,
    OutcomeKind,
    RefusedError,
    classify,
    parse_retry_after,
)
from taskplatform.http.connections import Run, active, new_session, tls_context
from taskplatform.http.redaction import holds_secret, redact, without_begun_secret
from taskplatform.model import format_duration
from taskplatform.signing import SIGNATURE_HEADERS

MAX_REDIRECTS = 5

_DEFAULT_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}


class CallAborted(HttpError):
    """Another thread broke the call off."""


class Abort:
    """Lets another thread break off one call, before it begins or while it is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fired = False
        self._run: Run | None = None
        self._over = False

    def fire(self) -> bool:
        """Break the call off; one that has not begun will not. False when it had ended by itself. Said twice is once."""
        with self._lock:
            if not self._over:
                self._fired = True
                if self._run is not None:
                    self._run.abort()
            return self._fired

    def _begin(self, run: Run) -> None:
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

    def __init__(
        self,
        *,
        connect_timeout: timedelta,
        max_response: int,
        excerpt: int,
        max_retry_after: timedelta = timedelta(hours=1),
        allowed: AllowList | None = None,
    ) -> None:
        """`connect_timeout` is for DNS, TCP and TLS of one connection, `max_response` in bytes, `excerpt` in characters.

        `max_retry_after` is how long a target can ask to be left alone. `allowed` is what calls may go to, by default only the
        public internet.
        """
        self._connect_timeout = connect_timeout
        self._max_response = max_response
        self._excerpt = excerpt
        self._max_retry_after = max_retry_after
        self._allowed = allowed or AllowList()
        self._tls = tls_context()
        self._own = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()

    def send(self, call: Call, *, deadline: timedelta, abort: Abort | None = None) -> Outcome:
        """Make the call, its redirects included, within `deadline`. Raises CallAborted when `abort` was fired before its end.

        It raises for nothing that the network or the target does. An exception that a signal raises meanwhile, such as a
        soft time limit, passes through and leaves no connection in an unknown state.
        """
        started = time.monotonic()
        run = Run(ends=started + deadline.total_seconds(), connect_timeout=self._connect_timeout.total_seconds(), allowed=self._allowed)
        timed_out = False
        active.run = run
        if abort is not None:
            abort._begin(run)
        try:
            kind, reason = self._follow(call, run)
        except RefusedError as refusal:
            kind, reason = OutcomeKind.FAILED, str(refusal)
        except _FAULTS as fault:
            kind = OutcomeKind.RETRY
            reason, timed_out = _explain(fault, run, deadline=deadline, connect_timeout=self._connect_timeout)
        finally:
            active.run = None
            broken_off = abort is not None and abort._end()
        if broken_off:
            raise CallAborted("broken off")
        return Outcome(
            kind=kind,
            reason=redact(reason, call.secrets),
            status=run.status,
            duration_ms=round((time.monotonic() - started) * 1000),
            excerpt=_excerpt(run, secrets=call.secrets, length=self._excerpt),
            retry_after=self._retry_after(run) if kind is OutcomeKind.RETRY else None,
            timed_out=timed_out,
        )

    def close(self) -> None:
        """Close the pooled connections of all threads. Not while a call is in progress."""
        for session in list(self._sessions):
            session.close()

    def _retry_after(self, run: Run) -> timedelta | None:
        return parse_retry_after(run.retry_after, now=run.date or datetime.now(UTC), longest=self._max_retry_after)

    def _follow(self, call: Call, run: Run) -> tuple[OutcomeKind, str]:
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
            run.redirected, run.after_public = True, run.after_public or run.at_public
        raise RefusedError(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, request: requests.PreparedRequest, run: Run) -> requests.Response:
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

    def _request_once(self, request: requests.PreparedRequest, run: Run) -> requests.Response:
        run.begin_request()
        # The sockets keep the deadline. This timeout is for one that would not be ours.
        response = self._session(after_public=run.after_public).send(request, stream=True, timeout=run.left(), allow_redirects=False)
        if not run.head_ended:
            response.close()
            # http.client takes the end of the connection for the end of the headers, and the answer for a complete one
            raise http.client.IncompleteRead(b"")
        return response

    def _session(self, *, after_public: bool) -> requests.Session:
        """This thread's session. A forked process must not speak on its parent's connections, so it gets new ones.

        What a public target redirects to has a session of its own, because less is allowed for its connections.
        """
        if getattr(self._own, "pid", None) != os.getpid():
            self._own.sessions, self._own.pid = {}, os.getpid()
        sessions: dict[bool, requests.Session] = self._own.sessions
        if after_public not in sessions:
            sessions[after_public] = new_session(self._tls)
            self._sessions.add(sessions[after_public])
        return sessions[after_public]


# --- requests and redirects ------------------------------------------------------------------------------------------


def _read(response: requests.Response, run: Run, *, limit: int) -> None:
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
        if URL.fullmatch(url):
            request.prepare(call.method, url, headers=CaseInsensitiveDict({**_DEFAULT_HEADERS, **headers}), data=call.body)
            return request
    except (requests.RequestException, ValueError):
        pass
    raise RefusedError("not a valid request" if url == call.url else "redirect to a URL that is not accepted")


def _redirect_target(method: str, url: str, response: requests.Response) -> str | None:
    """Where to go on with the same method and body; None if the answer is final. Raises RefusedError."""
    status, location = response.status_code, response.headers.get("Location")
    if location is None or status not in (301, 302, 303, 307, 308):
        return None
    if method not in ("GET", "HEAD") and status not in (307, 308):
        raise RefusedError(f"HTTP {status}: a redirect that would turn {method} into GET is not followed")
    try:
        # http.client gives header bytes as Latin-1; servers mean UTF-8
        target = urljoin(url, location.encode("latin-1").decode("utf-8"))
    except ValueError:
        target = ""
    parts = URL.fullmatch(target)
    if not parts or parts["userinfo"] is not None or NOT_IN_URL.search(target):
        raise RefusedError(f"HTTP {status}: redirect to a URL that is not accepted")
    if url.lower().startswith("https:") and parts["scheme"].lower() != "https":
        raise RefusedError(f"HTTP {status}: redirect from https to http is not followed")
    return target


def _crosses(url: str, target: str) -> bool:
    """Whether the target is another server: another host or port, but for the step from http to https on their usual ports."""
    (host, port), (new_host, new_port) = _authority(url), _authority(target)
    return host != new_host or (port != new_port and (port, new_port) != (80, 443))


def _authority(url: str) -> tuple[str, int]:
    parts = URL.fullmatch(url)
    assert parts
    return parts["host"].lower(), int(parts["port"] or (443 if parts["scheme"].lower() == "https" else 80))


def _without_credentials(headers: Mapping[str, str], call: Call) -> dict[str, str]:
    """The headers that another server may see. Raises RefusedError if the body is not for it."""
    if call.body and holds_secret(call.body.decode("utf-8", "replace"), call.secrets):
        raise RefusedError("redirect to another host is not followed: the body holds a value from the environment")
    dropped = {"authorization", "cookie", "host", "proxy-authorization", *SIGNATURE_HEADERS}
    return {
        name: value
        for name, value in headers.items()
        if name.lower() in PLATFORM_HEADERS or (name.lower() not in dropped and not holds_secret(value, call.secrets))
    }


def _excerpt(run: Run, *, secrets: tuple[str, ...], length: int) -> str:
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
        text = without_begun_secret(text, secrets)
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:length]


# --- what went wrong -------------------------------------------------------------------------------------------------

_FAULTS = (OSError, ValueError, http.client.HTTPException, urllib3.exceptions.HTTPError)
"""What the network or a target can make `requests`, urllib3 and http.client raise; `requests` makes its own from OSError."""

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "host name cannot be resolved"),
    (UnicodeError, "host name cannot be resolved"),
    (ssl.SSLError, "TLS failed"),
    (ConnectionRefusedError, "connection refused"),
    (http.client.RemoteDisconnected, "connection closed without an answer"),
    (ConnectionError, "connection reset"),
    (http.client.IncompleteRead, "answer is cut off"),
    (http.client.HTTPException, "answer is not HTTP"),
    (urllib3.exceptions.InvalidHeader, "answer is not HTTP"),
)


_CERTIFICATE_FAULTS = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its authority is not known",
    20: "its authority is not known",
    21: "its authority is not known",
    62: "it is for another host name",
    64: "it is for another address",
}
"""By OpenSSL's X509_V_ERR codes. Its own texts hold names of the URL."""


def _explain(fault: BaseException, run: Run, *, deadline: timedelta, connect_timeout: timedelta) -> tuple[str, bool]:
    """The reason in our own words, since messages of libraries hold the URL; and whether it is that time ran out."""
    if time.monotonic() >= run.ends:
        return f"deadline of {format_duration(deadline)} exceeded", True
    causes = list(_causes(fault))
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return (f"no connection within {format_duration(connect_timeout)}" if run.connecting else "connection timed out"), True
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = _CERTIFICATE_FAULTS.get(cause.verify_code)
            return "TLS certificate is not accepted" + (f": {why}" if why else ""), False
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
