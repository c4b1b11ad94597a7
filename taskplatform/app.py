"""The Celery application: the definitions as tasks, and what a worker does beside Celery's own.

`celery -A taskplatform.app worker | beat | flower`. Each definition is a task under its own id. Its usual Celery calls
(`delay`, `apply_async`, `retry`) make and move platform jobs. A delivery that is not the job's current one is dropped before
anything happens.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import click
from billiard.common import terminate_handler_fired
from billiard.einfo import ExceptionWithTraceback
from celery import Celery, Task, bootsteps, signals
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult
from celery.worker import state as worker_state
from celery.worker.request import Request
from click.core import ParameterSource

from taskplatform import http, logs, node, process, tracing
from taskplatform.addresses import AllowList
from taskplatform.catalogue import Catalogue, deployed, resolve_calls
from taskplatform.errors import CatalogueError, InvalidInput, SettingsError, StoreError, StoreUnavailable, TaskPlatformError
from taskplatform.message import time_limits
from taskplatform.metrics import worker_metrics
from taskplatform.model import START_SLACK_MS, CallReport, Definition, JobState, Priority, format_duration
from taskplatform.ops import Check, OpsServer
from taskplatform.ops import Process as OpsProcess
from taskplatform.outage import OutageLog, when_reachable
from taskplatform.platform import Platform
from taskplatform.pulse import Pulse
from taskplatform.recovery import LOSS_BACKOFF, Discarded, Ending, Endings, KilledEnding, RecoveryLoop
from taskplatform.release import ReleaseLoop, renew
from taskplatform.settings import environment, settings
from taskplatform.stop import PREFORK, TIDY_SECONDS, PlatformWorker, is_stopping, snapshot
from taskplatform.store import Renewal, Start, Stop

log = logging.getLogger(__name__)

#: A pool process that died is noticed after this at the latest; Celery itself looks every 5 seconds.
_POOL_CHECK_SECONDS = 1.0


# --- this process's platform -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _catalogue() -> Catalogue:
    if not _runs_under_celery():
        return deployed(settings())  # only sends jobs, and needs no secrets for that
    catalogue = deployed(settings(), environment=_environment())
    faults = resolve_calls(catalogue)
    if faults:
        raise CatalogueError(faults)
    return catalogue


def _runs_under_celery() -> bool:
    return Path(sys.argv[0]).name in ("celery", "__main__.py")


@lru_cache(maxsize=1)
def _environment() -> Mapping[str, str]:
    return environment()


@lru_cache(maxsize=1)
def _secrets() -> tuple[str, ...]:
    """What this process knows and nobody is to read: of the settings, and of the environment what definitions take from there."""
    configs = [definition.config for definition in _catalogue().values() if definition.config is not None]
    return (*settings().secrets, *http.secrets_in(configs, _environment()))


def _discreet(text: str) -> str:
    return http.redact(text, _secrets())


@signals.after_setup_logger.connect  # type: ignore[untyped-decorator]
@signals.after_setup_task_logger.connect  # type: ignore[untyped-decorator]
def _format_logs(**_: Any) -> None:
    """Celery decides by its options where its programs log; the platform, how."""
    program = click.get_current_context(silent=True)
    by_itself = program is not None and program.get_parameter_source("loglevel") is ParameterSource.DEFAULT
    level = settings().log_level if by_itself else None
    logs.format_celery(settings(), _secrets, role=(program and program.info_name) or "celery", level=level)


@lru_cache(maxsize=1)
def _platform_of(_pid: int) -> Platform:
    return Platform.connect(catalogue=_catalogue(), actor=f"{socket.gethostname()}#{os.getpid()}")


def platform() -> Platform:
    """The platform of this process; a new one after a fork, because connections cannot be shared."""
    return _platform_of(os.getpid())


def platform_when_reachable(*, failed: Callable[[StoreUnavailable], object] = lambda _: None) -> Platform:
    """The same, for processes that may start before Redis does. They end, with 1, where waiting is no help.

    `failed` is called each time that it cannot be reached.
    """

    def between(fault: StoreUnavailable) -> None:
        failed(fault)
        worker_state.maybe_shutdown()

    try:
        return when_reachable(platform, log, between=between)
    except StoreError as fault:
        log.critical("cannot start: %s", fault)
        raise SystemExit(1) from None


@lru_cache(maxsize=1)
def _starts() -> OutageLog:
    return OutageLog(log, "starting jobs")


@lru_cache(maxsize=1)
def _http_client_of(_pid: int) -> http.Client:
    chosen = settings()
    return http.Client(
        connect_timeout=chosen.http_connect_timeout,
        max_response=chosen.http_max_response,
        excerpt=chosen.http_excerpt,
        max_retry_after=chosen.http_max_retry_after,
        allowed=AllowList(chosen.http_allow),
    )


# --- runs ------------------------------------------------------------------------------------------------------------


class JobFailed(TaskPlatformError):
    """A run ended for good; the reason is the message."""


class TargetUnavailable(TaskPlatformError):
    """A run failed in a way that another may not."""


class FunctionFailed(TaskPlatformError):
    """A run ended with an exception that has a secret in it; this is what can be said of it."""


class Unrecorded(TaskPlatformError):
    """A run ended, and Redis could not be told. The worker's main process keeps its end until it can."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending

    def __str__(self) -> str:
        return f"{self.ending.state}: {self.ending.reason}; recorded when Redis can be used again"

    def __repr__(self) -> str:
        return f"Unrecorded({str(self)!r})"


