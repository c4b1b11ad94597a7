"""The platform's settings, and the only module that reads the environment.

Sources, the first that has a value wins: environment variables `TASKPLATFORM_*`, the file `.env`, a YAML file (named by
`TASKPLATFORM_CONFIG` in one of the former, default `taskplatform.yaml` where it exists), the defaults below.

Every source gives text, read by the same rules: `010` is ten and `on` a word, in YAML too. An empty value, in YAML also
`null` and `~`, counts as not given. A source replaces a setting as a whole.

A name that is not a setting, or a value that a setting does not take, raises SettingsError with one line for each: where it
stands, what it is (but for the URL, which may hold a password) and what is accepted.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from taskplatform.errors import SettingsError
from taskplatform.faults import did_you_mean, explain
from taskplatform.model import Host, Limit, LimitRule, PositiveDuration, RateLimit, format_duration

PREFIX = "TASKPLATFORM_"
ENV_FILE = ".env"

_EMPTY = ("", "null", "~")
_NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)
_HIDDEN = (("redis_url",),)
_URL_RULE = "takes a redis:// or rediss:// URL such as redis://host:6379/0, or a unix:// one; / ? # @ in a password are %2F %3F %23 %40"


#: What a worker takes at most to give back what it could not finish, and to end, after its grace.
STOP_MARGIN = timedelta(seconds=10)


class Settings(BaseSettings):
    """Every setting. Durations are written as "90s" or "10m", or as a number of seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    config: Path = Field(default=Path("taskplatform.yaml"), description="optional YAML file with settings")
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0", repr=False, description="one Redis or Valkey for store, broker and beat lock"
    )
    namespace: str = Field(
        default="tp",
        pattern=r"^[a-z][a-z0-9_-]{0,15}$",
        description="first part of every key of the store: 1 to 16 characters a-z, 0-9, _ and -, the first a letter",
    )
    tasks_dir: Path = Field(default=Path("tasks"), description="folder of the definition files")

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

    ops_host: str = Field(default="127.0.0.1", description="address where each process serves /health, /ready and /metrics; 0.0.0.0: all")
    ops_port: str = Field(
        default="0",
        description="port of these; a range such as 8092-8099, of which each process takes the first that is free; 0: they are not served",
    )
    ops_patience: PositiveDuration = Field(
        default=timedelta(seconds=60),
        description="/health fails when a loop of the process stands still for so long; 30 s may pass while Redis does not answer",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    flower_max_tasks: int = Field(default=10_000, ge=100, description="tasks that Flower keeps in memory")

    data_dir: Path = Field(default=Path(".taskplatform"), description="where `taskplatform up` keeps its server's data")

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
            return yaml.load(value, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            takes = {"rate_limit": '10/s or {"rate": "10/s", "burst": 15}', "host_limits": '{"api.example.com": {"rate": "10/s"}}'}
            raise ValueError(f"{value!r} cannot be read; it takes {takes[info.field_name or '']}") from None

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
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            # its text would quote a part of the URL
            raise ValueError(_URL_RULE) from None
        if parts.scheme in ("redis", "rediss"):
            good = bool(host and re.fullmatch(r"/?\d*", parts.path, re.ASCII))
        else:
            good = parts.scheme == "unix" and bool(parts.path)
        if not good:
            raise ValueError(_URL_RULE)
        return url

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
        lines = []
        for place, message in explain(fault, Settings, hidden=_HIDDEN):
            if place and place[0] not in Settings.model_fields:
                known = sorted(Settings.model_fields)
                message = f"is not a setting{did_you_mean(place[0], known)}; settings are {', '.join(known)}"
            detail = "".join(f"{step}: " for step in place[1:])
            lines.append(f"{_origin(str(place[0]), overrides)}: {detail}{message}" if place else message)
        raise SettingsError("\n".join(lines)) from None


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
    text = _text(path)
    try:
        return _yaml_values(yaml.BaseLoader(text), path)
    except yaml.MarkedYAMLError as fault:
        # without the fault's own text, which quotes the line
        line = f":{fault.problem_mark.line + 1}" if fault.problem_mark else ""
        raise SettingsError(f"{path}{line}: is not YAML: {fault.problem}") from None
    except yaml.reader.ReaderError as fault:
        raise SettingsError(f"{path}: is not YAML: {fault.reason}") from None
    except RecursionError:
        raise SettingsError(f"{path}: is nested too deeply") from None


def _yaml_values(loader: yaml.BaseLoader, path: Path) -> dict[str, tuple[Any, int]]:
    root = loader.get_single_node()
    if root is None or root.value in _EMPTY:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}: a mapping of settings to values is expected, not {_NODES[type(root)]}")
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
