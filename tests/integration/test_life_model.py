"""The life of jobs under faults: the store's scripts against a plain model of them.

`Model` says what docs/architecture.md says, without any index, queue depth or script: which states a job may take, who may run it,
what each loss, retry and repetition does to its numbers. Hypothesis makes up programs of people who submit, cancel and pause, of workers
that die, sleep, come back and repeat themselves, of messages that vanish or lie twice, and of a clock that is set. After each step
everything must be as the model has it: nothing of a delivery that is not the current one counts, nothing is early, and each line of each
history is the expected one. What the scripts may do at any time, releasing what is due, they must do when asked. In the end, when
time passes and all is well again, everything must have ended.

LIFE_MODEL_EXAMPLES in the environment makes more programs, and longer ones.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from taskplatform.errors import Conflict, UnknownDefinition, UnknownJob, UnknownUser
from taskplatform.model import POISON_PILL, TRANSITIONS, JobState, Priority
from taskplatform.store import DeadLetterResult, Enqueue, Renewal, Stop, Store
from taskplatform.store.keys import UNACKED, key
from taskplatform.store.scripts import Scripts
from tests.conftest import Clock
from tests.integration.harness import (
    ACTOR,
    NAMESPACE,
    WAITING,
    assert_consistent,
    assert_idle,
    define,
    publish,
    queue,
    subscribe,
    take,
)

S = JobState
EXAMPLES = int(os.environ.get("LIFE_MODEL_EXAMPLES", "0"))

#: How each definition begins. `limited` has a limit that never binds, so that its tokens and places are counted.
DEFINITIONS = {"plain": Priority.MEDIUM, "limited": Priority.HIGH, "single": Priority.LOW}
MORE: dict[str, dict[str, Any]] = {
    "limited": {"rate_limit": {"rate": "1000/s", "burst": 2000}, "concurrency": 90},
    "single": {"overlap": "skip"},
}
USERS = ("ann", "bob")
WORKERS = ("w1", "w2", "w3")
SILENCE_MS, PATIENCE_MS, RETENTION_MS, BACKOFF_MS = 15_000, 10_000, 5000, 1000
DEAD_RETENTION_MS, MOST_DEAD = 20_000, 3
REFUSED_FOR_MS, MOST_REFUSALS = 2000, 3
RETRYABLE = (S.FAILED, S.TIMED_OUT, S.CANCELED, S.REJECTED)
MOST_JOBS = 8


def milliseconds(count: int) -> timedelta:
    return timedelta(milliseconds=count)


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a history; `says` is part of its reason."""

    origin: JobState | None
    state: JobState
    attempt: int
    worker: str
    says: str


@dataclass
class Life:
    """A job."""

    job_id: str
    priority: Priority
    own_priority: bool
    after_ms: int
    state: JobState = S.PENDING
    attempt: int = 0
    delivery: int = 0
    losses: int = 0
    forgiven: int = 0
    """Attempts that do not count against its retries."""
    refusals: int = 0
    retried: JobState | None = None
    """In which state it was when it was last retried by hand."""
    died: bool = False
    """Whether it is a dead letter."""
    worker: str = ""
    version: str = ""
    delayed_ms: int | None = None
    """Since when it waits for a span of time, if it does."""
    finished_ms: int | None = None
    released_ms: int = 0
    answered: object = None
    """The last call that started or ended a run: it may come again."""
    lines: list[Line] = field(default_factory=list)
    told: bool = False
    """Whether the last line of its history is one that is told and not in `lines`."""

    def __post_init__(self) -> None:
        self.lines.append(Line(None, S.PENDING, 0, "", ""))

    @property
    def definition(self) -> str:
        return self.job_id.split(":")[0]

    @property
    def user(self) -> str:
        return self.job_id.split(":")[1]

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def back(self) -> JobState:
        """Where it waits when a release comes to nothing."""
        return S.RETRYING if self.attempt else S.PENDING

    def to(self, state: JobState, worker: str, says: str) -> None:
        assert state in TRANSITIONS[self.state]
        self.lines.append(Line(self.state, state, self.attempt, worker, says))
        self.state = state

    def tell(self, worker: str, says: str) -> None:
        self.lines.append(Line(self.state, self.state, self.attempt, worker, says))

    def note(self, worker: str, says: str) -> bool:
        """The same, unless it is the last line already."""
        if not self.told and self.lines[-1] == Line(self.state, self.state, self.attempt, worker, says):
            return False
        self.tell(worker, says)
        return True


