"""`--check`, `--version`, `--help` of both daemons, and `vpsd.py memory`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import families
import llama_cpp
import psutil
import pytest
from harness import CAPTURED, KEY, PATIENCE, ROOT, Daemon, command_of, daemon, settings, variables
from scripted import HEALTH, MODELS, Backend, answer, in_a_thread
from test_encoding import PASSPORT

import cerebrum_lsp
import cm4d
import vpsd
from cerebrum import check as cerebrum_check
from cerebrum.pi import kind
from cerebrum.vps import encoding
from cerebrum.vps.encoding import Passport, TunedFile, passport_path, tuned_path
from cerebrum.vps.llama import start_library
from cerebrum.vps.memory import file_stamp
from cerebrum_common import VERSION

start_library()
with tempfile.TemporaryDirectory() as folder:
    WEIGHTS = families.make(Path(folder) / "tiny.gguf", families.FAMILIES["dense"]).read_bytes()
DAMAGED = WEIGHTS[:-1] + b"x"
SIZE, SUM = len(WEIGHTS), sha256(WEIGHTS).hexdigest()
MEMORY = psutil.virtual_memory()._replace(total=4000 << 20, available=3000 << 20)
MODEL = """
[[models]]
id = "{0}"
name = "{0}"
parameters = "0B"
quantization = "Q4"
file = "{0}.gguf"
"""
CATALOG = f'{MODEL.format("tiny")}size = {SIZE}\nsha256 = "{SUM}"\n{MODEL.format("other")}'
TABLE = '[[backends]]\nid = "{}"\nurl = "http://{}"\nkey_env = "CEREBRUM_ATTIC_KEY"\n'
ENV = ROOT / ".env"
# Findings as `assert_found` expects them.
VALID = f"ok settings {ENV} models.toml"
CM4_KEY, OUR_KEY = "ok key CEREBRUM_CM4_API_KEY", "ok key CEREBRUM_API_KEY"
IN_CLEAR = "warn key LAN CEREBRUM_CM4_TLS_CERT"
KEYGEN = "generate_api_key.sh"
NEEDS = "memory tiny 264 CEREBRUM_MIN_FREE_MB"
UNTUNED = "warn tuned tiny there is no tuned file: `vpsd.py tune tiny`"


def given(folder: Path, catalog: str = CATALOG, **more: str) -> dict[str, str]:
    """The environment of a daemon with its own models.toml, a whole model, and no credentials of
    this machine.
    """
    (folder / "models").mkdir(exist_ok=True)
    (folder / "models/tiny.gguf").write_bytes(WEIGHTS)
    (folder / "catalog.toml").write_text(catalog)
    more["CEREBRUM_MODELS_FILE"] = f"{folder}/catalog.toml"
    return settings(folder, None, CREDENTIALS_DIRECTORY=f"{folder}/none", **more)


Check = Callable[..., list[str]]


@pytest.fixture
def check(patch, capsys) -> Check:
    """Run `--check` in this process, on a machine of MEMORY: the lines about `subject`."""

    def check(name, environment, subject):
        patch(psutil, "virtual_memory", lambda: MEMORY)
        others = {name: os.environ[name] for name in os.environ if "CEREBRUM_" not in name}
        patch(os, "environ", others | environment)
        status = {"cm4d": cm4d, "vpsd": vpsd}[name].main(["--check"])
        lines = lines_of(capsys.readouterr().out, status)
        return [line for line in lines if line.split()[1] == subject]

    return check


def lines_of(stdout: str, status: int) -> list[str]:
    """With one space between level, subject and text."""
    lines = stdout.splitlines()
    assert KEY not in stdout
    assert all(re.match(r"(ok   |warn |FAIL ) [a-z]+ +\S", line) for line in lines)
    assert status == any(line.startswith("FAIL") for line in lines)
    return [re.sub(" +", " ", line) for line in lines]


def assert_found(lines: list[str], *expected: str) -> None:
    """Each finding has the expected level and subject, and names the further words: a variable, a
    file, a figure.
    """
    assert len(lines) == len(expected), lines
    for line, finding in zip(lines, expected, strict=True):
        assert line.split()[:2] == finding.split()[:2]
        for word in finding.split():
            assert re.search(rf"(?<![\w.,]){re.escape(word)}(?!\w|,\d)", line), (word, line)


@pytest.fixture(scope="module")
def vps(tmp_path_factory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("vps")
    catalog = given(folder)["CEREBRUM_MODELS_FILE"]
    with daemon("vpsd", folder, CEREBRUM_MODELS_FILE=catalog) as started:
        yield started


def test_all_is_well(vps, tmp_path):
    """As processes of their own, each beside its daemon."""

    def check(name):
        command = [*command_of(name), "--check"]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, timeout=PATIENCE
        )
        return lines_of(done.stdout, done.returncode)

    with daemon("cm4d", tmp_path / "pi") as pi:
        ports = f"CEREBRUM_VPS_PORT={vps.port} CEREBRUM_CM4_PORT={pi.port}"
        others = f"CEREBRUM_VPS_URL=http://127.0.0.1:{vps.port} CEREBRUM_MIN_FREE_MB=0"
        environment = given(tmp_path, **variables(f"{ports} {others}"))
        before = sorted(tmp_path.rglob("*"))
        address = f"ok address 127.0.0.1 {pi.port}"
        backend = ("ok backend vps ms", "ok models tiny")
        assert_found(check("cm4d"), VALID, CM4_KEY, IN_CLEAR, OUR_KEY, address, *backend)
        address = f"ok address 127.0.0.1 {vps.port}"
        model = ("ok models tiny whole", f"ok {NEEDS}", UNTUNED)
        assert_found(check("vpsd"), VALID, OUR_KEY, address, *model)
        assert sorted(tmp_path.rglob("*")) == before, "a check changes nothing"


# A daemon, one of its settings, its value, and all findings about one subject. {port} is vpsd's.
SETTINGS = f"FAIL settings {ENV} models.toml"
ADDRESS = "CEREBRUM_CM4_HOST CEREBRUM_CM4_PORT"
FAULTS = f"""
cm4d|API_KEY|another-key|FAIL backend vps 127.0.0.1:{{port}} CEREBRUM_API_KEY {KEYGEN}
cm4d|API_KEY||{CM4_KEY}|{IN_CLEAR}|FAIL key CEREBRUM_API_KEY {KEYGEN}
cm4d|CM4_API_KEY||{CM4_KEY}|{OUR_KEY}
cm4d|CM4_API_KEY|0123456789abcde|warn key CEREBRUM_CM4_API_KEY {KEYGEN}|{IN_CLEAR}|{OUR_KEY}
cm4d|CM4_KEYS_FILE|{{house}}|{CM4_KEY}|ok key anna|{IN_CLEAR}|{OUR_KEY}
cm4d|CM4_KEYS_FILE|{{bad}}|{SETTINGS} CEREBRUM_CM4_KEYS_FILE 1
cm4d|CM4_KEYS_FILE|anna key|{SETTINGS} CEREBRUM_CM4_KEYS_FILE
cm4d|CM4_KEYS_FILE|/none|{SETTINGS} CEREBRUM_CM4_KEYS_FILE
cm4d|VPS_URL|http://vps:9000 {KEY}|{SETTINGS} CEREBRUM_VPS_URL
cm4d|CM4_PORT|0|ok address 127.0.0.1 0
cm4d|CM4_PORT|{{port}}|FAIL address 127.0.0.1 {{port}} ss
cm4d|CM4_HOST|192.0.2.1|FAIL address 192.0.2.1 {ADDRESS}
cm4d|CM4_HOST|a..b|FAIL address a..b {ADDRESS}
cm4d|VPS_URL|http://127.0.0.1:1|FAIL backend vps 127.0.0.1:1
cm4d|VPS_URL|http://a..b:1|FAIL backend vps a..b:1
cm4d|CM4_PORT|x|{SETTINGS} CEREBRUM_CM4_PORT 0 65535 'x'
cm4d|VPS_ULR|x|{VALID}|warn settings CEREBRUM_VPS_ULR .env.example
vpsd|API_KEY||FAIL key CEREBRUM_API_KEY {KEYGEN}
vpsd|MODELS_DIR|/none|FAIL models /none models.toml fetch
vpsd|MIN_FREE_MB|2900|ok {NEEDS} 1,100
vpsd|MIN_FREE_MB|3900|FAIL memory tiny 259 2,048 1 100 CEREBRUM_N_CTX CEREBRUM_KV_TYPE
vpsd|MIN_FREE_MB|3338|ok memory tiny 262 3,072 2 662 CEREBRUM_MIN_FREE_MB
"""


@pytest.mark.parametrize("fault", FAULTS.strip().splitlines())
def test_a_fault(vps: Daemon, tmp_path, check: Check, fault):
    house, bad = tmp_path / "house", tmp_path / "bad"
    house.write_text("anna annas-key\n")
    bad.write_text(f"anna {KEY} many\n")
    name, setting, value, *found = fault.format(port=vps.port, house=house, bad=bad).split("|")
    own = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{vps.port}", f"CEREBRUM_{setting}": value}
    subject = found[0].split()[1]
    assert_found(check(name, given(tmp_path, **own), subject), *found)


def test_a_damaged_model(tmp_path, check):
    for file, weights, named in (
        ("tiny", DAMAGED, f"{SUM} {sha256(DAMAGED).hexdigest()}"),
        ("other", b"GGUX", "damaged"),
    ):
        environment = given(tmp_path)
        (tmp_path / f"models/{file}.gguf").write_bytes(weights)
        lines = check("vpsd", environment, "models")
        damaged = [line for line in lines if not line.startswith("ok ")]
        assert_found(damaged, f"FAIL models {file} {named} fetch")


def test_a_model_that_is_tuned_or_not(tmp_path, check):
    environment, published = given(tmp_path), tmp_path / "models/tiny.gguf"
    tuned = tuned_path(tmp_path / "state", published)
    tuned.parent.mkdir(parents=True)

    def found(**changes):
        of_tiny = {"source": SUM, "size": SIZE, "file": file_stamp(published)}
        fits = PASSPORT | of_tiny | {"threads": 1, "types": {}} | changes
        passport_path(tuned).write_text(json.dumps(Passport(**fits)._asdict()))
        (said,) = check("vpsd", environment, "tuned")
        return said

    fastest = "ok tuned tiny has the fastest encoding here:"
    untuned = "warn tuned tiny runs untuned: {}: `vpsd.py tune tiny` finds its fastest encoding"
    changed = {"Q4_K": "Q4_1"}
    assert found() == f"{fastest} published"
    assert found(types=changed) == untuned.format("its tuned file is missing or cut short")
    tuned.write_bytes(WEIGHTS)
    assert found(types=changed) == f"{fastest} tuned: Q4_K to Q4_1"
    why = f"it was tuned for library 0.3.35, here it is {llama_cpp.__version__}"
    assert found(library="0.3.35") == untuned.format(why)


@pytest.mark.parametrize(("version", "has"), [("0.0.1", "0.0.1"), (None, "unknown")])
def test_a_backend_of_another_version_without_models(tmp_path, check, version, has):
    health = answer(200, HEALTH | {"version": version})
    with in_a_thread(Backend(models=answer(200, MODELS), health=health)) as backend:
        environment = given(tmp_path, CEREBRUM_VPS_URL=f"http://127.0.0.1:{backend.port}")
        assert_found(check("cm4d", environment, "version"), f"warn version vps {has} {VERSION}")
        assert_found(check("cm4d", environment, "models"), "FAIL models vps models.toml fetch")


def test_two_of_three_backends_do_not_answer(vps, tmp_path, check, patch):
    patch(kind, "ASIDE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        tables = TABLE.format("one", address) + TABLE.format("two", "127.0.0.1:1")
        tables += TABLE.format("attic", f"127.0.0.1:{vps.port}")
        environment = given(tmp_path, CATALOG + tables, CEREBRUM_ATTIC_KEY=KEY)
        found = check("cm4d", environment, "backend")
        assert_found(check("cm4d", environment, "settings"), VALID)
    away = f"warn backend one {address} time", "warn backend two 127.0.0.1:1 refused"
    assert_found(found, *away, "ok backend attic")


def test_the_credentials_of_the_units(tmp_path, check, patch):
    environment = given(tmp_path, CEREBRUM_API_KEY="")
    del environment["CREDENTIALS_DIRECTORY"]
    patch(cerebrum_check, "CREDENTIALS", tmp_path / "credstore")
    (tmp_path / "credstore").mkdir()
    (tmp_path / "credstore/CEREBRUM_API_KEY").write_text(KEY)
    assert_found(check("vpsd", environment, "key"), OUR_KEY)
    patch(os, "access", lambda *_: False)
    assert_found(check("vpsd", environment, "key"), f"FAIL key CEREBRUM_API_KEY {KEYGEN}")


def test_systemd_and_another_llama_cpp(vps, tmp_path, check, patch):
    """Nobody connects to systemd's socket, since that could start the backend."""
    units = [tmp_path / "none", tmp_path / "catalog.toml"]
    patch(cerebrum_check, "SOCKET_UNITS", units)
    patch(llama_cpp, "__version__", "0.0.1")
    environment = given(tmp_path, CEREBRUM_VPS_PORT=f"{vps.port}")
    assert_found(check("vpsd", environment, "address"), "ok address catalog.toml")
    wanted = f"warn packages llama-cpp-python=={cerebrum_check.LLAMA_CPP} 0.0.1"
    assert_found(check("vpsd", environment, "packages"), wanted)


