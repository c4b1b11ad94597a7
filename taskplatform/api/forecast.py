"""What the next hours bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from taskplatform.api import problem
from taskplatform.api.call import Call, Reads
from taskplatform.api.growth import ONE_AT_A_TIME
from taskplatform.api.records import NewLimit, Params
from taskplatform.api.routing import Routes
from taskplatform.forecast import MOST_HOURS, Forecast, More
from taskplatform.model import Limit

forecasts = Routes("forecast")

Points = Annotated[
    Literal["some", "all"],
    Query(description="all: also those of single definitions, which are most of it"),
]
InstantText = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Taken(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MoreUsers(_Taken):
    """A definition with so many more subscribers, who come now."""

    definition: str = Field(max_length=200)
    users: int = Field(ge=1, le=100_000_000)
    schedule: Params | None = Field(default=None, description="an own one, as a subscription has it; null: the definition's")


_ASKED: dict[str, Any] = {
    "hours": 24,
    "enable": [{"definition": "daily_user_report", "users": 200_000}],
    "limits": {"total": {"rate": "20/s", "burst": 30}},
    "slots": None,
}


class AskedForecast(_Taken):
    """What if: each as it is where nothing is said."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ASKED]})

    hours: float = Field(default=24, gt=0, le=MOST_HOURS)
    enable: list[MoreUsers] = Field(default=[], max_length=1000)
    limits: dict[str, NewLimit] = Field(default={}, description="by name: total, definition:ID or host:HOST, in place of those in force")
    slots: int | None = Field(default=None, ge=0, le=1_000_000, description="how many places workers have; null: those that live")
    resume: list[str] = Field(default=[], max_length=1000, description="definitions that are not paused any more")


class TrackRecord(_Given):
    """What comes of a definition, a priority, a host, or all."""

    name: str
    jobs: float = Field(description="that become due")
    requests: float = Field(description="calls that begin, retries included")
    peak: float = Field(description="the most requests in a minute")
    peak_at: InstantText | None
    backlog: float = Field(description="the most jobs that are due and wait")
    delay_ms: int = Field(description="the longest that a job is due before it goes")
    points: list[tuple[int, float, float, float]] = Field(description="[bin, jobs, requests, backlog at its end], where something is")


class SpanRecord(_Given):
    """From one instant to another."""

    begin: InstantText
    end: InstantText
    open: bool = Field(description="it goes on when the forecast ends")


class LimitUseRecord(_Given):
    """How much of a limit is used."""

    name: str
    limit: str
    share: float = Field(description="the part that is used in the bin in which it is most; more than 1 is a burst")
    at: InstantText | None
    saturated: list[SpanRecord] = Field(description="when it is used up")
    windows: int = Field(description="how many windows it makes wider or later")
    definitions: list[str] = Field(description="those that ask most of it while it is used up")


class BacklogRecord(_Given):
    """Jobs that are due and wait for longer than a bin."""

    of: str = Field(description="total, priority:NAME, host:NAME or definition:ID")
    begin: InstantText
    end: InstantText
    open: bool
    jobs: float
    delay_ms: int
    because: list[str] = Field(description="the limits that they wait for, and workers")


class WideningRecord(_Given):
    """What limits make of a definition's windows; of the widest but for `windows` and `beyond_ms`."""

    definition: str
    windows: int = Field(description="how many become wider or later")
    at: InstantText
    asked_ms: int
    window_ms: int
    delay_ms: int
    jobs: float
    limit: str
    beyond_ms: int = Field(description="how long after the next occurrence is due one ends, at the most")


class SlotsRecord(_Given):
    """The places of workers."""

    there: int | None = Field(description="of the workers that live; null: none does, and it was taken that there are enough")
    needed: int = Field(description="so that nothing waits for a worker")
    needed_at: InstantText | None
    busy: list[tuple[int, float]] = Field(description="[bin, how many are busy in the mean], with as many as are needed")
    short: list[SpanRecord] = Field(description="when there are too few")


