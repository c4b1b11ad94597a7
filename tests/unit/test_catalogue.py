"""Definition files: what loads, how defaults merge, and that every fault is told with file, line, field and what is accepted."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from taskplatform import catalogue as module
from taskplatform.catalogue import NOT_IN_DEFAULTS, SHORT_FORMS, Catalogue, Entry, check, json_schema, load, resolve_calls
from taskplatform.errors import CatalogueError, Fault, UnknownDefinition
from taskplatform.model import CatchUp, Definition, Interval, IntervalType, RateLimit, Weekday

SHIPPED = Path(__file__).parents[2] / "tasks"
SECRET = "s3cret-value"
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)

EXAMPLE = """\
tasks:
  - id: weekly_analytics
    name: "Weekly Analytics Report"
    interval: {type: weekly, value: 1, timezone: America/New_York, at_time: {hour: 9, minute: 0}}
    timeout: 30m
    retries: 3
    config: {endpoint: "https://api.example.com/analytics/weekly", method: POST, \
headers: {Authorization: "Bearer ${API_TOKEN}"}, max_duration: 25m}
"""

HEAD = "tasks:\n  - id: a\n    name: A\n"
"""Lines 1 to 3; what a test adds begins in line 4."""

DAILY = "    interval: {type: daily}\n"
HTTP = "    config: {endpoint: http://h/}\n"
REST = DAILY + HTTP


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return folder


def faults(folder: Path, environment: Mapping[str, str] | None = None, **files: str) -> list[Fault]:
    """The faults of `files`, with their names relative to `folder`."""
    with pytest.raises(CatalogueError) as caught:
        load(write(folder, **files), environment=environment)
    return [
        Fault(fault.file.removeprefix(f"{folder.as_posix()}/"), fault.line, fault.field, fault.message) for fault in caught.value.faults
    ]


def one(folder: Path, content: str, id_: str = "a") -> Definition:
    return load(write(folder, file=content))[id_]


# --- what loads ------------------------------------------------------------------------------------------------------


def test_the_example_loads_as_it_stands(tmp_path: Path) -> None:
    definition = one(tmp_path, EXAMPLE, "weekly_analytics")
    assert definition.name == "Weekly Analytics Report"
    assert definition.interval == Interval(type="weekly", timezone="America/New_York", at_time={"hour": 9, "minute": 0})
    assert definition.timeout == timedelta(minutes=30)
    assert definition.retries == 3
    assert definition.config is not None
    assert definition.config.method == "POST"
    assert definition.config.headers == {"Authorization": "Bearer ${API_TOKEN}"}
    assert definition.work_limit == timedelta(minutes=25)


def test_everything_that_a_definition_can_have(tmp_path: Path) -> None:
    definition = one(
        tmp_path,
        """\
tasks:
  - id: a
    name: A
    description: |
      Two
      lines.
    cron: {expression: "0 9 * * mon", timezone: Europe/Berlin}
    priority: high
    timeout: 90
    max_duration: 1m
    retries: 0
    backoff: {strategy: fixed, base: 1.5s, cap: 2s, jitter: false}
    rate_limit: 10/s
    window: 0
    catch_up: all
    overlap: skip
    params: {day: 2026-01-31, deep: {list: [1, 2.5, null, true, text]}}
    call: tasks.module:function
""",
    )
    assert definition.description == "Two\nlines."
    assert definition.timeout == timedelta(seconds=90)
    assert definition.window == timedelta()
    assert definition.rate_limit == RateLimit(rate="10/s")
    assert definition.catch_up == CatchUp(policy="all")
    assert definition.params == {"day": "2026-01-31", "deep": {"list": [1, 2.5, None, True, "text"]}}


def test_order_is_that_of_files_and_lines(tmp_path: Path) -> None:
    def file(*ids: str) -> str:
        return "tasks:\n" + "".join(f"- {{id: {id_}, name: X, cron: '0 9 * * *', call: 'm:f'}}\n" for id_ in ids)

    catalogue = load(write(tmp_path, b=file("b2", "b1"), a=file("z", "y")))
    assert list(catalogue) == ["z", "y", "b2", "b1"]
    assert catalogue.domains == {"a": ["z", "y"], "b": ["b2", "b1"]}
    assert catalogue.domain("y") == "a"
    assert catalogue.source("y") == f"{tmp_path.as_posix()}/a.yaml:3"


def test_what_is_not_a_definition_file_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, good=HEAD + REST)
    (tmp_path / "code.py").write_text("x = 1")
    (tmp_path / ".hidden.yaml").write_text(":")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "below.yaml").write_text(":")
    assert list(load(tmp_path)) == ["a"]


def test_yml_is_a_definition_file_too(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(HEAD + REST)
    assert load(tmp_path).source("a").endswith("/x.yml:2")


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + HEAD + REST,
        (HEAD + REST).replace("\n", "\r\n"),
        "%YAML 1.1\n---\n" + HEAD + REST + "...\n",
        json.dumps({"tasks": [{"id": "a", "name": "A", "cron": "0 9 * * *", "call": "m:f"}]}),
        "tasks:\n  - !!map {id: !!str a, name: A, cron: '0 9 * * *', call: 'm:f'}\n",
        "defaults:\n" + HEAD + REST,
        "defaults: {}\n" + HEAD + REST,
        HEAD + REST + "defaults: {config: null, call: null, rate_limit: null}\n",
    ],
    ids=[
        "byte order mark",
        "carriage returns",
        "directives",
        "JSON",
        "standard tags",
        "null defaults",
        "empty defaults",
        "defaults of null",
    ],
)
def test_forms_that_load(content: str, tmp_path: Path) -> None:
    assert one(tmp_path, content).name == "A"


def test_a_file_may_have_no_definition(tmp_path: Path) -> None:
    assert len(load(write(tmp_path, empty="tasks: []\n"))) == 0


def test_anchors_aliases_and_merge_keys(tmp_path: Path) -> None:
    catalogue = load(
        write(
            tmp_path,
            file="""\
