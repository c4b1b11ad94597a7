"""The mock API: httpbin, which also tells when the last calls of jobs arrived.

`python -m taskplatform.mock_api HOST:PORT` serves it until it is ended. Under `CALLS_PATH` it answers with the last 10,000 calls that
came from jobs, as a JSON list of [seconds of its monotonic clock, job id]. It needs nothing of the platform but this file.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

CALLS_PATH = "/calls-of-jobs"
_MOST_CALLS = 10_000


def serve(listen: str) -> None:
    """Serve on HOST:PORT."""
    from httpbin import app
    from waitress import serve as listen_and_serve

    calls: deque[tuple[float, str]] = deque(maxlen=_MOST_CALLS)

    def counting(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CALLS_PATH:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(list(calls)).encode()]
        job = environ.get("HTTP_X_JOB_ID")
        if job:
            calls.append((time.monotonic(), job))
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    listen_and_serve(counting, listen=listen, threads=32, connection_limit=1000)


if __name__ == "__main__":
    # of a queue that is deep for a moment; of documentation pages that are not there
    logging.disable(logging.WARNING)
    serve(sys.argv[1])
