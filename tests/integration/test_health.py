"""Health: each check with the trouble made for real, and gone again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

import taskplatform.health
from taskplatform.catalogue import Catalogue
from taskplatform.cli import cli
from taskplatform.errors import StoreUnavailable
from taskplatform.health import Alarm, Problem, Severity
from taskplatform.local import EmbeddedServer, embedded_server, find_port
from taskplatform.model import JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.platform import Platform
from taskplatform.recovery import Endings, RecoveryLoop
from taskplatform.settings import Settings, settings
from taskplatform.store import Store, connect
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, count_pipelines, define, enqueue, offer, publish, recover, subscribe, take
from tests.support import wait_until

SECOND = timedelta(seconds=1)


class World:
    """A platform in which all is well: a worker, a planner that has just looked, and a clock that stands still."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.report = define("report", priority="medium", timeout="5m")
        self.platform = Platform(store, Catalogue(), Settings(), actor=ACTOR)
        self.planner = Planner(store, {"report": self.report}, horizon=HORIZON, batch=100, name="beat@here")
        self.planner.lead()
        store.create_user("u1", actor=ACTOR)
        self.live()

    def live(self) -> None:
        """The worker and the planner do what they do all the time."""
        offer(self.store, slots=2)
        self.planner.advance()

    def problems(self, *codes: str) -> list[Problem]:
        return [one for one in self.platform.health().problems if not codes or one.code in codes]

    def codes(self) -> set[str]:
        return {one.code for one in self.problems()}

    def run(self, name: str, worker: str = "w1") -> str:
        job_id = enqueue(self.store, name=name)
        assert self.store.start(job_id, delivery=1, worker=worker).go
        return job_id


@pytest.fixture(autouse=True)
def _no_second_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskplatform.health, "_SECOND_LOOK_SECONDS", 0.001)


@pytest.fixture
def world(store: Store, clock: Clock) -> World:
    made = World(store, clock)
    assert made.problems() == []
    assert made.platform.health().well
    return made


def test_work_is_no_problem(world: World) -> None:
    for number in range(6):
        enqueue(world.store, name=f"m{number}")
    world.store.start("report:u1:m0", delivery=1, worker="w1")
    world.store.start("report:u1:m1", delivery=1, worker="w1")
    world.clock.advance(250)
    world.live()
    assert world.problems() == [], "two run within their timeout, two are queued for their slots, and two wait for room"


# --- workers and queues ----------------------------------------------------------------------------------------------


def test_no_worker_is_alive(world: World, client: redis.Redis) -> None:
    world.run("m1")
    heard = world.clock.now_ms
    world.clock.advance(20)
    world.planner.advance()
    (found,) = world.problems()
    assert (found.code, found.severity, found.since_ms) == ("no_worker", Severity.ERROR, heard)
    assert "The last was w1" in found.text
    assert "1 jobs are recorded as running" in found.text
    assert not world.platform.health().well
    recover(world.store, 15 * SECOND, backoff=SECOND)
    assert world.problems("no_worker")[0].since_ms is None, "nobody is known"
    world.live()
    assert world.codes() == set()


@pytest.mark.parametrize("trouble", ["a job is due", "a message is there"])
def test_a_queue_that_no_living_worker_serves(world: World, client: redis.Redis, trouble: str) -> None:
    offer(world.store, slots=2, queues=["high", "low"])
    assert world.codes() == set(), "nothing is due there"
    if trouble == "a job is due":
        enqueue(world.store)
    else:
        client.lpush("medium", "garbage")
    (found,) = world.problems()
    assert (found.code, found.subject, found.severity) == ("queue_unserved", "medium", Severity.ERROR)
    world.live()
    assert "queue_unserved" not in world.codes()


