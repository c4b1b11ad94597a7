"""Texts of mails that are put together from many events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def render_digest(job: RunningJob) -> dict[str, object]:
    """Subject and plain text of a digest. With no items there is no mail, and `subject` and `text` are None.

    Parameters: `title`, `items` (a list of `{section, title}`, with a `link` where there is one), `limit_per_section`.
    Sections and items keep their order; what is over the limit is counted. Line breaks in titles become spaces, so that
    a title can neither add a mail header nor fake a section.
    """
    given = Inputs(job.params)
    title = _one_line(given.text("title"))
    limit = given.integer("limit_per_section", minimum=1, maximum=100)
    sections: dict[str, list[str]] = {}
    for item in given.records("items"):
        line = f"- {_one_line(item.text('title'))}"
        if "link" in item:
            line += f" <{_one_line(item.text('link'))}>"
        sections.setdefault(_one_line(item.text("section")), []).append(line)
    count = sum(len(lines) for lines in sections.values())
    if not count:
        return {"subject": None, "text": None, "items": 0}
    blocks = ["\n".join([section, *_cut(lines, limit)]) for section, lines in sections.items()]
    return {"subject": f"{title}: {count} {'update' if count == 1 else 'updates'}", "text": "\n\n".join(blocks), "items": count}


def _cut(lines: list[str], limit: int) -> list[str]:
    left = len(lines) - limit
    return lines if left <= 0 else [*lines[:limit], f"  and {left} more"]


def _one_line(text: str) -> str:
    return " ".join(text.split())
