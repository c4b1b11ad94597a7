"""Workers and beats that are asked to stop, in every way: nothing is lost, nothing counts against a job, and they end in time.

The target is the judge: which calls it got, whether it could answer them, and whether another call of the job was open meanwhile.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import pytest

from taskplatform import guardian
from taskplatform.model import Job, JobState
from tests.acceptance.nodes import ProcessNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

POOLS = pytest.mark.parametrize("pool", ["prefork", "threads"])
#: The definitions of these tests have this one; a worker that shall have nothing to do serves only another.
QUEUE, OTHER_QUEUE = "medium", "low"
#: Celery's talk among workers takes a second at each start.
QUIET = ("--without-mingle", "--without-gossip")
#: On a busy machine a pool process may be slow to start a job that its worker has taken, and that must not be taken for a loss.
TIMEOUT = "15s"
#: Longer than anything here takes.
LONG = "120s"

Starts = Callable[..., WorkerNode]
N = TypeVar("N", bound=ProcessNode)
Keep = Callable[[N], N]
"""Takes a node, and gives it back."""


@pytest.fixture
def site(own_site: Site) -> Site:
    """Others must not suffer from what is done to the workers here."""
    return own_site


@pytest.fixture(scope="module")
def heir(own_site: Site) -> WorkerNode:
    """A worker that takes over; it does nothing before `_inherit`."""
    worker = own_site.worker("--concurrency", "4", "-Q", OTHER_QUEUE, *QUIET, heartbeat_timeout=TIMEOUT)
    worker.ready()
    return worker


@pytest.fixture
def start(site: Site, heir: WorkerNode, keep: Keep[WorkerNode]) -> Iterator[Starts]:
    """Starts the worker that is to stop, for which all work is until the heir serves too."""

    def begin(pool: str, *, proxy: Proxy | None = None, ready: bool = True, stop_grace: str) -> WorkerNode:
        node = keep(
            site.worker("--concurrency", "2", "--pool", pool, *QUIET, proxy=proxy, heartbeat_timeout=TIMEOUT, stop_grace=stop_grace)
        )
        if ready:
            node.ready()
            eventually(lambda: _is_known(site, node), "it does not say that it lives")
        return node

    yield begin
    site.app.control.cancel_consumer(QUEUE, destination=[heir.node], reply=True, limit=1, timeout=60)
    eventually(lambda: not _serves(site, heir), "the heir still serves")


@pytest.fixture
def keep(site: Site) -> Iterator[Keep[N]]:
    """For each node that the test starts: it ends with the test, and no lock outlives it."""
    nodes: list[ProcessNode] = []

    def until_the_end(node: N) -> N:
        nodes.append(node)
        return node

    yield until_the_end
    site.remove(*nodes)
    site.redis.delete("tp:redbeat::lock")


def _is_known(site: Site, node: WorkerNode) -> bool:
    return any(_is(node, worker.id) for worker in site.platform.store.workers())


def _is(node: WorkerNode, worker_id: str) -> bool:
    return worker_id.startswith(f"{node.node}#")


def _serves(site: Site, node: WorkerNode) -> bool:
    return any(_is(node, worker.id) and QUEUE in worker.queues for worker in site.platform.store.workers())


def _inherit(site: Site, heir: WorkerNode) -> None:
    site.app.control.add_consumer(QUEUE, destination=[heir.node], reply=True, limit=1, timeout=60)
    eventually(lambda: _serves(site, heir), "the heir does not serve")


def _running(site: Site, target: Target, *answers: Answer) -> tuple[str, Job]:
    """A new user, and a job of it that the target has got and that has no retries."""
    user = site.user()
    target.answer(user, *answers)
    job = site.platform.enqueue("call", user=user)
    wait_until(lambda: target.calls(user=user), message="the job has not started")
    return user, job


def _assert_given_back(site: Site, target: Target, user: str, job: Job, leaver: WorkerNode, heir: WorkerNode) -> None:
    """It was broken off, ran elsewhere, and that did not use up its only attempt."""
    finished = site.wait_for(job.id)
    assert finished.state is JobState.COMPLETED, site.story(job.id)
    assert _is(heir, finished.worker)
    run = ["queued", "assigned", "running"]
    assert site.states(job.id) == ["pending", *run, "retrying", *run, "completed"], site.story(job.id)
    back = site.changes(job.id)[4]
    assert _is(leaver, back.worker)
    assert back.reason == f"worker {back.worker} stopped"
    first, second = target.calls(user=user)
    assert first.key == second.key == job.id
    assert not first.answered.is_set()
    assert second.answered.wait(60)
    assert finished.failures == 0


def _assert_apart(target: Target, user: str) -> None:
    assert [call.beside for call in target.calls(user=user)] == [()] * 2, "two calls of the job at a time"


@POOLS
def test_what_runs_may_end_and_the_rest_is_given_back(site: Site, target: Target, start: Starts, heir: WorkerNode, pool: str) -> None:
    leaver = start(pool, stop_grace="4s")
    may_end = threading.Event()
    ending, soon = _running(site, target, Answer(until=may_end))
    hanging, late = _running(site, target, Answer(hang=True), Answer(200))
    _inherit(site, heir)
    leaver.kill("SIGTERM")
    eventually(lambda: "Warm shutdown" in leaver.logs(), "it does not stop")
    may_end.set()
    later = site.platform.enqueue("call", user=site.user())
    assert _is(heir, site.wait_for(later.id).worker)
    assert leaver.wait() == 0, leaver.logs()

    assert site.platform.job(soon.id).state is JobState.COMPLETED, site.story(soon.id)
    assert _is(leaver, site.platform.job(soon.id).worker)
    assert len(target.calls(user=ending)) == 1
    _assert_given_back(site, target, hanging, late, leaver, heir)
    _assert_apart(target, hanging)
    assert not _is_known(site, leaver)
    assert leaver.processes() == []


@POOLS
@pytest.mark.parametrize("signals", [["SIGTERM", "SIGTERM"], ["SIGQUIT"]], ids="-".join)
def test_a_second_signal_gives_all_back_now(
    site: Site, target: Target, start: Starts, heir: WorkerNode, pool: str, signals: list[str]
) -> None:
    leaver = start(pool, stop_grace=LONG)
    hanging, job = _running(site, target, Answer(hang=True), Answer(200))
    _inherit(site, heir)
    for number in signals:
        leaver.kill(number)
        eventually(lambda: "Warm shutdown" in leaver.logs(), "it does not stop")
    assert leaver.wait() == 0, leaver.logs()
    _assert_given_back(site, target, hanging, job, leaver, heir)
    _assert_apart(target, hanging)
    assert leaver.processes() == []


def test_what_is_canceled_while_its_worker_stops_is_stopped(site: Site, target: Target, start: Starts) -> None:
    leaver = start("prefork", stop_grace=LONG)
    _, job = _running(site, target, Answer(hang=True))
    leaver.kill("SIGTERM")
    eventually(lambda: "Warm shutdown" in leaver.logs(), "it does not stop")
    site.platform.cancel(job.id)
    assert leaver.wait() == 0, leaver.logs()
    assert site.platform.job(job.id).state is JobState.CANCELED
    assert "stopped" in site.notes(job.id)


def test_what_was_taken_and_has_not_started_is_given_back_at_once(site: Site, target: Target, start: Starts, heir: WorkerNode) -> None:
    leaver = start("prefork", stop_grace=LONG)
    for process in leaver.processes():
        if process.pid != leaver.pid:
            guardian.send(process, signal.SIGSTOP)
    user = site.user()
    jobs = [site.platform.enqueue("call", user=user) for _ in range(2)]
    eventually(lambda: all(site.platform.job(job.id).state is JobState.QUEUED for job in jobs), "they are not released")
    eventually(lambda: site.redis.llen(QUEUE) == 0, "their messages were not taken")
    _inherit(site, heir)
    leaver.kill("SIGTERM")
    for job in jobs:
        finished = site.wait_for(job.id)
        assert finished.state is JobState.COMPLETED
        assert _is(heir, finished.worker)
        assert site.states(job.id) == ["pending", "queued", "pending", "queued", "assigned", "running", "completed"], site.story(job.id)
        assert site.changes(job.id)[2].reason.endswith("stops: not started")
    assert leaver.status == "running", "it has not waited for what it runs"
    # what it holds does not come alive when its processes do
    leaver.resume()
    assert leaver.wait() == 0, leaver.logs()
    assert len(target.calls(user=user)) == 2
    assert site.redis.llen(QUEUE) == 0


@POOLS
def test_without_its_server_a_worker_ends_all_the_same(site: Site, target: Target, start: Starts, heir: WorkerNode, pool: str) -> None:
    with Proxy(site.server.port) as proxy:
        leaver = start(pool, proxy=proxy, stop_grace="1s")
        hanging, job = _running(site, target, Answer(hang=True), Answer(200))
        _inherit(site, heir)
        if pool == "prefork":
            proxy.cut()
            eventually(lambda: " waits: " in leaver.logs(), "it has not noticed")
        else:
            proxy.freeze()
        leaver.kill("SIGTERM")
        assert leaver.wait() == 0, leaver.logs()
        assert leaver.processes() == []
    finished = site.wait_for(job.id)
    assert finished.state is JobState.COMPLETED
    assert _is(heir, finished.worker)
    assert re.fullmatch(r"worker \S+ lost: .*; again in 1 s", site.changes(job.id)[4].reason)
    assert len(target.calls(user=hanging)) == 2


def test_a_worker_that_waits_for_its_server_at_the_start_ends_too(site: Site, start: Starts) -> None:
    with Proxy(site.server.port) as proxy:
        proxy.cut()
        leaver = start("prefork", proxy=proxy, ready=False, stop_grace=LONG)
        eventually(lambda: " waits: " in leaver.logs(), "it does not wait for its server")
        leaver.kill("SIGTERM")
        assert leaver.wait() == 0, leaver.logs()
        assert leaver.processes() == []


def test_beats_end_at_once_and_the_standby_leads(site: Site, keep: Keep[Any]) -> None:
    """With the usual interval. The lock would last for minutes: only its release lets the standby lead."""
    first, second = (keep(site.beat(beat_interval="1s", beat_lock_timeout=LONG, plan_batch="1")) for _ in range(2))
    wait_until(lambda: first.leads or second.leads, message="nobody leads")
    leader, standby = (first, second) if first.leads else (second, first)
    standby.ready()
    users = [site.user() for _ in range(200)]
    for user in users:
        site.platform.subscribe(user, "call")
    _, count = site.platform.trigger("call", window=timedelta(seconds=5))
    assert count >= len(users)
    wait_until(lambda: site.platform.jobs(definition="call", state=JobState.PENDING).items, message="nothing is planned")
    leader.kill("SIGTERM")
    assert leader.wait() == 0, leader.logs()
    wait_until(lambda: standby.leads, message="the standby waits for the lock to run out")
    for user in users:
        site.platform.unsubscribe(user, "call")
    standby.kill("SIGINT")
    assert standby.wait() == 0, standby.logs()


def test_beats_end_without_their_server(site: Site, keep: Keep[Any]) -> None:
    with Proxy(site.server.port) as proxy:
        leader = keep(site.beat(proxy=proxy))
        wait_until(lambda: leader.leads, message="it does not lead")
        proxy.freeze()
        leader.kill("SIGTERM")
        assert leader.wait() == 0, leader.logs()
        assert "was not released" in leader.logs()
    with Proxy(site.server.port) as proxy:
        proxy.cut()
        waiting = keep(site.beat(proxy=proxy))
        eventually(lambda: " waits: " in waiting.logs(), "it does not wait for its server")
        waiting.kill("SIGTERM")
        assert waiting.wait() == 0, waiting.logs()


def test_a_rolling_restart_under_load_loses_and_doubles_nothing(site: Site, target: Target, keep: Keep[Any]) -> None:
    """Two workers and two beats, each of which is replaced in turn, while jobs are submitted and planned."""
    # whatever had to be recovered would be late by their timeout
    workers = [site.worker("--concurrency", "3", "--pool", pool, *QUIET, heartbeat_timeout="60s") for pool in ("prefork", "threads")]
    beats = [site.beat(beat_interval="200ms", beat_lock_timeout="60s") for _ in range(2)]
    for node in (*workers, *beats):
        keep(node).ready()
    wait_until(lambda: any(beat.leads for beat in beats), message="nobody leads")
    submitting, planned = site.user(), [site.user() for _ in range(60)]
    for user in (submitting, *planned):
        target.answer(user, Answer(after_seconds=0.1))
    # of a definition whose windows no other test has opened
    for user in planned:
        site.platform.subscribe(user, "retried_call")
    ids: list[str] = []
    over = threading.Event()

    def load() -> None:
        for number in range(400):
            if number % 50 == 0 and number < 150:
                at, _ = site.platform.trigger("retried_call", window=timedelta(seconds=4))
                ids.extend(f"retried_call:{user}:t{round(at.timestamp() * 1000)}" for user in planned)
            ids.append(site.platform.enqueue("call", user=submitting).id)
            if over.wait(0.04):
                return

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        try:
            for node in (*workers, *beats):
                node.kill("SIGTERM")
                assert node.wait() == 0, node.logs()
                node.restart()
        finally:
            over.set()
        loading.result()
    eventually(lambda: len(site.platform.store.jobs_by_id(ids)) == len(ids), "not everybody has a job")
    jobs = site.wait_for_all(ids, seconds=60)
    assert len(jobs) > 100
    assert {job.state for job in jobs} == {JobState.COMPLETED}
    lags = []
    for job in jobs:
        (call,) = target.calls(job=job.id)
        assert call.answered.is_set()
        assert job.attempt == 1, site.story(job.id)
        lags.append(call.at_ms - job.execute_after_ms)
    assert sum(len(target.calls(user=user)) for user in (submitting, *planned)) == len(jobs), "a job that nobody asked for"
    lags.sort()
    handed = sum(any("stops: not started" in line.reason for line in site.platform.history(job.id)) for job in jobs)
    print(f"{len(jobs)} jobs, {handed} given back unstarted; lag median {lags[len(lags) // 2]} ms, max {lags[-1]} ms")
    assert lags[-1] < 60_000, "something had to be recovered"
    assert "recovered" not in "".join(worker.logs() for worker in workers)
    for user in planned:
        site.platform.unsubscribe(user, "retried_call")
