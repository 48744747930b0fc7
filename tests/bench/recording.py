"""What a model writes into gaps, with the probability of each token, for waste.py and hints.py."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import servers
from gaps import Case

from cerebrum.request import GenerationRequest
from cerebrum.text.ending import Ending
from cerebrum.vps.llama import MAX_CHUNK, Llama, Settings, Slot
from cerebrum.vps.prefixes import PrefixStore, common_prefix

SEQUENCES, CONTEXT = 16, 1024
MAX_TOKENS = 160


@dataclass
class Reading:
    """A text on its way. `tokens`: (text, its probability)."""

    case: Case
    prompt: list[int]
    heal: bytes
    ending: Ending
    tokens: list[tuple[str, float]] = field(default_factory=list)
    end: int | None = None  # tokens before the model would have ended
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, model: Llama, index: int, ends: Any) -> int | None:
        """The next token; None if the text is long enough."""
        if self.heal:
            model.restrict(index, self.heal)
        row = model.logits(index).astype(np.float64)
        chances = np.exp(row - row.max())
        chances /= chances.sum()
        if int(chances.argmax()) in ends.tolist() and self.end is None:
            self.end = len(self.tokens)
            if not self.case.get("beyond", True):
                return None
        chances[ends] = -1
        token = int(chances.argmax())
        piece = model.vocabulary.piece(token)
        known = min(len(piece), len(self.heal))
        self.heal, piece = self.heal[known:], piece[known:]
        text = self.decoder.decode(piece)
        # As on the VPS: where the text is healed alone, the model had no choice.
        self.tokens.append((text, round(float(chances[token]), 4) if piece else 1.0))
        _, reason = self.ending.feed(text)
        most = self.case.get("most", MAX_TOKENS)
        return None if reason or len(self.tokens) == most else token


def begin(model: Llama, case: Case) -> Reading:
    names = ("prompt", "suffix", "messages", "language")
    fields = {name: case[name] for name in names if name in case}
    mode = case.get("mode", "infill")
    request = GenerationRequest(**fields, mode=mode, heal=True)
    tokens, _, heal = model.vocabulary.encode(request)
    stop_at = case.get("stop_at", "auto")
    ending = Ending(mode, case["language"], case["prompt"], case["suffix"], stop_at)
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


def readings(model: Llama, cases: Iterable[Case]) -> Iterator[Reading]:
    """Several texts at a time. A slot that is free keeps its tokens for a prompt with the same
    beginning.
    """
    ids = range(model.n_vocab)
    ends = np.array([token for token in ids if model.vocabulary.is_end(token)])
    free = [Slot(number) for number in range(SEQUENCES)]
    running = []  # with the last token

    def go_on(slot: Slot, reading: Reading, index: int) -> Iterator[Reading]:
        token = reading.add(model, index, ends)
        if token is None:
            free.append(slot)
            yield reading
        else:
            running.append((slot, reading, token))

    waiting = iter(cases)
    while True:
        while free and (case := next(waiting, None)):
            reading = begin(model, case)
            if len(reading.prompt) + MAX_TOKENS <= model.n_ctx:
                slot = max(free, key=lambda slot: common_prefix(slot.tokens, reading.prompt))
                free.remove(slot)
                yield from go_on(slot, reading, read_prompt(model, slot, reading.prompt))
        if not running:
            return
        batch, running[:] = running[:], []
        assert model.decode([(slot, [token], 1) for slot, _, token in batch]) == 0
        for index, (slot, reading, token) in enumerate(batch):
            slot.tokens.append(token)
            yield from go_on(slot, reading, index)


def record(file: Path, name: str, cases: list[Case]):
    """Write what a model says into the file, each text once it has ended."""
    settings = Settings(n_ctx=CONTEXT, sequences=SEQUENCES)
    model = Llama(servers.weights_of(name), settings)
    with file.open("a") as out:
        for number, reading in enumerate(readings(model, cases)):
            row = reading.case | {"model": name, "end": reading.end, "tokens": reading.tokens}
            out.write(json.dumps(row) + "\n")
            out.flush()
            if number % 50 == 0:
                print(f"{number} of {len(cases)}", file=sys.stderr)
