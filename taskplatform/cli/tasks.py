"""`taskplatform tasks`: the definitions, from their files; with a URL `list` and `show` tell what the API tells of them."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import PRIORITIES, example, json_option
from taskplatform.cli.completion import definitions
from taskplatform.cli.output import Columns, complain, counted, json_text, moment_text, schedule_text, show_fields, show_json, show_rows
from taskplatform.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from taskplatform.addresses import Target
    from taskplatform.catalogue import Catalogue
    from taskplatform.errors import Fault
    from taskplatform.model import Schedule


@click.group()
def tasks() -> None:
    """The definitions: what can run."""


@tasks.command("list", epilog=example("tasks list --domain billing --priority high"))
@click.option("--domain", help="Only those of one file, such as billing for billing.yaml.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Only those of one priority.")
@json_option
def list_(domain: str | None, priority: str | None, *, as_json: bool) -> None:
    """List the definitions."""
    from taskplatform.cli.remote import wanted
    from taskplatform.drills import is_drill
    from taskplatform.faults import did_you_mean

    if wanted():
        _list_remote(domain, priority, as_json=as_json)
        return
    catalogue = _catalogue()
    if domain is not None and domain not in catalogue.domains:
        hint = did_you_mean(domain, catalogue.domains)
        raise InvalidInput(f"there is no domain {domain!r}{hint}; domains are {', '.join(catalogue.domains)}")
    chosen = [
        definition
        for definition in catalogue.values()
        if domain in (None, catalogue.domain(definition.id))
        and priority in (None, definition.priority)
        # those are the platform's own: shown where somebody asks for their domain
        and (domain is not None or not is_drill(definition.id))
    ]
    show_rows(chosen, _COLUMNS, as_json=as_json, record=lambda one: _record(catalogue, one.id))


_COLUMNS: Columns[Any] = {
    "id": lambda one: one.id,
    "name": lambda one: one.name,
    "schedule": lambda one: schedule_text(one.schedule),
    "priority": lambda one: one.priority,
}


def _list_remote(domain: str | None, priority: str | None, *, as_json: bool) -> None:
    from taskplatform.cli.remote import connect
    from taskplatform.faults import did_you_mean

    with closing(connect()) as platform:
        found = platform.definitions()
    domains = list(dict.fromkeys(one.domain for one in found))
    if domain is not None and domain not in domains:
        raise InvalidInput(f"there is no domain {domain!r}{did_you_mean(domain, domains)}; domains are {', '.join(domains)}")
    chosen = [one for one in found if domain in (None, one.domain) and priority in (None, one.priority)]
    show_rows(chosen, _COLUMNS, as_json=as_json, record=lambda one: one.record)


@tasks.command(epilog=example("tasks show monthly_billing"))
@click.argument("id_", metavar="ID", shell_complete=definitions)
@json_option
def show(id_: str, *, as_json: bool) -> None:
    """Show one definition with all its fields."""
    from taskplatform.cli.remote import connect, wanted
    from taskplatform.schedule import next_occurrence

    schedule: Schedule
    if wanted():
        with closing(connect()) as platform:
            told = platform.definition(id_)
        schedule, record = told.schedule, dict(told.record)
    else:
        catalogue = _catalogue()
        schedule, record = catalogue.require(id_).schedule, _record(catalogue, id_)
    fields = {name: value for name, value in record.items() if name not in ("interval", "cron", "schedule") and value != {}}
    shown = {name: json_text(value) if isinstance(value, dict) else value for name, value in fields.items()}
    shown["schedule"] = schedule_text(schedule)
    shown["next"] = moment_text(next_occurrence(schedule, time.time_ns() // 1_000_000))
    show_fields(shown, as_json=as_json, record=record)


@tasks.command(epilog=example("tasks check tasks/billing.yaml"))
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=click.Path(path_type=Path))
@click.pass_context
def check(ctx: click.Context, paths: tuple[Path, ...]) -> None:
    """Check definition files.

    Without PATH, all in the folder of the definitions. Tells every fault, also a ${NAME} that is not in the environment and
    a Python function that cannot be imported from the current folder. Exits with 1 when there is one. Warns of calls that
    http_allow does not let through, as far as that is known without a name server.
    """
    from taskplatform.catalogue import check as check_files
    from taskplatform.catalogue import resolve_calls
    from taskplatform.cli.remote import refuse_url
    from taskplatform.settings import environment, settings

    refuse_url()
    variables = environment()
    catalogue, faults = check_files(paths or [settings().tasks_dir], environment=variables)
    if str(Path.cwd()) not in sys.path:  # as Celery does it
        sys.path.insert(0, str(Path.cwd()))
    faults = sorted([*faults, *resolve_calls(catalogue)], key=lambda fault: (fault.file, fault.line))
    for fault in faults:
        click.echo(str(fault))
    for warning in _refused_calls(catalogue, variables, settings().http_allow):
        click.echo(str(warning))
    if faults:
        complain(f"{counted(len(faults), 'fault')} in the definitions")
        ctx.exit(1)
    click.echo(f"{counted(len(catalogue), 'definition')} without a fault")


@tasks.command(epilog=example("tasks schema > tasks.schema.json"))
def schema() -> None:
    """Print a JSON Schema of definition files, for editors."""
    from taskplatform.catalogue import json_schema
    from taskplatform.cli.remote import refuse_url

    refuse_url()
    show_json(json_schema())


def _refused_calls(catalogue: Catalogue, variables: Mapping[str, str], allowed: Iterable[Target]) -> list[Fault]:
    """A warning for each refusal that is foreseen, at the first definition that it meets."""
    from taskplatform.addresses import AllowList

    guard = AllowList(allowed)
    met: dict[str, list[str]] = {}
    for id_, definition in catalogue.items():
        server = definition.config.server(variables) if definition.config is not None else None
        if server is not None and (refusal := guard.foreseen_refusal(*server)):
            met.setdefault(refusal, []).append(id_)
    warnings = []
    for refusal, ids in met.items():
        others = f" (and {counted(len(ids) - 1, 'more definition')})" if len(ids) > 1 else ""
        warnings.append(catalogue.fault(ids[0], "config.endpoint", f"warning: {refusal}{others}"))
    return warnings


def _catalogue() -> Catalogue:
    from taskplatform.catalogue import deployed
    from taskplatform.settings import settings

    return deployed(settings())


def _record(catalogue: Catalogue, id_: str) -> dict[str, Any]:
    definition = catalogue[id_].model_dump(mode="json", exclude_none=True)
    return {**definition, "domain": catalogue.domain(id_), "source": catalogue.source(id_)}
