"""What a task function takes from its job: its day, and parameters as checked, typed values.

Parameters are JSON that users wrote. Every reader returns a value of the type it promises or raises ValueError with the
parameter's path, what it got and what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, TypeVar
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

T = TypeVar("T")

_LARGEST_AMOUNT = Decimal(10) ** 15
_MOST_DECIMAL_PLACES = 12
#: Wide enough for any record, and far enough from the ends of the calendar that no sum of days overflows.
_YEARS = range(1970, 2201)


def due_at(job: RunningJob) -> datetime:
    """The instant that the job was planned for, in UTC. Unlike the clock it is the same in every attempt."""
    return datetime.fromtimestamp(job.execute_after_ms / 1000, UTC)


def due_day(job: RunningJob) -> date:
    """The UTC day that the job was planned for."""
    return due_at(job).date()


class Inputs:
    """Typed access to one JSON object. `path` names it in messages."""

    def __init__(self, values: Mapping[str, object], path: str = "params") -> None:
        self._values = values
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """The keys, in the order given."""
        return list(self._values)

    def text(self, name: str, *, empty: bool = False) -> str:
        """A text; not an empty one, unless `empty` allows it."""
        value, path = self._at(name)
        return "" if empty and value == "" else _text(value, path)

    def texts(self, name: str) -> list[str]:
        """A list of texts, none of them empty."""
        return self._each(name, _text)

    def integer(self, name: str, *, minimum: int, maximum: int = 10**15) -> int:
        """A whole number from `minimum` to `maximum`."""
        return _integer(*self._at(name), minimum=minimum, maximum=maximum)

    def integers(self, name: str, *, minimum: int, maximum: int = 10**15) -> list[int]:
        """A list of whole numbers, each from `minimum` to `maximum`."""
        return self._each(name, lambda value, path: _integer(value, path, minimum=minimum, maximum=maximum))

    def decimal(self, name: str) -> Decimal:
        """An exact number: text such as "19.99", or a whole number. A float is refused, it has been rounded already."""
        return _decimal(*self._at(name))

    def decimals(self, name: str) -> list[Decimal]:
        """A list of exact numbers."""
        return self._each(name, _decimal)

    def day(self, name: str) -> date:
        """A day such as "2026-01-31", from 1970 to 2200."""
        accepted = 'a day from 1970 to 2200, such as "2026-01-31"'
        parsed = self._parsed(name, date.fromisoformat, accepted)
        if parsed.year not in _YEARS:
            raise self.error(name, accepted)
        return parsed

    def time_of_day(self, name: str) -> time:
        """A time of day without a zone, such as "09:00"."""
        parsed = self._parsed(name, time.fromisoformat, 'a time of day such as "09:00"')
        return parsed.replace(tzinfo=None)

    def instant(self, name: str) -> datetime:
        """An instant with its offset from UTC, such as "2026-01-05T16:30:00+01:00", from 1970 to 2200."""
        accepted = 'an instant from 1970 to 2200 with its offset, such as "2026-01-05T16:30:00+01:00"'
        parsed = self._parsed(name, datetime.fromisoformat, accepted)
        if parsed.tzinfo is None or parsed.year not in _YEARS:
            raise self.error(name, accepted)
        return parsed

    def zone(self, name: str) -> ZoneInfo:
        """An IANA time zone such as "Europe/Berlin"."""
        return self._parsed(name, ZoneInfo, 'an IANA time zone such as "Europe/Berlin"')

    def record(self, name: str) -> Inputs:
        """A JSON object."""
        return _record(*self._at(name))

    def records(self, name: str) -> list[Inputs]:
        """A list of JSON objects."""
        return self._each(name, _record)

    def plain(self) -> dict[str, object]:
        """The object itself, unchecked."""
        return dict(self._values)

    def error(self, name: str, accepted: str) -> ValueError:
        """The error to raise when the value of `name` is of the right type and still of no use."""
        return _error(*self._at(name), accepted)

    def _at(self, name: str) -> tuple[object, str]:
        path = f"{self.path}.{name}"
        if name not in self._values:
            raise ValueError(f"{path} is missing")
        return self._values[name], path

    def _each(self, name: str, read: Callable[[object, str], T]) -> list[T]:
        value, path = self._at(name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _error(value, path, "a list")
        return [read(item, f"{path}[{index}]") for index, item in enumerate(value)]

    def _parsed(self, name: str, parse: Callable[[str], T], accepted: str) -> T:
        value, path = self._at(name)
        text = _text(value, path)
        try:
            return parse(text)
        # ZoneInfo raises KeyError for an unknown key and OSError for some that are no file names
        except (ValueError, KeyError, OSError):
            raise _error(value, path, accepted) from None


def _error(value: object, path: str, accepted: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{path} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it takes {accepted}")


def _text(value: object, path: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _error(value, path, "a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no file, hash or mail can hold
        raise _error(value, path, "a text of whole characters") from None
    return value


def _integer(value: object, path: str, *, minimum: int, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise _error(value, path, f"a whole number from {minimum} to {maximum}")
    return value


def _decimal(value: object, path: str) -> Decimal:
    accepted = 'an exact number as text, such as "19.99"'
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise _error(value, path, accepted)
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise _error(value, path, accepted) from None
    if not number.is_finite() or abs(number) >= _LARGEST_AMOUNT or number != round(number, _MOST_DECIMAL_PLACES):
        raise _error(value, path, f"{accepted}, below {_LARGEST_AMOUNT:.0e} and with at most {_MOST_DECIMAL_PLACES} decimal places")
    return number


def _record(value: object, path: str) -> Inputs:
    if not isinstance(value, Mapping):
        raise _error(value, path, "an object")
    return Inputs({str(key): item for key, item in value.items()}, path)
