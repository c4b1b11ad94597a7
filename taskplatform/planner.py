"""Plans: from what became due since the cursors to jobs in the waiting set.

It asks what is due between a group's cursor and now, so that a late, repeated or missed call heals itself. What it promises does
not rest on who calls it: every step is a script that moves a cursor with the work, so two planners at once make the same jobs
as one.

An occurrence's window is decided when it is opened, and kept in its record: it is the definition's, or what the limits can carry.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property

from taskplatform import tracing
from taskplatform.capacity import Demand, Fit, Load, fit
from taskplatform.errors import StoreError, StoreUnavailable
from taskplatform.message import message_template
from taskplatform.model import CatchUpPolicy, Definition, Limit, Priority, format_duration
from taskplatform.schedule import latest_occurrence, next_occurrence, occurrences
from taskplatform.store import Commitment, DueItem, Group, Opening, Outage, PublishedDefinition, Store

log = logging.getLogger(__name__)

#: An occurrence is missed when this long, or its window if that is longer, has passed.
_GRACE = timedelta(seconds=60)
#: So many missed occurrences of a group are caught up at the most, the newest ones.
_MOST_CAUGHT_UP = 1000
#: What cannot be planned, or is another catalogue's, is looked at again after this.
_PUT_OFF = timedelta(seconds=10)
#: A clock that shows so much less than before was set back.
_SET_BACK_MS = 1000
#: Outages are kept for so much longer than the occurrences that were missed in them.
_EVIDENCE_BEYOND = timedelta(hours=1)
#: So many groups that are due are opened together at the most, each in about a millisecond.
_TOGETHER = 1000
#: Planning as a whole, among what can fail.
_WHOLE = "what is due"
_ERROR_CHARACTERS = 300
#: The same trouble is logged once in this time.
_LOG_AGAIN = timedelta(minutes=1)
#: So many widened windows are logged one by one in a round; the rest are counted.
_LOGGED = 10


def published(definition: Definition, environment: Mapping[str, str] | None = None) -> PublishedDefinition:
    """What the store must know of a definition; of its host only with an `environment` that gives it."""
    limit = definition.rate_limit
    host = "" if definition.config is None else definition.config.host(environment or {})
    return PublishedDefinition(
        id=definition.id,
        schedule=definition.schedule,
        priority=definition.priority,
        overlap=definition.overlap,
        message=message_template(definition),
        window=definition.window,
        version=definition.version,
        limit=Limit(limit.per_second if limit else None, limit.burst if limit else None, definition.concurrency),
        host=host,
        timeout=definition.timeout,
    )


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


class Windows:
    """Decides how wide windows are, so that the limits can carry what comes due in them."""

    def __init__(
        self, store: Store, catalogue: Mapping[str, Definition], *, horizon: timedelta, environment: Mapping[str, str] | None = None
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._horizon = horizon
        self._environment = environment

    def rates(self) -> dict[str, float]:
        """Jobs per second that each limit allows, where it allows any: no window is wide enough for none."""
        return {name: limit.sustained for name, limit in self._store.limits().items() if limit.sustained}

    def fit(self, due: Sequence[Due], rates: Mapping[str, float]) -> list[Window]:
        """The windows of what comes due together, in this order. Without a limit that applies they are what was asked for."""
        limits = [self._limits(one.definition.id, rates) if rates else () for one in due]
        if not any(limits):
            return [Window(one.window_ms) for one in due]
        demands = [
            Demand(one.start_ms, one.window_ms * one.count, one.jobs * one.count, _rank(one.definition.priority, one.caught_up), names)
            for one, names in zip(due, limits, strict=True)
        ]
        commitments = self._store.commitments(horizon=self._horizon)
        # what waits of a definition that is no more is rejected, and takes nothing of a limit
        loads = [self._load(one, rates) for one in commitments if one.definition in self._catalogue]
        fits = fit(rates, loads, demands)
        return [_window(one, demand, found, rates) for one, demand, found in zip(due, demands, fits, strict=True)]

    def _load(self, one: Commitment, rates: Mapping[str, float]) -> Load:
        rank = _rank(one.priority or self._catalogue[one.definition].priority)
        return Load(one.start_ms, one.end_ms, one.jobs, rank, self._limits(one.definition, rates))

    def _limits(self, definition: str, rates: Mapping[str, float]) -> tuple[str, ...]:
        names = (f"definition:{definition}", f"host:{self._hosts[definition]}", "total")
        return tuple(name for name in names if name in rates)

    @cached_property
    def _hosts(self) -> dict[str, str]:
        calls = ((name, definition.config) for name, definition in self._catalogue.items())
        return {name: (config.host(self._environment or {}) or "") if config else "" for name, config in calls}


def _rank(priority: Priority, caught_up: bool = False) -> int:
    """Who goes first at a limit: the higher priority, and inside it what is due now before what was missed."""
    return 2 * list(Priority).index(priority) + caught_up


def _window(due: Due, demand: Demand, found: Fit, rates: Mapping[str, float]) -> Window:
    window_ms = due.window_ms if found.window_ms == demand.window_ms else math.ceil(found.window_ms / due.count)
    delay_ms = found.start_ms - due.start_ms
    if window_ms == due.window_ms and delay_ms == 0:
        return Window(window_ms)
    changes = []
    if window_ms != due.window_ms:
        changes.append(f"widened from {_text(due.window_ms)} to {_text(window_ms)}")
    if delay_ms:
        changes.append(f"put off by {_text(delay_ms)}")
    jobs = f"{due.jobs} jobs" if found.together == due.jobs else f"{due.jobs} of {found.together} jobs that go together"
    note = f"window {' and '.join(changes)}: limit {found.limit} {rates[found.limit]:g}/s, {jobs}"
    return Window(window_ms, delay_ms, note, found.limit, rates[found.limit])


@dataclass(slots=True)
class _Round:
    """A group that is due, and what is about to become of its occurrences."""

    item: DueItem
    group: Group
    definition: Definition
    openings: list[Opening]
    cursor_ms: int
    following_ms: int | None
    """The first occurrence after the cursor."""
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Trouble:
    """Something that cannot be planned."""

    since_ms: int
    error: str
    at: float
    """When it was met last, by the monotonic clock; and when it was last logged."""
    logged_at: float


class Troubles:
    """What cannot be planned, by its name: since when, and why. The same is logged once a minute, however often it is met."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Trouble] = {}

    def met(self, name: str, fault: Exception, now_ms: int, advice: str) -> None:
        """`name` failed. Logs it with its traceback, unless that was done a while ago."""
        now, error = time.monotonic(), f"{type(fault).__name__}: {fault}"
        known = self._by_name.get(name)
        told = known is not None and known.error == error and now - known.logged_at < _LOG_AGAIN.total_seconds()
        if not told:
            log.error("cannot plan %s; %s", name, advice, exc_info=fault)
        logged_at = known.logged_at if known and told else now
        self._by_name[name] = _Trouble(known.since_ms if known else now_ms, error, now, logged_at)

    def over(self, name: str) -> tuple[int, str] | None:
        """`name` went well. Since when (ms) it had failed, and why; None where it had not."""
        known = self._by_name.pop(name, None)
        return (known.since_ms, known.error) if known else None

    def worst(self) -> tuple[int, str] | None:
        """Since when (ms) something fails, and what, of those that were met in the last minute."""
        oldest = time.monotonic() - _LOG_AGAIN.total_seconds()
        self._by_name = {name: one for name, one in self._by_name.items() if one.at > oldest}
        if not self._by_name:
            return None
        name, worst = min(self._by_name.items(), key=lambda item: item[1].since_ms)
        more = f" (and {len(self._by_name) - 1} more)" if len(self._by_name) > 1 else ""
        return worst.since_ms, f"{name}: {worst.error}"[:_ERROR_CHARACTERS] + more


