"""Workers that are killed, that freeze, and that are asked to stop: every job ends, and each result counts once."""

from __future__ import annotations

import threading

import pytest
from pytest_celery import CeleryTestSetup, CeleryTestWorker, CeleryWorkerCluster

from taskplatform.model import Job, JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

AGAIN = ["pending", "queued", "assigned", "running", "retrying", "queued", "assigned", "running", "completed"]


@pytest.fixture
def site(own_site: Site) -> Site:
    """Others must not suffer from what is done to the workers here."""
    return own_site


@pytest.fixture(scope="module")
def survivors() -> list[WorkerNode]:
    """Of the tests so far."""
    return []


@pytest.fixture
def celery_worker_cluster(site: Site, survivors: list[WorkerNode]) -> CeleryWorkerCluster:
    """Two workers of one slot."""
    survivors[:] = [worker for worker in survivors if worker.status == "running"]
    while len(survivors) < 2:
        survivors.append(site.worker("--concurrency", "1"))
    return CeleryWorkerCluster(*(CeleryTestWorker(worker, app=site.app) for worker in survivors))


@pytest.fixture
def workers(celery_setup: CeleryTestSetup, site: Site) -> list[WorkerNode]:
    """The two, when they are ready, and when their heartbeats say so."""
    nodes = [worker.container for worker in celery_setup.worker_cluster]
    for node in nodes:
        node.ready()
    eventually(lambda: all(any(_is(node, one.id) for one in site.platform.store.workers()) for node in nodes), "no heartbeats")
    return nodes


def _is(worker: WorkerNode, worker_id: str) -> bool:
    return worker_id.startswith(f"{worker.node}#")


def _run(site: Site, target: Target, user: str, workers: list[WorkerNode]) -> tuple[Job, WorkerNode, WorkerNode]:
    """A job that has reached the target; the worker that runs it; the other one."""
    job = site.platform.enqueue("call", user=user)
    wait_until(lambda: target.calls(user=user), message="the job has not started")
    job = site.platform.job(job.id)
    one, other = workers if _is(workers[0], job.worker) else reversed(workers)
    assert _is(one, job.worker)
    return job, one, other


def test_a_killed_workers_job_completes_elsewhere(
    celery_setup: CeleryTestSetup, workers: list[WorkerNode], site: Site, target: Target, user: str
) -> None:
    target.answer(user, Answer(hang=True), Answer(200))
    job, victim, other = _run(site, target, user, workers)
    assert victim.processes()
    since_ms = site.platform.store.now_ms()
    victim.kill("SIGKILL")
    assert victim.processes() == []
    finished = site.wait_for_loss(job, since_ms)

    assert finished.state is JobState.COMPLETED
    assert site.states(job.id) == AGAIN, site.story(job.id)
    lost = site.changes(job.id)[4]
    assert _is(victim, lost.worker)
    assert lost.reason == f"worker {lost.worker} lost: its process has ended; again in 1 s"
    assert _is(other, finished.worker)
    assert [call.key for call in target.calls(user=user)] == [job.id] * 2
    assert not any(_is(victim, worker.id) for worker in site.platform.store.workers())


def test_a_frozen_workers_late_result_does_not_count(
    celery_setup: CeleryTestSetup, workers: list[WorkerNode], site: Site, target: Target, user: str
) -> None:
    target.answer(user, Answer(200, body="late", after_seconds=0.5), Answer(200, body="in time"))
    job, victim, other = _run(site, target, user, workers)
    since_ms = site.platform.store.now_ms()
    victim.pause()
    finished = site.wait_for_loss(job, since_ms)
    assert finished.state is JobState.COMPLETED
    assert _is(other, finished.worker)
    assert site.notes(job.id) == []

    victim.resume()
    # what comes first: the call's end, or the word of the heartbeat that it does not count
    eventually(lambda: any(note.startswith("discarded ") and "delivery 1" in note for note in site.notes(job.id)), "no late result")
    assert site.states(job.id) == AGAIN, site.story(job.id)
    assert site.platform.job(job.id).finished_ms == finished.finished_ms
    assert site.changes(job.id)[-1].detail["excerpt"] == "in time"
    assert [call.key for call in target.calls(user=user)] == [job.id] * 2
    # it serves on
    eventually(lambda: any(_is(victim, worker.id) for worker in site.platform.store.workers()), "it has not come back")
    again = site.user()
    target.answer(again, Answer(after_seconds=0.8))

    def both_run() -> bool:
        ran = site.wait_for_all([site.platform.enqueue("call", user=again).id for _ in range(2)])
        assert {job.state for job in ran} == {JobState.COMPLETED}
        return {_is(victim, job.worker) for job in ran} == {True, False}

    # its slot is free when the stopped process has been replaced
    eventually(both_run, "it takes no jobs any more")


