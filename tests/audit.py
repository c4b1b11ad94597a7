"""Whether what is installed is what constraints.txt pins: `python -m tests.audit constraints.txt`. Needs no network.

What the project needs and has no line there would be another version on the next machine. What somebody installed beside that
does not matter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_PROJECT = "taskplatform"
_EXTRAS = ("local", "dev")


def needed(project: str = _PROJECT, extras: Sequence[str] = _EXTRAS) -> set[str]:
    """The names of all that is installed and that the project needs, directly or not."""
    found: set[str] = set()
    left = [(project, extra) for extra in ("", *extras)]
    seen = set(left)
    while left:
        name, extra = left.pop()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(_canonical(name))
        for one in map(Requirement, requires):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                more = {(one.name, asked) for asked in ("", *one.extras)} - seen
                seen |= more
                left += more
    return found - {_canonical(project)}


def faults(pinned: str, installed: Mapping[str, str]) -> list[str]:
    """A line for each version that differs from the pinned one, or is not pinned. `pinned` has lines `name==version`."""
    wanted = {}
    for line in pinned.splitlines():
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name:
            wanted[_canonical(name)] = version.strip()
    found = {_canonical(name): version for name, version in installed.items()}
    return [
        f"{name} {version} is installed, and {f'{wanted[name]} pinned' if name in wanted else 'nothing pinned'}"
        for name, version in sorted(found.items())
        if wanted.get(name) != version
    ]


def _canonical(name: str) -> str:
    """As PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    versions = {name: metadata.version(name) for name in needed()}
    wrong = faults(Path(sys.argv[1]).read_text(encoding="utf-8"), versions)
    print("\n".join(wrong) or f"{len(versions)} packages are installed as pinned")
    sys.exit(1 if wrong else 0)
