"""What a chaos run leaves to be judged: what the target saw, what was asked for, what the platform says, and what was done to it.

All instants are milliseconds since the epoch by this machine's clock, which is that of the server, the target and the caller alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from taskplatform.model import Job, JobState, Limit, Transition


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the target saw it."""

    job: str
    key: str
    node: str
    """The worker that made it, as its environment says."""
    arrived_ms: int
    ended_ms: int
    status: int
    """0: the target hung up without an answer."""
    sent: bool
    """Whether the answer could be sent."""

    @property
    def succeeded(self) -> bool:
        return self.status == 200 and self.sent


@dataclass(frozen=True, slots=True)
class Expected:
    """A job that must exist, or may."""

    id: str
    not_before_ms: int
    must: bool = True
    may_be_canceled: bool = False
    must_be_canceled: bool = False
    poison: bool = False
    """It takes its process down each time, and must fail for that."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit that was in force over a whole span, over all jobs of these definitions together."""

    name: str
    limit: Limit
    start_ms: int
    end_ms: int
    definitions: frozenset[str]


@dataclass(frozen=True, slots=True)
class FaultDone:
    """A fault that was made."""

    kind: str
    at_ms: int
    victim: str = ""
    until_ms: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of one run, after it has drained."""

    expected: Mapping[str, Expected]
    jobs: Mapping[str, Job]
    histories: Mapping[str, Sequence[Transition]]
    calls: Sequence[Call]
    rules: Sequence[Rule] = ()
    pauses: Sequence[tuple[str, int, int]] = ()
    """(definition, from, to): it was paused for certain."""
    held_back: frozenset[str] = frozenset()
    """Definitions that have limits or pauses of their own: they may wait while others go."""
    max_losses: int = 3
    faults: Sequence[FaultDone] = ()
    disagreements: Sequence[str] = field(default_factory=tuple)
    """What the database, the API's answers or the processes showed by themselves."""


def definition_of(job_id: str) -> str:
    """The definition's name stands first in a job's id."""
    return job_id.split(":", 1)[0]


FINISHED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.TIMED_OUT, JobState.CANCELED, JobState.REJECTED})
