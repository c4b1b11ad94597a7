"""API keys: what one is, and the token that its holder shows.

A token is `tpk_<id>_<secret>`: 12 hexadecimal digits that name the key, and 49 letters and digits, of which 43 are random (256 bits)
and 6 are a checksum over all before them. The fixed beginning and length let scanners of source code find a token that was left lying
about; the checksum tells a mistyped one without asking anybody, and is no protection.

What is kept of a token is its SHA-256. A slow, salted hash is for passwords, of which people choose few; nobody finds one of 2^256
secrets by trying, however fast a try is, and no two are the same.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from taskplatform.errors import InvalidInput, TaskPlatformError

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#: 62^43 is the first power of 62 above 2^256.
_RANDOM, _CHECK = 43, 6
KEY_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
TOKEN = re.compile(rf"tpk_(?P<id>{KEY_ID.pattern})_[0-9A-Za-z]{{{_RANDOM + _CHECK}}}", re.ASCII)
"""What scanners may look for."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
#: The name of the key that the setting `api_key` gives.
BOOTSTRAP = "bootstrap"


class Scope(StrEnum):
    """What a key may do. `admin` may do everything; `read` and `submit` do not contain each other.

    Who only submits need not see the jobs and parameters of all users: a form's key that is stolen lists nothing that is there.
    """

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, without its secret. A key that was rotated has its name, and another id."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    created_ms: int
    created_by: str
    expires_ms: int | None = None
    last_used_ms: int | None = None
    """To the minute."""
    revoked_ms: int | None = None

    def allows(self, scope: Scope) -> bool:
        """Whether it may do what takes `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def state(self, now_ms: int) -> str:
        """`live`, `expired` or `revoked` at that time."""
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if self.expires_ms is not None and self.expires_ms <= now_ms else "live"


class KeyRefused(TaskPlatformError):
    """What was shown lets nobody in. `why` is for the audit log, and not for who showed it."""

    def __init__(self, why: str, key: ApiKey | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.key = key
        """Whose secret it was, where that is so: of a key that is expired or revoked."""


def new_token() -> tuple[str, str]:
    """A new key's id, and its token."""
    key_id = secrets.token_hex(6)
    body = f"tpk_{key_id}_{''.join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))}"
    return key_id, body + _checksum(body)


def read_token(token: str) -> str:
    """The id of the key whose token this may be. Raises KeyRefused for what can be none; the text of that has nothing of the token."""
    match = TOKEN.fullmatch(token)
    if match is None or _checksum(token[:-_CHECK]) != token[-_CHECK:]:
        raise KeyRefused("not a token")
    return match["id"]


def digest(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def check_name(name: str) -> str:
    """Return `name` if a key can be called so, else raise InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"key name {name!r} is not accepted: 1 to 64 characters: letters, digits and . _ @ -, the first a letter or digit"
        )
    if name == BOOTSTRAP:
        raise InvalidInput(f"key name {name!r} is not accepted: it is the key that TASKPLATFORM_API_KEY gives")
    if KEY_ID.fullmatch(name):
        raise InvalidInput(f"key name {name!r} is not accepted: it looks like the id of a key")
    return name


def check_scopes(scopes: Collection[str]) -> tuple[Scope, ...]:
    """The scopes, each once and in order. Raises InvalidInput for none, and for one that is unknown."""
    unknown = sorted(set(scopes) - set(Scope))
    if unknown or not scopes:
        what = f"scope {unknown[0]!r} is not accepted" if unknown else "a key takes at least one scope"
        raise InvalidInput(f"{what}: scopes are {', '.join(Scope)}")
    return tuple(scope for scope in Scope if scope in scopes)


def _checksum(body: str) -> str:
    number, text = zlib.crc32(body.encode()), ""
    for _ in range(_CHECK):
        number, digit = divmod(number, len(_ALPHABET))
        text = _ALPHABET[digit] + text
    return text
