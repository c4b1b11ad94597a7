"""Checks that a copy is what was backed up."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob

_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


def verify_manifest(job: RunningJob) -> dict[str, object]:
    """Compare texts with a manifest of SHA-256 sums, as `sha256sum` writes it.

    Parameters: `manifest` (text, a line per file), `contents` (the texts by file name, hashed as UTF-8). It passes when
    every listed file is there and intact; files that the manifest does not list are named, but do no harm.
    """
    given = Inputs(job.params)
    expected = _parse(given.text("manifest"))
    contents = given.record("contents")
    found = {name: _digest(contents, name) for name in contents.names()}
    present = sorted(expected.keys() & found.keys())
    changed = [name for name in present if found[name] != expected[name]]
    missing = sorted(expected.keys() - found.keys())
    return {
        "passed": not changed and not missing,
        "intact": [name for name in present if found[name] == expected[name]],
        "changed": changed,
        "missing": missing,
        "unlisted": sorted(found.keys() - expected.keys()),
    }


def _digest(contents: Inputs, name: str) -> str:
    return hashlib.sha256(contents.text(name, empty=True).encode()).hexdigest()


def _parse(manifest: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    for number, line in enumerate(manifest.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if not match:
            raise ValueError(f"params.manifest, line {number}: {line[:80]!r} is not a SHA-256 sum, two spaces and a file name")
        if match["name"] in digests:
            raise ValueError(f"params.manifest, line {number}: {match['name']!r} is listed twice")
        digests[match["name"]] = match["digest"].lower()
    return digests
