"""API keys and the audit log in a real server, and the commands for them."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from click.testing import CliRunner

from taskplatform.cli import cli, main
from taskplatform.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from taskplatform.keys import ApiKey, KeyRefused, Scope, digest, new_token
from taskplatform.local import EmbeddedServer
from taskplatform.settings import load_settings, settings
from taskplatform.store import Store, access
from taskplatform.store.access import KEY_RETENTION, AuditEntry
from tests.conftest import Clock

LOG = 1000


def make(store: Store, name: str = "ci", *scopes: str, lifetime: timedelta | None = None) -> tuple[ApiKey, str]:
    return store.access.create_key(name, set(scopes or ("read",)), lifetime=lifetime, actor="ann", log_size=LOG)


def rotate(store: Store, name: str = "ci", *, overlap: timedelta, lifetime: timedelta | None = None) -> tuple[ApiKey, str]:
    return store.access.rotate_key(name, overlap=overlap, lifetime=lifetime, actor="ann", log_size=LOG)


def revoke(store: Store, which: str = "ci") -> int:
    return store.access.revoke_key(which, actor="ann", log_size=LOG)


def refusal(store: Store, token: str) -> str:
    with pytest.raises(KeyRefused) as caught:
        store.access.authenticate(token)
    return caught.value.why


def wrong_secret(token: str) -> str:
    """A token of the same key that is well-formed, and has another secret."""
    from taskplatform.keys import _checksum

    body = token[:-7] + ("0" if token[-7] != "0" else "1")
    return body + _checksum(body)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_lets_in_who_has_its_token(store: Store) -> None:
    key, token = make(store, "ci", "submit", "read")
    assert key == ApiKey(key.id, "ci", (Scope.READ, Scope.SUBMIT), store.now_ms(), "ann")
    assert store.access.authenticate(token).id == key.id
    assert refusal(store, wrong_secret(token)) == "wrong secret"
    assert refusal(store, new_token()[1]) == "no such key"
    assert refusal(store, token[:-1]) == "not a token"
    assert refusal(store, "") == "not a token"


def test_only_a_digest_is_stored(store: Store, client: redis.Redis) -> None:
    key, token = make(store)
    rotated = rotate(store, overlap=timedelta(hours=1))[1]
    store.access.authenticate(token)
    everything = ""
    for name in cast("list[str]", client.keys("*")):
        everything += repr(cast("Any", client).execute_command("DUMP", name, NEVER_DECODE=True))
        kind = client.type(name)
        everything += str(client.hgetall(name) if kind == "hash" else client.xrange(name) if kind == "stream" else "")
    assert digest(token) in everything
    assert key.id in everything
    for one in (token, rotated):
        assert one not in everything
        assert one[17:40] not in everything


def test_secrets_are_compared_in_constant_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is shown: one look at the server, and one comparison of two digests, by the function that takes the same time for all."""
    _, token = make(store)
    store.access.authenticate(token)
    compared: list[tuple[int, int]] = []
    looked: list[str] = []
    find, run = store.access._find, store.access._scripts.run

    def compare(one: str, other: str) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    class Hmac:
        compare_digest = staticmethod(compare)

    def look(key_id: str) -> Any:
        looked.append("look")
        return find(key_id)

    def write(name: str, *args: Any) -> Any:
        looked.append(name)
        return run(name, *args)

    monkeypatch.setattr(access, "hmac", Hmac)
    monkeypatch.setattr(store.access, "_find", look)
    monkeypatch.setattr(store.access._scripts, "run", write)
    store.access.authenticate(token)
    refusal(store, wrong_secret(token))
    refusal(store, new_token()[1])
    assert compared == [(64, 64)] * 3
    assert looked == ["look"] * 3


