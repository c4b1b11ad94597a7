"""The platform's Celery app with the fault points and the deafness of the tests: `celery -A tests.acceptance.faulty worker`."""

from __future__ import annotations

from taskplatform import consumer
from taskplatform.app import app as app
from tests.acceptance import deafness, faults

# so long no test should wait
consumer._WELL_SECONDS = 1.0

faults.install()
deafness.install()
