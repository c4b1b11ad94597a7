"""Holds what the platform answers against the book. Each disagreement is a line for people who look for who is wrong."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bench.day.book import Book, Deed, Fate, Pair, Verdict, What
from bench.day.town import Town
from taskplatform.answers import Answer, Outcome
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


#: What `why` may call a fate. A job that failed for good and one that took its workers down are told apart.
_OUTCOMES = {
    Fate.COMPLETED: {Outcome.COMPLETED},
    Fate.RUNNING: {Outcome.RUNNING},
    Fate.WAITING: {Outcome.WAITING},
    Fate.FAILED: {Outcome.FAILED},
    Fate.TIMED_OUT: {Outcome.TIMED_OUT},
    Fate.POISON: {Outcome.DEAD},
    Fate.CANCELED: {Outcome.CANCELED},
    Fate.DISCARDED: {Outcome.DISCARDED},
    Fate.OVERLAP: {Outcome.SKIPPED, Outcome.REJECTED},
    Fate.REJECTED: {Outcome.REJECTED},
    Fate.MISSED: {Outcome.MISSED},
    Fate.SKIPPED: {Outcome.SKIPPED},
    Fate.COMING: {Outcome.COMING},
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
    jobs = {job.id: job for job in town.world.store.jobs_by_id(sorted(book.made))}
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
            if job is not None and job.state not in _STATES.get(verdict.fate, {job.state}):
                last = town.world.store.history(job_id)[-3:]
                report.wrong(f"book: {told(pair, at_ms)} is {job.state} ({job.reason}), and for the book {verdict} {last}")
    for job_id in sorted(jobs.keys() - expected):
        if jobs[job_id].source != "trigger":
            definition, user, occurrence = job_id.split(":")
            pair = (user, definition)
            report.wrong(f"book: {told(pair, int(occurrence))} has a job, made {clock(book.made[job_id])}; {story(book, pair)}")


def check_why(town: Town, report: Report) -> None:
    """That `Platform.why` says of each occurrence of each pair what became of it, and names who did what when."""
    book, platform, now_ms = town.book, town.world.platform, town.world.clock.now_ms
    for number, pair in enumerate(book.pairs()):
        mine = book.occurrences(pair, now_ms)
        if not mine and number % 10:
            # nothing was due: one in ten will do
            continue
        # times at which it was not the user's are answered too
        deeds = [*book.of_pair[pair], *book.of_definition[pair[1]]]
        foreign = 60 if any(deed.what in (What.UNSUBSCRIBED, What.REMOVED) for deed in deeds) else 5
        given, extra = platform.why(*pair, last=min(200, len(mine) + foreign)), book.triggers(pair[1])
        answers = {one.occurrence_ms: one for one in given if one.occurrence_ms not in extra}
        _check_triggers(pair, [one for one in given if one.occurrence_ms in extra], book, now_ms, report)
        for at_ms in mine:
            answer, verdict = answers.pop(at_ms, None), book.verdict(pair, at_ms, now_ms)
            report.compared[f"why {verdict.fate}"] += 1
            if answer is None:
                report.wrong(f"why: {told(pair, at_ms)} is not among the answers; book: {verdict}; {story(book, pair)}")
            elif fault := _fault(verdict, answer, book):
                said = f"answer: {answer.outcome}: {answer.reason} {answer.facts}"
                report.wrong(f"why: {told(pair, at_ms)}: {fault}; {said}; book: {verdict}; {story(book, pair)}")
        for at_ms, answer in answers.items():
            # of times in which the user was not subscribed, or the definition was removed, it may say so
            removed = book.off_at(pair[1], at_ms)
            between = [*book.fell_between(pair, at_ms), *([removed] if removed else [])]
            told_of = answer.outcome is Outcome.SKIPPED and any(_names(answer.reason, deed) for deed in between)
            if answer.outcome is not Outcome.NOT_SUBSCRIBED and not told_of and at_ms > town.start_ms:
                known = f"answer: {answer.outcome}: {answer.reason}"
                report.wrong(f"why: {told(pair, at_ms)} is none of the user's for the book; {known}; {story(book, pair)}")


def _check_triggers(pair: Pair, answers: list[Answer], book: Book, now_ms: int, report: Report) -> None:
    """Of occurrences that somebody triggered."""
    for answer in answers:
        report.compared["why of a trigger"] += 1
        job_id = f"{pair[1]}:{pair[0]}:t{answer.occurrence_ms}"
        if job_id in book.made:
            fault = _fault(book.life(job_id, pair, now_ms), answer, book)
        else:
            _, kept = book.causes_at(pair, book.tick_after(answer.occurrence_ms, pair[1]) or now_ms)
            fault = "" if any(_names(answer.reason, deed) for deed in kept) else f"there is no job, because of {kept}"
            fault = "" if answer.outcome is Outcome.NOT_SUBSCRIBED else fault
        if fault:
            report.wrong(f"why: {told(pair, answer.occurrence_ms)}, triggered: {fault}; answer: {answer.outcome}: {answer.reason}")


def _fault(verdict: Verdict, answer: Answer, book: Book) -> str:
    """What is wrong with an answer; empty where it is right."""
    allowed = set(_OUTCOMES[verdict.fate])
    if any(deed.what is What.UNSUBSCRIBED for deed in verdict.causes):
        allowed.add(Outcome.NOT_SUBSCRIBED)
    if any(deed.what is What.REMOVED for deed in verdict.causes):
        allowed |= {Outcome.SKIPPED, Outcome.MISSED, Outcome.REJECTED}
    if answer.outcome not in allowed:
        return f"the outcome is {answer.outcome}, and should be {' or '.join(sorted(allowed))}"
    if verdict.fate in (Fate.SKIPPED, Fate.CANCELED, Fate.DISCARDED) and not verdict.causes:
        return "the book knows of no cause"
    text = " ".join([answer.reason, *(value for _, value in answer.facts)])
    if verdict.causes and not any(_names(text, deed) for deed in verdict.causes):
        return "no cause is named with who and when"
    if verdict.outage is not None and not all(_instant(at_ms) in text for at_ms in _looks_around(verdict.outage, book)):
        return f"the outage from {_instant(verdict.outage[0])} to {_instant(verdict.outage[1])} is not named"
    if verdict.fate is Fate.OVERLAP and "overlap" not in text:
        return "the overlap is not named"
    if verdict.moment_ms is not None and answer.moment_ms != verdict.moment_ms:
        return f"the moment is {answer.moment_ms}, and should be {verdict.moment_ms}"
    return ""


def _names(text: str, deed: Deed) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(deed.actor)}(?!\w)", text) is not None and _instant(deed.at_ms) in text


def _instant(at_ms: int) -> str:
    """As sentences have it."""
    return f"{datetime.fromtimestamp(at_ms // 1000, UTC):%Y-%m-%d %H:%M:%S}"


def _looks_around(outage: tuple[int, int], book: Book) -> tuple[int, int]:
    """The planner's last look before an outage and its first one after it, which is all that the platform can know."""
    return book.ticks[bisect_right(book.ticks, outage[0]) - 1], book.ticks[bisect_left(book.ticks, outage[1])]


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
    return "; ".join(
        f"{clock(deed.at_ms)} {deed.what} by {deed.actor}{f' {deed.rule}' if deed.rule else ''}" for deed in sorted(deeds, key=_when)
    )


def _when(deed: Deed) -> int:
    return deed.at_ms
