"""The platform's settings, and the only module that reads the environment.

Sources, the first that has a value wins: environment variables `TASKPLATFORM_*`, the file `.env`, a YAML file (named by
`TASKPLATFORM_CONFIG` in one of the former, default `taskplatform.yaml` where it exists), the defaults below.

Every source gives text, read by the same rules: `010` is ten and `on` a word, in YAML too. An empty value, in YAML also
`null` and `~`, counts as not given. A source replaces a setting as a whole.

A name that is not a setting, or a value that a setting does not take, raises SettingsError with one line for each: where it
stands, what it is (but for what may hold a password) and what is accepted.
"""

from __future__ import annotations

import io
import os
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import yaml
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from taskplatform.addresses import TARGET_RULE, Target
from taskplatform.errors import SettingsError
from taskplatform.faults import did_you_mean, explain
from taskplatform.model import BreakerRule, Duration, Host, Limit, LimitRule, PositiveDuration, RateLimit, format_duration
from taskplatform.sentinel import SentinelUrl

PREFIX = "TASKPLATFORM_"
ENV_FILE = ".env"

_EMPTY = ("", "null", "~")
_NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)
_HIDDEN = (("redis_url",), ("flower_login",), ("api_key",), ("url",), ("key",))
_URL_RULE = (
    "takes a redis:// or rediss:// URL such as redis://host:6379/0, a unix:// one, or sentinel://host1:26379,host2:26379/0?master=NAME; "
    "/ ? # @ in a password are %2F %3F %23 %40"
)
#: In the URL of a connection without TLS. Kombu would take the first for TLS that verifies nothing, the second for a class to
#: import, and the others not at all, so that store and broker were not in one database.
_NO_URL_OPTION = re.compile(r"ssl.*|credential_provider|db|virtual_host", re.IGNORECASE)
#: The reader takes some 10 µs for each byte.
_MOST_YAML_BYTES = 256 * 1024
#: More is no file of settings, and its faults could not be read.
_MOST_YAML_NAMES = 200
_MOST_FAULTS = 50
_LINK = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?(/[A-Za-z0-9._~/-]*)?", re.ASCII)
_TLS_FILES = ("redis_ca", "redis_cert", "redis_key")
_WITH_TLS = ("rediss:", "sentinels:")

_Target = Annotated[Target, PlainValidator(Target.parse), WithJsonSchema({"type": "string", "description": TARGET_RULE})]

#: What a worker takes at most to give back what it could not finish, and to end, after its grace.
STOP_MARGIN = timedelta(seconds=10)


