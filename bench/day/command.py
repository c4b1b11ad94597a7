"""`python -m bench day`: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import redis

from bench.day import past
from bench.day.ask import Asker, check_forecast, check_next
from bench.day.judge import Report, check_book, check_why
from bench.day.people import People
from bench.day.town import Town, found
from bench.processes import server
from taskplatform.store import connect

_HOUR_MS = 3_600_000
#: The day begins with hours in which nobody changes anything, so that what was foreseen can come true.
CALM_HOURS, HOURS = 6, 30


def live(client: redis.Redis, *, seed: int, users: int, events: int, questions: int) -> tuple[Town, Asker]:
    """Live through the day on an empty server. What is asked meanwhile is in the second."""
    town = found(client, seed=seed, users=users)
    start_ms, world = town.start_ms, town.world
    end_ms, calm_ms = start_ms + HOURS * _HOUR_MS, start_ms + CALM_HOURS * _HOUR_MS
    asker = Asker(town, town.rng)
    # how long runs take must have been measured before anything is foreseen
    for number, name in enumerate(("bulk", "invoice", "urgent", "six_hours", "report")):
        world.at(start_ms + _HOUR_MS // 2 + number * 600_000 + 123, _triggering(town, name))
    asker.plan_forecast(start_ms + 5 * _HOUR_MS // 2, 3.5)
    asker.plan(start_ms + _HOUR_MS, end_ms - 2 * _HOUR_MS, questions)
    People(town, town.rng).live(calm_ms, end_ms - _HOUR_MS, events=events)
    world.run_until(end_ms)
    town.look()
    return town, asker


def _triggering(town: Town, name: str) -> Callable[[], None]:
    def trigger() -> None:
        town.world.platform.trigger(name, window=timedelta(minutes=5))

    return trigger


def judge(town: Town, asker: Asker) -> Report:
    """All that can be held against the book."""
    report = Report()
    check_book(town, report)
    check_why(town, report)
    check_next(asker, report)
    check_forecast(asker, report)
    return report


def main(arguments: Sequence[str]) -> int:
    """Run a day and report all disagreements. Returns 1 when there are any."""
    if arguments[:1] == ["past"]:
        return past.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench day",
        description="Lives through a day in simulated time and holds the platform's answers against what happened. `past` fills a Redis.",
    )
    parser.add_argument("--seed", type=int, default=0, help="an even one has the night in which clocks go back, an odd one the other")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--events", type=int, default=400, help="how many times somebody changes something")
    parser.add_argument("--questions", type=int, default=300, help="how often it is asked when the next job comes")
    parser.add_argument("--most", type=int, default=40, help="disagreements that are shown")
    given = parser.parse_args(arguments)
    with server() as url:
        began = time.monotonic()
        town, asker = live(connect(url), seed=given.seed, users=given.users, events=given.events, questions=given.questions)
        steps = town.world.steps
        print(f"{len(town.book.pairs()):,} subscriptions, {steps['starts']:,} runs, {HOURS} h in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        report = judge(town, asker)
        print(f"judged in {time.monotonic() - began:.0f} s:", ", ".join(f"{count:,} {what}" for what, count in report.compared.items()))
    for line in report.disagreements[: given.most]:
        print(line)
    print(f"{len(report.disagreements):,} disagreements")
    return int(bool(report.disagreements))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
