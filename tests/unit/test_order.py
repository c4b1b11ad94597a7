"""The order in which the tests run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.conftest import LONGEST, ROOT, pytest_collection_modifyitems


def test_the_longest_modules_go_first_and_the_rest_as_they_were() -> None:
    names = ["test_b", LONGEST[3], "test_a", LONGEST[0], "test_b2", LONGEST[3]]
    items: Any = [SimpleNamespace(path=Path(f"tests/{name}.py"), number=number) for number, name in enumerate(names)]
    pytest_collection_modifyitems(items)
    assert [one.number for one in items] == [3, 1, 5, 0, 2, 4]


def test_these_are_modules() -> None:
    assert len(set(LONGEST)) == len(LONGEST)
    assert set(LONGEST) <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
