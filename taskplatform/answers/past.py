"""What became of a user's occurrences, from what the store kept: pure.

An occurrence is found by the schedules that were in force. What it became is told by its job where there is one; else by the planner's
record of the occurrence, and by how the user and the subscription were when the planner came to the user's moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from taskplatform.answers.timeline import Bar, Stretch, bars, by_whom, latest, schedules, stretches
from taskplatform.answers.values import Answer, Outcome, instant
from taskplatform.model import Job, JobState, Transition, format_ms, planned_job_id, slot, span_text
from taskplatform.schedule import occurrences
from taskplatform.store import Background, Entry, Outage, Seen

#: The planner looks at least this often, unless it is away (`planner._GRACE`).
_GRACE_MS = 60_000
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Place:
    """An occurrence that may be the user's: at a time, in a group."""

    at_ms: int
    group: str
    stretch: Stretch
    trigger: bool = False

    @property
    def suffix(self) -> str:
        """How a job's id names the occurrence."""
        return f"t{self.at_ms}" if self.trigger else str(self.at_ms)


@dataclass(frozen=True, slots=True)
class Case:
    """A place, with what the store has of it."""

    place: Place
    seen: Seen | None
    moment_ms: int
    owner: Stretch | None
    """The stretch to which the moment belongs; None where the user was not in this group then."""
    beyond: bool
    """It came due when the user had left the group."""

    @property
    def fits(self) -> bool:
        """Whether it is the user's."""
        return self.owner is not None

    def holds(self, at_ms: int, window_ms: int) -> bool:
        """Whether an instant lies in its window."""
        base, window = self.place.at_ms, window_ms
        if self.seen is not None and self.seen.occurrence.state != "skipped":
            base, window = self.seen.occurrence.base_ms, max(window, self.seen.occurrence.window_ms)
        return self.place.at_ms <= at_ms <= max(base + window, self.moment_ms)


# --- which occurrences ------------------------------------------------------------------------------------------------


def newest(facts: Background, until_ms: int, count: int, *, beyond_ms: int = 0) -> list[Place]:
    """The places at and before an instant from which the newest `count` occurrences are taken, the newest first.

    With `beyond_ms` also such as a group had so long after the user had left it.
    """
    found: set[Place] = set()
    window_ms = facts.definition.window_ms
    whole = stretches(facts)
    for stretch in reversed(whole):
        oldest = sorted({one.at_ms for one in found}, reverse=True)[count - 1 : count]
        if oldest and stretch.until_ms + beyond_ms < oldest[0]:
            break
        after = stretch.after_ms - (window_ms if stretch.subscribed else 0)
        for schedule, low, high in schedules(facts, stretch):
            until = min(stretch.until_ms + beyond_ms, high, until_ms)
            if max(after, low) < until:
                found.update(Place(at, stretch.group, stretch) for at in latest(schedule, max(after, low), until, count + 1))
    for at in [one for one in facts.definition.triggers if one <= until_ms][-count:]:
        # who changed the group just then has slots in both, and one job
        near = [one for one in whole if one.after_ms - _DAY_MS < at <= one.until_ms + _DAY_MS]
        found.update(Place(at, one.group, one, trigger=True) for one in near if one.after_ms < at <= one.until_ms or one.subscribed)
    return sorted(found, key=lambda one: (one.at_ms, one.trigger), reverse=True)


def of_day(facts: Background, day: date, most: int) -> list[Place]:
    """Those of a day, in the zone of the schedule that is in force at its noon."""
    whole = stretches(facts)
    zone = ZoneInfo(zone_of(facts, whole))
    start = datetime(day.year, day.month, day.day, tzinfo=zone)
    following = day + timedelta(days=1)
    start_ms = round(start.timestamp() * 1000)
    until_ms = round(datetime(following.year, following.month, following.day, tzinfo=zone).timestamp() * 1000) - 1
    return [one for one in newest(facts, until_ms, most) if one.at_ms >= start_ms]


def zone_of(facts: Background, whole: Iterable[Stretch]) -> str:
    """Of the schedule that the subscription has now, or last had."""
    for stretch in reversed(list(whole)):
        for schedule, _, _ in schedules(facts, stretch):
            return schedule.timezone
    return "UTC"


