"""The language server in real editors, against both daemons with real weights: Neovim, Emacs with lsp-mode, and Helix,
from Debian's unstable, in a terminal; and the client of VS Code's extensions.

The editors run in a Debian of their own, since no stable one has versions that know ghost text. Only making it needs a
network, and it is made once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PATIENCE, ROOT, wait_until
from test_clients import completes_the_sum, weights  # noqa: F401 (a fixture)
from test_peers import needs
from test_plugins import PREFIX, SUFFIX, Pi

pytestmark = pytest.mark.clients

DEBIAN = Path("~/.cache/cerebrum/editors").expanduser()
PACKAGES = "neovim,emacs-nox,elpa-lsp-mode,hx,python3"
TEXT = PREFIX + "    return \n" + SUFFIX[1:]
HOME = "/home/me"  # in that Debian
SERVER = """#!/bin/sh
tee /home/me/sent | exec python3 /cerebrum_lsp.py
"""
NEOVIM = """
vim.lsp.config('cerebrum', { cmd = { '/home/me/server' }, filetypes = { 'python' } })
vim.lsp.enable('cerebrum')
vim.lsp.inline_completion.enable()
vim.keymap.set('i', '<Tab>', function()
    return vim.lsp.inline_completion.get() and '' or '<Tab>'
end, { expr = true })
vim.keymap.set('i', '<C-w>', function()  -- one word
    vim.lsp.inline_completion.get({ on_accept = function(item)
        item.insert_text = item.insert_text:match('^%s*%S+')
        return item
    end })
end)
"""
EMACS = """
(require 'lsp-mode)
(lsp-register-client
 (make-lsp-client :new-connection (lsp-stdio-connection '("/home/me/server"))
                  :activation-fn (lambda (&rest _) t) :add-on? t :server-id 'cerebrum))
(add-hook 'prog-mode-hook #'lsp)
(setq lsp-inline-completion-idle-delay 0.2)
(require 'lsp-inline-completion)
(define-key lsp-inline-completion-active-map (kbd "TAB") #'lsp-inline-completion-accept)
(setq lsp-auto-guess-root t make-backup-files nil create-lockfiles nil)
"""
HELIX = """
[language-server.cerebrum]
command = "/home/me/server"
config = { completion = true }

[[language]]
name = "python"
language-servers = ["cerebrum"]
"""


@pytest.fixture(scope="module")
def debian() -> Path:
    """The Debian with the editors."""
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


@pytest.fixture
def warm(weights: Pi) -> Pi:  # noqa: F811
    """Both daemons, with the model in memory: lsp-mode waits ten seconds for an answer."""
    weights.asked("/infill", {"input_prefix": PREFIX, "input_suffix": "", "n_predict": 1})
    return weights


class Terminal:
    """An editor in a terminal that a test types into."""

    def __init__(self, debian: Path, folder: Path, url: str, *command: str) -> None:
        self.file = folder / "home/project/sum.py"
        (self.file.parent / ".git").mkdir(parents=True)
        self.file.write_text(TEXT)
        server, self.sent = folder / "home/server", folder / "home/sent"
        server.write_text(SERVER)
        server.chmod(0o755)
        self.tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        settings = {"CEREBRUM_URL": url, "HOME": HOME, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        machine = f"--machine=editor-{os.getpid()}-{command[0]}"  # of a name that no earlier run has left behind
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=interactive", machine]
        nspawn += [f"--directory={debian}", f"--bind={folder}/home:{HOME}", f"--chdir={HOME}/project"]
        nspawn += [
            f"--bind-ro={ROOT}/cerebrum_lsp.py:/cerebrum_lsp.py",
            *(f"--setenv={k}={v}" for k, v in settings.items()),
        ]
        self.run("new-session", "-d", "-x", "100", "-y", "30", *nspawn, *command, "sum.py")
        self.process = int(self.run("display-message", "-p", "#{pane_pid}"))
        try:
            wait_until(lambda: self.sent.exists() and "didOpen" in self.sent.read_text(), "the server has the file")
            self.shows("Loaded 1 file" if command[0] == "hx" else "def add")  # before it, Helix drops what is typed
        except BaseException:
            self.close()
            raise

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self.tmux, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout

    def type(self, *keys: str) -> None:
        """Type keys of tmux's names, such as "a" or "C-e"."""
        self.run("send-keys", *keys)

    @property
    def screen(self) -> str:
        return self.run("capture-pane", "-p")

    def shows(self, text: str) -> None:
        try:
            wait_until(lambda: text in self.screen, f"the screen shows {text!r}")
        except TimeoutError as error:
            raise AssertionError(f"{error}, but\n{self.screen}") from None

    def close(self) -> None:
        subprocess.run(["kill", str(self.process)], check=False, stderr=subprocess.DEVNULL)
        wait_until(lambda: not Path(f"/proc/{self.process}").exists(), "the container has ended")
        subprocess.run([*self.tmux, "kill-server"], check=False, stderr=subprocess.DEVNULL)


@contextmanager
def editing(debian: Path, folder: Path, url: str, *command: str) -> Iterator[Terminal]:
    terminal = Terminal(debian, folder, url, *command)
    try:
        yield terminal
    finally:
        terminal.close()


def home(folder: Path, name: str, text: str) -> None:
    file = folder / "home" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)


def assert_completed(terminal: Terminal, more: str) -> None:
    """The file has the completion, and what was typed after it."""
    wait_until(lambda: terminal.file.exists() and more in terminal.file.read_text(), "the file is saved")
    line = terminal.file.read_text().removeprefix(PREFIX).partition("\n")[0]
    assert completes_the_sum(line.removeprefix("    return ").partition(more)[0])
    assert terminal.file.read_text() == TEXT.replace("    return ", line, 1)


def accepted(pi: Pi) -> int:
    return int(pi.get("/v1/stats").json()["accepted"])


def test_neovim(debian: Path, warm: Pi, tmp_path: Path) -> None:
    home(tmp_path, ".config/init.lua", NEOVIM)
    before = accepted(warm)
    with editing(debian, tmp_path, warm.url, "nvim", "-u", f"{HOME}/.config/init.lua") as editor:
        editor.type("j", "A", "a")
        editor.shows("return a + b")
        editor.type("C-w")
        editor.shows("return a +\n")  # nothing is suggested for a moment
        editor.shows("return a + b")
        wait_until(lambda: accepted(warm) == before + 1, "the accepted word is reported")
        editor.type("Tab")
        wait_until(lambda: accepted(warm) == before + 2, "the accepted rest is reported")
        editor.type("  # sum", "Escape")
        editor.type(":w", "Enter")
        assert_completed(editor, "  # sum")


def test_emacs(debian: Path, warm: Pi, tmp_path: Path) -> None:
    home(tmp_path, ".config/init.el", EMACS)
    before = accepted(warm)
    with editing(debian, tmp_path, warm.url, "emacs", "-nw", "--no-splash", "-l", f"{HOME}/.config/init.el") as editor:
        editor.type("C-n", "C-e", "a")
        editor.shows("return a + b")
        editor.type(" ")  # of what is shown
        editor.shows("return a + b")
        editor.type("Tab")
        wait_until(lambda: accepted(warm) == before + 1, "the accepted text is reported")
        editor.type("  # sum", "C-x", "C-s")
        assert_completed(editor, "  # sum")


def test_helix(debian: Path, warm: Pi, tmp_path: Path) -> None:
    home(tmp_path, ".config/helix/languages.toml", HELIX)
    with editing(debian, tmp_path, warm.url, "hx") as editor:
        editor.type("j", "A", "a", "C-x")
        editor.shows("a + b")
        editor.type("Tab", "Enter")
        editor.shows("return a + b")  # in the text; Helix runs no command of a completion
        editor.type("  # sum", "Escape")
        editor.shows("NOR")
        editor.type(":w", "Enter")
        assert_completed(editor, "  # sum")
