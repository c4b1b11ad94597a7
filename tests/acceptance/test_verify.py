"""`taskplatform verify` on real processes: all is well; then one thing after the other is wrong on purpose, and it says which."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from taskplatform.catalogue import Catalogue
from taskplatform.drills import LIMITED, drills
from taskplatform.local import find_port
from taskplatform.model import JobState, Transition
from taskplatform.platform import Platform
from taskplatform.settings import Settings, load_settings
from taskplatform.store import Store
from taskplatform.verification.disruptive import Disruption, by_command
from taskplatform.verification.jobs import PREFIX
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
        # no API of these settings runs, and another test's may be where they would say without this
        "TASKPLATFORM_API_PORT": str(find_port()),
        "TASKPLATFORM_RATE_LIMIT": '{"rate": "50/s", "burst": 40}',
        "TASKPLATFORM_DATA_DIR": str(tmp_path_factory.mktemp("data")),
        # nobody is to lose a lock or be lost because the machine is busy
        "TASKPLATFORM_PLAN_HORIZON": "5s",
        "TASKPLATFORM_BEAT_LOCK_TIMEOUT": "4s",
        "TASKPLATFORM_HEARTBEAT_TIMEOUT": "10s",
    }
    environment = {**base_environment(target.url, guard.environment), **own}
    with running_site(tmp_path_factory.mktemp("site"), environment) as site:
        yield site


@pytest.fixture
def site(own_site: Site) -> Iterator[Site]:
    """Without any process but the server: who was there has ended."""
    yield own_site
    for node in list(own_site._nodes):
        own_site.remove(node)


@pytest.fixture(scope="module")
def chosen(own_site: Site) -> Settings:
    """The settings of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own_site.environment.items():
            if name.startswith("TASKPLATFORM_"):
                patch.setenv(name, value)
        return load_settings()


def _workers(site: Site, *options: tuple[str, ...]) -> list[WorkerNode]:
    made = [site.worker(*one) for one in options]
    _all_ready(made)
    # those of earlier tests are dead, and no longer counted among the workers
    wait_until(lambda: len(site.platform.workers()) == len(made), seconds=60)
    return made


def _beats(site: Site, count: int) -> list[BeatNode]:
    made = [site.beat() for _ in range(count)]
    names = {f"#{one.pid}" for one in made}

    def there() -> bool:
        living = [one for one in site.platform.store.beats() if any(one.id.endswith(name) for name in names)]
        return len(living) == count and sum(one.leads for one in living) == 1

    wait_until(there, seconds=90, message="no beat leads")
    return made


def _all_ready(nodes: list[WorkerNode]) -> None:
    for one in nodes:
        one.ready()


def _verify(chosen: Settings, *only: str, seconds: float = 40, platform: Platform | None = None, **options: Any) -> Report:
    asked = Options(only=only, timeout=timedelta(seconds=seconds), window=timedelta(seconds=3), **options)
    used = platform or connect(chosen)
    try:
        return verify(used, chosen, asked)
    finally:
        used.close()


def _line(report: Report, check: str) -> Line:
    return next(line for line in report.lines if line.check == check)


def _left(site: Site) -> list[str]:
    return [one.id for one in site.platform.users(limit=1000).items if one.id.startswith(PREFIX)]


