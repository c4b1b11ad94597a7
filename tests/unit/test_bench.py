"""The benchmarks' own arithmetic."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import RUNS
from bench.figures import BY_NAME, FIGURES, Figure, table
from bench.limiter import TOLERANCE, worst_window_excess
from bench.soak import trend


@given(
    gaps=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    per_second=st.sampled_from([0.5, 10.0, 200.0]),
    burst=st.integers(1, 20),
)
def test_the_worst_window_is_that_of_all_pairs(gaps: list[float], per_second: float, burst: int) -> None:
    arrivals = [sum(gaps[:count]) for count in range(1, len(gaps) + 1)]
    pairs = [(first, last) for last in range(len(arrivals)) for first in range(last + 1)]
    excess = max((last - first + 1) - (per_second * (arrivals[last] - arrivals[first]) + burst) for first, last in pairs)

    assert worst_window_excess(arrivals, per_second, burst) == pytest.approx(max(0.0, excess), abs=2 * TOLERANCE)


def test_a_full_burst_and_then_the_rate_is_no_excess() -> None:
    arrivals = [0.0] * 15 + [number / 10 for number in range(1, 100)]

    assert worst_window_excess(arrivals, 10, 15) == 0
    assert worst_window_excess([*arrivals, arrivals[-1] + 0.1 - 2 * TOLERANCE / 10], 10, 15) == pytest.approx(2 * TOLERANCE, rel=0.01)
    assert worst_window_excess([0.0, *arrivals], 10, 15) == 1


def test_the_table_says_what_is_short() -> None:
    results: dict[str, dict[str, Any]] = {
        "execute": {"jobs_per_s": {"prefork": 900}, "ratio_celery": {"prefork": 0.95, "threads": 0.85}},
        "idle": {"error": "ended"},
    }

    rows = [line.split() for line in table(results).splitlines()]

    assert rows[1:] == [
        ["execute", "jobs_per_s.prefork", "900"],
        ["execute", "ratio_celery.prefork", "0.95", "≥", "0.9", "ok"],
        ["execute", "ratio_celery.threads", "0.85", "≥", "0.9", "short"],
        ["idle", "did", "not", "run", "short"],
    ]


@pytest.mark.parametrize(("value", "verdict"), [(0.979, "short"), (0.98, "ok"), (1.0, "ok"), (1.001, "short")])
def test_a_bar_may_have_two_sides(value: float, verdict: str) -> None:
    assert Figure("ratio", at_least=0.98, at_most=1.0).verdict(value) == verdict


@pytest.mark.parametrize("name", [*FIGURES, *BY_NAME, *RUNS])
def test_every_name_is_a_benchmark(name: str) -> None:
    assert importlib.util.find_spec(f"bench.{name}") is not None


def sawtooth(minutes: float, *, leak_per_minute: float = 0.0, level: float = 1000.0) -> list[tuple[float, float]]:
    """What fills up for a minute and is swept, every five seconds."""
    return [(at, level + leak_per_minute * at / 60 + 3 * (at % 60)) for at in range(0, round(minutes * 60), 5)]


def test_a_soak_sees_what_grows_and_not_what_goes_up_and_down() -> None:
    assert trend("in job", sawtooth(20)).verdict == "flat"
    assert trend("in job", sawtooth(20, leak_per_minute=5)).verdict == "flat", "45 members: nothing to see"
    grows = trend("in job", sawtooth(20, leak_per_minute=20))
    assert (grows.verdict, grows.minutes) == ("grows", 9)
    assert grows.growth == pytest.approx(8 * 20, rel=0.05)
    assert trend("redis_used_mb", [(at, 20 + at / 600) for at, _ in sawtooth(20)]).verdict == "flat"
    assert trend("redis_used_mb", [(at, 20 + at / 300) for at, _ in sawtooth(20)]).verdict == "grows"
    assert trend("lag_ms", [(at, at / 10) for at, _ in sawtooth(20)]).verdict == "grows"
    # what it did while it filled up does not count
    assert trend("keys", [(at, min(at, 300) * 100) for at, _ in sawtooth(20)]).verdict == "flat"


def test_a_short_soak_gives_no_verdict() -> None:
    short = trend("in job", sawtooth(3, leak_per_minute=500))
    assert short.verdict == ""
    assert short.growth > 0
