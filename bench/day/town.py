"""The definitions and users of the simulated day."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import redis

from bench.day.book import Book, Deed, Kind, Seen, What
from bench.day.engine import Clock, Pace, Profile, World
from bench.day.rules import Rule
from taskplatform.catalogue import Catalogue
from taskplatform.model import Definition
from taskplatform.platform import SubscriptionRequest
from taskplatform.settings import Settings
from taskplatform.store.keys import key

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Sydney")
#: Nights in which clocks change in Europe: back, and forward.
NIGHTS = ((2026, 10, 25), (2027, 3, 28))
HORIZON = timedelta(seconds=10)
_ENDPOINTS = {"steady": "https://steady.example/run/{{user}}", "shaky": "https://shaky.example/run/{{user}}"}


@dataclass(frozen=True)
class Plan:
    """A definition of the town: when it is due, how it runs, and who subscribes."""

    name: str
    rule: Rule
    window_s: int
    share: float
    """Of the users."""
    catch_up: str = "latest"
    catch_up_h: int = 24
    profile: Profile = field(default_factory=Profile)
    host: str = ""
    zones: bool = False
    """Whether users take their own."""
    more: dict[str, Any] = field(default_factory=dict)

    def definition(self, rule: Rule | None = None) -> Definition:
        """As it is published."""
        work: dict[str, Any] = {"call": "tasks.inputs:anything"}
        if self.host:
            work = {"config": {"endpoint": _ENDPOINTS[self.host]}}
        fields = {"window": f"{self.window_s}s", "catch_up": {"policy": self.catch_up, "window": f"{self.catch_up_h}h"}}
        schedule = (rule or self.rule).fields()
        return Definition.model_validate({"id": self.name, "name": self.name, **schedule, **work, **fields, **self.more})


def plans() -> list[Plan]:
    """All of them. Together they have each kind of schedule, each policy of catching up, limits, hosts and long runs."""
    slow = Profile(mean_s=1200, sigma=0.8, fails=0.05, times_out=0.01)
    return [
        Plan("report", Rule("daily", hour=9, zone="Europe/Berlin"), 900, 1.0, zones=True),
        Plan("invoice", Rule("daily", hour=10), 60, 1.0, more={"rate_limit": {"rate": "60/m", "burst": 5}}),
        Plan("night", Rule("daily", hour=2, minute=30, zone="Europe/Berlin"), 120, 1.0, zones=True, catch_up="all"),
        Plan("urgent", Rule("daily", hour=9), 0, 0.6, profile=Profile(fails=0.04, times_out=0.03), more={"priority": "high", "retries": 0}),
        Plan("bulk", Rule("daily", hour=11), 60, 1.0, profile=Profile(mean_s=40, sigma=0.3), more={"priority": "low"}),
        Plan("weekly", Rule("weekly", weekday=6, hour=8), 600, 1.0, zones=True),
        Plan("monthly", Rule("monthly", day=1, hour=6), 3600, 1.0),
        *(Plan(f"weekly_{day}", Rule("weekly", weekday=day, hour=8), 600, 1.0) for day in (1, 2, 3)),
        Plan("yearly", Rule("monthly", every=12, day=25, hour=6), 1800, 1.0),
        Plan("quarterly", Rule("monthly", every=3, day=25, hour=6), 1800, 1.0),
        Plan("hour_all", Rule("hourly", minute=20), 300, 0.03, catch_up="all", catch_up_h=3),
        Plan("hour_latest", Rule("hourly", minute=40), 240, 0.03),
        Plan("hour_skip", Rule("hourly", minute=5), 120, 0.03, catch_up="skip"),
        Plan("rebuild", Rule("minutely", every=30), 120, 0.03, profile=slow, more={"overlap": "skip", "timeout": "3h", "retries": 1}),
        Plan("clock", Rule("clock", hours=(1, 2, 3), minutes=(0, 30), zone="Europe/Berlin"), 60, 0.1),
        Plan("six_hours", Rule("hourly", every=6, hour=1, zone="America/New_York"), 300, 0.15, host="steady"),
        Plan("shaky", Rule("hourly", minute=10), 180, 0.03, host="shaky", profile=Profile(fails=0.1, calls="shaky.example")),
        Plan("fickle", Rule("hourly", minute=50), 120, 0.03, catch_up="all", catch_up_h=12),
    ]


@dataclass
class Town:
    """The world with its book."""

    world: World
    book: Book
    plans: dict[str, Plan]
    users: list[str]
    rng: random.Random
    start_ms: int
    _observed_ms: int = 0

    def observe(self) -> None:
        """Note which jobs and occurrences the platform can be seen to have, and come again in an hour."""
        self.look()
        self.world.at(self.world.clock.now_ms + 3_600_000, self.observe)

    def look(self) -> None:
        """Note them now."""
        client, namespace, now_ms = self.world.client, self.world.settings.namespace, self.world.clock.now_ms
        pipe = client.pipeline(transaction=False)
        for name in self.plans:
            pipe.zrange(key(namespace, "definition_jobs", name), self._observed_ms, now_ms, byscore=True, withscores=True)
            pipe.zrange(key(namespace, "occurrences", name), 0, -1)
        answers = pipe.execute()
        for name, jobs, oids in zip(self.plans, answers[::2], answers[1::2], strict=True):
            for job_id, made in jobs:
                self.book.job_seen(job_id, int(made))
            known = self.book.seen[name]
            wanted = [oid for oid in oids if oid not in known or known[oid].state == "open"]
            for oid in wanted:
                pipe.hgetall(key(namespace, "occurrence", oid))
            for oid, fields in zip(wanted, pipe.execute(), strict=True):
                known[oid] = _seen(fields)
        self._observed_ms = now_ms


def _seen(fields: dict[str, str]) -> Seen:
    return Seen(
        group=fields["group"],
        at_ms=int(fields["at"]),
        last_ms=int(fields["last"]),
        base_ms=int(fields["base"]),
        window_ms=int(fields["window"]),
        state=fields["state"],
        source=fields["source"],
        reason=fields["reason"],
        opened_ms=int(fields["opened"]),
        done_ms=int(fields["done"]) if "done" in fields else None,
        cursor=float(fields["cursor"]),
        moved="moved" in fields,
    )


def found(client: redis.Redis, *, seed: int, users: int, workers: int = 4, slots: int = 8) -> Town:
    """A town at 06:00 UTC of the day before the clocks change, its users subscribed and its beat leading."""
    rng = random.Random(seed)
    year, month, day = NIGHTS[seed % len(NIGHTS)]
    start = datetime(year, month, day, 6, tzinfo=UTC) - timedelta(days=1)
    start_ms = int(start.timestamp() * 1000)
    clock = Clock(start_ms)
    all_plans = {plan.name: plan for plan in plans()}
    catalogue = Catalogue.of(*(plan.definition() for plan in all_plans.values()))
    book = Book(int(HORIZON / timedelta(milliseconds=1)))
    for plan in all_plans.values():
        book.kinds[plan.name] = Kind(
            plan.name, plan.window_s * 1000, plan.catch_up, plan.catch_up_h * 3_600_000, "overlap" in plan.more, [(0, plan.rule)]
        )
    world = World(
        client,
        clock,
        catalogue,
        Settings(plan_horizon=HORIZON),
        book,
        random.Random(seed + 1),
        profiles={plan.name: plan.profile for plan in all_plans.values()},
        workers=workers,
        slots=slots,
        pace=Pace(grid_ms=4000, tick_ms=8000, look_ms=1000),
    )
    world.lead()
    names = [f"user{number:04d}" for number in range(users)]
    world.platform.create_users(names)
    town = Town(world, book, all_plans, names, rng, start_ms)
    requests = []
    for plan in all_plans.values():
        for user in names:
            if rng.random() >= plan.share:
                continue
            zone = rng.choice(ZONES) if plan.zones and rng.random() < 0.5 else None
            own = None if zone is None or zone == plan.rule.zone else zone
            requests.append(SubscriptionRequest(user=user, definition=plan.name, schedule={"timezone": own} if own else None))
            rule = None if own is None else Rule(**{**vars(plan.rule), "zone": own})
            book.did(Deed(start_ms, What.SUBSCRIBED, "day", user, plan.name, rule=rule))
    world.platform.subscribe_many(requests)
    world.poke()
    town.observe()
    return town
