"""The README's deployment, to the letter, on a booted Debian, and the units under a real systemd.

One container plays the VPS, the Pi and Tailscale: the README's own command blocks are run in it, in their order. The
tests then stop, kill and misconfigure the daemons. `ssh` and `tailscale` are stand-ins of two lines each.

Slow (minutes) and for root only. The Debian with llama.cpp is made once, in .run/debian; the container boots under an
overlay, which is gone afterwards. Only making it needs a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from harness import MODELS, ROOT, wait_until

DEBIAN = ROOT / ".run/debian"
PACKAGES = "ca-certificates curl iproute2 python3 systemd-sysv"  # what the README takes for granted
MODEL = "qwen_1_5b"  # the one that the README fetches
DEADLINE_S = 300.0  # a busy machine loads a model in a minute
until = partial(wait_until, seconds=DEADLINE_S)
BUILD_SECONDS = 1800.0  # llama.cpp takes 4 minutes on two idle cores
NEEDED = ("debootstrap", "systemd-nspawn", "nsenter")
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="booting a container needs root"),
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="needs " + ", ".join(NEEDED)),
]


def readme(step: str) -> list[str]:
    """The commands of a step of the README: its ```sh blocks, by a word of its heading."""
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(rf"^### \d+\. [^\n]*{step}.*?(?=^##)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


class Machine:
    """A booted container. `run` runs a shell command in it, as root in its home."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.leader = str(until(lambda: inits_of(process.pid), "systemd-nspawn starts init")[0])
        self.enter = ["nsenter", "--target", self.leader, "--all", "--wd=/root", "/bin/bash"]

    def run(self, command: str, check: bool = True, stdin: str = "") -> str:
        environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        inside = [*self.enter, "-ec", "cd /root\n" + command]
        result = subprocess.run(
            inside, env=environ, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def follow(self, step: str, stdin: str = "") -> list[str]:
        """Run the blocks of a step of the README, where it says to run them; what each printed."""
        return [self.run("cd cerebrum\n" + block, stdin=stdin) for block in readme(step)]

    def show(self, unit: str, key: str) -> str:
        return self.run(f"systemctl show --value --property={key} {unit}")

    def journal(self, unit: str) -> str:
        return self.run(f"journalctl --no-pager --output=cat --unit={unit}")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def inits_of(pid: int) -> list[int]:
    """The children that run systemd. Another one only prepares the container, and ends soon."""
    return [child for child in children_of(pid) if command_name(child) == "systemd"]


def command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


def make_debian() -> None:
    """The root file system after the README's second step, the only one that needs a network."""
    (install,) = readme("Install llama.cpp")
    recipe = PACKAGES + "\n" + install
    complete = DEBIAN / "complete"
    if complete.exists() and complete.read_text() == recipe:
        return
    shutil.rmtree(DEBIAN, ignore_errors=True)
    DEBIAN.mkdir(parents=True)
    include = "--include=" + PACKAGES.replace(" ", ",")
    run = ["debootstrap", "--variant=minbase", include, "trixie", str(DEBIAN)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    run = [*NSPAWN, f"--directory={DEBIAN}", "--bind-ro=/etc/ssl/certs", "--setenv=DEBIAN_FRONTEND=noninteractive"]
    run += [f"--setenv={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
    for wheel in Path.home().glob(".cache/pip/wheels/**/llama_cpp_python-*-none-*.whl"):  # any Python's
        run += [f"--bind-ro={wheel.parent}:/wheels", "--setenv=PIP_FIND_LINKS=/wheels"]
        break
    subprocess.run([*run, "/bin/bash", "-ec", install], check=True, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS)
    complete.write_text(recipe)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    make_debian()
    subprocess.run(
        [sys.executable, ROOT / "vpsd.py", "fetch", "--no-tune", MODEL], check=True, stdout=subprocess.DEVNULL
    )
    command = [*NSPAWN, "--boot", "--volatile=overlay", "--private-network", f"--machine=cerebrum-{os.getpid()}"]
    command += [f"--directory={DEBIAN}", f"--overlay={MODELS}::/opt/cerebrum-backend/models"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        machine = Machine(process)
        until(lambda: "running" in machine.run("systemctl is-system-running", check=False), "the machine boots")
        yield machine
    finally:
        # The overlay goes too, so nothing needs a clean shutdown. Everything in there dies with its init.
        for pid in children_of(process.pid) or [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def cerebrum(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The machine after all steps of the README."""
    tools = tmp_path_factory.mktemp("tools")
    enter = " ".join(machine.enter)
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {enter} -c "cd /root; $2"\n')
    (tools / "ssh").chmod(0o755)
    (copy,) = readme("Copy the files")
    environ = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(["/bin/bash", "-ec", copy], cwd=ROOT, env=environ, check=True, timeout=DEADLINE_S)

    machine.run("""
        ip address add 100.64.0.1/32 dev lo
        printf '#!/bin/sh\\necho 100.64.0.1\\n' >/usr/bin/tailscale
        chmod +x /usr/bin/tailscale
        echo CEREBRUM_MAX_CPU_PERCENT=100 >/opt/cerebrum-backend/.env  # whatever else this machine does""")
    machine.follow("Install the backend")
    machine.follow("Configure and start the VPS")
    machine.follow("Install the Pi")
    machine.follow("Carry the key", stdin=machine.run("grep CEREBRUM_API_KEY /opt/cerebrum-backend/.env"))
    machine.follow("Start the Pi")
    until(lambda: health(machine)[0] == 200, "the Pi sees the VPS")
    return machine


def health(machine: Machine) -> tuple[int, dict[str, object]]:
    body, status = machine.run("curl -s -w '\\n%{http_code}' http://127.0.0.1:7000/health").rsplit("\n", 1)
    return int(status), json.loads(body)


def kill_and_see_it_restart(machine: Machine, unit: str) -> None:
    before = machine.show(unit, "MainPID"), int(machine.show(unit, "NRestarts"))
    machine.run(f"systemctl kill --signal=KILL {unit}")
    until(lambda: machine.show(unit, "MainPID") not in ("0", before[0]), f"{unit} restarts")
    until(lambda: machine.show(unit, "ActiveState") == "active", f"{unit} is ready again")
    assert int(machine.show(unit, "NRestarts")) == before[1] + 1


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


def test_the_check_of_the_readme(cerebrum: Machine) -> None:
    (said,) = cerebrum.follow("Check both")
    assert json.JSONDecoder().raw_decode(said)[0]["vps_available"] is True
    *tokens, done = map(json.loads, re.findall(r"data: (\{.*\})", said))
    assert tokens
    assert all("token" in event for event in tokens)
    assert (done["done"], done["language"], done["model"]) == (True, "rust", MODEL)


def test_the_repl_of_the_readme(cerebrum: Machine) -> None:
    (command,) = readme("Use it")
    cerebrum.run("echo 127.0.0.1 pi.local >>/etc/hosts; hostname pi; systemctl restart cerebrum-cm4")
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS")
    said = cerebrum.run("cd cerebrum\n" + command, stdin=":temp 0\n:tokens 16\ndef fibonacci(n):\n:model\n")
    assert "return" in said
    assert re.search(rf"^  {MODEL} +loaded, \d+ MB +1\.5B +python javascript typescript rust c cpp go$", said, re.M)
    assert cerebrum.run("curl -s http://pi.local:7000/").startswith("<!doctype html>")


def test_every_language_has_a_model(cerebrum: Machine) -> None:
    models = json.loads(cerebrum.run("curl -s http://127.0.0.1:7000/v1/models"))["models"]
    served = {language for model in models if model["available"] for language in model["languages"]}
    assert served == {"python", "javascript", "typescript", "rust", "c", "cpp", "go"}


def test_the_key_is_for_the_daemon_alone(cerebrum: Machine) -> None:
    modes = cerebrum.run("stat -c '%a %U' /opt/cerebrum-pi/.env /opt/cerebrum-backend/.env")
    assert modes == "600 cerebrum\n600 cerebrum"


def test_both_survive_a_kill(cerebrum: Machine) -> None:
    code = r"printf 'def fibonacci(n):\n    if n < 2:\n' | cerebrum/cerebrum_repl.sh -n 16 -t 0 -"
    said = cerebrum.run(code)
    assert "return" in said
    for unit in ("cerebrum-backend", "cerebrum-cm4"):
        kill_and_see_it_restart(cerebrum, unit)
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS again")
    assert cerebrum.run(code) == said


def test_the_upgrade_of_the_readme(cerebrum: Machine) -> None:
    pids = [cerebrum.show(unit, "MainPID") for unit in ("cerebrum-backend", "cerebrum-cm4")]
    cerebrum.follow("Install the backend")
    cerebrum.follow("Install the Pi")
    cerebrum.follow("Upgrade")
    assert not set(pids) & {cerebrum.show(unit, "MainPID") for unit in ("cerebrum-backend", "cerebrum-cm4")}
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS after the upgrade")


def test_the_pi_alone(cerebrum: Machine) -> None:
    stop(cerebrum, "cerebrum-backend")
    cerebrum.run("systemctl restart cerebrum-cm4")  # comes back when READY=1 has been sent
    status, body = health(cerebrum)
    assert (status, body["vps_available"]) == (503, False)
    assert "listening on http://0.0.0.0:7000" in cerebrum.run("cat /opt/cerebrum-pi/logs/cerebrum.log")
    stop(cerebrum, "cerebrum-cm4")
    assert "PermissionError" not in cerebrum.journal("cerebrum-cm4")


UNITS = [("cerebrum-cm4", "/opt/cerebrum-pi/.env", "CM4"), ("cerebrum-backend", "/opt/cerebrum-backend/.env", "VPS")]


@pytest.mark.parametrize(("unit", "env", "name"), UNITS)
def test_a_wrong_variable_is_not_tried_again(cerebrum: Machine, unit: str, env: str, name: str) -> None:
    cerebrum.run(f"systemctl stop {unit}; cp -p {env} {env}.good; echo CEREBRUM_{name}_PORT=seven >>{env}")
    cerebrum.run(f"systemctl start {unit}", check=False)
    assert (cerebrum.show(unit, "ActiveState"), cerebrum.show(unit, "ExecMainStatus")) == ("failed", "2")
    assert f"CEREBRUM_{name}_PORT" in cerebrum.journal(unit)
    cerebrum.run(f"mv {env}.good {env}")


@pytest.mark.parametrize(("unit", "env", "name"), UNITS)
def test_an_address_that_is_not_up_yet_is_tried_again(cerebrum: Machine, unit: str, env: str, name: str) -> None:
    """As at boot, before Tailscale or the LAN is up."""
    cerebrum.run(f"systemctl stop {unit}; cp -p {env} {env}.good; echo CEREBRUM_{name}_HOST=100.64.0.2 >>{env}")
    cerebrum.run(f"systemctl start --no-block {unit}")
    until(lambda: int(cerebrum.show(unit, "NRestarts")) >= 2, f"{unit} is tried again and again")
    waiting = ["auto-restart", "1"]
    until(lambda: [cerebrum.show(unit, key) for key in ("SubState", "ExecMainStatus")] == waiting, "it exits with 1")
    cerebrum.run("ip address add 100.64.0.2/32 dev lo")
    until(lambda: cerebrum.show(unit, "ActiveState") == "active", f"{unit} is up with its address")
    cerebrum.run(f"ip address delete 100.64.0.2/32 dev lo; mv {env}.good {env}; systemctl restart {unit}")
