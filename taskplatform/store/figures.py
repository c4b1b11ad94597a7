"""What metrics are made of, as it is read from Redis in one go: `Store.figures`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import redis

from taskplatform.model import Job, JobState, Priority
from taskplatform.store.keys import BOUNDS_MS
from taskplatform.store.records import Beat, Breaker, LimitState, Worker, batches, read_beat, read_counts, read_worker

Place = tuple[str, Priority]
"""A definition, and the priority of some of its jobs."""

#: How lib.lua says that a lane is blocked until its host lets it go, or its definition is resumed.
_GATED, _PAUSED = 9e15, math.inf


@dataclass(frozen=True, slots=True)
class Histogram:
    """Spans, by how long they were."""

    upto: tuple[int, ...]
    """How many were not longer than each of `BOUNDS_MS`."""
    total: int
    sum_ms: int


@dataclass(frozen=True, slots=True)
class DefinitionCounts:
    """What ever happened to a definition's jobs, as far as it was counted."""

    ended: Mapping[tuple[Priority, JobState], int]
    retried: Mapping[Priority, int]
    """Attempts that failed and are followed by another."""
    late: int
    """Runs that a time limit ended, whether they are followed by another or not."""
    lost: int
    """Runs whose process or worker died, or that were stuck."""
    runs: Histogram
    """Runs that were recorded as ended, by the time from the record of their start to that of their end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The platform in numbers."""

    now_ms: int
    planner: Mapping[str, str]
    oldest_due_ms: int | None
    """When the planner should have looked at the first thing that it has to; it may be in the future."""
    entered: Mapping[JobState, int]
    """How many jobs ever entered each state."""
    counters: Mapping[str, int]
    dead_letters: int
    running: Mapping[str, int]
    """By definition."""
    queued: Mapping[Priority, int]
    """By the priority of the queue."""
    waiting: Mapping[Place, int]
    """Without those that are held for a paused user, or set aside for a user's cap."""
    due: Mapping[Place, int]
    """Of these, those that may start by their time."""
    oldest_ms: Mapping[Place, int]
    """When the first of these is due; it may be in the future. With fairness, the first to have its turn."""
    paused: frozenset[str]
    definitions: tuple[str, ...]
    """Those that are published."""
    lags: Mapping[Priority, Histogram]
    """How long after they were due jobs started."""
    counts: Mapping[str, DefinitionCounts]
    workers: tuple[Worker, ...]
    """Without what they run."""
    running_on: Mapping[str, int]
    beats: tuple[Beat, ...]
    limits: tuple[LimitState, ...]
    """Without those of single users."""
    held_by: Mapping[str, int]
    """By limit, how many jobs are due and wait because of it."""
    capped_users: int
    """Users with jobs that are set aside, because as many of theirs are in flight as may be."""
    users: int
    breakers: tuple[Breaker, ...]
    """Of the hosts that are held back, and that published definitions call."""
    own_priorities: Mapping[str, Priority]
    """By definition, that of its jobs unless they are given another."""


