"""Whatever lies in a queue, a worker lives on and runs the good messages between and behind it."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from taskplatform.catalogue import load
from taskplatform.model import JobState
from taskplatform.planner import published
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Target
from tests.support import wait_until


@pytest.fixture
def site(own_site: Site) -> Site:
    """With workers of its own."""
    return own_site


@pytest.fixture(params=["prefork", "threads"])
def worker(request: pytest.FixtureRequest, site: Site) -> Iterator[WorkerNode]:
    """The only one."""
    started = site.worker("--pool", request.param, "--concurrency", "2")
    started.ready()
    yield started
    site.remove(started)
    site.platform.store.leave(next(iter(one.id for one in site.platform.store.workers()), ""))


def message(task: str = "taskplatform.sweep", body: Any = ([], {}, {}), **changes: Any) -> dict[str, Any]:
    """A message of a plain task, as kombu makes it."""
    properties = {"delivery_info": {"exchange": "", "routing_key": "low"}, "delivery_tag": f"tag-{task}", "body_encoding": "base64"}
    headers = {"task": task, "id": f"id-{task}", **changes.pop("headers", {})}
    encoded = base64.b64encode(body if isinstance(body, bytes) else json.dumps(body).encode()).decode()
    good = {"body": encoded, "content-type": "application/json", "content-encoding": "utf-8", "headers": headers, "properties": properties}
    return {**good, **changes}


def job_message(job_id: str, task: str = "call", *, delivery: Any = 1) -> dict[str, Any]:
    """A message as the release script makes it, for a job that it did not release."""
    changed = message(task, [[], {"user": "u1"}, {}], headers={"id": job_id, "delivery": delivery})
    changed["properties"] |= {"delivery_tag": f"{job_id}#{delivery}"}
    return changed


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in message().items() if key != name}


def with_property(name: str, value: Any) -> dict[str, Any]:
    return message(properties={**message()["properties"], name: value})


PICKLED = base64.b64encode(pickle.dumps(([], {}, {}))).decode()
GARBAGE: dict[str, tuple[Any, str]] = {
    "no text": (b"\xff\xfe\x00\x01", "not UTF-8"),
    "text": (b"hello", "not JSON"),
    "nothing": (b"", "not JSON"),
    "pickle alone": (pickle.dumps(([], {}, {})), "not UTF-8"),
    "a list": (b"[1, 2]", "JSON, but not an object"),
    "a number": (b"7", "JSON, but not an object"),
    "an empty object": (b"{}", "headers: None"),
    "no headers": (without("headers"), "headers: None"),
    "headers in a list": (message(headers={}) | {"headers": ["task"]}, "headers: ['task']"),
    "no task": (message() | {"headers": {"id": "x"}}, "header task"),
    "protocol 1": (message(body={"task": "taskplatform.sweep", "id": "x", "args": [], "kwargs": {}}) | {"headers": {}}, "header task"),
    "a strange time limit": (message(headers={"timelimit": 7}), "header timelimit"),
    "no properties": (without("properties"), "properties: None"),
    "no delivery_tag": (with_property("delivery_tag", None), "property delivery_tag"),
    "a delivery_tag in a list": (with_property("delivery_tag", []), "property delivery_tag"),
    "no delivery_info": (with_property("delivery_info", None), "property delivery_info"),
    "a strange body_encoding": (with_property("body_encoding", "rot13"), "property body_encoding"),
    "a strange correlation_id": (with_property("correlation_id", {"a": 1}), "property correlation_id"),
    "bad base64": (message() | {"body": "%%%"}, "body: not base64"),
    "a pickled body": (message() | {"body": PICKLED, "content-type": "application/x-python-serialize"}, "content-type"),
    "a body that is a number": (message(body=7), "body: not a list"),
    "a body that is no JSON": (message(body=b"hello"), "body: not JSON"),
    "a body of other parts": (message(body=[[], {}]), "body: not a list"),
    "a delivery that is no number": (job_message("call:u1:x", delivery="many"), "header delivery"),
    "another definition's job": (job_message("call:u1:x", "returning"), "header id"),
    "a job of one user for another": (
        job_message("call:u1:x") | {"body": message(body=[[], {"user": "u2"}, {}])["body"]},
        "body: [[], {'user': 'u2'}]: the job's user alone is expected",
    ),
    "an unknown task": (message("nothing.like.it"), "no task nothing.like.it is known here"),
    "a job that does not exist": (job_message("call:u1:none"), "the ledger has no job call:u1:none"),
    "a job of an unknown definition that does not exist": (
        job_message("nothing:u1:none", "nothing"),
        "the ledger has no job nothing:u1:none",
    ),
    "a definition's task without a job": (message("call", [[], {"user": "u1"}, {}]), "it has no header delivery"),
}


def test_garbage_is_set_aside_and_the_work_goes_on(site: Site, target: Target, worker: WorkerNode) -> None:
    store, user = site.platform.store, site.user()
    site.platform.clear_garbage()
    counted = store.counters().get("garbage", 0)
    jobs = []
    for number, (garbage, _) in enumerate(GARBAGE.values()):
        raw = garbage if isinstance(garbage, bytes) else json.dumps(garbage).encode()
        site.redis.lpush(("high", "medium", "low")[number % 3], raw)
        if number % 5 == 0:
            jobs.append(site.platform.enqueue("call", user=user).id)
    # what Celery sends to all workers is read in the same loop
    for raw in (b"\xff", b"[1]", b'{"headers": 1}', b'{"properties": {}, "body": 7}'):
        site.redis.publish("/0.celery.pidbox", raw)
    jobs.append(site.platform.enqueue("call", user=user).id)
    assert {job.state for job in site.wait_for_all(jobs)} == {JobState.COMPLETED}
    assert len(target.calls(user=user)) == len(jobs)

    fanout = 3  # kombu itself drops what is no JSON
    eventually(lambda: len(site.platform.garbage(limit=1000)) == len(GARBAGE) + fanout, "not all was set aside")
    kept = [one for one in site.platform.garbage(limit=1000) if "pidbox" not in one.queue]
    for kind, (_, reason) in GARBAGE.items():
        assert [one for one in kept if one.reason.startswith(reason)], f"{kind}: {reason} is not among {[one.reason for one in kept]}"
    assert store.counters()["garbage"] == counted + len(GARBAGE) + fanout
    assert all(one.worker.startswith(f"{worker.node}#") and one.queue for one in kept)
    assert worker.logs().count("a message was set aside") == len(GARBAGE) + fanout
    assert worker.status == "running"
    # none of it holds a slot, or is left in the broker
    eventually(lambda: site.redis.exists("high", "medium", "low", "unacked", "unacked_index") == 0, "something is left in the broker")
    inspect = site.app.control.inspect([worker.node], timeout=60, limit=1)
    eventually(lambda: (inspect.active(), inspect.reserved()) == ({worker.node: []}, {worker.node: []}), "something holds a slot")
    again = [site.platform.enqueue("sleeping", user=user, params={"seconds": 6}).id for _ in range(2)]
    ran = site.wait_for_all(again)
    assert ran[0].started_ms is not None
    assert ran[1].started_ms is not None
    assert abs(ran[0].started_ms - ran[1].started_ms) < 6000, "the one waited for the other"


def test_plain_tasks_still_run(site: Site, worker: WorkerNode) -> None:
    site.platform.clear_garbage()
    now = datetime.now(UTC)
    sent: list[dict[str, Any]] = [
        {},
        {"countdown": 0.2},
        {"eta": now + timedelta(seconds=0.3)},
        {"expires": 60},
        {"expires": now + timedelta(minutes=1), "queue": "high", "time_limit": 9, "soft_time_limit": 8, "compression": "gzip"},
    ]
    ids = [site.app.send_task("taskplatform.sweep", **options).id for options in sent]
    for task_id in ids:
        wait_until(lambda task_id=task_id: f"[{task_id}] succeeded" in worker.logs(), message=f"{task_id} has not run")  # type: ignore[misc]
    late = site.app.send_task("taskplatform.sweep", expires=now - timedelta(seconds=5)).id
    eventually(lambda: f"Discarding revoked task: taskplatform.sweep[{late}]" in worker.logs(), "what has expired runs")
    assert site.platform.garbage() == []
    eventually(lambda: site.redis.exists("unacked", "unacked_index", "high", "low") == 0, "something is left in the broker")


NEWER = """
tasks:
  - id: newer
    name: A definition that only newer workers know
    cron: "0 0 29 2 *"
    config: {endpoint: "${TARGET}/newer/{{user}}"}
