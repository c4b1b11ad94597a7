"""The process that `bench.forecast` starts: forecasts what lies on a server, and says on stdout, as JSON, how long that took."""

from __future__ import annotations

import json
import resource
import sys
import time
from datetime import timedelta

from bench.forecast import MORE, definitions
from taskplatform.catalogue import Catalogue
from taskplatform.platform import Platform
from taskplatform.settings import Settings
from taskplatform.store import Store, connect


def main(url: str) -> None:
    """Seconds by the clock and of processor time; the most memory."""
    store = Store(connect(url), namespace="tp")
    platform = Platform(store, Catalogue.of(*definitions()), Settings(), actor="bench")
    began = time.perf_counter()
    store.outlook(horizon=timedelta(seconds=5), until_ms=store.now_ms() + 86_400_000)
    reading = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    found = platform.forecast()
    forecast, forecast_cpu = time.perf_counter() - began, time.process_time() - cpu
    began, cpu = time.perf_counter(), time.process_time()
    enabled = platform.forecast(enable=[("job1", MORE)])
    what_if, what_if_cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        json.dumps(
            {
                "reading_s": reading,
                "forecast_s": forecast,
                "forecast_cpu_s": forecast_cpu,
                "what_if_s": what_if,
                "what_if_cpu_s": what_if_cpu,
                "jobs": found.total.jobs,
                "widened": sum(one.windows for one in enabled.windows),
                "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
