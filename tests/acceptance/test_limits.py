"""A rate limit as the target sees it, while workers stand still and the server restarts."""

from __future__ import annotations

import pytest

from taskplatform.model import JobState
from taskplatform.platform import JobRequest
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site
from tests.acceptance.target import Target
from tests.support import wait_until

PER_SECOND, BURST = 20, 10
JOBS = 130


@pytest.fixture
def site(own_site: Site) -> Site:
    """No other worker must take what this module's own ones do."""
    return own_site


@pytest.fixture(scope="module")
def workers(own_site: Site) -> list[WorkerNode]:
    started = [own_site.worker("--concurrency", "3") for _ in range(2)]
    for worker in started:
        worker.ready()
    return started


def _submit(site: Site, user: str) -> list[str]:
    site.platform.set_limit("definition:call", f"{PER_SECOND}/s", burst=BURST)
    return [job.id for job in site.platform.enqueue_many(JobRequest(definition="call", user=user) for _ in range(JOBS))]


def _check(site: Site, target: Target, user: str, jobs: list[str]) -> None:
    """That all completed, and no window of calls, from any one to any later one, holds more than rate × t + burst."""
    assert {job.state for job in site.wait_for_all(jobs)} == {JobState.COMPLETED}
    times = sorted(call.at_seconds for call in target.calls(user=user))
    assert len(times) >= JOBS
    for first, began in enumerate(times):
        for last in range(first, len(times)):
            span = times[last] - began
            assert last - first + 1 <= PER_SECOND * span + BURST, f"{last - first + 1} calls in {span:.3f} s"


def _wait_for_calls(target: Target, user: str, count: int) -> None:
    wait_until(lambda: len(target.calls(user=user)) >= count, message=f"the target has not got {count} calls")


def test_a_worker_that_stood_still_makes_no_late_burst(site: Site, target: Target, user: str, workers: list[WorkerNode]) -> None:
    """What it had begun to start is given back, or asks again."""
    jobs = _submit(site, user)
    _wait_for_calls(target, user, 40)
    workers[0].pause()
    # longer than a heartbeat may be missing: its jobs go to the other worker
    known = len(target.calls(user=user))
    _wait_for_calls(target, user, min(JOBS - 20, known + 50))
    workers[0].resume()
    _check(site, target, user, jobs)


@pytest.mark.usefixtures("workers")
def test_a_server_that_restarts_makes_no_burst(site: Site, target: Target, user: str) -> None:
    """It is killed: it may have forgotten the last starts."""
    jobs = _submit(site, user)
    _wait_for_calls(target, user, 40)
    site.server.kill("SIGKILL")
    site.server.restart()
    _check(site, target, user, jobs)
