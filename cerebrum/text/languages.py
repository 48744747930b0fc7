"""The syntax of each language, for preparing prompts and ending completions, and a guess of a
text's language.

    >>> from cerebrum.text.languages import LANGUAGES, guess_language
    >>> LANGUAGES["python"].line_comment, LANGUAGES["go"].endings
    ('#', '.go')
    >>> guess_language("", "#!/usr/bin/env python3\\nimport os\\n", [])
    'python'

A language is a row of `LANGUAGES`. Its patterns are compiled at their first use, and search whole
files from strangers. Each repetition is bounded, or cannot match the same characters as its
neighbours, so any line costs a few hundred steps plus its length. Pure; standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

# ---------------------------------------------------------------------------------------- languages

NOTHING = re.compile(r"(?!)")
ANYTHING = re.compile(r"")
# Words before the keyword of a definition.
_MODIFIERS = (
    r"(?:template[ \t]*<[^\n;]{0,200}>[ \t]+)?(?:(?:@[\w.]{1,40}(?:\([^()\n]{0,80}\))?"
    r"|pub(?:\([^()\n]{0,40}\))?|extern(?:[ \t]+\"\w+\")?|a(?:bstract|ctual|nnotation|sync)"
    r"|c(?:ase|lass|onst|onvenience)|d(?:ata|eclare|efault)|e(?:num|xport|xternal)"
    r"|f(?:inal|ileprivate)|in(?:fix|line|ner|ternal)|l(?:azy|ocal)|mut(?:able|ating)"
    r"|o(?:pen|verride)|p(?:artial|rivate|rotected|ublic)|re(?:adonly|cord|quired)"
    r"|s(?:ealed|tatic|uspend)|typedef|unsafe)"
    r"[ \t]+){0,6}"
)
# Behind the keyword: type parameters, Go's receiver or a generator's star, what the name belongs
# to, and the name.
_NAME = (
    r"(?:[ \t]*<[^<>\n]{0,80}>)?(?:[ \t]+|[ \t]*\*[ \t]*)(?:\([^()\n]{0,120}\)[ \t]*)?"
    r"[&*]?(?:[\w<>?]{1,60}(?:\.|::?)){0,4}([\w$]+)"
)
_NO_STATEMENT = (
    r"(?!(?:await|case|catch|co_\w+|delete|do|else|for|foreach|goto|if|import|in|lock|new|package"
    r"|return|switch|throw|try|typedef|using|while|yield)\b)"
)
_ARGUMENTS = (
    r"[ \t]*\([^;\n]{0,300}(?:\{|=>|\r?$)"  # of a definition: no semicolon follows on the line
)
_METHOD = (  # its type, what it belongs to and its name
    rf"[ \t]{{0,200}}{_NO_STATEMENT}"
    r"[A-Za-z_@][\w.:<>,*&?@ \t\[\]]{0,160}[ \t*&](?:[\w<>]{1,60}::){0,3}"
    r"(?!(?:if|for|while|switch|return|sizeof|catch|defined)\b)"
    r"(~?[A-Za-z_]\w{0,80})(?:<[^<>\n]{0,80}>)?"
    rf"(?:{_ARGUMENTS}|[ \t]*(?:=>|\{{[ \t]*(?:get|set|init)\b))"
)
_CLOSINGS = str.maketrans("[({<", "])}>")


Delimiters = tuple[str, str]  # (opening, closing)
Words = tuple[str, ...]
Pattern = re.Pattern[str]


@dataclass(frozen=True)
class Language:
    """The parts of a language's syntax that preparing a prompt and ending a completion need.

    `blocks` names the limits of a block:

        braces      { and }
        brackets    these and square brackets; the innermost pair is completed
        statements  the semicolons of SQL
        indent      indentation below a colon
        lines       indentation, a closing line and blank lines
        offside     the same, with parentheses that span lines
        tree        as "lines"; the innermost block is completed

    Keywords are alternatives of a pattern.
    """

    uses: str = "(?!)"  # the start of a line that imports; only blocks in braces ask
    types: str = ""  # keywords of definitions whose members are completed one at a time
    # The keyword that defines functions, if one may be defined below its call: for `Helpers`.
    function: str = ""
    names: str = ""  # keywords that define other names, not indented
    also: str = ""  # other starts of lines that define a name, which is their last group
    # Words at the start of a line that goes on with a block, and of one that closes it, with |
    # between them.
    clauses: str = "else|elif|elseif|elsif|except|finally|catch"
    closers: str = ""
    openers: str = "(?!)"  # ends of lines that open a block by indentation
    line_comment: str = "//"  # "" if there is none
    block_comment: str = "/* */"  # its two ends; "" if there is none
    other_comments: tuple[Delimiters, ...] = ()
    strings: Words = ('"', "'")  # openings of strings that end with their line
    texts: Words = ()  # openings of strings that may contain a line end
    escape: str = "\\"  # the character before an escaped one
    raw: Words = ()  # openings of strings without escapes
    closings: tuple[Delimiters, ...] = ()  # of strings that do not close as they open
    lifetimes: bool = False  # ' may also begin the name of a lifetime or of a symbol
    blocks: str = "braces"
    line_ends: bool = False  # a statement ends with its line, without a semicolon
    directives: bool = False  # a line that starts with # belongs to the preprocessor
    here_document: str = ""  # a pattern for <<, up to the name of the line that ends the text
    # As in a shell: a line may begin with a verb, as instructions do, and a quote within a word
    # opens a string.
    commands: bool = False
    fences: bool = False  # a text may have ``` that ends no answer
    # Words, with blanks between them.
    endings: str = ""  # of file names, in lower case
    filenames: str = ""  # whole file names, in lower case
    aliases: str = ""  # in requests, by editors, in fences, modelines and shebang lines

    @property
    def indented(self) -> bool:
        return self.blocks == "indent"

    @property
    def literals(self) -> list[Delimiters]:
        """(opening, closing) of each string. `[=[`, `#"` and `r#"` end with `]=]`, `"#` and
        `"#`.
        """
        mirrored = {
            opening: opening.lstrip("$@Rr")[::-1].translate(_CLOSINGS)
            for opening in self.strings + self.texts
        }
        return list((mirrored | dict(self.closings)).items())

    @cached_property
    def comments(self) -> list[Delimiters]:
        """(opening, closing) of each comment, and of a preprocessor's line."""
        start, _, end = self.block_comment.partition(" ")
        directive = "#" * self.directives
        line = self.line_comment
        pairs = [(line, "\n"), (start, end), *self.other_comments, (directive, "\n")]
        return [pair for pair in pairs if pair[0]]

    @cached_property
    def delimiters(self) -> list[Delimiters]:
        """(opening, closing) of each comment and literal, the longest openings first."""
        pairs = [*self.comments, *self.literals]
        return sorted(pairs, key=lambda pair: -len(pair[0]))

    @cached_property
    def opening_ends(self) -> set[str]:
        """The last characters of openings."""
        return {opening[-1] for opening, _ in self.delimiters}

    @cached_property
    def brackets(self) -> str:
        """The brackets that span lines."""
        if self.blocks in ("lines", "tree"):
            return ""
        return "()[]" if self.blocks in ("offside", "statements") else "()[]{}"

    @property
    def comment_starts(self) -> Words:
        """The possible starts of a comment line, for `str.startswith`."""
        others = tuple(opening for opening, _ in self.other_comments)
        return (self.line_comment, *others) if self.line_comment else others

    @cached_property
    def imports(self) -> Pattern:
        """Matches at a line that imports."""
        return re.compile(rf"^\ufeff?(?:{self.uses})", re.M)

    @cached_property
    def defines(self) -> Pattern:
        """Matches at a line that defines a name, which is the last group that took part."""
        inside = _any(self.types, self.function)
        outside = _any(inside, self.names)
        starts = [rf"[ \t]{{1,200}}+{_MODIFIERS}(?:{inside})"] if inside else []
        starts += [rf"{_MODIFIERS}(?:{outside})"] if outside else []
        patterns = _any(rf"(?:{_any(*starts)}){_NAME}" if starts else "", self.also)
        return re.compile(rf"^(?:{patterns})", re.M) if patterns else NOTHING

    @cached_property
    def containers(self) -> Pattern:
        """Matches the header of a block whose members are completed one at a time."""
        if not self.types:
            return ANYTHING if self.blocks == "tree" else NOTHING
        words = r"(?:template\s*<[^{}()]*>\s*)?(?:@?[\w.]+(?:\([^()\n]*\))?\s+){0,12}"
        return re.compile(rf"^[^\S\n]*{words}(?:{self.types})\b", re.M)

    def remark(self, text: str) -> str:
        """The text as a one-line comment.

        >>> [LANGUAGES[id].remark("why") for id in ("c", "css")]
        ['// why', '/* why */']
        """
        if self.line_comment or not self.block_comment:
            return f"{self.line_comment} {text}"
        return self.block_comment.replace(" ", f" {text} ")


