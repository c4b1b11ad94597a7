"""Which messages a worker can take: those of jobs and of Celery's own tasks, and whatever else is refused with a reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from celery import Celery
from celery.app.task import Context
from celery.worker.request import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.transport.virtual import Channel, Message
from kombu.utils.json import loads

from taskplatform.garbage import fault_in
from taskplatform.message import message_template
from taskplatform.model import Definition

DEFINITION = Definition.model_validate({"id": "report", "name": "report", "call": "tasks.inputs:anything", "cron": "0 0 * * *"})
JOB = message_template(DEFINITION)
for blank, value in {"ID": "report:u1:m1", "USER": "u1", "DELIVERY": "3", "RETRIES": "0", "QUEUE": "low"}.items():
    JOB = JOB.replace(f"@@{blank}@@", value)


def celery_message(**options: Any) -> dict[str, Any]:
    """What the installed Celery sends to Redis."""
    app = Celery("sender", broker="memory://")
    sent: list[dict[str, Any]] = []
    with app.connection_for_write() as connection:
        channel = connection.default_channel

        def put(_queue: str, message: dict[str, Any], **_: Any) -> None:
            sent.append(json.loads(json.dumps(message)))

        channel._put = put
        app.send_task("tests.plain", (1, "a"), {"b": None}, connection=connection, **options)
    return sent[0]


OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eta": {"eta": datetime(2030, 1, 1, tzinfo=UTC)},
    "naive eta": {"eta": datetime(2030, 1, 1)},
    "countdown": {"countdown": 3.5},
    "expires": {"expires": 60},
    "expires at": {"expires": datetime.now(UTC) + timedelta(days=1)},
    "limits": {"time_limit": 9, "soft_time_limit": 2.5},
    "one limit": {"soft_time_limit": 2},
    "compressed": {"compression": "gzip"},
    "retried": {"retries": 3},
    "priority": {"priority": 4},
    "shadow": {"shadow": "other name"},
    "linked": {"link": {"task": "next", "args": [], "kwargs": {}, "options": {}}},
    "stamped": {"headers": {"stamped_headers": ["who"], "stamps": {"who": ["me"]}, "who": "me"}},
    "group": {"group_id": "g", "group_index": 1, "root_id": "r", "parent_id": "p"},
    "own headers": {"headers": {"tenant": {"a": [1]}}},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=list(OTHERS))
def test_what_celery_sends_is_taken(options: dict[str, Any]) -> None:
    message = celery_message(**options)
    assert fault_in(json.dumps(message).encode()) is None
    assert fault_in(json.dumps(message)) is None


def test_what_the_release_script_sends_is_taken() -> None:
    assert fault_in(JOB) is None
    assert fault_in(JOB.encode()) is None


def changed(path: str, value: Any) -> bytes:
    """A job's message with one part replaced, or taken out with `...`."""
    message = json.loads(JOB)
    place = message
    *way, last = path.split(".")
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(message).encode()


def packed(value: Any) -> str:
    return json.dumps(value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8: invalid start byte at byte 0"),
        (b"\x80\x04K*.", "not UTF-8"),
        (b"hello", "not JSON"),
        (b"[]", "JSON, but not an object: list"),
        (b"7", "JSON, but not an object: int"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"__type__": "datetime", "__value__": 7}', "cannot be read: TypeError"),
        (changed("headers", ...), "headers: None: an object is expected"),
        (changed("headers", [1]), "headers: [1]: an object is expected"),
        (changed("headers.task", ...), "header task: None: text that is not empty"),
        (changed("headers.task", ["a"]), "header task: ['a']"),
        (changed("headers.id", 7), "header id: 7"),
        (changed("headers.eta", "tomorrow"), "header eta: 'tomorrow': a time in ISO 8601"),
        (changed("headers.eta", 5), "header eta: 5"),
        (changed("headers.expires", "0001-01-01T00:00:00+14:00"), "header expires"),
        (changed("headers.timelimit", 5), "header timelimit: 5: two numbers"),
        (changed("headers.timelimit", [1, float("nan")]), "header timelimit: [1, nan]"),
        (changed("headers.retries", "many"), "header retries: 'many': a whole number"),
        (changed("headers.stamped_headers", "who"), "header stamped_headers"),
        (changed("headers.shadow", {}), "header shadow"),
        (changed("headers.delivery", ...), "header delivery: None: the number of a job's delivery"),
        (changed("headers.delivery", "3"), "header delivery: '3'"),
        (changed("headers.delivery", True), "header delivery: True"),
        (changed("headers.delivery", 3.0), "header delivery: 3.0"),
        (changed("headers.delivery", 4), "property delivery_tag: 'report:u1:m1#3': 'report:u1:m1#4' is expected"),
        (changed("headers.task", "another"), "header id: 'report:u1:m1' is no job of 'another'"),
        (changed("body", packed([[1], {"user": "u1"}, {}])), "body: [[1], {'user': 'u1'}]: the job's user alone is expected"),
        (changed("body", packed([[], {"user": "u2"}, {}])), "body: [[], {'user': 'u2'}]: the job's user alone"),
        (changed("body", packed([[], {"user": "u1", "amount": 9}, {}])), "body: [[], {'user': 'u1', 'amount': 9}]: the job's"),
        (changed("body", packed([[], {}, {}])), "body: [[], {}]: the job's user alone"),
        (changed("body", packed([[], {"user": "u1"}, {"callbacks": [{"task": "report"}]}])), "'callbacks' is given"),
        (changed("body", packed([[], {"user": "u1"}, {"chain": [{"task": "report"}]}])), "'chain' is given"),
        (changed("headers.eta", "2100-01-01T00:00:00Z"), "'eta' is given, which no job's message has"),
        (changed("headers.expires", "2000-01-01T00:00:00Z"), "'expires' is given"),
        (changed("properties", ...), "properties: None: an object is expected"),
        (changed("properties", "x"), "properties: 'x'"),
        (changed("properties.delivery_tag", ...), "property delivery_tag: None"),
        (changed("properties.delivery_tag", [1]), "property delivery_tag: [1]"),
        (changed("properties.delivery_tag", "x"), "property delivery_tag: 'x'"),
        (changed("properties.delivery_info", ...), "property delivery_info: None"),
        (changed("properties.delivery_info", {}), "delivery_info exchange: None"),
        (changed("properties.delivery_info.routing_key", 5), "delivery_info routing_key: 5"),
        (changed("properties.priority", "high"), "property priority: 'high'"),
        (changed("properties.correlation_id", {}), "property correlation_id: {}"),
        (changed("properties.body_encoding", "rot13"), "property body_encoding: 'rot13': base64 is expected"),
        (changed("properties.body_encoding", 7), "property body_encoding: 7"),
        (changed("properties.body_encoding", "base64"), "body: not base64"),
        (changed("content-type", "application/x-python-serialize"), "content-type: 'application/x-python-serialize': application/json"),
        (changed("content-type", ...), "content-type: None"),
        (changed("content-encoding", 8), "content-encoding: 8"),
        (changed("body", ...), "body: None: text is expected"),
        (changed("body", {"a": 1}), "body: {'a': 1}: text is expected"),
        (changed("body", ""), "body: not JSON"),
        (changed("body", "7"), "body: not a list of arguments"),
        (changed("body", packed([[], {}])), "body: not a list of arguments"),
        (changed("body", packed([{}, {}, {}])), "body: not a list of a list, an object"),
        (changed("body", packed([[], [], {}])), "body: not a list of a list, an object"),
        (changed("body", packed([[], {}, 7])), "body: not a list of a list, an object"),
        (changed("body", "\ud800"), "cannot be read: UnicodeEncodeError"),
        (changed("headers.compression", "gzip"), "property body_encoding: None"),
    ],
)
def test_what_is_refused(raw: bytes, reason: str) -> None:
    fault = fault_in(raw)
    assert fault is not None
    assert fault.startswith(reason), fault
    assert len(fault) <= 300


