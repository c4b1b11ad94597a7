"""A process that only plans, so that its memory is that of planning: `python -m bench.planner_process URL DEFINITIONS`.

It stands one second before the next occurrence of its definitions and may plan as far ahead as their window reaches, so that
all of the occurrence is due at once. For each number of jobs that it reads, a line, it plans at least so many, or all that are left,
and answers with a line of JSON: how many it made, in how many seconds, and the most memory that it had.
"""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

from bench.population import http_definitions
from taskplatform.model import JobState
from taskplatform.planner import Planner
from taskplatform.schedule import next_occurrence
from taskplatform.settings import Settings
from taskplatform.store import Store, connect

#: The planner is asked how far it came after this.
_SLICE = timedelta(seconds=0.05)


def main(url: str, definitions: str) -> None:
    """Lead, and plan as it is told."""
    catalogue = {definition.id: definition for definition in http_definitions(int(definitions), interval="monthly")}
    first = next(iter(catalogue.values()))
    client = connect(url)
    occurrence = next_occurrence(first.schedule, Store(client).now_ms())
    assert occurrence is not None
    at = occurrence - 1000
    store = Store(client, clock=lambda: at)
    batch = Settings.model_fields["plan_batch"].default
    planner = Planner(store, catalogue, horizon=first.window + timedelta(seconds=2), batch=batch)
    for line in sys.stdin:
        before = made = store.counts()[JobState.PENDING]
        began = time.perf_counter()
        done = False
        while made - before < int(line) and not done:
            done = planner.advance(budget=_SLICE) > timedelta()
            made = store.counts()[JobState.PENDING]
        seconds = time.perf_counter() - began
        print(json.dumps({"made": made - before, "seconds": seconds, "rss_mb": _most_memory_mb()}), flush=True)


def _most_memory_mb() -> float:
    """Not getrusage's, which begins with that of the process that started this one."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
