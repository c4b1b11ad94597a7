"""What becomes of the occurrences that come due, and how wide their windows are, so that the limits can carry them.

The planner asks it at the instant at which it opens occurrences, and a forecast asks it at each such instant to come: both by the same
code. What differs is the `Ledger` behind it: the store, or what a simulation has come to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from typing import Protocol

from taskplatform.capacity import Demand, Fit, Load, fit
from taskplatform.model import CatchUpPolicy, Definition, Limit, Priority, format_ms
from taskplatform.schedule import latest_occurrence, next_occurrence, occurrences
from taskplatform.store import Commitment, Group, Opening

#: An occurrence is missed when this long, or its window if that is longer, has passed.
GRACE = timedelta(seconds=60)
#: So many missed occurrences of a group are caught up at the most, the newest ones.
_MOST_CAUGHT_UP = 1000
#: So many groups that are due are opened together at the most, each in about a millisecond.
TOGETHER = 1000
_PLACES = {priority: place for place, priority in enumerate(Priority)}


class Ledger(Protocol):
    """What windows depend on. `Store` is one; its methods say what these promise."""

    def limits(self) -> Mapping[str, Limit]: ...

    def sizes(self, groups: Sequence[tuple[str, str]]) -> list[int]: ...

    def commitments(self, *, horizon: timedelta) -> list[Commitment]: ...


@dataclass(frozen=True, slots=True)
class Due:
    """Occurrences of a definition that come due: `count` windows, one after the other, with `jobs` each."""

    definition: Definition
    jobs: int
    start_ms: int
    """When the first window would begin without limits."""
    window_ms: int
    """How long each would be."""
    count: int = 1
    caught_up: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """What becomes of the window of a `Due`; for more than one, of each."""

    window_ms: int
    delay_ms: int = 0
    """How much after `Due.start_ms` the first begins."""
    note: str = ""
    """Why it is not as it was asked for: empty where it is."""
    limit: str = ""
    per_second: float = math.inf


@dataclass(slots=True)
class Round:
    """A group that is due, and what is about to become of its occurrences."""

    group: Group
    definition: Definition
    openings: list[Opening]
    cursor_ms: int
    following_ms: int | None
    """The first occurrence after the cursor."""
    widened: list[tuple[Opening, Due, Window]] = field(default_factory=list)
    """Those of the openings that limits made wider or later, with what was asked for and what they got."""


class Windows:
    """Decides how wide windows are, so that the limits can carry what comes due in them."""

    def __init__(self, ledger: Ledger, catalogue: Mapping[str, Definition], *, horizon: timedelta, hosts: Mapping[str, str]) -> None:
        """`hosts`: by definition the host that it calls, as `hosts_of` gives it; one that calls none may be left out."""
        self._ledger = ledger
        self._catalogue = catalogue
        self._horizon = horizon
        self._hosts = hosts

    def rates(self) -> dict[str, float]:
        """Jobs per second that each limit allows, where it allows any: no window is wide enough for none."""
        return {name: limit.sustained for name, limit in self._ledger.limits().items() if limit.sustained}

    def fit(self, due: Sequence[Due], rates: Mapping[str, float]) -> list[Window]:
        """The windows of what comes due together, in this order. Without a limit that applies they are what was asked for."""
        limits_of = cache(partial(self._limits, rates=rates))
        limits = [limits_of(one.definition.id) if rates else () for one in due]
        if not any(limits):
            return [Window(one.window_ms) for one in due]
        demands = [
            Demand(one.start_ms, one.window_ms * one.count, one.jobs * one.count, _rank(one.definition.priority, one.caught_up), names)
            for one, names in zip(due, limits, strict=True)
        ]
        commitments = self._ledger.commitments(horizon=self._horizon)
        # what waits of a definition that is no more is rejected, and takes nothing of a limit
        loads = [self._load(one, limits_of(one.definition)) for one in commitments if one.definition in self._catalogue]
        fits = fit(rates, loads, demands)
        return [_window(one, demand, found, rates) for one, demand, found in zip(due, demands, fits, strict=True)]

    def _load(self, one: Commitment, limits: tuple[str, ...]) -> Load:
        rank = _rank(one.priority or self._catalogue[one.definition].priority)
        return Load(one.start_ms, one.end_ms, one.jobs, rank, limits)

    def _limits(self, definition: str, rates: Mapping[str, float]) -> tuple[str, ...]:
        names = (f"definition:{definition}", f"host:{self._hosts.get(definition, '')}", "total")
        return tuple(name for name in names if name in rates)

    def round(self, group: Group, definition: Definition, now_ms: int) -> Round:
        """What becomes of each of the group's occurrences that are due within the horizon; `widen` then gives them their windows."""
        until_ms = max(now_ms + _ms(self._horizon), group.cursor_ms)
        openings = _openings(group, definition, now_ms, until_ms)
        return Round(group, definition, openings, until_ms, next_occurrence(group.schedule, until_ms))

    def widen(self, rounds: Sequence[Round], now_ms: int) -> None:
        """Give the openings of rounds that go together the windows that the limits can carry."""
        opening = [one for one in rounds if any(each.source != "skip" for each in one.openings)]
        rates = self.rates() if opening else {}
        if not rates:
            return
        sizes = self._ledger.sizes([(one.group.id, one.definition.id) for one in opening])
        due: list[Due] = []
        places: list[tuple[Round, list[int]]] = []
        for one, jobs in zip(opening, sizes, strict=True):
            window_ms = _ms(one.definition.window)
            for number, each in enumerate(one.openings):
                if each.source == "schedule":
                    due.append(Due(one.definition, jobs, max(each.at_ms, now_ms), window_ms))
                    places.append((one, [number]))
            caught_up = [number for number, each in enumerate(one.openings) if each.source == "catch_up"]
            if caught_up:
                due.append(Due(one.definition, jobs, now_ms, window_ms, len(caught_up), caught_up=True))
                places.append((one, caught_up))
        for (one, numbers), asked, window in zip(places, due, self.fit(due, rates), strict=True):
            if window.note:
                for number in numbers:
                    one.openings[number] = _widened(one.openings[number], asked, window)
                    one.widened.append((one.openings[number], asked, window))


