"""At each named step of a job its worker dies or freezes: the job completes elsewhere, its history says what happened, nothing is left.

The judge is the target: how often it was called, with which key, and that no two calls of a job overlapped while both callers lived.

All faults happen at once, because what takes long is to start workers and to wait for silence. The workers stand in lanes, one for each
queue: those that are to die serve `medium`, those that are to freeze `low`, those with Python functions `high`. Each has one slot, so it
takes one job, and the mark of its fault says which. Only then other workers come, for all queues.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from taskplatform.model import JobState, Priority, Transition
from taskplatform.store.keys import UNACKED, UNACKED_INDEX, key
from tests.acceptance.faults import Fault
from tests.acceptance.nodes import ROOT, WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Call, Target
from tests.support import wait_until

S = JobState
RUN = [S.QUEUED, S.ASSIGNED, S.RUNNING]
#: What the history says, by what the fault left behind.
DONE = [S.PENDING, *RUN, S.COMPLETED]
MESSAGE_LOST = [S.PENDING, S.QUEUED, S.PENDING, *RUN, S.COMPLETED]
RUN_LOST = [S.PENDING, *RUN, S.RETRYING, *RUN, S.COMPLETED]
PROCESS_LOST_BEFORE = [S.PENDING, S.QUEUED, S.RETRYING, *RUN, S.COMPLETED]
#: So many workers start at once that one may get no processor for a while; it must not be taken for lost for that.
PATIENCE_SECONDS = 6
#: What runs in the lane of Python functions.
FUNCTION = "returning"


@dataclass(frozen=True)
class Case:
    """A worker's fault, and what becomes of the job that it had."""

    lane: Priority
    point: str
    who: str
    """node: all of its processes; pool, main: the process that comes to the point."""
    states: Sequence[JobState]
    calls: int
    """At the target, by all attempts together."""
    losses: int = 0
    pool: str = "prefork"
    dropped: str = ""
    """What the frozen worker's log says of its delivery when it goes on."""
    discarded: bool = False
    """Whether it brings a result that counts no more."""
    kind: str = "call"

    def __str__(self) -> str:
        what = "frozen" if self.lane is Priority.LOW else "killed"
        parts = (what, self.who, self.point.replace(":", "_"), self.pool, self.kind)
        return "-".join(part for part in parts if part not in ("prefork", "call"))


def _killed(who: str, point: str, states: Sequence[JobState], calls: int, losses: int = 0, **more: Any) -> Case:
    return Case(Priority.MEDIUM, point, who, states, calls, losses, **more)


def _frozen(point: str, states: Sequence[JobState], calls: int, losses: int = 0, **more: Any) -> Case:
    return Case(Priority.LOW, point, "node", states, calls, losses, **more)


