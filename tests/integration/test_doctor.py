"""The doctor: each finding made for real, and gone again when it is mended; and what it promises of time, and of touching nothing."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from click.testing import CliRunner

import taskplatform.doctor.nodes
import taskplatform.doctor.visit
import taskplatform.settings
from taskplatform import certs
from taskplatform.cli import main
from taskplatform.doctor import CHECKS, Finding, Report, Result, Severity, State, chosen, examine
from taskplatform.doctor.celery import RULES
from taskplatform.doctor.demand import period
from taskplatform.doctor.visit import KNOWN, MOST_SECONDS, Visit, make
from taskplatform.errors import InvalidInput
from taskplatform.keys import Scope
from taskplatform.local import EmbeddedServer, embedded_server, find_port
from taskplatform.model import Cron, Interval, IntervalType, JobState, Limit, Priority
from taskplatform.settings import Settings
from taskplatform.store import Enqueue, Store, Subscribe
from taskplatform.store.acl import COMMANDS, Role, rules
from tests.acceptance.clocks import SteppedClock
from tests.acceptance.proxy import Proxy
from tests.conftest import ROOT
from tests.integration.harness import ACTOR, HORIZON, define, offer, publish, subscribe
from tests.support import wait_until
from tests.tls import tls_redis

SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One whose settings these tests change."""
    with embedded_server(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_long_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskplatform.doctor.nodes, "_SAMPLE_SECONDS", 0.3)
    monkeypatch.setattr(taskplatform.doctor.nodes, "_TAKE_OVER_SECONDS", 0.1)


@pytest.fixture
def live(client: redis.Redis) -> Store:
    """A store that lives by the server's clock, as the doctor does."""
    return Store(client)


def look(url: str, *only: str, environment: Mapping[str, str] | None = None, seconds: float = 60, **settings: Any) -> Report:
    return examine(Settings(redis_url=url, **settings), environment or {}, only=only, seconds=seconds)


def found(report: Report) -> dict[str, Finding]:
    """By code."""
    for one in report.results:
        assert one.state is not State.UNKNOWN or one.findings, f"{one.check}: {one.reason}"
    return {finding.code: finding for result in report.results for finding in result.findings}


def result(report: Report, check: str) -> Result:
    (one,) = [one for one in report.results if one.check == check]
    return one


@contextmanager
def configured(client: redis.Redis, **values: object) -> Iterator[None]:
    names = [name.replace("_", "-") for name in values]
    before = {name: str(client.config_get(name)[name]) for name in names}
    for name, value in zip(names, values.values(), strict=True):
        client.config_set(name, str(value))
    try:
        yield
    finally:
        for name, value in before.items():
            client.config_set(name, value)


# --- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "values", "code", "state"),
    [
        ("redis.eviction", {"maxmemory_policy": "allkeys-lru"}, "redis_would_evict", State.WARNING),
        ("redis.eviction", {"maxmemory_policy": "allkeys-lru", "maxmemory": "1gb"}, "redis_evicts", State.CRITICAL),
        ("redis.persistence", {"appendonly": "no"}, "redis_aof_off", State.WARNING),
        ("redis.persistence", {"appendfsync": "no"}, "redis_fsync_no", State.WARNING),
        ("redis.memory", {"maxmemory": "1kb"}, "redis_memory", State.CRITICAL),
    ],
)
def test_a_server_that_is_set_wrong(
    server: EmbeddedServer, client: redis.Redis, check: str, values: Mapping[str, str], code: str, state: State
) -> None:
    with configured(client, **values):
        report = look(server.url, check)
        assert report.state is state
        assert list(found(report)) == [code]
    assert look(server.url, check).state is State.OK


def test_connections_that_run_out(server: EmbeddedServer, client: redis.Redis) -> None:
    others = [redis.Redis(port=server.port) for _ in range(30)]
    for one in others:
        one.ping()
    with configured(client, maxclients=client.info()["connected_clients"] + 3):
        assert "redis_clients" in found(look(server.url, "redis.clients"))
    for one in others:
        one.close()
    assert look(server.url, "redis.clients").state is State.OK


