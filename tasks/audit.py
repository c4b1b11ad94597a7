"""Audit entries that vouch for the ones before them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tasks.inputs import Inputs

if TYPE_CHECKING:
    from taskplatform.app import RunningJob


def entry_digest(previous: str, at: str, actor: str, action: str) -> str:
    """SHA-256, in hexadecimal, over the four texts. Each goes in with its length, so that no text can run into the next."""
    parts = (f"{len(text.encode())}:{text}," for text in (previous, at, actor, action))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def verify_chain(job: RunningJob) -> dict[str, object]:
    """Whether each entry's digest covers its content and the digest before it, and the first entry that fails.

    Parameters: `anchor` (the digest of the entry before the first one), `entries`, a list of `{at, actor, action, digest}`.
    An entry that was changed, removed or put in breaks the chain at its place; entries after that cannot be vouched for.
    """
    given = Inputs(job.params)
    previous = given.text("anchor")
    entries = given.records("entries")
    for index, entry in enumerate(entries):
        digest = entry.text("digest")
        if digest != entry_digest(previous, entry.text("at"), entry.text("actor"), entry.text("action")):
            return {"intact": False, "verified": index, "broken_at": entry.text("at"), "head": previous}
        previous = digest
    return {"intact": True, "verified": len(entries), "broken_at": None, "head": previous}
