"""The command line over the control API: it says and does the same as on Redis, and nothing twice."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from taskplatform import errors
from taskplatform.api.problem import kind_of
from taskplatform.apiclient import _KINDS, ApiClient
from taskplatform.cli import EXIT_CODES, cli
from taskplatform.errors import ApiError, ApiUnavailable, Conflict, Forbidden, InvalidInput, NotFound, SettingsError
from taskplatform.local import EmbeddedServer, find_port
from taskplatform.model import JobState, Priority
from taskplatform.platform import JobRequest, Platform, SubscriptionRequest
from taskplatform.remote import RemotePlatform
from taskplatform.settings import settings
from taskplatform.store import SubscribeResult
from tests.integration.apiserver import KEY, Api, running_api, work_beside_the_api

WORKER = "w@host#1"
Said = tuple[int, str, str]


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url, api_max_body=1_048_576, api_wrong_keys=60_000) as api:
        yield api


@pytest.fixture
def api(served: Api, server: EmbeddedServer, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API on an empty server, which is also that of the settings; the current folder has the same definitions, and the key."""
    work_beside_the_api(tmp_path, server.url, monkeypatch)
    served.platform.publish_missing()
    yield served
    settings.cache_clear()


@pytest.fixture
def remote(api: Api) -> Iterator[RemotePlatform]:
    with RemotePlatform.connect(api.url, key=KEY, ca=api.ca) as found:
        yield found


