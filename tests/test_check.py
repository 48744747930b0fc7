"""`--check`, `--version`, `--help` of both daemons, and `vpsd.py memory`."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import KEY, PATIENCE, ROOT, Daemon, command_of, daemon, run, settings
from scripted import HEALTH, MODELS, Backend, answer
from test_gguf import header

import cerebrum_check
import cm4d
import vpsd
from cerebrum_check import KNOWN, PACKAGES, Report, check_key, may, obstacle, unfit_files
from cerebrum_common import VERSION, Environment, log

WEIGHTS = header(block_count=24, embedding_length=896, attention__head_count=14, attention__head_count_kv=2)
TINY = "tiny.gguf"
CATALOG = f"""
[[models]]
id = "tiny"
name = "Tiny"
languages = ["python", "rust"]
parameters = "0B"
quantization = "Q4"
file = "{TINY}"
size = {len(WEIGHTS)}
sha256 = "{sha256(WEIGHTS).hexdigest()}"

[[models]]
id = "other"
name = "Other"
languages = ["go"]
parameters = "0B"
quantization = "Q4"
file = "other.gguf"
"""
TINY_ALONE = CATALOG[: CATALOG.rindex("[[models]]")]

Lines = dict[str, list[tuple[str, str]]]  # level and text of each finding, by its name


def given(folder: Path, catalog: str = TINY_ALONE, **more: str) -> dict[str, str]:
    """The environment of a daemon with its own models.toml and no credentials of this machine."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "catalog.toml").write_text(catalog)
    own = {"CEREBRUM_MODELS_FILE": str(folder / "catalog.toml"), "CREDENTIALS_DIRECTORY": str(folder / "none")}
    return settings(folder, None, **own, **more)


def findings(stdout: str) -> Lines:
    """AssertionError unless every line has the form of a finding."""
    found: Lines = {}
    for line in stdout.splitlines():
        match = re.fullmatch(r"(ok   |warn |FAIL ) ([a-z]+) +(.+)", line)
        assert match, line
        found.setdefault(match[2], []).append((match[1].strip(), match[3]))
    return found


def failed(lines: Lines) -> set[str]:
    return {name for name, told in lines.items() if any(level == "FAIL" for level, _ in told)}


def warned(lines: Lines) -> set[str]:
    """What has a warning, but for the clock: that of a container may not be synchronized."""
    return {name for name, told in lines.items() if any(level == "warn" for level, _ in told)} - {"clock"}


