"""`taskplatform doctor`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import example, json_option
from taskplatform.cli.output import Columns, counted, moment_text, plain, remark, show_json, show_rows

if TYPE_CHECKING:
    from taskplatform.doctor import Finding, Report, Result

#: For a wrong command line too: click's 2 would be a critical finding for a monitor.
UNKNOWN = 3


class _WrongLine(click.UsageError):
    exit_code = UNKNOWN


class _Doctor(click.Command):
    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **extra)
        except click.UsageError as fault:
            raise _WrongLine(fault.format_message(), fault.ctx) from None


@click.command(cls=_Doctor, epilog=example("doctor --skip redis.tls --json"))
@click.option("--only", multiple=True, metavar="CHECK", help="Only this check, or those whose names begin so, such as redis. Repeatable.")
@click.option("--skip", multiple=True, metavar="CHECK", help="All but this one, or those. Repeatable.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, only: tuple[str, ...], skip: tuple[str, ...], *, as_json: bool) -> None:
    """Say what is wrong here, why, and what mends it.

    It changes nothing, and takes less than ten seconds. Exits with 0 if all is well, 1 for a warning, 2 if something is critical, and 3 if
    something could not be checked, or the command line is wrong: what monitoring plugins exit with.
    """
    from taskplatform.cli.remote import refuse_url
    from taskplatform.errors import InvalidInput, SettingsError

    try:
        refuse_url(settings_too=True)
        report = _examine(only, skip)
    except click.UsageError as fault:
        raise _WrongLine(fault.format_message(), ctx) from None
    except InvalidInput as fault:
        raise _WrongLine(str(fault), ctx) from None
    except SettingsError as fault:
        report = _of_settings(fault)
    if as_json:
        record = plain(report)
        show_json({"at": record["at"], "state": report.state, "exit_code": report.exit_code, "checks": record["results"]})
    else:
        _show(report)
    ctx.exit(report.exit_code)


def _examine(only: tuple[str, ...], skip: tuple[str, ...]) -> Report:
    from taskplatform.doctor import chosen, examine
    from taskplatform.settings import environment, settings

    chosen(only, skip)
    return examine(settings(), environment(), only=only, skip=skip)


def _of_settings(fault: Exception) -> Report:
    """Where the settings cannot be read, nothing else can be looked at."""
    from taskplatform.doctor import Finding, Report, Result, Severity, State

    finding = Finding(
        code="settings_fault",
        severity=Severity.CRITICAL,
        subject="",
        what=str(fault),
        why="No process starts with these settings; nothing else was checked.",
        mend="put right what the lines name; docs/settings.md has every setting",
    )
    result = Result(check="access.settings", state=State.CRITICAL, seen="", reason="", findings=(finding,))
    return Report(at_ms=time.time_ns() // 1_000_000, results=(result,))


_STATES = {"unknown": "not checked", "skipped": "not checked"}


def _show(report: Report) -> None:
    checks: Columns[Result] = {
        "check": lambda one: one.check,
        "state": lambda one: _STATES.get(one.state, one.state),
        "seen": lambda one: "; ".join(text for text in (one.seen, one.reason) if text),
    }
    show_rows(report.results, checks, as_json=False)
    found = [(result.check, one) for result in report.results for one in result.findings]
    if found:
        columns: Columns[tuple[str, Finding]] = {
            "severity": lambda row: row[1].severity,
            "check": lambda row: row[0],
            "subject": lambda row: row[1].subject,
            "what": lambda row: row[1].what,
            "why": lambda row: row[1].why,
            "what mends it": lambda row: row[1].mend,
        }
        click.echo()
        show_rows(found, columns, as_json=False)
    bad = sum(one.severity in ("critical", "warning") for _, one in found)
    unknown = sum(one.state == "unknown" for one in report.results)
    more = f", {counted(unknown, 'check')} could not be made" if unknown else ""
    remark(f"{moment_text(report.at_ms)}: " + (counted(bad, "finding") if bad else "all is well") + more)
