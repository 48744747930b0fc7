"""Prepares source code for a model: detects what a prompt asks for, and selects the parts of a long file to send.

In: a request's fields. Out: the mode to ask in (`detect_mode`) and a prompt that fits the context (`prepare`).

    >>> from cerebrum.text.prompt import detect_mode, prepare
    >>> detect_mode({"language": "python", "prompt": "Write a stack"})
    'instruct'
    >>> fields = {"language": "python", "prompt": "import os\\n" + 2000 * "x = 1\\n"}
    >>> prepare(fields, "complete", budget=1000, ratio=3.0).kept["parts"]
    ['imports', 'window']

No text is refused, however odd, and the cost of a text is at most its length times a constant. A language that is not
in `LANGUAGES` is prepared like C. Pure, standard library only.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, takewhile
from typing import Any

from cerebrum.text.languages import BY_NAME, LANGUAGES, Language
from cerebrum_common import HttpError

# --------------------------------------------------------------------------------------------------------- ways to ask

LINE_CHARACTERS = 400  # a longer first line is not a plain instruction
DETERMINER = r"(?:an?|the|this|these|that|those|me|my|our|some|all|any|each|every|it|two|three|your)"
VERBS = (
    "add|build|calculate|change|check|clean|complete|compute|convert|count|create|debug|define|describe|design|develop"
    "|document|explain|extract|find|finish|fix|format|generate|get|give|help|implement|improve|insert|list|make|merge"
    "|migrate|modernize|modify|move|optimi[sz]e|parse|port|print|produce|provide|read|reduce|refactor|remove|rename"
    "|reorder|replace|restructure|reverse|review|rewrite|show|shorten|simplify|solve|sort|split|summari[sz]e|swap|tell"
    "|test|transform|translate|turn|update|use|validate|vectorize|wrap|write"
)
# In most languages no line begins with one of these verbs and a word. A text may be SQL in another language's string,
# so the lookahead leaves out `create table` and `explain select`.
PLAIN_VERBS = (
    "(?:code|create|debug|describe|document|explain|generate|implement|improve|optimi[sz]e|refactor|rewrite|simplify"
    "|translate|write) (?!(?:analyze|database|function|index|materialized|or|schema|select|table|temporary|trigger|type"
    r"|unique|user|view)\b)[\w`\"']"
)
ASKS = re.compile(
    r"(?:please|can you|could you|would you|will you|i (?:want|need|would like)|i'd like|help me|you are an?)\b"
    r"|(?:how|what|why|when|where|which|is there|are there|does|do i|should i)\b.*\?$"
    rf"|given {DETERMINER}\b.*\b(?:return|write|find|compute|print|count|determine|implement)\b"
    r"|(?:an? |the )?(?:[\w+#]+ )?(?:function|program|script|class|method|module|code|snippet) (?:for|that|to|which) \w"
    rf"|(?:{VERBS})(?: up)? {DETERMINER} ",
    re.IGNORECASE,
)
ASKS_PLAINLY = re.compile(PLAIN_VERBS, re.IGNORECASE)
# Most comments above code begin with a verb, too. An instruction asks to change "this" or something "in this function".
THINGS = r"(?:class|code|component|file|function|loop|method|module|program|query|script|snippet|struct|tests?|type)"
EDITS = re.compile(
    r"(?!.*\b(?:later|once|when|someday|todo)\b)(?:please )?(?:refactor\b"
    r"|(?:clean up|complete|convert|debug|document|explain|finish|fix|improve|make|migrate|modernize|optimi[sz]e|port"
    r"|restructure|review|rewrite|shorten|simplify|speed up|test|translate|turn|vectorize)"
    r" (?:this|these|the following)\b"
    rf"|(?!use\b)(?:{VERBS}) .{{0,80}}\b(?:(?:this|these|the following) {THINGS}|{THINGS} below)\b"
    r"|make it |add (?:comments|docstrings?|error handling|logging|type (?:annotations|hints)|(?:unit )?tests)\b)",
    re.IGNORECASE,
)
COMMAND = re.compile(r"[A-Z]{2,}\b")  # in capitals, as in SQL or a Dockerfile
OPEN_END = re.compile(r"(?:[:{(\[,\\=+*/%&|<.-]|=>|\b(?:and|or|not|in|return|else|do))$")


def syntax(name: str) -> Language:
    """The syntax of a language. A language that models.toml adds gets C's syntax, which most languages resemble."""
    return LANGUAGES[BY_NAME.get(name.lower(), "c")]


