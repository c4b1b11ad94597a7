"""`python -m bench` runs all benchmarks and prints one table; `python -m bench NAME --json` runs one and ends with one JSON object."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from bench import execute, http, plan

BENCHMARKS: dict[str, Callable[[float], dict[str, Any]]] = {"execute": execute.run, "http": http.run, "plan": plan.run}


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS), help="one benchmark; default all")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the amount of work; default 1")
    given = parser.parse_args()
    results = {name: BENCHMARKS[name](given.scale) for name in ([given.name] if given.name else sorted(BENCHMARKS))}
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:32} {value}")
    if given.json:
        print(json.dumps(results[given.name] if given.name else results))


if __name__ == "__main__":
    main()