def run(line: str, *, over: Api | None = None, stdin: str | None = None) -> Result:
    words = [] if over is None else ["--url", over.url, "--key-file", "key", "--ca", str(over.ca)]
    result = CliRunner().invoke(cli, [*words, *shlex.split(line)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- the same over both ways -----------------------------------------------------------------------------------------


def prepare(api: Api) -> str:
    """Two users with subscriptions, a job that waits, one that is done, and a dead letter; the id of the one that waits."""
    platform, store = api.platform, api.platform.store
    platform.create_user("u1", name="Ada")
    platform.create_user("u2")
    platform.subscribe("u1", "report", params={"format": "pdf"}, schedule={"timezone": "Asia/Tokyo"})
    platform.subscribe("u2", "report", enabled=False)
    platform.subscribe("u1", "sync")
    store.heartbeat(WORKER, slots=9, queues=list(Priority), buffer=1.0, info={"host": "host"})
    for key, state in (("done", JobState.COMPLETED), ("dead", JobState.FAILED)):
        job = platform.enqueue("sync", user="u1", idempotency_key=key)
        assert store.start(job.id, delivery=job.delivery, worker=WORKER).go
        assert store.finish(job.id, delivery=job.delivery, worker=WORKER, state=state, reason="HTTP 500")
    platform.set_limit("total", "10/m", burst=3)
    platform.set_limit("host:api.example", concurrency=2)
    platform.open_breaker("api.example", span=timedelta(hours=1), reason="maintenance")
    platform.trigger("report", window=timedelta(hours=1))
    platform.pause_user("u2")
    platform.set_log_level("DEBUG", node="worker")
    store.set_aside("low", b"\xffhello", reason="not UTF-8", worker=WORKER)
    store.attend("beat@host#1", catalogue="0a1b", number=None, leads=True, alive=timedelta(hours=1), account=timedelta(hours=9))
    return platform.enqueue("report", user="u1", countdown=3600, idempotency_key="waits", priority="low").id


LOOKING = [
    "tasks list",
    "tasks list --domain tasks --priority low",
    "users list",
    "users show u1",
    "users count",
    "subscriptions list u1",
    "subscriptions subscribers report",
    "subscriptions subscribers report --count",
    "jobs list",
    "jobs list --user u1 --definition sync --state failed --state completed --since 1h --limit 1 --all",
    "jobs show {job}",
    "dead-letters list --definition sync --reason 500",
    "limits list",
    "breakers list",
    "changes --limit 100",
    "changes u1 report",
    "occurrences report",
    "nodes",
    "beats",
    "health",
    "garbage list",
    "log-level",
    "why u1 report",
    "why u1 report --last 3",
    "why u2 report --at 2026-01-31T09:00:00Z",
    "next u1 --count 3",
    "next u2 report --count 2",
]
#: What changes with each look, and means nothing here: also how wide its column is.
PASSING = re.compile(
    r"\b\d+\.\d free now\b|(?:\b\d+(?:\.\d)? (?:ms|s|min|h|days?)\b *)+| {2,}"
    r"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z|\b\d+\.\d{3,}\b|\b(?:\d+(?:d|h|ms|m|s))+\b"
)


def test_what_is_shown_is_the_same(api: Api) -> None:
    job = prepare(api)
    for line in LOOKING:
        for form in ("", " --json"):
            if ("count" in line and form) or (line.startswith("tasks") and form):
                continue
            command = line.format(job=job) + form
            here, there = run(command), run(command, over=api)
            assert (there.exit_code, PASSING.sub("#", there.stdout)) == (here.exit_code, PASSING.sub("#", here.stdout)), command
            assert PASSING.sub("#", there.stderr) == PASSING.sub("#", here.stderr), command
            assert there.stdout.strip(), command
            if form:
                assert json.loads(there.stdout), command


def test_definitions_are_told_without_what_may_be_secret(api: Api) -> None:
    (found,) = [one for one in json.loads(run("tasks list --json", over=api).stdout) if one["id"] == "report"]
    assert (found["priority"], found["param_names"]) == ("high", ["format"])
    shown = run("tasks show report", over=api)
    assert shown.exit_code == 0
    assert "every day at 07:00 Europe/Berlin" in shown.stdout
    assert "planted" not in shown.stdout + json.dumps(found)


#: Each line, and what it is about afterwards; they follow each other.
CHANGING = [
    "users create u1 u2 u1",
    "users create u1 u3",
    "subscriptions add u1 report --param format=pdf --at 09:30 --json",
    "subscriptions add u1 sync --timezone Asia/Tokyo --disabled",
    "subscriptions set-params u1 report --param a=1 --json",
    "subscriptions set-schedule u1 report --default",
    "subscriptions disable u1 report",
    "subscriptions enable u1 report",
    "subscriptions pause u1 report",
    "subscriptions pause u1 report",
    "subscriptions resume u1 report",
    "subscriptions resume u1 report",
    "subscriptions remove u1 sync",
    "subscriptions import - --format csv --create-users --json",
    "subscriptions import - --format csv --create-users",
    "users pause u1",
    "users pause u1",
    "users resume u1",
    "log-level debug --node beat --for 1h",
    "log-level --reset --node beat",
    "log-level --reset --node beat",
    "pause report --why maintenance",
    "pause report",
    "resume report",
    "resume report",
    "jobs submit sync u1 --countdown 1h --idempotency-key k1 --param source=erp --json",
    "jobs submit sync u1 --countdown 1h --idempotency-key k1 --param source=erp",
    "jobs priority {job} nothing high",
    "jobs cancel {job} {job}",
    "jobs retry {job}",
    "dead-letters redrive {job}",
    "dead-letters discard nothing",
    "dead-letters redrive --user u2",
    "dead-letters discard --all",
    "limits set total --rate 10/s --burst 15",
    "limits set user --concurrency 3",
    "limits set total --none",
    "limits reset total",
    "limits reset total",
    "breakers open api.example --for 10m --reason maintenance",
    "breakers reset api.example",
    "breakers reset api.example",
    "nodes drain w@host#1",
    "nodes drain w@host#1",
    "nodes resume w@host#1",
    "garbage clear",
    "trigger report --window 5m --key once",
    "trigger report --window 5m --key once --json",
    "users delete u3 --yes",
]
CSV = "user,definition,enabled,params,timezone\nu7,report,,,Asia/Tokyo\nu7,nothing,,,\n,report,,,\nu8,clean,no,,\nu7,report,,,Nowhere/No\n"


def test_what_changes_something_says_and_does_the_same(api: Api, client: redis.Redis) -> None:
    said: list[list[Said]] = []
    kept: list[Any] = []
    for over in (None, api):
        client.flushall()
        api.platform.publish_missing()
        api.platform.store.heartbeat(WORKER, slots=9, queues=list(Priority), buffer=1.0)
        api.platform.store.set_aside("low", b"x", reason="no JSON", worker=WORKER)
        said.append([])
        for line in CHANGING:
            result = run(line.format(job=_job(api)), over=over, stdin=CSV)
            said[-1].append((result.exit_code, PASSING.sub("#", result.stdout), PASSING.sub("#", result.stderr)))
        platform = api.platform
        kept.append(
            (
                [(one.id, one.state, one.priority, one.params) for one in platform.jobs().items],
                [
                    (one.definition, one.params, one.schedule, one.enabled)
                    for user in ("u1", "u7", "u8")
                    for one in platform.subscriptions(user)
                ],
                [one.id for one in platform.users().items],
                [(one.kind, one.subject) for one in platform.changes()],
            )
        )
    here, there = said
    for line, (on_redis, over_api) in zip(CHANGING, zip(here, there, strict=True), strict=True):
        assert over_api == on_redis, line
    assert kept[0][:3] == kept[1][:3]
    assert kept[0][3] == kept[1][3]


def _job(api: Api) -> str:
    return next((job.id for job in api.platform.jobs(limit=10).items if job.definition == "sync"), "none")


WRONG = [
    ("users show nobody", 1),
    ("users show 'a b'", 1),
    ("users delete nobody --yes", 1),
    ("subscriptions add nobody report", 1),
    ("subscriptions add u1 nothing", 1),
    ("subscriptions add u1 report --param x=" + "y" * 20_000, 1),
    ("subscriptions remove u1 report", 1),
    ("subscriptions subscribers nothing --count", 1),
    ("jobs show nothing", 1),
    ("jobs show sync:u1:m0", 1),
    ("jobs submit needy u1", 1),
    ("jobs submit sync nobody", 1),
    ("jobs cancel sync:u1:m0", 1),
    ("jobs list --definition nothing", 1),
    ("jobs list --user nobody", 1),
    ("dead-letters redrive sync:u1:m0", 1),
    ("dead-letters list --user 'a b'", 1),
    ("trigger nothing", 1),
    ("pause nothing", 1),
    ("limits set nothing:x --rate 1/s", 1),
    ("limits set total --rate often", 1),
    ("limits set user --rate 1/s", 1),
    ("breakers open 'a b' --for 1m", 1),
    ("nodes drain nobody", 1),
    ("occurrences nothing", 1),
    ("jobs submit sync", 2),
    ("jobs list --state asleep", 2),
    ("dead-letters redrive", 2),
    ("why nobody report", 1),
    ("why u1 nothing", 1),
    ("why u1 report --at 1971-01-01", 1),
    ("next nobody", 1),
    ("next u1 nothing", 1),
]


def test_what_is_wrong_is_said_in_the_same_words(api: Api) -> None:
    api.platform.create_user("u1")
    for line, code in WRONG:
        here, there = run(line), run(line, over=api)
        assert (here.exit_code, there.exit_code) == (code, code), (line, here.output, there.output)
        assert there.stdout == here.stdout == "", line
        assert _words(there.stderr) == _words(here.stderr), line


def _words(text: str) -> str:
    return re.sub(r"^(error: )?(name|params|host|rate|concurrency)?:? ?", "", text, flags=re.MULTILINE)


def test_pages_go_on_over_the_api_too(api: Api) -> None:
    users = sorted(f"u{number:04}" for number in range(1203))
    api.platform.create_users(users)
    everything = run("users list --limit 700 --all --json", over=api)
    assert [one["id"] for one in json.loads(everything.stdout)] == users
    first = run("users list --limit 600 --json", over=api)
    cursor = re.fullmatch(r"there may be more: --cursor '(.*)'\n", first.stderr)
    assert cursor is not None
    rest = json.loads(run(f"users list --cursor '{cursor[1]}' --limit 1000 --json", over=api).stdout)
    assert [one["id"] for one in [*json.loads(first.stdout), *rest]] == users


def test_dead_letters_are_redriven_in_steps(api: Api, remote: RemotePlatform) -> None:
    platform, store = api.platform, api.platform.store
    platform.create_user("u1")
    store.heartbeat(WORKER, slots=500, queues=list(Priority), buffer=1.0)
    jobs = platform.enqueue_many(JobRequest(definition="sync" if n % 2 else "clean", user="u1") for n in range(110))
    store.release()
    for job in jobs:
        assert store.start(job.id, delivery=1, worker=WORKER).go
        assert store.finish(job.id, delivery=1, worker=WORKER, state=JobState.FAILED, reason="HTTP 500")
    store.retract("clean", actor="tests")
    told: list[int] = []
    # those of a definition that was removed stay, and are not looked at again and again
    assert remote.redrive_all(user="u1", progress=told.append) == (55, 55)
    assert told[-1] == 110
    assert len(told) == 2
    assert remote.discard_all(limit=7) == 7
    result = run("dead-letters discard --definition clean", over=api)
    assert result.stdout == "48 jobs discarded\n"


def test_an_import_of_thousands_goes_in_batches(api: Api, remote: RemotePlatform) -> None:
    asked = [SubscriptionRequest(user=f"u{n}", definition="report", params={"text": "x" * 500}) for n in range(1500)]
    asked.append(SubscriptionRequest(user="u 1", definition="report"))
    results, created = remote.subscribe_each(asked, create_users=True)
    assert (results[:1500], created) == ([SubscribeResult.CREATED] * 1500, 1500)
    assert isinstance(results[1500], InvalidInput)
    assert api.platform.count_subscribers("report") == remote.count_subscribers("report") == 1500


def test_a_job_is_followed_to_its_end(api: Api) -> None:
    store = api.platform.store
    api.platform.create_user("u1")
    store.heartbeat(WORKER, slots=9, queues=list(Priority), buffer=1.0)
    for over, state, code in ((None, JobState.COMPLETED, 0), (api, JobState.FAILED, 1)):
        job = api.platform.enqueue("sync", user="u1")
        assert store.start(job.id, delivery=job.delivery, worker=WORKER).go
        found: list[Result] = []

        def follow(id_: str = job.id, way: Api | None = over, found: list[Result] = found) -> None:
            found.append(run(f"jobs show {id_} --follow --json", over=way))

        following = threading.Thread(target=follow)
        following.start()
        assert store.finish(job.id, delivery=job.delivery, worker=WORKER, state=state, reason="HTTP 500")
        following.join(60)
        (result,) = found
        assert result.exit_code == code
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line["to_state"] for line in lines] == [str(line.to_state) for line in api.platform.history(job.id)]
        assert lines[-1]["to_state"] == state


def test_a_job_that_waits_for_a_host_says_so(api: Api) -> None:
    api.platform.create_user("u1")
    api.platform.open_breaker("api.example", span=timedelta(hours=1), reason="maintenance")
    job = api.platform.enqueue("sync", user="u1")
    for over in (None, api):
        shown = run(f"jobs show {job.id}", over=over).stdout
        assert re.search(r"waits\tits host api.example is held back since .* until .*: its breaker is open \(maintenance\)", shown)


def test_a_job_that_waits_says_for_what_by_whom_and_behind_how_many(api: Api) -> None:
    """The same over Redis and over the API, and of each only while it waits."""
    store = api.platform.store
    api.platform.create_user("u1")
    held = api.platform.acting_as("ann")
    held.pause_user("u1")
    of_user = api.platform.enqueue("sync", user="u1")
    held.resume_user("u1")
    api.platform.create_user("u2")
    held.pause_definition("sync", why="the target moves")
    first, job = (api.platform.enqueue("sync", user="u2") for _ in range(2))
    assert of_user.state == first.state == job.state == "pending"
    told = []
    for over in (None, api):
        shown = run(f"jobs show {job.id}", over=over).stdout
        assert re.search(r"waits\tit waits for a pause to end: definition sync is paused by ann at .* UTC \(the target moves\)\n", shown)
        assert "what helps\ttaskplatform resume sync\n" in shown
        (before,) = re.findall(r"before it\t(.*)", shown)
        assert sum(map(int, re.findall(r"(\d+) of its priority", before))) == 2, before  # by time, or of the same millisecond
        assert re.search(r"workers\t\d+ serve the queue", shown)
        told.append(json.loads(run(f"jobs show {job.id} --json", over=over).stdout)["waits"])
    answer = api("GET", f"/v1/jobs/{job.id}")
    assert answer["state"] == "pending"
    told.append(answer["waits"])
    for one in told:
        assert " ago" in one["facts"].pop("due")
    assert told[0] == told[1] == told[2]
    assert told[0]["mend"] == "taskplatform resume sync"

    held.resume_definition("sync")
    store.heartbeat(WORKER, slots=1, queues=list(Priority), buffer=1.0)
    store.release()
    flying = api.platform.job(of_user.id)
    assert flying.state == "queued"
    assert api("GET", f"/v1/jobs/{of_user.id}")["waits"]["reason"].startswith("it lies in the queue")
    assert store.start(flying.id, delivery=flying.delivery, worker=WORKER).go
    for over in (None, api):
        assert json.loads(run(f"jobs show {of_user.id} --json", over=over).stdout)["waits"] is None
        assert "waits\t" not in run(f"jobs show {of_user.id}", over=over).stdout


def test_the_rights_of_a_key_are_those_of_the_commands(api: Api, remote: RemotePlatform, tmp_path: Path) -> None:
    api.platform.create_user("u1")
    token = api.key("submit")["Authorization"].removeprefix("Bearer ")
    (tmp_path / "key").write_text(token)
    for line in ("users pause u1", "users create u5", "jobs submit sync u1 --countdown 1h", "subscriptions add u1 report"):
        assert run(line, over=api).exit_code == 0, line
    refused = run("users list", over=api)
    assert (refused.exit_code, refused.stderr) == (1, "error: this takes a key with the scope read; the key 'submit' has submit\n")
    job = api.platform.enqueue("sync", user="u1", countdown=60)
    assert run(f"jobs cancel {job.id}", over=api).exit_code == run(f"jobs retry {job.id}", over=api).exit_code == 0
    # what `retry` may, `redrive` of one job may: they do the same
    job = api.platform.enqueue("sync", user="u1", countdown=60)
    assert "no dead letter" in run(f"dead-letters redrive {job.id}", over=api).stderr
    assert "scope admin" in run("dead-letters redrive --all", over=api).stderr


# --- which API, which key --------------------------------------------------------------------------------------------


def test_url_and_key_come_from_options_or_settings(api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api.platform.create_user("u1")

    def says(line: str, code: int, said: str = "") -> None:
        settings.cache_clear()
        result = CliRunner().invoke(cli, shlex.split(line))
        assert (result.exit_code, said in result.output) == (code, True), result.output
        assert KEY not in result.output

    says("--key-file key users count", 2, "--key-file goes with --url, or TASKPLATFORM_URL")
    monkeypatch.setenv("TASKPLATFORM_URL", api.url)
    monkeypatch.setenv("TASKPLATFORM_CA", str(api.ca))
    # over the API indeed: there is no Redis any more
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", "redis://127.0.0.1:1/0")
    says("users count", 2, "a URL takes a key: --key-file, TASKPLATFORM_KEY_FILE or TASKPLATFORM_KEY")
    says("--key-file key users count", 0, "1\n")
    monkeypatch.setenv("TASKPLATFORM_KEY", KEY)
    says("users count", 0, "1\n")
    monkeypatch.setenv("TASKPLATFORM_KEY_FILE", str(tmp_path / "key"))
    says("users count", 1, "TASKPLATFORM_KEY and TASKPLATFORM_KEY_FILE exclude each other")
    monkeypatch.delenv("TASKPLATFORM_KEY")
    says("users count", 0, "1\n")
    says("--key-file nowhere users count", 1, "the key file nowhere cannot be read: No such file or directory")
    (tmp_path / "other").write_text(f"{KEY} and more")
    says("--key-file other users count", 1, "the key of the API is not accepted")
    says("--ca nowhere users count", 1, "nowhere cannot be read: No such file or directory")
    # what does not go over the API
    says("keys list", 2, "`cli keys list` works on Redis itself, not over the API: set TASKPLATFORM_REDIS_URL; TASKPLATFORM_URL is set")
    says("tasks schema", 0, "json-schema.org")
    for line in ("up", "demo", "api", "bench", "certs show", "tasks check", "tasks schema", "redis-acl platform", "completion bash"):
        says(f"--url {api.url} {line}", 2, "works on this machine, not over the API; --url does not go with it")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host", "such as https://host:8443 is"),
        ("https://", "such as https://host:8443 is"),
        ("https://host:99999", "such as https://host:8443 is"),
        ("https://someone:hunter2@host", "without user, query and fragment it is"),
        ("https://host/?key=hunter2", "without user, query and fragment it is"),
        ("http://api.example.com", "over plain HTTP the key could be read on the way"),
    ],
)
def test_a_url_that_cannot_be_is_said(api: Api, url: str, said: str) -> None:
    result = CliRunner().invoke(cli, ["--url", url, "--key-file", "key", "users", "count"])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "someone" not in result.stderr


