"""The platform's settings, and the only module that reads the environment.

Sources, the first that has a value wins: environment variables `TASKPLATFORM_*`, the file `.env`, a YAML file (named by
`TASKPLATFORM_CONFIG`, default `taskplatform.yaml` where it exists), the defaults below. A name that is not a setting, or a
value that a setting does not take, raises SettingsError with one line for each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from dotenv import dotenv_values
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from taskplatform.errors import SettingsError
from taskplatform.model import Duration, PositiveDuration, RateLimit

PREFIX = "TASKPLATFORM_"
ENV_FILE = ".env"


class Settings(BaseSettings):
    """Every setting. Durations are written as "90s" or "10m", or as a number of seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=ENV_FILE, env_ignore_empty=True, extra="forbid", frozen=True)

    config: Path = Field(default=Path("taskplatform.yaml"), description="optional YAML file with settings")
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", description="one Redis or Valkey for store, broker and beat lock")
    namespace: str = Field(default="tp", pattern=r"^[a-z][a-z0-9_-]{0,15}$", description="first part of every key of the store")
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
    retention: PositiveDuration = Field(default=timedelta(days=3), description="finished jobs and their histories are kept this long")
    change_log_size: int = Field(default=100_000, ge=100, description="entries of the change log that are kept")

    rate_limit: RateLimit | None = Field(
        default=None, description="all jobs over all workers; for example 10/s, or {rate: 10/s, burst: 15}"
    )

    http_connect_timeout: PositiveDuration = Field(default=timedelta(seconds=10), description="for DNS, TCP and TLS of one call")
    http_max_response: int = Field(default=65_536, ge=1024, description="bytes of an answer that are read")
    http_excerpt: int = Field(default=200, ge=0, le=4096, description="characters of an answer that the history keeps")

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    flower_max_tasks: int = Field(default=10_000, ge=100, description="tasks that Flower keeps in memory")

    data_dir: Path = Field(default=Path(".taskplatform"), description="where `taskplatform up` keeps its server's data")

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix") or not (parts.hostname or parts.path):
            raise ValueError("a redis://, rediss:// or unix:// URL is accepted")
        return url

    @model_validator(mode="after")
    def _check_times(self) -> Settings:
        if self.heartbeat_timeout < 2 * self.heartbeat_interval:
            raise ValueError("heartbeat_timeout must be at least twice heartbeat_interval")
        if self.beat_lock_timeout < 3 * self.beat_interval:
            raise ValueError("beat_lock_timeout must be at least three times beat_interval")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _DotEnvSource(settings_cls), _YamlSource(settings_cls)


class _MappingSource(PydanticBaseSettingsSource):
    """A source whose values are read in one go."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("values come from __call__")


class _DotEnvSource(_MappingSource):
    """`.env`, which may hold other variables too: those of the definitions."""

    def __call__(self) -> dict[str, Any]:
        values = dotenv_values(ENV_FILE) if Path(ENV_FILE).is_file() else {}
        own = {name[len(PREFIX) :].lower(): value for name, value in values.items() if name.upper().startswith(PREFIX) and value}
        return {name: yaml.safe_load(value) if value.lstrip().startswith("{") else value for name, value in own.items()}


class _YamlSource(_MappingSource):
    def __call__(self) -> dict[str, Any]:
        named = self.current_state.get("config")
        path = Path(named) if named else Settings.model_fields["config"].default
        if not path.is_file():
            if named:
                raise SettingsError(f"{PREFIX}CONFIG names {str(path)!r}, which is not a file")
            return {}
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
            raise SettingsError(f"{path}: cannot be read as YAML: {fault}") from None
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise SettingsError(f"{path}: a mapping of setting to value is expected, not {type(content).__name__}")
        return content


def _unknown_names(names: Mapping[str, object], where: str) -> list[str]:
    """Lines for the names with our prefix that are no setting."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    lines = []
    for name in sorted(names):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            lines.append(f"{name} ({where}) is not a setting; settings are {', '.join(sorted(known))}")
    return lines


def load_settings(**overrides: Any) -> Settings:
    """Read all sources. `overrides` win over every source.

    Raises SettingsError with a line for each name that is unknown and each value that is not accepted.
    """
    dotenv = dotenv_values(ENV_FILE) if Path(ENV_FILE).is_file() else {}
    lines = _unknown_names(os.environ, "environment") + _unknown_names(dotenv, ENV_FILE)
    if lines:
        raise SettingsError("\n".join(lines))
    try:
        return Settings(**overrides)
    except ValidationError as fault:
        for error in fault.errors(include_url=False, include_context=False):
            name = str(error["loc"][0]) if error["loc"] else "settings"
            if error["type"] == "extra_forbidden":
                lines.append(f"{name} is not a setting; settings are {', '.join(sorted(Settings.model_fields))}")
            else:
                got = "" if name in ("redis_url", "settings") else f", got {error['input']!r}"
                lines.append(f"{PREFIX}{name.upper()}: {error['msg'].removeprefix('Value error, ')}{got}")
        raise SettingsError("\n".join(lines)) from None
    except SettingsError:
        raise
    except Exception as fault:  # pydantic-settings: text of a complex setting that is not JSON
        raise SettingsError(str(fault)) from None


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()


def environment() -> dict[str, str]:
    """What `${NAME}` in a definition can refer to: `.env`, and over it the process's environment."""
    dotenv = dotenv_values(ENV_FILE) if Path(ENV_FILE).is_file() else {}
    return {**{name: value for name, value in dotenv.items() if value is not None}, **os.environ}