def cases(facts: Background, places: Iterable[Place], seen: Mapping[tuple[str, str], Seen | None]) -> list[Case]:
    """One for each occurrence, the newest first: that of the group in which the user was."""
    whole = stretches(facts)
    place_in_window = slot(facts.user, facts.definition.id)
    by_name: dict[str, list[Case]] = {}
    for place in places:
        record = seen.get((place.group, place.suffix))
        moment_ms = _moment(facts, place, record, place_in_window)
        # what was planned by schedule goes by the time that it was due, whenever its window then began
        nominal = place.at_ms + math.floor(place_in_window * _window(facts, record))
        owner = next((one for one in whole if one.subscribed and one.group == place.group and one.after_ms < nominal <= one.until_ms), None)
        if place.trigger and record is not None and place.stretch.subscribed:
            owner = owner or place.stretch
        inside = place.trigger or place.stretch.after_ms < place.at_ms <= place.stretch.until_ms
        by_name.setdefault(place.suffix, []).append(Case(place, record, moment_ms, owner, not inside))
    found = []
    for rivals in by_name.values():
        found.append(max(rivals, key=lambda one: (one.fits, not one.beyond, one.seen is not None, one.place.stretch.subscribed)))
    return sorted(found, key=lambda one: (one.place.at_ms, one.place.trigger), reverse=True)


def proper(found: list[Case]) -> list[Case]:
    """Without such as only a group had that the user had left, or not joined yet."""
    return [one for one in found if one.fits or not one.beyond]


def belonging(facts: Background, found: list[Case], at_ms: int) -> Case | None:
    """The occurrence that an instant belongs to: due just then, or in whose window it lies, or the latest before."""
    exact = [one for one in found if one.place.at_ms == at_ms or one.moment_ms == at_ms]
    within = [one for one in found if one.holds(at_ms, facts.definition.window_ms)]
    for chosen in (exact, within):
        if chosen:
            return max(chosen, key=lambda one: (one.fits, one.place.at_ms))
    before = [one for one in proper(found) if one.place.at_ms <= at_ms]
    return before[0] if before else None


def _window(facts: Background, record: Seen | None) -> int:
    if record is None or record.occurrence.state == "skipped":
        return facts.definition.window_ms
    return record.occurrence.window_ms


def _moment(facts: Background, place: Place, record: Seen | None, slot_: float) -> int:
    offset = math.floor(slot_ * _window(facts, record))
    base = place.at_ms if record is None or record.occurrence.state == "skipped" else record.occurrence.base_ms
    return base + offset


# --- what became of one -----------------------------------------------------------------------------------------------


def explain(facts: Background, case: Case, job: Job | None, history: tuple[Transition, ...]) -> Answer | None:
    """What became of an occurrence. None where its job waits: `waiting` tells for what."""
    if job is not None:
        return with_job(facts, case, job, history)
    forgotten = facts.forgotten.get(case.place.suffix)
    if forgotten is not None:
        reason = f"its job died at {instant(forgotten.died_ms)} ({forgotten.reason}), and its record was {forgotten.what} at "
        return _answer(facts, case, Outcome.DISCARDED, reason + instant(forgotten.at_ms), _again(facts, case))
    if case.seen is None:
        return _without_record(facts, case)
    if not case.fits:
        return _not_of_group(facts, case)
    record = case.seen.occurrence
    if record.state == "skipped":
        return _skipped(facts, case, case.seen)
    if record.state == "open" and slot(facts.user, facts.definition.id) > case.seen.cursor:
        return _to_come(facts, case)
    return _passed_over(facts, case, case.seen)


def _answer(facts: Background, case: Case, outcome: Outcome, reason: str, mend: str = "", more: Iterable[tuple[str, str]] = ()) -> Answer:
    at_ms = case.place.at_ms
    told = [("occurrence", f"{instant(at_ms)}{', triggered' if case.place.trigger else ''}")]
    if case.seen is not None and case.seen.occurrence.reason not in ("due", "planned"):
        told.append(("the planner's record", case.seen.occurrence.reason))
    return Answer(
        user=facts.user,
        definition=facts.definition.id,
        occurrence_ms=at_ms,
        moment_ms=None if outcome is Outcome.FORGOTTEN else case.moment_ms,
        outcome=outcome,
        reason=reason,
        facts=(*told, *more),
        mend=mend,
    )


