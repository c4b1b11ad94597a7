"""Signs that a model sees other data than it was trained on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

#: An empty bin counts as this share, since its logarithm would be infinite.
_SMALLEST_SHARE = 0.0001


def population_stability(job: RunningJob) -> dict[str, object]:
    """The population stability index of each feature between training and now, and which features drifted.

    Parameters: `features`, by name `{training, current}` as lists of counts over the same bins. PSI is the sum over the bins of
    (current - training) × ln(current / training), as shares. By custom below 0.1 is stable, and from 0.25 on is drift.
    """
    features = Inputs(job.params).record("features")
    scores = {name: _psi(features.record(name)) for name in features.names()}
    return {
        "psi": {name: round(score, 4) for name, score in scores.items()},
        "watch": sorted(name for name, score in scores.items() if 0.1 <= score < 0.25),
        "drifted": sorted(name for name, score in scores.items() if score >= 0.25),
    }


def _psi(feature: Inputs) -> float:
    training, current = _shares(feature, "training"), _shares(feature, "current")
    if len(training) != len(current):
        raise feature.error("current", f"as many bins as training has, {len(training)}")
    return sum((now - then) * math.log(now / then) for then, now in zip(training, current, strict=True))


def _shares(feature: Inputs, name: str) -> list[float]:
    counts = feature.integers(name, minimum=0)
    total = sum(counts)
    if not total:
        raise feature.error(name, "counts of which at least one is above 0")
    return [max(count / total, _SMALLEST_SHARE) for count in counts]
