"""The command `taskplatform`.

What a person did wrong, or what is not there, is said in a line or two on stderr, never as a traceback. `EXIT_CODES` says what the
exit codes mean; those of `doctor` are as monitoring plugins have them.

Results go to stdout: a table on a terminal, else lines with tabs, and JSON with `--json`; remarks go to stderr. What a
command needs is imported when it runs, so that help comes at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TextIO

import click

from taskplatform.cli import (
    answers,
    breakers,
    certs,
    dead,
    doctor,
    forecast,
    jobs,
    keys,
    limits,
    log_level,
    operations,
    subscriptions,
    tasks,
    users,
    verify,
)
from taskplatform.cli.completion import completion
from taskplatform.cli.output import complain, counted, remark
from taskplatform.cli.remote import keep_options, remote_options
from taskplatform.errors import ApiUnavailable, CatalogueError, Outage, StoreError, StoreUnavailable, TaskPlatformError

FAILED, WRONG_USE, NO_ANSWER, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = {
    0: "done; of `health`: all is well",
    FAILED: "not done, or not all of it: it is refused, not there, or not accepted; of what tells how something is: not well",
    WRONG_USE: "the command line is wrong; nothing was done",
    NO_ANSWER: "the platform cannot be asked: Redis or the API does not answer, or does not let us in",
    INTERRUPTED: "stopped by Ctrl-C",
}


class Failure(click.ClickException):
    """What the platform raised, for people."""

    exit_code = FAILED

    def __init__(self, fault: TaskPlatformError) -> None:
        super().__init__(str(fault))
        self._fault = fault

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002 - click's signature
        if isinstance(self._fault, CatalogueError):
            complain(f"{counted(len(self._fault.faults), 'fault')} in the definitions")
            remark(self.message)
        elif isinstance(self._fault, StoreUnavailable):
            complain(self.message)
            if self._fault.outage is Outage.UNREACHABLE and not isinstance(self._fault, ApiUnavailable):
                remark(_redis_hint())
        else:
            complain(self.message)


class Unanswered(Failure):
    """The same, where there was no answer to what was asked."""

    exit_code = NO_ANSWER


class _Root(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Also by a name that it once had."""
        return super().get_command(ctx, FORMER_NAMES.get(cmd_name, cmd_name))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreError as fault:
            raise Unanswered(fault) from fault
        except TaskPlatformError as fault:
            raise Failure(fault) from fault
        except OSError as fault:
            if fault.errno is None or fault.errno == errno.EPIPE:
                raise
            # of a file or folder that a command was given
            named = f"{str(fault.filename)[:200]}: " if fault.filename is not None else ""
            raise Failure(TaskPlatformError(f"{named}{fault.strerror}")) from fault


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="taskplatform", message="%(version)s")
@remote_options
@click.pass_context
def cli(
    ctx: click.Context, url: str | None, key_file: Path | None, ca: Path | None, client_cert: Path | None, client_key: Path | None
) -> None:
    """Per-user jobs from static definitions, on Celery.

    Settings come from TASKPLATFORM_* variables, .env and taskplatform.yaml in the current folder. Commands work on the Redis of
    TASKPLATFORM_REDIS_URL, or over a control API with --url and a key.

    \b
    Examples:
      taskplatform jobs list --state failed --since 1d
      taskplatform --url https://host:8443 --key-file key --ca ca.crt jobs list --json
    """
    keep_options(ctx, url=url, key_file=key_file, ca=ca, client_cert=client_cert, client_key=client_key)


FORMER_NAMES = {"dead": "dead-letters"}

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
    *answers.COMMANDS,
    doctor.doctor,
    forecast.forecast,
    keys.keys,
    keys.audit,
    certs.certs,
    completion,
    verify.verify,
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
