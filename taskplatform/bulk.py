"""Reads subscriptions from CSV or JSON Lines, and makes them; a bad line stops no other.

A CSV file begins with a line of column names; in JSON Lines each line is an object. The fields are the same:

    user         needed
    definition   needed
    enabled      true or false, default true; in CSV also 1 and 0, yes and no, on and off
    params       a JSON object
    schedule     a JSON object, an own schedule: {"interval": {…}} or {"cron": {…}}
    timezone     an own time zone for the definition's interval, "Europe/Berlin"
    at_time      an own time of day for the definition's interval, "09:30"; in JSON Lines also {"hour": 9, "minute": 30}

An empty cell and `null` are as if the field was not there. A line sets the subscription to just what it says, so that the same
file can be read again, and goes on where an earlier attempt stopped.

Lines count from 1 as in the file; a CSV record of several lines has the number of its first. Empty lines are left out. A line is a
fault when it is not UTF-8, holds a NUL, is longer than MAX_LINE_BYTES, or does not say a subscription. A CSV record whose
quoted field does not end is a fault of its first line, and reading goes on with the next. What is in memory does not grow with
the file.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

from taskplatform.errors import InvalidInput, TaskPlatformError
from taskplatform.faults import did_you_mean, kind_of
from taskplatform.forecast import More
from taskplatform.model import MAX_PARAMS_BYTES, ScheduleOverride
from taskplatform.platform import SubscriptionRequest
from taskplatform.store import SubscribeResult

Format = Literal["csv", "jsonl"]

FIELDS = ("user", "definition", "enabled", "params", "schedule", "timezone", "at_time")
NEEDED = FIELDS[:2]

MAX_LINE_BYTES = 4 * MAX_PARAMS_BYTES
"""Of a line, and of a CSV record of several lines: parameters at their largest, with every quote doubled, and the rest."""
MAX_FAULTS_KEPT = 1000

_BATCH = 2000
#: With more own schedules than this, those of a forecast are not told apart.
_MOST_SCHEDULES = 900
#: Of so many lines it is looked at whether they are in already.
_SAMPLE = 1000


class Subscriber(Protocol):
    """What makes them: `Platform`, or the same far away."""

    def subscribe_each(
        self, requests: Sequence[SubscriptionRequest], *, create_users: bool = False
    ) -> tuple[list[SubscribeResult | TaskPlatformError], int]: ...


@dataclass(frozen=True, slots=True)
class LineFault:
    """What was wrong with a line, and what is accepted."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of a file."""

    created: int
    changed: int
    unchanged: int
    users_created: int
    faulty: int
    """All lines with a fault."""
    faults: tuple[LineFault, ...]
    """The first MAX_FAULTS_KEPT of them."""


def read_subscriptions(stream: BinaryIO, *, format: Format) -> Iterator[tuple[int, SubscriptionRequest | LineFault]]:
    """What each line asks for, with the line's number; it is not checked against definitions and users."""
    return _requests(_Lines(stream), format)


