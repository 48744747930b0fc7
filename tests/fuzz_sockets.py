"""A mutation fuzzer over real sockets: `python tests/fuzz_sockets.py [count] [seed]`, half of it against each daemon.

Starts cm4d, with vpsd as its VPS, and vpsd, without a model, so that no generation runs. Good requests are cut,
spliced, repeated and salted, and sent in random pieces, by several connections at a time. A finding is a daemon
that dies, hangs, answers something that is no HTTP, an answer of 5xx other than 501, 503 and 505, anything on stderr
or an ERROR in its log, a /health that does not answer, or memory that grows. Prints one JSON line; exit status 1
if there was a finding. The same seed sends the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from harness import HEALTH, KEY, Daemon, ask, daemon, read_reply

CONNECTIONS = 16  # at a time
HANG_SECONDS = 15.0  # longer than a daemon's own deadline for a head
GROWTH_KB = 12_000  # over the whole run, after a warm-up
GOOD_STATUSES = {200, 204, 400, 401, 403, 404, 405, 408, 409, 411, 413, 414, 415, 417, 421, 429, 431, 501, 503, 505}

BODY = b'{"prompt": "x", "language": "python", "model": "qwen_0_5b", "max_tokens": 4}'
COMMON = b"Host: localhost\r\nX-API-Key: " + KEY.encode() + b"\r\n"
POST = b"HTTP/1.1\r\n" + COMMON + b"Content-Type: application/json\r\n"
SIZED = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nA: b\r\n\r\n"
PATHS = {"cm4d": b"/v1/complete", "vpsd": b"/v1/inference"}
SALT = [
    *(bytes([byte]) for byte in b"\0\1\t\n\x0b\r\x1b #%+-/:;_\x7f\x80\x85\xa0\xb2\xff"),
    b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\n ", b"  ", b"%00",
    b"%2e%2e/", b"//", b"0x", b"-0", b", 5", b";a=b", b"\xef\xbb\xbf",
    b"chunked", b"gzip", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"HTTP/1.0", b"HTTP/2.0", b"HEAD", b"OPTIONS", b"CONNECT",
    b"Host: evil.example\r\n", b"Origin: null\r\n", b"X-Request-ID: a\r\n", b"NaN", b"1e999", b"[" * 100, b"9" * 30,
    b"f" * 17, b"A: b\r\n" * 99, b"a" * 9000, b"\\ud800", b"null", b'""',
]  # fmt: skip


def seeds(name: str) -> list[bytes]:
    path = PATHS[name]
    return [
        HEALTH,
        b"GET /v1/models HTTP/1.1\r\n" + COMMON + b"\r\n",
        b"HEAD /v1/stats HTTP/1.1\r\n" + COMMON + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + COMMON + b"\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"POST " + path + b" " + POST + SIZED,
        b"POST " + path + b"/stream " + POST + SIZED,
        b"POST " + path + b" " + POST + CHUNKED,
        b"POST " + path + b"/stream " + POST + b"Expect: 100-continue\r\n" + SIZED,
        b"POST " + path + b" " + POST + SIZED + HEALTH + b"POST " + path + b" " + POST + CHUNKED,
        b"POST /v1/unload/qwen_0_5b HTTP/1.1\r\n" + COMMON + b"\r\n",
        b"POST /v1/cleanup HTTP/1.1\r\n" + COMMON + b"\r\n",
    ]


def mutate(random_: random.Random, pool: list[bytes]) -> bytes:
    data = random_.choice(pool)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 2, 3, 5, 8))):
        at = random_.randrange(len(data) + 1)
        to = min(len(data), at + random_.choice((0, 1, 1, 2, 5, 20, 100)))
        match random_.randrange(7):
            case 0:  # cut
                data = data[:at] + data[to:]
            case 1:  # salt
                data = data[:at] + random_.choice(SALT) + data[at:]
            case 2:  # overwrite
                data = data[:at] + random_.choice(SALT) + data[to:]
            case 3:  # flip a bit
                data = (
                    data[:at] + bytes(byte ^ 1 << random_.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]
                )
            case 4:  # repeat
                data = data[:to] + data[at:to] * random_.choice((1, 2, 50)) + data[to:]
            case 5:  # splice
                other = random_.choice(pool)
                data = data[:at] + other[random_.randrange(len(other) + 1) :]
            case 6:  # noise
                data = data[:at] + random_.randbytes(random_.randrange(1, 30)) + data[to:]
    return data[:200_000]


@dataclass
class Run:
    """The findings and figures for one daemon."""

    daemon: Daemon
    tried: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)

    def found(self, what: str, data: bytes) -> None:
        self.findings.append(f"{self.daemon.name}: {what}: {data[:300]!r}")

    async def send(self, data: bytes, cuts: list[int], turns: int, leave: bool) -> None:
        """Send one input in pieces. After some turns of the loop send the end of file, which cancels what still runs,
        and read every answer until the other side closes."""
        self.tried += 1
        try:
            async with asyncio.timeout(HANG_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.daemon.port, limit=1 << 20)
                try:
                    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
                        writer.write(data[start:stop])
                        await asyncio.sleep(0)
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    if not leave:
                        writer.write_eof()
                        await self.read_all(reader, data)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            self.found("hang", data)
        except ConnectionError:
            pass  # a reset is an answer too, as long as the daemon lives
        except (AssertionError, ValueError) as error:
            self.found(f"no HTTP ({error})", data)

    async def read_all(self, reader: asyncio.StreamReader, data: bytes) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                # Only the daemon knows what the mutation left of a HEAD request, so bodies are not counted then.
                reply = await read_reply(reader, "HEAD" if b"HEAD" in data else "GET")
                self.statuses[reply.status] += 1
                if reply.status not in GOOD_STATUSES:
                    self.found(f"status {reply.status}", data)
                if b"HEAD" in data:
                    await reader.read()
                    return

    async def health(self) -> None:
        started = time.perf_counter()
        try:
            reply = await ask(self.daemon.port, HEALTH)
        except (OSError, asyncio.IncompleteReadError, AssertionError) as error:
            return self.found(f"health does not answer ({error!r})", b"")
        self.health_ms.append(1000 * (time.perf_counter() - started))
        if "timestamp" not in reply.json or reply.status not in (200, 503):
            self.found(f"health says {reply.body!r}", b"")
        return None


async def fuzz(run: Run, count: int, seed: int) -> None:
    random_ = random.Random(f"{run.daemon.name} {seed}")
    pool = seeds(run.daemon.name)
    inputs = iter(range(count))

    async def worker() -> None:
        for number in inputs:
            data = mutate(random_, pool)
            cuts = sorted(random_.randrange(len(data) + 1) for _ in range(random_.choice((0, 0, 1, 3, 20))))
            await run.send(data, cuts, random_.choice((0, 5, 50)), leave=random_.random() < 0.05)
            if number % 500 == 499:
                await run.health()

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    await run.health()


def attack(run: Run, count: int, seed: int) -> dict[str, object]:
    started = time.perf_counter()
    warm_up = min(count // 4, 5000)
    asyncio.run(fuzz(run, warm_up, seed))
    before = run.daemon.rss_kb()
    asyncio.run(fuzz(run, count - warm_up, seed + 1))
    grown = run.daemon.rss_kb() - before
    if grown > GROWTH_KB:
        run.found(f"memory grew by {grown} KB", b"")
    if run.daemon.process.poll() is not None:
        run.found("died", b"")
    if complaints := run.daemon.complaints():
        run.found(f"complained: {complaints[:2000]}", b"")
    return {
        "daemon": run.daemon.name,
        "inputs": run.tried,
        "answers": dict(sorted(run.statuses.items())),
        "health_ms_max": round(max(run.health_ms, default=0), 1),
        "rss_grown_kb": grown,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(count: int, seed: int) -> tuple[list[dict[str, object]], list[str]]:
    """Results and findings of `count` inputs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        vps = stack.enter_context(daemon("vpsd", Path(folder) / "vpsd"))
        pi = stack.enter_context(daemon("cm4d", Path(folder) / "cm4d", CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}"))
        pi.wait_for_line("VPS backend is available")
        runs = [Run(pi), Run(vps)]
        results = [attack(run, count // 2, seed) for run in runs]
        return results, [finding for run in runs for finding in run.findings]


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    results, findings = main(*(numbers + [100_000, 1][len(numbers) :]))
    for finding in findings[:20]:
        print(finding, file=sys.stderr)
    inputs = sum(int(str(one["inputs"])) for one in results)
    print(json.dumps({"inputs": inputs, "findings": len(findings), "daemons": results}))
    sys.exit(bool(findings))
