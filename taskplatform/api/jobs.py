"""Jobs and dead letters."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import quote

from fastapi import Path, Query
from fastapi.responses import Response

from taskplatform.api import problem
from taskplatform.api.call import Administers, Call, Reads, Submits, in_body
from taskplatform.api.records import (
    Batch,
    BatchItem,
    BatchResult,
    BatchResults,
    BreakerRecord,
    DeadFilter,
    DeadLetter,
    Discarded,
    HeldBack,
    History,
    JobPage,
    JobRecord,
    NewPriority,
    OneJob,
    ProblemRecord,
    Redriven,
    Submission,
    TransitionRecord,
    WaitsRecord,
)
from taskplatform.api.routing import MOST_LOOKED_AT, Cursor, PageSize, Routes, Since, Until, cursor_of, token_of
from taskplatform.errors import InvalidInput, TaskPlatformError, UnknownDefinition, UnknownJob, UnknownUser
from taskplatform.model import DEFINITION_ID, USER_ID, Job, JobState
from taskplatform.platform import DeadFilters, JobRequest
from taskplatform.store import Page

jobs = Routes("jobs")
dead = Routes("dead letters")

#: Ids of a batch that the audit log names: a line of it is not longer.
MOST_NOTED = 20

_JOB_ID = re.compile(rf"{DEFINITION_ID.pattern}:{USER_ID.pattern}:[a-z]?[0-9a-f]{{1,64}}")
JobId = Annotated[str, Path(max_length=300, description="as `id` of a job", examples=["daily_user_report:u1:1800057600000"])]
UserFilter = Annotated[str | None, Query(description="of this user")]
DefinitionFilter = Annotated[str | None, Query(description="of this definition")]


def known_job(job_id: str) -> str:
    """What has not the form of an id is none of a job."""
    if not _JOB_ID.fullmatch(job_id):
        raise UnknownJob(f"no job {job_id!r}: it never was, or its record is past the retention")
    return job_id


def _page(page: Page[Job]) -> JobPage:
    return JobPage(items=[JobRecord.model_validate(job) for job in page.items], next=token_of(page.cursor))


def _request(item: Submission, key: str | None) -> JobRequest:
    given = {name: getattr(item, name) for name in ("definition", "user", "params", "countdown", "eta", "priority")}
    return JobRequest(**given, idempotency_key=key)


@jobs("POST", "/jobs", JobRecord, takes=Submission, status=201)
def submit_job(call: Submits) -> Response:
    """Submit a job.

    The same Idempotency-Key for the same definition and user gives the same job for as long as it is kept.
    """
    body = call.read(Submission)
    call.note(definition=body.definition, user=body.user)

    def act() -> Response:
        with in_body(user=UnknownUser, definition=UnknownDefinition), call.traced():
            (job,) = call.platform.enqueue_many([_request(body, call.key_for_platform)])
        call.note(job=job.id)
        return call.answer(JobRecord.model_validate(job), 201, headers={"Location": f"/v1/jobs/{quote(job.id, safe=':@')}"})

    return call.once(act)


@jobs("POST", "/jobs/batch", BatchResults, takes=Batch)
def submit_jobs(call: Submits) -> Response:
    """Submit many jobs, each on its own: what is wrong with one holds back no other."""
    body = call.read(Batch)
    key = call.key_for_platform

    def key_of(place: int, item: BatchItem) -> str | None:
        return item.idempotency_key or (None if key is None else f"{key}:{place}")

    def act() -> Response:
        with call.traced():
            made = call.platform.enqueue_each([_request(item, key_of(place, item)) for place, item in enumerate(body.items)])
        ids = [one.id for one in made if isinstance(one, Job)]
        call.note(made=f"{len(ids)}/{len(made)}", jobs=ids[:MOST_NOTED])
        return call.answer(BatchResults(items=[_result(place, one) for place, one in enumerate(made)]))

    return call.once(act)


def _result(place: int, made: Job | TaskPlatformError) -> BatchResult:
    if isinstance(made, Job):
        return BatchResult(status=201, job=JobRecord.model_validate(made))
    field = made.field if isinstance(made, InvalidInput) else "user" if isinstance(made, UnknownUser) else "definition"
    return BatchResult(status=422, problem=problem_of_item(place, field, made))


def problem_of_item(place: int, field: str, fault: TaskPlatformError) -> ProblemRecord:
    """What is wrong with one of a batch."""
    found = problem.invalid([("pointer", problem.pointer(("items", place, *filter(None, [field]))), str(fault))])
    return ProblemRecord(
        type="about:blank",
        title=found.title,
        status=found.status,
        detail=found.detail,
        errors=found.more["errors"],
        kind=problem.kind_of(fault),
    )


@jobs("GET", "/jobs", JobPage, faults=(404,))
def list_jobs(
    call: Reads,
    user: UserFilter = None,
    definition: DefinitionFilter = None,
    state: Annotated[list[JobState] | None, Query(description="in one of these states; repeatable")] = None,
    since: Since = None,
    until: Until = None,
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    """List jobs by when they were made, the newest first.

    Pages are stable while jobs come and go: none comes twice, none that stays is left out. A page may be short, or empty, and yet have
    a `next`: that of a rare state is looked for page by page.
    """
    platform = call.platform
    if user is not None:
        platform.user(user)
    found = platform.jobs(
        user=user,
        definition=definition,
        state=state,
        since=since,
        until=until,
        cursor=cursor_of(cursor),
        limit=limit,
        scan=MOST_LOOKED_AT,
    )
    return call.answer(_page(found))


@jobs("GET", "/jobs/{job_id}", OneJob, faults=(404,))
def get_job(call: Reads, job_id: JobId) -> Response:
    """Get a job, and of one that waits what holds it back, by whom, and behind how many it is."""
    job = call.platform.job(known_job(job_id))
    waits = call.platform.waits(job)
    record = JobRecord.model_validate(job)
    return call.answer(OneJob.model_construct(**dict(record), waits=None if waits is None else WaitsRecord.model_validate(waits)))


@jobs("GET", "/jobs/{job_id}/history", History, faults=(404,))
def get_history(call: Reads, job_id: JobId) -> Response:
    """Get every transition of a job, with when, attempt, worker and reason."""
    return call.answer(History(items=_history(call, job_id)))


@jobs("GET", "/jobs/{job_id}/held-back", HeldBack, faults=(404,))
def get_held_back(call: Reads, job_id: JobId) -> Response:
    """Get the host for which a due job waits, where that is held back."""
    breaker = call.platform.held_back(call.platform.job(known_job(job_id)))
    return call.answer(HeldBack(breaker=None if breaker is None else BreakerRecord.model_validate(breaker)))


@jobs("POST", "/jobs/{job_id}/cancel", JobRecord, faults=(404,))
def cancel_job(call: Submits, job_id: JobId) -> Response:
    """Cancel a job that has not ended. One that waits never starts; one that runs is stopped, or its result discarded."""
    return call.once(lambda: _answer(call, call.platform.cancel(known_job(job_id))))


@jobs("POST", "/jobs/{job_id}/retry", JobRecord, faults=(404,))
def retry_job(call: Submits, job_id: JobId) -> Response:
    """Run a job again that failed, timed out, was rejected or canceled."""
    return call.once(lambda: _answer(call, call.platform.retry(known_job(job_id))))


@jobs("PUT", "/jobs/{job_id}/priority", JobRecord, takes=NewPriority, faults=(404, 409))
def set_priority(call: Submits, job_id: JobId) -> Response:
    """Give a job that waits another priority. It keeps its place among those of its time."""
    priority = call.read(NewPriority).priority
    call.note(priority=priority)
    return _answer(call, call.platform.set_priority(known_job(job_id), priority))


def _answer(call: Call, job: Job) -> Response:
    return call.answer(JobRecord.model_validate(job))


def _history(call: Call, job_id: str) -> list[TransitionRecord]:
    return [TransitionRecord.model_validate(line) for line in call.platform.history(known_job(job_id))]


# --- dead letters ----------------------------------------------------------------------------------------------------


@dead("GET", "/dead-letters", JobPage)
def list_dead_letters(
    call: Reads,
    user: UserFilter = None,
    definition: DefinitionFilter = None,
    since: Since = None,
    reason: Annotated[str, Query(max_length=500, description='its reason contains this, such as "poison pill"')] = "",
    limit: PageSize = 100,
    cursor: Cursor = None,
) -> Response:
    """List jobs that failed or timed out for good, the newest first, in stable pages."""
    found = call.platform.dead_letters(
        user=user, definition=definition, since=since, reason=reason, cursor=cursor_of(cursor), limit=limit, scan=MOST_LOOKED_AT
    )
    return call.answer(_page(found))


@dead("GET", "/dead-letters/{job_id}", DeadLetter, faults=(404,))
def get_dead_letter(call: Reads, job_id: JobId) -> Response:
    """Get a dead letter and its history."""
    job = call.platform.job(known_job(job_id))
    if job.state not in (JobState.FAILED, JobState.TIMED_OUT):
        raise UnknownJob(f"job {job_id} is {job.state} and no dead letter")
    record = JobRecord.model_validate(job)
    return call.answer(DeadLetter.model_construct(**dict(record), history=_history(call, job_id)))


@dead("POST", "/dead-letters/{job_id}/redrive", JobRecord, faults=(404,))
def redrive(call: Submits, job_id: JobId) -> Response:
    """Run a dead letter again, with a fresh budget of retries. It keeps its id, and so its Idempotency-Key at the target."""
    return call.once(lambda: _answer(call, call.platform.redrive(known_job(job_id))))


@dead("DELETE", "/dead-letters/{job_id}", None, faults=(404, 409))
def discard(call: Administers, job_id: JobId) -> Response:
    """Forget a dead letter and its history; nothing, where there is none any more. The change log keeps that it was done."""
    call.platform.discard(known_job(job_id))
    return call.answer(None)


@dead("POST", "/dead-letters/redrive", Redriven, takes=DeadFilter)
def redrive_some(call: Administers) -> Response:
    """Run dead letters again that all filters fit: of them the newest `limit`."""
    body, filters = _filter(call)

    def act() -> Response:
        redriven, left, cursor = call.platform.redrive_page(filters, cursor=cursor_of(body.cursor), limit=body.limit)
        call.note(redriven=redriven)
        return call.answer(Redriven(redriven=redriven, left=left, next=token_of(cursor)))

    return call.once(act)


@dead("POST", "/dead-letters/discard", Discarded, takes=DeadFilter)
def discard_some(call: Administers) -> Response:
    """Forget dead letters that all filters fit: of them the newest `limit`."""
    body, filters = _filter(call)

    def act() -> Response:
        discarded, cursor = call.platform.discard_page(filters, cursor=cursor_of(body.cursor), limit=body.limit)
        call.note(discarded=discarded)
        return call.answer(Discarded(discarded=discarded, next=token_of(cursor)))

    return call.once(act)


def _filter(call: Call) -> tuple[DeadFilter, DeadFilters]:
    """The body, and what it selects. Nobody redrives or discards everything by forgetting a word."""
    body = call.read(DeadFilter)
    call.note(user=body.user, definition=body.definition, since=body.since and body.since.isoformat(), all=body.all, limit=body.limit)
    filters = DeadFilters(user=body.user, definition=body.definition, since=body.since, reason=body.reason)
    if (filters != DeadFilters()) == bool(body.all):
        raise problem.invalid([("pointer", "", "give filters (user, definition, since, reason), or all: true")])
    return body, filters
