"""Release against its rules: random programs, and a judge that knows no index.

After each step the judge is told what happened. It looks at every job that could go, at the tokens of every limit and at what is in
flight, and says which job had to be next, until nothing can go; then when something can, if nothing else happens. In the end
everything must have ended.

The rates are such that every number of tokens is exact in binary, so that judge and scripts agree to the millisecond.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskplatform.model import BREAKER_LONGEST_PAUSE, BREAKER_PROBES, BREAKER_TURN_MS, BreakerRule, CallReport, JobState, Limit, Priority
from taskplatform.planner import published
from taskplatform.store import Renewal, Store
from taskplatform.store.keys import key
from tests.conftest import Clock
from tests.integration.harness import ACTOR, NAMESPACE, arrive, assert_consistent, assert_idle, define, enqueue, offer, queue, recover, take

S = JobState
HOSTS = {"high_a": "north", "high_b": "south", "medium_a": "north", "low_a": "north", "low_b": ""}
USERS = ("ann", "bob")
BACKOFF = timedelta(seconds=1)
SILENCE = timedelta(seconds=15)
NO_PATIENCE = timedelta(days=1)
#: Per second; each is a power of two per millisecond.
RATES = (1000 / 128, 1000 / 512, 1000 / 2048)


#: No number of calls opens a breaker here: they are opened by hand, and by probes that fail. test_breakers.py has the counting.
RULE = BreakerRule(share=1.0, calls=1_000_000, window=timedelta(seconds=10), pause=timedelta(milliseconds=500))


@dataclass
class Held:
    """A host that is held back."""

    ends_ms: int
    openings: int = 0
    """0: it asked for a pause, and no breaker is open."""
    passed: int = 0
    probe: str = ""
    tried: set[str] = field(default_factory=set)
    """Definitions whose probes failed, since all had their turn."""
    others_ms: int = 0
    """Until when only others may go."""

    def hold(self, ends_ms: int) -> None:
        self.ends_ms, self.others_ms, self.passed = ends_ms, ends_ms + BREAKER_TURN_MS, 0


@dataclass
class Waiting:
    """A job that waits, and its place."""

    job_id: str
    priority: Priority
    after_ms: int
    number: int
    """Order of submission, or of the decision to run it again."""

    @property
    def definition(self) -> str:
        return self.job_id.split(":")[0]

    @property
    def user(self) -> str:
        return self.job_id.split(":")[1]


@dataclass
class Bucket:
    """Tokens of a rate at an instant."""

    at_ms: int
    level: float


@dataclass
class Judge:
    """The rules, without any index."""

    waiting: dict[str, Waiting] = field(default_factory=dict)
    queues: dict[Priority, list[str]] = field(default_factory=lambda: {priority: [] for priority in Priority})
    taken: list[tuple[str, int]] = field(default_factory=list)
    """Messages that a worker took and has not started: (job, delivery)."""
    running: list[tuple[str, int]] = field(default_factory=list)
    places: dict[str, Waiting] = field(default_factory=dict)
    """What each job that is queued or runs had for a place."""
    layers: dict[str, dict[str, Limit]] = field(default_factory=lambda: {"configured": {}, "live": {}})
    buckets: dict[str, Bucket] = field(default_factory=dict)
    starts: dict[str, list[int]] = field(default_factory=dict)
    """When jobs under a rate started since it is as it is."""
    paused: set[str] = field(default_factory=set)
    held: dict[str, Held] = field(default_factory=dict)
    """Hosts that are held back."""
    hosts: dict[str, str] = field(default_factory=lambda: dict(HOSTS))
    depth: int = 0
    served: frozenset[Priority] = frozenset(Priority)
    """The queues that the worker serves."""
    number: int = 0

    # what is in force

    @property
    def limits(self) -> dict[str, Limit]:
        return {**self.layers["configured"], **self.layers["live"]}

    def names(self, job_id: str) -> tuple[str, ...]:
        definition, user, _ = job_id.split(":")
        host = self.hosts[definition]
        return ("total", f"definition:{definition}", *([f"host:{host}"] if host else []), f"user:{user}")

    def rates(self, job_id: str) -> Iterator[tuple[str, Limit]]:
        for name in self.names(job_id):
            limit = self.limits.get(name)
            if limit is not None and limit.per_second is not None:
                yield name, limit

    @property
    def queued(self) -> list[str]:
        return [job_id for ids in self.queues.values() for job_id in ids] + [job_id for job_id, _ in self.taken]

    def in_flight(self, name: str) -> int:
        return sum(name in self.names(job_id) for job_id in [*self.queued, *(job_id for job_id, _ in self.running)])

    def level(self, name: str, now_ms: int) -> float:
        limit, bucket = self.limits[name], self.buckets[name]
        assert limit.per_second is not None
        return min(limit.capacity, bucket.level + max(0, now_ms - bucket.at_ms) * limit.per_second / 1000)

    def set_limit(self, name: str, limit: Limit | None, layer: str, now_ms: int) -> None:
        before = self.limits.get(name)
        level = self.level(name, now_ms) if name in self.buckets else None
        if limit is None:
            self.layers[layer].pop(name, None)
        else:
            self.layers[layer][name] = limit
        after = self.limits.get(name)
        if before == after:
            return
        self.starts[name] = []
        self.buckets.pop(name, None)
        if after is not None and after.per_second is not None:
            full = after.capacity
            self.buckets[name] = Bucket(now_ms, full if level is None else min(full, level))

    # who may go

    def wait_ms(self, job: Waiting, now_ms: int) -> float:
        """In how many ms the job could go if nothing else happened; inf: only after something happened."""
        if {job.definition, job.user} & self.paused:
            return math.inf
        wait = float(max(0, job.after_ms - now_ms))
        held = self.held.get(self.hosts[job.definition])
        if held is not None:
            if held.ends_ms <= now_ms and held.probe:
                return math.inf
            wait = max(wait, (held.others_ms if job.definition in held.tried else held.ends_ms) - now_ms)
        for name in self.names(job.job_id):
            limit = self.limits.get(name, self.limits.get("user") if name.startswith("user:") else None)
            if limit is not None and limit.concurrency is not None and self.in_flight(name) >= limit.concurrency:
                return math.inf
        for name, limit in self.rates(job.job_id):
            needed = self.needed(name)
            if needed > limit.capacity:
                return math.inf
            assert limit.per_second is not None
            wait = max(wait, (needed - self.level(name, now_ms)) / (limit.per_second / 1000))
        return wait

    def room(self, priority: Priority) -> bool:
        order = list(Priority)
        before = sum(len(self._of_queue(other)) for other in self.served if order.index(other) <= order.index(priority))
        return priority in self.served and before < self.depth

    def _of_queue(self, priority: Priority) -> list[str]:
        return self.queues[priority] + [job_id for job_id, _ in self.taken if self.places[job_id].priority is priority]

    def able(self, priority: Priority, now_ms: int) -> list[Waiting]:
        if not self.room(priority):
            return []
        return [job for job in self.waiting.values() if job.priority is priority and self.wait_ms(job, now_ms) <= 0]

    def next_ms(self, now_ms: int, aside: set[str]) -> float:
        """In how many ms something that is not set aside could go if nothing else happened."""
        jobs = [job for job in self.waiting.values() if job.job_id not in aside and self.room(job.priority)]
        return min((self.wait_ms(job, now_ms) for job in jobs), default=math.inf)

    def accept(self, found: dict[Priority, list[str]], aside: set[str], now_ms: int, *, in_order: bool = True) -> None:
        """Take over what was released, and complain of what should not have been, or not yet.

        `aside`: what is still set aside for a user's cap. It may be passed by for a while when what came back before it cannot go.
        """
        self.end_probes()
        for priority in Priority:
            known = self.queues[priority]
            assert found[priority][: len(known)] == known
            for job_id in found[priority][len(known) :]:
                able = self.able(priority, now_ms)
                assert job_id in {job.job_id for job in able}, f"{job_id} may not go"
                if in_order:
                    self._check_first(self.waiting[job_id], [job for job in able if job.job_id not in aside])
                self.places[job_id] = self.waiting.pop(job_id)
                known.append(job_id)
                held = self.held.get(self.hosts[job_id.split(":")[0]])
                if held is not None:
                    held.probe = job_id
                    if job_id.split(":")[0] in held.tried:
                        held.tried = set()

    def _check_first(self, job: Waiting, able: list[Waiting]) -> None:
        first = min(able, key=lambda one: (one.after_ms, one.number))
        host = self.hosts[job.definition]
        # of the same instant, definitions on one limited or held host go in any order, each in its own
        if (
            host
            and (f"host:{host}" in self.limits or host in self.held)
            and job.after_ms == first.after_ms
            and host == self.hosts[first.definition]
        ):
            first = min((one for one in able if one.definition == job.definition), key=lambda one: (one.after_ms, one.number))
        assert job is first, f"{job.job_id} went before {first.job_id}"

    # what happens to jobs

    def wait(self, job_id: str, priority: Priority, after_ms: int) -> None:
        self.number += 1
        self.waiting[job_id] = Waiting(job_id, priority, after_ms, self.number)

    def start(self, job_id: str, delivery: int, now_ms: int) -> bool:
        """Whether it may; without a token it goes back to its place."""
        self.taken.remove((job_id, delivery))
        short = any(self.level(name, now_ms) < limit.tokens_per_start for name, limit in self.rates(job_id))
        if self.places[job_id].after_ms > now_ms or self.kept_back(job_id, now_ms) or short:
            self.waiting[job_id] = self.places[job_id]
            return False
        self._spend(job_id, now_ms)
        self.running.append((job_id, delivery))
        return True

    def renew(self, job_id: str, delivery: int, now_ms: int) -> bool:
        """Whether a run that was held up may still call: it needs another token, and goes back to its place without."""
        enough = all(self.level(name, now_ms) >= limit.tokens_per_start for name, limit in self.rates(job_id))
        if not self.kept_back(job_id, now_ms) and enough:
            self._spend(job_id, now_ms)
            return True
        self.running.remove((job_id, delivery))
        self.waiting[job_id] = self.places[job_id]
        return False

    # hosts

    def kept_back(self, job_id: str, now_ms: int) -> bool:
        """Whether a job that was released may not call its host. The first that may is its probe."""
        held = self.held.get(self.hosts[job_id.split(":")[0]])
        if held is None:
            return False
        if now_ms < held.ends_ms or (held.probe != job_id and held.probe in {one for one, _ in self.running}):
            return True
        held.probe = job_id
        return False

    def end_probes(self) -> None:
        """Who is not in flight any more does not probe."""
        flying = {*self.queued, *(job_id for job_id, _ in self.running)}
        for held in self.held.values():
            held.probe = held.probe if held.probe in flying else ""

    def hold(self, host: str, span_ms: int, now_ms: int) -> None:
        """The breaker opens."""
        held = self.held.setdefault(host, Held(0))
        held.openings += 1
        held.hold(now_ms + span_ms)

    def report(self, job_id: str, now_ms: int, *, failed: bool, pause_ms: int) -> None:
        """A call ended."""
        host = self.hosts[job_id.split(":")[0]]
        held = self.held.get(host)
        if not host:
            return
        if held is None:
            if pause_ms:
                self.held[host] = Held(0)
                self.held[host].hold(now_ms + pause_ms)
        elif held.probe != job_id or now_ms < held.ends_ms:
            # it began before
            if now_ms + pause_ms > held.ends_ms and pause_ms:
                held.hold(now_ms + pause_ms)
        elif failed and pause_ms and not held.openings:
            held.tried.add(job_id.split(":")[0])
            held.hold(now_ms + pause_ms)
        elif failed:
            held.tried.add(job_id.split(":")[0])
            self.hold(host, max(pause_ms, 500 * min(BREAKER_LONGEST_PAUSE, 2**held.openings)), now_ms)
        else:
            held.passed, held.others_ms = held.passed + 1, now_ms + BREAKER_TURN_MS
            if held.passed >= (BREAKER_PROBES if held.openings else 1):
                del self.held[host]

    def needed(self, name: str) -> float:
        """How many tokens there must be for one more, beside those of released jobs that have not started."""
        return (sum(name in self.names(job_id) for job_id in self.queued) + 1) * self.limits[name].tokens_per_start

    def _spend(self, job_id: str, now_ms: int) -> None:
        for name, limit in self.rates(job_id):
            self.buckets[name] = Bucket(now_ms, self.level(name, now_ms) - limit.tokens_per_start)
            self.starts.setdefault(name, []).append(now_ms)

    def again(self, job_id: str, after_ms: int) -> None:
        """It runs again; with a later time it goes behind those who have it already."""
        job = self.places[job_id]
        if after_ms > job.after_ms:
            self.wait(job_id, job.priority, after_ms)
        else:
            self.waiting[job_id] = Waiting(job_id, job.priority, after_ms, job.number)

    def check_limits(self) -> None:
        """Independent of the buckets: no window holds more starts than rate × t + burst, and nothing exceeds its concurrency."""
        for name, limit in self.limits.items():
            times = self.starts.get(name, [])
            if limit.per_second is not None and times:
                assert limit.burst is not None
                for first, at_ms in enumerate(times):
                    most = limit.per_second * (times[-1] - at_ms) / 1000 + limit.burst
                    assert len(times) - first <= most + 1e-9, f"{name}: {len(times) - first} starts in {times[-1] - at_ms} ms"


LIMIT = st.one_of(
    st.builds(Limit, st.sampled_from(RATES), st.integers(1, 4)),
    st.builds(Limit, st.sampled_from(RATES), st.integers(1, 4), st.integers(1, 3)),
    st.builds(Limit, st.none(), st.none(), st.integers(1, 3)),
    st.just(Limit()),
    st.none(),
)
CAP = st.one_of(st.builds(Limit, st.none(), st.none(), st.integers(1, 2)), st.none())
RATE = st.one_of(st.builds(Limit, st.sampled_from(RATES), st.integers(1, 4)), st.none())
NAMED_LIMIT = st.one_of(
    st.tuples(st.just("total"), RATE),
    st.tuples(st.sampled_from(["definition:high_a", "definition:low_a"]), LIMIT),
    st.tuples(st.sampled_from(["host:north", "host:south"]), LIMIT),
    st.tuples(st.sampled_from(["user", "user:ann"]), CAP),
)
DEFINITION = st.sampled_from(sorted(HOSTS))
SUBMIT = st.tuples(
    st.just("submit"),
    DEFINITION,
    st.sampled_from(USERS),
    st.sampled_from([0, 0, 0, 1, 250, 3000]),
    st.sampled_from([None, None, Priority.HIGH]),
)
WAIT = st.tuples(st.just("wait"), st.sampled_from([1, 99, 128, 500, 512, 1024, 5000]))
NUMBER = st.integers(0, 50)
STEP = st.one_of(
    SUBMIT,
    SUBMIT,
    SUBMIT,
    WAIT,
    WAIT,
    *[st.tuples(st.just(what)) for what in ("take", "run", "run", "run")],
    *[st.tuples(st.just(what), NUMBER) for what in ("start", "start", "finish", "finish", "retry", "renew", "cancel", "raise")],
    st.tuples(st.just("limit"), NAMED_LIMIT, st.sampled_from(["live", "configured"])),
    st.tuples(st.just("limit"), NAMED_LIMIT, st.just("live")),
    st.tuples(st.just("pause"), st.sampled_from([*sorted(HOSTS), *USERS])),
    st.tuples(st.just("resume"), st.sampled_from([*sorted(HOSTS), *USERS])),
    st.tuples(st.just("slots"), st.integers(0, 4)),
    st.tuples(st.just("serve"), st.sets(st.sampled_from(sorted(Priority)), min_size=1)),
    st.tuples(st.just("serve"), st.just(set(Priority))),
    st.tuples(st.just("leave"), st.booleans()),
    st.tuples(st.just("turns"), st.booleans()),
    *[st.tuples(st.just("hold"), st.sampled_from(["north", "south"]), st.sampled_from([1, 300, 2000])) for _ in range(2)],
    st.tuples(st.just("free"), st.sampled_from(["north", "south"])),
    st.tuples(st.just("fail"), NUMBER, st.sampled_from([0, 0, 100, 1500])),
    st.tuples(st.just("move"), DEFINITION, st.sampled_from(["north", "south", ""])),
    st.tuples(st.just("lose worker")),
    st.tuples(st.just("lose message")),
    st.tuples(st.just("other server")),
)


class Program:
    """Does each step to the store, and tells the judge."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        client.flushall()
        self.client, self.store, self.clock = client, store, clock
        self.judge = Judge(depth=2)
        self.every: list[str] = []
        self.servers = 0
        self.fair = False
        self._before: Counter[str] = Counter()
        for name in HOSTS:
            self.publish(name)
        store.create_users(USERS, actor=ACTOR)
        offer(store, slots=2)

    def publish(self, name: str) -> None:
        made = published(define(name, priority=name.split("_")[0]))
        self.store.publish(replace(made, host=self.judge.hosts[name]), actor=ACTOR)

    def do(self, what: str, *args: Any) -> None:
        getattr(self, f"_{what.replace(' ', '_')}")(*args)
        self._settle(in_order=not self.fair and what not in ("limit", "resume", "turns"))

    def _settle(self, *, in_order: bool = True) -> None:
        """Let go what may, and hold what went against the rules, and the hint when to look again."""
        released, hint = self.store.release(limit=1000)
        now_ms, judge = self.clock.now_ms, self.judge
        judge.accept(self._found(), self._aside(), now_ms, in_order=in_order)
        for _ in HOSTS:
            aside = self._aside()
            left = {job.job_id for priority in Priority for job in judge.able(priority, now_ms)}
            assert left <= aside, f"could go and was not released: {left - aside}"
            if released:
                released, hint = self.store.release(limit=1000)
            assert released == 0
            assert hint is None or hint > 0, "nothing can go now, and the hint says that something can"
            next_ms = judge.next_ms(now_ms, aside)
            assert hint is not None or next_ms == math.inf, f"something can go in {next_ms} ms, and there is no hint"
            assert hint is None or hint <= math.ceil(min(next_ms, 1e15)), f"something can go in {next_ms} ms, the hint is {hint}"
            if not aside or judge.next_ms(now_ms, set()) == math.inf:
                break
            # what was set aside for a user's cap comes back by the guardian, if what came back before it cannot go
            self.store.reclaim(patience=NO_PATIENCE)
            released, hint = self.store.release(limit=1000)
            judge.accept(self._found(), self._aside(), now_ms, in_order=False)
        assert not any(judge.able(priority, now_ms) for priority in Priority)
        for name, limit in judge.limits.items():
            if limit.concurrency is not None and name.startswith(("definition:", "host:")):
                assert judge.in_flight(name) <= max(limit.concurrency, self._before.get(name, 0)), f"{name} is exceeded"
        self._before = self._in_flight()

    def _in_flight(self) -> Counter[str]:
        """Under each name. A concurrency that was lowered is kept to by what follows."""
        return Counter(
            name for job_id in [*self.judge.queued, *(one for one, _ in self.judge.running)] for name in self.judge.names(job_id)
        )

    def _found(self) -> dict[Priority, list[str]]:
        return {priority: [message.job_id for message in queue(self.client, priority)] for priority in Priority}

    def _aside(self) -> set[str]:
        keys = list(self.client.scan_iter(key(NAMESPACE, "capped", "*")))
        return {member[12:] for name in keys for member in cast("list[str]", self.client.zrange(name, 0, -1))}

    # steps

    def _submit(self, definition: str, user: str, delay_ms: int, priority: Priority | None) -> None:
        job_id = enqueue(self.store, definition, user, f"m{len(self.every)}", delay_ms=delay_ms, priority=priority)
        self.every.append(job_id)
        self.judge.wait(job_id, priority or Priority(definition.split("_")[0]), self.clock.now_ms + delay_ms)

    def _wait(self, ms: int) -> None:
        self.clock.now_ms += ms
        self._offer()

    def _offer(self) -> None:
        offer(self.store, slots=self.judge.depth, queues=sorted(self.judge.served))

    def _serve(self, priorities: set[Priority]) -> None:
        self.judge.served = frozenset(priorities)
        self._offer()

    def _leave(self, tell: bool) -> None:
        """The worker stops and another comes; what it had taken, it may have put back into its queue without a word."""
        self.store.leave("w1", [f"{job_id}#{delivery}" for job_id, delivery in self.judge.taken] if tell else [])
        for job_id, _ in [*self.judge.running, *(self.judge.taken if tell else [])]:
            self.judge.waiting[job_id] = self.judge.places[job_id]
        self.judge.running.clear()
        if tell:
            self.judge.taken.clear()
        self._offer()

    def _take(self) -> None:
        """A worker takes a message, and is held up before it starts the job."""
        filled = [priority for priority in Priority if self.judge.queues[priority] and priority in self.judge.served]
        if filled:
            message = take(self.client, filled[0])
            assert message.job_id == self.judge.queues[filled[0]].pop(0)
            self.judge.taken.append((message.job_id, message.delivery))

    def _start(self, number: int) -> None:
        if self.judge.taken:
            job_id, delivery = self.judge.taken[number % len(self.judge.taken)]
            go = self.store.start(job_id, delivery=delivery, worker="w1").go
            assert go == self.judge.start(job_id, delivery, self.clock.now_ms), f"{job_id} {'started' if go else 'did not start'}"
            self.judge.check_limits()

    def _renew(self, number: int) -> None:
        if self.judge.running:
            job_id, delivery = self.judge.running[number % len(self.judge.running)]
            go = self.store.renew(job_id, delivery=delivery, worker="w1") is not Renewal.NEVER
            assert go == self.judge.renew(job_id, delivery, self.clock.now_ms), f"{job_id} {'goes on' if go else 'went back'}"
            self.judge.check_limits()

    def _run(self) -> None:
        self._take()
        self._start(len(self.judge.taken) - 1)

    def _end(self, number: int, state: S, retry_in: timedelta | None = None, *, failed: bool = False, pause_ms: int = 0) -> str | None:
        if not self.judge.running:
            return None
        job_id, delivery = self.judge.running.pop(number % len(self.judge.running))
        host = self.judge.hosts[job_id.split(":")[0]]
        call = CallReport(host, failed, RULE, timedelta(milliseconds=pause_ms))
        assert self.store.finish(job_id, delivery=delivery, worker="w1", state=state, reason="test", retry_in=retry_in, call=call)
        self.judge.report(job_id, self.clock.now_ms, failed=failed, pause_ms=pause_ms)
        return job_id

    def _fail(self, number: int, pause_ms: int) -> None:
        """The target answers 503, and may ask for a pause."""
        job_id = self._end(number, S.RETRYING, timedelta(seconds=number % 3), failed=True, pause_ms=pause_ms)
        if job_id is not None:
            self.judge.again(job_id, self.clock.now_ms + number % 3 * 1000)

    def _hold(self, host: str, span_ms: int) -> None:
        self.store.hold_host(host, span=timedelta(milliseconds=span_ms), why="test", actor=ACTOR)
        self.judge.hold(host, span_ms, self.clock.now_ms)

    def _free(self, host: str) -> None:
        assert self.store.free_host(host, actor=ACTOR) == (self.judge.held.pop(host, None) is not None)

    def _finish(self, number: int) -> None:
        self._end(number, S.COMPLETED)

    def _retry(self, number: int) -> None:
        job_id = self._end(number, S.RETRYING, timedelta(seconds=number % 3))
        if job_id is not None:
            self.judge.again(job_id, self.clock.now_ms + number % 3 * 1000)

    def _cancel(self, number: int) -> None:
        if not self.every:
            return
        job_id = self.every[number % len(self.every)]
        self.store.cancel(job_id, reason="not wanted")
        self.judge.waiting.pop(job_id, None)
        for listed in (self.judge.taken, self.judge.running):
            listed[:] = [one for one in listed if one[0] != job_id]
        for priority, ids in self.judge.queues.items():
            if job_id in ids:
                # its message stays and will be refused; here it is taken out, so that the judge need not know
                position = ids.index(job_id)
                ids.remove(job_id)
                self.client.lrem(priority, 1, queue(self.client, priority)[position].raw)

    def _raise(self, number: int) -> None:
        if self.judge.waiting:
            job = sorted(self.judge.waiting.values(), key=lambda one: one.number)[number % len(self.judge.waiting)]
            job.priority = list(Priority)[number % 3]
            self.store.prioritize(job.job_id, job.priority, reason="test")

    def _limit(self, named: tuple[str, Limit | None], layer: str) -> None:
        name, limit = named
        if limit is None:
            self.store.reset_limit(name, actor=ACTOR, configured=layer == "configured")
        else:
            self.store.set_limit(name, limit, actor=ACTOR, configured=layer == "configured")
        self.judge.set_limit(name, limit, layer, self.clock.now_ms)

    def _pause(self, which: str) -> None:
        if which in HOSTS:
            self.store.pause_definition(which, why="test", actor=ACTOR)
        else:
            self.store.pause_user(which, actor=ACTOR)
        self.judge.paused.add(which)

    def _resume(self, which: str) -> None:
        if which in HOSTS:
            self.store.resume_definition(which, actor=ACTOR)
        else:
            self.store.resume_user(which, actor=ACTOR)
        self.judge.paused.discard(which)

    def _slots(self, slots: int) -> None:
        self.judge.depth = slots
        self._offer()

    def _turns(self, fair: bool) -> None:
        """With turns for the users there is another order; all else is the same."""
        self.fair = fair
        self.store.set_options(fairness=fair, share=0)

    def _move(self, definition: str, host: str) -> None:
        held = self.judge.held.get(self.judge.hosts[definition])
        if held is not None and host != self.judge.hosts[definition] and held.probe.startswith(f"{definition}:"):
            # it does not probe its old host any more
            held.probe = ""
        self.judge.hosts[definition] = host
        self.publish(definition)
        # what is published has no limit of its own
        self.judge.set_limit(f"definition:{definition}", None, "configured", self.clock.now_ms)
        self._before = self._in_flight()
        # what started before under another host is no matter of this one's limit
        self.judge.starts.clear()

    def _lose_worker(self) -> None:
        self.clock.now_ms += 20_000
        while recover(self.store, SILENCE, max_losses=100, backoff=BACKOFF):
            pass
        lost = [(self._field(job_id, "seq"), job_id) for job_id, _ in self.judge.running]
        # a worker's jobs are a set: they are taken from it in any order
        for _, job_id in sorted(lost):
            self.judge.again(job_id, self.clock.now_ms + 1000 * 2 ** (self._field(job_id, "losses") - 1))
        self.judge.running.clear()
        self._offer()

    def _field(self, job_id: str, name: str) -> int:
        return int(self.client.hget(key(NAMESPACE, "job", job_id), name) or 0)

    def _lose_message(self) -> None:
        """A worker process died with what it had taken. And what lies in a queue is waited for no longer where it is to probe a host."""
        self.clock.now_ms += 1000
        self.store.reclaim(patience=timedelta(0))
        for job_id, _ in self.judge.taken:
            self.judge.waiting[job_id] = self.judge.places[job_id]
        self.judge.taken.clear()
        lying = {job_id for ids in self.judge.queues.values() for job_id in ids}
        for held in self.judge.held.values():
            held.probe = "" if held.probe in lying else held.probe

    def _other_server(self) -> None:
        """One that may not know the last starts: all rates begin without a token."""
        self.servers += 1
        arrive(self.client, self.clock, f"run{self.servers}")
        for name in self.judge.buckets:
            self.judge.buckets[name] = Bucket(self.clock.now_ms, min(0.0, self.judge.level(name, self.clock.now_ms)))

    def starve(self, failing: str, served: set[Priority]) -> None:
        """The hosts are probed while nobody serves some of the queues, and all calls of one definition fail: all else must end."""
        for which in sorted(self.judge.paused):
            self.do("resume", which)
        # what lies in a queue that nobody serves has its places in the limits
        for layer in ("live", "configured"):
            for name in sorted(self.judge.layers[layer]):
                self.do("limit", (name, None), layer)
        self.do("serve", set(Priority))
        self.do("slots", 3)
        for host in ("north", "south"):
            self.do("hold", host, 1)
        self.do("wait", 1)
        # who is in those queues may be a probe
        order = sorted(HOSTS, key=lambda name: name.split("_")[0] in served)
        for name in order:
            if name == next((one for one in order if one.split("_")[0] in served), None):
                self.do("serve", served)
            for user in USERS:
                self.do("submit", name, user, 0, None)
        judge = self.judge

        def left() -> set[str]:
            places = [*judge.waiting.values(), *(judge.places[job_id] for job_id in [*judge.queued, *(one for one, _ in judge.running)])]
            return {one.job_id for one in places if one.priority in judge.served and one.definition != failing}

        for number in range(20 * len(self.every) + 50):
            if not left():
                return
            if number % 3 == 2:
                # somebody looks now and then whether a probe still lies where nobody takes it
                self.do("lose message")
            while judge.running or judge.taken or any(judge.queues[priority] for priority in judge.served):
                while judge.running:
                    if judge.running[0][0].startswith(f"{failing}:"):
                        self.do("fail", int(len(judge.running) == 1), 0)
                    else:
                        self.do("finish", 0)
                self.do(*(("run",) if any(judge.queues[priority] for priority in judge.served) else ("start", 0)))
            wait_ms = judge.next_ms(self.clock.now_ms, set())
            self.do("wait", 1000 if wait_ms == math.inf else max(1, math.ceil(wait_ms)))
        raise AssertionError(f"these do not end: {left()}")

    def drain(self) -> None:
        """Lift all pauses, and run everything until nothing is left."""
        for which in sorted(self.judge.paused):
            self.do("resume", which)
        self.do("serve", set(Priority))
        self.do("slots", 3)
        for _ in range(10 * len(self.every) + 20):
            judge = self.judge
            if not (judge.waiting or judge.queued or judge.running):
                break
            while judge.running:
                self.do("finish", 0)
            while judge.taken or any(judge.queues.values()):
                self.do(*(("run",) if any(judge.queues.values()) else ("start", 0)))
                while judge.running:
                    self.do("finish", 0)
            wait_ms = judge.next_ms(self.clock.now_ms, set())
            if judge.waiting:
                assert wait_ms < math.inf, f"nothing will ever let go {sorted(judge.waiting)}"
                self.do("wait", math.ceil(wait_ms))
        assert {self.store.job(job_id).state for job_id in self.every} <= {S.COMPLETED, S.CANCELED}
        assert_idle(self.client)


@settings(deadline=None, database=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=40, max_size=60), failing=DEFINITION, served=st.sets(st.sampled_from(sorted(Priority)), min_size=1))
def test_release_keeps_to_the_rules(
    client: redis.Redis, store: Store, clock: Clock, steps: list[tuple[Any, ...]], failing: str, served: set[Priority]
) -> None:
    program = Program(client, store, clock)
    for step in steps:
        program.do(*step)
    assert_consistent(client, store)
    program.starve(failing, served)
    program.drain()
    assert_consistent(client, store)
