"""What a verification finds out by killing: the beat that leads, and a worker in the midst of a job.

Processes of this machine are killed by SIGKILL, if they are surely those that are meant and another one of their kind is left.
Anywhere else, and where there is just one because something restarts it, a command does it: it is run by the shell, with the id of
who is meant in TASKPLATFORM_VERIFY_ID.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from taskplatform import process
from taskplatform.drills import HOLD, SPREAD
from taskplatform.model import Job, JobState
from taskplatform.settings import environment
from taskplatform.verification.jobs import LATE_MS, Drill, Finding, NotRun
from taskplatform.verification.report import Table

Kill = Callable[[str], str]
"""Kills who has this id, and says how. Raises NotRun."""

_COMMAND_SECONDS = 60
#: What a beat or a worker that something restarts may take for that.
_RESTART = timedelta(seconds=30)
_TAKEOVER_USERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Disruption:
    """How to kill, where that is wanted. None: by its pid, where it runs here and another one is left."""

    beat: Kill | None = None
    worker: Kill | None = None


def by_command(command: str) -> Kill:
    """Kill by a command, such as `docker kill platform-beat-1`."""

    def kill(who: str) -> str:
        variables = {**environment(), "TASKPLATFORM_VERIFY_ID": who}
        try:
            # the operator's own words, from the command line
            done = subprocess.run(
                command,
                shell=True,
                env=variables,
                capture_output=True,
                text=True,
                timeout=_COMMAND_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotRun(f"the command {command!r} had not ended after {_COMMAND_SECONDS} s") from None
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-200:]
            raise NotRun(f"the command {command!r} ended with {done.returncode}: {said}")
        return f"by {command}"

    return kill


def takeover(drill: Drill, disruption: Disruption) -> Finding:
    """Kill the beat that leads: how long until another one leads and plans? What was triggered meanwhile must run, once."""
    found = Finding()
    store = drill.store
    before = store.planner()
    who = before.get("leader", "")
    chosen = drill.settings
    alive_ms = max(chosen.beat_lock_timeout, 3 * chosen.beat_interval) / timedelta(milliseconds=1)
    living = [one.id for one in store.beats() if one.heartbeat_ms >= store.now_ms() - alive_ms]
    if who not in living:
        raise NotRun("no beat leads that could be killed")
    if disruption.beat is None and len(living) < 2:
        raise NotRun("only one beat lives, and it may be that nothing restarts it: say with --kill-beat how to kill it")
    kill = disruption.beat or (lambda leader: _kill_process(leader, next(one.info for one in store.beats() if one.id == leader)))
    users = drill.users(_TAKEOVER_USERS)
    for user in users:
        drill.platform.subscribe(user, SPREAD)

    began_ms, began = store.now_ms(), time.monotonic()
    how = kill(who)
    at, _ = drill.platform.trigger(SPREAD, window=timedelta(seconds=1))
    ids = [f"{SPREAD}:{user}:t{round(at.timestamp() * 1000)}" for user in users]
    allowed = chosen.beat_lock_timeout + 2 * chosen.beat_interval + timedelta(milliseconds=LATE_MS)
    patience = (allowed + _RESTART).total_seconds()
    most = 0
    leader = ""

    def taken_over() -> bool:
        nonlocal most, leader
        # the dead one's last word was that it leads
        fresh = [one.id for one in store.beats() if one.leads and one.id != who and one.heartbeat_ms > began_ms]
        most = max(most, len(fresh))
        planner = store.planner()
        leader = planner.get("leader", "")
        # not by its name: in a container that is started again it is the same one
        return int(planner.get("term", 0)) > int(before.get("term", 0)) and int(planner.get("tick", 0)) > int(planner.get("since", 0))

    if not drill.until(taken_over, seconds=patience):
        if any(one.id == who and one.heartbeat_ms > store.now_ms() - alive_ms for one in store.beats()):
            raise NotRun(f"{who} lives on: it was not killed {how}")
        found.facts = {"killed": who, "how": how, "waited_seconds": patience}
        found.faults.append(f"nobody took over within {patience:g} s after {who} was killed {how}")
        return found
    took_ms = int(store.planner()["since"]) - began_ms
    jobs, late = drill.wait(ids)
    once = [job for job in jobs if job.state is JobState.COMPLETED and job.attempt == 1]
    found.facts = {
        "killed": who,
        "how": how,
        "takeover_ms": took_ms,
        "accepted_ms": round(allowed / timedelta(milliseconds=1)),
        "leader": leader,
        "standbys_before": len(living) - 1,
        "measured_for_seconds": round(time.monotonic() - began, 3),
        "jobs_of_the_gap": len(once),
    }
    rows = [
        ("killed", f"{who}, {how}"),
        ("leads now", leader),
        ("take-over", f"{took_ms / 1000:.1f} s"),
        ("standbys before", len(living) - 1),
    ]
    found.tables.append(Table("Take-over", ("what", "measured"), rows))
    found.expect(most <= 1, "", f"{most} beats led at a time")
    # one that had to be started first may take its time
    limit = allowed if len(living) > 1 else allowed + _RESTART
    slow = f"{leader} led only {took_ms / 1000:.1f} s after {who} was killed; accepted are {limit.total_seconds():g} s"
    found.expect(took_ms <= limit / timedelta(milliseconds=1), "", slow)
    found.expect(not late and len(once) == len(users), "", late or f"of {len(users)} jobs triggered meanwhile {len(once)} ran once")
    if not found.faults:
        by = "a standby" if len(living) > 1 else "one that was started again"
        found.said = [f"{took_ms / 1000:.1f} s after {who} was killed {how}, {by} led; what was triggered meanwhile ran, each job once"]
    return found


def orphans(drill: Drill, disruption: Disruption) -> Finding:
    """Kill a worker that runs a job: how long until it runs elsewhere? Its other jobs are recovered in the same way."""
    found = Finding()
    store = drill.store
    workers = {one.id: one for one in drill.workers()}
    if disruption.worker is None and len(workers) < 2:
        raise NotRun("only one worker lives, and it may be that nothing restarts it: say with --kill-worker how to kill it")
    (user,) = drill.users()
    ids = [drill.submit(HOLD, user).id]
    _, late = drill.wait(ids, until=lambda job: job.state is JobState.RUNNING)
    if late:
        found.faults.append(late)
        return found
    who = store.job(ids[0]).worker
    victims = ids
    others = store.running_on(who) - set(ids)
    kill = disruption.worker or (lambda worker: _kill_process(worker, workers[worker].info if worker in workers else {}))
    killed_ms = store.now_ms()
    try:
        how = kill(who)
    except NotRun:
        for job_id in ids:
            drill.platform.cancel(job_id)
        raise
    allowed = drill.settings.heartbeat_timeout + timedelta(seconds=5, milliseconds=LATE_MS)
    found_jobs, late = drill.wait(victims, seconds=(allowed + _RESTART).total_seconds() + drill.timeout.total_seconds())
    if late and store.heartbeats().get(who, 0) > killed_ms + drill.settings.heartbeat_timeout / timedelta(milliseconds=1):
        for job_id in victims:
            drill.platform.cancel(job_id)
        raise NotRun(f"{who} lives on: it was not killed {how}")
    rows, times = [], []
    for job in found_jobs:
        again = _second_start(drill, job)
        if again is None:
            found.faults.append(f"{job.id} did not run again: it is {job.state}, {job.reason}")
            continue
        at_ms, worker = again
        times.append(at_ms - killed_ms)
        rows.append((job.id, f"{times[-1] / 1000:.1f} s", worker, job.state, job.attempt))
        found.expect(worker != who, "", f"{job.id} is said to run again on {who}, which was killed")
        found.expect(job.state is JobState.COMPLETED, "", f"{job.id} ended {job.state}: {job.reason}")
    if late:
        found.faults.append(late)
    found.facts = {
        "killed": who,
        "how": how,
        "recovered_ms": times,
        "accepted_ms": round(allowed / timedelta(milliseconds=1)),
        "jobs": len(victims),
        "others_on_it": len(others),
    }
    found.tables.append(Table(f"Jobs of {who}, killed {how}", ("job", "ran again after", "on", "ended", "attempts"), rows))
    if times:
        slow = f"a job ran again only {max(times) / 1000:.1f} s after its worker was killed; accepted are {allowed.total_seconds():g} s"
        found.expect(max(times) <= allowed / timedelta(milliseconds=1), "", slow)
    if not found.faults and times:
        found.said = [
            f"{who} was killed {how}; {len(times)} job{'' if len(times) == 1 else 's'} of it ran again elsewhere after "
            f"{statistics.median(times) / 1000:.1f} s, and completed"
        ]
        if others:
            found.said.append(f"{len(others)} jobs of others ran on it, and are recovered in the same way")
    return found


def _second_start(drill: Drill, job: Job) -> tuple[int, str] | None:
    starts = [(line.at_ms, line.worker) for line in drill.changes(job.id) if line.to_state is JobState.RUNNING]
    return starts[1] if len(starts) > 1 else None


def _kill_process(who: str, identity: Mapping[str, str]) -> str:
    """By its pid, if it is of this machine and these namespaces, and started when it says."""
    pid = identity.get("pid", "")
    if not pid or not identity.get("born"):
        raise NotRun(f"{who} does not tell which process it is")
    if not identity.get("machine") or identity["machine"] != process.machine():
        raise NotRun(f"{who} runs on another machine, or in a container")
    # has_ended compares the start time too: that pid may be another's by now
    if process.has_ended(identity):
        raise NotRun(f"{who} has ended")
    try:
        os.kill(int(pid), signal.SIGKILL)
    except OSError as fault:
        raise NotRun(f"{who} cannot be killed: {fault}") from None
    return "by SIGKILL"
