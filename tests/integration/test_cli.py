"""The command line on a real server: through click's runner, and where the process matters, as a process."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from click.testing import CliRunner, Result

from taskplatform.cli import cli, main
from taskplatform.cli.arguments import PRIORITIES, STATES, moment, past
from taskplatform.cli.output import exact_text, moment_text, schedule_text, span_text
from taskplatform.local import EmbeddedServer
from taskplatform.model import Cron, Definition, Interval, JobState, Limit, Priority
from taskplatform.planner import published
from taskplatform.platform import Platform
from taskplatform.settings import Settings, settings
from tests.conftest import ROOT
from tests.support import wait_until

TASKS = """
tasks:
  - id: daily_report
    name: Daily report
    interval: {type: daily, timezone: Europe/Berlin, at_time: {hour: 7, minute: 0}}
    priority: high
    timeout: 90s
    config: {endpoint: "https://api.example/{{user}}/{{params.format}}", headers: {Authorization: "Bearer ${CLI_TEST_TOKEN}"}}
    params: {format: html}
  - id: hourly_sync
    name: Hourly sync
    cron: "5 * * * *"
    config: {endpoint: "https://api.example/sync"}
"""
OTHER_TASKS = """
tasks:
  - id: clean
    name: Clean up
    interval: {type: weekly, value: 2}
    priority: low
    call: "cli_test_functions:clean"
"""

Run = Callable[..., Result]
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of two definition files as the current folder, without a server."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/reports.yaml").write_text(TASKS)
    (tmp_path / "tasks/upkeep.yaml").write_text(OTHER_TASKS)
    (tmp_path / "cli_test_functions.py").write_text("def clean(job):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CLI_TEST_TOKEN", "not-to-be-shown")
    monkeypatch.setenv("TASKPLATFORM_VERIFY_DEFINITIONS", "false")
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()
    sys.modules.pop("cli_test_functions", None)


@pytest.fixture
def on_server(folder: Path, server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the session's server, emptied."""
    assert client.dbsize() == 0
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", server.url)
    return folder


@pytest.fixture
def platform(on_server: Path) -> Iterator[Platform]:
    """The platform that the commands work on."""
    assert settings().redis_url == os.environ["TASKPLATFORM_REDIS_URL"], on_server
    found = Platform.connect(actor="tests")
    yield found
    found.close()


