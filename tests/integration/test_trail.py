"""The trail of changes: what it costs, how long it is kept, and that it goes with its user."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import redis

from taskplatform.planner import Planner
from taskplatform.store import Background, Enqueue, Outage, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, define, offer, publish, subscribe, take

DAY = 86_400
RETENTION = timedelta(days=3)
#: What was changed is kept for an hour more than that.
KEPT = 3 * DAY + 3600
OWN = define("own", interval={"type": "daily", "at_time": {"hour": 7, "minute": 0}}).schedule


@pytest.fixture
def known(store: Store) -> Store:
    """With a definition, and a user who is subscribed to it."""
    publish(store, define("report"))
    store.set_options(fairness=False, share=0, retention=RETENTION)
    store.create_user("u1", actor=ACTOR)
    subscribe(store, "u1", "report")
    return store


def facts(store: Store, user: str = "u1") -> Background:
    found = store.evidence.background(user, "report")
    assert found is not None
    return found


def kinds(store: Store) -> list[str]:
    return [one.kind for one in facts(store).trail]


def test_what_never_changed_has_no_trail(client: redis.Redis, known: Store) -> None:
    """So that ten million subscriptions that were imported cost what they did before."""
    known.create_users([f"x{n}" for n in range(50)], actor=ACTOR)
    for n in range(50):
        subscribe(known, f"x{n}", "report", enabled=n % 2 == 0, params={"format": "pdf"})
        # what is as it was is no change, and parameters are none of when
        subscribe(known, f"x{n}", "report", params={"format": "txt"}, enabled=None, own_schedule=None)
    publish(known, define("report", priority="high"))
    found = [str(name) for name in client.scan_iter(count=1000)]
    assert [name for name in found if "trail" in name or "gone" in name] == []
    assert client.hget("tp:user:u1", "report") == '{"since":1800000005000}'


def test_each_change_is_kept_with_who_made_it(known: Store, clock: Clock) -> None:
    clock.advance(60)
    subscribe(known, "u1", "report", schedule=OWN, own_schedule=True)
    known.pause_subscription("u1", "report", actor="anna")
    known.pause_subscription("u1", "report", actor="bert")
    subscribe(known, "u1", "report", enabled=False, own_schedule=None)
    subscribe(known, "u1", "report", enabled=True, own_schedule=False)
    known.unsubscribe("u1", "report", actor="carl")
    subscribe(known, "u1", "report")
    found = facts(known).trail
    assert [one.kind for one in found] == ["schedule", "paused", "disabled", "schedule", "enabled", "unsubscribed", "subscribed"]
    assert [one.actor for one in found] == [ACTOR, "anna", ACTOR, ACTOR, ACTOR, "carl", ACTOR]
    away, *_, back, _, left, _ = found
    assert (away.group, away.since_ms, away.from_ms) == ("report", 1_800_000_005_000, clock.now_ms + 5000)
    assert json.loads(back.schedule)["interval"]["at_time"]["hour"] == 7
    assert (left.group, left.schedule) == ("report", "")


def test_it_is_kept_as_long_as_what_it_explains(client: redis.Redis, known: Store, clock: Clock) -> None:
    known.pause_user("u1", actor="anna")
    # for as long as that lasts somebody may ask who it was
    assert client.pttl("tp:trail:u1") > 50 * 366 * DAY * 1000
    clock.advance(10 * DAY)
    known.pause_subscription("u1", "report", actor="bert")
    assert [one.actor for one in facts(known).user_trail] == ["anna"]
    known.resume_user("u1", actor="carl")
    known.resume_subscription("u1", "report", actor="dora")
    # the pause of ten days ago explains what was before, so it stays until that is past the retention
    assert [(one.kind, one.actor) for one in facts(known).user_trail] == [("paused", "anna"), ("resumed", "carl")]
    assert 0 < client.pttl("tp:trail:u1") <= KEPT * 1000
    clock.advance(KEPT + 1)
    known.pause_subscription("u1", "report", actor="emil")
    assert [(one.kind, one.actor) for one in facts(known).trail] == [("resumed", "dora"), ("paused", "emil")]
    assert facts(known).user_trail == (), "what is past the retention went with the next change"


def test_too_many_changes_are_not_kept_and_that_is_said(client: redis.Redis, known: Store, clock: Clock) -> None:
    known.pause_subscription("u1", "report", actor="anna")
    for _ in range(200):
        clock.advance(1)
        subscribe(known, "u1", "report", enabled=False)
        clock.advance(1)
        subscribe(known, "u1", "report", enabled=True)
    found = facts(known).trail
    assert len(found) <= 64
    assert found[0].kind == "dropped"
    assert (found[1].kind, found[1].actor) == ("paused", "anna"), "it still is, so who it was is kept"
    assert int(client.memory_usage("tp:trail:u1") or 0) < 8000


def test_it_goes_with_its_user(client: redis.Redis, known: Store) -> None:
    offer(known)
    known.enqueue([Enqueue("report:u1:m1")])
    known.pause_subscription("u1", "report", actor="anna")
    known.delete_user("u1", actor=ACTOR)
    assert client.exists("tp:trail:u1", "tp:gone:u1") == 0
    assert known.evidence.background("u1", "report") is None
    known.create_user("u1", actor=ACTOR)
    assert facts(known).trail == facts(known).user_trail == ()


def test_a_dead_letter_that_is_forgotten_leaves_a_word(client: redis.Redis, known: Store, clock: Clock) -> None:
    clock.now_ms = 1_800_057_600_000
    planner = Planner(known, {"report": define("report")}, horizon=HORIZON, batch=10)
    planner.advance()
    clock.advance(120)
    planner.advance()
    offer(known)
    known.release()
    message = take(client)
    assert known.start(message.job_id, delivery=1, worker="w1").go
    known.finish(message.job_id, delivery=1, worker="w1", state=known.job(message.job_id).state.FAILED, reason="HTTP 500")
    known.discard([message.job_id], actor="anna", subject="u1", detail="")
    (found,) = facts(known).forgotten.values()
    assert (found.reason, found.what, found.died_ms) == ("HTTP 500", "discarded by anna", clock.now_ms)
    assert 0 < client.pttl("tp:gone:u1") <= KEPT * 1000


def test_outages_are_bounded(client: redis.Redis, known: Store, clock: Clock) -> None:
    for n in range(1200):
        known.evidence.outage(Outage(clock.now_ms + n, clock.now_ms + n + 1), kept=RETENTION)
    assert client.zcard("tp:outages") == 1000
    known.evidence.outage(Outage(0, clock.now_ms + 4 * DAY * 1000), kept=RETENTION)
    assert client.zcard("tp:outages") == 1


def test_an_outage_is_noted_by_who_plans_again(known: Store, clock: Clock) -> None:
    def planner() -> Planner:
        return Planner(known, {"report": define("report")}, horizon=HORIZON, batch=10)

    first = planner()
    first.lead()
    first.advance()
    clock.advance(50)
    first.advance()
    assert facts(known).outages == (), "less than a minute is none"
    before = clock.now_ms
    clock.advance(3600)
    # another one takes over, and the first comes back from a long pause
    second = planner()
    second.lead()
    second.advance()
    second.advance()
    assert [(one.from_ms, one.to_ms, one.what) for one in facts(known).outages] == [(before, clock.now_ms, "")]
    first.advance()
    assert len(facts(known).outages) == 1, "the same outage is one"
