"""What lines of CSV and JSON Lines are read as, and what an import makes of them. The store is a stand-in that remembers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskplatform import bulk
from taskplatform.bulk import (
    FIELDS,
    MAX_FAULTS_KEPT,
    MAX_LINE_BYTES,
    Format,
    ImportReport,
    LineFault,
    import_subscriptions,
    own_schedule,
    read_subscriptions,
)
from taskplatform.catalogue import Catalogue
from taskplatform.errors import InvalidInput
from taskplatform.model import MAX_PARAMS_BYTES, AtTime, Definition, Interval, IntervalType
from taskplatform.platform import Platform, SubscriptionRequest
from taskplatform.settings import Settings
from taskplatform.store import Store, Subscribe, SubscribeResult

REPORT = Definition.model_validate(
    {
        "id": "report",
        "name": "Report",
        "interval": {"type": "daily", "timezone": "Europe/Berlin"},
        "config": {"endpoint": "https://api.example/{{params.format}}"},
        "params": {"format": "html"},
    }
)
GREETING = Definition.model_validate(
    {"id": "greeting", "name": "Greeting", "cron": "0 9 * * *", "config": {"endpoint": "https://api.example/{{params.word}}"}}
)


def read(content: bytes, format_: Format) -> list[tuple[int, SubscriptionRequest | LineFault]]:
    return list(read_subscriptions(io.BytesIO(content), format=format_))


def good(content: bytes, format_: Format = "csv") -> dict[int, SubscriptionRequest]:
    return {number: asked for number, asked in read(content, format_) if isinstance(asked, SubscriptionRequest)}


def faults(content: bytes, format_: Format = "csv") -> dict[int, str]:
    return {asked.line: asked.message for number, asked in read(content, format_) if isinstance(asked, LineFault) and asked.line == number}


def users_of(content: bytes, format_: Format = "csv") -> dict[int, str]:
    return {number: asked.user for number, asked in good(content, format_).items()}


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv_reads_every_field() -> None:
    content = (
        b"user,definition,enabled,params,timezone,at_time\n"
        b'u1,report,no,"{""format"": ""pdf"", ""n"": [1, 2]}",Asia/Tokyo,9:05\n'
        b"u2,report,,,,\n"
    )
    assert good(content) == {
        2: SubscriptionRequest(
            user="u1",
            definition="report",
            enabled=False,
            params={"format": "pdf", "n": [1, 2]},
            schedule={"timezone": "Asia/Tokyo", "at_time": {"hour": 9, "minute": 5}},
        ),
        3: SubscriptionRequest(user="u2", definition="report"),
    }


def test_csv_reads_an_own_schedule() -> None:
    content = b'schedule,definition,user\n"{""cron"": {""expression"": ""0 7 * * *""}}",report,u1\n'
    assert good(content)[2].schedule == {"cron": {"expression": "0 7 * * *"}}


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on", " on "])
def test_csv_switches_on(text: str) -> None:
    assert good(f"user,definition,enabled\nu1,report,{text}\n".encode())[2].enabled is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_csv_switches_off(text: str) -> None:
    assert good(f"user,definition,enabled\nu1,report,{text}\n".encode())[2].enabled is False


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfuser,definition\nu1,report\nu2,report\n",
        b"user,definition\r\nu1,report\r\nu2,report\r\n",
        b"user,definition\nu1,report\nu2,report",
        b" User , DEFINITION \n u1 , report \n\tu2,report\n",
        b'"user","definition"\n"u1","report"\n"u2",report\n',
    ],
    ids=["byte order mark", "CRLF", "no end of the last line", "case and spaces", "quotes"],
)
def test_csv_takes_what_programs_write(content: bytes) -> None:
    assert read(content, "csv") == [(n, SubscriptionRequest(user=f"u{n - 1}", definition="report")) for n in (2, 3)]


def test_empty_lines_are_left_out_and_counted() -> None:
    assert users_of(b"\n\nuser,definition\n\n  \nu1,report\n,\r\n\r\nu2,report\n\n") == {6: "u1", 9: "u2"}
    assert users_of(b'\n{"user": "u1", "definition": "report"}\n \r\n{"user": "u2", "definition": "report"}', "jsonl") == {2: "u1", 4: "u2"}


def test_a_record_of_several_lines_has_the_number_of_its_first() -> None:
    content = b'user,definition,params\nu1,report,"{\n""a"":\r\n\n1}"\nu2,report,\nu3,report,"{\n}"\nu4,report,\n'
    assert users_of(content) == {2: "u1", 6: "u2", 7: "u3", 9: "u4"}
    assert good(content)[2].params == {"a": 1}
    assert not faults(content)


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True),
            st.dictionaries(st.text(max_size=5), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=3),
            st.booleans(),
        )
    )
)
def test_csv_reads_what_the_csv_module_writes(rows: list[tuple[str, dict[str, str], bool]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["user", "definition", "params", "enabled"])
    first_lines = []
    for user, params, indented in rows:
        first_lines.append(text.getvalue().count("\n") + 1)
        writer.writerow([user, "report", json.dumps(params, indent=indented or None), "1"])
    expected = [
        (line, SubscriptionRequest(user=user, definition="report", params=params or {}))
        for line, (user, params, _) in zip(first_lines, rows, strict=True)
    ]
    assert read(text.getvalue().encode(), "csv") == expected


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"user,definition,colour", "'colour' is not a column; columns are user,"),
        (b"user,definiton", """'definiton' is not a column (did you mean "definition"?)"""),
        (b"user;definition", "separated by commas"),
        (b"user,definition,user", "the column user is there 2 times"),
        (b"user,params", "the column definition is missing"),
        (b"u1,report", "'u1' is not a column"),
        (b'user,"definition', "a quoted field does not end"),
        (b"user,defin\xfftion", "is not UTF-8: byte 11 is 0xff"),
        (b"x" * (MAX_LINE_BYTES + 1), "is longer than 65,536 bytes"),
    ],
)
def test_without_its_first_line_a_csv_file_is_one_fault(header: bytes, message: str) -> None:
    ((number, fault),) = read(header + b"\nu1,report\nu2,report\n", "csv")
    assert number == 1
    assert isinstance(fault, LineFault)
    assert message in fault.message


def test_an_empty_csv_file_is_a_fault_and_an_empty_json_file_is_not() -> None:
    assert "the first line names the columns" in faults(b"")[1]
    assert "the first line names the columns" in faults(b"\n\n")[1]
    assert read(b"\n\n", "jsonl") == []


HEADER = b"user,definition,enabled,params,schedule,timezone,at_time\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"u,report", "columns: 2; the first line names 7"),
        (b"u,report,,,,,,", "columns: 8; the first line names 7"),
        (b",report,,,,,", "user is missing"),
        (b"u,,,,,,", "definition is missing"),
        (b"u,report,maybe,,,,", "enabled is 'maybe'; true or false is accepted"),
        (b"u,report,,{a},,,", "params is not JSON: Expecting property name"),
        (b"u,report,,[1],,,", "params is a list; a JSON object is accepted"),
        (b'u,report,,"{""a"": NaN}",,,', "NaN is not a JSON value"),
        (b'u,report,,"{""a"": 1, ""a"": 2}",,,', "'a' is given twice"),
        (b'u,report,,"' + b"[" * 60_000 + b'",,,', "params is not JSON"),
        (b'u,report,,"{""a"": ' + b"9" * 5000 + b'}",,,', "params is not JSON"),
        (b"u,report,,,7,,", "schedule is 7; a JSON object is accepted"),
        (b"u,report,,,,,25:00", "at_time is '25:00'; a time of day such as \"09:30\" is accepted"),
        (b"u,report,,,{},UTC,", "schedule excludes timezone and at_time"),
        (b'u,report,,"{""a"": "b"}",,,', "is not CSV"),
        (b'u,report,,"{},,,', "a quoted field does not end"),
        (b"u,rep\rort,,,,,", "holds a carriage return"),
        (b"u,rep\xe4ort,,,,,", "is not UTF-8: byte 6 is 0xe4"),
        (b"u,report\0,,,,,", "holds a NUL"),
        (b"u,report,," + b"x" * MAX_LINE_BYTES + b",,,", "is longer than 65,536 bytes"),
        (b'u,report,,"' + b"x" * MAX_LINE_BYTES + b'",,,', "is longer than 65,536 bytes"),
    ],
)
def test_a_faulty_csv_line_stops_no_other(line: bytes, message: str) -> None:
    content = HEADER + b"u1,report,,,,,\n" + line + b'\nu2,report,,"{""a"": 1}",,,\nu3,report,,,,,\n'
    assert users_of(content) == {2: "u1", 4: "u2", 5: "u3"}
    assert list(faults(content)) == [3]
    assert message in faults(content)[3]


def test_a_fault_inside_a_record_of_several_lines_is_told_with_its_line() -> None:
    content = b'user,definition,params\nu1,report,"{\n""a"": ""\xff""\n}"\nu2,report,\n'
    assert faults(content) == {2: "line 3 of it is not UTF-8: byte 10 is 0xff"}
    assert users_of(content) == {5: "u2"}


def test_a_quote_that_is_never_closed_swallows_no_line() -> None:
    rows = b"".join(b"u%d,report,\n" % number for number in range(20_000))
    content = b'user,definition,params\nbad,report,"{\n' + rows
    assert list(faults(content)) == [2]
    assert users_of(content) == {number + 3: f"u{number}" for number in range(20_000)}


def test_looking_for_the_end_of_a_quote_has_a_bound() -> None:
    stream = io.BytesIO(b'user,definition\nbad,"report\n' + b"u1,report\n" * 100_000)
    assert isinstance(next(read_subscriptions(stream, format="csv"))[1], LineFault)
    assert stream.tell() < 2 * MAX_LINE_BYTES


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def test_json_lines_read_every_field() -> None:
    objects = [
        {"user": "u1", "definition": "report", "enabled": False, "params": {"a": None}, "timezone": "UTC", "at_time": "23:59"},
        {"user": "u2", "definition": "report", "enabled": None, "params": None, "at_time": {"hour": 4}},
        {"user": "u3", "definition": "report", "schedule": {"interval": {"type": "hourly"}}},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(one) for one in objects)
    assert good(content.encode(), "jsonl") == {
        1: SubscriptionRequest(
            user="u1",
            definition="report",
            enabled=False,
            params={"a": None},
            schedule={"timezone": "UTC", "at_time": {"hour": 23, "minute": 59}},
        ),
        2: SubscriptionRequest(user="u2", definition="report", schedule={"at_time": {"hour": 4}}),
        3: SubscriptionRequest(user="u3", definition="report", schedule={"interval": {"type": "hourly"}}),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is a list; an object with user, definition"),
        (b"null", "is nothing; an object"),
        (b'{"user": "u", "definition": "report"} {}', "is not JSON: Extra data at character 39"),
        (b'{"definition": "report"}', "user is missing"),
        (b'{"user": null, "definition": "report"}', "user is missing"),
        (b'{"user": 5, "definition": "report"}', "user is 5; text is accepted"),
        (b'{"user": "u", "definition": ["report"]}', "definition is a list; text is accepted"),
        (b'{"user": "u", "definition": "report", "enabled": "yes"}', "enabled is 'yes'; true or false is accepted"),
        (b'{"user": "u", "definition": "report", "params": "{}"}', "params is '{}'; a JSON object is accepted"),
        (b'{"user": "u", "definition": "report", "timezone": 1}', "timezone is 1; text is accepted"),
        (b'{"user": "u", "definition": "report", "at_time": 9}', "at_time is 9; a time of day"),
        (b'{"user": "u", "definition": "report", "param": {}}', """'param' is not a field (did you mean "params"?)"""),
        (b'{"user": "u", "user": "v", "definition": "report"}', "'user' is given twice"),
        (b'{"user": "\xff", "definition": "report"}', "is not UTF-8: byte 11 is 0xff"),
        (b'{"user": "u\0", "definition": "report"}', "holds a NUL"),
        (b" " * MAX_LINE_BYTES + b"{}", "is longer than 65,536 bytes"),
        (b"[" * 60_000, "is not JSON"),
    ],
)
def test_a_faulty_json_line_stops_no_other(line: bytes, message: str) -> None:
    content = b'{"user": "u1", "definition": "report"}\n' + line + b'\n{"user": "u2", "definition": "report"}\n'
    assert users_of(content, "jsonl") == {1: "u1", 3: "u2"}
    assert list(faults(content, "jsonl")) == [2]
    assert message in faults(content, "jsonl")[2]


# --- both ------------------------------------------------------------------------------------------------------------


_PIECES = st.one_of(
    st.binary(max_size=8), st.sampled_from([b'"', b'""', b",", b"\n", b"\r\n", b"\r", b"\0", b"{", b"}", b"u,report,{}\n", b'{"user":"u"}'])
)


@given(st.lists(_PIECES).map(b"".join), st.sampled_from([b"", b"user,definition,params\n"]), st.sampled_from(["csv", "jsonl"]))
def test_no_content_raises_and_lines_only_go_forward(content: bytes, header: bytes, format_: Format) -> None:
    content = header + content
    numbers = [number for number, _ in read(content, format_)]
    assert numbers == sorted(set(numbers))
    assert not numbers or numbers[-1] <= content.count(b"\n") + 1


class _Endless(io.RawIOBase):
    """A line that does not end, of which not more may be asked for than a line may be long."""

    def __init__(self, lines_of_limit: int) -> None:
        self._left = lines_of_limit

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 < size <= MAX_LINE_BYTES + 1
        self._left -= 1
        return b"x" * size if self._left > 0 else b""


def test_a_line_without_end_is_not_read_into_memory() -> None:
    ((number, fault),) = read_subscriptions(cast("Any", _Endless(1000)), format="jsonl")
    assert (number, str(fault)) == (1, "1: is longer than 65,536 bytes")


def test_the_longest_params_fit_into_a_line() -> None:
    params = {"a": '"' * (MAX_PARAMS_BYTES // 2 - 10)}
    text = io.StringIO()
    csv.writer(text).writerows([["user", "definition", "params"], ["u1", "report", json.dumps(params)]])
    assert good(text.getvalue().encode())[2].params == params


def test_own_schedule() -> None:
    assert own_schedule(None, None, None) is None
    assert own_schedule({"interval": {"type": "daily"}}, None, None) == {"interval": {"type": "daily"}}
    assert own_schedule(None, None, "00:00") == {"at_time": {"hour": 0, "minute": 0}}
    for text in ("24:00", "9", "9:5", "12:60", "-1:00", "09:30:00", "٠٩:٣٠"):
        with pytest.raises(InvalidInput, match="a time of day"):
            own_schedule(None, None, text)


# --- importing -------------------------------------------------------------------------------------------------------


class _Store:
    """Remembers subscriptions and users."""

    def __init__(self, *users: str) -> None:
        self.users = set(users)
        self.made: dict[tuple[str, str], Subscribe] = {}
        self.logged: list[bool] = []

    def create_users(self, users: Iterable[str], *, actor: str) -> int:
        assert actor == "tests"
        before = len(self.users)
        self.users.update(users)
        return len(self.users) - before

    def subscribe(self, subscriptions: Sequence[Subscribe], *, horizon: timedelta, actor: str, log: bool) -> list[SubscribeResult]:
        assert (horizon, actor) == (timedelta(seconds=5), "tests")
        self.logged.append(log)
        return [self._subscribe(one) for one in subscriptions]

    def _subscribe(self, one: Subscribe) -> SubscribeResult:
        if one.user not in self.users:
            return SubscribeResult.UNKNOWN_USER
        before = self.made.get((one.user, one.definition))
        self.made[one.user, one.definition] = one
        if before is None:
            return SubscribeResult.CREATED
        return SubscribeResult.UNCHANGED if before == one else SubscribeResult.CHANGED


def run(store: _Store, content: bytes | Path, format_: Format = "csv", **options: Any) -> ImportReport:
    settings = Settings.model_construct(plan_horizon=timedelta(seconds=5))
    platform = Platform(cast("Store", store), Catalogue.of(REPORT, GREETING), settings, actor="tests")
    source = content if isinstance(content, Path) else io.BytesIO(content)
    return import_subscriptions(platform, source, format=format_, **options)


def test_an_import_makes_what_is_good_and_tells_what_is_not() -> None:
    store = _Store("u1", "u2", "u3")
    content = (
        b"user,definition,params,at_time,timezone\n"
        b"u1,report,,,\n"
        b"u2,nothing,,,\n"
        b"u2,report,,07:15,Asia/Tokyo\n"
        b"u 3,report,,,\n"
        b"stranger,report,,,\n"
        b"u3,greeting,,,\n"
        b"u3,greeting,{},10:00,\n"
        b'u3,greeting,"{""word"": ""\\ud800""}",,\n'
        b'u3,greeting,"{""word"": ""hello""}",,Nowhere/City\n'
        b'u3,greeting,"{""word"": ""hello""}",,\n'
        b"u1,report,,,\n"
        b"u1,report,,01:00,\n"
    )
    report = run(store, content)
    assert (report.created, report.changed, report.unchanged, report.users_created, report.faulty) == (3, 1, 1, 0, 7)
    assert {fault.line: fault.message.split(":")[0] for fault in report.faults} == {
        3: "no definition 'nothing'; `taskplatform tasks list` shows all",
        5: "user id 'u 3' is not accepted",
        6: "no user 'stranger'",
        7: "params of greeting",
        8: "params of greeting",
        9: "params of greeting",
        10: "schedule for greeting",
    }
    assert [fault.line for fault in report.faults] == [3, 5, 6, 7, 8, 9, 10]
    tokyo = Interval(type=IntervalType.DAILY, timezone="Asia/Tokyo", at_time=AtTime(hour=7, minute=15))
    assert store.made["u2", "report"] == Subscribe("u2", "report", schedule=tokyo, own_schedule=True, params={}, enabled=True)
    assert store.made["u3", "greeting"].params == {"word": "hello"}
    assert store.made.keys() == {("u1", "report"), ("u2", "report"), ("u3", "greeting")}


def test_users_are_created_only_when_that_is_asked_for_and_only_for_good_lines() -> None:
    content = b"user,definition\nu1,report\nu2,report\nu2,report\nu3,nothing\n"
    store = _Store("u1")
    assert run(store, content).faulty == 3
    assert store.users == {"u1"}
    report = run(store, content, create_users=True)
    assert (report.users_created, report.created, report.unchanged, report.faulty) == (1, 1, 2, 1)
    assert store.users == {"u1", "u2"}


def test_reading_a_file_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "subscriptions.jsonl"
    path.write_text("".join(json.dumps({"user": f"u{n % 50}", "definition": ("report", "greeting")[n % 2]}) + "\n" for n in range(4, 100)))
    store = _Store()
    content = path.read_bytes().replace(b'"greeting"', b'"greeting", "params": {"word": "x"}')
    path.write_bytes(content)
    first = run(store, path, "jsonl", create_users=True)
    assert (first.created, first.unchanged, first.users_created, first.faulty) == (50, 46, 50, 0)
    again = run(store, path, "jsonl")
    assert (again.created, again.changed, again.unchanged, again.faulty) == (0, 0, 96, 0)


def test_faults_are_counted_in_full_and_kept_in_part() -> None:
    report = run(_Store(), b"{\n" * 5000, "jsonl")
    assert report.faulty == 5000
    assert [fault.line for fault in report.faults] == list(range(1, MAX_FAULTS_KEPT + 1))


def test_progress_grows_to_the_size_of_the_file() -> None:
    content = b"user,definition\n" + b"u1,report\n" * 10_000
    seen: list[int] = []
    run(_Store("u1"), content, progress=seen.append)
    assert len(seen) == 5
    assert seen == sorted(set(seen))
    assert seen[-1] == len(content)


def test_an_import_is_one_line_of_the_change_log_for_a_batch() -> None:
    store = _Store("u1")
    run(store, b"user,definition\n" + b"u1,report\n" * 10)
    assert store.logged == [False]


def test_the_fields_are_those_of_the_documentation() -> None:
    text = bulk.__doc__ or ""
    assert [line.split()[0] for line in text.splitlines() if line.startswith("    ")] == list(FIELDS)
