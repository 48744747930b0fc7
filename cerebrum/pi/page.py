"""The Pi's web page, as a response with the headers that confine it to its own script, style and
server.

Pure: no file, no socket, no clock. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import re

from cerebrum_common import Response

POLICY = (
    "default-src 'none'; script-src %s; style-src %s; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


def sources(tag: bytes, text: bytes) -> str:
    """The sources of one kind that a Content-Security-Policy allows: the page's own, by their
    hashes.
    """
    allowed = []
    for inline in re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.S):
        digest = base64.b64encode(hashlib.sha256(inline).digest())
        allowed.append(f"'sha256-{digest.decode()}'")
    return " ".join(allowed) or "'none'"


def page_of(text: bytes) -> Response:
    """The response with this HTML."""
    text = text.replace(b"\r\n", b"\n")  # as browsers read it before they hash
    policy = POLICY % (sources(b"script", text), sources(b"style", text))
    headers = (("Content-Security-Policy", policy), *HEADERS)
    return Response(text, headers=headers, kind="text/html; charset=utf-8")
