"""High jobs that come while a long backlog of low ones is being worked off: how long they wait, and whether a low one went before them.

A low job breaks the order if it was released, by its history, after a high one was due and before that high one was released.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.processes import Site, site, wait_for
from taskplatform.model import Job, JobState, Priority
from taskplatform.platform import JobRequest

ROUNDS = 3
HIGH = 100
POOL, SLOTS, WORKERS = "prefork", 2, 2
_CHUNK = 2000


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1, a backlog of 100,000 low jobs, and three times 100 high ones."""
    backlog = max(2000, int(100_000 * scale))
    with site() as place:
        place.platform.create_user("u1")
        low = [job for start in range(0, backlog, _CHUNK) for job in _submit(place, "low", min(_CHUNK, backlog - start))]
        with place.workers(count=WORKERS, pool=POOL, slots=SLOTS):
            rounds = [_high(place, number) for number in range(ROUNDS + 1)][1:]  # the first warms up
        high = [job for jobs in rounds for job in jobs]
        spans = list(zip((job.execute_after_ms for job in high), _releases(place, high), strict=True))
        low_released = _releases(place, low)
        violations = sum(any(due < at < released for due, released in spans) for at in low_released)
    waits = [[(job.started_ms or 0) - job.execute_after_ms for job in jobs] for jobs in rounds]
    p99 = [round(statistics.quantiles(one, n=100, method="inclusive")[98], 1) for one in waits]
    return {
        "backlog": backlog,
        "low_jobs_released": len(low_released),
        "high_jobs": len(high),
        "rounds": ROUNDS,
        "high_wait_p50_ms": statistics.median(statistics.median(one) for one in waits),
        "high_wait_p99_ms": statistics.median(p99),
        "high_wait_p99_ms_min_max": [min(p99), max(p99)],
        "order_violations": violations,
        "workers": f"{WORKERS} × {SLOTS} {POOL}",
    }


def _submit(place: Site, priority: str, count: int) -> list[Job]:
    return place.platform.enqueue_many(JobRequest(definition="noop", user="u1", priority=priority) for _ in range(count))


def _high(place: Site, number: int) -> list[Job]:
    """100 high jobs, one after the other, from when low ones are running until all high ones have ended."""
    store = place.platform.store
    before = store.counts()[JobState.COMPLETED]
    wait_for(lambda: store.counts()[JobState.COMPLETED] > before + 100, seconds=60, what=f"low jobs before round {number}")
    submitted = [place.platform.enqueue("noop", user="u1", priority="high").id for _ in range(HIGH)]
    wait_for(
        lambda: all(job.state is JobState.COMPLETED for job in store.jobs_by_id(submitted)), seconds=60, what="the high jobs", every=0.1
    )
    assert store.waiting()[Priority.LOW], "the low jobs came to their end before the high ones"
    return store.jobs_by_id(submitted)


def _releases(place: Site, jobs: Sequence[Job]) -> list[int]:
    """When each of the jobs that were released was: the first time, in ms since the epoch."""
    store = place.platform.store
    released = [job.id for job in store.jobs_by_id([job.id for job in jobs]) if job.delivery]
    return [next(line.at_ms for line in store.history(job_id) if line.to_state is JobState.QUEUED) for job_id in released]
