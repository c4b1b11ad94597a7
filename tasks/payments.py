"""When to try a failed payment again."""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING

from tasks.inputs import Inputs, due_day

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_SATURDAY = 5


def dunning_plan(job: RunningJob) -> dict[str, object]:
    """The days on which a failed payment is tried again, and what the job's day calls for: `retry`, `wait` or `give_up`.

    Parameters: `failed_on` (day), `retry_after_days` (a list, in any order). A day on a weekend moves to the Monday after it,
    when a person can answer the customer; two tries that then fall on one day are one try.
    """
    given = Inputs(job.params)
    failed = given.day("failed_on")
    offsets = given.integers("retry_after_days", minimum=1, maximum=366)
    if not offsets:
        raise given.error("retry_after_days", "at least one number of days")
    tries = sorted({_workday(failed + timedelta(days=offset)) for offset in offsets})
    today = due_day(job)
    coming = [day for day in tries if day >= today]
    action = "retry" if today in tries else "wait" if coming else "give_up"
    return {"tries": [day.isoformat() for day in tries], "next_try": coming[0].isoformat() if coming else None, "action": action}


def _workday(day: date) -> date:
    return day + timedelta(days=7 - day.weekday()) if day.weekday() >= _SATURDAY else day