def import_subscriptions(
    platform: Subscriber,
    source: Path | BinaryIO,
    *,
    format: Format,
    create_users: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Make the subscriptions that a file asks for.

    A line for a user that does not exist is a fault, unless `create_users` is set. `progress` is called now and then with the
    number of bytes read so far. Raises OSError, and StoreError; what was read up to then is made.
    """
    report = _Report()
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as stream:
        lines = _Lines(stream)
        requests = _requests(lines, format)
        while batch := list(islice(requests, _BATCH)):
            _import_batch(platform, batch, report, create_users=create_users)
            if progress is not None:
                progress(lines.bytes_read)
    return report.frozen()


def count_subscriptions(
    stream: BinaryIO, *, format: Format, progress: Callable[[int], None] | None = None
) -> tuple[list[More], list[tuple[str, str]]]:
    """How many subscribers a file asks for, by definition and own schedule, for a forecast; and a sample of their (user, definition).

    What is disabled is not counted, and what has a fault is left out, as far as the line alone shows it. With very many own schedules the
    rest counts as on the definition's.
    """
    lines = _Lines(stream)
    counts: Counter[tuple[str, str]] = Counter()
    sample: list[tuple[str, str]] = []
    chance = random.Random(0)
    total = 0
    for _, one in _requests(lines, format):
        if isinstance(one, LineFault) or not one.enabled:
            continue
        own = "" if one.schedule is None else _own_text(one.schedule)
        if own is None:
            continue
        if own and (one.definition, own) not in counts and len(counts) >= _MOST_SCHEDULES:
            own = ""
        counts[one.definition, own] += 1
        total += 1
        if len(sample) < _SAMPLE:
            sample.append((one.user, one.definition))
        elif (place := chance.randrange(total)) < _SAMPLE:
            sample[place] = (one.user, one.definition)
        if progress is not None and total % _BATCH == 0:
            progress(lines.bytes_read)
    return [More(definition, users, json.loads(own) if own else None) for (definition, own), users in counts.items()], sample


def _own_text(schedule: ScheduleOverride | Mapping[str, Any]) -> str | None:
    """The same text for the same own schedule; None for what is none."""
    try:
        text = json.dumps(schedule if isinstance(schedule, Mapping) else schedule.model_dump(mode="json"), sort_keys=True)
        ScheduleOverride.model_validate(json.loads(text))
    except ValueError:
        return None
    return text


def own_schedule(
    schedule: Mapping[str, Any] | None, timezone: str | None, at_time: str | Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The three fields as one override; None where none is given. Raises InvalidInput."""
    if schedule is not None:
        if timezone is not None or at_time is not None:
            raise InvalidInput("schedule excludes timezone and at_time: they go inside its interval or cron")
        return dict(schedule)
    override: dict[str, Any] = {}
    if timezone is not None:
        override["timezone"] = timezone
    if at_time is not None:
        override["at_time"] = _clock_time(at_time) if isinstance(at_time, str) else at_time
    return override or None


# --- importing -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Report:
    results: Counter[SubscribeResult] = field(default_factory=Counter)
    users_created: int = 0
    faulty: int = 0
    faults: list[LineFault] = field(default_factory=list)

    def add_faults(self, faults: Sequence[LineFault]) -> None:
        self.faulty += len(faults)
        self.faults += sorted(faults, key=lambda fault: fault.line)[: MAX_FAULTS_KEPT - len(self.faults)]

    def frozen(self) -> ImportReport:
        return ImportReport(
            created=self.results[SubscribeResult.CREATED],
            changed=self.results[SubscribeResult.CHANGED],
            unchanged=self.results[SubscribeResult.UNCHANGED],
            users_created=self.users_created,
            faulty=self.faulty,
            faults=tuple(self.faults),
        )


def _import_batch(
    platform: Subscriber, batch: Iterable[tuple[int, SubscriptionRequest | LineFault]], report: _Report, *, create_users: bool
) -> None:
    asked: dict[int, SubscriptionRequest] = {}
    faults: list[LineFault] = []
    for number, one in batch:
        if isinstance(one, LineFault):
            faults.append(one)
        else:
            asked[number] = one
    results, created = platform.subscribe_each(list(asked.values()), create_users=create_users)
    report.users_created += created
    for number, result in zip(asked, results, strict=True):
        if isinstance(result, TaskPlatformError):
            faults.append(LineFault(number, str(result)))
        else:
            report.results[result] += 1
    report.add_faults(faults)


# --- lines -----------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int
    text: str
    problem: str = ""
    """Why the text is not the line's."""


class _Lines:
    """The lines of a stream, of which one that is too long is not read into memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._number = 0
        self._back: deque[_Line] = deque()
        self.bytes_read = 0

    def take(self) -> _Line | None:
        """The next line with its end; None at the end of the stream."""
        if self._back:
            return self._back.popleft()
        raw = self._stream.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return None
        self._number += 1
        self.bytes_read += len(raw)
        if len(raw) > MAX_LINE_BYTES:
            self._skip_rest_of(raw)
            return _Line(self._number, "", f"is longer than {MAX_LINE_BYTES:,} bytes")
        if self._number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            return _Line(self._number, raw.decode("utf-8", "replace"), "holds a NUL; UTF-8 text is accepted")
        try:
            return _Line(self._number, raw.decode("utf-8"))
        except UnicodeDecodeError as fault:
            problem = f"is not UTF-8: byte {fault.start + 1} is 0x{raw[fault.start]:02x}"
            return _Line(self._number, raw.decode("utf-8", "replace"), problem)

    def put_back(self, lines: Sequence[_Line]) -> None:
        """Let `take` give these again, in this order."""
        self._back.extendleft(reversed(lines))

    def _skip_rest_of(self, raw: bytes) -> None:
        while raw and not raw.endswith(b"\n"):
            raw = self._stream.readline(MAX_LINE_BYTES)
            self.bytes_read += len(raw)


def _requests(lines: _Lines, format_: Format) -> Iterator[tuple[int, SubscriptionRequest | LineFault]]:
    return _csv_requests(lines) if format_ == "csv" else _json_requests(lines)


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv_requests(lines: _Lines) -> Iterator[tuple[int, SubscriptionRequest | LineFault]]:
    columns: list[str] | None = None
    for number, record in _csv_records(lines):
        try:
            cells = _cells_of(record)
            if columns is None:
                columns = _columns(cells)
                continue
            yield number, _request(_csv_fields(columns, cells))
        except InvalidInput as fault:
            yield number, LineFault(number, str(fault))
            if columns is None:
                return  # without the names, no other line can be read
    if columns is None:
        yield 1, LineFault(1, f"is missing: the first line names the columns, {', '.join(FIELDS)}")


def _csv_records(lines: _Lines) -> Iterator[tuple[int, list[str] | str]]:
    """The cells of each record that is not empty, or what is wrong with it; and where it begins."""
    while (first := lines.take()) is not None:
        record = _csv_record(first, lines)
        if isinstance(record, str) or any(cell.strip() for cell in record):
            yield first.number, record


def _csv_record(first: _Line, lines: _Lines) -> list[str] | str:
    if '"' not in first.text:
        return first.problem or _plain_record(first.text)
    taken = [first]

    def source() -> Iterator[str]:
        size = 0
        line: _Line | None = first
        while line is not None:
            size += len(line.text)
            if size > MAX_LINE_BYTES or (line.problem and not line.text):
                return
            yield line.text
            line = lines.take()
            if line is not None:
                taken.append(line)

    try:
        cells = next(csv.reader(source(), strict=True))
    except csv.Error as fault:
        lines.put_back(taken[1:])
        unended = len(taken) > 1 or str(fault) == "unexpected end of data"
        return "a quoted field does not end, or a quote in it is not doubled" if unended else f"is not CSV: {fault}"
    for line in taken:
        if line.problem:
            return line.problem if line is first else f"line {line.number} of it {line.problem}"
    return cells


def _plain_record(text: str) -> list[str] | str:
    """Without quotes, a record is a line. (Most are, and csv.reader takes five times as long for one.)"""
    text = text.rstrip("\r\n")
    if "\r" in text:
        return "holds a carriage return; lines end with a line feed, with or without a carriage return before it"
    return text.split(",")


def _cells_of(record: list[str] | str) -> list[str]:
    if isinstance(record, str):
        raise InvalidInput(record)
    return [cell.strip() for cell in record]


def _columns(cells: Sequence[str]) -> list[str]:
    columns = [cell.lower() for cell in cells]
    accepted = f"columns are {', '.join(FIELDS)}, separated by commas"
    for name, count in Counter(columns).items():
        if name not in FIELDS:
            raise InvalidInput(f"{name!r} is not a column{did_you_mean(name, FIELDS)}; {accepted}")
        if count > 1:
            raise InvalidInput(f"the column {name} is there {count} times")
    for name in NEEDED:
        if name not in columns:
            raise InvalidInput(f"the column {name} is missing; {accepted}")
    return columns


_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _csv_fields(columns: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    if len(cells) != len(columns):
        raise InvalidInput(f"columns: {len(cells)}; the first line names {len(columns)}")
    fields: dict[str, Any] = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    for name in fields.keys() & {"params", "schedule"}:
        fields[name] = _json_value(fields[name], name)
    if "enabled" in fields:
        fields["enabled"] = _SWITCH.get(fields["enabled"].lower(), fields["enabled"])
    return fields


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _json_requests(lines: _Lines) -> Iterator[tuple[int, SubscriptionRequest | LineFault]]:
    while (line := lines.take()) is not None:
        if not line.problem and (not line.text or line.text.isspace()):
            continue
        try:
            yield line.number, _request(_json_fields(line))
        except InvalidInput as fault:
            yield line.number, LineFault(line.number, str(fault))


def _json_fields(line: _Line) -> dict[str, Any]:
    if line.problem:
        raise InvalidInput(line.problem)
    fields = _json_value(line.text.rstrip(), "")
    if not isinstance(fields, dict):
        raise InvalidInput(f"is {kind_of(fields)}; an object with {', '.join(FIELDS)} is accepted")
    for name in fields:
        if name not in FIELDS:
            raise InvalidInput(f"{name!r} is not a field{did_you_mean(name, FIELDS)}; fields are {', '.join(FIELDS)}")
    return {name: value for name, value in fields.items() if value is not None}


# --- fields ----------------------------------------------------------------------------------------------------------

_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "user": (str, "text"),
    "definition": (str, "text"),
    "enabled": (bool, "true or false"),
    "params": (dict, "a JSON object"),
    "schedule": (dict, "a JSON object"),
    "timezone": (str, "text"),
    "at_time": ((str, dict), 'a time of day such as "09:30"'),
}


def _request(fields: Mapping[str, Any]) -> SubscriptionRequest:
    for name in NEEDED:
        if name not in fields:
            raise InvalidInput(f"{name} is missing")
    for name, value in fields.items():
        accepted_type, accepted = _TYPES[name]
        if not isinstance(value, accepted_type):
            shown = repr(value) if isinstance(value, str | bool | int | float) else kind_of(value)
            raise InvalidInput(f"{name} is {shown}; {accepted} is accepted")
    return SubscriptionRequest(
        user=fields["user"],
        definition=fields["definition"],
        params=fields.get("params"),
        schedule=own_schedule(fields.get("schedule"), fields.get("timezone"), fields.get("at_time")),
        enabled=fields.get("enabled", True),
    )


_CLOCK_TIME = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")


def _clock_time(text: str) -> dict[str, int]:
    match = _CLOCK_TIME.fullmatch(text)
    if match is None:
        raise InvalidInput(f'at_time is {text!r}; a time of day such as "09:30" is accepted')
    return {"hour": int(match[1]), "minute": int(match[2])}


def _json_value(text: str, name: str) -> Any:
    """Strict JSON: no name twice in an object, no NaN."""
    where = f"{name} is" if name else "is"
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as fault:
        raise InvalidInput(f"{where} not JSON: {fault.msg} at character {fault.pos + 1}") from None
    except (ValueError, RecursionError) as fault:
        raise InvalidInput(f"{where} not JSON: {fault}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is given twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
