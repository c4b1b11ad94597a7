"""What a server refuses, how that is told, and that no script stops halfway: on Valkey and on Debian's redis-server 7.0."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from taskplatform.errors import Outage, StoreUnavailable
from taskplatform.local import EmbeddedServer, find_port
from taskplatform.model import Backoff, Interval, IntervalType, JobState, Limit, Priority
from taskplatform.recovery import Ending, Endings, KilledEnding, RecoveryLoop
from taskplatform.settings import load_settings
from taskplatform.store import Enqueue, PublishedDefinition, Store, Subscribe, connect, unavailable
from tests.conftest import Clock
from tests.integration.harness import full, recover
from tests.integration.test_redis_server import binary as binary
from tests.integration.test_redis_server import debian_url as debian_url
from tests.support import wait_until

SECOND = timedelta(seconds=1)


@pytest.fixture(params=["valkey", "debian"])
def roomy(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client of either server, emptied."""
    url = server.url if request.param == "valkey" else request.getfixturevalue("debian_url")
    client = connect(url)
    client.flushall()
    yield client
    client.config_set("maxmemory", 0)
    client.close()


@pytest.fixture
def site(roomy: redis.Redis, clock: Clock) -> Store:
    """A definition with limits of all kinds, a worker, and a running, a queued and a waiting job."""
    store = Store(roomy, clock=clock)
    definition = PublishedDefinition(
        id="hourly",
        schedule=Interval(type=IntervalType.HOURLY),
        priority=Priority.HIGH,
        overlap="allow",
        message='{"properties": {"delivery_tag": "@@ID@@#@@DELIVERY@@"}}',
        window=timedelta(seconds=10),
        limit=Limit(100.0, 20, 5),
    )
    store.publish(definition, actor="test")
    store.create_users(["u"], actor="test")
    store.heartbeat("w#1", slots=2, queues=["high"], buffer=1.0)
    store.enqueue([Enqueue("hourly:u:running"), Enqueue("hourly:u:queued"), Enqueue("hourly:u:waiting")])
    assert store.start("hourly:u:running", delivery=1, worker="w#1").go
    return store


def _content(client: redis.Redis) -> dict[str, bytes]:
    return {key: client.dump(key) for key in client.scan_iter("*")}  # type: ignore[misc]


BEGINNINGS: list[Callable[[Store], Any]] = [
    lambda store: store.enqueue([Enqueue("hourly:u:new")]),
    lambda store: store.start("hourly:u:queued", delivery=1, worker="w#1"),
    lambda store: store.reclaim(patience=timedelta()),
    lambda store: store.create_users(["v"], actor="test"),
    lambda store: store.trigger("hourly", window=SECOND, actor="other"),
    lambda store: store.subscribe([Subscribe("u", "hourly", params={"a": 1})], horizon=SECOND, actor="test"),
    lambda store: store.plan(f"hourly|t{store.now_ms() - 1}", horizon=SECOND, batch=10),
]


@pytest.mark.parametrize("begin", BEGINNINGS, ids=["enqueue", "start", "reclaim", "create_users", "trigger", "subscribe", "plan"])
def test_what_begins_work_is_refused_as_a_whole(begin: Callable[[Store], Any], roomy: redis.Redis, site: Store, clock: Clock) -> None:
    roomy.delete("high")
    site.release()
    site.subscribe([Subscribe("u", "hourly")], horizon=SECOND, actor="test")
    site.trigger("hourly", window=timedelta(), actor="test")
    clock.advance(0.001)
    before = _content(roomy)
    with full(roomy), pytest.raises(StoreUnavailable, match="no memory left") as refused:
        begin(site)
    assert refused.value.outage is Outage.MEMORY
    assert _content(roomy) == before


def test_what_ends_work_goes_on(roomy: redis.Redis, site: Store, clock: Clock) -> None:
    with full(roomy):
        site.heartbeat("w#1", slots=2, queues=["high"], buffer=1.0)
        assert site.finish("hourly:u:running", delivery=1, worker="w#1", state=JobState.COMPLETED, reason="HTTP 200")
        assert site.cancel("hourly:u:queued", reason="test") is JobState.QUEUED
        clock.advance(10)
        assert site.sweep(retention=SECOND) == 2
    assert site.counts()[JobState.COMPLETED] == 1
    assert site.start("hourly:u:waiting", delivery=1, worker="w#1").go
    with full(roomy):
        assert site.lose("hourly:u:waiting", delivery=1, worker="w#1", what="test", max_losses=3, backoff=SECOND)
    clock.advance(1)
    site.release()
    assert site.start("hourly:u:waiting", delivery=2, worker="w#1").go
    clock.advance(10)
    with full(roomy):
        assert recover(site, SECOND) == [("job", "hourly:u:waiting"), ("worker", "w#1")]
    site.heartbeat("w#2", slots=2, queues=["high"], buffer=1.0)
    clock.advance(10)
    site.release()
    with full(roomy):
        assert site.withdraw("w#2", ["hourly:u:waiting#3"]) == 1
    assert site.start("hourly:u:waiting", delivery=4, worker="w#2").go
    with full(roomy):
        assert site.leave("w#2") == 1
    assert all((state.in_flight, state.reserved) == (0, 0) for state in site.limit_states())


