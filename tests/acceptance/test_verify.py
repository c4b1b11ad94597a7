"""`taskplatform verify` against real processes: all is well, and then one thing after the other is wrong on purpose, and it says which."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest

from taskplatform.drills import CALL, LIMITED, SPREAD, drills
from taskplatform.local import find_port
from taskplatform.model import JobState, Transition
from taskplatform.platform import Platform
from taskplatform.settings import Settings, load_settings
from taskplatform.verification.disruptive import Disruption
from taskplatform.verification.jobs import MARK, PREFIX
from taskplatform.verification.report import Line, Outcome, Report
from taskplatform.verification.run import TITLES, Options, connect, verify
from tests.acceptance.nodes import ROOT, BeatNode, Guard, WorkerNode
from tests.acceptance.site import Site, base_environment, running_site
from tests.acceptance.target import Target
from tests.support import wait_until

PASSED, FAILED, NOT_RUN = Outcome.PASSED, Outcome.FAILED, Outcome.NOT_RUN


@pytest.fixture(scope="module")
def own_site(guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Its processes have the verification's definitions, with a target."""
    own = {
        "TASKPLATFORM_VERIFY_DEFINITIONS": "true",
        "TASKPLATFORM_VERIFY_TARGET": f"http://127.0.0.1:{find_port()}",
        "TASKPLATFORM_RATE_LIMIT": '{"rate": "40/s", "burst": 30}',
        "TASKPLATFORM_DATA_DIR": str(tmp_path_factory.mktemp("data")),
    }
    environment = {**base_environment(target.url, guard.environment), **own}
    with running_site(tmp_path_factory.mktemp("site"), environment) as site:
        yield site


@pytest.fixture(scope="module")
def chosen(own_site: Site) -> Settings:
    """The settings of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own_site.environment.items():
            if name.startswith("TASKPLATFORM_"):
                patch.setenv(name, value)
        return load_settings()


@pytest.fixture
def site(own_site: Site) -> Site:
    return own_site


@pytest.fixture
def workers(own_site: Site) -> Iterator[list[WorkerNode]]:
    """Two, that are there again after a test that killed one."""
    yield from _kept(own_site, [], 2)


def _kept(site: Site, _: list[WorkerNode], count: int) -> Iterator[list[WorkerNode]]:
    made = [site.worker("--concurrency", "2") for _ in range(count)]
    for one in made:
        one.ready()
    yield made
    site.remove(*made)


@pytest.fixture
def beats(own_site: Site) -> Iterator[list[BeatNode]]:
    """A leader and a standby."""
    made = [own_site.beat() for _ in range(2)]
    wait_until(
        lambda: sum(one.leads for one in own_site.platform.store.beats()) == 1 and len(own_site.platform.store.beats()) >= 2, seconds=60
    )
    yield made
    own_site.remove(*made)


def _verify(chosen: Settings, *only: str, seconds: float = 30, platform: Platform | None = None, **options: object) -> Report:
    asked = Options(only=only, timeout=timedelta(seconds=seconds), **options)  # type: ignore[arg-type]
    used = platform or connect(chosen)
    try:
        return verify(used, chosen, asked)
    finally:
        if platform is None:
            used.close()


def _line(report: Report, check: str) -> Line:
    return next(line for line in report.lines if line.check == check)


def test_all_is_well(site: Site, chosen: Settings, workers: list[WorkerNode], beats: list[BeatNode], tmp_path: Path) -> None:
    # somebody else's work goes on meanwhile
    other = site.user()
    others = [site.platform.enqueue("call", user=other, priority="high", countdown=number / 4).id for number in range(40)]
    report = _verify(chosen, disruption=Disruption())
    written = report.write(tmp_path / "report")
    assert {line.check: line.outcome for line in report.lines} == {
        **dict.fromkeys(TITLES, PASSED),
        "api": NOT_RUN,
        "redis_tls": NOT_RUN,
    }, written.read_text()
    assert report.passed
    assert {job.state for job in site.wait_for_all(others)} == {JobState.COMPLETED}
    print(written.read_text())
