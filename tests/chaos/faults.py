"""The faults of a chaos run: which there are, and the sequence that a seed gives.

A sequence depends on the seed, the kinds and the time between faults, and on nothing that happens in the run; so does everything that
a fault decides by its own random numbers: its victim, how long it lasts.
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import redis

from taskplatform.model import Priority
from tests.acceptance.nodes import BeatNode
from tests.chaos.evidence import FaultDone
from tests.chaos.target import now_ms

if TYPE_CHECKING:
    from tests.chaos.run import Installation, Supervised

#: By kind, how often it is drawn against the others.
WEIGHTS: Mapping[str, int] = {
    "kill_worker": 5,
    "kill_main": 2,
    "kill_pool": 4,
    "stop_worker": 4,
    "freeze_worker": 3,
    "freeze_worker_long": 3,
    "kill_leader": 3,
    "kill_standby": 1,
    "stop_beat": 2,
    "freeze_beat": 2,
    "kill_server": 2,
    "stop_server": 1,
    "cut_clients": 3,
    "flush_scripts": 2,
    "net_cut": 2,
    "net_freeze": 2,
    "net_slow": 2,
    "garbage": 2,
    "poison": 1,
    "limit": 4,
    "pause": 2,
    "burst": 2,
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of the sequence."""

    number: int
    after_seconds: float
    """After the one before it."""
    kind: str


def sequence(seed: int, kinds: Sequence[str], *, every: float) -> Iterator[Planned]:
    """The faults, endlessly; between two of them there are `every` seconds on average.

    Each run of as many as there are kinds has each kind once, in a random order, so that a short run does not miss most; beside
    these come the ones that are drawn by weight.
    """
    rng = random.Random(f"{seed} sequence")
    number = 0
    while True:
        kinds_now = [*kinds, *rng.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=2 * len(kinds))]
        rng.shuffle(kinds_now)
        for kind in kinds_now:
            number += 1
            yield Planned(number, min(rng.expovariate(1 / every), 4 * every), kind)


def garbage(rng: random.Random) -> bytes:
    """Something that is no message."""
    message = {
        "body": base64.b64encode(b'[[], {"user": "u0"}, {}]').decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "asked", "id": "asked:u0:mnone", "delivery": 1},
        "properties": {
            "correlation_id": "asked:u0:mnone",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "low"},
            "delivery_tag": "asked:u0:mnone#1",
            "body_encoding": "base64",
        },
    }
    properties = message["properties"]
    assert isinstance(properties, dict)
    choices: list[object] = [
        b"garbage",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"{}",
        b"null",
        {**message, "body": "%%%"},
        {**message, "headers": ["a"]},
        {**message, "headers": None},
        {**message, "properties": {**properties, "delivery_tag": None}},
        {**message, "content-type": "application/x-python-serialize", "body": base64.b64encode(b"cos\nsystem\n.").decode()},
        {**message, "headers": {"lang": "py", "task": "unknown.task", "id": "x"}},
        message,  # well-formed, of a job that does not exist
    ]
    chosen = rng.choice(choices)
    return chosen if isinstance(chosen, bytes) else json.dumps(chosen).encode()


