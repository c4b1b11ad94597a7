"""Definitions, limits, processes, and how the platform is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from fastapi.responses import Response

from taskplatform.api import problem
from taskplatform.api.call import Administers, Call, Reads
from taskplatform.api.growth import warnings_of_resume
from taskplatform.api.people import DefinitionName
from taskplatform.api.records import (
    BeatRecord,
    Beats,
    BreakerRecord,
    Breakers,
    ChangeRecord,
    Changes,
    Counts,
    DefinitionRecord,
    Definitions,
    Forgotten,
    GarbageList,
    GarbageRecord,
    HealthRecord,
    Hold,
    LimitRecord,
    Limits,
    LogLevels,
    NewLimit,
    NewLogLevel,
    Node,
    Nodes,
    OccurrenceRecord,
    Occurrences,
    Pause,
    Resumed,
    Trigger,
    Triggered,
)
from taskplatform.api.routing import PageSize, Routes, Since
from taskplatform.errors import UnknownWorker
from taskplatform.model import format_duration
from taskplatform.store import Breaker, BreakerState

definitions = Routes("definitions")
limits = Routes("limits")
breakers = Routes("breakers")
nodes = Routes("nodes")
state = Routes("state")

LimitName = Annotated[
    str, Path(max_length=300, description="total, definition:ID, host:HOST, user (each) or user:ID", examples=["host:api.example.com"])
]
HostName = Annotated[
    str, Path(max_length=300, description="as in a limit, with its port where that is not the usual one", examples=["api.example.com"])
]
Logging = Annotated[
    str, Path(max_length=300, description="* for all, a role (beat, worker, api), a node, or a process's id; # is %23", examples=["worker"])
]
NodeId = Annotated[str, Path(max_length=300, description="the worker's id; # is %23", examples=["celery@host#1a2b3c4d"])]


# --- definitions -----------------------------------------------------------------------------------------------------


@definitions("GET", "/definitions", Definitions)
def list_definitions(call: Reads) -> Response:
    """List the definitions as this API has them, and which are paused."""
    catalogue, pauses = call.platform.catalogue, call.platform.store.definition_pauses()
    return call.answer(Definitions(items=[DefinitionRecord.of(one, catalogue, pauses) for one in catalogue.values()]))


@definitions("GET", "/definitions/{definition}", DefinitionRecord, faults=(404,))
def get_definition(call: Reads, definition: DefinitionName) -> Response:
    """Get a definition."""
    return _definition(call, definition)


@definitions("POST", "/definitions/{definition}/pause", DefinitionRecord, takes=Pause, faults=(404,))
def pause_definition(call: Administers, definition: DefinitionName) -> Response:
    """Plan and release nothing of a definition until it is resumed. What waits is kept."""
    body = call.read(Pause)

    def act() -> Response:
        changed = call.platform.pause_definition(definition, why=body.why)
        return call.changed(_definition(call, definition), changed)

    return call.once(act)


@definitions("POST", "/definitions/{definition}/resume", Resumed, faults=(404,))
def resume_definition(
    call: Administers,
    definition: DefinitionName,
    forecast: Annotated[bool, Query(description="false: without a forecast, and so without warnings")] = True,
) -> Response:
    """End the pause of a definition.

    With 1,000 subscribers or more it is forecast what that brings, and `warnings` says what gets worse. To ask before, give the definition
    in `resume` to POST /v1/forecast.
    """

    def act() -> Response:
        warnings = warnings_of_resume(call.platform, definition) if forecast else []
        changed = call.platform.resume_definition(definition)
        return call.changed(call.answer(Resumed.model_construct(**dict(_record(call, definition)), warnings=warnings)), changed)

    return call.once(act)


@definitions("POST", "/definitions/{definition}/trigger", Triggered, takes=Trigger, status=201, faults=(404,))
def trigger_definition(call: Administers, definition: DefinitionName) -> Response:
    """Run a definition now for all its subscribers, as an extra occurrence.

    The same Idempotency-Key for the same definition gives the same occurrence for as long as finished jobs are kept.
    """
    body = call.read(Trigger)

    def act() -> Response:
        key = body.idempotency_key or call.key_for_platform
        at, subscribers = call.platform.trigger(definition, window=body.window, idempotency_key=key)
        call.note(subscribers=subscribers)
        return call.answer(Triggered(at=round(at.timestamp() * 1000), subscribers=subscribers), 201)

    return call.once(act)


@definitions("GET", "/definitions/{definition}/occurrences", Occurrences, faults=(404,))
def list_occurrences(call: Reads, definition: DefinitionName, since: Since = None, limit: PageSize = 100) -> Response:
    """List what became of a definition's occurrences, the newest first: how many jobs each made, or why it was skipped."""
    found = call.platform.occurrences(definition, since=since, limit=limit)
    return call.answer(Occurrences(items=[OccurrenceRecord.model_validate(one) for one in found]))


