"""Backfills: what a definition was or would have been due for between two instants is run afterwards, once for each subscriber.

`begin` checks what is asked for and makes a record of it; from then on the planner advances it (`Backfiller`), a step in each of its
ticks. A job has the id that planning gives it, so what exists is not made again, whoever made it and whenever. `count` is the dry run:
it looks at the same, by the same rules (`backfills.verdict` in lib.lua), and writes nothing.

Occurrences are taken in order of time, and at one time group after group; inside a group users go in order of their slots. Each user
has the occurrences of the schedule of the own group, as that is when the backfill comes to them.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from heapq import merge
from itertools import islice
from typing import Any

from pydantic import ValidationError

from taskplatform.errors import InvalidInput, UnknownUser
from taskplatform.model import RateLimit, check_user_id, format_duration, format_rate, schedule_from_json
from taskplatform.schedule import occurrences
from taskplatform.store import Backfill, BackfillState, Store
from taskplatform.store.backfills import NewBackfill, Place, Target
from taskplatform.store.records import batches

log = logging.getLogger(__name__)

DEFAULT_RATE = "5/s"
#: Jobs per second.
LOWEST_RATE, HIGHEST_RATE = 1 / 86400, 1000
#: So many seconds of its rate may be unfinished at a time, and so many jobs in any case.
UNFINISHED_SECONDS, LEAST_UNFINISHED = 10, 10
#: Occurrences of one schedule, and of all groups together.
MOST_OCCURRENCES, MOST_OF_ALL = 10_000, 1_000_000
#: Users that may be given by name.
MOST_USERS = 100_000

_USERS_TOGETHER = 500
#: Occurrences that one step is told at the most.
_AHEAD = 50
#: Groups and schedules are looked at anew after this, or after so many times what that took.
_GROUPS_FOR_SECONDS, _GROUPS_SHARE = 5.0, 20
#: Pairs of user and occurrence that are counted in one script, some 20 ms.
_PAIRS_TOGETHER = 10_000


@dataclass(frozen=True, slots=True)
class Span:
    """What is asked for, checked."""

    definition: str
    since_ms: int
    until_ms: int
    per_second: float
    known: timedelta | None
    """Of occurrences that are not longer ago it is known whether they ran; None: they are run all the same."""

    @property
    def most_unfinished(self) -> int:
        """How many of its jobs may wait or run at a time."""
        return max(LEAST_UNFINISHED, math.ceil(UNFINISHED_SECONDS * self.per_second))

    @property
    def text(self) -> str:
        """For the change log."""
        return f"{_text(self.since_ms)} to {_text(self.until_ms)}, {format_rate(self.per_second)}"

    def oldest_ms(self, now_ms: int) -> int:
        """Occurrences before this are left out."""
        return 0 if self.known is None else now_ms - round(self.known / timedelta(milliseconds=1))


def check(
    definition: str,
    *,
    since: datetime,
    until: datetime | None,
    rate: str | RateLimit,
    now_ms: int,
    retention: timedelta,
    beyond_retention: bool,
) -> Span:
    """What is asked for, if it is acceptable. Raises InvalidInput."""
    since_ms = _instant(since, "since")
    until_ms = now_ms if until is None else _instant(until, "until")
    if until_ms > now_ms:
        raise InvalidInput(
            f"until {_text(until_ms)} is not accepted: it is {_text(now_ms)}, and what is still to come is planned", field="until"
        )
    if since_ms >= until_ms:
        raise InvalidInput(f"since {_text(since_ms)} is not accepted: it must be before until, {_text(until_ms)}", field="since")
    span = Span(definition, since_ms, until_ms, _per_second(rate), None if beyond_retention else retention)
    if since_ms < span.oldest_ms(now_ms):
        raise InvalidInput(
            f"since {_text(since_ms)} is not accepted: of what is longer ago than the retention, {format_duration(retention)}, nobody "
            f"knows any more whether it ran. From {_text(span.oldest_ms(now_ms))} on it is known; --beyond-retention (beyond_retention) "
            "runs all of it, also what ran before",
            field="since",
        )
    return span


def begin(store: Store, span: Span, users: Iterable[str] | None, *, actor: str, id_: str = "") -> Backfill:
    """Begin a backfill for all subscribers, or for those of `users` who are subscribed. The same `id_` is the same backfill.

    Raises InvalidInput, UnknownUser, UnknownDefinition, Conflict.
    """
    if id_ and store.backfills.place(id_):
        return store.backfills.get(id_)
    id_ = id_ or secrets.token_hex(5)
    groups = _Groups(store, span)
    occurrences_of_all = groups.count()
    given, sizes = None, Counter(store.backfills.sizes(list(groups.schedules)) if users is None else {})
    if users is not None:
        try:
            for batch in _checked(store, users):
                store.backfills.add_users(id_, span.definition, batch)
                sizes.update(store.backfills.groups_of(span.definition, batch).values())
        except (InvalidInput, UnknownUser):
            store.backfills.drop_users(id_)
            raise
        given = store.backfills.count_users(id_)
    new = NewBackfill(
        id=id_,
        definition=span.definition,
        since_ms=span.since_ms,
        until_ms=span.until_ms,
        per_second=span.per_second,
        most_unfinished=span.most_unfinished,
        known=span.known,
        users=given,
        unsubscribed=0 if given is None else given - sizes.total(),
        occurrences=occurrences_of_all,
        total=sum(len(groups.times(gid)) * size for gid, size in sizes.items()),
        detail=span.text if given is None else f"{span.text}, {given} users",
    )
    store.backfills.begin(new, actor=actor)
    return store.backfills.get(id_)


def count(
    store: Store, span: Span, users: Sequence[str] | None, *, actor: str, cursor: str | None = None, budget: timedelta | None = None
) -> tuple[Backfill, str | None]:
    """What `begin` would make, as it is now; nothing is written.

    With a `budget` it counts for about so long, and returns where it goes on; the numbers of all calls together are the answer.
    Raises InvalidInput, UnknownUser.
    """
    _no_text(users)
    counting = _Counting(store, span, actor, first=cursor is None)
    deadline = math.inf if budget is None else time.monotonic() + budget.total_seconds()
    pages = counting.of_subscribers(cursor) if users is None else counting.of_users(users, cursor)
    for place in pages:
        if time.monotonic() >= deadline:
            return counting.found, place
    return counting.found, None


class Backfiller:
    """Advances backfills for a planner. What it remembers only saves work: every step goes by the record's cursor."""

    def __init__(self, store: Store, *, batch: int, actor: str) -> None:
        self._store = store
        self._batch = batch
        self._actor = actor
        self._targets: dict[str, _Targets] = {}

    def step(self, backfill: str) -> int:
        """Do what is due of one. Returns how many jobs were made."""
        backfills = self._store.backfills
        place = backfills.place(backfill)
        if place is not None and place.state == "canceling":
            backfills.cancel_more(backfill)
        if place is None or place.state != "running":
            self._targets.pop(backfill, None)
            # takes it off what is due, unless it was resumed meanwhile
            backfills.step(backfill, seen="", targets=(), no_more=False, batch=1, actor=self._actor)
            return 0
        known = self._targets.get(backfill)
        if known is None or not known.fits(place):
            known = self._targets[backfill] = _Targets(self._store, place)
        targets = known.next()
        step = backfills.step(
            backfill, seen=place.cursor, targets=targets, no_more=len(targets) < _AHEAD, batch=self._batch, actor=self._actor
        )
        if step.state != "running" or step.anew:
            del self._targets[backfill]
        else:
            known.passed(step.passed, step.cursor)
        if step.state in ("done", "stopped"):
            log.info("backfill %s of %s: %s", backfill, place.definition, step.state)
        return step.made


