"""Two beats with different catalogues, take-overs that break off or are overtaken at any command, versions, and what cannot be planned."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import redis

from taskplatform.errors import Conflict
from taskplatform.local import EmbeddedServer
from taskplatform.model import Definition, JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.store import Newer, Store, connect
from taskplatform.store.keys import key
from tests.conftest import ROOT, Clock
from tests.integration.harness import ACTOR, HORIZON, NAMESPACE, assert_consistent, define, enqueue, offer, publish, subscribe, take

HOURLY = {"type": "hourly"}
ALIVE, ACCOUNT = timedelta(seconds=15), timedelta(minutes=5)


def planner(store: Store, *definitions: Definition, name: str = "planner") -> Planner:
    return Planner(store, {definition.id: definition for definition in definitions}, horizon=HORIZON, batch=10, name=name)


# --- which catalogue is newer ----------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """Beats that say from time to time that they live."""

    store: Store
    clock: Clock
    told: dict[str, tuple[str, int]] = field(default_factory=dict)

    def start(self, name: str, catalogue: str) -> Newer:
        """A new process of this name."""
        self.told.pop(name, None)
        return self._attend(name, catalogue)

    def see(self, name: str) -> Newer:
        return self._attend(name, self.told[name][0])

    def live(self, seconds: float, *names: str) -> None:
        """Time passes, and these tell it; all others are silent."""
        for _ in range(int(seconds)):
            self.clock.advance(1)
            for name in names:
                self.see(name)

    def number(self, name: str) -> int:
        return self.told[name][1]

    def _attend(self, name: str, catalogue: str) -> Newer:
        known = self.told.get(name)
        number, newer = self.store.attend(name, catalogue=catalogue, number=known and known[1], leads=False, alive=ALIVE, account=ACCOUNT)
        self.told[name] = (catalogue, number)
        return newer


@pytest.fixture
def fleet(store: Store, clock: Clock) -> Fleet:
    return Fleet(store, clock)


def test_a_later_deployment_is_newer_once_it_has_lived_for_a_while(fleet: Fleet) -> None:
    assert fleet.start("a", "old") is Newer.NONE
    assert fleet.start("b", "old") is Newer.NONE
    fleet.live(100, "a", "b")
    fleet.store.sign_off("b")
    assert fleet.start("c", "new") is Newer.NONE
    assert fleet.see("a") is Newer.WAS, "who has just started may die at once"
    fleet.live(16, "a", "c")
    assert (fleet.see("a"), fleet.see("c")) == (Newer.LIVES, Newer.NONE)
    fleet.store.sign_off("a")
    assert fleet.start("d", "new") is Newer.NONE
    assert fleet.number("d") == fleet.number("c")
    assert [(beat.id, beat.catalogue) for beat in fleet.store.beats()] == [("c", "new"), ("d", "new")]


def test_an_old_beat_that_is_started_again_is_not_newer(fleet: Fleet) -> None:
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.live(30, "b")
    # it died, and did not sign off
    assert fleet.start("a2", "old") is Newer.LIVES
    assert fleet.see("b") is Newer.NONE
    # a container has the same name again
    assert fleet.start("a", "old") is Newer.LIVES


def test_when_the_new_one_dies_the_old_one_waits(fleet: Fleet) -> None:
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.live(30, "a", "b")
    fleet.live(14, "a")
    assert fleet.see("a") is Newer.LIVES
    fleet.live(2, "a")
    assert fleet.see("a") is Newer.WAS
    # it is started again, and has what it had
    fleet.start("b2", "new")
    assert (fleet.number("b2"), fleet.see("a")) == (fleet.number("b"), Newer.WAS)
    fleet.live(16, "a", "b2")
    assert fleet.see("a") is Newer.LIVES
    fleet.live(299, "a")
    assert fleet.see("a") is Newer.WAS
    fleet.live(2, "a")
    assert fleet.see("a") is Newer.NONE


def test_one_that_dies_again_and_again_holds_up_nobody(fleet: Fleet) -> None:
    fleet.start("a", "old")
    for life in range(10):
        # also when it has the same name each time, as in a container
        fleet.start("b" if life % 2 else f"b{life}", "new")
        fleet.live(14, "a", "b" if life % 2 else f"b{life}")
        assert fleet.see("a") is Newer.WAS


def test_to_go_back_takes_effect_at_once(fleet: Fleet) -> None:
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.live(30, "a", "b")
    fleet.store.sign_off("b")
    assert fleet.see("a") is Newer.NONE
    # and by another rolling deployment
    fleet.start("c", "new")
    fleet.live(30, "a", "c")
    fleet.store.sign_off("a")
    fleet.start("d", "old")
    fleet.live(16, "c", "d")
    assert (fleet.see("c"), fleet.see("d")) == (Newer.LIVES, Newer.NONE)


@pytest.mark.parametrize("hours", [0.2, 5, 50])
def test_one_that_was_paused_for_long_is_as_old_as_before(fleet: Fleet, hours: float) -> None:
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.clock.advance(hours * 3600 - 30)
    fleet.live(30, "b")
    assert (fleet.see("a"), fleet.see("b")) == (Newer.LIVES, Newer.NONE)
    assert len(fleet.store.beats()) == 2


def test_all_are_started_again_at_once(fleet: Fleet) -> None:
    """In the order that they had before, also where the old one comes last."""
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.clock.advance(600)
    assert fleet.start("b2", "new") is Newer.NONE
    fleet.start("a2", "old")
    fleet.live(16, "a2", "b2")
    assert (fleet.see("a2"), fleet.see("b2")) == (Newer.LIVES, Newer.NONE)


def test_a_clock_that_is_set_back_does_not_make_the_dead_live(fleet: Fleet) -> None:
    fleet.start("a", "old")
    fleet.start("b", "new")
    fleet.live(30, "a", "b")
    fleet.clock.advance(-3600)
    fleet.live(14, "a")
    fleet.live(2, "a")
    assert fleet.see("a") is Newer.WAS
    assert all(beat.since_ms <= beat.heartbeat_ms <= fleet.clock.now_ms for beat in fleet.store.beats())


def test_emptied_data(fleet: Fleet, client: redis.Redis) -> None:
    for number in range(4):
        fleet.start("a", f"v{number}")
        fleet.store.sign_off("a")
    fleet.start("a", "old")
    client.flushall()
    assert fleet.see("a") is Newer.NONE
    fleet.start("b", "new")
    fleet.live(16, "a", "b")
    assert (fleet.see("a"), fleet.see("b")) == (Newer.LIVES, Newer.NONE)


# --- an older one leads ----------------------------------------------------------------------------------------------


def test_an_older_leader_plans_what_is_the_same_and_touches_nothing_else(client: redis.Redis, store: Store, clock: Clock) -> None:
    same, gone = define("same", interval=HOURLY, window=0), define("gone", interval=HOURLY)
    old = [same, gone, define("changed", interval=HOURLY, window=0, priority="low")]
    new = [same, define("changed", interval=HOURLY, window=0, priority="high"), define("added", interval=HOURLY, window=0)]
    planner(store, *old).lead()
    planner(store, *new, name="new").lead()
    store.create_users(["u1"], actor=ACTOR)
    for name in ("same", "changed", "added"):
        subscribe(store, "u1", name)
    waiting = enqueue(store, "added", "u1", delay_ms=1000)
    before = store.changes()
    clock.advance(3600)

    older = planner(store, *old, name="old")
    older.begin()
    older.advance()
    assert store.planner()["leader"] == "old"
    assert {job.definition for job in store.jobs().items if job.source == "schedule"} == {"same"}
    assert store.published() == {"same", "changed", "added"}
    assert store.changes() == before
    offer(store)
    assert {take(client).job_id for _ in range(store.release()[0])} >= {waiting}
    # what it left is only put off, and the newer one does it
    clock.advance(11)
    newer = planner(store, *new, name="new")
    newer.lead()
    newer.advance()
    assert {job.definition for job in store.jobs().items if job.source == "schedule"} == {"same", "changed", "added"}
    assert store.changes() == before
    assert_consistent(client, store)


def test_an_older_leader_publishes_when_it_may(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Then it is as if it had led from the beginning: nothing that came due meanwhile is lost."""
    old, new = define("report", interval=HOURLY, window="10m"), define("report", interval=HOURLY, window="20m")
    planner(store, new).lead()
    store.create_users(["u1"], actor=ACTOR)
    subscribe(store, "u1", "report")
    clock.advance(3600)
    older = planner(store, old)
    term = older.begin()
    older.advance()
    assert store.jobs().items == ()
    older.publish(term)
    for _ in range(10):
        clock.advance(60)
        older.advance()
    (job,) = store.jobs().items
    assert job.source == "schedule"
    (opened,) = [one for one in store.occurrences("report") if one.state != "skipped"]
    assert (opened.at_ms, opened.window_ms) == (job.occurrence_ms, 600_000)
    assert store.changes()[0].detail == f"window, version {new.version} -> {old.version}"
    assert_consistent(client, store)


