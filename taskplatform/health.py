"""Whether the platform does its work, and if not, what is wrong, since when, and what to do.

`check` reads the state of the store in three round trips of some 60 cheap commands, whatever is in it, and judges that alone; so it
can be asked every few seconds, also where no worker and no beat lives. What it takes for stuck it looks at once more, half a second
later, because a moment of it is normal. `alarm` writes what is an error to the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from taskplatform.model import Priority, format_duration, format_ms
from taskplatform.settings import Settings
from taskplatform.store import BreakerState, Store, Vitals, Worker

log = logging.getLogger(__name__)

#: What is due for the planner or for release is overdue after this.
OVERDUE = timedelta(seconds=30)
#: A job in a queue whose workers have slots free is stuck after this, or after twice the heartbeat timeout.
STUCK_IN_QUEUE = timedelta(minutes=1)
#: A run is too long when it has lasted so much longer than its definition's timeout, at which the pool should have killed it.
RUN_MARGIN = timedelta(minutes=1)
#: A probe of a host that is held back keeps all others from it: it is stuck after this, if its definition gives it no longer.
STUCK_PROBE = timedelta(minutes=10)
#: Parts of maxmemory and of maxclients.
_NEARLY_FULL = 0.9
_SECOND_LOOK_SECONDS = 0.5


class Severity(StrEnum):
    ERROR = "error"
    """Work stands still, or what is done may be lost."""
    WARNING = "warning"
    """It will, if nobody does anything."""
    INFO = "info"
    """Somebody wanted it so, or has to look at it some time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is not as it should be."""

    code: str
    """Stays the same over versions; one code can come several times, for different subjects."""
    severity: Severity
    subject: str
    """What it is about: a queue, a worker, a definition or a job; "" where that is the platform."""
    since_ms: int | None
    """Since when, where that is known."""
    text: str
    """What is wrong and what to do, in a sentence or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What `check` found."""

    at_ms: int
    problems: tuple[Problem, ...]
    """Errors first."""
    counters: Mapping[str, int]
    """How often happened what should be rare."""

    @property
    def well(self) -> bool:
        """Whether there is nothing but remarks."""
        return all(one.severity is Severity.INFO for one in self.problems)


def check(store: Store, settings: Settings) -> Health:
    """Look at everything. Raises StoreError, and StoreUnavailable where Redis cannot be reached."""
    vitals = store.vitals()
    found = list(_problems(vitals, settings))
    suspects = {(one.code, one.subject) for one in found if one.code in ("release_stuck", "queue_stuck")}
    if suspects:
        time.sleep(_SECOND_LOOK_SECONDS)
        vitals = store.vitals()
        again = list(_problems(vitals, settings))
        found = [one for one in again if one.code not in ("release_stuck", "queue_stuck") or (one.code, one.subject) in suspects]
    order = list(Severity)
    return Health(at_ms=vitals.now_ms, problems=tuple(sorted(found, key=lambda one: order.index(one.severity))), counters=vitals.counters)


class Alarm:
    """Says what is wrong in the log, at most once a minute."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._next = time.monotonic() + 60

    def sound(self) -> None:
        """Look, if it is time, and log what is an error. Raises StoreError."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 60
        for one in check(self._store, self._settings).problems:
            if one.severity is Severity.ERROR:
                log.error("%s: %s", one.code, one.text)


# --- the checks ------------------------------------------------------------------------------------------------------


def _problems(vitals: Vitals, settings: Settings) -> Iterator[Problem]:
    yield from _server(vitals)
    yield from _planner(vitals, settings)
    alive = [one for one in vitals.workers if vitals.now_ms - one.heartbeat_ms <= _ms(settings.heartbeat_timeout)]
    if not alive:
        yield _no_worker(vitals)
    else:
        yield from _heartbeats(vitals, settings)
        for priority in Priority:
            yield from _queue(vitals, settings, priority, [one for one in alive if one.slots and priority in one.queues])
    yield from _runs(vitals)
    yield from _breakers(vitals)
    yield from _remarks(vitals)


def _server(vitals: Vitals) -> Iterator[Problem]:
    info = vitals.server
    if info.get("role") != "master":
        yield _error(
            "redis_not_master", "Redis is a replica and takes no writes: nothing runs. Point TASKPLATFORM_REDIS_URL at the master."
        )
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if most and used >= most * _NEARLY_FULL:
        yield _problem(
            "redis_memory",
            Severity.ERROR if used >= most else Severity.WARNING,
            f"Redis uses {used / most:.0%} of its maxmemory; when it is full, no job can be made. "
            "Raise maxmemory, or shorten the settings retention and dead_retention.",
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if most and policy != "noeviction":
        yield _error("redis_evicts", f"Redis has maxmemory-policy {policy} and throws away jobs when it is full. Set it to noeviction.")
    if info.get("aof_enabled") != "1":
        yield _problem(
            "redis_aof_off",
            Severity.WARNING,
            "Redis keeps no append-only file: a crash loses all since its last snapshot. Set appendonly to yes.",
        )
    for name, what in (("aof_last_write_status", "append-only file"), ("rdb_last_bgsave_status", "snapshot")):
        if info.get(name, "ok") != "ok":
            yield _error("redis_cannot_save", f"Redis could not write its {what}. Look at its disk and its log.", subject=what)
    clients, room = int(info.get("connected_clients", 0)), int(info.get("maxclients", 0))
    if room and clients >= room * _NEARLY_FULL:
        yield _problem(
            "redis_clients",
            Severity.WARNING,
            f"Redis has {clients} connections of {room} that it takes (maxclients). Raise that, or look who opens so many.",
        )


def _planner(vitals: Vitals, settings: Settings) -> Iterator[Problem]:
    now_ms, planner = vitals.now_ms, vitals.planner
    start = "Start one: `celery -A taskplatform.app beat`, or the whole platform with `taskplatform up`."
    last = planner.get("tick") or planner.get("since")
    overdue = vitals.oldest_due_ms is not None and now_ms - vitals.oldest_due_ms > _ms(OVERDUE)
    if last is None:
        yield _error("planner_missing", f"No beat has ever run here: nothing is planned. {start}")
    elif now_ms - int(last) > _ms(settings.beat_lock_timeout) + max(5000, 2 * _ms(settings.beat_interval)):
        leader = planner.get("leader", "")
        behind = f", and something is due since {_instant(vitals.oldest_due_ms)}" if overdue else ""
        yield _error(
            "planner_stopped",
            f"No beat has planned since {_instant(int(last))}; the last was {leader}{behind}. If it runs, look at its log. {start}",
            since_ms=int(last),
            subject=leader,
        )
    elif overdue:
        yield _error(
            "planner_behind",
            f"The planner runs, but what was due at {_instant(vitals.oldest_due_ms)} is not planned yet. "
            "Look at the log of the beat that leads: it has too much to do, or cannot plan this.",
            since_ms=vitals.oldest_due_ms,
            subject=planner.get("leader", ""),
        )
    failing_since = planner.get("failing_since")
    if failing_since is not None:
        # what fails is put off again and again, and so is never overdue
        yield _error(
            "planner_failing",
            f"Since {_instant(int(failing_since))} this cannot be planned: {planner.get('error', '')}. "
            "The log of the beat that leads has the traceback; the rest is planned.",
            since_ms=int(failing_since),
            subject=planner.get("leader", ""),
        )


def _no_worker(vitals: Vitals) -> Problem:
    last = max(vitals.workers, key=lambda one: one.heartbeat_ms, default=None)
    before = f" The last was {last.id}, heard at {_instant(last.heartbeat_ms)}." if last else ""
    runs = f" {vitals.running} jobs are recorded as running, and nobody takes them over." if vitals.running else ""
    return _error(
        "no_worker",
        f"No worker is alive: nothing runs.{before}{runs} Start one: `celery -A taskplatform.app worker`.",
        since_ms=last.heartbeat_ms if last else None,
    )


def _heartbeats(vitals: Vitals, settings: Settings) -> Iterator[Problem]:
    for one in vitals.workers:
        silent_ms = vitals.now_ms - one.heartbeat_ms
        said = f"Worker {one.id} was heard last at {_instant(one.heartbeat_ms)}"
        if silent_ms > _ms(settings.heartbeat_timeout) + 2 * _ms(settings.heartbeat_interval):
            text = f"{said}, and the others do not take its jobs over. Look at their logs."
            yield _error("recovery_stuck", text, since_ms=one.heartbeat_ms, subject=one.id)
        elif silent_ms > max(_ms(settings.heartbeat_timeout) // 2, 2 * _ms(settings.heartbeat_interval)):
            lost = format_duration(settings.heartbeat_timeout)
            yield Problem(
                code="worker_late",
                severity=Severity.WARNING,
                subject=one.id,
                since_ms=one.heartbeat_ms,
                text=f"{said}: it hangs, or cannot reach Redis. After {lost} of silence its jobs go to others.",
            )


def _queue(vitals: Vitals, settings: Settings, priority: Priority, serving: list[Worker]) -> Iterator[Problem]:
    now_ms, queue = vitals.now_ms, vitals.queues[priority]
    due = queue.oldest_ready_ms is not None and queue.oldest_ready_ms <= now_ms
    if not serving:
        if due or queue.messages or queue.released:
            yield _error(
                "queue_unserved",
                f"No living worker serves the queue {priority}, where jobs are due. Start one that does, for example with `-Q {priority}`.",
                since_ms=queue.oldest_released_ms or queue.oldest_ready_ms,
                subject=priority,
            )
        return
    if due and queue.has_room and vitals.total_has_room and now_ms - (queue.oldest_ready_ms or 0) > _ms(OVERDUE):
        yield _error(
            "release_stuck",
            f"A {priority} job is due since {_instant(queue.oldest_ready_ms)}, its queue has room, and nothing releases it. "
            "Look at the workers' logs for lines about release.",
            since_ms=queue.oldest_ready_ms,
            subject=priority,
        )
    patience_ms = max(_ms(STUCK_IN_QUEUE), 2 * _ms(settings.heartbeat_timeout))
    free = [one.id for one in serving if vitals.running_on[one.id] < one.slots]
    if queue.oldest_released_ms is not None and now_ms - queue.oldest_released_ms > patience_ms and free:
        yield _error(
            "queue_stuck",
            f"A job lies in the queue {priority} since {_instant(queue.oldest_released_ms)}, while {free[0]} has slots free "
            "and does not take it. Restart that worker.",
            since_ms=queue.oldest_released_ms,
            subject=priority,
        )


def _runs(vitals: Vitals) -> Iterator[Problem]:
    for job_id, started_ms in vitals.oldest_runs:
        timeout_ms = vitals.timeouts_ms.get(job_id.partition(":")[0])
        if timeout_ms is not None and vitals.now_ms - started_ms > timeout_ms + _ms(RUN_MARGIN):
            yield _error(
                "run_too_long",
                f"Job {job_id} runs since {_instant(started_ms)}, longer than its timeout of "
                f"{format_ms(timeout_ms)}. "
                f"`taskplatform jobs show {job_id}` says where; cancel it, and restart that worker.",
                since_ms=started_ms,
                subject=job_id,
            )


def _breakers(vitals: Vitals) -> Iterator[Problem]:
    for one in vitals.breakers:
        opened = one.openings > 0
        until = "it is probed" if one.state is BreakerState.HALF_OPEN else f"it is probed from {_instant(one.until_ms)} on"
        text = f"Jobs of host {one.host} are held back ({one.reason}); {until}. "
        text += f"`taskplatform breakers reset {one.host}` ends that." if opened else "The host asked for that pause."
        severity = Severity.WARNING if opened else Severity.INFO
        yield Problem(code="breaker_open" if opened else "host_held", severity=severity, subject=one.host, since_ms=one.since_ms, text=text)
        longest_ms = max(_ms(STUCK_PROBE), vitals.timeouts_ms.get(one.probe.partition(":")[0], 0) + _ms(RUN_MARGIN))
        half_open = one.state is BreakerState.HALF_OPEN
        if half_open and one.probed_ms is not None and vitals.now_ms - one.probed_ms > longest_ms:
            yield _error(
                "probe_stuck",
                f"Job {one.probe} probes host {one.host} since {_instant(one.probed_ms)}, and the other jobs of that host wait for it. "
                f"`taskplatform jobs show {one.probe}` says where it is; cancel it, or let the host's jobs go with "
                f"`taskplatform breakers reset {one.host}`.",
                since_ms=one.probed_ms,
                subject=one.host,
            )


def _remarks(vitals: Vitals) -> Iterator[Problem]:
    if vitals.dead_letters:
        yield _problem(
            "dead_letters",
            Severity.INFO,
            f"{vitals.dead_letters} jobs failed for good. `taskplatform dead-letters list` shows them; redrive or discard them.",
        )
    for definition, why in vitals.paused.items():
        yield Problem(
            code="definition_paused",
            severity=Severity.INFO,
            subject=definition,
            since_ms=None,
            text=f"Definition {definition} is paused ({why}): none of its jobs run. `taskplatform resume {definition}` ends that.",
        )


# --- helpers ---------------------------------------------------------------------------------------------------------


def _problem(code: str, severity: Severity, text: str) -> Problem:
    return Problem(code=code, severity=severity, subject="", since_ms=None, text=text)


def _error(code: str, text: str, *, since_ms: int | None = None, subject: str = "") -> Problem:
    return Problem(code=code, severity=Severity.ERROR, subject=subject, since_ms=since_ms, text=text)


def _instant(instant_ms: int | None) -> str:
    return "" if instant_ms is None else f"{datetime.fromtimestamp(instant_ms // 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
