"""Independent clients and proxies against a server in this process, each with the exact outcome.

curl, httpx, aiohttp, node's fetch and wrk as clients, nginx and haproxy in front, slowhttptest as the enemy.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from harness import HEALTH, KEY, PATIENCE, ask, daemon, post, wait_until
from scripted import in_a_thread
from test_wire import ROUTES, State

from cerebrum.fields import parse_json
from cerebrum.http import Access, Server, own_names
from cerebrum_common import Request, Response, Route, sse_event

HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}
MEMBERS = {"prompt": "x", "language": "python"}
CHUNKED_ECHO = {"bytes": 7, "length": None, "members": {"a": 1}}  # of {"a":1}


def needs(tool: str) -> str:
    found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{tool} is not installed")
    return found


@dataclass
class Peer:
    """The server in a thread, and what its handlers have seen."""

    port: int = 0
    left: threading.Event = field(default_factory=threading.Event)
    complaints: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Peer:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.complaints.append(context))
        more = Route("POST", "/v1/tokens", self.tokens, json=True), Route("POST", "/v1/echo", echo, json=True)
        self.server = Server(State(), (*ROUTES, *more), Access((KEY,), own_names()))
        self.port = await self.server.start("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(1.0)

    async def tokens(self, state: Any, request: Request) -> Response:
        """`max_tokens` token events, or an endless stream of them for 0."""

        async def events() -> Any:
            count = parse_json(request.body).get("max_tokens", 3)
            try:
                number = 0
                while not count or number < count:
                    number += 1
                    yield sse_event({"token": "ä", "total_tokens": number})
                    await asyncio.sleep(0)
                yield sse_event({"done": True, "total_tokens": number})
            finally:
                self.left.set()

        return Response(events=events())


async def echo(state: Any, request: Request) -> Response:
    return Response({"bytes": len(request.body), "length": request.head.length, "members": parse_json(request.body)})


@pytest.fixture
def peer() -> Iterator[Peer]:
    with in_a_thread(Peer()) as peer:
        yield peer
    assert peer.complaints == []


def run(*command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60)


# --------------------------------------------------------------------------------------------------- curl


@pytest.fixture
def curl(peer: Peer) -> Callable[..., str]:
    program = needs("curl")

    def call(*options: str, path: str = "/v1/echo", stdin: bytes = b"") -> str:
        headers = [option for name, value in HEADERS.items() for option in ("-H", f"{name}: {value}")]
        done = run(program, "-sS", *headers, *options, peer.url + path, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    return call


WRITE_OUT = ("-o", "/dev/null", "-w", "%{http_code} %{http_version} %{num_connects} ")


def test_curl_keeps_its_connection(curl: Callable[..., str], peer: Peer) -> None:
    out = curl(*WRITE_OUT, *WRITE_OUT[:2] * 2, peer.url + "/health", peer.url + "/v1/models", path="/health")
    assert out == "200 1.1 1 200 1.1 0 200 1.1 0 "


def test_curl_head_and_old_version(curl: Callable[..., str]) -> None:
    assert curl("-I", path="/health").startswith("HTTP/1.1 200 OK\r\n")
    out = curl("-0", "-i", "-d", json.dumps({"max_tokens": 2}), path="/v1/tokens")
    assert "Transfer-Encoding" not in out
    assert "Connection: close" in out
    assert out.endswith('data: {"done": true, "total_tokens": 2}\n\n')


def test_curl_uploads_in_chunks_and_waits_for_100(curl: Callable[..., str]) -> None:
    body = json.dumps({"a": "x" * 900_000}).encode()
    chunked = curl("-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue", "--data-binary", "@-", stdin=body)
    assert json.loads(chunked) == {"bytes": len(body), "length": None, "members": {"a": "x" * 900_000}}
    options = ["-v", "--stderr", "/dev/null", "-w", "%{size_upload}"]
    sized = curl("-H", "Expect: 100-continue", *options, "--data-binary", "@-", stdin=b"{}")
    assert sized == '{"bytes": 2, "length": 2, "members": {}}2'


def test_curl_is_told_413_before_it_uploads(curl: Callable[..., str]) -> None:
    for expect in ("Expect: 100-continue", "Expect:"):
        options = [*WRITE_OUT[:3], "%{http_code} %{size_upload}", "-H", expect]
        status, sent = curl(*options, "--data-binary", "@-", stdin=b"x" * 8_000_000).split()
        assert status == "413"
        assert int(sent) < 8_000_000 or expect == "Expect:"


def test_curl_post_without_a_body(curl: Callable[..., str]) -> None:
    assert json.loads(curl("-X", "POST", path="/v1/unload/qwen_7b"))["parameter"] == "qwen_7b"


def test_curl_streams_and_leaves(curl: Callable[..., str], peer: Peer) -> None:
    out = curl("-N", "-d", json.dumps({"max_tokens": 3}), path="/v1/tokens")
    assert out.split("\n\n")[2] == 'data: {"token": "\\u00e4", "total_tokens": 3}'
    peer.left.clear()
    program = needs("curl")
    headers = [option for name, value in HEADERS.items() for option in ("-H", f"{name}: {value}")]
    command = [program, "-sN", *headers, "-d", '{"max_tokens": 0}', peer.url + "/v1/tokens"]
    endless = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert endless.stdout is not None
    assert endless.stdout.read(10) == b'data: {"to'
    endless.kill()
    endless.stdout.close()
    endless.wait()
    assert peer.left.wait(PATIENCE)


# ------------------------------------------------------------------------------------------ httpx, aiohttp


def test_httpx(peer: Peer) -> None:
    with httpx.Client(base_url=peer.url, headers=HEADERS, timeout=PATIENCE) as client:
        assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
        assert client.head("/health").content == b""
        assert client.post("/v1/echo", json=MEMBERS).json()["members"] == MEMBERS
        assert client.post("/v1/echo", content=iter([b'{"a"', b":1}"])).json() == CHUNKED_ECHO
        assert client.post("/v1/echo", content=b"x" * 2_000_000).status_code == 413
        assert client.get("/nothing").json()["code"] == "NOT_FOUND"
        with client.stream("POST", "/v1/tokens", json={"max_tokens": 3}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert [json.loads(line[6:]).get("token") for line in lines] == ["ä", "ä", "ä", None]
        peer.left.clear()
        with client.stream("POST", "/v1/tokens", json={"max_tokens": 0}) as response:
            next(response.iter_lines())
        assert peer.left.wait(PATIENCE)


async def test_aiohttp(peer: Peer) -> None:
    async def chunks() -> Any:
        yield b'{"a"'
        yield b":1}"

    timeout = aiohttp.ClientTimeout(PATIENCE)
    async with aiohttp.ClientSession(peer.url, headers=HEADERS, timeout=timeout) as client:
        for _ in range(3):
            async with client.get("/health") as response:
                assert (response.status, response.version) == (200, aiohttp.HttpVersion11)
        async with client.post("/v1/echo", data=chunks(), expect100=True) as response:
            assert await response.json() == CHUNKED_ECHO
        async with client.post("/v1/tokens", json={"max_tokens": 3}) as response:
            events = [json.loads(line[6:]) async for line in response.content if line.strip()]
            assert [event["total_tokens"] for event in events] == [1, 2, 3, 3]
        peer.left.clear()
        async with client.post("/v1/tokens", json={"max_tokens": 0}) as response:
            await response.content.readline()
            response.close()
        assert await asyncio.to_thread(peer.left.wait, PATIENCE)


# --------------------------------------------------------------------------------------------------- node

FETCH = """
const [url, key] = process.argv.slice(1);
const headers = { 'X-API-Key': key, 'Content-Type': 'application/json' };
const out = [];
for (let i = 0; i < 3; i++) out.push((await fetch(url + '/health')).status);
const echo = await fetch(url + '/v1/echo', { method: 'POST', headers, body: JSON.stringify({ a: 1 }) });
out.push((await echo.json()).members.a);
const bytes = (text) => new TextEncoder().encode(text);
const upload = new ReadableStream({ start(c) { c.enqueue(bytes('{"b":')); c.enqueue(bytes('2}')); c.close(); } });
const chunked = await (await fetch(url + '/v1/echo', { method: 'POST', headers, body: upload, duplex: 'half' })).json();
out.push(chunked.members.b, chunked.length);
const response = await fetch(url + '/v1/tokens', { method: 'POST', headers, body: JSON.stringify({ max_tokens: 3 }) });
let text = '';
for await (const piece of response.body) text += new TextDecoder().decode(piece);
out.push(text.split('\\n\\n').length);
const abort = new AbortController();
const options = { method: 'POST', headers, body: '{"max_tokens": 0}', signal: abort.signal };
const endless = await fetch(url + '/v1/tokens', options);
await endless.body.getReader().read();
abort.abort();
console.log(JSON.stringify(out));
"""


def test_node_fetch(peer: Peer) -> None:
    done = run(needs("node"), "--input-type=module", "-e", FETCH, peer.url, KEY)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == [200, 200, 200, 1, 2, None, 5]
    assert peer.left.wait(PATIENCE)


# ------------------------------------------------------------------------------------------------ pipelines


PIPELINE = """
init = function()
  local r = {}
  for i = 1, 16 do r[i] = wrk.format("GET", "/health") end
  req = table.concat(r)
