"""Asks the store for what an answer needs, and has it derived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

from taskplatform.answers import future, past
from taskplatform.answers.values import Answer, Coming, Moment, Waits, instant
from taskplatform.answers.waiting import held, waiting
from taskplatform.errors import InvalidInput, UnknownDefinition, UnknownUser
from taskplatform.faults import did_you_mean
from taskplatform.model import Definition, Job, JobState, Transition, format_ms
from taskplatform.store import Background, Seen, Store
from taskplatform.windows import Due, Windows, hosts_of

_WAITING = (JobState.PENDING, JobState.QUEUED, JobState.RETRYING)
#: Occurrences that are explained in one go, and moments of a definition.
MOST_ANSWERS = 200
#: Times before and after now that can be asked for.
_FAR = timedelta(days=3660)
#: A user's jobs that are looked at for those that are planned and wait.
_JOBS_LOOKED_AT = 300
#: Who asks for a time at which an older schedule was due is told that, up to so long after it was changed.
_BEYOND_MS = 2 * 86_400_000


def why(
    store: Store, catalogue: Mapping[str, Definition], user: str, definition: str, *, at: datetime | date | None = None, last: int = 1
) -> list[Answer]:
    """What became of a user's occurrences of a definition, the newest first: see `Platform.why`."""
    _check("last", last)
    facts = _background(store, catalogue, user, definition)
    _check_at(at, facts.now_ms)
    if at is None:
        # some more, because a time can be due in two groups and belong to neither
        found = past.proper(_cases(store, facts, past.newest(facts, facts.now_ms, last + 3)))[:last]
    elif isinstance(at, datetime):
        at_ms = _instant(at)
        places = past.newest(facts, at_ms, 3, beyond_ms=_BEYOND_MS)
        chosen = past.belonging(facts, _cases(store, facts, places), at_ms)
        found = [chosen] if chosen else []
    else:
        found = past.proper(_cases(store, facts, past.of_day(facts, at, MOST_ANSWERS)))[:MOST_ANSWERS]
    ids = past.job_ids(facts, found)
    jobs = {job.id: job for job in store.jobs_by_id(ids)}
    histories = store.evidence.histories(list(jobs.values()))
    return [_answer(store, catalogue, facts, case, jobs.get(id_), histories.get(id_, ())) for case, id_ in zip(found, ids, strict=True)]


def waits(store: Store, catalogue: Mapping[str, Definition], job: Job) -> Waits | None:
    """For what a job waits; None where it does not, or went while it was looked at: see `Platform.waits`."""
    if job.state not in _WAITING:
        return None
    facts = store.evidence.background(job.user, job.definition)
    if facts is None:  # its user was deleted just now, and it with them
        return None
    known = catalogue.get(job.definition)
    standing, history = store.evidence.standing(job, facts.definition.host), store.evidence.histories([job]).get(job.id, ())
    found = held(facts, job, standing, history, None if known is None else known.retries)
    # what was read of one that goes meanwhile is of no state that there was
    now = store.jobs_by_id([job.id])
    return found if now and (now[0].state, now[0].delivery) == (job.state, job.delivery) else None


def coming(
    store: Store,
    catalogue: Mapping[str, Definition],
    user: str,
    definition: str | None = None,
    *,
    count: int = 1,
    horizon: timedelta,
    environment: Mapping[str, str] | None = None,
) -> Coming:
    """The next `count` moments of each definition that a user subscribes to, or of one: see `Platform.coming`."""
    _check("count", count)
    names = [one.definition for one in store.subscriptions_of(user)] if definition is None else [definition]
    moments: list[Moment] = []
    none: dict[str, str] = {}
    certainty = _Certainty(store, catalogue, horizon, environment)
    waiting_jobs = _planned_jobs(store, user)
    for name in names:
        facts = _background(store, catalogue, user, name)
        silent = future.silence(facts)
        if not silent:
            groups = sorted({facts.membership.group, *(one[0] for one in facts.membership.former)} if facts.membership else ())
            opened = store.evidence.opened(groups)
            jobs = [job for job in waiting_jobs if job.definition == name]
            found = future.next_moments(facts, opened, jobs, count)
            moments += [certainty.of(facts, one, opened) for one in found]
            silent = "" if found else f"the schedule of {name} has no further time"
        if silent:
            none[name] = silent
    return Coming(tuple(sorted(moments, key=lambda one: (one.moment_ms, one.definition))), none)


