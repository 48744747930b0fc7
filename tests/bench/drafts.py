"""The gain from the drafter's memory of changes, when files of the standard library are written
again with a change.

    python tests/bench/drafts.py [--model qwen_0_5b]

Nothing is generated: the drafter gets the tokens of the changed file, by the tokenizer of --model,
as if a model had chosen them. The time of each decode comes from a table measured with a 1.5B on
two cores (Intel with AMX), so every machine gets the same result. Prints one line of JSON with, for
each kind of change, the tokens/s without drafts, with a drafter that forgets every change, and with
the real drafter. `ratio` is the last figure over the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from servers import copying, parser_of, weights_of

from cerebrum.vps.drafts import Drafter, Gain
from cerebrum.vps.llama import MAX_DRAFT, start_library
from cerebrum.vps.vocabulary import Vocabulary, api

SECONDS = {1: 0.057, 4: 0.089, 8: 0.109, 16: 0.135, 32: 0.192, 64: 0.340}
CHANGES: dict[str, Callable[[str], str]] = {
    "none": lambda source: source,
    "rename a variable": lambda source: source.replace("self", "this"),
    "make functions async": lambda source: source.replace("def ", "async def "),
    "comment every block": lambda source: source.replace(":\n", ":\n    # step\n"),
}
FILE_COUNT, LINES = 8, 70


class Forgetful(Drafter):
    """Finds where a copy continues after a change, but never expects the same change again."""

    def _remember_change(self, *_: Any) -> None:
        pass


def tokenizer(model: str) -> Callable[[str], list[int]]:
    start_library()
    params = api.llama_model_default_params()
    params.vocab_only = True
    vocabulary = Vocabulary(api.llama_model_load_from_file(str(weights_of(model)).encode(), params))
    return lambda text: vocabulary.tokenize(text, False)


def seconds_of(drafter: Drafter, target: list[int]) -> float:
    """The time of all decodes that write `target`, with the worker's way of drafting."""
    gain = Gain()
    position = 1
    spent = 0.0
    drafter.advance(target[0])
    while position < len(target):
        begin = position
        draft = drafter.draft(MAX_DRAFT)
        if draft and not gain.wants((1, len(draft))):
            draft = []
        for drafted in [*draft, None]:
            token = target[position]
            drafter.advance(token)
            position += 1
            if token != drafted or position == len(target):
                break
        seconds = SECONDS[len(draft) + 1]
        spent += seconds
        written = position - begin
        if draft:
            gain.learn((1, len(draft)), written, seconds)
        else:
            gain.learn_plain(1, written, seconds)
    return spent


def main() -> None:
    tokenize = tokenizer(parser_of(__doc__, model="qwen_0_5b").parse_args().model)
    found = {}
    for name, change in CHANGES.items():
        tokens = 0
        seconds = {Forgetful: 0.0, Drafter: 0.0}
        for number in range(FILE_COUNT):
            prompt = copying(number, LINES)
            source = prompt.partition("```python\n")[2].partition("\n```")[0]
            target = tokenize(change(source) + "\n```")
            tokens += len(target)
            for kind in seconds:
                seconds[kind] += seconds_of(kind(tokenize(prompt)), target)
        found[name] = {
            "plain": round(1 / SECONDS[1], 1),
            "forgetful": round(tokens / seconds[Forgetful], 1),
            "drafter": round(tokens / seconds[Drafter], 1),
            "ratio": round(seconds[Forgetful] / seconds[Drafter], 3),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
