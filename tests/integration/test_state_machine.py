"""Every state of a job against every verb; and what happens when verbs meet, repeat, or come from a worker that was given up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import kombu.utils.json
import pytest
import redis
from redis.connection import AbstractConnection

from taskplatform.errors import Conflict, InvalidInput, InvalidTransition, UnknownDefinition, UnknownJob, UnknownUser
from taskplatform.model import TRANSITIONS, JobState, Limit, Priority
from taskplatform.store import Enqueue, Renewal, Stop, Store
from tests.conftest import Clock
from tests.integration.harness import (
    ACTOR,
    WAITING,
    assert_consistent,
    check_history,
    define,
    enqueue,
    offer,
    publish,
    queue,
    recover,
    subscribe,
    take,
)

S = JobState
WORKER = "w1"
SECOND = timedelta(seconds=1)
#: The states in which a job can be found; `assigned` is passed through inside `start`.
RESTING = tuple(state for state in JobState if state is not S.ASSIGNED)
RUN_ENDS = tuple(sorted(TRANSITIONS[S.RUNNING]))


@pytest.fixture(autouse=True)
def _published(store: Store) -> None:
    publish(store, define("report", priority="high"))
    store.create_user("u1", actor=ACTOR)


def start(store: Store, job_id: str, *, worker: str = WORKER, delivery: int | None = None) -> str:
    """'run', or why not."""
    current = store.job(job_id).delivery if delivery is None else delivery
    answer = store.start(job_id, delivery=current, worker=worker)
    assert answer.go is (answer.refusal == "")
    return "run" if answer.go else answer.refusal


def finish(store: Store, job_id: str, state: JobState, *, worker: str = WORKER, delivery: int | None = None, **more: Any) -> bool:
    current = store.job(job_id).delivery if delivery is None else delivery
    return store.finish(job_id, delivery=current, worker=worker, state=state, reason=more.pop("reason", f"ended {state}"), **more)


def lose(store: Store, job_id: str, *, most: int = 3, delivery: int | None = None) -> bool:
    current = store.job(job_id).delivery if delivery is None else delivery
    return store.lose(job_id, delivery=current, worker=WORKER, what="process died", max_losses=most, backoff=SECOND)


def bring(client: redis.Redis, store: Store, clock: Clock, state: JobState) -> str:
    """A job that real verbs brought into `state`; no worker has room for another."""
    job_id = enqueue(store)
    if state is S.REJECTED:
        store.retract("report", actor=ACTOR)
    if state is not S.PENDING:
        offer(store)
        store.release()
    if state not in (S.PENDING, S.QUEUED, S.REJECTED):
        clock.advance(1)
        assert start(store, job_id) == "run"
        take(client)
        if state is not S.RUNNING:
            clock.advance(1)
            if state is S.CANCELED:
                store.cancel(job_id, reason="not wanted")
            else:
                assert finish(store, job_id, state, retry_in=SECOND if state is S.RETRYING else None)
    if state is S.REJECTED:
        publish(store, define("report", priority="high"))
    offer(store, slots=0)
    clock.advance(10)
    assert store.job(job_id).state is state
    assert_consistent(client, store)
    return job_id


# --- every state, every verb -----------------------------------------------------------------------------------------

Verb = Callable[[Store, str], Any]


def _release(store: Store, _: str) -> int:
    offer(store)
    return store.release()[0]


def _recover(store: Store, _: str) -> list[tuple[str, str]]:
    return recover(store, 5 * SECOND)


def _current(store: Store, job_id: str) -> str:
    return f"{job_id}#{store.job(job_id).delivery}"


VERBS: dict[str, Verb] = {
    "start": lambda store, job_id: start(store, job_id),
    "start a stale delivery": lambda store, job_id: start(store, job_id, delivery=store.job(job_id).delivery + 1),
    "cancel": lambda store, job_id: store.cancel(job_id, reason="not wanted"),
    "retry": lambda store, job_id: store.retry(job_id, reason="once more"),
    "lose": lambda store, job_id: lose(store, job_id),
    "lose too often": lambda store, job_id: lose(store, job_id, most=1),
    "lose a stale delivery": lambda store, job_id: lose(store, job_id, delivery=store.job(job_id).delivery + 1),
    "reclaim": lambda store, _: store.reclaim(patience=SECOND),
    "note": lambda store, job_id: store.note(job_id, worker=WORKER, text="seen"),
    "leave": lambda store, _: store.leave(WORKER),
    "leave with what it holds": lambda store, job_id: store.leave(WORKER, [_current(store, job_id)]),
    "withdraw": lambda store, job_id: store.withdraw(WORKER, [_current(store, job_id)]),
    "withdraw what runs": lambda store, job_id: store.withdraw(WORKER, [_current(store, job_id)], also_running=True),
    "withdraw what another runs": lambda store, job_id: store.withdraw("w9", [_current(store, job_id)], also_running=True),
    "withdraw a stale delivery": lambda store, job_id: store.withdraw(
        WORKER, [f"{job_id}#{store.job(job_id).delivery + 1}"], also_running=True
    ),
    "recover": _recover,
    "release": _release,
} | {
    f"finish {state}": lambda store, job_id, state=state: finish(  # type: ignore[misc]
        store, job_id, state, retry_in=SECOND, reason="at the end"
    )
    for state in RUN_ENDS
}

#: What a verb makes of a state; what is not here changes nothing.
EXPECTED: dict[tuple[str, JobState], JobState] = {
    ("start", S.QUEUED): S.RUNNING,
    **{("cancel", state): S.CANCELED for state in RESTING if not state.terminal},
    **{("retry", state): S.PENDING for state in (S.FAILED, S.TIMED_OUT, S.CANCELED, S.REJECTED)},
    ("lose", S.RUNNING): S.RETRYING,
    ("lose", S.QUEUED): S.RETRYING,
    ("lose too often", S.RUNNING): S.FAILED,
    # the table knows no failure without a run
    ("lose too often", S.QUEUED): S.REJECTED,
    ("leave", S.RUNNING): S.RETRYING,
    ("leave with what it holds", S.QUEUED): S.PENDING,
    ("leave with what it holds", S.RUNNING): S.RETRYING,
    ("withdraw", S.QUEUED): S.PENDING,
    ("withdraw what runs", S.QUEUED): S.PENDING,
    ("withdraw what runs", S.RUNNING): S.RETRYING,
    ("withdraw what another runs", S.QUEUED): S.PENDING,
    ("recover", S.RUNNING): S.RETRYING,
    ("release", S.PENDING): S.QUEUED,
    ("release", S.RETRYING): S.QUEUED,
    **{(f"finish {state}", S.RUNNING): state for state in RUN_ENDS},
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", RESTING)
def test_each_verb_in_each_state(client: redis.Redis, store: Store, clock: Clock, state: JobState, verb: str) -> None:
    job_id = bring(client, store, clock, state)
    before = store.history(job_id)
    expected = EXPECTED.get((verb, state), state)

    if verb == "retry" and expected is state:
        with pytest.raises(Conflict, match=f"is {state}"):
            VERBS[verb](store, job_id)
        answer = None
    else:
        answer = VERBS[verb](store, job_id)

    job, history = store.job(job_id), store.history(job_id)
    assert job.state is expected
    assert_consistent(client, store)
    new = history[len(before) :]
    assert history[: len(before)] == before
    if expected is not state:
        assert new[0].from_state is state
        assert new[-1].to_state is expected
        assert len(new) == (2 if expected is S.RUNNING else 1)
    elif verb == "note" or verb.startswith("finish"):
        assert [(line.from_state, line.to_state) for line in new] == [(state, state)]
        assert verb == "note" or "discarded the result" in new[0].reason
    else:
        assert new == []
    if verb.startswith(("finish", "lose")):
        assert answer is (expected is not state)
    if verb == "start":
        assert answer == ("run" if state is S.QUEUED else state.value)
    if verb == "start a stale delivery":
        assert answer == "stale"
    if verb in ("cancel", "retry") and answer is not None:
        assert answer is state


@pytest.mark.parametrize("target", sorted(set(JobState) - TRANSITIONS[S.RUNNING]))
def test_a_run_cannot_end_in_a_state_that_the_table_forbids(client: redis.Redis, store: Store, clock: Clock, target: JobState) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    with pytest.raises(InvalidTransition, match=target.value):
        finish(store, job_id, target)
    assert store.job(job_id).state is S.RUNNING
    assert_consistent(client, store)


def test_every_transition_of_the_table_was_tried() -> None:
    """What `EXPECTED` and the other tests of this file pass through is all that the table allows."""
    tried: set[tuple[JobState | None, JobState]] = {(state, target) for (_, state), target in EXPECTED.items() if target is not S.RUNNING}
    tried |= {(S.QUEUED, S.ASSIGNED), (S.ASSIGNED, S.RUNNING)}
    # test_reclaim_*, test_what_a_script_refuses, test_early_*
    tried |= {(None, S.PENDING), (S.PENDING, S.REJECTED), (S.RETRYING, S.REJECTED), (S.QUEUED, S.PENDING)}
    allowed = {(origin, target) for origin, targets in TRANSITIONS.items() for target in targets}
    # `start` goes through `assigned` in one step, so that nobody can find a job there
    assert allowed - tried == {(S.ASSIGNED, S.PENDING), (S.ASSIGNED, S.RETRYING), (S.ASSIGNED, S.CANCELED)}
    assert tried <= allowed


@pytest.mark.parametrize("attempted", [False, True])
def test_what_waits_of_a_removed_definition_is_rejected(client: redis.Redis, store: Store, clock: Clock, attempted: bool) -> None:
    job_id = bring(client, store, clock, S.RETRYING if attempted else S.PENDING)
    store.retract("report", actor=ACTOR)
    _release(store, job_id)
    assert store.job(job_id).state is S.REJECTED
    assert store.history(job_id)[-1].from_state is (S.RETRYING if attempted else S.PENDING)
    assert "report does not exist any more" in store.job(job_id).reason
    assert_consistent(client, store)


@pytest.mark.parametrize("verb", ["start", "finish completed", "cancel", "retry", "note", "lose"])
def test_a_job_that_never_was(client: redis.Redis, store: Store, verb: str) -> None:
    nobody = "report:u1:none"
    if verb == "start":
        assert start(store, nobody, delivery=1) == "unknown"
    elif verb == "note":
        store.note(nobody, worker=WORKER, text="seen")
    elif verb == "lose":
        assert lose(store, nobody, delivery=1) is False
    elif verb == "finish completed":
        assert finish(store, nobody, S.COMPLETED, delivery=1) is False
    else:
        with pytest.raises(UnknownJob):
            VERBS[verb](store, nobody)
    assert_consistent(client, store)


# --- the history -----------------------------------------------------------------------------------------------------


def test_a_whole_history(client: redis.Redis, store: Store, clock: Clock) -> None:
    began = clock.now_ms
    offer(store)
    job_id = enqueue(store, execute_after_ms=began + 1000)
    clock.advance(1.5)
    assert store.release() == (1, None)
    clock.advance(2)
    take(client)
    begun = store.start(job_id, delivery=1, worker=WORKER, waited_ms=250)
    assert (begun.go, begun.now_ms) == (True, clock.now_ms), "signatures have the server's time"
    clock.advance(1)
    detail = {"status": 503, "duration_ms": 990, "excerpt": 'say "no" \\ {}'}
    assert finish(store, job_id, S.RETRYING, reason='503 "Busy"\n', detail=detail, retry_in=3 * SECOND)
    clock.advance(3)
    store.release()
    take(client)
    start(store, job_id, worker="w2")
    finish(store, job_id, S.COMPLETED, worker="w2", detail={"status": 200})

    lines = [(line.at_ms - began, line.from_state, line.to_state, line.attempt, line.worker, line.reason) for line in store.history(job_id)]
    assert lines == [
        (0, None, S.PENDING, 0, "", "submitted"),
        (1500, S.PENDING, S.QUEUED, 0, "", "released"),
        (3250, S.QUEUED, S.ASSIGNED, 1, WORKER, "received"),
        (3500, S.ASSIGNED, S.RUNNING, 1, WORKER, "started"),
        (4500, S.RUNNING, S.RETRYING, 1, WORKER, '503 "Busy"\n'),
        (7500, S.RETRYING, S.QUEUED, 1, "", "released"),
        (7500, S.QUEUED, S.ASSIGNED, 2, "w2", "received"),
        (7500, S.ASSIGNED, S.RUNNING, 2, "w2", "started"),
        (7500, S.RUNNING, S.COMPLETED, 2, "w2", "ended completed"),
    ]
    assert store.history(job_id)[4].detail == detail
    job = store.job(job_id)
    assert (job.attempt, job.failures, job.delivery, job.worker) == (2, 1, 2, "w2")
    assert (job.created_ms, job.started_ms, job.finished_ms) == (began, began + 7500, began + 7500)
    assert_consistent(client, store)


def test_a_message_that_waited_before_its_release_is_not_assigned_before_it(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A worker's own clock may differ from the server's."""
    job_id = bring(client, store, clock, S.QUEUED)
    store.start(job_id, delivery=1, worker=WORKER, waited_ms=3_600_000)
    check_history(store.history(job_id))


