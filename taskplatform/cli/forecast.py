"""`taskplatform forecast`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from taskplatform.cli.arguments import connected, example, json_option
from taskplatform.cli.completion import definitions
from taskplatform.cli.output import Columns, counted, moment_text, remark, show_fields, show_json, show_rows, span_text

if TYPE_CHECKING:
    from taskplatform.forecast import Backlog, Forecast, LimitUse, Track, Widening

T = TypeVar("T")

#: Rows of a table; JSON has all.
_MOST_ROWS = 12


@click.command(
    epilog=example("forecast --hours 24", "forecast --enable daily_user_report --users 200000 --limit total=20/s:30 --plot forecast.svg")
)
@click.option(
    "--hours", type=click.FloatRange(min=0, min_open=True, max=168), default=24.0, show_default=True, help="How far to look ahead."
)
@click.option(
    "--enable",
    multiple=True,
    metavar="DEFINITION",
    shell_complete=definitions,
    help="What if it had more subscribers: as many as the --users after it says. Repeatable.",
)
@click.option("--users", multiple=True, type=click.IntRange(min=1), metavar="N", help="How many, for each --enable in turn.")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=RATE[:BURST]",
    help="What if this limit were so, such as total=20/s:30, host:HOST=5/s,concurrency=4 or definition:ID=none. Repeatable.",
)
@click.option(
    "--slots", type=click.IntRange(0, 1_000_000), help="What if workers had so many slots. Default: those of the workers that live."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw it into a file that ends in .svg or .png."
)
@json_option
def forecast(
    hours: float,
    enable: tuple[str, ...],
    users: tuple[int, ...],
    limits: tuple[str, ...],
    slots: int | None,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Say what the next hours bring, or would bring.

    Jobs and requests, where a limit is used up and windows become wider, what waits and for how long, and how many worker slots it
    takes. It is the platform's own planning, done ahead, with the run times and retries that were measured. It changes nothing.
    """
    from taskplatform.errors import InvalidInput
    from taskplatform.forecast.asked import asked_limit
    from taskplatform.forecast.plot import plot_png, plot_svg

    if len(enable) != len(users):
        raise click.UsageError("give one --users for each --enable")
    if plot is not None and plot.suffix.lower() not in (".svg", ".png"):
        raise click.UsageError(f"--plot {plot}: the file ends in .svg or .png")
    try:
        asked = dict(asked_limit(text) for text in limits)
    except InvalidInput as fault:
        raise click.UsageError(f"--limit {fault}") from None
    with connected() as platform:
        found = platform.forecast(hours=hours, enable=list(zip(enable, users, strict=True)), limits=asked, slots=slots)
    if plot is not None:
        plot.write_bytes(plot_png(found) if plot.suffix.lower() == ".png" else plot_svg(found).encode())
    if as_json:
        show_json(found.to_dict())
        return
    _show(found)
    if plot is not None:
        remark(f"drawn into {plot}")


def _show(found: Forecast) -> None:
    show_fields(summary(found), as_json=False, record=found)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        from taskplatform.forecast.plot import plot_text

        console = Console(highlight=False)
        click.echo("")
        console.print(Text(plot_text(found, width=max(40, min(console.width, 110)) - 7), no_wrap=True, overflow="crop"))
    _table("Limits that are used up", found.saturated, _LIMITS)
    _table("What waits", found.backlogs, _BACKLOGS)
    _table("Windows that limits make wider or later", found.windows, _WINDOWS)
    _table("Hosts", found.hosts, _TRACKS)
    _table("Definitions", found.definitions, _TRACKS)
    for line in (*found.assumptions, *found.left_out):
        remark(line)


def _table(title: str, rows: Sequence[T], columns: Columns[T]) -> None:
    if not rows:
        return
    click.echo(f"\n{title}")
    show_rows(rows[:_MOST_ROWS], columns, as_json=False)
    if len(rows) > _MOST_ROWS:
        click.echo(f"… and {len(rows) - _MOST_ROWS:,} more: --json has all")


def summary(found: Forecast) -> dict[str, object]:
    """The forecast in a few lines: before → after, where something else was asked for."""
    lines: dict[str, Callable[[Forecast], str]] = {
        "jobs": lambda one: f"{one.total.jobs:,.0f}",
        "requests": lambda one: f"{one.total.requests:,.0f}",
        "most in a minute": lambda one: f"{one.total.peak:,.0f} at {_clock(one.total.peak_at_ms)}" if one.total.peak else "none",
        "wait at most": lambda one: counted(round(one.total.backlog), "job"),
        "longest delay": lambda one: span_text(one.total.delay_ms),
        "windows wider or later": lambda one: f"{sum(each.windows for each in one.windows):,}",
        "limits used up": lambda one: (
            ", ".join(each.name for each in one.saturated[:4]) + ("" if len(one.saturated) < 5 else ", …") or "none"
        ),
        "slots needed": lambda one: f"{one.slots.needed:,}" + (f" at {_clock(one.slots.needed_at_ms)}" if one.slots.needed else ""),
        "slots there are": lambda one: "no worker lives" if one.slots.there is None else f"{one.slots.there:,}",
    }
    shown: dict[str, object] = {"from": moment_text(found.start_ms), "to": moment_text(found.end_ms)}
    for name, says in lines.items():
        after = says(found)
        before = after if found.before is None else says(found.before)
        shown[name] = after if before == after else f"{before} → {after}"
    return shown


def _clock(at_ms: int | None) -> str:
    return "" if at_ms is None else f"{moment_text(at_ms)[:16]}Z"


_LIMITS: Columns[LimitUse] = {
    "limit": lambda one: one.name,
    "is": lambda one: one.limit,
    "from": lambda one: _clock(one.saturated[0].begin_ms),
    "to": lambda one: "beyond" if one.saturated[0].open else _clock(one.saturated[0].end_ms),
    "times": lambda one: len(one.saturated),
    "windows": lambda one: one.windows,
    "asked by": lambda one: ", ".join(one.definitions[:3]),
}

_BACKLOGS: Columns[Backlog] = {
    "of": lambda one: one.of,
    "from": lambda one: _clock(one.begin_ms),
    "to": lambda one: "beyond" if one.open else _clock(one.end_ms),
    "jobs at most": lambda one: f"{one.jobs:,.0f}",
    "longest delay": lambda one: span_text(one.delay_ms),
    "waits for": lambda one: ", ".join(one.because),
}

_WINDOWS: Columns[Widening] = {
    "definition": lambda one: one.definition,
    "windows": lambda one: one.windows,
    "widest at": lambda one: _clock(one.at_ms),
    "asked": lambda one: span_text(one.asked_ms),
    "becomes": lambda one: span_text(one.window_ms),
    "put off": lambda one: span_text(one.delay_ms) if one.delay_ms else "",
    "jobs": lambda one: f"{one.jobs:,.0f}",
    "limit": lambda one: one.limit,
    "beyond the next": lambda one: span_text(one.beyond_ms) if one.beyond_ms else "",
}

_TRACKS: Columns[Track] = {
    "name": lambda one: one.name,
    "jobs": lambda one: f"{one.jobs:,.0f}",
    "requests": lambda one: f"{one.requests:,.0f}",
    "most in a minute": lambda one: f"{one.peak:,.1f}",
    "at": lambda one: _clock(one.peak_at_ms),
    "wait at most": lambda one: f"{one.backlog:,.0f}",
    "longest delay": lambda one: span_text(one.delay_ms),
}
