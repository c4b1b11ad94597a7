"""All of planning at once against a model: changes, pauses, deployments, crashes, fail-over, outages and a clock that is set back.

The model knows the rules of docs/architecture.md ("Planning") and when a schedule is due, nothing of scripts, batches or indexes.
After each act of a planner it says which jobs there are and when each may run, and which occurrences have a record that
says what. `test_planning.py` has narrower models, each of one of these things alone.

When a planner looks is its own affair where the rules leave it open, and there the model follows what it sees:

- A planner that dies in the middle of a tick has done a part of it. Which groups it looked at, and how many users of an occurrence
  it decided, is read from the store; what it decided must be right, and the rest undone.
- A definition that is paused in the middle of a window ends the occurrence when the planner next looks at it: for its next user, or
  at the end of the window at the latest.
- A group that nobody is in goes at some time; it must not be one whose users still have moments to come.
- After the clock was set back, a change takes effect not before the furthest instant up to which anything was planned.

Left out, because they have tests of their own or no rule: definitions that are removed, triggers, two planners with different
catalogues at once, and a definition whose window changes while own schedules come due at the same times as its own.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from itertools import count
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskplatform.errors import StoreUnavailable
from taskplatform.model import CatchUpPolicy, Definition, Schedule, planned_job_id, schedule_to_json, slot
from taskplatform.planner import Planner
from taskplatform.schedule import occurrences
from taskplatform.store import Group, Occurrence, Store, SubscribeResult
from tests.conftest import Clock
from tests.integration.harness import ACTOR, assert_consistent, define, subscribe

#: Wide, so that many moments and changes fall into it.
HORIZON = timedelta(seconds=20)
HORIZON_MS = 20_000
GRACE_MS = 60_000
MINUTE = 60_000
HOUR = 60 * MINUTE


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """A subscription from its beginning to its end: in which group it is after one instant and up to another."""

    in_force: list[tuple[str, float, float]]
    off: bool = False
    paused: bool = False

    def move(self, group: str, effect_ms: int) -> None:
        current, since, _ = self.in_force[-1]
        if group == current:
            return
        self.in_force.pop()
        if since < effect_ms:
            self.in_force.append((current, since, effect_ms))
            since = effect_ms
        self.in_force.append((group, since, math.inf))

    def switch(self, on: bool, effect_ms: int) -> None:
        if on and self.off:
            group, since, until = self.in_force[-1]
            self.in_force[-1] = (group, max(since, effect_ms), until)
        self.off = not on

    def belongs(self, group: str, moment_ms: int) -> bool:
        return any(group == one and since < moment_ms <= until for one, since, until in self.in_force)


@dataclass
class Line:
    """A group's schedule, and up to where its occurrences were decided."""

    schedule: Schedule
    cursor_ms: int

    def due(self, now_ms: int) -> list[int]:
        """What comes within the horizon."""
        return list(occurrences(self.schedule, self.cursor_ms, now_ms + HORIZON_MS))


@dataclass
class Record:
    """An occurrence that was opened, or a range of them that was skipped."""

    group: str
    at_ms: int
    last_ms: int
    base_ms: int
    window_ms: int
    source: str
    why_skipped: str = ""
    done: bool = False
    planned: int = 0
    paused: int = 0
    disabled: int = 0
    decided: set[str] = field(default_factory=set)
    counted_ms: int = 0
    """The instant from which its window was counted, if it was one that a clock showed to a planner."""

    @property
    def open(self) -> bool:
        return not self.done and not self.why_skipped

    def ends_within(self, now_ms: int) -> bool:
        return self.base_ms + self.window_ms <= now_ms + HORIZON_MS


@dataclass(frozen=True)
class Seen:
    """What the store tells of a definition's groups and occurrences."""

    groups: Mapping[str, Group]
    records: Mapping[tuple[str, int], Occurrence]