class Settings(BaseSettings):
    """Every setting. Durations are written as "90s" or "10m", or as a number of seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    config: Path = Field(default=Path("taskplatform.yaml"), description="optional YAML file with settings")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", repr=False, description="one Redis or Valkey for store, broker and beat lock"
    )
    redis_ca: Path | None = Field(
        default=None, description="PEM file of the CAs that may sign the certificate of a rediss:// server, beside those of the system"
    )
    redis_cert: Path | None = Field(default=None, description="PEM file of a client certificate for Redis, with its chain")
    redis_key: Path | None = Field(default=None, description="PEM file of its key, not encrypted")
    namespace: str = Field(
        default="tp",
        pattern=r"^[a-z][a-z0-9_-]{0,15}$",
        description="first part of every key of the store: 1 to 16 characters a-z, 0-9, _ and -, the first a letter",
    )
    tasks_dir: Path = Field(default=Path("tasks"), description="folder of the definition files")

    url: str | None = Field(
        default=None, repr=False, description="of a control API, over which the command line works instead of Redis: docs/cli.md"
    )
    key: SecretStr | None = Field(default=None, description="the key that the command line shows to that API")
    key_file: Path | None = Field(default=None, description="file that holds this key, instead of it")
    ca: Path | None = Field(default=None, description="PEM file of the CAs that may sign that API's certificate, instead of the usual ones")
    client_cert: Path | None = Field(default=None, description="PEM file of a client certificate for that API, with its chain")
    client_key: Path | None = Field(default=None, description="PEM file of its key, where that is another file; not encrypted")

    plan_horizon: PositiveDuration = Field(
        default=timedelta(seconds=5), description="how far ahead jobs are made; changes to subscriptions take effect after it"
    )
    plan_batch: int = Field(default=250, ge=1, le=5000, description="subscribers read by one run of the plan script")
    beat_interval: PositiveDuration = Field(default=timedelta(seconds=1), description="longest sleep of beat between two ticks")
    beat_lock_timeout: PositiveDuration = Field(
        default=timedelta(seconds=15), description="a standby leads this long after the leader died"
    )

    worker_slots: int = Field(default=3, ge=1, le=1000, description="jobs that one worker runs at a time (Celery's concurrency)")
    queue_buffer: float = Field(default=1.0, ge=0, le=100, description="released jobs that may wait in the broker, per worker slot")
    heartbeat_interval: PositiveDuration = Field(default=timedelta(seconds=3), description="how often a worker says that it lives")
    heartbeat_timeout: PositiveDuration = Field(default=timedelta(seconds=15), description="a worker that was silent this long is lost")
    max_losses: int = Field(default=3, ge=1, le=100, description="a job whose worker was lost this often fails as a poison pill")
    stop_grace: PositiveDuration = Field(
        default=timedelta(seconds=20),
        description="a worker that is asked to stop lets its jobs go on so long; whoever stops it must give it 10 s more",
    )
    retention: PositiveDuration = Field(default=timedelta(days=3), description="other finished jobs and their histories are kept this long")
    dead_retention: PositiveDuration = Field(
        default=timedelta(days=14), description="jobs that failed for good (dead letters) and their histories are kept this long"
    )
    dead_max: int = Field(default=100_000, ge=1, description="dead letters that are kept; the oldest go first")
    change_log_size: int = Field(default=100_000, ge=100, description="entries of the change log that are kept")

    rate_limit: RateLimit | None = Field(
        default=None, description="all jobs over all workers; for example 10/s, or {rate: 10/s, burst: 15}"
    )
    host_limits: dict[Host, LimitRule] = Field(
        default_factory=dict, description="by host that is called; for example {api.example.com: {rate: 5/s, burst: 10, concurrency: 4}}"
    )
    user_concurrency: int | None = Field(default=None, ge=1, le=1_000_000, description="jobs of one user that may run at a time")
    fairness: bool = Field(default=False, description="users take turns inside a priority, else first come is first served")
    lower_share: float = Field(
        default=0.0, ge=0, le=0.3, description="part of all releases that each lower priority gets at least while it waits; 0.05 is 5 %"
    )

    http_connect_timeout: PositiveDuration = Field(default=timedelta(seconds=10), description="for DNS, TCP and TLS of one call")
    http_max_response: int = Field(default=65_536, ge=1024, description="bytes of an answer that are read")
    http_excerpt: int = Field(default=200, ge=0, le=4096, description="characters of an answer that the history keeps")
    http_max_retry_after: PositiveDuration = Field(
        default=timedelta(hours=1), description="a longer Retry-After of a target counts as this long"
    )
    http_max_hold: Duration = Field(
        default=timedelta(minutes=5), description="for so long at the most it also holds back the host's other jobs; 0s: not at all"
    )
    http_allow: Annotated[tuple[_Target, ...], PlainSerializer(lambda targets: ",".join(map(str, targets)))] = Field(
        default=(), description="hosts, addresses and networks that calls may go to beside the public internet; separated by commas"
    )

    breaker_share: float = Field(
        default=0.5, gt=0, le=1, description="the breaker of a host opens when this part of its calls in breaker_window failed"
    )
    breaker_calls: int = Field(default=20, ge=0, le=1_000_000, description="and there were at least so many; 0: no host has a breaker")
    breaker_window: PositiveDuration = Field(default=timedelta(seconds=60), description="calls are counted over half of this to all of it")
    breaker_pause: PositiveDuration = Field(
        default=timedelta(seconds=30),
        description="how long a host is held back at first; after each failed probe twice as long, up to 16 times",
    )

    api_host: str = Field(default="127.0.0.1", min_length=1, description="address on which `taskplatform api` listens")
    api_port: int = Field(default=8443, ge=0, le=65_535, description="its port; 0 is any that is free")
    api_tls_cert: Path | None = Field(default=None, description="PEM file with its certificate, and those between it and the CA")
    api_tls_key: Path | None = Field(default=None, description="PEM file with the key of its certificate")
    api_tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the CAs of client certificates; with it, each client needs one"
    )
    api_insecure_http: bool = Field(
        default=False,
        description="plain HTTP on any address, for where something else before it does TLS; keys and data can be read on the way",
    )
    api_max_body: int = Field(default=1_048_576, ge=1024, le=104_857_600, description="bytes of a request's body that are taken")
    api_timeout: PositiveDuration = Field(
        default=timedelta(seconds=30), description="a request has to arrive within this, and as long again to be answered"
    )
    idempotency_retention: PositiveDuration = Field(
        default=timedelta(days=1), description="answers to API calls with an Idempotency-Key are kept this long"
    )

    dashboard_session: PositiveDuration = Field(
        default=timedelta(hours=12), description="who signs in to the dashboard stays so for this long"
    )
    dashboard_url: str | None = Field(
        default=None, description="where people reach the dashboard, such as https://ops.example.com/ui/; Flower links to it"
    )
    flower_url: str | None = Field(
        default=None, description="where people reach Flower, such as https://flower.example.com; the dashboard links to it"
    )

    ops_host: str = Field(default="127.0.0.1", description="address where each process serves /health, /ready and /metrics; 0.0.0.0: all")
    ops_port: str = Field(
        default="0",
        description="port of these; a range such as 8092-8099, of which each process takes the first that is free; 0: they are not served",
    )
    ops_patience: PositiveDuration = Field(
        default=timedelta(seconds=60),
        description="/health fails when a loop of the process stands still for so long; 30 s may pass while Redis does not answer",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO",
        description="processes log from this level on; `celery -l` goes before it, and `taskplatform log-level` changes it live",
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="json: an object a line; console: lines for people; auto: console on a terminal, else json"
    )
    flower_max_tasks: int = Field(default=10_000, ge=100, description="tasks that Flower keeps in memory")
    flower_login: str | None = Field(
        default=None, repr=False, description="user:password of Flower's pages; without it Flower listens on loopback addresses only"
    )
    flower_read_only: bool = Field(default=True, description="Flower shows and changes nothing; its HTTP API is closed")

    data_dir: Path = Field(default=Path(".taskplatform"), description="where `taskplatform up` keeps its server's data")

    api_key: SecretStr | None = Field(
        default=None, repr=False, description="an API key that may do everything, for the beginning: 32 to 256 characters ! to ~ of ASCII"
    )
    api_wrong_keys: int = Field(
        default=10, ge=1, le=60_000, description="wrong API keys that one address may show in a minute; then it is answered 429"
    )
    audit_size: int = Field(default=100_000, ge=100, description="entries of the audit log that are kept, of each kind")

    verify_definitions: bool = Field(
        default=True, description="beat and workers have the definitions that `taskplatform verify` runs; alike for all processes"
    )
    verify_target: str | None = Field(
        default=None,
        pattern=r"^https?://[A-Za-z0-9.\[\]:-]+$",
        description="URL, without a path, under which workers reach the target that `taskplatform verify` opens; http_allow must allow it",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str) and annotation is timedelta and _NUMBER.fullmatch(value.strip()):
            return float(value)
        # pydantic would read true as the number 1
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("rate_limit", "host_limits", mode="before")
    @classmethod
    def _from_flow(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str) or not value.lstrip().startswith("{"):
            return value
        try:
            loader = _Loader(value)
            return loader.construct_document(loader.get_single_node())
        except (yaml.YAMLError, RecursionError):
            takes = {"rate_limit": '10/s or {"rate": "10/s", "burst": 15}', "host_limits": '{"api.example.com": {"rate": "10/s"}}'}
            raise ValueError(f"{value[:80]!r} cannot be read; it takes {takes[info.field_name or '']}") from None

    @field_validator("http_allow", mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        return [entry for entry in value.split(",") if entry.strip()] if isinstance(value, str) else value

    @field_validator("ops_port")
    @classmethod
    def _check_ops_port(cls, text: str) -> str:
        first, dash, last = text.replace(" ", "").partition("-")
        numbers = [int(part) for part in (first, last if dash else first) if re.fullmatch(r"[0-9]{1,5}", part)]
        good = len(numbers) == 2 and numbers[0] <= numbers[1] <= 65535 and (numbers[0] > 0 or not dash) and numbers[1] - numbers[0] < 1000
        if not good:
            raise ValueError(f"got {text!r}; it takes a port, a range of at most 1000 such as 8092-8099, or 0 for none")
        return text

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str) -> str:
        if SentinelUrl.is_one(url):
            SentinelUrl.parse(url)
            return url
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
            options = parse_qsl(parts.query, keep_blank_values=True, max_num_fields=20)
        except ValueError:
            # its text would quote a part of the URL
            raise ValueError(_URL_RULE) from None
        if parts.scheme in ("redis", "rediss"):
            # redis-py and kombu unquote a host, and kombu takes one with :// in it for another URL
            good = bool(host and "%" not in host and re.fullmatch(r"/?\d*", parts.path, re.ASCII))
        else:
            good = parts.scheme == "unix" and bool(parts.path)
        # not RedisS:// either, which each of its readers would take for something else
        if not good or not url.startswith(f"{parts.scheme}://") or any(ord(character) < 0x21 for character in url):
            raise ValueError(_URL_RULE)
        if parts.scheme == "rediss" and options:
            raise ValueError(
                "a rediss:// URL takes no options behind a question mark: certificate and host name are always verified, and the settings "
                "redis_ca, redis_cert and redis_key say with what"
            )
        for name, _ in options:
            if _NO_URL_OPTION.fullmatch(name):
                raise ValueError(
                    f"the option {name} is not accepted: TLS is asked for by rediss:// alone, the database is the number behind the host"
                )
        return url

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not re.fullmatch(r"[!-~]{32,256}", key.get_secret_value()):
            raise ValueError("takes 32 to 256 characters ! to ~ of ASCII, without spaces, such as `openssl rand -hex 32` gives")
        return key

    @field_validator("flower_login")
    @classmethod
    def _check_flower_login(cls, login: str | None) -> str | None:
        user, colon, password = (login or "").partition(":")
        # Flower compares text that is ASCII only
        if login is not None and not (user and colon and len(password) >= 8 and login.isascii() and login.isprintable()):
            raise ValueError("takes user:password in ASCII characters, and a password of 8 characters or more")
        return login

    @field_validator("dashboard_url", "flower_url")
    @classmethod
    def _check_link(cls, url: str | None) -> str | None:
        # it becomes a link: javascript: would run in the page, and a password would stand in it, and in this message, for all to read
        if url is not None and not _LINK.fullmatch(url):
            raise ValueError("takes an http:// or https:// URL without user, password, query and fragment")
        return None if url is None else url.rstrip("/")

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        given = [name for name in _TLS_FILES if getattr(self, name) is not None]
        if given and not self.redis_url.startswith(_WITH_TLS):
            raise ValueError(
                f"{' and '.join(given)} given, but redis_url does not ask for TLS; with TLS it begins with rediss:// or sentinels://"
            )
        if (self.redis_cert is None) != (self.redis_key is None):
            raise ValueError("redis_cert and redis_key are given together or not at all")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.redis_ca is not None:
            _load("redis_ca", self.redis_ca, lambda: context.load_verify_locations(cafile=self.redis_ca))
        if self.redis_cert is not None and self.redis_key is not None:
            files, key = f"{self.redis_cert}, redis_key {self.redis_key}", self.redis_key
            # without a password OpenSSL would ask the terminal for one
            _load("redis_cert", files, lambda: context.load_cert_chain(str(self.redis_cert), key, password=""))
        return self

    @model_validator(mode="after")
    def _check_times(self) -> Settings:
        faults = []
        for longer, times, shorter in (("heartbeat_timeout", 2, "heartbeat_interval"), ("beat_lock_timeout", 3, "beat_interval")):
            long, short = getattr(self, longer), getattr(self, shorter)
            if long < times * short:
                given = f"{longer} is {format_duration(long)} and {shorter} {format_duration(short)}"
                faults.append(f"{given}; {longer} takes at least {times} times {shorter}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def breaker(self) -> BreakerRule:
        """When the breaker of a host opens."""
        return BreakerRule(self.breaker_share, self.breaker_calls, self.breaker_window, self.breaker_pause)

    @property
    def redis_tls(self) -> dict[str, Any]:
        """What redis-py, and so kombu, redbeat and Flower, are told of TLS: always the same. Nothing where there is none."""
        if not self.redis_url.startswith(_WITH_TLS):
            return {}
        files = {"ssl_ca_certs": self.redis_ca, "ssl_certfile": self.redis_cert, "ssl_keyfile": self.redis_key}
        return {
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_check_hostname": True,
            **{name: str(path) for name, path in files.items() if path is not None},
        }

    @property
    def broker_url(self) -> str:
        """The URL for kombu, which verifies nothing where a rediss:// URL is all that it is given; with Sentinel one for each."""
        if self.sentinel is not None:
            return self.sentinel.for_kombu
        tls = self.redis_tls
        if not tls:
            return self.redis_url
        asked = {**tls, "ssl_cert_reqs": "required", "ssl_check_hostname": "true"}
        return f"{self.redis_url.partition('#')[0]}?{urlencode(asked)}"

    @property
    def sentinel(self) -> SentinelUrl | None:
        """What redis_url says of Sentinels, if it does."""
        return SentinelUrl.parse(self.redis_url) if SentinelUrl.is_one(self.redis_url) else None

    @property
    def redis_address(self) -> tuple[str, dict[str, str]]:
        """The URL of Redis without user and password, and these, where they are given, as redis-py takes them."""
        if self.sentinel is not None:
            return self.sentinel.shown, dict(self.sentinel.login)
        parts = urlsplit(self.redis_url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        found = {"username": unquote(parts.username or ""), "password": unquote(parts.password or "")}
        if parts.scheme == "unix":
            found = {name: options.pop(name, "") or value for name, value in found.items()}
        bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(options), ""))
        return bare, {name: value for name, value in found.items() if value}

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values that must stand in no log, history or event: passwords, and every setting that is a SecretStr.

        One of less than 8 characters is left out: it would be found in much that is no secret.
        """
        _, login = self.redis_address
        sentinels = self.sentinel.sentinel_login if self.sentinel else {}
        found = [login.get("password", ""), sentinels.get("password", "")]
        found += [self.flower_login or "", (self.flower_login or "").partition(":")[2]]
        found += [value.get_secret_value() for name in type(self).model_fields if isinstance(value := getattr(self, name), SecretStr)]
        return tuple(dict.fromkeys(one for one in found if len(one) >= 8))

    @property
    def ops_ports(self) -> Sequence[int]:
        """The ports that `ops_port` names, in the order in which they are tried; none where nothing is to be served."""
        first, dash, last = self.ops_port.replace(" ", "").partition("-")
        return () if first == "0" else range(int(first), int(last if dash else first) + 1)

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits that are set here, by the names that they have in the store."""
        limits = {f"host:{host}": rule.limit for host, rule in self.host_limits.items()}
        if self.rate_limit is not None:
            limits["total"] = Limit(self.rate_limit.per_second, self.rate_limit.burst)
        if self.user_concurrency is not None:
            limits["user"] = Limit(concurrency=self.user_concurrency)
        return limits

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - given by name, and replaced by our own
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _EnvironmentSource(settings_cls), _DotEnvSource(settings_cls), _YamlSource(settings_cls)


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()