def run(line: str, *, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(cli, shlex.split(line), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(line: str, *, code: int = 0) -> Any:
    return json.loads(run(f"{line} --json", code=code).stdout)


def fails(line: str, *, code: int = 1) -> str:
    """What is said on stderr by a command that fails."""
    result = run(line, code=code)
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Usage: " if code == 2 else "error: ")
    return result.stderr


def rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


# --- every command ---------------------------------------------------------------------------------------------------


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


@pytest.mark.parametrize(("path", "command"), list(commands(cli)))
def test_each_command_has_an_example_that_it_accepts(path: str, command: click.Command, tmp_path: Path) -> None:
    (tmp_path / "subscriptions.csv").touch()
    assert command.epilog is not None
    assert command.epilog.startswith("\b\nExample")
    lines = [line.removeprefix("  taskplatform ").partition(" > ")[0] for line in command.epilog.splitlines()[2:]]
    assert lines
    for line in lines:
        assert line.startswith(path)
        arguments = shlex.split(line.removeprefix(path))
        command.make_context(path, [str(tmp_path / word) if word == "subscriptions.csv" else word for word in arguments]).close()


@pytest.mark.parametrize("path", ["", "tasks", "users", "subscriptions", "jobs", "dead-letters", "limits", "keys", "certs"])
def test_lists_of_commands_say_whole_sentences(path: str) -> None:
    listed = run(f"{path} --help").stdout.partition("Commands:\n")[2].splitlines()
    assert listed
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize("path", [path for path, _ in commands(cli)])
def test_each_command_shows_its_example(path: str) -> None:
    assert re.search(rf"\n  Examples?:\n    taskplatform {path}( |$)", run(f"{path} --help").stdout, re.MULTILINE)


def test_choices_are_those_of_the_model() -> None:
    assert list(PRIORITIES) == [str(priority) for priority in Priority]
    assert list(STATES) == [str(state) for state in JobState]


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_list() -> None:
    assert rows(run("tasks list").stdout) == [
        ["id", "name", "schedule", "priority"],
        ["daily_report", "Daily report", "every day at 07:00 Europe/Berlin", "high"],
        ["hourly_sync", "Hourly sync", "cron 5 * * * * UTC", "medium"],
        ["clean", "Clean up", "every 2 weeks on monday at 00:00 UTC", "low"],
    ]
    assert [row[0] for row in rows(run("tasks list --domain upkeep").stdout)] == ["id", "clean"]
    assert [row[0] for row in rows(run("tasks list --priority high --domain reports").stdout)] == ["id", "daily_report"]
    assert rows(run("tasks list --priority low --domain reports").stdout) == [["id", "name", "schedule", "priority"]]
    assert [one["id"] for one in run_json("tasks list --domain reports")] == ["daily_report", "hourly_sync"]
    assert run_json("tasks list --priority low --domain reports") == []
    assert """'report' (did you mean "reports"?); domains are reports, upkeep""" in fails("tasks list --domain report")
    assert "'urgent' is not one of 'high', 'medium', 'low'" in fails("tasks list --priority urgent", code=2)


def test_tasks_show() -> None:
    shown = dict(rows(run("tasks show daily_report").stdout))
    assert shown["schedule"] == "every day at 07:00 Europe/Berlin"
    assert shown["source"] == "tasks/reports.yaml:3"
    assert shown["timeout"] == "1m30s"
    assert ISO.fullmatch(shown["next"])
    record = run_json("tasks show daily_report")
    assert record["interval"] == {"type": "daily", "value": 1, "timezone": "Europe/Berlin", "at_time": {"hour": 7, "minute": 0}}
    assert (record["domain"], record["params"]) == ("reports", {"format": "html"})
    assert "not-to-be-shown" not in json.dumps(record)
    assert """(did you mean "daily_report"?)""" in fails("tasks show daily_repot")


def test_tasks_check_finds_every_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("tasks check").stdout == "3 definitions without a fault\n"
    monkeypatch.delenv("CLI_TEST_TOKEN")
    (folder / "tasks/upkeep.yaml").write_text(OTHER_TASKS.replace(":clean", ":gone"))
    (folder / "tasks/third.yaml").write_text("tasks:\n  - id: third\n    name: Third\n    cron: nonsense\n    call: 'a:b'\n")
    result = run("tasks check", code=1)
    places = [line.split(": ")[0] for line in result.stdout.splitlines()]
    assert places == ["tasks/reports.yaml:3", "tasks/third.yaml:4", "tasks/upkeep.yaml:3"]
    assert "${CLI_TEST_TOKEN} is not in the environment" in result.stdout
    assert "gone" in result.stdout
    assert result.stderr == "error: 3 faults in the definitions\n"
    assert run("tasks check tasks/third.yaml nowhere", code=1).stdout.count("\n") == 2


def test_a_folder_with_faults_is_told_line_by_line(folder: Path) -> None:
    (folder / "tasks/third.yaml").write_text("tasks:\n  - id: third\n  - id: fourth\n    colour: red\n")
    said = fails("tasks list").splitlines()
    assert said[0] == f"error: {len(said) - 1} faults in the definitions"
    assert len(said) > 2
    assert all(re.match(r"tasks/third.yaml:[234]: ", line) for line in said[1:])


def test_tasks_schema() -> None:
    assert json.loads(run("tasks schema").stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_shipped_definitions_are_listed_and_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    monkeypatch.setenv("API_BASE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("API_TOKEN", "x")
    settings.cache_clear()
    assert len(run_json("tasks list")) >= 300
    warning, counted = run("tasks check").stdout.splitlines()
    assert re.match(r"tasks/\w+\.yaml:\d+: \w+\.config\.endpoint: warning: address 127\.0\.0\.1 \(loopback\) is not allowed; ", warning)
    assert re.search(r" \(and \d+ more definitions\)$", warning)
    assert counted.endswith(" definitions without a fault")
    monkeypatch.setenv("TASKPLATFORM_HTTP_ALLOW", "127.0.0.1:8000")
    settings.cache_clear()
    assert run("tasks check").stdout == f"{counted}\n"


# --- users -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_server")
def test_users() -> None:
    assert run("users create u2 u1 u2").stdout == "u2 created\nu1 created\n"
    assert run("users create u1 u3").stdout == "u1 exists already\nu3 created\n"
    assert run("users count").stdout == "3\n"
    table = rows(run("users list").stdout)
    assert [row[0] for row in table] == ["user", "u1", "u2", "u3"]
    assert ISO.fullmatch(table[1][1])
    assert table[1][2] == "no"

    first = run("users list --limit 2")
    assert first.stderr == "there may be more: --cursor 'u2'\n"
    assert [one["id"] for one in run_json("users list --limit 2 --cursor u2")] == ["u3"]
    whole = run("users list --limit 1 --all --json")
    assert [one["id"] for one in json.loads(whole.stdout)] == ["u1", "u2", "u3"]
    assert whole.stderr == ""

    assert run("users pause u1").stdout == "u1 paused\n"
    assert run("users pause u1").stdout == "u1 was paused already\n"
    assert run_json("users show u1")["paused"] is True
    assert run("users resume u1").stdout == "u1 resumed\n"
    assert run("users resume u1").stdout == "u1 was not paused\n"
    run("subscriptions add u1 hourly_sync")
    assert run("users delete u1 --yes").stdout == "u1 deleted: 0 jobs canceled, 1 subscription removed\n"
    assert run("users count").stdout == "2\n"


def test_users_show(platform: Platform) -> None:
    platform.create_user("u1", name="Zoë \x1b[31m\n")
    platform.subscribe("u1", "daily_report", params={"format": "pdf"}, schedule={"timezone": "Asia/Tokyo"}, enabled=False)
    fields, _, subscriptions = run("users show u1").stdout.partition("\n\n")
    assert dict(rows(fields))["name"] == r"Zoë \x1b[31m\n"
    cells = dict(zip(*rows(subscriptions), strict=True))
    assert cells["own schedule"] == "every day at 07:00 Asia/Tokyo"
    assert (cells["enabled"], cells["params"]) == ("no", '{"format": "pdf"}')
    record = run_json("users show u1")
    assert record["name"] == "Zoë \x1b[31m\n"
    assert ISO.fullmatch(record["created"])
    (subscription,) = record["subscriptions"]
    assert subscription["schedule"] == {"interval": {"type": "daily", "timezone": "Asia/Tokyo", "at_time": {"hour": 7}}}
    assert ISO.fullmatch(subscription["since"])


@pytest.mark.usefixtures("on_server")
def test_what_is_wrong_with_users_is_said() -> None:
    assert fails("users show nobody") == "error: no user 'nobody'\n"
    assert fails("users pause nobody") == "error: no user 'nobody'\n"
    assert fails("users resume nobody") == "error: no user 'nobody'\n"
    assert fails("users delete nobody --yes") == "error: no user 'nobody'\n"
    assert "user id 'a b' is not accepted: 1 to 128 characters" in fails("users create good 'a b'")
    assert run("users count").stdout == "0\n"
    assert "is not in the range" in fails("users list --limit 0", code=2)
    assert "there is no terminal to ask on" in fails("users delete nobody", code=2)


@pytest.mark.usefixtures("on_server")
def test_deleting_a_user_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    run("users create u1")
    # click's runner replaces sys.stdin by one that is no terminal
    monkeypatch.setattr("taskplatform.cli.users._on_terminal", lambda: True)
    refused = run("users delete u1", code=1, stdin="n\n")
    assert "Delete u1, 0 subscriptions and all jobs?" in refused.stderr
    assert "nothing was deleted" in refused.stderr
    assert run("users count").stdout == "1\n"
    run("users delete u1", stdin="y\n")
    assert run("users count").stdout == "0\n"


def test_commands_that_need_no_definitions_work_without_them(platform: Platform, on_server: Path) -> None:
    platform.create_user("u1")
    job = platform.enqueue("hourly_sync", user="u1")
    (on_server / "tasks/reports.yaml").write_text("tasks: {\n")
    for line in ("users list", "users pause u1", f"jobs show {job.id}", f"jobs cancel {job.id}", "jobs list", "changes", "nodes"):
        run(line)
    assert "tasks/reports.yaml:" in fails("subscriptions add u1 hourly_sync")


# --- subscriptions ---------------------------------------------------------------------------------------------------


def test_subscriptions(platform: Platform) -> None:
    platform.create_users(["u1", "u2"])
    made = run_json("subscriptions add u1 daily_report --param format=pdf --param n=3 --param t=NaN --param e= --timezone UTC --at 6:30")
    assert made["params"] == {"format": "pdf", "n": 3, "t": "NaN", "e": ""}
    assert made["schedule"] == {"interval": {"type": "daily", "at_time": {"hour": 6, "minute": 30}}}
    shown = dict(rows(run("subscriptions add u2 hourly_sync --disabled").stdout))
    assert (shown["user"], shown["definition"], shown["enabled"], shown["own schedule"]) == ("u2", "hourly_sync", "no", "")

    assert run_json("subscriptions enable u2 hourly_sync")["enabled"] is True
    assert run_json("subscriptions disable u2 hourly_sync")["enabled"] is False
    assert run_json("""subscriptions set-params u1 daily_report --param 'a={"b": [1]}'""")["params"] == {"a": {"b": [1]}}
    assert run_json("subscriptions set-params u1 daily_report --none")["params"] == {}
    cron = {"cron": {"expression": "0 4 * * *", "timezone": "Asia/Tokyo"}}
    assert run_json(f"subscriptions set-schedule u1 daily_report --schedule '{json.dumps(cron)}'")["schedule"] == cron
    assert run_json("subscriptions set-schedule u1 daily_report --at 23:15")["schedule"]["interval"]["at_time"] == {
        "hour": 23,
        "minute": 15,
    }
    assert run_json("subscriptions set-schedule u1 daily_report --default")["schedule"] is None

    assert run("subscriptions pause u1 daily_report").stdout == "u1 daily_report paused\n"
    assert run("subscriptions pause u1 daily_report").stdout == "u1 daily_report was paused already\n"
    assert [row[:3] for row in rows(run("subscriptions list u1").stdout)] == [
        ["definition", "enabled", "paused"],
        ["daily_report", "yes", "yes"],
    ]
    assert run("subscriptions resume u1 daily_report").stdout == "u1 daily_report resumed\n"
    assert run("subscriptions resume u1 daily_report").stdout == "u1 daily_report was not paused\n"
    assert [one["paused"] for one in run_json("subscriptions list u1")] == [False]

    assert run("subscriptions remove u1 daily_report").stdout == "u1 daily_report removed: 0 jobs canceled\n"
    assert run_json("subscriptions list u1") == []


def test_subscribers(platform: Platform) -> None:
    users = [f"u{number}" for number in range(5)]
    platform.create_users(users)
    for user in users:
        platform.subscribe(user, "hourly_sync", schedule={"timezone": "Asia/Tokyo"} if user == "u3" else None)
    assert run("subscriptions subscribers hourly_sync --count").stdout == "5\n"
    assert sorted(run_json("subscriptions subscribers hourly_sync")) == users
    assert sorted(json.loads(run("subscriptions subscribers hourly_sync --limit 2 --all --json").stdout)) == users
    first = run("subscriptions subscribers hourly_sync --limit 2")
    cursor = re.fullmatch(r"there may be more: --cursor ('.*')\n", first.stderr)
    assert cursor is not None
    rest = run_json(f"subscriptions subscribers hourly_sync --cursor {cursor[1]}")
    assert sorted([*first.stdout.split()[1:], *rest]) == users
    assert "is not one that a listing gave" in fails("subscriptions subscribers hourly_sync --cursor nonsense")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("add nobody daily_report", "error: no user 'nobody'"),
        ("add u1 nothing", "error: no definition 'nothing'; `taskplatform tasks list` shows all"),
        ("add u1 daily_report --at 25:00", "a time of day such as"),
        ("add u1 daily_report --timezone Europe/Berln", """did you mean "Europe/Berlin"?"""),
        ("add u1 hourly_sync --at 10:00", "at_time does not go with a cron schedule"),
        ("add u1 daily_report --schedule {} --at 10:00", "schedule excludes timezone and at_time"),
        ("""add u1 daily_report --schedule '{"interval": {"type": "yearly"}}'""", "interval.type"),
        ("add u1 daily_report --param x=" + "y" * 20_000, "at most 16384 are accepted"),
        (r"""add u1 daily_report --param 'x="\ud800"'""", "params of daily_report: not JSON"),
        ("remove u1 daily_report", "error: user 'u1' is not subscribed to 'daily_report'"),
        ("remove u1 @created", "definition id '@created' is not accepted"),
        ("enable u1 daily_report", "is not subscribed"),
        ("disable u1 daily_report", "is not subscribed"),
        ("set-params u1 daily_report --param a=1", "is not subscribed"),
        ("set-schedule u1 daily_report --default", "is not subscribed"),
        ("pause u1 daily_report", "is not subscribed"),
        ("resume nobody daily_report", "no user 'nobody'"),
        ("list nobody", "no user 'nobody'"),
        ("subscribers nothing --count", "no definition 'nothing'"),
    ],
)
def test_what_is_wrong_with_a_subscription_is_said(platform: Platform, line: str, said: str) -> None:
    platform.create_user("u1")
    assert said in fails(f"subscriptions {line}")
    assert platform.subscriptions("u1") == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("add u1", "Missing argument 'DEFINITION'"),
        ("add u1 daily_report --param format", "'format' is not of the form name=value"),
        ("add u1 daily_report --param =1", "'=1' is not of the form name=value"),
        ("add u1 daily_report --param a=1 --param a=2", "the same name is given twice"),
        ("add u1 daily_report --schedule {", "'{' is not JSON"),
        ("add u1 daily_report --schedule '[]'", "is JSON, but not an object"),
        ("set-params u1 daily_report", "give either --param, or --none"),
        ("set-params u1 daily_report --none --param a=1", "give either --param, or --none"),
        ("set-schedule u1 daily_report", "or --default"),
        ("set-schedule u1 daily_report --default --timezone UTC", "or --default"),
        ("import nowhere.csv", "'nowhere.csv': No such file or directory"),
        ("import tasks", "'tasks': Is a directory"),
        ("import cli_test_functions.py", "give --format csv or --format jsonl"),
        ("import - --format xml", "'xml' is not one of"),
    ],
)
def test_a_wrong_command_line_of_subscriptions_is_said(line: str, said: str) -> None:
    assert said in fails(f"subscriptions {line}", code=2)


