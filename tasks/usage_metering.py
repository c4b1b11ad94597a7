"""Usage against what a plan includes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def roll_up(job: RunningJob) -> dict[str, object]:
    """Totals per meter, and what of them goes beyond the plan.

    Parameters: `events`, a list of `{meter, quantity}`; `included`, the plan's quantity by meter. A meter that the plan
    does not name includes nothing. A negative quantity is a correction; a total never falls below zero.
    """
    given = Inputs(job.params)
    included = given.record("included")
    allowances = {meter: included.integer(meter, minimum=0) for meter in included.names()}
    totals: defaultdict[str, int] = defaultdict(int)
    counts: defaultdict[str, int] = defaultdict(int)
    for event in given.records("events"):
        meter = event.text("meter")
        totals[meter] += event.integer("quantity", minimum=-(10**15))
        counts[meter] += 1
    meters: dict[str, object] = {}
    for meter in sorted(allowances.keys() | totals.keys()):
        used, allowed = max(totals[meter], 0), allowances.get(meter, 0)
        meters[meter] = {"used": used, "included": allowed, "overage": max(used - allowed, 0), "events": counts[meter]}
    return {"meters": meters, "over_plan": sorted(meter for meter in meters if max(totals[meter], 0) > allowances.get(meter, 0))}
