"""Everything that reads what comes from outside: whatever it is, the answer is a value or the documented error, and it comes soon.

What one parser alone promises stands with its other tests: definitions, bulk files, messages, Retry-After, job values in calls.
"""

from __future__ import annotations

import base64
import io
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from taskplatform.bulk import read_subscriptions
from taskplatform.catalogue import check as check_catalogue
from taskplatform.errors import InvalidInput, SettingsError
from taskplatform.garbage import fault_in
from taskplatform.model import (
    Cron,
    Limit,
    RateLimit,
    check_definition_id,
    check_host,
    check_user_id,
    format_duration,
    parse_duration,
)
from taskplatform.settings import Settings, load_settings
from taskplatform.store.records import read_limit, read_packed, write_limit

#: What is near to something that is accepted finds more than any text.
NEAR = st.text(alphabet="0123456789.:/@%?#[]{}*,-+ dhmsTZ\t\n\0'\"\\aA_éٳ\ud800", max_size=60)
ANY = st.text(st.characters(), max_size=60) | NEAR
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=6,
)
#: Far more than any of these takes on a busy machine; a pattern that backtracks takes years.
SECONDS = 20.0


@contextmanager
def soon() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def either(parse: Callable[[Any], Any], value: object, *errors: type[Exception]) -> Any:
    """What it makes of the value; None where it refuses it as documented, in words."""
    try:
        return parse(value)
    except errors as fault:
        said = str(fault)
    assert said
    return None


@given(ANY | st.integers() | st.floats() | st.booleans() | st.none() | st.timedeltas())
@settings(deadline=None)
def test_durations(value: object) -> None:
    read = either(parse_duration, value, ValueError)
    if read is not None:
        assert timedelta() <= read <= timedelta(days=366)
        assert parse_duration(format_duration(read)) == read


@given(JSON)
@settings(deadline=None)
def test_rates(value: object) -> None:
    read = either(RateLimit.model_validate, value, ValidationError)
    if read is not None:
        assert 0 < read.per_second < float("inf")
        assert RateLimit.model_validate(read.model_dump()) == read


@given(ANY | st.from_regex(r"([0-9*/,-]{1,6} ){4}[0-9*/,L#-]{1,6}", fullmatch=True))
@settings(deadline=None)
def test_crons(text: str) -> None:
    read = either(Cron.model_validate, {"expression": text}, ValidationError) or either(Cron.model_validate, text, ValidationError)
    if read is not None:
        assert Cron.model_validate_json(read.model_dump_json()) == read


@pytest.mark.parametrize("check", [check_user_id, check_definition_id, check_host])
@given(value=ANY | JSON)
@settings(deadline=None)
def test_names(check: Callable[[object], str], value: object) -> None:
    read = either(check, value, InvalidInput)
    if read is not None:
        # what is accepted needs no escape in JSON, in a key of Redis or in a line of a log
        assert read == value
        assert read.isascii()
        assert read.isprintable()
        assert not set(read) & set(' "\\\n')
        assert check is check_host or ":" not in read


@given(st.builds(Limit, st.none() | st.floats(1e-6, 1e6), st.integers(1, 10**6), st.none() | st.integers(1, 10**6)))
def test_limits_survive_their_record(limit: Limit) -> None:
    read = read_limit(write_limit(limit))
    assert (read.per_second, read.concurrency) == (limit.per_second, limit.concurrency)
    assert read.burst == (None if limit.per_second is None else limit.burst)


@given(ANY)
def test_packed_records_are_five_words(text: str) -> None:
    """The scripts alone write them: what is none is a fault of ours, and a ValueError."""
    read = either(read_packed, text, ValueError)
    assert (read is not None) == (text.count(" ") == 4)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


_URL_PIECES = st.sampled_from(
    [
        *("redis://", "rediss://", "unix://", "REDISS://", "redis:", "//", "u:p@", ":p%40@", "@", "host", "[::1]", "[", "]", ":6379", ":"),
        *("/0", "/", "?", "&", "ssl_cert_reqs=none", "SSL_CERT_REQS=none", "ssl_check_hostname=false", "%73sl=1", "db=3", "#", "%", "%2F"),
        *("socket%3A%2F%2F", "\n", "é", "credential_provider=os.system", "credential%5Fprovider=x", "x=1"),
    ]
)