def test_import(platform: Platform, on_server: Path) -> None:
    lines = 5000
    header = "user,definition,params,timezone\n"
    body = "".join(f'u{n // 2},{("daily_report", "hourly_sync")[n % 2]},"{{""n"": {n}}}",Asia/Tokyo\n' for n in range(lines))
    (on_server / "all.csv").write_text(header + body)
    done = run("subscriptions import all.csv --create-users --json")
    assert json.loads(done.stdout) == {
        "created": lines,
        "changed": 0,
        "unchanged": 0,
        "users_created": lines // 2,
        "faulty": 0,
        "faults": [],
    }
    assert re.search(r"^[\d,]+ of ([\d,]+) bytes read\n(.*\n)*\1 of \1 bytes read$", done.stderr.rstrip("\n"))
    assert platform.store.count_users() == lines // 2
    assert platform.store.count_subscribers("daily_report") == lines // 2
    subscription = platform.subscription("u77", "hourly_sync")
    assert subscription.params == {"n": 155}
    assert subscription.schedule == Cron(expression="5 * * * *", timezone="Asia/Tokyo")

    again = dict(rows(run("subscriptions import all.csv").stdout))
    assert again == {"created": "0", "changed": "0", "unchanged": str(lines), "users created": "0", "faulty": "0"}


def test_import_tells_faults_and_takes_the_rest(platform: Platform, on_server: Path) -> None:
    platform.create_user("u1")
    bad = [f'{{"user": "stranger{n}", "definition": "daily_report"}}' for n in range(24)]
    good = [json.dumps({"user": "u1", "definition": "daily_report", "at_time": "10:30"}), '{"user": "u1", "definition": "clean"}']
    (on_server / "some.jsonl").write_text("\n".join([good[0], *bad, "{", good[1]]) + "\n")
    result = run("subscriptions import some.jsonl", code=1)
    assert dict(rows(result.stdout))["created"] == "2"
    told = [line for line in result.stderr.splitlines() if line.startswith("some.jsonl:")]
    assert told == [f"some.jsonl:{n + 2}: no user 'stranger{n}'" for n in range(20)]
    assert result.stderr.endswith("error: 25 faulty lines, 5 of them not shown; all others are in\n")
    assert [one.definition for one in platform.subscriptions("u1")] == ["clean", "daily_report"]

    report = run_json("subscriptions import some.jsonl", code=1)
    assert (report["unchanged"], report["faulty"], len(report["faults"])) == (2, 25, 25)
    assert report["faults"][-1] == {"line": 26, "message": "is not JSON: Expecting property name enclosed in double quotes at character 2"}


