"""The checker of the chaos run finds what it is there to find: each kind of violation is planted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from taskplatform.model import Job, JobState, Limit, Priority, Transition
from taskplatform.model import slot as platform_slot
from tests.chaos.checker import check, tell
from tests.chaos.evidence import Call, Evidence, Expected, FaultDone, Rule
from tests.chaos.faults import WEIGHTS, garbage, sequence
from tests.chaos.model import PLANS, Subscribed, planned, slot, triggered

S = JobState
T0 = 1_800_000_000_000
W1, W2 = "worker@w1#aa", "worker@w2#bb"
REPORT: dict[str, Any] = {"duration_ms": 50}


def made(at: int = T0) -> Transition:
    return Transition(at, None, S.PENDING, 0, "", "made")


def run_of(at: int, attempt: int, worker: str = W1, *, origin: JobState = S.PENDING, released: int | None = None) -> list[Transition]:
    """Released (with the start, or before it) and started."""
    return [
        Transition(at if released is None else released, origin, S.QUEUED, attempt - 1, "", "released"),
        Transition(at, S.QUEUED, S.ASSIGNED, attempt, worker, "received"),
        Transition(at, S.ASSIGNED, S.RUNNING, attempt, worker, "started"),
    ]


def completed(at: int, attempt: int = 1, worker: str = W1) -> Transition:
    return Transition(at, S.RUNNING, S.COMPLETED, attempt, worker, "HTTP 200", REPORT)


def failed(at: int, attempt: int = 1, worker: str = W1) -> Transition:
    return Transition(at, S.RUNNING, S.RETRYING, attempt, worker, "HTTP 500", REPORT)


def lost(at: int, attempt: int = 1, worker: str = W1) -> Transition:
    return Transition(at, S.RUNNING, S.RETRYING, attempt, worker, f"worker {worker} lost")


def call(job: str, arrived: int, ended: int, status: int = 200, *, node: str = "w1", sent: bool = True, key: str | None = None) -> Call:
    return Call(job, job if key is None else key, node, arrived, ended, status, sent)


def job_of(job_id: str, history: list[Transition], *, priority: Priority = Priority.MEDIUM, after: int = T0) -> Job:
    last = history[-1]
    return Job(
        id=job_id,
        definition=job_id.split(":")[0],
        user="u1",
        state=last.to_state,
        priority=priority,
        execute_after_ms=after,
        created_ms=history[0].at_ms,
        occurrence_ms=None,
        attempt=sum(line.to_state is S.RUNNING and line.from_state is not S.RUNNING for line in history),
        failures=0,
        delivery=sum(line.to_state is S.QUEUED for line in history),
        params={},
        worker="",
        started_ms=None,
        finished_ms=last.at_ms if last.to_state.terminal else None,
        reason=last.reason,
        source="api",
        version="",
    )


class Story:
    """Evidence that grows job by job; all is as it must be until a test says otherwise."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {"expected": {}, "jobs": {}, "histories": {}, "calls": []}

    def job(
        self,
        job_id: str,
        *lines: Transition | Iterable[Transition],
        calls: Iterable[Call] = (),
        priority: Priority = Priority.MEDIUM,
        after: int = T0,
        **expected: Any,
    ) -> Story:
        history = [made()]
        for line in lines:
            history += [line] if isinstance(line, Transition) else line
        self.parts["expected"][job_id] = Expected(job_id, after, **expected)
        self.parts["jobs"][job_id] = job_of(job_id, history, priority=priority, after=after)
        self.parts["histories"][job_id] = history
        self.parts["calls"] += calls
        return self

    def good(self, job_id: str = "asked:u1:good", at: int = T0 + 100, **options: Any) -> Story:
        """A job that ran once."""
        return self.job(job_id, run_of(at, 1), completed(at + 60), calls=[call(job_id, at + 5, at + 55)], **options)

    def evidence(self, **more: Any) -> Evidence:
        return Evidence(**{**self.parts, **more})

    def kinds(self, **more: Any) -> list[str]:
        evidence = self.evidence(**more)
        verdict = check(evidence)
        told = tell(evidence, verdict)
        assert all(one.text in told for one in verdict.violations)
        return sorted(one.kind for one in verdict.violations)


