"""Celery's and redbeat's settings, and nothing else. Every value that may differ between installations comes from Settings."""

from __future__ import annotations

from math import ceil as _ceil

from kombu import Queue
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from beat_schedule import beat_schedule as beat_schedule
from taskplatform.settings import settings

_settings = settings()
_sentinel = _settings.sentinel
# A Sentinel that does not answer is not asked again: the next one is.
_asking = {**_sentinel.asking(_settings.redis_tls), "retry": Retry(NoBackoff(), 0)} if _sentinel else {}

# Broker: one queue for each priority, served in this order. Each has its own routing key, or all would share the default's.
broker_url = _settings.broker_url
# With TLS, certificate and host name are verified: kombu would do neither by itself. What reads only the URL is told the same there.
broker_use_ssl = _settings.redis_tls or False
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# What Redis refuses for a time (no memory, read-only) must not end a worker either.
broker_channel_error_retry = True
broker_transport_options = {
    "queue_order_strategy": "priority",
    "priority_steps": [0],
    # The platform recovers lost jobs itself, in seconds. Celery's own redelivery would only bring stale copies.
    "visibility_timeout": 30 * 86_400,
    # A connection on which nothing comes any more is noticed before its worker counts as lost, and answers may take some seconds.
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "health_check_interval": 5,
    "socket_keepalive": True,
    **({"master_name": _sentinel.master, "sentinel_kwargs": _asking} if _sentinel else {}),
}
task_queues = (
    Queue("high", routing_key="high"),
    Queue("medium", routing_key="medium"),
    Queue("low", routing_key="low"),
)
task_default_queue = "low"
task_default_routing_key = "low"

# JSON only.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]

# The ledger in Redis knows what became of a job; results that Celery kept would be a second, weaker truth.
result_backend = "taskplatform.results:LedgerBackend"
task_ignore_result = True

# A job is fetched when a slot is free, and no earlier: otherwise priorities would not hold.
task_acks_late = True
task_acks_on_failure = True
task_acks_on_timeout = True
task_reject_on_worker_lost = False
worker_prefetch_multiplier = 1
worker_disable_prefetch = True
worker_concurrency = _settings.worker_slots
worker_cancel_long_running_tasks_on_connection_loss = False

# Keeps no notes of unacknowledged jobs in Redis, and sends events in bundles.
worker_consumer = "taskplatform.consumer:PlatformConsumer"

# What Flower shows.
worker_send_task_events = True
task_send_sent_event = False

enable_utc = True
timezone = "UTC"
worker_redirect_stdouts_level = "INFO"

# Beat: one leader under redbeat's lock.
beat_scheduler = "taskplatform.beat:Scheduler"
beat_max_loop_interval = _settings.beat_interval.total_seconds()
# Celery hides the password of a broker_url, and every value whose name has PASS in it, from `inspect conf`, and so from Flower.
redbeat_redis_url, _redbeat_login = _settings.redis_address
redbeat_redis_use_ssl = _settings.redis_tls or None
redbeat_key_prefix = f"{_settings.namespace}:redbeat:"
redbeat_lock_timeout = _ceil(_settings.beat_lock_timeout.total_seconds())  # it extends its lock by whole seconds
# A longer outage comes out in the scheduler's tick, which says so and tries again.
redbeat_redis_options = {
    "retry": Retry(ExponentialWithJitterBackoff(base=0.1, cap=1), 2),
    "retry_on_error": [RedisConnectionError, RedisTimeoutError],
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    **_redbeat_login,
}
if _sentinel:
    # its form of a URL with Sentinels: what is behind the colon it does not read
    redbeat_redis_url = "redis-sentinel://{}:{}".format(*_sentinel.sentinels[0])
    redbeat_redis_options |= {
        "sentinels": list(_sentinel.sentinels),
        "service_name": _sentinel.master,
        "db": _sentinel.database,
        "sentinel_kwargs": _asking,
    }