def test_compressed_and_broken() -> None:
    message = celery_message(compression="gzip")
    message["body"] = base64.b64encode(b"never compressed").decode()
    assert str(fault_in(json.dumps(message))).startswith("cannot be read: error:")


# --- any bytes, and messages that are nearly good --------------------------------------------------------------------


TAKER = Celery("taker", set_as_current=False)


@TAKER.task(name="tests.plain", shared=False)  # type: ignore[untyped-decorator]
def other() -> None:
    """Whatever is sent."""


def take(raw: bytes) -> None:
    """What kombu and Celery do with a message in the worker's main process, down to the request that goes to the pool."""
    app, task = TAKER, TAKER.tasks["tests.plain"]
    channel = cast("Any", Channel.__new__(Channel))
    message = Message(loads(raw.decode()), channel=channel, accept={"application/json"})
    assert {message.delivery_tag: 1}
    assert message.headers["task"]
    assert "args" not in message.payload
    request = Request(message, app=app, task=task, hostname="w", headers=message.headers, body=message.body)
    hash(request.id)
    _, _ = request.time_limits
    repr(request)
    request.info(safe=True)
    request.maybe_expire()
    Context(request.request_dict)
    json.dumps(message._raw, default=str)


def test_what_is_taken_here_is_what_kombu_and_celery_can_take() -> None:
    """Or the next test would show nothing."""
    take(JOB.encode())
    with pytest.raises(AttributeError):
        take(changed("properties.body_encoding", "rot13"))
    with pytest.raises(TypeError):
        take(changed("body", "7"))


@given(st.binary(max_size=200))
def test_no_bytes_break_it(raw: bytes) -> None:
    assert fault_in(raw)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["base64", "gzip", "2030-01-01T00:00:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("__type__"), inner, max_size=3),
    max_leaves=5,
)
SEEDS: list[Callable[[], dict[str, Any]]] = [
    lambda: json.loads(JOB),
    *(lambda options=options: celery_message(**options) for options in ({}, OTHERS["eta"], OTHERS["compressed"])),
]
GOOD = [seed() for seed in SEEDS]


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of all parts of a message, how to come to them."""
    inside = list(value.items()) if isinstance(value, dict) else []
    return [way, *(found for name, part in inside for found in places(part, (*way, name)))]


@st.composite
def nearly_good(draw: st.DrawFn) -> bytes:
    """A good message in which some parts are others, or gone; bytes of it may be others too."""
    message = deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(places(message)))
        if not way:
            continue
        place = message
        for step in way[:-1]:
            place = place[step]
        if draw(st.booleans()):
            place[way[-1]] = draw(JSON)
        else:
            del place[way[-1]]
    if draw(st.integers(0, 4)) == 0:
        message["body"] = json.dumps(draw(JSON))
        message.get("properties", {}) if not isinstance(message.get("properties"), dict) else message["properties"].pop(
            "body_encoding", None
        )
    raw = bytearray(json.dumps(message).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=300, deadline=None)
@given(nearly_good())
def test_a_message_is_refused_or_can_be_taken(raw: bytes) -> None:
    fault = fault_in(raw)
    if fault is None:
        take(raw)
    else:
        fault.encode()
        assert 0 < len(fault) <= 300