def check(name: str, environment: dict[str, str], script: Path | None = None) -> tuple[int, Lines]:
    """Run `--check`: nothing but findings may come, and no key."""
    command = [*command_of(name)[:-1], str(script or ROOT / f"{name}.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stderr == ""
    keys = {value for key, value in environment.items() if key.endswith("KEY")} - {""}
    assert not any(key in done.stdout for key in keys)
    lines = findings(done.stdout)
    assert done.returncode == (1 if failed(lines) else 0)
    return done.returncode, lines


Check = Callable[..., tuple[int, Lines]]


@pytest.fixture
def check_here(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Check:
    """The same in this process, which saves starting a Python and loading llama.cpp. `script`: where cm4d.py shall be.
    Nothing is told of the files and packages then."""

    def check_here(name: str, environment: dict[str, str], script: Path | None = None) -> tuple[int, Lines]:
        for variable in [*os.environ]:
            if variable.startswith("CEREBRUM_") or variable.endswith("_DIRECTORY"):
                monkeypatch.delenv(variable)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(cm4d, "HERE", script.parent if script else ROOT)
        level = log.level
        try:
            status = {"cm4d": cm4d, "vpsd": vpsd}[name].main(["--check"])
        finally:
            log.setLevel(level)
        told = capsys.readouterr()
        assert told.err == ""
        assert not any(
            value in told.out for key, value in environment.items() if key.endswith("KEY") and len(value) > 3
        )
        lines = findings(told.out)
        assert status == (1 if failed(lines) else 0)
        return status, lines

    return check_here


@pytest.fixture(scope="module")
def vps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("vps")
    environment = given(folder)
    (folder / "models" / TINY).write_bytes(WEIGHTS)
    own = {name: environment[name] for name in ("CEREBRUM_MODELS_FILE", "CREDENTIALS_DIRECTORY")}
    with daemon("vpsd", folder, **own) as started:
        yield started


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """cm4d.py with its modules in a folder of its own."""
    folder = tmp_path / "pi"
    folder.mkdir()
    for path in (ROOT / "cm4d.py", ROOT / "models.toml", *ROOT.glob("cerebrum_*.py")):
        shutil.copy(path, folder)
    return folder


# ------------------------------------------------------------------------------------------------- the Pi


def test_all_is_well_on_the_pi(vps: Daemon, tmp_path: Path) -> None:
    status, lines = check("cm4d", given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}"))
    assert (status, failed(lines), warned(lines)) == (0, set(), set())
    assert lines["files"] == [("ok", f"{ROOT} has all of version {VERSION}")]
    assert ("ok", f"http://127.0.0.1:{vps.port} accepts ours") in lines["key"]
    assert re.fullmatch(rf"vps: http://127.0.0.1:{vps.port} \(cerebrum\) answers after \d+ ms", lines["backend"][0][1])
    assert lines["models"] == [("ok", "vps has tiny")]
    assert lines["languages"] == [("ok", "python, rust")]
    assert lines["clock"][-1] == ("ok", lines["clock"][-1][1])
    assert not list(tmp_path.glob("logs")), "a check changes nothing"


def test_the_keys_differ(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    url, wrong = f"http://127.0.0.1:{vps.port}", "another-key-of-the-tests"
    status, lines = check_here("cm4d", given(tmp_path, CEREBRUM_VPS_URL=url, CEREBRUM_API_KEY=wrong))
    assert (status, failed(lines)) == (1, {"key"})
    told = next(text for level, text in lines["key"] if level == "FAIL")
    assert told.startswith(f"{url} refuses our key (401): ")
    assert "generate_api_key.sh --set" in told


def test_no_key_is_set(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}", CEREBRUM_API_KEY="")
    _, lines = check_here("cm4d", environment)
    assert failed(lines) == {"key"}
    assert lines["key"][-1][1].startswith(f"CEREBRUM_API_KEY is not set, so http://127.0.0.1:{vps.port} refuses us: ")


def test_a_key_that_is_short_or_being_rotated(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    url = f"http://127.0.0.1:{vps.port}"
    environment = given(tmp_path, CEREBRUM_VPS_URL=url, CEREBRUM_API_KEY=f"{KEY},old-key", CEREBRUM_CM4_API_KEY="short")
    status, lines = check_here("cm4d", environment)
    assert status == 0
    short = f"has fewer than 16 characters, which can be guessed: {ROOT}/generate_api_key.sh makes a good one"
    assert [text for level, text in lines["key"] if level == "warn"] == [
        f"CEREBRUM_CM4_API_KEY {short}",
        f"CEREBRUM_API_KEY {short}",
        f"CEREBRUM_API_KEY has 2 keys: {ROOT}/generate_api_key.sh --rotate ends the rotation",
    ]


def test_the_vps_is_away(tmp_path: Path, check_here: Check) -> None:
    _, lines = check_here("cm4d", given(tmp_path))
    assert failed(lines) == {"backend"}
    assert lines["backend"][0][1].startswith("vps: http://127.0.0.1:1 cannot be reached (Connection refused): look ")
    assert "models" not in lines


def test_one_of_two_backends_is_away(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    tables = "".join(
        f'\n[[backends]]\nid = "{id}"\nurl = "http://127.0.0.1:{port}"\nkey_env = "CEREBRUM_API_KEY"\n'
        for id, port in (("attic", vps.port), ("desktop", 1))
    )
    status, lines = check_here("cm4d", given(tmp_path, CATALOG + tables))
    assert (status, warned(lines)) == (0, {"backend", "languages"})
    assert [level for level, _ in lines["backend"]] == ["ok", "warn"]
    assert lines["models"] == [("ok", "attic has tiny")]
    assert lines["languages"][0][1].startswith("no model is there for go: ")


def test_a_clock_that_is_wrong(tmp_path: Path, check_here: Check) -> None:
    """A backend whose Date is five minutes ahead."""

    async def scenario() -> None:
        async with Backend(health=with_date(HEALTH, 300), models=with_date(MODELS, 300)) as backend:
            environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{backend.port}")
            environment["CEREBRUM_MODELS_FILE"] = str(ROOT / "models.toml")
            _, lines = await asyncio.to_thread(check_here, "cm4d", environment)
        assert failed(lines) == {"clock"}
        assert re.match(
            r"that of vps is (299|30[01]) s ahead of ours: compare `date -u` on both, ", lines["clock"][-1][1]
        )

    run(scenario())


def with_date(members: Any, ahead: float) -> bytes:
    date = formatdate(time.time() + ahead, usegmt=True).encode()
    return answer(200, members).replace(b"\r\n", b"\r\nDate: " + date + b"\r\n", 1)


def test_the_port_is_taken_by_another_program(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    """Another program: the VPS's daemon, whose /health is not the Pi's."""
    _, lines = check_here("cm4d", given(tmp_path, CEREBRUM_CM4_PORT=str(vps.port)))
    assert failed(lines) == {"port", "backend"}
    taken = f"127.0.0.1:{vps.port} is taken by another program: ss -ltnp 'sport = :{vps.port}' names it"
    assert lines["port"] == [("FAIL", taken)]


def test_the_daemon_that_runs_has_older_settings(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    """It has been told of no backend that is there; by the settings of now there is one."""
    with daemon("cm4d", tmp_path / "pi") as pi:
        pi.wait_for_line("vps: VPS backend is unavailable")
        url = f"http://127.0.0.1:{vps.port}"
        _, lines = check_here("cm4d", given(tmp_path, CEREBRUM_VPS_URL=url, CEREBRUM_CM4_PORT=str(pi.port)))
    assert failed(lines) == {"backend"}
    assert lines["port"] == [("ok", f"127.0.0.1:{pi.port}: our daemon answers there")]
    assert [level for level, _ in lines["backend"]] == ["ok", "FAIL"]
    assert lines["backend"][1][1] == (
        "the daemon that runs says: VPS backend is unavailable (connection refused): it may have older settings: "
        "sudo systemctl restart cerebrum-cm4"
    )


def test_the_daemon_that_runs_has_a_backend(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    async def scenario() -> None:
        async with Backend(health=answer(200, {"status": "healthy", "vps_available": True})) as pi:
            own = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{vps.port}", "CEREBRUM_CM4_PORT": str(pi.port)}
            status, lines = await asyncio.to_thread(check_here, "cm4d", given(tmp_path, **own))
        assert (status, [level for level, _ in lines["backend"]]) == (0, ["ok"])

    run(scenario())


def test_a_name_that_is_not_known(tmp_path: Path, check_here: Check) -> None:
    _, lines = check_here("cm4d", given(tmp_path, CEREBRUM_VPS_URL="http://vps.invalid:9000"))
    assert failed(lines) == {"backend"}
    told = "the name vps.invalid is not known here: `getent hosts vps.invalid`; or use an IP address in "
    assert lines["backend"] == [("FAIL", f"vps: {told}CEREBRUM_VPS_URL")]
    table = '\n[[backends]]\nid = "attic"\nurl = "http://vps.invalid:9000"\nkey_env = "CEREBRUM_API_KEY"\n'
    _, lines = check_here("cm4d", given(tmp_path, TINY_ALONE + table))
    assert lines["backend"] == [("FAIL", f"attic: {told}models.toml")]


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("192.0.2.1", "this machine has no address 192.0.2.1 now: `ip address` lists its own; see CEREBRUM_CM4_HOST"),
        ("no-such-host.invalid", "no-such-host.invalid is no address: "),
    ],
)
def test_a_host_that_is_not_this_machine(tmp_path: Path, host: str, told: str, check_here: Check) -> None:
    _, lines = check_here("cm4d", given(tmp_path, CEREBRUM_CM4_HOST=host))
    assert failed(lines) == {"port", "backend"}
    assert lines["port"][0][1].startswith(told)


def test_all_faults_of_a_configuration_are_told_and_the_rest_is_checked(tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path, CEREBRUM_CM4_PORT="seven", CEREBRUM_VPS_ULR="x", CEREBRUM_MAX_CONCURRENT="0")
    _, lines = check_here("cm4d", environment)
    assert failed(lines) == {"config", "backend"}
    assert lines["config"] == [
        ("FAIL", "CEREBRUM_MAX_CONCURRENT: expected a number from 1 to 64, got '0': correct it in the environment"),
        ("FAIL", "CEREBRUM_CM4_PORT: expected a number from 0 to 65535, got 'seven': correct it in the environment"),
        ("warn", "CEREBRUM_VPS_ULR is set, and nothing reads it: did you mean CEREBRUM_VPS_URL?"),
    ]
    assert {"key", "log", "port", "memory", "clock"} <= set(lines)


@pytest.mark.parametrize(
    ("catalog", "told"),
    [
        ("[[models]\n", r"CEREBRUM_MODELS_FILE: .*models\.toml: Expected"),
        (TINY_ALONE + '\n[[backends]]\nid = "a"\nurl = "gopher://a"\n', "backend 1: url: expected http://HOST"),
    ],
)
def test_a_models_toml_that_is_wrong(
    installed: Path, tmp_path: Path, catalog: str, told: str, check_here: Check
) -> None:
    environment = given(tmp_path)
    (installed / "models.toml").write_text(catalog)
    del environment["CEREBRUM_MODELS_FILE"]
    _, lines = check_here("cm4d", environment, installed / "cm4d.py")
    assert failed(lines) == {"config"}
    assert re.match(told, lines["config"][0][1])
    assert lines["config"][0][1].endswith(": correct it in models.toml")
    assert lines["backend"] == [("warn", "not asked, since models.toml says which there are")]
    assert {"log", "port", "memory", "clock"} <= set(lines)


def test_an_env_file(installed: Path, tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path)
    (installed / ".env").write_text(f"CEREBRUM_API_KEY={KEY}\nCEREBRUM_CM4_PORT=x\nCEREBRUM_ZZZZ=1\n")
    (installed / ".env").chmod(0o644)
    for name in ("CEREBRUM_API_KEY", "CEREBRUM_CM4_PORT"):
        del environment[name]
    _, lines = check_here("cm4d", environment | {"UNUSED_KEY": KEY}, installed / "cm4d.py")
    env = installed / ".env"
    assert lines["files"][0][1].startswith("cerebrum_page.html is missing, so there is no page at /: ")
    assert [text for _, text in lines["config"]] == [
        f"CEREBRUM_CM4_PORT: expected a number from 0 to 65535, got 'x': correct it in {env}",
        'CEREBRUM_ZZZZ is set, and nothing reads it: README.md, "Configuration", lists those there are',
    ]
    assert ("warn", f"other users can read {env}, which holds CEREBRUM_API_KEY: chmod 600 {env}") in lines["key"]


def test_an_env_file_that_cannot_be_read(installed: Path, tmp_path: Path, check_here: Check) -> None:
    (installed / ".env").write_text("this is no assignment\n")
    _, lines = check_here("cm4d", given(tmp_path), installed / "cm4d.py")
    assert lines["config"][0][1] == (
        f"{installed}/.env: line 1: expected NAME=value: correct this file; what follows does without it"
    )
    assert {"key", "log", "port", "backend"} <= set(lines)


@pytest.mark.parametrize("name", ["cm4d", "vpsd"])
def test_an_env_file_is_no_reason_to_ignore_the_credentials(
    tmp_path: Path, check_here: Check, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What cannot be read is a fault of the configuration, once, and the other place counts."""
    (tmp_path / ".env").write_text("this is no assignment\n")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/CEREBRUM_API_KEY").write_text(KEY)
    (tmp_path / "none/CEREBRUM_API_KEY").chmod(0o600)
    monkeypatch.setattr(vpsd, "HERE", tmp_path)
    _, lines = check_here(name, given(tmp_path, CEREBRUM_API_KEY="", KEY=KEY), tmp_path / "cm4d.py")
    told = f"{tmp_path}/.env: line 1: expected NAME=value: correct this file; what follows does without it"
    assert lines["config"] == [("FAIL", told)]
    assert "key" not in failed(lines) | warned(lines)
    (tmp_path / "none/CEREBRUM_API_KEY").unlink()  # it may be in the .env
    _, lines = check_here(name, given(tmp_path, CEREBRUM_API_KEY=""), tmp_path / "cm4d.py")
    assert "key" not in failed(lines)
    assert lines["key"][-1][1].endswith(": not known until the file named above can be read")


@pytest.mark.parametrize("name", ["cm4d", "vpsd"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_credential_that_is_no_key(
    vps: Daemon, tmp_path: Path, check_here: Check, monkeypatch: pytest.MonkeyPatch, name: str, is_folder: bool
) -> None:
    """The key of .env counts, so that the backend can be asked."""
    credential = tmp_path / "none/CEREBRUM_API_KEY"
    credential.parent.mkdir()
    if is_folder:
        credential.mkdir()
        told = (
            f"CREDENTIALS_DIRECTORY: cannot read {credential}: Is a directory: remove this folder, a file is expected"
        )
    else:
        credential.touch()
        told = f"CEREBRUM_API_KEY: expected a value in {credential}, got an empty file: correct this file; what follows"
    (tmp_path / ".env").write_text(f"CEREBRUM_API_KEY={KEY}\n")
    (tmp_path / ".env").chmod(0o600)
    monkeypatch.setattr(vpsd, "HERE", tmp_path)
    environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}")
    del environment["CEREBRUM_API_KEY"]
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    _, lines = check_here(name, environment, tmp_path / "cm4d.py")
    assert failed(lines) == {"config"}
    assert len(lines["config"]) == 1
    assert lines["config"][0][1].startswith(told)
    accepted = {"cm4d": f"http://127.0.0.1:{vps.port} accepts ours", "vpsd": "CEREBRUM_API_KEY is set"}
    assert lines["key"][-1] == ("ok", accepted[name])


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_credential_that_is_no_key_and_no_other_one(
    vps: Daemon, tmp_path: Path, check_here: Check, is_folder: bool
) -> None:
    """Nobody is told to put another key in its place."""
    credential = tmp_path / "none/CEREBRUM_API_KEY"
    credential.parent.mkdir()
    (credential.mkdir if is_folder else credential.touch)()
    environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}", CEREBRUM_API_KEY="")
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    hidden = "not known until the file named above can be read"
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"config"}
    assert lines.get("key", []) == ([("warn", f"CEREBRUM_API_KEY: {hidden}")] if is_folder else [])
    _, lines = check_here("cm4d", environment)
    assert failed(lines) == {"config"}
    told = [("warn", f"CEREBRUM_API_KEY, the key for http://127.0.0.1:{vps.port}: {hidden}")] if is_folder else []
    assert lines["key"][1:] == told


def test_keys_that_only_root_can_read(
    vps: Daemon, tmp_path: Path, check_here: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without root nobody is told to overwrite a key that is there."""
    url, hidden = f"http://127.0.0.1:{vps.port}", "not known without root: run this as root (sudo)"
    monkeypatch.setattr(cerebrum_check, "CREDENTIALS", tmp_path)
    monkeypatch.setattr(cerebrum_check, "by_hand", dict)
    closed = ("warn", f"{tmp_path} cannot be read, where the key may be: run this as root (sudo)")
    for key in ("", "another-key-of-the-tests"):
        own = {"CEREBRUM_VPS_URL": url, "CEREBRUM_API_KEY": key, "CEREBRUM_CM4_API_KEY": ""}
        environment = given(tmp_path, **own)
        del environment["CREDENTIALS_DIRECTORY"]
        status, lines = check_here("cm4d", environment)
        assert "key" not in failed(lines)
        assert lines["config"][0] == closed
        assert lines["key"] == [
            ("warn", f"whether clients need CEREBRUM_CM4_API_KEY: {hidden}"),
            ("warn", f"CEREBRUM_API_KEY, the key for {url}: {hidden}"),
        ]
    environment = given(tmp_path, CEREBRUM_API_KEY="")
    del environment["CREDENTIALS_DIRECTORY"]
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    status, lines = check_here("vpsd", environment)
    assert (status, lines["config"][0], lines["key"]) == (0, closed, [("warn", f"CEREBRUM_API_KEY: {hidden}")])


@pytest.mark.parametrize(("key", "told"), [(",", "printable ASCII without spaces"), ("a,b,c", "one key, or two ")])
def test_a_key_that_is_none_is_told_once(vps: Daemon, tmp_path: Path, check_here: Check, key: str, told: str) -> None:
    environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}", CEREBRUM_API_KEY=key)
    environment["CEREBRUM_CM4_API_KEY"] = ""
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    for name in ("cm4d", "vpsd"):
        _, lines = check_here(name, environment)
        assert failed(lines) == {"config"}
        assert lines["config"][0][1].startswith(f"CEREBRUM_API_KEY: expected {told}")
        assert len(lines["config"]) == 1


@pytest.mark.parametrize(
    ("mode", "folder_mode", "is_told"),
    [(0o644, 0o755, True), (0o640, 0o750, True), (0o604, 0o711, True), (0o600, 0o755, False), (0o644, 0o700, False)],
)
def test_who_else_can_read_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, mode: int, folder_mode: int, is_told: bool
) -> None:
    monkeypatch.delenv("CEREBRUM_API_KEY", raising=False)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file = tmp_path / "CEREBRUM_API_KEY"
    file.write_text(KEY)
    file.chmod(mode)
    tmp_path.chmod(folder_mode)
    check_key(Report(), Environment({"CEREBRUM_API_KEY": KEY}), "CEREBRUM_API_KEY", ROOT)
    told = f"other users can read {file}, which holds CEREBRUM_API_KEY: chmod 600 {file}"
    assert findings(capsys.readouterr().out) == ({"key": [("warn", told)]} if is_told else {})


@pytest.mark.parametrize(
    ("module", "change", "told"),
    [
        ("cerebrum_openapi", None, "cerebrum_openapi.py cannot be read (No such file or directory)"),
        ("cerebrum_backends", ("find_models", "find_any"), "cm4d.py expects find_models in cerebrum_backends.py"),
        ("cerebrum_code", ("\n", "\n)"), "cerebrum_code.py is damaged (unmatched ')'"),
        ("cerebrum_common", None, "No module named 'cerebrum_common'"),
        ("cerebrum_check", ("\n", "\n)"), "unmatched ')'"),
    ],
)
def test_files_that_do_not_belong_together(
    installed: Path, tmp_path: Path, module: str, change: tuple[str, str] | None, told: str
) -> None:
    path = installed / f"{module}.py"
    text = path.read_text()
    path.unlink()
    if change:
        path.write_text(text.replace(*change))
    _, lines = check("cm4d", given(tmp_path), installed / "cm4d.py")
    assert failed(lines) == {"files"}
    assert lines["files"][0][1].startswith(told)
    assert lines["files"][0][1].endswith(": copy all files of one version here again")


def test_the_shipped_files_belong_together() -> None:
    assert unfit_files(ROOT / "cm4d.py") == []
    assert unfit_files(ROOT / "vpsd.py") == []


def test_a_log_that_cannot_be_written(tmp_path: Path, check_here: Check) -> None:
    (tmp_path / "file").touch()
    _, lines = check_here("cm4d", given(tmp_path, CEREBRUM_LOG_FILE=str(tmp_path / "file/logs/cerebrum.log")))
    assert failed(lines) == {"log", "backend"}
    assert lines["log"][0][1].startswith(f"{tmp_path}/file is a file, expected a folder: ")


def test_a_folder_where_a_file_belongs_and_the_reverse(tmp_path: Path, check_here: Check) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "state").touch()
    environment = given(tmp_path, CEREBRUM_LOG_FILE=str(tmp_path / "log"))
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"log", "state"}
    assert lines["log"] == [("FAIL", f"{tmp_path}/log is a folder, expected a file: remove it")]
    assert lines["state"] == [("FAIL", f"{tmp_path}/state is a file, expected a folder: remove this file")]


# ------------------------------------------------------------------------------------------------ the VPS


def test_all_is_well_on_the_vps(tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path)
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    status, lines = check_here("vpsd", environment)
    assert (status, failed(lines), warned(lines)) == (0, set(), set())
    assert lines["key"] == [("ok", "CEREBRUM_API_KEY is set")]
    assert lines["models"] == [("ok", "tiny: 0 MB, whole by its sha256; published")]
    assert lines["languages"] == [("ok", "python, rust")]
    assert re.fullmatch(r"tiny needs \d+ MB, [\d,]+ are free", lines["memory"][0][1])
    assert not (tmp_path / "state").exists(), "a check changes nothing"


@pytest.mark.parametrize(
    ("weights", "catalog", "told"),
    [
        (WEIGHTS + b"x", TINY_ALONE, f"tiny: expected {len(WEIGHTS)} bytes, got {len(WEIGHTS) + 1}: "),
        (WEIGHTS[:-1] + b"x", TINY_ALONE, f"tiny: expected sha256 {sha256(WEIGHTS).hexdigest()}, got "),
        (b"GGUX", re.sub("(?m)^(size|sha256).*$", "", TINY_ALONE), "tiny: not a readable GGUF file: "),
    ],
)
def test_a_damaged_model(tmp_path: Path, check_here: Check, weights: bytes, catalog: str, told: str) -> None:
    environment = given(tmp_path, catalog)
    (tmp_path / "models" / TINY).write_bytes(weights)
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"models"}
    assert lines["models"][0][1].startswith(told)
    assert lines["models"][0][1].endswith("vpsd.py fetch tiny` downloads it again")


def test_no_model_and_no_key(tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path, CATALOG, CEREBRUM_API_KEY="", CEREBRUM_KV_TYPE="f8")
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"config", "key", "models"}
    assert warned(lines) == {"languages"}
    assert lines["config"][0][1].startswith("CEREBRUM_KV_TYPE: expected one of f16, q8_0, got 'f8': ")
    assert lines["key"][0][1].startswith("CEREBRUM_API_KEY is not set: ")
    assert lines["models"][0][1].startswith(f"{tmp_path / 'models'} has none of models.toml: ")
    assert lines["models"][0][1].endswith("vpsd.py fetch other` downloads the smallest")


def test_a_tuned_file_that_is_not_used(tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path, CATALOG)
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    (tmp_path / "state/tuned").mkdir(parents=True)
    (tmp_path / "state/tuned" / TINY).write_bytes(b"GGUF")
    status, lines = check_here("vpsd", environment)
    assert (status, warned(lines)) == (0, {"models", "languages"})
    assert lines["models"][1][1].startswith("tiny: its tuned file is not used, expected the passport of this version")
    assert lines["languages"][0][1].startswith("no model is here for go: ")


def test_a_model_that_can_never_fit(tmp_path: Path, check_here: Check) -> None:
    environment = given(tmp_path, CEREBRUM_MIN_FREE_MB=str(1 << 20))
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"memory"}


def stand_in(folder: Path, answers: dict[str, str]) -> str:
    """A PATH with a systemctl that gives these answers to these arguments."""
    (folder / "bin").mkdir()
    cases = "".join(f"'{arguments}') echo '{text}' ;;\n" for arguments, text in answers.items())
    script = folder / "bin/systemctl"
    script.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}esac\n')
    script.chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


