"""Time limits under prefork: the call's own deadline, Celery's soft limit, and the hard one for what ignores the soft one."""

from __future__ import annotations

import os
import signal
import time

import pytest
from pytest_celery import CeleryTestSetup

from taskplatform.message import HARD_LIMIT_MARGIN
from taskplatform.model import JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

#: Of `failing_deeply`, which takes half a second and must not meet it by itself.
LONG_SECONDS = 3


@pytest.fixture(scope="module")
def single_worker(calm_site: Site) -> WorkerNode:
    """Two slots, of which the tests know the processes."""
    made = calm_site.worker("--concurrency", "2")
    made.ready()
    return made


def _pool(worker: WorkerNode) -> set[int]:
    return {process.pid for process in worker.processes()} - {worker.pid}


def test_a_call_ends_at_its_deadline(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(hang=True))
    job = site.wait_for(site.platform.enqueue("short_call", user=user).id)
    assert site.states(job.id) == ["pending", "queued", "assigned", "running", "timed_out"]
    assert job.reason == "deadline of 1s exceeded"
    assert site.changes(job.id)[-1].detail["duration_ms"] >= 1000


def test_a_function_is_interrupted_and_retried_and_then_timed_out(
    celery_setup: CeleryTestSetup, site: Site, target: Target, user: str
) -> None:
    job = site.wait_for(site.platform.enqueue("soft_limited", user=user).id)
    once = ["queued", "assigned", "running"]
    assert site.states(job.id) == ["pending", *once, "retrying", *once, "timed_out"]
    changes = site.changes(job.id)
    assert {line.reason for line in changes if line.to_state in (JobState.RETRYING, JobState.TIMED_OUT)} == {"time limit of 1s exceeded"}
    for received, ended in ((changes[2], changes[4]), (changes[6], changes[8])):
        # the limit counts from when the process took the task: after the worker got it, and perhaps well before it began
        assert ended.at_ms - received.at_ms >= 950
    assert [call.path for call in target.calls(user=user)] == ["/began", "/began"]


def test_a_function_that_ignores_the_soft_limit_is_killed(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    worker = celery_setup.worker.container
    job = site.wait_for(site.platform.enqueue("hard_limited", user=user).id)
    hard_seconds = 1 + HARD_LIMIT_MARGIN.total_seconds()
    assert site.states(job.id) == ["pending", "queued", "assigned", "running", "timed_out"]
    assert job.reason == f"killed at the hard time limit of {hard_seconds:g} s"
    received, _, ended = site.changes(job.id)[-3:]
    assert (ended.at_ms - received.at_ms) / 1000 >= hard_seconds - 0.1
    # the worker lives, all its slots too
    other = site.user()
    with target.together(other, 4):
        after = [site.platform.enqueue("call", user=other).id for _ in range(4)]
    assert {job.state for job in site.wait_for_all(after)} == {JobState.COMPLETED}
    assert worker.status == "running"


def test_the_signal_of_a_limit_that_comes_after_the_run_hurts_nobody(calm_site: Site, target: Target, single_worker: WorkerNode) -> None:
    """The pool knows a moment later that a run has ended, and sends it then: see `_under_soft_limit`."""
    user = calm_site.user()
    target.answer(user, Answer(after_seconds=0.3))
    pool = _pool(single_worker)
    for _ in range(5):
        jobs = [calm_site.platform.enqueue("call", user=user).id for _ in range(4)]
        assert {job.state for job in calm_site.wait_for_all(jobs)} == {JobState.COMPLETED}
        for pid in pool:
            os.kill(pid, signal.SIGUSR1)
    interrupted = calm_site.wait_for(calm_site.platform.enqueue("soft_limited", user=user).id)
    assert interrupted.state is JobState.TIMED_OUT, "the handler of a run must be that of the next one too"
    assert _pool(single_worker) == pool
    assert "Traceback" not in single_worker.logs()


def test_a_long_result_counts_though_it_is_read_after_the_limit(calm_site: Site, target: Target, single_worker: WorkerNode) -> None:
    user = calm_site.user()
    pool, before = _pool(single_worker), len(single_worker.logs())
    job = calm_site.platform.enqueue("failing_deeply", user=user).id
    wait_until(lambda: target.calls(user=user), message="it must have begun")
    # its main process sees neither the result nor the time that passes
    os.kill(single_worker.pid, signal.SIGSTOP)
    try:
        ended = calm_site.wait_for(job)
        # the limit must have passed while it looks at nothing; that it has, nobody could tell
        time.sleep(LONG_SECONDS + HARD_LIMIT_MARGIN.total_seconds() + 1)
    finally:
        os.kill(single_worker.pid, signal.SIGCONT)
    assert (ended.state, ended.reason) == (JobState.FAILED, "ValueError: deep down")
    after = calm_site.wait_for_all([calm_site.platform.enqueue("call", user=user).id for _ in range(4)])
    assert {one.state for one in after} == {JobState.COMPLETED}
    said = single_worker.logs()[before:]
    assert "ime limit" not in said
    assert _pool(single_worker) == pool, said
