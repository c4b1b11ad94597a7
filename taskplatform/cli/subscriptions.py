"""`taskplatform subscriptions`."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from taskplatform.cli.arguments import (
    FEW,
    all_option,
    connected,
    cursor_option,
    definition_argument,
    example,
    json_option,
    limit_option,
    param_option,
    schedule_options,
    user_argument,
    warned_options,
)
from taskplatform.cli.output import (
    Columns,
    all_items,
    complain,
    counted,
    heed,
    json_text,
    moment_text,
    remark,
    schedule_text,
    show_fields,
    show_rows,
)
from taskplatform.cli.progress import bytes_read

if TYPE_CHECKING:
    from taskplatform.bulk import Format
    from taskplatform.cli.arguments import AnyPlatform
    from taskplatform.model import Subscription

MOST_FAULTS_SHOWN = 20
#: A file that cannot have more than a few subscriptions is not looked at: a line has three characters at the least.
_SMALL_BYTES = 3 * FEW

COLUMNS: Columns[Subscription] = {
    "definition": lambda one: one.definition,
    "enabled": lambda one: one.enabled,
    "paused": lambda one: one.paused,
    "own schedule": lambda one: schedule_text(one.schedule) if one.schedule else "",
    "params": lambda one: json_text(one.params),
    "since": lambda one: moment_text(one.since_ms),
}


@click.group()
def subscriptions() -> None:
    """Who wants the jobs of which definition."""


@subscriptions.command(epilog=example("subscriptions add u1 daily_user_report --param format=pdf --at 09:30"))
@user_argument
@definition_argument
@param_option("A parameter of its jobs")
@schedule_options
@click.option("--disabled", is_flag=True, help="Make it, but switched off.")
@json_option
def add(
    user: str,
    definition: str,
    params: dict[str, Any],
    timezone: str | None,
    at_time: str | None,
    schedule: Mapping[str, Any] | None,
    *,
    disabled: bool,
    as_json: bool,
) -> None:
    """Subscribe a user to a definition.

    An existing subscription is set to just what is given. It takes effect after the planning horizon, a few seconds.
    """
    from taskplatform.bulk import own_schedule

    override = own_schedule(schedule, timezone, at_time)
    with connected() as platform:
        _show(platform.subscribe(user, definition, params=params, schedule=override, enabled=not disabled), as_json=as_json)


@subscriptions.command(epilog=example("subscriptions remove u1 daily_user_report"))
@user_argument
@definition_argument
def remove(user: str, definition: str) -> None:
    """End a subscription and cancel what waits of it."""
    with connected(definitions=False) as platform:
        canceled = platform.unsubscribe(user, definition)
    click.echo(f"{user} {definition} removed: {counted(canceled, 'job')} canceled")


@subscriptions.command(epilog=example("subscriptions enable u1 daily_user_report"))
@user_argument
@definition_argument
@json_option
def enable(user: str, definition: str, *, as_json: bool) -> None:
    """Switch a subscription on again."""
    with connected() as platform:
        _show(platform.enable(user, definition), as_json=as_json)


@subscriptions.command(epilog=example("subscriptions disable u1 daily_user_report"))
@user_argument
@definition_argument
@json_option
def disable(user: str, definition: str, *, as_json: bool) -> None:
    """Switch a subscription off.

    What waits of it is canceled; parameters and schedule are kept.
    """
    with connected() as platform:
        _show(platform.disable(user, definition), as_json=as_json)


@subscriptions.command(epilog=example("subscriptions set-params u1 daily_user_report --param format=pdf"))
@user_argument
@definition_argument
@param_option("A parameter of its jobs")
@click.option("--none", "clear", is_flag=True, help="Leave no own parameters.")
@json_option
def set_params(user: str, definition: str, params: dict[str, Any], *, clear: bool, as_json: bool) -> None:
    """Replace all parameters of a subscription."""
    if bool(params) == clear:
        raise click.UsageError("give either --param, or --none")
    with connected() as platform:
        _show(platform.set_params(user, definition, params), as_json=as_json)


@subscriptions.command(epilog=example("subscriptions set-schedule u1 daily_user_report --timezone Asia/Tokyo"))
@user_argument
@definition_argument
@schedule_options
@click.option("--default", is_flag=True, help="Go back to the definition's schedule.")
@json_option
def set_schedule(
    user: str,
    definition: str,
    timezone: str | None,
    at_time: str | None,
    schedule: Mapping[str, Any] | None,
    *,
    default: bool,
    as_json: bool,
) -> None:
    """Give a subscription an own schedule.

    No occurrence is lost or doubled by that.
    """
    from taskplatform.bulk import own_schedule

    override = own_schedule(schedule, timezone, at_time)
    if (override is None) != default:
        raise click.UsageError("give either --timezone, --at or --schedule, or --default")
    with connected() as platform:
        _show(platform.set_schedule(user, definition, override), as_json=as_json)


@subscriptions.command("list", epilog=example("subscriptions list u1 --json"))
@user_argument
@json_option
def list_(user: str, *, as_json: bool) -> None:
    """List a user's subscriptions."""
    with connected(definitions=False) as platform:
        show_rows(platform.subscriptions(user), COLUMNS, as_json=as_json)


