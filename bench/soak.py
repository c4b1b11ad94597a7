"""A steady load for a long time: whether memory, the number of keys and the lag stay as they are.

`python -m bench soak --minutes 30`. A short calibration finds how many calls a second two workers can make. Then 60 % of that run all the
time, half of them planned and half submitted, and what has finished is kept for a minute, so that a steady state is reached within a few
minutes. Every few seconds all processes are looked at (proportional memory), Redis (memory, keys, and how much lies in each
collection), and how late jobs start.

At the end a line is fitted through the second half of each series, by means over whole minutes, because the sweep comes once a minute.
Its growth is what the line climbs in that half. Up to 2 % of the mean is flat, or, for what is small, a number below which there is
nothing to see: 1 MB of memory, 100 members of a collection, 10 ms of lag. In 15 minutes at 200 jobs a second 1 MB is 6 bytes a job, less
than the shortest entry that anything could leave behind. Under three whole minutes in the second half there is no verdict.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bench.memory import pss_kb, tree
from bench.population import create_users, subscribe_all
from bench.processes import ROOT, Site, site, target, wait_for
from taskplatform.errors import NotFound
from taskplatform.model import JobState
from taskplatform.platform import JobRequest
from taskplatform.store import connect
from taskplatform.store.keys import NAMES

DEFINITIONS = ROOT / "bench" / "soak_definitions"
WORKERS, POOL, SLOTS = 2, "prefork", 3
LOAD = 0.6
RETENTION = "60s"
CALIBRATION_JOBS = 1500
SAMPLE_SECONDS = 5.0
PROBES = 10
MOST_PERCENT = 2.0
#: By the end of a series' name, how much growth there is nothing to see in.
NOTHING = {"_mb": 1.0, "_ms": 10.0, "": 100.0}


@dataclass(frozen=True)
class Trend:
    """A series over the second half."""

    name: str
    mean: float
    growth: float
    """What the fitted line climbs."""
    minutes: int
    """How many whole minutes it was fitted through."""

    @property
    def percent(self) -> float:
        return 100 * self.growth / self.mean if self.mean else 0.0

    @property
    def verdict(self) -> str:
        """`flat`, `grows`, or nothing where the run was too short to say."""
        if self.minutes < 3:
            return ""
        small = next(least for ending, least in NOTHING.items() if self.name.endswith(ending))
        return "grows" if self.growth > max(small, self.mean * MOST_PERCENT / 100) else "flat"


def trend(name: str, samples: Sequence[tuple[float, float]]) -> Trend:
    """Of (seconds, value) from the beginning of the run on."""
    half = samples[-1][0] / 2
    by_minute: defaultdict[int, list[float]] = defaultdict(list)
    for at, value in samples:
        if at >= half:
            by_minute[int((at - half) // 60)].append(value)
    whole = [statistics.fmean(by_minute[minute]) for minute in range(int(half // 60))]
    if len(whole) < 2:
        values = [value for at, value in samples if at >= half]
        return Trend(name, statistics.fmean(values), values[-1] - values[0], len(whole))
    slope = statistics.linear_regression(range(len(whole)), whole).slope
    return Trend(name, statistics.fmean(whole), slope * (len(whole) - 1), len(whole))


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 1 if something grows."""
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long; default 30")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    given = parser.parse_args(arguments)
    result = run(given.minutes, say=lambda text: print(text, file=sys.stderr, flush=True))
    trends: list[Trend] = result.pop("trends")
    print(table(trends))
    print(" ".join(f"{name}={value}" for name, value in result.items()))
    if given.json:
        shown = {one.name: {"mean": round(one.mean, 2), "growth": round(one.growth, 3), "verdict": one.verdict} for one in trends}
        print(json.dumps({**result, "trends": shown}))
    return int(any(one.verdict == "grows" for one in trends))


def table(trends: Sequence[Trend]) -> str:
    """One line for each series that is not empty."""
    rows = [("in the second half", "mean", "growth", "%", "")]
    rows += [(one.name, f"{one.mean:,.1f}", f"{one.growth:+,.2f}", f"{one.percent:+.2f}", one.verdict) for one in trends if one.mean]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in range(1, 5))]).rstrip() for row in rows)


