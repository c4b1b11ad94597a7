"""`make demo`: the main job, run for real, and a report that is made from what was recorded.

Four users with ten subscriptions; jobs of mixed priority that wait for one slot; more jobs at once than the limit lets go; an extra
occurrence of every subscription, spread over a window. Then what the platform recorded, and a check of each promise. It ends with the
report of `taskplatform verify`, which kills beat and a worker. The exit code is 0 only if all hold.
"""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import requests
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from taskplatform.drills import is_drill
from taskplatform.errors import TaskPlatformError
from taskplatform.local import Stack
from taskplatform.mock_api import CALLS_PATH
from taskplatform.model import Job, JobState, Limit, Priority, RateLimit, format_rate, moment, slot
from taskplatform.platform import JobRequest, Platform
from taskplatform.settings import Settings, load_settings
from taskplatform.verification.disruptive import Disruption
from taskplatform.verification.report import Outcome
from taskplatform.verification.report import Report as Verification
from taskplatform.verification.run import Options as VerifyOptions
from taskplatform.verification.run import connect, verify

SUBSCRIPTIONS = {
    "user1": ("hourly_data_sync", "hourly_cache_refresh", "bi_hourly_health_check"),
    "user2": ("daily_user_report", "daily_system_metrics"),
    "user3": ("weekly_backup", "weekly_analytics", "bi_weekly_report"),
    "user4": ("monthly_billing", "monthly_cleanup"),
}
MIX = (Priority.HIGH, Priority.MEDIUM, Priority.LOW, Priority.MEDIUM, Priority.HIGH)
EXPECTED = (Priority.HIGH, Priority.HIGH, Priority.MEDIUM, Priority.MEDIUM, Priority.LOW)
#: What goes over all workers where no other limit is set.
LIMIT = RateLimit(rate="10/s", burst=15)
#: So many jobs are submitted at once, to see the limit.
CROWD = 40
WINDOW = timedelta(seconds=20)
#: Of more jobs than this, not each is shown on its way.
_MOST_SHOWN = 20
#: A killed leader is replaced after this, where no setting says otherwise: that is all waited for.
BEAT_LOCK = timedelta(seconds=10)
VERIFY_TIMEOUT = timedelta(seconds=30)
VERIFY_WINDOW = timedelta(seconds=6)
#: How late a job may start on a busy laptop, after its moment.
LATE = timedelta(seconds=3)


@dataclass
class Report:
    """What was checked, and what came of it."""

    lines: list[tuple[bool, str]] = field(default_factory=list)

    def check(self, holds: bool, text: str) -> None:
        """Note one promise and whether it holds."""
        self.lines.append((holds, text))

    @property
    def passed(self) -> bool:
        """Whether every promise holds."""
        return bool(self.lines) and all(holds for holds, _ in self.lines)


def run(*, workers: int = 2, slots: int = 3, console: Console | None = None) -> int:
    """Run the demo. Returns the exit code. The platform's own log goes to `<data_dir>/demo/demo.log`."""
    settings = load_settings()
    if settings.rate_limit is None:
        settings = settings.model_copy(update={"rate_limit": LIMIT})
    if "beat_lock_timeout" not in settings.model_fields_set:
        settings = settings.model_copy(update={"beat_lock_timeout": BEAT_LOCK})
    settings = settings.model_copy(update={"verify_definitions": True})
    # a pipe has no width of its own
    out = console or Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    data_dir = Path(settings.data_dir) / "demo"
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / "demo.log"
    with log_path.open("w", encoding="utf-8") as log:
        out.print(f"[bold]Starting[/] Redis, mock API, {workers} workers of {slots} slots, beat, API and Flower; their log is {log_path}")

        def sink(name: str, line: str) -> None:
            log.write(f"{name:8} {line}\n")
            log.flush()

        with Stack(settings, workers=workers, slots=slots, sink=sink, data_dir=data_dir) as stack:
            for line in stack.addresses():
                out.print(f"  {line}")
            try:
                report = _Demo(stack, settings, out).run()
                verified = _verify(stack, settings, out, data_dir / "verify")
            except (TimeoutError, TaskPlatformError) as fault:
                out.print(f"[bold red]The demo broke off:[/] {fault}; see {log_path}")
                return 1
            out.print()
            out.print(f"Flower shows the jobs by definition at [bold]{stack.flower_url}[/] while the platform runs: `taskplatform up`.")
    failed = sum(not holds for holds, _ in report.lines) + verified.count(Outcome.FAILED)
    if report.passed and verified.passed:
        out.print(f"[bold green]All {len(report.lines)} checks hold, and the verification passed.[/]")
        return 0
    out.print(f"[bold red]{failed} checks failed.[/]")
    return 1


