"""Does another choice of what is sent of a long file complete more lines? Files newer than the models' training.

    python tests/bench/prompts.py FILE.jsonl --arms plain=FOLDER,other=FOLDER REPOSITORY… [--model ID] [--cases 300]

REPOSITORY is a folder with a git repository, bare or not; FOLDER a checkout of this project (`git worktree add`), whose
`prepare` makes the arm's prompts. The files were added in or after 2025 and have 600 lines or more. A case is a line in
the last third of a file that uses a name which the file defines only above the first arm's window. The line is cut
where a word begins, and the model gets the text above and below (`infill`, greedy), in a room of 1,000 tokens for each
arm. An answer is right if its first line is the rest of the line.

FILE.jsonl gets one line for each answer; a later run asks only for what is missing. The VPS uses the tuned file of
CEREBRUM_STATE_DIR if that is set. Prints one line of JSON: for each arm its cases, the right ones, the mean tokens of a
prompt, and `ratio`, its right ones over the first arm's with the 95 % interval of a bootstrap over the cases.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import KEY, daemon
from quality import EASY, Tiers

from cerebrum.text.languages import LANGUAGES, language_of_file

SINCE = "2025-01-01"
SUFFIXES = (".py", ".ts", ".tsx", ".go", ".rs")
COMMENT = re.compile(r"\s*(?:#|//|/?\*|\"|')|.*(?:\bimport\b|\bfrom [\"'])")
UNUSUAL = re.compile(
    r"(?i)(^|[/_.-])(tests?|spec|(ex|s)amples?|docs?|gen|generated|migrations|vendor|cookbook)([/_.-]|$)"
)
WORD = re.compile(r"[A-Za-z_]\w*")
MIN_LINES, MAX_FILE_BYTES, MAX_PER_FILE = 600, 200_000, 2
BUDGET, RATIO, LAYOUT = 1000, 3.5, "spmv2"  # tokens; weight per token, as `Ratio` learns it for Qwen
TOKENS, DRAWS = 30, 10_000

Prepare = Callable[..., Any]  # `cerebrum.text.prompt.prepare`


@dataclass(frozen=True)
class Case:
    """A file with a hole from `offset` to the end of the line; `name` is the name that the line uses."""

    repository: str
    path: str
    text: str
    offset: int
    name: str

    @property
    def key(self) -> str:
        return f"{self.repository} {self.path} {self.offset}"

    @property
    def expected(self) -> str:
        return self.text[self.offset :].partition("\n")[0].rstrip()

    def fields(self) -> dict[str, Any]:
        below = self.text[self.text.index("\n", self.offset) :]
        return {"language": language_of_file(self.path), "prompt": self.text[: self.offset], "suffix": below}


def git(repository: str, *arguments: str) -> str:
    return subprocess.check_output(["git", "-C", repository, *arguments]).decode("utf-8", "replace")


def files(repository: str) -> Iterator[tuple[str, str]]:
    """(path, text) of the new files, always in the same order. A file that was only renamed is not new."""
    added = git(repository, "log", f"--since={SINCE}", "--diff-filter=A", "--format=", "--name-only", "-M100%")
    rows = (row.split(maxsplit=4) for row in git(repository, "ls-tree", "-r", "-l", "HEAD").splitlines())
    sizes = {row[4]: int(row[3]) for row in rows if row[3].isdigit()}
    known = {path for path in added.splitlines() if MIN_LINES * 10 < sizes.get(path, 0) < MAX_FILE_BYTES}
    paths = sorted(path for path in known if path.endswith(SUFFIXES) and not UNUSUAL.search(path))
    random.Random(1).shuffle(paths)
    for path in paths:
        text = git(repository, "show", f"HEAD:{path}").replace("\r\n", "\n")
        if text.count("\n") >= MIN_LINES:
            yield path, text


def cases_of(repository: str, prepare: Prepare) -> Iterator[Case]:
    for path, text in files(repository):
        generator, found = random.Random(path), 0
        defined: dict[str, list[int]] = defaultdict(list)
        for match in LANGUAGES[language_of_file(path)].defines.finditer(text):
            defined[match[match.lastindex or 0]].append(match.start())
        lines = text.splitlines(keepends=True)
        for number in generator.sample(range(2 * len(lines) // 3, len(lines) - 5), len(lines) // 6):
            start = sum(map(len, lines[:number]))
            here, bare = range(start, start + len(lines[number])), lines[number].strip()
            if not 12 <= len(bare) <= 90 or COMMENT.match(lines[number]) or text.count('"""', 0, start) % 2:
                continue
            words = list(WORD.finditer(lines[number]))
            names = [word[0] for word in words if len(word[0]) > 3 and 0 < len(defined.get(word[0], ())) <= 3]
            if not names or any(place in here for name in names for place in defined[name]):
                continue
            name = generator.choice(names)
            first = len(lines[number]) - len(lines[number].lstrip())
            offset = start + generator.choice(sorted({first, *(word.start() for word in words)}))
            case = Case(Path(repository).parent.name, path, text, offset, name)
            if len(case.expected) >= 4 and max(defined[name]) < window_start(case, prepare):
                yield case
                found += 1
            if found == MAX_PER_FILE:
                break


