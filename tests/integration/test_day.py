"""A day in simulated time (`bench.day`): what the platform answers is held against what then really happened.

The store, its scripts, the planner and `Platform` are the real ones on a real Valkey; the clock and the workers' processes are simulated.
People pause, disable, leave, come back, move and cancel, a definition goes and comes back, the planner and workers are away, and the
clocks of Europe change. Other seeds, and more people: `python -m bench day --seed 7 --users 1000`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bench.day.ask import Asker, check_forecast, check_next
from bench.day.book import Fate
from bench.day.command import live
from bench.day.judge import Report, check_book, check_why
from bench.day.past import fill
from bench.day.rules import Rule, due_times
from bench.day.town import NIGHTS, Town
from taskplatform.answers import Answer, Moment, Outcome
from taskplatform.local import EmbeddedServer, embedded_server
from taskplatform.model import Definition
from taskplatform.platform import Platform
from taskplatform.schedule import occurrences
from taskplatform.store import connect
from tests.conftest import ROOT
from tests.integration.harness import assert_consistent

#: An even one: in its night the clocks of Europe go back.
SEED = 8
USERS, EVENTS, QUESTIONS = 170, 330, 240
DAY_MS = 86_400_000

Day = tuple[Town, Asker]


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Others empty the session's."""
    with embedded_server(tmp_path_factory.mktemp("day")) as running:
        yield running


@pytest.fixture(scope="module")
def day(own_server: EmbeddedServer) -> Iterator[Day]:
    """A day that was lived through once. Tests only look at it."""
    client = connect(own_server.url)
    logging.disable(logging.WARNING)  # what the planner says of its outage
    yield live(client, seed=SEED, users=USERS, events=EVENTS, questions=QUESTIONS)
    logging.disable(logging.NOTSET)
    client.close()


def test_the_platform_did_what_the_book_says(day: Day) -> None:
    town, report = day[0], Report()

    check_book(town, report)

    assert not report.disagreements
    assert len(town.book.pairs()) >= 2000
    # else nothing was held against anything
    counted = {fate: report.compared[f"book {fate}"] for fate in Fate}
    assert counted[Fate.COMPLETED] > 1500
    assert counted[Fate.SKIPPED] > 60
    often = (Fate.MISSED, Fate.OVERLAP, Fate.CANCELED, Fate.COMING, Fate.FAILED, Fate.DISCARDED, Fate.POISON)
    assert not [fate for fate in often if counted[fate] < 3]


def test_why_says_of_every_occurrence_what_became_of_it_and_who_made_it_so(day: Day) -> None:
    report = Report()

    check_why(day[0], report)

    assert not report.disagreements
    assert report.compared.total() > 2000


