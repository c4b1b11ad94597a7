"""What the tests of the store share: definitions to publish, a worker's hands, and `assert_consistent`.

`assert_consistent` reads the whole database, key by key, and holds every structure against all others. It knows the layout
of `store.keys` on its own, so that a script which forgets one of its indexes is found after any step of any test.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import pytest
import redis

from taskplatform.model import TRANSITIONS, Definition, JobState, Priority, Transition, slot
from taskplatform.planner import published
from taskplatform.store import Enqueue, Store, Subscribe, SubscribeResult
from taskplatform.store.keys import NAMES, UNACKED, UNACKED_INDEX
from taskplatform.store.records import read_limit
from taskplatform.store.scripts import Clock, Scripts

NAMESPACE = "tp"
HORIZON = timedelta(seconds=5)
ACTOR = "test"
WAITING = (JobState.PENDING, JobState.RETRYING)

# how lib.lua says that a lane is blocked until something starts or ends, or stands in the line of its host
EVENT, GATED = 8e15, 9e15


def define(name: str = "report", **fields: Any) -> Definition:
    """A definition; daily at midnight UTC unless `fields` say otherwise."""
    if "interval" not in fields and "cron" not in fields:
        fields["interval"] = {"type": "daily"}
    return Definition.model_validate({"id": name, "name": name, "call": "tasks.inputs:anything", **fields})


def publish(store: Store, *definitions: Definition) -> None:
    """Tell the scripts of them, as the leading planner does."""
    for definition in definitions:
        store.publish(published(definition), actor=ACTOR)


def subscribe(store: Store, user: str, definition: str, *, horizon: timedelta = HORIZON, **changes: Any) -> SubscribeResult:
    """One subscription, made or changed."""
    return store.subscribe([Subscribe(user, definition, **changes)], horizon=horizon, actor=ACTOR)[0]


def enqueue(store: Store, definition: str = "report", user: str = "u1", name: str = "m1", **fields: Any) -> str:
    """The id of a new job made by hand."""
    job_id = f"{definition}:{user}:{name}"
    assert store.enqueue([Enqueue(job_id, **fields)]) == [True]
    return job_id


def offer(store: Store, worker: str = "w1", slots: int = 10, queues: Iterable[str] = tuple(Priority)) -> None:
    """A worker's heartbeat."""
    store.heartbeat(worker, slots=slots, queues=list(queues), buffer=1)


def recover(
    store: Store, silence: timedelta, *, max_losses: int = 3, backoff: timedelta = timedelta(seconds=1), limit: int = 500
) -> list[tuple[str, str]]:
    """What an observer does who saw each heartbeat when it was made: of the first worker that is lost, as much as the limit says."""
    for worker, at_ms in sorted(store.heartbeats().items()):
        if store.now_ms() - at_ms > silence / timedelta(milliseconds=1):
            how = f"silent for {silence.total_seconds():g}s"
            return store.recover(worker, seen_ms=at_ms, how=how, max_losses=max_losses, backoff=backoff, limit=limit)
    return []


def count_pipelines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many commands each pipeline has that is sent from now on."""
    sent: list[int] = []
    execute = redis.client.Pipeline.execute

    def counted(self: Any, raise_on_error: bool = True) -> list[Any]:
        sent.append(len(self.command_stack))
        return list(execute(self, raise_on_error))

    monkeypatch.setattr(redis.client.Pipeline, "execute", counted)
    return sent


def arrive(client: redis.Redis, clock: Clock, run_id: str) -> bool:
    """What a new connection does, with the run id that its server gives. Whether that is another server than before."""
    return bool(Scripts(client, NAMESPACE, clock).run("arrive", run_id))


@dataclass(frozen=True, slots=True)
class Message:
    """What a worker must know of a message in a queue."""

    job_id: str
    delivery: int
    user: str
    raw: str


def _message(raw: str) -> Message:
    content = json.loads(raw)
    headers = content["headers"]
    return Message(headers["id"], headers["delivery"], json.loads(content["body"])[1]["user"], raw)


def queue(client: redis.Redis, priority: str) -> list[Message]:
    """What waits in a broker queue, the first to go first."""
    return [_message(raw) for raw in reversed(cast("list[str]", client.lrange(priority, 0, -1)))]


def take(client: redis.Redis, *priorities: str) -> Message:
    """The message that a worker of these queues gets next. Raises LookupError where there is none."""
    for priority in priorities or tuple(Priority):
        raw = cast("str | None", client.rpop(priority))
        if raw is not None:
            return _message(raw)
    raise LookupError("no message in any queue")


# --- the checker -----------------------------------------------------------------------------------------------------


def check_history(history: list[Transition], *, clock_set_back: bool = False) -> None:
    """That a job's history is complete and follows the table."""
    assert history[0].from_state is None
    assert history[0].to_state is JobState.PENDING
    before = None
    for number, line in enumerate(history):
        if "dropped" in line.detail:
            # it stands for lines that nobody can check any more
            assert line.from_state is line.to_state
            before = line.to_state
            continue
        assert line.from_state is before, f"line {number} goes on from {line.from_state}, the last one led to {before}"
        assert line.reason, f"line {number} gives no reason"
        note = number > 0 and line.to_state is line.from_state
        assert note or line.to_state in TRANSITIONS[line.from_state], f"line {number}: {line.from_state} -> {line.to_state}"
        if line.to_state in (JobState.ASSIGNED, JobState.RUNNING):
            assert line.worker
        if number:
            last = history[number - 1]
            assert clock_set_back or line.at_ms >= last.at_ms, f"line {number} lies before the last one"
            started = line.to_state is JobState.ASSIGNED and not note
            assert line.attempt == last.attempt + started, f"line {number}: attempt {line.attempt} after {last.attempt}"
        before = line.to_state