SHOW = "show --property={} --value {}"


def test_systemd_holds_the_socket_and_limits_the_memory(vps: Daemon, tmp_path: Path, check_here: Check) -> None:
    socket, unit = "cerebrum-backend.socket", "cerebrum-backend"
    path = stand_in(
        tmp_path,
        {
            f"is-active {socket}": "active",
            f"is-active {unit}": "active",
            SHOW.format("Listen", socket): f"127.0.0.1:{vps.port} (Stream)",
            SHOW.format("MemoryMax", unit): str(100 << 20),
            SHOW.format("User", unit): "root",
        },
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    status, lines = check_here("vpsd", given(tmp_path, PATH=path))
    assert (status, warned(lines)) == (0, {"memory"})
    assert lines["port"] == [("ok", f"systemd listens for us on 127.0.0.1 port {vps.port}")]
    assert lines["state"] == [("ok", f"{tmp_path}/state is made when the unit starts")]
    assert "and the unit's MemoryMax= is 100 MB: " in lines["memory"][1][1]


def test_a_model_that_the_user_of_the_unit_may_not_read(tmp_path: Path, check_here: Check) -> None:
    path = stand_in(tmp_path, {SHOW.format("User", "cerebrum-backend"): "nobody"})
    environment = given(tmp_path, PATH=path, CEREBRUM_LOG_FILE=str(tmp_path / "models/log"))
    model = tmp_path / "models" / TINY
    model.write_bytes(WEIGHTS)
    model.chmod(0o600)
    _, lines = check_here("vpsd", environment)
    assert failed(lines) == {"config", "log", "models"}
    told = f"tiny: nobody may not read {model}: chmod a+r it, a+x its folders"
    assert lines["models"] == [("FAIL", told)]
    assert lines["log"][0][1].startswith(f"nobody may not write to {tmp_path}/models: chown -R nobody: ")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9000", ("ok", "systemd listens for us on 127.0.0.1 port 9000")),
        ("0.0.0.0:9000", ("ok", "systemd listens for us on 0.0.0.0 port 9000")),
        ("192.0.2.1:9000", ("FAIL", "this machine has no address 192.0.2.1 now: ")),
        ("[2001:db8::1]:9000", ("FAIL", "this machine has no address 2001:db8::1 now: ")),
    ],
)
def test_the_socket_of_systemd_has_no_daemon_behind_it(
    tmp_path: Path, check_here: Check, address: str, told: tuple[str, str]
) -> None:
    """The backend is off: nobody connects to the socket, which would start it. FreeBind= hides an address that is not
    this machine's."""
    socket = "cerebrum-backend.socket"
    answers = {f"is-active {socket}": "active", SHOW.format("Listen", socket): f"{address} (Stream)"}
    _, lines = check_here("vpsd", given(tmp_path, PATH=stand_in(tmp_path, answers)))
    level, text = told
    if level == "FAIL":
        text += f"correct /etc/systemd/system/{socket}.d/listen.conf, then systemctl daemon-reload; "
        text += f"systemctl restart {socket}"
    assert lines["port"] == [(level, text)]


