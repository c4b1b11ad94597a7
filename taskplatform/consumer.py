"""How a worker takes messages from the broker and sends events: as Celery does, with fewer round trips.

kombu writes a note to Redis for each message that arrives, and deletes it when the message is acknowledged, so that another worker
can find what a lost one held. A job needs no note: the ledger knows which jobs were released and not started (`reclaim`) and which
run where (`recover`). Messages of other tasks, as the sweep, keep theirs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from celery.worker.consumer import Consumer
from kombu.transport import redis, virtual

from taskplatform.message import is_job

log = logging.getLogger(__name__)

#: A task event waits so long for others to be sent with.
_EVENTS_SECONDS = 0.1


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

    def restore_unacked(self, client: Any = None) -> None:
        """The channel closes: put back what is held, in its old order. What has started meanwhile is dropped where it arrives."""
        jobs = [tag for tag in self._delivered if is_job(tag)]
        self._put_back([self._delivered.pop(tag) for tag in reversed(jobs)])
        super().restore_unacked(client)

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
            log.warning("not put back, because of %s; if not started, they are released again: %s", fault, tags)


class PlatformConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, that keeps no notes of jobs, and sends the task events of a burst together."""

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        """A new connection for messages. Its channel makes its QoS when that is first asked for, after this."""
        connection = super().connection_for_read(heartbeat=heartbeat)
        connection.default_channel.QoS = JobQoS
        return connection

    def register_with_event_loop(self, hub: Any) -> None:
        """Send events in a rhythm. Celery's dispatcher also sends when 24 have gathered."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(_EVENTS_SECONDS, self._send_events)

    def on_send_event_buffered(self) -> None:
        """Nothing: Celery would send after this turn of its loop, about twice for each job."""

    def shutdown(self) -> None:
        """The pool has ended: send what it still told."""
        self._send_events()
        super().shutdown()

    def _send_events(self) -> None:
        if self.event_dispatcher is not None:
            self.event_dispatcher.flush()
