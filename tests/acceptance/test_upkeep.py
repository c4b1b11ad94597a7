"""Dead letters that run again under their old keys, the sweep under load, and health with real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

import beat_schedule
from taskplatform.errors import UnknownJob
from taskplatform.model import JobState
from taskplatform.platform import JobRequest
from tests.acceptance.nodes import ROOT, BeatNode, WorkerNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until


@pytest.fixture
def site(own_site: Site) -> Site:
    """Workers and beats are this module's own."""
    return own_site


@pytest.fixture
def nodes(site: Site) -> Iterator[list[Any]]:
    """What a test starts; it is removed after it."""
    started: list[Any] = []
    yield started
    site.remove(*started)


def _worker(site: Site, nodes: list[Any], slots: int, retention: str = "3d") -> WorkerNode:
    worker = site.worker("--concurrency", str(slots), retention=retention)
    nodes.append(worker)
    worker.ready()
    return worker


def test_a_job_has_one_key_in_all_its_runs_and_no_two_jobs_share_one(site: Site, target: Target, nodes: list[Any]) -> None:
    """Over attempts, a retry, the loss of its worker, a redrive and a retry by hand; for jobs of every origin."""
    platform = site.platform
    first = _worker(site, nodes, 1)
    user, others = site.user(), [site.user() for _ in range(3)]
    # a retry, a loss, a failure for good, a redrive that fails too, and at last a retry by hand
    target.answer(user, Answer(503), Answer(hang=True), Answer(404), Answer(404), Answer(200))
    job = platform.enqueue("retried_call", user=user, idempotency_key="order 7")
    wait_until(lambda: len(target.calls(user=user)) == 2, message="no second attempt")
    first.kill("SIGKILL")
    _worker(site, nodes, 4)
    assert site.wait_for(job.id).state is JobState.FAILED
    assert [one.id for one in platform.dead_letters(user=user).items] == [job.id]
    platform.redrive(job.id)
    eventually(lambda: len(target.calls(user=user)) == 4 and platform.job(job.id).state is JobState.FAILED, "it was not redriven")
    platform.redrive(job.id)
    platform.redrive(job.id)
    wait_until(lambda: platform.job(job.id).state is JobState.COMPLETED, message=site.story(job.id))
    assert [call.key for call in target.calls(user=user)] == [job.id] * 5, "each run, and none that a repeated call made"

    # beside it: of the same key for others and for another definition, without a key, planned, and triggered
    for other in others:
        platform.subscribe(other, "call")
        platform.subscribe(other, "retried_call")
    beside = [platform.enqueue("call", user=user, idempotency_key="order 7")]
    beside += [platform.enqueue("retried_call", user=other, idempotency_key="order 7") for other in others]
    beside += [platform.enqueue("call", user=others[0]) for _ in range(3)]
    nodes.append(site.beat())
    nodes[-1].ready()
    eventually(lambda: nodes[-1].leads, "beat does not lead")
    for key in ("evening", "morning", "evening"):
        for definition in ("call", "retried_call"):
            platform.trigger(definition, window=timedelta(), idempotency_key=key)
    eventually(lambda: sum(len(target.calls(user=other)) for other in others) >= 3 + 3 + 3 * 4, "not all were called")
    site.wait_for_all([one.id for one in beside])
    calls = [call for other in [user, *others] for call in target.calls(user=other)]
    assert all(call.key == call.job for call in calls)
    of_others = [call.key for call in calls if call.key != job.id]
    assert len(of_others) == len(set(of_others)) == 1 + 3 + 3 + 3 * 4, "one call for each job, each with a key of its own"


def test_the_sweep_runs_while_the_high_queue_is_full(site: Site, target: Target, nodes: list[Any]) -> None:
    user = site.user()
    target.answer(user, Answer(after_seconds=0.05))
    old = site.platform.enqueue("call", user=user)
    _worker(site, nodes, 1, retention="1s")
    site.wait_for(old.id)
    wait_until(lambda: site.platform.store.now_ms() > (site.platform.job(old.id).finished_ms or 0) + 1100)
    load = site.platform.enqueue_many(JobRequest(definition="call", user=user, priority="high") for _ in range(400))
    wait_until(lambda: len(target.calls(user=user)) > 10)
    # as beat sends it
    site.app.send_task("taskplatform.sweep", **beat_schedule.beat_schedule["forget-finished-jobs"]["options"])

    def forgotten() -> bool:
        try:
            site.platform.job(old.id)
        except UnknownJob:
            return True
        return False

    wait_until(forgotten, message="it was not swept")
    waiting = [job.state for job in site.platform.store.jobs_by_id([one.id for one in load])]
    assert waiting.count(JobState.PENDING) > 20, "the queue was not full any more"
    site.platform.delete_user(user)


def _health(site: Site) -> tuple[int, set[str]]:
    """What the command says: its exit code, and the codes of the problems that are no remarks."""
    ran = subprocess.run(
        [sys.executable, "-c", "from taskplatform.cli import main; raise SystemExit(main())", "health", "--json"],
        cwd=ROOT,
        env=site.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = json.loads(ran.stdout)
    return ran.returncode, {one["code"] for one in found["problems"] if one["severity"] != "info"}


def _codes(site: Site) -> set[str]:
    return {one.code for one in site.platform.health().problems if one.severity != "info"}


def test_health_sees_what_is_done_to_processes(site: Site, target: Target, nodes: list[Any]) -> None:
    """A worker of the high queue alone, then one of all, then none; and a beat that stands still."""
    user = site.user()
    beat: BeatNode = site.beat()
    nodes.append(beat)
    partial = site.worker("--concurrency", "1", "-Q", "high")
    nodes.append(partial)
    partial.ready()
    beat.ready()
    eventually(lambda: beat.leads and _codes(site) == set(), f"not well: {site.platform.health()}")
    job = site.platform.enqueue("call", user=user)
    eventually(lambda: _codes(site) == {"queue_unserved"}, "nobody serves medium")
    _worker(site, nodes, 1)
    assert site.wait_for(job.id).state is JobState.COMPLETED
    eventually(lambda: _codes(site) == set(), "not well again")
    assert _health(site) == (0, set())

    beat.pause()
    for worker in nodes[1:]:
        worker.kill("SIGKILL")
    eventually(lambda: _codes(site) == {"no_worker", "planner_stopped"}, "nobody missed them")
    assert _health(site) == (1, {"no_worker", "planner_stopped"})
    beat.resume()
    eventually(lambda: "planner_stopped" not in _codes(site) or beat.status != "running", "beat neither plans nor ends")
