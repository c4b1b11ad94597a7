"""Who is lost, what is stuck, and what a clock that is set does to both: the observer's own clock, and the server's, are the test's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import redis

from taskplatform import process
from taskplatform.model import JobState, Limit
from taskplatform.planner import Planner
from taskplatform.recovery import STUCK_MARGIN, Endings, RecoveryLoop
from taskplatform.settings import Settings
from taskplatform.store import Stop, Store
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, assert_consistent, define, enqueue, offer, publish, recover, subscribe, take
from tests.support import wait_until

S = JobState
SECOND = timedelta(seconds=1)
HOUR = 3600.0


@pytest.fixture(autouse=True)
def _published(store: Store) -> None:
    publish(store, define("report", priority="high"))
    store.create_user("u1", actor=ACTOR)


class Machine:
    """A worker's recovery loop, looked through by hand; and the clock of its machine that nobody sets."""

    def __init__(
        self, store: Store, worker: str = "watch", *, interval: str = "3s", timeout: str = "15s", limit: timedelta | None = None
    ) -> None:
        self.seconds = 1000.0
        self.stops: list[Stop] = []
        self.consumes: list[bool] = []
        self.runs: set[tuple[str, int]] = set()
        settings = Settings(heartbeat_interval=interval, heartbeat_timeout=timeout)
        self.loop = RecoveryLoop(
            store,
            settings,
            worker=worker,
            slots=lambda: 2,
            queues=lambda: ["high"],
            stop_run=self.stops.append,
            consume=self.consumes.append,
            has_run=lambda job_id, delivery: (job_id, delivery) in self.runs,
            limit_of=lambda _: limit,
            endings=Endings(),
            info={},
            clock=lambda: self.seconds,
        )


class World:
    """Time as it passes: for the server, unless it is set, and for each machine."""

    def __init__(self, clock: Clock, *machines: Machine) -> None:
        self.clock = clock
        self.machines = machines
        self.seconds = 0.0

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.clock.advance(seconds)
        for machine in self.machines:
            machine.seconds += seconds


def run_on(store: Store, client: redis.Redis, worker: str, name: str = "m1") -> str:
    """A job that the worker runs."""
    offer(store, worker)
    job_id = enqueue(store, name=name)
    store.release()
    assert store.start(job_id, delivery=take(client).delivery, worker=worker).go
    return job_id


def seconds_until_lost(world: World, store: Store, job_id: str, *, alive: str = "", most: float = 200, step: float = 1.0) -> float:
    """Until the watching machine has taken the job, which looks once a `step`; `alive` heartbeats all the time."""
    began = world.seconds
    while store.job(job_id).state is S.RUNNING:
        assert world.seconds - began < most, "it is not found"
        world.pass_by(step)
        if alive:
            offer(store, alive)
        world.machines[0].loop.observe()
    return world.seconds - began


@pytest.mark.parametrize(("interval", "timeout"), [("3s", 15), ("30s", 90)])
@pytest.mark.parametrize("clock_step", [0, HOUR, -HOUR])
def test_a_dead_worker_is_found_in_time_whatever_the_servers_clock_does(
    client: redis.Redis, store: Store, clock: Clock, interval: str, timeout: int, clock_step: float
) -> None:
    machine = Machine(store, interval=interval, timeout=f"{timeout}s")
    world = World(clock, machine)
    machine.loop.observe()
    job_id = run_on(store, client, "w1")
    world.pass_by(0.9)
    machine.loop.observe()
    # it dies now
    clock.advance(clock_step)
    took = seconds_until_lost(world, store, job_id, alive="w2", step=1.003)
    # 1 s of backoff and a release follow
    assert timeout - 1 <= took <= timeout + 3
    assert store.history(job_id)[-1].reason == "worker w1 lost: silent for " + ("15s" if timeout == 15 else "1m30s") + "; again in 1 s"
    assert set(store.heartbeats()) == {"w2"}
    assert store.counters() == {"workers_lost": 1, "jobs_recovered": 1}
    assert_consistent(client, store, clock_set_back=clock_step < 0)


