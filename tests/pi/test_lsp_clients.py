"""The language server in real editors, against both daemons with real weights: Neovim, Emacs with
lsp-mode, and Helix, from Debian's unstable, in a terminal.

The editors run in a Debian of their own, since no stable one has versions that know ghost text.
Only making it needs a network, and it is made once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import pytest
from harness import PATIENCE, ROOT, rows, wait_until
from scripted import in_a_thread
from test_clients import weights  # noqa: F401 (a fixture)
from test_lsp import Pi as Scripted
from test_peers import needs
from test_plugins import PREFIX, SUFFIX, Pi

pytestmark = pytest.mark.clients

DEBIAN = Path("~/.cache/cerebrum/editors").expanduser()
PACKAGES = "neovim,emacs-nox,elpa-lsp-mode,hx,python3"
TEXT = PREFIX + "    return \n" + SUFFIX[1:]
HOME = "/home/me"  # in that Debian
MORE_LUA = "cursor rests\n"
SERVER = """
import os, runpy, subprocess
copying = subprocess.Popen(["tee", "/home/me/sent"], stdout=subprocess.PIPE)
os.dup2(copying.stdout.fileno(), 0)
runpy.run_path("/cerebrum_lsp.py", run_name="__main__")
"""  # writes down what the editor sends
EMACS = """
(setq lsp-auto-guess-root t make-backup-files nil create-lockfiles nil)
(with-eval-after-load 'lsp-inline-completion ; a terminal cannot send C-return
  (define-key lsp-inline-completion-active-map (kbd "TAB") #'lsp-inline-completion-accept))
(require 'lsp-mode)
"""


def settings(begin: str, url: str) -> str:
    """A block of docs/editors.md that begins like this, with this address of the Pi."""
    _, found, text = (ROOT / "docs/editors.md").read_text().partition(begin)
    assert found
    return text.partition("```")[0].replace("http://pi.local:7000", url)


def installed() -> Path:
    """The Debian with the editors, made if it is not here."""
    for program in ("debootstrap", "systemd-nspawn", "tmux"):
        needs(program)
    if os.geteuid() != 0:
        pytest.skip("editors in a Debian of their own need root")
    complete = DEBIAN / "complete"
    if not complete.exists() or complete.read_text() != PACKAGES:
        shutil.rmtree(DEBIAN, ignore_errors=True)
        DEBIAN.mkdir(parents=True)
        run = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "sid", str(DEBIAN)]
        done = subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        complete.write_text(PACKAGES)
    return DEBIAN


@pytest.fixture(scope="module")
def debian() -> Path:
    return installed()


@pytest.fixture
def warm(weights: Pi) -> Pi:  # noqa: F811
    """Both daemons, with the model in memory: lsp-mode waits ten seconds for an answer."""
    weights.asked("/infill", {"input_prefix": PREFIX, "input_suffix": "", "n_predict": 1})
    return weights


class Terminal:
    """An editor in a terminal that a test types into."""

    def __init__(self, debian: Path, folder: Path, *command: str, text: str):
        self.file = folder / "home/project/sum.py"
        (self.file.parent / ".git").mkdir(parents=True)
        self.file.write_bytes(text.encode())
        (folder / "home/cerebrum_lsp.py").write_text(SERVER)
        self.sent = folder / "home/sent"
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        settings = f"--setenv=HOME={HOME} --setenv=TERM=xterm-256color --setenv=LANG=C.UTF-8"
        quiet = "--quiet --register=no --keep-unit --console=interactive"
        # of a name that no earlier run has left behind
        machine = f"--machine=editor-{os.getpid()}-{command[0]}"
        nspawn = f"systemd-nspawn {quiet} {settings} --chdir={HOME}/project".split()
        nspawn += [machine, f"--directory={debian}", f"--bind={folder}/home:{HOME}"]
        nspawn.append(f"--bind-ro={ROOT}/cerebrum_lsp.py:/cerebrum_lsp.py")
        self.run("new-session", "-d", "-x", "100", "-y", "30", *nspawn, *command, "sum.py")
        self.process = int(self.run("display-message", "-p", "#{pane_pid}"))

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.tmux, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return done.stdout

    def type(self, *keys: str):
        """Type keys of tmux's names, such as "a" or "C-e"."""
        self.run("send-keys", *keys)

    @property
    def screen(self) -> str:
        return self.run("capture-pane", "-p")

    def shows(self, text: str):
        try:
            wait_until(lambda: text in self.screen, f"the screen shows {text!r}")
        except TimeoutError as error:
            raise AssertionError(f"{error}, but\n{self.screen}") from None

    def close(self):
        subprocess.run(["kill", str(self.process)], check=False, stderr=subprocess.DEVNULL)
        wait_until(lambda: not Path(f"/proc/{self.process}").exists(), "the container has ended")
        subprocess.run([*self.tmux, "kill-server"], check=False, stderr=subprocess.DEVNULL)


@contextmanager
def editing(debian: Path, folder: Path, *command: str, text: str = TEXT) -> Iterator[Terminal]:
    terminal = Terminal(debian, folder, *command, text=text)
    try:
        wait_until(
            lambda: terminal.sent.exists() and "didOpen" in terminal.sent.read_text(),
            "the server has the file",
        )
        # Before it, Helix drops what is typed.
        terminal.shows("Loaded 1 file" if command[0] == "hx" else text.splitlines()[0])
        yield terminal
    finally:
        terminal.close()


def home(folder: Path, name: str, text: str):
    file = folder / "home" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)


def wait_for_file(terminal: Terminal, text: str):
    """Wait until this text is in the file."""
    wait_until(
        lambda: terminal.file.exists() and text in terminal.file.read_text(), "the file is saved"
    )


def accepted(pi: Pi) -> int:
    return int(pi.get("/v1/stats").json()["accepted"])


@pytest.mark.nightly
def test_neovim(debian, warm: Pi, tmp_path):
    lua = settings(LUA, warm.url) + settings(MORE_LUA, warm.url)
    home(tmp_path, ".config/init.lua", lua)
    before = accepted(warm)
    with editing(debian, tmp_path, "nvim", "-u", f"{HOME}/.config/init.lua") as editor:
        editor.type("j", "A", "a")
        editor.shows("return a + b")
        editor.type("C-Right")
        editor.shows("return a +\n")  # nothing is suggested for a moment
        editor.shows("return a + b")
        wait_until(lambda: accepted(warm) == before + 1, "the accepted word is reported")
        editor.type("Tab")
        wait_until(lambda: accepted(warm) == before + 2, "the accepted rest is reported")
        editor.type("Escape", ":w", "Enter")
        wait_for_file(editor, "return a + b")
        before_it = editor.file.read_text().split("\n")
        editor.type(":1,2Cerebrum rename a to total", "Enter")
        editor.shows("Workspace edit Cerebrum")
        editor.type(":w", "Enter")
        wait_for_file(editor, "total")
        assert editor.file.read_text().split("\n")[2:] == before_it[2:]


CRLF = TEXT.replace("\n", "\r\n")
LUA = "Tab accepts\n"
# An editor, what stands before its settings, their file, its options, the keys that ask, that
# accept, that leave, that save.
EDITING = r"""
nvim  | Tab accepts\n    | nvim/init.lua | | j A a | Tab | Escape | :w Enter
emacs | return accepts\n | emacs/init.el | -nw --no-splash | C-n C-e a | Tab | | C-x C-s
hx    | its menu.\n | helix/languages.toml | | j A a C-x | Tab Enter | Escape | :w Enter
"""


@pytest.mark.nightly
@pytest.mark.parametrize("row", rows(EDITING), ids=itemgetter(0))
def test_a_completion_of_several_lines_gets_the_line_ends_of_the_file(debian, tmp_path, row):
    """Typing what is shown asks nothing. Helix runs no command of a completion."""
    program, block, name, *typed = row
    options, ask, accept, leave, save = map(str.split, typed)
    with in_a_thread(Scripted()) as pi:
        pi.says(content=" + b\n    # two")
        home(tmp_path, f".config/{name}", EMACS * (program == "emacs") + settings(block, pi.url))
        with editing(debian, tmp_path, program, *options, text=CRLF) as editor:
            editor.type(*ask)
            editor.shows("a + b")
            if program != "hx":
                editor.type(" ")
                asked = '"textDocument/inlineCompletion"'
                wait_until(lambda: editor.sent.read_text().count(asked) > 1, "it asks again")
                editor.shows("a + b")
                assert [body["n_predict"] for body in pi.completions].count(128) == 1
            editor.type(*accept, " and three")
            editor.shows("# two and three")
            if program != "hx":
                wait_until(lambda: {"characters": 13} in pi.completions, "the text is reported")
            editor.type(*leave)
            wait_until(
                lambda: "INS" not in editor.screen, "Neovim and Helix are no longer inserting"
            )
            editor.type(*save)
            wait_for_file(editor, "two")
            completed = CRLF.replace("return ", "return a + b\r\n    # two and three", 1)
            assert editor.file.read_bytes() == completed.encode()


@pytest.mark.nightly
@pytest.mark.parametrize("right", ["l", "C-f"])
def test_the_pi_reads_a_file_that_is_opened_and_where_the_cursor_rests(debian, tmp_path, right):
    program, block, name, options, *_ = rows(EDITING)[right == "C-f"]
    with in_a_thread(Scripted()) as pi:
        text = EMACS * (program == "emacs") + settings(block, pi.url)
        text += settings(MORE_LUA, pi.url) * (program == "nvim")
        home(tmp_path, f".config/{name}", text)
        with editing(debian, tmp_path, program, *options.split()) as editor:
            wait_until(lambda: pi.completions, "the beginning is read")
            editor.type(right)
            wait_until(lambda: len(pi.completions) == 2, "the text at the cursor is read")
            editor.type(right)
            wait_until(lambda: len(pi.completions) == 3, "the text is read there, too")
        asked = [(body["n_predict"], body["input_prefix"]) for body in pi.completions]
        assert asked == [(0, TEXT[:count]) for count in range(3)]
