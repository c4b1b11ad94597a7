"""Real beats: one plans for all, each user's moment comes once, and the death of the leader changes nothing about that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

from taskplatform.model import JobState, moment, planned_job_id, slot
from tests.acceptance.nodes import ROOT, BeatNode
from tests.acceptance.site import BEAT_LOCK_SECONDS, Site, eventually
from tests.acceptance.target import Target
from tests.support import wait_until

WINDOW = timedelta(seconds=5)
#: From the death of a leader to the first tick of the next: the lock's timeout, the standby's poll, and what a busy machine takes.
TAKE_OVER_SECONDS = BEAT_LOCK_SECONDS + 30


@pytest.fixture
def site(calm_site: Site) -> Site:
    """Its beats are this module's alone."""
    return calm_site


@pytest.fixture(scope="module")
def survivors() -> list[BeatNode]:
    """Of the tests so far."""
    return []


@pytest.fixture
def beats(site: Site, survivors: list[BeatNode]) -> list[BeatNode]:
    """Two of them, one of which leads."""
    survivors[:] = [beat for beat in survivors if beat.status == "running"]
    while len(survivors) < 2:
        survivors.append(site.beat())
    for beat in survivors:
        beat.ready()
    wait_until(lambda: any(beat.leads for beat in survivors), message="nobody leads")
    return list(survivors)


@pytest.fixture
def worker(celery_setup: CeleryTestSetup) -> None:
    """A worker runs what is planned."""


def _leader(site: Site, beats: list[BeatNode]) -> BeatNode | None:
    name = site.platform.store.planner().get("leader", "")
    return next((beat for beat in beats if name.endswith(f"#{beat.pid}")), None)


def _standby(site: Site, beats: list[BeatNode]) -> tuple[BeatNode, BeatNode]:
    """The leader and the other."""
    leader = wait_until(lambda: _leader(site, beats), message="the leader has not said that it plans")
    assert leader is not None
    (other,) = (beat for beat in beats if beat is not leader)
    assert not other.leads
    return leader, other


def _subscribers(site: Site, definition: str, count: int) -> list[str]:
    users = [site.user() for _ in range(count)]
    for user in users:
        site.platform.subscribe(user, definition)
    return users


def _assert_each_ran_once(site: Site, target: Target, users: list[str], definition: str, job_ids: list[str]) -> None:
    jobs = site.wait_for_all(job_ids)
    assert {job.state for job in jobs} == {JobState.COMPLETED}
    for user, job_id in zip(users, job_ids, strict=True):
        assert [job.id for job in site.platform.jobs(user=user, definition=definition).items] == [job_id]
        assert [call.job for call in target.calls(user=user)] == [job_id]


