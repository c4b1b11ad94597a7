"""One occurrence, one job: whoever plans, however often, wherever they stop; and whatever users change meanwhile."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskplatform.errors import Conflict, StoreUnavailable
from taskplatform.model import Definition, Job, JobState, Schedule, moment, planned_job_id, schedule_to_json, slot
from taskplatform.planner import Planner
from taskplatform.schedule import next_occurrence, occurrences
from taskplatform.store import DueItem, Opening, Store, SubscribeResult
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, enqueue, offer, publish, subscribe

S = JobState
HORIZON_MS = round(HORIZON.total_seconds() * 1000)
MINUTE = 60_000
HOUR = 60 * MINUTE
#: 2027-01-15 09:00 UTC, 50 minutes after the tests begin.
NINE = 1_800_003_600_000
DAILY = {"type": "daily", "at_time": {"hour": 9}}
HOURLY = {"type": "hourly"}


@pytest.fixture(autouse=True)
def _between_two_hours(clock: Clock) -> None:
    clock.now_ms += 10 * MINUTE


class Unhurried(Planner):
    """One whose ticks are whole, also on a machine that stands still for a while."""

    def advance(self, *, budget: timedelta = timedelta(minutes=5)) -> timedelta:
        return super().advance(budget=budget)


def planner(store: Store, *definitions: Definition, batch: int = 250) -> Planner:
    return Unhurried(store, {definition.id: definition for definition in definitions}, horizon=HORIZON, batch=batch)


def lead(store: Store, *definitions: Definition, batch: int = 250) -> Planner:
    made = planner(store, *definitions, batch=batch)
    made.lead()
    return made


def users(store: Store, count: int) -> list[str]:
    names = [f"u{number}" for number in range(count)]
    store.create_users(names, actor=ACTOR)
    return names


def subscribe_all(store: Store, names: Sequence[str], definition: str, **changes: Any) -> None:
    for name in names:
        assert subscribe(store, name, definition, **changes) is SubscribeResult.CREATED


def own(**interval: Any) -> dict[str, Any]:
    """What `subscribe` takes for an own schedule."""
    return {"schedule": define(interval=interval).schedule, "own_schedule": True}


def jobs(store: Store, definition: str | None = None) -> dict[str, Job]:
    return {job.id: job for job in store.jobs(definition=definition, limit=10_000).items}


def run(clock: Clock, planners: Sequence[Planner], until_ms: int, step_ms: int = 1000) -> None:
    """All of them advance, again and again, until the clock shows `until_ms`."""
    while True:
        for one in planners:
            one.advance()
        if clock.now_ms >= until_ms:
            return
        clock.now_ms = min(until_ms, clock.now_ms + step_ms)


# --- moments and streaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 7, 250])
def test_each_user_has_one_job_at_the_exact_moment(client: redis.Redis, store: Store, clock: Clock, batch: int) -> None:
    report = define(interval=DAILY, window="60s")
    leading = lead(store, report, batch=batch)
    names = users(store, 40)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - 10_000
    while clock.now_ms < NINE + 70_000:
        leading.advance()
        found = jobs(store)
        reach = clock.now_ms + HORIZON_MS
        expected = {planned_job_id("report", name, NINE): moment(NINE, slot(name, "report"), 60_000) for name in names}
        assert {job_id: job.execute_after_ms for job_id, job in found.items()} == {
            job_id: at for job_id, at in expected.items() if at <= reach
        }, "exactly what the horizon asks for"
        clock.advance(0.937)
    assert len(jobs(store)) == len(names)
    (occurrence,) = store.occurrences("report")
    assert (occurrence.state, occurrence.planned, occurrence.paused) == ("done", 40, 0)
    assert_consistent(client, store)


def test_a_wait_is_told_exactly(store: Store, clock: Clock) -> None:
    """An idle tick costs nothing: the planner knows when it is needed next."""
    leading = lead(store, define(interval=DAILY))
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    assert leading.advance() == timedelta(milliseconds=NINE - HORIZON_MS - clock.now_ms)
    clock.now_ms = NINE - HORIZON_MS
    leading.advance()
    assert store.occurrences("report")[0].state == "open"
    offset_ms = moment(0, slot("u0", "report"), 60_000)
    assert leading.advance() == timedelta(milliseconds=offset_ms)
    clock.now_ms += offset_ms - 1
    assert leading.advance() == timedelta(milliseconds=1)
    assert jobs(store) == {}
    # at the very millisecond at which the moment comes within the horizon
    clock.now_ms += 1
    assert leading.advance() == timedelta(milliseconds=60_000 - offset_ms)
    assert len(jobs(store)) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_users_of_one_slot(client: redis.Redis, store: Store, clock: Clock, batch: int) -> None:
    """The cursor is a slot: who shares it must be planned together."""
    leading = lead(store, define(interval=DAILY), batch=batch)
    names = users(store, 9)
    subscribe_all(store, names, "report")
    same = {name: (0.25, 0.5, 0.5 + 2**-52)[number % 3] for number, name in enumerate(names)}
    client.zadd("tp:slots:report", same)
    clock.now_ms = NINE - 6000
    run(clock, [leading], NINE + 61_000)
    after = {job.user: job.execute_after_ms for job in jobs(store).values()}
    assert after == {name: moment(NINE, share, 60_000) for name, share in same.items()}


def test_no_window(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY, window=0), batch=3)
    names = users(store, 10)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - HORIZON_MS - 1
    leading.advance()
    assert jobs(store) == {}
    clock.advance(0.001)
    leading.advance()
    assert {(job.user, job.execute_after_ms) for job in jobs(store).values()} == {(name, NINE) for name in names}
    assert store.occurrences("report")[0].state == "done"
    assert_consistent(client, store)


def test_jobs_take_parameters_and_priority(store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY, priority="low"))
    users(store, 2)
    params = {"empty": [], "big": 2**60, "small": 1e-30, "text": 'ü "quoted" \\ /', "nested": {"paused": 1}}
    subscribe(store, "u0", "report", params=params)
    subscribe(store, "u1", "report")
    clock.now_ms = NINE
    run(clock, [leading], NINE + 61_000)
    found = {job.user: job for job in jobs(store).values()}
    assert found["u0"].params == params
    assert found["u1"].params == {}
    assert {job.priority.value for job in found.values()} == {"low"}
    assert found["u0"].source == "schedule"
    assert found["u0"].occurrence_ms == NINE
    assert store.subscription("u0", "report").params == params


# --- two planners, and planners that die -----------------------------------------------------------------------------


class Crash(BaseException):
    """The planner's process is gone."""


class Between:
    """A store for a planner, that runs `hook` with the call's number after each call."""

    def __init__(self, store: Store, hook: Callable[[int], None]) -> None:
        self._store = store
        self._hook = hook
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if not callable(verb) or name == "now_ms":
            return verb

        def call(*args: Any, **options: Any) -> Any:
            answer = verb(*args, **options)
            self.calls += 1
            self._hook(self.calls)
            return answer

        return call


