"""The syntax of each language, for preparing prompts and ending completions, and a guess of a text's language.

    >>> from cerebrum.text.languages import LANGUAGES, guess_language
    >>> LANGUAGES["python"].line_comment, LANGUAGES["go"].endings
    ('#', ('.go',))
    >>> guess_language("", "#!/usr/bin/env python3\\nimport os\\n")
    'python'

A language is one entry of `LANGUAGES`. The patterns search whole files from strangers. Each repetition is bounded, or
cannot match the same characters as its neighbours, so any line costs a few hundred steps plus its length. Pure;
standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

# ------------------------------------------------------------------------------------------------------------ languages


NOTHING = re.compile(r"(?!)")
ANYTHING = re.compile(r"")
_C_STRINGS = (('"', '"'), ("'", "'"))
AT_LEAST_A_CLASS = re.compile(r"\b(?:class|impl|trait)\b|\(")


@dataclass(frozen=True, slots=True)
class Language:
    """The parts of a language's syntax that preparing a prompt and ending a completion need.

    `blocks` names the limits of a block: "braces"; "brackets", braces and square brackets, where the innermost pair is
    completed; "indent", indentation; "words", indentation and a closing line; "statements", the same and semicolons;
    "lines", blank lines.
    """

    imports: re.Pattern[str] = NOTHING  # matches at a line that imports
    defines: re.Pattern[str] = NOTHING  # matches at a line that defines a name: the last group that took part
    containers: re.Pattern[str] = NOTHING  # matches the header of a block whose members are completed one at a time
    definition: re.Pattern[str] = AT_LEAST_A_CLASS  # matches the header of a block that is a completion by itself
    line_comment: str = "//"  # "" if there is none
    block_comment: tuple[str, str] | None = ("/*", "*/")
    strings: tuple[tuple[str, str], ...] = _C_STRINGS  # (opening, closing)
    multiline: frozenset[str] = frozenset()  # openings of strings that may contain a line end
    blocks: str = "braces"
    function: str = ""  # the keyword that defines functions, if calls may precede the definition
    raw: frozenset[str] = frozenset()  # openings of strings without escapes
    ambiguous: str = ""  # openings with two meanings: / of a regex or a division, ' of a char or a lifetime
    directives: bool = False  # a line that starts with # belongs to the preprocessor
    other_comments: tuple[tuple[str, str], ...] = ()  # (opening, closing)
    colons: bool = False  # a colon at its end makes a line a header (Python)
    expansion: re.Pattern[str] = NOTHING  # ends at a ( or quote that is code, inside a string in double quotes (shell)
    here_document: str = ""  # behind <<: group 2 is the line that ends the text below
    items: bool = False  # a line that begins with a dash is inside the line above, even at equal indentation (YAML)
    brackets: str = "([{"  # opening brackets that need a closing partner
    line_ends: bool = False  # a statement ends with its line, without a semicolon
    alternative: bool = False  # a colon after `if (...)` opens a block that `endif;` closes (PHP)
    commands: bool = False  # lines of code begin with verbs, as instructions do
    inside: str = ""  # starts of unindented lines that still belong to a definition
    closing: str = r"\}"  # start of the line that ends a definition
    close: str = "}"  # closes a block when only its header is sent
    endings: tuple[str, ...] = ()  # of file names, in lower case
    filenames: tuple[str, ...] = ()  # whole file names, in lower case
    names: tuple[str, ...] = ()  # aliases, in fences, modelines and shebang lines

    @property
    def indented(self) -> bool:
        return self.blocks == "indent"

    @property
    def comment_starts(self) -> tuple[str, ...]:
        """The possible starts of a comment line, for `str.startswith`."""
        return tuple(filter(None, [self.line_comment, *(opening for opening, _ in self.other_comments[:1])]))

    def remark(self, text: str) -> str:
        """The text as a one-line comment."""
        if self.line_comment or not self.block_comment:
            return f"{self.line_comment} {text}"
        return "{0} {2} {1}".format(*self.block_comment, text)


def _lines(pattern: str) -> re.Pattern[str]:
    """A pattern whose ^ and $ match at each line."""
    return re.compile(pattern, re.M)


_IN_PARENS = r"(?:[^()\n]|\([^()\n]{0,80}\)){0,160}"
_CPP_TEMPLATE = r"(?:template[ \t]*<[^\n<>]{0,160}(?:<[^\n<>]{0,80}>[^\n<>]{0,80}){0,3}>[ \t]*)?"
_C_ARGUMENTS = r"[ \t]*\([^;\n]{0,300}(?:\{|\r?$)"  # of a definition: no semicolon follows on the line
_RUST_RAW = tuple((f'r{marks}"', f'"{marks}') for marks in ("", "#", "##", "###"))
_RUST_VISIBLE = r"(?:pub(?:\([^)\n]{0,40}\))?[ \t]+)?"
_JS = Language(
    _lines(
        r"^(?:import\b(?![ \t]*[(.])|export\b[^\n]{0,300}\bfrom\b|(?:const|let|var)\b[^\n]{0,300}\brequire[ \t]*\()"
    ),
    _lines(
        r"^(?=[ \t]{0,200}[\w$*#])(?:[ \t]*(?:(?:export|default|declare|abstract|async)[ \t]+){0,4}"
        r"(?:function\b[ \t]*(?:\*[ \t]*)?|(?:class|interface|type|(?:const[ \t]+)?enum|namespace|module)[ \t]+)"
        r"([\w$]+)|(?:(?:export|declare)[ \t]+){0,2}(?:const|let|var)[ \t]+([\w$]+)"
        r"|[ \t]+(?:(?:public|private|protected|static|async|override|abstract|get|set)[ \t]+){0,4}[*#]?"
        r"(?!(?:if|for|while|switch|catch|function|return|await|with)\b)([\w$]+)[ \t]*(?:<[^\n()]{0,80}>)?"
        rf"\({_IN_PARENS}\)[^()\n;=]{{0,100}}\{{[ \t]*\r?$)"
    ),
    _lines(
        r"^[^\S\n]*(?:(?:export|default|declare|abstract)\s+){0,4}(?:class|interface|namespace|module)\b"
        r"|^[^\S\n]*(?:describe|context|suite)[^\S\n]*\("
    ),
    strings=(*_C_STRINGS, ("`", "`")),
    multiline=frozenset("`"),
    function="function",
    ambiguous="/",
    line_ends=True,
)
_C = Language(
    _lines(r"^(?:[ \t]*#[ \t]*(?:include|import)\b|using[ \t]+namespace\b|using[ \t]+[\w:]+[ \t]*;|import[ \t])"),
    _lines(
        r"^(?=[ \t]{0,200}[#\w~])(?:[ \t]*#[ \t]*define[ \t]+(\w+)"
        r"|typedef\b[^\n;{]{0,80}\{[^{}]{0,1500}\}[ \t]*(\w+)[ \t]*;"
        r"|typedef[ \t][^\n;({]{0,160}\b(\w+)[ \t]*;|using[ \t]+(\w+)[ \t]*="
        rf"|[ \t]*{_CPP_TEMPLATE}(?:typedef[ \t]+)?(?:struct|class|enum(?:[ \t]+class)?|union|namespace|concept)[ \t]+"
        r"(?:[A-Z_]+[ \t]+)?(\w+)(?:[ \t]*\r?$|[ \t]*(?::[^\n;()]{0,200})?\{|[ \t]*:[^\n;{]{0,200}$)"
        r"|[ \t]*(?!(?:return|else|new|delete|throw|case|goto|co_\w+|typedef|using)\b)"
        rf"{_CPP_TEMPLATE}[A-Za-z_][\w:<>,*& \t\[\]]{{0,160}}[ \t*&](?:[\w<>]{{1,60}}::){{0,3}}"
        rf"(?!(?:if|for|while|switch|return|sizeof|catch|defined)\b)(~?[A-Za-z_]\w{{0,80}}){_C_ARGUMENTS}"
        rf"|[A-Za-z_][\w<>]{{0,80}}::(~?[A-Za-z_]\w{{0,80}}){_C_ARGUMENTS}"
        r"|([A-Za-z_]\w{0,80})[ \t]?\([^;\n{}]{0,200}\)[ \t]*\r?\n\{)"
    ),
    re.compile(r"(?:^|\s)(?:class|struct|union|namespace|extern)\b[^()=]*$"),
    directives=True,
)
_PLAIN = Language(line_comment="#", block_comment=None, strings=(), blocks="lines", brackets="", close="")  # not code
LANGUAGES: dict[str, Language] = {
    "python": Language(
        _lines(r"^(?:import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b)"),
        _lines(
            r"^(?:[ \t]{0,200}(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|type[ \t]+(\w+)"
            r"|(\w+)[ \t]*(?::[^=\n]{1,200})?=(?!=))"
        ),
        re.compile(r"class\b"),
        line_comment="#",
        block_comment=None,
        strings=(('"""', '"""'), ("'''", "'''"), *_C_STRINGS),
        multiline=frozenset({'"""', "'''"}),
        blocks="indent",
        function="def",
        colons=True,
        endings=(".py", ".pyi", ".pyw"),
        names=("py", "python3"),
    ),
    "javascript": replace(_JS, endings=(".js", ".jsx", ".mjs", ".cjs"), names=("js", "jsx", "node")),
    "typescript": replace(_JS, endings=(".ts", ".tsx", ".mts", ".cts"), names=("ts", "tsx", "deno", "bun")),
    "rust": Language(
        _lines(rf"^{_RUST_VISIBLE}(?:use|extern[ \t]+crate|mod[ \t]+\w+[ \t]*;)(?:[ \t]|\r?$)"),
        _lines(
            rf"^[ \t]{{0,200}}{_RUST_VISIBLE}"
            r"(?:(?:async|unsafe|const|default|extern(?:[ \t]+\"[^\"\n]{0,20}\")?)[ \t]+){0,4}"
            r"(?:(?:fn|struct|enum|union|trait|type|mod|static(?:[ \t]+mut)?|const|macro_rules!)[ \t]+(\w+)"
            r"|impl\b(?:<[^\n{]{0,160}>)?[ \t]+(?:[^\n{]{0,160}[ \t]for[ \t]+)?(?!for\b)(?:\w+::){0,4}(\w+))"
        ),
        _lines(r"^[^\S\n]*(?:pub(?:\([^)\n]*\))?\s+)?(?:unsafe\s+)?(?:impl|trait|mod|extern)\b"),
        strings=(*_RUST_RAW, ('"', '"')),
        multiline=frozenset(('"', *(opening for opening, _ in _RUST_RAW))),
        function="fn",
        raw=frozenset(opening for opening, _ in _RUST_RAW),
        ambiguous="'",
        endings=(".rs",),
        names=("rs",),
    ),
    "c": replace(_C, endings=(".c", ".h")),
    "cpp": replace(
        _C,
        strings=(('R"', '"'), *_C_STRINGS),
        multiline=frozenset(('R"',)),
        raw=frozenset(('R"',)),
        endings=(".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx"),
        names=("c++", "cc"),
    ),
    "go": Language(
        _lines(r"^(?:import\b|package[ \t])"),
        _lines(r"^(?:func[ \t]+(?:\([^)\n]{0,120}\)[ \t]*)?(\w+)|(?:type|var|const)[ \t]+(\w+))"),
        strings=(*_C_STRINGS, ("`", "`")),  # no containers: Go's methods stand on their own
        multiline=frozenset("`"),
        function="func",
        raw=frozenset("`"),
        line_ends=True,
        endings=(".go",),
        names=("golang",),
    ),
}
# Languages parsed like C: comments, braces, definitions that one regex finds.
_TOKENS = r"(?:[\w.@<>\[\],?&:]{1,80}[ \t]+){1,8}"  # modifiers and a type
_NO_STATEMENT = (
    r"(?!(?:await|case|catch|delete|do|else|for|foreach|goto|if|import|in|lock|new|package|return|switch|throw|try"
    r"|using|while|yield)\b)"
)
_METHOD = (
    rf"[ \t]{{0,200}}{_NO_STATEMENT}{_TOKENS}(\w{{1,80}})(?:<[^<>\n]{{0,80}}>)?[ \t]*\([^;\n]{{0,300}}(?:\{{|=>|\r?$)"
)
_CONSTANT = rf"[ \t]{{0,200}}{_NO_STATEMENT}{_TOKENS}([A-Z][A-Z0-9_]{{1,80}})[ \t]*="