class _Database:
    """All keys of the namespace, read at once."""

    def __init__(self, client: redis.Redis) -> None:
        self._prefixes = {f"{NAMESPACE}:{part}": name for name, part in NAMES.items()}
        self.found: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
        names = sorted(cast("list[str]", list(client.scan_iter(count=1000))))
        pipe = client.pipeline(transaction=True)
        for each in names:
            pipe.type(each)
        kinds = pipe.execute()
        reads = {"hash": pipe.hgetall, "set": pipe.smembers, "list": lambda k: pipe.lrange(k, 0, -1), "string": pipe.get}
        for each, kind in zip(names, kinds, strict=True):
            if kind == "zset":
                pipe.zrange(each, 0, -1, withscores=True)
            elif kind == "stream":
                pipe.xlen(each)
            else:
                reads[kind](each)
        for each, kind, value in zip(names, kinds, pipe.execute(), strict=True):
            self._keep(each, dict(value) if kind == "zset" else value)

    def _keep(self, name: str, value: Any) -> None:
        for prefix, known in self._prefixes.items():
            if name == prefix or (prefix.endswith(":") and name.startswith(prefix)):
                self.found[known][name.removeprefix(prefix)] = value
                return
        foreign = (UNACKED, UNACKED_INDEX, "unacked_mutex", *Priority)
        assert name in foreign or name.startswith(("_kombu.", "celery")), f"{name} is no key that the store knows"

    def one(self, name: str) -> Any:
        """What lies under a name without a part, or an empty mapping."""
        return self.found[name].get("", {})

    def under(self, name: str) -> dict[str, Any]:
        """By part, what lies under a name."""
        return self.found[name]


def assert_consistent(client: redis.Redis, store: Store, *, complete: bool = True, clock_set_back: bool = False) -> None:
    """That all structures of the database agree.

    `complete`: no job was ever forgotten, so that the counts can be checked too.
    """
    db = _Database(client)
    packed = _packed_jobs(db)
    assert not packed.keys() & db.under("job").keys(), "a job has a packed record beside its own"
    jobs = db.under("job") | packed
    histories = {job_id: store.history(job_id) for job_id in jobs}
    assert set(db.under("history")) <= db.under("job").keys(), "a history without a job"
    for job_id, history in histories.items():
        check_history(history, clock_set_back=clock_set_back)
        _check_job(store, job_id, jobs[job_id], history)
    _check_waiting(db, jobs)
    _check_limits(db)
    _check_breakers(db, jobs)
    _check_delivery(client, db, jobs)
    _check_ends(db, jobs)
    _check_indexes(db, jobs, packed.keys())
    _check_listings(store, jobs)
    _check_subscriptions(db)
    _check_plan(db)
    _check_backfills(db, jobs, complete=complete)
    _check_workers(db)
    if complete:
        entered = Counter(line.to_state.value for history in histories.values() for line in history if line.from_state is not line.to_state)
        assert {state: count for state, count in store.counts().items() if count} == entered, "counts do not agree with the histories"


