"""Where completions end, measured by an oracle: a "model" that writes the text that really stands
there.

    python tests/bench/ending.py [--texts FILE.jsonl] [--seed 1] [--cases 30]
        [--languages python,go] [FOLDER ...]

Takes cases of real files below the folders (default: the standard library, the installed packages
and the sources that `make test-slow` fetches), --cases of each kind in each language, each with
what must remain of its text. With --texts they are written into FILE, or if FILE is there, they are
replayed, so that two versions have the same texts. Needs pygments. The rows:

    header    the prompt ends at the header of a definition; the rest of the definition is missing
    member    the prompt ends at a comment or decorator above a definition, which is missing
    line      the prompt ends somewhere in a line or in its indentation; the rest of the line is
              missing
    lines     the same, and one to five more lines are missing; half of them are whole lines
    closed    the cursor is between two brackets, the second of which the editor has added; what
              stands between them on several lines is missing, such as a callback
    span      a gap that begins and ends within lines, of up to three lines
    statement from within the first line of a statement at the margin that takes several
    helper    a function and the one below it, which it calls
    margin    from within a statement that takes one line, or in languages with blocks by lines up
              to a blank line
    below     the same from right below a comment
    next      definitions at the margin, from the beginning of their line, below a blank one
    docstring definitions in a window that begins in a docstring
    remark    definitions with a comment below a blank line that is not indented more
    script    what follows #! in the first line

The model ends by itself after the missing piece (`own`), runs on with the text that follows in the
file (`on`), or, in a gap, runs on with text from elsewhere (`astray`). Of the same cases:

    window, client        gaps with the window near the cursor that `prepare` sends; with one of
                          1,200 characters that begins anywhere, as editors cut it
    again                 gaps that end within a line: the model writes its rest and ends
    half                  the first half of a gap of several lines, which `max_tokens` cuts off
    unknown               the same lines, definitions and gaps, without their language
    typed                 a gap whose text begins with the indentation that is there already
    loop, endless         a gap of several lines, the last of which, or the last word of which, is
                          written again and again
    fenced                fenced blocks of Markdown files as answers to an instruction: behind the
                          fence (`opened`), from the heading or the paragraph above it (`told`), or
                          from the block above it, of shell commands or the like (`beside`); a
                          Markdown file as one (`whole`)
    bare                  a file as an answer without a fence
    prose                 a paragraph of Markdown as an answer

Prints a line of JSON for each row, and one for each language with its rows: the cases, the
percentage that are `cut` (lost some of what must remain) and `late` (got more), and the mean number
of characters that were read. White space does not count, nor do comments and closing brackets that
come along.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import servers
from cases import GAPS, KINDS, MAX_PIECE, MORE_CHARS, ONLY_CLOSERS, Case, cases_of, sources
from replaying import pieces, rows_of
from sources import SOURCES

from cerebrum.text.ending import Ending
from cerebrum.text.fences import BESIDE
from cerebrum.text.languages import LANGUAGES, language_named
from cerebrum.text.prompt import NEAR, prepare

PATHS = sysconfig.get_paths()
FOLDERS = [PATHS["stdlib"], PATHS["purelib"], str(SOURCES)]
FEW_LANGUAGES = {"docstring": 10, "remark": 3, "script": 5}  # so many times as many cases
BUDGET = 3500  # tokens of a prompt
WINDOW = 1200  # characters
MOST_FILES = 400  # of a language
COPIES = 40  # of a line
OTHER = "\n".join(f"other{n} = elsewhere({n})" for n in range(60))
TOKEN = re.compile(r"\s?\w{1,6}|\s+|\W")
FENCE = re.compile(r"^( *)(```+)(\w+)[^\n`]*\n(.*?)^\1\2[ \t]*$", re.M | re.S)
SHELLS = ("shell", "powershell", "json", "yaml", "toml", "markdown")
PARTS = re.compile(r"\n{2,}")
MIN_LINE = 6  # characters
PART = 500  # texts that a process replays at once
Row = dict[str, Any]  # see `row_of`

# ---------------------------------------------------------------------------------------- recording


def row_of(row: str, language: str | None, case: Case, text: str, **more: Any) -> Row:
    """A text that a model writes at a case's cursor."""
    mode = "infill" if case.kind in GAPS else "complete"
    suffix = case.after if mode == "infill" else None
    fields = {"row": row, "language": language, "mode": mode, "kind": case.kind}
    fields |= {"prompt": case.prompt, "suffix": suffix, "text": text, "piece": case.piece}
    return fields | more


def answer_of(row: str, language: str, text: str, piece: str, begun: str = "") -> Row:
    return row_of(row, language, Case("answer", begun, piece, ""), text, mode="instruct")


