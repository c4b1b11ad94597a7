"""Differences between a source text and its translation."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_PLACEHOLDER = re.compile(r"\{\w+\}")


def compare_messages(job: RunningJob) -> dict[str, object]:
    """What a translation lacks, what it has too much, and where its placeholders differ from the source's.

    Parameters: `source` and `translation`, texts by message key. Placeholders have the form `{name}`; their order may differ
    between languages, their number may not. `complete_percent` is of the source's messages.
    """
    given = Inputs(job.params)
    source, translation = given.record("source"), given.record("translation")
    wanted, found = set(source.names()), set(translation.names())
    shared = sorted(wanted & found)
    broken = [key for key in shared if _placeholders(source.text(key)) != _placeholders(translation.text(key))]
    return {
        "missing": sorted(wanted - found),
        "obsolete": sorted(found - wanted),
        "placeholders_differ": broken,
        "complete_percent": round(100 * (len(shared) - len(broken)) / len(wanted), 1) if wanted else 100.0,
    }


def _placeholders(text: str) -> Counter[str]:
    return Counter(_PLACEHOLDER.findall(text))
