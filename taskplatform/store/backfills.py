"""Backfills: occurrences of a definition that are run afterwards. Reached as `Store.backfills`.

A backfill is a durable record that the planner advances, a step after the other (`step`, lua/backfill.lua). Its cursor is the
occurrence, the group and the last slot that was decided; it moves in the same step in which jobs are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import NamedTuple, cast

import redis

from taskplatform.errors import Conflict, UnknownBackfill, UnknownDefinition
from taskplatform.model import slot
from taskplatform.store.records import batches
from taskplatform.store.scripts import Clock, Scripts

#: So many backfills may be there at a time that have not ended.
MOST_AT_ONCE = 100
#: Users that were given are forgotten when nothing began with them for so long.
_UPLOAD = timedelta(hours=1)
#: Waiting jobs that are canceled in one go.
_CANCELED_TOGETHER = 200


#: Fields of `Backfill` that count something.
BACKFILL_COUNTS = (
    *("unsubscribed", "occurrences", "passed", "left", "forgotten", "total", "made", "existing", "paused", "disabled", "overlapping"),
    *("unfinished", "completed", "failed", "timed_out", "rejected", "canceled"),
)


class BackfillState(StrEnum):
    """How a backfill is."""

    DRY_RUN = "dry run"
    """It was only counted."""
    RUNNING = "running"
    PAUSED = "paused"
    """By somebody, or for as long as its definition is paused; `reason` says which."""
    CANCELING = "canceling"
    """It makes nothing more, and what waits of it is being canceled."""
    CANCELED = "canceled"
    DONE = "done"
    """It has made all of its jobs; what is `unfinished` of them still runs or waits."""
    STOPPED = "stopped"
    """It cannot go on; `reason` says why."""

    @property
    def ended(self) -> bool:
        """Whether it makes nothing more, and nothing of it is about to be canceled."""
        return self in (BackfillState.DRY_RUN, BackfillState.CANCELED, BackfillState.DONE, BackfillState.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """A backfill, and how far it is. An occurrence is that of one group: a due time of one schedule."""

    id: str
    """Empty for a dry run."""
    definition: str
    state: BackfillState
    reason: str
    """Why it is as it is, or what it waits for; empty where there is nothing to say."""
    actor: str
    since_ms: int
    until_ms: int
    """Occurrences from `since_ms` on, and before this."""
    per_second: float
    begun_ms: int
    ended_ms: int | None = None
    users: int | None = None
    """How many users were given; None: all subscribers."""
    unsubscribed: int = 0
    """How many of those are left out, because they are not subscribed."""
    at_ms: int | None = None
    """The occurrence that it is at; None before the first."""
    occurrences: int = 0
    """How many there were in all, when it began."""
    passed: int = 0
    """How many of them it has passed, with those that it left out."""
    left: int = 0
    """Left to the planner, because it still plans them."""
    forgotten: int = 0
    """Left out, because they became older than the retention meanwhile."""
    total: int = 0
    """How many jobs could be made at the most, as it was when it began."""
    made: int = 0
    """Jobs; those that a dry run would make."""
    existing: int = 0
    """Not made, because they exist."""
    paused: int = 0
    """Left out, because user or subscription are paused."""
    disabled: int = 0
    """Left out, because the subscription is disabled."""
    overlapping: int = 0
    """Left out, because the user's earlier job did not end in time (overlap: skip)."""
    unfinished: int = 0
    """Jobs that it made and that wait or run."""
    completed: int = 0
    failed: int = 0
    timed_out: int = 0
    rejected: int = 0
    canceled: int = 0

    @property
    def looked(self) -> int:
        """Of `total`, how many it has decided."""
        return self.made + self.existing + self.paused + self.disabled + self.overlapping

    def __add__(self, other: Backfill) -> Backfill:
        """Two parts of a dry run together."""
        users = None if self.users is None else self.users + (other.users or 0)
        return replace(self, users=users, **{name: getattr(self, name) + getattr(other, name) for name in BACKFILL_COUNTS})


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBackfill:
    """What was asked for."""

    id: str
    definition: str
    since_ms: int
    until_ms: int
    per_second: float
    most_unfinished: int
    known: timedelta | None
    """Of occurrences that are not longer ago than that it is known whether they ran; None: they are run all the same."""
    users: int | None
    unsubscribed: int
    occurrences: int
    total: int
    detail: str
    """For the change log."""


class Target(NamedTuple):
    """An occurrence of a group."""

    at_ms: int
    gid: str
    schedule: str
    """Of the group, as its record has it."""


class Place(NamedTuple):
    """How far a backfill is, for whoever advances it."""

    definition: str
    state: str
    since_ms: int
    until_ms: int
    cursor: str
    """"<occurrence in ms> <gid> <slot>", where the slot is "end" after the last subscriber; empty at the beginning."""
    groups: int
    """How many groups the definition has by now."""

    @property
    def target(self) -> tuple[int, str, bool] | None:
        """The occurrence and group that it is at, and whether it is through with that."""
        if not self.cursor:
            return None
        at_ms, gid, last = self.cursor.split(" ")
        return int(at_ms), gid, last == "end"