def with_job(facts: Background, case: Case, job: Job, history: tuple[Transition, ...]) -> Answer | None:
    """What became of an occurrence that has a job. None where that waits."""
    if job.state in (JobState.PENDING, JobState.QUEUED, JobState.RETRYING):
        return None
    ended = "" if job.finished_ms is None else instant(job.finished_ms)
    attempts = f"on attempt {job.attempt}"
    dead = ended and f"it is a dead letter since {ended}"
    mend = ""
    match job.state:
        case JobState.COMPLETED:
            outcome, reason = Outcome.COMPLETED, f"it completed {attempts} at {ended} on {job.worker}"
        case JobState.RUNNING | JobState.ASSIGNED:
            since = "" if job.started_ms is None else f" since {instant(job.started_ms)}"
            outcome, reason = Outcome.RUNNING, f"it runs on {job.worker}{since}, attempt {job.attempt}"
        case JobState.CANCELED:
            outcome, reason = Outcome.CANCELED, f"it was canceled at {ended}: {_why_it_ended(job, history)}"
            mend = f"taskplatform jobs retry {job.id}"
        case _ if job.poison:
            outcome, reason = Outcome.DEAD, f"it took down what ran it, and is not run again: {job.reason}; {dead}"
            mend = f"taskplatform dead-letters redrive {job.id}"
        case JobState.REJECTED:
            outcome, reason = Outcome.REJECTED, f"it was rejected at {ended}: {_why_it_ended(job, history)}"
            mend = f"taskplatform jobs retry {job.id}"
        case _:
            outcome = Outcome.TIMED_OUT if job.state is JobState.TIMED_OUT else Outcome.FAILED
            how = "ran into its time limit" if outcome is Outcome.TIMED_OUT else "failed"
            reason = f"it {how} {attempts}: {job.reason}; {dead}"
            mend = f"taskplatform dead-letters redrive {job.id}"
    told = [("moment", instant(case.moment_ms)), ("priority", job.priority.value), ("attempts", str(job.attempt))]
    if job.started_ms is not None:
        told.append(("started", f"{instant(job.started_ms)}, {span_text(max(0, job.started_ms - job.execute_after_ms))} after it was due"))
    if job.started_ms is not None and job.finished_ms is not None:
        told.append(("the last attempt took", span_text(job.finished_ms - job.started_ms)))
    if job.source == "catch_up":
        told.append(("caught up", "the planner came to it late"))
    answer = _answer(facts, case, outcome, reason, mend, told)
    return replace(answer, job_id=job.id, history=history)


def _why_it_ended(job: Job, history: tuple[Transition, ...]) -> str:
    """The reason of the line that ended it: what was noted since, such as the discarded result of a run that was canceled, is none."""
    return next((line.reason for line in reversed(history) if line.from_state is not line.to_state), job.reason)


def _is_past(facts: Background, case: Case) -> bool:
    """Whether jobs and records of it may have been forgotten: they are at the end of the retention, counted from when they were done."""
    horizon_ms = int(facts.planner.get("horizon", 0))
    return case.place.at_ms <= facts.now_ms - facts.retention_ms + horizon_ms + _GRACE_MS


def _without_record(facts: Background, case: Case) -> Answer:
    """The planner has not come to it, or had no reason to."""
    definition, at_ms = facts.definition, case.place.at_ms
    # of a time before there was the user nothing was forgotten
    if _is_past(facts, case) and (case.fits or facts.created_ms <= case.moment_ms):
        kept = format_ms(facts.retention_ms)
        reason = f"it is older than the retention: jobs that ended, and what became of occurrences, are kept for {kept}"
        return _answer(facts, case, Outcome.FORGOTTEN, reason)
    if not case.fits:
        return _not_of_group(facts, case)
    removed = _removed(definition.trail, case.moment_ms)
    if removed is not None:
        gone, back = removed
        since = f", and published again{by_whom(back)}" if back else ""
        return _answer(facts, case, Outcome.SKIPPED, f"definition {definition.id} was removed from the catalogue{by_whom(gone)}{since}")
    group = facts.groups.get(case.place.group)
    if not definition.published:
        return _answer(facts, case, Outcome.SKIPPED, f"definition {definition.id} is not published: no beat has it in its catalogue")
    if group is None or at_ms > group.cursor_ms:
        return _to_come(facts, case)
    reason = "the planner has passed its time and kept no record of it, as where the clock of the server was set"
    return _answer(facts, case, Outcome.MISSED, f"{reason}; it had looked up to {instant(group.cursor_ms)}", _again(facts, case))


