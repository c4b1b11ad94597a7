"""What the platform keeps in Redis, behind the domain's verbs. Nothing outside this package issues a Redis command.

Each verb that changes something is one Lua script, so that a job's state, its history, the waiting set and the broker's queues
never disagree, whatever dies between two calls. Times are milliseconds since the epoch by the server's clock.
"""

from taskplatform.store.backfills import BACKFILL_COUNTS, Backfill, BackfillState
from taskplatform.store.connection import LockLost, connect, unavailable
from taskplatform.store.evidence import Background, Entry, Evidence, Forgotten, Membership, Outage, Seen, Standing
from taskplatform.store.figures import DefinitionCounts, Figures, Histogram
from taskplatform.store.keys import BOUNDS_MS
from taskplatform.store.levels import LOG_LEVELS, LogLevel, LogLevels
from taskplatform.store.outlook import KnownDefinition, KnownGroup, OpenBackfill, OpenOccurrence, Outlook, Waiting
from taskplatform.store.records import (
    Beat,
    Breaker,
    BreakerState,
    Change,
    Commitment,
    DeadLetterResult,
    DueItem,
    Enqueue,
    Garbage,
    Group,
    LimitState,
    Newer,
    Occurrence,
    Opening,
    Orders,
    Page,
    PublishedDefinition,
    Renewal,
    Start,
    Stop,
    Subscribe,
    SubscribeResult,
    Vitals,
    Worker,
    commitment_of,
)
from taskplatform.store.samples import EVERY as SAMPLE_EVERY
from taskplatform.store.samples import Sample
from taskplatform.store.store import Store

__all__ = [
    "BACKFILL_COUNTS",
    "BOUNDS_MS",
    "LOG_LEVELS",
    "SAMPLE_EVERY",
    "Backfill",
    "BackfillState",
    "Background",
    "Beat",
    "Breaker",
    "BreakerState",
    "Change",
    "Commitment",
    "DeadLetterResult",
    "DefinitionCounts",
    "DueItem",
    "Enqueue",
    "Entry",
    "Evidence",
    "Figures",
    "Forgotten",
    "Garbage",
    "Group",
    "Histogram",
    "KnownDefinition",
    "KnownGroup",
    "LimitState",
    "LockLost",
    "LogLevel",
    "LogLevels",
    "Membership",
    "Newer",
    "Occurrence",
    "OpenBackfill",
    "OpenOccurrence",
    "Opening",
    "Orders",
    "Outage",
    "Outlook",
    "Page",
    "PublishedDefinition",
    "Renewal",
    "Sample",
    "Seen",
    "Standing",
    "Start",
    "Stop",
    "Store",
    "Subscribe",
    "SubscribeResult",
    "Vitals",
    "Waiting",
    "Worker",
    "commitment_of",
    "connect",
    "unavailable",
]
