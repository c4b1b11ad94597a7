"""The control API over TLS on a real server: every verb, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
import redis

from taskplatform.api.security import OPEN_PATHS
from taskplatform.local import EmbeddedServer
from taskplatform.model import JobState, Priority
from taskplatform.platform import JobRequest, Platform
from tests.conftest import ROOT
from tests.integration.apiserver import KEY, Api, running_api
from tests.integration.harness import offer
from tests.support import wait_until

JOB = {"definition": "sync", "user": "u1"}
#: What is not there, for each parameter of a path.
PLACES = {"job_id": "sync:u1:m0", "user": "none", "definition": "none", "name": "none", "node": "none", "host": "none:0", "whom": "none"}
PLACES |= {"backfill": "none"}
WORKER = "w1"


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url, api_max_body=20_000, api_wrong_keys=60_000) as api:
        yield api


@pytest.fixture
def api(served: Api, client: redis.Redis) -> Api:
    """On an empty server, with the definitions and two users."""
    served.platform.publish_missing()
    served.platform.create_users(["u1", "u2"])
    return served


@pytest.fixture
def platform(api: Api) -> Platform:
    return api.platform


def refused(api: Api, method: str, path: str, body: Any = None, *, status: int, **options: Any) -> dict[str, Any]:
    """The problem that is answered."""
    answer = api.raw(method, path, body, **options)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert (found["type"], found["status"]) == ("about:blank", status)
    assert found["title"]
    return found


def end(platform: Platform, job_id: str, state: JobState, reason: str = "HTTP 500") -> None:
    """Be the worker that runs a job that waits, to this end."""
    store = platform.store
    offer(store, WORKER, slots=100)
    store.release()
    assert store.start(job_id, delivery=store.job(job_id).delivery, worker=WORKER).go
    assert store.finish(job_id, delivery=store.job(job_id).delivery, worker=WORKER, state=state, reason=reason)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_no_route_but_two_answers_without_a_key(api: Api) -> None:
    routes = [(method, route.path) for route in api_routes(api) for method in route.methods]
    assert len(routes) > 45
    for method, path in routes:
        place = path.format_map(PLACES)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}):
            # not even a body that is none is looked at
            answer = api.raw(method, place, headers={"Authorization": None, **headers}, data=b"{" if method != "GET" else None)
            if path in OPEN_PATHS:
                assert answer.status_code in (200, 503)
            else:
                assert answer.status_code == 401, f"{method} {place}"
                assert answer.headers["www-authenticate"].startswith("Bearer")
    assert {path for _, path in routes} > OPEN_PATHS


def documented_scopes() -> dict[tuple[str, str], str]:
    """By method and path, as docs/api.md has them."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(/\S+)` \| ([A-Z, ]*) \| ([A-Z, ]*) \| ([A-Z, ]*) \|$", text, re.MULTILINE)
    return {
        (method, path): scope
        for path, *cells in rows
        for scope, cell in zip(("read", "submit", "admin"), cells, strict=True)
        for method in filter(None, cell.strip().split(", "))
    }


def test_each_route_takes_the_scope_that_the_documents_say(api: Api) -> None:
    expected = documented_scopes()
    document = api("GET", "/v1/openapi.json")["paths"]
    told = {
        (method.upper(), path): operation["security"]
        for path, operations in document.items()
        for method, operation in operations.items()
        if path not in OPEN_PATHS
    }
    assert told == {where: [{"key": [scope]}] for where, scope in expected.items()}
    for (method, path), scope in expected.items():
        assert document[path][method.lower()]["description"].endswith(f"Takes the scope `{scope}`.")
    for scopes in (("read",), ("submit",), ("read", "submit"), ("admin",)):
        headers = api.key(*scopes)
        for (method, path), scope in expected.items():
            # a body that none takes: the scope is asked for first, and nothing is done
            answer = api.raw(method, path.format_map(PLACES), headers=headers, data=b"[")
            where = f"{method} {path} with {scopes}"
            if scope in scopes or scopes == ("admin",):
                assert answer.status_code in (415, 422), f"{where}: {answer.text}"
            else:
                assert (answer.status_code, answer.json()["scope"]) == (403, scope), where
                assert f'error="insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]
    assert not any(change.actor.startswith("api:") for change in api.platform.changes())