tasks:
  - &first
    id: a
    name: A
    interval: &schedule {type: weekly, weekday: friday}
    config: &http {endpoint: http://h/, method: PUT}
  - <<: *first
    id: b
    priority: low
  - id: c
    name: C
    interval: {<<: [{value: 3}, *schedule, {value: 4}], weekday: monday}
    config: *http
""",
        )
    )
    assert catalogue["b"] == catalogue["a"].model_copy(update={"id": "b", "priority": "low"})
    assert catalogue["c"].interval == Interval(type="weekly", weekday="monday", value=3)
    assert catalogue["c"].config == catalogue["a"].config


def test_a_merge_key_in_quotes_is_text(tmp_path: Path) -> None:
    definition = one(tmp_path, HEAD + REST + '    params: {"<<": {x: 1}}\n')
    assert definition.params == {"<<": {"x": 1}}


# --- defaults --------------------------------------------------------------------------------------------------------

DEFAULTS = """\
defaults:
  priority: low
  timeout: 10m
  rate_limit: {rate: 5/s, burst: 7}
  catch_up: {policy: all, window: 2d}
  backoff: {strategy: fixed, base: 1m}
  params: {region: eu, filter: {open: true, size: 10}, list: [1, 2]}
  config:
    endpoint: http://h/default
    method: PUT
    headers: {Authorization: "Bearer ${TOKEN}", X-A: default}
    body: {a: 1, deep: {b: 2}}
tasks:
  - {id: a, name: A, interval: {type: daily}"""


@pytest.mark.parametrize(
    ("own", "path", "expected"),
    [
        ("", "priority", "low"),
        ("priority: high", "priority", "high"),
        ("", "timeout", timedelta(minutes=10)),
        ("", "config.endpoint", "http://h/default"),
        ("config: {endpoint: http://h/own}", "config.endpoint", "http://h/own"),
        ("config: {endpoint: http://h/own}", "config.method", "PUT"),
        ("config: {headers: {X-A: own, X-B: own}}", "config.headers", {"Authorization": "Bearer ${TOKEN}", "X-A": "own", "X-B": "own"}),
        ("config: {body: {deep: {c: 3}}}", "config.body", {"a": 1, "deep": {"b": 2, "c": 3}}),
        ("config: {body: text}", "config.body", "text"),
        ("config: {body: null}", "config.body", None),
        ("params: {filter: {size: 5}}", "params", {"region": "eu", "filter": {"open": True, "size": 5}, "list": [1, 2]}),
        ("params: {list: [3]}", "params.list", [3]),
        # a short form stands for its mapping
        ("catch_up: latest", "catch_up", CatchUp(policy="latest", window="2d")),
        ("rate_limit: 9/s", "rate_limit", RateLimit(rate="9/s", burst=7)),
        ("rate_limit: {burst: 1}", "rate_limit", RateLimit(rate="5/s", burst=1)),
        ("rate_limit: null", "rate_limit", None),
        ("backoff: {base: 2m}", "backoff.strategy", "fixed"),
        # neither of config and call goes to a definition that has the other
        ("call: 'm:f'", "config", None),
        ("call: null", "config.method", "PUT"),
    ],
)
def test_defaults_merge_key_by_key_and_the_own_value_wins(own: str, path: str, expected: object, tmp_path: Path) -> None:
    value: Any = one(tmp_path, f"{DEFAULTS}, {own}}}\n" if own else f"{DEFAULTS}}}\n")
    for step in path.split("."):
        value = value[step] if isinstance(value, dict) else getattr(value, step)
    assert value == expected


def test_a_short_form_as_default(tmp_path: Path) -> None:
    definition = one(tmp_path, "defaults: {catch_up: all, rate_limit: 5/s}\n" + HEAD + REST + "    catch_up: {window: 3d}\n")
    assert definition.catch_up == CatchUp(policy="all", window="3d")
    assert definition.rate_limit == RateLimit(rate="5/s")


def test_a_default_call_does_not_go_to_a_definition_with_a_config(tmp_path: Path) -> None:
    catalogue = load(
        write(tmp_path, file="defaults: {call: 'm:f'}\n" + HEAD + REST + "  - {id: b, name: B, interval: {type: daily}}\n"),
    )
    assert (catalogue["a"].call, catalogue["b"].call) == (None, "m:f")


def test_defaults_of_one_definition_do_not_reach_another(tmp_path: Path) -> None:
    content = f"{DEFAULTS}, params: {{region: us}}}}\n  - {{id: b, name: B, interval: {{type: daily}}}}\n"
    catalogue = load(write(tmp_path, file=content))
    assert catalogue["b"].params["region"] == "eu"


@pytest.mark.parametrize(
    ("defaults", "line", "field", "message"),
    [
        ("  prio: low\n", 2, "defaults.prio", 'is not a known field (did you mean "priority"?)'),
        ("  id: x\n", 2, "defaults.id", "cannot be a default"),
        ("  interval: {type: daily}\n", 2, "defaults.interval", "cannot be a default"),
        ("  timeout: soon\n", 2, "defaults.timeout", "is not a duration"),
        ("  config:\n    endpoint: ftp://h\n", 3, "defaults.config.endpoint", "is not an http or https URL"),
        ("  config:\n    headers:\n      A: 1\n", 4, "defaults.config.headers.A", "it takes text"),
        ("  rate_limit: fast\n", 2, "defaults.rate_limit.rate", "is not a rate"),
        ("  max_duration: 6m\n", 2, "defaults.max_duration", "longer than timeout"),
        ("  config: {endpoint: http://h/}\n  call: m:f\n", 1, "defaults", "exactly one of config"),
        ("  retries: 010\n", 2, "defaults.retries", "010 is 8 in YAML 1.1 and 10 in YAML 1.2"),
    ],
)
def test_a_fault_in_the_defaults_is_told_once(defaults: str, line: int, field: str, message: str, tmp_path: Path) -> None:
    content = f"defaults:\n{defaults}{HEAD}{REST}  - {{id: b, name: B, interval: {{type: daily}}, config: {{endpoint: http://h/}}}}\n"
    [fault] = faults(tmp_path, file=content)
    assert (fault.line, fault.field) == (line, field)
    assert message in fault.message


def test_several_faults_in_the_defaults_bring_none_of_their_own(tmp_path: Path) -> None:
    content = "defaults:\n  timeout: x\n  rate_limit: {burst: 0}\n  config: {endpoint: 5, headers: {'b c': '{{y}}', X: ok}}\n"
    fields_ = [fault.field for fault in faults(tmp_path, file=f"{content}{HEAD}{DAILY}    max_duration: 20m\n")]
    headers = 'defaults.config.headers["b c"]'
    assert fields_ == [
        "defaults.timeout",
        "defaults.rate_limit.rate",
        "defaults.rate_limit.burst",
        "defaults.config.endpoint",
        headers,
        headers,
    ]


def test_defaults_that_are_no_mapping(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, file="defaults: [x]\n" + HEAD + REST)
    assert str(fault) == "file.yaml:1: defaults: got a list; it takes a mapping of fields"


def test_a_default_that_does_not_fit_a_definition_is_told_for_it(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, file="defaults:\n  max_duration: 4m\n" + HEAD + REST + "    timeout: 1m\n")
    assert (fault.line, fault.field, fault.message) == (2, "a.max_duration", "max_duration is longer than timeout")


def test_short_forms_are_those_of_the_model() -> None:
    models: dict[str, type[BaseModel]] = {"rate_limit": RateLimit, "catch_up": CatchUp}
    assert {name: next(iter(model.model_fields)) for name, model in models.items()} == SHORT_FORMS


# --- faults of definitions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "line", "field", "message"),
    [
        (DAILY + HTTP + "    priorty: high\n", 6, "a.priorty", 'is not a known field (did you mean "priority"?); known are id, name,'),
        (DAILY + HTTP + "    priority: urgent\n", 6, "a.priority", 'got "urgent"; it takes one of high, medium, low'),
        (DAILY + HTTP + "    priority:\n", 6, "a.priority", "got nothing; it takes one of high, medium, low"),
        (DAILY + HTTP + "    retries: many\n", 6, "a.retries", 'got "many"; it takes a whole number from 0 to 100'),
        (DAILY + HTTP + '    retries: "3"\n', 6, "a.retries", 'got "3"; it takes a whole number from 0 to 100'),
        (DAILY + HTTP + "    retries: 2.5\n", 6, "a.retries", "got 2.5; it takes a whole number from 0 to 100"),
        (DAILY + HTTP + "    retries: true\n", 6, "a.retries", "got true; it takes a whole number from 0 to 100"),
        (DAILY + HTTP + "    retries: 101\n", 6, "a.retries", "got 101; it takes a whole number from 0 to 100"),
        (DAILY + HTTP + "    retries: 99999999999999999999\n", 6, "a.retries", "it takes a whole number from 0 to 100"),
        (DAILY + HTTP + "    timeout: 12:30\n", 6, "a.timeout", "'12:30' is not a duration such as"),
        (DAILY + HTTP + "    timeout:\n      12:30\n", 6, "a.timeout", "'12:30' is not a duration such as"),
        (DAILY + HTTP + "    overlap: yes\n", 6, "a.overlap", 'got "yes"; it takes one of allow, skip'),
        (
            DAILY + HTTP + "    backoff: {jitter: on}\n",
            6,
            "a.backoff.jitter",
            'got "on"; it takes true or false or one of full, half, none',
        ),
        (DAILY + HTTP + "    backoff:\n      base: 1h\n      cap: 1m\n", 8, "a.backoff.cap", "cap is 1m, shorter than base, 1h"),
        (DAILY + HTTP + "    catch_up: lates\n", 6, "a.catch_up.policy", '(did you mean "latest"?)'),
        (DAILY + HTTP + "    rate_limit: 5\n", 6, "a.rate_limit", "or a mapping with rate (needed), burst"),
        (DAILY + HTTP + "    rate_limit: 010\n", 6, "a.rate_limit", "or a mapping with rate (needed), burst"),
        (DAILY + HTTP + "    params: text\n", 6, "a.params", "got text; it takes a mapping"),
        (DAILY, 2, "a", "exactly one of config (an HTTP call) and call (a Python function) is needed"),
        (HTTP, 2, "a", "exactly one of interval and cron is needed"),
        (DAILY + HTTP + '    cron: "0 9 * * *"\n', 2, "a", "exactly one of interval and cron is needed"),
        (DAILY + "    config: {method: GET}\n", 5, "a.config.endpoint", "is missing; it takes text (http or https URL"),
        (DAILY + "    config:\n      endpoint: h/x\n", 6, "a.config.endpoint", "'h/x' is not an http or https URL"),
        (DAILY + "    config:\n      endpoint: http://h/{{usr}}\n", 6, "a.config.endpoint", "{{usr}} is not known: {{user}}, {{job_id}}"),
        (DAILY + "    config: {endpoint: http://h/, method: git}\n", 5, "a.config.method", '(did you mean "GET"?)'),
        (
            DAILY + "    config:\n      endpoint: http://h/\n      headers:\n        X: 5\n",
            8,
            "a.config.headers.X",
            "got a number; it takes text",
        ),
        (
            DAILY + "    config:\n      endpoint: http://h/\n      headers:\n        b c: x\n",
            8,
            'a.config.headers["b c"]',
            "'b c' is not a header name",
        ),
        (
            DAILY + "    config:\n      endpoint: http://h/\n      body:\n        - ok\n        - {x: '{{y}}'}\n",
            9,
            "a.config.body[1].x",
            "{{y}} is not known",
        ),
        (DAILY + "    call: tasks.module\n", 5, "a.call", 'is not of the form "package.module:function"'),
        ("    interval: {value: 2}\n" + HTTP, 4, "a.interval.type", "is missing; it takes one of minutely, hourly, daily, weekly, monthly"),
        ("    interval:\n      type: weekley\n" + HTTP, 5, "a.interval.type", '(did you mean "weekly"?)'),
        ("    interval:\n      type: weekly\n      weekday: Monday\n" + HTTP, 6, "a.interval.weekday", '(did you mean "monday"?)'),
        ("    interval:\n      type: daily\n      weekday: monday\n" + HTTP, 6, "a.interval.weekday", "goes with type weekly, not daily"),
        ("    interval:\n      type: daily\n      at_time: 9:30\n" + HTTP, 6, "a.interval.at_time", "it takes a mapping with hour, minute"),
        (
            "    interval:\n      type: daily\n      at_time:\n        hour: 24\n" + HTTP,
            7,
            "a.interval.at_time.hour",
            "got 24; it takes a whole number from 0 to 23",
        ),
        ("    interval: {type: daily, timezone: europe/berlin}\n" + HTTP, 4, "a.interval.timezone", '(did you mean "Europe/Berlin"?)'),
        ('    cron: "61 * * * *"\n' + HTTP, 4, "a.cron.expression", "is not a cron expression"),
        ("    cron:\n      expression: 0 9 * *\n" + HTTP, 5, "a.cron.expression", "does not have the five fields"),
        ("    interval: daily\n" + HTTP, 4, "a.interval", "it takes a mapping with type (needed), value, timezone"),
    ],
)
def test_a_fault_is_told_with_its_line_field_and_what_is_accepted(rest: str, line: int, field: str, message: str, tmp_path: Path) -> None:
    [fault] = faults(tmp_path, file=HEAD + rest)
    assert (fault.file, fault.line, fault.field) == ("file.yaml", line, field)
    assert message in fault.message


@pytest.mark.parametrize(
    ("definition", "field", "message"),
    [
        ("5", "tasks[1]", "got a number; a definition is a mapping with id, name, interval or cron, config or call"),
        ("[]", "tasks[1]", "got a list; a definition is a mapping"),
        ("", "tasks[1]", "got nothing; a definition is a mapping"),
        ("{name: X, cron: '0 9 * * *', call: 'm:f'}", "tasks[1].id", "is missing; it takes text (1 to 64 characters"),
        ("{id: Bad, name: X, cron: '0 9 * * *', call: 'm:f'}", "tasks[1].id", 'got "Bad"; it takes text (1 to 64 characters'),
        ("{id: 7, name: X, cron: '0 9 * * *', call: 'm:f'}", "tasks[1].id", "got 7; it takes text (1 to 64 characters"),
        ("{id: b, cron: '0 9 * * *', call: 'm:f'}", "b.name", "is missing; it takes text"),
    ],
)
def test_a_definition_without_a_good_id_is_named_by_its_number(definition: str, field: str, message: str, tmp_path: Path) -> None:
    [fault] = faults(tmp_path, file=f"{HEAD}{REST}  - {definition}\n")
    assert (fault.line, fault.field) == (6, field)
    assert message in fault.message


def test_all_faults_of_a_definition_are_told_at_once(tmp_path: Path) -> None:
    """Also those that the model looks for only in what is otherwise well-formed."""
    content = """\
tasks:
  - id: a
    nme: A
    interval: {type: weekly, value: 0, day_of_month: 3}
    cron: "x"
    timeout: 1m
    max_duration: 2m
    rate_limit: {burst: 0}
    config:
      endpoint: ftp://h
      method: GIT
      headers: {X: 1, "b c": "{{y}}", Z: "${TOKEN}"}
      max_duration: 3m
"""
    assert [(fault.line, fault.field) for fault in faults(tmp_path, {}, file=content)] == [
        (2, "a.name"),
        (2, "a"),
        (2, "a.config"),
        (3, "a.nme"),
        (4, "a.interval.value"),
        (4, "a.interval.day_of_month"),
        (5, "a.cron.expression"),
        (7, "a.max_duration"),
        (8, "a.rate_limit.rate"),
        (8, "a.rate_limit.burst"),
        (10, "a.config.endpoint"),
        (11, "a.config.method"),
        (12, "a.config.headers.X"),
        (12, 'a.config.headers["b c"]'),
        (12, 'a.config.headers["b c"]'),
        (13, "a.config.max_duration"),
    ]


def test_what_was_mended_to_look_further_brings_no_fault_of_its_own(tmp_path: Path) -> None:
    content = HEAD + "    interval: 5\n    timeout: x\n    max_duration: 2h\n    config: 7\n"
    assert [fault.field for fault in faults(tmp_path, file=content)] == ["a.interval", "a.timeout", "a.config"]


def test_a_bad_file_or_definition_hides_nothing_in_the_others(tmp_path: Path) -> None:
    bad = HEAD + REST + "    retries: x\n  - {id: b, name: B}\n"
    found = faults(tmp_path, one="tasks: [", two=bad, three="", four=EXAMPLE)
    assert [(fault.file, fault.field) for fault in found] == [
        ("one.yaml", ""),
        ("three.yaml", ""),
        ("two.yaml", "a.retries"),
        ("two.yaml", "b"),
        ("two.yaml", "b"),
    ]
    catalogue, _ = check([tmp_path])
    assert list(catalogue) == ["weekly_analytics"]


def test_check_gives_the_good_definitions_of_a_file_with_a_bad_one(tmp_path: Path) -> None:
    content = HEAD + REST + "  - {id: b, name: B}\n  - {id: c, name: C, cron: '0 9 * * *', call: 'm:f', retries: 010}\n"
    catalogue, found = check([write(tmp_path, file=content)])
    assert list(catalogue) == ["a"]
    assert {fault.field for fault in found} == {"b", "c.retries"}


def test_an_id_that_is_defined_twice_is_told_with_both_places(tmp_path: Path) -> None:
    found = faults(tmp_path, one=HEAD + REST + "  - {id: a, name: A, cron: '0 9 * * *', call: 'm:f'}\n", two=HEAD + REST)
    first = f"{tmp_path.as_posix()}/one.yaml:2"
    assert [(fault.file, fault.line, fault.field, fault.message) for fault in found] == [
        ("one.yaml", 6, "a.id", f"is defined twice: the first is at {first}"),
        ("two.yaml", 2, "a.id", f"is defined twice: the first is at {first}"),
    ]


def test_an_id_that_is_defined_twice_is_told_even_if_both_are_faulty(tmp_path: Path) -> None:
    found = faults(tmp_path, one=HEAD, two=HEAD + REST)
    assert ("two.yaml", "a.id") in [(fault.file, fault.field) for fault in found]


# --- faults of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "field", "message"),
    [
        ("", 0, "", "is empty; a file is a mapping with tasks, a list of definitions, and defaults"),
        ("# nothing\n", 0, "", "is empty"),
        ("---\n", 0, "", "is empty"),
        ("- id: a\n", 1, "", "is a list; a file is a mapping with tasks"),
        ("text\n", 1, "", "is text; a file is a mapping with tasks"),
        ("tasks:\n", 1, "tasks", "got nothing; it takes a list of definitions"),
        ("\ntasks: {}\n", 2, "tasks", "got a mapping; it takes a list of definitions"),
        ("defaults: {}\n", 1, "tasks", "is missing; it takes a list of definitions"),
        ("tasks: []\ntsks: []\n", 2, "tsks", 'is not known at the top of a file (did you mean "tasks"?); tasks and defaults are'),
        ("tasks: []\ntasks: []\n", 2, "tasks", "is given twice; the first is in line 1"),
        (HEAD + DAILY + HTTP + "    name: B\n", 6, "a.name", "is given twice; the first is in line 3"),
        (HEAD + DAILY + "    config: {endpoint: http://h/,\n     endpoint: http://h/}\n", 6, "a.config.endpoint", "is given twice"),
        (HEAD + REST + "    params: {1: x}\n", 6, "a.params.1", "a key is text, and 1 without quotes may be something else"),
        (HEAD + REST + "    params: {on: x}\n", 6, "a.params.on", "a key is text, and on without quotes may be something else"),
        (HEAD + REST + "    params: {null: x}\n", 6, "a.params.null", "a key is text"),
        (HEAD + REST + "    params: {? : x}\n", 6, 'a.params[""]', "a key is text, and nothing without quotes"),
        (HEAD + REST + "    params: {? [k] : x}\n", 6, 'a.params["?"]', "a key is text, not a list or a mapping"),
        (HEAD + REST + "    params: {a: &x [1], *x : 2}\n", 6, 'a.params["*x"]', "a key is text, which *x is not"),
        (HEAD + REST + "    params: {<<: 5}\n", 6, 'a.params["<<"]', "<< takes a mapping, or a list of mappings"),
        (
            HEAD + REST + "    params: {x: on}\n",
            6,
            "a.params.x",
            'on is true in YAML 1.1 and the text "on" in YAML 1.2: write true or "on"',
        ),
        (
            HEAD + REST + "    params: {x: No}\n",
            6,
            "a.params.x",
            'No is false in YAML 1.1 and the text "No" in YAML 1.2: write false or "No"',
        ),
        (HEAD + REST + "    params: {x: 12:30}\n", 6, "a.params.x", '12:30 is 750 in YAML 1.1 and the text "12:30" in YAML 1.2'),
        (HEAD + REST + "    params: {x: 1:30.5}\n", 6, "a.params.x", '1:30.5 is 90.5 in YAML 1.1 and the text "1:30.5" in YAML 1.2'),
        (HEAD + REST + "    params: {x: 1_000}\n", 6, "a.params.x", '1_000 is 1000 in YAML 1.1 and the text "1_000" in YAML 1.2'),
        (HEAD + REST + "    params: {x: 0b11}\n", 6, "a.params.x", '0b11 is 3 in YAML 1.1 and the text "0b11" in YAML 1.2'),
        (HEAD + REST + "    params: {x: 0o17}\n", 6, "a.params.x", '0o17 is the text "0o17" in YAML 1.1 and 15 in YAML 1.2'),
        (HEAD + REST + "    params: {x: 09}\n", 6, "a.params.x", '09 is the text "09" in YAML 1.1 and 9 in YAML 1.2'),
        (HEAD + REST + "    params: {x: 1e3}\n", 6, "a.params.x", '1e3 is the text "1e3" in YAML 1.1 and 1000.0 in YAML 1.2'),
        (HEAD + REST + "    params: {x: .nan}\n", 6, "a.params.x", ".nan is not a number that JSON has"),
        (HEAD + REST + "    params: {x: -.inf}\n", 6, "a.params.x", "-.inf is not a number that JSON has"),
        (HEAD + REST + "    params: {x: 1.0e+999}\n", 6, "a.params.x", "1.0e+999 is not a number that JSON has"),
        (HEAD + REST + "    retries: 010\n", 6, "a.retries", "010 is 8 in YAML 1.1 and 10 in YAML 1.2: write 8 or 10"),
        (
            HEAD + REST + "    params: {x: !!python/object:os.system y}\n",
            6,
            "a.params.x",
            "the tag tag:yaml.org,2002:python/object:os.system",
        ),
        (HEAD + REST + "    params: {x: !env y}\n", 6, "a.params.x", "the tag !env is not accepted"),
        (HEAD + REST + "    params: !!set {x}\n", 6, "a.params", "the tag tag:yaml.org,2002:set is not accepted"),
        ("tasks:\n\t- id: a\n", 2, "", "a tab where YAML takes only spaces"),
        ("tasks:\n  - id: a\n   name: x\n", 3, "", "is not YAML: did not find expected '-' indicator, while parsing a block collection"),
        ("tasks: [\n", 2, "", "is not YAML: did not find expected node content, while parsing a flow node that begins in line 2"),
        ('tasks:\n  - "x\n\n', 4, "", "is not YAML: found unexpected end of stream, while scanning a quoted scalar that begins in line 2"),
        ("a: b: c\n", 1, "", "is not YAML: mapping values are not allowed in this context"),
        ("tasks: *x\n", 1, "", "*x refers to an anchor that does not come before it"),
        ("tasks: &x\n  - *x\n", 2, "", "*x refers to what it is a part of"),
        ("tasks: []\n---\ntasks: []\n", 2, "", "a second document begins here (---); a file holds one"),
        ("tasks: []\nx: \x07\n", 2, "", "is not YAML: control characters are not allowed"),
        ('tasks: "\\ud800"\n', 1, "", "is not YAML: found invalid Unicode character escape code"),
        ("tasks: " + "[" * 100_000, 1, "", "is more than 64 levels deep"),
        ("tasks:\n" + "- " * 100_000, 2, "", "is more than 64 levels deep"),
        ("tasks: [" + "1," * 100_001 + "]", 1, "", "holds more than 100,000 values"),
        ("#" * 4_000_001, 0, "", "is larger than 4,000,000 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_fault_of_the_file_is_told(content: str, line: int, field: str, message: str, tmp_path: Path) -> None:
    [fault] = faults(tmp_path, file=content)
    assert (fault.line, fault.field) == (line, field)
    assert fault.message.startswith(message)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (HEAD.encode() + b"    description: caf\xe9\n", 4, "is not UTF-8: byte 0xe9; save it as UTF-8"),
        (HEAD.encode("utf-16"), 0, "is UTF-16; save it as UTF-8"),
        (b"\x00" * 10, 1, "is not YAML: control characters are not allowed"),
    ],
)
def test_a_file_that_is_not_utf_8_is_told(content: bytes, line: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    [fault] = faults(tmp_path)
    assert (fault.line, fault.message) == (line, message)


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]" for before, after in zip("abcdefgh", "bcdefghi", strict=True)]
    started = time.process_time()
    [fault] = faults(tmp_path, file="\n".join(lines))
    assert fault.message == "holds more than 100,000 values, counting what its aliases stand for"
    assert time.process_time() - started < 1


def test_paths_that_hold_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert [str(fault) for fault in faults(tmp_path)] == ["folder.yaml: is not a file", "link.yaml: does not exist"]


@pytest.mark.parametrize(("make", "message"), [(False, "does not exist"), (True, "holds no definition file; their names end in .yaml")])
def test_a_folder_that_holds_nothing(make: bool, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    if make:
        folder.mkdir()
    with pytest.raises(CatalogueError) as caught:
        load(folder)
    assert caught.value.faults == (Fault(folder.as_posix(), 0, "", message),)


def test_check_takes_files_and_folders_and_reads_each_file_once(tmp_path: Path) -> None:
    write(tmp_path, one=HEAD + REST)
    other = tmp_path / "other.txt"
    other.write_text(EXAMPLE)
    catalogue, found = check([tmp_path / "one.yaml", tmp_path, other, tmp_path / "missing.yaml"])
    assert list(catalogue) == ["a", "weekly_analytics"]
    assert [fault.message for fault in found] == ["does not exist"]


def test_without_the_c_parser_the_same_definitions_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Loader", yaml.SafeLoader)
    assert one(tmp_path, EXAMPLE, "weekly_analytics").retries == 3
    for content in ("tasks: [", "tasks: []\nx: \x07\n", "tasks:\n\t- a\n", "tasks: " + "[" * 5000):
        [fault] = faults(tmp_path, file=content)
        assert fault.field == ""


# --- the environment -------------------------------------------------------------------------------------------------

NEEDY = (
    HEAD
    + DAILY
    + '    config:\n      endpoint: "${BASE}/x"\n      headers: {A: "${TOKEN}"}\n      body: {"${KEY}": ["${TOKEN} ${BODY}"]}\n'
    + "  - {id: b, name: B, cron: '0 9 * * *', call: 'm:f', params: {x: '${NOT_READ}'}}\n"
)


def test_names_that_definitions_take_from_the_environment(tmp_path: Path) -> None:
    assert load(write(tmp_path, file=NEEDY)).environment_names == {"BASE", "TOKEN", "KEY", "BODY"}


def test_every_missing_name_is_told_at_the_first_definition_that_needs_it(tmp_path: Path) -> None:
    found = faults(tmp_path, {"TOKEN": SECRET, "BODY": ""}, file=NEEDY)
    assert [str(fault) for fault in found] == [
        "file.yaml:2: a.config: ${BASE} is not in the environment",
        "file.yaml:2: a.config: ${KEY} is not in the environment",
    ]


def test_two_faults_in_one_mapping_are_two_faults(tmp_path: Path) -> None:
    content = "tasks:\n  - id: a\n    name: A\n    interval: {type: fortnightly, value: 0}\n    call: 'm:f'\n"
    assert [fault.field for fault in faults(tmp_path, file=content)] == ["a.interval.type", "a.interval.value"]


def test_a_name_that_many_need_is_told_once(tmp_path: Path) -> None:
    content = 'defaults: {config: {headers: {A: "${TOKEN}"}}}\n' + HEAD + REST
    found = faults(tmp_path, {}, a=content, b=content.replace("id: a", "id: b"))
    assert [str(fault) for fault in found] == ["a.yaml:3: a.config: ${TOKEN} is not in the environment, and 1 more definitions need it"]


def test_names_from_defaults_are_needed_where_they_apply(tmp_path: Path) -> None:
    content = 'defaults: {config: {headers: {A: "${TOKEN}"}}}\n' + HEAD + REST + "  - {id: b, name: B, cron: '0 9 * * *', call: 'm:f'}\n"
    assert [fault.field for fault in faults(tmp_path, {}, file=content)] == ["a.config"]


def test_values_go_into_no_definition_and_no_message(tmp_path: Path) -> None:
    given_ = dict.fromkeys(("BASE", "TOKEN", "KEY", "BODY"), SECRET)
    catalogue = load(write(tmp_path, file=NEEDY), environment=given_)
    assert SECRET not in repr(dict(catalogue))
    assert catalogue["a"].config is not None
    assert catalogue["a"].config.headers == {"A": "${TOKEN}"}
    faulty = NEEDY + '  - {id: d, retries: x, name: D, interval: {}, config: {endpoint: "${TOKEN}{{user}}", method: "${TOKEN}"}}\n'
    del given_["KEY"]
    text = "\n".join(map(str, faults(tmp_path, given_, file=faulty)))
    assert "${KEY} is not in the environment" in text
    assert SECRET not in text


def test_headers_bodies_and_params_of_the_file_are_not_quoted(tmp_path: Path) -> None:
    where = [f"headers: {{A: [{SECRET}]}}", f"headers: {SECRET}", f'headers: {{A: "{SECRET}\\nx"}}', f"body: ['{SECRET}{{{{x}}}}']"]
    for place in where:
        found = faults(tmp_path, file=HEAD + DAILY + f"    config: {{endpoint: http://h/, {place}}}\n    params: {SECRET}\n")
        assert len(found) == 2
        assert SECRET not in str(found)
    [fault] = faults(tmp_path, file=HEAD + DAILY + f"    config: {{headers: {{A: {SECRET}: x}}}}\n")
    assert SECRET not in str(fault)


# --- Python functions ------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with good and bad functions."""
    name = "catalogue_test_functions"
    (tmp_path / f"{name}.py").write_text(
        "def good(job): ...\n"
        "def optional(job, more=1, *rest, **other): ...\n"
        "def nothing(): ...\n"
        "def two(job, more): ...\n"
        "async def later(job): ...\n"
        "def parts(job): yield\n"
        "value = 5\n"
        "builtin = len\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("raise RuntimeError('broken')")
    (tmp_path / f"{name}_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("{}:good", None),
        ("{}:optional", None),
        ("{}:builtin", None),
        ("{}:goood", 'has no goood (did you mean "good"?)'),
        ("{}:value", "is not a function"),
        ("{}:nothing", "is accepted as a function of one argument, the running job, and takes others"),
        ("{}:two", "is accepted as a function of one argument"),
        ("{}:later", "is a coroutine or a generator"),
        ("{}:parts", "is a coroutine or a generator"),
        ("{}_missing:good", "cannot be imported: ModuleNotFoundError: No module named"),
        ("{}_broken:good", "cannot be imported: RuntimeError: broken"),
        ("{}_exits:good", "cannot be imported: SystemExit: 3"),
    ],
)
def test_calls_are_resolved(call: str, problem: str | None, package: str, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    content = f"tasks:\n  - {{id: a, name: A, cron: '0 9 * * *', call: '{call.format(package)}'}}\n" + EXAMPLE.partition("\n")[2]
    found = resolve_calls(load(write(folder, file=content)))
    if problem is None:
        assert found == []
    else:
        [fault] = found
        assert (fault.file, fault.line, fault.field) == (f"{folder.as_posix()}/file.yaml", 2, "a.call")
        assert problem in fault.message


def test_loading_imports_nothing(package: str, tmp_path: Path) -> None:
    load(write(tmp_path, file=f"tasks: [{{id: a, name: A, cron: '0 9 * * *', call: '{package}_broken:good'}}]"))
    assert f"{package}_broken" not in sys.modules


# --- the catalogue ---------------------------------------------------------------------------------------------------


def definition_of(id_: str) -> Definition:
    return Definition(id=id_, name=id_, cron="0 9 * * *", call="m:f")


def test_the_catalogue_is_a_mapping() -> None:
    catalogue = Catalogue.of(definition_of("one"), definition_of("two"))
    assert dict(catalogue) == {"one": definition_of("one"), "two": definition_of("two")}
    assert len(catalogue) == 2
    assert "three" not in catalogue
    assert catalogue.get("three") is None
    assert catalogue.require("two") is catalogue["two"]
    assert catalogue.environment_names == frozenset()
    with pytest.raises(KeyError):
        catalogue["three"]


def test_an_unknown_definition_is_told_with_the_nearest() -> None:
    catalogue = Catalogue.of(definition_of("weekly_report"))
    for ask in (catalogue.require, catalogue.source, catalogue.domain):
        with pytest.raises(UnknownDefinition, match=re.escape("""there is no definition 'weekly_reprt' (did you mean "weekly_report"?)""")):
            ask("weekly_reprt")


def test_the_catalogue_cannot_be_changed() -> None:
    catalogue = Catalogue.of(definition_of("one"))
    with pytest.raises(TypeError):
        catalogue["two"] = definition_of("two")  # type: ignore[index]
    with pytest.raises(AttributeError):
        catalogue.more = 1  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        Entry(definition_of("one"), "file", 1).line = 2  # type: ignore[misc]


# --- the JSON Schema -------------------------------------------------------------------------------------------------

ANNOTATIONS = {"$schema", "$defs", "title", "description", "default"}
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def accepts(schema: Any, value: Any, root: Mapping[str, Any]) -> bool:
    """Whether a JSON Schema accepts `value`: the keywords that ours uses, and a failure for any other."""
    if isinstance(schema, bool):
        return schema
    rules: dict[str, Any] = {
        "$ref": lambda to: accepts(root["$defs"][to.removeprefix("#/$defs/")], value, root),
        "anyOf": lambda options: any(accepts(option, value, root) for option in options),
        "allOf": lambda options: all(accepts(option, value, root) for option in options),
        "not": lambda other: not accepts(other, value, root),
        "type": lambda name: isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool)),
        "enum": lambda values: value in values,
        "pattern": lambda pattern: not isinstance(value, str) or re.search(pattern, value) is not None,
        "minLength": lambda least: not isinstance(value, str) or len(value) >= least,
        "maxItems": lambda most: not isinstance(value, list) or len(value) <= most,
        "maxLength": lambda most: not isinstance(value, str) or len(value) <= most,
        "minimum": lambda least: not isinstance(value, int | float) or value >= least,
        "maximum": lambda most: not isinstance(value, int | float) or value <= most,
        "required": lambda names: not isinstance(value, dict) or all(name in value for name in names),
        "items": lambda item: not isinstance(value, list) or all(accepts(item, element, root) for element in value),
        "properties": lambda known: (
            not isinstance(value, dict) or all(accepts(known[name], item, root) for name, item in value.items() if name in known)
        ),
        "additionalProperties": lambda rest: (
            not isinstance(value, dict)
            or all(accepts(rest, item, root) for name, item in value.items() if name not in schema.get("properties", {}))
        ),
    }
    assert schema.keys() <= rules.keys() | ANNOTATIONS, schema.keys() - rules.keys() - ANNOTATIONS
    return all(rules[keyword](argument) for keyword, argument in schema.items() if keyword in rules)


SCHEMA = json_schema()


def schema_accepts(document: Any) -> bool:
    return accepts(SCHEMA, document, SCHEMA)


GOOD: dict[str, Any] = {"id": "a", "name": "A", "interval": {"type": "daily"}, "config": {"endpoint": "http://h/"}}
CALL: dict[str, Any] = {"id": "a", "name": "A", "cron": "0 9 * * *", "call": "m:f"}


@pytest.mark.parametrize(
    "document",
    [
        yaml.safe_load(EXAMPLE),
        {"tasks": []},
        {"tasks": [GOOD, {**CALL, "id": "b"}], "defaults": None},
        {"tasks": [{**GOOD, "timeout": 1800, "window": 0, "retries": 0}]},
        {"tasks": [{**GOOD, "timeout": " 1h30m ", "max_duration": "1.5s", "rate_limit": "10/s", "catch_up": "latest"}]},
        {"tasks": [{**GOOD, "rate_limit": {"rate": "0.5/m", "burst": 3}, "catch_up": {"policy": "all", "window": "2d"}}]},
        {"tasks": [{**GOOD, "rate_limit": None, "max_duration": None, "cron": None, "call": None}]},
        {"tasks": [{**GOOD, "interval": {"type": "weekly", "weekday": day.value}, "id": day.value} for day in Weekday]},
        {"tasks": [{**GOOD, "interval": {"type": kind.value}, "id": kind.value} for kind in IntervalType]},
        {"tasks": [{**CALL, "cron": {"expression": "0 9 * * *", "timezone": "UTC"}, "params": {"x": [1, None, {"y": True}]}}]},
        {"tasks": [{**GOOD, "config": {"endpoint": "http://h/", "method": "get", "body": [1], "headers": {"X": "y"}}}]},
        {"defaults": {"config": {"endpoint": "http://h/"}}, "tasks": [{"id": "a", "name": "A", "cron": "0 9 * * *"}]},
        {"defaults": {"config": {"endpoint": "http://h/"}}, "tasks": [{**GOOD, "config": {"method": "PUT"}}]},
        {"defaults": {"config": {"headers": {"X": "y"}}}, "tasks": [GOOD]},
        {"defaults": {"rate_limit": "5/s"}, "tasks": [{**GOOD, "rate_limit": {"burst": 2}}]},
        {"defaults": {"call": "m:f"}, "tasks": [{"id": "a", "name": "A", "cron": "0 9 * * *"}]},
    ],
)
def test_the_schema_accepts_what_loads(document: Any, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(json.dumps(document))
    load(tmp_path)
    assert schema_accepts(document)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"tasks": None},
        {"tasks": {}},
        {"tasks": [], "more": 1},
        {"tasks": [5]},
        {"tasks": [{}]},
        {"tasks": [{**GOOD, "id": "A"}]},
        {"tasks": [{**GOOD, "id": None}]},
        {"tasks": [{**GOOD, "name": ""}]},
        {"tasks": [{**GOOD, "priorty": "low"}]},
        {"tasks": [{**GOOD, "priority": "urgent"}]},
        {"tasks": [{**GOOD, "timeout": "soon"}]},
        {"tasks": [{**GOOD, "timeout": ""}]},
        {"tasks": [{**GOOD, "timeout": -1}]},
        {"tasks": [{**GOOD, "timeout": True}]},
        {"tasks": [{**GOOD, "timeout": 10**9}]},
        {"tasks": [{**GOOD, "retries": "3"}]},
        {"tasks": [{**GOOD, "retries": 101}]},
        {"tasks": [{**GOOD, "rate_limit": "fast"}]},
        {"tasks": [{**GOOD, "catch_up": "some"}]},
        {"tasks": [{**GOOD, "catch_up": {"policy": "all", "days": 2}}]},
        {"tasks": [{**GOOD, "interval": {}}]},
        {"tasks": [{**GOOD, "interval": {"type": "yearly"}}]},
        {"tasks": [{**GOOD, "interval": {"type": "weekly", "weekday": "Monday"}}]},
        {"tasks": [{**GOOD, "interval": {"type": "daily", "at_time": {"hour": 24}}}]},
        {"tasks": [{**GOOD, "cron": "0 9 * * *"}]},
        {"tasks": [{**GOOD, "call": "m:f"}]},
        {"tasks": [{**CALL, "cron": {"timezone": "UTC"}}]},
        {"tasks": [{"id": "a", "name": "A", "call": "m:f"}]},
        {"tasks": [{**GOOD, "config": {"endpoint": "http://h/", "method": "GIT"}}]},
        {"tasks": [{**GOOD, "config": {"endpoint": "http://h/", "headers": {"X": 1}}}]},
        {"tasks": [], "defaults": {"id": "x"}},
        {"tasks": [], "defaults": {"interval": {"type": "daily"}}},
        {"tasks": [], "defaults": {"timeout": "x"}},
        {"tasks": [], "defaults": {"config": {}, "call": "m:f"}},
    ],
)
def test_the_schema_rejects_what_does_not_load(document: Any, tmp_path: Path) -> None:
    assert not schema_accepts(document)
    (tmp_path / "file.yaml").write_text(json.dumps(document))
    with pytest.raises(CatalogueError):
        load(tmp_path)