KILLED = [
    _killed("node", "popped", MESSAGE_LOST, 1),
    _killed("node", "received", MESSAGE_LOST, 1),
    _killed("node", "before:start", MESSAGE_LOST, 1),
    _killed("node", "after:start", RUN_LOST, 1, 1),
    _killed("node", "called", RUN_LOST, 2, 1),
    _killed("node", "before:finish", RUN_LOST, 2, 1),
    _killed("node", "after:finish", DONE, 1),
    _killed("node", "before:ack", DONE, 1),
    _killed("pool", "before:start", PROCESS_LOST_BEFORE, 1, 1),
    _killed("pool", "after:start", RUN_LOST, 1, 1),
    _killed("pool", "called", RUN_LOST, 2, 1),
    _killed("pool", "before:finish", RUN_LOST, 2, 1),
    _killed("pool", "after:finish", DONE, 1),
    _killed("main", "popped", MESSAGE_LOST, 1),
    _killed("main", "received", MESSAGE_LOST, 1),
    _killed("main", "before:ack", DONE, 1),
    _killed("node", "after:start", RUN_LOST, 1, 1, pool="threads"),
    _killed("node", "before:finish", RUN_LOST, 2, 1, pool="threads"),
]
FROZEN = [
    _frozen("popped", MESSAGE_LOST, 1, dropped="the job is stale"),
    _frozen("received", MESSAGE_LOST, 1, dropped="the job is stale"),
    _frozen("before:start", MESSAGE_LOST, 1, dropped="the job is stale"),
    _frozen("after:start", RUN_LOST, 1, 1, dropped="held up before its call, and makes it no more"),
    _frozen("called", RUN_LOST, 2, 1, dropped="discarded", discarded=True),
    _frozen("before:finish", RUN_LOST, 2, 1, dropped="discarded", discarded=True),
    _frozen("after:finish", DONE, 1),
    _frozen("before:ack", DONE, 1),
    _frozen("before:start", MESSAGE_LOST, 1, pool="threads", dropped="the job is stale"),
    _frozen("called", RUN_LOST, 2, 1, pool="threads", dropped="discarded", discarded=True),
]
FUNCTIONS = [
    Case(Priority.HIGH, "after:start", "node", RUN_LOST, 1, 1, kind=FUNCTION),
    Case(Priority.HIGH, "before:finish", "pool", RUN_LOST, 2, 1, kind=FUNCTION),
    Case(Priority.HIGH, "after:finish", "node", DONE, 1, kind=FUNCTION),
]
CASES = [*KILLED, *FROZEN, *FUNCTIONS]
SIGNALS = {Priority.LOW: signal.SIGSTOP}


@dataclass
class Act:
    """A case as it is played."""

    case: Case
    fault: Fault
    worker: WorkerNode
    job: str = ""
    next_job: str = ""
    """Of the same user, which may not go before the first has ended."""


@dataclass
class Stage:
    """All that happens at once, and what came of it."""

    site: Site
    acts: list[Act]
    others: list[WorkerNode] = field(default_factory=list)

    def of(self, case: Case) -> Act:
        return next(act for act in self.acts if act.case is case)


@pytest.fixture(scope="module")
def stage(own_site: Site, second_act: SecondAttempt, release_act: Released, target: Target) -> Stage:
    """Every case, up to the end of its job. The other two acts are asked for so that their workers start together with these."""
    site = own_site
    acts = [_act(site, case) for case in CASES]
    for act in acts:
        act.worker.ready()
    _have_a_job_each(site, target, acts)
    stage = Stage(site, acts, [_worker(site, "--concurrency", "4") for _ in range(2)])
    for act in acts:
        if act.case.lane is Priority.MEDIUM:
            act.next_job = site.platform.enqueue("call", user=act.job.split(":")[1], priority=Priority.MEDIUM).id
    for worker in stage.others:
        worker.ready()
    site.wait_for_all([act.job for act in acts])
    site.wait_for_all([act.next_job for act in acts if act.next_job])
    return stage


def _worker(site: Site, *options: str, fault: Fault | None = None) -> WorkerNode:
    return site.worker("--without-mingle", *options, fault=fault, heartbeat_timeout=f"{PATIENCE_SECONDS}s")


def _act(site: Site, case: Case) -> Act:
    fault = site.fault(case.point, signal=SIGNALS.get(case.lane, signal.SIGKILL), whole_node=case.who == "node", fresh=True)
    return Act(case, fault, _worker(site, "--concurrency", "1", "--pool", case.pool, "-Q", case.lane.value, fault=fault))


def _have_a_job_each(site: Site, target: Target, acts: Sequence[Act]) -> None:
    """Return when each has met its fault, at the first job that it took."""

    def submit(act: Act) -> None:
        user = site.user()
        if act.case.lane is Priority.MEDIUM:
            # the next one waits in the ledger until this one has ended
            site.platform.set_limit(f"user:{user}", concurrency=1)
        target.answer(user, Answer(after_seconds=0.2))
        site.platform.enqueue(act.case.kind, user=user, priority=act.case.lane)

    for act in acts:
        submit(act)
    for act in acts:
        for _ in range(60):
            if _soon(lambda act=act: act.fault.happened):  # type: ignore[misc]
                break
            # a worker whose main process lives may have taken another's
            submit(act)
        assert act.fault.happened, f"{act.case} was not reached:\n{act.worker.logs()}"
        act.job = act.fault.job
    assert len({act.job for act in acts}) == len(acts)


