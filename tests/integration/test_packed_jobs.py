"""A planned job that waits has a packed record: it is seen, changed, and counted as any other, and planned only once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
import redis

from taskplatform.errors import UnknownJob
from taskplatform.model import Job, JobState, Transition
from taskplatform.store import Enqueue, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, enqueue, offer, publish, subscribe, take

S = JobState
USERS = ("ann", "bob", "cyd")


@pytest.fixture(autouse=True)
def _published(store: Store) -> None:
    publish(store, define("alpha", priority="high"), define("beta"))
    store.create_users(USERS, actor=ACTOR)


def plan(store: Store, definition: str = "alpha") -> str:
    """An occurrence with a packed job for each subscriber, due now; returns the suffix of their ids."""
    at_ms, _ = store.trigger(definition, window=timedelta(), actor=ACTOR)
    store.plan(f"{definition}|t{at_ms}", horizon=HORIZON, batch=1000)
    return f"t{at_ms}"


def plan_again(client: redis.Redis, store: Store, suffix: str, definition: str = "alpha") -> int:
    """As a planner whose cursor stands before all subscribers once more; returns how many jobs it makes."""
    oid = f"{definition}|{suffix}"
    client.hset(f"tp:occurrence:{oid}", mapping={"state": "open", "cursor": "-1"})
    client.sadd(f"tp:open:{definition}", oid)
    client.zrem("tp:closed", oid)
    made, _ = store.plan(oid, horizon=HORIZON, batch=1000)
    return made


def planned(store: Store, users: Iterable[str] = USERS, definition: str = "alpha") -> list[str]:
    """Ids of the packed jobs of these users."""
    for user in users:
        subscribe(store, user, definition)
    suffix = plan(store, definition)
    return [f"{definition}:{user}:{suffix}" for user in users]


def is_packed(client: redis.Redis, job_id: str) -> bool:
    definition, user, suffix = job_id.split(":")
    packed = bool(client.hexists(f"tp:planned:{definition}:{suffix}", user))
    assert packed is not bool(client.exists(f"tp:job:{job_id}"))
    assert packed is (client.zscore(f"tp:userjobs:{user}", job_id) is None)
    return packed


def told(store: Store, job_id: str) -> list[tuple[JobState | None, JobState, str]]:
    return [(line.from_state, line.to_state, line.reason) for line in store.history(job_id)]


MADE = (None, S.PENDING, "planned by a trigger")


# --- seen as any other -----------------------------------------------------------------------------------------------


def test_a_packed_job_is_read_as_one_with_its_own_record(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    assert all(is_packed(client, job_id) for job_id in ids)
    before: list[Job] = [store.job(job_id) for job_id in ids]
    assert before == store.jobs_by_id(ids)
    assert [job.id for job in before] == ids
    assert {(job.state, job.source, job.reason, job.created_ms) for job in before} == {
        (S.PENDING, "trigger", "planned by a trigger", clock.now_ms)
    }
    assert [store.history(job_id) for job_id in ids] == [[Transition(clock.now_ms, None, S.PENDING, 0, "", "planned by a trigger")]] * 3
    assert store.counts()[S.PENDING] == 3
    assert sum(store.waiting().values()) == 3
    assert_consistent(client, store)
    for job_id in ids:
        store.note(job_id, worker="w1", text="seen")
        assert not is_packed(client, job_id)
    for job, packed in zip(store.jobs_by_id(ids), before, strict=True):
        assert job.reason == "seen"
        assert {**_fields(job), "reason": ""} == {**_fields(packed), "reason": ""}
    assert_consistent(client, store)


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__dataclass_fields__}


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_listings_hold_packed_jobs_in_their_places(store: Store, clock: Clock, limit: int) -> None:
    """Between jobs with records of their own, of the same millisecond and of others."""
    ids: list[str] = []
    for number in range(4):
        ids += planned(store, definition="alpha")
        ids.append(enqueue(store, "alpha", "ann", f"m{number}"))
        ids += planned(store, definition="beta")
        clock.advance(number % 2)
        ids.append(enqueue(store, "beta", "ann", f"n{number}"))
        clock.advance(1)
    for job_id in ids[::5]:
        store.cancel(job_id, reason="not wanted")
    everything = sorted(store.jobs_by_id(ids), key=lambda job: (job.created_ms, job.id), reverse=True)
    assert len(everything) == len(ids) == 4 * 8

    def listed(**filters: Any) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = store.jobs(cursor=cursor, limit=limit, **filters)
            found += [job.id for job in page.items]
            cursor = page.cursor
            if cursor is None:
                return found

    def wanted(accept: Callable[[Job], bool]) -> list[str]:
        return [job.id for job in everything if accept(job)]

    assert listed() == [job.id for job in everything]
    for user in USERS:
        assert listed(user=user) == wanted(lambda job, user=user: job.user == user)  # type: ignore[misc]
        both = wanted(lambda job, user=user: job.user == user and job.definition == "beta")  # type: ignore[misc]
        assert listed(user=user, definition="beta") == both
    for definition in ("alpha", "beta"):
        assert listed(definition=definition) == wanted(lambda job, name=definition: job.definition == name)  # type: ignore[misc]
    pending = wanted(lambda job: job.user == "ann" and job.state is S.PENDING)
    assert listed(user="ann", states=frozenset({S.PENDING})) == pending
    since, until = everything[-9].created_ms, everything[8].created_ms
    assert listed(user="ann", since_ms=since, until_ms=until) == wanted(lambda job: job.user == "ann" and since <= job.created_ms <= until)


def test_what_gets_its_own_record_while_a_listing_is_read_is_there_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = planned(store, ["ann"])
    read = store._packed_jobs

    def read_and_cancel(user: str) -> list[tuple[int, str]]:
        found = read(user)
        store.cancel(ids[0], reason="meanwhile")
        return found

    monkeypatch.setattr(store, "_packed_jobs", read_and_cancel)
    assert [(job.id, job.state) for job in store.jobs(user="ann").items] == [(ids[0], S.CANCELED)]


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_what_gets_its_own_record_while_it_is_read_is_found(
    client: redis.Redis, store: Store, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """Wherever between the reads that happens; and its state and reason belong together."""
    (job_id,) = planned(store, ["ann"])
    pipeline = client.pipeline

    def read_one_by_one(transaction: bool = True) -> Any:
        pipe = pipeline(transaction=transaction)

        def execute() -> list[Any]:
            answers: list[Any] = []
            for args, options in pipe.command_stack:
                answers.append(client.execute_command(*args, **options))  # type: ignore[no-untyped-call] # redis-py has no types here
                if len(answers) == reads:
                    store.cancel(job_id, reason="meanwhile")
            return answers

        monkeypatch.setattr(pipe, "execute", execute)
        return pipe

    monkeypatch.setattr(client, "pipeline", read_one_by_one)
    job = store.job(job_id)
    assert (job.state, job.reason) in ((S.PENDING, "planned by a trigger"), (S.CANCELED, "meanwhile"))


def test_an_id_that_is_none(store: Store) -> None:
    planned(store)
    for nonsense in ("", "x", "alpha:ann", "alpha::", "alpha:ann:t1", "alpha:nobody:t1"):
        with pytest.raises(UnknownJob):
            store.job(nonsense)
        with pytest.raises(UnknownJob):
            store.history(nonsense)
        with pytest.raises(UnknownJob):
            store.cancel(nonsense, reason="not wanted")


# --- changed as any other --------------------------------------------------------------------------------------------


def test_cancel_and_retry(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    assert store.cancel(ids[0], reason="not wanted") is S.PENDING
    assert not is_packed(client, ids[0])
    assert is_packed(client, ids[1])
    assert_consistent(client, store)
    assert store.cancel(ids[0], reason="not wanted") is S.CANCELED
    assert store.retry(ids[0], reason="after all") is S.CANCELED
    assert told(store, ids[0]) == [MADE, (S.PENDING, S.CANCELED, "not wanted"), (S.CANCELED, S.PENDING, "after all")]
    assert_consistent(client, store)
    for job_id in ids[1:]:
        store.cancel(job_id, reason="not wanted")
    assert client.keys("tp:planned*") == [], "the last one takes the key along"
    assert_consistent(client, store)


def test_release_in_the_order_of_planning(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    by_moment = sorted(store.jobs_by_id(ids), key=lambda job: job.execute_after_ms)
    first = enqueue(store, "alpha", "ann", "m1")
    offer(store, slots=10)
    clock.advance(1)
    assert store.release()[0] == 4
    assert client.keys("tp:planned*") == []
    assert_consistent(client, store)
    taken = [take(client).job_id for _ in range(4)]
    assert taken[-1] == first, "submitted last, due at the same millisecond"
    assert {store.job(job_id).execute_after_ms for job_id in ids} == {by_moment[0].execute_after_ms}
    for job_id in taken:
        assert store.start(job_id, delivery=1, worker="w1").go
        assert store.finish(job_id, delivery=1, worker="w1", state=S.COMPLETED, reason="done")
    assert [line[1] for line in told(store, ids[0])] == [S.PENDING, S.QUEUED, S.ASSIGNED, S.RUNNING, S.COMPLETED]
    assert_consistent(client, store)


@pytest.mark.parametrize("whose", ["user", "subscription"])
def test_pause_and_resume(client: redis.Redis, store: Store, clock: Clock, whose: str) -> None:
    ids = planned(store)
    if whose == "user":
        store.pause_user("ann", actor=ACTOR)
    else:
        store.pause_subscription("ann", "alpha", actor=ACTOR)
    assert is_packed(client, ids[0]), "a pause by itself changes no job"
    assert_consistent(client, store)
    clock.advance(1)
    offer(store)
    assert store.release()[0] == 2
    assert told(store, ids[0]) == [MADE, (S.PENDING, S.PENDING, f"held: {whose} paused")]
    assert_consistent(client, store)
    if whose == "user":
        store.resume_user("ann", actor=ACTOR)
    else:
        store.resume_subscription("ann", "alpha", actor=ACTOR)
    assert told(store, ids[0])[2:] == [(S.PENDING, S.PENDING, "no longer held"), (S.PENDING, S.QUEUED, "released")]
    assert_consistent(client, store)


def test_a_paused_definition_leaves_its_jobs_packed(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    store.pause_definition("alpha", why="maintenance", actor=ACTOR)
    clock.advance(1)
    offer(store)
    assert store.release()[0] == 0
    assert all(is_packed(client, job_id) for job_id in ids)
    assert_consistent(client, store)
    store.resume_definition("alpha", actor=ACTOR)
    assert {store.job(job_id).state for job_id in ids} == {S.QUEUED}
    assert_consistent(client, store)


def test_a_definition_that_is_removed(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    store.retract("alpha", actor=ACTOR)
    assert_consistent(client, store)
    assert [job.id for job in store.jobs(user="ann").items] == [ids[0]]
    clock.advance(1)
    offer(store)
    store.release()
    gone = "definition alpha does not exist any more"
    assert [told(store, job_id) for job_id in ids] == [[MADE, (S.PENDING, S.REJECTED, gone)]] * 3
    assert_consistent(client, store)


@pytest.mark.parametrize("end", ["unsubscribe", "disable", "delete"])
def test_the_end_of_a_subscription(client: redis.Redis, store: Store, clock: Clock, end: str) -> None:
    """Cancels jobs of all its occurrences, packed or not, and no other's."""
    ids = planned(store)
    clock.advance(1)
    ids += planned(store)
    store.note(ids[0], worker="w1", text="seen")
    other = planned(store, ["ann"], "beta")
    mine = [job_id for job_id in ids if ":ann:" in job_id]
    assert len(mine) == 2
    if end == "unsubscribe":
        assert store.unsubscribe("ann", "alpha", actor=ACTOR) == 2
    elif end == "disable":
        subscribe(store, "ann", "alpha", own_schedule=None, enabled=False)
    else:
        assert store.delete_user("ann", actor=ACTOR) == (3, 2)
    assert_consistent(client, store, complete=end != "delete")
    assert all(is_packed(client, job_id) for job_id in ids if job_id not in mine)
    if end == "delete":
        assert store.jobs_by_id([*mine, *other]) == []
        assert [name for name in client.scan_iter("*") if ":ann" in name] == []
    else:
        assert {job.state for job in store.jobs_by_id(mine)} == {S.CANCELED}
        assert is_packed(client, other[0])


