"""`taskplatform breakers`: hosts whose jobs are held back."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import connected, duration, example, json_option
from taskplatform.cli.output import Columns, moment_text, remark, show_rows

if TYPE_CHECKING:
    from taskplatform.store import Breaker

_COLUMNS: Columns[Breaker] = {
    "host": lambda one: one.host,
    "state": lambda one: one.state,
    "since": lambda one: moment_text(one.since_ms),
    "until": lambda one: moment_text(one.until_ms),
    "calls": lambda one: one.calls,
    "failures": lambda one: one.failures,
    "openings": lambda one: one.openings,
    "passed": lambda one: one.passed,
    "probe": lambda one: one.probe,
    "reason": lambda one: one.reason,
}


@click.group()
def breakers() -> None:
    """Which hosts' jobs are held back, and why.

    HOST is written as in a limit: api.example.com, or localhost:8000.
    """


@breakers.command("list", epilog=example("breakers list --json"))
@json_option
def list_(*, as_json: bool) -> None:
    """List the hosts that are called, and how they stand.

    "closed": jobs go. "open": too many calls failed, and the jobs wait. "held": the host asked for a pause, and the jobs wait.
    "half_open": one job at a time probes the host. "calls" and "failures": counted since a failure of late, or those that opened it.
    "passed": probes that went well.
    """
    with connected(definitions=False) as platform:
        show_rows(platform.breakers(), _COLUMNS, as_json=as_json)


@breakers.command("open", epilog=example("breakers open api.example.com --for 10m --reason maintenance"))
@click.argument("host")
@click.option("--for", "span", type=duration, required=True, help="How long: seconds, or such as 10m.")
@click.option("--reason", default="", help="For history and change log.")
def open_(host: str, span: timedelta, reason: str) -> None:
    """Hold a host's jobs back for so long.

    They keep their places. Then the host is probed, one job at a time, as after failures.
    """
    with connected(definitions=False) as platform:
        platform.open_breaker(host, span=span, reason=reason)
    click.echo(f"{host} open")


@breakers.command("reset", epilog=example("breakers reset api.example.com"))
@click.argument("host")
def reset(host: str) -> None:
    """Let a host's jobs go at once, without a probe."""
    with connected(definitions=False) as platform:
        was_held = platform.reset_breaker(host)
    click.echo(f"{host} closed")
    if not was_held:
        remark(f"{host} was not held back")
