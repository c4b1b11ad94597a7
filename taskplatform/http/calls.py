"""What is sent, and what became of it: the values that the rest of the package works with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.metadata import version
from typing import Any

from taskplatform.errors import HttpError

USER_AGENT = f"taskplatform/{version('taskplatform')}"

PLATFORM_HEADERS = frozenset({"x-job-id", "x-user-id", "x-task-type", "idempotency-key"})
"""Set for every call; what a definition says of them is not taken."""

FRAMING_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Set by the client, because answers are read as they are and a wrong one would break the connection for the next call."""

URL = re.compile(
    r"(?P<scheme>https?)://(?:(?P<userinfo>[^/?#@]*)@)?"
    r"(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE,
)
NOT_IN_URL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True, slots=True)
class Call:
    """What to send, with all values filled in. Its repr shows none of them."""

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """The values that came from the environment."""


class OutcomeKind(StrEnum):
    COMPLETED = "completed"
    RETRY = "retry"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call."""

    kind: OutcomeKind
    reason: str
    """Such as "HTTP 503", "connection refused" or "deadline of 25m exceeded"."""
    status: int | None
    """Of the last answer; None if there was none."""
    duration_ms: int
    excerpt: str
    """The first characters of the answer, printable and without secrets."""
    retry_after: timedelta | None
    """When the target wants to be asked again, from 0 to the longest wait that the client accepts."""
    timed_out: bool

    @property
    def detail(self) -> dict[str, Any]:
        """What the history keeps. What there is nothing to say of is left out."""
        detail: dict[str, Any] = {"duration_ms": self.duration_ms}
        if self.status is not None:
            detail["status"] = self.status
        if self.excerpt:
            detail["excerpt"] = self.excerpt
        return detail


class RefusedError(HttpError):
    """The call cannot succeed however often it is tried. The message is the reason."""


def classify(status: int) -> OutcomeKind:
    """2xx completes; 408, 425, 429 and 5xx are worth another try; the rest, redirects that were not followed included, is not."""
    if 200 <= status <= 299:
        return OutcomeKind.COMPLETED
    if status in (408, 425, 429) or 500 <= status <= 599:
        return OutcomeKind.RETRY
    return OutcomeKind.FAILED


def parse_retry_after(value: str | None, *, now: datetime, longest: timedelta) -> timedelta | None:
    """The wait that a `Retry-After` asks for: seconds or an HTTP date (RFC 9110, 10.2.3), from 0 to `longest`; else None."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(timedelta(seconds=int(text)), longest) if len(text) <= 9 else longest
    moment = http_date(text)
    try:
        return None if moment is None else min(max(moment - now, timedelta()), longest)
    except OverflowError:
        return None


def http_date(text: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text or "")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
