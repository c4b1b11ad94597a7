"""What processes log, how that is changed live, and the traces that a real OTLP receiver gets."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from taskplatform import tracing
from taskplatform.local import find_port
from taskplatform.model import JobState
from tests.acceptance.nodes import BeatNode, Guard, WorkerNode
from tests.acceptance.site import Site, base_environment, eventually, running_site
from tests.acceptance.target import Answer, Target

pytest.importorskip("opentelemetry.sdk", reason="needs taskplatform[otel]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

OWN_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes spans as OTLP over HTTP gives them, for `with`."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                owner._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            service = next(one.value.string_value for one in group.resource.attributes if one.key == "service.name")
            self._spans += [(service, span) for scope in group.scope_spans for span in scope.spans]

    def trace(self, trace_id: int) -> dict[str, list[Span]]:
        """Its spans by name, in the order of their beginnings."""
        spans: dict[str, list[Span]] = {}
        for _, one in sorted(self._spans, key=lambda each: each[1].start_time_unix_nano):
            if int.from_bytes(one.trace_id) == trace_id:
                spans.setdefault(one.name, []).append(one)
        return spans

    def of(self, job_id: str) -> dict[str, list[Span]]:
        """The trace of a job."""
        return self.trace(tracing.trace_id(job_id))

    def services(self) -> set[str]:
        """Which told something."""
        return {service for service, _ in self._spans}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def site(guard: Guard, target: Target, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    environment = {
        **base_environment(target.url, guard.environment),
        "TASKPLATFORM_TASKS_DIR": str(Path(__file__).parent / "telemetry_definitions"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "TASKPLATFORM_LOG_FORMAT": "auto",
    }
    with running_site(tmp_path_factory.mktemp("site"), environment) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(site: Site) -> dict[str, WorkerNode | BeatNode]:
    """A worker of each pool, and a beat; all log as they do where nobody says otherwise."""
    workers = {pool: site.worker("--concurrency", "1", "--pool", pool, "--queues", queue) for pool, queue in POOLS.items()}
    started: dict[str, WorkerNode | BeatNode] = {**workers, "beat": site.beat()}
    for node in started.values():
        node.ready()
    return started


#: Each pool has the jobs of one priority.
POOLS = {"prefork": "high,medium", "threads": "low"}
PRIORITIES = {"prefork": "high", "threads": "low"}
pools = pytest.mark.parametrize("pool", POOLS)


def lines(node: WorkerNode | BeatNode) -> list[dict[str, Any]]:
    """All that it wrote: each line is an object."""
    return [json.loads(line) for line in node.logs().splitlines()]


def about(node: WorkerNode | BeatNode, **fields: object) -> list[dict[str, Any]]:
    return [line for line in lines(node) if fields.items() <= line.items()]


@pools
def test_every_line_is_an_object_and_those_of_a_run_say_whose(site: Site, nodes: dict[str, WorkerNode | BeatNode], pool: str) -> None:
    node, user = nodes[pool], site.user()
    params = {"word": "hear", "raises": True}
    job = site.platform.enqueue("speaking", user=user, params=params, priority=PRIORITIES[pool])
    later = site.platform.enqueue("speaking", user=user, params={"word": "later"}, priority=PRIORITIES[pool])
    assert site.wait_for(job.id).state is JobState.FAILED
    site.wait_for(later.id)
    eventually(lambda: any("succeeded" in line["event"] for line in about(node, job=later.id)), "Celery does not say that it ended")

    of_run = about(node, job=job.id, definition="speaking", user=user, delivery=1, attempt=1, role="worker")
    said = {line["event"]: line for line in of_run}
    assert {"hear plain", "hear task", "hear structlog", "hear printed"} <= said.keys()
    assert "hear debug" not in said
    assert said["hear plain"]["rows"] == 5
    assert said["hear structlog"]["order"] == 4711
    assert said["hear plain"]["worker"] == site.platform.job(job.id).worker
    assert said["hear plain"]["trace_id"] == f"{tracing.trace_id(job.id):032x}"
    (failed,) = [line for line in of_run if line["event"] == f"job {job.id}: attempt 1 failed"]
    assert failed["level"] == "error"
    assert "ValueError: hear of ***" in failed["exception"]
    # Celery's own, in the main process, where nothing runs
    (received,) = [line for line in about(node, job=job.id) if line["event"].endswith("received")]
    assert (received["logger"], received["user"]) == ("celery.worker.strategy", user)
    assert "attempt" not in received
    assert (received["pid"] == said["hear plain"]["pid"]) is (pool == "threads")
    # what a run bound to its lines is not the next one's
    (others,) = about(node, job=later.id, event="later plain")
    assert "left_over" not in others
    assert site.environment["SECRET"] not in node.logs()


def test_the_level_is_changed_for_a_while_everywhere(site: Site, nodes: dict[str, WorkerNode | BeatNode]) -> None:
    def speaks(pool: str, word: str) -> bool:
        """Whether a run says what is of level DEBUG."""
        job = site.platform.enqueue("speaking", user=user, params={"word": word}, priority=PRIORITIES[pool])
        site.wait_for(job.id)
        return bool(about(nodes[pool], event=f"{word} debug"))

    user = site.user()
    assert not speaks("prefork", "before")
    site.platform.set_log_level("DEBUG", span=timedelta(hours=1))
    site.platform.set_log_level("WARNING", node="beat", span=timedelta(hours=1))
    for name, level in (("prefork", "DEBUG"), ("threads", "DEBUG"), ("beat", "WARNING")):
        eventually(lambda name=name, level=level: _told(nodes[name], f"logs from {level} on"), f"{name} was not told")  # type: ignore[misc]
    assert speaks("prefork", "during"), "a pool process does not follow"
    assert speaks("threads", "during")
    # for one process, and only for a second
    worker = site.platform.job(site.platform.enqueue("speaking", user=user, params={"word": "x"}, priority="high").id).id
    node = str(site.wait_for(worker).worker)
    site.platform.set_log_level("WARNING", node=node, span=timedelta(seconds=1))
    assert set(site.platform.log_levels()) >= {"*", "beat"}
    eventually(lambda: _told(nodes["prefork"], "logs from WARNING on"), "it was not told")
    eventually(lambda: node not in site.platform.log_levels(), "it does not end")
    assert site.platform.reset_log_level()
    assert site.platform.reset_log_level(node="beat")
    assert not site.platform.reset_log_level()
    for name in nodes:
        eventually(lambda name=name: lines_end_with_own_level(nodes[name]), f"{name} was not told of the end")  # type: ignore[misc]
    assert not speaks("prefork", "after")
    assert not speaks("threads", "after")
    # Celery says again what becomes of its tasks
    eventually(lambda: any("succeeded" in line["event"] and "after" in line["event"] for line in lines(nodes["prefork"])), "it stays mute")


def _told(node: WorkerNode | BeatNode, what: str) -> bool:
    return any(what in line["event"] for line in about(node, logger="taskplatform.logs"))


def lines_end_with_own_level(node: WorkerNode | BeatNode) -> bool:
    return "own level" in about(node, logger="taskplatform.logs")[-1]["event"]


@pools
def test_the_spans_of_a_job_hang_together(
    site: Site, nodes: dict[str, WorkerNode | BeatNode], collector: Collector, target: Target, pool: str
) -> None:
    user = site.user()
    target.answer(user, Answer(503), Answer(200))
    if pool == "prefork":
        # planned by beat
        site.platform.subscribe(user, "traced")
        site.platform.trigger("traced")
        eventually(lambda: bool(site.platform.jobs(user=user).items), "it is not planned")
        (job,) = site.platform.jobs(user=user).items
    else:
        job = site.platform.enqueue("traced", user=user, priority="low")
    assert site.wait_for(job.id).state is JobState.COMPLETED
    eventually(lambda: sum(map(len, collector.of(job.id).values())) == 7, f"not all spans came: {collector.of(job.id)}")

    spans = collector.of(job.id)
    (plan,), releases, runs, posts = (spans[name] for name in ("plan traced", "release traced", "run traced", "POST"))
    assert plan.parent_span_id == b""
    assert [one.parent_span_id for one in releases] == [plan.span_id] * 2
    assert [one.parent_span_id for one in runs] == [one.span_id for one in releases]
    assert [one.parent_span_id for one in posts] == [one.span_id for one in runs]
    ordered = [plan, releases[0], runs[0], posts[0], releases[1], runs[1], posts[1]]
    assert [one.start_time_unix_nano for one in ordered[2:]] == sorted(one.start_time_unix_nano for one in ordered[2:])
    assert all(one.start_time_unix_nano <= one.end_time_unix_nano for one in ordered)
    assert [_attributes(one)["http.response.status_code"] for one in posts] == [503, 200]
    assert [_attributes(one)["taskplatform.attempt"] for one in runs] == [1, 2]
    assert _attributes(runs[0])["taskplatform.worker"] == job_worker(site, job.id)
    # the target can go on with each call's own span
    sent = [call.headers["traceparent"] for call in target.calls(job=job.id)]
    assert sent == [f"00-{one.trace_id.hex()}-{one.span_id.hex()}-01" for one in posts]
    if pool == "prefork":
        (link,) = plan.links
        planned = int.from_bytes(link.trace_id)
        # of beat, which sends by its own time
        eventually(lambda: "plan batch traced" in collector.trace(planned), "beat has not told of its batch")
        (batch,) = collector.trace(planned)["plan batch traced"]
        assert link.span_id == batch.span_id
        assert _attributes(batch)["taskplatform.jobs"] == 1
        assert {"taskplatform-beat", "taskplatform-worker"} <= collector.services()
    else:
        assert not plan.links


def job_worker(site: Site, job_id: str) -> str | None:
    return site.platform.job(job_id).worker


def _attributes(span: Span) -> dict[str, str | int]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_definitions_own_traceparent_is_sent(site: Site, nodes: dict[str, WorkerNode | BeatNode], target: Target) -> None:
    job = site.platform.enqueue("own_parent", user=site.user())
    assert site.wait_for(job.id).state is JobState.COMPLETED
    (call,) = target.calls(job=job.id)
    assert [value for name, value in call.headers.items() if name.lower() == "traceparent"] == [OWN_PARENT]


def test_a_collector_that_is_away_holds_up_nothing(site: Site) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(site.environment, "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{find_port()}")
        node = site.worker("--concurrency", "1", "--queues", "medium")
    node.ready()
    try:
        done: list[str] = []
        while len(done) < 3:
            job = site.platform.enqueue("traced", user=site.user(), priority="medium")
            assert site.wait_for(job.id).state is JobState.COMPLETED
            if job_worker(site, job.id) and str(job_worker(site, job.id)).startswith(node.node):
                done.append(job.id)
        node.kill("SIGTERM")
        assert node.wait() == 0
    finally:
        site.remove(node)
    assert sum("opentelemetry" in line["logger"] for line in lines(node)) <= 2
    assert not [line for line in lines(node) if "exception" in line]
