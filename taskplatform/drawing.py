"""Drawings of a few shapes, described once and rendered as SVG or PNG. Pure.

An SVG stands for itself: no scripts, nothing from outside, and its colours follow whether the reader's screen is dark or light. A PNG is
light, at twice the size, and takes pillow (the extra `png`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from taskplatform.errors import InvalidInput

Colour = Literal["paper", "ink", "faint", "line", "first", "second", "third", "alarm", "calm"]
Anchor = Literal["start", "middle", "end"]

#: (light, dark). What lies beside each other differs in lightness too.
_COLOURS: dict[Colour, tuple[str, str]] = {
    "paper": ("#ffffff", "#15191e"),
    "ink": ("#1b2026", "#e8ebee"),
    "faint": ("#5d6873", "#a3adb8"),
    "line": ("#d5dae0", "#39424c"),
    "first": ("#b4361e", "#f0836b"),
    "second": ("#e3a11b", "#f2c14e"),
    "third": ("#4f8fca", "#6fa8dc"),
    "alarm": ("#8f1d4c", "#ff7fb0"),
    "calm": ("#2f7d5b", "#63c295"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_PNG_SCALE = 2


@dataclass(frozen=True, slots=True)
class Area:
    """A filled polygon."""

    points: tuple[tuple[float, float], ...]
    colour: Colour


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    colour: Colour
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text; `y` is its base line."""

    x: float
    y: float
    text: str
    colour: Colour = "ink"
    size: float = 14.0
    anchor: Anchor = "start"


Shape = Area | Line | Text


@dataclass(slots=True)
class Drawing:
    """Shapes on a sheet, each over those before it. Units are pixels at the natural size."""

    width: float
    height: float
    title: str
    """What it shows, for those who cannot see it."""
    shapes: list[Shape] = field(default_factory=list)

    def area(self, points: Iterable[tuple[float, float]], colour: Colour) -> None:
        """Fill what the points enclose."""
        self.shapes.append(Area(tuple(points), colour))

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.area(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), colour)

    def line(self, points: Iterable[tuple[float, float]], colour: Colour, *, width: float = 1.0, dashed: bool = False) -> None:
        """Draw a line through the points."""
        self.shapes.append(Line(tuple(points), colour, width, dashed))

    def text(self, x: float, y: float, text: str, colour: Colour = "ink", *, size: float = 14.0, anchor: Anchor = "start") -> None:
        """Write a line."""
        self.shapes.append(Text(x, y, text, colour, size, anchor))


def svg(drawing: Drawing) -> str:
    """The drawing as SVG, as wide as its place lets it be."""
    return "\n".join(_svg(drawing)) + "\n"


def png(drawing: Drawing) -> bytes:
    """The drawing as PNG. Raises InvalidInput where pillow is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise InvalidInput("a PNG takes pillow: install taskplatform[png], or ask for an SVG, which takes nothing") from None
    scale = _PNG_SCALE
    image = Image.new("RGB", (round(drawing.width * scale), round(drawing.height * scale)), _COLOURS["paper"][0])
    canvas = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        colour = _COLOURS[shape.colour][0]
        match shape:
            case Area():
                if len(shape.points) > 2:
                    canvas.polygon([(x * scale, y * scale) for x, y in shape.points], fill=colour)
            case Line():
                for part in _dashes(shape) if shape.dashed else [shape.points]:
                    canvas.line(
                        [(x * scale, y * scale) for x, y in part], fill=colour, width=max(1, round(shape.width * scale)), joint="curve"
                    )
            case Text():
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
                font: Any = ImageFont.load_default(shape.size * scale)
                canvas.text((shape.x * scale, shape.y * scale), shape.text, fill=colour, font=font, anchor=anchor)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _svg(drawing: Drawing) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:g} {drawing.height:g}" '
        f'font-family="{_FONT}" role="img" aria-label="{escape(drawing.title, quote=True)}">'
    )
    # the classes are prefixed, because a page that holds the drawing shares them
    light = "".join(f".tp-{name}{{color:{pair[0]}}}" for name, pair in _COLOURS.items())
    dark = "".join(f".tp-{name}{{color:{pair[1]}}}" for name, pair in _COLOURS.items())
    yield f"<style>{light}@media (prefers-color-scheme: dark){{{dark}}}</style>"
    yield f'<rect width="{drawing.width:g}" height="{drawing.height:g}" class="tp-paper" fill="currentColor"/>'
    for shape in drawing.shapes:
        paint = f'class="tp-{shape.colour}"'
        match shape:
            case Area():
                yield f'<polygon points="{_points(shape.points)}" {paint} fill="currentColor"/>'
            case Line():
                dashes = ' stroke-dasharray="5 4"' if shape.dashed else ""
                points = _points(shape.points)
                yield f'<polyline points="{points}" {paint} fill="none" stroke="currentColor" stroke-width="{shape.width:g}"{dashes}/>'
            case Text():
                place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" text-anchor="{shape.anchor}"'
                yield f'<text {place} {paint} fill="currentColor">{escape(shape.text, quote=False)}</text>'
    yield "</svg>"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dashes(line: Line) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """The dashes of a line, five on and four off, as an SVG has them."""
    on, off = 5.0, 4.0
    along = 0.0
    for (x0, y0), (x1, y1) in zip(line.points, line.points[1:], strict=False):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while length and at < length:
            place = along % (on + off)
            step = min((on if place < on else on + off) - place, length - at)
            if place < on:
                begin, end = at / length, (at + step) / length
                yield (x0 + (x1 - x0) * begin, y0 + (y1 - y0) * begin), (x0 + (x1 - x0) * end, y0 + (y1 - y0) * end)
            # no step is so small that it does not move
            at += max(step, 1e-6)
            along += max(step, 1e-6)