def test_a_worker_that_is_late_and_one_that_nobody_recovers(world: World) -> None:
    offer(world.store, "w2", slots=1)
    heard = world.clock.now_ms
    world.clock.advance(10)
    world.live()
    (found,) = world.problems()
    assert (found.code, found.subject, found.severity, found.since_ms) == ("worker_late", "w2", Severity.WARNING, heard)
    world.clock.advance(12)
    world.live()
    (found,) = world.problems()
    assert (found.code, found.subject, found.severity) == ("recovery_stuck", "w2", Severity.ERROR)
    recover(world.store, 15 * SECOND, backoff=SECOND)
    assert world.codes() == set()


def test_a_due_job_that_nothing_releases(world: World) -> None:
    enqueue(world.store, delay_ms=1000)
    due = world.clock.now_ms + 1000
    world.clock.advance(30)
    world.live()
    assert world.codes() == set(), "it is due for 29 s"
    world.clock.advance(2)
    world.live()
    (found,) = world.problems()
    assert (found.code, found.subject, found.since_ms) == ("release_stuck", "medium", due)
    world.store.release()
    assert world.codes() == set()


@pytest.mark.parametrize(("timeout", "minutes"), [("5m", 10), ("30m", 31)])
def test_a_probe_that_does_not_end(world: World, timeout: str, minutes: int) -> None:
    world.store.publish(replace(published(define("report", priority="medium", timeout=timeout)), host="north"), actor=ACTOR)
    world.store.hold_host("north", span=SECOND, why="maintenance", actor=ACTOR)
    world.clock.advance(3000)
    world.live()
    # the host is half open for long, and nobody wanted anything of it
    assert world.problems("probe_stuck") == []
    job_id = world.run("m1")
    world.clock.advance(minutes * 60)
    world.live()
    assert world.problems("probe_stuck") == []
    world.clock.advance(0.001)
    world.live()
    (problem,) = world.problems("probe_stuck")
    assert (problem.severity, problem.subject) == (Severity.ERROR, "north")
    assert problem.since_ms == world.clock.now_ms - minutes * 60_000 - 1
    assert job_id in problem.text
    world.store.cancel(job_id, reason="stuck")
    assert world.problems("probe_stuck") == []


@pytest.mark.parametrize("held", ["by the total", "by its definition", "by its pause", "by room", "by a higher queue"])
def test_what_waits_for_a_reason_is_no_problem(world: World, client: redis.Redis, held: str) -> None:
    if held == "by the total":
        world.store.set_limit("total", Limit(1 / 3600, 1), actor=ACTOR)
        world.run("first")
        take(client)
    if held == "by its definition":
        world.store.set_limit("definition:report", Limit(concurrency=1), actor=ACTOR)
        world.run("first")
    if held == "by its pause":
        world.store.pause_definition("report", why="broken", actor=ACTOR)
    if held == "by room":
        for number in range(4):
            enqueue(world.store, name=f"before{number}")
        world.store.start("report:u1:before0", delivery=1, worker="w1")
        world.store.start("report:u1:before1", delivery=1, worker="w1")
    if held == "by a higher queue":
        publish(world.store, define("urgent", priority="high"))
        for number in range(4):
            enqueue(world.store, "urgent", name=f"before{number}")
        world.store.start("urgent:u1:before0", delivery=1, worker="w1")
        world.store.start("urgent:u1:before1", delivery=1, worker="w1")
    enqueue(world.store, name="waits")
    world.store.release()
    assert world.store.job("report:u1:waits").state is JobState.PENDING
    world.clock.advance(61)
    world.live()
    world.store.release()
    assert world.codes() - {"definition_paused"} == set()


def test_a_look_at_what_waits_long_for_its_rate_is_no_problem(world: World) -> None:
    world.store.set_limit("definition:report", Limit(1 / 3600, 1), actor=ACTOR)
    world.run("first")
    enqueue(world.store, name="waits")
    world.store.release()
    world.clock.advance(61)
    world.live()
    assert world.store.reclaim(patience=3600 * SECOND) == []
    assert world.codes() == set()


