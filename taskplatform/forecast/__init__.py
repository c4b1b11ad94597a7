"""What the hours to come bring: jobs and requests, where a limit saturates, what waits, how many workers it takes.

`look_ahead` simulates them with the platform's own code (`simulation`); what it found is a `Forecast` (`result`), which `plot` draws.
"""

from taskplatform.forecast.ahead import MOST_HOURS, look_ahead
from taskplatform.forecast.asked import More, asked_limit
from taskplatform.forecast.evaluation import limit_text
from taskplatform.forecast.result import Backlog, Cost, Forecast, LimitUse, Point, Slots, Span, Track, Widening, read_forecast
from taskplatform.forecast.simulation import Added
from taskplatform.forecast.warnings import warnings_of

__all__ = [
    "MOST_HOURS",
    "Added",
    "Backlog",
    "Cost",
    "Forecast",
    "LimitUse",
    "More",
    "Point",
    "Slots",
    "Span",
    "Track",
    "Widening",
    "asked_limit",
    "limit_text",
    "look_ahead",
    "read_forecast",
    "warnings_of",
]
