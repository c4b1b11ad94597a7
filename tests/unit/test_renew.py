"""Whether a run that was held up between its start and its call may still make it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from taskplatform import release
from taskplatform.model import START_SLACK_MS
from taskplatform.release import renew
from taskplatform.store import Renewal, Store

SLACK = START_SLACK_MS / 1000


class Asked:
    """A store that takes its time for each answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Renewal, seconds: float = 0.001) -> None:
        self.answers = list(answers)
        self.clock = 1000.0
        self.seconds = seconds
        monkeypatch.setattr(release, "time", SimpleNamespace(monotonic=lambda: self.clock))

    def renew(self, *_: object, **__: object) -> Renewal:
        self.clock += self.seconds
        return self.answers.pop(0)

    def check(self, *, held_up: float) -> Renewal | None:
        asked = self.clock
        self.clock += held_up
        return renew(cast("Store", self), "a:u:m1", delivery=1, worker="w1", asked=asked)


def test_a_run_that_is_in_time_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Asked(monkeypatch).check(held_up=0.9 * SLACK) is Renewal.IN_TIME


@pytest.mark.parametrize("answer", list(Renewal))
def test_a_run_that_was_held_up_asks_once(monkeypatch: pytest.MonkeyPatch, answer: Renewal) -> None:
    asked = Asked(monkeypatch, answer)
    assert asked.check(held_up=3.0) is answer
    assert asked.answers == []


def test_without_a_rate_it_does_not_matter_how_late_the_answer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Asked(monkeypatch, Renewal.ANY_TIME, seconds=2 * SLACK).check(held_up=3.0) is Renewal.ANY_TIME


def test_where_redis_is_too_slow_it_does_not_ask_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, *[Renewal.IN_TIME] * 50, seconds=2 * SLACK)
    assert asked.check(held_up=3.0) is None
    assert len(asked.answers) == 47
