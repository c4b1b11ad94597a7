"""Holds what the platform answers against the book. Each disagreement is a line for people who look for who is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bench.day.book import Book, Deed, Fate, Pair, Verdict, What
from bench.day.town import Town
from taskplatform.model import JobState

_STATES = {
    Fate.COMPLETED: {JobState.COMPLETED},
    Fate.RUNNING: {JobState.RUNNING},
    Fate.WAITING: {JobState.PENDING, JobState.QUEUED, JobState.RETRYING},
    Fate.FAILED: {JobState.FAILED},
    Fate.TIMED_OUT: {JobState.TIMED_OUT},
    Fate.POISON: {JobState.FAILED},
    Fate.CANCELED: {JobState.CANCELED},
    Fate.OVERLAP: {JobState.REJECTED},
    Fate.REJECTED: {JobState.REJECTED},
}


@dataclass
class Report:
    """What was compared, and what does not agree."""

    compared: Counter[str] = field(default_factory=Counter)
    disagreements: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        """Something does not agree."""
        self.disagreements.append(what)


def check_book(town: Town, report: Report) -> None:
    """That the platform did what the book says: which jobs there are, and how they ended."""
    book, now_ms = town.book, town.world.clock.now_ms
    jobs = {}
    ids = sorted(book.made)
    for job in town.world.store.jobs_by_id(ids):
        jobs[job.id] = job
    expected: set[str] = set()
    for pair in book.pairs():
        for at_ms in book.occurrences(pair, now_ms):
            job_id = f"{pair[1]}:{pair[0]}:{at_ms}"
            expected.add(job_id)
            verdict = book.verdict(pair, at_ms, now_ms)
            report.compared[f"book {verdict.fate}"] += 1
            if verdict.note.startswith("the book does not know"):
                report.wrong(f"book: {told(pair, at_ms)} has no job, and nothing kept it: {verdict} {book.record_of(pair, at_ms)}")
            job = jobs.get(job_id)
            if job is None:
                continue
            if job.state not in _STATES.get(verdict.fate, {job.state}):
                last = town.world.store.history(job_id)[-3:]
                report.wrong(f"book: {told(pair, at_ms)} is {job.state} ({job.reason}), and for the book {verdict} {last}")
    for job_id in sorted(jobs.keys() - expected):
        if jobs[job_id].source != "trigger":
            definition, user, occurrence = job_id.split(":")
            report.wrong(f"book: {told((user, definition), int(occurrence))} has a job, made {clock(book.made[job_id])}; {story(book, (user, definition))}")


def told(pair: Pair, at_ms: int) -> str:
    """An occurrence, for people."""
    return f"{pair[1]} of {pair[0]} at {clock(at_ms)} ({at_ms})"


def clock(at_ms: int) -> str:
    """An instant, for people."""
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%d %H:%M:%S.%f}"[:-3]


def story(book: Book, pair: Pair) -> str:
    """What was done that can have to do with a pair."""
    deeds = [*book.of_pair[pair], *book.of_user[pair[0]], *book.of_definition[pair[1]]]
    deeds += [deed for deed in book.deeds if deed.what in (What.PLANNER_DOWN, What.PLANNER_UP)]
    return "; ".join(f"{clock(deed.at_ms)} {deed.what} by {deed.actor}{f' {deed.rule}' if deed.rule else ''}" for deed in sorted(deeds, key=_when))


def _when(deed: Deed) -> int:
    return deed.at_ms
