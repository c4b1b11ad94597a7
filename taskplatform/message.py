"""The Celery message of a definition, as a template that the release script fills in.

It is what the installed Celery's `apply_async` sends for the same task (message protocol 2,
https://docs.celeryq.dev/en/stable/internals/protocol.html), but for two things: the body is plain JSON, not base64, because
kombu takes `body_encoding` as optional and Lua has no base64; and the header `delivery` numbers the release.
A test holds it against `apply_async`, so that an upgrade that changes the format fails loudly.
"""

from __future__ import annotations

import json
from datetime import timedelta

from taskplatform.model import Definition

#: What the release script fills in. Ids hold no character that JSON or Python's repr would escape.
ID, USER, DELIVERY, RETRIES, QUEUE = "@@ID@@", "@@USER@@", "@@DELIVERY@@", "@@RETRIES@@", "@@QUEUE@@"

#: An HTTP call keeps its deadline itself and knows why it ended; the soft limit is for one that does not.
CALL_MARGIN = timedelta(seconds=2)
#: How long a run may go on after its soft limit: to record how it ended.
HARD_LIMIT_MARGIN = timedelta(seconds=5)


def time_limits(definition: Definition) -> tuple[float, float]:
    """Hard and soft limit of one attempt in seconds, as Celery takes them."""
    soft = definition.work_limit + (CALL_MARGIN if definition.config is not None else timedelta())
    return (max(definition.timeout, soft + HARD_LIMIT_MARGIN).total_seconds(), soft.total_seconds())


def message_template(definition: Definition) -> str:
    """The message with its five blanks."""
    body = [[], {"user": USER}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    message = {
        "body": json.dumps(body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": definition.id,
            "id": ID,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": RETRIES,
            "timelimit": list(time_limits(definition)),
            "root_id": ID,
            "parent_id": None,
            "argsrepr": "()",
            "kwargsrepr": repr({"user": USER}),
            "origin": "taskplatform",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
            "delivery": DELIVERY,
        },
        "properties": {
            "correlation_id": ID,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
            "delivery_tag": f"{ID}#{DELIVERY}",
        },
    }
    text = json.dumps(message)
    for number in (DELIVERY, RETRIES):
        text = text.replace(f'"{number}"', number)
    return text


def is_job(delivery_tag: str) -> bool:
    """Whether a message is a job's, by the tag that the template gives it; kombu's own are UUIDs."""
    return "#" in delivery_tag
