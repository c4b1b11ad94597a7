"""What was done and what was seen to happen, in plain Python, and what must therefore have become of each occurrence.

The book is written as things happen: each change that somebody made, each look of the planner, each start and end of a run. It also
notes what the platform can be seen to have made, jobs and occurrences, because limits may widen windows; but never asks the platform why.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from bench.day.engine import Run
from bench.day.rules import Rule, due_times
from taskplatform.model import JobState

Pair = tuple[str, str]
"""A user and a definition."""


class What(StrEnum):
    """What somebody did."""

    SUBSCRIBED = "subscribed"
    UNSUBSCRIBED = "unsubscribed"
    DISABLED = "disabled"
    ENABLED = "enabled"
    PAUSED = "subscription paused"
    RESUMED = "subscription resumed"
    SCHEDULE = "schedule changed"
    USER_PAUSED = "user paused"
    USER_RESUMED = "user resumed"
    DEFINITION_PAUSED = "definition paused"
    DEFINITION_RESUMED = "definition resumed"
    REMOVED = "definition removed"
    PUBLISHED = "definition published"
    CANCELED = "canceled"
    DISCARDED = "discarded"
    LIMIT = "limit changed"
    HELD = "host held back"
    FREED = "host let go"
    PLANNER_DOWN = "planner stopped"
    PLANNER_UP = "planner started"
    WORKER_DOWN = "worker died"


@dataclass(frozen=True, slots=True)
class Deed:
    """A change that somebody made."""

    at_ms: int
    what: What
    actor: str
    user: str = ""
    definition: str = ""
    job: str = ""
    rule: Rule | None = None


class Fate(StrEnum):
    """What became of an occurrence for a user."""

    COMPLETED = "completed"
    RUNNING = "running"
    WAITING = "waiting"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    POISON = "poison pill"
    CANCELED = "canceled"
    DISCARDED = "discarded"
    OVERLAP = "overlap"
    REJECTED = "rejected"
    MISSED = "missed"
    SKIPPED = "skipped"
    COMING = "coming"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The book's answer."""

    fate: Fate
    moment_ms: int | None
    causes: tuple[Deed, ...] = ()
    """Who did what: one of these must be named, where there are any."""
    outage: tuple[int, int] | None = None
    note: str = ""


@dataclass(slots=True)
class Seen:
    """An occurrence that the platform has a record of."""

    group: str
    at_ms: int
    last_ms: int
    base_ms: int
    window_ms: int
    state: str
    source: str
    reason: str
    opened_ms: int
    done_ms: int | None
    cursor: float
    moved: bool


@dataclass
class Kind:
    """A definition, as far as the book must know it: its rules from instants on (None: there was none)."""

    name: str
    window_ms: int
    catch_up: str
    catch_up_ms: int
    overlap: bool
    rules: list[tuple[int, Rule | None]]

    def rule_at(self, at_ms: int) -> Rule | None:
        """The schedule in force for who has no own one."""
        place = bisect_right(self.rules, at_ms, key=lambda entry: entry[0]) - 1
        return self.rules[place][1] if place >= 0 else None


