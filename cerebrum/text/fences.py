"""The code in the answer to an instruction: models put it in a fence, with chatter around it.

In: the answer, one character at a time. Out: the code (`Fences`). Pure; standard library only.
"""

from __future__ import annotations

import re

from cerebrum.text.languages import LANGUAGES, Language, language_named
from cerebrum.text.scanner import LINE_CHARS, scanner_of
from cerebrum.text.stages import Stage

FENCE = re.compile(r"(`{3,}+|~{3,}+)([^`\n]*+)")
THINKS, THOUGHT = "<think>", "</think>"
# An answer's blocks in these are not the code, unless there are no others.
BESIDE = frozenset(
    {
        *("bash", "sh", "shell", "console", "json", "text", "plaintext", "output", "powershell"),
        *("zsh", "yaml", "yml", "toml", "diff"),
    }
)
# A sentence, or Markdown's emphasis, quotation or item of a list; but no assignment and no mapping.
PROSE = re.compile(
    r"(?:[A-Z][a-z'\u0080-\uffff]*[ ,!]+[\w\"'`(*]|[*>`\u0080-\uffff]|- (?!\w+:)|\d+[.)] ).*[^;{}]"
    r"|[A-Z][a-z]+:"
)
HEADING = re.compile(r"#{1,6}[ \t]")  # a comment or, in an answer, a heading
CODE = ("opened", "inside")  # states


def is_beside(name: str, language: Language | None) -> bool:
    """Whether a block in the language of this name is not the code that was asked for."""
    name = name.strip().lower()
    known = language_named(name) or LANGUAGES["shell"]  # as console, output and the like are
    return name in BESIDE and language is not None and language is not known


def is_code(line: str, language: Language | None) -> bool:
    """Whether an answer that begins with this line is code without a fence."""
    if not language or not line or PROSE.fullmatch(line):
        return False
    opener = (language.block_comment or ())[:1]
    starts = (*language.comment_starts, "@", "#include", "#define", *opener)
    if line.startswith(starts) or line.endswith(("{", "}", ";")):
        return True
    defines = not language.commands and language.defines.match(line)
    return bool(language.imports.match(line) or defines)


