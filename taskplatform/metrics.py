"""The platform in Prometheus metrics: names, labels and units stand in docs/metrics.md.

There are two kinds. What is the platform's as a whole (`PlatformCollector`) is read from Redis, where each run and each end is counted by
the script that records it: so processes that are killed, pools of many processes and restarts lose nothing. Every process that serves it
gives the same figures: over several take the maximum, never the sum. What is one process's own (`ProcessCollector`) is its alone.

Labels are bounded: definitions, priorities, states, limits that are no single user's, hosts that failed of late, living workers by their
node's name, events. What can be counted is there from the start, with 0: Prometheus sees no increase in a series that begins with 1.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Generic, TypeVar

from prometheus_client import Histogram as TimedHistogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from taskplatform.errors import StoreError
from taskplatform.model import JobState, Priority
from taskplatform.pulse import Pulse
from taskplatform.settings import Settings
from taskplatform.store import BOUNDS_MS, Breaker, BreakerState, Figures, Histogram, LimitState, Store, Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

#: So long what was read for one scrape is good for another.
_KEEP_SECONDS = 1.0
#: A scrape waits so long for Redis; then it tells what the process itself knows.
_WAIT_SECONDS = 3.0
#: A counter that has become less by no more than this part is the same one, of a server that lost its last second.
_LOST_PART = 0.1
_SKIPPED = {"missed": "skipped_missed", "definition_paused": "skipped_paused", "definition_removed": "skipped_removed"}
#: What `count` in lib.lua and `Store.count` are told of.
EVENTS = (
    "breaker_closed",
    "breaker_opened",
    "dead_letters",
    "dead_letters_dropped",
    "deaf",
    "discarded",
    "garbage",
    "host_held",
    "jobs_recovered",
    "messages_reclaimed",
    "poison_pills",
    "refused",
    "stuck",
    "workers_lost",
)
#: How most jobs end that run.
_USUAL_ENDS = (JobState.COMPLETED, JobState.FAILED, JobState.TIMED_OUT)
_BOUNDS = (*(f"{bound / 1000:g}" for bound in BOUNDS_MS), "+Inf")
_TICK_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_Labels = Sequence[str]


class Recent(Generic[T]):
    """What `read` gave last. It is called when somebody asks and what is there is older than a second: by one at a time."""

    def __init__(self, read: Callable[[], T], *, keep: float, wait: float = _WAIT_SECONDS) -> None:
        self._read = read
        self._keep = keep
        self._wait = wait
        self._change = threading.Condition()
        self._reads = False
        self._value: T | None = None
        self._read_at = -1e9

    def get(self) -> T | None:
        """None where it cannot be read, or not within the time."""
        with self._change:
            if time.monotonic() - self._read_at > self._keep and not self._reads:
                self._reads = True
                # in a thread of its own: Redis may not answer for long
                threading.Thread(target=self._refresh, name="platform-figures", daemon=True).start()
            if not self._change.wait_for(lambda: not self._reads, self._wait):
                return None
            return self._value

    def _refresh(self) -> None:
        value: T | None = None
        try:
            value = self._read()
        except StoreError as fault:
            log.debug("no figures: %s", fault)
        except Exception:
            log.exception("cannot read what metrics are made of")
        with self._change:
            self._value, self._read_at, self._reads = value, time.monotonic(), False
            self._change.notify_all()


class PlatformCollector(Collector):
    """What the platform as a whole does and has done. Asks Redis when it is scraped, once a second at the most."""

    def __init__(self, store: Callable[[], Store | None], settings: Settings, *, keep: float = _KEEP_SECONDS) -> None:
        self._store = store
        self._settings = settings
        self._recent = Recent(self._figures, keep=keep)
        self._lock = threading.Lock()
        #: What each counter last was.
        self._before: dict[tuple[str, ...], float] = {}

    def _figures(self) -> tuple[Figures, float] | None:
        store = self._store()
        if store is None:
            return None
        began = time.perf_counter()
        figures = store.figures()
        return figures, time.perf_counter() - began

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry need not ask Redis to know the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families; without Redis only the one that says so."""
        found = self._recent.get()
        yield _gauge("figures_read", "Whether what is told of the whole platform could be read from Redis.", 0 if found is None else 1)
        if found is None:
            return
        figures, seconds = found
        yield _gauge("figures_read_seconds", "How long reading it took.", seconds)
        families = [*_jobs(figures), *_planner(figures), *_limits(figures), *_hosts(figures.breakers), *_processes(figures, self._settings)]
        with self._lock:
            yield from self._never_back(families)

    def _never_back(self, families: Sequence[Metric]) -> Sequence[Metric]:
        """A server that lost its last second has counters that are a little less. Prometheus would take that for a new start from 0,
        and all that was ever counted for what came since. Such a counter stands until it is what it was.
        """
        seen: dict[tuple[str, ...], float] = {}
        for family in families:
            if family.type == "gauge":
                continue
            for number, sample in enumerate(family.samples):
                key = (sample.name, *sample.labels.values())
                before = self._before.get(key, 0.0)
                value = before if before * (1 - _LOST_PART) <= sample.value < before else sample.value
                seen[key] = value
                family.samples[number] = sample._replace(value=value)
        self._before = seen
        return families


