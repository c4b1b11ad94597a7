"""The doctor: each finding made for real, and gone again when it is mended; and what it promises of time, and of touching nothing."""

from __future__ import annotations

import ast
import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import trustme
from click.testing import CliRunner

import taskplatform.doctor.nodes
import taskplatform.doctor.server
import taskplatform.doctor.visit
import taskplatform.settings
from taskplatform import certs
from taskplatform.cli import main
from taskplatform.doctor import CHECKS, Finding, Report, Result, Severity, State, chosen, examine
from taskplatform.doctor.celery import RULES
from taskplatform.doctor.demand import period
from taskplatform.doctor.visit import KNOWN, MOST_SECONDS, Visit, make
from taskplatform.errors import InvalidInput, StoreError
from taskplatform.keys import Scope
from taskplatform.local import EmbeddedServer, embedded_server, find_port
from taskplatform.model import Cron, Interval, IntervalType, JobState, Limit, Priority
from taskplatform.settings import Settings
from taskplatform.store import Enqueue, Sample, Store, Subscribe
from taskplatform.store.acl import COMMANDS, Role, rules
from taskplatform.store.keys import key
from taskplatform.store.samples import MOST_SAMPLES
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


def test_a_server_that_reads_its_data(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    client.mset({f"some:{number}": "x" * 1000 for number in range(300)})
    quick = configured(client, repl_diskless_sync_delay=0)
    with embedded_server(tmp_path) as other, redis.Redis(port=other.port) as replica, quick:
        # so slowly that there is time to look
        replica.config_set("key-load-delay", 20_000)
        replica.config_set("loading-process-events-interval-bytes", 1024)
        replica.replicaof("127.0.0.1", server.port)
        wait_until(lambda: replica.info("persistence")["loading"])
        report = look(other.url, "redis.reach", "redis.memory")
        assert "reads its data from disk" in result(report, "redis.reach").findings[0].what
        assert [one.code for one in result(report, "redis.reach").findings] == ["redis_loading"]
        assert (report.exit_code, result(report, "redis.memory").state) == (2, State.UNKNOWN)
        other.kill()


@contextmanager
def in_the_way(path: Path) -> Iterator[None]:
    """A file, or a folder that is not empty, where the server wants to have the other."""
    aside = path.with_name("aside")
    folder = not path.is_dir()
    if path.exists():
        path.rename(aside)
    if folder:
        path.mkdir()
        (path / "in the way").touch()
    else:
        path.touch()
    try:
        yield
    finally:
        if folder:
            (path / "in the way").unlink()
            path.rmdir()
        else:
            path.unlink()
        if aside.exists():
            aside.rename(path)


def test_files_that_cannot_be_written(server: EmbeddedServer, client: redis.Redis) -> None:
    folder = Path(str(client.config_get("dir")["dir"]))

    def codes() -> set[str]:
        return set(found(look(server.url, "redis.persistence")))

    with in_the_way(folder / str(client.config_get("dbfilename")["dbfilename"])):
        client.bgsave()
        wait_until(lambda: codes() == {"redis_cannot_save"})
    client.bgsave()
    wait_until(lambda: codes() == set())
    with in_the_way(folder / str(client.config_get("appenddirname")["appenddirname"])):
        with suppress(StoreError):
            client.bgrewriteaof()
        wait_until(lambda: codes() == {"redis_rewrite_failed"})
    client.bgrewriteaof()
    wait_until(lambda: codes() == set())


def test_memory_that_is_nearly_gone(server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    client.set("large", "x" * 2**20)
    assert look(server.url, "redis.memory").state is State.OK
    with monkeypatch.context() as patch:
        # a machine, and data, of any size
        patch.setattr(taskplatform.doctor.server, "_MOST_OF_MACHINE", 1e-9)
        patch.setattr(taskplatform.doctor.server, "_MOST_FRAGMENTATION", 0.01)
        patch.setattr(taskplatform.doctor.server, "_WORTH_BYTES", 1024)
        assert found(look(server.url, "redis.memory")).keys() == {"redis_fills_machine", "redis_fragmented"}
    with configured(client, maxmemory="4gb"):
        assert look(server.url, "redis.memory").state is State.OK


def test_memory_that_grows(server: EmbeddedServer, client: redis.Redis) -> None:
    def noted(megabytes: Callable[[int], int]) -> None:
        client.delete(key("tp", "samples"))
        for minute in range(1, 31):
            sample = Sample(time.time_ns() // 1_000_000 - (30 - minute) * 60_000, 0, 0, 0, megabytes(minute) * 2**20)
            fields: Any = asdict(sample)
            client.xadd(key("tp", "samples"), fields)

    def findings() -> dict[str, Finding]:
        return found(look(server.url, "redis.memory"))

    noted(lambda minute: 10 + minute)
    with configured(client, maxmemory="1gb"):
        what = findings()["redis_memory_grows"].what
        assert re.fullmatch(r"Redis' data grew by 60 MiB an hour; so it is full, at 1,024 MiB, in 1[67] h[^,]*\.", what)
    with configured(client, maxmemory="40gb"):
        assert findings() == {}, "not within a day"
    # much more than before, but for once less
    noted(lambda minute: 1 if minute == 25 else 40 if minute > 20 else 10)
    with configured(client, maxmemory="1gb"):
        assert findings() == {}, "it goes up and down"


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
        assert time.monotonic() - began < MOST_SECONDS + 60
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

    report = make(Visit(Settings(), {}, seconds=3), {"raises": raises, "hangs": hangs, "works": works})
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


def notes(client: redis.Redis, change: Callable[[Store, int], object], minutes: int = 30) -> Store:
    """What a leading beat notes in some minutes up to now, with a change before each note; the store that stands at each minute."""
    minute = [0]
    store = Store(client, clock=lambda: time.time_ns() // 1_000_000 - (minutes - minute[0]) * 60_000)
    for minute[0] in range(1, minutes + 1):
        change(store, minute[0])
        store.note_sample()
    return store


def test_a_backlog_that_grew_for_half_an_hour(server: EmbeddedServer, client: redis.Redis, live: Store) -> None:
    live.create_user("u1", actor=ACTOR)
    publish(live, define())

    late = Store(client, clock=lambda: time.time_ns() // 1_000_000 - 3_600_000)
    late.enqueue([Enqueue(f"report:u1:n{number}") for number in range(150)])
    notes(client, lambda *_: None)
    assert "backlog_grows" not in found(look(server.url, "work.sets")), "it is large, and does not grow"
    client.delete(key("tp", "samples"))

    def arrive(store: Store, minute: int) -> None:
        store.enqueue([Enqueue(f"report:u1:m{minute}-{number}") for number in range(10)])

    notes(client, arrive)
    finding = found(look(server.url, "work.sets"))["backlog_grows"]
    assert re.fullmatch(r"450 jobs are due and wait, the first for 1 h[^,]*, 200 more than 20 min before\.", finding.what)


def test_what_was_noted_before_a_gap_does_not_count(server: EmbeddedServer, client: redis.Redis, live: Store) -> None:
    live.create_user("u1", actor=ACTOR)
    publish(live, define())
    for ago_min in (*range(60, 40, -1), *range(12, 0, -1)):
        late = Store(client, clock=lambda ago=ago_min: time.time_ns() // 1_000_000 - ago * 60_000)  # type: ignore[misc]
        if ago_min == 12:
            late.enqueue([Enqueue(f"report:u1:m{number}") for number in range(150)])
        late.note_sample()
    assert "backlog_grows" not in found(look(server.url, "work.sets"))


def test_samples_are_bounded(client: redis.Redis, live: Store) -> None:
    for _ in range(MOST_SAMPLES + 5):
        live.note_sample()
    found = live.samples()
    assert len(found) == client.xlen(key("tp", "samples")) == MOST_SAMPLES
    assert min(one.memory for one in found) > 2**19, "what the server itself takes"
    assert [one.at_ms for one in found] == sorted(one.at_ms for one in found)
    # by another release
    client.xadd(key("tp", "samples"), {"at_ms": "5", "more": "1"})
    assert live.samples()[-1] == Sample(5, 0, 0, 0, 0)


def test_dead_letters_that_become_more(server: EmbeddedServer, client: redis.Redis, live: Store) -> None:
    live.create_user("u1", actor=ACTOR)
    publish(live, define())

    def die(store: Store, minute: int) -> None:
        offer(store)
        job_id = f"report:u1:m{minute}"
        store.enqueue([Enqueue(job_id)])
        store.start(job_id, delivery=1, worker="w1")
        store.finish(job_id, delivery=1, worker="w1", state=JobState.FAILED, reason="test")

    notes(client, die)
    assert found(look(server.url, "work.sets"))["dead_letters_grow"].what == "There are 20 dead letters more than 20 min before."


def test_what_is_kept_too_long(server: EmbeddedServer, client: redis.Redis, live: Store) -> None:
    past = Store(client, clock=lambda: time.time_ns() // 1_000_000 - 2 * 86_400_000)
    publish(past, define())
    past.create_user("u1", actor=ACTOR)
    offer(past)
    for name, state in (("done", JobState.COMPLETED), ("dead", JobState.FAILED)):
        past.enqueue([Enqueue(f"report:u1:{name}")])
        past.start(f"report:u1:{name}", delivery=1, worker="w1")
        past.finish(f"report:u1:{name}", delivery=1, worker="w1", state=state, reason="test")

    def kept() -> list[str]:
        report = look(server.url, "work.sets", retention=DAY, dead_retention=DAY)
        return sorted(one.subject for one in result(report, "work.sets").findings if one.code == "sweep_behind")

    assert kept() == ["dead", "finished"]
    assert "sweep_behind" not in found(look(server.url, "work.sets", retention=3 * DAY, dead_retention=3 * DAY))
    live.sweep(retention=DAY, dead_retention=DAY)
    assert kept() == []


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
        findings = result(report, "work.definitions").findings
        for one in findings:
            assert one.mend.startswith("put HOST_OF_IT=… into .env") == ("is not in the environment" in one.what)
        return [one.what for one in findings]

    assert codes(write(tmp_path, endpoint="http://127.0.0.1:9/")) == []
    assert "${HOST_OF_IT} is not in the environment" in codes(write(tmp_path, endpoint="${HOST_OF_IT}/"))[0]
    assert codes(write(tmp_path, endpoint="${HOST_OF_IT}/"), HOST_OF_IT="http://127.0.0.1:9") == []
    assert "tasks.nothing" in codes(write(tmp_path, call="tasks.nothing:at_all"))[0]
    assert "one.yaml:" in codes(write(tmp_path, text="tasks: [{id: }]"))[0]


def carry_out(server: EmbeddedServer, mend: str, folder: Path) -> None:
    """The command with which a mend begins, where the definitions `slow` and `long` are known."""
    command = re.split(r"[,;]", mend)[0]
    assert command.startswith("taskplatform ")
    tasks = [{"id": name, "name": name, "interval": {"type": "daily"}, "call": "tasks.inputs:anything"} for name in ("slow", "long")]
    (folder / "two.yaml").write_text(json.dumps({"tasks": tasks}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKPLATFORM_REDIS_URL", server.url)
        patch.setenv("TASKPLATFORM_TASKS_DIR", str(folder))
        taskplatform.settings.settings.cache_clear()
        try:
            assert main(command.split()[1:]) == 0
        finally:
            taskplatform.settings.settings.cache_clear()


@pytest.mark.parametrize("rate", ["1/s", "50/m", "2000/d"])
def test_what_mends_a_limit_mends_it(server: EmbeddedServer, live: Store, tmp_path: Path, rate: str) -> None:
    live.create_users([f"u{number}" for number in range(200)], actor=ACTOR)
    publish(
        live, define("slow", interval={"type": "minutely"}, rate_limit=rate, concurrency=7), define("other", interval={"type": "minutely"})
    )
    for name in ("slow", "other"):
        live.subscribe([Subscribe(f"u{number}", name) for number in range(200)], horizon=HORIZON, actor=ACTOR)
    live.set_limit("total", Limit(5.0, 2), actor=ACTOR)
    findings = found(look(server.url, "work.capacity"))
    assert {"definition_cannot_be_met", "limit_cannot_carry"} <= findings.keys()
    for name in ("definition_cannot_be_met", "limit_cannot_carry"):
        carry_out(server, findings[name].mend, tmp_path)
    assert look(server.url, "work.capacity").state is State.OK
    assert live.limits()["definition:slow"].concurrency == 7, "the rest of the limit is as it was"


def test_windows_longer_than_their_intervals(server: EmbeddedServer, live: Store) -> None:
    live.create_user("u1", actor=ACTOR)
    publish(live, define("often", interval={"type": "minutely"}, window="2m"))
    subscribe(live, "u1", "often")
    finding = found(look(server.url, "work.capacity"))["windows_overlap"]
    assert (finding.subject, finding.what) == ("often", "Its window is 2 min long, and it comes due every 1 min.")


def test_run_times_that_slots_cannot_carry(server: EmbeddedServer, client: redis.Redis, live: Store, tmp_path: Path) -> None:
    now_ms = [1_800_000_000_000]
    store = Store(client, clock=lambda: now_ms[0])
    users = [f"u{number}" for number in range(60)]
    store.create_users(users, actor=ACTOR)
    every_minute: dict[str, Any] = {"interval": {"type": "minutely"}, "window": "10s"}
    publish(store, define("long", **every_minute, timeout="1h", overlap="skip"), define("never", **every_minute))
    store.subscribe([Subscribe(user, "long") for user in users], horizon=HORIZON, actor=ACTOR)

    def codes(slots: int) -> dict[str, Finding]:
        offer(live, slots=slots)
        return found(look(server.url, "work.runs"))

    assert codes(1).keys() == {"timeouts_fill_slots"}, "nothing is measured"
    for number in range(20):
        offer(store, "w0")
        store.enqueue([Enqueue(f"long:u{number}:m")])
        store.start(f"long:u{number}:m", delivery=1, worker="w0")
        now_ms[0] += 30_000
        store.finish(f"long:u{number}:m", delivery=1, worker="w0", state=JobState.COMPLETED, reason="")
    store.leave("w0")
    # sixty users a minute, each for half of it
    found_now = codes(20)
    assert "keeps 30.0 slots busy" in found_now["slots_cannot_carry"].what
    assert found_now["slots_cannot_carry"].mend.startswith("celery -A taskplatform.app worker --concurrency 18")
    assert codes(33).keys() == {"slots_nearly_used", "timeouts_fill_slots"}
    assert codes(38).keys() == {"timeouts_fill_slots"}
    live.set_limit("definition:long", Limit(50.0, 9, 10), actor=ACTOR)
    limited = codes(38)
    assert limited.keys() == {"concurrency_cannot_carry"}
    carry_out(server, limited["concurrency_cannot_carry"].mend, tmp_path)
    assert codes(38) == {}
    assert live.limits()["definition:long"] == Limit(50.0, 9, 38)
    publish(live, define("long", interval={"type": "minutely"}, window="10s", timeout="1h", overlap="skip"))
    for number in range(20, 60):
        offer(store, "w0")
        store.enqueue([Enqueue(f"long:u{number}:m")])
        store.start(f"long:u{number}:m", delivery=1, worker="w0")
        now_ms[0] += 120_000
        store.finish(f"long:u{number}:m", delivery=1, worker="w0", state=JobState.COMPLETED, reason="")
    store.leave("w0")
    finding = codes(1000)["runs_overlap"]
    assert finding.what == "Its runs take 1 min 30 s on average, and it comes due every 1 min."
    assert "occurrences are skipped" in finding.why


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


def _texts() -> list[str]:
    """All that the doctor, health and their pages say, with X for what is filled in."""
    texts = [re.sub(r" +#.*", "", (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8"))]
    for path in [*(ROOT / "taskplatform" / "doctor").glob("*.py"), ROOT / "taskplatform" / "health.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{\w+\}", "X", node.value))
    return texts


def _check_command(command: click.Command, words: list[str]) -> None:
    """Raises AssertionError where there is no such command, or where it does not take these words."""
    rest, arguments = words, 0
    while rest:
        word, *rest = rest
        option = next((one for one in command.params if isinstance(one, click.Option) and word in one.opts + one.secondary_opts), None)
        if option is not None:
            rest = rest if option.is_flag else rest[1:]
        elif isinstance(command, click.Group):
            assert word in command.commands, f"{' '.join(words)}: there is no {word}"
            command = command.commands[word]
        else:
            assert not word.startswith("-"), f"{' '.join(words)}: there is no {word}"
            arguments += 1
    assert not isinstance(command, click.Group) or command.invoke_without_command, f"{' '.join(words)} does nothing by itself"
    most = sum(math.inf if one.nargs < 0 else one.nargs for one in command.params if isinstance(one, click.Argument))
    least = sum(abs(one.nargs) for one in command.params if isinstance(one, click.Argument) and one.required)
    assert arguments <= most, f"{' '.join(words)} takes no {words[-1]}"
    # a page names commands without what they are about
    assert arguments >= least or not arguments, f"{' '.join(words)} takes more"


def _commands(program: str) -> set[str]:
    """What stands behind a program's name, up to what ends a command in a sentence."""
    pattern = rf"(?:^|[\s`;,(\"])(?<!SETUSER ){program} ((?:[^;,`.()|&\"\n]|\.(?=\w))+)"
    return {found.strip() for text in _texts() for found in re.findall(pattern, text)}


def test_each_command_that_mends_exists() -> None:
    from celery.bin.celery import celery as celery_program

    from taskplatform.cli import cli

    ours = {command for command in _commands("taskplatform") if re.match(r"[a-z][a-z-]+\b", command)}
    assert len(ours) > 20
    for command in sorted(ours):
        _check_command(cli, [word for word in command.split() if word != "…"])
    theirs = {command for command in _commands("celery") if command.startswith("-A")}
    assert len(theirs) >= 4
    for command in sorted(theirs):
        app, *words = command.removeprefix("-A ").split()
        assert app == "taskplatform.app"
        _check_command(celery_program, words)
    for command in ("dead list", "sweep", "limits set total --rat 5", "limits", "pause X Y Z"):
        with pytest.raises(AssertionError):
            _check_command(cli, command.split())


def test_each_setting_that_mends_exists() -> None:
    named = {name for text in _texts() for name in re.findall(r"TASKPLATFORM_([A-Z][A-Z_]*[A-Z])", text)}
    assert len(named) > 10
    assert {name.lower() for name in named} - Settings.model_fields.keys() == set()


def test_redis_takes_each_command_that_mends(server: EmbeddedServer, client: redis.Redis) -> None:
    commands = {command for command in _commands("redis-cli") if not command.startswith("-") and command.split()[0].isupper()}
    assert len(commands) > 8
    for command in sorted(commands):
        words = command.replace("…", "1gb" if "maxmemory" in command else "9000").split()
        if words[0] == "ACL" or "CONFIG REWRITE" in command:
            continue  # the rights are run in test_rights, and this server has no file to rewrite
        before = client.config_get(words[2]) if words[:2] == ["CONFIG", "SET"] else {}
        if "activedefrag" in before:
            continue  # only with the allocator that Redis brings along
        client.execute_command(*words)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            client.config_set(str(name), str(value))


def test_help_says_what_the_exit_codes_are() -> None:
    from taskplatform.cli import cli

    text = CliRunner().invoke(cli, ["doctor", "--help"]).output
    assert "monitoring plugins" in text
