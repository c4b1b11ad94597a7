"""What a forecast begins with: groups and how many are in them, what is open, waits and runs, and what was measured. `read_outlook`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from taskplatform.model import Priority, schedule_from_json
from taskplatform.store.backfills import BackfillState, read_backfill
from taskplatform.store.figures import DefinitionCounts, Place, read_definition_counts
from taskplatform.store.records import Group, LimitState, Worker, batches, read_worker

#: Commands of one pipeline: so many answers are in memory at a time.
_COMMANDS = 10_000
#: By the newest occurrences of a definition, which part of its subscribers has jobs: those who are paused or disabled have none.
_NEWEST = 5
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class KnownDefinition:
    """A published definition."""

    priority: Priority
    host: str
    """That its jobs call; "" where they call none."""
    paused: str
    """Why it is; "" where it is not."""
    measured: DefinitionCounts
    present: float
    """The part of its subscribers that had a job in its newest occurrences; 1 where there were none."""
    version: str = ""
    """See `Definition.version`."""


@dataclass(frozen=True, slots=True)
class KnownGroup:
    """A group that the planner looks at."""

    group: Group
    members: int
    due_ms: float
    """When the planner looks at it next."""


@dataclass(frozen=True, slots=True)
class OpenOccurrence:
    """An occurrence that is being planned."""

    id: str
    definition: str
    start_ms: int
    window_ms: int
    members: int
    """Of the group, when it was opened."""
    left: int
    """Subscribers to whom the planner has not come."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs of a definition with one priority that were made and are not released; held ones are not counted."""

    due: int
    soon: int
    """Due within the horizon: most of them were planned."""
    later: tuple[int, ...]
    """Due after that, hour by hour: submitted for later, and retries."""


@dataclass(frozen=True, slots=True)
class OpenBackfill:
    """A backfill that has not ended."""

    id: str
    definition: str
    state: BackfillState
    per_second: float
    most_unfinished: int
    """So many of its jobs may wait or run at a time."""
    unfinished: int
    """So many do now."""
    left: float
    """Jobs that it may still make; those are fewer that exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """All that is known now of what comes."""

    now_ms: int
    definitions: Mapping[str, KnownDefinition]
    groups: tuple[KnownGroup, ...]
    open: tuple[OpenOccurrence, ...]
    waiting: Mapping[Place, Waiting]
    queued: Mapping[Place, int]
    """Released and not started."""
    running: Mapping[str, int]
    """By definition."""
    limits: tuple[LimitState, ...]
    """Without those of single users."""
    workers: tuple[Worker, ...]
    """Without what they run."""
    users: int
    backfills: tuple[OpenBackfill, ...] = ()
    """Those that run or are paused."""
    running_since_ms: Mapping[str, float] = field(default_factory=dict)
    """By definition, when those that run began, in the mean."""
    fairness: bool | None = None
    """As the planner that leads has it; None where none ever did, as for `share`."""
    share: float | None = None
    """What part of all releases each lower priority gets at least while it waits."""


def read_outlook(
    client: redis.Redis, key: Callable[..., str], now_ms: int, limits: Sequence[LimitState], *, horizon_ms: int, until_ms: int
) -> Outlook:
    """Ask for all of it, in some ten rounds of pipelined commands, however many users there are."""
    ask = _Asking(client)
    first = ask(
        [
            ("smembers", key("definitions")),
            ("hgetall", key("committed")),
            ("zrange", key("active"), 0, -1, False, True),
            ("zrange", key("workers"), 0, -1, False, True),
            ("zcard", key("users")),
            ("hmget", key("options"), ["fairness", "share"]),
            ("zrange", key("backfills"), 0, -1),
            ("zrange", key("backfills_ended"), 0, -1),
            *(("zrange", key("queued", priority), 0, -1) for priority in Priority),
        ]
    )
    known, committed, active, beats, users, (fairness, share), backfills, ended, *queued = first
    definitions = sorted(known)
    running, began = Counter[str](), Counter[str]()
    for job_id, began_ms in active:
        running[_definition_of(job_id)] += 1
        began[_definition_of(job_id)] += int(began_ms)
    return Outlook(
        now_ms=now_ms,
        definitions=dict(zip(definitions, _definitions(ask, key, definitions), strict=True)),
        groups=tuple(_groups(ask, key, definitions)),
        open=tuple(_open(ask, key, committed)),
        waiting=_waiting(ask, key, definitions, now_ms, now_ms + horizon_ms, until_ms),
        queued=Counter((_definition_of(job_id), priority) for priority, ids in zip(Priority, queued, strict=True) for job_id in ids),
        running=running,
        running_since_ms={name: began[name] / runs for name, runs in running.items()},
        limits=tuple(limits),
        workers=tuple(
            read_worker(worker, int(beat), fields, ())
            for (worker, beat), fields in zip(beats, ask([("hgetall", key("worker", worker)) for worker, _ in beats]), strict=True)
        ),
        users=users,
        backfills=tuple(_backfills(ask, key, sorted(set(backfills) - set(ended)))),
        fairness=None if share is None else fairness is not None,
        share=None if share is None else float(share),
    )


class _Asking:
    """Asks many commands in few round trips."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def __call__(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        answers: list[Any] = []
        for some in batches(commands, _COMMANDS):
            pipe = self._client.pipeline(transaction=False)
            for verb, *of in some:
                getattr(pipe, verb)(*of)
            answers += pipe.execute()
        return answers


