"""Plots of points in a window: as text for Markdown, and as SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from taskplatform.verification.judges import histogram

_BARS = " ▁▂▃▄▅▆▇█"


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
    counts = [histogram(points, bins) for points in (planned, started)]
    most = max([1, *counts[0], *counts[1]])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 2 * left} {height + 2 * top + 30}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(title, quote=True)}">',
        f'<rect width="{width + 2 * left}" height="{height + 2 * top + 30}" fill="#ffffff"/>',
        f'<text x="{left}" y="24" font-size="14">{escape(title)}</text>',
    ]
    part = width / bins
    for of, (colour, offset) in zip(counts, (("#9ecae1", 0.08), ("#3182bd", 0.50)), strict=True):
        for place, count in enumerate(of):
            tall = height * 0.5 * count / most
            x, y = left + (place + offset) * part, top + height - tall
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{part * 0.4:.1f}" height="{tall:.1f}" fill="{colour}"/>')
    parts.append(f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top}" stroke="#999999" stroke-dasharray="4 4"/>')
    begun = sorted(min(1.0, max(0.0, one)) for one in started)
    corners = [(0.0, 0.0)]
    for place, one in enumerate(begun):
        corners += [(one, place / len(begun)), (one, (place + 1) / len(begun))]
    corners.append((1.0, 1.0 if begun else 0.0))
    steps = " ".join(f"{left + x * width:.1f},{top + height * (1 - y):.1f}" for x, y in corners)
    parts.append(f'<polyline points="{steps}" fill="none" stroke="#d94801" stroke-width="1.5"/>')
    parts.append(f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" stroke="#333333"/>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + share * width
        text = f"{share * window_seconds:g} s"
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{text}</text>')
    legend = (("#9ecae1", "planned"), ("#3182bd", "started"), ("#d94801", "share started"), ("#999999", "even"))
    for place, (colour, text) in enumerate(legend):
        x = left + place * 140
        parts.append(f'<rect x="{x}" y="{top + height + 36}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{top + height + 46}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
