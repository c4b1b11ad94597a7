"""`taskplatform tasks`: the definitions. None of it needs Redis."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskplatform.cli.arguments import PRIORITIES, example, json_option
from taskplatform.cli.output import complain, counted, json_text, moment_text, schedule_text, show_fields, show_json, show_rows
from taskplatform.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from taskplatform.addresses import Target
    from taskplatform.catalogue import Catalogue
    from taskplatform.errors import Fault


@click.group()
def tasks() -> None:
    """The definitions: what can run."""


@tasks.command("list", epilog=example("tasks list --domain billing --priority high"))
@click.option("--domain", help="Only those of one file, such as billing for billing.yaml.")
@click.option("--priority", type=click.Choice(PRIORITIES), help="Only those of one priority.")
@json_option
def list_(domain: str | None, priority: str | None, *, as_json: bool) -> None:
    """List the definitions."""
    from taskplatform.drills import is_drill
    from taskplatform.faults import did_you_mean

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
    columns = {
        "id": lambda one: one.id,
        "name": lambda one: one.name,
        "schedule": lambda one: schedule_text(one.schedule),
        "priority": lambda one: one.priority,
    }
    show_rows(chosen, columns, as_json=as_json, record=lambda one: _record(catalogue, one.id))


@tasks.command(epilog=example("tasks show monthly_billing"))
@click.argument("id_", metavar="ID")
@json_option
def show(id_: str, *, as_json: bool) -> None:
    """Show one definition with all its fields."""
    from taskplatform.schedule import next_occurrence

    catalogue = _catalogue()
    definition = catalogue.require(id_)
    record = _record(catalogue, id_)
    fields = {name: value for name, value in record.items() if name not in ("interval", "cron") and value != {}}
    shown = {name: json_text(value) if isinstance(value, dict) else value for name, value in fields.items()}
    shown["schedule"] = schedule_text(definition.schedule)
    shown["next"] = moment_text(next_occurrence(definition.schedule, time.time_ns() // 1_000_000))
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
    from taskplatform.settings import environment, settings

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