def _verify(stack: Stack, settings: Settings, out: Console, folder: Path) -> Verification:
    """What `taskplatform verify` does, on the demo's processes."""
    out.print()
    out.print("[bold]Verification, as of `taskplatform verify --disruptive`[/]")

    def kill(name: str) -> str:
        stack.supervisor.send(name, signal.SIGKILL)
        return "by SIGKILL"

    # on a server that others use the leader may be another's
    owns_all = Disruption(beat=lambda _: kill("beat"), worker=lambda who: kill(who.partition("@")[0])) if stack.embedded else None
    chosen = settings.model_copy(update={"redis_url": stack.redis_url, "verify_target": stack.verify_target})
    with closing(connect(chosen, actor="demo")) as platform:
        found = verify(
            platform,
            chosen,
            VerifyOptions(disruption=owns_all, timeout=VERIFY_TIMEOUT, window=VERIFY_WINDOW, api_url=stack.api_url, api_ca=stack.api_ca),
        )
    table = Table("check", "outcome", "took", "what was found", box=None, pad_edge=False)
    colours = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.NOT_RUN: "yellow"}
    for line in found.lines:
        outcome = f"[{colours[line.outcome]}]{line.outcome}[/]"
        table.add_row(line.title, outcome, f"{line.seconds:.1f} s", Text(line.text, overflow="fold"))
    out.print(table)
    for plot in (plot for line in found.lines for plot in line.plots):
        out.print()
        out.print(plot.text, markup=False)
    out.print()
    written = found.write(folder)
    out.print(f"{found.summary}; the whole report is {written} (and report.json)", soft_wrap=True)
    return found


