"""A worker with a pool of threads, which has no time limits and can stop nothing."""

from __future__ import annotations

import pytest
from pytest_celery import CeleryTestSetup

from taskplatform.model import JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until


@pytest.fixture
def site(calm_site: Site) -> Site:
    """The only worker here is the one with threads."""
    return calm_site


@pytest.fixture(scope="module")
def threads(calm_site: Site) -> WorkerNode:
    worker = calm_site.worker("--pool", "threads", "--concurrency", "4")
    worker.ready()
    return worker


@pytest.fixture
def default_worker_container(threads: WorkerNode) -> WorkerNode:
    return threads


def test_threads_run_jobs_side_by_side(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    with target.together(user, 4):
        jobs = [site.platform.enqueue("call", user=user).id for _ in range(4)]
    assert {job.state for job in site.wait_for_all(jobs)} == {JobState.COMPLETED}


def test_the_result_of_a_canceled_job_is_discarded(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    job = site.platform.enqueue("sleeping", user=user, params={"seconds": 6})
    wait_until(lambda: target.calls(user=user), message="it has not begun")
    site.platform.cancel(job.id)
    eventually(lambda: any("cannot stop it" in note for note in site.notes(job.id)), "the history does not say what becomes of it")
    eventually(lambda: len(target.calls(user=user)) == 2, "the function has not come to its end")
    eventually(lambda: any("discarded the result" in note for note in site.notes(job.id)), "the result was not discarded")
    assert site.states(job.id) == ["pending", "queued", "assigned", "running", "canceled"]
    assert site.platform.job(job.id).state is JobState.CANCELED
    assert celery_setup.worker.container.status == "running"


def test_a_call_has_its_deadline(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(hang=True))
    job = site.wait_for(site.platform.enqueue("short_call", user=user).id)
    assert job.state is JobState.TIMED_OUT, site.story(job.id)
    assert job.reason == "deadline of 1s exceeded"
    last = site.changes(job.id)[-1]
    assert last.detail["duration_ms"] >= 1000


def test_a_function_that_exits_does_not_end_the_worker(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    job = site.wait_for(site.platform.enqueue("exiting", user=user).id)
    assert (job.state, job.reason) == (JobState.FAILED, "SystemExit: 2")
    assert site.wait_for(site.platform.enqueue("call", user=user).id).state is JobState.COMPLETED