@dataclass
class Model:
    """Which jobs and records there must be of one definition."""

    definition: Definition
    paused_users: set[str]
    why_paused: str = ""
    lives: dict[str, Life] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    jobs: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def window_ms(self) -> int:
        return round(self.definition.window.total_seconds() * 1000)

    def subscribe(self, user: str, group: str, schedule: Schedule, effect_ms: int) -> None:
        """A new group begins where the first moments of its first user may lie."""
        if user in self.lives:
            self.lives[user].move(group, effect_ms)
        else:
            self.lives[user] = Life([(group, effect_ms, math.inf)])
        self.lines.setdefault(group, Line(schedule, effect_ms - self.window_ms))

    def cancel(self, user: str) -> None:
        for job_id, (after_ms, _) in list(self.jobs.items()):
            if job_id.split(":")[1] == user:
                self.jobs[job_id] = (after_ms, "canceled")

    def follow(self, now_ms: int, seen: Seen, *, whole: bool, clock_is_right: bool) -> None:
        """Do what a planner did now. `whole`: it had the time to do all, so nothing that is due may be left."""
        for group, line in list(self.lines.items()):
            found = seen.groups.get(group)
            if found is None:
                assert not self._awaited(group), f"{group} is gone, and has moments to come"
                del self.lines[group]
                continue
            if found.schedule != line.schedule:
                # the old schedule is looked at before the new one is published
                if line.due(now_ms):
                    self._look(group, now_ms)
                line.schedule, line.cursor_ms = found.schedule, max(now_ms, line.cursor_ms)
            if found.cursor_ms != line.cursor_ms:
                self._look(group, now_ms)
            assert found.cursor_ms == line.cursor_ms, f"the cursor of {group}"
            assert not (whole and clock_is_right and line.due(now_ms)), f"{group} has occurrences that nobody looked at"
        for key, record in self.records.items():
            if record.open:
                assert key in seen.records, f"occurrence {key} has no record"
                self._decide(record, now_ms, seen.records[key], whole=whole)

    def _look(self, group: str, now_ms: int) -> None:
        """What becomes of each occurrence from the cursor to the horizon."""
        line, catch_up = self.lines[group], self.definition.catch_up
        missed_before = now_ms - max(self.window_ms, GRACE_MS)
        due = line.due(now_ms)
        line.cursor_ms = max(now_ms + HORIZON_MS, line.cursor_ms)
        missed = [at for at in due if at <= missed_before]
        current = due[len(missed) :]
        caught_up: list[int] = []
        if catch_up.policy is CatchUpPolicy.ALL or (catch_up.policy is CatchUpPolicy.LATEST and not current):
            caught_up = [at for at in missed if at >= now_ms - catch_up.window.total_seconds() * 1000]
        if catch_up.policy is CatchUpPolicy.LATEST:
            caught_up = caught_up[-1:]
        skipped = missed[: len(missed) - len(caught_up)]
        if skipped:
            why = f"{len(skipped)} missed while no planner ran, policy {catch_up.policy}"
            self._record(Record(group, skipped[0], skipped[-1], 0, 0, "skip", why))
        base_ms = now_ms
        for at in caught_up:
            record = self._opened(group, at, base_ms, "catch_up")
            record.counted_ms = now_ms
            if self._record(record):
                base_ms += self.window_ms
        for at in current:
            self._record(self._opened(group, at, at, "schedule"))

    def _opened(self, group: str, at_ms: int, base_ms: int, source: str) -> Record:
        if self.why_paused:
            return Record(group, at_ms, at_ms, 0, 0, "skip", f"definition paused, {self.why_paused}")
        return Record(group, at_ms, at_ms, base_ms, self.window_ms, source)

    def _record(self, record: Record) -> bool:
        """Each occurrence is decided once, also where its group went and came back."""
        return self.records.setdefault((record.group, record.at_ms), record) is record

    def _decide(self, record: Record, now_ms: int, found: Occurrence, *, whole: bool) -> None:
        """Make the jobs of an open occurrence: of all users whose moments come within the horizon, or of as many as were decided."""
        if self.why_paused:
            if found.state == "skipped":
                record.why_skipped = f"definition paused, {self.why_paused}"
            elif whole:
                assert not self._due_users(record, now_ms)
                assert not record.ends_within(now_ms)
            return
        back_ms = record.counted_ms - now_ms
        if back_ms > 1000 and found.base_ms == record.base_ms - back_ms:
            # the clock was set back: where a planner looked, the window goes on from now
            record.base_ms, record.counted_ms = found.base_ms, now_ms
        if whole or found.state == "done":
            self._plan(record, now_ms, math.inf)
            record.done = record.ends_within(now_ms)
        else:
            self._plan(record, now_ms, found.planned + found.paused + found.disabled)

    def _plan(self, record: Record, now_ms: int, most: float) -> None:
        while len(record.decided) < most and (users := self._due_users(record, now_ms)):
            user, offset_ms = users[0]
            life = self.lives[user]
            record.decided.add(user)
            if user in self.paused_users or (life.paused and not life.off):
                record.paused += 1
            elif life.off:
                record.disabled += 1
            else:
                if record.base_ms + offset_ms < now_ms - HORIZON_MS:
                    # late: what is left is spread from now on
                    record.base_ms = now_ms - offset_ms
                    record.counted_ms = now_ms
                self.jobs[planned_job_id(self.definition.id, user, record.at_ms)] = (record.base_ms + offset_ms, "pending")
                record.planned += 1

    def _due_users(self, record: Record, now_ms: int) -> list[tuple[str, int]]:
        """(user, offset in the window) of those to whom the occurrence belongs and whose moments come, in their order."""
        due = []
        for user in sorted(self.lives.keys() - record.decided, key=lambda user: slot(user, self.definition.id)):
            offset_ms = int(slot(user, self.definition.id) * record.window_ms)
            comes = record.base_ms + offset_ms <= now_ms + HORIZON_MS
            if comes and self.lives[user].belongs(record.group, record.at_ms + offset_ms):
                due.append((user, offset_ms))
        return due

    def _awaited(self, group: str) -> list[str]:
        """Whose moments in a group are still to come, as far as its schedule was not looked at."""
        line, found = self.lines[group], []
        for user, life in self.lives.items():
            offset_ms = int(slot(user, self.definition.id) * self.window_ms)
            for one, since, until in life.in_force:
                if one == group and since < until:
                    ends = math.isinf(until)
                    if ends or any(since < at + offset_ms <= until for at in occurrences(line.schedule, line.cursor_ms, int(until))):
                        found.append(user)
        return found


