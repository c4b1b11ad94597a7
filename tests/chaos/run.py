"""A chaos run: an installation under load and random faults, that is let to drain and then judged.

`run` is what `python -m bench chaos` and the test call. The verdict comes from `checker`; this module makes what there is to judge.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from taskplatform.catalogue import load as load_catalogue
from taskplatform.local import EmbeddedServer
from taskplatform.model import Job
from taskplatform.platform import Platform
from taskplatform.settings import load_settings
from taskplatform.store import connect
from tests.acceptance.nodes import BeatNode, Guard, ProcessNode, WorkerNode
from tests.acceptance.proxy import Proxy
from tests.acceptance.site import base_environment
from tests.chaos.checker import Verdict, check, story, tell
from tests.chaos.evidence import Evidence, Expected
from tests.chaos.faults import WEIGHTS, Faults
from tests.chaos.load import SUBSCRIBERS, Load
from tests.chaos.model import planned, triggered
from tests.chaos.target import Target, now_ms
from tests.integration.harness import NAMESPACE, assert_consistent, assert_idle

T = TypeVar("T")

DEFINITIONS = Path(__file__).parent / "definitions"
HEARTBEAT_TIMEOUT, BEAT_LOCK_TIMEOUT, HORIZON, MAX_LOSSES = 2.0, 3.0, 1.0, 5
#: A process that was asked to stop is killed after this, as by whoever supervises it elsewhere.
STOP_SECONDS = 30.0
#: How long all that was accepted may take to end after the last fault.
DRAIN_SECONDS = 120.0


class Supervised:
    """A process that is started again when it ends, after a short random time."""

    def __init__(self, node: ProcessNode, rng: random.Random, *, prefork: bool = False) -> None:
        self.node = node
        self.prefork = prefork
        self.ends: Counter[int] = Counter()
        self._rng = rng
        self._closing = threading.Event()
        self._asked_at: float | None = None
        self._thread = threading.Thread(target=self._watch, name=f"watch-{node.name}")
        self._thread.start()

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._asked_at = self._asked_at or time.monotonic()
        self.node.kill("SIGTERM")

    def release(self) -> None:
        """Do not start it again."""
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(0.05):
            if self.node.status == "running":
                if self._asked_at and time.monotonic() > self._asked_at + STOP_SECONDS:
                    self.ends[-signal.SIGALRM] += 1
                    self.node.kill("SIGKILL")
                continue
            self.ends[self.node.attrs["State"]["ExitCode"]] += 1
            self._asked_at = None
            if self._closing.wait(self._rng.uniform(0.1, 1.5)):
                return
            self.node.start_again()


@dataclass
class Installation:
    """What there is to be hurt."""

    server: EmbeddedServer
    platform: Platform
    proxy: Proxy
    load: Load
    workers: list[Supervised]
    beats: list[Supervised]
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    beat_lock_timeout: float = BEAT_LOCK_TIMEOUT


@dataclass(frozen=True)
class Outcome:
    """Of a run."""

    seed: int
    verdict: Verdict
    evidence: Evidence
    folder: Path

    @property
    def passed(self) -> bool:
        return not self.verdict.violations

    def line(self) -> str:
        """The figures in one line."""
        figures = self.verdict.figures
        kinds = " ".join(f"{kind}={count}" for kind, count in figures["faults_by_kind"].items())
        rest = " ".join(f"{name}={value}" for name, value in figures.items() if name not in ("faults_by_kind", "states"))
        states = " ".join(f"{state}={count}" for state, count in figures["states"].items())
        return f"seed={self.seed} {rest} | {states} | {kinds}"

    def explain(self) -> str:
        """What was found, with the stories of some jobs."""
        return tell(self.evidence, self.verdict)


def run(
    folder: Path,
    *,
    seed: int,
    seconds: float,
    faults: int | None = None,
    kinds: Collection[str] = tuple(WEIGHTS),
    every: float = 2.5,
    workers: int = 4,
    subscribers: float = 1.0,
    per_second: float = 8.0,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Make faults for `seconds`, or `faults` of them, `every` so many seconds on average; then drain and judge.

    `subscribers` is a factor on their number, `per_second` how much is submitted. `folder` gets the processes' logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [kind for kind in WEIGHTS if kind in kinds]
    with ExitStack() as stack:
        target = stack.enter_context(Target(seed))
        place = stack.enter_context(_installed(folder, target, seed, workers, subscribers, per_second))
        making = Faults(place, seed, chosen, every=every, say=say)
        place.load.start()
        try:
            making.run(seconds=seconds, most=faults)
        finally:
            making.heal()
            place.load.stop()
        say("faults are over")
        evidence = _drain(place, target, making, say)
        _write(folder, evidence)
    verdict = check(evidence)
    ends = {one.node.name: dict(one.ends) for one in (*place.workers, *place.beats)}
    verdict.figures |= {"asked_twice": place.load.asked_twice, "process_ends": sum(sum(each.values()) for each in ends.values())}
    (folder / "ends.json").write_text(json.dumps(ends), "utf-8")
    return Outcome(seed, verdict, evidence, folder)


@contextmanager
def _installed(folder: Path, target: Target, seed: int, workers: int, subscribers: float, per_second: float) -> Iterator[Installation]:
    rng = random.Random(f"{seed} installation")
    with ExitStack() as stack:
        guard = stack.enter_context(closing(Guard()))
        server = EmbeddedServer(folder / "server")
        server.start()
        stack.callback(server.stop)
        environment = {
            **base_environment(f"http://127.0.0.1:{target.port}", guard.environment),
            "CHAOS_TARGET": f"http://127.0.0.1:{target.port}",
            "CHAOS_OTHER_HOST": f"http://localhost:{target.port}",
            "TASKPLATFORM_TASKS_DIR": str(DEFINITIONS),
            "TASKPLATFORM_REDIS_URL": server.url,
            "TASKPLATFORM_HEARTBEAT_TIMEOUT": f"{HEARTBEAT_TIMEOUT:g}s",
            "TASKPLATFORM_BEAT_LOCK_TIMEOUT": f"{BEAT_LOCK_TIMEOUT:g}s",
            "TASKPLATFORM_PLAN_HORIZON": f"{HORIZON:g}s",
            "TASKPLATFORM_MAX_LOSSES": str(MAX_LOSSES),
        }
        settings = load_settings(redis_url=server.url, tasks_dir=DEFINITIONS, plan_horizon=HORIZON)
        platform = stack.enter_context(closing(Platform.connect(settings, catalogue=load_catalogue(DEFINITIONS), actor="chaos")))
        proxy = stack.enter_context(Proxy(server.port))
        counts = {name: max(3, round(count * subscribers)) for name, count in SUBSCRIBERS.items()}
        load = Load(platform, seed, f"localhost:{target.port}", counts, per_second=per_second)

        nodes: list[ProcessNode] = []
        stack.callback(lambda: _each(nodes, ProcessNode.remove))
        proxied = rng.randrange(workers)
        for number in range(workers):
            name = f"w{number + 1}"
            own = {**environment, "CHAOS_NODE": name}
            if number == proxied:
                own["TASKPLATFORM_REDIS_URL"] = proxy.url
            pool = ["--pool", "threads", "--concurrency", "4"] if number % 2 else ["--concurrency", "3"]
            nodes.append(WorkerNode(name, pool, environment=own, folder=folder))
        for number in range(2):
            name = f"beat{number + 1}"
            nodes.append(BeatNode(name, environment={**environment, "CHAOS_NODE": name}, folder=folder))
        load.subscribe()
        for node in nodes:
            node.ready()
        supervised = [
            Supervised(node, random.Random(f"{seed} {node.name}"), prefork=isinstance(node, WorkerNode) and "threads" not in node.argv)
            for node in nodes
        ]
        # before the nodes are removed
        stack.callback(lambda: _each(supervised, Supervised.release))
        yield Installation(server, platform, proxy, load, supervised[:workers], supervised[workers:])


def _drain(place: Installation, target: Target, making: Faults, say: Callable[[str], None]) -> Evidence:
    """Let everything end, and gather what there is to know."""
    load, platform = place.load, place.platform
    disagreements = load.disagreements
    until_ms = now_ms()
    load.lift_limits()

    def expectations(at_most_ms: int) -> dict[str, Expected]:
        known = planned(
            load.subscribed, until_ms=until_ms, at_most_ms=at_most_ms, pauses=load.maybe_paused, horizon_ms=round(HORIZON * 1000)
        )
        users = [f"u{number}" for number in range(load.subscribers["triggered"])]
        by_trigger = (one for at_ms in load.triggers for one in triggered(users, at_ms))
        return {one.id: one for one in (*load.expected.values(), *known, *by_trigger)}

    missing = {one.id for one in expectations(until_ms).values() if one.must}
    deadline = time.monotonic() + DRAIN_SECONDS
    while (missing := missing - {job.id for job in _jobs(platform)}) and time.monotonic() < deadline:
        time.sleep(0.5)
    for beat in place.beats:
        _end(beat, disagreements)
    stopped_ms = now_ms()
    say("planning is over")

    def idle() -> bool:
        store = platform.store
        return not (any(store.waiting().values()) or any(store.queued().values()) or store.running() or target.under_way)

    while not (ended := idle()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in place.workers:
        worker.ask_to_stop()
    for worker in place.workers:
        _end(worker, disagreements)
    say("all has ended" if ended else "not all has ended")

    jobs = {job.id: job for job in _jobs(platform)}
    expected = expectations(stopped_ms + round(HORIZON * 1000))
    for job_id in jobs.keys() - expected.keys():
        name, _, suffix = job_id.split(":", 2)
        at = int(suffix[1:]) if name == "triggered" and suffix[0] == "t" else 0
        if any(since <= at <= until for since, until in load.unknown_triggers):
            expected[job_id] = Expected(job_id, at, must=False)
    evidence = Evidence(
        expected=expected,
        jobs=jobs,
        histories={job_id: platform.history(job_id) for job_id in jobs},
        calls=target.calls(),
        rules=load.rules(),
        pauses=load.surely_paused,
        held_back=frozenset({"limited", "capped", "hosted", "paused"}),
        max_losses=MAX_LOSSES,
        faults=making.done,
        disagreements=disagreements,
    )
    disagreements += _faults_of_database(platform, place.server.url)
    return evidence


def _each(things: Iterable[T], what: Callable[[T], object]) -> None:
    for one in things:
        what(one)


def _end(one: Supervised, disagreements: list[str]) -> None:
    """Stop it for good, gracefully."""
    one.release()
    if one.node.status != "running":
        return
    one.node.kill("SIGTERM")
    one.node.resume()
    try:
        one.node.wait(STOP_SECONDS)
    except AssertionError as fault:
        disagreements.append(f"{one.node.name} does not stop: {str(fault)[:200]}")


def _jobs(platform: Platform) -> Iterator[Job]:
    for definition in sorted(platform.catalogue):
        cursor = None
        while True:
            page = platform.jobs(definition=definition, cursor=cursor, limit=5000)
            yield from page.items
            cursor = page.cursor
            if cursor is None:
                break


def _faults_of_database(platform: Platform, url: str) -> list[str]:
    """What the tests' own reader of all structures finds."""
    found = []
    client = connect(url)
    # redbeat's, and the mailboxes that Celery's workers leave behind when they are killed
    foreign = [name for pattern in (f"{NAMESPACE}:redbeat:*", "*.pidbox") for name in client.scan_iter(pattern, count=1000)]
    if foreign:
        client.delete(*foreign)
    checks: Sequence[Callable[[], None]] = (lambda: assert_consistent(client, platform.store), lambda: assert_idle(client))
    for holds in checks:
        try:
            holds()
        except AssertionError as fault:
            found.append(f"the database: {str(fault)[:500]}")
    client.close()
    return found


def _write(folder: Path, evidence: Evidence) -> None:
    """For whoever looks into a run afterwards."""
    lines: Sequence[tuple[str, Sequence[Any]]] = (("calls", evidence.calls), ("faults", evidence.faults), ("rules", evidence.rules))
    for name, values in lines:
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(asdict(one), default=list)}\n" for one in values), "utf-8")
    with (folder / "histories.txt").open("w", encoding="utf-8") as stream:
        for job_id in sorted(evidence.jobs):
            stream.write(f"{story(evidence, job_id, calls=False)}\n")
