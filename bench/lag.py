"""From the moment that a job is due to the start of its function, at 100 and at 500 jobs a second.

Jobs for moments spread evenly are submitted ahead, then two workers, which do nothing else, run them. The function itself tells how
long ago it was due.
"""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta
from typing import Any

from bench.processes import Site, site, wait_for
from taskplatform.model import JobState
from taskplatform.platform import JobRequest

RATES = (100, 500)
ROUNDS = 3
POOL, SLOTS, WORKERS = "threads", 4, 2
#: So many jobs a second can be submitted at the least, while others wait.
_SUBMITTED_PER_S = 1000


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1, three rounds of 8 seconds for each rate, after one that warms up."""
    seconds = max(1, round(8 * scale))
    with site() as place:
        place.platform.create_user("u1")
        with place.workers(count=WORKERS, pool=POOL, slots=SLOTS):
            _lags(place, rate=RATES[0], seconds=1)
            rounds = {rate: [_lags(place, rate=rate, seconds=seconds) for _ in range(ROUNDS)] for rate in RATES}
    return {
        **{str(rate): _figures(lags) for rate, lags in rounds.items()},
        "rounds": ROUNDS,
        "seconds_a_round": seconds,
        "workers": f"{WORKERS} × {SLOTS} {POOL}",
    }


def _lags(place: Site, *, rate: int, seconds: int) -> list[float]:
    """Of each job, in ms."""
    count = rate * seconds
    completed = place.platform.store.counts()[JobState.COMPLETED]
    first = datetime.now(UTC) + timedelta(seconds=1 + count / _SUBMITTED_PER_S)
    requests = (JobRequest(definition="lag", user="u1", eta=first + timedelta(seconds=number / rate)) for number in range(count))
    jobs = place.platform.enqueue_many(requests)
    late = datetime.now(UTC) - first
    assert late < timedelta(), f"submitting {count} jobs took {late} too long"
    wait_for(lambda: place.platform.store.counts()[JobState.COMPLETED] - completed == count, seconds=120, what="the jobs", every=0.5)
    return [float(place.platform.history(job.id)[-1].detail["excerpt"]) for job in jobs]


def _figures(rounds: list[list[float]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for percent in (50, 99):
        values = [round(statistics.quantiles(lags, n=100, method="inclusive")[percent - 1], 1) for lags in rounds]
        figures[f"p{percent}_ms"] = statistics.median(values)
        figures[f"p{percent}_ms_min_max"] = [min(values), max(values)]
    figures["max_ms"] = round(max(max(lags) for lags in rounds), 1)
    return figures
