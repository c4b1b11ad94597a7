"""docs/api-reference.md is what the API's own document says."""

from __future__ import annotations

from tests.reference import PATH, current


def test_the_reference_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == current(), "make docs writes it anew"


def test_every_route_and_record_is_in_it() -> None:
    text = current()
    assert text.count("\n### GET /v1/") > 10
    for wanted in ("### POST /v1/jobs\n", "### JobRecord\n", "[JobState](#jobstate)"):
        assert wanted in text, wanted
