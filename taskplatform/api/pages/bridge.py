"""Asks the platform what another branch of this release adds to it, and gives None where it has not got that yet.

Only for as long as these branches are apart: at the merge each function is its one line, without the look.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from taskplatform.platform import Platform


def why(platform: Platform, user: str, definition: str, *, at: datetime | None, last: int) -> Sequence[Any] | None:
    """What became of a user's occurrences, the newest first: `taskplatform.answers.Answer`."""
    ask = getattr(platform, "why", None)
    return None if ask is None else ask(user, definition, at=at, last=last)


def coming(platform: Platform, user: str, definition: str | None = None, *, count: int = 1) -> Any | None:
    """A user's next moments, and of which definitions nothing comes, and why: `taskplatform.answers.Coming`."""
    ask = getattr(platform, "coming", None)
    return None if ask is None else ask(user, definition, count=count)
