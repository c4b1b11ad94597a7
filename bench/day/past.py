"""Fills a Redis with a day of past, so that people can try what the platform says of one: `python -m bench day past --help`.

The jobs are made, released, run and retried by the platform's own scripts and planner, at the instants of the day that has just passed,
on subscriptions of the shipped definitions. In the day people pause, switch off, leave, come back and change their times; a
definition is paused, a beat is away for forty minutes, a worker dies, a host is held back, jobs are canceled and dead letters discarded.

What is often due has few subscribers, so that the day has about one job for each subscription.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from bench.day.engine import Clock, Pace, Profile, Run, World
from taskplatform.catalogue import Catalogue, deployed
from taskplatform.errors import NotFound
from taskplatform.model import Cron, Definition, IntervalType, JobState
from taskplatform.platform import Platform, SubscriptionRequest
from taskplatform.settings import environment, load_settings
from taskplatform.store import connect

ACTORS = ("ann", "bob", "cara", "api:billing", "dev")
ZONES = ("Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Sydney", "America/Sao_Paulo")
#: What the shipped definitions take from the environment, where it is not set: as the README has it.
ENVIRONMENT = {"API_BASE_URL": "http://127.0.0.1:8000/anything", "API_TOKEN": "demo-token"}
#: How many subscribers a definition has, beside one that is due daily.
_POPULAR = {
    IntervalType.DAILY: 1.0,
    IntervalType.WEEKLY: 0.6,
    IntervalType.MONTHLY: 0.5,
    IntervalType.HOURLY: 0.04,
    IntervalType.MINUTELY: 0.0005,
}
_PACE = Pace(grid_ms=10_000, tick_ms=25_000, look_ms=500, heartbeat_ms=600_000, sweep_ms=24 * 3_600_000)
_HORIZON = timedelta(seconds=30)
_CHUNK = 2000
_MINUTE_MS, _HOUR_MS = 60_000, 3_600_000


class _Nobody:
    """Watches nothing."""

    def ticked(self, at_ms: int) -> None: ...
    def started(self, run: Run) -> None: ...
    def ended(self, run: Run) -> None: ...
    def lost(self, job_id: str, at_ms: int, most_losses: int) -> None: ...


def popularity(definition: Definition) -> float:
    """How many subscribers it has, beside one that is due daily."""
    schedule = definition.schedule
    if isinstance(schedule, Cron):
        return 0.6
    share = _POPULAR[schedule.type]
    if schedule.type in (IntervalType.HOURLY, IntervalType.MINUTELY):
        share *= min(schedule.value, 15)
    return share


def profile(definition: Definition, rng: random.Random) -> Profile:
    """Most take some tenths of a second, a few of them many; some definitions fail more often than others."""
    mean_s = min(rng.lognormvariate(-0.7, 0.9), 0.2 * definition.work_limit.total_seconds())
    return Profile(mean_s=mean_s, sigma=0.5, fails=rng.choice((0.0, 0.01, 0.02, 0.3)), times_out=rng.choice((0.0, 0.0, 0.002)))


def requests(catalogue: Catalogue, users: int, subscriptions: int, rng: random.Random) -> Iterator[SubscriptionRequest]:
    """So many, each of another user and definition."""
    # not those of `taskplatform verify`, which nobody subscribes to
    shares = {name: popularity(one) for name, one in catalogue.items() if not name.startswith("verify_")}
    whole, left = sum(shares.values()), subscriptions
    for name in sorted(shares, key=shares.__getitem__):
        count = min(users, left, max(1, round(subscriptions * shares[name] / whole)))
        left -= count
        yield from _of(catalogue[name], rng.sample(range(users), count), rng)
    # what rounding left over
    for name in sorted(shares, key=shares.__getitem__, reverse=True)[: 1 if left else 0]:
        yield from _of(catalogue[name], range(min(left, users)), rng)


def _of(definition: Definition, numbers: Sequence[int], rng: random.Random) -> Iterator[SubscriptionRequest]:
    daily = not isinstance(definition.schedule, Cron) and definition.schedule.type is IntervalType.DAILY
    for number in numbers:
        own = None
        if daily and rng.random() < 0.1:
            own = {"timezone": rng.choice(ZONES), "at_time": {"hour": rng.randrange(24), "minute": rng.choice((0, 15, 30, 45))}}
        yield SubscriptionRequest(user=f"user{number}", definition=definition.id, schedule=own, enabled=rng.random() > 0.02)


class _Changes:
    """What people do in the day."""

    def __init__(self, world: World, users: int, rng: random.Random) -> None:
        self._world, self._users, self._rng = world, users, rng

    def plan(self, since_ms: int, until_ms: int, events: int) -> None:
        """Put it on the agenda."""
        rng, at, span = self._rng, self._world.at, until_ms - since_ms
        acts = (self._pause_user, self._pause_subscription, self._disable, self._leave, self._move, self._cancel)
        for number in range(events):
            at(rng.randrange(since_ms, until_ms), acts[number % len(acts)])
        at(since_ms + span // 8, self._pause_definition)
        at(since_ms + span // 2, self._no_planner)
        at(since_ms + span // 3, self._worker_dies)
        at(since_ms + 2 * span // 3, self._hold_host)
        at(since_ms + 3 * span // 4, self._discard)
        at(since_ms + span // 5, self._trigger)

    def _as_somebody(self) -> Platform:
        return self._world.platform.acting_as(self._rng.choice(ACTORS))

    def _later(self, what: Callable[[], object]) -> None:
        self._world.at(self._world.clock.now_ms + self._rng.choice((2, 30, 240)) * _MINUTE_MS, _forgiving(what))

    def _user(self) -> str:
        return f"user{self._rng.randrange(self._users)}"

    def _pair(self) -> tuple[str, str] | None:
        user = self._user()
        names = [one.definition for one in self._world.platform.subscriptions(user)]
        return (user, self._rng.choice(names)) if names else None

    def _pause_user(self) -> None:
        user = self._user()
        self._as_somebody().pause_user(user)
        if self._rng.random() < 0.8:
            self._later(lambda: self._as_somebody().resume_user(user))

    def _pause_subscription(self) -> None:
        if pair := self._pair():
            self._as_somebody().pause_subscription(*pair)
            self._later(lambda: self._as_somebody().resume_subscription(*pair))

    def _disable(self) -> None:
        if pair := self._pair():
            self._as_somebody().disable(*pair)
            if self._rng.random() < 0.7:
                self._later(lambda: self._as_somebody().enable(*pair))

    def _leave(self) -> None:
        if pair := self._pair():
            self._as_somebody().unsubscribe(*pair)
            if self._rng.random() < 0.5:
                self._later(lambda: self._as_somebody().subscribe(*pair))

    def _move(self) -> None:
        if pair := self._pair():
            self._as_somebody().set_schedule(*pair, {"timezone": self._rng.choice(ZONES)})

    def _cancel(self) -> None:
        # somebody has a job that waits; not everybody does
        for _ in range(20):
            for job in self._world.platform.jobs(user=self._user(), state=(JobState.PENDING, JobState.RETRYING), limit=1).items:
                self._as_somebody().cancel(job.id)
                return

    def _pause_definition(self) -> None:
        name = next(name for name, one in self._world.catalogue.items() if popularity(one) == 1.0)
        self._as_somebody().pause_definition(name, why="its target is being moved")
        self._world.at(self._world.clock.now_ms + 3 * _HOUR_MS, _forgiving(lambda: self._as_somebody().resume_definition(name)))

    def _no_planner(self) -> None:
        self._world.stop_planner()
        self._world.at(self._world.clock.now_ms + 40 * _MINUTE_MS, self._world.lead)

    def _worker_dies(self) -> None:
        self._world.die("celery@worker0")
        self._world.at(self._world.clock.now_ms + 30 * _MINUTE_MS, lambda: self._world.arrive("celery@worker0b"))

    def _hold_host(self) -> None:
        host = next((one.config.host(self._world.environment) for one in self._world.catalogue.values() if one.config), None)
        if host:
            self._as_somebody().open_breaker(host, span=timedelta(minutes=10), reason="maintenance of the target")
            self._world.at(self._world.clock.now_ms + 5 * _MINUTE_MS, _forgiving(lambda: self._as_somebody().reset_breaker(host)))

    def _discard(self) -> None:
        self._as_somebody().discard_all(limit=5)

    def _trigger(self) -> None:
        name = next(name for name, one in self._world.catalogue.items() if popularity(one) == 0.5)
        self._as_somebody().trigger(name, window=timedelta(minutes=5))


def _forgiving(what: Callable[[], object]) -> Callable[[], None]:
    """Of what may be gone meanwhile."""

    def act() -> None:
        try:
            what()
        except NotFound:
            return

    return act


def fill(url: str, namespace: str, *, users: int, subscriptions: int, hours: float, events: int, seed: int, tasks: Path) -> World:
    """Make the past. It ends when the simulated time has come to the present."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    rng = random.Random(seed)
    settings = load_settings(redis_url=url, namespace=namespace, tasks_dir=tasks, plan_horizon=_HORIZON, plan_batch=1000)
    client = connect(url)
    clock = Clock(_now_ms(client) - round(hours * _HOUR_MS))
    since_ms = clock.now_ms
    catalogue = deployed(settings)
    profiles = {name: profile(one, rng) for name, one in catalogue.items()}
    world = World(
        client, clock, catalogue, settings, _Nobody(), rng, profiles=profiles, environment=environment(), workers=6, slots=8, pace=_PACE
    )
    if world.platform.store.count_users():
        raise SystemExit(f"namespace {namespace!r} of {url} has users already: nothing was done; an empty one is needed")
    _say(f"{users:,} users and {subscriptions:,} subscriptions …")
    world.lead()
    world.platform.create_users(f"user{number}" for number in range(users))
    chunk: list[SubscriptionRequest] = []
    for one in requests(catalogue, users, subscriptions, rng):
        chunk.append(one)
        if len(chunk) == _CHUNK:
            world.platform.subscribe_many(chunk)
            chunk = []
    world.platform.subscribe_many(chunk)
    world.poke()
    _Changes(world, users, rng).plan(since_ms + _HOUR_MS, max(since_ms + 2 * _HOUR_MS, since_ms + round(hours * _HOUR_MS)), events)
    end_ms = since_ms
    while end_ms < (now_ms := _now_ms(client)):
        end_ms = min(end_ms + _HOUR_MS, now_ms)
        world.run_until(end_ms)
        _say(f"{(end_ms - since_ms) / _HOUR_MS:5.1f} h: {world.steps['starts']:,} runs")
    if world.planner is None:
        world.lead()
    world.leave()
    return world


def _now_ms(client: object) -> int:
    seconds, microseconds = client.time()  # type: ignore[attr-defined]
    return int(seconds) * 1000 + int(microseconds) // 1000


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Fill a Redis. Returns 0."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench day past", description=__doc__, formatter_class=form)
    parser.add_argument("--url", default="redis://127.0.0.1:6380/0", help="of the Redis; default that of `taskplatform up`")
    parser.add_argument("--namespace", default="tp", help="one in which there are no users yet; default tp")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--subscriptions", type=int, default=100_000)
    parser.add_argument("--hours", type=float, default=24, help="how long ago the past begins")
    parser.add_argument("--events", type=int, default=1200, help="how many times somebody changes something")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=Path, default=Path("tasks"), help="folder of the definitions; default tasks")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    world = fill(
        given.url,
        given.namespace,
        users=given.users,
        subscriptions=given.subscriptions,
        hours=given.hours,
        events=given.events,
        seed=given.seed,
        tasks=given.tasks,
    )
    counts = {state.value: count for state, count in sorted(world.store.counts().items()) if count}
    print(f"{given.hours:g} h of past in {time.monotonic() - began:.0f} s: {world.steps['starts']:,} runs; jobs that were ever {counts}")
    return 0
