"""Three Sentinels, a primary and two replicas: the primary dies under load, or is told to step down, and everything goes on by itself.

What had reached the replica is not lost. What runs twice began or ended in what the replica did not get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import requests
from kombu import Connection
from kombu.exceptions import OperationalError
from redbeat.schedulers import get_redis

from taskplatform.errors import Outage, StoreUnavailable, UnknownJob
from taskplatform.model import JobState
from taskplatform.platform import JobRequest, SubscriptionRequest
from taskplatform.store import Store
from tests.acceptance.nodes import BeatNode, FlowerNode, Guard, ServerNode, WorkerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Target
from tests.sentinels import MASTER, PASSWORD, SENTINEL_PASSWORD, USER, Cluster, Program, cluster
from tests.support import wait_until

CALL_SECONDS = 0.15
#: For what takes some seconds where nothing else runs.
SECONDS = 120.0


class SentinelNode(ServerNode):
    """A cluster, that somebody else starts and ends, as the server of a site."""

    def __init__(self, servers: Cluster) -> None:
        self._name = "servers"
        self._cluster = servers

    @property
    def settings(self) -> dict[str, str]:
        return dict(self._cluster.settings)

    def client(self) -> redis.Redis:
        return self._cluster.admin(self._cluster.primary)

    def remove(self, **_: object) -> None:
        """Nothing: who started it ends it."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("servers") / "plain") as running:
        yield running


