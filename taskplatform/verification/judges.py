"""The arithmetic of the verification: what recorded times say of order, limits and spreading. Pure; all times in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from taskplatform.model import JobState, Priority, Transition

#: A spread that is even is called uneven in one of so many verifications.
ODDS_OF_FALSE_ALARM = 1e6


# --- order -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """When a job waited, was released and started."""

    job: str
    priority: Priority
    place: int
    """The how manieth it was submitted."""
    due_ms: int
    released_ms: int | None
    """Before its first start; None: not yet."""
    started_ms: int | None
    shared: bool = False
    """Released for the guaranteed share of its priority, which may go before what is higher."""

    def waited_at(self, moment_ms: int) -> bool:
        """Whether it was due and not released. What was released in the same millisecond did not wait."""
        return self.due_ms <= moment_ms and (self.released_ms is None or self.released_ms > moment_ms)


def turn(job: str, priority: Priority, place: int, due_ms: int, history: Iterable[Transition]) -> Turn:
    """Of a job, from its history."""
    released: Transition | None = None
    for line in history:
        if line.from_state is line.to_state:
            continue
        if line.to_state is JobState.QUEUED:
            released = line
        elif line.to_state is JobState.RUNNING and released is not None:
            return Turn(job, priority, place, due_ms, released.at_ms, line.at_ms, "share" in released.reason)
        elif line.to_state in (JobState.PENDING, JobState.RETRYING):
            released = None
    return Turn(job, priority, place, due_ms, released.at_ms if released else None, None, "share" in released.reason if released else False)


def passed_over(turns: Sequence[Turn]) -> list[tuple[Turn, Turn]]:
    """(who went, who waited all the same) wherever one was released while another had the better right to go.

    That is one of a higher priority, or of the same one and submitted before.
    """
    found = []
    for one in turns:
        if one.released_ms is None or one.shared:
            continue
        for other in turns:
            higher = _rank(other) < _rank(one) or (_rank(other) == _rank(one) and other.place < one.place)
            if higher and other.waited_at(one.released_ms):
                found.append((one, other))
    return found


def contested(turns: Sequence[Turn]) -> int:
    """How many releases had a choice between priorities: others, of another priority, waited. Without one no order was shown."""
    return sum(
        one.released_ms is not None
        and any(other.priority is not one.priority and other.waited_at(one.released_ms) for other in turns if other is not one)
        for one in turns
    )


def _rank(one: Turn) -> int:
    return list(Priority).index(one.priority)


# --- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Busiest:
    """The span of time in which a rate limit came nearest to its bound, or went beyond it the most."""

    count: int
    span_ms: float
    allowed: float

    @property
    def excess(self) -> float:
        """How many too many; negative where there was room."""
        return self.count - self.allowed


def busiest(times_ms: Sequence[float], *, per_second: float, burst: int, slack_ms: float = 0.0) -> Busiest | None:
    """Of all spans that begin and end with an event. In one of t seconds `burst + per_second × t` are allowed; None without events.

    `slack_ms` is how exactly the times are known: 1 where they are whole milliseconds.
    """
    times = sorted(times_ms)
    found: Busiest | None = None
    for begin, first in enumerate(times):
        for count, last in enumerate(times[begin:], 1):
            span = last - first
            one = Busiest(count, span, burst + per_second * (span + slack_ms) / 1000)
            if found is None or one.excess > found.excess:
                found = one
    return found


def per_second_counts(times_ms: Sequence[float]) -> list[int]:
    """How many events were in each second after the first one."""
    if not times_ms:
        return []
    first = min(times_ms)
    counts = [0] * (int((max(times_ms) - first) // 1000) + 1)
    for at in times_ms:
        counts[int((at - first) // 1000)] += 1
    return counts


# --- spreading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """How evenly points lie in [0, 1)."""

    count: int
    distance: float
    """Of Kolmogorov and Smirnov: the largest difference between their distribution function and the even one's."""
    bound: float
    """What the distance of even points is above in one of ODDS_OF_FALSE_ALARM cases."""
    chi_square: float
    """Over `bins` equal parts."""
    bins: int
    largest_gap: float
    """The longest stretch of [0, 1] without a point."""

    @property
    def even(self) -> bool:
        return self.count > 0 and self.distance <= self.bound


def spread(points: Sequence[float], *, bins: int = 10) -> Spread:
    """Judge points in [0, 1). The bound is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant: it holds for any number."""
    found = sorted(points)
    count = len(found)
    if not count:
        return Spread(0, 1.0, 0.0, 0.0, bins, 1.0)
    distance = max(max((place + 1) / count - one, one - place / count) for place, one in enumerate(found))
    bound = math.sqrt(math.log(2 * ODDS_OF_FALSE_ALARM) / (2 * count))
    expected = count / bins
    chi_square = sum((share - expected) ** 2 / expected for share in histogram(found, bins))
    edges = [0.0, *found, 1.0]
    gap = max(last - first for first, last in pairwise(edges))
    return Spread(count, distance, bound, chi_square, bins, gap)


def histogram(points: Iterable[float], bins: int) -> list[int]:
    """How many points lie in each of so many equal parts of [0, 1); what lies outside counts for the nearest."""
    counts = [0] * bins
    for one in points:
        counts[min(bins - 1, max(0, int(one * bins)))] += 1
    return counts


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# --- histories -------------------------------------------------------------------------------------------------------


def broken_steps(history: Sequence[Transition], allowed: Mapping[JobState | None, frozenset[JobState]]) -> list[str]:
    """What in a history cannot be: a step that is none, a line that does not begin where the one before ended, a time before its last."""
    found = []
    state: JobState | None = None
    at_ms = 0
    for line in history:
        if line.at_ms < at_ms:
            found.append(f"{line.to_state} at {line.at_ms} comes before what went before it")
        at_ms = line.at_ms
        if line.from_state is line.to_state:
            continue  # a note
        if line.from_state is not state:
            found.append(f"{line.to_state} follows {line.from_state or 'nothing'}, but the job was {state or 'not there'}")
        if line.to_state not in allowed.get(line.from_state, frozenset()):
            found.append(f"{line.from_state or 'nothing'} → {line.to_state} is no step of a job")
        state = line.to_state
    return found
