"""A call whose answer was lost is sent again by redis-py, and people press a key twice: twice gives the same as once.

One story goes through every script, at moments when it has something to do. It is told once as it is, and once for each script
with each of its calls sent twice, with the same arguments. After every step the whole database must be the same.
"""

# mypy: disable-error-code="func-returns-value"
# (a step is one expression, also where it is made of several calls)

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest
import redis

from taskplatform.errors import UnknownSubscription, UnknownUser
from taskplatform.keys import ApiKey
from taskplatform.model import BreakerRule, CallReport, Definition, JobState, Limit, Priority
from taskplatform.planner import Planner, published
from taskplatform.store import Enqueue, Store
from taskplatform.store.access import AuditEntry
from taskplatform.store.scripts import Scripts, names
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, arrive, assert_consistent, define, offer, subscribe, take

S = JobState
SECOND = timedelta(seconds=1)
MIDNIGHT_MS = 1_800_057_600_000
assert MIDNIGHT_MS % 86_400_000 == 0

#: Scripts whose second call answers something else than the first, though it changes nothing more, and why that harms nobody.
OTHER_ANSWER = {
    "announce": "that there was nothing to tell: nobody reads it",
    "arrive": "whether the server is another one: nobody reads it",
    "cancel": "the state that it was in is now canceled, which Platform.cancel takes for done",
    "create_user": "that the user exists, which Platform.create_user takes for done",
    "create_users": "how many were new: a number for people",
    "delete_user": "that there is no such user: who asks for it twice is told so, and the user is gone",
    "discard": "that there is no such job, which Platform.discard takes for done",
    "log_level": "whether that changed something: for people",
    "drain": "whether that changed something: for people",
    "enqueue": "that the jobs exist: Platform.enqueue gives them either way",
    "finish": "what became of a host that is held back, or no more: a line in the log",
    "follow": "how many were changed: the loop around it goes on until none is",
    "hold_host": "that the host was not held back any more, which is for people",
    "leave": "how many were given back: a line in the log",
    "limit": "whether that changed something: a number for people",
    "lose": "that the delivery no longer counts: nobody reads it",
    "open": "that the group is not as it was seen: the planner looks again at the next tick",
    "pause_definition": "whether that changed something: for people",
    "pause_subscription": "whether that changed something: for people",
    "pause_user": "whether that changed something: for people",
    "plan": "how many jobs the second call made: a number in the hash planner",
    "publish": "whether that changed something: a line in the log",
    "reclaim": "what was released again: lines in the log",
    "refuse": "the state in which the job waits: a line in the log",
    "recover": "what was taken: lines in the log",
    "revoke_key": "how many were valid: a number for people",
    "release": "how many were released: the loop around it goes on while there are some",
    "retract": "whether it was published: nobody reads it",
    "stopped": "that it was said before: nobody reads it",
    "subscribe": "that nothing changed: for people",
    "sweep": "how many were forgotten: the loop around it goes on until there are none",
    "uncap": "how many were put back: the loop around it goes on until there are none",
    "unsubscribe": "that there is no subscription: who asks for it twice is told so, and it is gone",
    "withdraw": "how many were given back: a line in the log",
}


#: What differs in the database all the same, by script: a number or a line for people.
OTHER_DATABASE = {
    "create_users": {"tp:changes": "who imports users logs how many were new, by the answer: it is lost with it"},
    "log_level": {"tp:changes": "people see the same change twice"},
    "plan": {"tp:planner": "the planner counts the jobs that it made by the answer"},
    "audit": {"tp:audit:requests": "people see the same request twice, with the same id"},
    "refuse_key": {
        "tp:attempts": "a wrong key counts as two: some that are slow to answer are told to wait earlier",
        "tp:audit:refused": "and people see it twice, with the same id",
    },
    "set_aside": {
        "tp:garbage": "what no worker can take lies twice among what people look at",
        "tp:counters": "and counts twice",
    },
}


