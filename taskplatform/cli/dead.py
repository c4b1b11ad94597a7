"""`taskplatform dead-letters`: jobs that failed for good."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import (
    all_option,
    connected,
    cursor_option,
    definition_option,
    example,
    job_argument,
    json_option,
    limit_option,
    past,
    user_option,
)
from taskplatform.cli.completion import jobs as job_ids
from taskplatform.cli.jobs import act_on_each, show_job
from taskplatform.cli.output import Columns, all_items, counted, moment_text, plain, remark, show_rows
from taskplatform.cli.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskplatform.cli.arguments import AnyPlatform
    from taskplatform.model import Job

_COLUMNS: Columns[Job] = {
    "job": lambda one: one.id,
    "died": lambda one: moment_text(one.finished_ms),
    "state": lambda one: one.state,
    "attempt": lambda one: one.attempt,
    "poison": lambda one: one.poison,
    "reason": lambda one: one.reason,
}


@click.group("dead-letters")
def dead() -> None:
    """Jobs that failed or timed out for good.

    They are kept with their histories until they are redriven or discarded, or for TASKPLATFORM_DEAD_RETENTION.
    """


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """What tells dead letters from each other."""
    options: tuple[Callable[..., Any], ...] = (
        user_option,
        definition_option,
        click.option("--since", type=past, help="Only those that died since: ISO 8601, or how long ago, such as 10m."),
        click.option("--reason", default="", metavar="TEXT", help='Only those whose reason contains this, such as "poison pill".'),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _record(job: Job) -> dict[str, Any]:
    return {**plain(job), "poison": job.poison}


@dead.command("list", epilog=example('dead-letters list --definition daily_user_report --reason "poison pill"'))
@_filters
@limit_option(50)
@cursor_option
@all_option
@json_option
def list_(
    user: str | None,
    definition: str | None,
    since: datetime | None,
    reason: str,
    limit: int,
    cursor: str | None,
    *,
    everything: bool,
    as_json: bool,
) -> None:
    """List dead letters, the newest first."""
    with connected(definitions=False) as platform:
        found = all_items(
            lambda at: platform.dead_letters(user=user, definition=definition, since=since, reason=reason, cursor=at, limit=limit),
            cursor=cursor,
            everything=everything,
        )
        show_rows(found, _COLUMNS, as_json=as_json, record=_record)


@dead.command(epilog=example("dead-letters show daily_user_report:u1:1800000000000"))
@job_argument
@json_option
def show(job_id: str, *, as_json: bool) -> None:
    """Show a dead letter and its history."""
    show_job(job_id, as_json=as_json)


@dead.command(epilog=example("dead-letters redrive --definition daily_user_report --since 1d"))
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=job_ids)
@_filters
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
@click.pass_context
def redrive(ctx: click.Context, /, ids: tuple[str, ...], *, everything: bool, **filters: Any) -> None:
    """Run dead letters again.

    Those named, or those that all filters fit. Each has its retries before it again and keeps its id, and so its
    Idempotency-Key.
    """
    _check_choice(ids, filters, everything)
    with connected(definitions=False) as platform:
        if ids:
            act_on_each(ctx, ids, "redriving", lambda job_id: platform.redrive(job_id).state)
            return
        with counting("redriving") as progress:
            redriven, left = platform.redrive_all(**filters, progress=progress)
    click.echo(f"{counted(redriven, 'job')} redriven")
    if left:
        remark(f"{counted(left, 'job')} left: the definition was removed from the catalogue")


@dead.command(epilog=example("dead-letters discard --user u1"))
@click.argument("ids", metavar="[ID]...", nargs=-1, shell_complete=job_ids)
@_filters
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
@click.pass_context
def discard(ctx: click.Context, /, ids: tuple[str, ...], *, everything: bool, **filters: Any) -> None:
    """Forget dead letters and their histories.

    Those named, or those that all filters fit. The change log keeps that it was done, and by whom.
    """
    _check_choice(ids, filters, everything)
    with connected(definitions=False) as platform:
        if ids:
            act_on_each(ctx, ids, "discarding", lambda job_id: _discard(platform, job_id))
            return
        with counting("discarding") as progress:
            discarded = platform.discard_all(**filters, progress=progress)
    click.echo(f"{counted(discarded, 'job')} discarded")


def _discard(platform: AnyPlatform, job_id: str) -> str:
    platform.discard(job_id)
    return "discarded"


def _check_choice(ids: tuple[str, ...], filters: dict[str, Any], everything: bool) -> None:
    """Nobody redrives or discards everything by forgetting a word."""
    if sum((bool(ids), any(filters.values()), everything)) != 1:
        raise click.UsageError("give ids, or filters, or --all")
