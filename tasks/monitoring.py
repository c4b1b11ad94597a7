"""What is left of the error budgets of service levels, and a drill for those who run the platform."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

#: At 14.4 times the sustainable rate, an hour uses 2 % of a 30-day budget (Site Reliability Workbook, chapter 5).
_PAGE_AT = Fraction("14.4")
_TICKET_AT = Fraction(1)


def error_budget(job: RunningJob) -> dict[str, object]:
    """How fast the last hour burned the error budget, and what that calls for: `page`, `ticket` or `none`.

    Parameters: `objective_percent` (text, "99.9"), `requests`, `failures`. A burn rate of 1 uses up the budget exactly
    at the end of its period. Without requests nothing burned.
    """
    given = Inputs(job.params)
    objective = Fraction(given.decimal("objective_percent")) / 100
    if not 0 < objective < 1:
        raise given.error("objective_percent", 'a percentage between 0 and 100, such as "99.9"')
    requests = given.integer("requests", minimum=0)
    failures = given.integer("failures", minimum=0, maximum=requests)
    burn = Fraction(failures, requests) / (1 - objective) if requests else Fraction(0)
    action = "page" if burn >= _PAGE_AT else "ticket" if burn >= _TICKET_AT else "none"
    return {
        "success_percent": round(float(100 * (1 - Fraction(failures, requests))), 4) if requests else None,
        "allowed_failures": int(requests * (1 - objective)),
        "burn_rate": round(float(burn), 3),
        "action": action,
    }


def hold_slot(job: RunningJob) -> dict[str, object]:
    """Hold the slot for `seconds` (0 to 300), doing nothing."""
    seconds = Inputs(job.params).integer("seconds", minimum=0, maximum=300)
    time.sleep(seconds)
    return {"held_seconds": seconds}
