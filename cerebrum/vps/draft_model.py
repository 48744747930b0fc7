"""A draft model: a small model that writes ahead of a large one of the same family.

`DraftModel` follows the large model's sequences, and says which token it expects next. It belongs
to the worker of the large model, whose `Decoder` asks it and checks what it wrote.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebrum.settings import write_atomically
from cerebrum.vps.compute import Compute, ModelTally
from cerebrum.vps.drafts import MODEL_LENGTH, USUAL_ACCEPTANCE, pair_rate
from cerebrum.vps.job import Run
from cerebrum.vps.llama import Llama, ModelError, Slot
from cerebrum.vps.schedule import Costs
from cerebrum.vps.tokens import common_prefix
from cerebrum.vps.vocabulary import api

LAST = -1  # the last logits of a decode
ENOUGH_TOKENS = 1000  # show how often a draft model is right
MIN_PAIR_GAIN = 1.05  # of the rate; for less, a second model is not worth its memory
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


def check_pair(model: Llama, draft: Llama) -> int:
    """The number of ids that mean the same token in both models. ModelError if they are too
    different for one to write ahead of the other.
    """
    if draft.recurrent:
        raise ModelError("it is recurrent and cannot take back tokens")
    ours, theirs = model.vocabulary.vocab, draft.vocabulary.vocab
    if any(read(ours) != read(theirs) for read in VOCABULARY_READERS):
        raise ModelError("its vocabulary is of another type, or begins and ends texts otherwise")
    fewer, more = sorted((model.n_vocab, draft.n_vocab))
    if more - fewer > MAX_PADDING:
        raise ModelError(f"it has {draft.n_vocab} tokens instead of {model.n_vocab}")
    for read in (api.llama_vocab_get_text, api.llama_vocab_get_attr):
        for token in range(fewer):
            if read(ours, token) != read(theirs, token):
                raise ModelError(f"its token {token} is another one")
    return fewer


def saved_seconds(costs: Costs, draft_seconds: float, acceptance: float) -> float:
    """The seconds that a draft model should save for each token, if it takes `draft_seconds` for
    one itself. ModelError if that is hardly any.
    """
    alone, pair = 1 / costs(1), pair_rate(costs, draft_seconds, acceptance)
    if pair < MIN_PAIR_GAIN * alone:
        figures = f"{pair:.1f} tokens a second with it, {alone:.1f} without"
        raise ModelError(f"it is too slow on this CPU: {figures}")
    return 1 / alone - 1 / pair


class Record:
    """How often a model's draft model was right on this machine: of `asked` tokens, `right`. It is
    kept in a file between loads.
    """

    def __init__(self, state_dir: Path, model_id: str, draft_id: str) -> None:
        self.path, self.draft_id = state_dir / "drafts" / f"{model_id}.json", draft_id
        self.asked = self.right = 0
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
            found = json.loads(self.path.read_text())
            right, asked = int(found["right"]), int(found["asked"])
            if found["draft"] == draft_id and 0 <= right <= asked:
                self.asked, self.right = asked, right

    @property
    def acceptance(self) -> float | None:
        """The share of tokens that it expected; None if too few are known."""
        return self.right / self.asked if self.asked >= ENOUGH_TOKENS else None

    @property
    def expected(self) -> float:
        """The share that it should expect of the next texts: the usual one at least, because a low
        one must not keep it away for good.
        """
        return max(self.acceptance or 0.0, USUAL_ACCEPTANCE)

    def write(self) -> None:
        """Keep it for the next loads."""
        text = json.dumps({"draft": self.draft_id, "asked": self.asked, "right": self.right})
        with contextlib.suppress(OSError):  # the next load knows less
            write_atomically(self.path, text.encode())


@dataclass(eq=False)
class DraftModel:
    """A small model that follows the sequences of a large one, each in the slot of the same number.

    Owned by the large model's worker; every call is from its thread.
    """

    model: Llama
    costs: Costs
    compute: Compute
    tally: ModelTally
    record: Record
    known: int  # ids that mean the same token in both models
    saving: float  # seconds that it should save for each token of the text
    slots: Sequence[Slot]

    def count(self, is_right: bool) -> None:
        """Count a token of the large model: whether it was expected."""
        self.tally.foreseeable_tokens += 1
        self.tally.foreseen_tokens += is_right
        self.record.asked += 1
        self.record.right += is_right

    def pays(self, lacking: int, tokens: int) -> bool:
        """Whether to read `lacking` tokens, to save time while `tokens` are written."""
        # One token is read for each draft in any case.
        return self.costs(lacking) - self.costs(1) < self.saving * tokens

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
        while self.read(run.slot.id, unread, [run]):
            token = self.model.greedy(LAST)
            yield token, self.model.probability(LAST, token)
            unread = [token]

    def read(self, number: int, tokens: list[int], runs: Sequence[Run]) -> bool:
        """Append these tokens to the slot of this number, for these runs; without any, for nobody
        yet, and any request may abort it. False if that was not done.
        """
        slot = self.slots[number]
        code, begin = self.compute.decode(self.model, self.costs, runs, [(slot, tokens, 1)])
        if code != 0:  # the cells that it may have left, `follow` drops
            return False
        slot.tokens += tokens
        if runs:  # else nobody waited
            self.tally.ahead_seconds += time.perf_counter() - begin
        return True
