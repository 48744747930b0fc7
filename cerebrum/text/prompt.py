"""Prepares source code for a model: detects what a prompt asks for, and selects the parts of a long
file to send.

In: a request's fields. Out: the mode to ask in (`detect_mode`) and a prompt that fits the context
(`prepare`).

    >>> from cerebrum.text.prompt import detect_mode, prepare
    >>> detect_mode({"language": "python", "prompt": "Write a stack"})
    'instruct'
    >>> fields = {"language": "python", "prompt": "import os\\n" + 2000 * "x = 1\\n"}
    >>> prepare(fields, "complete", budget=1000, ratio=3.0).kept["parts"]
    ['imports', 'window']

No text is refused, however odd, and the cost of a text is at most its length times a constant. A
language that is not in `LANGUAGES` is prepared like C. Pure, standard library only.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, takewhile
from typing import Any

from cerebrum.text.languages import BY_NAME, LANGUAGES, Language
from cerebrum_common import HttpError

# -------------------------------------------------------------------------------------- ways to ask

LINE_CHARACTERS = 400  # a longer first line is not a plain instruction
COMMENT_CHARACTERS = 8000  # nor a longer comment
DETERMINER = (
    r"(?:an?|the|this|these|that|those|me|my|our|some|all|any|each|every|it|two|three|your)"
)
VERBS = (
    "add|build|calculate|change|check|clean|complete|compute|convert|count|create|debug|define|describe|design|develop"
    "|document|explain|extract|find|finish|fix|format|generate|get|give|help|implement|improve|insert|list|make|merge"
    "|migrate|modernize|modify|move|optimi[sz]e|parse|port|print|produce|provide|read|reduce|refactor|remove|rename"
    "|reorder|replace|restructure|reverse|review|rewrite|show|shorten|simplify|solve|sort|split|summari[sz]e|swap|tell"
    "|test|transform|translate|turn|update|use|validate|vectorize|wrap|write"
)
# In most languages no line begins with one of these verbs and a word. A text may be SQL in another
# language's string, so the lookahead leaves out `create table` and `explain select`.
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
# Most comments above code begin with a verb, too. An instruction asks to change "this" or something
# "in this function".
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
    """The syntax of a language. A language that models.toml adds gets C's syntax, which most
    languages resemble.
    """
    return LANGUAGES[BY_NAME.get(name.lower(), "c")]


def detect_mode(fields: Mapping[str, Any]) -> str:
    """ "complete", "infill" or "instruct": from the field `mode`, or else from the other fields and
    the prompt.

    A prompt that could be code or an instruction is completed. HttpError 400 names the field that
    contradicts another.
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
        raise HttpError(
            "INVALID_REQUEST", f"instruction: expected nothing with mode {mode}, {given}"
        )
    if mode == "infill" and fields.get("suffix") is None:
        raise HttpError(
            "INVALID_REQUEST",
            "suffix: expected the text after the cursor with mode infill, got nothing",
        )
    if mode != "infill" and not prompt and not instruction:
        raise HttpError("INVALID_REQUEST", 'prompt: expected a non-empty string, got the string ""')
    return mode


def split_instruction(prompt: str, language: Language) -> tuple[str, str] | None:
    """(instruction, code) if the prompt is plainly an instruction, alone or above code; otherwise
    None.

    `Write a stack` gives ("Write a stack", ""). `# Make this async` above a whole function gives
    the comment and the function. Above a signature without a body it gives None: that comment is
    about code still to be written.
    """
    text = prompt.strip()
    first = text.partition("\n")[0].rstrip()
    asks = len(first) <= LINE_CHARACTERS and not first.endswith((";", "{", "(", "="))
    asks = asks and bool(ASKS.match(first) or (not language.commands and ASKS_PLAINLY.match(first)))
    asks = asks and not (language.commands and COMMAND.match(first))
    if asks and (
        first == text or language is not LANGUAGES["markdown"]
    ):  # longer Markdown may begin so
        return prompt, ""
    comment, code = _leading_comment(prompt.lstrip(), language)
    return (comment, code) if EDITS.match(comment) and _is_whole(code, language) else None


