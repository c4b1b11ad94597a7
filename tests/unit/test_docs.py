"""What the documents say is so: commands that exist, settings that are all there with their defaults, links that lead somewhere."""

from __future__ import annotations

import re
import shlex
from datetime import timedelta

import click
import pytest
import yaml

from taskplatform.cli import cli
from taskplatform.model import Definition, format_duration
from taskplatform.settings import PREFIX, Settings
from tests.cli_reference import DOCUMENT, reference
from tests.conftest import ROOT
from tests.documents import PAGES, blocks, calls

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def _commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every call of the command, in a block of whatever mark or in a sentence: its page and its words."""
    typed = [(block.page, tuple(words)) for path in PAGES for block in blocks(path) for program, words in calls(block) if _ours(program)]
    inline = [(name, code) for name, text in TEXTS.items() for code in re.findall(r"`taskplatform ([a-z][^`\n]*)`", text)]
    return sorted({*typed, *((name, tuple(shlex.split(re.split(r"\s+[#>|]\s", code)[0]))) for name, code in inline)})


def _ours(program: str) -> bool:
    return program in ("taskplatform", ".venv/bin/taskplatform")


@pytest.mark.parametrize(("document", "command"), _commands())
def test_every_taskplatform_command_in_a_document_is_one(document: str, command: tuple[str, ...]) -> None:
    target: click.Command = cli
    context = target.make_context("taskplatform", ["-" if word.endswith(".csv") else word for word in command])  # it need not be there
    while isinstance(target, click.Group):
        rest = [*context._protected_args, *context.args]
        if not rest and target.invoke_without_command:
            return
        name, found, rest = target.resolve_command(context, rest)
        assert found is not None, f"{document}: {command}"
        if not rest and isinstance(found, click.Group) and not found.invoke_without_command:
            return  # a group, named in a sentence
        if not rest and any(isinstance(parameter, click.Argument) and parameter.required for parameter in found.params):
            return  # named in a sentence, without its arguments
        target, context = found, found.make_context(name, rest, parent=context)


def test_the_reference_of_the_command_line_is_of_these_commands() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == reference(text), "docs/cli.md is not of these commands: `make docs` writes it anew"


def test_the_documents_show_commands() -> None:
    assert len(_commands()) > 8


def test_every_setting_is_documented_with_its_default() -> None:
    rows = dict(re.findall(rf"^\| `{PREFIX}([A-Z_]+)` \| `([^`]*)` \|", TEXTS["docs/settings.md"], re.MULTILINE))
    expected = {}
    for name, field in Settings.model_fields.items():
        expected[name.upper()] = _as_written(field.get_default(call_default_factory=True))
    assert rows == expected


def _as_written(default: object) -> str:
    """A default as somebody would write it into a file of settings."""
    if isinstance(default, timedelta):
        return format_duration(default)
    if default in (None, {}, ()):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_every_field_of_a_definition_is_documented() -> None:
    missing = [name for name in Definition.model_fields if f"`{name}`" not in TEXTS["docs/definitions.md"]]
    assert missing == []


@pytest.mark.parametrize("name", ["README.md", "docs/definitions.md", "docs/writing-definitions.md", "docs/coming-from-celery-beat.md"])
def test_the_definitions_shown_load_as_they_stand(name: str) -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXTS[name], re.DOTALL)]
    assert blocks
    for block in blocks:
        for task in block["tasks"]:
            merged = {**task, "config": {**block.get("defaults", {}).get("config", {}), **task["config"]}}
            assert Definition.model_validate(merged).id == task["id"]


def test_nothing_is_left_to_be_filled_in() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"\b(FIGURES|TODO|TBD|FIXME)\b", text), name


def test_the_tests_that_a_document_names_exist() -> None:
    named = {name: re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text) for name, text in TEXTS.items()}
    assert len(named["docs/reliability.md"]) > 40
    for name, tests in named.items():
        for file, test in tests:
            # the same name may be a unit and an acceptance module
            same = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file)]
            assert same, f"{name}: {file}"
            assert not test or any(f"def {test}(" in text for text in same), f"{name}: {file}::{test}"


def test_links_lead_to_files() -> None:
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["docs/README.md"]))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - listed == set()
