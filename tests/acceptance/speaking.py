"""A function that logs."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

import structlog
from celery.utils.log import get_task_logger


class Job(Protocol):
    """What the platform gives to a function."""

    id: str
    params: dict[str, Any]


def speaks(job: Job) -> str:
    """Says its `word` with each of the loggers that a function may use, and raises where it is told to."""
    word = str(job.params["word"])
    logging.getLogger("tests.speaking").debug("%s debug", word)
    logging.getLogger("tests.speaking").info("%s plain", word, extra={"rows": 5})
    get_task_logger("tests.speaking").info("%s task", word)
    structlog.get_logger("tests.speaking").info(f"{word} structlog", order=4711)
    structlog.contextvars.bind_contextvars(left_over=word)
    print(f"{word} printed")
    if job.params.get("raises"):
        raise ValueError(f"{word} of {os.environ['SECRET']}")
    return word