def _removed(trail: tuple[Entry, ...], at_ms: int) -> tuple[Entry, Entry | None] | None:
    """The removal of a definition in force at a time, and what ended it."""
    for number, entry in enumerate(trail):
        if entry.kind == "retracted" and entry.at_ms <= at_ms:
            back = next((one for one in trail[number + 1 :] if one.kind == "published"), None)
            if back is None or back.at_ms > at_ms:
                return entry, back
    return None


def _not_of_group(facts: Background, case: Case) -> Answer:
    """The user was not in the group when its moment came."""
    whole = stretches(facts)
    user, definition = facts.user, facts.definition.id
    # to whom it belongs goes by the time that it was due, whenever it was caught up
    moment_ms = case.place.at_ms + math.floor(slot(user, definition) * _window(facts, case.seen))
    there = case.place.stretch
    if there.subscribed:
        there = next((one for one in whole if one.after_ms < moment_ms <= one.until_ms), whole[-1])
    if there.subscribed:
        change = there.began
        says = f"another schedule{by_whom(change)}" if change else "another schedule"
        if there.until_ms <= facts.now_ms or there.group != case.place.group:
            # the moment is of one schedule, the time was due by another
            same = [one for one in whole if one.group == case.place.group and one.subscribed]
            # of several times in this group, the last before the moment
            other = next((one for one in reversed(same) if one.after_ms < moment_ms), same[0] if same else None)
            change = (other.ended if other is not None and other.ended else None) or change
            if other is not None and other.began is not None and other.after_ms >= moment_ms:
                change = other.began
            says = f"another schedule{by_whom(change)}" if change else "another schedule"
        if change is not None and change.kind == "unsubscribed":
            reason = f"{user} was unsubscribed from {definition}{by_whom(change)}, before its moment"
            return _answer(facts, case, Outcome.NOT_SUBSCRIBED, f"{reason}: this time is not one of the schedule of the subscription since")
        until = f"; its moments up to {instant(change.from_ms)} belong to the one before" if change and change.from_ms else ""
        return _answer(
            facts, case, Outcome.SKIPPED, f"the subscription got {says}{until}: this time is not one of the schedule then in force"
        )
    mend = f"taskplatform subscriptions add {user} {definition}" if there.until_ms == math.inf else ""
    if facts.created_ms > moment_ms:
        reason = f"user {user} was created only at {instant(facts.created_ms)}"
        if there.until_ms != math.inf:
            reason += f", and is subscribed to {definition} for moments after {instant(there.until_ms)}"
        return _answer(facts, case, Outcome.NOT_SUBSCRIBED, reason, mend)
    left = there.began if there.began is not None and there.began.kind == "unsubscribed" else None
    joined = there.ended if there.ended is not None and there.ended.kind == "subscribed" else None
    if left is not None:
        reason = f"{user} was unsubscribed from {definition}{by_whom(left)}"
    elif there.until_ms == math.inf:
        reason = f"{user} is not subscribed to {definition}"
        reason += ", and was not in as long as changes are kept" if not facts.trail else ""
    else:
        reason = f"{user} was not subscribed to {definition} yet"
    if there.until_ms != math.inf:
        again = " again" if left is not None else ""
        reason += f"; subscribed{again}{by_whom(joined)}, for moments after {instant(there.until_ms)}"
    return _answer(facts, case, Outcome.NOT_SUBSCRIBED, reason, mend)


# --- skipped and missed -----------------------------------------------------------------------------------------------


