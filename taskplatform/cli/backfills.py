"""`taskplatform backfill` and `taskplatform backfills`: what was missed, or is new, is run afterwards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import connected, definition_argument, example, json_option, limit_option, past
from taskplatform.cli.completion import backfills as backfill_ids
from taskplatform.cli.output import Columns, counted, moment_text, plain, rate_text, remark, show_fields, show_rows

if TYPE_CHECKING:
    from taskplatform.store import Backfill


def _users(text: str) -> list[str]:
    """A file with an id in each line, - for stdin, or ids with commas between them."""
    if text == "-":
        lines = sys.stdin.read().splitlines()
    elif "," not in text and len(text) < 4096 and "\0" not in text and (Path(text).is_file() or "/" in text):
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            why = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8"
            raise click.BadParameter(f"{text[:200]} cannot be read: {why}") from None
    else:
        lines = text.split(",")
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise click.BadParameter(f"{text[:200]!r} has no user")
    return found


_backfill_argument = click.argument("backfill_id", metavar="ID", shell_complete=backfill_ids)


def _progress(one: Backfill) -> str:
    return f"{100 * one.looked // one.total} %" if one.total else ""


_COLUMNS: Columns[Backfill] = {
    "backfill": lambda one: one.id,
    "definition": lambda one: one.definition,
    "state": lambda one: one.state,
    "decided": _progress,
    "made": lambda one: one.made,
    "unfinished": lambda one: one.unfinished,
    "completed": lambda one: one.completed,
    "failed": lambda one: one.failed + one.timed_out,
    "rate": lambda one: rate_text(one.per_second),
    "by": lambda one: one.actor,
    "reason": lambda one: one.reason,
}


def _record(one: Backfill) -> dict[str, Any]:
    return {**plain(one), "rate": rate_text(one.per_second)}


def _fields(one: Backfill) -> Mapping[str, object]:
    made = "would be made" if one.state == "dry run" else "made"
    return {
        "backfill": one.id,
        "definition": one.definition,
        "state": one.state,
        "reason": one.reason,
        "by": one.actor,
        "from": moment_text(one.since_ms),
        "to": moment_text(one.until_ms),
        "rate": rate_text(one.per_second),
        "begun": moment_text(one.begun_ms) if one.id else "",
        "ended": moment_text(one.ended_ms) if one.id else "",
        "users": "all subscribers" if one.users is None else f"{one.users:,} given, {one.unsubscribed:,} of them not subscribed",
        "occurrences": f"{one.passed:,} of {one.occurrences:,}" if one.id else f"{one.occurrences:,}",
        "at": moment_text(one.at_ms),
        "left to the planner": one.left or "",
        "older than the retention": one.forgotten or "",
        "jobs decided": f"{one.looked:,} of {one.total:,}" if one.id else "",
        made: one.made,
        "exist": one.existing,
        "paused": one.paused,
        "disabled": one.disabled,
        "overlapping": one.overlapping or "",
        "unfinished": one.unfinished if one.id else "",
        "completed": one.completed if one.id else "",
        "failed": one.failed if one.id else "",
        "timed out": one.timed_out if one.id else "",
        "rejected": one.rejected or "",
        "canceled": one.canceled or "",
    }


@click.command(
    epilog=example(
        "backfill daily_user_report --from 2d --dry-run",
        "backfill daily_user_report --from 2026-11-01 --to 2026-11-03T12:00:00Z --rate 100/m",
        "backfill daily_user_report --from 1d --users u1,u2",
    )
)
@definition_argument
@click.option("--from", "since", type=past, required=True, help="Occurrences from then on: ISO 8601, or how long ago, such as 3d.")
@click.option("--to", "until", type=past, help="And before that. Default: now.")
@click.option("--users", metavar="FILE|ID,…", type=_users, help="Only these: a file with an id in each line, - for stdin, or ids.")
@click.option("--rate", metavar="RATE", default="5/s", show_default=True, help="Jobs that are made at the most, such as 5/s or 100/m.")
@click.option("--beyond-retention", is_flag=True, help="Also what is so long ago that nobody knows any more whether it ran.")
@click.option("--dry-run", is_flag=True, help="Only count what would be made.")
@json_option
def backfill(
    definition: str,
    since: datetime,
    until: datetime | None,
    users: list[str] | None,
    rate: str,
    *,
    beyond_retention: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run afterwards what a definition was due for.

    Each occurrence runs once for each subscriber, at low priority and under a rate. What exists is not made again, so it can be asked for
    twice. The beat that leads does it; `backfills show` says how far it is.
    """
    with connected() as platform:
        found = platform.backfill(
            definition, since=since, until=until, users=users, rate=rate, dry_run=dry_run, beyond_retention=beyond_retention
        )
    show_fields(_fields(found), as_json=as_json, record=_record(found))
    if not dry_run:
        remark(f"begun, for up to {counted(found.total, 'job')}: taskplatform backfills show {found.id}")


@click.group()
def backfills() -> None:
    """What is run afterwards, and how far it is."""


@backfills.command("list", epilog=example("backfills list --json"))
@limit_option(50)
@json_option
def list_(limit: int, *, as_json: bool) -> None:
    """List backfills, the newest first.

    They are shown for as long as finished jobs are kept.
    """
    with connected(definitions=False) as platform:
        show_rows(platform.backfills(limit=limit), _COLUMNS, as_json=as_json, record=_record)


@backfills.command(epilog=example("backfills show 3f9c0a51e2"))
@_backfill_argument
@json_option
def show(backfill_id: str, *, as_json: bool) -> None:
    """Show how far a backfill is."""
    with connected(definitions=False) as platform:
        found = platform.backfill_status(backfill_id)
    show_fields(_fields(found), as_json=as_json, record=_record(found))


@backfills.command(epilog=example("backfills cancel 3f9c0a51e2"))
@_backfill_argument
@json_option
def cancel(backfill_id: str, *, as_json: bool) -> None:
    """Make nothing more, and cancel what waits.

    What runs goes on.
    """
    with connected(definitions=False) as platform:
        found = platform.cancel_backfill(backfill_id)
    show_fields(_fields(found), as_json=as_json, record=_record(found))


@backfills.command(epilog=example("backfills pause 3f9c0a51e2"))
@_backfill_argument
def pause(backfill_id: str) -> None:
    """Make nothing more until it is resumed.

    What was made goes on.
    """
    with connected(definitions=False) as platform:
        click.echo(f"{backfill_id} {'paused' if platform.pause_backfill(backfill_id) else 'was paused'}")


@backfills.command(epilog=example("backfills resume 3f9c0a51e2"))
@_backfill_argument
def resume(backfill_id: str) -> None:
    """Let a paused one go on."""
    with connected(definitions=False) as platform:
        click.echo(f"{backfill_id} {'resumed' if platform.resume_backfill(backfill_id) else 'was not paused'}")