def test_a_key_expires_by_the_clock_of_the_server(store: Store, clock: Clock) -> None:
    key, token = make(store, lifetime=timedelta(seconds=90))
    assert key.expires_ms == clock.now_ms + 90_000
    clock.advance(89.999)
    store.access.authenticate(token)
    clock.advance(0.001)
    assert refusal(store, token) == "the key is expired"
    assert refusal(store, wrong_secret(token)) == "wrong secret"
    # the name is free again
    assert store.access.authenticate(make(store)[1]).name == "ci"


def test_a_revoked_key_lets_nobody_in_any_more(store: Store) -> None:
    key, token = make(store)
    assert revoke(store) == 1
    assert refusal(store, token) == "the key is revoked"
    assert revoke(store) == 0
    assert revoke(store, key.id) == 0
    with pytest.raises(NotFound, match="no key 'other'"):
        revoke(store, "other")
    assert [one.state(store.now_ms()) for one in store.access.list_keys()] == ["revoked"]


def test_a_rotated_key_is_valid_for_the_overlap(store: Store, clock: Clock) -> None:
    old, old_token = make(store, "ci", "submit", lifetime=timedelta(days=90))
    clock.advance(3600)
    new, new_token_ = rotate(store, overlap=timedelta(hours=24))
    assert (new.name, new.scopes, new.expires_ms) == ("ci", (Scope.SUBMIT,), clock.now_ms + 90 * 86_400_000)
    assert store.access.authenticate(old_token).id == old.id
    clock.advance(24 * 3600 - 0.001)
    store.access.authenticate(old_token)
    clock.advance(0.001)
    assert refusal(store, old_token) == "the key is expired"
    assert store.access.authenticate(new_token_).id == new.id
    # one that ends sooner is not kept alive by it, and its successor lives as long as the first was to live
    last, last_token = rotate(store, overlap=timedelta())
    assert refusal(store, new_token_) == "the key is expired"
    assert last.expires_ms == clock.now_ms + 90 * 86_400_000
    store.access.authenticate(last_token)


def test_a_rotation_does_not_prolong_what_ends_sooner(store: Store, clock: Clock) -> None:
    _, token = make(store, lifetime=timedelta(seconds=10))
    rotate(store, overlap=timedelta(hours=1), lifetime=timedelta(days=1))
    clock.advance(10)
    assert refusal(store, token) == "the key is expired"


def test_the_old_one_of_a_rotation_can_be_revoked_alone(store: Store) -> None:
    old, old_token = make(store)
    _, token = rotate(store, overlap=timedelta(days=1))
    assert revoke(store, old.id) == 1
    assert refusal(store, old_token) == "the key is revoked"
    store.access.authenticate(token)
    rotate(store, overlap=timedelta(days=1))
    assert revoke(store) == 2


def test_what_cannot_be_made_is_said(store: Store) -> None:
    make(store)
    with pytest.raises(Conflict, match="there is a valid key 'ci': rotate it"):
        make(store)
    with pytest.raises(NotFound, match="no valid key 'other'"):
        rotate(store, "other", overlap=timedelta())
    with pytest.raises(InvalidInput, match="it is the key that TASKPLATFORM_API_KEY gives"):
        make(store, "bootstrap")
    revoke(store)
    with pytest.raises(NotFound, match="no valid key 'ci'"):
        rotate(store, overlap=timedelta())
    assert len(store.access.list_keys()) == 1


def test_keys_that_ended_are_forgotten_after_a_time(store: Store, clock: Clock, client: redis.Redis) -> None:
    make(store, "expires", lifetime=timedelta(days=1))
    make(store, "revoked")
    make(store, "stays")
    revoke(store, "revoked")
    clock.advance((KEY_RETENTION + timedelta(days=1)).total_seconds() - 1)
    make(store, "one")
    assert [key.name for key in store.access.list_keys()] == ["expires", "one", "stays"]
    clock.advance(1)
    make(store, "two")
    assert [key.name for key in store.access.list_keys()] == ["one", "stays", "two"]
    assert len(cast("list[str]", client.keys("tp:apikey:*"))) == 3