def test_import_from_stdin(platform: Platform) -> None:
    result = run("subscriptions import - --format csv --create-users", stdin="user,definition\nu1,clean\n")
    assert dict(rows(result.stdout))["created"] == "1"
    assert platform.subscriptions("u1")[0].definition == "clean"
    assert "give --format" in fails("subscriptions import -", code=2)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_jobs(platform: Platform) -> None:
    platform.create_user("u1")
    platform.subscribe("u1", "daily_report", params={"format": "pdf", "pages": 2})
    before = datetime.now(UTC)
    job = run_json("jobs submit daily_report u1 --param pages=3 --countdown 10m --priority low --idempotency-key k")
    assert (job["state"], job["priority"], job["source"], job["occurrence"]) == ("pending", "low", "api", None)
    assert job["params"] == {"format": "pdf", "pages": 3}
    assert 599 < (datetime.fromisoformat(job["execute_after"]) - before).total_seconds() < 660
    assert run_json("jobs submit daily_report u1 --countdown 5 --idempotency-key k")["id"] == job["id"]
    tomorrow = (before + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M")
    assert run_json(f"jobs submit hourly_sync u1 --eta {tomorrow}")["execute_after"] == f"{tomorrow}:00.000Z"
    assert run_json(f"jobs submit hourly_sync u1 --eta {tomorrow}-01:30")["execute_after"] > f"{tomorrow}:00.000Z"
    assert dict(rows(run("jobs submit clean u1 --countdown 3.5").stdout))["state"] == "pending"

    table = rows(run("jobs list").stdout)
    assert table[0][:2] == ["job", "state"]
    assert {row[0].split(":")[0] for row in table[1:]} == {"daily_report", "hourly_sync", "clean"}
    assert [one["id"] for one in run_json("jobs list --definition daily_report --user u1 --since 1h")] == [job["id"]]
    assert run_json("jobs list --since 2999-01-01") == []
    assert run_json("jobs list --until 1h") == []
    assert run_json("jobs list --state completed --state failed") == []
    assert len(json.loads(run("jobs list --state pending --limit 1 --all --json").stdout)) == 4
    newest = run("jobs list --limit 1 --json")
    cursor = newest.stderr.split(" ")[-1].strip()
    rest = run_json(f"jobs list --cursor {cursor}")
    assert len({one["id"] for one in [*json.loads(newest.stdout), *rest]}) == 4

    assert run(f"jobs cancel {job['id']}").stdout == f"{job['id']} canceled\n"
    fields, _, history = run(f"jobs show {job['id']}").stdout.partition("\n\n")
    assert dict(rows(fields))["state"] == "canceled"
    assert [row[1:3] for row in rows(history)] == [["from", "to"], ["", "pending"], ["pending", "canceled"]]
    record = run_json(f"jobs show {job['id']}")
    assert [one["to_state"] for one in record["history"]] == ["pending", "canceled"]
    assert ISO.fullmatch(record["history"][0]["at"])
    assert run(f"jobs retry {job['id']}").stdout == f"{job['id']} pending\n"


def work(platform: Platform, state: JobState, **ending: Any) -> None:
    """Be the worker that runs the next job that is submitted, and end it so."""
    platform.store.heartbeat("w@host", slots=1, queues=list(Priority), buffer=1.0, info={"host": "host", "pid": "7"})
    job = wait_until(lambda: next(iter(platform.jobs(state=JobState.QUEUED).items), None))
    assert job is not None
    assert platform.store.start(job.id, delivery=job.delivery, worker="w@host").go
    assert platform.store.finish(job.id, delivery=job.delivery, worker="w@host", state=state, **ending)


@pytest.mark.parametrize(("state", "code"), [(JobState.COMPLETED, 0), (JobState.FAILED, 1)])
def test_waiting_for_a_job(platform: Platform, state: JobState, code: int) -> None:
    platform.create_user("u1")
    platform.store.heartbeat("w@host", slots=1, queues=list(Priority), buffer=1.0)
    worker = threading.Thread(target=work, args=(platform, state), kwargs={"reason": "HTTP 418", "detail": {"status": 418}})
    worker.start()
    result = run("jobs submit hourly_sync u1 --wait --json", code=code)
    worker.join()
    record = json.loads(result.stdout)
    assert (record["state"], record["reason"], record["worker"]) == (state, "HTTP 418", "w@host")
    assert result.stderr.splitlines()[-1] == f"{state}: HTTP 418"
    shown = run(f"jobs show {record['id']}").stdout
    assert re.search(r"^took\t(\d+ ms|\d\.\d s)$", shown, re.MULTILINE)
    assert '{"status": 418}' in shown
    if code:
        assert run(f"jobs retry {record['id']}").exit_code == 0
    else:
        assert "only a failed, timed_out, canceled or rejected job can be retried" in fails(f"jobs retry {record['id']}")
        assert "it cannot be canceled any more" in fails(f"jobs cancel {record['id']}")


def test_one_job_that_cannot_be_canceled_holds_back_no_other(platform: Platform) -> None:
    platform.create_user("u1")
    job = platform.enqueue("clean", user="u1", countdown=60)
    result = run(f"jobs cancel no-such-job {job.id}", code=1)
    assert result.stdout == f"{job.id} canceled\n"
    assert result.stderr.startswith("error: no job 'no-such-job'")


def test_jobs_get_another_priority(platform: Platform) -> None:
    platform.create_user("u1")
    later = [platform.enqueue("clean", user="u1", countdown=60) for _ in range(2)]
    ended = platform.enqueue("clean", user="u1", countdown=60)
    platform.cancel(ended.id)
    assert run(f"jobs priority {later[0].id} {later[1].id} high").stdout == f"{later[0].id} high\n{later[1].id} high\n"
    assert platform.store.waiting() == {Priority.HIGH: 2, Priority.MEDIUM: 0, Priority.LOW: 0}
    assert "given by" in run(f"jobs show {later[0].id}").stdout
    result = run(f"jobs priority no-such-job {ended.id} {later[0].id} medium", code=1)
    assert result.stdout == f"{later[0].id} medium\n"
    assert result.stderr.splitlines()[0].startswith("error: no job 'no-such-job'")
    assert result.stderr.splitlines()[1] == f"error: job {ended.id} is canceled: the priority of a job that waits can be changed"
    assert "'urgent' is not one of 'high', 'medium', 'low'" in fails(f"jobs priority {later[0].id} urgent", code=2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("submit nothing u1", "no definition 'nothing'"),
        ("submit clean nobody", "no user 'nobody'"),
        ("submit clean 'a b'", "user id 'a b' is not accepted"),
        ("submit clean u1 --countdown 1 --eta 2030-01-01", "countdown and eta exclude each other"),
        ("submit clean u1 --eta 2999-01-01", "is more than 366 days ahead"),
        ("submit clean u1 --idempotency-key ''", "a text of 1 to 255 characters is"),
        ("show no-such-job", "no job 'no-such-job': it never was, or its record is past the retention"),
        ("retry no-such-job", "no job 'no-such-job'"),
        ("list --user nobody", "no user 'nobody'"),
        ("list --definition nothing", "no definition 'nothing'"),
        ("list --cursor nonsense", "is not one that a listing gave"),
    ],
)
def test_what_is_wrong_with_a_job_is_said(platform: Platform, line: str, said: str) -> None:
    platform.create_user("u1")
    assert said in fails(f"jobs {line}")
    assert not platform.jobs().items


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("submit clean u1 --countdown -1", "is out of range"),
        ("submit clean u1 --countdown nan", "is out of range"),
        ("submit clean u1 --countdown soon", "'soon' is not a duration"),
        ("submit clean u1 --eta tomorrow", "'tomorrow' is not a time such as 2026-01-31T09:00:00Z"),
        ("submit clean u1 --eta 10m", "'10m' is not a time"),
        ("list --since yesterday", "'yesterday' is neither a time such as"),
        ("list --state done", "'done' is not one of 'pending'"),
        ("list --limit 10001", "is not in the range"),
    ],
)
def test_a_wrong_command_line_of_jobs_is_said(line: str, said: str) -> None:
    assert said in fails(f"jobs {line}", code=2)


