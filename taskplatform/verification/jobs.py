"""What the checks share: users and jobs of the verification, waiting for them, and the words for why one does not come.

All goes through the methods of `Platform`, so a platform behind its API that has the same methods will do; where that has no `store`, what
needs Redis itself says so. Whatever is made belongs to users whose ids begin with PREFIX, and deleting these removes it all.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from taskplatform import process
from taskplatform.errors import NotFound, TaskPlatformError
from taskplatform.model import Job, JobState, Priority, Transition
from taskplatform.platform import JobRequest, Platform
from taskplatform.settings import Settings
from taskplatform.store import Beat, Store, Worker
from taskplatform.verification.report import Line, Outcome, Plot, Table

PREFIX = "verify-"
#: How the names of the users begin: an id alone may be somebody's.
MARK = "taskplatform verify"
#: No verification takes longer. Users of one that is older are left over, whoever made them.
LONGEST = timedelta(hours=2)
#: How late what is due may start on a busy machine.
LATE_MS = 5000

_NAME = re.compile(rf"{MARK}, until (\d+), process (\d+) (\S*) of ([0-9a-f]*)")
_POLL_SECONDS = 0.05


class NotRun(TaskPlatformError):
    """A check cannot be made here; the message is the reason."""


@dataclass
class Finding:
    """What a check finds while it goes on."""

    said: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def expect(self, holds: bool, text: str, otherwise: str) -> bool:
        """Note what holds, where that is worth a word, or what is wrong. Returns whether it holds."""
        if holds and text:
            self.said.append(text)
        elif not holds:
            self.faults.append(otherwise)
        return holds

    def line(self, check: str, title: str, seconds: float) -> Line:
        """The check's line. One that found nothing at all was not made."""
        outcome = Outcome.FAILED if self.faults else Outcome.PASSED if self.said else Outcome.NOT_RUN
        text = "; ".join(self.faults or self.said) or "it found nothing to judge"
        return Line(
            check=check,
            title=title,
            outcome=outcome,
            text=text,
            facts=self.facts,
            tables=tuple(self.tables),
            plots=tuple(self.plots),
            seconds=seconds,
        )