@dataclass
class Model:
    """The rules. Each method says what a verb does, and returns what it answers."""

    now_ms: int
    jobs: dict[str, Life] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    queues: dict[Priority, list[tuple[str, int]]] = field(default_factory=lambda: {priority: [] for priority in Priority})
    workers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By id, when it was last heard of, and its slots."""
    stops: defaultdict[str, dict[tuple[str, int], str]] = field(default_factory=lambda: defaultdict(dict))
    """By worker, which deliveries it shall stop and why."""
    counters: Counter[str] = field(default_factory=Counter)
    published: dict[str, Priority] = field(default_factory=lambda: dict(DEFINITIONS))
    users: dict[str, set[str]] = field(default_factory=lambda: {user: set(DEFINITIONS) for user in USERS})
    """By name, what each subscribes to."""
    paused: set[str] = field(default_factory=set)
    """Definitions, users, and subscriptions as user:definition."""

    # who may go

    @property
    def room(self) -> bool:
        return any(slots for _, slots in self.workers.values())

    def held(self, job: Life) -> bool:
        return bool(self.paused & {job.user, f"{job.user}:{job.definition}"})

    def due(self, job: Life) -> bool:
        """It may leave the waiting set by the clock, and somebody has room for it."""
        return job.waits and job.after_ms <= self.now_ms and self.room

    def may_go(self, job: Life) -> bool:
        return self.due(job) and job.definition in self.published and job.definition not in self.paused and not self.held(job)

    def may_be_rejected(self, job: Life) -> bool:
        return self.due(job) and job.definition not in self.published

    # verbs

    def submit(self, job_id: str, delay_ms: int, priority: Priority | None) -> bool:
        if job_id in self.jobs:
            return False
        first = priority or self.published[job_id.split(":")[0]]
        self.jobs[job_id] = job = Life(job_id, first, priority is not None, self.now_ms + delay_ms)
        job.delayed_ms = self.now_ms if delay_ms > 0 else None
        return True

    def triggered(self, job_id: str, after_ms: int, *, skipped: bool) -> None:
        assert self.submit(job_id, after_ms - self.now_ms, None)
        self.jobs[job_id].delayed_ms = self.now_ms
        if skipped:
            self._end(self.jobs[job_id], S.REJECTED, "", "overlap")

    def overlaps(self, definition: str, user: str) -> bool:
        """Whether a planned job of `single` may be skipped for another."""
        return definition == "single" and any(
            (job.definition, job.user) == (definition, user) and not job.state.terminal for job in self.jobs.values()
        )

    def released(self, job: Life, into: Priority) -> None:
        job.to(S.QUEUED, "", "released")
        job.delivery += 1
        job.released_ms = self.now_ms
        job.delayed_ms = None
        self.queues[into].append((job.job_id, job.delivery))

    def start(self, job_id: str, delivery: int, worker: str, call: str, version: str) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return "unknown"
        if job.delivery != delivery:
            return "stale"
        if job.state is S.RUNNING and job.answered == call:
            return "run"
        if job.state is not S.QUEUED:
            return job.state.value
        if job.after_ms > self.now_ms:
            self._wait(job, job.back, job.after_ms, worker, "early")
            return "early"
        if job.definition not in self.published:
            self._end(job, S.REJECTED, worker, "does not exist any more")
            return "rejected"
        job.attempt += 1
        job.to(S.ASSIGNED, worker, "received")
        job.to(S.RUNNING, worker, f"started by version {version}" if version else "started")
        job.worker, job.answered, job.version = worker, call, version
        self.workers.setdefault(worker, (self.now_ms, 0))
        return "run"

    def is_run(self, job_id: str, delivery: int, worker: str) -> bool:
        """Whether this is the one run of the job that counts."""
        job = self.jobs.get(job_id)
        return job is not None and (job.state, job.delivery, job.worker) == (S.RUNNING, delivery, worker)

    def finish(self, job_id: str, delivery: int, worker: str, state: JobState, reason: str, wait_ms: int) -> bool:
        job = self.jobs.get(job_id)
        if job is None:
            return False
        call = (delivery, worker, state, reason, wait_ms)
        if job.answered == call:
            return True
        if not self.is_run(job_id, delivery, worker):
            self.counters["discarded"] += job.note(worker, f"discarded the result of delivery {delivery}: {state}, {reason}")
            return False
        job.answered = call
        if state is S.RETRYING:
            self._wait(job, S.RETRYING, self.now_ms + wait_ms, worker, reason)
        else:
            self._end(job, state, worker, reason)
        return True

    def renew(self, job_id: str, delivery: int, worker: str) -> Renewal:
        if not self.is_run(job_id, delivery, worker):
            return Renewal.NEVER
        job = self.jobs[job_id]
        if job.definition != "limited" or job.definition not in self.published:
            return Renewal.ANY_TIME
        # who asks for that had the answer of the start
        job.answered = None
        return Renewal.IN_TIME

    def refuse(self, job_id: str, delivery: int, worker: str, why: str) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return "unknown"
        if job.state is not S.QUEUED or job.delivery != delivery:
            return job.state.value
        job.refusals += 1
        self.counters["refused"] += 1
        if job.definition not in self.published:
            self._end(job, S.REJECTED, worker, "does not exist any more")
        elif job.refusals >= MOST_REFUSALS:
            self._end(job, S.REJECTED, worker, f"{why}; given back {job.refusals} times")
        else:
            self._wait(job, job.back, self.now_ms + REFUSED_FOR_MS * job.refusals, worker, f"{why}: given back")
            return "given back"
        return "rejected"

    def lose(self, job_id: str, delivery: int, worker: str, what: str, most_losses: int, *, stuck: bool) -> bool:
        job = self.jobs.get(job_id)
        before_start = job is not None and job.state is S.QUEUED and job.delivery == delivery
        if job is None or not (before_start or self.is_run(job_id, delivery, worker)):
            return False
        self._lost(job, worker, what, most_losses)
        if stuck:
            self.stops[worker][job_id, delivery] = f"it was {what}"
            self.counters["stuck"] += 1
        return True

    def _lost(self, job: Life, worker: str, what: str, most_losses: int) -> None:
        job.losses += 1
        ran = job.state is S.RUNNING
        wait_ms = BACKOFF_MS * 2 ** (job.losses - 1)
        if job.losses >= most_losses:
            self._end(job, S.FAILED if ran else S.REJECTED, worker, f"{POISON_PILL}: {what}, {job.losses} losses in all")
        else:
            self._wait(job, S.RETRYING, self.now_ms + wait_ms, worker, f"{what}; again in {wait_ms / 1000:g} s")
        job.forgiven += ran

    def runs_of(self, worker: str) -> list[Life]:
        return [job for job in self.jobs.values() if job.state is S.RUNNING and job.worker == worker]

    def silent(self) -> list[str]:
        return sorted(worker for worker, (heard_ms, _) in self.workers.items() if heard_ms < self.now_ms - SILENCE_MS)

    def recovered(self, worker: str, seen_ms: int, how: str, rows: list[tuple[str, str]], most: int, most_losses: int) -> None:
        """Follow what a call took: all that the worker runs, or `most` of it; nothing of one that has been heard of since."""
        heard_ms, _ = self.workers.get(worker, (None, 0))
        if heard_ms != seen_ms:
            assert not rows, f"{rows} were taken from {worker}, which lives"
            return
        runs = {job.job_id for job in self.runs_of(worker)}
        taken = [name for kind, name in rows if kind == "job"]
        assert len(taken) == len(set(taken)) == min(most, len(runs))
        assert set(taken) <= runs, f"{taken} were taken, {worker} runs {runs}"
        for name in taken:
            job = self.jobs[name]
            self.stops[worker][name, job.delivery] = f"worker {worker} had been declared lost"
            self._lost(job, worker, f"worker {worker} lost: {how}", most_losses)
        self.counters["jobs_recovered"] += len(taken)
        whole = len(taken) == len(runs)
        assert [name for kind, name in rows if kind == "worker"] == [worker] * whole
        if whole:
            del self.workers[worker]
            self.counters["workers_lost"] += 1

    def withdraw(self, worker: str, held: Sequence[tuple[str, int]], *, also_running: bool) -> int:
        """Give back those of the deliveries that count and have not started, or also such as the worker runs."""
        given = 0
        for job_id, delivery in held:
            job = self.jobs.get(job_id)
            if job is not None and job.state is S.QUEUED and job.delivery == delivery:
                self._wait(job, job.back, job.after_ms, worker, f"worker {worker} stops: not started")
                given += 1
            elif job is not None and also_running and self.is_run(job_id, delivery, worker):
                self._wait(job, S.RETRYING, job.after_ms, worker, f"worker {worker} stopped")
                job.forgiven += 1
                given += 1
        return given

    def leave(self, worker: str, held: Sequence[tuple[str, int]]) -> int:
        runs = [(job.job_id, job.delivery) for job in self.runs_of(worker)]
        given = self.withdraw(worker, [*runs, *held], also_running=True)
        self.workers.pop(worker, None)
        self.stops.pop(worker, None)
        return given

    def stopped(self, worker: str, job_id: str, delivery: int, note: str, *, discarded: bool) -> bool:
        if self.stops[worker].pop((job_id, delivery), None) is None:
            return False
        if note and job_id in self.jobs:
            self.jobs[job_id].note(worker, note)
        self.counters["discarded"] += discarded
        return True

    def reclaim(self, *, clock_set: bool) -> list[str]:
        for job in self.jobs.values():
            # what was queued by another clock has its time from now on
            if job.state is S.QUEUED and (clock_set or job.released_ms > self.now_ms):
                job.released_ms = self.now_ms
        lost = [
            job
            for job in self.jobs.values()
            if job.state is S.QUEUED
            and job.released_ms <= self.now_ms - PATIENCE_MS
            and not any((job.job_id, job.delivery) in messages for messages in self.queues.values())
        ]
        for job in lost:
            self._wait(job, job.back, job.after_ms, "", "its message was lost: released again")
        self.counters["messages_reclaimed"] += len(lost)
        for job in self.jobs.values():
            if job.delayed_ms is not None and job.delayed_ms > self.now_ms + 1000:
                job.tell("", "the clock was set back: its wait begins again")
                job.after_ms = max(self.now_ms, job.after_ms - (job.delayed_ms - self.now_ms))
                job.delayed_ms = self.now_ms
                self._follow(job)
        return sorted(job.job_id for job in lost)

    def cancel(self, job_id: str, delivery: int | None, reason: str) -> JobState | None:
        job = self.jobs.get(job_id)
        if job is None:
            return None
        before = job.state
        if before.terminal or (delivery is not None and (delivery != job.delivery or job.waits)):
            return before
        self._cancel(job, reason)
        return before

    def _cancel(self, job: Life, reason: str) -> None:
        if job.state is S.RUNNING:
            self.stops[job.worker][job.job_id, job.delivery] = ""
        self._end(job, S.CANCELED, job.worker if job.state is S.RUNNING else "", reason)

    def retry(self, job_id: str, reason: str, *, only_dead: bool = False) -> JobState | str:
        """The state that it was in when it was retried, now or by an earlier call that is in force; or why it is not retried."""
        job = self.jobs.get(job_id)
        if job is None:
            return "unknown"
        before = job.state
        if job.retried is not None and before not in RETRYABLE:
            return job.retried
        if only_dead and not job.died:
            return "not dead"
        if before not in RETRYABLE:
            return "cannot"
        if job.definition not in self.published:
            return "removed"
        job.finished_ms, job.died, job.retried = None, False, before
        job.losses, job.refusals, job.forgiven = 0, 0, job.attempt
        self._wait(job, S.PENDING, self.now_ms, "", reason)
        return before

    def discard(self, job_id: str) -> DeadLetterResult:
        job = self.jobs.get(job_id)
        if job is None:
            return DeadLetterResult.GONE
        if not job.died:
            return DeadLetterResult.NOT_DEAD
        self._forget(job)
        return DeadLetterResult.DONE

    def prioritize(self, job_id: str, priority: Priority, reason: str) -> JobState | None:
        job = self.jobs.get(job_id)
        if job is None:
            return None
        if job.waits and job.priority is not priority:
            job.priority, job.own_priority = priority, True
            job.tell("", reason)
        return job.state

    def publish(self, definition: str, priority: Priority) -> None:
        self.published[definition] = priority
        for job in self.jobs.values():
            if job.definition == definition and job.waits and not self.held(job):
                self._follow(job)

    def retract(self, definition: str) -> None:
        self.published.pop(definition, None)
        self.paused.discard(definition)

    def resume(self, what: str) -> None:
        self.paused.discard(what)
        for job in self.jobs.values():
            if what in (job.user, f"{job.user}:{job.definition}") and job.waits and not self.held(job):
                self._follow(job)

    def delete_user(self, user: str) -> int:
        canceled = 0
        for job in [job for job in self.jobs.values() if job.user == user]:
            if not job.state.terminal:
                self._cancel(job, "user deleted")
                canceled += 1
            self._forget(job)
        del self.users[user]
        self.paused = {what for what in self.paused if what.split(":")[0] != user}
        return canceled

    def dead(self) -> dict[str, int]:
        """Dead letters, by when they died, and then by id."""
        found = [(job.finished_ms, job.job_id) for job in self.jobs.values() if job.died and job.finished_ms is not None]
        return {job_id: at_ms for at_ms, job_id in sorted(found)}

    def sweep(self) -> None:
        for job in list(self.jobs.values()):
            retention_ms = DEAD_RETENTION_MS if job.died else RETENTION_MS
            if job.finished_ms is not None and job.finished_ms <= self.now_ms - retention_ms:
                self._forget(job)
        too_many = list(self.dead())[: max(0, len(self.dead()) - MOST_DEAD)]
        for job_id in too_many:
            self._forget(self.jobs[job_id])
        self.counters["dead_letters_dropped"] += len(too_many)

    def reject(self, job: Life) -> None:
        self._end(job, S.REJECTED, "", "does not exist any more")

    # what they share

    def _wait(self, job: Life, state: JobState, after_ms: int, worker: str, says: str) -> None:
        job.to(state, worker, says)
        if after_ms != job.after_ms and after_ms > self.now_ms:
            job.delayed_ms = self.now_ms
        job.after_ms = after_ms
        self._follow(job)

    def _follow(self, job: Life) -> None:
        if not job.own_priority:
            job.priority = self.published.get(job.definition, job.priority)

    def _end(self, job: Life, state: JobState, worker: str, says: str) -> None:
        job.to(state, worker, says)
        job.finished_ms, job.delayed_ms = self.now_ms, None
        poison = says.startswith(POISON_PILL)
        job.died = poison or state in (S.FAILED, S.TIMED_OUT)
        self.counters["dead_letters"] += job.died
        self.counters["poison_pills"] += poison

    def _forget(self, job: Life) -> None:
        del self.jobs[job.job_id]
        self.forgotten.add(job.job_id)


# --- the verbs whose arguments are not the model's concern -----------------------------------------------------------


def recover(store: Store, worker: str, seen_ms: int, how: str, most: int, most_losses: int) -> list[tuple[str, str]]:
    """An observer takes what a worker runs that was silent since then."""
    backoff = milliseconds(BACKOFF_MS)
    return store.recover(worker, seen_ms=seen_ms, how=how, max_losses=most_losses, backoff=backoff, limit=most)


def lose(store: Store, job_id: str, delivery: int, worker: str, what: str, most_losses: int, *, stuck: bool) -> bool:
    """A worker says that the process died that ran this, or that the run does not end."""
    backoff = milliseconds(BACKOFF_MS)
    return store.lose(job_id, delivery=delivery, worker=worker, what=what, max_losses=most_losses, backoff=backoff, stuck=stuck)


def retry(store: Store, job_id: str, reason: str) -> JobState | str:
    """Somebody wants it once more. The state that it was in, or why it cannot be."""
    try:
        return store.retry(job_id, reason=reason)
    except UnknownJob:
        return "unknown"
    except UnknownDefinition:
        return "removed"
    except Conflict:
        return "cannot"


def tags(deliveries: Sequence[tuple[str, int]]) -> list[str]:
    """As a worker names what it holds."""
    return [f"{job_id}#{delivery}" for job_id, delivery in deliveries]


# --- programs --------------------------------------------------------------------------------------------------------

#: Which of many, the newest first: most happens to that.
NUMBER = st.one_of(st.just(0), st.integers(0, 2), st.integers(0, 30))
WORKER = st.sampled_from(WORKERS)
PRIORITY = st.sampled_from(Priority)
DEFINITION = st.sampled_from(sorted(DEFINITIONS))
USER = st.sampled_from(USERS)
VERSION = st.sampled_from(["", "", "another"])
#: How many losses end a job.
LOSSES = st.sampled_from([1, 3, 4, 4])
RUN_END = st.one_of(
    st.tuples(st.sampled_from([S.COMPLETED, S.FAILED, S.TIMED_OUT, S.CANCELED]), st.just(0)),
    st.tuples(st.just(S.RETRYING), st.sampled_from([0, 1, 3000])),
)


class LifeOfJobs(RuleBasedStateMachine):
    """Does each step to the store and to the model, and holds one against the other."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        client.flushall()
        self.client, self.clock = client, Clock()
        self.store = Store(client, clock=self.clock)
        self.scripts = Scripts(client, NAMESPACE, self.clock)
        self.model = Model(self.clock.now_ms)
        self.latest_ms = self.clock.now_ms
        self.made: list[str] = []
        self.seen: list[tuple[str, int, Priority, str]] = []
        """Every message that a worker ever took: (job, delivery, queue, as it was)."""
        self.starts: list[tuple[str, int, str, str, str]] = []
        self.ends: list[tuple[str, int, str, JobState, str, int]] = []
        self.steps = 0
        self.agreed = True
        for name, priority in DEFINITIONS.items():
            self._publish(name, priority)
        for user in USERS:
            self._create(user)
        for worker in WORKERS[:2]:
            self.heartbeat(worker, 100)

    def _publish(self, name: str, priority: Priority) -> None:
        publish(self.store, define(name, priority=priority.value, **MORE.get(name, {})))
        self.store.follow_priority(name, priority)

    def _create(self, user: str) -> None:
        self.store.create_user(user, actor=ACTOR)
        for name in self.model.published:
            subscribe(self.store, user, name)
        self.model.users[user] = set(self.model.published)

    # --- what must hold after each step

    @invariant()
    def ledger_and_model_agree(self) -> None:
        self.agreed = False
        self._agree()
        self.steps += 1
        if EXAMPLES or self.steps % 8 == 0:
            assert_consistent(self.client, self.store, complete=not self.model.forgotten, clock_set_back=True)
        self.agreed = True

    def _agree(self) -> None:
        """Follow what was released meanwhile, which any step may do; everything else must be as the model has it."""
        model = self.model
        model.now_ms = self.clock.now_ms
        found = {job.id: job for job in self.store.jobs_by_id(sorted({*model.jobs, *model.forgotten}))}
        assert found.keys() == model.jobs.keys()
        messages = {priority: [(one.job_id, one.delivery) for one in queue(self.client, priority)] for priority in Priority}
        into = {message: priority for priority, listed in messages.items() for message in listed}
        for job_id, job in model.jobs.items():
            real = found[job_id]
            if job.waits and real.state is S.QUEUED:
                assert model.may_go(job), f"{job_id} must not go now"
                message = (job_id, job.delivery + 1)
                assert into.get(message) is job.priority, f"{message} was released into {into.get(message)}"
                model.released(job, job.priority)
            elif job.waits and real.state is S.REJECTED:
                assert model.may_be_rejected(job), f"{job_id} must not be rejected"
                model.reject(job)
            elif job.waits and model.held(job) and not job.own_priority and real.priority is model.published.get(job.definition):
                job.priority = real.priority
            assert real.state is job.state, f"{job_id} is {real.state}, it should be {job.state}"
            assert (real.delivery, real.attempt) == (job.delivery, job.attempt)
            assert real.failures == max(0, job.attempt - 1 - job.forgiven), f"{job_id}: failures"
            assert (real.priority, real.execute_after_ms) == (job.priority, job.after_ms)
            assert (real.worker, real.version, real.finished_ms) == (job.worker, job.version, job.finished_ms)
            self._check_history(job)
        assert {priority: sorted(listed) for priority, listed in messages.items()} == {
            priority: sorted(listed) for priority, listed in model.queues.items()
        }, "messages"
        heard = dict(cast("list[tuple[str, float]]", self.client.zrange(key(NAMESPACE, "workers"), 0, -1, withscores=True)))
        assert heard == {worker: heard_ms for worker, (heard_ms, _) in model.workers.items()}
        dead = cast("list[tuple[str, float]]", self.client.zrange(key(NAMESPACE, "dead"), 0, -1, withscores=True))
        assert dead == list(model.dead().items()), "dead letters"
        assert self.store.counters() == +model.counters, "counters"
        assert not self.client.exists(UNACKED)

    def _check_history(self, job: Life) -> None:
        history = self.store.history(job.job_id)
        job.told = history[-1].to_state is history[-1].from_state and history[-1].reason.startswith(_TOLD)
        # that release came to it in vain, or that it got its definition's priority, is told and changes nothing
        lines = [line for line in history if line.to_state is not line.from_state or not line.reason.startswith(_TOLD)]
        real = [Line(line.from_state, line.to_state, line.attempt, line.worker, line.reason) for line in lines]
        assert len(real) == len(job.lines), f"{job.job_id} has the history {real}, it should have {job.lines}"
        for line, wanted in zip(real, job.lines, strict=True):
            same = (line.origin, line.state, line.attempt, line.worker) == (wanted.origin, wanted.state, wanted.attempt, wanted.worker)
            assert same, f"{job.job_id}: {line}, it should be {wanted}"
            assert wanted.says in line.says, f"{job.job_id}: {line}, it should be {wanted}"

    # --- people

    @precondition(lambda self: self.unfinished < MOST_JOBS)
    @rule(definition=DEFINITION, user=USER, delay_ms=st.sampled_from([0, 0, 0, 2000]), priority=st.sampled_from([None, None, *Priority]))
    def submit(self, definition: str, user: str, delay_ms: int, priority: Priority | None) -> None:
        job_id = f"{definition}:{user}:m{len(self.made)}"
        wanted = Enqueue(job_id, delay_ms=delay_ms, priority=priority)
        if user not in self.model.users:
            with pytest.raises(UnknownUser):
                self.store.enqueue([wanted])
        elif definition not in self.model.published:
            with pytest.raises(UnknownDefinition):
                self.store.enqueue([wanted])
        else:
            assert self.store.enqueue([wanted]) == [self.model.submit(job_id, delay_ms, priority)]
            self.made.append(job_id)

    @precondition(lambda self: self.model.jobs)
    @rule(number=NUMBER, delay_ms=st.sampled_from([0, 5000]), priority=st.sampled_from([None, *Priority]))
    def submit_again(self, number: int, delay_ms: int, priority: Priority | None) -> None:
        job = self.any_job(number)
        if job is not None and job.definition in self.model.published:
            assert self.store.enqueue([Enqueue(job.job_id, delay_ms=delay_ms, priority=priority)]) == [False]

    @precondition(lambda self: self.unfinished < MOST_JOBS)
    @rule(definition=DEFINITION)
    def trigger(self, definition: str) -> None:
        """Planned jobs, which have packed records."""
        if definition not in self.model.published:
            return
        self.clock.now_ms += 1
        self.model.now_ms = self.clock.now_ms
        at_ms, subscribers = self.store.trigger(definition, window=timedelta(0), actor=ACTOR)
        assert subscribers == sum(definition in subscribed for subscribed in self.model.users.values())
        opened = [one for one in self.store.occurrences(definition, limit=1000) if one.at_ms == at_ms]
        assert len(opened) == (subscribers > 0)
        for occurrence in opened:
            self.store.plan(occurrence.id, horizon=timedelta(0), batch=10)
        for job in self.store.jobs(definition=definition, limit=1000).items:
            if job.id not in self.model.jobs:
                assert job.user in self.model.users
                assert not self.model.paused & {definition, job.user, f"{job.user}:{definition}"}, f"{job.id} was planned"
                skipped = job.state is S.REJECTED
                assert not skipped or self.model.overlaps(definition, job.user), f"{job.id} was skipped"
                self.model.triggered(job.id, job.execute_after_ms, skipped=skipped)
                self.made.append(job.id)

    @precondition(lambda self: self.made)
    @rule(number=NUMBER)
    def cancel(self, number: int) -> None:
        self._cancel(self.any_id(number), None)

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER)
    def cancel_delivery(self, number: int) -> None:
        job_id, delivery, *_ = self.any_seen(number)
        self._cancel(job_id, delivery)

    def _cancel(self, job_id: str, delivery: int | None) -> None:
        before = self.model.cancel(job_id, delivery, "not wanted")
        if before is None:
            with pytest.raises(UnknownJob):
                self.store.cancel(job_id, reason="not wanted", delivery=delivery)
        else:
            assert self.store.cancel(job_id, reason="not wanted", delivery=delivery) is before

    @precondition(lambda self: self.made)
    @rule(number=NUMBER)
    def retry(self, number: int) -> None:
        self._retry(self.any_id(number))

    @precondition(lambda self: any(job.state in RETRYABLE for job in self.model.jobs.values()))
    @rule(number=NUMBER)
    def retry_what_ended(self, number: int) -> None:
        ended = [job for job in self.model.jobs.values() if job.state in RETRYABLE]
        self._retry(ended[number % len(ended)].job_id)

    def _retry(self, job_id: str) -> None:
        wanted = self.model.retry(job_id, "once more")
        assert retry(self.store, job_id, "once more") == wanted

    @precondition(lambda self: self.made)
    @rule(numbers=st.lists(NUMBER, min_size=1, max_size=3))
    def redrive(self, numbers: list[int]) -> None:
        """Of dead letters, of what was redriven or discarded before, and of others."""
        ids = [self.any_dead(number) for number in numbers]
        answers = [self.model.retry(job_id, "redriven", only_dead=True) for job_id in ids]
        refusals = {"unknown": DeadLetterResult.GONE, "not dead": DeadLetterResult.NOT_DEAD, "removed": DeadLetterResult.REMOVED}
        wanted = [refusals.get(answer, DeadLetterResult.DONE) for answer in answers]
        assert self.store.redrive(ids, reason="redriven") == wanted

    @precondition(lambda self: self.made)
    @rule(numbers=st.lists(NUMBER, min_size=1, max_size=3))
    def discard(self, numbers: list[int]) -> None:
        ids = [self.any_dead(number) for number in numbers]
        wanted = [self.model.discard(job_id) for job_id in ids]
        assert self.store.discard(ids, actor=ACTOR, subject="", detail="") == wanted

    @precondition(lambda self: self.model.jobs)
    @rule(number=NUMBER, priority=PRIORITY)
    def prioritize(self, number: int, priority: Priority) -> None:
        job = self.any_job(number)
        if job is not None:
            assert self.store.prioritize(job.job_id, priority, reason="given by hand") is self.model.prioritize(
                job.job_id, priority, "given by hand"
            )

    @precondition(lambda self: self.model.jobs)
    @rule(number=NUMBER, worker=WORKER)
    def note(self, number: int, worker: str) -> None:
        job = self.any_job(number)
        if job is not None:
            self.store.note(job.job_id, worker=worker, text="seen")
            job.note(worker, "seen")

    @rule(definition=DEFINITION, user=USER, what=st.sampled_from(["definition", "user", "subscription"]))
    def pause(self, definition: str, user: str, what: str) -> None:
        store, paused = self.store, self.model.paused
        if what == "definition":
            if definition in self.model.published:
                assert store.pause_definition(definition, why="test", actor=ACTOR) is (definition not in paused)
                paused.add(definition)
        elif user in self.model.users and (what == "user" or definition in self.model.users[user]):
            name = user if what == "user" else f"{user}:{definition}"
            done = store.pause_user(user, actor=ACTOR) if what == "user" else store.pause_subscription(user, definition, actor=ACTOR)
            assert done is (name not in paused)
            paused.add(name)

    @precondition(lambda self: self.model.paused)
    @rule(number=NUMBER)
    def resume(self, number: int) -> None:
        self._resume(sorted(self.model.paused)[number % len(self.model.paused)])

    def _resume(self, what: str) -> None:
        user, _, definition = what.partition(":")
        if what in DEFINITIONS:
            assert self.store.resume_definition(what, actor=ACTOR)
        elif definition:
            assert self.store.resume_subscription(user, definition, actor=ACTOR)
        else:
            assert self.store.resume_user(user, actor=ACTOR)
        self.model.resume(what)

    @rule(definition=DEFINITION, priority=PRIORITY)
    def publish(self, definition: str, priority: Priority) -> None:
        self._publish(definition, priority)
        self.model.publish(definition, priority)

    @precondition(lambda self: self.made)
    @rule(what=st.sampled_from(["retract", "retract", "delete", "sweep"]), definition=DEFINITION, user=USER)
    def remove(self, what: str, definition: str, user: str) -> None:
        if what == "retract":
            queued = [job.definition for job in self.model.jobs.values() if job.state is S.QUEUED]
            definition = queued[0] if queued else definition
            self.store.retract(definition, actor=ACTOR)
            self.model.retract(definition)
        elif what == "sweep":
            self.store.sweep(retention=milliseconds(RETENTION_MS), dead_retention=milliseconds(DEAD_RETENTION_MS), dead_max=MOST_DEAD)
            self.model.sweep()
        elif user in self.model.users:
            subscriptions = len(self.model.users[user])
            assert self.store.delete_user(user, actor=ACTOR) == (self.model.delete_user(user), subscriptions)

    @precondition(lambda self: len(self.model.users) < len(USERS))
    @rule()
    def create_user(self) -> None:
        for user in USERS:
            if user not in self.model.users:
                self._create(user)

    # --- workers

    @rule(worker=WORKER, slots=st.sampled_from([100, 100, 0]))
    def heartbeat(self, worker: str, slots: int) -> None:
        stops = self.store.heartbeat(worker, slots=slots, queues=list(Priority), buffer=1).stops
        assert {(stop.job_id, stop.delivery): stop.why for stop in stops} == self.model.stops[worker]
        assert len(stops) == len(self.model.stops[worker])
        self.model.workers[worker] = (self.clock.now_ms, slots)

    @precondition(lambda self: any(self.model.stops.values()))
    @rule(number=NUMBER, note=st.sampled_from(["", "stopped, as it was told"]), discarded=st.booleans(), twice=st.booleans())
    def stop(self, number: int, note: str, discarded: bool, twice: bool) -> None:
        """A worker does what it is told to, and may say so twice."""
        told = [(worker, *run, why) for worker, runs in self.model.stops.items() for run, why in runs.items()]
        worker, job_id, delivery, why = told[number % len(told)]
        for _ in range(1 + twice):
            wanted = self.model.stopped(worker, job_id, delivery, note, discarded=discarded)
            assert self.store.stopped(worker, Stop(job_id, delivery, why), note=note, discarded=discarded) is wanted

    @rule()
    def release(self) -> None:
        """What is due and may go must go, when anyone asks."""
        self.store.release(limit=1000)
        self._agree()
        left = [job.job_id for job in self.model.jobs.values() if self.model.may_go(job)]
        assert not left, f"{left} could go and were not released"
        left = [job.job_id for job in self.model.jobs.values() if self.model.may_be_rejected(job) and not self.model.held(job)]
        assert not left, f"{left} wait for a definition that does not exist"

    @precondition(lambda self: any(self.model.queues.values()))
    @rule()
    def pop(self) -> None:
        """A worker takes a message, and may be no more before it starts the job."""
        self._pop()

    def _pop(self) -> tuple[str, int]:
        filled = next(priority for priority in Priority if self.model.queues[priority])
        message = take(self.client)
        taken = (message.job_id, message.delivery)
        self.model.queues[filled].remove(taken)
        self.seen.append((*taken, filled, message.raw))
        return taken

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER)
    def put_back(self, number: int) -> None:
        """A worker loses its connection, and gives a message back that it or another may have started or ended long ago."""
        job_id, delivery, priority, raw = self.any_seen(number)
        if (job_id, delivery) not in self.model.queues[priority]:
            self.client.rpush(priority, raw)
            self.model.queues[priority].append((job_id, delivery))

    @precondition(lambda self: any(self.model.queues.values()))
    @rule(worker=WORKER, version=VERSION)
    def run(self, worker: str, version: str) -> None:
        self._start(*self._pop(), worker, version)

    @precondition(lambda self: any(self.model.queues.values()))
    @rule(worker=WORKER)
    def run_too(self, worker: str) -> None:
        """The same, so that it is tried more often."""
        self._start(*self._pop(), worker)

    @precondition(lambda self: self.unfinished < MOST_JOBS)
    @rule(definition=DEFINITION, user=USER, worker=WORKER)
    def begin(self, definition: str, user: str, worker: str) -> None:
        """What nearly all programs need: something that runs."""
        self.submit(definition, user, 0, None)
        self._agree()
        if any(self.model.queues.values()):
            self._start(*self._pop(), worker)

    @precondition(lambda self: self.running)
    @rule(number=NUMBER, state=st.sampled_from([S.FAILED, S.TIMED_OUT]), poison=st.booleans())
    def die(self, number: int, state: JobState, poison: bool) -> None:
        """A run is the last one, in any of the ways that leave a dead letter."""
        job = self.running[number % len(self.running)]
        if poison:
            self._lose(job.job_id, job.delivery, job.worker, 1, stuck=False)
        else:
            self._finish(job.job_id, job.delivery, job.worker, state, 0)

    @precondition(lambda self: self.running)
    @rule(number=NUMBER, most=st.sampled_from([500, 500, 1]), back=st.booleans())
    def fall_silent(self, number: int, most: int, back: bool) -> None:
        """A worker that runs something is lost, and may come back."""
        worker = self.running[number % len(self.running)].worker
        self.wait(SILENCE_MS + 1)
        self._recover(worker, self.model.workers[worker][0], most, 4)
        self._agree()
        if back:
            self.heartbeat(worker, 100)

    @precondition(lambda self: self.running)
    @rule(number=NUMBER)
    def cancel_run(self, number: int) -> None:
        self._cancel(self.running[number % len(self.running)].job_id, None)

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER, worker=WORKER)
    def start_late(self, number: int, worker: str) -> None:
        """Any message that was ever taken is started, for the first time or once more."""
        job_id, delivery, *_ = self.any_seen(number)
        self._start(job_id, delivery, worker)

    def _start(self, job_id: str, delivery: int, worker: str, version: str = "") -> None:
        self.starts.append((job_id, delivery, worker, f"call {len(self.starts)}", version))
        self._call_start(len(self.starts) - 1)

    @precondition(lambda self: self.starts)
    @rule(number=NUMBER)
    def start_again(self, number: int) -> None:
        """The answer was lost, and the same call comes again."""
        self._call_start(len(self.starts) - 1 - number % len(self.starts))

    def _call_start(self, number: int) -> None:
        job_id, delivery, worker, call, version = self.starts[number]
        wanted = self.model.start(job_id, delivery, worker, call, version)
        answer = self.scripts.run("start", job_id, delivery, worker, 0, call, version)
        assert answer[0] == wanted
        if wanted == "run":
            job = self.model.jobs[job_id]
            assert (answer[1], answer[2], answer[5]) == (job.attempt, job.losses, job.forgiven)

    @precondition(lambda self: any(self.model.queues.values()))
    @rule(worker=WORKER)
    def refuse(self, worker: str) -> None:
        """A worker gets what it does not know."""
        self._refuse(*self._pop(), worker)

    def _refuse(self, job_id: str, delivery: int, worker: str) -> None:
        wanted = self.model.refuse(job_id, delivery, worker, "not known here")
        assert self.scripts.run("refuse", job_id, delivery, worker, "not known here", REFUSED_FOR_MS, MOST_REFUSALS) == wanted

    @precondition(lambda self: self.running)
    @rule(number=NUMBER, end=RUN_END, twice=st.booleans())
    def finish(self, number: int, end: tuple[JobState, int], twice: bool) -> None:
        job = self.running[number % len(self.running)]
        self._finish(job.job_id, job.delivery, job.worker, *end)
        if twice:
            self._agree()
            self._call_finish(len(self.ends) - 1)

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER, worker=WORKER, end=RUN_END)
    def finish_late(self, number: int, worker: str, end: tuple[JobState, int]) -> None:
        """By anybody who ever had the message."""
        job_id, delivery, *_ = self.any_seen(number)
        self._finish(job_id, delivery, worker, *end)

    def _finish(self, job_id: str, delivery: int, worker: str, state: JobState, wait_ms: int) -> None:
        self.ends.append((job_id, delivery, worker, state, f"end {len(self.ends)}", wait_ms))
        self._call_finish(len(self.ends) - 1)

    @precondition(lambda self: self.ends)
    @rule(number=NUMBER)
    def finish_again(self, number: int) -> None:
        """The answer was lost, and the same call comes again."""
        self._call_finish(len(self.ends) - 1 - number % len(self.ends))

    def _call_finish(self, number: int) -> None:
        job_id, delivery, worker, state, reason, wait_ms = self.ends[number]
        wanted = self.model.finish(job_id, delivery, worker, state, reason, wait_ms)
        counted = self.store.finish(job_id, delivery=delivery, worker=worker, state=state, reason=reason, retry_in=milliseconds(wait_ms))
        assert counted is wanted, f"the end of delivery {delivery} of {job_id} on {worker} {'counted' if counted else 'did not count'}"

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER, worker=WORKER)
    def renew(self, number: int, worker: str) -> None:
        job_id, delivery, *_ = self.any_seen(number)
        self._renew(job_id, delivery, worker)

    def _renew(self, job_id: str, delivery: int, worker: str) -> None:
        assert self.store.renew(job_id, delivery=delivery, worker=worker) is self.model.renew(job_id, delivery, worker)

    @precondition(lambda self: self.flying)
    @rule(
        number=NUMBER,
        worker=WORKER,
        deliveries=st.sampled_from([0, 0, 1]),
        verb=st.sampled_from(["start", "finish", "refuse", "lose", "renew", "cancel"]),
    )
    def confuse(self, number: int, worker: str, deliveries: int, verb: str) -> None:
        """Somebody speaks of a job that is queued or runs, and it may be another delivery, or another's run."""
        job = self.flying[number % len(self.flying)]
        delivery = job.delivery - deliveries
        if verb == "start":
            self._start(job.job_id, delivery, worker)
        elif verb == "finish":
            self._finish(job.job_id, delivery, worker, S.COMPLETED, 0)
        elif verb == "refuse":
            self._refuse(job.job_id, delivery, worker)
        elif verb == "lose":
            self._lose(job.job_id, delivery, worker, 3, stuck=False)
        elif verb == "renew":
            self._renew(job.job_id, delivery, worker)
        else:
            self._cancel(job.job_id, delivery)

    @precondition(lambda self: self.flying)
    @rule(most_losses=LOSSES, stuck=st.booleans())
    def lose(self, most_losses: int, stuck: bool) -> None:
        """The process dies of the job that has killed the most, or the run does not end."""
        job = max(self.flying, key=lambda one: one.losses)
        # only what runs is stuck, and only its own worker says so
        self._lose(job.job_id, job.delivery, job.worker, most_losses, stuck=stuck and job.state is S.RUNNING)

    def _lose(self, job_id: str, delivery: int, worker: str, most_losses: int, *, stuck: bool) -> None:
        what = "stuck" if stuck else "process died"
        wanted = self.model.lose(job_id, delivery, worker, what, most_losses, stuck=stuck)
        assert lose(self.store, job_id, delivery, worker, what, most_losses, stuck=stuck) is wanted

    @precondition(lambda self: self.seen)
    @rule(numbers=st.lists(NUMBER, max_size=3), worker=WORKER, also_running=st.booleans())
    def withdraw(self, numbers: list[int], worker: str, also_running: bool) -> None:
        """A worker that stops gives back some of what it ever took, or believes that it did."""
        held = self.held(numbers)
        wanted = self.model.withdraw(worker, held, also_running=also_running)
        assert self.store.withdraw(worker, tags(held), also_running=also_running) == wanted

    @precondition(lambda self: self.model.workers)
    @rule(numbers=st.lists(NUMBER, max_size=2), worker=WORKER)
    def leave(self, numbers: list[int], worker: str) -> None:
        held = self.held(numbers)
        assert self.store.leave(worker, tags(held)) == self.model.leave(worker, held)

    @precondition(lambda self: self.model.silent())
    @rule(most=st.sampled_from([500, 500, 1, 2]), most_losses=LOSSES)
    def recover(self, most: int, most_losses: int) -> None:
        worker = self.model.silent()[0]
        self._recover(worker, self.model.workers[worker][0], most, most_losses)

    @precondition(lambda self: self.model.workers)
    @rule(number=NUMBER, ago_ms=st.sampled_from([0, 1, 1000]))
    def recover_by_another_clock(self, number: int, ago_ms: int) -> None:
        """An observer found a worker silent by a clock of its own, rightly or just before it was heard of again."""
        worker = sorted(self.model.workers)[number % len(self.model.workers)]
        self._recover(worker, self.model.workers[worker][0] - ago_ms, 500, 4)

    def _recover(self, worker: str, seen_ms: int, most: int, most_losses: int) -> None:
        rows = recover(self.store, worker, seen_ms, "silent for long", most, most_losses)
        self.model.recovered(worker, seen_ms, "silent for long", rows, most, most_losses)

    @precondition(lambda self: any(job.state is S.QUEUED or job.delayed_ms is not None for job in self.model.jobs.values()))
    @rule(clock_set=st.sampled_from([False, False, False, True]))
    def reclaim(self, clock_set: bool) -> None:
        found = self.store.reclaim(patience=milliseconds(PATIENCE_MS), clock_set=clock_set)
        assert sorted(found) == self.model.reclaim(clock_set=clock_set)

    # --- time

    @rule(ms=st.sampled_from([1, 1000, 4000, PATIENCE_MS, SILENCE_MS, SILENCE_MS + 1]))
    def wait(self, ms: int) -> None:
        self._set_clock(self.clock.now_ms + ms)

    @precondition(lambda self: self.made)
    @rule(ms=st.sampled_from([-1, -1000, -3_600_000, 3_600_000]))
    def set_clock(self, ms: int) -> None:
        self._set_clock(self.clock.now_ms + ms)

    def _set_clock(self, now_ms: int) -> None:
        self.clock.now_ms = self.model.now_ms = now_ms
        self.latest_ms = max(self.latest_ms, now_ms)

    # --- the end

    def teardown(self) -> None:
        """Time passes, a worker lives, nobody meddles: everything ends."""
        if not self.agreed:
            return
        self._set_clock(self.latest_ms)
        for _ in self._quiet():
            if not self.unfinished:
                break
        assert not self.unfinished, f"these never end: {[job for job in self.model.jobs.values() if not job.state.terminal]}"
        assert_consistent(self.client, self.store, complete=not self.model.forgotten, clock_set_back=True)
        assert_idle(self.client)

    def _quiet(self) -> Iterator[None]:
        for what in sorted(self.model.paused):
            self._resume(what)
            self._agree()
        for name in DEFINITIONS:
            self.publish(name, self.model.published.get(name, Priority.LOW))
            self._agree()
        for _ in range(6):
            yield
            self.wait(60_000)
            self.heartbeat("w9", 100)
            self._agree()
            while self.model.silent():
                self.recover(500, 3)
                self._agree()
            self.reclaim(False)
            self._agree()
            self.release()
            self._agree()
            while any(self.model.queues.values()):
                self._start(*self._pop(), "w9")
                self._agree()
            for job in self.running:
                if job.worker == "w9":
                    self._finish(job.job_id, job.delivery, "w9", S.COMPLETED, 0)
                    self._agree()
        yield

    # --- choosing

    @property
    def unfinished(self) -> int:
        return sum(not job.state.terminal for job in self.model.jobs.values())

    @property
    def flying(self) -> list[Life]:
        """The newest first."""
        return [job for job in reversed(self.model.jobs.values()) if job.state in (S.QUEUED, S.RUNNING)]

    @property
    def running(self) -> list[Life]:
        return [job for job in self.model.jobs.values() if job.state is S.RUNNING]

    def any_id(self, number: int) -> str:
        """The newest come first: more happens to them."""
        return self.made[-1 - number % len(self.made)]

    def any_job(self, number: int) -> Life | None:
        return self.model.jobs.get(self.any_id(number))

    def any_dead(self, number: int) -> str:
        """A dead letter, or any job: each third number."""
        dead = [job_id for job_id in reversed(self.made) if job_id in self.model.dead()]
        return dead[number % len(dead)] if dead and number % 3 != 2 else self.any_id(number)

    def held(self, numbers: Sequence[int]) -> list[tuple[str, int]]:
        """Deliveries that somebody took, as often as the numbers say."""
        return [self.any_seen(number)[:2] for number in numbers if self.seen]

    def any_seen(self, number: int) -> tuple[str, int, Priority, str]:
        return self.seen[-1 - number % len(self.seen)]


_TOLD = ("held: ", "no longer held", "priority ")


def test_the_life_of_jobs_is_as_the_model_has_it(client: redis.Redis) -> None:
    run_state_machine_as_test(
        cast("Any", lambda: LifeOfJobs(client)),
        settings=settings(
            deadline=None,
            database=None,
            max_examples=EXAMPLES or 100,
            stateful_step_count=100 if EXAMPLES else 50,
            suppress_health_check=list(HealthCheck),
        ),
    )
