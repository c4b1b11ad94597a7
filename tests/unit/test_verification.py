"""The arithmetic and the texts of the verification: what it would say of records that nobody has seen it make."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pytest

from taskplatform.catalogue import Catalogue, deployed, resolve_calls
from taskplatform.drills import CALL, HOLD, drills, is_drill
from taskplatform.errors import CatalogueError, InvalidInput
from taskplatform.model import TRANSITIONS, JobState, Priority, Transition, slot
from taskplatform.settings import load_settings
from taskplatform.verification import functions
from taskplatform.verification.judges import (
    Turn,
    broken_steps,
    busiest,
    contested,
    histogram,
    passed_over,
    per_second_counts,
    quantile,
    spread,
    turn,
)
from taskplatform.verification.plot import bars, window_svg
from taskplatform.verification.report import Line, Outcome, Plot, Report, Table
from taskplatform.verification.run import Options

HIGH, MEDIUM, LOW = Priority.HIGH, Priority.MEDIUM, Priority.LOW


def _turn(job: str, priority: Priority, place: int, released: int | None, *, due: int = 0, shared: bool = False) -> Turn:
    return Turn(job, priority, place, due, released, released, shared)


@pytest.mark.parametrize(
    ("turns", "wrong"),
    [
        ([_turn("a", HIGH, 0, 10), _turn("b", LOW, 1, 20)], []),
        ([_turn("a", HIGH, 0, 20), _turn("b", LOW, 1, 10)], [("b", "a")]),
        # in the same millisecond nobody knows who went first
        ([_turn("a", HIGH, 0, 10), _turn("b", LOW, 1, 10)], []),
        # who was not due yet has no right to go
        ([_turn("a", HIGH, 0, 20, due=15), _turn("b", LOW, 1, 10)], []),
        ([_turn("a", HIGH, 0, None), _turn("b", LOW, 1, 10)], [("b", "a")]),
        ([_turn("a", HIGH, 0, 20), _turn("b", LOW, 1, 10, shared=True)], []),
        # first come, first served
        ([_turn("a", LOW, 0, 20), _turn("b", LOW, 1, 10)], [("b", "a")]),
        ([_turn("a", LOW, 0, 10), _turn("b", LOW, 1, 20)], []),
    ],
)
def test_who_was_passed_over(turns: list[Turn], wrong: list[tuple[str, str]]) -> None:
    assert [(one.job, other.job) for one, other in passed_over(turns)] == wrong


def test_an_order_is_shown_only_where_there_was_a_choice() -> None:
    assert contested([_turn("a", HIGH, 0, 10), _turn("b", LOW, 1, 20)]) == 1
    assert contested([_turn("a", HIGH, 0, 10), _turn("b", LOW, 1, 20, due=15)]) == 0
    assert contested([_turn("a", LOW, 0, 10), _turn("b", LOW, 1, 20)]) == 0


def _lines(*steps: tuple[int, JobState | None, JobState, str]) -> list[Transition]:
    return [Transition(at, before, after, 1, "w", reason) for at, before, after, reason in steps]


_S = JobState


def test_a_turn_is_the_release_before_the_first_start() -> None:
    history = _lines(
        (1, None, _S.PENDING, "submitted"),
        (2, _S.PENDING, _S.QUEUED, "released"),
        (3, _S.QUEUED, _S.PENDING, "given back"),
        (3, _S.PENDING, _S.PENDING, "a note"),
        (5, _S.PENDING, _S.QUEUED, "released for the share of low"),
        (6, _S.QUEUED, _S.ASSIGNED, "received"),
        (7, _S.ASSIGNED, _S.RUNNING, "started"),
        (8, _S.RUNNING, _S.COMPLETED, "returned"),
    )
    assert turn("a", LOW, 4, 1, history) == Turn("a", LOW, 4, 1, 5, 7, shared=True)
    assert turn("a", LOW, 4, 1, history[:4]) == Turn("a", LOW, 4, 1, None, None)
    assert turn("a", LOW, 4, 1, history[:2]) == Turn("a", LOW, 4, 1, 2, None)
    assert broken_steps(history, TRANSITIONS) == []


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([(1, None, _S.PENDING, ""), (2, _S.QUEUED, _S.ASSIGNED, "")], "assigned follows queued, but the job was pending"),
        ([(1, None, _S.PENDING, ""), (2, _S.PENDING, _S.RUNNING, "")], "pending → running is no step of a job"),
        ([(2, None, _S.PENDING, ""), (1, _S.PENDING, _S.QUEUED, "")], "queued at 1 comes before what went before it"),
    ],
)
def test_a_broken_history(steps: list[tuple[int, JobState | None, JobState, str]], said: str) -> None:
    assert broken_steps(_lines(*steps), TRANSITIONS) == [said]


def test_the_busiest_span_of_a_limit() -> None:
    assert busiest([], per_second=10, burst=5) is None
    steady = [0.0] * 5 + [100.0 * number for number in range(1, 10)]
    found = busiest(steady, per_second=10, burst=5)
    assert found is not None
    assert found.excess <= 0
    found = busiest([*steady, 905.0], per_second=10, burst=5)
    assert found is not None
    assert (found.count, found.span_ms) == (15, 905.0)
    assert found.excess == pytest.approx(15 - 5 - 9.05)
    # two short bursts that a count by whole seconds would not see
    found = busiest([990.0] * 5 + [1010.0] * 5, per_second=10, burst=5)
    assert found is not None
    assert found.excess == pytest.approx(4.8)
    assert per_second_counts([0, 1, 999, 1000, 2500]) == [3, 1, 1]
    assert per_second_counts([]) == []


def test_slots_are_even_and_what_is_not_is_told() -> None:
    points = [slot(f"verify-{number:03}", "verify_spread") for number in range(40)]
    assert spread(points).even
    assert not spread([one / 2 for one in points]).even
    assert not spread([0.5] * 40).even
    assert not spread([]).even
    assert spread([0.25, 0.75]).largest_gap == 0.5
    # the textbook's: of n equidistant points the distance is 1 / 2n, and chi-square 0
    even = spread([(number + 0.5) / 20 for number in range(20)])
    assert even.distance == pytest.approx(0.025)
    assert even.chi_square == 0.0
    assert histogram([-1, 0, 0.5, 0.99, 2], 2) == [2, 3]
    assert [quantile([5, 1, 3, 2, 4], share) for share in (0, 0.5, 0.95, 1)] == [1, 3, 5, 5]
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_even_points_are_not_called_uneven() -> None:
    dice = random.Random(4711)
    assert all(spread([dice.random() for _ in range(dice.randrange(1, 60))]).even for _ in range(2000))


def test_plots_hold_what_they_are_given() -> None:
    assert bars([0.0, 0.1, 0.9], bins=4, label="x") == "x        |█  ▄| at most 2 in a part"
    svg = window_svg([0.1, 0.9], [0.15, 1.2], title='a < b & "c"', window_seconds=10)
    assert "a &lt; b &amp;" in svg
    assert "10 s" in svg
    lines = [one.attrib for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")]
    assert [("stroke-dasharray" in one) for one in lines] == [True, False, False], "the even line, the share that started, the axis"
    # two started, the second after the window: each is a step of a half
    assert lines[1]["points"] == "40.0,340.0 148.0,340.0 148.0,190.0 760.0,190.0 760.0,40.0 760.0,40.0"


def _report(*lines: Line) -> Report:
    began = datetime(2026, 1, 31, 9, tzinfo=UTC)
    return Report(run="r", began=began, seconds=1.5, where="Redis", disruptive=False, lines=lines, removed="2 users were removed")


def _line(outcome: Outcome, text: str = "well", **more: Any) -> Line:
    return Line(check="limit", title="Limit", outcome=outcome, text=text, **more)


def test_a_report_passes_when_something_passed_and_nothing_failed() -> None:
    assert _report(_line(Outcome.PASSED), _line(Outcome.NOT_RUN)).passed
    assert not _report(_line(Outcome.PASSED), _line(Outcome.FAILED)).passed
    assert not _report(_line(Outcome.NOT_RUN)).passed
    assert _report(_line(Outcome.PASSED), _line(Outcome.NOT_RUN)).summary == "1 passed, 0 failed, 1 not run"


def test_a_report_as_markdown_and_json() -> None:
    table = Table("T", ("a", "b"), [("x|y", None), ("<b>`\n*", 1)])
    line = _line(Outcome.FAILED, "a | b", tables=[table], plots=[Plot("P", "▁█", "p.svg", "<svg/>")], facts={"n": 1})
    told = _report(line).to_markdown()
    assert "| x\\|y |  |" in told
    assert "| \\<b\\>\\` \\* | 1 |" in told
    assert "![P](p.svg)" in told
    assert "Failed: 0 passed, 1 failed, 0 not run." in told
    data = json.loads(json.dumps(_report(line).to_json()))
    assert data["checks"][0]["tables"][0]["rows"] == [["x|y", None], ["<b>`\n*", 1]]
    assert (data["began"], data["passed"]) == ("2026-01-31T09:00:00.000+00:00", False)


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInput, match=r"no check 'limits' \(did you mean"):
        Options(only=("limits",))


@dataclass
class _Job:
    attempt: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)


def test_the_functions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("taskplatform.verification.functions.time.sleep", slept.append)
    for given in (0.5, 1e9, -1, float("nan"), float("inf"), "9", True, None, [1]):
        functions.work(_Job(params={"seconds": given}))
        functions.hold(_Job(params={"seconds": given}))
    assert slept[:4] == [0.5, 0.5, 10.0, 60.0]
    assert set(slept[4:]) == {0.0}, "what is no number of seconds is none"
    functions.hold(_Job(attempt=2))
    assert len(slept) == 18, "the second attempt sleeps"
    with pytest.raises(functions.AsAsked, match="attempt 1 fails"):
        functions.work(_Job(params={"failures": 1}))
    assert functions.work(_Job(attempt=2, params={"failures": 1})) == {"attempt": 2}


def test_the_definitions_are_bounded_and_can_be_switched_off(tmp_path: Any) -> None:
    known = {one.id: one for one in drills("http://10.0.0.5:8099/")}
    assert {one.id for one in drills()} == known.keys() - {CALL}
    called = known[CALL].config
    assert called is not None
    assert called.endpoint == "http://10.0.0.5:8099/taskplatform-verify"
    assert all(is_drill(name) for name in known)
    assert all(one.concurrency or one.rate_limit for one in known.values()), "one has no bound of its own"
    assert known[HOLD].timeout.total_seconds() <= 120
    assert resolve_calls(Catalogue.of(*known.values())) == []

    task = "{id: %s, name: Own, cron: '5 * * * *', call: 'tasks.inputs:anything'}"
    (tmp_path / "own.yaml").write_text("tasks: [" + task % "own" + "]\n")
    own = load_settings(tasks_dir=tmp_path)
    assert deployed(own).keys() == {"own", *(one.id for one in drills())}
    assert deployed(own).domain("verify_run") == "verification"
    assert deployed(own.model_copy(update={"verify_definitions": False})).keys() == {"own"}
    (tmp_path / "own.yaml").write_text("tasks: [" + task % HOLD + "]\n")
    with pytest.raises(CatalogueError, match="is taken by a definition of `taskplatform verify`"):
        deployed(own)