class _Older(Proxy):
    """Makes a Redis 6.2 of what its server says of its version; the answers are as long as they were."""

    def _pump(self, source: socket.socket, sink: socket.socket, delayed: bool) -> None:  # noqa: ARG002
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(re.sub(rb"redis_version:\d\.\d", b"redis_version:6.2", data).replace(b"valkey_version", b"valkez_version"))


def test_a_server_that_is_too_old(server: EmbeddedServer) -> None:
    with _Older(server.port) as proxy:
        report = look(proxy.url, "redis.version")
        assert "Redis 6.2" in found(report)["redis_old"].what
        assert report.exit_code == 2
    assert result(look(server.url, "redis.version"), "redis.version").seen.startswith("Valkey ")


def test_a_server_that_is_slow(server: EmbeddedServer) -> None:
    with Proxy(server.port) as proxy:
        proxy.slow(0.05)
        assert "redis_slow" in found(look(proxy.url, "redis.latency"))


def test_a_replica_and_its_master(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    with embedded_server(tmp_path) as other, configured(client, repl_diskless_sync="yes", repl_diskless_sync_delay=3600):
        with redis.Redis(port=other.port) as replica:
            replica.replicaof("127.0.0.1", server.port)
            assert "redis_not_master" in found(look(other.url, "redis.replicas"))
            wait_until(lambda: "redis_replica_behind" in found(look(server.url, "redis.replicas")))
            client.config_set("repl-diskless-sync-delay", "0")
            wait_until(lambda: look(server.url, "redis.replicas").state is State.OK)
            replica.replicaof("NO", "ONE")
        assert look(other.url, "redis.replicas").state is State.OK


def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    clock = SteppedClock(tmp_path / "clock")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        with embedded_server(tmp_path / "valkey") as other:
            assert look(other.url, "redis.clock").state is State.OK
            clock.set(-120)
            finding = wait_until(lambda: found(look(other.url, "redis.clock"))).pop("clock_off")
            assert "ahead of that of Redis" in finding.what
            assert finding.severity == "warning"
            clock.set(1200)
            finding = wait_until(lambda: [one for one in found(look(other.url, "redis.clock")).values() if one.severity == "critical"])[0]
            assert "behind that of Redis" in finding.what


def test_rights(server: EmbeddedServer, client: redis.Redis) -> None:
    def asked(*words: str) -> Report:
        client.execute_command("ACL", "SETUSER", "somebody", "reset", "on", ">password", *words)  # type: ignore[no-untyped-call]
        return look(server.url.replace("://", "://somebody:password@"), "redis.rights")

    right = rules(Role.PLATFORM).split()
    assert found(asked(*right)) == {}
    lacking = ("+xadd", "+script|load", "~high", "&/0.celery.pidbox")
    report = asked(*(word for word in right if word not in lacking))
    assert all(f" {word}" in found(report)["redis_rights_missing"].what for word in lacking)
    assert "hset" not in found(report)["redis_rights_missing"].what
    assert report.exit_code == 2
    assert "+multi and perhaps more" in found(asked("+ping", "+info", "+exec", "+watch", "+unwatch", "~*"))["redis_rights_missing"].what
    wide = found(asked("+@all", "~*", "&*"))
    assert list(wide) == ["redis_rights_wide"]
    assert wide["redis_rights_wide"].severity == "info", "on this machine that may be meant"
    client.execute_command("ACL", "DELUSER", "somebody")  # type: ignore[no-untyped-call]


def test_every_command_that_the_platform_needs_is_asked_for(server: EmbeddedServer, client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "nobody", "reset", "on", ">password", "~*", "&*", "+multi", "+ping")  # type: ignore[no-untyped-call]
    report = look(server.url.replace("://", "://nobody:password@"), "redis.rights")
    # that user may not even ask INFO, with which the doctor begins
    assert result(report, "redis.rights").state is State.UNKNOWN
    client.execute_command("ACL", "SETUSER", "nobody", "+info")  # type: ignore[no-untyped-call]
    what = found(look(server.url.replace("://", "://nobody:password@"), "redis.rights"))["redis_rights_missing"].what
    needed = {f"+{command}" for command in COMMANDS[Role.PLATFORM]} - {"+multi", "+ping", "+info"}
    assert needed == set(re.findall(r"\+[a-z|]+", what))
    client.execute_command("ACL", "DELUSER", "nobody")  # type: ignore[no-untyped-call]


def test_another_machine_without_tls_and_password(server: EmbeddedServer) -> None:
    # by this name it is not known to be this machine
    report = look(server.url.replace("127.0.0.1", "0.0.0.0"), "redis.tls", "redis.rights")
    assert found(report).keys() == {"redis_no_tls", "redis_rights_wide"}
    assert result(report, "redis.rights").state is State.CRITICAL
    assert look(server.url, "redis.tls").state is State.OK


def test_the_certificate_of_redis(tmp_path: Path) -> None:
    with tls_redis(tmp_path, {"some": rules(Role.PLATFORM)}, {"some": "password"}) as secure:
        report = look(secure.url("some"), "redis.tls", "redis.rights", "access.certificates", redis_ca=secure.ca)
        assert found(report) == {}
        assert result(report, "redis.tls").seen == "TLS, verified"
        assert "that of Redis" in result(report, "access.certificates").seen
        wrong = look(secure.url("some", host="127.0.0.1"), "redis.reach", redis_ca=secure.ca)
        assert "cannot be trusted" in found(wrong)["redis_away"].what


# --- what it promises ------------------------------------------------------------------------------------------------


def test_it_only_reads(server: EmbeddedServer, client: redis.Redis, live: Store) -> None:
    publish(live, define())
    live.create_user("u1", actor=ACTOR)
    subscribe(live, "u1", "report")
    offer(live)
    client.config_resetstat()
    report = look(server.url)
    called = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    assert result(report, "redis.rights").state is State.OK
    reads = {"ping", "info", "time", "zrange", "zcard", "zcount", "zmscore", "smembers", "scard", "hget", "hmget", "hgetall", "get", "llen"}
    reads |= {"xrevrange", "lrange", "hexists", "zscore", "exists"}
    asks = {"config|get", "config|resetstat", "slowlog|len", "acl|whoami", "client|setinfo", "hello", "auth", "select", "multi"}
    assert called - reads - asks == {"watch", "unwatch", "exec"}, "and these three, over nothing"


@pytest.mark.parametrize("how", ["gone", "hangs", "refuses"])
def test_a_redis_that_is_away_hides_nothing_else(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(taskplatform.doctor.visit, "REDIS_SECONDS", 1.0)
    with Proxy(server.port) as proxy:
        if how == "hangs":
            proxy.freeze()
        elif how == "refuses":
            proxy.cut()
        url = f"redis://127.0.0.1:{find_port()}/0" if how == "gone" else proxy.url
        began = time.monotonic()
        report = look(url, tasks_dir=write(tmp_path, endpoint="http://127.0.0.1:9/"), seconds=MOST_SECONDS)
        # the promise is ten; how busy the machine is, nobody knows
        assert time.monotonic() - began < MOST_SECONDS + 10
        proxy.heal()
    assert report.exit_code == 2
    assert result(report, "redis.reach").findings[0].code == "redis_away"
    assert result(report, "redis.memory").reason == "Redis cannot be asked"
    assert result(report, "work.definitions").state is State.OK
    assert result(report, "access.settings").state is State.OK


def test_a_check_that_fails_or_hangs_hides_no_other() -> None:
    def raises(_: Visit) -> Iterator[Finding]:
        yield Finding(code="first", severity=Severity.INFO, subject="", what="w", why="y", mend="m")
        raise RuntimeError("something")

    def hangs(_: Visit) -> Iterator[Finding]:
        threading.Event().wait(60)
        yield from ()

    def works(visit: Visit) -> Iterator[Finding]:
        visit.seen("something")
        yield from ()

    report = make(Visit(Settings(), {}, seconds=0.5), {"raises": raises, "hangs": hangs, "works": works})
    assert result(report, "raises").reason == "the check itself failed: RuntimeError: something"
    assert [one.code for one in result(report, "raises").findings] == ["first"]
    assert (result(report, "hangs").state, result(report, "hangs").reason) == (State.UNKNOWN, "it took too long")
    assert (result(report, "works").state, result(report, "works").seen) == (State.OK, "something")
    assert report.exit_code == 3


def test_names_of_checks_choose() -> None:
    assert list(chosen(["redis"], ["redis.tls"])) == [name for name in CHECKS if name.startswith("redis.") and name != "redis.tls"]
    assert list(chosen(skip=["redis", "nodes", "work", "access"])) == ["celery.running", "celery.here"]
    with pytest.raises(InvalidInput, match=r"no check 'redi'; checks are redis\.reach"):
        chosen(["redi"])


# --- workers, beats and sets -----------------------------------------------------------------------------------------


def lead(store: Store, name: str = "beat@one", *, leads: bool = True) -> None:
    store.attend(name, catalogue="d", number=None, leads=leads, alive=15 * SECOND, account=300 * SECOND)


def test_no_beat_two_leaders_and_none(server: EmbeddedServer, live: Store) -> None:
    assert found(look(server.url, "nodes.leader")).keys() == {"planner_missing"}
    live.lead(horizon=HORIZON, leader="beat@one")
    live.planner_tick(planned=0)
    assert found(look(server.url, "nodes.leader")).keys() == {"no_beat"}
    lead(live)
    assert found(look(server.url, "nodes.leader")).keys() == {"no_standby"}
    lead(live, "beat@two")
    assert found(look(server.url, "nodes.leader"))["two_leaders"].subject == "beat@one, beat@two"
    live.sign_off("beat@two")
    lead(live, "beat@two", leads=False)
    lead(live)
    assert found(look(server.url, "nodes.leader")) == {}
    lead(live, leads=False)
    assert found(look(server.url, "nodes.leader")).keys() == {"no_leader"}


def test_a_beat_that_signs_off_leaves_nothing(client: redis.Redis, live: Store) -> None:
    live.attend("b", catalogue="d", number=None, leads=True, alive=SECOND, account=SECOND, info={"version": "1"})
    assert [one.info for one in live.beats()] == [{"version": "1"}]
    live.sign_off("b")
    assert not client.exists("tp:beats", "tp:beat_info")


def test_workers_that_are_drained(server: EmbeddedServer, live: Store) -> None:
    assert found(look(server.url, "nodes.workers")).keys() == {"no_worker"}
    offer(live, "w1")
    assert found(look(server.url, "nodes.workers")) == {}
    live.drain_worker("w1", actor=ACTOR)
    assert found(look(server.url, "nodes.workers"))["workers_drained"].severity == "warning"
    live.resume_worker("w1", actor=ACTOR)
    assert found(look(server.url, "nodes.workers")) == {}


def test_nodes_of_several_releases(server: EmbeddedServer, live: Store, tmp_path: Path) -> None:
    tasks = write(tmp_path, endpoint="http://127.0.0.1:9/")

    def heartbeat(name: str, **info: str) -> None:
        live.heartbeat(name, slots=1, queues=list(Priority), buffer=1, info=info)

    def codes() -> set[str]:
        return set(found(look(server.url, "nodes.releases", "celery.running", "nodes.clocks", tasks_dir=tasks)))

    heartbeat("w1", version="0.0", python="3.11.7", celery="5.7.0", kombu="5.7.0", definitions="d", clock="3 1", conf="{}")
    assert codes() == {"version_here_differs", "definitions_here_differs"}
    heartbeat("w2", version="0.1", python="3.12.1", celery="5.7.0", kombu="5.7.0", definitions="d", clock="-4000 1", conf="{}")
    assert {"version_differs", "python_differs", "clock_off"} <= codes()
    # of a release that told nothing of this, or something else
    heartbeat("w3", clock="later", conf="no JSON")
    assert {"version_differs", "settings_not_told"} <= codes()


def test_what_is_stuck(server: EmbeddedServer, client: redis.Redis) -> None:
    past_ms = [0]
    store = Store(client, clock=lambda: time.time_ns() // 1_000_000 - past_ms[0])
    assert found(look(server.url, "work.sets")) == {}
    past_ms[0] = 20 * 60_000
    publish(store, define())
    store.create_user("u1", actor=ACTOR)
    offer(store, slots=1)
    store.enqueue([Enqueue(f"report:u1:m{number}") for number in range(3)])
    store.release()
    past_ms[0] = 0
    offer(store, slots=1)
    assert store.start("report:u1:m0", delivery=1, worker="w1").go
    store.release()
    client.lpush("low", *["junk"] * 20)
    store.set_aside("low", "junk", reason="is no message", worker="w1")
    codes = found(look(server.url, "work.sets"))
    assert {"queue_strange", "garbage"} <= codes.keys()
    assert codes["garbage"].severity == "warning"
    client.delete("low")
    store.clear_garbage()
    assert found(look(server.url, "work.sets")).keys() <= {"queue_old"}


def test_a_job_that_was_released_long_ago(server: EmbeddedServer, client: redis.Redis) -> None:
    store = Store(client, clock=lambda: time.time_ns() // 1_000_000 - 20 * 60_000)
    publish(store, define())
    store.create_user("u1", actor=ACTOR)
    offer(store, slots=1)
    store.enqueue([Enqueue("report:u1:m1")])
    assert "queue_old" in found(look(server.url, "work.sets"))
    Store(client).cancel("report:u1:m1", reason="test")
    assert "queue_old" not in found(look(server.url, "work.sets"))


def test_a_backlog_that_grows(server: EmbeddedServer, client: redis.Redis) -> None:
    late = Store(client, clock=lambda: time.time_ns() // 1_000_000 - 5 * 60_000)
    publish(late, define())
    late.create_user("u1", actor=ACTOR)
    late.enqueue([Enqueue(f"report:u1:m{number}") for number in range(150)])
    assert "backlog_grows" not in found(look(server.url, "work.sets")), "it is large, and does not grow"
    done = threading.Event()

    def submit() -> None:
        for number in range(10_000):
            if done.wait(0.05):
                return
            late.enqueue([Enqueue(f"report:u1:n{number}")])

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        assert "they become more" in found(look(server.url, "work.sets"))["backlog_grows"].what
    finally:
        done.set()
        thread.join()


def test_dead_letters_near_their_bound(server: EmbeddedServer, live: Store) -> None:
    publish(live, define())
    live.create_user("u1", actor=ACTOR)
    offer(live)
    live.enqueue([Enqueue("report:u1:m1")])
    live.start("report:u1:m1", delivery=1, worker="w1")
    live.finish("report:u1:m1", delivery=1, worker="w1", state=JobState.FAILED, reason="test")
    assert found(look(server.url, "work.sets", dead_max=1)).keys() == {"dead_letters", "dead_letters_full"}
    assert found(look(server.url, "work.sets")).keys() == {"dead_letters"}


# --- definitions and hosts -------------------------------------------------------------------------------------------


def write(folder: Path, text: str = "", *, endpoint: str = "", **definition: object) -> Path:
    """A folder of definitions with one in it."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    one = {"id": "report", "name": "Report", "interval": {"type": "daily"}, **definition}
    if endpoint:
        one["config"] = {"endpoint": endpoint}
    (tasks / "one.yaml").write_text(text or json.dumps({"tasks": [one]}))
    return tasks


def test_definitions_that_do_not_load(server: EmbeddedServer, tmp_path: Path) -> None:
    def codes(tasks: Path, **environment: str) -> list[str]:
        report = look(server.url, "work.definitions", tasks_dir=tasks, environment=environment)
        return [one.what for one in result(report, "work.definitions").findings]

    assert codes(write(tmp_path, endpoint="http://127.0.0.1:9/")) == []
    assert "${HOST_OF_IT} is not in the environment" in codes(write(tmp_path, endpoint="${HOST_OF_IT}/"))[0]
    assert codes(write(tmp_path, endpoint="${HOST_OF_IT}/"), HOST_OF_IT="http://127.0.0.1:9") == []
    assert "tasks.nothing" in codes(write(tmp_path, call="tasks.nothing:at_all"))[0]
    assert "one.yaml:" in codes(write(tmp_path, text="tasks: [{id: }]"))[0]


def test_definitions_that_cannot_be_met(server: EmbeddedServer, live: Store) -> None:
    live.create_users([f"u{number}" for number in range(200)], actor=ACTOR)
    every_minute: dict[str, Any] = {"interval": {"type": "minutely"}, "window": "10s"}
    publish(live, define("slow", **every_minute, rate_limit="1/s"), define("calm", **every_minute))
    live.subscribe([Subscribe(f"u{number}", "slow") for number in range(200)], horizon=HORIZON, actor=ACTOR)
    report = look(server.url, "work.capacity")
    assert found(report)["definition_cannot_be_met"].subject == "slow"
    assert report.exit_code == 2
    live.set_limit("definition:slow", Limit(10.0, 20), actor=ACTOR)
    assert found(look(server.url, "work.capacity")).keys() == {"window_widened"}
    live.subscribe([Subscribe(f"u{number}", "calm") for number in range(200)], horizon=HORIZON, actor=ACTOR)
    # each by itself is done in its minute
    live.set_limit("total", Limit(6.0, 10), actor=ACTOR)
    assert found(look(server.url, "work.capacity"))["limit_cannot_carry"].subject == "total"
    live.set_limit("total", Limit(8.0, 10), actor=ACTOR)
    assert found(look(server.url, "work.capacity"))["limit_nearly_used"].subject == "total"
    live.set_limit("total", Limit(1000.0, 200), actor=ACTOR)
    live.set_limit("definition:slow", Limit(1000.0, 200), actor=ACTOR)
    assert found(look(server.url, "work.capacity")) == {}
    live.pause_definition("calm", why="test", actor=ACTOR)
    assert found(look(server.url, "work.capacity")).keys() == {"definition_paused"}


def test_how_often_something_comes_due() -> None:
    now_ms = round(datetime(2027, 3, 3, 12, tzinfo=UTC).timestamp() * 1000)
    assert period(Interval(type=IntervalType.MINUTELY), now_ms) == 60_000
    assert period(Interval(type=IntervalType.WEEKLY), now_ms) == 7 * 86_400_000
    # thirteen in two hours of each day
    assert period(Cron(expression="*/10 9,10 * * *"), now_ms) == pytest.approx(86_400_000 / 12, rel=0.1)
    assert period(Cron(expression="0 0 29 2 *"), now_ms) is None


def test_hosts(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    def codes(endpoint: str, **settings: Any) -> dict[str, Finding]:
        return found(look(server.url, "work.hosts", tasks_dir=write(tmp_path, endpoint=endpoint), **settings))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/call"
        assert codes(endpoint)["host_refused"].severity == "critical"
        assert codes(endpoint, http_allow="127.0.0.1") == {}
    refused = codes(endpoint, http_allow="127.0.0.1")["host_unreachable"]
    assert "connection refused" in refused.what
    assert "cannot be looked up" in codes("http://nothing.invalid/")["host_unreachable"].what
    assert codes("${NOT_KNOWN_HERE}/") == {}
    live = Store(client)
    live.hold_host("api.example.com", span=timedelta(minutes=5), why="test", actor=ACTOR)
    assert codes("${NOT_KNOWN_HERE}/").keys() == {"breaker_open"}
    live.free_host("api.example.com", actor=ACTOR)
    assert codes("${NOT_KNOWN_HERE}/") == {}


# --- keys, certificates, settings ------------------------------------------------------------------------------------


def test_keys_that_end(server: EmbeddedServer, live: Store) -> None:
    def codes(**settings: Any) -> set[str]:
        return set(found(look(server.url, "access.keys", **settings)))

    access = live.access
    access.create_key("ci", {Scope.READ}, lifetime=3 * DAY, actor=ACTOR, log_size=100)
    access.create_key("long", {Scope.READ}, lifetime=30 * DAY, actor=ACTOR, log_size=100)
    assert codes() == {"key_expires"}
    access.rotate_key("ci", overlap=DAY, lifetime=365 * DAY, actor=ACTOR, log_size=100)
    assert codes() == set()
    access.create_key("short", {Scope.READ}, lifetime=timedelta(milliseconds=1), actor=ACTOR, log_size=100)
    wait_until(lambda: codes() == {"key_expired"})
    access.create_key("short", {Scope.READ}, actor=ACTOR, log_size=100)
    assert codes() == set()
    bootstrap: dict[str, Any] = {"api_key": "k" * 40}
    assert look(server.url, "access.keys", **bootstrap).state is State.OK
    assert codes(**bootstrap) == {"bootstrap_key"}
    access.create_key("root", {Scope.ADMIN}, actor=ACTOR, log_size=100)
    assert look(server.url, "access.keys", **bootstrap).state is State.WARNING


def test_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    named: dict[str, Any] = {
        "api_tls_cert": folder / "server.crt",
        "api_tls_key": folder / "server.key",
        "api_tls_client_ca": folder / "ca.crt",
    }

    def codes() -> set[str]:
        # no Redis is needed for that
        return set(found(look("redis://127.0.0.1:9/0", "access.certificates", **named)))

    assert codes() == {"certificate_unreadable"}
    certs.make(folder, lifetime=10 * DAY)
    assert codes() == {"certificate_expires"}
    certs.make(folder, renew=True)
    assert codes() == set()
    (folder / "server.key").chmod(0o644)
    assert codes() == {"key_file_open"}
    (folder / "server.key").chmod(0o600)
    times: dict[str, dict[str, Any]] = {
        "certificate_expired": {"not_after": datetime(2020, 1, 1, tzinfo=UTC)},
        "certificate_not_valid_yet": {"not_before": datetime(2099, 1, 1, tzinfo=UTC), "not_after": datetime(2100, 1, 1, tzinfo=UTC)},
    }
    for code, when in times.items():
        trustme.CA().issue_cert("localhost", **when).cert_chain_pems[0].write_to_path(folder / "server.crt")
        assert codes() == {code}
    certs.make(folder, force=True)
    assert codes() == set()


def test_settings_that_leave_something_open(tmp_path: Path) -> None:
    def codes(environment: Mapping[str, str] | None = None, **settings: Any) -> set[str]:
        given: dict[str, Any] = {"ops_port": "8092-8099", "data_dir": tmp_path, **settings}
        return set(found(look("redis://127.0.0.1:9/0", "access.settings", environment=environment, **given)))

    assert codes() == set()
    assert codes(ops_port="0") == {"no_ops_port"}
    assert codes({"FLOWER_ADDRESS": "0.0.0.0"}) == {"flower_open"}
    assert codes({"FLOWER_ADDRESS": "0.0.0.0"}, flower_login="me:password") == set()
    assert codes({"FLOWER_ADDRESS": "127.0.0.1"}) == set()
    assert codes(api_insecure_http=True, api_host="0.0.0.0") == {"api_without_tls"}
    assert codes(api_insecure_http=True) == set()
    (tmp_path / "file").write_text("")
    assert codes(data_dir=tmp_path / "file") == {"data_dir_not_writable"}
    assert codes(data_dir=tmp_path / "new" / "folder") == set()


# --- Celery's settings -----------------------------------------------------------------------------------------------


def test_what_a_celeryconfig_must_not_say(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "celeryconfig.py").write_text(f"""
from runpy import run_path
globals().update({{name: value for name, value in run_path({str(ROOT / "celeryconfig.py")!r}).items() if not name.startswith("_")}})
worker_prefetch_multiplier = 4
task_acks_late = False
beat_scheduler = "celery.beat:PersistentScheduler"
broker_transport_options = {{**broker_transport_options, "visibility_timeout": 3600, "queue_order_strategy": "round_robin"}}
result_backend = "redis://:a-password@127.0.0.1/1"
""")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = sys.modules.pop("celeryconfig", None)
    try:
        report = look(server.url, "celery.here")
    finally:
        sys.modules.pop("celeryconfig", None)
        if before is not None:
            sys.modules["celeryconfig"] = before
    assert "a-password" not in repr(report)
    assert {one.what.partition(" ")[0]: str(one.severity) for one in result(report, "celery.here").findings} == {
        "worker_prefetch_multiplier": "critical",
        "task_acks_late": "critical",
        "broker_transport_options.queue_order_strategy": "critical",
        "beat_scheduler": "critical",
        "broker_transport_options.visibility_timeout": "warning",
        "result_backend": "warning",
    }


def test_our_own_celeryconfig_is_right_and_every_rule_looks_at_something(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from celery import Celery

    from taskplatform.node import celery_settings

    monkeypatch.chdir(ROOT)
    assert found(look(server.url, "celery.here")) == {}
    # Celery's own defaults are what a rule is for
    plain = celery_settings(Celery("plain", set_as_current=False).conf)
    assert {rule.name for rule in RULES} <= plain.keys()
    kept = {rule.name for rule in RULES if rule.holds(plain[rule.name])}
    assert kept == {
        "task_reject_on_worker_lost",
        "accept_content",
        "worker_cancel_long_running_tasks_on_connection_loss",
        "task_always_eager",
        "enable_utc",
    }


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **settings: str) -> tuple[int, str, str]:
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"TASKPLATFORM_{name.upper()}", value)
        taskplatform.settings.settings.cache_clear()
        try:
            code = main(["doctor", *words])
        finally:
            taskplatform.settings.settings.cache_clear()
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def doctor(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: redis.Redis
) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str, **settings: str) -> tuple[int, str, str]:
        return run(*words, monkeypatch=monkeypatch, capsys=capsys, **{"redis_url": server.url, **settings})

    return call


def test_exit_codes(doctor: Callable[..., tuple[int, str, str]], client: redis.Redis) -> None:
    assert doctor("--only", "redis.eviction")[0] == 0
    with configured(client, appendonly="no"):
        assert doctor("--only", "redis.eviction", "--only", "redis.persistence")[0] == 1
    assert doctor("--only", "nodes")[0] == 2
    assert doctor("--only", "redis", redis_url="redis://127.0.0.1:9/0")[0] == 2
    assert doctor("--only", "redis.memory", redis_url="redis://127.0.0.1:9/0")[0] == 3
    # a wrong command line is not a critical finding
    for words in (["--nothing"], ["--only", "nothing"], ["one", "more"], ["--only"]):
        code, out, err = doctor(*words)
        assert (code, out) == (3, "")
        assert "Error" in err
    code, out, _ = doctor("--json", heartbeat_timeout="never")
    assert code == 2
    (check,) = json.loads(out)["checks"]
    assert "heartbeat_timeout" in check["findings"][0]["what"].lower()


def test_json_is_stable(doctor: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = doctor("--json", "--only", "redis.version", "--only", "nodes.workers", "--only", "nodes.clocks")
    report = json.loads(out)
    assert code == report["exit_code"] == 2
    assert err == ""
    assert report.keys() == {"at", "state", "exit_code", "checks"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", report["at"])
    assert report["state"] == "critical"
    version, workers, clocks = report["checks"]
    assert version.keys() == workers.keys() == {"check", "state", "seen", "reason", "findings"}
    assert (version["check"], version["state"], version["reason"], version["findings"]) == ("redis.version", "ok", "", [])
    assert (clocks["state"], clocks["reason"]) == ("skipped", "no worker or beat that lives tells of its clock")
    (finding,) = workers["findings"]
    assert finding.keys() == {"code", "severity", "subject", "what", "why", "mend"}
    assert (finding["code"], finding["mend"]) == ("no_worker", "celery -A taskplatform.app worker")


def test_the_tables(doctor: Callable[..., tuple[int, str, str]]) -> None:
    _, out, err = doctor("--only", "redis.version", "--only", "nodes.workers", "--only", "nodes.clocks")
    checks, findings = out.split("\n\n")
    rows = [line.split("\t") for line in checks.splitlines()]
    assert rows[0] == ["check", "state", "seen"]
    assert [row[:2] for row in rows[1:]] == [["redis.version", "ok"], ["nodes.workers", "critical"], ["nodes.clocks", "not checked"]]
    heading, line = findings.strip().splitlines()
    assert heading.split("\t") == ["severity", "check", "subject", "what", "why", "what mends it"]
    assert line.split("\t")[:2] == ["critical", "nodes.workers"]
    assert err.rstrip().endswith("1 finding")


# --- the documents ---------------------------------------------------------------------------------------------------


def test_each_check_and_finding_is_documented() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", text, re.MULTILINE)
    assert rows == list(CHECKS)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "taskplatform" / "doctor").glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', sources)) | set(re.findall(r'"(certificate_[a-z_]+)"', sources)) | KNOWN.keys()
    assert len(codes) > 50
    assert {code for code in codes if f"`{code}`" not in text} == set()


def test_the_doctor_knows_all_that_health_finds() -> None:
    source = (ROOT / "taskplatform" / "health.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'(?:_error|_problem)\(\s*"([a-z_]+)"', source)) | set(re.findall(r'code="([a-z_]+)"', source))
    codes |= set(re.findall(r'"(breaker_open|host_held)"', source))
    assert codes == KNOWN.keys()


def test_help_says_what_the_exit_codes_are() -> None:
    from taskplatform.cli import cli

    text = CliRunner().invoke(cli, ["doctor", "--help"]).output
    assert "monitoring plugins" in text