def _soon(condition: Callable[[], bool]) -> bool:
    try:
        return wait_until(condition, seconds=0.5)
    except AssertionError:
        return False


def _is(worker: WorkerNode, worker_id: str) -> bool:
    return worker_id.startswith(f"{worker.node}#")


def _changes(act: Act, site: Site) -> list[Transition]:
    """The history of an act's job.

    A frozen worker's connection lives, and may swallow the message of another's job, which is then released once more. That is left out.
    """
    lines = site.changes(act.job)
    if act.case.lane is not Priority.LOW:
        return lines
    swallowed = {number for number, line in enumerate(lines) if number > 2 and line.reason.startswith("its message was lost")}
    return [line for number, line in enumerate(lines) if number not in swallowed and number + 1 not in swallowed]


def _do_not_overlap(calls: Sequence[Call], target: Target, dead_ms: int) -> bool:
    """Whether each call of a job began after the one before it had ended, or after its caller was stopped for good."""
    return all(later.at_ms >= min(target.ended_ms(call) or dead_ms, dead_ms) for call, later in itertools.pairwise(calls))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_job_completes_once_and_its_history_tells_all(case: Case, stage: Stage, target: Target) -> None:
    act, site = stage.of(case), stage.site
    job, changes, calls = site.platform.job(act.job), _changes(act, site), target.calls(job=act.job)
    assert job.state is S.COMPLETED
    assert [line.to_state for line in changes] == case.states, site.story(act.job)
    assert len(calls) == case.calls, site.story(act.job)
    assert {call.key for call in calls} <= {act.job, ""}
    assert case.kind != "call" or all(call.key for call in calls)
    assert _do_not_overlap(calls, target, act.fault.at_ms)
    # who ran it, and that it was another where the first is gone
    runs = [line for line in changes if line.to_state is S.RUNNING]
    assert [line.attempt for line in runs] == list(range(1, job.attempt + 1))
    begun = case.states in (RUN_LOST, DONE)
    assert _is(act.worker, runs[0].worker) is begun or case.who == "pool"
    if case.states is RUN_LOST:
        assert not _is(act.worker, runs[1].worker) or case.who == "pool"
        lost = changes[4]
        assert _is(act.worker, lost.worker)
        assert lost.reason.startswith("the process that ran it died" if case.who == "pool" else f"worker {lost.worker} lost")
    elif case.states is MESSAGE_LOST:
        assert changes[2].reason.startswith("its message was lost")
    elif case.states is PROCESS_LOST_BEFORE:
        assert changes[2].reason.startswith("the process that ran it died")
        assert _is(act.worker, changes[2].worker)
    # a loss has its own count, and is no failure
    assert int(site.redis.hget(key("tp", "job", act.job), "losses") or 0) == case.losses
    assert job.failures == 0


@pytest.mark.parametrize("case", KILLED, ids=str)
def test_what_waited_for_its_end_follows(case: Case, stage: Stage, target: Target) -> None:
    """The next job of the same user, who may have one in flight: the end of the first releases it, or its loss."""
    act, site = stage.of(case), stage.site
    first, following = site.platform.job(act.job), site.platform.job(act.next_job)
    assert site.states(following.id) == DONE, site.story(following.id)
    assert len(target.calls(job=following.id)) == 1
    calls = target.calls(user=first.user)
    assert {call.job for call in calls} == {first.id, following.id}
    assert _do_not_overlap(calls, target, act.fault.at_ms)
    if not case.losses:
        assert calls[-1].job == following.id


def _was_told(act: Act, site: Site) -> bool:
    """Its run finds out by itself, or is stopped before."""
    said = act.worker.logs()
    # where it was frozen for longer than the run may take, its limit goes before
    return act.case.dropped in said or "ime limit (" in said or bool(_discards(act, site))


