"""Real files in every language, and what pygments says of them: for test_syntaxes.py and
tests/bench/cases.py.
"""

from __future__ import annotations

import bisect
import shutil
import subprocess
from pathlib import Path

from harness import MODELS
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Error, String

from cerebrum.text.languages import LANGUAGES, language_of_file

SOURCES = MODELS.parent / "sources"
# Debian's source packages; together they have files in every language, 27 MB packed.
PACKAGES = (
    "thrift", "flatbuffers", "jekyll", "capistrano", "phpmyadmin", "icinga2", "docker-compose",
    "ansible-lint", "lua-penlight",
)  # fmt: skip
LEXERS = {"shell": "bash", "dockerfile": "docker"}  # pygments' names


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, errors="replace")


def fetch_sources() -> str:
    """Unpack the original sources of PACKAGES below SOURCES. Returns why Debian's archive cannot be
    reached, or "".
    """
    done, lists = SOURCES / f"done-{'-'.join(PACKAGES)}", SOURCES / "lists"
    if done.exists():
        return ""
    if not shutil.which("apt-get"):
        return "needs apt-get"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    listed = SOURCES / "debian.sources"
    files = sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))  # this machine's archives
    found = "\n\n".join(file.read_text() for file in files).split("\n\n")
    used = "\n\n".join(stanza for stanza in found if "URIs: http" in stanza)
    listed.write_text(used.replace("Types: deb\n", "Types: deb-src\n") + "\n")
    options = [f"-oDir::Cache={SOURCES}", f"-oDir::Etc::sourcelist={listed}"]
    options += ["-oDir::Etc::sourceparts=-", f"-oDir::State::Lists={lists}"]
    updated = run("apt-get", "update", "-q", *options)
    if updated.returncode:
        return f"Debian's archive cannot be reached: {updated.stderr[-200:]}"
    for package in PACKAGES:  # an archive may lack one
        run("apt-get", "source", "-q", "--tar-only", "--download-only", *options, package)
    archives = list(SOURCES.glob("*.orig*.tar.*"))
    for archive in archives:
        run("tar", "xf", str(archive), "--one-top-level", "--no-same-owner")
    if len(archives) == len(PACKAGES):
        done.touch()
    return ""


def files_of(folders: list[str], language: str, least: int, most: int) -> list[Path]:
    """Files of a language below the folders, by their names, with more than `least` bytes and fewer
    than `most`.
    """
    found = []
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if language_of_file(path.name) != language or not path.is_file():
                continue
            if least < path.stat().st_size < most:
                found.append(path)
    return found


class Peer:
    """What pygments takes for strings and comments of a text."""

    def __init__(self, language: str, text: str):
        self.line_comment, self.text = LANGUAGES[language].line_comment, text
        lexer = get_lexer_by_name(LEXERS.get(language, language), stripnl=False, ensurenl=False)
        tokens = lexer.get_tokens_unprocessed(text)
        self.tokens = [(start, start + len(value), kind) for start, kind, value in tokens]
        self.starts = [start for start, _, _ in self.tokens]

    @property
    def sure(self) -> bool:
        """It has understood the text. It does not know MySQL's quotes in SQL, and takes text in
        Markdown for code.
        """
        return not any(kind in Error for _, _, kind in self.tokens)

    def inside(self, place: int) -> bool:
        """Whether a place is inside a string or comment."""
        number = bisect.bisect_left(self.starts, place) - 1
        start, end, kind = self.tokens[number]
        line = self.text[: place - 1].rpartition("\n")[2].lstrip()
        if self.line_comment and line.startswith(self.line_comment):
            return False  # Rust's lines of documentation are comments each
        if kind in String.Backtick or kind in Comment.Preproc or kind in Comment.PreprocFile:
            return False
        if start < place < end:
            return kind in String or kind in Comment
        following = self.tokens[number + 1 : number + 2]
        goes_on = kind in String and self.text[place - 1] == "\n"
        return goes_on and bool(following) and following[0][2] in String
