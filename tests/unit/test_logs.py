"""What a line of the log looks like, and which level a process follows."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
import structlog

from taskplatform import logs, tracing
from taskplatform.errors import Outage, StoreUnavailable
from taskplatform.keys import new_token
from taskplatform.local import JsonLog
from taskplatform.settings import load_settings
from taskplatform.store import LogLevel, LogLevels

SECRET = 'pass/"word"&4711'
JOB = "daily_user_report:u.1@x:1800057600000"


class Told:
    """A logger of its own, and what came out of it."""

    def __init__(self, shape: str) -> None:
        self.stream = io.StringIO()
        self.log = logging.Logger("taskplatform.test")
        self.log.addHandler(logging.StreamHandler(self.stream))
        logs.format_all(load_settings(log_format=shape), lambda: (SECRET,), self.log)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def line(self) -> dict[str, Any]:
        (only,) = self.text.splitlines()
        return cast("dict[str, Any]", json.loads(only))


@pytest.fixture
def told() -> Iterator[Told]:
    yield Told("json")
    structlog.reset_defaults()


@pytest.fixture
def people() -> Iterator[Told]:
    yield Told("console")
    structlog.reset_defaults()


def test_a_line_says_which_job_it_names(told: Told) -> None:
    told.log.warning("delivery %d of job %s: this worker\nrefuses", 3, JOB)
    fields = {"level": "warning", "logger": "taskplatform.test", "job": JOB, "definition": "daily_user_report", "user": "u.1@x"}
    assert fields.items() <= told.line.items()
    assert told.line["event"].endswith("this worker\nrefuses")
    assert list(told.line)[:3] == ["timestamp", "level", "event"]


@pytest.mark.parametrize("text", ["no job", "job a", "the job a:b", "job A:b:1", "subject a:b:1", "job a:b:1_x", "[a:b:1]"])
def test_what_is_no_job_id_is_none(told: Told, text: str) -> None:
    told.log.info("%s", text)
    assert "job" not in told.line


def test_what_was_given_is_written_and_takes_no_field_of_the_platforms(told: Told) -> None:
    told.log.info("done", extra={"rows": 5, "level": "mine", "tags": {"a"}, ("x" * 3): {(1, 2): None}})
    assert told.line["rows"] == 5
    assert told.line["level"] == "info"
    assert told.line["tags"] == "{'a'}"
    assert told.line["xxx"] == {"(1, 2)": None}


@pytest.mark.parametrize("shape", ["json", "console"])
def test_a_secret_is_in_no_field_and_in_no_traceback(shape: str) -> None:
    told, token = Told(shape), new_token()[1]
    try:
        raise ValueError(f"no {SECRET} and no {token}")
    except ValueError:
        told.log.exception("%s %s", SECRET, json.dumps(SECRET), extra={"deep": [{SECRET: SECRET}], "made": {SECRET}, "n": 1.5})
    assert "4711" not in told.text
    assert token not in told.text
    assert "no *** and no tpk_***" in told.text
    assert told.text.count("***") >= 6


@pytest.mark.parametrize("shape", ["json", "console"])
def test_a_line_that_cannot_be_written_is_told_and_raises_nothing(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(shape)

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    told.log.info("%d", f"x {SECRET}")
    told.log.info(f"{SECRET} %d %d", 1)
    told.log.info("fine", extra={"broken": Broken()})
    told.log.info(Broken())
    assert told.text.count("a line that cannot be written") == 4
    assert len(told.text.splitlines()) == 4
    assert "4711" not in told.text
    assert capsys.readouterr().err == "", "logging itself was told of a fault"


def test_people_get_a_line_that_a_terminal_does_not_obey(people: Told) -> None:
    people.log.info("job %s: \x1b[2J", JOB, extra={"rows": 5})
    (line,) = people.text.splitlines()
    assert f"job {JOB}: \\x1b[2J [taskplatform.test] rows=5" in line
    assert "user=" not in line


def test_structlog_writes_the_same(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", told.log.handlers)
    monkeypatch.setattr(root, "level", logging.INFO)
    structlog.get_logger("tests.of.structlog").info("%s counted", "all", rows=5, secret=SECRET)
    assert {"event": "all counted", "logger": "tests.of.structlog", "rows": 5, "secret": "***"}.items() <= told.line.items()


def test_up_writes_objects_where_it_is_told_to() -> None:
    stream = io.StringIO()
    sink = JsonLog(stream)
    sink("beat", json.dumps({"event": "beat leads", "level": "warning"}))
    sink("valkey", "Ready to accept connections")
    sink("mock", "[1]")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0] == {"event": "beat leads", "level": "warning", "process": "beat"}
    assert [(line["process"], line["event"], line["level"]) for line in lines[1:]] == [
        ("valkey", "Ready to accept connections", "info"),
        ("mock", "[1]", "info"),
    ]


# --- the level -------------------------------------------------------------------------------------------------------


class Levels:
    """What Redis would say."""

    def __init__(self, **levels: str) -> None:
        self.known: Mapping[str, LogLevel] | None = {name: LogLevel(level, 60_000, "me") for name, level in levels.items()}

    def read(self) -> tuple[int, Mapping[str, LogLevel]]:
        if self.known is None:
            raise StoreUnavailable("away", Outage.UNREACHABLE)
        return 0, self.known


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """With a level that is put back."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    yield root
    logs.live_level.set("")
    root.setLevel(before)


def test_what_is_said_of_fewer_goes_before(root: logging.Logger) -> None:
    follower = logs.LevelFollower("worker", "celery@h#1")
    for name, level in (("*", "WARNING"), ("worker", "INFO"), ("celery@h", "DEBUG"), ("celery@h#1", "WARNING")):
        said = Levels(**{"beat": "ERROR", "celery@h#2": "ERROR", name: level})
        follower.look(cast("LogLevels", said))
        assert logging.getLevelName(root.level) == level
    follower.look(cast("LogLevels", Levels(beat="DEBUG")))
    assert root.level == logging.ERROR


def test_it_ends_by_itself_while_redis_is_away(root: logging.Logger) -> None:
    now = 100.0
    follower = logs.LevelFollower("worker", "celery@h#1", clock=lambda: now)
    said = Levels(worker="DEBUG")
    follower.look(cast("LogLevels", said))
    said.known = None
    now += 59
    follower.look(cast("LogLevels", said))
    follower.end()
    assert root.level == logging.DEBUG
    now += 2
    follower.look(cast("LogLevels", said))
    assert root.level == logging.ERROR


# --- traces ----------------------------------------------------------------------------------------------------------


def test_traces_that_are_off_import_nothing() -> None:
    program = """
import sys
from taskplatform import tracing
from taskplatform.platform import Platform
tracing.planned("a|1", 1, 1)
tracing.enqueued("a:b:1")
with tracing.run(None, lambda: 0), tracing.call("GET", "http://a", {"A": "b"}) as call:
    assert call.headers == {"A": "b"}
    call.ended(200, "HTTP 200", failed=False)
tracing.flush()
# redis-py imports what it finds of the SDK for its own figures
assert not [name for name in sys.modules if name.startswith(("opentelemetry.exporter", "opentelemetry.sdk.trace.export"))]
"""
    environment = {
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_SDK_DISABLED": "true",
    }
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_jobs_trace_is_that_of_the_documentation() -> None:
    assert tracing.trace_id("a:b:1") == 0x2AA81B4BD4A3D5BAE716A5B41CED2CC9
