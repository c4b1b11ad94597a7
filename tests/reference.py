"""docs/api-reference.md, made from the API's OpenAPI document: `python -m tests.reference` (or `make docs`) writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from taskplatform.api.application import openapi_document
from taskplatform.settings import Settings
from tests.conftest import ROOT

PATH = ROOT / "docs/api-reference.md"
#: Answers that every call has; docs/api.md tells when.
_OF_ALL = {"400", "401", "403", "408", "413", "415", "422", "429", "500", "503"}
_HEAD = """\
# The control API: reference

Made from the API's OpenAPI document by `make docs`; do not edit it. [api.md](api.md) says how to start the API, and what holds for all
calls: keys, scopes, pages, `Idempotency-Key`, errors. Instants are ISO 8601, durations such as `90s` or `10m`.
"""


def render(document: dict[str, Any]) -> str:
    """The page."""
    operations: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operations.setdefault(operation["tags"][0], []).append((path, method.upper(), operation))
    parts = [_HEAD]
    for tag, found in operations.items():
        parts.append(f"## {tag.capitalize()}\n")
        parts += ["\n".join(_operation(document, path, method, operation)) for path, method, operation in found]
    parts.append("## Records\n")
    parts += ["\n".join(_schema(name, schema)) for name, schema in sorted(document["components"]["schemas"].items())]
    return "\n".join(parts).rstrip() + "\n"


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method} {path}\n"
    yield operation.get("description", "").strip() + "\n"
    if parameters := [one for one in operation.get("parameters", ()) if one["in"] != "header" or one.get("required")]:
        yield "| parameter | in | type | |"
        yield "|---|---|---|---|"
        for one in parameters:
            needed = " **Needed.**" if one.get("required") and one["in"] != "path" else ""
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {_cell(one.get('description', ''))}{needed} |"
        yield ""
    if body := operation.get("requestBody"):
        (content,) = body["content"].values()
        yield f"Body: {_type(content['schema'])}{'' if body.get('required') else ', or none'}.\n"
        if example := _example(document, content):
            yield f"```json\n{json.dumps(example, ensure_ascii=False)}\n```\n"
    for status, answer in sorted(operation["responses"].items()):
        if status in _OF_ALL and "ProblemRecord" in json.dumps(answer):
            continue
        (content,) = answer.get("content", {"": {}}).values()
        text = "" if answer["description"] == "Successful Response" else f" {_cell(answer['description'])}"
        yield f"Answers **{status}**{': ' + _type(content['schema']) if content.get('schema') else ''}.{text}\n"


def _example(document: dict[str, Any], content: dict[str, Any]) -> Any:
    if "example" in content:
        return content["example"]
    if content.get("examples"):
        return next(iter(content["examples"].values()))["value"]
    name = content["schema"].get("$ref", "").rpartition("/")[2]
    return next(iter(document["components"]["schemas"].get(name, {}).get("examples", ())), None)


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if text := schema.get("description", "").strip():
        yield text + "\n"
    if "enum" in schema:
        yield "One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".\n"
    if properties := schema.get("properties"):
        yield "| field | type | |"
        yield "|---|---|---|"
        required = set(schema.get("required", ()))
        for field, one in properties.items():
            default = "" if field in required or one.get("default") is None else f" Default: `{json.dumps(one['default'])}`."
            yield f"| `{field}`{'' if field in required else ' ?'} | {_type(one)} | {_cell(one.get('description', ''))}{default} |"
        yield ""


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[several]))
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("format") or schema.get("type") or "any")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def current() -> str:
    """What the page must be."""
    return render(openapi_document(Settings()))


if __name__ == "__main__":
    PATH.write_text(current(), encoding="utf-8")
