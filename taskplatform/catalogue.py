"""Loads and checks the definitions in `tasks/*.yaml`.

A file is a mapping with `tasks`, a list of definitions, and optionally `defaults`, fields that each of them has unless it
gives its own. Its name is the domain of its definitions. Ids are unique over all files.

**Defaults.** Any field but `id`, `name`, `interval` and `cron`. Mappings merge key by key, to any depth, and the
definition's own value wins, also when it is `null`; anything else replaces. A short form stands for its mapping: under a
default `catch_up: {policy: all, window: 2d}`, `catch_up: latest` keeps the window. A default `config` does not go to a
definition that has a `call`, nor a default `call` to one that has a `config`.

**YAML.** UTF-8, one document, keys are text and given once. Anchors, aliases and `<<` work, within bounds; tags but
`!!str` do not. What YAML 1.1 and 1.2 read differently (`on`, `010`, `12:30`, `1_000`) is refused with both readings; a
day such as 2026-01-31 is text, as in YAML 1.2.

**Faults.** All faults of all files are found in one go, each with file, line, field, what was wrong and what is accepted;
a faulty definition hides nothing in the others, nor does a file. Only YAML that cannot be parsed at all counts as the one
fault of its file. Nothing but CatalogueError leaves this module on account of what is in a file.

**Secrets.** `${NAME}` is left as it stands: a value from the environment is in no definition and no message. Headers, bodies
and params that stand in a file are not quoted either, but for a word or number without quotes that has two readings.

Loading imports and calls nothing; `resolve_calls` does.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from taskplatform.drills import DOMAIN as DRILLS_DOMAIN
from taskplatform.drills import drills
from taskplatform.errors import CatalogueError, Fault, UnknownDefinition
from taskplatform.faults import Place, did_you_mean, explain, kind_of
from taskplatform.model import DEFINITION_ID, Definition, format_duration
from taskplatform.settings import Settings
from taskplatform.signing import signing_key

NOT_IN_DEFAULTS = ("id", "name", "interval", "cron")
"""Fields that each definition has to give itself."""

SHORT_FORMS = {"rate_limit": "rate", "catch_up": "policy"}
"""Fields that may be text, and the key of the mapping that the text stands for."""

MAX_FILE_BYTES = 4_000_000
MAX_VALUES = 100_000
"""Values in one file, each alias counted with all that it stands for."""
MAX_DEPTH = 64

_SUFFIXES = (".yaml", ".yml")
_HIDDEN: tuple[Place, ...] = (("config", "headers"), ("config", "body"), ("config", "sign"), ("params",))


@dataclass(frozen=True, slots=True)
class Entry:
    """A definition and where it stands."""

    definition: Definition
    file: str
    line: int


class Catalogue(Mapping[str, Definition]):
    """The definitions by id, in the order of the files' names and of the lines in them. It does not change."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.definition.id: entry for entry in entries}

    @classmethod
    def of(cls, *definitions: Definition) -> Catalogue:
        """A catalogue of definitions that come from no file."""
        return cls(Entry(definition, "-", 0) for definition in definitions)

    def __getitem__(self, id_: str) -> Definition:
        return self._entries[id_].definition

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Catalogue of {len(self)} definitions>"

    def require(self, id_: str) -> Definition:
        """The definition `id_`. Raises UnknownDefinition, which names the nearest id."""
        return self._entry(id_).definition

    def source(self, id_: str) -> str:
        """Where the definition stands: "tasks/billing.yaml:12". Raises UnknownDefinition."""
        entry = self._entry(id_)
        return f"{entry.file}:{entry.line}"

    def domain(self, id_: str) -> str:
        """The name of the definition's file, without its suffix. Raises UnknownDefinition."""
        return Path(self._entry(id_).file).stem

    def with_(self, more: Iterable[Definition], domain: str) -> Catalogue:
        """This one, and others of a domain that has no file."""
        return Catalogue([*self._entries.values(), *(Entry(one, domain, 0) for one in more)])

    @property
    def domains(self) -> dict[str, list[str]]:
        """The ids of each domain."""
        by_domain: dict[str, list[str]] = {}
        for id_ in self:
            by_domain.setdefault(self.domain(id_), []).append(id_)
        return by_domain

    @property
    def environment_names(self) -> frozenset[str]:
        """The variables that the definitions take from the environment."""
        return frozenset(name for definition in self.values() for name in _environment_names(definition))

    def fault(self, id_: str, field_: str, message: str) -> Fault:
        """A fault of the definition `id_` that came out after loading."""
        entry = self._entry(id_)
        return Fault(entry.file, entry.line, f"{id_}.{field_}" if field_ else id_, message)

    def _entry(self, id_: str) -> Entry:
        try:
            return self._entries[id_]
        except KeyError:
            raise UnknownDefinition(f"there is no definition {id_!r}{did_you_mean(id_, self._entries)}") from None


