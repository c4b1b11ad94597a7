"""Whether a limit holds at the target, over two workers, while ten times more is due than may go; and whether it is used up.

First 10 a second with a burst of 15, then 200 a second with a burst of 50. The target, a process of its own, notes when each
request arrives. The excess is taken over all windows: for every two arrivals, the requests from the one to the other, both counted, less
what the limit allows in that time, rate × time + burst. The ratio counts the requests beyond the burst against rate × time, from the first
arrival to the last.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

import redis

from bench.processes import DEFINITIONS, Site, site, target, wait_for
from taskplatform.model import JobState
from taskplatform.platform import JobRequest
from taskplatform.store import connect

ROUNDS = 3
POOL, SLOTS, WORKERS = "threads", 8, 2
#: A difference this small is that of floating-point numbers.
TOLERANCE = 1e-6
_CHUNK = 2000


@dataclass(frozen=True)
class _Limit:
    """As in definitions/limited/limited.yaml."""

    definition: str
    path: str
    per_second: float
    burst: int


LIMITS = {"10/s": _Limit("limited_to_10", "/10", 10, 15), "200/s": _Limit("limited_to_200", "/200", 200, 50)}


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1, three rounds of 9 seconds for each limit, each round from a full burst on."""
    seconds = max(2.0, 9 * scale)
    with target() as url, site(DEFINITIONS / "limited", BENCH_TARGET=url) as place:
        place.platform.create_user("u1")
        with place.workers(count=WORKERS, pool=POOL, slots=SLOTS):
            _warm_up(place)
            measured = {name: _measure(place, url, limit, seconds) for name, limit in LIMITS.items()}
    ratios = {name: statistics.median(figures["ratios"]) for name, figures in measured.items()}
    excess = {name: figures["excess"] for name, figures in measured.items()}
    calls = {name: figures["calls_per_job"] for name, figures in measured.items()}
    return {
        # of the two limits, the one that is worse
        "achieved_ratio": max(ratios.values(), key=lambda ratio: abs(ratio - 0.99)),
        "worst_window_excess": max(excess.values()),
        "redis_calls_per_job": max(calls.values()),
        "achieved_ratio_by_limit": ratios,
        "achieved_ratio_min_max": {name: [min(figures["ratios"]), max(figures["ratios"])] for name, figures in measured.items()},
        "worst_window_excess_by_limit": excess,
        "redis_calls_per_job_by_limit": calls,
        "requests": {name: figures["requests"] for name, figures in measured.items()},
        "rounds": ROUNDS,
        "seconds_a_round": seconds,
        "workers": f"{WORKERS} × {SLOTS} {POOL}",
    }


def _warm_up(place: Site) -> None:
    """Calls without a limit, so that no slot of a worker makes its first one while the limits are measured."""
    place.platform.enqueue_many(JobRequest(definition="unlimited", user="u1") for _ in range(20 * WORKERS * SLOTS))
    wait_for(lambda: place.platform.store.counts()[JobState.COMPLETED] == 20 * WORKERS * SLOTS, seconds=60, what="the first calls")


def _measure(place: Site, url: str, limit: _Limit, seconds: float) -> dict[str, Any]:
    platform, store = place.platform, place.platform.store
    client = connect(platform.settings.redis_url)
    platform.pause_definition(limit.definition)
    due = round(10 * ROUNDS * (limit.burst + limit.per_second * seconds))
    for start in range(0, due, _CHUNK):
        platform.enqueue_many(JobRequest(definition=limit.definition, user="u1") for _ in range(min(_CHUNK, due - start)))
    rounds: list[list[float]] = []
    calls = 0
    for _ in range(ROUNDS):
        # long enough for a full burst
        time.sleep(limit.burst / limit.per_second + 0.5)
        before, calls_before = len(_arrivals(url, limit)), _calls(client)
        platform.resume_definition(limit.definition)
        time.sleep(seconds)
        platform.pause_definition(limit.definition)
        wait_for(lambda: not any(store.queued().values()) and not store.running(), seconds=30, what="the released jobs")
        calls += _calls(client) - calls_before
        rounds.append(_arrivals(url, limit)[before:])
    client.close()
    arrivals = [at for one in rounds for at in one]
    assert store.counts()[JobState.PENDING] > len(arrivals), "there was no more due than could go"
    return {
        "excess": round(worst_window_excess(arrivals, limit.per_second, limit.burst), 6),
        "ratios": [round((len(one) - limit.burst) / (limit.per_second * (one[-1] - one[0])), 4) for one in rounds],
        "calls_per_job": round(calls / len(arrivals), 2),
        "requests": len(arrivals),
    }


def worst_window_excess(arrivals: list[float], per_second: float, burst: int) -> float:
    """By how many requests the worst window is over the limit; `arrivals` in seconds, in ascending order.

    For arrivals i ≤ j it is (j - i + 1) - (rate × (t_j - t_i) + burst), so the worst i for a j is the one of the least i - rate × t_i.
    """
    worst, least = 0.0, math.inf
    for number, at in enumerate(arrivals):
        ahead = number - per_second * (at - arrivals[0])
        least = min(least, ahead)
        worst = max(worst, ahead - least + 1 - burst)
    return worst if worst > TOLERANCE else 0.0


def _arrivals(url: str, limit: _Limit) -> list[float]:
    with urllib.request.urlopen(f"{url}/arrivals") as answer:
        arrivals: dict[str, list[float]] = json.load(answer)
    return sorted(arrivals.get(limit.path, []))


def _calls(client: redis.Redis) -> int:
    """Round trips to the server so far: what it read from its clients, where a pipeline is one and what a script calls is none."""
    return int(client.info("stats")["total_reads_processed"])
