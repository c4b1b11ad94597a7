"""`why` against faults that are really made: on a real server, with the real planner and scripts, and a clock that the test sets.

Each case makes one thing go wrong and says what the answer must name: the outcome, who, when, and the command that mends it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
import redis

from taskplatform.answers import Answer, Outcome, why
from taskplatform.answers.values import instant
from taskplatform.backfill import begin, check
from taskplatform.errors import InvalidInput, UnknownDefinition, UnknownUser
from taskplatform.model import Definition, JobState, Limit, Priority, slot
from taskplatform.planner import Planner, published
from taskplatform.store import Enqueue, Store
from tests.conftest import Clock
from tests.integration.harness import HORIZON, count_pipelines, define, offer, subscribe, take

MINUTE = 60_000
HOUR = 60 * MINUTE
MIDNIGHT_MS = 1_800_057_600_000
RETENTION = timedelta(days=3)


@dataclass
class Site:
    """A platform with one definition that is due each hour, a user u1 who is subscribed since the day before, and a clock."""

    client: redis.Redis
    clock: Clock
    store: Store
    definitions: dict[str, Definition] = field(default_factory=dict)
    _planner: Planner | None = None

    def deploy(self, *definitions: Definition, hosts: dict[str, str] | None = None) -> None:
        """As a new beat with this catalogue does."""
        self.definitions = {one.id: one for one in definitions}
        self._planner = Planner(self.store, self.definitions, horizon=HORIZON, batch=100, name="beat")
        self._planner.lead()
        self.store.set_options(fairness=False, share=0, retention=RETENTION)
        for name, host in (hosts or {}).items():
            # by the environment of a beat it would be known
            found = published(self.definitions[name])
            self.store.publish(type(found)(**{**{one: getattr(found, one) for one in found.__slots__}, "host": host}), actor="beat")

    @property
    def planner(self) -> Planner:
        assert self._planner is not None
        return self._planner

    def to(self, at_ms: int, *, plan: bool = True) -> None:
        """Let time pass; a planner looks whenever it has something to do, and more than once a minute, or there is none."""
        while self.clock.now_ms < at_ms:
            left = timedelta(milliseconds=at_ms - self.clock.now_ms)
            if plan:
                left = min(left, max(timedelta(seconds=1), self.planner.advance()), timedelta(seconds=50))
            self.clock.advance(left.total_seconds())
        if plan:
            self.planner.advance()

    def run(self, state: JobState = JobState.COMPLETED, *, reason: str = "as it went", **more: Any) -> list[str]:
        """A worker takes what is released and ends it so."""
        offer(self.store)
        self.store.release()
        ran: list[str] = []
        while True:
            try:
                message = take(self.client)
            except LookupError:
                return ran
            assert self.store.start(message.job_id, delivery=message.delivery, worker="w1").go
            self.store.finish(message.job_id, delivery=message.delivery, worker="w1", state=state, reason=reason, **more)
            ran.append(message.job_id)

    def why(self, at_ms: int | None = None, *, user: str = "u1", definition: str = "report", last: int = 1) -> list[Answer]:
        at = None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)
        return why(self.store, self.definitions, user, definition, at=at, last=last)

    def one(self, at_ms: int | None = None, **more: Any) -> Answer:
        (answer,) = self.why(at_ms, **more)
        return answer


def hourly(name: str = "report", **fields: Any) -> Definition:
    return define(name, interval={"type": "hourly"}, **fields)


CATALOGUE = (hourly(window="2m", catch_up={"policy": "skip"}), hourly("single", overlap="skip"), hourly("late", window="2m"))


@pytest.fixture
def site(client: redis.Redis, clock: Clock, store: Store) -> Site:
    clock.now_ms = MIDNIGHT_MS - 90 * MINUTE
    found = Site(client, clock, store)
    found.deploy(*CATALOGUE)
    store.create_user("u1", actor="ops")
    subscribe(store, "u1", "report")
    return found


def moment_ms(at_ms: int, definition: str = "report", window_ms: int = 2 * MINUTE, user: str = "u1") -> int:
    return at_ms + int(slot(user, definition) * window_ms)


# --- the table --------------------------------------------------------------------------------------------------------


def completed(site: Site) -> None:
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    assert len(site.run()) == 2


def failed(site: Site) -> None:
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.run(JobState.FAILED, reason="HTTP 500")


def timed_out(site: Site) -> None:
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.run(JobState.TIMED_OUT, reason="no answer in 5 s")


def running(site: Site) -> None:
    site.to(MIDNIGHT_MS - HOUR + 3 * MINUTE)
    site.run()
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    offer(site.store)
    site.store.release()
    message = take(site.client)
    assert site.store.start(message.job_id, delivery=message.delivery, worker="w7").go


def canceled(site: Site) -> None:
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.store.cancel(f"report:u1:{MIDNIGHT_MS}", reason="canceled by anna")


def poison(site: Site) -> None:
    running(site)
    job_id = f"report:u1:{MIDNIGHT_MS}"
    site.store.lose(job_id, delivery=1, worker="w7", what="its process died", max_losses=1, backoff=timedelta(seconds=1))


def discarded(site: Site) -> None:
    failed(site)
    site.clock.advance(5)
    site.store.discard([f"report:u1:{MIDNIGHT_MS}"], actor="anna", subject="u1", detail="")


def dropped(site: Site) -> None:
    failed(site)
    site.store.sweep(retention=RETENTION, dead_max=0)


def planner_dead(site: Site) -> None:
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.to(MIDNIGHT_MS + 30 * MINUTE, plan=False)
    site.to(MIDNIGHT_MS + 31 * MINUTE)


def planner_dead_for_long(site: Site) -> None:
    """Many are skipped in one record, and the schedule is another one by now."""
    site.to(MIDNIGHT_MS - 80 * MINUTE)
    site.to(MIDNIGHT_MS + 150 * MINUTE, plan=False)
    site.to(MIDNIGHT_MS + 151 * MINUTE)
    site.deploy(define("report", interval={"type": "daily", "at_time": {"hour": 7, "minute": 30}}, window="2m"), *CATALOGUE[1:])
    site.to(MIDNIGHT_MS + 152 * MINUTE)


def group_fails(site: Site) -> None:
    """A planner runs, and cannot plan this one: here because its schedule cannot be read for a while."""
    key = "tp:group:report"
    text = site.client.hget(key, "schedule")
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.client.hset(key, "schedule", "{broken")
    site.to(MIDNIGHT_MS + 10 * MINUTE)
    site.client.hset(key, "schedule", str(text))
    site.to(MIDNIGHT_MS + 11 * MINUTE)


def group_still_fails(site: Site) -> None:
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.client.hset("tp:group:report", "schedule", "{broken")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def definition_paused(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.store.pause_definition("report", why="the API is down", actor="anna")
    site.to(MIDNIGHT_MS + 10 * MINUTE)
    site.store.resume_definition("report", actor="bert")
    site.to(MIDNIGHT_MS + 11 * MINUTE)


def definition_still_paused(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.store.pause_definition("report", why="the API is down", actor="anna")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def user_paused_between(site: Site) -> None:
    """Only between the opening and the moment, and not for longer."""
    site.to(MIDNIGHT_MS - 2000)
    at_ms = moment_ms(MIDNIGHT_MS)
    site.to(at_ms - 20_000)
    site.store.pause_user("u1", actor="anna")
    site.to(at_ms + 5000)
    site.store.resume_user("u1", actor="bert")
    site.to(MIDNIGHT_MS + 5 * MINUTE)


def subscription_paused(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.store.pause_subscription("u1", "report", actor="anna")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def disabled(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    subscribe(site.store, "u1", "report", enabled=False)
    site.to(MIDNIGHT_MS + 10 * MINUTE)
    subscribe(site.store, "u1", "report", enabled=True)
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def enabled_just_before(site: Site) -> None:
    """On again before its moment, but too late for it: that takes effect after the horizon."""
    at_ms = moment_ms(MIDNIGHT_MS)
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    subscribe(site.store, "u1", "report", enabled=False)
    site.to(at_ms - 3000)
    subscribe(site.store, "u1", "report", enabled=True)
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def two_causes(site: Site) -> None:
    """Nobody planned for a while inside the window: the user was paused, then the subscription."""
    at_ms = moment_ms(MIDNIGHT_MS)
    site.to(at_ms - 20_000)
    site.store.pause_user("u1", actor="anna")
    site.to(at_ms + 10_000, plan=False)
    site.store.pause_subscription("u1", "report", actor="carl")
    site.clock.advance(1)
    site.store.resume_user("u1", actor="bert")
    site.to(MIDNIGHT_MS + 5 * MINUTE)


def unsubscribed(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.store.unsubscribe("u1", "report", actor="anna")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def unsubscribed_and_back(site: Site) -> None:
    unsubscribed(site)
    subscribe(site.store, "u1", "report")
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def subscribed_later(site: Site) -> None:
    site.to(MIDNIGHT_MS + 10 * MINUTE)
    site.store.create_user("u2", actor="ops")
    subscribe(site.store, "u2", "report")
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def user_was_made_again(site: Site) -> None:
    site.to(MIDNIGHT_MS + 10 * MINUTE)
    site.store.delete_user("u1", actor="anna")
    site.store.create_user("u1", actor="ops")
    subscribe(site.store, "u1", "report")
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def schedule_changed_just_before(site: Site) -> None:
    """Away from midnight, so that this day has none."""
    own = define("own", interval={"type": "daily", "at_time": {"hour": 23, "minute": 30}}).schedule
    site.to(MIDNIGHT_MS - 20_000)
    subscribe(site.store, "u1", "report", schedule=own, own_schedule=True)
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def definition_removed(site: Site) -> None:
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.deploy(*CATALOGUE[1:])
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def removed_and_back(site: Site) -> None:
    definition_removed(site)
    site.deploy(*CATALOGUE)
    site.to(MIDNIGHT_MS + 20 * MINUTE)


def caught_up(site: Site) -> None:
    """The policy of this definition runs the latest that was missed."""
    subscribe(site.store, "u1", "late")
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.to(MIDNIGHT_MS + 10 * MINUTE, plan=False)
    site.to(MIDNIGHT_MS + 13 * MINUTE)
    site.run()


def overlap(site: Site) -> None:
    subscribe(site.store, "u1", "single")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


def no_planner(site: Site) -> None:
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.to(MIDNIGHT_MS + 30 * MINUTE, plan=False)


def not_due(site: Site) -> None:
    site.to(MIDNIGHT_MS - 30 * MINUTE)


def before_its_slot(site: Site) -> None:
    site.to(moment_ms(MIDNIGHT_MS) - 20_000)


def waits_for_slot_paused(site: Site) -> None:
    before_its_slot(site)
    site.store.pause_user("u1", actor="anna")


def due(site: Site) -> None:
    """At midnight; what was due before has run."""
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.run()
    site.to(MIDNIGHT_MS + 3 * MINUTE)


def no_worker(site: Site) -> None:
    due(site)
    site.client.delete("tp:workers", "tp:capacity", "tp:worker:w1")


def drained(site: Site) -> None:
    due(site)
    site.store.drain_worker("w1", actor="anna")


def held(site: Site) -> None:
    due(site)
    site.store.pause_user("u1", actor="anna")
    site.store.release()


def paused_after(site: Site) -> None:
    due(site)
    site.store.pause_definition("report", why="broken", actor="anna")


def _busy(site: Site, job_id: str, name: str, limit: Limit) -> None:
    """A limit, and a job that takes what it lets go, before the one that is asked about is due."""
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.run()
    site.store.set_limit(name, limit, actor="ops")
    site.store.create_user("u9", actor="ops")
    site.to(MIDNIGHT_MS - MINUTE)
    site.store.enqueue([Enqueue(job_id)])
    site.store.release()
    assert site.store.start(job_id, delivery=1, worker="w1").go
    take(site.client)
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.store.release()


def limited(site: Site) -> None:
    _busy(site, "report:u9:m1", "definition:report", Limit(concurrency=1))


def limited_by_rate(site: Site) -> None:
    _busy(site, "report:u9:m1", "definition:report", Limit(0.001, 1))


def rate_limited(site: Site) -> None:
    _busy(site, "single:u9:m1", "total", Limit(0.001, 1))


def user_capped(site: Site) -> None:
    _busy(site, "single:u1:m1", "user:u1", Limit(concurrency=1))


def host_limited(site: Site) -> None:
    site.deploy(*CATALOGUE, hosts={"report": "api.example.com"})
    _busy(site, "report:u9:m1", "host:api.example.com", Limit(concurrency=1))


def breaker(site: Site) -> None:
    site.deploy(*CATALOGUE, hosts={"report": "api.example.com"})
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.run()
    site.store.hold_host("api.example.com", span=timedelta(hours=5), why="too many failed", actor="ops")
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.store.release()


def others_first(site: Site) -> None:
    """Every slot is taken, and others are before it."""
    site.to(MIDNIGHT_MS - 30 * MINUTE)
    site.run()
    offer(site.store, slots=1)
    site.store.create_user("u9", actor="ops")
    first = [Enqueue(f"single:u9:m{n}", priority=Priority.HIGH, execute_after_ms=MIDNIGHT_MS - MINUTE) for n in range(2)]
    site.store.enqueue([*first, Enqueue("single:u9:m3", execute_after_ms=MIDNIGHT_MS - MINUTE)])
    site.to(MIDNIGHT_MS + 3 * MINUTE)
    site.store.release()


def by_turns(site: Site) -> None:
    site.store.set_options(fairness=True, share=0)
    others_first(site)


def retrying(site: Site) -> None:
    due(site)
    assert len(site.run(JobState.RETRYING, reason="HTTP 503", retry_in=timedelta(minutes=2))) == 1


def in_queue(site: Site) -> None:
    due(site)
    offer(site.store)
    site.store.release()


def forgotten(site: Site) -> None:
    completed(site)
    site.to(MIDNIGHT_MS + 80 * HOUR, plan=False)
    while site.store.sweep(retention=RETENTION):
        pass


def before_this_version(site: Site) -> None:
    """A pause that the version before this made: nothing tells by whom."""
    site.to(MIDNIGHT_MS - 10 * MINUTE)
    site.client.hset("tp:user:u1", "@paused", "1")
    site.to(MIDNIGHT_MS + 10 * MINUTE)


@dataclass(frozen=True)
class Expected:
    made: Callable[[Site], None]
    outcome: Outcome
    says: tuple[str, ...]
    mend: str = ""
    user: str = "u1"
    definition: str = "report"
    at_ms: int = MIDNIGHT_MS


AT = instant
TABLE = [
    Expected(completed, Outcome.COMPLETED, ("attempt 1", "w1")),
    Expected(failed, Outcome.FAILED, ("HTTP 500", "dead letter"), "dead-letters redrive report:u1:"),
    Expected(timed_out, Outcome.TIMED_OUT, ("no answer in 5 s",), "dead-letters redrive"),
    Expected(running, Outcome.RUNNING, ("w7", "attempt 1")),
    Expected(canceled, Outcome.CANCELED, ("canceled by anna",), "jobs retry"),
    Expected(poison, Outcome.DEAD, ("its process died",), "dead-letters redrive"),
    Expected(discarded, Outcome.DISCARDED, ("HTTP 500", "discarded by anna"), mend="taskplatform backfill report --from"),
    Expected(dropped, Outcome.DISCARDED, ("HTTP 500", "dead_max")),
    Expected(
        planner_dead,
        Outcome.MISSED,
        ("no planner ran from", AT(MIDNIGHT_MS - 30 * MINUTE), AT(MIDNIGHT_MS + 30 * MINUTE)),
        mend=f"taskplatform backfill report --from {AT(MIDNIGHT_MS)[:10]}T00:00:00Z",
    ),
    Expected(planner_dead_for_long, Outcome.MISSED, ("no planner ran from", AT(MIDNIGHT_MS - 80 * MINUTE))),
    Expected(planner_dead_for_long, Outcome.MISSED, ("no planner ran from",), at_ms=MIDNIGHT_MS + HOUR),
    Expected(group_fails, Outcome.MISSED, ("report could not be planned from", "JSON")),
    Expected(
        group_still_fails, Outcome.WAITING, ("planner has not come to it", "fails: group report: JSONDecodeError"), "taskplatform health"
    ),
    Expected(definition_paused, Outcome.SKIPPED, ("paused by anna at", "the API is down", "resumed by bert")),
    Expected(definition_still_paused, Outcome.SKIPPED, ("paused by anna at",), "taskplatform resume report"),
    Expected(user_paused_between, Outcome.SKIPPED, ("user u1 was paused by anna at", "until it was resumed by bert")),
    Expected(subscription_paused, Outcome.SKIPPED, ("was paused by anna at", AT(MIDNIGHT_MS - 10 * MINUTE)), "subscriptions resume u1"),
    Expected(disabled, Outcome.SKIPPED, ("was disabled by test", "until it was enabled by test")),
    Expected(enabled_just_before, Outcome.SKIPPED, ("was disabled by test", "until it was enabled by test")),
    Expected(two_causes, Outcome.SKIPPED, ("user u1 was paused by anna", "subscription of u1 to report was paused by carl")),
    Expected(unsubscribed, Outcome.NOT_SUBSCRIBED, ("unsubscribed from report by anna",), "subscriptions add"),
    Expected(unsubscribed_and_back, Outcome.NOT_SUBSCRIBED, ("unsubscribed from report by anna", "subscribed again by test")),
    Expected(subscribed_later, Outcome.NOT_SUBSCRIBED, ("created only at", AT(MIDNIGHT_MS + 10 * MINUTE)), user="u2"),
    Expected(user_was_made_again, Outcome.NOT_SUBSCRIBED, ("created only at", AT(MIDNIGHT_MS + 10 * MINUTE))),
    Expected(schedule_changed_just_before, Outcome.SKIPPED, ("another schedule by test", AT(MIDNIGHT_MS - 20_000))),
    Expected(definition_removed, Outcome.SKIPPED, ("removed from the catalogue by beat",)),
    Expected(removed_and_back, Outcome.MISSED, ("removed from the catalogue by beat", "published again by beat")),
    Expected(caught_up, Outcome.COMPLETED, ("attempt 1",), definition="late"),
    Expected(overlap, Outcome.REJECTED, ("overlap",), definition="single"),
    Expected(no_planner, Outcome.WAITING, ("planner looked last at", "no beat leads"), "taskplatform health"),
    Expected(not_due, Outcome.COMING, (AT(moment_ms(MIDNIGHT_MS)),)),
    Expected(before_its_slot, Outcome.COMING, ("slot", AT(moment_ms(MIDNIGHT_MS)))),
    Expected(waits_for_slot_paused, Outcome.COMING, ("paused by anna", "skipped if this lasts"), "users resume u1"),
    Expected(no_worker, Outcome.WAITING, ("no worker serves the queue medium",), "celery -A taskplatform.app worker"),
    Expected(drained, Outcome.WAITING, ("drained",), "nodes resume w1"),
    Expected(held, Outcome.WAITING, ("held", "user u1 was paused by anna"), "users resume u1"),
    Expected(paused_after, Outcome.WAITING, ("definition report is paused by anna", "broken"), "taskplatform resume report"),
    Expected(limited, Outcome.WAITING, ("limit definition:report", "1 of 1"), "limits set definition:report"),
    Expected(limited_by_rate, Outcome.WAITING, ("limit definition:report", "next may start at"), "limits set definition:report"),
    Expected(host_limited, Outcome.WAITING, ("jobs call api.example.com", "1 of 1"), "limits set host:api.example.com"),
    Expected(others_first, Outcome.WAITING, ("all slots", "1 of its priority by time and 1 of priority high")),
    Expected(by_turns, Outcome.WAITING, ("all slots", "1 of its priority and round and 1 of priority high")),
    Expected(rate_limited, Outcome.WAITING, ("limit total", "next may start at"), "limits set total"),
    Expected(user_capped, Outcome.WAITING, ("u1 has as many jobs in flight", "limit user:u1"), "limits set user:u1"),
    Expected(breaker, Outcome.WAITING, ("api.example.com is held back", "too many failed"), "breakers reset api.example.com"),
    Expected(retrying, Outcome.WAITING, ("attempt 1", "HTTP 503", "next is due at")),
    Expected(in_queue, Outcome.WAITING, ("lies in the queue medium",)),
    Expected(forgotten, Outcome.FORGOTTEN, ("older than the retention", "3d")),
    Expected(completed, Outcome.NOT_SUBSCRIBED, ("user u1 was created only at",), at_ms=MIDNIGHT_MS - 10 * 24 * HOUR),
    Expected(before_this_version, Outcome.SKIPPED, ("user u1 was paused", "by whom is not known"), "users resume u1"),
]


@pytest.mark.parametrize("expected", TABLE, ids=[f"{n}-{one.made.__name__}" for n, one in enumerate(TABLE)])
def test_what_happened_is_what_is_told(site: Site, expected: Expected) -> None:
    expected.made(site)
    answer = site.one(expected.at_ms, user=expected.user, definition=expected.definition)
    told = f"{answer.outcome}: {answer.reason} [{answer.mend}]"
    assert (answer.occurrence_ms, answer.outcome) == (expected.at_ms, expected.outcome), told
    assert [text for text in expected.says if text not in answer.reason] == [], told
    assert expected.mend in answer.mend, told
    assert (answer.job_id is None) == (answer.history == ()), told
    assert "unknown" not in told


# --- which occurrence -------------------------------------------------------------------------------------------------


def test_an_instant_belongs_to_the_occurrence_in_whose_window_it_lies(site: Site) -> None:
    completed(site)
    moment = moment_ms(MIDNIGHT_MS)
    for at_ms in (MIDNIGHT_MS, moment, MIDNIGHT_MS + 119_000, MIDNIGHT_MS + 50 * MINUTE):
        assert site.one(at_ms).occurrence_ms == MIDNIGHT_MS
    assert site.one(MIDNIGHT_MS - 1).occurrence_ms == MIDNIGHT_MS - HOUR
    assert (site.one().occurrence_ms, site.one().moment_ms) == (MIDNIGHT_MS, moment)
    assert site.one(MIDNIGHT_MS + HOUR).outcome is Outcome.COMING
    first, second, third = site.why(last=3)
    assert [one.occurrence_ms for one in (first, second, third)] == [MIDNIGHT_MS, MIDNIGHT_MS - HOUR, MIDNIGHT_MS - 2 * HOUR]
    assert [one.outcome for one in (first, second, third)] == [Outcome.COMPLETED, Outcome.COMPLETED, Outcome.NOT_SUBSCRIBED]


def test_histories_are_those_of_the_store_and_read_in_one_go(site: Site, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    site.to(MIDNIGHT_MS - 30 * MINUTE, plan=False)
    for number in range(6):
        site.to(MIDNIGHT_MS + number * HOUR + 10 * MINUTE)
        site.run(JobState.COMPLETED if number % 2 else JobState.FAILED)
    since = datetime.fromtimestamp((MIDNIGHT_MS - HOUR) / 1000, UTC)
    until = since + timedelta(minutes=1)
    span = check("report", since=since, until=until, rate="5/s", beyond_retention=False, retention=RETENTION, now_ms=site.clock.now_ms)
    begin(site.store, span, None, actor="ann")
    site.to(site.clock.now_ms + MINUTE)
    site.run()
    sent = count_pipelines(monkeypatch)
    site.why(last=4)
    of_few = len(sent)
    sent.clear()
    answers = site.why(last=7)
    assert len(sent) == of_few, "however many are asked for"
    assert [one.history[0].reason.partition(" ")[0] for one in answers] == ["planned"] * 6 + ["made"], "the last is of the backfill"
    for one in answers:
        assert one.job_id is not None
        assert one.history == tuple(site.store.history(one.job_id))


def test_a_date_is_a_day_in_the_zone_of_the_schedule(site: Site) -> None:
    berlin = define("own", interval={"type": "hourly", "value": 4, "timezone": "Europe/Berlin"}).schedule
    subscribe(site.store, "u1", "report", schedule=berlin, own_schedule=True)
    site.to(MIDNIGHT_MS + 9 * HOUR)
    found = why(site.store, site.definitions, "u1", "report", at=date(2027, 1, 16))
    # from midnight in Berlin on, an hour before that of UTC
    assert [(one.occurrence_ms - MIDNIGHT_MS) // HOUR for one in found] == [19, 15, 11, 7, 3, -1]
    assert [one.outcome for one in found[:3]] == [Outcome.COMING] * 3


def test_a_trigger_is_an_occurrence_too(site: Site) -> None:
    site.to(MIDNIGHT_MS + 30 * MINUTE)
    site.store.trigger("report", window=timedelta(), actor="anna")
    at_ms = site.clock.now_ms
    site.to(at_ms + MINUTE)
    site.run()
    first, second = site.why(last=2)
    assert (first.occurrence_ms, first.outcome, first.job_id) == (at_ms, Outcome.COMPLETED, f"report:u1:t{at_ms}")
    assert second.occurrence_ms == MIDNIGHT_MS
    site.store.pause_user("u1", actor="anna")
    site.clock.advance(60)
    site.store.trigger("report", window=timedelta(), actor="bert")
    site.to(site.clock.now_ms + MINUTE)
    answer = site.one()
    assert answer.outcome is Outcome.SKIPPED
    assert "user u1 was paused by anna" in answer.reason
    assert ("the planner's record", "planned: triggered by bert") in answer.facts


def test_what_is_not_there_is_said(site: Site) -> None:
    with pytest.raises(UnknownUser, match="no user 'u7'"):
        site.one(user="u7")
    site.store.delete_user("u1", actor="anna")
    with pytest.raises(UnknownUser, match="deleted by anna at"):
        site.one()
    site.store.create_user("u1", actor="ops")
    with pytest.raises(UnknownDefinition):
        site.one(definition="nothing")
    assert site.one().outcome is Outcome.NOT_SUBSCRIBED
    assert "subscriptions add u1 report" in site.one().mend
    for last in (0, 201, True):
        with pytest.raises(InvalidInput, match="last"):
            site.why(last=last)
    for at in (datetime(2027, 1, 16), date(9999, 12, 31), datetime(1, 1, 1, tzinfo=UTC)):
        with pytest.raises(InvalidInput, match="at"):
            why(site.store, site.definitions, "u1", "report", at=at)


# --- at random --------------------------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What was done, told apart from what the platform keeps: by kind, spans of time."""

    spans: dict[str, list[list[float]]] = field(default_factory=dict)

    def begin(self, kind: str, now_ms: int) -> None:
        self.spans.setdefault(kind, []).append([now_ms, float("inf")])

    def end(self, kind: str, now_ms: int) -> None:
        self.spans[kind][-1][1] = now_ms

    def on(self, kind: str) -> bool:
        return bool(self.spans.get(kind)) and self.spans[kind][-1][1] == float("inf")

    def held(self, kind: str, from_ms: float, to_ms: float) -> bool:
        return any(start <= to_ms and end >= from_ms for start, end in self.spans.get(kind, ()))


