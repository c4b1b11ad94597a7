"""Writes the part of docs/cli.md that follows from the commands themselves: `python -m tests.cli_reference`, which `make docs` runs.

What stands before the mark is written by hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from taskplatform.cli import EXIT_CODES, cli

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
MARK = "<!-- What follows is written by `python -m tests.cli_reference` -->\n"


def main() -> None:
    """Write the document anew."""
    DOCUMENT.write_text(reference(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def reference(text: str) -> str:
    """The document, of which only what stands before the mark is kept."""
    by_hand, mark, _ = text.partition(MARK)
    assert mark, f"{DOCUMENT.name} has no line {MARK!r}"
    return by_hand + MARK + "".join(_parts())


def _parts() -> Iterator[str]:
    yield "\n## Exit codes\n\n| code | means |\n|---|---|\n"
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |\n"
    yield "\n## Commands\n\n"
    context = click.Context(cli, info_name="taskplatform")
    yield f"Options of `taskplatform` itself, before the command:\n\n{_options(cli, context)}"
    yield from _commands(cli, context)


def _commands(group: click.Group, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.commands[name]
        if command.hidden:
            continue
        with click.Context(command, info_name=name, parent=parent) as context:
            yield _command(command, context)
            if isinstance(command, click.Group):
                yield from _commands(command, context)


def _command(command: click.Command, context: click.Context) -> str:
    depth = context.command_path.count(" ") + 2
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    text, examples = _split(f"{inspect.cleandoc(command.help or '')}\n{command.epilog or ''}")
    parts = [f"\n{'#' * depth} {context.command_path}\n\n```text\n{usage}\n```\n\n{text}\n"]
    if options := _options(command, context):
        parts.append(f"\n{options}")
    if examples:
        parts.append("\n```sh example\n" + "".join(f"{line}\n" for line in examples) + "```\n")
    return "".join(parts)


def _split(text: str) -> tuple[str, list[str]]:
    """What a help says, and its examples. What click shall not wrap (a paragraph that begins with \\b) is text as it stands."""
    said, examples = [], []
    for paragraph in re.split(r"\n\s*\n", text.replace("\b\nExample", "\n\n\b\nExample")):
        lines = paragraph.strip("\n").splitlines()
        if lines[:1] == ["\b"] and re.fullmatch(r"Examples?:", lines[1].strip()):
            examples += [line.strip() for line in lines[2:]]
        elif lines[:1] == ["\b"]:
            said.append("```text\n" + "\n".join(lines[1:]) + "\n```")
        elif paragraph.strip():
            said.append("\n".join(line.strip() for line in lines))
    return "\n\n".join(said), examples


def _options(command: click.Command, context: click.Context) -> str:
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None and not {"--help", "--version"} & set(parameter.opts):
            names, what = (_cell(part) for part in record)
            rows.append(f"| `{names}` | {what} |\n")
    return f"| option | |\n|---|---|\n{''.join(rows)}" if rows else ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    main()
