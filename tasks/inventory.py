"""When to order what is sold."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_Z_SCORES = {"90": 1.282, "95": 1.645, "98": 2.054, "99": 2.326}


def suggest_reorders(job: RunningJob) -> dict[str, object]:
    """The items whose stock, with what is on order, has reached the reorder point, and how much to order.

    Parameters: `service_level_percent` (90, 95, 98 or 99), `cover_days` (for how long an order should last), `items`, a list
    of `{sku, on_hand, on_order, lead_time_days, daily_demand}` where `daily_demand` lists at least two days.
    Reorder point: mean demand × lead time + z × standard deviation × √lead time.
    """
    given = Inputs(job.params)
    level = str(given.integer("service_level_percent", minimum=1, maximum=99))
    if level not in _Z_SCORES:
        raise given.error("service_level_percent", ", ".join(_Z_SCORES))
    cover_days = given.integer("cover_days", minimum=1, maximum=366)
    orders = []
    items = given.records("items")
    for item in items:
        demand = item.integers("daily_demand", minimum=0)
        if len(demand) < 2:
            raise item.error("daily_demand", "at least two days")
        lead_time = item.integer("lead_time_days", minimum=0, maximum=366)
        mean = statistics.fmean(demand)
        point = math.ceil(mean * lead_time + _Z_SCORES[level] * statistics.stdev(demand) * math.sqrt(lead_time))
        available = item.integer("on_hand", minimum=0) + item.integer("on_order", minimum=0)
        if available <= point and mean > 0:
            quantity = point - available + math.ceil(mean * cover_days)
            orders.append({"sku": item.text("sku"), "available": available, "reorder_point": point, "order": quantity})
    return {"checked": len(items), "orders": orders}