@pytest.mark.parametrize("steps", [(HOUR,), (-HOUR,), (HOUR, -HOUR), (-HOUR, HOUR, HOUR)])
def test_nobody_who_lives_is_lost_when_the_clock_is_set(client: redis.Redis, store: Store, clock: Clock, steps: tuple[float, ...]) -> None:
    machine = Machine(store)
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    for clock_step in (0, *steps):
        clock.advance(clock_step)
        for second in range(40):
            if second % 3 == 2:
                offer(store, "w1")
            world.pass_by(1)
            machine.loop.observe()
    assert store.job(job_id).state is S.RUNNING
    assert store.counters() == {}
    # and by whatever clock it spoke last: when it dies, it is found
    assert 10 <= seconds_until_lost(world, store, job_id, alive="w2") <= 17


def test_a_watcher_that_was_stopped_takes_nobody_for_lost_by_what_it_knew(client: redis.Redis, store: Store, clock: Clock) -> None:
    """Not even one who was stopped with it, and has not come to its next heartbeat yet."""
    machine = Machine(store)
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    for _ in range(3):
        machine.loop.observe()
        world.pass_by(1)
    world.pass_by(600)
    machine.loop.observe()
    machine.loop.observe()
    assert store.job(job_id).state is S.RUNNING
    # but from now on the time counts
    assert 8 <= seconds_until_lost(world, store, job_id) <= 15