#: By what a sentence says, what must have been so.
SAYS = {
    "user u1 was paused": "user",
    "subscription of u1 to report was paused": "subscription",
    "was disabled": "off",
    "unsubscribed": "gone",
    "definition report was paused": "definition",
    "no planner ran": "outage",
    "another schedule": "schedule",
}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_was_done_each_reason_is_true(client: redis.Redis, clock: Clock, store: Store, seed: int) -> None:
    """Half a day of changes at random; of each occurrence without a job the reason must be one that there was."""
    dice, truth = random.Random(seed), Truth()
    clock.now_ms = MIDNIGHT_MS
    site = Site(client, clock, store)
    every = define("report", interval={"type": "minutely", "value": 20}, window="8m", catch_up={"policy": "skip"})
    site.deploy(every)
    schedules = [define("own", cron={"expression": f"{minute}-59/15 * * * *"}).schedule for minute in (0, 7)]
    store.create_user("u1", actor="ops")
    subscribe(store, "u1", "report")
    begin_ms = clock.now_ms
    switches: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "user": (lambda: store.pause_user("u1", actor="anna"), lambda: store.resume_user("u1", actor="anna")),
        "subscription": (
            lambda: store.pause_subscription("u1", "report", actor="bert"),
            lambda: store.resume_subscription("u1", "report", actor="bert"),
        ),
        "off": (
            lambda: subscribe(store, "u1", "report", enabled=False, own_schedule=None),
            lambda: subscribe(store, "u1", "report", enabled=True, own_schedule=None),
        ),
        "definition": (
            lambda: store.pause_definition("report", why="broken", actor="carl"),
            lambda: store.resume_definition("report", actor="carl"),
        ),
        "gone": (lambda: store.unsubscribe("u1", "report", actor="dora"), lambda: subscribe(store, "u1", "report")),
    }
    for _ in range(36):
        kind = dice.choice([*switches, "schedule", "outage"])
        if truth.on("gone") and kind != "gone":
            kind = "gone"
        if kind == "outage":
            truth.begin(kind, clock.now_ms)
            site.to(clock.now_ms + dice.randrange(10, 90) * MINUTE, plan=False)
            site.planner.advance()
            truth.end(kind, clock.now_ms)
        elif kind == "schedule":
            chosen = dice.choice([None, *schedules])
            if subscribe(store, "u1", "report", schedule=chosen, own_schedule=chosen is not None) > 0:
                truth.begin(kind, clock.now_ms)
                truth.end(kind, clock.now_ms + HORIZON // timedelta(milliseconds=1))
        elif truth.on(kind):
            switches[kind][1]()
            truth.end(kind, clock.now_ms)
        else:
            if kind == "gone":
                # these end with the subscription
                for other in [one for one in ("subscription", "off") if truth.on(one)]:
                    truth.end(other, clock.now_ms)
            switches[kind][0]()
            truth.begin(kind, clock.now_ms)
        site.to(clock.now_ms + dice.randrange(1, 25) * MINUTE)
    told = [one for one in site.why(last=200) if one.occurrence_ms > begin_ms]
    assert len(told) > 20
    jobs = {job.occurrence_ms: job for job in store.jobs(user="u1", limit=10_000).items}
    assert jobs.keys() <= {one.occurrence_ms for one in told}, "a job that was made is told of"
    for answer in told:
        text = f"{datetime.fromtimestamp(answer.occurrence_ms / 1000, UTC)}: {answer.outcome}: {answer.reason}"
        if answer.job_id is not None or answer.outcome is Outcome.COMING:
            assert (answer.job_id is not None) == (answer.occurrence_ms in jobs), text
            continue
        # by which a pause ended does not count
        said = answer.reason.replace("until it was unsubscribed", "").replace("until it was disabled", "")
        named = {kind for clause, kind in SAYS.items() if clause in said}
        assert named, f"nothing is named: {text}"
        assert answer.moment_ms is not None
        reach = 92 * MINUTE if truth.spans.get("outage") else 10 * MINUTE
        # what is named was so when the planner came to it, which an outage puts off
        lags = [kind for kind in named if not truth.held(kind, answer.occurrence_ms - 30 * MINUTE, answer.moment_ms + reach)]
        assert lags == [], f"{lags} was not so: {text}"