class Story:
    """The steps, each a name and what it does."""

    def __init__(self, client: redis.Redis, clock: Clock) -> None:
        self.client = client
        self.clock = clock
        self.store = Store(client, clock=clock)
        self.definitions = [
            define("report", priority="medium", rate_limit={"rate": "5/s", "burst": 20}),
            define("single", overlap="skip", concurrency=1),
            define("old", priority="low"),
        ]
        self.planner = Planner(self.store, {one.id: one for one in self.definitions}, horizon=HORIZON, batch=50)

    def start(self, job_id: str, worker: str = "w1", version: str = "") -> bool:
        return self.store.start(job_id, delivery=self.store.job(job_id).delivery, worker=worker, version=version).go

    def tag(self, job_id: str) -> str:
        """The job's current delivery, as a worker that stops names it."""
        return f"{job_id}#{self.store.job(job_id).delivery}"

    def refuse(self, job_id: str) -> str:
        take(self.client)
        return self.store.refuse(job_id, delivery=self.store.job(job_id).delivery, worker="w1", why="not known here")

    def refuse_for_good(self, job_id: str) -> None:
        while not self.store.job(job_id).state.terminal:
            self.clock.advance(300)
            offer(self.store)
            self.store.release()
            self.refuse(job_id)

    def stop_all(self, worker: str) -> list[bool]:
        """What a worker does about the runs that its heartbeat tells it to stop."""
        stops = self.store.heartbeat(worker, slots=20, queues=list(Priority), buffer=1).stops
        assert stops
        return [self.store.stopped(worker, stop, note="stopped, as it was told", discarded=True) for stop in stops]

    def recover(self, worker: str) -> list[tuple[str, str]]:
        seen_ms = self.store.heartbeats()[worker]
        return self.store.recover(worker, seen_ms=seen_ms, how="silent for 20 s", max_losses=3, backoff=SECOND)

    def attend(self, beat: str, catalogue: str, number: int | None) -> int:
        return self.store.attend(beat, catalogue=catalogue, number=number, leads=True, alive=SECOND, account=20 * SECOND)[0]

    def finish(self, job_id: str, state: JobState, worker: str = "w1", delivery: int | None = None) -> bool:
        current = self.store.job(job_id).delivery if delivery is None else delivery
        return self.store.finish(job_id, delivery=current, worker=worker, state=state, reason="as it went", retry_in=SECOND)

    def fail_at_host(self, job_id: str) -> bool:
        report = CallReport("a", failed=True, rule=BreakerRule(share=0.5, calls=9, window=60 * SECOND, pause=SECOND))
        delivery = self.store.job(job_id).delivery
        told = {"state": S.RETRYING, "reason": "HTTP 500", "retry_in": SECOND, "call": report}
        return self.store.finish(job_id, delivery=delivery, worker="w1", **told)  # type: ignore[arg-type]

    def one(self, name: str, user: str = "u1", definition: str = "report", **more: Any) -> str:
        """A new job that runs on w1, unless `state` says otherwise."""
        job_id = f"{definition}:{user}:{name}"
        self.store.enqueue([Enqueue(job_id, **more)])
        return job_id

    def running(self, name: str, user: str = "u1", worker: str = "w1") -> str:
        job_id = self.one(name, user)
        assert self.start(job_id, worker)
        take(self.client)
        return job_id

    def steps(self) -> list[tuple[str, Callable[[], Any]]]:
        store, clock, planner = self.store, self.clock, self.planner
        old = self.definitions[2]
        run_of = "report:u1:{}".format
        access = store.access
        by: dict[str, Any] = {"actor": ACTOR, "log_size": 100}
        entry = AuditEntry(at_ms=0, kind="refused", action="GET /v1/jobs", address="192.0.2.1", about="wrong secret", request="7")

        def unsubscribe() -> int | str:
            try:
                return store.unsubscribe("u2", "report", actor=ACTOR)
            except UnknownSubscription:
                return "gone"

        def delete(user: str) -> Any:
            try:
                return store.delete_user(user, actor=ACTOR)
            except UnknownUser:
                return "gone"

        return [
            ("another server", lambda: arrive(self.client, clock, "server one")),
            ("a beat", lambda: self.attend("beat 1", "one", None)),
            ("it lives", lambda: (clock.advance(2), self.attend("beat 1", "one", 1))),
            ("a newer one", lambda: (self.attend("beat 2", "two", None), clock.advance(2), self.attend("beat 2", "two", 2))),
            ("the first again", lambda: self.attend("beat 1", "one", 1)),
            ("lead first", lambda: store.lead(horizon=HORIZON, leader="test")),
            ("publish", lambda: [store.publish(published(one), actor=ACTOR, term=1) for one in self.definitions]),
            ("announce", lambda: store.announce(actor=ACTOR)),
            ("users", lambda: (store.create_user("u1", actor=ACTOR), store.create_users([f"u{n}" for n in range(2, 8)], actor=ACTOR))),
            ("subscribe", lambda: [subscribe(store, f"u{n}", "report") for n in range(1, 6)]),
            ("overlap", lambda: subscribe(store, "u1", "single")),
            ("own schedule", lambda: subscribe(store, "u2", "report", schedule=hourly().schedule, own_schedule=True)),
            ("limits", lambda: (store.set_limit("user", Limit(concurrency=2), actor=ACTOR), store.set_options(fairness=True, share=0.05))),
            ("no turns", lambda: (store.set_options(fairness=False, share=0), store.reset_limit("user", actor=ACTOR))),
            (
                "configured",
                lambda: store.configure_limits({"host:a": Limit(concurrency=1), "user": Limit(concurrency=9)}, actor=ACTOR, term=1),
            ),
            ("no more", lambda: store.configure_limits({}, actor=ACTOR, term=1)),
            ("options of a leader", lambda: store.set_options(fairness=True, share=0.1, term=1)),
            ("and of the next", lambda: store.set_options(fairness=False, share=0, term=1)),
            ("lead", lambda: store.lead(horizon=HORIZON, leader="test")),
            ("midnight", lambda: setattr(clock, "now_ms", MIDNIGHT_MS)),
            ("plan", planner.advance),
            ("a minute later", lambda: clock.advance(60)),
            ("plan the rest", planner.advance),
            ("heartbeat", lambda: offer(store, slots=20)),
            ("release", store.release),
            ("heads", lambda: store.heads(list(Priority))),
            ("start all", lambda: [self.start(job.id) for job in store.jobs(states=frozenset({S.QUEUED})).items]),
            ("later", lambda: clock.advance(1)),
            ("finish all", lambda: [self.finish(job.id, S.COMPLETED) for job in store.jobs(states=frozenset({S.RUNNING})).items]),
            ("submit", lambda: store.enqueue([Enqueue(run_of("m1")), Enqueue("single:u2:m2", delay_ms=60_000)])),
            ("take", lambda: [len(self.client.lpop(one, 100) or ()) for one in Priority]),
            ("run", lambda: self.start(run_of("m1"))),
            ("held up", lambda: store.renew(run_of("m1"), delivery=1, worker="w1")),
            ("note", lambda: store.note(run_of("m1"), worker="w1", text="seen")),
            ("try again", lambda: self.finish(run_of("m1"), S.RETRYING)),
            ("a second later", lambda: (clock.advance(1), store.release(), take(self.client))),
            ("run again", lambda: self.start(run_of("m1"))),
            ("fail", lambda: self.finish(run_of("m1"), S.FAILED)),
            ("a late result", lambda: self.finish(run_of("m1"), S.COMPLETED, delivery=1)),
            ("redrive", lambda: store.redrive([run_of("m1")], reason="redriven")),
            ("its process dies", lambda: self.lost(run_of("m1"), most=3)),
            ("and again", lambda: (clock.advance(9), store.release(), self.lost(run_of("m1"), most=2))),
            ("retry", lambda: store.retry(run_of("m1"), reason="retried")),
            ("cancel", lambda: store.cancel(run_of("m1"), reason="not wanted")),
            ("cancel a run", lambda: store.cancel(self.running("m3"), reason="not wanted")),
            ("stops", lambda: store.heartbeat("w1", slots=20, queues=list(Priority), buffer=1)),
            ("stopped", lambda: self.stop_all("w1")),
            ("stuck", lambda: self.lost(self.one("s1"), most=3, stuck=True)),
            ("its stop", lambda: self.stop_all("w1")),
            ("poison", lambda: self.lost(self.one("s2"), most=1)),
            ("another version", lambda: self.start(self.one("v1"), version="another")),
            ("its end", lambda: (take(self.client), self.finish(run_of("v1"), S.COMPLETED))),
            ("garbage", lambda: store.set_aside("high", "no message", reason="not JSON", worker="w1")),
            ("refuse", lambda: self.refuse(self.one("r1"))),
            ("refuse for good", lambda: self.refuse_for_good(run_of("r1"))),
            ("a host is held back", lambda: store.hold_host("a", span=SECOND, why="maintenance", actor=ACTOR)),
            (
                "its jobs wait",
                lambda: (store.publish(replace(published(calling()), host="a"), actor=ACTOR), self.one("b1", "u6", "calling")),
            ),
            ("it is probed", lambda: (clock.advance(1), store.release(), self.start("calling:u6:b1"))),
            ("and is not well", lambda: (take(self.client), self.fail_at_host("calling:u6:b1"))),
            ("it is let go", lambda: store.free_host("a", actor=ACTOR)),
            ("a failure is counted", lambda: (clock.advance(1), store.release(), self.start("calling:u6:b1"), take(self.client))),
            ("and no more", lambda: self.fail_at_host("calling:u6:b1")),
            ("it calls no more", lambda: store.cancel("calling:u6:b1", reason="not wanted")),
            ("die", lambda: self.finish(self.running("m4"), S.TIMED_OUT)),
            ("two that are dead", lambda: (self.finish(self.running("d1"), S.FAILED), self.finish(self.running("d2"), S.FAILED))),
            ("discard both", lambda: store.discard([run_of("d1"), run_of("d2")], actor=ACTOR, subject="u1", detail="")),
            ("discard", lambda: store.discard([run_of("m4")], actor=ACTOR, subject="u1", detail="of no use")),
            ("lost message", lambda: (self.one("m5"), self.client.lpop("medium"), clock.advance(20), store.reclaim(patience=10 * SECOND))),
            ("no slots", lambda: offer(store, slots=0)),
            ("priority", lambda: (self.one("m6", "u3"), store.prioritize("report:u3:m6", Priority.HIGH, reason="given"))),
            ("other priority", lambda: store.publish(published(define("old", priority="high")), actor=ACTOR)),
            ("follow", lambda: (self.one("m7", "u3", "old", priority=None), store.follow_priority("old", Priority.HIGH))),
            ("back", lambda: (store.publish(published(old), actor=ACTOR), store.follow_priority("old", Priority.LOW))),
            ("pause user", lambda: store.pause_user("u3", actor=ACTOR)),
            ("held", lambda: (offer(store), store.release())),
            ("resume user", lambda: store.resume_user("u3", actor=ACTOR)),
            ("pause", lambda: store.pause_definition("old", why="broken", actor=ACTOR)),
            ("resume", lambda: store.resume_definition("old", actor=ACTOR)),
            ("pause subscription", lambda: store.pause_subscription("u4", "report", actor=ACTOR)),
            ("resume subscription", lambda: store.resume_subscription("u4", "report", actor=ACTOR)),
            ("switched off", lambda: subscribe(store, "u3", "report", enabled=False)),
            ("and on", lambda: subscribe(store, "u3", "report", enabled=True, schedule=hourly().schedule, own_schedule=True)),
            ("another schedule", lambda: store.publish(published(hourly("old", priority="low")), actor=ACTOR)),
            ("and the old one", lambda: store.publish(published(old), actor=ACTOR)),
            ("cap", lambda: store.set_limit("user:u5", Limit(concurrency=1), actor=ACTOR)),
            ("capped", lambda: [self.one(f"c{n}", "u5") for n in range(4)]),
            ("uncap", lambda: store.set_limit("user:u5", Limit(concurrency=3), actor=ACTOR)),
            ("trigger", lambda: store.trigger("report", window=timedelta(), actor=ACTOR, idempotency_key="once")),
            ("plan the trigger", planner.advance),
            ("packed", lambda: len(store.jobs(user="u4").items)),
            ("a broken one", lambda: [store.postpone(item, by=60 * SECOND) for item in store.due(clock.now_ms + 10**9)]),
            ("log_level", lambda: store.log_levels.set("worker", "DEBUG", span=timedelta(minutes=1), actor=ACTOR, log_size=100)),
            ("log_level", lambda: store.log_levels.reset("worker", actor=ACTOR, log_size=100)),
            ("drain", lambda: store.drain_worker("w1", actor=ACTOR)),
            ("a drained one lives", lambda: offer(store)),
            ("it is to work again", lambda: store.resume_worker("w1", actor=ACTOR)),
            ("and does", lambda: offer(store)),
            ("a second worker", lambda: (offer(store, "w2"), self.start(run_of("m5"), "w2"))),
            ("it stops", lambda: (self.one("h1"), store.withdraw("w2", [self.tag(run_of("h1")), self.tag(run_of("m5"))]))),
            ("its runs too", lambda: store.withdraw("w2", [self.tag(run_of("m5"))], also_running=True)),
            ("it starts again", lambda: (store.release(), self.start(run_of("m5"), "w2"))),
            ("it has stopped", lambda: store.leave("w2", [self.tag(run_of("h1"))])),
            ("a third", lambda: (offer(store, "w3"), store.release(), self.start(run_of("m5"), "w3"), clock.advance(20), offer(store))),
            ("it is lost", lambda: self.recover("w3")),
            ("it comes back", lambda: self.stop_all("w3")),
            ("another restart", lambda: arrive(self.client, clock, "server two")),
            ("a key is made", lambda: self.make_key(lambda: access.create_key("ci", {"read"}, lifetime=HORIZON, **by))),
            ("it is used", lambda: (clock.advance(1), access.authenticate(self.token))),
            ("it is rotated", lambda: (clock.advance(1), self.make_key(lambda: access.rotate_key("ci", overlap=SECOND, **by)))),
            ("the next is used", lambda: access.authenticate(self.token)),
            ("a wrong one is shown", lambda: access.refuse("192.0.2.1", entry, per_minute=10, log_size=100)),
            ("something is done with it", lambda: access.record(replace(entry, kind="requests"), log_size=100)),
            ("it is revoked", lambda: access.revoke_key("ci", **by)),
            ("unsubscribe", unsubscribe),
            ("delete user", lambda: delete("u4")),
            ("remove", lambda: store.retract("old", actor=ACTOR, term=2)),
            ("it comes again", lambda: (store.publish(published(old), actor=ACTOR, term=2), store.retract("old", actor=ACTOR, term=2))),
            ("nobody plans for days", lambda: (clock.advance(4 * 86_400), planner.advance())),
            ("retention", lambda: store.set_options(fairness=False, share=0, retention=SECOND)),
            ("sweep", lambda: store.sweep(retention=SECOND, dead_retention=SECOND)),
        ]

    def make_key(self, make: Callable[[], tuple[ApiKey, str]]) -> None:
        key, self.token = make()
        assert key.expires_ms == self.clock.now_ms + HORIZON // timedelta(milliseconds=1)

    def lost(self, job_id: str, *, most: int, stuck: bool = False) -> bool:
        assert self.start(job_id)
        take(self.client)
        delivery = self.store.job(job_id).delivery
        return self.store.lose(job_id, delivery=delivery, worker="w1", what="it died", max_losses=most, backoff=SECOND, stuck=stuck)


