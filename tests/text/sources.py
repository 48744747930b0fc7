"""Real files in every language, and what pygments says of them: for test_syntaxes.py and
tests/bench/ending.py.
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
    "thrift", "flatbuffers", "jekyll", "capistrano", "phpmyadmin", "icinga2", "docker-compose", "ansible-lint",
    "lua-penlight",
)  # fmt: skip
LEXERS = {"shell": "bash", "dockerfile": "docker"}  # pygments' names


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
    texts = [file.read_text() for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    stanzas = [stanza for stanza in "\n\n".join(texts).split("\n\n") if "URIs: http" in stanza]
    listed = SOURCES / "debian.sources"
    listed.write_text("\n\n".join(stanzas).replace("Types: deb\n", "Types: deb-src\n") + "\n")
    places = {"Etc::sourcelist": listed, "Etc::sourceparts": "-", "State::Lists": lists}
    options = [
        *(f"-oDir::{name}={place}" for name, place in places.items()),
        f"-oDir::Cache={SOURCES}",
    ]
    updated = subprocess.run(
        ["apt-get", "update", "-q", *options], cwd=SOURCES, capture_output=True, text=True
    )
    if updated.returncode:
        return f"Debian's archive cannot be reached: {updated.stderr[-200:]}"
    for package in PACKAGES:  # an archive may lack one
        command = ["apt-get", "source", "-q", "--tar-only", "--download-only", *options, package]
        subprocess.run(command, cwd=SOURCES, capture_output=True)
    archives = list(SOURCES.glob("*.orig*.tar.*"))
    for archive in archives:
        subprocess.run(
            ["tar", "xf", archive, "--one-top-level", "--no-same-owner"],
            cwd=SOURCES,
            capture_output=True,
        )
    if len(archives) == len(PACKAGES):
        done.touch()
    return ""


def files_of(folders: list[str], language: str, least: int, most: int) -> list[Path]:
    """Files of a language below the folders, by their names, with more than `least` bytes and fewer
    than `most`.
    """
    return [
        path
        for folder in folders
        for path in sorted(Path(folder).rglob("*"))
        if language_of_file(path.name) == language
        and path.is_file()
        and least < path.stat().st_size < most
    ]


class Peer:
    """What pygments takes for strings and comments of a text."""

    def __init__(self, language: str, text: str) -> None:
        self.line_comment, self.text = LANGUAGES[language].line_comment, text
        lexer = get_lexer_by_name(LEXERS.get(language, language), stripnl=False, ensurenl=False)
        self.tokens = [
            (start, start + len(value), kind)
            for start, kind, value in lexer.get_tokens_unprocessed(text)
        ]
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
        following = self.tokens[number + 1][2] if number + 1 < len(self.tokens) else None
        return kind in String and following in String and self.text[place - 1] == "\n"