def test_a_job_that_lies_in_a_queue_while_slots_are_free(world: World) -> None:
    enqueue(world.store)
    released = world.clock.now_ms
    world.clock.advance(59)
    world.live()
    assert world.codes() == set()
    world.clock.advance(2)
    world.live()
    (found,) = world.problems()
    assert (found.code, found.subject, found.since_ms) == ("queue_stuck", "medium", released)
    assert "w1 has slots free" in found.text
    world.store.start("report:u1:m1", delivery=1, worker="w1")
    assert world.codes() == set()


def test_what_is_stuck_for_a_moment_is_not_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue(world.store, delay_ms=1000)
    world.clock.advance(60)
    world.live()
    monkeypatch.setattr("taskplatform.health.time.sleep", lambda _: world.store.release())
    assert world.codes() == set()


def test_a_run_that_lasts_longer_than_its_timeout(world: World) -> None:
    job_id = world.run("m1")
    started = world.clock.now_ms
    for seconds, expected in ((300, set()), (59, set()), (2, {"run_too_long"})):
        world.clock.advance(seconds)
        world.live()
        assert world.codes() == expected
    (found,) = world.problems()
    assert (found.subject, found.since_ms) == (job_id, started)
    assert f"`taskplatform jobs show {job_id}`" in found.text
    world.store.cancel(job_id, reason="stuck")
    assert world.codes() == set()


# --- the planner -----------------------------------------------------------------------------------------------------


def test_no_beat_has_ever_run(store: Store, clock: Clock) -> None:
    publish(store, define("report"))
    offer(store)
    platform = Platform(store, Catalogue(), Settings(), actor=ACTOR)
    assert [one.code for one in platform.health().problems] == ["planner_missing"]
    store.lead(horizon=HORIZON, leader="beat@here")
    assert platform.health().well


def test_a_planner_that_stopped(world: World) -> None:
    subscribe(world.store, "u1", "report")
    world.planner.advance()
    ticked = world.clock.now_ms
    world.clock.advance(19)
    offer(world.store, slots=2)
    assert world.codes() == set(), "a standby may still take over"
    world.clock.advance(2)
    offer(world.store, slots=2)
    (found,) = world.problems()
    assert (found.code, found.severity, found.since_ms, found.subject) == ("planner_stopped", Severity.ERROR, ticked, "beat@here")
    assert "is due since" not in found.text
    world.clock.advance(2 * 86_400)
    offer(world.store, slots=2)
    (found,) = world.problems()
    assert "and something is due since" in found.text
    world.live()
    world.clock.advance(70)
    world.live()
    world.store.release()
    assert world.codes() == set()


def test_a_planner_that_falls_behind(world: World) -> None:
    subscribe(world.store, "u1", "report")
    world.planner.advance()
    due = world.store.next_due_ms()
    assert due is not None
    world.clock.now_ms = due + 29_000
    offer(world.store, slots=2)
    world.store.planner_tick(planned=0)
    assert world.codes() == set()
    world.clock.advance(2)
    world.store.planner_tick(planned=0)
    (found,) = world.problems()
    assert (found.code, found.since_ms) == ("planner_behind", due)


def test_what_cannot_be_planned(world: World, client: redis.Redis) -> None:
    """It is put off again and again, so it is never overdue."""
    subscribe(world.store, "u1", "report")
    whole = str(client.hget("tp:group:report", "schedule"))
    client.hset("tp:group:report", "schedule", '{"interval":{"type":"hourly","timezone":"Mars/Olympus"}}')
    world.live()
    failing = world.clock.now_ms
    for _ in range(12):
        world.clock.advance(10)
        world.live()
    (found,) = world.problems()
    assert (found.code, found.severity, found.since_ms, found.subject) == ("planner_failing", Severity.ERROR, failing, "beat@here")
    assert "group report: " in found.text
    client.hset("tp:group:report", "schedule", whole)
    world.clock.advance(10)
    world.live()
    world.store.release()
    assert world.codes() == set()


# --- Redis -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """One whose settings a test may change."""
    with embedded_server(tmp_path) as running:
        yield running


@pytest.fixture
def own_world(own_server: EmbeddedServer, clock: Clock) -> Iterator[World]:
    client = connect(own_server.url)
    yield World(Store(client, clock=clock), clock)
    client.close()


