"""Backfills: each occurrence once for each subscriber, under the rate, whoever advances it and wherever they stop."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from taskplatform.backfill import MOST_OCCURRENCES, Span, _Targets, begin, check, count
from taskplatform.errors import Conflict, InvalidInput, UnknownBackfill, UnknownDefinition, UnknownUser
from taskplatform.model import Definition, Job, JobState, Priority, planned_job_id
from taskplatform.planner import Planner, published
from taskplatform.store import Backfill, BackfillState, Enqueue, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, offer, publish, subscribe, take

S = JobState
B = BackfillState
HOUR = 3_600_000
DAY = 24 * HOUR
HOURLY = {"type": "hourly"}
#: 2027-01-15 08:00 UTC, ten minutes before the tests begin.
NOW = 1_800_000_000_000
WEEK = timedelta(days=7)


class Bench:
    """A platform of which some hours were missed, and what advances it."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self.client = client
        self.store = store
        self.clock = clock
        self.ran: Counter[str] = Counter()
        self.set_back = False

    def lead(self, *definitions: Definition, batch: int = 50) -> Planner:
        self.planner = self.another(*definitions, batch=batch)
        self.planner.lead()
        return self.planner

    def another(self, *definitions: Definition, batch: int = 50, store: Any = None) -> Planner:
        return Planner(store or self.store, {one.id: one for one in definitions}, horizon=HORIZON, batch=batch)

    def users(self, number: int, definition: str = "report", **changes: Any) -> list[str]:
        names = [f"u{one}" for one in range(number)]
        self.store.create_users(names, actor=ACTOR)
        for name in names:
            subscribe(self.store, name, definition, **changes)
        # until they are in force, and the planner has looked at their groups
        self.clock.advance(10)
        self.planner.advance()
        return names

    def span(self, hours: float = 3, *, rate: str = "100/s", until_ms: int | None = None, **more: Any) -> Span:
        until = self.clock.now_ms if until_ms is None else until_ms
        fields = {"retention": WEEK, "beyond_retention": False, "now_ms": self.clock.now_ms, **more}
        return check("report", since=at(until - round(hours * HOUR)), until=at(until), rate=rate, **fields)

    def begin(self, hours: float = 3, *, users: Any = None, **more: Any) -> str:
        return begin(self.store, self.span(hours, **more), users, actor="ann").id

    def state(self, backfill: str) -> Backfill:
        return self.store.backfills.get(backfill)

    def run(self, backfill: str, *planners: Planner, seconds: float = 1, most: int = 500) -> Backfill:
        """Let planners advance until the backfill has ended, and workers do what it makes."""
        for _ in range(most):
            for one in planners or (self.planner,):
                one.advance()
            if self.state(backfill).state.ended:
                # what it made ahead of its time
                self.clock.advance(3)
                self.work()
                return self.state(backfill)
            self.clock.advance(seconds)
            self.work()
        raise AssertionError(f"it does not end: {self.state(backfill)}")

    def work(self, state: JobState = S.COMPLETED) -> int:
        """Workers do all that is due."""
        offer(self.store, slots=1000)
        done = 0
        while self.store.release(limit=1000)[0] or any(self.client.llen(one) for one in Priority):
            for priority in Priority:
                while self.client.llen(priority):
                    message = take(self.client, priority)
                    if self.store.start(message.job_id, delivery=message.delivery, worker="w1").go:
                        self.store.finish(message.job_id, delivery=message.delivery, worker="w1", state=state, reason="as it went")
                        done += 1
                        self.ran[message.job_id] += 1
        return done

    def plan(self, until_ms: int) -> None:
        """The planner ticks as it should."""
        self.clock.now_ms = max(self.clock.now_ms, until_ms - 70_000)
        while self.clock.now_ms <= until_ms:
            self.planner.advance()
            self.clock.advance(1)

    def jobs(self, source: str | None = "backfill") -> dict[str, Job]:
        found = self.store.jobs(definition="report", limit=1_000_000).items
        return {job.id: job for job in found if source in (None, job.source)}


