"""What a person may ask a forecast, as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from taskplatform.errors import InvalidInput
from taskplatform.faults import explain
from taskplatform.model import Limit, LimitRule, ScheduleOverride

_FORM = "NAME=RATE[:BURST][,concurrency=N], NAME=concurrency=N or NAME=none, such as total=20/s:30"


class More(NamedTuple):
    """More subscribers of a definition; (definition, users) does as well."""

    definition: str
    users: int
    schedule: ScheduleOverride | Mapping[str, Any] | None = None
    """Their own, as a subscription has it."""


def asked_limit(text: str) -> tuple[str, Limit]:
    """A limit's name, and what it is to be. Raises InvalidInput."""
    name, equals, rule = text.partition("=")
    if not (name and equals and rule):
        raise InvalidInput(f"{text!r} is not accepted: {_FORM} is", field="limits")
    if rule == "none":
        return name, Limit()
    given: dict[str, object] = {}
    for part in rule.split(","):
        if part.startswith("concurrency="):
            given["concurrency"] = _number(part.removeprefix("concurrency="), text)
        else:
            rate, colon, burst = part.partition(":")
            given["rate"] = rate
            if colon:
                given["burst"] = _number(burst, text)
    try:
        return name, LimitRule.model_validate(given).limit
    except ValidationError as fault:
        faults = (f"{'.'.join(map(str, place))}: {message}" if place else message for place, message in explain(fault, LimitRule))
        raise InvalidInput(f"{text!r}: {'; '.join(faults)}", field="limits") from None


def _number(text: str, whole: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidInput(f"{whole!r} is not accepted: {_FORM} is", field="limits")
    return int(text)