@dataclass
class Book:
    """See the module."""

    horizon_ms: int
    kinds: dict[str, Kind] = field(default_factory=dict)
    deeds: list[Deed] = field(default_factory=list)
    of_pair: defaultdict[Pair, list[Deed]] = field(default_factory=lambda: defaultdict(list))
    of_user: defaultdict[str, list[Deed]] = field(default_factory=lambda: defaultdict(list))
    of_definition: defaultdict[str, list[Deed]] = field(default_factory=lambda: defaultdict(list))
    of_job: defaultdict[str, list[Deed]] = field(default_factory=lambda: defaultdict(list))
    ticks: list[int] = field(default_factory=list)
    runs: defaultdict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    losses: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    poison: dict[str, int] = field(default_factory=dict)
    """By job, when its last loss made it a poison pill."""
    made: dict[str, int] = field(default_factory=dict)
    """Jobs that were seen, and when they were made."""
    made_of: defaultdict[Pair, list[str]] = field(default_factory=lambda: defaultdict(list))
    seen: defaultdict[str, dict[str, Seen]] = field(default_factory=lambda: defaultdict(dict))
    """By definition and id, the occurrences of which there is a record."""

    # --- writing

    def did(self, deed: Deed) -> None:
        """Somebody did something."""
        self.deeds.append(deed)
        if deed.job:
            self.of_job[deed.job].append(deed)
        if deed.user and deed.definition:
            self.of_pair[deed.user, deed.definition].append(deed)
        elif deed.user:
            self.of_user[deed.user].append(deed)
        elif deed.definition:
            self.of_definition[deed.definition].append(deed)
        if deed.what is What.PUBLISHED:
            self.kinds[deed.definition].rules.append((deed.at_ms, deed.rule))
        elif deed.what is What.REMOVED:
            self.kinds[deed.definition].rules.append((deed.at_ms, None))

    def ticked(self, at_ms: int) -> None:
        """The planner looked at all that was due."""
        self.ticks.append(at_ms)

    def started(self, run: Run) -> None:
        """A run began."""
        self.runs[run.job_id].append(run)

    def ended(self, run: Run) -> None:
        """A run ended, or was lost: the run says so itself."""

    def job_seen(self, job_id: str, made_ms: int) -> None:
        """The platform has this job."""
        if job_id not in self.made:
            self.made[job_id] = made_ms
            definition, user, _ = job_id.split(":", 2)
            self.made_of[user, definition].append(job_id)

    def lost(self, job_id: str, at_ms: int, most_losses: int) -> None:
        """A job was taken from a worker that died."""
        self.losses[job_id].append(at_ms)
        if len(self.losses[job_id]) >= most_losses:
            self.poison[job_id] = at_ms

    # --- reading

    def triggers(self, definition: str) -> set[int]:
        """The times of its extra occurrences."""
        return {one.at_ms for one in self.seen[definition].values() if one.source == "trigger"}

    def pairs(self) -> list[Pair]:
        """All who were ever subscribed."""
        return sorted(self.of_pair)

    def causes_at(self, pair: Pair, at_ms: int) -> tuple[bool, list[Deed]]:
        """Whether the pair was subscribed at an instant; and what kept its jobs from being made, or that it was not subscribed."""
        subscribed: Deed | None = None
        gone: Deed | None = None
        kept: dict[str, Deed | None] = {"off": None, "paused": None, "user": None}
        for deed in sorted([*self.of_pair[pair], *self.of_user[pair[0]]], key=lambda deed: deed.at_ms):
            if deed.at_ms > at_ms:
                break
            match deed.what:
                case What.SUBSCRIBED:
                    subscribed, gone = deed, None
                case What.UNSUBSCRIBED:
                    subscribed, gone = None, deed
                    kept["off"] = kept["paused"] = None
                case What.DISABLED:
                    kept["off"] = deed
                case What.ENABLED:
                    kept["off"] = None
                case What.PAUSED:
                    kept["paused"] = deed
                case What.RESUMED:
                    kept["paused"] = None
                case What.USER_PAUSED:
                    kept["user"] = deed
                case What.USER_RESUMED:
                    kept["user"] = None
        if subscribed is None:
            return False, [gone] if gone else []
        return True, [deed for deed in kept.values() if deed is not None]

    def off_at(self, definition: str, at_ms: int) -> Deed | None:
        """Who paused or removed the definition, if it was at that instant."""
        off: Deed | None = None
        for deed in self.of_definition[definition]:
            if deed.at_ms > at_ms:
                break
            if deed.what in (What.DEFINITION_PAUSED, What.REMOVED):
                off = deed
            elif deed.what in (What.DEFINITION_RESUMED, What.PUBLISHED):
                off = None
        return off

    def tick_after(self, at_ms: int, definition: str) -> int | None:
        """When the planner first looked at a definition from an instant on."""
        place = bisect_left(self.ticks, at_ms)
        while place < len(self.ticks):
            off = self.off_at(definition, self.ticks[place])
            if off is None or off.what is not What.REMOVED:
                return self.ticks[place]
            place += 1
        return None

    def outages(self) -> list[tuple[int, int]]:
        """When no planner was there."""
        found, since = [], None
        for deed in self.deeds:
            if deed.what is What.PLANNER_DOWN:
                since = deed.at_ms
            elif deed.what is What.PLANNER_UP and since is not None:
                found.append((since, deed.at_ms))
                since = None
        return found

    def spans(self, pair: Pair) -> Iterator[tuple[int, int, Rule | None]]:
        """The spans (after, until] of moments that belong to one rule each; None is the definition's own, whatever it is then."""
        current: tuple[int, Rule | None] | None = None
        for deed in self.of_pair[pair]:
            effect = deed.at_ms + self.horizon_ms
            if deed.what is What.SUBSCRIBED:
                current = (effect, deed.rule)
            elif current is None:
                continue
            elif deed.what is What.SCHEDULE:
                yield current[0], effect, current[1]
                current = (effect, deed.rule)
            elif deed.what is What.UNSUBSCRIBED:
                yield current[0], effect, current[1]
                current = None
        if current is not None:
            yield current[0], 1 << 60, current[1]

    def fell_between(self, pair: Pair, at_ms: int) -> list[Deed]:
        """Who changed or ended the schedule between an occurrence and the user's moment in it, so that it is of neither schedule."""
        window_ms = max([self.kinds[pair[1]].window_ms, *(one.window_ms for one in self.seen[pair[1]].values() if one.at_ms == at_ms)])
        moment_ms = at_ms + math.floor(place_of(pair) * window_ms)
        whats = (What.SCHEDULE, What.SUBSCRIBED, What.UNSUBSCRIBED)
        return [
            deed for deed in self.of_pair[pair] if deed.what in whats and at_ms <= deed.at_ms + self.horizon_ms and deed.at_ms <= moment_ms
        ]

    def occurrences(self, pair: Pair, until_ms: int) -> list[int]:
        """The due times that were this user's, by the moments that they give without limits."""
        kind = self.kinds[pair[1]]
        widened = {one.at_ms: one.window_ms for one in self.seen[pair[1]].values() if one.window_ms > kind.window_ms}
        widest = max([kind.window_ms, *widened.values()])
        place = place_of(pair)
        found: set[int] = set()
        for after, until, own in self.spans(pair):
            first, last = after - widest, min(until, until_ms)
            candidates = due_times(own, first, last) if own is not None else list(self._default_times(kind, first, last))
            found.update(at for at in candidates if after < at + math.floor(place * widened.get(at, kind.window_ms)) <= until)
        return sorted(found)

    @staticmethod
    def _default_times(kind: Kind, after_ms: int, until_ms: int) -> Iterator[int]:
        ends = [*(since for since, _ in kind.rules[1:]), 1 << 60]
        for (since, rule), end in zip(kind.rules, ends, strict=True):
            if rule is not None and max(after_ms, since) < min(until_ms, end):
                yield from due_times(rule, max(after_ms, since), min(until_ms, end))

    def record_of(self, pair: Pair, at_ms: int) -> Seen | None:
        """The record of an occurrence in the group that the user was in; of a range that was skipped, where it lies in one."""
        records = self.seen[pair[1]]
        own = self.rule_of(pair, at_ms + math.floor(place_of(pair) * self.kinds[pair[1]].window_ms))
        exact = [one for one in records.values() if one.at_ms == at_ms and one.source not in ("trigger", "skip")]
        for one in exact:
            if (own is None) == (one.group == pair[1]):
                return one
        return next((one for one in records.values() if one.source == "skip" and one.at_ms <= at_ms <= one.last_ms), None)

    def rule_of(self, pair: Pair, moment_ms: int) -> Rule | None:
        """The own schedule to which a moment belongs."""
        return next((own for after, until, own in self.spans(pair) if after < moment_ms <= until), None)

    def own_rule(self, pair: Pair) -> Rule | None:
        """The own schedule that was given last; None is the definition's."""
        given = [deed.rule for deed in self.of_pair[pair] if deed.what in (What.SUBSCRIBED, What.SCHEDULE)]
        return given[-1] if given else None

    # --- judging

    def verdict(self, pair: Pair, at_ms: int, now_ms: int) -> Verdict:
        """What became of the occurrence at `at_ms`, seen at `now_ms`."""
        job_id = f"{pair[1]}:{pair[0]}:{at_ms}"
        if job_id in self.made:
            return self.life(job_id, pair, now_ms)
        kind = self.kinds[pair[1]]
        offset = math.floor(place_of(pair) * kind.window_ms)
        record = self.record_of(pair, at_ms)
        if record is not None and record.source != "skip":
            moment_ms = record.base_ms + math.floor(place_of(pair) * record.window_ms)
            due_ms = max(record.opened_ms, moment_ms - self.horizon_ms)
        else:
            moment_ms = at_ms + offset
            due_ms = at_ms - self.horizon_ms
        looked_ms = self.tick_after(due_ms, pair[1])
        if looked_ms is None or looked_ms > now_ms:
            return self._not_looked_at(pair, moment_ms, now_ms)
        if record is not None and record.source == "skip" and "missed" in record.reason:
            return self._missed(pair, at_ms)
        if record is not None and record.state == "skipped":
            # it was closed as soon as the planner came to it
            closed_ms = record.done_ms or record.opened_ms
            before = [self.off_at(pair[1], closed_ms), self.off_at(pair[1], closed_ms - 1)]
            return Verdict(Fate.SKIPPED, None, tuple(deed for deed in before if deed is not None)[:1], note=record.reason)
        subscribed, kept = self.causes_at(pair, looked_ms)
        nominal_ms = at_ms + (offset if record is None else math.floor(place_of(pair) * record.window_ms))
        kept += self._was_off(pair, nominal_ms, looked_ms)
        if not subscribed or kept:
            return Verdict(Fate.SKIPPED, None, tuple(kept), note="kept back when the planner came to it")
        if record is not None and record.moved:
            # nobody knows when the planner came to it: the window was moved
            for instant in (record.opened_ms, record.base_ms, at_ms):
                subscribed, kept = self.causes_at(pair, instant)
                if kept:
                    return Verdict(Fate.SKIPPED, None, tuple(kept), note="kept back while the window was moved")
        return Verdict(Fate.SKIPPED, moment_ms, note="the book does not know why there is no job")

    def _was_off(self, pair: Pair, nominal_ms: int, looked_ms: int) -> list[Deed]:
        """Who switched the subscription off, where it is on again and the moment does not come back."""
        off: Deed | None = None
        for deed in self.of_pair[pair]:
            if deed.what is What.DISABLED:
                off = deed
            elif deed.what is What.UNSUBSCRIBED:
                off = None
            elif deed.what is What.ENABLED and off is not None:
                if deed.at_ms <= looked_ms and nominal_ms <= deed.at_ms + self.horizon_ms:
                    return [off]
                off = None
        return []

    def _not_looked_at(self, pair: Pair, moment_ms: int, now_ms: int) -> Verdict:
        off = self.off_at(pair[1], now_ms)
        if off is not None and off.what is What.REMOVED:
            return Verdict(Fate.SKIPPED, None, (off,), note="the definition is removed")
        return Verdict(Fate.COMING, moment_ms, note=f"the planner has not come to it by {now_ms}")

    def _missed(self, pair: Pair, at_ms: int) -> Verdict:
        removed = self.off_at(pair[1], at_ms) or self.off_at(pair[1], at_ms - self.horizon_ms)
        if removed is not None:
            return Verdict(Fate.MISSED, None, (removed,))
        # an occurrence is opened a horizon before its time
        outage = next(((since, until) for since, until in self.outages() if since <= at_ms <= until + self.horizon_ms), None)
        return Verdict(Fate.MISSED, None, outage=outage)

    def life(self, job_id: str, pair: Pair, now_ms: int) -> Verdict:
        """What became of a job that was made."""
        deeds = [deed for deed in self.of_job[job_id] if deed.at_ms <= now_ms]
        if deeds and deeds[-1].what is What.DISCARDED:
            return Verdict(Fate.DISCARDED, None, (deeds[-1],))
        runs = [run for run in self.runs.get(job_id, ()) if run.started_ms <= now_ms]
        ended = [run for run in runs if run.ends_ms <= now_ms and run.recorded]
        if ended and ended[-1].state.terminal:
            fates = {JobState.COMPLETED: Fate.COMPLETED, JobState.FAILED: Fate.FAILED, JobState.TIMED_OUT: Fate.TIMED_OUT}
            return Verdict(fates[ended[-1].state], None)
        if self.poison.get(job_id, now_ms + 1) <= now_ms:
            return Verdict(Fate.POISON, None)
        if not runs and self.kinds[pair[1]].overlap and self._overlaps(job_id, pair, self.made[job_id]):
            return Verdict(Fate.OVERLAP, None)
        canceled = [deed for deed in deeds if deed.what is What.CANCELED]
        # who ends or switches off a subscription cancels what waits of it
        made_ms = self.made[job_id]
        running = bool(runs) and runs[-1].ends_ms > now_ms and runs[-1].lost_ms is None
        canceled += [
            deed
            for deed in self.of_pair[pair]
            if deed.what in (What.UNSUBSCRIBED, What.DISABLED) and made_ms <= deed.at_ms <= now_ms and not _runs_at(runs, deed.at_ms)
        ]
        if canceled:
            return Verdict(Fate.CANCELED, None, tuple(canceled))
        if running:
            return Verdict(Fate.RUNNING, None)
        removed = [deed for deed in self.of_definition[pair[1]] if deed.what is What.REMOVED and made_ms <= deed.at_ms <= now_ms]
        if removed:
            return Verdict(Fate.REJECTED, None, tuple(removed))
        record = self.record_of(pair, int(job_id.rpartition(":")[2])) if job_id.rpartition(":")[2].isdigit() else None
        if record is not None and not runs and record.base_ms + math.floor(place_of(pair) * record.window_ms) > now_ms:
            return Verdict(Fate.COMING, None)
        return Verdict(Fate.WAITING, None)

    def _overlaps(self, job_id: str, pair: Pair, made_ms: int) -> bool:
        """Whether another job of the pair was unfinished when this one was made."""
        for other in self.made_of[pair]:
            if other != job_id and self.made[other] <= made_ms:
                runs = self.runs.get(other)
                if not runs:
                    # rejected itself, or canceled, or it had not started yet
                    continue
                last = runs[-1]
                if not (last.recorded and last.ends_ms <= made_ms and last.state.terminal):
                    return True
        return False


def _runs_at(runs: list[Run], at_ms: int) -> bool:
    return any(run.started_ms <= at_ms < run.ends_ms and run.lost_ms is None for run in runs)


def place_of(pair: Pair) -> float:
    """The user's slot: the first 52 bits of BLAKE2b over user and definition."""
    digest = hashlib.blake2b(f"{pair[0]}\0{pair[1]}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 2**12 / 2**52