def _types(keywords: str) -> re.Pattern[str]:
    """A pattern for a block's header that begins with modifiers and one of these keywords."""
    return _lines(rf"^[^\S\n]*(?:@?[\w.]+(?:\([^()\n]*\))?\s+){{0,12}}(?:{keywords})\b")


def _also(keywords: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{keywords})\b|\(")


_JAVA_TYPES = "class|interface|enum|record"
_CSHARP_TYPES = "class|interface|enum|record|struct|namespace"
_KOTLIN_TYPES = "class|interface|object"
_KOTLIN_MODIFIERS = (
    r"(?:(?:public|private|internal|protected|open|abstract|override|inline|suspend|data|sealed|enum|annotation|operator"
    r"|infix|tailrec|external|inner|companion|value|const|lateinit|actual|expect|final|@\w{1,40})[ \t]+){0,6}"
)
_SWIFT_TYPES = "class|struct|enum|extension|protocol|actor"
_SWIFT_MODIFIERS = (
    r"(?:(?:public|private|fileprivate|internal|open|package|static|final|override|mutating|nonmutating|lazy|weak|indirect"
    r"|required|convenience|nonisolated|isolated|@\w{1,40}(?:\([^()\n]{0,80}\))?)[ \t]+){0,6}"
)
_PHP_TYPES = "class|interface|trait|enum|namespace"
_PHP_MODIFIERS = r"(?:(?:abstract|final|readonly|public|protected|private|static)[ \t]+){0,5}"
_LUA_LEVELS = tuple((f"[{level}[", f"]{level}]") for level in ("", "=", "=="))
LANGUAGES |= {
    "java": Language(
        _lines(r"^(?:import|package)[ \t]"),
        _lines(
            rf"^(?:[ \t]{{0,200}}(?:[\w@]{{1,40}}(?:\([^()\n]{{0,80}}\))?[ \t]+){{0,6}}(?:{_JAVA_TYPES})[ \t]+(\w+)"
            rf"|{_METHOD}|{_CONSTANT})"
        ),
        _types(_JAVA_TYPES),
        _also(_JAVA_TYPES),
        strings=(('"""', '"""'), *_C_STRINGS),
        multiline=frozenset({'"""'}),
        endings=(".java",),
    ),
    "csharp": Language(
        _lines(r"^(?:global[ \t]+)?using[ \t]+[\w.=: \t]{1,200};|^namespace[ \t][\w. \t]{1,200};"),
        _lines(
            rf"^(?:[ \t]{{0,200}}(?:\w{{1,40}}[ \t]+){{0,6}}(?:{_CSHARP_TYPES}|delegate[ \t]+\w+)[ \t]+([\w.]+)"
            rf"|{_METHOD}|{_CONSTANT}|[ \t]{{1,200}}{_TOKENS}(\w{{1,80}})[ \t]*(?:\{{[ \t]*(?:get|set|init)\b|=>))"
        ),
        _types(_CSHARP_TYPES),
        _also(_CSHARP_TYPES),
        strings=(('""""', '""""'), ('"""', '"""'), ('$@"', '"'), ('@$"', '"'), ('@"', '"'), ('$"', '"'), *_C_STRINGS),
        multiline=frozenset({'""""', '"""', '$@"', '@$"', '@"'}),
        raw=frozenset({'""""', '"""', '$@"', '@$"', '@"'}),
        directives=True,
        endings=(".cs", ".csx"),
        names=("c#", "cs"),
    ),
    "kotlin": Language(
        _lines(r"^(?:import|package)[ \t]"),
        _lines(
            rf"^(?:[ \t]{{0,200}}{_KOTLIN_MODIFIERS}(?:(?:{_KOTLIN_TYPES}|typealias)[ \t]+(\w+)"
            r"|fun[ \t]+(?:<[^<>\n]{0,80}>[ \t]+)?(?:[\w<>?*]{1,60}\.){0,3}(\w+)[ \t]*\()"
            rf"|{_KOTLIN_MODIFIERS}va[lr][ \t]+(\w+))"
        ),
        _types(_KOTLIN_TYPES),
        _also(_KOTLIN_TYPES),
        strings=(('"""', '"""'), *_C_STRINGS),
        multiline=frozenset({'"""'}),
        function="fun",
        raw=frozenset({'"""'}),
        line_ends=True,
        endings=(".kt", ".kts"),
        names=("kt",),
    ),
    "swift": Language(
        _lines(r"^(?:@testable[ \t]+)?import[ \t]"),
        _lines(
            rf"^(?:[ \t]{{0,200}}{_SWIFT_MODIFIERS}(?:(?:{_SWIFT_TYPES}|typealias)[ \t]+(?!func\b|var\b|let\b)([\w.]+)"
            r"|(?:class[ \t]+)?func[ \t]+(\w+)|(init)[?!]?[ \t]*[(<])"
            rf"|{_SWIFT_MODIFIERS}(?:let|var)[ \t]+(\w+))"
        ),
        _types(_SWIFT_TYPES),
        _also(_SWIFT_TYPES),
        strings=(('##"""', '"""##'), ('#"""', '"""#'), ('"""', '"""'), ('##"', '"##'), ('#"', '"#'), ('"', '"')),
        multiline=frozenset({'##"""', '#"""', '"""'}),
        function="func",
        raw=frozenset({'##"""', '#"""', '##"', '#"'}),
        line_ends=True,
        endings=(".swift",),
    ),
    "php": Language(
        _lines(r"^(?:<\?php\b|(?:use|namespace)[ \t]+[\w\\]|(?:require|include)(?:_once)?\b)"),
        _lines(
            rf"^[ \t]{{0,200}}{_PHP_MODIFIERS}(?:(?:class|interface|trait|enum|function)[ \t]+&?(\w+)"
            r"|const[ \t]+(?:\w+[ \t]+)?(\w+)[ \t]*=)"
        ),
        _types(_PHP_TYPES),
        _also(_PHP_TYPES),
        strings=(*_C_STRINGS, ("`", "`")),
        multiline=frozenset("\"'`"),
        function="function",
        other_comments=(("# ", "\n"), ("?>", "<?")),  # #[ is no comment, text outside <?php and ?> is not code
        alternative=True,
        endings=(".php", ".phtml"),
    ),
    "css": Language(
        _lines(r"^@(?:import|charset|use|forward|namespace)\b"),
        _lines(
            r"^[ \t]{0,200}(?:[.#]([\w-]{1,80})[^\n{};]{0,200}\{|@mixin[ \t]+([\w-]+)"
            r"|(--[\w-]{1,80}|\$[\w-]{1,80})[ \t]*:)"
        ),
        re.compile(r"^\s*@(?:media|supports|layer|container|scope)\b"),
        ANYTHING,
        line_comment="",
        endings=(".css", ".scss", ".less"),
        names=("scss", "less"),
    ),
    "json": Language(
        blocks="brackets",
        endings=(".json", ".jsonc", ".json5", ".geojson", ".webmanifest"),
        names=("jsonc", "json5"),
    ),
    "ruby": Language(
        _lines(r"^(?:require|require_relative|load|include|using)\b"),
        _lines(
            r"^(?:[ \t]{0,200}(?:(?:private|public|protected|module_function)[ \t]+)?def[ \t]+(?:\w+\.)?(\w+[?!=]?)"
            r"|[ \t]{0,200}(?:class|module)[ \t]+(?:\w+::){0,4}(\w+)|[ \t]{0,200}([A-Z]\w*)[ \t]*=(?![=~]))"
        ),
        re.compile(r"(?:class|module)\b|(?:\w{1,80}\.)?(?:describe|context|feature|namespace)\b"),
        line_comment="#",
        block_comment=("=begin", "=end"),
        strings=(*_C_STRINGS, ("`", "`")),
        blocks="words",
        function="def",
        brackets="",
        here_document=r"[~-]?(['\"`]?)([A-Z_]\w{0,80})\1",
        inside=r"|(?:rescue|ensure|else|elsif|when|in)\b",
        closing=r"end\b",
        close="end",
        endings=(".rb", ".rake", ".gemspec", ".ru"),
        filenames=("rakefile", "gemfile"),
        names=("rb",),
    ),
    "lua": Language(
        _lines(r"^(?:local[ \t]+[\w, \t]{1,80}=[ \t]*)?require\b"),
        _lines(
            r"^(?:[ \t]{0,200}(?:local[ \t]+)?function[ \t]+(?:\w{1,80}[.:]){0,4}(\w+)"
            r"|(?:\w{1,80}\.){0,3}(\w{1,80})[ \t]*=[ \t]*function\b|local[ \t]+(\w+)[ \t]*=(?!=))"
        ),
        line_comment="--",
        block_comment=("--[[", "]]"),
        strings=(*_LUA_LEVELS, *_C_STRINGS),
        multiline=frozenset(opening for opening, _ in _LUA_LEVELS),
        blocks="words",
        function="function",
        brackets="",
        raw=frozenset(opening for opening, _ in _LUA_LEVELS),
        other_comments=tuple((f"--{opening}", closing) for opening, closing in _LUA_LEVELS[1:]),
        inside=r"|(?:else|elseif)\b",
        closing=r"(?:end|until)\b",
        close="end",
        endings=(".lua",),
    ),
    "shell": Language(
        _lines(r"^(?:source|\.|set)[ \t]+[^\s]"),
        _lines(
            r"^[ \t]{0,200}(?:function[ \t]+([\w:.-]{1,80})|([\w:.-]{1,80})[ \t]*\(\)"
            r"|(?:(?:export|readonly|declare(?:[ \t]+-\w+)?)[ \t]+)?([A-Z_][A-Z0-9_]*)=)"
        ),
        line_comment="#",
        block_comment=None,
        strings=(("$'", "'"), *_C_STRINGS),
        multiline=frozenset({"$'", '"', "'"}),
        blocks="words",
        brackets="",
        raw=frozenset("'"),
        expansion=re.compile(r"""(?<!\\)\$(?:\(|\{[\w@*!\[\]]+[#%/][^{}'"]*['"])\Z"""),
        here_document=r"-?[ \t]*\\?(['\"]?)([A-Za-z_]\w{0,80})\1",
        inside=r"|(?:else|elif|then|do)\b",
        closing=r"\}|(?:fi|done|esac)\b",
        commands=True,
        endings=(".sh", ".bash", ".zsh", ".ksh"),
        filenames=(".bashrc", ".bash_profile", ".profile", ".zshrc"),
        names=("bash", "sh", "zsh", "ksh", "dash"),
    ),
    "sql": Language(
        _lines(r"(?i)^(?:use|set|\\connect|\\i|attach)\b"),
        _lines(
            r"(?i)^[ \t]{0,200}create[ \t]+(?:or[ \t]+replace[ \t]+)?"
            r"(?:(?:temp|temporary|unique|materialized|unlogged)[ \t]+){0,2}"
            r"(?:table|view|function|procedure|trigger|index|type|schema|sequence|database)[ \t]+"
            r"(?:if[ \t]+not[ \t]+exists[ \t]+)?"
            r"(?:[\w\"`\[\]]{1,80}\.)?[\"`\[]?(\w+)"
        ),
        line_comment="--",
        strings=(*_C_STRINGS, ("`", "`")),
        multiline=frozenset("\"'`"),
        blocks="statements",
        raw=frozenset("\"'`"),
        brackets="(",
        inside=r"|(?i:begin|else|when|exception|from)\b",
        closing=r"(?i:end)\b|\)|\$",
        close="",
        commands=True,
        endings=(".sql",),
        names=("mysql", "postgresql", "postgres", "sqlite", "plpgsql", "tsql"),
    ),
    "html": replace(
        _PLAIN,
        line_comment="",
        block_comment=("<!--", "-->"),
        blocks="words",
        containers=ANYTHING,
        closing=r"</",
        endings=(".html", ".htm", ".xhtml"),
        names=("htm", "xhtml"),
    ),
    "yaml": replace(
        _PLAIN,
        blocks="indent",
        defines=_lines(r"^([\w.-]{1,80}):(?:[ \t]|\r?$)"),
        containers=ANYTHING,
        items=True,
        commands=True,
        endings=(".yaml", ".yml"),
        names=("yml",),
    ),
    "toml": replace(
        _PLAIN,
        strings=(('"""', '"""'), ("'''", "'''"), *_C_STRINGS),
        multiline=frozenset({'"""', "'''"}),
        defines=_lines(r"^\[{1,2}([^\]\n]{1,120})\]"),
        raw=frozenset({"'''", "'"}),
        brackets="[{",
        endings=(".toml",),
        filenames=("pipfile",),
    ),
    "markdown": replace(
        _PLAIN,
        line_comment="",
        block_comment=("<!--", "-->"),
        strings=(("```", "```"), ("~~~", "~~~")),
        multiline=frozenset(("```", "~~~")),
        defines=_lines(r"^#{1,6}[ \t]+([^\r\n]{1,200})\r?$"),
        raw=frozenset(("```", "~~~")),
        endings=(".md", ".markdown", ".mdx"),
        names=("md",),
    ),
    "dockerfile": replace(
        _PLAIN,
        imports=_lines(r"(?i)^(?:FROM|ARG)[ \t]"),
        defines=_lines(r"(?i)^(?:FROM[ \t]+\S{1,200}[ \t]+AS[ \t]+([\w.-]+)|(?:ARG|ENV)[ \t]+(\w+))"),
        commands=True,
        endings=(".dockerfile",),
        filenames=("dockerfile", "containerfile"),
        names=("docker",),
    ),
}
# Files in these languages may accompany code in any other, so they do not count when guessing the code's language.
BESIDE_CODE = frozenset({"dockerfile", "json", "markdown", "toml", "yaml"})
HEADER_CHARS = 400  # of a text, where a plugin writes its modeline
BY_FILENAME = {filename: name for name, language in LANGUAGES.items() for filename in language.filenames}
BY_ENDING = {ending: name for name, language in LANGUAGES.items() for ending in language.endings}
BY_NAME = {alias: name for name, language in LANGUAGES.items() for alias in (name, *language.names)}
# The interpreter's name without its version: /usr/bin/python3.11 -u, or the command that /usr/bin/env -S starts.
SHEBANG = re.compile(r"#![ \t]*(?:\S*/env[ \t]+(?:(?:-\S*|\w+=\S*)[ \t]+)*)?(?:\S*/)?([A-Za-z+]+)[0-9.]*(?:\s|$)")
# Lines that editor plugins write above the text: `# language: python`, `// Path: src/main.rs`, `# sum.py`.
MODELINE = re.compile(
    r"^(?:#|//|--|/\*|<!--)[ \t]*(?:(?:language|filetype)[:=][ \t]*([\w+#]+)"
    r"|(?:path|file|filename):[ \t]*(\S+)|([\w./\\-]{1,200}\.\w{1,4})[ \t]*\r?$)",
    re.I | re.M,
)
OPENED = re.compile(r"^[ \t]*(?:`{3,}+|~{3,}+)[ \t]*+([\w+#-]*+)[^\n`]*+$", re.M)


def guess_language(filename: str, text: str, others: Sequence[str] = ()) -> str:
    """Guess the language of a text from its file name, its shebang or modeline, the fence open at its end, or the names
    of the other files sent with it; "" if none of them shows a language.

    >>> guess_language("", "#!/usr/bin/env python3\\nimport os\\n"), guess_language("", "x = 1", ["a.rs", "b.rs"])
    ('python', 'rust')
    """
    if name := language_of_file(filename):
        return name
    if (match := SHEBANG.match(text)) and (name := BY_NAME.get(match[1].lower(), "")):
        return name
    for match in MODELINE.finditer(text, 0, text.rfind("\n", 0, HEADER_CHARS) + 1):
        if name := BY_NAME.get((match[1] or "").lower(), "") or language_of_file(match[2] or match[3] or ""):
            return name
    fences = OPENED.findall(text)
    if len(fences) % 2 and (name := BY_NAME.get(fences[-1].lower(), "")):
        return name
    counts = Counter(name for other in others if (name := language_of_file(other)) and name not in BESIDE_CODE)
    return counts.most_common(1)[0][0] if counts else ""


def language_of_file(filename: str) -> str:
    """The language of a file by its name, in any folder; "" if the name shows none.

    >>> language_of_file("/home/me/a.PY"), language_of_file("Dockerfile.dev"), language_of_file("notes")
    ('python', 'dockerfile', '')
    """
    name = re.split(r"[/\\]", filename)[-1].lower()
    first, dot, _ = name.partition(".")
    ending = name[name.rfind(".") :] if dot else ""
    if found := BY_FILENAME.get(name) or BY_ENDING.get(ending):
        return found
    return "dockerfile" if dot and BY_FILENAME.get(first) == "dockerfile" else ""