def _definition(call: Call, definition: str) -> Response:
    return call.answer(_record(call, definition))


def _record(call: Call, definition: str) -> DefinitionRecord:
    platform = call.platform
    return DefinitionRecord.of(platform.definition(definition), platform.catalogue, platform.store.definition_pauses())


# --- limits ----------------------------------------------------------------------------------------------------------


@limits("GET", "/limits", Limits)
def list_limits(call: Reads) -> Response:
    """List the limits in force, and how they stand."""
    return _limits(call)


@limits("PUT", "/limits/{name}", Limits, takes=NewLimit, faults=(404,))
def set_limit(call: Administers, name: LimitName) -> Response:
    """Set a limit for all workers, at once. It holds over restarts, until it is removed. Answers with all in force."""
    body = call.read(NewLimit)
    given = any(value is not None for value in (body.rate, body.burst, body.concurrency))
    if given == bool(body.unlimited):
        raise problem.invalid([("pointer", "", "give rate, concurrency or both, or unlimited: true")])
    call.note(rate=body.rate, burst=body.burst, concurrency=body.concurrency, unlimited=body.unlimited)
    changed = call.platform.set_limit(name, body.rate, burst=body.burst, concurrency=body.concurrency)
    return call.changed(_limits(call), changed)


@limits("DELETE", "/limits/{name}", Limits, faults=(404,))
def remove_limit(call: Administers, name: LimitName) -> Response:
    """Take a live limit back: what settings and definitions say is in force again. Answers with all in force."""
    changed = call.platform.reset_limit(name)
    return call.changed(_limits(call), changed)


def _limits(call: Call) -> Response:
    return call.answer(Limits(items=[LimitRecord.of(one) for one in call.platform.limits()]))


# --- hosts -----------------------------------------------------------------------------------------------------------


@breakers("GET", "/breakers", Breakers)
def list_breakers(call: Reads) -> Response:
    """List the hosts that definitions call, and whose jobs are held back."""
    return call.answer(Breakers(items=[BreakerRecord.model_validate(one) for one in call.platform.breakers()]))


@breakers("POST", "/breakers/{host}/open", BreakerRecord, takes=Hold)
def open_breaker(call: Administers, host: HostName) -> Response:
    """Hold a host's jobs back for a time. They keep their places. Then the host is probed, one job at a time, as after failures."""
    body = call.read(Hold)
    call.note(span=format_duration(body.span))

    def act() -> Response:
        call.platform.open_breaker(host, span=body.span, reason=body.reason)
        return _breaker(call, host)

    return call.once(act)


@breakers("POST", "/breakers/{host}/reset", BreakerRecord)
def reset_breaker(call: Administers, host: HostName) -> Response:
    """Let a host's jobs go at once, without a probe."""

    def act() -> Response:
        was_held = call.platform.reset_breaker(host)
        return call.changed(_breaker(call, host), was_held)

    return call.once(act)


def _breaker(call: Call, host: str) -> Response:
    found = next((one for one in call.platform.breakers() if one.host == host), Breaker(host, BreakerState.CLOSED))
    return call.answer(BreakerRecord.model_validate(found))


# --- processes -------------------------------------------------------------------------------------------------------


@nodes("GET", "/nodes", Nodes)
def list_nodes(call: Reads) -> Response:
    """List the workers: when they last said that they live, their slots, and what they run."""
    now_ms = call.platform.store.now_ms()
    return call.answer(Nodes(items=[Node.of(one, now_ms) for one in call.platform.workers()]))