def _discards(act: Act, site: Site) -> list[str]:
    return [note for note in site.notes(act.job) if note.startswith("discarded")]


@pytest.fixture(scope="module")
def resumed(stage: Stage, target: Target) -> Stage:
    """The frozen ones go on, and have had something to do since."""
    site, frozen = stage.site, [stage.of(case) for case in FROZEN]
    for act in frozen:
        act.worker.resume()
    for act in frozen:
        try:
            eventually(lambda act=act: _was_told(act, site), "")  # type: ignore[misc]
        except AssertionError:
            raise AssertionError(f"{act.case}: nobody told it:\n{act.worker.logs()}\n{site.story(act.job)}") from None
    served: set[str] = set()
    for _ in range(10):
        user = site.user()
        target.answer(user, Answer(after_seconds=0.7))
        jobs = [site.platform.enqueue("call", user=user, priority="low").id for _ in range(len(frozen) + 8)]
        served |= {job.worker for job in site.wait_for_all(jobs)}
        if all(any(_is(act.worker, worker) for worker in served) for act in frozen):
            break
    return stage


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_a_worker_that_froze_is_fenced_and_works_on(case: Case, resumed: Stage, target: Target) -> None:
    act, site = resumed.of(case), resumed.site
    assert _was_told(act, site)
    lost = next((line.worker for line in site.changes(act.job) if line.to_state is S.RETRYING), "")
    allowed = {f"discarded delivery 1: stopped, because worker {lost} had been declared lost"} if case.losses else set()
    if case.discarded:
        allowed.add("discarded the result of delivery 1: completed, HTTP 200")
        # where it was frozen for longer than the call has
        limits = ("deadline of 20s exceeded", "time limit of 20s exceeded")
        allowed |= {f"discarded the result of delivery 1: {state}, {limit}" for state in (S.RETRYING, S.TIMED_OUT) for limit in limits}
        assert _discards(act, site)
    assert set(_discards(act, site)) <= allowed
    # nothing that it did since changed the job, and the target was not called for it again
    assert [line.to_state for line in _changes(act, site)] == case.states
    assert len(target.calls(job=act.job)) == case.calls
    later = [job for job in site.platform.jobs(definition="call", state="completed", limit=1000).items if _is(act.worker, job.worker)]
    assert [job for job in later if job.started_ms is not None and job.started_ms > act.fault.at_ms + 1000], "it did nothing since"


def test_nothing_is_left(resumed: Stage, target: Target) -> None:
    site = resumed.site
    jobs = site.platform.jobs(limit=2000).items
    assert {job.state for job in jobs} == {S.COMPLETED}
    calls = [call for job in jobs for call in target.calls(job=job.id)]
    assert {call.key for call in calls if call.path.startswith("/call")} == {job.id for job in jobs if job.definition == "call"}
    left = [key("tp", name, priority) for name in ("queued",) for priority in Priority]
    left += [key("tp", name) for name in ("active", "inflight")] + [UNACKED, UNACKED_INDEX]
    eventually(lambda: not site.redis.exists(*left, *Priority), f"something is left of {left}")
    assert not list(site.redis.scan_iter(key("tp", "worker_jobs", "*")))
    assert not list(site.redis.scan_iter(key("tp", "lane", "*")))


# --- the second attempt ----------------------------------------------------------------------------------------------


@dataclass
class SecondAttempt:
    """A worker that dies when the second attempt's failure is about to be recorded."""

    site: Site
    fault: Fault
    worker: WorkerNode


@pytest.fixture(scope="module")
def second_act(new_site: Callable[[], Site]) -> SecondAttempt:
    """Its worker, that starts while others do."""
    site = new_site()
    fault = site.fault("before:finish", nth=2)
    return SecondAttempt(site, fault, _worker(site, "--concurrency", "1", fault=fault))


