"""The platform's Celery app with the fault points and the deafness of the tests: `celery -A tests.acceptance.faulty worker`."""

from __future__ import annotations

from taskplatform.app import app as app
from tests.acceptance import deafness, faults

faults.install()
deafness.install()