def texts_of(case: Case) -> dict[str, str]:
    """What each model writes."""
    texts = {"own": case.piece, "on": case.piece + case.after[:MORE_CHARS]}
    if case.kind in GAPS:
        line = case.prompt.rpartition("\n")[2]
        indent = " " * (len(line) - len(line.lstrip()))
        lines = [case.piece.rstrip(), *(indent + line for line in OTHER.split("\n"))]
        texts["astray"] = "\n".join(lines)
    return texts


def rows_of_case(kind: str, language: str, case: Case, window: bool) -> Iterator[Row]:
    """A case with each model's text, and where it is fit for more, with those."""
    name = f"window_{kind}" if window else kind
    for model, text in texts_of(case).items():
        yield row_of(f"{name}_{model}", language, case, text, window=window)
    text = case.piece + case.after[:MORE_CHARS]
    if window:
        near = cut_to(case, WINDOW)
        yield row_of(f"client_{kind}", language, near, text)
    rest = case.after.partition("\n")[0]
    if case.kind in GAPS and rest.strip():
        yield row_of(f"{kind}_again", language, case, case.piece + rest)
    line = case.prompt.rpartition("\n")[2]
    if case.kind in GAPS and line and not line.strip():
        yield row_of("typed", language, case, line + case.piece)
    if kind in ("header", "line", "lines"):
        yield row_of(f"unknown_{kind}", None, case, text)
    if kind == "lines":
        yield from of_lines(language, case)


