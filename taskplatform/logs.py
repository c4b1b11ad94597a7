"""What processes write into their logs: one event a line, the same fields everywhere, no secrets, and a level that can be changed live.

All goes through the standard library's logging: our own lines, Celery's, kombu's, redbeat's, uvicorn's, and what functions log or print.
One formatter writes them, as JSON or for people, and adds what a line is about: fields that were bound (`structlog.contextvars`, `extra=`),
the job that runs in the line's thread, or the job that Celery or the line's text (`job <id>`) names.

What it promises: formatting never raises; a secret that this process knows is in no field, tracebacks included; no line is dearer than
some tens of microseconds.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import IO, Any

import structlog
from celery._state import get_current_task
from celery.utils.log import get_multiprocessing_logger
from structlog.stdlib import ProcessorFormatter

from taskplatform import http, tracing
from taskplatform.errors import StoreError
from taskplatform.keys import TOKEN
from taskplatform.model import DEFINITION_ID, USER_ID
from taskplatform.settings import Settings
from taskplatform.store import LOG_LEVELS, LogLevels

log = logging.getLogger(__name__)

_JOB = rf"(?P<definition>{DEFINITION_ID.pattern}):(?P<user>{USER_ID.pattern}):[0-9a-z]+"
_JOB_ID = re.compile(_JOB)
#: How the lines of our own and those of Celery name a job.
_NAMED = {
    "taskplatform": re.compile(rf"\bjob (?P<job>{_JOB})(?!\w)"),
    "celery": re.compile(rf"\[(?P<job>{_JOB})\]"),
}
#: What every record of logging has; whatever else it has was given as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: Of Celery's own: the arguments and the result of a task, and its message in other words.
_NOT_SHOWN = frozenset({"data", "color_message", "websocket"})
#: What a line for people leaves out, because the job's id or the process's name says it.
_FOR_PROGRAMS = ("role", "pid", "worker", "definition", "user", "delivery", "trace_id")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Secrets = Callable[[], tuple[str, ...]]

#: What this process is, in each of its lines.
_identity: dict[str, Any] = {}


def identify(**fields: str) -> None:
    """Say who this process is, as each of its lines says from now on: `role`, `worker`."""
    _identity.update(fields)
    if "role" in fields:
        tracing.identify(fields["role"])


def format_all(chosen: Settings, secrets: Secrets, *loggers: logging.Logger) -> None:
    """Give the handlers that these loggers have the platform's formatter; who writes where is left as it is."""
    for logger in loggers:
        for handler in logger.handlers:
            if not isinstance(handler.formatter, Formatter):
                stream = getattr(handler, "stream", None)
                handler.setFormatter(Formatter(_shape(chosen, stream), secrets, colours=_is_terminal(stream)))
    _let_structlog_log_here()


def log_to_stderr(chosen: Settings, secrets: Secrets, *, role: str) -> None:
    """Let this process log to stderr, from the level in the settings on. For those that Celery does not set up."""
    root = logging.getLogger()
    root.setLevel(chosen.log_level)
    root.addHandler(logging.StreamHandler(sys.stderr))
    format_all(chosen, secrets, root)
    logging.captureWarnings(True)
    identify(role=role)


def is_for_people(chosen: Settings) -> bool:
    """Whether people read what this process writes to stderr. Else there is no place in it for a banner."""
    return _shape(chosen, sys.__stderr__) == "console"


def say(text: str, file: IO[str] | None = None) -> None:
    """A line from a signal handler, in place of Celery's `safe_say`: past all locks and buffers, and as an object like all others."""
    fields = {"timestamp": _instant(time.time()), "level": "info", "event": text.strip(), "logger": "celery.apps.worker", **_identity}
    with suppress(OSError, ValueError, AttributeError):
        os.write((file or sys.__stderr__).fileno(), f"{json.dumps({**fields, 'pid': os.getpid()})}\n".encode())  # type: ignore[union-attr]


def format_celery(chosen: Settings, secrets: Secrets, *, role: str, level: str | None = None) -> None:
    """Write what Celery's programs log, where their options say, in the platform's form; from `level` on, where that is given.

    Celery gives tasks a handler of their own beside the root's, on the same stream. One is enough, and one level.
    """
    tasks = logging.getLogger("celery.task")
    tasks.handlers, tasks.propagate = [], True
    tasks.setLevel(logging.NOTSET)
    format_all(chosen, secrets, logging.getLogger(), get_multiprocessing_logger())
    if level is not None:
        logging.getLogger().setLevel(level)
    live_level.tell_celery()
    if not is_for_people(chosen) and "celery.apps.worker" in sys.modules:
        sys.modules["celery.apps.worker"].safe_say = say  # type: ignore[attr-defined]
    identify(role=role)


def forget_context() -> None:
    """After a run: what it bound to lines of its thread is not the next one's."""
    structlog.contextvars.clear_contextvars()


