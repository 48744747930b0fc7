"""systemd/install.sh with DESTDIR: what it puts where, what it keeps of a person's changes, and what an interruption
leaves. tests/test_systemd.py does the rest, on a machine that boots.

Each test installs from a copy of the clone, so that it can change what a new version brings.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE, ROOT

from cerebrum.settings import load_catalog, read_environment

CM4, VPS = "opt/cerebrum-pi", "opt/cerebrum-backend"
UNITS = "etc/systemd/system"

INTERRUPT = """#!/bin/bash
# Stands for mv. Kills its caller instead of the COUNT-th move; 0: before it, 1: after it.
echo >>"$MOVES"
if (($(wc -l <"$MOVES") == COUNT)); then
    ((AFTER == 0)) || /bin/mv "$@"
    kill -KILL $PPID
else
    exec /bin/mv "$@"
fi
"""


def run(command: Sequence[str | Path], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **more)


class Clone:
    """A copy of what a person carries to a machine, and the folder in which it is staged."""

    def __init__(self, folder: Path) -> None:
        self.source, self.root = folder / "clone", folder / "root"
        self.source.mkdir()
        for file in (*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "cerebrum"):
            (self.source / file.name).symlink_to(file)
        for name in ("models.toml", "pyproject.toml", "Makefile", ".env.example"):
            shutil.copy(ROOT / name, self.source)
        shutil.copytree(ROOT / "systemd", self.source / "systemd")

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "DESTDIR": str(self.root)} | environ
        return run(["systemd/install.sh", *arguments], cwd=self.source, env=environ)

    def install(self, what: str, **environ: str) -> str:
        """What it says. An error fails the test."""
        result = self.command(what, **environ)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    def tree(self) -> dict[str, tuple[str, str]]:
        """The mode and the sha256 of each file that was staged."""
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.root)): (
                f"{path.stat().st_mode & 0o7777:o}",
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in files
        }


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def modules(folder: str, rooms: str) -> dict[str, str]:
    files = [ROOT / "cerebrum_common.py"]
    files += [file for place in ("", "text", rooms) for file in (ROOT / "cerebrum" / place).glob("*.[ph]*")]
    return {f"{folder}/{file.relative_to(ROOT)}": "644" for file in files if file.is_file()}


EVERYWHERE = {
    ".env": "600",
    ".env.example": "644",
    ".installed": "644",
    "generate_api_key.sh": "755",
    "models.toml": "644",
}


@pytest.mark.parametrize(
    ("what", "folder", "own", "units"),
    [
        ("cm4", CM4, {"cm4d.py": "644", "cerebrum_repl.sh": "755"}, ("cerebrum-cm4.service",)),
        ("vps", VPS, {"vpsd.py": "644"}, ("cerebrum-backend.service", "cerebrum-backend.socket")),
    ],
)
def test_what_a_machine_gets(clone: Clone, what: str, folder: str, own: dict[str, str], units: tuple[str, ...]) -> None:
    """Modules of an older version, in the folder `cerebrum` or beside it, go."""
    for old in ("cerebrum/text/old.py", "cerebrum_old.py"):
        (clone.root / folder / old).parent.mkdir(parents=True, exist_ok=True)
        (clone.root / folder / old).touch()
    assert clone.install(what) == ""
    expected = {f"{folder}/{name}": mode for name, mode in (EVERYWHERE | own).items()}
    expected |= modules(folder, "pi" if what == "cm4" else "vps") | {f"{UNITS}/{unit}": "644" for unit in units}
    assert {name: mode for name, (mode, _) in clone.tree().items()} == expected
    assert (clone.root / folder / "models").is_dir() == (what == "vps")


@pytest.mark.slow
def test_make_passes_its_variables(clone: Clone) -> None:
    for target in ("install-cm4", "install-vps", "uninstall-vps"):
        run = ["make", "-s", target, f"DESTDIR={clone.root}", "PREFIX=/srv/cerebrum"]
        subprocess.run(run, cwd=clone.source, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    assert (clone.root / "srv/cerebrum/cm4d.py").exists()
    assert not (clone.root / "srv/cerebrum/vpsd.py").exists()


@pytest.mark.parametrize(
    ("what", "folder", "set_there", "other"),
    [
        ("cm4", CM4, {}, "CEREBRUM_VPS_PORT"),
        ("vps", VPS, {"CEREBRUM_STATE_DIR": "/var/lib/cerebrum"}, "CEREBRUM_CM4_PORT"),
    ],
)
def test_the_env_sets_nothing(clone: Clone, what: str, folder: str, set_there: dict[str, str], other: str) -> None:
    clone.install(what)
    assert read_environment({}, clone.root / folder).values == set_there
    text = (clone.root / folder / ".env").read_text()
    shown = set(re.findall(r"^#?(CEREBRUM_\w+)=", text, re.MULTILINE))
    both = {"CEREBRUM_API_KEY", "CEREBRUM_LOG_LEVEL", "CEREBRUM_MODELS_FILE"}
    assert shown > both
    assert other not in shown
    assert other in (clone.root / folder / ".env.example").read_text()


@pytest.mark.slow
def test_another_prefix(clone: Clone) -> None:
    clone.install("vps", PREFIX="/srv/cerebrum/")
    clone.install("vps")  # finds it
    assert not (clone.root / "opt").exists()
    unit = (clone.root / UNITS / "cerebrum-backend.service").read_text()
    assert "/opt/cerebrum" not in unit
    assert "\nExecStart=/srv/cerebrum/venv/bin/python -s /srv/cerebrum/vpsd.py\n" in unit


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["opt/x", "/", "/opt/a b", "/opt/a|b", "/opt/%h", "/home/me/x", "/tmp", "/var/tmp/x"]
)
def test_a_prefix_that_cannot_work(clone: Clone, prefix: str) -> None:
    result = clone.command("cm4", PREFIX=prefix)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"install.sh: PREFIX: expected .*, got '.*'\n|install.sh: PREFIX: .*; got '.*'\n", result.stderr
    )
    assert not clone.root.exists()


@pytest.mark.slow
def test_the_clone_is_not_the_prefix(clone: Clone) -> None:
    result = clone.command("uninstall-cm4", DESTDIR=str(clone.source.parent), PREFIX="/clone")
    assert (result.returncode, result.stderr.split(":")[1]) == (1, " PREFIX")
    assert (clone.source / "cm4d.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["pi"], ["cm4", "vps"]])
def test_wrong_arguments(clone: Clone, arguments: list[str]) -> None:
    result = clone.command(*arguments)
    assert result.returncode == 1
    got = " ".join(arguments) or "nothing"
    assert result.stderr == f"install.sh: expected one of: cm4, vps, uninstall-cm4, uninstall-vps; got: {got}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_live_installation_is_roots() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(ROOT / "systemd", folder / "systemd")
        for what in ("cm4", "uninstall-vps"):
            result = run([folder / "systemd/install.sh", what], env={"PATH": os.environ["PATH"]}, user=65534)
            target = what if "-" in what else f"install-{what}"
            said = rf"install.sh: expected to run as root, got user \w+; please run:  sudo make {target}\n"
            assert result.returncode == 1
            assert re.fullmatch(said, result.stderr)


# ------------------------------------------------------------------------------------ files that people change

CONFIGS = {
    f"{UNITS}/cerebrum-backend.socket": "systemd/cerebrum-backend.socket",
    f"{UNITS}/cerebrum-backend.service": "systemd/cerebrum-backend.service",
    f"{VPS}/models.toml": "models.toml",
}


# The unit stands for all three in the fast suite.
SLOW = {name: () if name.endswith("backend.service") else pytest.mark.slow for name in CONFIGS}


@pytest.fixture(params=[pytest.param(name, id=Path(name).name, marks=marks) for name, marks in SLOW.items()])
def config(request: pytest.FixtureRequest, clone: Clone) -> tuple[Path, Path]:
    """A file of the clone that a person may change where it is installed, and its place."""
    clone.install("vps")
    return clone.source / CONFIGS[request.param], clone.root / request.param


def add(file: Path, line: str) -> str:
    file.write_text(file.read_text() + f"# {line}\n")
    return file.read_text()


def beside(file: Path) -> Path:
    return file.with_name(file.name + ".new")


def test_an_unchanged_file_is_replaced(clone: Clone, config: tuple[Path, Path]) -> None:
    source, target = config
    new = add(source, "version 2")
    assert clone.install("vps") == ""
    assert target.read_text() == new
    assert not beside(target).exists()


def test_a_changed_file_is_kept(clone: Clone, config: tuple[Path, Path]) -> None:
    source, target = config
    changed = add(target, "mine")
    assert clone.install("vps") == ""  # there is no new version to tell of
    new = add(source, "version 2")
    name = f"/{target.relative_to(clone.root)}"
    assert clone.install("vps") == f"kept {name}, which was changed here; the new version is {name}.new\n"
    assert clone.install("vps") == ""  # it was told once
    assert (target.read_text(), beside(target).read_text()) == (changed, new)


def test_a_new_version_that_is_taken_ends_the_change(clone: Clone, config: tuple[Path, Path]) -> None:
    source, target = config
    add(target, "mine")
    add(source, "version 2")
    clone.install("vps")
    beside(target).rename(target)
    new = add(source, "version 3")
    assert clone.install("vps") == ""
    assert target.read_text() == new
    assert not beside(target).exists()


@pytest.mark.slow
def test_a_file_that_is_gone_comes_back(clone: Clone, config: tuple[Path, Path]) -> None:
    source, target = config
    target.unlink()
    clone.install("vps")
    assert target.read_text() == source.read_text()


@pytest.mark.parametrize("changed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_files_that_were_copied_by_hand(clone: Clone, changed: bool) -> None:
    for target in (f"{UNITS}/cerebrum-cm4.service", f"{CM4}/models.toml"):
        path = clone.root / target
        path.parent.mkdir(parents=True)
        path.write_bytes((ROOT / "tests/by_hand" / path.name).read_bytes() + b"# mine\n" * changed)
    clone.install("cm4")
    assert ("notify-reload" in (clone.root / UNITS / "cerebrum-cm4.service").read_text()) is not changed
    assert (clone.root / UNITS / "cerebrum-cm4.service.new").exists() is changed
    assert load_catalog(clone.root / CM4 / "models.toml").models


# ---------------------------------------------------------------------------------------------- interruption


def moves(tools: Path) -> Path:
    tools.mkdir()
    (tools / "mv").write_text(INTERRUPT)
    (tools / "mv").chmod(0o755)
    return tools / "moves"


def interrupt(clone: Clone, tools: Path, count: int, after: int) -> subprocess.CompletedProcess[str]:
    (tools / "moves").write_text("")
    more = {"COUNT": str(count), "AFTER": str(after), "MOVES": str(tools / "moves")}
    return clone.command("vps", PATH=f"{tools}:{os.environ['PATH']}", **more)


def older(clone: Clone) -> None:
    """Nothing is installed."""


def upgrade(clone: Clone) -> None:
    """One version is installed, one file of it was changed, and each file has a new version."""
    clone.install("vps")
    add(clone.root / f"{VPS}/models.toml", "mine")
    for source in CONFIGS.values():
        add(clone.source / source, "version 2")


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [older, upgrade])
def test_another_installation_mends_an_interrupted_one(tmp_path: Path, prepare: Callable[[Clone], None]) -> None:
    def prepared(name: str) -> Clone:
        (tmp_path / name).mkdir()
        clone = Clone(tmp_path / name)
        prepare(clone)
        return clone

    whole, tools = prepared("whole"), tmp_path / "tools"
    log = moves(tools)
    assert interrupt(whole, tools, 0, 0).returncode == 0
    count = len(log.read_text().splitlines())
    assert count > 20
    for number in range(1, count + 1):
        for after in (0, 1):
            clone = prepared(f"{number}-{after}")
            assert interrupt(clone, tools, number, after).returncode == -9
            clone.install("vps")
            assert clone.tree() == whole.tree(), (number, after)


# ------------------------------------------------------------------------------------------------- uninstall


def test_uninstall_leaves_what_a_person_has_made(clone: Clone) -> None:
    clone.install("vps")
    mine = {
        f"{VPS}/.env": "CEREBRUM_API_KEY=k\n",
        f"{VPS}/models/a.gguf": "weights",
        f"{UNITS}/cerebrum-backend.socket.d/listen.conf": "[Socket]\n",
        f"{UNITS}/cerebrum-backend.service.d/memory.conf": "[Service]\n",
    }
    for name, text in mine.items():
        (clone.root / name).parent.mkdir(exist_ok=True)
        (clone.root / name).write_text(text)
    mine[f"{VPS}/models.toml"] = add(clone.root / f"{VPS}/models.toml", "mine")
    mine[f"{UNITS}/cerebrum-backend.service.changed"] = add(clone.root / f"{UNITS}/cerebrum-backend.service", "mine")
    said = clone.install("uninstall-vps")
    assert {name: (clone.root / name).read_text() for name in clone.tree()} == mine
    left = re.findall(r"^  (.*)$", said, re.MULTILINE)
    assert [name.removeprefix("/") for name in left] == [
        f"{UNITS}/cerebrum-backend.service.changed",
        f"{UNITS}/cerebrum-backend.service.d",
        f"{UNITS}/cerebrum-backend.socket.d",
        VPS,
    ]


@pytest.mark.parametrize(("what", "other"), [("cm4", "vps"), pytest.param("vps", "cm4", marks=pytest.mark.slow)])
def test_the_key_serves_the_other_daemon_as_long_as_that_is_here(clone: Clone, what: str, other: str) -> None:
    key = clone.root / "etc/credstore/CEREBRUM_API_KEY"
    key.parent.mkdir(parents=True)
    key.write_text("key")
    clone.install(what)
    clone.install(other)
    assert f"  /{key.relative_to(clone.root)}\n" not in clone.install(f"uninstall-{what}")
    assert f"  /{key.relative_to(clone.root)}\n" in clone.install(f"uninstall-{other}")
    assert key.exists()


@pytest.mark.slow
def test_uninstall_leaves_an_unchanged_installation_but_its_env(clone: Clone) -> None:
    for what, folder in (("cm4", CM4), ("vps", VPS)):
        clone.install(what)
        clone.install(f"uninstall-{what}")
        assert sorted(clone.tree()) == [f"{folder}/.env"]
        clone.install(f"uninstall-{what}")  # nothing is there any more
        (clone.root / folder / ".env").unlink()
