"""`next` against the planner: what is foretold is what the real planner then makes, to the millisecond, with a clock that is stepped.

Schedules, zones, clock changes and changes of subscriptions are chosen at random, from a seed that a failure shows.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis

from taskplatform.answers import Coming, Moment, coming
from taskplatform.model import Definition, Limit, Schedule, slot
from taskplatform.planner import Planner
from taskplatform.store import Store
from tests.conftest import Clock
from tests.integration.harness import HORIZON, define, subscribe

MINUTE = 60_000
DAY = 86_400_000
#: Before clock changes: in March and October 2027 in Europe and America, in April in Australia by half an hour.
STARTS = [datetime(2027, 3, 13, 20, tzinfo=UTC), datetime(2027, 3, 27, 20, tzinfo=UTC), datetime(2027, 4, 3, 10, tzinfo=UTC)]
STARTS += [datetime(2027, 10, 30, 20, tzinfo=UTC), datetime(2027, 11, 6, 20, tzinfo=UTC), datetime(2027, 6, 1, tzinfo=UTC)]
ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"]


def ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def schedule(dice: random.Random) -> dict[str, Any]:
    """Some schedule that comes within a day or two."""
    zone, at = dice.choice(ZONES), {"hour": dice.choice([0, 1, 2, 3, 9, 23]), "minute": dice.choice([0, 15, 30, 59])}
    return dice.choice(
        [
            {"interval": {"type": "daily", "timezone": zone, "at_time": at}},
            {"interval": {"type": "hourly", "timezone": zone, "at_time": {"hour": 0, "minute": at["minute"]}}},
            {"interval": {"type": "hourly", "value": 6, "timezone": zone}},
            {"interval": {"type": "minutely", "value": 90}},
            {"cron": {"expression": f"{at['minute']} 1-3 * * *", "timezone": zone}},
            {"cron": {"expression": "*/40 2 * * *", "timezone": zone}},
        ]
    )


def own(fields: dict[str, Any]) -> Schedule:
    return define("own", **fields).schedule


class Site:
    def __init__(self, client: redis.Redis, clock: Clock, store: Store, *definitions: Definition) -> None:
        self.client, self.clock, self.store = client, clock, store
        self.definitions = {one.id: one for one in definitions}
        self.planner = Planner(store, self.definitions, horizon=HORIZON, batch=50)
        self.planner.lead()
        self.planner.advance()

    def coming(self, user: str, count: int = 1, definition: str | None = None) -> Coming:
        return coming(self.store, self.definitions, user, definition, count=count, horizon=HORIZON)

    def to(self, until_ms: int) -> None:
        """The planner looks when it wants to."""
        while self.clock.now_ms < until_ms:
            left = min(timedelta(milliseconds=until_ms - self.clock.now_ms), self.planner.advance(), timedelta(seconds=50 * 60))
            self.clock.advance(max(left.total_seconds(), 0.001))
            # it lives in between
            self.store.planner_tick(planned=0)
            self.planner._looked_ms = self.clock.now_ms

    def made(self, user: str) -> dict[tuple[str, int], int]:
        """By definition and occurrence, the moments of the jobs that there are."""
        jobs = self.store.jobs(user=user, limit=10_000).items
        return {(job.definition, job.occurrence_ms): job.execute_after_ms for job in jobs if job.occurrence_ms is not None}


def occurrences(found: Coming) -> dict[tuple[str, int], int]:
    return {(one.definition, one.occurrence_ms): one.moment_ms for one in found.moments}


@pytest.mark.parametrize("seed", range(8))
def test_the_planner_keeps_what_is_foretold(client: redis.Redis, clock: Clock, store: Store, seed: int) -> None:
    dice = random.Random(seed)
    clock.now_ms = ms(dice.choice(STARTS)) + dice.randrange(0, 6 * 3600 * 1000)
    windows = [dice.choice(["0s", "45s", "20m", "3h"]) for _ in range(2)]
    site = Site(client, clock, store, *(define(f"d{n}", window=window, **schedule(dice)) for n, window in enumerate(windows)))
    users = [f"u{n}" for n in range(6)]
    for user in users:
        store.create_user(user, actor="test")
        for name in site.definitions:
            if dice.random() < 0.5:
                subscribe(store, user, name, schedule=own(schedule(dice)), own_schedule=True)
            else:
                subscribe(store, user, name)
    foretold: dict[str, dict[tuple[str, int], int]] = {}
    for _ in range(2):
        # some change while moments of the schedule before are still to come
        site.to(clock.now_ms + dice.randrange(0, 5 * 3600 * 1000))
        for user in users:
            if dice.random() < 0.4:
                subscribe(store, user, "d0", schedule=own(schedule(dice)), own_schedule=True)
        if dice.random() < 0.5:
            site.clock.advance(dice.random() * 4)
    asked_ms = clock.now_ms
    for user in users:
        found = site.coming(user, count=6)
        assert all(one.certain for one in found.moments), found
        assert [one.moment_ms for one in found.moments] == sorted(one.moment_ms for one in found.moments)
        foretold[user] = occurrences(found)
        for one in found.moments:
            assert datetime.fromisoformat(one.local).timestamp() * 1000 == pytest.approx(one.moment_ms, abs=0.01)
    until_ms = asked_ms + 3 * DAY // 2
    site.to(until_ms)
    for user in users:
        made = {key: at for key, at in site.made(user).items() if asked_ms < at < until_ms - MINUTE}
        expected = {key: at for key, at in foretold[user].items() if at < until_ms - MINUTE}
        assert expected.items() <= made.items(), f"{user}: foretold and not made"
        for name in site.definitions:
            mine = [key for key in foretold[user] if key[0] == name]
            # up to the last that was foretold there is no other
            last = max((foretold[user][key] for key in mine), default=0)
            others = {key for key, at in made.items() if key[0] == name and at < last} - set(mine)
            assert others == set(), f"{user}: made and not foretold"


def one(site: Site, user: str = "u1") -> Moment:
    (found,) = site.coming(user).moments
    return found


@pytest.fixture
def site(client: redis.Redis, clock: Clock, store: Store) -> Site:
    clock.now_ms = ms(datetime(2027, 3, 27, 12, tzinfo=UTC))
    definition = define(
        "report", interval={"type": "daily", "timezone": "Europe/Berlin", "at_time": {"hour": 2, "minute": 30}}, window="10m"
    )
    found = Site(client, clock, store, definition)
    store.create_user("u1", actor="test")
    subscribe(store, "u1", "report")
    return found


def test_a_skipped_hour_is_told_on_the_wall_clock(site: Site) -> None:
    """The night in which 02:30 is not: RFC 5545 has it at 03:30."""
    found, second = site.coming("u1", 2).moments
    at_ms = ms(datetime(2027, 3, 28, 1, 30, tzinfo=UTC))
    assert (found.occurrence_ms, found.timezone, found.window_ms) == (at_ms, "Europe/Berlin", 10 * MINUTE)
    assert found.moment_ms == at_ms + int(slot("u1", "report") * 10 * MINUTE)
    assert found.local.startswith("2027-03-28T03:3")
    assert found.local.endswith("+02:00")
    assert second.occurrence_ms - found.occurrence_ms == DAY - 60 * MINUTE
    assert found.certain


def test_what_is_open_and_what_is_made_is_told_as_it_is_kept(site: Site) -> None:
    """A trigger, and the job that was made for it; the window that is recorded counts."""
    site.store.trigger("report", window=timedelta(minutes=20), actor="anna")
    found = one(site)
    assert found.moment_ms == site.clock.now_ms + int(slot("u1", "report") * 20 * MINUTE)
    assert found.window_ms == 20 * MINUTE
    assert "anna" in found.note
    site.to(found.moment_ms - 2000)
    assert (one(site).moment_ms, one(site).note) == (found.moment_ms, "its job is made")
    assert site.made("u1").popitem()[1] == found.moment_ms
    site.to(found.moment_ms + 1)
    assert one(site).occurrence_ms == ms(datetime(2027, 3, 28, 1, 30, tzinfo=UTC))


def test_of_what_is_stopped_nothing_comes(site: Site) -> None:
    site.store.pause_user("u1", actor="anna")
    found = site.coming("u1")
    assert found.moments == ()
    assert "paused by anna" in found.none["report"]
    site.store.resume_user("u1", actor="anna")
    subscribe(site.store, "u1", "report", enabled=False)
    assert "disabled by test" in site.coming("u1").none["report"]
    subscribe(site.store, "u1", "report", enabled=True)
    site.store.pause_definition("report", why="broken", actor="bert")
    found_one = one(site)
    assert not found_one.certain
    assert "paused by bert" in found_one.note
    site.store.resume_definition("report", actor="bert")
    assert one(site).certain
    site.store.unsubscribe("u1", "report", actor="carl")
    assert site.coming("u1").none == {}
    assert "unsubscribed by carl" in site.coming("u1", definition="report").none["report"]


def test_without_a_planner_nothing_is_certain(site: Site) -> None:
    site.clock.advance(600)
    found = one(site)
    assert not found.certain
    assert "no planner has looked" in found.note


def test_a_limit_that_may_widen_the_window_is_told(site: Site) -> None:
    store = site.store
    users = [f"x{n}" for n in range(60)]
    store.create_users(users, actor="test")
    for user in users:
        subscribe(store, user, "report")
    assert one(site).certain
    store.set_limit("definition:report", Limit(0.05, 1), actor="test")
    found = one(site)
    assert not found.certain
    assert "widened from 10m" in found.note
    # its own jobs fit, those of others that come due with it may not
    store.set_limit("definition:report", Limit(100, 100), actor="test")
    assert one(site).certain
    before = one(site).moment_ms
    store.set_limit("definition:report", Limit(0.05, 1), actor="test")
    site.to(before + 4 * 60 * MINUTE)
    assert site.made("u1").popitem()[1] > before, "the planner did widen it"