def load_settings(**overrides: Any) -> Settings:
    """Read all sources. `overrides` win over every source.

    Raises SettingsError with a line for each name that is unknown and each value that is not accepted.
    """
    try:
        return Settings(**overrides)
    except ValidationError as fault:
        found = explain(fault, Settings, hidden=_HIDDEN, most=_MOST_FAULTS)
        origins = {name: _origin(str(name), overrides) for name in dict.fromkeys(place[0] for place, _ in found if place)}
        lines = []
        for place, message in found:
            if place and place[0] not in Settings.model_fields:
                known = sorted(Settings.model_fields)
                hint = did_you_mean(place[0], known)
                if origins[place[0]].upper().startswith("TASKPLATFORM_"):  # as it is written there, to be copied
                    hint = re.sub(r'"(\w+)"', lambda near: f'"TASKPLATFORM_{near[1].upper()}"', hint)
                message = f"is not a setting{hint}; settings are {', '.join(known)}"
            detail = "".join(f"{step}: " for step in place[1:])
            lines.append(f"{origins[place[0]]}: {detail}{message}" if place else message)
        if fault.error_count() > len(found):
            lines.append(f"and {fault.error_count() - len(found):,} faults more")
        raise SettingsError("\n".join(lines)) from None


def _load(name: str, files: object, load: Callable[[], None]) -> None:
    """Let OpenSSL read files that the setting `name` gives. Raises ValueError in plain words, without what stands in them."""
    try:
        load()
    except ssl.SSLError as fault:
        what = "a PEM file that OpenSSL can read is expected" if fault.reason is None else fault.reason.lower().replace("_", " ")
        raise ValueError(f"{name} {files} cannot be used: {what}") from None
    except (OSError, ValueError) as fault:
        raise ValueError(f"{name} {files} cannot be read: {getattr(fault, 'strerror', None) or fault}") from None


