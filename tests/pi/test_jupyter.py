"""JupyterLab's own inline completer, with the extension notebook-intelligence, in Debian's
Chromium.

A script stands for the VPS, so the text is exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import free_port
from harness import PATIENCE, wait_until
from test_peers import needs
from test_plugins import SUFFIX, TEXT, WHOLE, Pi, start_pi
from test_vscode import is_listening

pytestmark = [pytest.mark.clients, pytest.mark.nightly]

PACKAGES = ("jupyterlab==4.6.6", "notebook-intelligence==6.2.0")
PLACE = Path("~/.cache/cerebrum/clients").expanduser() / "-".join(PACKAGES)
SLOWLY = 4 * PATIENCE
SETTINGS = """{
    "chat_model": {"provider": "none", "model": "none"},
    "inline_completion_model": {"provider": "ollama", "model": "qwen2.5-coder"}}"""
CELLS = ("def add(a, b):\n    return", SUFFIX.strip())
NOTEBOOK = r"""{
    "cells": [
        {"cell_type": "code", "id": "cell0", "metadata": {}, "outputs": [],
         "execution_count": null, "source": "def add(a, b):\n    return"},
        {"cell_type": "code", "id": "cell1", "metadata": {}, "outputs": [],
         "execution_count": null, "source": "print(add(1, 2))"}],
    "metadata": {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"}},
    "nbformat": 4, "nbformat_minor": 5}"""


@pytest.fixture(scope="module")
def jupyter() -> Path:
    """The program, installed once."""
    program = PLACE / "bin/jupyter"
    if not (PLACE / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PLACE)], check=True)
        pip = [str(PLACE / "bin/python"), "-m", "pip", "install", "-q", *PACKAGES]
        subprocess.run(pip, check=True)
        (PLACE / "done").touch()
    return program


@contextmanager
def jupyter_lab(program: Path, home: Path, pi: Pi) -> Iterator[str]:
    """JupyterLab with the notebook, as the URL of it."""
    settings = home / ".jupyter/nbi/config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(SETTINGS)
    (home / "work").mkdir()
    (home / "work/sum.ipynb").write_text(NOTEBOOK)
    port = free_port()
    options = f"lab --allow-root --no-browser --ip=127.0.0.1 --port={port}"
    command = [str(program), *options.split(), f"--ServerApp.root_dir={home / 'work'}"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "JUPYTER_TOKEN": "t"}
    environ |= {"OLLAMA_HOST": pi.url, "NO_PROXY": "*"}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            wait_until(lambda: is_listening(port), "JupyterLab listens", seconds=SLOWLY)
            yield f"http://127.0.0.1:{port}/lab/tree/sum.ipynb?token=t"
        finally:
            server.terminate()
            server.wait(PATIENCE)


def test_ghost_text_in_a_cell(jupyter, tmp_path):
    """It comes while one types, and Tab takes it."""
    playwright = pytest.importorskip("playwright.sync_api")
    with (
        start_pi(tmp_path / "pi", [WHOLE]) as pi,
        jupyter_lab(jupyter, tmp_path, pi) as url,
        playwright.sync_playwright() as browsers,
    ):
        options = {"executable_path": needs("chromium"), "args": ["--no-sandbox"]}
        page = browsers.chromium.launch(**options).new_page()
        page.set_default_timeout(1000 * SLOWLY)
        page.goto(url)
        cell = page.locator(".jp-CodeCell .cm-content").first
        cell.click()
        # The completer is there once the kernel is.
        page.locator("[data-status=idle]").first.wait_for()
        page.keyboard.press("Control+End")
        page.keyboard.type(" ")
        ghost = page.locator(".jp-GhostText")
        ghost.first.wait_for()
        assert "".join(ghost.all_inner_texts()) == TEXT
        page.keyboard.press("Tab")
        ghost.first.wait_for(state="detached")
        assert cell.inner_text() == CELLS[0] + " " + TEXT
    pi.passed_on(mode="infill", prompt=CELLS[0] + " ", suffix=CELLS[1])