def test_the_limit_of_memory(tmp_path, monkeypatch, capsys):
    def memory(min_free_mb):
        monkeypatch.setenv("CEREBRUM_MIN_FREE_MB", min_free_mb)
        assert vpsd.main(["memory"]) == 0
        return str(capsys.readouterr().out).splitlines()

    monkeypatch.setattr(psutil, "virtual_memory", lambda: MEMORY)
    for name, value in given(tmp_path, CEREBRUM_API_KEY="").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "models/other.gguf").write_bytes(b"GGUX")  # is not counted
    beside = "# beside models: 662 MB; at most 3000 MB: 4000 without CEREBRUM_MIN_FREE_MB"
    tiny = "# tiny: 264 MB with its prompts (CEREBRUM_CACHE_MB)"
    assert memory("1000") == ["926", f"{tiny}, untuned", beside]

    def find_tuned(path, settings, _sha256):
        return TunedFile(path, settings, families.tuned_passport()), ""

    monkeypatch.setattr(encoding, "find_tuned", find_tuned)
    assert memory("1000") == ["926", tiny, beside]
    assert memory("4000")[0] == "662"  # never less than the process needs
    (tmp_path / "models/tiny.gguf").unlink()
    assert memory("1000") == ["3000", "# no model is here; the smallest is other", beside]