#: Most of what is put together at random is refused.
_NEARLY_GOOD = st.tuples(
    st.sampled_from(["rediss://", "redis://"]),
    st.sampled_from(["", "u:p@", ":p%40%2F@", "u@"]),
    st.sampled_from(["host", "[::1]", "127.0.0.1"]),
    st.sampled_from(["", ":6379", "/", "/3", ":1/2"]),
    st.just("") | st.lists(_URL_PIECES | ANY, max_size=2).map("".join),
).map("".join)


@given(_NEARLY_GOOD | st.lists(_URL_PIECES | ANY, max_size=8).map("".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_urls_of_redis(folder: Path, url: str) -> None:
    read = either(lambda given: load_settings(redis_url=given), url, SettingsError)
    if read is None:
        return
    bare, login = read.redis_address
    assert "@" not in bare.partition("?")[0] or url.startswith("unix:")
    assert set(login) <= {"username", "password"}
    if url.lower().startswith("rediss"):
        assert read.redis_tls["ssl_check_hostname"] is True
        assert read.redis_tls["ssl_cert_reqs"].name == "CERT_REQUIRED"
        # nothing in the URL speaks against it
        assert "?" not in url
        assert read.broker_url.count("ssl_cert_reqs=required") == 1
    else:
        assert read.redis_tls == {}
        assert "ssl" not in read.broker_url.partition("?")[2].lower()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("ssl_cert_reqs=none", "takes no options"),
        ("ssl_cert_reqs=required", "takes no options"),
        ("ssl_check_hostname=false", "takes no options"),
        ("ssl_ca_certs=/tmp/ca.pem", "redis_ca"),
        ("socket_timeout=1", "takes no options"),
    ],
)
def test_a_rediss_url_has_no_options(folder: Path, query: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        load_settings(redis_url=f"rediss://:pass-4711@host/0?{query}")
    assert "4711" not in str(error.value)
    assert "always verified" in str(error.value)


@pytest.mark.parametrize("query", ["ssl_cert_reqs=none", "%73sl_cert_reqs=none", "db=3", "credential_provider=os.system", "a=1&ssl=x"])
def test_a_redis_url_has_no_option_that_store_and_broker_read_differently(folder: Path, query: str) -> None:
    with pytest.raises(SettingsError, match=r"the option \w+ is not accepted: TLS is asked for by rediss:// alone"):
        load_settings(redis_url=f"redis://host/0?{query}")


def test_files_for_tls(folder: Path) -> None:
    Path("text.pem").write_text("SECRET-4711, and no PEM")
    tls = {"redis_url": "rediss://host"}
    for given_, said in (
        ({"redis_ca": "nowhere.pem"}, "redis_ca nowhere.pem cannot be read: No such file or directory"),
        ({"redis_ca": "text.pem"}, "redis_ca text.pem cannot be used: no certificate or crl found"),
        ({"redis_ca": str(folder)}, "redis_ca .* cannot be"),
        ({"redis_cert": "text.pem"}, "redis_cert and redis_key are given together"),
        ({"redis_cert": "text.pem", "redis_key": "text.pem"}, "redis_cert text.pem, redis_key text.pem cannot be used"),
        ({"redis_url": "redis://host", "redis_ca": "text.pem"}, "redis_ca given, but redis_url does not ask for TLS"),
    ):
        with pytest.raises(SettingsError, match=said) as error:
            load_settings(**{**tls, **given_})
        assert "4711" not in str(error.value)


@pytest.mark.parametrize("login", ["ops", "ops:", ":password", "ops:short", "öps:password-1", "ops:pass\nword-1"])
def test_a_login_of_flower_that_is_none_is_told_and_not_shown(folder: Path, login: str) -> None:
    with pytest.raises(SettingsError, match=r"flower_login .*takes user:password") as error:
        load_settings(flower_login=login)
    assert login not in str(error.value).replace("takes user:password", "")


def test_secrets_are_in_no_representation(folder: Path) -> None:
    read = load_settings(redis_url="rediss://u:p%2Fw-4711@host:1/2", flower_login="ops:pass:4712")
    assert {"p/w-4711", "pass:4712"} <= set(read.secrets)
    short = Settings(redis_url="redis://:redis@localhost:6379/0")
    assert "redis" not in short.secrets, "it would be cut out of every line that names Redis"
    assert read.redis_address == ("rediss://host:1/2", {"username": "u", "password": "p/w-4711"})
    for text in (repr(read), str(read)):
        assert "471" not in text


@given(
    st.binary(max_size=80)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), JSON, max_size=3).map(lambda value: json.dumps(value).encode())
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_yaml_of_settings(folder: Path, content: bytes) -> None:
    (folder / "taskplatform.yaml").write_bytes(content)
    either(lambda _: load_settings(), None, SettingsError)


