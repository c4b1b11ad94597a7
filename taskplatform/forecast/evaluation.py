"""From the course of a simulation to what a forecast says. Pure."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from taskplatform.fluid import Lane, Stream
from taskplatform.forecast.result import Backlog, LimitUse, Point, Span, Track, Widening
from taskplatform.forecast.simulation import Opened, Simulation
from taskplatform.model import Limit, format_rate

#: A limit of which so much is used is used up.
_USED_UP = 0.99
#: From so much on it is a burst that is used.
_BURST = 1.05
#: A bucket with less is empty.
_EMPTY = 0.1
#: Less of a job is none.
_NONE = 0.005
#: A backlog of fewer jobs is none.
_BACKLOG = 1.0
_MOST_NAMED = 5


def limit_text(limit: Limit) -> str:
    """Such as `10/s burst 15 concurrency 4`."""
    rate = f"{format_rate(limit.per_second)} burst {limit.burst}" if limit.per_second is not None else ""
    concurrency = f"concurrency {limit.concurrency}" if limit.concurrency is not None else ""
    return " ".join(filter(None, (rate, concurrency))) or "none"


def tracks(stream: Stream, by: Callable[[Lane], str], *, points: bool = True) -> list[Track]:
    """What comes, by what `by` says of a lane ("" is left out); the one with the most requests first."""
    lanes: defaultdict[str, list[Lane]] = defaultdict(list)
    for lane in stream.lanes.values():
        if name := by(lane):
            lanes[name].append(lane)
    found = [_track(stream, name, some, points) for name, some in lanes.items()]
    return sorted((one for one in found if one.jobs or one.backlog), key=lambda one: (-one.requests, one.name))


def _track(stream: Stream, name: str, lanes: Sequence[Lane], points: bool) -> Track:
    jobs = _sum(lane.planned for lane in lanes)
    requests = _sum(array("d", [gone * lane.attempts for gone in lane.gone]) for lane in lanes)
    backlog = _sum(lane.backlog for lane in lanes)
    top = max(range(stream.bins), key=requests.__getitem__)
    return Track(
        name=name,
        jobs=round(sum(jobs), 2),
        requests=round(sum(requests), 2),
        peak=round(requests[top] * 60_000 / stream.bin_ms, 2),
        peak_at_ms=stream.start_ms + top * stream.bin_ms if requests[top] else None,
        backlog=round(max(backlog), 2),
        delay_ms=round(max(max(lane.delay) for lane in lanes)),
        points=tuple(_points(jobs, requests, backlog)) if points else (),
    )


def _points(*series: Sequence[float]) -> Iterable[Point]:
    for bin_, of in enumerate(zip(*series, strict=True)):
        if any(one >= _NONE for one in of):
            yield Point(bin_, *(round(one, 2) for one in of))


def _sum(series: Iterable[array[float]]) -> array[float]:
    first, *rest = series
    if not rest:
        return first
    return array("d", map(sum, zip(first, *rest, strict=True)))


def spans(stream: Stream, bins: Sequence[bool]) -> tuple[Span, ...]:
    """The runs of true bins; one false bin between two does not part them."""
    found: list[list[int]] = []
    for bin_, one in enumerate(bins):
        if one and found and bin_ - found[-1][1] <= 2:
            found[-1][1] = bin_
        elif one:
            found.append([bin_, bin_])
    return tuple(
        Span(
            max(stream.begin_ms, stream.start_ms + first * stream.bin_ms),
            min(stream.start_ms + (last + 1) * stream.bin_ms, stream.end_ms),
            last == len(bins) - 1,
        )
        for first, last in found
    )


def limit_uses(simulation: Simulation) -> list[LimitUse]:
    """Of each limit of the total, a definition or a host that something is under; the most used first."""
    stream = simulation.stream
    windows = Counter(one.limit for one in simulation.opened if one.limit)
    found = []
    for name, limit in simulation.limits().items():
        lanes = [lane for lane in stream.lanes.values() if name in lane.limits]
        if not lanes:
            continue
        used = [0.0] * stream.bins
        short = [False] * stream.bins
        for resource, most in (
            (stream.buckets.get(name), stream.bin_ms * (limit.sustained or 0) / 1000),
            (stream.places.get(name), stream.bin_ms * (limit.concurrency or 0)),
        ):
            if resource is not None:
                used = [max(before, one / most) for before, one in zip(used, resource.used, strict=True)]
                short = [before or bool(one) for before, one in zip(short, resource.short, strict=True)]
        top = max(range(stream.bins), key=used.__getitem__)
        bucket = stream.buckets.get(name)
        left = bucket.left if bucket is not None else [0.0] * stream.bins
        full = [_is_full(*one) for one in zip(used, short, left, strict=True)]
        asking = Counter({lane.definition: sum(jobs for jobs, is_full in zip(lane.gone, full, strict=True) if is_full) for lane in lanes})
        found.append(
            LimitUse(
                name=name,
                limit=limit_text(limit),
                share=round(used[top], 3),
                at_ms=stream.start_ms + top * stream.bin_ms if used[top] else None,
                saturated=spans(stream, full),
                windows=windows[name],
                definitions=tuple(one for one, jobs in asking.most_common(_MOST_NAMED) if jobs) if any(full) else (),
            )
        )
    return sorted(found, key=lambda one: (not one.saturated, -one.share, one.name))


def _is_full(used: float, short: bool, left: float) -> bool:
    """Whether a limit is used up in a bin, in which this part of it was used, and after which its bucket is so full.

    More than it lets through in the long run is a burst, which is no matter while the bucket has more.
    """
    return short or (used >= _USED_UP and (used <= _BURST or left < _EMPTY))


def backlogs(stream: Stream) -> list[Backlog]:
    """Of all, of each priority, host and definition."""
    kinds: list[Callable[[Lane], str]] = [
        lambda lane: "total",  # noqa: ARG005
        lambda lane: f"priority:{lane.priority}",
        lambda lane: f"host:{lane.host}" if lane.host else "",
        lambda lane: f"definition:{lane.definition}",
    ]
    found: list[Backlog] = []
    for kind in kinds:
        lanes: defaultdict[str, list[Lane]] = defaultdict(list)
        for lane in stream.lanes.values():
            if (name := kind(lane)) and max(lane.backlog) >= _BACKLOG / 2:
                lanes[name].append(lane)
        for name, some in lanes.items():
            found += _backlogs_of(stream, name, some)
    return sorted(found, key=lambda one: (one.of != "total", -one.delay_ms, one.of, one.begin_ms))


def _backlogs_of(stream: Stream, name: str, lanes: Sequence[Lane]) -> Iterable[Backlog]:
    waits = _sum(lane.backlog for lane in lanes)
    for span in spans(stream, [one >= _BACKLOG for one in waits]):
        first = (span.begin_ms - stream.start_ms) // stream.bin_ms
        last = math.ceil((span.end_ms - stream.start_ms) / stream.bin_ms)
        because = {
            limit
            for lane in lanes
            for limit in lane.limits
            for resource in (stream.buckets.get(limit), stream.places.get(limit))
            if resource is not None and any(resource.short[first:last])
        }
        workers = {"workers"} if any(any(places.short[first:last]) for places in stream.slots) else set()
        yield Backlog(
            of=name,
            begin_ms=span.begin_ms,
            # the last of them go in the bin at whose end none is left
            end_ms=min(span.end_ms if span.open else span.end_ms + stream.bin_ms, stream.end_ms),
            open=span.open,
            jobs=round(max(waits[first:last]), 2),
            delay_ms=round(max(max(lane.delay[first : last + 1]) for lane in lanes)),
            because=tuple(sorted(because | workers)),
        )


def widenings(opened: Iterable[Opened]) -> list[Widening]:
    """By definition; the widest first."""
    by_definition: defaultdict[str, list[Opened]] = defaultdict(list)
    for one in opened:
        if one.limit:
            by_definition[one.definition].append(one)
    found = []
    for name, some in by_definition.items():
        worst = max(some, key=lambda one: (one.start_ms + one.window_ms - one.at_ms, -one.at_ms))
        found.append(
            Widening(
                definition=name,
                windows=len(some),
                at_ms=worst.at_ms,
                asked_ms=worst.asked_ms,
                window_ms=worst.window_ms,
                delay_ms=max(0, worst.start_ms - worst.at_ms),
                jobs=round(worst.jobs, 2),
                limit=worst.limit,
                beyond_ms=max(_beyond_ms(one) for one in some),
            )
        )
    return sorted(found, key=lambda one: (-one.window_ms - one.delay_ms, one.definition))


def _beyond_ms(one: Opened) -> int:
    return 0 if one.following_ms is None else max(0, one.start_ms + one.window_ms - one.following_ms)


def busy_slots(stream: Stream) -> list[float]:
    """How many slots are busy, in the mean of each bin."""
    edges = [max(stream.begin_ms, stream.start_ms + bin_ * stream.bin_ms) for bin_ in range(stream.bins)] + [stream.end_ms]
    return [sum(places.used[bin_] for places in stream.slots) / (edges[bin_ + 1] - edges[bin_]) for bin_ in range(stream.bins)]
