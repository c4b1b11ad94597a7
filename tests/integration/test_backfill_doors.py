"""Backfills through command line, Python and control API: they say the same, and refuse the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from taskplatform.errors import Conflict, InvalidInput, UnknownBackfill, UnknownDefinition, UnknownUser
from taskplatform.local import EmbeddedServer
from taskplatform.platform import Platform
from taskplatform.remote import RemotePlatform
from taskplatform.settings import settings
from taskplatform.store import Backfill, BackfillState
from tests.integration.apiserver import KEY, Api, running_api, work_beside_the_api
from tests.integration.test_cli_remote import run


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url) as found:
        yield found


@pytest.fixture
def api(served: Api, server: EmbeddedServer, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API on an empty server with forty subscribers of `sync`, which is due at five past each hour; the settings are the same."""
    work_beside_the_api(tmp_path, server.url, monkeypatch)
    served.platform.publish_missing()
    served.platform.create_users([f"u{number}" for number in range(40)])
    for number in range(40):
        served.platform.subscribe(f"u{number}", "sync")
    # the planner has come to all that was due by now, and planned nothing of it
    client.hset("tp:group:sync", "cursor", str(served.platform.now_ms()))
    yield served
    settings.cache_clear()


@pytest.fixture
def remote(api: Api) -> Iterator[RemotePlatform]:
    with RemotePlatform.connect(api.url, key=KEY, ca=api.ca) as found:
        yield found


def counted(found: Backfill) -> dict[str, object]:
    """Without what each has of its own."""
    own = {"id", "begun_ms", "ended_ms", "actor"}
    return {name: getattr(found, name) for name in found.__dataclass_fields__ if name not in own}


@pytest.mark.parametrize("users", [None, [f"u{number}" for number in range(0, 40, 3)]])
def test_python_and_api_say_the_same(api: Api, remote: RemotePlatform, monkeypatch: pytest.MonkeyPatch, users: list[str] | None) -> None:
    # so that the dry run goes in many calls
    monkeypatch.setattr("taskplatform.api.backfills._BUDGET", timedelta())
    monkeypatch.setattr("taskplatform.backfill._USERS_TOGETHER", 7)
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    asked = {"since": until - timedelta(hours=6), "until": until, "users": users, "rate": "90/m"}
    here = api.platform.backfill("sync", dry_run=True, **asked)  # type: ignore[arg-type]
    there = remote.backfill("sync", dry_run=True, **asked)  # type: ignore[arg-type]
    assert counted(here) == counted(there)
    assert (here.made, here.users) == (6 * len(users or range(40)), None if users is None else len(users))
    assert api.platform.backfills() == remote.backfills() == []
    begun = remote.backfill("sync", **asked)  # type: ignore[arg-type]
    assert remote.backfills() == api.platform.backfills() == [begun] == [remote.backfill_status(begun.id)]
    assert (begun.total, begun.per_second, begun.state) == (here.made, 1.5, BackfillState.RUNNING)
    assert remote.pause_backfill(begun.id)
    assert not remote.pause_backfill(begun.id)
    assert remote.backfill_status(begun.id).reason == begun.actor.join(("paused by ", ""))
    assert remote.resume_backfill(begun.id)
    assert remote.cancel_backfill(begun.id).state is BackfillState.CANCELED
    assert remote.cancel_backfill(begun.id).state is BackfillState.CANCELED


def test_both_refuse_the_same(api: Api, remote: RemotePlatform) -> None:
    since = datetime.now(UTC) - timedelta(hours=2)
    for platform in (api.platform, remote):
        assert isinstance(platform, Platform | RemotePlatform)
        # over the API what the body names is a fault of it
        with pytest.raises((UnknownDefinition, InvalidInput), match="no definition 'nothing'"):
            platform.backfill("nothing", since=since)
        with pytest.raises((UnknownUser, InvalidInput), match="no user 'nobody'"):
            platform.backfill("sync", since=since, users=["nobody"])
        with pytest.raises(InvalidInput, match="must be before until"):
            platform.backfill("sync", since=since, until=since)
        with pytest.raises(InvalidInput, match="nobody knows any more whether it ran"):
            platform.backfill("sync", since=since - timedelta(days=400))
        with pytest.raises(InvalidInput, match="rate 'x' is not accepted"):
            platform.backfill("sync", since=since, rate="x", dry_run=True)
        for verb in (platform.backfill_status, platform.cancel_backfill, platform.pause_backfill, platform.resume_backfill):
            for odd in ("0", "../x", "x" * 500):
                with pytest.raises(UnknownBackfill):
                    verb(odd)
        done = platform.backfill("sync", since=since)
        platform.cancel_backfill(done.id)
        with pytest.raises(Conflict, match="is canceled"):
            platform.pause_backfill(done.id)