J = "asked:u1:k1"


def test_a_good_run_passes() -> None:
    story = Story().good().good("asked:u1:k2", T0 + 200)
    # a run that failed by itself, one that was lost though its call had been answered, and one that hung up and was called again
    story.job(
        J,
        run_of(T0 + 100, 1),
        failed(T0 + 160),
        run_of(T0 + 460, 2, origin=S.RETRYING),
        lost(T0 + 3000, 2),
        run_of(T0 + 4000, 3, W2, origin=S.RETRYING),
        completed(T0 + 4100, 3, W2),
        calls=[
            call(J, T0 + 110, T0 + 150, 500),
            call(J, T0 + 470, T0 + 3500),
            call(J, T0 + 4010, T0 + 4030, 0, node="w2"),
            call(J, T0 + 4031, T0 + 4090, node="w2"),
        ],
    )
    verdict = check(story.evidence(faults=[FaultDone("kill_worker", T0 + 1000, "w1", T0 + 1000)]))

    assert verdict.violations == []
    figures = verdict.figures
    assert (figures["jobs"], figures["calls"], figures["runs_taken_away"]) == (3, 6, 1)
    assert (figures["doubled_explained"], figures["doubled_unexplained"]) == (1, 0)
    assert (figures["recovery_s_median"], figures["recovery_s_max"]) == (3.0, 3.0)
    assert (figures["lag_ms_p50"], figures["lag_ms_max"]) == (100, 200)


@pytest.mark.parametrize("lines", [[], run_of(T0 + 100, 1), [*run_of(T0 + 100, 1), failed(T0 + 200)]])
def test_a_job_that_has_not_ended_is_lost(lines: list[Transition]) -> None:
    assert Story().job(J, lines).kinds() == ["lost"]


def test_a_job_that_must_exist_and_does_not_is_lost() -> None:
    story = Story().good()
    story.parts["expected"][J] = Expected(J, T0)
    assert story.kinds() == ["lost"]

    story.parts["expected"][J] = Expected(J, T0, must=False)
    assert story.kinds() == []


def test_a_job_that_nobody_asked_for() -> None:
    story = Story().good()
    del story.parts["expected"]["asked:u1:good"]
    assert story.kinds() == ["uninvited"]


def test_what_ends_otherwise_than_it_must() -> None:
    gave_up = replace(failed(T0 + 200), to_state=S.FAILED)
    assert Story().job(J, run_of(T0 + 100, 1), gave_up).kinds() == ["lost"]
    canceled = Transition(T0 + 50, S.PENDING, S.CANCELED, 0, "", "canceled by chaos")
    assert Story().job(J, canceled).kinds() == ["lost"]
    assert Story().job(J, canceled, may_be_canceled=True).kinds() == []
    assert Story().good(J, may_be_canceled=True).kinds() == []
    assert Story().good(J, may_be_canceled=True, must_be_canceled=True).kinds() == ["lost"]


def test_a_poison_pill_ends_after_its_losses_and_not_before() -> None:
    def losses(count: int) -> list[Transition]:
        lines: list[Transition] = []
        for number in range(1, count + 1):
            lines += run_of(T0 + 100 * number, number, origin=S.PENDING if number == 1 else S.RETRYING)
            lines.append(lost(T0 + 100 * number + 50, number))
        reason = f"poison pill: worker {W1} lost, {count} losses in all"
        return [*lines[:-1], replace(lines[-1], to_state=S.FAILED, reason=reason)]

    assert Story().job(J, losses(3), poison=True).kinds(max_losses=3) == []
    assert Story().job(J, losses(3)).kinds(max_losses=3) == [], "it may befall a job that did nothing wrong"
    assert Story().job(J, losses(2), poison=True).kinds(max_losses=3) == ["lost"]
    assert Story().good(J, poison=True).kinds() == ["unaccounted"]


