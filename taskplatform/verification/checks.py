"""What a verification checks without hurting anything: a hundred small jobs, under limits of their own.

A check is a function that gets the drill, and returns what it found. One whose jobs take their time is a generator: it submits them
before its first yield, and judges them after it, when the other checks are through.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

from taskplatform.drills import CALL, FAIL, LIMITED, ORDER, RUN, SLOW, SPREAD, drills
from taskplatform.errors import NotFound
from taskplatform.model import TRANSITIONS, Job, JobState, Limit, Priority, Transition, format_rate, moment, slot
from taskplatform.store import Beat, Occurrence
from taskplatform.verification.jobs import LATE_MS, Drill, Finding, NotRun
from taskplatform.verification.judges import (
    Spread,
    broken_steps,
    busiest,
    contested,
    passed_over,
    per_second_counts,
    quantile,
    spread,
    turn,
)
from taskplatform.verification.plot import bars, window_svg
from taskplatform.verification.report import Plot, Table
from taskplatform.verification.target import Target

WINDOW = timedelta(seconds=10)
_SPREAD_USERS = 40
#: How often another occurrence is looked at where the platform was held up.
_MORE_OCCURRENCES = 2
_CROWD = 20
_LATENCY_JOBS = 10
_HIGH, _MEDIUM, _LOW = Priority
_MIX = (_LOW, _MEDIUM, _HIGH, _LOW, _MEDIUM, _HIGH, _HIGH, _LOW, _MEDIUM)
_AT_ONCE = 8


# --- what runs -------------------------------------------------------------------------------------------------------


def services(drill: Drill) -> Finding:
    """Redis and how it keeps data; what each worker and beat says it runs on."""
    found = Finding()
    rows: list[tuple[object, ...]] = []
    if drill.remote:
        found.tables.append(Table("Redis", ("what", "value"), [("not read", "the platform is reached through its API")]))
    else:
        server = drill.store.vitals().server
        kind = "Valkey" if "valkey_version" in server else "Redis"
        version = server.get("valkey_version") or server.get("redis_version", "unknown")
        policy, aof = server.get("maxmemory_policy", "unknown"), server.get("aof_enabled") == "1"
        found.facts["redis"] = {
            "kind": kind,
            "version": version,
            "append_only": aof,
            "last_write_ok": server.get("aof_last_write_status", "unknown") == "ok",
            "maxmemory_bytes": int(server.get("maxmemory", 0)),
            "used_memory_bytes": int(server.get("used_memory", 0)),
            "eviction_policy": policy,
            "uptime_seconds": int(server.get("uptime_in_seconds", 0)),
            "role": server.get("role", "unknown"),
            "replicas": int(server.get("connected_slaves", 0)),
        }
        found.tables.append(Table("Redis", ("what", "value"), list(found.facts["redis"].items())))
        found.expect(policy == "noeviction", f"{kind} {version} evicts nothing", f"{kind} may throw jobs away: its policy is {policy}")
        lost = "its append-only file is off, so with a crash it loses what is newer than its last snapshot"
        found.expect(aof, "it keeps an append-only file", lost)
        if aof and not found.facts["redis"]["last_write_ok"]:
            found.faults.append("its last write to the append-only file failed")
    workers = drill.workers()
    for worker in workers:
        rows.append(("worker", worker.id, *_versions(worker.info), f"{worker.slots} slots, queues {', '.join(worker.queues)}"))
    found.facts["workers"] = [{"id": one.id, "slots": one.slots, "queues": list(one.queues), **dict(one.info)} for one in workers]
    unserved = [priority for priority in Priority if not any(priority in one.queues for one in workers)]
    if found.expect(bool(workers), f"{len(workers)} workers live", "no worker lives"):
        found.expect(not unserved, "all queues are served", f"no worker serves the queue {', '.join(unserved)}")
    beats = _living_beats(drill)
    found.facts["beats"] = [{"id": one.id, "leads": one.leads, "release": one.number} for one in beats]
    for one in beats:
        rows.append(("beat", one.id, *_versions(one.info), "leads" if one.leads else "stands by"))
    found.expect(bool(beats), f"{len(beats)} beats live", "no beat lives")
    if not drill.remote:
        deployed = drill.store.versions([one.id for one in drills()])
        same = all(version == one.version for version, one in zip(deployed, drills(), strict=True))
        if not same:
            found.said.append("the platform's verification definitions are another release's than this one's")
    found.tables.append(Table("Processes", ("what", "id", "Python", "Celery", "taskplatform", "more"), rows))
    return found


def _versions(info: Any) -> tuple[str, str, str]:
    return tuple(info.get(name) or "not told" for name in ("python", "celery", "version"))  # type: ignore[return-value]


def heartbeats(drill: Drill) -> Finding:
    """How long each worker and beat has been silent."""
    found = Finding()
    now_ms = drill.now_ms()
    longest = drill.settings.heartbeat_timeout / timedelta(milliseconds=1)
    rows: list[tuple[str, str, str]] = []
    workers = drill.platform.workers()
    ages = {one.id: max(0, now_ms - one.heartbeat_ms) for one in workers}
    rows += [("worker", name, f"{age / 1000:.1f} s") for name, age in ages.items()]
    silent = [f"{name} has been silent for {age / 1000:.1f} s" for name, age in ages.items() if age > longest]
    if not workers:
        found.faults.append("no worker has a heartbeat")
    elif found.expect(not silent, f"{len(workers)} workers, the oldest heartbeat {max(ages.values()) / 1000:.1f} s ago", "; ".join(silent)):
        found.facts["workers_ms"] = ages
    if not drill.remote:
        living = _living_beats(drill)
        of_beats = {one.id: max(0, now_ms - one.heartbeat_ms) for one in living}
        rows += [("beat", name, f"{age / 1000:.1f} s") for name, age in of_beats.items()]
        found.facts["beats_ms"] = of_beats
        found.expect(
            bool(living),
            f"{len(living)} beats, the oldest heartbeat {max(of_beats.values(), default=0) / 1000:.1f} s ago",
            "no beat has one",
        )
    found.tables.append(Table("Heartbeats", ("what", "id", "last heartbeat"), rows))
    return found


def leader(drill: Drill) -> Finding:
    """One beat leads, no more, at every look; and it plans."""
    found = Finding()
    looks: list[tuple[str, ...]] = []
    for number in range(5):
        if number:
            time.sleep(0.4)
        looks.append(tuple(one.id for one in _living_beats(drill) if one.leads))
    living = _living_beats(drill)
    found.facts = {"looks": [list(one) for one in looks], "beats": len(living)}
    if not living:
        found.faults.append("no beat lives, so nobody leads and nothing is planned")
        return found
    most = max(looks, key=len)
    found.expect(len(most) <= 1, "", f"{len(most)} beats led at a time: {', '.join(most)}")
    found.expect(bool(looks[-1]), "", f"none of {len(living)} beats leads")
    if not found.faults:
        standby = len(living) - 1
        found.said = [f"{looks[-1][0]} leads, at each of {len(looks)} looks alone; {standby} stand{'s' if standby == 1 else ''} by"]
    if not found.faults and not drill.remote:
        tick_ms = drill.now_ms() - int(drill.store.planner().get("tick", 0))
        found.facts["last_tick_ms"] = tick_ms
        fresh = tick_ms <= _beat_patience_ms(drill) + 2000
        found.expect(fresh, f"it planned {tick_ms / 1000:.1f} s ago", f"it has not planned for {tick_ms / 1000:.1f} s")
    return found


def _living_beats(drill: Drill) -> list[Beat]:
    since = drill.now_ms() - _beat_patience_ms(drill)
    return [one for one in drill.beats() if one.heartbeat_ms >= since]


def _beat_patience_ms(drill: Drill) -> float:
    chosen = drill.settings
    return max(chosen.beat_lock_timeout, 3 * chosen.beat_interval) / timedelta(milliseconds=1)


# --- jobs ------------------------------------------------------------------------------------------------------------


def latency(drill: Drill) -> Finding:
    """From the moment in which a job is submitted to its start, one job after the other."""
    found = Finding()
    (user,) = drill.users()
    count = drill.affordable(_LATENCY_JOBS, RUN, least=3)
    between = max(0.2, 1 / drill.sustained(RUN))
    lags: list[int] = []
    for number in range(count):
        if number:
            time.sleep(between)
        job = drill.submit(RUN, user)
        jobs, late = drill.wait([job.id])
        start = drill.started_ms(job.id)
        if start is None or not jobs:
            found.faults.append(late or f"{job.id} is gone")
            return found
        lags.append(start - jobs[0].created_ms)
    summary = {"median": statistics.median(lags), "p95": quantile(lags, 0.95), "max": max(lags)}
    found.facts = {"jobs": count, "lags_ms": lags, **{f"{name}_ms": value for name, value in summary.items()}}
    text = ", ".join(f"{name} {value:g} ms" for name, value in summary.items())
    found.tables.append(Table("From enqueue to start", ("jobs", *summary), [(count, *(f"{value:g} ms" for value in summary.values()))]))
    found.expect(summary["p95"] <= LATE_MS, text, f"{text}: accepted are {LATE_MS} ms for p95")
    return found


def priority(drill: Drill) -> Finding:
    """Jobs of all priorities of a definition that runs one at a time: who goes next, and who waits then?

    Judged by when each was released and what else waited at that moment, so whatever others run meanwhile changes nothing.
    """
    found = Finding()
    (user,) = drill.users()
    # the first one holds the place while the others come
    first = drill.submit(ORDER, user, priority=_LOW, params={"seconds": 1.0})
    mixed = drill.submit_all(ORDER, user, _MIX)
    ids = [first.id, *(job.id for job in mixed)]
    jobs, late = drill.wait(ids)
    of = {job.id: job for job in jobs}
    turns = [turn(name, of[name].priority, place, of[name].created_ms, drill.history(name)) for place, name in enumerate(ids) if name in of]
    began = min((one.started_ms for one in turns if one.started_ms is not None), default=0)
    rows = []
    for one in sorted(turns, key=lambda one: one.started_ms or 2**62):
        at = one.released_ms
        waiting = [other for other in turns if at is not None and other is not one and other.waited_at(at)]
        counts = ", ".join(f"{sum(other.priority is each for other in waiting)} {each}" for each in Priority)
        ended = of[one.job].finished_ms
        shown = [f"+{(at_ms - began) / 1000:.3f} s" if at_ms else "" for at_ms in (one.released_ms, one.started_ms, ended)]
        rows.append((one.priority, f"{one.place + 1}.", *shown, counts if at is not None else "not released", one.job))
    columns = ("priority", "submitted as", "released", "started", "ended", "waited at its release", "job")
    found.tables.append(Table("In the order of their starts", columns, rows))
    wrong = passed_over(turns)
    choices = contested(turns)
    order = [one.priority.value for one in sorted(turns, key=lambda one: one.started_ms or 2**62) if one.started_ms is not None]
    ends = sorted((job for job in jobs if job.finished_ms), key=lambda job: job.finished_ms or 0)
    found.facts = {"started": order, "completed": [job.priority.value for job in ends], "choices": choices, "passed_over": len(wrong)}
    if wrong:
        went, waited = wrong[0]
        found.faults.append(
            f"{len(wrong)} times a job was released while another with a better right waited: first a {went.priority} one "
            f"({went.place + 1}. submitted) before a {waited.priority} one ({waited.place + 1}. submitted)"
        )
    if late:
        found.faults.append(late)
    if not found.faults:
        text = f"started {', '.join(order)}; at {choices} releases jobs of other priorities waited, and none had a better right to go"
        found.expect(choices > 0, text, "no job ever waited beside one of another priority, so no order was shown")
        shared = sum(one.shared for one in turns)
        if shared:
            found.said.append(f"{shared} went before higher ones for the guaranteed share of their priority (lower_share)")
    return found


def lifecycle(drill: Drill) -> Iterator[Finding]:
    """A job that completes, one that is tried again, one that fails, one that is too slow and one that is canceled."""
    found = Finding()
    (user,) = drill.users()
    ways: dict[str, tuple[Job, tuple[JobState, ...]]] = {}
    run = (JobState.QUEUED, JobState.ASSIGNED, JobState.RUNNING)
    done, again = (*run, JobState.COMPLETED), (*run, JobState.RETRYING)
    ways["completes"] = drill.submit(RUN, user), (JobState.PENDING, *done)
    ways["is tried again"] = drill.submit(RUN, user, params={"failures": 1}), (JobState.PENDING, *again, *done)
    ways["fails for good"] = drill.submit(FAIL, user), (JobState.PENDING, *again, *run, JobState.FAILED)
    if all(one.info.get("pool", "").endswith("prefork") for one in drill.workers()):
        ways["is too slow"] = drill.submit(SLOW, user), (JobState.PENDING, *run, JobState.TIMED_OUT)
    else:
        found.said.append("that a run is ended at its time limit was not tried: only worker pools of processes can end a Python function")
    canceled = drill.submit(RUN, user, countdown=600)
    drill.platform.cancel(canceled.id)
    ways["is canceled"] = canceled, (JobState.PENDING, JobState.CANCELED)
    yield found

    _, late = drill.wait([job.id for job, _ in ways.values()])
    if late:
        found.faults.append(late)
    seen: set[JobState] = set()
    for name, (job, wanted) in ways.items():
        history = drill.history(job.id)
        steps = [line for line in history if line.from_state is not line.to_state]
        states = tuple(line.to_state for line in steps)
        seen.update(states)
        found.facts[name] = {"job": job.id, "states": [one.value for one in states]}
        found.tables.append(_history_table(f"A job that {name}: {job.id}", history))
        broken = broken_steps(history, TRANSITIONS)
        if broken:
            found.faults.append(f"the history of the job that {name} is broken: {'; '.join(broken)}")
        if states != wanted and not late:
            found.faults.append(f"the job that {name} went {_arrows(states)}, and not {_arrows(wanted)}")
    if not found.faults:
        found.said.insert(
            0, f"{len(ways)} jobs went as they must, through {len(seen)} states: {', '.join(one for one in JobState if one in seen)}"
        )
    yield found


def retry(drill: Drill) -> Iterator[Finding]:
    """A job that fails twice: how long it waited each time, against the definition's backoff."""
    found = Finding()
    (user,) = drill.users()
    failures = 2
    backoff = next(one for one in drills() if one.id == RUN).backoff
    configured = [round(backoff.delay(attempt) / timedelta(milliseconds=1)) for attempt in range(1, failures + 1)]
    job = drill.submit(RUN, user, params={"failures": failures})
    yield found

    jobs, late = drill.wait([job.id])
    if late or not jobs:
        found.faults.append(late or f"{job.id} is gone")
        yield found
        return
    measured: list[int] = []
    failed_ms: int | None = None
    for line in drill.changes(job.id):
        if line.to_state is JobState.RETRYING:
            failed_ms = line.at_ms
        elif line.to_state is JobState.RUNNING and failed_ms is not None:
            measured.append(line.at_ms - failed_ms)
            failed_ms = None
    found.facts = {"configured_ms": configured, "measured_ms": measured, "accepted_late_ms": LATE_MS}
    rows = [(f"{n}.", f"{want} ms", f"{got} ms") for n, (want, got) in enumerate(zip(configured, measured, strict=False), 1)]
    found.tables.append(Table("Delays before retries", ("retry", "configured", "from the failure to the next start"), rows))
    found.expect(jobs[0].state is JobState.COMPLETED, "", f"the job that fails {failures} times ended {jobs[0].state}: {jobs[0].reason}")
    found.expect(len(measured) == failures, "", f"there were {len(measured)} retries, and not {failures}")
    for number, (want, got) in enumerate(zip(configured, measured, strict=False), 1):
        found.expect(got >= want, "", f"retry {number} came after {got} ms, before its {want} ms were over")
        found.expect(got <= want + LATE_MS, "", f"retry {number} came after {got} ms: more than {LATE_MS} ms later than its {want} ms")
    if not found.faults:
        got_text, want_text = (", ".join(f"{one} ms" for one in times) for times in (measured, configured))
        found.said = [f"retries came {got_text} after failures; configured are {want_text}"]
    yield found