class CostRecord(_Given):
    """What is known of a definition's runs."""

    definition: str
    seconds: float = Field(description="that a run takes in the mean")
    attempts: float = Field(description="runs of a job in the mean")
    runs: int = Field(description="by so many")
    source: Literal["measured", "priority", "all", "assumed"]


_TOTAL: dict[str, Any] = {
    "name": "total",
    "jobs": 200_000.0,
    "requests": 200_000.0,
    "peak": 1200.0,
    "peak_at": "2027-01-16T09:00:00.000Z",
    "backlog": 0.0,
    "delay_ms": 0,
    "points": [[540, 1200.0, 1200.0, 0.0]],
}
_FORECAST: dict[str, Any] = {
    "start": "2027-01-16T00:00:00.000Z",
    "end": "2027-01-17T00:00:00.000Z",
    "bin_ms": 60_000,
    "enable": [["daily_user_report", 200_000]],
    "set_limits": [["total", "20/s burst 30"]],
    "total_per_second": 20.0,
    "total": _TOTAL,
    "priorities": [],
    "definitions": [],
    "hosts": [],
    "limits": [],
    "backlogs": [],
    "windows": [],
    "slots": {"there": 6, "needed": 8, "needed_at": "2027-01-16T09:00:00.000Z", "busy": [], "short": []},
    "costs": [],
    "assumptions": [],
    "left_out": [],
    "before": None,
}


class ForecastRecord(_Given):
    """What the next hours bring. A bin is `bin_ms` long; the first begins at `start`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_FORECAST]})

    start: InstantText
    end: InstantText
    bin_ms: int
    enable: list[tuple[str, int]]
    set_limits: list[tuple[str, str]]
    total_per_second: float | None = Field(description="the rate of the limit of all, where there is one")
    total: TrackRecord
    priorities: list[TrackRecord]
    definitions: list[TrackRecord]
    hosts: list[TrackRecord]
    limits: list[LimitUseRecord]
    backlogs: list[BacklogRecord]
    windows: list[WideningRecord]
    slots: SlotsRecord
    costs: list[CostRecord]
    assumptions: list[str] = Field(description="what was not measured or is not known, and what was taken for it")
    left_out: list[str]
    before: ForecastRecord | None = Field(description="the same as things are, where something else was asked for")


@forecasts("GET", "/forecast", ForecastRecord)
def get_forecast(
    call: Reads,
    hours: Annotated[float, Query(gt=0, le=MOST_HOURS, description="how far to look ahead")] = 24,
    points: Points = "some",
) -> Response:
    """Forecast the next hours as things are: jobs, requests, limits, what waits, and worker slots. It changes nothing."""
    return _forecast(call, points, hours=hours)


@forecasts("POST", "/forecast", ForecastRecord, takes=AskedForecast)
def ask_forecast(call: Reads, points: Points = "some") -> Response:
    """Forecast the next hours if something were changed, beside the same as things are. It changes nothing."""
    body = call.read(AskedForecast)
    limits = {}
    for name, one in body.limits.items():
        given = any(value is not None for value in (one.rate, one.burst, one.concurrency))
        if given == bool(one.unlimited):
            raise problem.invalid([("pointer", "/limits", f"{name}: give rate, concurrency or both, or unlimited: true")])
        limits[name] = call.platform.limit_of(name, one.rate, burst=one.burst, concurrency=one.concurrency)
    enable = [More(one.definition, one.users, one.schedule) for one in body.enable]

    def act() -> Response:
        return _forecast(call, points, hours=body.hours, enable=enable, limits=limits, slots=body.slots, resume=body.resume)

    return call.once(act)


def _forecast(
    call: Call,
    points: str,
    *,
    hours: float,
    enable: list[More] | None = None,
    limits: dict[str, Limit] | None = None,
    slots: int | None = None,
    resume: Sequence[str] = (),
) -> Response:
    with ONE_AT_A_TIME:
        found: Forecast = call.platform.forecast(hours=hours, enable=enable or (), limits=limits, slots=slots, resume=resume)
    return call.answer(ForecastRecord.model_validate(found.to_dict(points=points == "all")))
