"""The Pi's web page, as a response.

    >>> page = Page(b"<style>p {}</style><script>f()</script>")
    >>> page.respond({"if-none-match": page.etag})[0]
    304

Pure: no file, no socket, no clock. Standard library only.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import zlib
from collections.abc import Mapping

from cerebrum_common import Headers

SCRIPT, STYLE = (re.compile(rb"<%b>(.*?)</%b>" % (tag, tag), re.S) for tag in (b"script", b"style"))
GZIP_WINDOW = 31  # zlib's code for a window of 32 KiB and a gzip header


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding allows gzip (RFC 9110 section 12.5.3).

    >>> accepts_gzip("gzip, deflate, br"), accepts_gzip("*;q=0.5"), accepts_gzip("gzip;q=0, *"), accepts_gzip("")
    (True, True, False, False)
    """
    codings = (coding.partition(";q=") for coding in header.lower().replace(" ", "").split(","))
    weights = {name: weight or "1" for name, _, weight in codings}
    return bool(weights.get("gzip", weights.get("*", "0")).strip("0."))


def sources(inline: re.Pattern[bytes], text: bytes) -> str:
    """The sources of one kind that a Content-Security-Policy allows: the page's own, by their hashes."""
    digests = (hashlib.sha256(one).digest() for one in inline.findall(text))
    return " ".join(f"'sha256-{binascii.b2a_base64(digest, newline=False).decode()}'" for digest in digests) or "'none'"


class Page:
    """An HTML file in one compressed copy, and the headers that confine it to its own script, style and server."""

    def __init__(self, text: bytes) -> None:
        text = text.replace(b"\r\n", b"\n")  # as browsers read it before they hash
        compressor = zlib.compressobj(9, zlib.DEFLATED, GZIP_WINDOW)
        self._compressed = compressor.compress(text) + compressor.flush()
        self.etag = f'W/"{hashlib.sha256(text).hexdigest()[:32]}"'  # weak: the same for compressed and plain text
        policy = (
            f"default-src 'none'; script-src {sources(SCRIPT, text)}; style-src {sources(STYLE, text)}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'"
        )
        self._headers: Headers = (
            ("ETag", self.etag),
            ("Cache-Control", "no-cache"),  # may be kept, but must be revalidated each time
            ("Vary", "Accept-Encoding"),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        )

    def respond(self, headers: Mapping[str, str]) -> tuple[int, bytes, Headers]:
        """(status, body, headers) for a request with these headers, whose names are in lower case."""
        if known := headers.get("if-none-match"):
            opaque = self.etag.removeprefix("W/")  # RFC 9110 section 13.1.2: compared weakly
            if known.strip() == "*" or opaque in (tag.strip().removeprefix("W/") for tag in known.split(",")):
                return 304, b"", self._headers
        if accepts_gzip(headers.get("accept-encoding", "")):
            return 200, self._compressed, (*self._headers, ("Content-Encoding", "gzip"))
        return 200, zlib.decompress(self._compressed, GZIP_WINDOW), self._headers