def idempotency(drill: Drill) -> Finding:
    """The same idempotency key, one call after the other and many at once: one job, one run."""
    found = Finding()
    (user,) = drill.users()
    key = f"verify-{drill.run}"

    def enqueue(_: int) -> str:
        return drill.platform.enqueue(RUN, user=user, params={"seconds": 0.2}, idempotency_key=key).id

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        ids = list(pool.map(enqueue, range(2 * _AT_ONCE)))
    jobs, late = drill.wait(list(dict.fromkeys(ids)))
    # also after it has ended
    ids += [enqueue(0), enqueue(0)]
    listed = drill.platform.jobs(user=user).items
    runs = [line for name in dict.fromkeys(ids) for line in drill.changes(name) if line.to_state is JobState.RUNNING]
    found.facts = {"calls": len(ids), "at_once": _AT_ONCE, "jobs": len(set(ids)), "listed": len(listed), "runs": len(runs)}
    if late:
        found.faults.append(late)
    found.expect(len(set(ids)) == 1 and len(listed) == 1, "", f"{len(ids)} calls with one key made {max(len(set(ids)), len(listed))} jobs")
    if not late:
        found.expect(len(runs) == 1, "", f"the job ran {len(runs)} times")
    if not found.faults:
        found.said = [f"{len(ids)} calls with one key, {_AT_ONCE} at a time and again after its end, made 1 job, which ran once"]
    found.tables += [_history_table(f"The job: {job.id}", drill.history(job.id)) for job in jobs[:1]]
    return found


