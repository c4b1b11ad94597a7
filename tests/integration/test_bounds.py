"""Nothing grows for ever: days of life with all kinds of churn, and each collection is as large as it was some days before."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
import redis

import beat_schedule
from taskplatform.backfill import begin, check
from taskplatform.catalogue import Catalogue
from taskplatform.model import JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Enqueue, Store
from taskplatform.store.keys import NAMES
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, NAMESPACE, arrive, assert_consistent, assert_idle, define, offer, recover, subscribe

S = JobState
SECOND = timedelta(seconds=1)
DAY_MS = 86_400_000
RETENTION_DAYS, DEAD_RETENTION_DAYS = 2, 3
#: What one day does is the same as what the day before the last did: own schedules change to and fro.
PERIOD_DAYS = 2
STAY = ["ann", "bob", "cyd"]


class Site:
    """A platform that lives day after day."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self.client = client
        self.store = store
        self.clock = clock
        clock.now_ms -= clock.now_ms % DAY_MS
        self.definitions = {
            one.id: one
            for one in (
                define("report", priority="high", window="1m"),
                define(
                    "sync", interval={"type": "hourly", "value": 6}, overlap="skip", window="30s", rate_limit={"rate": "100/s", "burst": 90}
                ),
                define("fetch", config={"endpoint": "https://api.example.com/"}, call=None, concurrency=5, priority="low", window="1m"),
            )
        }
        settings = Settings(retention=timedelta(days=RETENTION_DAYS), dead_retention=timedelta(days=DEAD_RETENTION_DAYS))
        self.platform = Platform(store, Catalogue(), settings, actor=ACTOR)
        self.planner = Planner(store, self.definitions, horizon=HORIZON, batch=100, environment={})
        self.planner.lead()
        store.create_users(STAY, actor=ACTOR)
        for user in STAY:
            for definition in self.definitions:
                subscribe(store, user, definition)
        self.worker = "w0000"
        self.ends = 0

    def live(self, day: int) -> None:
        """A day: people do things at noon and take them back in the evening; jobs run and end in all ways at all times."""
        new = [f"d{day:04}-{number}" for number in range(3)]
        self.ends = 0
        for hour in range(0, 24, 3):
            self._beat()
            self.attend(f"beat@{day:04}")
            if hour == 3:
                self._another_worker(day)
            if hour == 6:
                self._busy_noon(day, new)
            if hour == 18:
                self._evening(day, new)
            for _ in range(4):
                self.planner.advance()
                self._work()
                self.clock.advance(40)
            self.clock.now_ms += 3 * 3_600_000 - 4 * 40_000
        self.clock.now_ms += DAY_MS - self.clock.now_ms % DAY_MS if self.clock.now_ms % DAY_MS else 0
        self._beat()
        self.store.reclaim(patience=15 * SECOND)
        self.platform.sweep()

    def _beat(self) -> None:
        recover(self.store, 86_400 * SECOND, backoff=SECOND)
        offer(self.store, self.worker, slots=30)

    def attend(self, beat: str) -> None:
        """Each is of a new release, and dies."""
        self.store.attend(beat, catalogue=f"of-{beat}", number=None, leads=True, alive=15 * SECOND, account=300 * SECOND)

    def _another_worker(self, day: int) -> None:
        """The last one stops in the one night, and is lost in the other; so its jobs are given back."""
        former, self.worker = self.worker, f"w{day + 1:04}"
        offer(self.store, self.worker, slots=30)
        job_id = f"report:ann:given-back-{day:04}"
        self.store.enqueue([Enqueue(job_id)])
        self.store.release()
        self.store.start(job_id, delivery=self.store.job(job_id).delivery, worker=former)
        if day % 2:
            self.store.leave(former)
        else:
            self.clock.advance(60)
            offer(self.store, self.worker, slots=30)
            recover(self.store, 30 * SECOND, backoff=SECOND)

    def _busy_noon(self, day: int, new: list[str]) -> None:
        store, platform = self.store, self.platform
        store.set_options(fairness=day % 2 == 0, share=0.1)
        platform.create_users(new)
        for user in new:
            subscribe(store, user, "report")
            subscribe(store, user, "fetch", params={"n": day % 10})
        own = define(interval={"type": "daily", "at_time": {"hour": 4 + day % 2, "minute": 0}}).schedule
        subscribe(store, "ann", "report", schedule=own, own_schedule=True)
        alone = define(interval={"type": "daily", "at_time": {"hour": 5, "minute": 10 + day % 40}}).schedule
        subscribe(store, new[0], "report", schedule=alone, own_schedule=True)
        store.unsubscribe("bob", "fetch", actor=ACTOR)
        store.set_limit(f"user:{new[1]}", Limit(concurrency=1), actor=ACTOR)
        store.set_limit("host:api.example.com", Limit(50, 20, 3), actor=ACTOR)
        store.set_limit("total", Limit(500, 400), actor=ACTOR)
        store.trigger("report", window=10 * SECOND, actor=ACTOR)
        platform.store.trigger("fetch", window=timedelta(), actor=ACTOR, idempotency_key=f"day {day}")
        store.pause_user("cyd", actor=ACTOR)
        store.pause_definition("sync", why="maintenance", actor=ACTOR)
        store.enqueue([Enqueue(f"report:{user}:m{number}-{day:04}") for user in new for number in range(4)])
        # one that ends by itself, and one that is canceled in the evening
        midnight = datetime.fromtimestamp(self.clock.now_ms / 1000, UTC).replace(hour=0, minute=0, second=0)
        self._backfill(midnight, rate="10/s")
        self._rest = self._backfill(midnight, rate="1/h")
        # a removed definition of the day, with a group of its own and jobs that wait
        extra = define(f"extra_{day:04}", priority="low")
        store.publish(published(extra), actor=ACTOR)
        subscribe(store, "ann", extra.id)
        subscribe(store, new[2], extra.id, schedule=alone, own_schedule=True)
        store.trigger(extra.id, window=60 * SECOND, actor=ACTOR)

    def _backfill(self, midnight: datetime, *, rate: str) -> str:
        """Of the last three hours of the day before, for all and for one user who was given."""
        span = check(
            "sync",
            since=midnight - timedelta(hours=7),
            until=midnight,
            rate=rate,
            now_ms=self.clock.now_ms,
            retention=timedelta(days=RETENTION_DAYS),
            beyond_retention=False,
        )
        return begin(self.store, span, ["ann"] if rate == "1/h" else None, actor=ACTOR).id

    def _evening(self, day: int, new: list[str]) -> None:
        store = self.store
        if not self.platform.backfill_status(self._rest).state.ended:
            self.platform.cancel_backfill(self._rest)
        store.retract(f"extra_{day:04}", actor=ACTOR)
        store.unsubscribe("ann", f"extra_{day:04}", actor=ACTOR)
        store.resume_definition("sync", actor=ACTOR)
        store.resume_user("cyd", actor=ACTOR)
        for name in ("total", "host:api.example.com"):
            store.reset_limit(name, actor=ACTOR)
        subscribe(store, "bob", "fetch")
        dead = self.platform.dead_letters(definition="report", limit=1000).items
        assert len(dead) > 2
        for job in dead[:2]:
            self.platform.redrive(job.id)
        self.platform.discard(dead[2].id)
        arrive(self.client, self.clock, f"{day:040}")
        for user in new:
            store.delete_user(user, actor=ACTOR)

    def _work(self) -> None:
        """Run all that may run, to all kinds of ends in turn."""
        while True:
            self.store.release()
            messages = [one for priority in Priority for one in self.client.lrange(priority, 0, -1)]
            self.client.delete(*Priority)
            queued = sorted(str(job_id) for priority in Priority for job_id in self.client.zrange(f"tp:queued:{priority}", 0, -1))
            if not messages and not queued:
                return
            for job_id in queued:
                self._run(job_id)

    def _run(self, job_id: str) -> None:
        delivery = self.store.job(job_id).delivery
        if not self.store.start(job_id, delivery=delivery, worker=self.worker).go:
            return
        self.ends += 1
        way = self.ends % 11
        if way == 0:
            self.store.cancel(job_id, reason="not wanted")
        elif way == 1:
            self.store.lose(job_id, delivery=delivery, worker=self.worker, what="it died", max_losses=2, backoff=SECOND)
        else:
            state = {2: S.FAILED, 3: S.TIMED_OUT, 4: S.RETRYING}.get(way, S.COMPLETED)
            self.store.finish(job_id, delivery=delivery, worker=self.worker, state=state, reason="as it went", retry_in=SECOND)

    def sizes(self) -> dict[str, int]:
        """By the name of the keys, how many there are, and how many members they have in all."""
        prefixes = sorted(NAMES.items(), key=lambda item: -len(item[1]))
        sizes: Counter[str] = Counter()
        for key in cast("list[str]", self.client.keys("*")):
            name = next((name for name, part in prefixes if key.startswith(f"{NAMESPACE}:{part}")), key)
            sizes[f"{name} keys"] += 1
            sizes[f"{name} members"] += self._members(key)
        return dict(sizes)

    def _members(self, key: str) -> int:
        count: dict[str, Any] = {
            "hash": self.client.hlen,
            "set": self.client.scard,
            "list": self.client.llen,
            "zset": self.client.zcard,
            "stream": self.client.xlen,
            "string": self.client.strlen,
        }
        return int(count[cast("str", self.client.type(key))](key))

    def memory(self) -> int:
        """Bytes that keys take, but for those with a bound of another kind (see `_settle`)."""
        apart = ("tp:changes", "tp:stops:", "tp:triggered:")
        keys = [key for key in cast("list[str]", self.client.keys("*")) if not key.startswith(apart)]
        return sum(int(self.client.memory_usage(key, samples=0) or 0) for key in keys)


