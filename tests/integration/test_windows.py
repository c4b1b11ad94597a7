"""Windows are as wide as the limits need: decided when an occurrence is opened, kept in its record, and said in log and counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from taskplatform.catalogue import Catalogue
from taskplatform.model import Definition, JobState, Limit, slot
from taskplatform.planner import Planner
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Occurrence, Store, Subscribe
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, offer, take

SECOND = 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
#: 2027-01-15 09:00 UTC.
NINE = 1_800_003_600_000
DAILY = {"type": "daily", "at_time": {"hour": 9}}
HOURLY = {"type": "hourly"}


@pytest.fixture(autouse=True)
def _shortly_before_nine(clock: Clock) -> None:
    clock.now_ms = NINE - 10 * SECOND


class Unhurried(Planner):
    """One whose ticks are whole, also on a machine that stands still for a while."""

    def advance(self, *, budget: timedelta = timedelta(minutes=5)) -> timedelta:
        return super().advance(budget=budget)


def planner(store: Store, *definitions: Definition, batch: int = 1000) -> Planner:
    return Unhurried(store, {definition.id: definition for definition in definitions}, horizon=HORIZON, batch=batch)


def lead(store: Store, *definitions: Definition) -> Planner:
    made = planner(store, *definitions)
    made.lead()
    return made


def limit(store: Store, name: str, per_second: float | None) -> None:
    # so large a burst that release does not feel it
    store.set_limit(name, Limit(per_second, 100_000), actor=ACTOR)


def subscribers(store: Store, definition: str, count: int, **changes: Any) -> None:
    names = [f"u{number}" for number in range(count)]
    store.create_users(names, actor=ACTOR)
    store.subscribe([Subscribe(name, definition, **changes) for name in names], horizon=HORIZON, actor=ACTOR, log=False)


def own(**interval: Any) -> dict[str, Any]:
    return {"schedule": define(interval=interval).schedule, "own_schedule": True}


def latest(store: Store, definition: str = "report") -> Occurrence:
    return store.occurrences(definition)[0]


def span(one: Occurrence) -> tuple[float, float]:
    """(start after its time, length) of an occurrence's window, in seconds."""
    return (one.base_ms - one.at_ms) / SECOND, one.window_ms / SECOND


def due_at_nine(clock: Clock) -> None:
    clock.now_ms = NINE - 5 * SECOND


def run(clock: Clock, store: Store, planners: Sequence[Planner], until_ms: int, *, step_ms: int = SECOND, release: bool = False) -> None:
    """All of them advance, again and again, until the clock shows `until_ms`; with `release`, whatever is due goes at once."""
    while True:
        for one in planners:
            one.advance()
        while release and store.release()[0]:
            pass
        if clock.now_ms >= until_ms:
            return
        clock.now_ms = min(until_ms, clock.now_ms + step_ms)


# --- the store's part ------------------------------------------------------------------------------------------------


def test_limits_are_read(store: Store) -> None:
    limits = {"definition:report": Limit(0.5, 1, 3), "host:api": Limit(1e-05, 1), "total": Limit(10.0, 5), "user": Limit(concurrency=2)}
    for name, one in limits.items():
        store.set_limit(name, one, actor=ACTOR)
    assert store.limits() == limits


# --- one occurrence --------------------------------------------------------------------------------------------------


