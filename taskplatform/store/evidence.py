"""What answers are derived from: the facts about a user, a definition and its occurrences, as they are kept. Reached as `Store.evidence`.

It only reads, a handful of pipelines for each question, and never over users or jobs: what a question costs does not grow with them.
Nothing is judged here; `taskplatform.answers` does that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import redis

from taskplatform.model import Job, Limit, Priority, Transition, schedule_from_json
from taskplatform.store.records import (
    Breaker,
    Group,
    Occurrence,
    Worker,
    batches,
    read_breaker,
    read_creation,
    read_limit,
    read_occurrence,
    read_transition,
    read_worker,
)
from taskplatform.store.scripts import Clock

#: Retention that the scripts take where no beat has told them one.
_RETENTION_MS = 259_200_000
#: Outages that are kept, and triggers that are looked at.
_MOST_OUTAGES = 1000
_MOST_TRIGGERS = 1000
#: A history has some 200 lines at the most, and the server answers nobody else meanwhile.
_HISTORIES_AT_ONCE = 50
#: Of a job's record: what `read_creation` asks for.
_CREATION = ("made", "source", "backfill", "maker")
#: How lib.lua says for what a lane waits that waits for no time.
EVENT, GATED = 8e15, 9e15


@dataclass(frozen=True, slots=True)
class Entry:
    """A change, as it was kept with the change itself. What the kinds need is said in lib.lua at `trail`."""

    at_ms: int
    kind: str
    actor: str
    why: str = ""
    group: str = ""
    since_ms: float | None = None
    schedule: str = ""
    from_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """A subscription as its record has it now."""

    group: str
    since_ms: int
    former: tuple[tuple[str, int, int], ...]
    """(group, after, until): the groups before, as far as the planner has not passed them."""
    enabled: bool
    paused: bool


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which the planner did not plan: nothing at all, or only `what`, because of `error`."""

    from_ms: int
    to_ms: int
    what: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A dead letter that was forgotten before its time."""

    at_ms: int
    died_ms: int
    reason: str
    """Why it died."""
    what: str
    """Why it was forgotten."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A definition as the scripts know it. Without `schedule` it is not published."""

    id: str
    published: bool
    paused: str | None
    """Why; None where it is not."""
    schedule: str | None
    window_ms: int
    priority: str
    host: str
    trail: tuple[Entry, ...] = ()
    triggers: tuple[int, ...] = ()
    """The latest times at which it was triggered."""


@dataclass(frozen=True, slots=True)
class Background:
    """All that is kept of a user and a definition beside occurrences and jobs."""

    now_ms: int
    user: str
    created_ms: int
    user_paused: bool
    user_trail: tuple[Entry, ...]
    definition: Definition
    membership: Membership | None
    trail: tuple[Entry, ...]
    forgotten: Mapping[str, Forgotten]
    """By the part of the job's id that names the occurrence."""
    groups: Mapping[str, Group]
    planner: Mapping[str, str]
    outages: tuple[Outage, ...]
    retention_ms: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What the planner kept of an occurrence."""

    occurrence: Occurrence
    opened_ms: int
    done_ms: int | None
    cursor: float
    """Users up to this slot are decided."""
    moved_ms: int | None
    schedule: str
    """Of a record for many occurrences, by which they came due."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a job stands that waits or lies in a queue, and what goes before it."""

    now_ms: int
    held: bool
    capped: bool
    blocked_until: float | None
    """When its lane may go on, as lib.lua says it; None where it may."""
    gate_until: float | None
    """The same of its host's gate."""
    line_before: int
    """Lanes before its own in the line of its host."""
    limits: Mapping[str, Limit]
    in_flight: Mapping[str, int]
    tokens: Mapping[str, float]
    """Free tokens of the limits that it is under and that have a rate."""
    breaker: Breaker | None
    before: int
    """Jobs of its priority that wait and are due before it."""
    tied: int
    """Those due in the same millisecond, or with a turn in the same round, itself among them."""
    higher: Mapping[str, int]
    """Jobs of each higher priority that are due and may go."""
    queued: Mapping[str, int]
    """Jobs that are released and not started, by queue."""
    capacity: Mapping[str, float]
    workers: tuple[Worker, ...]
    fair: bool
    queue: str
    """Into which it was released."""


