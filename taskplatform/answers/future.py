"""When the next jobs of a subscription will be made, to the millisecond: pure.

The planner makes a job at occurrence + slot × window. Of an occurrence that is open the record says its window; of one to come it is the
definition's, unless a limit makes it wider when it is opened: then the moment is not certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from taskplatform.answers.timeline import Stretch, bars, by_whom, schedules, stretches
from taskplatform.answers.values import Moment, instant, local
from taskplatform.model import Job, slot, span_text
from taskplatform.schedule import occurrences
from taskplatform.store import Background, Seen

#: The planner looks at least this often, unless it is away.
_AWAY_MS = 60_000
#: How far ahead a moment is looked for: 29 February on a given weekday comes after 40 years at the most.
_FURTHEST_MS = 50 * 366 * 86_400_000


@dataclass(frozen=True, slots=True)
class _Found:
    at_ms: int
    moment_ms: int
    window_ms: int
    zone: str
    opened: bool
    note: str = ""


def silence(facts: Background) -> str:
    """Why nothing comes of a subscription; empty where something does, or may."""
    definition = facts.definition
    if facts.membership is None:
        left = next((one for one in reversed(facts.trail) if one.kind == "unsubscribed"), None)
        return f"{facts.user} is not subscribed to {definition.id}" + (f": unsubscribed{by_whom(left)}" if left else "")
    if not definition.published:
        gone = next((one for one in reversed(definition.trail) if one.kind == "retracted"), None)
        return f"definition {definition.id} is not published" + (f": it was removed{by_whom(gone)}" if gone else "")
    lasting = [one.text for one in bars(facts) if one.lasts]
    return " and ".join(lasting)


def next_moments(facts: Background, opened: Iterable[Seen], jobs: Iterable[Job], count: int) -> list[Moment]:
    """The next `count` moments of a subscription that is not silent, in their order.

    `opened` are the open occurrences of its groups, `jobs` those of its planned jobs that wait.
    """
    place = slot(facts.user, facts.definition.id)
    by_name: dict[str, _Found] = {}
    zone = _zone(facts)
    for job in jobs:
        if job.occurrence_ms is not None and job.execute_after_ms > facts.now_ms and not job.attempt:
            by_name[job.id.rpartition(":")[2]] = _Found(
                job.occurrence_ms, job.execute_after_ms, facts.definition.window_ms, zone, True, "its job is made"
            )
    for seen in opened:
        record = seen.occurrence
        suffix = record.id.rpartition("|")[2]
        moment_ms = record.base_ms + math.floor(place * record.window_ms)
        if suffix in by_name or seen.cursor >= place or moment_ms <= facts.now_ms:
            if suffix in by_name:
                kept = by_name[suffix]
                by_name[suffix] = _Found(kept.at_ms, kept.moment_ms, record.window_ms, kept.zone, True, kept.note)
            continue
        nominal = record.at_ms + math.floor(place * record.window_ms)
        if record.source == "trigger" or _owns(facts, record.group, nominal):
            note = "" if record.reason == "due" else record.reason
            by_name[suffix] = _Found(record.at_ms, moment_ms, record.window_ms, zone, True, note)
    known = {str(seen.occurrence.at_ms) for seen in opened} | by_name.keys()
    for found in _to_come(facts, place, count + len(known)):
        by_name.setdefault(str(found.at_ms), found)
    chosen = sorted(by_name.values(), key=lambda one: (one.moment_ms, one.at_ms))[:count]
    return [_moment(facts, place, one) for one in chosen]


def _zone(facts: Background) -> str:
    return next((schedule.timezone for one in reversed(stretches(facts)) for schedule, _, _ in schedules(facts, one)), "UTC")


def _owns(facts: Background, group: str, moment_ms: int) -> bool:
    return any(one.subscribed and one.group == group and one.after_ms < moment_ms <= one.until_ms for one in stretches(facts))


def _to_come(facts: Background, place: float, count: int) -> Iterator[_Found]:
    """What is not opened yet, the next of each stretch."""
    for stretch in stretches(facts):
        if stretch.subscribed and stretch.until_ms > facts.now_ms:
            yield from _of_stretch(facts, stretch, place, count)


def _of_stretch(facts: Background, stretch: Stretch, place: float, count: int) -> Iterator[_Found]:
    window_ms = facts.definition.window_ms
    offset = math.floor(place * window_ms)
    kept = facts.groups.get(stretch.group)
    schedule = next((one for one, _, _ in schedules(facts, stretch)), None)
    if schedule is None:
        return
    # what is up to the cursor is opened already, or skipped; a group that there is not yet begins where its first member may have moments
    after = max(stretch.after_ms - window_ms, kept.cursor_ms if kept else -math.inf, facts.now_ms - window_ms - _AWAY_MS)
    found = 0
    until = min(stretch.until_ms, after + _FURTHEST_MS)
    for at_ms in occurrences(schedule, math.floor(after), math.floor(until)):
        moment_ms = at_ms + offset
        if moment_ms > stretch.until_ms:
            return
        if moment_ms > max(stretch.after_ms, facts.now_ms):
            yield _Found(at_ms, moment_ms, window_ms, schedule.timezone, False)
            found += 1
            if found == count:
                return


def _moment(facts: Background, place: float, found: _Found) -> Moment:
    notes = [found.note] if found.note else []
    certain = True
    definition = facts.definition
    if definition.paused is not None:
        entry = next((one for one in reversed(definition.trail) if one.kind == "paused"), None)
        notes.append(f"definition {definition.id} is paused{by_whom(entry)} ({definition.paused}): it is skipped unless that ends before")
        certain = False
    tick = int(facts.planner.get("tick", 0))
    if found.note != "its job is made" and (not tick or facts.now_ms - tick > _AWAY_MS):
        ago = f"since {instant(tick)}, {span_text(facts.now_ms - tick)} ago" if tick else "yet"
        notes.append(f"no planner has looked {ago}: it comes later if that lasts")
        certain = False
    return Moment(
        user=facts.user,
        definition=definition.id,
        occurrence_ms=found.at_ms,
        moment_ms=found.moment_ms,
        timezone=found.zone,
        local=local(found.moment_ms, found.zone),
        slot=place,
        window_ms=found.window_ms,
        certain=certain,
        note="; ".join(notes),
    )