def test_a_server_that_restarted_full_lets_workers_in(tmp_path: Path) -> None:
    """The first on a new server writes that it is another."""
    server = EmbeddedServer(tmp_path)
    server.start()
    try:
        with connect(server.url) as plain:
            plain.config_set("maxmemory", 1)
            plain.config_set("maxmemory-policy", "noeviction")
            store = Store.connect(server.url)
            store.heartbeat("w#1", slots=1, queues=["high"], buffer=1.0)
            assert [worker.id for worker in store.workers()] == ["w#1"]
            store.close()
    finally:
        server.stop()


def test_the_same_delivery_on_another_worker(site: Store) -> None:
    """A server that forgot a start gives the delivery out again: only the worker that it knows of counts."""
    assert not site.finish("hourly:u:running", delivery=1, worker="w#0", state=JobState.FAILED, reason="late")
    assert not site.lose("hourly:u:running", delivery=1, worker="w#0", what="late", max_losses=3, backoff=SECOND)
    assert site.job("hourly:u:running").state is JobState.RUNNING
    assert "discarded the result of delivery 1" in site.history("hourly:u:running")[-1].reason
    assert site.finish("hourly:u:running", delivery=1, worker="w#1", state=JobState.COMPLETED, reason="in time")


@pytest.mark.parametrize(
    ("fault", "outage"),
    [
        (ConnectionError("Connection refused"), Outage.UNREACHABLE),
        (TimeoutError("Timeout reading from socket"), Outage.UNREACHABLE),
        (BusyLoadingError("Redis is loading the dataset in memory"), Outage.LOADING),
        (ReadOnlyError("You can't write against a read only replica.", status_code="READONLY"), Outage.READ_ONLY),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'.", status_code="OOM"), Outage.MEMORY),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), Outage.DISK),
        (ResponseError("Command # 1 (SET a b) of pipeline caused error: MISCONF Errors writing to the AOF file"), Outage.DISK),
        (ConnectionError("max number of clients reached"), Outage.CLIENTS),
        (ResponseError("BUSY Redis is busy running a script."), Outage.BUSY),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), Outage.REPLICAS),
        (ClusterDownError("The cluster is down", status_code="CLUSTERDOWN"), Outage.REPLICAS),
        (ResponseError("WRONGTYPE Operation against a key"), None),
        (ValueError("LOADING"), None),
    ],
)
def test_what_passes_by_itself(fault: Exception, outage: Outage | None) -> None:
    found = unavailable(fault)
    assert (found.outage if found else None) is outage
    if found:
        assert str(found).startswith("Redis ")
        copy = pickle.loads(pickle.dumps(found))
        assert (str(copy), copy.outage) == (str(found), found.outage)


@contextmanager
def _too_few_replicas(client: redis.Redis) -> Iterator[None]:
    client.config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        client.config_set("min-replicas-to-write", 0)


@contextmanager
def _cannot_save(client: redis.Redis) -> Iterator[None]:
    """A folder stands where it would write its file."""
    target = Path(str(client.config_get("dir")["dir"])) / str(client.config_get("dbfilename")["dbfilename"])
    target.unlink(missing_ok=True)
    target.mkdir()
    try:
        client.config_set("save", "3600 1000000")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield
    finally:
        target.rmdir()
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")
        client.config_set("save", "")


@contextmanager
def _busy(client: redis.Redis) -> Iterator[None]:
    """A script of somebody else does not end."""
    was = client.config_get("lua-time-limit")["lua-time-limit"]
    client.config_set("lua-time-limit", 10)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(client.eval, "while true do end", 0)
        try:
            wait_until(lambda: _refuses(client, "BUSY"))
            yield
        finally:
            client.script_kill()
            assert endless.exception(timeout=60) is not None
            client.config_set("lua-time-limit", str(was))


def _refuses(client: redis.Redis, code: str) -> bool:
    try:
        client.ping()
    except StoreUnavailable as fault:
        return fault.outage.name == code
    return False


