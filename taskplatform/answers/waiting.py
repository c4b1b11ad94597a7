"""For what a job waits, from how it stands: pure. The first thing that keeps it is told; what else there is comes as facts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from taskplatform.answers.past import Case
from taskplatform.answers.timeline import Bar, bars, by_whom
from taskplatform.answers.values import Answer, Outcome, Waits, instant
from taskplatform.model import Job, JobState, Limit, Priority, Transition, format_rate, span_text
from taskplatform.store import Background, BreakerState, Standing
from taskplatform.store.evidence import EVENT, GATED

#: As the doctor has it.
_START = "celery -A taskplatform.app worker"
#: A token that is missing by less than this comes at once.
_NEARLY = 1e-9


def waiting(facts: Background, case: Case, job: Job, standing: Standing, history: tuple[Transition, ...], retries: int | None) -> Answer:
    """Why a job that was made does not run yet. `retries` is how many its definition allows, where that is known."""
    found = held(facts, job, standing, history, retries)
    return Answer(
        user=facts.user,
        definition=facts.definition.id,
        occurrence_ms=case.place.at_ms,
        moment_ms=case.moment_ms,
        outcome=Outcome.WAITING if job.execute_after_ms <= standing.now_ms or job.attempt else Outcome.COMING,
        reason=found.reason,
        job_id=job.id,
        history=history,
        facts=(("moment", instant(case.moment_ms)), *found.facts),
        mend=found.mend,
    )


def held(facts: Background, job: Job, standing: Standing, history: tuple[Transition, ...], retries: int | None) -> Waits:
    """The same of any job that waits, whatever made it."""
    reason, mend = _reason(facts, job, standing, history, retries)
    told = [("due", _due(job, standing.now_ms)), ("priority", job.priority.value)]
    if job.state is not JobState.QUEUED and job.execute_after_ms <= standing.now_ms:
        told.append(("before it", _before(standing)))
    told += [(f"limit {name}", _limit(name, limit, standing)) for name, limit in sorted(standing.limits.items())]
    told.append(("workers", _workers(job.priority, standing)))
    return Waits(reason, mend, tuple(told))


def _due(job: Job, now_ms: int) -> str:
    left = job.execute_after_ms - now_ms
    return f"{instant(job.execute_after_ms)}, {f'in {span_text(left)}' if left > 0 else f'{span_text(-left)} ago'}"


def _before(standing: Standing) -> str:
    """What goes before it, as far as it may go."""
    tied = max(0, standing.tied - 1)
    parts = [f"{standing.before} of its priority by {'turn' if standing.fair else 'time'}"] if standing.before else []
    parts += [f"{tied} of its priority and {'round' if standing.fair else 'moment'}"] if tied else []
    parts += [f"{count} of priority {name}" for name, count in standing.higher.items() if count]
    return " and ".join(parts) or "nothing"


def _limit(name: str, limit: Limit, standing: Standing) -> str:
    parts = []
    if limit.per_second is not None:
        parts.append(f"{format_rate(limit.per_second)}, {max(0.0, standing.tokens.get(name, 0.0)):.1f} free now")
    if limit.concurrency is not None:
        parts.append(f"{standing.in_flight.get(name, 0)} of {limit.concurrency} in flight")
    return "; ".join(parts)


def _workers(priority: Priority, standing: Standing) -> str:
    serving = [one for one in standing.workers if priority.value in one.queues]
    drained = sum(one.drained for one in serving)
    slots = sum(one.slots for one in serving if not one.drained)
    text = f"{len(serving)} serve the queue {priority.value}, with {slots} slots"
    return f"{text}; {drained} drained" if drained else text


def _reason(facts: Background, job: Job, standing: Standing, history: tuple[Transition, ...], retries: int | None) -> tuple[str, str]:
    definition = facts.definition
    if job.state is JobState.QUEUED:
        return _in_queue(standing, history)
    barred = [one for one in bars(facts) if one.lasts and "disabled" not in one.text]
    if job.execute_after_ms > standing.now_ms:
        when = instant(job.execute_after_ms)
        if job.state is JobState.RETRYING:
            of = "" if retries is None else f" of {retries + 1}"
            reason = f"attempt {job.attempt}{of} did not succeed ({_last_reason(history, job)}); the next is due at {when}"
        elif job.attempt or job.delivery:
            reason = f"it was given back ({_last_reason(history, job)}), and may go again at {when}"
        else:
            reason = f"it waits for its slot in the window: its moment is {when}"
        also = _paused_too(facts, barred)
        return reason + (f"; it will not go then if this lasts: {also[0]}" if also else ""), also[1] if also else ""
    if standing.held or barred:
        held = [one.text for one in barred] or ["a pause that has just ended"]
        return f"it is held: {' and '.join(held)}", barred[0].mend if barred else "taskplatform health"
    if definition.paused is not None:
        text, mend = _paused_too(facts, []) or ("", "")
        return f"it waits for a pause to end: {text}", mend
    if standing.capped:
        return _user_cap(job, standing)
    return next(_limits(job, standing, definition.host), None) or _no_room(job, standing)


def _last_reason(history: tuple[Transition, ...], job: Job) -> str:
    return next((line.reason for line in reversed(history) if line.from_state is JobState.RUNNING), job.reason)


def _paused_too(facts: Background, barred: list[Bar]) -> tuple[str, str] | None:
    """What else will keep it, and the command that ends the first of it."""
    found = [(one.text, one.mend) for one in barred]
    if facts.definition.paused is not None:
        entry = next((one for one in reversed(facts.definition.trail) if one.kind == "paused"), None)
        who = by_whom(entry) if entry else "; by whom is not known, that was before changes were kept"
        text = f"definition {facts.definition.id} is paused{who} ({facts.definition.paused})"
        found.append((text, f"taskplatform resume {facts.definition.id}"))
    return (" and ".join(text for text, _ in found), found[0][1]) if found else None


def _user_cap(job: Job, standing: Standing) -> tuple[str, str]:
    own = standing.limits.get(f"user:{job.user}")
    limit = own or standing.limits.get("user")
    name = f"user:{job.user}" if own else "user"
    flying = standing.in_flight.get(f"user:{job.user}", 0)
    most = "" if limit is None else f" of {limit.concurrency}"
    reason = f"{job.user} has as many jobs in flight as may be: {flying}{most} (limit {name}); it goes when one ends"
    return reason, f"taskplatform limits set user:{job.user} --concurrency {max(flying, 1) + 1}"


def _limits(job: Job, standing: Standing, host: str) -> Iterator[tuple[str, str]]:
    """What limits and the host keep it from, as release asks for them."""
    blocked, gate = standing.blocked_until, standing.gate_until
    if "total" in standing.limits and standing.tokens.get("total", 1.0) < 1 - _NEARLY:
        yield _rate("total", standing)
    mine = f"definition:{job.definition}"
    own = standing.limits.get(mine)
    if own is not None and blocked is not None and blocked < GATED:
        if blocked == EVENT or (own.concurrency is not None and standing.in_flight.get(mine, 0) >= own.concurrency):
            flying = standing.in_flight.get(mine, 0)
            reason = (
                f"as many jobs of {job.definition} run as may: {flying} of {own.concurrency} (limit {mine}); the next goes when one ends"
            )
            yield reason, f"taskplatform limits set {mine} --concurrency {(own.concurrency or 0) + 1}"
        elif own.per_second is not None:
            yield _rate(mine, standing, until=blocked)
    breaker = standing.breaker
    if breaker is not None:
        opened = {BreakerState.OPEN: "its breaker is open", BreakerState.HELD: "it asked to be left alone"}
        how = opened.get(breaker.state, "it is half open: one job at a time probes it")
        until = f" until {instant(breaker.until_ms)}" if breaker.until_ms is not None and breaker.until_ms > standing.now_ms else ""
        since = f" since {instant(breaker.since_ms)}" if breaker.since_ms is not None else ""
        reason = f"its host {breaker.host} is held back{since}{until}: {how} ({breaker.reason})"
        yield reason, f"taskplatform breakers reset {breaker.host}"
    of_host = standing.limits.get(f"host:{host}")
    if of_host is not None and (blocked == GATED or gate is not None):
        name = f"host:{host}"
        line = f"; {standing.line_before} other definitions are before it in the host's line" if standing.line_before else ""
        if of_host.concurrency is not None and standing.in_flight.get(name, 0) >= of_host.concurrency:
            reason = f"as many jobs call {host} as may: {standing.in_flight[name]} of {of_host.concurrency} (limit {name}){line}"
            yield reason, f"taskplatform limits set {name} --concurrency {of_host.concurrency + 1}"
        elif of_host.per_second is not None:
            reason, mend = _rate(name, standing, until=gate)
            yield reason + line, mend


def _rate(name: str, standing: Standing, until: float | None = None) -> tuple[str, str]:
    limit, tokens = standing.limits[name], standing.tokens.get(name, 0.0)
    assert limit.per_second is not None
    if until is None or until >= EVENT or math.isinf(until):
        until = standing.now_ms + max(0.0, 1 - tokens) / limit.sustained * 1000 if limit.sustained else None
    mend = f"taskplatform limits set {name} --rate {format_rate(2 * limit.per_second)}"
    when = "" if until is None else f", the next may start at {instant(until)}"
    return f"limit {name} lets {format_rate(limit.per_second)} start, and has none free{when}; before it: {_before(standing)}", mend


def _no_room(job: Job, standing: Standing) -> tuple[str, str]:
    queue = job.priority.value
    serving = [one for one in standing.workers if queue in one.queues]
    if not serving:
        return f"no worker serves the queue {queue}", _START
    if all(one.drained for one in serving):
        return f"all {len(serving)} workers that serve the queue {queue} are drained", f"taskplatform nodes resume {serving[0].id}"
    if not standing.capacity.get(queue):
        return f"no worker that serves the queue {queue} offers a slot", "taskplatform nodes"
    before = sum(standing.queued.get(one, 0) * standing.capacity.get(f"{one}>{queue}", 0.0) for one in standing.higher)
    room = standing.capacity[queue] - before - standing.queued.get(queue, 0)
    if room <= 0:
        return f"all slots that serve the queue {queue} are taken; before it: {_before(standing)}", ""
    if standing.before or any(standing.higher.values()):
        return f"others go first: {_before(standing)}", ""
    return "it is due and goes with the next release", ""


def _in_queue(standing: Standing, history: tuple[Transition, ...]) -> tuple[str, str]:
    queue = standing.queue
    released = next((line.at_ms for line in reversed(history) if line.to_state is JobState.QUEUED), None)
    since = "" if released is None else f" since {instant(released)}"
    lying = max(0, standing.queued.get(queue, 1) - 1)
    reason = f"it lies in the queue {queue}{since} with {lying} others, for a worker to take it"
    serving = [one for one in standing.workers if queue in one.queues]
    if not serving:
        return f"{reason}: no worker serves that queue now", _START
    if all(one.drained for one in serving):
        return f"{reason}: all workers that serve it are drained", f"taskplatform nodes resume {serving[0].id}"
    return reason, ""