# --- planners that fail ----------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The planner's process is gone."""


class Fault(Enum):
    """What becomes of one call of the store."""

    UNREACHED = "it never reached Redis, and the planner is told so"
    LOST = "it ran, and its answer was lost"
    REPEATED = "it ran, its answer was lost, and the client ran it again"
    DIED = "it ran, and the planner died"

    def __repr__(self) -> str:
        return f"Fault.{self.name}"

    def befall(self, verb: Callable[[], Any]) -> Any:
        if self is Fault.UNREACHED:
            raise StoreUnavailable("not reached")
        answer = verb()
        if self is Fault.LOST:
            raise StoreUnavailable("the answer was lost")
        if self is Fault.DIED:
            raise Crash
        return verb() if self is Fault.REPEATED else answer


class Disturbed:
    """A store for a planner, of which one call is handed to `hook`."""

    def __init__(self, store: Any, call: int, hook: Callable[[Callable[[], Any]], Any]) -> None:
        self._store = store
        self._call = call
        self._hook = hook
        self._calls = count(1)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._store, name)
        if name == "now_ms":
            return verb
        if not callable(verb):  # a part of the store, such as what it keeps for `why`
            part = Disturbed(verb, self._call, self._hook)
            part._calls = self._calls
            return part

        def run(*args: Any, **options: Any) -> Any:
            if next(self._calls) == self._call:
                return self._hook(lambda: verb(*args, **options))
            return verb(*args, **options)

        return run


# --- random programs -------------------------------------------------------------------------------------------------

USERS = ("ann", "bob", "cyd")
#: Subscribed to all from beginning to end, so that the definitions' own groups are always there.
EVER = "eve"


def _schedule(**fields: Any) -> Schedule:
    return define(**fields).schedule


def _daily(hour: int, minute: int, timezone: str) -> Schedule:
    return _schedule(interval={"type": "daily", "at_time": {"hour": hour, "minute": minute}, "timezone": timezone})


