"""Prepares source code for a model: detects what a prompt asks for, and selects the parts of a long
file to send.

In: a request's fields. Out: the mode to ask in (`detect_mode`) and a prompt that fits the context
(`prepare`).

    >>> from cerebrum.text.prompt import detect_mode, prepare
    >>> detect_mode({"language": "python", "prompt": "Write a stack"})
    'instruct'
    >>> fields = {"language": "python", "prompt": "import os\\n" + 2000 * "x = 1\\n"}
    >>> prepare(fields, "complete", budget=1000).kept["parts"]
    ['window']

No text is refused, however odd, and the cost of a text is at most its length times a constant. A
language that is not in `LANGUAGES` is prepared like C. Pure, standard library only.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

from cerebrum.text.languages import LANGUAGES, Language, language_named
from cerebrum_common import HttpError

Fields = Mapping[str, Any]  # of a request
Kept = dict[str, Any]  # what is sent of a text, see `prepare`

# -------------------------------------------------------------------------------------- ways to ask

LINE_CHARACTERS = 400  # a longer first line is not a plain instruction
DETERMINER = (
    r"(?:an?|the|this|these|that|those|me|my|our|some|all|any|each|every|it|two|three|your)"
)
VERBS = (
    "add|build|calculate|change|check|clean|complete|compute|convert|count|create|debug|define"
    "|describe|design|develop|document|explain|extract|find|finish|fix|format|generate|get|give"
    "|help|implement|improve|insert|list|make|merge|migrate|modernize|modify|move|optimi[sz]e|parse"
    "|port|print|produce|provide|read|reduce|refactor|remove|rename|reorder|replace|restructure"
    "|reverse|review|rewrite|show|shorten|simplify|solve|sort|split|summari[sz]e|swap|tell|test"
    "|transform|translate|turn|update|use|validate|vectorize|wrap|write"
)
# In most languages no line begins with one of these verbs and a word. A text may be SQL in another
# language's string, so the lookahead leaves out `create table` and `explain select`.
PLAIN_VERBS = (
    "(?:code|create|debug|describe|document|explain|generate|implement|improve|optimi[sz]e|refactor"
    "|rewrite|simplify|translate|write) (?!(?:analyze|database|function|index|materialized|or"
    "|schema|select|table|temporary|trigger|type"
    r"|unique|user|view)\b)[\w`\"']"
)
ASKS = re.compile(
    r"(?:please|can you|could you|would you|will you|i (?:want|need|would like)|i'd like|help me"
    r"|you are an?)\b"
    r"|(?:how|what|why|when|where|which|is there|are there|does|do i|should i)\b.*\?$"
    rf"|given {DETERMINER}\b.*\b(?:return|write|find|compute|print|count|determine|implement)\b"
    r"|(?:an? |the )?(?:[\w+#]+ )?(?:function|program|script|class|method|module|code|snippet)"
    r" (?:for|that|to|which) \w"
    rf"|(?:{VERBS})(?: up)? {DETERMINER} ",
    re.IGNORECASE,
)
ASKS_PLAINLY = re.compile(PLAIN_VERBS, re.IGNORECASE)
COMMAND = re.compile(r"[A-Z]{2,}\b")  # in capitals, as in SQL or a Dockerfile


def syntax(fields: Fields) -> Language:
    """The syntax of a request's language. A language that models.toml adds gets C's, which most
    languages resemble.
    """
    return language_named(fields["language"]) or LANGUAGES["c"]


def detect_mode(fields: Fields) -> str:
    """ "complete", "infill" or "instruct": from the field `mode`, or else from the other fields and
    the prompt.

    A prompt that could be code or an instruction is completed. HttpError 400 names the field that
    contradicts another.
    """
    prompt = fields.get("prompt") or ""
    suffix = fields.get("suffix") or ""
    instruction = fields.get("instruction") or ""
    given = f"got {len(instruction or suffix)} characters"
    if suffix and instruction:
        raise invalid(f"instruction: expected nothing beside suffix, {given}")
    mode = fields.get("mode") or "auto"
    if mode == "auto" and suffix.strip():
        mode = "infill"
    elif mode == "auto":
        is_asked = instruction or is_instruction(prompt, syntax(fields))
        mode = "instruct" if is_asked else "complete"
    elif suffix and mode != "infill":
        raise invalid(f"suffix: expected nothing with mode {mode}, {given}")
    elif instruction and mode != "instruct":
        raise invalid(f"instruction: expected nothing with mode {mode}, {given}")
    if mode == "infill" and fields.get("suffix") is None:
        raise invalid("suffix: expected the text after the cursor with mode infill, got nothing")
    if mode != "infill" and not prompt and not instruction:
        raise invalid('prompt: expected a non-empty string, got the string ""')
    return mode


def invalid(message: str) -> HttpError:
    return HttpError("INVALID_REQUEST", message)


def is_instruction(prompt: str, language: Language) -> bool:
    """Whether the prompt is plainly an instruction, such as `Write a stack`."""
    text = prompt.strip()
    first = text.partition("\n")[0].rstrip()
    # Prose of several lines may begin with such a line.
    may_be_prose = language is LANGUAGES["markdown"] and first != text
    return not may_be_prose and asks(first, language)


def asks(line: str, language: Language) -> bool:
    """Whether a line is plainly an instruction, not code."""
    is_code = line.endswith((";", "{", "(", "="))
    if is_code or len(line) > LINE_CHARACTERS:
        return False
    is_request = bool(ASKS.match(line))
    if language.commands:
        return is_request and not COMMAND.match(line)
    return is_request or bool(ASKS_PLAINLY.match(line))


# --------------------------------------------------------------------------------- weight of a text

RATIO = 3.5  # weight per token; with Qwen, one file in fifty is below 3.5
# The weight of a character by its kind, in fifths: a regression of Qwen's token counts over files
# in five languages. Most words are one token whatever their length; each digit is one, and many
# signs are; indentation is nearly free. A byte counts for the first kind that has it.
FIFTHS = {
    string.ascii_lowercase.encode() + b"\t\r": 3,
    b" ": 10,
    string.punctuation.encode(): 11,
    string.ascii_uppercase.encode(): 5,
    b"\n": 8,
    bytes(range(128)): 32,  # digits, and control characters, which cost as much
    bytes(range(128, 256)): 10,
}
DOUBLE_SPACE = -16
MAX_CHARS_PER_WEIGHT = 3  # deep indentation has two and a half


def weigh(text: str) -> int:
    """The size of a text in characters of average code. Divided by a ratio, it gives the text's
    tokens.
    """
    rest = text.encode(errors="replace")
    fifths = DOUBLE_SPACE * rest.count(b"  ")
    for kind, weight in FIFTHS.items():
        before = len(rest)
        rest = rest.translate(None, kind)
        fifths += weight * (before - len(rest))
    return -(-fifths // 5)


# --------------------------------------------------------------------------------- fitting a prompt

# A room is the weight that a text may have.

LEFT_OUT = "... lines left out"
# What is searched of a longer file: what the Pi spends on one request keeps all others waiting.
DEFINITIONS_CHARACTERS = 200_000
MIN_STEP = 16  # characters between the places where a window may start
LINE_START = re.compile(
    r"^[ \t]*(?!\Z|[\s)}\]{#&|.?:+*]|//|/\*"
    r"|(?:el(?:se|if|sif|seif)|except|finally|catch|case|default|and|or"
    r"|rescue|ensure|end|fi|done|esac|then|do)\b|</)",
    re.M,
)
# The template's tokens besides the text: special tokens, and a system message of its own.
TEMPLATE_TOKENS = {"complete": 4, "infill": 16, "instruct": 64, "chat": 32}
# Weights of the text around a cursor: with more than 800 tokens a model completes no more lines,
# and 200 are read while one looks.
WINDOW = 3200
NEAR = 800
SOON = 2 * NEAR  # for an engine that does not say what it has read
# The suffix gets half of the room, or an eighth where it is read last, and each key reads it anew.
SUFFIX_SHARE = 2
LAST_SHARE = 8
# While one types, the room that a short file leaves for the suffix shrinks only now and then.
SPARE_STEPS = 16
EXTRA_SHARE = 3  # other files' texts get a third of the room at most
MESSAGE_WEIGHT = 18  # a template's tokens around one message
MAX_TURNS = 99  # vpsd takes a hundred messages
# weight: longer code goes before the instruction, so the next instruction on it finds it prefilled
CODE_FIRST = 2000
ADDED = re.compile(r"\A[)\]}>\"'`;:,]+(?=\r?\n|\Z)")
NAME = re.compile(r"[^\W\d]\w+")


File = Mapping[str, str]  # another file: {"filename", "text"}
Message = Mapping[str, str]  # of a chat: {"role", "content"}


class Prepared(NamedTuple):
    """A request for vpsd."""

    body: dict[str, Any]  # vpsd's fields: `mode`, and `prompt`, `suffix`, `extra` or `messages`
    kept: Kept  # the parts of the user's text that it holds, see `prepare`
    weight: int  # of its text


def fits(text: str, room: int) -> bool:
    can_fit = len(text) <= MAX_CHARS_PER_WEIGHT * room
    return can_fit and weigh(text) <= room


def fit(text: str, language: Language, room: int) -> str:
    """A window up to the end of `text` that weighs at most `room`.

    While someone types at the end, only the end of the prompt may change: whatever follows the
    first change must be prefilled again. So the window starts at the first statement behind a
    multiple of a step. A text that fits stays unchanged.
    """
    if fits(text, room):
        return text
    # A power of two, up to a sixth of the room, since digits weigh six.
    step = max(MIN_STEP, 1 << (room // 6).bit_length() >> 1)
    mark = language.remark(LEFT_OUT) + "\n"
    start = window_start(text, step, room - weigh(mark))
    if start is None:
        return fit_end(text, room)
    return mark + text[find_statement(text, start, start + step // 2) :]


def window_start(text: str, step: int, room: int) -> int | None:
    """The first multiple of `step` from which on the text fits into the room; None if not even the
    last one does.
    """
    earliest = max(0, len(text) - MAX_CHARS_PER_WEIGHT * room)
    first = earliest // step * step
    starts = range(first, len(text), step)
    found = bisect_left(starts, -room, key=lambda start: -weigh(text[start:]))
    return starts[found] if found < len(starts) else None


def find_statement(text: str, start: int, stop: int) -> int:
    """The start of the first of the least indented statements in the range; if none, of a line;
    else `start`.
    """
    statements = LINE_START.finditer(text, start, stop)
    least = min(statements, key=lambda match: len(match[0]), default=None)
    if least:
        return least.start()
    return text.find("\n", start, stop) + 1 or start


def fit_start(text: str, room: int) -> str:
    """The start of `text` that weighs at most `room`: whole lines, unless the first is too long.
    `room` is at least 0.
    """
    if fits(text, room):
        return text
    text = text[: MAX_CHARS_PER_WEIGHT * room]
    while (weight := weigh(text)) > room:
        text = text[: len(text) * room // weight]
    return text[: text.rfind("\n") + 1] or text


def fit_end(text: str, room: int) -> str:
    """The end of `text` that weighs at most `room`, cut like `fit_start`."""
    return fit_start(text[::-1], room)[::-1]


def prepare(
    fields: Fields,
    mode: str,
    budget: int,
    layout: str = "psm",
    is_editors: bool = False,
    around: int = WINDOW,
) -> Prepared:
    """vpsd's fields for a request, with a prompt of about `budget` tokens at most.

    `mode` comes from `detect_mode`, or is "chat". A text that fits is sent unchanged, byte for
    byte. `kept` describes the text sent: `{"characters": 8120, "of": 102400, "parts": ["window",
    "suffix"]}` if a window of the prompt and the beginning of the suffix are sent. `parts` are
    those that were cut, or else ["all"].

    `layout` is that of the model's gaps, see `arrange_gap`. An editor's request has a window around
    the cursor even at the end of a file, where there is no gap. `around` is the most that a window
    weighs.
    """
    text_tokens = budget - TEMPLATE_TOKENS[mode]
    room = max(int(text_tokens * RATIO), 0)
    if mode == "chat":
        return prepare_chat(fields["messages"], room)
    if mode == "instruct":
        prepared = prepare_instruction(fields, room)
    else:
        most = around if is_editors or mode == "infill" else room
        prepared = prepare_text(fields, mode, room, most, layout)
    if fields.get("filename"):
        prepared.body["filename"] = fields["filename"]
    return prepared


def prepare_instruction(fields: Fields, room: int) -> Prepared:
    """An instruction, and its code in a fence."""
    language = syntax(fields)
    prompt = fields.get("prompt") or ""
    given = fields.get("instruction")
    code = prompt if given else ""
    given = given or prompt
    instruction = given.strip()
    instructed = fit_start(instruction, room // 2 if code else room)
    room -= weigh(instructed)
    near = code
    if not fits(code, room):
        near = code[: end_of_named(code, language, instructed, room)]
    sent = fit(near, language, room)
    # A fence must be longer than those in the code.
    ticks = max(["``", *re.findall("``+", sent)], key=len) + "`"
    fence = f"{ticks}{fields['language']}\n"
    end = "" if sent.endswith("\n") else "\n"
    paragraphs = [instructed]
    if code:
        paragraphs.append(f"{fence}{sent}{end}{ticks}")
    if weigh(sent) > CODE_FIRST:
        paragraphs.reverse()
    text = "\n\n".join(filter(None, paragraphs))
    # Starting the answer with its fence keeps a model from chatting first. Asking for "the code
    # alone" would do so too, but then a small model leaves out the comments and steps that get the
    # code right.
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": fence}]
    characters = len(sent) + len(instructed)
    of = len(code) + len(given)
    kept = kept_of(characters, of, instruction=instructed != instruction, window=sent != code)
    return Prepared({"mode": "instruct", "messages": messages}, kept, weigh(text))


def kept_of(characters: int, of: int, **is_cut: bool) -> Kept:
    """A summary as in `prepare`, by which parts were cut."""
    parts = [name for name, cut in is_cut.items() if cut]
    return {"characters": characters, "of": of, "parts": parts or ["all"]}


def end_of_named(code: str, language: Language, instruction: str, room: int) -> int:
    """Where the window of the code that an instruction gets ends. By the first definition of the
    longest name that the instruction has, half of the window is below its start; but a window at
    the code's beginning is filled. If it names none, at the end of the code.
    """
    words = set(NAME.findall(instruction))
    named = dict[str, int]()
    for match in language.defines.finditer(code, 0, DEFINITIONS_CHARACTERS):
        name = match[match.lastindex or 0]
        if name in words:
            named.setdefault(name, match.start())
    if not named:
        return len(code)
    start = named[max(named, key=len)]
    below = fit_start(code[start:], room // 2)
    return max(start + len(below), len(fit_start(code, room)))


# ------------------------------------------------------------------------- the text around a cursor


def prepare_text(fields: Fields, mode: str, room: int, most: int, layout: str) -> Prepared:
    """The text around the cursor, after the texts of other files if there are any. These get up to
    a third of the room, the text around the cursor the rest, but `most` at most.
    """
    prompt = fields.get("prompt") or ""
    suffix = fields.get("suffix") or ""
    # Written by the client with the model's special tokens; nothing of it may be left out.
    if fields.get("special"):
        kept = kept_of(len(prompt), len(prompt))
        return Prepared({"mode": mode, "prompt": prompt}, kept, weigh(prompt))
    language = syntax(fields)
    extra = fit_extra(fields.get("extra") or (), room // EXTRA_SHARE)
    files = render_extra(extra)
    share = LAST_SHARE if layout == "psm" else SUFFIX_SHARE
    around = min(room - weigh(files), most)
    before, after = window(prompt, suffix, language, around, share)
    # "heal": vpsd may rewrite the prompt's last token.
    body: dict[str, Any] = {"mode": mode, "prompt": before, "heal": True}
    if mode == "infill":
        body["suffix"] = after
    if extra:
        body["extra"] = extra
    characters = len(before) + len(after)
    of = len(prompt) + len(suffix)
    kept = kept_of(characters, of, window=before != prompt, suffix=after != suffix)
    return Prepared(body, kept, weigh(files + before + after))


def window(prompt: str, suffix: str, language: Language, room: int, share: int) -> tuple[str, str]:
    """What fits into the room of the text before and behind the cursor. The suffix gets the room
    that the prompt leaves, at least one part of so many.
    """
    # A prompt that is longer than this leaves nothing, whatever the rest of it weighs.
    spare = room - weigh(prompt[: MAX_CHARS_PER_WEIGHT * room])
    if not fits(suffix, spare):
        step = max(1, room // SPARE_STEPS)
        steady = spare // step * step
        suffix = fit_start(suffix, max(room // share, steady))
    return fit(prompt, language, room - weigh(suffix)), suffix


def nearer(fields: Fields, layout: str) -> Iterator[Fields]:
    """What may be read instead of a request's text, `fields` from most to least: less of a suffix
    that each key reads anew; the nearest 400 tokens, and 200.
    """
    prompt = fields["prompt"]
    suffix = fields["suffix"]
    share = SUFFIX_SHARE
    if layout == "psm" and suffix:
        share = LAST_SHARE
        yield {"suffix": fit_start(suffix, NEAR // share)}
    for room in (SOON, NEAR):
        before, after = window(prompt, suffix or "", syntax(fields), room, share)
        yield {"prompt": before, "suffix": after if suffix else suffix, "extra": ()}


def arrange_gap(layout: str, marks: Sequence[Any], prefix: Any, suffix: Any) -> list[Any]:
    """The marks of a gap (before the prefix, before the suffix, last) and its texts, in the order
    of the layout.

    The layouts are those of Bavarian et al., "Efficient Training of Language Models to Fill in the
    Middle" (2022). In "spmv2" the prefix's own mark has no text: for the model, the prefix is the
    beginning of the middle. The prompt then ends with the text before the cursor, so each key that
    is typed there only adds to the prompt.
    """
    before, after, middle = marks
    if layout == "psm":
        return [before, prefix, after, suffix, middle]
    if layout == "spm":
        return [after, suffix, before, prefix, middle]
    return [before, after, suffix, middle, prefix]


def steady_suffix(suffix: str) -> str:
    """A suffix without the brackets and quotes that end the cursor's line. Editors add them while
    one types, and with the suffix first, whatever changes it makes the model read everything again.
    The model writes them itself, and the completion ends there.
    """
    return ADDED.sub("", suffix, count=1)


def fit_extra(extra: Sequence[File], room: int) -> list[File]:
    """The last of other files' texts that fit, in their order. The room does not depend on the
    file's own text: these texts precede it, and a prompt whose start changes must be prefilled
    again.
    """
    weights = (weigh(render_extra([entry])) for entry in reversed(extra))
    return list(extra[len(extra) - count_fitting(weights, room) :])


def count_fitting(weights: Iterable[int], room: int) -> int:
    """How many of the first weights fit into the room together."""
    fitting = takewhile(lambda total: total <= room, accumulate(weights))
    return len(list(fitting))


def render_extra(extra: Sequence[File]) -> str:
    """Other files' texts as one, to weigh and to compare."""
    return "".join(f"{entry['filename']}\n{entry['text']}\n" for entry in extra)


