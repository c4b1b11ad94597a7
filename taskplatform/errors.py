"""Every exception that the platform raises on purpose.

    TaskPlatformError
    ├── SettingsError          a setting is unknown, missing or has a bad value
    ├── CatalogueError         one or more faults in the definition files; `.faults` lists them
    ├── InvalidInput           an argument is not acceptable (also a ValueError)
    ├── NotFound               something that was named does not exist (also a LookupError)
    │   ├── UnknownDefinition
    │   ├── UnknownUser
    │   ├── UnknownSubscription
    │   ├── UnknownJob
    │   └── UnknownWorker
    ├── Conflict               the state of the thing forbids the operation
    │   └── InvalidTransition  a job cannot go from its state to the one asked for
    ├── StoreError             Redis refused the operation or cannot be used as it is configured
    │   ├── StoreUnavailable   Redis cannot be used for now; `.outage` says why, and it passes when the server is well again
    │   │   └── ApiUnavailable the same of the control API, where the platform is used over that
    │   └── ApiError           the control API does not accept the key, or what answers is none
    ├── Forbidden              the key that was shown to the control API has not the scope that this takes
    └── HttpError              a call to a target did not complete; see `taskplatform.http`

A message says what was wrong, where, and what is accepted. Secrets never appear in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class TaskPlatformError(Exception):
    """Root of all errors of the platform."""


class SettingsError(TaskPlatformError):
    """A setting is unknown, missing or has a bad value."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in a definition file. `line` counts from 1; 0 means the file as a whole."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


class CatalogueError(TaskPlatformError):
    """Faults in the definition files; all of them, not just the first."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class InvalidInput(TaskPlatformError, ValueError):
    """An argument is not acceptable. `field` is its name, where one argument alone is at fault."""

    def __init__(self, *args: object, field: str = "") -> None:
        super().__init__(*args)
        self.field = field


class NotFound(TaskPlatformError, LookupError):
    """Something that was named does not exist."""


class UnknownDefinition(NotFound):
    """No definition has this id."""


class UnknownUser(NotFound):
    """No user has this id."""


class UnknownSubscription(NotFound):
    """This user is not subscribed to this definition."""


class UnknownJob(NotFound):
    """No job has this id, or its record is past its retention."""


class UnknownWorker(NotFound):
    """No worker has this id."""


class UnknownBackfill(NotFound):
    """No backfill has this id, or its record is past its retention."""


class Conflict(TaskPlatformError):
    """The state of the thing forbids the operation."""


class InvalidTransition(Conflict):
    """A job cannot go from the state that it is in to the one asked for."""


class StoreError(TaskPlatformError):
    """Redis refused the operation or cannot be used as it is configured."""


class Outage(StrEnum):
    """Why Redis cannot be used for now."""

    UNREACHABLE = "unreachable"
    """No connection, or no answer in time."""
    UNTRUSTED = "untrusted"
    """Its certificate is not one that we accept for its name."""
    CLIENTS = "clients"
    """It takes no more connections."""
    LOADING = "loading"
    """It reads its data after a start."""
    READ_ONLY = "read-only"
    """It is a replica."""
    MEMORY = "memory"
    """It is at its maxmemory."""
    DISK = "disk"
    """It cannot write its data to disk."""
    BUSY = "busy"
    """A script runs for too long."""
    SCRIPTS = "scripts"
    """It forgot a script (SCRIPT FLUSH) that had just been given to it."""
    REPLICAS = "replicas"
    """It has not the replicas, or its master, that it is to have."""


class StoreUnavailable(StoreError):
    """Redis cannot be used for now. Nothing was changed, or the answer was lost; the same call succeeds when the server is well again."""

    def __init__(self, message: str, outage: Outage = Outage.UNREACHABLE) -> None:
        super().__init__(message)
        self.outage = outage

    def __reduce__(self) -> tuple[type[StoreUnavailable], tuple[str, Outage]]:
        return type(self), (str(self), self.outage)


class ApiUnavailable(StoreUnavailable):
    """The control API cannot be used for now, or its answer was lost."""


class ApiError(StoreError):
    """The control API does not accept the key, or what answers is none."""


class Forbidden(TaskPlatformError):
    """The key that was shown to the control API has not the scope that this takes."""


class HttpError(TaskPlatformError):
    """A call to a target did not complete."""