def load(folder: Path, *, environment: Mapping[str, str] | None = None) -> Catalogue:
    """The definitions of all files in `folder`.

    With an `environment`, a `${NAME}` that it does not have is a fault, and a secret that calls cannot be signed with; without
    one, they are not checked.
    Raises CatalogueError with all faults.
    """
    catalogue, faults = check([folder], environment=environment)
    if faults:
        raise CatalogueError(faults)
    return catalogue


def deployed(chosen: Settings, *, environment: Mapping[str, str] | None = None) -> Catalogue:
    """What a process of the platform has: the definitions of its folder, and unless the settings say otherwise those of `drills`.

    Raises CatalogueError as `load` does, and where a file defines an id of the latter.
    """
    catalogue = load(Path(chosen.tasks_dir), environment=environment)
    if not chosen.verify_definitions:
        return catalogue
    own = drills(chosen.verify_target)
    taken = [catalogue.fault(one.id, "id", "is taken by a definition of `taskplatform verify`") for one in own if one.id in catalogue]
    if taken:
        raise CatalogueError(taken)
    return catalogue.with_(own, DRILLS_DOMAIN)


def check(paths: Sequence[Path], *, environment: Mapping[str, str] | None = None) -> tuple[Catalogue, list[Fault]]:
    """The definitions without fault in files and folders, and the faults, by file and line. Sub-folders are left out."""
    entries: dict[str, Entry] = {}
    first_seen: dict[str, str] = {}
    faults: list[Fault] = []
    needs: list[tuple[_File, int, str, frozenset[str]]] = []
    files = []
    for path in _files(paths, faults):
        file = _File(path)
        files.append(file)
        needs += [(file, *variables) for variables in file.variables]
        for id_, line in file.ids:
            if id_ in first_seen:
                file.add_at(line, f"{id_}.id", f"is defined twice: the first is at {first_seen[id_]}")
            first_seen.setdefault(id_, f"{file.name}:{line}")
        for entry in file.good_entries:
            entries.setdefault(entry.definition.id, entry)
    if environment is not None:
        _check_environment(needs, environment)
        for file in files:
            _check_secrets(file, environment)
    for file in files:
        faults += sorted(file.faults, key=lambda fault: fault.line)
    return Catalogue(entries.values()), faults


def _check_environment(needs: Sequence[tuple[_File, int, str, frozenset[str]]], environment: Mapping[str, str]) -> None:
    """Add a fault for each variable that definitions, even faulty ones, need and `environment` does not have: at the first."""
    for name in sorted(frozenset().union(*(names for *_, names in needs)) - environment.keys()):
        users = [(file, line, label) for file, line, label, names in needs if name in names]
        file, line, label = users[0]
        others = f", and {len(users) - 1} more definitions need it" if len(users) > 1 else ""
        file.add_at(line, f"{label}.config", f"${{{name}}} is not in the environment{others}")


def _check_secrets(file: _File, environment: Mapping[str, str]) -> None:
    """Add a fault for each variable of `environment` that calls cannot be signed with: at the file's first definition that would."""
    seen = set()
    for line, label, name in file.secrets:
        if name in environment and name not in seen:
            seen.add(name)
            try:
                signing_key(environment[name])
            except ValueError as fault:
                file.add_at(line, f"{label}.config.sign", f"${{{name}}} {fault}")


