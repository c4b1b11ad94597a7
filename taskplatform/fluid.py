"""How a stream of jobs passes limits and worker slots: release and workers, as arithmetic. No store, no clock.

Jobs are a fluid. Those of a window flow evenly from its start to its end, and what may go does so at once, in strict priority and inside it
the longest due first, as far as rates, concurrency and slots let it. Each job takes `attempts` runs, and each run a token of every
rate that it is under and a place for `seconds`. What cannot go waits in its lane.

Time goes in steps: as long as a stretch in which nothing begins or ends where all that comes may go, and short ones where something has
to wait. Each step ends where a bin does, for which the figures are kept. What goes in a step is never more than came, and all that came
has gone or waits.

A backfill is a supply: it makes its jobs evenly, and none while as many as may be of them are not finished. With a share, lower priorities
that wait get that part of all runs of a step before the higher ones get the rest, by what ran in the steps before.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from taskplatform.model import Limit, Priority

#: How long a step is at the most in which something has to wait.
STEP_MS = 10_000
#: Less than this of a job is what arithmetic left.
_NOTHING = 1e-6
#: What is free is shared out so often, because what one lane cannot take another can.
_SHARES = 3
#: Slots, where nobody asks how many there are.
_ENOUGH = 10**9
_LOWER = tuple(Priority)[1:]
#: What shares are parts of is the pace of about so long: steps alone are uneven where runs end together.
_PACE_MS = 30_000
#: A supply that may not go on sees that one of its jobs has ended after this, in the mean: backfills look once a second.
_SEEN_MS = 500


class Resource:
    """What runs take: a rate, or places. `free` is what is left of it in this step."""

    def __init__(self, bins: int) -> None:
        self.free = 0.0
        self.used = array("d", bytes(8 * bins))
        """What was taken, by bin: runs of a rate, place × ms of places."""
        self.short = bytearray(bins)
        """The bins in which something had to wait for it."""
        self._had = 0.0

    @property
    def used_up(self) -> float:
        """The part of what was free in this step that is taken."""
        return 1 - self.free / self._had if self._had > 0 else 1.0

    def surely(self, span_ms: float) -> float:
        """What is free in the next span, at the least."""
        raise NotImplementedError

    def need(self, seconds: float, span_ms: float) -> float:
        """What a run of so many seconds that begins in the span takes in it."""
        raise NotImplementedError

    def begin(self, now_ms: float, span_ms: float) -> None:
        """A step begins."""
        raise NotImplementedError

    def keep(self, runs: float, seconds: float, now_ms: float, span_ms: float) -> None:
        """These runs began in the step: note what they take after it."""

    def end(self, bin_: int) -> None:
        """The step ends."""
        raise NotImplementedError


class Bucket(Resource):
    """A rate: a token bucket that fills and is drained as the platform's."""

    def __init__(self, limit: Limit, tokens: float, bins: int) -> None:
        super().__init__(bins)
        assert limit.per_second is not None
        self.per_ms = limit.per_second / 1000
        self.per_run = limit.tokens_per_start
        self.capacity = limit.capacity
        self.level = min(tokens, self.capacity)
        self.left = array("d", [1.0]) * bins
        """The part of it that is full at the end of each bin."""

    def surely(self, span_ms: float) -> float:
        return max(0.0, self.level + self.per_ms * span_ms) / self.per_run

    def need(self, seconds: float, span_ms: float) -> float:  # noqa: ARG002 - how long a run takes is all one to a rate
        return 1.0

    def begin(self, now_ms: float, span_ms: float) -> None:  # noqa: ARG002
        self.free = self._had = self.surely(span_ms)
        self.level += self.per_ms * span_ms

    def end(self, bin_: int) -> None:
        taken = self._had - self.free
        self.used[bin_] += taken
        self.level = min(self.capacity, self.level - taken * self.per_run)
        self.left[bin_] = self.level / self.capacity