def hosts_of(catalogue: Mapping[str, Definition], environment: Mapping[str, str] | None) -> dict[str, str]:
    """By definition the host that it calls, in this environment; "" where it calls none."""
    calls = ((name, definition.config) for name, definition in catalogue.items())
    return {name: (config.host(environment or {}) or "") if config else "" for name, config in calls}


def limit_of(definition: Definition) -> Limit:
    """The definition's own limit."""
    rate = definition.rate_limit
    return Limit(rate.per_second if rate else None, rate.burst if rate else None, definition.concurrency)


def _rank(priority: Priority, caught_up: bool = False) -> int:
    """Who goes first at a limit: the higher priority, and inside it what is due now before what was missed."""
    return 2 * _PLACES[priority] + caught_up


def _window(due: Due, demand: Demand, found: Fit, rates: Mapping[str, float]) -> Window:
    window_ms = due.window_ms if found.window_ms == demand.window_ms else math.ceil(found.window_ms / due.count)
    delay_ms = found.start_ms - due.start_ms
    if window_ms == due.window_ms and delay_ms == 0:
        return Window(window_ms)
    changes = []
    if window_ms != due.window_ms:
        changes.append(f"widened from {format_ms(due.window_ms)} to {format_ms(window_ms)}")
    if delay_ms:
        changes.append(f"put off by {format_ms(delay_ms)}")
    jobs = f"{due.jobs} jobs" if found.together == due.jobs else f"{due.jobs} of {found.together} jobs that go together"
    note = f"window {' and '.join(changes)}: limit {found.limit} {rates[found.limit]:g}/s, {jobs}"
    return Window(window_ms, delay_ms, note, found.limit, rates[found.limit])


