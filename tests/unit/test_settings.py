"""Where settings come from, which source wins, and that whatever is wrong is told with its name and its place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from pydantic import ValidationError

from taskplatform.errors import SettingsError
from taskplatform.model import Limit, LimitRule, RateLimit
from taskplatform.settings import Settings, environment, load_settings, settings

SECRET = "s3cret"
YAML = "taskplatform.yaml"


@pytest.fixture(autouse=True)
def _no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and no setting in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.upper().startswith("TASKPLATFORM_"):
            monkeypatch.delenv(name)
    settings.cache_clear()
    yield
    settings.cache_clear()


def faults(**overrides: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(**overrides)
    return str(caught.value).splitlines()


# --- precedence ------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    loaded = load_settings()
    assert loaded.redis_url == "redis://127.0.0.1:6379/0"
    assert loaded.tasks_dir == Path("tasks")
    assert loaded.plan_horizon == timedelta(seconds=5)
    assert loaded.rate_limit is None


@pytest.mark.parametrize(
    ("environment_", "dotenv", "yaml", "argument", "expected"),
    [
        (None, None, None, None, 3),
        (None, None, "4", None, 4),
        (None, "5", "4", None, 5),
        ("6", "5", "4", None, 6),
        ("6", "5", "4", 7, 7),
        ("6", None, "4", None, 6),
        # an empty value is none
        ("", "5", "4", None, 5),
        ("  ", "", "4", None, 4),
        ("", "", "", None, 3),
        ("", "", "null", None, 3),
        (None, None, "~", None, 3),
    ],
)
def test_the_first_source_that_has_a_value_wins(
    environment_: str | None, dotenv: str | None, yaml: str | None, argument: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment_ is not None:
        monkeypatch.setenv("TASKPLATFORM_WORKER_SLOTS", environment_)
    if dotenv is not None:
        Path(".env").write_text(f"TASKPLATFORM_WORKER_SLOTS={dotenv}\n")
    if yaml is not None:
        Path(YAML).write_text(f"worker_slots: {yaml}\n")
    assert load_settings(**({} if argument is None else {"worker_slots": argument})).worker_slots == expected


def test_names_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("taskplatform_worker_slots", "9")
    assert load_settings().worker_slots == 9


@pytest.mark.parametrize("source", ["environment", "dotenv", "argument"])
def test_the_yaml_file_is_named_by_any_other_source(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(YAML).write_text("worker_slots: 4\n")
    Path("other.yaml").write_text("worker_slots: 8\nplan_batch: 10\n")
    if source == "environment":
        monkeypatch.setenv("TASKPLATFORM_CONFIG", "other.yaml")
    if source == "dotenv":
        Path(".env").write_text("TASKPLATFORM_CONFIG=other.yaml\nTASKPLATFORM_PLAN_BATCH=20\n")
    loaded = load_settings(**({"config": "other.yaml"} if source == "argument" else {}))
    assert loaded.worker_slots == 8
    assert loaded.plan_batch == (20 if source == "dotenv" else 10)


def test_the_environment_names_the_file_before_dotenv_does(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("one.yaml").write_text("worker_slots: 1\n")
    Path(".env").write_text("TASKPLATFORM_CONFIG=two.yaml\n")
    monkeypatch.setenv("TASKPLATFORM_CONFIG", "one.yaml")
    assert load_settings().worker_slots == 1


# --- what a value may look like --------------------------------------------------------------------------------------

TEXTS = [
    ("rate_limit", "10/s", RateLimit(rate="10/s")),
    ("rate_limit", '{"rate": "10/s", "burst": 15}', RateLimit(rate="10/s", burst=15)),
    ("rate_limit", "{rate: 10/s, burst: 15}", RateLimit(rate="10/s", burst=15)),
    ("host_limits", "{}", {}),
    ("host_limits", "{api.example.com: 5/s}", {"api.example.com": LimitRule(rate="5/s")}),
    (
        "host_limits",
        '{"localhost:8000": {"rate": "5/s", "burst": 10, "concurrency": 4}, a: {concurrency: 1}}',
        {"localhost:8000": LimitRule(rate="5/s", burst=10, concurrency=4), "a": LimitRule(concurrency=1)},
    ),
    ("user_concurrency", "2", 2),
    ("fairness", "on", True),
    ("fairness", "false", False),
    ("lower_share", "0.05", 0.05),
    ("plan_horizon", "90s", timedelta(seconds=90)),
    ("plan_horizon", "90", timedelta(seconds=90)),
    ("plan_horizon", "0.5", timedelta(seconds=0.5)),
    ("plan_horizon", "1h30m", timedelta(minutes=90)),
    ("queue_buffer", "0.5", 0.5),
    ("worker_slots", "010", 10),
    ("tasks_dir", "/etc/tasks", Path("/etc/tasks")),
    ("log_level", "DEBUG", "DEBUG"),
    ("dashboard_url", "https://ops.example.com:8443/x/ui/", "https://ops.example.com:8443/x/ui"),
    ("flower_url", "http://[::1]:5555", "http://[::1]:5555"),
    ("redis_url", "redis://:p%40ss@host:6380/3", "redis://:p%40ss@host:6380/3"),
    ("redis_url", "rediss://host", "rediss://host"),
    ("redis_url", "redis://[::1]:6379/0", "redis://[::1]:6379/0"),
    ("redis_url", "unix:///run/redis.sock", "unix:///run/redis.sock"),
]


@pytest.mark.parametrize("source", ["environment", "dotenv", "yaml", "argument"])
@pytest.mark.parametrize(("name", "text", "expected"), TEXTS)
def test_text_means_the_same_in_every_source(source: str, name: str, text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "environment":
        monkeypatch.setenv(f"TASKPLATFORM_{name.upper()}", text)
    elif source == "dotenv":
        Path(".env").write_text(f"TASKPLATFORM_{name.upper()}='{text}'\n")
    elif source == "yaml":
        Path(YAML).write_text(f"{name}: {text}\n")
    loaded = load_settings(**({name: text} if source == "argument" else {}))
    assert getattr(loaded, name) == expected


def test_yaml_on_several_lines() -> None:
    Path(YAML).write_text("# settings\nrate_limit:\n  rate: 10/s\n  burst: 15\n")
    assert load_settings().rate_limit == RateLimit(rate="10/s", burst=15)


def test_a_source_replaces_a_setting_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(YAML).write_text("rate_limit: {rate: 5/s, burst: 50}\n")
    monkeypatch.setenv("TASKPLATFORM_RATE_LIMIT", '{"rate": "10/s"}')
    assert load_settings().rate_limit == RateLimit(rate="10/s", burst=2)


def test_limits_of_hosts_on_several_lines() -> None:
    Path(YAML).write_text("host_limits:\n  api.example.com:\n    rate: 5/s\n    burst: 10\n  '[::1]:8000':\n    concurrency: 2\n")
    assert load_settings().limits == {"host:api.example.com": Limit(5, 10), "host:[::1]:8000": Limit(concurrency=2)}


def test_the_limits_by_their_names() -> None:
    assert load_settings().limits == {}
    given = load_settings(rate_limit="10/s", host_limits={"a": {"rate": "90/m", "concurrency": 3}}, user_concurrency=2)
    assert given.limits == {"total": Limit(10, 2), "host:a": Limit(1.5, 2, 3), "user": Limit(concurrency=2)}


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n"])
def test_an_empty_yaml_file_sets_nothing(content: str) -> None:
    Path(YAML).write_text(content)
    assert load_settings() == Settings()


# --- faults ----------------------------------------------------------------------------------------------------------


def test_unknown_names_of_every_source_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_WORKER_SLOT", "3")
    Path(".env").write_text("API_TOKEN=x\nTASKPLATFORM_FOO=1\n")
    Path(YAML).write_text("worker_slots: 3\nplan_horizont: 5s\n")
    lines = faults()
    assert sorted(line.partition(" is not a setting")[0] for line in lines) == [
        "TASKPLATFORM_FOO (.env):",
        "TASKPLATFORM_WORKER_SLOT (environment):",
        "taskplatform.yaml:2: plan_horizont:",
    ]
    hints = {line.split(" ")[0]: line for line in lines}
    assert '(did you mean "TASKPLATFORM_WORKER_SLOTS"?)' in hints["TASKPLATFORM_WORKER_SLOT"]  # as the environment writes it
    assert '(did you mean "plan_horizon"?)' in hints["taskplatform.yaml:2:"]
    assert all("; settings are api_" in line for line in lines)


BAD = [
    ("worker_slots", "many", 'got "many"; it takes a whole number from 1 to 1000'),
    ("worker_slots", "0", 'got "0"; it takes a whole number from 1 to 1000'),
    ("worker_slots", "true", 'got "true"; it takes a whole number from 1 to 1000'),
    ("change_log_size", "1", 'got "1"; it takes a whole number of at least 100'),
    ("queue_buffer", "nan", 'got "nan"; it takes a number from 0 to 100'),
    ("log_level", "info", 'got "info"; it takes one of DEBUG, INFO, WARNING, ERROR (did you mean "INFO"?)'),
    ("namespace", "TP", 'got "TP"; it takes text (first part of every key of the store: 1 to 16 characters a-z'),
    ("plan_horizon", "soon", "'soon' is not a duration such as"),
    ("plan_horizon", "12:30", "'12:30' is not a duration such as"),
    ("plan_horizon", "0", "must be longer than 0"),
    ("rate_limit", "fast", "rate: 'fast' is not a rate such as \"10/s\""),
    ("rate_limit", "{rate: 10/s, brst: 1}", 'brst: is not a known field (did you mean "burst"?)'),
    ("rate_limit", "{rate: 10/s, burst: 0}", 'burst: got "0"; it takes a whole number from 1 to 1000000'),
    ("host_limits", "5/s", 'got "5/s"; it takes a mapping (by host that is called; for example {api.example.com: {rate: 5/s,'),
    ("host_limits", "{a: fast}", "a: rate: 'fast' is not a rate such as \"10/s\""),
    ("host_limits", "{a: {}}", "a: takes rate, concurrency, or both"),
    (
        "host_limits",
        "{a: {rate: 5/s, brst: 1}}",
        'a: brst: is not a known field (did you mean "burst"?); known are rate, burst, concurrency',
    ),
    ("host_limits", "{a: {burst: 2, concurrency: 1}}", "a: burst: goes with rate"),
    ("host_limits", "{a: {concurrency: many}}", 'a: concurrency: got "many"; it takes a whole number from 1 to 1000000'),
    ("host_limits", "{a: [5/s]}", "a: got a list; it takes text (count per second"),
    ("host_limits", "{A.b: 5/s}", """A.b: host 'A.b' is not accepted (did you mean "a.b"?); a host is given without scheme"""),
    ("host_limits", '{"https://a.b/c": 5/s}', """https://a.b/c: host 'https://a.b/c' is not accepted (did you mean "a.b"?)"""),
    ("user_concurrency", "0", 'got "0"; it takes a whole number from 1 to 1000000'),
    ("fairness", "maybe", 'got "maybe"; it takes true or false'),
    ("dashboard_url", "javascript:alert(1)", "takes an http:// or https:// URL"),
    ("flower_url", "https://ops:pass@flower.example.com", "takes an http:// or https:// URL without user, password"),
    ("lower_share", "5%", 'got "5%"; it takes a number from 0 to 0.3'),
    ("lower_share", "0.5", 'got "0.5"; it takes a number from 0 to 0.3'),
]


