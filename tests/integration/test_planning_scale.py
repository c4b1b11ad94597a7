"""Planning with many subscribers, many schedules and many definitions at once: what it costs, and that it stays exact.

The last test is the overload of 300 definitions in the same second. It has OVERLOAD_USERS users, 100 unless the environment says
otherwise; with 10,000 it is 3,000,000 jobs, takes minutes and nearly 2 GB in Redis:

    OVERLOAD_USERS=10000 python -m pytest --timeout 3600 tests/integration/test_planning_scale.py -k overload
"""

from __future__ import annotations

import os
import random
import tracemalloc
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast
from zoneinfo import ZoneInfo, available_timezones

import pytest
import redis
from pydantic import ValidationError

from taskplatform.model import Definition, Interval, JobState, Limit, Priority, moment, planned_job_id, slot
from taskplatform.planner import Planner
from taskplatform.store import Store, Subscribe
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, Message, define, offer, take

HORIZON_MS = round(HORIZON.total_seconds() * 1000)
WINDOW_MS = 60_000
HOUR = 3_600_000
DAY = 24 * HOUR
#: 2027-01-15 09:00 UTC, half an hour after the tests begin.
NINE = 1_800_003_600_000
HOURLY = {"type": "hourly"}
BATCH = 250
OVERLOAD_USERS = int(os.environ.get("OVERLOAD_USERS", "100"))


@pytest.fixture(autouse=True)
def _between_two_hours(clock: Clock) -> None:
    clock.now_ms = NINE - HOUR // 2


def lead(store: Store, *definitions: Definition, batch: int = BATCH) -> Planner:
    planner = Planner(store, {definition.id: definition for definition in definitions}, horizon=HORIZON, batch=batch)
    planner.lead()
    return planner


def advance(planner: Planner) -> timedelta:
    """A tick that does all that is due, also on a machine that stands still for a while."""
    return planner.advance(budget=timedelta(minutes=5))


def run(planner: Planner, clock: Clock, until_ms: int, *, step_ms: int = 1000) -> None:
    """Ticks from now on, the last one at `until_ms` or a step before."""
    while True:
        advance(planner)
        if clock.now_ms + step_ms > until_ms:
            return
        clock.now_ms += step_ms


def populate(store: Store, count: int, *definitions: str) -> list[str]:
    """So many users, subscribed to all of these."""
    names = [f"u{number}" for number in range(count)]
    store.create_users(names, actor=ACTOR)
    for definition in definitions:
        store.subscribe([Subscribe(name, definition) for name in names], horizon=HORIZON, actor=ACTOR, log=False)
    return names