class Evidence:
    """The readers. Safe to share between threads."""

    def __init__(self, client: redis.Redis, key: Callable[..., str], clock: Clock | None) -> None:
        self._redis = client
        self._key = key
        self._clock = clock

    def background(self, user: str, definition: str) -> Background | None:
        """None where there is no such user."""
        now_ms = self._now_ms()
        pipe = self._redis.pipeline(transaction=True)
        pipe.hmget(self._key("user", user), "@created", "@paused", definition)
        pipe.hmget(self._key("trail", user), "@", definition)
        pipe.zrange(self._key("gone", user), 0, -1, withscores=True)
        pipe.hmget(self._key("definition", definition), "schedule", "window", "paused", "priority", "host")
        pipe.sismember(self._key("definitions"), definition)
        pipe.hget(self._key("definition_trails"), definition)
        pipe.zrange(self._key("triggered", definition), "+inf", "-inf", byscore=True, desc=True, offset=0, num=_MOST_TRIGGERS)
        pipe.hgetall(self._key("planner"))
        pipe.zrange(self._key("outages"), "+inf", "-inf", byscore=True, desc=True, offset=0, num=_MOST_OUTAGES)
        pipe.hget(self._key("options"), "retention")
        (created, paused, raw), (of_user, of_both), gone, known, published, of_definition, triggers, planner, outages, kept = pipe.execute()
        if created is None:
            return None
        membership = _membership(definition, raw) if raw else None
        trail = _entries(of_both)
        wanted = {definition, *(one.group for one in trail if one.group)}
        if membership is not None:
            wanted |= {membership.group, *(group for group, _, _ in membership.former)}
        schedule, window, why, priority, host = known
        return Background(
            now_ms=now_ms,
            user=user,
            created_ms=int(created),
            user_paused=paused == "1",
            user_trail=_entries(of_user),
            definition=Definition(
                id=definition,
                published=bool(published),
                paused=why,
                schedule=schedule,
                window_ms=int(window or 0),
                priority=priority or Priority.MEDIUM.value,
                host=host or "",
                trail=_entries(of_definition),
                triggers=tuple(sorted(map(int, triggers))),
            ),
            membership=membership,
            trail=trail,
            forgotten=_forgotten(definition, gone),
            groups=self._groups(sorted(wanted)),
            planner=planner,
            outages=tuple(sorted((_outage(text) for text in outages), key=lambda one: one.from_ms)),
            retention_ms=int(kept or _RETENTION_MS),
        )

    def _groups(self, ids: Sequence[str]) -> dict[str, Group]:
        pipe = self._redis.pipeline(transaction=False)
        for gid in ids:
            pipe.hgetall(self._key("group", gid))
        found: dict[str, Group] = {}
        for gid, fields in zip(ids, pipe.execute(), strict=True):
            # one that cannot be read cannot be planned either: that it fails the planner tells
            with suppress(ValueError, KeyError):
                found[gid] = Group(gid, fields["definition"], schedule_from_json(fields["schedule"]), int(fields["cursor"]))
        return found

    def seen(self, places: Sequence[tuple[str, str, int]]) -> list[Seen | None]:
        """What became of (group, suffix, time): of each its record, or that of the many which it was skipped with, or None."""
        pipe = self._redis.pipeline(transaction=False)
        for gid, suffix, at_ms in places:
            pipe.hgetall(self._key("occurrence", f"{gid}|{suffix}"))
            pipe.zrange(self._key("skipped", gid), at_ms, "+inf", byscore=True, offset=0, num=1)
        found: list[Seen | None] = []
        ranges: dict[int, str] = {}
        for number, (fields, skipped) in enumerate(batches(pipe.execute(), 2)):
            gid, suffix, _ = places[number]
            found.append(_seen(f"{gid}|{suffix}", fields) if fields else None)
            if not fields and skipped and not suffix.startswith("t"):
                ranges[number] = skipped[0]
        for oid in ranges.values():
            pipe.hgetall(self._key("occurrence", oid))
        for (number, oid), fields in zip(ranges.items(), pipe.execute() if ranges else (), strict=True):
            at_ms = places[number][2]
            if fields and int(fields["at"]) <= at_ms <= int(fields["last"]):
                found[number] = _seen(oid, fields)
        return found

    def histories(self, jobs: Sequence[Job]) -> dict[str, tuple[Transition, ...]]:
        """What `Store.history` tells of each of these jobs, by id. One that was removed since it was read is not among them."""
        found: dict[str, tuple[Transition, ...]] = {}
        for batch in batches(jobs, _HISTORIES_AT_ONCE):
            pipe = self._redis.pipeline(transaction=True)
            for job in batch:
                pipe.hmget(self._key("job", job.id), _CREATION)
                pipe.lrange(self._key("history", job.id), 0, -1)
            for job, (created, rows) in zip(batch, batches(pipe.execute(), 2), strict=True):
                fields = {name: value for name, value in zip(_CREATION, created, strict=True) if value is not None}
                if "source" not in fields:
                    if job.source == "backfill":
                        continue  # such a job always has a record: it is gone
                    # without a record it waits as it was planned
                    fields = {"made": str(job.created_ms), "source": job.source}
                found[job.id] = (read_creation(fields), *map(read_transition, rows))
        return found

    def opened(self, groups: Sequence[str]) -> list[Seen]:
        """The open occurrences of these groups."""
        pipe = self._redis.pipeline(transaction=False)
        for gid in groups:
            pipe.smembers(self._key("open", gid))
        ids = sorted({oid for members in pipe.execute() for oid in members})
        for oid in ids:
            pipe.hgetall(self._key("occurrence", oid))
        rows = zip(ids, pipe.execute() if ids else (), strict=True)
        return [_seen(oid, fields) for oid, fields in rows if fields.get("state") == "open"]

    def subscribers(self) -> dict[str, int]:
        """How many each definition has."""
        raw = cast("dict[str, str]", self._redis.hgetall(self._key("subscribers")))
        return {name: int(count) for name, count in raw.items()}

    def hosts(self, definitions: Sequence[str]) -> dict[str, str]:
        """Which host the jobs of each call, "" where none."""
        pipe = self._redis.pipeline(transaction=False)
        for name in definitions:
            pipe.hget(self._key("definition", name), "host")
        return {name: host or "" for name, host in zip(definitions, pipe.execute(), strict=True)}

    # what a job waits for

    def standing(self, job: Job, host: str) -> Standing:
        """Of a job that waits or lies in a queue; `host` is what its definition calls."""
        now_ms = self._now_ms()
        priority = job.priority
        higher = list(Priority)[: list(Priority).index(priority)]
        limits = {"total", f"definition:{job.definition}", f"user:{job.user}", "user", *((f"host:{host}",) if host else ())}
        rates = sorted(limits - {f"user:{job.user}", "user"})
        pipe = self._redis.pipeline(transaction=False)
        pipe.sismember(self._key("held", job.user), job.id)
        pipe.hgetall(self._key("limits"))
        pipe.hgetall(self._key("inflight"))
        pipe.hgetall(self._key("capacity"))
        pipe.hgetall(self._key("options"))
        pipe.hmget(self._key("job", job.id), "seq", "queue")
        pipe.hget(self._key("planned", f"{job.definition}:{job.id.rpartition(':')[2]}"), job.user)
        pipe.zmscore(self._key("blocked", priority), [job.definition])
        pipe.zmscore(self._key("gates"), [host])
        pipe.zmscore(self._key("gated", f"{priority}:{host}"), [job.definition])
        pipe.hget(self._key("breakers"), host)
        pipe.zrange(self._key("workers"), 0, -1, withscores=True)
        for name in rates:
            pipe.get(self._key("limit", name))
        for one in Priority:
            pipe.zcard(self._key("queued", one))
            # with fairness those that are due have turns, which are indexed for themselves
            pipe.zrange(self._key("ready", one), 0, -1)
            pipe.zrange(self._key("turns", one), 0, -1)
        answers = pipe.execute()
        held, kept, flying, capacity, options, (seq, queue), packed, (blocked,), (gate,), (place,), record, beats, *rest = answers
        buckets, of_queues = rest[: len(rates)], batches(rest[len(rates) :], 3)
        shown = dict(zip(Priority, of_queues, strict=True))
        # its number in its lane; a packed record has it as the lane does
        digits = f"{int(seq):011x}" if seq else packed.split(" ")[2] if packed else ""
        member = f"{digits}:{job.id}"
        fair = "fairness" in options
        lanes = {
            one: [(kind, name) for kind, names in (("lane", shown[one][1]), ("turn", shown[one][2])) for name in names]
            for one in (*higher, priority)
        }
        pipe.zmscore(self._key("capped", f"{priority}:{job.user}"), [member])
        pipe.zmscore(self._key("turn", f"{priority}:{job.definition}"), [member])
        (capped,), (turn,) = pipe.execute()
        for one in higher:
            for kind, name in lanes[one]:
                pipe.zcount(self._key(kind, f"{one}:{name}"), "-inf", "+inf" if kind == "turn" else now_ms)
        own = lanes[priority] if ("lane", job.definition) in lanes[priority] else [*lanes[priority], ("lane", job.definition)]
        for kind, name in own:
            at = turn if kind == "turn" and turn is not None else job.execute_after_ms
            most = "+inf" if kind == "turn" and turn is None else f"({at}"
            # who has a turn goes before all that have none
            pipe.zcount(self._key(kind, f"{priority}:{name}"), "-inf", "-inf" if kind == "lane" and turn is not None else most)
        for kind, name in own:
            same = turn if turn is not None else job.execute_after_ms
            alike = kind == ("lane" if turn is None else "turn")
            pipe.zcount(self._key(kind, f"{priority}:{name}"), same if alike else "-inf", same if alike else "-inf")
        for worker, _ in beats:
            pipe.hgetall(self._key("worker", worker))
        pipe.zcount(self._key("gated", f"{priority}:{host}"), "-inf", f"({place}" if place is not None else "-inf")
        *counts, line_before = pipe.execute()
        above, counts = self._above(higher, lanes, counts)
        before, counts = sum(counts[: len(own)]), counts[len(own) :]
        tied, fields = sum(counts[: len(own)]), counts[len(own) :]
        in_force = {name: read_limit(text) for name, text in kept.items() if name in limits}
        return Standing(
            now_ms=now_ms,
            held=bool(held),
            capped=capped is not None,
            blocked_until=blocked,
            gate_until=gate,
            line_before=line_before,
            limits=in_force,
            in_flight={name: int(count) for name, count in flying.items() if name in limits},
            tokens=_tokens(dict(zip(rates, buckets, strict=True)), in_force, now_ms),
            breaker=read_breaker(host, record, now_ms) if record else None,
            before=before,
            tied=tied,
            higher=above,
            queued={one.value: row[0] for one, row in shown.items()},
            capacity={name: float(value) for name, value in capacity.items()},
            workers=tuple(read_worker(worker, int(beat), told, ()) for (worker, beat), told in zip(beats, fields, strict=True)),
            fair=fair,
            queue=queue or priority.value,
        )

    @staticmethod
    def _above(
        higher: Sequence[Priority], lanes: Mapping[Priority, Sequence[object]], counts: list[Any]
    ) -> tuple[dict[str, int], list[Any]]:
        found: dict[str, int] = {}
        for one in higher:
            number = len(lanes[one])
            found[one.value], counts = sum(counts[:number]), counts[number:]
        return found, counts

    # what the planner tells

    def outage(self, outage: Outage, *, kept: timedelta) -> None:
        """Keep a time in which something was not planned, for `kept`. The newest thousand are kept."""
        told = json.dumps([outage.from_ms, outage.to_ms, outage.what, outage.error])
        pipe = self._redis.pipeline(transaction=True)
        pipe.zadd(self._key("outages"), {told: outage.to_ms})
        pipe.zremrangebyscore(self._key("outages"), "-inf", outage.to_ms - round(kept / timedelta(milliseconds=1)))
        pipe.zrange(self._key("outages"), 0, -_MOST_OUTAGES - 1)
        oldest = pipe.execute()[2]
        if oldest:
            self._redis.zrem(self._key("outages"), *oldest)

    def retention(self) -> timedelta:
        """How long changes are told, at the least."""
        kept = cast("str | None", self._redis.hget(self._key("options"), "retention"))
        return timedelta(milliseconds=int(kept or _RETENTION_MS))

    def _now_ms(self) -> int:
        if self._clock is not None:
            return self._clock()
        seconds, microseconds = self._redis.time()
        return seconds * 1000 + microseconds // 1000


