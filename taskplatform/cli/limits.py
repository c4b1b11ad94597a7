"""`taskplatform limits`: how much may run, how fast, for all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import connected, example, json_option
from taskplatform.cli.output import Columns, moment_text, plain, rate_text, remark, show_rows

if TYPE_CHECKING:
    from taskplatform.cli.arguments import AnyPlatform
    from taskplatform.model import Limit
    from taskplatform.store import LimitState


@click.group()
def limits() -> None:
    """How fast jobs start, and how many run at a time.

    NAME is total, definition:ID, host:HOST, user (each user) or user:ID.
    """


def _in_words(limit: Limit | None) -> str:
    if limit is None:
        return "none"
    rate = f"{rate_text(limit.per_second)} burst {limit.burst}" if limit.per_second is not None else ""
    concurrency = f"concurrency {limit.concurrency}" if limit.concurrency is not None else ""
    return " ".join(filter(None, (rate, concurrency))) or "none"


_COLUMNS: Columns[LimitState] = {
    "limit": lambda one: one.name,
    "rate": lambda one: rate_text(one.limit.per_second),
    "burst": lambda one: one.limit.burst,
    "concurrency": lambda one: one.limit.concurrency,
    # of a level that a lowered limit left below 0, nothing is free
    "free now": lambda one: None if one.tokens is None else max(0, int(one.tokens)),
    "reserved": lambda one: None if one.tokens is None else one.reserved,
    "in flight": lambda one: one.in_flight,
    "held until": lambda one: moment_text(one.held_until_ms),
    "from": lambda one: one.source,
    "configured": lambda one: _in_words(one.configured) if one.live else "",
}


def _show(platform: AnyPlatform, name: str) -> None:
    found = {one.name: one.limit for one in platform.limits()}
    click.echo(f"{name} {_in_words(found.get(name))}")


def _record(state: LimitState) -> dict[str, Any]:
    return {**plain(state), "source": state.source}


@limits.command("list", epilog=example("limits list --json"))
@json_option
def list_(*, as_json: bool) -> None:
    """List the limits in force and how they stand.

    "free now": starts that the rate allows at once. "reserved": jobs that are released, have a place in the rate and have not
    started. "in flight": released and not ended; for user, of the user who has the most. "held until": a host that is held back,
    see `taskplatform breakers`, also where it has no limit. "configured": what is in force again
    when a live limit is reset.
    """
    with connected(definitions=False) as platform:
        show_rows(platform.limits(), _COLUMNS, as_json=as_json, record=_record)


@limits.command("set", epilog=example("limits set host:api.example.com --rate 10/s --burst 15 --concurrency 4"))
@click.argument("name")
@click.option("--rate", metavar="RATE", help="Starts per second, minute, hour or day: 10/s, 100/m, 5000/h, 20/d.")
@click.option(
    "--burst", type=click.IntRange(1, 1_000_000), help="Starts at once after a quiet time. Default: see rate_limit in docs/definitions.md."
)
@click.option("--concurrency", type=click.IntRange(1, 1_000_000), help="Jobs that may run at a time.")
@click.option("--none", "nothing", is_flag=True, help="No limit under this name, although one is configured.")
def set_(name: str, rate: str | None, burst: int | None, concurrency: int | None, *, nothing: bool) -> None:
    """Set a limit for all workers, at once.

    It replaces what was in force under this name as a whole, and holds over restarts, until reset. NAME is total,
    definition:ID, host:HOST, user (each user) or user:ID.
    """
    given = [value for value in (rate, burst, concurrency) if value is not None]
    if bool(given) == nothing:
        raise click.UsageError("give --rate, --concurrency or both, or --none")
    with connected(definitions=name.startswith("definition:")) as platform:
        platform.set_limit(name, rate, burst=burst, concurrency=concurrency)
        _show(platform, name)


@limits.command("reset", epilog=example("limits reset host:api.example.com"))
@click.argument("name")
def reset(name: str) -> None:
    """Take a live limit back.

    What settings and definitions say under this name is in force again.
    """
    with connected(definitions=False) as platform:
        was_live = any(one.live for one in platform.limits() if one.name == name)
        platform.reset_limit(name)
        _show(platform, name)
    if not was_live:
        remark(f"{name} was not set live")
