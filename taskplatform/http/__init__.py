"""One HTTP call: rendered from a definition and a job, sent within a deadline, its answer classified.

What it promises:

- `render` lets a job's values fill the path, the query, headers and the body, and never change the host, the number of
  path segments, the set of headers or the keys of a JSON body. Values are substituted once and never scanned again.
- `Client.send` returns an Outcome whatever the network or the target does, at most moments after its deadline. The
  deadline holds for the whole call: name lookup, connect, TLS, sending, every byte of headers and body, redirects.
- A call, its redirects included, connects only to addresses of the public internet and to what is allowed beside them.
- An answer is read up to a limit, never decompressed and never held beyond that limit.
- What came from the environment is in no reason, excerpt, repr or log record.

Imports go one way: `client` uses `connections` and `redaction`, these and `rendering` use `calls`.
"""

from taskplatform.http.calls import (
    FRAMING_HEADERS,
    PLATFORM_HEADERS,
    USER_AGENT,
    Call,
    Outcome,
    OutcomeKind,
    classify,
    parse_retry_after,
)
from taskplatform.http.client import MAX_REDIRECTS, Abort, CallAborted, Client
from taskplatform.http.redaction import MIN_SECRET_LENGTH, redact, secrets_in
from taskplatform.http.rendering import render

__all__ = [
    "FRAMING_HEADERS",
    "MAX_REDIRECTS",
    "MIN_SECRET_LENGTH",
    "PLATFORM_HEADERS",
    "USER_AGENT",
    "Abort",
    "Call",
    "CallAborted",
    "Client",
    "Outcome",
    "OutcomeKind",
    "classify",
    "parse_retry_after",
    "redact",
    "render",
    "secrets_in",
]
