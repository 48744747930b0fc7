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
    half                  the first half of a gap of several lines, which `max_tokens` cuts off
    unknown               the same lines, definitions and gaps, without their language
    typed                 a gap whose text begins with the indentation that is there already
    helper                a function and the one below it, which it calls
    loop                  a gap of several lines, the last of which is written again and again
    fenced                fenced blocks of Markdown files as answers to an instruction: behind the
                          fence (`opened`), or from the heading or the paragraph above it (`told`);
                          a Markdown file as one (`whole`)
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
from cerebrum.text.languages import LANGUAGES, language_named
from cerebrum.text.prompt import common_length, prepare

BUDGET = 3500  # tokens of a prompt
WINDOW = 1200  # characters
LONG = 1500  # characters of a turn, and of the files
FILES, TYPED = 400, 60
DEFINITIONS = 10  # of a language
ROLES = "user", "assistant"
COPIES = 40  # of a line
OTHER = "\n".join(f"other{n} = elsewhere({n})" for n in range(60))
CALL = re.compile(r"\b(\w{2,40})\(")
FENCE = re.compile(r"^( *)(```+)(\w+)[^\n`]*\n(.*?)^\1\2[ \t]*$", re.M | re.S)
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


MORE_KINDS = {"span": spans, "statement": statements, "helper": helpers}


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
        for case in islice(cases(source, chance), CASES_PER_FILE * (have[kind] < most)):
            if len(case.piece) <= MAX_PIECE:
                have[kind] += 1
                for model, text in texts_of(case, OTHER).items():
                    yield row_of(f"{kind}_{model}", language, case, text)
    if have["bare"] < most and language != "markdown":
        have["bare"] += 1
        text = source.text[:MAX_PIECE]
        yield answer_of("bare", language, "", text, text)


def of_language(language: str, options: argparse.Namespace) -> Iterator[Row]:
    chance = random.Random(f"{options.seed} {language}")
    have = Counter[str]()
    for source in sources(options.folders, language, chance):
        yield from of_source(source, have, options.cases, chance)
        if min(have[kind] for kind in KINDS) >= options.cases:
            return


def of_markdown(folders: list[str], chance: random.Random, cases: int) -> Iterator[Row]:
    """Fenced blocks with the text around them, and paragraphs without any."""
    found = list[Path]()
    for folder in folders:
        found += sorted(Path(folder).rglob("*.md"))
    have = defaultdict[str, int](int)
    for path in chance.sample(found, len(found)):
        text = path.read_text("utf-8", "replace").replace("\r\n", "\n") if path.is_file() else ""
        end = 0
        for block in islice(FENCE.finditer(text), CASES_PER_FILE):
            language = language_named(block[3].lower())
            name = next((name for name, row in LANGUAGES.items() if row is language), "")
            above, end = text[end : block.start()], block.end()
            if not name or "```" in above or have[name] >= cases or not block[4].strip():
                continue
            have[name] += 1
            after = text[block.end() : block.end() + MORE_CHARS].partition("```")[0]
            piece = "".join(
                line.removeprefix(block[1]) for line in block[4].splitlines(keepends=True)
            )
            opened = piece + block[2] + after
            yield answer_of("fenced_opened", name, f"```{name}\n", opened, piece)
            told = PARTS.split(above)[-2:]
            begin = "\n\n".join(told).lstrip("\n")
            yield answer_of("fenced_told", name, "", begin + block[0] + after, piece)
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