durations = st.sampled_from(["90s", " 2h ", "0s", 60, 0.5, "1d2h3m4s5ms", "soon", None, True, -1])
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 1, 2.0, "", " ", "low", " low ", "LOW", [], {}, "a", "10/s", " 10/s", "0 9 * * *"]
)
http_configs = st.fixed_dictionaries(
    {},
    optional={
        "endpoint": st.sampled_from(["http://h/", " https://h/{{user}} ", "${BASE}", "h"]),
        "method": st.sampled_from(["GET", "Post", " put", "GIT"]) | odd,
        "headers": st.dictionaries(st.sampled_from(["X", "b c"]), st.sampled_from(["x", 1])) | odd,
        "body": odd,
        "max_duration": durations,
    },
)
backoffs = st.fixed_dictionaries(
    {}, optional={"base": durations, "cap": durations, "strategy": st.just("fixed") | odd, "jitter": odd | st.just("full")}
)
common = {
    "description": odd,
    "priority": st.sampled_from(["low", "high", " low"]) | odd,
    "timeout": durations,
    "max_duration": durations,
    "retries": odd,
    "backoff": backoffs | odd,
    "rate_limit": st.fixed_dictionaries({}, optional={"rate": st.just("10/m") | odd, "burst": odd}) | odd,
    "window": durations,
    "catch_up": st.sampled_from(["all", "skip "])
    | st.fixed_dictionaries({}, optional={"policy": st.just("skip") | odd, "window": durations})
    | odd,
    "overlap": st.sampled_from(["allow", "skip"]) | odd,
    "params": st.dictionaries(st.text(max_size=2), odd, max_size=2) | odd,
    "config": http_configs | odd,
    "call": st.sampled_from(["m:f", " a.b:c ", "m"]) | odd,
}
intervals = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["daily", "weekly", "monthly", "minutely", " daily"]) | odd,
        "value": odd,
        "timezone": st.sampled_from(["UTC", " Europe/Berlin ", "Mars"]) | odd,
        "weekday": st.sampled_from(["monday", "Monday"]) | odd,
        "day_of_month": odd,
        "at_time": st.fixed_dictionaries({}, optional={"hour": odd, "minute": odd}) | odd,
    },
)
schedules = {"interval": intervals | odd, "cron": st.just("0 9 * * *") | st.just({"expression": "0 9 * * *"}) | odd}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Files that are mostly right: a good definition with a few fields changed, and some defaults."""
    changed = draw(st.fixed_dictionaries({}, optional={**common, **schedules, "id": st.just(" b ") | odd, "name": odd}))
    kept = draw(st.lists(st.sampled_from(sorted(changed)), max_size=3, unique=True)) if changed else []
    task = {**draw(st.sampled_from([GOOD, CALL])), **{name: changed[name] for name in kept}}
    defaults = draw(st.fixed_dictionaries({}, optional=common))
    chosen = draw(st.lists(st.sampled_from(sorted(defaults)), max_size=2, unique=True)) if defaults else []
    return {"tasks": [task], "defaults": {name: defaults[name] for name in chosen}}


@given(documents())
@settings(FUZZ, max_examples=200)
def test_the_schema_accepts_every_file_that_loads(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "file.yaml").write_text(json.dumps(document))
    with contextlib.suppress(CatalogueError):
        load(tmp_path)
        assert schema_accepts(document)


def test_defaults_in_the_schema_are_written_as_people_write_them() -> None:
    fields = json_schema()["$defs"]["Definition"]["properties"]
    assert fields["timeout"]["default"] == "5m"
    assert fields["catch_up"]["default"] == {"policy": "latest", "window": "1d"}
    for name, schema in fields.items():
        if "default" in schema:
            assert accepts(schema, schema["default"], json_schema()), name


def test_the_schema_is_json_and_describes_every_field() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["$defs"]["Definition"]["properties"]) == set(Definition.model_fields)
    assert set(schema["$defs"]["Defaults"]["properties"]) == set(Definition.model_fields) - set(NOT_IN_DEFAULTS)


# --- the shipped files -----------------------------------------------------------------------------------------------

shipped_files = sorted(SHIPPED.glob("*.yaml"))


@pytest.mark.skipif(not shipped_files, reason="there are no shipped definitions")
def test_the_shipped_files_load_and_the_schema_accepts_them() -> None:
    catalogue = load(SHIPPED)
    assert len(catalogue) > 0
    for path in shipped_files:
        document = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), default=str))
        assert schema_accepts(document), path.name


def test_300_definitions_load_in_well_under_a_second(tmp_path: Path) -> None:
    for number in range(20):
        own = "".join(EXAMPLE.partition("\n")[2].replace("weekly_analytics", f"weekly_{number}_{index}") for index in range(15))
        write(tmp_path, **{f"domain{number}": f"defaults: {{retries: 5, config: {{headers: {{X: y}}}}}}\ntasks:\n{own}"})
    load(tmp_path)
    started = time.process_time()
    assert len(load(tmp_path, environment={"API_TOKEN": "x"})) == 300
    assert time.process_time() - started < 0.75


# --- anything at all -------------------------------------------------------------------------------------------------


def survives(folder: Path, content: bytes) -> None:
    """Nothing but a CatalogueError comes of `content`, and that has something to say."""
    (folder / "file.yaml").write_bytes(content)
    try:
        load(folder, environment={})
    except CatalogueError as fault:
        told = [(found.file, found.message) for found in fault.faults]
        if not all(file.endswith("file.yaml") and message for file, message in told):
            pytest.fail(f"no file or message in {told}")


@given(st.binary(max_size=80))
@FUZZ
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    survives(tmp_path, content)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80) | st.text(alphabet="tasks:- {}[]&*<?|>!%@`#\"',\n\t~0x1.e", max_size=60))
@FUZZ
def test_any_text(tmp_path: Path, content: str) -> None:
    survives(tmp_path, content.encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*Definition.model_fields, "endpoint", "type", "headers"])
loose_definitions = st.dictionaries(fields, json_values, max_size=4)


@given(
    st.fixed_dictionaries(
        {}, optional={"tasks": json_values | st.lists(loose_definitions, max_size=3), "defaults": json_values | loose_definitions}
    )
)
@FUZZ
def test_any_structure(tmp_path: Path, document: Any) -> None:
    survives(tmp_path, yaml.safe_dump(document, allow_unicode=True).encode())


@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 12), st.text(alphabet="a:-[]{}&*<'\"\n\t 0", max_size=4)), min_size=1, max_size=3
    )
)
@FUZZ
def test_a_good_file_with_some_of_it_changed(tmp_path: Path, changes: list[tuple[int, int, str]]) -> None:
    content = f"{DEFAULTS}, config: {{method: GET}}}}\n" + EXAMPLE.partition("\n")[2] + NEEDY.partition("\n")[2]
    for at, removed, added in changes:
        start = at % len(content)
        content = content[:start] + added + content[start + removed :]
    survives(tmp_path, content.encode())
