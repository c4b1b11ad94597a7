"""`taskplatform log-level`: what running processes log."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import connected, duration, example, json_option
from taskplatform.cli.output import Columns, moment_text, plain, remark, show_rows

if TYPE_CHECKING:
    from taskplatform.store import LogLevel

_COLUMNS: Columns[tuple[str, LogLevel]] = {
    "node": lambda one: one[0],
    "level": lambda one: one[1].level,
    "until": lambda one: moment_text(one[1].until_ms),
    "who": lambda one: one[1].actor,
}


@click.command("log-level", epilog=example("log-level DEBUG --node worker --for 10m"))
@click.argument("level", required=False, metavar="[LEVEL]", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False))
@click.option("--node", default="*", help="A role (beat, worker, api), a node (celery@host), or an id as `nodes` shows it. Default: all.")
@click.option("--for", "span", type=duration, help="How long: seconds, or such as 1h. Default: 10m.")
@click.option("--reset", is_flag=True, help="Take it back now.")
@json_option
def log_level(level: str | None, node: str, span: timedelta | None, *, reset: bool, as_json: bool) -> None:
    """Change how much running processes log.

    From LEVEL on: DEBUG, INFO, WARNING or ERROR. Without it, list what was changed. Processes follow within seconds, and go back to
    their own level by themselves. What is said of one goes before what is said of its role, and that before what is said of all.
    """
    if (reset and level) or (span and not level):
        raise click.UsageError("give a LEVEL, with --for or without, or --reset alone")
    with connected(definitions=False) as platform:
        if reset:
            if not platform.reset_log_level(node=node):
                remark(f"{_whom(node)}: no level was set live")
            click.echo(f"{_whom(node)}: as they started")
        elif level:
            from taskplatform.platform import LOG_LEVEL_SPAN

            platform.set_log_level(level, node=node, span=LOG_LEVEL_SPAN if span is None else span)
            until = platform.log_levels()[node].until_ms
            click.echo(f"{_whom(node)}: {level} until {moment_text(until)}")
        else:
            show_rows(sorted(platform.log_levels().items()), _COLUMNS, as_json=as_json, record=_record)


def _record(one: tuple[str, LogLevel]) -> dict[str, object]:
    return {"node": one[0], **plain(one[1])}


def _whom(node: str) -> str:
    return "all processes" if node == "*" else node
