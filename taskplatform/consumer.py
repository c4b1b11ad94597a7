"""How a worker takes messages from the broker and sends events: as Celery does, with fewer round trips.

kombu writes a note to Redis for each message that arrives, and deletes it when the message is acknowledged, so that another worker
can find what a lost one held. A job needs no note: the ledger knows which jobs were released and not started (`reclaim`) and which
run where (`recover`). Messages of other tasks, as the sweep, keep theirs.
"""

from __future__ import annotations

import json
import logging
import select
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.transport import redis, virtual

from taskplatform.message import is_job
from taskplatform.outage import LONGEST_WAIT_SECONDS, OutageLog
from taskplatform.store import unavailable

log = logging.getLogger(__name__)

#: A task event waits so long for others to be sent with.
_EVENTS_SECONDS = 0.1
# kombu's says each second, with a traceback, what the loops of the worker say once a minute: that Redis has no memory left.
logging.getLogger("kombu.transport.redis").addFilter(lambda record: not str(record.msg).startswith("maybe_refresh_binding_expiry"))

#: A connection that held for so long was well.
_WELL_SECONDS = 10.0

#: The broker answers a question for the next message after a second at the latest.
_LAST_ANSWER_SECONDS = 2.0


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
                    push(
                        message.delivery_info["routing_key"], json.dumps(message._raw)
                    )  # as it came; `serializable` gives the body as bytes
                pipe.execute()
        except Exception as fault:  # whatever it is: a worker must not end for a job that is found anyway
            tags = ", ".join(message.delivery_tag for message in messages)
            log.warning("not put back, because of this: %s; if not started, they are released again: %s", unavailable(fault) or fault, tags)


class PlatformConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, that keeps no notes of jobs, and sends the task events of a burst together.

    While the broker cannot be used it tries again at short intervals, for as long as it takes, and says so once a minute.
    """

    task_consumer: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopped = threading.Event()
        self._outage = OutageLog(log, "taking jobs")
        self._connected_at = 0.0
        # what they tell workers of each other Redis tells them here; and after each outage they cost a second, and at times a traceback
        super().__init__(*args, **{**kwargs, "without_gossip": True, "without_mingle": True})

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's waits up to 30 s between two attempts, and gives up after a hundred."""
        conn.ensure_connection(
            lambda fault, _interval: self._outage.failed(unavailable(fault) or fault),
            max_retries=None,
            interval_start=0.2,
            interval_step=0.4,
            interval_max=LONGEST_WAIT_SECONDS,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def on_ready(self) -> None:
        """It is about to take messages."""
        super().on_ready()
        self._connected_at = time.monotonic()

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """The connection was lost, or refuses what it is asked: a new one helps against the first, and time against both."""
        if time.monotonic() - self._connected_at > _WELL_SECONDS:
            self._outage.over()
        wait = self._outage.failed(unavailable(exc) or exc)
        super().on_connection_error_after_connected(exc)
        time.sleep(wait)

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """A new connection could be made, and not be used: Celery would try again at once."""
        time.sleep(self._outage.failed(unavailable(exc) or exc))

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """A new connection for messages. Its channel makes its QoS when that is first asked for, after this."""
        connection = super().connection_for_read(heartbeat=heartbeat)
        connection.default_channel.QoS = JobQoS
        return connection

    def register_with_event_loop(self, hub: Any) -> None:
        """Send events in a rhythm. Celery's dispatcher also sends when 24 have gathered."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_EVENTS_SECONDS, self._send_events)
        _look_at_results_first(getattr(self.pool, "_pool", None), hub)

    def on_send_event_buffered(self) -> None:
        """Nothing: Celery would send after this turn of its loop, about twice for each job."""

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

    def _send_events(self) -> None:
        if self.event_dispatcher is not None:
            self.event_dispatcher.flush()


def _look_at_results_first(pool: Any, hub: Any) -> None:
    """Let the prefork pool take what its processes have sent before it acts upon a time limit.

    While the broker cannot be used, its client keeps the worker's loop waiting for seconds. Celery's timers come first after that,
    and would hit runs that have ended long ago: end them as timed out, and their processes with them.
    """
    if not hasattr(pool, "_fileno_to_outq") or hasattr(pool, "_looks_at_results_first"):
        return
    pool._looks_at_results_first = True

    def after_results(act: Callable[..., None]) -> Callable[..., None]:
        def act_then(*arguments: Any) -> None:
            _take_results(pool, hub)
            act(*arguments)

        return act_then

    pool._on_soft_timeout, pool._on_hard_timeout = after_results(pool._on_soft_timeout), after_results(pool._on_hard_timeout)


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
