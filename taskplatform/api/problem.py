"""Errors as problem details (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Problem(Exception):
    """What is answered instead of a result: `status`, and in the body `title`, `detail` and what else there is to say."""

    def __init__(self, status: int, title: str, detail: str = "", *, headers: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})
        self.more = more