def run(minutes: float, *, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The figures, and the trends of all series."""
    with (
        target() as url,
        site(DEFINITIONS, BENCH_TARGET=url, TASKPLATFORM_RETENTION=RETENTION, TASKPLATFORM_CHANGE_LOG_SIZE="100") as place,
        place.workers(count=WORKERS, pool=POOL, slots=SLOTS) as workers,
        place.beat() as beat,
    ):
        place.platform.create_users(f"user{number}" for number in range(100))
        capacity = _calibrate(place)
        per_second = LOAD * capacity
        say(f"capacity {capacity:.0f}/s, so {per_second:.0f}/s for {minutes:g} minutes")
        _subscribe(place, round(per_second / 2 * 60))
        before = place.platform.store.counts()[JobState.COMPLETED]
        load = _Submitter(place, per_second / 2)
        began = time.monotonic()
        roles = {"beat": beat, **{f"worker{number + 1}": pid for number, pid in enumerate(workers)}}
        series = _watch(place, roles, 60 * minutes, say)
        load.stop()
        seconds = time.monotonic() - began
        done = place.platform.store.counts()[JobState.COMPLETED] - before
        counts = place.platform.store.counts()
    return {
        "capacity_per_s": round(capacity),
        "load_per_s": round(per_second),
        "completed_per_s": round(done / seconds, 1),
        "jobs": done,
        "minutes": round(seconds / 60, 1),
        "not_completed": sum(counts[state] for state in (JobState.FAILED, JobState.TIMED_OUT, JobState.REJECTED, JobState.CANCELED)),
        "trends": [trend(name, samples) for name, samples in series.items()],
    }


def _calibrate(place: Site) -> float:
    """Calls a second, from the tenth part of a backlog to its end; the second of two."""
    store = place.platform.store
    rate = 0.0
    for _ in range(2):
        before = store.counts()[JobState.COMPLETED]
        place.platform.enqueue_many(JobRequest(definition="submitted", user="user0") for _ in range(CALIBRATION_JOBS))

        def done(before: int = before) -> int:
            return store.counts()[JobState.COMPLETED] - before

        wait_for(lambda: done() >= CALIBRATION_JOBS // 10, seconds=120, what="the first calls")
        began, first = time.perf_counter(), done()
        wait_for(lambda: done() >= CALIBRATION_JOBS, seconds=300, what="the calls")
        rate = (CALIBRATION_JOBS - first) / (time.perf_counter() - began)
    return rate


def _subscribe(place: Site, subscribers: int) -> None:
    create_users(place.platform.store, subscribers)
    subscribe_all(place.platform.store, subscribers, ["planned"])


class _Submitter:
    """Submits so many jobs a second, until `stop`."""

    EVERY_SECONDS = 0.1

    def __init__(self, place: Site, per_second: float) -> None:
        self._platform = place.platform
        self._per_second = per_second
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="submitter")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        began, submitted = time.monotonic(), 0
        while not self._stopped.wait(self.EVERY_SECONDS):
            wanted = round((time.monotonic() - began) * self._per_second)
            if wanted > submitted:
                self._platform.enqueue_many(
                    JobRequest(definition="submitted", user=f"user{number % 100}") for number in range(submitted, wanted)
                )
                submitted = wanted


def _watch(place: Site, roles: Mapping[str, int], seconds: float, say: Callable[[str], None]) -> dict[str, list[tuple[float, float]]]:
    """A sample of everything every few seconds."""
    series: dict[str, list[tuple[float, float]]] = {}
    client = connect(place.platform.settings.redis_url)
    began = time.monotonic()
    probes: list[str] = []
    while (at := time.monotonic() - began) < seconds:
        sample = {**_memory(roles), **_redis(client), **_lag(place, probes)}
        for name in sample.keys() - series.keys():
            # it was not there before
            series[name] = [(earlier, 0.0) for earlier, _ in next(iter(series.values()), [])]
        for name, values in series.items():
            value = sample.get(name, values[-1][1] if name.endswith("_ms") and values else 0.0)
            values.append((at, value))
        probes[:] = [
            job.id for job in place.platform.enqueue_many(JobRequest(definition="lag", user="user0", countdown=0.2) for _ in range(PROBES))
        ]
        if len(series["redis_used_mb"]) % 12 == 0:
            say(f"{at:6.0f} s  redis {sample['redis_used_mb']:.1f} MB, {sample['keys']:.0f} keys, beat {sample['beat_mb']:.1f} MB")
        time.sleep(max(0.0, SAMPLE_SECONDS - (time.monotonic() - began - at)))
    client.close()
    return dict(sorted(series.items()))


def _memory(roles: Mapping[str, int]) -> dict[str, float]:
    """The main process of each role, and all below it together."""
    found = {}
    for role, pid in roles.items():
        main, *pool = tree(pid)
        found[f"{role}_mb"] = pss_kb(main) / 1024
        if pool:
            found[f"{role}_pool_mb"] = sum(map(pss_kb, pool)) / 1024
    return found


def _redis(client: Any) -> dict[str, float]:
    """Its memory, how many keys there are, and how many members lie under each name of the store."""
    memory = client.info("memory")
    found = {"redis_used_mb": memory["used_memory"] / 2**20, "redis_rss_mb": memory["used_memory_rss"] / 2**20, "keys": client.dbsize()}
    for name, count in _members(client).items():
        found[f"in {name}"] = count
    return found


def _members(client: Any) -> dict[str, int]:
    """How much lies under each name: keys where each job has one, else the members of all its keys."""
    prefixes = sorted(((f"tp:{part}", name) for name, part in NAMES.items()), key=lambda one: -len(one[0]))
    count: defaultdict[str, int] = defaultdict(int)
    names: list[tuple[str, str]] = []
    for key in client.scan_iter(count=1000):
        name = next((name for prefix, name in prefixes if key == prefix or (prefix.endswith(":") and key.startswith(prefix))), "others")
        if name in ("job", "history", "user"):
            count[name] += 1
        else:
            names.append((key, name))
    pipe = client.pipeline(transaction=False)
    for key, _ in names:
        pipe.type(key)
    kinds = pipe.execute()
    sizes = {"zset": pipe.zcard, "set": pipe.scard, "hash": pipe.hlen, "list": pipe.llen, "stream": pipe.xlen}
    for (key, _), kind in zip(names, kinds, strict=True):
        sizes.get(kind, pipe.exists)(key)
    for (_, name), size in zip(names, pipe.execute(), strict=True):
        count[name] += size
    return count


def _lag(place: Site, probes: Sequence[str]) -> dict[str, float]:
    """Of the probes of the last sample, by what their functions said."""
    lags = []
    for job_id in probes:
        with suppress(NotFound):
            last = place.platform.history(job_id)[-1]
            if last.to_state is JobState.COMPLETED:
                lags.append(float(last.detail["excerpt"]))
    return {"lag_ms": statistics.median(lags)} if lags else {}
