"""How long a forecast of 24 hours takes, and what memory, however many users there are.

300 definitions with schedules of every kind under a total limit and those of 30 hosts, 10,000,000 subscriptions at scale 1, and besides
9,600 groups with own schedules: 400 time zones × 24 hours. A process that does nothing else forecasts it: as it is, and with one definition
enabled for 200,000 more, beside the same without. The members of the groups are written by a script, because a forecast looks at no user.
Processor time says more than the clock where the machine does other things too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import product
from typing import Any
from zoneinfo import available_timezones

import redis

from bench.processes import ROOT, server
from taskplatform.model import Definition, Interval, Limit, Priority, schedule_to_json
from taskplatform.planner import published
from taskplatform.store import Store, connect

DEFINITIONS = 300
HOSTS = 30
ZONES = 400
ROUNDS = 3
MORE = 200_000
_NAMESPACE = "tp"
_FILL = """
local some = {}
for number = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  some[#some + 1] = number / ARGV[3]
  some[#some + 1] = 'u' .. number
end
redis.call('ZADD', KEYS[1], unpack(some))
"""
_CHUNK = 2000
_KINDS: tuple[dict[str, Any], ...] = (
    {"type": "hourly"},
    {"type": "daily", "at_time": {"hour": 9}},
    {"type": "daily"},
    {"type": "weekly", "at_time": {"hour": 8}},
    {"type": "minutely", "value": 30},
    {"type": "monthly"},
)


def definitions() -> list[Definition]:
    """The same each time."""
    return [_definition(number) for number in range(DEFINITIONS)]


def _definition(number: int) -> Definition:
    interval = dict(_KINDS[number % len(_KINDS)])
    if interval["type"] == "hourly":
        interval["at_time"] = {"minute": number % 60}
    elif interval == {"type": "daily"}:
        interval["at_time"] = {"hour": number % 24, "minute": number * 5 % 60}
    return Definition.model_validate(
        {
            "id": f"job{number}",
            "name": "A job",
            "interval": interval,
            "window": "15m",
            "priority": list(Priority)[number % 3],
            "config": {"endpoint": f"https://h{number % HOSTS}.example.com/"},
        }
    )


def run(scale: float = 1.0) -> dict[str, Any]:
    """The figures."""
    with server() as url:
        client = connect(url)
        subscriptions = _populate(client, max(1000, int(10_000_000 * scale)), scale)
        command = [sys.executable, "-m", "bench.forecast_process", url]
        rounds = [json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout) for _ in range(ROUNDS)]
        client.close()
    by_name = {name: [one[name] for one in rounds] for name in rounds[0]}
    middle = {name: statistics.median(values) for name, values in by_name.items()}
    return {
        "definitions": DEFINITIONS,
        "subscriptions": subscriptions,
        "rounds": ROUNDS,
        **{name: round(value, 2) for name, value in middle.items()},
        "forecast_s_min_max": [round(min(by_name["forecast_s"]), 2), round(max(by_name["forecast_s"]), 2)],
        "ratio_reading": round(middle["forecast_s"] / middle["reading_s"], 2),
        "beside": {"ratio_reading": "reading the same groups and figures"},
    }


def _populate(client: redis.Redis, subscriptions: int, scale: float) -> int:
    store = Store(client, namespace=_NAMESPACE)
    for definition in definitions():
        store.publish(published(definition, {}), actor="bench")
    store.set_limit("total", Limit(2500 * scale, 1000), actor="bench")
    for number in range(HOSTS):
        store.set_limit(f"host:h{number}.example.com", Limit(100 * scale, 50), actor="bench")
    now_ms = store.now_ms()
    members = subscriptions // (DEFINITIONS + 10)
    for definition in definitions():
        _group(client, definition.id, definition.id, definition.schedule, now_ms, members)
    own = next(one.id for one in definitions() if one.schedule == _definition(1).schedule)
    zones = sorted(zone for zone in available_timezones() if "/" in zone)[:ZONES]
    few = max(1, 10 * members // (len(zones) * 24))
    for zone, hour in product(zones, range(24)):
        schedule = Interval.model_validate({"type": "daily", "timezone": zone, "at_time": {"hour": hour}})
        _group(client, own, f"{own}~{zone}{hour}", schedule, now_ms, few)
    return members * DEFINITIONS + few * len(zones) * 24


def _group(client: redis.Redis, definition: str, gid: str, schedule: Any, now_ms: int, members: int) -> None:
    """As `subscribe` leaves it, without the users."""
    pipe = client.pipeline(transaction=False)
    pipe.sadd(f"{_NAMESPACE}:groups:{definition}", gid)
    pipe.hset(f"{_NAMESPACE}:group:{gid}", mapping={"definition": definition, "schedule": schedule_to_json(schedule), "cursor": now_ms})
    pipe.zadd(f"{_NAMESPACE}:due", {f"g|{gid}": now_ms})
    for start in range(0, members, _CHUNK):
        pipe.eval(_FILL, 1, f"{_NAMESPACE}:slots:{gid}", start, min(start + _CHUNK, members) - 1, members)
        pipe.execute()
