"""What users, subscriptions and jobs cost in Redis, in bytes each: for docs/operating.md, "Capacity".

All on a real server, by the store's own verbs: users; subscriptions of each user; jobs that were submitted by hand and wait; and the
same jobs after they ran well, as they are kept for the retention, with the whole history and an excerpt of 200 characters of the answer.
What a planned job costs before it is released is in `plan`.
"""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import redis

from bench.population import create_users, http_definitions, subscribe_all
from bench.processes import server
from taskplatform.model import JobState, Priority
from taskplatform.planner import published
from taskplatform.store import Enqueue, Store, connect

DEFINITIONS = 10
_WORKER = "worker@bench"
_DETAIL = {"status": 200, "duration_ms": 50, "excerpt": "x" * 200}


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures. At scale 1: 50,000 users with 10 subscriptions each, and 50,000 jobs."""
    users = max(100, int(50_000 * scale))
    definitions = http_definitions(DEFINITIONS, interval="monthly")
    with server() as url:
        client = connect(url)
        store = Store(client)
        for definition in definitions:
            store.publish(published(definition), actor="bench")
        memory = [_memory(client)]
        create_users(store, users)
        memory.append(_memory(client))
        subscribe_all(store, users, [definition.id for definition in definitions])
        memory.append(_memory(client))
        far = timedelta(hours=1) / timedelta(milliseconds=1)
        ids = [f"{definitions[number % DEFINITIONS].id}:user{number}:m{number:016x}" for number in range(users)]
        store.enqueue([Enqueue(job_id, delay_ms=int(far)) for job_id in ids])
        memory.append(_memory(client))
        for job_id in ids:
            store.cancel(job_id, reason="canceled by bench")
        canceled = _memory(client)
        again = [f"{job_id}1" for job_id in ids]
        store.enqueue([Enqueue(job_id, delay_ms=0) for job_id in again])
        _work(store, client, users)
        assert store.counts()[JobState.COMPLETED] == users
        finished = _memory(client)
        client.close()
    user, subscription, waiting = ((after - before) / users for before, after in pairwise(memory))
    return {
        "users": users,
        "subscriptions": users * DEFINITIONS,
        "bytes_per_user": round(user),
        "bytes_per_subscription": round(subscription / DEFINITIONS),
        "bytes_per_waiting_job": round(waiting),
        "bytes_per_finished_job": round((finished - canceled) / users),
    }


def _work(store: Store, client: redis.Redis, count: int) -> None:
    """What a worker does, without its calls."""
    done = 0
    while done < count:
        store.heartbeat(_WORKER, slots=200, queues=list(Priority), buffer=1)
        store.release(limit=100)
        while raw := cast("str | None", client.rpop(Priority.MEDIUM)):
            headers = json.loads(raw)["headers"]
            run = store.start(headers["id"], delivery=headers["delivery"], worker=_WORKER)
            assert run.go, run.refusal
            store.finish(
                headers["id"], delivery=headers["delivery"], worker=_WORKER, state=JobState.COMPLETED, reason="HTTP 200", detail=_DETAIL
            )
            done += 1


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])