def _any(*patterns: str) -> str:
    """A pattern for any of these that are not empty."""
    return "|".join(filter(None, patterns))


_JS = Language(
    uses=r"import\b(?![ \t]*[(.])|export\b[^\n]{0,300}\bfrom\b"
         r"|(?:const|let|var)\b[^\n]{0,300}\brequire[ \t]*\(",
    types=r"class|interface|namespace|module|(?:describe|context|suite)(?=\()", function="function",
    names="const|let|var|type|enum",
    also=r"[ \t]+(?:\w{1,20}[ \t]+){0,4}[*#]?"
         r"(?!(?:if|for|while|switch|catch|function|return|await|with)\b)([\w$]+)"
         r"[ \t]*(?:<[^\n()]{0,80}>)?\((?:[^()\n]|\([^()\n]{0,80}\)){0,160}\)"
         r"[^()\n;=]{0,100}\{[ \t]*\r?$",
    strings=('"', "'", "/"), texts=("`",), line_ends=True,
)  # fmt: skip
_CPP = Language(
    uses=r"[ \t]*#[ \t]*(?:include|import)\b|using[ \t]+namespace\b|using[ \t]+[\w:]+[ \t]*;"
         r"|import[ \t]",
    types=r"(?:class|namespace|extern|struct|union)\b(?=[^()=;{]{0,200}(?:\{|$))",
    names=r"enum|concept|using",
    also=rf"[ \t]*#[ \t]*define[ \t]+(\w+)"
         rf"|typedef\b[^\n;{{]{{0,80}}\{{[^{{}}]{{0,1500}}\}}[ \t]*(\w+)[ \t]*;"
         rf"|typedef[ \t][^\n;({{]{{0,160}}\b(\w+)[ \t]*;|{_METHOD}"
         rf"|[A-Za-z_][\w<>]{{0,80}}::(~?[A-Za-z_]\w{{0,80}}){_ARGUMENTS}"
         r"|([A-Za-z_]\w{0,80})[ \t]?\([^;\n{}]{0,200}\)[ \t]*\r?\n\{",
    directives=True,
)  # fmt: skip
_RUST_RAW = ('r"', 'r#"', 'r##"', 'r###"')
_LUA_RAW = ("[[", "[=[", "[==[")
_CSHARP_TEXTS = ('""""', '"""', '$@"', '@$"', '@"')
_THREE_QUOTES = ('"', "'", "`")
QUOTING = "m qr s tr y q qq"  # Perl's operators
# With the delimiters that close with the same character: q/a/, but not q(a).
QUOTES = {operator + mark: mark for operator, mark in product(QUOTING.split(), "/!|#")}
# The base of files that are no code, and of scripts: only # comments.
_PLAIN = Language(line_comment="#", block_comment="", strings=(), blocks="lines")
LANGUAGES: dict[str, Language] = {
    "python": Language(
        types="class", function="def", names="type",
        also=r"(\w+)[ \t]*(?::[^=\n]{1,200})?=(?!=)", blocks="indent", openers=":$",
        line_comment="#", block_comment="", texts=('"""', "'''"),
        endings=".py .pyi .pyw .ipynb", aliases="py python3 uv",
    ),
    "javascript": replace(_JS, endings=".js .jsx .mjs .cjs",
                          aliases="js jsx javascriptreact node nodejs"),
    "typescript": replace(_JS, endings=".ts .tsx .mts .cts",
                          aliases="ts tsx typescriptreact ts-node deno bun"),
    "rust": Language(
        uses=r"(?:pub(?:\([^)\n]{0,40}\))?[ \t]+)?"
             r"(?:use|extern[ \t]+crate|mod[ \t]+\w+[ \t]*;)(?:[ \t]|\r?$)",
        types=r"impl\b(?:<[^\n{]{0,160}>)?(?:[^\n{]{0,160}[ \t]for\b)?|trait|mod|extern",
        function="fn",
        names=r"struct|enum|union|type|static(?:[ \t]+mut)?|const|macro_rules!",
        strings=("'",), texts=(*_RUST_RAW, '"'), raw=_RUST_RAW, lifetimes=True, endings=".rs",
        aliases="rs",
    ),
    "c": replace(_CPP, endings=".c .h"),
    "cpp": replace(_CPP, texts=('R"',),
                   endings=".cpp .cc .cxx .hpp .hh .hxx .ipp .tpp .inl .cu .cuh",
                   aliases="c++ cc"),
    "go": Language(  # no types: Go's methods stand on their own
        uses=r"import\b|package[ \t]", function="func", names="type|var|const",
        texts=("`",), raw=("`",), line_ends=True, endings=".go", aliases="golang",
    ),
    "java": Language(
        uses=r"(?:import|package)[ \t]", types="class|interface|enum|record", also=_METHOD,
        texts=('"""',), endings=".java",
    ),
    "csharp": Language(
        uses=r"(?:global[ \t]+)?using[ \t]+[\w.=: \t]{1,200};|namespace[ \t][\w. \t]{1,200};",
        types="class|interface|enum|record|struct|namespace", also=_METHOD,
        strings=('$"', '"', "'"), texts=_CSHARP_TEXTS, raw=_CSHARP_TEXTS, directives=True,
        endings=".cs .csx", aliases="c# cs c-sharp",
    ),
    "shell": replace(
        _PLAIN,
        also=r"[ \t]{0,200}(?:function[ \t]+([\w:.-]{1,80})|([\w:.-]{1,80})[ \t]*\(\))"
             r"|(?:(?:export|readonly|declare(?:[ \t]+-\w+)?)[ \t]+)?([A-Z_][A-Z0-9_]*)=",
        clauses="else|elif|then|do", closers="fi|done|esac",
        here_document=r"(?<!<)<<-?[ \t]?",
        texts=("$'", '"', "'"), raw=("'",),
        commands=True, endings=".sh .bash .zsh .ksh",
        filenames=".bashrc .bash_profile .bash_aliases .profile .zshrc .zprofile .zshenv",
        aliases="bash sh shellscript zsh ksh dash ash",
    ),
    "kotlin": Language(
        uses=r"(?:import|package)[ \t]",
        types="class|interface|object", function="fun", names="val|var|typealias",
        texts=('"""',), raw=('"""',), line_ends=True, endings=".kt .kts", aliases="kt",
    ),
    "swift": Language(
        uses=r"(?:@testable[ \t]+)?import[ \t]",
        types="class|struct|enum|extension|protocol|actor", function="func",
        names="let|var|typealias", strings=('##"', '#"', '"'), texts=('##"""', '#"""', '"""'),
        line_ends=True, endings=".swift",
    ),
    "scala": Language(
        uses=r"(?:import|package)[ \t]",
        types="class|object|trait", function="def", names="val|var|type|enum|given",
        texts=('"""',), raw=('"""',), lifetimes=True, line_ends=True,
        endings=".scala .sc .sbt",
    ),
    "dart": Language(
        uses=r"(?:import|export|part|library)\b", types="class|mixin|extension|enum", also=_METHOD,
        texts=('"""', "'''"), endings=".dart",
    ),
    "php": Language(
        uses=r"<\?php\b|(?:use|namespace)[ \t]+[\w\\]|(?:require|include)(?:_once)?\b",
        types="class|interface|trait|enum|namespace", function="function", names="const",
        strings=(), texts=_THREE_QUOTES, other_comments=(("# ", "\n"),),
        endings=".php .phtml",
    ),
    "perl": replace(
        _PLAIN, uses=r"(?:use|require|package)[ \t]", function="sub",
        also=r"(?:my|our)[ \t]+[$@%](\w+)", blocks="braces",
        other_comments=(("=head", "=cut"), ("=pod", "=cut"), ("=encoding", "=cut")),
        texts=('"', "'", *QUOTES), closings=tuple(QUOTES.items()),
        here_document="<<[~-]?", endings=".pl .pm .t", aliases="pl",
    ),
    "r": replace(
        _PLAIN, uses=r"(?:library|require|source)\(",
        also=r"([\w.]{1,80})[ \t]*(?:<-|=(?!=))", blocks="braces",
        texts=_THREE_QUOTES, line_ends=True, endings=".r",
        aliases="rscript",
    ),
    # A line of a Zig string that has several is read as a comment: neither has code.
    "zig": Language(
        types=r"(?:const|var)[ \t]+\w+[ \t]*=[ \t]*(?:(?:extern|packed)[ \t]+)?"
              r"(?:struct|enum|union)", function="fn", names="const|var",
        block_comment="", other_comments=(("\\\\", "\n"),), endings=".zig .zon",
    ),
    "powershell": Language(
        uses=r"(?i:using|import-module|\.)[ \t]",
        types="class|enum|(?:Describe|Context|InModuleScope)(?=[ \t])",
        function="function", line_comment="#", block_comment="<# #>", line_ends=True,
        commands=True,
        strings=(), texts=("@'", '@"', '"', "'"), raw=("@'",), escape="`",
        closings=(("@'", "\n'@"), ('@"', '\n"@')), endings=".ps1 .psm1 .psd1",
        aliases="pwsh ps1",
    ),
    "css": Language(
        uses=r"@(?:import|charset|use|forward|namespace)\b", line_comment="",
        also=r"[ \t]{0,200}(?:(?:[.#]|@mixin[ \t]+)([\w-]{1,80})[^\n{};]{0,200}\{"
             r"|((?:--|\$)[\w-]{1,80})[ \t]*:)",
        endings=".css .scss .less", aliases="scss less",
    ),
    "json": Language(
        blocks="brackets", aliases="jsonc json5",
        endings=".json .jsonc .json5 .geojson .webmanifest",
    ),
    "ruby": replace(
        _PLAIN, function="def",
        types=r"class|module|(?:\w{1,80}\.)?(?:describe|context|feature|namespace)",
        also=r"([A-Z]\w*)[ \t]*=(?![=~])",
        clauses="rescue|ensure|else|elsif|when|in", closers="end",
        here_document="(?<!class )<<[~-]?",
        block_comment="=begin =end", strings=_THREE_QUOTES,
        endings=".rb .rake .gemspec .ru",
        filenames="rakefile gemfile vagrantfile podfile brewfile fastfile",
        aliases="rb",
    ),
    "lua": Language(
        function="function", names="local",
        also=r"(?:\w{1,80}\.){0,3}(\w{1,80})[ \t]*=[ \t]*function\b",
        closers="end|until",
        line_comment="--", block_comment="--[[ ]]", other_comments=(("--[==[", "]==]"),),
        texts=_LUA_RAW, raw=_LUA_RAW,
        blocks="lines", endings=".lua", aliases="luajit",
    ),
    "julia": Language(
        types="module|baremodule", function="function",
        names="struct|type|macro|const", closers="end",
        line_comment="#", block_comment="#= =#", texts=('"""',), blocks="lines",
        endings=".jl", aliases="jl",
    ),
    "elixir": Language(
        types="defmodule|defimpl|defprotocol|describe", function="def",
        also=r"[ \t]{0,200}(?:defp|defmacrop?|defguardp?)[ \t]+(\w+)",
        clauses="else|rescue|catch|after",
        closers="end", line_comment="#", block_comment="", texts=('"""',), blocks="lines",
        endings=".ex .exs", aliases="ex exs",
    ),
    "haskell": Language(
        names="data|newtype|type|class|instance", also=r"([a-z]\w{0,80}'?)[ \t]*::",
        line_comment="--", block_comment="{- -}", lifetimes=True,
        blocks="lines", endings=".hs", aliases="hs",
    ),
    "sql": Language(
        also=r"(?i:create[ \t]+(?:\w+[ \t]+){0,4}"
             r"(?:table|view|function|procedure|trigger|index|type|schema)[ \t]+"
             r"(?:if[ \t]+not[ \t]+exists[ \t]+)?(?:[\w\"`\[\]]{1,80}\.)?[\"`\[]?(\w+))",
        line_comment="--", other_comments=(("{#", "#}"),), blocks="statements",
        strings=(), texts=_THREE_QUOTES, raw=_THREE_QUOTES, commands=True,
        endings=".sql", aliases="mysql postgresql postgres sqlite plpgsql tsql",
    ),
    "html": replace(_PLAIN, line_comment="", block_comment="<!-- -->", blocks="tree",
                    fences=True, closers="</", endings=".html .htm .xhtml",
                    aliases="htm xhtml mhtml"),
    "yaml": replace(_PLAIN, also=r"([\w.-]{1,80}):(?:[ \t]|\r?$)", blocks="tree", commands=True,
                    fences=True, endings=".yaml .yml",
                    aliases="yml dockercompose yaml.docker-compose"),
    "toml": replace(_PLAIN, also=r"\[{1,2}([^\]\n]{1,120})\]", strings=('"', "'"),
                    texts=('"""', "'''"), endings=".toml",
                    filenames="pipfile"),
    "markdown": replace(_PLAIN, also=r"#{1,6}[ \t]+([^\r\n]{1,200})\r?$", line_comment="",
                        block_comment="<!-- -->", fences=True,
                        endings=".md .markdown .mdx", aliases="md mdx"),
    "dockerfile": replace(_PLAIN, also=r"(?i:FROM[ \t]+\S{1,200}[ \t]+AS|ARG|ENV)[ \t]+([\w.-]+)",
                          here_document="<<[~-]?", fences=True, commands=True,
                          endings=".dockerfile", filenames="dockerfile containerfile",
                          aliases="docker"),
    "makefile": replace(_PLAIN, also=r"([\w.%/-]{1,80})[ \t]*(?::|[?+]?=)",
                        closers="endif|endef", commands=True,
                        endings=".mk .mak", filenames="makefile gnumakefile",
                        aliases="make makefile-gmake"),
}  # fmt: skip
# Scala without braces, and its signs: headers, words, end markers, cases below match, two lines
# below "=".
SCALA_UNBRACED = replace(
    LANGUAGES["scala"], types="class|object|trait|enum|given|extension|package", names="",
    blocks="offside",
    openers=r"(?:[:={]|=>|<-"
            r"|\b(?:catch|do|else|finally|for|if|match|return|then|try|while|with|yield))$",
    clauses="catch|do|else|finally|then|yield", closers="end",
)  # fmt: skip
_UNBRACED = re.compile(
    rf"^[ \t]{{0,200}}(?:{_MODIFIERS}"
    # class A:
    r"(?:(?:class|object|trait|package)\b[^\n{}]{0,300}:[ \t]*\r?$|(?:enum|given)\b)"
    # if a then b; end A
    r"|(?:else[ \t]+)?if\b[^\n]{0,300}\bthen\b|(?:then|extension)\b|end[ \t]+\w+[ \t]*\r?$"
    # import a.*; cases without a brace; (using a: A)
    r"|import[ \t][\w.]{1,200}\.\*)|\b(?:match|catch)[ \t]*\r?\n\s{0,200}case\b|[(\[]using[ \t]"
    # two lines below "=", as deep as each other
    r"|=[ \t]*\r?\n([ \t]{1,200})\S[^\n]{0,300}[\w)\]\"]\r?\n\1(?!(?:else|match|yield)\b)\w",
    re.M,
)
_BRACE_LINE = re.compile(r"^[ \t]*\{[ \t]*\r?$", re.M)
# Files in these languages may accompany code in any other, so they do not count when guessing the
# code's language.
BESIDE_CODE = "dockerfile json makefile markdown toml yaml"
HEADER_CHARS = 400  # of a text, where a plugin writes its modeline
FENCED_CHARS = 200_000  # of a text's end: is a fence open there?
BY_FILENAME = dict[str, str]()
BY_ENDING = dict[str, str]()
BY_NAME = dict[str, str]()
for _name, _language in LANGUAGES.items():
    BY_FILENAME |= dict.fromkeys(_language.filenames.split(), _name)
    BY_ENDING |= dict.fromkeys(_language.endings.split(), _name)
    BY_NAME |= dict.fromkeys([_name, *_language.aliases.split()], _name)