def _packed_jobs(db: _Database) -> dict[str, dict[str, str]]:
    """By id, what the packed records say, as the fields of a job's own record."""
    found: dict[str, dict[str, str]] = {}
    suffixes: dict[str, set[str]] = {}
    for part, records in db.under("planned").items():
        definition, suffix = part.split(":")
        suffixes.setdefault(definition, set()).add(suffix)
        for user, record in records.items():
            priority, after, digits, made, source = record.split(" ")
            assert source in ("schedule", "catch_up", "trigger"), f"what {source} makes is not packed"
            assert definition in db.under("user")[user], f"{user} has a packed job of {definition} without a subscription"
            fields = {"state": "pending", "priority": priority, "after": after, "seq": str(int(digits, 16)), "made": made, "source": source}
            found[f"{definition}:{user}:{suffix}"] = fields
    assert db.under("planned_suffixes") == suffixes, "where there are packed records"
    held = {job_id for members in db.under("held").values() for job_id in members}
    assert not held & found.keys(), "a packed job is held"
    return found


def _in_state(jobs: Mapping[str, dict[str, str]], *states: JobState) -> set[str]:
    return {job_id for job_id, fields in jobs.items() if fields["state"] in states}


def _check_job(store: Store, job_id: str, fields: dict[str, str], history: list[Transition]) -> None:
    job = store.job(job_id)
    assert job.state is history[-1].to_state, f"{job_id} is {job.state}, its history ends with {history[-1].to_state}"
    if "died" in fields:
        died = next(line for line in reversed(history) if line.from_state is not line.to_state)
        assert job.reason == died.reason == fields["died"]
    else:
        assert job.reason == history[-1].reason
    released = sum(line.to_state is JobState.QUEUED and line.from_state is not JobState.QUEUED for line in history)
    started = sum(line.to_state is JobState.RUNNING and line.from_state is not JobState.RUNNING for line in history)
    whole = not any("dropped" in line.detail for line in history)
    assert not whole or (job.delivery, job.attempt) == (released, started), f"{job_id}: (delivery, attempt) do not agree with its history"
    assert 0 <= int(fields.get("budget", 0)) <= job.attempt, f"{job_id}: {fields.get('budget')} of {job.attempt} attempts do not count"
    assert 0 <= job.failures <= max(0, job.attempt - 1)
    assert (job.finished_ms is not None) == job.state.terminal, f"{job_id} is {job.state}, finished at {job.finished_ms}"


def _check_waiting(db: _Database, jobs: Mapping[str, dict[str, str]]) -> None:
    places: Counter[str] = Counter()
    for kind, lanes in ((kind, db.under(kind)) for kind in ("lane", "turn", "capped")):
        for lane, members in lanes.items():
            priority, of = lane.split(":")
            for member, score in members.items():
                seq, job_id = int(member[:11], 16), member[12:]
                places[job_id] += 1
                job = jobs[job_id]
                assert job_id.split(":")[kind == "capped"] == of
                assert (job["priority"], int(job["seq"])) == (priority, seq), f"{job_id} waits in a wrong place"
                assert kind == "turn" or int(job["after"]) == score, f"{job_id} waits for a wrong time"
    for user, held in db.under("held").items():
        for job_id in held:
            places[job_id] += 1
            assert job_id.split(":")[1] == user
    assert set(places) == _in_state(jobs, *WAITING), "the waiting set does not hold the jobs that wait"
    assert db.one("delays").keys() <= places.keys(), "a job that does not wait has a delay"
    assert not [job_id for job_id, count in places.items() if count > 1], "a job waits twice"
    assert {lane.split(":")[1] for lane in db.under("capped")} <= set(db.one("capped_users")), "somebody's jobs stay set aside for ever"
    _check_turns(db)
    fair = "fairness" in db.one("options")
    for priority in Priority:
        blocked = db.under("blocked").get(priority, {})
        waits, turns = _heads(db, "lane", priority), _heads(db, "turn", priority)
        served = turns if fair else waits
        shown = {definition: score for definition, score in served.items() if definition not in blocked}
        assert db.under("turns" if fair else "ready").get(priority, {}) == shown, f"the heads of the {priority} lanes"
        if fair:
            assert db.under("ready").get(priority, {}) == waits, f"the heads of the {priority} lanes that have no turn yet"
        paused = {definition for definition, fields in db.under("definition").items() if "paused" in fields}
        assert {definition for definition, until in blocked.items() if until == math.inf} == paused
        _check_lines(db, priority, served, shown)


def _heads(db: _Database, kind: str, priority: Priority) -> dict[str, float]:
    """By definition, the first place in each lane of a priority."""
    return {lane.split(":")[1]: min(members.values()) for lane, members in db.under(kind).items() if lane.split(":")[0] == priority}