class Scenario:
    """Two definitions, one with own schedules, on a clock that starts just before they come due."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self.client, self.store, self.clock = client, store, clock
        self.definitions = [
            define("report", interval=DAILY, window="12s"),
            define("sync", interval={"type": "minutely"}, window=0, overlap="skip"),
        ]

    def planner(self, store: Store | Between | None = None) -> Planner:
        return planner(cast("Store", store or self.store), *self.definitions, batch=2)

    def begin(self) -> None:
        self.client.flushall()
        self.clock.now_ms = NINE - 50_000
        publish(self.store, *self.definitions)
        names = users(self.store, 5)
        subscribe_all(self.store, names, "report")
        subscribe_all(self.store, names[:2], "sync")
        # the same time, as a group of its own
        subscribe(self.store, "u4", "report", **own(type="daily", at_time={"hour": 9}, timezone="Africa/Abidjan"))
        self.clock.now_ms = NINE - 1000

    def result(self) -> dict[str, tuple[int, str, str]]:
        return {job_id: (job.execute_after_ms, job.state.value, job.source) for job_id, job in jobs(self.store).items()}

    def ticks(self) -> Iterator[int]:
        yield from range(NINE - 1000, NINE + 13_000, 3500)

    def expected(self) -> dict[str, tuple[int, str, str]]:
        """What one planner makes that is left alone."""
        self.begin()
        alone = self.planner()
        alone.lead()
        for now_ms in self.ticks():
            self.clock.now_ms = now_ms
            alone.advance()
        assert_consistent(self.client, self.store)
        assert len(self.result()) == 5 + 2
        return self.result()


@pytest.fixture
def scenario(client: redis.Redis, store: Store, clock: Clock) -> Scenario:
    return Scenario(client, store, clock)


def test_planning_the_same_minute_twice(scenario: Scenario) -> None:
    expected = scenario.expected()
    again = scenario.planner()
    again.lead()
    for now_ms in (*scenario.ticks(), *scenario.ticks()):
        scenario.clock.now_ms = now_ms
        again.advance()
    assert scenario.result() == expected
    assert_consistent(scenario.client, scenario.store, clock_set_back=True)


def test_a_planner_that_dies_after_any_call(scenario: Scenario) -> None:
    expected = scenario.expected()
    deaths = 0
    while True:
        deaths += 1
        scenario.begin()

        def die(call: int, at: int = deaths) -> None:
            if call == at:
                raise Crash

        mortal = Between(scenario.store, die)
        first, dead = scenario.planner(mortal), False
        for number, now_ms in enumerate(scenario.ticks()):
            scenario.clock.now_ms = now_ms
            try:
                if not number:
                    first.lead()
                first.advance()
            except Crash:
                # the next one takes over in the same tick
                dead = True
                first = scenario.planner()
                first.lead()
                first.advance()
        assert scenario.result() == expected, f"it died after call {deaths}"
        if not dead:
            break
        assert_consistent(scenario.client, scenario.store)
    assert deaths > 25


def test_two_planners_between_each_others_calls(scenario: Scenario) -> None:
    expected = scenario.expected()
    scenario.begin()
    second = scenario.planner()
    first = scenario.planner(Between(scenario.store, lambda _: cast("None", second.advance())))
    first.lead()
    for now_ms in scenario.ticks():
        scenario.clock.now_ms = now_ms
        first.advance()
    assert scenario.result() == expected
    assert_consistent(scenario.client, scenario.store)


def test_an_old_leader_that_was_paused_in_any_call_and_resumes(scenario: Scenario) -> None:
    """While it sleeps another one leads and does all that comes; then it goes on with what it had read."""
    expected = scenario.expected()
    pauses = 0
    while True:
        pauses += 1
        scenario.begin()
        woke = False

        def sleep(call: int, at: int = pauses) -> None:
            nonlocal woke
            if call == at:
                other = scenario.planner()
                other.lead()
                for now_ms in scenario.ticks():
                    if now_ms >= scenario.clock.now_ms:
                        scenario.clock.now_ms = now_ms
                        other.advance()
                woke = True

        old = scenario.planner(Between(scenario.store, sleep))
        try:
            old.lead()
        except Conflict:
            assert woke
        for now_ms in scenario.ticks():
            if not woke:
                scenario.clock.now_ms = now_ms
            old.advance()
        assert scenario.result() == expected, f"it was paused after call {pauses}"
        if not woke:
            break
        assert_consistent(scenario.client, scenario.store)
    assert pauses > 25


def test_a_leader_that_slept_while_it_took_over_publishes_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Its catalogue is the old one: it would take back what the new leader published, and reject what waits of it."""
    kept = define("kept", interval=HOURLY)
    changed, gone = define("changed", interval=HOURLY, priority="high"), define("gone", interval=HOURLY)
    new = [kept, define("changed", interval=HOURLY, priority="low"), define("added", interval=HOURLY)]
    calls = 0
    while True:
        calls += 1
        client.flushall()
        woke = False

        def sleep(call: int, at: int = calls) -> None:
            nonlocal woke
            if call == at:
                lead(store, *new)
                woke = True

        catalogue = {definition.id: definition for definition in (kept, changed, gone)}
        old = Planner(cast("Store", Between(store, sleep)), catalogue, horizon=HORIZON, batch=10)
        try:
            old.lead()
        except Conflict:
            assert woke
        if not woke:
            break
        assert store.published() == {"kept", "changed", "added"}, f"it slept after call {calls}"
        assert client.hget("tp:definition:changed", "priority") == "low"
        assert_consistent(client, store)
    assert calls >= 6


def test_a_leader_that_lost_its_lock_before_its_term_publishes_nothing(client: redis.Redis, store: Store) -> None:
    class NotOwned(Exception):
        pass

    def confirm() -> None:
        raise NotOwned

    with pytest.raises(NotOwned):
        planner(store, define()).lead(confirm=confirm)
    assert store.published() == set()


def test_the_cursor_moves_only_from_where_it_was_seen(client: redis.Redis, store: Store, clock: Clock) -> None:
    lead(store, define(interval=DAILY))
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    seen = store.group("report")
    assert seen is not None

    def open_(at_ms: int) -> int | None:
        opening = [Opening(at_ms, "schedule", "due")]
        return store.open_occurrences(seen, opening, cursor_ms=at_ms, next_due_ms=None, window_ms=0, horizon=HORIZON)

    assert open_(NINE) == 1
    assert open_(NINE + HOUR) is None
    assert [one.at_ms for one in store.occurrences("report")] == [NINE]
    group = store.group("report")
    assert group is not None
    assert group.cursor_ms == NINE
    assert_consistent(client, store)


