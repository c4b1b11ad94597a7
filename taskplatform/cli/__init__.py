"""The command `taskplatform`.

What a person did wrong, or what is not there, is said in a line or two on stderr, never as a traceback. Exit codes: 0 done, 1 it
could not be done, 2 the command line was wrong, 130 stopped by Ctrl-C. `health` exits with 2 where Redis cannot be asked.

Results go to stdout: a table on a terminal, else lines with tabs, and JSON with `--json`; remarks go to stderr. What a
command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO, Any, TextIO

import click

from taskplatform.cli import breakers, certs, dead, jobs, keys, limits, log_level, operations, subscriptions, tasks, users
from taskplatform.cli.arguments import NO_ANSWER
from taskplatform.cli.output import complain, counted, remark
from taskplatform.errors import CatalogueError, Outage, StoreError, StoreUnavailable, TaskPlatformError

INTERRUPTED = 130


class Failure(click.ClickException):
    """What the platform raised, for people."""

    def __init__(self, fault: TaskPlatformError) -> None:
        super().__init__(str(fault))
        self._fault = fault

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002 - click's signature
        if isinstance(self._fault, CatalogueError):
            complain(f"{counted(len(self._fault.faults), 'fault')} in the definitions")
            remark(self.message)
        elif isinstance(self._fault, StoreUnavailable):
            complain(self.message)
            if self._fault.outage is Outage.UNREACHABLE:
                remark(_redis_hint())
        else:
            complain(self.message)


class Unanswered(Failure):
    """The same, for a command that asks how it is and got no answer."""

    exit_code = 2


class _Root(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreError as fault:
            raise (Unanswered if NO_ANSWER in ctx.meta else Failure)(fault) from fault
        except TaskPlatformError as fault:
            raise Failure(fault) from fault


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="taskplatform", message="%(version)s")
def cli() -> None:
    """Per-user jobs from static definitions, on Celery.

    Settings come from TASKPLATFORM_* variables, .env and taskplatform.yaml in the current folder.
    """


for command in (
    tasks.tasks,
    users.users,
    subscriptions.subscriptions,
    jobs.jobs,
    dead.dead,
    limits.limits,
    breakers.breakers,
    log_level.log_level,
    *operations.COMMANDS,
    keys.keys,
    keys.audit,
    certs.certs,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        _show_all(stream)
    try:
        for word in words:
            if not _is_text(word):
                raise click.UsageError(f"{word!r} is not UTF-8 text")
        # where the reader of a pipe has gone, click exits with 1, and quietly
        result = cli.main(words, prog_name="taskplatform", standalone_mode=False)
    except click.ClickException as fault:
        fault.show()
        return fault.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _show_all(stream: TextIO) -> None:
    """Where the terminal cannot show a character, show its escape."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _redis_hint() -> str:
    from taskplatform.settings import settings, shown_url

    return f"TASKPLATFORM_REDIS_URL is {shown_url(settings().redis_url)}: start that server, or the whole platform with `taskplatform up`"
