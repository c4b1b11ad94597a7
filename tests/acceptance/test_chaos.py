"""A few random faults over workers, beats and the server under load; the checker finds nothing that must not be.

`python -m bench chaos` is the same for as long as wanted. What it looks for is in tests/chaos/checker.py.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from tests.chaos.faults import WEIGHTS
from tests.chaos.run import run

#: Those that end within seconds: a job that is poison needs half a minute to be known as such.
KINDS = WEIGHTS.keys() - {"poison"}


def test_a_few_random_faults(tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    told: list[str] = []

    outcome = run(
        tmp_path, seed=seed, seconds=20, faults=6, every=0.8, kinds=KINDS, workers=3, subscribers=0.4, per_second=15, say=told.append
    )

    faults = "\n".join(told)
    assert outcome.passed, f"python -m bench chaos --seed {seed}\n{faults}\n{outcome.explain()}\n{outcome.line()}"
    assert outcome.verdict.figures["faults"] == 6
    assert outcome.verdict.figures["jobs"] > 30
    assert len(outcome.evidence.calls) > 30
