"""Calls of the control API: bounded in time and size, repeated where that is safe, and their problems as the platform's own errors.

A POST carries an `Idempotency-Key` of its own, so that it can be sent again when its answer was lost and does its work once. GET, PUT and
PATCH are the same the second time by themselves. A DELETE whose answer was lost is not sent again: the second answer would be "not
found". What the API answers with 429 or 503 is asked again after `Retry-After`, for as long as `_MOST_WAITING` in all.

The key goes to the API alone: redirects are not followed, and plain HTTP is refused but to a loopback address.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError as TransportError

from taskplatform import errors
from taskplatform.errors import (
    ApiError,
    ApiUnavailable,
    Conflict,
    Forbidden,
    InvalidInput,
    Outage,
    SettingsError,
    TaskPlatformError,
)

#: Seconds to connect, between two bytes of an answer, and for a whole answer.
_CONNECT, _READ, _ANSWER = 10.0, 60.0, 120.0
_MOST_BYTES = 64 * 1024 * 1024
_ATTEMPTS = 4
#: Seconds that a call waits in all, however often it is told to come again.
_MOST_WAITING = 15.0
_KEY = re.compile(r"[!-~]{1,256}")
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")
_REPEATABLE = frozenset({"GET", "PUT", "PATCH", "POST"})
_CHANGED = "Taskplatform-Changed"

#: The platform's errors by the `kind` of a problem.
_KINDS: dict[str, type[TaskPlatformError]] = {
    "invalid_input": InvalidInput,
    "unknown_definition": errors.UnknownDefinition,
    "unknown_user": errors.UnknownUser,
    "unknown_subscription": errors.UnknownSubscription,
    "unknown_job": errors.UnknownJob,
    "unknown_worker": errors.UnknownWorker,
    "unknown_backfill": errors.UnknownBackfill,
    "conflict": Conflict,
    "invalid_transition": errors.InvalidTransition,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A success."""

    body: Any
    """Its JSON; None for an empty one."""
    changed: bool
    """Whether the call changed something, where the API says so."""