def test_a_loss_in_the_second_attempt_uses_up_no_retry(second_act: SecondAttempt, target: Target) -> None:
    """Two retries, so three attempts that count, and the lost one."""
    site = second_act.site
    second_act.worker.ready()
    job_id = site.platform.enqueue("raising", user=site.user()).id
    eventually(lambda: second_act.fault.happened, "there was no second attempt")
    other = _worker(site, "--concurrency", "1")
    other.ready()
    job = site.wait_for(job_id)
    again = [S.RETRYING, *RUN]
    assert site.states(job_id) == [S.PENDING, *RUN, *again, *again, *again, S.FAILED], site.story(job_id)
    ends = [line for line in site.changes(job_id) if line.to_state in (S.RETRYING, S.FAILED)]
    assert [line.attempt for line in ends] == [1, 2, 3, 4]
    assert [line.reason.split(":")[0] for line in ends if "lost" not in line.reason] == ["ValueError"] * 3
    assert ends[1].reason == f"worker {ends[1].worker} lost: its process has ended; again in 1 s"
    assert (job.attempt, job.failures) == (4, 2)
    assert len(target.calls(job=job_id)) == 4


# --- release and submission ------------------------------------------------------------------------------------------


@dataclass
class Released:
    """A worker that dies when its loop has released something, and two clients that die around their submission."""

    site: Site
    fault: Fault
    worker: WorkerNode
    clients: dict[str, tuple[str, Fault, subprocess.Popen[bytes]]]


_CLIENT = """
import sys
from tests.acceptance.faults import install
install()
from taskplatform.app import platform
platform().enqueue("call", user=sys.argv[1], idempotency_key="order 1")
"""


@pytest.fixture(scope="module")
def release_act(new_site: Callable[[], Site]) -> Released:
    """All of them, that start while others do."""
    site = new_site()
    fault = site.fault("released")
    worker = _worker(site, "--concurrency", "1", "-Q", "low", fault=fault)
    clients = {}
    for point in ("before:enqueue", "after:enqueue"):
        user, end = site.user(), site.fault(point, whole_node=False)
        argv = [sys.executable, "-c", _CLIENT, user]
        clients[point] = user, end, subprocess.Popen(argv, cwd=ROOT, env={**site.environment, **end.environment})
    return Released(site, fault, worker, clients)


def test_what_a_dead_loop_had_released_and_what_a_dead_client_had_submitted_runs_once(release_act: Released, target: Target) -> None:
    act, site = release_act, release_act.site
    act.worker.ready()
    eventually(lambda: any(_is(act.worker, worker.id) for worker in site.platform.store.workers()), "no heartbeat")
    released = site.platform.enqueue("call", user=site.user(), priority="low", countdown=0.3)
    eventually(lambda: act.fault.happened, "the loop has not released it")
    assert act.worker.wait() == -signal.SIGKILL
    assert site.platform.job(released.id).state is S.QUEUED
    waiting = site.platform.enqueue("call", user=site.user(), priority="low")

    submitted = {}
    for point, (user, end, client) in act.clients.items():
        assert client.wait(60) == -signal.SIGKILL
        assert end.happened
        found = [job.id for job in site.platform.jobs(user=user).items]
        assert len(found) == (point == "after:enqueue")
        # the caller does not know, and tries again
        again = {site.platform.enqueue("call", user=user, idempotency_key="order 1").id for _ in range(3)}
        assert len(again) == 1
        assert set(found) <= again
        submitted[user] = again.pop()
    # at its first look for what is due, before it served anybody
    fault = site.fault("before:release")
    unlucky = _worker(site, "--concurrency", "1", fault=fault)
    other = _worker(site, "--concurrency", "2")
    eventually(lambda: fault.happened, "it has not looked")
    other.ready()
    for job_id in (released.id, waiting.id, *submitted.values()):
        site.wait_for(job_id)
        # the dying worker may have taken with it the message that it had just released
        assert site.states(job_id) in ([DONE, MESSAGE_LOST] if job_id == released.id else [DONE]), site.story(job_id)
        assert [call.key for call in target.calls(job=job_id)] == [job_id]
    for user, job_id in submitted.items():
        assert [job.id for job in site.platform.jobs(user=user).items] == [job_id]
    assert unlucky.wait() == -signal.SIGKILL