def shown_url(url: str) -> str:
    """A URL of Redis for people: without user, password and options."""
    if SentinelUrl.is_one(url):
        return SentinelUrl.parse(url).shown
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def environment() -> dict[str, str]:
    """What `${NAME}` in a definition can refer to: `.env`, and over it the process's environment."""
    return {**_dotenv(), **os.environ}


# --- sources ---------------------------------------------------------------------------------------------------------


class _Source(PydanticBaseSettingsSource):
    """A source whose values are read in one go."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("values come from __call__")


class _EnvironmentSource(_Source):
    def __call__(self) -> dict[str, Any]:
        return dict(_own(os.environ))


class _DotEnvSource(_Source):
    """`.env`, which may hold other variables too: those of the definitions."""

    def __call__(self) -> dict[str, Any]:
        return dict(_own(_dotenv()))


class _YamlSource(_Source):
    def __call__(self) -> dict[str, Any]:
        return {name: value for name, (value, _line) in _yaml(self.current_state.get("config")).items()}


def _own(variables: Mapping[str, str]) -> dict[str, str]:
    """The settings among environment variables."""
    own = {name[len(PREFIX) :].lower(): value for name, value in variables.items() if name.upper().startswith(PREFIX)}
    return {name: value for name, value in own.items() if value.strip()}


def _dotenv() -> dict[str, str]:
    path = Path(ENV_FILE)
    if not path.is_file():
        return {}
    text = _text(path)
    faulty = [binding.original.line for binding in parse_stream(io.StringIO(text)) if binding.error]
    if faulty:
        raise SettingsError("\n".join(f"{ENV_FILE}:{line}: cannot be read; a line is NAME=value" for line in faulty))
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def _yaml(named: object) -> dict[str, tuple[Any, int]]:
    """The values in the YAML file, and their lines. `named` is the file's name if a source gives one."""
    path = _yaml_path(named)
    if not path.is_file():
        if named:
            raise SettingsError(f"{PREFIX}CONFIG names {str(path)!r}, which is not a file")
        return {}
    try:
        if path.stat().st_size > _MOST_YAML_BYTES:
            raise SettingsError(f"{path}: is larger than {_MOST_YAML_BYTES:,} bytes")
    except OSError as fault:
        raise SettingsError(f"{path}: cannot be read: {fault.strerror}") from None
    text = _text(path)
    try:
        return _yaml_values(_Loader(text), path)
    except yaml.MarkedYAMLError as fault:
        # without the fault's own text, which quotes the line
        line = f":{fault.problem_mark.line + 1}" if fault.problem_mark else ""
        what = "" if isinstance(fault, _AliasError) else "is not YAML: "
        raise SettingsError(f"{path}{line}: {what}{fault.problem}") from None
    except yaml.reader.ReaderError as fault:
        raise SettingsError(f"{path}: is not YAML: {fault.reason}") from None
    except RecursionError:
        raise SettingsError(f"{path}: is nested too deeply") from None


