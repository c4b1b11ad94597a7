"""The rights that the platform's processes need at Redis, and no more: the one place that docs, tests and containers take them from.

Redis knows two kinds of user here. `platform` is for beat, workers, API and command line, which all use the same scripts and could
do nothing with less. `observer` is for a Flower that only shows: it hears task events, sees how long the queues are, and can neither
read nor write the ledger, nor put anything into a queue, nor give workers orders.

INFO is the only command of Redis' category @dangerous: it tells a new connection whether the server is another than before
(`lua/arrive.lua`), and health how the server is. It changes nothing. What a script calls, its user must be allowed to call: so the
commands of the scripts are here too.
"""

from __future__ import annotations

from enum import StrEnum

from taskplatform.model import Priority
from taskplatform.store.keys import UNACKED, UNACKED_INDEX


class Role(StrEnum):
    """Whose rights."""

    PLATFORM = "platform"
    OBSERVER = "observer"


_CONNECTION = ("ping", "select", "info")
_TRANSACTION = ("multi", "exec", "watch", "unwatch")
_SUBSCRIBER = ("subscribe", "psubscribe", "unsubscribe", "punsubscribe")
#: `script|exists` and `script|load` are of redis-py's pipelines and redbeat's lock, the rest of ours.
_SCRIPTS = ("eval", "evalsha", "script|exists", "script|load", "time")
_STRINGS = ("get", "set", "incr", "incrby", "del", "exists", "expire", "pexpire", "pttl")
_HASHES = ("hget", "hmget", "hgetall", "hset", "hsetnx", "hdel", "hexists", "hincrby", "hkeys", "hlen")
_LISTS = ("lindex", "llen", "lpush", "lrange", "ltrim", "rpush", "brpop")
_SETS = ("sadd", "scard", "sismember", "smembers", "srandmember", "srem")
_SORTED = ("zadd", "zcard", "zcount", "zmscore", "zrange", "zrangebyscore", "zrem", "zremrangebyscore", "zscore")
_STREAMS = ("xadd", "xlen", "xrevrange")

#: For each role, the commands, without leading +.
COMMANDS: dict[Role, tuple[str, ...]] = {
    Role.PLATFORM: (
        *_CONNECTION,
        *_TRANSACTION,
        *_SUBSCRIBER,
        "publish",
        *_SCRIPTS,
        *_STRINGS,
        *_HASHES,
        *_LISTS,
        *_SETS,
        *_SORTED,
        *_STREAMS,
    ),
    # kombu keeps account of who listens to events, with scripts of its own
    Role.OBSERVER: (
        "ping",
        "select",
        "multi",
        "exec",
        *_SUBSCRIBER,
        *_SCRIPTS,
        *("llen", "exists", "del", "sadd", "srem", "smembers", "zadd", "zrangebyscore", "zrem"),
    ),
}


#: The line of an ACL file for the user `default`: nobody can log in as it. Its rights stay, because Redis 7.0 reads its append-only file
#: with them: with `off` alone it refuses, at each start, what a script had written in one step, and is empty.
DEFAULT_USER = "user default off ~* &* +@all"


def rules(role: Role, *, namespace: str = "tp", database: int = 0) -> str:
    """The rules as ACL SETUSER and an ACL file take them, behind name, `on` and password. `database` is the number in the URL."""
    events, orders = f"/{database}.celeryev/*", f"/{database}.celery.pidbox"
    queues = [priority.value for priority in Priority]
    if role is Role.PLATFORM:
        # kombu's own: notes of unacknowledged messages of other tasks, bindings, the queues of remote control and of its answers
        keys = [f"~{namespace}:*", *(f"~{name}" for name in queues), f"~{UNACKED}", f"~{UNACKED_INDEX}", "~unacked_mutex"]
        keys += ["~_kombu.*", "~*.celery.pidbox", "~celeryev.*"]
        channels = [f"&{events}", f"&{orders}"]
    else:
        keys = [*(f"%R~{name}" for name in queues), "~celeryev.*"]
        keys += [f"~_kombu.binding{rest}" for rest in ("*.celeryev", "*.reply.celery.pidbox", "_deadlines")]
        channels = [f"&{events}"]
    return " ".join(["resetkeys", *keys, "resetchannels", *channels, "-@all", *(f"+{command}" for command in COMMANDS[role])])
