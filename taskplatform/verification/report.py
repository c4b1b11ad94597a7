"""What a verification found, and how it is written: Markdown for people, JSON for programs, SVG for plots.

Everything in it was measured or read by that run; what was not is "not run", with the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the JSON: a field that changes its meaning makes it another."""


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture twice: as lines of text, and as a file."""

    title: str
    text: str
    file: str
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What came of one check."""

    check: str
    title: str
    outcome: Outcome
    text: str
    """What was found, in a sentence or two; why it failed or was not run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, as JSON has it; units are in the names."""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole verification."""

    run: str
    began: datetime
    seconds: float
    where: str
    """What was verified: the address of Redis or of the API, without passwords."""
    disruptive: bool
    lines: Sequence[Line]
    removed: str
    """What became of the verification's users and jobs."""

    def count(self, outcome: Outcome) -> int:
        """How many checks ended so."""
        return Counter(line.outcome for line in self.lines)[outcome]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one was run."""
        return not self.count(Outcome.FAILED) and self.count(Outcome.PASSED) > 0

    @property
    def summary(self) -> str:
        """All outcomes in a line."""
        return ", ".join(f"{self.count(outcome)} {outcome}" for outcome in Outcome)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; times in UTC, ISO 8601."""
        return {
            "version": VERSION,
            "run": self.run,
            "began": self.began.astimezone(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(self.seconds, 3),
            "where": self.where,
            "disruptive": self.disruptive,
            "passed": self.passed,
            "counts": {outcome.value: self.count(outcome) for outcome in Outcome},
            "checks": [
                {
                    "check": line.check,
                    "title": line.title,
                    "outcome": line.outcome.value,
                    "text": line.text,
                    "seconds": round(line.seconds, 3),
                    "facts": line.facts,
                    "tables": [
                        {"title": one.title, "columns": list(one.columns), "rows": [list(map(_plain, row)) for row in one.rows]}
                        for one in line.tables
                    ],
                    "plots": [{"title": one.title, "file": one.file} for one in line.plots],
                }
                for line in self.lines
            ],
            "removed": self.removed,
        }

    def to_markdown(self) -> str:
        """As people read it."""
        began = self.began.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        parts = [
            "# Verification report",
            f"{'Passed' if self.passed else 'Failed'}: {self.summary}.",
            _markdown_table(
                ("", ""),
                [
                    ("began", began),
                    ("took", f"{self.seconds:.1f} s"),
                    ("platform", self.where),
                    ("disruptive checks", "asked for" if self.disruptive else "not asked for"),
                    ("run", self.run),
                    ("afterwards", self.removed),
                ],
            ),
            _markdown_table(
                ("check", "outcome", "took", "what was found"),
                [(line.title, line.outcome.value, f"{line.seconds:.1f} s", line.text) for line in self.lines],
            ),
        ]
        for line in self.lines:
            parts.append(f"## {_inline(line.title)}: {line.outcome}")
            parts.append(_inline(line.text))
            for table in line.tables:
                parts += [f"### {_inline(table.title)}", _markdown_table(table.columns, table.rows)]
            for plot in line.plots:
                parts += [f"### {_inline(plot.title)}", f"```text\n{plot.text}\n```", f"![{_inline(plot.title)}]({plot.file})"]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `report.md`, `report.json` and the plots. Returns the first. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.lines:
            for plot in line.plots:
                (folder / plot.file).write_text(plot.svg, encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        written = folder / "report.md"
        written.write_text(self.to_markdown(), encoding="utf-8")
        return written


def _plain(cell: object) -> object:
    return cell if cell is None or isinstance(cell, bool | int | float) else str(cell)


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_inline("" if cell is None else str(cell)) for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    """In one line, and read as it stands: names and reasons come from others."""
    shown = " ".join(text.split())
    for character in "\\`*[]<>|":
        shown = shown.replace(character, f"\\{character}")
    return shown