def _check_turns(db: _Database) -> None:
    """That no user has a turn later than the user's last round, and that nothing is left of turns without fairness."""
    if "fairness" not in db.one("options"):
        assert not [name for name in ("turn", "turns", "rounds", "round") if db.under(name)], "turns without fairness"
    for lane, members in db.under("turn").items():
        priority = lane.split(":")[0]
        served = int(db.one("round").get(priority, 0))
        for member, turn in members.items():
            user = member.split(":")[2]
            assert turn <= max(served, db.under("rounds").get(priority, {}).get(user, 0)), f"{member} has a turn of no round"


def _check_lines(db: _Database, priority: Priority, served: Mapping[str, float], shown: Mapping[str, float]) -> None:
    """That every lane that is not shown will be woken: by time, by a start or an end of what is in flight, or by its host's line."""
    limits, blocked = db.one("limits"), db.under("blocked").get(priority, {})
    flying = {name for name, count in _in_flight(db, (*db.one("active"), *_all_queued(db))).items() if count}
    lines = {key.split(":", 1)[1]: line for key, line in db.under("gated").items() if key.startswith(priority)}
    for definition, until in blocked.items():
        host = db.under("definition").get(definition, {}).get("host", "")
        assert until in (EVENT, GATED, math.inf) or until < 1e14
        assert until != EVENT or f"definition:{definition}" in limits.keys() & flying, f"nothing wakes {definition}"
        assert [name for name, line in lines.items() if definition in line] == ([host] if until == GATED else []), f"{definition} in lines"
    for host, line in lines.items():
        assert f"host:{host}" in limits or host in db.one("breakers"), f"a line for {host}, which has no limit and is not held back"
        assert {definition: served.get(definition) for definition in line} == line, f"the line of {host}"
        if host not in db.one("gates"):
            others = [score for name, score in shown.items() if db.under("definition").get(name, {}).get("host") == host]
            assert min(others, default=math.inf) <= min(line.values()), f"{host} may be called, and nobody of its line looks"
    for host, until in db.one("gates").items():
        assert until != EVENT or f"host:{host}" in flying, f"nothing wakes the line of {host}"


def _all_queued(db: _Database) -> set[str]:
    return {job_id for members in db.under("queued").values() for job_id in members}


def _in_flight(db: _Database, ids: Iterable[str]) -> Counter[str]:
    """How many of these jobs are under each name that a limit may have."""
    count: Counter[str] = Counter()
    for job_id in ids:
        definition, user, _ = job_id.split(":", 2)
        host = db.under("definition").get(definition, {}).get("host", "")
        count.update({"total", f"definition:{definition}", f"user:{user}", *([f"host:{host}"] if host else [])})
    return count


def _check_limits(db: _Database) -> None:
    limits = db.one("limits")
    assert limits == {**db.one("limits_configured"), **db.one("limits_live")}
    rules = {name: read_limit(text) for name, text in limits.items()}
    rates = {name: rule for name, rule in rules.items() if rule.per_second is not None}
    queued = _in_flight(db, _all_queued(db))
    assert db.under("limit").keys() == rates.keys(), "buckets without a rate, or rates without a bucket"
    for name, rule in rates.items():
        _, level, reserved = db.under("limit")[name].split()
        assert int(reserved) == queued[name], f"{reserved} tokens of {name} are reserved"
        assert float(level) <= rule.capacity + 1e-9, f"the bucket of {name} is too full"

    def counts(name: str) -> bool:
        kind = name.partition(":")[0]
        rule = rules.get(name) or (rules.get("user") if kind == "user" else None)
        return name != "total" and rule is not None and rule.concurrency is not None

    flying = _in_flight(db, (*db.one("active"), *_all_queued(db)))
    expected = {name: count for name, count in flying.items() if counts(name)}
    assert {name: int(count) for name, count in db.one("inflight").items()} == expected, "what is in flight under limits of concurrency"


def _check_breakers(db: _Database, jobs: Mapping[str, dict[str, str]]) -> None:
    """That what probes a host is in flight, and calls it: else nothing would go there ever again."""
    for host, record in db.one("breakers").items():
        fields = json.loads(record)
        assert fields["kind"] in ("open", "held")
        assert fields["openings"] >= (fields["kind"] == "open")
        job_id, _, delivery = fields["probe"].rpartition("#")
        if job_id:
            assert jobs[job_id]["state"] in ("queued", "running"), f"{job_id} probes {host}, and is {jobs[job_id]['state']}"
            assert jobs[job_id]["delivery"] == delivery
            assert db.under("definition")[job_id.split(":")[0]]["host"] == host


