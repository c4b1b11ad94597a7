"""celeryconfig.py holds only names that the installed Celery or redbeat reads; a misspelt one would change nothing, silently."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import redbeat.schedulers
from celery.app import defaults

from taskplatform.settings import settings


@pytest.fixture
def celeryconfig(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """As it is with the default settings."""
    monkeypatch.delitem(sys.modules, "celeryconfig", raising=False)
    settings.cache_clear()
    yield importlib.import_module("celeryconfig")
    sys.modules.pop("celeryconfig", None)
    settings.cache_clear()


def _settings_in(module: ModuleType) -> set[str]:
    """As Celery's loader sees them, without what is only imported there."""
    imported = {"annotations", "settings"}
    return {name for name, value in vars(module).items() if name[0] != "_" and name not in imported and not isinstance(value, type)}


def _redbeats() -> set[str]:
    """The names that redbeat's configuration asks for."""
    return set(re.findall(r"either_or\(\s*'(redbeat_\w+)'", inspect.getsource(redbeat.schedulers.RedBeatConfig)))


def test_every_name_is_known(celeryconfig: ModuleType) -> None:
    names = _settings_in(celeryconfig)
    assert {"broker_url", "task_queues", "redbeat_lock_timeout", "beat_schedule"} <= names
    assert {"redbeat_redis_url", "redbeat_lock_timeout"} <= _redbeats()
    unknown = names - defaults.SETTING_KEYS - _redbeats()
    assert not unknown


def test_every_switch_and_number_is_one(celeryconfig: ModuleType) -> None:
    """Celery converts a value only when it comes from the command line."""
    accepted: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
    for name in _settings_in(celeryconfig) & defaults.SETTING_KEYS:
        wanted = accepted.get(defaults.find(name).type.type)
        assert wanted is None or isinstance(getattr(celeryconfig, name), wanted), name