def configure(server: EmbeddedServer, **options: Any) -> None:
    client = redis.Redis.from_url(server.url)
    for name, value in options.items():
        client.config_set(name.replace("_", "-"), value)
    client.close()


def _replica(server: EmbeddedServer) -> None:
    client = redis.Redis.from_url(server.url)
    client.replicaof("127.0.0.1", find_port())
    client.close()


def _failed_snapshot(server: EmbeddedServer) -> None:
    client = connect(server.url)
    names = client.config_get("dir", "dbfilename")
    snapshot = Path(str(names["dir"])) / str(names["dbfilename"])
    snapshot.unlink(missing_ok=True)
    # no file can take the place of a folder that is not empty
    snapshot.mkdir()
    (snapshot / "in the way").touch()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    client.close()


@pytest.mark.parametrize(
    ("trouble", "code", "severity", "words"),
    [
        (_replica, "redis_not_master", Severity.ERROR, "Redis is a replica"),
        (_failed_snapshot, "redis_cannot_save", Severity.ERROR, "could not write its snapshot"),
        (lambda server: configure(server, appendonly="no"), "redis_aof_off", Severity.WARNING, "no append-only file"),
        (lambda server: configure(server, maxmemory="1mb"), "redis_memory", Severity.ERROR, "of its maxmemory"),
        (lambda server: nearly_full(server), "redis_memory", Severity.WARNING, "of its maxmemory"),
        (
            lambda server: configure(server, maxmemory="1gb", maxmemory_policy="allkeys-lru"),
            "redis_evicts",
            Severity.ERROR,
            "maxmemory-policy allkeys-lru",
        ),
        (lambda server: configure(server, maxclients="2"), "redis_clients", Severity.WARNING, "connections of 2"),
    ],
    ids=["replica", "snapshot", "no AOF", "full", "nearly full", "evicts", "clients"],
)
def test_a_server_that_is_not_as_it_should_be(
    own_server: EmbeddedServer, own_world: World, trouble: Callable[[EmbeddedServer], None], code: str, severity: Severity, words: str
) -> None:
    assert own_world.problems() == []
    other = redis.Redis.from_url(own_server.url)
    other.ping()  # a second connection
    trouble(own_server)
    (found,) = own_world.problems()
    assert (found.code, found.severity) == (code, severity)
    assert words in found.text
    other.close()


def nearly_full(server: EmbeddedServer) -> None:
    client = redis.Redis.from_url(server.url)
    used = int(client.info("memory")["used_memory"])
    client.close()
    configure(server, maxmemory=str(round(used / 0.93)))


# --- remarks, and who asks -------------------------------------------------------------------------------------------


def test_remarks_are_no_trouble(world: World, client: redis.Redis) -> None:
    job_id = world.run("m1")
    world.store.finish(job_id, delivery=1, worker="w1", state=JobState.FAILED, reason="HTTP 500")
    world.store.pause_definition("report", why="the API is down", actor=ACTOR)
    health = world.platform.health()
    assert health.well
    assert {(one.code, one.subject, one.severity) for one in health.problems} == {
        ("dead_letters", "", Severity.INFO),
        ("definition_paused", "report", Severity.INFO),
    }
    assert "the API is down" in world.problems("definition_paused")[0].text
    assert health.counters["dead_letters"] == 1


def test_errors_come_first(world: World) -> None:
    world.store.pause_definition("report", why="broken", actor=ACTOR)
    world.clock.advance(100)
    severities = [one.severity for one in world.problems()]
    assert severities == [Severity.ERROR, Severity.ERROR, Severity.INFO]


