"""Do pieces of a repository's other files help to complete a line? Lines of recent commits, with and without them.

    python tests/bench/context.py FILE.jsonl REPOSITORY… [--model qwen_1_5b] [--lines 300] [--variants nothing,ring,…]

REPOSITORY is a folder with a git repository, bare or not. The lines were added in or after 2025, so they are newer than
Qwen2.5-Coder; each uses a compound name (`load_model`, `ModelLoader`) that one or two other files define, and is cut
where the name begins: half of the lines behind a dot. The Pi gets the imports, 30 lines before and 9 after as /infill,
and beside them, by the variant:

    nothing    nothing more
    told       the signature of that very name, as a comment above the cursor: more than any choice could achieve
    told_file  the same as a file of its own (`input_extra`)
    chosen     six signatures, chosen by the file's imports and by words near the cursor, as comments
    similar    the lines of another file that have most words in common with those above the cursor, as comments
    ring       chunks of 64 lines around the commit's other changes (`input_extra`), as llama.vim collects them

FILE.jsonl gets one line for each answer, and what it has is not asked again. Prints one line of JSON: for each variant
the `exact` lines, how often the name is `right`, the mean `similarity` (difflib's ratio), and the seconds of an answer;
`gain` is its exact lines over those of `nothing`, for the lines that have both, with the 95 % interval of a bootstrap.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import start_both

from cerebrum.text.languages import LANGUAGES  # quality has set the path to it

SINCE = "2025-01-01"
CODE = {ending: name for name in ("python", "typescript", "go") for ending in LANGUAGES[name].endings}
COMPOUND = re.compile(r"(?<![\w$])(?:[a-z]+_\w*[a-z]|_?[A-Z]?[a-z]+(?:[A-Z][a-z0-9]+)+)(?![\w$])")
UNUSUAL = re.compile(r"(^|[/_.])(tests?|spec|examples?|docs?|generated|migrations|vendor)([/_.]|$)")
WORD = re.compile(r"[A-Za-z_]\w{2,}")
BEFORE, AFTER, IMPORTS, CHUNK_LINES, CHUNKS = 30, 9, 15, 64, 6
MAX_FILE_BYTES, MAX_PER_COMMIT, MAX_PER_FILE = 200_000, 4, 2
TOKENS = 48


@dataclass
class Commit:
    """A commit's files of code, and where their names are defined."""

    repository: str
    id: str
    added: list[tuple[str, int, str]]  # path, line from 0, text
    texts: dict[str, str] = field(default_factory=dict)
    defined: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # path, offset

    def read(self) -> None:
        """Load the files."""
        rows = git(self.repository, "ls-tree", "-r", "-z", "-l", self.id).decode("utf-8", "replace").split("\0")
        entries = [(*head.split(), path) for head, _, path in (row.partition("\t") for row in rows) if path]
        wanted = [(sha, path) for mode, kind, sha, size, path in entries
                  if kind == "blob" and mode != "120000" and is_code(path) and int(size) < MAX_FILE_BYTES]  # fmt: skip
        asked = "".join(f"{sha}\n" for sha, _ in wanted).encode()
        data, at = git(self.repository, "cat-file", "--batch", stdin=asked), 0
        for _, path in wanted:
            head, start = data[at : data.index(b"\n", at)].split(), data.index(b"\n", at) + 1
            if head[1] == b"missing":
                at = start
                continue
            at = start + int(head[2]) + 1
            self.texts[path] = data[start : at - 1].decode("utf-8", "replace")
            for name, offset in definitions(path, self.texts[path]):
                self.defined[name].append((path, offset))

    def signature(self, name: str) -> str:
        """The first lines of a definition, up to the end of its parameters, as one line."""
        path, offset = self.defined[name][0]
        lines, depth = [], 0
        for line in self.texts[path][offset:].lstrip("\n").split("\n")[:10]:
            lines.append(line.strip())
            depth += sum(map(line.count, "([")) - sum(map(line.count, ")]"))
            if depth <= 0:
                break
        return " ".join(lines).rstrip("{: ")


@dataclass(frozen=True)
class Line:
    """A line with a hole: from `offset` in the text of `path` to the end of the line."""

    commit: Commit
    path: str
    offset: int
    name: str

    @property
    def key(self) -> list[Any]:
        return [Path(self.commit.repository).name, self.commit.id, self.path, self.offset]

    @property
    def text(self) -> str:
        return self.commit.texts[self.path]

    @property
    def expected(self) -> str:
        return self.text[self.offset :].partition("\n")[0].rstrip()

    def around(self) -> tuple[str, str]:
        """What an editor would send: the text before and after the cursor."""
        imports = LANGUAGES[CODE[suffix(self.path)]].imports
        above = self.text[: self.offset].split("\n")
        kept = [line for line in above[: -BEFORE - 1] if imports.match(line)][:IMPORTS]
        below = self.text[self.offset :].split("\n")[1 : AFTER + 1]
        return "\n".join([*kept, *([""] if kept else []), *above[-BEFORE - 1 :]]), "\n" + "\n".join(below)


# ------------------------------------------------------------------------------------------- the lines


