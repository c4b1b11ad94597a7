"""The shipped catalogue in `tasks/`: that it is a catalogue a SaaS could run, and what its Python functions compute.

What loading and checking mean is tested with the loader; here is what only holds for these files.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskplatform.catalogue import Catalogue, load, resolve_calls
from taskplatform.model import CatchUpPolicy, Definition, IntervalType, Priority
from taskplatform.schedule import occurrences

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"API_BASE_URL": "http://127.0.0.1:1", "API_TOKEN": "x"}

Function = Callable[[Any], object]


@cache
def shipped() -> Catalogue:
    return load(ROOT / "tasks", environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return shipped()


@pytest.fixture(scope="module", autouse=True)
def naps() -> Iterator[list[float]]:
    """The repository's root can be imported from, and nothing sleeps: what would have is in the list."""
    naps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.setattr(time, "sleep", naps.append)
        yield naps


@dataclass(frozen=True)
class StandIn:
    """What a function sees of a job, without the platform behind it."""

    params: Mapping[str, Any]
    execute_after_ms: int
    id: str = "job"
    user: str = "u1"
    definition: str = "d"
    attempt: int = 1


def instant_ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def run(call: str, params: Mapping[str, Any], *, at: str = "2026-03-10T12:00:00Z") -> object:
    module, function = call.split(":")
    target: Function = getattr(importlib.import_module(module), function)
    return target(StandIn(params, instant_ms(at)))


def http(catalogue: Catalogue) -> list[Definition]:
    return [definition for definition in catalogue.values() if definition.config is not None]


def python(catalogue: Catalogue) -> list[Definition]:
    return [definition for definition in catalogue.values() if definition.call is not None]