class Fences(Stage):
    """The answer to an instruction: the code in the first fenced block that is not a shell command,
    an output or the like (`BESIDE`), behind the model's thoughts. Without one, it is the first
    block; without any block, or if the answer begins like code, all of the answer.

    `begun` is the start of the answer, which the model was given to continue.
    """

    # Where the answer is:
    #   "blank"     before the block, nothing but blank lines has come
    #   "headed"    before it, nothing but lines that may be a comment or a heading (`# …`)
    #   "chatter"   before it, below another line
    #   "thinking"  in the model's thoughts
    #   "beside"    in a block that is not the code
    #   "opened"    in the block, above its first line
    #   "inside"    in the block
    state = "blank"
    fallback: tuple[str, int] | None = None  # the first block beside the code, and its `start`
    fence = "```"
    margin = left = 0  # spaces before the fence and each line of its block, and those to come
    nested = 0  # blocks within the code that are open
    # Markdown: where a bare fence closes the block, unless it opens one within it: then another one
    # follows.
    closing: int | None = None
    line_start = 0
    in_code = True  # the line does not start inside a string or a comment
    read = 0  # characters that went in

    def __init__(self, language: Language | None, begun: str) -> None:
        super().__init__()
        self.language = language
        self.scanner = scanner_of(language or LANGUAGES["markdown"])
        self.feed(begun)
        if self.state == "beside":
            # The fence was opened for the model, so this block is the code.
            self.state = "opened"
        elif self.reason or self.state not in CODE:  # `begun` has no block that is still open
            self._restart("blank")
            self.reason, self.fallback = None, None
        self.sent = self.safe = len(self.text)
        self.read = self.start = 0

    def _restart(self, state: str) -> None:
        """Forget the text up to here."""
        self.state, self.text = state, []
        self.line_start = self.safe = self.sent = 0
        self.start = self.read

    def step(self, char: str) -> None:
        self.read += 1
        if self.left and char == " ":
            self.left -= 1
            self.text.pop()
            return
        self.left = 0
        if char == "\n":
            READERS[self.state](self, self.cut(self.line_start))
            self.line_start = len(self.text)
            self.left = self.margin
            self.in_code = not self.scanner.closer
        elif self.state in CODE and not self._may_be_fence():
            self.safe = len(self.text)
        elif char == ">" and self.cut(-len(THOUGHT)) == THOUGHT:
            self._restart("blank")
        elif char == ">" and self.cut(0, LINE_CHARS).strip() == THINKS:
            self.state = "thinking"
        if self.closing is not None:
            self.safe = self.closing

    def _may_be_fence(self) -> bool:
        """Whether the line so far may become a fence, or is one."""
        line = self.cut(self.line_start, self.line_start + LINE_CHARS).strip()
        return self.in_code and (self.fence.startswith(line) or line.startswith(self.fence))

    def read_thought(self, line: str) -> None:
        """A line of the model's thoughts has ended."""

    def read_chatter(self, line: str) -> None:
        """A line above the code has ended: decide whether it is the fence that opens the block, or
        code without a fence.
        """
        if match := FENCE.fullmatch(line.strip()):
            self.fence, self.margin = match[1], len(line) - len(line.lstrip())
            beside = is_beside(match[2], self.language)
            self._restart("beside" if beside else "opened")
        elif self.state != "chatter" and line.strip():
            marks = self.language.comment_starts if self.language else ()
            headed = self.state == "headed" and not PROSE.fullmatch(line.rstrip())
            if HEADING.match(line) and line.startswith(marks):
                self.state = "headed"
            elif headed or is_code(line.rstrip(), self.language):
                self.state, self.safe = "inside", len(self.text)  # all of the text so far
                self.scanner.feed(self.cut(0))
            else:
                self.state = "chatter"

    def read_beside(self, line: str) -> None:
        """A line of a block beside the code has ended."""
        if line.strip() == self.fence:
            self.fallback = self.fallback or (self.cut(0, self.line_start), self.start)
            self.margin = 0
            self._restart("blank")

    def read_code(self, line: str) -> None:
        """A line of the block has ended."""
        is_fence = self.in_code and line.lstrip().startswith(self.fence)
        if is_fence and self.state == "opened" and not self._is_bare(line):
            self._restart("inside")  # the model repeats the opening fence that it was given
            return
        if is_fence and self._is_bare(line) and not self.nested:
            self._close()
        elif is_fence:
            self.nested += -1 if self._is_bare(line) else 1
        self.scanner.feed(line)
        if line.strip():
            self.state = "inside"
        if self.state == "inside" and not self.reason:  # or the model may still repeat the fence
            self.safe = len(self.text)

    def _is_bare(self, line: str) -> bool:
        """Whether a fence has no language behind it."""
        return not line.strip().strip(self.fence[0])

    def _close(self) -> None:
        """A bare fence has come."""
        if self.language is not LANGUAGES["markdown"] or len(self.fence) > len("```"):
            self.end("stop", self.line_start)
        else:
            self.closing = self.line_start if self.closing is None else None

    def flush(self, whole: bool) -> str:
        line = self.cut(self.line_start)
        is_fence = self.in_code and line.lstrip().startswith(self.fence) and self._is_bare(line)
        if self.closing is not None:
            return self.cut(self.sent, self.closing)
        if self.state in CODE:
            return "" if is_fence and not self.nested else self.cut(self.sent)
        if self.fallback and self.state != "thinking":
            text, self.start = self.fallback  # `start` is for `Ending.start`
            return text
        if self.state == "beside":
            return self.cut(0, self.line_start) if is_fence else self.cut(0)
        return "" if self.state == "thinking" else self.cut(self.sent)


READERS = {
    **dict.fromkeys(("blank", "headed", "chatter"), Fences.read_chatter),
    "thinking": Fences.read_thought,
    "beside": Fences.read_beside,
    **dict.fromkeys(CODE, Fences.read_code),
}
