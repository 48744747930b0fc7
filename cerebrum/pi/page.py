"""The Pi's web page, as a response with the headers that confine it to its own script, style and
server.

Pure: no file, no socket, no clock. Standard library only.
"""

from __future__ import annotations

import binascii
import hashlib
import re

from cerebrum_common import Response


def sources(tag: bytes, text: bytes) -> str:
    """The sources of one kind that a Content-Security-Policy allows: the page's own, by their
    hashes.
    """
    inline = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.S)
    digests = (hashlib.sha256(one).digest() for one in inline)
    return (
        " ".join(
            f"'sha256-{binascii.b2a_base64(digest, newline=False).decode()}'" for digest in digests
        )
        or "'none'"
    )


def page_of(text: bytes) -> Response:
    """The response with this HTML."""
    text = text.replace(b"\r\n", b"\n")  # as browsers read it before they hash
    policy = (
        f"default-src 'none'; script-src {sources(b'script', text)}; style-src {sources(b'style', text)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    headers = (
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    )
    return Response(text, headers=headers, kind="text/html; charset=utf-8")