def _check(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MOST_ANSWERS:
        raise InvalidInput(f"{name} {number!r} is not accepted: 1 to {MOST_ANSWERS} is", field=name)


def _check_at(at: datetime | date | None, now_ms: int) -> None:
    if at is None:
        return
    # aware ones of the first and last year cannot be told in UTC
    day = at.replace(tzinfo=None).date() if isinstance(at, datetime) else at
    today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
    if not today - _FAR <= day <= today + _FAR:
        raise InvalidInput(f"at {at.isoformat()} is not accepted: a time within {_FAR.days} days from now is", field="at")


def _instant(at: datetime) -> int:
    if at.tzinfo is None:
        raise InvalidInput(f"at {at!r} is not accepted: a datetime with a time zone is, or a date", field="at")
    return max(0, int(at.timestamp() * 1000))


def _background(store: Store, catalogue: Mapping[str, Definition], user: str, definition: str) -> Background:
    facts = store.evidence.background(user, definition)
    if facts is None:
        deleted = next((one for one in store.changes(about=[user], limit=20) if one.kind == "user deleted" and one.subject == user), None)
        how = f": deleted by {deleted.actor} at {instant(deleted.at_ms)}, with all that was kept" if deleted else ""
        raise UnknownUser(f"no user {user!r}{how}")
    known = facts.definition.published or facts.definition.trail or facts.membership or facts.trail or definition in catalogue
    if not known:
        near = did_you_mean(definition, store.published())
        raise UnknownDefinition(f"no definition {definition!r}{near}: it is not published, and was not for as long as changes are kept")
    return facts


def _cases(store: Store, facts: Background, places: Sequence[past.Place]) -> list[past.Case]:
    asked = sorted({(one.group, one.suffix, one.at_ms) for one in places})
    seen = dict(zip(((gid, suffix) for gid, suffix, _ in asked), store.evidence.seen(asked), strict=True))
    return past.cases(facts, places, seen)


def _answer(
    store: Store, catalogue: Mapping[str, Definition], facts: Background, case: past.Case, job: Job | None, history: tuple[Transition, ...]
) -> Answer:
    answer = past.explain(facts, case, job, history)
    if answer is not None:
        return answer
    assert job is not None
    known = catalogue.get(job.definition)
    return waiting(facts, case, job, store.evidence.standing(job, facts.definition.host), history, None if known is None else known.retries)


def _planned_jobs(store: Store, user: str) -> list[Job]:
    states = frozenset({JobState.PENDING, JobState.QUEUED})
    page = store.jobs(user=user, states=states, limit=_JOBS_LOOKED_AT, scan=_JOBS_LOOKED_AT)
    return [job for job in page.items if job.source != "api" and job.state is JobState.PENDING]


class _Certainty:
    """Whether limits may make the window of an occurrence wider when it is opened. What it reads is read once for all definitions."""

    def __init__(
        self, store: Store, catalogue: Mapping[str, Definition], horizon: timedelta, environment: Mapping[str, str] | None
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._windows = Windows(store, catalogue, horizon=horizon, hosts=hosts_of(catalogue, environment))
        self._rates: dict[str, float] | None = None
        self._together: dict[str, int] = {}

    def of(self, facts: Background, moment: Moment, opened: Sequence[Seen]) -> Moment:
        if moment.note == "its job is made" or any(one.occurrence.at_ms == moment.occurrence_ms for one in opened):
            return moment
        if self._rates is None:
            self._rates = self._windows.rates()
        host = facts.definition.host
        names = [f"definition:{moment.definition}", *([f"host:{host}"] if host else []), "total"]
        applying = [name for name in names if name in self._rates]
        definition = self._catalogue.get(moment.definition)
        if not applying or definition is None or facts.membership is None:
            return moment
        (jobs,) = self._store.sizes([(facts.membership.group, moment.definition)])
        due = Due(definition, jobs, moment.occurrence_ms, moment.window_ms)
        (window,) = self._windows.fit([due], self._rates)
        if window.note:
            return replace(moment, certain=False, note=_joined(moment.note, f"{window.note}, as things are now"))
        for name in applying:
            together = self._jobs_under(name)
            if together > self._rates[name] * moment.window_ms / 1000:
                note = (
                    f"limit {name} may make its window of {format_ms(moment.window_ms)} wider: it lets {self._rates[name]:g}/s start, and "
                    f"up to {together} subscribers may come due together"
                )
                return replace(moment, certain=False, note=_joined(moment.note, note))
        return moment

    def _jobs_under(self, limit: str) -> int:
        """How many jobs could come due together under a limit: a job for each subscriber of each definition that it applies to."""
        if limit not in self._together:
            subscribers = self._store.evidence.subscribers()
            kind, _, name = limit.partition(":")
            if kind == "definition":
                subscribers = {name: subscribers.get(name, 0)}
            elif kind == "host":
                hosts = self._store.evidence.hosts(sorted(subscribers))
                subscribers = {one: count for one, count in subscribers.items() if hosts[one] == name}
            self._together[limit] = sum(subscribers.values())
        return self._together[limit]


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