@pytest.fixture
def site(client: redis.Redis, clock: Clock) -> Site:
    return Site(client, Store(client, clock=clock, change_log_size=100), clock)


def _settle(sizes: dict[str, int]) -> dict[str, int]:
    """What has a bound of another kind, apart: the change log is trimmed by whole nodes; words to stop runs and triggers expire."""
    kept = dict(sizes)
    assert kept.pop("changes members") <= 250
    kept.pop("stops keys", None)
    kept.pop("stops members", None)
    kept.pop("triggered keys", None)
    kept.pop("triggered members", None)
    kept.pop("limit members", None)  # digits of a level
    kept.pop("seq members")
    return kept


def test_no_collection_grows(client: redis.Redis, site: Site) -> None:
    days = max(RETENTION_DAYS, DEAD_RETENTION_DAYS) + 3
    for day in range(days):
        site.live(day)
    seen, memory = [], []
    for day in range(days, days + 3 * PERIOD_DAYS):
        site.live(day)
        seen.append(_settle(site.sizes()))
        memory.append(site.memory())
    assert_consistent(client, site.store, complete=False)
    for key in cast("list[str]", client.keys("tp:stops:*")):
        assert 0 < client.ttl(key) <= 86_400
    for key in cast("list[str]", client.keys("tp:triggered:*")):
        assert 0 < client.ttl(key) <= 3 * 86_400 + 3600, "no retention was told here, and this is the default"
    # jobs end in turn, so that which of a day's jobs fail differs; over a period that evens out only nearly
    parts = ("job", "history", "user_jobs", "definition_jobs", "finished", "dead")
    turns = {f"{part} {what}" for part in parts for what in ("keys", "members")}
    turns.add("occurrence members")  # one that is late, by the slots of its users, says since when its window goes on
    first, last = seen[:PERIOD_DAYS], seen[-PERIOD_DAYS:]
    for before, after in zip(first, last, strict=True):
        exact_before = {name: size for name, size in before.items() if name not in turns}
        exact_after = {name: size for name, size in after.items() if name not in turns}
        assert exact_after == exact_before
        for name in before.keys() | after.keys():
            assert after.get(name, 0) <= before.get(name, 0) * 1.1 + 5, f"{name} grows: {before.get(name)} → {after.get(name)}"
    assert max(memory[-PERIOD_DAYS:]) < max(memory[:PERIOD_DAYS]) * 1.05
    # it has been busy
    assert site.store.counters()["dead_letters"] > 50
    assert all(count > 10 for state, count in site.store.counts().items() if state is not S.REJECTED)


