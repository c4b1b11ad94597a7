"""A job's way through a real worker, however it was submitted, and what is told of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestSetup

from taskplatform.errors import InvalidInput, TaskPlatformError, UnknownUser
from taskplatform.model import JobState, Priority
from taskplatform.platform import Platform
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target

Submit = Callable[[Site, str], str]

WAYS: dict[str, Submit] = {
    "Platform.enqueue": lambda site, user: site.platform.enqueue("call", user=user, params={"note": "a"}).id,
    "delay": lambda site, user: str(site.app.tasks["call"].delay(user=user, note="a").id),
    "apply_async": lambda site, user: str(
        site.app.tasks["call"].apply_async(kwargs={"user": user, "note": "a"}, countdown=0.3, priority=0).id
    ),
    "send_task": lambda site, user: str(site.app.send_task("call", kwargs={"user": user, "note": "a"}).id),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_completes_whichever_way_it_was_submitted(
    celery_setup: CeleryTestSetup, site: Site, target: Target, user: str, way: str
) -> None:
    job_id = WAYS[way](site, user)
    job = site.wait_for(job_id)
    assert job.state is JobState.COMPLETED, site.story(job_id)

    (call,) = target.calls(user=user)
    assert (call.method, call.path, json.loads(call.body)) == ("POST", f"/call/{user}", {"user": user, "note": "a"})
    assert call.headers["X-Job-ID"] == call.headers["Idempotency-Key"] == job_id
    assert call.headers["X-User-ID"] == user
    assert call.headers["X-Task-Type"] == "call"
    assert call.headers["Authorization"] == f"Bearer {site.environment['SECRET']}"
    assert celery_setup.app is site.app


def test_the_history_tells_every_step(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(201, body="made\x00 it", after_seconds=0.3))
    job = site.wait_for(site.platform.enqueue("call", user=user).id)

    history = site.platform.history(job.id)
    assert [line.to_state for line in history] == ["pending", "queued", "assigned", "running", "completed"]
    assert [line.from_state for line in history] == [None, "pending", "queued", "assigned", "running"]
    assert [line.at_ms for line in history] == sorted(line.at_ms for line in history)
    assert [line.attempt for line in history] == [0, 0, 1, 1, 1]
    node = celery_setup.worker.hostname()
    assert all(line.worker.startswith(f"{node}#") for line in history[2:])
    assert [line.worker for line in history[:2]] == ["", ""]
    last = history[-1]
    assert last.reason == "HTTP 201"
    assert last.detail["status"] == 201
    assert last.detail["excerpt"].startswith("made")
    assert last.detail["duration_ms"] >= 300
    (call,) = target.calls(job=job.id)
    assert history[3].at_ms <= call.at_ms <= last.at_ms


def test_what_comes_from_the_environment_is_told_nowhere(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    secret = site.environment["SECRET"]
    other = site.user()
    target.answer(user, Answer(404, body=f"no entry with {secret}"))
    target.answer(other, Answer(after_seconds=1.5))
    failed = site.wait_for(site.platform.enqueue("call", user=user).id)
    running = site.wait_for(site.platform.enqueue("call", user=other).id, JobState.RUNNING)

    stored = _dump(site)
    assert running.id in stored
    assert '"id": "@@ID@@"' in stored.replace("\\", ""), "what messages are made of"
    assert secret not in stored
    assert secret not in site.logs()
    assert failed.reason == "HTTP 404"
    assert "***" in site.platform.history(failed.id)[-1].detail["excerpt"]
    assert all(call.headers["Authorization"].endswith(secret) for call in target.calls(user=user))


def _dump(site: Site) -> str:
    """Everything in Redis."""
    read: dict[str, Callable[[str], Any]] = {
        "string": site.redis.get,
        "hash": site.redis.hgetall,
        "list": lambda key: site.redis.lrange(key, 0, -1),
        "set": site.redis.smembers,
        "zset": lambda key: site.redis.zrange(key, 0, -1),
        "stream": site.redis.xrange,
    }
    return "\n".join(f"{key} {read[str(site.redis.type(key))](str(key))}" for key in site.redis.scan_iter() if site.redis.exists(key))


def test_a_python_function_gets_its_job_and_its_answer_is_kept(
    celery_setup: CeleryTestSetup, site: Site, target: Target, user: str
) -> None:
    site.platform.subscribe(user, "returning", params={"a": [1], "b": "subscription"})
    job = site.wait_for(site.platform.enqueue("returning", user=user, params={"b": "own"}).id)
    assert job.state is JobState.COMPLETED, site.story(job.id)
    last = site.platform.history(job.id)[-1]
    assert json.loads(last.detail["excerpt"]) == {"user": user, "attempt": 1, "params": {"a": [1], "b": "own"}}
    assert len(target.calls(job=job.id)) == 1


def test_the_same_idempotency_key_is_the_same_job(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    first = site.platform.enqueue("call", user=user, idempotency_key="order 1")
    site.wait_for(first.id)
    again = site.platform.enqueue("call", user=user, idempotency_key="order 1", params={"note": "other"})
    by_celery = site.app.tasks["call"].apply_async(kwargs={"user": user}, task_id="order 1")
    assert first.id == again.id == by_celery.id
    # a job that comes after them has run: one more for the first would have, too
    site.wait_for(site.platform.enqueue("call", user=user).id)
    assert len(target.calls(job=first.id)) == 1


@pytest.mark.parametrize(("given", "expected"), [(None, "medium"), (0, "high"), (2, "high"), (3, "medium"), (7, "low"), ("low", "low")])
def test_celerys_priorities_are_the_platforms(site: Site, user: str, given: int | str | None, expected: str) -> None:
    result = site.app.tasks["call"].apply_async(kwargs={"user": user}, countdown=3600, priority=given)
    job = site.platform.job(result.id)
    assert job.priority is Priority(expected)
    assert abs(job.execute_after_ms / 1000 - time.time() - 3600) < 60
    site.platform.cancel(job.id)


def test_what_cannot_become_a_job_is_refused(site: Site, platform: Platform, user: str) -> None:
    task = site.app.tasks["call"]
    with pytest.raises(UnknownUser, match="nobody"):
        task.delay(user="nobody")
    with pytest.raises(InvalidInput, match="countdown"):
        task.apply_async(kwargs={"user": user}, countdown=-1)
    with pytest.raises(InvalidInput, match="positional"):
        task.delay(user)
    with pytest.raises(InvalidInput, match="priority"):
        task.apply_async(kwargs={"user": user}, priority=10)
    with pytest.raises(InvalidInput, match="link"):
        task.apply_async(kwargs={"user": user}, link=task.s())
    with pytest.raises(InvalidInput, match="delay"):
        task(user=user)
    assert platform.jobs(user=user).items == ()


def test_a_task_called_like_a_function_does_not_run(site: Site, user: str, celery_setup: CeleryTestSetup) -> None:
    app: Celery = celery_setup.app
    with pytest.raises(InvalidInput, match="runs only as a job"):
        app.tasks["returning"].run(user=user)


def test_celerys_results_are_read_from_the_history(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    task = site.app.tasks["call"]
    target.answer(user, Answer(body="well", after_seconds=0.5), Answer(404))
    result = task.delay(user=user)
    eventually(lambda: result.state == "STARTED", "Celery does not see that it runs")
    assert result.get(timeout=60)["excerpt"] == "well"
    assert result.state == "SUCCESS"
    refused = task.delay(user=user)
    with pytest.raises(TaskPlatformError, match="HTTP 404"):
        refused.get(timeout=60)
    assert refused.state == "FAILURE"
    waiting = task.apply_async(kwargs={"user": user}, countdown=3600)
    assert waiting.state == "PENDING"
    site.platform.cancel(waiting.id)
    assert waiting.state == "REVOKED"
