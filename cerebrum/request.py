"""A request for a completion: its fields with their types, ranges and defaults, once for both
daemons.

    >>> RULES["max_tokens"].expected()
    'an integer from 0 to 2048'
    >>> GenerationRequest("def f(n):").max_tokens
    512

Each daemon's table of fields consists of these RULES and of what it alone demands. Pure. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cerebrum.fields import Field

# Limits of a completion, in tokens. A dialect's limit above MAX_TOKENS is lowered to it.
MAX_TOKENS = 2048
DEFAULT_TOKENS = 512
MAX_LOGGED_CHARS = 10_000  # of a prompt


def checked(*about: Any, **more: Any) -> Any:
    """A dataclass's field with its rule. The arguments are those of `Field`: the JSON type, the
    range, the default, and so on.
    """
    rule = Field(*about, **more)
    return dataclasses.field(default=rule.default, metadata={"rule": rule})


@dataclass(frozen=True)
class GenerationRequest:
    """One completion as a client requests it, checked. A `suffix` makes the request
    fill-in-the-middle; a chat has `messages` instead of a prompt. The fields without a rule are
    checked by each daemon in its own way.
    """

    prompt: str = checked(str, 1, default="")
    # Roles (system, user, assistant) and texts: {"role", "content"} on the Pi, pairs in vpsd.
    messages: Sequence[Any] | None = None
    model: str = ""
    session: str | None = checked(str, 1, 200)  # a newer request of the same session ends this one
    suffix: str | None = checked(str)
    filename: str = checked(str, 0, 1000, "")
    # Names and texts of other files: {"filename", "text"} on the Pi, pairs in vpsd.
    extra: Sequence[Any] = ()
    language: str = ""
    mode: str = "complete"  # or infill, instruct; on the Pi also chat
    stop_at: str = checked(str, default="auto", choices=("auto", "none"))
    # Characters; the completion ends before a line that is indented less.
    indent: int = checked(int, 0, 1000, 0)
    stop: Sequence[str] = checked(list, 0, 16, ())
    max_tokens: int = checked(int, 0, MAX_TOKENS, DEFAULT_TOKENS)  # 0: only read the prompt
    # A completion with a line end stops this long after its first token; 0: no limit.
    predict_ms: int = checked(int, 0, 600_000, 0)
    # For reading what the cache lacks of a prompt: if that takes longer, less of the prompt is
    # read, or a draft model answers. 0: no limit.
    prompt_ms: int = checked(int, 0, 600_000, 0)
    # Without messages: the text ends where the chance that its line is right falls below this.
    min_confidence: float | None = checked(float, 0, 1)
    temperature: float = checked(float, 0, 1, 0.4)
    top_p: float | None = checked(float, 0, 1, above_low=True)  # None: 0.95, or an engine's default
    # Of the random numbers, at a temperature above 0. 2**32 - 1 asks llama.cpp for a random seed.
    seed: int | None = checked(int, 0, 2**32 - 2)
    heal: bool = checked(bool, default=False)  # the prompt's last token may be unfinished
    # The names of control tokens in the prompt are these tokens.
    special: bool = checked(bool, default=False)
    progress: bool = checked(bool, default=False)
    # Low: the prompt is read while no other request needs the CPU.
    priority: str = checked(str, default="normal", choices=("normal", "low"))
    # The Pi's alone.
    instruction: str | None = None

    def texts(self) -> str:
        """Its texts as JSON, for CEREBRUM_LOG_PROMPTS."""
        texts = {}
        for name in ("prompt", "suffix", "instruction", "messages"):
            if value := getattr(self, name):
                texts[name] = value
        return json.dumps(texts, ensure_ascii=False)[:MAX_LOGGED_CHARS]


RULES: dict[str, Field] = {
    field.name: field.metadata["rule"]
    for field in dataclasses.fields(GenerationRequest)
    if field.metadata
}