end
request = function() return req end
"""


@pytest.mark.parametrize("script", ["", PIPELINE], ids=["one by one", "pipelined"])
def test_wrk(peer: Peer, tmp_path: Path, script: str) -> None:
    """Keep-alive under load: no errors and no status but 200."""
    (tmp_path / "script.lua").write_text(script)
    done = run(needs("wrk"), "-t1", "-c20", "-d1s", "-s", str(tmp_path / "script.lua"), peer.url + "/health")
    out = done.stdout.decode()
    assert done.returncode == 0
    assert "Non-2xx" not in out
    assert "Socket errors" not in out
    assert int(out.split(" requests in ")[0].split()[-1]) > 100


# ------------------------------------------------------------------------------------------------- proxies

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr warn; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  upstream cerebrum {{ server 127.0.0.1:{backend}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://cerebrum; proxy_http_version {version}; proxy_set_header Connection ""; {more} }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 64
defaults
  mode http
  timeout connect 5s
  timeout client 20s
  timeout server 20s
  option abortonclose
listen cerebrum
  bind 127.0.0.1:{port}
  server one 127.0.0.1:{backend} check inter 200ms
  option httpchk
  http-check send meth GET uri /health ver HTTP/1.1 hdr Host localhost
  http-check expect status 200
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def proxy(command: list[str], port: int) -> Iterator[str]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def listening() -> bool:
        assert process.poll() is None, process.communicate()[1]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_until(listening, f"{command[0]} listens")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def through_a_proxy(url: str, peer: Peer) -> None:
    with httpx.Client(base_url=url, headers={**HEADERS, "Host": "localhost"}, timeout=PATIENCE) as client:
        wait_until(lambda: client.get("/health").status_code == 200, "the proxy has seen its backend")
        assert [client.get("/v1/models").status_code for _ in range(10)] == [200] * 10
        assert client.head("/health").status_code == 200
        assert client.get("/nothing").json()["code"] == "NOT_FOUND"
        assert client.get("/v1/models", headers={"X-API-Key": "wrong"}).json()["code"] == "UNAUTHORIZED"
        body = json.dumps({"a": "x" * 500_000}).encode()
        assert client.post("/v1/echo", content=body).json()["bytes"] == len(body)
        assert client.post("/v1/echo", content=iter([body[:9], body[9:]])).json()["bytes"] == len(body)
        assert client.get("/health", headers={"X-Request-ID": "mine"}).headers.get_list("X-Request-ID") == ["mine"]
        with client.stream("POST", "/v1/tokens", json={"max_tokens": 500}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert len(lines) == 501
        peer.left.clear()
        with client.stream("POST", "/v1/tokens", json={"max_tokens": 0}) as response:
            next(response.iter_lines())
        assert peer.left.wait(PATIENCE)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_behind_nginx(peer: Peer, tmp_path: Path, version: str) -> None:
    """nginx is told to pass on the client's Host. By default it sends its upstream's name, which is refused."""
    program, port, config = needs("nginx"), free_port(), tmp_path / "nginx.conf"
    more = "proxy_set_header Host $http_host; client_max_body_size 2m;"
    config.write_text(NGINX.format(folder=tmp_path, backend=peer.port, port=port, version=version, more=more))
    with proxy([program, "-p", str(tmp_path), "-c", str(config)], port) as url:
        through_a_proxy(url, peer)


def test_behind_haproxy(peer: Peer, tmp_path: Path) -> None:
    program, port, config = needs("haproxy"), free_port(), tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(backend=peer.port, port=port))
    with proxy([program, "-db", "-f", str(config)], port) as url:
        through_a_proxy(url, peer)


# -------------------------------------------------------------------------------------------- slowhttptest

ATTACKS = {
    "slow headers": ["-H", "-i", "1"],
    "slow body": ["-B", "-i", "1", "-s", "4096", "-t", "POST"],
    "range": ["-R", "-t", "HEAD", "-a", "10", "-b", "3000"],
    "slow read": ["-X", "-w", "1", "-y", "2", "-n", "1", "-z", "1", "-k", "9"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cm4d", pytest.param("vpsd", marks=pytest.mark.nightly)])  # it is the same server
@pytest.mark.parametrize("attack", ATTACKS)
def test_slowhttptest(attack: str, name: str, tmp_path: Path) -> None:
    """Each of its four attacks by 1,000 connections, while /health answers and memory stays flat."""
    program = needs("slowhttptest")
    with daemon(name, tmp_path) as process:
        before = process.rss_kb()
        path = "/health" if attack == "slow read" else "/v1/complete"
        command = [program, *ATTACKS[attack], "-c", "1000", "-r", "400", "-l", "8", "-p", "3"]
        command += ["-g", "-o", str(tmp_path / "out"), "-u", f"http://127.0.0.1:{process.port}{path}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as enemy:
            answers = 0
            while enemy.poll() is None:
                reply = asyncio.run(ask(process.port, HEALTH))
                assert "status" in reply.json
                answers += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    enemy.wait(0.1)
        assert answers > 5  # most of the time goes to requests of the attack
        rows = list(csv.DictReader((tmp_path / "out.csv").open()))
        assert rows
        assert process.rss_kb() - before < 30_000
        path = "/v1/complete" if name == "cm4d" else "/v1/inference"
        raw = post(path, json.dumps({**MEMBERS, "model": "qwen_0_5b"}).encode())
        reply = asyncio.run(ask(process.port, raw))
        # Neither has a model, and this Pi has no VPS.
        assert reply.json["code"] == {"cm4d": "VPS_UNAVAILABLE", "vpsd": "MODEL_NOT_FOUND"}[name]
        assert process.complaints() == ""