def detect_mode(fields: Mapping[str, Any]) -> str:
    """ "complete", "infill" or "instruct": from the field `mode`, or else from the other fields and the prompt.

    A prompt that could be code or an instruction is completed. HttpError 400 names the field that contradicts another.
    """
    mode, prompt = fields.get("mode") or "auto", fields.get("prompt") or ""
    suffix, instruction = fields.get("suffix") or "", fields.get("instruction") or ""
    given = f"got {len(instruction or suffix)} characters"
    if suffix and instruction:
        raise HttpError("INVALID_REQUEST", f"instruction: expected nothing beside suffix, {given}")
    if mode == "auto" and suffix.strip():
        mode = "infill"
    elif mode == "auto":
        asks = instruction or split_instruction(prompt, syntax(fields["language"]))
        mode = "instruct" if asks else "complete"
    elif suffix and mode != "infill":
        raise HttpError("INVALID_REQUEST", f"suffix: expected nothing with mode {mode}, {given}")
    elif instruction and mode != "instruct":
        raise HttpError("INVALID_REQUEST", f"instruction: expected nothing with mode {mode}, {given}")
    if mode == "infill" and fields.get("suffix") is None:
        raise HttpError("INVALID_REQUEST", "suffix: expected the text after the cursor with mode infill, got nothing")
    if mode != "infill" and not prompt and not instruction:
        raise HttpError("INVALID_REQUEST", 'prompt: expected a non-empty string, got the string ""')
    return mode


def split_instruction(prompt: str, language: Language) -> tuple[str, str] | None:
    """(instruction, code) if the prompt is plainly an instruction, alone or above code; otherwise None.

    `Write a stack` gives ("Write a stack", ""). `# Make this async` above a whole function gives the comment and the
    function. Above a signature without a body it gives None: that comment is about code still to be written.
    """
    text = prompt.strip()
    first = text.partition("\n")[0].rstrip()
    asks = bool(ASKS.match(first)) if language.commands else bool(ASKS.match(first) or ASKS_PLAINLY.match(first))
    asks = asks and len(first) <= LINE_CHARACTERS and not first.endswith((";", "{", "(", "="))
    asks = asks and not (language.commands and COMMAND.match(first))
    if asks and (first == text or language is not LANGUAGES["markdown"]):  # longer Markdown may begin so
        return prompt, ""
    comment, code = _leading_comment(prompt.lstrip(), language)
    return (comment, code) if EDITS.match(comment) and _is_whole(code, language) else None


def _leading_comment(text: str, language: Language) -> tuple[str, str]:
    """The comment at the start of the text, without its comment marks, and the text after it."""
    if language.block_comment and text.startswith(language.block_comment[0]):
        comment, _, code = text.partition(language.block_comment[1])
        return " ".join(comment.replace("*", " ").lstrip("/").split()), code.lstrip("\r\n")
    lines, end = list[str](), 0
    while language.line_comment and text.startswith(language.line_comment, end) and len(lines) < 20:
        stop = text.find("\n", end) + 1 or len(text)
        lines.append(text[end:stop].strip().lstrip(language.line_comment[0]).strip())
        end = stop
    return " ".join(lines), text[end:]


def _is_whole(code: str, language: Language) -> bool:
    """Whether `code` has two lines or more and stops where a block may end, not where a person would type on."""
    end = code.rstrip()
    if "\n" not in end.strip() or OPEN_END.search(end[-10:]) or code[len(end) :].rpartition("\n")[2]:
        return False
    if language.indented and end.endswith(('"""', "'''")):
        return False  # a docstring and no body yet
    return all(code.count(opening) <= code.count(closing) for opening, closing in ("{}", "()", "[]"))


# --------------------------------------------------------------------------------------------------- weight of a text

FIRST_RATIO = 3.0  # weight per token, until a backend has reported a model's counts
MIN_RATIO, MAX_RATIO = 0.75, 3.5  # with Qwen, one file in fifty is below 3.5
# The weight of a character by its kind, in fifths: a regression of Qwen's token counts over files in five languages.
# Most words are one token whatever their length; each digit is one, and many signs are; indentation is nearly free.
FIFTHS = {b"a": 3, b"A": 5, b"0": 32, b"+": 11, b" ": 10, b"  ": -16, b"\n": 8, b"\xff": 10}
KINDS = bytes(
    code if chr(code) in " \n"  # control characters fall through to the digits' kind: they cost as much
    else b"a"[0] if chr(code) in string.ascii_lowercase + "\t\r"
    else b"A"[0] if chr(code) in string.ascii_uppercase
    else b"+"[0] if chr(code) in string.punctuation
    else b"0"[0] if code < 128
    else 0xFF
    for code in range(256)
)  # fmt: skip


@dataclass(slots=True)
class Ratio:
    """Weight per token of each model's prompts, learned from the token counts that a backend reports.

    An estimate that is too high gets a prompt refused; one that is too low only leaves out some lines. So a lower
    observation counts at once, a higher one by a sixteenth. `get` moves in steps of a quarter, because a new ratio
    moves the window, and then the backend must prefill it again.
    """

    low: dict[str, float] = field(default_factory=dict)  # the estimate for each model
    given: dict[str, float] = field(default_factory=dict)  # what `get` returns

    def get(self, model: str) -> float:
        return self.given.get(model, FIRST_RATIO)

    def learn(self, model: str, weight: int, tokens: int) -> None:
        if tokens < 256:
            return  # mostly the chat template's own tokens
        old, new = self.low.get(model, FIRST_RATIO), weight / tokens
        low = min(max(new if new < old else old + (new - old) / 16, MIN_RATIO), MAX_RATIO)
        self.low[model] = low
        if not 0 <= low - self.get(model) < 0.4:  # wider than a step, so that the value cannot flap between two
            self.given[model] = int(low * 4) / 4


