"""Who may use the API: its keys, the attempts to come in without a right one, and the audit log. Reached as `Store.access`."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from heapq import merge
from itertools import islice
from typing import cast

import redis

from taskplatform.errors import Conflict, NotFound, StoreUnavailable
from taskplatform.keys import ApiKey, KeyRefused, Scope, check_name, check_scopes, digest, new_token, read_token
from taskplatform.store.scripts import Clock, Scripts

#: A key that ended is listed for so long.
KEY_RETENTION = timedelta(days=30)
#: Keys that there can be, with those that ended and are still listed.
MOST_KEYS = 1000
#: Browsers that are signed in with one key at a time.
MOST_SESSIONS = 50
#: How exactly it is known when a key was used last. A key that is used all the time costs one write in this span.
_USE_MS = 60_000
#: Addresses that failed to come in and are remembered.
_MOST_SOURCES = 10_000
#: Entries of the audit log that are read at a time.
_PAGE = 500
#: What is compared where there is no such key.
_NOBODY = "0" * 64

AUDIT_KINDS = ("keys", "admin", "requests", "refused")
"""What becomes of keys; what is asked for with keys that may do everything; with other keys; who was not let in.

Each has a log of its own, of the same size, so that nobody can push out of it what they did with other rights.
"""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what, or tried to."""

    at_ms: int
    kind: str
    """One of AUDIT_KINDS."""
    action: str
    """`POST /jobs`, `key made`."""
    status: int | None = None
    """What was answered, where it was a request."""
    key: str = ""
    """Name of the key that was used, or of the one that was changed."""
    key_id: str = ""
    actor: str = ""
    """Who changed a key."""
    address: str = ""
    about: str = ""
    """What it was done to; of a refused attempt, why."""
    request: str = ""
    """The id that the answer had too."""


