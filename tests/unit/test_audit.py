"""The check of installed versions finds what it is for, and docs and code say the same about rights."""

from __future__ import annotations

from taskplatform.store.acl import Role, rules
from tests.audit import faults, needed
from tests.conftest import ROOT


def test_another_version_and_one_that_is_not_pinned_are_found() -> None:
    installed = {"Some_Name": "1.0", "other": "2.0", "unpinned": "3"}
    assert faults("some-name==1.0\nother==2.1  # why\n# nothing\n", installed) == [
        "other 2.0 is installed, and 2.1 pinned",
        "unpinned 3 is installed, and nothing pinned",
    ]


def test_it_follows_what_is_needed() -> None:
    found = needed()
    # of the project, of an extra, of something that these need
    assert {"celery", "pytest", "vine"} <= found
    assert "taskplatform" not in found


def test_the_documented_rights_are_the_tested_ones() -> None:
    text = (ROOT / "docs" / "security-redis.md").read_text()
    for role in Role:
        assert f"```text\n{rules(role)}\n```" in text, role


def test_rights_are_those_of_one_installation() -> None:
    here, there = rules(Role.PLATFORM).split(), rules(Role.PLATFORM, namespace="other", database=3).split()
    assert "~other:*" in there
    assert "&/3.celery.pidbox" in there
    assert not {word for word in there if word.startswith("&")} & set(here)
    for rule in (here, there):
        assert not {"~*", "&*", "+@all", "allkeys", "allchannels", "allcommands"} & set(rule)
        assert rule.index("-@all") < min(index for index, word in enumerate(rule) if word.startswith("+"))