@pytest.fixture(scope="module")
def site(servers: Cluster, guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    environment = base_environment(target.url, guard.environment)
    with running_site(tmp_path_factory.mktemp("site"), environment, server=SentinelNode(servers)) as running:
        yield running


@dataclass(frozen=True)
class Crew:
    """Who works on the site, from the first test to the last."""

    workers: list[WorkerNode]
    beats: list[BeatNode]
    flower: FlowerNode


@pytest.fixture(scope="module")
def crew(site: Site) -> Crew:
    made = Crew([site.worker("--concurrency", "2") for _ in range(2)], [site.beat() for _ in range(2)], site.flower())
    for node in (*made.workers, *made.beats, made.flower):
        node.ready()
    eventually(lambda: any(beat.leads for beat in made.beats), "no beat leads", seconds=SECONDS)
    return made


def test_the_primary_dies_and_comes_back_as_a_replica(crew: Crew, servers: Cluster, site: Site, target: Target) -> None:
    old = _fail_over_under_load(servers.kill_primary, crew, servers, site, target)
    old.start()
    eventually(lambda: servers.follows(old), "the old primary does not follow the new one", seconds=SECONDS)
    # who writes to it past the Sentinels is told why it cannot
    store = Store.connect(f"redis://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{old.port}/0")
    with pytest.raises(StoreUnavailable, match="read-only replica") as refused:
        store.count("deaf")
    assert refused.value.outage is Outage.READ_ONLY
    store.close()


def test_the_primary_is_told_to_step_down(crew: Crew, servers: Cluster, site: Site, target: Target) -> None:
    """It lives on, and would take writes until it has heard of its successor: for lack of replicas it refuses them."""
    old = _fail_over_under_load(servers.fail_over, crew, servers, site, target)
    eventually(lambda: servers.follows(old), "the old primary does not follow the new one", seconds=SECONDS)


def test_no_answer_to_remote_control_has_a_login(crew: Crew, site: Site) -> None:
    worker = crew.workers[0]
    for order in ("stats", "conf"):
        answers = site.app.control.broadcast(order, destination=[worker.node], reply=True, timeout=SECONDS, limit=1)
        assert [list(answer) for answer in answers] == [[worker.node]]
        for secret in (PASSWORD, SENTINEL_PASSWORD, quote(PASSWORD, safe=""), quote(SENTINEL_PASSWORD, safe="")):
            assert secret not in str(answers), order
    assert "Traceback" not in worker.logs(), worker.logs()


def _fail_over_under_load(fail_over: Callable[[], Program], crew: Crew, servers: Cluster, site: Site, target: Target) -> Program:
    """Returns the old primary, when all that was replicated is done."""
    platform, users, by_hand = site.platform, [site.user() for _ in range(20)], site.user()
    for user in (*users, by_hand):
        target.answer(user, Answer(after_seconds=CALL_SECONDS))
    lost_before = site.platform.store.counters().get("workers_lost", 0)
    platform.subscribe_many(SubscriptionRequest(user=user, definition="call") for user in users)
    at, _count = platform.trigger("call", window=timedelta(seconds=6))
    kept = [f"call:{user}:t{round(at.timestamp() * 1000)}" for user in users]
    kept += [job.id for job in platform.enqueue_many(JobRequest(definition="call", user=by_hand) for _ in range(30))]
    assert servers.replicated() == 2
    after: list[str] = []
    unsure: list[str] = []
    chosen, over = threading.Event(), threading.Event()

    def load() -> None:
        while not over.wait(0.04):
            known_before = chosen.is_set()
            with suppress(StoreUnavailable):
                (after if known_before else unsure).append(platform.enqueue("call", user=by_hand).id)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        try:
            eventually(lambda: len(target.calls(user=by_hand)) >= 4, "nothing runs", seconds=SECONDS)
            ended_at = time.monotonic()
            old = fail_over()
            chosen.set()
            eventually(lambda: len(after) >= 3, "nothing is accepted", seconds=SECONDS)
            moved_at = time.monotonic()
        finally:
            over.set()
        loading.result()

    known = [job for job in unsure if _exists(site, job)]
    try:
        wait_until(lambda: all(_exists(site, job) for job in (*kept, *after)), seconds=SECONDS)
    except AssertionError:
        lost = {what: [job for job in jobs if not _exists(site, job)] for what, jobs in (("before", kept), ("after", after))}
        raise AssertionError(f"accepted before and after the change, and not there: {lost}") from None
    finished = site.wait_for_all([*kept, *after, *known], seconds=SECONDS)
    assert {job.state for job in finished} == {JobState.COMPLETED}
    doubled = 0
    for job in finished:
        times = sorted(call.at_seconds for call in target.calls(job=job.id))
        assert {call.key for call in target.calls(job=job.id)} == {job.id}
        doubled += len(times) > 1
        # only what began or ended on the old primary, and had not reached the new one
        assert len(times) == 1 or (len(times) == 2 and ended_at - CALL_SECONDS - 1 < times[0] < moved_at), site.story(job.id)
    # Redis was away, and nobody is lost for that
    assert platform.store.counters().get("workers_lost", 0) == lost_before
    print(f"{moved_at - ended_at:.1f} s; {len(unsure) - len(known)} of {len(unsure)} that nobody waited for are gone; {doubled} ran twice")

    for node in (*crew.workers, *crew.beats):
        assert node.status == "running", node.logs()
        assert "Traceback" not in node.logs(), node.logs()
    eventually(lambda: any(beat.leads for beat in crew.beats), "no beat leads", seconds=SECONDS)
    eventually(lambda: _shows_queues(crew), "Flower does not show the queues", seconds=SECONDS)
    for user in users:
        platform.unsubscribe(user, "call")
    return old


def _exists(site: Site, job_id: str) -> bool:
    try:
        site.platform.job(job_id)
    except UnknownJob:
        return False
    return True


def _shows_queues(crew: Crew) -> bool:
    page = requests.get(f"{crew.flower.url}/broker", timeout=SECONDS)
    return page.status_code == 200 and all(f"<td>{name}</td>" in page.text for name in ("high", "medium", "low"))


def test_with_tls_every_client_verifies_sentinels_and_servers(tmp_path: Path, guard: Guard, target: Target) -> None:
    environment = base_environment(target.url, guard.environment)
    with (
        cluster(tmp_path / "tls", tls=True, servers=1, sentinels=1) as servers,
        running_site(tmp_path, environment, server=SentinelNode(servers)) as site,
    ):
        user = site.user()
        assert user in site.platform.user(user).id
        with site.app.connection() as connection:
            connection.ensure_connection(max_retries=1)
            assert connection.default_channel.client.ping()
            assert PASSWORD not in connection.as_uri()
        beat_client = get_redis(site.app)
        assert beat_client.ping()
        beat_client.connection_pool.sentinel_manager.close()
        beat_client.close()
        # each with the CAs of the system alone
        bare = Store.connect(servers.url())
        with pytest.raises(StoreUnavailable) as untrusted:
            bare.ping()
        assert untrusted.value.outage is Outage.UNTRUSTED, str(untrusted.value)
        assert SENTINEL_PASSWORD not in str(untrusted.value)
        bare.close()
        options = {"master_name": MASTER, "sentinel_kwargs": {"password": SENTINEL_PASSWORD, "socket_timeout": 2}}
        with Connection(site.app.conf.broker_url, transport_options=options) as plain, pytest.raises(OperationalError):
            plain.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
