"""Workers that end, that come back, and that hang: their jobs run elsewhere, nothing of the old run goes on, and no result of it counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from taskplatform.message import HARD_LIMIT_MARGIN
from taskplatform.model import Job, JobState
from taskplatform.recovery import STUCK_MARGIN
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import HEARTBEAT_TIMEOUT_SECONDS, Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

RUN = ["queued", "assigned", "running"]
AGAIN = ["pending", *RUN, "retrying", *RUN, "completed"]


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its workers suffer."""
    return own_site


@pytest.fixture(scope="module")
def hanging(own_site: Site) -> tuple[WorkerNode, str]:
    """A worker with two threads, of which a function takes one and never gives it back; and the job. That takes a while to be noticed."""
    worker = own_site.worker("--pool", "threads", "--concurrency", "2", "-Q", "medium")
    return worker, own_site.platform.enqueue("hanging_once", user=own_site.user(), priority="medium").id


@pytest.fixture(autouse=True)
def _begun(hanging: tuple[WorkerNode, str]) -> None:
    """From the first test of the module on."""


def _id(site: Site, node: WorkerNode) -> str:
    return next((worker.id for worker in site.platform.store.workers() if worker.id.startswith(f"{node.node}#")), "")


def _on(node: WorkerNode, job: Job) -> bool:
    return job.worker.startswith(f"{node.node}#")


@contextmanager
def _running(site: Site, *nodes: WorkerNode) -> Iterator[None]:
    try:
        for node in nodes:
            node.ready()
        yield
    finally:
        site.remove(*nodes)


def _serve_high(site: Site, node: WorkerNode) -> None:
    (reply,) = site.app.control.add_consumer("high", destination=[node.node], reply=True, timeout=60, limit=1)
    assert "ok" in next(iter(reply.values()))


def _one_on_each(site: Site, target: Target, nodes: list[WorkerNode], submit: Callable[[str], Job]) -> dict[WorkerNode, Job]:
    """A job for each of these workers, which have one slot each and take all that is of high priority; by who runs it."""
    users = [site.user() for _ in nodes]
    jobs = [submit(user) for user in users]
    wait_until(lambda: all(target.calls(user=user) for user in users), message="the jobs do not run")
    found = {next(node for node in nodes if _on(node, job)): job for job in (site.platform.job(job.id) for job in jobs)}
    assert found.keys() == set(nodes)
    return found


def test_pool_processes_end_with_their_worker_and_its_jobs_run_again(site: Site, target: Target) -> None:
    """Only the main processes are killed. One is on the others' machine, so that they see that it has ended; one is not."""
    near, far = site.worker("--concurrency", "1", "-Q", "high"), site.worker("--concurrency", "1", "-Q", "high", machine="far")
    other = site.worker("--concurrency", "2", "-Q", "low")
    before = site.platform.store.counters()
    with _running(site, near, far, other):
        jobs = _one_on_each(
            site, target, [near, far], lambda user: site.platform.enqueue("sleeping", user=user, params={"seconds": 4}, priority="high")
        )
        _serve_high(site, other)
        since_ms = site.platform.store.now_ms()
        for victim in (near, far):
            os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: not near.processes() and not far.processes(), "pool processes outlive their worker", seconds=10)
        ended = {node: site.wait_for_loss(job, since_ms) for node, job in jobs.items()}
    for node, how in ((near, "its process has ended"), (far, f"silent for {HEARTBEAT_TIMEOUT_SECONDS:g}s")):
        job = ended[node]
        assert site.states(job.id) == AGAIN, site.story(job.id)
        assert site.changes(job.id)[4].reason == f"worker {jobs[node].worker} lost: {how}; again in 1 s"
        assert _on(other, job)
        # the second run ends later than the first would have
        assert [call.path for call in target.calls(job=job.id)] == ["/began", "/began", "/ended"], "both runs went on"
    counters = site.platform.store.counters()
    # workers of the tests before are missed meanwhile too
    assert counters["workers_lost"] - before.get("workers_lost", 0) >= 2
    assert counters["jobs_recovered"] - before.get("jobs_recovered", 0) == 2


@pytest.mark.parametrize("how", ["stopped", "cut off"])
def test_a_worker_that_comes_back_stops_what_is_no_longer_its_own(how: str, site: Site, target: Target) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(site.server.port))
        processes = site.worker("--concurrency", "1", "-Q", "high", machine="a", proxy=proxy)
        threads = site.worker("--pool", "threads", "--concurrency", "1", "-Q", "high", machine="b", proxy=proxy)
        other = site.worker("--concurrency", "2", "-Q", "low")
        stack.enter_context(_running(site, processes, threads, other))
        victims = [processes, threads]

        def hang(user: str) -> Job:
            target.answer(user, Answer(hang=True), Answer(200))
            return site.platform.enqueue("call", user=user, priority="high")

        jobs = _one_on_each(site, target, victims, hang)
        _serve_high(site, other)
        before = site.platform.store.counters().get("discarded", 0)
        since_ms = site.platform.store.now_ms()
        if how == "stopped":
            for victim in victims:
                victim.pause()
        else:
            proxy.freeze()
        for job in jobs.values():
            finished = site.wait_for_loss(job, since_ms)
            assert _on(other, finished)
            assert site.notes(job.id) == []
        if how == "stopped":
            for victim in victims:
                victim.resume()
        else:
            proxy.heal()
        eventually(lambda: all(site.notes(job.id) for job in jobs.values()), "nothing is said of the old runs")
        for job in jobs.values():
            assert site.notes(job.id) == [f"discarded delivery 1: stopped, because worker {job.worker} had been declared lost"]
            assert site.states(job.id) == AGAIN, site.story(job.id)
            assert len(target.calls(job=job.id)) == 2
        assert site.platform.store.counters()["discarded"] == before + 2
        # both serve on, with all their slots
        eventually(lambda: {_id(site, node) for node in victims} == {job.worker for job in jobs.values()}, "they have not come back")
        user = site.user()
        with target.together(user, 4):
            submitted = [site.platform.enqueue("call", user=user, priority="high").id for _ in range(4)]
        ran = site.wait_for_all(submitted)
        assert {node for node in victims for job in ran if _on(node, job)} == set(victims)


def test_a_function_that_hangs_in_a_thread_is_found(site: Site, target: Target, hanging: tuple[WorkerNode, str]) -> None:
    worker, job_id = hanging
    limit = 1 + HARD_LIMIT_MARGIN.total_seconds()
    job = site.wait_for(job_id, seconds=limit + STUCK_MARGIN.total_seconds() + 60)
    assert site.states(job_id) == AGAIN, site.story(job_id)
    what = f"stuck: ran longer than its time limit of {limit:g}s"
    assert site.changes(job_id)[4].reason == f"{what}; again in 1 s"
    assert site.platform.store.counters()["stuck"] == 1
    note = f"this worker's pool cannot stop it: its result will be discarded, because it was {what}"
    eventually(lambda: note in site.notes(job_id), "the history does not say what becomes of it")
    # what it holds is not offered any more; the other slot is
    eventually(lambda: [one.slots for one in site.platform.store.workers() if one.id == job.worker] == [1], "its slot is offered")
    after = [site.platform.enqueue("call", user=site.user(), priority="medium").id for _ in range(3)]
    assert {one.state for one in site.wait_for_all(after)} == {JobState.COMPLETED}
    assert [call.path for call in target.calls(job=job_id)] == ["/began", "/began", "/ended"]
    assert worker.status == "running"
