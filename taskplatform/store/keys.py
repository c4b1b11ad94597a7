"""Every key name of the platform in Redis, in one place, and what lies under it.

Scripts get the same names: `lua_table` renders them as the table `K` that stands before each script. All keys of a
namespace lie in one Redis database, beside the broker's queues, because a script must touch both.

Instants are milliseconds since the epoch. `<gid>` names a group: a definition's id for the default schedule,
`<definition>~<digest>` for an own one. `<oid>` names an opened occurrence: `<gid>|<suffix>`.
"""

from __future__ import annotations

from taskplatform.model import BREAKER_LONGEST_PAUSE, BREAKER_PROBES, BREAKER_TURN_MS, POISON_PILL, START_SLACK_MS, TRANSITIONS, Priority

#: Name → what follows the namespace. A name that ends in ":" is a prefix that an id completes.
NAMES = {
    # users and subscriptions
    "users": "users",  # sorted set, all scores 0: user ids in order
    "user": "user:",  # hash: @created, @paused, @name, and by definition id the subscription as JSON
    # what beat plans
    "definitions": "definitions",  # set of ids that are published
    "unannounced": "unannounced",  # set of ids that are published and not yet in the change log
    "following": "following",  # hash: definition whose waiting jobs do not all have its new priority yet → that priority
    "definition": "definition:",  # hash: what the scripts need to know of a definition
    "groups": "groups:",  # by definition, set of <gid>
    "group": "group:",  # by <gid>, hash: definition, schedule, cursor
    "slots": "slots:",  # by <gid>, sorted set: user → slot
    "subscribers": "subscribers",  # hash: definition → how many
    "due": "due",  # sorted set: "g|<gid>", "o|<oid>" or "b|<backfill>" → when the planner must look at it
    "occurrence": "occurrence:",  # by <oid>, hash: an opened or skipped occurrence and how far it is planned
    "open": "open:",  # by <gid>, set of <oid> that are being planned
    "committed": "committed",  # hash: <oid> of an open occurrence → "<start of its window> <window> <subscribers>"
    "occurrences": "occurrences:",  # by definition, sorted set: <oid> → its time
    "closed": "closed",  # sorted set: <oid> → when it was done, for the retention
    "planner": "planner",  # hash: horizon, term, reach, what it last did and what fails, widened windows, see Store.planner
    "beats": "beats",  # hash: beat → "<digest of what it would publish> <its number> <last seen> <1: leads> <since>"
    "beat_info": "beat_info",  # hash: beat → what it tells of itself, as JSON
    "triggers": "triggers",  # sorted set: "<definition>:<digest of a caller's key>" → the time of its trigger
    # backfills
    "backfills": "backfills",  # sorted set: id of a backfill → when it was begun
    "backfill": "backfill:",  # by id, hash: what was asked for, state, cursor, counts; see store.backfills
    "backfill_users": "backfillusers:",  # by id, sorted set: user → slot, where users were given; not once it has ended
    "backfill_jobs": "backfilljobs:",  # by id, sorted set: job id that it made and that is not finished → when it was made
    "backfills_ended": "backfills_ended",  # sorted set: id → when it ended, for the retention
    "server": "server",  # the run id of the Redis server that this data was last used on
    # jobs
    "seq": "seq",  # counter: order of submission
    "job": "job:",  # hash, see store.jobs; a planned job that waits has a packed record instead
    "planned": "planned:",  # by "<definition>:<suffix>", hash: user → packed record of a job that was planned and still waits
    "planned_suffixes": "planned_suffixes:",  # by definition, set of the suffixes under which there are packed records
    "history": "history:",  # by job id, list of transitions as JSON arrays
    "user_jobs": "userjobs:",  # by user, sorted set: job id → created; without the packed ones
    "definition_jobs": "jobs:",  # by definition, sorted set: job id → created
    "unfinished": "unfinished:",  # by definition with overlap=skip, hash: user → number of unfinished jobs
    "finished": "finished",  # sorted set: job id → when, for the retention
    "dead": "dead",  # sorted set: job id of a dead letter → when it died; such a job is not in "finished"
    "counts": "counts",  # hash: how many jobs ever entered each state; "assigned" is counted as "running"
    # the waiting set
    "lane": "lane:",  # by "<priority>:<definition>", sorted set: "<seq>:<job id>" → execute_after
    "ready": "ready:",  # by priority, sorted set: definition → execute_after of its lane's head
    "turn": "turn:",  # with fairness, by "<priority>:<definition>", sorted set: "<seq>:<job id>" that is due → its round
    "turns": "turns:",  # with fairness, by priority, sorted set: definition → round of its first
    "rounds": "rounds:",  # with fairness, by priority, sorted set: user → round of the user's last job
    "round": "round",  # with fairness, hash: priority → the round that is being served
    "blocked": "blocked:",  # by priority, sorted set: definition → when its lane may go on (inf: paused; see lib.lua)
    "gates": "gates",  # sorted set: host that has to wait → until when
    "gated": "gated:",  # by "<priority>:<host>", sorted set: definition that waits for the host → its first job's place
    "held": "held:",  # by user, set of job ids that wait for a pause to end
    "delays": "delays",  # sorted set: job id that waits for a span, as a retry → when that began
    "capped": "capped:",  # by "<priority>:<user>", sorted set: "<seq>:<job id>" set aside for the user's cap → execute_after
    "capped_users": "cappedusers",  # set of users who have such
    "shares": "shares",  # hash: priority → what it is owed of its guaranteed share, in jobs
    # limits; a limit's name is "total", "definition:<id>", "host:<host>", "user" or "user:<id>"
    "limits": "limits",  # hash: limit in force → "<rate per second> <burst> <concurrency>", "-" for none
    "limits_live": "limits:live",  # hash: the same, as set by API or command line; wins over
    "limits_configured": "limits:configured",  # hash: the same, from settings and definitions
    "limit": "limit:",  # by limit, its token bucket: "<at ms> <level> <reserved>"
    # hosts that are called
    "breakers": "breakers",  # hash: host that is held back → why, until when and who probes it, as JSON, see lib.lua
    "calls": "calls:",  # by host that failed of late: "<since> <half window> <calls> <failures> <calls before> <failures before>"
    "inflight": "inflight",  # hash: limit with a concurrency → jobs released and not ended
    "options": "options",  # hash: fairness, share, retention (ms)
    # delivery
    "queued": "queued:",  # by priority, sorted set: job id → when it was released
    "active": "active",  # sorted set: job id → when it started
    "workers": "workers",  # sorted set: worker → last heartbeat
    "worker": "worker:",  # hash: slots, queues, drained, host, pid, …
    "worker_jobs": "workerjobs:",  # by worker, set of job ids that it runs
    "stops": "stops:",  # by worker, hash: "<job id>#<delivery>" that it shall stop → why ("" canceled)
    "capacity": "capacity",  # hash: priority → how many jobs its queue may hold; "<higher>><lower>" → share of the slots
    # what happened and should be rare
    "counters": "counters",  # hash: what happened → how often
    "samples": "samples",  # stream, bounded: how much waits, is due and is kept, minute by minute, see store.samples
    "garbage": "garbage",  # stream, bounded: what came out of a queue and was no message
    # who may use the API, and what they did
    "api_keys": "apikeys",  # sorted set: id of an API key → when it was made
    "api_key": "apikey:",  # by id, hash: name, digest of its token, scopes, created, by, lifetime, expires, used, revoked
    "sessions": "sessions:",  # by id of an API key, sorted set, bounded: digest of what a browser shows → until when; it expires
    "attempts": "attempts",  # sorted set, bounded: "<address>" or "<address> none" that failed to come in → until when that counts
    "attempts_beyond": "attempts_beyond",  # hash: the same → how often beyond what it may, and not told yet
    "audit": "audit:",  # by kind, stream, bounded
    # processes that log more or less than they would
    "log_levels": "loglevels",  # hash: "*", a role, a node or a process → "<level> <until> <actor>"; it expires
    # the control API
    "answer": "answer:",  # by digest of a caller's Idempotency-Key, JSON: what was asked with it, and the answer; it expires
    # for metrics
    "stats": "stats:",  # by definition, hash: how jobs and runs ended, see `BOUNDS_MS`
    "lags": "lags:",  # by priority, hash: how long after they were due jobs started, see `BOUNDS_MS`
    # what people changed
    "changes": "changes",  # stream, bounded
    # what `why` is told from; each for as long as finished jobs are kept, see `trail` in lib.lua
    "trail": "trail:",  # by user, hash: definition, or @ for the user → what changed; it expires
    "definition_trails": "definitiontrails",  # hash: definition → what changed
    "gone": "gone:",  # by user, sorted set: a dead letter that was forgotten before its time, as JSON → when; it expires
    "skipped": "skipped:",  # by <gid>, sorted set: <oid> of a record for many occurrences → the time of the last
    "triggered": "triggered:",  # by definition, sorted set: time of a trigger → the same; it expires
    "outages": "outages",  # sorted set: a time in which nothing, or something, was not planned, as JSON → its end
}