# --- take-overs that break off ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


def _hooked(url: str, hook: Callable[[int], None]) -> redis.Redis:
    """A client that calls `hook` with the number of each command or pipeline, after it."""
    client = connect(url)
    calls = 0

    def after(send: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            answer = send(*args, **options)
            calls += 1
            hook(calls)
            return answer

        return call

    pipeline = client.pipeline

    def new_pipeline(*args: Any, **options: Any) -> Any:
        made = pipeline(*args, **options)
        vars(made)["execute"] = after(made.execute)
        return made

    vars(client)["execute_command"] = after(client.execute_command)
    vars(client)["pipeline"] = new_pipeline
    return client


@dataclass(frozen=True)
class Release:
    """What a beat publishes, and how: as the scheduler does it."""

    definitions: tuple[Definition, ...]
    limits: dict[str, Limit]
    fairness: bool

    def take_over(self, store: Store) -> None:
        made = planner(store, *self.definitions)
        term = made.begin()
        store.configure_limits(self.limits, actor="beat", term=term)
        store.set_options(fairness=self.fairness, share=0.0, term=term)
        made.publish(term)


KEPT = define("kept", interval=HOURLY)
OLD = Release(
    (KEPT, define("changed", interval=HOURLY, priority="low"), define("gone", interval=HOURLY)),
    {"total": Limit(10, 10), "host:a.example": Limit(concurrency=2), "user": Limit(concurrency=3)},
    True,
)
NEW = Release(
    (KEPT, define("changed", interval={"type": "daily"}, priority="high", window="5m"), define("added", interval=HOURLY), define("more")),
    {"total": Limit(5, 20), "host:b.example": Limit(concurrency=4), "user": Limit(concurrency=2)},
    False,
)


class TakeOver:
    """Users and jobs that wait, after the old release led; the clock stands still."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock, url: str) -> None:
        self.client, self.store, self.clock, self._url = client, store, clock, url
        self.begin_ms = clock.now_ms

    def begin(self) -> None:
        self.client.flushall()
        self.clock.now_ms = self.begin_ms
        OLD.take_over(self.store)
        self.store.create_users(["u1", "u2"], actor=ACTOR)
        for name in ("kept", "changed", "gone"):
            subscribe(self.store, "u1", name)
            for user in ("u1", "u2"):
                enqueue(self.store, name, user, delay_ms=10_000)
                enqueue(self.store, name, user, "m2")
        # those that are due get their turns
        self.store.release()
        self.clock.advance(3600)

    def hooked(self, hook: Callable[[int], None]) -> Store:
        return Store(_hooked(self._url, hook), clock=self.clock)

    def result(self, *, logged: bool = True) -> dict[str, Any]:
        """All that a take-over leaves, but who leads since when; and what the change log says since."""
        found: dict[str, Any] = {
            "published": self.store.published(),
            "limits": self.store.limits(),
            "options": self.client.hgetall("tp:options"),
            "unfinished": (self.client.hgetall("tp:following"), self.client.smembers("tp:unannounced")),
            "jobs": {job.id: (job.state, job.priority) for job in self.store.jobs().items},
        }
        for name in ("kept", "changed", "added", "more", "gone"):
            found[name] = (self.client.hgetall(f"tp:definition:{name}"), self.client.hget(f"tp:group:{name}", "schedule"))
        if logged:
            found["log"] = [(one.kind, one.subject, one.detail) for one in self.store.changes()]
            found["reasons"] = {job.id: [line.reason for line in self.store.history(job.id)] for job in self.store.jobs().items}
        return found


@pytest.fixture
def take_over(client: redis.Redis, store: Store, clock: Clock, server: Any) -> TakeOver:
    return TakeOver(client, store, clock, server.url)


def test_a_take_over_that_dies_after_any_command_is_completed_by_the_next(take_over: TakeOver) -> None:
    """And the change log neither misses nor repeats a thing."""
    take_over.begin()
    NEW.take_over(take_over.store)
    expected = take_over.result()
    assert expected["published"] == {"kept", "changed", "added", "more"}
    assert ("definitions added", "added more", "2 definitions") in expected["log"]
    assert any("priority" in detail and "version" in detail for kind, _, detail in expected["log"] if kind == "definition changed")
    assert expected["jobs"]["changed:u1:m1"][1] is Priority.HIGH
    deaths = 0
    while True:
        deaths += 1
        take_over.begin()

        def die(call: int, at: int = deaths) -> None:
            if call == at:
                raise Crash

        try:
            NEW.take_over(take_over.hooked(die))
        except Crash:
            NEW.take_over(take_over.store)
        else:
            break
        assert take_over.result() == expected, f"it died after command {deaths}"
        assert_consistent(take_over.client, take_over.store)
    assert deaths > 30


def test_a_take_over_that_sleeps_after_any_command_changes_nothing_when_it_wakes(take_over: TakeOver) -> None:
    """Another has taken over with a newer release meanwhile: limits, options and definitions stay as that has them."""
    take_over.begin()
    NEW.take_over(take_over.store)
    expected = take_over.result(logged=False)
    naps = 0
    while True:
        naps += 1
        take_over.begin()
        woke = False

        def sleep(call: int, at: int = naps) -> None:
            nonlocal woke
            if call == at:
                NEW.take_over(take_over.store)
                woke = True

        try:
            OLD.take_over(take_over.hooked(sleep))
        except Conflict:
            assert woke
        if not woke:
            break
        assert take_over.result(logged=False) == expected, f"it slept after command {naps}"
        assert_consistent(take_over.client, take_over.store)
    assert naps > 20


# --- versions --------------------------------------------------------------------------------------------------------


def test_equal_content_is_one_version() -> None:
    one = define("report", timeout="5m", window=60, params={"a": 1, "b": 2})
    assert one.version == define("report", timeout=300, window="1m", params={"b": 2, "a": 1}, priority="medium").version
    others: list[dict[str, object]] = [
        {"params": {"a": 1}},
        {"window": "61s"},
        {"description": "another"},
        {"priority": "low"},
        {"call": "tasks.inputs:other"},
    ]
    given: dict[str, object] = {"timeout": "5m", "params": {"a": 1, "b": 2}}
    versions = {define("report", **{**given, **other}).version for other in others}
    assert len({*versions, one.version}) == len(others) + 1
    assert all(len(version) == 8 for version in versions)


def test_a_job_says_by_which_version_it_ran(client: redis.Redis, store: Store, clock: Clock) -> None:
    old, new = define("report", retries=3), define("report", retries=4)
    publish(store, old)
    store.create_users(["u1"], actor=ACTOR)
    offer(store)
    job_id = enqueue(store, "report", "u1")
    assert store.job(job_id).version == ""
    publish(store, new)
    assert (store.changes()[0].kind, store.changes()[0].detail) == ("definition changed", f"version {old.version} -> {new.version}")
    store.release()
    # a worker of the old release
    assert store.start(job_id, delivery=1, worker="w1", version=old.version).go
    assert store.job(job_id).version == old.version
    wrong = f"started by version {old.version} of its definition, published is {new.version}"
    assert store.history(job_id)[-1].reason == wrong
    store.finish(job_id, delivery=1, worker="w1", state=JobState.RETRYING, reason="busy", retry_in=timedelta(seconds=1))
    clock.advance(1)
    store.release()
    assert store.start(job_id, delivery=2, worker="w1", version=new.version).go
    assert store.job(job_id).version == new.version
    assert store.history(job_id)[-1].reason == "started"
    assert_consistent(client, store)


def test_what_was_published_before_there_were_versions(client: redis.Redis, store: Store) -> None:
    """An update of the platform does not fill the change log, and what waits runs."""
    definition = define("report")
    publish(store, definition)
    client.hdel("tp:definition:report", "version")
    store.create_users(["u1"], actor=ACTOR)
    offer(store)
    job_id = enqueue(store, "report", "u1")
    store.release()
    assert store.start(job_id, delivery=1, worker="w1", version=definition.version).go
    assert store.history(job_id)[-1].reason == "started"
    before = store.changes()
    assert not store.publish(published(definition), actor=ACTOR)
    assert store.changes() == before
    assert store.versions(["report", "none"]) == [definition.version, None]


def test_what_waits_of_a_removed_definition_says_so(client: redis.Redis, store: Store) -> None:
    planner(store, define("kept"), define("gone")).lead()
    store.create_users(["u1"], actor=ACTOR)
    job_id = enqueue(store, "gone", "u1")
    planner(store, define("kept")).lead()
    offer(store)
    store.release()
    job = store.job(job_id)
    assert (job.state, job.reason) == (JobState.REJECTED, "definition gone does not exist any more")


# --- what cannot be planned ------------------------------------------------------------------------------------------


def test_what_cannot_be_planned_is_told_as_long_as_it_lasts(
    client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    leading = planner(store, define("report", interval=HOURLY, window=0), define("other", interval=HOURLY, window=0))
    leading.lead()
    store.create_users(["u1"], actor=ACTOR)
    for name in ("report", "other"):
        subscribe(store, "u1", name)
    leading.advance()
    whole = cast("str", client.hget("tp:group:report", "schedule"))
    client.hset("tp:group:report", "schedule", '{"interval":{"type":"hourly","timezone":"Mars/Olympus"}}')
    clock.advance(3600)
    since_ms = clock.now_ms
    with caplog.at_level(logging.ERROR):
        for _ in range(60):
            leading.advance()
            told = store.planner()
            assert (told["failing_since"], told["error"][:13]) == (str(since_ms), "group report:")
            clock.advance(1)
    assert caplog.text.count("cannot plan group report") == 1, "it was logged again and again"
    assert "Traceback" in caplog.text
    # it is mended
    client.hset("tp:group:report", "schedule", whole)
    clock.advance(10)
    leading.advance()
    assert not {"failing_since", "error"} & store.planner().keys()


def test_planning_that_fails_as_a_whole_is_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    leading = planner(store, define("report"))
    leading.lead()
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            leading.failed(RuntimeError("something " + "long " * 100))
    assert store.planner()["error"].startswith("what is due: RuntimeError: something long")
    assert len(store.planner()["error"]) <= 330
    assert caplog.text.count("cannot plan what is due") == 1
    leading.failed(RuntimeError("something else"))
    assert store.planner()["error"] == "what is due: RuntimeError: something else"
    leading.advance()
    assert "error" not in store.planner()
    # another leads, and what the last one could not do is no longer known
    leading.failed(RuntimeError("again"))
    planner(store, define("report")).lead()
    assert "failing_since" not in store.planner()


# --- a scheduler in a process of its own -----------------------------------------------------------------------------


def _in_beat(server: EmbeddedServer, script: str, **settings: str) -> None:
    """Run a script there that has a `beat`."""
    preface = """
    from taskplatform.app import app
    from taskplatform.beat import Scheduler
    from taskplatform.errors import Outage, StoreUnavailable
    from taskplatform.store import Newer

    beat = Scheduler(app)
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "API_BASE_URL": "http://127.0.0.1:1", "API_TOKEN": "x"}
    environment |= {f"TASKPLATFORM_{name}": value for name, value in {"REDIS_URL": server.url, **settings}.items()}
    text = textwrap.dedent(preface) + textwrap.dedent(script)
    ran = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_beat_makes_room_as_the_settings_say(server: EmbeddedServer, client: redis.Redis) -> None:
    store = Store(client)
    publish(store, define("report"))
    store.create_user("u1", actor=ACTOR)
    offer(store, slots=2)
    job_id = enqueue(store)
    assert store.start(job_id, delivery=1, worker="w1").go
    assert store.finish(job_id, delivery=1, worker="w1", state=JobState.FAILED, reason="test")
    full = "beat._make_room(StoreUnavailable('no memory left', Outage.MEMORY))"
    _in_beat(server, full)
    assert client.zcard(key(NAMESPACE, "dead")) == 1
    _in_beat(server, full, DEAD_RETENTION="0.001")
    assert client.zcard(key(NAMESPACE, "dead")) == 0


def test_a_beat_that_failed_to_take_over_lets_a_newer_one_do_it(server: EmbeddedServer, client: redis.Redis) -> None:
    """It had the lock already when Redis failed."""
    now_ms = time.time_ns() // 1_000_000
    client.hset("tp:planner", "number", 2)
    client.hset("tp:beats", "beat@new", f"new 2 {now_ms} 0 {now_ms - 60_000}")
    script = """
    beat._number = 1
    assert beat._acquire()
    assert beat._tick() == beat.max_interval
    assert beat._newer is Newer.LIVES
    assert beat.lock is None
    """
    _in_beat(server, script)
    assert client.keys("tp:redbeat:*lock*") == []