class Places(Resource):
    """So many may run at a time: the slots of workers, or a limit's concurrency."""

    def __init__(self, count: float, bins: int) -> None:
        super().__init__(bins)
        self.count = count
        self._busy = self._occupied = 0.0
        self._ends: list[tuple[float, float]] = []

    def occupy(self, runs: float, until_ms: float) -> None:
        """So many places are taken until then."""
        self._busy += runs
        heappush(self._ends, (until_ms, runs))

    def surely(self, span_ms: float) -> float:
        return max(0.0, self.count - self._busy) * span_ms

    def need(self, seconds: float, span_ms: float) -> float:
        return max(min(seconds * 1000, span_ms), 1e-3)

    def begin(self, now_ms: float, span_ms: float) -> None:
        until_ms, occupied = now_ms + span_ms, self._busy * span_ms
        while self._ends and self._ends[0][0] <= until_ms:
            at_ms, runs = heappop(self._ends)
            self._busy -= runs
            occupied -= runs * (until_ms - max(at_ms, now_ms))
        if not self._ends:
            self._busy = 0.0
        self._occupied = max(0.0, occupied)
        self.free = self._had = max(0.0, self.count * span_ms - occupied)

    def keep(self, runs: float, seconds: float, now_ms: float, span_ms: float) -> None:
        if runs > 0 and seconds * 1000 > span_ms:
            self.occupy(runs, now_ms + seconds * 1000)

    def end(self, bin_: int) -> None:
        self.used[bin_] += self._occupied + (0.0 if math.isinf(self._had) else self._had - self.free)


class Quota(Resource):
    """So many runs."""

    def surely(self, span_ms: float) -> float:  # noqa: ARG002
        return self.free

    def need(self, seconds: float, span_ms: float) -> float:  # noqa: ARG002
        return 1.0

    def begin(self, now_ms: float, span_ms: float) -> None:
        """It is given anew by whoever gives it."""

    def end(self, bin_: int) -> None:
        """Nothing is noted of it."""

    def give(self, runs: float) -> None:
        """From now on it is so many."""
        self.free = self._had = runs


@dataclass(frozen=True, slots=True)
class Pool:
    """Slots of workers that serve the same queues."""

    priorities: frozenset[Priority]
    slots: int


@dataclass(slots=True, eq=False)
class Lane:
    """The jobs of a definition with one priority."""

    definition: str
    priority: Priority
    host: str
    limits: tuple[str, ...]
    """The names of all limits that apply, whether there are such or not."""
    attempts: float
    """Runs that a job takes."""
    seconds: float
    """How long a run takes."""
    planned: array[float]
    """Jobs that become due, by bin."""
    gone: array[float]
    """Jobs that go, by bin."""
    backlog: array[float]
    """Jobs that are due and wait, at the end of each bin."""
    delay: array[float]
    """How long the longest of those that went, or wait at the end, has been due, in ms, by bin."""
    waits: float = 0.0
    inflow: float = 0.0
    """Jobs that become due in a ms."""
    flows: int = 0
    cohorts: deque[list[float]] = field(default_factory=deque)
    """What waits, the longest due first: [due since, jobs]."""
    under: list[Resource] = field(default_factory=list)
    """The limits that apply; slots come on top."""
    supply: Supply | None = None
    """What makes its jobs, where they are those of a backfill."""


@dataclass(slots=True, eq=False)
class Supply:
    """Jobs of a lane that are made one after the other, at a rate, as long as not too many of them are unfinished."""

    per_ms: float
    left: float
    """To be made."""
    most: float
    """So many may wait."""