def test_an_api_that_cannot_be_asked_is_said(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(url: str, ca: str, said: str, *, key: str = KEY) -> None:
        (tmp_path / "key").write_text(key)
        result = CliRunner().invoke(cli, ["--url", url, "--key-file", "key", "--ca", ca, "health"])
        assert (result.exit_code, result.stdout) == (3, ""), result.output
        assert re.search(said, result.stderr), result.stderr
        assert "TASKPLATFORM_REDIS_URL" not in result.stderr
        assert key not in result.stderr

    gone = find_port()
    ca = str(api.ca)
    says(f"https://127.0.0.1:{gone}", ca, f"the API at https://127.0.0.1:{gone} cannot be reached: Connection refused")
    says(api.url, ca, "does not accept the key: it is wrong, expired or revoked", key="wrong" * 8)
    (tmp_path / "ca.pem").write_bytes((api.ca.parent / "cert.pem").read_bytes())
    other = tmp_path / "certs"
    assert run(f"certs --dir {other}").exit_code == 0
    says(api.url, str(other / "ca.crt"), "is not trusted: .*certificate")
    # also where the environment of requests says otherwise
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", ca)
    says(api.url, str(other / "ca.crt"), "is not trusted: .*certificate")
    says(api.url.replace("https", "http"), ca, "the API at http://.* (closed the connection|cannot be asked)")


# --- answers that are lost, refused or strange -----------------------------------------------------------------------


class _Between(BaseHTTPRequestHandler):
    """Stands between a client and the API: `act` says what becomes of each request."""

    act: Callable[[_Between, bytes], None]

    def handle_request(self) -> None:
        type(self).act(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_GET = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def between(act: Callable[[_Between, bytes], None]) -> Iterator[ApiClient]:
    """A client of such a server; it waits for nothing."""
    handler = type("Handler", (_Between,), {"act": staticmethod(act)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with ApiClient(f"http://127.0.0.1:{server.server_port}", KEY, sleep=lambda _: None) as client:
                yield client
        finally:
            server.shutdown()
            thread.join()


def problem(status: int, **more: object) -> bytes:
    return json.dumps({"type": "about:blank", "title": "No", "status": status, **more}).encode()


@pytest.mark.parametrize("verb", ["submit", "delete"])
def test_what_is_asked_again_after_a_lost_answer_is_done_once(api: Api, verb: str) -> None:
    api.platform.create_user("u1")
    passed: list[str] = []

    def lose_the_first(request: _Between, body: bytes) -> None:
        headers = {name: request.headers[name] for name in ("Content-Type", "Idempotency-Key") if name in request.headers}
        answer = api.raw(request.command, request.path, data=body or None, headers=headers)
        passed.append(answer.text)
        if len(passed) > 1:
            request.answer(answer.status_code, answer.content)
        else:
            request.close_connection = True

    with between(lose_the_first) as client:
        platform = RemotePlatform(client)
        if verb == "submit":
            job = platform.enqueue("sync", user="u1")
            assert [one.id for one in api.platform.jobs().items] == [job.id]
            assert len(passed) == 2
            assert passed[0] == passed[1]
        else:
            with pytest.raises(ApiUnavailable, match="may have been done all the same"):
                platform.delete_user("u1")
            assert len(passed) == 1
            assert api.platform.count_users() == 0


def test_an_api_that_is_busy_is_asked_again_after_a_while() -> None:
    waited: list[float] = []
    answers = [(429, "2"), (503, "3"), (200, "")]

    def be_busy(request: _Between, body: bytes) -> None:
        status, after = answers.pop(0)
        content = b'{"users": 7}' if status == 200 else problem(status, detail="busy")
        request.answer(status, content, Retry_After=after)

    with between(be_busy) as client:
        client._sleep = waited.append
        assert RemotePlatform(client).count_users() == 7
        assert waited == [2, 3]
        answers[:] = [(503, "10"), (503, "10")]
        with pytest.raises(ApiUnavailable, match="cannot be used for now: busy"):
            client.call("GET", "/counts")
        assert waited == [2, 3, 10]  # 20 s would be more than it waits
        answers[:] = [(429, "60")]
        with pytest.raises(ApiError, match="try again in 60"):
            client.call("GET", "/counts")
        assert not answers


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (302, b"", ApiError, "answers that the API is elsewhere, at 'https://thief.example/'"),
        (200, b"<html>", ApiError, "does not answer in JSON: is it the control API?"),
        (200, b'{"users": "many"}', ApiError, "answers what this version does not understand"),
        (200, b"[]", ApiError, "answers what this version does not understand"),
        (404, b"not here", ApiError, "answers 404, and not as the control API does"),
        (404, problem(404), ApiError, "does not know this call"),
        (404, problem(404, detail="no user 'x'", kind="unknown_user"), errors.UnknownUser, "no user 'x'"),
        (403, problem(403, detail="no"), Forbidden, "no"),
        (409, problem(409, detail="is running", kind="conflict"), Conflict, "is running"),
        (
            422,
            problem(422, detail="2 faults", errors=[{"pointer": "/a/b", "detail": "bad"}, {"detail": "worse"}]),
            InvalidInput,
            "a.b: bad\nworse",
        ),
        (500, problem(500, detail="a fault"), ApiError, "answers 500: a fault"),
        (503, problem(503, detail="Redis is full", outage="memory", kind="store_unavailable"), ApiUnavailable, "Redis is full"),
    ],
)
def test_what_an_api_answers_is_told_for_what_it_is(status: int, body: bytes, error: type[Exception], said: str) -> None:
    asked: list[str] = []

    def answer(request: _Between, _: bytes) -> None:
        asked.append(request.headers["Authorization"])
        request.answer(status, body, Location="https://thief.example/")

    with between(answer) as client, pytest.raises(error, match=re.escape(said)):
        RemotePlatform(client).count_users()
    assert asked == [f"Bearer {KEY}"]


def test_every_error_that_the_api_names_is_known() -> None:
    named = {
        kind_of(one("x")): one
        for one in _all(errors.TaskPlatformError)
        if issubclass(one, InvalidInput | NotFound | Conflict) and one is not NotFound
    }
    assert {kind: one for kind, one in named.items() if one.__module__ == "taskplatform.errors"} == _KINDS


def _all(root: type[errors.TaskPlatformError]) -> Iterator[type[errors.TaskPlatformError]]:
    for one in root.__subclasses__():
        yield one
        yield from _all(one)


def test_what_the_remote_platform_has_the_platform_has_too() -> None:
    own = {"client", "url", "definitions"}
    there = {name for name in vars(RemotePlatform) if not name.startswith("_")} - own
    assert there <= set(vars(Platform)), there - set(vars(Platform))


# --- nothing that is typed ends in a traceback -----------------------------------------------------------------------

ODD = ["", "nothing", "a b", "-1", "a\tb\n", "\ud7ff\u202e", "../..", "x" * 5000, "9" * 40, "%s{}", "{job}"]
#: These run until they are ended, or do what takes long, when they are given nothing wrong.
ENDLESS = {"up", "demo", "api", "bench"}


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        if (not isinstance(command, click.Group) or command.invoke_without_command) and name not in ENDLESS:
            yield (*path, name), command


def odd_words(command: click.Command, odd: str) -> list[str]:
    """All that it takes, each of it odd."""
    words: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            accepted = (
                parameter.type.choices[0]
                if isinstance(parameter.type, click.Choice)
                else "1"
                if "INT" in parameter.type.name.upper()
                else odd
            )
            words += [parameter.opts[0], str(accepted)]
    words.append("--")
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(str(parameter.type.choices[0]) if isinstance(parameter.type, click.Choice) else odd)
    return words


PLACES = ["redis", "api", "no redis", "no api", "wrong password", "wrong key"]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_is_typed_ends_in_a_traceback(
    api: Api, place: str, server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(api)
    gone = find_port()
    given: list[str] = []
    if "api" in place or "key" in place:
        url = f"https://127.0.0.1:{gone}" if place == "no api" else api.url
        given = ["--url", url, "--key-file", "key", "--ca", str(api.ca)]
        (tmp_path / "key").write_text(KEY if place != "wrong key" else "wrong" * 8)
    else:
        monkeypatch.setenv(
            "TASKPLATFORM_REDIS_URL",
            {"redis": server.url, "no redis": f"redis://127.0.0.1:{gone}/0"}.get(place, server.url.replace("//", "//someone:hunter2@")),
        )
    settings.cache_clear()
    answers = place in ("redis", "api")
    codes: set[int] = set()
    shift = sorted(PLACES).index(place)
    for number, (path, command) in enumerate(leaves(cli)):
        if place in ("no redis", "wrong password") and (number + shift) % 8:
            continue  # each takes its time to try again
        # each place begins with another odd word, so that all of them meet each kind of argument
        odd = ODD[(number + 3 * shift) % len(ODD)].replace("{job}", job)
        words = [*given, *path, *odd_words(command, odd)]
        result = CliRunner().invoke(cli, words, input="")
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
        assert result.exit_code in (0, 1, 2, 3), words
        assert "Traceback" not in result.output, words
        assert "hunter2" not in result.output, words
        if path[0] == "doctor":
            continue  # its codes are those of monitoring plugins
        codes.add(result.exit_code)
        if answers:
            assert result.exit_code != 3, (words, result.output)
        elif result.exit_code == 1:
            # refused before anything was asked
            assert result.stderr.startswith("error: "), words
    assert codes <= set(EXIT_CODES)
    assert (3 in codes) == (not answers)


def test_exit_codes_are_those_of_the_document(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.platform.create_user("u1")
    assert list(EXIT_CODES) == [0, 1, 2, 3, 130]
    assert run("users show u1").exit_code == 0
    assert run("users show nobody").exit_code == run("health").exit_code == 1
    assert run("users show").exit_code == run("nothing").exit_code == 2
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    assert run("users show u1").exit_code == run("health").exit_code == 3


# --- completion, and what is printed ---------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What is offered for the last word."""
    shell = ShellComplete(cli, {}, "taskplatform", "_TASKPLATFORM_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def test_ids_are_completed(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(api)
    over = ["--url", api.url, "--key-file", "key", "--ca", str(api.ca)]
    for way in ([], over):
        assert completed(*way, "jobs", "submit", "s") == ["sync"]
        assert completed(*way, "jobs", "submit", "sync", "u") == ["u1", "u2"]
        assert job in completed(*way, "jobs", "cancel", "rep")
        assert completed(*way, "jobs", "list", "--definition", "c") == ["clean"]
        assert completed(*way, "nodes", "drain", "w") == [WORKER]
    assert completed("jobs", "list", "--state", "can") == ["canceled"]
    # no faults while one types: there is just nothing to offer
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    assert completed("jobs", "submit", "sync", "u") == []
    Path("tasks/tasks.yaml").write_text("tasks: [{id: 5}]")
    assert completed("jobs", "submit", "s") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_a_shell_is_printed(shell: str) -> None:
    script = run(f"completion {shell}").stdout
    assert f"_TASKPLATFORM_COMPLETE={shell}_complete" in script
    assert "taskplatform" in script


def test_the_rights_at_redis_are_printed(api: Api, server: EmbeddedServer, client: redis.Redis) -> None:
    rules = run("redis-acl platform --namespace other --database 3").stdout.split()
    assert {"~other:*", "&/3.celeryev/*", "-@all", "+brpop"} <= set(rules)
    assert json.loads(run("redis-acl observer --json").stdout)["rules"][-1].startswith("+")
    client.execute_command("ACL", "SETUSER", "printed", "on", ">secret-1", *run("redis-acl platform").stdout.split())  # type: ignore[no-untyped-call]
    try:
        url = server.url.replace("//", "//printed:secret-1@")
        assert redis.Redis.from_url(url).ping()
    finally:
        client.execute_command("ACL", "DELUSER", "printed")  # type: ignore[no-untyped-call]


def test_bench_passes_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    asked: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], **_: Any) -> None:
            asked.append(words[1:])

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self) -> int:
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert run("bench plan --scale 0.1").exit_code == 3
    assert asked == [["-m", "bench", "plan", "--scale", "0.1"]]
    monkeypatch.setattr("taskplatform.__file__", "/nowhere/taskplatform/__init__.py")
    assert "installed package" in run("bench").stderr


def test_a_client_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="without the certificate"):
        ApiClient("https://host", KEY, client_key=tmp_path / "key")
    with pytest.raises(SettingsError, match="is not accepted"):
        ApiClient("https://host", "with space")
    assert ApiClient("https://host:8443/v1/", KEY).url == "https://host:8443"