@pytest.fixture
def bench(client: redis.Redis, store: Store, clock: Clock) -> Iterator[Bench]:
    clock.now_ms = NOW + 600_000
    made = Bench(client, store, clock)
    yield made
    assert_consistent(client, store, clock_set_back=made.set_back)


def at(instant_ms: int) -> datetime:
    return datetime.fromtimestamp(instant_ms / 1000, UTC)


def report(**fields: Any) -> Definition:
    return define("report", **{"interval": HOURLY, "window": "60s", **fields})


def expected(users: list[str], *hours: int) -> set[str]:
    return {planned_job_id("report", user, NOW + hour * HOUR) for user in users for hour in hours}


# --- what it makes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_each_occurrence_once_for_each_subscriber_at_low_priority(bench: Bench, batch: int) -> None:
    bench.lead(report(priority="high"), batch=batch)
    names = bench.users(7)
    backfill = bench.begin(until_ms=NOW)
    found = bench.run(backfill)
    jobs = bench.jobs()
    assert set(jobs) == expected(names, -3, -2, -1), "from the first instant on, and before the second"
    assert {(job.priority, job.source) for job in jobs.values()} == {(Priority.LOW, "backfill")}
    assert {job.occurrence_ms for job in jobs.values()} == {NOW - hour * HOUR for hour in (1, 2, 3)}
    assert (found.state, found.made, found.completed, found.unfinished) == (B.DONE, 21, 21, 0)
    assert (found.occurrences, found.passed, found.total, found.looked) == (3, 3, 21, 21)
    made = bench.store.history(next(iter(jobs)))[0]
    assert made.reason == f"made by backfill {backfill} of ann"
    assert [(one.actor, one.kind, one.subject, one.detail) for one in bench.store.changes(about=["report"], limit=2)] == [
        ("planner", "backfill", "report", f"{backfill} done"),
        ("ann", "backfill", "report", f"{backfill} begun, 2027-01-15T05:00:00Z to 2027-01-15T08:00:00Z, 100/s"),
    ]


def test_its_jobs_keep_their_priority_when_that_of_the_definition_changes(bench: Bench) -> None:
    bench.lead(report(priority="low"))
    bench.users(2)
    bench.begin(until_ms=NOW, rate="1/m")
    bench.planner.advance()
    (before,) = bench.jobs().values()
    bench.lead(report(priority="high"))
    assert bench.store.job(before.id).priority is Priority.LOW


def test_what_exists_is_not_made_again(bench: Bench) -> None:
    """Whether it was planned and waits in a packed record, ended, died, or another backfill made it."""
    bench.lead(report())
    names = bench.users(6)
    bench.plan(NOW + HOUR + 60_000)
    assert set(bench.jobs("schedule")) == expected(names, 1)
    bench.work(S.FAILED)
    bench.plan(NOW + 2 * HOUR + 60_000)
    found = bench.run(bench.begin(3))
    assert (found.made, found.existing) == (6, 12)
    assert set(bench.jobs()) == expected(names, 0)
    again = bench.run(bench.begin(3))
    assert (again.made, again.existing, again.total) == (0, 18, 18)


def test_own_schedules_parameters_and_who_is_left_out(bench: Bench) -> None:
    bench.lead(report())
    names = bench.users(8)
    store = bench.store
    seven = define(interval={"type": "daily", "at_time": {"hour": 7}}).schedule
    subscribe(store, "u0", "report", schedule=seven, own_schedule=True)
    subscribe(store, "u1", "report", params={"format": "pdf"})
    store.pause_user("u2", actor=ACTOR)
    store.pause_subscription("u3", "report", actor=ACTOR)
    subscribe(store, "u4", "report", enabled=False)
    store.unsubscribe("u5", "report", actor=ACTOR)
    bench.clock.advance(10)
    bench.planner.advance()
    counted, _ = count(store, bench.span(until_ms=NOW), None, actor="ann")
    found = bench.run(bench.begin(until_ms=NOW))
    jobs = bench.jobs()
    assert set(jobs) == expected(["u1", "u6", "u7"], -3, -2, -1) | expected(["u0"], -1)
    assert {user: dict(jobs[next(iter(expected([user], -1)))].params) for user in ("u0", "u1")} == {"u0": {}, "u1": {"format": "pdf"}}
    assert (found.made, found.paused, found.disabled) == (10, 6, 3)
    assert (counted.made, counted.paused, counted.disabled, counted.occurrences) == (10, 6, 3, found.occurrences)
    assert len(names) == 8


