"""`python -m bench day`: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from bench.day import past
from bench.day.judge import Report, check_book, check_why
from bench.day.people import People
from bench.day.town import found
from bench.processes import server
from taskplatform.store import connect


def main(arguments: Sequence[str]) -> int:
    """Run a day and report all disagreements. Returns 1 when there are any."""
    if arguments[:1] == ["past"]:
        return past.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m bench day")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--events", type=int, default=400)
    parser.add_argument("--most", type=int, default=40, help="disagreements that are shown")
    given = parser.parse_args(arguments)
    with server() as url:
        client = connect(url)
        began = time.monotonic()
        town = found(client, seed=given.seed, users=given.users)
        print(f"founded in {time.monotonic() - began:.1f} s, {len(town.book.pairs())} subscriptions")
        began = time.monotonic()
        hour = 3_600_000
        end = town.start_ms + 30 * hour
        People(town, town.rng).live(town.start_ms + 6 * hour, end - hour, events=given.events)
        town.world.run_until(end)
        town.look()
        report = Report()
        check_book(town, report)
        began_why = time.monotonic()
        check_why(town, report)
        print(f"why in {time.monotonic() - began_why:.1f} s")
        for line in report.disagreements[: given.most]:
            print(line)
        print(len(report.disagreements), "disagreements", dict(report.compared))
        print(f"30 h in {time.monotonic() - began:.1f} s", dict(town.world.steps), len(town.book.made), "jobs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
