"""Proportional memory of beat and of a worker with three slots, at work, with the shipped definitions.

Beat plans an occurrence of every shipped definition with an HTTP call, 100,000 subscriptions at scale 1, and the worker calls a
local target meanwhile. The proportional set size (PSS) counts a page that processes share to each with its part; it is summed over
all processes of a role. The most that was seen is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.population import create_users, subscribe_all
from bench.processes import ROOT, site, target
from taskplatform.model import JobState

SLOTS = 3
#: The worker is at work this long, beat for a part of it.
SECONDS = 20
SAMPLE_EVERY = 0.25


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures."""
    with target() as url, site(ROOT / "tasks", API_BASE_URL=url, API_TOKEN="bench") as place:
        catalogue = place.platform.catalogue
        called = [one.id for one in catalogue.values() if one.config is not None and not one.missing_params({})]
        users = max(1, int(100_000 * scale) // len(called))
        create_users(place.platform.store, users)
        subscribe_all(place.platform.store, users, called)
        with place.beat() as beat, place.workers(pool="prefork", slots=SLOTS) as (worker,):
            roles = {"beat": beat, "worker": worker}
            at_rest = {role: _memory_mb(pid) for role, pid in roles.items()}
            for definition in called:
                place.platform.trigger(definition, window=timedelta())
            at_work: dict[str, list[float]] = {role: [] for role in roles}
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                for role, pid in roles.items():
                    at_work[role].append(_memory_mb(pid))
                time.sleep(SAMPLE_EVERY)
            counts = place.platform.store.counts()
            processes = {role: len(tree(pid)) for role, pid in roles.items()}
    return {
        "definitions": len(catalogue),
        "subscriptions": users * len(called),
        "jobs_planned": counts[JobState.PENDING],
        "jobs_completed": counts[JobState.COMPLETED],
        "processes": processes,
        **{f"{role}_mb": max(samples) for role, samples in at_work.items()},
        **{f"{role}_mb_median": statistics.median(samples) for role, samples in at_work.items()},
        **{f"{role}_mb_at_rest": at_rest[role] for role in roles},
    }


def _memory_mb(root: int) -> float:
    return round(sum(map(pss_kb, tree(root))) / 1024, 1)


def tree(root: int) -> list[int]:
    """A process and all below it."""
    below: defaultdict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            # after the command's name, which may hold anything, come the state and the parent
            parent = int((folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            below[parent].append(int(folder.name))
    found = [root]
    for pid in found:
        found += below[pid]
    return found


def pss_kb(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0
