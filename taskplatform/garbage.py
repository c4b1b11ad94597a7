"""What in a broker's queue is no message that a worker can take.

Anything can be pushed into a queue. Celery reads a message in its worker's main loop, and much of what it does not expect there ends
the process. So each message is looked at before Celery sees it.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from celery.utils.time import maybe_iso8601
from kombu.utils.json import loads

from taskplatform.message import is_job

_JSON = "application/json"
_MOST_REASON = 300
#: As kombu calls what its `gzip` makes, which is zlib's format.
_GZIP = ("application/x-gzip", "gzip", "zlib")
_MOST_BYTES = 16 * 2**20
#: Lua's numbers are exact up to here.
_MOST_DELIVERIES = 2**53


class _Garbage(Exception):
    """Says what is wrong."""


def fault_in(raw: bytes | str) -> str | None:
    """What keeps a worker from taking what came out of a queue; None where it can. Never raises.

    It takes the messages of jobs, as the release script makes them, and what Celery's protocol 2 sends for other tasks, in JSON.
    """
    try:
        _check(_message(raw))
    except _Garbage as fault:
        return _plain(str(fault))
    except Exception as fault:  # whatever a decoder makes of what it is given
        return _plain(f"cannot be read: {type(fault).__name__}: {fault}")
    return None


def _plain(reason: str) -> str:
    return reason.encode("utf-8", "backslashreplace").decode()[:_MOST_REASON]


def _message(raw: bytes | str) -> Mapping[str, Any]:
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as fault:
        raise _Garbage(f"not UTF-8: {fault.reason} at byte {fault.start}") from None
    try:
        message = loads(text)
    except (ValueError, RecursionError) as fault:
        raise _Garbage(f"not JSON: {fault}") from None
    if not isinstance(message, dict):
        raise _Garbage(f"JSON, but not an object: {type(message).__name__}")
    if "\\ud" in text.lower():
        # half of a surrogate pair is text for Python and cannot be sent on
        json.dumps(message, ensure_ascii=False, default=str).encode()
    return message


def _check(message: Mapping[str, Any]) -> None:
    headers = _take(message, "headers", _is_object, "an object")
    properties = _take(message, "properties", _is_object, "an object")
    _check_headers(headers)
    _check_properties(properties)
    payload = _check_body(message, headers, properties)
    delivery = headers.get("delivery")
    if delivery is not None or is_job(properties["delivery_tag"]):
        _check_job(headers, delivery, properties["delivery_tag"])
        _check_nothing_added(headers, payload)


def _check_headers(headers: Mapping[str, Any]) -> None:
    for name in ("task", "id"):
        _take(headers, name, _is_name, "text that is not empty", "header")
    for name in ("root_id", "parent_id", "group", "shadow", "argsrepr", "kwargsrepr", "origin", "compression"):
        _take(headers, name, _or_none(_is_text), "text or null", "header")
    for name in ("retries", "group_index", "replaced_task_nesting"):
        _take(headers, name, _or_none(_is_count), "a whole number or null", "header")
    for name in ("eta", "expires"):
        _take(headers, name, _or_none(_is_time), "a time in ISO 8601 or null", "header")
    _take(headers, "timelimit", _or_none(_are_limits), "two numbers of seconds, each may be null", "header")
    _take(headers, "stamped_headers", _or_none(_are_texts), "a list of text or null", "header")
    _take(headers, "stamps", _or_none(_is_object), "an object or null", "header")


def _check_properties(properties: Mapping[str, Any]) -> None:
    _take(properties, "delivery_tag", _is_name, "text that is not empty", "property")
    info = _take(properties, "delivery_info", _is_object, "an object", "property")
    _take(info, "exchange", _is_text, "text", "delivery_info")
    _take(info, "routing_key", _is_name, "text that is not empty", "delivery_info")
    _take(properties, "priority", _or_none(_is_count), "a whole number or null", "property")
    for name in ("correlation_id", "reply_to"):
        _take(properties, name, _or_none(_is_text), "text or null", "property")


def _check_body(message: Mapping[str, Any], headers: Mapping[str, Any], properties: Mapping[str, Any]) -> list[Any]:
    """Returns its three parts."""
    _take(message, "content-type", lambda value: value == _JSON, _JSON)
    _take(message, "content-encoding", _or_none(_is_text), "text or null")
    body = _take(message, "body", _is_text, "text")
    encoding = properties.get("body_encoding")
    if encoding == "base64":
        try:
            content = base64.b64decode(body, validate=True)
        except ValueError as fault:
            raise _Garbage(f"body: not base64: {fault}") from None
        if headers.get("compression"):
            content = _unpacked(content, headers["compression"])
    elif encoding in (None, "", "utf-8") and not headers.get("compression"):
        content = body.encode()
    else:
        raise _Garbage(f"property body_encoding: {_shown(encoding)}: base64 is expected, or none where nothing is compressed")
    try:
        payload = loads(content)
    except (ValueError, RecursionError) as fault:
        raise _Garbage(f"body: not JSON: {fault}") from None
    if not isinstance(payload, list) or len(payload) != 3:
        raise _Garbage("body: not a list of arguments, named arguments and options")
    args, kwargs, embed = payload
    if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict | None)):
        raise _Garbage("body: not a list of a list, an object and an object")
    return payload


def _unpacked(content: bytes, compression: str) -> bytes:
    """Not further than a body may be long: a few kilobytes can hold more than the worker has memory."""
    if compression not in _GZIP:
        raise _Garbage(f"header compression: {_shown(compression)}: {_GZIP[0]} is expected")
    unpacker = zlib.decompressobj()
    body = unpacker.decompress(content, _MOST_BYTES)
    if unpacker.unconsumed_tail:
        raise _Garbage(f"body: unpacks to more than {_MOST_BYTES // 2**20} MB")
    if not unpacker.eof:
        raise _Garbage("body: its compressed form is cut off")
    return body


def _check_job(headers: Mapping[str, Any], delivery: object, tag: str) -> None:
    job_id, task = headers["id"], headers["task"]
    if not (_is_count(delivery) and 0 < delivery < _MOST_DELIVERIES):  # type: ignore[operator]
        raise _Garbage(f"header delivery: {_shown(delivery)}: the number of a job's delivery is expected")
    if tag != f"{job_id}#{delivery}":
        raise _Garbage(f"property delivery_tag: {_shown(tag)}: {_shown(f'{job_id}#{delivery}')} is expected")
    if job_id.partition(":")[0] != task:
        raise _Garbage(f"header id: {_shown(job_id)} is no job of {_shown(task)}")


def _check_nothing_added(headers: Mapping[str, Any], payload: list[Any]) -> None:
    """A job's message only names it. More, which Celery would act upon, comes from somebody who cannot write the ledger."""
    args, kwargs, embed = payload
    user = headers["id"].split(":")[1:2]
    if args or [*kwargs.items()] != [("user", one) for one in user]:
        raise _Garbage(f"body: {_shown([args, kwargs])}: the job's user alone is expected; parameters are in the ledger")
    added = [name for name, value in (embed or {}).items() if value] + [name for name in ("eta", "expires") if headers.get(name)]
    if added:
        raise _Garbage(f"{_shown(added[0])} is given, which no job's message has")


def _take(values: Mapping[str, Any], name: str, is_good: Callable[[Any], bool], expected: str, what: str = "") -> Any:
    value = values.get(name)
    if not is_good(value):
        raise _Garbage(f"{what} {name}: {_shown(value)}: {expected} is expected".lstrip())
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _or_none(is_good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_good(value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_limits(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_or_none(_is_span), value))


def _is_span(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_time(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        moment = maybe_iso8601(value)
    except ValueError:
        return False
    # at the ends of the calendar a change of zone overflows
    return isinstance(moment, datetime) and 1 < moment.year < 9999