#: What the schedule of `report` may become: even minutes only, while own schedules have odd ones.
REPORT: tuple[dict[str, Any], ...] = (
    {"interval": {"type": "minutely", "value": 2}},
    {"interval": {"type": "minutely", "value": 6}},
    {"interval": {"type": "hourly", "at_time": {"minute": 20}}},
    {"cron": "*/10 * * * *"},
    {"interval": {"type": "daily", "at_time": {"hour": 9, "minute": 30}, "timezone": "Asia/Kolkata"}},
)
SYNC = {"interval": {"type": "minutely", "value": 2}}
#: Own schedules by definition. Those of `report` never come due together, those of `sync` do.
OWN: dict[str, tuple[Schedule, ...]] = {
    "report": (
        _schedule(cron={"expression": "1-59/10 * * * *", "timezone": "UTC"}),
        _schedule(interval={"type": "hourly", "at_time": {"minute": 23}, "timezone": "Asia/Kolkata"}),
        _daily(9, 5, "Europe/Berlin"),
        _daily(17, 27, "Asia/Tokyo"),
    ),
    "sync": (
        _schedule(interval={"type": "minutely", "value": 3}),
        _schedule(cron={"expression": "*/2 * * * *", "timezone": "UTC"}),
        _schedule(interval={"type": "hourly", "value": 2, "at_time": {"hour": 1, "minute": 30}, "timezone": "America/New_York"}),
        _daily(8, 30, "UTC"),
    ),
}
#: Policy and catch-up window. Catching up all of a day would take a day, so it is 40 minutes at the most.
CATCH_UP = tuple({"policy": policy, "window": window} for policy in ("skip", "latest", "all") for window in ("3m", "20m", "40m"))

#: Short ones most often: around the horizon, inside a window, over some windows, and outages.
WAITS = [(0, 1), (HORIZON_MS - 1, HORIZON_MS + 1), *[(0, 45_000)] * 4, *[(0, 10 * MINUTE)] * 4, (0, 3 * HOUR), (20 * HOUR, 28 * HOUR)]