# --- windows and limits ----------------------------------------------------------------------------------------------


def distribution(drill: Drill, *, window: timedelta = WINDOW) -> Iterator[Finding]:
    """An occurrence for many users: each at its own place in the window, which are spread evenly.

    Where beat or workers were held up meanwhile, by whatever goes on at their machine, that is said, and another occurrence is looked at.
    """
    if not _living_beats(drill):
        yield Finding(faults=["no beat lives, so no occurrence can be planned"])
        yield Finding(faults=["no beat lives, so no occurrence can be planned"])
        return
    users = drill.users(drill.affordable(_SPREAD_USERS, SPREAD, least=10))
    for user in users:
        drill.platform.subscribe(user, SPREAD)
    at, _ = drill.platform.trigger(SPREAD, window=window)
    yield Finding()

    held_up: list[str] = []
    found, stalled = _occurrence(drill, users, at)
    while stalled and len(held_up) < _MORE_OCCURRENCES:
        held_up.append(stalled)
        at, _ = drill.platform.trigger(SPREAD, window=window)
        found, stalled = _occurrence(drill, users, at)
    found.facts["held_up"] = held_up
    if held_up and found.said:
        found.said.append(f"this is occurrence {len(held_up) + 1}: the platform was held up before ({'; '.join(held_up)})")
    yield found


