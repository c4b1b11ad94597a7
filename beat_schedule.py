"""Beat entries: housekeeping, and whatever periodic Celery tasks an operator adds. Users' jobs are not here: beat plans them."""

from __future__ import annotations

from typing import Any

beat_schedule: dict[str, dict[str, Any]] = {
    "forget-finished-jobs": {
        "task": "taskplatform.sweep",
        "schedule": 60.0,
        # in the low queue it would never run while the high one is full; one that waited longer is superseded by the next
        "options": {"queue": "high", "expires": 60},
    },
}