@dataclass(frozen=True, slots=True)
class RunningJob:
    """What a Python task function is given."""

    id: str
    definition: str
    user: str
    params: Mapping[str, Any]
    attempt: int
    execute_after_ms: int


@dataclass(frozen=True, slots=True)
class _Run:
    """One delivery that was allowed to run."""

    job_id: str
    delivery: int
    worker: str
    start: Start
    asked: float
    """When the start was asked for, by the monotonic clock in seconds."""


#: The HTTP calls of this process by job and delivery, for pools that cannot stop a run otherwise.
_calls: dict[tuple[str, int], http.Abort] = {}


def _break_off_calls() -> None:
    """All that this process makes in threads."""
    for abort in tuple(_calls.values()):
        abort.fire()


@contextmanager
def _abortable(run: _Run) -> Iterator[http.Abort]:
    """What another thread can stop the call of this run with."""
    _calls[run.job_id, run.delivery] = abort = http.Abort()
    try:
        yield abort
    finally:
        del _calls[run.job_id, run.delivery]


@contextmanager
def _under_soft_limit() -> Iterator[None]:
    """Let the pool's signal of a soft time limit break off what runs here, and nothing else.

    It can come when the run has just ended: the pool knows of that a moment later. Billiard's own handler then breaks off what the process
    does between two jobs, and with that the process.
    """
    if not _in_pool_process:
        yield
        return
    signal.signal(signal.SIGUSR1, _break_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, _come_too_late)


def _break_off(*_: object) -> None:
    raise SoftTimeLimitExceeded


def _come_too_late(*_: object) -> None:
    """The run that the signal was for has ended. Not SIG_IGN, which the programs that a function starts would inherit."""


@lru_cache(maxsize=1)
def _worker_nonce() -> str:
    return uuid.uuid4().hex[:8]


def worker_id(hostname: str) -> str:
    """A worker's identity: its node name and a mark of this life, so that a restarted one is another."""
    return f"{hostname}#{os.environ.get(_NONCE_VARIABLE, '') or _worker_nonce()}"


#: Pool processes take the mark from the worker's main process.
_NONCE_VARIABLE = "_TP_WORKER_NONCE"


