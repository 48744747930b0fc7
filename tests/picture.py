"""Draw docs/editor.svg: Neovim in a terminal, and in it a hint of the real model.

    python tests/picture.py [FILE.svg]

As root, since the editor runs in the Debian of tests/pi/test_lsp_clients.py. The model is the first
of models.toml whose weights are here. What is drawn is the terminal's screen: its characters, their
colours, and the cursor.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness import ROOT, wait_until

sys.path += [f"{ROOT}/tests/pi", f"{ROOT}/tests/bench"]
import servers
from test_lsp_clients import HOME, LUA, editing, home, installed, settings

LOOK = """
vim.o.termguicolors, vim.o.laststatus, vim.o.number = true, 0, true
vim.api.nvim_set_hl(0, 'ComplHint', { fg = '#8b949e', italic = true })
"""
TEXT = '''"""A shopping cart."""

from dataclasses import dataclass, field


@dataclass
class Item:
    name: str
    price: float
    quantity: int = 1


@dataclass
class Cart:
    items: list[Item] = field(default_factory=list)

    def total(self) -> float:
'''
TYPED = "return "
CELL_WIDTH, LINE_HEIGHT = 8.4, 19  # pixels
FONT_SIZE, MARGIN = 14, 14
BACKGROUND, FOREGROUND = "#14161b", "#e0e2ea"  # Neovim's own
NO_BREAK = "\u00a0"  # browsers join other spaces
SGR = re.compile(r"\x1b\[([0-9;]*)m")


def styled(style: dict[str, str], codes: list[int]) -> dict[str, str]:
    """SVG's attributes after these codes of ECMA-48's "select graphic rendition"."""
    match codes:
        case [38, 2, red, green, blue, *rest]:
            style = style | {"fill": f"#{red:02x}{green:02x}{blue:02x}"}
        case [48, 2, _, _, _, *rest]:
            pass  # a background
        case [1, *rest]:
            style = style | {"font-weight": "bold"}
        case [3, *rest]:
            style = style | {"font-style": "italic"}
        case [0 | 39, *rest]:
            style = {}
        case [_, *rest]:
            pass
        case _:
            return style
    return styled(style, rest)


def text_lines(screen: str) -> list[str]:
    """The lines of a screen above Neovim's first "~"."""
    return re.split(r"\n(?:\x1b\[[0-9;]*m)*~", screen)[0].split("\n")


def drawn(screen: str, column: int, row: int) -> str:
    """The SVG of a screen, with the cursor at this cell."""
    lines = text_lines(screen)
    style: dict[str, str] = {}
    texts = []
    for number, line in enumerate(lines):
        spans = []
        for index, part in enumerate(SGR.split(line)):
            if index % 2:
                style = styled(style, [int(code or 0) for code in part.split(";")])
            elif part:
                attributes = "".join(f' {name}="{value}"' for name, value in style.items())
                text = html.escape(part, quote=False).replace(" ", NO_BREAK)
                spans.append(f"<tspan{attributes}>{text}</tspan>")
        y = MARGIN + LINE_HEIGHT * number + FONT_SIZE
        length = CELL_WIDTH * len(SGR.sub("", line))  # in whatever font there is
        place = f'x="{MARGIN}" y="{y}" textLength="{length:.1f}"'
        texts.append(f"<text {place}>{''.join(spans)}</text>")
    longest = max(len(SGR.sub("", line)) for line in lines)
    width = round(2 * MARGIN + CELL_WIDTH * (longest + 4))
    height = 2 * MARGIN + LINE_HEIGHT * len(lines)
    x, y = MARGIN + CELL_WIDTH * column, MARGIN + LINE_HEIGHT * row
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" \
height="{height}">
<title>Ghost text in Neovim</title>
<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>
<rect x="{x:.1f}" y="{y}" width="2" height="{LINE_HEIGHT - 2}" fill="{FOREGROUND}"/>
<g font-family="ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace" \
font-size="{FONT_SIZE}" fill="{FOREGROUND}">
{chr(10).join(texts)}
</g>
</svg>
"""


def taken(folder: Path) -> str:
    """The SVG of what Neovim shows where TYPED ends."""
    with ExitStack() as stack:
        _, pi = servers.both(stack, folder)
        pi.wait_for_line("VPS backend is available")
        url = f"http://127.0.0.1:{pi.port}"
        servers.ask(f"{url}/infill", input_prefix=TEXT, input_suffix="", n_predict=1)  # loads it
        home(folder, ".config/init.lua", LOOK + settings(LUA, url))
        options = ["-u", f"{HOME}/.config/init.lua"]
        terminal = stack.enter_context(editing(installed(), folder, "nvim", *options, text=TEXT))
        terminal.type("G", "o", *TYPED)
        hint = re.compile(rf"{TYPED}\S")
        wait_until(lambda: hint.search(terminal.screen), "a hint is shown")
        cursor = terminal.run("display-message", "-p", "#{cursor_x} #{cursor_y}")
        column, row = map(int, cursor.split())
        return drawn(terminal.run("capture-pane", "-p", "-e"), column, row)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        picture = taken(Path(folder))
    Path(*sys.argv[1:] or [ROOT / "docs/editor.svg"]).write_text(picture)
