"""`taskplatform users`."""

from __future__ import annotations

import sys

import click

from taskplatform.cli.arguments import all_option, connected, cursor_option, example, json_option, limit_option, user_argument
from taskplatform.cli.output import all_items, counted, moment_text, plain, remark, show_fields, show_rows
from taskplatform.cli.progress import steps
from taskplatform.cli.subscriptions import COLUMNS as SUBSCRIPTION_COLUMNS


@click.group()
def users() -> None:
    """The users whose jobs run."""


@users.command(epilog=example("users create u1 u2"))
@click.argument("names", metavar="USER...", nargs=-1, required=True)
def create(names: tuple[str, ...]) -> None:
    """Create users.

    Those that exist stay as they are.
    """
    from taskplatform.model import check_user_id

    wanted = [check_user_id(user) for user in dict.fromkeys(names)]
    with connected(definitions=False) as platform:
        for user in steps("creating", wanted):
            click.echo(f"{user} {'created' if platform.add_user(user) else 'exists already'}")


@users.command("list", epilog=example("users list --limit 20 --json"))
@limit_option(100)
@cursor_option
@all_option
@json_option
def list_(limit: int, cursor: str | None, *, everything: bool, as_json: bool) -> None:
    """List users in order of their ids."""
    with connected(definitions=False) as platform:
        found = all_items(lambda at: platform.users(cursor=at, limit=limit), cursor=cursor, everything=everything)
        columns = {
            "user": lambda one: one.id,
            "created": lambda one: moment_text(one.created_ms),
            "paused": lambda one: one.paused,
            "name": lambda one: one.name,
        }
        show_rows(found, columns, as_json=as_json)


@users.command(epilog=example("users show u1"))
@user_argument
@json_option
def show(user: str, *, as_json: bool) -> None:
    """Show a user and what they are subscribed to."""
    with connected(definitions=False) as platform:
        found = platform.user(user)
        subscriptions = platform.subscriptions(user)
    shown = {"user": found.id, "name": found.name, "created": moment_text(found.created_ms), "paused": found.paused}
    show_fields(shown, as_json=as_json, record={**plain(found), "subscriptions": subscriptions})
    if not as_json:
        click.echo()
        show_rows(subscriptions, SUBSCRIPTION_COLUMNS, as_json=False)


@users.command(epilog=example("users delete u1 --yes"))
@user_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def delete(ctx: click.Context, user: str, *, yes: bool) -> None:
    """Delete a user, and all that is theirs.

    Subscriptions, jobs and histories go; what waits or runs is canceled.
    """
    if not yes and not _on_terminal():
        raise click.UsageError("there is no terminal to ask on: --yes deletes without asking")
    with connected(definitions=False) as platform:
        if not yes and not click.confirm(
            f"Delete {user}, {counted(len(platform.subscriptions(user)), 'subscription')} and all jobs?", err=True
        ):
            remark("nothing was deleted")
            ctx.exit(1)
        canceled, removed = platform.delete_user(user)
    click.echo(f"{user} deleted: {counted(canceled, 'job')} canceled, {counted(removed, 'subscription')} removed")


def _on_terminal() -> bool:
    return sys.stdin.isatty()


@users.command(epilog=example("users count"))
def count() -> None:
    """Print how many users there are."""
    with connected(definitions=False) as platform:
        click.echo(platform.count_users())


@users.command(epilog=example("users pause u1"))
@user_argument
def pause(user: str) -> None:
    """Plan and release nothing for a user.

    That ends with resume. What waits is kept.
    """
    with connected(definitions=False) as platform:
        click.echo(f"{user} {'paused' if platform.pause_user(user) else 'was paused already'}")


@users.command(epilog=example("users resume u1"))
@user_argument
def resume(user: str) -> None:
    """End a user's pause."""
    with connected(definitions=False) as platform:
        click.echo(f"{user} {'resumed' if platform.resume_user(user) else 'was not paused'}")
