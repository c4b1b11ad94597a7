"""How a subscription was at each time: to which group a moment belonged, by which schedule, and what kept the planner from making jobs.

It is reconstructed from how things are now and the changes that led to it, the newest first. A subscription that never changed has no
changes: then it is as it is since its record says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from taskplatform.answers.values import instant
from taskplatform.model import Schedule, schedule_from_json
from taskplatform.schedule import occurrences
from taskplatform.store import Background, Entry

#: How far back an occurrence of a rare schedule is looked for.
_FURTHEST_MS = 800 * 86_400_000


@dataclass(frozen=True, slots=True)
class Stretch:
    """Moments that belong to one group: after < moment <= until. Where `subscribed` is False nobody was there to have any."""

    group: str
    after_ms: float
    until_ms: float
    own_schedule: str = ""
    """Of a group that may be gone by now."""
    subscribed: bool = True
    began: Entry | None = None
    ended: Entry | None = None
    """The change that ended it: by another schedule, or because the user left."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A time in which something kept the planner from making jobs: from <= time < to."""

    from_ms: float
    to_ms: float
    text: str
    """As a clause: `the user was paused by anna since …`."""
    mend: str
    lasts: bool
    moments_until_ms: float = -math.inf
    """Moments up to this are kept out too, though the bar had ended when the planner came to them."""
    left: bool = False
    """The user was unsubscribed."""


def by_whom(entry: Entry | None) -> str:
    """Who did it and when."""
    return "" if entry is None else f" by {entry.actor or 'somebody'} at {instant(entry.at_ms)}"


def stretches(facts: Background) -> list[Stretch]:
    """The oldest first. They cover all of time; where the user was in no group, the one before or the default stands for it."""
    found: list[Stretch] = []
    default, now = facts.definition.id, facts.membership
    group = now.group if now else default
    own, since, until = "", float(now.since_ms) if now else math.inf, math.inf
    subscribed, ended = now is not None, None
    former = list(now.former) if now else []
    for entry in reversed(facts.trail):
        if entry.kind == "enabled" and subscribed and entry.since_ms is not None:
            since = min(since, entry.since_ms)
        elif entry.kind == "schedule":
            border = since if entry.from_ms is None else entry.from_ms
            if subscribed and border < until:
                found.append(Stretch(group, border, until, own, began=entry, ended=ended))
            former = [one for one in former if one[2] != border]
            until, ended = min(until, border), entry
            group, own, since = entry.group or default, entry.schedule, entry.since_ms if entry.since_ms is not None else -math.inf
        elif entry.kind == "subscribed":
            border = since if entry.from_ms is None else entry.from_ms
            if border < until:
                found.append(Stretch(group, border, until, own, began=entry, ended=ended))
            subscribed, until, ended = False, border, entry
        elif entry.kind == "unsubscribed":
            # nothing was made for moments after the planner saw that
            found.append(Stretch(entry.group or default, entry.at_ms, until, entry.schedule, subscribed=False, began=entry, ended=ended))
            subscribed, until, ended = True, float(entry.at_ms), entry
            group, own, since = entry.group or default, entry.schedule, entry.since_ms if entry.since_ms is not None else -math.inf
    if subscribed:
        if since < until:
            found.append(Stretch(group, since, until, own, ended=ended))
        until = min(until, since)
        # changes that were made before they were kept as such
        for gid, after, border in sorted(former, key=lambda one: -one[2]):
            if after < min(border, until):
                found.append(Stretch(gid, after, min(border, until)))
                group, until = gid, float(after)
    found.append(Stretch(group, -math.inf, until, own, subscribed=False, ended=ended))
    return found[::-1]


def bars(facts: Background) -> list[Bar]:
    """What kept jobs of the subscription from being made, and when: pauses, and that it was disabled."""
    user, definition = facts.user, facts.definition.id
    found = _bars(
        facts.user_trail, facts.user_paused, ("paused", "resumed"), f"user {user} was paused", f"taskplatform users resume {user}"
    )
    both = facts.membership
    named = f"the subscription of {user} to {definition}"
    paused = (f"{named} was paused", f"taskplatform subscriptions resume {user} {definition}")
    off = (f"{named} was disabled", f"taskplatform subscriptions enable {user} {definition}")
    found += _bars(facts.trail, both is not None and both.paused, ("paused", "resumed"), *paused, leaves=True)
    found += _bars(facts.trail, both is not None and not both.enabled, ("disabled", "enabled"), *off, leaves=True)
    return found


def _bars(trail: tuple[Entry, ...], now: bool, kinds: tuple[str, str], what: str, mend: str, *, leaves: bool = False) -> list[Bar]:
    begins, ends = kinds
    found: list[Bar] = []
    began: Entry | None = None
    #: before the first change it was as that change shows
    before = next((one.kind == ends for one in trail if one.kind in kinds), now and not any(one.kind in kinds for one in trail))
    lost = next((one for one in trail if one.kind == "dropped"), None)
    unknown = "; by whom is not known: " + (
        f"there were too many changes since, and those up to {instant(lost.at_ms)} were not kept"
        if lost
        else "that was before changes were kept, or when it was made"
    )
    on = before

    def add(to_ms: float, end: Entry | None) -> None:
        since = by_whom(began) if began else unknown
        if began and began.why:
            since += f" ({began.why})"
        until = "" if end is None else f", until it was {end.kind}{by_whom(end)}"
        moments = end.from_ms if end is not None and end.kind == "enabled" and end.from_ms is not None else -math.inf
        found.append(Bar(began.at_ms if began else -math.inf, to_ms, f"{what}{since}{until}", mend, end is None, moments))

    for entry in trail:
        if entry.kind == begins and not on:
            on, began = True, entry
        elif on and (entry.kind == ends or (leaves and entry.kind == "unsubscribed")):
            add(entry.at_ms, entry)
            on, began = False, None
    if on and now:
        add(math.inf, None)
    return found


# --- when occurrences were due ----------------------------------------------------------------------------------------


def schedules(facts: Background, stretch: Stretch) -> Iterator[tuple[Schedule, float, float]]:
    """By which schedules the group's occurrences came due: (schedule, after, until), the newest first."""
    default = facts.definition.id
    if stretch.group != default:
        kept = facts.groups.get(stretch.group)
        if kept is not None:
            yield kept.schedule, -math.inf, math.inf
        elif stretch.own_schedule:
            yield schedule_from_json(stretch.own_schedule), -math.inf, math.inf
        return
    group = facts.groups.get(default)
    text = facts.definition.schedule
    present = group.schedule if group else schedule_from_json(text) if text else None
    until = math.inf
    for entry in reversed(facts.definition.trail):
        if entry.kind == "schedule" and entry.from_ms is not None:
            if present is not None and entry.from_ms < until:
                yield present, entry.from_ms, until
            present, until = schedule_from_json(entry.schedule), min(until, entry.from_ms)
    if present is not None:
        yield present, -math.inf, until


def latest(schedule: Schedule, after_ms: float, until_ms: float, count: int) -> list[int]:
    """The last `count` due times in after < t <= until, the newest first."""
    end = round(until_ms)
    floor = max(after_ms, end - _FURTHEST_MS)
    reach = 3_600_000
    while True:
        start = max(floor, end - reach)
        found = deque(occurrences(schedule, math.floor(start), end), maxlen=count)
        if len(found) == count or start <= floor:
            return [at for at in reversed(found) if at > after_ms]
        reach *= 6