class Planner:
    """Advances the plan of one catalogue."""

    def __init__(
        self,
        store: Store,
        catalogue: Mapping[str, Definition],
        *,
        horizon: timedelta,
        batch: int,
        name: str = "planner",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._horizon = horizon
        self._batch = batch
        self._name = name
        self._environment = environment
        self._windows = Windows(store, catalogue, horizon=horizon, environment=environment)
        #: What the server's clock last showed to a planner.
        self._seen_ms = 0
        #: When all that was due had been looked at last, by this planner or the one before.
        self._looked_ms = 0
        self._troubles = Troubles()
        self._reports_trouble = False
        self._as_published = False

    def lead(self, *, confirm: Callable[[], object] = lambda: None) -> int:
        """Take over, and publish this catalogue. Returns the term.

        `confirm` is called when the new term has begun, and raises if another leads by then. Raises Conflict as `publish` does.
        """
        term = self.begin(confirm=confirm)
        self.publish(term, confirm=confirm)
        return term

    def begin(self, *, confirm: Callable[[], object] = lambda: None) -> int:
        """Take over, with what is published. Returns the term.

        Until this catalogue is published only those of its definitions are planned that are published as they are here; the others,
        and those that it does not have, are a newer catalogue's.
        """
        term = self._store.lead(horizon=self._horizon, leader=self._name)
        confirm()
        self._seen_ms = int(self._store.planner().get("tick", 0))
        self._looked_ms = self._seen_ms or self._store.now_ms()
        self._store.planner_is_well()
        self._as_published = True
        return term

    def publish(self, term: int, *, confirm: Callable[[], object] = lambda: None) -> None:
        """Finish what the schedules so far made due, then publish this catalogue. `confirm` is called again and again while that lasts.

        Raises Conflict when another leads since `term`: a leader that slept must not publish an old catalogue over a new one. Whoever
        publishes next completes what was left undone, also of an attempt that was broken off.
        """
        self._as_published = False
        self._open_due()
        for definition in self._catalogue.values():
            if self._store.publish(published(definition, self._environment), actor=self._name, term=term):
                log.info("published definition %s, version %s", definition.id, definition.version)
        for name, priority in self._store.behind().items():
            self._store.follow_priority(name, priority, confirm=confirm)
        self._store.announce(actor=self._name)
        for name in sorted(self._store.published() - self._catalogue.keys()):
            self._store.retract(name, actor=self._name, term=term)
            log.warning("definition %s is no longer in the catalogue: what waits of it will be rejected", name)

    def advance(self, *, budget: timedelta = timedelta(seconds=2)) -> timedelta:
        """Plan what is due, for about `budget` at the most. Returns how long until there is more to do.

        What fails is put off, and stands in the store (`Store.planner`) until it goes well.
        """
        deadline = time.monotonic() + budget.total_seconds()
        planned = 0
        now_ms = self._store.now_ms()
        if now_ms < self._seen_ms - _SET_BACK_MS:
            log.warning("the clock of Redis was set back by %s: all that was put off is looked at again", _text(self._seen_ms - now_ms))
            self._store.look_again()
        self._seen_ms = now_ms
        due = self._store.due(now_ms)
        while due and time.monotonic() < deadline:
            # a batch of each in turn, so that a large occurrence holds back no small one
            planned += sum(self._plan(item) for item in due if item.kind == "occurrence")
            if any(item.kind == "group" for item in due):
                # with the others that are due, because they share the limits
                self._open(self._due_groups()[:_TOGETHER])
            due = self._store.due(self._store.now_ms())
        self._troubles.over(_WHOLE)
        self._store.planner_tick(planned=planned)
        if self._looked_ms:
            self._absent(self._looked_ms, now_ms)
        self._looked_ms = now_ms
        self._report()
        if due:
            return timedelta()
        next_ms = self._store.next_due_ms()
        if next_ms is None:
            return timedelta(days=1)
        return timedelta(milliseconds=max(0, next_ms - self._store.now_ms()))

    def _absent(self, from_ms: int, to_ms: int, what: str = "", error: str = "") -> None:
        """Keep it for `why`, where nothing, or something, was not planned for so long that its occurrences may have been missed."""
        if to_ms - from_ms > _ms(_GRACE):
            evidence = self._store.evidence
            evidence.outage(Outage(from_ms, to_ms, what, error[:_ERROR_CHARACTERS]), kept=evidence.retention() + _EVIDENCE_BEYOND)

    def failed(self, fault: Exception) -> None:
        """`advance` raised: let it be seen, as far as the store can be told."""
        self._troubles.met(_WHOLE, fault, round(time.time() * 1000), "trying again at the next tick")
        with suppress(StoreError):
            self._report()

    def _report(self) -> None:
        worst = self._troubles.worst()
        if worst:
            self._store.planner_fails(since_ms=worst[0], error=worst[1])
        elif self._reports_trouble:
            self._store.planner_is_well()
        self._reports_trouble = worst is not None

    def _open_due(self) -> None:
        seen: set[str] = set()
        while due := [item for item in self._due_groups() if item.id not in seen]:
            seen.update(item.id for item in due)
            for start in range(0, len(due), _TOGETHER):
                self._open(due[start : start + _TOGETHER])

    def _due_groups(self) -> list[DueItem]:
        return [item for item in self._store.due(self._store.now_ms(), limit=10_000) if item.kind == "group"]

    @contextmanager
    def _postponed_if_broken(self, item: DueItem) -> Iterator[None]:
        try:
            yield
        except StoreUnavailable:
            raise
        except Exception as fault:
            # one that is broken, such as a zone that this machine does not know, must not hold back the others
            self._troubles.met(f"{item.kind} {item.id}", fault, self._store.now_ms(), f"trying again in {format_duration(_PUT_OFF)}")
            self._store.postpone(item, by=_PUT_OFF)

    def _plan(self, item: DueItem) -> int:
        made = 0
        with self._postponed_if_broken(item):
            began_ns = time.time_ns()
            made, _ = self._store.plan(item.id, horizon=self._horizon, batch=self._batch)
            tracing.planned(item.id, made, began_ns)
            self._troubles.over(f"{item.kind} {item.id}")
        return made

    def _open(self, items: Sequence[DueItem]) -> None:
        """Open what is due of these groups, so that it shares what the limits can carry."""
        now_ms = self._store.now_ms()
        rounds = []
        planned = self._planned()
        for item in items:
            with self._postponed_if_broken(item):
                group = self._store.group(item.id)
                definition = planned.get(group.definition) if group else None
                if group is None or definition is None:
                    self._store.postpone(item, by=_PUT_OFF)
                else:
                    rounds.append(self._round(item, group, definition, now_ms))
        self._widen(rounds, now_ms)
        warnings: list[str] = []
        for one in rounds:
            with self._postponed_if_broken(one.item):
                if self._open_one(one) is not None:
                    warnings += one.warnings
                if failed := self._troubles.over(f"{one.item.kind} {one.item.id}"):
                    self._absent(failed[0], now_ms, one.item.id, failed[1])
        for line in warnings[:_LOGGED]:
            log.warning("%s", line)
        if len(warnings) > _LOGGED:
            log.warning("limits made the windows of %d more occurrences wider or later", len(warnings) - _LOGGED)

    def _planned(self) -> Mapping[str, Definition]:
        """The definitions that this planner may plan."""
        if not self._as_published:
            return self._catalogue
        versions = self._store.versions(list(self._catalogue))
        pairs = zip(self._catalogue.items(), versions, strict=True)
        return {name: definition for (name, definition), version in pairs if definition.version == version}

    def _round(self, item: DueItem, group: Group, definition: Definition, now_ms: int) -> _Round:
        until_ms = max(now_ms + _ms(self._horizon), group.cursor_ms)
        openings = self._openings(group, definition, now_ms, until_ms)
        return _Round(item, group, definition, openings, until_ms, next_occurrence(group.schedule, until_ms))

    def _open_one(self, one: _Round) -> int | None:
        for opening in one.openings:
            if opening.source != "schedule":
                log.warning("%s: occurrence %d: %s, %s", one.group.id, opening.at_ms, opening.source, opening.reason)
        return self._store.open_occurrences(
            one.group,
            one.openings,
            cursor_ms=one.cursor_ms,
            next_due_ms=None if one.following_ms is None else one.following_ms - _ms(self._horizon),
            window_ms=_ms(one.definition.window),
            horizon=self._horizon,
        )

    def _widen(self, rounds: Sequence[_Round], now_ms: int) -> None:
        """Give the openings the windows that the limits can carry."""
        opening = [one for one in rounds if any(each.source != "skip" for each in one.openings)]
        rates = self._windows.rates() if opening else {}
        if not rates:
            return
        sizes = self._store.sizes([(one.group.id, one.definition.id) for one in opening])
        due: list[Due] = []
        places: list[tuple[_Round, list[int]]] = []
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
        for (one, numbers), asked, window in zip(places, due, self._windows.fit(due, rates), strict=True):
            if window.note:
                for number in numbers:
                    one.openings[number] = _widened(one.openings[number], asked, window)
                    one.warnings.append(_warning(one.group, one.openings[number], asked, window))

    def _openings(self, group: Group, definition: Definition, now_ms: int, until_ms: int) -> list[Opening]:
        """What becomes of each occurrence between the cursor and the horizon."""
        missed_before = now_ms - max(_ms(definition.window), _ms(_GRACE))
        current = [
            Opening(at_ms, "schedule", "due") for at_ms in occurrences(group.schedule, max(group.cursor_ms, missed_before), until_ms)
        ]
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


def _warning(group: Group, opening: Opening, asked: Due, window: Window) -> str:
    """The line of the log about a widened window."""
    line = f"{group.id}: occurrence {opening.at_ms}: {window.note}"
    following_ms = next_occurrence(group.schedule, opening.at_ms) if opening.source == "schedule" else None
    end_ms = asked.start_ms + window.delay_ms + window.window_ms
    if following_ms is None or end_ms <= following_ms:
        return line
    between_ms = following_ms - opening.at_ms
    carried = math.floor(window.per_second * between_ms / 1000)
    line += f". It ends {_text(end_ms - following_ms)} after the next occurrence is due: "
    line += f"{asked.jobs} jobs are asked for every {_text(between_ms)}, and {window.limit} can carry {carried}"
    if asked.jobs > carried:
        return f"{line}, {asked.jobs - carried} less. While that stays so, each occurrence is later than the last"
    return f"{line}, which others use as well"


def _text(span_ms: int) -> str:
    return format_duration(timedelta(milliseconds=span_ms))


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
