"""When a worker is deaf, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from taskplatform.hearing import Hearing


class Worker:
    """A worker that is judged each second. What it does in that second is for the test to change."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns = self.answers = True
        self.takes = False
        self.has_place = True
        self.heads: Mapping[str, str] | None = {}
        self.slow_seconds = 0.0
        self.hearing = Hearing(patience=5, interval=1, clock=lambda: self.now)

    def live(self, seconds: int) -> str | None:
        """The first complaint in that time."""
        for _ in range(seconds):
            self.now += 1
            if self.turns:
                self.hearing.turned()
            if self.answers:
                self.hearing.answered(message=self.takes)
            why = self.hearing.judge(self._look, has_place=self.has_place)
            if why is not None:
                return why
        return None

    def _look(self) -> Mapping[str, str] | None:
        self.now += self.slow_seconds
        return self.heads


@pytest.fixture
def worker() -> Worker:
    found = Worker()
    assert found.live(100) is None
    return found


def test_a_loop_that_hangs(worker: Worker) -> None:
    worker.turns = worker.answers = False
    assert worker.live(5) is None
    assert worker.hearing.turns(within=5)
    assert not worker.hearing.turns(within=4)
    assert worker.live(1) == "its main loop has not turned for 6.0 s"


def test_a_worker_that_asks_and_gets_no_answer(worker: Worker) -> None:
    worker.answers = False
    assert worker.live(5) is None
    assert worker.live(1) == "it has free slots and had no answer from the broker for 6.0 s"


def test_a_busy_worker_does_not_ask(worker: Worker) -> None:
    worker.answers = worker.has_place = False
    worker.heads = {"low": "a"}
    assert worker.live(50) is None
    worker.has_place = True
    assert worker.live(5) is None
    assert worker.live(1) is not None


def test_a_message_that_lies(worker: Worker) -> None:
    """The broker answers, but it is not the one where the message lies."""
    worker.heads = {"high": "c", "low": "a"}
    assert worker.live(5) is None
    worker.heads = {"low": "b"}
    assert worker.live(6) is None
    assert worker.live(1) == "it has free slots, and a message lies in queue low for 6.0 s"


def test_who_takes_others_is_not_deaf(worker: Worker) -> None:
    worker.heads = {"low": "a"}
    worker.takes = True
    assert worker.live(50) is None


def test_nobody_is_deaf_while_redis_is_away_or_slow(worker: Worker) -> None:
    worker.turns = worker.answers = False
    worker.heads = None
    assert worker.live(50) is None
    worker.heads = {"low": "a"}
    worker.slow_seconds = 2
    assert worker.live(50) is None
    worker.slow_seconds = 0
    assert worker.live(5) is None
    assert worker.live(1) is not None


def test_a_process_that_was_frozen_has_its_time(worker: Worker) -> None:
    worker.turns = worker.answers = False
    worker.now += 1000
    assert worker.live(5) is None
    worker.turns = worker.answers = True
    assert worker.live(50) is None


def test_after_a_new_connection_the_time_begins_anew(worker: Worker) -> None:
    worker.answers = False
    assert worker.live(5) is None
    worker.hearing.begin()
    assert worker.live(5) is None


def test_a_worker_that_starts_offers_its_slots() -> None:
    worker = Worker()
    worker.now += 20
    assert worker.hearing.turns(within=1)
    worker.now += 20
    assert not worker.hearing.turns(within=1)