@pytest.mark.parametrize("source", ["environment", "dotenv", "yaml", "argument"])
@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_a_bad_value_of_any_source_is_told(source: str, name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = f"TASKPLATFORM_{name.upper()}"
    if source == "environment":
        monkeypatch.setenv(upper, text)
    elif source == "dotenv":
        Path(".env").write_text(f"OTHER=1\n{upper}='{text}'\n")
    elif source == "yaml":
        Path(YAML).write_text(f"# one\n{name}: {text}\n")
    places = {
        "environment": f"{upper} (environment)",
        "dotenv": f"{upper} (.env)",
        "yaml": f"taskplatform.yaml:2: {name}",
        "argument": f"{name} (argument)",
    }
    [line] = faults(**({name: text} if source == "argument" else {}))
    assert line.startswith(f"{places[source]}: {message}")


@pytest.mark.parametrize(
    ("name", "text", "takes"),
    [("RATE_LIMIT", "{rate: 10/s", '10/s or {"rate": '), ("HOST_LIMITS", "{a: {rate: 10/s}", '{"api.example.com": {"rate": "10/s"}}')],
)
def test_a_flow_that_cannot_be_read_is_told(name: str, text: str, takes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TASKPLATFORM_{name}", text)
    [line] = faults()
    assert line.startswith(f"TASKPLATFORM_{name} (environment): {text!r} cannot be read; it takes {takes}")


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_MAX_LOSSES", "x")
    Path(".env").write_text("TASKPLATFORM_PLAN_BATCH=x\n")
    Path(YAML).write_text("http_excerpt: x\n")
    assert {line.partition(":")[0] for line in faults()} == {
        "TASKPLATFORM_MAX_LOSSES (environment)",
        "TASKPLATFORM_PLAN_BATCH (.env)",
        "taskplatform.yaml",
    }


def test_only_the_value_that_wins_has_to_be_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_MAX_LOSSES", "5")
    Path(YAML).write_text("max_losses: x\n")
    assert load_settings().max_losses == 5


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{SECRET}@host",
        f"{SECRET}",
        f"redis://:{SECRET}/@host",
        f"redis://user:{SECRET}/word@host",
        f"redis://[{SECRET}@host",
        f"redis://host:{SECRET}",
        f"redis://host/{SECRET}",
        f"unix://?password={SECRET}",
        "redis://",
        "redis:///0",
        "redis://host:99999/0",
    ],
)
@pytest.mark.parametrize("source", ["environment", "yaml"])
def test_a_bad_url_is_told_without_the_url(url: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "environment":
        monkeypatch.setenv("TASKPLATFORM_REDIS_URL", url)
    else:
        Path(YAML).write_text(f'redis_url: "{url}"\n')
    [line] = faults()
    assert line.startswith(("TASKPLATFORM_REDIS_URL (environment): takes a redis://", "taskplatform.yaml:1: redis_url: takes a redis://"))
    assert SECRET not in line
    assert "%40" in line


def test_a_url_of_the_wrong_type_is_not_quoted() -> None:
    Path(YAML).write_text(f"redis_url: [{SECRET}]\n")
    [line] = faults()
    assert line == "taskplatform.yaml:1: redis_url: got a list; it takes text (one Redis or Valkey for store, broker and beat lock)"


def test_an_argument_of_the_wrong_type_is_told() -> None:
    assert faults(worker_slots=True, redis_url=4711) == [
        "redis_url (argument): got a number; it takes text (one Redis or Valkey for store, broker and beat lock)",
        'worker_slots (argument): got "true"; it takes a whole number from 1 to 1000',
    ]


def test_the_url_is_not_in_the_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", f"redis://:{SECRET}@host")
    assert SECRET not in repr(load_settings())
    assert SECRET not in str(load_settings())


def test_times_that_do_not_go_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_HEARTBEAT_INTERVAL", "10s")
    Path(YAML).write_text("beat_lock_timeout: 2s\n")
    assert faults() == [
        "heartbeat_timeout is 15s and heartbeat_interval 10s; heartbeat_timeout takes at least 2 times heartbeat_interval",
        "beat_lock_timeout is 2s and beat_interval 1s; beat_lock_timeout takes at least 3 times beat_interval",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("worker_slots: 3\nworker_slots: 4\n", "taskplatform.yaml:2: worker_slots is given twice; the first is in line 1"),
        ("\nconfig: other.yaml\n", "taskplatform.yaml:2: config names this file, and cannot be set in it"),
        ("- worker_slots: 3\n", "taskplatform.yaml: a mapping of settings to values is expected, not a list"),
        ("worker_slots\n", "taskplatform.yaml: a mapping of settings to values is expected, not text"),
        ("[a]: 3\n", "taskplatform.yaml:1: the name of a setting is expected, not a list"),
        ("worker_slots:\n\t- 3\n", "taskplatform.yaml:2: is not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", "taskplatform.yaml:2: is not YAML: but found another document"),
        ("a: \x07\n", "taskplatform.yaml: is not YAML: special characters are not allowed"),
        ("a: *b\n", "taskplatform.yaml:1: the alias *b is not accepted"),
        ("a: " + "[" * 5000, "taskplatform.yaml: is nested too deeply"),
    ],
)
def test_a_bad_yaml_file_is_told(content: str, expected: str) -> None:
    Path(YAML).write_text(content)
    assert faults() == [expected]


