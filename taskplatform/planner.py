"""Plans: from what became due since the cursors to jobs in the waiting set.

It asks what is due between a group's cursor and now, so that a late, repeated or missed call heals itself. What it promises does
not rest on who calls it: every step is a script that moves a cursor with the work, so two planners at once make the same jobs
as one.

An occurrence's window is decided when it is opened, and kept in its record: it is the definition's, or what the limits can carry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from taskplatform import tracing
from taskplatform.backfill import Backfiller
from taskplatform.errors import StoreError, StoreUnavailable
from taskplatform.message import message_template
from taskplatform.model import Definition, format_duration, format_ms
from taskplatform.store import DueItem, Outage, PublishedDefinition, Store
from taskplatform.windows import GRACE, TOGETHER, Round, Windows, hosts_of, limit_of, warning

log = logging.getLogger(__name__)

#: What cannot be planned, or is another catalogue's, is looked at again after this.
_PUT_OFF = timedelta(seconds=10)
#: A clock that shows so much less than before was set back.
_SET_BACK_MS = 1000
#: Outages are kept for so much longer than the occurrences that were missed in them.
_EVIDENCE_BEYOND = timedelta(hours=1)
#: Planning as a whole, among what can fail.
_WHOLE = "what is due"
_ERROR_CHARACTERS = 300
#: The same trouble is logged once in this time.
_LOG_AGAIN = timedelta(minutes=1)
#: So many widened windows are logged one by one in a round; the rest are counted.
_LOGGED = 10


def published(definition: Definition, environment: Mapping[str, str] | None = None) -> PublishedDefinition:
    """What the store must know of a definition; of its host only with an `environment` that gives it."""
    host = "" if definition.config is None else definition.config.host(environment or {})
    return PublishedDefinition(
        id=definition.id,
        schedule=definition.schedule,
        priority=definition.priority,
        overlap=definition.overlap,
        message=message_template(definition),
        window=definition.window,
        version=definition.version,
        limit=limit_of(definition),
        host=host,
        timeout=definition.timeout,
    )


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
        self._windows = Windows(store, catalogue, horizon=horizon, hosts=hosts_of(catalogue, environment))
        self._backfiller = Backfiller(store, batch=batch, actor=name)
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
            log.warning("the clock of Redis was set back by %s: all that was put off is looked at again", format_ms(self._seen_ms - now_ms))
            self._store.look_again()
        self._seen_ms = now_ms
        due = self._store.due(now_ms)
        while due and time.monotonic() < deadline:
            # a batch of each in turn, so that a large occurrence holds back no small one
            planned += sum(self._plan(item) for item in due if item.kind == "occurrence")
            if any(item.kind == "group" for item in due):
                # with the others that are due, because they share the limits
                self._open(self._due_groups()[:TOGETHER])
            # last: what is due now goes before what is run afterwards
            planned += sum(self._backfill(item) for item in due if item.kind == "backfill")
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
        if to_ms - from_ms > _ms(GRACE):
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
            for start in range(0, len(due), TOGETHER):
                self._open(due[start : start + TOGETHER])

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

    def _backfill(self, item: DueItem) -> int:
        made = 0
        with self._postponed_if_broken(item):
            made = self._backfiller.step(item.id)
            self._troubles.over(f"{item.kind} {item.id}")
        return made

    def _open(self, items: Sequence[DueItem]) -> None:
        """Open what is due of these groups, so that it shares what the limits can carry."""
        now_ms = self._store.now_ms()
        rounds: list[tuple[DueItem, Round]] = []
        planned = self._planned()
        for item in items:
            with self._postponed_if_broken(item):
                group = self._store.group(item.id)
                definition = planned.get(group.definition) if group else None
                if group is None or definition is None:
                    self._store.postpone(item, by=_PUT_OFF)
                else:
                    rounds.append((item, self._windows.round(group, definition, now_ms)))
        self._windows.widen([one for _, one in rounds], now_ms)
        warnings: list[str] = []
        for item, one in rounds:
            with self._postponed_if_broken(item):
                if self._open_one(one) is not None:
                    warnings += [warning(one.group, *widened) for widened in one.widened]
                if failed := self._troubles.over(f"{item.kind} {item.id}"):
                    self._absent(failed[0], now_ms, item.id, failed[1])
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

    def _open_one(self, one: Round) -> int | None:
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


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
