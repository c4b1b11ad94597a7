"""The values that the platform works with. All are frozen; none does I/O.

What is written by people (definitions, schedules, policies) is a pydantic model, so that it is checked, and described
by a JSON Schema, in one place. What the platform makes itself (jobs, history, occurrences) is a dataclass.

Instants are integers: milliseconds since the Unix epoch, in UTC, in names that end in `_ms` or are documented so.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from taskplatform.errors import InvalidInput
from taskplatform.faults import Place, did_you_mean
from taskplatform.signing import SIGNATURE_HEADERS

DEFINITION_ID = re.compile(r"[a-z][a-z0-9_]{0,63}")
USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
USER_ID_RULE = "1 to 128 characters: letters, digits and . _ @ + -, the first a letter or digit"
DEFINITION_ID_RULE = "1 to 64 characters: lower-case letters, digits and _, the first a letter"


def check_user_id(user: object) -> str:
    """Return `user` if it is a well-formed user id, else raise InvalidInput."""
    if isinstance(user, str) and USER_ID.fullmatch(user):
        return user
    raise InvalidInput(f"user id {user!r} is not accepted: {USER_ID_RULE}", field="user")


def check_definition_id(definition: object) -> str:
    """Return `definition` if it is a well-formed definition id, else raise InvalidInput."""
    if isinstance(definition, str) and DEFINITION_ID.fullmatch(definition):
        return definition
    raise InvalidInput(f"definition id {definition!r} is not accepted: {DEFINITION_ID_RULE}", field="definition")


# --- durations, rates, zones -----------------------------------------------------------------------------------------

_DURATION = re.compile(r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?(?:(?P<ms>\d+)ms)?", re.ASCII)
_DURATION_RULE = 'a duration such as "500ms", "90s", "10m", "2h", "1d" or "1h30m"'
_UNIT_SECONDS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_LONGEST = timedelta(days=366)


def parse_duration(value: object) -> timedelta:
    """Turn `"90s"`, `"10m"`, `"1h30m"`, `"500ms"` or a number of seconds into a timedelta.

    Raises ValueError with what is accepted; a duration is from 0 to 366 days, in whole milliseconds.
    """
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= _LONGEST.total_seconds():
            raise ValueError(f"{value!r} seconds is out of range, from 0 to 366 days are accepted")
        duration = timedelta(seconds=value)
    elif isinstance(value, str) and value.strip() and (match := _DURATION.fullmatch(value.strip())):
        parts = {name: float(text) for name, text in match.groupdict().items() if text}
        # in seconds as a float first: a timedelta does not hold every number of days
        seconds = sum(amount * _UNIT_SECONDS[unit] for unit, amount in parts.items())
        if seconds > 2 * _LONGEST.total_seconds():
            raise ValueError(f"{value!r} is out of range, from 0 to 366 days are accepted")
        duration = timedelta(
            days=parts.get("d", 0),
            hours=parts.get("h", 0),
            minutes=parts.get("m", 0),
            seconds=parts.get("s", 0),
            milliseconds=parts.get("ms", 0),
        )
    else:
        raise ValueError(f"{value!r} is not {_DURATION_RULE}")
    if not timedelta() <= duration <= _LONGEST:
        raise ValueError(f"{value!r} is out of range, from 0 to 366 days are accepted")
    return timedelta(milliseconds=round(duration / timedelta(milliseconds=1)))


def format_duration(duration: timedelta) -> str:
    """The text that `parse_duration` reads back as `duration`, to the millisecond."""
    left = round(duration / timedelta(milliseconds=1))
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        amount, left = divmod(left, size)
        if amount:
            text += f"{amount}{unit}"
    return text or "0s"


def format_ms(span_ms: float) -> str:
    """`format_duration` of milliseconds: for settings, and for reasons that must be exact."""
    return format_duration(timedelta(milliseconds=span_ms))


_SPAN_UNITS = (("day", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000))


def span_text(span_ms: float) -> str:
    """A span of time for people, as exact as its size needs: `450 ms`, `3.2 s`, `12 s`, `2 h 5 min`, `3 days 4 h`.

    It is rounded to milliseconds below a second, to tenths below ten, and else to seconds, of which the two largest units are shown. For
    what is read back, and for settings, there is `format_duration`.
    """
    if round(span_ms) < 1000:
        return f"{round(span_ms)} ms"
    if round(span_ms) < 9_950:
        return f"{span_ms / 1000:.1f} s"
    left, parts = round(span_ms / 1000) * 1000, []
    for name, size in _SPAN_UNITS:
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount:,} {name}{'s' if name == 'day' and amount > 1 else ''}")
    return " ".join(parts[:2])


_DURATION_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+(\.\d+)?s)?(\d+ms)?$", "description": _DURATION_RULE},
        {"type": "number", "minimum": 0, "maximum": int(_LONGEST.total_seconds()), "description": "a number of seconds"},
    ]
}
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    WithJsonSchema(_DURATION_SCHEMA),
]


def _positive(duration: timedelta) -> timedelta:
    if duration <= timedelta():
        raise ValueError("must be longer than 0")
    return duration


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]


@lru_cache(maxsize=1)
def _zone_names() -> frozenset[str]:
    # these two are whatever the machine says
    return frozenset(zoneinfo.available_timezones()) - {"localtime", "Factory"}


def _check_zone(name: str) -> str:
    if name not in _zone_names():
        rule = 'an IANA time zone such as "UTC", "Europe/Berlin" or "America/New_York"'
        raise ValueError(f"{name!r} is not {rule}{did_you_mean(name, _zone_names())}")
    return name


TimeZone = Annotated[str, AfterValidator(_check_zone)]

_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smhd])", re.ASCII)
_HIGHEST_RATE = 1_000_000
_LOWEST_RATE = 1 / _LONGEST.total_seconds()
_PER_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class _ShortForm(_Frozen):
    """A mapping that may also be written as the text of its first field."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return {next(iter(cls.model_fields)): value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        whole = dict(schema)
        schema.clear()
        schema.update(anyOf=[whole["properties"][next(iter(cls.model_fields))], whole])
        return reference


