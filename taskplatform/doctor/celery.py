"""What Celery must be set to, so that the platform's promises hold, and who is set otherwise."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from taskplatform.doctor.nodes import living_beats, living_workers
from taskplatform.doctor.report import Finding, Severity
from taskplatform.doctor.visit import Nothing, Visit, import_from_here
from taskplatform.model import Priority
from taskplatform.node import celery_settings, read_settings

#: The loops of a job: nothing of a message may come back on its own while the job may still run.
_LEAST_VISIBILITY_SECONDS = 7 * 86_400
_WORKER, _BEAT = "worker", "beat"


@dataclass(frozen=True, slots=True)
class Rule:
    """One setting and what it must be."""

    name: str
    wanted: str
    """In words."""
    holds: Callable[[Any], bool]
    why: str
    roles: tuple[str, ...] = (_WORKER,)
    severity: Severity = Severity.CRITICAL


def _is(wanted: object) -> Callable[[Any], bool]:
    return partial(_equals, wanted)


def _equals(wanted: object, value: Any) -> bool:
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _is_off(value: Any) -> bool:
    return not value


def _at_least(least: float, value: Any) -> bool:
    return isinstance(value, int | float) and value >= least


_ORDER = "Then a low job goes before a high one."
_TWICE = "A message is taken for unacknowledged, and jobs run twice or are lost."
RULES = (
    Rule("worker_prefetch_multiplier", "1", _is(1), f"A worker that takes more than it can start keeps jobs from other workers. {_ORDER}"),
    Rule("worker_disable_prefetch", "True", _is(True), f"A message that is fetched before a slot is free waits in the worker. {_ORDER}"),
    Rule("task_acks_late", "True", _is(True), "A job that is acknowledged before it ran frees its place: more are fetched than can start."),
    Rule("task_acks_on_failure", "True", _is(True), f"Retries are the ledger's. {_TWICE}"),
    Rule("task_acks_on_timeout", "True", _is(True), f"Retries are the ledger's. {_TWICE}"),
    Rule("task_reject_on_worker_lost", "False", _is_off, f"Lost jobs are the ledger's to give back. {_TWICE}"),
    Rule(
        "broker_transport_options.queue_order_strategy",
        "'priority'",
        _is("priority"),
        f"Celery's own order is round robin over high, medium and low. {_ORDER}",
    ),
    Rule(
        "broker_transport_options.priority_steps",
        "[0]",
        _is([0]),
        "Each queue becomes several lists, and the platform's scripts see only the first: jobs are not found.",
    ),
    Rule(
        "broker_transport_options.visibility_timeout",
        f"{_LEAST_VISIBILITY_SECONDS} or more",
        partial(_at_least, _LEAST_VISIBILITY_SECONDS),
        "Celery would send a message again while its task may still run. The platform gives lost jobs back itself, in seconds.",
        severity=Severity.WARNING,
    ),
    Rule(
        "broker_transport_options.socket_timeout",
        "some seconds",
        partial(_at_least, 0.001),
        "On a connection that is half open a worker waits for ever, and takes no jobs.",
        severity=Severity.WARNING,
    ),
    Rule(
        "task_queues",
        "high, medium and low, in this order, each with its own routing key",
        _is([[priority.value, priority.value] for priority in Priority]),
        "Queues are served in this order, and with one routing key all messages would reach all queues.",
    ),
    Rule(
        "worker_consumer",
        "'taskplatform.consumer:PlatformConsumer'",
        _is("taskplatform.consumer:PlatformConsumer"),
        "Without it the worker does not offer slots as it should, does not notice when it hears nothing, and garbage can end it.",
    ),
    Rule("accept_content", "['json']", _is(["json"]), "What is not JSON, such as pickle, can run code of whoever sent it."),
    Rule(
        "worker_cancel_long_running_tasks_on_connection_loss",
        "False",
        _is_off,
        "A short outage of Redis would end all jobs that run.",
    ),
    Rule(
        "task_ignore_result",
        "True",
        _is(True),
        "What became of a job stands in the ledger; results that Celery keeps beside are a second, weaker truth, and grow.",
        severity=Severity.WARNING,
    ),
    Rule(
        "result_backend",
        "'taskplatform.results:LedgerBackend'",
        _is("taskplatform.results:LedgerBackend"),
        "AsyncResult would not say what the ledger says.",
        severity=Severity.WARNING,
    ),
    Rule("task_always_eager", "False", _is_off, "Tasks would run in the process that sends them.", (_WORKER, _BEAT)),
    Rule("enable_utc", "True", _is(True), "Celery's own schedule would follow each machine's clock.", (_WORKER, _BEAT), Severity.WARNING),
    Rule(
        "beat_scheduler",
        "'taskplatform.beat:Scheduler'",
        _is("taskplatform.beat:Scheduler"),
        "Only this scheduler plans jobs, and lets one beat lead.",
        (_BEAT,),
    ),
)


def running(visit: Visit) -> Iterator[Finding]:
    """What the living workers and beats are really set to, as they say with their heartbeats."""
    told = [(f"worker {one.id}", _WORKER, one.info) for one in living_workers(visit)]
    told += [(f"beat {one.id}", _BEAT, one.info) for one in living_beats(visit)]
    if not told:
        raise Nothing("no worker and no beat lives")
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    rules = {rule.name: rule for rule in RULES}
    silent = []
    for who, role, info in told:
        conf = read_settings(info.get("conf"))
        if conf is None:
            silent.append(who)
            continue
        for rule, value in _broken(conf, role):
            found[rule.name, _shown(value)].append(who)
        lock = conf.get("redbeat_lock_timeout")
        if role == _BEAT and lock is not None and lock < visit.settings.beat_lock_timeout.total_seconds():
            # beats that have different settings are found here too
            yield _lock_timeout(who, lock, visit.settings.beat_lock_timeout.total_seconds())
    visit.seen(f"{len(told) - len(silent)} of {len(told)} nodes tell their settings")
    for (name, value), nodes in found.items():
        yield _finding(rules[name], value, ", ".join(nodes), "start the node without the option that changes it, or put it right in")
    if silent:
        yield Finding(
            code="settings_not_told",
            severity=Severity.INFO,
            subject=", ".join(silent),
            what="These do not say what they are set to: they are of another release.",
            why="What they are set to is not checked.",
            mend="taskplatform nodes drain …, and start the new release in their place",
        )


def here(visit: Visit) -> Iterator[Finding]:
    """What a process that starts in this folder would be set to."""
    import_from_here()
    if importlib.util.find_spec("celeryconfig") is None:
        raise Nothing("there is no celeryconfig.py in this folder")
    from celery import Celery

    app = Celery("taskplatform-doctor", set_as_current=False, autofinalize=False)
    app.config_from_object("celeryconfig")
    conf = celery_settings(app.conf)
    visit.seen("celeryconfig.py")
    for rule, value in [*_broken(conf, _WORKER), *_broken(conf, _BEAT)]:
        yield _finding(rule, _shown(value), "celeryconfig.py", "put it right in")


def _broken(conf: Mapping[str, Any], role: str) -> list[tuple[Rule, Any]]:
    # what a node of an older release does not tell is not judged
    return [(rule, conf[rule.name]) for rule in RULES if rule.roles[0] == role and rule.name in conf and not rule.holds(conf[rule.name])]


def _finding(rule: Rule, value: str, subject: str, how: str) -> Finding:
    return Finding(
        code="celery_setting",
        severity=rule.severity,
        subject=subject,
        what=f"{rule.name} is {value}; it has to be {rule.wanted}.",
        why=rule.why,
        mend=f"{how} celeryconfig.py: {rule.name} = {rule.wanted}, and restart",
    )


def _lock_timeout(who: str, lock: float, wanted: float) -> Finding:
    return Finding(
        code="beat_lock_timeout",
        severity=Severity.WARNING,
        subject=who,
        what=f"It holds its lock for {lock:g} s; TASKPLATFORM_BEAT_LOCK_TIMEOUT is {wanted:g} s here.",
        why="A leader that stands still for a moment loses its lock, and beats that differ do not agree on who is late.",
        mend="give all beats the same TASKPLATFORM_BEAT_LOCK_TIMEOUT, and restart them",
    )


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)[:200]