class Commands:
    """How many commands Redis ran, those inside scripts too."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.count = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """`count` is set to what runs inside."""
        self._client.config_resetstat()
        yield
        stats = cast("dict[str, dict[str, int]]", self._client.info("commandstats"))
        self.count = sum(each["calls"] for name, each in stats.items() if name not in ("cmdstat_config|resetstat", "cmdstat_info"))


def waiting(client: redis.Redis, definition: str, priority: Priority = Priority.MEDIUM) -> dict[str, int]:
    """The jobs of a definition that wait, and when each may go."""
    rows = cast("list[tuple[str, float]]", client.zrange(f"tp:lane:{priority}:{definition}", 0, -1, withscores=True))
    found = {member.partition(":")[2]: int(after) for member, after in rows}
    assert len(found) == len(rows), "a job waits twice"
    return found


def at_nine(definition: str, names: Sequence[str]) -> dict[str, int]:
    """The jobs of the occurrence at nine, each at its moment."""
    return {planned_job_id(definition, name, NINE): moment(NINE, slot(name, definition), WINDOW_MS) for name in names}


# --- one definition with many subscribers ----------------------------------------------------------------------------


def stream(client: redis.Redis, store: Store, clock: Clock, count: int) -> tuple[int, int, int]:
    """Plan a window for so many. Returns the most memory that planning took, and the commands of an idle tick before and in the end."""
    client.flushall()
    clock.now_ms = NINE - HOUR // 2
    leading, commands, most = lead(store, define(interval=HOURLY)), Commands(client), 0
    advance(leading)
    with commands.counted():
        advance(leading)
    idle_before = commands.count
    expected = at_nine("report", populate(store, count, "report"))
    moments = sorted(expected.values())
    tracemalloc.start()
    try:
        for clock.now_ms in range(NINE - 6000, NINE + WINDOW_MS + 1000, 1500):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            advance(leading)
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
            reach = clock.now_ms + HORIZON_MS
            lane = "tp:lane:medium:report"
            assert client.zcard(lane) == bisect_right(moments, reach)
            assert client.zcount(lane, f"({reach}", "+inf") == 0
    finally:
        tracemalloc.stop()
    assert waiting(client, "report") == expected
    with commands.counted():
        advance(leading)
    return most, idle_before, commands.count


def test_planning_streams(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What planning holds in memory does not grow with the subscribers, nor does what a tick costs that has nothing to do."""
    few, few_idle_before, few_idle = stream(client, store, clock, 10_000)
    many, many_idle_before, many_idle = stream(client, store, clock, 100_000)
    # the texts of the scripts that are read on the way are most of it; 100,000 ids alone would be 6 MB
    assert few < 450_000
    assert many < few + 50_000
    assert few_idle_before == few_idle == many_idle_before == many_idle <= 3


def test_another_planner_goes_on_in_the_middle_of_a_window(client: redis.Redis, store: Store, clock: Clock) -> None:
    """The first one is gone after some batches of a tick; the second one begins at the cursor."""

    class Gone(BaseException):
        pass

    class Mortal(Store):
        batches = 0

        def plan(self, oid: str, *, horizon: timedelta, batch: int) -> tuple[int, int | None]:
            answer = super().plan(oid, horizon=horizon, batch=batch)
            self.batches += 1
            if self.batches == 30:
                raise Gone
            return answer

    report = define(interval=HOURLY)
    first = lead(Mortal(client, clock=clock), report)
    expected = at_nine("report", populate(store, 20_000, "report"))
    clock.now_ms = NINE - 6000
    with pytest.raises(Gone):
        run(first, clock, NINE + WINDOW_MS)
    planned = waiting(client, "report")
    assert 3000 < len(planned) < 10_000
    run(lead(store, report), clock, NINE + WINDOW_MS)
    assert waiting(client, "report") == expected
    (occurrence,) = store.occurrences("report")
    assert (occurrence.state, occurrence.planned) == ("done", 20_000)


# --- many schedules --------------------------------------------------------------------------------------------------


def accepted(zone: str) -> bool:
    try:
        Interval.model_validate({"type": "daily", "timezone": zone})
    except ValidationError:
        return False
    return True


