"""One call of a signed-in browser: who it is, what it sent, and what it gets.

`Pages` declares routes. Each says the scope that it takes, and goes through `security.requires` as those of the API do. A route that
changes something takes a form that holds the session's token, or answers 403; it ends by leading the browser elsewhere, so that
going back or loading a page again never does a thing twice. What goes wrong is answered as a page.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from taskplatform.api import problem
from taskplatform.api.pages import frame
from taskplatform.api.problem import Problem, with_status
from taskplatform.api.security import note, requires, session_of
from taskplatform.api.sessions import ROOT, Session
from taskplatform.errors import TaskPlatformError
from taskplatform.keys import ApiKey, Scope
from taskplatform.platform import Platform

F = TypeVar("F", bound=Callable[..., Response | Awaitable[Response]])

#: What a page says that comes after something was done, by the word in its address.
_SAID = {
    "paused": "Paused. What waits is kept, and nothing of it is planned or released until it is resumed.",
    "resumed": "Resumed.",
    "unchanged": "It was so already.",
    "redriven": "Redriven: it runs again, with a fresh budget of retries.",
    "discarded": "Discarded. The change log keeps that it was done.",
    "canceled": "Canceled.",
    "redriven_all": "Redriven: {number}. They run again, each with a fresh budget of retries.",
    "left": "Redriven: {number}. Others are left: their definitions were removed from the catalogue.",
    "backfill": "Begun. How far it is says `taskplatform backfills list`.",
    "discarded_all": "Discarded: {number}. The change log keeps that it was done.",
}
#: How many things were done, in such an address.
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
FORM = "application/x-www-form-urlencoded"
_MOST_FIELDS = 50


class Visit:
    """One call. Its methods may run in any thread."""

    def __init__(self, request: Request, session: Session, form: Mapping[str, str]) -> None:
        self.request = request
        self.session = session
        self.form = form
        self.platform: Platform = request.app.state.platform.acting_as(f"ui:{session.key.name}")

    @property
    def key(self) -> ApiKey:
        """With which the browser is signed in."""
        return self.session.key

    def page(self, template: str, status: int = 200, **filling: Any) -> Response:
        """A page that knows who looks at it."""
        return frame.page(template, status, **around(self.request, self.session), **filling)

    def note(self, **about: str) -> None:
        """Tell the audit log what the call is about, beside the ids in its path."""
        note(self.request, **about)

    def done(self, said: str, *, number: int | None = None) -> Response:
        """Lead the browser back to where the form stood, and say there what was done, or how often."""
        back, _, query = frame.own_path(self.form.get("back", "")).partition("?")
        kept = dict(parse_qsl(query, max_num_fields=_MOST_FIELDS)) | {"said": said}
        return frame.to(back, **kept, **({} if number is None else {"number": str(number)}))


def around(request: Request, session: Session | None) -> dict[str, Any]:
    """What every page shows beside its own."""
    flower = request.app.state.platform.settings.flower_url
    query = {name: value for name, value in request.query_params.items() if name not in ("said", "number")}
    number = request.query_params.get("number", "")
    here = str(request.url.replace(scheme="", netloc="", query="")) + ("?" + "&".join(_pairs(query)) if query else "")
    return {
        "session": session,
        "flower": flower,
        # whoever made the link chose the number too: it is nothing else
        "said": _SAID.get(request.query_params.get("said", ""), "").format(
            number=f"{int(number):,}" if _NUMBER.fullmatch(number) else "some"
        ),
        "here": frame.own_path(here),
        "may_submit": session is not None and session.key.allows(Scope.SUBMIT),
        "may_admin": session is not None and session.key.allows(Scope.ADMIN),
    }


def _pairs(query: Mapping[str, str]) -> list[str]:
    from urllib.parse import quote_plus

    return [f"{quote_plus(name)}={quote_plus(value)}" for name, value in query.items()]


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form. Raises Problem for what is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind != FORM:
        raise with_status(415, f"a form is sent as {FORM}")
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict"))
    except ValueError:
        raise with_status(400, "this is not a form") from None


def check_origin(request: Request) -> None:
    """Raises Problem for a form that another site sends; a browser that is not too old says so itself."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise _foreign()


def _foreign() -> Problem:
    return with_status(403, "this form is not of this page, or of an earlier sign-in: nothing was done. Load the page again and repeat it")


def _looking(scope: Scope) -> Callable[..., Awaitable[Visit]]:
    async def visit(request: Request, key: ApiKey = Depends(requires(scope))) -> Visit:  # noqa: ARG001, B008
        return Visit(request, session_of(request), {})

    return visit


def _acting(scope: Scope) -> Callable[..., Awaitable[Visit]]:
    async def visit(request: Request, key: ApiKey = Depends(requires(scope))) -> Visit:  # noqa: ARG001, B008
        session = session_of(request)
        check_origin(request)
        form = await read_form(request)
        if not hmac.compare_digest(form.get("token", "").encode("utf-8", "replace"), session.form_token.encode()):
            raise _foreign()
        return Visit(request, session, form)

    return visit


Looks = Annotated[Visit, Depends(_looking(Scope.READ))]
Submits = Annotated[Visit, Depends(_acting(Scope.SUBMIT))]
Administers = Annotated[Visit, Depends(_acting(Scope.ADMIN))]
#: Takes the form, and no more than that the browser is signed in: it may leave.
Leaves = Annotated[Visit, Depends(_acting(Scope.READ))]


class PageRoute(APIRoute):
    """Its problems are pages."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """As FastAPI calls it."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                found: Response = await handle(request)
                return found
            except Problem as fault:
                wrong = fault
            except TaskPlatformError as fault:
                wrong = problem.of(fault, request)
            except RequestValidationError as fault:
                wrong = with_status(422, "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in fault.errors()))
            except HTTPException as fault:
                wrong = with_status(fault.status_code, str(fault.detail))
            except Exception as fault:
                wrong = problem.unforeseen(fault, problem.request_id(request.scope))
            session = request.scope.get("taskplatform.session")
            return frame.of_problem(wrong, **around(request, session))

        return answer


class Pages:
    """Declares routes on a router."""

    def __init__(self) -> None:
        self.router = APIRouter(prefix=ROOT, route_class=PageRoute, include_in_schema=False)

    def get(self, path: str) -> Callable[[F], F]:
        """A page."""
        return self.router.api_route(path, methods=["GET", "HEAD"], response_model=None)

    def post(self, path: str) -> Callable[[F], F]:
        """What a form does."""
        return self.router.api_route(path, methods=["POST"], response_model=None)
