"""Fills a definition's templates for one job."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, unquote

from requests.structures import CaseInsensitiveDict

from taskplatform.errors import InvalidInput
from taskplatform.http.calls import FRAMING_HEADERS, NOT_IN_URL, PLATFORM_HEADERS, URL, USER_AGENT, Call
from taskplatform.model import HttpConfig
from taskplatform.signing import key_forms, signed, signing_key

_PIECE = re.compile(r"\$\{(?P<env>[A-Za-z_][A-Za-z0-9_]*)\}|\{\{\s*(?P<job>user|job_id|params\.[A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_NOT_IN_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_JOB_MARK = "\0"


def render(
    config: HttpConfig,
    *,
    job_id: str,
    user: str,
    definition: str,
    params: Mapping[str, Any],
    environment: Mapping[str, str],
    now: float | None = None,
) -> Call:
    """Fill a definition's `${NAME}` from `environment`, and `{{user}}`, `{{job_id}}` and `{{params.x}}` from the job.

    Values of the environment are the operator's and go in as they are. Values of the job are percent-encoded in the URL
    and in a form body and escaped in a JSON body. A string of a JSON body that is exactly one `{{params.x}}` becomes the
    parameter itself, of whatever type. Where the definition asks for it, the call is signed for this attempt: `now` is its time in
    seconds since the epoch, by default this moment by the clock of this machine, which may be wrong.

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
    if config.sign:
        timestamp = int(time.time() if now is None else now)
        headers.update(signed(job_id, timestamp=timestamp, body=body or b"", keys=[values.key(name) for name in config.secret_names]))
    return Call(config.method, url, dict(headers), body, tuple(value for value in values.secrets if value))


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

    def key(self, name: str) -> bytes:
        """What the variable's secret signs with. The key's own forms are secrets too."""
        secret = self._variable(name, "sign")
        try:
            self.secrets.update(dict.fromkeys(key_forms(secret)))
            return signing_key(secret)
        except ValueError as fault:
            raise InvalidInput(f"sign: environment variable {name} {fault}") from None

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
    parts, marked = URL.fullmatch(url), URL.fullmatch(shape)
    if not parts or not marked or NOT_IN_URL.search(url) or not _is_unicode(url) or int(parts["port"] or 0) > 65535:
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
