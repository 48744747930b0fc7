"""What infills waste: texts of real models, recorded once, and replayed through any rule for their
end in seconds.

    python tests/bench/waste.py FILE.jsonl --record REPOSITORY,… [--model qwen_1_5b]
        [--items 160] [--half report]
    python tests/bench/waste.py FILE.jsonl [--model qwen_1_5b] [--half report]

Recording asks the model for the gaps of HumanEval's solutions and of --items places in real new
code (files of 2025 and later), each as one line, several lines and a span. Natural
ends are off: the text goes on where the model would have ended, until today's `Ending` has ended
it. Each token has its probability. What is in FILE.jsonl is not asked for again.

The report replays the texts through `Ending` as the daemon does, where a natural end ends the text:
with a wait in characters alone, as behind engines without probabilities, and with probabilities.
For each kind: the tokens generated, the share of them that is returned, the tokens until the first
and the last character of a stream go out, and how many texts are right, by HumanEval's tests or
exactly the missing text in real code. --half: the texts that the
constants were chosen by ("choose") or those that judge them ("report").
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import servers
from quality import indentation, passes, problems

from cerebrum.request import GenerationRequest
from cerebrum.text.ending import Ending
from cerebrum.vps.llama import MAX_CHUNK, Llama, Settings, Slot
from cerebrum.vps.prefixes import PrefixStore
from cerebrum.vps.tokens import common_prefix

KINDS = ("one", "several", "spans")
SEQUENCES, CONTEXT = 8, 1536
MAX_TOKENS = 160
ABOVE, BELOW = 24, 11  # lines around a gap
PLACES_EACH = 2  # places in a file

# Files that were added since then are newer than the models.
SINCE = "2025-01-01"
LANGUAGES = {".py": "python", ".ts": "typescript", ".tsx": "typescript", ".go": "go", ".rs": "rust"}
UNUSUAL = re.compile(r"(?i)(^|[/_.-])(tests?|spec|docs?|gen|generated|migrations|vendor)([/_.-]|$)")
MAX_FILE_BYTES = 200_000

Ends = tuple[int, int]  # where a gap begins and ends, in characters from its first line on

# ----------------------------------------------------------------------------------------- the gaps


def pieces_of(lines: list[str], number: int, chance: random.Random) -> dict[str, Ends]:
    """The ends of gaps of each kind that begin in this line; those that are fit."""
    line, below = lines[number].rstrip("\n"), lines[number:]
    width, size = indentation(line), chance.randint(2, 5)
    words = [at for at in range(width + 1, len(line) - 3) if not line[at - 1].isalnum()]
    found = {"one": (chance.choice([width, width, *words]), len(line))}
    if all(row.strip() for row in below[:size]) and size < len(below):
        start = chance.choice((0, width))
        found["several"] = start, len("".join(below[:size])) - chance.choice((0, 1))
    span = "".join(below[: chance.randint(1, 3)]).rstrip()
    if len(span) > width + 8:
        first, last = sorted(chance.sample(range(width, len(span) - 1), 2))
        found["spans"] = first, last
    text = "".join(below)
    return {kind: ends for kind, ends in found.items() if text[slice(*ends)].strip()}


def case_of(key: str, kind: str, language: str, text: str, ends: Ends) -> dict[str, Any]:
    """What is asked to fill a gap of a text."""
    start, stop = ends
    return {
        "key": f"{key} {kind}",
        "kind": kind,
        "language": language,
        "prompt": text[:start],
        "suffix": text[stop:],
        "expected": text[start:stop],
    }


def of_human_eval() -> Iterator[dict[str, Any]]:
    """Gaps whose lack the problem's tests notice."""
    for task in problems():
        key = task["task_id"]
        chance = random.Random(f"waste {key}")
        text = task["prompt"] + task["canonical_solution"]
        lines, first = text.splitlines(keepends=True), task["prompt"].count("\n")
        numbers = [number for number in range(first, len(lines)) if len(lines[number].strip()) >= 6]
        for kind in KINDS:
            for number in chance.sample(numbers, len(numbers)):
                ends = pieces_of(lines, number, chance).get(kind)
                if not ends:
                    continue
                above = sum(map(len, lines[:number]))
                case = case_of(key, kind, "python", text, (above + ends[0], above + ends[1]))
                if not passes(task, case["prompt"] + case["suffix"]):
                    yield case
                    break


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")


def files_since_2025(repository: str) -> list[str]:
    """The files that were added since then, in an order of chance."""
    options = (f"--since={SINCE}", "--diff-filter=A", "--format=", "--name-only", "-M100%")
    added = git(repository, "log", *options).splitlines()
    listed = git(repository, "ls-tree", "-r", "-l", "HEAD").splitlines()
    rows = [row.split(maxsplit=4) for row in listed]
    sizes = {row[4]: int(row[3]) for row in rows if row[3].isdigit()}
    fit = {path for path in added if 1500 < sizes.get(path, 0) < MAX_FILE_BYTES}
    paths = sorted(fit)
    random.Random(2).shuffle(paths)
    return paths