@pytest.mark.timeout(240)
def test_all_is_well(site: Site, chosen: Settings, tmp_path: Path) -> None:
    _workers(site, ("--concurrency", "2"), ("--concurrency", "2"))
    _beats(site, 2)
    # somebody else's work goes on meanwhile, and somebody's name begins like those of a verification
    other = site.user()
    site.platform.create_user(f"{PREFIX}somebody")
    others = [site.platform.enqueue("call", user=other, priority="high", countdown=number / 4).id for number in range(20)]
    dead_before = len(site.platform.dead_letters().items)

    report = _verify(chosen, disruption=Disruption())
    written = report.write(tmp_path / "report")
    told = written.read_text(encoding="utf-8")
    expected = {**dict.fromkeys(TITLES, PASSED), "api": NOT_RUN, "redis_tls": NOT_RUN}
    assert {line.check: line.outcome for line in report.lines} == expected, told
    assert report.passed

    # what it says was measured
    facts = {line.check: line.facts for line in report.lines}
    assert facts["priority"]["choices"] > 0
    assert facts["limit"]["at_target"], facts["limit"]["how"]
    assert facts["limit"]["jobs"] == sum(facts["limit"]["in_each_second"])
    assert facts["services"]["redis"]["eviction_policy"] == "noeviction"
    assert all(one["celery"] and one["python"] for one in facts["services"]["workers"])
    assert facts["retry"]["configured_ms"] == [1000, 2000]
    assert facts["takeover"]["takeover_ms"] > 0
    assert facts["orphans"]["recovered_ms"]
    assert "no API was found" in _line(report, "api").text

    # the report as it lies there
    assert all(f"## {title}:" in told for title in TITLES.values())
    assert "pending | queued" in told
    data = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert data["counts"] == {"passed": len(TITLES) - 2, "failed": 0, "not run": 2}
    plot = ElementTree.parse(tmp_path / "report" / "distribution.svg").getroot()
    assert plot.tag.endswith("svg")
    assert len(list(plot.iter("{http://www.w3.org/2000/svg}polygon"))) > 20

    # nothing of it is left, and nothing of others is gone
    assert _left(site) == [f"{PREFIX}somebody"]
    assert len(site.platform.dead_letters().items) == dead_before
    assert not any(site.platform.store.jobs(definition=one.id).items for one in drills())
    assert {job.state for job in site.wait_for_all(others)} == {JobState.COMPLETED}


@pytest.mark.timeout(150)
def test_no_beat_and_no_free_slot(site: Site, chosen: Settings) -> None:
    _workers(site, ("--concurrency", "1"))
    wait_until(lambda: not _living(site, chosen), seconds=60)
    user = site.user()
    job = site.platform.enqueue("sleeping", user=user, params={"seconds": 60})
    site.wait_for(job.id, JobState.RUNNING)
    report = _verify(chosen, "services", "heartbeats", "leader", "latency", "distribution", seconds=2, disruption=Disruption())
    assert not report.passed
    assert {line.check: line.outcome for line in report.lines} == dict.fromkeys(
        ("services", "heartbeats", "leader", "latency", "distribution"), FAILED
    )
    assert _line(report, "leader").text == "no beat lives, so nobody leads and nothing is planned"
    assert _line(report, "services").text == "no beat lives"
    assert _line(report, "distribution").text == "no beat lives, so no occurrence can be planned"
    assert "1 of 1 slots are busy" in _line(report, "latency").text
    report = _verify(chosen, "takeover", "orphans", seconds=2, disruption=Disruption())
    assert {line.check: line.outcome for line in report.lines} == {"takeover": NOT_RUN, "orphans": NOT_RUN}
    assert _line(report, "takeover").text == "no beat leads that could be killed"
    assert "only one worker lives" in _line(report, "orphans").text
    # a command that does not kill
    failing = by_command("echo there is no such container >&2; exit 1")
    site.platform.cancel(job.id)
    wait_until(lambda: not site.platform.workers()[0].running, seconds=30)
    report = _verify(chosen, "orphans", disruption=Disruption(worker=failing))
    assert (report.lines[0].outcome, "ended with 1: there is no such container" in report.lines[0].text) == (NOT_RUN, True), report.lines
    assert _left_of_runs(site) == []


@pytest.mark.timeout(150)
def test_a_worker_that_serves_only_low_breaks_the_order(site: Site, chosen: Settings) -> None:
    _workers(site, ("--concurrency", "1", "-Q", "low"))
    report = _verify(chosen, "priority", "services", seconds=5)
    line = _line(report, "priority")
    assert line.outcome is FAILED
    assert "times a job was released while another with a better right waited: first a low one" in line.text
    assert "no worker serves the queue high" in line.text
    assert line.facts["passed_over"] > 0
    assert "no worker serves the queue high, medium" in _line(report, "services").text


class _Doctored(Platform):
    """Says that all jobs of the limited definition started at the same time."""

    def history(self, job_id: str) -> list[Transition]:
        found = super().history(job_id)
        if not job_id.startswith(LIMITED):
            return found
        return [replace(line, at_ms=1) if line.to_state is JobState.RUNNING else line for line in found]


