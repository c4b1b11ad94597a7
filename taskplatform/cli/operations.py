"""Commands about the platform as a whole, and about definitions as they run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from taskplatform.cli.arguments import FEW, connected, definition_argument, duration, example, json_option, limit_option, warned_options
from taskplatform.cli.completion import workers as worker_ids
from taskplatform.cli.output import Columns, counted, exact_text, heed, moment_text, plain, remark, show_json, show_rows, span_text
from taskplatform.errors import TaskPlatformError

# the same as Role, without its module's imports
ROLES = ("platform", "observer")

if TYPE_CHECKING:
    from taskplatform.cli.arguments import AnyPlatform
    from taskplatform.health import Problem
    from taskplatform.store import Beat, Change, Garbage, Occurrence, Worker


@click.command(epilog=example("trigger daily_user_report --window 5m"))
@definition_argument
@click.option("--window", type=duration, help="Spread over so long. Default: the definition's window.")
@click.option("--key", metavar="TEXT", help="The same key gives the same occurrence, so that a repeated call runs nothing twice.")
@json_option
def trigger(definition: str, window: timedelta | None, key: str | None, *, as_json: bool) -> None:
    """Run a definition now for all its subscribers.

    It is an extra occurrence; those of the schedules stay as they are.
    """
    with connected() as platform:
        at, subscribers = platform.trigger(definition, window=window, idempotency_key=key)
        at_ms = round(at.timestamp() * 1000)
        found = platform.occurrences(definition, since=at)
        opened = [one for one in found if (one.at_ms, one.source) == (at_ms, "trigger")]
        asked = platform.definition(definition).window if window is None else window
        with suppress(TaskPlatformError):  # an API key that may trigger need not be one that may ask
            for one in platform.health().problems:
                if (one.code, one.subject) == ("definition_paused", definition):
                    remark(f"this occurrence is skipped: {one.text}")
    over = _window_text(opened[0]) if opened else exact_text(round(asked / timedelta(milliseconds=1)))
    if as_json:
        show_json({"definition": definition, "at": moment_text(at_ms), "subscribers": subscribers, "over": over})
        return
    click.echo(f"{definition} triggered at {moment_text(at_ms)} for {counted(subscribers, 'subscriber')}, over {over}")


@click.command(epilog=example('pause daily_user_report --why "the report API is down"'))
@definition_argument
@click.option("--why", default="", help="For the change log.")
def pause(definition: str, why: str) -> None:
    """Plan and release nothing of a definition.

    That ends with resume. What waits is kept.
    """
    with connected() as platform:
        click.echo(f"{definition} {'paused' if platform.pause_definition(definition, why=why) else 'was paused already'}")


@click.command(epilog=example("resume daily_user_report"))
@definition_argument
@warned_options("Resume")
@click.pass_context
def resume(ctx: click.Context, definition: str, *, yes: bool, strict: bool) -> None:
    """End the pause of a definition.

    With 1,000 subscribers or more it is first forecast what they bring in the next 24 hours, with what waits. Where a limit would be used
    up or jobs would wait, that is said; on a terminal you are asked, elsewhere it goes on, unless --strict.
    """
    with connected() as platform:
        warnings = _warnings_of_resume(platform, definition)
        heed(ctx, warnings, question="Resume all the same?", refused="nothing was resumed", yes=yes, strict=strict)
        click.echo(f"{definition} {'resumed' if platform.resume_definition(definition) else 'was not paused'}")


def _warnings_of_resume(platform: AnyPlatform, definition: str) -> list[str]:
    """What a forecast says against it; nothing where there are few subscribers."""
    from taskplatform.errors import InvalidInput, NotFound
    from taskplatform.forecast import warnings_of

    if platform.count_subscribers(definition) < FEW:
        return []
    try:
        return warnings_of(platform.forecast(resume=[definition]))
    except (InvalidInput, NotFound) as fault:
        remark(f"what it brings cannot be forecast: {fault}")
        return []


def _window_text(one: Occurrence) -> str:
    """How long its window is, and what it would be without limits where that is another."""
    used, asked = exact_text(one.window_ms), exact_text(one.asked_ms)
    return used if used == asked else f"{used} (asked {asked})"


def _occurrence_record(one: Occurrence) -> dict[str, object]:
    """In JSON its windows are durations, not instants like all else in ms."""
    return {**plain(one), "window": exact_text(one.window_ms), "asked": exact_text(one.asked_ms)}


_CHANGES: Columns[Change] = {
    "at": lambda one: moment_text(one.at_ms),
    "who": lambda one: one.actor,
    "what": lambda one: one.kind,
    "subject": lambda one: one.subject,  # see _subject_text
    "detail": lambda one: one.detail,
}
#: More names in one entry than these are of a deployment, and counted.
_NAMED = 5


def _subject_text(one: Change, about: Sequence[str]) -> str:
    """Whom it names; of very many those who were asked for."""
    named = one.subject.split()
    if len(named) <= _NAMED:
        return one.subject
    shown = [name for name in named if name in about] or named[:2]
    return f"{' '.join(shown)} and {len(named) - len(shown)} more"


@click.command(epilog=example("changes u1 daily_user_report"))
@click.argument("about", metavar="[USER|DEFINITION]...", nargs=-1)
@limit_option(50)
@json_option
def changes(about: tuple[str, ...], limit: int, *, as_json: bool) -> None:
    """List who changed what, the newest first.

    With users or definitions, what names all of them. An entry that names very many is shortened; --json has all of them.
    """
    columns: Columns[Change] = {**_CHANGES, "subject": lambda one: _subject_text(one, about)}
    with connected(definitions=False) as platform:
        show_rows(platform.changes(about=about, limit=limit), columns, as_json=as_json)


@click.command(epilog=example("occurrences daily_user_report"))
@definition_argument
@limit_option(20)
@json_option
def occurrences(definition: str, limit: int, *, as_json: bool) -> None:
    """List what became of a definition's occurrences.

    Over how long each is spread, how many jobs it made, how many subscribers were paused or disabled, or why it was skipped.
    """
    columns: Columns[Occurrence] = {
        "at": lambda one: moment_text(one.at_ms),
        "state": lambda one: one.state,
        "window": _window_text,
        "jobs": lambda one: str(one.planned),
        "paused": lambda one: str(one.paused),
        "disabled": lambda one: str(one.disabled),
        "source": lambda one: one.source,
        "reason": lambda one: one.reason,
        "schedule": lambda one: "own" if "~" in one.group else "",
    }
    with connected() as platform:
        show_rows(platform.occurrences(definition, limit=limit), columns, as_json=as_json, record=_occurrence_record)


@click.group(invoke_without_command=True, epilog=example("nodes --json"))
@json_option
@click.pass_context
def nodes(ctx: click.Context, *, as_json: bool) -> None:
    """List the workers, or drain one.

    What they serve, what they run and when they last said that they live.
    """
    if ctx.invoked_subcommand is not None:
        return
    with connected(definitions=False) as platform:
        workers = platform.workers()
        now_ms = platform.now_ms()
    columns: Columns[Worker] = {
        "worker": lambda one: one.id,
        "queues": lambda one: ",".join(one.queues),
        "running": lambda one: f"{len(one.running)} of {one.slots}{' (drained)' if one.drained else ''}",
        "heartbeat": lambda one: moment_text(one.heartbeat_ms),
        "silent for": lambda one: span_text(max(0, now_ms - one.heartbeat_ms)),
    }
    show_rows(workers, columns, as_json=as_json)


@nodes.command("drain", epilog=example("nodes drain celery@host#1a2b3c4d"))
@click.argument("worker", shell_complete=worker_ids)
def drain_node(worker: str) -> None:
    """Let a worker take nothing new.

    What it has goes on. It lives, and stays so until it is resumed or ends.
    """
    with connected(definitions=False) as platform:
        click.echo(f"{worker} {'drained' if platform.drain_worker(worker) else 'was drained already'}")


@nodes.command("resume", epilog=example("nodes resume celery@host#1a2b3c4d"))
@click.argument("worker", shell_complete=worker_ids)
def resume_node(worker: str) -> None:
    """Let a worker that was drained take jobs again."""
    with connected(definitions=False) as platform:
        click.echo(f"{worker} {'resumed' if platform.resume_worker(worker) else 'was not drained'}")


@click.command(epilog=example("beats --json"))
@json_option
def beats(*, as_json: bool) -> None:
    """List the beats.

    Which one leads, and what each would publish. The highest number is the newest release. One that died is shown for some hours.
    """
    with connected(definitions=False) as platform:
        found = platform.beats()
        now_ms = platform.now_ms()
    columns: Columns[Beat] = {
        "beat": lambda one: one.id,
        "leads": lambda one: one.leads,
        "catalogue": lambda one: one.catalogue,
        "number": lambda one: one.number,
        "since": lambda one: moment_text(one.since_ms),
        "heartbeat": lambda one: moment_text(one.heartbeat_ms),
        "silent for": lambda one: span_text(max(0, now_ms - one.heartbeat_ms)),
    }
    show_rows(found, columns, as_json=as_json)


@click.group()
def garbage() -> None:
    """What lay in a queue and was no message.

    Workers set it aside and go on.
    """


_GARBAGE: Columns[Garbage] = {
    "at": lambda one: moment_text(one.at_ms),
    "queue": lambda one: one.queue,
    "reason": lambda one: one.reason,
    "worker": lambda one: one.worker,
    "begins": lambda one: one.text[:100],
}


@garbage.command("list", epilog=example("garbage list --json"))
@limit_option(50)
@json_option
def list_garbage(limit: int, *, as_json: bool) -> None:
    """List what was set aside, the newest first.

    The newest 1000 are kept. JSON has up to 4 KB of each, the table how it begins.
    """
    with connected(definitions=False) as platform:
        show_rows(platform.garbage(limit=limit), _GARBAGE, as_json=as_json)


@garbage.command("clear", epilog=example("garbage clear"))
def clear_garbage() -> None:
    """Forget what was set aside."""
    with connected(definitions=False) as platform:
        click.echo(f"{counted(platform.clear_garbage(), 'message')} forgotten")


@click.command(epilog=example("health --json"))
@json_option
@click.pass_context
def health(ctx: click.Context, *, as_json: bool) -> None:
    """Say what is wrong, since when, and what to do.

    Exits with 0 if all is well (remarks of severity info do not count), 1 if not, and 3 if the platform cannot be asked.
    """
    columns: Columns[Problem] = {
        "severity": lambda one: one.severity,
        "what": lambda one: one.code,
        "since": lambda one: moment_text(one.since_ms),
        "problem": lambda one: one.text,
    }
    with connected(definitions=False) as platform:
        found = platform.health()
    if as_json:
        show_json({**plain(found), "well": found.well})
    else:
        show_rows(found.problems, columns, as_json=False)
        remark("all is well" if found.well else f"{counted(sum(one.severity != 'info' for one in found.problems), 'problem')}")
    ctx.exit(0 if found.well else 1)


@click.command(epilog=example("up --workers 4 --slots 8"))
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--slots", type=click.IntRange(1, 1000), help="Jobs that each runs at a time. Default: TASKPLATFORM_WORKER_SLOTS.")
@click.option("--no-flower", is_flag=True, help="Without Flower.")
@click.pass_context
def up(ctx: click.Context, workers: int, slots: int | None, *, no_flower: bool) -> None:
    """Run the whole platform here until Ctrl-C.

    That is a server, a mock API, beat, workers and Flower. With TASKPLATFORM_REDIS_URL set, that server is used.
    """
    from taskplatform.cli.remote import refuse_url
    from taskplatform.local import up as run
    from taskplatform.settings import settings

    refuse_url()
    ctx.exit(run(settings(), workers=workers, slots=slots, flower=not no_flower))


@click.command(epilog=example("demo"))
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Run the main job on real parts, and verify it.

    It takes a minute and a half, and exits with 0 only if all is as it must be.
    """
    from taskplatform.cli.remote import refuse_url
    from taskplatform.demo import run

    refuse_url()
    ctx.exit(run())


