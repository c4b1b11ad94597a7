"""`taskplatform verify`: is what is deployed as it must be?"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import duration, example, json_option
from taskplatform.cli.output import Columns, complain, remark, show_json, show_rows
from taskplatform.errors import InvalidInput, SettingsError, TaskPlatformError

if TYPE_CHECKING:
    from taskplatform.verification.disruptive import Disruption
    from taskplatform.verification.report import Line

_FAILED, _WRONG, _COULD_NOT_RUN = 1, 2, 3


@click.command(epilog=example('verify --disruptive --kill-beat "docker kill platform-beat-1"'))
@click.option("--only", metavar="CHECK", multiple=True, help="Only this check, by its name in the table. Repeatable.")
@click.option("--disruptive", is_flag=True, help="Also kill the beat that leads, and a worker, and see what comes of it.")
@click.option("--kill-beat", metavar="COMMAND", help="How to kill the beat that leads, where it runs elsewhere or something restarts it.")
@click.option("--kill-worker", metavar="COMMAND", help="The same for a worker. Both find the id of who is meant in TASKPLATFORM_VERIFY_ID.")
@click.option(
    "--report",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to. Default: a new folder in TASKPLATFORM_DATA_DIR.",
)
@click.option("--timeout", type=duration, default="60s", show_default=True, help="How long each check waits for its jobs.")
@click.option("--api", "api_url", metavar="URL", help="Where the control API is. Default: where the settings say.")
@click.option(
    "--api-ca",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The CA of its certificate, as a PEM file.",
)
@click.option("--listen", metavar="ADDRESS:PORT", help="Open the target of calls here. Default: as TASKPLATFORM_VERIFY_TARGET says.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    only: tuple[str, ...],
    report: Path | None,
    timeout: timedelta,
    kill_beat: str | None,
    kill_worker: str | None,
    api_url: str | None,
    api_ca: Path | None,
    listen: str | None,
    *,
    disruptive: bool,
    as_json: bool,
) -> None:
    """Verify the platform as it is deployed, and write a report.

    It runs about a hundred small jobs of users of its own, and removes them. Exits with 0 when nothing failed (what was not run is
    counted, with the reason), 1 when a check failed, 2 when the command line was wrong, and 3 when it could not run.
    """
    from taskplatform.settings import settings
    from taskplatform.verification.run import Options, connect
    from taskplatform.verification.run import verify as run

    if not disruptive and (kill_beat or kill_worker):
        raise click.UsageError("--kill-beat and --kill-worker go with --disruptive")
    try:
        chosen = settings()
        options = Options(
            only=only,
            disruption=_disruption(kill_beat, kill_worker) if disruptive else None,
            timeout=timeout,
            api_url=api_url,
            api_ca=api_ca,
            api_key=chosen.api_key.get_secret_value() if chosen.api_key else None,
            listen=listen,
        )
    except (InvalidInput, SettingsError) as fault:
        complain(str(fault))
        ctx.exit(_WRONG)
    try:
        with _ended_by_sigterm(), closing(connect(chosen)) as platform:
            found = run(platform, chosen, options, say=remark)
        folder = report or chosen.data_dir / "verify" / f"{found.began:%Y%m%dT%H%M%SZ}-{found.run}"
        written = found.write(folder)
    except (TaskPlatformError, OSError) as fault:
        complain(f"the verification could not run: {fault}")
        ctx.exit(_COULD_NOT_RUN)
    if as_json:
        show_json(found.to_json())
    else:
        remark("")
        columns: Columns[Line] = {
            "check": lambda one: one.check,
            "outcome": lambda one: one.outcome,
            "took": lambda one: f"{one.seconds:.1f} s",
            "what was found": lambda one: one.text,
        }
        show_rows(found.lines, columns, as_json=False)
    remark(f"{'passed' if found.passed else 'FAILED'}: {found.summary}; the report is {written}")
    ctx.exit(0 if found.passed else _FAILED)


def _disruption(beat: str | None, worker: str | None) -> Disruption:
    from taskplatform.verification.disruptive import Disruption, by_command

    return Disruption(beat=by_command(beat) if beat else None, worker=by_command(worker) if worker else None)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A verification that is told to end removes what it has made, as with Ctrl-C."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
