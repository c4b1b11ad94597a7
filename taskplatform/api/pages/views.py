"""What the pages show: each function reads one page's worth, in a handful of pipelined reads whatever the platform's size."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from taskplatform.answers import Answer, Waits
from taskplatform.api.growth import ONE_AT_A_TIME
from taskplatform.api.problem import RETRY_SECONDS, with_status
from taskplatform.forecast import Forecast, warnings_of
from taskplatform.forecast.plot import plot_svg
from taskplatform.health import Health
from taskplatform.model import Definition, Job, JobState, Limit, Priority, Subscription, Transition, User
from taskplatform.platform import Platform
from taskplatform.schedule import next_occurrence
from taskplatform.store import Beat, Breaker, BreakerState, Figures, Histogram, LimitState, Occurrence, Page, Worker

#: Rows of a table of jobs, definitions or subscriptions.
ROWS = 50
#: Workers, beats, limits and hosts of the first page, each; the commands list all.
MOST_LISTED = 12
#: Running jobs whose own priority is looked up; of more the sum is shown.
_MOST_RUNNING = 500
#: A definition is in trouble when a job waits this long after it is due, or fewer of its jobs end well.
_LATE = timedelta(minutes=1)
_WELL = 0.99
_SAID_ONCE = ("not_subscribed", "forgotten")
_ENDED_WELL, _ENDED_BADLY = JobState.COMPLETED, (JobState.FAILED, JobState.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class PriorityRow:
    """The jobs of one priority."""

    priority: Priority
    waiting: int
    due: int
    oldest_ms: int | None
    """Since when its oldest job is due, where one is that is not paused."""
    queued: int
    running: int | None
    """None: so many run in all that nobody looks at each."""
    lag: Histogram


@dataclass(frozen=True, slots=True)
class Now:
    """The first page."""

    now_ms: int
    health: Health
    figures: Figures
    priorities: Sequence[PriorityRow]
    running: int
    workers: Sequence[tuple[Worker, str]]
    """Each with how it is."""
    beats: Sequence[Beat]
    limits: Sequence[tuple[LimitState, int]]
    """Each with how many due jobs wait for it; those first for which most wait, and then those of which most is used."""
    breakers: Sequence[Breaker]
    """Of hosts that are held back."""


def now(platform: Platform) -> Now:
    """How it is."""
    store = platform.store
    health, figures = platform.health(), store.figures()
    workers = store.workers()
    running = [job_id for one in workers for job_id in one.running]
    of_priority = Counter(job.priority for job in store.jobs_by_id(running)) if len(running) <= _MOST_RUNNING else None
    patience_ms = platform.settings.heartbeat_timeout / timedelta(milliseconds=1)
    held = figures.held_by
    return Now(
        now_ms=figures.now_ms,
        health=health,
        figures=figures,
        priorities=[
            PriorityRow(
                priority=priority,
                waiting=_of(figures.waiting, priority),
                due=_of(figures.due, priority),
                oldest_ms=_oldest(figures, priority=priority),
                queued=figures.queued[priority],
                running=None if of_priority is None else of_priority[priority],
                lag=figures.lags[priority],
            )
            for priority in Priority
        ],
        running=len(running),
        workers=[(one, _how(one, figures.now_ms, patience_ms)) for one in workers],
        beats=sorted(figures.beats, key=lambda one: (not one.leads, one.id)),
        limits=sorted(((one, held.get(one.name, 0)) for one in figures.limits), key=lambda row: (-row[1], -_used(row[0]), row[0].name)),
        breakers=[one for one in figures.breakers if one.state is not BreakerState.CLOSED],
    )


def _of(jobs: Mapping[tuple[str, Priority], int], priority: Priority) -> int:
    return sum(count for (_, of), count in jobs.items() if of is priority)


def _oldest(figures: Figures, *, priority: Priority | None = None, definition: str | None = None) -> int | None:
    found = [
        at
        for (name, of), at in figures.oldest_ms.items()
        if at <= figures.now_ms and priority in (None, of) and definition in (None, name) and name not in figures.paused
    ]
    return min(found, default=None)


def _used(state: LimitState) -> float:
    """Which part of a limit is, and 2 for that of all jobs, which is always of interest."""
    rule = state.limit
    rate = 0.0 if state.tokens is None else 1 - state.tokens * rule.tokens_per_start / rule.capacity
    running = 0.0 if not rule.concurrency or state.in_flight is None else state.in_flight / rule.concurrency
    return 2.0 if state.name == "total" else max(round(rate, 2), running)


def _how(worker: Worker, now_ms: int, patience_ms: float) -> str:
    if now_ms - worker.heartbeat_ms > patience_ms / 2:
        return "silent"
    return "drained" if worker.drained else "active"


# --- definitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DefinitionRow:
    """A definition and how its jobs fare."""

    definition: Definition
    paused: bool
    next_ms: int | None
    """Its next occurrence by its own schedule."""
    good: int
    """Jobs that completed since it is counted."""
    ended: int
    """These and those that failed or timed out."""
    waiting: int
    running: int
    oldest_ms: int | None
    runs: Histogram

    @property
    def mean_ms(self) -> float | None:
        """Of a run."""
        return self.runs.sum_ms / self.runs.total if self.runs.total else None

    def in_trouble(self, now_ms: int) -> bool:
        """Whether somebody should look at it."""
        late = self.oldest_ms is not None and now_ms - self.oldest_ms > _LATE / timedelta(milliseconds=1)
        return self.paused or late or (self.ended > 0 and self.good < _WELL * self.ended)


def definitions(platform: Platform, *, like: str, trouble: bool, after: str) -> tuple[int, list[DefinitionRow], str | None, int]:
    """Those that `like` stands in, by id: the time, the rows of a page, the last of these where there are more, and how many in all."""
    figures = platform.store.figures()
    wanted = like.strip().lower()
    fitting = [
        definition_row(one, figures) for name, one in sorted(platform.catalogue.items()) if wanted in name or wanted in one.name.lower()
    ]
    if trouble:
        fitting = [row for row in fitting if row.in_trouble(figures.now_ms)]
    left = [row for row in fitting if row.definition.id > after]
    shown = left[:ROWS]
    return figures.now_ms, shown, shown[-1].definition.id if len(left) > len(shown) else None, len(fitting)


def definition_row(definition: Definition, figures: Figures) -> DefinitionRow:
    """One of them."""
    counts = figures.counts.get(definition.id)
    ends: Counter[JobState] = Counter()
    for (_, state), times in (counts.ended if counts else {}).items():
        ends[state] += times
    good = ends[_ENDED_WELL]
    return DefinitionRow(
        definition=definition,
        paused=definition.id in figures.paused,
        next_ms=next_occurrence(definition.schedule, figures.now_ms),
        good=good,
        ended=good + sum(ends[state] for state in _ENDED_BADLY),
        waiting=sum(count for (name, _), count in figures.waiting.items() if name == definition.id),
        running=figures.running.get(definition.id, 0),
        oldest_ms=_oldest(figures, definition=definition.id),
        runs=counts.runs if counts else Histogram((), 0, 0),
    )


@dataclass(frozen=True, slots=True)
class DefinitionPage:
    """One definition."""

    now_ms: int
    row: DefinitionRow
    why_paused: str
    subscribers: int
    occurrences: Sequence[Occurrence]
    jobs: Page[Job]


def definition(platform: Platform, name: str, *, cursor: str | None) -> DefinitionPage:
    """A definition with its newest occurrences and jobs. Raises UnknownDefinition."""
    known = platform.definition(name)
    figures = platform.store.figures()
    return DefinitionPage(
        now_ms=figures.now_ms,
        row=definition_row(known, figures),
        why_paused=platform.store.definition_pauses().get(name, ""),
        subscribers=platform.count_subscribers(name),
        occurrences=platform.occurrences(name, limit=10),
        jobs=platform.jobs(definition=name, cursor=cursor, limit=ROWS),
    )


# --- users -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UserPage:
    """One user."""

    now_ms: int
    user: User
    subscriptions: Sequence[tuple[Subscription, str]]
    """Each with how it is."""
    jobs: Page[Job]


def user(platform: Platform, name: str, *, cursor: str | None) -> UserPage:
    """A user with all subscriptions, of which there are no more than definitions, and the newest jobs. Raises UnknownUser."""
    found = platform.user(name)
    pauses = platform.store.definition_pauses()
    return UserPage(
        now_ms=platform.now_ms(),
        user=found,
        subscriptions=[(one, how(one, found, one.definition in pauses)) for one in platform.subscriptions(name)],
        jobs=platform.jobs(user=name, cursor=cursor, limit=ROWS),
    )


def told_once(answers: Sequence[Answer]) -> list[Answer]:
    """Answers without those that only say again that nobody was subscribed, or that it is too long ago."""
    before = [None, *(one.outcome for one in answers)]
    return [one for one, last in zip(answers, before, strict=False) if one.outcome != last or one.outcome not in _SAID_ONCE]


def how(subscription: Subscription, owner: User, definition_paused: bool) -> str:
    """Whether a subscription makes jobs: active, off or paused."""
    if not subscription.enabled:
        return "off"
    return "paused" if subscription.paused or owner.paused or definition_paused else "active"


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stretch:
    """The time that a job was in one state."""

    state: str
    since_ms: int
    span_ms: int
    ended: bool
    """It is the job's end."""
    x: float
    """Where it begins in the picture, and how wide it is there: of 1000."""
    width: float