class ProcessCollector(Collector):
    """What one process has to say of itself. `more` gives the rest, in families of its own."""

    def __init__(
        self,
        role: str,
        pulses: Sequence[Pulse],
        *,
        live: Callable[[], bool],
        ready: Callable[[], bool],
        more: Callable[[], Iterable[Metric]] = lambda: (),
    ) -> None:
        self._role = role
        self._pulses = pulses
        self._live = live
        self._ready = ready
        self._more = more

    def describe(self) -> Iterable[Metric]:
        """Nothing, as above."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        info = _family(GaugeMetricFamily, "build_info", "What this process is: 1.", ("role", "version"))
        info.add_metric((self._role, _version()), 1)
        yield info
        yield _gauge("live", "What /health says: 1 where this process makes progress.", int(self._live()))
        yield _gauge("ready", "What /ready says: 1 where this process can do its work.", int(self._ready()))
        age = _family(GaugeMetricFamily, "loop_age_seconds", "How long ago a loop of this process last got on.", ("loop",))
        rounds = _family(CounterMetricFamily, "loop_rounds", "Rounds of a loop of this process, successful or not.", ("loop",))
        for pulse in self._pulses:
            age.add_metric((pulse.name,), round(pulse.age_seconds, 3))
            rounds.add_metric((pulse.name,), pulse.rounds)
        yield age
        yield rounds
        yield from self._more()


def worker_metrics(*, slots: int, running: int, unrecorded: int) -> Iterator[Metric]:
    """Of one worker, for its `ProcessCollector`."""
    yield _gauge("pool_slots", "Jobs that this worker can run at a time.", slots)
    yield _gauge("pool_running", "Jobs that this worker runs.", running)
    yield _gauge("unrecorded_ends", "Ends of runs that this worker keeps until Redis can be told.", unrecorded)


def beat_metrics(*, leads: bool) -> Iterator[Metric]:
    """Of one beat."""
    yield _gauge("beat_leads", "Whether this beat leads: 1, or stands by: 0.", int(leads))


def tick_seconds() -> TimedHistogram:
    """How long one beat's ticks take, to be told of each."""
    return TimedHistogram(
        "taskplatform_beat_tick_seconds", "Ticks of this beat, by how long they took.", registry=None, buckets=_TICK_BOUNDS
    )


# --- the platform ----------------------------------------------------------------------------------------------------


