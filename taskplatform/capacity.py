"""How wide windows must be, so that limits can carry what comes due in them. Arithmetic only: no store, no clock.

Jobs are taken as a fluid: those of a window flow evenly from its start to its end, a limit lets `rate` of them pass, and what it
cannot let pass at once waits. What is left of the limit beside those that go before is its room; an occurrence's window ends when
the room has added up to its jobs. Bursts are left out: they help for a moment, and never with a window.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

#: The longest window, 366 days: what the model accepts for a duration.
LONGEST_MS = 366 * 86_400_000
#: A window does not begin before a time in which the limit has less than this share of the room that an even spread needs.
_SCARCE = 0.1
#: A window that moved or grew by one limit may meet something new under another: so often they are looked at again.
_PASSES = 5
#: What rounding to whole milliseconds may cost.
_TOLERANCE_MS = 1.0


@dataclass(frozen=True, slots=True)
class Load:
    """Jobs that are committed: they come evenly from `start_ms` to `end_ms`, at once where these are equal."""

    start_ms: float
    end_ms: float
    jobs: float
    rank: int
    """Who goes first at the limit: the lower one."""
    limits: tuple[str, ...]
    """The names of the limits that apply to them."""


@dataclass(frozen=True, slots=True)
class Demand:
    """An occurrence that comes due, with the window that it would have if there were no limit."""

    start_ms: int
    window_ms: int
    jobs: int
    rank: int
    """As of `Load`. What has a higher rank than a demand does not count for it."""
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """The window of a demand: from `start_ms`, `window_ms` long."""

    start_ms: int
    window_ms: int
    limit: str = ""
    """The limit that made it later or wider; none did where this is empty."""
    together: int = 0
    """How many jobs share that limit until this window's end, its own among them."""


