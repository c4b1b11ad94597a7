"""What commands take: parameter types and options that several share, and the platform that they work on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from taskplatform.cli.completion import definitions, jobs, users

if TYPE_CHECKING:
    from taskplatform.platform import Platform
    from taskplatform.remote import RemotePlatform

    AnyPlatform: TypeAlias = Platform | RemotePlatform

F = TypeVar("F", bound=Callable[..., Any])

# the same as Priority and JobState, without their module's imports
PRIORITIES = ("high", "medium", "low")
STATES = ("pending", "queued", "assigned", "running", "retrying", "completed", "failed", "timed_out", "canceled", "rejected")

#: Fewer subscriptions are imported, and definitions with fewer resumed, without a forecast.
FEW = 1000


def example(*lines: str) -> str:
    """A command's examples, for the end of its help."""
    shown = "\n".join(f"  taskplatform {line}" for line in lines)
    return f"\b\nExample{'s' if len(lines) > 1 else ''}:\n{shown}"


@contextmanager
def connected(*, definitions: bool = True) -> Iterator[AnyPlatform]:
    """The platform of the settings: behind its API where a URL is given, else on Redis.

    Commands that need no definitions work also while a file of theirs has a fault.
    """
    from taskplatform.cli.remote import connect, wanted

    if wanted():
        with closing(connect()) as remote:
            yield remote
        return
    with on_redis(definitions=definitions) as platform:
        yield platform


@contextmanager
def on_redis(*, definitions: bool = True) -> Iterator[Platform]:
    """The platform on Redis, for what its API does not serve. Raises UsageError where a URL is given, by option or setting."""
    from taskplatform.catalogue import Catalogue
    from taskplatform.cli.remote import refuse_url
    from taskplatform.platform import Platform

    refuse_url(settings_too=True)
    with closing(Platform.connect(catalogue=None if definitions else Catalogue())) as platform:
        yield platform


# --- types -----------------------------------------------------------------------------------------------------------


def _param(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise click.BadParameter(f"{text!r} is not of the form name=value")
    try:
        return name, _json(value)
    except (ValueError, RecursionError):
        return name, value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = _json(text)
    except (ValueError, RecursionError) as fault:
        raise click.BadParameter(f"{text!r} is not JSON: {fault}") from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"{text!r} is JSON, but not an object")
    return found


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def duration(text: str) -> timedelta:
    """Such as 10m, or a number of seconds."""
    from taskplatform.model import parse_duration

    try:
        return parse_duration(_number(text))
    except ValueError as fault:
        raise click.BadParameter(f"{fault}, or a number of seconds") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def moment(text: str) -> datetime:
    """ISO 8601, in UTC where it has no zone."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a time such as 2026-01-31T09:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def past(text: str) -> datetime:
    """As `moment`, or how long ago."""
    from taskplatform.model import parse_duration

    try:
        return moment(text)
    except click.BadParameter:
        try:
            return datetime.now(UTC) - parse_duration(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is neither a time such as 2026-01-31T09:00:00Z nor how long ago, such as 10m") from None


# --- options ---------------------------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
cursor_option = click.option("--cursor", metavar="TEXT", help="Go on where an earlier listing ended.")
all_option = click.option("--all", "everything", is_flag=True, help="All pages, not just one.")
user_argument = click.argument("user", shell_complete=users)
definition_argument = click.argument("definition", shell_complete=definitions)
user_option = click.option("--user", shell_complete=users, help="Only those of a user.")
definition_option = click.option("--definition", shell_complete=definitions, help="Only those of a definition.")
job_argument = click.argument("job_id", metavar="ID", shell_complete=jobs)


def warned_options(what: str) -> Callable[[F], F]:
    """`--yes` and `--strict`, for what a forecast may warn of: see `output.heed`."""

    def add(function: F) -> F:
        function = click.option("--strict", is_flag=True, help=f"{what} nothing where the forecast warns, and exit with 1.")(function)
        return click.option("--yes", is_flag=True, help="Do not ask, also where the forecast warns.")(function)

    return add


def limit_option(default: int) -> Callable[[F], F]:
    """`--limit`, the number of items of a page."""
    return click.option("--limit", type=click.IntRange(1, 10_000), default=default, show_default=True, help="At most so many.")


def param_option(what: str) -> Callable[[F], F]:
    """`--param`, any number of times, as a mapping."""
    return click.option(
        "--param",
        "params",
        metavar="NAME=VALUE",
        type=_param,
        multiple=True,
        callback=_as_mapping,
        help=f"{what}; the value is JSON, or else text. Repeatable.",
    )


def _as_mapping(ctx: click.Context, param: click.Parameter, value: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(value)
    if len(found) < len(value):
        raise click.BadParameter("the same name is given twice", ctx=ctx, param=param)
    return found


def schedule_options(function: F) -> F:
    """An own schedule: `--schedule`, or `--timezone` and `--at`."""
    options = (
        click.option("--timezone", metavar="ZONE", help="Own IANA time zone for the definition's interval."),
        click.option("--at", "at_time", metavar="HH:MM", help="Own time of day for the definition's interval."),
        click.option("--schedule", metavar="JSON", type=json_object, help='Own schedule: {"interval": {…}} or {"cron": {…}}.'),
    )
    for option in reversed(options):
        function = option(function)
    return function