def test_users_who_were_given(bench: Bench) -> None:
    """Some of several groups, one who is not subscribed, one twice."""
    bench.lead(report())
    bench.users(30)
    subscribe(
        bench.store, "u3", "report", schedule=report(interval={"type": "hourly", "at_time": {"minute": 30}}).schedule, own_schedule=True
    )
    bench.store.create_user("stranger", actor=ACTOR)
    bench.clock.advance(10)
    bench.planner.advance()
    wanted = ["u1", "u2", "u3", "stranger", "u1"]
    counted, _ = count(bench.store, bench.span(until_ms=NOW), wanted, actor="ann")
    backfill = bench.begin(until_ms=NOW, users=iter(wanted))
    assert bench.client.exists(f"tp:backfillusers:{backfill}")
    found = bench.run(backfill)
    assert set(bench.jobs()) == expected(["u1", "u2"], -3, -2, -1) | {
        planned_job_id("report", "u3", NOW + half * HOUR // 2) for half in (-5, -3, -1)
    }
    for one in (found, counted):
        assert (one.users, one.unsubscribed, one.made, one.total) == (4, 1, 9, 9)


def test_who_subscribes_later_gets_what_was_before(bench: Bench) -> None:
    bench.lead(report())
    bench.users(1)
    bench.plan(NOW + 5 * HOUR + 100_000)
    bench.store.create_user("new", actor=ACTOR)
    subscribe(bench.store, "new", "report")
    found = bench.run(bench.begin(3))
    assert found.state is B.DONE
    assert {job.user for job in bench.jobs().values()} >= {"new"}
    assert sum(job.user == "new" for job in bench.jobs().values()) == 3


# --- the dry run -----------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_just_what_would_be_made_and_writes_nothing(bench: Bench) -> None:
    """At random: groups, pauses, jobs that exist, spans; in one go and in parts."""
    rng = random.Random(7)
    bench.lead(report())
    names = bench.users(40)
    for name in names:
        match rng.randrange(6):
            case 0:
                at_time = {"minute": rng.choice((0, 20, 40))}
                subscribe(bench.store, name, "report", schedule=report(interval={**HOURLY, "at_time": at_time}).schedule, own_schedule=True)
            case 1:
                bench.store.pause_user(name, actor=ACTOR)
            case 2:
                subscribe(bench.store, name, "report", enabled=False)
    bench.clock.advance(10)
    bench.planner.advance()
    for users in (names[5:25], None):
        span = bench.span(rng.choice((2, 5.5)), until_ms=NOW)
        before = everything(bench.client)
        counted, rest = count(bench.store, span, users, actor="ann")
        assert rest is None
        parts = []
        cursor: str | None = None
        while True:
            part, cursor = count(bench.store, span, users, actor="ann", cursor=cursor, budget=timedelta())
            parts.append(part)
            if cursor is None:
                break
        assert len(parts) > 1
        for name in ("made", "existing", "paused", "disabled", "total", "occurrences", "left"):
            assert sum(getattr(part, name) for part in parts) == getattr(counted, name), name
        assert everything(bench.client) == before, "it wrote something"
        found = bench.run(begin(bench.store, span, users, actor="ann").id)
        for name in ("made", "existing", "paused", "disabled", "total", "occurrences", "left", "passed", "users", "unsubscribed"):
            assert getattr(found, name) == getattr(counted, name), name
        assert counted.made > 0


def everything(client: redis.Redis) -> dict[str, bytes | None]:
    return {key: client.dump(key) for key in sorted(client.keys("*"))}  # type: ignore[misc]


# --- once, whoever advances it ---------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone."""


class Disturbed:
    """Backfills for a planner: between or inside its calls something happens."""

    def __init__(self, verbs: Any, disturb: Callable[[str], str]) -> None:
        self._verbs = verbs
        self._disturb = disturb

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._verbs, name)

        def run(*args: Any, **options: Any) -> Any:
            how = self._disturb(name)
            if how == "dies before":
                raise Died
            answer = verb(*args, **options)
            if how == "dies after":
                raise Died
            return verb(*args, **options) if how == "repeated" and name == "step" else answer

        return run


