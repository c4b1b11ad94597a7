"""What is asked in the day, and what is seen of it later: when the next jobs come, and what the hours to come bring."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field

from bench.day.book import Book, Deed, Pair, What
from bench.day.judge import Report, clock, story, told
from bench.day.town import Town
from taskplatform.answers import Moment
from taskplatform.forecast import Forecast

_MINUTE_MS = 60_000
_TROUBLE = (What.PLANNER_DOWN, What.PLANNER_UP)


@dataclass
class Question:
    """When the next jobs of a pair come, asked at an instant; and what its jobs then waited for, as seen just before."""

    pair: Pair
    asked_ms: int
    moments: list[Moment]
    seen: dict[int, int | None] = field(default_factory=dict)
    """By occurrence, the `execute_after` of its job just before the moment; None where there was no job."""


@dataclass
class Asker:
    """Asks and looks, at instants on the world's agenda."""

    town: Town
    rng: random.Random
    questions: list[Question] = field(default_factory=list)
    forecast: Forecast | None = None

    def plan(self, since_ms: int, until_ms: int, count: int) -> None:
        """Put questions on the agenda."""
        # of what is due in the day, and now and then of something else
        often = [pair for pair in self.town.book.pairs() if not pair[1].startswith(("weekly_", "monthly", "quarterly", "yearly"))]
        pairs = [*often, *self.town.book.pairs()[::20]]
        for _ in range(count):
            pair, at_ms = self.rng.choice(pairs), self.rng.randrange(since_ms, until_ms)
            self.town.world.at(at_ms, lambda pair=pair: self._ask(pair))  # type: ignore[misc]

    def plan_forecast(self, at_ms: int, hours: float) -> None:
        """Put that question on the agenda."""

        def ask() -> None:
            self.town.world.tell()
            self.forecast = self.town.world.platform.forecast(hours=hours)

        self.town.world.at(at_ms, ask)

    def _ask(self, pair: Pair) -> None:
        world = self.town.world
        question = Question(pair, world.clock.now_ms, world.platform.next(*pair, count=2))
        self.questions.append(question)
        for moment in question.moments:
            world.at(max(world.clock.now_ms, moment.moment_ms - 1), lambda one=moment: self._look(question, one))  # type: ignore[misc]

    def _look(self, question: Question, moment: Moment) -> None:
        user, definition = question.pair
        found = self.town.world.store.jobs_by_id([f"{definition}:{user}:{moment.occurrence_ms}"])
        question.seen[moment.occurrence_ms] = found[0].execute_after_ms if found else None


def check_next(asker: Asker, report: Report) -> None:
    """That each moment that was told was kept, to the millisecond, unless somebody changed something meanwhile."""
    book = asker.town.book
    for one in asker.questions:
        asked = f"asked {clock(one.asked_ms)}"
        for moment in one.moments:
            if moment.occurrence_ms not in one.seen:
                report.compared["next: beyond the day"] += 1
            elif changed(book, one.pair, one.asked_ms, moment.moment_ms):
                report.compared["next: changed meanwhile"] += 1
            elif not moment.certain:
                report.compared["next: said to be uncertain"] += 1
            else:
                report.compared["next: kept"] += 1
                seen = one.seen[moment.occurrence_ms]
                if seen != moment.moment_ms:
                    really = "no job" if seen is None else clock(seen)
                    report.wrong(
                        f"next: {told(one.pair, moment.occurrence_ms)}, {asked}: {clock(moment.moment_ms)} was said ({moment.note}), "
                        f"and it was {really}; {story(book, one.pair)}"
                    )
        first_ms = min((moment.moment_ms for moment in one.moments), default=1 << 60)
        said = {moment.occurrence_ms for moment in one.moments}
        for job_id in book.made_of[one.pair]:
            suffix, made_ms = job_id.rpartition(":")[2], book.made[job_id]
            if one.asked_ms < made_ms < first_ms and suffix.isdigit() and int(suffix) not in said:
                if changed(book, one.pair, one.asked_ms, made_ms):
                    continue
                report.wrong(
                    f"next: {told(one.pair, int(suffix))}, {asked}: it was not said, and its job was made {clock(made_ms)}; "
                    f"said was {[clock(moment.moment_ms) for moment in one.moments]}; {story(book, one.pair)}"
                )


def changed(book: Book, pair: Pair, since_ms: int, until_ms: int) -> list[Deed]:
    """What somebody did meanwhile that can move a moment, or keep a job from being made."""
    deeds = [*book.of_pair[pair], *book.of_user[pair[0]], *book.of_definition[pair[1]]]
    deeds += [deed for deed in book.deeds if deed.what in _TROUBLE or (deed.what is What.LIMIT and pair[1] == "invoice")]
    return [deed for deed in deeds if since_ms < deed.at_ms <= until_ms]


# --- the forecast ----------------------------------------------------------------------------------------------------