@pytest.mark.parametrize(("refusing", "outage"), [(_too_few_replicas, Outage.REPLICAS), (_cannot_save, Outage.DISK), (_busy, Outage.BUSY)])
def test_a_server_that_takes_no_writes_for_a_time(
    roomy: redis.Redis, site: Store, refusing: Callable[[redis.Redis], AbstractContextManager[None]], outage: Outage
) -> None:
    """Whatever is asked meanwhile gets the same error, and changes nothing; with it over, all goes on."""
    before = _content(roomy)
    with refusing(roomy):
        for attempt in (
            lambda: site.enqueue([Enqueue("hourly:u:new")]),
            lambda: site.start("hourly:u:queued", delivery=1, worker="w#1"),
            lambda: site.finish("hourly:u:running", delivery=1, worker="w#1", state=JobState.COMPLETED, reason="HTTP 200"),
            lambda: site.heartbeat("w#1", slots=2, queues=["high"], buffer=1.0),
        ):
            with pytest.raises(StoreUnavailable) as refused:
                attempt()
            assert refused.value.outage is outage
    assert _content(roomy) == before
    assert site.finish("hourly:u:running", delivery=1, worker="w#1", state=JobState.COMPLETED, reason="HTTP 200")
    assert site.start("hourly:u:queued", delivery=1, worker="w#1").go


# --- the recovery loop ----------------------------------------------------------------------------------------------


def _loop(store: Store, endings: Endings | None = None, clock: Callable[[], float] = time.monotonic) -> RecoveryLoop:
    return RecoveryLoop(
        store,
        load_settings(heartbeat_interval="100ms", heartbeat_timeout="300ms"),
        worker="me",
        slots=lambda: 1,
        queues=lambda: ["high"],
        stop_run=lambda _: None,
        consume=lambda _: None,
        has_run=lambda *_: False,
        limit_of=lambda _: None,
        endings=endings or Endings(),
        info={},
        clock=clock,
    )


def test_who_was_not_heard_does_not_judge_others(client: redis.Redis, store: Store, clock: Clock) -> None:
    now = [0.0]
    loop = _loop(store, clock=lambda: now[0])
    store.heartbeat("other", slots=1, queues=["high"], buffer=1.0)
    loop.beat()
    loop.observe()
    client.replicaof("127.0.0.1", find_port())
    try:
        with pytest.raises(StoreUnavailable):
            loop.beat()
    finally:
        client.replicaof("NO", "ONE")
    clock.advance(10)
    now[0] = 10.0
    loop.beat()
    loop.observe()
    assert {worker.id for worker in store.workers()} == {"me", "other"}
    now[0] = 10.2
    loop.beat()
    loop.observe()
    assert {worker.id for worker in store.workers()} == {"me"}


def test_endings_wait_for_redis(roomy: redis.Redis, site: Store) -> None:
    endings = Endings()
    endings.keep(Ending("hourly:u:gone", 1, "w#1", JobState.COMPLETED, "of a job that is forgotten"))
    endings.keep(Ending("hourly:u:running", 1, "w#1", JobState.COMPLETED, "HTTP 200", {"status": 200}))
    roomy.replicaof("127.0.0.1", find_port())
    try:
        with pytest.raises(StoreUnavailable, match="read-only"):
            endings.record(site)
    finally:
        roomy.replicaof("NO", "ONE")
    assert ("hourly:u:running", 1) in endings
    endings.record(site)
    assert ("hourly:u:running", 1) not in endings
    assert ("hourly:u:gone", 1) not in endings
    assert site.job("hourly:u:running").state is JobState.COMPLETED


@pytest.mark.parametrize(("retries", "state"), [(1, JobState.RETRYING), (0, JobState.TIMED_OUT)])
def test_a_run_that_was_killed_while_redis_was_away_is_no_loss(roomy: redis.Redis, site: Store, retries: int, state: JobState) -> None:
    endings = Endings()
    endings.keep(KilledEnding("hourly:u:running", 1, "w#1", "killed at the hard time limit of 6 s", retries, Backoff()))
    roomy.replicaof("127.0.0.1", find_port())
    try:
        with pytest.raises(StoreUnavailable):
            endings.record(site)
    finally:
        roomy.replicaof("NO", "ONE")
    endings.record(site)
    endings.record(site)
    job = site.job("hourly:u:running")
    assert (job.state, job.attempt) == (state, 1)
    assert site.history(job.id)[-1].reason == "killed at the hard time limit of 6 s"


def test_a_worker_that_stops_records_what_it_has(site: Store) -> None:
    endings = Endings()
    endings.keep(Ending("hourly:u:running", 1, "w#1", JobState.COMPLETED, "HTTP 200"))
    _loop(site, endings).stop()
    assert site.job("hourly:u:running").state is JobState.COMPLETED