class _Twice(Platform):
    """Forgets idempotency keys."""

    def enqueue(self, *args: Any, idempotency_key: str | None = None, **options: Any) -> Any:  # noqa: ARG002
        return super().enqueue(*args, **options)


@pytest.mark.timeout(150)
def test_a_broken_limit_and_a_broken_key_are_found(site: Site, chosen: Settings) -> None:
    _workers(site, ("--concurrency", "4"))
    own = chosen.model_copy(update={"verify_target": None})
    for kind, check, wanted in (
        (_Doctored, "limit", "limit definition:verify_limited is broken: 20 within 0.000 s, allowed are 5.0"),
        (_Twice, "idempotency", "18 calls with one key made 18 jobs; the job ran 18 times"),
    ):
        store = Store.connect(chosen.redis_url)
        # without a target: its definition is not among these
        report = _verify(own, check, platform=kind(store, Catalogue.of(*drills()), own, actor="test"))
        assert (report.lines[0].outcome, report.lines[0].text) == (FAILED, wanted)
        assert _left_of_runs(site) == []


class _Remote:
    """A platform without Redis: the public methods of another, and those of an API for what else is asked."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.now_ms, self.beats = platform.store.now_ms, platform.store.beats

    def __getattr__(self, name: str) -> Any:
        if name == "store":
            raise AttributeError(name)
        return getattr(self._platform, name)


@pytest.mark.timeout(150)
def test_the_command_and_what_is_left_of_one_that_died(site: Site, chosen: Settings, tmp_path: Path) -> None:
    _workers(site, ("--concurrency", "2"))

    # over an API there is no Redis, and no Redis to judge
    through = connect(chosen)
    remote: Any = _Remote(through)
    report = verify(remote, chosen, Options(only=("lifecycle", "redis_tls", "takeover", "priority"), disruption=Disruption()))
    outcomes = {line.check: line.outcome for line in report.lines}
    assert outcomes == {"lifecycle": PASSED, "priority": PASSED, "redis_tls": NOT_RUN, "takeover": NOT_RUN}, report.lines
    assert "reached through its API" in _line(report, "takeover").text
    through.close()

    def command(*words: str, namespace: str = "tp") -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", "from taskplatform.cli import main; raise SystemExit(main())", "verify", *words]
        environment = {**site.environment, "TASKPLATFORM_NAMESPACE": namespace}
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    # killed, and told to end: the first one leaves its users, the second one does not
    for number, left, code in ((signal.SIGKILL, True, -9), (signal.SIGTERM, False, 130)):
        before = set(_left_of_runs(site))
        running = command("--only", "latency", "--only", "priority")
        wait_until(lambda before=before: bool(set(_left_of_runs(site)) - before), seconds=60, message="it has no user")  # type: ignore[misc]
        own = set(_left_of_runs(site)) - before
        running.send_signal(number)
        _, told = running.communicate(timeout=60)
        assert running.returncode == code, told
        assert bool(own & set(_left_of_runs(site))) is left, told
    # the one that was told to end had removed what the killed one left, when it began
    assert _left_of_runs(site) == []

    done = command("--only", "idempotency", "--json", "--report", str(tmp_path / "report"))
    out, told = done.communicate(timeout=90)
    assert done.returncode == 0, told
    assert [one["check"] for one in json.loads(out)["checks"]] == ["idempotency"]
    assert (tmp_path / "report" / "report.md").exists()
    wrong = command("--only", "idempotencie")
    _, told = wrong.communicate(timeout=60)
    assert (wrong.returncode, 'did you mean "idempotency"?' in told) == (2, True), told
    nowhere = command(namespace="other")
    _, told = nowhere.communicate(timeout=60)
    assert (nowhere.returncode, "has published the verification's definitions" in told) == (3, True), told


def _left_of_runs(site: Site) -> list[str]:
    return [one for one in _left(site) if one != f"{PREFIX}somebody"]


def _living(site: Site, chosen: Settings) -> list[str]:
    store = site.platform.store
    since = store.now_ms() - max(chosen.beat_lock_timeout, 3 * chosen.beat_interval) / timedelta(milliseconds=1)
    return [one.id for one in store.beats() if one.heartbeat_ms >= since]