def hourly(name: str = "hourly", **fields: Any) -> Definition:
    return define(name, interval={"type": "hourly"}, **fields)


def calling() -> Definition:
    return define("calling")


def dump(client: redis.Redis) -> dict[str, Any]:
    """All that there is. Of the change log what it says; the numbers of its entries are the server's own."""
    keys = sorted(cast("list[str]", client.keys("*")))
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.type(key)
    kinds = pipe.execute()
    reads: dict[str, Callable[[str], Any]] = {
        "hash": pipe.hgetall,
        "set": pipe.smembers,
        "list": lambda key: pipe.lrange(key, 0, -1),
        "string": pipe.get,
        "zset": lambda key: pipe.zrange(key, 0, -1, withscores=True),
        "stream": pipe.xrange,
    }
    for key, kind in zip(keys, kinds, strict=True):
        reads[kind](key)
    found = dict(zip(keys, pipe.execute(), strict=True))
    return {key: [row for _, row in value] if kind == "stream" else value for (key, value), kind in zip(found.items(), kinds, strict=True)}


def tell(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, twice: str | None
) -> tuple[list[tuple[str, Any, dict[str, Any]]], list[tuple[str, Any, Any]]]:
    """The story, from an empty database: after each step its name, answer and the database; and each repeated call's two answers."""
    client.flushall()
    answers: list[tuple[str, Any, Any]] = []
    tokens = itertools.count(1)
    run = Scripts.run

    def repeated(self: Scripts, name: str, *args: Any) -> Any:
        first = run(self, name, *args)
        if name != twice:
            answers.append((name, first, None))
            return first
        answers.append((name, first, run(self, name, *args)))
        return answers[-1][2]

    with monkeypatch.context() as patch:
        patch.setattr("taskplatform.store.store.secrets.token_hex", lambda size: f"{next(tokens):0{2 * size}x}")
        patch.setattr("taskplatform.keys.secrets.choice", lambda letters: letters[0])
        patch.setattr(Scripts, "run", repeated)
        story = Story(client, Clock())
        told = [(name, step(), dump(client)) for name, step in story.steps()]
        assert_consistent(client, story.store, complete=False)
    return told, answers


