"""Celery's results, read from the ledger: `delay(user=…).state` and `.get()` work, and nothing is recorded twice."""

from __future__ import annotations

from typing import Any

from celery import states
from celery.backends.base import BaseBackend

from taskplatform.errors import UnknownJob
from taskplatform.model import JobState

_STATES = {
    JobState.PENDING: states.PENDING,
    JobState.QUEUED: states.PENDING,
    JobState.ASSIGNED: states.RECEIVED,
    JobState.RUNNING: states.STARTED,
    JobState.RETRYING: states.RETRY,
    JobState.COMPLETED: states.SUCCESS,
    JobState.FAILED: states.FAILURE,
    JobState.TIMED_OUT: states.FAILURE,
    JobState.REJECTED: states.FAILURE,
    JobState.CANCELED: states.REVOKED,
}


class LedgerBackend(BaseBackend):  # type: ignore[misc]
    """A result backend that only reads.

    The result of a completed job is what its history keeps of it: status, duration_ms and excerpt. `.get()` on one that did not
    complete raises JobFailed with the reason.
    """

    #: Nothing is stored, so nothing has to be cleaned up.
    supports_autoexpire = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from taskplatform.app import JobFailed, platform  # the application is made before its backend

        super().__init__(*args, **kwargs)
        self._platform = platform
        self._failure = JobFailed

    def store_result(self, task_id: str, result: Any, state: str, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        """The scripts record what becomes of a job."""
        return result

    def as_uri(self, include_password: bool = False) -> str:  # noqa: ARG002
        """What Celery shows as its results."""
        return "ledger://"

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        try:
            history = self._platform().history(task_id)
        except UnknownJob:
            return {"status": states.PENDING, "result": None}
        last = history[-1]
        state = _STATES[last.to_state]
        result: Any = dict(last.detail) if state == states.SUCCESS else None
        if state in (states.FAILURE, states.REVOKED):
            result = self._failure(last.reason)
        return {"status": state, "result": result, "task_id": task_id, "traceback": None, "children": []}
