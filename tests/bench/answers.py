"""What real models write, and what of it comes back.

    python tests/bench/answers.py FOLDER [--record qwen_0_5b] [--share 1.0] [--show broken]

answers.jsonl.xz, beside this file, has what models wrote, up to their own end or 160 tokens (256 in
an answer), each token with its probability in percent; no end of ours was on. The kinds of rows:

    line, lines, span   gaps in code of 2025 and later: the rest of a line; several lines; from
                        within a line to within one of the next three
    example             the gaps of examples.py
    header, member      a function at its header's end, and what stands below a comment; the file
                        ends at the cursor
    answer              answers to instructions about a function, half of them without the fence
                        with which the Pi begins an answer

A row says where its text stands, not what it is: FOLDER/OWNER+NAME/repo is a clone of
github.com/OWNER/NAME with the row's commit. Rows of other repositories are left out. The report
replays the texts through `Ending`, and prints for each kind and model:

    doubled   the text ends with the suffix's first line or two lines, or with most of the first
    broken    with the text in its place the file does not parse (in Python; elsewhere its brackets
              and strings are not closed), though it would with another end: at the end of a line,
              or where the model wrote the rest of the cursor's line; in an answer, at a fence.
              What the recording's limit has cut counts in gaps alone. At a file's end a text may
              close what is open there, or leave that to the lines that really follow: all of
              them, or those behind the first closing brackets
    cut       the model wrote the true text, and some of it is lost
    behind    tokens generated behind what comes back, for each text

--show prints the texts of one of these. --record adds what a model writes at new places in the
clones to answers.jsonl, --share of the usual number.
"""

from __future__ import annotations

import ast
import itertools
import json
import lzma
import random
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import servers
from cases import MAX_CHARS, Source, cases_of
from examples import EXAMPLES, GAP
from gaps import UNUSUAL, files_since_2025, git
from recording import CONTEXT, SEQUENCES, Llama, Settings, readings
from replaying import pieces

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES, language_of_file
from cerebrum.text.prompt import prepare
from cerebrum.text.scanner import scanner_of

FILE = Path(__file__).with_name("answers.jsonl.xz")
ABOVE, BELOW = 700, 240  # characters around a gap that the model sees
CODE_CHARS = 600  # of the code that an instruction is about
PER_FILE = 2  # rows of a kind
GAPS = ("line", "lines", "span")
WANTED = {"line": 36, "lines": 36, "span": 36, "header": 18, "member": 18, "answer": 36}
INSTRUCTIONS = (
    "Document this with an example of how to call it.",
    "Add a docstring that has a Markdown example in a fenced block.",
    "Handle errors, and explain what you changed.",
    "Rename the variables so that a stranger understands them.",
    "Write a test for this.",
    "Simplify this.",
)
LEAST_LETTERS = 3  # of a line that counts as doubled
FENCE = re.compile(r"^[ \t]*```[ \t]*$", re.M)
Row = dict[str, Any]


