"""What metrics are made of, as it is read from Redis in one go: `Store.figures`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taskplatform.model import JobState, Priority
from taskplatform.store.keys import BOUNDS_MS
from taskplatform.store.records import Beat, LimitState, Worker

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


def read_lags(fields: Mapping[str, str]) -> Histogram:
    """A histogram with nothing else in its hash."""
    return _histogram(fields, "")


def read_counts(fields: Mapping[str, str]) -> DefinitionCounts:
    """What a definition's hash in "stats" says."""
    ended: dict[tuple[Priority, JobState], int] = {}
    retried: dict[Priority, int] = {}
    for name, times in fields.items():
        priority, _, state = name.partition("|")
        if priority in tuple(Priority):
            if state == JobState.RETRYING:
                retried[Priority(priority)] = int(times)
            else:
                ended[Priority(priority), JobState(state)] = int(times)
    return DefinitionCounts(ended, retried, int(fields.get("lost", 0)), _histogram(fields, "run|"))


def _histogram(fields: Mapping[str, str], prefix: str) -> Histogram:
    counted = {float(name.removeprefix(prefix)): int(times) for name, times in fields.items() if _is_bound(name, prefix)}
    # another release may have counted by other bounds
    upto = tuple(sum(times for bound, times in counted.items() if bound <= most) for most in BOUNDS_MS)
    return Histogram(upto, sum(counted.values()), int(fields.get(f"{prefix}ms", 0)))


def _is_bound(name: str, prefix: str) -> bool:
    bound = name.removeprefix(prefix)
    return name.startswith(prefix) and (bound.isdigit() or bound == "inf")


def waiting_for_limits(
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
