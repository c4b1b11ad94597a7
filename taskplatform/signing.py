"""Signatures of calls as Standard Webhooks 1.0.0 asks: `v1`, HMAC-SHA256 over id, timestamp and raw body.

A secret is the base64 of a key of 24 to 64 bytes, with or without `whsec_` before it. Other text is refused, although it could be a key:
the libraries that verify take any text for base64, so some of it would never verify.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterator, Sequence

SIGNATURE_HEADERS = frozenset({"webhook-id", "webhook-timestamp", "webhook-signature"})
SECRET_RULE = "whsec_ and the base64 of 24 to 64 bytes"

_PREFIX = "whsec_"
_ASYMMETRIC = ("whsk_", "whpk_")
_KEY_BYTES = range(24, 65)


def signing_key(secret: str) -> bytes:
    """The key that a secret stands for. Raises ValueError, which does not quote it."""
    if secret.startswith(_ASYMMETRIC):
        raise ValueError(f"is an asymmetric key, which calls are not signed with; it takes {SECRET_RULE}")
    try:
        key = _decoded(secret.removeprefix(_PREFIX))
    except binascii.Error:
        raise ValueError(f"is not a secret that calls can be signed with: it takes {SECRET_RULE}") from None
    if len(key) not in _KEY_BYTES:
        raise ValueError(f"is a secret of {len(key)} bytes; it takes {SECRET_RULE}")
    return key


def _decoded(text: str) -> bytes:
    if not text.isascii():
        raise binascii.Error
    # the padding is often left out
    return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)


def key_forms(secret: str) -> Iterator[str]:
    """How the key of a secret may be written beside the secret itself, for what must not show it."""
    key = signing_key(secret)
    yield secret.removeprefix(_PREFIX)
    yield from (encode(key).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode))
    yield key.hex()
    yield key.hex().upper()
    yield key.decode("utf-8", "replace").replace("\0", "")


def signed(message_id: str, *, timestamp: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """The headers that sign a call: with a signature for each key, so that a receiver may know the old one or the new one.

    `timestamp` is the second of this attempt. In the id that is sent, the dots of `message_id` are written `%2E`: the parts of what
    is signed are divided by dots, so with one in the id the same signature would fit another message.
    """
    id_ = message_id.replace("%", "%25").replace(".", "%2E")
    content = f"{id_}.{timestamp}.".encode() + body
    signatures = (base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode() for key in keys)
    return {"webhook-id": id_, "webhook-timestamp": str(timestamp), "webhook-signature": " ".join(f"v1,{one}" for one in signatures)}
