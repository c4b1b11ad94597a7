"""Strict priority, and first come first served inside it: one worker with one slot, which is busy while jobs are submitted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pytest_celery import CeleryTestSetup

from taskplatform.model import Job, JobState, Priority
from taskplatform.platform import JobRequest
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

HIGH, MEDIUM, LOW = Priority.HIGH, Priority.MEDIUM, Priority.LOW


@pytest.fixture
def site(calm_site: Site) -> Site:
    """No other worker must take what this module's one does."""
    return calm_site


@pytest.fixture(scope="module")
def one_slot(calm_site: Site) -> WorkerNode:
    worker = calm_site.worker("--concurrency", "1")
    worker.ready()
    return worker


@pytest.fixture
def default_worker_container(one_slot: WorkerNode) -> WorkerNode:
    return one_slot


@contextmanager
def _busy_slot(site: Site, target: Target) -> Iterator[None]:
    """Inside, the one slot runs a job that ends when the block does."""
    holder = site.user()
    over = threading.Event()
    target.answer(holder, Answer(until=over))
    job = site.platform.enqueue("call", user=holder, priority=HIGH)
    wait_until(lambda: target.calls(user=holder), message="the slot is not taken")
    try:
        yield
        assert site.platform.job(job.id).state is JobState.RUNNING, "the slot was free too soon"
    finally:
        over.set()


def _submit(site: Site, user: str, *priorities: Priority) -> list[Job]:
    return site.platform.enqueue_many(JobRequest(definition="call", user=user, priority=priority) for priority in priorities)


def test_five_jobs_complete_in_order_of_priority(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    with _busy_slot(site, target):
        jobs = _submit(site, user, HIGH, MEDIUM, LOW, MEDIUM, HIGH)
    finished = site.wait_for_all([job.id for job in jobs])
    assert {job.state for job in finished} == {JobState.COMPLETED}
    first, second, last, third, fifth = (job.id for job in jobs)
    assert [call.job for call in target.calls(user=user)] == [first, fifth, second, third, last]
    by_end = sorted(finished, key=lambda job: job.finished_ms or 0)
    assert [job.priority for job in by_end] == [HIGH, HIGH, MEDIUM, MEDIUM, LOW]


def test_a_late_high_job_goes_before_a_backlog(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    with _busy_slot(site, target):
        lows = _submit(site, user, *[LOW] * 30)
        middle = _submit(site, user, MEDIUM)
        late = _submit(site, user, HIGH)
        # at most one of them has been released, the rest waits in the platform's own set
        assert sum(site.platform.store.queued().values()) <= 3
    site.wait_for_all([job.id for job in lows])
    arrived = [call.job for call in target.calls(user=user)]
    assert arrived == [late[0].id, middle[0].id, *(job.id for job in lows)]