def test_the_cursor_never_moves_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Neither by a clock that was set back nor by a planner that looks less far ahead."""
    far = Planner(store, {"report": define(interval=HOURLY)}, horizon=timedelta(minutes=30), batch=10)
    far.lead()
    users(store, 1)
    subscribe(store, "u0", "report", horizon=timedelta(minutes=30))
    clock.now_ms = NINE
    far.advance()
    before = store.group("report")
    assert before is not None
    assert before.cursor_ms == NINE + 30 * MINUTE
    clock.now_ms -= 10 * MINUTE
    lead(store, define(interval={"type": "hourly", "at_time": {"minute": 20}})).advance()
    assert store.next_due_ms() != clock.now_ms
    after = store.group("report")
    assert after is not None
    assert after.cursor_ms == before.cursor_ms


def test_what_was_read_before_a_new_schedule_opens_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    """An old leader that read the group before the new one published another schedule."""
    lead(store, define(interval=DAILY))
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    seen = store.group("report")
    assert seen is not None
    publish(store, define(interval={"type": "daily", "at_time": {"hour": 10}}))
    opening = [Opening(NINE, "schedule", "due")]
    # so close that the cursor, which lies ahead, is the same for both
    client.hset("tp:group:report", "cursor", seen.cursor_ms)
    assert store.open_occurrences(seen, opening, cursor_ms=NINE, next_due_ms=None, window_ms=0, horizon=HORIZON) is None
    assert store.occurrences("report") == []


def test_a_group_of_another_catalogue_is_planned_by_whoever_has_it(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A rolling deployment: an API process publishes a new definition while the old beat still leads."""
    old_one, new_one = define("old_one", interval=HOURLY, window=0), define("new_one", interval=HOURLY, window=0)
    old = lead(store, old_one)
    publish(store, new_one)
    users(store, 1)
    subscribe_all(store, ["u0"], "new_one")
    for _ in range(3):
        old.advance()
        clock.advance(20)
    new = lead(store, old_one, new_one)
    old.advance()
    run(clock, [new], NINE)
    assert [job.occurrence_ms for job in jobs(store).values()] == [NINE]
    # while a definition is in nobody's catalogue, nobody looks at its groups
    store.retract("new_one", actor=ACTOR)
    run(clock, [old], NINE + HOUR, step_ms=MINUTE)
    assert store.next_due_ms() is None
    publish(store, new_one)
    assert store.next_due_ms() == clock.now_ms
    assert_consistent(client, store)


