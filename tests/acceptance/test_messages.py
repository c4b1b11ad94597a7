"""What becomes of messages and events when a connection breaks or a worker ends. The broker has no notes of jobs; the ledger finds them."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from taskplatform.model import JobState
from tests.acceptance.nodes import WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

RUN = ["queued", "assigned", "running", "completed"]


@pytest.fixture
def site(new_site: Callable[[], Site]) -> Iterator[Site]:
    """Its workers and its server are ended here."""
    with_its_own_server = new_site()
    yield with_its_own_server
    with_its_own_server.close()


def _worker(site: Site, *options: str) -> WorkerNode:
    worker = site.worker(*options)
    worker.ready()
    eventually(lambda: any(one.id.startswith(f"{worker.node}#") for one in site.platform.store.workers()), "no heartbeat")
    return worker


@contextmanager
def _events(site: Site) -> Iterator[Callable[[], list[list[dict[str, Any]]]]]:
    """Asks for the task events since, each list as it was sent."""
    sent: list[list[dict[str, Any]]] = []
    with site.redis.pubsub(ignore_subscribe_messages=True) as listener:  # type: ignore[no-untyped-call]
        listener.psubscribe("/0.celeryev/task.*")
        wait_until(lambda: site.redis.pubsub_numpat())

        def so_far() -> list[list[dict[str, Any]]]:
            while message := listener.get_message():
                sent.append(json.loads(base64.b64decode(json.loads(message["data"])["body"])))
            return sent

        yield so_far


def _of(job_id: str, sent: list[list[dict[str, Any]]]) -> list[str]:
    return [event["type"] for events in sent for event in events if event["uuid"] == job_id]


def test_a_job_that_was_received_and_not_started_runs_elsewhere(site: Site, target: Target) -> None:
    user = site.user()
    victim = _worker(site, "--concurrency", "1")
    for process in victim.processes():
        if process.pid != victim.pid:
            os.kill(process.pid, signal.SIGSTOP)
    job = site.platform.enqueue("call", user=user)
    inspect = site.app.control.inspect([victim.node])
    eventually(lambda: any(request["id"] == job.id for request in (inspect.reserved() or {}).get(victim.node, [])), "it was not received")
    assert site.platform.job(job.id).state is JobState.QUEUED
    victim.kill("SIGKILL")

    _worker(site, "--concurrency", "1")
    since_ms = site.platform.store.now_ms()  # before that nobody was there to look
    assert site.wait_for_loss(job, since_ms).state is JobState.COMPLETED
    assert site.states(job.id) == ["pending", "queued", "pending", *RUN], site.story(job.id)
    assert site.changes(job.id)[2].reason == "its message was lost: released again"
    assert len(target.calls(user=user)) == 1
    assert site.redis.exists("unacked", "unacked_index") == 0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_restarted_server_breaks_off_no_run(site: Site, target: Target, pool: str) -> None:
    user = site.user()
    target.answer(user, Answer(after_seconds=2.0))
    worker = _worker(site, "--pool", pool, "--concurrency", "2")
    jobs = [site.platform.enqueue("call", user=user).id for _ in range(2)]
    wait_until(lambda: len(target.calls(user=user)) == 2, message="the jobs have not started")
    site.server.restart()
    for job in site.wait_for_all(jobs):
        assert job.state is JobState.COMPLETED
        assert site.states(job.id) == ["pending", *RUN], site.story(job.id)
    assert len(target.calls(user=user)) == 2
    # it serves on, and nothing of before comes back
    after = site.user()
    assert site.wait_for(site.platform.enqueue("call", user=after).id).state is JobState.COMPLETED
    assert len(target.calls(user=user)) == 2
    eventually(lambda: not site.redis.exists("unacked", "unacked_index", "high", "medium", "low"), "something is left in the broker")
    assert worker.status == "running"
    assert "EMERGENCY DUMP" not in worker.logs()


def test_the_events_of_a_burst_go_together(site: Site) -> None:
    _worker(site, "--concurrency", "4")
    user = site.user()
    with _events(site) as so_far:
        began = time.monotonic()
        jobs = [site.platform.enqueue("returning", user=user).id for _ in range(40)]
        site.wait_for_all(jobs)
        eventually(lambda: all("task-succeeded" in _of(job_id, so_far()) for job_id in jobs), "events are missing")
        seconds = time.monotonic() - began
        sent = so_far()
    for job_id in jobs:
        assert _of(job_id, sent) == ["task-received", "task-started", "task-succeeded"]
    # ten times a second, and whenever there are 24
    assert len(sent) <= seconds / 0.1 + 3 * len(jobs) / 24 + 1


def test_a_worker_that_stops_still_tells_of_what_it_ends(site: Site, target: Target) -> None:
    user = site.user()
    target.answer(user, Answer(after_seconds=1.5))
    worker = _worker(site, "--pool", "threads", "--concurrency", "1")
    with _events(site) as so_far:
        job = site.platform.enqueue("call", user=user)
        wait_until(lambda: target.calls(user=user), message="the job has not started")
        worker.kill("SIGTERM")
        assert worker.wait() == 0, worker.logs()
        assert site.platform.job(job.id).state is JobState.COMPLETED
        eventually(lambda: "task-succeeded" in _of(job.id, so_far()), "nobody heard of its end")