# --- dead letters ----------------------------------------------------------------------------------------------------


def dead_job(platform: Platform, reason: str, user: str = "u1", definition: str = "clean") -> str:
    """The id of a job that has just died."""
    platform.create_user(user)
    platform.store.heartbeat("w@host", slots=9, queues=list(Priority), buffer=1.0)
    job = platform.enqueue(definition, user=user)
    assert platform.store.start(job.id, delivery=job.delivery, worker="w@host").go
    assert platform.store.finish(job.id, delivery=job.delivery, worker="w@host", state=JobState.FAILED, reason=reason)
    return job.id


def test_dead_letters(platform: Platform) -> None:
    first = dead_job(platform, "HTTP 500")
    second = dead_job(platform, "poison pill: its process died, 3 losses in all", "u2")
    third = dead_job(platform, "HTTP 404", definition="hourly_sync")
    table = rows(run("dead-letters list").stdout)
    assert table[0] == ["job", "died", "state", "attempt", "poison", "reason"]
    assert [row[0] for row in table[1:]] == [third, second, first]
    assert [row[4] for row in table[1:]] == ["no", "yes", "no"]
    found = run_json('dead-letters list --reason "poison pill"')
    assert [(one["id"], one["poison"], one["state"]) for one in found] == [(second, True, "failed")]
    assert ISO.fullmatch(found[0]["finished"])
    assert [one["id"] for one in run_json("dead-letters list --definition clean --user u1 --since 1h")] == [first]
    page = run("dead-letters list --limit 2 --json")
    cursor = page.stderr.split("'")[1]
    assert [one["id"] for one in run_json(f"dead-letters list --cursor '{cursor}'")] == [first]
    assert [one["to_state"] for one in run_json(f"dead-letters show {first}")["history"]][-1] == "failed"
    assert "HTTP 500" in run(f"dead-letters show {first}").stdout

    assert run(f"dead-letters redrive {first}").stdout == f"{first} queued\n"
    result = run(f"dead-letters redrive {first} no-such-job", code=1)
    assert result.stdout == f"{first} queued\n"
    assert "no job 'no-such-job'" in result.stderr
    assert run("dead-letters redrive --user u2").stdout == "1 job redriven\n"
    assert run(f"dead-letters discard {third} {third}").stdout == f"{third} discarded\n" * 2
    assert run("dead list").stdout.count("\n") == 1, "its former name"
    assert "is queued and no dead letter; `taskplatform dead-letters list` shows those" in fails(f"dead-letters discard {first}")
    (change,) = run_json("changes hourly_sync u1")
    assert (change["kind"], change["detail"]) == ("dead letters discarded", f"1 dead letter, {third}: HTTP 404")


def test_dead_letters_of_a_removed_definition_stay(platform: Platform) -> None:
    job_id = dead_job(platform, "HTTP 500")
    platform.store.retract("clean", actor="tests")
    result = run("dead-letters redrive --all")
    assert (result.stdout, result.stderr) == ("0 jobs redriven\n", "1 job left: the definition was removed from the catalogue\n")
    assert "its definition was removed from the catalogue" in fails(f"dead-letters redrive {job_id}")
    assert "its definition 'clean' was removed from the catalogue" in fails(f"jobs retry {job_id}")
    assert run("dead-letters discard --all").stdout == "1 job discarded\n"


@pytest.mark.parametrize("verb", ["redrive", "discard"])
@pytest.mark.parametrize("line", ["", "--all --user u1", "some-job --all", "some-job --reason x"])
def test_nobody_acts_on_all_dead_letters_by_mistake(platform: Platform, verb: str, line: str) -> None:
    assert "give ids, or filters, or --all" in fails(f"dead-letters {verb} {line}", code=2)


# --- operations ------------------------------------------------------------------------------------------------------


def test_trigger(platform: Platform) -> None:
    for user in ("u1", "u2"):
        platform.create_user(user)
        platform.subscribe(user, "daily_report")
    said = run("trigger daily_report --window 5m").stdout
    match = re.fullmatch(r"daily_report triggered at (\S+) for 2 subscribers, over 5m\n", said)
    assert match is not None
    assert ISO.fullmatch(match[1])
    (occurrence,) = platform.store.occurrences("daily_report")
    assert (moment_text(occurrence.at_ms), occurrence.window_ms) == (match[1], 300_000)
    assert run("trigger clean").stdout.endswith("for 0 subscribers, over 1m\n")
    assert "no definition 'nothing'" in fails("trigger nothing")
    keyed = run("trigger clean --key monday").stdout
    assert run("trigger clean --key monday").stdout == keyed
    assert run("trigger clean --key tuesday").stdout != keyed
    assert "a text of 1 to 255 characters is" in fails("trigger clean --key ''")
    assert "is not a duration" in fails("trigger daily_report --window wide", code=2)
    platform.pause_definition("clean", why="the API is down")
    paused = run("trigger clean")
    assert paused.stdout.endswith("for 0 subscribers, over 1m\n")
    assert "this occurrence is skipped: Definition clean is paused (the API is down)" in paused.stderr
    assert run("trigger daily_report").stderr == ""


def test_trigger_says_what_the_limits_need(platform: Platform) -> None:
    platform.create_users(["u1", "u2", "u3"])
    for user in ("u1", "u2", "u3"):
        platform.subscribe(user, "clean")
    server = redis.Redis.from_url(platform.settings.redis_url)
    server.hset(f"{platform.settings.namespace}:limits", "total", "0.01 2 -")
    server.close()
    assert run("trigger clean").stdout.endswith("for 3 subscribers, over 5m (asked 1m)\n")
    cells = dict(zip(*rows(run("occurrences clean").stdout), strict=True))
    assert cells["window"] == "5m (asked 1m)"
    assert cells["reason"].endswith("window widened from 1m to 5m: limit total 0.01/s, 3 jobs")
    (occurrence,) = run_json("occurrences clean")
    assert (occurrence["window"], occurrence["asked"]) == ("5m", "1m")
    assert run("trigger clean --window 20m").stdout.endswith("over 20m\n")


