"""The cost of parsing in µs: a typical request head (target: ≤ 40), its chunked body, its JSON. One JSON line."""

from __future__ import annotations

import json
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cerebrum.fields import parse_json
from cerebrum.http import BodyDecoder, parse_request, scan_request

HEAD = (
    b"POST /v1/complete/stream HTTP/1.1\r\n"
    b"Host: 192.168.1.20:7000\r\n"
    b"User-Agent: python-httpx/0.28.1\r\n"
    b"Accept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\n"
    b"Content-Type: application/json\r\n"
    b"X-Request-ID: 65652caa-c647-4685-be81-5e51bc97f453\r\n"
    b"X-API-Key: 3f2b7c9d0a1e4f5b8c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b3c4d5e6f7a8b\r\n"
    b"Content-Length: 118\r\n"
    b"\r\n"
)
FIELDS = {"prompt": "def fibonacci(n):\n", "language": "python", "max_tokens": 256, "temperature": 0.4}
BODY = json.dumps(FIELDS).encode()
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def microseconds(call: Callable[[], object], number: int = 5000, repeats: int = 9) -> float:
    """CPU time of one call in µs, the best of several runs: a slower run was disturbed by other work."""
    return round(min(timeit.repeat(call, timer=time.process_time, number=number, repeat=repeats)) / number * 1e6, 2)


if __name__ == "__main__":
    result = {
        "bench": "parse",
        "head_us": microseconds(lambda: parse_request(HEAD[: scan_request(HEAD)])),
        "head_bytes": len(HEAD),
        "chunked_us": microseconds(lambda: BodyDecoder(None, True).feed(CHUNKS)),
        "json_us": microseconds(lambda: parse_json(BODY)),
    }
    print(json.dumps(result))
