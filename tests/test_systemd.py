"""The units under a real systemd: a Debian in a container is booted, both daemons are installed in it by
the commands that the units' first lines give, and then started, asked, stopped and killed.

Slow (a minute or two) and for root only. The Debian is made once, in .run/debian, and is never written
to: it is booted under an overlay that is gone afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ROOT / ".run/debian"
# The VPS's Python packages come from Debian here, since the container has no network; llama.cpp itself
# comes from our .venv, which may be another Python's: it is reached by ctypes, not by Python's ABI.
PACKAGES = (
    "adduser curl libgomp1 python3 python3-diskcache python3-jinja2 python3-numpy python3-psutil "
    "python3-typing-extensions python3-venv systemd-sysv"
)
DEADLINE_S = 60.0
NEEDED = ("debootstrap", "systemd-nspawn", "nsenter")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="booting a container needs root"),
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="needs " + ", ".join(NEEDED)),
]


class Machine:
    """A booted container. `run` runs a shell command in it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.leader = str(until(lambda: children_of(process.pid), "systemd-nspawn starts init")[0])

    def run(self, command: str, check: bool = True) -> str:
        inside = ["nsenter", "--target", self.leader, "--all", "--wd=/", "/bin/bash", "-ec", "cd /\n" + command]
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        result = subprocess.run(
            inside, env={"PATH": path}, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def show(self, unit: str, key: str) -> str:
        return self.run(f"systemctl show --value --property={key} {unit}")

    def journal(self, unit: str) -> str:
        return self.run(f"journalctl --no-pager --output=cat --unit={unit}")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, what: str):
    """The first truthy value of the condition, which is asked until a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.05)
    return value


def make_debian() -> None:
    complete = DEBIAN / "complete"
    if complete.exists() and complete.read_text() == PACKAGES:
        return
    shutil.rmtree(DEBIAN, ignore_errors=True)
    DEBIAN.mkdir(parents=True)
    include = "--include=" + PACKAGES.replace(" ", ",")
    subprocess.run(
        ["debootstrap", "--variant=minbase", include, "trixie", DEBIAN], check=True, stdout=subprocess.DEVNULL
    )
    complete.write_text(PACKAGES)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    make_debian()
    models = os.environ.get("CEREBRUM_MODELS_DIR") or Path.home() / ".cache/cerebrum/models"
    llama = subprocess.run(
        [sys.executable, "-c", "import llama_cpp; print(llama_cpp.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--volatile=overlay"]
    command += [
        "--private-network",
        "--console=pipe",
        f"--machine=cerebrum-{os.getpid()}",
        f"--directory={DEBIAN}",
        f"--bind-ro={ROOT}:/src",
    ]
    command += [f"--bind-ro={models}:/models", f"--bind-ro={llama.stdout.strip()}:/llama_cpp"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        machine = Machine(process)
        until(lambda: "running" in machine.run("systemctl is-system-running", check=False), "the machine boots")
        yield machine
    finally:
        # Nothing is worth a clean shutdown: the overlay goes too. Everything in there dies with its init.
        for pid in children_of(process.pid) or [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait(DEADLINE_S)


def install_cm4(machine: Machine) -> None:
    machine.run("""
        adduser --quiet --system --group --no-create-home cerebrum
        install -d /opt/cerebrum-pi && cd /src
        cp cm4d.py cerebrum_*.py models.toml /opt/cerebrum-pi/
        cp systemd/cerebrum-cm4.service /etc/systemd/system/
        ./generate_api_key.sh --write /opt/cerebrum-pi/.env
        chown cerebrum: /opt/cerebrum-pi/.env
        systemctl enable --quiet --now cerebrum-cm4""")


def install_backend(machine: Machine) -> None:
    machine.run("""
        install -d /opt/cerebrum-backend && cd /opt/cerebrum-backend
        cp /src/vpsd.py /src/cerebrum_*.py /src/models.toml .
        python3 -m venv --without-pip --system-site-packages venv
        cp -r /llama_cpp venv/lib/python3*/site-packages/
        ln -s /models models
        cp /src/systemd/cerebrum-backend.service /etc/systemd/system/
        cp --preserve=all /opt/cerebrum-pi/.env .env
        echo CEREBRUM_MAX_CPU_PERCENT=100 >>.env  # whatever else this machine does
        systemctl enable --quiet --now cerebrum-backend""")


def health(machine: Machine) -> tuple[int, dict[str, object]]:
    body, status = machine.run("curl -s -w '\\n%{http_code}' http://127.0.0.1:7000/health").rsplit("\n", 1)
    return int(status), json.loads(body)


def kill_and_see_it_restart(machine: Machine, unit: str) -> None:
    before = machine.show(unit, "MainPID")
    machine.run(f"systemctl kill --signal=KILL {unit}")
    until(lambda: machine.show(unit, "MainPID") not in ("0", before), f"{unit} restarts")
    until(lambda: machine.show(unit, "ActiveState") == "active", f"{unit} is ready again")
    assert machine.show(unit, "NRestarts") == "1"


def stop(machine: Machine, unit: str) -> None:
    machine.run(f"systemctl stop {unit}")
    assert [machine.show(unit, key) for key in ("Result", "ExecMainCode", "ExecMainStatus")] == ["success", "1", "0"]


def test_the_units_are_well_formed_and_locked_down() -> None:
    for unit in ROOT.glob("systemd/*.service"):
        verdict = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=12", str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert verdict.returncode == 0, verdict.stdout.splitlines()[-1]


def test_the_pi_alone(machine: Machine) -> None:
    install_cm4(machine)  # --now: comes back when READY=1 has been sent
    assert machine.show("cerebrum-cm4", "ActiveState") == "active"
    status, body = health(machine)
    assert (status, body["vps_available"]) == (503, False)
    assert "listening on http://0.0.0.0:7000" in machine.run("cat /opt/cerebrum-pi/logs/cerebrum.log")
    kill_and_see_it_restart(machine, "cerebrum-cm4")
    assert health(machine)[0] == 503
    stop(machine, "cerebrum-cm4")
    assert "PermissionError" not in machine.journal("cerebrum-cm4")


def test_a_wrong_variable_is_not_tried_again(machine: Machine) -> None:
    machine.run("systemctl stop cerebrum-cm4; echo CEREBRUM_CM4_PORT=seven >>/opt/cerebrum-pi/.env")
    machine.run("systemctl start cerebrum-cm4", check=False)
    assert machine.show("cerebrum-cm4", "ActiveState") == "failed"
    assert "CEREBRUM_CM4_PORT" in machine.journal("cerebrum-cm4")
    machine.run("sed -i /CEREBRUM_CM4_PORT/d /opt/cerebrum-pi/.env")


def test_both_complete_code_under_lock(machine: Machine) -> None:
    machine.run("systemctl start cerebrum-cm4")
    install_backend(machine)
    until(lambda: health(machine)[0] == 200, "the Pi sees the VPS")
    said = machine.run("printf 'def fibonacci(n):\n    if n < 2:\n' | /src/cerebrum_repl.sh -n 16 -t 0 -")
    assert "return" in said
    kill_and_see_it_restart(machine, "cerebrum-backend")
    until(lambda: health(machine)[0] == 200, "the Pi sees the VPS again")
    assert machine.run("printf 'def fibonacci(n):\n    if n < 2:\n' | /src/cerebrum_repl.sh -n 16 -t 0 -") == said
    stop(machine, "cerebrum-backend")
    stop(machine, "cerebrum-cm4")
