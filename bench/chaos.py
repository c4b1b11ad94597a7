"""Random faults over many workers, two beats and a real server, under load; then a checker says what was lost, doubled or out of order.

`python -m bench chaos --minutes 20 --seed 1`. What it does and looks for is in tests/chaos. It prints one line of figures
with the seed that gives the same sequence of faults again, and ends with 1 if something was found that must not be; then the logs stay.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import WEIGHTS
from tests.chaos.run import run


def main(arguments: Sequence[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are made; default 5")
    parser.add_argument("--seed", type=int, default=None, help="of the sequence of faults and of the load; default a random one")
    parser.add_argument("--faults", default=",".join(WEIGHTS), help="kinds of faults with commas between; a leading - leaves these out")
    parser.add_argument("--every", type=float, default=2.5, help="seconds between two faults on average; default 2.5")
    parser.add_argument("--keep", action="store_true", help="keep the logs in any case")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    given = parser.parse_args(arguments)
    named = set(given.faults.lstrip("-").split(","))
    if unknown := named - WEIGHTS.keys():
        parser.error(f"--faults: {', '.join(sorted(unknown))} not known: {', '.join(WEIGHTS)} are")
    kinds = WEIGHTS.keys() - named if given.faults.startswith("-") else named
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    print(f"seed {seed}, logs in {folder}", file=sys.stderr, flush=True)

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} {text}", file=sys.stderr, flush=True)

    outcome = run(folder, seed=seed, seconds=60 * given.minutes, kinds=kinds, every=given.every, say=say)
    if not outcome.passed:
        print(outcome.explain())
        print(f"logs, calls and faults are in {folder}")
    elif not given.keep:
        shutil.rmtree(folder)
    print(outcome.line())
    if given.json:
        print(json.dumps({"seed": seed, **outcome.verdict.figures}))
    return int(not outcome.passed)
