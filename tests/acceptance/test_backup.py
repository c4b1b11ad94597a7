"""docs/backup.md as it stands: a copy of a running platform's Redis, restored into a new server, and what becomes of jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from taskplatform.errors import UnknownJob
from taskplatform.local import find_port
from taskplatform.model import JobState
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from tests.acceptance.nodes import Guard, ServerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Target
from tests.sentinels import Program
from tests.support import wait_until
from tests.tls import redis_server

SECONDS = 90.0


def _started(folder: Path, *lines: str) -> Program:
    """Debian's Redis, when it answers."""
    port = find_port()
    program = Program(redis_server(), folder, [f"port {port}", "maxmemory-policy noeviction", *lines], port)
    wait_until(lambda: _answers(program), seconds=SECONDS, message="redis-server does not answer")
    return program


def _answers(program: Program) -> bool:
    with suppress(redis.ConnectionError), redis.Redis(port=program.port) as client:
        return bool(client.ping())
    return False


class RedisNode(ServerNode):
    """Debian's Redis as a site's server, started and ended by the test."""

    def __init__(self, program: Program) -> None:
        self._name = "redis"
        self._program = program

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._program.port}/0"

    def remove(self, **_: object) -> None:
        """Nothing."""


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Program]:
    program = _started(tmp_path / "first", "appendonly yes")
    yield program
    program.end(signal.SIGKILL)


@pytest.fixture
def site(first: Program, guard: Guard, target: Target, tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path, base_environment(target.url, guard.environment), server=RedisNode(first)) as running:
        yield running


def _redis_cli(server: Program, *words: str) -> str:
    binary = shutil.which("redis-cli")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("redis-cli is not installed, and CI has it")
        pytest.skip("redis-cli is not installed")
    return subprocess.run([binary, "-p", str(server.port), *words], capture_output=True, text=True, check=True, timeout=60).stdout


def _restored(backup: Path, folder: Path) -> Program:
    """The steps of docs/backup.md. It then keeps an append-only file, and has lived through a crash with it."""
    folder.mkdir()
    shutil.copy(backup, folder / "data.rdb")
    server = _started(folder / "server", f"dir {folder}", "dbfilename data.rdb", "appendonly no")
    assert _redis_cli(server, "CONFIG", "SET", "appendonly", "yes") == "OK\n"
    wait_until(lambda: _has_its_file(server), seconds=SECONDS, message="the append-only file is not written")
    assert _redis_cli(server, "CONFIG", "REWRITE") == "OK\n"
    server.end(signal.SIGKILL)
    server.start()
    wait_until(lambda: _answers(server), seconds=SECONDS, message="the restored server does not answer")
    return server


def _has_its_file(server: Program) -> bool:
    told = _redis_cli(server, "INFO", "persistence").split()
    return {"aof_enabled:1", "aof_rewrite_in_progress:0", "aof_rewrite_scheduled:0", "aof_last_bgrewrite_status:ok"} <= set(told)


def test_a_backup_of_a_running_platform_is_restored(site: Site, first: Program, target: Target, tmp_path: Path) -> None:
    platform, users = site.platform, [site.user() for _ in range(4)]
    for number, user in enumerate(users):
        platform.subscribe(user, "call", params={"note": user}, schedule={"timezone": "Europe/Berlin"} if number == 0 else None)
    platform.set_limit("definition:call", concurrency=2)
    in_a_day = [platform.enqueue("call", user=users[0], countdown=timedelta(days=1)) for _ in range(3)]
    worker, beat = site.worker("--concurrency", "2"), site.beat()
    for node in (worker, beat):
        node.ready()
    eventually(lambda: beat.leads, "beat does not lead", seconds=SECONDS)

    at, _ = platform.trigger("call", window=timedelta())
    planned = [f"call:{user}:t{round(at.timestamp() * 1000)}" for user in users]
    eventually(lambda: len(platform.store.jobs_by_id(planned)) == len(users), "nothing is planned", seconds=SECONDS)
    site.wait_for_all(planned, seconds=SECONDS)
    platform.pause_definition("retried_call", why="maintenance")
    waiting = platform.enqueue("retried_call", user=users[1], idempotency_key="order 7").id
    backup = tmp_path / "backup.rdb"
    _redis_cli(first, "--rdb", str(backup))

    # what comes after it is not in it
    platform.resume_definition("retried_call")
    platform.subscribe(users[1], "short_call")
    after = platform.enqueue("call", user=users[1]).id
    assert [job.state for job in site.wait_for_all([waiting, after], seconds=SECONDS)] == [JobState.COMPLETED] * 2

    # the server and all who use it are gone
    site.remove(worker, beat)
    first.end(signal.SIGKILL)
    server = _restored(backup, tmp_path / "second")
    url = f"redis://127.0.0.1:{server.port}/0"
    settings = load_settings(redis_url=url, tasks_dir=site.environment["TASKPLATFORM_TASKS_DIR"])
    restored = Platform.connect(settings, actor="test")
    try:
        assert [one.id for one in restored.users().items] == sorted(users)
        assert restored.subscription(users[1], "call").params == {"note": users[1]}
        assert restored.subscription(users[0], "call").schedule is not None
        assert [one.definition for one in restored.subscriptions(users[1])] == ["call"]
        assert next(state.limit.concurrency for state in restored.limits() if state.name == "definition:call") == 2
        for job in in_a_day:
            assert (restored.job(job.id).state, restored.job(job.id).execute_after_ms) == (JobState.PENDING, job.execute_after_ms)
        assert {restored.job(job).state for job in planned} == {JobState.COMPLETED}
        with pytest.raises(UnknownJob):
            restored.job(after)

        # with the work going on: what waited at the time of the backup runs again, by the same key, when its definition is resumed again
        beat = site.beat(redis_url=url)
        worker = site.worker("--concurrency", "2", redis_url=url)
        worker.ready()
        eventually(lambda: beat.leads, "beat does not lead", seconds=SECONDS)
        assert restored.job(waiting).state is JobState.PENDING
        assert restored.enqueue("retried_call", user=users[1], idempotency_key="order 7").id == waiting
        restored.resume_definition("retried_call")
        later, _ = restored.trigger("call", window=timedelta())
        new = [f"call:{user}:t{round(later.timestamp() * 1000)}" for user in users]
        eventually(lambda: _completed(restored, [waiting, *new]), "the work does not go on", seconds=SECONDS)
        calls = {job: [call.key for call in target.calls(job=job)] for job in (*planned, *new, after, waiting)}
        assert calls == {job: [job] * (2 if job == waiting else 1) for job in calls}
    finally:
        restored.close()
        server.end(signal.SIGKILL)


def _completed(platform: Platform, jobs: list[str]) -> bool:
    with suppress(UnknownJob):
        return {platform.job(job).state for job in jobs} == {JobState.COMPLETED}
    return False