def _shape(chosen: Settings, stream: IO[str] | None) -> str:
    if chosen.log_format != "auto":
        return chosen.log_format
    return "console" if _is_terminal(stream) else "json"


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError, OSError):
        return False


def _let_structlog_log_here() -> None:
    """A function's `structlog.get_logger()` writes into the same log."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


# --- a line ----------------------------------------------------------------------------------------------------------


class Formatter(ProcessorFormatter):
    """Writes a record as one line of JSON, or for people (`shape` console)."""

    def __init__(self, shape: str, secrets: Secrets, *, colours: bool = False) -> None:
        finish = (
            [_as_json] if shape == "json" else [_for_people, structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, sort_keys=False)]
        )
        # a record of structlog's has its context already
        before = [structlog.contextvars.merge_contextvars]
        super().__init__(foreign_pre_chain=before, processors=[_complete, partial(_discreet, secrets), *finish])
        self._shape, self._secrets = shape, secrets

    def format(self, record: logging.LogRecord) -> str:
        """Never raises: what cannot be written, such as arguments that do not fit their text, is told in its place."""
        try:
            return super().format(record)
        except Exception as fault:
            return self._about_unwritable(record, fault)

    def _about_unwritable(self, record: logging.LogRecord, fault: Exception) -> str:
        event = f"a line that cannot be written ({type(fault).__name__}), from {record.pathname}:{record.lineno}"
        try:
            event += _clean(f": {record.msg!r:.1000}", self._secrets())
        except Exception:
            event += ", and its text cannot be shown"
        fields = {"timestamp": _instant(record.created), "level": record.levelname.lower(), "logger": record.name, "event": event}
        return json.dumps(fields) if self._shape == "json" else "{timestamp} [{level}] {event} [{logger}]".format(**fields)


_EventDict = MutableMapping[str, Any]


def _complete(_logger: object, _method: str, given: _EventDict) -> _EventDict:
    """All fields of a line, in the order in which they are written. Fields of the platform's own names go before those given."""
    record: logging.LogRecord = given.pop("_record")
    given.pop("_from_structlog", None)
    event, bound = given.pop("event"), given
    line: dict[str, Any] = {
        "timestamp": _instant(record.created),
        "level": record.levelname.lower(),
        "event": event if isinstance(event, str) else repr(event),
        "logger": record.name,
        **_identity,
        "pid": record.process,
    }
    line.update(_subject(record, line["event"]))
    exc_info, stack = bound.pop("exc_info", None), bound.pop("stack_info", None) or record.stack_info
    for name, value in (*vars(record).items(), *bound.items()):
        if name not in _STANDARD and name not in _NOT_SHOWN and not name.startswith("_"):
            line.setdefault(name, value)
    if exc_info := _exception(exc_info or record.exc_info):
        line["exception"] = exc_info
    elif record.exc_text:
        line["exception"] = record.exc_text
    if stack:
        line["stack"] = stack
    return line