def _occurrence(drill: Drill, users: Sequence[str], at: datetime) -> tuple[Finding, str]:
    """How one occurrence was spread, and what held the platform up meanwhile, if anything did."""
    found = Finding()
    at_ms = round(at.timestamp() * 1000)
    ids = [f"{SPREAD}:{user}:t{at_ms}" for user in users]
    first = _opened(drill, at)
    if first is None:
        found.faults.append("the occurrence that was asked for is not listed")
        return found, ""
    window_ms = first.window_ms
    jobs, late = drill.wait(ids, seconds=drill.timeout.total_seconds() + window_ms / 1000)
    base_ms = (_opened(drill, at) or first).base_ms
    planned = {job.user: job.execute_after_ms for job in jobs}
    started = {job.user: began for job in jobs if (began := drill.started_ms(job.id)) is not None}
    if late or not started or window_ms <= 0:
        found.faults.append(late or "the occurrence has no window")
        return found, ""
    parts = [(at - base_ms) / window_ms for at in planned.values()]
    begun = [(at - base_ms) / window_ms for at in started.values()]
    lags = [at - planned[user] for user, at in started.items()]
    of_plan, of_starts = spread(parts), spread([min(one, 0.999999) for one in begun])
    wrong = [user for user, at in planned.items() if at != moment(base_ms, slot(user, SPREAD), window_ms)]
    _show_occurrence(found, parts, begun, of_plan, of_starts, window_ms / 1000)
    found.facts = {
        "users": len(users),
        "window_ms": window_ms,
        "asked_ms": first.asked_ms,
        "planned": _spread_facts(of_plan),
        "started": _spread_facts(of_starts),
        "lag_ms": {"min": min(lags), "median": statistics.median(lags), "max": max(lags)},
        "offsets_ms": sorted(at - base_ms for at in planned.values()),
        "started_offsets_ms": sorted(at - base_ms for at in started.values()),
    }
    found.expect(not wrong, "", f"{len(wrong)} of {len(planned)} jobs were not planned for their users' slots")
    found.expect(of_plan.even, "", f"the plan is uneven: its distance from even is {of_plan.distance:.2f}, accepted is {of_plan.bound:.2f}")
    found.expect(
        of_starts.even, "", f"the starts are uneven: their distance is {of_starts.distance:.2f}, accepted is {of_starts.bound:.2f}"
    )
    found.expect(min(lags) >= 0, "", f"a job started {-min(lags)} ms early")
    found.expect(max(lags) <= LATE_MS, "", f"a job started {max(lags)} ms late: accepted are {LATE_MS} ms")
    if not found.faults:
        gap = of_starts.largest_gap * window_ms / 1000
        found.said = [
            f"{len(started)} jobs, each at its user's slot, over {window_ms / 1000:g} s: distance from even {of_starts.distance:.2f} "
            f"(accepted {of_starts.bound:.2f}), largest gap {gap:.1f} s, none early, {max(lags)} ms late at the most"
        ]
    if base_ms != first.base_ms:
        # what the planner missed meanwhile it spreads anew from the time when it is back
        return found, f"the planner for more than {(base_ms - first.base_ms) / 1000:.1f} s"
    return found, f"starts for {max(lags) / 1000:.1f} s" if max(lags) > LATE_MS else ""