class _Targets:
    """The occurrences of a backfill from its cursor on, made as they are needed."""

    def __init__(self, store: Store, place: Place) -> None:
        began = time.monotonic()
        self._cursor = place.cursor
        self._groups = place.groups
        schedules = store.backfills.groups(place.definition)
        self._rest = merge(*(_of_group(gid, schedule, place) for gid, schedule in schedules.items()))
        self._next: deque[Target] = deque()
        self.next()
        now = time.monotonic()
        self._until = now + max(_GROUPS_FOR_SECONDS, _GROUPS_SHARE * (now - began))

    def fits(self, place: Place) -> bool:
        """Whether this is still how it is: nobody else moved the cursor, and there are no other groups."""
        return (self._cursor, self._groups) == (place.cursor, place.groups) and time.monotonic() < self._until

    def next(self) -> list[Target]:
        """The next ones; fewer than `_AHEAD` where these are all."""
        self._next.extend(islice(self._rest, _AHEAD - len(self._next)))
        return list(self._next)

    def passed(self, number: int, cursor: str) -> None:
        """So many of them were passed, and the cursor is there now."""
        for _ in range(number):
            self._next.popleft()
        self._cursor = cursor


def _of_group(gid: str, schedule: str, place: Place) -> Iterator[Target]:
    after_ms, target = place.since_ms - 1, place.target
    if target is not None:
        at_ms, at_gid, through = target
        after_ms = max(after_ms, at_ms if gid < at_gid or (gid == at_gid and through) else at_ms - 1)
    return (Target(at_ms, gid, schedule) for at_ms in occurrences(schedule_from_json(schedule), after_ms, place.until_ms - 1))