def _jobs(figures: Figures) -> Iterator[Metric]:
    entered = _family(CounterMetricFamily, "job_states", "Jobs that entered a state.", ("state",))
    for state, times in figures.entered.items():
        entered.add_metric((state,), times)
    yield entered
    ended = _family(CounterMetricFamily, "jobs_ended", "Jobs that ended, by how.", ("definition", "priority", "state"))
    retried = _family(CounterMetricFamily, "retries", "Attempts that failed and are followed by another.", ("definition", "priority"))
    late = _family(
        CounterMetricFamily, "timeouts", "Runs that a time limit ended, whether another attempt follows or not.", ("definition",)
    )
    lost = _family(CounterMetricFamily, "runs_lost", "Runs whose process or worker died, or that were stuck.", ("definition",))
    runs = _family(
        HistogramMetricFamily, "run_seconds", "Runs, by the time from the record of the start to that of the end.", ("definition",)
    )
    for definition in figures.definitions:
        counts = figures.counts[definition]
        own = [figures.own_priorities[definition]] if definition in figures.own_priorities else []
        for (priority, state), times in sorted(({(one, state): 0 for one in own for state in _USUAL_ENDS} | dict(counts.ended)).items()):
            ended.add_metric((definition, priority, state), times)
        for priority, times in sorted((dict.fromkeys(own, 0) | dict(counts.retried)).items()):
            retried.add_metric((definition, priority), times)
        late.add_metric((definition,), counts.late)
        lost.add_metric((definition,), counts.lost)
        _add_histogram(runs, (definition,), counts.runs)
    yield from (ended, retried, late, lost, runs)
    lag = _family(HistogramMetricFamily, "release_lag_seconds", "Starts, by the time since the job was due.", ("priority",))
    for priority, histogram in figures.lags.items():
        _add_histogram(lag, (priority,), histogram)
    yield lag

    waiting = _family(GaugeMetricFamily, "jobs_waiting", "Jobs that are not released yet, due or not.", ("definition", "priority"))
    due = _family(GaugeMetricFamily, "jobs_due", "Of these, jobs whose time has come.", ("definition", "priority"))
    for family, jobs in ((waiting, figures.waiting), (due, figures.due)):
        for (definition, priority), number in sorted(jobs.items()):
            family.add_metric((definition, priority), number)
        yield family
    queued = _family(GaugeMetricFamily, "jobs_queued", "Jobs that are released and not started, by queue.", ("priority",))
    for priority, number in figures.queued.items():
        queued.add_metric((priority,), number)
    yield queued
    running = _family(GaugeMetricFamily, "jobs_running", "Jobs that run.", ("definition",))
    for definition in figures.definitions:
        running.add_metric((definition,), figures.running.get(definition, 0))
    yield running
    in_flight = sum(figures.queued.values()) + sum(figures.running.values())
    yield _gauge("jobs_in_flight", "Jobs that are released and not ended.", in_flight)
    age = _family(
        GaugeMetricFamily,
        "oldest_waiting_seconds",
        "How long the job has been due that waits for the longest time; 0: none is. Without paused definitions.",
        ("priority",),
    )
    for priority in Priority:
        since = [at for (name, lane), at in figures.oldest_ms.items() if lane is priority and name not in figures.paused]
        age.add_metric((priority,), max(0, figures.now_ms - min(since)) / 1000 if since else 0)
    yield age
    yield _gauge("dead_letters", "Jobs that failed for good, and are kept to be looked at.", figures.dead_letters)
    paused = _family(GaugeMetricFamily, "definition_paused", "Whether a definition is paused.", ("definition",))
    for definition in figures.definitions:
        paused.add_metric((definition,), int(definition in figures.paused))
    yield paused
    events = _family(CounterMetricFamily, "events", "What happened and should be rare.", ("event",))
    for event, times in sorted((dict.fromkeys(EVENTS, 0) | dict(figures.counters)).items()):
        events.add_metric((event,), times)
    yield events


def _planner(figures: Figures) -> Iterator[Metric]:
    planner = figures.planner
    behind_ms = 0 if figures.oldest_due_ms is None else max(0, figures.now_ms - figures.oldest_due_ms)
    yield _gauge("planner_lag_seconds", "How long ago the planner should have looked at what it has not looked at yet.", behind_ms / 1000)
    tick = _family(GaugeMetricFamily, "planner_tick_age_seconds", "How long ago a leading beat last planned.", ())
    if "tick" in planner:
        tick.add_metric((), max(0, figures.now_ms - int(planner["tick"])) / 1000)
    yield tick
    yield _gauge("planner_failing", "Whether there is something that cannot be planned.", int("failing_since" in planner))
    yield _counter("jobs_planned", "Jobs that were made by schedule, catching up, trigger or backfill.", int(planner.get("planned", 0)))
    yield _counter("windows_widened", "Windows that limits made wider or later.", int(planner.get("widened", 0)))
    skipped = _family(CounterMetricFamily, "occurrences_skipped", "Occurrences without jobs, by why.", ("reason",))
    for reason, field in _SKIPPED.items():
        skipped.add_metric((reason,), int(planner.get(field, 0)))
    yield skipped