class DisturbedStore:
    def __init__(self, store: Store, disturb: Callable[[str], str]) -> None:
        self._store = store
        self.backfills = Disturbed(store.backfills, disturb)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("seed", range(5))
def test_two_planners_that_die_and_disturb_each_other_make_each_job_once(bench: Bench, seed: int) -> None:
    """Between their calls the other one ticks, calls are repeated, they die and others come, users leave, join, move and are paused."""
    rng = random.Random(seed)
    definition = report(overlap=rng.choice(("allow", "skip")))
    bench.lead(definition)
    names = bench.users(12)
    stays = set(names[6:])
    moved = set(names[:6])
    bench.clock.advance(10)
    bench.planner.advance()
    backfill = bench.begin(4, until_ms=NOW, rate="3/s")
    other = bench.another(definition, batch=rng.randrange(1, 4))

    def change() -> None:
        name = rng.choice(sorted(moved))
        match rng.randrange(5):
            case 0:
                if any(one.definition == "report" for one in bench.store.subscriptions_of(name)):
                    bench.store.unsubscribe(name, "report", actor=ACTOR)
            case 1:
                subscribe(bench.store, name, "report")
            case 2:
                own = report(interval={**HOURLY, "at_time": {"minute": 30}}).schedule
                subscribe(bench.store, name, "report", schedule=own, own_schedule=True)
            case 3:
                bench.store.pause_user(name, actor=ACTOR)
            case 4:
                bench.store.resume_user(name, actor=ACTOR)

    def disturb(verb: str) -> str:
        if rng.random() < 0.2:
            other.advance()
        if rng.random() < 0.2:
            change()
        return rng.choice(("", "", "dies before", "dies after", "repeated"))

    for _ in range(2000):
        planner = bench.another(definition, batch=rng.randrange(1, 5), store=DisturbedStore(bench.store, disturb))
        try:
            planner.advance()
        except Died:
            if rng.random() < 0.5:
                other = bench.another(definition, batch=rng.randrange(1, 4))
        if bench.state(backfill).state.ended:
            break
        bench.clock.advance(rng.choice((0.1, 1, 3)))
        if rng.random() < 0.7:
            bench.work()
    bench.work()
    jobs = bench.jobs()
    whole = {job_id for job_id in jobs if job_id.split(":")[1] in stays}
    assert whole == expected(sorted(stays), -4, -3, -2, -1), "who stays gets each of them"
    assert max(bench.ran.values()) == 1, "and runs it once"
    found = bench.state(backfill)
    assert found.state is B.DONE
    assert (found.made, found.existing) == (len(jobs), 0), "no step was counted twice, and nobody came twice to anybody"


def test_a_step_that_saw_an_older_cursor_changes_nothing(bench: Bench) -> None:
    """As of a leader that slept between its two calls."""
    bench.lead(report())
    bench.users(2)
    backfill = bench.begin(3, until_ms=NOW, rate="1/s")
    place = bench.store.backfills.place(backfill)
    assert place is not None
    targets = _Targets(bench.store, place).next()
    while bench.state(backfill).made < 3:
        bench.planner.advance()
        bench.clock.advance(1)
    before = everything(bench.client)
    step = bench.store.backfills.step(backfill, seen=place.cursor, targets=targets, no_more=True, batch=50, actor="other")
    assert (step.state, step.made) == ("moved", 0)
    assert everything(bench.client) == before
    assert bench.run(backfill).made == 6


