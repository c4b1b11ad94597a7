"""Real processes for the acceptance tests, through pytest-celery.

A test that takes `celery_setup` gets the platform's own app, an embedded server as its broker, and a running worker of four
slots; `site` is the same installation with all that the tests need beside it. The installation is shared by the whole session,
with new users for each test. A module that kills processes overrides `site` with one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from celery import Celery
from pytest_celery import (
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisTestBroker,
)

from taskplatform.platform import Platform
from tests.acceptance.launcher import VARIABLE, Launcher
from tests.acceptance.nodes import ROOT, Guard, ServerNode, WorkerNode
from tests.acceptance.site import LOSING, Site, base_environment, running_site
from tests.acceptance.target import Target
from tests.acceptance.upnode import UpNode


@pytest.fixture(scope="session")
def guard() -> Iterator[Guard]:
    """Nothing that the tests start outlives them. In its environment is also what starts Celery's processes faster."""
    made = Guard()
    with TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder), base_environment("", made.environment), ROOT)
        made.environment[VARIABLE] = str(launcher.path)
        yield made
        launcher.close()
    made.close()


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """The API that the jobs call."""
    with Target() as running:
        yield running


@pytest.fixture(scope="module")
def new_site(guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Site]]:
    """Makes installations in which a silent worker is soon lost, each with a server of its own.

    They end with the module: an idle one, too, takes its part of the machine.
    """
    environment = base_environment(target.url, guard.environment) | LOSING
    with ExitStack() as stack:
        yield lambda: stack.enter_context(running_site(tmp_path_factory.mktemp("site"), environment))


@pytest.fixture(scope="module")
def own_site(new_site: Callable[[], Site]) -> Site:
    """For a module whose tests need all workers or beats to be their own, and lose some: it names this one as its `site`."""
    return new_site()


@pytest.fixture(scope="module")
def calm_site(guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The same for a module whose tests lose none."""
    with running_site(tmp_path_factory.mktemp("site"), base_environment(target.url, guard.environment)) as running:
        yield running


@pytest.fixture(scope="session")
def shared_site(guard: Guard, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For tests that hurt no process."""
    with running_site(tmp_path_factory.mktemp("site"), base_environment(target.url, guard.environment)) as running:
        yield running


@pytest.fixture
def site(shared_site: Site) -> Site:
    """The installation that the test uses."""
    return shared_site


@pytest.fixture
def platform(site: Site) -> Platform:
    """The Python API on that installation."""
    return site.platform


@pytest.fixture
def user(site: Site) -> str:
    """A new user."""
    return site.user()


@pytest.fixture(scope="session")
def up(guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpNode]:
    """`taskplatform up`, for tests of what people type and see."""
    node = UpNode(environment=base_environment("", guard.environment), folder=tmp_path_factory.mktemp("up"))
    try:
        yield node.started()
    finally:
        node.stop()


# pytest-celery's own fixtures, over processes instead of containers


@pytest.fixture
def default_redis_broker(site: Site) -> ServerNode:
    return site.server


@pytest.fixture
def default_worker_container(site: Site) -> WorkerNode:
    return site.default_worker


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    """Redis alone; pytest-celery would run each test again for every broker that it knows."""
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster() -> None:
    """None: the platform's app keeps no results in Celery."""


@pytest.fixture
def celery_worker_cluster(celery_setup_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    """One worker."""
    return CeleryWorkerCluster(celery_setup_worker)


@pytest.fixture
def celery_setup_app(site: Site) -> Celery:
    """The platform's app, not one that pytest-celery makes."""
    return site.app
