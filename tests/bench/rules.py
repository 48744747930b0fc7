"""What each rule of a text is worth: texts recorded once, and replayed without a model.

    python tests/bench/rules.py FILE.jsonl --record [FOLDER ...] [--cases 30] [--answers 0]
        [--waste FILE.jsonl]
    python tests/bench/rules.py FILE.jsonl [--rows PATTERN] [--show 3]

Recording takes texts of real files below the folders (default: those of ending.py), --cases of each
kind in each language, and writes each into FILE.jsonl with what must remain of it. The rows:

    header, member,       the kinds of ending.py, with what its models write: `line_on`; `window` in
    line, lines, closed   front: with the window near the cursor that `prepare` sends; `client`:
                          with one of 1,200 characters that begins anywhere, as editors cut it
    span                  a gap that begins and ends within lines, of up to three lines
    statement             from within the first line of a statement at the margin that takes several
    margin                from within one that takes one, or in languages with blocks by lines up to
                          a blank line
    below                 the same from right below a comment
    next                  definitions at the margin, from the beginning of their line, below a
                          blank one
    docstring             definitions in a window that begins in a docstring
    remark                definitions with a comment below a blank line that is not indented more
    script                what follows #! in the first line
    again                 for gaps that end within a line: the model writes its rest and ends
    half                  the first half of a gap of several lines, which `max_tokens` cuts off
    unknown               the same lines, definitions and gaps, without their language
    typed                 a gap whose text begins with the indentation that is there already
    helper                a function and the one below it, which it calls
    loop, endless         a gap of several lines, the last of which, or the last word of which, is
                          written again and again
    fenced                fenced blocks of Markdown files as answers to an instruction: behind the
                          fence (`opened`), from the heading or the paragraph above it (`told`), or
                          from the block above it, of shell commands or the like (`beside`); a
                          Markdown file as one (`whole`)
    bare                  a file as an answer without a fence
    prose                 a paragraph of Markdown as an answer
    answer                with --answers: what the 0.5B says to so many of HumanEval's problems,
                          where today's end leaves a right program of it
    waste                 with --waste: the gaps of a recording of waste.py with their probabilities
                          that today's end leaves right

Replaying prints for each row and for each language the cases, the percentage that are `cut` (lost
some of what must remain) and `late` (got more), and the mean number of characters that were read.
Then three rows of the prompts, made of the same files: `chat` and `typing`, the percentage of their
characters that the prompt before did not begin with, for turns of a chat and for lines typed in a
long file; and `named`, the percentage of definitions in a long file that an instruction names and
its prompt does not have.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

import servers
from ending import (
    CASES_PER_FILE,
    CLAUSE,
    CLOSER,
    FOLDERS,
    GAPS,
    IGNORED,
    KINDS,
    MAX_PIECE,
    MORE_CHARS,
    TOKEN,
    Case,
    Line,
    Source,
    cases_of,
    cut_to,
    judge,
    sources,
    texts_of,
)
from quality import passes, problems
from waste import replay

from cerebrum.text.ending import Ending
from cerebrum.text.fences import BESIDE
from cerebrum.text.languages import LANGUAGES, language_named
from cerebrum.text.prompt import common_length, prepare

BUDGET = 3500  # tokens of a prompt
WINDOW = 1200  # characters
LONG = 1500  # characters of a turn, and of the files
FILES, TYPED = 400, 60
DEFINITIONS = 10  # of a language
MOST_FILES = 400  # of a language
ROLES = "user", "assistant"
COPIES = 40  # of a line
OTHER = "\n".join(f"other{n} = elsewhere({n})" for n in range(60))
CALL = re.compile(r"\b(\w{2,40})\(")
FENCE = re.compile(r"^( *)(```+)(\w+)[^\n`]*\n(.*?)^\1\2[ \t]*$", re.M | re.S)
DOCSTRING = re.compile(r'^ *[rR]?"{3}(?=[^"\n]*\n)([^"\\]+?)"{3} *$', re.M)
SHELLS = ("shell", "powershell", "json", "yaml", "toml", "markdown")
PARTS = re.compile(r"\n{2,}")
MIN_LINE = 6  # characters
MODEL = "qwen_0_5b"
PART = 500  # texts that a process replays at once
Row = dict[str, Any]  # see `row_of`

# ---------------------------------------------------------------------------------------- recording


def row_of(row: str, language: str | None, case: Case, text: str) -> Row:
    """A text that a model writes at a case's cursor."""
    mode = "infill" if case.kind in GAPS else "complete"
    suffix = case.after if mode == "infill" else None
    fields = {"row": row, "language": language, "mode": mode, "kind": case.kind}
    return fields | {"prompt": case.prompt, "suffix": suffix, "text": text, "piece": case.piece}


