"""The scripts on Debian's redis-server 7.0, which is what many installations run, beside the Valkey of the other tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from taskplatform import prepare
from taskplatform.errors import StoreError
from taskplatform.local import find_port
from taskplatform.model import Interval, IntervalType, JobState, Limit, Priority, moment, slot
from taskplatform.store import Enqueue, Opening, PublishedDefinition, Store, Subscribe, connect
from taskplatform.store.scripts import names, whole
from tests.conftest import Clock
from tests.support import wait_until

HORIZON = timedelta(seconds=5)
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def binary() -> str:
    found = shutil.which("redis-server")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("redis-server is not installed, and CI has it")
        pytest.skip("redis-server is not installed")
    return found


@pytest.fixture(scope="module")
def debian_url(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = find_port()
    folder = tmp_path_factory.mktemp("redis")
    with _running(binary, port, folder), redis.Redis(port=port) as probe:
        wait_until(lambda: _answers(probe), message="redis-server to answer")
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _running(binary: str, port: int, folder: Path, *options: str) -> Iterator[None]:
    with Path(folder / "log").open("ab") as log:
        given = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *options]
        process = subprocess.Popen([binary, *given], stdout=log)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_what_scripts_wrote_is_there_after_a_restart_where_nobody_may_be_default(binary: str, tmp_path: Path) -> None:
    """It reads its append-only file as the user `default`, and refuses what that one may not."""
    passwords = dict.fromkeys(("REDIS_PASSWORD", "REDIS_FLOWER_PASSWORD", "REDIS_ADMIN_PASSWORD"), "p" * 8)
    (tmp_path / "users.acl").write_text(prepare.acl(passwords))
    port = find_port()
    options = ("--aclfile", str(tmp_path / "users.acl"), "--appendonly", "yes")
    store = Store(redis.Redis(port=port, username="platform", password="p" * 8))
    with closing(store), redis.Redis(port=port, username="admin", password="p" * 8) as admin:
        with _running(binary, port, tmp_path, *options):
            wait_until(lambda: _answers(admin), message="redis-server to answer")
            assert store.create_user("u1", actor="test")
        with _running(binary, port, tmp_path, *options), redis.Redis(port=port) as nobody:
            wait_until(lambda: _answers(admin), message="redis-server to answer again")
            assert store.count_users() == 1
            with pytest.raises(redis.AuthenticationError):
                nobody.ping()


def test_every_script_compiles(debian_url: str) -> None:
    client = connect(debian_url)
    assert len(names()) > 20
    for name in names():
        client.script_load(whole("tp", name))
    client.close()


def test_a_job_from_subscription_to_its_end(debian_url: str) -> None:
    client = connect(debian_url)
    client.flushall()
    clock = Clock()
    store = Store(client, clock=clock)
    definition = PublishedDefinition(
        id="hourly",
        schedule=Interval(type=IntervalType.HOURLY),
        priority=Priority.HIGH,
        overlap="skip",
        message='{"id": "@@ID@@", "user": "@@USER@@", "delivery": @@DELIVERY@@, "retries": @@RETRIES@@, "queue": "@@QUEUE@@"}',
        window=timedelta(seconds=10),
        limit=Limit(100.0, 20, 5),
    )
    store.publish(definition, actor="test")
    store.create_users(["u1", "u2"], actor="test")
    store.subscribe([Subscribe("u1", "hourly"), Subscribe("u2", "hourly", params={"a": [1]})], horizon=HORIZON, actor="test")
    group = store.group("hourly")
    assert group is not None
    at_ms = clock.now_ms + 60_000
    store.open_occurrences(
        group, [Opening(at_ms, "schedule", "due")], cursor_ms=at_ms, next_due_ms=at_ms + 3_600_000, window_ms=10_000, horizon=HORIZON
    )
    clock.now_ms = at_ms + 6000
    assert store.plan(f"hourly|{at_ms}", horizon=HORIZON, batch=100) == (2, None)
    clock.now_ms = at_ms + 10_000
    store.heartbeat("w#1", slots=2, queues=["high"], buffer=1.0)
    assert store.release()[0] == 2
    ids = sorted(
        (f"hourly:{user}:{at_ms}" for user in ("u1", "u2")), key=lambda job_id: moment(at_ms, slot(job_id.split(":")[1], "hourly"), 10_000)
    )
    first, second = ids
    assert store.start(first, delivery=1, worker="w#1").go
    assert not store.start(first, delivery=1, worker="w#2").go
    assert store.finish(first, delivery=1, worker="w#1", state=JobState.RETRYING, reason="HTTP 503", retry_in=SECOND)
    assert store.start(second, delivery=1, worker="w#1").go
    assert store.recover("w#1", seen_ms=1, how="silent", max_losses=3, backoff=SECOND) == []
    clock.advance(2)
    seen_ms = store.heartbeats()["w#1"]
    assert store.recover("w#1", seen_ms=seen_ms, how="silent", max_losses=3, backoff=SECOND) == [("job", second), ("worker", "w#1")]
    store.heartbeat("w#2", slots=2, queues=["high"], buffer=1.0)
    clock.advance(5)
    store.release()
    for job_id in ids:
        assert store.start(job_id, delivery=2, worker="w#2").go
        assert store.finish(job_id, delivery=2, worker="w#2", state=JobState.COMPLETED, reason="HTTP 200", detail={"status": 200})
    assert [store.job(job_id).state for job_id in ids] == [JobState.COMPLETED] * 2
    store.enqueue([Enqueue("hourly:u1:m1", delay_ms=1000, params={"a": "ü"})])
    assert store.cancel("hourly:u1:m1", reason="test") is JobState.PENDING
    assert store.delete_user("u1", actor="test") == (0, 1)
    assert list(client.scan_iter("*u1*")) == []
    client.close()


def test_a_refusal_of_redis_is_a_store_error(debian_url: str) -> None:
    client = connect(debian_url)
    client.set("tp:users", "not a sorted set")
    with pytest.raises(StoreError, match="WRONGTYPE"):
        Store(client).create_user("u9", actor="test")
    client.close()
