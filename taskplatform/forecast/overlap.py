"""Definitions whose users have one job at a time (overlap: skip): of an occurrence, only users whose last job is finished get one.

The plan script looks at each user when the user's job is made, a horizon before its moment. Here users are parts of a group, by their
slots, and the platform's order says what is finished: in a lane the longest due goes first, so a job is finished when what is due up to
its moment has gone, and the time of a run has passed. A user has one unfinished job at the most, so those of several occurrences add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from taskplatform.fluid import Lane, Stream

#: Into so many parts the users of a default group are taken; those of an own schedule, of which there may be thousands, into fewer.
_PARTS, _OWN_PARTS = 10, 4
#: Less of a part's users is nobody.
_NOBODY = 1e-6


@dataclass(frozen=True, slots=True)
class _Occurrence:
    start_ms: int
    window_ms: int
    made: list[float]
    """By part, which share of its users has a job of it."""

    def due_ms(self, part: float) -> float:
        return self.start_ms + self.window_ms * part / len(self.made)

    @property
    def end_ms(self) -> int:
        return self.start_ms + self.window_ms


@dataclass(frozen=True, slots=True)
class _Part:
    """Users of a group whose jobs are about to be planned."""

    gid: str
    definition: str
    occurrence: _Occurrence
    number: int
    start_ms: float
    end_ms: float
    jobs: float


class OneAtATime:
    """Adds the jobs of such definitions to a stream."""

    def __init__(self, stream: Stream, horizon_ms: int, lane_of: Callable[[str], Lane]) -> None:
        self._stream = stream
        self._horizon_ms = horizon_ms
        self._lane_of = lane_of
        self._before: defaultdict[str, list[_Occurrence]] = defaultdict(list)
        #: What is unfinished when all begins, by definition: of whom, nobody knows.
        self._users: dict[str, float] = {}
        self._running: dict[str, tuple[float, float]] = {}
        self._to_decide: list[tuple[int, int, _Part]] = []
        self._number = 0
        self._skipped: defaultdict[str, float] = defaultdict(float)

    def begin(self, definition: str, *, users: float, running: float, until_ms: float) -> None:
        """So many users have jobs of it, and so many of its jobs run until then; what waits is in its lane."""
        self._users[definition] = users
        self._running[definition] = (running, until_ms)

    @property
    def skipped(self) -> dict[str, float]:
        """Jobs that were not made, by definition; the most first."""
        return dict(sorted(self._skipped.items(), key=lambda one: (-one[1], one[0])))

    @property
    def next_ms(self) -> int | None:
        """When `decide` has something to do."""
        return self._to_decide[0][0] if self._to_decide else None

    def open(self, gid: str, definition: str, start_ms: int, window_ms: int, jobs: float, *, begin_ms: int | None = None) -> None:
        """An occurrence of a group with so many jobs, of which none is due before `begin_ms`."""
        now_ms, begin_ms = self._stream.now_ms, start_ms if begin_ms is None else begin_ms
        before, parts = self._before[gid], _PARTS if gid == definition else _OWN_PARTS
        frontier_ms = self._finished_ms(definition)
        before[:] = [one for one in before if one.end_ms > frontier_ms]
        occurrence = _Occurrence(start_ms, window_ms, [0.0] * parts)
        if not before and not self._unknown(definition):
            self._stream.add(self._lane_of(definition), begin_ms, occurrence.end_ms, jobs)
            # who was planned before it begins here is among those of whom nothing is known
            occurrence.made[:] = [float(begin_ms <= start_ms or occurrence.due_ms(part + 1) > begin_ms) for part in range(parts)]
        else:
            length_ms = occurrence.end_ms - begin_ms
            for part in range(parts):
                first_ms, last_ms = max(begin_ms, occurrence.due_ms(part)), occurrence.due_ms(part + 1)
                some = jobs * (last_ms - first_ms) / length_ms if length_ms > 0 else jobs / parts
                if some > 0:
                    self._number += 1
                    at_ms = max(now_ms, round(first_ms) - self._horizon_ms)
                    heappush(self._to_decide, (at_ms, self._number, _Part(gid, definition, occurrence, part, first_ms, last_ms, some)))
        before.append(occurrence)

    def decide(self) -> None:
        """Make the jobs of all parts that are to be planned by now."""
        while self._to_decide and self._to_decide[0][0] <= self._stream.now_ms:
            part = heappop(self._to_decide)[2]
            frontier_ms = self._finished_ms(part.definition)
            busy = self._unknown(part.definition)
            for one in self._before[part.gid]:
                if one is not part.occurrence and one.due_ms(part.number) > frontier_ms:
                    busy += one.made[part.number]
            share = max(0.0, 1.0 - busy)
            part.occurrence.made[part.number] = share
            self._skipped[part.definition] += part.jobs * (1 - share)
            self._stream.add(self._lane_of(part.definition), part.start_ms, part.end_ms, part.jobs * share)

    def _finished_ms(self, definition: str) -> float:
        """All jobs of the lane that were due by then are finished."""
        lane = self._lane_of(definition)
        return (lane.cohorts[0][0] if lane.cohorts else self._stream.now_ms) - _run_ms(lane)

    def _unknown(self, definition: str) -> float:
        """The part of all users whose job of before it all began is unfinished."""
        began_ms, users = self._stream.begin_ms, self._users.get(definition, 0.0)
        running, until_ms = self._running.get(definition, (0.0, 0.0))
        jobs = running if self._stream.now_ms < until_ms else 0.0
        jobs += sum(jobs for due_ms, jobs in self._lane_of(definition).cohorts if due_ms <= began_ms)
        found = min(1.0, jobs / users) if users else 0.0
        return found if found > _NOBODY else 0.0


def _run_ms(lane: Lane) -> float:
    return lane.seconds * lane.attempts * 1000