def test_a_second_good_call_needs_a_run_that_was_taken_away() -> None:
    one, other = call(J, T0 + 110, T0 + 150), call(J, T0 + 510, T0 + 550)
    again = [*run_of(T0 + 500, 2, origin=S.RETRYING), completed(T0 + 560, 2)]
    assert Story().job(J, run_of(T0 + 100, 1), lost(T0 + 300), again, calls=[one, other]).kinds() == []
    assert Story().job(J, run_of(T0 + 100, 1), failed(T0 + 300), again, calls=[one, other]).kinds() == ["doubled"]
    assert Story().job(J, run_of(T0 + 100, 1), completed(T0 + 600), calls=[one, other]).kinds() == ["doubled"]
    assert (
        check(Story().job(J, run_of(T0 + 100, 1), completed(T0 + 600), calls=[one, other]).evidence()).figures["doubled_unexplained"] == 1
    )


def test_two_calls_at_a_time_need_a_first_one_that_was_given_up() -> None:
    one, other = call(J, T0 + 110, T0 + 900, sent=False), call(J, T0 + 510, T0 + 550, node="w2")
    again = [*run_of(T0 + 500, 2, W2, origin=S.RETRYING), completed(T0 + 560, 2, W2)]
    assert Story().job(J, run_of(T0 + 100, 1), lost(T0 + 300), again, calls=[one, other]).kinds() == []
    assert Story().job(J, run_of(T0 + 100, 1), failed(T0 + 300), again, calls=[one, other]).kinds() == ["overlap"]
    # by one run
    twice = [call(J, T0 + 110, T0 + 150), call(J, T0 + 120, T0 + 150)]
    assert "overlap" in Story().job(J, run_of(T0 + 100, 1), completed(T0 + 200), calls=twice).kinds()


def test_a_call_belongs_to_a_start_of_its_worker() -> None:
    stray = call(J, T0 + 120, T0 + 130, node="w2")
    assert Story().job(J, run_of(T0 + 100, 1), completed(T0 + 200), calls=[call(J, T0 + 110, T0 + 150), stray]).kinds() == ["unaccounted"]
    before = call(J, T0 + 90, T0 + 95)
    assert Story().job(J, run_of(T0 + 100, 1), completed(T0 + 200), calls=[before, call(J, T0 + 110, T0 + 150)]).kinds() == ["unaccounted"]


@pytest.mark.parametrize("calls", [[], [call(J, T0 + 110, T0 + 150, 500)], [call(J, T0 + 110, T0 + 150, sent=False)]])
def test_a_completed_job_had_a_good_answer(calls: list[Call]) -> None:
    assert Story().job(J, run_of(T0 + 100, 1), completed(T0 + 200), calls=calls).kinds() == ["unaccounted"]


def test_the_key_is_the_jobs_id() -> None:
    assert Story().job(J, run_of(T0 + 100, 1), completed(T0 + 200), calls=[call(J, T0 + 110, T0 + 150, key="other")]).kinds() == ["key"]


def test_nothing_is_early() -> None:
    story = Story().good(J)
    story.parts["expected"][J] = Expected(J, T0 + 106)
    assert story.kinds() == ["early"]
    retried = [*run_of(T0 + 100, 1), failed(T0 + 160), *run_of(T0 + 300, 2, origin=S.RETRYING), completed(T0 + 360, 2)]
    calls = [call(J, T0 + 105, T0 + 150, 500), call(J, T0 + 305, T0 + 350)]
    story = Story().job(J, retried, calls=calls)
    assert story.kinds() == []
    story.parts["jobs"][J] = replace(story.parts["jobs"][J], execute_after_ms=T0 + 460)
    assert story.kinds() == ["early"]


