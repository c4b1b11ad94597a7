"""The parts of `taskplatform.http` that need no network: rendering, redaction, `Retry-After`, classification.

What a job may not do is tested by properties: its values come from hypothesis, and what was rendered is read back by
other implementations (the URL as `requests` would send it, the form with urllib, the body with json).
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from taskplatform.errors import InvalidInput
from taskplatform.http import Call, Outcome, OutcomeKind, classify, parse_retry_after, redact, render
from taskplatform.model import HttpConfig

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
LONGEST = timedelta(hours=24)
PLATFORM = {"X-Job-ID": "job-1", "X-User-ID": "u1", "X-Task-Type": "daily_report", "Idempotency-Key": "job-1"}

nasty = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "\\",
        "%2e",
        "%2F",
        "?",
        "#",
        "@",
        ":",
        "&",
        "=",
        "+",
        ";",
        "\r\n",
        "\0",
        "${TOKEN}",
        "{{user}}",
        "é",
        '"',
        " ",
        "\xa0",
        "\x85",
    ]
)
unhurried = settings(deadline=None)  # a busy machine is no fault
job_text = st.lists(st.one_of(nasty, st.text(st.characters(codec="utf-8"), max_size=5)), max_size=5).map("".join)


def rendered(
    endpoint: str = "https://api.example.com/v1",
    *,
    params: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    job_id: str = "job-1",
    user: str = "u1",
    checked: bool = True,
    **config: Any,
) -> Call:
    fields = {"endpoint": endpoint, **config}
    return render(
        HttpConfig.model_validate(fields) if checked else HttpConfig.model_construct(**fields),
        job_id=job_id,
        user=user,
        definition="daily_report",
        params=params or {},
        environment=environment or {},
    )


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        rendered(*args, **kwargs)
    return str(caught.value)


def sent_url(call: Call) -> str:
    """The URL after all that `requests` does to it."""
    url = requests.Request(call.method, call.url).prepare().url
    assert url is not None
    return url


# --- URL -------------------------------------------------------------------------------------------------------------


def test_url_takes_values_from_environment_and_job() -> None:
    call = rendered(
        "${BASE}/users/{{user}}/jobs/{{ job_id }}?n={{params.n}}&on={{params.on}}&x={{params.x}}",
        params={"n": 7, "on": True, "x": 1.5},
        environment={"BASE": "https://api.example.com:8443/v2"},
    )
    assert call.url == "https://api.example.com:8443/v2/users/u1/jobs/job-1?n=7&on=true&x=1.5"
    assert call.secrets == ("https://api.example.com:8443/v2",)
    assert call.method == "POST"


def test_job_values_are_percent_encoded_and_not_scanned_again() -> None:
    call = rendered(
        "https://a.example/x/{{params.p}}?q={{params.p}}", params={"p": "a b/ü&${TOKEN}{{user}}"}, environment={"TOKEN": "s3cret"}
    )
    encoded = "a%20b%2F%C3%BC%26%24%7BTOKEN%7D%7B%7Buser%7D%7D"
    assert call.url == f"https://a.example/x/{encoded}?q={encoded}"
    assert call.secrets == ()


def test_values_of_the_environment_are_not_scanned_again() -> None:
    call = rendered(headers={"X-A": "${A}"}, environment={"A": "${B} {{user}}", "B": "no"})
    assert call.headers["X-A"] == "${B} {{user}}"


def test_fragment_and_user_info_are_not_sent_in_the_url() -> None:
    call = rendered("https://${WHO}@a.example/x#part", environment={"WHO": "robot:p%40ss word"})
    assert call.url == "https://a.example/x"
    assert call.headers["Authorization"] == "Basic " + base64.b64encode(b"robot:p@ss word").decode()
    assert "p@ss" not in redact("p@ss word", call.secrets)


def test_a_given_authorization_header_wins_over_user_info() -> None:
    assert rendered("https://a:b@a.example/", headers={"authorization": "Bearer x"}).headers["authorization"] == "Bearer x"


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("https://a.example/u/{{params.p}}/x", ".."),
        ("https://a.example/u/{{params.p}}/x", "."),
        ("https://a.example/u/{{params.p}}", ".."),
        ("https://a.example/u/.{{params.p}}/x", "."),
        ("https://a.example/u/%2e{{params.p}}/x", "."),
        ("https://a.example/u/{{params.p}}{{params.p}}/x", "."),
        ("https://a.example/u/{{params.p}}/x", ""),
        ("https://a.example/{{params.p}}", ""),
        ("https://a.example/u/{{params.p}}/x", "a/../../admin"),
        ("https://a.example/u/{{params.p}}/x", "..\\admin"),
    ],
)
def test_a_job_cannot_climb_in_the_path(template: str, value: str) -> None:
    message = refusal(template, params={"p": value})
    assert "params.p" in message
    assert "admin" not in message


@pytest.mark.parametrize("value", ["...", "a.b", ".x", "x..", "folder/file.txt", "%2e%2e", "a..b/c"])
def test_dots_and_slashes_that_do_not_climb_are_values(value: str) -> None:
    path = urlsplit(sent_url(rendered("https://a.example/u/{{params.p}}/x", params={"p": value}))).path
    assert [unquote(segment) for segment in path.split("/")] == ["", "u", value, "x"]


@pytest.mark.parametrize(
    ("template", "base"),
    [
        ("${BASE}{{params.p}}", "https://api.example.com"),
        ("${BASE}{{params.p}}/x", "https://api.example.com"),
        ("${BASE}{{params.p}}@api.example.com/x", "https://"),
        ("${BASE}{{params.p}}/x", "https://api.example.com:8"),
        ("${BASE}{{params.p}}.example.com/x", "https://"),
        ("${BASE}://{{params.p}}/", "https"),
    ],
)
@pytest.mark.parametrize("value", ["evil", "443", ".evil.example", ""])
def test_a_job_cannot_give_the_host(template: str, base: str, value: str) -> None:
    """The model refuses most of these templates; this does not rest on it."""
    assert "endpoint with BASE, params.p" in refusal(template, params={"p": value}, environment={"BASE": base}, checked=False)


@pytest.mark.parametrize(
    "base",
    [
        "",
        "api.example.com",
        "ftp://api.example.com",
        "file:///etc/passwd",
        "https://",
        "https:///x",
        "//api.example.com",
        "https://a b.example",
        "https://a.example:99999",
        "https://a.example:port",
        "https://a.example\n",
        "https://a.example\\@b.example",
        "https://a@b@c",
        "https://[::1",
        "https://a.example/\udc80",
    ],
)
def test_what_is_no_http_url_is_refused_without_showing_it(base: str) -> None:
    message = refusal("${BASE}/x", environment={"BASE": base})
    assert message == "endpoint with BASE is not an http or https URL with a host"


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("HTTPS://API.example.com/v1", "HTTPS://API.example.com/v1"),
        ("http://[::1]:80/", "http://[::1]:80/"),
        ("https://a.example?x", "https://a.example/?x"),
        ("https://münchen.example", "https://münchen.example/"),
    ],
)
def test_urls_that_are_accepted(base: str, url: str) -> None:
    assert rendered("${BASE}", environment={"BASE": base}).url == url


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, float("nan"), "\ud800"])
@pytest.mark.parametrize("place", ["endpoint", "header"])
def test_values_that_cannot_be_in_a_url_or_header(value: Any, place: str) -> None:
    template = "{{params.p}}"
    where = {"endpoint": f"https://a.example/{template}"} if place == "endpoint" else {"headers": {"X-P": template}}
    assert "params.p" in refusal(**where, params={"p": value})


@unhurried
@given(job_text, job_text, job_text)
def test_no_job_value_changes_host_path_or_query_structure(first: str, second: str, third: str) -> None:
    template = "https://api.example.com/v1/{{params.a}}/mid-{{params.b}}/end?k={{params.c}}&l={{params.a}}-{{user}}"
    try:
        call = rendered(template, params={"a": first, "b": second, "c": third}, environment={"TOKEN": "s3cret"})
    except InvalidInput:
        return
    parts = urlsplit(sent_url(call))
    assert (parts.scheme, parts.netloc, parts.fragment) == ("https", "api.example.com", "")
    assert [unquote(segment) for segment in parts.path.split("/")] == ["", "v1", first, f"mid-{second}", "end"]
    assert parse_qsl(parts.query, keep_blank_values=True) == [("k", third), ("l", f"{first}-u1")]


@unhurried
@given(job_text, st.sampled_from(["https://h.example", "https://h.example/", "https://h.example?", "https://u:p", "https://", "http", ""]))
def test_no_job_value_after_a_base_url_changes_the_host(value: str, base: str) -> None:
    try:
        call = rendered("${BASE}{{params.p}}", params={"p": value}, environment={"BASE": base}, checked=False)
    except InvalidInput:
        return
    assert base in ("https://h.example/", "https://h.example?")
    assert urlsplit(sent_url(call)).netloc == "h.example"


# --- headers ---------------------------------------------------------------------------------------------------------


def test_platform_headers_are_set_and_cannot_be_overridden() -> None:
    call = rendered(headers={"x-job-id": "other", "IDEMPOTENCY-KEY": "other", "X-User-ID": "{{params.missing}}", "X-Task-Type": "other"})
    assert {name: call.headers.get(name) for name in PLATFORM} == PLATFORM
    assert len({name.lower() for name in call.headers}) == len(call.headers)


def test_headers_that_frame_the_message_are_not_taken() -> None:
    assert set(rendered(headers={"Transfer-Encoding": "chunked", "content-length": "3", "Connection": "close"}).headers) == {
        *PLATFORM,
        "User-Agent",
    }


def test_user_agent_is_a_default() -> None:
    assert rendered().headers["User-Agent"].startswith("taskplatform/")
    assert rendered(headers={"user-agent": "mine"}).headers["user-agent"] == "mine"


def test_headers_take_values() -> None:
    call = rendered(
        headers={"Authorization": "Bearer ${TOKEN}", "X-P": " {{params.p}} "}, params={"p": " café "}, environment={"TOKEN": "s3cret"}
    )
    assert call.headers["Authorization"] == "Bearer s3cret"
    assert call.headers["X-P"] == "café"
    assert call.secrets == ("s3cret",)


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "a\x7f", "€", "\x0b"])
def test_a_value_that_a_header_cannot_hold_is_refused(value: str) -> None:
    for message in (
        refusal(headers={"X-P": "{{params.p}}"}, params={"p": value}),
        refusal(headers={"X-P": "${P}"}, environment={"P": value}),
        refusal(job_id=value),
    ):
        assert value not in message
    assert "headers.X-P: params.p" in refusal(headers={"X-P": "{{params.p}}"}, params={"p": value})
    assert "headers.X-P: environment variable P" in refusal(headers={"X-P": "${P}"}, environment={"P": value})


@pytest.mark.parametrize("space", ["\xa0", "\x85"])
def test_a_header_cannot_begin_with_a_space_that_is_not_stripped(space: str) -> None:
    assert refusal(headers={"X-P": "{{params.p}}"}, params={"p": f"{space}a"}) == "headers.X-P begins with a space, which a header cannot"
    assert refusal(job_id=f"{space}a") == "X-Job-ID begins with a space, which a header cannot"


@unhurried
@given(job_text)
def test_no_job_value_adds_a_header(value: str) -> None:
    try:
        call = rendered(headers={"X-P": "p={{params.p}}", "X-Q": "{{params.p}}"}, params={"p": value}, environment={"TOKEN": "s3cret"})
    except InvalidInput:
        return
    prepared = requests.Request(call.method, call.url, headers=dict(call.headers)).prepare()
    assert set(prepared.headers) == {*PLATFORM, "User-Agent", "X-P", "X-Q", "Content-Length"}
    assert prepared.headers["X-P"] == f"p={value}".strip(" \t")
    assert not {"\r", "\n", "\0"} & set(call.headers["X-Q"])


# --- body ------------------------------------------------------------------------------------------------------------


def test_json_body_keeps_the_type_of_a_whole_parameter() -> None:
    params = {"n": 5, "list": [1, {"a": None}], "yes": True, "text": 'say "hi"', "none": None, "half": 0.5}
    template = {name: f"{{{{params.{name}}}}}" for name in params} | {
        "mixed": "n={{params.n}} {{params.list}}",
        "who": "{{user}}",
        "fixed": 3,
    }
    call = rendered(body=template, params=params)
    assert call.body is not None
    assert json.loads(call.body) == params | {"mixed": 'n=5 [1,{"a":null}]', "who": "u1", "fixed": 3}
    assert call.headers["Content-Type"] == "application/json"


def test_json_body_takes_the_environment_and_templates_in_keys_and_lists() -> None:
    call = rendered(body={"${K}": ["{{params.p}}", "${V}"]}, params={"p": [1]}, environment={"K": "key", "V": '"quoted"'})
    assert call.body is not None
    assert json.loads(call.body) == {"key": [[1], '"quoted"']}


def test_a_job_value_cannot_replace_another_key() -> None:
    assert "body" in refusal(body={"role": "user", "{{params.p}}": "admin"}, params={"p": "role"})


def test_given_content_type_stays() -> None:
    assert rendered(body=[1], headers={"content-type": "application/vnd.x+json"}).headers["content-type"] == "application/vnd.x+json"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, datetime(2026, 1, 1)])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    assert refusal(body={"p": "{{params.p}}"}, params={"p": value}) == "body cannot be written as JSON"


def test_no_body_and_text_body() -> None:
    assert rendered().body is None
    call = rendered(body="héllo {{params.p}} ${E}", params={"p": "a&b ${E}"}, environment={"E": "env"})
    assert call.body == "héllo a&b ${E} env".encode()
    assert "Content-Type" not in call.headers


def test_text_body_that_is_json_gets_escaped_values() -> None:
    call = rendered(
        body='{"a": "{{params.p}}", "n": {{params.n}}}',
        headers={"Content-Type": "application/json; charset=utf-8"},
        params={"p": 'x", "admin": "1', "n": [1]},
    )
    assert call.body is not None
    assert json.loads(call.body) == {"a": 'x", "admin": "1', "n": [1]}


@unhurried
@given(job_text)
def test_no_job_value_changes_the_structure_of_a_body(value: str) -> None:
    params, environment = {"p": value}, {"TOKEN": "s3cret"}
    call = rendered(body={"a": "{{params.p}}", "b": ["-{{params.p}}-"]}, params=params, environment=environment)
    assert json.loads(call.body or b"") == {"a": value, "b": [f"-{value}-"]}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    call = rendered(body="a={{params.p}}&b=1", headers=form, params=params, environment=environment)
    assert parse_qsl((call.body or b"").decode(), keep_blank_values=True) == [("a", value), ("b", "1")]


# --- what is missing, what is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"endpoint": "${NO_SUCH}/x"}, "endpoint: environment variable NO_SUCH is not set"),
        ({"endpoint": "https://a.example/{{params.no}}"}, "endpoint: params.no is missing"),
        ({"headers": {"Authorization": "Bearer ${NO_SUCH}"}}, "headers.Authorization: environment variable NO_SUCH is not set"),
        ({"headers": {"X-P": "{{params.no}}"}}, "headers.X-P: params.no is missing"),
        ({"body": {"a": [{"b": "{{params.no}}"}]}}, "body.a[0].b: params.no is missing"),
        ({"body": "${NO_SUCH}"}, "body: environment variable NO_SUCH is not set"),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], message: str) -> None:
    assert refusal(**config) == message


def test_repr_shows_no_values() -> None:
    call = rendered(
        "${BASE}/x?key=${KEY}", headers={"A": "${KEY}"}, body={"k": "${KEY}"}, environment={"BASE": "https://a.example", "KEY": "s3cret"}
    )
    assert repr(call) == "Call(method='POST')"
    assert set(call.secrets) == {"https://a.example", "s3cret"}


def test_detail_leaves_out_what_there_is_not() -> None:
    whole = Outcome(OutcomeKind.FAILED, "HTTP 404", 404, 12, "not here", None, False)
    assert whole.detail == {"status": 404, "duration_ms": 12, "excerpt": "not here"}
    assert Outcome(OutcomeKind.RETRY, "connection refused", None, 1, "", None, False).detail == {"duration_ms": 1}


# --- redaction -------------------------------------------------------------------------------------------------------

SECRET = "pa/ss+w&rd=\"ü%~'<"


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        quote(SECRET, safe=""),
        quote(SECRET),
        re.sub("%..", lambda match: match[0].lower(), quote(SECRET, safe="")),
        quote_plus(SECRET),
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        json.dumps(SECRET)[1:-1].replace("/", "\\/"),
        html.escape(SECRET),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
    ],
)
def test_a_secret_is_redacted_in_every_form(form: str) -> None:
    assert redact(f"before {form} after {form}", ("other", SECRET)) == "before *** after ***"


@pytest.mark.parametrize("before", [b"", b"u:", b"us:", b"use:", b"user:"])
@pytest.mark.parametrize("after", [b"", b"!", b"!!"])
def test_a_secret_inside_base64_is_redacted(before: bytes, after: bytes) -> None:
    secret = "correct-horse-battery"
    text = redact(base64.b64encode(before + secret.encode() + after).decode(), (secret,))
    assert "***" in text
    # what is left at the edges holds no whole byte of it
    assert len(text.replace("***", "")) <= len(base64.b64encode(before + after)) + 4


def test_short_values_and_no_values_are_left() -> None:
    assert redact("a 123 text", ("123", "")) == "a 123 text"
    assert redact("text", ()) == "text"


def test_the_longest_secret_goes_first() -> None:
    assert redact("https://a.example/token", ("https://a.example", "https://a.example/token")) == "***"


@unhurried
@given(st.text(st.characters(codec="utf-8"), min_size=4, max_size=30), st.text(max_size=20), st.text(max_size=20))
def test_no_secret_is_left_by_redaction(secret: str, before: str, after: str) -> None:
    for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], base64.b64encode(secret.encode()).decode()):
        text = redact(f"{before}{form}{after}", (secret,))
        assert "***" in text
        assert form not in text.replace("***", "\0") or "*" in form


@unhurried
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=4, max_size=12), min_size=1, max_size=5), st.text(max_size=20))
def test_a_line_is_looked_at_wherever_a_secret_may_be_in_it(secrets: list[str], around: str) -> None:
    """What is asked first misses no form of any of them, also where one is a part of another."""
    for secret in secrets:
        for form in (secret, quote(secret), html.escape(secret), base64.b64encode(b"u:" + secret.encode() + b"!").decode()):
            assert redact(f"{around}{form}{around}", tuple(secrets)) != f"{around}{form}{around}"


# --- Retry-After, classification -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("86400", 86400),
        ("86401", 86400),
        ("9" * 5000, 86400),
        ("Sun, 01 Mar 2026 12:05:00 GMT", 300),
        ("Sunday, 01-Mar-26 12:05:00 GMT", 300),
        ("Sun Mar  1 12:05:00 2026", 300),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("Mon, 01 Mar 2027 12:00:00 GMT", 86400),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("1e3", None),
        ("٣", None),
        ("Sun, 99 Mar 2026 12:05:00 GMT", None),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        ("3, 5", None),
    ],
)
def test_retry_after(value: str | None, seconds: int | None) -> None:
    assert parse_retry_after(value, now=NOW, longest=LONGEST) == (None if seconds is None else timedelta(seconds=seconds))


@unhurried
@given(st.text(max_size=40))
def test_any_retry_after_is_bounded(value: str) -> None:
    wait = parse_retry_after(value, now=NOW, longest=LONGEST)
    assert wait is None or timedelta() <= wait <= LONGEST


def test_classification() -> None:
    completed = set(range(200, 300))
    retry = {408, 425, 429, *range(500, 600)}
    for status in range(100, 1000):
        expected = OutcomeKind.COMPLETED if status in completed else OutcomeKind.RETRY if status in retry else OutcomeKind.FAILED
        assert classify(status) is expected, status