# ------------------------------------------------------------------------------ versions, arguments


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION == cerebrum_lsp.VERSION
    assert f"llama-cpp-python=={cerebrum_check.LLAMA_CPP}" in project["dependencies"]


def test_the_example_lists_every_variable():
    listed = set(re.findall(r"CEREBRUM_\w+", (ROOT / ".env.example").read_text()))
    # Two prefixes in check.py; the REPL's own.
    others = {"CEREBRUM_CM4", "CEREBRUM_VPS", "CEREBRUM_URL"}
    files = [*ROOT.glob("*.py"), *(ROOT / "cerebrum").rglob("*.py")]
    sources = "".join(file.read_text() for file in files)
    read = set(re.findall(r'"(CEREBRUM_\w+)"', sources))
    assert {"CEREBRUM_LOG_LEVEL"} <= read <= listed | others


@pytest.mark.parametrize(("name", "main"), [("cm4d", cm4d.main), ("vpsd", vpsd.main)])
def test_version_help_and_wrong_arguments(name, main, capsys):
    for argument, status, words in (
        ("--version", 0, [f"{name} {VERSION}\n"]),
        ("--help", 0, ["usage:", "--check", ".env", "models.toml", "exit status:", "  2  "]),
        ("--chekc", 2, [f"usage: {name}.py [-h] [--check] [--version]"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main([argument])
        said = "".join(capsys.readouterr())
        assert (ended.value.code, [word for word in words if word not in said]) == (status, [])


def test_a_python_without_the_packages():
    command = [sys.executable, "-S", f"{ROOT}/vpsd.py", "--check"]
    done = subprocess.run(command, **CAPTURED)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vpsd.py: expected a Python with llama-cpp-python and psutil")
