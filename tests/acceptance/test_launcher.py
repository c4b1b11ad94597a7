"""What the launcher starts is as if it had started by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from taskplatform import guardian
from tests.acceptance.launcher import VARIABLE, Launched, Started, launch
from tests.acceptance.nodes import Guard
from tests.acceptance.site import base_environment
from tests.support import wait_until

SECONDS = 60.0
#: An application that tells what it finds, and then does as it is told.
TELLER = """
import json, os, signal, sys, time
print(json.dumps({
    "argv": sys.argv, "main": sys.modules["__main__"].__spec__.name, "folder": os.getcwd(), "path": sys.path, "flags": list(sys.flags),
    "environment": dict(os.environ), "files": sorted(os.listdir("/proc/self/fd")), "input": sys.stdin.read(),
    "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()], "threads": len(os.listdir("/proc/self/task")),
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()], "masked": len(signal.pthread_sigmask(0, ())),
}), flush=True)
print("an error", file=sys.stderr)
if os.environ["END"] == "waits":
    time.sleep(60)
raise SystemExit(7)
"""


def started(how: str, folder: Path, environment: Mapping[str, str], output: Path) -> Started:
    (folder / "teller.py").write_text(TELLER)
    if how == "by itself":
        environment = {name: value for name, value in environment.items() if name != VARIABLE}
    with output.open("wb") as file:
        return launch(
            [sys.executable, "-m", "celery", "-A", "teller", "report"], folder=folder, environment=environment, output=file.fileno()
        )


@pytest.fixture
def environment(guard: Guard) -> dict[str, str]:
    # one variable more than the launcher has, and one less
    without = {name: value for name, value in base_environment("", guard.environment).items() if name != "TARGET"}
    return {**without, "END": "at once", "OWN": "of this test"}


def test_it_finds_what_it_would_find_by_itself(environment: Mapping[str, str], tmp_path: Path) -> None:
    told: dict[str, Any] = {}
    for how in ("launched", "by itself"):
        process = started(how, tmp_path, environment, tmp_path / how)
        assert isinstance(process, Launched) == (how == "launched")
        assert process.wait(SECONDS) == process.poll() == process.returncode == 7
        line, *errors = (tmp_path / how).read_text().splitlines()
        assert "an error" in errors
        told[how] = json.loads(line)
    assert told["launched"]["environment"].pop(VARIABLE) == environment[VARIABLE]
    assert told["launched"] == told["by itself"]
    assert told["launched"]["environment"]["OWN"] == "of this test"
    assert told["launched"]["leads"] == [True, True]


@pytest.mark.parametrize("how", ["launched", "by itself"])
def test_its_end_by_a_signal_is_told(environment: dict[str, str], tmp_path: Path, how: str) -> None:
    process = started(how, tmp_path, {**environment, "END": "waits"}, tmp_path / "output")
    wait_until(lambda: "an error" in (tmp_path / "output").read_text(), seconds=SECONDS)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    token = environment[guardian.TOKEN_VARIABLE]
    assert process.pid in {one.pid for one in guardian.belongings([], token)}
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(SECONDS) == process.returncode == -signal.SIGKILL
    assert guardian.find(process.pid) is None, "it was reaped"


def test_another_environment_of_the_interpreter_is_not_for_the_launcher(environment: dict[str, str], tmp_path: Path) -> None:
    process = started("launched", tmp_path, {**environment, "PYTHONWARNINGS": "ignore"}, tmp_path / "output")
    assert isinstance(process, subprocess.Popen)
    assert process.wait(SECONDS) == 7
