"""The plan and the release of hours to come, by the platform's own code, in seconds.

What comes due is decided by `windows.Windows`, as the planner does it, at the instants at which the planner would look: the occurrences
of each group, by its schedule, are opened one horizon before they are due, together with what else is due then. Behind it stands this
simulation instead of the store. What then becomes of the jobs is `fluid.Stream`. It works with groups and how many are in them, never
with users.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from taskplatform.fluid import Lane, Pool, Stream
from taskplatform.forecast.measures import Measure
from taskplatform.forecast.overlap import OneAtATime
from taskplatform.model import Definition, Limit, Priority, Schedule, schedule_to_json
from taskplatform.schedule import next_occurrence
from taskplatform.store import BackfillState, Commitment, Group, Outlook, commitment_of
from taskplatform.windows import TOGETHER, Round, Windows


@dataclass(frozen=True, slots=True)
class Added:
    """Subscribers of a definition that come now; fewer than 0: that came a moment ago, and are taken away."""

    definition: str
    users: int
    schedule: Schedule | None = None
    """Their own; None: the definition's."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An occurrence that the plan opens, of all groups of a definition that are due at once and get the same window."""

    definition: str
    at_ms: int
    start_ms: int
    """Where its window begins."""
    window_ms: int
    asked_ms: int
    """How wide that would be without limits."""
    members: int
    jobs: float
    """Without the subscribers who are paused or disabled."""
    limit: str
    """What made it wider or later; empty where nothing did."""
    following_ms: int | None
    """When the next occurrence is due."""


class _Window(NamedTuple):
    definition: str
    at_ms: int
    start_ms: int
    window_ms: int
    limit: str
    following_ms: int | None