def text_of(folder: Path, row: Row) -> str:
    """The text of a row's file, with the cursor's example in the place of one."""
    if row["kind"] == "example":
        return EXAMPLES[row["language"]][row["number"]]
    text = git(f"{folder / row['repository'] / 'repo'}", "show", f"{row['commit']}:{row['path']}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def around(row: Row, text: str) -> tuple[str, str, str]:
    """The text above a row's place, the true text there, and the text below."""
    if row["kind"] == "example":
        above, _, below = text.partition(GAP)
        return above, "", below
    start, stop = row["place"]
    return text[:start], text[start:stop], text[stop:]


def case_of(row: Row, text: str) -> Row:
    """What a model is asked for a row, as recording.py takes it."""
    above, true, below = around(row, text)
    case = {"row": row, "language": row["language"], "stop_at": "none", "beyond": False}
    if row["kind"] == "answer":
        fields = {"language": row["language"], "prompt": true, "instruction": row["instruction"]}
        *asked, begun = prepare(fields, "instruct", CONTEXT).body["messages"]
        messages = [(message["role"], message["content"]) for message in (*asked, begun)]
        messages = messages if row["begun"] else messages[:-1]
        prompt = begun["content"] if row["begun"] else ""
        more = {"mode": "instruct", "messages": messages, "prompt": prompt, "suffix": None}
        return case | more | {"most": 256}
    prompt = above if len(above) <= ABOVE else above[above.find("\n", len(above) - ABOVE) + 1 :]
    if row["kind"] not in (*GAPS, "example"):
        return case | {"mode": "complete", "prompt": prompt, "suffix": None}
    suffix = below if len(below) <= BELOW else below[: below.rfind("\n", 0, BELOW) + 1]
    return case | {"mode": "infill", "prompt": prompt, "suffix": suffix}


# ---------------------------------------------------------------------------------------- recording


def files(folder: Path, language: str, chance: random.Random) -> Iterator[tuple[Row, Source]]:
    """Files that are newer than the models, with where they stand."""
    found = []
    for repository in sorted(folder.glob("*/repo")):
        where = {"kind": "", "language": language, "repository": repository.parent.name}
        where["commit"] = git(f"{repository}", "rev-parse", "HEAD").strip()
        paths = (path for path in files_since_2025(f"{repository}") if not UNUSUAL.search(path))
        found += [where | {"path": path} for path in paths if language_of_file(path) == language]
    for where in chance.sample(found, len(found)):
        text = text_of(folder, where)
        if text.strip() and len(text) <= MAX_CHARS and max(map(len, text.split("\n"))) < 400:
            yield where, Source(language, text)


def places(folder: Path, language: str, share: float, chance: random.Random) -> Iterator[Row]:
    """Rows without what a model writes."""
    for number in range(len(EXAMPLES[language])):
        yield {"kind": "example", "language": language, "number": number}
    have = Counter[str]()
    for where, source in files(folder, language, chance):
        for kind, wanted in WANTED.items():
            as_case = "header" if kind == "answer" else kind
            for case in itertools.islice(cases_of(source, as_case, chance), PER_FILE):
                start, stop = case.place, case.place + len(case.piece)
                row = where | {"kind": kind, "place": [start, stop]}
                if kind == "answer":
                    row["place"][0] = start = source.text.rfind("\n", 0, start - 1) + 1
                    row["instruction"] = INSTRUCTIONS[have[kind] % len(INSTRUCTIONS)]
                    row["begun"] = have[kind] % 4 < 2
                fits = kind != "answer" or stop - start <= CODE_CHARS
                if fits and have[kind] < share * wanted:
                    have[kind] += 1
                    yield row


def record(folder: Path, name: str, share: float):
    rows = []
    for language in EXAMPLES:
        rows += places(folder, language, share, random.Random(f"{name} {language}"))
    settings = Settings(n_ctx=CONTEXT, sequences=SEQUENCES)
    model = Llama(servers.weights_of(name), settings)
    with FILE.with_suffix("").open("a") as out:
        for reading in readings(model, [case_of(row, text_of(folder, row)) for row in rows]):
            tokens = [(text, round(100 * chance)) for text, chance in reading.tokens]
            more = {"model": name, "whole": reading.end is not None, "tokens": tokens}
            out.write(json.dumps(reading.case["row"] | more, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------ judging


def parses(language: str, text: str) -> bool:
    if language == "python":
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
        return True
    scanner = scanner_of(LANGUAGES[language], text)
    return not (scanner.stack or scanner.unmatched or scanner.closer.strip())


def squeezed(text: str) -> str:
    return "".join(text.split())


def code_lines(language: str, text: str) -> list[str]:
    """Lines without remarks and what ends a statement; of white space, only their indentation. No
    blank ones.
    """
    remark = LANGUAGES[language].line_comment
    lines = (line.partition(remark)[0].rstrip().rstrip(";,") for line in text.split("\n"))
    return [line[: len(line) - len(line.lstrip())] + squeezed(line) for line in lines if line]


def is_doubled(language: str, above: str, sent: str, true: str, below: str) -> bool:
    begun = above.rpartition("\n")[2]
    texts = begun + sent, begun + true, below
    lines, of_true, of_below = (code_lines(language, text) for text in texts)
    first = of_below[0] if of_below else ""
    if (
        not lines
        or not sent.strip()
        or first in of_true
        or sum(map(str.isalnum, first)) < LEAST_LETTERS
    ):
        return False
    begins = first.startswith(lines[-1]) and 2 * len(lines[-1]) > len(first)
    return begins or lines[-2:] == of_below[:2]


def ends(row: Row, raw: str, above: str, below: str) -> Iterator[str]:
    """What a model's text could have been with another end."""
    if row["kind"] == "answer":
        block = raw.partition("```")[2].partition("\n")[2]
        yield from (textwrap.dedent(block[: fence.start()]) for fence in FENCE.finditer(block))
        return
    in_line = above and above[-1] != "\n"
    rest = squeezed(below.partition("\n")[0]) if in_line else ""
    for end in re.finditer(r"\s*".join(map(re.escape, rest)) or r"\n|$", raw):
        if raw[: end.start()].strip():
            yield raw[: end.start()]


def judge(row: Row, text: str) -> dict[str, Any]:
    """The figures of a row, and the text that comes back."""
    language = row["language"]
    case = case_of(row, text)
    ending = Ending(case["mode"], language, case["prompt"], case["suffix"], "auto")
    tokens = [(token, chance / 100) for token, chance in row["tokens"]]
    out = list(pieces(ending, tokens, row["whole"]))
    sent = "".join(out)
    sizes = itertools.accumulate(len(token) for token, _ in tokens)
    kept = sum(size < ending.start + len(sent) for size in sizes) + 1
    raw = "".join(token for token, _ in tokens)
    above, true, below = around(row, text)
    if row["kind"] == "answer":
        raw = case["prompt"] + raw
        above = true = below = ""
    followed = [below]
    if row["kind"] in ("header", "member"):
        followed += ["", below.lstrip(" \t\n)]};")]

    def fits(end: str) -> bool:
        return any(parses(language, above + end + rest) for rest in followed)

    has_ended = row["whole"] or len(out) <= len(tokens)  # else the recording's limit has cut it
    is_judged = has_ended or row["kind"] in GAPS
    is_whole = row["kind"] in ("answer", "example") or parses(language, text)
    wrote = true != "" and squeezed(raw).startswith(squeezed(true))
    return {
        "doubled": case["mode"] == "infill" and is_doubled(language, above, sent, true, below),
        "broken": is_judged
        and is_whole
        and not fits(textwrap.dedent(sent) if not above else sent)
        and any(map(fits, ends(row, raw, above, below))),
        "cut": wrote and not squeezed(sent).startswith(squeezed(true)),
        "behind": max(0, min(len(out), len(tokens)) - kept),
        "sent": sent,
    }


def main():
    parser = servers.parser_of(__doc__, record="", share=1.0, show="")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.record:
        record(options.folder, options.record, options.share)
        return
    table = defaultdict[str, list[dict[str, Any]]](list)
    for row in map(json.loads, lzma.decompress(FILE.read_bytes()).splitlines()):
        if row["kind"] != "example" and not (options.folder / row["repository"]).exists():
            continue
        text = text_of(options.folder, row)
        found = judge(row, text)
        table[f"{row['kind']} {row['model']}"].append(found)
        if options.show and found[options.show]:
            above, true, below = around(row, text)
            print(f"=== {row['language']}: {row['kind']}\n{above[-ABOVE:]}«{true}»{below[:BELOW]}")
            print(f"--- {found['sent']}»{''.join(token for token, _ in row['tokens'])}")
    for name, rows in table.items():
        sums = {key: sum(row[key] for row in rows) for key in ("doubled", "broken", "cut")}
        behind = round(sum(row["behind"] for row in rows) / len(rows), 1)
        print(json.dumps({"kind": name, "rows": len(rows), **sums, "behind": behind}))


if __name__ == "__main__":
    main()
