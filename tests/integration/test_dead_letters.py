"""Dead letters: which jobs become some, how they are listed, redriven, discarded and forgotten. And how long a history gets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from taskplatform.catalogue import load
from taskplatform.errors import Conflict, InvalidInput, UnknownDefinition, UnknownJob
from taskplatform.model import JobState, Limit, Priority
from taskplatform.planner import published
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import DeadLetterResult, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, assert_consistent, define, enqueue, offer, publish, queue, subscribe

S = JobState
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
WORKER = "w1"

TASKS = """
tasks:
  - {id: report, name: Report, interval: {type: daily}, call: "tasks.inputs:anything"}
  - {id: other, name: Other, interval: {type: daily}, call: "tasks.inputs:anything"}
"""


@pytest.fixture
def platform(store: Store, tmp_path: Path) -> Platform:
    """With two definitions, three users and a worker, and the test's clock."""
    (tmp_path / "tasks.yaml").write_text(TASKS)
    found = Platform(store, load(tmp_path), Settings(dead_retention=14 * DAY, dead_max=5), actor=ACTOR)
    found.publish_missing()
    found.create_users(["u1", "u2", "u3"])
    offer(store, slots=200)
    return found


def take_message(client: redis.Redis, job_id: str) -> None:
    """Take a job's message from its queue."""
    for priority in Priority:
        for message in queue(client, priority):
            if message.job_id == job_id:
                client.lrem(priority, 1, message.raw)


def end(client: redis.Redis, store: Store, job_id: str, state: JobState = S.FAILED, reason: str = "HTTP 500") -> str:
    """Run a job that waits, to this end."""
    store.release()
    delivery = store.job(job_id).delivery
    assert store.start(job_id, delivery=delivery, worker=WORKER).go
    take_message(client, job_id)
    assert store.finish(job_id, delivery=delivery, worker=WORKER, state=state, reason=reason, retry_in=SECOND)
    return job_id


def kill(client: redis.Redis, store: Store, clock: Clock, job_id: str, *, run: bool = True, times: int = 3) -> None:
    """Take down the process with a job that waits, as often as it needs for a poison pill."""
    for _ in range(times):
        store.release()
        delivery = store.job(job_id).delivery
        assert not run or store.start(job_id, delivery=delivery, worker=WORKER).go
        take_message(client, job_id)
        assert store.lose(job_id, delivery=delivery, worker=WORKER, what="the process died", max_losses=times, backoff=SECOND)
        clock.advance(60)


@pytest.mark.parametrize("state", [S.FAILED, S.TIMED_OUT])
def test_what_fails_for_good_is_a_dead_letter(client: redis.Redis, store: Store, clock: Clock, platform: Platform, state: JobState) -> None:
    job_id = end(client, store, enqueue(store), state, "no answer")
    (found,) = platform.dead_letters().items
    assert (found.id, found.state, found.reason, found.poison) == (job_id, state, "no answer", False)
    assert store.counters()["dead_letters"] == 1
    assert "poison_pills" not in store.counters()
    assert_consistent(client, store)


@pytest.mark.parametrize("state", [S.COMPLETED, S.CANCELED, S.RETRYING])
def test_what_ends_otherwise_is_none(client: redis.Redis, store: Store, platform: Platform, state: JobState) -> None:
    end(client, store, enqueue(store), state)
    assert platform.dead_letters().items == ()
    assert_consistent(client, store)


@pytest.mark.parametrize(("run", "state"), [(True, S.FAILED), (False, S.REJECTED)])
def test_a_poison_pill_is_one_that_says_so(
    client: redis.Redis, store: Store, clock: Clock, platform: Platform, run: bool, state: JobState
) -> None:
    job_id = enqueue(store)
    kill(client, store, clock, job_id, run=run)
    (found,) = platform.dead_letters(reason="poison pill").items
    assert (found.id, found.state, found.poison) == (job_id, state, True)
    assert found.reason == "poison pill: the process died, 3 losses in all"
    assert store.counters()["poison_pills"] == 1
    # what a worker says later does not hide why it died
    store.note(job_id, worker=WORKER, text="a late word")
    assert store.finish(job_id, delivery=1, worker=WORKER, state=S.COMPLETED, reason="HTTP 200") is False
    assert platform.job(job_id).reason == found.reason
    assert platform.job(job_id).poison
    assert [job.id for job in platform.dead_letters(reason="poison pill").items] == [job_id]
    assert_consistent(client, store)