def _instant(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{int(seconds % 1 * 1000):03}Z"


def _exception(given: Any) -> str:
    if isinstance(given, BaseException):
        given = (type(given), given, given.__traceback__)
    elif given is True:
        given = sys.exc_info()
    if not isinstance(given, tuple) or given[0] is None:
        return ""
    return "".join(traceback.format_exception(*given)).rstrip("\n")


def _subject(record: logging.LogRecord, event: str) -> dict[str, Any]:
    """The job or task that the line is about: the one that its text names, or what runs here."""
    here = _job_here()
    named = _NAMED.get(record.name.partition(".")[0])
    found = named.search(event) if named is not None else None
    if found is None:
        return here or _of_celery(record)
    return here if here.get("job") == found["job"] else _of_job(found["job"])


def _job_here() -> dict[str, Any]:
    """What runs in this thread. Celery knows that until after the line in which it says how the task ended."""
    task = get_current_task()
    request = task and task.request
    if not request or not request.id:
        return {}
    fields = _of_task(request.id, task.name)
    run = request.get("platform_run")
    if run is not None:
        fields |= {"delivery": run.delivery, "attempt": run.start.attempt}
    return fields


def _of_celery(record: logging.LogRecord) -> dict[str, Any]:
    """What a line of Celery's main process is about: it gives a task's id and name with it."""
    told = record.__dict__.get("data")
    if isinstance(told, Mapping) and isinstance(told.get("id"), str) and isinstance(told.get("name"), str):
        return _of_task(told["id"], told["name"])
    return {}


def _of_task(task_id: str, name: str) -> dict[str, Any]:
    return _of_job(task_id) or {"task": name, "task_id": task_id}


def _of_job(job_id: str) -> dict[str, Any]:
    match = _JOB_ID.fullmatch(job_id)
    if match is None:
        return {}
    fields = {"job": job_id, "definition": match["definition"], "user": match["user"]}
    if tracing.is_on():
        fields["trace_id"] = f"{tracing.trace_id(job_id):032x}"
    return fields


def _discreet(secrets: Secrets, _logger: object, _method: str, line: _EventDict) -> _EventDict:
    """Without secrets in any value. Before they are written: a text that is written twice has them in forms that nobody would find."""
    known = secrets()
    if all(isinstance(value, str | int) for value in line.values()):
        # nearly every line, and nearly none has one
        text = "\0".join([value for value in line.values() if isinstance(value, str)])
        if _clean(text, known) == text:
            return line
    return {name: _clean_value(value, known) for name, value in line.items()}


def _clean_value(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _clean(value, secrets)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_clean(str(name), secrets): _clean_value(one, secrets) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean_value(one, secrets) for one in value]
    return _clean(repr(value), secrets)


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    text = http.redact(text, secrets)
    return TOKEN.sub("tpk_***", text) if "tpk_" in text else text


def _as_json(_logger: object, _method: str, line: _EventDict) -> str:
    # in ASCII, which every encoding of a stream can write
    return json.dumps(line)


def _for_people(_logger: object, _method: str, line: _EventDict) -> _EventDict:
    """Less of it, and nothing that a terminal would obey."""
    shown = {name: value for name, value in line.items() if name not in _FOR_PROGRAMS}
    if "job" in shown and str(shown["job"]) in shown["event"]:
        del shown["job"]
    if "task_id" in shown:
        del shown["task_id"], shown["task"]
    return {name: _CONTROL.sub(_visible, value) if isinstance(value, str) else value for name, value in shown.items()}


def _visible(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


# --- the level -------------------------------------------------------------------------------------------------------


#: They ask once, when a worker begins, whether they may say what became of a task.
_ASK_ONCE = ("celery.app.trace", "celery.worker.strategy", "celery.worker.consumer.consumer")


def _is_loud_enough(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.getLogger().level


class _Level:
    """From which level on this process and its forks log. One byte is shared with them: pool processes look at it before each job."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 1)
        self._applied = 0
        self._base = logging.NOTSET

    def set(self, name: str) -> None:
        """Log from this level on, also in processes that were forked from here. "" is the level of the start."""
        self._shared[0] = LOG_LEVELS.index(name) + 1 if name else 0
        self.follow()

    def follow(self) -> None:
        """Do what the process that this one was forked from was told. It takes 0.1 µs where nothing was changed."""
        wanted = self._shared[0]
        if wanted == self._applied:
            return
        root = logging.getLogger()
        if not self._applied:
            self._base = root.level
        self._applied = wanted
        root.setLevel(LOG_LEVELS[wanted - 1] if wanted else self._base)
        self.tell_celery()

    @staticmethod
    def tell_celery() -> None:
        """Let Celery, which looks at its level once, log by the level that holds."""
        root = logging.getLogger()
        for name in _ASK_ONCE:
            logger = logging.getLogger(name)
            logger.setLevel(min(logging.INFO, root.level))
            logger.addFilter(_is_loud_enough)
        request = sys.modules.get("celery.worker.request")
        if request is not None:
            request.__optimize__()


live_level = _Level()


class LevelFollower:
    """Does in this process what `taskplatform log-level` says for it: of itself, its node, its role or all, the first found."""

    def __init__(self, role: str, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._names = (name, name.partition("#")[0], role, "*")
        self._clock = clock
        self._level = ""
        self._until = 0.0

    def look(self, levels: LogLevels) -> None:
        """Ask Redis. Never raises: while it cannot be asked, what was said goes on, to its end at the most."""
        try:
            now_ms, known = levels.read()
        except StoreError:
            self.end()
            return
        found = next((known[name] for name in self._names if name in known), None)
        if found is None:
            self._set("", "")
        else:
            self._until = self._clock() + (found.until_ms - now_ms) / 1000
            self._set(found.level, f", as {found.actor} said, until {_instant(found.until_ms / 1000)}")

    def end(self) -> None:
        """Go back to the level of the start, if it is time."""
        if self._level and self._clock() >= self._until:
            self._set("", "")

    def run(self, levels: LogLevels, every: float) -> None:
        """Look so often, in seconds, in a thread of its own. For processes without a loop that could."""

        def go_on() -> None:
            while True:
                self.look(levels)
                time.sleep(every)

        threading.Thread(target=go_on, name="log-level", daemon=True).start()

    def _set(self, name: str, why: str) -> None:
        if name == self._level:
            return
        self._level = name
        if name:
            live_level.set(name)
        # said whatever the level is: who reads a log must know why it changes
        record = log.makeRecord(
            log.name, logging.WARNING, __file__, 0, "this process (%d) logs from %s on%s", (os.getpid(), name or "its own level", why), None
        )
        log.handle(record)
        if not name:
            live_level.set("")
