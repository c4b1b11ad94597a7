"""Plots of points in a window: as text for Markdown, and as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from taskplatform.drawing import Colour, Drawing, svg
from taskplatform.verification.judges import histogram

_BARS = " ▁▂▃▄▅▆▇█"
_PLANNED: Colour = "second"
_STARTED: Colour = "third"
_SHARE: Colour = "first"
_EVEN: Colour = "faint"


def bars(points: Sequence[float], *, bins: int, label: str) -> str:
    """A line of bars, one for each part of the window, with how many points the fullest part has."""
    counts = histogram(points, bins)
    most = max([1, *counts])
    # what is there is seen: the smallest bar is for one, not for none
    line = "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)
    return f"{label:<8} |{line}| at most {max(counts)} in a part"


def window_svg(planned: Sequence[float], started: Sequence[float], *, title: str, window_seconds: float) -> str:
    """How jobs lie in their window: bars of what was planned and what started, the share that had started, and the even line.

    `planned` and `started` are parts of the window.
    """
    width, height, left, top, bins = 720, 300, 40, 40, 20
    floor = top + height
    counts = [histogram(points, bins) for points in (planned, started)]
    most = max([1, *counts[0], *counts[1]])
    drawing = Drawing(width + 2 * left, height + 2 * top + 30, title)
    drawing.text(left, 24, title)
    part = width / bins
    for of, (colour, offset) in zip(counts, ((_PLANNED, 0.08), (_STARTED, 0.50)), strict=True):
        for place, count in enumerate(of):
            tall = height * 0.5 * count / most
            drawing.box(left + (place + offset) * part, floor - tall, part * 0.4, tall, colour)
    drawing.line([(left, floor), (left + width, top)], _EVEN, dashed=True)
    begun = sorted(min(1.0, max(0.0, one)) for one in started)
    corners = [(0.0, 0.0)]
    for place, one in enumerate(begun):
        corners += [(one, place / len(begun)), (one, (place + 1) / len(begun))]
    corners.append((1.0, 1.0 if begun else 0.0))
    drawing.line([(left + x * width, floor - y * height) for x, y in corners], _SHARE, width=1.5)
    drawing.line([(left, floor), (left + width, floor)], "ink")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        drawing.text(left + share * width, floor + 18, f"{share * window_seconds:g} s", size=12, anchor="middle")
    legend: tuple[tuple[Colour, str], ...] = ((_PLANNED, "planned"), (_STARTED, "started"), (_SHARE, "share started"), (_EVEN, "even"))
    for place, (colour, text) in enumerate(legend):
        x = left + place * 140
        drawing.box(x, floor + 36, 12, 12, colour)
        drawing.text(x + 18, floor + 46, text, size=12)
    return svg(drawing)
