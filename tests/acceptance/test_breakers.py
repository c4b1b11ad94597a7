"""Hosts that fail, or ask for a pause, as they see it: the targets' logs are the judges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from taskplatform.model import BREAKER_PROBES, JobState
from taskplatform.platform import JobRequest
from taskplatform.store import Breaker, BreakerState
from tests.acceptance.nodes import Guard
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Call, Target

LEAST_CALLS, SLOTS, JOBS = 5, 4, 40
PAUSE_SECONDS = 1.0
RETRIES = 3
DEFINITIONS = """
defaults: {{timeout: 20s, retries: {retries}, backoff: {{strategy: fixed, base: 200ms}}}}
tasks:
  - {{id: fragile, name: A call, cron: "0 0 29 2 *", config: {{endpoint: "{fragile}/"}}}}
  - {{id: stern, name: A call of a host that fails nothing, cron: "0 0 29 2 *", config: {{endpoint: "{stern}/"}}}}
  - {{id: other, name: A call of another host, cron: "0 0 29 2 *", config: {{endpoint: "{other}/"}}}}
"""


@pytest.fixture(scope="module")
def fragile() -> Iterator[Target]:
    """The host that fails."""
    with Target() as running:
        yield running


@pytest.fixture(scope="module")
def stern() -> Iterator[Target]:
    """One of which no call has failed, whatever test was the first: a breaker goes by shares."""
    with Target() as running:
        yield running


def _host(target: Target) -> str:
    return target.url.removeprefix("http://")


@pytest.fixture(scope="module")
def own_site(guard: Guard, target: Target, fragile: Target, stern: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An installation whose definitions name both hosts, so that they are known without a beat; with one worker."""
    tasks: Path = tmp_path_factory.mktemp("tasks")
    (tasks / "calls.yaml").write_text(DEFINITIONS.format(retries=RETRIES, fragile=fragile.url, stern=stern.url, other=target.url))
    settings = {"TASKS_DIR": str(tasks), "BREAKER_CALLS": str(LEAST_CALLS), "BREAKER_PAUSE": f"{PAUSE_SECONDS:g}s"}
    environment = base_environment(target.url, guard.environment) | {f"TASKPLATFORM_{name}": value for name, value in settings.items()}
    with running_site(tmp_path_factory.mktemp("site"), environment) as site:
        site.worker("--concurrency", str(SLOTS)).ready()
        yield site


@pytest.fixture
def site(own_site: Site) -> Site:
    return own_site


def _breaker(site: Site, host: str) -> Breaker:
    return next(one for one in site.platform.breakers() if one.host == host)


def _submit(site: Site, definition: str, user: str, count: int) -> list[str]:
    return [job.id for job in site.platform.enqueue_many(JobRequest(definition=definition, user=user) for _ in range(count))]


def _one_at_a_time(calls: Sequence[Call]) -> bool:
    """Whether each began after the one before had ended."""
    return all(one.ended_seconds is not None and one.ended_seconds <= later.at_seconds for one, later in pairwise(calls))


def _last_release(site: Site, job_id: str) -> int:
    return max(line.at_ms for line in site.changes(job_id) if line.to_state is JobState.QUEUED)


def test_a_host_that_fails_is_left_alone_and_nothing_is_lost(site: Site, fragile: Target, user: str) -> None:
    host = _host(fragile)
    fragile.answer(user, Answer(500))
    jobs = _submit(site, "fragile", user, JOBS)
    eventually(lambda: _breaker(site, host).openings == 1, "the breaker does not open")
    # what waits does not fail, and says why it waits
    waiting = site.platform.job(jobs[-1])
    assert (waiting.state, waiting.attempt) == (JobState.PENDING, 0)
    shown = site.platform.held_back(waiting)
    assert shown is not None
    assert shown.host == host
    assert [one.code for one in site.platform.health().problems if one.subject == host] == ["breaker_open"]

    eventually(lambda: _breaker(site, host).openings == 2, "no probe, or it does not open the breaker again")
    fragile.answer(user, Answer(200))
    done = site.wait_for_all(jobs)
    assert {job.state for job in done} == {JobState.COMPLETED}
    assert max(job.failures for job in done) <= RETRIES
    assert _breaker(site, host).state is BreakerState.CLOSED

    calls = fragile.calls(user=user)
    assert len(calls) == sum(job.attempt for job in done), "a call that no attempt was counted for, or the reverse"
    probed_ms = min(line.at_ms for job_id in jobs for line in site.changes(job_id) if line.reason.endswith("to probe its host"))
    first = sum(call.at_ms < probed_ms for call in calls)
    # those that opened it, and those that had begun by then
    assert LEAST_CALLS <= first <= LEAST_CALLS + SLOTS - 1
    # a probe that fails, twice the pause, and then probes that go well, one at a time
    counters = site.platform.store.counters()
    failed = counters["breaker_opened"] - 1
    assert failed >= 1
    for number in range(failed + 1):
        earlier, later = calls[first - 1 + number : first + 1 + number]
        # the last that began before may have done so a moment after it opened
        assert later.at_seconds - earlier.at_seconds > PAUSE_SECONDS * 2**number - 0.2
    assert _one_at_a_time(calls[first : first + failed + BREAKER_PROBES + 1])
    # in the order of submission, as they stood
    untried = [job.id for job in done if job.attempt == 1]
    assert len(untried) >= JOBS - first - failed
    released = [_last_release(site, job_id) for job_id in untried]
    assert released == sorted(released)
    assert counters["breaker_closed"] == 1
    assert f"host {host}: its breaker is open for 1 s" in site.logs()


def test_a_pause_that_a_host_asks_for_holds_back_all_of_its_jobs(site: Site, stern: Target, target: Target, user: str) -> None:
    host = _host(stern)
    stern.answer(user, Answer(429, headers={"Retry-After": "2"}), Answer(200))
    jobs = _submit(site, "stern", user, 1)
    eventually(lambda: _breaker(site, host).state is BreakerState.HELD, "the host is not held back")
    (limit,) = [one for one in site.platform.limits() if one.name == f"host:{host}"]
    assert limit.held_until_ms is not None
    jobs += _submit(site, "stern", user, 8)
    elsewhere = _submit(site, "other", user, 8)
    assert {job.state for job in site.wait_for_all([*elsewhere, *jobs])} == {JobState.COMPLETED}

    asked, probe, *rest = stern.calls(user=user)
    assert probe.at_seconds - asked.at_seconds >= 2
    # one first, to see whether it may
    assert len(rest) == 8
    assert _one_at_a_time([probe, rest[0]])
    # whose jobs were submitted last, and have gone on meanwhile
    assert all(call.at_seconds < probe.at_seconds for call in target.calls(user=user))
    # one that asks for a pause is no failing host
    assert _breaker(site, host).openings == 0


def test_answers_that_are_final_are_no_failures_of_the_host(site: Site, stern: Target, user: str) -> None:
    host = _host(stern)
    stern.answer(user, Answer(404))
    jobs = _submit(site, "stern", user, 2 * LEAST_CALLS)
    assert {job.state for job in site.wait_for_all(jobs)} == {JobState.FAILED}
    assert _breaker(site, host).state is BreakerState.CLOSED
    assert len(stern.calls(user=user)) == len(jobs)