def test_the_same_request_again_begins_no_second_one(api: Api) -> None:
    body = {"definition": "sync", "since": (datetime.now(UTC) - timedelta(hours=2)).isoformat()}
    first, again = (api("POST", "/v1/backfills", body, status=201, headers={"Idempotency-Key": "one"}) for _ in range(2))
    assert first == again
    assert len(api("GET", "/v1/backfills")["items"]) == 1


def test_rights(api: Api) -> None:
    body = {"definition": "sync", "since": (datetime.now(UTC) - timedelta(hours=2)).isoformat()}
    reads = api.key("read")
    api("POST", "/v1/backfills", body, status=403, headers=reads)
    api("POST", "/v1/backfills/count", body, headers=reads)
    made = api("POST", "/v1/backfills", body, status=201)
    api("GET", f"/v1/backfills/{made['id']}", headers=reads)
    for verb in ("cancel", "pause", "resume"):
        api("POST", f"/v1/backfills/{made['id']}/{verb}", status=403, headers=reads)


@pytest.mark.parametrize("far", [False, True])
def test_the_commands(api: Api, tmp_path: Path, far: bool) -> None:
    over = api if far else None
    (tmp_path / "users.txt").write_text("# the ones who complained\nu1\nu2\n\nu3\n")
    for given, stdin, number in (("users.txt", None, 3), ("u1,u2", None, 2), ("u7", None, 1), ("-", "u4\nu5\n", 2)):
        result = run(f"backfill sync --from 3h --users {given} --dry-run --json", over=over, stdin=stdin)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert (found["state"], found["users"], found["made"]) == ("dry run", number, 3 * number)
    begun = run("backfill sync --from 3h --rate 30/m", over=over)
    assert begun.exit_code == 0, begun.output
    backfill = json.loads(run("backfills list --json", over=over).stdout)[0]
    assert (backfill["definition"], backfill["state"], backfill["total"], backfill["rate"]) == ("sync", "running", 120, "30/m")
    assert f"taskplatform backfills show {backfill['id']}" in begun.stderr
    assert run(f"backfills pause {backfill['id']}", over=over).stdout == f"{backfill['id']} paused\n"
    assert run(f"backfills pause {backfill['id']}", over=over).stdout == f"{backfill['id']} was paused\n"
    assert run(f"backfills resume {backfill['id']}", over=over).stdout == f"{backfill['id']} resumed\n"
    shown = dict(line.split("\t") for line in run(f"backfills show {backfill['id']}", over=over).stdout.splitlines())
    assert (shown["state"], shown["users"], shown["jobs decided"]) == ("running", "all subscribers", "0 of 120")
    assert json.loads(run(f"backfills cancel {backfill['id']} --json", over=over).stdout)["state"] == "canceled"
    listed = run("backfills list", over=over).stdout.splitlines()
    assert listed[0].split("\t")[:3] == ["backfill", "definition", "state"]
    assert listed[1].split("\t")[:3] == [backfill["id"], "sync", "canceled"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("backfill sync", 2, "Missing option '--from'"),
        ("backfill sync --from yesterday", 2, "neither a time such as"),
        ("backfill sync --from 3h --users ./nowhere", 2, "./nowhere cannot be read: No such file or directory"),
        ("backfill sync --from 3h --users ,", 2, "',' has no user"),
        ("backfill sync --from 3h --users 'a b'", 1, "'a b' is not accepted"),
        ("backfill sync --from 3h --users nobody", 1, "no user 'nobody'"),
        ("backfill sync --from 300d", 1, "--beyond-retention"),
        ("backfill sync --from 3h --to 2099-01-01", 1, "what is still to come is planned"),
        ("backfills show nothing", 1, "no backfill 'nothing'"),
        ("backfills cancel 0", 1, "no backfill '0'"),
    ],
)
def test_what_commands_refuse(api: Api, line: str, code: int, said: str) -> None:
    result = run(line)
    assert (result.exit_code, said in result.stderr) == (code, True), result.output