def test_a_message_that_waited_while_a_late_result_was_noted_is_assigned_after_that(
    client: redis.Redis, store: Store, clock: Clock
) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    _recover(store, job_id)
    clock.advance(10)
    _release(store, job_id)
    clock.advance(1)
    assert not finish(store, job_id, S.COMPLETED)
    noted_ms = store.history(job_id)[-1].at_ms
    clock.advance(1)
    assert store.start(job_id, delivery=2, worker="w2", waited_ms=1500).go

    check_history(store.history(job_id))
    assert [line.at_ms - noted_ms for line in store.history(job_id)[-2:]] == [0, 1000]
    assert_consistent(client, store)


# --- deliveries ------------------------------------------------------------------------------------------------------


def test_only_the_current_delivery_runs(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    lost = take(client)
    store.reclaim(patience=SECOND)
    _release(store, job_id)
    again = take(client)
    assert (lost.delivery, again.delivery) == (1, 2)
    assert start(store, job_id, delivery=lost.delivery) == "stale"
    assert start(store, job_id, delivery=again.delivery) == "run"
    assert start(store, job_id, delivery=again.delivery) == "running"
    assert store.job(job_id).attempt == 1
    assert_consistent(client, store)


def test_a_worker_that_was_given_up_and_comes_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    first = store.job(job_id).delivery
    assert ("job", job_id) in _recover(store, job_id)
    assert_consistent(client, store)
    assert store.workers() == []
    # between its recovery and the next release the delivery number is still the same
    assert finish(store, job_id, S.COMPLETED, delivery=first) is False
    assert lose(store, job_id, delivery=first) is False
    clock.advance(1)
    offer(store, "w2")
    store.release()
    second = take(client).delivery
    assert start(store, job_id, worker="w2", delivery=second) == "run"

    for state in RUN_ENDS:
        assert finish(store, job_id, state, delivery=first, retry_in=SECOND) is False
    assert store.job(job_id).state is S.RUNNING
    assert store.job(job_id).worker == "w2"
    discarded = [line for line in store.history(job_id) if "discarded the result of delivery 1" in line.reason]
    assert len(discarded) == 1 + len(RUN_ENDS)
    assert all(line.worker == WORKER for line in discarded)
    assert finish(store, job_id, S.COMPLETED, worker="w2", delivery=second) is True
    # and it counts as a worker again as soon as it starts something
    other = enqueue(store, name="m2")
    assert start(store, other, worker=WORKER) == "run"
    assert WORKER in {worker.id for worker in store.workers()}
    clock.advance(60)
    assert ("job", other) in _recover(store, other)
    assert_consistent(client, store)


def test_of_two_workers_with_one_delivery_only_the_one_that_started_it_counts(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A connection was cut and the message put back, while the worker that had taken it still meant to start it."""
    job_id = bring(client, store, clock, S.RUNNING)
    assert start(store, job_id, worker="w2") == "running"
    assert store.lose(job_id, delivery=1, worker="w2", what="process died", max_losses=1, backoff=SECOND) is False
    assert store.renew(job_id, delivery=1, worker="w2") is Renewal.NEVER
    assert finish(store, job_id, S.FAILED, worker="w2") is False
    assert store.history(job_id)[-1].reason == "discarded the result of delivery 1: failed, ended failed"
    assert store.job(job_id).state is S.RUNNING
    assert_consistent(client, store)
    assert finish(store, job_id, S.COMPLETED) is True


def test_a_redelivered_copy_is_dropped_while_the_job_waits(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Celery may bring a message again while the number that it carries is still the newest."""
    job_id = bring(client, store, clock, S.RETRYING)
    assert start(store, job_id, delivery=1) == "retrying"
    assert store.job(job_id).attempt == 1
    assert_consistent(client, store)


# --- lost answers: the client sends a script again when the connection breaks before its answer ----------------------


@contextmanager
def _lost_answer(monkeypatch: pytest.MonkeyPatch, script: str) -> Iterator[None]:
    """The answer to the next run of a script is read and thrown away, as when the connection breaks before it."""
    real, sent = AbstractConnection.read_response, AbstractConnection.send_command
    state = {"armed": False, "lost": 0}

    def sending(self: AbstractConnection, *args: Any, **options: Any) -> None:
        state["armed"] = not state["lost"] and args[0] == "EVALSHA" and script in args
        cast("Any", sent)(self, *args, **options)

    def reading(self: AbstractConnection, *args: Any, **options: Any) -> Any:
        answer = cast("Any", real)(self, *args, **options)
        if state["armed"]:
            state.update(armed=False, lost=1)
            raise redis.exceptions.ConnectionError("the answer was lost")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(AbstractConnection, "send_command", sending)
        patch.setattr(AbstractConnection, "read_response", reading)
        yield
    assert state["lost"] == 1


def test_a_start_whose_answer_was_lost_still_runs(client: redis.Redis, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    store.start("report:u1:none", delivery=1, worker=WORKER)  # so that the script is loaded
    with _lost_answer(monkeypatch, job_id):
        assert start(store, job_id) == "run"
    assert store.job(job_id).attempt == 1
    assert start(store, job_id) == "running"
    assert_consistent(client, store)


@pytest.mark.parametrize("state", [S.COMPLETED, S.FAILED, S.RETRYING])
def test_a_finish_whose_answer_was_lost_counts_and_is_not_noted_as_discarded(
    client: redis.Redis, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, state: JobState
) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    store.finish("report:u1:none", delivery=1, worker=WORKER, state=S.COMPLETED, reason="")
    with _lost_answer(monkeypatch, job_id):
        assert finish(store, job_id, state, retry_in=SECOND) is True
    assert store.history(job_id)[-1].to_state is state
    assert "discarded" not in store.history(job_id)[-1].reason
    assert_consistent(client, store)


def test_a_trigger_whose_answer_was_lost_is_one_occurrence(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the server's clock, which goes on between the two calls."""
    store = Store(client)
    subscribe(store, "u1", "report")
    store.trigger("report", window=SECOND, actor=ACTOR)
    before, lines = len(store.occurrences("report")), len(store.changes())
    with _lost_answer(monkeypatch, "report"):
        _, subscribers = store.trigger("report", window=SECOND, actor=ACTOR)
    assert subscribers == 1
    assert len(store.occurrences("report")) == before + 1
    assert len(store.changes()) == lines + 1


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_before_start(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    message = take(client)
    assert store.cancel(job_id, reason="not wanted") is S.QUEUED
    assert start(store, job_id, delivery=message.delivery) == "canceled"
    assert store.job(job_id).attempt == 0
    assert store.heartbeat(WORKER, slots=0, queues=[], buffer=1).stops == ()
    assert_consistent(client, store)


def test_cancel_after_start(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    assert start(store, job_id) == "run"
    assert store.cancel(job_id, reason="not wanted") is S.RUNNING
    line = store.history(job_id)[-1]
    assert (line.to_state, line.worker, line.reason) == (S.CANCELED, WORKER, "not wanted")
    # its worker is told, until it says that it knows
    stop = Stop(job_id, 1, "")
    for _ in range(2):
        assert store.heartbeat(WORKER, slots=0, queues=[], buffer=1).stops == (stop,)
    assert store.stopped(WORKER, stop, note="stopped") is True
    assert store.stopped(WORKER, stop, note="stopped") is False
    assert store.heartbeat(WORKER, slots=0, queues=[], buffer=1).stops == ()
    assert [line.reason for line in store.history(job_id)].count("stopped") == 1
    assert store.counters().get("discarded", 0) == 0
    # and what it still says is noted, and changes nothing
    assert finish(store, job_id, S.COMPLETED, reason="200 OK", detail={"status": 200}) is False
    note = store.history(job_id)[-1]
    assert (note.from_state, note.to_state, note.worker) == (S.CANCELED, S.CANCELED, WORKER)
    assert note.reason == "discarded the result of delivery 1: completed, 200 OK"
    assert note.detail == {"status": 200}
    assert_consistent(client, store)


def test_the_cancel_of_a_delivery_reaches_no_later_one(client: redis.Redis, store: Store, clock: Clock) -> None:
    """A worker that was told to stop a run says so when the job has been given to another."""
    job_id = bring(client, store, clock, S.RUNNING)
    store.cancel(job_id, reason="not wanted")
    store.retry(job_id, reason="after all")
    assert store.cancel(job_id, reason="revoked", delivery=1) is S.PENDING
    offer(store)
    store.release()
    assert store.cancel(job_id, reason="revoked", delivery=1) is S.QUEUED
    start(store, job_id)
    assert store.cancel(job_id, reason="revoked", delivery=1) is S.RUNNING
    assert store.job(job_id).state is S.RUNNING
    assert store.cancel(job_id, reason="revoked", delivery=2) is S.RUNNING
    assert store.job(job_id).state is S.CANCELED
    assert_consistent(client, store)


@pytest.mark.parametrize("state", [S.PENDING, S.RETRYING, S.QUEUED])
def test_what_was_canceled_is_not_released(client: redis.Redis, store: Store, clock: Clock, state: JobState) -> None:
    job_id = bring(client, store, clock, state)
    store.cancel(job_id, reason="not wanted")
    store.cancel(job_id, reason="not wanted")
    clock.advance(3600)
    assert _release(store, job_id) == 0
    assert len([line for line in store.history(job_id) if line.to_state is S.CANCELED]) == 1
    assert_consistent(client, store)


# --- the end of a run ------------------------------------------------------------------------------------------------


def test_finish_twice(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    assert finish(store, job_id, S.COMPLETED) is True
    assert finish(store, job_id, S.FAILED) is False
    assert finish(store, job_id, S.COMPLETED, reason="another end") is False
    assert store.job(job_id).state is S.COMPLETED
    assert [line.reason.startswith("discarded") for line in store.history(job_id)[-2:]] == [True, True]
    assert_consistent(client, store)


def test_the_end_of_a_run_releases_the_next(client: redis.Redis, store: Store) -> None:
    offer(store, slots=1)
    first, second, third = (enqueue(store, name=f"m{number}") for number in range(3))
    assert [message.job_id for message in queue(client, "high")] == [first]
    take(client)
    start(store, first)
    assert [message.job_id for message in queue(client, "high")] == [second]
    finish(store, first, S.COMPLETED)
    assert store.job(third).state is S.PENDING
    take(client)
    start(store, second)
    assert [message.job_id for message in queue(client, "high")] == [third]
    assert_consistent(client, store)


def test_failures_count_and_what_was_lost_does_not(client: redis.Redis, store: Store, clock: Clock) -> None:
    offer(store)
    job_id = enqueue(store)

    def run() -> int:
        clock.advance(30)
        offer(store)
        store.release()
        return store.start(job_id, delivery=take(client).delivery, worker=WORKER).failures

    assert run() == 0
    finish(store, job_id, S.RETRYING, retry_in=SECOND)
    assert run() == 1
    lose(store, job_id)
    assert run() == 1
    store.leave(WORKER)
    assert run() == 1
    clock.advance(60)
    _recover(store, job_id)
    assert run() == 1
    finish(store, job_id, S.RETRYING, retry_in=SECOND)
    assert run() == 2
    assert store.job(job_id).failures == 2
    finish(store, job_id, S.FAILED)
    # by hand: a fresh budget, on the same record
    store.retry(job_id, reason="once more")
    assert run() == 0
    finish(store, job_id, S.RETRYING, retry_in=SECOND)
    assert run() == 1
    assert store.job(job_id).attempt == 8
    assert_consistent(client, store)


def test_a_process_that_died_before_the_start_uses_up_nothing(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    assert lose(store, job_id) is True
    clock.advance(60)
    _release(store, job_id)
    assert store.start(job_id, delivery=2, worker=WORKER).failures == 0
    assert store.job(job_id).failures == 0
    assert_consistent(client, store)


@pytest.mark.parametrize("how", ["lose", "recover", "lose before the start"])
def test_a_job_that_takes_its_processes_down_ends(client: redis.Redis, store: Store, clock: Clock, how: str) -> None:
    job_id = enqueue(store)
    waits = []
    for _ in range(3):
        clock.advance(60)
        offer(store)
        store.release()
        message = take(client)
        if how != "lose before the start":
            start(store, job_id, delivery=message.delivery)
        clock.advance(20)
        lost_at = clock.now_ms
        # kombu holds what is not acknowledged, and Celery would bring it back
        client.hset("unacked", f"{job_id}#{message.delivery}", message.raw)
        client.zadd("unacked_index", {f"{job_id}#{message.delivery}": 1})
        if how == "recover":
            _recover(store, job_id)
        else:
            lose(store, job_id)
        assert client.exists("unacked", "unacked_index") == 0
        waits.append(store.job(job_id).execute_after_ms - lost_at)
        assert_consistent(client, store)
    job = store.job(job_id)
    assert job.state is (S.REJECTED if how == "lose before the start" else S.FAILED)
    assert job.reason.startswith("poison pill: ")
    assert waits[:2] == [1000, 2000]
    # one that is retried by hand starts from nought
    store.retry(job_id, reason="mended")
    offer(store)
    store.release()
    start(store, job_id)
    assert lose(store, job_id)
    assert store.job(job_id).state is S.RETRYING


# --- early, lost, given back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempted", [False, True])
def test_early_start_when_the_clock_was_set_back(client: redis.Redis, store: Store, clock: Clock, attempted: bool) -> None:
    job_id = bring(client, store, clock, S.RETRYING if attempted else S.PENDING)
    _release(store, job_id)
    message = take(client)
    after = store.job(job_id).execute_after_ms
    clock.now_ms = after - 1
    assert start(store, job_id, delivery=message.delivery) == "early"
    job = store.job(job_id)
    assert (job.state, job.execute_after_ms) == (S.RETRYING if attempted else S.PENDING, after)
    assert job.attempt == int(attempted)
    assert store.release()[0] == 0
    assert_consistent(client, store, clock_set_back=True)
    clock.now_ms = after
    store.release()
    assert start(store, job_id, delivery=message.delivery) == "stale"
    assert start(store, job_id) == "run"


def test_a_limit_lets_go_on_when_the_clock_was_set_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_limit("total", Limit(1, 1), actor=ACTOR)
    offer(store)
    assert start(store, enqueue(store)) == "run"
    clock.advance(-3600)
    for number in range(1, 6):
        enqueue(store, name=f"n{number}")
        clock.advance(1.099)
        assert store.release() == (0, 1)
        clock.advance(0.001)
        assert store.release()[0] == 1
        assert start(store, f"report:u1:n{number}") == "run"
    assert_consistent(client, store, clock_set_back=True)


@pytest.mark.parametrize("attempted", [False, True])
def test_reclaim_releases_what_is_nowhere(client: redis.Redis, store: Store, clock: Clock, attempted: bool) -> None:
    job_id = bring(client, store, clock, S.RETRYING if attempted else S.PENDING)
    _release(store, job_id)
    assert store.reclaim(patience=SECOND) == []
    clock.advance(1)
    # it lies in its queue: nobody lost it
    assert store.reclaim(patience=SECOND) == []
    message = take(client)
    client.hset("unacked", f"{job_id}#{message.delivery}", message.raw)
    client.zadd("unacked_index", {f"{job_id}#{message.delivery}": 1})
    offer(store, slots=0)
    assert store.reclaim(patience=2 * SECOND) == []
    assert store.reclaim(patience=SECOND) == [job_id]
    assert store.job(job_id).state is (S.RETRYING if attempted else S.PENDING)
    assert client.exists("unacked", "unacked_index") == 0
    assert store.reclaim(patience=SECOND) == []
    assert_consistent(client, store)


def test_reclaim_knows_a_message_that_kombu_put_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.QUEUED)
    payload = json.loads(take(client).raw)
    payload["headers"]["redelivered"] = True
    payload["properties"]["delivery_info"]["redelivered"] = True
    client.rpush("high", cast("Any", kombu.utils.json).dumps(payload))
    assert store.reclaim(patience=SECOND) == []
    assert start(store, job_id) == "run"


def test_leave_gives_back_and_keeps_the_place(client: redis.Redis, store: Store, clock: Clock) -> None:
    """What a worker gives back when it stops goes first again: it was first in line before."""
    offer(store, slots=2)
    first, second, third = (enqueue(store, name=f"m{number}") for number in range(3))
    for job_id in (first, second):
        take(client)
        clock.advance(1)
        start(store, job_id)
    take(client)  # the third, which this worker never starts
    offer(store, slots=0)
    assert store.leave(WORKER) == 2
    assert store.workers() == []
    assert [store.job(job_id).state for job_id in (first, second, third)] == [S.RETRYING, S.RETRYING, S.QUEUED]
    assert store.history(first)[-1].reason == f"worker {WORKER} stopped"
    assert_consistent(client, store)
    clock.advance(20)
    store.reclaim(patience=10 * SECOND)
    offer(store, "w2")
    store.release()
    assert [message.job_id for message in queue(client, "high")] == [first, second, third]
    assert_consistent(client, store)


def test_what_a_stopping_worker_holds_goes_back_to_its_place_and_does_not_start(client: redis.Redis, store: Store, clock: Clock) -> None:
    offer(store, slots=3)
    ids = []
    for number in range(3):
        ids.append(enqueue(store, name=f"m{number}"))
        clock.advance(1)
    held = [take(client) for _ in ids]
    assert start(store, ids[0]) == "run"
    offer(store, slots=0)
    deliveries = [f"{job_id}#1" for job_id in ids]
    assert store.withdraw(WORKER, deliveries) == 2
    assert [store.job(job_id).state for job_id in ids] == [S.RUNNING, S.PENDING, S.PENDING]
    assert store.history(ids[1])[-1].reason == f"worker {WORKER} stops: not started"
    assert store.withdraw(WORKER, deliveries) == 0
    assert start(store, ids[1], delivery=1) == "pending"
    # its run was broken off
    assert store.withdraw(WORKER, deliveries[:1], also_running=True) == 1
    assert store.job(ids[0]).failures == 0
    assert_consistent(client, store)
    offer(store, "w2", slots=3)
    store.release()
    assert [message.job_id for message in queue(client, "high")] == ids
    assert start(store, ids[2], delivery=1) == "stale"
    assert len(held) == 3
    assert_consistent(client, store)


def test_recover_takes_only_from_the_silent_and_no_more_than_asked(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = [enqueue(store, name=f"m{number}") for number in range(5)]
    offer(store, "w1")
    offer(store, "w2")
    store.release()
    for number, job_id in enumerate(ids):
        start(store, job_id, worker="w2" if number == 4 else "w1")
    clock.advance(5)
    assert recover(store, 5 * SECOND) == []
    clock.advance(0.001)
    offer(store, "w2")
    taken: list[tuple[str, str]] = []
    for _ in range(10):
        rows = recover(store, 5 * SECOND, limit=2)
        assert len(rows) <= 3
        taken += rows
        assert_consistent(client, store)
    assert sorted(taken) == sorted([*(("job", job_id) for job_id in ids[:4]), ("worker", "w1")])
    assert store.job(ids[4]).state is S.RUNNING
    assert [worker.id for worker in store.workers()] == ["w2"]


def test_a_worker_without_slots_is_offered_nothing(client: redis.Redis, store: Store) -> None:
    """A worker that drains heartbeats with no slots."""
    offer(store, slots=0)
    enqueue(store)
    assert store.release() == (0, None)
    assert queue(client, "high") == []


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_the_number_of_unfinished_jobs_survives_a_change_of_the_policy(client: redis.Redis, store: Store) -> None:
    def policy(overlap: str) -> None:
        publish(store, define("report", priority="high", overlap=overlap))

    policy("skip")
    first = enqueue(store, name="m1")
    policy("allow")
    second = enqueue(store, name="m2")
    store.cancel(second, reason="done with")
    assert_consistent(client, store)
    policy("skip")
    third = enqueue(store, name="m3")
    store.cancel(first, reason="done with")
    assert client.hget("tp:unfinished:report", "u1") == "1"
    store.cancel(third, reason="done with")
    store.retry(third, reason="once more")
    assert client.hget("tp:unfinished:report", "u1") == "1"
    assert_consistent(client, store)
    store.cancel(third, reason="done with")
    assert client.exists("tp:unfinished:report") == 0


# --- enqueue ---------------------------------------------------------------------------------------------------------


def test_enqueue_is_all_or_nothing(client: redis.Redis, store: Store) -> None:
    good = [Enqueue(f"report:u1:m{number}") for number in range(3)]
    with pytest.raises(UnknownUser, match="'u2'"):
        store.enqueue([*good, Enqueue("report:u2:m1")])
    with pytest.raises(UnknownDefinition, match="'nothing'"):
        store.enqueue([*good, Enqueue("nothing:u1:m1")])
    assert store.jobs().items == ()
    assert_consistent(client, store)


def test_enqueue_twice_makes_one(client: redis.Redis, store: Store) -> None:
    one = Enqueue("report:u1:k1", params={"n": [], "big": 2**60, "text": "ü\x00\"'"}, delay_ms=1000)
    assert store.enqueue([one, one]) == [True, False]
    other = Enqueue("report:u1:k1", params={"other": 1}, priority=Priority.LOW)
    assert store.enqueue([other]) == [False]
    job = store.job("report:u1:k1")
    assert job.params == one.params
    assert job.priority is Priority.HIGH
    assert len(store.history("report:u1:k1")) == 1
    assert_consistent(client, store)


def test_text_that_is_not_unicode_is_refused_before_anything_happens(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = bring(client, store, clock, S.RUNNING)
    with pytest.raises(InvalidInput, match="Unicode"):
        finish(store, job_id, S.FAILED, reason="file \udcff")
    assert store.job(job_id).state is S.RUNNING


# --- any verbs in any order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_verbs_keep_everything_consistent(client: redis.Redis, store: Store, clock: Clock, seed: int) -> None:
    """A few jobs, two workers that die, come back and repeat themselves, and people who meddle."""
    rng = random.Random(seed)
    definitions = {
        "high_one": define("high_one", priority="high", overlap="skip"),
        "limited": define("limited", priority="medium", rate_limit="2/s"),
        "low_one": define("low_one", priority="low"),
    }
    publish(store, *definitions.values())
    users = ["ann", "bob"]
    store.create_users(users, actor=ACTOR)
    for user in users:
        for name in definitions:
            subscribe(store, user, name)
    ids: list[str] = []
    seen: list[tuple[str, int, str]] = []

    def any_job() -> str:
        return rng.choice(ids)

    def receive() -> None:
        worker = rng.choice(["w1", "w2"])
        try:
            message = take(client)
        except LookupError:
            return
        seen.append((message.job_id, message.delivery, worker))
        if rng.random() < 0.8:
            store.start(message.job_id, delivery=message.delivery, worker=worker)

    def end() -> None:
        if seen:
            job_id, delivery, worker = rng.choice(seen)
            state = rng.choice(RUN_ENDS)
            store.finish(job_id, delivery=delivery, worker=worker, state=state, reason="random", retry_in=SECOND * rng.randint(0, 3))

    def again() -> None:
        if seen:
            job_id, delivery, worker = rng.choice(seen)
            store.start(job_id, delivery=delivery, worker=worker)

    def drop() -> None:
        if seen:
            job_id, delivery, worker = rng.choice(seen)
            store.lose(job_id, delivery=delivery, worker=worker, what="died", max_losses=2, backoff=SECOND)

    def give_back() -> None:
        if seen:
            job_id, delivery, worker = rng.choice(seen)
            store.withdraw(worker, [f"{job_id}#{delivery}"], also_running=rng.random() < 0.5)

    def submit() -> None:
        job_id = f"{rng.choice(list(definitions))}:{rng.choice(users)}:m{len(ids)}"
        priority = rng.choice([None, *Priority])
        store.enqueue([Enqueue(job_id, delay_ms=rng.choice([0, 0, 1500]), priority=priority)])
        ids.append(job_id)

    def hand_retry() -> None:
        job_id = any_job()
        if store.job(job_id).state in (S.FAILED, S.TIMED_OUT, S.CANCELED, S.REJECTED):
            store.retry(job_id, reason="once more")

    def toggle_definition() -> None:
        name = rng.choice(list(definitions))
        if rng.random() < 0.5:
            store.pause_definition(name, why="test", actor=ACTOR)
        else:
            store.resume_definition(name, actor=ACTOR)

    def remove_definition() -> None:
        name = rng.choice(list(definitions))
        store.retract(name, actor=ACTOR)
        store.release()
        publish(store, definitions[name])

    steps: list[tuple[int, Callable[[], Any]]] = [
        (4, submit),
        (6, receive),
        (4, end),
        (2, again),
        (1, drop),
        (1, give_back),
        (1, lambda: store.cancel(any_job(), reason="not wanted")),
        (1, hand_retry),
        (3, lambda: clock.advance(rng.choice([0.001, 0.4, 1, 3]))),
        (3, lambda: offer(store, rng.choice(["w1", "w2"]), slots=rng.choice([0, 1, 3]), queues=rng.sample(list(Priority), 2))),
        (1, lambda: store.leave(rng.choice(["w1", "w2"]))),
        (1, lambda: recover(store, 2 * SECOND, max_losses=2, limit=rng.choice([1, 10]))),
        (1, lambda: store.reclaim(patience=SECOND)),
        (2, lambda: store.release(limit=rng.choice([1, 5, 100]))),
        (1, toggle_definition),
        (1, remove_definition),
        (1, lambda: store.pause_user(rng.choice(users), actor=ACTOR)),
        (2, lambda: store.resume_user(rng.choice(users), actor=ACTOR)),
        (1, lambda: store.pause_subscription(rng.choice(users), rng.choice(list(definitions)), actor=ACTOR)),
        (2, lambda: store.resume_subscription(rng.choice(users), rng.choice(list(definitions)), actor=ACTOR)),
    ]
    submit()
    weights, verbs = zip(*steps, strict=True)
    for _ in range(150):
        rng.choices(verbs, weights)[0]()
        assert_consistent(client, store)

    # whatever happened: once all is well again, everything comes to its end
    for name in definitions:
        store.resume_definition(name, actor=ACTOR)
    for user in users:
        store.resume_user(user, actor=ACTOR)
        for name in definitions:
            store.resume_subscription(user, name, actor=ACTOR)
    for _ in range(200):
        clock.advance(10)
        offer(store, "w9", slots=100)
        while recover(store, 15 * SECOND):
            pass
        store.reclaim(patience=15 * SECOND)
        store.release()
        for priority in Priority:
            for message in queue(client, priority):
                take(client, priority)
                if store.start(message.job_id, delivery=message.delivery, worker="w9").go:
                    store.finish(message.job_id, delivery=message.delivery, worker="w9", state=S.COMPLETED, reason="done")
        if all(store.job(job_id).state.terminal for job_id in ids):
            break
    assert [job_id for job_id in ids if not store.job(job_id).state.terminal] == []
    assert not any(state in WAITING for state in {store.job(job_id).state for job_id in ids})
    assert_consistent(client, store)