def repeated(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


# --- the catalogue as a whole ----------------------------------------------------------------------------------------


def test_it_is_as_large_and_as_various_as_promised(catalogue: Catalogue) -> None:
    definitions = list(catalogue.values())
    intervals = [definition.interval for definition in definitions if definition.interval]
    assert len(definitions) >= 300
    assert len(catalogue.domains) >= 24
    assert min(len(ids) for ids in catalogue.domains.values()) >= 5
    assert {interval.type for interval in intervals} == set(IntervalType)
    assert {interval.type for interval in intervals if interval.value > 1} == set(IntervalType)
    assert sum(definition.cron is not None for definition in definitions) >= 10
    assert min(Counter(definition.priority for definition in definitions)[priority] for priority in Priority) >= 30
    assert {definition.catch_up.policy for definition in definitions} == set(CatchUpPolicy)
    assert len({definition.schedule.timezone for definition in definitions}) >= 12
    assert {definition.config.method for definition in http(catalogue) if definition.config} == {"GET", "POST", "PUT", "PATCH", "DELETE"}
    assert len(python(catalogue)) >= 8
    assert sum(definition.rate_limit is not None for definition in definitions) >= 10
    assert sum(definition.concurrency is not None for definition in definitions) >= 3
    windows = {definition.window for definition in definitions}
    assert min(windows) <= timedelta(seconds=30)
    assert max(windows) == timedelta(hours=2)


def test_no_two_definitions_do_or_say_the_same(catalogue: Catalogue) -> None:
    definitions = list(catalogue.values())
    # a query only says how much of the same thing is meant
    assert not repeated([(d.config.method, d.config.endpoint.partition("?")[0]) for d in definitions if d.config])
    assert not repeated([d.call for d in definitions if d.call])
    assert not repeated([d.description for d in definitions])
    assert not repeated([d.name for d in definitions])
    assert not repeated([re.sub(r"\d+", "#", d.id).replace("_#", "").replace("#", "") for d in definitions]), "numbered copies"


def test_every_description_is_one_sentence_that_says_something(catalogue: Catalogue) -> None:
    for definition in catalogue.values():
        assert re.fullmatch(r"[A-Z][^!?\n]{58,}[^.]\.", definition.description), definition.id
        assert ". " not in definition.description, definition.id


def test_every_parameter_that_is_used_has_a_default_and_every_default_is_used(catalogue: Catalogue) -> None:
    for definition in catalogue.values():
        assert definition.missing_params({}) == [], definition.id
        if definition.config:
            assert definition.params.keys() == definition.config.param_names, definition.id


def test_every_call_goes_to_the_one_api_with_its_token(catalogue: Catalogue) -> None:
    assert catalogue.environment_names == ENVIRONMENT.keys()
    for definition in http(catalogue):
        assert definition.config
        assert definition.config.endpoint.startswith("${API_BASE_URL}/"), definition.id
        assert definition.config.headers.get("Authorization") == "Bearer ${API_TOKEN}", definition.id
        assert definition.config.method not in ("GET", "DELETE") or definition.config.body is None, definition.id
        filled = definition.config.endpoint + json.dumps(definition.config.body)
        assert "{{user}}" in filled, f"{definition.id} does not say for whom"


@pytest.mark.parametrize(
    ("id_", "type_", "value", "priority"),
    [
        ("hourly_data_sync", "hourly", 1, "medium"),
        ("hourly_cache_refresh", "hourly", 1, "medium"),
        ("bi_hourly_health_check", "hourly", 2, "high"),
        ("daily_user_report", "daily", 1, "medium"),
        ("daily_system_metrics", "daily", 1, "medium"),
        ("weekly_backup", "weekly", 1, "medium"),
        ("weekly_analytics", "weekly", 1, "medium"),
        ("bi_weekly_report", "weekly", 2, "medium"),
        ("monthly_billing", "monthly", 1, "high"),
        ("monthly_cleanup", "monthly", 1, "low"),
    ],
)
def test_what_the_demo_subscribes_to_is_there_and_quick(catalogue: Catalogue, id_: str, type_: str, value: int, priority: str) -> None:
    definition = catalogue.require(id_)
    assert definition.interval
    assert (definition.interval.type, definition.interval.value, definition.priority) == (type_, value, priority)
    assert definition.config
    assert definition.window == timedelta(seconds=60)
    assert definition.rate_limit is None


def test_weekly_analytics_is_the_documented_example(catalogue: Catalogue) -> None:
    definition = catalogue.require("weekly_analytics")
    assert definition.interval
    assert definition.config
    assert (definition.interval.timezone, definition.interval.at_time.hour, definition.interval.at_time.minute) == (
        "America/New_York",
        9,
        0,
    )
    assert (definition.timeout, definition.retries) == (timedelta(minutes=30), 3)
    assert (definition.config.method, definition.config.max_duration) == ("POST", timedelta(minutes=25))


# --- schedules that make sense ---------------------------------------------------------------------------------------


def shortest_gap(definition: Definition) -> timedelta:
    start = instant_ms("2026-01-01T00:00:00Z")
    span = (
        timedelta(days=40) if definition.interval and definition.interval.type not in (IntervalType.WEEKLY, IntervalType.MONTHLY) else None
    )
    end = start + round((span or timedelta(days=800)) / timedelta(milliseconds=1))
    due = list(occurrences(definition.schedule, start, end))
    return timedelta(milliseconds=min(later - earlier for earlier, later in pairwise(due)))


def test_users_of_one_occurrence_are_spread_well_before_the_next(catalogue: Catalogue) -> None:
    for definition in catalogue.values():
        assert definition.window <= shortest_gap(definition) / 2, definition.id


def test_a_run_ends_before_the_next_or_the_next_waits_for_it(catalogue: Catalogue) -> None:
    for definition in catalogue.values():
        assert definition.overlap == "skip" or definition.timeout < shortest_gap(definition), definition.id


def test_no_time_of_day_is_one_that_a_clock_change_skips_or_repeats(catalogue: Catalogue) -> None:
    start, end = instant_ms("2026-01-01T00:00:00Z"), instant_ms("2028-01-01T00:00:00Z")
    for definition in catalogue.values():
        schedule = definition.schedule
        often = shortest_gap(definition) < timedelta(hours=12)
        if schedule.timezone == "UTC" or often:
            continue
        zone = ZoneInfo(schedule.timezone)
        times = {datetime.fromtimestamp(due / 1000, zone).time() for due in occurrences(schedule, start, end)}
        for at in times:
            for offset in range(730):
                wall = datetime.combine(date(2026, 1, 1) + timedelta(days=offset), at, zone)
                assert wall.replace(fold=0).utcoffset() == wall.replace(fold=1).utcoffset(), f"{definition.id} at {wall}"


def test_rare_work_is_made_up_for_after_an_outage_of_more_than_a_day(catalogue: Catalogue) -> None:
    for definition in catalogue.values():
        if definition.catch_up.policy is not CatchUpPolicy.SKIP and shortest_gap(definition) > timedelta(days=27):
            assert definition.catch_up.window > timedelta(days=1), definition.id


# --- Python functions, all of them -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["0", "-1", "1e9", "2026-01-31", "09:00", "NaN"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def python_ids() -> list[str]:
    return sorted(definition.id for definition in python(shipped()))


def test_every_call_is_a_function_of_its_own_domain(catalogue: Catalogue) -> None:
    assert resolve_calls(catalogue) == []
    for definition in python(catalogue):
        assert definition.call
        assert definition.call.startswith(f"tasks.{catalogue.domain(definition.id)}:")


@pytest.mark.parametrize("id_", python_ids())
class TestEveryFunction:
    def test_runs_with_its_defaults_and_again_with_the_same_result(self, id_: str) -> None:
        definition = shipped()[id_]
        assert definition.call
        result = run(definition.call, definition.params)
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert run(definition.call, definition.params) == result

    def test_names_a_parameter_that_is_missing(self, id_: str) -> None:
        definition = shipped()[id_]
        assert definition.call
        for name in definition.params:
            params = {key: value for key, value in definition.params.items() if key != name}
            with pytest.raises(ValueError, match=rf"^params\.{name} is missing$"):
                run(definition.call, params)

    def test_names_a_parameter_of_the_wrong_type(self, id_: str) -> None:
        definition = shipped()[id_]
        assert definition.call
        for name in definition.params:
            with pytest.raises(ValueError, match=rf"^params\.{name} is None; it takes "):
                run(definition.call, {**definition.params, name: None})

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_takes_or_refuses_whatever_json_a_user_writes(self, id_: str, data: st.DataObject) -> None:
        definition = shipped()[id_]
        assert definition.call
        name = data.draw(st.sampled_from(sorted(definition.params)))
        params = {**definition.params, name: data.draw(JSON)}
        complaint, result = "params.", None
        try:
            result = run(definition.call, params)
        except ValueError as fault:
            complaint = str(fault)
        assert complaint.startswith("params.")
        json.dumps(result, allow_nan=False)


# --- Python functions, one by one ------------------------------------------------------------------------------------


class TestProration:
    CALL = "tasks.billing:prorate_plan_change"

    @pytest.mark.parametrize(
        ("at", "days_left", "credit", "charge"),
        [
            ("2026-04-01T00:00:00Z", 30, 2900, 7900),
            ("2026-04-16T09:00:00Z", 15, 1450, 3950),
            ("2026-04-30T23:59:59Z", 1, 97, 263),
            ("2028-02-29T12:00:00Z", 1, 100, 272),
        ],
    )
    def test_charges_the_days_that_are_left(self, at: str, days_left: int, credit: int, charge: int) -> None:
        result = run(self.CALL, {"current_monthly_cents": 2900, "target_monthly_cents": 7900}, at=at)
        assert isinstance(result, dict)
        assert (result["days_left"], result["credit_cents"], result["charge_cents"]) == (days_left, credit, charge)
        assert result["net_cents"] == charge - credit

    def test_rounds_half_cents_to_even(self) -> None:
        result = run(self.CALL, {"current_monthly_cents": 5, "target_monthly_cents": 7}, at="2026-04-16T00:00:00Z")
        assert isinstance(result, dict)
        assert (result["credit_cents"], result["charge_cents"]) == (2, 4)

    def test_refuses_a_negative_price(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.current_monthly_cents is -1; it takes a whole number from 0 "):
            run(self.CALL, {"current_monthly_cents": -1, "target_monthly_cents": 1})


class TestDunningPlan:
    CALL = "tasks.payments:dunning_plan"
    PARAMS: Mapping[str, Any] = {"failed_on": "2026-01-09", "retry_after_days": [14, 1, 3, 7]}  # a Friday
    TRIES = ("2026-01-12", "2026-01-16", "2026-01-23")  # Saturday and Monday fall together

    @pytest.mark.parametrize(
        ("at", "action", "next_try"),
        [
            ("2026-01-10T06:00:00Z", "wait", "2026-01-12"),
            ("2026-01-12T06:00:00Z", "retry", "2026-01-12"),
            ("2026-01-23T23:00:00Z", "retry", "2026-01-23"),
            ("2026-01-24T00:00:00Z", "give_up", None),
        ],
    )
    def test_says_what_the_day_calls_for(self, at: str, action: str, next_try: str | None) -> None:
        assert run(self.CALL, self.PARAMS, at=at) == {"tries": list(self.TRIES), "next_try": next_try, "action": action}

    def test_moves_sundays_to_monday(self) -> None:
        result = run(self.CALL, {"failed_on": "2026-01-09", "retry_after_days": [2]})
        assert isinstance(result, dict)
        assert result["tries"] == ["2026-01-12"]

    def test_refuses_a_plan_without_tries(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.retry_after_days is \[\]; it takes at least one"):
            run(self.CALL, {**self.PARAMS, "retry_after_days": []})


class TestTaxRounding:
    CALL = "tasks.finance:check_tax_rounding"

    def test_finds_the_cent_between_lines_and_total(self) -> None:
        assert run(self.CALL, {"currency": "EUR", "tax_rate": "0.19", "net_amounts": ["0.08", "0.08", "0.08"]}) == {
            "currency": "EUR",
            "net_total": "0.24",
            "tax_by_line": "0.06",
            "tax_on_total": "0.05",
            "difference_minor_units": 1,
            "lines_too_precise": [],
        }

    @pytest.mark.parametrize(
        ("currency", "amounts", "too_precise", "tax"),
        [
            ("EUR", ["1.005", "2.50", "3"], [0], "0.65"),
            ("JPY", ["100", "100.5"], [1], "20"),
            ("KWD", ["1.005", "0.0005"], [1], "0.101"),
        ],
    )
    def test_knows_the_smallest_unit_of_the_currency(self, currency: str, amounts: list[str], too_precise: list[int], tax: str) -> None:
        result = run(self.CALL, {"currency": currency, "tax_rate": "0.1", "net_amounts": amounts})
        assert isinstance(result, dict)
        assert (result["lines_too_precise"], result["tax_on_total"]) == (too_precise, tax)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"currency": "euro"}, "params.currency is 'euro'; it takes a currency code"),
            ({"tax_rate": "19"}, "params.tax_rate is '19'; it takes a share"),
            ({"net_amounts": [0.1]}, "params.net_amounts[0] is 0.1; it takes an exact number as text"),
            ({"net_amounts": ["1e20"]}, "params.net_amounts[0] is '1e20'; it takes an exact number"),
        ],
    )
    def test_refuses_what_is_no_money(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            run(self.CALL, {"currency": "EUR", "tax_rate": "0.19", "net_amounts": ["1"], **change})


class TestUsageRollup:
    CALL = "tasks.usage_metering:roll_up"

    def test_adds_up_per_meter_and_finds_the_overage(self) -> None:
        events = [
            {"meter": "calls", "quantity": 70},
            {"meter": "calls", "quantity": 50},
            {"meter": "calls", "quantity": -10},
            {"meter": "exports", "quantity": 1},
            {"meter": "seats", "quantity": -2},
        ]
        assert run(self.CALL, {"included": {"calls": 100, "seats": 5}, "events": events}) == {
            "meters": {
                "calls": {"used": 110, "included": 100, "overage": 10, "events": 3},
                "exports": {"used": 1, "included": 0, "overage": 1, "events": 1},
                "seats": {"used": 0, "included": 5, "overage": 0, "events": 1},
            },
            "over_plan": ["calls", "exports"],
        }

    def test_says_which_event_is_wrong(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.events\[1\]\.quantity is '5'; it takes a whole number"):
            run(self.CALL, {"included": {}, "events": [{"meter": "a", "quantity": 1}, {"meter": "a", "quantity": "5"}]})


class TestPasswordRotation:
    CALL = "tasks.identity:password_rotation"
    PARAMS: Mapping[str, Any] = {"last_changed": "2026-01-01", "max_age_days": 90, "remind_days_before": [1, 14, 7]}  # due on April 1st

    @pytest.mark.parametrize(
        ("day", "days_left", "state", "remind", "next_reminder"),
        [
            ("2026-03-17", 15, "current", False, "2026-03-18"),
            ("2026-03-18", 14, "due_soon", True, "2026-03-25"),
            ("2026-03-20", 12, "due_soon", False, "2026-03-25"),
            ("2026-03-31", 1, "due_soon", True, None),
            ("2026-04-01", 0, "due_soon", False, None),
            ("2026-04-02", -1, "overdue", True, None),
        ],
    )
    def test_reminds_on_the_days_before(self, day: str, days_left: int, state: str, remind: bool, next_reminder: str | None) -> None:
        assert run(self.CALL, self.PARAMS, at=f"{day}T06:00:00Z") == {
            "due": "2026-04-01",
            "days_left": days_left,
            "state": state,
            "remind_today": remind,
            "next_reminder": next_reminder,
        }

    def test_refuses_a_day_that_is_none(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.last_changed is '2026-02-30'; it takes a day"):
            run(self.CALL, {**self.PARAMS, "last_changed": "2026-02-30"})


class TestManifest:
    CALL = "tasks.backups:verify_manifest"
    EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1

    def test_sorts_files_by_what_became_of_them(self) -> None:
        manifest = f"{self.ABC}  good.txt\n{self.EMPTY.upper()} *empty\n\n{self.ABC}  changed.txt\n{self.ABC}  gone with space.txt\n"
        contents = {"good.txt": "abc", "empty": "", "changed.txt": "abd", "new.txt": "x"}
        assert run(self.CALL, {"manifest": manifest, "contents": contents}) == {
            "passed": False,
            "intact": ["empty", "good.txt"],
            "changed": ["changed.txt"],
            "missing": ["gone with space.txt"],
            "unlisted": ["new.txt"],
        }

    def test_passes_the_shipped_example(self) -> None:
        assert run(self.CALL, shipped()["backup_manifest_verification"].params) == {
            "passed": True,
            "intact": ["members.csv", "settings.json"],
            "changed": [],
            "missing": [],
            "unlisted": [],
        }

    def test_files_that_are_not_listed_do_no_harm(self) -> None:
        result = run(self.CALL, {"manifest": f"{self.ABC}  a", "contents": {"a": "abc", "b": ""}})
        assert isinstance(result, dict)
        assert result["passed"] is True

    @pytest.mark.parametrize(
        ("manifest", "message"),
        [
            (f"{ABC}  a\nnonsense", "params.manifest, line 2: 'nonsense' is not a SHA-256 sum"),
            (f"{ABC}  a\n{ABC}  a", "params.manifest, line 2: 'a' is listed twice"),
        ],
    )
    def test_refuses_a_manifest_that_it_cannot_read(self, manifest: str, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            run(self.CALL, {"manifest": manifest, "contents": {}})


class TestRetention:
    CALL = "tasks.compliance:retention_cutoffs"

    @pytest.mark.parametrize(
        ("at", "period", "cutoff"),
        [
            ("2026-03-31T00:00:00Z", {"months": 1}, "2026-02-28"),
            ("2028-03-31T00:00:00Z", {"months": 1}, "2028-02-29"),
            ("2028-02-29T00:00:00Z", {"years": 1}, "2027-02-28"),
            ("2026-01-15T23:59:00Z", {"months": 1}, "2025-12-15"),
            ("2026-03-01T00:00:00Z", {"days": 1}, "2026-02-28"),
            ("2026-03-31T00:00:00Z", {"years": 2, "months": 1, "days": 1}, "2024-02-28"),
        ],
    )
    def test_goes_back_by_the_calendar(self, at: str, period: dict[str, int], cutoff: str) -> None:
        result = run(self.CALL, {"policies": {"records": period}, "legal_holds": []}, at=at)
        assert result == {"as_of": at[:10], "delete_before": {"records": cutoff}, "held": []}

    def test_deletes_nothing_under_a_legal_hold(self) -> None:
        result = run(self.CALL, {"policies": {"logs": {"days": 1}, "invoices": {"years": 10}}, "legal_holds": ["invoices"]})
        assert result == {"as_of": "2026-03-10", "delete_before": {"logs": "2026-03-09"}, "held": ["invoices"]}

    @pytest.mark.parametrize(
        ("policies", "holds", "message"),
        [
            (
                {"logs": {"days": 1}},
                ["invoice"],
                "params.legal_holds is ['invoice']; it takes classes of which policies has the period, logs",
            ),
            ({"logs": {"weeks": 1}}, [], "params.policies.logs.weeks is 1; it takes no place here"),
            ({"logs": {}}, [], "params.policies.logs is no time at all"),
            ({"logs": {"days": 0}}, [], "params.policies.logs is no time at all"),
            ({"logs": {"years": 101}}, [], "params.policies.logs.years is 101; it takes a whole number from 0 to 100"),
        ],
    )
    def test_refuses_a_policy_that_it_might_misread(self, policies: dict[str, Any], holds: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            run(self.CALL, {"policies": policies, "legal_holds": holds})


class TestSlaClock:
    CALL = "tasks.support:sla_clock"
    PARAMS: Mapping[str, Any] = {
        "opened_at": "2026-01-09T16:30:00+01:00",  # a Friday
        "target_minutes": 60,
        "timezone": "Europe/Berlin",
        "opens": "09:00",
        "closes": "17:00",
        "workdays": ["monday", "tuesday", "wednesday", "thursday", "friday"],
    }

    @pytest.mark.parametrize(
        ("at", "used", "left", "breached"),
        [
            ("2026-01-09T15:00:00+01:00", 0, 60, False),
            ("2026-01-09T16:45:30+01:00", 15, 44, False),
            ("2026-01-11T12:00:00+01:00", 30, 30, False),
            ("2026-01-12T09:30:00+01:00", 60, 0, False),
            ("2026-01-12T09:31:00+01:00", 61, 0, True),
            ("2026-01-13T09:00:00+01:00", 510, 0, True),
        ],
    )
    def test_runs_in_business_hours_only(self, at: str, used: int, left: int, breached: bool) -> None:
        assert run(self.CALL, self.PARAMS, at=at) == {
            "due_at": "2026-01-12T09:30:00+01:00",
            "used_minutes": used,
            "left_minutes": left,
            "breached": breached,
        }

    def test_counts_a_repeated_hour_twice(self) -> None:
        # in Berlin 2026-10-25 has 25 hours
        night = {
            "opened_at": "2026-10-25T00:30:00+02:00",
            "opens": "01:00",
            "closes": "05:00",
            "workdays": ["sunday"],
            "target_minutes": 240,
        }
        result = run(self.CALL, {**self.PARAMS, **night}, at="2026-10-26T00:00:00+01:00")
        assert isinstance(result, dict)
        assert (result["due_at"], result["used_minutes"]) == ("2026-10-25T04:00:00+01:00", 300)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"opened_at": "2026-01-09T16:30:00"}, "params.opened_at is '2026-01-09T16:30:00'; it takes an instant"),
            ({"closes": "09:00"}, "params.closes is '09:00'; it takes a time of day after opens"),
            ({"workdays": ["Monday"]}, "params.workdays is ['Monday']; it takes a list of weekdays"),
            ({"timezone": "Europe/Berlín"}, "params.timezone is 'Europe/Berlín'; it takes an IANA time zone"),
            ({"timezone": "../etc"}, "params.timezone is '../etc'; it takes an IANA time zone"),
            ({"opens": "16:59", "workdays": ["monday"], "target_minutes": 9000}, "params.target_minutes is 9000; it takes what fits"),
        ],
    )
    def test_refuses_hours_that_make_no_sense(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            run(self.CALL, {**self.PARAMS, **change})


class TestDigest:
    CALL = "tasks.mailings:render_digest"

    def test_groups_by_section_in_the_order_given_and_cuts(self) -> None:
        items = [
            {"section": "Projects", "title": "Relaunch", "link": "https://app.example.com/1"},
            {"section": "Mentions", "title": "Ada asked"},
            {"section": "Projects", "title": "Migration"},
            {"section": "Projects", "title": "Audit"},
        ]
        text = "Projects\n- Relaunch <https://app.example.com/1>\n- Migration\n  and 1 more\n\nMentions\n- Ada asked"
        assert run(self.CALL, {"title": "Today", "limit_per_section": 2, "items": items}) == {
            "subject": "Today: 4 updates",
            "text": text,
            "items": 4,
        }

    def test_a_title_cannot_add_headers_or_sections(self) -> None:
        items = [{"section": "News", "title": "one\n\nFake section\r\n- two"}]
        assert run(self.CALL, {"title": "Today\r\nBcc: x@example.com", "limit_per_section": 5, "items": items}) == {
            "subject": "Today Bcc: x@example.com: 1 update",
            "text": "News\n- one Fake section - two",
            "items": 1,
        }

    def test_nothing_new_is_no_mail(self) -> None:
        assert run(self.CALL, {"title": "Today", "limit_per_section": 5, "items": []}) == {"subject": None, "text": None, "items": 0}


class TestErrorBudget:
    CALL = "tasks.monitoring:error_budget"

    @pytest.mark.parametrize(
        ("failures", "burn", "action"),
        [(0, 0.0, "none"), (99, 0.99, "none"), (100, 1.0, "ticket"), (1439, 14.39, "ticket"), (1440, 14.4, "page")],
    )
    def test_calls_for_what_the_burn_rate_means(self, failures: int, burn: float, action: str) -> None:
        assert run(self.CALL, {"objective_percent": "99.9", "requests": 100_000, "failures": failures}) == {
            "success_percent": round(100 - failures / 1000, 4),
            "allowed_failures": 100,
            "burn_rate": burn,
            "action": action,
        }

    def test_an_hour_without_requests_burns_nothing(self) -> None:
        result = run(self.CALL, {"objective_percent": "99.9", "requests": 0, "failures": 0})
        assert result == {"success_percent": None, "allowed_failures": 0, "burn_rate": 0.0, "action": "none"}

    @pytest.mark.parametrize("objective", ["0", "100", "-1"])
    def test_refuses_an_objective_without_a_budget(self, objective: str) -> None:
        with pytest.raises(ValueError, match=r"^params\.objective_percent is .*; it takes a percentage"):
            run(self.CALL, {"objective_percent": objective, "requests": 1, "failures": 0})

    def test_refuses_more_failures_than_requests(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.failures is 2; it takes a whole number from 0 to 1$"):
            run(self.CALL, {"objective_percent": "99", "requests": 1, "failures": 2})


class TestSlotDrill:
    CALL = "tasks.monitoring:hold_slot"

    def test_holds_the_slot_for_as_long_as_asked(self, naps: list[float]) -> None:
        naps.clear()
        assert run(self.CALL, {"seconds": 300}) == {"held_seconds": 300}
        assert naps == [300]

    def test_holds_it_for_five_minutes_at_most(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.seconds is 301; it takes a whole number from 0 to 300$"):
            run(self.CALL, {"seconds": 301})


class TestReorders:
    CALL = "tasks.inventory:suggest_reorders"

    @staticmethod
    def item(**changes: Any) -> dict[str, Any]:
        return {"sku": "A", "on_hand": 0, "on_order": 0, "lead_time_days": 4, "daily_demand": [8, 12], **changes}

    def suggest(self, *items: dict[str, Any]) -> object:
        return run(self.CALL, {"service_level_percent": 95, "cover_days": 7, "items": list(items)})

    def test_orders_up_to_the_point_and_for_the_days_to_cover(self) -> None:
        # mean 10, standard deviation √8: 10 × 4 + 1.645 × √8 × √4 = 49.31
        order = {"sku": "A", "available": 30, "reorder_point": 50, "order": 90}
        assert self.suggest(self.item(on_hand=10, on_order=20)) == {"checked": 1, "orders": [order]}

    @pytest.mark.parametrize(("available", "ordered"), [(50, True), (51, False)])
    def test_orders_at_the_point_and_not_above(self, available: int, ordered: bool) -> None:
        result = self.suggest(self.item(on_hand=available))
        assert isinstance(result, dict)
        assert bool(result["orders"]) is ordered

    def test_does_not_order_what_nobody_buys(self) -> None:
        assert self.suggest(self.item(daily_demand=[0, 0])) == {"checked": 1, "orders": []}

    def test_refuses_an_item_that_it_cannot_judge(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.items\[1\]\.daily_demand is \[3\]; it takes at least two days$"):
            self.suggest(self.item(), self.item(daily_demand=[3]))
        with pytest.raises(ValueError, match=r"^params\.service_level_percent is 96; it takes 90, 95, 98, 99$"):
            run(self.CALL, {"service_level_percent": 96, "cover_days": 7, "items": []})


class TestPopulationStability:
    CALL = "tasks.machine_learning:population_stability"

    def test_the_same_shares_are_stable_whatever_the_counts(self) -> None:
        result = run(self.CALL, {"features": {"age": {"training": [10, 20, 70], "current": [1, 2, 7]}}})
        assert result == {"psi": {"age": 0.0}, "watch": [], "drifted": []}

    def test_sorts_features_by_how_far_they_moved(self) -> None:
        # (0.6-0.5)·ln(0.6/0.5) + (0.4-0.5)·ln(0.4/0.5) = 0.0405; with 0.66: 0.1061; with 0.8: 0.4159
        features = {name: {"training": [50, 50], "current": [share, 100 - share]} for name, share in (("a", 60), ("b", 66), ("c", 80))}
        assert run(self.CALL, {"features": features}) == {"psi": {"a": 0.0405, "b": 0.1061, "c": 0.4159}, "watch": ["b"], "drifted": ["c"]}

    def test_an_empty_bin_gives_a_finite_score(self) -> None:
        result = run(self.CALL, {"features": {"a": {"training": [100, 0], "current": [50, 50]}}})
        assert isinstance(result, dict)
        assert result["drifted"] == ["a"]
        # an empty bin counts as 0.0001: (0.5-1)·ln(0.5/1) + (0.5-0.0001)·ln(0.5/0.0001)
        assert result["psi"]["a"] == 4.6043

    @pytest.mark.parametrize(
        ("current", "message"),
        [([1], "it takes as many bins as training has, 2"), ([0, 0], "it takes counts of which at least one is above 0")],
    )
    def test_refuses_bins_that_do_not_compare(self, current: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^params\.features\.a\.current is .*; {message}$"):
            run(self.CALL, {"features": {"a": {"training": [1, 1], "current": current}}})


class TestRowProfile:
    CALL = "tasks.data_quality:profile_rows"

    def test_finds_gaps_and_repeated_keys(self) -> None:
        rows = [{"id": 1, "mail": "a@example.com"}, {"id": "1", "mail": " "}, {"id": 1, "mail": None, "vip": False}, {"id": [2]}]
        assert run(self.CALL, {"rows": rows, "required": ["mail"], "key": ["id"]}) == {
            "rows": 4,
            "filled_percent": {"id": 100.0, "mail": 25.0, "vip": 25.0},
            "missing": [{"row": 2, "column": "mail"}, {"row": 3, "column": "mail"}, {"row": 4, "column": "mail"}],
            "repeated": [{"key": [1], "rows": 2}],
            "accepted": False,
        }

    def test_accepts_rows_that_are_whole_and_distinct(self) -> None:
        rows = [{"region": "eu", "id": 1}, {"region": "us", "id": 1}]
        result = run(self.CALL, {"rows": rows, "required": ["id"], "key": ["region", "id"]})
        assert isinstance(result, dict)
        assert result["accepted"] is True

    def test_no_rows_are_no_fault(self) -> None:
        result = run(self.CALL, {"rows": [], "required": ["a"], "key": ["b"]})
        assert result == {"rows": 0, "filled_percent": {}, "missing": [], "repeated": [], "accepted": True}

    def test_refuses_rows_without_a_key(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.key is \[\]; it takes at least one column$"):
            run(self.CALL, {"rows": [], "required": [], "key": []})


class TestMessageComparison:
    CALL = "tasks.localization:compare_messages"

    def test_finds_what_differs(self) -> None:
        source = {"hello": "Hello {name}", "items": "{count} of {total}", "bye": "Bye", "twice": "{a} {a}"}
        translation = {"hello": "Hallo {nome}", "items": "{total}: {count}", "old": "Alt", "twice": "{a}"}
        assert run(self.CALL, {"source": source, "translation": translation}) == {
            "missing": ["bye"],
            "obsolete": ["old"],
            "placeholders_differ": ["hello", "twice"],
            "complete_percent": 25.0,
        }

    def test_nothing_to_translate_is_complete(self) -> None:
        result = run(self.CALL, {"source": {}, "translation": {}})
        assert result == {"missing": [], "obsolete": [], "placeholders_differ": [], "complete_percent": 100.0}

    def test_refuses_a_message_that_is_no_text(self) -> None:
        with pytest.raises(ValueError, match=r"^params\.translation\.a is 7; it takes a text"):
            run(self.CALL, {"source": {"a": "A"}, "translation": {"a": 7}})


class TestAuditChain:
    CALL = "tasks.audit:verify_chain"
    HEAD = "14d1c0510f57e836beda4cbcd2c69508a08fbc21aab1dcb11614833bb29d7656"

    @staticmethod
    def chain() -> dict[str, Any]:
        return json.loads(json.dumps(shipped()["audit_chain_verification"].params))  # type: ignore[no-any-return]

    def test_the_digest_is_over_netstrings(self) -> None:
        digest = importlib.import_module("tasks.audit").entry_digest
        # SHA-256 of "1:a,2:é,0:,1:b,", so that ("ab", "") and ("a", "b") differ
        assert digest("a", "é", "", "b") == "4566e96bea5e1d831edb01a29c0b77e28cf2a5203e8ac0bc3e4f1c4926d132cd"
        assert digest("ab", "", "", "") != digest("a", "b", "", "")

    def test_vouches_for_an_intact_chain(self) -> None:
        assert run(self.CALL, self.chain()) == {"intact": True, "verified": 3, "broken_at": None, "head": self.HEAD}

    def test_an_empty_chain_ends_at_its_anchor(self) -> None:
        assert run(self.CALL, {"anchor": "x", "entries": []}) == {"intact": True, "verified": 0, "broken_at": None, "head": "x"}

    @pytest.mark.parametrize("name", ["at", "actor", "action", "digest"])
    def test_finds_a_change(self, name: str) -> None:
        params = self.chain()
        params["entries"][1][name] += "!"
        result = run(self.CALL, params)
        assert isinstance(result, dict)
        assert (result["intact"], result["verified"], result["broken_at"]) == (False, 1, params["entries"][1]["at"])

    def test_finds_an_entry_that_was_removed_or_moved(self) -> None:
        removed, moved = self.chain(), self.chain()
        del removed["entries"][1]
        moved["entries"].reverse()
        for params, verified in ((removed, 1), (moved, 0)):
            result = run(self.CALL, params)
            assert isinstance(result, dict)
            assert (result["intact"], result["verified"]) == (False, verified)