def check_forecast(asker: Asker, report: Report) -> None:
    """That jobs per minute, windows, saturation and backlog were as was said, in hours in which nobody changed anything.

    How many jobs come of a definition is known exactly, but for those at the borders of the time. In which minute of its window each falls
    is said as if slots were spread evenly, and they are a hash's: a minute may have 4 standard deviations of such a draw more or less, and
    2. When a backlog ends rests on run times that were measured on other runs, and on what else holds the slots: 3 minutes.
    """
    forecast, book = asker.forecast, asker.town.book
    assert forecast is not None
    assert forecast.bin_ms == _MINUTE_MS
    begins, ends = forecast.start_ms, forecast.end_ms
    came: dict[str, Counter[int]] = {name: Counter() for name in asker.town.plans}
    for job_id, runs in book.runs.items():
        # the first run of each job shows when it was to run
        if begins <= runs[0].after_ms < ends:
            came[job_id.split(":")[0]][(runs[0].after_ms - begins) // _MINUTE_MS] += 1
    tracks = {track.name: track for track in forecast.definitions}
    for name, minutes in came.items():
        said = {point.bin: point.jobs for point in tracks[name].points} if name in tracks else {}
        total, foreseen = sum(minutes.values()), sum(said.values())
        # of one whose occurrences are skipped while a user's last job runs nobody knows how many
        slack = 2 + 0.02 * total if name != "rebuild" else 5 + 0.5 * total
        report.compared["forecast: definitions"] += 1
        if abs(total - foreseen) > slack:
            report.wrong(f"forecast: {name}: {foreseen:g} jobs were said, and {total} came")
        if name == "rebuild":
            continue
        for minute in minutes.keys() | said.keys():
            mine, theirs = minutes[minute], said.get(minute, 0.0)
            report.compared["forecast: minutes"] += 1
            if abs(mine - theirs) > 4 * max(theirs, mine) ** 0.5 + 2:
                report.wrong(f"forecast: {name} at {clock(begins + minute * _MINUTE_MS)}: {theirs:g} jobs were said, and {mine} came")
    _check_windows(asker, forecast, report)
    _check_backlog(asker, forecast, report)


def _check_windows(asker: Asker, forecast: Forecast, report: Report) -> None:
    widened = {
        name: one
        for name, records in asker.town.book.seen.items()
        for one in records.values()
        if forecast.start_ms < one.at_ms < forecast.end_ms and one.window_ms > asker.town.book.kinds[name].window_ms
    }
    said = {one.definition: one for one in forecast.windows}
    report.compared["forecast: windows"] += len(widened)
    if said.keys() != widened.keys():
        report.wrong(f"forecast: windows of {sorted(said)} were said to be widened, and those of {sorted(widened)} were")
    for name in said.keys() & widened.keys():
        window_ms, foreseen_ms = widened[name].window_ms, said[name].window_ms
        if abs(window_ms - foreseen_ms) > 0.02 * window_ms:
            report.wrong(f"forecast: the window of {name} was said to be {foreseen_ms} ms, and was {window_ms} ms")
        spans = [span for use in forecast.limits if use.name == f"definition:{name}" for span in use.saturated]
        begin_ms, end_ms = widened[name].base_ms, widened[name].base_ms + window_ms
        report.compared["forecast: saturation"] += 1
        if not any(abs(one.begin_ms - begin_ms) <= 2 * _MINUTE_MS and abs(one.end_ms - end_ms) <= 2 * _MINUTE_MS for one in spans):
            shown = [f"{clock(one.begin_ms)} – {clock(one.end_ms)}" for one in spans]
            report.wrong(f"forecast: {name} is saturated {shown}, and really {clock(begin_ms)} – {clock(end_ms)}")


def _check_backlog(asker: Asker, forecast: Forecast, report: Report) -> None:
    book, (begin_ms, end_ms, most) = asker.town.book, backlog(asker.town.book, "bulk", forecast.start_ms, forecast.end_ms)
    said = [one for one in forecast.backlogs if one.of == "definition:bulk"]
    report.compared["forecast: backlog"] += 1
    if not most or len(said) != 1:
        report.wrong(f"forecast: {len(said)} backlogs of bulk were said, and up to {most} jobs waited")
        return
    (one,) = said
    if abs(one.begin_ms - begin_ms) > _MINUTE_MS or abs(one.end_ms - end_ms) > 3 * _MINUTE_MS or abs(one.jobs - most) > 0.25 * most + 3:
        report.wrong(
            f"forecast: a backlog of bulk was said from {clock(one.begin_ms)} to {clock(one.end_ms)} with {one.jobs:g} jobs, "
            f"and was from {clock(begin_ms)} to {clock(end_ms)} with {most}; {_cost(forecast)}, really "
            f"{_mean_s(book, 'bulk', forecast.start_ms, forecast.end_ms):.1f} s"
        )


def backlog(book: Book, definition: str, since_ms: int, until_ms: int) -> tuple[int, int, int]:
    """From the minute to that in which jobs were due and waited at the end of a minute, and the most that did."""
    due = sorted(runs[0].after_ms for job, runs in book.runs.items() if job.startswith(f"{definition}:"))
    started = sorted(runs[0].started_ms for job, runs in book.runs.items() if job.startswith(f"{definition}:"))
    waits = {end: bisect_right(due, end) - bisect_left(started, end) for end in range(since_ms + _MINUTE_MS, until_ms + 1, _MINUTE_MS)}
    full = [end for end, count in waits.items() if count >= 1]
    if not full:
        return 0, 0, 0
    return full[0] - _MINUTE_MS, full[-1], max(waits.values())


def _cost(forecast: Forecast) -> str:
    return ", ".join(f"{one.seconds:g} s by {one.runs} runs, {one.source}" for one in forecast.costs if one.definition == "bulk")


def _mean_s(book: Book, definition: str, since_ms: int, until_ms: int) -> float:
    spans = [
        run.ends_ms - run.started_ms
        for job_id, runs in book.runs.items()
        for run in runs
        if job_id.startswith(f"{definition}:") and since_ms <= run.started_ms < until_ms
    ]
    return sum(spans) / len(spans) / 1000 if spans else 0.0