def test_no_job_goes_while_a_higher_one_is_due_and_waits() -> None:
    def pair(high_due: int, high_released: int, low_released: int, high: str = "asked:u1:high") -> Story:
        story = Story().job(
            high,
            run_of(T0 + 900, 1, released=high_released),
            completed(T0 + 960),
            calls=[call(high, T0 + 905, T0 + 950)],
            priority=Priority.HIGH,
            after=high_due,
        )
        low = "asked:u1:low"
        return story.job(
            low,
            run_of(T0 + 900, 1, released=low_released),
            completed(T0 + 960),
            calls=[call(low, T0 + 905, T0 + 950)],
            priority=Priority.LOW,
        )

    assert pair(T0 + 100, T0 + 200, T0 + 150).kinds() == ["order"]
    assert pair(T0 + 100, T0 + 200, T0 + 200).kinds() == [], "in one script"
    assert pair(T0 + 100, T0 + 200, T0 + 100).kinds() == [], "it was released before the other was due"
    limited = pair(T0 + 100, T0 + 200, T0 + 150, high="limited:u1:high")
    assert limited.kinds() == ["order"]
    assert limited.kinds(held_back=frozenset({"limited"})) == []


def starts(times: Iterable[int], late: int = 5) -> Story:
    story = Story()
    for number, at in enumerate(times):
        job_id = f"limited:u1:{number}"
        story.job(job_id, run_of(at, 1), completed(at + late + 60), calls=[call(job_id, at + late, at + late + 50)])
    return story


def rule(limit: Limit, end: int = T0 + 60_000) -> Rule:
    return Rule("definition:limited", limit, T0, end, frozenset({"limited"}))


def test_a_rate_holds_in_every_window() -> None:
    limit = Limit(10.0, 3)
    burst_and_rate = [T0 + 1, T0 + 1, *(T0 + 1 + 100 * number for number in range(20))]
    assert starts(burst_and_rate).kinds(rules=[rule(limit)]) == []
    one_more = starts([*burst_and_rate, burst_and_rate[-1]])
    assert one_more.kinds(rules=[rule(limit)]) == ["limit"]
    assert one_more.kinds(rules=[rule(limit, end=T0 + 1000)]) == [], "another limit was in force by then"
    assert one_more.kinds(rules=[replace(rule(limit), definitions=frozenset({"hosted"}))]) == []


def test_a_rate_holds_at_the_target_too() -> None:
    # the starts keep to it, and then four calls come together
    story = starts(T0 + 1000 * number for number in range(8))
    story.parts["calls"] = [
        replace(one, arrived_ms=T0 + 7000 + number, ended_ms=T0 + 7050) if number > 3 else one
        for number, one in enumerate(story.parts["calls"])
    ]
    assert story.kinds(rules=[rule(Limit(1.0, 1))]) == [], "each so late that it was held up on its way"
    close = starts([T0 + 100 * number for number in range(8)])
    close.parts["calls"] = [
        replace(one, arrived_ms=T0 + 240, ended_ms=T0 + 290) if number < 3 else one for number, one in enumerate(close.parts["calls"])
    ]
    assert close.kinds(rules=[rule(Limit(10.0, 1))]) == []
    assert close.kinds(rules=[rule(Limit(2.0, 8))]) == []
    assert close.kinds(rules=[rule(Limit(2.0, 1))]).count("limit") == 2


def test_a_concurrency_holds_at_each_release() -> None:
    limit = Limit(concurrency=2)
    assert starts([T0 + 1, T0 + 2, T0 + 67]).kinds(rules=[rule(limit)]) == []
    assert starts([T0 + 1, T0 + 2, T0 + 66]).kinds(rules=[rule(limit)]) == [], "one ended in this millisecond"
    assert starts([T0 + 1, T0 + 2, T0 + 65]).kinds(rules=[rule(limit)]) == ["limit"]


def test_nothing_is_released_while_it_is_paused() -> None:
    story = Story().good("paused:u1:1", T0 + 100)
    assert story.kinds(pauses=[("paused", T0 + 50, T0 + 150)]) == ["paused"]
    assert story.kinds(pauses=[("paused", T0 + 150, T0 + 250), ("other", T0 + 50, T0 + 150)]) == []