def test_nothing_is_left_when_all_has_gone(client: redis.Redis, site: Site) -> None:
    """Of users, definitions, workers and jobs; what stays is counters, and what the settings say."""
    for day in range(3):
        site.live(day)
    for user in STAY:
        site.store.delete_user(user, actor=ACTOR)
    for definition in site.definitions:
        site.store.retract(definition, actor=ACTOR)
    site.store.leave(site.worker)
    site.store.set_options(fairness=False, share=0)
    assert_idle(client)
    site.clock.advance(20 * 86_400)
    site.planner.advance()
    site.attend("beat@last")
    site.store.sign_off("beat@last")
    site.store.reclaim(patience=SECOND)
    site.platform.sweep()
    left = {name.split()[0] for name in site.sizes()}
    # why something ran or did not is told for as long as jobs are kept; these are bounded, or go by themselves
    explains = {"outages", "definition_trails", "triggered"}
    assert left <= {"seq", "counts", "counters", "planner", "server", "options", "shares", "changes", "stops", "lags"} | explains


def test_a_schedule_that_was_never_in_force_leaves_no_group(client: redis.Redis, site: Site) -> None:
    """One that is changed again before it takes effect."""
    before = client.keys("tp:group:*")
    for minute in range(10):
        own = define(interval={"type": "daily", "at_time": {"hour": 4, "minute": minute}}).schedule
        subscribe(site.store, "ann", "report", schedule=own, own_schedule=True)
    assert len(client.keys("tp:group:*")) == len(before) + 1
    subscribe(site.store, "ann", "report", own_schedule=False)
    assert sorted(client.keys("tp:group:*")) == sorted(before)
    assert_consistent(client, site.store)


def test_the_sweep_is_not_starved() -> None:
    """Strict priority serves the low queue when nothing else waits; beat sends the sweep where it is served first."""
    entry = beat_schedule.beat_schedule["forget-finished-jobs"]
    assert entry["options"]["queue"] == Priority.HIGH
    assert entry["options"]["expires"] <= entry["schedule"]
