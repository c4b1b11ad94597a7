"""The URL of a Redis that Sentinels look after, as the setting redis_url takes it.

    sentinel://user:password@host1:26379,host2:26379,host3:26379/0?master=NAME

User, password and database are those of the Redis servers. `sentinels://` is the same with TLS, to the Sentinels and to the servers.
Where the Sentinels ask for a login of their own, `sentinel_user` and `sentinel_password` follow behind the name of the master. Redis-py,
kombu and redbeat each have a form of their own for this; what they are told is made of it here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

DEFAULT_PORT = 26_379
#: One more than this would be a mistake.
_MOST_SENTINELS = 16
#: Sentinels answer at once or are away; the next one is asked then.
_ASK_SECONDS = 2.0
_FORM = "sentinel://user:password@host1:26379,host2:26379,host3:26379/0?master=NAME, and sentinels:// with TLS"
_URL = re.compile(
    r"(?P<scheme>sentinels?)://((?P<login>[^@/?#]*)@)?(?P<hosts>[^@/?#]*)(/(?P<database>\d{0,4}))?(\?(?P<query>[^#]*))?", re.ASCII
)
_HOST = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?", re.ASCII)
#: As Sentinel's configuration has it.
_MASTER = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_OPTIONS = ("master", "sentinel_user", "sentinel_password")


@dataclass(frozen=True, kw_only=True)
class SentinelUrl:
    """What such a URL says. Passwords are in no representation."""

    sentinels: tuple[tuple[str, int], ...]
    """Hosts and ports; IPv6 addresses without brackets."""
    master: str
    """The name under which the Sentinels know the servers."""
    database: int
    tls: bool
    login: Mapping[str, str] = field(repr=False)
    """`username` and `password` at the servers, where they are given."""
    sentinel_login: Mapping[str, str] = field(repr=False)
    """The same at the Sentinels."""

    @staticmethod
    def is_one(url: str) -> bool:
        """Whether it is meant as such a URL."""
        return url.startswith(("sentinel:", "sentinels:"))

    @classmethod
    def parse(cls, url: str) -> SentinelUrl:
        """Raises ValueError, with what is accepted and nothing of the URL but names of options."""
        found = _URL.fullmatch(url)
        if found is None:
            raise ValueError(f"takes {_FORM}; / ? # @ , in a password are %2F %3F %23 %40 %2C")
        options = _options(found["query"] or "")
        if not _MASTER.fullmatch(options.get("master", "")):
            raise ValueError(f"a sentinel:// URL says which servers are meant, by the name of the Sentinels' configuration: {_FORM}")
        user, _, password = (found["login"] or "").partition(":")
        return cls(
            sentinels=_sentinels(found["hosts"]),
            master=options["master"],
            database=int(found["database"] or 0),
            tls=found["scheme"] == "sentinels",
            login=_login(unquote(user), unquote(password)),
            sentinel_login=_login(options.get("sentinel_user", ""), options.get("sentinel_password", "")),
        )

    def asking(self, tls: Mapping[str, Any]) -> dict[str, Any]:
        """What redis-py is told of a connection to a Sentinel; `tls` as for the servers."""
        secure = {"ssl": True, **tls} if self.tls else {}
        return {"socket_timeout": _ASK_SECONDS, "socket_connect_timeout": _ASK_SECONDS, **self.sentinel_login, **secure}

    @property
    def for_kombu(self) -> str:
        """One URL for each Sentinel; what else it must know are its transport's options."""
        user, password = (quote(self.login.get(name, ""), safe="") for name in ("username", "password"))
        login = f"{user}:{password}@" if self.login else ""
        return ";".join(f"sentinel://{login}{_address(host, port)}/{self.database}" for host, port in self.sentinels)

    @property
    def shown(self) -> str:
        """For people, without logins."""
        hosts = ",".join(_address(host, port) for host, port in self.sentinels)
        return f"sentinel{'s' if self.tls else ''}://{hosts}/{self.database}?master={self.master}"


def _sentinels(text: str) -> tuple[tuple[str, int], ...]:
    found = [_HOST.fullmatch(one) for one in text.split(",")]
    places = [(one["host"].strip("[]"), int(one["port"] or DEFAULT_PORT)) for one in found if one is not None]
    if len(places) != len(found) or not all(0 < port < 65_536 for _, port in places) or len(places) > _MOST_SENTINELS:
        raise ValueError(f"names the Sentinels by host:port with commas between them, {_MOST_SENTINELS} at the most: {_FORM}")
    if len(set(places)) != len(places):
        raise ValueError("names a Sentinel twice")
    return tuple(places)


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in _OPTIONS or name in options:
            # what stands there may be a part of a password
            raise ValueError(f"a sentinel:// URL takes the options {', '.join(_OPTIONS)}, each once: {_FORM}")
        options[name] = unquote(value)
    return options


def _login(user: str, password: str) -> dict[str, str]:
    return {name: value for name, value in (("username", user), ("password", password)) if value}


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
