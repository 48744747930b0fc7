"""The log, signals, and what systemd is told: how both daemons live under their supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from harness import (
    HEALTH,
    ROOT,
    Client,
    command_of,
    daemon,
    reload,
    settings,
    until,
    variables,
    warnings_in,
)
from scripted import Backend

import cm4d
import vpsd
from cerebrum import reload as reload_command
from cerebrum.pi.fleet import Fleet
from cerebrum.service import Service, notify, passed_sockets, set_up_logging
from cerebrum.settings import ConfigError, Environment
from cerebrum_common import log, request_id_var

# --------------------------------------------------------------------------------------------- logs


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    loggers = log, logging.getLogger("asyncio")
    before = [logger.handlers for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(logging.NOTSET)
    request_id_var.set("-")


def test_log_form(tmp_path, capsys, monkeypatch):
    path = tmp_path / "logs" / "cerebrum.log"
    monkeypatch.setattr(time, "time", lambda: 1_766_664_000.9)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours ahead; the log is in UTC
    time.tzset()
    try:
        set_up_logging("INFO", f"{path}")
        request_id_var.set("65652caa")
        log.info("POST %s", "/x")
        log.debug("not seen")
    finally:
        monkeypatch.undo()
        time.tzset()
    line = "2025-12-25 12:00:00 - INFO - [65652caa] POST /x\n"
    assert capsys.readouterr().out == path.read_text() == line


OUTSIDE = {
    "a\r\n2025-12-25 12:00:00 - INFO - [x] forged": r"a\r\n2025-12-25 12:00:00 - INFO - [x] forged",
    "\x1b[2Jgone\x07\0\x7f": r"\x1b[2Jgone\x07\x00\x7f",
    "/\u2028x\x85 \u202ecod": r"/\u2028x\x85 \u202ecod",
    "half \ud83d": r"half \ud83d",
    "größer 日本 😀": "größer 日本 😀",
}


@pytest.mark.parametrize("text", OUTSIDE)
def test_outside_text_stays_on_its_line(tmp_path, capsys, text):
    set_up_logging("INFO", f"{tmp_path}/log")
    log.info("%s", text)
    log.error("internal error", exc_info=ValueError(text))
    first, second, *rest = (tmp_path / "log").read_text().split("\n")
    assert capsys.readouterr().out.split("\n") == [first, second, *rest]
    assert first.endswith(f" - INFO - [-] {OUTSIDE[text]}")
    assert second.endswith(" - ERROR - [-] internal error")
    assert rest.pop() == ""
    assert "ValueError: " in rest[0]
    for line in rest:
        assert line.startswith("    ")
        assert line.isprintable()


def test_notify_nobody(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/none")
    notify("STOPPING=1")


def last_words(text: str) -> list[str]:
    return [line.rpartition(" ")[2] for line in text.splitlines()]


def logged(file: Path) -> list[str]:
    return last_words(file.read_text())


@pytest.mark.parametrize("full", [True, False], ids=["full", "removed"])
def test_a_log_file_is_made_again_after_it_is_removed(tmp_path, capsys, full):
    file = tmp_path / "cerebrum.log"
    if full:
        file.symlink_to("/dev/full")
    set_up_logging("INFO", f"{file}")
    log.info("one")
    log.info("two")
    file.unlink()
    log.info("three")
    said = re.findall("^CEREBRUM_LOG_FILE: .*", capsys.readouterr().out, re.M)
    reported = f"cannot write {file}: No space left on device; going on without it"
    assert said == [f"CEREBRUM_LOG_FILE: {reported}"] * full  # once, not for each line
    assert logged(file) == ["three"]
    set_up_logging("INFO", f"{file}/x.log")
    log.info("four")
    assert "x.log: Not a directory; going on without it" in capsys.readouterr().out


def test_the_log_is_bounded(tmp_path, patch):
    patch("cerebrum.service.MAX_LOG_BYTES", 1000)
    set_up_logging("INFO", f"{tmp_path}/log")
    for number in range(200):
        log.info("line %d", number)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["log", "log.1", "log.2", "log.3"]
    assert max(sizes.values()) <= 1000


def test_requests_are_not_written_twice(tmp_path, capsys):
    set_up_logging("INFO", f"{tmp_path}/log")
    file = tmp_path / "log"
    log.info("request", extra={"is_request": True})
    log.info("else")
    assert last_words(capsys.readouterr().out) == ["else"]
    assert logged(file) == ["request", "else"]
    file.unlink()
    file.symlink_to("/dev/full")
    for number in range(3):  # while the file cannot be written, the journal has the requests
        log.info("%d", number, extra={"is_request": True})
    assert last_words(capsys.readouterr().out)[1:] == ["1", "2"]


# ---------------------------------------------------------------------------------- a daemon's life


@pytest.fixture
def systemd(tmp_path, monkeypatch) -> Iterator[Callable[[], list[str]]]:
    """What a daemon has told its supervisor."""
    path, said = tmp_path / "notify", []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.bind(f"{path}")
        hearing.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{path}")

        def heard():
            with contextlib.suppress(BlockingIOError):
                while True:
                    said.append(hearing.recv(1000).decode())
            return said

        yield heard


async def test_the_watchdog_is_fed_only_while_nothing_is_stuck(systemd, monkeypatch, caplog):
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    asked = []

    def stuck(now):
        asked.append(now)
        return "a worker hangs" if len(asked) > 3 else ""

    ended = asyncio.create_task(until(lambda: len(asked) >= 10))
    assert await Service(lambda: None, stuck).run(ended)
    assert systemd() == ["READY=1", *["WATCHDOG=1"] * 3, "STOPPING=1"]
    assert warnings_in(caplog) == ["a worker hangs", "a task of the daemon has ended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_reloads_and_the_end(systemd, caplog, monkeypatch, tmp_path, number):
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}")
    caplog.set_level(logging.INFO)
    wrong = ConfigError("CEREBRUM_X: expected a number, got 'x'")
    faults = [None, wrong, ValueError("a fault of ours"), None]
    outcomes = []

    def reload():
        if fault := faults.pop(0):
            raise fault

    async def scenario():
        running = asyncio.create_task(Service(reload, lambda now: "").run())
        while faults:
            left = len(faults)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda left=left: len(faults) < left)
            outcomes.append((tmp_path / "reload").read_text().partition(" ")[2])
        os.kill(os.getpid(), number)
        await running
        assert signal.getsignal(number) == signal.SIG_DFL  # the next one ends the process

    before = signal.getsignal(number)
    try:
        asyncio.run(scenario())
    finally:
        signal.signal(number, before)
    stays = "not reloaded, the old settings stay but for the keys that can be read"
    expected = ["reloaded", f"{stays}: {wrong}", stays, "reloaded"]
    statuses = [re.sub("^STATUS=[^ ]+ ", "", line) for line in systemd()]
    assert statuses == ["READY=1", *expected, "STOPPING=1"]
    assert [record.getMessage() for record in caplog.records] == [*expected, "stopping"]
    assert outcomes == expected


async def test_a_reason_that_has_no_encoding_is_an_answer_too(tmp_path, monkeypatch):
    def reload():
        raise ConfigError("/\udc80")

    set_up_logging("CRITICAL", "")  # pytest-xdist cannot send such a text
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}")
    Service(reload, lambda now: "")._reload_settings()
    assert (tmp_path / "reload").read_text().endswith(": /\\udc80")


async def test_a_daemon_whose_probing_fails_ends_with_an_error(patch, tmp_path) -> None:
    async def fail(*_):
        raise OSError(5, "of /proc")

    patch(Fleet, "probe_forever", fail)
    environ = Environment(settings(tmp_path))
    assert await cm4d.serve(environ, cm4d.load_config(environ)) == 1


@pytest.mark.parametrize(("daemon", "has"), [(cm4d, Fleet), (vpsd, vpsd.Engine)])
async def test_a_daemon_tells_its_watchdog_what_hangs(
    monkeypatch, caplog, tmp_path, daemon, has
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setattr(has, "stuck", lambda *_: "it hangs")
    environ = Environment(settings(tmp_path))
    serving = asyncio.create_task(daemon.serve(environ, daemon.load_config(environ)))
    await until(lambda: "it hangs" in caplog.text)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await serving == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_units_are_well_formed_and_locked_down():
    def analyze(*arguments):
        command = ["systemd-analyze", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    if int(analyze("--version").stdout.split()[1]) < 254:
        pytest.skip("an older systemd lacks some settings and counts otherwise")
    units = [*(ROOT / "systemd").glob("*.service"), *(ROOT / "systemd").glob("*.socket")]
    verified = analyze("verify", "--man=no", *units)
    assert [line for line in verified.stderr.splitlines() if "is not executable" not in line] == []
    # Points of systemd-analyze's 100.
    for unit, points in {"cerebrum-backend": 4, "cerebrum-cm4": 11}.items():
        file = ROOT / f"systemd/{unit}.service"
        rated = analyze("security", "--offline=true", f"--threshold={points}", file)
        assert rated.returncode == 0, unit


# ------------------------------------------------------------------------------------- both daemons


@pytest.mark.parametrize(
    ("name", "key", "later"), [("cm4d", "CM4_API_KEY", "CM4_PORT"), ("vpsd", "API_KEY", "N_CTX")]
)
async def test_a_reload_takes_keys_and_level_if_they_are_right(tmp_path, name, key, later):
    variable = f"CEREBRUM_{key}"
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / variable).write_text("one\n")

    async def statuses():
        stats = partial(Client(port=process.port).get, "/v1/stats")
        return [(await stats(X_API_Key=key)).status for key in ("one", "two", "not-used")]

    async def reloaded(keys, said=""):
        (credentials / variable).write_text(keys)
        stays = "not reloaded, the old settings stay but for the keys that can be read: "
        expected = (1, f"{stays}{said}\n") if said else (0, "")
        assert await asyncio.to_thread(reload, process.process, tmp_path) == expected
        return await statuses()

    folders = f"CREDENTIALS_DIRECTORY={credentials} RUNTIME_DIRECTORY={tmp_path}"
    given = variables(f"{folders} CEREBRUM_API_KEY=not-used")
    with daemon(name, tmp_path, **given) as process:
        assert await statuses() == [200, 401, 401]
        assert await reloaded("two,one\n") == [200, 200, 401]
        wrong = f"{variable}: expected printable ASCII without spaces"
        assert await reloaded("th ree\n", wrong) == [200, 200, 401]
        client, page = Client(port=process.port), {"Origin": "https://page", "X_API_Key": "two"}
        assert (await client.get("/v1/stats", **page)).status == 403
        changes = "LOG_LEVEL=DEBUG N_CTX=2048 CM4_PORT=1 ALLOWED_ORIGINS=https://page"
        for setting, value in variables(changes).items():
            (credentials / f"CEREBRUM_{setting}").write_text(value)
        assert await reloaded("two") == [401, 200, 401]
        assert (await client.get("/v1/stats", **page)).status == 200
        assert (await client.get("/health")).status in (200, 503)
        await asyncio.to_thread(process.wait_for_line, "GET /health")
        changed = f"WARNING - [-] CEREBRUM_{later} changed: restart the daemon to use it\n"
        assert changed in process.stdout()


RELOADER = """
import signal, sys, time
signal.signal(signal.SIGHUP, lambda *_: {})
print(flush=True)
while True:
    time.sleep(1)