def git(repository: str, *arguments: str, stdin: bytes = b"") -> bytes:
    return subprocess.run(["git", "-C", repository, *arguments], input=stdin, capture_output=True, check=True).stdout


def suffix(path: str) -> str:
    return PurePosixPath(path).suffix


def is_code(path: str) -> bool:
    return suffix(path) in CODE and not UNUSUAL.search(path.lower())


def definitions(path: str, text: str) -> Iterator[tuple[str, int]]:
    """The names that a file defines, and the offset of each definition."""
    for found in LANGUAGES[CODE[suffix(path)]].defines.finditer(text):
        yield next(group for group in reversed(found.groups()) if group), found.start()


def commits(repository: str, generator: random.Random) -> Iterator[Commit]:
    ids = git(repository, "log", f"--since={SINCE}", "--no-merges", "--format=%H").decode().split()
    generator.shuffle(ids)
    for one in ids:
        added, path, number = [], "", 0
        try:
            shown = git(repository, "show", "--unified=0", "--format=", "--no-renames", one)
        except subprocess.CalledProcessError:  # a partial copy of the repository has not all files
            continue
        for row in shown.decode(errors="replace").split("\n"):
            if row.startswith("+++ "):
                path = row.removeprefix("+++ b/")
            elif row.startswith("@@ "):
                number = int(row.split("+")[1].split()[0].split(",")[0]) - 1
            elif row.startswith("+"):
                if is_code(path):
                    added.append((path, number, row[1:]))
                number += 1
        if 5 <= len(added) <= 2000:
            commit = Commit(repository, one, added)
            commit.read()
            yield commit


def lines_of(repository: str, count: int) -> Iterator[Line]:
    """Lines of the repository, always the same ones."""
    generator, used, made = random.Random(repository.rstrip("/").rpartition("/")[2]), Counter[str](), 0
    for commit in commits(repository, generator):
        here = 0
        generator.shuffle(commit.added)
        for path, number, text in commit.added:
            behind_dot = made % 2 == 1
            if used[path] < MAX_PER_FILE and (line := make_line(commit, path, number, text, behind_dot)):
                yield line
                used[path] += 1
                here, made = here + 1, made + 1
            if made == count:
                return
            if here == MAX_PER_COMMIT:
                break


def make_line(commit: Commit, path: str, number: int, text: str, behind_dot: bool) -> Line | None:
    rows, language = commit.texts.get(path, "").split("\n"), LANGUAGES[CODE[suffix(path)]]
    bare = text.strip()
    if rows[number : number + 1] != [text] or number < 10 or not 10 <= len(bare) <= 140 or language.imports.match(bare):
        return None
    if bare.startswith((language.line_comment or "//", "*", "/*", '"', "'")) or "\r" in commit.texts[path]:
        return None
    if any("\n".join(rows[:number]).count(quotes) % 2 for quotes in ('"""', "'''", "`")):
        return None  # in a text
    own = {name for name, _ in definitions(path, commit.texts[path])}
    imported = set(WORD.findall("\n".join(row for row in rows if language.imports.match(row))))
    for found in COMPOUND.finditer(text):
        before, places = text[: found.start()], {place for place, _ in commit.defined.get(found[0], ())} - {path}
        is_used = behind_dot or found[0] in imported or suffix(path) == ".go"
        is_code_here = (
            not any(before.count(mark) % 2 for mark in "\"'`") and (language.line_comment or "//") not in before
        )
        is_new = found[0] in own or found[0] == bare.rstrip(",") or re.match(r"\s*[=:](?!=)", text[found.end() :])
        if before.endswith(".") == behind_dot and 0 < len(places) <= 2 and is_used and is_code_here and not is_new:
            return Line(commit, path, sum(len(row) + 1 for row in rows[:number]) + found.start(), found[0])
    return None


# ---------------------------------------------------------------------------------------- the variants

Sent = tuple[str, str, list[dict[str, str]]]  # before, after, other files


def remarked(line: Line, remarks: list[str]) -> Sent:
    """The remarks as comments above the cursor's line."""
    before, after = line.around()
    head, _, last = before.rpartition("\n")
    indent, remark = last[: len(last) - len(last.lstrip())], LANGUAGES[CODE[suffix(line.path)]].remark
    return "".join([head, "\n", *(f"{indent}{remark(one)}\n" for one in remarks), last]), after, []


def told_file(line: Line) -> Sent:
    path, _ = line.commit.defined[line.name][0]
    return *line.around(), [{"filename": path, "text": line.commit.signature(line.name) + "\n"}]


def chosen(line: Line) -> Sent:
    before, _ = line.around()
    imports = LANGUAGES[CODE[suffix(line.path)]].imports
    imported = set(WORD.findall("\n".join(row for row in line.text.split("\n") if imports.match(row))))
    near = WORD.findall("\n".join(before.split("\n")[-12:]))
    parts = {part for word in near for part in parts_of(word)}
    scores = {}
    for name, places in line.commit.defined.items():
        if all(path != line.path and suffix(path) == suffix(line.path) for path, _ in places) and (
            own := parts_of(name)
        ):
            stem = PurePosixPath(places[0][0]).stem
            scores[name] = (
                2 * (name in imported) + 1.5 * (name in near) + (stem in imported) + len(own & parts) / len(own)
            )
    best = sorted((name for name in scores if scores[name] > 0), key=lambda name: (-scores[name], name))[:6]
    return remarked(line, [line.commit.signature(name) for name in reversed(best)])