class _Groups:
    """A definition's groups, and which occurrences they have in a span."""

    def __init__(self, store: Store, span: Span) -> None:
        self._span = span
        self.schedules = store.backfills.groups(span.definition)
        self.times = lru_cache(maxsize=100)(self._times)

    def _times(self, gid: str) -> tuple[int, ...]:
        span, schedule = self._span, self.schedules.get(gid)
        if schedule is None:
            return ()
        found = tuple(islice(occurrences(schedule_from_json(schedule), span.since_ms - 1, span.until_ms - 1), MOST_OCCURRENCES + 1))
        if len(found) > MOST_OCCURRENCES:
            raise InvalidInput(
                f"{span.definition} is due more than {MOST_OCCURRENCES:,} times between {_text(span.since_ms)} and {_text(span.until_ms)}: "
                f"so many are accepted; the first {MOST_OCCURRENCES:,} are before {_text(found[-1])}",
                field="until",
            )
        return found

    def count(self) -> int:
        """How many occurrences there are in all. Raises InvalidInput where they are too many."""
        total = 0
        for gid in self.schedules:
            total += len(self.times(gid))
            if total > MOST_OF_ALL:
                raise InvalidInput(
                    f"{len(self.schedules):,} schedules of {self._span.definition} are due more than {MOST_OF_ALL:,} times between "
                    f"{_text(self._span.since_ms)} and {_text(self._span.until_ms)}: so many are accepted",
                    field="until",
                )
        return total