def test_a_refusal_is_a_problem_like_all_others_and_is_counted(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "taskplatform.api.guard")

    def counted(status: int) -> float:
        lines = api.raw("GET", "/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if '_requests_total{method="PUT",route=' in line and f'"{status}"' in line
        )

    reader = api.key("read")
    for headers, status, actor in (({"Authorization": None}, 401, "-"), (reader, 403, "read")):
        before = counted(status)
        answer = api.raw("PUT", "/v1/limits/total", {}, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")
        assert answer.json()["status"] == status
        assert counted(status) == before + 1
        (id_,) = answer.raw.headers.getlist("x-request-id")
        assert f" {actor} PUT /v1/limits/total {status} " in next(line for line in caplog.messages if id_ in line)
        assert api.platform.store.access.audit(limit=1)[0].request == id_


def test_the_audit_log_says_what_it_was_about(api: Api, platform: Platform) -> None:
    headers = api.key("submit")
    made = api("POST", "/v1/jobs", JOB, status=201, headers={**headers, "Idempotency-Key": "k"})["id"]
    api("POST", "/v1/jobs", JOB, status=201, headers={**headers, "Idempotency-Key": "k"})
    two = [
        one["job"]["id"]
        for one in api("POST", "/v1/jobs/batch", {"items": [JOB, {**JOB, "user": "nobody"}, JOB]}, headers=headers)["items"]
        if one["job"]
    ]
    refused(api, "POST", "/v1/jobs", {**JOB, "user": "nobody"}, status=422, headers=headers)
    api("POST", "/v1/users", {"id": "u3", "name": "Eve"}, status=201, headers=headers)
    api("PUT", f"/v1/jobs/{made}/priority", {"priority": "low"}, headers=headers)
    api("PUT", "/v1/users/u1/subscriptions/report", {}, headers=headers)
    refused(api, "DELETE", "/v1/users/u1", status=403, headers=headers)
    api("DELETE", "/v1/users/u3")
    api("PUT", "/v1/limits/total", {"rate": "5/s"})
    api("POST", "/v1/dead-letters/discard", {"user": "u1", "limit": 5})
    api("POST", "/v1/definitions/sync/trigger", {}, status=201)
    told = [
        (one.key, one.action, one.status, one.about) for one in reversed(platform.store.access.audit()) if one.kind in ("requests", "admin")
    ]
    assert told == [
        ("submit", "POST /v1/jobs", 201, f"definition=sync user=u1 job={made}"),
        ("submit", "POST /v1/jobs", 201, f"definition=sync user=u1 answered=before location=/v1/jobs/{made}"),
        ("submit", "POST /v1/jobs/batch", 200, f"made=2/3 jobs={','.join(two)}"),
        ("submit", "POST /v1/jobs", 422, "definition=sync user=nobody"),
        ("submit", "POST /v1/users", 201, "user=u3"),
        ("submit", f"PUT /v1/jobs/{made}/priority", 200, f"job_id={made} priority=low"),
        ("submit", "PUT /v1/users/u1/subscriptions/report", 200, "user=u1 definition=report"),
        ("submit", "DELETE /v1/users/u1", 403, "user=u1"),
        ("bootstrap", "DELETE /v1/users/u3", 200, "user=u3"),
        ("bootstrap", "PUT /v1/limits/total", 200, "name=total rate=5/s"),
        ("bootstrap", "POST /v1/dead-letters/discard", 200, "user=u1 limit=5 discarded=0"),
        ("bootstrap", "POST /v1/definitions/sync/trigger", 201, "definition=sync subscribers=0"),
    ]
    assert [one.actor for one in platform.changes(about=["u3"])] == ["api:bootstrap", "api:submit"]


def api_routes(api: Api) -> list[Any]:
    guard = api.server.config.app
    return list(guard._app.state.routes)  # type: ignore[union-attr]


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_from_submission_to_its_end(api: Api, platform: Platform) -> None:
    answer = api.raw("POST", "/v1/jobs", {**JOB, "params": {"source": "erp"}, "priority": "low"})
    assert answer.status_code == 201
    job = answer.json()
    assert (job["state"], job["priority"], job["params"], job["source"]) == ("pending", "low", {"source": "erp"}, "api")
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    waits = api("GET", f"/v1/jobs/{job['id']}")
    assert waits.pop("waits")["reason"] == "no worker serves the queue low"
    assert waits == job
    assert api("PUT", f"/v1/jobs/{job['id']}/priority", {"priority": "high"})["priority"] == "high"
    end(platform, job["id"], JobState.FAILED)
    failed = api("GET", f"/v1/jobs/{job['id']}")
    assert failed["waits"] is None
    assert (failed["state"], failed["reason"], failed["worker"], failed["attempt"]) == ("failed", "HTTP 500", WORKER, 1)
    assert datetime.fromisoformat(failed["finished"]) >= datetime.fromisoformat(failed["started"])
    assert "dead letter" not in refused(api, "PUT", f"/v1/jobs/{job['id']}/priority", {"priority": "low"}, status=409)["detail"]
    assert refused(api, "POST", f"/v1/jobs/{job['id']}/cancel", status=409)["detail"].endswith("it cannot be canceled any more")
    assert api("POST", f"/v1/jobs/{job['id']}/retry")["state"] in ("pending", "queued")
    assert api("POST", f"/v1/jobs/{job['id']}/cancel")["state"] == "canceled"
    states = [line["to_state"] for line in api("GET", f"/v1/jobs/{job['id']}/history")["items"]]
    assert states[0] == "pending"
    assert states[-1] == "canceled"
    reasons = [line["reason"] for line in api("GET", f"/v1/jobs/{job['id']}/history")["items"]]
    assert {"priority high given by api:bootstrap", "retried by api:bootstrap", "canceled by api:bootstrap"} <= set(reasons)


def test_a_job_for_later(api: Api) -> None:
    eta = datetime.now(UTC) + timedelta(hours=1)
    job = api("POST", "/v1/jobs", {**JOB, "eta": eta.isoformat()}, status=201)
    assert abs(datetime.fromisoformat(job["execute_after"]) - eta) < timedelta(milliseconds=2)
    job = api("POST", "/v1/jobs", {**JOB, "countdown": 3600}, status=201)
    assert abs(datetime.fromisoformat(job["execute_after"]) - eta) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({"definition": "sync"}, "/user", "is missing; it takes text"),
        ({**JOB, "user": "no body"}, "/user", 'got "no body"; it takes text'),
        ({**JOB, "user": 7}, "/user", "got 7; it takes text"),
        ({**JOB, "user": "nobody"}, "/user", "no user 'nobody'"),
        ({**JOB, "definition": "nothing"}, "/definition", "no definition 'nothing'"),
        ({**JOB, "definition": "sync\n"}, "/definition", "got "),
        ({**JOB, "usr": "u1"}, "/usr", 'is not a known field (did you mean "user"?)'),
        ({**JOB, "a/b~c": 1}, "/a~1b~0c", "is not a known field"),
        ({**JOB, "priority": "urgent"}, "/priority", "one of high, medium, low"),
        ({**JOB, "countdown": "5"}, "/countdown", 'got "5"; it takes a number'),
        ({**JOB, "countdown": -1}, "/countdown", "got -1; it takes a number from 0"),
        ({**JOB, "countdown": True}, "/countdown", "got true; it takes a number"),
        ({**JOB, "countdown": 1e300}, "/countdown", "it takes a number from 0"),
        ({**JOB, "eta": "tomorrow"}, "/eta", 'got "tomorrow"'),
        ({**JOB, "eta": "2027-01-01T00:00:00"}, "/eta", 'got "2027-01-01T00:00:00"'),
        ({**JOB, "eta": "9999-12-31T23:59:59Z"}, "/eta", "is more than 366 days ahead"),
        ({**JOB, "params": [1]}, "/params", "got a list; it takes a mapping"),
        ({**JOB, "params": {"x": "y" * 17_000}}, "/params", "bytes of JSON, at most 16384 are accepted"),
        ({**JOB, "definition": "needy"}, "/params", "params of needy: what missing"),
        ([JOB], "", "a mapping with definition (needed)"),
        (None, "", "a mapping with definition (needed)"),
    ],
)
def test_a_submission_that_is_wrong_says_where(api: Api, platform: Platform, body: Any, pointer: str, detail: str) -> None:
    found = refused(api, "POST", "/v1/jobs", status=422, data=json.dumps(body), headers={"Content-Type": "application/json"})
    (fault,) = found["errors"]
    assert fault["pointer"] == pointer
    assert detail in fault["detail"]
    assert platform.jobs().items == ()