def test_a_planner_that_catches_up_the_same_occurrences_leaves_one_job_of_each(bench: Bench) -> None:
    """The outage that the backfill is for is caught up at the same time: what the planner opens is left to it."""
    definition = report(catch_up="all")
    bench.lead(definition)
    names = bench.users(9)
    bench.clock.now_ms = NOW + 3 * HOUR + 100_000
    # begun before any planner is back: nobody has come to these occurrences yet
    backfill = bench.begin(3)
    for _ in range(400):
        bench.planner.advance()
        bench.work()
        bench.clock.advance(1)
    jobs = bench.jobs(None)
    assert set(jobs) == expected(names, 1, 2, 3), "each once"
    assert {job.source for job in jobs.values()} == {"catch_up"}
    found = bench.state(backfill)
    assert (found.state, found.left, found.made) == (B.DONE, 3, 0)


def test_an_occurrence_that_the_planner_has_not_come_to_is_waited_for(bench: Bench) -> None:
    bench.lead(report())
    bench.users(3)
    bench.clock.now_ms = NOW + 2 * HOUR + 100_000
    backfill = bench.begin(2)
    bench.planner._backfiller.step(backfill)
    found = bench.state(backfill)
    assert (found.state, found.reason, found.made) == (B.RUNNING, "the planner has not come to this occurrence", 0)
    # which skips them, by the definition's policy `latest`, but for the last
    found = bench.run(backfill)
    assert (found.made, found.left) == (3, 1)


# --- the rate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "per_second", "batch"), [("3/s", 3.0, 50), ("45/m", 0.75, 1), ("400/s", 400.0, 250)])
def test_moments_are_evenly_spaced_however_the_planner_ticks(bench: Bench, rate: str, per_second: float, batch: int) -> None:
    """Over all windows: with ticks that come late, in bursts, and after pauses and steps of the clock forward."""
    rng = random.Random(batch)
    bench.lead(report(), batch=batch)
    bench.users(60)
    backfill = bench.begin(2, until_ms=NOW, rate=rate)
    for _ in range(3000):
        for _ in range(rng.randrange(1, 4)):
            bench.planner.advance()
        if bench.state(backfill).state.ended:
            break
        if rng.random() < 0.05:
            bench.store.backfills.pause(backfill, actor=ACTOR)
            bench.clock.advance(100)
            bench.store.backfills.resume(backfill, actor=ACTOR)
        bench.clock.advance(rng.choice((0.01, 0.3, 1, 2, 9)))
        bench.work()
    assert all(job.execute_after_ms >= job.created_ms for job in bench.jobs().values()), "what was not made in time comes later"
    moments = sorted(job.execute_after_ms for job in bench.jobs().values())
    assert len(moments) == 120
    spacing = 1000 / per_second
    for first, start in enumerate(moments):
        for last in range(first, len(moments)):
            span = moments[last] - start
            assert last - first <= (span + 1) / spacing, f"{last - first + 1} jobs are due within {span} ms"


def test_a_stall_of_the_workers_builds_no_more_than_ten_seconds_of_backlog(bench: Bench) -> None:
    bench.lead(report())
    bench.users(40)
    backfill = bench.begin(2, until_ms=NOW, rate="3/s")
    most = 0
    for _ in range(40):
        bench.planner.advance()
        bench.clock.advance(1)
        most = max(most, bench.state(backfill).unfinished)
    found = bench.state(backfill)
    assert most == found.unfinished == 30
    assert found.reason == "as many of its jobs as may be are not finished"
    bench.work()
    assert bench.run(backfill).completed == 80


def test_a_clock_that_is_set_back_neither_stops_nor_hurries_it(bench: Bench) -> None:
    bench.lead(report())
    bench.users(30)
    backfill = bench.begin(1, until_ms=NOW, rate="1/s")
    bench.planner.advance()
    bench.clock.now_ms -= 600_000
    bench.set_back = True
    before = bench.state(backfill).made
    for second in range(1, 11):
        bench.planner.advance()
        assert bench.state(backfill).made <= before + second
        bench.clock.advance(1)
    assert bench.state(backfill).made >= before + 7
    # its jobs wait for a span, which begins again
    bench.store.reclaim(patience=timedelta(seconds=15))
    assert bench.run(backfill, seconds=2).made == 30


# --- pauses, cancellation, ends --------------------------------------------------------------------------------------


