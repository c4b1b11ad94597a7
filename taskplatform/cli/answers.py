"""`taskplatform why` and `taskplatform next`."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import connected, definition_argument, example, json_option, moment, user_argument
from taskplatform.cli.completion import definitions
from taskplatform.cli.output import Columns, exact_text, moment_text, plain, remark, show_fields, show_json, show_rows

if TYPE_CHECKING:
    from taskplatform.answers import Answer, Moment

#: As taskplatform.answers has it, without its imports.
MOST_ANSWERS = 200

_ANSWERS: Columns[Answer] = {
    "occurrence": lambda one: moment_text(one.occurrence_ms),
    "outcome": lambda one: one.outcome,
    "why": lambda one: one.reason,
    "what helps": lambda one: one.mend,
}

_MOMENTS: Columns[Moment] = {
    "definition": lambda one: one.definition,
    "moment": lambda one: moment_text(one.moment_ms),
    "local": lambda one: one.local,
    "zone": lambda one: one.timezone,
    "slot": lambda one: f"{one.slot:.4f} of {exact_text(one.window_ms)}",
    "certain": lambda one: one.certain,
    "note": lambda one: one.note,
}


def _time_or_day(text: str) -> datetime | date:
    """A time, in UTC where it has no zone, or a day."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        return moment(text)


_EXAMPLES = ("why u1 daily_user_report", "why u1 daily_user_report --at 2026-01-31T09:00:00Z", "why u1 daily_user_report --last 7")


@click.command(epilog=example(*_EXAMPLES))
@user_argument
@definition_argument
@click.option("--at", type=_time_or_day, metavar="TIME", help="The occurrence that this time belongs to; or a date: all of that day.")
@click.option("--last", type=click.IntRange(1, MOST_ANSWERS), help="The last so many.  [default: 1]")
@json_option
def why(user: str, definition: str, at: datetime | date | None, last: int | None, *, as_json: bool) -> None:
    """Say what became of a user's occurrences, and why.

    Whether it completed, for what it waits, who paused what and when, or from when to when nobody planned.
    """
    if at is not None and last is not None:
        raise click.UsageError("give either --at or --last")
    with connected(definitions=False) as platform:
        found = platform.why(user, definition, at=at, last=last or 1)
    if not found:
        remark(f"nothing of {definition} was due then" if at is not None else f"nothing of {definition} was ever due")
    if as_json:
        show_json([_record(one) for one in found])
    elif len(found) == 1:
        _show(found[0])
    else:
        show_rows(found, _ANSWERS, as_json=False)


def _record(answer: Answer) -> dict[str, Any]:
    return {**plain(answer), "facts": dict(answer.facts)}


def _show(one: Answer) -> None:
    shown: dict[str, object] = {"outcome": one.outcome, "why": one.reason}
    shown |= {name: text for name, text in (("what helps", one.mend), ("job", one.job_id)) if text} | dict(one.facts)
    for number, line in enumerate(one.history):
        shown[f"history {number + 1}"] = (
            f"{moment_text(line.at_ms)} {line.to_state}{f' {line.worker}' if line.worker else ''}: {line.reason}"
        )
    show_fields(shown, as_json=False, record=one)


@click.command("next", epilog=example("next u1", "next u1 daily_user_report --count 5"))
@user_argument
@click.argument("definition", required=False, shell_complete=definitions)
@click.option("--count", type=click.IntRange(1, MOST_ANSWERS), default=1, show_default=True, help="So many of each definition.")
@json_option
def next_(user: str, definition: str | None, count: int, *, as_json: bool) -> None:
    """Say when a user's next jobs will be due.

    To the millisecond, for all that the user subscribes to, or for one definition. Where nothing comes of one, why is said on stderr.
    """
    with connected() as platform:
        found = platform.coming(user, definition, count=count)
    show_rows(found.moments, _MOMENTS, as_json=as_json)
    for name, reason in found.none.items():
        remark(f"{name}: nothing comes: {reason}")


COMMANDS = (why, next_)
