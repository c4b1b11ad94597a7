"""How the pages say instants, durations, rates, schedules and states. All of it is for people; machines ask the API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from markupsafe import Markup

from taskplatform.model import JobState, Limit, format_rate, span_text
from taskplatform.store import BOUNDS_MS, BreakerState, Histogram

#: A mark for each state beside its name and its colour, for who sees no colours.
_MARKS: Mapping[str, str] = {
    JobState.PENDING: "◷",
    JobState.QUEUED: "≡",
    JobState.ASSIGNED: "▷",
    JobState.RUNNING: "▶",
    JobState.RETRYING: "↻",
    JobState.COMPLETED: "✓",
    JobState.FAILED: "✕",
    JobState.TIMED_OUT: "◔",
    JobState.CANCELED: "⊘",
    JobState.REJECTED: "⊖",
    "waiting": "◷",
    "coming": "◷",
    "skipped": "»",
    "missed": "!",
    "dead": "✕",
    "discarded": "⊘",
    "forgotten": "·",
    "not_subscribed": "·",
    "paused": "‖",
    "off": "‖",
    "active": "✓",
    "error": "✕",
    "warning": "!",
    "critical": "✕",
    "info": "i",
    "well": "✓",
    "drained": "‖",
    "silent": "!",
    "leads": "★",
    "stands_by": "◷",
    BreakerState.CLOSED: "✓",
    BreakerState.OPEN: "✕",
    BreakerState.HELD: "‖",
    BreakerState.HALF_OPEN: "↻",
}
#: Which of few colours a state has.
_COLOURS: Mapping[str, str] = {
    **dict.fromkeys(("completed", "active", "well", "leads", "closed"), "good"),
    **dict.fromkeys(("failed", "timed_out", "dead", "error", "critical", "rejected", "open", "missed"), "bad"),
    **dict.fromkeys(("retrying", "warning", "paused", "off", "held", "half_open", "drained", "silent", "skipped"), "care"),
    **dict.fromkeys(("running", "assigned"), "busy"),
    "queued": "wait",
}


def span(span_ms: float | None) -> str:
    """A duration, as `span_text` has it; a dash for None."""
    return "–" if span_ms is None else span_text(span_ms)


def away(at_ms: float, now_ms: float) -> str:
    """How far an instant is from now: `in 5 min`, `3 h 2 min ago`, `now`."""
    apart = at_ms - now_ms
    if abs(apart) < 1000:
        return "now"
    return f"in {span(apart)}" if apart > 0 else f"{span(-apart)} ago"


def instant(at_ms: float | None, now_ms: float | None = None, zone: str = "UTC", *, exact: bool = False) -> Markup:
    """An instant in UTC, whose title has its date, milliseconds and local time too; with `now_ms` also how far away it is."""
    if at_ms is None:
        return Markup("–")
    at = datetime.fromtimestamp(at_ms / 1000, UTC)
    full = f"{at:%Y-%m-%d %H:%M:%S}.{round(at_ms) % 1000:03} UTC"
    if zone != "UTC":
        full += f" = {at.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M:%S} in {zone}"
    shown = f"{at:%Y-%m-%d %H:%M:%S}.{round(at_ms) % 1000:03}" if exact else f"{at.day} {at:%b %H:%M:%S}"
    stamp = f"{at:%Y-%m-%dT%H:%M:%S}.{round(at_ms) % 1000:03}Z"
    found = Markup('<time datetime="{}" title="{}">{}</time>').format(stamp, full, shown)
    if now_ms is None:
        return found
    return Markup('<span>{} <span class="away">{}</span></span>').format(found, away(at_ms, now_ms))


def state(name: str | None) -> Markup:
    """A state as a badge: its mark, its name, and a colour."""
    if name is None:
        return Markup("–")
    text = str(name).replace("_", " ")
    colour = _COLOURS.get(str(name), "plain")
    return Markup('<span class="state {}"><span aria-hidden="true">{}</span> {}</span>').format(colour, _MARKS.get(str(name), "·"), text)


def colour(name: str) -> str:
    """The colour of a state."""
    return _COLOURS.get(name, "plain")


def marked(text: str) -> Markup:
    """A message of the platform, in which `commands` stand so."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup("{}").format(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts))


def number(value: float | None) -> str:
    """`1,234`."""
    return "–" if value is None else f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """`99.9 %`: never rounded up to all, nor down to nothing."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if part in (0, whole):
        return f"{percent:.0f} %"
    return f"{min(max(percent, 0.1), 99.9):.1f} %"


def limit(rule: Limit) -> str:
    """`10/s, bursts of 15, 4 at a time`."""
    parts = []
    if rule.per_second is not None:
        parts.append(format_rate(rule.per_second))
        if rule.burst is not None:
            parts.append(f"bursts of {rule.burst:,}")
    if rule.concurrency is not None:
        parts.append(f"{rule.concurrency:,} at a time")
    return ", ".join(parts) or "none"


def quantile(histogram: Histogram, part: float) -> str:
    """Within what so many of the spans are: `≤ 50 ms`."""
    if not histogram.total:
        return "–"
    for bound, upto in zip(BOUNDS_MS, histogram.upto, strict=True):
        if upto >= part * histogram.total:
            return f"≤ {span(bound)}"
    return f"> {span(BOUNDS_MS[-1])}"


def plain(value: Any) -> str:
    """JSON as a person reads it, and not without end."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 2000 else f"{text[:2000]}…"


def duration(value: timedelta) -> str:
    """The same as `span`."""
    return span(value / timedelta(milliseconds=1))
