"""Judges a chaos run by its evidence. The target's log is the judge of what ran; the histories must explain it.

What it looks for:

- lost: a job that must exist and does not, one that has not ended, or that ended otherwise than it must
- uninvited: a job that nobody asked for
- doubled: a second successful call of a job. It is explained where the history says that the run of the one call was taken from its
  worker (a run that ended by itself has recorded how long its call took); else it is not
- overlap: two calls of a job at a time, though the first one's run was believed to be alive when the second's began
- unaccounted: a call that belongs to no start in the history, or a result in the history that the target did not give
- key: an Idempotency-Key that is not the job's id
- early: a call before its job was due, or a retry before its wait had passed
- order: a job that was released while one of a higher priority was due and waited
- limit: more starts (exactly) or calls (but for what the network may delay) in some window than the limit in force allowed
- paused: a release of a definition that was paused
- history: one that does not follow the table of transitions, or goes back in time
- disagreement: what the run itself found
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from bench.limiter import worst_window_excess
from taskplatform.model import JobState, Priority, Transition
from tests.chaos.evidence import FINISHED, Call, Evidence, Rule, definition_of
from tests.integration.harness import check_history

#: A call's arrival may be noticed so much later than it was sent: the target, the worker and all others share a few processors.
JITTER_MS = 250
#: Instants are cut to milliseconds, so that a span may seem so much shorter than it was.
CUT_MS = 2


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be."""

    kind: str
    text: str
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a job, as its history tells it."""

    number: int
    worker: str
    started_ms: int
    ended_ms: int | None
    end: Transition | None

    @property
    def node(self) -> str:
        """The worker's node without the mark of its life."""
        return self.worker.split("#")[0].rpartition("@")[2]

    @property
    def reported(self) -> bool:
        """Whether the run itself said how it ended; else it was taken away: lost, given back or canceled."""
        return self.end is not None and "duration_ms" in self.end.detail

    @property
    def completed(self) -> bool:
        return self.end is not None and self.end.to_state is JobState.COMPLETED


