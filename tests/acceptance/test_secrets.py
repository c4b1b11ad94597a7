"""Planted secrets are looked for in all that the platform writes, keeps, sends and shows."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote_to_bytes

import pytest
import requests

from taskplatform.local import find_port
from taskplatform.model import JobState
from taskplatform.store.acl import Role, rules
from tests.acceptance.launcher import VARIABLE
from tests.acceptance.nodes import Guard, SecureServerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Target
from tests.conftest import ROOT
from tests.tls import TlsRedis, tls_redis

#: Each with what is written in another way in a URL, in JSON and in HTML.
REDIS_PASSWORD = 'redis/"pw"&<ü>@4711'
FLOWER_PASSWORD = 'flower/"pw"&<>@4712'
API_KEY = "planted/api+key&<4718>-0123456789-0123456789"
SIGNING_KEY = b"signing-key\xfb\xff\xbf-4719-0123456789"
ENVIRONMENT = {
    "PLANTED_HEADER": 'header-"secret"&<4713>',
    "PLANTED_QUERY": "query-secret/4714",
    "PLANTED_BODY": 'body-"secret"\\4715',
    "PLANTED_LOGIN": "login secret@4716",
    "PLANTED_SIGN": "whsec_" + base64.b64encode(SIGNING_KEY).decode(),
}
COMMANDS = [
    "nodes",
    "jobs list",
    "dead list",
    "changes",
    "garbage list",
    "limits list",
    "tasks list",
    "tasks show telling",
    "health",
    "users list",
]
#: For what takes one or two where nothing else runs.
SECONDS = 120.0
soon = partial(eventually, seconds=SECONDS)
#: Runs the command lines in its second argument, once with each of the environments in its first.
CLI = """
import json, os, shlex, sys
from taskplatform.cli import main
from taskplatform.settings import settings
for own in json.loads(sys.argv[1]):
    os.environ.update(own)
    settings.cache_clear()
    print([main(shlex.split(one)) for one in json.loads(sys.argv[2])])
