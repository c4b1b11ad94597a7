"""`taskplatform demo`, as a newcomer runs it, on the shipped definitions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.nodes import ROOT, Guard
from tests.acceptance.site import base_environment


@pytest.mark.timeout(200)
def test_the_demo_holds_what_it_promises(guard: Guard, tmp_path: Path) -> None:
    environment = {name: value for name, value in base_environment("", guard.environment).items() if not name.startswith("TASKPLATFORM_")}
    environment["TASKPLATFORM_DATA_DIR"] = str(tmp_path)
    command = [str(Path(sys.executable).with_name("taskplatform")), "demo"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    held = re.findall(r"✓ (.+)", done.stdout)
    promised = re.search(r"All (\d+) checks hold", done.stdout)
    assert promised, done.stdout
    assert len(held) == int(promised[1]) >= 10
    assert "✗" not in done.stdout
    for wanted in (
        "completion order by priority: high, high, medium, medium, low",
        "nothing started early",
        "each called its target exactly once",
    ):
        assert any(wanted in line for line in held), done.stdout
    # A call that a busy machine cut off is made again, so there may be more of them than jobs.
    calls = re.search(r"the target saw no more than 15 \+ 10/s in any window of its (\d+) calls", "\n".join(held))
    assert calls, done.stdout
    assert int(calls[1]) >= 55
    assert re.search(r"Flower +http://127\.0\.0\.1:\d+", done.stdout), "it does not say where Flower is"
