"""Clocks that tests set while processes live by them: Debian's faketime, loaded into each of these.

Only what the clock of the machine shows is changed. Spans of time, by the clock that nobody sets, pass as they do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.acceptance.nodes import ROOT


class SteppedClock:
    """The clock of the processes that have its `environment`. It begins with the right time, in `file`."""

    def __init__(self, file: Path) -> None:
        self._library = _library()
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        """From now on it is so much fast (slow, where less than 0)."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n", encoding="ascii")
        new.rename(self._file)  # whoever reads it finds the old or the new

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PYTHONPATH": f"{Path(__file__).parent / 'stepped'}{os.pathsep}{ROOT}",
        }


def _library() -> Path:
    """The library of the package faketime; skips the test where it is not installed."""
    found = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("faketime is not installed, and CI has it")
        pytest.skip("faketime is not installed")
    return found