class _Counting:
    """A dry run. Its pages yield where the next begins."""

    def __init__(self, store: Store, span: Span, actor: str, *, first: bool) -> None:
        self._store = store
        self._span = span
        self._groups = _Groups(store, span)
        self._now_ms = store.now_ms()
        self._wanted = lru_cache(maxsize=100)(self._wanted_of)
        self.found = Backfill(
            id="",
            definition=span.definition,
            state=BackfillState.DRY_RUN,
            reason="",
            actor=actor,
            since_ms=span.since_ms,
            until_ms=span.until_ms,
            per_second=span.per_second,
            begun_ms=self._now_ms,
            ended_ms=self._now_ms,
        )
        if first:
            total = self._groups.count()
            self._add(occurrences=total, passed=total)
            for gid in self._groups.schedules:
                self._add(left=self._wanted(gid)[1], forgotten=self._wanted(gid)[2])

    def _wanted_of(self, gid: str) -> tuple[tuple[int, ...], int, int]:
        """The occurrences of a group that are run, how many are left to the planner, and how many are too long ago."""
        oldest_ms = self._span.oldest_ms(self._now_ms)
        times = [at_ms for at_ms in self._groups.times(gid) if at_ms >= oldest_ms]
        left = self._store.backfills.planned_by_planner(gid, times)
        return tuple(at_ms for at_ms in times if at_ms not in left), len(left), len(self._groups.times(gid)) - len(times)

    def of_subscribers(self, cursor: str | None) -> Iterator[str]:
        """Group after group."""
        at_gid, _, after = (cursor or "").partition("|")
        for gid in self._groups.schedules:
            if gid < at_gid:
                continue
            last = after if gid == at_gid else ""
            while batch := self._store.backfills.members(gid, self._span.definition, after=last, limit=self._page(gid)):
                last = batch[-1]
                self._count(gid, batch)
                yield f"{gid}|{last}"

    def of_users(self, users: Sequence[str], cursor: str | None) -> Iterator[str]:
        """In the order in which they were given."""
        if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
            raise InvalidInput(f"cursor {cursor!r} is not one that a dry run gave", field="cursor")
        unique = list(dict.fromkeys(users))
        if cursor is None:
            self._add(users=len(unique))
        place = int(cursor or 0)
        if 0 < len(unique) <= place:
            return
        for batch in _checked(self._store, unique[place:]):
            groups = self._store.backfills.groups_of(self._span.definition, batch)
            self._add(unsubscribed=len(batch) - len(groups))
            for gid in sorted(set(groups.values())):
                for page in batches((user for user, of in groups.items() if of == gid), self._page(gid)):
                    self._count(gid, page)
            place += len(batch)
            yield str(place)

    def _page(self, gid: str) -> int:
        """How many users at a time: 200,000 pairs with their occurrences, about half a second."""
        return min(_USERS_TOGETHER, max(1, 200_000 // max(1, len(self._wanted(gid)[0]))))

    def _count(self, gid: str, users: Sequence[str]) -> None:
        self._add(total=len(users) * len(self._groups.times(gid)))
        for times in batches(self._wanted(gid)[0], max(1, _PAIRS_TOGETHER // len(users))):
            counted = self._store.backfills.count(self._span.definition, gid, times=times, users=users)
            self._add(**dict(zip(("made", "existing", "paused", "disabled"), counted, strict=True)))

    def _add(self, **numbers: int) -> None:
        more: dict[str, Any] = {name: (getattr(self.found, name) or 0) + number for name, number in numbers.items()}
        self.found = replace(self.found, **more)


# --- checks ----------------------------------------------------------------------------------------------------------


def _checked(store: Store, users: Iterable[str]) -> Iterator[list[str]]:
    """Each user once, in batches. Raises InvalidInput, UnknownUser."""
    _no_text(users)
    seen: dict[str, None] = {}
    for batch in batches(users, _USERS_TOGETHER):
        new = [one for one in dict.fromkeys(map(check_user_id, batch)) if one not in seen]
        seen.update(dict.fromkeys(new))
        if len(seen) > MOST_USERS:
            raise InvalidInput(f"users: more than {MOST_USERS:,} are given; give so many, or none for all subscribers", field="users")
        missing = sorted(store.missing_users(new))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UnknownUser(f"no user {', '.join(map(repr, missing[:5]))}{more}")
        if new:
            yield new
    if not seen:
        raise InvalidInput("users: none are given", field="users")


def _no_text(users: object) -> None:
    """One id alone would be taken for its letters."""
    if isinstance(users, str):
        raise InvalidInput(f"users {users!r} is not accepted: a list of ids is", field="users")


def _per_second(rate: str | RateLimit) -> float:
    try:
        found = (rate if isinstance(rate, RateLimit) else RateLimit.model_validate(rate)).per_second
    except (ValidationError, TypeError):
        found = 0.0
    if not LOWEST_RATE <= found <= HIGHEST_RATE:
        raise InvalidInput(f'rate {rate!r} is not accepted: such as "5/s" or "100/m" is, from 1/d to {HIGHEST_RATE}/s', field="rate")
    return found


def _instant(value: datetime, name: str) -> int:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidInput(f"{name} {value!r} is not accepted: a datetime with a time zone is", field=name)
    return max(0, int(value.timestamp() * 1000))


def _text(instant_ms: int) -> str:
    return f"{datetime.fromtimestamp(instant_ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