@nodes("GET", "/nodes/{node}", Node, faults=(404,))
def get_node(call: Reads, node: NodeId) -> Response:
    """Get a worker."""
    return _node(call, node)


@nodes("POST", "/nodes/{node}/drain", Node, faults=(404,))
def drain_node(call: Administers, node: NodeId) -> Response:
    """Let a worker take nothing new. What it has goes on; it lives, and stays so until it is resumed or ends."""

    def act() -> Response:
        changed = call.platform.drain_worker(node)
        return call.changed(_node(call, node), changed)

    return call.once(act)


@nodes("POST", "/nodes/{node}/resume", Node, faults=(404,))
def resume_node(call: Administers, node: NodeId) -> Response:
    """Let a worker that was drained take jobs again, from its next heartbeat on."""

    def act() -> Response:
        changed = call.platform.resume_worker(node)
        return call.changed(_node(call, node), changed)

    return call.once(act)


def _node(call: Call, node: str) -> Response:
    now_ms = call.platform.store.now_ms()
    for one in call.platform.workers():
        if one.id == node:
            return call.answer(Node.of(one, now_ms))
    raise UnknownWorker(f"no worker {node!r}: it never was, or it has ended")


@nodes("GET", "/beats", Beats)
def list_beats(call: Reads) -> Response:
    """List the beats, which one leads, and what each would publish."""
    return call.answer(Beats(items=[BeatRecord.model_validate(one) for one in call.platform.beats()]))


# --- logs ------------------------------------------------------------------------------------------------------------


@nodes("GET", "/log-levels", LogLevels)
def list_log_levels(call: Reads) -> Response:
    """List which processes were told to log from another level on than they started with."""
    return _log_levels(call)


@nodes("PUT", "/log-levels/{whom}", LogLevels, takes=NewLogLevel)
def set_log_level(call: Administers, whom: Logging) -> Response:
    """Let processes log from another level on, for a time. They follow with their next heartbeat or tick. Answers with all in force."""
    body = call.read(NewLogLevel)
    call.note(level=body.level, span=format_duration(body.span))
    call.platform.set_log_level(body.level, node=whom, span=body.span)
    return _log_levels(call)


@nodes("DELETE", "/log-levels/{whom}", LogLevels)
def reset_log_level(call: Administers, whom: Logging) -> Response:
    """Let them log as they started. Answers with all in force."""
    changed = call.platform.reset_log_level(node=whom)
    return call.changed(_log_levels(call), changed)


def _log_levels(call: Call) -> Response:
    return call.answer(LogLevels.of(call.platform.log_levels()))


# --- how it is -------------------------------------------------------------------------------------------------------


@state("GET", "/health", HealthRecord)
def get_health(call: Reads) -> Response:
    """Say what is wrong with the platform, since when, and what to do."""
    return call.answer(HealthRecord.of(call.platform.health()))


@state("GET", "/counts", Counts)
def get_counts(call: Reads) -> Response:
    """Count jobs and users, and what should be rare."""
    store = call.platform.store
    return call.answer(
        Counts(
            entered={one.value: count for one, count in store.counts().items()},
            waiting={one.value: count for one, count in store.waiting().items()},
            queued={one.value: count for one, count in store.queued().items()},
            running=store.running(),
            users=store.count_users(),
            counters=store.counters(),
        )
    )


@state("GET", "/changes", Changes)
def list_changes(
    call: Reads,
    about: Annotated[
        list[str] | None, Query(max_length=10, description="a user or definition that it names; repeatable: all of them")
    ] = None,
    limit: PageSize = 100,
) -> Response:
    """List who changed what, the newest first."""
    found = call.platform.changes(about=about or (), limit=limit)
    return call.answer(Changes(items=[ChangeRecord.model_validate(one) for one in found]))


@state("GET", "/garbage", GarbageList)
def list_garbage(call: Reads, limit: PageSize = 100) -> Response:
    """List what lay in a queue and was no message, the newest first."""
    return call.answer(GarbageList(items=[GarbageRecord.model_validate(one) for one in call.platform.garbage(limit=limit)]))


@state("DELETE", "/garbage", Forgotten)
def clear_garbage(call: Administers) -> Response:
    """Forget what was set aside."""
    return call.answer(Forgotten(forgotten=call.platform.clear_garbage()))
