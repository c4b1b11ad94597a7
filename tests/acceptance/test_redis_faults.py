"""Redis restarts, refuses, slows down, vanishes and forgets, under two workers and a beat: they wait and say why; no job is lost.

None runs twice either, but where the server forgot that it had run.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import redis

from taskplatform.errors import Outage, StoreUnavailable, UnknownJob
from taskplatform.local import find_port
from taskplatform.model import JobState
from taskplatform.platform import JobRequest, SubscriptionRequest
from tests.acceptance.nodes import ROOT, BeatNode, CeleryNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import HEARTBEAT_TIMEOUT_SECONDS, Site, eventually
from tests.acceptance.target import Answer, Target
from tests.support import wait_until

#: Longer than a worker may be silent, so that one who forgot this would take jobs from those that live.
OUTAGE_SECONDS = HEARTBEAT_TIMEOUT_SECONDS + 2
#: Of the two workers together.
SLOTS = 4
#: A process that says the same again and again would need no minute for so many lines.
MOST_LINES = 40


@pytest.fixture
def site(own_site: Site) -> Site:
    """Its server suffers."""
    return own_site


@dataclass(frozen=True)
class Crew:
    """Who works on the site."""

    workers: list[WorkerNode]
    beat: BeatNode

    @property
    def nodes(self) -> list[CeleryNode]:
        return [*self.workers, self.beat]


@pytest.fixture(scope="module")
def crew(own_site: Site) -> Crew:
    """The same processes for all tests: they live through all of it."""
    made = Crew([own_site.worker("--concurrency", str(SLOTS // 2)) for _ in range(2)], own_site.beat(plan_batch="5"))
    for node in made.nodes:
        node.ready()
    eventually(lambda: made.beat.leads, "beat does not lead")
    eventually(lambda: len(own_site.platform.store.workers()) == 2, "no heartbeats")
    return made


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process ends, none shows a traceback, and none says much."""
    if "crew" not in request.fixturenames:
        yield
        return
    crew: Crew = request.getfixturevalue("crew")
    before = [len(node.logs()) for node in crew.nodes]
    yield
    for node, length in zip(crew.nodes, before, strict=True):
        said = node.logs()[length:]
        assert node.status == "running", f"{node.name} ended:\n{said[-3000:]}"
        assert "Traceback" not in said, said
        loud = [line for line in said.splitlines() if "WARNING/" in line or "ERROR/" in line or "CRITICAL/" in line]
        # each job may have a line of its own
        assert len([line for line in loud if "job " not in line]) <= MOST_LINES, said


def _submit(site: Site, user: str, count: int, *, definition: str = "call") -> list[str]:
    return [job.id for job in site.platform.enqueue_many(JobRequest(definition=definition, user=user) for _ in range(count))]


def _assert_each_ran_once(site: Site, target: Target, jobs: Sequence[str], *, seconds: float = 30) -> None:
    finished = site.wait_for_all(jobs, seconds=seconds)
    assert {job.state for job in finished} == {JobState.COMPLETED}
    calls = Counter(call.job for call in target.calls() if call.job in set(jobs))
    assert calls == dict.fromkeys(jobs, 1), "\n\n".join(site.story(job) for job in jobs if calls[job] != 1)


# --- it refuses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """How a server comes to refuse its service, and comes back."""

    outage: Outage
    begin: Callable[[redis.Redis], Any]
    end: Callable[[redis.Redis], Any]
    words: str
    """What a person is told."""


def _fill(server: redis.Redis) -> None:
    server.config_set("maxmemory-policy", "noeviction")
    for number in range(64):
        server.set(f"junk:{number}", b"x" * 65_536)
    server.config_set("maxmemory", int(server.info("memory")["used_memory"]) - 1_000_000)


def _free(server: redis.Redis) -> None:
    server.delete(*(f"junk:{number}" for number in range(64)))


def _close_doors(server: redis.Redis) -> None:
    server.config_set("maxclients", 1)
    # those that are connected could stay
    server.client_kill_filter(_type="normal", skipme=True)