# ------------------------------------------------------------------------------------------- a chat


def prepare_chat(messages: Sequence[Message], room: int) -> Prepared:
    """A chat: its system message, and as many of its latest messages as fit. `messages` in `kept`
    is [sent, given].
    """
    first = len(messages) > 1 and messages[0]["role"] == "system"  # index of the first turn
    turns = messages[first:]
    system = [
        {**message, "content": fit_start(message["content"], room // 2)}
        for message in messages[:first]
    ]
    room -= sum(map(weigh_message, system))
    text = fit_ends(turns[-1]["content"], room - MESSAGE_WEIGHT)
    last = {**turns[-1], "content": text}
    start = first_turn(turns, room - weigh_message(last))
    sent = [*system, *turns[start:-1], last]
    characters = sum(len(message["content"]) for message in sent)
    given = sum(len(message["content"]) for message in messages)
    is_cut = characters != given
    kept = kept_of(characters, given, system=is_cut and first, latest=is_cut)
    if len(sent) < len(messages):
        kept["messages"] = [len(sent), len(messages)]
    body = {"mode": "complete", "stop_at": "none", "messages": sent}
    return Prepared(body, kept, sum(map(weigh_message, sent)))


def first_turn(turns: Sequence[Message], room: int) -> int:
    """The index of the first turn to send, if those before the last one have this room.

    Turns are left out four at a time, if many remain. The turns after the gap move forward, so a
    backend must prefill them again; this way it does so only every other turn.
    """
    latest = turns[-2 : -1 - MAX_TURNS : -1]
    # To weigh a text that cannot fit would only take time.
    short = takewhile(lambda turn: len(turn["content"]) <= MAX_CHARS_PER_WEIGHT * room, latest)
    taken = 1 + count_fitting(map(weigh_message, short), room)
    start = len(turns) - taken
    if taken > 8:  # most of them remain
        start = -(-start // 4) * 4
    if 0 < start < len(turns) - 1 and turns[start]["role"] == "assistant":
        start += 1  # an answer without its question
    return start


def weigh_message(message: Message) -> int:
    return weigh(message["content"]) + MESSAGE_WEIGHT


def fit_ends(text: str, room: int) -> str:
    """The start and the end of a text that is too long: people paste code and ask about it before
    or after the code.
    """
    if fits(text, room):
        return text
    left = room - weigh(LEFT_OUT) - 2
    half = max(0, left // 2)
    return f"{fit_start(text, half)}\n{LEFT_OUT}\n{fit_end(text, half)}"