class Access:
    """The verbs. Safe to share between threads."""

    def __init__(self, client: redis.Redis, scripts: Scripts, key: Callable[..., str], clock: Clock | None) -> None:
        self._redis = client
        self._scripts = scripts
        self._key = key
        self._clock = clock

    # keys

    def create_key(
        self, name: str, scopes: set[str], *, lifetime: timedelta | None = None, actor: str, log_size: int
    ) -> tuple[ApiKey, str]:
        """A new key, and its token, which nobody can ask for again. Without `lifetime` it is valid until it is revoked.

        Raises InvalidInput, and Conflict when the name has a valid key.
        """
        return self._issue(check_name(name), check_scopes(scopes), lifetime, None, actor, log_size)

    def rotate_key(
        self, name: str, *, overlap: timedelta, lifetime: timedelta | None = None, actor: str, log_size: int
    ) -> tuple[ApiKey, str]:
        """The name's next key, with the scopes of the newest that it has; all that it has end after `overlap`.

        Without `lifetime` the next lives as long as the one before it was to live when it was made.
        Raises NotFound when the name has no valid key.
        """
        return self._issue(name, (), lifetime, overlap, actor, log_size)

    def _issue(
        self, name: str, scopes: tuple[Scope, ...], lifetime: timedelta | None, overlap: timedelta | None, actor: str, log_size: int
    ) -> tuple[ApiKey, str]:
        key_id, token = new_token()
        made = self._scripts.run(
            "issue_key",
            key_id,
            name,
            digest(token),
            " ".join(scopes),
            _milliseconds(lifetime),
            _milliseconds(overlap),
            _milliseconds(KEY_RETENTION),
            MOST_KEYS,
            actor,
            log_size,
        )
        if made == 0:
            raise Conflict(f"there is a valid key {name!r}: rotate it, or revoke it first")
        if made == -1:
            raise NotFound(f"no valid key {name!r}")
        if made == -2:
            raise Conflict(f"there are {MOST_KEYS} keys, which is the most; those that ended are forgotten {KEY_RETENTION.days} days later")
        return _read_key(key_id, self._find(key_id)[1]), token

    def revoke_key(self, which: str, *, actor: str, log_size: int) -> int:
        """Revoke the key with this id, or all that this name has, from the next request on. Returns how many were valid.

        Raises NotFound when there is no such key.
        """
        revoked = int(self._scripts.run("revoke_key", which, actor, log_size))
        if revoked < 0:
            raise NotFound(f"no key {which!r}")
        return revoked

    def list_keys(self) -> list[ApiKey]:
        """All keys, also those that ended and are not yet forgotten, by name and then by age."""
        ids = cast("list[str]", self._redis.zrange(self._key("api_keys"), 0, -1))
        pipe = self._redis.pipeline(transaction=False)
        for key_id in ids:
            pipe.hgetall(self._key("api_key", key_id))
        found = [_read_key(key_id, record) for key_id, record in zip(ids, pipe.execute(), strict=True) if record]
        return sorted(found, key=lambda one: (one.name, one.created_ms))

    def authenticate(self, token: str) -> ApiKey:
        """Whose token it is. One call to Redis; once in a minute for each key a second one, which notes that it is used.

        The digests are compared in constant time, and with that of nobody where the key is unknown, so that how long it takes
        says nothing of a secret. Raises KeyRefused, StoreUnavailable.
        """
        key_id = read_token(token)
        now_ms, record = self._find(key_id)
        right = hmac.compare_digest(record.get("digest", _NOBODY), digest(token))
        if not record:
            raise KeyRefused("no such key")
        if not right:
            raise KeyRefused("wrong secret")
        return self._live(_read_key(key_id, record), now_ms)

    def _live(self, key: ApiKey, now_ms: int) -> ApiKey:
        if (state := key.state(now_ms)) != "live":
            raise KeyRefused(f"the key is {state}", key)
        if key.last_used_ms is None or not 0 <= now_ms - key.last_used_ms < _USE_MS:
            self._note_use(key.id)
        return key

    def _note_use(self, key_id: str) -> None:
        try:
            self._scripts.run("use_key", key_id)
        except StoreUnavailable:
            # a server that takes no writes for now still says who may come in; what they then ask for, it judges itself
            return

    def _find(self, key_id: str) -> tuple[int, dict[str, str]]:
        """The time, and the key's record, empty where there is none. It is asked for with each request, and a script would take longer."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.hgetall(self._key("api_key", key_id))
        (seconds, microseconds), record = pipe.execute()
        return seconds * 1000 + microseconds // 1000 if self._clock is None else self._clock(), record

    # browsers that are signed in with a key

    def open_session(self, key_id: str, session: str, *, lifetime: timedelta) -> None:
        """Let who shows what `session` is the digest of in under a key, for so long, while the key is valid."""
        self._scripts.run("open_session", key_id, session, _milliseconds(lifetime), MOST_SESSIONS)

    def close_session(self, key_id: str, session: str) -> None:
        """Let it in no longer."""
        self._redis.zrem(self._key("sessions", key_id), session)

    def has_session(self, key_id: str, session: str) -> bool:
        """Whether it is let in: for a key that is not kept here."""
        return self._look_for_session(key_id, session)[1]

    def session_key(self, key_id: str, session: str) -> ApiKey | None:
        """The key that is behind a session, in one call to Redis as `authenticate`; None: there is no such session, or it has ended.

        Raises KeyRefused where the key is no longer valid, and StoreUnavailable.
        """
        now_ms, signed_in, record = self._look_for_session(key_id, session)
        if not signed_in:
            return None
        if not record:
            raise KeyRefused("no such key")
        return self._live(_read_key(key_id, record), now_ms)

    def _look_for_session(self, key_id: str, session: str) -> tuple[int, bool, dict[str, str]]:
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.zscore(self._key("sessions", key_id), session)
        pipe.hgetall(self._key("api_key", key_id))
        (seconds, microseconds), until, record = pipe.execute()
        now_ms = seconds * 1000 + microseconds // 1000 if self._clock is None else self._clock()
        return now_ms, until is not None and until > now_ms, record

    # attempts to come in

    def refuse(self, source: str, entry: AuditEntry, *, per_minute: int, log_size: int) -> int:
        """Count a failed attempt of `source`, which begins with an address without spaces. The audit log gets `entry`.

        Returns 0, or for how many ms the source has used up its attempts: then it is counted only, and the audit log is told later how many
        there were. A source has `per_minute` attempts at once, and gets them back over a minute.
        """
        return int(
            self._scripts.run(
                "refuse_key",
                source,
                -(-60_000 // per_minute),
                per_minute,
                _MOST_SOURCES,
                log_size,
                entry.address,
                entry.key,
                entry.key_id,
                entry.action,
                entry.about,
                entry.request,
            )
        )

    # the audit log

    def record(self, entry: AuditEntry, *, log_size: int) -> None:
        """Tell the audit log. Its time is the server's, whatever `entry` says."""
        told = {field: str(getattr(entry, name)) for field, name in _FIELDS.items() if getattr(entry, name) not in ("", None)}
        self._scripts.run("audit", entry.kind, log_size, *[part for pair in told.items() for part in pair])

    def audit(self, *, key: str | None = None, limit: int = 100) -> list[AuditEntry]:
        """Of all kinds together, the newest first; with `key`, what is about keys of that name or that id."""
        logs = [self._read_log(kind) for kind in AUDIT_KINDS]
        entries = (entry for _, entry in merge(*logs, key=lambda place: place[0], reverse=True))
        return list(islice((entry for entry in entries if key is None or key in (entry.key, entry.key_id)), limit))

    def _read_log(self, kind: str) -> Iterator[tuple[tuple[int, ...], AuditEntry]]:
        """From the newest on, with their places: those never go back, as a clock may."""
        end = "+"
        while True:
            rows = cast("list[tuple[str, dict[str, str]]]", self._redis.xrevrange(self._key("audit", kind), max=end, count=_PAGE))
            yield from ((tuple(map(int, place.split("-"))), _read_entry(kind, row)) for place, row in rows)
            if len(rows) < _PAGE:
                return
            end = f"({rows[-1][0]}"


#: By the field of the log, that of AuditEntry.
_FIELDS = {
    "action": "action",
    "status": "status",
    "key": "key",
    "id": "key_id",
    "actor": "actor",
    "address": "address",
    "about": "about",
    "request": "request",
}


def _read_entry(kind: str, row: Mapping[str, str]) -> AuditEntry:
    texts = {name: row.get(field, "") for field, name in _FIELDS.items()}
    status = texts.pop("status")
    return AuditEntry(at_ms=int(row["at"]), kind=kind, status=int(status) if status else None, **texts)


def _read_key(key_id: str, record: Mapping[str, str]) -> ApiKey:
    def instant(field: str) -> int | None:
        return int(record[field]) if field in record else None

    return ApiKey(
        id=key_id,
        name=record["name"],
        scopes=tuple(Scope(scope) for scope in record["scopes"].split()),
        created_ms=int(record["created"]),
        created_by=record["by"],
        expires_ms=instant("expires"),
        last_used_ms=instant("used"),
        revoked_ms=instant("revoked"),
    )


def _milliseconds(duration: timedelta | None) -> int | str:
    return "" if duration is None else round(duration / timedelta(milliseconds=1))