def _refuse(model: BaseModel, faults: Sequence[tuple[Place, str]]) -> None:
    """Raise what a model's fields do wrong together, each at its own place."""
    if faults:
        kinds = [(place, PydanticCustomError("value_error", "{message}", {"message": message})) for place, message in faults]
        details = [InitErrorDetails(type=kind, loc=place, input=None) for place, kind in kinds]
        raise ValidationError.from_exception_data(type(model).__name__, details)


#: A call is made this long after its start was recorded, at the latest: later its place in the rate limits has passed.
START_SLACK_MS = 100
#: So many calls in a row must go well, one at a time, before the breaker of a host closes.
BREAKER_PROBES = 3
#: Each time that a probe fails the breaker stays open twice as long, up to so many times the first pause.
BREAKER_LONGEST_PAUSE = 16
#: A definition whose probe failed leaves the next one to the host's others for so long.
BREAKER_TURN_MS = 1000


class RateLimit(_ShortForm):
    """At most `rate`, with bursts of `burst`: in no span of t seconds more than rate × t + burst."""

    rate: str = Field(
        description='count per second, minute, hour or day: "10/s", "100/m", "5000/h", "20/d"',
        json_schema_extra={"pattern": f"^{_RATE.pattern}$"},
    )
    burst: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="how many may go at once after a quiet time; default 1, from 1/s on 1 more than in 100 ms",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_burst(cls, value: object) -> object:
        given = {"rate": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or "burst" in given or not _RATE.fullmatch(str(given.get("rate")).strip()):
            return value
        per_second = min(_HIGHEST_RATE, _per_second(given["rate"]))
        # what `Limit.tokens_per_start` needs, so that the whole rate can be used
        return {**given, "burst": 1 if per_second < 1 else 1 + math.ceil(per_second * START_SLACK_MS / 1000)}

    @model_validator(mode="after")
    def _check_rate(self) -> RateLimit:
        if not _RATE.fullmatch(self.rate):
            _refuse(self, [(("rate",), f'{self.rate!r} is not a rate such as "10/s", "100/m", "5000/h" or "20/d"')])
        elif not _LOWEST_RATE <= self.per_second <= _HIGHEST_RATE:
            _refuse(self, [(("rate",), f"{self.rate!r} is out of range, from one in 366 days to {_HIGHEST_RATE}/s are accepted")])
        return self

    @property
    def per_second(self) -> float:
        """The rate in jobs per second."""
        return _per_second(self.rate)


def _per_second(rate: str) -> float:
    count, per = rate.strip().split("/")
    return float(count) / _PER_SECONDS[per]


def format_rate(per_second: float) -> str:
    """A rate as `RateLimit` takes it, by the shortest unit that gives a whole number: 0.5 is "30/m"."""
    for unit, seconds in _PER_SECONDS.items():
        count = per_second * seconds
        if count >= 1 and abs(count - round(count)) < 1e-9 * count:
            return f"{round(count)}/{unit}"
    return f"{per_second:g}/s"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a limit allows, as the scripts know it. None: no bound."""

    per_second: float | None = None
    burst: int | None = None
    """How many may go at once after a quiet time; goes with `per_second`."""
    concurrency: int | None = None
    """How many may be released and not ended."""

    @property
    def tokens_per_start(self) -> float:
        """Tokens of the bucket that a start takes: more than 1 where the burst is below 1 + rate × slack.

        Two calls can come closer together than their starts, by the slack. What the burst does not allow for that, the rate has to.
        """
        return 1 + max(0.0, 1 - self._kept)

    @property
    def capacity(self) -> float:
        """Tokens of a full bucket."""
        return max(self.tokens_per_start, self._kept)

    @property
    def sustained(self) -> float | None:
        """Starts per second in the long run; None: no bound."""
        return None if self.per_second is None else self.per_second / self.tokens_per_start

    @property
    def _kept(self) -> float:
        return (self.burst or 1) - (self.per_second or 0) * START_SLACK_MS / 1000


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """When the breaker of a host opens."""

    share: float
    """Of the calls in the window, how many must have failed: above 0, up to 1."""
    calls: int
    """With fewer calls than this in the window it stays closed; 0: it never opens."""
    window: timedelta
    pause: timedelta
    """How long it stays open the first time."""


@dataclass(frozen=True, slots=True)
class CallReport:
    """What a call that ended says of its host."""

    host: str
    """As `HttpConfig.host` gives it. What is said of another than the definition's present one counts for none."""
    failed: bool
    rule: BreakerRule
    pause: timedelta = timedelta()
    """For how long the host asks not to be called."""


class LimitRule(_ShortForm):
    """A limit as people write it: a rate, how many at a time, or both."""

    rate: str | None = Field(default=None, description=RateLimit.model_fields["rate"].description)
    burst: int | None = Field(default=None, ge=1, le=1_000_000, description="how many may go at once after a quiet time; goes with rate")
    concurrency: int | None = Field(default=None, ge=1, le=1_000_000, description="how many may run at a time, over all workers")

    @model_validator(mode="after")
    def _check(self) -> LimitRule:
        if self.rate is None and self.concurrency is None:
            raise ValueError("takes rate, concurrency, or both")
        if self.rate is None and self.burst is not None:
            _refuse(self, [(("burst",), "goes with rate")])
        if self.rate is not None:
            self._rate_limit()
        return self

    def _rate_limit(self) -> RateLimit:
        return RateLimit.model_validate({"rate": self.rate} if self.burst is None else {"rate": self.rate, "burst": self.burst})

    @property
    def limit(self) -> Limit:
        """The same with its defaults filled in."""
        if self.rate is None:
            return Limit(concurrency=self.concurrency)
        rate = self._rate_limit()
        return Limit(rate.per_second, rate.burst, self.concurrency)


_HOST = re.compile(r"(?:[a-z0-9._-]{1,253}|\[[0-9a-f:.]+\])(?::\d{1,5})?", re.ASCII)


def check_host(host: object) -> str:
    """Return `host` if it is written as `HttpConfig.host` gives it, else raise InvalidInput."""
    if isinstance(host, str) and _HOST.fullmatch(host):
        return host
    meant = _host_of(host.strip() if "//" in host else f"//{host.strip()}") if isinstance(host, str) else None
    hint = f' (did you mean "{meant}"?)' if meant and _HOST.fullmatch(meant) else ""
    rule = 'without scheme and path, in lower case, with its port where that is not the scheme\'s own: "api.example.com", "localhost:8000"'
    raise InvalidInput(f"host {host!r} is not accepted{hint}; a host is given {rule}", field="host")


def _host_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host:
        return None
    name = f"[{host}]" if ":" in host else host
    return name if port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f"{name}:{port}"


Host = Annotated[str, AfterValidator(check_host)]

# --- schedules -------------------------------------------------------------------------------------------------------


class IntervalType(StrEnum):
    MINUTELY = "minutely"
    HOURLY = "hourly"
    DAILY = "daily"
    WEEKLY = "weekly"
    MONTHLY = "monthly"


class Weekday(StrEnum):
    """In ISO order: Monday first."""

    MONDAY = "monday"
    TUESDAY = "tuesday"
    WEDNESDAY = "wednesday"
    THURSDAY = "thursday"
    FRIDAY = "friday"
    SATURDAY = "saturday"
    SUNDAY = "sunday"


class AtTime(_Frozen):
    """A wall-clock time of day. Hourly intervals use only the minute, unless they run every 2 or more hours."""

    hour: int = Field(default=0, ge=0, le=23)
    minute: int = Field(default=0, ge=0, le=59)


class Interval(_Frozen):
    """Every `value` minutes, hours, days, weeks or months. What that means exactly is in `taskplatform.schedule`."""

    type: IntervalType
    value: int = Field(default=1, ge=1, le=1000, description="every n of them")
    timezone: TimeZone = "UTC"
    at_time: AtTime = AtTime()
    weekday: Weekday | None = Field(default=None, description="weekly only; default monday")
    day_of_month: int | None = Field(default=None, ge=1, le=31, description="monthly only; default 1; the last day in a shorter month")

    @model_validator(mode="after")
    def _check_fields_fit_type(self) -> Interval:
        faults: list[tuple[Place, str]] = []
        if self.weekday is not None and self.type is not IntervalType.WEEKLY:
            faults.append((("weekday",), f"weekday goes with type weekly, not {self.type.value}"))
        if self.day_of_month is not None and self.type is not IntervalType.MONTHLY:
            faults.append((("day_of_month",), f"day_of_month goes with type monthly, not {self.type.value}"))
        if self.type is IntervalType.MINUTELY and "at_time" in self.model_fields_set:
            faults.append((("at_time",), "at_time does not go with type minutely"))
        _refuse(self, faults)
        return self


class Cron(_ShortForm):
    """Five fields (minute, hour, day of month, month, weekday) on the wall clock of `timezone`."""

    expression: str = Field(description='five fields, such as "*/15 9-17 * * mon-fri"')
    timezone: TimeZone = "UTC"

    @model_validator(mode="after")
    def _check_expression(self) -> Cron:
        if problem := _cron_problem(self.expression):
            _refuse(self, [(("expression",), f"{self.expression!r} {problem}")])
        return self


def _cron_problem(expression: str) -> str:
    if len(expression.split()) != 5:
        return "does not have the five fields minute, hour, day of month, month, weekday"
    try:
        next(CronSim(expression, datetime(2020, 1, 1)))
    except CronSimError as fault:
        return f"is not a cron expression: {fault}"
    except StopIteration:
        return "never comes due"
    return ""


Schedule = Interval | Cron


def schedule_to_json(schedule: Schedule) -> str:
    """Canonical JSON: equal schedules give equal text, so that it can name a group."""
    kind = "interval" if isinstance(schedule, Interval) else "cron"
    return json.dumps({kind: schedule.model_dump(mode="json", exclude_defaults=True)}, sort_keys=True, separators=(",", ":"))


def schedule_from_json(text: str) -> Schedule:
    """The reverse of `schedule_to_json`."""
    content = json.loads(text)
    return Interval.model_validate(content["interval"]) if "interval" in content else Cron.model_validate(content["cron"])


# --- definitions -----------------------------------------------------------------------------------------------------


class Priority(StrEnum):
    """In order: high goes before medium, medium before low. Each is a Celery queue of the same name."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class Backoff(_Frozen):
    """How long to wait before a retry: `base` each time, or `base`, 2 × base, 4 × base … up to `cap`."""

    strategy: Literal["exponential", "fixed"] = "exponential"
    base: PositiveDuration = timedelta(seconds=10)
    cap: PositiveDuration = Field(default=timedelta(minutes=10), description="the longest delay; where not given, never below base")
    jitter: Annotated[
        Literal["full", "half", "none"],
        BeforeValidator(lambda value: ("full" if value else "none") if isinstance(value, bool) else value),
        WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["full", "half", "none"]}]}),
    ] = Field(
        default="full",
        description="a random share of the delay: full or true from nothing to the whole, half from half of it to the whole, none or false",
    )

    @model_validator(mode="after")
    def _check_cap(self) -> Backoff:
        if "cap" in self.model_fields_set and self.cap < self.base:
            _refuse(self, [(("cap",), f"cap is {format_duration(self.cap)}, shorter than base, {format_duration(self.base)}")])
        return self

    def delay(self, attempt: int, *, random_share: float | None = None) -> timedelta:
        """The wait after `attempt` (1 is the first run) failed.

        `random_share` in [0, 1) replaces the random number, for tests. Full jitter spreads best what failed together, but a part of
        the first retries goes out soon; half jitter keeps at least half of the delay.
        """
        longest = self.base
        if self.strategy == "exponential":
            cap = max(self.cap, self.base)
            doubled = 2.0 ** min(max(attempt - 1, 0), 60)
            # cap is divided because base × 2^n can be more than a timedelta holds
            longest = cap if self.base >= cap / doubled else self.base * doubled
        if self.jitter == "none":
            return longest
        share = random.random() if random_share is None else random_share
        return longest * (share if self.jitter == "full" else 0.5 + share / 2)


class CatchUpPolicy(StrEnum):
    """What becomes of the occurrences that fell into an outage of the planner."""

    SKIP = "skip"
    LATEST = "latest"
    ALL = "all"


class CatchUp(_ShortForm):
    """`skip` runs none of the missed occurrences, `latest` the last one, `all` each; none older than `window`."""

    policy: CatchUpPolicy = CatchUpPolicy.LATEST
    window: Duration = timedelta(days=1)


_TEMPLATE = re.compile(r"\{\{\s*(.*?)\s*\}\}")
_ENVIRONMENT = re.compile(r"\$\{([^}]*)\}")
_TEMPLATE_NAME = re.compile(r"user|job_id|params\.[A-Za-z_][A-Za-z0-9_]*")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text in `value`, keys too, and where it is."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key, (*place, str(key)))
            yield from _texts(item, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, (*place, index))


_SECRET_SCHEMA = {"type": "string", "pattern": rf"^\$\{{{_ENVIRONMENT_NAME.pattern}\}}$", "description": '"${NAME}"'}
_SIGN_RULE = '"${NAME}", or a list of up to 5 such: a secret comes only from the environment'


class HttpConfig(_Frozen):
    """An HTTP call. `${NAME}` comes from the environment; `{{user}}`, `{{job_id}}` and `{{params.x}}` from the job."""

    endpoint: str = Field(min_length=1, description="http or https URL, or one that starts with ${NAME}")
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"] = "POST"
    headers: dict[str, str] = Field(default_factory=dict)
    body: Any = Field(default=None, description="text is sent as it is; anything else as JSON")
    sign: Annotated[
        list[str],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        WithJsonSchema({"anyOf": [_SECRET_SCHEMA, {"type": "array", "items": _SECRET_SCHEMA, "maxItems": 5}]}),
    ] = Field(default_factory=list, description=f"secrets of Standard Webhooks that sign each call: {_SIGN_RULE}")
    max_duration: PositiveDuration | None = Field(
        default=None, description="deadline of the whole call; default: the definition's max_duration, else its timeout"
    )

    @model_validator(mode="before")
    @classmethod
    def _upper_method(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("method"), str):
            return {**value, "method": value["method"].upper()}
        return value

    @model_validator(mode="after")
    def _check(self) -> HttpConfig:
        faults: list[tuple[Place, str]] = []
        if problem := _endpoint_problem(self.endpoint):
            faults.append((("endpoint",), problem))
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name):
                faults.append((("headers", name), f"{name!r} is not a header name"))
            if "\n" in value or "\r" in value:
                faults.append((("headers", name), f"the value of {name} contains a line break"))
            if self.sign and name.lower() in SIGNATURE_HEADERS:
                faults.append((("headers", name), f"{name} is set by sign"))
        if len(self.sign) > 5 or not all(re.fullmatch(rf"\$\{{{_ENVIRONMENT_NAME.pattern}\}}", text) for text in self.sign):
            faults.append((("sign",), f"takes {_SIGN_RULE}"))
        for place, text in self._texts():
            for name in _TEMPLATE.findall(text):
                if not _TEMPLATE_NAME.fullmatch(name):
                    faults.append((place, f"{{{{{name}}}}} is not known: {{{{user}}}}, {{{{job_id}}}} and {{{{params.NAME}}}} are"))
            for name in _ENVIRONMENT.findall(text):
                if not _ENVIRONMENT_NAME.fullmatch(name):
                    faults.append((place, f"${{{name}}} is not the name of an environment variable"))
        _refuse(self, faults)
        return self

    @property
    def environment_names(self) -> frozenset[str]:
        """The variables that endpoint, headers, body and sign take from the environment."""
        return frozenset(name for _, text in self._texts() for name in _ENVIRONMENT.findall(text))

    @property
    def secret_names(self) -> list[str]:
        """The variables with the secrets that sign a call."""
        return [text[2:-1] for text in self.sign]

    @cached_property
    def param_names(self) -> frozenset[str]:
        """The job parameters that endpoint, headers and body need."""
        names = (name for _, text in self._texts() for name in _TEMPLATE.findall(text))
        return frozenset(name.removeprefix("params.") for name in names if name.startswith("params."))

    def host(self, environment: Mapping[str, str]) -> str | None:
        """The host that is called, in lower case, with the port where it is not the scheme's own: what a limit of a host goes by.

        None where `environment` does not have what the endpoint needs, or it does not give a URL.
        """
        url = self._url_before_job(environment)
        return None if url is None else _host_of(url)

    def server(self, environment: Mapping[str, str]) -> tuple[str, int] | None:
        """The host as the endpoint writes it, without brackets, and the port. None as for `host`."""
        url = self._url_before_job(environment)
        if url is None or _host_of(url) is None:
            return None
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def _url_before_job(self, environment: Mapping[str, str]) -> str | None:
        if any(name not in environment for name in _ENVIRONMENT.findall(self.endpoint)):
            return None
        return _ENVIRONMENT.sub(lambda found: environment[found.group(1)], self.endpoint).partition("{{")[0]

    def _texts(self) -> Iterator[tuple[Place, str]]:
        return _texts({"endpoint": self.endpoint, "headers": self.headers, "body": self.body, "sign": self.sign})


_HOST_RULE = "the host cannot come from the job, only the path and query can"


def _endpoint_problem(endpoint: str) -> str:
    if endpoint.startswith("${"):
        # without a separator, what the job gives would go on with the host that the variable holds
        before_job, from_job, _ = _ENVIRONMENT.sub("", endpoint).partition("{{")
        return _HOST_RULE if from_job and not re.search("[/?#]", before_job) else ""
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname
        _ = parts.port if "{" not in parts.netloc else None
    except ValueError as fault:
        return f"{endpoint!r} is not an http or https URL: {fault}"
    if parts.scheme not in ("http", "https") or not host:
        return f"{endpoint!r} is not an http or https URL"
    return _HOST_RULE if "{{" in parts.netloc else ""


_CALL = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")


class Definition(_Frozen):
    """One static kind of task, as written in `tasks/*.yaml`."""

    id: str = Field(pattern=f"^{DEFINITION_ID.pattern}$", description=DEFINITION_ID_RULE)
    name: str = Field(min_length=1, max_length=200)
    description: str = ""
    interval: Interval | None = None
    cron: Cron | None = None
    priority: Priority = Priority.MEDIUM
    timeout: PositiveDuration = Field(default=timedelta(minutes=5), description="hard limit of one attempt")
    max_duration: PositiveDuration | None = Field(
        default=None, description="deadline of the work of one attempt, at most timeout; default timeout"
    )
    retries: int = Field(default=3, ge=0, le=100, description="how often a failed attempt is tried again")
    backoff: Backoff = Backoff()
    rate_limit: RateLimit | None = Field(default=None, description='over all workers: "10/s" or {rate: "10/s", burst: 15}')
    concurrency: int | None = Field(
        default=None, ge=1, le=1_000_000, description="how many of its jobs may run at a time, over all workers"
    )
    window: Duration = Field(default=timedelta(seconds=60), description="the users of an occurrence are spread over it")
    catch_up: CatchUp = CatchUp()
    overlap: Literal["allow", "skip"] = Field(
        default="allow", description="skip: no new occurrence while the user's last job is not finished"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="default parameters of its jobs")
    config: HttpConfig | None = None
    call: str | None = Field(default=None, description='"package.module:function", a Python function')

    @model_validator(mode="after")
    def _check(self) -> Definition:
        faults: list[tuple[Place, str]] = []
        if (self.interval is None) == (self.cron is None):
            faults.append(((), "exactly one of interval and cron is needed"))
        if (self.config is None) == (self.call is None):
            faults.append(((), "exactly one of config (an HTTP call) and call (a Python function) is needed"))
        if self.call is not None and not _CALL.fullmatch(self.call):
            faults.append((("call",), f'call {self.call!r} is not of the form "package.module:function"'))
        if self.max_duration is not None and self.max_duration > self.timeout:
            faults.append((("max_duration",), "max_duration is longer than timeout"))
        if self.config is not None and self.config.max_duration is not None and self.config.max_duration > self.timeout:
            faults.append((("config", "max_duration"), "config.max_duration is longer than timeout"))
        if len(json.dumps(self.params, default=str)) > MAX_PARAMS_BYTES:
            faults.append((("params",), f"params is larger than {MAX_PARAMS_BYTES} bytes of JSON"))
        _refuse(self, faults)
        return self

    @property
    def schedule(self) -> Schedule:
        """The schedule that applies to subscribers without an own one."""
        schedule = self.interval or self.cron
        assert schedule is not None
        return schedule

    @property
    def work_limit(self) -> timedelta:
        """Deadline of one attempt's work: the HTTP call or the Python function."""
        own = self.config.max_duration if self.config is not None else None
        return own or self.max_duration or self.timeout

    @cached_property
    def version(self) -> str:
        """Tells this content from any other that the definition had: equal content gives the same text, however it was written."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]

    def missing_params(self, params: Mapping[str, Any]) -> list[str]:
        """Names that the call needs and neither `params` nor the definition's defaults give."""
        needed = self.config.param_names if self.config is not None else frozenset()
        return sorted(needed - params.keys() - self.params.keys())


# --- subscriptions ---------------------------------------------------------------------------------------------------

MAX_PARAMS_BYTES = 16_384


class ScheduleOverride(_Frozen):
    """What a subscription changes of its definition's schedule.

    Either a whole schedule (`interval` or `cron`), or only `timezone` and / or `at_time` of the definition's interval.
    """

    interval: Interval | None = None
    cron: Cron | None = None
    timezone: TimeZone | None = None
    at_time: AtTime | None = None

    @model_validator(mode="after")
    def _check(self) -> ScheduleOverride:
        if self.interval is not None and self.cron is not None:
            raise ValueError("interval and cron exclude each other")
        if (self.interval or self.cron) and (self.timezone or self.at_time):
            raise ValueError("timezone and at_time go inside interval or cron when one is given")
        if not (self.interval or self.cron or self.timezone or self.at_time):
            raise ValueError("is empty; it takes interval, cron, timezone or at_time")
        return self

    def apply(self, schedule: Schedule) -> Schedule:
        """The schedule in effect. Raises ValueError where at_time does not fit."""
        if self.interval or self.cron:
            whole = self.interval or self.cron
            assert whole is not None
            return whole
        changes: dict[str, Any] = {}
        if self.timezone is not None:
            changes["timezone"] = self.timezone
        if self.at_time is not None:
            if isinstance(schedule, Cron):
                raise ValueError("at_time does not go with a cron schedule; give a whole cron or interval")
            changes["at_time"] = self.at_time
        given = schedule.model_dump(exclude_unset=True)
        return type(schedule).model_validate({**given, **changes})


@dataclass(frozen=True, slots=True)
class User:
    """A user of the SaaS whose jobs the platform runs."""

    id: str
    created_ms: int
    paused: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class Subscription:
    """That a user wants a definition's jobs."""

    user: str
    definition: str
    enabled: bool = True
    paused: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    """An own schedule; None means the definition's."""
    since_ms: int = 0
    """Moments after this instant belong to the subscription as it is now."""


def slot(user: str, definition: str) -> float:
    """The user's fixed place in the definition's window, in [0, 1).

    The first 52 bits of BLAKE2b over `user NUL definition`, as a fraction: stable over processes and versions.
    """
    digest = hashlib.blake2b(f"{user}\0{definition}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 12) / 2**52


def moment(occurrence_ms: int, slot_: float, window_ms: int) -> int:
    """`execute_after` of the slot in the occurrence's window. The plan script computes the same in doubles."""
    return occurrence_ms + int(slot_ * window_ms)


def planned_job_id(definition: str, user: str, occurrence_ms: int) -> str:
    """The id of the one job of this occurrence: readable, and the same however often it is planned."""
    return f"{definition}:{user}:{occurrence_ms}"


# --- jobs ------------------------------------------------------------------------------------------------------------


class JobState(StrEnum):
    PENDING = "pending"
    QUEUED = "queued"
    ASSIGNED = "assigned"
    RUNNING = "running"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELED = "canceled"
    REJECTED = "rejected"

    @property
    def terminal(self) -> bool:
        """Whether a job in this state is finished."""
        return self in TERMINAL_STATES


#: How the reason begins of a job that failed because its workers or processes died again and again.
POISON_PILL = "poison pill"

_S = JobState
TERMINAL_STATES = frozenset({_S.COMPLETED, _S.FAILED, _S.TIMED_OUT, _S.CANCELED, _S.REJECTED})

#: From each state (None: the job does not exist yet) the states that may follow. The scripts use this same table.
TRANSITIONS: Mapping[JobState | None, frozenset[JobState]] = {
    None: frozenset({_S.PENDING}),
    _S.PENDING: frozenset({_S.QUEUED, _S.CANCELED, _S.REJECTED}),
    # back to pending or retrying: the message was lost, or given back unstarted
    _S.QUEUED: frozenset({_S.ASSIGNED, _S.PENDING, _S.RETRYING, _S.CANCELED, _S.REJECTED}),
    _S.ASSIGNED: frozenset({_S.RUNNING, _S.PENDING, _S.RETRYING, _S.CANCELED}),
    _S.RUNNING: frozenset({_S.COMPLETED, _S.RETRYING, _S.FAILED, _S.TIMED_OUT, _S.CANCELED}),
    _S.RETRYING: frozenset({_S.QUEUED, _S.CANCELED, _S.REJECTED}),
    _S.COMPLETED: frozenset(),
    # by hand only: Platform.retry
    _S.FAILED: frozenset({_S.PENDING}),
    _S.TIMED_OUT: frozenset({_S.PENDING}),
    _S.CANCELED: frozenset({_S.PENDING}),
    _S.REJECTED: frozenset({_S.PENDING}),
}


@dataclass(frozen=True, slots=True)
class Transition:
    """One line of a job's history. `from_state == to_state` marks a note that changed nothing."""

    at_ms: int
    from_state: JobState | None
    to_state: JobState
    attempt: int
    worker: str
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    """For HTTP: status, duration_ms and the first characters of the answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run for one user. Its Celery task id is its id."""

    id: str
    definition: str
    user: str
    state: JobState
    priority: Priority
    execute_after_ms: int
    created_ms: int
    occurrence_ms: int | None
    """The occurrence that it belongs to; None for a job that was enqueued by hand."""
    attempt: int
    """How many runs have started."""
    failures: int
    """How many runs before the last one failed and count against its retries."""
    delivery: int
    """How often it was released to the broker."""
    params: Mapping[str, Any]
    worker: str
    started_ms: int | None
    finished_ms: int | None
    reason: str
    """Of the last line of its history; of a dead letter why it died, whatever was noted since."""
    source: str
    """What made it: schedule, catch_up, trigger, backfill or api."""
    version: str
    """Of the definition, as its last run had it; empty before the first."""

    @property
    def poison(self) -> bool:
        """Whether it ended as a poison pill: so many workers or processes died with it."""
        return self.state.terminal and self.reason.startswith(POISON_PILL)