class Simulation:
    """One course of things. `Ledger` for the windows."""

    def __init__(
        self,
        outlook: Outlook,
        catalogue: Mapping[str, Definition],
        measures: Mapping[str, Measure],
        *,
        horizon: timedelta,
        end_ms: int,
        bin_ms: int,
        limits: Mapping[str, Limit],
        tokens: Mapping[str, float],
        pools: Sequence[Pool] | None,
        share: float,
        more: Sequence[Added],
    ) -> None:
        """`pools` and `share` as for `Stream`."""
        self._outlook = outlook
        self._measures = measures
        self._horizon = horizon
        self._horizon_ms = round(horizon / timedelta(milliseconds=1))
        self._limits = limits
        #: What is planned and released: published, in the catalogue, and not paused.
        self.definitions = {
            name: definition
            for name, definition in catalogue.items()
            if name in outlook.definitions and not outlook.definitions[name].paused
        }
        hosts = {name: known.host for name, known in outlook.definitions.items()}
        self._hosts = hosts
        self._windows = Windows(self, self.definitions, horizon=horizon, hosts=hosts)
        held = {one.name.removeprefix("host:"): one.held_until_ms for one in outlook.limits if one.held_until_ms is not None}
        self.stream = Stream(outlook.now_ms, end_ms, bin_ms, limits=limits, tokens=tokens, pools=pools, holds=held, share=share)
        self.opened: list[Opened] = []
        self.one_at_a_time = OneAtATime(self.stream, self._horizon_ms, lambda name: self._lane(name, self._priority(name)))
        self._groups: dict[str, Group] = {}
        self._members: dict[str, int] = {}
        self._jobs: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []
        #: Open occurrences: (definition, start, window) → subscribers.
        self._open: defaultdict[tuple[str, int, int], int] = defaultdict(int)
        self._begin(more)

    def run(self) -> None:
        """To the end."""
        end_ms = self.stream.end_ms
        while (next_ms := self._next_ms()) < end_ms:
            now_ms = max(round(next_ms), self.stream.now_ms)
            self.stream.advance(now_ms)
            if now_ms >= end_ms:
                break
            self.one_at_a_time.decide()
            together: list[str] = []
            while self._due and self._due[0][0] <= now_ms and len(together) < TOGETHER:
                together.append(heappop(self._due)[1])
            if together:
                self._plan(together, now_ms)
        self.stream.advance(end_ms)

    def _next_ms(self) -> float:
        """When something is to be planned."""
        due_ms = self._due[0][0] if self._due else math.inf
        decide_ms = self.one_at_a_time.next_ms
        return due_ms if decide_ms is None else min(due_ms, decide_ms)

    # --- what the windows ask ---------------------------------------------------------------------------------------

    def limits(self) -> Mapping[str, Limit]:
        return self._limits

    def sizes(self, groups: Sequence[tuple[str, str]]) -> list[int]:
        return [self._members[gid] for gid, _ in groups]

    def commitments(self, *, horizon: timedelta) -> list[Commitment]:  # noqa: ARG002 - it is this one's
        now_ms = self.stream.now_ms
        # the planner is done with those whose last moments come within the horizon
        for key in [key for key in self._open if key[1] + key[2] <= now_ms + self._horizon_ms]:
            del self._open[key]
        found = [
            Commitment(lane.definition, lane.priority, now_ms, now_ms, round(lane.waits))
            for lane in self.stream.lanes.values()
            if lane.waits >= 0.5
        ]
        for (definition, start_ms, window_ms), members in self._open.items():
            found.append(commitment_of(definition, start_ms, window_ms, members, now_ms=now_ms))
        return found

    # --- how it begins ----------------------------------------------------------------------------------------------

    def _begin(self, more: Sequence[Added]) -> None:
        outlook, now_ms = self._outlook, self._outlook.now_ms
        for one in outlook.groups:
            definition = self.definitions.get(one.group.definition)
            if definition is not None:
                group, due_ms = one.group, one.due_ms
                if group.id == definition.id and group.schedule != definition.schedule:
                    # as if what is here were published now: the old schedule's occurrences are opened up to then
                    group = replace(group, schedule=definition.schedule, cursor_ms=max(group.cursor_ms, now_ms))
                    due_ms = now_ms
                self._add_group(group, one.members, due_ms)
                self._jobs[one.group.id] = one.members * outlook.definitions[one.group.definition].present
        for added in more:
            if added.definition in self.definitions:
                self._add_subscribers(added)
        heapify(self._due)
        of_backfills = self._begin_backfills()

        def others(place: tuple[str, Priority], jobs: int) -> int:
            some = min(jobs, of_backfills[place])
            of_backfills[place] -= some
            return jobs - some

        for place, jobs in outlook.queued.items():
            self._come(place, now_ms, now_ms, others(place, jobs))
        for place, waiting in outlook.waiting.items():
            self._come(place, now_ms, now_ms, others(place, waiting.due))
            soon_ms = now_ms + self._horizon_ms
            self._come(place, now_ms, soon_ms, others(place, waiting.soon))
            for hour, jobs in enumerate(waiting.later):
                begin_ms = soon_ms + hour * 3_600_000
                self._come(place, begin_ms, begin_ms + 3_600_000, jobs)
        users: defaultdict[str, float] = defaultdict(float)
        for gid, jobs_of in self._jobs.items():
            users[self._groups[gid].definition] += jobs_of
        for name in filter(self._lets_one_be, self.definitions):
            runs, measure = outlook.running.get(name, 0), self._measures[name]
            self.one_at_a_time.begin(
                name, users=users[name], running=runs, until_ms=self._ends_ms(name, measure.seconds * measure.attempts)
            )
        for occurrence in outlook.open:
            if occurrence.definition in self.definitions:
                known = outlook.definitions[occurrence.definition]
                end_ms = occurrence.start_ms + occurrence.window_ms
                begin_ms = max(occurrence.start_ms, now_ms + self._horizon_ms)
                left = occurrence.left * known.present
                if self._lets_one_be(occurrence.definition):
                    gid = occurrence.id.partition("|")[0]
                    self.one_at_a_time.open(gid, occurrence.definition, occurrence.start_ms, occurrence.window_ms, left, begin_ms=begin_ms)
                else:
                    self._come((occurrence.definition, known.priority), begin_ms, end_ms, left)
                self._open[occurrence.definition, occurrence.start_ms, occurrence.window_ms] += occurrence.members
        for name, runs in outlook.running.items():
            if name in self.definitions:
                lane = self._lane(name, outlook.definitions[name].priority)
                self.stream.run(lane, runs, self._ends_ms(name, lane.seconds))

    def _ends_ms(self, name: str, seconds: float) -> float:
        """When those end that run now, if each takes so long."""
        now_ms = self._outlook.now_ms
        # halfway through, as the mean of those that are seen running, where nothing else is known
        return max(now_ms, self._outlook.running_since_ms.get(name, now_ms - seconds * 500) + seconds * 1000)

    def _begin_backfills(self) -> Counter[tuple[str, Priority]]:
        """Let those that run go on. Returns how many jobs of theirs wait, which are no others'."""
        outlook, found = self._outlook, Counter[tuple[str, Priority]]()
        for one in outlook.backfills:
            if one.definition in self.definitions and one.state is BackfillState.RUNNING:
                # its jobs are low, whatever the definition is
                place = (one.definition, Priority.LOW)
                lane = self._lane(*place, backfill=one.id)
                waiting = outlook.waiting.get(place)
                there = outlook.queued.get(place, 0) + (waiting.due + waiting.soon if waiting else 0) - found[place]
                found[place] += (unfinished := min(one.unfinished, there))
                self.stream.add(lane, outlook.now_ms, outlook.now_ms, unfinished)
                self.stream.supply(lane, one.per_second, one.left * outlook.definitions[one.definition].present, one.most_unfinished)
        return found

    def _add_subscribers(self, added: Added) -> None:
        if added.users < 0:
            # which groups they came to is not told: they are taken from all
            gids = [gid for gid, group in self._groups.items() if group.definition == added.definition]
            there = sum(self._members[gid] for gid in gids)
            share = max(0.0, 1 + added.users / there) if there else 0.0
            for gid in gids:
                self._members[gid] = round(self._members[gid] * share)
                self._jobs[gid] *= share
            return
        gid = added.definition
        if added.schedule is not None:
            # the digests of groups are the store's: own schedules that there are already are others here, with the same windows
            gid = f"{added.definition}~{schedule_to_json(added.schedule)}"
        if gid not in self._groups:
            schedule = added.schedule or self.definitions[added.definition].schedule
            group = Group(gid, added.definition, schedule, self._outlook.now_ms + self._horizon_ms)
            following_ms = next_occurrence(group.schedule, group.cursor_ms)
            if following_ms is None:
                return
            self._add_group(group, 0, following_ms - self._horizon_ms)
            self._jobs[gid] = 0.0
        self._members[gid] += added.users
        self._jobs[gid] += added.users

    def _add_group(self, group: Group, members: int, due_ms: float) -> None:
        self._groups[group.id] = group
        self._members[group.id] = members
        self._due.append((due_ms, group.id))

    def _come(self, place: tuple[str, Priority], start_ms: int, end_ms: int, jobs: float) -> None:
        if jobs and place[0] in self.definitions:
            self.stream.add(self._lane(*place), start_ms, end_ms, jobs)

    def _lane(self, definition: str, priority: Priority, *, backfill: str = "") -> Lane:
        measure, host = self._measures[definition], self._hosts[definition]
        return self.stream.lane(definition, priority, backfill=backfill, host=host, attempts=measure.attempts, seconds=measure.seconds)

    def _priority(self, definition: str) -> Priority:
        return self.definitions[definition].priority

    def _lets_one_be(self, definition: str) -> bool:
        return self.definitions[definition].overlap == "skip"

    # --- planning ---------------------------------------------------------------------------------------------------

    def _plan(self, gids: Sequence[str], now_ms: int) -> None:
        """What `Planner` does with groups that are due, and what the scripts `open` and `plan` make of that."""
        rounds = [self._windows.round(group, self.definitions[group.definition], now_ms) for group in map(self._groups.__getitem__, gids)]
        self._windows.widen(rounds, now_ms)
        found: defaultdict[_Window, list[float]] = defaultdict(lambda: [0, 0.0])
        for one in rounds:
            self._open_round(one, now_ms, found)
            self._groups[one.group.id] = replace(one.group, cursor_ms=one.cursor_ms)
            if one.following_ms is not None:
                heappush(self._due, (one.following_ms - self._horizon_ms, one.group.id))
        for key, (members, jobs) in found.items():
            asked_ms = round(self.definitions[key.definition].window / timedelta(milliseconds=1))
            self.opened.append(
                Opened(key.definition, key.at_ms, key.start_ms, key.window_ms, asked_ms, int(members), jobs, key.limit, key.following_ms)
            )
            self._open[key.definition, key.start_ms, key.window_ms] += int(members)
            if not self._lets_one_be(key.definition):
                self._come((key.definition, self._priority(key.definition)), key.start_ms, key.start_ms + key.window_ms, jobs)

    def _open_round(self, one: Round, now_ms: int, found: Mapping[_Window, list[float]]) -> None:
        by_limit = {opening.at_ms: window.limit for opening, _, window in one.widened}
        late = 0
        for opening in one.openings:
            if opening.source == "skip":
                continue
            window_ms = opening.window_ms
            if window_ms is None:
                window_ms = round(one.definition.window / timedelta(milliseconds=1))
            start_ms = opening.at_ms + opening.delay_ms
            if opening.source == "catch_up":
                # each over a window of its own, one after the other, from now on
                start_ms = now_ms + opening.delay_ms + late * window_ms
                late += 1
            elif start_ms < now_ms - self._horizon_ms:
                # what the planner reaches late is spread from then on
                start_ms = now_ms
            key = _Window(one.definition.id, opening.at_ms, start_ms, window_ms, by_limit.get(opening.at_ms, ""), one.following_ms)
            sums = found[key]
            sums[0] += self._members[one.group.id]
            sums[1] += self._jobs[one.group.id]
            if self._lets_one_be(one.definition.id):
                self.one_at_a_time.open(one.group.id, one.definition.id, start_ms, window_ms, self._jobs[one.group.id])
