"""Every key name of the platform in Redis, in one place, and what lies under it.

Scripts get the same names: `lua_table` renders them as the table `K` that stands before each script. All keys of a
namespace lie in one Redis database, beside the broker's queues, because a script must touch both.

Instants are milliseconds since the epoch. `<gid>` names a group: a definition's id for the default schedule,
`<definition>~<digest>` for an own one. `<oid>` names an opened occurrence: `<gid>|<suffix>`.
"""

from __future__ import annotations

from taskplatform.model import TRANSITIONS, Priority

#: Name → what follows the namespace. A name that ends in ":" is a prefix that an id completes.
NAMES = {
    # users and subscriptions
    "users": "users",  # sorted set, all scores 0: user ids in order
    "user": "user:",  # hash: @created, @paused, @name, and by definition id the subscription as JSON
    # what beat plans
    "definitions": "definitions",  # set of ids that are published
    "definition": "definition:",  # hash: what the scripts need to know of a definition
    "groups": "groups:",  # by definition, set of <gid>
    "group": "group:",  # by <gid>, hash: definition, schedule, cursor
    "slots": "slots:",  # by <gid>, sorted set: user → slot
    "subscribers": "subscribers",  # hash: definition → how many
    "due": "due",  # sorted set: "g|<gid>" or "o|<oid>" → when the planner must look at it
    "occurrence": "occurrence:",  # by <oid>, hash: an opened or skipped occurrence and how far it is planned
    "open": "open:",  # by <gid>, set of <oid> that are being planned
    "occurrences": "occurrences:",  # by definition, sorted set: <oid> → its time
    "closed": "closed",  # sorted set: <oid> → when it was done, for the retention
    "planner": "planner",  # hash: horizon, term, up to where anything was planned, and what the leading planner last did
    # jobs
    "seq": "seq",  # counter: order of submission
    "job": "job:",  # hash, see store.jobs
    "history": "history:",  # by job id, list of transitions as JSON arrays
    "user_jobs": "userjobs:",  # by user, sorted set: job id → created
    "definition_jobs": "jobs:",  # by definition, sorted set: job id → created
    "unfinished": "unfinished:",  # by definition with overlap=skip, hash: user → number of unfinished jobs
    "finished": "finished",  # sorted set: job id → when, for the retention
    "counts": "counts",  # hash: how many jobs ever entered each state
    # the waiting set
    "lane": "lane:",  # by "<priority>:<definition>", sorted set: "<seq>:<job id>" → execute_after
    "ready": "ready:",  # by priority, sorted set: definition → execute_after of its lane's head
    "blocked": "blocked:",  # by priority, sorted set: definition → when its lane may go on (inf: paused)
    "held": "held:",  # by user, set of job ids that wait for a pause to end
    "limit": "limit:",  # by limit, when it was last taken and how far ahead the theoretical arrival time of GCRA lay, in ms
    "limits": "limits",  # hash: "global" → JSON of its rate and burst
    # delivery
    "queued": "queued:",  # by priority, sorted set: job id → when it was released
    "active": "active",  # sorted set: job id → when it started
    "workers": "workers",  # sorted set: worker → last heartbeat
    "worker": "worker:",  # hash: slots, queues, host, pid, …
    "worker_jobs": "workerjobs:",  # by worker, set of job ids that it runs
    "stops": "stops:",  # by worker, list of "<job id>#<delivery>" that it shall stop
    "capacity": "capacity",  # hash: priority → how many jobs its queue may hold; "<higher>><lower>" → share of the slots
    # what people changed
    "changes": "changes",  # stream, bounded
}

#: The broker's own keys, which kombu names: queues are lists named as the priorities.
UNACKED = "unacked"
UNACKED_INDEX = "unacked_index"


def key(namespace: str, name: str, part: str = "") -> str:
    """The key called `name` in `namespace`, for the id `part`."""
    return f"{namespace}:{NAMES[name]}{part}"


def lua_table(namespace: str) -> str:
    """Lua source that gives the scripts these names, the priorities in order, and the allowed transitions."""
    keys = ", ".join(f"{name} = '{key(namespace, name)}'" for name in NAMES)
    priorities = ", ".join(f"'{priority}'" for priority in Priority)
    allowed = ", ".join(
        f"['{origin or ''}'] = {{{', '.join(f'{target} = true' for target in sorted(targets))}}}" for origin, targets in TRANSITIONS.items()
    )
    return (
        f"local K = {{{keys}, unacked = '{UNACKED}', unacked_index = '{UNACKED_INDEX}'}}\n"
        f"local PRIORITIES = {{{priorities}}}\n"
        f"local ALLOWED = {{{allowed}}}\n"
    )
