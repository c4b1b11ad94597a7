"""Clocks are set by an hour, forward and back, of each machine in turn, while jobs are planned and run.

Everything goes by the server's clock, and how long somebody is silent by a clock that nobody sets. So nothing is early by the server's
clock, nothing runs twice, nothing is lost, nobody who lives is taken for dead, and once the clock is right again nothing is an hour late.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from taskplatform.model import JobState
from taskplatform.platform import JobRequest
from tests.acceptance.clocks import SteppedClock
from tests.acceptance.nodes import BeatNode, Guard, WorkerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

HOUR = 3600
RUN = ["pending", "queued", "assigned", "running", "completed"]
USERS = 25
#: Nobody may be taken for lost here, on a busy machine either.
PATIENCE_SECONDS = 8


class ServerClock(SteppedClock):
    """The server's, with what it shows beside a right one."""

    offset = 0

    def set(self, seconds: int) -> None:
        self.offset = seconds
        super().set(seconds)

    def step(self, seconds: int) -> None:
        self.set(self.offset + seconds)


@pytest.fixture
def server_clock(tmp_path_factory: pytest.TempPathFactory) -> ServerClock:
    return ServerClock(tmp_path_factory.mktemp("clock") / "server")


@pytest.fixture
def own_site(guard: Guard, target: Target, server_clock: ServerClock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), base_environment(target.url, guard.environment), server_clock=server_clock) as site:
        yield site


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its clock is the test's. Each has its own: after an hour that was too early, what is planned reaches an hour ahead."""
    return own_site


@pytest.fixture
def node_clock(own_site: Site) -> SteppedClock:
    """Of the machine on which one worker and beat run."""
    return own_site.clock()


@pytest.fixture
def workers(own_site: Site, node_clock: SteppedClock) -> list[WorkerNode]:
    """Two of two slots; the first lives by `node_clock`."""
    nodes = [
        own_site.worker("--concurrency", "2", machine="a", clock=node_clock, heartbeat_timeout=f"{PATIENCE_SECONDS}s"),
        own_site.worker("--concurrency", "2", machine="b", heartbeat_timeout=f"{PATIENCE_SECONDS}s"),
    ]
    for node in nodes:
        node.ready()
    return nodes


@pytest.fixture
def beat(own_site: Site, node_clock: SteppedClock) -> BeatNode:
    """Its lock expires by the server's clock: it loses the lead where that is set forward, and takes it again."""
    node = own_site.beat(clock=node_clock)
    node.ready()
    return node


@pytest.fixture(autouse=True)
def _all_run(site: Site, workers: list[WorkerNode], beat: BeatNode, node_clock: SteppedClock) -> None:
    """Each test begins with the right time, and with all of them at work."""
    node_clock.set(0)
    eventually(lambda: beat.status == "running" and beat.leads, "beat does not lead")


def _subscribers(site: Site, server_clock: ServerClock) -> tuple[list[str], int]:
    """Users whose jobs come in the next minute of the server's clock, which begins in some seconds: that is set. And its time."""
    store = site.platform.store

    def left() -> int:
        return 60 - store.now_ms() // 1000 % 60

    if left() < 20:
        server_clock.step(25)  # before anybody can have a job in the minute that is about to begin
    users = [site.user() for _ in range(USERS)]
    for user in users:
        site.platform.subscribe(user, "minutely")
    server_clock.step(left() - 8)
    minute_ms = store.now_ms() // 60_000 * 60_000 + 60_000
    return users, minute_ms


def _check(site: Site, target: Target, ids: list[str]) -> None:
    """That each of these jobs ran once, not before its time by the server's clock, and without anybody having been taken for lost."""
    for job_id in ids:
        # what was released and has not started when the clock is set back is given back first
        entered = site.states(job_id)
        assert (entered[0], entered[-4:]) == (RUN[0], RUN[1:]), site.story(job_id)
        assert set(entered[1:-4]) <= {"queued", "pending", "retrying"}, site.story(job_id)
        assert len(target.calls(job=job_id)) == 1, site.story(job_id)
        job = site.platform.job(job_id)
        assert job.started_ms is not None
        assert job.started_ms >= job.execute_after_ms, f"it was early:\n{site.story(job_id)}"
    assert site.platform.store.counters().get("workers_lost", 0) == 0