#: The buckets of the histograms in "stats" and "lags": a span counts in the first whose upper bound in ms is not below it, else in "inf";
#: the field "ms" is the sum. A release may have others: what older ones counted stays. "lags" has a field for each bucket. "stats" has
#: "<priority>|<state>|<bucket>" for runs by how they ended, "<priority>|retrying|late|<bucket>" for those that a time limit ended and
#: that are tried again, "<priority>|<state>" for jobs that ended otherwise, and "lost".
BOUNDS_MS = (10, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 1_800_000)

#: The broker's own keys, which kombu names: queues are lists named as the priorities.
UNACKED = "unacked"
UNACKED_INDEX = "unacked_index"


def key(namespace: str, name: str, part: str = "") -> str:
    """The key called `name` in `namespace`, for the id `part`."""
    return f"{namespace}:{NAMES[name]}{part}"


def lua_table(namespace: str) -> str:
    """Lua source that gives the scripts these names, the priorities in order, the allowed transitions and the constants."""
    keys = ", ".join(f"{name} = '{key(namespace, name)}'" for name in NAMES)
    priorities = ", ".join(f"'{priority}'" for priority in Priority)
    allowed = ", ".join(
        f"['{origin or ''}'] = {{{', '.join(f'{target} = true' for target in sorted(targets))}}}" for origin, targets in TRANSITIONS.items()
    )
    return (
        f"local K = {{{keys}, unacked = '{UNACKED}', unacked_index = '{UNACKED_INDEX}'}}\n"
        f"local PRIORITIES = {{{priorities}}}\n"
        f"local ALLOWED = {{{allowed}}}\n"
        f"local SLACK = {START_SLACK_MS}\n"
        f"local PROBES = {BREAKER_PROBES}\n"
        f"local PROBE_TURN = {BREAKER_TURN_MS}\n"
        f"local LONGEST_PAUSE = {BREAKER_LONGEST_PAUSE}\n"
        f"local BOUNDS = {{{', '.join(map(str, BOUNDS_MS))}}}\n"
        f"local POISON = '{POISON_PILL}'\n"
    )