def test_pause_and_resume_a_definition(platform: Platform) -> None:
    assert run("pause daily_report --why 'the report API is down'").stdout == "daily_report paused\n"
    assert run("pause daily_report").stdout == "daily_report was paused already\n"
    assert platform.store.definition_pauses() == {"daily_report": "the report API is down"}
    assert run("resume daily_report").stdout == "daily_report resumed\n"
    assert run("resume daily_report").stdout == "daily_report was not paused\n"
    assert platform.store.definition_pauses() == {}
    assert "no definition 'nothing'" in fails("pause nothing")
    assert "no definition 'nothing'" in fails("resume nothing")


def test_changes(platform: Platform) -> None:
    platform.create_user("u1")
    platform.pause_definition("clean", why="a\tb")
    assert [row[1:] for row in rows(run("changes --limit 2").stdout)] == [
        ["who", "what", "subject", "detail"],
        ["tests", "definition paused", "clean", r"a\tb"],
        ["tests", "user created", "u1", ""],
    ]
    (newest,) = run_json("changes --limit 1")
    assert ISO.fullmatch(newest.pop("at"))
    assert newest == {"actor": "tests", "kind": "definition paused", "subject": "clean", "detail": "a\tb"}


def test_changes_that_name_very_many_are_shortened(platform: Platform) -> None:
    for name in "abcdefg":
        platform.store.publish(replace(published(platform.definition("clean")), id=name), actor="tests")
    platform.store.announce(actor="tests")

    def subject(command: str) -> str:
        cells = dict(zip(*rows(run(command).stdout)[:2], strict=True))
        return str(cells["subject"])

    assert subject("changes b e") == "b e and 5 more"
    assert subject("changes") == "a b and 5 more"
    assert run_json("changes b --limit 1")[0]["subject"] == "a b c d e f g"


def test_changes_about_somebody(platform: Platform) -> None:
    platform.create_user("u1")
    platform.create_user("u2")
    platform.subscribe("u1", "clean")
    platform.subscribe("u2", "clean")
    platform.pause_subscription("u1", "clean")
    kinds = [row[2] for row in rows(run("changes u1 clean").stdout)[1:]]
    assert kinds == ["subscription paused", "subscribed"]


def test_occurrences(platform: Platform) -> None:
    assert run_json("occurrences clean") == []
    platform.create_user("u1")
    platform.subscribe("u1", "clean")
    platform.pause_definition("clean", why="the API is down")
    at, _ = platform.trigger("clean")
    platform.store.plan(f"clean|t{int(at.timestamp() * 1000)}", horizon=timedelta(seconds=5), batch=10)
    (occurrence,) = run_json("occurrences clean")
    assert (occurrence["state"], occurrence["reason"]) == ("skipped", "definition paused, the API is down")
    assert "the API is down" in run("occurrences clean").stdout
    assert "no definition 'nothing'" in fails("occurrences nothing")


def test_nodes(platform: Platform) -> None:
    assert run_json("nodes") == []
    platform.store.heartbeat("w@host", slots=3, queues=["high", "low"], buffer=1.0, info={"host": "host", "pid": "7"})
    cells = dict(zip(*rows(run("nodes").stdout), strict=True))
    assert (cells["worker"], cells["queues"], cells["running"]) == ("w@host", "high,low", "0 of 3")
    assert re.fullmatch(r"\d+ ms|\d\.\d s", cells["silent for"])
    (node,) = run_json("nodes")
    assert ISO.fullmatch(node.pop("heartbeat"))
    assert node == {
        "id": "w@host",
        "slots": 3,
        "queues": ["high", "low"],
        "running": [],
        "info": {"host": "host", "pid": "7"},
        "drained": False,
    }


def test_beats(platform: Platform) -> None:
    assert run_json("beats") == []
    alive = timedelta(seconds=15)
    platform.store.attend("beat@host#1", catalogue="0a1b2c", number=None, leads=True, alive=alive, account=20 * alive)
    cells = dict(zip(*rows(run("beats").stdout), strict=True))
    assert (cells["beat"], cells["leads"], cells["catalogue"], cells["number"]) == ("beat@host#1", "yes", "0a1b2c", "1")
    assert re.fullmatch(r"\d+ ms|\d\.\d s", cells["silent for"])
    (beat,) = run_json("beats")
    assert ISO.fullmatch(beat.pop("since"))
    assert ISO.fullmatch(beat.pop("heartbeat"))
    assert beat == {"id": "beat@host#1", "leads": True, "catalogue": "0a1b2c", "number": 1, "info": {}}