def assert_idle(client: redis.Redis) -> None:
    """That nothing is left of jobs that waited or ran, when all have ended."""
    db = _Database(client)
    for name in ("lane", "ready", "turn", "turns", "gated", "held", "capped", "inflight", "queued", "active", "worker_jobs", "unfinished"):
        assert not db.under(name), f"{name} is left"


def _check_delivery(client: redis.Redis, db: _Database, jobs: Mapping[str, dict[str, str]]) -> None:
    queued = {priority: db.under("queued").get(priority, {}) for priority in Priority}
    assert set().union(*queued.values()) == _in_state(jobs, JobState.QUEUED)
    for priority, members in queued.items():
        assert all(jobs[job_id].get("queue", jobs[job_id]["priority"]) == priority for job_id in members)
        messages = queue(client, priority)
        assert len(messages) == len({(message.job_id, message.delivery) for message in messages}), "a delivery lies twice in a queue"
        for message in messages:
            assert message.job_id.split(":")[1] == message.user
            job = jobs.get(message.job_id)
            assert job is None or message.delivery <= int(job["delivery"])
    running = _in_state(jobs, JobState.RUNNING)
    assert db.one("active").keys() == running
    owned = [(job_id, worker) for worker, members in db.under("worker_jobs").items() for job_id in members]
    assert sorted(owned) == sorted((job_id, jobs[job_id]["worker"]) for job_id in running), "worker_jobs"
    assert {worker for _, worker in owned} <= db.one("workers").keys(), "a worker runs jobs and cannot be recovered"
    assert not _in_state(jobs, JobState.ASSIGNED)


def _check_ends(db: _Database, jobs: Mapping[str, dict[str, str]]) -> None:
    ended = {job_id: float(fields["finished"]) for job_id, fields in jobs.items() if JobState(fields["state"]).terminal}
    dead = {job_id for job_id, fields in jobs.items() if "died" in fields}
    assert {job_id for job_id, fields in jobs.items() if fields["state"] in ("failed", "timed_out")} <= dead <= ended.keys()
    assert db.one("dead") == {job_id: at for job_id, at in ended.items() if job_id in dead}
    assert db.one("finished") == {job_id: at for job_id, at in ended.items() if job_id not in dead}
    counted: dict[str, Counter[str]] = {}
    for job_id, fields in jobs.items():
        definition, user, _ = job_id.split(":", 2)
        if fields.get("counted") and job_id not in ended:
            counted.setdefault(definition, Counter())[user] += 1
    found = {definition: {user: int(count) for user, count in users.items()} for definition, users in db.under("unfinished").items()}
    assert found == counted, "the numbers of unfinished jobs"


def _check_indexes(db: _Database, jobs: Mapping[str, dict[str, str]], packed: Collection[str]) -> None:
    by_user: dict[str, dict[str, float]] = {}
    by_definition: dict[str, dict[str, float]] = {}
    for job_id, fields in jobs.items():
        definition, user, _ = job_id.split(":", 2)
        if job_id not in packed:
            by_user.setdefault(user, {})[job_id] = float(fields["made"])
        by_definition.setdefault(definition, {})[job_id] = float(fields["made"])
    assert db.under("user_jobs") == by_user
    assert db.under("definition_jobs") == by_definition
    users = db.under("user")
    assert db.one("users").keys() == users.keys()
    assert by_user.keys() <= users.keys(), "jobs of a user that does not exist"


def _check_listings(store: Store, jobs: Mapping[str, dict[str, str]]) -> None:
    by_user: dict[str, list[tuple[int, str]]] = {}
    by_definition: dict[str, list[tuple[int, str]]] = {}
    for job_id, fields in jobs.items():
        definition, user, _ = job_id.split(":", 2)
        by_user.setdefault(user, []).append((int(fields["made"]), job_id))
        by_definition.setdefault(definition, []).append((int(fields["made"]), job_id))
    for user, rows in by_user.items():
        listed = [job.id for job in store.jobs(user=user, limit=len(rows) + 1).items]
        assert listed == [job_id for _, job_id in sorted(rows, reverse=True)], f"the jobs of {user}"
    for definition, rows in by_definition.items():
        listed = [job.id for job in store.jobs(definition=definition, limit=len(rows) + 1).items]
        assert listed == [job_id for _, job_id in sorted(rows, reverse=True)], f"the jobs of {definition}"