@dataclass(slots=True)
class Verdict:
    """What was found, and the figures."""

    violations: list[Violation] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def kinds(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(one.kind for one in self.violations)


def check(evidence: Evidence) -> Verdict:
    """Everything, of one run."""
    return _Checker(evidence).run()


def attempts_of(history: Sequence[Transition]) -> list[Attempt]:
    """The runs that a history tells of."""
    found: list[Attempt] = []
    changes = [line for line in history if line.from_state is not line.to_state]
    for number, line in enumerate(changes):
        if line.to_state is JobState.RUNNING:
            end = changes[number + 1] if number + 1 < len(changes) else None
            found.append(Attempt(line.attempt, line.worker, line.at_ms, end.at_ms if end else None, end))
    return found


class _Checker:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.verdict = Verdict()
        self.attempts = {job_id: attempts_of(history) for job_id, history in evidence.histories.items()}
        calls: defaultdict[str, list[Call]] = defaultdict(list)
        for call in evidence.calls:
            calls[call.job].append(call)
        self.calls = {job_id: sorted(some, key=lambda call: call.arrived_ms) for job_id, some in calls.items()}
        #: Each call with the run that made it.
        self.made: dict[str, list[tuple[Call, Attempt]]] = {}
        self.doubled: Counter[str] = Counter()

    def run(self) -> Verdict:
        self._existence()
        self._histories()
        self._match_calls()
        self._ends()
        for job_id, made in self.made.items():
            self._doubled(job_id, made)
            self._overlaps(job_id, made)
        self._early()
        self._order()
        for rule in self.evidence.rules:
            self._rate(rule)
            self._concurrency(rule)
        self._pauses()
        for text in self.evidence.disagreements:
            self._blame("disagreement", text)
        self._figures()
        return self.verdict

    def _blame(self, kind: str, text: str, *jobs: str) -> None:
        self.verdict.violations.append(Violation(kind, text, jobs))

    # jobs and histories

    def _existence(self) -> None:
        expected, jobs = self.evidence.expected, self.evidence.jobs
        for job_id, one in expected.items():
            if one.must and job_id not in jobs:
                self._blame("lost", f"{job_id} must exist, and does not", job_id)
        for job_id in jobs:
            if job_id not in expected:
                self._blame("uninvited", f"{job_id} exists, and nobody asked for it", job_id)

    def _histories(self) -> None:
        for job_id, job in self.evidence.jobs.items():
            history = list(self.evidence.histories[job_id])
            try:
                check_history(history)
            except AssertionError as fault:
                self._blame("history", f"{job_id}: {fault}", job_id)
                continue
            released = sum(line.to_state is JobState.QUEUED and line.from_state is not JobState.QUEUED for line in history)
            if (job.state, job.attempt, job.delivery) != (history[-1].to_state, len(self.attempts[job_id]), released):
                found = f"{job.state}, attempt {job.attempt}, delivery {job.delivery}"
                self._blame("history", f"{job_id} is {found}: its history tells otherwise", job_id)

    def _match_calls(self) -> None:
        for job_id, calls in self.calls.items():
            made = []
            for call in calls:
                if call.key != job_id:
                    self._blame("key", f"a call of {job_id} had the key {call.key!r}", job_id)
                mine = [one for one in self.attempts.get(job_id, ()) if one.node == call.node and one.started_ms <= call.arrived_ms]
                if mine:
                    made.append((call, mine[-1]))
                else:
                    self._blame("unaccounted", f"{call.node} called for {job_id} at {call.arrived_ms}: no start tells of it", job_id)
            self.made[job_id] = made

    def _ends(self) -> None:
        for job_id, job in self.evidence.jobs.items():
            wanted = self.evidence.expected.get(job_id)
            if wanted is None:
                continue
            losses = self._losses(job_id)
            if job.state not in FINISHED:
                self._blame("lost", f"{job_id} is {job.state}", job_id)
            elif wanted.must_be_canceled and job.state is not JobState.CANCELED:
                self._blame("lost", f"{job_id} was canceled, and is {job.state}", job_id)
            elif job.state is JobState.CANCELED:
                if not wanted.may_be_canceled:
                    self._blame("lost", f"{job_id} is canceled, and nobody did that", job_id)
            elif job.state is JobState.COMPLETED:
                if wanted.poison:
                    self._blame("unaccounted", f"{job_id} is completed, and it ends its process each time", job_id)
                self._answered(job_id)
            elif losses < self.evidence.max_losses or not job.reason.startswith("poison pill"):
                self._blame("lost", f"{job_id} is {job.state} after {losses} losses: {job.reason}", job_id)

    def _answered(self, job_id: str) -> None:
        """A completed job had a good answer in its last run."""
        last = self.attempts[job_id][-1] if self.attempts[job_id] else None
        if last is None or not any(call.succeeded and run is last for call, run in self.made.get(job_id, ())):
            self._blame("unaccounted", f"{job_id} is completed, and the target gave its last run no good answer", job_id)

    def _losses(self, job_id: str) -> int:
        """How often the process that had it was lost, by its history."""
        words = (" lost", "died", "broke off", "without a record", "poison pill")
        return sum(
            line.from_state in (JobState.RUNNING, JobState.QUEUED)
            and line.to_state is not line.from_state
            and any(word in line.reason for word in words)
            and "message was lost" not in line.reason
            for line in self.evidence.histories[job_id]
        )

    # what the target saw

    def _doubled(self, job_id: str, made: Sequence[tuple[Call, Attempt]]) -> None:
        good = [run for call, run in made if call.succeeded]
        by_run = Counter(run.number for run in good)
        for run in {run.number: run for run in good}.values():
            if by_run[run.number] > 1:
                self.doubled["unexplained"] += 1
                self._blame("doubled", f"run {run.number} of {job_id} had {by_run[run.number]} good answers", job_id)
        counted = [run for run in {run.number: run for run in good}.values() if run.reported]
        for run in counted:
            if not run.completed:
                self.doubled["unexplained"] += 1
                reason = run.end.reason if run.end else ""
                self._blame("doubled", f"run {run.number} of {job_id} had a good answer, and reported {reason!r}", job_id)
        self.doubled["explained"] += max(0, len(by_run) - max(1, len(counted)))

    def _overlaps(self, job_id: str, made: Sequence[tuple[Call, Attempt]]) -> None:
        for number, (first, run) in enumerate(made):
            for second, other in made[number + 1 :]:
                if second.arrived_ms >= first.ended_ms or (run.number == other.number and not first.succeeded):
                    continue
                earlier, later = sorted((run, other), key=lambda one: one.number)
                taken = earlier.end is not None and not earlier.reported and earlier.end.at_ms <= later.started_ms
                if run.number == other.number or not taken:
                    calls = f"{first.arrived_ms} to {first.ended_ms} and from {second.arrived_ms} on"
                    self._blame("overlap", f"{job_id} was called twice at a time: {calls}", job_id)

    def _early(self) -> None:
        for job_id, calls in self.calls.items():
            wanted = self.evidence.expected.get(job_id)
            if wanted and calls[0].arrived_ms < wanted.not_before_ms:
                by = wanted.not_before_ms - calls[0].arrived_ms
                self._blame("early", f"{job_id} was called {by} ms before it was due", job_id)
        for job_id, job in self.evidence.jobs.items():
            runs = self.attempts[job_id]
            if job.state is JobState.COMPLETED and runs and runs[-1].started_ms < job.execute_after_ms:
                self._blame("early", f"{job_id} started {job.execute_after_ms - runs[-1].started_ms} ms before its execute_after", job_id)

    # order and limits, by the histories

    def _waits(self) -> Iterator[tuple[Priority, int, int]]:
        """Of each job that nothing held back: from when to when it last was due and waited.

        Only of the last wait `execute_after` is known. What may be held back, by a limit or a pause of its own, is left out.
        """
        for job_id, job in self.evidence.jobs.items():
            if definition_of(job_id) in self.evidence.held_back:
                continue
            changes = [line for line in self.evidence.histories[job_id] if line.from_state is not line.to_state]
            waits = [number for number, line in enumerate(changes) if line.to_state in (JobState.PENDING, JobState.RETRYING)]
            if waits and waits[-1] + 1 < len(changes):
                since = max(changes[waits[-1]].at_ms, job.execute_after_ms)
                yield job.priority, since, changes[waits[-1] + 1].at_ms

    def _order(self) -> None:
        """No tolerance is needed: one script sees all that is due and fills the queues, the higher one first, all to one depth."""
        waits: defaultdict[Priority, list[tuple[int, int]]] = defaultdict(list)
        for priority, since, until in self._waits():
            waits[priority].append((since, until))
        rank = list(Priority)
        above: dict[Priority, Callable[[int], bool]] = {}
        for number, priority in enumerate(rank):
            above[priority] = _covers(sorted(wait for higher in rank[:number] for wait in waits[higher]))
        for job_id, job in self.evidence.jobs.items():
            for line in self.evidence.histories[job_id]:
                if line.reason == "released" and line.to_state is JobState.QUEUED and above[job.priority](line.at_ms):
                    text = f"{job_id}, {job.priority}, was released at {line.at_ms} while one of a higher priority was due and waited"
                    self._blame("order", text, job_id)

    def _under(self, rule: Rule) -> Iterator[str]:
        for job_id in self.evidence.jobs:
            if definition_of(job_id) in rule.definitions:
                yield job_id

    def _rate(self, rule: Rule) -> None:
        if rule.limit.per_second is None or rule.limit.burst is None:
            return
        starts, arrivals = [], []
        for job_id in self._under(rule):
            runs = [run for run in self.attempts[job_id] if rule.start_ms <= run.started_ms <= rule.end_ms]
            starts += [run.started_ms for run in runs]
            numbers = {run.number for run in runs}
            # the first of each run: a repetition on a connection that the target had closed is part of a call
            first = {run.number: (call, run) for call, run in reversed(self.made.get(job_id, ())) if run.number in numbers}
            # one that came later was held up on its way, or asked for another token: then its start is not what it went by
            arrivals += [call.arrived_ms for call, run in first.values() if call.arrived_ms - run.started_ms <= JITTER_MS]
        for what, times, slack_ms in (("starts", starts, CUT_MS), ("calls", arrivals, JITTER_MS)):
            excess = worst_window_excess([at / 1000 for at in sorted(times)], rule.limit.per_second, rule.limit.burst)
            if excess > rule.limit.per_second * slack_ms / 1000:
                span = f"{rule.start_ms} to {rule.end_ms}"
                self._blame("limit", f"{rule.name}, {rule.limit}, {span}: {excess:.2f} {what} too many in the worst window")

    def _concurrency(self, rule: Rule) -> None:
        most = rule.limit.concurrency
        if most is None:
            return
        releases, events = [], []
        for job_id in self._under(rule):
            for since, until in _flights(self.evidence.histories[job_id]):
                events += [(since, 1, 1), (until, 0, -1)]
                if rule.start_ms <= since <= rule.end_ms:
                    releases.append(since)
        flying, busiest = 0, {}
        for at, _, by in sorted(events):  # at one instant what ends goes first
            flying += by
            busiest[at] = flying
        over = [at for at in releases if busiest[at] > most]
        if over:
            self._blame("limit", f"{rule.name}, {rule.limit}: {busiest[over[0]]} were in flight at {over[0]}, as at {len(over)} releases")

    def _pauses(self) -> None:
        for definition, since, until in self.evidence.pauses:
            for job_id, history in self.evidence.histories.items():
                if definition_of(job_id) != definition:
                    continue
                for line in history:
                    if line.reason == "released" and line.to_state is JobState.QUEUED and since < line.at_ms < until:
                        self._blame("paused", f"{job_id} was released at {line.at_ms}, paused since {since}", job_id)

    # figures

    def _figures(self) -> None:
        evidence, kinds = self.evidence, self.verdict.kinds()
        planned_at = {job_id: one.not_before_ms for job_id, one in evidence.expected.items()}
        lags = sorted(
            runs[0].started_ms - planned_at[job_id]
            for job_id, runs in self.attempts.items()
            if runs and job_id in planned_at and definition_of(job_id) not in evidence.held_back
        )
        recovered = sorted(self._recoveries())
        self.verdict.figures = {
            "jobs": len(evidence.jobs),
            "calls": len(evidence.calls),
            "faults": len(evidence.faults),
            "lost": kinds["lost"],
            "doubled_explained": self.doubled["explained"],
            "doubled_unexplained": self.doubled["unexplained"],
            "overlaps": kinds["overlap"],
            "early": kinds["early"],
            "over_limit": kinds["limit"],
            "out_of_order": kinds["order"],
            "violations": sum(kinds.values()),
            "recovery_s_median": round(statistics.median(recovered) / 1000, 2) if recovered else None,
            "recovery_s_max": round(recovered[-1] / 1000, 2) if recovered else None,
            "lag_ms_p50": _percentile(lags, 50),
            "lag_ms_p99": _percentile(lags, 99),
            "lag_ms_max": lags[-1] if lags else None,
            "runs_taken_away": sum(run.end is not None and not run.reported for runs in self.attempts.values() for run in runs),
            "states": dict(sorted(Counter(str(job.state) for job in evidence.jobs.values()).items())),
            "faults_by_kind": dict(sorted(Counter(fault.kind for fault in evidence.faults).items())),
        }

    def _recoveries(self) -> Iterator[int]:
        """From the kill of a worker to the next start of each job that it ran."""
        kills: defaultdict[str, list[int]] = defaultdict(list)
        for fault in self.evidence.faults:
            if fault.kind in ("kill_worker", "kill_main"):
                kills[fault.victim].append(fault.at_ms)
        for runs in self.attempts.values():
            for run, following in pairwise(runs):
                if run.end is None or " lost" not in run.end.reason:
                    continue
                struck = [at for at in kills[run.node] if run.started_ms <= at <= run.end.at_ms]
                if struck:
                    yield following.started_ms - struck[0]


def _flights(history: Sequence[Transition]) -> Iterator[tuple[int, int]]:
    """From each release of a job to its end or its way back."""
    since = None
    flying = (JobState.QUEUED, JobState.ASSIGNED, JobState.RUNNING)
    for line in history:
        if line.to_state in flying:
            since = line.at_ms if since is None else since
        elif since is not None:
            yield since, line.at_ms
            since = None


def _covers(spans: Sequence[tuple[int, int]]) -> Callable[[int], bool]:
    """Whether an instant lies inside one of the spans, sorted by their starts; the ends do not belong to them."""
    starts = [start for start, _ in spans]
    furthest = list(accumulate((end for _, end in spans), max))

    def covers(at: int) -> bool:
        before = bisect_left(starts, at)
        return before > 0 and furthest[before - 1] > at

    return covers


def _percentile(values: Sequence[int], percent: int) -> int | None:
    return values[min(len(values) - 1, len(values) * percent // 100)] if values else None


def story(evidence: Evidence, job_id: str, *, calls: bool = True) -> str:
    """All that is known of a job, for whoever looks for the cause; without its calls and the faults beside it in less time."""
    lines = [f"--- {job_id}", f"expected: {evidence.expected.get(job_id)}", f"job: {evidence.jobs.get(job_id)}"]
    history = evidence.histories.get(job_id, ())
    lines += [
        f"  {line.at_ms} {line.from_state or '-'} -> {line.to_state} #{line.attempt} {line.worker} {line.reason} {dict(line.detail) or ''}"
        for line in history
    ]
    lines += [f"  call {call}" for call in evidence.calls if calls and call.job == job_id]
    if history and calls:
        first, last = history[0].at_ms - 1000, history[-1].at_ms + 1000
        lines += [f"  fault {fault}" for fault in evidence.faults if first <= max(fault.at_ms, fault.until_ms) and fault.at_ms <= last]
    return "\n".join(lines)


def tell(evidence: Evidence, verdict: Verdict, *, most: int = 5) -> str:
    """The violations, and of each kind the first few with their stories."""
    lines = []
    by_kind: Mapping[str, list[Violation]] = defaultdict(list)
    for one in verdict.violations:
        by_kind[one.kind].append(one)
    for kind, some in by_kind.items():
        lines.append(f"{kind}: {len(some)}")
        for one in some[:most]:
            lines.append(f"  {one.text}")
            lines += [story(evidence, job_id) for job_id in one.jobs[:1]]
    return "\n".join(lines)
