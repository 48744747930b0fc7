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
from typing import Any

from cerebrum.vps.compute import Compute, ModelTally
from cerebrum.vps.drafts import MODEL_LENGTH, USUAL_ACCEPTANCE, pair_rate
from cerebrum.vps.job import Run
from cerebrum.vps.llama import Llama, ModelError, Slot, write_atomically
from cerebrum.vps.schedule import Costs
from cerebrum.vps.tokens import common_prefix
from cerebrum.vps.vocabulary import Vocabulary, api

LAST = -1  # the last logits of a decode
ENOUGH_TOKENS = 1000  # show how often it is right
MIN_PAIR_GAIN = 1.05  # of the rate; for less, a second model is not worth its memory
MAX_PADDING = 256  # ids that only one of two vocabularies has


def settings_of(vocabulary: Vocabulary) -> tuple[Any, ...]:
    """The type of a vocabulary, and what it puts around a text."""
    vocab = vocabulary.vocab
    ids = api.llama_vocab_bos, api.llama_vocab_eos, api.llama_vocab_eot
    added = api.llama_vocab_get_add_bos, api.llama_vocab_get_add_eos
    return (vocabulary.kind, *(read(vocab) for read in (*ids, *added)))


def check_pair(model: Llama, draft: Llama) -> int:
    """The number of ids that mean the same token in both models. ModelError if they are too
    different for one to write ahead of the other.
    """
    if draft.recurrent:
        raise ModelError("it is recurrent and cannot take back tokens")
    ours, theirs = model.vocabulary, draft.vocabulary
    if settings_of(ours) != settings_of(theirs):
        raise ModelError("its vocabulary is of another type, or begins and ends texts otherwise")
    fewer, more = sorted((model.n_vocab, draft.n_vocab))
    if more - fewer > MAX_PADDING:
        raise ModelError(f"it has {draft.n_vocab} tokens instead of {model.n_vocab}")
    for read in (api.llama_vocab_get_text, api.llama_vocab_get_attr):
        for token in range(fewer):
            if read(ours.vocab, token) != read(theirs.vocab, token):
                raise ModelError(f"its token {token} is another one")
    return fewer


def check_gain(costs: Costs, draft_seconds: float, acceptance: float) -> None:
    """ModelError if a draft model that takes `draft_seconds` for a token would hardly save time."""
    alone, pair = 1 / costs(1), pair_rate(costs, draft_seconds, acceptance)
    if pair < MIN_PAIR_GAIN * alone:
        figures = f"{pair:.1f} tokens a second with it, {alone:.1f} without"
        raise ModelError(f"it is too slow on this CPU: {figures}")


def acceptance_path(state_dir: Path, model_id: str) -> Path:
    """Of the file that says how often a model's draft model was right on this machine."""
    return state_dir / "drafts" / f"{model_id}.json"


def write_acceptance(state_dir: Path, model_id: str, draft_id: str, acceptance: float) -> None:
    """Remember how often a draft model was right."""
    text = json.dumps({"draft": draft_id, "acceptance": acceptance})
    with contextlib.suppress(OSError):  # the next load expects the usual share
        write_atomically(acceptance_path(state_dir, model_id), text.encode())


def read_acceptance(state_dir: Path, model_id: str, draft_id: str) -> float | None:
    """How often this draft model was right on this machine; None if that is unknown."""
    try:
        found = json.loads(acceptance_path(state_dir, model_id).read_text())
        acceptance = float(found["acceptance"])
        is_known = found["draft"] == draft_id and 0.0 <= acceptance <= 1.0
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return acceptance if is_known else None


def expected_acceptance(state_dir: Path, model_id: str, draft_id: str) -> float:
    """How often this draft model should be right on this machine."""
    acceptance = read_acceptance(state_dir, model_id, draft_id)
    return USUAL_ACCEPTANCE if acceptance is None else acceptance


@dataclass(eq=False)
class DraftModel:
    """A small model that follows the sequences of a large one, each in the slot of the same number.

    Owned by the large model's worker; every call is from its thread.
    """

    model: Llama
    costs: Costs
    compute: Compute
    tally: ModelTally
    known: int  # ids that mean the same token in both models
    usual: float  # how often it should be right, until the tally has ENOUGH_TOKENS
    slots: Sequence[Slot]

    @property
    def acceptance(self) -> float:
        """The probability that it expects the model's next token, as far as that is known."""
        is_known = self.tally.foreseeable_tokens >= ENOUGH_TOKENS
        return self.tally.acceptance if is_known else self.usual

    def pays(self, costs: Costs, lacking: int, tokens: int) -> bool:
        """Whether to read `lacking` tokens, to save time while `tokens` are written. `costs` are
        those of the model that checks.
        """
        token_seconds = self.costs(1)
        saved = costs(1) - 1 / pair_rate(costs, token_seconds, self.acceptance)
        return self.costs(lacking) - token_seconds < saved * tokens

    def lacking(self, number: int, tokens: list[int]) -> list[int]:
        """What the slot of this number lacks of a sequence of `tokens`: at least one token, or none
        if this model cannot have the sequence. The slot is cut to what it has of it. The whole
        sequence is read, since a model that reads only the end of it is right less often.
        """
        slot = self.slots[number]
        self.cut(slot, min(common_prefix(slot.tokens, tokens), len(tokens) - 1))
        lacking = tokens[len(slot.tokens) :]
        fits = len(tokens) + MODEL_LENGTH < self.model.n_ctx
        return lacking if fits and max(lacking) < self.known else []

    def cut(self, slot: Slot, length: int) -> None:
        """Drop the slot's tokens from `length` on, or all if the rest could not be continued, and
        whatever an aborted decode has left.
        """
        if not self.model.trim(slot, length):
            length = 0
            self.model.trim(slot, 0)
        del slot.tokens[length:]

    def expected(self, run: Run, tokens: list[int], most: int) -> Iterator[tuple[int, float]]:
        """Read what is lacking of a run, but at most so many tokens at once; then say what comes
        next, token by token, with probabilities. Each is read when the next one is asked for.
        """
        slot = self.slots[run.slot.id]
        is_read = self.read(slot, tokens[:most], [run])
        if len(tokens) > most:
            return
        while is_read:
            token = self.model.greedy(LAST)
            yield token, self.model.probability(LAST, token)
            is_read = self.read(slot, [token], [run])

    def read(self, slot: Slot, tokens: list[int], runs: Sequence[Run]) -> bool:
        """Append these tokens to a slot, for these runs. False if that was not done."""
        code, begin = self.compute.decode(self.model, self.costs, runs, [(slot, tokens, 1)])
        if code != 0:
            self.cut(slot, len(slot.tokens))
            return False
        slot.tokens += tokens
        if runs:  # else nobody waited
            self.tally.ahead_seconds += time.perf_counter() - begin
        return True
