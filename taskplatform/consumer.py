"""How a worker takes messages from the broker and sends events: as Celery does, with fewer round trips, and not to be ended by either.

kombu writes a note to Redis for each message that arrives, and deletes it when the message is acknowledged, so that another worker
can find what a lost one held. A job needs no note: the ledger knows which jobs were released and not started (`reclaim`) and which
run where (`recover`). Messages of other tasks, as the sweep, keep theirs.

What is no message is set aside. A job whose definition this worker does not know goes back to the ledger. A worker that hears nothing
renews its connection, and ends if that does not help.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from billiard import active_children
from celery import signals
from celery.bootsteps import RUN
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from kombu.transport import redis, virtual
from kombu.utils.json import dumps

from taskplatform.errors import TaskPlatformError
from taskplatform.garbage import fault_in
from taskplatform.hearing import Hearing
from taskplatform.message import is_job
from taskplatform.outage import LONGEST_WAIT_SECONDS, OutageLog
from taskplatform.pulse import Pulse
from taskplatform.settings import settings
from taskplatform.store import unavailable

log = logging.getLogger(__name__)

#: A task event waits so long for others to be sent with.
_EVENTS_SECONDS = 0.1
#: A worker may hear nothing for the heartbeat timeout, but not for less than this: a server may be slow.
_LEAST_PATIENCE_SECONDS = 5.0
#: A worker that is deaf again so many times its patience after it renewed its connection gives up.
_RELAPSE = 4
#: An attempt to connect that takes longer than this hangs.
_LONGEST_ATTEMPT_SECONDS = 45.0
#: A connection that held for so long was well.
_WELL_SECONDS = 10.0
#: A process of the pool that has sent a part of a result sends the rest at once, unless it is stopped.
_REST_SECONDS = 1.0
#: The broker answers a question for the next message after a second at the latest.
_LAST_ANSWER_SECONDS = 2.0
#: The exit code of a worker that gives up.
_GAVE_UP = 1
_SOLO = "celery.concurrency.solo"

# kombu's says each second, with a traceback, what the loops of the worker say once a minute: that Redis has no memory left.
logging.getLogger("kombu.transport.redis").addFilter(lambda record: not str(record.msg).startswith("maybe_refresh_binding_expiry"))

SetAside = Callable[[str, bytes | str, str], None]
"""Takes queue, message and reason."""


class JobQoS(redis.QoS):  # type: ignore[misc]
    """What a worker holds of the broker's messages; of jobs in its memory alone."""

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        """A message arrived."""
        if is_job(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Its task ended. Any thread may say so, and after the connection was lost too."""
        if is_job(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Nobody here takes it; `requeue` puts it back behind the others."""
        if not is_job(delivery_tag):
            super().reject(delivery_tag, requeue=requeue)
            return
        if requeue:
            self._put_back([self._delivered[delivery_tag]], behind=True)
        virtual.QoS.ack(self, delivery_tag)

    def held(self) -> list[str]:
        """Tags of jobs that came and are not acknowledged."""
        dirty = self._dirty.copy()
        return [tag for tag in list(self._delivered) if is_job(tag) and tag not in dirty]

    def restore_unacked(self, client: Any = None) -> None:
        """The channel closes: put back what is held, in its old order. What has started meanwhile is dropped where it arrives."""
        jobs = [tag for tag in self._delivered if is_job(tag)]
        self._put_back([self._delivered.pop(tag) for tag in reversed(jobs)])
        if not self._delivered:
            return
        try:
            super().restore_unacked(client)
        except Exception as fault:  # of a connection that is gone kombu makes an AttributeError, which would end the worker
            tags = ", ".join(self._delivered)
            log.warning("messages that are no jobs' stay where they are noted, because of %s: %s", unavailable(fault) or fault, tags)

    def _put_back(self, messages: Sequence[virtual.Message], *, behind: bool = False) -> None:
        if not messages:
            return
        try:
            with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                for message in messages:
                    push = pipe.lpush if behind else pipe.rpush
                    # as it came; `serializable` gives the body as bytes
                    push(message.delivery_info["routing_key"], dumps(message._raw))
                pipe.execute()
        except Exception as fault:  # whatever it is: a worker must not end for a job that is found anyway
            tags = ", ".join(message.delivery_tag for message in messages)
            log.warning("not put back, because of this: %s; if not started, they are released again: %s", unavailable(fault) or fault, tags)


class JobChannel(redis.Channel):  # type: ignore[misc]
    """A channel that looks at what comes out of a queue before anything else does."""

    QoS = JobQoS

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        if asynchronous:
            client.parse_response = partial(self._read, client.parse_response)
        return client

    def _read(self, parse: Callable[..., Any], connection: Any, command: str, **options: Any) -> Any:
        answer = parse(connection, command, **options)
        if command != "BRPOP":
            return answer
        transport = self.connection
        transport.hearing.answered(message=bool(answer))
        if answer:
            queue, raw = answer
            fault = fault_in(raw)
            if fault is not None:
                transport.set_aside(queue.decode(), raw, fault)
                return None  # as if there had been nothing
        return answer


class JobTransport(redis.Transport):  # type: ignore[misc]
    """Makes such channels, tells `hearing` what they hear, and gives `set_aside` what is no message."""

    Channel = JobChannel

    def __init__(self, client: Any, *, hearing: Hearing, set_aside: SetAside, **options: Any) -> None:
        self.hearing = hearing
        self.set_aside = set_aside
        super().__init__(client, **options)

    def _deliver(self, message: Any, queue: str) -> None:
        """What passed as a message and cannot be taken all the same is set aside too; so is what another sends to all workers."""
        try:
            super()._deliver(message, queue)
        except Exception as fault:
            # KeyError is among what kombu takes for a broken connection
            if isinstance(fault, (*self.connection_errors, *self.channel_errors)) and not isinstance(fault, KeyError):
                raise
            log.exception("a message in %s broke its handler", queue)
            self.set_aside(queue, dumps(message), f"breaks its handler: {type(fault).__name__}: {fault}"[:300])
            self._forget(message)

    def _forget(self, message: Any) -> None:
        """It holds a slot no more."""
        with suppress(LookupError, TypeError):
            tag = message["properties"]["delivery_tag"]
            for channel in self.channels:
                if tag in channel.qos._delivered:
                    channel.basic_ack(tag)


class SentinelJobChannel(JobChannel, redis.SentinelChannel):  # type: ignore[misc]
    """The same to the server that Sentinels name as the master."""


class SentinelJobTransport(JobTransport, redis.SentinelTransport):  # type: ignore[misc]
    """Makes these."""

    Channel = SentinelJobChannel


class PlatformConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, that keeps no notes of jobs, sets aside what is no message, and sends the task events of a burst together.

    While the broker cannot be used it tries again at short intervals, for as long as it takes, and says so once a minute.
    """

    task_consumer: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopped = threading.Event()
        self._outage = OutageLog(log, "taking jobs")
        self._ready_at = 0.0
        self._attempts = 0
        # what they tell workers of each other Redis tells them here; and after each outage they cost a second, and at times a traceback
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True})
        timeout = settings().heartbeat_timeout.total_seconds()
        self._interval = settings().heartbeat_interval.total_seconds()
        self._half_timeout = timeout / 2
        self._patience = max(timeout, _LEAST_PATIENCE_SECONDS)
        self.hearing = Hearing(patience=self._patience, interval=self._interval)
        #: Of the main loop, also while it has no connection and tries to get one.
        self.pulse = Pulse("consumer")
        self._ticks: set[Any] = set()
        self._watched = False
        self._connecting = False
        #: What it served before it was drained; None while it is not.
        self._left_queues: list[str] | None = None

    @property
    def consumes(self) -> bool:
        """Whether it takes messages, as far as it can be seen from outside of the main loop."""
        return self._may_stand or self.hearing.turns(within=self._half_timeout)

    @property
    def may_stand(self) -> bool:
        """Whether the main loop stands still because it runs a task itself."""
        return self._may_stand

    @property
    def served(self) -> list[str]:
        """The queues that it serves. Any thread may ask, also while remote control changes them."""
        return list(self.app.amqp.queues.consume_from)

    def consume_jobs(self, *, wanted: bool) -> None:
        """Take messages, or none until they are wanted again. Any thread may say so, again and again: the main loop does it when it can."""
        if wanted != (self._left_queues is None) and self.hub is not None:
            self.hub.call_soon(self._consume_jobs, wanted)

    def _consume_jobs(self, wanted: bool) -> None:
        if wanted == (self._left_queues is None) or self.task_consumer is None:
            return
        if not wanted:
            self._left_queues = self.served
            for name in self._left_queues:
                self.cancel_task_queue(name)
            return
        names, self._left_queues = self._left_queues or [], None
        queues = self.app.amqp.queues
        for name in names:
            queues.select_add(queues[name])  # all of them first: should the connection break now, the next one takes them
        for name in names:
            self.add_task_queue(name)

    # connecting

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """A new connection for messages, over our own transport."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        kind = JobTransport if settings().sentinel is None else SentinelJobTransport
        connection.create_transport = partial(kind, connection, hearing=self.hearing, set_aside=self.set_aside)
        if kind is SentinelJobTransport:
            connection.info = partial(_without_logins, connection)
        return self.ensure_connected(connection)

    def ensure_connected(self, conn: Any) -> Any:
        """Try until there is a connection. Celery's waits up to 30 s between two attempts, and gives up after a hundred."""

        def failed(fault: BaseException, _interval: float) -> None:
            self._attempts += 1
            self.pulse.failed(unavailable(fault) or fault)
            self._outage.failed(unavailable(fault) or fault)

        self._connecting = True
        try:
            conn.ensure_connection(
                failed,
                max_retries=None,
                interval_start=0.2,
                interval_step=0.4,
                interval_max=LONGEST_WAIT_SECONDS,
                callback=worker_state.maybe_shutdown,
            )
        finally:
            self._connecting = False
        self.first_connection_attempt = False
        return conn

    def connect(self) -> Any:
        """The same, in the main loop. What the last connection left there could take the new one's sockets for its own."""
        if self.hub is None:
            return super().connect()
        self.hub.on_tick -= self._ticks
        before = set(self.hub.on_tick)
        connection = super().connect()
        self._ticks = self.hub.on_tick - before
        return connection

    def on_ready(self) -> None:
        """It is about to take messages."""
        super().on_ready()
        self._ready_at = time.monotonic()

    def _is_well(self) -> None:
        self._outage.over(ago=time.monotonic() - self._ready_at)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """The connection was lost, or refuses what it is asked: a new one helps against the first, and time against both."""
        self.pulse.failed(unavailable(exc) or exc)
        wait = self._outage.failed(unavailable(exc) or exc)
        super().on_connection_error_after_connected(exc)
        time.sleep(wait)

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """A new connection could be made, and not be used: Celery would try again at once."""
        self.pulse.failed(unavailable(exc) or exc)
        time.sleep(self._outage.failed(unavailable(exc) or exc))

    def on_close(self) -> None:
        """The connection is gone. Celery's pool forgets what it wrote to its processes and has not seen begin; but they will run it.

        Who forgets a job that runs takes it for one that ended without a record, and another copy runs beside it.
        """
        written = [job for job in tuple(getattr(getattr(self.pool, "_pool", None), "_cache", {}).values()) if _is_written(job)]
        for job in written:
            job._accepted = True
        try:
            super().on_close()
        finally:
            for job in written:
                job._accepted = False

    def register_with_event_loop(self, hub: Any) -> None:
        """Send events in a rhythm; Celery's dispatcher also sends when 24 have gathered. From now on the loop turns."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_EVENTS_SECONDS, self._send_events)
        # as all that is registered here, it goes with the connection
        hub.call_later(_WELL_SECONDS, self._is_well)
        _look_after_results(getattr(self.pool, "_pool", None), hub)
        hub.on_tick.add(self.hearing.turned)
        hub.on_tick.add(self.pulse.succeeded)
        self.hearing.begin()
        if not self._watched:
            self._watched = True
            threading.Thread(target=self._watch, name="platform-hearing", daemon=True).start()

    def stop(self) -> None:
        """Take no more messages. `stopped` is set when none can come any more."""
        super().stop()
        try:
            self._put_back_last()
        except Exception as fault:  # whatever it is: the job is found anyway
            log.warning("a message may have been lost on the way, because of %s; then its job is released again", fault)
        self.stopped.set()

    def shutdown(self) -> None:
        """The pool has ended: send what it still told."""
        self._send_events()
        super().shutdown()

    # what it holds

    def held(self) -> list[str]:
        """Deliveries of jobs that came and are not acknowledged, whether they have started or not. Any thread may ask."""
        qos = self._qos()
        return [] if qos is None else qos.held()

    def let_go(self) -> None:
        """Before the process ends at once: jobs were given back, and other messages go back to their queues."""
        qos = self._qos()
        if qos is not None:
            for tag in qos.held():
                qos.ack(tag)
            qos.restore_unacked_once()

    def _qos(self) -> JobQoS | None:
        channel = self._channel()
        return None if channel is None or not isinstance(channel.qos, JobQoS) else channel.qos

    def _channel(self) -> Any:
        return getattr(self.task_consumer, "channel", None)

    def _put_back_last(self) -> None:
        """The question for the next message is still open, and is answered within a second. What it brings has reached nobody."""
        channel = self._channel()
        if channel is None or not channel._in_poll:
            return
        connection = channel.client.connection
        connection._sock.settimeout(_LAST_ANSWER_SECONDS)
        answer = channel.client.parse_response(connection, "BRPOP")
        channel._in_poll = None
        if answer:
            queue, message = answer
            with channel.conn_or_acquire() as client:
                client.rpush(queue, message)

    # events

    def on_send_event_buffered(self) -> None:
        """Nothing: Celery would send after this turn of its loop, about twice for each job."""

    def _send_events(self) -> None:
        if self.event_dispatcher is not None:
            self.event_dispatcher.flush()

    # what cannot be taken

    def set_aside(self, queue: str, message: bytes | str, reason: str) -> None:
        """Keep what is no message for people to look at. Never raises: nothing in a queue may end a worker."""
        log.error("queue %s: a message was set aside (taskplatform garbage list): %s", queue, reason)
        try:
            self.app.platform().store.set_aside(queue, message, reason=reason, worker=self.app.worker_id(self.hostname))
        except TaskPlatformError as fault:
            log.error("it is not kept, because of %s: %.1000r", fault, message)

    def on_unknown_message(self, body: Any, message: Any) -> None:  # noqa: ARG002
        """It has no task's name."""
        self._set_aside(message, "names no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Any) -> None:  # noqa: ARG002
        """A task that is not registered here; of a job, another worker may have it."""
        task = message.headers["task"]
        if is_job(message.delivery_tag):
            self._refuse(message, f"does not know definition {task}")
        else:
            self._set_aside(message, f"no task {task} is known here")

    def on_invalid_task(self, body: Any, message: Any, exc: Any) -> None:  # noqa: ARG002
        """Celery cannot make a request of it."""
        self._cannot_take(message, exc)

    def on_decode_error(self, message: Any, exc: Any) -> None:
        """Its body cannot be read."""
        self._cannot_take(message, exc)

    def _cannot_take(self, message: Any, fault: Exception) -> None:
        if is_job(message.delivery_tag):
            self._refuse(message, f"cannot take its message: {fault}"[:300])
        else:
            self._set_aside(message, f"{type(fault).__name__}: {fault}"[:300])

    def _set_aside(self, message: Any, reason: str) -> None:
        self.set_aside(message.delivery_info["routing_key"], dumps(message._raw), reason)
        message.reject_log_error(log, self.connection_errors)

    def _refuse(self, message: Any, why: str) -> None:
        """Give a job back, for another worker."""
        worker, headers = self.app.worker_id(self.hostname), message.headers
        job_id, delivery = headers["id"], headers["delivery"]
        try:
            answer = self.app.platform().store.refuse(job_id, delivery=delivery, worker=worker, why=f"worker {worker} {why}")
        except TaskPlatformError as fault:
            answer = f"not told, because of {fault}; it will be released again"
        log.warning("delivery %d of job %s: this worker %s: %s", delivery, job_id, why, answer)
        if answer == "unknown":
            self.set_aside(message.delivery_info["routing_key"], dumps(message._raw), f"the ledger has no job {job_id}")
        message.ack_log_error(log, self.connection_errors)

    # hearing

    def _watch(self) -> None:
        """Never raises. Ends with the worker."""
        renewed: float | None = None
        waited = attempted = 0.0
        attempt = self._attempt
        while not self.stopped.wait(self._interval):
            waited += self._interval
            if attempt != self._attempt:
                # another connection, or another try to have one
                attempt, attempted = self._attempt, waited
                self.hearing.begin()
                continue
            if not self._listens or (self._connecting and waited - attempted < _LONGEST_ATTEMPT_SECONDS):
                self.hearing.begin()
                continue
            why = self.hearing.judge(self._heads, has_place=self._has_place)
            if why is None or not self._listens:
                continue
            if renewed is not None and waited - renewed < _RELAPSE * self._patience:
                self._give_up(why)
                return
            renewed = waited
            log.error("this worker is deaf: %s; renewing its connection to the broker", why)
            self._count_deaf()
            self._renew()
            self.hearing.begin()

    @property
    def _attempt(self) -> tuple[int, int]:
        return self.restart_count, self._attempts

    @property
    def _listens(self) -> bool:
        """Whether it should hear anything."""
        # an exit code of 0 stops it too
        stopping = any(flag is not None and flag is not False for flag in (worker_state.should_stop, worker_state.should_terminate))
        running = bool(self.blueprint.state == RUN)
        return running and not stopping and not self._may_stand and bool(self.served)

    @property
    def _may_stand(self) -> bool:
        """This pool runs its tasks in the main loop."""
        return type(self.pool).__module__ == _SOLO and len(worker_state.active_requests) > 0

    @property
    def _has_place(self) -> bool:
        """As Celery's `worker_disable_prefetch` has it."""
        slots: int = getattr(self.controller, "max_concurrency", None) or self.pool.num_processes
        return len(worker_state.reserved_requests) < slots

    def _heads(self) -> Mapping[str, str] | None:
        try:
            heads: Mapping[str, str] = self.app.platform().store.heads(self.served)
        except TaskPlatformError:
            return None
        return heads

    def _count_deaf(self) -> None:
        with suppress(TaskPlatformError):
            self.app.platform().store.count("deaf")

    def _renew(self) -> None:
        """Break the connection: Celery makes a new one. A loop that hangs may do so in a read."""
        if self.hearing.turns(within=self._half_timeout):
            self.hub.call_soon(self._break_off)
        else:
            self._cut()

    def _break_off(self) -> None:
        self._cut()
        raise ConnectionError("this worker hears nothing, and renews its connection")

    def _cut(self) -> None:
        """Let nobody wait for an answer on this connection, also not to close it."""
        connection = self.connection
        channels = list(connection._transport.channels) if connection is not None and connection._transport is not None else []
        for channel in channels:
            for name in ("client", "subclient"):
                used = getattr(channel.__dict__.get(name), "connection", None)
                sock = getattr(used, "_sock", None)
                if sock is not None:
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def _give_up(self, why: str) -> None:
        """End this worker, so that whoever runs it starts another."""
        log.critical("this worker is deaf again: %s; it ends, with exit code %d, and is to be started anew", why, _GAVE_UP)
        self._count_deaf()
        if self.hearing.turns(within=self._half_timeout):
            # as on SIGTERM: what runs may end
            signals.worker_shutting_down.send(sender=self.hostname, sig="deaf", how="Warm", exitcode=_GAVE_UP)
            worker_state.should_stop = _GAVE_UP
            self._cut()
            return
        # nobody would take the results of what runs in its processes; without a heartbeat others take the jobs
        for child in active_children():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        os._exit(_GAVE_UP)


def _without_logins(connection: Any) -> dict[str, Any]:
    """What remote control answers of a connection (`inspect stats`). Of one with Sentinels kombu's has the logins, twice."""
    told = type(connection).info(connection)
    told.pop("alternates", None)
    told["transport_options"] = {name: value for name, value in told["transport_options"].items() if name != "sentinel_kwargs"}
    return dict(told)


def _is_written(job: Any) -> bool:
    """Whether a process of the pool has it, or gets it just now, and has not said that it began."""
    return getattr(job, "_write_to", None) is not None and not job._accepted


def _look_after_results(pool: Any, hub: Any) -> None:
    """Let the prefork pool lose no result while the broker cannot be used, and its client keeps the worker's loop waiting or breaks it off.

    - It takes what its processes have sent before it acts upon a time limit, to the end of it: a process cannot write a long result before
      the one before it is read. Celery's timers come first when the loop goes on, and would hit runs that have ended long ago: end them as
      timed out, and their processes with them.
    - It reads to its end what it has begun to read before the loop is made anew. What follows the half of a message is no message, and the
      process would be taken for busy for ever. (Celery does it at its end alone.)
    """
    if not hasattr(pool, "_fileno_to_outq") or hasattr(pool, "_is_looked_after"):
        return
    pool._is_looked_after = True

    def after_results(act: Callable[..., None]) -> Callable[..., None]:
        def act_then(*arguments: Any) -> None:
            _take_results(pool, hub)
            _finish_reads(pool, hub)
            act(*arguments)

        return act_then

    pool._on_soft_timeout, pool._on_hard_timeout = after_results(pool._on_soft_timeout), after_results(pool._on_hard_timeout)
    reset = hub.reset

    def finish_and_reset() -> None:
        for process in _finish_reads(pool, hub):
            log.error("process %d has not sent the rest of a result: it is ended", process.pid)
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        reset()

    hub.reset = finish_and_reset


def _take_results(pool: Any, hub: Any) -> None:
    poller = select.poll()
    for descriptor in pool._fileno_to_outq:
        poller.register(descriptor, select.POLLIN)
    while readable := [hub.readers[descriptor] for descriptor, _ in poller.poll(0) if descriptor in hub.readers]:
        for callback, arguments in readable:
            # the hub's readers are functions, or what is left of one that has read a part
            if isinstance(callback, Generator):
                next(callback, None)
            else:
                callback(*arguments)


def _finish_reads(pool: Any, hub: Any) -> list[Any]:
    """The processes that have sent a part of a message and no more of it."""
    begun = [(hub.readers.get(descriptor, (None, ()))[0], descriptor, process) for descriptor, process in pool._fileno_to_outq.items()]
    return [process for rest, descriptor, process in begun if isinstance(rest, Generator) and not _finish_read(rest, descriptor)]


def _finish_read(rest: Generator[None, None, None], descriptor: int) -> bool:
    """Whether the message is read to its end, or there will be none."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + _REST_SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            poller.poll(left * 1000)
            next(rest)
    except (StopIteration, OSError, EOFError):
        return True
    except Exception:
        log.exception("a result broke its handler")
        return True
    return False
