"""What fails is tried again as its policy says, with the same key, and not for ever. The target's log is the judge."""

from __future__ import annotations

from pytest_celery import CeleryTestSetup

from taskplatform.model import JobState, Transition
from tests.acceptance.site import Site
from tests.acceptance.target import Answer, Target

ONCE = ["pending", "queued", "assigned", "running"]
AGAIN = ["retrying", "queued", "assigned", "running"]


def _pauses_ms(history: list[Transition]) -> list[int]:
    """Between the end of each run and the start of the next."""
    ends = [line.at_ms for line in history if line.to_state is JobState.RETRYING]
    starts = [line.at_ms for line in history if line.to_state is JobState.RUNNING]
    return [start - end for end, start in zip(ends, starts[1:], strict=True)]


def test_a_failing_target_is_asked_again_after_the_backoff(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(503), Answer(503, body="still"), Answer(200))
    job = site.wait_for(site.platform.enqueue("retried_call", user=user).id)
    assert job.state is JobState.COMPLETED, site.story(job.id)
    assert job.attempt == 3

    changes = site.changes(job.id)
    assert [line.to_state for line in changes] == [*ONCE, *AGAIN, *AGAIN, "completed"]
    again = [line for line in changes if line.to_state is JobState.RETRYING]
    assert [line.reason for line in again] == ["HTTP 503", "HTTP 503"]
    assert [line.detail["status"] for line in again] == [503, 503]
    assert again[1].detail["excerpt"] == "still"

    calls = target.calls(user=user)
    assert [call.key for call in calls] == [job.id] * 3
    # base 600 ms, doubled, with jitter from half to the whole
    for least, most, pause, earlier, later in zip((300, 600), (600, 1200), _pauses_ms(changes), calls, calls[1:], strict=False):
        # beyond the backoff itself it waits for a release and for a process; another attempt's backoff is another thing
        assert least <= pause <= most + 10_000
        assert later.at_ms - earlier.at_ms >= least


def test_a_retry_is_not_reported_as_a_run_that_broke_off(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    """It would change nothing, but cost the worker's main process a call for each retry, and its time while Redis is away."""
    target.answer(user, Answer(503), Answer(200))
    with site.redis.monitor() as monitor:  # type: ignore[no-untyped-call]
        job = site.wait_for(site.platform.enqueue("retried_call", user=user).id)
        site.redis.echo("that was all")
        sent: list[str] = []
        while not sent or "that was all" not in sent[-1]:
            sent.append(monitor.next_command()["command"])
    assert job.attempt == 2
    of_the_job = [command for command in sent if job.id in command and command.startswith("EVALSHA")]
    assert any(" retrying HTTP 503 " in command for command in of_the_job)
    assert not [command for command in of_the_job if "broke off" in command]


def test_the_targets_own_wish_goes_before_the_backoff(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(429, headers={"Retry-After": "2"}), Answer(200))
    job = site.wait_for(site.platform.enqueue("retried_call", user=user).id)
    first, second = target.calls(user=user)
    assert second.at_ms - first.at_ms >= 2000
    assert 2000 <= job.execute_after_ms - site.changes(job.id)[4].at_ms <= 2001
    assert site.changes(job.id)[4].reason == "HTTP 429"
    assert job.state is JobState.COMPLETED


def test_a_refusal_is_final(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(404, body="no such thing"))
    job = site.wait_for(site.platform.enqueue("retried_call", user=user).id)
    assert site.states(job.id) == [*ONCE, "failed"]
    assert job.reason == "HTTP 404"
    assert site.changes(job.id)[-1].detail["excerpt"] == "no such thing"
    assert len(target.calls(user=user)) == 1


def test_retries_are_used_up(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    job = site.wait_for(site.platform.enqueue("raising", user=user).id)
    assert site.states(job.id) == [*ONCE, *AGAIN, *AGAIN, "failed"]
    reasons = [line.reason for line in site.changes(job.id) if line.to_state in (JobState.RETRYING, JobState.FAILED)]
    assert reasons == [f"ValueError: attempt {attempt} went wrong" for attempt in (1, 2, 3)]
    assert all(pause >= 300 for pause in _pauses_ms(site.changes(job.id)))
    assert len(target.calls(user=user)) == 3


def test_a_function_that_recovers_completes(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    job = site.wait_for(site.platform.enqueue("raising", user=user, params={"times": 1}).id)
    assert site.states(job.id) == [*ONCE, *AGAIN, "completed"]
    assert site.changes(job.id)[-1].detail["excerpt"] == '"went well"'


def test_a_function_may_retry_as_celery_tasks_do(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    job = site.wait_for(site.platform.enqueue("retrying_itself", user=user).id)
    assert site.states(job.id) == [*ONCE, *AGAIN, *AGAIN, "completed"]
    assert all(700 <= pause <= 10_700 for pause in _pauses_ms(site.changes(job.id)))
    assert len(target.calls(user=user)) == 3


def test_a_function_that_exits_is_a_failed_attempt_and_no_lost_worker(
    celery_setup: CeleryTestSetup, site: Site, target: Target, user: str
) -> None:
    job = site.wait_for(site.platform.enqueue("exiting", user=user).id)
    assert site.states(job.id) == [*ONCE, "failed"]
    assert job.reason == "SystemExit: 2"
    assert len(target.calls(user=user)) == 1


def test_a_job_that_failed_can_be_run_again_by_hand(celery_setup: CeleryTestSetup, site: Site, target: Target, user: str) -> None:
    target.answer(user, Answer(404), Answer(200))
    job = site.wait_for(site.platform.enqueue("call", user=user).id)
    assert job.state is JobState.FAILED
    site.platform.retry(job.id)
    assert site.wait_for(job.id).state is JobState.COMPLETED
    assert site.states(job.id) == [*ONCE, "failed", *ONCE, "completed"]
    assert [call.key for call in target.calls(user=user)] == [job.id] * 2
