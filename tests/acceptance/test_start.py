"""A bad setting, and a definition that cannot be, end a start with a line that says what is wrong, and not with a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from taskplatform.local import EmbeddedServer, find_port
from tests.acceptance.nodes import ROOT, BeatNode, Guard, WorkerNode
from tests.acceptance.site import base_environment, eventually

COMMANDS = ("worker", "beat", "flower")

FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "a setting that there is not": ({"TASKPLATFORM_WORKER_SLOT": "3"}, "TASKPLATFORM_WORKER_SLOT"),
    "a value that a setting does not take": ({"TASKPLATFORM_WORKER_SLOTS": "many"}, "TASKPLATFORM_WORKER_SLOTS"),
    "two settings that do not go together": ({"TASKPLATFORM_HEARTBEAT_TIMEOUT": "600ms"}, "heartbeat_timeout"),
    "a Redis URL that is none": ({"TASKPLATFORM_REDIS_URL": "localhost:6379"}, "TASKPLATFORM_REDIS_URL"),
    "a folder that there is not": ({"TASKPLATFORM_TASKS_DIR": "/nowhere/tasks"}, "/nowhere/tasks"),
}


@pytest.fixture
def environment(guard: Guard) -> dict[str, str]:
    """Settings without fault, but for the server, which none of these starts comes to ask."""
    return {**base_environment("http://127.0.0.1:9", guard.environment), "TASKPLATFORM_REDIS_URL": "redis://127.0.0.1:9/0"}


def _assert_refused(commands: Sequence[str], environment: Mapping[str, str], *wanted: str) -> None:
    started = {
        command: subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "taskplatform.app", *command.split()],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    }
    for command, process in started.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode not in (0, None), f"{command} started"
        assert "Traceback" not in output, output
        for text in wanted:
            assert text in output, f"{command}: {output}"
        assert output.startswith("taskplatform cannot start:\n"), output


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_setting_is_named(environment: dict[str, str], fault: str) -> None:
    changes, wanted = FAULTS[fault]
    # the commands have the application in common: one fault is enough to see that each of them takes it
    commands = COMMANDS if fault == next(iter(FAULTS)) else COMMANDS[:1]
    _assert_refused(commands, {**environment, **changes}, wanted)


def test_a_variable_that_is_not_set_is_named_with_its_place(environment: dict[str, str]) -> None:
    del environment["SECRET"]
    _assert_refused(COMMANDS, environment, "SECRET", "quick.yaml")


def test_a_function_that_there_is_not_is_named_with_its_place(environment: dict[str, str], tmp_path: Path) -> None:
    text = 'tasks:\n  - id: one\n    name: One\n    cron: "* * * * *"\n    call: "tests.acceptance.functions:nothing"\n'
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    _assert_refused(["worker"], {**environment, "TASKPLATFORM_TASKS_DIR": str(tmp_path)}, "bad.yaml", "nothing")


def test_a_pool_that_would_get_no_jobs_is_refused(environment: dict[str, str]) -> None:
    environment |= {"CELERY_CUSTOM_WORKER_POOL": "celery.concurrency.base:BasePool", "PYTHONWARNINGS": "ignore"}
    _assert_refused(["worker --pool custom"], environment, "celery.concurrency.base", "prefork, threads or solo")


def test_worker_and_beat_wait_for_redis(environment: dict[str, str], tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "server", port=find_port())
    environment["TASKPLATFORM_REDIS_URL"] = f"redis://127.0.0.1:{server.port}/0"
    nodes: list[WorkerNode | BeatNode] = [
        WorkerNode("w", ["--concurrency", "1"], environment=environment, folder=tmp_path),
        BeatNode("beat", environment=environment, folder=tmp_path),
    ]
    try:
        for node in nodes:
            eventually(lambda node=node: "Redis cannot be reached" in node.logs(), "it does not say what it waits for")  # type: ignore[misc]
        server.start()
        for node in nodes:
            node.ready()
            assert "Traceback" not in node.logs()
    finally:
        for node in nodes:
            node.remove()
        server.stop()
