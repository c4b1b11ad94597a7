"""One call of the API: who makes it, what it brings, and what is answered.

Every route but those of security's OPEN_PATHS takes a `Call`, which says the scope that it takes: `Reads`, `Submits`, `Administers`. A key
without it is refused before the body is read.

A body is JSON, read strictly: a name twice in an object, NaN, a field that is not known or a number as text is refused, and the answer says
where. A parameter of the query that the route does not have is refused too: a filter that is misspelled would select everything.

`once` answers a POST with an `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): the first success is kept for the setting
`idempotency_retention` and answered again; another request with the same key is refused with 422, and one that comes while the first is
still being answered with 409. A call that failed leaves nothing, and may be made again. Keys of different names do not meet.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from taskplatform import tracing
from taskplatform.api.growth import Growth
from taskplatform.api.problem import invalid, kind_of, pointer, with_status
from taskplatform.api.security import note, requires
from taskplatform.errors import NotFound, StoreError
from taskplatform.faults import did_you_mean, explain
from taskplatform.keys import ApiKey, Scope
from taskplatform.platform import Platform

M = TypeVar("M", bound=BaseModel)

JSON = "application/json"
MAX_KEY_LENGTH = 255
#: On the answer to what changes something: whether it did, or it was so already.
CHANGED = "Taskplatform-Changed"
#: A claim on a key ends after this, should the process that made it die.
_HOLD = timedelta(minutes=2)
#: Of a longer answer only the fact is kept, and the call is made again: the platform's verbs give the same the second time.
_MOST_KEPT_BYTES = 16_384
_HEADERS_KEPT = ("location", CHANGED.lower())
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class Call:
    """One call, made by the holder of a key. Its methods may run in any thread."""

    def __init__(self, request: Request, key: ApiKey, body: bytes) -> None:
        self._request = request
        self.key = key
        self.body = body
        self.platform: Platform = request.app.state.platform.acting_as(f"api:{key.name}")
        self.growth: Growth = request.app.state.growth

    def read(self, model: type[M]) -> M:
        """The body as `model`. Raises Problem: 400 for what is no JSON, 415 for another media type, 422 with each fault and its place."""
        given = self._request.headers.get("content-type", "")
        if given.partition(";")[0].strip().lower() != JSON:
            raise with_status(415, f"the body has to be {JSON}, not {given[:100] or 'unnamed'}", headers={"Accept": JSON})
        _check_json(self.body)
        self._request.state.body_fields = frozenset(model.model_fields)
        try:
            return model.model_validate_json(self.body, strict=True)
        except ValidationError as fault:
            raise invalid([("pointer", pointer(place), text) for place, text in explain(fault, model)]) from None

    def traced(self) -> AbstractContextManager[None]:
        """What is submitted in here was asked for by the span that the request names."""
        return tracing.caused_by(self._request.headers.get(tracing.TRACEPARENT))

    def answer(self, record: BaseModel | None, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
        """`record` as an answer; None is an empty one."""
        if record is None:
            return Response(status_code=204, headers=dict(headers or {}))
        return Response(record.model_dump_json().encode(), status, dict(headers or {}), JSON)

    def changed(self, answer: Response, changed: bool) -> Response:
        """`answer`, which says whether something changed."""
        answer.headers[CHANGED] = "true" if changed else "false"
        return answer

    def note(self, **about: object) -> None:
        """Tell the audit log what the call is about, beside the ids in its path. No secrets; a list or None is told as it is read best."""
        for name, value in about.items():
            if value is not None:
                note(self._request, **{name: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)})

    @property
    def key_for_platform(self) -> str | None:
        """The caller's Idempotency-Key for the platform's own, which makes the same job or occurrence of the same key."""
        found = self._idempotency_key
        return None if found is None else f"api:{self._digest(found)}"

    @property
    def _idempotency_key(self) -> str | None:
        given = self._request.headers.getlist("idempotency-key")
        if not given:
            return None
        # the draft has a string in quotes, and most clients send one without
        text = given[0].strip()
        if len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1]
        if len(given) > 1 or not 0 < len(text) <= MAX_KEY_LENGTH or not text.isprintable():
            raise with_status(400, f"Idempotency-Key takes one text of 1 to {MAX_KEY_LENGTH} printable characters")
        return text

    def _digest(self, key: str) -> str:
        return hashlib.sha256(f"{self.key.name}\0{key}".encode()).hexdigest()

    def once(self, act: Callable[[], Response]) -> Response:
        """What `act` answers; with an Idempotency-Key what it answered the first time. Raises Problem: 409, 422."""
        key = self._idempotency_key
        if key is None:
            return act()
        digest, store = self._digest(key), self.platform.store
        url = self._request.url
        asked = f"{self._request.method} {url.path}?{url.query}\n".encode() + self.body
        print_ = hashlib.sha256(asked).hexdigest()
        before = store.claim_answer(digest, json.dumps({"asked": print_, "claim": secrets.token_hex(8)}), hold=_HOLD)
        if before is not None:
            kept = json.loads(before)
            if kept["asked"] != print_:
                raise with_status(422, "this Idempotency-Key was used for another request; a new request needs a new key")
            if "status" not in kept:
                raise with_status(409, "a request with this Idempotency-Key is just being answered", headers={"Retry-After": "1"})
            if kept["body"] is not None:
                headers = {**kept["headers"], "Idempotent-Replayed": "true"}
                self.note(answered="before", location=kept["headers"].get("location"))
                return Response(kept["body"].encode() or None, kept["status"], headers, kept["type"])
        try:
            answered = act()
        except BaseException:
            if before is None:
                store.forget_answer(digest)
            raise
        body = bytes(answered.body)
        headers = {name: answered.headers[name] for name in _HEADERS_KEPT if name in answered.headers}
        kept = {
            "asked": print_,
            "status": answered.status_code,
            "headers": headers,
            "type": answered.media_type,
            "body": body.decode() if len(body) <= _MOST_KEPT_BYTES else None,
        }
        self._keep(digest, json.dumps(kept))
        return answered

    def _keep(self, digest: str, answer: str) -> None:
        store = self.platform.store
        try:
            store.keep_answer(digest, answer, retention=self.platform.settings.idempotency_retention)
        except StoreError:
            # what was asked for is done, and the caller must hear it; the claim ends by itself, and a repetition makes the same
            return


@contextmanager
def in_body(**fields: type[NotFound]) -> Iterator[None]:
    """What a body names and is not there is a fault of that field, not a path that leads nowhere."""
    try:
        yield
    except NotFound as fault:
        for field, kind in fields.items():
            if isinstance(fault, kind):
                raise invalid([("pointer", pointer([field]), str(fault))], kind=kind_of(fault)) from None
        raise


def _calling(scope: Scope) -> Callable[..., Awaitable[Call]]:
    async def call(request: Request, key: ApiKey = Depends(requires(scope))) -> Call:  # noqa: B008
        _check_query(request)
        body = await request.body()
        route = request.scope["route"]
        if body.strip() not in (b"", b"{}") and not route.openapi_extra["x-takes-body"]:
            raise with_status(422, f"{request.method} {route.path} takes no body")
        return Call(request, key, body)

    return call


Reads = Annotated[Call, Depends(_calling(Scope.READ))]
Submits = Annotated[Call, Depends(_calling(Scope.SUBMIT))]
Administers = Annotated[Call, Depends(_calling(Scope.ADMIN))]


def _check_query(request: Request) -> None:
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = [field.alias for field in route.dependant.query_params]
    accepted = f"known are {', '.join(known)}" if known else "there are none here"
    faults = [
        ("parameter", name, f"is not a known parameter{did_you_mean(name, known)}; {accepted}")
        for name in dict.fromkeys(request.query_params.keys())
        if name not in known
    ]
    if faults:
        raise invalid(faults)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _check_json(body: bytes) -> None:
    """What pydantic's reader would let pass."""
    try:
        value = _DECODER.decode(body.decode("utf-8"))
        if _HALF_CHARACTER.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as fault:
        raise with_status(400, f"the body is not UTF-8: byte {fault.start + 1}") from None
    except UnicodeEncodeError:
        raise with_status(400, "the body holds half a surrogate pair, which is no Unicode text") from None
    except json.JSONDecodeError as fault:
        raise with_status(400, f"the body is not JSON: {fault.msg} at character {fault.pos + 1}") from None
    except (ValueError, RecursionError) as fault:
        raise with_status(400, f"the body is not JSON: {fault}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!r} is given twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
