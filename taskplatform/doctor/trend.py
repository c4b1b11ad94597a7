"""What grows, by the samples that the leading beat notes each minute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from taskplatform.model import span_text
from taskplatform.store import Sample

#: Fewer samples, or a shorter time, say nothing.
_LEAST_SAMPLES, _LEAST_MS = 9, 10 * 60_000


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one figure, from the first third of the samples to the last."""

    more: float
    span_ms: float
    """From the middle of the one to the middle of the other."""

    @property
    def span_text(self) -> str:
        """For people."""
        return span_text(self.span_ms)

    @property
    def per_hour(self) -> float:
        return self.more / self.span_ms * 3_600_000


def growth(samples: Sequence[Sample], figure: Callable[[Sample], int]) -> Growth | None:
    """How much it grew; None where it did not, or too little is known.

    It grew where it was never in the last third as low as it ever was in the first: what goes up and down by itself does not count.
    """
    if len(samples) < _LEAST_SAMPLES or samples[-1].at_ms - samples[0].at_ms < _LEAST_MS:
        return None
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]
    if min(map(figure, last)) <= max(map(figure, first)):
        return None
    more = median(map(figure, last)) - median(map(figure, first))
    return Growth(more, median(one.at_ms for one in last) - median(one.at_ms for one in first))
