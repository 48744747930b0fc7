"""docs/deploy.md to the letter, on a booted Debian, and the units under a real systemd.

One container plays the VPS, the Pi and Tailscale: the page's own command blocks are run in it, in their order. The
tests then stop, kill, hang, misconfigure, upgrade and remove the daemons. Another container has an older installation.
`ssh` and `tailscale` are stand-ins of two lines each.

Slow (minutes) and for root only. The Debian with llama.cpp's wheel is made once, in .run/debian; a container boots
under an overlay, which is gone afterwards. Only making it needs a network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from harness import MODELS, ROOT, wait_until

DEBIAN = ROOT / ".run/debian"
# What the page takes for granted, and what its first steps install: the container has no network.
PACKAGES = "ca-certificates cmake curl g++ iproute2 make python3 python3-venv systemd-sysv"
MODEL = "qwen_1_5b"  # the one that the page fetches
DEADLINE_S = 300.0  # a busy machine loads a model in a minute
until = partial(wait_until, seconds=DEADLINE_S)
BUILD_SECONDS = 1800.0  # llama.cpp takes 4 minutes on two idle cores
NEEDED = ("debootstrap", "systemd-nspawn", "nsenter")
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe")
# What IPAddressDeny= needs: BPF, and cgroups of version 2 even on a host that has both.
BPF = ("--capability=CAP_BPF", "--system-call-filter=bpf")
UNIFIED = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
DAEMONS = ("cerebrum-backend", "cerebrum-cm4")
BACKEND = "http://100.64.0.1:9000"
KEY = "/etc/credstore/CEREBRUM_API_KEY"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="booting a container needs root"),
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="needs " + ", ".join(NEEDED)),
]


def blocks(step: str) -> list[str]:
    """The commands of a step of docs/deploy.md: its ```sh blocks, by a word of its heading."""
    text = (ROOT / "docs/deploy.md").read_text()
    (section,) = re.findall(rf"^###? [^\n]*{step}.*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


class Machine:
    """A booted container. `run` runs a shell command in it, as root in its home."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.leader = str(until(lambda: inits_of(process.pid), "systemd-nspawn starts init")[0])
        self.enter = ["nsenter", "--target", self.leader, "--all", "--wd=/root", "/bin/bash"]

    def run(self, command: str, check: bool = True, stdin: str = "") -> str:
        environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        inside = [*self.enter, "-ec", "cd /root\n" + command]
        result = subprocess.run(
            inside, env=environ, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def follow(self, step: str, stdin: str = "") -> list[str]:
        """Run the blocks of a step where the page says to run them; what each printed."""
        return [self.run("cd cerebrum\n" + block, stdin=stdin) for block in blocks(step)]

    def show(self, unit: str, key: str) -> str:
        return self.run(f"systemctl show --value --property={key} {unit}")

    def is_in(self, unit: str, **expected: str) -> bool:
        """Whether the unit has these properties, read at one time."""
        names = ",".join(expected)
        return set(self.run(f"systemctl show --property={names} {unit}").splitlines()) == {
            f"{name}={value}" for name, value in expected.items()
        }

    def journal(self, unit: str) -> str:
        return self.run(f"journalctl --no-pager --output=cat --unit={unit}")

    def status(self, url: str, *options: str) -> str:
        """The status of a response, or 000 and curl's exit status."""
        return self.run(
            f"curl -s -o /dev/null -w '%{{http_code}}' {' '.join(options)} {url} || echo \" $?\"", check=False
        )


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
    """A Debian that was never booted, and in /wheels what pip needs. Only this needs a network."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements = tomllib.load(file)["project"]["dependencies"]
    recipe = "\n".join([PACKAGES, *requirements])
    complete = DEBIAN / "complete"
    if complete.exists() and complete.read_text() == recipe:
        return
    shutil.rmtree(DEBIAN, ignore_errors=True)
    DEBIAN.mkdir(parents=True)
    include = "--include=" + PACKAGES.replace(" ", ",")
    run = ["debootstrap", "--variant=minbase", include, "trixie", str(DEBIAN)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    run = [*NSPAWN, f"--directory={DEBIAN}", "--bind-ro=/etc/ssl/certs"]
    run += [f"--setenv={name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
    for wheel in Path.home().glob(".cache/pip/wheels/**/llama_cpp_python-*-none-*.whl"):  # any Python's
        run += [f"--bind-ro={wheel.parent}:/built", "--setenv=PIP_FIND_LINKS=/built"]
        break
    build = """
        python3 -m venv /tmp/venv
        /tmp/venv/bin/pip wheel --quiet --wheel-dir=/wheels "$@"
        rm -r /tmp/venv"""
    build_in = [*run, "/bin/bash", "-ec", build, "bash", *requirements]
    subprocess.run(build_in, check=True, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS)
    (DEBIAN / "opt/cerebrum-backend/models").mkdir(parents=True)  # for the overlay
    complete.write_text(recipe)


@contextlib.contextmanager
def booted(name: str) -> Iterator[Machine]:
    make_debian()
    subprocess.run(
        [sys.executable, ROOT / "vpsd.py", "fetch", "--no-tune", MODEL], check=True, stdout=subprocess.DEVNULL
    )
    command = [*NSPAWN, *BPF, "--boot", "--volatile=overlay", "--private-network", f"--machine={name}-{os.getpid()}"]
    command += [f"--directory={DEBIAN}", f"--overlay={MODELS}::/opt/cerebrum-backend/models"]
    environ = {**os.environ, **UNIFIED}
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        machine = Machine(process)
        until(lambda: "running" in machine.run("systemctl is-system-running", check=False), "the machine boots")
        machine.run("""
            ip address add 100.64.0.1/32 dev lo
            printf '#!/bin/sh\\necho 100.64.0.1\\n' >/usr/bin/tailscale
            chmod +x /usr/bin/tailscale""")
        yield machine
    finally:
        # The overlay goes too, so nothing needs a clean shutdown. Everything in there dies with its init.
        for pid in children_of(process.pid) or [process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def cerebrum(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine after all steps of the page."""
    with booted("cerebrum") as machine:
        copy_to(machine, tmp_path_factory.mktemp("tools"))
        machine.follow("Install the backend")
        machine.run("echo CEREBRUM_MAX_CPU_PERCENT=100 >>/opt/cerebrum-backend/.env")  # whatever else this machine does
        machine.follow("Fetch a model")
        machine.follow("Install the Pi")
        machine.run(f"mv {KEY} {KEY}.vps")
        machine.follow("Carry the key", stdin=machine.run(f"cat {KEY}.vps"))
        machine.run(f"cmp {KEY} {KEY}.vps; rm {KEY}.vps")
        machine.follow("Start the Pi")
        until(lambda: health(machine)[0] == 200, "the Pi sees the VPS")
        yield machine


def copy_to(machine: Machine, tools: Path) -> None:
    """The first step, with an ssh that leads into the machine."""
    enter = " ".join(machine.enter)
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {enter} -c "cd /root; $2"\n')
    (tools / "ssh").chmod(0o755)
    (copy,) = blocks("Copy the files")
    environ = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(["/bin/bash", "-ec", copy], cwd=ROOT, env=environ, check=True, timeout=DEADLINE_S)


def health(machine: Machine) -> tuple[int, dict[str, object]]:
    body, status = machine.run("curl -s -w '\\n%{http_code}' http://127.0.0.1:7000/health").rsplit("\n", 1)
    return int(status), json.loads(body)


def kill_and_see_it_restart(machine: Machine, unit: str) -> None:
    before = machine.show(unit, "MainPID"), int(machine.show(unit, "NRestarts"))
    machine.run(f"systemctl kill --signal=KILL {unit}.service")
    until(lambda: machine.show(unit, "MainPID") not in ("0", before[0]), f"{unit} restarts")
    until(lambda: machine.show(unit, "ActiveState") == "active", f"{unit} is ready again")
    assert int(machine.show(unit, "NRestarts")) == before[1] + 1, machine.journal(unit)[-3000:]


def stop(machine: Machine, unit: str) -> None:
    sockets = f"{unit}.socket" if unit == "cerebrum-backend" else ""
    machine.run(f"systemctl stop {sockets} {unit}.service")
    assert machine.is_in(unit, Result="success", ExecMainCode="1", ExecMainStatus="0")


def pids(machine: Machine) -> list[str]:
    return [machine.show(unit, "MainPID") for unit in DAEMONS]


# ---------------------------------------------------------------------------------------- the page's steps


def test_the_units_are_well_formed_and_locked_down(cerebrum: Machine) -> None:
    units = " ".join(f"/etc/systemd/system/{path.name}" for path in sorted(ROOT.glob("systemd/cerebrum-*.*")))
    assert units.count("cerebrum-") == 3
    assert cerebrum.run(f"systemd-analyze verify {units} 2>&1") == ""
    for unit in DAEMONS:
        cerebrum.run(f"systemd-analyze security --threshold=11 {unit}.service")


def test_the_check(cerebrum: Machine) -> None:
    on_the_vps, on_the_pi, said = cerebrum.follow("Check both")
    for checked in (on_the_vps, on_the_pi):
        assert checked.startswith("ok ")
        assert "FAIL" not in checked
    *tokens, done = map(json.loads, re.findall(r"data: (\{.*\})", said))
    assert tokens
    assert all("token" in event for event in tokens)
    assert (done["done"], done["language"], done["model"]) == (True, "rust", MODEL)


def test_the_repl(cerebrum: Machine) -> None:
    (command,) = blocks("Use it")
    cerebrum.run("echo 127.0.0.1 pi.local >>/etc/hosts; hostname pi; systemctl restart cerebrum-cm4")
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS")
    said = cerebrum.run("cd cerebrum\n" + command, stdin=":temp 0\n:tokens 16\ndef fibonacci(n):\n:model\n")
    assert "return" in said
    assert re.search(rf"^  {MODEL} +loaded, \d+ MB +1\.5B +python javascript typescript rust c cpp go$", said, re.M)
    assert cerebrum.run("curl -s http://pi.local:7000/").startswith("<!doctype html>")


def test_what_the_installer_decided(cerebrum: Machine) -> None:
    assert cerebrum.show("cerebrum-backend.socket", "Listen") == "100.64.0.1:9000 (Stream)"
    assert 2 << 30 < int(cerebrum.show("cerebrum-backend", "MemoryMax")) < 8 << 30  # two small models
    units = "cerebrum-backend.service cerebrum-backend.socket cerebrum-cm4.service"
    assert cerebrum.run(f"systemctl is-enabled {units}").split() == ["enabled"] * 3


# ---------------------------------------------------------------------------------------------- secrets


def test_the_key_is_for_the_daemons_alone(cerebrum: Machine) -> None:
    modes = cerebrum.run(f"stat -c '%a %U' {KEY} /opt/cerebrum-pi/.env /opt/cerebrum-backend/.env")
    assert modes == "600 root\n600 cerebrum\n600 cerebrum"
    everywhere = "/proc/[0-9]*/cmdline /proc/[0-9]*/environ /opt/cerebrum-pi/logs/* /etc/systemd/system/cerebrum*"
    assert cerebrum.run(f"grep -raFlf {KEY} {everywhere} || (($? == 1))") == ""
    assert cerebrum.run(f"journalctl --no-pager | grep -cFf {KEY}", check=False) == "0"
    assert cerebrum.run(f"cat {KEY} {KEY}; true").count("\n") == 1  # it was found nowhere, but is not empty


def test_the_log_is_for_adm(cerebrum: Machine) -> None:
    modes = cerebrum.run("stat -c '%a %U %G' /opt/cerebrum-pi/logs /opt/cerebrum-pi/logs/cerebrum.log")
    assert modes == "2750 cerebrum adm\n640 cerebrum adm"
    as_somebody = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
    assert "Permission denied" in cerebrum.run(
        f"{as_somebody} cat /opt/cerebrum-pi/logs/cerebrum.log 2>&1", check=False
    )
    of_adm = "setpriv --reuid=nobody --regid=nogroup --groups=adm"
    assert "listening on http://0.0.0.0:7000" in cerebrum.run(f"{of_adm} cat /opt/cerebrum-pi/logs/cerebrum.log")


def test_the_backend_has_no_network(cerebrum: Machine) -> None:
    interfaces = cerebrum.run(f"cat /proc/{cerebrum.show('cerebrum-backend', 'MainPID')}/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_strangers_do_not_reach_the_backend(cerebrum: Machine) -> None:
    cerebrum.run("ip address add 203.0.113.7/32 dev lo")
    assert cerebrum.status(f"{BACKEND}/health", "--interface 100.64.0.1") == "200"
    assert cerebrum.status(f"{BACKEND}/health", "--interface 203.0.113.7 --max-time 2") == "000 28"
    cerebrum.run("ip address delete 203.0.113.7/32 dev lo")


# --------------------------------------------------------------------------------------- crashes and restarts


def test_both_survive_a_kill(cerebrum: Machine) -> None:
    code = r"printf 'def fibonacci(n):\n    if n < 2:\n' | cerebrum/cerebrum_repl.sh -n 16 -t 0 -"
    said = cerebrum.run(code)
    assert "return" in said
    for unit in DAEMONS:
        kill_and_see_it_restart(cerebrum, unit)
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS again")
    assert cerebrum.run(code) == said


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_daemon_that_hangs_is_restarted(cerebrum: Machine, unit: str) -> None:
    drop_in = f"/run/systemd/system/{unit}.service.d/watchdog.conf"
    cerebrum.run(f"mkdir -p {os.path.dirname(drop_in)}; printf '[Service]\\nWatchdogSec=2\\n' >{drop_in}")
    cerebrum.run(
        f"systemctl daemon-reload; systemctl restart {unit}.service; systemctl kill --signal=STOP {unit}.service"
    )
    until(lambda: cerebrum.is_in(unit, NRestarts="1", ActiveState="active"), f"{unit} restarts")
    assert f"{unit}.service: Failed with result 'watchdog'." in cerebrum.journal(unit)
    cerebrum.run(f"rm {drop_in}; systemctl daemon-reload; systemctl restart {unit}.service")


def test_a_restart_of_the_backend_refuses_no_connection(cerebrum: Machine) -> None:
    """A connection that was there before may hear that the daemon stops. A new one waits."""
    said = cerebrum.run(f"""
        systemctl restart --no-block cerebrum-backend.service
        for number in $(seq 50); do
            curl -s -o /dev/null -w '%{{http_code}}\n' --max-time 60 {BACKEND}/health || true
        done
        systemctl restart cerebrum-backend.service""")
    statuses = said.split()
    assert len(statuses) == 50
    assert set(statuses) <= {"200", "503"}
    assert statuses[-1] == "200"


def test_a_connection_starts_the_backend(cerebrum: Machine) -> None:
    cerebrum.run("systemctl stop cerebrum-backend.service 2>/dev/null; systemctl is-active cerebrum-backend.socket")
    assert cerebrum.status(f"{BACKEND}/health") == "200"


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_reload_keeps_the_process(cerebrum: Machine, unit: str) -> None:
    before = pids(cerebrum), cerebrum.journal(unit).count(" - reloaded")
    cerebrum.run(f"systemctl reload {unit}.service")
    assert (pids(cerebrum), cerebrum.show(unit, "ActiveState")) == (before[0], "active")
    assert cerebrum.journal(unit).count("reloaded") == before[1] + 1


def test_the_pi_alone(cerebrum: Machine) -> None:
    stop(cerebrum, "cerebrum-backend")
    cerebrum.run("systemctl restart cerebrum-cm4")  # comes back when READY=1 has been sent
    status, body = health(cerebrum)
    assert (status, body["vps_available"]) == (503, False)
    stop(cerebrum, "cerebrum-cm4")
    assert "PermissionError" not in cerebrum.journal("cerebrum-cm4")
    cerebrum.run("systemctl start cerebrum-backend cerebrum-cm4")
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS again")


# ----------------------------------------------------------------------------------------- configuration

UNITS = [
    ("cerebrum-cm4", "/opt/cerebrum-pi/.env", "CEREBRUM_CM4_PORT", "http://127.0.0.1:7000/"),
    ("cerebrum-backend", "/opt/cerebrum-backend/.env", "CEREBRUM_VPS_PORT", f"{BACKEND}/health"),
]


@pytest.mark.parametrize(("unit", "env", "name", "url"), UNITS)
def test_a_wrong_variable_is_tried_again_ever_more_slowly(
    cerebrum: Machine, unit: str, env: str, name: str, url: str
) -> None:
    """Until it is mended. A client that waits meanwhile makes the tries no quicker."""
    cerebrum.run(f"systemctl stop {unit}.service; cp -p {env} {env}.good; echo {name}=seven >>{env}")
    cerebrum.run(f"systemctl start {unit}.service", check=False)
    cerebrum.run(f"curl -s --max-time 600 {url} >/dev/null 2>&1 &")
    waiting = {"SubState": "auto-restart", "ExecMainStatus": "2"}
    until(lambda: cerebrum.is_in(unit, NRestarts="1", **waiting), f"{unit} is tried again")
    first = cerebrum.show(unit, "RestartUSecNext")
    until(lambda: cerebrum.is_in(unit, NRestarts="3", **waiting), f"{unit} is tried again and again")
    later = cerebrum.show(unit, "RestartUSecNext")
    assert 2.0 < seconds(first) < seconds(later) < 60.0
    assert f"{name}: expected a number from 0 to 65535, got 'seven'" in cerebrum.journal(unit)
    cerebrum.run(f"mv {env}.good {env}")
    until(lambda: cerebrum.show(unit, "ActiveState") == "active", f"{unit} comes up by itself")
    assert cerebrum.status(url) == "200"


def seconds(text: str) -> float:
    """Of systemd's `1min 2.5s` or `987ms`."""
    units = {"min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(min|ms|us|s)", text))


def test_the_pi_waits_for_an_address_that_is_not_up_yet(cerebrum: Machine) -> None:
    """As at boot, before the LAN is up."""
    env, unit = "/opt/cerebrum-pi/.env", "cerebrum-cm4"
    cerebrum.run(f"systemctl stop {unit}; cp -p {env} {env}.good; echo CEREBRUM_CM4_HOST=100.64.0.2 >>{env}")
    cerebrum.run(f"systemctl start --no-block {unit}")
    until(lambda: int(cerebrum.show(unit, "NRestarts")) >= 2, f"{unit} is tried again and again")
    until(lambda: cerebrum.is_in(unit, SubState="auto-restart", ExecMainStatus="1"), "it exits with 1")
    cerebrum.run("ip address add 100.64.0.2/32 dev lo")
    until(lambda: cerebrum.show(unit, "ActiveState") == "active", f"{unit} is up with its address")
    cerebrum.run(f"ip address delete 100.64.0.2/32 dev lo; mv {env}.good {env}; systemctl restart {unit}")


def test_the_backend_listens_before_its_address_is_up(cerebrum: Machine) -> None:
    """As at boot, before Tailscale is up."""
    listen = "/etc/systemd/system/cerebrum-backend.socket.d/listen.conf"
    cerebrum.run(f"cp {listen} /root; echo ListenStream=100.64.0.3:9000 >>{listen}; systemctl daemon-reload")
    cerebrum.run("systemctl restart cerebrum-backend.socket")
    assert cerebrum.status("http://100.64.0.3:9000/health").startswith("000 ")
    cerebrum.run("ip address add 100.64.0.3/32 dev lo")
    assert cerebrum.status("http://100.64.0.3:9000/health") == "200"
    cerebrum.run(f"mv /root/listen.conf {listen}; systemctl daemon-reload; ip address delete 100.64.0.3/32 dev lo")
    cerebrum.run("systemctl restart cerebrum-backend.socket")


# --------------------------------------------------------------------------------- upgrade and removal


def test_the_upgrade(cerebrum: Machine) -> None:
    keep = f"{KEY} /opt/cerebrum-pi/.env /opt/cerebrum-backend/.env /etc/systemd/system/cerebrum-backend.*.d/*"
    before, kept = pids(cerebrum), cerebrum.run(f"sha256sum {keep}")
    requests = f"for number in $(seq 200); do curl -s -o /dev/null --max-time 60 {BACKEND}/health || echo refused; done"
    cerebrum.run(f"({requests}) >/tmp/refused 2>&1 &")
    said = cerebrum.follow("Upgrade")
    assert [text.splitlines()[-1] for text in said] == [
        f"{unit}.service was upgraded and restarted" for unit in DAEMONS
    ]
    assert not set(before) & set(pids(cerebrum))
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS after the upgrade")
    assert cerebrum.run("cat /tmp/refused") == ""
    assert cerebrum.run(f"sha256sum {keep}") == kept


def test_a_new_socket_is_taken_at_once(cerebrum: Machine) -> None:
    cerebrum.run("echo '# version 2' >>cerebrum/systemd/cerebrum-backend.socket")
    before = cerebrum.show("cerebrum-backend.socket", "InvocationID")
    cerebrum.run("cd cerebrum; make install-vps")
    assert cerebrum.show("cerebrum-backend.socket", "InvocationID") != before
    assert cerebrum.status(f"{BACKEND}/health") == "200"


def test_a_limit_of_memory_that_a_person_has_set_stays(cerebrum: Machine) -> None:
    drop_in = "/etc/systemd/system/cerebrum-backend.service.d/memory.conf"
    cerebrum.run(f"cp {drop_in} /root; printf '[Service]\\nMemoryMax=5G\\n' >{drop_in}; cd cerebrum; make install-vps")
    assert cerebrum.show("cerebrum-backend", "MemoryMax") == str(5 << 30)
    cerebrum.run(f"mv /root/memory.conf {drop_in}; cd cerebrum; make install-vps")


# What the README said before there was an installer. Empty files stand for the modules of that time.
BY_HAND = """
cd cerebrum
python3 -m venv /opt/cerebrum-backend/venv
/opt/cerebrum-backend/venv/bin/pip install --quiet llama-cpp-python psutil
useradd --system --user-group --shell /usr/sbin/nologin cerebrum
install -d /opt/cerebrum-pi
for place in /opt/cerebrum-backend /opt/cerebrum-pi; do
    cp -r cm4d.py vpsd.py cerebrum_common.py cerebrum ../by_hand/models.toml $place
    touch $place/cerebrum_code.py $place/cerebrum_engine.py $place/cerebrum_page.html
done
cp ../by_hand/*.service /etc/systemd/system/
./generate_api_key.sh --write /opt/cerebrum-backend/.env
cat >>/opt/cerebrum-backend/.env <<'END'
CEREBRUM_VPS_HOST=100.64.0.1
CEREBRUM_MODELS_DIR=/opt/cerebrum-backend/models
CEREBRUM_MAX_CPU_PERCENT=100
# mine
END
grep CEREBRUM_API_KEY /opt/cerebrum-backend/.env | ./generate_api_key.sh --set /opt/cerebrum-pi/.env
printf 'CEREBRUM_VPS_URL=http://100.64.0.1:9000\\n# mine\\n' >>/opt/cerebrum-pi/.env
chown cerebrum: /opt/cerebrum-*/.env
systemctl daemon-reload
systemctl enable --quiet --now cerebrum-backend cerebrum-cm4
echo '# mine' >>/opt/cerebrum-backend/models.toml"""


def test_an_installation_by_hand_is_upgraded(tmp_path: Path) -> None:
    """Of which the person has then changed both .env and models.toml."""
    with booted("by-hand") as machine:
        copy_to(machine, tmp_path)
        machine.run("mkdir by_hand")
        for file in (ROOT / "tests/by_hand").iterdir():
            machine.run(f"cat >by_hand/{file.name}", stdin=file.read_text())
        machine.run(BY_HAND)
        until(lambda: health(machine)[0] == 200, "the Pi sees the VPS")
        kept = "/opt/cerebrum-pi/.env /opt/cerebrum-backend/.env /opt/cerebrum-backend/models.toml"
        before = machine.run(f"sha256sum {kept}; stat -c '%a %U' {kept}")

        machine.follow("Upgrade")
        until(lambda: health(machine)[0] == 200, "the Pi sees the VPS after the upgrade")
        assert machine.run(f"sha256sum {kept}; stat -c '%a %U' {kept}") == before
        assert machine.run(f"ls {KEY}", check=False) == ""  # the one in .env is still the key
        modules = machine.run("cd /opt; ls */cerebrum_*.py */cerebrum_page.html 2>/dev/null", check=False).split()
        assert modules == ["cerebrum-backend/cerebrum_common.py", "cerebrum-pi/cerebrum_common.py"]
        said = machine.run("printf 'def fibonacci(n):\\n' | cerebrum/cerebrum_repl.sh -n 16 -t 0 -")
        assert "return" in said
        assert machine.show("cerebrum-backend.socket", "Listen") == "100.64.0.1:9000 (Stream)"
        assert machine.show("cerebrum-backend", "TriggeredBy") == "cerebrum-backend.socket"
        assert machine.run("systemctl is-enabled cerebrum-backend.socket") == "enabled"
        for unit in DAEMONS:
            assert machine.show(unit, "WatchdogUSec") == "1min"


def test_remove_and_install_by_hand(cerebrum: Machine) -> None:
    """What a person has made stays, and an installation without the installer goes on with it."""
    kept = (
        f"{KEY} /opt/cerebrum-pi/.env /opt/cerebrum-backend/.env /var/lib/cerebrum /opt/cerebrum-pi/logs/cerebrum.log"
    )
    before = cerebrum.run(f"stat -c '%n %i' {kept}; cat {KEY}")
    vps, pi = cerebrum.follow("Remove")
    assert vps.startswith("cerebrum-backend.service is removed.")
    assert pi.startswith("cerebrum-cm4.service is removed.")
    assert cerebrum.run("ls /opt/*/*.py", check=False) == ""
    assert cerebrum.run("systemctl list-unit-files --no-legend 'cerebrum*'", check=False) == ""
    assert cerebrum.run("systemctl list-units --no-legend 'cerebrum*'") == ""
    assert cerebrum.run(f"stat -c '%n %i' {kept}; cat {KEY}") == before
    models = cerebrum.run("ls /opt/cerebrum-backend/models")
    assert "qwen2.5-coder-1.5b" in models

    cerebrum.follow("Without the installer")
    cerebrum.run("systemctl enable --now cerebrum-backend cerebrum-cm4 2>/dev/null")
    until(lambda: health(cerebrum)[0] == 200, "the Pi sees the VPS")
    assert cerebrum.run(f"cat {KEY}") != before.splitlines()[-1]  # its steps make a new one