@pytest.mark.timeout(300)
def test_every_user_has_one_job_at_exactly_the_moment_of_their_slot(
    worker: None, beats: list[BeatNode], site: Site, target: Target
) -> None:
    """A real minute, with a standby beside the leader."""
    # so that the minute which is running has nothing for them
    wait_until(lambda: 6_000 < site.platform.store.now_ms() % 60_000 < 54_000)
    users = _subscribers(site, "minutely", 60)
    since = max(site.platform.subscription(user, "minutely").since_ms for user in users)
    at_ms = (since // 60_000 + 1) * 60_000
    ids = [planned_job_id("minutely", user, at_ms) for user in users]
    wait_until(lambda: site.platform.store.now_ms() > at_ms, seconds=90)
    wait_until(lambda: len(site.platform.store.jobs_by_id(ids)) == len(ids), message="not every user has a job")
    jobs = site.wait_for_all(ids)
    # before the next minute comes
    for user in users:
        site.platform.unsubscribe(user, "minutely")

    window_ms = int(WINDOW / timedelta(milliseconds=1))
    for user, job in zip(users, jobs, strict=True):
        assert job.execute_after_ms == moment(at_ms, slot(user, "minutely"), window_ms)
        assert job.occurrence_ms == at_ms
        assert job.source == "schedule"
        (call,) = target.calls(user=user)
        assert call.at_ms >= job.execute_after_ms
    _assert_each_ran_once(site, target, users, "minutely", ids)
    assert len({(job.execute_after_ms - at_ms) * 4 // window_ms for job in jobs}) == 4, "the window is not used as a whole"
    assert sum(beat.leads for beat in beats) == 1


def _trigger(site: Site, count: int) -> tuple[list[str], list[str], int]:
    """Users, the jobs that they are to have, and when the window began."""
    users = _subscribers(site, "call", count)
    at, subscribers = site.platform.trigger("call", window=WINDOW)
    assert subscribers == count
    at_ms = round(at.timestamp() * 1000)
    return users, [f"call:{user}:t{at_ms}" for user in users], at_ms


def _end(site: Site, users: list[str]) -> None:
    for user in users:
        site.platform.unsubscribe(user, "call")


def test_a_standby_takes_over_in_the_midst_of_a_window(worker: None, beats: list[BeatNode], site: Site, target: Target) -> None:
    leader, standby = _standby(site, beats)
    users, ids, _ = _trigger(site, 60)
    wait_until(lambda: len(site.platform.store.jobs_by_id(ids)) > 10, message="nothing is planned")
    leader.kill("SIGKILL")
    planned = len(site.platform.store.jobs_by_id(ids))
    assert planned < len(ids), "the window was planned as a whole already"
    wait_until(lambda: standby.leads, seconds=TAKE_OVER_SECONDS, message="the standby does not lead")
    assert _leader(site, beats) is standby
    wait_until(lambda: len(site.platform.store.jobs_by_id(ids)) == len(ids), message="some users have no job")
    _assert_each_ran_once(site, target, users, "call", ids)
    _end(site, users)


def test_a_frozen_leader_does_no_harm_when_it_wakes(worker: None, beats: list[BeatNode], site: Site, target: Target) -> None:
    leader, standby = _standby(site, beats)
    users, ids, _ = _trigger(site, 60)
    wait_until(lambda: len(site.platform.store.jobs_by_id(ids)) > 10, message="nothing is planned")
    leader.pause()
    wait_until(lambda: standby.leads, seconds=TAKE_OVER_SECONDS, message="the standby does not lead")
    leader.resume()
    eventually(lambda: "stepping down" in leader.logs(), "the old leader goes on")
    assert f"#{standby.pid}, leads since" in leader.logs()
    wait_until(lambda: len(site.platform.store.jobs_by_id(ids)) == len(ids), message="some users have no job")
    _assert_each_ran_once(site, target, users, "call", ids)
    assert _leader(site, beats) is standby
    assert (leader.status, standby.status) == ("running", "running")
    assert not leader.leads
    assert "Traceback" not in leader.logs()
    _end(site, users)


def _command(site: Site, *words: str) -> Any:
    """What a command says, as JSON."""
    argv = [sys.executable, "-c", "from taskplatform.cli import main; raise SystemExit(main())", *words, "--json"]
    ran = subprocess.run(argv, cwd=ROOT, env=site.environment, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_backfill_goes_on_when_its_leader_is_killed(worker: None, beats: list[BeatNode], site: Site, target: Target) -> None:
    leader, standby = _standby(site, beats)
    users, platform = _subscribers(site, "minutely", 2), site.platform
    until_ms = platform.store.now_ms() // 60_000 * 60_000 - 120_000
    span = [datetime.fromtimestamp(at_ms / 1000, UTC).isoformat() for at_ms in (until_ms - 360_000, until_ms)]
    asked = ("backfill", "minutely", "--from", span[0], "--to", span[1], "--users", ",".join(users), "--rate", "3/s")
    assert _command(site, *asked, "--dry-run")["made"] == 12
    begun = _command(site, *asked)
    wait_until(lambda: platform.backfill_status(begun["id"]).made > 2, message="nothing is made")
    leader.kill("SIGKILL")
    assert platform.backfill_status(begun["id"]).made < 12, "all was made already"
    wait_until(lambda: standby.leads, seconds=TAKE_OVER_SECONDS, message="the standby does not lead")
    wait_until(lambda: platform.backfill_status(begun["id"]).completed == 12, message="not all of them completed")
    found = _command(site, "backfills", "show", begun["id"])
    assert (found["state"], found["made"], found["existing"], found["unfinished"]) == ("done", 12, 0, 0)
    ids = {planned_job_id("minutely", user, until_ms - minute * 60_000) for user in users for minute in range(1, 7)}
    jobs = platform.store.jobs_by_id(sorted(ids))
    assert {(job.source, job.state, job.priority.value) for job in jobs} == {("backfill", JobState.COMPLETED, "low")}
    calls = [call for user in users for call in target.calls(user=user) if call.job in ids]
    assert sorted(call.job for call in calls) == sorted(ids), "each was called once"
    for call in calls:
        assert call.at_ms >= platform.job(call.job).execute_after_ms
    for user in users:
        platform.unsubscribe(user, "minutely")


def test_a_leader_that_is_asked_to_stop_hands_over_at_once(beats: list[BeatNode], site: Site) -> None:
    leader, standby = _standby(site, beats)
    leader.kill(signal.SIGTERM)
    assert leader.wait() == 0, leader.logs()
    # that it need not wait for the lock to run out: test_stop, where that takes minutes
    wait_until(lambda: standby.leads, message="the standby does not lead")
    eventually(lambda: _leader(site, beats) is standby, "the standby does not plan")