@dataclass(frozen=True, slots=True)
class JobPage:
    """One job."""

    now_ms: int
    job: Job
    history: Sequence[Transition]
    stretches: Sequence[Stretch]
    waits: Waits | None
    """What holds it back, while it waits."""
    dead: bool


def job(platform: Platform, job_id: str) -> JobPage:
    """A job with its history. Raises UnknownJob."""
    found = platform.job(job_id)
    history = platform.history(job_id)
    now_ms = platform.now_ms()
    return JobPage(
        now_ms=now_ms,
        job=found,
        history=history,
        stretches=timeline(history, now_ms),
        waits=platform.waits(found),
        dead=found.state in _ENDED_BADLY,
    )


def timeline(history: Sequence[Transition], now_ms: int) -> list[Stretch]:
    """How long a job was in each state, one after the other; the last until now, unless the job has ended.

    In the picture a stretch is as wide as it is long, but wide enough to be seen: a job that waited an hour and ran a second did run.
    """
    changes = [line for line in history if line.from_state is not line.to_state]
    spans: list[tuple[JobState, int, int]] = []
    for place, line in enumerate(changes):
        last = place == len(changes) - 1
        until = changes[place + 1].at_ms if not last else line.at_ms if line.to_state.terminal else max(now_ms, line.at_ms)
        spans.append((line.to_state, line.at_ms, max(0, until - line.at_ms)))
    whole = sum(length for _, _, length in spans)
    least = min(24.0, 1000 / max(1, len(spans)))
    shares = [max(least, 1000 * length / whole) if whole else 1000 / len(spans) for _, _, length in spans]
    fitted = [one * 1000 / sum(shares) for one in shares]
    return [
        Stretch(
            state=state.value,
            since_ms=since,
            span_ms=length,
            ended=state.terminal and place == len(spans) - 1,
            x=round(sum(fitted[:place]), 2),
            width=round(fitted[place], 2),
        )
        for place, (state, since, length) in enumerate(spans)
    ]