@pytest.fixture(scope="module")
def as_it_is() -> dict[str, Any]:
    """The story told once, kept for all tests of this module."""
    return {}


@pytest.mark.parametrize("verb", names())
def test_every_script_twice_is_the_same_as_once(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, as_it_is: dict[str, Any], verb: str
) -> None:
    if not as_it_is:
        as_it_is["told"], as_it_is["answers"] = tell(client, monkeypatch, None)
    told, answers = tell(client, monkeypatch, verb)
    mine = [(first, second) for name, first, second in answers if name == verb]
    assert mine, f"the story has no {verb}"
    for (step, _, before), (_, _, after) in zip(as_it_is["told"], told, strict=True):
        assert before.keys() == after.keys(), f"{verb} twice in {step!r}"
        other = {key: (before[key], after[key]) for key in before if before[key] != after[key] and key not in OTHER_DATABASE.get(verb, ())}
        assert other == {}, f"{verb} twice in {step!r}"
    other_answers = [pair for pair in mine if pair[0] != pair[1]]
    assert not other_answers or verb in OTHER_ANSWER, f"{verb} answers {other_answers}"
    assert other_answers or verb not in OTHER_ANSWER, f"{verb} answers the same: OTHER_ANSWER needs no reason for it"


def test_the_exceptions_are_scripts() -> None:
    assert OTHER_ANSWER.keys() | OTHER_DATABASE.keys() <= set(names())
