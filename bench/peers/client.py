"""The HTTP client of the peers' jobs."""

from __future__ import annotations

import threading

import requests

_own = threading.local()


def get(url: str) -> int:
    """One GET on this thread's pooled connection. Returns the status; raises requests.HTTPError for a bad one."""
    if not hasattr(_own, "session"):
        _own.session = requests.Session()
    response: requests.Response = _own.session.get(url, timeout=60)
    response.raise_for_status()
    return response.status_code