@click.command(epilog=example("api --port 8443"))
@click.option("--host", help="Listen on this address. Default: TASKPLATFORM_API_HOST.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Listen on this port. Default: TASKPLATFORM_API_PORT.")
@click.option("--insecure-http", is_flag=True, help="Plain HTTP, on a loopback address.")
@click.option("--openapi", is_flag=True, help="Print the OpenAPI document and end.")
@click.pass_context
def api(ctx: click.Context, *, host: str | None, port: int | None, insecure_http: bool, openapi: bool) -> None:
    """Serve the control API until SIGTERM or Ctrl-C.

    It speaks TLS with the certificate of TASKPLATFORM_API_TLS_CERT and TASKPLATFORM_API_TLS_KEY.
    """
    from taskplatform.cli.remote import refuse_url
    from taskplatform.settings import load_settings

    refuse_url()
    given = {"api_host": host, "api_port": port}
    chosen = load_settings(**{name: value for name, value in given.items() if value is not None})
    if openapi:
        from taskplatform.api.application import openapi_document

        show_json(openapi_document(chosen))
        return
    from taskplatform.api.server import run

    ctx.exit(run(chosen, insecure_http=insecure_http))


@click.command("redis-acl", epilog=example("redis-acl platform", "redis-acl observer --database 1"))
@click.argument("role", type=click.Choice(ROLES))
@click.option("--namespace", metavar="TEXT", help="First part of the keys. Default: TASKPLATFORM_NAMESPACE.")
@click.option("--database", type=click.IntRange(0, 15), help="Number of the database. Default: that of TASKPLATFORM_REDIS_URL.")
@json_option
def redis_acl(role: str, namespace: str | None, database: int | None, *, as_json: bool) -> None:
    """Print the rights that a user needs at Redis.

    They are the rules for ACL SETUSER or an ACL file, behind the user's name, on and password. "platform" is for beat, workers, API and
    this program; "observer" for a Flower that only shows. It asks no server.
    """
    from urllib.parse import urlsplit

    from taskplatform.cli.remote import refuse_url
    from taskplatform.settings import settings
    from taskplatform.store.acl import Role, rules

    refuse_url()
    chosen = settings()
    if database is None:
        number = urlsplit(chosen.redis_url).path.strip("/")
        database = int(number) if number.isdecimal() else 0
    found = rules(Role(role), namespace=namespace or chosen.namespace, database=database)
    if as_json:
        show_json({"role": role, "rules": found.split(" ")})
    else:
        click.echo(found)


@click.command(context_settings={"ignore_unknown_options": True}, epilog=example("bench", "bench plan --scale 0.1"))
@click.argument("words", metavar="[WORD]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bench(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Run the benchmarks of the source tree.

    What follows goes to `python -m bench`; `taskplatform bench -- --help` says what there is. An installed package has no benchmarks.
    """
    import os
    import subprocess
    import sys
    from pathlib import Path

    import taskplatform
    from taskplatform.cli.remote import refuse_url

    refuse_url()
    root = Path(taskplatform.__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        raise click.ClickException("the benchmarks are in the source tree, and this is an installed package: clone it and run `make bench`")
    # their own folder is needed to find them, and Ctrl-C reaches them by itself
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen([sys.executable, "-m", "bench", *words], cwd=root, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    ctx.exit(code if code >= 0 else 128 - code)


COMMANDS = (trigger, pause, resume, changes, occurrences, nodes, beats, health, garbage, api, up, demo, redis_acl, bench)
