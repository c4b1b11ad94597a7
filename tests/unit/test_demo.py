"""The demo's arithmetic; that its checks hold is an acceptance test."""

from __future__ import annotations

from taskplatform.demo import call_windows


def test_every_window_of_calls_is_looked_at() -> None:
    assert call_windows([]) == []
    assert sorted(call_windows([1.0, 1.0, 3.5])) == [(0.0, 1), (0.0, 1), (0.0, 1), (0.0, 2), (2.5, 2), (2.5, 3)]