def test_there_is_a_most_of_keys(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_KEYS", 3)
    for name in "abc":
        make(store, name)
    with pytest.raises(Conflict, match="there are 3 keys"):
        make(store, "d")
    with pytest.raises(Conflict, match="there are 3 keys"):
        rotate(store, "a", overlap=timedelta())
    revoke(store, "a")
    clock.advance(KEY_RETENTION.total_seconds())
    make(store, "d")


def test_the_last_use_is_known_to_the_minute_and_written_once_in_it(store: Store, clock: Clock, client: redis.Redis) -> None:
    _, token = make(store)
    assert store.access.authenticate(token).last_used_ms is None
    first = clock.now_ms

    def writes() -> int:
        stats = cast("Any", client).info("commandstats")
        return int(stats["cmdstat_hset"]["calls"])

    before = writes()
    for _ in range(20):
        clock.advance(2.9)
        store.access.authenticate(token)
    assert store.access.list_keys()[0].last_used_ms == first
    assert writes() == before
    clock.advance(2)
    store.access.authenticate(token)
    assert store.access.list_keys()[0].last_used_ms == clock.now_ms
    # a clock that was set back must not stop it
    clock.advance(-86_400)
    store.access.authenticate(token)
    assert store.access.list_keys()[0].last_used_ms == clock.now_ms


def test_a_key_that_was_revoked_meanwhile_does_not_come_back_by_its_use(store: Store, client: redis.Redis) -> None:
    key, _ = make(store)
    client.delete(f"tp:apikey:{key.id}", "tp:apikeys")
    store.access._note_use(key.id)
    assert client.keys("tp:apikey*") == []


def test_a_server_that_is_full_still_says_who_may_come_in(store: Store, client: redis.Redis) -> None:
    _, token = make(store)
    client.config_set("maxmemory", 1)
    try:
        assert store.access.authenticate(token).name == "ci"
        assert store.access.list_keys()[0].last_used_ms is not None
        assert store.access.refuse("192.0.2.1", attempt(), per_minute=1, log_size=LOG) == 0
        assert revoke(store) == 1
        with pytest.raises(StoreUnavailable):
            make(store, "other")
    finally:
        client.config_set("maxmemory", 0)
    assert [entry.action for entry in store.access.audit()] == ["key revoked", "GET /jobs", "key made"]
    assert [key.name for key in store.access.list_keys()] == ["ci"]


def test_a_server_that_takes_no_writes_still_says_who_may_come_in(store: Store, client: redis.Redis) -> None:
    _, token = make(store)
    cast("Any", client).execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        assert store.access.authenticate(token).name == "ci"
    finally:
        cast("Any", client).execute_command("REPLICAOF", "NO", "ONE")
    assert store.access.list_keys()[0].last_used_ms is None


# --- attempts --------------------------------------------------------------------------------------------------------


def attempt(address: str = "192.0.2.1", about: str = "no such key", **fields: Any) -> AuditEntry:
    return AuditEntry(at_ms=0, kind="refused", action="GET /jobs", address=address, about=about, **fields)


def refuse(store: Store, source: str = "192.0.2.1", *, per_minute: int = 3) -> int:
    return store.access.refuse(source, attempt(source.split()[0]), per_minute=per_minute, log_size=LOG)


def test_an_address_has_so_many_attempts_in_a_minute(store: Store, clock: Clock) -> None:
    assert [refuse(store) for _ in range(5)] == [0, 0, 0, 20_000, 20_000]
    assert refuse(store, "192.0.2.2") == 0
    clock.advance(19.999)
    assert refuse(store) == 1
    clock.advance(0.001)
    assert [refuse(store) for _ in range(2)] == [0, 20_000]
    clock.advance(60)
    assert [refuse(store) for _ in range(4)] == [0, 0, 0, 20_000]


def test_attempts_beyond_are_counted_in_the_log_and_do_not_fill_it(store: Store, clock: Clock, client: redis.Redis) -> None:
    for _ in range(100):
        refuse(store)
    assert [entry.about for entry in store.access.audit()] == ["no such key"] * 3
    clock.advance(20)
    refuse(store)
    assert store.access.audit()[0].about == "no such key; 97 more attempts before this"
    for _ in range(5):
        refuse(store)
    clock.advance(61)
    refuse(store, "192.0.2.9")
    assert [(entry.address, entry.about) for entry in store.access.audit(limit=2)] == [
        ("192.0.2.9", "no such key"),
        ("192.0.2.1", "5 more attempts before this"),
    ]
    assert client.hlen("tp:attempts_beyond") == 0
    assert client.zcard("tp:attempts") == 1


def test_only_so_many_addresses_are_remembered(store: Store, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MOST_SOURCES", 20)
    for number in range(60):
        for _ in range(2):
            refuse(store, f"192.0.2.{number}", per_minute=1)
    assert client.zcard("tp:attempts") <= 20
    assert client.hlen("tp:attempts_beyond") <= 20
    # nothing was lost of what they did
    told = sum("1 more attempts" in entry.about for entry in store.access.audit(limit=1000))
    assert told + client.hlen("tp:attempts_beyond") == 60


# --- the audit log ---------------------------------------------------------------------------------------------------


def test_the_audit_log_tells_what_became_of_keys(store: Store, clock: Clock) -> None:
    key, token = make(store, "ci", "read", "submit")
    clock.advance(1)
    new, new_secret = rotate(store, overlap=timedelta(hours=1))
    clock.advance(1)
    revoke(store, new.id)
    entries = store.access.audit()
    assert [(one.kind, one.actor, one.action, one.key, one.key_id) for one in entries] == [
        ("keys", "ann", "key revoked", "ci", new.id),
        ("keys", "ann", "key rotated", "ci", new.id),
        ("keys", "ann", "key made", "ci", key.id),
    ]
    assert entries[1].about == "read submit"
    assert [one.at_ms for one in entries] == [clock.now_ms, clock.now_ms - 1000, clock.now_ms - 2000]
    assert token[17:] not in repr(entries)
    assert new_secret[17:] not in repr(entries)


def test_the_kinds_do_not_push_each_other_out(store: Store, clock: Clock, client: redis.Redis) -> None:
    make(store, "ci")
    store.access.record(AuditEntry(0, "admin", "POST /drain", 200, "ops", "a" * 12), log_size=100)
    for number in range(420):
        store.access.record(AuditEntry(0, "requests", f"POST /jobs/{number}", 201, "ci", "b" * 12), log_size=100)
    assert 100 <= client.xlen("tp:audit:requests") < 420
    entries = store.access.audit(limit=10_000)
    assert {"keys", "admin", "requests"} == {entry.kind for entry in entries}
    assert [entry.action for entry in store.access.audit(key="ops")] == ["POST /drain"]
    assert [entry.action for entry in store.access.audit(key="a" * 12)] == ["POST /drain"]


def test_a_long_log_is_read_to_its_end(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_PAGE", 10)
    for number in range(60):
        clock.advance(1)
        store.access.record(AuditEntry(0, "requests" if number % 3 else "admin", f"POST /{number}", 200), log_size=LOG)
    found = store.access.audit(limit=500)
    assert {entry.action for entry in found} == {f"POST /{number}" for number in range(60)}
    for kind in ("requests", "admin"):
        times = [entry.at_ms for entry in found if entry.kind == kind]
        assert times == sorted(times, reverse=True)
    assert len(store.access.audit(limit=7)) == 7


# --- the setting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["short-but-secret-0123456789abcde", "with-a-blank 0123456789abcdefgh-secret", "ä" * 40, "s3cret" * 50])
def test_a_bootstrap_key_that_is_none_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKPLATFORM_API_KEY", key[:31] if "short" in key else key)
    with pytest.raises(Exception, match="takes 32 to 256 characters") as caught:
        load_settings()
    assert str(caught.value).startswith("TASKPLATFORM_API_KEY (environment): takes 32 to 256")
    assert key[:20] not in repr(caught.value) + str(caught.value)
    (tmp_path / "taskplatform.yaml").write_text("api_key: [s3cret, list]\n")
    monkeypatch.delenv("TASKPLATFORM_API_KEY")
    with pytest.raises(Exception, match="api_key") as caught:
        load_settings()
    assert "s3cret" not in str(caught.value)


def test_the_bootstrap_key_is_in_no_text_of_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKPLATFORM_API_KEY", "k" * 32)
    loaded = load_settings()
    assert loaded.api_key is not None
    assert loaded.api_key.get_secret_value() == "k" * 32
    assert "kkk" not in f"{loaded!r} {loaded} {loaded.model_dump()} {loaded.model_dump_json()}"


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, server: EmbeddedServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs a command on the session's server and gives its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", server.url)
    settings.cache_clear()

    def invoke(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    yield invoke
    settings.cache_clear()


def test_the_commands(run: Callable[..., Any], server: EmbeddedServer) -> None:
    made = run("keys", "create", "ci", "--scope", "read", "--scope", "submit", "--expires", "90d")
    token = made.stdout.strip()
    store = Store.connect(server.url)
    key = store.access.authenticate(token)
    assert key.allows(Scope.SUBMIT)
    assert f"ci ({key.id}): read, submit; valid until " in made.stderr
    assert token not in made.stderr

    rotated = json.loads(run("keys", "rotate", "ci", "--overlap", "1h", "--json").stdout)
    assert store.access.authenticate(rotated.pop("token")).id == rotated["id"]
    assert rotated["scopes"] == ["read", "submit"]
    listed = json.loads(run("keys", "list", "--json").stdout)
    assert [(one["name"], one["id"], one["state"]) for one in listed] == [("ci", key.id, "live"), ("ci", rotated["id"], "live")]
    assert "digest" not in run("keys", "list", "--json").stdout
    header, first, _ = run("keys", "list").stdout.splitlines()
    assert first.split("\t")[:4] == ["ci", key.id, "read,submit", "live"]
    assert header.split("\t")[7] == "last used"

    assert run("keys", "revoke", key.id).stdout == "1 key revoked\n"
    assert run("keys", "revoke", key.id).stdout == f"{key.id} was not valid any more\n"
    assert run("keys", "revoke", "ci").stdout == "1 key revoked\n"
    lines = [line.split("\t") for line in run("audit", "--key", "ci").stdout.splitlines()[1:]]
    assert [line[3].split()[:3] for line in reversed(lines)] == [
        ["key", "made", "ci"],
        ["key", "rotated", "ci"],
        ["key", "revoked", "ci"],
        ["key", "revoked", "ci"],
    ]
    assert all(line[1] for line in lines), "who it was"
    assert len(json.loads(run("audit", "--last", "2", "--json").stdout)) == 2
    store.close()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("keys create ci", 2, "Missing option '--scope'"),
        ("keys create ci --scope write", 2, "'write' is not one of 'read', 'submit', 'admin'"),
        ("keys create ci --scope read --expires soon", 2, "'soon' is not a duration"),
        ("keys create ci --scope read --expires 0", 2, "must be longer than 0"),
        ("keys create bootstrap --scope read", 1, "TASKPLATFORM_API_KEY"),
        ("keys create a/b --scope read", 1, "key name 'a/b' is not accepted"),
        ("keys rotate nobody", 1, "error: no valid key 'nobody'"),
        ("keys revoke nobody", 1, "error: no key 'nobody'"),
    ],
)
def test_a_wrong_command_is_said(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], line: str, code: int, said: str) -> None:
    assert main(line.split()) == code
    assert said in capsys.readouterr().err
