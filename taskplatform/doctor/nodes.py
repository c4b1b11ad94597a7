"""The checks of what runs: workers, beats, their clocks and versions, and the sets that jobs pass through."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.server import clock_finding
from taskplatform.doctor.trend import growth
from taskplatform.doctor.visit import Nothing, Visit
from taskplatform.model import Priority, format_duration, span_text
from taskplatform.node import digest, read_clock, versions
from taskplatform.store import Beat, Worker

_WORKER_CODES = ("no_worker", "worker_late", "recovery_stuck", "queue_unserved")
_PLANNER_CODES = ("planner_missing", "planner_stopped", "planner_behind", "planner_failing")
_STUCK_CODES = ("release_stuck", "queue_stuck", "run_too_long", "dead_letters")
#: Before a second look at who leads.
_TAKE_OVER_SECONDS = 1.0
#: Between two looks at what should not grow.
_SAMPLE_SECONDS = 1.5
#: A backlog is one when so many jobs wait, the first for so long.
_BACKLOG_JOBS, _BACKLOG_MS = 100, 60_000
#: A job that was released so long ago and has not started waits behind what runs too long.
_OLD_RELEASE_MS = 15 * 60_000
#: So many messages more in a queue than jobs that were released are somebody else's.
_STRANGE_MESSAGES = 10
_FRESH_GARBAGE_MS = 3_600_000
_NEARLY_FULL = 0.9
#: More than these in some hours are no chance.
_DEAD_LETTERS = 10
#: The sweep comes each minute, and after a long outage has much to do.
_SWEEP_LATE_MS = 15 * 60_000


def living_workers(visit: Visit) -> list[Worker]:
    """Those whose heartbeat counts."""
    vitals = visit.read().vitals
    return [one for one in vitals.workers if vitals.now_ms - one.heartbeat_ms <= _ms(visit.settings.heartbeat_timeout)]


def living_beats(visit: Visit) -> list[Beat]:
    """Those that would keep the lock."""
    return _living(visit, visit.read().beats, visit.read().vitals.now_ms)


def _living(visit: Visit, beats: Sequence[Beat], now_ms: int) -> list[Beat]:
    return [one for one in beats if now_ms - one.heartbeat_ms <= _ms(visit.settings.beat_lock_timeout)]


def workers(visit: Visit) -> Iterator[Finding]:
    """Whether workers live, are heard, and serve all queues."""
    alive = living_workers(visit)
    slots = sum(one.slots for one in alive)
    visit.seen(f"{len(alive)} alive with {slots} slots, {visit.read().vitals.running} jobs run")
    yield from visit.health(_WORKER_CODES.__contains__)
    drained = [one.id for one in alive if one.drained]
    if drained:
        yield Finding(
            code="workers_drained",
            severity=Severity.WARNING if len(drained) == len(alive) else Severity.INFO,
            subject=", ".join(drained),
            what=f"{len(drained)} of {len(alive)} workers are drained.",
            why="They take nothing new until somebody resumes them.",
            mend=f"taskplatform nodes resume {drained[0]}",
        )


def leader(visit: Visit) -> Iterator[Finding]:
    """Whether one beat leads, and plans."""
    seen = visit.read()
    alive, tick = living_beats(visit), seen.vitals.planner.get("tick")
    leaders = [one.id for one in alive if one.leads]
    told = "no tick yet" if tick is None else f"last tick {max(0, seen.vitals.now_ms - int(tick)) / 1000:.1f} s ago"
    visit.seen(f"{len(alive)} alive, {leaders[0] if len(leaders) == 1 else f'{len(leaders)} lead'}, {told}")
    of_health = list(visit.health(_PLANNER_CODES.__contains__))
    yield from of_health
    if not alive and not any(one.code in ("planner_missing", "planner_stopped") for one in of_health):
        yield Finding(
            code="no_beat",
            severity=Severity.CRITICAL,
            subject="",
            what="No beat lives.",
            why="Nothing is planned.",
            mend="celery -A taskplatform.app beat",
        )
    elif alive and len(leaders) != 1 and not (len(leaders) == 0 and of_health):
        yield from _leads_wrongly(visit)
    if len(alive) == 1:
        yield Finding(
            code="no_standby",
            severity=Severity.INFO,
            subject=alive[0].id,
            what="There is one beat and no standby.",
            why="When it dies nothing is planned until somebody starts it again.",
            mend="celery -A taskplatform.app beat, on another machine",
        )


def _leads_wrongly(visit: Visit) -> Iterator[Finding]:
    """Also after a second look: in a take-over nobody leads, or two say so, for a moment."""
    store = visit.redis().store
    time.sleep(min(max(_TAKE_OVER_SECONDS, 2 * visit.settings.beat_interval.total_seconds()), visit.left / 2))
    # who just died says for a while that it leads
    recent_ms = max(3000, 3 * _ms(visit.settings.beat_interval))
    beats, now_ms = store.beats(), store.now_ms()
    leaders = [one.id for one in _living(visit, beats, now_ms) if one.leads and now_ms - one.heartbeat_ms <= recent_ms]
    if len(leaders) > 1:
        yield Finding(
            code="two_leaders",
            severity=Severity.CRITICAL,
            subject=", ".join(leaders),
            what=f"{len(leaders)} beats say that they lead.",
            why="No job is made twice, but they publish over each other; a beat of another installation may use the same namespace.",
            mend="taskplatform beats; stop all but one, and give each installation its own TASKPLATFORM_NAMESPACE",
        )
    elif not leaders and any(now_ms - one.heartbeat_ms <= recent_ms for one in beats):
        yield Finding(
            code="no_leader",
            severity=Severity.WARNING,
            subject="",
            what="Beats live, and none leads.",
            why="Nothing is planned until one does: when the lock of the one that died has run out.",
            mend="taskplatform beats; if it stays so, read the log of a beat",
        )


def clocks(visit: Visit) -> Iterator[Finding]:
    """The clock of each node beside that of Redis, as it measured it itself."""
    nodes = {f"worker {one.id}": one.info for one in living_workers(visit)} | {f"beat {one.id}": one.info for one in living_beats(visit)}
    told = {who: read_clock(info.get("clock")) for who, info in nodes.items()}
    known = {who: clock for who, clock in told.items() if clock is not None}
    if not known:
        raise Nothing("no worker or beat that lives tells of its clock")
    worst = max(known, key=lambda who: abs(known[who][0]))
    visit.seen(f"{len(known)} of {len(told)} nodes; the furthest off by {known[worst][0]:+d} ms, {worst}")
    for who, (ahead_ms, error_ms) in sorted(known.items()):
        yield from clock_finding(who, ahead_ms, error_ms)


def releases(visit: Visit) -> Iterator[Finding]:
    """Whether all nodes are of one release, and have the same definitions."""
    nodes = {one.id: one.info for one in living_workers(visit)} | {one.id: one.info for one in living_beats(visit)}
    if not nodes:
        raise Nothing("no worker and no beat lives")
    names = {"version": "taskplatform", "celery": "Celery", "kombu": "kombu", "python": "Python", "definitions": "definitions"}
    for field, what in names.items():
        who: defaultdict[str, list[str]] = defaultdict(list)
        for node, info in nodes.items():
            who[info.get(field) or "an older release, that does not say"].append(node)
        if len(who) > 1:
            yield Finding(
                code=f"{field}_differs",
                severity=Severity.WARNING,
                subject="",
                what=f"Nodes differ in {what}: {_listed(who)}",
                why="In a rolling deployment that passes. Otherwise a job does one thing here and another there.",
                mend="taskplatform nodes; taskplatform beats; bring the same release to all, and restart those that are behind",
            )
        elif field in ("version", "definitions"):
            visit.seen(f"{what} {next(iter(who))} on all {len(nodes)}")
    yield from _of_here(visit, nodes)


def _listed(who: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(sorted(nodes))}" for value, nodes in sorted(who.items()))


def _of_here(visit: Visit, nodes: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """This command beside them."""
    catalogue, faults = visit.catalogue()
    own = {
        "version": versions()["version"],
        "definitions": "" if faults else digest({name: one.version for name, one in catalogue.items()}),
    }
    for field, severity in (("version", Severity.WARNING), ("definitions", Severity.INFO)):
        others = {info[field] for info in nodes.values() if info.get(field)}
        if own[field] and others and own[field] not in others:
            yield Finding(
                code=f"{field}_here_differs",
                severity=severity,
                subject="this command",
                what=f"The {field} here ({own[field]}) is none of those that run ({', '.join(sorted(others))}).",
                why="What this command changes or says may not be what the nodes do.",
                mend="run it from the release that is deployed",
            )


def sets(visit: Visit) -> Iterator[Finding]:
    """Whether something is stuck, or grows without end."""
    vitals, store = visit.read().vitals, visit.redis().store
    yield from visit.health(_STUCK_CODES.__contains__)
    for priority, queue in vitals.queues.items():
        yield from _queue(priority, queue.released, queue.messages, queue.oldest_released_ms, vitals.now_ms)
    most = visit.settings.dead_max
    if vitals.dead_letters >= most * _NEARLY_FULL:
        yield Finding(
            code="dead_letters_full",
            severity=Severity.WARNING,
            subject="",
            what=f"There are {vitals.dead_letters:,} dead letters, and {most:,} are kept.",
            why="The oldest go with each new one, and their histories with them.",
            mend="taskplatform dead-letters list; taskplatform dead-letters redrive …, or a larger TASKPLATFORM_DEAD_MAX",
        )
    newest = store.garbage(limit=1)
    if newest:
        age_ms = vitals.now_ms - newest[0].at_ms
        yield Finding(
            code="garbage",
            severity=Severity.WARNING if age_ms < _FRESH_GARBAGE_MS else Severity.INFO,
            subject=newest[0].queue,
            what=f"What was no message lay in a queue, the last {span_text(age_ms)} ago: {newest[0].reason}",
            why="Somebody else writes into the platform's queues.",
            mend="taskplatform garbage list; when it is clear who it was, taskplatform garbage clear",
        )
    yield from _kept_too_long(visit)
    yield from _growth(visit)


def _queue(priority: Priority, released: int, messages: int, oldest_ms: int | None, now_ms: int) -> Iterator[Finding]:
    if oldest_ms is not None and now_ms - oldest_ms > _OLD_RELEASE_MS:
        yield Finding(
            code="queue_old",
            severity=Severity.WARNING,
            subject=priority,
            what=f"A {priority} job was released {span_text(now_ms - oldest_ms)} ago and has not started.",
            why="It keeps its place in the queue from those that come after it; all slots may be held by long runs.",
            mend="taskplatform jobs list --state running; start more workers",
        )
    if messages > released + _STRANGE_MESSAGES:
        yield Finding(
            code="queue_strange",
            severity=Severity.WARNING,
            subject=priority,
            what=f"{messages:,} messages lie in the queue {priority}, and {released:,} jobs are released.",
            why="What somebody else puts there goes before jobs, and takes memory without a bound.",
            mend="taskplatform garbage list; find who writes to this queue",
        )


def _growth(visit: Visit) -> Iterator[Finding]:
    """What is due and waits, and dead letters: over the last hours, and what is due also in two looks at it now."""
    store, samples = visit.redis().store, visit.samples()
    first = store.figures()
    time.sleep(min(_SAMPLE_SECONDS, visit.left / 2))
    second = store.figures()
    before, after = sum(first.due.values()), sum(second.due.values())
    noted = f", noted for {span_text(samples[-1].at_ms - samples[0].at_ms)}" if len(samples) > 1 else ""
    visit.seen(f"{sum(second.waiting.values()):,} jobs wait, {after:,} of them are due, {second.dead_letters:,} dead letters{noted}")
    due_ms = [at_ms for place, at_ms in second.oldest_ms.items() if place in second.due]
    oldest_ms = min(due_ms, default=second.now_ms)
    grown = growth(samples, lambda one: one.due)
    if after > _BACKLOG_JOBS and second.now_ms - oldest_ms > _BACKLOG_MS and (grown or after > before):
        holders = [f"{name} ({jobs:,})" for name, jobs in sorted(second.held_by.items(), key=lambda item: -item[1]) if jobs]
        how = f"{grown.more:,.0f} more than {grown.span_text} before" if grown else "and they become more"
        yield Finding(
            code="backlog_grows",
            severity=Severity.WARNING,
            subject=", ".join(holders[:3]),
            what=f"{after:,} jobs are due and wait, the first for {span_text(second.now_ms - oldest_ms)}, {how}.",
            why="More comes due than is done: jobs are late, and later every minute.",
            mend="taskplatform limits list, if a limit holds them; else start more workers, or more slots (TASKPLATFORM_WORKER_SLOTS)",
        )
    dead = growth(samples, lambda one: one.dead)
    if dead is not None and dead.more >= _DEAD_LETTERS:
        yield Finding(
            code="dead_letters_grow",
            severity=Severity.WARNING,
            subject="",
            what=f"There are {dead.more:,.0f} dead letters more than {dead.span_text} before.",
            why="Something fails for good again and again: a target, a definition, or the poison of one job.",
            mend="taskplatform dead-letters list, which says why; when that is mended, taskplatform dead-letters redrive",
        )


def _kept_too_long(visit: Visit) -> Iterator[Finding]:
    """What ended is forgotten after its retention by a task that beat sends each minute. Without it Redis fills up."""
    now_ms, chosen = visit.read().vitals.now_ms, visit.settings
    oldest = visit.redis().oldest_ended_ms()
    for what, retention, name in (("finished", chosen.retention, "RETENTION"), ("dead", chosen.dead_retention, "DEAD_RETENTION")):
        at_ms = oldest.get(what)
        if at_ms is not None and now_ms - at_ms > _ms(retention) + _SWEEP_LATE_MS:
            yield Finding(
                code="sweep_behind",
                severity=Severity.WARNING,
                subject=what,
                what=f"A {what} job is kept that ended {span_text(now_ms - at_ms)} ago; TASKPLATFORM_{name} is "
                f"{format_duration(retention)}.",
                why="What is past its retention is not forgotten, and Redis grows until it is full.",
                mend="celery -A taskplatform.app call taskplatform.sweep --queue high; taskplatform beats, to see why none comes",
            )


def _ms(duration: timedelta) -> int:
    return round(duration / timedelta(milliseconds=1))
