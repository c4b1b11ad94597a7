"""The whole way over TLS, with the rights of docs/security-redis.md and no others; what is denied beside them; and wrong certificates."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest
import redis
import requests
from celery import Celery
from flower.utils.broker import Broker
from kombu import Connection
from kombu.exceptions import OperationalError
from redbeat.schedulers import get_redis

from taskplatform.model import JobState
from taskplatform.store.acl import COMMANDS, Role, rules
from taskplatform.store.scripts import names, source
from tests.acceptance.nodes import FlowerNode, Guard, SecureServerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Target
from tests.conftest import ROOT
from tests.tls import TlsRedis, tls_redis

PLATFORM, OBSERVER = "plat.form+1", "observer"
PASSWORDS = {PLATFORM: "p@ss/w:rd#? %ü", OBSERVER: "obs%40erver"}
#: For what takes one or two where nothing else runs.
SECONDS = 90.0
soon = partial(eventually, seconds=SECONDS)
#: Runs command lines, one after the other; a process for each would take seconds.
CLI = [
    sys.executable,
    "-c",
    "import shlex, sys; from taskplatform.cli import main; print([main(shlex.split(one)) for one in sys.argv[1:]])",
]
#: What redis-py, kombu and redbeat call beside the store and its scripts.
CELERYS = {
    *("ping", "select", "info", "multi", "exec", "watch", "unwatch", "subscribe", "psubscribe", "unsubscribe", "punsubscribe", "publish"),
    *("eval", "evalsha", "script|exists", "script|load", "brpop", "llen", "pexpire", "pttl"),
}


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRedis]:
    users = {PLATFORM: rules(Role.PLATFORM), OBSERVER: rules(Role.OBSERVER)}
    with tls_redis(tmp_path_factory.mktemp("tls"), users, PASSWORDS) as server:
        yield server


@pytest.fixture(scope="module")
def site(secure: TlsRedis, guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    environment = base_environment(target.url, guard.environment)
    with running_site(tmp_path_factory.mktemp("site"), environment, server=SecureServerNode(secure, PLATFORM)) as running:
        yield running


def _denied(site: Site, user: str) -> list[dict[str, Any]]:
    return [one for one in site.redis.acl_log() if one["username"] == user]


def _cli(site: Site, *commands: str, **settings: str) -> tuple[list[int], str]:
    """The exit codes of these commands, and what they said."""
    own = {f"TASKPLATFORM_{name.upper()}": value for name, value in settings.items()}
    done = subprocess.run(
        [*CLI, *commands], cwd=ROOT, env={**site.environment, **own}, capture_output=True, text=True, check=True, timeout=300
    )
    assert "Traceback" not in done.stderr
    *said, codes = done.stdout.splitlines()
    return list(json.loads(codes)), "\n".join([*said, done.stderr])


def _answers(url: str) -> bool:
    return requests.get(url, timeout=SECONDS).status_code == 200


def _shows(flower: FlowerNode, node: str) -> bool:
    return any(one["hostname"] == node for one in requests.get(f"{flower.url}/workers?json=1", timeout=SECONDS).json()["data"])


def test_the_whole_way_needs_no_more_rights(site: Site, target: Target, user: str) -> None:
    site.redis.acl_log_reset()
    beat, leaving, flower = site.beat(), site.worker("--concurrency", "1"), site.flower()
    worker = site.default_worker
    for node in (beat, leaving, flower):
        node.ready()
    soon(lambda: beat.leads, "beat does not lead")

    site.platform.subscribe(user, "call")
    site.platform.trigger("call")
    soon(lambda: len(site.platform.jobs(user=user).items) == 1, "the trigger made no job")
    (triggered,) = site.platform.jobs(user=user).items
    assert site.wait_for(triggered.id, seconds=SECONDS).state is JobState.COMPLETED

    target.answer(user, Answer(503), Answer(200))
    assert site.wait_for(site.platform.enqueue("retried_call", user=user).id, seconds=SECONDS).state is JobState.COMPLETED
    target.answer(user, Answer(404))
    dead = site.wait_for(site.platform.enqueue("call", user=user).id, seconds=SECONDS)
    assert dead.state is JobState.FAILED
    sleeping = site.platform.enqueue("sleeping", user=user)
    site.wait_for(sleeping.id, JobState.RUNNING, seconds=SECONDS)
    site.platform.cancel(sleeping.id)
    assert site.wait_for(sleeping.id, seconds=SECONDS).state is JobState.CANCELED

    # a message of another task, that kombu keeps notes of; and remote control, with its answers
    site.app.send_task("taskplatform.sweep")
    soon(lambda: "taskplatform.sweep" in worker.logs() + leaving.logs(), "the sweep does not run")
    assert {name for answer in site.app.control.ping(timeout=SECONDS, limit=2) for name in answer} == {worker.node, leaving.node}
    assert len(site.app.control.rate_limit("call", "50/s", reply=True, timeout=SECONDS, limit=2)) == 2

    codes, said = _cli(
        site,
        "health",
        *("dead list", f"jobs show {dead.id}", f"dead redrive {dead.id}", "nodes", "beats", "users list", "limits list", "garbage list"),
        *("users create other", "limits set host:example.com --rate 5/s", "limits reset host:example.com", "changes", "occurrences call"),
        *("pause call", "resume call", f"users delete {user} --yes", "dead discard --all"),
    )
    assert codes[1:10] == [0] * 9, said
    assert dead.id in said

    soon(lambda: _shows(flower, worker.node), "Flower does not see the worker")
    for path in ("/workers", "/tasks", "/broker", f"/worker/{worker.node}"):
        soon(partial(_answers, flower.url + path), f"Flower does not show {path}")

    leaving.kill("SIGTERM")
    assert leaving.wait(SECONDS) == 0
    beat.kill("SIGTERM")
    beat.wait(SECONDS)
    assert _denied(site, PLATFORM) == []
    assert "insecure" not in site.logs()


def test_an_observer_only_listens(site: Site, secure: TlsRedis, user: str) -> None:
    flower = site.flower(redis_url=secure.url(OBSERVER))
    flower.ready()
    node = site.default_worker.node
    soon(lambda: _shows(flower, node), "Flower does not see the worker")
    site.wait_for(site.platform.enqueue("returning", user=user).id, seconds=SECONDS)
    for path in ("/workers", "/tasks", "/broker"):
        assert requests.get(flower.url + path, timeout=SECONDS).status_code == 200, path
    assert "Failed to capture" not in flower.logs()
    with secure.client(OBSERVER) as observer:
        assert observer.llen("high") == 0
        for command in (
            ("HGETALL", "tp:planner"),
            ("LPUSH", "high", "{}"),
            ("LRANGE", "high", 0, -1),
            ("PUBLISH", "/0.celery.pidbox", "{}"),
            ("PSUBSCRIBE", "*"),
            ("EVAL", "return redis.call('HGETALL', 'tp:planner')", 0),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
        ):
            with pytest.raises(redis.exceptions.ResponseError, match=r"permission|can't run"):
                observer.execute_command(*command)


def test_the_platform_has_no_more_rights_than_it_uses(site: Site, secure: TlsRedis) -> None:
    with secure.client(PLATFORM) as client:
        for command in (
            ("GET", "somebody:else"),
            ("PUBLISH", "news", "hello"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "requirepass"),
            ("KEYS", "*"),
            ("SCAN", 0),
            ("ACL", "LIST"),
            ("MONITOR",),
            ("SHUTDOWN",),
            ("SCRIPT", "FLUSH"),
            ("FUNCTION", "LIST"),
        ):
            with pytest.raises(redis.exceptions.ResponseError, match=r"permission|can't run"):
                client.execute_command(*command)


def test_what_it_may_is_what_the_code_calls() -> None:
    allowed = set(COMMANDS[Role.PLATFORM])
    scripts = {word.lower() for name in [*names(), "lib"] for word in re.findall(r"call\('([A-Z]+)'", source(name))}
    assert scripts <= allowed, "a script calls what its user may not"
    store = (ROOT / "taskplatform" / "store" / "store.py").read_text()
    verbs = set(re.findall(r"(?:_redis|pipe)\.([a-z]+)\(", store)) | {"del"}
    assert allowed - scripts - verbs <= CELERYS, "nobody calls it"


def test_a_certificate_for_another_name_is_refused(site: Site, secure: TlsRedis) -> None:
    """By address: the certificate names the host, and is by the right CA."""
    url = secure.url(PLATFORM, host="127.0.0.1")
    _broker_refuses(site, url, secure)
    processes = [site.worker(redis_url=url), site.beat(redis_url=url), site.flower(redis_url=url)]
    codes, said = _cli(site, "nodes", redis_url=url)
    assert codes == [3]
    api = _cli(site, "api --insecure-http", redis_url=url, api_port="0")
    assert api[0] == [3]
    for text in (said, api[1], *((process.wait(SECONDS), process.logs())[1] for process in processes)):
        assert "Redis cannot be trusted: certificate verify failed: IP address mismatch" in text
        assert "redis_ca" in text
        for word in ("Traceback", PASSWORDS[PLATFORM], "insecure"):
            assert word not in text
    assert [process.wait(0) for process in processes] == [1, 1, 1]


def _broker_refuses(site: Site, url: str, secure: TlsRedis) -> None:
    """Connections of kombu, as the worker's consumer, Flower and remote control make them, of redbeat, and of Flower's page of queues."""
    tls = site.app.conf.broker_use_ssl
    assert tls["ssl_ca_certs"] == str(secure.ca)
    query = site.app.conf.broker_url.partition("?")[2]
    for connection in (Connection(url, ssl=tls), Connection(f"{url}?{query}")):
        with connection, pytest.raises(OperationalError, match="IP address mismatch"):
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
    beat = Celery(broker=url, set_as_current=False)
    beat.conf.update(
        redbeat_redis_url=url, redbeat_redis_use_ssl=site.app.conf.redbeat_redis_use_ssl, redbeat_redis_options={"retry": None}
    )
    with pytest.raises(redis.ConnectionError, match="IP address mismatch"):
        get_redis(beat).ping()
    with pytest.raises(redis.ConnectionError, match="IP address mismatch"):
        asyncio.run(Broker(url, broker_options={}, broker_use_ssl=tls).queues(["high"]))


def test_no_page_and_no_command_of_celery_shows_the_password(site: Site) -> None:
    """`inspect conf`, which Flower's page of a worker shows, hides values by their names."""
    told = json.dumps([site.app.conf.table(with_defaults=True), site.app.bugreport()], default=str)
    assert "redbeat_redis_url" in told
    for form in forms(PASSWORDS[PLATFORM]):
        assert form not in told


def forms(secret: str) -> set[str]:
    """How a secret may be written."""
    return {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1], b64encode(secret.encode()).decode()}