def _skipped(facts: Background, case: Case, seen: Seen) -> Answer:
    definition, record = facts.definition, seen.occurrence
    ended_ms = seen.done_ms or seen.opened_ms
    if (record.source == "skip" and record.at_ms != record.last_ms) or " missed while no planner ran" in record.reason:
        return _missed(facts, case, seen)
    if record.reason.startswith("definition paused"):
        entry = _last(definition.trail, ("paused",), ended_ms)
        why = record.reason.removeprefix("definition paused").lstrip(", ")
        since = by_whom(entry) if entry else "; by whom is not known, that was before changes were kept"
        reason = f"definition {definition.id} was paused{since} ({why}) when it came due"
        resumed = next((one for one in definition.trail if one.kind == "resumed" and one.at_ms >= ended_ms), None)
        if resumed is not None:
            reason += f", until it was resumed{by_whom(resumed)}"
        mend = f"taskplatform resume {definition.id}" if definition.paused is not None and resumed is None else _again(facts, case)
        return _answer(facts, case, Outcome.SKIPPED, reason, mend)
    if record.reason == "definition removed":
        gone, back = _removed(definition.trail, ended_ms) or (_last(definition.trail, ("retracted",), ended_ms), None)
        since = f", and published again{by_whom(back)}" if back else ""
        return _answer(facts, case, Outcome.SKIPPED, f"definition {definition.id} was removed from the catalogue{by_whom(gone)}{since}")
    return _answer(facts, case, Outcome.SKIPPED, f"the planner skipped it: {record.reason}")


def _last(trail: tuple[Entry, ...], kinds: tuple[str, ...], at_ms: int) -> Entry | None:
    return next((one for one in reversed(trail) if one.kind in kinds and one.at_ms <= at_ms), None)


def _missed(facts: Background, case: Case, seen: Seen) -> Answer:
    at_ms, record = case.place.at_ms, seen.occurrence
    policy = record.reason.rpartition("policy ")[2]
    policy_text = f"its catch_up policy {policy!r} does not run it later"
    told = []
    if record.last_ms != record.at_ms:
        told.append(("skipped with it", f"those from {instant(record.at_ms)} to {instant(record.last_ms)}"))
    causes = [one for one in facts.outages if one.from_ms < seen.opened_ms and one.to_ms > at_ms and one.what in ("", case.place.group)]
    gone = _removed(facts.definition.trail, at_ms)
    if gone is not None:
        cause = f"definition {facts.definition.id} was removed from the catalogue{by_whom(gone[0])}"
        cause += f", and published again{by_whom(gone[1])}" if gone[1] else ""
    elif causes:
        cause = " and ".join(map(_outage, causes))
    else:
        cause = f"the planner came to it only at {instant(seen.opened_ms)}; no outage of it is on record (its clock may have been set, or "
        cause += "another catalogue have led)"
    return _answer(facts, case, Outcome.MISSED, f"missed: {cause}; {policy_text}", _again(facts, case), told)


def _outage(outage: Outage) -> str:
    when = f"from {instant(outage.from_ms)} to {instant(outage.to_ms)}"
    return f"{outage.what} could not be planned {when} ({outage.error})" if outage.what else f"no planner ran {when}"


def _again(facts: Background, case: Case) -> str:
    """How to run an occurrence that was not: under its own id, where it is one of the schedule that the user has now."""
    definition, place = facts.definition, case.place
    group = facts.groups.get(place.group) if facts.membership and facts.membership.group == place.group and not place.trigger else None
    if group is None or not any(occurrences(group.schedule, place.at_ms - 1, place.at_ms)):
        return f"taskplatform jobs submit {definition.id} {facts.user}"
    since, until = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}" for at in (place.at_ms // 1000, place.at_ms // 1000 + 1))
    return f"taskplatform backfill {definition.id} --from {since} --to {until} --users {facts.user}"


# --- not decided yet, or decided against ------------------------------------------------------------------------------


def _to_come(facts: Background, case: Case) -> Answer:
    """The planner has not come to the user's moment."""
    horizon_ms = int(facts.planner.get("horizon", 0))
    moment_ms, definition = case.moment_ms, facts.definition
    told = [("moment", instant(moment_ms)), ("slot", f"{slot(facts.user, definition.id):.4f} of {format_ms(_window(facts, case.seen))}")]
    against = [one for one in bars(facts) if one.lasts]
    mend = against[0].mend if against else ""
    if definition.paused is not None:
        entry = _last(definition.trail, ("paused",), facts.now_ms)
        against_text = [f"definition {definition.id} is paused{by_whom(entry)} ({definition.paused})"]
        mend = mend or f"taskplatform resume {definition.id}"
    else:
        against_text = []
    against_text += [one.text for one in against]
    but = f"; it will be skipped if this lasts: {' and '.join(against_text)}" if against_text else ""
    if moment_ms > facts.now_ms:
        what = "it waits for its slot in the window" if case.place.at_ms <= facts.now_ms else "it is not due yet"
        return _answer(facts, case, Outcome.COMING, f"{what}: its moment is {instant(moment_ms)}{but}", mend, told)
    tick = int(facts.planner.get("tick", 0))
    failing = facts.planner.get("failing_since")
    looked = f"the planner looked last at {instant(tick)}" if tick else "no planner has ever looked"
    if failing:
        looked += f", and since {instant(int(failing))} fails: {facts.planner.get('error', '')}"
    elif tick and facts.now_ms - tick > _GRACE_MS:
        looked += f", {span_text(facts.now_ms - tick)} ago: no beat leads"
    late = span_text(facts.now_ms - (moment_ms - horizon_ms))
    reason = f"the planner has not come to it for {late}: {looked}{but}"
    return _answer(facts, case, Outcome.WAITING, reason, mend or "taskplatform health", told)


