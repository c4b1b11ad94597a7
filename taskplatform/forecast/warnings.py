"""What a change would spoil, in sentences. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from taskplatform.forecast.result import Forecast, LimitUse
from taskplatform.model import span_text

#: So many of a kind are named; the rest are counted.
_MOST_NAMED = 3
#: What is used up, or waits, for so much longer than before is worse.
_WORSE = 1.2
_MINUTE_MS = 60_000


def warnings_of(forecast: Forecast) -> list[str]:
    """What is worse than it is without what was asked for: limits that are used up, windows beyond the next, jobs that wait for workers."""
    before = forecast.before
    if before is None:
        return []
    found = []
    used_up = {one.name: _used_up_ms(one) for one in before.saturated}
    for one in forecast.saturated:
        if _used_up_ms(one) >= _MINUTE_MS and _used_up_ms(one) > _WORSE * used_up.get(one.name, 0):
            first = max(one.saturated, key=lambda span: span.end_ms - span.begin_ms)
            until = f"and longer than the forecast, which ends at {_clock(first.end_ms)}" if first.open else f"until {_clock(first.end_ms)}"
            times = f", {len(one.saturated)} times in all" if len(one.saturated) > 1 else ""
            asks = f"; {', '.join(one.definitions[:_MOST_NAMED])} ask most" if one.definitions else ""
            found.append(f"limit {one.name} ({one.limit}) would be used up from {_clock(first.begin_ms)} {until}{times}{asks}")
    late = {one.definition: one.beyond_ms for one in before.windows}
    beyond = [one for one in forecast.windows if one.beyond_ms > _WORSE * late.get(one.definition, 0) + _MINUTE_MS]
    for widening in beyond[:_MOST_NAMED]:
        found.append(
            f"windows of {widening.definition} would end up to {span_text(widening.beyond_ms)} after its next occurrence is due: "
            f"{widening.limit} cannot carry them"
        )
    if len(beyond) > _MOST_NAMED:
        found.append(f"so would windows of {len(beyond) - _MOST_NAMED:,} more definitions")
    short = {"workers"} & {reason for one in forecast.backlogs for reason in one.because}
    was_short = {"workers"} & {reason for one in before.backlogs for reason in one.because}
    delay, was = forecast.total.delay_ms, before.total.delay_ms
    if delay >= _MINUTE_MS and delay > _WORSE * was:
        worst = next((one for one in forecast.backlogs if one.of == "total"), None)
        of = f", the first from {_clock(worst.begin_ms)} on" if worst is not None else ""
        found.append(f"jobs would wait up to {span_text(delay)} ({span_text(was)} without){of}")
    slots = forecast.slots
    if short and slots.there is not None and (not was_short or slots.needed > before.slots.needed):
        found.append(f"{slots.needed:,} worker slots would be needed at {_clock(slots.needed_at_ms)}, and there are {slots.there:,}")
    return found


def _used_up_ms(one: LimitUse) -> int:
    return sum(span.end_ms - span.begin_ms for span in one.saturated)


def _clock(at_ms: int | None) -> str:
    return "" if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%MZ")