def test_pause_and_resume(bench: Bench) -> None:
    bench.lead(report())
    bench.users(10)
    backfill = bench.begin(2, until_ms=NOW, rate="1/s")
    bench.planner.advance()
    made = bench.state(backfill).made
    assert 0 < made < 5
    assert bench.store.backfills.pause(backfill, actor="bob")
    assert not bench.store.backfills.pause(backfill, actor="bob")
    for _ in range(20):
        bench.clock.advance(10)
        bench.planner.advance()
    found = bench.state(backfill)
    assert (found.state, found.reason, found.made) == (B.PAUSED, "paused by bob", made)
    assert not [item for item in bench.store.due(bench.clock.now_ms + DAY) if item.kind == "backfill"], "it costs no look"
    bench.work()
    assert bench.state(backfill).completed == made, "what was made goes on"
    assert bench.store.backfills.resume(backfill, actor="bob")
    assert bench.run(backfill).made == 20
    with pytest.raises(Conflict, match="is done"):
        bench.store.backfills.pause(backfill, actor="bob")


def test_cancel_stops_making_and_cancels_what_waits(bench: Bench) -> None:
    bench.lead(report())
    bench.users(20)
    backfill = bench.begin(2, until_ms=NOW, rate="5/s")
    for _ in range(4):
        bench.planner.advance()
        bench.clock.advance(1)
    offer(bench.store, slots=3)
    bench.store.release()
    runs = take(bench.client, "low")
    assert bench.store.start(runs.job_id, delivery=runs.delivery, worker="w1").go
    bench.store.backfills.cancel(backfill, actor="bob")
    found = bench.state(backfill)
    assert (found.state, found.reason, found.unfinished) == (B.CANCELED, "canceled by bob", 1)
    assert found.canceled == found.made - 1 > 5
    canceled = next(job for job in bench.jobs().values() if job.state is S.CANCELED)
    assert canceled.reason == f"backfill {backfill} canceled by bob"
    bench.store.finish(runs.job_id, delivery=runs.delivery, worker="w1", state=S.COMPLETED, reason="HTTP 200")
    for _ in range(5):
        bench.clock.advance(10)
        bench.planner.advance()
    assert (bench.state(backfill).made, bench.state(backfill).completed) == (found.made, 1), "what ran went on"
    bench.store.backfills.cancel(backfill, actor="eve")
    assert bench.state(backfill).reason == "canceled by bob"
    with pytest.raises(Conflict, match="is canceled"):
        bench.store.backfills.resume(backfill, actor="bob")