def _leading_comment(text: str, language: Language) -> tuple[str, str]:
    """The comment at the start of the text, without its comment marks, and the text after it."""
    if language.block_comment and text.startswith(language.block_comment[0]):
        comment, _, code = text.partition(language.block_comment[1])
        comment = "" if len(comment) > COMMENT_CHARACTERS else comment
        return " ".join(comment.replace("*", " ").lstrip("/").split()), code.lstrip("\r\n")
    lines, end = list[str](), 0
    while language.line_comment and text.startswith(language.line_comment, end) and len(lines) < 20:
        stop = text.find("\n", end) + 1 or len(text)
        lines.append(text[end:stop].strip().lstrip(language.line_comment[0]).strip())
        end = stop
    return "" if end > COMMENT_CHARACTERS else " ".join(lines), text[end:]


def _is_whole(code: str, language: Language) -> bool:
    """Whether `code` has two lines or more and stops where a block may end, not where a person
    would type on.
    """
    end = code.rstrip()
    if (
        "\n" not in end.strip()
        or OPEN_END.search(end[-10:])
        or code[len(end) :].rpartition("\n")[2]
    ):
        return False
    if language.indented and end.endswith(('"""', "'''")):
        return False  # a docstring and no body yet
    return all(
        code.count(opening) <= code.count(closing) for opening, closing in ("{}", "()", "[]")
    )


# --------------------------------------------------------------------------------- weight of a text

FIRST_RATIO = 3.0  # weight per token, until a backend has reported a model's counts
MIN_RATIO, MAX_RATIO = 0.75, 3.5  # with Qwen, one file in fifty is below 3.5
# The weight of a character by its kind, in fifths: a regression of Qwen's token counts over files
# in five languages. Most words are one token whatever their length; each digit is one, and many
# signs are; indentation is nearly free.
FIFTHS = {b"a": 3, b"A": 5, b"0": 32, b"+": 11, b" ": 10, b"  ": -16, b"\n": 8, b"\xff": 10}
KINDS = bytes(
    # control characters fall through to the digits' kind: they cost as much
    code if chr(code) in " \n"
    else b"a"[0] if chr(code) in string.ascii_lowercase + "\t\r"
    else b"A"[0] if chr(code) in string.ascii_uppercase
    else b"+"[0] if chr(code) in string.punctuation
    else b"0"[0] if code < 128
    else 0xFF
    for code in range(256)
)  # fmt: skip


