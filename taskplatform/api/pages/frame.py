"""A page: a template, filled in, and the headers that say what it may do.

Everything that is filled in is escaped (autoescape). A page loads nothing: its one style and its one script stand in it, the browser
takes no other, and no other page may hold it in a frame.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from taskplatform.api.pages import words
from taskplatform.api.problem import Problem
from taskplatform.api.sessions import ROOT, SIGN_IN
from taskplatform.schedule import in_words

if TYPE_CHECKING:
    from starlette.types import Scope as Connection

#: A path of a page, with its query, that a browser may be sent to: none of another site, and nothing that a browser reads in another way.
_OWN = re.compile(r"/ui/(?!/)[A-Za-z0-9._~%@+:/?=&-]*", re.ASCII)
_LONGEST = 2000


def _own_file(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """How a policy names what stands in a page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _own_file("style.css"), _own_file("refresh.js")
POLICY = (
    f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": POLICY, "Cross-Origin-Opener-Policy": "same-origin"}


def _environment() -> Environment:
    made = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(
        span=words.span,
        instant=words.instant,
        state=words.state,
        marked=words.marked,
        number=words.number,
        limit=words.limit,
        schedule=in_words,
        plain=words.plain,
        duration=words.duration,
        colour=words.colour,
        part=lambda text: quote(str(text), safe="@:"),
    )
    made.globals.update(
        away=words.away,
        share=words.share,
        quantile=words.quantile,
        root=ROOT,
        release=version("taskplatform"),
        # they are ours, and the policy names them to the letter
        style=Markup(_STYLE),
        script=Markup(_SCRIPT),
    )
    return made


_ENVIRONMENT = _environment()
#: What a page that nobody is signed in to has of these.
_NOBODY: Mapping[str, Any] = {"session": None, "flower": None, "said": "", "refresh": 0, "here": ""}


def page(template: str, status: int = 200, *, headers: Mapping[str, str] | None = None, **filling: Any) -> Response:
    """A page of a template."""
    text = _ENVIRONMENT.get_template(template).render({**_NOBODY, **filling})
    return HTMLResponse(text, status, {**_HEADERS, **(headers or {})})


def of_problem(problem: Problem, **filling: Any) -> Response:
    """A page that says what is wrong."""
    headers = {name: value for name, value in problem.headers.items() if name != "WWW-Authenticate"}
    return page("problem.html", problem.status, headers=headers, problem=problem, **filling)


def own_path(text: str) -> str:
    """`text` where it leads to one of our pages, else the first page: whoever made a link sends nobody elsewhere with it."""
    return text if len(text) <= _LONGEST and _OWN.fullmatch(text) else f"{ROOT}/"


def to(path: str, **query: str) -> Response:
    """Go there, with GET."""
    return RedirectResponse(f"{path}?{urlencode(query)}" if query else path, 303)


def to_sign_in(connection: Connection) -> Response:
    """For who asks for a page without a session."""
    if connection["method"] not in ("GET", "HEAD"):
        return to(SIGN_IN, ended="1")
    headers = dict(connection["headers"])
    query = connection["query_string"].decode("ascii", "replace")
    here = own_path(connection["raw_path"].partition(b"?")[0].decode("ascii", "replace") + (f"?{query}" if query else ""))
    if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and headers.get(b"sec-fetch-mode") == b"navigate":
        # The browser came over a link from another site, such as Flower's, and keeps the cookie to itself then. From our page it does not.
        return page("again.html", next=here)
    return to(SIGN_IN, next=here)