def test_a_yaml_fault_does_not_quote_its_line() -> None:
    Path(YAML).write_text(f"redis_url: redis://:{SECRET}@host: 6379\n")
    [line] = faults()
    assert line.startswith("taskplatform.yaml:1: is not YAML: ")
    assert SECRET not in line


@pytest.mark.parametrize("name", [YAML, ".env"])
def test_a_file_that_is_not_utf_8_is_told(name: str) -> None:
    Path(name).write_bytes(b"TASKPLATFORM_NAMESPACE=\xff\n")
    assert faults() == [f"{name}: is not UTF-8"]


def test_a_byte_order_mark_does_no_harm() -> None:
    Path(YAML).write_text("\ufeffworker_slots: 4\n", encoding="utf-8")
    Path(".env").write_text("\ufeffTASKPLATFORM_PLAN_BATCH=20\n", encoding="utf-8")
    assert load_settings().worker_slots == 4
    assert load_settings().plan_batch == 20


def test_a_bad_line_in_dotenv_is_told() -> None:
    Path(".env").write_text(f"A=1\nTASKPLATFORM_REDIS_URL redis://:{SECRET}@host\nB=2\n")
    assert faults() == [".env:2: cannot be read; a line is NAME=value"]


def test_a_yaml_file_that_was_named_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_CONFIG", "missing.yaml")
    assert faults() == ["TASKPLATFORM_CONFIG names 'missing.yaml', which is not a file"]