"""


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRedis]:
    with tls_redis(tmp_path_factory.mktemp("tls"), {"platform": rules(Role.PLATFORM)}, {"platform": REDIS_PASSWORD}) as server:
        yield server


@pytest.fixture(scope="module")
def environment(guard: Guard, target: Target) -> dict[str, str]:
    login_url = target.url.replace("//", f"//somebody:{quote(ENVIRONMENT['PLANTED_LOGIN'], safe='')}@")
    by_themselves = {name: value for name, value in guard.environment.items() if name != VARIABLE}  # with their own command lines
    return {
        **base_environment(target.url, by_themselves),
        **ENVIRONMENT,
        "PLANTED_LOGIN_URL": login_url,
        "TASKPLATFORM_TASKS_DIR": str(Path(__file__).parent / "secret_definitions"),
        "TASKPLATFORM_FLOWER_LOGIN": f"ops:{FLOWER_PASSWORD}",
        "TASKPLATFORM_API_KEY": API_KEY,
        "TASKPLATFORM_LOG_LEVEL": "DEBUG",
        # all that is echoed, so that nothing is missed because it was cut off
        "TASKPLATFORM_HTTP_EXCERPT": "4000",
    }


@pytest.fixture(scope="module")
def site(secure: TlsRedis, environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site"), environment, server=SecureServerNode(secure, "platform")) as running:
        yield running


def _planted() -> dict[str, str]:
    key = ENVIRONMENT["PLANTED_SIGN"].removeprefix("whsec_")
    signing = {"signing key": key, "signing key in hex": SIGNING_KEY.hex()}
    return {"redis": REDIS_PASSWORD, "flower": FLOWER_PASSWORD, "api": API_KEY, **ENVIRONMENT, **signing}


@cache
def _forms(secret: str) -> set[bytes]:
    plain = secret.encode()
    texts = {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        json.dumps(json.dumps(secret))[3:-3],
    }
    texts |= {repr(secret)[1:-1], secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")}
    # base64 begins anew with every third byte
    texts |= {base64.b64encode(b"\0" * shift + plain)[4 * bool(shift) : -4].decode() for shift in range(3)}
    return {text.encode() for text in texts}


def _found(name: str, content: bytes) -> list[str]:
    """Which secrets are in it, in any form."""
    assert content, f"{name} is empty"
    views = (content, unquote_to_bytes(content))
    return [f"{what} in {name}" for what, secret in _planted().items() for form in _forms(secret) if any(form in view for view in views)]


def _database(client: Any) -> Iterator[tuple[str, bytes]]:
    for key in client.scan_iter("*", count=1000):
        yield "redis " + key.decode("utf-8", "replace"), key + b" = " + _value(client, key)


def _value(client: Any, key: bytes) -> bytes:
    read: dict[bytes, Callable[[], Any]] = {
        b"string": lambda: client.get(key),
        b"hash": lambda: client.hgetall(key),
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"stream": lambda: client.xrange(key),
        b"none": lambda: None,
    }
    # as it is and not as repr, which would escape
    return b"\n".join(_flat(read[client.type(key)]()))


def _flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from _flat(pair)
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _flat(one)
    elif value is not None:
        yield value if isinstance(value, bytes) else str(value).encode()


def _run(site: Site, commands: list[str], *environments: Mapping[str, str]) -> bytes:
    """What these commands say, with each of the environments over the site's own."""
    argv = [sys.executable, "-c", CLI, json.dumps(environments or [{}]), json.dumps(commands)]
    done = subprocess.run(argv, cwd=ROOT, env=site.environment, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextmanager
def _control_api(site: Site) -> Iterator[str]:
    """The URL of the control API, as a process of its own, whose key is a planted one."""
    own = {"TASKPLATFORM_API_PORT": str(port := find_port()), "TASKPLATFORM_LOG_LEVEL": "DEBUG"}
    argv = [sys.executable, "-c", "from taskplatform.cli import main; main()", "api", "--insecure-http"]
    with (site.folder / "api.log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env={**site.environment, **own}, stdout=log, stderr=log)
    try:
        soon(lambda: _answers(f"http://127.0.0.1:{port}/health"), "the API does not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


def _answers(url: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(url, timeout=SECONDS).ok
    return False


def _answers_of_the_api(site: Site, jobs: Iterable[str]) -> dict[str, bytes]:
    """To every GET that takes no name, those about the jobs, and requests that are wrong or put a secret where none belongs."""
    key = {"Authorization": f"Bearer {API_KEY}"}
    with _control_api(site) as url:
        paths = requests.get(f"{url}/v1/openapi.json", headers=key, timeout=SECONDS).json()["paths"]
        asked = [path for path, operations in paths.items() if "get" in operations and "{" not in path]
        assert len(asked) > 10
        asked += [f"/v1/jobs/{quote(job)}{what}" for job in jobs for what in ("", "/history")]
        asked += ["/v1/definitions/telling", f"/v1/nowhere/{quote(API_KEY, safe='')}", f"/v1/jobs?definition={quote(API_KEY, safe='')}"]
        answers = {path: requests.get(url + path, headers=key, timeout=SECONDS) for path in asked}
        assert all(answers[f"/v1/jobs/{quote(job)}"].status_code == 200 for job in jobs)
        answers["a job that is none"] = requests.post(f"{url}/v1/jobs", json={"definition": "telling"}, headers=key, timeout=SECONDS)
        answers["a wrong key"] = requests.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {API_KEY}x"}, timeout=SECONDS)
        assert answers["a wrong key"].status_code == 401
        # what is asked for may be said again
        return {
            f"the API's answer to {name}": b"\n".join([one.content, repr(one.headers).encode()])
            for name, one in answers.items()
            if quote(API_KEY, safe="") not in name
        }


def test_no_secret_is_written_anywhere(site: Site, secure: TlsRedis, target: Target, environment: dict[str, str]) -> None:
    worker = site.worker("--concurrency", "4", "--loglevel", "DEBUG")
    threads = site.worker("--concurrency", "2", "--pool", "threads", "--loglevel", "DEBUG")
    beat = site.beat()
    flower = site.flower("--logging=debug", "--debug=true")
    refused = secure.url("platform", password=f"{FLOWER_PASSWORD}-wrong")
    ended = [site.worker("--loglevel", "DEBUG", redis_url=refused), site.beat(redis_url=refused), site.flower(redis_url=refused)]
    for node in (worker, threads, beat, flower):
        node.ready()
    auth = ("ops", FLOWER_PASSWORD)
    soon(lambda: len(requests.get(f"{flower.url}/workers?json=1", auth=auth, timeout=SECONDS).json()["data"]) == 2, "Flower sees no worker")

    echo = " ".join(_planted().values())
    jobs: dict[str, JobState] = {}
    for definition, answers, state in (
        ("telling", [Answer(200, body=echo)], JobState.COMPLETED),
        ("telling", [Answer(400, body=echo, headers={"X-Echo": ENVIRONMENT["PLANTED_HEADER"]})], JobState.FAILED),
        ("retried", [Answer(503, body=echo), Answer(200)], JobState.COMPLETED),
        (
            "retried",
            [Answer(307, headers={"Location": f"/elsewhere?token={quote(ENVIRONMENT['PLANTED_QUERY'])}"}), Answer(200)],
            JobState.COMPLETED,
        ),
        ("userinfo", [Answer(401, body=json.dumps({"you": environment["PLANTED_LOGIN_URL"]}))], JobState.FAILED),
        ("unreachable", [], JobState.FAILED),
        ("signed", [Answer(400, body=echo)], JobState.FAILED),
    ):
        user = site.user()
        if answers:
            target.answer(user, *answers)
        jobs[site.platform.enqueue(definition, user=user).id] = state
    for how, state in (("raise", JobState.FAILED), ("return", JobState.COMPLETED)):
        for _ in range(3):
            jobs[site.platform.enqueue("blurting", user=site.user(), params={"how": how}).id] = state
    for job_id, state in jobs.items():
        assert site.wait_for(job_id, seconds=SECONDS).state is state, site.story(job_id)
    # the whole echo arrived, and this is what was made of it
    excerpts = [line.detail.get("excerpt") for job_id in jobs for line in site.platform.history(job_id) if line.detail]
    assert excerpts.count(" ".join("***" for _ in _planted())) == 4
    assert "logged " in site.logs()
    assert "printed " in site.logs()

    pages = {}
    paths = [
        "/",
        "/workers",
        "/tasks",
        "/broker",
        "/metrics",
        f"/worker/{worker.node}",
        "/nowhere",
        *(f"/task/{job_id}" for job_id in jobs),
    ]
    soon(lambda: requests.get(f"{flower.url}/task/{[*jobs][-1]}", auth=auth, timeout=SECONDS).status_code == 200, "Flower has no task")
    soon(lambda: requests.get(f"{flower.url}/worker/{worker.node}", auth=auth, timeout=SECONDS).status_code == 200, "Flower has no worker")
    for path in paths:
        pages["Flower " + path] = requests.get(flower.url + path, auth=auth, timeout=SECONDS).content
    assert b"redbeat_redis_options" in pages[f"Flower /worker/{worker.node}"]

    pages |= _answers_of_the_api(site, jobs)
    commands = _run(site, [*COMMANDS, *(f"jobs show {job_id} --json" for job_id in jobs)])
    assert all(job_id.encode() in commands for job_id in jobs)
    argv = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for node in (worker, threads, beat, flower) for process in node.processes()]

    url = secure.url("platform")
    faults = _run(
        site,
        ["nodes"],
        {"TASKPLATFORM_REDIS_URL": refused},
        {"TASKPLATFORM_REDIS_URL": url.replace(f":{secure.port}", ":9")},
        {"TASKPLATFORM_REDIS_URL": secure.url("platform", host="127.0.0.1")},
        {"TASKPLATFORM_REDIS_URL": url + "/x", "TASKPLATFORM_FLOWER_LOGIN": FLOWER_PASSWORD, "TASKPLATFORM_API_KEY": f"{API_KEY} \n"},
    )
    for said in (
        b"did not let us in",
        b"cannot be reached",
        b"IP address mismatch",
        b"FLOWER_LOGIN (environment): takes",
        b"takes a redis://",
    ):
        assert said in faults
    assert b"API_KEY (environment): takes" in faults
    assert [node.wait(SECONDS) for node in ended] == [1, 1, 1]

    with secure.client(decode_responses=False) as client:
        kept = dict(_database(client))
    for node in (worker, threads, beat, flower):
        node.kill("SIGTERM")
    for node in (worker, threads, beat, flower):
        node.wait(SECONDS)
    logs = {path.name: path.read_bytes() for path in site.folder.glob("*.log")}
    assert len(kept) > 20
    assert len(logs) == 8
    everything = {**kept, **pages, **logs, "faults of commands": faults, "the command line": commands, "cmdline": b"\n".join(argv)}
    assert sorted({line for name, content in everything.items() for line in _found(name, content)}) == []