def parts_of(name: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name) if len(part) > 2}


def similar(line: Line) -> Sent:
    before, _ = line.around()
    wanted = set(WORD.findall("\n".join(before.split("\n")[-8:])))
    best: tuple[float, str, int] = (0.0, "", 0)
    for path, text in line.commit.texts.items():
        if path != line.path and suffix(path) == suffix(line.path):
            words = [set(WORD.findall(row)) for row in text.split("\n")]
            for start in range(0, len(words), 4):
                have = set[str]().union(*words[start : start + 8])
                best = max(best, (len(wanted & have) / (len(wanted | have) or 1), path, start))
    _, path, start = best
    return remarked(line, [f"{path}:", *line.commit.texts[path].split("\n")[start : start + 14]] if path else [])


def ring(line: Line) -> Sent:
    chunks: dict[str, dict[str, str]] = {}
    for path, number, _ in line.commit.added:
        if path != line.path and path in line.commit.texts and len(chunks) < CHUNKS:
            rows = line.commit.texts[path].split("\n")[max(0, number - CHUNK_LINES // 2) :][:CHUNK_LINES]
            chunks.setdefault(path, {"filename": path, "text": "\n".join(rows) + "\n"})
    return *line.around(), list(chunks.values())


VARIANTS: dict[str, Callable[[Line], Sent]] = {
    "nothing": lambda line: (*line.around(), []),
    "told": lambda line: remarked(line, [line.commit.signature(line.name)]),
    "told_file": told_file,
    "chosen": chosen,
    "similar": similar,
    "ring": ring,
}

# ------------------------------------------------------------------------------------------- the report


def gain(exact: list[tuple[bool, bool]]) -> list[float] | None:
    """The ratio of exact lines, with and without, and its 95 % interval, by resampling the lines."""
    generator, ratios = random.Random(1), []
    for _ in range(2000):
        sample = generator.choices(exact, k=len(exact))
        ratios.append(sum(new for new, _ in sample) / max(1, sum(old for _, old in sample)))
    ratios.sort()
    ratio = sum(new for new, _ in exact) / max(1, sum(old for _, old in exact))
    return [round(one, 3) for one in (ratio, ratios[50], ratios[1949])]


def report(answers: list[dict[str, Any]]) -> dict[str, Any]:
    by_variant: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in answers:
        by_variant[one["variant"]][json.dumps(one["key"])] = one
    plain, told = by_variant.get("nothing", {}), {}
    for variant, by_key in by_variant.items():
        rows = list(by_key.values())
        told[variant] = {
            "lines": len(rows),
            "exact": sum(row["exact"] for row in rows),
            "right": sum(row["right"] for row in rows),
            "similarity": round(sum(row["similarity"] for row in rows) / len(rows), 3),
            "seconds": round(sum(row["seconds"] for row in rows) / len(rows), 2),
        }
        if pairs := [(by_key[key]["exact"], plain[key]["exact"]) for key in by_key if key in plain]:
            told[variant]["gain"] = gain(pairs)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("repositories", nargs="+")
    parser.add_argument("--model", default="qwen_1_5b")
    parser.add_argument("--lines", type=int, default=300, help="of all repositories together")
    parser.add_argument("--variants", default="nothing,told,ring")
    options = parser.parse_args()
    answers = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    done = {json.dumps([one["key"], one["variant"]]) for one in answers}
    each = -(-options.lines // len(options.repositories))
    with ExitStack() as stack, options.file.open("a") as file:
        tiers = start_both(stack, options.model, True)
        turns = zip_longest(*(lines_of(repository, each) for repository in options.repositories))
        for line in (line for turn in turns for line in turn if line):
            for variant in options.variants.split(","):
                if json.dumps([line.key, variant]) in done:
                    continue
                before, after, others = VARIANTS[variant](line)
                begin = time.perf_counter()
                answer = tiers.ask(
                    f"{tiers.pi}/infill", input_prefix=before, input_suffix=after, input_extra=others, prompt="",
                    filename=line.path, n_predict=TOKENS, model=options.model, cache_prompt=True,
                )  # fmt: skip
                seconds, got = time.perf_counter() - begin, answer["content"].partition("\n")[0].rstrip()
                one = {"key": line.key, "variant": variant, "got": got, "expected": line.expected, "seconds": seconds}
                one["exact"] = got == line.expected
                one["right"] = re.match(r"\w*", got)[0] == line.name  # type: ignore[index]
                one["similarity"] = SequenceMatcher(None, got, line.expected).ratio()
                answers.append(one)
                file.write(json.dumps(one) + "\n")
                file.flush()
    print(json.dumps({"model": options.model, **report(answers)}))


if __name__ == "__main__":
    main()
