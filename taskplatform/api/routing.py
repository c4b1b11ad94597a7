"""How routes are declared, so that each is documented as it behaves: its body, its answers, its problems, and an example of each."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import AwareDatetime, BaseModel
from pydantic.json_schema import models_json_schema

from taskplatform.api import problem
from taskplatform.api.call import JSON
from taskplatform.api.records import ProblemRecord
from taskplatform.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Response])

#: The most items of one page, and how many jobs a page may look at to find them.
MOST_ITEMS = 500
MOST_LOOKED_AT = 5000

PageSize = Annotated[int, Query(ge=1, le=MOST_ITEMS, description="items of a page, at the most")]
Cursor = Annotated[str | None, Query(min_length=1, max_length=1000, description="`next` of the page before")]
Since = Annotated[AwareDatetime | None, Query(description="not older than this")]
Until = Annotated[AwareDatetime | None, Query(description="not newer than this")]

_REFERENCE = "#/components/schemas/{model}"
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "The first success under a key is answered again to the same request, for a day unless set otherwise.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "example": "5f1c7c1e-8a52-4e0b-9d53-0a3c2f0d9f11",
}
#: Problems that any call with a key can have.
ALWAYS = (400, 401, 403, 408, 413, 422, 429, 500, 503)
#: For a route that is not declared here and takes no body.
WITHOUT_BODY = {"x-takes-body": False}
_WHY = {
    400: "It is no HTTP, no JSON, or the Idempotency-Key is none.",
    401: "There is no key, or it is wrong, expired or revoked.",
    403: "The key has not the scope that this takes.",
    404: "What the path or the query names is not there.",
    408: "The request did not arrive in time.",
    409: "The state of the thing forbids it, or a request with the same Idempotency-Key is just being answered.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "Something in it is not accepted; `errors` says where.",
    429: "Too many wrong keys came from this address; Retry-After says when to try again.",
    500: "A fault of the platform; its log has it under the id in `instance`.",
    503: "Redis cannot be used for now, or too much is asked at a time; Retry-After says when to try again.",
}


class Routes:
    """Declares routes on a router. All that is declared here takes a key."""

    def __init__(self, tag: str) -> None:
        self.router = APIRouter(prefix="/v1", tags=[tag])

    def __call__(
        self,
        method: str,
        path: str,
        gives: type[BaseModel] | None,
        *,
        takes: type[BaseModel] | None = None,
        status: int = 200,
        faults: tuple[int, ...] = (),
    ) -> Callable[[F], F]:
        """A route that answers with `gives` (None: with nothing), takes a body, and has these problems beside those of all."""
        problems = sorted({*ALWAYS, *faults, *((415,) if takes else ()), *((409,) if method == "POST" else ())})
        extra: dict[str, Any] = {}
        if takes is not None:
            reference = {"$ref": _REFERENCE.format(model=takes.__name__)}
            extra["requestBody"] = {"required": True, "content": {JSON: {"schema": reference}}}
            _TAKEN.add(takes)
        if method == "POST":
            extra["parameters"] = [_IDEMPOTENCY_KEY]
        return self.router.api_route(
            path,
            methods=[method],
            status_code=204 if gives is None else status,
            response_model=gives,
            response_class=Response if gives is None else JSONResponse,
            responses={code: problem_response(code) for code in problems},
            openapi_extra={**extra, "x-takes-body": takes is not None},
        )


#: The models of bodies, which FastAPI does not see.
_TAKEN: set[type[BaseModel]] = set()


def problem_response(status: int) -> dict[str, Any]:
    """How a problem is documented."""
    title = HTTPStatus(status).phrase
    example: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": _WHY[status]}
    if status == 422:
        example["errors"] = [{"pointer": "/user", "detail": "no user 'nobody'"}]
    schema = {"$ref": _REFERENCE.format(model=ProblemRecord.__name__)}
    return {"description": _WHY[status], "content": {problem.MEDIA_TYPE: {"schema": schema, "example": example}}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags)
    models = [(model, "validation") for model in sorted(_TAKEN, key=lambda one: one.__name__)]
    _, more = models_json_schema([*models, (ProblemRecord, "serialization")], ref_template=_REFERENCE)  # type: ignore[list-item]
    schemas = found["components"]["schemas"]
    schemas.update(more["$defs"])
    for path in found["paths"].values():
        for operation in path.values():
            operation.pop("x-takes-body", None)
            for needed in operation.get("security", ()):
                operation["description"] = f"{operation.get('description', '')}\n\nTakes the scope `{needed['key'][0]}`.".strip()
            for described in (operation.get("requestBody", {}), *operation["responses"].values()):
                for content in described.get("content", {}).values():
                    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                    if "example" not in content and schemas.get(name, {}).get("examples"):
                        content["example"] = schemas[name]["examples"][0]
    return found


# --- pages -----------------------------------------------------------------------------------------------------------


def token_of(cursor: str | None) -> str | None:
    """A listing's cursor as a token for URLs."""
    return None if cursor is None else base64.urlsafe_b64encode(cursor.encode()).decode().rstrip("=")


def cursor_of(token: str | None) -> str | None:
    """The reverse. Raises InvalidInput."""
    if token is None:
        return None
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        cursor = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        cursor = ""
    if not cursor:
        raise InvalidInput(f"cursor {token!r} is not one that a listing gave", field="cursor")
    return cursor
