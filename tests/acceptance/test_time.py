"""Nothing is early, and what is not due waits in the platform's own set, not in the broker and not in a worker."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from pytest_celery import CeleryTestSetup

from taskplatform.model import JobState, Priority
from taskplatform.platform import JobRequest
from tests.acceptance.site import Site
from tests.acceptance.target import Target


def test_no_job_arrives_before_its_time(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    now = datetime.now(UTC)
    by_countdown = [JobRequest(definition="call", user=user, countdown=0.4 + number * 0.137) for number in range(12)]
    by_eta = [JobRequest(definition="call", user=user, eta=now + timedelta(seconds=0.7 + number * 0.211)) for number in range(8)]
    jobs = site.platform.enqueue_many([*by_countdown, *by_eta])
    celerys = [site.app.tasks["call"].apply_async(kwargs={"user": user}, countdown=1.5), site.app.tasks["call"].delay(user=user)]
    ids = [job.id for job in jobs] + [result.id for result in celerys]
    finished = site.wait_for_all(ids)

    assert {job.state for job in finished} == {JobState.COMPLETED}
    arrived = {call.job: call.at_ms for call in target.calls(user=user)}
    assert arrived.keys() == set(ids)
    lags = [arrived[job.id] - job.execute_after_ms for job in finished]
    assert min(lags) >= 0
    # how soon after it the bench measures; here, that it is no matter of a slow poll or of a recovery
    assert sorted(lags)[len(lags) // 2] < 10_000
    for request, job in zip(by_eta, finished[12:], strict=False):
        assert request.eta is not None
        assert job.execute_after_ms == int(request.eta.timestamp() * 1000)
    for job in finished:
        changes = site.changes(job.id)
        assert [line.to_state for line in changes] == ["pending", "queued", "assigned", "running", "completed"]
        assert changes[1].at_ms >= job.execute_after_ms, "it was in the broker before its time"


def test_a_future_job_is_in_no_queue_and_in_no_worker(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    jobs = site.platform.enqueue_many(JobRequest(definition="call", user=user, countdown=3600, priority=priority) for priority in Priority)
    delayed = site.app.tasks["call"].apply_async(kwargs={"user": user}, countdown=1800)
    # what is due goes through, and shows that release and worker are at work meanwhile
    site.wait_for(site.platform.enqueue("call", user=user).id)
    time.sleep(0.6)  # more than the longest sleep of the release loop: what must not happen would have happened

    assert [site.redis.llen(queue) for queue in ("high", "medium", "low")] == [0, 0, 0]
    node = celery_setup.worker.hostname()
    seen = site.app.control.inspect([node], timeout=60, limit=1)
    assert seen.scheduled() == {node: []}
    assert seen.reserved() == {node: []}
    for job_id in (*(job.id for job in jobs), delayed.id):
        assert site.states(job_id) == ["pending"]
        site.platform.cancel(job_id)
    assert len(target.calls(user=user)) == 1