@subscriptions.command(epilog=example("subscriptions subscribers daily_user_report --count"))
@definition_argument
@click.option("--count", is_flag=True, help="Only how many.")
@limit_option(100)
@cursor_option
@all_option
@json_option
def subscribers(definition: str, limit: int, cursor: str | None, *, count: bool, everything: bool, as_json: bool) -> None:
    """List the users who are subscribed to a definition."""
    with connected() as platform:
        if count:
            click.echo(platform.count_subscribers(definition))
            return
        found = all_items(lambda at: platform.subscribers(definition, cursor=at, limit=limit), cursor=cursor, everything=everything)
        show_rows(found, {"user": str}, as_json=as_json)


@subscriptions.command(epilog=example("subscriptions pause u1 daily_user_report"))
@user_argument
@definition_argument
def pause(user: str, definition: str) -> None:
    """Plan and release nothing of a subscription.

    That ends with resume. What waits is kept.
    """
    with connected(definitions=False) as platform:
        changed = platform.pause_subscription(user, definition)
    click.echo(f"{user} {definition} {'paused' if changed else 'was paused already'}")


@subscriptions.command(epilog=example("subscriptions resume u1 daily_user_report"))
@user_argument
@definition_argument
def resume(user: str, definition: str) -> None:
    """End the pause of a subscription."""
    with connected(definitions=False) as platform:
        changed = platform.resume_subscription(user, definition)
    click.echo(f"{user} {definition} {'resumed' if changed else 'was not paused'}")


def _show(subscription: Subscription, *, as_json: bool) -> None:
    shown = {"user": subscription.user, **{name: cell(subscription) for name, cell in COLUMNS.items()}}
    show_fields(shown, as_json=as_json, record=subscription)


# --- import ----------------------------------------------------------------------------------------------------------

_FORMATS: Mapping[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@subscriptions.command("import", epilog=example("subscriptions import subscriptions.csv --create-users"))
@click.argument("file", type=click.File("rb"))
@click.option("--format", "format_", type=click.Choice(("csv", "jsonl")), help="Default: by the file's name.")
@click.option("--create-users", is_flag=True, help="Create users that do not exist; without it their lines are faults.")
@warned_options("Import")
@json_option
@click.pass_context
def import_(
    ctx: click.Context, file: BinaryIO, format_: Format | None, *, create_users: bool, yes: bool, strict: bool, as_json: bool
) -> None:
    """Make the subscriptions in a file.

    It is CSV or JSON Lines; - is stdin. Fields are user, definition, and if wanted enabled, params, schedule, timezone and
    at_time. A line that has a fault is told with its number, all others are made, and the exit code is 1. Reading a file
    again changes nothing.

    With 1,000 subscriptions or more it is first forecast what they bring in the next 24 hours. Where a limit would be used up or jobs would
    wait, that is said; on a terminal you are asked, elsewhere it goes on, unless --strict. What comes through a pipe is read only once,
    and not forecast.
    """
    from taskplatform.bulk import import_subscriptions

    name = getattr(file, "name", "<stdin>")
    chosen = format_ or _FORMATS.get(Path(name).suffix.lower())
    if chosen is None:
        raise click.UsageError(f"{name} could be either: give --format csv or --format jsonl")
    size = _size(file)
    if strict and size is None:
        raise click.UsageError("--strict takes a file that can be read twice; a pipe cannot")
    with connected() as platform:
        if size is not None:
            warnings = _warnings(platform, file, chosen, size)
            heed(ctx, warnings, question="Import all the same?", refused="nothing was imported", yes=yes, strict=strict)
        with bytes_read("importing", size) as progress:
            report = import_subscriptions(platform, file, format=chosen, create_users=create_users, progress=progress)
    shown = {field.replace("_", " "): getattr(report, field) for field in ("created", "changed", "unchanged", "users_created", "faulty")}
    show_fields(shown, as_json=as_json, record=report)
    if report.faulty:
        for fault in report.faults[:MOST_FAULTS_SHOWN]:
            remark(f"{name}:{fault}")
        more = report.faulty - MOST_FAULTS_SHOWN
        complain(f"{counted(report.faulty, 'faulty line')}{f', {more:,} of them not shown' if more > 0 else ''}; all others are in")
        ctx.exit(1)


def _warnings(platform: AnyPlatform, file: BinaryIO, format_: Format, size: int) -> list[str]:
    """What a forecast says against the import; nothing for a small one."""
    from taskplatform.bulk import count_subscriptions
    from taskplatform.errors import InvalidInput, NotFound
    from taskplatform.forecast import warnings_of
    from taskplatform.platform import Platform

    if size < _SMALL_BYTES:
        return []
    with bytes_read("counting", size) as progress:
        more, sample = count_subscriptions(file, format=format_, progress=progress)
    file.seek(0)
    known = []
    for definition in {one.definition for one in more}:
        try:
            platform.definition(definition)
        except (InvalidInput, NotFound):
            continue
        known.append(definition)
    there = sum(platform.subscribed(sample)) / len(sample) if sample and isinstance(platform, Platform) else 0.0
    added = [one._replace(users=round(one.users * (1 - there))) for one in more if one.definition in known]
    added = [one for one in added if one.users]
    if sum(one.users for one in added) < FEW:
        return []
    try:
        return warnings_of(platform.forecast(enable=added))
    except (InvalidInput, NotFound) as fault:
        remark(f"what it brings cannot be forecast: {fault}")
        return []


def _size(file: BinaryIO) -> int | None:
    """None for what is not a plain file, such as a pipe."""
    try:
        found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
