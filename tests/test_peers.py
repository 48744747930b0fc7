"""Other people's programs: curl and Python's http.client as clients of the server, nginx in front
of it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest
from engines import free_port
from harness import KEY, PATIENCE, wait_until
from scripted import in_a_thread
from test_wire import serving

from cerebrum.http import Server

HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}


def needs(tool: str) -> str:
    found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{tool} is not installed")
    return found


@pytest.fixture
def peer() -> Iterator[tuple[Server, int]]:
    """The server of test_wire.py, and its port."""
    with in_a_thread(serving()) as peer:
        yield peer


def use(port: int, server: Server) -> None:
    """All that a client may do, by http.client: to the server itself, or through a proxy."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(method: str, path: str, body=None, **more: str) -> http.client.HTTPResponse:
        client.request(method, path, body, {**HEADERS, "Host": "localhost", **more})
        return client.getresponse()

    get, post = partial(ask, "GET"), partial(ask, "POST")
    for _ in range(10):
        assert json.load(get("/v1/models"))["path"] == "/v1/models"
    assert ask("HEAD", "/health").read() == b""
    assert json.load(get("/nothing"))["code"] == "NOT_FOUND"
    assert json.load(get("/v1/models", **{"X-API-Key": "wrong"}))["code"] == "UNAUTHORIZED"
    body = json.dumps({"a": "x" * 500_000}).encode()
    for sent in (body, iter([body[:9], body[9:]])):
        assert json.load(post("/v1/complete", sent)) == json.loads(body)
    response = get("/health", **{"X-Request-ID": "mine"})
    assert response.read()
    assert response.headers.get_all("X-Request-ID") == ["mine"]
    events = post("/v1/complete/stream", '{"count": 500}').read()
    assert events.count(b"\n\n") == 501
    left = server.state.left  # a stream has ended
    left.clear()
    endless = post("/v1/complete/stream", '{"count": 0}')
    assert endless.readline().startswith(b"data: ")
    endless.close()
    client.close()
    assert left.wait(PATIENCE)


def test_http_client(peer: tuple[Server, int]):
    server, port = peer
    use(port, server)


# --------------------------------------------------------------------------------------------- curl


def test_curl(peer: tuple[Server, int]):
    program = needs("curl")
    url = f"http://127.0.0.1:{peer[1]}"
    command = [program, "-sS"]
    for name, value in HEADERS.items():
        command += ["-H", f"{name}: {value}"]

    def curl(path: str, *options: str, stdin: bytes = b"") -> str:
        asking = [*command, *options, url + path]
        done = subprocess.run(asking, input=stdin, capture_output=True, timeout=PATIENCE)
        assert done.returncode == 0
        assert done.stderr == b""
        return done.stdout.decode()

    silent = ("-o", "/dev/null")
    shown = ("-w", "%{http_code} %{http_version} %{num_connects} ")
    both = curl("/health", *silent, *shown, *silent, f"{url}/v1/models")
    assert both == "200 1.1 1 200 1.1 0 ", "it keeps its connection"
    out = curl("/v1/complete/stream", "-0", "-d", '{"count": 2}')
    assert out.endswith('data: {"done": true}\n\n')

    waits = ("-H", "Expect: 100-continue", "--data-binary", "@-")
    body = b'{"a": "%b"}' % (b"x" * 900_000)
    chunked = curl("/v1/complete", "-H", "Transfer-Encoding: chunked", *waits, stdin=body)
    assert json.loads(chunked) == json.loads(body)
    refused = (*silent, "-w", "%{http_code} %{size_upload}", "--data-binary", "@-")
    for expect in ("Expect: 100-continue", "Expect:"):
        printed = curl("/v1/complete", *refused, "-H", expect, stdin=b"x" * 8_000_000)
        status, sent = printed.split()
        assert status == "413"
        assert int(sent) < 8_000_000 or expect == "Expect:"


# ------------------------------------------------------------------------------------------ a proxy

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr warn; events {{}}
http {{
  access_log off; client_body_temp_path {folder}/1; proxy_temp_path {folder}/2;
  fastcgi_temp_path {folder}/3; uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  upstream cerebrum {{ server 127.0.0.1:{backend}; keepalive 4; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 2m;
    location / {{
      proxy_pass http://cerebrum; proxy_http_version {version}; proxy_set_header Connection "";
      proxy_set_header Host $http_host;  # by default it sends its upstream's name, which is refused
    }}
  }}
}}
"""


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_behind_nginx(peer: tuple[Server, int], tmp_path, version):
    program = needs("nginx")
    server, backend = peer
    port = free_port()
    config = tmp_path / "nginx.conf"
    places = {"folder": tmp_path, "backend": backend, "port": port}
    config.write_text(NGINX.format(version=version, **places))

    def listening() -> bool:
        assert process.poll() is None, "nginx has ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    with subprocess.Popen([program, "-p", tmp_path, "-c", config]) as process:
        try:
            wait_until(listening, "nginx listens")
            use(port, server)
        finally:
            process.terminate()