REFUSALS = [
    Refusal(Outage.MEMORY, _fill, _free, "Redis has no memory left"),
    Refusal(
        Outage.READ_ONLY,
        lambda server: server.replicaof("127.0.0.1", find_port()),
        lambda server: server.replicaof("NO", "ONE"),
        "Redis takes no writes, it is a read-only replica",
    ),
    Refusal(Outage.CLIENTS, _close_doors, lambda server: server.config_set("maxclients", 10_000), "Redis takes no more connections"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.outage)
def test_a_server_refuses_for_a_time(refusal: Refusal, crew: Crew, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(after_seconds=0.4))
    before = [len(node.logs()) for node in crew.nodes]
    # the time limit of a run passes while there is no connection
    jobs = _submit(site, user, 24, definition="brief_call")
    wait_until(lambda: len(target.calls(user=user)) >= 4, message="four jobs must run")
    refusal.begin(site.redis)
    begun = len(target.calls(user=user))
    try:
        with pytest.raises(StoreUnavailable, match=refusal.words) as refused:
            site.platform.enqueue("call", user=user)
        assert refused.value.outage is refusal.outage
        if refusal.outage is Outage.MEMORY:
            told = _command(site, "jobs", "submit", "call", user)
            assert (told.returncode, told.stdout) == (3, "")
            assert refusal.words in told.stderr
            assert len(told.stderr.splitlines()) == 1
        # what must not happen meanwhile, and what of it may: what had started before calls, one for each slot
        time.sleep(OUTAGE_SECONDS)
        assert len(target.calls(user=user)) <= begun + SLOTS < len(jobs)
    finally:
        refusal.end(site.redis)
    _assert_each_ran_once(site, target, jobs)
    said = [node.logs()[length:] for node, length in zip(crew.nodes, before, strict=True)]
    assert all("waits: " in text for text in said)
    # who was just connecting when the server closed its door was told nothing
    assert any(refusal.words in text for text in said)
    assert not any("exited with" in text for text in said), said
    for node, length in zip(crew.nodes, before, strict=True):
        eventually(partial(_says_that_all_goes_on, node, length), f"{node.name} does not say that it goes on")
    _assert_plans(site, target)


def _says_that_all_goes_on(node: CeleryNode, since: int) -> bool:
    """Each loop that has said that it waits says so."""
    said = re.findall(r"WARNING/MainProcess\] (taking jobs|release|recovery|beat) (waits|goes on)\b", node.logs()[since:])
    return all(last == "goes on" for last in dict(said).values())


def _command(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    program = "import sys; from taskplatform.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, env=site.environment, capture_output=True, text=True, timeout=120, check=False
    )


def _assert_plans(site: Site, target: Target) -> None:
    users = [site.user() for _ in range(3)]
    site.platform.subscribe_many(SubscriptionRequest(user=user, definition="call") for user in users)
    site.platform.trigger("call", window=timedelta())
    for user in users:
        eventually(lambda user=user: len(target.calls(user=user)) == 1, f"nothing was planned for {user}")  # type: ignore[misc]
        site.platform.unsubscribe(user, "call")


def test_processes_that_start_while_it_refuses(crew: Crew, site: Site, target: Target, user: str) -> None:
    """They wait, and need nobody to start them again."""
    refusal = REFUSALS[1]
    refusal.begin(site.redis)
    try:
        nodes = [site.worker("--concurrency", "1"), site.beat()]
        for node in nodes:
            eventually(lambda node=node: refusal.words in node.logs(), f"{node.name} says nothing")  # type: ignore[misc]
        time.sleep(1)  # neither may end of it
    finally:
        refusal.end(site.redis)
    for node in nodes:
        node.ready()
        assert "Traceback" not in node.logs(), node.logs()
    eventually(lambda: len(site.platform.store.workers()) == 3, "no heartbeat of the new worker")
    _assert_each_ran_once(site, target, _submit(site, user, 6))
    site.remove(*nodes)


# --- it restarts -----------------------------------------------------------------------------------------------------


def test_it_restarts_while_jobs_are_planned_released_and_run(crew: Crew, site: Site, target: Target) -> None:
    users = [site.user() for _ in range(60)]
    by_hand = site.user()
    for user in [*users, by_hand]:
        target.answer(user, Answer(after_seconds=0.1))
    site.platform.subscribe_many(SubscriptionRequest(user=user, definition="call") for user in users)
    at, count = site.platform.trigger("call", window=timedelta(seconds=4))
    assert count == len(users)
    jobs = [f"call:{user}:t{round(at.timestamp() * 1000)}" for user in users]
    jobs += _submit(site, by_hand, 20)
    loading = threading.Event()
    for end in (site.server._server.stop, site.server._server.kill):
        wait_until(lambda: target.calls(user=by_hand), message="nothing runs")
        end()
        with site.server.append_only_file.open("ab") as file:
            # so much that it takes a second to read
            file.write(b"*3\r\n$3\r\nSET\r\n$4\r\njunk\r\n$1\r\nx\r\n" * 1_000_000)
        watch = threading.Thread(target=_watch_for_loading, args=(site.server.url, loading))
        watch.start()
        site.server._server.start()
        watch.join()
        site.redis.script_flush()
        time.sleep(0.5)  # they are at work again, as a rule
        site.redis.script_flush()
    # who looked at the right time was told so
    assert loading.is_set() or any("Redis reads its data from disk" in node.logs() for node in crew.nodes)
    _wait_until_planned(site, jobs)
    _assert_each_ran_once(site, target, jobs)
    assert {call.user for call in target.calls() if call.job in set(jobs)} == {*users, by_hand}
    for user in users:
        site.platform.unsubscribe(user, "call")


def _wait_until_planned(site: Site, jobs: Sequence[str]) -> None:
    eventually(lambda: all(_exists(site, job) for job in jobs), "not all are planned")


def _watch_for_loading(url: str, seen: threading.Event) -> None:
    """Until the server answers: whether it said that it loads."""
    with redis.Redis.from_url(url, retry=None) as client:
        while True:
            try:
                client.ping()
                return
            except redis.BusyLoadingError:
                seen.set()
            except redis.ConnectionError:
                pass
            time.sleep(0.01)


# --- it forgets ------------------------------------------------------------------------------------------------------

CALL_SECONDS = 0.2


def test_what_it_forgets_heals_by_itself(crew: Crew, site: Site, target: Target) -> None:
    """A power cut with `appendfsync everysec`: the last part of the file is missing. Twice, cut at any byte."""
    chance = random.Random(4)
    users = [site.user() for _ in range(25)]
    for user in users:
        target.answer(user, Answer(after_seconds=CALL_SECONDS))
    site.platform.subscribe_many(SubscriptionRequest(user=user, definition="call") for user in users)
    site.platform.set_limit("definition:call", concurrency=3)
    file = site.server.append_only_file
    for _ in range(2):
        at, _count = site.platform.trigger("call", window=timedelta(seconds=2))
        kept = _submit(site, users[0], 10)
        jobs = [f"call:{user}:t{round(at.timestamp() * 1000)}" for user in users] + kept
        wait_until(lambda jobs=jobs: sum(call.job in jobs for call in target.calls()) >= 4)  # type: ignore[misc]
        # the server may be late to write: what has ended by now must be in the file
        done = {job.id for job in site.platform.store.jobs_by_id(jobs) if job.state is JobState.COMPLETED}
        wait_until(lambda: site.redis.info("persistence")["aof_buffer_length"] == 0)
        on_disk = file.stat().st_size
        accepted = _submit(site, users[1], 5)
        time.sleep(0.8)  # so that jobs begin and end in what is forgotten
        wait_until(lambda before=on_disk: file.stat().st_size > before)  # type: ignore[misc]
        site.server.kill("SIGKILL")
        size = file.stat().st_size
        assert size > on_disk
        with file.open("r+b") as content:
            content.truncate(chance.randint(on_disk, size))
        site.server._server.start()
        _wait_until_planned(site, jobs)
        finished = site.wait_for_all(jobs)
        assert {job.state for job in finished} == {JobState.COMPLETED}
        # what it had just accepted it may know or not, but nothing in between
        known = [job for job in accepted if _exists(site, job)]
        site.wait_for_all(known)
        calls: dict[str, list[float]] = {}
        for call in target.calls():
            if call.job in {*jobs, *accepted}:
                assert call.key == call.job
                calls.setdefault(call.job, []).append(call.at_seconds)
        assert calls.keys() >= {*jobs, *known}
        for job, times in calls.items():
            assert len(times) <= 2, site.story(job)
            # only what had begun or ended in what was forgotten
            assert len(times) == 1 or job not in done, site.story(job)
    eventually(lambda: _in_flight(site) == 0, "the limit counts what does not run")
    site.platform.reset_limit("definition:call")
    for user in users:
        site.platform.unsubscribe(user, "call")


def _exists(site: Site, job_id: str) -> bool:
    try:
        site.platform.job(job_id)
    except UnknownJob:
        return False
    return True


def _in_flight(site: Site) -> int:
    return next(state.in_flight or 0 for state in site.platform.store.limit_states() if state.name == "definition:call")


# --- the network -----------------------------------------------------------------------------------------------------


def test_answers_that_come_late_and_connections_that_are_half_open(new_site: Callable[[], Site], target: Target) -> None:
    """With the default times: a worker is noticed to be lost after 15 s, a beat too."""
    site = new_site()
    user = site.user()
    times: dict[str, Any] = {"heartbeat_interval": "3s", "heartbeat_timeout": "15s", "beat_lock_timeout": "15s"}
    with Proxy(site.server.port) as network:
        worker = site.worker("--concurrency", "2", proxy=network, **times)
        beat = site.beat(proxy=network, **times)
        worker.ready()
        eventually(lambda: beat.leads and bool(site.platform.store.workers()), "they do not work")
        # both processes have their connections: a new one asks for ten answers, one after the other
        target.answer(user, Answer(after_seconds=0.3), Answer(after_seconds=0.3), Answer())
        _assert_each_ran_once(site, target, _submit(site, user, 2))
        network.slow(1.0)
        _assert_each_ran_once(site, target, _submit(site, user, 2))
        network.heal()
        time.sleep(1.0)  # so that what was held back has come through
        network.strand()
        # a BRPOP that waits at the server for a connection that is dead would take a message with it
        eventually(lambda: not any("b" in one["flags"] for one in site.redis.client_list()), "somebody still waits for a message")
        _assert_each_ran_once(site, target, _submit(site, user, 2))
        site.platform.subscribe(user, "call")
        known = len(target.calls(user=user))
        site.platform.trigger("call", window=timedelta())
        eventually(lambda: len(target.calls(user=user)) == known + 1, "beat does not plan")
        for node in (worker, beat):
            assert node.status == "running"
            assert "Traceback" not in node.logs(), node.logs()
    site.remove(worker, beat)