def _check_subscriptions(db: _Database) -> None:
    wanted: dict[str, set[str]] = {}
    may: dict[str, set[str]] = {}
    subscribers: Counter[str] = Counter()
    for user, fields in db.under("user").items():
        for definition, raw in fields.items():
            if definition.startswith("@"):
                continue
            subscription = json.loads(raw)
            subscribers[definition] += 1
            wanted.setdefault(subscription.get("group", definition), set()).add(user)
            for gid, start, end in subscription.get("prev", []):
                assert start < end
                may.setdefault(gid, set()).add(user)
    for gid, members in db.under("slots").items():
        definition = gid.partition("~")[0]
        assert members.keys() >= wanted.get(gid, set()), f"{gid} lacks a subscriber"
        assert members.keys() <= wanted.get(gid, set()) | may.get(gid, set()), f"{gid} has somebody who is no subscriber"
        assert all(score == slot(user, definition) for user, score in members.items())
    assert wanted.keys() <= db.under("slots").keys()
    for gid in wanted:
        assert gid in db.under("group"), f"subscribers of {gid} have no group"
        assert gid in db.under("groups")[gid.partition("~")[0]]
    assert {definition: int(count) for definition, count in db.one("subscribers").items()} == subscribers


def _check_plan(db: _Database) -> None:
    occurrences = db.under("occurrence")
    is_open = {oid for oid, fields in occurrences.items() if fields["state"] == "open"}
    assert {oid for members in db.under("open").values() for oid in members} == is_open
    assert all(occurrences[oid]["group"] == gid for gid, members in db.under("open").items() for oid in members)
    assert db.one("committed").keys() == is_open
    for oid, text in db.one("committed").items():
        assert text.split()[:2] == [occurrences[oid]["base"], occurrences[oid]["window"]], f"{oid} is committed as {text}"
    assert db.one("closed").keys() == occurrences.keys() - is_open
    indexed = {oid: at for members in db.under("occurrences").values() for oid, at in members.items()}
    assert indexed == {oid: float(fields["at"]) for oid, fields in occurrences.items()}
    skipped = {oid for members in db.under("skipped").values() for oid in members}
    assert skipped == {oid for oid, fields in occurrences.items() if fields["at"] != fields["last"]}, "where records of many are found"
    due = db.one("due")
    assert {member[2:] for member in due if member.startswith("o|")} == is_open, "what is open is not due"
    running = {one for one, fields in db.under("backfill").items() if fields["state"] in ("running", "canceling")}
    assert {member[2:] for member in due if member.startswith("b|")} == running, "a backfill that runs is not due, or another is"
    groups = db.under("group")
    assert {member[2:] for member in due if member.startswith("g|")} <= groups.keys()
    listed = {gid for members in db.under("groups").values() for gid in members}
    assert listed == groups.keys()
    assert all(fields.get("reason") for fields in occurrences.values())


def _check_backfills(db: _Database, jobs: Mapping[str, dict[str, str]], *, complete: bool) -> None:
    records = db.under("backfill")
    assert db.one("backfills").keys() == records.keys()
    assert db.under("backfill_jobs").keys() <= records.keys()
    assert db.one("backfills_ended").keys() == {
        one for one, fields in records.items() if fields["state"] in ("done", "canceled", "stopped")
    }
    assert db.under("backfill_users").keys() <= records.keys() - db.one("backfills_ended").keys()
    for backfill, fields in records.items():
        made = {job_id: job for job_id, job in jobs.items() if job.get("backfill") == backfill}
        unfinished = {job_id: float(job["made"]) for job_id, job in made.items() if not JobState(job["state"]).terminal}
        assert db.under("backfill_jobs").get(backfill, {}) == unfinished, f"what is not finished of backfill {backfill}"
        for state in ("completed", "failed", "timed_out", "rejected", "canceled"):
            ended = sum(job["state"] == state for job in made.values())
            assert not complete or int(fields.get(state, 0)) == ended, f"how many of backfill {backfill} are {state}"
        assert not complete or int(fields.get("made", 0)) == len(made), f"what backfill {backfill} made"
    for job_id, job in jobs.items():
        assert (job["source"] == "backfill") == ("backfill" in job), job_id
        assert job["source"] != "backfill" or job["own"] == "1", job_id


def _check_workers(db: _Database) -> None:
    assert db.under("worker").keys() <= db.one("workers").keys()


@contextmanager
def full(client: redis.Redis) -> Iterator[None]:
    """Its server has no memory left."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)