"""


def test_a_job_of_a_newer_definition_waits_for_a_newer_worker(site: Site, target: Target, user: str, tmp_path: Path) -> None:
    """A rolling deployment."""
    older = site.worker("--concurrency", "1")
    shutil.copytree(Path(__file__).parent / "definitions", tmp_path / "tasks")
    (tmp_path / "tasks/newer.yaml").write_text(NEWER)
    definition = load(tmp_path / "tasks")["newer"]
    site.platform.store.publish(published(definition), actor="a newer beat")
    older.ready()
    from taskplatform.store import Enqueue

    job_id = f"newer:{user}:m1"
    assert site.platform.store.enqueue([Enqueue(job_id)]) == [True]
    refused = site.wait_for(job_id, JobState.PENDING)
    eventually(lambda: len(site.changes(job_id)) >= 3, "it was not given back")
    given_back = site.changes(job_id)[2]
    assert given_back.reason == f"worker {given_back.worker} does not know definition newer: given back"
    assert given_back.worker.startswith(f"{older.node}#")
    assert refused.attempt == 0
    eventually(lambda: site.redis.exists("unacked", "high", "medium", "low") == 0, "something is left in the broker")
    # the older one works on
    beside = site.wait_for(site.platform.enqueue("call", user=user).id)
    assert beside.state is JobState.COMPLETED

    older.kill("SIGTERM")
    newer = site.worker("--concurrency", "1", tasks_dir=str(tmp_path / "tasks"))
    newer.ready()
    done = site.wait_for(job_id)
    assert (done.state, done.attempt) == (JobState.COMPLETED, 1), site.story(job_id)
    assert done.worker.startswith(f"{newer.node}#")
    assert len(target.calls(job=job_id)) == 1
    site.remove(newer, older)
