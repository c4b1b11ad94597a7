"""How long runs take and how many a job takes, by what was measured. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from taskplatform.model import JobState, Priority
from taskplatform.store import DefinitionCounts, KnownDefinition

#: Where nothing at all was measured, a run takes so long. About what an HTTP call takes that does some work.
ASSUMED_SECONDS = 1.0
#: With fewer runs than this nothing is known of a definition.
_FEW = 10
_ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.TIMED_OUT)


class Source(StrEnum):
    """What a measure comes from."""

    MEASURED = "measured"
    """The definition's own runs."""
    PRIORITY = "priority"
    """It has too few: what is usual for definitions of its priority, the median of theirs."""
    ALL = "all"
    """These have too few: what is usual for all definitions."""
    ASSUMED = "assumed"
    """There are too few in all: a second, and no retries."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a job of a definition costs."""

    seconds: float
    """The mean time of a run."""
    attempts: float
    """The mean number of runs of a job, retries included."""
    runs: int
    """By so many runs."""
    source: Source


def measure(definitions: Mapping[str, KnownDefinition]) -> dict[str, Measure]:
    """By definition."""
    overall = _usual([one.measured for one in definitions.values()], Source.ALL) or Measure(ASSUMED_SECONDS, 1.0, 0, Source.ASSUMED)
    of_priority = {
        priority: _usual([one.measured for one in definitions.values() if one.priority is priority], Source.PRIORITY) or overall
        for priority in Priority
    }
    return {name: _mean([one.measured], Source.MEASURED) or of_priority[one.priority] for name, one in definitions.items()}


def _usual(counts: Sequence[DefinitionCounts], source: Source) -> Measure | None:
    """One definition with runs of another size must not speak for all that were not measured: the median of those that were."""
    known = [one for one in (_mean([each], source) for each in counts) if one is not None]
    if not known:
        return _mean(counts, source)
    return Measure(median(one.seconds for one in known), median(one.attempts for one in known), sum(one.runs for one in known), source)


def _mean(counts: Iterable[DefinitionCounts], source: Source) -> Measure | None:
    """None where there are too few runs to say."""
    runs = ms = ended = 0
    for one in counts:
        runs += one.runs.total
        ms += one.runs.sum_ms
        ended += sum(times for (_, state), times in one.ended.items() if state in _ENDED)
    if runs < _FEW or not ended:
        return None
    return Measure(max(ms / runs / 1000, 0.001), max(1.0, runs / ended), runs, source)