def test_time_without_redis_counts_against_nobody(client: redis.Redis, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(store)
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    machine.loop.observe()
    with monkeypatch.context() as away:
        away.setattr(store, "heartbeats", lambda: (_ for _ in ()).throw(ConnectionError))
        for _ in range(60):
            world.pass_by(1)
            with pytest.raises(ConnectionError):
                machine.loop.observe()
    world.pass_by(1)
    machine.loop.observe()
    assert store.job(job_id).state is S.RUNNING


def test_one_who_has_just_begun_to_watch_waits_for_the_whole_timeout(client: redis.Redis, store: Store, clock: Clock) -> None:
    """As the only worker, started anew: what it finds may be old or not."""
    job_id = run_on(store, client, "w1")
    clock.advance(HOUR)
    machine = Machine(store)
    assert 15 <= seconds_until_lost(World(clock, machine), store, job_id) <= 17


def test_a_heartbeat_in_the_last_moment_counts(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = run_on(store, client, "w1")
    seen_ms = store.heartbeats()["w1"]
    clock.advance(20)
    offer(store, "w1")
    assert store.recover("w1", seen_ms=seen_ms, how="silent", max_losses=3, backoff=SECOND) == []
    assert store.recover("w9", seen_ms=seen_ms, how="silent", max_losses=3, backoff=SECOND) == []
    assert store.job(job_id).state is S.RUNNING


def test_more_jobs_than_one_script_takes(client: redis.Redis, store: Store, clock: Clock) -> None:
    for number in range(3):
        run_on(store, client, "w1", f"m{number}")
    clock.advance(20)
    taken = [recover(store, 15 * SECOND, limit=2), recover(store, 15 * SECOND, limit=2), recover(store, 15 * SECOND, limit=2)]
    assert [[kind for kind, _ in rows] for rows in taken] == [["job", "job"], ["job", "worker"], []]
    assert store.counters() == {"workers_lost": 1, "jobs_recovered": 3}


# --- what a lost worker is told --------------------------------------------------------------------------------------


def test_a_lost_worker_is_told_what_is_no_longer_its_own_until_it_knows(client: redis.Redis, store: Store, clock: Clock) -> None:
    job_id = run_on(store, client, "w1")
    clock.advance(20)
    recover(store, 15 * SECOND)
    machine = Machine(store, "w1")
    stop = Stop(job_id, 1, "worker w1 had been declared lost")
    machine.loop.beat()
    machine.loop.beat()
    assert machine.stops == [stop, stop]
    assert set(store.heartbeats()) == {"w1"}
    assert store.stopped("w1", stop, note="stopped it", discarded=True)
    assert not store.stopped("w1", stop, note="stopped it", discarded=True)
    machine.loop.beat()
    assert len(machine.stops) == 2
    assert [line.reason for line in store.history(job_id)].count("stopped it") == 1
    assert store.counters()["discarded"] == 1
    # what is discarded at the end of a run counts too
    store.finish(job_id, delivery=1, worker="w1", state=S.COMPLETED, reason="late")
    assert store.counters()["discarded"] == 2
    assert_consistent(client, store)


def test_nothing_is_left_for_a_worker_that_leaves(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.cancel(run_on(store, client, "w1"), reason="not wanted")
    store.leave("w1")
    assert client.keys("tp:stops:*") == []


# --- this worker's own runs ------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_after_its_time_limit_is_given_up(client: redis.Redis, store: Store, clock: Clock) -> None:
    limit = timedelta(seconds=30)
    machine = Machine(store, "w1", limit=limit)
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    machine.runs.add((job_id, 1))
    passed = 0
    while store.job(job_id).state is S.RUNNING:
        machine.loop.care()
        world.pass_by(3)
        passed += 3
        clock.advance(HOUR)  # nothing of this goes by the server's clock
        assert passed < 60, "it is not found"
    assert passed > (limit + STUCK_MARGIN).total_seconds()
    assert store.history(job_id)[-1].reason == "stuck: ran longer than its time limit of 30s; again in 1 s"
    assert store.counters()["stuck"] == 1
    machine.loop.beat()
    assert [stop.job_id for stop in machine.stops] == [job_id]
    assert [worker.slots for worker in store.workers()] == [1], "a slot that is held is offered"
    machine.runs.clear()
    machine.loop.beat()
    assert [worker.slots for worker in store.workers()] == [2]


def test_a_later_delivery_here_is_another_run(client: redis.Redis, store: Store, clock: Clock) -> None:
    """The job came back to this worker between two looks."""
    machine = Machine(store, "w1", limit=timedelta(seconds=30))
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    machine.runs.add((job_id, 1))
    for _ in range(10):
        machine.loop.care()
        world.pass_by(3)
    store.finish(job_id, delivery=1, worker="w1", state=S.RETRYING, reason="again", retry_in=timedelta())
    offer(store, "w1")
    store.release()
    assert store.start(job_id, delivery=take(client).delivery, worker="w1").go
    machine.runs = {(job_id, 2)}
    for _ in range(11):
        machine.loop.care()
        world.pass_by(3)
    assert store.job(job_id).state is S.RUNNING
    assert store.counters() == {}


def test_time_without_redis_does_not_make_a_run_stuck(client: redis.Redis, store: Store, clock: Clock) -> None:
    """It may have ended long ago, and could not say so."""
    machine = Machine(store, "w1", limit=timedelta(seconds=30))
    world = World(clock, machine)
    job_id = run_on(store, client, "w1")
    machine.runs.add((job_id, 1))
    machine.loop.care()
    machine.loop.care()
    world.pass_by(600)
    machine.loop.care()
    assert store.job(job_id).state is S.RUNNING


# --- processes of this machine ---------------------------------------------------------------------------------------


@contextmanager
def _child() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    code = "import json, sys; from taskplatform import process; print(json.dumps(process.identity()), flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        yield child, json.loads(child.stdout.readline())
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_of_this_machine_is_known_to_have_ended() -> None:
    with _child() as (child, who):
        assert not process.has_ended(who)
        child.send_signal(signal.SIGSTOP)
        assert not process.has_ended(who), "one that is stopped lives"
        # its number was given to another
        assert process.has_ended({**who, "born": "1"})
        # of other machines, and of workers that do not say, nothing is known
        assert not process.has_ended({**who, "born": "1", "machine": "another"})
        assert not process.has_ended({"pid": who["pid"]})
        child.kill()
        wait_until(lambda: process.has_ended(who), message="one that nobody has reaped yet has ended")
        child.wait()
        assert process.has_ended(who)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_worker_whose_process_has_ended_here_is_lost_at_once(client: redis.Redis, store: Store, clock: Clock) -> None:
    machine = Machine(store)
    with _child() as (child, who):
        store.heartbeat("w1", slots=2, queues=["high"], buffer=1, info=who)
        store.heartbeat("w2", slots=2, queues=["high"], buffer=1, info={**who, "machine": "another"})
        machine.loop.observe()
        assert set(store.heartbeats()) == {"w1", "w2"}
        child.kill()
        child.wait()
    machine.loop.observe()
    assert set(store.heartbeats()) == {"w2"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_child_ends_with_its_parent() -> None:
    """Also one whose parent ended before it could say so."""
    code = """
import os, sys, time
from taskplatform import process
late = sys.argv[1] == "late"
parent = os.getpid()
if os.fork() == 0:
    if late:
        while os.getppid() == parent:
            time.sleep(0.01)
    process.die_with_parent(parent)
    print(os.getpid(), flush=True)
    time.sleep(600)
    os._exit(0)
if not late:
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, "in time"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert pid != parent.pid
        assert parent.stdout.read() == "", "the pipe is open as long as the child lives"
    late = subprocess.run([sys.executable, "-c", code, "late"], stdout=subprocess.PIPE, text=True, check=False, timeout=120)
    assert late.stdout == ""


# --- what else goes by the server's clock ----------------------------------------------------------------------------


def test_a_process_that_is_forked_while_others_log_can_log(tmp_path: Path) -> None:
    code = """
import logging, os, sys, threading
from taskplatform import process
if sys.argv[2] == "kept":
    process.fork_between_log_lines()
logging.basicConfig(stream=open(sys.argv[1], "w"), level=logging.INFO)
def chatter():
    while True:
        logging.info("x" * 5000)
for _ in range(2):
    threading.Thread(target=chatter, daemon=True).start()
for number in range(300):
    if (child := os.fork()) == 0:
        logging.info("child %d", number)
        os._exit(0)
    for _ in range(3000):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        print("hung", flush=True)
        break
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log"), "kept"], stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    assert done.stdout == ""


def test_a_retry_waits_no_hour_longer_when_the_clock_is_set_right(client: redis.Redis, store: Store, clock: Clock) -> None:
    """The clock was an hour fast when the wait was noted."""
    clock.advance(HOUR)
    job_id = run_on(store, client, "w1")
    store.finish(job_id, delivery=1, worker="w1", state=S.RETRYING, reason="HTTP 503", retry_in=timedelta(seconds=30))
    later = enqueue(store, name="m2", delay_ms=40_000)
    at = enqueue(store, name="m3", execute_after_ms=clock.now_ms + 50_000)
    clock.advance(10 - HOUR)
    store.reclaim(patience=15 * SECOND)
    assert store.job(job_id).execute_after_ms == clock.now_ms + 30_000
    assert store.job(later).execute_after_ms == clock.now_ms + 40_000
    assert store.job(at).execute_after_ms == clock.now_ms + 50_000 - 10_000 + 3_600_000, "an instant stays an instant"
    assert store.history(job_id)[-1].reason == "the clock was set back: its wait begins again"
    assert_consistent(client, store, clock_set_back=True)
    before = len(store.history(job_id))
    store.reclaim(patience=15 * SECOND)
    assert len(store.history(job_id)) == before
    clock.advance(40)
    offer(store, "w1")
    assert store.release()[0] == 2
    assert client.zcard("tp:delays") == 0
    assert_consistent(client, store, clock_set_back=True)


def test_a_lost_message_is_found_after_the_clock_was_set_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    clock.advance(HOUR)
    offer(store, "w1")
    job_id = enqueue(store, execute_after_ms=clock.now_ms - 2 * 3_600_000)
    store.release()
    take(client)
    clock.advance(-HOUR)
    assert store.reclaim(patience=15 * SECOND) == []
    clock.advance(15)
    assert store.reclaim(patience=15 * SECOND) == [job_id]
    assert store.counters() == {"messages_reclaimed": 1}
    assert_consistent(client, store, clock_set_back=True)


def test_a_message_is_not_lost_because_the_clock_was_set(client: redis.Redis, store: Store, clock: Clock) -> None:
    """It is on its way to a worker that lives. One that has just begun does not know how long; the others see the step."""
    machine, new = Machine(store), Machine(store, "new")
    world = World(clock, machine, new)
    offer(store, "w1")
    job_id = enqueue(store)
    store.release()
    message = take(client)
    machine.loop.care()
    world.pass_by(3)
    machine.loop.care()
    clock.advance(HOUR)
    machine.loop.care()
    clock.advance(HOUR)
    new.loop.care()
    assert store.job(job_id).delivery == message.delivery
    assert store.job(job_id).state is S.QUEUED
    # if it was lost after all, that is found
    for _ in range(5):
        assert store.counters() == {}
        world.pass_by(3)
        new.loop.care()
    assert store.counters() == {"messages_reclaimed": 1}
    assert_consistent(client, store)


def test_a_lost_message_is_found_while_another_worker_starts_again_and_again(client: redis.Redis, store: Store, clock: Clock) -> None:
    """As one that runs out of memory each time. The others know for how long the job was queued."""
    machine = Machine(store)
    world = World(clock, machine)
    offer(store, "w1")
    job_id = enqueue(store)
    store.release()
    take(client)
    for _ in range(6):
        assert store.job(job_id).delivery == 1
        machine.loop.care()
        Machine(store, "new").loop.care()
        world.pass_by(3)
    assert store.job(job_id).delivery == 2
    assert_consistent(client, store)


@pytest.mark.parametrize("source", ["trigger", "late"])
def test_a_window_that_was_counted_from_now_goes_on_when_the_clock_is_set_right(
    client: redis.Redis, store: Store, clock: Clock, source: str
) -> None:
    """All its jobs come within the window's length from now, not an hour later; each once."""
    definition = define("hourly", interval={"type": "hourly"}, window="60s", priority="high")
    catalogue = {"hourly": definition}
    planner = Planner(store, catalogue, horizon=HORIZON, batch=10)
    planner.lead()
    for number in range(40):
        store.create_user(f"v{number}", actor=ACTOR)
        subscribe(store, f"v{number}", "hourly")
    clock.advance(3600 - clock.now_ms / 1000 % 3600 - 100)
    planner.advance()
    if source == "trigger":
        clock.advance(HOUR - 600)
        planner.advance()
        store.trigger("hourly", window=timedelta(seconds=60), actor=ACTOR)
    else:
        # its planner was away for the first half of the window
        clock.advance(HOUR + 130)
    planner.advance()
    made = len(store.jobs(definition="hourly", limit=1000).items)
    clock.advance(10 - HOUR)
    for _ in range(80):
        planner.advance()
        store.reclaim(patience=timedelta(days=1))
        clock.advance(1)
    jobs = store.jobs(definition="hourly", limit=1000).items
    mine = [job for job in jobs if (job.source == "trigger") == (source == "trigger")]
    assert made < len(jobs)
    assert len({job.user for job in mine}) == 40
    late = [
        (job.id, job.execute_after_ms - clock.now_ms, job.created_ms - clock.now_ms) for job in mine if job.execute_after_ms > clock.now_ms
    ]
    assert late == [], client.zrange("tp:delays", 0, -1, withscores=True)
    assert_consistent(client, store, clock_set_back=True)


def test_what_a_planner_put_off_is_looked_at_again_when_the_clock_is_set_back(client: redis.Redis, store: Store, clock: Clock) -> None:
    definition = define("hourly", interval={"type": "hourly"}, priority="high")
    planner = Planner(store, {"hourly": definition}, horizon=HORIZON, batch=10)
    planner.lead()
    subscribe(store, "u1", "hourly")
    planner.advance()

    def due_ms() -> int:
        return next(item.due_ms for item in store.due(clock.now_ms + 100_000_000) if item.id == "hourly")

    clock.advance(HOUR)
    planner.advance()
    right_ms = due_ms()
    client.zadd("tp:due", {"g|hourly": clock.now_ms + 10_000_000})  # as `postpone` does, by a clock that is wrong
    clock.advance(-10)
    # another leads by now: it is told what clock the first one saw
    other = Planner(store, {"hourly": definition}, horizon=HORIZON, batch=10)
    other.lead()
    other.advance()
    assert due_ms() == right_ms


def test_a_limit_lets_no_more_go_for_a_step_back_and_one_burst_for_a_step_forward(client: redis.Redis, store: Store, clock: Clock) -> None:
    store.set_limit("total", Limit(1, 3), actor=ACTOR)
    offer(store, "w1", slots=100)
    for number in range(40):
        enqueue(store, name=f"n{number}")

    def start_all() -> int:
        started = 0
        while store.release()[0]:
            message = take(client)
            started += store.start(message.job_id, delivery=message.delivery, worker="w1").go
        return started

    start_all()
    clock.advance(-HOUR)
    assert start_all() == 0
    clock.advance(2 * HOUR)
    assert start_all() <= 3
