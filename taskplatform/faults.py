"""Faults of outside input in plain words: what was found, what is accepted, and what may have been meant."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

Place = tuple[str | int, ...]
"""Where something is inside a value: the keys and indices that lead to it."""


def explain(
    error: ValidationError, model: type[BaseModel], *, hidden: Collection[Place] = (), most: int | None = None
) -> list[tuple[Place, str]]:
    """For each fault that `error` found in a `model`, or the first `most`: where it is, what was got, and what is accepted.

    Values at the places in `hidden`, and below them, are not quoted.
    """
    faults = []
    for detail in error.errors(include_url=False, include_context=False)[:most]:
        place = detail["loc"]
        # the key of a mapping is at fault, not what it leads to; a field that is not known may have just this name
        if place[-1:] == ("[key]",) and detail["type"] != "extra_forbidden":
            place = place[:-1]
        quoted = not any(place[: len(secret)] == secret for secret in hidden)
        faults.append((place, _explained(detail["type"], detail["msg"], detail["input"], place, model, quoted=quoted)))
    return faults


def did_you_mean(name: object, known: Collection[str]) -> str:
    """` (did you mean "x"?)` for the name that is nearest to `name`, or nothing if none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = get_close_matches(str(name).strip().lower(), by_lower, n=1)
    return f' (did you mean "{by_lower[near[0]]}"?)' if near else ""


def kind_of(value: object) -> str:
    """What `value` is, in words that do not quote it."""
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (type(None), "nothing"),
        (str, "text"),
        (bool, "true or false"),
        ((int, float), "a number"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    ]
    return next((words for kind, words in kinds if isinstance(value, kind)), type(value).__name__)


def _explained(kind: str, message: str, value: object, place: Place, model: type[BaseModel], *, quoted: bool) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = [name for option in _options_at(model, place[:-1]) for name in option.get("properties", ())]
        return f"is not a known field{did_you_mean(place[-1], known)}; known are {', '.join(known)}"
    options = _options_at(model, place)
    accepted = " or ".join(_in_words(option) for option in options if option.get("type") != "null")
    if not accepted:
        return message
    if kind == "missing":
        return f"is missing; it takes {accepted}"
    choices = [str(choice) for option in options for choice in option.get("enum", ())]
    meant = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"got {_shown(value) if quoted else kind_of(value)}; it takes {accepted}{meant}"


@lru_cache(maxsize=16)
def _schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def _options_at(model: type[BaseModel], place: Place) -> list[dict[str, Any]]:
    """The alternatives that the JSON Schema of `model` gives for `place`; none where it says nothing."""
    parts = _schema_of(model).get("$defs", {})
    options = _options(_schema_of(model), parts)
    for step in place:
        below = [option.get("properties", {}).get(step, option.get("additionalProperties")) for option in options]
        options = [option for schema in below if isinstance(schema, dict) for option in _options(schema, parts)]
    return options


def _options(schema: dict[str, Any], parts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _options(parts[schema["$ref"].removeprefix("#/$defs/")], parts)
    if "anyOf" in schema:
        said = {"description": schema["description"]} if "description" in schema else {}
        return [{**said, **option} for alternative in schema["anyOf"] for option in _options(alternative, parts)]
    return [schema]


def _in_words(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema without alternatives accepts."""
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    match schema.get("type"):
        case "integer":
            return f"a whole number{_range_in_words(schema)}"
        case "number":
            return f"a number{_range_in_words(schema)}"
        case "boolean":
            return "true or false"
        case "string":
            detail = schema.get("description") or (f"at most {schema['maxLength']} characters" if "maxLength" in schema else "")
            return f"text ({detail})" if detail else "text"
        case "array":
            return "a list"
        case "object" if "properties" in schema:
            needed = schema.get("required", ())
            return "a mapping with " + ", ".join(f"{name} (needed)" if name in needed else name for name in schema["properties"])
        case "object":
            return f"a mapping ({schema['description']})" if "description" in schema else "a mapping"
    return ""


def _range_in_words(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else ""


def _shown(value: object) -> str:
    if not isinstance(value, str | bool | int | float):
        return kind_of(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
