"""What must be planned, by arithmetic of its own: nothing here comes from the planner, the schedules or the scripts.

The rules are those of docs/architecture.md and docs/definitions.md. An n-minute interval is due where the minutes since the epoch are
divisible by n. A user's moment is occurrence + slot × window; the slot is the first 52 bits of BLAKE2b over user, NUL and
definition, as a fraction. A planned job's id is definition:user:occurrence, a triggered one's definition:user:t<time>.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.chaos.evidence import Expected

MINUTE_MS = 60_000
#: An occurrence is looked at so long after its window at the latest, where the planner was away for a while.
LATE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Plan:
    """How a definition in definitions/chaos.yaml is planned."""

    minutes: int
    window_ms: int


PLANS = {
    "high_planned": Plan(1, 60_000),
    "medium_planned": Plan(1, 60_000),
    "low_planned": Plan(2, 150_000),
    "limited": Plan(1, 60_000),
    "capped": Plan(1, 60_000),
    "hosted": Plan(1, 60_000),
    "paused": Plan(1, 60_000),
}
TRIGGER_WINDOW_MS = 5_000


@dataclass(frozen=True, slots=True)
class Subscribed:
    """A subscription that did not change during the run."""

    user: str
    definition: str
    since_ms: int
    """Moments after this are its own."""
    minutes: int | None = None
    """An own schedule: every so many minutes."""


def slot(user: str, definition: str) -> float:
    digest = hashlib.blake2b(f"{user}\0{definition}".encode(), digest_size=8).hexdigest()
    return int(digest[:13], 16) / 16**13


def planned(
    subscriptions: Iterable[Subscribed], *, until_ms: int, at_most_ms: int, pauses: Iterable[tuple[str, int, int]], horizon_ms: int
) -> Iterator[Expected]:
    """The jobs whose moments come up to `until_ms`, which must exist, and those up to `at_most_ms`, which may.

    While a definition was paused, within the spans in `pauses`, an occurrence that the planner came to was not planned on: of those
    that it can have come to, each job may exist.
    """
    spans = list(pauses)
    for one in subscriptions:
        plan = PLANS[one.definition]
        step_ms = (one.minutes or plan.minutes) * MINUTE_MS
        offset_ms = int(slot(one.user, one.definition) * plan.window_ms)
        at_ms = (one.since_ms - plan.window_ms) // step_ms * step_ms
        while (moment_ms := at_ms + offset_ms) <= at_most_ms:
            if moment_ms > one.since_ms:
                first_ms, last_ms = at_ms - horizon_ms - 1000, at_ms + plan.window_ms + LATE_MS
                unsure = any(name == one.definition and begin < last_ms and end > first_ms for name, begin, end in spans)
                yield Expected(f"{one.definition}:{one.user}:{at_ms}", moment_ms, must=moment_ms <= until_ms and not unsure)
            at_ms += step_ms


def triggered(users: Iterable[str], at_ms: int) -> Iterator[Expected]:
    """The jobs of one trigger that is known to have happened."""
    for user in users:
        yield Expected(f"triggered:{user}:t{at_ms}", at_ms + int(slot(user, "triggered") * TRIGGER_WINDOW_MS))
