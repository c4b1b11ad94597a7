"""The checks of what the definitions ask for: whether limits, slots and run times let it be done before it comes due again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from taskplatform.capacity import Demand, fit
from taskplatform.doctor.nodes import living_workers
from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.visit import Nothing, Visit
from taskplatform.model import Limit, LimitRule, Priority, Schedule, format_rate, span_text
from taskplatform.schedule import occurrences
from taskplatform.store.diagnosis import InForce

_DAY_MS = 86_400_000
#: Looked at, for how often a definition comes due.
_MOST_OCCURRENCES = 300
#: What is used by so much in the long run is nearly used up; a mend leaves that much room.
_NEARLY = 0.8
#: A mean of fewer runs says little.
_ENOUGH_RUNS = 20
_NAMED = 3


def capacity(visit: Visit) -> Iterator[Finding]:
    """Whether the rates of limits let through what comes due, in the long run."""
    yield from visit.health(lambda code: code == "definition_paused")
    limits = visit.redis().store.limits()
    rates = {name: limit.sustained for name, limit in limits.items() if limit.sustained}
    known = _scheduled(visit)
    visit.seen(f"{len(known)} definitions with subscribers, {len(rates)} limits")
    demand: defaultdict[str, float] = defaultdict(float)
    asked: defaultdict[str, list[str]] = defaultdict(list)
    for one, period_ms in known:
        for name in _limits(one, rates):
            demand[name] += one.subscribers / period_ms * 1000
            asked[name].append(one.id)
    raised = {name: _with_rate(name, limits[name], per_second / _NEARLY) for name, per_second in demand.items()}
    for one, period_ms in known:
        yield from _alone(one, rates, period_ms, raised)
    for name, per_second in sorted(demand.items()):
        used = per_second / rates[name]
        if used > _NEARLY and not (used > 1 and len(asked[name]) == 1):
            yield Finding(
                code="limit_cannot_carry" if used > 1 else "limit_nearly_used",
                severity=Severity.CRITICAL if used > 1 else Severity.WARNING,
                subject=name,
                what=f"{len(asked[name])} definitions ask for {per_second:.2f} jobs a second in the long run, and limit {name} "
                f"lets {rates[name]:g} through ({used:.0%}).",
                why="The backlog grows without end." if used > 1 else "After an outage there is hardly room to catch up.",
                mend=f"{raised[name]}, or fewer subscribers or occurrences",
            )


def _scheduled(visit: Visit) -> list[tuple[InForce, float]]:
    """What comes due again and again for somebody, and every how many milliseconds."""
    now_ms = visit.redis().store.now_ms()
    known = [one for one in visit.redis().definitions() if one.schedule is not None and one.subscribers and not one.paused]
    periods = [(one, period(one.schedule, now_ms)) for one in known if one.schedule is not None]
    return [(one, period_ms) for one, period_ms in periods if period_ms is not None]


def _limits(one: InForce, named: Mapping[str, object]) -> list[str]:
    return [name for name in (f"definition:{one.id}", f"host:{one.host}", "total") if name in named]


def _alone(one: InForce, rates: Mapping[str, float], period_ms: float, raised: Mapping[str, str]) -> Iterator[Finding]:
    """A definition by itself: its window beside the time to its next occurrence."""
    rank = list(Priority).index(one.priority)
    (found,) = fit(rates, (), [Demand(0, one.window_ms, one.subscribers, rank, tuple(_limits(one, rates)))])
    if found.window_ms > period_ms and found.limit:
        yield Finding(
            code="definition_cannot_be_met",
            severity=Severity.CRITICAL,
            subject=one.id,
            what=f"{one.subscribers:,} subscribers need a window of {span_text(found.window_ms)} under limit {found.limit}, "
            f"and it comes due every {span_text(period_ms)}.",
            why="The next occurrence comes due before this one is done: each is later than the one before.",
            mend=f"{raised[found.limit]}, or a longer interval",
        )
    elif found.window_ms > period_ms:
        yield Finding(
            code="windows_overlap",
            severity=Severity.WARNING,
            subject=one.id,
            what=f"Its window is {span_text(one.window_ms)} long, and it comes due every {span_text(period_ms)}.",
            why="Several occurrences run side by side, and a user's job can come after the time of the user's next one.",
            mend=f"a shorter window or a longer interval for {one.id} in its file; taskplatform tasks check",
        )
    elif found.window_ms > one.window_ms:
        yield Finding(
            code="window_widened",
            severity=Severity.INFO,
            subject=one.id,
            what=f"Its window of {span_text(one.window_ms)} becomes {span_text(found.window_ms)} under limit {found.limit}.",
            why="Its users' jobs come later than its window says.",
            mend=f"taskplatform occurrences {one.id}; then taskplatform limits set, see there, or a longer window",
        )


def _with_rate(name: str, limit: Limit, per_second: float) -> str:
    """The command that lets so much through, and leaves the rest of the limit as it is."""
    unit = next((seconds for seconds in (1, 60, 3600) if per_second * seconds >= 10), 86_400)
    rate = format_rate(math.ceil(per_second * unit) / unit)
    # its own burst may be too small for the new rate, see Limit.tokens_per_start
    burst = max(limit.burst or 1, LimitRule(rate=rate).limit.burst or 1)
    return _command(name, Limit(LimitRule(rate=rate).limit.per_second, burst, limit.concurrency))


def _command(name: str, limit: Limit) -> str:
    rate = "" if limit.per_second is None else f" --rate {format_rate(limit.per_second)} --burst {limit.burst}"
    concurrency = "" if limit.concurrency is None else f" --concurrency {limit.concurrency}"
    return f"taskplatform limits set {name}{rate}{concurrency}"


def runs(visit: Visit) -> Iterator[Finding]:
    """Whether slots and concurrency carry what comes due, by the run times that were measured."""
    known = _scheduled(visit)
    counts = visit.figures().counts
    means_ms = {name: one.runs.sum_ms / one.runs.total for name, one in counts.items() if one.runs.total >= _ENOUGH_RUNS}
    slots = sum(one.slots for one in living_workers(visit) if not one.drained)
    busy = {one.id: one.subscribers * means_ms[one.id] / period_ms for one, period_ms in known if one.id in means_ms}
    if not known:
        raise Nothing("no definition with subscribers comes due")
    visit.seen(
        f"{len(busy)} of {len(known)} definitions have {_ENOUGH_RUNS} runs to go by, {sum(busy.values()):.1f} of {slots} slots are needed"
    )
    yield from _slots(busy, slots)
    yield from _concurrency(visit, [one for one, _ in known], busy)
    for one, period_ms in known:
        mean_ms = means_ms.get(one.id, 0.0)
        if mean_ms > period_ms:
            skips = one.overlap == "skip"
            yield Finding(
                code="runs_overlap",
                severity=Severity.WARNING,
                subject=one.id,
                what=f"Its runs take {span_text(mean_ms)} on average, and it comes due every {span_text(period_ms)}.",
                why="With `overlap: skip` occurrences are skipped while a user's last job runs."
                if skips
                else "Several jobs of a user run side by side.",
                mend=f"a longer interval for {one.id} in its file{'' if skips else ', or `overlap: skip`'}; taskplatform tasks check",
            )
    yield from _hanging(known, visit.redis().store.limits(), slots)


def _slots(busy: Mapping[str, float], slots: int) -> Iterator[Finding]:
    needed = sum(busy.values())
    if not slots or needed <= slots * _NEARLY:
        return  # where there are none, that is another finding
    most = sorted(busy, key=lambda name: -busy[name])[:_NAMED]
    over = needed > slots
    yield Finding(
        code="slots_cannot_carry" if over else "slots_nearly_used",
        severity=Severity.CRITICAL if over else Severity.WARNING,
        subject=", ".join(most),
        what=f"What comes due keeps {needed:.1f} slots busy in the long run, and the living workers have {slots}; "
        f"the most have {', '.join(f'{name} ({busy[name]:.1f})' for name in most)}.",
        why="The backlog grows without end." if over else "After an outage there is hardly room to catch up.",
        mend=f"celery -A taskplatform.app worker --concurrency {max(1, math.ceil(needed / _NEARLY) - slots)}, on another machine",
    )


def _concurrency(visit: Visit, known: Sequence[InForce], busy: Mapping[str, float]) -> Iterator[Finding]:
    """How many may run at a time, beside how many do on average."""
    limits = visit.redis().store.limits()
    bound = {name: limit.concurrency for name, limit in limits.items() if limit.concurrency is not None}
    needed: defaultdict[str, float] = defaultdict(float)
    for one in known:
        for name in _limits(one, bound):
            needed[name] += busy.get(one.id, 0.0)
    for name, average in sorted(needed.items()):
        if average > bound[name]:
            enough = Limit(limits[name].per_second, limits[name].burst, math.ceil(average / _NEARLY))
            yield Finding(
                code="concurrency_cannot_carry",
                severity=Severity.CRITICAL,
                subject=name,
                what=f"By their run times {average:.1f} jobs run at a time in the long run, and limit {name} lets {bound[name]} run.",
                why="The backlog grows without end.",
                mend=f"{_command(name, enough)}, if the target can take that; else fewer subscribers or occurrences",
            )


def _hanging(known: Sequence[tuple[InForce, float]], limits: Mapping[str, Limit], slots: int) -> Iterator[Finding]:
    """What would take all slots, were each of its runs to last until its timeout."""
    bound = {name for name, limit in limits.items() if limit.concurrency is not None}
    worst = {
        one.id: one.subscribers * max(min(1.0, one.timeout_ms / max(1, one.window_ms)), one.timeout_ms / period_ms)
        for one, period_ms in known
        if one.timeout_ms is not None and not _limits(one, dict.fromkeys(bound))
    }
    over = sorted((name for name, jobs in worst.items() if slots and jobs > slots), key=lambda name: -worst[name])
    if over:
        yield Finding(
            code="timeouts_fill_slots",
            severity=Severity.INFO,
            subject=", ".join(over[:_NAMED]),
            what=f"Were what they call to hang until their timeouts, each of {len(over)} definitions could take all {slots} slots: "
            f"{over[0]} has up to {worst[over[0]]:,.0f} jobs in that time.",
            why="Then nothing else would run, until the breaker of that host opens.",
            mend=f"taskplatform limits set definition:{over[0]} --concurrency {max(1, slots // 2)}",
        )


def period(schedule: Schedule, now_ms: int) -> float | None:
    """Milliseconds between two occurrences, on average over a day, or between the next two. None where there are no two."""
    found: list[int] = []
    for at_ms in islice(occurrences(schedule, now_ms, now_ms + 800 * _DAY_MS), _MOST_OCCURRENCES):
        found.append(at_ms)
        if len(found) > 1 and at_ms > now_ms + _DAY_MS:
            break
    return (found[-1] - found[0]) / (len(found) - 1) if len(found) > 1 else None