@example({"[key]": ""})
@given(st.dictionaries(st.sampled_from(sorted(Settings.model_fields)) | st.text(max_size=5), st.text(max_size=20), max_size=4))
@limits(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_nothing_but_a_settings_error_comes_of_any_text(values: dict[str, str]) -> None:
    with contextlib.suppress(SettingsError):
        load_settings(**values)


@given(st.text(max_size=60) | st.text(alphabet="ab:-[]{}&*<?|>!%@`#\"' \n\t", max_size=40))
@limits(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_nothing_but_a_settings_error_comes_of_any_file(content: str) -> None:
    Path(YAML).write_text(content, encoding="utf-8", errors="replace")
    with contextlib.suppress(SettingsError):
        load_settings()


# --- the object ------------------------------------------------------------------------------------------------------


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().worker_slots = 5  # type: ignore[misc]


def test_settings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = settings()
    monkeypatch.setenv("TASKPLATFORM_WORKER_SLOTS", "9")
    assert settings() is first
    assert load_settings().worker_slots == 9


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_WORKER_SLOTS", "x")
    with pytest.raises(SettingsError):
        settings()
    monkeypatch.setenv("TASKPLATFORM_WORKER_SLOTS", "9")
    assert settings().worker_slots == 9


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description and name != "log_level"] == []


# --- the environment of the definitions ------------------------------------------------------------------------------


def test_environment_is_dotenv_under_the_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("API_TOKEN=from-file\nAPI_BASE_URL='http://h/'\nEMPTY=\nexport BARE\n")
    monkeypatch.setenv("API_TOKEN", "from-process")
    found = environment()
    assert found["API_TOKEN"] == "from-process"
    assert found["API_BASE_URL"] == "http://h/"
    assert found["EMPTY"] == ""
    assert "BARE" not in found
    assert found["PATH"] == os.environ["PATH"]
