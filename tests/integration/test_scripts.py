"""Each script against its header, the key names, the transitions, and the one place that calls it."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from taskplatform.model import TRANSITIONS, JobState, Priority
from taskplatform.store import Store, access, levels, samples, scripts, store
from taskplatform.store.keys import NAMES, UNACKED, UNACKED_INDEX, key, lua_table
from taskplatform.store.scripts import names, source
from tests.conftest import Clock
from tests.integration.harness import ACTOR, HORIZON, define, enqueue, offer, publish, subscribe, take

VERBS = names()
#: What runs the scripts.
CALLERS = (store, access, levels)
STEPS = {"by twos": 2, "by threes": 3, "by fours": 4, "by fives": 5, "by sixes": 6, "by sevens": 7}


def header_of(script: str) -> str:
    """The comment that opens a script, as one line."""
    lines = []
    for line in script.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line.removeprefix("--").strip())
    return " ".join(lines)


def code_of(script: str) -> str:
    """The script without its comments."""
    return re.sub(r"--[^\n]*", "", script)


def documented(header: str) -> tuple[set[int], tuple[int, int] | None]:
    """The numbers of the single arguments, and where the repeated ones begin and how many belong together."""
    fixed = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", header)}
    repeated = re.findall(r"ARGV\[(\d+)…\]([^:]*)", header)
    assert len(repeated) <= 1
    if not repeated:
        return fixed, None
    start, words = repeated[0]
    return fixed, (int(start), next((step for word, step in STEPS.items() if word in words), 1))


def used(code: str) -> tuple[set[int], tuple[int, int] | None]:
    """The same, from the code."""
    fixed = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", code)}
    loops = {(int(start), int(step or 1)) for start, step in re.findall(r"for i = (\d+), #ARGV(?:, (\d+))?", code)}
    unpacked = {int(start) for start in re.findall(r"unpack\(ARGV, (\d+)\)", code)}
    # handed on in one piece: fields and values for HSET
    loops |= {(start, 2) for start in unpacked}
    assert len(loops) <= 1, "arguments are repeated from more than one place"
    return fixed, next(iter(loops), None)


@pytest.mark.parametrize("name", VERBS)
def test_header_says_what_the_script_takes_and_gives(name: str) -> None:
    script = source(name)
    header, code = header_of(script), code_of(script)
    purpose = header.split("ARGV[1]")[0].strip()
    assert re.match(r"[A-Z][^.]{10,}\.", purpose) or re.match(r"[A-Z].{8,}\.", purpose), "a header begins with the purpose"
    assert header.index("ARGV[1] now") < header.index("Returns ")
    assert header.count("Returns ") == 1
    assert documented(header) == used(code)
    fixed, repeated = documented(header)
    assert fixed == set(range(1, len(fixed) + 1))
    assert repeated is None or repeated[0] == len(fixed) + 1
    assert not re.search(r"\bKEYS\b", code), "keys come from K"
    assert code.strip().startswith("local"), "arguments are bound to locals in the first lines"
    assert "clock(ARGV[1])" in code, "the instant is the first argument"


@pytest.mark.parametrize("name", [*VERBS, "lib"])
def test_no_key_name_is_written_in_a_script(name: str) -> None:
    code = code_of(source(name))
    # a stage is a table of keys from K
    stages = re.findall(r"= \{ lane = (\S+), ready = (\S+), changed = \{\} \}", code)
    assert code.count("lane =") - code.count("local lane =") == len(stages)
    assert all(part.startswith("K.") for stage in stages for part in stage)
    locals_ = set(re.findall(r"local (\w+) = (?:K\.|stage\.(?:lane|ready)\b)", code))
    lists = re.findall(r"for _, (\w+) in ipairs\(\{ (K\.\w+(?:, K\.\w+)*) \}\)", code)
    known = locals_ | {listed for listed, _ in lists}
    # the broker's queues are named as the priorities; `add_all` is given a key, and `set_limit` one of two
    known |= {"priority", "queue"} | ({"key"} if name == "plan" else set()) | ({"layer"} if name == "lib" else set())
    for command, first in re.findall(r"call\('([A-Z]+)'(?:, ([^,)]+))?", code):
        key = first.split("..")[0].strip()
        known_key = re.fullmatch(r"K\.\w+|stage\.(?:lane|ready)", key) or key in known
        assert command == "TIME" or known_key, f"{command} {first}: where is this key from?"
    unknown = set(re.findall(r"\bK\.(\w+)", code)) - NAMES.keys() - {"unacked", "unacked_index"}
    assert unknown == set()
    assert "'tp" not in code


def test_every_name_is_used() -> None:
    everything = "".join(source(name) for name in [*VERBS, "lib"])
    by_scripts = set(re.findall(r"\bK\.(\w+)", everything))
    by_store = set(re.findall(r'key\("(\w+)"', "".join(map(inspect.getsource, (*CALLERS, samples)))))
    assert NAMES.keys() <= by_scripts | by_store
    assert by_store <= NAMES.keys()


def test_no_two_names_can_meet() -> None:
    parts = sorted(NAMES.values())
    assert len(set(parts)) == len(parts)
    prefixes = [part for part in parts if part.endswith(":")]
    assert [(prefix, part) for prefix in prefixes for part in parts if part != prefix and part.startswith(prefix)] == []


#: What each new connection runs, before the store can.
GREETING = "arrive"


def _runs() -> Iterator[tuple[str, list[ast.expr]]]:
    for node in (node for caller in CALLERS for node in ast.walk(ast.parse(inspect.getsource(caller)))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._scripts.run":
            verb = node.args[0]
            assert isinstance(verb, ast.Constant)
            yield str(verb.value), node.args[1:]


def test_store_calls_every_script_and_nothing_else_does() -> None:
    assert {name for name, _ in _runs()} == set(VERBS) - {GREETING}
    assert f'source("{GREETING}")' in inspect.getsource(scripts.greeting)
    package = Path(inspect.getfile(store)).parent
    others = [path for path in package.parent.rglob("*.py") if path.name not in ("store.py", "access.py", "levels.py", "scripts.py")]
    assert [path for path in others if "scripts.run(" in path.read_text(encoding="utf-8")] == []
    assert {path.stem for path in (package / "lua").iterdir()} == {*VERBS, "lib"}


@pytest.mark.parametrize(("name", "args"), list(_runs()), ids=[name for name, _ in _runs()])
def test_store_passes_as_many_arguments_as_the_header_has(name: str, args: list[ast.expr]) -> None:
    fixed, repeated = documented(header_of(source(name)))
    plain = [arg for arg in args if not isinstance(arg, ast.Starred)]
    assert 1 + len(plain) == len(fixed)
    assert any(isinstance(arg, ast.Starred) for arg in args) is (repeated is not None)


def test_tables_that_the_scripts_get(client: redis.Redis) -> None:
    prelude = lua_table("zz")

    def table(name: str) -> Any:
        return json.loads(cast("str", client.eval(f"{prelude} return cjson.encode({name})", 0)))

    allowed = {origin: set(targets) for origin, targets in table("ALLOWED").items() if targets}
    assert allowed == {("" if origin is None else origin.value): set(targets) for origin, targets in TRANSITIONS.items() if targets}
    assert set(TRANSITIONS) == {None, *JobState}
    assert table("PRIORITIES") == list(Priority)
    expected = {name: key("zz", name) for name in NAMES}
    assert table("K") == {**expected, "unacked": UNACKED, "unacked_index": UNACKED_INDEX}


def test_a_server_that_forgot_the_scripts_gets_them_again(client: redis.Redis, store: Store) -> None:
    """As after its restart."""
    publish(store, define("report"))
    client.script_flush()
    assert store.create_user("u1", actor=ACTOR)
    client.script_flush()
    assert store.release() == (0, None)


def test_a_store_keeps_to_its_namespace(client: redis.Redis, clock: Clock) -> None:
    """Two namespaces on one server share only the broker's queues."""
    own, other = Store(client, namespace="own", clock=clock), Store(client, namespace="other", clock=clock)
    for one in (own, other):
        publish(one, define("report", overlap="skip", rate_limit="5/s"))
        one.create_user("u1", actor=ACTOR)
    subscribe(own, "u1", "report")
    own.trigger("report", window=timedelta(), actor=ACTOR)
    own.lead(horizon=HORIZON, leader="test")
    oid = own.occurrences("report")[0].id
    own.plan(oid, horizon=HORIZON, batch=10)
    offer(own)
    waiting = enqueue(own)
    own.release()
    message = take(client)
    assert own.start(message.job_id, delivery=message.delivery, worker="w1").go
    own.pause_user("u1", actor=ACTOR)
    own.cancel(waiting, reason="not wanted")
    names = cast("list[str]", client.keys("*"))
    assert [name for name in names if not name.startswith(("own:", "other:"))] == []
    assert other.jobs().items == ()
    assert len(own.jobs().items) == 2
    client.delete(*[name for name in names if name.startswith("other:")])
    own.delete_user("u1", actor=ACTOR)
    assert other.published() == set()