@pytest.mark.parametrize("name", ["cm4d", "vpsd"])
def test_files_that_the_user_of_the_unit_may_not_read(
    check_here: Check, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A copy by root with a strict umask. Readable files are told as `ok config`."""
    unit = {"cm4d": "cerebrum-cm4", "vpsd": "cerebrum-backend"}[name]
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place)
        folder.chmod(0o755)
        environment = given(folder, PATH=stand_in(folder, {SHOW.format("User", unit): "nobody"}))
        env, script, catalog = files = [folder / name for name in (".env", "cerebrum_a.py", "catalog.toml")]
        env.touch()
        script.touch()
        for path in files:
            path.chmod(0o600)
        monkeypatch.setattr(vpsd, "HERE", folder)
        _, lines = check_here(name, environment, folder / "cm4d.py")
        assert lines["config"] == [
            ("FAIL", f"nobody may not read {env}: chown nobody: {env}; chmod 600 {env}"),
            ("FAIL", f"nobody may not read {catalog}: chmod a+r {catalog}"),
            ("FAIL", f"nobody may not read {script}: chmod a+r {script}"),
        ]
        for path in files:
            path.chmod(0o644)
        assert check_here(name, environment, folder / "cm4d.py")[1]["config"] == [("ok", str(env))]
        folder.chmod(0o700)
        told = ("FAIL", f"nobody may not read {env}: chmod a+rx {folder}")
        assert check_here(name, environment, folder / "cm4d.py")[1]["config"] == [told]


def test_who_may_read_and_write() -> None:
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        assert may(folder, None, os.W_OK)
        assert obstacle(folder, nobody, os.R_OK) == folder
        assert not may(folder, nobody, os.R_OK)
        folder.chmod(0o755)
        assert (may(folder, nobody, os.R_OK), may(folder, nobody, os.W_OK)) == (True, False)
        folder.chmod(0o777)
        assert may(folder, nobody, os.W_OK)
        (folder / "closed").mkdir(mode=0o700)
        (folder / "closed/open").mkdir()
        (folder / "closed/open").chmod(0o777)
        assert not may(folder / "closed/open", nobody, os.R_OK)


def test_nobody_reads_the_findings(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*command_of("cm4d"), "--check"]
    done = subprocess.run(command, env=given(tmp_path), stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_backend_checks_itself_beside_its_daemon(vps: Daemon, tmp_path: Path) -> None:
    """As a process of its own, which loads llama.cpp."""
    environment = given(tmp_path, CEREBRUM_VPS_PORT=str(vps.port))
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    status, lines = check("vpsd", environment)
    assert (status, warned(lines)) == (0, set())
    assert [text.split()[0] for _, text in lines["packages"]] == list(PACKAGES)
    assert lines["port"] == [("ok", f"127.0.0.1:{vps.port}: our daemon answers there")]


def test_a_python_without_the_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-S", str(ROOT / "vpsd.py"), "--check"]
    done = subprocess.run(command, env=given(tmp_path), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (1, "")
    lines = findings(done.stdout)
    assert failed(lines) == {"packages"}
    assert lines["packages"][0][1].startswith(f"{sys.executable} lacks llama_cpp: ")


# ------------------------------------------------------------------------------------ the limit of memory


def memory(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert vpsd.main(["memory"]) == 0
    return str(capsys.readouterr().out).splitlines()


def test_the_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    environment = given(tmp_path, CATALOG, CEREBRUM_API_KEY="", CEREBRUM_MIN_FREE_MB="1000", CEREBRUM_CACHE_MB="100")
    total = psutil.virtual_memory().total >> 20
    machine = f"# {total - 1000} MB at most: {total} MB of memory without CEREBRUM_MIN_FREE_MB (1000 MB)"
    assert memory(environment, monkeypatch, capsys) == [str(total - 1000), "# no model is here yet", machine]
    (tmp_path / "models" / TINY).write_bytes(WEIGHTS)
    (tmp_path / "models/other.gguf").write_bytes(b"GGUX")
    limit, *comments = memory(environment, monkeypatch, capsys)
    need = int(re.fullmatch(r"# tiny: (\d+) MB, and 100 MB for prompts \(CEREBRUM_CACHE_MB\)", comments[0])[1])  # type: ignore[index]
    assert int(limit) == need + 100 + 150 + 512
    assert comments[1:] == [
        "# other: not counted, not a readable GGUF file",
        "# the process without a model: 150 MB; to spare: 512 MB",
        machine,
    ]
    monkeypatch.setenv("CEREBRUM_MIN_FREE_MB", str(1 << 20))
    environment["CEREBRUM_MIN_FREE_MB"] = str(1 << 20)
    assert memory(environment, monkeypatch, capsys)[0] == "662"  # never less than the process needs


# ---------------------------------------------------------------------------------- versions, arguments


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert f"llama-cpp-python=={PACKAGES['llama_cpp']}" in project["dependencies"]


def test_every_variable_is_known() -> None:
    """Those of .env.example, and all that a program reads."""
    pattern = re.compile(r"CEREBRUM_[A-Z0-9_]+[A-Z0-9]")
    example = set(pattern.findall((ROOT / ".env.example").read_text()))
    read = {
        name
        for path in (*ROOT.glob("*.py"), ROOT / "cerebrum_repl.sh")
        if path.name != "cerebrum_check.py"
        for name in re.findall(r'(?:text|integer|number|names|keys)\(\s*"(CEREBRUM_\w+)"', path.read_text())
    }
    assert example | read | {"CEREBRUM_URL"} == KNOWN


@pytest.mark.parametrize("name", ["cm4d", "vpsd"])
def test_version_help_and_wrong_arguments(name: str, capsys: Any) -> None:
    main = {"cm4d": cm4d, "vpsd": vpsd}[name].main

    def outcome(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code, *capsys.readouterr()

    assert outcome("--version") == (0, f"{name} {VERSION}\n", "")
    status, told, _ = outcome("--help")
    assert status == 0
    assert all(word in told for word in ("usage:", "--check", ".env", "models.toml", "exit status:", "  2  "))
    status, _, told = outcome("--chekc")
    assert status == 2
    assert told.startswith(f"usage: {name}.py [-h] [--check] [--version]")


def test_a_thread_that_takes_too_long_is_left_behind() -> None:
    with pytest.raises(TimeoutError):
        cerebrum_check.within(0.01, time.sleep, 1)
    with pytest.raises(ZeroDivisionError):
        cerebrum_check.within(PATIENCE, lambda: 1 // 0)