def _planned(site: Site, users: list[str]) -> dict[str, list[int]]:
    """By user, the occurrences for which there is a job, in order."""
    return {user: sorted(job.occurrence_ms or 0 for job in site.platform.jobs(user=user, limit=1000).items) for user in users}


def test_the_clocks_of_a_worker_and_of_beat_are_set(
    site: Site, target: Target, node_clock: SteppedClock, server_clock: ServerClock
) -> None:
    users, minute_ms = _subscribers(site, server_clock)
    by_hand = site.user()
    delayed = [JobRequest(definition="call", user=by_hand, countdown=number / 8) for number in range(64)]
    ids = [job.id for job in site.platform.enqueue_many(delayed)]
    wait_until(lambda: any(target.calls(user=user) for user in users), message="the window has not begun")
    for offset in (HOUR, -HOUR, 0):
        node_clock.set(offset)
        time.sleep(1.2)  # each for a part of the window; nothing is asked of what happens in it
    planned = [f"minutely:{user}:{minute_ms}" for user in users]
    eventually(lambda: len(site.platform.store.jobs_by_id(planned)) == USERS, "a user has no job")
    ids += planned
    site.wait_for_all(ids)
    _check(site, target, ids)
    assert all(minute_ms in found for found in _planned(site, users).values())


def test_the_servers_clock_is_set(site: Site, workers: list[WorkerNode], target: Target, server_clock: ServerClock) -> None:
    store = site.platform.store
    users, minute_ms = _subscribers(site, server_clock)
    runs = site.platform.enqueue("sleeping", user=site.user(), params={"seconds": 20}, priority="high")
    wait_until(lambda: target.calls(job=runs.id), message="the long job does not run")
    wait_until(lambda: len([call for user in users for call in target.calls(user=user)]) >= 3, message="the window has not begun")

    server_clock.step(HOUR)
    in_between = site.user()
    target.answer(in_between, Answer(503), Answer(200))
    fast = [site.platform.enqueue("call", user=in_between, countdown=delay) for delay in (PATIENCE_SECONDS + 3, PATIENCE_SECONDS + 4)]
    again = site.platform.enqueue("retried_call", user=in_between)
    wait_until(lambda: target.calls(job=again.id), message="nothing runs after the step")
    time.sleep(PATIENCE_SECONDS + 1)  # longer than it would take to be taken for silent

    server_clock.step(-HOUR)
    hourly_late = site.wait_for_all([job.id for job in fast])
    assert {job.state for job in hourly_late} == {JobState.COMPLETED}
    assert site.wait_for(again.id).state is JobState.COMPLETED
    assert site.wait_for(runs.id).state is JobState.COMPLETED
    eventually(lambda: all(minute_ms in found for found in _planned(site, users).values()), "a user has no job")
    # what was planned for the next moment of the hour that was too early waits for it
    made = [job.id for user in users for job in site.platform.jobs(user=user, limit=1000).items if job.execute_after_ms <= store.now_ms()]
    site.wait_for_all(made)
    _check(site, target, [*made, *(job.id for job in fast)])
    assert [call.path for call in target.calls(job=runs.id)] == ["/began", "/ended"]
    # what of the hour was passed over is the policy's, and recorded; nobody has a job twice
    assert max(Counter(job_id.rpartition(":")[0] + job_id.rpartition(":")[2] for job_id in made).values()) == 1
    # whoever is dead is found all the same
    victim = site.worker("--concurrency", "1", "-Q", "high", machine="c")
    victim.ready()
    eventually(lambda: any(worker.id.startswith(f"{victim.node}#") for worker in store.workers()), "it has no heartbeat")
    before = {worker.id for worker in store.workers()}
    server_clock.step(-HOUR)
    victim.kill("SIGKILL")
    # whose question the server would answer in an hour, as its clock goes, gets a message: deaf for the second time, it would end
    site.wait_for_all([site.platform.enqueue("call", user=in_between).id for _ in range(4)])
    eventually(lambda: "workers_lost" in store.counters(), "nobody finds it")
    lost = before - {worker.id for worker in store.workers()}
    assert [worker.partition("#")[0] for worker in lost] == [victim.node], "\n".join(worker.logs() for worker in workers)
    assert store.counters()["workers_lost"] == 1