def resolve_calls(catalogue: Catalogue) -> list[Fault]:
    """Import what the definitions `call`; a fault for each that is not a function of one argument, the running job."""
    faults = []
    for id_, definition in catalogue.items():
        if definition.call is not None and (problem := _call_problem(definition.call)):
            faults.append(catalogue.fault(id_, "call", problem))
    return faults


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of a definition file, for editors. It accepts every file that `load` accepts."""
    definition = Definition.model_json_schema(schema_generator=_FileSchema)
    parts = definition.pop("$defs")
    for name in ("Backoff", "CatchUp", "HttpConfig", "RateLimit"):
        for option in parts[name].get("anyOf", [parts[name]]):
            # the file's defaults may give them
            option.pop("required", None)
    method = parts["HttpConfig"]["properties"]["method"]
    any_case = "|".join("".join(f"[{letter}{letter.lower()}]" for letter in name) for name in method["enum"])
    method["anyOf"] = [{"enum": method.pop("enum")}, {"pattern": f"^({any_case})$"}]
    fields = definition["properties"]
    definition["anyOf"] = [{"required": ["interval"]}, {"required": ["cron"]}]
    definition["allOf"] = [_not_both("interval", "cron"), _not_both("config", "call")]
    parts["Definition"] = definition
    parts["Defaults"] = {
        "title": "Defaults",
        "description": "What each definition of the file has unless it gives its own. Mappings merge key by key.",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: schema for name, schema in fields.items() if name not in NOT_IN_DEFAULTS},
        "allOf": [_not_both("config", "call")],
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Task definitions",
        "description": "A file of taskplatform's folder of definitions.",
        "type": "object",
        "additionalProperties": False,
        "required": ["tasks"],
        "properties": {
            "defaults": {"anyOf": [{"$ref": "#/$defs/Defaults"}, {"type": "null"}]},
            "tasks": {"type": "array", "items": {"$ref": "#/$defs/Definition"}},
        },
        "$defs": parts,
    }
    return cast("dict[str, Any]", _with_outer_space(schema))


# --- one file --------------------------------------------------------------------------------------------------------


class _File:
    """What one file holds: its definitions, and its faults so far."""

    def __init__(self, path: Path) -> None:
        self.name = path.as_posix()
        self.faults: list[Fault] = []
        self.ids: list[tuple[str, int]] = []
        self.good_entries: list[Entry] = []
        self.variables: list[tuple[int, str, frozenset[str]]] = []
        self.secrets: list[tuple[int, str, str]] = []
        self._root: Any = None
        try:
            self._root, complaints = _read_yaml(_read_text(path))
        except _UnreadableError as fault:
            self.add_at(fault.line, "", fault.message)
            return
        self._read()
        self._add_complaints(complaints)

    def add_at(self, line: int, field_: str, message: str) -> None:
        self.faults.append(Fault(self.name, line, field_, message))

    def _read(self) -> None:
        root = self._root
        if not isinstance(root, _Map):
            what = "is empty" if root is None else f"is {kind_of(root)}"
            self.add_at(0 if root is None else 1, "", f"{what}; a file is a mapping with tasks, a list of definitions, and defaults")
            return
        for key in (key for key in root if key not in ("tasks", "defaults")):
            hint = did_you_mean(key, ("tasks", "defaults"))
            self._add((key,), f"is not known at the top of a file{hint}; tasks and defaults are")
        tasks = root.get("tasks")
        if "tasks" not in root:
            self.add_at(root.line, "tasks", "is missing; it takes a list of definitions")
        elif not isinstance(tasks, _List):
            self._add(("tasks",), f"got {kind_of(tasks)}; it takes a list of definitions")
        else:
            defaults = self._checked_defaults(root.get("defaults"))
            for index, raw in enumerate(tasks):
                self._read_definition(index, raw, defaults)

    def _checked_defaults(self, defaults: Any) -> _Map:
        """The defaults without what is wrong in them, so that it is said once and not for each definition."""
        if defaults is None:
            return _Map(0)
        if not isinstance(defaults, _Map):
            self._add(("defaults",), f"got {kind_of(defaults)}; it takes a mapping of fields")
            return _Map(0)
        allowed = _Map(defaults.line)
        for key, value in defaults.items():
            if key in NOT_IN_DEFAULTS:
                self._add(("defaults", key), "cannot be a default: each definition gives its own")
            elif value is not None or key not in ("config", "call"):
                allowed.put(key, value, defaults.lines[key])
        probe = _merged(_PROBE, allowed)
        if "call" in allowed and "config" not in allowed:
            del probe["config"]
        _, problems = _checked(probe)
        for place, message in problems:
            self._add(("defaults", *place), message)
        mended = _mended(allowed, [place for place, _ in problems if place])
        return mended if all(place for place, _ in problems) else _with_one_of(mended, "config", "call")

    def _read_definition(self, index: int, raw: Any, defaults: _Map) -> None:
        if not isinstance(raw, _Map):
            self._add(("tasks", index), f"got {kind_of(raw)}; a definition is a mapping with id, name, interval or cron, config or call")
            return
        id_ = _good_id(raw)
        if id_ is not None:
            self.ids.append((id_, raw.line))
        whole = _with_defaults(raw, defaults)
        definition, problems = _checked(whole)
        for place, message in problems:
            self.add_at(_line(whole, place), _field_name(self._root, ("tasks", index, *place)), message)
        if definition is not None:
            label = _field_name(self._root, ("tasks", index))
            self.variables.append((raw.line, label, _environment_names(definition)))
            self.secrets += [(raw.line, label, name) for name in definition.config.secret_names] if definition.config else []
            if not problems:
                self.good_entries.append(Entry(definition, self.name, raw.line))

    def _add(self, place: Place, message: str) -> None:
        self.add_at(_line(self._root, place), _field_name(self._root, place), message)

    def _add_complaints(self, complaints: Iterable[_Complaint]) -> None:
        """Add what the reader found, but for a doubtful value that is wrong in itself: one fault is enough."""
        already = [fault.field for fault in self.faults]
        for complaint in complaints:
            field_ = _field_name(self._root, complaint.place)
            if not (complaint.doubtful and any(f"{known}.".startswith(f"{field_}.") for known in already)):
                self.add_at(complaint.line, field_, complaint.message)
        doubted = {_field_name(self._root, complaint.place[:2]) for complaint in complaints}
        self.good_entries = [entry for entry in self.good_entries if entry.definition.id not in doubted]


def _files(paths: Sequence[Path], faults: list[Fault]) -> Iterator[Path]:
    """The files that `paths` mean, each once."""
    seen = set()
    for path in paths:
        found = _files_in(path, faults) if _is_folder(path) else [path]
        for file in found:
            if file.absolute() not in seen:
                seen.add(file.absolute())
                yield file


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _files_in(folder: Path, faults: list[Fault]) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))
    except OSError as fault:
        faults.append(Fault(folder.as_posix(), 0, "", f"cannot be read: {fault.strerror}"))
        return []
    if not found:
        faults.append(Fault(folder.as_posix(), 0, "", "holds no definition file; their names end in .yaml"))
    return found


def _environment_names(definition: Definition) -> frozenset[str]:
    return definition.config.environment_names if definition.config is not None else frozenset()


def _good_id(raw: Mapping[str, Any]) -> str | None:
    id_ = raw.get("id")
    return id_.strip() if isinstance(id_, str) and DEFINITION_ID.fullmatch(id_.strip()) else None


def _line(root: Any, place: Place) -> int:
    """The line of the innermost part of `place` that is there."""
    line: int = root.line
    for step in place:
        known = step in root if isinstance(root, _Map) else isinstance(root, _List) and isinstance(step, int) and step < len(root)
        if not known:
            break
        root, line = root[step], root.lines[step]
    return line


def _field_name(root: Any, place: Place) -> str:
    """`place` for people: `weekly_report.interval.type`, or `tasks[3].id` where there is no good id."""
    if place[:1] == ("tasks",) and len(place) > 1 and isinstance(root, _Map) and isinstance(root.get("tasks"), _List):
        tasks, index = root["tasks"], place[1]
        if isinstance(index, int) and index < len(tasks) and isinstance(tasks[index], _Map) and (id_ := _good_id(tasks[index])):
            place = (id_, *place[2:])
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w-]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{json.dumps(step[:80], ensure_ascii=False)}]"
    return text


# --- defaults and faults of a definition -----------------------------------------------------------------------------


def _with_defaults(raw: _Map, defaults: _Map) -> _Map:
    applicable = _Map(defaults.line)
    for key, value in defaults.items():
        if not (key == "config" and raw.get("call") is not None) and not (key == "call" and raw.get("config") is not None):
            applicable.put(key, value, defaults.lines[key])
    return _merged(applicable, raw)


def _merged(default: _Map, own: _Map) -> _Map:
    merged = _Map(own.line)
    for key in {**default, **own}:
        if key not in own:
            merged.put(key, default[key], default.lines[key])
            continue
        value = own[key]
        if key in default:
            given, wanted = _long_form(key, default[key], default.lines[key]), _long_form(key, value, own.lines[key])
            value = _merged(given, wanted) if isinstance(given, _Map) and isinstance(wanted, _Map) else value
        merged.put(key, value, own.lines[key])
    return merged


def _long_form(key: str, value: Any, line: int) -> Any:
    if key not in SHORT_FORMS or not isinstance(value, str):
        return value
    whole = _Map(line)
    whole.put(SHORT_FORMS[key], value, line)
    return whole


_STAND_INS: Mapping[Place, Any] = {
    ("id",): "stand_in",
    ("name",): "stand-in",
    ("interval",): {"type": "daily"},
    ("cron",): "0 0 * * *",
    ("timeout",): "366d",
    ("config",): {"endpoint": "http://localhost"},
    ("config", "endpoint"): "http://localhost",
    ("call",): "module:function",
}
"""For a faulty value that cannot just be left out without a fault elsewhere."""

_NEEDED = {("interval", "type"), ("cron", "expression"), ("rate_limit", "rate")}
"""Fields without which the mapping that they are in is faulty too."""


def _checked(raw: _Map) -> tuple[Definition | None, list[tuple[Place, str]]]:
    """Check `raw`, mend what is wrong, and check again: the later checks run only when the earlier ones passed.

    Returns all that was wrong, and the definition that remains: with stand-ins, unless nothing was wrong.
    """
    problems: dict[tuple[Place, str], None] = {}
    for _ in range(6):
        try:
            # as JSON, because only there strict means "no number for text" but still "text for an enum"
            return Definition.model_validate_json(json.dumps(raw), strict=True), list(problems)
        except ValidationError as error:
            found = explain(error, Definition, hidden=_HIDDEN)
        problems.update(dict.fromkeys(found))
        raw = _mended(raw, [place for place, _ in found])
    return None, list(problems)


def _mended(raw: _Map, places: Iterable[Place]) -> _Map:
    """A copy of `raw` in which what is at `places` is left out, or replaced by its stand-in."""
    mended = raw
    parts = dict.fromkeys(_faulty_part(raw, place) for place in places)
    for place in parts:
        if any(place[:length] in parts for length in range(1, len(place))):
            continue  # goes with what it is in
        if place:
            mended = cast("_Map", _replaced(mended, place, _STAND_INS.get(place)))
        else:
            mended = _with_one_of(_with_one_of(mended, "interval", "cron"), "config", "call")
    return mended


def _faulty_part(raw: _Map, place: Place) -> Place:
    """The part of `raw` that has to go when there is a fault at `place`."""
    place = place[:1] if place in _NEEDED else place
    while place and place not in _STAND_INS and not _is_there(raw, place):
        place = place[:-1]
    return place


def _with_one_of(raw: _Map, one: str, other: str) -> _Map:
    first, second = raw.get(one), raw.get(other)
    if (first is None) != (second is None):
        return raw
    return cast("_Map", _replaced(raw, (other,), _STAND_INS[(other,)] if first is None else None))


def _is_there(value: Any, place: Place) -> bool:
    for step in place:
        if not isinstance(value, dict) or step not in value:
            return isinstance(value, list)
        value = value[step]
    return True


def _replaced(value: Any, place: Place, stand_in: Any) -> Any:
    if not place:
        return stand_in
    if not isinstance(value, _Map) or not isinstance(place[0], str):
        return None
    copy = _Map(value.line)
    for key, item in value.items():
        copy.put(key, item, value.lines[key])
    below = _replaced(value.get(place[0]), place[1:], stand_in)
    if below is None:
        copy.pop(place[0], None)
    else:
        copy.put(place[0], below, value.lines.get(place[0], value.line))
    return copy


# --- YAML with lines -------------------------------------------------------------------------------------------------


class _Map(dict[str, Any]):
    """A mapping that knows its line and those of its keys."""

    __slots__ = ("line", "lines")

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}

    def put(self, key: str, value: Any, line: int) -> None:
        self[key] = value
        self.lines[key] = line


class _List(list[Any]):
    """A list that knows its line and those of its items."""

    __slots__ = ("line", "lines")

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


def _literal_map(values: Mapping[str, Any]) -> _Map:
    result = _Map(0)
    for key, value in values.items():
        result.put(key, _literal_map(value) if isinstance(value, dict) else value, 0)
    return result


_PROBE = _literal_map({name: _STAND_INS[(name,)] for name in ("id", "name", "interval", "config")})
"""Makes a whole definition of defaults, so that they can be checked."""


@dataclass(frozen=True, slots=True)
class _Complaint:
    """Something in a document that is YAML but is not accepted."""

    line: int
    place: Place
    message: str
    doubtful: bool = False
    """It may be read as one of two values, and the one that is taken may be wrong for a better reason."""


class _UnreadableError(Exception):
    """The file is not YAML, or is out of bounds."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(slots=True)