def _opened(drill: Drill, at: datetime) -> Occurrence | None:
    """A triggered occurrence as it is listed."""
    at_ms = round(at.timestamp() * 1000)
    found = (one for one in drill.platform.occurrences(SPREAD, since=at) if (one.at_ms, one.source) == (at_ms, "trigger"))
    return next(found, None)


def _show_occurrence(
    found: Finding, parts: Sequence[float], begun: Sequence[float], of_plan: Spread, of_starts: Spread, seconds: float
) -> None:
    axis = f"{'':9}0 s{f'{seconds:g} s':>38}"
    text = "\n".join([bars(parts, bins=40, label="planned"), bars(begun, bins=40, label="started"), axis])
    title = f"{len(begun)} jobs over a window of {seconds:g} s"
    found.plots.append(Plot(title, text, "distribution.svg", window_svg(parts, begun, title=title, window_seconds=seconds)))
    columns = ("", "distance from even (Kolmogorov-Smirnov)", "accepted", "chi-square, 10 parts", "largest gap")
    rows = [
        (name, f"{one.distance:.3f}", f"{one.bound:.3f}", f"{one.chi_square:.1f}", f"{one.largest_gap * seconds:.2f} s")
        for name, one in (("planned", of_plan), ("started", of_starts))
    ]
    found.tables.append(Table("Evenness", columns, rows))


