"""A forecast as a picture: requests a minute, what waits, and how many slots are busy, over time. As text, SVG or PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from taskplatform.drawing import Colour, Drawing, png, svg
from taskplatform.forecast.result import Forecast, Point, Track

_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS: tuple[Colour, ...] = ("first", "second", "third")
#: Of an SVG or PNG; narrow, so that its text can still be read on a phone.
_WIDTH, _LEFT, _RIGHT, _TALL, _GAP = 480.0, 56.0, 12.0, 110.0, 46.0
_COLUMNS = 206
_MOST_STRIPS = 6


def plot_svg(forecast: Forecast) -> str:
    """As SVG, for a page or a file."""
    return svg(_draw(forecast))


def plot_png(forecast: Forecast) -> bytes:
    """As PNG. Raises InvalidInput where pillow is not installed."""
    return png(_draw(forecast))


def plot_text(forecast: Forecast, *, width: int = 78, height: int = 5) -> str:
    """As lines of block characters, so wide and each of its parts so high."""
    left = 9
    columns = max(10, width - left - 1)
    parts = [
        ("requests a minute", [_requests(forecast, forecast.total, columns)], _limit_a_minute(forecast)),
        ("jobs that wait", [_sampled(_series(forecast, forecast.total, lambda one: one.backlog), columns)], None),
        ("slots busy", [_sampled(_busy(forecast), columns)], forecast.slots.there),
    ]
    lines = []
    for title, (values,), bound in parts:
        most = max(values)
        note = "" if bound is None else f"; {_short(bound)} {'is the limit' if title.startswith('requests') else 'there are'}"
        lines.append(f"{title}, at most {_short(most)}{note}")
        for row in range(height - 1, -1, -1):
            label = _short(most) if row == height - 1 else "0" if row == 0 else ""
            lines.append(f"{label:>{left - 1}} " + "".join(_block(value / (most or 1) * height - row) for value in values))
    lines.append(_axis(forecast, left, columns))
    return "\n".join(lines)


def _block(part: float) -> str:
    # what is there is seen: the smallest bar is for something, not for nothing
    return _BARS[min(8, max(0, -int(-part * 8 // 1)))]


def _axis(forecast: Forecast, left: int, columns: int) -> str:
    line = [" "] * (left + columns + 6)
    for share, text in _ticks(forecast, most=max(2, columns // 12)):
        place = left + round(share * (columns - 1))
        for offset, character in enumerate(text):
            if place + offset < len(line):
                line[place + offset] = character
    return "".join(line).rstrip() + " UTC"


# --- the drawing -----------------------------------------------------------------------------------------------------


def _draw(forecast: Forecast) -> Drawing:
    strips = forecast.saturated[:_MOST_STRIPS]
    height = 64 + 3 * (_TALL + _GAP) + (24 + 30 * len(strips) if strips else 0)
    begin, end = _moment(forecast.start_ms), _moment(forecast.end_ms)
    drawing = Drawing(_WIDTH, height, f"Forecast from {begin} to {end} UTC")
    drawing.text(12, 24, f"Forecast, {begin} to {end} UTC", size=15)
    for number, (name, colour) in enumerate(zip(("high", "medium", "low"), _COLOURS, strict=True)):
        drawing.box(12 + 80 * number, 35, 11, 11, colour)
        drawing.text(28 + 80 * number, 45, name, "faint", size=13)
    if forecast.before is not None:
        drawing.line(((256, 41), (286, 41)), "ink", width=1.5, dashed=True)
        drawing.text(292, 45, "as things are", "faint", size=13)
    top = 82.0
    of_priorities = _together([_a_minute(forecast, track) for track in forecast.priorities], _COLUMNS)
    before = None if forecast.before is None else _requests(forecast.before, forecast.before.total, _COLUMNS)
    _panel(
        drawing, forecast, top, "requests a minute", of_priorities, before=before, bound=_limit_a_minute(forecast), bound_is="total limit"
    )
    top += _TALL + _GAP
    waits = _together([_series(forecast, track, lambda one: one.backlog) for track in forecast.priorities], _COLUMNS)
    before = (
        None if forecast.before is None else _sampled(_series(forecast.before, forecast.before.total, lambda one: one.backlog), _COLUMNS)
    )
    _panel(drawing, forecast, top, "jobs that are due and wait", waits, before=before)
    top += _TALL + _GAP
    busy = _sampled(_busy(forecast), _COLUMNS)
    there = forecast.slots.there
    _panel(drawing, forecast, top, "worker slots needed", [busy], colours=("calm",), bound=there, bound_is="there are")
    top += _TALL + _GAP
    if strips:
        drawing.text(12, top, "used up", "ink", size=13)
        for number, one in enumerate(strips):
            y = top + 14 + 30 * number
            drawing.text(12, y + 9, f"{one.name}  {one.limit}"[:64], "faint", size=12)
            drawing.box(_LEFT, y + 14, _WIDTH - _LEFT - _RIGHT, 6, "line")
            for span in one.saturated:
                x0, x1 = _x(forecast, span.begin_ms), _x(forecast, span.end_ms)
                drawing.box(x0, y + 14, max(1.0, x1 - x0), 6, "alarm")
    return drawing


def _panel(
    drawing: Drawing,
    forecast: Forecast,
    top: float,
    title: str,
    series: Sequence[Sequence[float]],
    *,
    colours: Sequence[Colour] = _COLOURS,
    before: Sequence[float] | None = None,
    bound: float | None = None,
    bound_is: str = "",
) -> None:
    """Areas on top of each other, the first at the bottom."""
    sums = [sum(column) for column in zip(*series, strict=True)]
    most = max([*sums, *(before or [])]) or 1.0
    # a bound that is far above says nothing but that it is
    shown = bound is not None and bound <= 3 * most
    most = _round_up(max(most, bound or 0) if shown else most)
    bottom, right = top + _TALL, _WIDTH - _RIGHT
    drawing.text(_LEFT, top - 7, title, "ink", size=13)
    if bound is not None:
        drawing.text(right, top - 7, f"{bound_is} {_short(bound)}", "alarm" if shown else "faint", size=12, anchor="end")
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * _TALL
        drawing.line(((_LEFT, y), (right, y)), "line")
        drawing.text(_LEFT - 6, y + 4, _short(most * part), "faint", size=12, anchor="end")
    for share, text in _ticks(forecast, most=7):
        x = _LEFT + share * (right - _LEFT)
        drawing.line(((x, bottom), (x, bottom + 4)), "faint")
        drawing.text(x, bottom + 17, text, "faint", size=12, anchor="middle")
    step = (right - _LEFT) / len(sums)
    below = [0.0] * len(sums)
    for values, colour in zip(series, colours, strict=False):
        above = [low + value for low, value in zip(below, values, strict=True)]
        if any(values):
            edge = [(_LEFT + (at + side) * step, bottom - y / most * _TALL) for at, y in enumerate(above) for side in (0, 1)]
            back = [(_LEFT + (at + side) * step, bottom - y / most * _TALL) for at, y in enumerate(below) for side in (0, 1)]
            drawing.area([*edge, *reversed(back)], colour)
        below = above
    if before is not None:
        line = [(_LEFT + (at + side) * step, bottom - y / most * _TALL) for at, y in enumerate(before) for side in (0, 1)]
        drawing.line(line, "ink", width=1.5, dashed=True)
    if bound is not None and shown:
        y = bottom - bound / most * _TALL
        drawing.line(((_LEFT, y), (right, y)), "alarm", width=1.5)


# --- values ----------------------------------------------------------------------------------------------------------


def _series(forecast: Forecast, track: Track, of: Callable[[Point], float]) -> list[float]:
    """A value for each bin."""
    found = [0.0] * _bins(forecast)
    for point in track.points:
        if point.bin < len(found):
            found[point.bin] = of(point)
    return found


def _bins(forecast: Forecast) -> int:
    return max(1, -(-(forecast.end_ms - forecast.start_ms) // forecast.bin_ms))


def _requests(forecast: Forecast, track: Track, columns: int) -> list[float]:
    return _sampled(_a_minute(forecast, track), columns)


def _a_minute(forecast: Forecast, track: Track) -> list[float]:
    per_minute = 60_000 / forecast.bin_ms
    return _series(forecast, track, lambda one: one.requests * per_minute)


def _busy(forecast: Forecast) -> list[float]:
    found = [0.0] * _bins(forecast)
    for bin_, value in forecast.slots.busy:
        if bin_ < len(found):
            found[bin_] = value
    return found


def _sampled(values: Sequence[float], columns: int) -> list[float]:
    """The largest in each column: a peak is not lost."""
    count = len(values)
    return [max(values[at * count // columns : max(at * count // columns + 1, (at + 1) * count // columns)]) for at in range(columns)]


def _together(series: Sequence[Sequence[float]], columns: int) -> list[list[float]]:
    """In each column the bin in which their sum is largest: values that lie on top of each other are of one time."""
    sums = [sum(bin_) for bin_ in zip(*series, strict=True)]
    count = len(sums)
    found: list[list[float]] = [[] for _ in series]
    for at in range(columns):
        bins = range(at * count // columns, max(at * count // columns + 1, (at + 1) * count // columns))
        top = max(bins, key=sums.__getitem__)
        for values, into in zip(series, found, strict=True):
            into.append(values[top])
    return found


def _limit_a_minute(forecast: Forecast) -> float | None:
    return forecast.total_per_second * 60 if forecast.total_per_second is not None else None


def _x(forecast: Forecast, at_ms: int) -> float:
    span = _bins(forecast) * forecast.bin_ms
    return _LEFT + min(1.0, max(0.0, (at_ms - forecast.start_ms) / span)) * (_WIDTH - _LEFT - _RIGHT)


def _ticks(forecast: Forecast, *, most: int) -> list[tuple[float, str]]:
    """Round times, and where in the whole they are."""
    span_ms = _bins(forecast) * forecast.bin_ms
    steps = [minutes * 60_000 for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 180, 240, 360, 720, 1440, 2880)]
    step = next((one for one in steps if span_ms / one <= most), steps[-1])
    first = -(-forecast.start_ms // step) * step
    form = "%m-%d" if step >= 86_400_000 else "%H:%M"
    return [
        ((at - forecast.start_ms) / span_ms, datetime.fromtimestamp(at / 1000, UTC).strftime(form))
        for at in range(first, forecast.start_ms + span_ms + 1, step)
    ]


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _round_up(value: float) -> float:
    """The next number that reads well."""
    size = 1.0
    while size < value:
        size *= 10
    while size / 10 >= value and size > 1e-6:
        size /= 10
    return next(size * part for part in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0) if size * part >= value)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
