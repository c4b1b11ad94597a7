"""Leaders that die or freeze at any step of planning, one after the other: what the target is called for is just what the schedule asks.

Users of a definition with a window of a minute have their moments all over it, so that at any time somebody's comes.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import pytest

from taskplatform.model import moment, planned_job_id, slot
from tests.acceptance.faults import Fault
from tests.acceptance.nodes import BeatNode
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Target
from tests.support import wait_until

MINUTE_MS = 60_000
#: Longer than nobody leads: what is planned after its moment would be moved.
HORIZON = "8s"
#: Each time is the same in all of them, and each is a group of its own, which the next leader opens.
ZONES = ("Africa/Abidjan", "Africa/Lagos", "America/Lima", "Asia/Tokyo", "Asia/Dubai", "Asia/Manila", "Asia/Kolkata", "America/Bogota")
FAULTS = (
    ("before:plan", 2, signal.SIGKILL),
    ("after:open", 1, signal.SIGSTOP),
    ("after:plan", 1, signal.SIGSTOP),
    ("before:open", 1, signal.SIGKILL),
    ("after:publish", 5, signal.SIGKILL),
    ("after:open", 1, signal.SIGKILL),
    ("before:plan", 1, signal.SIGSTOP),
    ("before:publish", 3, signal.SIGSTOP),
)


@pytest.fixture
def site(calm_site: Site) -> Site:
    """Its beats are this module's alone. Its worker is not to be lost."""
    return calm_site


@dataclass
class Load:
    """Users whose calls come all the time, and what the schedule asks for."""

    site: Site
    target: Target
    users: list[str] = field(default_factory=list)
    beats: list[BeatNode] = field(default_factory=list)

    def beat(self, *, fault: Fault | None = None) -> BeatNode:
        """Start one. As a standby it leads soon, and before the moments come that the last leader has not planned."""
        self.beats.append(self.site.beat(fault=fault, beat_lock_timeout="1s", plan_horizon=HORIZON))
        return self.beats[-1]

    def subscribe(self, count: int, zone: str | None = None) -> None:
        schedule = {"interval": {"type": "minutely", "timezone": zone}} if zone else None
        for _ in range(count):
            self.users.append(self.site.user())
            self.site.platform.subscribe(self.users[-1], "steady", schedule=schedule)

    def expected(self, until_ms: int) -> dict[str, int]:
        """By job, its moment: of each user, those from the subscription until then."""
        found = {}
        for user in self.users:
            since_ms = self.site.platform.subscription(user, "steady").since_ms
            for at_ms in range(since_ms // MINUTE_MS * MINUTE_MS - MINUTE_MS, until_ms, MINUTE_MS):
                moment_ms = moment(at_ms, slot(user, "steady"), MINUTE_MS)
                if since_ms < moment_ms <= until_ms:
                    found[planned_job_id("steady", user, at_ms)] = moment_ms
        return found

    def calls(self) -> Counter[str]:
        return Counter(call.job for user in self.users for call in self.target.calls(user=user))

    def check(self) -> None:
        """All moments up to now had their calls, one each, and nothing else was called."""
        store = self.site.platform.store
        wait_until(lambda: len(self.expected(store.now_ms())) >= 15, message="no moments came")
        expected = self.expected(store.now_ms())
        with suppress(AssertionError):
            wait_until(lambda: expected.keys() <= self.calls().keys())
        calls = self.calls()
        assert not expected.keys() - calls.keys(), "some users had no call"
        assert set(calls.values()) == {1}, f"doubled: {[job for job, count in calls.items() if count > 1]}"
        all_moments = self.expected(store.now_ms())
        assert not calls.keys() - all_moments.keys(), "calls that no schedule asks for"
        for call in (call for user in self.users for call in self.target.calls(user=user) if call.job in calls):
            assert call.at_ms >= all_moments[call.job], f"{call.job} came early"
        jobs = store.jobs_by_id(list(expected))
        assert {job.id: job.execute_after_ms for job in jobs} == expected, "moments were moved"


@pytest.fixture
def load(site: Site, target: Target) -> Iterator[Load]:
    worker = site.worker("--concurrency", "4")
    worker.ready()
    made = Load(site, target)
    yield made
    for user in made.users:
        site.platform.delete_user(user)
    site.remove(worker, *made.beats)


def _leader(site: Site, beats: list[BeatNode]) -> BeatNode | None:
    name = site.platform.store.planner().get("leader", "")
    return next((beat for beat in beats if name.endswith(f"#{beat.pid}")), None)


def _happened(faults: Sequence[Fault]) -> int:
    return sum(fault.happened for fault in faults)


def _more_happened(faults: Sequence[Fault], before: int) -> bool:
    return _happened(faults) > before


def _stepped_down(beat: BeatNode) -> bool:
    return "stepping down" in beat.logs()


def test_leaders_die_and_freeze_in_the_midst_of_planning(site: Site, load: Load) -> None:
    faults = [site.fault(point, nth, signal=number) for point, nth, number in FAULTS]
    beats = [load.beat(fault=fault) for fault in faults]
    wait_until(lambda: all("beat: Starting" in beat.logs() for beat in beats), message="not all have started")
    load.subscribe(200)
    for zone in ZONES:
        happened = _happened(faults)
        if happened < len(faults):
            load.subscribe(3, zone)
            wait_until(partial(_more_happened, faults, happened), message="nobody came to a fault")
    assert _happened(faults) == len(faults)
    # none of those that have a fault to make is left
    last = load.beat()
    wait_until(lambda: last.leads, message="nobody leads after all that")
    load.subscribe(3, "Asia/Seoul")
    frozen = [beat for beat, fault in zip(beats, faults, strict=False) if fault.signal == signal.SIGSTOP]
    for beat in frozen:
        beat.resume()
    for beat in frozen:
        eventually(partial(_stepped_down, beat), "a leader that froze goes on as one")
    assert _leader(site, load.beats) is last
    load.check()
    assert [beat.status for beat in (*frozen, last)] == ["running"] * (len(frozen) + 1)
    assert not [beat.name for beat in load.beats if "Traceback" in beat.logs()]


def test_the_lock_is_lost_again_and_again(site: Site, load: Load) -> None:
    """As with a server that lost its last second, or was emptied of it: then two lead for a moment."""
    beats = [load.beat() for _ in range(3)]
    for beat in beats:
        beat.ready()
    wait_until(lambda: any(beat.leads for beat in beats), message="nobody leads")
    load.subscribe(300)
    terms = int(site.platform.store.planner()["term"])
    deadline = time.monotonic() + 90

    def led() -> int:
        return int(site.platform.store.planner()["term"]) - terms

    while len(load.expected(site.platform.store.now_ms())) < 15 or led() <= 3:
        assert time.monotonic() < deadline, f"the lead has changed {led()} times"
        for _ in range(20):
            site.redis.delete("tp:redbeat::lock")
            time.sleep(0.03)  # apart from each other, so that somebody leads in between
    wait_until(lambda: [beat.leads for beat in beats].count(True) == 1, message="not one leads")
    assert any("stepping down" in beat.logs() for beat in beats)
    load.check()
    assert not [beat.name for beat in load.beats if "Traceback" in beat.logs()]