class _AliasError(yaml.MarkedYAMLError):
    """Settings take none."""


class _Loader(yaml.BaseLoader):
    """Reads text alone, and no alias: a few could stand for more than there is memory, or for what they are a part of."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As it is called for each node."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call] # as all of PyYAML's parser
            raise _AliasError(problem=f"the alias *{alias.anchor[:80]} is not accepted", problem_mark=alias.start_mark)
        return super().compose_node(parent, index)


def _yaml_values(loader: _Loader, path: Path) -> dict[str, tuple[Any, int]]:
    root = loader.get_single_node()
    if root is None or root.value in _EMPTY:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: a mapping of settings to values is expected, not {_NODES[type(root)]}")
    if len(root.value) > _MOST_YAML_NAMES:
        raise SettingsError(f"{path}: has {len(root.value):,} names of settings; it takes {_MOST_YAML_NAMES} at the most")
    values: dict[str, tuple[Any, int]] = {}
    faults = []
    for key, node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            faults.append(f"{path}:{line}: the name of a setting is expected, not {_NODES[type(key)]}")
        elif key.value in values:
            faults.append(f"{path}:{line}: {key.value} is given twice; the first is in line {values[key.value][1]}")
        elif key.value == "config":
            faults.append(f"{path}:{line}: config names this file, and cannot be set in it")
        else:
            values[key.value] = (loader.construct_object(node, deep=True), line)
    if faults:
        raise SettingsError("\n".join(faults))
    return {name: (value, line) for name, (value, line) in values.items() if value not in _EMPTY}


_NODES = {yaml.ScalarNode: "text", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}


def _yaml_path(named: object) -> Path:
    return Path(str(named or Settings.model_fields["config"].default))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise SettingsError(f"{path}: cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8") from None


def _origin(name: str, overrides: Mapping[str, object]) -> str:
    """Where the value of a setting comes from, as the start of a line about it."""
    if name in overrides:
        return f"{name} (argument)"
    sources = {"environment": _own(os.environ), ENV_FILE: _own(_dotenv())}
    for source, values in sources.items():
        if name in values:
            return f"{PREFIX}{name.upper()} ({source})"
    named = overrides.get("config") or next((values["config"] for values in sources.values() if "config" in values), None)
    return f"{_yaml_path(named)}:{_yaml(named)[name][1]}: {name}"
