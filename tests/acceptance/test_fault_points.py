"""A worker is killed at each step of a job: the job completes elsewhere, and its history says what happened."""

from __future__ import annotations

import pytest

from taskplatform.model import JobState
from tests.acceptance.site import HEARTBEAT_TIMEOUT_SECONDS, Site
from tests.acceptance.target import Target
from tests.support import wait_until


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its workers die."""
    return own_site


@pytest.mark.parametrize("point", ["popped", "received", "before:start", "after:start", "before:finish", "after:finish", "before:ack"])
def test_a_worker_is_killed(point: str, site: Site, target: Target, user: str) -> None:
    fault = site.fault(point)
    victim = site.worker("--concurrency", "1", fault=fault)
    victim.ready()
    job = site.platform.enqueue("call", user=user)
    wait_until(lambda: fault.happened, message=f"{point} was not reached")
    victim.wait(5)
    other = site.worker("--concurrency", "1")
    other.ready()
    assert site.wait_for(job.id, seconds=HEARTBEAT_TIMEOUT_SECONDS + 5).state is JobState.COMPLETED
    site.remove(victim, other)