class _Open:
    """A mapping or list whose end has not come yet."""

    container: _Map | _List
    anchor: str | None
    size: int = 1
    key: str | None = None
    key_line: int = 0
    merges: list[Any] = field(default_factory=list)
    """What `<<` gives it."""


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise _UnreadableError(0, "is not a file" if path.exists() else "does not exist")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _UnreadableError(0, f"is larger than {MAX_FILE_BYTES:,} bytes")
        content = path.read_bytes()
    except OSError as fault:
        raise _UnreadableError(0, f"cannot be read: {fault.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _UnreadableError(0, "is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise _UnreadableError(line, f"is not UTF-8: byte 0x{content[fault.start]:02x}; save it as UTF-8") from None


def _read_yaml(text: str) -> tuple[Any, list[_Complaint]]:
    """The one document in `text`, None if there is none, and what is not accepted in it. Raises _UnreadableError."""
    document = _Document()
    try:
        for event in yaml.parse(text, Loader=_Loader):
            document.take(event)
    except yaml.MarkedYAMLError as fault:
        raise _syntax_fault(fault, text) from None
    except yaml.reader.ReaderError as fault:
        line = text.encode().count(b"\n", 0, fault.position) + 1
        raise _UnreadableError(line, f"is not YAML: {fault.reason}") from None
    return document.root, document.complaints


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _syntax_fault(fault: yaml.MarkedYAMLError, text: str) -> _UnreadableError:
    mark, start = fault.problem_mark, fault.context_mark
    line = mark.line + 1 if mark else 0
    rows = text.splitlines()
    if mark and mark.line < len(rows) and rows[mark.line][mark.column : mark.column + 1] == "\t":
        return _UnreadableError(line, "a tab where YAML takes only spaces")
    context = f", {fault.context} that begins in line {start.line + 1}" if fault.context and start else ""
    return _UnreadableError(line, f"is not YAML: {fault.problem}{context}")


class _Document:
    """Makes values of parser events, one by one, without recursion: no document can exhaust the stack or the memory."""

    def __init__(self) -> None:
        self.root: Any = None
        self.complaints: list[_Complaint] = []
        self._documents = 0
        self._values = 0
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int] | None] = {}

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._start(event, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._end()
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event.anchor or "", line)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise _UnreadableError(line, "a second document begins here (---); a file holds one")

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        value, problem = event.value, ""
        if event.implicit[0]:
            value, problem = _plain(event.value)
        elif event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            problem = f"the tag {event.tag[:80]} is not accepted"
        if self._awaits_key() and (problem or not isinstance(value, str)):
            problem = f"a key is text, and {event.value[:80] or 'nothing'} without quotes may be something else: write it in quotes"
            self._complain(line, problem, key=event.value)
            value = event.value
        elif problem:
            self._complain(line, problem, doubtful=True)
        self._anchor(event.anchor, value, 1)
        self._count(1, line)
        self._value(value, 1, line)

    def _start(self, event: yaml.CollectionStartEvent, line: int) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise _UnreadableError(line, f"is more than {MAX_DEPTH} levels deep")
        if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._complain(line, f"the tag {event.tag[:80]} is not accepted")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._count(1, line)
        self._open.append(_Open(_Map(line) if isinstance(event, yaml.MappingStartEvent) else _List(line), event.anchor))

    def _end(self) -> None:
        closed = self._open.pop()
        container = cast("_Map", closed.container)
        for source in closed.merges:
            for key, value in source.items():
                if key not in container:
                    container.put(key, value, source.lines[key])
        self._anchor(closed.anchor, closed.container, closed.size)
        self._value(closed.container, closed.size, closed.container.line)

    def _alias(self, name: str, line: int) -> None:
        if name not in self._anchors:
            raise _UnreadableError(line, f"*{name} refers to an anchor that does not come before it")
        known = self._anchors[name]
        if known is None:
            raise _UnreadableError(line, f"*{name} refers to what it is a part of")
        value, size = known
        if self._awaits_key() and not isinstance(value, str):
            self._complain(line, f"a key is text, which *{name} is not", key=f"*{name}")
            value = f"*{name}"
        self._count(size, line)
        self._value(value, size, line)

    def _value(self, value: Any, size: int, line: int) -> None:
        """Put a whole value where it belongs."""
        if not self._open:
            self.root = value
            return
        top = self._open[-1]
        top.size += size
        if isinstance(top.container, _List):
            top.container.append(value)
            top.container.lines.append(line)
        elif top.key is None:
            self._key(top, top.container, value, line)
        elif top.key is _MERGE:
            self._merge(top, value)
        else:
            top.container.put(top.key, value, top.key_line)
            top.key = None

    def _key(self, top: _Open, container: _Map, value: Any, line: int) -> None:
        if isinstance(value, _Map | _List):
            self._complain(line, "a key is text, not a list or a mapping", key="?")
            value = "?"
        if value in container:
            self._complain(line, f"is given twice; the first is in line {container.lines[value]}", key=value)
        top.key, top.key_line = value, line

    def _merge(self, top: _Open, value: Any) -> None:
        sources = value if isinstance(value, _List) else [value]
        if all(isinstance(source, _Map) for source in sources):
            # of several, the first wins
            top.merges += sources
        else:
            self._complain(top.key_line, "<< takes a mapping, or a list of mappings")
        top.key = None

    def _anchor(self, name: str | None, value: Any, size: int) -> None:
        if name is not None:
            self._anchors[name] = (value, size)

    def _count(self, values: int, line: int) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _UnreadableError(line, f"holds more than {MAX_VALUES:,} values, counting what its aliases stand for")

    def _awaits_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].container, _Map) and self._open[-1].key is None

    def _complain(self, line: int, message: str, *, key: str | None = None, doubtful: bool = False) -> None:
        place: list[str | int] = []
        for level in self._open:
            if isinstance(level.container, _List):
                place.append(len(level.container))
            elif level.key is not None:
                place.append(level.key)
        if key is not None:
            place.append(key)
        self.complaints.append(_Complaint(line, tuple(place), message, doubtful))