class Stream:
    """The simulation."""

    def __init__(
        self,
        now_ms: int,
        end_ms: int,
        bin_ms: int,
        *,
        limits: Mapping[str, Limit] | None = None,
        tokens: Mapping[str, float] | None = None,
        pools: Sequence[Pool] | None = None,
        holds: Mapping[str, int] | None = None,
        share: float = 0.0,
    ) -> None:
        """`tokens`: what is in the buckets; they are full where nothing is said. `pools`: None is as many slots as are needed. `holds`:
        the hosts to which nothing goes until then. `share`: which part of all runs each lower priority gets at least while it waits.
        """
        self.begin_ms = self.now_ms = now_ms
        # a bin of a minute is one of the clock
        self.start_ms = now_ms // bin_ms * bin_ms
        self.end_ms, self.bin_ms = end_ms, bin_ms
        self.bins = math.ceil((end_ms - self.start_ms) / bin_ms)
        limits = limits or {}
        self.buckets = {
            name: Bucket(limit, (tokens or {}).get(name, math.inf), self.bins)
            for name, limit in limits.items()
            if limit.per_second is not None
        }
        self.places = {name: Places(limit.concurrency, self.bins) for name, limit in limits.items() if limit.concurrency is not None}
        # what serves fewer queues is taken first: the others are left for what only they serve
        found = sorted(pools if pools is not None else [Pool(frozenset(Priority), _ENOUGH)], key=lambda pool: len(pool.priorities))
        self.slots = [Places(pool.slots, self.bins) for pool in found]
        self._slots_for = {
            priority: [places for pool, places in zip(found, self.slots, strict=True) if priority in pool.priorities]
            for priority in Priority
        }
        # a job that goes for its share takes a place of a higher queue
        self._slots_for_share = {
            priority: [places for pool, places in zip(found, self.slots, strict=True) if pool.priorities & set(list(Priority)[: place + 1])]
            for place, priority in enumerate(Priority)
        }
        self._part, self._quota = share, Quota(self.bins)
        #: Runs in a ms, of late.
        self._pace = 0.0
        self._all: list[Resource] = [*self.buckets.values(), *self.places.values(), *self.slots]
        self.lanes: dict[tuple[str, Priority, str], Lane] = {}
        self._holds: dict[str, int] = {host: until_ms for host, until_ms in (holds or {}).items() if until_ms > now_ms}
        self._changes: list[tuple[int, int, Lane, float, float]] = []
        self._number = 0
        self._active: dict[Lane, None] = {}

    def lane(
        self, definition: str, priority: Priority, *, backfill: str = "", host: str = "", attempts: float = 1.0, seconds: float = 1.0
    ) -> Lane:
        """The lane of these, where a backfill has one of its own; the rest counts when it is made."""
        found = self.lanes.get((definition, priority, backfill))
        if found is None:
            names = (f"definition:{definition}", *((f"host:{host}",) if host else ()), "total")
            planned, gone, backlog, delay = (array("d", bytes(8 * self.bins)) for _ in range(4))
            found = Lane(definition, priority, host, names, attempts, seconds, planned, gone, backlog, delay)
            found.under = [limits[name] for limits in (self.buckets, self.places) for name in names if name in limits]
            self.lanes[definition, priority, backfill] = found
        return found

    def add(self, lane: Lane, start_ms: float, end_ms: float, jobs: float) -> None:
        """Jobs that become due evenly from `start_ms` to `end_ms`; at once where these are equal, or have passed."""
        start_ms, end_ms = max(round(start_ms), self.now_ms), round(end_ms)
        if jobs <= 0 or start_ms >= self.end_ms:
            return
        if end_ms <= start_ms:
            self._change(start_ms, lane, 0.0, jobs)
            self._count(lane, start_ms, start_ms, jobs)
            return
        per_ms = jobs / (end_ms - start_ms)
        self._change(start_ms, lane, per_ms, 0.0)
        self._change(end_ms, lane, -per_ms, 0.0)
        self._count(lane, start_ms, min(end_ms, self.end_ms), per_ms)

    def supply(self, lane: Lane, per_second: float, jobs: float, most: float) -> None:
        """Make so many jobs from now on, evenly, into a lane of their own. Not more than `most` of them wait or run at a time."""
        if jobs > _NOTHING:
            # no more of them run than have ended
            per_ms = min(per_second / 1000, most / (lane.seconds * lane.attempts * 1000 + _SEEN_MS))
            lane.supply = Supply(per_ms, jobs, most)
            lane.flows = 1
            self._active[lane] = None

    def run(self, lane: Lane, runs: float, until_ms: float) -> None:
        """So many run already, until then."""
        for one in (*lane.under, *self._slots_for[lane.priority][-1:]):
            if isinstance(one, Places):
                one.occupy(runs, until_ms)

    def advance(self, until_ms: int) -> None:
        """Go on until then, and no further than the end."""
        until_ms = min(until_ms, self.end_ms)
        while self.now_ms < until_ms:
            self._holds = {host: held_ms for host, held_ms in self._holds.items() if held_ms > self.now_ms}
            while self._changes and self._changes[0][0] <= self.now_ms:
                self._begin(*heappop(self._changes)[2:])
            bin_ = (self.now_ms - self.start_ms) // self.bin_ms
            ends = [until_ms, self.start_ms + (bin_ + 1) * self.bin_ms, *self._holds.values()]
            if self._changes:
                ends.append(self._changes[0][0])
            end_ms = min(end for end in ends if end > self.now_ms)
            self._stretch(bin_, end_ms)

    # --- what flows in ----------------------------------------------------------------------------------------------

    def _change(self, at_ms: int, lane: Lane, per_ms: float, at_once: float) -> None:
        self._number += 1
        heappush(self._changes, (at_ms, self._number, lane, per_ms, at_once))

    def _begin(self, lane: Lane, per_ms: float, at_once: float) -> None:
        if at_once:
            self._enter(lane, self.now_ms, at_once)
        else:
            lane.flows += 1 if per_ms > 0 else -1
            # nothing flows after the last; what rounding left of the sum must not
            lane.inflow = lane.inflow + per_ms if lane.flows else 0.0
        self._active[lane] = None

    def _enter(self, lane: Lane, due_ms: float, jobs: float) -> None:
        lane.waits += jobs
        if lane.cohorts and due_ms - lane.cohorts[-1][0] < STEP_MS:
            lane.cohorts[-1][1] += jobs
        else:
            lane.cohorts.append([due_ms, jobs])

    def _count(self, lane: Lane, start_ms: int, end_ms: int, jobs: float) -> None:
        """Note what becomes due: `jobs` in a ms from `start_ms` to `end_ms`, or in all where these are equal."""
        bin_ = (start_ms - self.start_ms) // self.bin_ms
        if start_ms == end_ms:
            lane.planned[bin_] += jobs
            return
        while start_ms < end_ms:
            bin_end_ms = min(end_ms, self.start_ms + (bin_ + 1) * self.bin_ms)
            lane.planned[bin_] += jobs * (bin_end_ms - start_ms)
            start_ms, bin_ = bin_end_ms, bin_ + 1

    # --- what goes --------------------------------------------------------------------------------------------------

    def _stretch(self, bin_: int, end_ms: int) -> None:
        """To `end_ms`; nothing begins or ends before it, and it is in one bin."""
        while self.now_ms < end_ms:
            begin_ms, span_ms = self.now_ms, end_ms - self.now_ms
            supplied = [lane for lane in self._active if lane.supply is not None]
            _offer(supplied, span_ms)
            if not self._all_go(bin_, span_ms):
                span_ms = self._step_ms(span_ms)
                _offer(supplied, span_ms)
                self._some_go(bin_, span_ms)
            for lane in supplied:
                _take(lane, bin_, self.now_ms - begin_ms)
        if end_ms - self.start_ms >= (bin_ + 1) * self.bin_ms or end_ms >= self.end_ms:
            for lane in list(self._active):
                lane.backlog[bin_] = lane.waits
                if lane.waits:
                    lane.delay[bin_] = max(lane.delay[bin_], end_ms - lane.cohorts[0][0])
                elif not lane.flows:
                    del self._active[lane]

    def _step_ms(self, span_ms: int) -> int:
        """How long a step is in which something has to wait."""
        others = [lane for lane in self._active if lane.supply is None]
        waits_ms = [self.now_ms - lane.cohorts[0][0] for lane in others if lane.cohorts]
        if not waits_ms and all(lane.priority is not Priority.LOW or not lane.inflow for lane in others) and self._fits(others, span_ms):
            # only backfills wait: what goes before them goes at once, and of them no more waits in a long step than in short ones
            return span_ms
        # what has waited for long needs no short steps
        return min(span_ms, max(STEP_MS, int(max(waits_ms, default=0.0) / 6)))

    def _fits(self, lanes: Collection[Lane], span_ms: int) -> bool:
        """Whether all that comes in these can go at once."""
        if any(lane.waits or lane.host in self._holds for lane in lanes):
            return False
        wanted: dict[Resource, float] = {}
        for lane in lanes:
            runs = lane.inflow * span_ms * lane.attempts
            for one in (*lane.under, *self._slots_for[lane.priority][:1]):
                wanted[one] = wanted.get(one, 0.0) + runs * one.need(lane.seconds, span_ms)
        if any(amount > one.surely(span_ms) for one, amount in wanted.items()):
            return False
        return not any(lane.inflow and not self._slots_for[lane.priority] for lane in lanes)

    def _all_go(self, bin_: int, span_ms: int) -> bool:
        """Let all that comes in this span go, if nothing keeps it."""
        if not self._fits(self._active, span_ms):
            return False
        for one in self._all:
            one.begin(self.now_ms, span_ms)
        for lane in self._active:
            self._go(lane, self._slots_for[lane.priority], lane.inflow * span_ms, bin_, span_ms)
        self._end(bin_, span_ms, sum(lane.inflow * lane.attempts for lane in self._active) * span_ms)
        return True

    def _some_go(self, bin_: int, span_ms: int) -> None:
        """Let go what can, in strict priority, and inside it the longest due first."""
        for one in self._all:
            one.begin(self.now_ms, span_ms)
        for lane in self._active:
            if lane.inflow:
                self._enter(lane, self.now_ms, lane.inflow * span_ms)
        runs = 0.0
        for priority in _LOWER if self._part else ():
            self._quota.give(self._part * self._pace * span_ms)
            runs += self._serve(priority, bin_, span_ms, self._quota)
        for priority in Priority:
            runs += self._serve(priority, bin_, span_ms)
        self._end(bin_, span_ms, runs)

    def _serve(self, priority: Priority, bin_: int, span_ms: int, quota: Quota | None = None) -> float:
        """Let go what can of a priority; with a quota as far as that goes, in the slots of higher ones too. Returns how many runs went."""
        slots = self._slots_for[priority] if quota is None else self._slots_for_share[priority]
        heads: list[tuple[float, int, Lane]] = []
        runs = 0.0
        for number, lane in enumerate(self._active):
            if lane.priority is priority and lane.cohorts and lane.host not in self._holds:
                heads.append((lane.cohorts[0][0], number, lane))
        heapify(heads)
        while heads and (quota is None or quota.free > _NOTHING):
            due_ms = heads[0][0]
            together: list[tuple[int, Lane]] = []
            while heads and heads[0][0] == due_ms:
                together.append(heappop(heads)[1:])
            runs += self._share([lane for _, lane in together], slots, bin_, span_ms, quota)
            for number, lane in together:
                # what could not go as a whole is at its limit
                if lane.cohorts and lane.cohorts[0][0] > due_ms:
                    heappush(heads, (lane.cohorts[0][0], number, lane))
        return runs

    def _share(self, lanes: Sequence[Lane], slots: Sequence[Places], bin_: int, span_ms: float, quota: Quota | None) -> float:
        """Let go what can of the first cohorts of these lanes, which are equal: each the same part, as far as its limits let it.

        Returns how many runs went.
        """
        went, bound = 0.0, () if quota is None else (quota,)
        left = list(lanes)
        for _ in range(_SHARES):
            wanted: dict[Resource, float] = {}
            wanted_slots = 0.0
            for lane in left:
                runs = lane.cohorts[0][1] * lane.attempts
                for one in (*lane.under, *bound):
                    wanted[one] = wanted.get(one, 0.0) + runs * one.need(lane.seconds, span_ms)
                wanted_slots += runs * _slot_need(lane.seconds, span_ms)
            parts = {one: min(1.0, one.free / amount) for one, amount in wanted.items()}
            free = sum(one.free for one in slots)
            of_slots = min(1.0, free / wanted_slots)
            of_quota = min((parts[one] for one in bound), default=1.0)
            again = []
            for lane in left:
                part = min([of_slots, of_quota, *(parts[one] for one in lane.under)])
                cohort = lane.cohorts[0]
                jobs = cohort[1] * part
                self._go(lane, slots, jobs, bin_, span_ms)
                went += jobs * lane.attempts
                for one in bound:
                    one.free = max(0.0, one.free - jobs * lane.attempts)
                if self.now_ms > cohort[0] and jobs > _NOTHING:
                    # the last of them goes when so much of the step has been used up
                    used = max(one.used_up for one in (*lane.under, *slots))
                    lane.delay[bin_] = max(lane.delay[bin_], self.now_ms + used * span_ms - cohort[0])
                cohort[1] -= jobs
                lane.waits -= jobs
                if part >= 1.0 or cohort[1] < _NOTHING:
                    lane.gone[bin_] += cohort[1]
                    lane.waits -= cohort[1]
                    lane.cohorts.popleft()
                    if not lane.cohorts:
                        lane.waits = 0.0
                else:
                    again.append(lane)
            left = [
                lane
                for lane in again
                if all(one.free > _NOTHING for one in (*lane.under, *bound)) and any(one.free > _NOTHING for one in slots)
            ]
            for lane in again:
                for one in (*lane.under, *slots):
                    if one.free <= _NOTHING:
                        one.short[bin_] = 1
            if not left:
                break
        return went

    def _go(self, lane: Lane, slots: Sequence[Places], jobs: float, bin_: int, span_ms: float) -> None:
        """Let jobs go for which there is room."""
        if jobs <= 0:
            return
        lane.gone[bin_] += jobs
        runs = jobs * lane.attempts
        for one in lane.under:
            one.free = max(0.0, one.free - runs * one.need(lane.seconds, span_ms))
            one.keep(runs, lane.seconds, self.now_ms, span_ms)
        need = _slot_need(lane.seconds, span_ms)
        for one in slots:
            some = min(runs, one.free / need)
            one.free = max(0.0, one.free - some * need)
            one.keep(some, lane.seconds, self.now_ms, span_ms)
            runs -= some
            if runs <= 0:
                return

    def _end(self, bin_: int, span_ms: int, runs: float) -> None:
        for one in self._all:
            one.end(bin_)
        # so that a burst in a short step is no pace
        self._pace += (runs / span_ms - self._pace) * -math.expm1(-span_ms / _PACE_MS)
        self.now_ms += span_ms


def _offer(lanes: Iterable[Lane], span_ms: int) -> None:
    """What backfills make in the next span, if they may."""
    for lane in lanes:
        if lane.supply is not None:
            lane.inflow = min(lane.supply.per_ms, lane.supply.left / span_ms)


def _take(lane: Lane, bin_: int, span_ms: int) -> None:
    """A backfill made what it may: not what would wait beside as much as may."""
    supply = lane.supply
    assert supply is not None
    made = lane.inflow * span_ms
    over = max(0.0, min(made, lane.waits - supply.most))
    while over > 0 and lane.cohorts:
        some = min(over, lane.cohorts[-1][1])
        lane.cohorts[-1][1] -= some
        lane.waits -= some
        made -= some
        over -= some
        if lane.cohorts[-1][1] < _NOTHING:
            lane.waits -= lane.cohorts.pop()[1]
    supply.left -= made
    lane.planned[bin_] += made
    if supply.left < _NOTHING:
        lane.supply, lane.flows, lane.inflow = None, 0, 0.0


def _slot_need(seconds: float, span_ms: float) -> float:
    return max(min(seconds * 1000, span_ms), 1e-3)
