"""The code in the answer to an instruction: models put it in a fence, with chatter around it.

In: the answer, one character at a time. Out: the code (`Fences`). Pure; standard library only.
"""

from __future__ import annotations

import re

from cerebrum.text.languages import LANGUAGES, Language, language_named
from cerebrum.text.scanner import LINE_CHARS, scanner_of
from cerebrum.text.stages import FENCE, Stage

OPENING = re.compile(r"(`{3,}+|~{3,}+)([^`\n]*+)")
THINKS = "<think>"
THOUGHT = "</think>"
# An answer's blocks in these are not the code, unless there are no others.
BESIDE = "bash sh shell console json text plaintext output powershell zsh yaml yml toml diff"


def is_beside(name: str, language: Language | None) -> bool:
    """Whether a block in the language of this name is not the code that was asked for: never, if
    that is in any language.
    """
    name = name.strip().lower()
    known = language_named(name) or LANGUAGES["shell"]  # as console, output and the like are
    return name in BESIDE.split() and language is not None and language is not known


class Fences(Stage):
    """The answer to an instruction: the code in the first fenced block that is not a shell command,
    an output or the like (`is_beside`), behind the model's thoughts. Without one, it is the first
    block; without any block, all of the answer, once it has ended.

    `begun` is the start of the answer, which the model was given to continue: often the code's
    opening fence. `language` is None if the code may be in any.
    """

    # Where the answer is, and what follows:
    #   "chatter"   before the block: "beside" or "code" at a fence, "thinking" at a <think> with
    #               nothing before it
    #   "thinking"  in the model's thoughts
    #   "beside"    in a block that is not the code: "chatter" at its fence
    #   "code"      in the block: the end at its fence
    # Outside of the code, what precedes </think> were thoughts: "chatter" follows.
    # Each change, but for "thinking", forgets the text before it (`_restart`).
    state = "chatter"
    fallback: tuple[str, int] | None = None  # the first block beside the code, and its `start`
    fence = FENCE  # the one that opened the block: its backticks or tildes
    # Spaces before the fence, which are removed from each line of its block; and how many of them
    # may still come in this line.
    margin = margin_left = 0
    nested = 0  # blocks within the code that are open
    # In Markdown, the start of a bare fence that may end the code. If another bare fence follows,
    # the two held a block within the code, and this is None again. If none does, the code ended
    # here.
    closing: int | None = None
    line_start = 0  # where the line so far begins
    read = 0  # characters that went in, also those that `text` has no more

    def __init__(self, language: Language | None, begun: str) -> None:
        super().__init__()
        self.language = language
        self.feed(begun)  # as if the model had written it
        if self.reason or self.state != "code":  # no block of it is still open
            self._restart("chatter")
            self.reason = None
            self.fallback = None
        # Code in it is read with what follows, but not sent, and the model's text begins here.
        self.sent = self.safe = len(self.text)
        self.read = self.start = 0

    def _restart(self, state: str) -> None:
        """Forget the text up to here: all places count from here on. `feed`, which calls this
        through `step`, goes on with the new, empty text.
        """
        self.state = state
        self.scanner = scanner_of(self.language or LANGUAGES["markdown"])
        self.text = []
        self.line_start = self.safe = self.sent = 0
        self.start = self.read

    def step(self, char: str) -> None:
        self.read += 1
        if self.margin_left and char == " ":
            self.margin_left -= 1
            self.text.pop()
            return
        self.margin_left = 0
        if char == "\n":
            self._read_line()
            self.line_start = len(self.text)
            self.margin_left = self.margin
        elif self.state == "code" and not self._may_be_fence():
            self.safe = len(self.text)
        elif char == ">" and self.cut(-len(THOUGHT)) == THOUGHT:
            self._restart("chatter")
        elif char == ">" and self.cut(0, LINE_CHARS).strip() == THINKS:
            self.state = "thinking"
        if self.closing is not None:
            self.safe = self.closing

    def _may_be_fence(self) -> bool:
        """Whether the line so far may become a fence, or is one."""
        line = self.cut(self.line_start, self.line_start + LINE_CHARS).strip()
        return self.fence.startswith(line) or line.startswith(self.fence)

    def _read_line(self) -> None:
        """Read the line that has ended, as the state demands. In the thoughts, no line matters."""
        if read := READERS.get(self.state):
            read(self, self.cut(self.line_start))

    def read_chatter(self, line: str) -> None:
        """A line above the block has ended; perhaps it is the fence that opens it."""
        if match := OPENING.fullmatch(line.strip()):
            self.fence = match[1]
            self.margin = len(line) - len(line.lstrip())
            self._restart("beside" if is_beside(match[2], self.language) else "code")

    def read_beside(self, line: str) -> None:
        """A line of a block beside the code has ended."""
        if line.strip() == self.fence:
            self.fallback = self.fallback or (self.cut(0, self.line_start), self.start)
            self.margin = 0
            self._restart("chatter")

    def read_code(self, line: str) -> None:
        """A line of the block has ended. A fence within a literal or a comment is none."""
        is_fence = not self.scanner.closer and line.lstrip().startswith(self.fence)
        is_bare = not line.strip().strip("`~")  # no language is behind it
        self.scanner.feed(line)
        if is_fence and not is_bare and not self.cut(0, self.line_start).strip():
            self._restart("code")  # the model repeats the opening fence that it was given
        elif is_fence and is_bare and not self.nested:
            self._close()
        elif is_fence:
            self.nested += -1 if is_bare else 1
        if not self.reason:
            self.safe = len(self.text)

    def _close(self) -> None:
        """A bare fence has come. In Markdown it may open a block within the code, unless the
        code's own fence is longer than such blocks' fences.
        """
        if self.language is not LANGUAGES["markdown"] or len(self.fence) > len(FENCE):
            self.end("stop", self.line_start)
        else:
            self.closing = self.line_start if self.closing is None else None

    def flush(self, whole: bool) -> str:
        if self.state in ("beside", "code"):
            self._read_line()  # the last line has ended, too; in chatter, it opens nothing
        if self.state == "code":
            # Up to the fence in the last line or, in Markdown, at `closing`; None: all of it.
            return self.cut(self.sent, self.safe if self.reason else self.closing)
        if self.state == "thinking":
            return ""
        if self.fallback:
            text, self.start = self.fallback  # `Ending.start` reads it
            return text
        return self.cut(self.sent)


# What reads a line that has ended, by the state.
READERS = {
    "chatter": Fences.read_chatter,
    "beside": Fences.read_beside,
    "code": Fences.read_code,
}