@pytest.mark.parametrize("answer", [0, 1])
def test_up_and_demo_are_run(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    calls: list[tuple[Any, ...]] = []

    def up(given: Settings, **options: Any) -> int:
        calls.append((given.tasks_dir, options))
        return answer

    monkeypatch.setattr("taskplatform.local.up", up)
    monkeypatch.setattr("taskplatform.demo.run", lambda: answer)
    run("up --workers 4 --slots 2 --no-flower", code=answer)
    run("up", code=answer)
    run("demo", code=answer)
    assert calls == [
        (Path("tasks"), {"workers": 4, "slots": 2, "flower": False}),
        (Path("tasks"), {"workers": 2, "slots": None, "flower": True}),
    ]
    assert "is not in the range" in fails("up --workers 0", code=2)


# --- limits ----------------------------------------------------------------------------------------------------------

LIMIT_COLUMNS = ["limit", "rate", "burst", "concurrency", "free now", "reserved", "in flight", "held until", "from", "configured"]


def test_limits(platform: Platform) -> None:
    assert rows(run("limits list").stdout) == [LIMIT_COLUMNS]
    assert run_json("limits list") == []
    configured = {"total": Limit(10, 15), "user": Limit(concurrency=2)}
    platform.store.configure_limits(configured, actor="beat")
    limited = Definition.model_validate({"id": "clean", "name": "x", "call": "a:b", "interval": {"type": "daily"}, "rate_limit": "90/m"})
    platform.store.publish(published(limited), actor="beat")
    assert run("limits set host:api.example.com --rate 5/s --burst 4 --concurrency 3").stdout == (
        "host:api.example.com 5/s burst 4 concurrency 3\n"
    )
    assert run("limits set user --concurrency 1").stdout == "user concurrency 1\n"
    # so much of a burst is kept back as comes in the time that a start may take to reach its target
    assert rows(run("limits list").stdout)[1:] == [
        ["definition:clean", "90/m", "2", "", "1", "0", "", "", "definition", ""],
        ["host:api.example.com", "5/s", "4", "3", "3", "0", "0", "", "live", "none"],
        ["total", "10/s", "15", "", "14", "0", "", "", "settings", ""],
        ["user", "", "", "1", "", "", "0", "", "live", "concurrency 2"],
    ]
    assert run_json("limits list")[1] == {
        "name": "host:api.example.com",
        "limit": {"per_second": 5.0, "burst": 4, "concurrency": 3},
        "configured": None,
        "live": True,
        "tokens": 3.5,
        "reserved": 0,
        "in_flight": 0,
        "held_until": None,
        "source": "live",
    }

    assert run("limits reset user").stdout == "user concurrency 2\n"
    assert run("limits reset host:api.example.com").stdout == "host:api.example.com none\n"
    assert run("limits set total --none").stdout == "total none\n"
    assert rows(run("limits list").stdout)[2:] == [
        ["total", "", "", "", "", "", "", "", "live", "10/s burst 15"],
        ["user", "", "", "2", "", "", "0", "", "settings", ""],
    ]
    again = run("limits reset user")
    assert (again.stdout, again.stderr) == ("user concurrency 2\n", "user was not set live\n")
    assert [row[2:] for row in rows(run("changes --limit 2").stdout)[1:]] == [
        ["limit changed", "total", "none, set live"],
        ["limit changed", "host:api.example.com", "none"],
    ]


def test_a_limit_shows_what_it_holds_back(platform: Platform) -> None:
    platform.create_user("u1")
    run("limits set definition:clean --rate 1/h --burst 3")
    run("limits set user:u1 --concurrency 2")
    platform.store.heartbeat("w@host", slots=9, queues=list(Priority), buffer=1.0)
    for _ in range(3):
        platform.enqueue("clean", user="u1")
    cells = {row[0]: row[4:7] for row in rows(run("limits list").stdout)[1:]}
    assert cells == {"definition:clean": ["0", "2", ""], "user:u1": ["", "", "2"]}
    run("limits set definition:clean --rate 1/h --burst 1")
    assert rows(run("limits list").stdout)[1][4:6] == ["0", "2"]
    assert run_json("limits list")[0]["tokens"] < 0


def test_breakers(platform: Platform) -> None:
    calls = {"endpoint": "https://api.example.com/"}
    calling = Definition.model_validate({"id": "clean", "name": "x", "config": calls, "interval": {"type": "daily"}})
    platform.store.publish(published(calling), actor="beat")
    platform.create_user("u1")
    platform.store.heartbeat("w@host", slots=9, queues=list(Priority), buffer=1.0)
    assert ["api.example.com", "closed"] in [row[:2] for row in rows(run("breakers list").stdout)]

    assert run("breakers open api.example.com --for 10m --reason maintenance").stdout == "api.example.com open\n"
    (record,) = [one for one in run_json("breakers list") if one["state"] != "closed"]
    assert (record["state"], record["openings"], record["reason"], record["probe"]) == ("open", 1, "maintenance", "")
    job = platform.enqueue("clean", user="u1")
    assert job.state == "pending"
    shown = run(f"jobs show {job.id}").stdout
    assert re.search(r"waits\tits host api.example.com is held back since .* until .*: its breaker is open \(maintenance\)", shown)
    assert "what helps\ttaskplatform breakers reset api.example.com" in shown
    assert run_json(f"jobs show {job.id}")["held_back"]["host"] == "api.example.com"
    (limit,) = [row for row in rows(run("limits list").stdout) if row[0] == "host:api.example.com"]
    assert limit[LIMIT_COLUMNS.index("held until")]
    assert limit[LIMIT_COLUMNS.index("from")] == "breaker"
    (problem,) = [one for one in platform.health().problems if one.code == "breaker_open"]
    assert (problem.subject, problem.severity) == ("api.example.com", "warning")
    assert "taskplatform breakers reset api.example.com" in problem.text

    assert run("breakers reset api.example.com").stdout == "api.example.com closed\n"
    assert platform.job(job.id).state == "queued"
    assert run_json(f"jobs show {job.id}")["held_back"] is None
    again = run("breakers reset api.example.com")
    assert (again.stdout, again.stderr) == ("api.example.com closed\n", "api.example.com was not held back\n")


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("open api.example.com", "Missing option '--for'", 2),
        ("open api.example.com --for 0s", "span 0:00:00 is not accepted: up to 366 days is", 1),
        ("open api.example.com --for 400d", "'400d' is out of range", 2),
        ("open api.example.com --for soon", "soon", 2),
        ("open https://API.example.com/x --for 1m", "host 'https://API.example.com/x' is not accepted", 1),
        ("reset a/b", "host 'a/b' is not accepted", 1),
    ],
)
def test_breakers_that_are_refused(platform: Platform, line: str, said: str, code: int) -> None:
    assert said in fails(f"breakers {line}", code=code)


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("set total", "give --rate, --concurrency or both, or --none", 2),
        ("set total --none --rate 5/s", "give --rate, --concurrency or both, or --none", 2),
        ("set total --rate 5/s --burst 0", "0 is not in the range 1<=x<=1000000", 2),
        ("set total --burst 5", "limit total: takes rate, concurrency, or both", 1),
        ("set total --rate fast", """limit total: rate: 'fast' is not a rate such as "10/s\"""", 1),
        ("set total --concurrency 5", "limit total: takes rate and burst", 1),
        ("set user --rate 5/s", "limit user: takes concurrency", 1),
        ("set host:a --burst 5 --concurrency 1", "limit host:a: burst: goes with rate", 1),
        (
            "set totl --rate 5/s",
            """limit 'totl' is not known (did you mean "total"?): total, definition:ID, host:HOST, user and user:ID are""",
            1,
        ),
        ("reset hosts:a", """limit 'hosts:a' is not known (did you mean "host"?)""", 1),
        ("set host:API.example.com --rate 5/s", """(did you mean "api.example.com"?)""", 1),
        ("set definition:daily_repot --rate 5/s", """there is no definition 'daily_repot' (did you mean "daily_report"?)""", 1),
        ("set 'user:a b' --concurrency 5", "user id 'a b' is not accepted", 1),
    ],
)
def test_what_is_wrong_with_a_limit_is_said(platform: Platform, line: str, said: str, code: int) -> None:
    assert said in fails(f"limits {line}", code=code)
    assert platform.limits() == []


