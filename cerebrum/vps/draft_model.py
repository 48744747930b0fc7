"""Which small models can write ahead of a large one: those with the same tokens."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

from cerebrum.vps.llama import ModelError, is_recurrent, load_model
from cerebrum.vps.memory import file_stamp
from cerebrum.vps.vocabulary import api

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
        ours, theirs = map(api.llama_model_get_vocab, models)
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
