"""redis_url with Sentinels: what is taken, what each client is told of it, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from kombu import Connection

from taskplatform.errors import SettingsError
from taskplatform.sentinel import SentinelUrl
from taskplatform.settings import load_settings, shown_url

SECRET, OTHER = "hush-4711", "hush&=+%-4712"
URL = f"sentinel://plat%40form:{SECRET}%3B%2C@s1.example.com,[::1]:26380,10.0.0.3:1/3?master=jobs.one&sentinel_user=w&sentinel_password=hush%26%3D+%25-4712"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_it_says_is_read() -> None:
    url = SentinelUrl.parse(URL)
    assert url.sentinels == (("s1.example.com", 26379), ("::1", 26380), ("10.0.0.3", 1))
    assert (url.master, url.database, url.tls) == ("jobs.one", 3, False)
    assert url.login == {"username": "plat@form", "password": f"{SECRET};,"}
    assert url.sentinel_login == {"username": "w", "password": OTHER}
    assert url.asking({}).items() >= url.sentinel_login.items()
    least = SentinelUrl.parse("sentinels://s1?master=jobs")
    assert (least.sentinels, least.database, least.tls, least.login, least.sentinel_login) == ((("s1", 26379),), 0, True, {}, {})
    assert least.asking({"ssl_check_hostname": True}).items() >= {"ssl": True, "ssl_check_hostname": True}.items()


def test_nothing_shows_a_login() -> None:
    read = load_settings(redis_url=URL)
    assert {f"{SECRET};,", OTHER} <= set(read.secrets)
    shown = [shown_url(URL), read.redis_address[0], repr(SentinelUrl.parse(URL)), repr(read), str(read)]
    shown.append(Connection(read.broker_url).as_uri())
    for text in shown:
        assert "4711" not in text
        assert "4712" not in text
        assert "plat" not in text.partition("?")[0] or text == shown[-1] or "taskplatform" in text
    assert shown[0] == "sentinel://s1.example.com:26379,[::1]:26380,10.0.0.3:1/3?master=jobs.one"


def test_kombu_knows_all_sentinels_and_the_database() -> None:
    read = load_settings(redis_url=URL)
    connection = Connection(read.broker_url)
    assert len(connection.alt) == 3
    for url, (host, port) in zip(connection.alt, SentinelUrl.parse(URL).sentinels, strict=True):
        connection.switch(url)
        assert (connection.hostname, connection.port, connection.virtual_host) == (host, port, "3")
        assert (connection.userid, connection.password) == ("plat@form", f"{SECRET};,")
        assert connection.transport_cls == "sentinel"


def test_with_tls_all_are_verified() -> None:
    read = load_settings(redis_url="sentinels://s1?master=jobs")
    assert read.redis_tls["ssl_check_hostname"] is True
    assert read.redis_tls["ssl_cert_reqs"].name == "CERT_REQUIRED"
    assert load_settings(redis_url=URL).redis_tls == {}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"sentinel://u:{SECRET}@s1,s2/0", "by the name of the Sentinels' configuration"),
        (f"sentinel://u:{SECRET}@s1,s2/0?master=", "by the name of the Sentinels' configuration"),
        (f"sentinel://u:{SECRET}@s1,s2/0?master=two words", "by the name of the Sentinels' configuration"),
        (f"sentinel://u:{SECRET}@s1/0?master=jobs&master=others", "takes the options master, sentinel_user, sentinel_password, each once"),
        (f"sentinel://u:{SECRET}@s1/0?master=jobs&ssl_cert_reqs=none", "takes the options master"),
        (f"sentinel://u:{SECRET}@s1/0?master=jobs&{SECRET}", "takes the options master"),
        (f"sentinel://u:{SECRET}@/0?master=jobs", "names the Sentinels by host:port"),
        (f"sentinel://u:{SECRET}@s1,,s2/0?master=jobs", "names the Sentinels by host:port"),
        (f"sentinel://u:{SECRET}@s1:0/0?master=jobs", "names the Sentinels by host:port"),
        (f"sentinel://u:{SECRET}@s1:99999/0?master=jobs", "names the Sentinels by host:port"),
        (f"sentinel://u:{SECRET}@{','.join(f's{n}' for n in range(17))}?master=jobs", "16 at the most"),
        (f"sentinel://u:{SECRET}@s1,s1:26379/0?master=jobs", "names a Sentinel twice"),
        (f"sentinel://u:{SECRET}@s1/zero?master=jobs", "takes sentinel://"),
        (f"sentinel://u:{SECRET}@h@s1/0?master=jobs", "takes sentinel://"),
        (f"sentinel:u:{SECRET}@s1", "takes sentinel://"),
        (f"sentinel://u:{SECRET}@s1/0?master=jobs#x", "takes sentinel://"),
        (f"sentinel+tls://u:{SECRET}@s1/0?master=jobs", "takes a redis:// or rediss:// URL .*sentinel://host1:26379,host2:26379/0"),
    ],
)
def test_what_is_none_is_told_without_its_secrets(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", url)
    with pytest.raises(SettingsError, match=rf"TASKPLATFORM_REDIS_URL \(environment\): .*{said}") as error:
        load_settings()
    assert "4711" not in str(error.value)