# --- the process -----------------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
from taskplatform.cli import main
code = main()
{after}
sys.exit(code)
"""


def start(*words: str | bytes, after: str = "", **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **options.pop("env", {})}
    argv = [sys.executable, "-c", PROGRAM.format(after=after), *words]
    return subprocess.Popen(argv, env=environment, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"


def test_help_loads_nothing_heavy_and_tasks_no_celery() -> None:
    code, out, loaded = finish(start("--help", after=LOADED))
    assert (code, out[:6]) == (0, "Usage:")
    assert not {"pydantic", "yaml", "redis", "rich", "celery", "requests", "asyncio"} & set(loaded.split())
    code, out, loaded = finish(start("tasks", "list", after=LOADED))
    assert (code, out.count("\n")) == (0, 4)
    assert not {"redis", "celery", "kombu", "requests"} & set(loaded.split())


def test_the_console_script_is_this_program() -> None:
    script = Path(sys.executable).parent / "taskplatform"
    answer = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, timeout=120)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", answer.stdout)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://someone:hunter2@127.0.0.1:1/3?health_check_interval=5", "redis://127.0.0.1:1/3:"),
        ("unix:///nowhere/redis.sock?password=hunter2", "unix:///nowhere/redis.sock:"),
    ],
)
def test_without_redis_it_says_where_it_looked_and_what_to_start(url: str, place: str) -> None:
    code, out, err = finish(start("users", "count", env={"TASKPLATFORM_REDIS_URL": url}))
    assert (code, out) == (3, "")
    assert err.startswith("error: Redis cannot be reached: ")
    assert f"TASKPLATFORM_REDIS_URL is {place} start that server, or the whole platform with `taskplatform up`" in err
    assert "hunter2" not in err
    assert "Traceback" not in err


def test_a_wrong_password_is_said_and_not_shown(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", server.url.replace("//", "//someone:hunter2@"))
    said = fails("users count", code=3)
    assert said.startswith("error: Redis did not let us in: ")
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("variables", "said", "exit_code"),
    [
        ({"TASKPLATFORM_REDIS_URL": "redis://127.0.0.1:1/0?no_such_option=1"}, "error: the URL of Redis is not accepted: ", 3),
        ({"TASKPLATFORM_REDIS_URL": "http://127.0.0.1"}, "error: TASKPLATFORM_REDIS_URL", 1),
        ({"TASKPLATFORM_WORKER_SLOTS": "many", "TASKPLATFORM_COLOUR": "red"}, "error: TASKPLATFORM_COLOUR", 1),
    ],
)
def test_a_bad_setting_is_said(variables: Mapping[str, str], said: str, exit_code: int) -> None:
    code, out, err = finish(start("users", "count", env=variables))
    assert (code, out) == (exit_code, "")
    assert said in err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_a_reader_that_goes_away_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    process = start("tasks", "list", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.readline() == b"[\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_ctrl_c_ends_the_waiting_and_not_the_job(platform: Platform) -> None:
    platform.create_user("u1")
    process = start("jobs", "submit", "clean", "u1", "--wait")
    assert process.stderr is not None
    assert b"is submitted" in process.stderr.readline()
    process.send_signal(2)
    code, out, err = finish(process)
    assert (code, out, err.strip()) == (130, "", "")
    assert [job.state for job in platform.jobs().items] == [JobState.PENDING]


def test_an_argument_that_is_not_text_is_said() -> None:
    code, _, err = finish(start("users", "create", b"\xff\xfe"))
    assert code == 2
    assert "is not UTF-8 text" in err


def test_characters_that_the_terminal_has_not_are_escaped(platform: Platform) -> None:
    platform.create_user("u1", name="Zo 名")
    code, out, _ = finish(start("users", "show", "u1", env={"PYTHONIOENCODING": "latin-1"}))
    assert code == 0
    assert r"Zo \u540d" in out


def on_terminal(*words: str) -> tuple[int, str]:
    """Run it on a terminal of 100 columns: the exit code, and what the terminal got, without its colours."""
    controller, terminal = pty.openpty()
    process = start(*words, stdin=terminal, stdout=terminal, stderr=terminal, env={"COLUMNS": "100", "TERM": "xterm"})
    os.close(terminal)
    got = b""
    try:
        while chunk := os.read(controller, 65_536):
            got += chunk
    except OSError:  # Linux says the end of a terminal so
        pass
    os.close(controller)
    return finish(process)[0], re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", got.decode())


def test_a_terminal_gets_tables_and_a_progress_bar(on_server: Path) -> None:
    (on_server / "all.csv").write_text("user,definition\n" + "".join(f"u{n},clean\n" for n in range(3000)))
    code, shown = on_terminal("subscriptions", "import", "all.csv", "--create-users")
    assert code == 0
    assert "importing" in shown
    assert "━" in shown
    assert re.search(r"created +3000", shown)
    code, shown = on_terminal("users", "list", "--limit", "1500")
    assert code == 0
    assert shown.count("created") == 1
    assert re.search(r"\nu0 +\S+Z +no", shown)
    assert "there may be more" in shown
    code, shown = on_terminal("users", "show", "u1")
    assert code == 0
    assert re.search(r"paused +no", shown)


@pytest.mark.usefixtures("on_server")
def test_main_returns_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["users", "create", "u1"]) == 0
    assert main(["users", "show", "nobody"]) == 1
    assert main(["users", "show"]) == 2
    out, err = capsys.readouterr()
    assert out == "u1 created\n"
    assert err.startswith("error: no user 'nobody'\nUsage: taskplatform users show")


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_are_shown_in_one_way() -> None:
    assert moment_text(1_800_000_000_007) == "2027-01-15T08:00:00.007Z"
    assert moment_text(0) == "1970-01-01T00:00:00.000Z"
    assert moment_text(None) == ""
    assert (span_text(1234), exact_text(1234)) == ("1.2 s", "1s234ms")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"type": "minutely", "value": 5}, "every 5 minutes"),
        ({"type": "hourly", "at_time": {"minute": 5}}, "every hour at :05 UTC"),
        ({"type": "hourly", "value": 6, "at_time": {"hour": 1}}, "every 6 hours at 01:00 UTC"),
        ({"type": "weekly", "weekday": "friday", "timezone": "Asia/Tokyo"}, "every week on friday at 00:00 Asia/Tokyo"),
        ({"type": "monthly", "day_of_month": 31}, "every month on day 31 at 00:00 UTC"),
    ],
)
def test_schedules_are_said_in_words(schedule: dict[str, Any], words: str) -> None:
    assert schedule_text(Interval.model_validate(schedule)) == words


def test_a_time_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert moment("2026-01-31T09:00") == datetime(2026, 1, 31, 9, tzinfo=UTC)
        assert moment("2026-01-31") == past("2026-01-31T00:00Z") == datetime(2026, 1, 31, tzinfo=UTC)
        assert moment("2026-01-31T09:00+01:00") == datetime(2026, 1, 31, 8, tzinfo=UTC)
        assert abs(datetime.now(UTC) - timedelta(hours=1) - past("1h")) < timedelta(minutes=1)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_day_ago(platform: Platform) -> None:
    platform.create_user("u1")
    platform.enqueue("clean", user="u1")
    soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    assert len(run_json(f"jobs list --since 1d --until {soon}")) == 1
    time.sleep(0.002)  # times are in milliseconds
    assert run_json(f"jobs list --since {datetime.now(UTC).isoformat()}") == []


def test_garbage(platform: Platform) -> None:
    assert run_json("garbage list") == []
    platform.store.set_aside("low", b"\xffhello" + b"x" * 200, reason="not UTF-8", worker="w@host#1")
    cells = dict(zip(*rows(run("garbage list").stdout), strict=True))
    assert (cells["queue"], cells["reason"], cells["worker"]) == ("low", "not UTF-8", "w@host#1")
    assert cells["begins"].startswith("\\xffhello")
    (kept,) = run_json("garbage list")
    assert ISO.fullmatch(kept.pop("at"))
    assert kept == {"queue": "low", "reason": "not UTF-8", "worker": "w@host#1", "text": "\\xffhello" + "x" * 200}
    assert [one.reason for one in platform.garbage()] == ["not UTF-8"]
    assert run("garbage clear").stdout == "1 message forgotten\n"
    assert run("garbage clear").stdout == "0 messages forgotten\n"
    assert platform.clear_garbage() == 0
