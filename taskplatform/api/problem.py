"""Errors as problem details (RFC 9457): every answer of the API that is no result is one.

`of` is the one table of which of the platform's errors is which status. What nobody foresaw is a 500 that tells nothing but an id, under
which the log has the rest.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from taskplatform.errors import Conflict, InvalidInput, NotFound, StoreUnavailable, TaskPlatformError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
#: After so many seconds a caller may try again what failed because Redis was away, or too many called.
RETRY_SECONDS = 3


class Problem(Exception):
    """What is answered instead of a result: `status`, and in the body `title`, `detail` and what else there is to say."""

    def __init__(self, status: int, title: str, detail: str = "", *, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})
        self.more = more

    @property
    def body(self) -> bytes:
        """Its JSON."""
        found = {"type": "about:blank", "title": self.title, "status": self.status}
        if self.detail:
            found["detail"] = self.detail
        return json.dumps({**found, **self.more}, ensure_ascii=True).encode()

    @property
    def response(self) -> Response:
        """Itself as an answer."""
        return Response(self.body, self.status, self.headers, MEDIA_TYPE)


def with_status(status: int, detail: str = "", *, headers: Mapping[str, str] | None = None, **more: Any) -> Problem:
    """A problem whose title is what HTTP calls its status."""
    return Problem(status, HTTPStatus(status).phrase, detail, headers=headers, **more)


def invalid(faults: Sequence[tuple[str, str, str]], **more: Any) -> Problem:
    """A request that is understood and not accepted: for each fault "pointer" or "parameter", which one, and what is wrong with it."""
    (_, _, first), *others = faults
    detail = first if not others else f"{len(faults)} faults"
    return with_status(422, detail, errors=[{kind: where, "detail": what} for kind, where, what in faults], **more)


def pointer(place: Sequence[object]) -> str:
    """A JSON pointer (RFC 6901) to a place inside the body."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in place)


def of(fault: TaskPlatformError, request: Request | None = None) -> Problem:
    """What an error of the platform is."""
    text, kind = str(fault), kind_of(fault)
    match fault:
        case InvalidInput():
            where = _where(fault.field, request)
            return with_status(422, text, kind=kind) if where is None else invalid([(*where, text)], kind=kind)
        case NotFound():
            return with_status(404, text, kind=kind)
        case Conflict():
            return with_status(409, text, kind=kind)
        case StoreUnavailable():
            return with_status(503, text, headers={"Retry-After": str(RETRY_SECONDS)}, outage=str(fault.outage), kind=kind)
    return unforeseen(fault, "" if request is None else request_id(request.scope))


def kind_of(fault: TaskPlatformError) -> str:
    """What a program tells errors of the platform by: the class's name as words, such as unknown_user."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(fault).__name__).lower()


def unforeseen(fault: BaseException, id_: str) -> Problem:
    """What happened stands in the log, under the request's id."""
    log.error("request %s failed: %s", id_, type(fault).__name__, exc_info=fault)
    return with_status(500, f"this is a fault of the platform: its log has it under {id_}", instance=f"urn:taskplatform:request:{id_}")


def request_id(scope: Mapping[str, Any]) -> str:
    """The id of a request in log and answer."""
    return str(scope.get("taskplatform.request_id", ""))


def install(app: FastAPI) -> None:
    """Let every error be answered with a problem."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(TaskPlatformError, _on_platform_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_exception)


def _where(field: str, request: Request | None) -> tuple[str, str] | None:
    """Whether a field that is at fault is one of the body or a parameter."""
    if not field or request is None:
        return None
    if field in getattr(request.state, "body_fields", ()):
        return "pointer", pointer([field])
    return ("parameter", field) if field in request.path_params or field in request.query_params else None


async def _on_problem(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, Problem)
    return fault.response


async def _on_platform_error(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, TaskPlatformError)
    return of(fault, request).response


async def _on_bad_request(_: Request, fault: Exception) -> Response:
    """Of parameters; bodies are read by `Call.read`."""
    assert isinstance(fault, RequestValidationError)
    return invalid([("parameter", ".".join(map(str, one["loc"][1:])), one["msg"]) for one in fault.errors()]).response


async def _on_http_error(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    if fault.status_code == 404:
        return with_status(404, "there is nothing at this path; GET /v1/openapi.json tells what there is").response
    if fault.status_code == 405:
        allowed = ", ".join(_allowed(request))
        return with_status(405, f"{request.method} is not known here: {allowed}", headers={"Allow": allowed}).response
    return with_status(fault.status_code, str(fault.detail), headers=fault.headers).response


async def _on_exception(request: Request, fault: Exception) -> Response:
    return unforeseen(fault, request_id(request.scope)).response


def _allowed(request: Request) -> list[str]:
    """The methods of the path, over all routes: Starlette tells those of the first."""
    methods: set[str] = set()
    for route in request.app.state.routes:
        if isinstance(route, APIRoute) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)
