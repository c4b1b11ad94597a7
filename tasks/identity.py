"""Dates in the life of a credential."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from tasks.inputs import Inputs, due_day

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def password_rotation(job: RunningJob) -> dict[str, object]:
    """When the password is due for rotation, and whether the job's day is one to remind on.

    Parameters: `last_changed` (day), `max_age_days`, `remind_days_before` (a list). An overdue password is reminded of daily.
    """
    given = Inputs(job.params)
    due = given.day("last_changed") + timedelta(days=given.integer("max_age_days", minimum=1, maximum=3660))
    reminders = given.integers("remind_days_before", minimum=0, maximum=3660)
    today = due_day(job)
    days_left = (due - today).days
    upcoming = [due - timedelta(days=days) for days in reminders if days < days_left]
    if days_left < 0:
        state = "overdue"
    elif days_left <= max(reminders, default=0):
        state = "due_soon"
    else:
        state = "current"
    return {
        "due": due.isoformat(),
        "days_left": days_left,
        "state": state,
        "remind_today": days_left < 0 or days_left in reminders,
        "next_reminder": min(upcoming).isoformat() if upcoming else None,
    }
