"""The server cuts workers' connections again and again while it lives. The target judges: no job is lost, and none runs twice at a time."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import stat
import struct
import termios
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import cast

import pytest

from taskplatform.model import JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Call, Target
from tests.support import wait_until

JOBS = 30
#: A worker needs a second to consume again: it looks for others first.
PAUSES_SECONDS = (1.8, 2.2, 0.2, 1.7, 2.5, 0.1)
CALL_SECONDS = 1.5


@pytest.fixture
def site(calm_site: Site) -> Site:
    """Its workers lose their connections, and none is lost itself."""
    return calm_site


def cut(site: Site) -> int:
    """Cut every connection but the tests' own. Returns how many."""
    return sum(int(cast("str", site.redis.client_kill_filter(_type=kind, skipme=True))) for kind in ("normal", "pubsub"))


class Cutter:
    """Cuts every connection but its own, again and again, for `with`."""

    def __init__(self, site: Site) -> None:
        self.cut = 0
        self._site = site
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        pauses = itertools.cycle(PAUSES_SECONDS)
        while not self._ended.wait(next(pauses)):
            self.cut += cut(self._site)


def overlaps(calls: list[Call]) -> list[tuple[Call, Call]]:
    """Calls of one job of which the next began before the one ended."""
    by_job: defaultdict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_job[call.job].append(call)
    found = []
    for own in by_job.values():
        for one, following in itertools.pairwise(own):
            if one.ended_seconds is None or following.at_seconds < one.ended_seconds:
                found.append((one, following))
    return found


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_cut_connections_double_and_lose_nothing(site: Site, target: Target, user: str, pool: str) -> None:
    target.answer(user, Answer(after_seconds=CALL_SECONDS))
    workers = [site.worker("--pool", pool, "--concurrency", "3") for _ in range(2)]
    for worker in workers:
        worker.ready()
    with Cutter(site) as cutter:
        jobs = [site.platform.enqueue("call", user=user).id for _ in range(JOBS)]
        site.wait_for_all(jobs, seconds=60)
    _judge(site, target, user, jobs, workers)
    assert cutter.cut > 20


def test_a_result_that_has_come_in_part_when_the_connection_is_cut_is_not_lost(site: Site, target: Target, user: str) -> None:
    """A slot whose result was lost would be taken for busy for ever."""
    worker = site.worker("--concurrency", "3")
    worker.ready()
    jobs = [site.platform.enqueue("shouting", user=user).id for _ in range(6)]
    for _ in range(30):
        time.sleep(0.15)  # apart from each other; it needs some time to be connected
        cut(site)
    for job_id in jobs:
        site.platform.cancel(job_id)
    with target.together(user, 3):  # all slots are free
        calls = [site.platform.enqueue("call", user=user).id for _ in range(3)]
    assert {job.state for job in site.wait_for_all(calls)} == {JobState.COMPLETED}
    assert worker.status == "running"
    site.remove(worker)


def _judge(site: Site, target: Target, user: str, jobs: list[str], workers: list[WorkerNode]) -> None:
    wait_until(lambda: all(call.ended_seconds for call in target.calls(user=user)), message="a call has not ended")
    calls = target.calls(user=user)
    assert overlaps(calls) == []
    counts = {job_id: [call.job for call in calls].count(job_id) for job_id in jobs}
    # no worker was lost, so each ran once
    assert {job_id: count for job_id, count in counts.items() if count != 1} == {}, "\n\n".join(
        site.story(job_id) for job_id, count in counts.items() if count != 1
    )
    for job_id in jobs:
        job = site.platform.job(job_id)
        assert (job.state, job.attempt) == (JobState.COMPLETED, 1), site.story(job_id)
    assert [worker.status for worker in workers] == ["running"] * len(workers), workers[0].logs() + workers[1].logs()
    wait_until(lambda: site.redis.exists("unacked", "unacked_index", "high", "medium", "low") == 0, message="the broker is not empty")
    assert not any(site.platform.store.running_on(worker.id) for worker in site.platform.store.workers())
    site.remove(*workers)


def _has_mail(pid: int) -> bool:
    """Whether something lies in a pipe that the process reads."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if str(path.readlink()).startswith("pipe:") and stat.S_IMODE(path.lstat().st_mode) & stat.S_IRUSR:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0]:
                    return True
            finally:
                os.close(descriptor)
    return False


def test_a_job_that_was_received_and_not_started_runs_once(site: Site, target: Target, user: str) -> None:
    """Its message goes back to the queue when the connection is lost, while the pool has it already."""
    worker = site.worker("--concurrency", "2")
    worker.ready()
    # a process is given nothing before it has said that it is there
    site.wait_for(site.platform.enqueue("call", user=site.user()).id)
    target.answer(user, Answer(after_seconds=8.0))
    children = [process.pid for process in worker.processes() if process.pid != worker.pid]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    job = site.platform.enqueue("call", user=user)
    wait_until(lambda: any(map(_has_mail, children)), message="it was not received")
    cut(site)
    # or it could take the message from the queue with its first word
    wait_until(lambda: worker.logs().count(f"[{job.id}] received") >= 2, message="the message was not put back")
    for pid in children:
        os.kill(pid, signal.SIGCONT)
    # the message is put back, taken again, and dropped
    eventually(lambda: f"delivery 1 of job {job.id} dropped" in worker.logs(), "no copy came")
    _judge(site, target, user, [site.wait_for(job.id).id], [worker])