def _limits(figures: Figures) -> Iterator[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return _family(GaugeMetricFamily, name, text, ("limit",))

    tokens = gauge("limit_tokens", "Jobs that a rate lets start now; below 0 when it was lowered.")
    reserved = gauge("limit_reserved", "Released jobs that have a token of a rate and have not started.")
    in_flight = gauge("limit_in_flight", "Jobs in flight under a concurrency limit; of the limit user, those of the busiest user.")
    used = _family(
        GaugeMetricFamily, "limit_utilization_ratio", "Part of a limit's burst or concurrency that is in use.", ("limit", "kind")
    )
    for one in figures.limits:
        if one.tokens is not None:
            tokens.add_metric((one.name,), round(one.tokens, 3))
            reserved.add_metric((one.name,), one.reserved)
            used.add_metric((one.name, "rate"), _used_rate(one))
        if one.limit.concurrency is not None:
            in_flight.add_metric((one.name,), one.in_flight or 0)
            used.add_metric((one.name, "concurrency"), round((one.in_flight or 0) / one.limit.concurrency, 3))
    yield from (tokens, reserved, in_flight, used)
    waiting = gauge("limit_waiting_jobs", "Jobs that are due and held back by a limit, as release last found it.")
    for name, jobs in sorted(figures.held_by.items()):
        waiting.add_metric((name,), jobs)
    yield waiting
    yield _gauge("users_capped", "Users with jobs that are set aside until another of theirs ends.", figures.capped_users)


def _hosts(breakers: Sequence[Breaker]) -> Iterator[Metric]:
    state = _family(GaugeMetricFamily, "breaker_state", "The state of a host's breaker: 1, and 0 of its other states.", ("host", "state"))
    failed = _family(GaugeMetricFamily, "host_failure_ratio", "Failed part of a host's calls, as its breaker counts them.", ("host",))
    held = _family(GaugeMetricFamily, "hosts_held", "Hosts whose jobs are held back, by the state of their breaker.", ("state",))
    for one in breakers:
        # most are well, and there may be as many as definitions
        if one.state is not BreakerState.CLOSED or one.failures:
            for each in BreakerState:
                state.add_metric((one.host, each), int(one.state is each))
        if one.calls:
            failed.add_metric((one.host,), round(one.failures / one.calls, 3))
    for each in BreakerState:
        if each is not BreakerState.CLOSED:
            held.add_metric((each,), sum(one.state is each for one in breakers))
    yield from (state, failed, held)


def _used_rate(one: LimitState) -> float:
    assert one.tokens is not None
    most = one.limit.capacity / one.limit.tokens_per_start
    return round(min(1.0, max(0.0, 1 - one.tokens / most)), 3) if most else 1.0


def _processes(figures: Figures, settings: Settings) -> Iterator[Metric]:
    yield _gauge("users", "Users, paused ones too.", figures.users)
    timeout_ms = settings.heartbeat_timeout.total_seconds() * 1000
    alive = [one for one in figures.workers if figures.now_ms - one.heartbeat_ms <= timeout_ms]
    yield _gauge("workers", "Workers whose heartbeat is not too old.", len(alive))
    serving = _family(GaugeMetricFamily, "slots", "Slots of living workers that serve a queue.", ("priority",))
    for priority in Priority:
        serving.add_metric((priority,), sum(one.slots for one in alive if priority in one.queues))
    yield serving
    # one that was started anew may be there twice, until its former life counts as lost
    by_node: dict[str, Worker] = {}
    for one in sorted(figures.workers, key=lambda each: each.heartbeat_ms):
        by_node[one.id.rpartition("#")[0] or one.id] = one
    slots = _family(GaugeMetricFamily, "worker_slots", "Slots that a worker offers.", ("worker",))
    running = _family(GaugeMetricFamily, "worker_running", "Jobs that a worker runs.", ("worker",))
    age = _family(GaugeMetricFamily, "worker_heartbeat_age_seconds", "How long ago a worker last said that it lives.", ("worker",))
    for node, one in sorted(by_node.items()):
        slots.add_metric((node,), one.slots)
        running.add_metric((node,), figures.running_on[one.id])
        age.add_metric((node,), max(0, figures.now_ms - one.heartbeat_ms) / 1000)
    yield from (slots, running, age)
    timeout_ms = settings.beat_lock_timeout.total_seconds() * 1000
    beats = [one for one in figures.beats if figures.now_ms - one.heartbeat_ms <= timeout_ms]
    yield _gauge("beats", "Beats that live.", len(beats))
    yield _gauge("leaders", "Of these, beats that say that they lead.", sum(one.leads for one in beats))


# --- helpers ---------------------------------------------------------------------------------------------------------

F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily)


def _family(kind: type[F], name: str, text: str, labels: _Labels) -> F:
    return kind(f"taskplatform_{name}", text, labels=labels)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = _family(GaugeMetricFamily, name, text, ())
    family.add_metric((), value)
    return family


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    family = _family(CounterMetricFamily, name, text, ())
    family.add_metric((), value)
    return family


def _add_histogram(family: HistogramMetricFamily, labels: _Labels, one: Histogram) -> None:
    buckets = list(zip(_BOUNDS, (*one.upto, one.total), strict=True))
    family.add_metric(labels, buckets, one.sum_ms / 1000)


def _version() -> str:
    try:
        return version("taskplatform")
    except PackageNotFoundError:
        return "unknown"