def answer_of(row: str, language: str, begun: str, text: str, piece: str) -> Row:
    fields = {"row": row, "language": language, "mode": "instruct", "kind": "answer"}
    return fields | {"prompt": begun, "suffix": None, "text": text, "piece": piece}


def rows_of_case(language: str, case: Case, window: bool) -> Iterator[Row]:
    """A case with each model's text, and where it is fit for more, with those."""
    name = f"window_{case.kind}" if window else case.kind
    for model, text in texts_of(case, OTHER).items():
        yield row_of(f"{name}_{model}", language, case, text) | {"window": window}
    yield from again(case.kind, language, case)
    if window:
        near = cut_to(case, WINDOW)
        yield row_of(f"client_{case.kind}", language, near, case.piece + case.after[:MORE_CHARS])
    if case.kind == "lines":
        half = case._replace(piece=case.piece[: len(case.piece) // 2])
        yield row_of("half", language, half, half.piece) | {"whole": False}
    if case.kind in ("header", "line", "lines"):
        text = case.piece + case.after[:MORE_CHARS]
        yield row_of(f"unknown_{case.kind}", None, case, text)
    line = case.prompt.rpartition("\n")[2]
    if case.kind in GAPS and line and not line.strip():
        yield row_of("typed", language, case, line + case.piece)
    last = case.piece.rstrip().rpartition("\n")[2]
    if case.kind == "lines" and len(last.strip()) >= MIN_LINE and case.piece.endswith("\n"):
        yield row_of("loop", language, case, case.piece + COPIES * f"{last}\n")
        text = case.piece.rstrip()
        yield row_of("endless", language, case, text + 10 * COPIES * f" {last.split()[-1]}")


def again(row: str, language: str, case: Case) -> Iterator[Row]:
    """A model that writes the rest of the cursor's line, and ends by itself."""
    rest = case.after.partition("\n")[0]
    if case.kind in GAPS and rest.strip():
        yield row_of(f"{row}_again", language, case, case.piece + rest)


def place_of(source: Source, line: Line) -> int:
    """Where a line's text begins."""
    return source.text.index(line.text, line.start)


def spans(source: Source, chance: random.Random) -> Iterator[Case]:
    """Gaps from within a line to within one of the next three."""
    for number in chance.sample(range(len(source.lines) - 3), max(0, len(source.lines) - 3)):
        first, last = source.lines[number], source.lines[number + chance.randrange(3)]
        ends = [at for at in range(1, len(last.text)) if not last.text[at - 1].isalnum()]
        if not first.code or not last.code or not ends:
            continue
        start = place_of(source, first) + chance.randrange(len(first.text))
        stop = place_of(source, last) + chance.choice(ends)
        if start + 4 < stop:
            yield source.case_of("lines", start, stop)


def statements(source: Source, chance: random.Random) -> Iterator[Case]:
    """From within the first lines of statements at the margin."""
    for number in chance.sample(range(len(source.lines) - 1), max(0, len(source.lines) - 1)):
        line, below = source.lines[number : number + 2]
        if not line.code or line.indent or source.is_header(number) or below.indent == 0:
            continue
        if CLOSER.match(line.text) or CLAUSE.match(line.text) or IGNORED.match(line.text):
            continue
        last = source.end_of(number)
        if last is not None:
            start = line.start + chance.randrange(1, len(line.text) + 1)
            end = source.lines[last + 1 : last + 2]
            yield source.case_of("header", start, end[0].start if end else len(source.text))


def helpers(source: Source, chance: random.Random) -> Iterator[Case]:
    """Functions that call the one right below them, which is not defined above."""
    numbers = range(len(source.lines) - 1)
    for number in chance.sample(numbers, len(numbers)):
        if not source.is_header(number) or (last := source.end_of(number)) is None:
            continue
        below = next((at for at in numbers[last + 1 :] if source.lines[at].code), None)
        if below is None or not source.is_header(below):
            continue
        end = source.end_of(below)
        name = CALL.search(source.lines[below].text)
        if end is None or not name or source.lines[below].indent:
            continue
        place = source.lines[number + 1].start
        first = source.text[place : source.lines[last + 1].start]
        if name[1] not in CALL.findall(first) or f"{name[1]}(" in source.text[:place]:
            continue
        after = source.lines[end + 1 : end + 2]
        yield source.case_of("header", place, after[0].start if after else len(source.text))


def margins(source: Source, chance: random.Random, below: bool = False) -> Iterator[Case]:
    """From within the first line of paragraphs without blocks, or of statements of one line; or
    from right below a comment.
    """
    lines = source.lines
    by_lines = source.syntax.blocks not in ("braces", "brackets")
    for number in chance.sample(range(1, len(lines) - 1), max(0, len(lines) - 2)):
        line = lines[number]
        if not line.code or line.indent or source.is_header(number):
            continue
        if any(pattern.match(line.text) for pattern in (CLOSER, CLAUSE, IGNORED)):
            continue
        above = lines[number - 1]
        if below != (source.comment[above.start : above.start + 1] == b"\1"):
            continue
        ends = range(number + 1, len(lines))
        end = next((at for at in ends if not by_lines or not lines[at].text), len(lines) - 1)
        inside = range(number + 1, end + 1)
        if any(lines[at].text and (lines[at].indent or not lines[at].code) for at in inside):
            continue
        if not source.syntax.imports.match(line.text) and not CLOSER.match(lines[end].text):
            start = line.start + (0 if below else chance.randrange(1, len(line.text) + 1))
            yield source.case_of("header", start, lines[end].start)


def belows(source: Source, chance: random.Random) -> Iterator[Case]:
    return margins(source, chance, below=True)


def nexts(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions at the margin below a blank line, from the beginning of theirs."""
    lines = source.lines
    for number in chance.sample(range(1, len(lines) - 1), max(0, len(lines) - 2)):
        line, above = lines[number], lines[number - 1]
        if above.text or line.indent or not source.is_header(number):
            continue
        if (last := source.end_of(number)) is not None:
            end = lines[last + 1 : last + 2]
            yield source.case_of("header", line.start, end[0].start if end else len(source.text))


def docstrings(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions with a prompt that begins within a docstring."""
    for case in source.definitions("header", chance) if source.language == "python" else ():
        found = list(DOCSTRING.finditer(case.prompt))
        if found:
            docstring = chance.choice(found)
            yield case._replace(prompt=case.prompt[chance.randrange(*docstring.span(1)) + 1 :])


def remarks(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions within which a comment that is not indented follows a blank line."""
    for number, line in enumerate(source.lines[:-1]):
        last = source.end_of(number) if source.is_header(number) else None
        within = itertools.pairwise(source.lines[number + 1 : (last or number) + 1])
        starts = source.syntax.comment_starts
        if starts and any(
            not above.text and below.text.startswith(starts) and below.indent <= line.indent
            for above, below in within
        ):
            after = source.lines[last + 1 : last + 2]
            end = after[0].start if after else len(source.text)
            yield source.case_of("header", source.lines[number + 1].start, end)


def scripts(source: Source, _: random.Random) -> Iterator[Case]:
    if source.text.startswith("#!"):
        end = source.text.rfind("\n", 0, MAX_PIECE) + 1
        yield source.case_of("header", source.text.index("\n") + 1, end)


MORE_KINDS = {
    "span": spans,
    "statement": statements,
    "helper": helpers,
    "margin": margins,
    "below": belows,
    "next": nexts,
    "docstring": docstrings,
    "remark": remarks,
    "script": scripts,
}
FEW_LANGUAGES = {"docstring": 10, "remark": 3, "script": 5}  # so many times as many cases


def of_source(
    source: Source, have: Counter[str], most: int, chance: random.Random
) -> Iterator[Row]:
    """Up to CASES_PER_FILE cases of each kind of which there are not enough yet."""
    language = source.language
    for kind in KINDS:
        for case in cases_of(source, kind, chance) if have[kind] < most else ():
            have[kind] += 1
            yield from rows_of_case(language, case, kind in GAPS and have[kind] % 2 == 0)
    for kind, cases in MORE_KINDS.items():
        wanted = have[kind] < most * FEW_LANGUAGES.get(kind, 1)
        for case in islice(cases(source, chance), CASES_PER_FILE * wanted):
            if len(case.piece) <= MAX_PIECE:
                have[kind] += 1
                for model, text in texts_of(case, OTHER).items():
                    yield row_of(f"{kind}_{model}", language, case, text)
                yield from again(kind, language, case)
    if have["bare"] < most and language != "markdown":
        have["bare"] += 1
        text = source.text[:MAX_PIECE]
        yield answer_of("bare", language, "", text, text)


def of_language(language: str, options: argparse.Namespace) -> Iterator[Row]:
    chance = random.Random(f"{options.seed} {language}")
    have = Counter[str]()
    for source in islice(sources(options.folders, language, chance), MOST_FILES):
        yield from of_source(source, have, options.cases, chance)


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
            yield answer_of("fenced_opened", name, f"```{name}\n", opened, piece)
            told = PARTS.split(above)[-2:]
            begin = "\n\n".join(told).lstrip("\n")
            yield answer_of("fenced_told", name, "", begin + block[0] + after, piece)
        is_code = name not in SHELLS and have["beside"] < 10 * cases
        if before and before[3].lower() in BESIDE and is_code:
            have["beside"] += 1
            yield answer_of("fenced_beside", name, "", text[before.start() : end] + after, piece)


def of_markdown(folders: list[str], chance: random.Random, cases: int) -> Iterator[Row]:
    """Fenced blocks, whole files with fences, and paragraphs without any."""
    found = list[Path]()
    for folder in folders:
        found += sorted(Path(folder).rglob("*.md"))
    have = Counter[str]()
    for path in chance.sample(found, len(found)):
        text = path.read_text("utf-8", "replace").replace("\r\n", "\n") if path.is_file() else ""
        yield from fenced(text, have, cases)
        if text.count("```") % 2 == 0 and "```" in text and have["whole"] < 5 * cases:
            have["whole"] += 1
            whole = text[:MAX_PIECE].rpartition("\n```\n")[0] + "\n```\n"
            answer = f"```markdown\n{whole}```\n\nThat is it.\n"
            yield answer_of("fenced_whole", "markdown", "", answer, whole)
        prose = next((part for part in PARTS.split(text) if len(part) > 200), "")
        if prose and not re.search("```|~~~|<|^    ", prose) and have["prose"] < 5 * cases:
            have["prose"] += 1
            yield answer_of("prose", "python", "", prose, prose)


def of_model(count: int) -> Iterator[Row]:
    """The 0.5B's answers to HumanEval's problems, and the programs in them that are right."""
    if not count:
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _, pi = servers.both(stack, folder)
        url = f"http://127.0.0.1:{pi.port}/v1/chat/completions"
        for task in islice(problems(), count):
            question = f"Complete this function:\n```python\n{task['prompt']}```"
            messages = [{"role": "user", "content": question}]
            answer = servers.ask(url, model=MODEL, messages=messages, max_tokens=400, temperature=0)
            row = answer_of("answer", "python", "", answer["choices"][0]["message"]["content"], "")
            row["piece"] = write(row)[0]
            if passes(task, row["piece"]):
                yield row


def of_waste(file: str) -> Iterator[Row]:
    """The gaps of a recording that are filled right today."""
    for gap in map(json.loads, Path(file).read_text().splitlines()) if file else ():
        text = replay(gap, probabilities=True).text
        if text.rstrip() == gap["expected"].rstrip():
            case = Case("line", gap["prompt"], gap["expected"], gap["suffix"])
            row = row_of("waste", gap["language"], case, "")
            yield row | {"tokens": gap["tokens"], "end": gap["end"]}


def record(options: argparse.Namespace) -> None:
    chance = random.Random(options.seed)
    found = [of_waste(options.waste), of_model(options.answers)]
    found.append(of_markdown(options.folders, chance, options.cases))
    found += [of_language(language, options) for language in options.languages.split(",")]
    with Path(options.file).open("a") as out:
        for row in itertools.chain.from_iterable(found):
            out.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------------------- replaying


def tokens_of(row: Row) -> Iterator[tuple[str, float]]:
    if "tokens" not in row:
        for token in TOKEN.findall(row["text"]):
            yield token, 1.0
        return
    for token, probability in row["tokens"][: row["end"]]:
        yield token, probability


def write(row: Row) -> tuple[str, int]:
    """What the client gets of a text, and how many characters were read for it."""
    prompt, suffix = row["prompt"], row["suffix"]
    if row.get("window"):
        body = prepare(row, row["mode"], BUDGET, 0, layout="spmv2").body
        prompt, suffix = body["prompt"], body["suffix"]
    ending = Ending(row["mode"], row["language"], prompt, suffix, "auto")
    sent, read = "", 0
    for token, probability in tokens_of(row):
        out, reason = ending.feed(token, probability)
        sent, read = sent + out, read + len(token)
        if reason:
            return sent, read
    return sent + ending.flush(row.get("whole", True)), read


def blanks_of(text: str) -> str:
    return text.removesuffix(text.lstrip())


def compared(row: Row, sent: str) -> tuple[int, int]:
    """(characters lost, characters too many)."""
    piece = row["piece"]
    if row["mode"] != "instruct":
        lost, more = judge(row["language"], Case(row["kind"], "", piece, ""), sent)
        if row["row"] == "typed":
            more += blanks_of(sent) != blanks_of(piece)
        return lost, more
    wanted, got = "".join(piece.split()), "".join(sent.split())
    return (0, len(got) - len(wanted)) if got.startswith(wanted) else (len(wanted), 0)


Result = tuple[int, int, int]  # characters lost, too many, and read


def results(rows: Sequence[Row]) -> list[Result]:
    found = list[Result]()
    for row in rows:
        sent, read = write(row)
        found.append((*compared(row, sent), read))
    return found


def figures(found: Sequence[Result]) -> dict[str, float]:
    cut, late = (100 * sum(one[at] > 0 for one in found) / len(found) for at in (0, 1))
    read = sum(read for _, _, read in found) / len(found)
    return {"cases": len(found), "cut": round(cut, 2), "late": round(late, 2), "read": round(read)}


def fresh(texts: Iterable[str]) -> float:
    """The percentage of the texts' characters that the text before does not begin with."""
    read = total = 0
    for before, text in itertools.pairwise(texts):
        total += len(text)
        read += len(text) - common_length(text, before)
    return round(100 * read / total, 2)


def prompt_rows(rows: Sequence[Row]) -> dict[str, float]:
    files = [row for row in rows if row["row"] == "bare" and len(row["text"]) > LONG][:FILES]
    turns = [{"role": ROLES[at % 2], "content": row["text"][:LONG]} for at, row in enumerate(files)]
    asked = range(1, len(turns), 2)
    chats = [prepare({"messages": turns[:at]}, "chat", BUDGET).body["messages"] for at in asked]
    typed = list[str]()
    missing = named = 0
    for language, found in itertools.groupby(files, key=lambda row: row["language"]):
        lines = "".join(row["text"] for row in found).splitlines(keepends=True)
        text = "".join(lines)
        fields = {"language": language, "prompt": text}
        for match in islice(LANGUAGES[language].defines.finditer(text), DEFINITIONS):
            fields["instruction"] = f"Let {match[match.lastindex or 0]} log what it does"
            content = prepare(fields, "instruct", BUDGET).body["messages"][0]["content"]
            named += 1
            missing += match[0] not in content
        for at in range(len(lines) - TYPED, len(lines)):
            part = {"language": language, "prompt": "".join(lines[:at]), "suffix": "\n"}
            typed.append(prepare(part, "infill", BUDGET).up_to_cursor)
    return {
        "chat": fresh("".join(message["content"] for message in chat) for chat in chats),
        "typing": fresh(typed),
        "named": round(100 * missing / named, 2),
    }


def rows_of(file: str, pattern: str) -> list[Row]:
    rows = map(json.loads, Path(file).read_text().splitlines())
    return [row for row in rows if re.search(pattern, row["row"])]


def show(rows: Sequence[Row], found: Sequence[Result], count: int) -> None:
    wrong = [row for row, (lost, more, _) in zip(rows, found, strict=True) if lost or more]
    for row in random.Random(1).sample(wrong, min(count, len(wrong))):
        print(f"--- {row['row']} {row['language']}\n{row['prompt'][-300:]}«{row['piece']}»")
        print(f"  sent: {write(row)[0][-300:]!r}\n")


def main() -> None:
    parser = servers.parser_of(
        __doc__,
        cases=30,
        answers=0,
        waste="",
        rows="",
        show=0,
        seed=1,
        languages=",".join(LANGUAGES),
    )
    parser.add_argument("file")
    parser.add_argument("--record", nargs="*", dest="folders")
    options = parser.parse_args()
    if options.folders is not None:
        options.folders = options.folders or FOLDERS
        record(options)
        return
    rows = rows_of(options.file, options.rows)
    with ProcessPoolExecutor() as pool:
        parts = [rows[at : at + PART] for at in range(0, len(rows), PART)]
        found = list(itertools.chain.from_iterable(pool.map(results, parts)))
    table = defaultdict[str, list[Result]](list)
    for row, result in zip(rows, found, strict=True):
        table[row["row"]].append(result)
        table[f"{row['language']}"].append(result)
    for name, of in table.items():
        print(json.dumps({"row": name} | figures(of)))
    if not options.rows:
        print(json.dumps(prompt_rows(rows)))
    show(rows, found, options.show)


if __name__ == "__main__":
    main()