# The interpreter's name without its version: /usr/bin/python3.11 -u, or the command that
# /usr/bin/env -S starts.
SHEBANG = re.compile(
    r"#![ \t]*(?:\S*/env[ \t]+(?:(?:-\S*|\w+=\S*)[ \t]+)*)?(?:\S*/)?([A-Za-z+-]+)[0-9.]*(?:\s|$)"
)
# Lines that editor plugins write above the text: `# language: python`, `// Path: src/main.rs`, `#
# sum.py`.
MODELINE = re.compile(
    r"^(?:#|//|--|/\*|<!--)[ \t]*(?:(?:language|filetype)[:=][ \t]*([\w+#]+)"
    r"|(?:path|file|filename):[ \t]*(\S+)|([\w./\\-]{1,200}\.\w{1,4})[ \t]*\r?$)",
    re.I | re.M,
)
OPENED = re.compile(r"^[ \t]*(?:`{3,}+|~{3,}+)[ \t]*+([\w+#-]*+)[^\n`]*+$", re.M)


def id_of(name: str) -> str:
    """The key in `LANGUAGES` of this name or alias; "" if it is unknown."""
    return BY_NAME.get(name.lower(), "")


def language_named(name: str) -> Language | None:
    """The language of this name or alias, if it is known."""
    return LANGUAGES.get(id_of(name))