def test_a_worker_that_is_asked_to_stop_finishes_what_it_runs(
    celery_setup: CeleryTestSetup, workers: list[WorkerNode], site: Site, target: Target, user: str
) -> None:
    may_end = threading.Event()
    target.answer(user, Answer(until=may_end))
    job, leaving, other = _run(site, target, user, workers)
    rest = site.user()
    target.answer(rest, Answer(after_seconds=0.1))
    waiting = [site.platform.enqueue("call", user=rest).id for _ in range(6)]
    leaving.kill("SIGTERM")
    eventually(lambda: "Warm shutdown" in leaving.logs(), "it does not shut down")
    later = [site.platform.enqueue("call", user=rest).id for _ in range(3)]
    may_end.set()

    assert leaving.wait() == 0, leaving.logs()
    finished = site.platform.job(job.id)
    assert finished.state is JobState.COMPLETED, site.story(job.id)
    assert _is(leaving, finished.worker)
    assert finished.attempt == 1
    assert not any(_is(leaving, worker.id) for worker in site.platform.store.workers())
    assert leaving.processes() == []
    others = site.wait_for_all([*waiting, *later])
    assert {one.state for one in others} == {JobState.COMPLETED}
    assert all(_is(other, one.worker) for one in others)
    assert len(target.calls(user=user)) == 1
    assert len(target.calls(user=rest)) == 9


@pytest.mark.parametrize(("how", "words"), [("exit", "exitcode 9"), ("segfault", "signal 11"), ("killed", "signal 9")])
def test_a_job_that_takes_its_process_down_becomes_a_poison_pill(
    how: str, words: str, celery_setup: CeleryTestSetup, workers: list[WorkerNode], site: Site, target: Target, user: str
) -> None:
    job = site.platform.enqueue("dying", user=user, params={"how": how})
    beside = site.wait_for_all([site.platform.enqueue("call", user=site.user()).id for _ in range(5)])
    assert {one.state for one in beside} == {JobState.COMPLETED}
    poison = site.wait_for(job.id)
    run = ["queued", "assigned", "running"]
    assert site.states(job.id) == ["pending", *run, "retrying", *run, "retrying", *run, "failed"]
    assert poison.reason.startswith("poison pill: the process that ran it died")
    assert words in poison.reason
    assert poison.reason.endswith("3 losses in all")
    assert len(target.calls(user=user)) == 3
    assert [worker.status for worker in workers] == ["running", "running"]
    after = site.wait_for_all([site.platform.enqueue("call", user=user).id for _ in range(2)])
    assert {one.state for one in after} == {JobState.COMPLETED}


def test_a_run_whose_end_was_not_recorded_is_noticed_by_its_own_worker(
    celery_setup: CeleryTestSetup, workers: list[WorkerNode], site: Site, target: Target, user: str
) -> None:
    """As when Redis was away just when the pool killed the process. Here the record of a run is made that no process has."""
    owner = next(worker.id for worker in site.platform.store.workers() if _is(workers[0], worker.id))
    for worker in workers:
        worker.pause()
    job = site.platform.enqueue("call", user=user)
    assert site.platform.store.start(job.id, delivery=1, worker=owner).go
    for worker in workers:
        worker.resume()
    assert site.wait_for(job.id).state is JobState.COMPLETED
    assert site.states(job.id) == AGAIN, site.story(job.id)
    assert site.changes(job.id)[4].reason == "its run ended without a record; again in 1 s"
    assert len(target.calls(user=user)) == 1