# --- what is to come -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What somebody wants to know of the hours to come."""

    hours: float
    enable: tuple[tuple[str, int], ...] = ()
    limits: tuple[tuple[str, Limit], ...] = ()
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class ForecastPage:
    """The hours to come."""

    forecast: Forecast
    warnings: Sequence[str]
    """What would be worse than as things are, where something else was asked for."""
    plot: str
    """As a URL that holds all of it: the picture is loaded from nowhere, and cannot reach into the page."""


class Forecasts:
    """Those that were asked for of late. A forecast is arithmetic for seconds: it is made by one at a time, and serves some seconds."""

    def __init__(self, *, keep: float = 30.0, patience: float = 10.0, most: int = 8) -> None:
        self._keep = keep
        self._patience = patience
        self._most = most
        self._made: dict[Asked, tuple[float, ForecastPage]] = {}

    def get(self, platform: Platform, asked: Asked) -> ForecastPage:
        """A forecast. Raises InvalidInput, UnknownDefinition, StoreError, and Problem where it would have to wait for too many others."""
        if not ONE_AT_A_TIME.acquire(timeout=self._patience):
            raise with_status(503, "other forecasts are being made", headers={"Retry-After": str(RETRY_SECONDS)})
        try:
            made = self._made.get(asked)
            if made is None or time.monotonic() - made[0] > self._keep:
                made = time.monotonic(), self._make(platform, asked)
                self._made.pop(asked, None)
                self._made[asked] = made
                for oldest in list(self._made)[: -self._most]:
                    del self._made[oldest]
            return made[1]
        finally:
            ONE_AT_A_TIME.release()

    def _make(self, platform: Platform, asked: Asked) -> ForecastPage:
        found = platform.forecast(hours=asked.hours, enable=asked.enable, limits=dict(asked.limits), slots=asked.slots)
        picture = base64.b64encode(plot_svg(found).encode()).decode()
        return ForecastPage(found, warnings_of(found), f"data:image/svg+xml;base64,{picture}")
