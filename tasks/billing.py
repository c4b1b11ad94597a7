"""Prices of plan changes in the middle of a billing month."""

from __future__ import annotations

import calendar
from fractions import Fraction
from typing import TYPE_CHECKING

from tasks.inputs import Inputs, due_day

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def prorate_plan_change(job: RunningJob) -> dict[str, object]:
    """What changing the plan on the job's day credits and charges for the rest of the calendar month.

    Parameters: `current_monthly_cents`, `target_monthly_cents`. The day of the change counts as a day of the new plan.
    Cents are rounded half to even, so that many customers' roundings do not add up in one direction.
    """
    given = Inputs(job.params)
    current = given.integer("current_monthly_cents", minimum=0)
    target = given.integer("target_monthly_cents", minimum=0)
    day = due_day(job)
    days = calendar.monthrange(day.year, day.month)[1]
    share = Fraction(days - day.day + 1, days)
    credit, charge = round(current * share), round(target * share)
    return {
        "changed_on": day.isoformat(),
        "days_left": days - day.day + 1,
        "days_in_month": days,
        "credit_cents": credit,
        "charge_cents": charge,
        "net_cents": charge - credit,
    }