def of_file(name: str, path: str, language: str, lines: list[str]) -> Iterator[dict[str, Any]]:
    """Gaps at PLACES_EACH places, those of one place together."""
    chance, places = random.Random(f"waste {path}"), 0
    for number in chance.sample(range(len(lines)), len(lines)):
        if not 20 <= number < len(lines) - 8 or not 8 <= len(lines[number].strip()) <= 100:
            continue
        pieces = pieces_of(lines, number, chance)
        if len(pieces) < len(KINDS):
            continue
        above = "".join(lines[max(0, number - ABOVE) : number])
        text = above + "".join(lines[number : number + 5 + BELOW])
        for kind, (start, stop) in pieces.items():
            ends = (len(above) + start, len(above) + stop)
            yield case_of(f"{name} {path} {number}", kind, language, text, ends)
        places += 1
        if places == PLACES_EACH:
            return


def of_repository(repository: str) -> Iterator[dict[str, Any]]:
    """Gaps in the files that were added in or after 2025."""
    name = PurePosixPath(repository).parent.name or PurePosixPath(repository).name
    for path in files_since_2025(repository):
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if language and not UNUSUAL.search(path):
            text = git(repository, "show", f"HEAD:{path}").replace("\r\n", "\n")
            yield from of_file(name, path, language, text.splitlines(keepends=True))


# ---------------------------------------------------------------------------------------- recording


@dataclass
class Reading:
    """A text on its way. `tokens`: (text, its probability)."""

    case: dict[str, Any]
    prompt: list[int]
    heal: bytes
    ending: Ending
    tokens: list[tuple[str, float]] = field(default_factory=list)
    end: int | None = None  # tokens before the model would have ended, ...
    end_probability: float = 0.0  # ... and how likely that was
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, model: Llama, index: int, ends: Any) -> int | None:
        """The next token; None if the text is long enough."""
        if self.heal:
            model.restrict(index, self.heal)
        row = model.logits(index).astype(np.float64)
        chances = np.exp(row - row.max())
        chances /= chances.sum()
        if int(chances.argmax()) in ends.tolist() and self.end is None:
            self.end, self.end_probability = len(self.tokens), round(float(chances.max()), 4)
        chances[ends] = -1
        token = int(chances.argmax())
        piece = model.vocabulary.piece(token)
        known = min(len(piece), len(self.heal))
        self.heal, piece = self.heal[known:], piece[known:]
        text = self.decoder.decode(piece)
        # As on the VPS: where the text is healed alone, the model had no choice.
        self.tokens.append((text, round(float(chances[token]), 4) if piece else 1.0))
        _, reason = self.ending.feed(text)
        return None if reason or len(self.tokens) == self.case.get("most", MAX_TOKENS) else token


def begin(model: Llama, case: dict[str, Any]) -> Reading:
    prompt, suffix = case["prompt"], case["suffix"]
    request = GenerationRequest(
        prompt=prompt, suffix=suffix, language=case["language"], mode="infill", heal=True
    )
    tokens, heal, _ = model.vocabulary.encode(request)
    stops = case.get("stop", ())
    ending = Ending("infill", case["language"], prompt, suffix, "auto", 0, stops)
    return Reading(case, tokens, heal, ending)


def read_prompt(model: Llama, slot: Slot, prompt: list[int]) -> int:
    """The place of the prompt's last token in the last batch."""
    model.cut(slot, PrefixStore(0, model.recurrent).reusable(slot.tokens, prompt))
    last = 0
    while left := prompt[len(slot.tokens) :][:MAX_CHUNK]:
        assert model.decode([(slot, left, 1)]) == 0
        slot.tokens += left
        last = len(left) - 1
    return last


def record(
    model: Llama, cases: Iterable[dict[str, Any]], sequences: int = SEQUENCES
) -> Iterator[Reading]:
    """Several texts at a time. A slot that is free keeps its tokens for a prompt with the same
    beginning.
    """
    ids = range(model.n_vocab)
    ends = np.array([token for token in ids if model.vocabulary.is_end(token)])
    free = [Slot(number) for number in range(sequences)]
    running = dict[int, tuple[Slot, Reading, int]]()
    waiting = iter(cases)
    while True:
        while free and (case := next(waiting, None)):
            reading = begin(model, case)
            slot = max(free, key=lambda slot: common_prefix(slot.tokens, reading.prompt))
            if len(reading.prompt) + MAX_TOKENS > model.n_ctx:
                continue
            last = read_prompt(model, slot, reading.prompt)
            free.remove(slot)
            token = reading.add(model, last, ends)
            if token is None:
                free.append(slot)
                yield reading
            else:
                running[slot.id] = slot, reading, token
        if not running:
            return
        batch = [*running.values()]
        assert model.decode([(slot, [token], 1) for slot, _, token in batch]) == 0
        for index, (slot, reading, token) in enumerate(batch):
            slot.tokens.append(token)
            following = reading.add(model, index, ends)
            if following is None:
                del running[slot.id]
                free.append(slot)
                yield reading
            else:
                running[slot.id] = slot, reading, following