def _spread_facts(one: Spread) -> dict[str, float]:
    return {
        "distance": round(one.distance, 4),
        "accepted_distance": round(one.bound, 4),
        "chi_square": round(one.chi_square, 2),
        "bins": one.bins,
        "largest_gap": round(one.largest_gap, 4),
    }


def limit(drill: Drill, *, listen: str | None = None) -> Finding:
    """A crowd of jobs at once: in no span of time may more start than rate and burst allow, over all workers.

    Measured at a target of the verification's own where workers can reach it, else by the recorded starts.
    """
    found = Finding()
    (user,) = drill.users()
    with ExitStack() as stack:
        target, definition = None, LIMITED
        try:
            target = _reached_target(drill, user, stack, listen)
            definition = CALL
            how = f"measured at the target http://{target.address[0]}:{target.address[1]}"
        except NotRun as why:
            how = f"judged by the recorded starts, because {why}"
        count = drill.affordable(_CROWD, definition, least=10)
        submitted = drill.submit_all(definition, user, [None] * count)
        ids = [job.id for job in submitted]
        jobs, late = drill.wait(ids)
        if late:
            found.faults.append(late)
        starts = [float(at) for name in ids if (at := drill.started_ms(name)) is not None]
        calls = target.calls(set(ids)) if target is not None else []
    failed = [job for job in jobs if job.state.terminal and job.state is not JobState.COMPLETED]
    found.expect(not failed, "", f"{len(failed)} of {count} jobs did not complete: {failed[0].reason if failed else ''}")
    times = [at for at, _ in calls] if target is not None else starts
    if target is not None and not failed and not late:
        found.expect(len(calls) == count, "", f"{count} jobs made {len(calls)} calls")
    limits = {one.name: one.limit for one in drill.platform.limits() if one.name in ("total", f"definition:{definition}")}
    rates = {name: one for name, one in limits.items() if one.per_second is not None and one.burst is not None}
    found.facts = {"how": how, "at_target": target is not None, "jobs": count, "in_each_second": per_second_counts(times), "limits": {}}
    rows: list[tuple[object, ...]] = []
    for name, one in rates.items():
        _judge_limit(found, name, one, times, rows, slack_ms=0.0 if target is not None else 1.0)
    found.tables.append(Table(how.capitalize(), ("limit", "rate", "burst", "busiest span", "in it", "allowed"), rows))
    if "total" not in rates:
        found.said.append("there is no limit of all jobs; that of the verification's definition over all workers was measured")
    if not rates:
        found.faults.append(f"no limit is in force: {definition} should have one of {format_rate(10)}")
    if not found.faults:
        found.said.insert(0, f"{how}: {count} jobs at once, {', '.join(map(str, per_second_counts(times)))} in each second, never above")
        found.said[0] += " " + " and ".join(
            f"{name} ({format_rate(one.per_second or 0)}, burst {one.burst})" for name, one in rates.items()
        )
    else:
        found.said = []
    return found