def test_a_cancellation_whose_caller_dies_is_completed_by_the_planner(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskplatform.store.backfills._CANCELED_TOGETHER", 3)
    bench.lead(report())
    bench.users(20)
    backfill = bench.begin(2, until_ms=NOW, rate="5/s")
    bench.planner.advance()
    assert bench.store.backfills._cancel(backfill, "bob") == "canceling"
    assert_consistent(bench.client, bench.store)
    assert bench.state(backfill).unfinished > 3
    bench.planner.advance()
    assert (bench.state(backfill).state, bench.state(backfill).unfinished) == (B.CANCELED, 0)


def test_what_was_made_can_be_canceled_after_all_is_made(bench: Bench) -> None:
    bench.lead(report())
    bench.users(5)
    backfill = bench.begin(1, until_ms=NOW)
    bench.planner.advance()
    assert bench.state(backfill).state is B.DONE
    bench.store.backfills.cancel(backfill, actor="bob")
    assert (bench.state(backfill).state, bench.state(backfill).canceled) == (B.CANCELED, 5)
    done = bench.begin(2, until_ms=NOW)
    bench.run(done)
    with pytest.raises(Conflict, match="is done"):
        bench.store.backfills.cancel(done, actor="bob")


def test_a_paused_definition_pauses_it_and_says_so(bench: Bench) -> None:
    bench.lead(report())
    bench.users(5)
    bench.store.pause_definition("report", why="maintenance", actor=ACTOR)
    backfill = bench.begin(2, until_ms=NOW)
    bench.planner.advance()
    found = bench.state(backfill)
    assert (found.state, found.reason, found.made) == (B.PAUSED, "definition paused, maintenance", 0)
    bench.store.resume_definition("report", actor=ACTOR)
    bench.clock.advance(2)
    assert bench.run(backfill).made == 10


def test_a_definition_that_is_removed_ends_it_with_a_reason(bench: Bench) -> None:
    bench.lead(report())
    bench.users(5)
    backfill = bench.begin(2, until_ms=NOW, rate="1/s")
    bench.planner.advance()
    bench.store.retract("report", actor=ACTOR)
    bench.clock.advance(2)
    bench.planner.advance()
    found = bench.state(backfill)
    assert (found.state, found.reason) == (B.STOPPED, "definition removed")
    bench.store.backfills.cancel(backfill, actor="bob")
    assert bench.state(backfill).unfinished == 0


def test_a_job_that_is_redriven_counts_again(bench: Bench) -> None:
    bench.lead(report())
    bench.users(1)
    backfill = bench.begin(1, until_ms=NOW)
    bench.planner.advance()
    bench.work(S.FAILED)
    (job,) = bench.jobs()
    assert (bench.state(backfill).failed, bench.state(backfill).unfinished) == (1, 0)
    bench.store.redrive([job], reason="redriven")
    assert (bench.state(backfill).failed, bench.state(backfill).unfinished) == (0, 1)
    bench.work()
    assert (bench.state(backfill).completed, bench.state(backfill).unfinished) == (1, 0)


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_where_jobs_must_not_overlap_it_waits_and_loses_none(bench: Bench) -> None:
    bench.lead(report(overlap="skip"))
    bench.users(1)
    backfill = bench.begin(3, until_ms=NOW)
    bench.planner.advance()
    found = bench.state(backfill)
    assert found.made == 1
    assert found.reason == "a job of u0 is not finished, and the definition lets only one be (overlap: skip)"
    found = bench.run(backfill)
    assert (found.made, found.completed, found.overlapping, found.rejected) == (3, 3, 0, 0)


def test_who_is_never_finished_is_not_waited_for_for_ever(bench: Bench) -> None:
    bench.lead(report(overlap="skip"))
    bench.users(2)
    bench.store.enqueue([Enqueue("report:u0:m1", delay_ms=DAY)])
    backfill = bench.begin(1, until_ms=NOW)
    began = bench.clock.now_ms
    found = bench.run(backfill, seconds=5)
    assert (found.made, found.overlapping) == (1, 1)
    assert bench.clock.now_ms - began >= 600_000
    # and nothing is in the way of another backfill later on
    bench.store.cancel("report:u0:m1", reason="not wanted")
    assert bench.run(bench.begin(1, until_ms=NOW)).made == 1


# --- memory, retention, refusals -------------------------------------------------------------------------------------


def test_ten_thousand_users_are_streamed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the planner nor a dry run holds more of them than a batch."""
    bench.lead(report(), batch=250)
    names = [f"u{one}" for one in range(10_000)]
    bench.store.create_users(names, actor=ACTOR)
    from taskplatform.store import Subscribe

    bench.store.subscribe([Subscribe(name, "report") for name in names], horizon=HORIZON, actor=ACTOR, log=False)
    del names
    bench.clock.advance(10)
    bench.planner.advance()
    # as many as may be unfinished, so that no worker is needed
    span = bench.span(1, until_ms=NOW, rate="1000/s")
    tracemalloc.start()
    counted, _ = count(bench.store, span, None, actor="ann")
    backfill = begin(bench.store, span, None, actor="ann").id
    for _ in range(200):
        bench.planner.advance()
        if bench.state(backfill).state.ended:
            break
        bench.clock.advance(0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = bench.state(backfill)
    assert (found.state, found.made, counted.made) == (B.DONE, 10_000, 10_000)
    assert peak < 3_000_000, f"{peak:,} bytes at a time"
    # what waits need not be looked through one by one at the end
    bench.client.flushall()


def test_records_go_with_the_retention_and_jobs_that_end_later_leave_nothing(bench: Bench) -> None:
    bench.lead(report())
    bench.users(2)
    backfill = bench.begin(1, until_ms=NOW)
    bench.planner.advance()
    bench.store.pause_user("u0", actor=ACTOR)
    bench.clock.advance(1)
    assert bench.work() == 1
    bench.clock.now_ms += 2 * DAY
    while bench.store.sweep(retention=timedelta(days=1)):
        pass
    with pytest.raises(UnknownBackfill):
        bench.state(backfill)
    bench.store.resume_user("u0", actor=ACTOR)
    assert bench.work() == 1
    assert bench.client.keys("tp:backfill*") == []
    assert_consistent(bench.client, bench.store, complete=False)
    bench.client.flushall()


def test_what_becomes_older_than_the_retention_meanwhile_is_left_out(bench: Bench) -> None:
    bench.lead(report())
    bench.users(2)
    retention = timedelta(hours=4)
    backfill = bench.begin(3, until_ms=NOW, rate="1/s", retention=retention)
    bench.store.backfills.pause(backfill, actor=ACTOR)
    bench.clock.now_ms = NOW + 2 * HOUR - 1
    bench.planner.advance()
    bench.store.backfills.resume(backfill, actor=ACTOR)
    found = bench.run(backfill)
    assert (found.forgotten, found.passed) == (1, 3)
    assert set(bench.jobs()) == expected(["u0", "u1"], -2, -1)


@pytest.mark.parametrize(
    ("since_ms", "until_ms", "more", "message"),
    [
        (
            NOW - HOUR,
            NOW + 60_000,
            {},
            r"until 2027-01-15T08:01:00Z is not accepted: it is 2027-01-15T08:00:00Z, and what is still to come",
        ),
        (NOW, NOW, {}, r"since 2027-01-15T08:00:00Z is not accepted: it must be before until"),
        (NOW - 8 * DAY, NOW, {}, r"longer ago than the retention, 7d, .* From 2027-01-08T08:00:00Z on it is known; --beyond-retention"),
        (NOW - HOUR, NOW, {"rate": "fast"}, r"rate 'fast' is not accepted: such as \"5/s\""),
        (NOW - HOUR, NOW, {"rate": "2000/s"}, r"from 1/d to 1000/s"),
    ],
)
def test_what_is_refused(since_ms: int, until_ms: int, more: dict[str, Any], message: str) -> None:
    asked = {"rate": "5/s", "now_ms": NOW, "retention": WEEK, "beyond_retention": False, **more}
    with pytest.raises(InvalidInput, match=message):
        check("report", since=at(since_ms), until=at(until_ms), **asked)
    if "retention" in message:
        assert check("report", since=at(since_ms), until=at(until_ms), **{**asked, "beyond_retention": True}).known is None


def test_refusals_leave_nothing_behind(bench: Bench) -> None:
    bench.lead(report(interval={"type": "minutely", "value": 1}))
    bench.users(1)
    before = set(bench.client.keys("*"))
    with pytest.raises(UnknownUser, match="no user 'nobody'"):
        bench.begin(1, users=[*["u0"] * 600, "nobody"])
    with pytest.raises(InvalidInput, match="none are given"):
        bench.begin(1, users=[])
    with pytest.raises(InvalidInput, match=f"more than {MOST_OCCURRENCES:,} times"):
        bench.begin(24 * 7, until_ms=NOW, retention=4 * WEEK)
    with pytest.raises(UnknownDefinition):
        begin(bench.store, replace(bench.span(1), definition="other"), None, actor="ann")
    assert set(bench.client.keys("*")) == before


def test_no_more_than_a_hundred_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskplatform.store.backfills.MOST_AT_ONCE", 2)
    bench.lead(report())
    bench.users(1)
    first = bench.begin(1)
    bench.begin(1)
    with pytest.raises(Conflict, match="2 backfills have not ended"):
        bench.begin(1)
    bench.store.backfills.cancel(first, actor=ACTOR)
    assert bench.begin(1)


def test_it_begins_only_for_what_is_published(bench: Bench) -> None:
    publish(bench.store, report())
    assert published(report()).id == "report"
    with pytest.raises(UnknownBackfill):
        bench.state("0")
