"""The application: all routes, with what they share.

Only security's OPEN_PATHS answer without a key; `make_app` refuses to make one in which another route says no scope.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from taskplatform.api import answers, forecast, jobs, operations, people, problem, security
from taskplatform.api.call import JSON, Reads
from taskplatform.api.growth import Growth
from taskplatform.api.guard import Guard
from taskplatform.api.metrics import MEDIA_TYPE as METRICS
from taskplatform.api.records import Alive, Readiness
from taskplatform.api.routing import ALWAYS, WITHOUT_BODY, document, problem_response
from taskplatform.api.telling import Telling
from taskplatform.catalogue import Catalogue
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Store

#: Calls that ask Redis at a time; others wait.
THREADS = 16

_ROUTES = (
    jobs.jobs,
    jobs.dead,
    people.users,
    people.subscriptions,
    answers.answers,
    operations.definitions,
    operations.limits,
    operations.breakers,
    operations.nodes,
    operations.state,
    forecast.forecasts,
)

_DESCRIPTION = """\
Jobs, users, subscriptions, definitions, limits, workers and dead letters.

Each request but /health and /ready has a key: `Authorization: Bearer …`. Each call names the scope that it takes; a key with `admin` may do
everything, `read` and `submit` do not contain each other. Every error is a problem (RFC 9457, application/problem+json). Instants are
ISO 8601."""


def make_app(platform: Platform, telling: Telling | None = None) -> FastAPI:
    """The application without what stands before it. Raises ValueError for a route that says no scope.

    `telling` is what the process tells of itself, where that began before Redis was reached.
    """
    telling = telling or Telling(platform.settings)
    telling.serves(platform)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        turning = asyncio.create_task(telling.turn())
        yield
        turning.cancel()
        with suppress(asyncio.CancelledError):
            await turning

    app = FastAPI(
        title="taskplatform",
        version=version("taskplatform"),
        description=_DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.platform = platform
    app.state.telling = telling
    app.state.growth = Growth()
    problem.install(app)
    routers = [_process_routes(app, telling), *(routes.router for routes in _ROUTES)]
    app.state.routes = [route for router in routers for route in router.routes]
    for router in routers:
        app.include_router(router)
    security.install(app, platform)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The OpenAPI document, without anything that runs."""
    store = Store.connect(settings.redis_url, namespace=settings.namespace)
    try:
        return _document(make_app(Platform(store, Catalogue(), settings, actor="api")))
    finally:
        store.close()


def guarded(app: FastAPI, settings: Settings) -> Guard:
    """What a server serves."""
    return Guard(app, requests=app.state.telling.requests, max_body=settings.api_max_body, timeout=settings.api_timeout.total_seconds())


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = document(app)
    return app.openapi_schema


def _process_routes(app: FastAPI, telling: Telling) -> APIRouter:
    """What tells of this process and of the API itself."""
    router = APIRouter(tags=["process"])
    busy: dict[int | str, dict[str, Any]] = {503: problem_response(503)}

    @router.get("/health", response_model=Alive, responses=busy, operation_id="is_alive")
    async def health() -> Response:
        """Say that this process lives. It asks nobody else."""
        return Response(Alive().model_dump_json(), media_type=JSON)

    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not ready."}}

    @router.get("/ready", response_model=Readiness, responses=not_ready, operation_id="is_ready")
    async def ready() -> Response:
        """Say whether the API can do its work: Redis answers, and a beat leads."""
        found = await telling.ready()
        return Response(found.model_dump_json(), 200 if found.ready else 503, media_type=JSON)

    problems: dict[int | str, dict[str, Any]] = {code: problem_response(code) for code in ALWAYS}
    text: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "In Prometheus's format.",
            "content": {METRICS: {"schema": {"type": "string"}, "example": "taskplatform_users 2.0"}},
        }
    }
    schema = {"type": "object"}
    itself: dict[int | str, dict[str, Any]] = {
        200: {"description": "OpenAPI 3.1.", "content": {JSON: {"schema": schema, "example": {"openapi": "3.1.0"}}}}
    }

    @router.get("/metrics", response_class=Response, responses={**problems, **text}, openapi_extra=WITHOUT_BODY)
    def get_metrics(call: Reads) -> Response:  # noqa: ARG001 - it is asked for the key
        """Get figures of this process and of the platform."""
        return Response(telling.metrics(), media_type=METRICS)

    @router.get("/v1/openapi.json", response_class=Response, responses={**problems, **itself}, openapi_extra=WITHOUT_BODY)
    def get_openapi(call: Reads) -> Response:  # noqa: ARG001
        """Get this document."""
        return Response(json.dumps(app.openapi()), media_type=JSON)

    return router