class _Demo:
    def __init__(self, stack: Stack, settings: Settings, out: Console) -> None:
        self._stack = stack
        self._out = out
        self._report = Report()
        url = {"redis_url": stack.redis_url}
        self._platform = Platform.connect(settings.model_copy(update=url), actor="demo")

    def run(self) -> Report:
        try:
            self._set_up()
            mixed = self._mixed_priorities()
            crowd = self._crowd()
            planned = self._extra_occurrences()
            self._flower()
            self._heartbeats()
            self._show_history(next((job for job in planned if job.attempt == 1), planned[0]))
            self._counts()
            self._check_all_jobs([*mixed, *crowd, *planned])
            self._check_calls([*mixed, *crowd, *planned])
        finally:
            self._platform.close()
        self._out.print()
        for holds, text in self._report.lines:
            self._out.print(f"  {'[green]✓[/]' if holds else '[red]✗[/]'} {text}")
        return self._report

    # steps

    def _set_up(self) -> None:
        self._heading("Users and subscriptions")
        table = Table("user", "subscription", "schedule", "window", box=None, pad_edge=False)
        for user, definitions in SUBSCRIPTIONS.items():
            self._platform.create_user(user)
            for name in definitions:
                self._platform.subscribe(user, name)
                definition = self._platform.definition(name)
                table.add_row(user, name, _schedule(definition.schedule), f"{definition.window.total_seconds():g} s")
        self._out.print(table)
        total = sum(len(self._platform.subscriptions(user)) for user in SUBSCRIPTIONS)
        self._report.check(total == 10, f"{len(SUBSCRIPTIONS)} users have {total} subscriptions")

    def _mixed_priorities(self) -> list[Job]:
        """All slots are taken, one of them for a short time only: that one then serves the five jobs."""
        self._heading("Five jobs for one busy slot: " + ", ".join(MIX))
        slots = self._stack.slots * len(self._stack.workers)
        holds = [
            self._platform.enqueue("slot_drill", user="user1", params={"seconds": 4 if last else 45}, priority=Priority.HIGH)
            for last in [False] * (slots - 1) + [True]
        ]
        self._wait(lambda: self._all(holds, JobState.RUNNING), 30, "all slots to be taken")
        submitted = self._platform.enqueue_many(
            JobRequest(definition="hourly_data_sync", user="user1", priority=priority) for priority in MIX
        )
        jobs = self._follow([job.id for job in submitted], 40)
        for job in holds[:-1]:
            self._platform.cancel(job.id)
        finished = sorted(jobs, key=lambda job: (self._started(job), job.finished_ms or 0))
        table = Table("completed", "priority", "submitted as", "waited", "job", box=None, pad_edge=False)
        for place, job in enumerate(finished, 1):
            number = [one.id for one in submitted].index(job.id) + 1
            table.add_row(str(place), job.priority, f"{number}.", f"{(self._started(job) - job.created_ms) / 1000:.2f} s", job.id)
        self._out.print(table)
        order = tuple(job.priority for job in finished)
        self._report.check(order == EXPECTED, f"completion order by priority: {', '.join(order)}")
        inside = [job.id for priority in Priority for job in finished if job.priority is priority]
        wanted = [job.id for priority in Priority for job in submitted if job.priority is priority]
        self._report.check(inside == wanted, "first come, first served inside each priority")
        self._wait(lambda: all(self._noted(job, "stopped") for job in holds[:-1]), 30, "the canceled jobs to stop")
        self._report.check(
            self._all(holds[:-1], JobState.CANCELED), f"{len(holds) - 1} running jobs were canceled, and stopped by their workers"
        )
        return jobs

    def _crowd(self) -> list[Job]:
        """More jobs at once than the limit lets go: how many started in each second, after the first."""
        self._heading(f"{CROWD} jobs at once, within the limits")
        limits = Table("limit", "rate", "burst", "concurrency", box=None, pad_edge=False)
        slowest = float("inf")
        for state in self._platform.limits():
            limit = state.limit
            if is_drill(state.name.removeprefix("definition:")):
                continue
            slowest = min(slowest, limit.per_second or slowest)
            cells = (limit.per_second and format_rate(limit.per_second), limit.burst, limit.concurrency)
            limits.add_row(state.name, *("" if cell is None else str(cell) for cell in cells))
        self._out.print(limits)
        submitted = self._platform.enqueue_many([JobRequest(definition="hourly_cache_refresh", user="user1")] * CROWD)
        jobs = self._follow([job.id for job in submitted], 40 + CROWD / slowest)
        starts = sorted(self._started(job) for job in jobs)
        seconds = Counter((at - starts[0]) // 1000 for at in starts)
        self._out.print("started in each second: " + ", ".join(str(seconds[second]) for second in range(max(seconds) + 1)))
        return jobs

    def _extra_occurrences(self) -> list[Job]:
        self._heading(f"Every subscription once more, now, spread over {WINDOW.total_seconds():g} s by its slot")
        ids: list[str] = []
        expected: dict[str, int] = {}
        began: dict[str, int] = {}
        for user, definitions in SUBSCRIPTIONS.items():
            for name in definitions:
                at, _ = self._platform.trigger(name, window=WINDOW)
                at_ms = int(at.timestamp() * 1000)
                job_id = f"{name}:{user}:t{at_ms}"
                ids.append(job_id)
                began[job_id] = at_ms
                expected[job_id] = moment(at_ms, slot(user, name), int(WINDOW.total_seconds() * 1000))
        jobs = self._follow(ids, 90)
        self._distribution(jobs, expected, began)
        return jobs

    def _distribution(self, jobs: Sequence[Job], expected: dict[str, int], began: dict[str, int]) -> None:
        window_ms = int(WINDOW.total_seconds() * 1000)
        table = Table("planned", "started after", "job", f"window of {WINDOW.total_seconds():g} s", box=None, pad_edge=False)
        lags: list[int] = []
        for job in sorted(jobs, key=lambda one: expected[one.id] - began[one.id]):
            offset, lag = expected[job.id] - began[job.id], self._started(job) - expected[job.id]
            lags.append(lag)
            bar = "·" * int(offset / window_ms * 40) + "█"
            table.add_row(f"+{offset / 1000:.3f} s", f"{lag} ms", job.id, bar)
        self._out.print(table)
        exact = all(job.execute_after_ms == expected[job.id] for job in jobs)
        self._report.check(exact, "each job was planned for its user's slot, to the millisecond")
        self._report.check(min(lags) >= 0, f"nothing started early; in the median {statistics.median(lags):g} ms after its moment")
        self._report.check(max(lags) <= LATE / timedelta(milliseconds=1), f"nothing started late: {max(lags)} ms at the most")
        quarters = {int((expected[job.id] - began[job.id]) / window_ms * 4) for job in jobs}
        self._report.check(len(quarters) >= 3, f"the jobs are spread over the window: {len(quarters)} of its 4 quarters have some")

    def _flower(self) -> None:
        """What Flower counted, by definition."""
        if self._stack.flower_url is None:
            return
        wanted = {name for definitions in SUBSCRIPTIONS.values() for name in definitions}

        def seen() -> bool:
            text = requests.get(f"{self._stack.flower_url}/metrics", timeout=5).text
            return all(f'task="{name}"' in text for name in wanted)

        shown = True
        try:
            self._wait(seen, 15, "Flower")
        except TimeoutError:
            shown = False
        self._report.check(shown, f"Flower shows the jobs of all {len(wanted)} definitions")

    def _heartbeats(self) -> None:
        self._heading("Workers")
        now_ms = self._platform.store.now_ms()
        table = Table("worker", "slots", "queues", "last heartbeat", box=None, pad_edge=False)
        workers = self._platform.store.workers()
        for worker in workers:
            table.add_row(worker.id, str(worker.slots), ", ".join(worker.queues), f"{(now_ms - worker.heartbeat_ms) / 1000:.1f} s ago")
        self._out.print(table)
        fresh = [worker for worker in workers if now_ms - worker.heartbeat_ms < 15_000]
        self._report.check(len(fresh) == len(self._stack.workers), f"{len(fresh)} workers send heartbeats")
        planner = self._platform.store.planner()
        self._report.check(now_ms - int(planner.get("tick", 0)) < 10_000, f"{planner.get('leader', 'nobody')} leads and plans")

    def _show_history(self, job: Job) -> None:
        self._heading(f"Every transition of {job.id}")
        history = self._platform.history(job.id)
        table = Table("at (UTC)", "from", "to", "attempt", "worker", "reason", box=None, pad_edge=False)
        for one in history:
            took = f", {one.detail['duration_ms']} ms" if "duration_ms" in one.detail else ""
            table.add_row(_time(one.at_ms), one.from_state or "", one.to_state, str(one.attempt), one.worker, one.reason + took)
        self._out.print(table)
        excerpt = history[-1].detail.get("excerpt", "")
        self._out.print(f"the answer began: {' '.join(excerpt.split())[:100]}", markup=False, soft_wrap=True)
        states = [one.to_state for one in history]
        wanted = [JobState.PENDING, JobState.QUEUED, JobState.ASSIGNED, JobState.RUNNING, JobState.COMPLETED]
        whole = states == wanted and [one.from_state for one in history] == [None, *states[:-1]]
        self._report.check(whole, f"the history is complete: {' → '.join(states)}")

    def _counts(self) -> None:
        self._heading("Counts")
        store = self._platform.store
        entered = ", ".join(f"{state} {count}" for state, count in store.counts().items() if count)
        self._out.print(f"entered: {entered}")
        waiting, queued = sum(store.waiting().values()), sum(store.queued().values())
        self._out.print(f"now: {waiting} waiting, {queued} queued, {store.running()} running")
        self._report.check(queued == 0 and store.running() == 0, "nothing is left queued or running")

    def _check_all_jobs(self, jobs: Sequence[Job]) -> None:
        completed = [job for job in jobs if job.state is JobState.COMPLETED]
        self._report.check(len(completed) == len(jobs), f"{len(completed)} of {len(jobs)} jobs completed")

    def _check_calls(self, jobs: Sequence[Job]) -> None:
        """What the target saw. A run that was held up before its call is given back, so there can be more runs than calls."""
        calls = sorted(requests.get(f"{self._stack.mock_url}{CALLS_PATH}", timeout=5).json())
        if not calls:
            return  # API_BASE_URL names another target
        by_job = Counter(job_id for _, job_id in calls)
        self._report.check(all(by_job[job.id] == 1 for job in jobs), "each called its target exactly once")
        limit = next((state.limit for state in self._platform.limits() if state.name == "total"), Limit())
        if limit.per_second is None or limit.burst is None:
            return  # another's beat leads on that server, and has none
        windows = call_windows([at for at, _ in calls])
        within = all(count <= limit.burst + limit.per_second * seconds for seconds, count in windows)
        busiest = max(count for seconds, count in windows if seconds <= 1)
        allowed = f"{limit.burst} + {format_rate(limit.per_second)}"
        text = f"the target saw no more than {allowed} in any window of its {len(calls)} calls; {busiest} in the busiest second"
        self._report.check(within, text)

    # helpers

    def _heading(self, text: str) -> None:
        self._out.print()
        self._out.print(f"[bold]{text}[/]")

    def _started(self, job: Job) -> int:
        return next((one.at_ms for one in self._platform.history(job.id) if one.to_state is JobState.RUNNING), 0)

    def _noted(self, job: Job, text: str) -> bool:
        return any(one.reason == text for one in self._platform.history(job.id))

    def _all(self, jobs: Sequence[Job], state: JobState) -> bool:
        return all(job.state is state for job in self._platform.store.jobs_by_id([job.id for job in jobs]))

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {what}")
            time.sleep(0.1)

    def _follow(self, ids: Sequence[str], seconds: float) -> list[Job]:
        """Show the jobs, which may still have to be planned, until all are finished. Returns them as they are then."""
        deadline = time.monotonic() + seconds
        with _view(self._out, len(ids)) as show:
            while True:
                current = self._platform.store.jobs_by_id(ids)
                show(current)
                if len(current) == len(ids) and all(job.state.terminal for job in current):
                    return current
                if time.monotonic() > deadline:
                    unfinished = sorted(set(ids) - {job.id for job in current if job.state.terminal})
                    raise TimeoutError(f"waited {seconds:g} s for {', '.join(unfinished)}")
                time.sleep(0.1)


def call_windows(times: Sequence[float]) -> list[tuple[float, int]]:
    """Every span of time that begins and ends with a call, in seconds, and how many calls it holds. `times` are in order."""
    return [(last - first, count) for begin, first in enumerate(times) for count, last in enumerate(times[begin:], 1)]


@contextmanager
def _view(out: Console, total: int) -> Iterator[Callable[[Sequence[Job]], None]]:
    """A progress bar and a table on a terminal; elsewhere a line for each job that changed."""
    if not out.is_terminal:
        yield _PlainView(out, total)
        return
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out)
    bar = progress.add_task("finished", total=total)
    with Live(console=out, refresh_per_second=10, transient=True) as live:

        def show(jobs: Sequence[Job]) -> None:
            progress.update(bar, completed=sum(job.state.terminal for job in jobs))
            live.update(_frame(jobs, total, progress))

        yield show