# --- text without quotes ---------------------------------------------------------------------------------------------


class _MergeKey(str):
    """The key whose value gives its keys to the mapping that it is in. In quotes it is a text like any other."""


_MERGE = _MergeKey("<<")

_LONGEST_NUMBER = 64
_CORE_INTEGER = re.compile(r"[-+]?[0-9]+")
_CORE_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_CORE_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CORE_WORDS: Mapping[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_OLD_RESOLVER: Any = yaml.resolver.Resolver()
_OLD_CONSTRUCTOR: Any = yaml.constructor.SafeConstructor()
_OLD_KINDS = {f"tag:yaml.org,2002:{kind}": getattr(_OLD_CONSTRUCTOR, f"construct_yaml_{kind}") for kind in ("null", "bool", "int", "float")}


@lru_cache(maxsize=8192)
def _plain(text: str) -> tuple[Any, str]:
    """What `text` without quotes is in YAML 1.2, and what is wrong with it: nothing ("") if 1.1 reads it the same way."""
    if text == "<<":
        return _MERGE, ""
    new, old = _core_value(text), _old_value(text)
    if isinstance(new, float) and not math.isfinite(new):
        return text, f"{text} is not a number that JSON has"
    if new == old:
        return new, ""
    return new, f"{text} is {_reading(old)} in YAML 1.1 and {_reading(new)} in YAML 1.2: write {_literal(old)} or {_literal(new)}"


def _core_value(text: str) -> Any:
    """By the core schema of YAML 1.2.2, section 10.3.2."""
    if text in _CORE_WORDS:
        return _CORE_WORDS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _CORE_INTEGER.fullmatch(text):
        return int(text)
    if _CORE_BASED.fullmatch(text):
        return int(text, 0)
    if _CORE_FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return math.inf
    return text


def _old_value(text: str) -> Any:
    """By YAML 1.1, as PyYAML reads it; but a day or a time stamp is text, which is all that JSON can make of it."""
    tag = _OLD_RESOLVER.resolve(yaml.ScalarNode, text, (True, False))
    if len(text) > _LONGEST_NUMBER or tag not in _OLD_KINDS:
        return text
    try:
        return _OLD_KINDS[tag](yaml.ScalarNode(tag, text))
    except ValueError:
        return text


def _reading(value: Any) -> str:
    return f"the text {_literal(value)}" if isinstance(value, str) else _literal(value)


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- the JSON Schema -------------------------------------------------------------------------------------------------


class _FileSchema(GenerateJsonSchema):
    """Writes the defaults as people write them in a file."""

    def encode_default(self, dft: Any) -> Any:
        return format_duration(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


def _not_both(one: str, other: str) -> dict[str, Any]:
    given = {name: {"not": {"type": "null"}} for name in (one, other)}
    return {"not": {"required": [one, other], "properties": given}}


def _with_outer_space(schema: Any) -> Any:
    """`schema` with patterns that allow the white space around a text that loading takes off."""
    if isinstance(schema, list):
        return [_with_outer_space(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _with_outer_space(value) for key, value in schema.items()}
    if isinstance(copy.get("pattern"), str):
        copy["pattern"] = rf"^\s*(?:{copy['pattern'].removeprefix('^').removesuffix('$')})\s*$"
    return copy


# --- functions -------------------------------------------------------------------------------------------------------


def _call_problem(call: str) -> str:
    module_name, _, name = call.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as fault:
        return f"{module_name} cannot be imported: {type(fault).__name__}: {fault}"
    function = getattr(module, name, None)
    if function is None:
        return f"{module_name} has no {name}{did_you_mean(name, vars(module))}"
    if not callable(function):
        return f"{call} is not a function"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return f"{call} is a coroutine or a generator; a plain function is accepted"
    return "" if _takes_a_job(function) else f"{call} is accepted as a function of one argument, the running job, and takes others"


def _takes_a_job(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        # built-in functions may have no signature to look at
        return True
    return True