def test_what_cannot_be_planned_holds_back_nobody(
    client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A group with a zone that this machine does not know, and a subscription that is not JSON."""
    leading = lead(store, define("good", interval=HOURLY, window=0), define("bad", interval=HOURLY, window=0))
    names = users(store, 4)
    subscribe_all(store, names, "good")
    subscribe(store, "u0", "bad", **own(type="hourly", timezone="Asia/Tokyo"))
    subscribe(store, "u1", "bad")
    gid = next(name for name in cast("set[str]", client.smembers("tp:groups:bad")) if "~" in name)
    whole = client.hget(f"tp:group:{gid}", "schedule")
    client.hset(f"tp:group:{gid}", "schedule", '{"interval":{"type":"hourly","timezone":"Mars/Olympus"}}')
    # it stands between two others
    between = sorted(names, key=lambda name: slot(name, "good"))[1]
    raw = client.hget(f"tp:user:{between}", "good")
    client.hset(f"tp:user:{between}", "good", "{")
    with caplog.at_level(logging.ERROR):
        run(clock, [leading], NINE, step_ms=60_000)
    wanted = {(name, "good") for name in names if name != between} | {("u1", "bad")}
    assert {(job.user, job.definition) for job in jobs(store).values()} == wanted
    assert "cannot plan group bad~" in caplog.text
    # and heals when it is mended
    client.hset(f"tp:group:{gid}", "schedule", str(whole))
    client.hset(f"tp:user:{between}", "good", str(raw))
    run(clock, [leading], NINE + 20_000)
    assert {(job.user, job.definition) for job in jobs(store).values()} == wanted | {("u0", "bad")}
    assert_consistent(client, store)


def test_a_user_with_a_broken_record_can_be_deleted(client: redis.Redis, store: Store) -> None:
    lead(store, define("good"), define("bad"))
    users(store, 1)
    for name in ("bad", "good"):
        subscribe(store, "u0", name)
    client.hset("tp:user:u0", "bad", "{")
    assert store.delete_user("u0", actor=ACTOR) == (0, 2)
    assert keys_with(client, "u0") == {"tp:changes"}
    assert_consistent(client, store)


def test_without_redis_the_planner_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    leading = lead(store, define(interval=HOURLY))
    users(store, 1)
    subscribe_all(store, ["u0"], "report")

    def gone(_: str) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(store, "group", gone)
    with pytest.raises(StoreUnavailable):
        leading.advance()


# --- users change their minds: a model of which jobs must exist ------------------------------------------------------

WINDOW_MS = 90_000
#: Wide, so that a model run needs few ticks.
FAR = timedelta(seconds=20)
FAR_MS = 20_000
OWN = tuple(define(interval={"type": "minutely", "value": value}).schedule for value in (1, 3, 5))
DEFAULT = define(interval={"type": "minutely", "value": 2}).schedule
SCHEDULES: tuple[Schedule, ...] = (DEFAULT, *OWN)
CHANGING = define("report", interval={"type": "minutely", "value": 2}, window="90s", catch_up={"policy": "all", "window": "1d"})


@dataclass
class Life:
    """A subscription from its beginning to its end: which schedule is in force after one instant and up to another."""

    in_force: list[tuple[Schedule, float, float]]
    off: bool = False
    paused: bool = False

    def move(self, schedule: Schedule, effect_ms: int) -> None:
        current, since, _ = self.in_force[-1]
        if schedule == current:
            return
        self.in_force.pop()
        if since < effect_ms:
            self.in_force.append((current, since, effect_ms))
        self.in_force.append((schedule, max(since, effect_ms), math.inf))

    def enable(self, effect_ms: int) -> None:
        if self.off:
            self.off = False
            schedule, since, _ = self.in_force[-1]
            self.in_force[-1] = (schedule, max(since, effect_ms), math.inf)


@dataclass
class Model:
    """Which jobs must exist, by the words of the design alone."""

    lives: dict[str, Life] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    jobs: dict[str, tuple[int, str]] = field(default_factory=dict)
    planned_ms: int = 0

    def tick(self, now_ms: int) -> None:
        """Each moment is decided once: by what holds when it comes within the horizon."""
        start, end = self.planned_ms + FAR_MS, now_ms + FAR_MS
        for user, life in self.lives.items():
            if user in self.paused or life.off or life.paused:
                continue
            for at_ms, moment_ms in self.moments(user, start, end):
                self.jobs[planned_job_id("report", user, at_ms)] = (moment_ms, "pending")
        self.planned_ms = now_ms

    def moments(self, user: str, start_ms: int, end_ms: int) -> Iterator[tuple[int, int]]:
        """(occurrence, moment) of a user, by the schedule in force at the moment."""
        for schedule, since, until in self.lives[user].in_force:
            for at_ms in occurrences(schedule, start_ms - WINDOW_MS - 1, end_ms):
                moment_ms = moment(at_ms, slot(user, "report"), WINDOW_MS)
                if start_ms < moment_ms <= end_ms and since < moment_ms <= until:
                    yield at_ms, moment_ms

    def cancel(self, user: str) -> None:
        for job_id, (moment_ms, _) in list(self.jobs.items()):
            if job_id.split(":")[1] == user:
                self.jobs[job_id] = (moment_ms, "canceled")


class Changes:
    """Does the same to the store and to the model."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self.client, self.store, self.clock = client, store, clock
        client.flushall()
        clock.now_ms = NINE + 17_345
        self.model = Model(planned_ms=clock.now_ms)
        self.planner = Unhurried(store, {"report": CHANGING}, horizon=FAR, batch=2)
        self.planner.lead()
        self.users = ["ann", "bob", "cyd"]
        store.create_users(self.users, actor=ACTOR)

    @property
    def effect_ms(self) -> int:
        return self.clock.now_ms + FAR_MS

    def tick(self) -> None:
        self.planner.advance()
        self.model.tick(self.clock.now_ms)

    def wait(self, delay_ms: int, *, gap_ms: int) -> None:
        """The clock goes on, and the planner looks at least every `gap_ms`."""
        until_ms = self.clock.now_ms + delay_ms
        while self.model.planned_ms + gap_ms < until_ms:
            self.clock.now_ms = self.model.planned_ms + gap_ms
            self.tick()
        self.clock.now_ms = until_ms

    def do(self, what: str, user: str, number: int) -> None:
        getattr(self, what)(user, number)

    def subscribe(self, user: str, number: int) -> None:
        schedule = SCHEDULES[number]
        subscribe(self.store, user, "report", horizon=FAR, schedule=schedule, own_schedule=schedule is not DEFAULT)
        life = self.model.lives.get(user)
        if life is None:
            self.model.lives[user] = Life([(schedule, self.effect_ms, math.inf)])
        else:
            life.move(schedule, self.effect_ms)

    def unsubscribe(self, user: str, _: int) -> None:
        if self.model.lives.pop(user, None):
            self.store.unsubscribe(user, "report", actor=ACTOR)
            self.model.cancel(user)

    def enable(self, user: str, _: int) -> None:
        if life := self.model.lives.get(user):
            subscribe(self.store, user, "report", horizon=FAR, own_schedule=None, enabled=True)
            life.enable(self.effect_ms)

    def disable(self, user: str, _: int) -> None:
        if life := self.model.lives.get(user):
            subscribe(self.store, user, "report", horizon=FAR, own_schedule=None, enabled=False)
            self.model.cancel(user)
            life.off = True

    def pause(self, user: str, number: int) -> None:
        if number % 2:
            self.store.pause_user(user, actor=ACTOR)
            self.model.paused.add(user)
        elif life := self.model.lives.get(user):
            self.store.pause_subscription(user, "report", actor=ACTOR)
            life.paused = True

    def resume(self, user: str, number: int) -> None:
        if number % 2:
            self.store.resume_user(user, actor=ACTOR)
            self.model.paused.discard(user)
        elif life := self.model.lives.get(user):
            self.store.resume_subscription(user, "report", actor=ACTOR)
            life.paused = False

    def delete(self, user: str, _: int) -> None:
        self.store.delete_user(user, actor=ACTOR)
        self.store.create_user(user, actor=ACTOR)
        self.model.lives.pop(user, None)
        self.model.paused.discard(user)
        self.model.jobs = {job_id: job for job_id, job in self.model.jobs.items() if job_id.split(":")[1] != user}

    def found(self) -> dict[str, tuple[int, str]]:
        return {job_id: (job.execute_after_ms, job.state.value) for job_id, job in jobs(self.store).items()}


CALM = ("subscribe", "subscribe", "subscribe", "unsubscribe")
ANYTHING = (*CALM, "enable", "disable", "pause", "resume", "resume", "delete")


def steps(verbs: Sequence[str], longest_ms: int) -> st.SearchStrategy[list[tuple[int, str, str, int]]]:
    """(wait in ms, verb, user, number) …"""
    waits = st.one_of(st.integers(0, longest_ms), st.sampled_from([0, 1, FAR_MS - 1, FAR_MS, FAR_MS + 1]))
    step = st.tuples(waits, st.sampled_from(verbs), st.sampled_from(["ann", "ann", "bob", "cyd"]), st.integers(0, 3))
    return st.lists(step, min_size=1, max_size=16)


SLOW = settings(
    deadline=None, database=None, max_examples=70, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@SLOW
@given(steps=steps(ANYTHING, 45_000))
def test_a_change_loses_and_doubles_nothing(
    client: redis.Redis, store: Store, clock: Clock, steps: list[tuple[int, str, str, int]]
) -> None:
    """At each moment the schedule in force decides, and a change takes effect after the horizon; moments are exact."""
    both = Changes(client, store, clock)
    for delay_ms, what, user, number in steps:
        both.wait(delay_ms, gap_ms=FAR_MS - 1)
        both.do(what, user, number)
        assert_consistent(client, store, complete=False)
    both.wait(200_000, gap_ms=FAR_MS - 1)
    both.tick()
    assert both.found() == both.model.jobs
    # who left a group is gone from it when its last moment there has passed, and nothing of the change is kept
    both.wait(600_000, gap_ms=20_000)
    both.tick()
    assert_consistent(client, store, complete=False)
    kept = {user: client.hget(f"tp:user:{user}", "report") for user in both.users}
    assert [raw for raw in kept.values() if raw and '"prev"' in raw] == []
    groups = cast("list[str]", client.keys("tp:slots:*"))
    everybody = Counter(name for slots in groups for name in cast("list[str]", client.zrange(slots, 0, -1)))
    assert everybody == Counter(both.model.lives.keys())


@SLOW
@given(steps=steps(CALM, 200_000), away_ms=st.integers(100_000, 1_000_000))
def test_changes_while_no_planner_runs(
    client: redis.Redis, store: Store, clock: Clock, steps: list[tuple[int, str, str, int]], away_ms: int
) -> None:
    """With the policy `all`, each missed moment is caught up under the schedule that was in force then."""
    both = Changes(client, store, clock)
    for user in both.users:
        both.subscribe(user, 0)
    both.wait(150_000, gap_ms=FAR_MS - 1)
    both.tick()
    for delay_ms, what, user, number in steps:
        clock.now_ms += delay_ms
        both.do(what, user, number)
    clock.now_ms += away_ms
    back_ms = clock.now_ms
    both.tick()
    # one window after the other
    caught_up = sum(one.source == "catch_up" for one in store.occurrences("report", limit=10_000))
    for _ in range(caught_up + 3):
        clock.advance(45)
        both.planner.advance()
        clock.advance(45)
        both.planner.advance()
    wanted = {
        planned_job_id("report", user, at_ms)
        for user in both.model.lives
        for at_ms, _ in both.model.moments(user, NINE + 17_345 + FAR_MS, back_ms + FAR_MS)
    }
    found = jobs(store)
    assert {job_id for job_id, job in found.items() if job.state is S.CANCELED} <= both.model.jobs.keys() | found.keys()
    present = {job_id for job_id, job in found.items() if job.user in both.model.lives}
    later = {job_id for job_id in present if moment_of(found[job_id], WINDOW_MS) > back_ms + FAR_MS}
    unsubscribed = {job_id for job_id in present if found[job_id].state is S.CANCELED}
    assert present - later - unsubscribed == wanted - unsubscribed
    assert_consistent(client, store, complete=False)


def moment_of(job: Job, window_ms: int = 0) -> int:
    assert job.occurrence_ms is not None
    return moment(job.occurrence_ms, slot(job.user, job.definition), window_ms)


@pytest.mark.parametrize("equal", [True, False])
def test_a_move_in_the_middle_of_a_window(client: redis.Redis, store: Store, clock: Clock, equal: bool) -> None:
    """To an own schedule with the same times: today's occurrence is neither lost nor doubled, whoever is before or behind."""
    leading = lead(store, define(interval=DAILY, window="1h"))
    names = users(store, 30)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 30 * MINUTE, step_ms=4000)
    own_time = own(type="daily", at_time={"hour": 9}, timezone="UTC" if equal else "Africa/Abidjan")
    for name in names:
        subscribe(store, name, "report", **own_time)
    run(clock, [leading], NINE + 61 * MINUTE, step_ms=4000)
    found = {job.user: job for job in jobs(store).values()}
    assert found.keys() == set(names)
    assert len(jobs(store)) == len(names)
    assert {name: job.execute_after_ms for name, job in found.items()} == {name: moment(NINE, slot(name, "report"), HOUR) for name in names}
    assert_consistent(client, store)


def test_the_very_moment_of_a_change_belongs_to_what_was(client: redis.Redis, store: Store, clock: Clock) -> None:
    ten_past = own(type="hourly", at_time={"minute": 10})
    leading = lead(store, define(interval=HOURLY, window=0))
    users(store, 3)
    subscribe_all(store, ["u0", "u1"], "report")
    subscribe(store, "u1", "report", **ten_past)
    subscribe(store, "u2", "report")
    run(clock, [leading], NINE - HORIZON_MS - 1, step_ms=MINUTE)
    clock.now_ms += 1
    subscribe(store, "u0", "report", **ten_past)
    subscribe(store, "u1", "report", own_schedule=False)
    run(clock, [leading], NINE + HOUR, step_ms=MINUTE)
    found = sorted((job.user, (cast("int", job.occurrence_ms) - NINE) // MINUTE) for job in jobs(store).values())
    assert found == [("u0", 0), ("u0", 10), ("u1", 60), ("u2", 0), ("u2", 60)]
    assert_consistent(client, store)


def test_switching_on_again_takes_effect_after_the_horizon(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window=0))
    users(store, 2)
    subscribe_all(store, ["u0", "u1"], "report")
    leading.advance()
    for name in ("u0", "u1"):
        subscribe(store, name, "report", own_schedule=None, enabled=False)
    clock.now_ms = NINE - HORIZON_MS - 1
    subscribe(store, "u0", "report", own_schedule=None, enabled=True)
    clock.now_ms += 1
    subscribe(store, "u1", "report", own_schedule=None, enabled=True)
    run(clock, [leading], NINE)
    assert [job.user for job in jobs(store).values()] == ["u0"]
    assert_consistent(client, store)


def test_a_group_that_went_and_came_back_in_the_middle_of_a_window(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What was opened stays as it is, what was not opened is opened for who comes."""
    leading = lead(store, define(interval=DAILY, window="90m"))
    names = users(store, 30)
    hourly = own(type="hourly")
    subscribe(store, "u0", "report", **hourly)
    run(clock, [leading], NINE + 59 * MINUTE, step_ms=5000)
    store.unsubscribe("u0", "report", actor=ACTOR)
    run(clock, [leading], NINE + 65 * MINUTE, step_ms=5000)
    (gid,) = {one.group for one in store.occurrences("report")}
    assert store.group(gid) is None
    before = {one.at_ms: one.planned for one in store.occurrences("report")}
    since = clock.now_ms + HORIZON_MS
    for name in names[1:]:
        subscribe(store, name, "report", **hourly)
    run(clock, [leading], NINE + 110 * MINUTE, step_ms=5000)
    wanted = {
        planned_job_id("report", name, at)
        for name in names[1:]
        for at in (NINE, NINE + HOUR)
        if since < moment(at, slot(name, "report"), 90 * MINUTE) <= clock.now_ms + HORIZON_MS
    }
    found = {job.id for job in jobs(store).values() if job.user != "u0"}
    assert found == wanted
    assert {job_id.rsplit(":", 1)[1] for job_id in wanted} == {str(NINE), str(NINE + HOUR)}
    planned = {one.at_ms: one.planned for one in store.occurrences("report")}
    assert planned[NINE] == before[NINE] + sum(job_id.endswith(str(NINE)) for job_id in found)
    assert_consistent(client, store)


def test_a_first_subscriber_in_the_middle_of_a_window_is_as_a_later_one(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Whether somebody is the first of a group must not change what they get."""
    definitions = [define(name, interval=DAILY, window="1h") for name in ("report", "other")]
    leading = lead(store, *definitions)
    users(store, 20)
    subscribe_all(store, ["u0"], "report")
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 20 * MINUTE, step_ms=4000)
    later = [f"u{number}" for number in range(1, 20)]
    subscribe_all(store, later, "report")
    subscribe_all(store, later, "other")
    run(clock, [leading], NINE + 61 * MINUTE, step_ms=4000)
    for definition in ("report", "other"):
        wanted = {name for name in later if moment(NINE, slot(name, definition), HOUR) > NINE + 20 * MINUTE + HORIZON_MS}
        assert wanted
        assert {job.user for job in jobs(store, definition).values()} - {"u0"} == wanted


def test_a_horizon_that_shrinks_does_not_let_a_change_reach_what_is_planned(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A new leader plans less far ahead; what the old one has planned stands, and the change takes effect after it."""
    definition = define(interval={"type": "minutely", "value": 2}, window=0)
    old = Planner(store, {"report": definition}, horizon=timedelta(minutes=7), batch=10)
    old.lead()
    users(store, 1)
    subscribe(store, "u0", "report")
    run(clock, [old], clock.now_ms + 10 * MINUTE, step_ms=MINUTE)
    last = max(moment_of(job) for job in jobs(store).values())
    assert last > clock.now_ms + 4 * MINUTE
    leading = lead(store, definition)
    subscribe(store, "u0", "report", **own(type="minutely", value=3))
    reach = store.subscription("u0", "report").since_ms
    assert last <= reach <= clock.now_ms + 7 * MINUTE
    run(clock, [leading], clock.now_ms + 15 * MINUTE, step_ms=4000)
    at = sorted(cast("int", job.occurrence_ms) for job in jobs(store).values())
    planned = list(occurrences(definition.schedule, at[0] - 1, reach))
    changed = list(occurrences(define(interval={"type": "minutely", "value": 3}).schedule, reach, clock.now_ms + HORIZON_MS))
    assert at == planned + changed
    assert len(planned) >= 3
    assert len(changed) >= 3
    assert_consistent(client, store)


def test_many_changes_of_mind_do_not_pile_up(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval={"type": "minutely"}, window=0))
    users(store, 1)
    subscribe(store, "u0", "report")
    largest = 0
    for number in range(60):
        change = own(type="minutely", value=2) if number % 2 else {"own_schedule": False}
        subscribe(store, "u0", "report", **change)
        run(clock, [leading], clock.now_ms + 30_000, step_ms=4000)
        largest = max(largest, len(str(client.hget("tp:user:u0", "report"))))
    assert largest < 600
    assert_consistent(client, store)


def test_a_deleted_user_leaves_nothing_behind(client: redis.Redis, store: Store, clock: Clock) -> None:
    """But the lines of the change log, the messages that are under way, and the order to stop what runs."""
    names = ["somebody", "other"]
    definitions = [define("report", interval={"type": "minutely"}, overlap="skip"), define("sync", interval=DAILY)]
    leading = lead(store, *definitions)
    store.create_users(names, actor=ACTOR)
    for name in names:
        subscribe(store, name, "report", params={"who": name})
        subscribe(store, name, "sync")
    run(clock, [leading], clock.now_ms + 5 * MINUTE, step_ms=4000)
    for name in names:
        # has left two groups, whose next moments are far away
        subscribe(store, name, "sync", **own(type="monthly"))
        subscribe(store, name, "sync", **own(type="weekly"))
    offer(store, slots=3)
    ids = [enqueue(store, "sync", name, f"m{number}", priority="high") for name in names for number in range(3)]
    store.release()
    started = [job_id for job_id in ids if store.start(job_id, delivery=1, worker="w1").go]
    assert len(started) >= 3
    store.finish(started[0], delivery=1, worker="w1", state=S.COMPLETED, reason="done")
    store.pause_user("somebody", actor=ACTOR)
    offer(store, slots=20)
    enqueue(store, "sync", "somebody", "m9")
    assert client.scard("tp:held:somebody")
    canceled, subscriptions = store.delete_user("somebody", actor=ACTOR)
    assert canceled >= 3
    assert subscriptions == 2

    allowed = {"tp:changes", "tp:stops:w1", "high", "medium", "low"}
    assert keys_with(client, "somebody") <= allowed
    for stop in store.heartbeat("w1", slots=20, queues=["high"], buffer=1).stops:
        assert store.stopped("w1", stop, note="stopped")
    client.delete("high", "medium", "low", "tp:changes")
    assert keys_with(client, "somebody") == set()
    assert keys_with(client, "other") != set()
    # what comes late from workers brings nothing back
    for job_id in started:
        store.finish(job_id, delivery=1, worker="w1", state=S.COMPLETED, reason="done")
        store.note(job_id, worker="w1", text="stopped")
        assert store.start(job_id, delivery=1, worker="w1").refusal in ("unknown", "completed", "running", "canceled")
    run(clock, [leading], clock.now_ms + 3 * MINUTE, step_ms=4000)
    assert keys_with(client, "somebody") == set()
    assert_consistent(client, store, complete=False)


def keys_with(client: redis.Redis, text: str) -> set[str]:
    """Keys that contain a text in their name or anywhere in their value."""
    found = set()
    for name in cast("list[str]", client.keys("*")):
        if text in name or text.encode() in (client.dump(name) or b"") or text in _whole(client, name):
            found.add(name)
    return found


def _whole(client: redis.Redis, name: str) -> str:
    reader = cast("Any", client)
    kind = reader.type(name)
    read = {"hash": reader.hgetall, "set": reader.smembers, "string": reader.get}
    if kind == "zset":
        return str(reader.zrange(name, 0, -1))
    if kind == "list":
        return str(reader.lrange(name, 0, -1))
    return str(reader.xrange(name)) if kind == "stream" else str(read[kind](name))


# --- late, and away --------------------------------------------------------------------------------------------------


def test_a_late_planner_goes_on_at_the_cursor_and_spreads(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY, window="60s"))
    names = users(store, 60)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 15_000)
    before = jobs(store)
    assert 10 < len(before) < 40
    clock.now_ms = NINE + 45_000
    leading.advance()
    after = {job_id: job.execute_after_ms for job_id, job in jobs(store).items()}
    assert all(after[job_id] == job.execute_after_ms for job_id, job in before.items())
    new = {job_id: at for job_id, at in after.items() if job_id not in before}
    # they do not fire at once: only those within the horizon are made, and they keep their distances
    assert new
    assert min(new.values()) == clock.now_ms
    assert max(new.values()) <= clock.now_ms + HORIZON_MS
    run(clock, [leading], NINE + 120_000)
    late = {job.user: job.execute_after_ms for job_id, job in jobs(store).items() if job_id not in before}
    assert len(late) + len(before) == len(names)
    shifts = {at - moment(NINE, slot(name, "report"), 60_000) for name, at in late.items()}
    assert len(shifts) == 1, "all by the same time"
    assert_consistent(client, store)


def test_a_little_late_is_exact(store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY, window="60s"))
    names = users(store, 60)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - HORIZON_MS
    run(clock, [leading], NINE + 90_000, step_ms=2 * HORIZON_MS)
    assert {job.user: job.execute_after_ms for job in jobs(store).values()} == {
        name: moment(NINE, slot(name, "report"), 60_000) for name in names
    }


def away(client: redis.Redis, store: Store, clock: Clock, hours: float, **fields: Any) -> Planner:
    """A planner that leads again after `hours`, at a quarter past."""
    definition = define(interval=HOURLY, window="60s", **fields)
    first = lead(store, definition)
    users(store, 3)
    subscribe_all(store, ["u0", "u1", "u2"], "report")
    first.advance()
    clock.now_ms += round(hours * HOUR) + 5 * MINUTE
    second = lead(store, definition)
    run(clock, [second], clock.now_ms + 5 * MINUTE, step_ms=2000)
    assert_consistent(client, store)
    return second


def records(store: Store) -> list[tuple[float, float, str, str, int]]:
    """(hours after the start to the first, to the last, source, state, jobs) of each occurrence, in order."""
    start = NINE - HOUR
    return sorted(
        ((one.at_ms - start) / HOUR, (one.last_ms - start) / HOUR, one.source, one.state, one.planned)
        for one in store.occurrences("report", limit=1000)
    )


def test_catch_up_skip(client: redis.Redis, store: Store, clock: Clock) -> None:
    away(client, store, clock, 4, catch_up="skip")
    assert records(store) == [(1, 4, "skip", "skipped", 0)]
    assert store.occurrences("report")[0].reason == "4 missed while no planner ran, policy skip"
    assert jobs(store) == {}


def test_catch_up_latest(client: redis.Redis, store: Store, clock: Clock) -> None:
    away(client, store, clock, 4, catch_up="latest")
    assert records(store) == [(1, 3, "skip", "skipped", 0), (4, 4, "catch_up", "done", 3)]
    assert {job.source for job in jobs(store).values()} == {"catch_up"}
    assert {job.occurrence_ms for job in jobs(store).values()} == {NINE + 3 * HOUR}
    back = NINE + 3 * HOUR + 15 * MINUTE
    assert {job.user: job.execute_after_ms for job in jobs(store).values()} == {
        name: moment(back, slot(name, "report"), 60_000) for name in ("u0", "u1", "u2")
    }, "spread over a window from now on"


def test_catch_up_latest_is_superseded_by_one_that_is_due(client: redis.Redis, store: Store, clock: Clock) -> None:
    away(client, store, clock, 3 + 45.5 / 60, catch_up="latest")
    assert records(store) == [(1, 3, "skip", "skipped", 0), (4, 4, "schedule", "done", 3)]


def test_catch_up_all(client: redis.Redis, store: Store, clock: Clock) -> None:
    away(client, store, clock, 4, catch_up="all")
    assert records(store) == [(hour, hour, "catch_up", "done", 3) for hour in (1, 2, 3, 4)]
    back = NINE + 3 * HOUR + 15 * MINUTE
    bases = [one.base_ms - back for one in sorted(store.occurrences("report"), key=lambda one: one.at_ms)]
    assert bases == [0, MINUTE, 2 * MINUTE, 3 * MINUTE], "one window after the other"


@pytest.mark.parametrize(("policy", "caught_up"), [("latest", [4]), ("all", [3, 4])])
def test_catch_up_window(client: redis.Redis, store: Store, clock: Clock, policy: str, caught_up: list[int]) -> None:
    away(client, store, clock, 4, catch_up={"policy": policy, "window": "75m"})
    skipped, *rest = records(store)
    assert skipped == (1, caught_up[0] - 1, "skip", "skipped", 0)
    assert rest == [(hour, hour, "catch_up", "done", 3) for hour in caught_up]


def test_catch_up_window_that_holds_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    away(client, store, clock, 4, catch_up={"policy": "all", "window": "12m"})
    assert records(store) == [(1, 4, "skip", "skipped", 0)]


def test_a_catch_up_window_shorter_than_the_window(client: redis.Redis, store: Store, clock: Clock) -> None:
    """An occurrence whose window is still open runs, and the record of what was skipped does not count it."""
    definition = define(interval={"type": "minutely", "value": 2}, window="10m", catch_up={"policy": "all", "window": "3m"})
    lead(store, definition)
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    lead(store, definition).advance()
    clock.now_ms = NINE
    lead(store, definition).advance()
    (skipped,) = (one for one in store.occurrences("report") if one.source == "skip")
    opened = [one.at_ms for one in store.occurrences("report") if one.source == "schedule" and one.at_ms > skipped.at_ms]
    assert skipped.last_ms == NINE - 10 * MINUTE
    assert sorted(opened) == list(range(NINE - 8 * MINUTE, NINE + 1, 2 * MINUTE))
    assert skipped.reason == f"{(skipped.last_ms - skipped.at_ms) // (2 * MINUTE) + 1} missed while no planner ran, policy all"
    assert_consistent(client, store)


def test_catch_up_all_has_an_end_and_says_what_it_left_out(client: redis.Redis, store: Store, clock: Clock) -> None:
    definition = define(interval={"type": "minutely"}, window=0, catch_up={"policy": "all", "window": "30d"})
    lead(store, definition).advance()
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    since = clock.now_ms + HORIZON_MS
    clock.advance(1500 * 60)
    run(clock, [lead(store, definition)], clock.now_ms)
    made = jobs(store)
    skipped = [one for one in store.occurrences("report", limit=10_000) if one.source == "skip"]
    assert len(skipped) == 1
    explained = {at for at in occurrences(definition.schedule, since, clock.now_ms) if skipped[0].at_ms <= at <= skipped[0].last_ms}
    planned = {cast("int", job.occurrence_ms) for job in made.values()}
    assert len(planned) >= 1000
    assert planned & explained == set()
    assert planned | explained == set(occurrences(definition.schedule, since, clock.now_ms + HORIZON_MS))


def test_missed_moments_of_two_schedules(client: redis.Redis, store: Store, clock: Clock) -> None:
    """The user moved while nobody planned. The newest occurrence is planned first, and must not make the older ones forget them."""
    definition = define(interval=HOURLY, window=0, catch_up="all")
    lead(store, definition).advance()
    users(store, 2)
    subscribe_all(store, ["u0", "u1"], "report")
    lead(store, definition).advance()
    clock.now_ms = NINE + 2 * HOUR + 10 * MINUTE
    subscribe(store, "u0", "report", **own(type="hourly", at_time={"minute": 30}))
    clock.now_ms = NINE + 5 * HOUR + 1000
    leading = lead(store, definition)
    run(clock, [leading], clock.now_ms + 10 * MINUTE, step_ms=5000)
    hours = {
        name: sorted((cast("int", job.occurrence_ms) - NINE) / HOUR for job in jobs(store).values() if job.user == name)
        for name in ("u0", "u1")
    }
    assert hours == {"u0": [0, 1, 2, 2.5, 3.5, 4.5], "u1": [0, 1, 2, 3, 4, 5]}
    assert_consistent(client, store)


# --- no, and why -----------------------------------------------------------------------------------------------------


def test_overlap_skip_is_recorded(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval={"type": "minutely"}, window=0, overlap="skip"))
    users(store, 2)
    subscribe_all(store, ["u0", "u1"], "report")
    run(clock, [leading], clock.now_ms + 70_000)
    offer(store)
    store.release()
    first = next(job for job in jobs(store).values() if job.user == "u0")
    assert store.start(first.id, delivery=1, worker="w1").go
    other = next(job for job in jobs(store).values() if job.user == "u1")
    assert store.start(other.id, delivery=1, worker="w1").go
    store.finish(other.id, delivery=1, worker="w1", state=S.COMPLETED, reason="done")
    run(clock, [leading], clock.now_ms + 60_000)
    rejected = [job for job in jobs(store).values() if job.state is S.REJECTED]
    assert [(job.user, job.reason) for job in rejected] == [("u0", "overlap: the last job is not finished")]
    assert [line.to_state for line in store.history(rejected[0].id)] == [S.PENDING, S.REJECTED]
    assert_consistent(client, store)
    # retrying counts as unfinished, and the end of the job makes room
    store.finish(first.id, delivery=1, worker="w1", state=S.RETRYING, reason="busy", retry_in=timedelta(hours=1))
    run(clock, [leading], clock.now_ms + 60_000)
    store.cancel(first.id, reason="enough")
    run(clock, [leading], clock.now_ms + 60_000)
    states = [job.state for job in sorted(jobs(store).values(), key=lambda job: job.occurrence_ms or 0) if job.user == "u0"]
    assert states[1:4] == [S.REJECTED, S.REJECTED, S.PENDING] or states[1:4] == [S.REJECTED, S.REJECTED, S.QUEUED]
    assert_consistent(client, store)


def test_a_paused_definition_says_why_nothing_was_planned(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s"))
    names = users(store, 20)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 20_000)
    store.pause_definition("report", why="the API is down", actor="ops")
    planned = len(jobs(store))
    run(clock, [leading], NINE + HOUR + 90_000, step_ms=5000)
    store.resume_definition("report", actor="ops")
    run(clock, [leading], NINE + 2 * HOUR + 90_000, step_ms=5000)
    found = sorted(store.occurrences("report"), key=lambda one: one.at_ms)
    assert [(one.state, one.planned) for one in found] == [("skipped", planned), ("skipped", 0), ("done", 20)]
    assert {one.reason for one in found[:2]} == {"definition paused, the API is down"}
    assert len(jobs(store)) == planned + 20
    assert_consistent(client, store)


def test_paused_and_disabled_users_are_counted(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s"))
    names = users(store, 10)
    subscribe_all(store, names, "report")
    store.pause_user("u0", actor=ACTOR)
    store.pause_subscription("u1", "report", actor=ACTOR)
    subscribe(store, "u2", "report", own_schedule=None, enabled=False)
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 61_000)
    (one,) = store.occurrences("report")
    assert (one.planned, one.paused, one.disabled) == (7, 2, 1)
    assert_consistent(client, store)


def test_a_definition_that_is_removed_in_the_middle_of_a_window(client: redis.Redis, store: Store, clock: Clock) -> None:
    kept, removed = define("kept", interval=HOURLY), define("removed", interval=HOURLY)
    leading = lead(store, kept, removed)
    names = users(store, 20)
    subscribe_all(store, names, "removed")
    clock.now_ms = NINE - 10_000
    run(clock, [leading], NINE + 20_000)
    planned = len(jobs(store))
    leading = lead(store, kept)
    run(clock, [leading], NINE + 90_000)
    (one,) = store.occurrences("removed")
    assert (one.state, one.reason) == ("skipped", "definition removed")
    assert store.published() == {"kept"}
    offer(store, slots=100)
    store.release()
    assert Counter(job.state for job in jobs(store, "removed").values()) == {S.REJECTED: planned}
    assert_consistent(client, store)
    # it comes back, and its subscribers are still there
    leading = lead(store, kept, removed)
    run(clock, [leading], NINE + HOUR + 90_000, step_ms=5000)
    assert len([job for job in jobs(store, "removed").values() if job.occurrence_ms == NINE + HOUR]) == 20
    assert_consistent(client, store)


def test_a_changed_schedule_counts_from_its_publication(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s"))
    names = users(store, 10)
    subscribe_all(store, names, "report")
    own_time = own(type="hourly", at_time={"minute": 45})
    subscribe(store, "u9", "report", **own_time)
    run(clock, [leading], NINE - 10_000, step_ms=MINUTE)
    run(clock, [leading], NINE + 30_000)
    leading = lead(store, define(interval={"type": "hourly", "at_time": {"minute": 20}}, window="60s"))
    run(clock, [leading], NINE + HOUR + 30 * MINUTE, step_ms=5000)
    minutes = {
        name: sorted((cast("int", job.occurrence_ms) - NINE) // MINUTE for job in jobs(store).values() if job.user == name)
        for name in ("u0", "u9")
    }
    # the window that was open goes on to its end
    assert minutes == {"u0": [0, 20, 80], "u9": [-15, 45]}
    assert len([job for job in jobs(store).values() if job.occurrence_ms == NINE]) == 9
    assert store.changes(limit=1)[0].kind == "definition changed"
    assert_consistent(client, store)


def test_a_new_leader_first_finishes_what_the_old_schedule_made_due(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window=0, catch_up="all"))
    users(store, 1)
    subscribe_all(store, ["u0"], "report")
    leading.advance()
    clock.now_ms = NINE + HOUR + 5 * MINUTE
    leading = lead(store, define(interval={"type": "hourly", "at_time": {"minute": 20}}, window=0, catch_up="all"))
    run(clock, [leading], NINE + HOUR + 30 * MINUTE, step_ms=5000)
    minutes = sorted((cast("int", job.occurrence_ms) - NINE) // MINUTE for job in jobs(store).values())
    assert minutes == [0, 60, 80]
    assert_consistent(client, store)


# --- trigger ---------------------------------------------------------------------------------------------------------


def test_trigger_reaches_each_subscriber_once(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval={"type": "monthly"}, window="60s"))
    names = users(store, 12)
    subscribe_all(store, names, "report")
    clock.advance(10)
    for name in names[:6]:
        subscribe(store, name, "report", **own(type="weekly"))
    clock.advance(10)
    for name in names[3:6]:
        # in three groups until their next moments have passed
        subscribe(store, name, "report", **own(type="daily", at_time={"hour": 3}))
    run(clock, [leading], clock.now_ms + 10_000)
    subscribe(store, names[11], "report", own_schedule=None, enabled=False)
    store.pause_user(names[10], actor=ACTOR)
    at, subscribers = store.trigger("report", window=timedelta(seconds=30), actor=ACTOR)
    assert (at, subscribers) == (clock.now_ms, 12)
    run(clock, [leading], at + 31_000)
    made = jobs(store)
    assert sorted(job.user for job in made.values()) == sorted(names[:10])
    assert {job.user: job.execute_after_ms for job in made.values()} == {
        name: moment(at, slot(name, "report"), 30_000) for name in names[:10]
    }
    assert {(job.source, job.occurrence_ms) for job in made.values()} == {("trigger", at)}
    assert_consistent(client, store)
    again, _ = store.trigger("report", window=timedelta(), actor=ACTOR)
    assert again != at
    run(clock, [leading], again + 1000)
    assert Counter(job.user for job in jobs(store).values()) == Counter(names[:10] * 2)
    assert_consistent(client, store)


def test_trigger_reaches_who_moves_while_its_window_is_open(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval={"type": "monthly"}, window="60s"))
    names = users(store, 12)
    subscribe_all(store, names, "report")
    clock.advance(10)
    leading.advance()
    at, _ = store.trigger("report", window=timedelta(seconds=60), actor=ACTOR)
    run(clock, [leading], at + 20_000)
    for name in names:
        subscribe(store, name, "report", **own(type="weekly"))
    run(clock, [leading], at + 61_000)
    assert Counter(job.user for job in jobs(store).values()) == Counter(names)
    assert_consistent(client, store)


def test_trigger_does_not_change_the_schedule(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=HOURLY, window="60s"))
    names = users(store, 5)
    subscribe_all(store, names, "report")
    clock.now_ms = NINE - 10_000
    store.trigger("report", window=timedelta(minutes=2), actor=ACTOR)
    run(clock, [leading], NINE + 3 * MINUTE, step_ms=2000)
    assert Counter(job.source for job in jobs(store).values()) == {"schedule": 5, "trigger": 5}
    assert_consistent(client, store)


# --- what the planner's store verbs promise --------------------------------------------------------------------------


def test_postpone_moves_only_what_is_due(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.postpone(DueItem("occurrence", "report|1", 0), by=timedelta(seconds=1))
    store.postpone(DueItem("group", "report", 0), by=timedelta(seconds=1))
    assert store.next_due_ms() is None
    assert client.keys("*") == []


def test_equal_schedules_are_one_group(client: redis.Redis, store: Store, clock: Clock) -> None:
    lead(store, define(interval=DAILY))
    users(store, 3)
    subscribe(store, "u0", "report", **own(type="weekly", weekday="monday"))
    subscribe(store, "u1", "report", **own(value=1, type="weekly", weekday="monday", timezone="UTC"))
    subscribe(store, "u2", "report", **own(type="weekly", weekday="tuesday"))
    groups = cast("set[str]", client.smembers("tp:groups:report"))
    assert sorted(client.zcard(f"tp:slots:{gid}") for gid in groups) == [1, 2]
    for gid in groups:
        group = store.group(gid)
        assert group is not None
        assert json.loads(schedule_to_json(group.schedule))["interval"]["type"] == "weekly"
        assert next_occurrence(group.schedule, clock.now_ms) is not None
    assert_consistent(client, store)


def test_a_group_that_nobody_is_in_goes_when_it_comes_due(client: redis.Redis, store: Store, clock: Clock) -> None:
    leading = lead(store, define(interval=DAILY))
    users(store, 1)
    subscribe(store, "u0", "report", **own(type="hourly"))
    leading.advance()
    store.unsubscribe("u0", "report", actor=ACTOR)
    run(clock, [leading], NINE)
    assert client.keys("tp:group*") == []
    assert store.next_due_ms() is None
    assert_consistent(client, store)