def fit(rates: Mapping[str, float], loads: Sequence[Load], demands: Sequence[Demand]) -> list[Fit]:
    """The windows of demands that come due together, in their order.

    `rates` are jobs per second by limit; a limit without a rate binds nothing. Under one limit the lower rank goes first. Those of
    one rank that do not fit with their own windows end together; one whose own window is longer keeps it, if it fits so.
    A window begins later only where the limit has next to nothing left before.
    """
    # what is alike but for its jobs gets one window: of the thousands of groups that a few definitions have, a few are left
    alike: defaultdict[tuple[object, ...], list[Demand]] = defaultdict(list)
    for demand in demands:
        alike[_kind(demand)].append(demand)
    pending = {kind: _Pending(replace(some[0], jobs=sum(one.jobs for one in some))) for kind, some in alike.items()}
    members: defaultdict[str, list[_Pending]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for kind, one in pending.items():
        for name in one.demand.limits:
            members[name].append(one)
            counts[name] += len(alike[kind])
    # the narrower first: what its limit stretches is less at once for those that it shares a wider limit with
    narrow_first = sorted((name for name in members if name in rates), key=lambda name: (counts[name], name))
    committed: defaultdict[str, list[Load]] = defaultdict(list)
    for load in loads:
        for name in load.limits:
            committed[name].append(load)
    for _ in range(_PASSES):
        changed = False
        for name in narrow_first:
            changed |= _apply(name, rates[name] / 1000, committed[name], members[name])
        if not changed:
            break
    fits = {kind: Fit(one.start_ms, one.window_ms, one.limit, one.together) for kind, one in pending.items()}
    return [fits[_kind(demand)] for demand in demands]


def _kind(demand: Demand) -> tuple[object, ...]:
    return demand.start_ms, demand.window_ms, demand.rank, demand.limits


class _Pending:
    """A demand and the window that it has so far."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.start_ms = demand.start_ms
        self.window_ms = demand.window_ms
        self.limit = ""
        self.together = 0

    @property
    def end_ms(self) -> int:
        return self.start_ms + self.window_ms

    def load(self) -> Load:
        return Load(self.start_ms, self.end_ms, self.demand.jobs, self.demand.rank, ())

    def stretch(self, begin_ms: float, end_ms: float, limit: str, together: int) -> None:
        self.start_ms = max(self.start_ms, min(_whole(begin_ms), self.demand.start_ms + LONGEST_MS))
        self.window_ms = min(max(self.window_ms, _whole(end_ms) - self.start_ms), LONGEST_MS)
        self.limit, self.together = limit, together


def _whole(ms: float) -> int:
    """Up to the next whole millisecond. What arithmetic with instants of this size loses is no millisecond of its own."""
    return math.ceil(ms - 0.01)


def _apply(name: str, rate: float, committed: Sequence[Load], pending: Sequence[_Pending]) -> bool:
    """Stretch what a limit of `rate` jobs per ms cannot carry. Returns whether that changed a window."""
    changed = False
    for rank in sorted({one.demand.rank for one in pending}):
        before = [load for load in committed if load.rank <= rank]
        before += [one.load() for one in pending if one.demand.rank < rank]
        pool = sorted((one for one in pending if one.demand.rank == rank), key=lambda one: one.end_ms)
        while pool and _Room(rate, before + [one.load() for one in pool]).ever_short:
            count, end_ms = 0, 0.0
            while count < len(pool) and (count == 0 or pool[count].end_ms <= end_ms):
                # those that end by then share the end; the others keep their own windows, and are so much less room for these
                count = _count_ending_by(pool, max(end_ms, pool[0].end_ms))
                room = _Room(rate, before + [one.load() for one in pool[count:]])
                begin_ms, end_ms = room.share(pool[:count])
            together = sum(one.demand.jobs for one in pool[:count])
            if end_ms > pool[0].end_ms + _TOLERANCE_MS:
                changed = True
                for one in pool[:count]:
                    one.stretch(begin_ms, end_ms, name, together)
            before += [one.load() for one in pool[:count]]
            pool = pool[count:]
    return changed


def _count_ending_by(pool: Sequence[_Pending], end_ms: float) -> int:
    return bisect_right([one.end_ms for one in pool], end_ms)


class _Room:
    """What loads leave of a limit: how many jobs more could pass by when, as a function that rises in straight pieces."""

    def __init__(self, rate: float, loads: Sequence[Load]) -> None:
        flow: defaultdict[float, float] = defaultdict(float)
        at_once: defaultdict[float, float] = defaultdict(float)
        for load in loads:
            if load.end_ms > load.start_ms:
                flow[load.start_ms] += load.jobs / (load.end_ms - load.start_ms)
                flow[load.end_ms] -= load.jobs / (load.end_ms - load.start_ms)
            else:
                at_once[load.start_ms] += load.jobs
        self.ever_short = False
        self._times = [-math.inf]
        self._slopes = [rate]
        self._sums = [0.0]
        times = sorted(flow.keys() | at_once.keys()) or [0.0]
        inflow, waiting, total = 0.0, 0.0, 0.0
        for number, at in enumerate(times):
            last = number == len(times) - 1
            # nothing flows after the last; what rounding left of the sum must not
            inflow = 0.0 if last else inflow + flow[at]
            waiting += at_once[at]
            left = rate - inflow
            until = math.inf if last else times[number + 1]
            drained = until
            if waiting > 1e-6:
                self.ever_short = True
                drained = at + waiting / left if left > 0 else math.inf
            elif left >= 0:
                drained = at
            if drained > at:
                self._piece(at, 0.0, total)
                waiting = 0.0 if drained < until else waiting - left * (until - at)
            else:
                waiting = 0.0
            if drained < until:
                self._piece(drained, left, total)
                if not last:
                    total += left * (until - drained)

    def _piece(self, at: float, slope: float, total: float) -> None:
        self._times.append(at)
        self._slopes.append(slope)
        self._sums.append(total)

    def _slope(self, at: float) -> float:
        return self._slopes[bisect_right(self._times, at) - 1]

    def _by(self, at: float, since: float) -> float:
        """The room from the instant `since` to the instant `at`."""
        return self._until(at) - self._until(since)

    def _until(self, at: float) -> float:
        number = bisect_right(self._times, at) - 1
        if number == 0:  # before the first load; counted back from there
            return self._slopes[0] * (at - self._times[1])
        return self._sums[number] + self._slopes[number] * (at - self._times[number])

    def _when(self, total: float) -> float:
        """The first instant at which `_until` is `total`."""
        number = bisect_left(self._sums, total, lo=1) - 1
        if number == 0:
            return self._times[1] + total / self._slopes[0]
        return self._times[number] + (total - self._sums[number]) / self._slopes[number]

    def share(self, pool: Sequence[_Pending]) -> tuple[float, float]:
        """When a window for all of the pool begins and ends."""
        # a limit that nobody waits at lets one go at once
        spared = 1 if all(self._slope(one.start_ms) > 0 for one in pool) else 0
        end_ms = self._end(pool, -math.inf, spared)
        first_ms = min(one.start_ms for one in pool)
        if end_ms <= min(one.end_ms for one in pool) + _TOLERANCE_MS:
            return first_ms, end_ms
        end_ms = self._end(pool, -math.inf, 0)
        pace = sum(one.demand.jobs for one in pool) / (end_ms - first_ms)
        begin_ms: float = first_ms
        for at in self._times[bisect_right(self._times, first_ms) : bisect_left(self._times, end_ms)]:
            if self._by(at, first_ms) < _SCARCE * pace * (at - first_ms):
                begin_ms = at
        return begin_ms, self._end(pool, begin_ms, 0)

    def _end(self, pool: Sequence[_Pending], begin_ms: float, spared: int) -> float:
        """When there was room for all; those that start later than others have only the room after that."""
        end_ms, jobs = -math.inf, -spared
        for one in sorted(pool, key=lambda one: -one.start_ms):
            jobs += one.demand.jobs
            start_ms = max(one.start_ms, begin_ms)
            end_ms = max(end_ms, start_ms, self._when(self._until(start_ms) + jobs)) if jobs > 0 else max(end_ms, start_ms)
        return end_ms