class Faults:
    """Makes faults of an installation, each in a thread of its own until it is healed."""

    def __init__(self, installation: Installation, seed: int, kinds: Sequence[str], *, every: float, say: Callable[[str], None]) -> None:
        self.done: list[FaultDone] = []
        self._installation = installation
        self._seed = seed
        self._sequence = sequence(seed, kinds, every=every)
        self._say = say
        self._lock = threading.Lock()
        #: One thing happens to the server, or to the network, at a time.
        self._server_busy, self._network_busy = threading.Lock(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    def run(self, *, seconds: float, most: int | None = None) -> None:
        """Make faults for so long, or so many."""
        timer = threading.Timer(seconds, self._stopped.set)
        timer.start()
        try:
            for planned in self._sequence:
                if self._stopped.wait(planned.after_seconds) or planned.number > (most or planned.number):
                    break
                thread = threading.Thread(target=self._make, args=(planned,), name=f"fault{planned.number}")
                thread.start()
                self._threads.append(thread)
        finally:
            timer.cancel()

    def heal(self) -> None:
        """Return when all faults are over."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _make(self, planned: Planned) -> None:
        rng = random.Random(f"{self._seed} fault {planned.number}")
        at_ms = now_ms()
        victim = getattr(self, f"_{planned.kind}")(rng)
        with self._lock:
            self.done.append(FaultDone(planned.kind, at_ms, victim or "", now_ms()))
        self._say(f"{planned.number} {planned.kind} {victim or ''}")

    def _lasts(self, rng: random.Random, low: float, high: float) -> None:
        self._stopped.wait(rng.uniform(low, high))

    # workers

    def _worker(self, rng: random.Random) -> Supervised:
        return rng.choice(self._installation.workers)

    def _kill_worker(self, rng: random.Random) -> str:
        victim = self._worker(rng)
        victim.node.kill("SIGKILL")
        return victim.node.name

    def _kill_main(self, rng: random.Random) -> str:
        victim = self._worker(rng)
        with suppress(ProcessLookupError):
            os.kill(victim.node.pid, signal.SIGKILL)
        return victim.node.name

    def _kill_pool(self, rng: random.Random) -> str:
        victim = rng.choice([one for one in self._installation.workers if one.prefork])
        children = sorted(process.pid for process in victim.node.processes() if process.pid != victim.node.pid)
        if children:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(children), signal.SIGKILL)
        return victim.node.name

    def _stop_worker(self, rng: random.Random) -> str:
        victim = self._worker(rng)
        victim.ask_to_stop()
        return victim.node.name

    def _freeze_worker(self, rng: random.Random) -> str:
        """For less than the heartbeat's timeout."""
        return self._freeze(self._worker(rng), rng, 0.2, 0.7 * self._installation.heartbeat_timeout)

    def _freeze_worker_long(self, rng: random.Random) -> str:
        longer = self._installation.heartbeat_timeout
        return self._freeze(self._worker(rng), rng, longer + 0.7, longer + 3)

    def _freeze(self, victim: Supervised, rng: random.Random, low: float, high: float) -> str:
        victim.node.pause()
        self._lasts(rng, low, high)
        victim.node.resume()
        return victim.node.name

    # beats

    def _beat(self, leads: bool) -> Supervised | None:
        beats = self._installation.beats
        return next(
            (one for one in beats if isinstance(one.node, BeatNode) and one.node.status == "running" and one.node.leads == leads), None
        )

    def _kill_leader(self, rng: random.Random) -> str | None:  # noqa: ARG002
        victim = self._beat(True)
        if victim:
            victim.node.kill("SIGKILL")
        return victim.node.name if victim else None

    def _kill_standby(self, rng: random.Random) -> str | None:  # noqa: ARG002
        victim = self._beat(False)
        if victim:
            victim.node.kill("SIGKILL")
        return victim.node.name if victim else None

    def _stop_beat(self, rng: random.Random) -> str:
        victim = rng.choice(self._installation.beats)
        victim.ask_to_stop()
        return victim.node.name

    def _freeze_beat(self, rng: random.Random) -> str | None:
        """For longer than its lock."""
        victim = self._beat(True)
        longer = self._installation.beat_lock_timeout
        return self._freeze(victim, rng, longer + 1, longer + 3) if victim else None

    # the server and the network

    def _kill_server(self, rng: random.Random) -> None:
        with self._server_busy:
            self._installation.server.kill()
            self._lasts(rng, 0.1, 3)
            self._installation.server.start()

    def _stop_server(self, rng: random.Random) -> None:
        with self._server_busy:
            self._installation.server.stop()
            self._lasts(rng, 0.1, 3)
            self._installation.server.start()

    def _cut_clients(self, rng: random.Random) -> None:  # noqa: ARG002
        self._tell_server("CLIENT", "KILL", "TYPE", "normal")

    def _flush_scripts(self, rng: random.Random) -> None:  # noqa: ARG002
        self._tell_server("SCRIPT", "FLUSH")

    def _garbage(self, rng: random.Random) -> None:
        self._tell_server("RPUSH" if rng.random() < 0.5 else "LPUSH", rng.choice(list(Priority)), garbage(rng))

    def _tell_server(self, *command: str | bytes) -> None:
        """While it is down, it is not told."""
        with suppress(redis.RedisError), redis.Redis.from_url(self._installation.server.url) as client:
            client.execute_command(*command)

    def _net_cut(self, rng: random.Random) -> None:
        with self._network_busy:
            self._installation.proxy.cut()
            self._lasts(rng, 0.1, 4)
            self._installation.proxy.heal()

    def _net_freeze(self, rng: random.Random) -> None:
        with self._network_busy:
            self._installation.proxy.freeze()
            self._lasts(rng, 0.5, 6)
            self._installation.proxy.heal()

    def _net_slow(self, rng: random.Random) -> None:
        with self._network_busy:
            self._installation.proxy.slow(rng.choice([0.02, 0.1, 0.3]))
            self._lasts(rng, 1, 4)
            self._installation.proxy.heal()

    # what people do

    def _poison(self, rng: random.Random) -> None:  # noqa: ARG002
        self._installation.load.poison()

    def _limit(self, rng: random.Random) -> str:
        return self._installation.load.change_limit(rng)

    def _pause(self, rng: random.Random) -> None:
        self._installation.load.pause(rng.uniform(1, 6))

    def _burst(self, rng: random.Random) -> None:
        self._installation.load.burst(rng, rng.randint(50, 200))