def test_the_retention_forgets_only_what_ended(client: redis.Redis, store: Store, clock: Clock) -> None:
    ids = planned(store)
    store.cancel(ids[0], reason="not wanted")
    clock.advance(10)
    assert store.sweep(retention=timedelta(seconds=1)) == 2, "the job and the occurrence"
    assert [job.id for job in store.jobs().items] == sorted(ids[1:], reverse=True)
    assert store.jobs(user="ann").items == ()
    assert_consistent(client, store, complete=False)


# --- one occurrence, one job -----------------------------------------------------------------------------------------


def test_planning_an_occurrence_again_makes_only_what_is_missing(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Whether a job still waits, is packed or not, runs, or has ended."""
    names = [f"user{number}" for number in range(12)]
    store.create_users(names, actor=ACTOR)
    ids = planned(store, names)
    suffix = ids[0].rpartition(":")[2]
    assert plan_again(client, store, suffix) == 0
    assert_consistent(client, store)
    store.note(ids[0], worker="w1", text="seen")
    store.cancel(ids[1], reason="not wanted")
    clock.advance(1)
    offer(store, slots=4)
    assert store.release()[0] == 4
    done = take(client).job_id
    store.start(done, delivery=1, worker="w1")
    store.finish(done, delivery=1, worker="w1", state=S.COMPLETED, reason="done")
    running = take(client).job_id
    store.start(running, delivery=1, worker="w1")
    before = {job.id: job for job in store.jobs().items}
    assert {job.state for job in before.values()} == {S.PENDING, S.CANCELED, S.QUEUED, S.COMPLETED, S.RUNNING}
    assert sum(is_packed(client, job_id) for job_id in ids) >= 3
    assert plan_again(client, store, suffix) == 0
    assert {job.id: job for job in store.jobs().items} == before
    assert_consistent(client, store)
    subscribe(store, "ann", "alpha")
    assert plan_again(client, store, suffix) == 1
    after = {job.id: job for job in store.jobs().items}
    assert after.keys() - before.keys() == {f"alpha:ann:{suffix}"}
    assert {job_id: after[job_id] for job_id in before} == before
    assert_consistent(client, store)


def test_what_is_submitted_under_the_id_of_a_packed_job_is_that_job(client: redis.Redis, store: Store) -> None:
    ids = planned(store)
    assert store.enqueue([Enqueue(ids[0], params={"a": 1}), Enqueue("alpha:ann:m1")]) == [False, True]
    assert is_packed(client, ids[0])
    assert_consistent(client, store)


@pytest.mark.parametrize("policy", ["skip", "allow"])
def test_jobs_that_need_more_than_a_packed_record_says(client: redis.Redis, store: Store, policy: str) -> None:
    """Own parameters, and the number of unfinished jobs."""
    publish(store, define("alpha", overlap=policy))
    subscribe(store, "ann", "alpha", params={"format": "pdf"})
    ids = planned(store, ["ann", "bob"])
    assert [store.job(job_id).params for job_id in ids] == [{"format": "pdf"}, {}]
    assert [is_packed(client, job_id) for job_id in ids] == [False, policy == "allow"]
    assert_consistent(client, store)
    assert plan_again(client, store, ids[0].rpartition(":")[2]) == 0
    assert_consistent(client, store)


def test_a_large_batch_is_written_in_parts(client: redis.Redis, store: Store) -> None:
    """Lua's unpack takes about 8,000 values."""
    names = [f"user{number}" for number in range(4500)]
    store.create_users(names, actor=ACTOR)
    publish(store, define("alpha"))
    for name in names:
        subscribe(store, name, "alpha")
    at_ms, _ = store.trigger("alpha", window=timedelta(), actor=ACTOR)
    assert store.plan(f"alpha|t{at_ms}", horizon=HORIZON, batch=5000) == (4500, None)
    assert client.hlen(f"tp:planned:alpha:t{at_ms}") == 4500
    assert client.zcard("tp:jobs:alpha") == client.zcard("tp:lane:medium:alpha") == 4500
    assert len(store.jobs_by_id([f"alpha:{name}:t{at_ms}" for name in names])) == 4500
    assert plan_again(client, store, f"t{at_ms}") == 0