"""
RELOADS = {
    "ends": "sys.exit(1)",
    "hangs": "0",
    "answers an older one": "open('reload', 'w').write('7 reloaded')",
}


@pytest.mark.parametrize("fault", RELOADS)
def test_a_reload_without_an_answer_fails(tmp_path, monkeypatch, fault):
    command = [sys.executable, "-c", RELOADER.format(RELOADS[fault])]
    monkeypatch.setattr("cerebrum.reload.SECONDS", 120.0 if fault == "ends" else 0.2)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        monkeypatch.setenv("MAINPID", f"{process.pid}")
        said = reload_command.main()
        process.kill()
    late = "not reloaded: expected an answer within 0.2 s, got none; does the daemon hang?"
    ended = "not reloaded: the daemon has ended"
    assert said == (ended if fault == "ends" else late)


def test_reloads_at_the_same_time_all_get_an_answer(tmp_path):
    """Beside a flood of signals from others, and with an answer that began after they were asked
    for.
    """
    with (
        daemon("cm4d", tmp_path, RUNTIME_DIRECTORY=f"{tmp_path}") as pi,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(reload, pi.process, tmp_path) for _ in range(8)]
        for _ in range(20):
            pi.process.send_signal(signal.SIGHUP)
        assert {answer.result() for answer in asked} == {(0, "")}


STARTER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_daemon_takes_the_socket_of_its_supervisor(tmp_path):
    """As systemd passes it: open before the daemon runs, and on while it is restarted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        early = socket.create_connection(("127.0.0.1", port))  # nobody serves it yet
        early.sendall(HEALTH)
        number = listening.fileno()
        environment = settings(tmp_path, LISTEN_FDS="1", CEREBRUM_VPS_HOST="192.0.2.1")
        started = {"env": environment, "stdout": subprocess.PIPE, "pass_fds": [number]}
        command = [sys.executable, "-c", STARTER, f"{number}", *command_of("vpsd")]
        for _ in range(2):
            with subprocess.Popen(command, **started) as process:
                line = f"listening on http://127.0.0.1:{port}\n"
                assert line.encode() in process.stdout.readline()
                assert early.recv(15) == b"HTTP/1.1 200 OK"
                early.close()
                process.terminate()
            # Refused if the socket were closed.
            early = socket.create_connection(("127.0.0.1", port))
            early.sendall(HEALTH)
        early.close()
    assert passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []  # of another process


@pytest.mark.parametrize("wanted", ["0", "1"])
async def test_prompts_are_logged_only_if_wanted(tmp_path, wanted):
    async with Backend() as backend:
        given = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}", "CEREBRUM_CM4_API_KEY": ""}
        with daemon("cm4d", tmp_path, **given, CEREBRUM_LOG_PROMPTS=wanted) as process:
            asked = {"prompt": "def my_secret():\n", "suffix": "zwölf", "language": "python"}
            client = Client(port=process.port)
            await client.ask("POST", "/v1/complete/stream", asked, X_Request_ID="the-id")
            await asyncio.to_thread(process.wait_for_line, "the-id.* 200 ")
            prompts = re.findall(r"\[the-id\] (prompt: .*)", process.stdout())
            shown = r'prompt: {"prompt": "def my_secret():\n", "suffix": "zwölf"}'
            assert prompts == ([shown] if wanted == "1" else [])
            assert ("my_secret" in process.stdout()) == (wanted == "1")
