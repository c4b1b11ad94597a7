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
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from taskplatform.errors import Conflict, UnknownDefinition, UnknownJob, UnknownUser
from taskplatform.model import TRANSITIONS, JobState, Priority
from taskplatform.store import Enqueue, Renewal, Store
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
    worker: str = ""
    finished_ms: int | None = None
    released_ms: int = 0
    answered: object = None
    """The last call that started or ended a run: it may come again."""
    lines: list[Line] = field(default_factory=list)

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

    def note(self, worker: str, says: str) -> None:
        self.lines.append(Line(self.state, self.state, self.attempt, worker, says))


@dataclass
class Model:
    """The rules. Each method says what a verb does, and returns what it answers."""

    now_ms: int
    jobs: dict[str, Life] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    queues: dict[Priority, list[tuple[str, int]]] = field(default_factory=lambda: {priority: [] for priority in Priority})
    workers: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By id, when it was last heard of, and its slots."""
    stops: defaultdict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
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
        self.jobs[job_id] = Life(job_id, priority or self.published[job_id.split(":")[0]], priority is not None, self.now_ms + delay_ms)
        return True

    def overlaps(self, definition: str, user: str) -> bool:
        """Whether a planned job of `single` may be skipped for another."""
        return definition == "single" and any(
            (job.definition, job.user) == (definition, user) and not job.state.terminal for job in self.jobs.values()
        )

    def skip(self, job_id: str) -> None:
        self._end(self.jobs[job_id], S.REJECTED, "", "overlap")

    def released(self, job: Life, into: Priority) -> None:
        job.to(S.QUEUED, "", "released")
        job.delivery += 1
        job.released_ms = self.now_ms
        self.queues[into].append((job.job_id, job.delivery))

    def start(self, job_id: str, delivery: int, worker: str, call: str) -> str:
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
        job.to(S.RUNNING, worker, "started")
        job.worker, job.answered = worker, call
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
            job.note(worker, f"discarded the result of delivery {delivery}: {state}, {reason}")
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
        definition = self.jobs[job_id].definition
        return Renewal.IN_TIME if definition == "limited" and definition in self.published else Renewal.ANY_TIME

    def lose(self, job_id: str, delivery: int, worker: str, what: str, most_losses: int) -> bool:
        job = self.jobs.get(job_id)
        before_start = job is not None and job.state is S.QUEUED and job.delivery == delivery
        if job is None or not (before_start or self.is_run(job_id, delivery, worker)):
            return False
        self._lost(job, worker, what, most_losses)
        return True

    def _lost(self, job: Life, worker: str, what: str, most_losses: int) -> None:
        job.losses += 1
        ran = job.state is S.RUNNING
        if job.losses >= most_losses:
            self._end(job, S.FAILED if ran else S.REJECTED, worker, f"poison pill: {what}, {job.losses} losses in all")
        else:
            self._wait(job, S.RETRYING, self.now_ms + BACKOFF_MS * 2 ** (job.losses - 1), worker, what)
        job.forgiven += ran

    def runs_of(self, worker: str) -> list[Life]:
        return [job for job in self.jobs.values() if job.state is S.RUNNING and job.worker == worker]

    def silent(self) -> set[str]:
        return {worker for worker, (heard_ms, _) in self.workers.items() if heard_ms < self.now_ms - SILENCE_MS}

    def recovered(self, rows: list[tuple[str, str]], most: int, most_losses: int) -> None:
        """Follow what a call took: of silent workers only; all of them, where there is no more than `most`."""
        silent = self.silent()
        for kind, name in rows:
            if kind == "worker":
                assert name in silent
                assert not self.runs_of(name), f"{name} was forgotten with jobs that it runs"
                del self.workers[name]
                silent.remove(name)
            else:
                job = self.jobs[name]
                assert job.state is S.RUNNING
                assert job.worker in silent, f"{name} was taken from {job.worker}, which lives"
                self._lost(job, job.worker, f"worker {job.worker} lost", most_losses)
        assert len(rows) >= most or not silent, f"{silent} were silent for too long, and nobody took what they had"

    def leave(self, worker: str) -> int:
        jobs = self.runs_of(worker)
        for job in jobs:
            self._wait(job, S.RETRYING, job.after_ms, worker, f"worker {worker} stopped")
            job.forgiven += 1
        self.workers.pop(worker, None)
        return len(jobs)

    def reclaim(self) -> list[str]:
        lost = [
            job
            for job in self.jobs.values()
            if job.state is S.QUEUED
            and job.released_ms <= self.now_ms - PATIENCE_MS
            and not any((job.job_id, job.delivery) in messages for messages in self.queues.values())
        ]
        for job in lost:
            self._wait(job, job.back, job.after_ms, "", "its message was lost")
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
            self.stops[job.worker].append((job.job_id, job.delivery))
        self._end(job, S.CANCELED, job.worker if job.state is S.RUNNING else "", reason)

    def retry(self, job_id: str, reason: str) -> JobState | None:
        job = self.jobs.get(job_id)
        if job is None:
            return None
        before = job.state
        if before in RETRYABLE:
            job.finished_ms = None
            job.losses, job.forgiven = 0, job.attempt
            self._wait(job, S.PENDING, self.now_ms, "", reason)
        return before

    def prioritize(self, job_id: str, priority: Priority, reason: str) -> JobState | None:
        job = self.jobs.get(job_id)
        if job is None:
            return None
        if job.waits and job.priority is not priority:
            job.priority, job.own_priority = priority, True
            job.note("", reason)
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

    def sweep(self, retention_ms: int) -> None:
        for job in list(self.jobs.values()):
            if job.finished_ms is not None and job.finished_ms <= self.now_ms - retention_ms:
                self._forget(job)

    def reject(self, job: Life) -> None:
        self._end(job, S.REJECTED, "", "does not exist any more")

    # what they share

    def _wait(self, job: Life, state: JobState, after_ms: int, worker: str, says: str) -> None:
        job.to(state, worker, says)
        job.after_ms = after_ms
        self._follow(job)

    def _follow(self, job: Life) -> None:
        if not job.own_priority:
            job.priority = self.published.get(job.definition, job.priority)

    def _end(self, job: Life, state: JobState, worker: str, says: str) -> None:
        job.to(state, worker, says)
        job.finished_ms = self.now_ms

    def _forget(self, job: Life) -> None:
        del self.jobs[job.job_id]
        self.forgotten.add(job.job_id)


# --- the verbs whose arguments are not the model's concern -----------------------------------------------------------


def recover(store: Store, most: int, most_losses: int) -> list[tuple[str, str]]:
    """One look of somebody who saw each heartbeat when it was made, and takes what is left of the first that is silent too long."""
    for worker, at_ms in sorted(store.heartbeats().items()):
        if store.now_ms() - at_ms > SILENCE_MS:
            backoff = milliseconds(BACKOFF_MS)
            return store.recover(worker, seen_ms=at_ms, how="silent", max_losses=most_losses, backoff=backoff, limit=most)
    return []


def lose(store: Store, job_id: str, delivery: int, worker: str, what: str, most_losses: int) -> bool:
    """A worker says that the process died that ran this."""
    return store.lose(job_id, delivery=delivery, worker=worker, what=what, max_losses=most_losses, backoff=milliseconds(BACKOFF_MS))


def retry(store: Store, job_id: str, reason: str) -> JobState:
    """Somebody wants it once more. The state that it was in, whatever that is."""
    before = store.job(job_id).state
    if before in RETRYABLE:
        return store.retry(job_id, reason=reason)
    with pytest.raises(Conflict, match=f"is {before}"):
        store.retry(job_id, reason=reason)
    return before


# --- programs --------------------------------------------------------------------------------------------------------

#: Which of many, the newest first: most happens to that.
NUMBER = st.one_of(st.just(0), st.integers(0, 2), st.integers(0, 30))
WORKER = st.sampled_from(WORKERS)
PRIORITY = st.sampled_from(Priority)
DEFINITION = st.sampled_from(sorted(DEFINITIONS))
USER = st.sampled_from(USERS)
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
        self.starts: list[tuple[str, int, str, str]] = []
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
            assert (real.worker, real.finished_ms) == (job.worker, job.finished_ms)
            self._check_history(job)
        assert {priority: sorted(listed) for priority, listed in messages.items()} == {
            priority: sorted(listed) for priority, listed in model.queues.items()
        }, "messages"
        heard = dict(cast("list[tuple[str, float]]", self.client.zrange(key(NAMESPACE, "workers"), 0, -1, withscores=True)))
        assert heard == {worker: heard_ms for worker, (heard_ms, _) in model.workers.items()}
        assert not self.client.exists(UNACKED)

    def _check_history(self, job: Life) -> None:
        history = self.store.history(job.job_id)
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
        self.store.trigger(definition, window=timedelta(0), actor=ACTOR)
        occurrence = self.store.occurrences(definition, limit=1)[0]
        self.store.plan(occurrence.id, horizon=timedelta(0), batch=10)
        self.model.now_ms = self.clock.now_ms
        for job in self.store.jobs(definition=definition, limit=1000).items:
            if job.id not in self.model.jobs:
                assert job.user in self.model.users
                assert not self.model.paused & {definition, job.user, f"{job.user}:{definition}"}, f"{job.id} was planned"
                skipped = job.state is S.REJECTED
                assert not skipped or self.model.overlaps(definition, job.user), f"{job.id} was skipped"
                assert self.model.submit(job.id, job.execute_after_ms - self.clock.now_ms, None)
                if skipped:
                    self.model.skip(job.id)
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
        before = self.model.retry(job_id, "once more")
        if before is None:
            with pytest.raises(UnknownJob):
                self.store.retry(job_id, reason="once more")
        else:
            assert retry(self.store, job_id, "once more") is before

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
            self.store.sweep(retention=milliseconds(RETENTION_MS))
            self.model.sweep(RETENTION_MS)
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
        stops = self.store.heartbeat(worker, slots=slots, queues=list(Priority), buffer=1)
        assert stops == self.model.stops.pop(worker, [])
        self.model.workers[worker] = (self.clock.now_ms, slots)

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
    @rule(worker=WORKER)
    def run(self, worker: str) -> None:
        self._start(*self._pop(), worker)

    @precondition(lambda self: any(self.model.queues.values()))
    @rule(worker=WORKER)
    def run_too(self, worker: str) -> None:
        """The same, so that it is tried more often."""
        self._start(*self._pop(), worker)

    @precondition(lambda self: self.seen)
    @rule(number=NUMBER, worker=WORKER)
    def start_late(self, number: int, worker: str) -> None:
        """Any message that was ever taken is started, for the first time or once more."""
        job_id, delivery, *_ = self.any_seen(number)
        self._start(job_id, delivery, worker)

    def _start(self, job_id: str, delivery: int, worker: str) -> None:
        self.starts.append((job_id, delivery, worker, f"call {len(self.starts)}"))
        self._call_start(len(self.starts) - 1)

    @precondition(lambda self: self.starts)
    @rule(number=NUMBER)
    def start_again(self, number: int) -> None:
        """The answer was lost, and the same call comes again."""
        self._call_start(len(self.starts) - 1 - number % len(self.starts))

    def _call_start(self, number: int) -> None:
        job_id, delivery, worker, call = self.starts[number]
        wanted = self.model.start(job_id, delivery, worker, call)
        answer = self.scripts.run("start", job_id, delivery, worker, 0, call)
        assert answer[0] == wanted
        if wanted == "run":
            job = self.model.jobs[job_id]
            assert (answer[1], answer[2], answer[5]) == (job.attempt, job.losses, job.forgiven)

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
        verb=st.sampled_from(["start", "finish", "lose", "renew", "cancel"]),
    )
    def confuse(self, number: int, worker: str, deliveries: int, verb: str) -> None:
        """Somebody speaks of a job that is queued or runs, and it may be another delivery, or another's run."""
        job = self.flying[number % len(self.flying)]
        delivery = job.delivery - deliveries
        if verb == "start":
            self._start(job.job_id, delivery, worker)
        elif verb == "finish":
            self._finish(job.job_id, delivery, worker, S.COMPLETED, 0)
        elif verb == "lose":
            self._lose(job.job_id, delivery, worker, 3)
        elif verb == "renew":
            self._renew(job.job_id, delivery, worker)
        else:
            self._cancel(job.job_id, delivery)

    @precondition(lambda self: self.flying)
    @rule(most_losses=LOSSES)
    def lose(self, most_losses: int) -> None:
        """The process dies of the job that has killed the most."""
        job = max(self.flying, key=lambda one: one.losses)
        self._lose(job.job_id, job.delivery, job.worker, most_losses)

    def _lose(self, job_id: str, delivery: int, worker: str, most_losses: int) -> None:
        wanted = self.model.lose(job_id, delivery, worker, "process died", most_losses)
        assert lose(self.store, job_id, delivery, worker, "process died", most_losses) is wanted

    @precondition(lambda self: self.model.workers)
    @rule(worker=WORKER)
    def leave(self, worker: str) -> None:
        assert self.store.leave(worker) == self.model.leave(worker)

    @precondition(lambda self: self.model.silent())
    @rule(most=st.sampled_from([500, 500, 1, 2]), most_losses=LOSSES)
    def recover(self, most: int, most_losses: int) -> None:
        self.model.recovered(recover(self.store, most, most_losses), most, most_losses)

    @precondition(lambda self: any(job.state is S.QUEUED for job in self.model.jobs.values()))
    @rule()
    def reclaim(self) -> None:
        assert sorted(self.store.reclaim(patience=milliseconds(PATIENCE_MS))) == self.model.reclaim()

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
            self.recover(500, 3)
            self._agree()
            self.reclaim()
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
