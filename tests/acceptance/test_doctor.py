"""The doctor at real workers and beats: what they tell of themselves, and what is found when one of them is not as the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskplatform.doctor import Finding, Report, State, examine
from tests.acceptance.site import Site, eventually
from tests.acceptance.target import Target

#: For what takes one or two where nothing else runs.
SECONDS = 90.0


@pytest.fixture(scope="module")
def site(calm_site: Site) -> Site:
    """Its processes are this module's alone."""
    return calm_site


def look(site: Site, *only: str) -> Report:
    environment = {**os.environ, **site.environment}
    return examine(site.platform.settings, environment, only=only, seconds=SECONDS)


def found(report: Report) -> dict[str, Finding]:
    return {finding.code: finding for result in report.results for finding in result.findings}


def test_a_node_that_is_not_as_the_others(site: Site, target: Target, tmp_path: Path) -> None:
    checks = ("nodes", "celery.running", "work.hosts")
    assert {"no_worker", "planner_missing"} <= found(look(site, *checks)).keys()
    good, beat = site.worker("--concurrency", "1"), site.beat()
    clock = site.clock()
    (tmp_path / "one.yaml").write_text('tasks: [{id: one, name: One, interval: {type: daily}, call: "tests.acceptance.functions:returns"}]')
    odd = site.worker("--concurrency", "1", "--prefetch-multiplier", "4", clock=clock, tasks_dir=str(tmp_path))
    clock.set(3600)
    eventually(
        lambda: len(site.platform.workers()) == 2 and any(one.leads for one in site.platform.store.beats()),
        "they do not live",
        seconds=SECONDS,
    )
    # how old a heartbeat is when it is looked at is no matter of this test
    known = {"celery_setting", "clock_off", "definitions_differs", "no_standby"}
    eventually(lambda: found(look(site, *checks)).keys() - {"worker_late"} == known, f"{look(site, *checks)}", seconds=SECONDS)
    findings = found(look(site, *checks))
    assert findings["celery_setting"].what.startswith("worker_prefetch_multiplier is 4; it has to be 1")
    assert odd.node in findings["celery_setting"].subject
    assert good.node not in findings["celery_setting"].subject
    assert odd.node in findings["clock_off"].subject
    assert findings["clock_off"].severity == "critical"
    assert look(site, *checks).state is State.CRITICAL
    assert [one.dead for one in site.platform.store.samples()] == [0], "the beat that leads notes how it is, once in a minute"

    odd.stop()
    eventually(lambda: found(look(site, *checks)).keys() - {"worker_late"} == {"no_standby"}, f"{look(site, *checks)}", seconds=SECONDS)
    assert [result.state for result in look(site, "celery.running", "nodes.clocks", "work.hosts").results] == [State.OK] * 3
    beat.kill("SIGKILL")
    eventually(lambda: bool(found(look(site, "nodes.leader")).keys() & {"no_beat", "planner_stopped"}), "a beat is missed", seconds=SECONDS)
