"""Dates that retention policies lead to."""

from __future__ import annotations

import calendar
from datetime import date, timedelta
from typing import TYPE_CHECKING

from tasks.inputs import Inputs, due_day

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_LONGEST = {"years": 100, "months": 1200, "days": 36600}


def retention_cutoffs(job: RunningJob) -> dict[str, object]:
    """For each class of records the day before which its records are to be deleted, seen from the job's day.

    Parameters: `policies`, by class a period of `years`, `months` and `days`; `legal_holds`, the classes of which nothing
    may be deleted. Years and months go by the calendar, and to the last day of a shorter month; days are taken off after.
    """
    given = Inputs(job.params)
    policies = given.record("policies")
    holds = set(given.texts("legal_holds"))
    if holds - set(policies.names()):
        raise given.error("legal_holds", f"classes of which policies has the period, {', '.join(policies.names())}")
    today = due_day(job)
    cutoffs = {name: _before(today, policies.record(name)) for name in policies.names()}
    return {
        "as_of": today.isoformat(),
        "delete_before": {name: day.isoformat() for name, day in cutoffs.items() if name not in holds},
        "held": sorted(holds),
    }


def _before(day: date, period: Inputs) -> date:
    if unknown := sorted(set(period.names()) - _LONGEST.keys()):
        raise period.error(unknown[0], "no place here: a period has years, months and days")
    years, months, days = (period.integer(unit, minimum=0, maximum=most) if unit in period else 0 for unit, most in _LONGEST.items())
    if not years + months + days:
        raise ValueError(f"{period.path} is no time at all; it takes at least one of years, months and days, above 0")
    year, month = divmod(day.year * 12 + day.month - 1 - years * 12 - months, 12)
    last = calendar.monthrange(year, month + 1)[1]
    return date(year, month + 1, min(day.day, last)) - timedelta(days=days)
