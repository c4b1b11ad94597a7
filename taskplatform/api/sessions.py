"""Browsers that are signed in: what they show instead of a key, and what their forms hold.

A browser that showed a key gets a cookie with a random text. Redis keeps a digest of that under the id of the key, for the setting
`dashboard_session`; so a session is in no process' memory, can be ended, and is worth nothing to who reads Redis. The key is looked at with
each request: when it is revoked or expires, the session has ended too. Of the key of the setting `api_key`, which Redis does not know, the
digest is also of the key itself, so that another key there ends the sessions of the one before.

A form holds a text that is derived from the cookie (`form_token`). Another site can make a browser send a form, and perhaps the cookie
with it, but cannot read the cookie.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

from taskplatform.keys import BOOTSTRAP, KEY_ID, ApiKey, digest
from taskplatform.settings import Settings
from taskplatform.store.access import Access

if TYPE_CHECKING:
    from starlette.types import Scope as Connection

#: Where the pages are. The cookies go there alone.
ROOT = "/ui"
SIGN_IN = f"{ROOT}/sign-in"
#: Answered to anybody: the form in which a key is shown, and what becomes of it.
OPEN_PAGES = frozenset({SIGN_IN})
#: Of the session, and of the form of who has none.
_SESSION, _FORM = "taskplatform", "taskplatform-form"
_TOKEN = re.compile(rf"({KEY_ID.pattern}|{BOOTSTRAP})\.[A-Za-z0-9_-]{{43}}", re.ASCII)
_FORM_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that is signed in."""

    token: str
    """What it shows. Who has it is let in: it goes into the cookie, and nowhere else."""
    key: ApiKey

    @property
    def form_token(self) -> str:
        """What the forms of its pages hold."""
        return digest(f"form {self.token}")


class Sessions:
    """Those of all processes. Its methods ask Redis, but for the cookies."""

    def __init__(self, access: Access, settings: Settings, bootstrap: ApiKey, bootstrap_secret: str) -> None:
        self._access = access
        self._settings = settings
        self._bootstrap = bootstrap
        self._bootstrap_secret = bootstrap_secret

    def open(self, key: ApiKey) -> Session:
        """Sign a browser in that showed this key. Raises StoreError."""
        session = Session(f"{key.id}.{secrets.token_urlsafe(32)}", key)
        self._access.open_session(key.id, self._kept(session.token), lifetime=self._settings.dashboard_session)
        return session

    def find(self, connection: Connection) -> Session | None:
        """The session whose cookie a request has; None: it has none, or one that has ended. Raises KeyRefused, StoreError."""
        token = _cookies(connection).get(self._name(_SESSION, connection), "")
        if not _TOKEN.fullmatch(token):
            return None
        key_id = token.partition(".")[0]
        if key_id == BOOTSTRAP:
            known = bool(self._bootstrap_secret) and self._access.has_session(key_id, self._kept(token))
            return Session(token, self._bootstrap) if known else None
        key = self._access.session_key(key_id, self._kept(token))
        return None if key is None else Session(token, key)

    def close(self, session: Session) -> None:
        """Sign it out. Raises StoreError."""
        self._access.close_session(session.key.id, self._kept(session.token))

    def _kept(self, token: str) -> str:
        """What Redis has of it."""
        return digest(f"{token} {self._bootstrap_secret}" if token.startswith(f"{BOOTSTRAP}.") else token)

    # cookies

    def cookie(self, session: Session | None, connection: Connection) -> str:
        """The value of Set-Cookie that lets a browser keep a session; None: that lets it forget it."""
        return self._set(_SESSION, session.token if session else "", connection)

    def visitor(self, connection: Connection) -> str:
        """What the form of a browser that has no session holds: what its cookie says, or something new for that."""
        shown = _cookies(connection).get(self._name(_FORM, connection), "")
        return shown if _FORM_TOKEN.fullmatch(shown) else secrets.token_urlsafe(32)

    def visitor_cookie(self, token: str, connection: Connection) -> str:
        """The value of Set-Cookie that lets a browser keep that."""
        return self._set(_FORM, token, connection)

    def is_visitor(self, token: str, connection: Connection) -> bool:
        """Whether the cookie of a browser that has no session says this too."""
        shown = _cookies(connection).get(self._name(_FORM, connection), "")
        return bool(_FORM_TOKEN.fullmatch(shown)) and hmac.compare_digest(shown, token.encode("ascii", "replace").decode())

    def _set(self, name: str, value: str, connection: Connection) -> str:
        parts = [f"{self._name(name, connection)}={value}", f"Path={ROOT}", "HttpOnly", "SameSite=Strict"]
        if not value:
            parts.append("Max-Age=0")
        if self._is_secure(connection):
            parts.append("Secure")
        return "; ".join(parts)

    def _name(self, name: str, connection: Connection) -> str:
        # a browser takes one that begins so over HTTPS alone, so that nobody on the way can plant one over HTTP
        return f"__Secure-{name}" if self._is_secure(connection) else name

    def _is_secure(self, connection: Connection) -> bool:
        """Whether the browser speaks HTTPS, to us or to what stands before us, as `api_insecure_http` is meant for."""
        if connection.get("scheme") == "https":
            return True
        shown = self._settings.dashboard_url or ""
        return shown.startswith("https://") or (self._settings.api_insecure_http and not shown)


def is_page(path: str) -> bool:
    """Whether it is one of the dashboard's, also one that does not exist."""
    return path == ROOT or path.startswith(f"{ROOT}/")


def _cookies(connection: Connection) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in connection["headers"]:
        if name == b"cookie":
            jar: SimpleCookie = SimpleCookie()
            try:
                jar.load(value.decode("latin-1"))
            except CookieError:
                continue
            found.update({name: one.value for name, one in jar.items()})
    return found