def test_ten_thousand_at_ten_a_second(client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    leading = lead(store, define(interval=DAILY, window="60s"))
    subscribers(store, "report", 10_000)
    limit(store, "total", 10)
    due_at_nine(clock)
    leading.advance()
    one = latest(store)
    note = "window widened from 1m to 16m40s: limit total 10/s, 10000 jobs"
    assert (one.base_ms, one.window_ms, one.asked_ms) == (NINE, 1000 * SECOND, MINUTE)
    assert one.reason == f"due; {note}"
    assert caplog.messages.count(f"report: occurrence {NINE}: {note}") == 1
    assert (store.planner()["widened"], store.planner()["widened_ms"]) == ("1", str(940 * SECOND))
    run(clock, store, [leading], NINE + 100 * SECOND)
    expected = sum(slot(f"u{number}", "report") * 1000 <= 105 for number in range(10_000))
    assert latest(store).planned == expected
    run(clock, store, [leading], NINE + 1000 * SECOND, step_ms=4 * SECOND)
    one = latest(store)
    assert (one.state, one.planned, one.reason) == ("done", 10_000, f"planned: due; {note}")
    assert client.hgetall("tp:committed") == {}
    moments = [job.execute_after_ms for job in store.jobs(definition="report", limit=10_000).items]
    tenths = Counter((at - NINE) * 10 // (1000 * SECOND) for at in moments if at < NINE + 900 * SECOND)
    assert len(tenths) == 9
    assert min(tenths.values()) > 900


@pytest.mark.parametrize("limits", [{}, {"total": 10.0}, {"definition:other": 0.001}, {"total": None}])
def test_what_fits_is_left_alone(
    client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture, limits: Mapping[str, float | None]
) -> None:
    leading = lead(store, define(interval=DAILY, window="60s"))
    subscribers(store, "report", 600)
    for name, per_second in limits.items():
        limit(store, name, per_second)
    due_at_nine(clock)
    caplog.clear()
    leading.advance()
    assert (span(latest(store)), latest(store).asked_ms, latest(store).reason) == ((0, 60), MINUTE, "due")
    assert caplog.messages == []
    assert "widened" not in store.planner()
    assert_consistent(client, store)


def test_the_limit_of_a_definition(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY), define("other", interval=DAILY))
    for name in ("report", "other"):
        subscribers(store, name, 300)
    limit(store, "definition:report", 2)
    limit(store, "total", 100)
    due_at_nine(clock)
    leading.advance()
    assert latest(store).reason == "due; window widened from 1m to 2m30s: limit definition:report 2/s, 300 jobs"
    assert (span(latest(store)), span(latest(store, "other"))) == ((0, 150), (0, 60))


def test_the_limit_of_a_host_is_shared(client: redis.Redis, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"first": "http://api.test/a", "second": "${API}/b", "third": "http://elsewhere/c"}
    catalogue = {
        name: Definition.model_validate({"id": name, "name": name, "interval": DAILY, "config": {"endpoint": endpoint}})
        for name, endpoint in hosts.items()
    }
    leading = Planner(store, catalogue, horizon=HORIZON, batch=1000, environment={"API": "http://api.test"})
    leading.lead()
    for name in hosts:
        subscribers(store, name, 300)
    limit(store, "host:api.test", 5)
    due_at_nine(clock)
    leading.advance()
    assert [span(latest(store, name)) for name in hosts] == [(0, 120), (0, 120), (0, 60)]
    assert latest(store, "first").reason.endswith("limit host:api.test 5/s, 300 of 600 jobs that go together")


# --- several ---------------------------------------------------------------------------------------------------------


def test_what_is_due_together_ends_together(client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """300 definitions, more than the planner reads of what is due at a time."""
    names = [f"d{number}" for number in range(300)]
    leading = lead(store, *[define(name, interval=DAILY) for name in names])
    store.create_users([f"u{number}" for number in range(10)], actor=ACTOR)
    for name in names:
        subscriptions = [Subscribe(f"u{number}", name) for number in range(10)]
        store.subscribe(subscriptions, horizon=HORIZON, actor=ACTOR, log=False)
    limit(store, "total", 10)
    due_at_nine(clock)
    caplog.clear()
    leading.advance()
    assert {span(latest(store, name)) for name in names} == {(0, 300)}
    assert latest(store, "d7").reason.endswith("10 of 3000 jobs that go together")
    # some lines and a summary, not one for each
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "limits made the windows of 290 more occurrences wider or later"
    assert store.planner()["widened"] == "300"


def test_the_groups_of_own_schedules_count_together(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY))
    subscribers(store, "report", 900)
    weekdays = {
        f"u{number}": own(type="daily", at_time={"hour": 9}, timezone=zone)
        for number, zone in enumerate(["Africa/Abidjan", "Africa/Accra", "Africa/Dakar"] * 100)
    }
    wanted = [Subscribe(name, "report", **schedule) for name, schedule in weekdays.items()]
    clock.now_ms -= HOUR
    store.subscribe(wanted, horizon=HORIZON, actor=ACTOR, log=False)
    limit(store, "definition:report", 9)
    due_at_nine(clock)
    leading.advance()
    found = store.occurrences("report")
    assert len(found) == 4
    # who has just moved counts in both groups
    assert {one.window_ms for one in found} == {found[0].window_ms}
    assert 100 * SECOND <= found[0].window_ms <= 134 * SECOND


def test_a_higher_priority_goes_first(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define("low", interval=DAILY, priority="low"), define("high", interval=DAILY, priority="high"))
    for name in ("low", "high"):
        subscribers(store, name, 1000)
    limit(store, "total", 10)
    due_at_nine(clock)
    leading.advance()
    assert (span(latest(store, "high")), span(latest(store, "low"))) == ((0, 100), (100, 100))
    assert latest(store, "low").reason == "due; window widened from 1m to 1m40s and put off by 1m40s: limit total 10/s, 1000 jobs"


def test_beside_one_that_is_open(client: redis.Redis, store: Store, clock: Clock) -> None:
    first = define("first", interval=DAILY)
    second = define("second", interval={"type": "daily", "at_time": {"hour": 9, "minute": 1}})
    urgent = define("urgent", interval={"type": "daily", "at_time": {"hour": 9, "minute": 1}}, priority="high")
    leading = lead(store, first, second, urgent)
    for name in ("first", "second", "urgent"):
        subscribers(store, name, 1000)
    limit(store, "total", 5)
    due_at_nine(clock)
    leading.advance()
    assert span(latest(store, "first")) == (0, 200)
    offer(store, slots=2000)
    run(clock, store, [leading], NINE + 55 * SECOND, release=True)
    assert span(latest(store, "urgent")) == (0, 200), "what is committed for a lower priority gives way"
    start, length = span(latest(store, "second"))
    assert start == pytest.approx(340, abs=2), "the urgent ones, and after them what is left of the first"
    assert length == pytest.approx(200, abs=1)


def test_what_waits_already_goes_first(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Jobs that are due and not released, because no worker was there."""
    leading = lead(store, define(interval=HOURLY, window="60s"))
    subscribers(store, "report", 600)
    limit(store, "total", 10)
    due_at_nine(clock)
    for now_ms in range(NINE - 5 * SECOND, NINE + 60 * SECOND, 5 * SECOND):
        clock.now_ms = now_ms
        leading.advance()
    assert (span(latest(store)), latest(store).planned) == ((0, 60), 600)
    clock.now_ms = NINE + HOUR - 5 * SECOND
    leading.advance()
    assert span(latest(store)) == (55, 60)
    store.pause_definition("report", why="", actor=ACTOR)
    clock.now_ms = NINE + 2 * HOUR - 5 * SECOND
    leading.advance()
    assert latest(store).state == "skipped"


def test_a_paused_definition_takes_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define("first", interval=DAILY), define("second", interval=DAILY))
    for name in ("first", "second"):
        subscribers(store, name, 600)
    limit(store, "total", 10)
    store.pause_definition("first", why="", actor=ACTOR)
    due_at_nine(clock)
    leading.advance()
    assert (latest(store, "first").state, span(latest(store, "second"))) == ("skipped", (0, 60))


def test_a_limit_that_is_changed_counts_for_the_next(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s"))
    subscribers(store, "report", 1200)
    offer(store, slots=5000)
    found = []
    for hour, per_second in enumerate((10, 5, 40)):
        limit(store, "total", per_second)
        clock.now_ms = NINE + hour * HOUR - 5 * SECOND
        run(clock, store, [leading], NINE + hour * HOUR + 250 * SECOND, step_ms=5 * SECOND, release=True)
        found.append(span(latest(store)))
    assert found == [(0, 120), (0, 240), (0, 60)]
    assert [one.window_ms for one in store.occurrences("report")] == [60 * SECOND, 240 * SECOND, 120 * SECOND]


def test_more_is_asked_than_can_ever_be_carried(client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    leading = lead(store, define(interval={"type": "minutely"}, window="60s"))
    subscribers(store, "report", 900)
    # the minute before is open: part of its users have subscribed before their moment
    run(clock, store, [leading], NINE + 50 * SECOND)
    limit(store, "definition:report", 10)
    offer(store, slots=5000)
    found = []
    for minute in range(1, 5):
        run(clock, store, [leading], NINE + minute * MINUTE, release=True)
        found.append(span(latest(store)))
    assert [start for start, _ in found] == pytest.approx([0, 30, 60, 90], abs=3)
    assert [length for _, length in found] == pytest.approx([90] * 4, abs=1)
    assert (
        "It ends 30s after the next occurrence is due: 900 jobs are asked for every 1m, and definition:report can carry 600, 300 less. "
        "While that stays so, each occurrence is later than the last" in caplog.text
    )


# --- triggers and catching up ----------------------------------------------------------------------------------------


def platform(store: Store, tmp_path: Any, *definitions: Definition) -> Platform:
    return Platform(store, Catalogue.of(*definitions), Settings(tasks_dir=str(tmp_path)), actor=ACTOR)


@pytest.mark.parametrize(("asked", "expected"), [(None, 100), (timedelta(seconds=50), 100), (timedelta(seconds=300), 300)])
def test_a_trigger(client: redis.Redis, store: Store, clock: Clock, tmp_path: Any, asked: timedelta | None, expected: int) -> None:
    definition = define(interval=DAILY, window="10s")
    leading = lead(store, definition)
    subscribers(store, "report", 1000)
    limit(store, "total", 10)
    at, count = platform(store, tmp_path, definition).trigger("report", window=asked)
    assert (at, count) == (datetime.fromtimestamp(clock.now_ms / 1000, UTC), 1000)
    one = latest(store)
    asked_ms = 10 * SECOND if asked is None else round(asked.total_seconds() * SECOND)
    assert (one.source, span(one), one.asked_ms) == ("trigger", (0, expected), asked_ms)
    assert one.reason.startswith("triggered by test")
    assert ("limit total 10/s, 1000 jobs" in one.reason) == (expected > asked_ms / SECOND)
    # what the schedule makes due comes after it
    due_at_nine(clock)
    leading.advance()
    end = sum(span(latest(store)))
    # either after all of it and what waits since, or beside the third of the limit that it takes
    assert end == pytest.approx(90 + 5 + 100 if expected == 100 else 150, abs=2)


def test_a_trigger_without_limits(client: redis.Redis, store: Store, clock: Clock, tmp_path: Any) -> None:
    definition = define(interval=DAILY, window="10s")
    lead(store, definition)
    subscribers(store, "report", 50)
    platform(store, tmp_path, definition).trigger("report")
    one = latest(store)
    assert (span(one), one.asked_ms, one.reason) == ((0, 10), 10 * SECOND, f"triggered by {ACTOR}")
    assert_consistent(client, store)


def test_catching_up_is_spread_over_what_the_limit_can_carry(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s", catch_up="all"))
    subscribers(store, "report", 1000)
    leading.advance()
    limit(store, "total", 10)
    clock.now_ms = back = NINE + 3 * HOUR + 30 * SECOND
    leading.advance()
    found = sorted(store.occurrences("report"), key=lambda one: one.base_ms)
    assert [(one.source, one.at_ms) for one in found] == [
        ("schedule", NINE + 3 * HOUR),
        *(("catch_up", NINE + hour * HOUR) for hour in range(3)),
    ]
    # the one that is due goes first; those that were missed follow, each over a window of its own
    assert [(one.base_ms - back) / SECOND for one in found[1:]] == pytest.approx([100, 200, 300], abs=1)
    assert [one.window_ms / SECOND for one in found] == pytest.approx([100] * 4, abs=1)
    assert "caught up: missed while no planner ran, policy all; window widened from 1m to" in found[1].reason
    run(clock, store, [leading], back + 420 * SECOND)
    assert {(one.state, one.planned) for one in store.occurrences("report")} == {("done", 1000)}
    assert "planned: caught up" in store.occurrences("report")[1].reason


def test_after_an_outage_what_was_open_goes_on_beside_what_is_due(client: redis.Redis, store: Store, clock: Clock) -> None:
    first = define("first", interval=DAILY)
    second = define("second", interval={"type": "daily", "at_time": {"hour": 9, "minute": 30}})
    leading = lead(store, first, second)
    for name in ("first", "second"):
        subscribers(store, name, 1000)
    limit(store, "total", 1)
    due_at_nine(clock)
    leading.advance()
    assert span(latest(store, "first")) == (0, 1000)
    # nobody plans from now until the second is due; the first has all still to come
    clock.now_ms = NINE + 30 * MINUTE
    lead(store, first, second)
    start, length = span(latest(store, "second"))
    assert start == pytest.approx(1000, abs=10)
    assert length == 1000


# --- two planners, and the whole way ---------------------------------------------------------------------------------


def test_two_planners_agree(client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The window is decided once, whoever comes later and whatever the limits are by then."""
    definition = define(interval=DAILY, window="10s")
    both = [lead(store, definition), planner(store, definition)]
    subscribers(store, "report", 300)
    limit(store, "total", 10)
    due_at_nine(clock)
    both[0].advance()
    limit(store, "total", 1)
    both[1].advance()
    assert span(latest(store)) == (0, 30)
    run(clock, store, both, NINE + 31 * SECOND)
    assert (latest(store).state, latest(store).planned) == ("done", 300)
    found = store.jobs(definition="report", limit=1000).items
    assert {job.user: job.execute_after_ms for job in found} == {
        f"u{number}": NINE + int(slot(f"u{number}", "report") * 30 * SECOND) for number in range(300)
    }
    assert sum("widened" in line for line in caplog.messages) == 1
    assert store.planner()["widened"] == "1"
    assert_consistent(client, store)


def test_a_second_planner_opens_nothing_again(client: redis.Redis, store: Store, clock: Clock) -> None:
    """It read the group before the first one opened the occurrence, under another limit."""
    definition = define(interval=DAILY, window="10s")
    first = lead(store, definition)
    subscribers(store, "report", 300)
    limit(store, "total", 10)
    due_at_nine(clock)

    class Slow(Store):
        def limits(self) -> dict[str, Limit]:
            first.advance()
            return {"total": Limit(1.0)}

    planner(Slow(client, clock=clock), definition).advance()
    assert span(latest(store)) == (0, 30)
    assert store.planner()["widened"] == "1"
    assert_consistent(client, store)


def run_all(client: redis.Redis, store: Store) -> None:
    """Start and end what is released, and what that releases."""
    with suppress(LookupError):
        while True:
            message = take(client)
            assert store.start(message.job_id, delivery=message.delivery, worker="w1").go
            store.finish(message.job_id, delivery=message.delivery, worker="w1", state=JobState.COMPLETED, reason="done")


def due_and_waiting(client: redis.Redis, now_ms: int) -> int:
    return sum(client.zcount(lane, "-inf", now_ms) for lane in client.keys("tp:lane:*"))


def test_no_backlog(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Under a limit that the definitions' own windows ask too much of, hardly a job ever waits for more than its moment."""
    definitions = [
        define("first", interval=DAILY),
        define("second", interval={"type": "daily", "at_time": {"hour": 9, "minute": 1}}),
        define("third", interval={"type": "daily", "at_time": {"hour": 9, "minute": 1}}, window="5m"),
        define("fourth", interval={"type": "daily", "at_time": {"hour": 9, "minute": 3}}, window=0),
    ]
    leading = lead(store, *definitions)
    sizes = {"first": 700, "second": 500, "third": 600, "fourth": 200}
    for name, count in sizes.items():
        subscribers(store, name, count)
    store.set_limit("total", Limit(10, 7), actor=ACTOR)
    offer(store, slots=5000)
    due_at_nine(clock)
    most = 0
    while store.counts()[JobState.COMPLETED] < sum(sizes.values()):
        assert clock.now_ms < NINE + 7 * MINUTE, store.counts()
        leading.advance()
        store.release()
        run_all(client, store)
        most = max(most, due_and_waiting(client, clock.now_ms))
        clock.advance(0.5)
    # chance puts some slots close together: sqrt(700) is the deviation of 700
    assert most < 60, "jobs wait for the limit"
    assert clock.now_ms < NINE + 370 * SECOND, "the longest window that was asked for ends at 9:06"
    assert_consistent(client, store)