def half_of(key: str) -> str:
    """A rule is chosen by a part of HumanEval's problems and of the places, and judged by the
    others.
    """
    place = key.rpartition(" ")[0]
    if place.startswith("HumanEval/"):
        return "choose" if int(place.removeprefix("HumanEval/")) < 64 else "report"
    return "choose" if hashlib.sha256(place.encode()).digest()[0] < 32 else "report"


def record_all(options: argparse.Namespace, known: set[str]) -> None:
    turns = zip_longest(*map(of_repository, options.record.split(",")))
    real = filter(None, chain.from_iterable(turns))
    pairs = zip_longest(islice(real, options.items * len(KINDS)), of_human_eval())
    new = [case for case in chain.from_iterable(pairs) if case and case["key"] not in known]
    cases = [case for case in new if options.half in ("", half_of(case["key"]))]
    settings = Settings(n_ctx=CONTEXT, sequences=SEQUENCES)
    model = Llama(servers.weights_of(options.model), settings, lambda _: True)
    append(options.file, options.model, record(model, cases), len(cases))


def append(file: Path, model: str, readings: Iterable[Reading], count: int) -> None:
    """Write each text into the file once it has ended."""
    with file.open("a") as out:
        for number, reading in enumerate(readings):
            row = reading.case | {"model": model, "read": len(reading.prompt)}
            row |= {"end": reading.end, "end_probability": reading.end_probability}
            out.write(json.dumps(row | {"tokens": reading.tokens}) + "\n")
            out.flush()
            if number % 50 == 0:
                print(f"{number} of {count}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- replaying


class Replay(NamedTuple):
    """What the daemon would have generated and returned."""

    generated: int  # tokens
    text: str
    first: int  # tokens before the first character went out ...
    last: int  # ... and the last


def pieces(row: dict[str, Any], probabilities: bool) -> Iterator[str]:
    """What goes out after each token."""
    ending = Ending("infill", row["language"], row["prompt"], row["suffix"], "auto")
    for number, (text, probability) in enumerate(row["tokens"]):
        if number == row["end"]:
            yield ending.flush()
            return
        out, reason = ending.feed(text, probability if probabilities else 1.0)
        if reason or number + 1 < len(row["tokens"]):
            yield out
        else:
            yield out + ending.flush(whole=False)
        if reason:
            return


def replay(row: dict[str, Any], probabilities: bool) -> Replay:
    out = list(pieces(row, probabilities))
    sent = [number for number, piece in enumerate(out, 1) if piece] or [0]
    return Replay(len(out), "".join(out), sent[0], sent[-1])


def returned(row: dict[str, Any], text: str) -> int:
    """How many of the tokens have a part in this text."""
    ends = accumulate(len(text) for text, _ in row["tokens"])
    before = sum(end < len(text) for end in ends)
    return min(before + 1, len(row["tokens"])) if text else 0


def is_right(row: dict[str, Any], text: str, tasks: Mapping[str, dict[str, str]]) -> bool:
    if task := tasks.get(row["key"].split()[0]):
        return passes(task, row["prompt"] + text + row["suffix"])
    return bool(text.rstrip() == row["expected"].rstrip())


def figures(rows: list[dict[str, Any]], probabilities: bool) -> tuple[dict[str, Any], list[bool]]:
    """How the texts end, and which of them are right."""
    tasks = {task["task_id"]: task for task in problems()}
    replays = [replay(row, probabilities) for row in rows]
    pairs = list(zip(rows, replays, strict=True))
    right = [is_right(row, found.text, tasks) for row, found in pairs]
    kept = sum(min(found.generated, returned(row, found.text)) for row, found in pairs)
    generated = sum(found.generated for found in replays)
    shown = [found for found in replays if found.text]
    result = {
        "generated": round(generated / max(1, len(rows)), 1),
        "share": round(kept / max(1, generated), 3),
        "first": round(sum(found.first for found in shown) / max(1, len(shown)), 1),
        "last": round(sum(found.last for found in shown) / max(1, len(shown)), 1),
        "right": sum(right),
    }
    return result, right


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each kind: the texts as they end without and with probabilities."""
    table = dict[str, Any]()
    for kind in KINDS:
        found = [row for row in rows if row["kind"] == kind]
        was, right = figures(found, probabilities=False)
        now, still = figures(found, probabilities=True)
        changes = [old - new for old, new in zip(right, still, strict=True)]
        table[kind] = {
            "items": len(found),
            "by_characters": was,
            "by_doubt": now,
            "ratio": round(now["generated"] / max(0.1, was["generated"]), 2),
            "newly_wrong": changes.count(1),
            "newly_right": changes.count(-1),
        }
    return table


def main() -> None:
    parser = servers.parser_of(__doc__, model="qwen_0_5b", record="", items=160, half="")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    rows = list[dict[str, Any]]()
    if options.file.exists():
        rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == options.model]
    if options.record:
        record_all(options, {row["key"] for row in rows})
        return
    chosen = [row for row in rows if options.half in ("", half_of(row["key"]))]
    name = {"benchmark": "waste", "model": options.model, "half": options.half}
    print(json.dumps(name | report(chosen)))


if __name__ == "__main__":
    main()