def _openings(group: Group, definition: Definition, now_ms: int, until_ms: int) -> list[Opening]:
    """What becomes of each occurrence between the cursor and the horizon."""
    missed_before = now_ms - max(_ms(definition.window), _ms(GRACE))
    current = [Opening(at_ms, "schedule", "due") for at_ms in occurrences(group.schedule, max(group.cursor_ms, missed_before), until_ms)]
    if group.cursor_ms >= missed_before:
        return current
    caught_up_from = _caught_up_from(group, definition, now_ms, missed_before, superseded=bool(current))
    caught_up = [
        Opening(at_ms, "catch_up", f"caught up: missed while no planner ran, policy {definition.catch_up.policy}")
        for at_ms in occurrences(group.schedule, caught_up_from, missed_before)
    ]
    if len(caught_up) > _MOST_CAUGHT_UP:
        caught_up = caught_up[-_MOST_CAUGHT_UP:]
        caught_up_from = caught_up[0].at_ms - 1
    return [*_skipped(group, definition, caught_up_from), *caught_up, *current]


def _caught_up_from(group: Group, definition: Definition, now_ms: int, missed_before: int, *, superseded: bool) -> int:
    """The instant after which missed occurrences are caught up, by the definition's policy.

    `superseded`: an occurrence is due that is not missed, which for the policy `latest` is the latest.
    """
    policy = definition.catch_up.policy
    if policy is CatchUpPolicy.SKIP or (policy is CatchUpPolicy.LATEST and superseded):
        return missed_before
    # what is not missed yet is not skipped either, should it be older than what may be caught up
    oldest = min(missed_before, max(group.cursor_ms, now_ms - _ms(definition.catch_up.window) - 1))
    if policy is CatchUpPolicy.ALL:
        return oldest
    latest = latest_occurrence(group.schedule, oldest, missed_before)
    return missed_before if latest is None else latest[0] - 1


def _skipped(group: Group, definition: Definition, until_ms: int) -> list[Opening]:
    """One record for all missed occurrences up to `until_ms`."""
    latest = latest_occurrence(group.schedule, group.cursor_ms, until_ms)
    if latest is None:
        return []
    last_ms, count = latest
    first_ms = next_occurrence(group.schedule, group.cursor_ms)
    assert first_ms is not None
    reason = f"{count} missed while no planner ran, policy {definition.catch_up.policy}"
    return [Opening(first_ms, "skip", reason, last_ms)]


def _widened(opening: Opening, asked: Due, window: Window) -> Opening:
    delay_ms = window.delay_ms
    if delay_ms and opening.source == "schedule":
        # one that is opened late begins to be late when it would begin now
        delay_ms += asked.start_ms - opening.at_ms
    return replace(opening, reason=f"{opening.reason}; {window.note}", window_ms=window.window_ms, delay_ms=delay_ms)


def warning(group: Group, opening: Opening, asked: Due, window: Window) -> str:
    """A line about a window that was widened."""
    line = f"{group.id}: occurrence {opening.at_ms}: {window.note}"
    following_ms = next_occurrence(group.schedule, opening.at_ms) if opening.source == "schedule" else None
    end_ms = asked.start_ms + window.delay_ms + window.window_ms
    if following_ms is None or end_ms <= following_ms:
        return line
    between_ms = following_ms - opening.at_ms
    carried = math.floor(window.per_second * between_ms / 1000)
    line += f". It ends {format_ms(end_ms - following_ms)} after the next occurrence is due: "
    line += f"{asked.jobs} jobs are asked for every {format_ms(between_ms)}, and {window.limit} can carry {carried}"
    if asked.jobs > carried:
        return f"{line}, {asked.jobs - carried} less. While that stays so, each occurrence is later than the last"
    return f"{line}, which others use as well"


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
