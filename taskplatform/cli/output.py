"""How commands show what they found: tables for people, JSON for programs. Nothing else in this package formats a value.

On a terminal rows are a table, else lines of cells with tabs between them. Times are UTC, ISO 8601 with milliseconds. In JSON a
record has its fields by their names, but an instant `created_ms` is `created`, as text like the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from taskplatform.model import Schedule

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Columns = Mapping[str, Callable[[T], object]]
"""What a table shows: by heading, what a cell says of an item."""

_ROWS_PER_TABLE = 1000


class Page(Protocol[T_co]):
    """A page of a listing."""

    @property
    def items(self) -> tuple[T_co, ...]: ...
    @property
    def cursor(self) -> str | None: ...


def complain(text: str) -> None:
    """Say what went wrong, each line for itself."""
    for line in text.splitlines():
        click.echo(f"error: {line}", err=True)


def remark(text: str) -> None:
    """Say something that is not the result."""
    click.echo(text, err=True)


def heed(ctx: click.Context, warnings: Iterable[str], *, question: str, refused: str, yes: bool, strict: bool) -> None:
    """Say what a forecast warns of. With `strict` that is the end, and where it is answered no on a terminal: exit code 1."""
    found = list(warnings)
    for line in found:
        remark(f"warning: {line}")
    if found and strict:
        complain(f"{refused}, because of the warnings and --strict")
        ctx.exit(1)
    if found and not yes and sys.stdin.isatty() and not click.confirm(question, err=True):
        complain(refused)
        ctx.exit(1)


def show_rows(items: Iterable[T], columns: Columns[T], *, as_json: bool, record: Callable[[T], Any] | None = None) -> None:
    """Show a listing. In JSON it is an array of `record(item)`, which is `plain` unless given."""
    if as_json:
        _write_array(map(record or plain, items))
    elif sys.stdout.isatty():
        _write_tables(items, columns)
    else:
        _write_cells(columns)
        for item in items:
            _write_cells(cell(item) for cell in columns.values())


def show_line(item: T, columns: Columns[T], *, as_json: bool) -> None:
    """Show one item of a listing that goes on: a line of cells, or of JSON."""
    if as_json:
        click.echo(json.dumps(plain(item)))
    else:
        _write_cells(cell(item) for cell in columns.values())


def show_fields(shown: Mapping[str, object], *, as_json: bool, record: object) -> None:
    """Show one thing: `shown` for people, `record` in JSON. What is empty is left out on a terminal."""
    if as_json:
        show_json(plain(record))
    elif sys.stdout.isatty():
        _write_grid({name: value for name, value in shown.items() if value not in ("", None)})
    else:
        for name, value in shown.items():
            _write_cells((name, value))


def show_json(value: object) -> None:
    """Show a value that JSON has."""
    click.echo(json.dumps(value, indent=2))


def all_items(fetch: Callable[[str | None], Page[T]], *, cursor: str | None, everything: bool) -> Iterator[T]:
    """One page, or that one and all that follow. Where pages are left, a remark at the end says how to go on.

    The first is fetched at once: what is not accepted is said before anything is shown.
    """
    return _items_from(fetch(cursor), fetch, everything)


def _items_from(page: Page[T], fetch: Callable[[str | None], Page[T]], everything: bool) -> Iterator[T]:
    while True:
        yield from page.items
        if page.cursor is None:
            return
        if not everything:
            click.get_current_context().call_on_close(partial(remark, f"there may be more: --cursor '{page.cursor}'"))
            return
        page = fetch(page.cursor)


# --- values ----------------------------------------------------------------------------------------------------------


def moment_text(instant_ms: int | None) -> str:
    """An instant as text; nothing for None."""
    if instant_ms is None:
        return ""
    seconds, milliseconds = divmod(instant_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


def span_text(span_ms: float) -> str:
    """A span of time for people."""
    from taskplatform.model import span_text

    return span_text(span_ms)


def exact_text(span_ms: float) -> str:
    """A span of time as settings have it."""
    from taskplatform.model import format_ms

    return format_ms(span_ms)


def rate_text(per_second: float | None) -> str:
    """A rate as definitions have it; nothing for None."""
    from taskplatform.model import format_rate

    return "" if per_second is None else format_rate(per_second)


def counted(number: int, thing: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def json_text(value: object) -> str:
    """A mapping in one line; nothing for an empty one."""
    return json.dumps(value, ensure_ascii=False) if value else ""


def schedule_text(schedule: Schedule) -> str:
    """A schedule in words."""
    from taskplatform.schedule import in_words

    return in_words(schedule)


def plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return dict(_plain_field(field.name, getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else _plain_schedule(value)


def _plain_schedule(schedule: Schedule) -> Any:
    """As `--schedule` takes it."""
    from taskplatform.model import schedule_to_json

    return json.loads(schedule_to_json(schedule))


def _plain_field(name: str, value: Any) -> tuple[str, Any]:
    if name.endswith("_ms"):
        return name.removesuffix("_ms"), None if value is None else moment_text(value)
    return name, plain(value)


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_array(values: Iterable[Any]) -> None:
    """A value at a time, so that a listing of any length needs no memory."""
    before = "[\n"
    for value in values:
        click.echo(before + json.dumps(value), nl=False)
        before = ",\n"
    click.echo("[]" if before == "[\n" else "\n]")


def _write_cells(cells: Iterable[object]) -> None:
    click.echo("\t".join(map(_cell, cells)))


def _write_tables(items: Iterable[T], columns: Columns[T]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = iter(items)
    first = True
    while (chunk := list(islice(rows, _ROWS_PER_TABLE))) or first:
        table = Table(*columns, box=None, pad_edge=False, show_header=first)
        for item in chunk:
            table.add_row(*(Text(_cell(cell(item)), overflow="fold") for cell in columns.values()))
        Console(highlight=False).print(table)
        first = False


def _write_grid(shown: Mapping[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        grid.add_row(Text(name, style="bold"), Text(_cell(value), overflow="fold"))
    Console(highlight=False).print(grid)


def _cell(value: object) -> str:
    """Without what would break the line, or speak to the terminal."""
    text = {None: "", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
    return text if text.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