def test_all_faults_are_told_at_once(api: Api) -> None:
    found = refused(api, "POST", "/v1/jobs", {"user": 1, "priority": "x"}, status=422)
    assert [fault["pointer"] for fault in found["errors"]] == ["/definition", "/user", "/priority"]
    assert found["detail"] == "3 faults"


def test_countdown_and_eta_exclude_each_other(api: Api) -> None:
    found = refused(api, "POST", "/v1/jobs", {**JOB, "countdown": 1, "eta": "2027-01-01T00:00:00Z"}, status=422)
    assert found["detail"] == "countdown and eta exclude each other"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8: byte 1"),
        (b'{"user": NaN}', "NaN is not a JSON value"),
        (b'{"user": "u1", "user": "u2"}', "'user' is given twice"),
        (b'{"user": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 9000, "is not JSON"),
        (b'{"user": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_body_that_is_no_json_is_refused(api: Api, body: bytes, detail: str) -> None:
    found = refused(api, "POST", "/v1/jobs", status=400, data=body, headers={"Content-Type": "application/json"})
    assert detail in found["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_of_another_kind_is_refused(api: Api, kind: str) -> None:
    answer = api.raw("POST", "/v1/jobs", data=json.dumps(JOB), headers={"Content-Type": kind or None})
    assert answer.status_code == 415
    assert answer.headers["accept"] == "application/json"
    assert answer.json()["title"] == "Unsupported Media Type"


def test_a_body_where_none_is_taken_is_refused(api: Api) -> None:
    assert "takes no body" in refused(api, "POST", "/v1/users/u1/pause", {"for": "1h"}, status=422)["detail"]
    assert "takes no body" in refused(api, "GET", "/v1/users", {"limit": 1}, status=422)["detail"]
    assert api("POST", "/v1/users/u1/pause", {})["paused"]


def test_many_jobs_each_on_its_own(api: Api, platform: Platform) -> None:
    items = [
        {**JOB, "idempotency_key": "a"},
        {**JOB, "user": "nobody"},
        {**JOB, "definition": "nothing"},
        {**JOB, "definition": "needy"},
        {**JOB, "user": "u2"},
        {**JOB, "idempotency_key": "a"},
    ]
    made = api("POST", "/v1/jobs/batch", {"items": items})["items"]
    assert [one["status"] for one in made] == [201, 422, 422, 422, 201, 201]
    assert [one["problem"]["errors"][0]["pointer"] for one in made if one["problem"]] == [
        "/items/1/user",
        "/items/2/definition",
        "/items/3/params",
    ]
    assert made[0]["job"]["id"] == made[5]["job"]["id"] != made[4]["job"]["id"]
    assert len(platform.jobs().items) == 2
    found = refused(api, "POST", "/v1/jobs/batch", {"items": [JOB, {**JOB, "user": ""}]}, status=422)
    assert found["errors"][0]["pointer"] == "/items/1/user"
    assert refused(api, "POST", "/v1/jobs/batch", {"items": []}, status=422)["errors"][0]["pointer"] == "/items"
    assert len(platform.jobs().items) == 2


def test_jobs_are_listed_by_what_they_are(api: Api, platform: Platform) -> None:
    ids = [
        api("POST", "/v1/jobs", {"definition": name, "user": user}, status=201)["id"] for name in ("sync", "clean") for user in ("u1", "u2")
    ]
    api("POST", f"/v1/jobs/{ids[0]}/cancel")

    def listed(**query: Any) -> set[str]:
        return {job["id"] for job in api("GET", "/v1/jobs", params=query)["items"]}

    assert listed() == set(ids)
    assert listed(user="u1") == {ids[0], ids[2]}
    assert listed(definition="clean") == {ids[2], ids[3]}
    assert listed(state="canceled") == {ids[0]}
    assert listed(state=["canceled", "pending"], user="u1") == {ids[0], ids[2]}
    hour = timedelta(hours=1)
    now = datetime.fromtimestamp(platform.store.now_ms() / 1000, UTC)
    assert listed(since=(now - hour).isoformat(), until=(now + hour).isoformat()) == set(ids)
    assert listed(until=(now - hour).isoformat()) == listed(since=(now + hour).isoformat()) == set()
    assert "nobody" in refused(api, "GET", "/v1/jobs?user=nobody", status=404)["detail"]
    assert "nothing" in refused(api, "GET", "/v1/jobs?definition=nothing", status=404)["detail"]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=many", "limit"),
        ("state=done", "state.0"),
        ("since=yesterday", "since"),
        ("since=2027-01-01T00:00:00", "since"),
        ("user=a%20b", "user"),
        ("stat=failed", "stat"),
        ("cursor=!", "cursor"),
        ("cursor=%C3%A9", "cursor"),
        ("cursor=YWJj", "cursor"),  # abc
        ("cursor=wrJ8eA", "cursor"),  # a digit that is no number, and |x
        ("cursor=" + "OTk5" * 60 + "fHg", "cursor"),  # 999…|x
        ("cursor=", "cursor"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(api: Api, query: str, parameter: str) -> None:
    found = refused(api, "GET", f"/v1/jobs?{query}", status=422)
    assert [fault["parameter"] for fault in found["errors"]] == [parameter]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs?user=u1", "/v1/jobs?state=pending&state=canceled", "/v1/dead-letters"])
def test_pages_are_stable_while_jobs_come_and_go(api: Api, platform: Platform, path: str) -> None:
    def make() -> str:
        job_id: str = api("POST", "/v1/jobs", JOB, status=201)["id"]
        if "dead" in path:
            end(platform, job_id, JobState.FAILED)
        return job_id

    stay, go = [make() for _ in range(12)], [make() for _ in range(3)]
    seen: list[str] = []
    cursor: str | None = None
    pages = 0
    while True:
        page = api("GET", path, params={"limit": 2, **({"cursor": cursor} if cursor else {})})
        seen += [job["id"] for job in page["items"]]
        pages += 1
        cursor = page["next"]
        if cursor is None:
            break
        make()  # newer than all that comes
        if go:
            platform.store.discard([gone := go.pop()], actor="test", subject="", detail="")
            if "dead" not in path:
                platform.cancel(gone)
    assert pages >= 6
    assert len(seen) == len(set(seen)), "one came twice"
    assert set(stay) <= set(seen), "one that stays was left out"


def test_a_rare_state_is_found_page_by_page(api: Api, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskplatform.api import jobs

    monkeypatch.setattr(jobs, "MOST_LOOKED_AT", 10)
    rare = api("POST", "/v1/jobs", JOB, status=201)["id"]
    platform.cancel(rare)
    # 100 are read at a time
    platform.enqueue_many([JobRequest(definition="sync", user="u1")] * 250)
    found: list[str] = []
    pages, cursor = 0, None
    while pages == 0 or cursor:
        page = api("GET", "/v1/jobs", params={"state": "canceled", "limit": 5, **({"cursor": cursor} if cursor else {})})
        found += [job["id"] for job in page["items"]]
        cursor, pages = page["next"], pages + 1
    assert found == [rare]
    assert pages >= 3


@pytest.mark.parametrize(
    "job_id", ["sync:u1:m0", "nothing", "a:b", "a:b:c:d", "%00", "sync:u1:%0a", "%F0%9F%92%A9", "sync:u1:*", "x" * 299]
)
@pytest.mark.parametrize(("method", "rest"), [("GET", ""), ("GET", "/history"), ("POST", "/cancel"), ("POST", "/retry")])
def test_a_job_that_is_not_there(api: Api, job_id: str, method: str, rest: str) -> None:
    assert "no job" in refused(api, method, f"/v1/jobs/{job_id}{rest}", status=404)["detail"]


# --- once ------------------------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_job(api: Api, platform: Platform) -> None:
    key = {"Idempotency-Key": '"one two"'}
    first = api.raw("POST", "/v1/jobs", JOB, headers=key)
    again = api.raw("POST", "/v1/jobs", JOB, headers={"Idempotency-Key": "one two"})  # also without its quotes
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert (again.headers["idempotent-replayed"], again.headers["location"]) == ("true", first.headers["location"])
    assert "idempotent-replayed" not in first.headers
    found = refused(api, "POST", "/v1/jobs", {**JOB, "user": "u2"}, status=422, headers=key)
    assert "was used for another request" in found["detail"]
    assert "another request" in refused(api, "POST", "/v1/users", {"id": "u3"}, status=422, headers=key)["detail"]
    assert len(platform.jobs().items) == 1
    # what was kept of the answer has gone, and the job has not
    platform.store._redis.delete(*platform.store._redis.keys("tp:answer:*"))
    assert api("POST", "/v1/jobs", JOB, status=201, headers=key)["id"] == first.json()["id"]


def test_a_repeated_answer_is_that_of_then(api: Api, platform: Platform) -> None:
    job = platform.enqueue("sync", user="u1")
    key = {"Idempotency-Key": "retry-1"}
    end(platform, job.id, JobState.FAILED)
    first = api("POST", f"/v1/jobs/{job.id}/retry", headers=key)
    end(platform, job.id, JobState.FAILED)
    assert api("POST", f"/v1/jobs/{job.id}/retry", headers=key) == first
    assert platform.job(job.id).state is JobState.FAILED


def test_a_call_that_failed_may_be_made_again(api: Api) -> None:
    key = {"Idempotency-Key": "k"}
    body = {"definition": "sync", "user": "later"}
    refused(api, "POST", "/v1/jobs", body, status=422, headers=key)
    api("POST", "/v1/users", {"id": "later"}, status=201)
    api("POST", "/v1/jobs", body, status=201, headers=key)


def test_a_call_that_is_being_answered_is_not_made_beside(api: Api, platform: Platform) -> None:
    body = json.dumps(JOB)
    key = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    api.raw("POST", "/v1/jobs", data=body, headers=key)
    (name,) = platform.store._redis.keys("tp:answer:*")
    kept = json.loads(str(platform.store._redis.get(name)))
    assert 0 < platform.store._redis.pttl(name) <= 86_400_000
    platform.store._redis.set(name, json.dumps({"asked": kept["asked"], "claim": "another's"}))
    found = refused(api, "POST", "/v1/jobs", status=409, data=body, headers=key)
    assert "just being answered" in found["detail"]


def test_a_batch_that_is_repeated_makes_no_job_twice(api: Api, platform: Platform) -> None:
    key = {"Idempotency-Key": "batch"}
    # its answer is too long to be kept
    body = {"items": [JOB] * 60}
    first = api("POST", "/v1/jobs/batch", body, headers=key)
    assert api("POST", "/v1/jobs/batch", body, headers=key) == first
    assert len(platform.jobs().items) == 60


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "a\tb", "\x7f"])
def test_a_key_that_is_none_is_refused(api: Api, key: str) -> None:
    assert "Idempotency-Key takes one text" in refused(api, "POST", "/v1/jobs", JOB, status=400, headers={"Idempotency-Key": key})["detail"]


# --- users and subscriptions -----------------------------------------------------------------------------------------


def test_users(api: Api, platform: Platform) -> None:
    ada = api("POST", "/v1/users", {"id": "ada@example", "name": "Ada"}, status=201)
    assert (ada["id"], ada["name"], ada["paused"]) == ("ada@example", "Ada", False)
    assert api("POST", "/v1/users", {"id": "ada@example", "name": "Another"}, status=201) == ada
    assert api("GET", "/v1/users/ada@example") == ada
    assert api("POST", "/v1/users/ada@example/pause")["paused"]
    assert not api("POST", "/v1/users/ada@example/resume")["paused"]
    platform.subscribe("ada@example", "sync")
    platform.enqueue("sync", user="ada@example", countdown=60)
    assert api("DELETE", "/v1/users/ada@example") == {"jobs_canceled": 1, "subscriptions_removed": 1}
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/subscriptions")):
        refused(api, method, f"/v1/users/ada@example{rest}", status=404)
    assert refused(api, "GET", "/v1/users/a%20b", status=422)["errors"][0]["parameter"] == "user"
    assert refused(api, "POST", "/v1/users", {"id": "a b"}, status=422)["errors"][0]["pointer"] == "/id"
    by_api = {change.kind for change in platform.changes(about=["ada@example"]) if change.actor == "api:bootstrap"}
    assert by_api == {"user created", "user paused", "user resumed", "user deleted"}


def test_users_are_listed_in_stable_pages(api: Api, platform: Platform) -> None:
    names = [f"user{number:02}" for number in range(9)]
    platform.create_users(names)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = api("GET", "/v1/users", params={"limit": 2, **({"cursor": cursor} if cursor else {})})
        seen += [user["id"] for user in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
        platform.create_user(f"a{len(seen)}")  # before all that comes
    assert seen == sorted(["u1", "u2", *names])


def test_subscriptions(api: Api, platform: Platform) -> None:
    path = "/v1/users/u1/subscriptions/report"
    refused(api, "GET", path, status=404)
    refused(api, "PATCH", path, {"enabled": False}, status=404)
    schedule = {"timezone": "America/New_York", "at_time": {"hour": 9, "minute": 30}}
    made = api("PUT", path, {"params": {"format": "pdf"}, "schedule": schedule})
    assert (made["enabled"], made["paused"], made["params"]) == (True, False, {"format": "pdf"})
    assert made["schedule"]["interval"]["timezone"] == "America/New_York"
    assert api("GET", path) == made
    assert api("GET", "/v1/users/u1/subscriptions")["items"] == [made]
    assert api("GET", "/v1/definitions/report/subscribers") == {"items": ["u1"], "next": None}
    assert not api("PATCH", path, {"enabled": False})["enabled"]
    changed = api("PATCH", path, {"params": {"format": "html"}})
    assert (changed["enabled"], changed["params"], changed["schedule"]) == (False, {"format": "html"}, made["schedule"])
    back = api("PATCH", path, {"schedule": None, "enabled": True})
    assert (back["enabled"], back["params"], back["schedule"]) == (True, {"format": "html"}, None)
    assert api("PATCH", path, {})["params"] == {"format": "html"}
    assert api("POST", f"{path}/pause")["paused"]
    assert not api("POST", f"{path}/resume")["paused"]
    assert api("PUT", path, {})["params"] == {}
    assert api("DELETE", path) == {"jobs_canceled": 0}
    refused(api, "DELETE", path, status=404)
    refused(api, "POST", f"{path}/pause", status=404)


@pytest.mark.parametrize(
    ("path", "body", "status", "pointer"),
    [
        ("/v1/users/nobody/subscriptions/report", {}, 404, None),
        ("/v1/users/u1/subscriptions/nothing", {}, 404, None),
        ("/v1/users/u1/subscriptions/needy", {}, 422, "/params"),
        ("/v1/users/u1/subscriptions/report", {"enabled": "yes"}, 422, "/enabled"),
        ("/v1/users/u1/subscriptions/report", {"schedule": {}}, 422, "/schedule"),
        ("/v1/users/u1/subscriptions/report", {"schedule": {"timezone": "Mars"}}, 422, "/schedule/timezone"),
        ("/v1/users/u1/subscriptions/report", {"schedule": {"cron": {"expression": "x"}}}, 422, "/schedule/cron/expression"),
        ("/v1/users/u1/subscriptions/sync", {"schedule": {"at_time": {"hour": 1}}}, 422, "/schedule"),
    ],
)
def test_a_subscription_that_cannot_be(api: Api, path: str, body: Any, status: int, pointer: str | None) -> None:
    found = refused(api, "PUT", path, body, status=status)
    assert [fault["pointer"] for fault in found.get("errors", [])] == ([] if pointer is None else [pointer])


# --- definitions, limits, processes ----------------------------------------------------------------------------------


def test_definitions(api: Api, platform: Platform) -> None:
    shown = {one["id"]: one for one in api("GET", "/v1/definitions")["items"]}
    assert list(shown) == ["report", "sync", "needy", "clean"]
    assert shown["report"]["target"] == "POST https://api.example/{{user}}"
    assert shown["clean"]["target"] == "python tasks.inputs:anything"
    assert shown["sync"]["schedule"] == {"cron": {"expression": "5 * * * *"}}
    paused = api("POST", "/v1/definitions/sync/pause", {"why": "the API is down"})
    assert paused == {**shown["sync"], "paused": "the API is down"}
    assert api("GET", "/v1/definitions/sync") == paused
    assert api("POST", "/v1/definitions/sync/resume") == {**shown["sync"], "warnings": []}
    changes = api("GET", "/v1/changes", params={"about": "sync"})["items"]
    assert [(one["actor"], one["kind"]) for one in changes[:2]] == [
        ("api:bootstrap", "definition resumed"),
        ("api:bootstrap", "definition paused"),
    ]
    for method, rest, body in (("GET", "", None), ("POST", "/pause", {}), ("POST", "/resume", None), ("POST", "/trigger", {})):
        refused(api, method, f"/v1/definitions/nothing{rest}", body, status=404)
    refused(api, "POST", "/v1/definitions/sync/pause", status=415)


def test_a_trigger(api: Api, platform: Platform) -> None:
    platform.subscribe("u1", "sync")
    key = {"Idempotency-Key": "now"}
    first = api("POST", "/v1/definitions/sync/trigger", {"window": "5m"}, status=201, headers=key)
    assert first["subscribers"] == 1
    platform.store._redis.delete(*platform.store._redis.keys("tp:answer:*"))
    assert api("POST", "/v1/definitions/sync/trigger", {"window": "5m"}, status=201, headers=key) == first
    (occurrence,) = api("GET", "/v1/definitions/sync/occurrences")["items"]
    assert (occurrence["at"], occurrence["source"], occurrence["window_ms"]) == (first["at"], "trigger", 300_000)
    found = refused(api, "POST", "/v1/definitions/sync/trigger", {"window": "soon"}, status=422)
    assert found["errors"][0]["pointer"] == "/window"


def test_limits(api: Api) -> None:
    name = quote("host:[::1]:8080", safe="")
    (limit,) = api("PUT", f"/v1/limits/{name}", {"rate": "10/s", "burst": 15, "concurrency": 4})["items"]
    assert limit["name"] == "host:[::1]:8080"
    assert (limit["rate"], limit["burst"], limit["concurrency"], limit["source"]) == ("10/s", 15, 4, "live")
    assert (limit["free"], limit["reserved"], limit["in_flight"], limit["configured"], limit["held_until"]) == (14, 0, 0, None, None)
    assert api("GET", "/v1/limits")["items"] == [limit]
    assert api("DELETE", f"/v1/limits/{name}")["items"] == []
    (none,) = api("PUT", "/v1/limits/total", {"unlimited": True})["items"]
    assert (none["rate"], none["concurrency"]) == (None, None)
    for path, body, status in (
        ("everything", {"rate": "1/s"}, 422),
        ("total", {}, 422),
        ("total", {"rate": "fast"}, 422),
        ("total", {"rate": "1/s", "unlimited": True}, 422),
        ("total", {"rate": 5}, 422),
        ("definition:nothing", {"rate": "1/s"}, 404),
    ):
        refused(api, "PUT", f"/v1/limits/{path}", body, status=status)
    refused(api, "DELETE", "/v1/limits/everything", status=422)


def test_breakers(api: Api, platform: Platform) -> None:
    host = "api.example"
    api("PUT", f"/v1/limits/host:{host}", {"concurrency": 4})
    (closed,) = api("GET", "/v1/breakers")["items"]
    assert (closed["host"], closed["state"], closed["since"], closed["until"], closed["reason"]) == (host, "closed", None, None, "")
    held = api("POST", f"/v1/breakers/{host}/open", {"span": "1h", "reason": "maintenance"})
    assert (held["state"], held["reason"]) == ("open", "maintenance")
    assert datetime.fromisoformat(held["until"]) - datetime.fromisoformat(held["since"]) == timedelta(hours=1)
    assert api("GET", "/v1/breakers")["items"] == [held]
    (limit,) = api("GET", "/v1/limits")["items"]
    assert limit["held_until"] == held["until"]
    offer(platform.store, WORKER, slots=10)
    assert api("POST", "/v1/jobs", JOB, status=201)["state"] == "pending", "it waits for its host"
    assert api("POST", f"/v1/breakers/{host}/reset") == closed
    assert api("POST", f"/v1/breakers/{host}/reset") == closed
    platform.store.release()
    assert api("GET", "/v1/jobs")["items"][0]["state"] == "queued"
    # a host that nobody calls, with a port
    assert api("POST", "/v1/breakers/[::1]:8080/open", {"span": "10m"})["reason"] == "opened by api:bootstrap"
    assert api("POST", "/v1/breakers/[::1]:8080/reset")["state"] == "closed"
    opened = [one for one in api("GET", "/v1/changes")["items"] if one["subject"] == host]
    assert {one["actor"] for one in opened} == {"api:bootstrap"}


@pytest.mark.parametrize(
    ("host", "body", "where"),
    [
        ("a.example", {}, ("pointer", "/span")),
        ("a.example", {"span": "0s"}, ("pointer", "/span")),
        ("a.example", {"span": "-5m"}, ("pointer", "/span")),
        ("a.example", {"span": "367d"}, ("pointer", "/span")),
        ("a.example", {"span": 10**30}, ("pointer", "/span")),
        ("a.example", {"span": "soon"}, ("pointer", "/span")),
        ("a.example", {"span": "5m", "reason": "x" * 501}, ("pointer", "/reason")),
        ("a.example", {"span": "5m", "why": ""}, ("pointer", "/why")),
        ("A.example", {"span": "5m"}, ("parameter", "host")),
        ("a.example:x", {"span": "5m"}, ("parameter", "host")),
        ("https:%5C%5Ca.example", {"span": "5m"}, ("parameter", "host")),
    ],
)
def test_a_breaker_that_cannot_be_opened(api: Api, platform: Platform, host: str, body: Any, where: tuple[str, str]) -> None:
    kind, place = where
    assert [fault[kind] for fault in refused(api, "POST", f"/v1/breakers/{host}/open", body, status=422)["errors"]] == [place]
    if kind == "parameter":
        refused(api, "POST", f"/v1/breakers/{host}/reset", status=422)
    assert {one.host for one in platform.breakers()} == {"api.example"}


def test_nodes_are_listed_and_drained(api: Api, platform: Platform) -> None:
    worker = "celery@host#1a2b"
    path = f"/v1/nodes/{quote(worker)}"
    assert api("GET", "/v1/nodes") == {"items": []}
    for method, rest in (("GET", ""), ("POST", "/drain"), ("POST", "/resume")):
        refused(api, method, path + rest, status=404)
    offer(platform.store, worker, slots=3)
    job = platform.enqueue("sync", user="u1")
    assert platform.store.start(job.id, delivery=platform.job(job.id).delivery, worker=worker).go
    (node,) = api("GET", "/v1/nodes")["items"]
    assert (node["id"], node["slots"], node["running"], node["drained"]) == (worker, 3, [job.id], False)
    assert 0 <= node["silent_ms"] < 60_000
    drained = api("POST", f"{path}/drain")
    assert (drained["drained"], drained["slots"], drained["running"]) == (True, 0, [job.id])
    waiting = platform.enqueue("sync", user="u1")
    assert waiting.state is JobState.PENDING, "nothing is released for a drained worker"
    assert platform.store.heartbeat(worker, slots=3, queues=list(Priority), buffer=1.0).drained
    assert api("GET", path)["slots"] == 0
    assert not api("POST", f"{path}/resume")["drained"]
    assert not platform.store.heartbeat(worker, slots=3, queues=list(Priority), buffer=1.0).drained
    assert api("GET", path)["slots"] == 3
    kinds = [(one["kind"], one["subject"]) for one in api("GET", "/v1/changes")["items"]]
    assert kinds[:2] == [("worker resumed", worker), ("worker drained", worker)]


def test_beats(api: Api, platform: Platform) -> None:
    alive = timedelta(seconds=15)
    platform.store.attend("beat@host#1", catalogue="0a1b", number=None, leads=True, alive=alive, account=20 * alive)
    (beat,) = api("GET", "/v1/beats")["items"]
    assert (beat["id"], beat["leads"], beat["catalogue"], beat["number"]) == ("beat@host#1", True, "0a1b", 1)


# --- dead letters and garbage ----------------------------------------------------------------------------------------


def test_dead_letters(api: Api, platform: Platform) -> None:
    ids = [platform.enqueue("sync", user=user).id for user in ("u1", "u1", "u2", "u2")]
    for place, job_id in enumerate(ids):
        end(platform, job_id, JobState.FAILED, reason=f"HTTP 50{place}")
    assert {job["id"] for job in api("GET", "/v1/dead-letters")["items"]} == set(ids)
    assert [job["id"] for job in api("GET", "/v1/dead-letters?reason=502&user=u2")["items"]] == [ids[2]]
    shown = api("GET", f"/v1/dead-letters/{ids[0]}")
    assert (shown["reason"], shown["history"][-1]["to_state"], shown["poison"]) == ("HTTP 500", "failed", False)
    assert api("POST", f"/v1/dead-letters/{ids[0]}/redrive")["state"] == "queued"
    refused(api, "GET", f"/v1/dead-letters/{ids[0]}", status=404)
    refused(api, "DELETE", f"/v1/dead-letters/{ids[0]}", status=409)
    assert api.raw("DELETE", f"/v1/dead-letters/{ids[1]}").status_code == 204
    assert api.raw("DELETE", f"/v1/dead-letters/{ids[1]}").status_code == 204
    refused(api, "POST", f"/v1/dead-letters/{ids[1]}/redrive", status=404)
    for verb in ("redrive", "discard"):
        assert refused(api, "POST", f"/v1/dead-letters/{verb}", {}, status=422)["errors"][0]["pointer"] == ""
        refused(api, "POST", f"/v1/dead-letters/{verb}", {"all": True, "user": "u2"}, status=422)
        refused(api, "POST", f"/v1/dead-letters/{verb}", {"all": False}, status=422)
    answer = api("POST", "/v1/dead-letters/redrive", {"user": "u2", "limit": 1})
    assert (answer["redriven"], answer["left"]) == (1, 0)
    assert api("POST", "/v1/dead-letters/discard", {"all": True}) == {"discarded": 1, "next": None}
    assert api("GET", "/v1/dead-letters")["items"] == []


def test_a_job_that_is_no_dead_letter_is_not_redriven(api: Api, platform: Platform) -> None:
    job = platform.enqueue("sync", user="u1")
    assert "no dead letter" in refused(api, "POST", f"/v1/dead-letters/{job.id}/redrive", status=409)["detail"]
    refused(api, "GET", f"/v1/dead-letters/{job.id}", status=404)


def test_garbage(api: Api, platform: Platform) -> None:
    platform.store.set_aside("high", b"\xff rubbish", reason="is no JSON", worker="w1")
    (found,) = api("GET", "/v1/garbage")["items"]
    assert (found["queue"], found["reason"], found["text"]) == ("high", "is no JSON", "\\xff rubbish")
    assert api("DELETE", "/v1/garbage") == {"forgotten": 1}
    assert api("GET", "/v1/counts")["counters"]["garbage"] == 1


# --- how it is -------------------------------------------------------------------------------------------------------


def test_health_and_counts(api: Api, platform: Platform) -> None:
    assert api("GET", "/health") == {"status": "ok"}
    found = api("GET", "/v1/health")
    assert not found["well"]
    assert {"planner_missing", "no_worker"} <= {one["code"] for one in found["problems"]}
    platform.enqueue("sync", user="u1")
    counts = api("GET", "/v1/counts")
    assert (counts["entered"]["pending"], counts["waiting"]["medium"], counts["users"]) == (1, 1, 2)


def test_metrics(api: Api, platform: Platform) -> None:
    platform.enqueue("sync", user="u1")
    api.raw("GET", "/v1/jobs/no-such-job")
    api.raw("GET", "/no/such/path")
    answer = api.raw("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    wanted = {
        'taskplatform_job_states_total{state="pending"} 1.0',
        'taskplatform_jobs_waiting{definition="sync",priority="medium"} 1.0',
        "taskplatform_users 2.0",
        "taskplatform_figures_read 1.0",
        "taskplatform_api_requests_in_flight 1.0",
    }
    # figures may be a second old, and then those of the test before
    wait_until(lambda: not wanted.difference(api.raw("GET", "/metrics").text.splitlines()))
    lines = api.raw("GET", "/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("taskplatform_api_requests_total")]
    assert any('route="/v1/jobs/{job_id}",status="404"' in line for line in counted)
    assert any('route="none",status="404"' in line for line in counted)
    assert not any("no-such-job" in line for line in counted)


def test_no_answer_holds_what_may_be_secret(api: Api, platform: Platform) -> None:
    platform.subscribe("u1", "report")
    platform.trigger("report")
    platform.enqueue("report", user="u1")
    for path in ("/v1/definitions", "/v1/definitions/report", "/v1/jobs", "/v1/health", "/v1/changes", "/metrics", "/v1/openapi.json"):
        text = api.raw("GET", path).text
        assert "planted" not in text
        assert KEY not in text


def test_the_document_has_an_example_of_everything(api: Api) -> None:
    document = api("GET", "/v1/openapi.json")
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            if path not in OPEN_PATHS:
                assert operation["security"][0].keys() == {"key"}, where
                assert {"401", "403", "422", "429", "500", "503"} <= operation["responses"].keys(), where
            for status, answer in operation["responses"].items():
                assert answer["description"], where
                for content in answer.get("content", {}).values():
                    assert "example" in content, f"{where} {status}"
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert "example" in content, where
            assert (method == "post") == any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", []))