@dataclass(slots=True)
class Ratio:
    """Weight per token of each model's prompts, learned from the token counts that a backend
    reports.

    An estimate that is too high gets a prompt refused; one that is too low only leaves out some
    lines. So a lower observation counts at once, a higher one by a sixteenth. `get` moves in steps
    of a quarter, because a new ratio moves the window, and then the backend must prefill it again.
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
        if (
            not 0 <= low - self.get(model) < 0.4
        ):  # wider than a step, so that the value cannot flap between two
            self.given[model] = int(low * 4) / 4


def weigh(text: str) -> int:
    """The size of a text in characters of average code. Divided by a ratio, it gives the text's
    tokens.
    """
    kinds = text.encode("utf-8", "replace").translate(KINDS)
    return -(-sum(kinds.count(kind) * fifths for kind, fifths in FIFTHS.items()) // 5)


# --------------------------------------------------------------------------------- fitting a prompt

LEFT_OUT = "... lines left out"
MAX_IMPORTS, MAX_IMPORT_CHARACTERS = 1000, 4000
# What is searched of a longer file, from its start, and from the cursor for the names that the
# imports serve: what the Pi spends on one request keeps all others waiting.
IMPORTS_CHARACTERS, DEFINITIONS_CHARACTERS, NAMES_CHARACTERS = 100_000, 200_000, 20_000
IMPORTS_SHARE = 8  # the imports of a long file get an eighth of the room
LINE_START = re.compile(
    r"^[ \t]*(?!\Z|[\s)}\]{#&|.?:+*]|//|/\*|(?:el(?:se|if|sif|seif)|except|finally|catch|case|default|and|or"
    r"|rescue|ensure|end|fi|done|esac|then|do)\b|</)",
    re.M,
)
DOCSTRING_MARK = '"""'
# The template's tokens besides the text: special tokens, and a system message of its own.
TEMPLATE_TOKENS = {"complete": 4, "infill": 16, "instruct": 64, "chat": 32}
# the suffix gets an eighth of the room: where it follows the prefix, each key prefills it again
SUFFIX_SHARE = 8
SPARE_STEPS = (
    16  # the room that a short file leaves for the suffix shrinks only now and then while one types
)
SUFFIX_FRESH = 4  # the suffix gets a fourth of the weight that may be prefilled anew
MIN_FRESH = 600  # weight, about 200 tokens: with less text around the cursor a model can only guess
EXTRA_SHARE = 3  # other files' texts get a third of the room at most
MESSAGE_WEIGHT = 18  # a template's tokens around one message
MAX_TURNS = 99  # vpsd takes a hundred messages
# weight: longer code goes before the instruction, so the next instruction on it finds it prefilled
CODE_FIRST = 2000
ADDED = re.compile(r"\A[)\]}>\"'`;:,]+(?=\r?\n|\Z)")
NAME = re.compile(r"[^\W\d]\w+")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request for vpsd."""

    body: dict[str, Any]  # vpsd's fields: `mode`, and `prompt`, `suffix`, `extra` or `messages`
    kept: dict[str, Any]  # the parts of the user's text that it holds, see `prepare`
    weight: int  # of its text, for `Ratio`
    above: str = ""  # its text up to the cursor, in the order in which the backend reads it
    cut: bool = (
        False  # the text was cut to limit the prefill; otherwise there would be room for more
    )


def fits(text: str, room: int) -> bool:
    return len(text) <= 3 * room and weigh(text) <= room


def fit(text: str, language: Language, room: int) -> tuple[str, dict[str, Any]]:
    """The imports of `text` and a window up to its end, which weigh at most `room`, and a summary
    as in `prepare`.

    While someone types at the end, only the end of the prompt may change: whatever follows the
    first change must be prefilled again. So the window starts at the first statement behind a
    multiple of `step`, and the imports depend on the text before another multiple. A text that fits
    stays unchanged.
    """
    if fits(text, room):
        return text, {"parts": ["all"]}
    step = 1 << max(4, (room // 4).bit_length() - 1)
    while step > 16 and weigh(text[(len(text) // step - 1) * step :][:step]) > room // 3:
        step //= 2  # digits or rare characters
    mark = language.remark(LEFT_OUT) + ("\r\n" if "\r\n" in text[:4096] else "\n")
    imports = choose_imports(text, language, len(text) // step * step, room)
    for_imports = sum(weigh(text[start:end]) for start, end in imports)
    grid = range(
        max(0, len(text) - 3 * room) // step * step, len(text), step
    )  # a character weighs a third at least
    place = bisect_left(
        grid, for_imports + weigh(mark) - room, key=lambda position: -weigh(text[position:])
    )
    if place == len(grid):
        return fit_start(text[: -3 * room - 1 : -1], room)[::-1], {"parts": ["window"]}
    window = find_statement(text, language, grid[place], grid[place] + step // 2)
    head = "".join(text[start:end] for start, end in sorted(imports) if end <= window)
    lines = text.count("\n", window) + (not text.endswith("\n"))
    kept = {"parts": ["imports"] * bool(head) + ["window"], "lines": lines}
    return head + mark + text[window:], kept


def choose_imports(text: str, language: Language, stop: int, room: int) -> list[tuple[int, int]]:
    """The imports before `stop` that fit into their share of the room: first those of names in the
    text before `stop` that the window will hold.
    """
    used = set(NAME.findall(text, max(0, stop - min(room, NAMES_CHARACTERS)), stop))
    found = sorted(
        find_imports(text, language, stop),
        key=lambda one: used.isdisjoint(NAME.findall(text, *one)),
    )
    return found[
        : count_fitting((weigh(text[start:end]) for start, end in found), room // IMPORTS_SHARE)
    ]


def find_imports(text: str, language: Language, stop: int) -> Iterator[tuple[int, int]]:
    """Where the imports before `stop` start and end, each with all its lines."""
    end, stop = 0, min(stop, IMPORTS_CHARACTERS)
    for match in islice(language.imports.finditer(text, 0, stop), MAX_IMPORTS):
        if match.start() < end:
            continue
        end = line_end(text, match.end())
        line = text[match.start() : end]
        for opening, closing in ("()", "{}"):
            if line.count(opening) > line.count(closing):
                found = text.find(closing, end, min(end + MAX_IMPORT_CHARACTERS, stop))
                end = line_end(text, found) if found >= 0 else end
        if end - match.start() <= MAX_IMPORT_CHARACTERS:
            yield match.start(), end


def find_statement(text: str, language: Language, start: int, stop: int) -> int:
    """The start of the first of the least indented statements in the range; if none, of a line;
    else `start`.
    """
    comment = language.block_comment
    inside = ""  # the closing mark of a docstring or comment in which the range begins
    if language.indented:
        inside = DOCSTRING_MARK if text.count(DOCSTRING_MARK, 0, start) % 2 else ""
    elif comment and text.rfind(comment[0], 0, start) > text.rfind(comment[1], 0, start):
        inside = comment[1]
    if inside and (end := text.find(inside, start, stop)) >= 0:
        start = min(line_end(text, end), stop)
    found = min(
        LINE_START.finditer(text, start, stop), key=lambda match: len(match[0]), default=None
    )
    return found.start() if found else text.find("\n", start, stop) + 1 or start


def line_end(text: str, position: int) -> int:
    return text.find("\n", position) + 1 or len(text)


def fit_start(text: str, room: int) -> str:
    """The start of `text` that weighs at most `room`: whole lines, unless the first is too long."""
    if fits(text, room):
        return text
    text = text[: 3 * max(room, 0)]
    while (weight := weigh(text)) > room:
        text = text[: len(text) * room // weight]
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

    `mode` comes from `detect_mode`, or is "chat"; `ratio` from the model's `Ratio`. A text that
    fits is sent unchanged, byte for byte. `kept` describes the text sent: `{"characters": 8120,
    "of": 102400, "parts": ["imports", "window"], "lines": 158}`, where `lines` is the window's. If
    nothing is left out, `parts` is ["all"].

    `max_fresh` limits the tokens to prefill. `cached` holds texts that the backend has prefilled;
    the longest start that the prompt shares with one of them does not count. `layout` is that of
    the model's gaps, see `arrange_gap`.
    """
    room = max(int((budget - TEMPLATE_TOKENS[mode]) * ratio), 0)
    if mode == "chat":
        return prepare_chat(fields["messages"], room)
    if mode == "instruct":
        prepared = prepare_instruction(fields, room)
    else:
        fresh_room = (
            None
            if max_fresh is None
            else max(int((max_fresh - TEMPLATE_TOKENS[mode]) * ratio), MIN_FRESH)
        )
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
        if not code and not fits(
            instruction, room
        ):  # then the lines after its first are probably code
            instruction, _, code = instruction.strip().partition("\n")
    instructed = fit_start(instruction.strip(), room // 2 if code else room)
    room -= weigh(instructed)
    near = code if fits(code, room) else code[: end_of_named(code, language, instructed, room)]
    sent, kept = fit(near, language, room)
    if sent == near != code:
        kept["parts"] = ["window"]
    if len(instructed) < len(instruction.strip()):
        kept["parts"] = ["instruction", *(part for part in kept["parts"] if part != "all")]
    ticks = (
        max(["``", *re.findall("``+", sent)], key=len) + "`"
    )  # a longer fence than those in the code
    fence = f"{ticks}{fields['language']}\n"
    block = f"{fence}{sent}" + "\n" * (not sent.endswith("\n")) + ticks if code else ""
    text = "\n\n".join(filter(None, [instructed, block][:: -1 if weigh(sent) > CODE_FIRST else 1]))
    # Starting the answer with its fence keeps a model from chatting first. Asking for "the code
    # alone" would do so too, but then a small model leaves out the comments and steps that get the
    # code right.
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": fence}]
    kept = {"characters": len(sent) + len(instructed), "of": len(code) + len(instruction), **kept}
    return Prepared({"mode": "instruct", "messages": messages}, kept, weigh(text))


def end_of_named(code: str, language: Language, instruction: str, room: int) -> int:
    """Where the text to fit into `room` ends: half of it below the first definition of the longest
    name that the instruction has; if it names none, at the end of the code.
    """
    words, found = set(NAME.findall(instruction)), dict[str, int]()
    for match in language.defines.finditer(code, 0, DEFINITIONS_CHARACTERS):
        if (name := match[match.lastindex or 0]) in words:
            found.setdefault(name, match.start())
    return line_end(code, max(room, found[max(found, key=len)] + room // 2)) if found else len(code)


def prepare_text(
    fields: Mapping[str, Any],
    mode: str,
    room: int,
    fresh_room: int | None,
    cached: Sequence[str],
    layout: str,
) -> Prepared:
    """The text around the cursor, after the texts of other files if there are any."""
    language, prompt, suffix = (
        syntax(fields["language"]),
        fields.get("prompt") or "",
        fields.get("suffix") or "",
    )
    if fields.get("special"):  # a layout of the model's own, of which nothing may be left out
        size = {"characters": len(prompt), "of": len(prompt), "parts": ["all"]}
        return Prepared({"mode": mode, "prompt": prompt}, size, weigh(prompt), prompt)
    extra = fit_extra(fields.get("extra") or (), room // EXTRA_SHARE)
    above = render_extra(extra)
    room -= weigh(above)
    step, spare = max(1, room // SPARE_STEPS), room - weigh(prompt[: 3 * room])
    after = suffix if mode == "infill" else ""
    if not fits(after, spare):
        after = fit_start(after, max(room // SUFFIX_SHARE, spare // step * step))
    sent, kept = fit(prompt, language, room - weigh(after))
    cut = False
    if fresh_room is not None:
        start = above + read_first(after, layout)
        read = max((common_length(start + sent, text) for text in cached), default=0)
        fresh, for_after, last = (
            weigh((start + sent)[read:]),
            fresh_room // SUFFIX_FRESH,
            layout == "psm",
        )
        cut = fresh > fresh_room - for_after * last
        if not last and read >= len(start):  # the backend has read the suffix: it stays
            for_after = 0
        if cut:
            sent, kept = fit(prompt, language, fresh_room - for_after)
        if last:  # the suffix is read last: it gets what the prompt leaves
            after = fit_start(after, fresh_room - (weigh(sent) if cut else fresh))
        elif cut and for_after:
            after = fit_start(after, for_after)
        if cut and read < len(above):
            above, extra = "", []
    if len(after) < len(suffix):
        kept["parts"] = [*(part for part in kept["parts"] if part != "all"), "suffix"]
    body: dict[str, Any] = {"mode": mode, "prompt": sent, "heal": True}
    body |= {"suffix": after} if mode == "infill" else {}
    body |= {"extra": extra} if extra else {}
    kept = {"characters": len(sent) + len(after), "of": len(prompt) + len(suffix), **kept}
    return Prepared(
        body, kept, weigh(above + sent + after), above + read_first(after, layout) + sent, cut
    )


def arrange_gap(layout: str, marks: Sequence[Any], prefix: Any, suffix: Any) -> list[Any]:
    """The marks of a gap (before the prefix, before the suffix, last) and its texts, in the order
    of the layout.

    The layouts are those of Bavarian et al., "Efficient Training of Language Models to Fill in the
    Middle" (2022). In "spmv2" the prefix's own mark has no text: for the model, the prefix is the
    beginning of the middle. The prompt then ends with the text before the cursor, so each key that
    is typed there only adds to the prompt.
    """
    before, after, middle = marks
    parts = {
        "psm": [before, prefix, after, suffix, middle],
        "spm": [after, suffix, before, prefix, middle],
    }
    return parts.get(layout, [before, after, suffix, middle, prefix])


def steady_suffix(suffix: str) -> str:
    """A suffix without the brackets and quotes that end the cursor's line. Editors add them while
    one types, and with the suffix first, whatever changes it makes the model read everything again.
    The model writes them itself, and the completion ends there.
    """
    return ADDED.sub("", suffix, count=1)


def read_first(suffix: str, layout: str) -> str:
    """What of the suffix a backend reads before the prefix."""
    return {"spm": suffix, "spmv2": steady_suffix(suffix)}.get(layout, "")


def fit_extra(extra: Sequence[Mapping[str, str]], room: int) -> list[Mapping[str, str]]:
    """The last of other files' texts that fit, in their order. The room does not depend on the
    file's own text: these texts precede it, and a prompt whose start changes must be prefilled
    again.
    """
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
    """A chat: its system message, and as many of its latest messages as fit. `messages` in `kept`
    is [sent, given].

    Messages are left out four at a time, if enough of them remain. The messages after the gap move
    forward, so a backend must prefill them again; this way it does so only every other turn.
    """
    system, turns = list(messages[:1]), list(messages[1:])
    if system[0]["role"] != "system" or not turns:
        system, turns = [], list(messages)
    system = [
        {**message, "content": fit_start(message["content"], room // 2)} for message in system
    ]
    room -= sum(weigh(message["content"]) + MESSAGE_WEIGHT for message in system)
    last = {**turns[-1], "content": fit_ends(turns[-1]["content"], room - MESSAGE_WEIGHT)}
    room -= weigh(last["content"]) + MESSAGE_WEIGHT
    texts = [turn["content"] for turn in turns[-2 : -1 - MAX_TURNS : -1]]
    # A character weighs more than a third: to weigh a text that is longer would only take time.
    earlier = (
        weigh(text) + MESSAGE_WEIGHT if len(text) <= 3 * room else room + 1 for text in texts
    )
    taken = 1 + count_fitting(earlier, room)
    left_out = len(turns) - taken
    rounded = -(-left_out // 4) * 4
    start = rounded if 2 * (len(turns) - rounded) >= taken else left_out
    if 0 < start < len(turns) - 1 and turns[start]["role"] == "assistant":
        start += 1  # an answer without its question
    sent = [*system, *turns[start:-1], last]
    size, of = (sum(len(message["content"]) for message in some) for some in (sent, messages))
    kept = {
        "characters": size,
        "of": of,
        "parts": ["all"] if size == of else ["system"] * len(system) + ["latest"],
    }
    if len(sent) < len(messages):
        kept["messages"] = [len(sent), len(messages)]
    weight = sum(weigh(message["content"]) + MESSAGE_WEIGHT for message in sent)
    return Prepared({"mode": "complete", "stop_at": "none", "messages": sent}, kept, weight)


def fit_ends(text: str, room: int) -> str:
    """The start and the end of a text that is too long: people paste code and ask about it before
    or after the code.
    """
    if fits(text, room):
        return text
    half = max(0, (room - weigh(LEFT_OUT) - 2) // 2)
    return (
        f"{fit_start(text, half)}\n{LEFT_OUT}\n{fit_start(text[: -3 * half - 1 : -1], half)[::-1]}"
    )