def of_lines(language: str, case: Case) -> Iterator[Row]:
    half = case._replace(piece=case.piece[: len(case.piece) // 2])
    yield row_of("half", language, half, half.piece, whole=False)
    text = case.piece.rstrip()
    last = text.rpartition("\n")[2]
    if len(last.strip()) >= MIN_LINE and case.piece.endswith("\n"):
        yield row_of("loop", language, case, case.piece + COPIES * f"{last}\n")
        yield row_of("endless", language, case, text + 10 * COPIES * f" {last.split()[-1]}")


def cut_to(case: Case, window: int) -> Case:
    """A case as a limit of reading leaves it: from the start of a line."""
    above = case.prompt[-window:]
    if len(above) < len(case.prompt):
        above = above[above.find("\n") + 1 :]
    return case._replace(prompt=above, after=case.after[: window // 3])


def of_language(language: str, options: argparse.Namespace) -> Iterator[Row]:
    chance = random.Random(f"{options.seed} {language}")
    have = Counter[str]()
    for source in islice(sources(options.folders, language, chance), MOST_FILES):
        for kind in KINDS:
            wanted = have[kind] < options.cases * FEW_LANGUAGES.get(kind, 1)
            for case in cases_of(source, kind, chance) if wanted else ():
                have[kind] += 1
                window = kind in GAPS and have[kind] % 2 == 0
                yield from rows_of_case(kind, language, case, window)
        if have["bare"] < options.cases and language != "markdown":
            have["bare"] += 1
            text = source.text[:MAX_PIECE]
            yield answer_of("bare", language, text, text)


def fenced(text: str, have: Counter[str], cases: int) -> Iterator[Row]:
    """Fenced blocks of a Markdown file with the text around them."""
    end = 0
    previous = None
    for block in FENCE.finditer(text):
        before, previous = previous, block
        language = language_named(block[3].lower())
        name = next((name for name, row in LANGUAGES.items() if row is language), "")
        above, end = text[end : block.start()], block.end()
        if not name or "```" in above or not block[4].strip():
            continue
        after = text[end : end + MORE_CHARS].partition("```")[0]
        lines = block[4].splitlines(keepends=True)
        piece = "".join(line.removeprefix(block[1]) for line in lines)
        if have[name] < cases:
            have[name] += 1
            opened = piece + block[2] + after
            yield answer_of("fenced_opened", name, opened, piece, f"```{name}\n")
            told = "\n\n".join(PARTS.split(above)[-2:]).lstrip("\n")
            yield answer_of("fenced_told", name, told + block[0] + after, piece)
        is_code = name not in SHELLS and have["beside"] < 10 * cases
        if before and before[3].lower() in BESIDE.split() and is_code:
            have["beside"] += 1
            yield answer_of("fenced_beside", name, text[before.start() : end] + after, piece)


def of_markdown(options: argparse.Namespace) -> Iterator[Row]:
    """Fenced blocks, whole files with fences, and paragraphs without any."""
    found = []
    for folder in options.folders:
        found += sorted(Path(folder).rglob("*.md"))
    have, most = Counter[str](), 5 * options.cases
    for path in random.Random(options.seed).sample(found, len(found)):
        text = path.read_text("utf-8", "replace").replace("\r\n", "\n") if path.is_file() else ""
        yield from fenced(text, have, options.cases)
        if text.count("```") % 2 == 0 and "```" in text and have["whole"] < most:
            have["whole"] += 1
            whole = text[:MAX_PIECE].rpartition("\n```\n")[0] + "\n```\n"
            answer = f"```markdown\n{whole}```\n\nThat is it.\n"
            yield answer_of("fenced_whole", "markdown", answer, whole)
        prose = next((part for part in PARTS.split(text) if len(part) > 200), "")
        if prose and not re.search("```|~~~|<|^    ", prose) and have["prose"] < most:
            have["prose"] += 1
            yield answer_of("prose", "python", prose, prose)


def recorded(options: argparse.Namespace) -> Iterator[Row]:
    languages = options.languages.split(",")
    return chain(of_markdown(options), *(of_language(language, options) for language in languages))


# ---------------------------------------------------------------------------------------- replaying


def write(row: Row) -> tuple[str, int]:
    """What the client gets of a text, and how many characters were read for it."""
    prompt, suffix = row["prompt"], row["suffix"]
    if row.get("window"):
        body = prepare(row, row["mode"], BUDGET, "spmv2", around=NEAR).body
        prompt, suffix = body["prompt"], body["suffix"]
    ending = Ending(row["mode"], row["language"], prompt, suffix, "auto")
    tokens = TOKEN.findall(row["text"])
    out = list(pieces(ending, ((token, 1.0) for token in tokens), row.get("whole", True)))
    return "".join(out), sum(map(len, tokens[: len(out)]))


def weigh(text: str) -> int:
    return len("".join(text.split()))


def compared(row: Row, sent: str) -> tuple[int, int]:
    """(characters lost, characters too many)."""
    piece = row["piece"]
    lost = weigh(piece) - weigh(sent)
    if row["mode"] == "instruct":
        is_whole = "".join(sent.split()).startswith("".join(piece.split()))
        return (0, -lost) if is_whole else (weigh(piece), 0)
    if row["kind"] in GAPS:
        typed = row["row"] == "typed" and blanks_of(sent) != blanks_of(piece)
        return max(lost, 0), max(-lost, 0) + typed
    syntax = LANGUAGES.get(row["language"] or "", LANGUAGES["python"])
    remarks = (syntax.line_comment or "\0", "/*", "*", "#", "@")
    more = ONLY_CLOSERS.sub("", sent[len(piece) :]).split("\n")
    code = [line for line in more if not line.lstrip().startswith(remarks)]
    return max(lost, 0), weigh("".join(code))


def blanks_of(text: str) -> str:
    return text.removesuffix(text.lstrip())


Result = tuple[int, int, int]  # characters lost, too many, and read


def results(rows: Sequence[Row]) -> list[Result]:
    found = []
    for row in rows:
        sent, read = write(row)
        found.append((*compared(row, sent), read))
    return found


def figures(found: Sequence[Result]) -> dict[str, float]:
    cut, late = (100 * sum(one[at] > 0 for one in found) / len(found) for at in (0, 1))
    read = sum(read for _, _, read in found) / len(found)
    return {"cases": len(found), "cut": round(cut, 2), "late": round(late, 2), "read": round(read)}


def report(rows: Sequence[Row], found: Iterable[Result]) -> Iterator[dict[str, Any]]:
    by_row = defaultdict[str, list[Result]](list)
    by_language = defaultdict[str, dict[str, list[Result]]](lambda: defaultdict(list))
    for row, result in zip(rows, found, strict=True):
        by_row[row["row"]].append(result)
        by_language[f"{row['language']}"][row["row"]].append(result)
    for name, of in by_row.items():
        yield {"row": name} | figures(of)
    for language, table in by_language.items():
        every = list(chain.from_iterable(table.values()))
        of_rows = {name: figures(of) for name, of in table.items()}
        yield {"language": language} | figures(every) | {"rows": of_rows}


def main():
    every = ",".join(LANGUAGES)
    parser = servers.parser_of(__doc__, texts="", seed=1, cases=30, languages=every)
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    options = parser.parse_args()
    texts = Path(options.texts or "/dev/null")
    rows = rows_of(texts)
    if not rows:
        rows = [*recorded(options)]
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ProcessPoolExecutor() as pool:
        parts = [rows[at : at + PART] for at in range(0, len(rows), PART)]
        found = list(chain.from_iterable(pool.map(results, parts)))
    for line in report(rows, found):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
