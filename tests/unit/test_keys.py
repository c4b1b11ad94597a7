"""Tokens: what is one, and that nothing else is taken for one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskplatform.errors import InvalidInput
from taskplatform.keys import TOKEN, ApiKey, KeyRefused, Scope, check_name, check_scopes, digest, new_token, read_token

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_token_names_its_key() -> None:
    key_id, token = new_token()
    assert read_token(token) == key_id
    assert token.startswith(f"tpk_{key_id}_")
    assert len(token) == 66
    assert len(ALPHABET) ** 43 > 2**256


def test_no_two_tokens_are_the_same_and_all_characters_come() -> None:
    tokens = [new_token()[1] for _ in range(200)]
    assert len({token[17:60] for token in tokens}) == 200
    assert set("".join(token[17:60] for token in tokens)) == set(ALPHABET)


def test_a_scanner_finds_a_token_in_source_code() -> None:
    _, token = new_token()
    assert re.findall(TOKEN.pattern, f'headers = {{"Authorization": "Bearer {token}"}}') == [token[4:16]]


@given(st.integers(0, 65), st.characters(codec="utf-8"))
def test_a_token_with_another_character_is_refused(place: int, character: str) -> None:
    _, token = new_token()
    changed = token[:place] + character + token[place + 1 :]
    if changed != token:
        with pytest.raises(KeyRefused):
            read_token(changed)


@given(st.text() | st.from_regex(TOKEN, fullmatch=True) | st.text().map(lambda text: f"tpk_{text}"))
def test_no_text_is_more_than_refused_and_none_is_quoted(text: str) -> None:
    with pytest.raises(KeyRefused) as caught:
        read_token(text)
    assert str(caught.value) == "not a token"


@given(st.text(st.characters()))
def test_every_text_has_a_digest(text: str) -> None:
    """Also one with halves of surrogates."""
    assert re.fullmatch(r"[0-9a-f]{64}", digest(text))


def test_scopes() -> None:
    assert check_scopes(["submit", "read", "read"]) == (Scope.READ, Scope.SUBMIT)
    for scopes, said in (([], "at least one scope"), (["read", "write"], "scope 'write' is not accepted: scopes are read, submit, admin")):
        with pytest.raises(InvalidInput, match=said):
            check_scopes(scopes)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ((Scope.READ,), {Scope.READ}),
        ((Scope.SUBMIT,), {Scope.SUBMIT}),
        ((Scope.READ, Scope.SUBMIT), {Scope.READ, Scope.SUBMIT}),
        ((Scope.ADMIN,), set(Scope)),
    ],
)
def test_what_a_key_may_do(scopes: tuple[Scope, ...], allowed: set[Scope]) -> None:
    key = ApiKey("0" * 12, "ci", scopes, 0, "test")
    assert {scope for scope in Scope if key.allows(scope)} == allowed


@pytest.mark.parametrize("name", ["", "bootstrap", "a b", "ä", "x" * 65, "0123456789ab", "-x", "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidInput, match="is not accepted"):
        check_name(name)