def window_start(case: Case, prepare: Prepare) -> int:
    """Where the window of a prompt starts; 0 if nothing is left out."""
    kept, above = prepare_case(prepare, case).kept, case.text[: case.offset].splitlines(keepends=True)
    return len("".join(above[: -kept["lines"]])) if "lines" in kept else 0


def load(folder: str) -> Prepare:
    """The `prepare` of a checkout."""
    sys.path.insert(0, folder)
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("cerebrum")}
    try:
        prepare: Prepare = importlib.import_module("cerebrum.text.prompt").prepare
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.startswith("cerebrum")]:
            del sys.modules[name]
        sys.modules.update(mine)
    return prepare


def prepare_case(prepare: Prepare, case: Case) -> Any:
    return prepare(case.fields(), "infill", BUDGET, RATIO, None, (), LAYOUT)


def ratio(pairs: list[tuple[bool, bool]]) -> list[float]:
    """Right answers of an arm over those of the first one, and the 95 % interval, by resampling the cases."""
    generator, counts = random.Random(1), Counter(pairs)
    kinds, weights = list(counts), list(counts.values())
    samples = [pairs, *(generator.choices(kinds, weights, k=len(pairs)) for _ in range(DRAWS))]
    whole, *found = [sum(new for new, _ in some) / max(1, sum(old for _, old in some)) for some in samples]
    found.sort()
    return [round(one, 3) for one in (whole, found[DRAWS // 40], found[-DRAWS // 40 - 1])]


def report(answers: list[dict[str, Any]], first: str) -> dict[str, Any]:
    arms: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for one in answers:
        arms[one["arm"]][one["case"]] = one
    result = {}
    for arm, rows in arms.items():
        pairs = [(row["right"], arms[first][key]["right"]) for key, row in rows.items() if key in arms[first]]
        right, tokens = (sum(row[name] for row in rows.values()) for name in ("right", "tokens"))
        result[arm] = {"cases": len(rows), "right": right, "tokens": round(tokens / len(rows)), "ratio": ratio(pairs)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("repositories", nargs="+")
    parser.add_argument("--arms", required=True, help="NAME=FOLDER,…")
    parser.add_argument("--model", default="qwen_1_5b")
    parser.add_argument("--cases", type=int, default=300, help="of all repositories together")
    options = parser.parse_args()
    arms = {name: load(folder) for name, _, folder in (arm.partition("=") for arm in options.arms.split(","))}
    first = next(iter(arms))
    answers = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    asked = {(one["case"], one["arm"]) for one in answers}
    turns = zip_longest(*(cases_of(repository, arms[first]) for repository in options.repositories))
    cases = list(islice((case for turn in turns for case in turn if case), options.cases))
    easy = EASY | {name: os.environ[name] for name in ("CEREBRUM_STATE_DIR",) if name in os.environ}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let the context managers end the daemon
    with tempfile.TemporaryDirectory() as folder, daemon("vpsd", Path(folder), inherited=os.environ, **easy) as vps:
        tiers = Tiers(f"http://127.0.0.1:{vps.port}", "", KEY, options.model)
        print("encoding", tiers.encoding(), "cases", len(cases), file=sys.stderr)
        for count, case in enumerate(cases, 1):
            known: dict[str, dict[str, Any]] = {}  # arms that agree about a case are asked once
            for arm, prepare in arms.items():
                if (case.key, arm) in asked:
                    continue
                body = prepare_case(prepare, case).body
                if (same := json.dumps(body)) not in known:
                    known[same] = tiers.raw(**body, max_tokens=TOKENS, stop=["\n"])
                answer, text = known[same], known[same]["completion"].partition("\n")[0]
                row = {"case": case.key, "arm": arm, "name": case.name, "expected": case.expected, "text": text}
                answers.append(row | {"right": text.rstrip() == case.expected, "tokens": answer["prompt_tokens"]})
                with options.file.open("a") as out:
                    out.write(json.dumps(answers[-1]) + "\n")
            if count % 10 == 0:
                print(count, json.dumps(report(answers, first)), file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "prompts", "model": options.model, "arms": report(answers, first)}))


if __name__ == "__main__":
    main()