def test_own_times_in_all_zones(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A group for each zone and hour, on the day on which Europe's clocks change: each user's job comes at the user's own time."""
    known = sorted(filter(accepted, available_timezones()))
    zones = random.Random(400).sample(known, min(400, len(known)))
    hours = {f"u{number}": (zone, number % 24) for number, zone in enumerate(zone for zone in zones for _ in range(24))}
    began = int(datetime(2027, 3, 27, 12, tzinfo=UTC).timestamp()) * 1000
    clock.now_ms = began - HORIZON_MS
    leading = lead(store, define(interval={"type": "daily"}, window=0))
    store.create_users(hours, actor=ACTOR)
    own = [
        Subscribe(name, "report", Interval.model_validate({"type": "daily", "at_time": {"hour": hour}, "timezone": zone}), True)
        for name, (zone, hour) in hours.items()
    ]
    store.subscribe(own, horizon=HORIZON, actor=ACTOR, log=False)
    assert len(cast("set[str]", client.smembers("tp:groups:report"))) == len(hours)

    commands, idle, dues = Commands(client), Counter[int](), 0
    wait = advance(leading)
    while clock.now_ms + HORIZON_MS < began + DAY:
        if wait > timedelta(milliseconds=1):
            # up to the last millisecond before the next one is due, nothing is
            clock.now_ms += wait // timedelta(milliseconds=1) - 1
            # the first look after so long notes that nobody looked
            advance(leading)
            with commands.counted():
                advance(leading)
            idle[commands.count] += 1
            wait = timedelta(milliseconds=1)
        clock.now_ms += wait // timedelta(milliseconds=1)
        made = int(store.planner().get("planned", 0))
        with commands.counted():
            wait = advance(leading)
        due = int(store.planner()["planned"]) - made
        # a due group is read and opened, its occurrence read and planned
        assert commands.count <= 42 * due + 10
        dues += due
    # instants of a day to which wall clocks at a full hour belong: not more than all quarters of an hour
    assert sum(idle.values()) <= 24 * 4 + 1
    assert max(idle) <= 3
    expected = {
        (name, at) for name, (zone, hour) in hours.items() for at in own_times(zone, hour, date(2027, 3, 28)) if began < at <= began + DAY
    }
    found = [(job_id.split(":")[1], after) for job_id, after in waiting(client, "report").items()]
    assert sorted(found) == sorted(expected)
    assert dues == len(found)
    changed = {zone for zone in zones if offset(zone, began) != offset(zone, began + DAY)}
    assert changed
    assert {name for name, (zone, _) in hours.items() if zone not in changed} <= {
        name for name, count in Counter(name for name, _ in found).items() if count == 1
    }


def own_times(zone: str, hour: int, day: date) -> set[int]:
    """When the zone's clock shows this hour, the day before to the day after. zoneinfo reads a skipped time as RFC 5545 says."""
    days = (day + timedelta(days=number) for number in (-1, 0, 1))
    return {int(datetime(one.year, one.month, one.day, hour, tzinfo=ZoneInfo(zone)).timestamp()) * 1000 for one in days}


def offset(zone: str, at_ms: int) -> timedelta | None:
    return datetime.fromtimestamp(at_ms / 1000, ZoneInfo(zone)).utcoffset()


# --- many definitions at once ----------------------------------------------------------------------------------------

#: A second. Of 100 users 25 jobs of high priority come in a second, and 475 others.
TOTAL_LIMIT = 40


class Recorded(Store):
    """Notes which occurrence got its turn."""

    def __init__(self, client: redis.Redis, clock: Clock) -> None:
        super().__init__(client, clock=clock)
        self.turns: list[str] = []

    def plan(self, oid: str, *, horizon: timedelta, batch: int) -> tuple[int, int | None]:
        self.turns.append(oid)
        return super().plan(oid, horizon=horizon, batch=batch)


def test_no_definition_is_starved_while_others_are_planned(client: redis.Redis, store: Store, clock: Clock) -> None:
    """300 in the same second, of which one has as many users as all others have together, in one tick that has all to do."""
    names = [f"d{number:03}" for number in range(300)]
    recorded = Recorded(client, clock)
    catalogue = {name: define(name, interval=HOURLY) for name in names}
    leading = Planner(recorded, catalogue, horizon=timedelta(seconds=70), batch=10)
    leading.lead()
    populate(store, 50, *names)
    many = [f"many{number}" for number in range(15_000)]
    store.create_users(many, actor=ACTOR)
    store.subscribe([Subscribe(user, "d000") for user in many], horizon=HORIZON, actor=ACTOR, log=False)
    clock.now_ms = NINE - 9000
    advance(leading)
    assert len(set(recorded.turns[:300])) == 300, "each has its turn before any has a second one"
    last = {oid: number for number, oid in enumerate(recorded.turns[:300])}
    longest = 0
    for number, oid in enumerate(recorded.turns[300:], 300):
        longest = max(longest, number - last[oid])
        last[oid] = number
    assert longest <= 3 * 300, "none waits longer than for three turns of all"
    assert sum(len(waiting(client, name)) for name in names) == 300 * 50 + 15_000


def test_overload(client: redis.Redis, store: Store, clock: Clock) -> None:
    """300 definitions in the same second, all users subscribed to all, and workers that get through a part of it under a total limit."""
    definitions = [define(f"d{number:03}", interval=HOURLY, priority=_priority(number)) for number in range(300)]
    ids = [definition.id for definition in definitions]
    leading = lead(store, *definitions)
    users = populate(store, OVERLOAD_USERS, *ids)
    work = Work(client, store, clock)
    for clock.now_ms in range(NINE - 6000, NINE + WINDOW_MS + 10_000, 2000):
        advance(leading)
        if clock.now_ms == NINE - 4000:
            # the windows are open: a limit that was known before would have widened them
            store.set_limit("total", Limit(TOTAL_LIMIT, TOTAL_LIMIT), actor=ACTOR)
        for one in random.Random(clock.now_ms).sample(definitions, 5):
            moments = at_nine(one.id, users).values()
            planned = sum(occurrence.planned for occurrence in store.occurrences(one.id))
            assert planned == sum(at <= clock.now_ms + HORIZON_MS for at in moments), "each is as far as the horizon"
        work.off()
    for definition in definitions:
        occurrence = store.occurrences(definition.id)[0]
        assert (occurrence.state, occurrence.planned) == ("done", len(users))
        done = work.done.pop(definition.id, {})
        waits = waiting(client, definition.id, definition.priority) | work.queued(definition)
        assert done.keys().isdisjoint(waits)
        assert {**waits, **done} == at_nine(definition.id, users)


def _priority(number: int) -> Priority:
    """A twentieth is high, half is medium, the rest low."""
    return Priority.HIGH if number % 20 == 0 else Priority.MEDIUM if number % 2 else Priority.LOW


class Work:
    """The hands of a worker that runs everything at once, and sees that all is in order."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self._client, self._store, self._clock = client, store, clock
        self._began_ms = clock.now_ms
        self._started = 0
        self.done: dict[str, dict[str, int]] = {}
        offer(store, slots=8)

    def off(self) -> None:
        """Run what may go now."""
        offer(self._store, slots=8)
        self._store.release()
        order: list[tuple[int, int]] = []
        ranks = list(Priority)
        while message := self._next():
            definition = message.job_id.partition(":")[0]
            priority = Priority(str(self._client.hget(f"tp:job:{message.job_id}", "priority")))
            started = self._store.start(message.job_id, delivery=message.delivery, worker="w1")
            assert started.go
            assert self.done.setdefault(definition, {}).setdefault(message.job_id, started.execute_after_ms) == started.execute_after_ms
            assert started.execute_after_ms <= self._clock.now_ms
            order.append((ranks.index(priority), started.execute_after_ms))
            self._store.finish(message.job_id, delivery=message.delivery, worker="w1", state=JobState.COMPLETED, reason="done")
        self._started += len(order)
        assert self._started <= TOTAL_LIMIT * (1 + (self._clock.now_ms - self._began_ms) / 1000)
        # what became due since the last time waits behind nothing of a lower priority
        assert order == sorted(order)
        if order:
            for higher in ranks[: order[-1][0]]:
                assert not self._due(higher), f"a {ranks[order[-1][0]]} job ran before one of priority {higher} that was due"

    def queued(self, definition: Definition) -> dict[str, int]:
        """What was released and not started, of a definition."""
        ids = cast("list[str]", self._client.zrange(f"tp:queued:{definition.priority}", 0, -1))
        return {job.id: job.execute_after_ms for job in self._store.jobs_by_id(ids) if job.definition == definition.id}

    def _next(self) -> Message | None:
        try:
            return take(self._client)
        except LookupError:
            return None

    def _due(self, priority: Priority) -> Any:
        return self._client.zrange(f"tp:ready:{priority}", "-inf", self._clock.now_ms, byscore=True)
