"""A canceled job never starts; one that runs is stopped where the pool can do that, and else its result does not count."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from celery.worker import state as worker_state
from pytest_celery import CeleryTestSetup

from taskplatform.errors import Conflict
from taskplatform.model import JobState
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until


def test_a_waiting_job_never_starts(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    waiting = site.platform.enqueue("call", user=user, countdown=4)
    site.platform.cancel(waiting.id)
    after = site.platform.enqueue("call", user=user, countdown=4.2)
    assert site.wait_for(after.id).state is JobState.COMPLETED
    assert site.states(waiting.id) == ["pending", "canceled"]
    assert target.calls(job=waiting.id) == []
    assert site.platform.job(waiting.id).reason.startswith("canceled by ")


def test_a_queued_job_never_starts(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """All slots are taken, so it is in the broker when it is canceled."""
    canceled = threading.Event()
    target.answer(user, Answer(until=canceled))
    holds = [site.platform.enqueue("call", user=user, priority="high") for _ in range(4)]
    wait_until(lambda: len(target.calls(user=user)) == 4, message="the slots are not taken")
    other = site.user()
    queued = site.platform.enqueue("call", user=other, priority="high")
    site.wait_for(queued.id, JobState.QUEUED)
    site.platform.cancel(queued.id)
    canceled.set()
    after = site.platform.enqueue("call", user=other)
    site.wait_for_all([*(job.id for job in holds), after.id])
    assert site.states(queued.id) == ["pending", "queued", "canceled"]
    assert [call.job for call in target.calls(user=other)] == [after.id]


def test_a_running_job_is_stopped_and_its_slot_is_free(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """All four slots, so that what comes after shows that they are free again."""
    worker = celery_setup.worker.container
    jobs = [site.platform.enqueue("sleeping", user=user, params={"seconds": 20}) for _ in range(4)]
    wait_until(lambda: len(target.calls(user=user)) == 4, message="the slots are not taken")
    before = {process.pid for process in worker.processes()}
    for job in jobs:
        assert site.platform.cancel(job.id).state is JobState.CANCELED
    eventually(lambda: all("stopped" in site.notes(job.id) for job in jobs), "no history says that the job was stopped")
    eventually(lambda: len(before - {process.pid for process in worker.processes()}) == 4, "the processes were not killed")

    other = site.user()
    with target.together(other, 4):
        after = [site.platform.enqueue("call", user=other).id for _ in range(4)]
    assert {job.state for job in site.wait_for_all(after)} == {JobState.COMPLETED}
    assert worker.status == "running"
    for job in jobs:
        assert site.states(job.id) == ["pending", "queued", "assigned", "running", "canceled"]
    assert {call.path for call in target.calls(user=user)} == {"/began"}, "a stopped function ran to its end"
    with pytest.raises(Conflict):
        site.platform.cancel(after[0])


def test_a_function_that_refuses_to_stop_is_killed(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    worker = celery_setup.worker.container
    job = site.platform.enqueue("refusing_to_stop", user=user)
    wait_until(lambda: target.calls(user=user), message="it has not begun")
    before = {process.pid for process in worker.processes()}
    site.platform.cancel(job.id)
    eventually(lambda: bool(before - {process.pid for process in worker.processes()}), "its process was not killed")
    assert site.platform.job(job.id).state is JobState.CANCELED
    assert site.wait_for(site.platform.enqueue("call", user=user).id).state is JobState.COMPLETED


def test_a_run_after_the_canceled_one_is_left_alone(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """The worker stops the old run when the new one has begun, or is about to."""
    jobs = [site.platform.enqueue("sleeping", user=user, params={"seconds": 4}) for _ in range(3)]
    wait_until(lambda: len(target.calls(user=user)) == 3, message="the jobs do not run")
    for job in jobs:
        site.platform.cancel(job.id)
        site.platform.retry(job.id)
    assert {job.state for job in site.wait_for_all([job.id for job in jobs])} == {JobState.COMPLETED}
    for job in jobs:
        assert "canceled by" not in site.platform.history(job.id)[-1].reason


def test_a_process_that_is_ended_cancels_nothing(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """Celery announces it as it does a revoked task. So a worker that stops would cancel what it is to give back."""
    over = threading.Event()
    target.answer(user, Answer(until=over))
    job = site.platform.enqueue("call", user=user)
    wait_until(lambda: target.calls(user=user), message="the job has not started")
    announced = SimpleNamespace(id=job.id, delivery=site.platform.job(job.id).delivery)
    task, announce = site.app.tasks["call"], site._module._on_revoked  # what the worker's signal calls
    announce(task, announced, terminated=True, signum=15, expired=False)
    assert site.platform.job(job.id).state is JobState.RUNNING
    worker_state.revoked.add(job.id)
    announce(task, announced, terminated=True, signum=15, expired=False)
    assert site.platform.job(job.id).state is JobState.CANCELED
    over.set()


def test_celerys_revoke_cancels(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """As Flower's button and `celery control revoke` do it."""
    job = site.platform.enqueue("sleeping", user=user)
    wait_until(lambda: target.calls(user=user), message="it has not begun")
    site.app.control.revoke(job.id, terminate=True)
    canceled = site.wait_for(job.id)
    assert canceled.state is JobState.CANCELED
    assert "revoked" in canceled.reason
    assert site.wait_for(site.platform.enqueue("call", user=user).id).state is JobState.COMPLETED
    assert {call.path for call in target.calls(job=job.id)} == {"/began"}
