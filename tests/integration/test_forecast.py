"""A forecast is held against what the planner then does, on a real server, and against what release then lets go."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import redis
from click.testing import CliRunner, Result

from taskplatform.catalogue import Catalogue
from taskplatform.cli import cli
from taskplatform.forecast.ahead import _Ahead
from taskplatform.local import EmbeddedServer
from taskplatform.model import Definition, JobState, Limit, slot
from taskplatform.planner import Planner
from taskplatform.platform import Platform
from taskplatform.settings import Settings, settings
from taskplatform.store import Store, Subscribe
from tests.conftest import Clock
from tests.integration.apiserver import KEY, TASKS, Api, running_api
from tests.integration.harness import ACTOR, HORIZON, Message, define, enqueue, offer, publish, take

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000
#: 2027-01-15 09:00 UTC.
NINE = 1_800_003_600_000
#: So far ahead that a tick in half a minute is never late.
LONG = timedelta(minutes=1)


class Unhurried(Planner):
    """One whose ticks are whole, also on a machine that stands still for a while."""

    def advance(self, *, budget: timedelta = timedelta(minutes=5)) -> timedelta:
        return super().advance(budget=budget)


def lead(store: Store, *definitions: Definition, horizon: timedelta = HORIZON) -> Planner:
    made = Unhurried(store, {one.id: one for one in definitions}, horizon=horizon, batch=1000)
    made.lead()
    return made


def platform(store: Store, *definitions: Definition) -> Platform:
    return Platform(store, Catalogue.of(*definitions), Settings(), actor=ACTOR)


def subscribers(store: Store, definition: str, users: Sequence[str], **changes: Any) -> None:
    store.create_users(users, actor=ACTOR)
    store.subscribe([Subscribe(user, definition, **changes) for user in users], horizon=HORIZON, actor=ACTOR, log=False)


def names(count: int, start: int = 0) -> list[str]:
    return [f"u{number}" for number in range(start, start + count)]


def own(**interval: Any) -> dict[str, Any]:
    return {"schedule": define(interval=interval).schedule, "own_schedule": True}


# --- windows and moments ---------------------------------------------------------------------------------------------


def test_the_plan_of_hours_is_the_planners(store: Store, clock: Clock) -> None:
    """Windows to the millisecond, subscribers of each to the one, moments of each minute within what hashing leaves to chance."""
    clock.now_ms = NINE - 20 * MINUTE
    definitions = (
        define("sync", interval={"type": "hourly"}, window="10m", priority="high"),
        define("report", interval={"type": "daily", "at_time": {"hour": 9}}, window="60s"),
        define("poll", interval={"type": "minutely", "value": 15}, window="60s", priority="low"),
        define("clean", cron={"expression": "30 * * * *"}, window="30m", priority="low"),
    )
    leading = lead(store, *definitions, horizon=LONG)
    subscribers(store, "sync", names(400))
    subscribers(store, "report", names(900))
    subscribers(store, "report", names(200, 900), **own(type="daily", at_time={"hour": 11}, timezone="Europe/Berlin"))
    subscribers(store, "report", names(150, 1100), **own(type="daily", at_time={"hour": 5}, timezone="America/New_York"))
    subscribers(store, "poll", names(120))
    subscribers(store, "clean", names(400))
    # so large a burst that release does not feel it, and windows do
    store.set_limit("total", Limit(0.5, 100_000), actor=ACTOR)
    store.set_limit("definition:sync", Limit(0.2, 100_000), actor=ACTOR)
    offer(store, slots=100_000)
    leading.advance()
    end_ms = clock.now_ms + 3 * HOUR
    ahead = simulated(platform(store, *definitions), hours=3)

    while clock.now_ms <= end_ms:
        offer(store, slots=100_000)
        while store.release()[0]:
            pass
        leading.advance()
        clock.advance(30)

    planned = Counter[tuple[str, int, int, int]]()
    for definition in definitions:
        # what was open when it was forecast is no window that it foresees
        for one in store.occurrences(definition.id, since_ms=NINE - 15 * MINUTE, limit=1000):
            group_members = one.planned if one.state == "done" else store.sizes([(one.group, one.definition)])[0]
            planned[definition.id, one.at_ms, one.base_ms, one.window_ms] += group_members
    expected = Counter[tuple[str, int, int, int]]()
    for opened in ahead.opened:
        expected[opened.definition, opened.at_ms, opened.start_ms, opened.window_ms] += opened.members
    assert len(expected) > 18
    assert expected == planned
    assert sum(one.limit != "" for one in ahead.opened) > 8, "limits widened many of them"

    moments = Counter(
        ((job.definition, (job.execute_after_ms - ahead.stream.start_ms) // MINUTE))
        for definition in definitions
        for job in store.jobs(definition=definition.id, limit=10_000).items
        if job.execute_after_ms < end_ms
    )
    made = Counter[str]()
    for (definition_id, _), count in moments.items():
        made[definition_id] += count
    for lane in ahead.stream.lanes.values():
        definition_id = lane.definition
        total = sum(lane.planned)
        # what is planned has come to its moment but for the windows that the end cuts
        assert abs(total - made[definition_id]) <= 4 * (total**0.5 + 1), definition_id
        for minute, jobs in enumerate(lane.planned):
            assert abs(jobs - moments[definition_id, minute]) <= 5 * (jobs**0.5 + 1), (definition_id, minute)


def simulated(platform: Platform, *, hours: float) -> Any:
    """The course behind a forecast."""
    store = platform.store
    outlook = store.outlook(horizon=LONG, until_ms=store.now_ms() + round(hours * HOUR))
    ahead = _Ahead(outlook, platform.catalogue, platform.settings, horizon=LONG, end_ms=outlook.now_ms + round(hours * HOUR), bin_ms=MINUTE)
    return ahead._simulate((), {}, ahead._pools(None))


def test_a_forecast_begins_in_the_midst_of_things(store: Store, clock: Clock) -> None:
    """What is left of an open occurrence comes exactly, what is due waits, what is paused is left out."""
    clock.now_ms = NINE - 10 * SECOND
    report = define(interval={"type": "daily", "at_time": {"hour": 9}}, window="1h")
    idle, gone = define("idle"), define("gone")
    leading = lead(store, report, idle, gone)
    subscribers(store, "report", names(1000))
    subscribers(store, "idle", names(50))
    for at_ms in range(NINE - 5 * SECOND, NINE + 20 * MINUTE, SECOND * 5):
        clock.now_ms = at_ms
        leading.advance()
    store.pause_definition("idle", why="a test", actor=ACTOR)
    for number in range(7):
        enqueue(store, "gone", "u1", f"m{number}", delay_ms=2 * HOUR + number * MINUTE)
    found = platform(store, report, idle, gone).forecast(hours=5)

    due = sum(NINE + int(slot(user, "report") * HOUR) <= clock.now_ms for user in names(1000))
    first = found.total.points[0]
    assert first.jobs >= due
    by_name = {one.name: one for one in found.definitions}
    assert by_name["report"].jobs == pytest.approx(1000, abs=0.1)
    assert by_name["gone"].jobs == pytest.approx(7, abs=0.01)
    assert by_name.keys() == {"report", "gone"}
    assert any("idle" in line for line in found.left_out)
    assert any("No worker" in line for line in found.assumptions)
    assert found.slots.there is None


# --- release ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_release_goes_as_it_was_foreseen(store: Store, clock: Clock, share: float) -> None:
    """Strict priority under a rate, or with a share for the lower one: what goes in each minute, and when each is done."""
    high, low = define("first", priority="high"), define("second", priority="low")
    publish(store, high, low)
    store.set_options(fairness=False, share=share)
    store.create_users(names(1), actor=ACTOR)
    store.set_limit("total", Limit(1.0, 20), actor=ACTOR)
    clock.now_ms = NINE
    for number in range(150):
        enqueue(store, "first", "u0", f"m{number}")
        enqueue(store, "second", "u0", f"m{number}")
    offer(store, "celery@host#1a2b", slots=10)
    offer(store, "high only", slots=3, queues=["high"])
    store.drain_worker("high only", actor=ACTOR)
    found = platform(store, high, low).forecast(hours=0.1)
    # who is drained offers nothing
    assert found.slots.there == 10

    starts: Counter[tuple[str, int]] = Counter()
    done: dict[str, int] = {}
    while clock.now_ms < NINE + 6 * MINUTE:
        for name in work(store):
            starts[name, (clock.now_ms - NINE) // MINUTE] += 1
            done[name] = clock.now_ms
        clock.advance(1)

    assert sum(starts.values()) == 300
    by_name = {one.name: one for one in found.definitions}
    for name in ("first", "second"):
        foreseen = {point.bin: point.requests for point in by_name[name].points}
        for minute in range(6):
            # a step of the forecast, and the burst that the level of a bucket is rounded to
            assert foreseen.get(minute, 0) == pytest.approx(starts[name, minute], abs=12), (name, minute)
    ended = {one.of: one for one in found.backlogs}
    assert ended["priority:high"].end_ms == pytest.approx(done["first"], abs=MINUTE)
    assert ended["priority:low"].end_ms == pytest.approx(done["second"], abs=MINUTE)
    assert ended["priority:low"].because == ("total",)
    assert ended["priority:low"].delay_ms == pytest.approx(done["second"] - NINE, abs=15 * SECOND)


def work(store: Store, running: list[tuple[int, Message]] | None = None, seconds: int = 0, slots: int = 100) -> list[str]:
    """Workers do all that may go now, each in so many seconds. Returns the definitions of what they began."""
    done: list[str] = []
    running = [] if running is None else running
    while running and running[0][0] <= store.now_ms():
        finish(store, running.pop(0)[1])
    offer(store, "celery@host#1a2b", slots=slots)
    store.release()
    while len(running) < slots:
        try:
            message = take(store._redis)
        except LookupError:
            return done
        if store.start(message.job_id, delivery=message.delivery, worker="celery@host#1a2b").go:
            done.append(message.job_id.partition(":")[0])
            if seconds:
                running.append((store.now_ms() + seconds * SECOND, message))
            else:
                finish(store, message)
    return done


def finish(store: Store, message: Message) -> None:
    store.finish(message.job_id, delivery=message.delivery, worker="celery@host#1a2b", state=JobState.COMPLETED, reason="done")


@pytest.mark.parametrize(("limit", "seconds"), [(None, 0), (0.5, 0), (None, 20)])
def test_a_backfill_goes_on_as_it_was_foreseen(store: Store, clock: Clock, limit: float | None, seconds: int) -> None:
    """It makes a job a second, or as many as a limit or the time of ten runs let go; no more wait than may be unfinished."""
    clock.now_ms = NINE
    report = define(priority="high")
    leading = lead(store, report)
    subscribers(store, "report", names(45))
    clock.advance(10)
    leading.advance()
    site = platform(store, report)
    if limit is not None:
        store.set_limit("total", Limit(limit, 2), actor=ACTOR)
    begun = site.backfill("report", since=at(NINE - 5 * DAY // 2 - 5 * HOUR), until=at(NINE - DAY // 3), rate="1/s")
    # paused by somebody: nothing comes of it
    held = site.backfill("report", since=at(NINE - 2 * DAY), until=at(NINE - DAY // 3), rate="1/s")
    store.backfills.pause(held.id, actor=ACTOR)

    running: list[tuple[int, Message]] = []

    def second() -> int:
        leading.advance()
        done = len(work(store, running, seconds))
        clock.advance(1)
        return done

    assert sum(second() for _ in range(40)) > 10
    found = site.forecast(hours=0.2)
    made = store.backfills.get(begun.id)
    assert made.total == 135
    began_ms, starts, waited = clock.now_ms, Counter[int](), 0
    while store.backfills.get(begun.id).state.value == "running" or store.backfills.get(begun.id).unfinished:
        assert clock.now_ms < began_ms + HOUR, store.backfills.get(begun.id)
        starts[(clock.now_ms - found.start_ms) // MINUTE] += second()
        waited = max(waited, store.backfills.get(begun.id).unfinished)

    assert found.total.jobs == pytest.approx(135 - made.made + made.unfinished, abs=3 if not seconds else 11)
    assert found.priorities[2].requests == found.total.requests == pytest.approx(sum(starts.values()), abs=3)
    assert (max(starts) + 1) * MINUTE > (90 if limit is None and not seconds else 180) * SECOND
    foreseen = {point.bin: point.requests for point in found.total.points}
    for minute in range(max(starts) + 1):
        assert foreseen.get(minute, 0) == pytest.approx(starts[minute], abs=6), minute
    assert waited <= 10
    if limit is None:
        assert found.backlogs == ()
    else:
        of_all = found.backlogs[0]
        assert of_all.jobs == pytest.approx(10, abs=1.5)
        assert of_all.end_ms == pytest.approx(clock.now_ms, abs=1.5 * MINUTE)
    assert any(begun.id in line for line in found.assumptions)
    assert any(held.id in line and "paused" in line for line in found.left_out)


def test_what_a_backfill_leaves_out_is_not_to_come(store: Store, clock: Clock) -> None:
    """Two of three occurrences become older than the retention before it comes to them."""
    clock.now_ms = NINE
    report = define(priority="high")
    leading = lead(store, report)
    subscribers(store, "report", names(45))
    site = platform(store, report)
    begun = site.backfill("report", since=at(NINE - 5 * DAY // 2 - 5 * HOUR), until=at(NINE - DAY // 3), rate="1/s")
    assert site.forecast(hours=1).priorities[2].jobs == pytest.approx(135)
    clock.now_ms += 2 * DAY
    for _ in range(5):
        leading.advance()
        clock.advance(1)
    found = store.backfills.get(begun.id)
    assert (found.forgotten, 0 < found.made < 10) == (2, True)
    assert site.forecast(hours=1).priorities[2].jobs == pytest.approx(45, abs=0.1)


@pytest.mark.parametrize(("slots", "seconds"), [(1, 20), (100, 720)])
def test_who_is_not_finished_is_skipped_as_it_was_foreseen(store: Store, clock: Clock, slots: int, seconds: int) -> None:
    """Where a user has one job at a time, users whose last one waits for a worker, or runs for longer than the interval, get none."""
    clock.now_ms = NINE - 10 * SECOND
    poll = define("poll", interval={"type": "minutely", "value": 10}, window="2m", overlap="skip")
    leading = lead(store, poll, horizon=LONG)
    subscribers(store, "poll", names(60))
    running: list[tuple[int, Message]] = []

    def until(end_ms: int) -> None:
        while clock.now_ms < end_ms:
            leading.advance()
            work(store, running, seconds, slots)
            clock.advance(10)

    until(NINE + 26 * MINUTE)
    found = platform(store, poll).forecast(hours=50 / 60)
    until(NINE + 76 * MINUTE)
    jobs = [job for job in store.jobs(definition="poll", limit=1000).items if job.execute_after_ms >= NINE + 28 * MINUTE]
    rejected = Counter((job.execute_after_ms - NINE) // MINUTE // 10 for job in jobs if job.state is JobState.REJECTED)
    made = Counter((job.execute_after_ms - NINE) // MINUTE // 10 for job in jobs if job.state is not JobState.REJECTED)
    foreseen: defaultdict[int, float] = defaultdict(float)
    for point in found.total.points:
        at_ms = found.start_ms + point.bin * MINUTE
        if at_ms >= NINE + 28 * MINUTE:
            foreseen[(at_ms - NINE) // MINUTE // 10] += point.jobs
    print(made, rejected, foreseen, found.left_out)
    assert sum(rejected.values()) > 100
    for occurrence in range(3, 8):
        assert foreseen[occurrence] == pytest.approx(made[occurrence], abs=9), occurrence
    assert sum(foreseen.values()) == pytest.approx(sum(made.values()), rel=0.08)


def at(instant_ms: int) -> datetime:
    return datetime.fromtimestamp(instant_ms / 1000, UTC)


# --- what asks for it ------------------------------------------------------------------------------------------------


@pytest.fixture
def site(served: Api, server: EmbeddedServer, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API on an empty server; the settings of the current folder are the same, with its key. One job a second may start."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tasks.yaml").write_text(TASKS)
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKPLATFORM_REDIS_URL", server.url)
    monkeypatch.setenv("TASKPLATFORM_VERIFY_DEFINITIONS", "false")
    settings.cache_clear()
    served.platform.publish_missing()
    served.platform.set_limit("total", "1/s")
    yield served
    settings.cache_clear()


@pytest.fixture(scope="module")
def served(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api"), server.url) as api:
        yield api


def run(line: str, *, over: Api | None = None, stdin: str | None = None) -> Result:
    words = [] if over is None else ["--url", over.url, "--key-file", "key", "--ca", str(over.ca)]
    return CliRunner().invoke(cli, [*words, *shlex.split(line)], input=stdin)


def write_subscriptions(path: Path, count: int, *, definition: str = "sync") -> None:
    path.write_text("user,definition\n" + "".join(f"n{number},{definition}\n" for number in range(count)))


def test_the_command_says_the_same_on_redis_and_over_the_api(site: Api, tmp_path: Path) -> None:
    asked = "forecast --hours 24 --enable report --users 20000 --limit total=20/s:30"
    here, there = (json.loads(run(f"{asked} --json", over=over).stdout) for over in (None, site))
    assert 0 < here["total"]["jobs"] <= 20_001
    assert here["limits"][0]["name"] == "total"
    # an instant later, the end is one too
    for name in ("windows", "set_limits", "enable", "assumptions", "total_per_second"):
        assert here[name] == there[name], name
    assert here.keys() == there.keys()
    text = run(f"{asked} --plot f.svg")
    assert text.exit_code == 0, text.output
    assert "→" in text.stdout
    assert "Limits that are used up" in text.stdout
    assert (tmp_path / "f.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("forecast --enable report", "one --users for each --enable"),
        ("forecast --enable nothing --users 5", "'nothing' is not known"),
        ("forecast --limit total", "'total' is not accepted"),
        ("forecast --limit user=concurrency=3", "cannot be forecast"),
        ("forecast --limit nonsense=3/s", "is not known"),
        ("forecast --plot f.jpg", "ends in .svg or .png"),
        ("forecast --hours 0", "0"),
        ("forecast --hours 1000", "168"),
    ],
)
def test_what_cannot_be_forecast_is_said(site: Api, line: str, says: str) -> None:
    for over in (None, site):
        result = run(line, over=over)
        assert result.exit_code in (1, 2), result.output
        assert says in str(result.exception or "") + result.output
        assert "Traceback" not in result.output


def test_an_import_warns_first(site: Api, tmp_path: Path) -> None:
    write_subscriptions(tmp_path / "many.csv", 5000)
    refused = run("subscriptions import many.csv --create-users --strict")
    assert refused.exit_code == 1
    assert "warning: limit total (1/s burst 2) would be used up from" in refused.stderr
    assert site.platform.count_users() == 0
    made = run("subscriptions import many.csv --create-users --json")
    assert made.exit_code == 0, made.output
    assert "warning: limit total" in made.stderr
    assert json.loads(made.stdout)["created"] == 5000
    # all of it is in: nothing is added, and nothing gets worse
    again = run("subscriptions import many.csv --strict --json")
    assert again.exit_code == 0, again.output
    assert "warning" not in again.stderr


def test_on_a_terminal_it_asks(site: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda self: self.name == "<stdin>", raising=False)
    write_subscriptions(tmp_path / "many.csv", 2000)
    line = "subscriptions import many.csv --create-users --json"
    refused = run(line, stdin="n\n")
    assert "Import all the same? [y/N]" in refused.stderr
    assert (refused.exit_code, site.platform.count_users()) == (1, 0)
    assert json.loads(run(line, stdin="y\n").stdout)["created"] == 2000
    write_subscriptions(tmp_path / "many.csv", 4000)
    made = run(f"{line} --yes", stdin="")
    assert ("Import all the same?" in made.output, json.loads(made.stdout)["created"]) == (False, 2000)


def test_an_import_over_the_api_warns_too(site: Api, tmp_path: Path) -> None:
    write_subscriptions(tmp_path / "many.csv", 2000)
    refused = run("subscriptions import many.csv --create-users --strict", over=site)
    assert (refused.exit_code, site.platform.count_users()) == (1, 0)
    assert "would be used up" in refused.stderr


def test_a_small_import_is_not_forecast(site: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "forecast", lambda *_, **__: pytest.fail("it was forecast"))
    write_subscriptions(tmp_path / "few.csv", 900)
    assert run("subscriptions import few.csv --create-users").exit_code == 0
    piped = "user,definition\n" + "".join(f"p{number},report\n" for number in range(1500))
    assert run("subscriptions import - --format csv --create-users", stdin=piped).exit_code == 0


def test_a_batch_says_what_the_many_that_came_spoil(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    with running_api(tmp_path, server.url) as api:
        api.platform.publish_missing()
        api.platform.set_limit("total", "1/s")

        def warnings(start: int, count: int) -> list[str]:
            items = [{"user": f"b{number}", "definition": "sync"} for number in range(start, start + count)]
            found: list[str] = api("POST", "/v1/subscriptions/batch", {"items": items, "create_users": True})["warnings"]
            return found

        assert warnings(0, 700) == []
        first, *_ = warnings(700, 700)
        assert "limit total (1/s burst 2) would be used up" in first
        # it is said once, and not at each batch
        assert warnings(1400, 900) == []


def many_paused(site: Api, count: int = 3000) -> None:
    """So many who are subscribed to a definition that is paused. It is an hourly one: whenever that is, a day has its windows."""
    subscribers(site.platform.store, "sync", names(count))
    site.platform.pause_definition("sync", why="the target moves")


@pytest.mark.parametrize("over_api", [False, True])
def test_a_resume_warns_first(site: Api, over_api: bool) -> None:
    """While it is paused nothing comes of it; a second start in each second is too little for what comes then."""
    many_paused(site)
    over = site if over_api else None
    refused = run("resume sync --strict", over=over)
    assert refused.exit_code == 1, refused.output
    assert "warning: limit total (1/s burst 2) would be used up from" in refused.stderr
    assert "nothing was resumed, because of the warnings and --strict" in refused.stderr
    assert "sync" in site.platform.store.definition_pauses()
    made = run("resume sync", over=over)
    assert (made.exit_code, made.stdout) == (0, "sync resumed\n")
    assert "warning: limit total" in made.stderr
    assert site.platform.store.definition_pauses() == {}
    # it is as it was: nothing gets worse
    again = run("resume sync --strict", over=over)
    assert (again.exit_code, again.stdout, again.stderr) == (0, "sync was not paused\n", "")


def test_on_a_terminal_a_resume_asks(site: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda self: self.name == "<stdin>", raising=False)
    many_paused(site)
    refused = run("resume sync", stdin="n\n")
    assert "Resume all the same? [y/N]" in refused.stderr
    assert (refused.exit_code, list(site.platform.store.definition_pauses())) == (1, ["sync"])
    assert run("resume sync", stdin="y\n").stdout == "sync resumed\n"
    site.platform.pause_definition("sync")
    assert "Resume all the same?" not in run("resume sync --yes", stdin="").output
    assert site.platform.store.definition_pauses() == {}


def test_a_resume_of_few_is_not_forecast(site: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "forecast", lambda *_, **__: pytest.fail("it was forecast"))
    many_paused(site, 900)
    for over in (None, site):
        site.platform.pause_definition("sync")
        assert run("resume sync --strict", over=over).stdout == "sync resumed\n"
    site.platform.pause_definition("sync")
    assert site("POST", "/v1/definitions/sync/resume")["warnings"] == []


def test_the_api_says_what_a_resume_spoils(site: Api) -> None:
    many_paused(site)
    asked = site("POST", "/v1/forecast", {"resume": ["sync"]})
    assert asked["total"]["jobs"] > asked["before"]["total"]["jobs"] + 2900
    assert not any("Paused" in line for line in asked["left_out"])
    assert any("Paused" in line for line in asked["before"]["left_out"])
    site("POST", "/v1/forecast", {"resume": ["nothing"]}, status=422)
    first, *_ = site("POST", "/v1/definitions/sync/resume")["warnings"]
    assert "limit total (1/s burst 2) would be used up" in first
    # what is not paused spoils nothing, and who does not want to know is told nothing
    assert site("POST", "/v1/definitions/sync/resume")["warnings"] == []
    site.platform.pause_definition("sync")
    quiet = site("POST", "/v1/definitions/sync/resume?forecast=false")
    assert (quiet["warnings"], quiet["paused"]) == ([], None)