def _passed_over(facts: Background, case: Case, seen: Seen) -> Answer:
    """The planner came to the user's moment and made no job: told by how things were between the earliest and latest time of that."""
    horizon_ms = int(facts.planner.get("horizon", 0))
    offset = case.moment_ms - seen.occurrence.base_ms
    from_ms = max(seen.opened_ms, min(case.moment_ms, case.place.at_ms + offset) - horizon_ms)
    to_ms = max(from_ms, seen.done_ms or facts.now_ms)
    causes = [one for one in bars(facts) if _bars_out(one, from_ms, to_ms, case.moment_ms)]
    ended = case.owner.ended if case.owner is not None else None
    if ended is not None and ended.kind == "unsubscribed" and ended.at_ms <= to_ms:
        who = f"{facts.user} was unsubscribed from {facts.definition.id}{by_whom(ended)}"
        mend = f"taskplatform subscriptions add {facts.user} {facts.definition.id}"
        causes.append(Bar(ended.at_ms, math.inf, who, mend, lasts=True, left=True))
    # what held when the planner was to come is the cause; what began later is one only where nothing did
    first = [one for one in causes if one.from_ms <= from_ms]
    chosen = first if any(one.to_ms > to_ms for one in first) or (first and len(causes) == len(first)) else causes
    if chosen:
        outcome = Outcome.NOT_SUBSCRIBED if all(one.left for one in chosen) else Outcome.SKIPPED
        together = any(one.from_ms < other.to_ms and other.from_ms < one.to_ms for one in chosen for other in chosen if one is not other)
        joint = " and " if together or len(chosen) == 1 else ", or "
        when = f"when the planner came to it, between {instant(from_ms)} and {instant(to_ms)}"
        lasting = next((one.mend for one in chosen if one.lasts), "")
        return _answer(facts, case, outcome, f"{when}: {joint.join(one.text for one in chosen)}", lasting or _again(facts, case))
    if facts.created_ms > from_ms:
        reason = f"user {facts.user} was created at {instant(facts.created_ms)}; one of that name before was deleted with all jobs"
        return _answer(facts, case, Outcome.NOT_SUBSCRIBED, reason)
    lost = next((one for one in facts.trail if one.kind == "dropped" and one.at_ms >= from_ms), None)
    if lost is not None:
        reason = f"the subscription changed so often that changes up to {instant(lost.at_ms)} were not kept; it was not in force then"
        return _answer(facts, case, Outcome.SKIPPED, reason)
    if _is_past(facts, case):
        return _answer(facts, case, Outcome.FORGOTTEN, f"its job is past the retention of {format_ms(facts.retention_ms)}")
    # nothing else that is kept account of can be the cause
    reason = (
        "the planner passed it, and there is neither a job nor a change that would have kept it from being made: that was before changes "
        "were kept, or its job died and was one of more than 1000 dead letters of the user that were forgotten"
    )
    return _answer(facts, case, Outcome.DISCARDED if len(facts.forgotten) else Outcome.SKIPPED, reason)


def _bars_out(bar: Bar, from_ms: float, to_ms: float, moment_ms: int) -> bool:
    if bar.from_ms <= to_ms and bar.to_ms > from_ms:
        return True
    return bar.from_ms <= moment_ms <= bar.moments_until_ms


def job_ids(facts: Background, found: Iterable[Case]) -> list[str]:
    """Of the jobs that occurrences have, where they have one."""
    name = facts.definition.id
    return [
        planned_job_id(name, facts.user, one.place.at_ms) if not one.place.trigger else f"{name}:{facts.user}:{one.place.suffix}"
        for one in found
    ]
