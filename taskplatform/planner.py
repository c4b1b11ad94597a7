"""Plans: from what became due since the cursors to jobs in the waiting set.

It asks what is due between a group's cursor and now, so that a late, repeated or missed call heals itself. What it promises does
not rest on who calls it: every step is a script that moves a cursor with the work, so two planners at once make the same jobs
as one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from taskplatform.errors import StoreUnavailable
from taskplatform.message import message_template
from taskplatform.model import CatchUpPolicy, Definition, Limit
from taskplatform.schedule import latest_occurrence, next_occurrence, occurrences
from taskplatform.store import DueItem, Group, Opening, PublishedDefinition, Store

log = logging.getLogger(__name__)

#: An occurrence is missed when this long, or its window if that is longer, has passed.
_GRACE = timedelta(seconds=60)
#: So many missed occurrences of a group are caught up at the most, the newest ones.
_MOST_CAUGHT_UP = 1000
#: What cannot be planned, or is another catalogue's, is looked at again after this.
_PUT_OFF = timedelta(seconds=10)


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
        limit=Limit(limit.per_second if limit else None, limit.burst if limit else None, definition.concurrency),
        host=host,
    )


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

    def lead(self, *, confirm: Callable[[], object] = lambda: None) -> None:
        """Take over: finish what the schedules so far made due, then publish this catalogue.

        `confirm` is called when the new term has begun, and raises if another leads by then. Raises Conflict if one does later:
        a leader that slept meanwhile must not publish an old catalogue over a new one.
        """
        term = self._store.lead(horizon=self._horizon, leader=self._name)
        confirm()
        self._open_due()
        before = self._store.published()
        for definition in self._catalogue.values():
            if self._store.publish(published(definition, self._environment), actor=self._name, term=term):
                log.info("published definition %s", definition.id)
                self._store.follow_priority(definition.id, definition.priority)
        self._store.log_added(sorted(self._catalogue.keys() - before), actor=self._name)
        for name in sorted(self._store.published() - self._catalogue.keys()):
            self._store.retract(name, actor=self._name, term=term)
            log.warning("definition %s is no longer in the catalogue: what waits of it will be rejected", name)

    def advance(self, *, budget: timedelta = timedelta(seconds=2)) -> timedelta:
        """Plan what is due, for about `budget` at the most. Returns how long until there is more to do."""
        deadline = time.monotonic() + budget.total_seconds()
        planned = 0
        due = self._store.due(self._store.now_ms())
        while due and time.monotonic() < deadline:
            # a batch of each in turn, so that a large occurrence holds back no small one
            for item in due:
                planned += self._handle(item)
            due = self._store.due(self._store.now_ms())
        self._store.planner_tick(planned=planned)
        if due:
            return timedelta()
        next_ms = self._store.next_due_ms()
        if next_ms is None:
            return timedelta(days=1)
        return timedelta(milliseconds=max(0, next_ms - self._store.now_ms()))

    def _open_due(self) -> None:
        seen: set[str] = set()
        while due := [item for item in self._store.due(self._store.now_ms(), limit=10_000) if item.kind == "group" and item.id not in seen]:
            for item in due:
                seen.add(item.id)
                self._handle(item)

    def _handle(self, item: DueItem) -> int:
        try:
            return self._look_at(item)
        except StoreUnavailable:
            raise
        except Exception:
            # one that is broken, such as a zone that this machine does not know, must not hold back the others
            log.exception("cannot plan %s %s; trying again in %s", item.kind, item.id, _PUT_OFF)
            self._store.postpone(item, by=_PUT_OFF)
            return 0

    def _look_at(self, item: DueItem) -> int:
        if item.kind == "occurrence":
            made, _ = self._store.plan(item.id, horizon=self._horizon, batch=self._batch)
            return made
        group = self._store.group(item.id)
        definition = self._catalogue.get(group.definition) if group else None
        if group is None or definition is None:
            self._store.postpone(item, by=_PUT_OFF)
        else:
            self._open(group, definition)
        return 0

    def _open(self, group: Group, definition: Definition) -> None:
        now_ms = self._store.now_ms()
        horizon_ms = _ms(self._horizon)
        until_ms = max(now_ms + horizon_ms, group.cursor_ms)
        following = next_occurrence(group.schedule, until_ms)
        openings = self._openings(group, definition, now_ms, until_ms)
        for opening in openings:
            if opening.source != "schedule":
                log.warning("%s: occurrence %d: %s, %s", group.id, opening.at_ms, opening.source, opening.reason)
        self._store.open_occurrences(
            group,
            openings,
            cursor_ms=until_ms,
            next_due_ms=None if following is None else following - horizon_ms,
            window_ms=_ms(definition.window),
            horizon=self._horizon,
        )

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
    oldest = max(group.cursor_ms, now_ms - _ms(definition.catch_up.window) - 1)
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


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
