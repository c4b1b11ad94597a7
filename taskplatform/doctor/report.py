"""What the doctor found, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"
    UNKNOWN = "unknown"
    """It could not be made; `reason` says why."""
    SKIPPED = "skipped"
    """There was nothing to look at, or it was not asked for."""


class Severity(StrEnum):
    """How bad a finding is."""

    CRITICAL = "critical"
    """Work stands still, or a promise of the platform does not hold."""
    WARNING = "warning"
    """It will, if nobody does anything; or somebody may do more than they should."""
    INFO = "info"
    """Good to know. It does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    code: str
    """Stays the same over versions; one code can come several times, for different subjects."""
    severity: Severity
    subject: str
    """What it is about: a worker, a definition, a host, a file; "" where that is clear from the check."""
    what: str
    """What was found, in a sentence."""
    why: str
    """Why that matters."""
    mend: str
    """The command, or the setting, that mends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check."""

    check: str
    state: State
    seen: str
    """What it looked at, in a few words."""
    reason: str
    """Why it was not made, or not to its end; "" where it was."""
    findings: tuple[Finding, ...]
    """The worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One visit."""

    at_ms: int
    """By the clock of this machine."""
    results: tuple[Result, ...]

    @property
    def state(self) -> State:
        """The worst of all, where what is not known is less bad than a warning."""
        states = {one.state for one in self.results}
        return next((state for state in (State.CRITICAL, State.WARNING, State.UNKNOWN) if state in states), State.OK)

    @property
    def exit_code(self) -> int:
        """As monitoring plugins have it: 0 fine, 1 warning, 2 critical, 3 unknown."""
        return EXIT_CODES[self.state]


EXIT_CODES: Mapping[State, int] = {State.OK: 0, State.WARNING: 1, State.CRITICAL: 2, State.UNKNOWN: 3}