def read_figures(
    client: redis.Redis,
    key: Callable[..., str],
    now_ms: int,
    limits: Sequence[LimitState],
    jobs_by_id: Callable[[Sequence[str]], Iterable[Job]],
    breakers: Callable[[Iterable[str]], Iterable[Breaker]],
) -> Figures:
    """Ask for all of it but the limits, which are those that are not of single users. `breakers` gives those of hosts."""
    pipe = client.pipeline(transaction=False)
    pipe.hgetall(key("planner"))
    pipe.zrange(key("due"), "(0", "+inf", byscore=True, withscores=True, offset=0, num=1)
    pipe.hgetall(key("counts"))
    pipe.hgetall(key("counters"))
    pipe.zcard(key("dead"))
    pipe.zrange(key("active"), 0, -1)
    pipe.zrange(key("workers"), 0, -1, withscores=True)
    pipe.hgetall(key("beats"))
    pipe.scard(key("capped_users"))
    pipe.smembers(key("definitions"))
    pipe.zcard(key("users"))
    for priority in Priority:
        pipe.zcard(key("queued", priority))
        pipe.hgetall(key("lags", priority))
        pipe.zrange(key("ready", priority), 0, -1)
        pipe.zrange(key("blocked", priority), 0, -1, withscores=True)
        pipe.zrange(key("turns", priority), 0, -1)
    planner, due, counts, counters, dead, active, heartbeats, beats, capped, known, users, *rest = pipe.execute()
    of_priority = dict(zip(Priority, batches(rest, 5), strict=True))
    definitions = sorted(known)
    blocked = {(definition, priority): until for priority, (_, _, _, rows, _) in of_priority.items() for definition, until in rows}
    lanes = sorted(
        {(definition, priority) for priority, (_, _, ready, _, turns) in of_priority.items() for definition in (*ready, *turns)}
        | blocked.keys()
    )
    for definition, priority in lanes:
        lane, turn = key("lane", f"{priority}:{definition}"), key("turn", f"{priority}:{definition}")
        pipe.zcard(lane)
        pipe.zcount(lane, "-inf", now_ms)
        pipe.zrange(lane, 0, 0, withscores=True)
        pipe.zcard(turn)
        pipe.zrange(turn, 0, 0)
    of_lanes = dict(zip(lanes, batches(pipe.execute(), 5), strict=True))
    for definition in definitions:
        pipe.hmget(key("definition", definition), "paused", "host", "priority")
        pipe.hgetall(key("stats", definition))
    for worker, _ in heartbeats:
        pipe.hgetall(key("worker", worker))
        pipe.scard(key("worker_jobs", worker))
    answers = pipe.execute()
    of_definitions = dict(zip(definitions, batches(answers[: 2 * len(definitions)], 2), strict=True))
    of_workers = list(zip(heartbeats, batches(answers[2 * len(definitions) :], 2), strict=True))
    # with fairness a place is no time
    heads = {turns[0][12:]: place for place, (_, _, _, _, turns) in of_lanes.items() if turns}
    oldest = {place: int(head[0][1]) for place, (_, _, head, _, _) in of_lanes.items() if head}
    for job in jobs_by_id(list(heads)):
        place = heads[job.id]
        oldest[place] = min(job.execute_after_ms, oldest.get(place, job.execute_after_ms))
    due_jobs = {place: lane_due + turns for place, (_, lane_due, _, turns, _) in of_lanes.items() if lane_due + turns}
    hosts = {definition: host or "" for definition, ((_, host, _), _) in of_definitions.items()}
    return Figures(
        now_ms=now_ms,
        planner=planner,
        oldest_due_ms=int(due[0][1]) if due else None,
        entered=read_counts(counts),
        counters={name: int(times) for name, times in counters.items() if name},
        dead_letters=dead,
        running=Counter(job_id.partition(":")[0] for job_id in active),
        queued={priority: rows[0] for priority, rows in of_priority.items()},
        waiting={place: total + turns for place, (total, _, _, turns, _) in of_lanes.items() if total + turns},
        due=due_jobs,
        oldest_ms=oldest,
        paused=frozenset(definition for definition, ((why, _, _), _) in of_definitions.items() if why),
        definitions=tuple(definitions),
        lags={priority: _read_lags(rows[1]) for priority, rows in of_priority.items()},
        counts={definition: read_definition_counts(fields) for definition, (_, fields) in of_definitions.items()},
        workers=tuple(read_worker(worker, int(beat), fields, ()) for (worker, beat), (fields, _) in of_workers),
        running_on={worker: count for (worker, _), (_, count) in of_workers},
        beats=tuple(read_beat(name, line) for name, line in beats.items()),
        limits=tuple(limits),
        held_by=_waiting_for_limits(due_jobs, blocked, hosts, limits),
        capped_users=capped,
        users=users,
        breakers=tuple(breakers(set(hosts.values()) - {""})),
        own_priorities={definition: Priority(own) for definition, ((_, _, own), _) in of_definitions.items() if own},
    )


def _read_lags(fields: Mapping[str, str]) -> Histogram:
    """A histogram with nothing else in its hash."""
    return _histogram([(bound, int(times)) for bound, times in fields.items() if bound != "ms"], int(fields.get("ms", 0)))


def read_definition_counts(fields: Mapping[str, str]) -> DefinitionCounts:
    """What a definition's hash in "stats" says."""
    ended: Counter[tuple[Priority, JobState]] = Counter()
    retried: Counter[Priority] = Counter()
    late = 0
    runs: list[tuple[str, int]] = []
    for name, times in ((name, int(text)) for name, text in fields.items() if "|" in name):
        priority, state, *of_run = name.split("|")
        if state == JobState.RETRYING:
            retried[Priority(priority)] += times
        else:
            ended[Priority(priority), JobState(state)] += times
        if state == JobState.TIMED_OUT or "late" in of_run:
            late += times
        if of_run:
            runs.append((of_run[-1], times))
    return DefinitionCounts(ended, retried, late, int(fields.get("lost", 0)), _histogram(runs, int(fields.get("ms", 0))))


def _histogram(counted: Sequence[tuple[str, int]], sum_ms: int) -> Histogram:
    """From how many there are in each bucket; one may be there more than once."""
    spans = [(float(bound), times) for bound, times in counted]
    # another release may have counted by other bounds
    upto = tuple(sum(times for bound, times in spans if bound <= most) for most in BOUNDS_MS)
    return Histogram(upto, sum(times for _, times in spans), sum_ms)


def _waiting_for_limits(
    due: Mapping[Place, int], blocked: Mapping[Place, float], hosts: Mapping[str, str], limits: Sequence[LimitState]
) -> Counter[str]:
    """How many of the jobs that are due each limit holds back, as release last found it. What is paused waits for none."""
    held: Counter[str] = Counter({one.name: 0 for one in limits})
    total = next((one for one in limits if one.name == "total"), None)
    for place, jobs in due.items():
        definition, until = place[0], blocked.get(place)
        if until == _GATED:
            held[f"host:{hosts.get(definition, '')}"] += jobs
        elif until is not None and until != _PAUSED:
            held[f"definition:{definition}"] += jobs
        elif until is None and total is not None and total.tokens is not None and total.tokens < 1:
            held["total"] += jobs
    return held
