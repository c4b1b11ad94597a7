"""What people do in the day, each with a name, and what breaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from bench.day.book import Deed, Pair, What, place_of
from bench.day.rules import Rule
from bench.day.town import ZONES, Town
from taskplatform.catalogue import Catalogue
from taskplatform.model import JobState
from taskplatform.platform import Platform

ACTORS = ("ann", "bob", "cara", "api:billing", "dev")
_HOUR_MS = 3_600_000


@dataclass
class People:
    """They act on the town's world, and the book notes it."""

    town: Town
    rng: random.Random

    @property
    def _now_ms(self) -> int:
        return self.town.world.clock.now_ms

    def _as(self, actor: str) -> Platform:
        return self.town.world.platform.acting_as(actor)

    def _did(self, what: What, actor: str, user: str = "", definition: str = "", job: str = "", rule: Rule | None = None) -> None:
        self.town.book.did(Deed(self._now_ms, what, actor, user, definition, job, rule))

    def _at(self, when_ms: int, what: Callable[[], None]) -> None:
        self.town.world.at(when_ms, what)

    # --- the programme

    def live(self, since_ms: int, until_ms: int, *, events: int) -> None:
        """Put so many small changes of mind on the agenda, and each kind of trouble once."""
        pairs = self.town.book.pairs()
        acts: Sequence[Callable[[Pair], None]] = (
            self.pause_user,
            self.pause_subscription,
            self.disable,
            self.leave_and_return,
            self.own_schedule,
            self.own_zone,
            self.just_before,
            self.cancel_one,
        )
        for number in range(events):
            pair = self.rng.choice(pairs)
            self._at(self._random(since_ms, until_ms), _bound(acts[number % len(acts)], pair))
        span = until_ms - since_ms
        for number, name in enumerate(("hour_all", "report", "bulk")):
            self._at(since_ms + span * (number + 1) // 5 + 421_137, _bound(self.pause_definition, name))
        self._at(since_ms + span // 6, self.planner_outage)
        self._at(since_ms + span // 3, lambda: self.worker_outage("celery@worker0", most_losses=3))
        # while much runs that takes long
        self._at(until_ms + 90_000, lambda: self.worker_outage("celery@worker1", most_losses=1))
        self._at(since_ms + span // 2, self.hold_host)
        self._at(since_ms + span // 4, self.change_limit)
        self._at(since_ms + 2 * span // 3 + 12_345, self.trigger)
        self._at(since_ms + 3 * span // 7, self.retract)
        for part in (3, 5, 6):
            self._at(since_ms + part * span // 7, self.discard_some)

    def _random(self, since_ms: int, until_ms: int) -> int:
        return self.rng.randrange(since_ms, until_ms)

    def _later(self, what: Callable[[], None], longest_ms: int = 8 * _HOUR_MS) -> None:
        self._at(self._now_ms + self.rng.choice((20_000, 300_000, longest_ms // 3, longest_ms)), what)

    # --- users and subscriptions

    def pause_user(self, pair: Pair) -> None:
        """For a while."""
        actor, user = self.rng.choice(ACTORS), pair[0]
        if self._as(actor).pause_user(user):
            self._did(What.USER_PAUSED, actor, user)
            self._later(lambda: self._resume_user(user))

    def _resume_user(self, user: str) -> None:
        actor = self.rng.choice(ACTORS)
        if self._as(actor).resume_user(user):
            self._did(What.USER_RESUMED, actor, user)

    def pause_subscription(self, pair: Pair) -> None:
        """For a while."""
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and self._as(actor).pause_subscription(*pair):
            self._did(What.PAUSED, actor, *pair)
            self._later(lambda: self._resume_subscription(pair))

    def _resume_subscription(self, pair: Pair) -> None:
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and self._as(actor).resume_subscription(*pair):
            self._did(What.RESUMED, actor, *pair)

    def disable(self, pair: Pair) -> None:
        """For a while."""
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and self._as(actor).subscription(*pair).enabled:
            self._as(actor).disable(*pair)
            self._did(What.DISABLED, actor, *pair)
            self._later(lambda: self._enable(pair))

    def _enable(self, pair: Pair) -> None:
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and not self._as(actor).subscription(*pair).enabled:
            self._as(actor).enable(*pair)
            self._did(What.ENABLED, actor, *pair)

    def leave_and_return(self, pair: Pair) -> None:
        """Unsubscribe, and most come back."""
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and self._is_on(pair):
            self._as(actor).unsubscribe(*pair)
            self._did(What.UNSUBSCRIBED, actor, *pair)
            if self.rng.random() < 0.7:
                self._later(lambda: self._return(pair))

    def _return(self, pair: Pair) -> None:
        actor = self.rng.choice(ACTORS)
        if not self._is_subscribed(pair) and self._is_published(pair):
            self._as(actor).subscribe(*pair)
            self._did(What.SUBSCRIBED, actor, *pair)

    def own_schedule(self, pair: Pair) -> None:
        """Another time of the day, or every few hours."""
        rule = self.rng.choice(
            (
                Rule("daily", hour=self.rng.randrange(24), minute=self.rng.randrange(60), zone=self.rng.choice(ZONES)),
                Rule("hourly", every=3, minute=self.rng.randrange(60)),
                Rule("hourly", every=2, minute=self.rng.randrange(60), zone="Europe/Berlin"),
            )
        )
        self._set_schedule(pair, rule)

    def own_zone(self, pair: Pair) -> None:
        """Somebody moved, or moved back."""
        plan = self.town.plans[pair[1]]
        zone = self.rng.choice(ZONES)
        if plan.name not in ("fickle", "clock"):
            self._set_schedule(pair, None if zone == plan.rule.zone else Rule(**{**vars(plan.rule), "zone": zone}))

    def just_before(self, pair: Pair) -> None:
        """A change some seconds before the moment: of the pause, of the schedule, or the end of it."""
        upcoming = self._upcoming(pair)
        if upcoming is not None:
            act = self.rng.choice((self.pause_user, self.pause_subscription, self.disable, self.own_schedule, self.leave_and_return))
            self._at(upcoming + self.rng.randrange(-18_000, 6_000), _bound(act, pair))

    def _set_schedule(self, pair: Pair, rule: Rule | None) -> None:
        actor = self.rng.choice(ACTORS)
        if self._is_subscribed(pair) and self._is_published(pair) and self._is_on(pair):
            before = self.town.book.own_rule(pair)
            if before != rule:
                self._as(actor).set_schedule(*pair, None if rule is None else rule.fields())
                self._did(What.SCHEDULE, actor, *pair, rule=rule)

    def cancel_one(self, pair: Pair) -> None:
        """The user's next job, as soon as it is made, or a little later."""
        upcoming = self._upcoming(pair)
        if upcoming is not None:
            self._at(upcoming - self.rng.choice((800, 300, -60, -400)), lambda: self._cancel(pair[0]))

    def _cancel(self, user: str) -> None:
        states = (JobState.PENDING, JobState.QUEUED, JobState.RETRYING, JobState.RUNNING)
        for job in self._as("dev").jobs(user=user, state=states, limit=1).items:
            actor = self.rng.choice(ACTORS)
            self._as(actor).cancel(job.id)
            self._did(What.CANCELED, actor, user, job.definition, job.id)

    def _upcoming(self, pair: Pair) -> int | None:
        """The next moment, without limits."""
        book = self.town.book
        offset = int(place_of(pair) * book.kinds[pair[1]].window_ms)
        times = book.occurrences(pair, self._now_ms + 30 * _HOUR_MS)
        return next((at + offset for at in times if at + offset > self._now_ms + 60_000), None)

    def _is_subscribed(self, pair: Pair) -> bool:
        return self.town.book.causes_at(pair, self._now_ms)[0]

    def _is_on(self, pair: Pair) -> bool:
        return all(deed.what is not What.DISABLED for deed in self.town.book.causes_at(pair, self._now_ms)[1])

    def _is_published(self, pair: Pair) -> bool:
        return pair[1] in self.town.world.catalogue

    # --- operators

    def pause_definition(self, name: str) -> None:
        """For a while."""
        actor = self.rng.choice(ACTORS)
        if name in self.town.world.catalogue and self._as(actor).pause_definition(name, why="a fault in it"):
            self._did(What.DEFINITION_PAUSED, actor, definition=name)
            self._at(self._now_ms + 2 * _HOUR_MS + 7_000, lambda: self._resume_definition(name))

    def _resume_definition(self, name: str) -> None:
        actor = self.rng.choice(ACTORS)
        self._as(actor).resume_definition(name)
        self._did(What.DEFINITION_RESUMED, actor, definition=name)

    def planner_outage(self) -> None:
        """An hour without a beat, and some more."""
        self.town.world.stop_planner()
        self._did(What.PLANNER_DOWN, "")
        self._at(self._now_ms + 75 * 60_000, self._planner_returns)

    def _planner_returns(self) -> None:
        self._did(What.PLANNER_UP, "")
        self.town.world.lead()

    def worker_outage(self, worker: str, *, most_losses: int) -> None:
        """It dies, and another comes in its place an hour later."""
        self._did(What.WORKER_DOWN, "")
        self.town.world.die(worker, most_losses=most_losses)
        self._at(self._now_ms + _HOUR_MS, lambda: self.town.world.arrive(f"{worker}b"))

    def hold_host(self) -> None:
        """Somebody holds a host back by hand."""
        actor = self.rng.choice(ACTORS)
        self._as(actor).open_breaker("shaky.example", span=timedelta(hours=2), reason="maintenance there")
        self._did(What.HELD, actor)
        self._at(self._now_ms + 90 * 60_000, self._free_host)

    def _free_host(self) -> None:
        actor = self.rng.choice(ACTORS)
        self._as(actor).reset_breaker("shaky.example")
        self._did(What.FREED, actor)

    def change_limit(self) -> None:
        """Half of what it was, for some hours."""
        actor = self.rng.choice(ACTORS)
        self._as(actor).set_limit("definition:invoice", "30/m", burst=5)
        self._did(What.LIMIT, actor)
        self._at(self._now_ms + 6 * _HOUR_MS, self._reset_limit)

    def _reset_limit(self) -> None:
        actor = self.rng.choice(ACTORS)
        self._as(actor).reset_limit("definition:invoice")
        self._did(What.LIMIT, actor)

    def trigger(self) -> None:
        """An occurrence of its own."""
        self._as("cara").trigger("hour_skip", window=timedelta(seconds=30))

    def retract(self) -> None:
        """A definition goes with one deployment, and comes back hours later with another schedule."""
        world = self.town.world
        if world.planner is None:
            self._at(self._now_ms + _HOUR_MS, self.retract)
            return
        self._at(self._now_ms // _HOUR_MS * _HOUR_MS + _HOUR_MS + 5 * 60_000, self._retract_now)

    def _retract_now(self) -> None:
        world = self.town.world
        world.lead(Catalogue.of(*(one for name, one in world.catalogue.items() if name != "fickle")), name="celery@beat2")
        self._did(What.REMOVED, "celery@beat2", definition="fickle")
        self._at(self._now_ms + 4 * _HOUR_MS, self._publish_again)

    def _publish_again(self) -> None:
        world, rule = self.town.world, Rule("hourly", every=2, minute=45)
        plan = self.town.plans["fickle"]
        world.lead(Catalogue.of(*world.catalogue.values(), plan.definition(rule)), name="celery@beat3")
        self._did(What.PUBLISHED, "celery@beat3", definition="fickle", rule=rule)

    def discard_some(self) -> None:
        """Two dead letters."""
        self.town.look()
        for job in self._as("dev").dead_letters(limit=2).items:
            actor = self.rng.choice(ACTORS)
            self._as(actor).discard(job.id)
            self._did(What.DISCARDED, actor, job.user, job.definition, job.id)


def _bound(act: Callable[[str], None] | Callable[[Pair], None], of: str | Pair) -> Callable[[], None]:
    return lambda: act(of)  # type: ignore[arg-type]
