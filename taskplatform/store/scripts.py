"""Runs the Lua scripts, each an atomic step, and translates what Redis answers.

A script is `lua/<verb>.lua`. Before it stand the key names (`keys.lua_table`) and `lua/lib.lua`. Its first argument is always
the instant: the store's clock where one was given, else '' for the server's own, so that all processes share one clock.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import redis
from redis.connection import AbstractConnection
from redis.exceptions import NoScriptError

from taskplatform.store.keys import lua_table

Clock = Callable[[], int]


def source(name: str) -> str:
    """The text of `lua/<name>.lua`."""
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def names() -> list[str]:
    """The verbs, without the library."""
    folder = resources.files(__package__).joinpath("lua")
    return sorted(entry.name.removesuffix(".lua") for entry in folder.iterdir() if entry.name.endswith(".lua") and entry.name != "lib.lua")


def whole(namespace: str, name: str) -> str:
    """What the server runs. The script is a function of its own, because a function in Lua has 200 local variables at the most."""
    return f"{lua_table(namespace)}{source('lib')}return (function()\n{source(name)}\nend)()"


class Scripts:
    """The scripts for one namespace, loaded when the server does not know them."""

    def __init__(self, client: redis.Redis, namespace: str, clock: Clock | None = None) -> None:
        self._execute: Callable[..., Any] = client.execute_command
        self._namespace = namespace
        self._clock = clock
        self._known: dict[str, tuple[str, str]] = {}

    def run(self, name: str, *args: str | int | float) -> Any:
        """Run `lua/<name>.lua` with the instant and `args`. Raises StoreError, StoreUnavailable."""
        digest, text = self._known.get(name) or self._read(name)
        instant = "" if self._clock is None else self._clock()
        # redis-py's `Script` would do the same, and add a sixth to the time that a call takes in this process
        try:
            return self._execute("EVALSHA", digest, 0, instant, *args)
        except NoScriptError:
            # which also makes it known to the server; one that was only loaded could be forgotten again in between
            return self._execute("EVAL", text, 0, instant, *args)

    def _read(self, name: str) -> tuple[str, str]:
        text = whole(self._namespace, name)
        self._known[name] = known = (hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), text)
        return known


def greeting(namespace: str) -> Callable[[AbstractConnection], None]:
    """What `connect` does with each new connection: notes on which server the data is used, see `lua/arrive.lua`.

    No script runs on a server that restarted, or that took over, before it.
    """
    text = whole(namespace, "arrive")
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def ask(connection: AbstractConnection, *command: str | int) -> Any:
        connection.send_command(*command, check_health=False)  # type: ignore[no-untyped-call]
        return connection.read_response()

    def greet(connection: AbstractConnection) -> None:
        answer = ask(connection, "INFO", "server")
        run_id = re.search(r"^run_id:(\w+)", answer if isinstance(answer, str) else answer.decode(), re.MULTILINE)
        assert run_id is not None
        try:
            ask(connection, "EVALSHA", digest, 0, "", run_id.group(1))
        except NoScriptError:
            ask(connection, "EVAL", text, 0, "", run_id.group(1))

    return greet
