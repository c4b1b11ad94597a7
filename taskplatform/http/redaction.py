"""Keeps what came from the environment out of what people read."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from urllib.parse import quote, quote_plus, unquote

from taskplatform.model import HttpConfig
from taskplatform.signing import key_forms

MIN_SECRET_LENGTH = 4
"""A shorter value from the environment is not redacted: it would be found everywhere, and it protects nothing."""

MIN_PROCESS_SECRET_LENGTH = 8
"""The same for what is redacted in all that a process says, and not in the records of one call alone."""

_RESERVED = "!#$%&'()*+,/:;=?@[]~"
"""What `requests` leaves as it is in a URL."""


def redact(text: str, secrets: tuple[str, ...]) -> str:
    """Put `***` for each secret, also where it is percent-encoded, escaped for JSON or HTML, or inside base64.

    Every line of a log passes here, and nearly none holds a secret: that is found out in about 0.2 µs for each secret.
    """
    traces, pattern = _finder(secrets)
    for trace in traces:
        if trace in text:
            return pattern.sub("***", text)
    return text


def secrets_in(configs: Iterable[HttpConfig], environment: Mapping[str, str]) -> Iterator[str]:
    """What these calls take from the environment and nobody is to read. Of a URL that is user info and query, else the whole value;
    of a secret that signs, the key too.

    What is too short to be a secret is left out: it would be found in much that is none.
    """
    configs = tuple(configs)
    signing = {name for config in configs for name in config.secret_names}
    for name in sorted(frozenset().union(*(config.environment_names for config in configs))):
        value = environment.get(name, "")
        if "://" not in value:
            found = [value]
        else:
            userinfo, at, _ = value.partition("://")[2].partition("/")[0].rpartition("@")
            found = [unquote(userinfo), unquote(userinfo.partition(":")[2])] if at else []
            found += [unquote(one) for one in value.partition("?")[2].partition("#")[0].split("&")]
            found += [one.partition("=")[2] for one in found if "=" in one]
        if name in signing:
            with suppress(ValueError):  # what cannot sign is told where it would
                found += key_forms(value)
        yield from (one for one in found if len(one) >= MIN_PROCESS_SECRET_LENGTH)


def without_begun_secret(text: str, secrets: tuple[str, ...]) -> str:
    """Where the text was cut off, the first part of a secret may be left."""
    begun = (size for form in _forms(secrets) for size in range(len(form) - 1, MIN_SECRET_LENGTH - 1, -1) if text.endswith(form[:size]))
    size = max(begun, default=0)
    return f"{text[:-size]}***" if size else text


def holds_secret(text: str, secrets: tuple[str, ...]) -> bool:
    """Whether one of the secrets is in the text, in any of its forms."""
    return any(form in text for form in _forms(secrets))


@lru_cache(maxsize=1000)
def _finder(secrets: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """What finds the secrets, however they are written, and first, a few pieces of text of which each of these forms has one.

    Kept, because all calls of a definition have the same.
    """
    forms = _forms(secrets)
    traces: list[str] = []
    for form in reversed(forms):
        if not any(trace in form for trace in traces):
            # letters and digits are the same in most forms
            piece = max(re.findall("[A-Za-z0-9]+", form), key=len, default="")
            traces.append(piece if len(piece) >= MIN_SECRET_LENGTH else form)
    return tuple(traces), re.compile("|".join(map(re.escape, forms)))


@lru_cache(maxsize=1000)
def _forms(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Every way in which the secrets may be written, the longest first, so that none is left with a visible rest."""
    forms: set[str] = set()
    for secret in secrets:
        if len(secret) >= MIN_SECRET_LENGTH:
            plain = secret.encode("utf-8", "replace")
            encoded = {quote(plain, safe=""), quote(plain, safe="/"), quote(plain, safe=_RESERVED), quote_plus(plain)}
            escaped = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
            forms |= {secret, html.escape(secret), html.escape(secret, quote=False), *encoded, *escaped, *_base64_forms(plain)}
            forms |= {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), text) for text in encoded}
            forms |= {text.replace("/", "\\/") for text in escaped}
    return tuple(sorted((form for form in forms if len(form) >= MIN_SECRET_LENGTH), key=lambda form: (-len(form), form)))


def _base64_forms(plain: bytes) -> Iterator[str]:
    """Base64 of the secret alone, and what is the same of it wherever it begins in a longer text, as in `user:secret`."""
    yield base64.b64encode(plain).decode()
    yield base64.urlsafe_b64encode(plain).decode()
    for shift, first in ((0, 0), (1, 2), (2, 3)):
        last = (shift + len(plain)) * 8 // 6
        yield base64.b64encode(b"\0" * shift + plain)[first:last].decode()
        yield base64.urlsafe_b64encode(b"\0" * shift + plain)[first:last].decode()
