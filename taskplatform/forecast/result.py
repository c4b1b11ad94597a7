"""What a forecast says. Frozen values, which JSON has too: `Forecast.to_dict`, and `read_forecast` for the reverse.

Instants are milliseconds since the epoch; in JSON they are text, ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple


class Point(NamedTuple):
    """What is in one bin of a track."""

    bin: int
    jobs: float
    """That become due."""
    requests: float
    """Calls that begin, retries included."""
    backlog: float
    """Jobs that are due and wait, at the end of the bin."""


@dataclass(frozen=True, slots=True)
class Track:
    """What comes of a definition, a priority, a host, or all."""

    name: str
    jobs: float
    requests: float
    peak: float
    """The most requests in a minute."""
    peak_at_ms: int | None
    backlog: float
    """The most jobs that are due and wait at the end of a bin."""
    delay_ms: int
    """The longest that a job is due before it goes."""
    points: tuple[Point, ...] = ()
    """The bins in which something is."""


@dataclass(frozen=True, slots=True)
class Span:
    """From one instant to another. `open` where it goes on when the forecast ends."""

    begin_ms: int
    end_ms: int
    open: bool = False


@dataclass(frozen=True, slots=True)
class LimitUse:
    """How much of a limit is used."""

    name: str
    limit: str
    """As people write it, such as "10/s burst 15"."""
    share: float
    """The part that is used in the bin in which it is most; more than 1 is a burst."""
    at_ms: int | None
    """When that is."""
    saturated: tuple[Span, ...]
    """When it is used up, so that windows are wider or jobs wait for it."""
    windows: int
    """How many windows it made wider or later."""
    definitions: tuple[str, ...]
    """Those that ask most of it while it is used up, the first asks most."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Jobs that are due and wait for longer than a bin."""

    of: str
    """definition:ID, priority:NAME, host:NAME, or total."""
    begin_ms: int
    end_ms: int
    open: bool
    """It is still there when the forecast ends."""
    jobs: float
    """The most that wait at once."""
    delay_ms: int
    """The longest that one has been due."""
    because: tuple[str, ...]
    """The limits that they wait for, and "workers"."""


@dataclass(frozen=True, slots=True)
class Widening:
    """What limits make of a definition's windows."""

    definition: str
    windows: int
    """How many become wider or later."""
    at_ms: int
    """The occurrence whose window becomes widest; the rest is of that one."""
    asked_ms: int
    window_ms: int
    delay_ms: int
    jobs: float
    limit: str
    beyond_ms: int
    """How long after the next occurrence is due a window of it ends, at the most."""


@dataclass(frozen=True, slots=True)
class Slots:
    """The places of workers."""

    there: int | None
    """Of the workers that live and take jobs. None: none does, and it was taken that there are enough."""
    needed: int
    """So that nothing waits for a worker."""
    needed_at_ms: int | None
    busy: tuple[tuple[int, float], ...]
    """How many are busy, in the mean of each bin in which some are: with as many as are needed."""
    short: tuple[Span, ...]
    """When there are too few."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What is known of a definition's runs."""

    definition: str
    seconds: float
    attempts: float
    runs: int
    source: str
    """measured, priority, all or assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the hours to come bring."""

    start_ms: int
    end_ms: int
    bin_ms: int
    enable: tuple[tuple[str, int], ...]
    """What was asked: so many more subscribers of a definition."""
    set_limits: tuple[tuple[str, str], ...]
    """What was asked: other limits, as text."""
    total_per_second: float | None
    """The rate of the limit of all, where there is one."""
    total: Track
    priorities: tuple[Track, ...]
    definitions: tuple[Track, ...]
    """With something to do, the one with the most requests first."""
    hosts: tuple[Track, ...]
    limits: tuple[LimitUse, ...]
    """The most used first."""
    backlogs: tuple[Backlog, ...]
    """The total first, then the longest delay."""
    windows: tuple[Widening, ...]
    """The widest first."""
    slots: Slots
    costs: tuple[Cost, ...]
    assumptions: tuple[str, ...]
    """What was not measured or is not known, and what was taken for it, in sentences."""
    left_out: tuple[str, ...]
    """What is not in it, in sentences."""
    before: Forecast | None = None
    """The same as things are, where something else was asked for; without points."""

    @property
    def saturated(self) -> tuple[LimitUse, ...]:
        """The limits that are used up at some time."""
        return tuple(one for one in self.limits if one.saturated)

    def to_dict(self, *, points: bool = True) -> dict[str, Any]:
        """As JSON has it. Without `points` there are none of definitions, which are most of it."""
        found: dict[str, Any] = _plain(asdict(self))
        before = self.before
        found["before"] = None if before is None else before.to_dict(points=points)
        if not points:
            for one in found["definitions"]:
                one["points"] = []
        return found