class _Bearer(AuthBase):
    """An object of its own, so that requests does not look for another login in ~/.netrc."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class ApiClient:
    """Calls one API with one key. Not for several threads at a time."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        ca: Path | None = None,
        client_cert: Path | None = None,
        client_key: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`ca` replaces the usual CAs. Raises SettingsError for a URL, a key or files that cannot be used."""
        self.url = check_url(url)
        self._sleep = sleep
        self._session = requests.Session()
        self._session.mount("https://", HTTPAdapter(max_retries=0))
        self._session.headers.update({"Accept": "application/json", "User-Agent": "taskplatform-cli"})
        self._session.auth = _Bearer(check_key(key))
        if client_key is not None and client_cert is None:
            raise SettingsError("the key of a client certificate is given without the certificate")
        _check_files(ca, client_cert, client_key)
        # given with each call: else REQUESTS_CA_BUNDLE would win over it
        self._verify: str | bool = True if ca is None else str(ca)
        self._cert = None if client_cert is None else str(client_cert) if client_key is None else (str(client_cert), str(client_key))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def call(self, method: str, path: str, body: object = None, *, query: Mapping[str, object] | None = None) -> Answer:
        """What the API answers. `path` is quoted already, and follows /v1.

        Raises InvalidInput, NotFound, Conflict, Forbidden as the platform does, ApiUnavailable and ApiError.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            try:
                data = json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
            except (TypeError, ValueError, RecursionError) as fault:
                raise InvalidInput(f"not JSON: {fault}") from None
        given = {name: value for name, value in (query or {}).items() if value is not None}
        waited = 0.0
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                status, answer_headers, content = self._send(method, f"{self.url}/v1{path}", data, headers, given)
            except _Lost as fault:
                if method not in _REPEATABLE:
                    raise ApiUnavailable(
                        f"{fault}; what was asked for may have been done all the same: look before you repeat it"
                    ) from None
                if attempt == _ATTEMPTS:
                    raise ApiUnavailable(str(fault)) from None
                pause = 0.25 * 2**attempt
            else:
                if 200 <= status < 300:
                    return Answer(_json(content, self.url) if content else None, answer_headers.get(_CHANGED) == "true")
                problem = _problem(content)
                pause = _pause(status, answer_headers, problem)
                if pause == 0 or waited + pause > _MOST_WAITING or attempt == _ATTEMPTS:
                    self._refuse(status, answer_headers, problem)
            waited += pause
            self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _send(
        self, method: str, url: str, data: bytes | None, headers: Mapping[str, str], query: Mapping[str, object]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body. Raises _Lost when it may have been done, ApiUnavailable when it was not."""
        with self._translated():
            answer = self._session.request(
                method,
                url,
                data=data,
                headers=dict(headers),
                params=dict(query),  # type: ignore[arg-type]
                timeout=(_CONNECT, _READ),
                allow_redirects=False,
                stream=True,
                verify=self._verify,
                cert=self._cert,
            )
            with answer:
                return answer.status_code, answer.headers, self._content(answer)

    def _content(self, answer: requests.Response) -> bytes:
        deadline, found = time.monotonic() + _ANSWER, bytearray()
        for chunk in answer.iter_content(65_536):
            found += chunk
            if len(found) > _MOST_BYTES:
                raise ApiError(f"{self.url} answers with more than {_MOST_BYTES:,} bytes: is it the control API?")
            if time.monotonic() > deadline:
                raise _Lost(f"the API at {self.url} did not end its answer within {_ANSWER:g} s")
        return bytes(found)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What requests raises, as our own. Its texts name objects of Python, and are no use to a reader."""
        try:
            yield
        except requests.exceptions.SSLError as fault:
            raise ApiUnavailable(f"the API at {self.url} is not trusted: {_reason(fault)}", Outage.UNTRUSTED) from None
        except requests.exceptions.ProxyError as fault:
            raise ApiUnavailable(f"the API at {self.url} cannot be reached through the proxy: {_reason(fault)}") from None
        except requests.exceptions.ConnectTimeout:
            raise ApiUnavailable(f"the API at {self.url} cannot be reached: no connection within {_CONNECT:g} s") from None
        except requests.exceptions.Timeout:
            raise _Lost(f"the API at {self.url} did not answer within {_READ:g} s") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as fault:
            reason = _reason(fault)
            if "NewConnectionError" in repr(fault) or "NameResolutionError" in repr(fault):
                raise ApiUnavailable(f"the API at {self.url} cannot be reached: {reason}") from None
            raise _Lost(f"the API at {self.url} closed the connection without an answer: {reason}") from None
        except (requests.exceptions.RequestException, TransportError, OSError, ValueError) as fault:
            raise ApiError(f"the API at {self.url} cannot be asked: {_reason(fault)}") from None

    def _refuse(self, status: int, headers: Mapping[str, str], problem: Mapping[str, Any] | None) -> NoReturn:
        """Raise what a problem is."""
        if 300 <= status < 400:
            raise ApiError(f"{self.url} answers that the API is elsewhere, at {headers.get('Location', '?')[:200]!r}: give that URL")
        if problem is None:
            raise ApiError(f"{self.url} answers {status}, and not as the control API does")
        text, kind = _text(problem), str(problem.get("kind", ""))
        match status:
            case 401:
                raise ApiError(f"the API at {self.url} does not accept the key: it is wrong, expired or revoked")
            case 403:
                raise Forbidden(text)
            case 429:
                raise ApiError(f"the API at {self.url} does not accept the key, and others before it: try again in {_after(headers)} s")
            case 404 if kind in _KINDS:
                raise _KINDS[kind](text)
            case 404 | 405:
                raise ApiError(f"the API at {self.url} does not know this call: it is of another version, or the URL has a path too many")
            case 400 | 413 | 415 | 422:
                raise _KINDS.get(kind, InvalidInput)(text)
            case 409:
                raise _KINDS.get(kind, Conflict)(text)
            case 503 if "outage" in problem:
                raise ApiUnavailable(text, _outage(problem["outage"]))
            case 502 | 503 | 504:
                raise ApiUnavailable(f"the API at {self.url} cannot be used for now: {text}")
        raise ApiError(f"the API at {self.url} answers {status}: {text}")


class _Lost(Exception):
    """No answer came to what was sent."""


def error_of(problem: Mapping[str, Any]) -> TaskPlatformError:
    """The error of one of a batch."""
    return _KINDS.get(str(problem.get("kind", "")), InvalidInput)(_text(problem))


def check_url(url: str) -> str:
    """The URL of an API without a slash at its end. Raises SettingsError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    shown = url.rpartition("@")[2][:200]
    if parts.scheme not in ("https", "http") or not host or port == 0 or not url.isprintable():
        raise SettingsError(f"the URL of the API {shown!r} is not accepted: such as https://host:8443 is")
    if parts.username is not None or parts.query or parts.fragment:
        raise SettingsError(
            f"the URL of the API {shown!r} is not accepted: without user, query and fragment it is; the key goes into a file"
        )
    if parts.scheme == "http" and not _LOOPBACK.fullmatch(host):
        raise SettingsError(f"the URL of the API {shown!r} is not accepted: over plain HTTP the key could be read on the way; https://… is")
    return url.rstrip("/").removesuffix("/v1")


def check_key(key: str) -> str:
    """The key itself. Raises SettingsError, without it."""
    if not _KEY.fullmatch(key):
        raise SettingsError("the key of the API is not accepted: 1 to 256 characters ! to ~ of ASCII are, without spaces")
    return key


def _check_files(*files: Path | None) -> None:
    """requests says of a file that cannot be read that it is an "invalid path"."""
    for path in filter(None, files):
        try:
            path.open("rb").close()
        except OSError as fault:
            raise SettingsError(f"{path} cannot be read: {fault.strerror}") from None


def _reason(fault: BaseException) -> str:
    """The last cause that says something in words."""
    found, seen = "", fault
    while seen is not None:
        strerror = getattr(seen, "strerror", None) or getattr(seen, "verify_message", None)
        if strerror:
            found = str(strerror)
        inner = [one for one in (*seen.args, getattr(seen, "reason", None)) if isinstance(one, BaseException) and one is not seen]
        following = seen.__cause__ or (inner[0] if inner else None) or seen.__context__
        if following is None and not found:
            found = str(seen).rpartition(": ")[2] or type(seen).__name__
        seen = following  # type: ignore[assignment]
    return found


def _json(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ApiError(f"{url} does not answer in JSON: is it the control API?") from None


def _problem(content: bytes) -> Mapping[str, Any] | None:
    """Problem details; None where it is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "status" in found and "title" in found else None


def _text(problem: Mapping[str, Any]) -> str:
    """What it says: the platform's own words, or what is wrong with each field."""
    detail = str(problem.get("detail") or problem.get("title") or "no reason given")
    faults = problem.get("errors")
    if problem.get("kind") or not isinstance(faults, list):
        return detail
    lines = []
    for fault in faults:
        where = str(fault.get("pointer") or fault.get("parameter") or "").strip("/").replace("/", ".")
        lines.append(f"{where}: {fault.get('detail')}" if where else str(fault.get("detail")))
    return "\n".join(lines) or detail


def _pause(status: int, headers: Mapping[str, str], problem: Mapping[str, Any] | None) -> float:
    """Seconds after which to ask again; 0: not at all."""
    if problem is not None and "outage" in problem:
        return 0.0  # whoever asks Redis directly is told at once, too
    if status in (429, 503) or (status == 409 and "Retry-After" in headers):
        return _after(headers)
    return 1.0 if status in (502, 504) else 0.0


def _after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.1, float(headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0


def _outage(name: object) -> Outage:
    try:
        return Outage(str(name))
    except ValueError:
        return Outage.UNREACHABLE