def weigh(text: str) -> int:
    """The size of a text in characters of average code. Divided by a ratio, it gives the text's tokens."""
    kinds = text.encode("utf-8", "replace").translate(KINDS)
    return -(-sum(kinds.count(kind) * fifths for kind, fifths in FIFTHS.items()) // 5)


# ------------------------------------------------------------------------------------------------- what a file defines

LEFT_OUT = "... lines left out"
MAX_NESTING, MAX_DEFINITIONS, MAX_IMPORTS = 8, 20_000, 1000  # 1 MiB of ordinary code has fewer
MAX_MEMBERS = 40  # members of a class that its outline lists
MAX_COMMENT = 800  # characters: a longer comment above a definition is left out, a longer signature around a piece too
MAX_SIGNATURE = 4000  # characters: if a bracket is still open then, the signature is its first line
INDENT = re.compile(r"[ \t]{0,80}")
LINE_START = re.compile(
    r"^[ \t]*(?![\s)}\]{#&|.?:+*]|//|/\*|(?:el(?:se|if|sif|seif)|except|finally|catch|case|default|and|or"
    r"|rescue|ensure|end|fi|done|esac|then|do)\b|</)",
    re.M,
)
DOCSTRING = re.compile(r"""[ \t]{0,80}[rRuU]?(?:"{3}[^"]{0,600}"{3}|'{3}[^']{0,600}'{3})""")
DOCSTRING_MARK = '"""'
LEADS = ("@", "#[", "template")  # starts of lines, besides comments, that belong to the definition below


@dataclass(slots=True, eq=False)
class Definition:
    """A line that defines a name."""

    name: str
    start: int  # of the line
    indent: int  # characters
    parent: Definition | None  # the definition around it
    members: list[Definition] = field(default_factory=list)  # the first MAX_MEMBERS

    def chain(self) -> tuple[Definition, ...]:
        """The definitions around this one and itself, outermost first."""
        return (*(self.parent.chain() if self.parent else ()), self)


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the text to send, and the definitions around it, whose signatures go with it."""

    start: int
    end: int
    around: tuple[Definition, ...] = ()
    name: str = field(default="", compare=False)  # of its definition; "" for an import


class Source:
    """A text in a language and the definitions in it. All positions are character offsets into `text`."""

    def __init__(self, text: str, language: Language) -> None:
        self.text, self.language = text, language
        self.mark = language.remark(LEFT_OUT) + ("\r\n" if "\r\n" in text[:4096] else "\n")
        self.definitions: list[Definition] = []
        self.by_name: dict[str, list[Definition]] = {}
        stack: list[Definition] = []
        for match in islice(language.defines.finditer(text), MAX_DEFINITIONS):
            start, name = match.start(), match[match.lastindex or 0]
            indent = len(self.indent(start))
            while stack and (stack[-1].indent >= indent or len(stack) > MAX_NESTING):
                stack.pop()
            parent = stack[-1] if stack else None
            stack.append(Definition(name, start, indent, parent))
            if parent and len(parent.members) < MAX_MEMBERS:
                parent.members.append(stack[-1])
            self.definitions.append(stack[-1])
            self.by_name.setdefault(name, []).append(stack[-1])

    def indent(self, start: int) -> str:
        match = INDENT.match(self.text, start)
        return match[0] if match else ""

    def line_end(self, position: int) -> int:
        return self.text.find("\n", position) + 1 or len(self.text)

    def statement(self, start: int, stop: int) -> int:
        """The start of the first of the least indented statements in the range; if none, of a line; else `start`."""
        text, comment = self.text, self.language.block_comment
        inside = ""  # the closing mark of a docstring or comment in which the range begins
        if self.language.indented:
            inside = DOCSTRING_MARK if text.count(DOCSTRING_MARK, 0, start) % 2 else ""
        elif comment and text.rfind(comment[0], 0, start) > text.rfind(comment[1], 0, start):
            inside = comment[1]
        if inside and (end := text.find(inside, start, stop)) >= 0:
            start = min(self.line_end(end), stop)
        found = min(LINE_START.finditer(text, start, stop), key=lambda match: len(match[0]), default=None)
        return found.start() if found else text.find("\n", start, stop) + 1 or start

    def signature_end(self, definition: Definition) -> int:
        """The position after the last line of a signature, which may take several lines."""
        start = definition.start
        first = end = self.line_end(start)
        for _ in range(20):
            if end > start + MAX_SIGNATURE:
                end = first
                break
            if self.text.count("(", start, end) <= self.text.count(")", start, end):
                break
            end = self.line_end(end)
        if not self.language.indented and self.text.startswith("{", end + len(self.indent(end))):
            end = self.line_end(end)
        return end

    def signature(self, definition: Definition) -> str:
        return self.text[definition.start : self.signature_end(definition)]

    def lead(self, definition: Definition) -> int:
        """Where the comments, decorators and attributes right above a definition begin."""
        text, start, comment = self.text, definition.start, self.language.block_comment
        for _ in range(12):
            lowest = max(0, start - MAX_COMMENT - 2)
            above = text.rfind("\n", lowest, max(0, start - 1)) + 1
            line = text[above : min(start, above + 200)].strip()
            if comment and line.endswith(comment[1]):
                above = text.rfind("\n", lowest, max(0, text.rfind(comment[0], lowest, start))) + 1
            elif not line.startswith((*LEADS, *self.language.comment_starts)):
                break
            if above >= start or start - above > MAX_COMMENT:
                break
            start = above
        return start

    def leaves(self, definition: Definition, start: int, stop: int) -> re.Match[str] | None:
        """The first line in the range that is not inside the definition, judged by indentation in every language.

        Closing brackets, Python's comments, an opening brace on a line of its own, labels and `where` are still inside.
        A closing brace is outside, and its line is the block's last.
        """
        inside = r"[\s#)\]}]" if self.language.indented else r"[\s#){\]]|where\b|\w+:\s*$"
        outside = rf"^[ \t]{{0,{definition.indent}}}(?!{inside}{self.language.inside})."
        return re.compile(outside, re.M).search(self.text, start, stop)

    def whole(self, definition: Definition, limit: int) -> Piece | None:
        """The definition, with the comments and decorators above it; None if it has over `limit` characters."""
        start, body, language = self.lead(definition), self.signature_end(definition), self.language
        stop = min(start + limit, len(self.text))
        left = self.leaves(definition, body, stop)
        if body > stop or (left is None and stop < len(self.text)):
            return None
        around = definition.chain()[:-1]
        if left and not language.indented and re.compile(language.closing).match(self.text, left.end() - 1):
            return Piece(start, self.line_end(left.start()), around, definition.name)
        lines = self.text[body : left.start() if left else stop].splitlines(keepends=True)
        while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith(language.comment_starts)):
            lines.pop()  # a comment after the last line of code may be about the next definition
        return Piece(start, body + sum(map(len, lines)), around, definition.name)

    def outline(self, definition: Definition) -> list[Piece]:
        """A definition that is too large to send whole: its signature, its docstring, its members' signatures."""
        body, around, members = self.signature_end(definition), definition.chain(), definition.members
        docstring = DOCSTRING.match(self.text, body) if self.language.indented else None
        end = self.line_end(docstring.end()) if docstring else body
        signatures = (Piece(one.start, self.signature_end(one), around, one.name) for one in members)
        return [Piece(body, end, around, definition.name), *signatures]

    def has_block(self, definition: Definition) -> bool:
        """Whether a signature opens a block that must be closed."""
        signature = self.signature(definition)
        if self.language.close == "end":
            return re.match(r"\s*(?:\w+\s+)?(?:def|class|module|local\s+function|function)\b", signature) is not None
        return "{" in signature

    def enclosing(self, position: int) -> tuple[Definition, ...]:
        """The definitions around a position, outermost first."""
        index = bisect_left(self.definitions, position, key=lambda definition: definition.start) - 1
        found: list[Definition] = []
        # A line that begins here may itself be outside.
        stop = self.line_end(position) if self.text[position - 1 : position] == "\n" else position
        for definition in self.definitions[index].chain() if index >= 0 else ():
            if self.leaves(definition, max(self.signature_end(definition), position - 65_536), stop):
                break
            if self.signature_end(definition) - definition.start <= MAX_COMMENT:
                found.append(definition)
        return tuple(found)

    def imports(self, stop: int) -> Iterator[Piece]:
        """The imports before `stop`, each with all its lines."""
        end = 0
        for match in islice(self.language.imports.finditer(self.text, 0, stop), MAX_IMPORTS):
            if match.start() < end:
                continue
            end = self.line_end(match.end())
            line = self.text[match.start() : end]
            for opening, closing in ("()", "{}"):
                if line.count(opening) > line.count(closing):
                    found = self.text.find(closing, end, min(end + 4000, stop))
                    end = self.line_end(found) if found >= 0 else end
            yield Piece(match.start(), end)

    def spans(self, pieces: Iterable[Piece]) -> list[tuple[int, int, tuple[Definition, ...]]]:
        """(start, end, definitions open at the end) of the pieces and their signatures, in the text's order."""
        found = {(piece.start, piece.end, piece.around) for piece in pieces}
        for _, _, around in list(found):
            for depth, one in enumerate(around, 1):
                found.add((one.start, self.signature_end(one), around[:depth]))
        return sorted(found, key=lambda span: (span[0], -span[1], len(span[2])))

    def render(self, pieces: Iterable[Piece], window: int) -> str:
        """The pieces in the text's order with the signatures around them, up to where the window starts.

        A mark replaces the lines left out between pieces, and a brace or `end` closes each block that the text leaves.
        """
        opened: tuple[Definition, ...] = ()
        out, at = list[str](), 0
        for start, end, around in self.spans([*pieces, Piece(window, window, self.enclosing(window))]):
            if start < at:
                continue  # inside an earlier span
            common = sum(one is other for one, other in zip(opened, around, strict=False))
            closed, gap = opened[common:], self.text[at:start]
            if not gap.strip():
                out.append(gap[-200:])
            elif closed and gap.strip(" \t\r\n}"):
                out += [self.indent(opened[-1].start), "    ", self.mark]
            elif not closed:
                out += [self.indent(start), self.mark]
            if close := "" if self.language.indented else self.language.close:
                blocks = (one for one in reversed(closed) if self.has_block(one))
                out += [f"{self.indent(one.start)}{close}\n" for one in blocks]
            out.append(self.text[start:end])
            opened, at = around, end
        return "".join(out)


# ---------------------------------------------------------------------------------------------------- fitting a prompt

# The template's tokens besides the text: special tokens, and a system message of its own.
TEMPLATE_TOKENS = {"complete": 4, "infill": 16, "instruct": 64, "chat": 32}
SUFFIX_SHARE = 8  # the suffix gets an eighth of the room: where it follows the prefix, each key prefills it again
SPARE_STEPS = 16  # the room that a short file leaves for the suffix shrinks only now and then while one types
SUFFIX_FRESH = 4  # the suffix gets a fourth of the weight that may be prefilled anew
MIN_FRESH = 600  # weight, about 200 tokens: with less text around the cursor a model can only guess
EXTRA_SHARE = 3  # other files' texts get a third of the room at most
MESSAGE_WEIGHT = 18  # a template's tokens around one message
MAX_TURNS = 99  # vpsd takes a hundred messages
MAX_CANDIDATES = 250  # definitions tried for a window; 10,000 characters of ordinary code name fewer than 100
CODE_FIRST = 2000  # weight: longer code goes before the instruction, so the next instruction on it finds it prefilled
ADDED = re.compile(r"\A[)\]}>\"'`;:,]+(?=\r?\n|\Z)")
NAME = re.compile(r"(\.|->|::)?([^\W\d]\w+)")
WORDS = re.compile(r"[^\W\d]\w{2,}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for vpsd."""

    body: dict[str, Any]  # vpsd's fields: `mode`, and `prompt`, `suffix`, `extra` or `messages`
    kept: dict[str, Any]  # the parts of the user's text that it holds, see `prepare`
    weight: int  # of its text, for `Ratio`
    above: str = ""  # its text up to the cursor, in the order in which the backend reads it
    cut: bool = False  # the text was cut to limit the prefill; otherwise there would be room for more


class Fit:
    """Selects the parts of a text that is too long: imports, needed definitions, and a window up to the text's end.

    While someone types at the end, only the end of the prompt may change: whatever follows the first change must be
    prefilled again. So every choice depends only on the text before `still`, a position that moves in steps of about a
    quarter of the room; the text after `still` is sent unchanged.
    """

    def __init__(self, source: Source, room: int, about: str) -> None:
        self.source, self.room, self.about = source, room, about
        text = source.text
        step = 1 << max(7, (room // 4).bit_length() - 1)
        behind = (step + step // 4) * 9 // 8  # the weight allowed for the text after `still`
        while True:
            self.cell = step // 4
            self.still = max(0, len(text) - self.cell) // step * step
            if step <= 128 or weigh(text[self.still :]) <= behind:
                break
            step //= 2  # digits or rare characters
        self.taken: dict[Piece, None] = {}  # pieces to send besides the window, in the order of choice
        self.paid: set[Definition] = set()  # definitions whose signatures are sent around a piece
        room -= behind
        self.start = self.window_start(room * (3 if about else 5) // 8)
        self.select(room)
        self.start = self.window_start(room - weigh(source.render(self.taken, self.start)))
        self.taken = {piece: None for piece in self.taken if piece.end <= self.start}

    def window_start(self, room: int) -> int:
        """The first statement from which the text up to `still` fits into the room."""
        text, cell = self.source.text, self.cell
        grid = range(max(0, self.still - 3 * max(room, 0)) // cell * cell, self.still, cell)
        for position in grid[bisect_left(grid, -room, key=lambda position: -weigh(text[position : self.still])) :]:
            start = self.source.statement(position, position + cell // 2) if position else 0
            if weigh(text[start : self.still]) <= room:
                return start
        return self.still

    def select(self, room: int) -> None:
        """Take text above the window: definitions that resemble the instruction, imports, and needed definitions."""
        text = self.source.text
        if self.about:
            self.take(self.resembling(), room * 3 // 8)
        found = takewhile(lambda match: match.start() < self.still, NAME.finditer(text, self.start))
        # The window's names, the last first, and whether each is a member: `a.b` gives ("b", True), ("a", False).
        names = list(dict.fromkeys((match[2], bool(match[1])) for match in found))[::-1]
        used = {name for name, _ in names}
        imports = list(self.source.imports(self.start))
        imports.sort(key=lambda piece: used.isdisjoint(WORDS.findall(text, piece.start, piece.end)))
        self.take(([[piece]] for piece in imports), room // 8)
        around = self.source.enclosing(self.start)
        needed = (one for name, member in names for one in self.named(name, member, around))
        self.take(map(self.forms, islice(needed, MAX_CANDIDATES)), room // 4)

    def take(self, wanted: Iterable[Iterable[list[Piece]]], room: int) -> None:
        """For each wanted item, take the first form that fits the room."""
        for forms in wanted:
            for pieces in forms:
                new = [piece for piece in pieces if piece not in self.taken]
                around = {definition for piece in new for definition in piece.around} - self.paid
                texts = [self.source.text[piece.start : piece.end] for piece in new]
                texts += [self.source.signature(definition) for definition in around]
                cost = sum(weigh(text) + len(self.source.mark) for text in texts)
                if cost <= room:
                    room -= cost
                    self.taken |= dict.fromkeys(new)
                    self.paid |= around
                    break
            if room < 60:
                break

    def named(self, name: str, member: bool, around: tuple[Definition, ...]) -> list[Definition]:
        """The definitions that a name means, if they are above the window and at most three. A member of a class counts
        only where it is named as a member (`a.b`)."""
        named = (one for one in self.source.by_name.get(name, ()) if one.start < self.still)
        known = [one for one in named if member or not one.indent or one.parent in around]
        if not known or known[-1].start >= self.start or len(known) > 3:
            return []
        return known[-1:] if self.source.language.indented else known

    def forms(self, definition: Definition) -> Iterator[list[Piece]]:
        """A whole definition; then, if it has a block, its outline, and its signature and docstring alone."""
        if whole := self.source.whole(definition, self.room // (3 if self.about else 12)):
            yield [whole]
        signature, blocks = self.source.signature(definition).rstrip(), self.source.language.blocks
        if signature.endswith((":", "{")) or (blocks == "words" and self.source.has_block(definition)):
            outline = self.source.outline(definition)
            yield from (outline, outline[:1])

    def resembling(self) -> Iterator[Iterable[list[Piece]]]:
        """Forms of definitions above the window, ranked by the instruction's words in them; rare words count more."""
        definitions, text = self.source.definitions, self.source.text
        text = text.lower() if text.isascii() else text  # outside ASCII, lower() may change the length
        starts = [definition.start for definition in definitions if definition.start < self.start]
        scores: Counter[int] = Counter()
        for word in sorted({word.lower() for word in WORDS.findall(self.about, 0, 2000)})[:40]:
            found = islice(re.finditer(re.escape(word), text), 2000)
            units = {bisect_right(starts, match.start()) - 1 for match in found} - {-1}
            for unit in units:
                scores[unit] += 100 // len(units) + 100 * (definitions[unit].name.lower() == word)
        for unit in sorted(scores, key=lambda unit: (-scores[unit], unit))[:40]:
            yield self.forms(definitions[unit])

    def kept(self) -> dict[str, Any]:
        """What is kept, for a person, as in `prepare`. `lines` counts the lines of the window."""
        imports = any(not piece.name for piece in self.taken)
        names = list(dict.fromkeys(piece.name for piece in self.taken if piece.name))
        parts = ["imports"] * imports + ["definitions"] * bool(names) + ["window"]
        lines = len(self.source.text[self.start :].splitlines())
        return {"parts": parts, "lines": lines, "definitions": names}


def fits(text: str, room: int) -> bool:
    return len(text) <= 3 * room and weigh(text) <= room


def fit(text: str, language: Language, room: int, about: str = "") -> tuple[str, dict[str, Any]]:
    """Parts of `text` that weigh at most `room`, and a summary as in `Fit.kept`. A text that fits stays unchanged."""
    if fits(text, room):
        return text, {"parts": ["all"]}
    source, share = Source(text, language), room
    while share > 600:
        fitted = Fit(source, share, about)
        result = source.render(fitted.taken, fitted.start) + text[fitted.start :]
        if weigh(result) <= room:
            return result, fitted.kept()
        share //= 2
    return fit_start(text[: -3 * room - 1 : -1], room)[::-1], {"parts": ["window"]}


def fit_start(text: str, room: int) -> str:
    """The start of `text` that weighs at most `room`: whole lines, unless the first is too long."""
    if fits(text, room):
        return text
    text = text[: 3 * max(room, 0)]
    while weigh(text) > room:
        text = text[: len(text) * room // weigh(text)]
    return text[: text.rfind("\n") + 1] or text


def prepare(
    fields: Mapping[str, Any],
    mode: str,
    budget: int,
    ratio: float,
    max_fresh: int | None = None,
    cached: Sequence[str] = (),
    layout: str = "psm",
) -> Prepared:
    """vpsd's fields for a request, with a prompt of about `budget` tokens at most.

    `mode` comes from `detect_mode`, or is "chat"; `ratio` from the model's `Ratio`. A text that fits is sent unchanged,
    byte for byte. `kept` describes the text sent: `{"characters": 8120, "of": 102400, "parts": ["imports",
    "definitions", "window"], "lines": 158, "definitions": ["Account"]}`. If nothing is left out, `parts` is ["all"].

    `max_fresh` limits the tokens to prefill. `cached` holds texts that the backend has prefilled; the longest start
    that the prompt shares with one of them does not count. `layout` is that of the model's gaps, see `arrange_gap`.
    """
    room = max(int((budget - TEMPLATE_TOKENS[mode]) * ratio), 0)
    if mode == "chat":
        return prepare_chat(fields["messages"], room)
    if mode == "instruct":
        prepared = prepare_instruction(fields, room)
    else:
        fresh_room = None if max_fresh is None else max(int((max_fresh - TEMPLATE_TOKENS[mode]) * ratio), MIN_FRESH)
        prepared = prepare_text(fields, mode, room, fresh_room, cached, layout)
    if fields.get("filename"):
        prepared.body["filename"] = fields["filename"]
    return prepared


def prepare_instruction(fields: Mapping[str, Any], room: int) -> Prepared:
    """An instruction, and its code in a fence."""
    language, prompt = syntax(fields["language"]), fields.get("prompt") or ""
    instruction, code = fields.get("instruction") or "", prompt
    if not instruction:
        instruction, code = split_instruction(prompt, language) or (prompt, "")
        if not code and not fits(instruction, room):  # then the lines after its first are probably code
            instruction, _, code = instruction.strip().partition("\n")
    instructed = fit_start(instruction.strip(), room // 2 if code else room)
    sent, kept = fit(code, language, room - weigh(instructed), instructed)
    if len(instructed) < len(instruction.strip()):
        kept["parts"] = ["instruction", *(part for part in kept["parts"] if part != "all")]
    ticks = max(["``", *re.findall("``+", sent)], key=len) + "`"  # a longer fence than those in the code
    fence = f"{ticks}{fields['language']}\n"
    block = f"{fence}{sent}" + "\n" * (not sent.endswith("\n")) + ticks if code else ""
    text = "\n\n".join(filter(None, [instructed, block][:: -1 if weigh(sent) > CODE_FIRST else 1]))
    # Starting the answer with its fence keeps a model from chatting first. Asking for "the code alone" would do so too,
    # but then a small model leaves out the comments and steps that get the code right.
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": fence}]
    kept = {"characters": len(sent) + len(instructed), "of": len(code) + len(instruction), **kept}
    return Prepared({"mode": "instruct", "messages": messages}, kept, weigh(text))


def prepare_text(
    fields: Mapping[str, Any], mode: str, room: int, fresh_room: int | None, cached: Sequence[str], layout: str
) -> Prepared:
    """The text around the cursor, after the texts of other files if there are any."""
    language, prompt, suffix = syntax(fields["language"]), fields.get("prompt") or "", fields.get("suffix") or ""
    if fields.get("special"):  # a layout of the model's own, of which nothing may be left out
        size = {"characters": len(prompt), "of": len(prompt), "parts": ["all"]}
        return Prepared({"mode": mode, "prompt": prompt}, size, weigh(prompt), prompt)
    extra = fit_extra(fields.get("extra") or (), room // EXTRA_SHARE)
    above, cut = render_extra(extra), False
    room -= weigh(above)
    step, spare = max(1, room // SPARE_STEPS), room - weigh(prompt[: 3 * room])
    after = suffix if mode == "infill" else ""
    if not fits(after, spare):
        after = fit_start(after, max(room // SUFFIX_SHARE, spare // step * step))
    sent, kept = fit(prompt, language, room - weigh(after))
    if fresh_room is not None:
        start = above + read_first(after, layout)
        read = max((common_length(start + sent, text) for text in cached), default=0)
        fresh, for_after = weigh((start + sent)[read:]), fresh_room // SUFFIX_FRESH
        if layout == "psm":  # the suffix is read last: it gets what the prompt leaves
            cut = fresh > fresh_room - for_after
            if cut:
                sent, kept = fit(prompt, language, fresh_room - for_after)
                fresh = weigh(sent)
            after = fit_start(after, fresh_room - fresh)
        else:  # the suffix is read first: what the backend has read of it stays
            cut = fresh > fresh_room
            if cut and read < len(start):
                after = fit_start(after, for_after)
                sent, kept = fit(prompt, language, fresh_room - for_after)
            elif cut:
                sent, kept = fit(prompt, language, fresh_room)
        if cut and read < len(above):
            above, extra = "", []
    if len(after) < len(suffix):
        kept["parts"] = [*(part for part in kept["parts"] if part != "all"), "suffix"]
    body: dict[str, Any] = {"mode": mode, "prompt": sent, "heal": True}
    body |= {"suffix": after} if mode == "infill" else {}
    body |= {"extra": extra} if extra else {}
    kept = {"characters": len(sent) + len(after), "of": len(prompt) + len(suffix), **kept}
    return Prepared(body, kept, weigh(above + sent + after), above + read_first(after, layout) + sent, cut)


def arrange_gap(layout: str, marks: Sequence[Any], prefix: Any, suffix: Any) -> list[Any]:
    """The marks of a gap (before the prefix, before the suffix, last) and its texts, in the order of the layout.

    The layouts are those of Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022). In
    "spmv2" the prefix's own mark has no text: for the model, the prefix is the beginning of the middle. The prompt then
    ends with the text before the cursor, so each key that is typed there only adds to the prompt.
    """
    before, after, middle = marks
    parts = {"psm": [before, prefix, after, suffix, middle], "spm": [after, suffix, before, prefix, middle]}
    return parts.get(layout, [before, after, suffix, middle, prefix])


def steady_suffix(suffix: str) -> str:
    """A suffix without the brackets and quotes that end the cursor's line. Editors add them while one types, and with
    the suffix first, whatever changes it makes the model read everything again. The model writes them itself, and the
    completion ends there."""
    return ADDED.sub("", suffix, count=1)


def read_first(suffix: str, layout: str) -> str:
    """What of the suffix a backend reads before the prefix."""
    return {"spm": suffix, "spmv2": steady_suffix(suffix)}.get(layout, "")


def fit_extra(extra: Sequence[Mapping[str, str]], room: int) -> list[Mapping[str, str]]:
    """The last of other files' texts that fit, in their order. The room does not depend on the file's own text: these
    texts precede it, and a prompt whose start changes must be prefilled again."""
    weights = (weigh(render_extra([entry])) for entry in reversed(extra))
    return list(extra[len(extra) - count_fitting(weights, room) :])


def count_fitting(weights: Iterable[int], room: int) -> int:
    """How many of the first weights fit into the room together."""
    return sum(1 for _ in takewhile(lambda total: total <= room, accumulate(weights)))


def render_extra(extra: Sequence[Mapping[str, str]]) -> str:
    """Other files' texts as one, to weigh and to compare."""
    return "".join(f"{entry['filename']}\n{entry['text']}\n" for entry in extra)


def common_length(one: str, other: str) -> int:
    """The length of the longest start that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def prepare_chat(messages: Sequence[Mapping[str, str]], room: int) -> Prepared:
    """A chat: its system message, and as many of its latest messages as fit. `messages` in `kept` is [sent, given].

    Messages are left out four at a time, if enough of them remain. The messages after the gap move forward, so a
    backend must prefill them again; this way it does so only every other turn.
    """
    system, turns = list(messages[:1]), list(messages[1:])
    if system[0]["role"] != "system" or not turns:
        system, turns = [], list(messages)
    system = [{**message, "content": fit_start(message["content"], room // 2)} for message in system]
    room -= sum(weigh(message["content"]) + MESSAGE_WEIGHT for message in system)
    last = {**turns[-1], "content": fit_ends(turns[-1]["content"], room - MESSAGE_WEIGHT)}
    room -= weigh(last["content"]) + MESSAGE_WEIGHT
    texts = [turn["content"] for turn in turns[-2 : -1 - MAX_TURNS : -1]]
    # A character weighs more than a third: to weigh a text that is longer would only take time.
    earlier = (weigh(text) + MESSAGE_WEIGHT if len(text) <= 3 * room else room + 1 for text in texts)
    taken = 1 + count_fitting(earlier, room)
    left_out = len(turns) - taken
    rounded = -(-left_out // 4) * 4
    start = rounded if 2 * (len(turns) - rounded) >= taken else left_out
    if 0 < start < len(turns) - 1 and turns[start]["role"] == "assistant":
        start += 1  # an answer without its question
    sent = [*system, *turns[start:-1], last]
    size, of = (sum(len(message["content"]) for message in some) for some in (sent, messages))
    kept = {"characters": size, "of": of, "parts": ["all"] if size == of else ["system"] * len(system) + ["latest"]}
    if len(sent) < len(messages):
        kept["messages"] = [len(sent), len(messages)]
    weight = sum(weigh(message["content"]) + MESSAGE_WEIGHT for message in sent)
    return Prepared({"mode": "complete", "stop_at": "none", "messages": sent}, kept, weight)


def fit_ends(text: str, room: int) -> str:
    """The start and the end of a text that is too long: people paste code and ask about it before or after the code."""
    if fits(text, room):
        return text
    half = max(0, (room - weigh(LEFT_OUT) - 2) // 2)
    return f"{fit_start(text, half)}\n{LEFT_OUT}\n{fit_start(text[: -3 * half - 1 : -1], half)[::-1]}"