def _frame(jobs: Sequence[Job], total: int, progress: Progress) -> RenderableType:
    table = Table("job", "priority", "due (UTC)", "state", "reason", box=None, pad_edge=False)
    shown = jobs if total <= _MOST_SHOWN else [job for job in jobs if not job.state.terminal][:_MOST_SHOWN]
    for job in shown:
        table.add_row(job.id, job.priority, _time(job.execute_after_ms), job.state, job.reason)
    ahead = total - len(jobs)
    return Group(table, f"{ahead} not planned yet: that is done 5 s ahead" if ahead else "", progress)


class _PlainView:
    def __init__(self, out: Console, total: int) -> None:
        self._out = out
        self._total = total
        self._seen: dict[str, JobState] = {}

    def __call__(self, jobs: Sequence[Job]) -> None:
        for job in sorted(jobs, key=lambda one: one.finished_ms or 0):
            if self._seen.get(job.id) is job.state:
                continue
            self._seen[job.id] = job.state
            if job.state.terminal:
                done = sum(state.terminal for state in self._seen.values())
                if self._total > _MOST_SHOWN and done % 10:
                    continue
                self._out.print(f"  {done}/{self._total} {job.id} ({job.priority}): {job.state}, {job.reason}", soft_wrap=True)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]


def _schedule(schedule: object) -> str:
    given = getattr(schedule, "type", None)
    if given is None:
        return str(getattr(schedule, "expression", schedule))
    every = getattr(schedule, "value", 1)
    return f"{given} × {every}" if every > 1 else str(given)


if __name__ == "__main__":
    sys.exit(run())