def guess_language(filename: str, text: str, others: Sequence[str]) -> str:
    """Guess the language of a text from its file name, its shebang or modeline, the fence open at
    its end, or the names of the other files sent with it; "" if none of them shows a language.

    >>> guess_language("", "#!/usr/bin/env python3\\nimport os\\n", [])
    'python'
    >>> guess_language("", "x = 1", ["a.rs", "b.rs"])
    'rust'
    """
    if name := language_of_file(filename):
        return name
    if (match := SHEBANG.match(text)) and (name := id_of(match[1])):
        return name
    for match in MODELINE.finditer(text, 0, text.rfind("\n", 0, HEADER_CHARS) + 1):
        named = id_of(match[1] or "")
        if name := named or language_of_file(match[2] or match[3] or ""):
            return name
    fences = OPENED.findall(text[-FENCED_CHARS:])
    if len(fences) % 2 and (name := id_of(fences[-1])):
        return name
    known = [language_of_file(other) for other in others]
    counts = Counter(name for name in known if name and name not in BESIDE_CODE.split())
    return counts.most_common(1)[0][0] if counts else ""


def in_style(language: Language, prompt: str, suffix: str) -> Language:
    """The row for the style of the text around a cursor: Scala is written with braces or without.

    Without a suffix, the indentation shows the blocks in either style, unless an opening brace has
    a line of its own.
    """
    if language is not LANGUAGES["scala"]:
        return language
    braced = suffix.strip() or _BRACE_LINE.search(prompt)
    return language if braced and not _UNBRACED.search(prompt + suffix) else SCALA_UNBRACED


def language_of_file(filename: str) -> str:
    """The language of a file by its name, in any folder; "" if the name shows none.

    >>> language_of_file("/home/me/a.PY"), language_of_file("Dockerfile"), language_of_file("notes")
    ('python', 'dockerfile', '')
    """
    name = re.split(r"[/\\]", filename)[-1].lower()
    ending = name[name.rfind(".") :]
    known = BY_FILENAME.get(name) or BY_ENDING.get(ending)
    if not known and ending != ".lock":  # such as Dockerfile.dev
        known = BY_FILENAME.get(name.partition(".")[0])
    return known or ""
