"""The Python API's own part: what it refuses before anything is changed, in which words, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from taskplatform.catalogue import load
from taskplatform.errors import Conflict, InvalidInput, UnknownDefinition, UnknownJob
from taskplatform.model import JobState, Limit, Priority
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import LimitState, Store
from tests.integration.harness import ACTOR, offer

TASKS = """
tasks:
  - {id: weekly_backup, name: Weekly backup, interval: {type: weekly}, config: {endpoint: "https://api.example.com/{{user}}"}}
"""


@pytest.fixture
def platform(store: Store, tmp_path: Path) -> Platform:
    """With one definition, on the session's server, with the test's clock; nobody leads."""
    (tmp_path / "tasks.yaml").write_text(TASKS)
    found = Platform(store, load(tmp_path), Settings(), actor=ACTOR)
    found.publish_missing()
    return found


def state_of(platform: Platform, name: str) -> LimitState:
    return next(state for state in platform.limits() if state.name == name)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["total", "definition:weekly_backup", "host:api.example.com", "host:[::1]:8080"])
def test_a_rate_is_set_and_taken_back(platform: Platform, name: str) -> None:
    assert platform.set_limit(name, "10/s")
    assert platform.store.limits() == {name: Limit(10, 2)}
    assert not platform.set_limit(name, "10/s", burst=2)
    assert platform.set_limit(name, "90/m", burst=5)
    assert state_of(platform, name).limit == Limit(1.5, 5)
    assert platform.reset_limit(name)
    assert not platform.reset_limit(name)
    assert platform.limits() == []


@pytest.mark.parametrize("name", ["definition:weekly_backup", "host:localhost:8000", "user", "user:u1"])
def test_a_concurrency_is_set_and_taken_back(platform: Platform, name: str) -> None:
    assert platform.set_limit(name, concurrency=3)
    assert platform.store.limits() == {name: Limit(concurrency=3)}
    assert platform.reset_limit(name)
    assert platform.limits() == []


def test_a_live_limit_goes_before_what_is_configured_until_it_is_reset(platform: Platform) -> None:
    configured = Limit(10, 15)
    platform.store.configure_limits({"total": configured}, actor=ACTOR)
    assert platform.set_limit("total")
    none = state_of(platform, "total")
    assert (none.limit, none.configured, none.live, none.tokens) == (Limit(), configured, True, None)
    # a beat that leads anew changes nothing about it
    platform.store.configure_limits({"total": Limit(20, 30)}, actor=ACTOR)
    assert state_of(platform, "total").limit == Limit()
    assert platform.reset_limit("total")
    back = state_of(platform, "total")
    assert (back.limit, back.configured, back.live) == (Limit(20, 30), Limit(20, 30), False)


def test_a_live_limit_like_the_configured_one_stays_live(platform: Platform) -> None:
    platform.store.configure_limits({"total": Limit(10, 15)}, actor=ACTOR)
    assert not platform.set_limit("total", "10/s", burst=15)
    assert state_of(platform, "total").live
    assert not platform.reset_limit("total")
    assert not state_of(platform, "total").live


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("everything", {"rate": "5/s"}, "limit 'everything' is not known: total, definition:ID, host:HOST, user and user:ID are"),
        ("totl", {"rate": "5/s"}, """limit 'totl' is not known (did you mean "total"?)"""),
        ("", {"rate": "5/s"}, "limit '' is not known: "),
        (None, {"rate": "5/s"}, "limit None is not known: "),
        ("total:x", {"rate": "5/s"}, "limit 'total:x' is not known"),
        ("definition", {"rate": "5/s"}, "limit 'definition' is not known"),
        ("definition:", {"rate": "5/s"}, "definition id '' is not accepted"),
        ("definition:Weekly Backup", {"rate": "5/s"}, "definition id 'Weekly Backup' is not accepted"),
        ("host", {"rate": "5/s"}, "limit 'host' is not known"),
        ("host:", {"rate": "5/s"}, "host '' is not accepted"),
        ("host:https://a.b/", {"rate": "5/s"}, """host 'https://a.b/' is not accepted (did you mean "a.b"?)"""),
        ("user:", {"concurrency": 1}, "user id '' is not accepted"),
        ("user:a b", {"concurrency": 1}, "user id 'a b' is not accepted"),
        ("total", {"concurrency": 5}, "limit total: takes rate and burst"),
        ("total", {"rate": "5/s", "concurrency": 5}, "limit total: takes rate and burst"),
        ("user", {"rate": "5/s"}, "limit user: takes concurrency"),
        ("user:u1", {"rate": "5/s", "concurrency": 1}, "limit user:u1: takes concurrency"),
        ("total", {"rate": "5"}, """limit total: rate: '5' is not a rate such as "10/s\""""),
        ("total", {"rate": 5}, "limit total: rate: got 5; it takes text (count per second"),
        ("total", {"rate": "5/s", "burst": 0}, "limit total: burst: got 0; it takes a whole number from 1 to 1000000"),
        ("host:a", {"burst": 2}, "limit host:a: takes rate, concurrency, or both"),
        ("host:a", {"burst": 2, "concurrency": 1}, "limit host:a: burst: goes with rate"),
        ("user", {"concurrency": -1}, "limit user: concurrency: got -1; it takes a whole number from 1"),
    ],
)
def test_a_limit_that_is_none_is_refused(platform: Platform, name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        platform.set_limit(name, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert platform.limits() == []


def test_a_limit_is_set_for_a_definition_that_exists_and_reset_for_any(platform: Platform) -> None:
    with pytest.raises(UnknownDefinition, match="did you mean"):
        platform.set_limit("definition:weekly_bakcup", "5/s")
    assert not platform.reset_limit("definition:weekly_bakcup")
    # set while it was in the catalogue
    platform.store.set_limit("definition:gone", Limit(1, 1), actor=ACTOR)
    assert platform.reset_limit("definition:gone")
    assert platform.limits() == []
    with pytest.raises(InvalidInput, match="is not known"):
        platform.reset_limit("definitions:weekly_backup")


# --- priority --------------------------------------------------------------------------------------------------------


def test_the_priority_of_a_job_that_waits(platform: Platform) -> None:
    platform.create_user("u1")
    job = platform.enqueue("weekly_backup", user="u1", countdown=60, priority="low")
    assert platform.set_priority(job.id, Priority.HIGH).priority == "high"
    assert platform.set_priority(job.id, "high").priority == "high"
    notes = [(line.from_state, line.to_state, line.reason) for line in platform.history(job.id)[1:]]
    assert notes == [(JobState.PENDING, JobState.PENDING, f"priority high given by {ACTOR}")]


def _released(platform: Platform, job_id: str) -> None:
    offer(platform.store)
    platform.store.release()


def _canceled(platform: Platform, job_id: str) -> None:
    platform.cancel(job_id)


@pytest.mark.parametrize(("change", "state"), [(_released, JobState.QUEUED), (_canceled, JobState.CANCELED)])
def test_the_priority_of_another_job_stays(platform: Platform, change: Callable[[Platform, str], None], state: JobState) -> None:
    platform.create_user("u1")
    job = platform.enqueue("weekly_backup", user="u1", countdown=timedelta(), priority="low")
    change(platform, job.id)
    with pytest.raises(Conflict, match=f"is {state}: the priority of a job that waits can be changed"):
        platform.set_priority(job.id, "high")
    assert platform.job(job.id).priority == "low"


def test_a_priority_that_is_none_is_refused(platform: Platform) -> None:
    platform.create_user("u1")
    job = platform.enqueue("weekly_backup", user="u1", countdown=60)
    with pytest.raises(InvalidInput, match="priority 'urgent' is not accepted: high, medium, low are"):
        platform.set_priority(job.id, "urgent")
    with pytest.raises(UnknownJob, match="no job 'nothing'"):
        platform.set_priority("nothing", "high")
    assert platform.job(job.id) == job