def test_a_redriven_one_has_its_whole_budget_and_its_id(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    job_id = enqueue(store)
    kill(client, store, clock, job_id)
    job = platform.redrive(job_id)
    assert (job.id, job.state, job.poison) == (job_id, S.QUEUED, False)
    assert platform.dead_letters().items == ()
    assert store.start(job_id, delivery=job.delivery, worker=WORKER).failures == 0
    assert_consistent(client, store)
    # two losses are no poison again
    for _ in range(2):
        delivery = store.job(job_id).delivery
        assert store.lose(job_id, delivery=delivery, worker=WORKER, what="it died", max_losses=3, backoff=SECOND)
        clock.advance(60)
        store.release()
        assert store.start(job_id, delivery=store.job(job_id).delivery, worker=WORKER).go
    assert platform.history(job_id)[-1].to_state is S.RUNNING
    assert f"redriven by {ACTOR}" in [line.reason for line in platform.history(job_id)]


def test_a_call_that_is_repeated_changes_nothing(client: redis.Redis, store: Store, platform: Platform) -> None:
    job_id = end(client, store, enqueue(store))
    for verb in (platform.redrive, platform.retry, platform.redrive):
        assert verb(job_id).state is S.QUEUED
    assert [line.to_state for line in platform.history(job_id)].count(S.PENDING) == 2
    delivery = store.job(job_id).delivery
    store.start(job_id, delivery=delivery, worker=WORKER)
    assert platform.redrive(job_id).state is S.RUNNING
    store.finish(job_id, delivery=delivery, worker=WORKER, state=S.COMPLETED, reason="HTTP 200")
    assert platform.retry(job_id).state is platform.redrive(job_id).state is S.COMPLETED
    # what dies again is another matter
    second = end(client, store, enqueue(store, name="m2"))
    platform.redrive(second)
    end(client, store, second)
    assert platform.redrive(second).state is S.QUEUED


def test_what_is_no_dead_letter_is_neither_redriven_nor_discarded(client: redis.Redis, store: Store, platform: Platform) -> None:
    job_id = end(client, store, enqueue(store), S.COMPLETED)
    canceled = enqueue(store, name="m2")
    platform.cancel(canceled)
    for one, state in ((job_id, "completed"), (canceled, "canceled")):
        for verb in (platform.redrive, platform.discard):
            with pytest.raises(Conflict, match=f"{one} is {state} and no dead letter"):
                verb(one)
    with pytest.raises(UnknownJob, match="no job"):
        platform.redrive("report:u1:none")
    platform.discard("report:u1:none")
    assert_consistent(client, store)


def test_pages_are_stable_while_others_die_and_leave(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    ids = []
    for number in range(12):
        ids.append(end(client, store, enqueue(store, user=f"u{number % 3 + 1}", name=f"m{number}")))
        clock.advance(number % 2)  # some at the same instant
    ids.sort(key=lambda one: (store.job(one).finished_ms or 0, one), reverse=True)
    first = platform.dead_letters(limit=5)
    assert [job.id for job in first.items] == ids[:5]
    platform.redrive(ids[1])
    platform.discard(ids[4])
    end(client, store, enqueue(store, name="new"))
    second = platform.dead_letters(limit=5, cursor=first.cursor)
    assert [job.id for job in second.items] == ids[5:10]
    last = platform.dead_letters(limit=5, cursor=second.cursor)
    assert [job.id for job in last.items] == ids[10:]
    assert last.cursor is None
    with pytest.raises(InvalidInput, match="cursor"):
        platform.dead_letters(cursor="nonsense")


def test_filters(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    early = end(client, store, enqueue(store, user="u1"), reason="HTTP 500")
    clock.advance(100)
    late = end(client, store, enqueue(store, user="u2"), reason="HTTP 404")
    other = end(client, store, enqueue(store, "other", "u1"), reason="HTTP 404")

    def found(**filters: object) -> set[str]:
        return {job.id for job in platform.dead_letters(**filters).items}  # type: ignore[arg-type]

    assert found() == {early, late, other}
    assert found(definition="report") == {early, late}
    assert found(user="u1") == {early, other}
    assert found(reason="404") == {late, other}
    assert found(definition="report", user="u2", reason="404") == {late}
    assert found(since=datetime.fromtimestamp(clock.now_ms / 1000, UTC)) == {late, other}


def test_all_of_a_kind_are_redriven_a_batch_at_a_time(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    ids = [end(client, store, enqueue(store, user="u2", name=f"m{number}")) for number in range(230)]
    kept = end(client, store, enqueue(store, "other", "u1"))
    clock.advance(1)
    assert platform.redrive_all(definition="report", user="u2", reason="500") == (230, 0)
    assert {job.id for job in platform.dead_letters().items} == {kept}
    assert all(not store.job(job_id).state.terminal for job_id in ids)
    assert platform.redrive_all(definition="report") == (0, 0)
    assert_consistent(client, store)


def test_what_is_discarded_is_gone_and_the_change_log_says_so(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    one = end(client, store, enqueue(store, user="u1"), reason="HTTP 418")
    rest = [end(client, store, enqueue(store, user="u2", name=f"m{number}")) for number in range(130)]
    platform.discard(one)
    platform.discard(one)
    with pytest.raises(UnknownJob):
        platform.history(one)
    (entry,) = platform.changes(about=["u1", "report"])
    assert (entry.kind, entry.actor, entry.detail) == ("dead letters discarded", ACTOR, f"1 dead letter, {one}: HTTP 418")
    assert platform.discard_all(user="u2") == len(rest)
    assert [entry.detail for entry in platform.changes(about=["u2"])] == ["30 dead letters", "100 dead letters"]
    assert client.exists(f"tp:history:{rest[0]}", f"tp:job:{rest[0]}", "tp:dead") == 0
    assert_consistent(client, store, complete=False)


def test_dead_letters_have_a_retention_of_their_own(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    job_id = end(client, store, enqueue(store))
    end(client, store, enqueue(store, name="m2"), S.COMPLETED)
    clock.advance(13 * 86_400)
    assert platform.sweep() == 1
    assert [job.id for job in platform.dead_letters().items] == [job_id]
    clock.advance(86_400)
    assert platform.sweep() == 1
    assert platform.dead_letters().items == ()
    with pytest.raises(UnknownJob):
        platform.redrive(job_id)
    assert client.keys("tp:job:*") + client.keys("tp:history:*") == []
    assert_consistent(client, store, complete=False)


def test_where_there_are_too_many_the_oldest_go(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    ids = []
    for number in range(9):
        ids.append(end(client, store, enqueue(store, name=f"m{number}")))
        clock.advance(1)
    assert platform.sweep() == 4
    assert [job.id for job in platform.dead_letters().items] == ids[:3:-1]
    assert store.counters()["dead_letters_dropped"] == 4
    assert platform.sweep() == 0


def test_a_deleted_users_dead_letters_go_too(client: redis.Redis, store: Store, platform: Platform) -> None:
    end(client, store, enqueue(store, user="u1"))
    platform.delete_user("u1")
    assert platform.dead_letters().items == ()
    assert_consistent(client, store, complete=False)


def test_a_sweep_ends_with_its_budget_and_the_next_goes_on(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    for number in range(1200):
        platform.cancel(enqueue(store, name=f"m{number}"))
    clock.advance(10 * 86_400)
    assert platform.sweep(budget=timedelta()) == 500
    assert platform.sweep(budget=timedelta()) == 500
    assert platform.sweep() == 200
    assert platform.sweep() == 0


# --- a definition that is removed while its jobs wait ----------------------------------------------------------------


def test_what_waits_of_a_removed_definition_is_rejected_with_a_reason(
    client: redis.Redis, store: Store, clock: Clock, platform: Platform
) -> None:
    """However it waits."""
    store.set_limit("user:u3", Limit(concurrency=1), actor=ACTOR)
    flying = enqueue(store, "other", "u3", "flying")
    store.release()
    assert store.start(flying, delivery=1, worker=WORKER).go
    take_message(client, flying)
    capped = enqueue(store, user="u3", name="capped")
    retrying = end(client, store, enqueue(store, name="retrying"), S.RETRYING)
    later = enqueue(store, name="later", delay_ms=5000)
    platform.pause_user("u2")
    held = enqueue(store, user="u2", name="held")
    queued = enqueue(store, name="queued")
    dead = end(client, store, enqueue(store, name="dead"))
    subscribe(store, "u1", "report")
    platform.trigger("report", window=timedelta())
    store.plan(store.occurrences("report")[0].id, horizon=SECOND, batch=10)
    packed = next(job.id for job in platform.jobs(user="u1").items if job.source == "trigger")
    store.release()
    states = {one: store.job(one).state for one in (capped, retrying, later, held, queued, packed)}
    assert states == {capped: S.PENDING, retrying: S.RETRYING, later: S.PENDING, held: S.PENDING, queued: S.QUEUED, packed: S.QUEUED}
    assert store.retract("report", actor=ACTOR)
    clock.advance(10)
    store.release()
    for message in queue(client, "medium"):
        assert store.start(message.job_id, delivery=message.delivery, worker=WORKER).refusal == "rejected"
    # what was set aside or held comes to it when its turn comes
    store.finish(flying, delivery=1, worker=WORKER, state=S.COMPLETED, reason="done")
    platform.resume_user("u2")
    for one in states:
        assert (store.job(one).state, store.job(one).reason) == (S.REJECTED, "definition report does not exist any more"), one
    client.delete("medium")
    for verb in (platform.redrive, platform.retry):
        with pytest.raises(UnknownDefinition, match="removed from the catalogue"):
            verb(dead)
    with pytest.raises(UnknownDefinition, match="removed from the catalogue"):
        platform.retry(held)
    assert platform.redrive_all() == (0, 1)
    assert [job.id for job in platform.dead_letters(definition="report").items] == [dead]
    assert_consistent(client, store)
    # it comes back
    store.publish(published(define("report")), actor=ACTOR)
    assert platform.redrive(dead).state is S.QUEUED


# --- histories -------------------------------------------------------------------------------------------------------


def test_a_history_is_kept_to_its_first_and_its_newest_lines(client: redis.Redis, store: Store, platform: Platform) -> None:
    job_id = enqueue(store, name="long", delay_ms=3_600_000)
    for number in range(1000):
        store.note(job_id, worker=WORKER, text=f"note {number}")
        assert client.llen(f"tp:history:{job_id}") <= 200
    history = platform.history(job_id)
    assert [line.reason for line in history[:21]] == ["submitted", *(f"note {number}" for number in range(20))]
    dropped = history[21].detail["dropped"]
    assert history[21].reason == f"{dropped} lines were dropped: a history is kept to 200"
    newest = history[22:]
    assert [line.reason for line in newest] == [f"note {number}" for number in range(1000 - len(newest), 1000)]
    assert 20 + dropped + len(newest) == 1000
    assert len(newest) >= 129
    assert history[21].from_state is history[21].to_state is S.PENDING
    assert_consistent(client, store)


def test_a_job_that_is_redriven_for_ever_keeps_a_valid_history(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    job_id = enqueue(store)
    publish(store, define("report", priority="high"))
    for _ in range(120):
        end(client, store, job_id, reason='HTTP 500 "é"')
        clock.advance(1)
        platform.redrive(job_id)
    history = platform.history(job_id)
    assert len(history) <= 201
    (gap,) = [line for line in history if "dropped" in line.detail]
    place = history.index(gap)
    assert history[place - 1].attempt < gap.attempt <= history[place + 1].attempt
    assert len(history) - 2 + gap.detail["dropped"] == 120 * 5 + 2, "and its new priority, and that it is queued"
    assert store.job(job_id).attempt == 120
    assert_consistent(client, store, complete=False)


def test_the_same_note_is_made_once(store: Store, platform: Platform) -> None:
    job_id = enqueue(store, delay_ms=1000)
    for text in ("seen", "seen", "seen too", "seen"):
        store.note(job_id, worker=WORKER, text=text)
    assert [line.reason for line in platform.history(job_id)] == ["submitted", "seen", "seen too", "seen"]


# --- triggers --------------------------------------------------------------------------------------------------------


def test_a_trigger_with_a_key_is_one_occurrence(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    subscribe(store, "u1", "report")
    at, subscribers = platform.trigger("report", idempotency_key="monday")
    assert subscribers == 1
    clock.advance(5)
    subscribe(store, "u2", "report", schedule=define(interval={"type": "hourly"}).schedule, own_schedule=True)
    assert platform.trigger("report", idempotency_key="monday")[0] == at
    assert len(platform.occurrences("report")) == 1, "who has subscribed since is not in it"
    assert platform.trigger("report", idempotency_key="tuesday")[0] == at + timedelta(seconds=5)
    assert platform.trigger("report")[0] == at + timedelta(seconds=5)
    clock.advance(5)
    assert platform.trigger("report")[0] == at + timedelta(seconds=10)
    assert platform.trigger("other", idempotency_key="monday")[0] == at + timedelta(seconds=10)
    for key in ("", "x" * 256, 5):
        with pytest.raises(InvalidInput, match="idempotency_key"):
            platform.trigger("report", idempotency_key=key)  # type: ignore[arg-type]
    clock.advance(4 * 86_400)
    platform.sweep()
    assert client.exists("tp:triggers") == 0
    assert platform.trigger("report", idempotency_key="monday")[0] > at


def test_a_renewal_that_is_repeated_takes_one_token(client: redis.Redis, store: Store, clock: Clock, platform: Platform) -> None:
    """As redis-py repeats it: with the same arguments."""
    publish(store, define("report", rate_limit={"rate": "1/s", "burst": 10}))
    job_id = enqueue(store)
    store.release()
    store.start(job_id, delivery=1, worker=WORKER)
    free = store.limit_states()[0].tokens
    assert free is not None
    for _ in range(2):
        assert store._scripts.run("renew", job_id, 1, WORKER, 20, "the same call") == "go"
    assert store.limit_states()[0].tokens == pytest.approx(free - 1)
    assert store._scripts.run("renew", job_id, 1, WORKER, 20, "another call") == "go"
    assert store.limit_states()[0].tokens == pytest.approx(free - 2)


def test_results(store: Store, platform: Platform) -> None:
    assert store.redrive(["report:u1:none"], reason="x") == [DeadLetterResult.GONE]
    assert store.redrive([], reason="x") == []