class Step(NamedTuple):
    """What a step did."""

    state: str
    made: int
    passed: int
    """How many of the occurrences that it was given it is through with."""
    cursor: str
    anew: bool
    """Groups or schedules are not as they were seen."""


class Backfills:
    """The verbs. Safe to share between threads."""

    def __init__(self, client: redis.Redis, scripts: Scripts, key: Callable[..., str], clock: Clock | None, log_size: int) -> None:
        self._redis = client
        self._scripts = scripts
        self._key = key
        self._clock = clock
        self._log_size = log_size

    # to begin one

    def add_users(self, backfill: str, definition: str, users: Iterable[str]) -> None:
        """Give users to a backfill that is about to begin. Nothing is left of them if it does not."""
        key = self._key("backfill_users", backfill)
        pipe = self._redis.pipeline(transaction=True)
        pipe.zadd(key, {user: slot(user, definition) for user in users})
        pipe.expire(key, _UPLOAD)
        pipe.execute()

    def count_users(self, backfill: str) -> int:
        """How many were given, each counted once."""
        return self._redis.zcard(self._key("backfill_users", backfill))

    def drop_users(self, backfill: str) -> None:
        """Forget them: it does not begin."""
        self._redis.delete(self._key("backfill_users", backfill))

    def begin(self, new: NewBackfill, *, actor: str) -> bool:
        """Begin a backfill. False where it had begun. Raises UnknownDefinition, Conflict."""
        users = "" if new.users is None else new.users
        known = "" if new.known is None else round(new.known / timedelta(milliseconds=1))
        rate, most, detail = repr(new.per_second), new.most_unfinished, new.detail
        what = (new.occurrences, new.total)
        answer = self._scripts.run(
            "begin_backfill",
            new.id,
            new.definition,
            new.since_ms,
            new.until_ms,
            rate,
            most,
            known,
            users,
            new.unsubscribed,
            what[0],
            what[1],
            actor,
            self._log_size,
            MOST_AT_ONCE,
            detail,
        )
        if answer == -1:
            raise UnknownDefinition(f"no definition {new.definition!r} is published")
        if answer == -2:
            raise Conflict(f"{MOST_AT_ONCE} backfills have not ended: wait for one, or cancel one")
        return bool(answer)

    # to advance one

    def place(self, backfill: str) -> Place | None:
        """How far it is; None where there is no such backfill."""
        values = self._redis.hmget(self._key("backfill", backfill), ["definition", "state", "since", "until", "cursor"])
        definition, state, since, until, cursor = cast("list[str | None]", values)
        if definition is None or state is None:
            return None
        groups = self._redis.scard(self._key("groups", definition))
        return Place(definition, state, int(since or 0), int(until or 0), cursor or "", groups)

    def groups(self, definition: str) -> dict[str, str]:
        """By group of the definition, its schedule as its record has it."""
        gids = sorted(cast("set[str]", self._redis.smembers(self._key("groups", definition))))
        found: dict[str, str] = {}
        for batch in batches(gids, 1000):
            pipe = self._redis.pipeline(transaction=False)
            for gid in batch:
                pipe.hget(self._key("group", gid), "schedule")
            found.update((gid, schedule) for gid, schedule in zip(batch, pipe.execute(), strict=True) if schedule)
        return found

    def step(self, backfill: str, *, seen: str, targets: Sequence[Target], no_more: bool, batch: int, actor: str) -> Step:
        """Make the next jobs, of occurrences from the cursor `seen` on; after them there is nothing where `no_more` is said."""
        flat = [str(part) for target in targets for part in target]
        answer = self._scripts.run("backfill", backfill, seen, batch, int(no_more), actor, self._log_size, *flat)
        state, made, passed, cursor, anew = answer
        return Step(state, int(made), int(passed), cursor, bool(anew))

    def cancel_more(self, backfill: str) -> str:
        """Go on with a cancellation that somebody began. Returns the state that the backfill is in."""
        return self._cancel(backfill, "")

    # to count what one would make

    def planned_by_planner(self, gid: str, times: Sequence[int]) -> set[int]:
        """Those occurrences of a group that the planner still plans, or has not come to."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hget(self._key("group", gid), "cursor")
        for at_ms in times:
            pipe.hget(self._key("occurrence", f"{gid}|{at_ms}"), "state")
        cursor, *states = pipe.execute()
        return {at_ms for at_ms, state in zip(times, states, strict=True) if state == "open" or at_ms > int(cursor or 0)}

    def members(self, gid: str, definition: str, *, after: str, limit: int) -> list[str]:
        """The next subscribers of a group, in order of their slots, after the user `after` ("": the first)."""
        last = (slot(after, definition), after) if after else (-1.0, "")
        count = limit
        while True:
            key, lowest = self._key("slots", gid), repr(last[0])
            rows = self._redis.zrange(key, lowest, "+inf", byscore=True, withscores=True, offset=0, num=count)
            found = [user for user, score in cast("list[tuple[str, float]]", rows) if (score, user) > last]
            # who shares the slot of the last one may come before it
            if found or len(rows) < count:
                return found
            count *= 2

    def sizes(self, gids: Sequence[str]) -> dict[str, int]:
        """How many subscribers each group has."""
        pipe = self._redis.pipeline(transaction=False)
        for gid in gids:
            pipe.zcard(self._key("slots", gid))
        return dict(zip(gids, pipe.execute(), strict=True))

    def groups_of(self, definition: str, users: Sequence[str]) -> dict[str, str]:
        """By user the group of the subscription; without those who are not subscribed."""
        pipe = self._redis.pipeline(transaction=False)
        for user in users:
            pipe.hget(self._key("user", user), definition)
        rows = zip(users, pipe.execute(), strict=True)
        return {user: json.loads(raw).get("group", definition) for user, raw in rows if raw}

    def count(self, definition: str, gid: str, *, times: Sequence[int], users: Sequence[str]) -> tuple[int, int, int, int]:
        """How many jobs of these occurrences and users would be made, exist, are left out as paused, and as disabled."""
        answer = self._scripts.run("count_backfill", definition, gid, len(times), *times, *users)
        return cast("tuple[int, int, int, int]", tuple(answer))

    # to look after them

    def get(self, backfill: str) -> Backfill:
        """Raises UnknownBackfill."""
        found = self._read([backfill])
        if not found:
            raise _unknown(backfill)
        return found[0]

    def newest(self, *, limit: int = 100) -> list[Backfill]:
        """The newest first."""
        return self._read(
            cast("list[str]", self._redis.zrange(self._key("backfills"), "+inf", "-inf", byscore=True, desc=True, offset=0, num=limit))
        )

    def _read(self, ids: Sequence[str]) -> list[Backfill]:
        pipe = self._redis.pipeline(transaction=False)
        for one in ids:
            pipe.hgetall(self._key("backfill", one))
            pipe.zcard(self._key("backfill_jobs", one))
        answers = pipe.execute()
        return [
            read_backfill(one, fields, unfinished)
            for one, fields, unfinished in zip(ids, answers[::2], answers[1::2], strict=True)
            if fields
        ]

    def pause(self, backfill: str, *, actor: str) -> bool:
        """It makes nothing more until it is resumed. Returns whether that changed something. Raises UnknownBackfill, Conflict."""
        return self._pause(backfill, 1, actor)

    def resume(self, backfill: str, *, actor: str) -> bool:
        """The reverse. Raises UnknownBackfill, Conflict."""
        return self._pause(backfill, 0, actor)

    def _pause(self, backfill: str, pause: int, actor: str) -> bool:
        changed, state = self._scripts.run("pause_backfill", backfill, pause, actor, self._log_size)
        self._check(backfill, state, not changed and state not in ("running", "paused"))
        return bool(changed)

    def cancel(self, backfill: str, *, actor: str) -> None:
        """Make nothing more, and cancel what waits of it. Raises UnknownBackfill; Conflict where it had ended, and nothing is left."""
        state = "canceling"
        while state == "canceling":
            state = self._cancel(backfill, actor)
        self._check(backfill, state, state != "canceled")

    def _cancel(self, backfill: str, actor: str) -> str:
        state, _ = self._scripts.run("cancel_backfill", backfill, actor, self._log_size, _CANCELED_TOGETHER)
        return str(state)

    @staticmethod
    def _check(backfill: str, state: str, conflict: bool) -> None:
        if state == "unknown":
            raise _unknown(backfill)
        if conflict:
            raise Conflict(f"backfill {backfill} is {state}")


def read_backfill(backfill: str, fields: Mapping[str, str], unfinished: int) -> Backfill:
    """A record as Redis holds it."""

    def number(name: str) -> int:
        return int(fields.get(name) or 0)

    state, held = BackfillState(fields["state"]), fields.get("held", "")
    if state is BackfillState.RUNNING and held.startswith("definition paused"):
        state = BackfillState.PAUSED
    at = fields["cursor"].partition(" ")[0]
    return Backfill(
        id=backfill,
        definition=fields["definition"],
        state=state,
        reason=fields["reason"] or held,
        actor=fields["actor"],
        since_ms=number("since"),
        until_ms=number("until"),
        per_second=float(fields["rate"]),
        begun_ms=number("begun"),
        ended_ms=number("ended") or None,
        users=int(fields["users"]) if fields["users"] else None,
        at_ms=int(at) if at else None,
        unfinished=unfinished,
        **{name: number(name) for name in BACKFILL_COUNTS if name != "unfinished"},
    )


def _unknown(backfill: str) -> UnknownBackfill:
    return UnknownBackfill(f"no backfill {backfill!r}: it never was, or its record is past the retention")