def _one(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(arguments)


waits = st.sampled_from(WAITS).flatmap(lambda span: st.integers(*span))
users = st.sampled_from(USERS)
definitions = st.sampled_from(sorted(OWN))
failing = {"after_ms": waits, "call": st.integers(1, 20), "fault": st.sampled_from(Fault)}
#: What can happen, how often, and with what: methods of `Planning`.
ACTS: dict[str, tuple[int, st.SearchStrategy[dict[str, Any]]]] = {
    "tick": (6, _one(after_ms=waits)),
    "tick_with_a_fault": (2, _one(**failing)),
    "tick_of_two": (1, _one(after_ms=waits, call=st.integers(1, 12))),
    "sleep_in_a_tick": (2, _one(after_ms=waits, call=st.integers(1, 12), asleep_ms=waits)),
    "fail_over": (1, _one(**failing)),
    "deploy": (
        1,
        _one(
            number=st.integers(0, len(REPORT) - 1),
            window=st.sampled_from(["0s", "30s", "90s", "10m"]),
            catch_up=st.sampled_from(CATCH_UP),
            **failing,
        ),
    ),
    "subscribe": (5, _one(user=users, name=definitions, number=st.none() | st.integers(0, 3))),
    "unsubscribe": (1, _one(user=users, name=definitions)),
    "switch": (2, _one(user=users, name=definitions, on=st.booleans())),
    "pause_user": (2, _one(user=users, pause=st.booleans())),
    "pause_subscription": (2, _one(user=users, name=definitions, pause=st.booleans())),
    "pause_definition": (1, _one(name=definitions, pause=st.booleans())),
    "wait": (1, _one(ms=waits)),
    "set_the_clock_back": (2, _one(ms=st.sampled_from([1, HORIZON_MS, MINUTE, 5 * MINUTE, 10 * MINUTE]))),
}
NAMES = [name for name, (often, _) in ACTS.items() for _ in range(often)]
#: None does nothing: programs are long, and what a failure does not need goes.
steps = st.sampled_from([None, *NAMES]).flatmap(lambda name: st.tuples(st.just(name), ACTS[name][1]) if name else st.none())
programs = st.lists(steps, min_size=40, max_size=40).map(lambda program: [step for step in program if step])


class Planning:
    """Does the same to the store and to the model."""

    def __init__(self, client: redis.Redis, store: Store, clock: Clock) -> None:
        self.client, self.store, self.clock = client, store, clock
        client.flushall()
        clock.now_ms = 1_800_000_017_345
        self.furthest_ms = clock.now_ms
        self.set_back = False
        self.disagreement: AssertionError | None = None
        self.paused_users: set[str] = set()
        self.models = {
            "report": Model(define("report", **REPORT[0], window="90s", catch_up=CATCH_UP[5]), self.paused_users),
            "sync": Model(define("sync", **SYNC, window="150s", catch_up=CATCH_UP[8]), self.paused_users),
        }
        self.planner = self._planner()
        self.planner.lead()
        store.create_users([*USERS, EVER], actor=ACTOR)
        for name in self.models:
            self._subscribe(EVER, name, None)

    # planners

    def tick(self, after_ms: int) -> None:
        """The planner does all that is due."""
        self._wait(after_ms)
        self._advance(self.planner)

    def tick_with_a_fault(self, after_ms: int, call: int, fault: Fault) -> None:
        """Whatever comes next finds what that left."""
        self._wait(after_ms)
        self._try(self._planner(self._disturbed(call, fault.befall)))

    def tick_of_two(self, after_ms: int, call: int) -> None:
        """A second planner does all between two calls of the first."""
        self._wait(after_ms)

        def both(verb: Callable[[], Any]) -> Any:
            answer = verb()
            self._advance_inside(self._planner())
            return answer

        self._advance(self._planner(self._disturbed(call, both)))

    def sleep_in_a_tick(self, after_ms: int, call: int, asleep_ms: int) -> None:
        """The leader stands still before a call; another leads meanwhile; then the old one goes on with what it knew."""
        self._wait(after_ms)

        def asleep(verb: Callable[[], Any]) -> Any:
            other = self._planner()
            other.lead()
            self._advance_inside(other)
            self._wait(asleep_ms)
            self._advance_inside(other)
            return verb()

        self._advance(self._planner(self._disturbed(call, asleep)))

    def fail_over(self, after_ms: int, call: int, fault: Fault) -> None:
        """Another planner takes over, and may not get through with it."""
        self._wait(after_ms)
        self._try(self._planner(self._disturbed(call, fault.befall)), lead=True)

    def deploy(self, after_ms: int, number: int, window: str, catch_up: Any, call: int, fault: Fault) -> None:
        """A new leader with another catalogue. Where its first attempt fails, a second one comes at once."""
        self._wait(after_ms)
        self.models["report"].definition = define("report", **REPORT[number], window=window, catch_up=catch_up)
        self._try(self._planner(self._disturbed(call, fault.befall)), lead=True)
        self.planner = self._planner()
        self._try(self.planner, lead=True)

    # users and operators

    def subscribe(self, user: str, name: str, number: int | None) -> None:
        """A new subscription, or another schedule for one; with `number` an own one."""
        self._subscribe(user, name, number)

    def unsubscribe(self, user: str, name: str) -> None:
        if user in self.models[name].lives:
            self.store.unsubscribe(user, name, actor=ACTOR)
            del self.models[name].lives[user]
            self.models[name].cancel(user)

    def switch(self, user: str, name: str, on: bool) -> None:
        """Enable or disable a subscription."""
        if life := self.models[name].lives.get(user):
            effect_ms = self._effect_ms()
            subscribe(self.store, user, name, horizon=HORIZON, own_schedule=None, enabled=on)
            life.switch(on, effect_ms)
            if not on:
                self.models[name].cancel(user)

    def pause_user(self, user: str, pause: bool) -> None:
        if pause:
            self.store.pause_user(user, actor=ACTOR)
            self.paused_users.add(user)
        else:
            self.store.resume_user(user, actor=ACTOR)
            self.paused_users.discard(user)

    def pause_subscription(self, user: str, name: str, pause: bool) -> None:
        if life := self.models[name].lives.get(user):
            change = self.store.pause_subscription if pause else self.store.resume_subscription
            change(user, name, actor=ACTOR)
            life.paused = pause

    def pause_definition(self, name: str, pause: bool) -> None:
        if pause:
            self.store.pause_definition(name, why="maintenance", actor=ACTOR)
        else:
            self.store.resume_definition(name, actor=ACTOR)
        self.models[name].why_paused = "maintenance" if pause else ""

    def wait(self, ms: int) -> None:
        """Nobody plans."""
        self._wait(ms)

    def set_the_clock_back(self, ms: int) -> None:
        self.clock.now_ms -= ms
        self.set_back = True

    # inside

    def end(self) -> None:
        """Some more ticks, and a look at the whole database."""
        for _ in range(6):
            self._wait(30_000)
            self._advance(self.planner)
        assert_consistent(self.client, self.store, clock_set_back=self.set_back)

    def _planner(self, store: Store | Disturbed | None = None) -> Planner:
        catalogue = {name: model.definition for name, model in self.models.items()}
        return Planner(cast("Store", store or self.store), catalogue, horizon=HORIZON, batch=2)

    def _disturbed(self, call: int, hook: Callable[[Callable[[], Any]], Any]) -> Disturbed:
        return Disturbed(self.store, call, hook)

    def _wait(self, ms: int) -> None:
        self.clock.now_ms += ms

    def _advance(self, planner: Planner) -> None:
        planner.advance(budget=timedelta(minutes=5))
        if self.disagreement:
            raise self.disagreement
        self._compare(whole=True)

    def _advance_inside(self, planner: Planner) -> None:
        """The same inside a call of another planner, which takes a failure for one of its store's."""
        try:
            self._advance(planner)
        except AssertionError as fault:
            self.disagreement = self.disagreement or fault

    def _try(self, planner: Planner, *, lead: bool = False) -> None:
        """A tick that may fail on the way."""
        try:
            if lead:
                planner.lead()
            planner.advance(budget=timedelta(minutes=5))
        except (Crash, StoreUnavailable):
            self._compare(whole=False)
        else:
            self._compare(whole=True)

    def _effect_ms(self) -> int:
        """When a change that is made now takes effect."""
        reach_ms = int(self.store.planner().get("reach", 0))
        assert reach_ms <= self.furthest_ms + HORIZON_MS
        return max(self.clock.now_ms + HORIZON_MS, reach_ms)

    def _subscribe(self, user: str, name: str, number: int | None) -> None:
        model, effect_ms = self.models[name], self._effect_ms()
        if number is None:
            group, schedule = name, model.definition.schedule
        else:
            schedule = OWN[name][number]
            group = f"{name}~{hashlib.sha256(schedule_to_json(schedule).encode()).hexdigest()[:12]}"
        is_new = user not in model.lives
        result = subscribe(self.store, user, name, horizon=HORIZON, schedule=schedule, own_schedule=number is not None)
        assert (result is SubscribeResult.CREATED) == is_new
        model.subscribe(user, group, schedule, effect_ms)

    def _compare(self, *, whole: bool) -> None:
        """Let the model do what was done, and hold the store against it."""
        self.furthest_ms = max(self.furthest_ms, self.clock.now_ms)
        for name, model in self.models.items():
            seen = self._seen(name)
            model.follow(self.clock.now_ms, seen, whole=whole, clock_is_right=self.clock.now_ms == self.furthest_ms)
            assert dict(_told(seen.records.values())) == dict(_wanted(model.records.values()))
            found = {job.id: (job.execute_after_ms, job.state.value) for job in self.store.jobs(definition=name, limit=100_000).items}
            assert found == model.jobs

    def _seen(self, name: str) -> Seen:
        groups = (self.store.group(gid) for gid in cast("set[str]", self.client.smembers(f"tp:groups:{name}")))
        records = self.store.occurrences(name, limit=100_000)
        return Seen({group.id: group for group in groups if group}, {(one.group, one.at_ms): one for one in records})


def _told(records: Any) -> Iterator[tuple[tuple[str, int], tuple[Any, ...]]]:
    """What is recorded, by occurrence; of one that was skipped its window says nothing."""
    for one in records:
        window = (one.base_ms, one.window_ms) if one.state != "skipped" else ()
        why = one.reason if one.state == "skipped" else ""
        yield (one.group, one.at_ms), (one.state, one.source, one.last_ms, window, one.planned, one.paused, one.disabled, why)


def _wanted(records: Any) -> Iterator[tuple[tuple[str, int], tuple[Any, ...]]]:
    for one in records:
        state = "skipped" if one.why_skipped else "done" if one.done else "open"
        window = (one.base_ms, one.window_ms) if state != "skipped" else ()
        counts = (one.planned, one.paused, one.disabled)
        yield (one.group, one.at_ms), (state, one.source, one.last_ms, window, *counts, one.why_skipped)


@settings(deadline=None, database=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(program=programs)
def test_random_programs(
    client: redis.Redis, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture, program: list[tuple[str, dict[str, Any]]]
) -> None:
    """Whatever users, operators, planners and the clock do: just the jobs and the records that the rules ask for."""
    # so that a failure prints the program, not what was missed in it
    caplog.set_level(logging.ERROR, "taskplatform.planner")
    planning = Planning(client, store, clock)
    for act, arguments in program:
        getattr(planning, act)(**arguments)
    planning.end()