def read_forecast(found: Mapping[str, Any]) -> Forecast:
    """The reverse of `Forecast.to_dict`. Raises KeyError, TypeError, ValueError for what is none."""
    one = {name: _instant(value) if name in _INSTANTS else value for name, value in _renamed(found).items()}
    return Forecast(
        start_ms=one["start_ms"],
        end_ms=one["end_ms"],
        bin_ms=int(one["bin_ms"]),
        enable=tuple((str(name), int(users)) for name, users in one["enable"]),
        set_limits=tuple((str(name), str(text)) for name, text in one["set_limits"]),
        total_per_second=None if one["total_per_second"] is None else float(one["total_per_second"]),
        total=_track(one["total"]),
        priorities=tuple(map(_track, one["priorities"])),
        definitions=tuple(map(_track, one["definitions"])),
        hosts=tuple(map(_track, one["hosts"])),
        limits=tuple(
            LimitUse(**{**_read(limit), "saturated": _spans(limit["saturated"]), "definitions": tuple(limit["definitions"])})
            for limit in one["limits"]
        ),
        backlogs=tuple(Backlog(**{**_read(backlog), "because": tuple(backlog["because"])}) for backlog in one["backlogs"]),
        windows=tuple(Widening(**_read(widening)) for widening in one["windows"]),
        slots=Slots(
            **{
                **_read(one["slots"]),
                "busy": tuple((int(bin_), float(busy)) for bin_, busy in one["slots"]["busy"]),
                "short": _spans(one["slots"]["short"]),
            }
        ),
        costs=tuple(Cost(**_read(cost)) for cost in one["costs"]),
        assumptions=tuple(map(str, one["assumptions"])),
        left_out=tuple(map(str, one["left_out"])),
        before=None if one["before"] is None else read_forecast(one["before"]),
    )


#: Of the fields whose names end in _ms, those that are instants; the others are spans.
_INSTANTS = ("start_ms", "end_ms", "begin_ms", "at_ms", "peak_at_ms", "needed_at_ms")
_SHORT = {name.removesuffix("_ms"): name for name in _INSTANTS}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            (name.removesuffix("_ms") if name in _INSTANTS else name): _text(one) if name in _INSTANTS else _plain(one)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _text(instant_ms: int | None) -> str | None:
    if instant_ms is None:
        return None
    seconds, milliseconds = divmod(instant_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03}Z"


def _instant(text: str | None) -> Any:
    return None if text is None else round(datetime.fromisoformat(text).timestamp() * 1000)


def _renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {_SHORT.get(name, name): value for name, value in found.items()}


def _read(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _instant(value) if name in _INSTANTS else value for name, value in _renamed(found).items()}


def _track(found: Mapping[str, Any]) -> Track:
    return Track(**{**_read(found), "points": tuple(Point(int(bin_), *map(float, rest)) for bin_, *rest in found["points"])})


def _spans(found: Sequence[Mapping[str, Any]]) -> tuple[Span, ...]:
    return tuple(Span(**_read(one)) for one in found)
