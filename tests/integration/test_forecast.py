"""A forecast is held against what the planner then does, on a real server, and against what release then lets go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from taskplatform.catalogue import Catalogue
from taskplatform.forecast.ahead import _Ahead
from taskplatform.model import Definition, JobState, Limit, slot
from taskplatform.planner import Planner
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Store, Subscribe
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, define, enqueue, offer, publish, take

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
#: 2027-01-15 09:00 UTC.
NINE = 1_800_003_600_000
#: So far ahead that a tick in half a minute is never late.
LONG = timedelta(minutes=1)


class Unhurried(Planner):
    """One whose ticks are whole, also on a machine that stands still for a while."""

    def advance(self, *, budget: timedelta = timedelta(minutes=5)) -> timedelta:
        return super().advance(budget=budget)


def lead(store: Store, *definitions: Definition, horizon: timedelta = HORIZON) -> Planner:
    made = Unhurried(store, {one.id: one for one in definitions}, horizon=horizon, batch=1000)
    made.lead()
    return made


def platform(store: Store, *definitions: Definition) -> Platform:
    return Platform(store, Catalogue.of(*definitions), Settings(), actor=ACTOR)


def subscribers(store: Store, definition: str, users: Sequence[str], **changes: Any) -> None:
    store.create_users(users, actor=ACTOR)
    store.subscribe([Subscribe(user, definition, **changes) for user in users], horizon=HORIZON, actor=ACTOR, log=False)


def names(count: int, start: int = 0) -> list[str]:
    return [f"u{number}" for number in range(start, start + count)]


def own(**interval: Any) -> dict[str, Any]:
    return {"schedule": define(interval=interval).schedule, "own_schedule": True}


# --- windows and moments ---------------------------------------------------------------------------------------------


def test_the_plan_of_hours_is_the_planners(store: Store, clock: Clock) -> None:
    """Windows to the millisecond, subscribers of each to the one, moments of each minute within what hashing leaves to chance."""
    clock.now_ms = NINE - 20 * MINUTE
    definitions = (
        define("sync", interval={"type": "hourly"}, window="10m", priority="high"),
        define("report", interval={"type": "daily", "at_time": {"hour": 9}}, window="60s"),
        define("poll", interval={"type": "minutely", "value": 15}, window="60s", priority="low"),
        define("clean", cron={"expression": "30 * * * *"}, window="30m", priority="low"),
    )
    leading = lead(store, *definitions, horizon=LONG)
    subscribers(store, "sync", names(400))
    subscribers(store, "report", names(900))
    subscribers(store, "report", names(200, 900), **own(type="daily", at_time={"hour": 11}, timezone="Europe/Berlin"))
    subscribers(store, "report", names(150, 1100), **own(type="daily", at_time={"hour": 5}, timezone="America/New_York"))
    subscribers(store, "poll", names(120))
    subscribers(store, "clean", names(400))
    # so large a burst that release does not feel it, and windows do
    store.set_limit("total", Limit(0.5, 100_000), actor=ACTOR)
    store.set_limit("definition:sync", Limit(0.2, 100_000), actor=ACTOR)
    offer(store, slots=100_000)
    leading.advance()
    end_ms = clock.now_ms + 3 * HOUR
    ahead = simulated(platform(store, *definitions), hours=3)

    while clock.now_ms <= end_ms:
        offer(store, slots=100_000)
        while store.release()[0]:
            pass
        leading.advance()
        clock.advance(30)

    planned = Counter[tuple[str, int, int, int]]()
    for definition in definitions:
        # what was open when it was forecast is no window that it foresees
        for one in store.occurrences(definition.id, since_ms=NINE - 15 * MINUTE, limit=1000):
            group_members = one.planned if one.state == "done" else store.sizes([(one.group, one.definition)])[0]
            planned[definition.id, one.at_ms, one.base_ms, one.window_ms] += group_members
    expected = Counter[tuple[str, int, int, int]]()
    for opened in ahead.opened:
        expected[opened.definition, opened.at_ms, opened.start_ms, opened.window_ms] += opened.members
    assert len(expected) > 18
    assert expected == planned
    assert sum(one.limit != "" for one in ahead.opened) > 8, "limits widened many of them"

    moments = Counter(
        ((job.definition, (job.execute_after_ms - ahead.stream.start_ms) // MINUTE))
        for definition in definitions
        for job in store.jobs(definition=definition.id, limit=10_000).items
        if job.execute_after_ms < end_ms
    )
    made = Counter[str]()
    for (definition_id, _), count in moments.items():
        made[definition_id] += count
    for (definition_id, _), lane in ahead.stream.lanes.items():
        total = sum(lane.planned)
        # what is planned has come to its moment but for the windows that the end cuts
        assert abs(total - made[definition_id]) <= 4 * (total**0.5 + 1), definition_id
        for minute, jobs in enumerate(lane.planned):
            assert abs(jobs - moments[definition_id, minute]) <= 5 * (jobs**0.5 + 1), (definition_id, minute)


def simulated(platform: Platform, *, hours: float) -> Any:
    """The course behind a forecast."""
    store = platform.store
    outlook = store.outlook(horizon=LONG, until_ms=store.now_ms() + round(hours * HOUR))
    ahead = _Ahead(outlook, platform.catalogue, platform.settings, horizon=LONG, end_ms=outlook.now_ms + round(hours * HOUR), bin_ms=MINUTE)
    return ahead._simulate((), {}, ahead._pools(None))


def test_a_forecast_begins_in_the_midst_of_things(store: Store, clock: Clock) -> None:
    """What is left of an open occurrence comes exactly, what is due waits, what is paused is left out."""
    clock.now_ms = NINE - 10 * SECOND
    report = define(interval={"type": "daily", "at_time": {"hour": 9}}, window="1h")
    idle, gone = define("idle"), define("gone")
    leading = lead(store, report, idle, gone)
    subscribers(store, "report", names(1000))
    subscribers(store, "idle", names(50))
    for at_ms in range(NINE - 5 * SECOND, NINE + 20 * MINUTE, SECOND * 5):
        clock.now_ms = at_ms
        leading.advance()
    store.pause_definition("idle", why="a test", actor=ACTOR)
    for number in range(7):
        enqueue(store, "gone", "u1", f"m{number}", delay_ms=2 * HOUR + number * MINUTE)
    found = platform(store, report, idle, gone).forecast(hours=5)

    due = sum(NINE + int(slot(user, "report") * HOUR) <= clock.now_ms for user in names(1000))
    first = found.total.points[0]
    assert first.jobs >= due
    by_name = {one.name: one for one in found.definitions}
    assert by_name["report"].jobs == pytest.approx(1000, abs=0.1)
    assert by_name["gone"].jobs == pytest.approx(7, abs=0.01)
    assert by_name.keys() == {"report", "gone"}
    assert any("idle" in line for line in found.left_out)
    assert any("No worker" in line for line in found.assumptions)
    assert found.slots.there is None


# --- release ---------------------------------------------------------------------------------------------------------


def test_release_goes_as_it_was_foreseen(store: Store, clock: Clock) -> None:
    """Strict priority under a rate: what goes in each minute, and when the higher priority is done."""
    high, low = define("first", priority="high"), define("second", priority="low")
    publish(store, high, low)
    store.create_users(names(1), actor=ACTOR)
    store.set_limit("total", Limit(1.0, 20), actor=ACTOR)
    clock.now_ms = NINE
    for number in range(150):
        enqueue(store, "first", "u0", f"m{number}")
        enqueue(store, "second", "u0", f"m{number}")
    offer(store, "w1", slots=10)
    found = platform(store, high, low).forecast(hours=0.1)

    starts: Counter[tuple[str, int]] = Counter()
    done: dict[str, int] = {}
    while clock.now_ms < NINE + 6 * MINUTE:
        offer(store, "w1", slots=10)
        store.release()
        while True:
            try:
                message = take(store._redis)
            except LookupError:
                break
            start = store.start(message.job_id, delivery=message.delivery, worker="w1")
            if not start.go:
                continue
            name = message.job_id.partition(":")[0]
            starts[name, (clock.now_ms - NINE) // MINUTE] += 1
            done[name] = clock.now_ms
            finish(store, message.job_id, message.delivery)
        clock.advance(1)

    assert sum(starts.values()) == 300
    by_name = {one.name: one for one in found.definitions}
    for name in ("first", "second"):
        foreseen = {point.bin: point.requests for point in by_name[name].points}
        for minute in range(6):
            # a step of the forecast, and the burst that the level of a bucket is rounded to
            assert foreseen.get(minute, 0) == pytest.approx(starts[name, minute], abs=12), (name, minute)
    ended = {one.of: one for one in found.backlogs}
    assert ended["priority:high"].end_ms == pytest.approx(done["first"], abs=MINUTE)
    assert ended["priority:low"].end_ms == pytest.approx(done["second"], abs=MINUTE)
    assert ended["priority:low"].because == ("total",)
    assert ended["priority:low"].delay_ms == pytest.approx(done["second"] - NINE, abs=15 * SECOND)


def finish(store: Store, job_id: str, delivery: int) -> None:
    store.finish(job_id, delivery=delivery, worker="w1", state=JobState.COMPLETED, reason="done")