def test_an_occurrence_of_a_time_without_a_subscription_is_told_by_who_ended_it(day: Day) -> None:
    town, told = day[0], 0
    for pair in town.book.pairs():
        subscribed, causes = town.book.causes_at(pair, town.world.clock.now_ms)
        if subscribed or not causes or pair[1] in ("monthly", "weekly", "fickle"):
            continue
        rule, gone = town.book.own_rule(pair) or town.plans[pair[1]].rule, causes[0]
        due = due_times(rule, gone.at_ms + DAY_MS // 48, town.world.clock.now_ms)
        for at_ms in due[:1]:
            (answer,) = town.world.platform.why(*pair, at=datetime.fromtimestamp(at_ms / 1000, UTC))
            assert answer.outcome is Outcome.NOT_SUBSCRIBED, answer
            assert gone.actor in answer.reason
            told += 1
    assert told >= 3


def test_next_is_kept_to_the_millisecond(day: Day) -> None:
    report = Report()

    check_next(day[1], report)

    assert not report.disagreements
    assert report.compared["next: kept"] >= 30
    assert report.compared["next: said to be uncertain"] < report.compared["next: kept"]


def test_the_forecast_came_true(day: Day) -> None:
    report = Report()

    check_forecast(day[1], report)

    assert not report.disagreements
    assert report.compared["forecast: windows"] == 1
    assert report.compared["forecast: minutes"] > 50


# --- that the judges see what is wrong -------------------------------------------------------------------------------


def test_a_wrong_outcome_and_a_wrong_name_are_seen(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    town, truth = day[0], Platform.why
    swapped = {Outcome.COMPLETED: Outcome.SKIPPED}

    def why(self: Platform, user: str, definition: str, **more: Any) -> list[Answer]:
        answers = truth(self, user, definition, **more)
        return [
            replace(one, outcome=swapped.get(one.outcome, one.outcome), reason=one.reason.replace(" by ", " by not-")) for one in answers
        ]

    some = {pair: deeds for pair, deeds in town.book.of_pair.items() if pair[0] < "user0030"}
    monkeypatch.setattr(town.book, "of_pair", type(town.book.of_pair)(list, some))
    monkeypatch.setattr(Platform, "why", why)
    report = Report()

    check_why(town, report)

    triggered = sum("triggered:" in line for line in report.disagreements)
    seen = sum("the outcome is skipped, and should be completed" in line for line in report.disagreements)
    assert seen - triggered == report.compared["why completed"] > 100
    assert sum("no cause is named" in line for line in report.disagreements) > 10


def test_a_moment_that_is_a_millisecond_wrong_is_seen(day: Day) -> None:
    _, asker = day
    report = Report()

    def later(moments: Sequence[Moment]) -> list[Moment]:
        return [replace(one, moment_ms=one.moment_ms + 1) for one in moments]

    moved = [replace(one, moments=later(one.moments)) for one in asker.questions]

    check_next(replace(asker, questions=moved), report)

    assert len(report.disagreements) == report.compared["next: kept"] > 0


def test_a_forecast_of_other_hours_is_seen(day: Day) -> None:
    _, asker = day
    truth = asker.forecast
    assert truth is not None
    moved = replace(truth, start_ms=truth.start_ms - 600_000, end_ms=truth.end_ms - 600_000, limits=(), backlogs=())
    report = Report()

    check_forecast(replace(asker, forecast=moved), report)

    assert any("jobs were said" in line for line in report.disagreements)
    assert any("is saturated" in line for line in report.disagreements)
    assert any("0 backlogs" in line for line in report.disagreements)


# --- what the book rests on, and the past that people can try --------------------------------------------------------


@pytest.mark.parametrize("night", NIGHTS)
@pytest.mark.parametrize(
    "rule",
    [
        Rule("daily", hour=2, minute=30, zone="Europe/Berlin"),
        Rule("daily", hour=2, minute=30, zone="Australia/Sydney"),
        Rule("daily", every=2, hour=23, minute=59, zone="America/New_York"),
        Rule("hourly", minute=20, zone="Asia/Kolkata"),
        Rule("hourly", every=2, minute=45, zone="Europe/Berlin"),
        Rule("minutely", every=7),
        Rule("weekly", weekday=6, hour=1, zone="Europe/Berlin"),
        Rule("monthly", day=25, hour=3, zone="Europe/Berlin"),
        Rule("clock", hours=(1, 2, 3), minutes=(0, 30), zone="Europe/Berlin"),
    ],
)
def test_the_book_finds_due_times_by_looking_at_the_clock(rule: Rule, night: tuple[int, int, int]) -> None:
    noon = int(datetime(*night, 12, tzinfo=UTC).timestamp() * 1000)
    definition = Definition.model_validate({"id": "one", "name": "one", "call": "tasks.inputs:anything", **rule.fields()})

    found = due_times(rule, noon - 2 * DAY_MS, noon + DAY_MS)

    assert found == list(occurrences(definition.schedule, noon - 2 * DAY_MS, noon + DAY_MS))


def test_a_past_ends_at_present(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = own_server.url.rpartition("/")[0] + "/1"
    monkeypatch.setenv("API_BASE_URL", "http://127.0.0.1:8000/anything")
    monkeypatch.setenv("API_TOKEN", "demo-token")
    logging.disable(logging.WARNING)
    try:
        world = fill(url, "tp", users=60, subscriptions=900, hours=0.5, events=20, seed=3, tasks=ROOT / "tasks")
    finally:
        logging.disable(logging.NOTSET)
    client = connect(url)
    platform = Platform(type(world.store)(client), world.catalogue, world.settings, actor="test")

    assert sum(map(platform.count_subscribers, world.catalogue)) >= 850
    assert world.steps["starts"] > 100
    # nothing is left that waits for the simulation
    assert not platform.workers()
    often = [name for name, one in world.catalogue.items() if one.interval and (one.interval.type, one.interval.value) == ("minutely", 1)]
    newest = max((job for name in often for job in platform.jobs(definition=name, limit=1).items), key=lambda job: job.execute_after_ms)
    assert abs(platform.now_ms() - newest.execute_after_ms) < timedelta(minutes=3) / timedelta(milliseconds=1)
    at = datetime.fromtimestamp((newest.occurrence_ms or 0) / 1000, UTC)
    (answer,) = platform.why(newest.user, newest.definition, at=at)
    assert answer.occurrence_ms == newest.occurrence_ms
    assert_consistent(client, platform.store, complete=False)
    with pytest.raises(SystemExit, match="has users already"):
        fill(url, "tp", users=1, subscriptions=1, hours=0.1, events=0, seed=0, tasks=ROOT / "tasks")
    client.close()
