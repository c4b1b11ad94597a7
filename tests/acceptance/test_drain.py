"""A worker that is drained takes nothing new and goes on with what it has; resumed, it works as before."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from taskplatform.model import JobState
from taskplatform.store import Worker
from tests.acceptance.site import Site, eventually


@pytest.fixture
def site(calm_site: Site) -> Site:
    """All workers of these tests are their own."""
    return calm_site


def only_worker(site: Site) -> Worker:
    (found,) = site.platform.workers()
    return found


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_drained_worker_takes_nothing_until_it_is_resumed(site: Site, pool: str) -> None:
    node = site.worker("--concurrency", "2", "--pool", pool)
    node.ready()
    eventually(lambda: bool(site.platform.workers()), "it does not say that it lives")
    worker = only_worker(site).id
    user = site.user()
    runs = site.platform.enqueue("sleeping", user=user, params={"seconds": 2})
    site.wait_for(runs.id, JobState.RUNNING)
    assert site.platform.drain_worker(worker)
    assert not site.platform.drain_worker(worker)
    # the broker has what somebody pushed there, as another worker's share; it is not taken
    eventually(lambda: "takes nothing new" in node.logs(), "it was not told")
    eventually(lambda: "Canceling queue low" in node.logs(), "its loop did not hear of it")
    waits = [site.platform.enqueue("returning", user=user).id for _ in range(3)]
    assert site.wait_for(runs.id).state is JobState.COMPLETED, "what it had goes on"
    assert {site.platform.job(job_id).state for job_id in waits} == {JobState.PENDING}
    assert (only_worker(site).drained, only_worker(site).slots) == (True, 0)
    # it forgets it neither with its connection nor with what Redis knows of it
    seen = only_worker(site).heartbeat_ms
    site.redis.delete(f"tp:worker:{worker}")
    for connection in site.redis.client_list():
        if "BRPOP" in connection["cmd"].upper():
            with suppress(Exception):
                site.redis.client_kill(connection["addr"])
    eventually(lambda: only_worker(site).heartbeat_ms > seen and only_worker(site).drained, "it forgot that it is drained")
    assert {site.platform.job(job_id).state for job_id in waits} == {JobState.PENDING}
    assert site.platform.resume_worker(worker)
    assert {job.state for job in site.wait_for_all(waits)} == {JobState.COMPLETED}
    assert {job.worker for job in site.wait_for_all(waits)} == {worker}
    assert [line for line in node.logs().splitlines() if "Traceback" in line] == []
    site.remove(node)
    for name in [one.id for one in site.platform.workers()]:
        site.platform.store.leave(name)


def test_a_drained_worker_can_be_stopped(site: Site) -> None:
    node = site.worker("--concurrency", "1")
    node.ready()
    eventually(lambda: bool(site.platform.workers()), "it does not say that it lives")
    assert site.platform.drain_worker(only_worker(site).id)
    eventually(lambda: "takes nothing new" in node.logs(), "it was not told")
    os.kill(int(only_worker(site).info["pid"]), signal.SIGTERM)
    eventually(lambda: not site.platform.workers(), "it has not left")
    site.remove(node)