# --- from Redis ------------------------------------------------------------------------------------------------------


def _entries(told: str | None) -> tuple[Entry, ...]:
    if not told:
        return ()
    rows = json.loads(told.split(" ", 2)[2])
    return tuple(
        Entry(
            at_ms=int(row["a"]),
            kind=row["k"],
            actor=row.get("b", ""),
            why=row.get("w", ""),
            group=row.get("g", ""),
            since_ms=row.get("s"),
            schedule=row.get("c", ""),
            from_ms=row.get("f"),
        )
        for row in rows
    )


def _membership(definition: str, raw: str) -> Membership:
    try:
        fields = json.loads(raw)
    except ValueError:
        # as the planner takes it
        fields = {"off": 1}
    return Membership(
        group=fields.get("group", definition),
        since_ms=int(fields.get("since", 0)),
        former=tuple((group, int(after), int(until)) for group, after, until in fields.get("prev", ())),
        enabled="off" not in fields,
        paused="paused" in fields,
    )


def _outage(text: str) -> Outage:
    from_ms, to_ms, what, error = json.loads(text)
    return Outage(from_ms, to_ms, what, error)


def _forgotten(definition: str, rows: Sequence[tuple[str, float]]) -> dict[str, Forgotten]:
    found: dict[str, Forgotten] = {}
    for text, at_ms in rows:
        name, died_ms, reason, what = json.loads(text)
        of, _, suffix = name.partition(":")
        if of == definition:
            found[suffix] = Forgotten(int(at_ms), int(died_ms), reason, what)
    return found


def _seen(oid: str, fields: Mapping[str, str]) -> Seen:
    return Seen(
        occurrence=read_occurrence(oid, fields),
        opened_ms=int(fields.get("opened", 0)),
        done_ms=int(fields["done"]) if "done" in fields else None,
        cursor=float(fields.get("cursor", -1)),
        moved_ms=int(fields["moved"]) if "moved" in fields else None,
        schedule=fields.get("schedule", ""),
    )


def _tokens(buckets: Mapping[str, str | None], limits: Mapping[str, Limit], now_ms: int) -> dict[str, float]:
    """Free tokens, as lib.lua counts them."""
    found: dict[str, float] = {}
    for name, kept in buckets.items():
        limit = limits.get(name)
        if limit is None or limit.per_second is None:
            continue
        if kept is None:
            found[name] = limit.capacity / limit.tokens_per_start
            continue
        at_ms, level, reserved = kept.split()
        filled = min(limit.capacity, float(level) + max(0, now_ms - int(at_ms)) * limit.per_second / 1000)
        found[name] = filled / limit.tokens_per_start - int(reserved)
    return found