def test_it_takes_three_round_trips_whatever_there_is(world: World, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        enqueue(world.store, name=f"m{number}")
    for number in range(20):
        offer(world.store, f"worker{number}")
    sent = count_pipelines(monkeypatch)
    world.store.vitals()
    assert len(sent) == 2, "and the time"
    assert sum(sent) < 25 + 2 * 21 + 2


def test_the_alarm_sounds_once_a_minute_and_only_for_errors(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [1000.0]
    monkeypatch.setattr("taskplatform.health.time.monotonic", lambda: seconds[0])
    alarm = Alarm(world.store, world.platform.settings)
    world.store.pause_definition("report", why="broken", actor=ACTOR)
    world.clock.advance(100)
    offer(world.store)
    for passed, lines in ((0, 0), (59, 0), (2, 1), (30, 1), (31, 2)):
        seconds[0] += passed
        with caplog.at_level(logging.INFO, logger="taskplatform.health"):
            alarm.sound()
        assert len(caplog.records) == lines
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    assert caplog.messages[0].startswith("planner_stopped: No beat has planned since")


def test_each_worker_has_an_alarm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recovery loop sounds it, and lives on when Redis is not there to be asked."""
    asked: list[Alarm] = []

    def sound(alarm: Alarm) -> None:
        asked.append(alarm)
        if len(asked) == 2:
            loop.stop()
        raise StoreUnavailable("not there")

    monkeypatch.setattr(Alarm, "sound", sound)
    loop = RecoveryLoop(
        world.store,
        Settings(heartbeat_interval=timedelta(milliseconds=1)),
        worker="w1",
        slots=lambda: 1,
        queues=lambda: ["high"],
        stop_run=lambda _: None,
        consume=lambda _: None,
        has_run=lambda *_: False,
        limit_of=lambda _: None,
        endings=Endings(),
        info={},
    )
    loop.run()
    assert len(asked) == 2
    assert asked[0] is asked[1]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`taskplatform health` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(url: str, *options: str) -> Any:
        monkeypatch.setenv("TASKPLATFORM_REDIS_URL", url)
        settings.cache_clear()
        return CliRunner().invoke(cli, ["health", *options])

    yield run
    settings.cache_clear()


def test_the_command_says_all_is_well(command: Callable[..., Any], server: EmbeddedServer, client: redis.Redis) -> None:
    store = Store(client)
    world = World(store, Clock())
    enqueue(store, name="m1", user="u1", definition="report")
    store.start("report:u1:m1", delivery=1, worker="w1")
    store.finish("report:u1:m1", delivery=1, worker="w1", state=JobState.FAILED, reason="HTTP 500")
    result = command(server.url)
    assert result.exit_code == 0, result.output
    assert "dead_letters" in result.stdout
    assert result.stderr == "all is well\n"
    found = json.loads(command(server.url, "--json").stdout)
    assert found["well"] is True
    assert found["counters"] == {"dead_letters": 1}
    assert [one["code"] for one in found["problems"]] == ["dead_letters"]
    assert world.platform.health().well


def test_the_command_says_what_is_wrong(command: Callable[..., Any], server: EmbeddedServer, client: redis.Redis) -> None:
    result = command(server.url)
    assert result.exit_code == 1
    assert "no_worker" in result.stdout
    assert "planner_missing" in result.stdout
    assert result.stderr == "2 problems\n"
    found = json.loads(command(server.url, "--json").stdout)
    assert (found["well"], {one["severity"] for one in found["problems"]}) == (False, {"error"})


def test_the_command_says_that_redis_is_not_there(command: Callable[..., Any]) -> None:
    port = find_port()
    result = command(f"redis://127.0.0.1:{port}/0", "--json")
    assert result.exit_code == 3
    assert "Redis cannot be reached" in result.stderr
    assert result.stdout == ""


def test_redis_that_is_not_there_is_an_error_of_the_call(own_server: EmbeddedServer, own_world: World) -> None:
    own_server.stop()
    with pytest.raises(StoreUnavailable):
        own_world.platform.health()


def test_problems_are_values(world: World) -> None:
    world.clock.advance(100)
    (first, *_) = world.problems()
    assert replace(first, text="another") != first
    assert all(one.text.endswith(".") for one in world.problems())
    assert set(Priority) == set(world.store.vitals().queues)
