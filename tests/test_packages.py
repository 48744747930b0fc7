"""docs/deploy.md to the letter, on a booted Debian: the packages, their setup, and the units under
a real systemd.

One container plays the machine with the clone, the VPS, the Pi and Tailscale: the page's own
command blocks are run in it, in their order. The tests then stop, kill, hang, misconfigure, upgrade
and remove the daemons. `scp`, `sudo` and `tailscale` are stand-ins of a line each. Slow (minutes)
and for root only. The tests without the mark `packages` are those of what a change to the packages
breaks first. Each Debian with llama.cpp's wheel is made once, in ~/.cache, which needs a network; a
container boots under an overlay, which is gone afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from harness import CAPTURED, FILES, MODELS, ROOT, Client, daemon, wait_until
from harness import KEY as KEY_OF_TESTS
from scripted import Backend, in_a_thread
from test_openapi import MORE, TOKENS, check_post
from test_wire import ROWS, check_row

from cerebrum_common import VERSION

# What the page takes for granted and what its steps install. The container has no network.
PACKAGES = (
    "avahi-daemon avahi-utils build-essential ca-certificates cmake curl dbus debhelper dh-python "
    "g++ help2man iproute2 libnss-mdns make python3 python3-psutil python3-venv systemd-sysv"
)
PACKAGES_OF_A_PI = "curl dbus python3 systemd-sysv"
SUITE = "trixie"
OLDER = "bookworm"
MODEL = "qwen_0_5b"  # the one that the tests choose: it is tuned and loaded sooner
DEADLINE_S = 600.0  # setup tunes the model, which a busy machine does in minutes
until = partial(wait_until, seconds=DEADLINE_S)
DEBIANS = MODELS.parent / "debian"
BUILD_SECONDS = 3600.0  # llama.cpp takes 4 minutes on two idle cores
NEEDED = ("debootstrap", "git", "systemd-nspawn", "nsenter")
NSPAWN = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe")
DAEMONS = ("cerebrum-backend", "cerebrum-cm4")
BACKEND = "http://100.64.0.1:9000"
HEALTH = f"{BACKEND}/health"
PI = "http://127.0.0.1:7000"
MODELS_OF_DAEMON = "/var/lib/cerebrum-backend/models"
KEY = "/etc/credstore/CEREBRUM_API_KEY"
CLIENTS = "/etc/cerebrum-cm4/client-keys"
NEW_CLIENT = "/usr/lib/cerebrum-cm4/generate_api_key.sh --client anna"
SETTINGS = "/etc/cerebrum-backend/env", "/etc/cerebrum-cm4/env"
CATALOG = "/etc/cerebrum-backend/models.toml"
# Let the catalog name the machine's own web server, until it is moved back.
OWN_SOURCES = f"sed -i.whole 's|https://huggingface.co/.*/|http://127.0.0.1:8000/|' {CATALOG}"
WHOLE_AGAIN = f"mv {CATALOG}.whole {CATALOG}"

EMULATOR = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")

missing = [tool for tool in NEEDED if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="booting a container needs root"),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
]


def blocks(step: str) -> list[str]:
    """The commands of a step of docs/deploy.md: its ```sh blocks, by a word of its heading."""
    text = (ROOT / "docs/deploy.md").read_text()
    (section,) = re.findall(rf"^###? [^\n]*{step}.*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


class Machine:
    """A booted container. `run` runs a shell command in it, as root in its home."""

    said = ("", "", "")  # by setup of the VPS, by setup of the Pi, by curl
    model = "qwen_1_5b"

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        pgrep = f"pgrep --parent {process.pid} --exact systemd"  # the other child ends soon
        find = partial(subprocess.run, pgrep.split(), stdout=subprocess.PIPE, text=True)
        leader = until(lambda: find().stdout.split(), "systemd-nspawn starts init")[0]
        self.enter = f"nsenter --target {leader} --all --wdns=/root /bin/bash".split()

    def run(self, command: str, check: bool = True, stdin: str = "") -> str:
        environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        inside = [*self.enter, "-ec", f"cd /root\n{command}"]
        given = {**CAPTURED, "env": environ, "input": stdin, "timeout": DEADLINE_S}
        done = subprocess.run(inside, **given)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def fails(self, command: str, stdin: str = "") -> str:
        """What it says."""
        said = self.run(f"if ({command}) 2>&1; then echo DONE; fi", stdin=stdin)
        assert not said.endswith("DONE"), said
        return said

    def follow(self, step: str) -> list[str]:
        """Run the blocks of a step where the page says to run them; what each printed."""
        place = "cd cerebrum\n" if step == "Make the packages" else ""
        return [self.run(place + block) for block in blocks(step)]

    def show(self, unit: str, key: str) -> str:
        return self.run(f"systemctl show --value --property={key} {unit}")

    def is_in(self, unit: str, **expected: str) -> bool:
        """Whether the unit has these properties, read at one time."""
        lines = self.run(f"systemctl show --property={','.join(expected)} {unit}").splitlines()
        return sorted(lines) == sorted(f"{name}={value}" for name, value in expected.items())

    def journal(self, unit: str) -> str:
        return self.run(f"journalctl --no-pager --output=cat --unit={unit}")

    def status(self, url: str, options: str = "") -> str:
        """The status of a response, or 000 and curl's exit status."""
        curl = f"curl -s -o /dev/null -w '%{{http_code}}' {options} {url}"
        return self.run(f'{curl} || echo " $?"', check=False)

    def wait_for_the_pi(self) -> None:
        until(lambda: self.status(f"{PI}/health") == "200", "the Pi sees the VPS")

    def limit(self) -> int:
        """Of the backend's memory, in bytes."""
        return int(self.show("cerebrum-backend", "MemoryMax"))


WHEELS = """
python3 -m venv /tmp/venv
/tmp/venv/bin/pip wheel --quiet --wheel-dir=/wheels "$@"
rm -r /tmp/venv
printf '[global]\\nno-index = true\\nfind-links = /wheels\\n' >/etc/pip.conf"""


def bootstrapped(recipe: str, suite: str, options: str = "") -> tuple[Path, bool]:
    """The folder of a Debian with the packages of a recipe's first line; whether it is complete."""
    debian = DEBIANS / f"{suite}{options}"
    complete = debian / "complete"
    if complete.exists() and complete.read_text() == recipe:
        return debian, True
    shutil.rmtree(debian, ignore_errors=True)
    debian.mkdir(parents=True)
    include = recipe.splitlines()[0].replace(" ", ",")
    make = f"debootstrap --variant=minbase {options} --include={include} {suite} {debian}"
    subprocess.run(make.split(), check=True, stdout=subprocess.DEVNULL)
    return debian, False


def make_debian(suite: str) -> Path:
    """A Debian that was never booted, and in /wheels what pip needs. Only this needs a network."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements = tomllib.load(file)["project"]["dependencies"]
    recipe = "\n".join([PACKAGES, *requirements])
    debian, is_complete = bootstrapped(recipe, suite)
    if is_complete:
        return debian
    run = [*NSPAWN, f"--directory={debian}", "--bind-ro=/etc/ssl/certs"]
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            run.append(f"--setenv={name}={value}")
    built = [*Path.home().glob(".cache/pip/wheels/**/llama_cpp_python-*-none-*.whl")]
    if built and suite == SUITE:  # an older one has an older libc than this machine, perhaps
        run += [f"--bind-ro={built[0].parent}:/built", "--setenv=PIP_FIND_LINKS=/built"]
    build_in = [*run, "/bin/bash", "-ec", WHEELS, "bash", *requirements]
    subprocess.run(build_in, check=True, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS)
    (debian / "complete").write_text(recipe)
    return debian


@contextlib.contextmanager
def started(name: str, debian: Path, *options: str) -> Iterator[Machine]:
    """A machine with the clone."""
    command = [*NSPAWN, "--boot", "--volatile=overlay", *options]
    command += [f"--machine={name}-{os.getpid()}", f"--directory={debian}"]
    # What IPAddressDeny= needs: BPF, and cgroups of version 2 even on a host that has both.
    command += ["--capability=CAP_BPF", "--system-call-filter=bpf"]
    environ = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environ, **pipes)
    try:
        machine = Machine(process)
        state = partial(machine.run, "systemctl is-system-running", check=False)
        # An emulated one cannot mount what some of Debian's units ask for.
        until(lambda: state() in ("running", "degraded"), "the machine boots")
        pack = "git ls-files -coz --exclude-standard | tar c --null -T-"
        clone = subprocess.check_output(pack, shell=True, cwd=ROOT)
        unpack = [*machine.enter, "-c", "mkdir cerebrum; tar x -C cerebrum"]
        subprocess.run(unpack, input=clone, check=True)
        yield machine
    finally:
        # The overlay goes too, so nothing needs a clean shutdown. Everything in there dies with its
        # init.
        killed = subprocess.run(["pkill", "-KILL", "--parent", f"{process.pid}"])
        if killed.returncode:
            process.kill()
        process.wait(DEADLINE_S)


@contextlib.contextmanager
def booted(name: str, suite: str = SUITE) -> Iterator[Machine]:
    """A machine with the clone, and with a web server of its own that has the models."""
    options = "--private-network", f"--bind-ro={MODELS}:/srv"
    with started(name, make_debian(suite), *options) as machine:
        machine.run("""
            echo pi >/etc/hostname; hostname pi
            ip address add 100.64.0.1/32 dev lo
            printf '#!/bin/sh\\necho 100.64.0.1\\n' >/usr/bin/tailscale
            printf '#!/bin/sh\\nexec "$@"\\n' >/usr/bin/sudo
            printf '#!/bin/sh\\nexec cp "$1" "/root/${2#*:}"\\n' >/usr/bin/scp
            chmod +x /usr/bin/tailscale /usr/bin/sudo /usr/bin/scp
            systemd-run --quiet python3 -m http.server --directory=/srv 8000""")
        yield machine


def deploy(machine: Machine, model: str) -> None:
    """All steps of the page up to a completion."""
    machine.follow("Make the packages")
    install, setup = blocks("Install the VPS")[0].splitlines()
    machine.run(f"{install}; {OWN_SOURCES}")
    on_the_vps = machine.run(setup, stdin=f"{model}\n")
    # All of the CPU, whatever else this machine does.
    whole_cpu = f"echo CEREBRUM_MAX_CPU_PERCENT=100 >>{SETTINGS[0]}"
    machine.run(f"{WHOLE_AGAIN}; {whole_cpu}; systemctl restart cerebrum-backend")
    commands, ask = blocks("Install the Pi")
    install, setup = commands.splitlines()
    machine.run(f"{install}; mv {KEY} {KEY}.vps")
    assert machine.run(f"{NEW_CLIENT}; stat -c %U {CLIENTS}; rm {CLIENTS}").endswith("cerebrum")
    on_the_pi = machine.run(setup, stdin=on_the_vps.splitlines()[-1] + "\n")
    machine.run(f"cmp {KEY} {KEY}.vps; rm {KEY}.vps")
    machine.wait_for_the_pi()
    machine.run("apt install ./cerebrum/dist/cerebrum-tools_*.deb")
    machine.said = on_the_vps, on_the_pi, machine.run(ask)


@pytest.fixture(scope="module")
def cerebrum() -> Iterator[Machine]:
    """The machine after all steps of the page."""
    with booted("cerebrum") as machine:
        machine.model = MODEL
        deploy(machine, MODEL)
        yield machine


def stop(machine: Machine, unit: str) -> None:
    sockets = f"{unit}.socket" if unit == "cerebrum-backend" else ""
    machine.run(f"systemctl stop {sockets} {unit}.service")
    assert machine.is_in(unit, Result="success", ExecMainCode="1", ExecMainStatus="0")


def pids(machine: Machine) -> list[str]:
    return [machine.show(unit, "MainPID") for unit in DAEMONS]


# --------------------------------------------------------------------------------- the page's steps


# The row of setup's table that it marks; the seconds are to a suggestion. Or this machine is busy.
OFFER = r"^(\* \w+ +\S+ +\S+ GB +[\d.]+ +[\d.]+ s +[\d.]+ s  |no speed is known; )"
UNITS = "cerebrum-backend.socket cerebrum-backend cerebrum-cm4"


def test_the_steps(cerebrum: Machine):
    on_the_vps, on_the_pi, answer = cerebrum.said
    assert re.search(OFFER, on_the_vps, re.M)
    assert on_the_vps.splitlines()[-1].startswith(f"{BACKEND} ")
    for said in (on_the_vps, on_the_pi):
        assert re.search("^ok ", said, re.M)
        assert "FAIL" not in said
    *tokens, done = map(json.loads, re.findall(r"data: (\{.*\})", answer))
    assert {"token" in event for event in tokens} == {True}
    assert done["done"]
    assert done["language"] == "rust"
    assert done["model"] == cerebrum.model
    rooms = "/usr/lib/cerebrum-cm4/cerebrum/vps /usr/lib/cerebrum-backend/cerebrum/pi"
    assert cerebrum.run(f"ls -d {rooms}", check=False) == ""
    units = cerebrum.run("ls /lib/systemd/system/cerebrum-*").split()
    assert len(units) == 4
    assert cerebrum.run(f"systemd-analyze verify {' '.join(units)} 2>&1") == ""
    assert cerebrum.show("cerebrum-backend.socket", "Listen") == "100.64.0.1:9000 (Stream)"
    assert 1 << 30 < cerebrum.limit() < 6 << 30  # one small model, tuned or not
    assert cerebrum.run(f"systemctl is-enabled {UNITS}").split() == ["enabled"] * 3


@pytest.mark.packages
def test_the_repl_finds_the_pi(cerebrum: Machine):
    """By Avahi, on a network of two ends."""
    cerebrum.run("""
        ip link add near type veth peer name far
        ip address add 192.168.77.1/24 dev near; ip link set near up; ip link set far up
        systemctl restart avahi-daemon""")
    browse = "avahi-browse -prt _cerebrum._tcp"
    until(lambda: "192.168.77.1;7000" in cerebrum.run(browse, check=False), "the Pi is announced")
    said = cerebrum.run("cerebrum", stdin=":temp 0\n:tokens 16\ndef fibonacci(n):\n:model\n")
    assert "return" in said
    assert re.search(rf"^  {MODEL} +loaded, \d+ MB +0\.5B$", said, re.M)
    assert cerebrum.run("curl -s http://pi.local:7000/").startswith("<!doctype html>")
    cerebrum.run("ip link delete near")


def test_the_extension_is_one_file_and_the_pi_has_a_backup(cerebrum: Machine):
    handed_out = cerebrum.run(f"curl -s {PI}/cerebrum.vsix | sha256sum").split()[0]
    assert f"with the sha256 {handed_out}\n" in cerebrum.said[1] + "\n"
    of_tools = cerebrum.run("sha256sum /usr/share/cerebrum/cerebrum.vsix").split()[0]
    assert of_tools == handed_out
    text = (ROOT / "docs/household.md").read_text()
    (back_up,) = re.findall(r"## What to back up\n\n```sh\n(.*?)```", text, re.DOTALL)
    (restore,) = re.findall(r"`(sudo tar -C / -xzf.*?)`", text, re.DOTALL)
    before = everything_set(cerebrum)
    cerebrum.run(back_up)
    assert cerebrum.run("stat -c '%a %U' cerebrum-cm4.tgz") == "600 root"
    cerebrum.run("rm -r /etc/cerebrum-cm4 /etc/credstore")
    cerebrum.run(restore.replace("\n", " "))
    cerebrum.run("rm cerebrum-cm4.tgz; cerebrum-cm4 setup </dev/null")
    assert everything_set(cerebrum) == before
    cerebrum.wait_for_the_pi()


def everything_set(machine: Machine) -> str:
    """All that setup writes but memory.conf: a machine that is busy tunes the model in a later
    setup, and the limit follows.
    """
    files = f"{KEY} /etc/cerebrum-*/* /etc/systemd/system/cerebrum-*.d/[!m]*"
    files += f" {MODELS_OF_DAEMON}/*.gguf"
    return machine.run(f"sha256sum {files}; stat -c '%n %a %U' {files}")


def test_setup_is_roots_and_again_changes_nothing(cerebrum: Machine):
    """Also where no person answers."""
    nobody = "setpriv --reuid=nobody --clear-groups"
    said = cerebrum.fails(f"{nobody} cerebrum-cm4 setup")
    wrong = "cerebrum-cm4: expected to run as root, got user nobody"
    assert said == f"{wrong}; please run:  sudo cerebrum-cm4 setup"
    assert cerebrum.run(f"{nobody} cerebrum-backend --help").startswith("Usage: ")
    before = everything_set(cerebrum)
    for refused in (f"{BACKEND} another-key", "http://100.64.0.9:9000 key", "ftp://vps key"):
        assert "cerebrum-cm4: " in cerebrum.fails("cerebrum-cm4 setup", stdin=f"{refused}\n")
    assert cerebrum.run("cerebrum-backend setup </dev/null").splitlines()[-1].split()[0] == BACKEND
    cerebrum.run("cerebrum-cm4 setup </dev/null")
    assert everything_set(cerebrum) == before
    cerebrum.wait_for_the_pi()


SPY = """
install -d -m 777 /var/users; install -m 666 /dev/null /var/users/of
cd /var/lib/cerebrum-backend
cat >$(echo llama-*/lib/python3*/site-packages)/note.pth
mv models /var/lib/elsewhere; chown root: /var/lib/elsewhere; ln -s /var/lib/elsewhere models"""
# A line of Python. In the unit it is refused.
WRITE_USER = (
    'import os; exec(\'try: os.write(os.open("/var/users/of", os.O_WRONLY | os.O_APPEND), '
    'b"%d,%d " % (os.getuid(), os.nice(0)))\\nexcept OSError: 0\')\n'
)


def test_root_runs_nothing_that_the_daemons_user_can_change(cerebrum: Machine):
    """Each start of the environment's Python writes down its user, and that it gives way to the
    daemon. A link of this user's leads out of its folder.
    """
    before = everything_set(cerebrum)
    cerebrum.run(SPY, stdin=WRITE_USER)
    for command in ("--check", "memory", "setup </dev/null"):
        said = cerebrum.run(f"cerebrum-backend {command} 2>&1")
        assert not re.search(r"FAIL|\(sudo\)", said)
        file = "/var/users/of"
        users = cerebrum.run(f"tr ' ' '\\n' <{file} | sort -u; truncate --size=0 {file}")
        assert users == cerebrum.run("id -u cerebrum") + ",19", command
    assert cerebrum.run("ls -d /run/cerebrum.*", check=False) == ""
    assert cerebrum.run("stat -c %U /var/lib/elsewhere") == "root"
    cerebrum.run("""
        cd /var/lib/cerebrum-backend
        rm models llama-*/lib/python3*/site-packages/note.pth
        mv /var/lib/elsewhere models; chown cerebrum: models""")
    assert everything_set(cerebrum) == before


def test_where_nothing_can_be_measured_the_smallest_model_is_offered(cerebrum: Machine):
    """If there is no model in the end, the last line says so."""
    before = everything_set(cerebrum)
    too_much = f"echo CEREBRUM_MIN_FREE_MB=1000000 >>{SETTINGS[0]}"
    cerebrum.run(f"mv {MODELS_OF_DAEMON}/*.gguf /var/lib; {too_much}")
    said = cerebrum.run("cerebrum-backend setup", check=False, stdin="\n").splitlines()
    assert f"no speed is known; the smallest model is {MODEL}" in said
    again = "to try again:  sudo cerebrum-backend setup --model ID"
    assert said[-1] == f"FAIL  models    not fetched: {MODEL}; {again}"
    restart = "systemctl restart cerebrum-backend"
    cerebrum.run(f"rm -r {MODELS_OF_DAEMON}/*")  # what came of a part
    cerebrum.run(f"mv /var/lib/*.gguf {MODELS_OF_DAEMON}; sed -i '$d' {SETTINGS[0]}; {restart}")
    assert everything_set(cerebrum) == before
    cerebrum.wait_for_the_pi()


# ------------------------------------------------------------------------------------------ secrets


def test_the_key_is_for_the_daemons_alone(cerebrum: Machine):
    cerebrum.run(NEW_CLIENT)
    modes = cerebrum.run(f"stat -c '%a %U' {KEY} {' '.join(SETTINGS)} {CLIENTS}; rm {CLIENTS}")
    assert modes == "600 root" + "\n600 cerebrum" * 3
    everywhere = "/proc/[0-9]*/cmdline /proc/[0-9]*/environ"
    everywhere += " /var/log/cerebrum/* /etc/systemd/system/cerebrum*"
    # A process that ends meanwhile is an error to grep. The key's own file shows that it searched.
    assert cerebrum.run(f"grep -raFlsf {KEY} {KEY} {everywhere}", check=False) == KEY
    assert cerebrum.run(f"journalctl --no-pager | grep -cFf {KEY}", check=False) == "0"


def test_the_log_is_for_adm(cerebrum: Machine):
    log = "/var/log/cerebrum/cerebrum.log"
    somebody = "setpriv --reuid=nobody --regid=nogroup"
    modes = cerebrum.run(f"stat -c '%a %U %G' /var/log/cerebrum {log}")
    assert modes == "2750 cerebrum adm\n640 cerebrum adm"
    assert "Permission denied" in cerebrum.fails(f"{somebody} --clear-groups cat {log}")
    assert "listening on http://0.0.0.0:7000" in cerebrum.run(f"{somebody} --groups=adm cat {log}")


def test_the_backend_has_no_network_and_strangers_do_not_reach_it(cerebrum: Machine):
    interfaces = cerebrum.run(f"cat /proc/{pids(cerebrum)[0]}/net/dev").splitlines()
    assert [line.split(":")[0].strip() for line in interfaces[2:]] == ["lo"]
    cerebrum.run("ip address add 203.0.113.7/32 dev lo")
    assert cerebrum.status(HEALTH, "--interface 100.64.0.1") == "200"
    assert cerebrum.status(HEALTH, "--interface 203.0.113.7 --max-time 2") == "000 28"
    cerebrum.run("ip address delete 203.0.113.7/32 dev lo")


# ----------------------------------------------------------------------------- crashes and restarts


FIBONACCI = rf"printf 'def fibonacci(n):\n' | CEREBRUM_URL={PI} cerebrum -n 16 -t 0 -"


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_both_survive_a_kill_and_a_hang(cerebrum: Machine, signal):
    assert "return" in cerebrum.run(FIBONACCI)
    for unit in DAEMONS:
        drop_in = f"/run/systemd/system/{unit}.service.d/watchdog.conf"
        cerebrum.run(f"install -D /dev/stdin {drop_in}", stdin="[Service]\nWatchdogSec=2\n")
        cerebrum.run(f"systemctl daemon-reload; systemctl restart {unit}.service")
        cerebrum.run(f"systemctl kill --signal={signal} {unit}.service")
        restarted = partial(cerebrum.is_in, unit, NRestarts="1", ActiveState="active")
        until(restarted, f"{unit} restarts once")
        cerebrum.run(f"rm {drop_in}; systemctl daemon-reload; systemctl restart {unit}.service")
    cerebrum.wait_for_the_pi()
    # Not always the same text: it may go on from a sequence on the disk, and of two tokens that are
    # nearly as likely, rounding decides.
    assert "return" in cerebrum.run(FIBONACCI)


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_reload_keeps_the_process(cerebrum: Machine, unit):
    processes = pids(cerebrum)
    reloads = cerebrum.journal(unit).count("] reloaded")
    cerebrum.run(f"systemctl reload {unit}.service")
    assert pids(cerebrum) == processes
    assert cerebrum.show(unit, "ActiveState") == "active"
    assert cerebrum.journal(unit).count("] reloaded") == reloads + 1
    cerebrum.run(f"echo oops >>/etc/{unit}/env")
    assert "failed" in cerebrum.fails(f"systemctl reload {unit}.service")
    assert "expected NAME=value" in cerebrum.show(unit, "StatusText")
    cerebrum.run(f"sed -i '$d' /etc/{unit}/env; systemctl reload {unit}.service")
    assert pids(cerebrum) == processes


@pytest.mark.packages
def test_the_pi_alone_and_a_connection_that_starts_the_backend(cerebrum: Machine):
    stop(cerebrum, "cerebrum-backend")
    cerebrum.run("systemctl restart cerebrum-cm4")  # comes back when READY=1 has been sent
    assert cerebrum.status(f"{PI}/health") == "503"
    stop(cerebrum, "cerebrum-cm4")
    assert "PermissionError" not in cerebrum.journal("cerebrum-cm4")
    cerebrum.run("systemctl start cerebrum-backend.socket cerebrum-cm4")
    assert cerebrum.status(HEALTH) == "200"
    cerebrum.wait_for_the_pi()


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.packages
@pytest.mark.parametrize("unit", DAEMONS)
def test_a_wrong_variable_is_tried_again_until_it_is_mended(cerebrum: Machine, unit):
    """A client that waits meanwhile makes the tries no quicker."""
    env = f"/etc/{unit}/env"
    wrong = r"CEREBRUM_VPS_PORT=seven\nCEREBRUM_CM4_PORT=seven\n"
    cerebrum.run(f"cp -p {env} {env}.good; printf '{wrong}' >>{env}; systemctl stop {unit}.service")
    cerebrum.run(f"systemctl start {unit}.service", check=False)
    url = {"cerebrum-backend": HEALTH}.get(unit, PI)
    cerebrum.run(f"curl -s --max-time 600 {url} >/dev/null 2>&1 &")
    waiting = {"SubState": "auto-restart", "ExecMainStatus": "2", "NRestarts": "3"}
    until(lambda: cerebrum.is_in(unit, **waiting), f"{unit} is tried again")
    cerebrum.run(f"mv {env}.good {env}")
    until(lambda: cerebrum.show(unit, "ActiveState") == "active", f"{unit} comes up by itself")


def test_the_limit_of_memory_follows_the_models(cerebrum: Machine):
    """And systemd reads it while the daemon runs."""
    limit = cerebrum.limit()
    processes = pids(cerebrum)
    fetch = "cerebrum-backend fetch --no-tune"
    cerebrum.run(f"{OWN_SOURCES}; {fetch} qwen_1_5b; {WHOLE_AGAIN}")
    assert 1 << 30 < cerebrum.limit() - limit < 3 << 30
    cerebrum.run(f"rm {MODELS_OF_DAEMON}/*1.5b*; {fetch} {MODEL}")
    assert cerebrum.limit() == limit
    assert pids(cerebrum) == processes


@pytest.mark.packages
def test_an_address_is_taken_before_it_is_up_and_a_persons_limit_of_memory_stays(
    cerebrum: Machine,
):
    """The former as at boot, before Tailscale is up."""
    drop_in = "/etc/systemd/system/cerebrum-backend.service.d/memory.conf"
    cerebrum.run(f"cp {drop_in} /root; printf '[Service]\\nMemoryMax=5G\\n' >{drop_in}")
    setup = "cerebrum-backend setup --listen"
    elsewhere = "http://100.64.0.3:9001/health"
    cerebrum.run(f"{setup} 100.64.0.3:9001 </dev/null")
    assert cerebrum.limit() == 5 << 30
    cerebrum.run(f"mv /root/memory.conf {drop_in}; systemctl daemon-reload")
    for url in (elsewhere, HEALTH):
        assert cerebrum.status(url).startswith("000 ")
    cerebrum.run("ip address add 100.64.0.3/32 dev lo")
    assert cerebrum.status(elsewhere) == "200"
    cerebrum.run(f"ip address delete 100.64.0.3/32 dev lo; {setup} 100.64.0.1 </dev/null")
    assert cerebrum.status(HEALTH) == "200"


# ------------------------------------------------------------------------------ upgrade and removal


def newer(machine: Machine, version: str, change: str = "true") -> None:
    """Make packages of another version from a changed clone, and copy them as the page says."""
    # Without apt-get, which would start with what is broken.
    _, _, build = blocks("Make the packages")[0].partition("\n")
    machine.run(f"cd cerebrum; sed -i '1s/(.*)/({version})/' debian/changelog; {change}\n{build}")


# In the background: 200 requests to the backend, and a stream from the Pi.
REQUESTS = f"""
for number in $(seq 200); do
    curl -s -o /dev/null --max-time 60 {HEALTH} || echo refused
done >/tmp/refused 2>&1 &
curl -sN {PI}/v1/complete/stream -H 'Content-Type: application/json' -d '{{
    "prompt": "# The numbers from one to one hundred, in words:", "language": "python",
    "max_tokens": 20}}' 2>&1 | grep . >/tmp/stream 2>&1 &"""


def test_the_upgrade(cerebrum: Machine):
    """No connection is refused by the backend, and no stream is lost."""
    before = pids(cerebrum)
    kept = everything_set(cerebrum)
    newer(cerebrum, "1.1.1")
    cerebrum.run(REQUESTS)
    until(lambda: "data:" in cerebrum.run("cat /tmp/stream"), "the stream begins")
    cerebrum.follow("Upgrade")
    assert set(before).isdisjoint(pids(cerebrum))
    cerebrum.wait_for_the_pi()
    assert cerebrum.run("cat /tmp/refused") == ""
    assert '"done": true' in cerebrum.run("cat /tmp/stream").splitlines()[-1]
    assert everything_set(cerebrum) == kept


def test_an_upgrade_starts_nothing_that_is_stopped_and_fails_with_what_does_not_come_up(
    cerebrum: Machine,
):
    stop(cerebrum, "cerebrum-cm4")
    cerebrum.run("apt install --reinstall ./cerebrum-cm4.deb")
    assert cerebrum.show("cerebrum-cm4", "ActiveState") == "inactive"
    cerebrum.run("systemctl start cerebrum-cm4")
    broken = "echo 'raise SystemExit(\"cm4d: broken\")' >>cerebrum_common.py"
    newer(cerebrum, "1.1.2", f"cp cerebrum_common.py whole; {broken}")
    said = cerebrum.fails("apt install ./cerebrum-cm4.deb")
    assert "\ncerebrum-cm4: the daemon does not come up: cm4d: broken\n" in said
    newer(cerebrum, "1.1.3", "mv whole cerebrum_common.py")
    cerebrum.run("apt install ./cerebrum-cm4.deb")
    cerebrum.wait_for_the_pi()


# A wheel of the same library that says another version.
OTHER_WHEEL = r"""
import pathlib, zipfile
(old,) = pathlib.Path("/wheels").glob("llama_cpp_python-0.3.36-*.whl")
new = str(old).replace("0.3.36", "0.3.99")
with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
    for name in source.namelist():
        data = source.read(name)
        if name.endswith("/METADATA"):
            data = data.replace(b"Version: 0.3.36", b"Version: 0.3.99")
        target.writestr(name.replace("0.3.36", "0.3.99"), data)
"""


@pytest.mark.packages
def test_another_llama_cpp_is_built_while_the_old_one_serves(cerebrum: Machine):
    """At first it cannot be built."""
    newer(cerebrum, "1.1.4", "sed -i s/==0.3.36/==0.3.99/ pyproject.toml")
    before = pids(cerebrum)[0]
    install = "apt install ./cerebrum-backend.deb"
    assert "llama.cpp is built in the background" in cerebrum.run(install)
    fails = {"SubState": "auto-restart", "Result": "exit-code"}
    until(lambda: cerebrum.is_in("cerebrum-llama", **fails), "pip finds no package")
    assert pids(cerebrum)[0] == before
    assert cerebrum.status(HEALTH) == "200"
    cerebrum.run("python3", stdin=OTHER_WHEEL)
    cerebrum.run("systemctl start cerebrum-llama")
    pid = pids(cerebrum)[0]
    assert pid != before
    assert "/llama-0.3.99/" in cerebrum.run(f"tr '\\0' ' ' </proc/{pid}/cmdline")
    until(lambda: cerebrum.show("cerebrum-backend", "ActiveState") == "active", "the daemon is up")
    there = partial(cerebrum.run, "ls /var/lib/cerebrum-backend")
    assert there() == "cache\nllama-0.3.99\nmodels"
    newer(cerebrum, "1.1.5", "sed -i s/==0.3.99/==0.3.36/ pyproject.toml")
    cerebrum.run(install)
    until(lambda: "llama-0.3.99" not in there(), "the older one is back")
    cerebrum.wait_for_the_pi()


BROKEN = {
    # after an upgrade of Debian: the environment's Python finds no packages
    "Python": "mv lib/python3* lib/python2",
    "CPU": "echo 'def llama_decode(*_): import os; os.kill(os.getpid(), 4)' "
    ">>lib/python3*/*/llama_cpp/llama_cpp.py",
}


@pytest.mark.packages
@pytest.mark.parametrize("changed", BROKEN)
def test_llama_cpp_is_built_anew_for_another(cerebrum: Machine, changed):
    """A library for a CPU with more features dies of SIGILL, and so would one from the wheel that
    pip keeps.
    """
    place = "/var/lib/cerebrum-backend"
    wheel = "cache/wheels/llama_cpp_python-0.3.36-py3-none-any.whl"
    cerebrum.run(f"cd {place}; install -D /dev/null {wheel}; chown -R cerebrum: cache")
    cerebrum.run(f"cd {place}/llama-0.3.36; {BROKEN[changed]}")
    cerebrum.run("systemctl restart cerebrum-backend", check=False)
    ask = partial(cerebrum.run, FIBONACCI, check=False)
    until(lambda: "return" in ask(), "llama.cpp is built, the daemon computes")
    assert cerebrum.run(f"ls {place}/llama-0.3.36/lib").startswith("python3.")
    kept = cerebrum.run(f"cd {place}; ls {wheel}", check=False)
    assert kept == ("" if changed == "CPU" else wheel)


@pytest.mark.packages
def test_an_upgrade_keeps_the_speed(cerebrum: Machine):
    """A model that was tuned for another llama.cpp is tuned again. If that fails, later, and
    nothing else fails.
    """
    passport = f"/var/lib/cerebrum/tuned/{FILES[MODEL].name}.json"
    idle = {"ActiveState": "inactive", "Result": "success"}

    def starts() -> int:
        """Without those that follow a tuning which has changed something."""
        changes = cerebrum.journal("cerebrum-llama").count(": used from its next load on;")
        return cerebrum.journal("cerebrum-backend").count(" listening on ") - changes

    def tune() -> bool:
        """What cerebrum-llama does, or what it is doing, until this machine is quiet for it."""
        cerebrum.run("systemctl start cerebrum-llama")
        assert cerebrum.is_in("cerebrum-llama", **idle)
        memory = cerebrum.run("cerebrum-backend memory")
        return not re.search(f"^# {MODEL}: .*, untuned$", memory, re.M)

    until(tune, "the model is tuned")
    before = starts()
    age = f"sed -i s/0.3.36/0.3.35/ {passport}"
    cerebrum.run(age)
    until(tune, "the model is tuned")
    assert starts() == before
    cerebrum.run(age)
    newer(cerebrum, "1.1.6")
    cerebrum.run("apt install ./cerebrum-backend.deb")
    until(tune, "the model is tuned")
    assert starts() == before + 1  # by the upgrade
    cerebrum.run(f"{age}; echo CEREBRUM_MIN_FREE_MB=1000000 >>{SETTINGS[0]}")
    stop(cerebrum, "cerebrum-backend")
    cerebrum.run("systemctl start cerebrum-llama")
    assert "vpsd tune: expected " in cerebrum.journal("cerebrum-llama")
    assert cerebrum.is_in("cerebrum-llama", **idle)
    assert cerebrum.is_in("cerebrum-llama-again.timer", ActiveState="active")
    start = "systemctl start cerebrum-backend.socket cerebrum-backend"
    cerebrum.run(f"sed -i '$d' {SETTINGS[0]}; {start}")
    until(tune, "the model is tuned")
    cerebrum.wait_for_the_pi()


def test_remove_and_purge(cerebrum: Machine):
    kept = f"{KEY} {' '.join(SETTINGS)} /var/lib/cerebrum /var/log/cerebrum/cerebrum.log"
    before = cerebrum.run(f"stat -c '%n %i' {kept}")
    cerebrum.run("apt remove -y cerebrum-backend cerebrum-cm4 cerebrum-tools")
    assert cerebrum.run(f"stat -c '%n %i' {kept}") == before
    assert cerebrum.run("systemctl list-units --no-legend 'cerebrum*'") == ""
    said = cerebrum.run("apt purge -y cerebrum-backend")
    assert "\ncerebrum-backend: the models stay in /var/lib/cerebrum-backend/models" in said
    assert cerebrum.run(f"ls {KEY}") == KEY  # the Pi's, too
    cerebrum.run("apt purge -y cerebrum-cm4")
    assert cerebrum.run("grep ^cerebrum: /etc/passwd", check=False) == ""
    places = r"\( -path /proc -o -path /root -o -path /tmp \)"
    left = cerebrum.run(f"find / -xdev {places} -prune -o -iname '*cerebrum*' -print")
    assert left == "/var/lib/cerebrum-backend"
    assert cerebrum.run("ls -A /etc/credstore; ls /var/lib/cerebrum-backend") == "models"
    assert cerebrum.run(f"ls {MODELS_OF_DAEMON}") == FILES[MODEL].name


@pytest.mark.packages
@pytest.mark.parametrize("suite", [SUITE, OLDER])
def test_copied_files(suite: str):
    with booted("copied", suite) as machine:
        machine.run("echo 100.64.0.1 vps >>/etc/hosts; echo 127.0.0.1 pi.local >>/etc/hosts")
        on_the_vps, on_the_pi, ask = blocks("From copied files")
        machine.run(OWN_SOURCES.replace(CATALOG, "cerebrum/models.toml"))
        *_, key = machine.run(f"cd cerebrum\n{on_the_vps}").splitlines()
        machine.run(f"mv {KEY} key; cd cerebrum\n{on_the_pi}", stdin=key)
        machine.run(f"cmp {KEY} key")
        machine.wait_for_the_pi()
        said = machine.run(f"cd cerebrum\n{ask}", stdin="def fibonacci(n):\n")
        assert "return" in said
        assert '"done": true' in said.splitlines()[-1]
        assert machine.run(f"systemctl is-enabled {UNITS}").split() == ["enabled"] * 3
        assert "listening on" in machine.run("cat /opt/cerebrum-pi/logs/cerebrum.log")


# ------------------------------------------------------------------------------------- the packages


@pytest.mark.skipif(not shutil.which("lintian"), reason="needs lintian")
def test_the_packages_are_reproducible_and_lintian_is_silent() -> None:
    def built(umask: str) -> dict[str, bytes]:
        make = f"umask {umask}; make deb"
        subprocess.run(make, shell=True, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return {file.name: file.read_bytes() for file in dist.iterdir()}

    dist = ROOT / "dist"
    packages = built("022")
    names = [f"cerebrum-{name}_{VERSION}_all.deb" for name in ("backend", "cm4", "tools")]
    assert sorted(packages) == names
    assert built("077") == packages
    checked = subprocess.run(["lintian", *names], cwd=dist, **CAPTURED)
    assert checked.returncode == 0
    assert checked.stdout == ""


# ---------------------------------------------------------------------------------------- at length


@pytest.fixture(scope="module")
def older() -> Iterator[Machine]:
    with booted("older", OLDER) as machine:
        deploy(machine, machine.model)
        yield machine


@pytest.mark.packages
def test_an_older_debian(older: Machine):
    """systemd 252 and Python 3.11."""
    test_the_steps(older)
    for unit in DAEMONS:
        test_a_reload_keeps_the_process(older, unit)
    test_the_upgrade(older)


# Of the unit. So the key is in .env.
UNKNOWN_TO_QEMU = """[Service]
LoadCredential=
PrivateIPC=false
PrivateUsers=false
"""
ENV_OF_A_PI = """CEREBRUM_API_KEY={key}
CEREBRUM_CM4_API_KEY={key}
CEREBRUM_CM4_HOST=127.0.0.1
CEREBRUM_CM4_PORT=0
CEREBRUM_VPS_URL=http://127.0.0.1:{port}
"""


@pytest.mark.packages
@pytest.mark.nightly
@pytest.mark.skipif(not EMULATOR.exists(), reason="needs qemu-user-binfmt")
async def test_an_emulated_pi(tmp_path: Path):
    """An arm64 with the host's network, from copied files: what runs there, not how fast."""
    debian, _ = bootstrapped(PACKAGES_OF_A_PI, OLDER, "--arch=arm64")
    (debian / "complete").write_text(PACKAGES_OF_A_PI)
    with in_a_thread(Backend(tokens=TOKENS)) as backend, started("arm64", debian) as pi:
        assert pi.run("uname -m") == "aarch64"
        _, lines, _ = blocks("From copied files")
        install, start, _ = lines.rpartition("systemctl start cerebrum-cm4")
        pi.run("ln -s /bin/true /usr/bin/tailscale")
        pi.run(f"cd cerebrum\n{install}", stdin=KEY_OF_TESTS)
        drop_in = "/run/systemd/system/cerebrum-cm4.service.d/qemu.conf"
        pi.run(f"install -D /dev/stdin {drop_in}; systemctl daemon-reload", stdin=UNKNOWN_TO_QEMU)
        env = ENV_OF_A_PI.format(key=KEY_OF_TESTS, port=backend.port)
        pi.run(f"cat >/opt/cerebrum-pi/.env; {start}", stdin=env)
        log = partial(pi.run, "cat /opt/cerebrum-pi/logs/cerebrum.log")
        until(lambda: "VPS backend is available" in log(), "the Pi sees the VPS")
        (port,) = map(int, re.findall(r"listening on http://127.0.0.1:(\d+)", log()))
        client = Client(port=port)
        for path, stream in product(MORE, (False, True)):
            await check_post(client, path, stream)
        for row in ROWS:
            await check_row(port, row)
        # The emulated Pi uses the CPU, too.
        easy = {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MODELS_DIR": f"{MODELS}"}
        with daemon("vpsd", tmp_path, **easy) as vps:
            change = f"sed -i 's/:{backend.port}$/:{vps.port}/' /opt/cerebrum-pi/.env"
            pi.run(f"{change}; systemctl reload cerebrum-cm4")
            until(lambda: log().count("VPS backend is available") == 2, "the Pi sees the other VPS")
            asked = {"prompt": "def fibonacci(n):", "language": "python", "model": MODEL}
            headers = {"X_API_Key": KEY_OF_TESTS}
            reply = await client.post("/v1/complete/stream", asked, **headers)
            assert b"return" in reply.body
            assert reply.events[-1]["done"]