class Drill:
    """One verification on one platform. `timeout` is how long each check waits for its jobs."""

    def __init__(
        self, platform: Platform, settings: Settings, *, timeout: timedelta, say: Callable[[str], object] = lambda _: None
    ) -> None:
        self.platform = platform
        self.settings = settings
        self.timeout = timeout
        self.say = say
        self.run = f"{int(time.time()):x}{secrets.token_hex(3)}"
        self._users = 0

    # --- the platform ------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """Redis itself. Raises NotRun where the platform is reached through its API."""
        found: Store | None = getattr(self.platform, "store", None)
        if found is None:
            raise NotRun("it needs Redis, and the platform is reached through its API")
        return found

    @property
    def remote(self) -> bool:
        """Whether there is an API between this and Redis."""
        return getattr(self.platform, "store", None) is None

    def now_ms(self) -> int:
        """The server's time, not this machine's."""
        asked: Any = self.platform if self.remote else self.store
        return int(asked.now_ms())

    def beats(self) -> list[Beat]:
        """All that have not signed off."""
        asked: Any = self.platform if self.remote else self.store
        return list(asked.beats())

    def workers(self) -> list[Worker]:
        """Those whose heartbeats are fresh."""
        since = self.now_ms() - self.settings.heartbeat_timeout / timedelta(milliseconds=1)
        return [one for one in self.platform.workers() if one.heartbeat_ms >= since]

    def sustained(self, definition: str | None = None) -> float:
        """How many jobs may start in a second by the limits on all jobs, and on those of a definition."""
        names = {"total", f"definition:{definition}"}
        rates = (one.limit.sustained for one in self.platform.limits() if one.name in names)
        return min((rate for rate in rates if rate is not None), default=float("inf"))

    def affordable(self, wanted: int, definition: str, *, least: int) -> int:
        """So many jobs as the limits let start within half of the timeout. Raises NotRun where that is too few to show anything."""
        rate = self.sustained(definition)
        possible = int(min(wanted, rate * self.timeout.total_seconds() / 2))
        if possible < least:
            raise NotRun(f"the limits let {rate:.2g} jobs start in a second, too few for the {least} that it needs within {self.timeout}")
        return possible

    # --- users and jobs ----------------------------------------------------------------------------------------------

    def users(self, count: int = 1) -> list[str]:
        """New users."""
        made = []
        for _ in range(count):
            self._users += 1
            made.append(f"{PREFIX}{self.run}-{self._users:03}")
            self.platform.create_user(made[-1], name=_name())
        return made

    def submit(
        self,
        definition: str,
        user: str,
        *,
        priority: Priority | None = None,
        params: Mapping[str, Any] | None = None,
        countdown: float | None = None,
    ) -> Job:
        """A job of one of the verification's definitions."""
        return self.platform.enqueue(definition, user=user, priority=priority, params=params, countdown=countdown)

    def submit_all(self, definition: str, user: str, priorities: Iterable[Priority | None]) -> list[Job]:
        """One for each of these, in this order."""
        return self.platform.enqueue_many([JobRequest(definition=definition, user=user, priority=one) for one in priorities])

    def jobs(self, ids: Sequence[str]) -> list[Job]:
        """Those of them that exist."""
        if not self.remote:
            return self.store.jobs_by_id(ids)
        found = []
        for job_id in ids:
            try:
                found.append(self.platform.job(job_id))
            except NotFound:
                continue
        return found

    def history(self, job_id: str) -> list[Transition]:
        """Every line; nothing of a job that is not there."""
        try:
            return self.platform.history(job_id)
        except NotFound:
            return []

    def changes(self, job_id: str) -> list[Transition]:
        """The history without notes."""
        return [line for line in self.history(job_id) if line.from_state is not line.to_state]

    def started_ms(self, job_id: str) -> int | None:
        """When its first run started."""
        return next((line.at_ms for line in self.changes(job_id) if line.to_state is JobState.RUNNING), None)

    def wait(
        self, ids: Sequence[str], *, until: Callable[[Job], bool] | None = None, seconds: float | None = None
    ) -> tuple[list[Job], str]:
        """The jobs when all have ended, or are as `until` says, and ""; or as they are when the time is over, and why."""
        done = until or (lambda job: job.state.terminal)
        deadline = time.monotonic() + (self.timeout.total_seconds() if seconds is None else seconds)
        through: dict[str, Job] = {}
        while True:
            found = {job.id: job for job in self.jobs([job_id for job_id in ids if job_id not in through])}
            through.update({job_id: job for job_id, job in found.items() if done(job)})
            if len(through) == len(ids):
                return [through[job_id] for job_id in ids], ""
            if time.monotonic() > deadline:
                found = {**found, **through}
                late = [job for job in found.values() if job.id not in through]
                return [found[job_id] for job_id in ids if job_id in found], self._why_late(ids, late, len(found))
            time.sleep(4 * _POLL_SECONDS if self.remote else _POLL_SECONDS)

    def until(self, holds: Callable[[], bool], *, seconds: float | None = None) -> bool:
        """Whether it comes to hold in time."""
        deadline = time.monotonic() + (self.timeout.total_seconds() if seconds is None else seconds)
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(4 * _POLL_SECONDS)
        return True

    def _why_late(self, ids: Sequence[str], late: Sequence[Job], found: int) -> str:
        states = Counter(job.state.value for job in late)
        if missing := len(ids) - found:
            states["not planned"] = missing
        text = f"{sum(states.values())} of {len(ids)} jobs were not through in time: " + ", ".join(
            f"{n} {one}" for one, n in states.items()
        )
        causes = list(self._causes(late, missing))
        return f"{text}; {'; '.join(causes)}" if causes else text

    def _causes(self, late: Sequence[Job], missing: int) -> Iterable[str]:
        """What of the platform's state explains that jobs do not start."""
        if missing:
            yield "nobody planned them: is there a beat that leads?"
        waiting = [job for job in late if job.state in (JobState.PENDING, JobState.QUEUED, JobState.RETRYING)]
        if not waiting:
            return
        workers = self.workers()
        if not workers:
            yield "no worker lives"
            return
        for priority in sorted({job.priority for job in waiting}, key=list(Priority).index):
            if not any(priority in one.queues for one in workers):
                yield f"no worker serves the queue {priority}"
        slots = sum(one.slots for one in workers)
        running = sum(len(one.running) for one in workers)
        if running >= slots:
            yield f"{running} of {slots} slots are busy"
        drained = sum(one.drained for one in workers)
        if drained:
            yield f"{drained} of {len(workers)} workers are drained"
        for one in self.platform.limits():
            if one.name == "total" and one.tokens is not None and one.tokens < 1:
                yield "the limit total lets nothing start now"

    # --- leftovers ---------------------------------------------------------------------------------------------------

    def remove_own(self) -> int:
        """Delete the users of this verification. Returns how many."""
        return self._delete(one for one, _ in self._found() if one.startswith(f"{PREFIX}{self.run}-"))

    def remove_leftovers(self) -> tuple[int, int]:
        """Delete what verifications have left that are over. Returns how many users that were, and how many belong to one that goes on."""
        others = [(user, name) for user, name in self._found() if not user.startswith(f"{PREFIX}{self.run}-")]
        over = [user for user, name in others if _is_over(name)]
        return self._delete(over), len(others) - len(over)

    def _found(self) -> list[tuple[str, str]]:
        """(id, name) of all verifications' users. An id is also a cursor: what follows it comes next."""
        found: list[tuple[str, str]] = []
        cursor: str | None = PREFIX
        while cursor is not None:
            page = self.platform.users(cursor=cursor, limit=200)
            found += [(one.id, one.name) for one in page.items if one.id.startswith(PREFIX) and _NAME.fullmatch(one.name)]
            if not page.items or not page.items[-1].id.startswith(PREFIX):
                break
            cursor = page.cursor
        return found

    def _delete(self, users: Iterable[str]) -> int:
        count = 0
        for user in users:
            try:
                self.platform.delete_user(user)
            except NotFound:
                continue
            count += 1
        return count


def _name() -> str:
    """Of a user: until when it is needed at the most, and by which process."""
    me = process.identity()
    until = int(time.time() + LONGEST.total_seconds())
    return f"{MARK}, until {until}, process {os.getpid()} {me['born']} of {_digest(me['machine'])}"


def _is_over(name: str) -> bool:
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    until, pid, born, machine = found.groups()
    here = process.machine()
    ended = machine == _digest(here) and process.has_ended({"pid": pid, "born": born, "machine": here})
    return ended or int(until) < time.time()


def _digest(machine: str) -> str:
    return hashlib.sha256(machine.encode()).hexdigest()[:12] if machine else ""
