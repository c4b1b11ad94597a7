"""Signatures, held against the public library that receivers verify with."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from taskplatform.catalogue import check
from taskplatform.errors import InvalidInput
from taskplatform.http import Call, redact, render
from taskplatform.model import HttpConfig
from taskplatform.signing import key_forms, signed, signing_key

unhurried = settings(deadline=None)  # a busy machine is no fault
KEY = bytes(range(100, 132))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
#: Without what usually stands before it.
OLD = base64.b64encode(b"an-old-key-of-many-bytes-more").decode()
NAMES = ("webhook-id", "webhook-timestamp", "webhook-signature")


def call(
    *, job_id: str = "report:u1:1800000000000", now: float | None = None, environment: dict[str, str] | None = None, **config: Any
) -> Call:
    fields = {"endpoint": "https://api.example.com/hook", "sign": "${HOOK}", **config}
    variables = {"HOOK": SECRET, "OLD": OLD} if environment is None else environment
    return render(
        HttpConfig.model_validate(fields), job_id=job_id, user="u1", definition="report", params={}, environment=variables, now=now
    )


def signature_headers(sent: Call) -> dict[str, str]:
    return {name: value for name, value in sent.headers.items() if name.lower() in NAMES}


def verify(sent: Call, secret: str | bytes = SECRET) -> None:
    """As a receiver does it. Raises WebhookVerificationError."""
    Webhook(secret).verify(sent.body or b"", dict(sent.headers), json_parse=False)


@pytest.mark.parametrize("body", [None, {"a": 1.5, "b": "größe"}, "plain text", "", [1, 2]])
def test_the_public_library_verifies_what_is_sent(body: Any) -> None:
    sent = call(body=body)
    verify(sent)
    assert signature_headers(sent).keys() == set(NAMES)
    assert abs(int(sent.headers["webhook-timestamp"]) - time.time()) < 60


def test_the_vector_of_the_standard() -> None:
    """Its own example: id, time, body and secret with the signature that it gives for them."""
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", timestamp=1614265330, body=b'{"test": 2432232314}', keys=[key])
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_nothing_of_it_can_be_changed() -> None:
    sent = call(body={"a": 1})
    headers = dict(sent.headers)
    for body, changed in (
        (b'{"a":2}', {}),
        (sent.body, {"webhook-id": "other"}),
        (sent.body, {"webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}),
        (sent.body, {"webhook-signature": "v1," + base64.b64encode(bytes(32)).decode()}),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body or b"", {**headers, **changed}, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        verify(sent, "whsec_" + base64.b64encode(bytes(32)).decode())


def test_each_attempt_has_its_time_and_all_have_one_id() -> None:
    first, second = call(now=1_700_000_000.9), call(now=1_700_000_060.0)
    assert [sent.headers["webhook-timestamp"] for sent in (first, second)] == ["1700000000", "1700000060"]
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == "report:u1:1800000000000"
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]


def test_while_a_secret_is_replaced_either_verifies() -> None:
    sent = call(sign=["${HOOK}", "${OLD}"], body={"a": 1})
    assert [part[:3] for part in sent.headers["webhook-signature"].split(" ")] == ["v1,", "v1,"]
    verify(sent, SECRET)
    verify(sent, OLD)


def test_dots_of_the_id_cannot_move_the_borders() -> None:
    """A user may be called `a.1700000000.`; the id that is signed holds no dot, and no two jobs get the same one."""
    one, other = call(job_id="report:a.b:1"), call(job_id="report:a%2Eb:1")
    assert (one.headers["webhook-id"], one.headers["X-Job-ID"]) == ("report:a%2Eb:1", "report:a.b:1")
    assert other.headers["webhook-id"] == "report:a%252Eb:1"
    verify(one)


def test_without_sign_nothing_is_signed() -> None:
    assert signature_headers(call(sign=[])) == {}


@pytest.mark.parametrize("name", ["webhook-id", "Webhook-Signature", "WEBHOOK-TIMESTAMP"])
def test_a_header_of_the_same_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is set by sign"):
        HttpConfig.model_validate({"endpoint": "https://a.example", "headers": {name: "own"}, "sign": "${HOOK}"})
    assert name in HttpConfig.model_validate({"endpoint": "https://a.example", "headers": {name: "own"}}).headers


@pytest.mark.parametrize(
    "sign", [SECRET, ["${HOOK}", OLD], "${HOOK}${OLD}", "x${HOOK}", "${}", "{{params.secret}}", 7, [["${A}"]], ["${A}"] * 6]
)
def test_a_secret_comes_only_from_the_environment(sign: Any) -> None:
    with pytest.raises(ValueError, match="sign") as raised:
        HttpConfig.model_validate({"endpoint": "https://a.example", "sign": sign})
    assert SECRET[6:20] not in str(raised.value.errors(include_input=False))  # type: ignore[attr-defined]


BAD_SECRETS = {
    "": "is a secret of 0 bytes",
    base64.b64encode(b"x" * 23).decode(): "is a secret of 23 bytes",
    "a passphrase that is no base64": "is not a secret",
    "whsec_": "is a secret of 0 bytes",
    "whsec_" + base64.b64encode(b"short-one").decode(): "is a secret of 9 bytes",
    "whsec_" + base64.b64encode(b"x" * 65).decode(): "is a secret of 65 bytes",
    "whsec_not*base64*at*all*not*base64*at*all": "is not a secret",
    "whsec_größegrößegrößegrößegrößegröße": "is not a secret",
    "whsec_" + "A" * 41: "is not a secret",
    "whsk_" + base64.b64encode(KEY).decode(): "is an asymmetric key",
    "half-a-pair-\ud800-that-is-no-text-at-all": "is not a secret",
}


@pytest.mark.parametrize(("secret", "problem"), BAD_SECRETS.items())
def test_a_bad_secret_is_named_and_not_shown(secret: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^sign: environment variable HOOK is ") as raised:
        call(environment={"HOOK": secret})
    assert problem in str(raised.value)
    (tmp_path / "hooks.yaml").write_text(
        "tasks:\n  - {id: a, name: a, interval: {type: daily}, config: {endpoint: 'https://a.example', sign: '${HOOK}'}}\n"
        "  - {id: b, name: b, interval: {type: daily}, config: {endpoint: 'https://a.example', sign: ['${HOOK}']}}\n"
    )
    (fault,) = check([tmp_path], environment={"HOOK": secret})[1]
    assert (fault.line, fault.field) == (2, "a.config.sign")
    assert fault.message.startswith(f"${{HOOK}} {problem}")
    for message in (str(raised.value), str(fault)):
        assert len(secret) < 10 or secret.removeprefix("whsec_")[:10] not in message


def test_a_secret_that_is_pasted_into_a_definition_is_not_quoted(tmp_path: Path) -> None:
    for sign in (SECRET, [SECRET], {"secret": SECRET}):
        config = json.dumps({"endpoint": "https://a.example", "sign": sign})
        (tmp_path / "hooks.yaml").write_text(f"tasks:\n  - {{id: a, name: a, interval: {{type: daily}}, config: {config}}}\n")
        faults = check([tmp_path], environment={})[1]
        assert faults
        assert SECRET[6:20] not in "\n".join(map(str, faults))


@pytest.mark.parametrize("secret", ["whsec_" + base64.b64encode(KEY).decode().rstrip("="), SECRET])
def test_padding_may_be_left_out(secret: str) -> None:
    assert signing_key(secret) == KEY


@unhurried
@given(st.binary(min_size=24, max_size=64))
def test_any_key_signs_as_the_library_does(key: bytes) -> None:
    secret = "whsec_" + base64.b64encode(key).decode()
    verify(call(environment={"HOOK": secret}, body={"a": 1}), secret)


@unhurried
@given(st.text(st.characters(codec="utf-8"), max_size=70))
def test_any_text_is_a_secret_or_is_refused(text: str) -> None:
    try:
        key = signing_key(text)
    except ValueError as fault:
        assert str(fault).startswith("is ")  # noqa: PT017
        return
    assert 24 <= len(key) <= 64


def test_no_form_of_the_key_is_shown() -> None:
    key = os.urandom(12).hex().encode() + b"-\0-plain"
    secret = "whsec_" + base64.b64encode(key).decode()
    secrets = call(environment={"HOOK": secret}).secrets
    text = key.decode().replace("\0", "")
    for form in (secret, secret[6:], key.hex(), key.hex().upper(), text, base64.urlsafe_b64encode(key).decode(), json.dumps(text)):
        assert "***" in redact(f"the key is {form}.", secrets)
        assert form[1:-1] not in redact(f"the key is {form}.", secrets)
    assert set(key_forms(secret)) <= set(secrets)