# --- what is made to take long ---------------------------------------------------------------------------------------

_LONG = 50_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "1" * _LONG,
        "1" * _LONG + "s",
        "1d" * _LONG,
        "9" * 400 + "/s",
        "1" * _LONG + "/s",
        "0." * _LONG,
        "a" * _LONG + "!",
        "[" + ":" * _LONG,
        "a." * _LONG,
        " " * _LONG + "x",
        "*/" * _LONG,
        ",".join("0" * 10_000),
        "0-59/1," * 10_000 + "0 * * * *",
    ],
    ids=range(13),
)
def test_long_texts(text: str) -> None:
    with soon():
        either(parse_duration, text, ValueError)
        either(RateLimit.model_validate, text, ValidationError)
        either(RateLimit.model_validate, {"rate": text, "burst": text[:4000]}, ValidationError)
        either(Cron.model_validate, {"expression": text}, ValidationError)
        for check in (check_user_id, check_definition_id, check_host):
            either(check, text, InvalidInput)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        BOMB + "tasks: *n\n",
        BOMB + "host_limits: *n\n",
        BOMB + "host_limits: {a: *n}\nworker_slots: *n\n",
        "host_limits: &x {a: *x}\n",
        "&x [*x]\n",
        "[" * 50_000,
        "{a: " * 50_000,
        "- " * 50_000,
        "worker_slots: " + "9" * 100_000 + "\n",
        "worker_slots: !!python/object/apply:os.system [exit]\n",
        "? " * 20_000,
        "a: " + "&a " * 5_000,
        "worker_slots: *a\n",
        "host_limits: {" + ",".join(f"a{number}: {{rate: x, brst: 1}}" for number in range(2_000)) + "}\n",
        "".join(f"A{number}: 1\n" for number in range(201)),
        "a: b\n" * 201,
        "x" * 5_000_000,
    ],
    ids=range(18),
)
def test_yaml_that_is_made_to_harm(folder: Path, content: str) -> None:
    path = folder / "taskplatform.yaml"
    path.write_text(content)
    with soon():
        with pytest.raises(SettingsError) as error:
            load_settings()
        assert len(str(error.value)) < 10_000
        assert len(str(error.value).splitlines()) <= 51
    path.unlink()
    definitions = folder / "tasks"
    definitions.mkdir()
    (definitions / "bad.yaml").write_text(content)
    with soon():
        _, faults = check_catalogue([definitions])
        assert faults
        assert sum(len(str(fault)) for fault in faults) < 40_000


@pytest.mark.parametrize(
    "line",
    [
        b'{"user":' * 20_000,
        b"[" * 60_000,
        b'{"user": "u", "definition": "d", "params": {"a": ' + b"9" * 50_000 + b"}}",
        b'"' * 65_000,
        b"," * 65_000,
    ],
    ids=range(5),
)
@pytest.mark.parametrize("header", [b"", b"user,definition,params\n"])
def test_lines_of_an_import(line: bytes, header: bytes) -> None:
    for format_ in ("csv", "jsonl"):
        with soon():
            read = list(read_subscriptions(io.BytesIO(header + line + b"\n"), format=format_))
        # a row of CSV whose fields are all empty counts as an empty line
        assert read or (header and format_ == "csv" and not line.strip(b","))


@pytest.mark.parametrize(
    ("size", "said"), [(16 * 2**20, None), (16 * 2**20 + 1, "unpacks to more than 16 MB"), (10**8, "unpacks to more than 16 MB")]
)
def test_a_message_that_unpacks_to_very_much_is_refused(size: int, said: str | None) -> None:
    """And not unpacked: a few kilobytes would take the memory of the worker."""
    packer = zlib.compressobj(level=1)
    rest = size - len(b"[[],{},{}]")
    body = packer.compress(b"[[") + b"".join(packer.compress(b" " * min(2**20, rest - done)) for done in range(0, rest, 2**20))
    body += packer.compress(b"],{},{}]") + packer.flush()
    message = {
        "headers": {"task": "taskplatform.sweep", "id": "1", "compression": "application/x-gzip"},
        "properties": {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": "high"}, "body_encoding": "base64"},
        "content-type": "application/json",
        "body": base64.b64encode(body).decode(),
    }
    text = json.dumps(message)
    tracemalloc.start()
    try:
        with soon():
            fault = fault_in(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (fault is None) if said is None else (said in str(fault))
    assert most < 64 * 2**20
