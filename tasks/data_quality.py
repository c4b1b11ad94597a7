"""What is wrong with rows before they are imported."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def profile_rows(job: RunningJob) -> dict[str, object]:
    """How complete each column is, which required values are missing, and which keys occur more than once.

    Parameters: `rows` (objects), `required` (columns that may not be empty), `key` (the columns that together identify a row).
    A value is empty when it is absent, null or a blank text; 0 and false are values. Rows are counted from 1.
    """
    given = Inputs(job.params)
    rows = [row.plain() for row in given.records("rows")]
    required, key = given.texts("required"), given.texts("key")
    if not key:
        raise given.error("key", "at least one column")
    columns = sorted({column for row in rows for column in row} | set(required) | set(key))
    filled = {column: sum(not _is_empty(row.get(column)) for row in rows) for column in columns}
    keys = Counter(_key(row, key) for row in rows)
    missing = [{"row": number, "column": name} for number, row in enumerate(rows, start=1) for name in required if _is_empty(row.get(name))]
    repeated = [{"key": json.loads(text), "rows": count} for text, count in keys.items() if count > 1]
    return {
        "rows": len(rows),
        "filled_percent": {column: round(100 * count / len(rows), 1) for column, count in filled.items()} if rows else {},
        "missing": missing,
        "repeated": repeated,
        "accepted": not missing and not repeated,
    }


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _key(row: dict[str, object], columns: list[str]) -> str:
    # as JSON: a value may be a list, which cannot be counted, and 1 is not "1"
    return json.dumps([row.get(column) for column in columns], sort_keys=True)
