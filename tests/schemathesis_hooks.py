"""What schemathesis leaves out in tests/pi/test_openapi.py."""

from __future__ import annotations

from typing import Any

import schemathesis

from cerebrum.fields import MAX_INTEGER_DIGITS

FRAMING = {"transfer-encoding", "content-length", "expect"}


@schemathesis.hook
def filter_headers(context: Any, headers: Any) -> bool:
    """Headers that delimit the message: another Transfer-Encoding than chunked gets 501, as RFC
    9112 wants it.
    """
    names = {name.lower() for name in headers or ()}
    return names.isdisjoint(FRAMING)


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """JSON Schema takes 1.0 for an integer, and knows no largest one. Our integers have at most 20
    digits.
    """
    if isinstance(body, dict):
        body = list(body.values())
    if isinstance(body, list):
        return all(filter_body(context, value) for value in body)
    if isinstance(body, float) and body.is_integer():
        return False
    return not isinstance(body, int) or len(str(body)) <= MAX_INTEGER_DIGITS