def _judge_limit(found: Finding, name: str, one: Limit, times: Sequence[float], rows: list[Any], *, slack_ms: float) -> None:
    assert one.per_second is not None
    assert one.burst is not None
    worst = busiest(times, per_second=one.per_second, burst=one.burst, slack_ms=slack_ms)
    if worst is None:
        return
    span = f"{worst.span_ms / 1000:.3f} s"
    rows.append((name, format_rate(one.per_second), one.burst, span, worst.count, f"{worst.allowed:.2f}"))
    found.facts["limits"][name] = {
        "per_second": one.per_second,
        "burst": one.burst,
        "busiest_ms": round(worst.span_ms, 3),
        "busiest_count": worst.count,
        "allowed": round(worst.allowed, 3),
    }
    found.expect(worst.excess <= 0, "", f"limit {name} is broken: {worst.count} within {span}, allowed are {worst.allowed:.1f}")


def _reached_target(drill: Drill, user: str, stack: ExitStack, listen: str | None) -> Target:
    """The verification's own target, after a job has called it. Raises NotRun."""
    try:
        drill.platform.definition(CALL)
    except NotFound:
        raise NotRun("verify_target is not set for the platform's processes") from None
    host = drill.settings.verify_target or ("" if drill.remote else drill.store.host_of(CALL) or "")
    name, port = _address(host)
    if listen is not None:
        name, port = _address(listen)
    try:
        target = stack.enter_context(Target(name, port))
    except (OSError, OverflowError) as fault:
        raise NotRun(f"the target cannot listen on {name}:{port}: {fault}") from None
    job = drill.submit(CALL, user)
    jobs, late = drill.wait([job.id], seconds=min(30.0, drill.timeout.total_seconds()))
    if late or not jobs or jobs[0].state is not JobState.COMPLETED or not target.calls({job.id}):
        raise NotRun(f"workers do not reach the target: {late or (jobs[0].reason if jobs else 'the job is gone')}")
    return target


def _address(host: str) -> tuple[str, int]:
    """Host and port of a URL, or of what is written host:port."""
    name, _, port = host.rpartition("://")[2].rpartition(":")
    if not name or not port.isdigit():
        raise NotRun(f"{host!r} has no port: verify_target takes such as http://127.0.0.1:8099, and --listen 0.0.0.0:8099")
    return name.strip("[]"), int(port)


# --- texts -----------------------------------------------------------------------------------------------------------


def _history_table(title: str, history: Sequence[Transition]) -> Table:
    first = history[0].at_ms if history else 0
    rows = [
        (f"+{(one.at_ms - first) / 1000:.3f} s", one.from_state or "", one.to_state, one.attempt, one.worker, one.reason) for one in history
    ]
    return Table(title, ("at", "from", "to", "attempt", "worker", "reason"), rows)


def _arrows(states: Sequence[JobState]) -> str:
    return " → ".join(states) or "nowhere"
