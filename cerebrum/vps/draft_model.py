"""A draft model: a small model that writes ahead of a large one of the same family.

`DraftModel` follows the large model's sequences, and says which token it expects next. It belongs
to the worker of the large model, whose `Decoder` asks it and checks what it wrote.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cerebrum.vps.compute import Compute, ModelTally
from cerebrum.vps.drafts import MODEL_LENGTH
from cerebrum.vps.job import Run
from cerebrum.vps.llama import Llama, ModelError, Slot, file_stamp, is_recurrent, load_model
from cerebrum.vps.schedule import Costs
from cerebrum.vps.tokens import common_prefix
from cerebrum.vps.vocabulary import api

LAST = -1  # the last logits of a decode
MAX_PADDING = 256  # ids that only one of two vocabularies has


# They read the type of a vocabulary, and what it puts around a text.
VOCABULARY_READERS = (
    api.llama_vocab_type,
    api.llama_vocab_bos,
    api.llama_vocab_eos,
    api.llama_vocab_eot,
    api.llama_vocab_get_add_bos,
    api.llama_vocab_get_add_eos,
)


def check_pair(path: Path, draft: Path) -> None:
    """ModelError if the model of the file `draft` cannot write ahead of the other one. OSError if a
    file cannot be read.
    """
    if reason := _mismatch(path, file_stamp(path), draft, file_stamp(draft)):
        raise ModelError(reason)


@functools.lru_cache(64)  # large vocabularies take two seconds
def _mismatch(path: Path, _stamp: str, draft: Path, _draft_stamp: str) -> str:
    """Why two models cannot be a pair, "" if they can."""
    with contextlib.ExitStack() as loaded:
        models = []
        for file in (path, draft):
            models.append(load_model(file, weights=False))
            loaded.callback(api.llama_model_free, models[-1])
        if any(map(is_recurrent, models)):
            return "a recurrent model cannot take back tokens"
        return _difference(*map(api.llama_model_get_vocab, models))


def _difference(ours: Any, theirs: Any) -> str:
    """In what the draft model's vocabulary differs too much from the large model's."""
    if any(read(ours) != read(theirs) for read in VOCABULARY_READERS):
        return "its vocabulary is of another type, or begins and ends texts otherwise"
    wanted, got = map(api.llama_vocab_n_tokens, (ours, theirs))
    if abs(wanted - got) > MAX_PADDING:
        return f"it has {got} tokens instead of {wanted}"
    for read in (api.llama_vocab_get_text, api.llama_vocab_get_attr):
        for token in range(min(wanted, got)):
            if read(ours, token) != read(theirs, token):
                return f"its token {token} is another one"
    return ""


@dataclass(eq=False)
class DraftModel:
    """A small model that follows the sequences of a large one, each in the slot of the same number.

    Owned by the large model's worker; every call is from its thread.
    """

    model: Llama
    costs: Costs
    compute: Compute
    tally: ModelTally
    known: int  # ids that both models have
    slots: Sequence[Slot]

    def follow(self, number: int, tokens: list[int]) -> list[int]:
        """Cut the slot of this number to what it has of a sequence of `tokens`, which are not
        empty, and return what it lacks: at least one token, or none if this model cannot have the
        sequence. The whole sequence is read, since a model that reads only the end of it is right
        less often.
        """
        slot = self.slots[number]
        self.model.cut(slot, min(common_prefix(slot.tokens, tokens), len(tokens) - 1))
        lacking = tokens[len(slot.tokens) :]
        fits = len(tokens) + MODEL_LENGTH < self.model.n_ctx
        return lacking if fits and max(lacking) < self.known else []

    def continuations(self, run: Run, lacking: list[int]) -> Iterator[tuple[int, float]]:
        """Read what is lacking of a run, then say what comes next, token by token, with
        probabilities. Each is read when the next one is asked for.
        """
        unread = lacking
        while self.read(run.slot.id, unread, [run]) == 0:
            token = self.model.greedy(LAST)
            yield token, self.model.probability(LAST, token)
            unread = [token]

    def read(self, number: int, tokens: list[int], runs: Sequence[Run]) -> int | None:
        """Append these tokens to the slot of this number, for these runs; without any, for nobody
        yet, and any request may abort it. Returns the answer of `Compute.decode`.
        """
        slot = self.slots[number]
        code, begin = self.compute.decode(self.model, self.costs, runs, [(slot, tokens, 1)])
        if runs and begin:  # else nobody waited, or there was no decode
            self.tally.ahead_seconds += time.perf_counter() - begin
        if code == 0:  # otherwise `follow` drops the cells that it may have left
            slot.tokens += tokens
        return code