def test_a_history_follows_the_table() -> None:
    skipped = [made(), Transition(T0 + 10, S.PENDING, S.COMPLETED, 0, "", "HTTP 200", REPORT)]
    story = Story().good(J)
    story.parts["histories"][J] = skipped
    assert "history" in story.kinds()
    story = Story().good(J)
    story.parts["histories"][J][1] = replace(story.parts["histories"][J][1], at_ms=T0 - 5)
    assert "history" in story.kinds()
    story = Story().good(J)
    story.parts["jobs"][J] = replace(story.parts["jobs"][J], delivery=2)
    assert story.kinds() == ["history"]


def test_what_the_run_itself_found_counts() -> None:
    assert Story().good().kinds(disagreements=["the database: a job waits twice"]) == ["disagreement"]


# --- the model of what is planned, and the sequence of faults -----------------------------------------------------------------


def test_the_models_own_slot_is_the_platforms() -> None:
    users = [f"u{number}" for number in range(200)]
    assert [slot(user, "high_planned") for user in users] == [platform_slot(user, "high_planned") for user in users]


def test_the_model_plans_each_moment_of_a_subscription_once() -> None:
    since, until = T0 + 12_345, T0 + 600_000
    for definition, minutes in (("high_planned", None), ("low_planned", None), ("medium_planned", 3)):
        plan = PLANS[definition]
        offset = math.floor(slot("u7", definition) * plan.window_ms)
        step = 60_000 * (minutes or plan.minutes)
        expected = [at for at in range(0, 40 * step, step) if since < T0 - T0 % step + at - 20 * step + offset <= until]
        found = list(planned([Subscribed("u7", definition, since, minutes)], until_ms=until, at_most_ms=until, pauses=[], horizon_ms=1000))
        assert [one.not_before_ms for one in found] == [T0 - T0 % step + at - 20 * step + offset for at in expected]
        assert all(one.id.startswith(f"{definition}:u7:") and int(one.id.split(":")[2]) % step == 0 for one in found)
        assert all(one.must for one in found)


def test_the_model_is_sure_of_nothing_around_a_pause_and_after_the_end() -> None:
    one = Subscribed("u7", "paused", T0)
    pause = ("paused", T0 + 300_000, T0 + 301_000)
    found = list(planned([one], until_ms=T0 + 800_000, at_most_ms=T0 + 900_000, pauses=[pause], horizon_ms=1000))
    unsure = [each.not_before_ms - T0 for each in found if not each.must]
    assert all(170_000 < at < 370_000 or at > 800_000 for at in unsure)
    assert any(at < 300_000 for at in unsure)
    assert any(at > 800_000 for at in unsure)
    assert sum(each.must for each in found) >= 7
    elsewhere = list(planned([one], until_ms=T0 + 800_000, at_most_ms=T0 + 800_000, pauses=[("other", *pause[1:])], horizon_ms=1000))
    assert all(each.must for each in elsewhere)


def test_a_trigger_is_for_all() -> None:
    assert [one.id for one in triggered(["u1", "u2"], T0)] == [f"triggered:u1:t{T0}", f"triggered:u2:t{T0}"]


def test_a_seed_gives_the_same_faults_again_and_all_kinds_soon() -> None:
    kinds = list(WEIGHTS)
    first = list(islice(sequence(7, kinds, every=2.0), 200))
    assert first == list(islice(sequence(7, kinds, every=2.0), 200))
    assert first != list(islice(sequence(8, kinds, every=2.0), 200))
    assert {one.kind for one in first[: 3 * len(kinds)]} == set(kinds)
    assert {one.kind for one in islice(sequence(7, ["garbage"], every=2.0), 50)} == {"garbage"}


def test_garbage_is_not_all_alike() -> None:
    import random

    assert len({garbage(random.Random(number)) for number in range(100)}) > 8