class PlatformTask(Task):  # type: ignore[misc]
    """A definition as a Celery task."""

    abstract = True
    Request = "taskplatform.app:PlatformRequest"
    definition: Definition
    #: HTTP failures that the policy sends into a retry never get this far; this is for what nobody foresaw.
    autoretry_for: Sequence[type[BaseException]] = (Exception,)
    dont_autoretry_for: Sequence[type[BaseException]] = (JobFailed, Unrecorded)
    #: An expected end: the history tells it, so the log needs no traceback.
    throws = (JobFailed, Unrecorded)

    # sending

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        producer: Any = None,  # noqa: ARG002
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,  # noqa: ARG002
        countdown: float | None = None,
        eta: datetime | None = None,
        priority: Priority | str | int | None = None,
        **options: Any,
    ) -> AsyncResult:
        """Make a platform job: `kwargs` are `user` and the job's parameters.

        `priority` is high, medium or low, or Celery's number on Redis: 0 to 2 is high, 3 to 6 medium, 7 to 9 low. `task_id`
        is taken as the idempotency key. Raises InvalidInput for options that would change what a job is.
        """
        given = {"link": link, "link_error": link_error, **options}
        refused = sorted(name for name in _UNSUPPORTED if given.get(name))
        if refused:
            raise InvalidInput(f"{self.name}: {', '.join(refused)} cannot be used with a platform job")
        if args:
            raise InvalidInput(f"{self.name}: positional arguments are not accepted, use user=… and named parameters")
        params = dict(kwargs or {})
        user = params.pop("user", None)
        job = platform().enqueue(
            self.name,
            user=user,
            params=params,
            countdown=countdown,
            eta=eta,
            priority=_priority(priority),
            idempotency_key=task_id,
        )
        return AsyncResult(job.id, app=self.app, task_name=self.name)

    def retry(
        self,
        args: Any = None,  # noqa: ARG002
        kwargs: Any = None,  # noqa: ARG002
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Retry:
        """Put the running job back into the waiting set, as Celery's `retry` does with its message.

        Without `countdown` and `eta` the definition's backoff decides. Raises `exc`, or JobFailed, when the retries are used up.
        """
        if exc is not None and self.request.get("platform_run") is None:
            raise exc  # as Celery does outside of a run
        run = self._run()
        if exc is not None and _discreet(_plain(exc)) != _plain(exc):
            # what Celery makes of it, events and tracebacks, would have the secret
            exc = FunctionFailed(_describe(exc))
        reason = _discreet(options.get("reason") or "") or (_describe(exc) if exc is not None else "retry")
        most = self.definition.retries if max_retries is None else max_retries
        timed_out = isinstance(exc, SoftTimeLimitExceeded) or bool(options.get("timed_out"))
        if run.start.failures >= most:
            state = JobState.TIMED_OUT if timed_out else JobState.FAILED
            self._finish(run, state, reason, options.get("detail"), call=options.get("call"))
            raise JobFailed(f"{reason}; {run.start.failures} retries used up") from exc
        if eta is not None:
            countdown = max(0.0, eta.timestamp() - platform().store.now_ms() / 1000)
        delay = self.definition.backoff.delay(run.start.failures + 1) if countdown is None else timedelta(seconds=countdown)
        self._finish(run, JobState.RETRYING, reason, options.get("detail"), delay, call=options.get("call"), late=timed_out)
        again = Retry(reason, exc, when=eta or delay.total_seconds())
        # and not what is being handled, which may have a secret
        again.__cause__ = exc
        if throw:
            raise again
        return again

    # running

    def run(self, **_: Any) -> str:
        """Run the delivery in the message. Returns a line that says how it went.

        Whose job it is says its id, and with what the ledger: whoever could write a message could put anything into its arguments.
        """
        logs.live_level.follow()
        try:
            with _under_soft_limit():
                return self._run_delivery()
        finally:
            logs.forget_context()

    def _run_delivery(self) -> str:
        request = self.request
        delivery = request.get("delivery")
        if delivery is None and not request.called_directly:
            self._set_aside("it has no header delivery: the platform did not release it")
        if request.called_directly or delivery is None:
            raise InvalidInput(f"{self.name} runs only as a job: use delay(user=…), apply_async or Platform.enqueue")
        worker = worker_id(request.hostname)
        waited_ms = max(0, round((time.monotonic() - request.get("received_at", time.monotonic())) * 1000))
        if self.definition.config is not None:
            # the first one of a process loads certificates, and a call must come soon after its start
            _http_client_of(os.getpid())
        asked = time.monotonic()
        version = self.definition.version
        try:
            start = platform().store.start(request.id, delivery=delivery, worker=worker, waited_ms=waited_ms, version=version)
        except StoreUnavailable as fault:
            # the message is gone with that, but not the job: `reclaim` or, if only the answer was lost, `recover` or this worker finds it
            _starts().failed(fault)
            log.info("delivery %s of job %s not started: it is released again when Redis can be used", delivery, request.id)
            raise Ignore from fault
        _starts().over()
        if not start.go:
            log.info("delivery %s of job %s dropped: the job is %s", delivery, request.id, start.refusal)
            if start.refusal == "unknown":
                self._set_aside(f"the ledger has no job {request.id}")
            raise Ignore
        request.platform_run = run = _Run(request.id, delivery, worker, start, asked)
        user = request.id.split(":")[1]
        params = {**self.definition.params, **start.params}
        with tracing.run(run, lambda: platform().store.job(run.job_id).created_ms):
            return self._attempt(run, user, params)

    def _attempt(self, run: _Run, user: str, params: Mapping[str, Any]) -> str:
        try:
            if self.definition.config is not None:
                with _abortable(run) as abort:
                    return self._call_target(run, user, params, abort)
            return self._call_function(run, user, params)
        except SoftTimeLimitExceeded as fault:
            limit = format_duration(self.definition.work_limit)
            raise self.retry(exc=fault, reason=f"time limit of {limit} exceeded", timed_out=True) from fault

    def _set_aside(self, reason: str) -> None:
        """Keep what this process knows of a message that is no job's."""
        request = self.request
        headers = {name: request.get(name) for name in ("task", "id", "delivery", "origin", "kwargs")}
        queue = str((request.delivery_info or {}).get("routing_key") or "")
        log.error("queue %s: a message was set aside (taskplatform garbage list): %s", queue, reason)
        text = json.dumps(headers, default=str)
        with _not_fatal(request.id):
            platform().store.set_aside(queue, text, reason=reason, worker=worker_id(request.hostname))

    def _call_target(self, run: _Run, user: str, params: Mapping[str, Any], abort: http.Abort) -> str:
        config = self.definition.config
        assert config is not None
        try:
            call = http.render(
                config,
                job_id=run.job_id,
                user=user,
                definition=self.definition.id,
                params=params,
                environment=_environment(),
                now=run.start.now_ms / 1000,
            )
        except InvalidInput as fault:
            self._finish(run, JobState.FAILED, str(fault), None)
            raise JobFailed(str(fault)) from fault
        self._check_place(run)
        try:
            with tracing.call(call.method, call.url, call.headers) as traced:
                call = replace(call, headers=traced.headers)
                outcome = _http_client_of(os.getpid()).send(call, deadline=self.definition.work_limit, abort=abort)
                traced.ended(outcome.status, outcome.reason, failed=outcome.kind is not http.OutcomeKind.COMPLETED)
        except http.CallAborted:
            log.warning("job %s: delivery %d was stopped in its call", run.job_id, run.delivery)
            raise Ignore from None
        report = _report(outcome, config.host(_environment()) or "")
        summary = f"{outcome.reason} in {outcome.duration_ms} ms"
        if outcome.kind is http.OutcomeKind.COMPLETED:
            self._finish(run, JobState.COMPLETED, outcome.reason, outcome.detail, call=report)
            return summary
        if outcome.kind is http.OutcomeKind.FAILED:
            self._finish(run, JobState.FAILED, outcome.reason, outcome.detail, call=report)
            raise JobFailed(summary)
        countdown = outcome.retry_after.total_seconds() if outcome.retry_after is not None else None
        raise self.retry(
            exc=TargetUnavailable(summary),
            countdown=countdown,
            reason=outcome.reason,
            detail=outcome.detail,
            timed_out=outcome.timed_out,
            call=report,
        )

    def _call_function(self, run: _Run, user: str, params: Mapping[str, Any]) -> str:
        function = _function(cast("str", self.definition.call))
        self._check_place(run)
        job = RunningJob(run.job_id, self.definition.id, user, params, run.start.attempt, run.start.execute_after_ms)
        began = time.monotonic()
        try:
            result = function(job)
        except (Retry, Ignore, SoftTimeLimitExceeded, JobFailed, Unrecorded):
            raise
        except (Exception, SystemExit) as fault:
            if isinstance(fault, SystemExit) and terminate_handler_fired():
                raise  # this process was told to end
            # exit() in a function is a failed attempt: it must not take down the process, which may have its next job already
            log.exception("job %s: attempt %d failed", run.job_id, run.start.attempt)
            raise self.retry(exc=fault) from fault
        duration_ms = round((time.monotonic() - began) * 1000)
        excerpt = _discreet(json.dumps(result, default=str))[: settings().http_excerpt]
        self._finish(run, JobState.COMPLETED, "returned", {"duration_ms": duration_ms, "excerpt": excerpt})
        return excerpt

    def _check_place(self, run: _Run) -> None:
        """Raise for a run that was held up since its start and may not make its call any more."""
        try:
            renewal = renew(platform().store, run.job_id, delivery=run.delivery, worker=run.worker, asked=run.asked)
        except StoreUnavailable as fault:
            # no failure of the job: as recorded it runs here, and as it does not, this worker gives it up
            log.warning("job %s: delivery %d cannot ask whether it may still make its call: %s", run.job_id, run.delivery, fault)
            raise Ignore from fault
        if renewal is Renewal.NEVER:
            log.warning("job %s: delivery %d was held up before its call, and makes it no more", run.job_id, run.delivery)
            raise Ignore
        if renewal is None:
            reason = f"Redis answers too slowly to keep its rate limit: not within {START_SLACK_MS} ms"
            raise self.retry(exc=TargetUnavailable(reason), reason=reason)

    def _run(self) -> _Run:
        run = self.request.get("platform_run")
        if run is None:
            raise InvalidInput(f"{self.name}: no job is running here")
        return cast("_Run", run)

    def _finish(
        self,
        run: _Run,
        state: JobState,
        reason: str,
        detail: Mapping[str, Any] | None,
        retry_in: timedelta | None = None,
        *,
        call: CallReport | None = None,
        late: bool = False,
    ) -> None:
        """Record how a run ended. Raises Unrecorded where Redis cannot be told, whatever the run's time limit: the work is done."""
        # of a call its own secrets are gone already, but targets share theirs
        shown = detail and {name: _discreet(value) if isinstance(value, str) else value for name, value in detail.items()}
        ending = Ending(run.job_id, run.delivery, run.worker, state, _discreet(reason), shown, retry_in, call, late)
        try:
            ending.record(platform().store)
        except (StoreUnavailable, SoftTimeLimitExceeded) as fault:
            log.warning("job %s: cannot record %s yet: %s", run.job_id, state, fault)
            raise Unrecorded(ending) from fault
        except Discarded as fault:
            log.warning("%s", fault)
            raise Ignore from fault


_UNSUPPORTED = (
    "link",
    "link_error",
    "chain",
    "chord",
    "group_id",
    "expires",
    "queue",
    "exchange",
    "routing_key",
    "time_limit",
    "soft_time_limit",
)


def _priority(value: Priority | str | int | None) -> Priority | str | None:
    if value is None or isinstance(value, str):
        return value
    if not 0 <= value <= 9:
        raise InvalidInput(f"priority {value} is not accepted: 0 to 9 is, or {', '.join(Priority)}")
    return Priority.HIGH if value <= 2 else Priority.MEDIUM if value <= 6 else Priority.LOW


def _report(outcome: http.Outcome, host: str) -> CallReport | None:
    """What a call says of `host`: what is worth another try is a failure of the host, any other answer is none.

    None: nothing, where the call was refused before there was an answer.
    """
    failed = outcome.kind is http.OutcomeKind.RETRY
    if outcome.status is None and not failed:
        return None
    pause = timedelta()
    if failed and outcome.status in (429, 503) and outcome.retry_after is not None:
        pause = min(outcome.retry_after, settings().http_max_hold)
    return CallReport(host, failed, settings().breaker, pause)


def _plain(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__


def _describe(fault: BaseException) -> str:
    text = _discreet(_plain(fault))
    return text if len(text) <= 300 else text[:299] + "…"


@lru_cache(maxsize=1000)
def _function(call: str) -> Callable[[RunningJob], object]:
    module, _, name = call.partition(":")
    return cast("Callable[[RunningJob], object]", getattr(importlib.import_module(module), name))


#: What this process was given and its pool still holds. Celery's own sets lose, with the connection, what the pool has not begun.
_requests: WeakSet[PlatformRequest] = WeakSet()


class PlatformRequest(Request):  # type: ignore[misc]
    """What the worker's main process does for a message: notes when it came, and records runs whose process is gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # by the clock of the machine that nobody sets, which its pool processes read too
        self._request_dict["received_at"] = time.monotonic()
        _requests.add(self)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """The pool killed the process at the hard limit."""
        super().on_timeout(soft, timeout)
        if not soft:
            with _not_fatal(self.id):
                self._end_killed_run(timeout)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """The run raised, or its process died.

        What is not recorded as the end of the run would leave the job running for ever. Where it is, `_lose` changes nothing.
        """
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        fault = exc_info.exception
        if isinstance(fault, ExceptionWithTraceback):  # of a thread; a Retry too has an `exc`, and is none the less a Retry
            fault = fault.exc
        if isinstance(fault, Unrecorded):
            _endings.keep(fault.ending)
        elif isinstance(fault, WorkerLostError | SystemExit | KeyboardInterrupt):
            self._lose(f"the process that ran it died: {fault}")
        elif not isinstance(fault, Ignore | Retry | JobFailed | TimeLimitExceeded):
            self._lose(f"its run broke off: {_describe(fault)}")

    @property
    def delivery(self) -> int:
        """Which delivery of the job the message is."""
        return int(self._request_dict.get("delivery") or 0)

    def _end_killed_run(self, timeout: float) -> None:
        definition = cast("PlatformTask", self.task).definition
        reason = f"killed at the hard time limit of {timeout:g} s"
        ending = KilledEnding(self.id, self.delivery, worker_id(self.hostname), reason, definition.retries, definition.backoff)
        try:
            ending.record(platform().store)
        except StoreUnavailable as fault:
            log.warning("job %s: cannot record yet that it was %s: %s", self.id, reason, fault)
            _endings.keep(ending)
        except Discarded as fault:
            log.warning("%s", fault)

    def _lose(self, what: str) -> None:
        owner = platform()
        with _not_fatal(self.id):
            if is_stopping():
                # such as where each process of a service was told to stop
                worker = worker_id(self.hostname)
                owner.store.withdraw(worker, [f"{self.id}#{self.delivery}"], also_running=True)
                return
            owner.store.lose(
                self.id,
                delivery=self.delivery,
                worker=worker_id(self.hostname),
                what=what,
                max_losses=owner.settings.max_losses,
                backoff=LOSS_BACKOFF,
            )


@contextmanager
def _not_fatal(job_id: str) -> Iterator[None]:
    """A record that cannot be made, in the worker's main process, is made up for by recovery; the worker goes on."""
    try:
        yield
    except TaskPlatformError as fault:
        log.warning("job %s: cannot record how its run ended: %s", job_id, fault)


# --- the worker's loops ----------------------------------------------------------------------------------------------


#: What this worker's runs could not record.
_endings = Endings()


class PlatformStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs the release and the recovery loop in the worker's main process, from pool start to shutdown."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        global _main_pid
        _main_pid = os.getpid()
        os.environ[_NONCE_VARIABLE] = _worker_nonce()
        logs.identify(worker=worker_id(worker.hostname))
        self._release: ReleaseLoop | None = None
        self._recovery: RecoveryLoop | None = None
        self._ops: OpsServer | None = None
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """Begin to tell of this worker, to release, to heartbeat and to recover."""
        of_release, of_recovery = pulses = Pulse("release"), Pulse("recovery")
        self._ops = OpsServer(_ops_process(worker, pulses), settings())
        self._ops.start()

        def not_reached(fault: StoreUnavailable) -> None:
            # nothing has begun yet, and a new start would not help
            for pulse in (*pulses, worker.consumer.pulse):
                pulse.failed(fault)

        owner = platform_when_reachable(failed=not_reached)
        self._release = ReleaseLoop(owner.store, pulse=of_release)
        self._recovery = RecoveryLoop(
            owner.store,
            owner.settings,
            worker=worker_id(worker.hostname),
            # who takes no messages offers no slots
            slots=lambda: int(worker.pool.num_processes) if worker.consumer.consumes else 0,
            queues=lambda: worker.consumer.served,
            stop_run=lambda stop: _stop_run(worker, stop),
            consume=lambda wanted: worker.consumer.consume_jobs(wanted=wanted),
            has_run=lambda job_id, delivery: (job_id, delivery) in _endings or _request(job_id, delivery) is not None,
            limit_of=_limit_of,
            endings=_endings,
            info={
                "host": socket.gethostname(),
                "pool": type(worker.pool).__module__,
                "started": str(owner.store.now_ms()),
                "conf": json.dumps(node.celery_settings(worker.app.conf, worker_prefetch_multiplier=worker.prefetch_multiplier)),
                "definitions": node.digest({name: one.version for name, one in owner.catalogue.items()}),
                **node.versions(),
                **process.identity(),
            },
            pulse=of_recovery,
            log_level=logs.LevelFollower("worker", worker_id(worker.hostname)),
        )
        if isinstance(worker, PlatformWorker) and worker.ending is not None:  # else it is embedded, and ends by Celery's own way
            worker.ending.recovery = self._recovery
            worker.ending.break_off_calls = _break_off_calls
        signals.worker_shutdown.connect(self._leave)
        signals.task_revoked.connect(_on_revoked)
        for name, loop in (("release", self._release), ("recovery", self._recovery)):
            threading.Thread(target=loop.run, name=f"platform-{name}", daemon=True).start()

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Celery's own notice of a process that died can come before there is anything to see, and then waits for its timer."""
        if type(worker.pool).__module__ == PREFORK:
            hub.call_repeatedly(_POOL_CHECK_SECONDS, worker.pool.maintain_pool)

    def stop(self, worker: Any) -> None:  # noqa: ARG002
        """The pool still finishes what runs; `_leave` comes after it."""
        if self._release is not None:
            self._release.stop()

    def _leave(self, **_: Any) -> None:
        if self._recovery is not None:
            self._recovery.stop()
        if self._ops is not None:
            self._ops.stop()
        tracing.flush()


def _ops_process(worker: Any, pulses: Sequence[Pulse]) -> OpsProcess:
    """How this worker is judged, beside its loops: whether it takes jobs."""
    consumer, chosen = worker.consumer, settings()

    def takes_jobs() -> Iterator[Check]:
        served = consumer.served
        fault = "" if served else "it was told to serve no queue"
        if served and not consumer.consumes:
            fault = "its main loop does not take messages from the broker"
        yield Check("queues", fault, {"queues": served})

    def before() -> None:
        if consumer.may_stand:
            consumer.pulse.step()

    return OpsProcess(
        role="worker",
        pulses=(*pulses, consumer.pulse),
        patience=chosen.ops_patience.total_seconds(),
        fresh=chosen.heartbeat_timeout.total_seconds(),
        looks_at=takes_jobs,
        facts=lambda: {"worker": worker_id(worker.hostname), "slots": int(worker.pool.num_processes), "running": _running_here()},
        stopping=is_stopping,
        before=before,
        metrics=lambda: worker_metrics(slots=int(worker.pool.num_processes), running=_running_here(), unrecorded=len(_endings)),
    )


def _running_here() -> int:
    return len(worker_state.active_requests)


@signals.worker_before_create_process.connect  # type: ignore[untyped-decorator]
def _share_memory_with_pool(**_: Any) -> None:
    """A pool process shares what its parent has loaded until either writes to it, and a collection of garbage writes to every object.

    What exists now is taken out of collections, as the documentation of `gc.freeze` advises before a fork: it saves a worker with three
    processes about a fifth of its memory.
    """
    gc.collect()
    gc.freeze()


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _end_with_main_process(**_: Any) -> None:
    """A pool process whose main process was killed would go on with its call, beside the next run of the job elsewhere.

    Pool processes are forked by the main thread, which lives as long as its process.
    """
    global _in_pool_process
    if os.getpid() != _main_pid:
        _in_pool_process = True
        process.die_with_parent(_main_pid)


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _tell_of_last_runs(**_: Any) -> None:
    tracing.flush()


# the threads of the main process log while it forks a pool process anew
process.fork_between_log_lines()

#: The worker's main process; pool processes inherit it.
_main_pid = 0
#: Whether this is one of the prefork pool, that runs its jobs in its main thread.
_in_pool_process = False


def _request(job_id: str, delivery: int) -> PlatformRequest | None:
    """The request of a run that this worker makes or is about to. It may have two deliveries of a job, so Celery's own index is no help."""
    found = [one for one in snapshot(_requests) if one.id == job_id and one.delivery == delivery and not one.acknowledged]
    # after a lost connection there may be a copy, that is dropped: it came later
    return min(found, key=lambda one: one.time_start or math.inf, default=None)


def _limit_of(definition: str) -> timedelta | None:
    known = _catalogue().get(definition)
    return None if known is None else timedelta(seconds=time_limits(known)[0])


def _on_revoked(sender: Any, request: Any, **_: Any) -> None:
    """Celery's `revoke`, from Flower or the command line, is a way to cancel a job.

    Celery says the same of each process that is ended, as when this worker stops or a run does not count any more: that cancels nothing.
    """
    if isinstance(sender, PlatformTask) and request.id in worker_state.revoked:
        with _not_fatal(request.id):
            # of the run that was revoked: the job may have another by now
            platform().store.cancel(request.id, reason="revoked by Celery's remote control", delivery=request.delivery)


def _stop_run(worker: Any, stop: Stop) -> None:
    """Stop a run that does not count any more, if the pool can, and say so."""
    request = _request(stop.job_id, stop.delivery)
    if request is not None and type(worker.pool).__module__ == PREFORK:
        if is_stopping():
            # the loop may have ended; and no other job can be given to the process any more
            _terminate(worker, request, stop)
        else:
            # in the thread that also takes results: meanwhile no other job can be given to the process
            worker.hub.call_soon(_terminate, worker, request, stop)
        return
    abort = _calls.get((stop.job_id, stop.delivery))
    if request is None:
        _tell_stopped(worker, stop, "")  # it has ended, and its result was discarded
    elif abort is not None and abort.fire():
        _tell_stopped(worker, stop, _stopped_text(stop), discarded=bool(stop.why))
    else:
        because = f", because {stop.why}" if stop.why else ""
        _tell_stopped(worker, stop, f"this worker's pool cannot stop it: its result will be discarded{because}")


def _stopped_text(stop: Stop) -> str:
    return f"discarded delivery {stop.delivery}: stopped, because {stop.why}" if stop.why else "stopped"


def _tell_stopped(worker: Any, stop: Stop, note: str, *, discarded: bool = False) -> None:
    with _not_fatal(stop.job_id):
        platform().store.stopped(worker_id(worker.hostname), stop, note=note, discarded=discarded)


def _terminate(worker: Any, request: PlatformRequest, stop: Stop) -> None:
    if request.acknowledged:
        _tell_stopped(worker, stop, "")
        return
    request.terminate(worker.pool)
    if not is_stopping():  # else all of them are killed at the end of the grace
        worker.hub.call_later(TIDY_SECONDS, _kill, worker, request.worker_pid)
    _tell_stopped(worker, stop, _stopped_text(stop), discarded=bool(stop.why))


def _kill(worker: Any, pid: int) -> None:
    """End a process that ignored the signal, unless it has another job by now."""
    if not any(request.worker_pid == pid for request in snapshot(worker_state.active_requests)):
        worker.pool.terminate_job(pid, signal.SIGKILL)


# --- the application -------------------------------------------------------------------------------------------------


def _register(application: Celery, definition: Definition) -> None:
    hard, soft = time_limits(definition)
    backoff = definition.backoff
    limit = definition.rate_limit
    options = {
        "__module__": __name__,
        "__doc__": definition.description,
        "name": definition.id,
        "definition": definition,
        "time_limit": hard,
        "soft_time_limit": soft,
        "max_retries": definition.retries,
        "default_retry_delay": backoff.base.total_seconds(),
        "retry_backoff": max(1, math.ceil(backoff.base.total_seconds())) if backoff.strategy == "exponential" else False,
        "retry_backoff_max": math.ceil(backoff.cap.total_seconds()),
        "retry_jitter": backoff.jitter != "none",
        # Celery's holds per worker and has no burst: it is a backstop that must not bind while the platform keeps its own
        "rate_limit": f"{math.ceil(limit.per_second + 100 * limit.burst)}/s" if limit else None,
    }
    application.register_task(type(f"Task_{definition.id}", (PlatformTask,), options)())


class _Application(Celery):  # type: ignore[misc]
    #: For the consumer, which lies below this module.
    platform = staticmethod(platform)
    worker_id = staticmethod(worker_id)

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - the name is Celery's
        """What `celery worker` runs."""
        return self.subclass_with_self("taskplatform.stop:PlatformWorker")

    @cached_property
    def Beat(self) -> Any:  # noqa: N802
        """What `celery beat` runs."""
        return self.subclass_with_self("taskplatform.beat:PlatformBeat")

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> AsyncResult:
        """By name, as `celery call` does it: a definition's task makes a platform job all the same."""
        task = self.tasks.get(name)
        if isinstance(task, PlatformTask):
            return task.apply_async(args, kwargs, **options)
        return super().send_task(name, args, kwargs, **options)


def _make_app() -> Celery:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        # celeryconfig.py and tasks/ lie in the current folder, which console scripts do not search
        sys.path.insert(0, str(Path.cwd()))
    application = _Application("taskplatform")
    application.config_from_object("celeryconfig")
    application.steps["worker"].add(PlatformStep)
    if "flower.command" in sys.modules:
        # the celery command has loaded it, as all its subcommands
        sys.modules["flower.command"].Flower = _flower  # type: ignore[attr-defined]
    application.conf.task_routes = {definition.id: {"queue": definition.priority.value} for definition in _catalogue().values()}
    for definition in _catalogue().values():
        _register(application, definition)
    return application


def _flower(**arguments: Any) -> Any:
    """What `celery flower` is to run. Other processes do without what it imports."""
    from taskplatform.flower import PlatformFlower

    # tornado has set up the root's
    logs.format_celery(settings(), _secrets, role="flower")
    try:
        return PlatformFlower(chosen=settings(), **arguments)
    except SettingsError as fault:
        raise SystemExit(f"taskplatform cannot start:\n{fault}") from None


def _make_app_or_explain() -> Celery:
    """For the celery command a fault in settings or definitions is a message, not a traceback."""
    try:
        return _make_app()
    except (SettingsError, CatalogueError, StoreError) as fault:
        if not _runs_under_celery():
            raise
        raise SystemExit(f"taskplatform cannot start:\n{fault}") from None


app = _make_app_or_explain()


@app.task(name="taskplatform.sweep", shared=False)  # type: ignore[untyped-decorator]
def sweep() -> int:
    """Forget what is past its retention. Returns how much it was."""
    return platform().sweep()
