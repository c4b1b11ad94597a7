"""`taskplatform jobs`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import (
    PRIORITIES,
    STATES,
    all_option,
    connected,
    cursor_option,
    definition_argument,
    definition_option,
    duration,
    example,
    job_argument,
    json_option,
    limit_option,
    moment,
    param_option,
    past,
    user_argument,
    user_option,
)
from taskplatform.cli.completion import jobs as job_ids
from taskplatform.cli.output import (
    Columns,
    all_items,
    complain,
    json_text,
    moment_text,
    plain,
    remark,
    show_fields,
    show_line,
    show_rows,
    span_text,
)
from taskplatform.cli.progress import steps
from taskplatform.errors import Conflict, UnknownDefinition, UnknownJob

if TYPE_CHECKING:
    from taskplatform.cli.arguments import AnyPlatform
    from taskplatform.model import Job, Transition

_POLL_SECONDS = 0.2
#: More than a history has.
_MOST_LINES = 300


def _took(job: Job) -> str:
    if job.started_ms is None or job.finished_ms is None:
        return ""
    return span_text(job.finished_ms - job.started_ms)


_COLUMNS: Columns[Job] = {
    "job": lambda one: one.id,
    "state": lambda one: one.state,
    "priority": lambda one: one.priority,
    "execute after": lambda one: moment_text(one.execute_after_ms),
    "attempt": lambda one: one.attempt,
    "took": _took,
    "reason": lambda one: one.reason,
}

_HISTORY: Columns[Transition] = {
    "at": lambda one: moment_text(one.at_ms),
    "from": lambda one: one.from_state,
    "to": lambda one: one.to_state,
    "attempt": lambda one: one.attempt,
    "worker": lambda one: one.worker,
    "reason": lambda one: one.reason,
    "detail": lambda one: json_text(one.detail),
}


@click.group()
def jobs() -> None:
    """What ran, runs and will run."""


@jobs.command(epilog=example("jobs submit daily_user_report u1 --param format=pdf --priority high --wait"))
@definition_argument
@user_argument
@param_option("A parameter, over those of subscription and definition")
@click.option("--countdown", type=duration, help="Not before so long: seconds, or such as 10m.")
@click.option("--eta", type=moment, help="Not before this time: ISO 8601, UTC where no zone is given.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Default: the definition's.")
@click.option("--idempotency-key", metavar="TEXT", help="The same key gives the same job.")
@click.option("--wait", is_flag=True, help="Wait for its end; the exit code is 1 unless it completed.")
@click.option("--follow", is_flag=True, help="The same, and show its history as it is written instead of the job.")
@json_option
@click.pass_context
def submit(
    ctx: click.Context,
    definition: str,
    user: str,
    params: dict[str, Any],
    countdown: timedelta | None,
    eta: datetime | None,
    priority: str | None,
    idempotency_key: str | None,
    *,
    wait: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """Make a job now, without a schedule."""
    with connected() as platform:
        job = platform.enqueue(
            definition, user=user, params=params, countdown=countdown, eta=eta, priority=priority, idempotency_key=idempotency_key
        )
        if wait or follow:
            remark(f"{job.id} is submitted; Ctrl-C stops the waiting, not the job")
            job = _followed(platform, job, as_json=as_json) if follow else _ended(platform, job)
    if not follow:
        show_fields(_fields(job), as_json=as_json, record=job)
    if (wait or follow) and job.state != "completed":
        ctx.exit(1)


def _followed(platform: AnyPlatform, job: Job, *, as_json: bool) -> Job:
    """Show each line of its history, once, until it has ended."""
    if not as_json:
        click.echo("\t".join(_HISTORY))
    shown: list[Transition] = []
    while True:
        ended = job.state.terminal
        for line in platform.history(job.id):
            # of a long one lines between the first and the newest are dropped
            if line not in shown[-_MOST_LINES:]:
                shown.append(line)
                show_line(line, _HISTORY, as_json=as_json)
        if ended:
            return job
        time.sleep(_POLL_SECONDS)
        job = platform.job(job.id)


def _ended(platform: AnyPlatform, job: Job) -> Job:
    state = job.state
    while not job.state.terminal:
        time.sleep(_POLL_SECONDS)
        job = platform.job(job.id)
        if job.state != state:
            state = job.state
            remark(f"{state}: {job.reason}")
    return job


@jobs.command("list", epilog=example("jobs list --definition daily_user_report --state failed --since 1d"))
@user_option
@definition_option
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="Only those in this state. Repeatable.")
@click.option("--since", type=past, help="Only those made since: ISO 8601, or how long ago, such as 10m.")
@click.option("--until", type=past, help="Only those made until then.")
@limit_option(50)
@cursor_option
@all_option
@json_option
def list_(
    user: str | None,
    definition: str | None,
    states: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    limit: int,
    cursor: str | None,
    *,
    everything: bool,
    as_json: bool,
) -> None:
    """List jobs, the newest first."""
    with connected(definitions=definition is not None) as platform:
        if user is not None:
            platform.user(user)
        found = all_items(
            lambda at: platform.jobs(
                user=user, definition=definition, state=states or None, since=since, until=until, cursor=at, limit=limit
            ),
            cursor=cursor,
            everything=everything,
        )
        show_rows(found, _COLUMNS, as_json=as_json)


@jobs.command(
    epilog=example("jobs show daily_user_report:u1:1800000000000", "jobs show daily_user_report:u1:1800000000000 --follow --json")
)
@job_argument
@click.option("--follow", is_flag=True, help="Its history as it is written, to its end; the exit code is 1 unless it completed.")
@json_option
@click.pass_context
def show(ctx: click.Context, job_id: str, *, follow: bool, as_json: bool) -> None:
    """Show a job and its history.

    Of one that waits also what holds it back, by whom and since when, behind how many it is, and what helps. With --follow and --json each
    line is a JSON object.
    """
    if not follow:
        show_job(job_id, as_json=as_json)
        return
    with connected(definitions=False) as platform:
        ended = _followed(platform, platform.job(job_id), as_json=as_json)
    if ended.state != "completed":
        ctx.exit(1)


def show_job(job_id: str, *, as_json: bool) -> None:
    """What `jobs show` does."""
    with connected(definitions=False) as platform:
        job = platform.job(job_id)
        history = platform.history(job_id)
        breaker = platform.held_back(job)
        waits = platform.waits(job)
    fields = _fields(job)
    told = None
    if waits is not None:
        fields["waits"] = waits.reason
        if waits.mend:
            fields["what helps"] = waits.mend
        # those that are not in its record
        fields |= {name: text for name, text in waits.facts if name not in ("due", "priority")}
        told = {**plain(waits), "facts": dict(waits.facts)}
    show_fields(fields, as_json=as_json, record={**plain(job), "waits": told, "held_back": breaker, "history": history})
    if not as_json:
        click.echo()
        show_rows(history, _HISTORY, as_json=False)


def _fields(job: Job) -> dict[str, object]:
    return {
        "job": job.id,
        "definition": job.definition,
        "version": job.version,
        "user": job.user,
        "state": job.state,
        "reason": job.reason,
        "priority": job.priority,
        "execute after": moment_text(job.execute_after_ms),
        "created": moment_text(job.created_ms),
        "occurrence": moment_text(job.occurrence_ms),
        "source": job.source,
        "params": json_text(job.params),
        "attempt": job.attempt,
        "failures": job.failures,
        "delivery": job.delivery,
        "worker": job.worker,
        "started": moment_text(job.started_ms),
        "finished": moment_text(job.finished_ms),
        "took": _took(job),
    }


@jobs.command(epilog=example("jobs cancel daily_user_report:u1:1800000000000"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=job_ids)
@click.pass_context
def cancel(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """Cancel jobs.

    One that waits never starts; one that runs is stopped, or its result discarded.
    """
    with connected(definitions=False) as platform:
        act_on_each(ctx, ids, "canceling", lambda job_id: platform.cancel(job_id).state)


@jobs.command(epilog=example("jobs retry daily_user_report:u1:1800000000000"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=job_ids)
@click.pass_context
def retry(ctx: click.Context, ids: tuple[str, ...]) -> None:
    """Run jobs again that ended without success."""
    with connected(definitions=False) as platform:
        act_on_each(ctx, ids, "retrying", lambda job_id: platform.retry(job_id).state)


@jobs.command("priority", epilog=example("jobs priority daily_user_report:u1:1800000000000 high"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True, shell_complete=job_ids)
@click.argument("wanted", metavar="PRIORITY", type=click.Choice(PRIORITIES))
@click.pass_context
def set_priority(ctx: click.Context, ids: tuple[str, ...], wanted: str) -> None:
    """Give jobs that wait another priority: high, medium or low.

    Each keeps its place among those of its time.
    """
    with connected(definitions=False) as platform:
        act_on_each(ctx, ids, "changing", lambda job_id: platform.set_priority(job_id, wanted).priority)


def act_on_each(ctx: click.Context, ids: tuple[str, ...], what: str, act: Callable[[str], str]) -> None:
    """Do it to each and say what came of it; one that cannot be done holds back no other."""
    failed = False
    for job_id in steps(what, ids):
        try:
            click.echo(f"{job_id} {act(job_id)}")
        except (UnknownJob, UnknownDefinition, Conflict) as fault:
            complain(str(fault))
            failed = True
    if failed:
        ctx.exit(1)