def _definition_of(job_id: str) -> str:
    return job_id.partition(":")[0]


def _definitions(ask: _Asking, key: Callable[..., str], definitions: Sequence[str]) -> Iterator[KnownDefinition]:
    asked: list[tuple[Any, ...]] = []
    for name in definitions:
        asked.append(("hmget", key("definition", name), ["priority", "host", "paused", "version"]))
        asked.append(("hgetall", key("stats", name)))
        asked.append(("zrange", key("occurrences", name), "+inf", "-inf", True, False, float, True, False, 0, _NEWEST))
    rows = list(batches(ask(asked), 3))
    wanted = ["state", "planned", "paused", "disabled"]
    newest = iter(ask([("hmget", key("occurrence", oid), wanted) for _, _, oids in rows for oid in oids]))
    for (priority, host, paused, version), stats, oids in rows:
        present = absent = 0
        for state, *counts in (next(newest) for _ in oids):
            if state == "done":
                planned, away, off = (int(count or 0) for count in counts)
                present, absent = present + planned, absent + away + off
        share = present / (present + absent) if present + absent else 1.0
        measured = read_definition_counts(stats)
        yield KnownDefinition(Priority(priority or Priority.MEDIUM), host or "", paused or "", measured, share, version or "")


def _backfills(ask: _Asking, key: Callable[..., str], ids: Sequence[str]) -> Iterator[OpenBackfill]:
    asked = [command for one in ids for command in (("hgetall", key("backfill", one)), ("zcard", key("backfill_jobs", one)))]
    for one, (fields, unfinished) in zip(ids, batches(ask(asked), 2), strict=True):
        if fields:
            found = read_backfill(one, fields, unfinished)
            # of an occurrence that was left to the planner, or is too long ago, nobody was looked at
            each = found.total / found.occurrences if found.occurrences else 0.0
            left = found.total - found.looked - each * (found.left + found.forgotten)
            yield OpenBackfill(one, found.definition, found.state, found.per_second, int(fields["most"]), unfinished, max(0.0, left))


def _groups(ask: _Asking, key: Callable[..., str], definitions: Sequence[str]) -> Iterator[KnownGroup]:
    members = ask([("smembers", key("groups", name)) for name in definitions])
    gids = sorted(gid for one in members for gid in one)
    asked: list[tuple[Any, ...]] = []
    for gid in gids:
        asked.append(("hmget", key("group", gid), ["definition", "schedule", "cursor"]))
        asked.append(("zcard", key("slots", gid)))
        asked.append(("zscore", key("due"), f"g|{gid}"))
    for gid, ((definition, schedule, cursor), size, due) in zip(gids, batches(ask(asked), 3), strict=True):
        if definition is not None and due is not None:
            yield KnownGroup(Group(gid, definition, schedule_from_json(schedule), int(cursor)), size, float(due))


def _open(ask: _Asking, key: Callable[..., str], committed: Mapping[str, str]) -> Iterator[OpenOccurrence]:
    cursors = ask([("hget", key("occurrence", oid), "cursor") for oid in committed])
    asked = [
        ("zcount", key("slots", oid.partition("|")[0]), f"({cursor or '-1'}", "+inf")
        for oid, cursor in zip(committed, cursors, strict=True)
    ]
    for (oid, text), left in zip(committed.items(), ask(asked), strict=True):
        start, window, jobs = map(int, text.split())
        yield OpenOccurrence(oid, oid.partition("|")[0].partition("~")[0], start, window, jobs, left)


def _waiting(
    ask: _Asking, key: Callable[..., str], definitions: Sequence[str], now_ms: int, soon_ms: int, until_ms: int
) -> dict[Place, Waiting]:
    places = [(name, priority) for name in definitions for priority in Priority]
    asked: list[tuple[Any, ...]] = []
    for name, priority in places:
        lane = key("lane", f"{priority}:{name}")
        asked.append(("zcard", lane))
        asked.append(("zcount", lane, "-inf", now_ms))
        asked.append(("zcount", lane, f"({now_ms}", soon_ms))
        asked.append(("zcard", key("turn", f"{priority}:{name}")))
    counts = dict(zip(places, batches(ask(asked), 4), strict=True))
    later = [place for place, (total, due, soon, _) in counts.items() if total > due + soon]
    hours = range(soon_ms, until_ms, _HOUR_MS)
    asked = [
        ("zcount", key("lane", f"{priority}:{name}"), f"({hour}", min(hour + _HOUR_MS, until_ms))
        for name, priority in later
        for hour in hours
    ]
    hourly = dict(zip(later, batches(ask(asked), len(hours)), strict=True)) if hours else {}
    return {
        place: Waiting(due + turns, soon, tuple(hourly.get(place, ())))
        for place, (total, due, soon, turns) in counts.items()
        if total or turns
    }
