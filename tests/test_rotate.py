"""generate_api_key.sh with keys in files of their own, and the rotation of the key of two machines.

A machine is a folder with the files that the script touches and a stand-in for systemctl. Most tests stand in for the
daemons, too; the last one rotates the key of real ones while they serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import FILES, KEY, PATIENCE, ROOT, Client, daemon, run, until
from test_scripts import Terminal

NAME = "CEREBRUM_API_KEY"
NEW = "[A-Za-z0-9_-]{43}"
QUESTION = {"prompt": "x =", "language": "python", "max_tokens": 1}

# What is known of a unit is in files named like its properties.
SYSTEMCTL = r"""#!/bin/bash
cd "${0%/*}/../units" || exit
unit=${*: -1}
case $1 in
	cat) [[ -d $unit ]] ;;
	is-active) [[ -e $unit/active ]] ;;
	show) cat "$unit/$3" 2>/dev/null ;;
	reload)
		echo reload >>"$unit/calls"
		if [[ -e $unit/pid ]]; then
			kill -HUP "$(<"$unit/pid")"
		elif [[ -e $unit/answer ]]; then
			bash "$unit/answer"
		else
			echo "the $(wc -l <"$unit/calls"). time: reloaded" >"$unit/StatusText"
		fi
		;;
	*) exit 1 ;;
esac
"""

# What `cm4d.py --check` says of a key.
CHECK = """
import os, pathlib
print("ok    python    3.13")
key = (pathlib.Path(os.environ["RUNTIME_DIRECTORY"]) / "CEREBRUM_API_KEY").read_text().strip()
if key in (pathlib.Path(__file__).parent / "accepted").read_text().split():
    print("ok    key       http://vps:9000 accepts ours")
    print("FAIL  clock     is off")
else:
    print("FAIL  key       http://vps:9000 refuses our key (401)")
"""


class Machine:
    """A folder that looks to the script like a machine with these units, which are installed and run."""

    def __init__(self, folder: Path, *units: str) -> None:
        self.folder = folder
        self.credential = folder / "credstore" / NAME
        for name in ("bin", "units", "run", "credstore", "opt"):
            (folder / name).mkdir(parents=True)
        script = (ROOT / "generate_api_key.sh").read_text()
        for path, its_place in (("/etc/credstore", folder / "credstore"), ("/run/$", f"{folder}/run/$")):
            assert script.count(path) == 1 or path == "/etc/credstore"
            script = script.replace(path, str(its_place))
        self.script = self.put("generate_api_key.sh", script)
        self.put("bin/systemctl", SYSTEMCTL)
        for unit in units:
            program = "vpsd.py" if unit == "cerebrum-backend" else "cm4d.py"
            home = folder / "opt" / unit
            home.mkdir()
            (home / program).write_text(CHECK)
            (folder / "run" / unit).mkdir()
            if os.geteuid() == 0:
                os.chown(folder / "run" / unit, 12345, 12345)
            self.tell(unit, ExecStart=f"{{ path=/x/python ; argv[]=/x/python -s {home}/{program} ; pid=1 }}")
            self.tell(unit, RuntimeDirectory=unit, active="")

    def put(self, name: str, text: str, mode: int = 0o755) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def tell(self, unit: str, **files: str) -> None:
        folder = self.folder / "units" / unit
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)

    def reloads(self, unit: str) -> int:
        calls = self.folder / "units" / unit / "calls"
        return calls.read_text().count("reload") if calls.exists() else 0

    def copy(self, unit: str) -> Path:
        return self.folder / "run" / unit / NAME

    def accept(self, *keys: str) -> None:
        """The keys that the backend of this Pi accepts."""
        (self.folder / "opt/cerebrum-cm4/accepted").write_text(" ".join(keys))

    def keygen(self, *args: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
        result = subprocess.run(
            [self.script, *args],
            env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}", **more},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return result.returncode, result.stdout, result.stderr

    def files(self) -> dict[str, bytes]:
        """All that holds keys."""
        paths = [*self.folder.glob("credstore/*"), *self.folder.glob("run/**/*"), *self.folder.glob("opt/*/.env*")]
        return {str(path): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture
def vps(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "vps", "cerebrum-backend")


@pytest.fixture
def pi(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "pi", "cerebrum-cm4")


# -------------------------------------------------------------------------------- a key in its own file


@pytest.mark.parametrize("before", [None, "", "old\n", "old,older"])
def test_a_file_named_like_a_variable_holds_the_key_alone(vps: Machine, before: str | None) -> None:
    (vps.folder / "units/cerebrum-backend/active").unlink()  # one that runs would use the old key
    if before is not None:
        vps.put(f"credstore/{NAME}", before, 0o644)
    assert vps.keygen("--write", str(vps.credential)) == (0, f"{NAME} set in: {vps.credential}\n", "")
    assert re.fullmatch(NEW + "\n", vps.credential.read_text())
    assert stat.S_IMODE(vps.credential.stat().st_mode) == 0o600
    assert os.listdir(vps.credential.parent) == [NAME]


@pytest.mark.parametrize("stdin", ["k-_1\n", f"{NAME}=k-_1,old\r\n", "k-_1,old"])
def test_the_first_key_of_a_line_is_carried_over(vps: Machine, stdin: str) -> None:
    env = vps.put("opt/.env", f"A=1\n{NAME}=older,old\n")
    assert vps.keygen("--set", str(vps.credential), str(env), stdin=stdin)[0] == 0
    assert (vps.credential.read_text(), env.read_text()) == ("k-_1\n", f"A=1\n{NAME}=k-_1\n")


def test_files_of_different_keys_are_refused(vps: Machine) -> None:
    other = vps.folder / "OTHER_KEY"
    code, out, err = vps.keygen("--write", str(vps.credential), str(other))
    assert (code, out, err) == (2, "", f"generate_api_key.sh: expected files of one key, got {NAME} and OTHER_KEY\n")
    assert vps.files() == {}


def test_the_folder_of_credentials_is_made_for_root_alone(vps: Machine) -> None:
    vps.credential.parent.rmdir()
    assert vps.keygen("--write", str(vps.credential))[0] == 0
    assert stat.S_IMODE(vps.credential.parent.stat().st_mode) == 0o700


def test_a_running_daemon_can_read_a_key_that_was_set(pi: Machine) -> None:
    pi.copy("cerebrum-cm4").write_text("older")
    assert pi.keygen("--set", str(pi.credential), stdin="key") == (0, f"{NAME} set in: {pi.credential}\n", "")
    assert pi.copy("cerebrum-cm4").read_text() == "key\n"
    assert pi.reloads("cerebrum-cm4") == 0


# ------------------------------------------------------------------------------------------- a rotation


def test_a_rotation(vps: Machine, pi: Machine) -> None:
    for machine in (vps, pi):
        machine.put(f"credstore/{NAME}", "old\n", 0o600)

    code, told, err = vps.keygen("--rotate")
    match = re.fullmatch(f"({NEW}),old\n", vps.credential.read_text())
    assert match
    key = match[1]
    assert (code, err) == (0, "")
    assert (
        told
        == f"""{vps.credential}: made a new key; the old one is accepted as well.
Next, run this on the Pi:
    sudo /opt/cerebrum-pi/generate_api_key.sh --rotate
and paste the line that this shows here:
    sudo cat {vps.credential}
If sudo asks for no password on either machine, one line on your laptop does both:
    ssh vps sudo cat {vps.credential} | ssh pi sudo /opt/cerebrum-pi/generate_api_key.sh --rotate
Then run this here, which drops the old key:
    sudo {vps.script} --rotate
"""
    )
    copy = vps.copy("cerebrum-backend")
    assert copy.read_text() == vps.credential.read_text()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert copy.stat().st_uid == copy.parent.stat().st_uid

    pi.accept(key, "old")
    code, told, err = pi.keygen("--rotate", stdin=vps.credential.read_text())
    assert (code, err) == (0, "")
    assert (
        told
        == f"""{pi.credential}: has the new key.
Next, run this on the VPS, which drops the old key:
    sudo /opt/cerebrum-backend/generate_api_key.sh --rotate
"""
    )
    assert pi.credential.read_text() == pi.copy("cerebrum-cm4").read_text() == key + "\n"

    said = f"{vps.credential}: the old key is gone; the rotation is complete.\n"
    assert vps.keygen("--rotate", "--yes") == (0, said, "")
    assert vps.credential.read_text() == copy.read_text() == key + "\n"
    assert (vps.reloads("cerebrum-backend"), pi.reloads("cerebrum-cm4")) == (2, 1)
    assert len(vps.files()) == len(pi.files()) == 2, "nothing is left behind"


def test_a_rotation_in_env_files(vps: Machine, pi: Machine) -> None:
    ours = vps.put("opt/cerebrum-backend/.env", f"A=1\nexport {NAME} = 'old' \nB=2\n", 0o640)
    theirs = pi.put("opt/cerebrum-cm4/.env", f"A=3\n{NAME}=old\n")
    code, told, err = vps.keygen("--rotate")
    match = re.fullmatch(f"A=1\n{NAME}=({NEW}),old\nB=2\n", ours.read_text())
    assert match
    assert (code, err) == (0, "")
    assert f"\n    ssh vps sudo grep ^{NAME}= {ours} | ssh pi sudo " in told
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600
    pi.accept(match[1])
    assert pi.keygen("--rotate", stdin=f"{NAME}={match[1]},old\n")[0] == 0
    assert theirs.read_text() == f"A=3\n{NAME}={match[1]}\n"
    assert vps.keygen("--yes", "--rotate")[0] == 2
    assert vps.keygen("--rotate", "--yes")[0] == 0
    assert ours.read_text() == f"A=1\n{NAME}={match[1]}\nB=2\n"
    assert len(vps.files()) == len(pi.files()) == 1, "an .env needs no copy"


def test_the_key_of_the_clients_is_made_on_the_pi(pi: Machine) -> None:
    path = pi.put("credstore/CEREBRUM_CM4_API_KEY", "old\n", 0o600)
    code, told, err = pi.keygen("--rotate", str(path))
    assert (code, err) == (0, "")
    assert re.fullmatch(f"{NEW},old\n", path.read_text())
    assert (
        told
        == f"""{path}: made a new key; the old one is accepted as well.
Next, give each client the new key, which this shows before the comma:
    sudo cat {path}
Then run this here, which drops the old key:
    sudo {pi.script} --rotate {path}
"""
    )
    assert pi.keygen("--rotate", "--yes", str(path))[0] == 0
    assert re.fullmatch(f"{NEW}\n", path.read_text())


def test_without_a_terminal_the_old_key_is_dropped_only_with_yes(vps: Machine) -> None:
    vps.put(f"credstore/{NAME}", "new,old\n")
    code, told, err = vps.keygen("--rotate", stdin="y\n")
    assert (code, vps.credential.read_text()) == (1, "new,old\n")
    assert told.startswith(f"{vps.credential}: has a new key and an old one; both are accepted.\nNext, run this on")
    question = "there is no terminal to ask on. Does the Pi send the new one already? If so, add --yes"
    assert err == f"generate_api_key.sh: {question}\n"
    assert vps.reloads("cerebrum-backend") == 1, "the first step may have ended before it"


@pytest.mark.parametrize(("answer", "after"), [("y", "new\n"), ("", "new,old\n"), ("n", "new,old\n")])
def test_a_terminal_is_asked(vps: Machine, answer: str, after: str) -> None:
    vps.put(f"credstore/{NAME}", "new,old\n")
    screen = Terminal([str(vps.script), "--rotate"], {"PATH": f"{vps.folder}/bin:{os.environ['PATH']}"})
    try:
        screen.expect(f"{NAME} has a new key and an old one. Does the Pi send the new one already? [y/N] ")
        screen.type(answer + "\r")
        screen.expect("the rotation is complete." if answer == "y" else "which drops the old key:")
        assert screen.process.wait(PATIENCE) == 0
    finally:
        screen.close()
    assert vps.credential.read_text() == after


def test_a_unit_that_does_not_run_is_not_reloaded(vps: Machine) -> None:
    vps.put(f"credstore/{NAME}", "new,old\n")
    (vps.folder / "units/cerebrum-backend/active").unlink()
    code, told, err = vps.keygen("--rotate", "--yes")
    assert (code, err) == (0, "")
    assert told.endswith("\ncerebrum-backend does not run here; it reads the file when it starts.\n")
    assert vps.reloads("cerebrum-backend") == 0
    assert vps.files() == {str(vps.credential): b"new\n"}


def test_without_systemd_the_machine_and_the_file_are_named(tmp_path: Path) -> None:
    laptop = Machine(tmp_path / "laptop")
    laptop.put("bin/systemctl", "#!/bin/sh\nexit 127\n")
    env = laptop.put("opt/.env", f"{NAME}=old\n")
    assert laptop.keygen("--rotate", "vps", str(env))[0] == 0
    assert re.fullmatch(f"{NAME}={NEW},old\n", env.read_text())
    assert laptop.keygen("--rotate", "pi", str(env), stdin="key")[1].splitlines()[:3] == [
        "cerebrum-cm4 is not installed here, so nobody was asked whether the key is right.",
        f"{env}: has the new key.",
        "cerebrum-cm4 does not run here; it reads the file when it starts.",
    ]
    assert env.read_text() == f"{NAME}=key\n"


# ---------------------------------------------------------------------------------- one machine, one file

# A reload of a daemon that sends, or accepts, the keys that are in its copy. It notes what either then has.
NOTE = """cd {units}
echo "{unit} $(cat {folder}/run/cerebrum-backend/{name}) $(cat {folder}/run/cerebrum-cm4/{name} 2>/dev/null)" >>log
echo "$(wc -l <log) times" >{unit}/StatusText
"""


@pytest.fixture
def both(tmp_path: Path) -> Machine:
    """A machine with both daemons, which share a key file."""
    machine = Machine(tmp_path / "both", "cerebrum-backend", "cerebrum-cm4")
    machine.put(f"credstore/{NAME}", "old\n", 0o600)
    for unit in ("cerebrum-backend", "cerebrum-cm4"):
        machine.copy(unit).write_text("old\n")
        places = {"units": machine.folder / "units", "folder": machine.folder, "unit": unit, "name": NAME}
        machine.tell(unit, answer=NOTE.format(**places))
    return machine


def reloaded(machine: Machine) -> list[str]:
    """The unit of each reload, and the keys that the backend and the Pi then have."""
    log = machine.folder / "units/log"
    return [line.removeprefix("cerebrum-") for line in log.read_text().splitlines()] if log.exists() else []


def rotated(key: str, old: str = "old") -> list[str]:
    """What a whole rotation does. At each step the backend accepts the first key of the Pi."""
    return [
        f"backend {key},{old} {old}",
        f"cm4 {key},{old} {key},{old}",
        f"backend {key} {key},{old}",
        f"cm4 {key} {key}",
    ]


@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_one_call_rotates_the_key_of_both(both: Machine, yes: list[str]) -> None:
    code, told, err = both.keygen("--rotate", *yes)
    key = both.credential.read_text().strip()
    assert re.fullmatch(NEW, key)
    said = f"{both.credential}: has a new key, which cerebrum-backend and cerebrum-cm4 use; the rotation is complete.\n"
    assert (code, told, err) == (0, said, "")
    assert reloaded(both) == rotated(key)
    assert set(both.files().values()) == {f"{key}\n".encode()}


def test_an_interrupted_rotation_of_both_goes_on(both: Machine) -> None:
    both.put(f"credstore/{NAME}", "new,old\n", 0o600)
    assert both.keygen("--rotate")[0] == 0
    assert reloaded(both) == rotated("new")
    assert both.credential.read_text() == "new\n"


def test_a_pi_that_does_not_follow_keeps_a_key_that_is_accepted(both: Machine) -> None:
    shutil.rmtree(both.copy("cerebrum-cm4").parent)
    gone = f"{both.folder}/run/cerebrum-cm4 is gone; systemctl restart cerebrum-cm4 makes it"
    again = f"Once that is mended, to go on:  sudo {both.script} --rotate"
    said = f"{gone}. cerebrum-cm4 still sends a key that cerebrum-backend accepts. {again}"
    assert both.keygen("--rotate") == (1, "", f"generate_api_key.sh: {said}\n")
    keys = both.credential.read_text()
    assert re.fullmatch(f"{NEW},old\n", keys)
    assert both.copy("cerebrum-backend").read_text() == keys
    both.copy("cerebrum-cm4").parent.mkdir()
    assert both.keygen("--rotate")[0] == 0
    assert set(both.files().values()) == {f"{keys.partition(',')[0]}\n".encode()}


def test_step_by_step_the_pi_of_the_machine_follows(both: Machine) -> None:
    """For the other Pis of that backend."""
    assert both.keygen("--rotate", "vps")[0] == 0
    key = both.credential.read_text().partition(",")[0]
    assert reloaded(both) == rotated(key)[:2]
    assert both.keygen("--rotate", "vps", "--yes")[0] == 0
    assert reloaded(both) == rotated(key)


def test_the_key_of_the_clients_is_the_pis_where_both_are(both: Machine) -> None:
    path = both.put("credstore/CEREBRUM_CM4_API_KEY", "old\n", 0o600)
    assert both.keygen("--rotate", str(path))[0] == 0
    assert both.copy("cerebrum-cm4").with_name(path.name).read_text() == path.read_text()
    assert (both.reloads("cerebrum-backend"), both.reloads("cerebrum-cm4")) == (0, 1)
    assert both.credential.read_text() == "old\n"


@pytest.mark.parametrize("why", ["the backend does not run", "the key is in an .env"])
def test_where_both_share_no_running_backends_key_one_is_named(both: Machine, why: str) -> None:
    if why == "the key is in an .env":
        both.credential.unlink()
        both.put("opt/cerebrum-backend/.env", f"{NAME}=old\n")
    else:
        (both.folder / "units/cerebrum-backend/active").unlink()
    before = both.files()
    said = "both cerebrum-backend and cerebrum-cm4 are installed here: expected --rotate vps or --rotate pi"
    assert both.keygen("--rotate") == (2, "", f"generate_api_key.sh: {said}\n")
    assert (both.files(), reloaded(both)) == (before, [])


# ------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize("unit", ["cerebrum-backend", "cerebrum-cm4"])
def test_a_key_in_use_is_not_replaced(tmp_path: Path, unit: str) -> None:
    machine = Machine(tmp_path / "machine", unit)
    path = machine.put(f"credstore/{NAME}", "old\n", 0o600)
    said = f"{path} has a key that {unit} uses; --rotate exchanges it. To replace it at once, remove {path} first"
    assert machine.keygen("--write", str(path)) == (1, "", f"generate_api_key.sh: {said}\n")
    assert machine.files() == {str(path): b"old\n"}
    path.unlink()
    assert machine.keygen("--write", str(path))[0] == 0
    assert machine.copy(unit).read_text() == path.read_text()


def test_a_folder_that_is_gone_changes_nothing(vps: Machine) -> None:
    vps.put(f"credstore/{NAME}", "old", 0o600)
    vps.copy("cerebrum-backend").parent.rmdir()
    gone = f"{vps.folder}/run/cerebrum-backend is gone; systemctl restart cerebrum-backend makes it"
    assert vps.keygen("--rotate") == (1, "", f"generate_api_key.sh: {gone}. Nothing was changed\n")
    assert vps.files() == {str(vps.credential): b"old"}
    assert vps.reloads("cerebrum-backend") == 0


ANSWERS = [  # what happens to the first reload, what is said
    ("exit 1", "systemctl reload cerebrum-backend failed."),
    ("echo 'at 12:00 not reloaded, the old settings stay: X: bad' >{unit}/StatusText",
     "cerebrum-backend: at 12:00 not reloaded, the old settings stay: X: bad."),
    ("true", "cerebrum-backend has not said within -1 s that it has read its settings."),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["credential", "env"])
@pytest.mark.parametrize(("answer", "said"), ANSWERS)
def test_what_a_daemon_does_not_take_is_taken_back(vps: Machine, kind: str, answer: str, said: str) -> None:
    vps.script.write_text(vps.script.read_text().replace("RELOAD_SECONDS=10", "RELOAD_SECONDS=-1"))
    if kind == "credential":
        path = vps.put(f"credstore/{NAME}", "old", 0o600)
        vps.copy("cerebrum-backend").write_text("old")
    else:
        path = vps.put("opt/cerebrum-backend/.env", f"{NAME}='old'\n\nA=1", 0o640)
    before, unit = vps.files(), vps.folder / "units/cerebrum-backend"
    again = (
        f'if [ "$(wc -l <{unit}/calls)" = 1 ]; then {answer.format(unit=unit)}; else echo back >{unit}/StatusText; fi'
    )
    vps.tell("cerebrum-backend", answer=again)
    said = f"{said} {path} is as it was, and cerebrum-backend goes on with that"
    assert vps.keygen("--rotate") == (1, "", f"generate_api_key.sh: {said}\n")
    assert vps.files() == before
    assert vps.reloads("cerebrum-backend") == 2


def test_what_a_daemon_cannot_take_back_is_said(vps: Machine) -> None:
    vps.put(f"credstore/{NAME}", "old", 0o600)
    vps.tell("cerebrum-backend", answer="exit 1")
    said = (
        f"systemctl reload cerebrum-backend failed. {vps.credential} is as it was, but perhaps cerebrum-backend has "
        "the new content. To mend that:  systemctl restart cerebrum-backend"
    )
    assert vps.keygen("--rotate") == (1, "", f"generate_api_key.sh: {said}\n")
    assert vps.credential.read_text() == "old"


def test_settings_that_a_daemon_keeps_refusing_leave_it_as_it_was(vps: Machine) -> None:
    vps.put(f"credstore/{NAME}", "old", 0o600)
    status = vps.folder / "units/cerebrum-backend/StatusText"
    vps.tell("cerebrum-backend", answer=f"date '+%s.%N not reloaded, the old settings stay: X: bad' >{status}")
    code, out, err = vps.keygen("--rotate")
    assert (code, out) == (1, "")
    assert err.endswith(f": X: bad. {vps.credential} is as it was, and cerebrum-backend goes on with that\n")
    assert vps.credential.read_text() == vps.copy("cerebrum-backend").read_text() == "old"


def test_a_key_that_the_backend_refuses_changes_nothing(pi: Machine) -> None:
    pi.put(f"credstore/{NAME}", "old\n", 0o600)
    pi.accept("old")
    before = pi.files()
    said = "the key was not accepted, so nothing was changed. Was --rotate run on the VPS, and its new key given here?"
    code, out, err = pi.keygen("--rotate", stdin="mistyped\n")
    assert (code, out) == (1, "")
    assert err == f"FAIL  key       http://vps:9000 refuses our key (401)\ngenerate_api_key.sh: {said}\n"
    assert (pi.files(), pi.reloads("cerebrum-cm4")) == (before, 0)


@pytest.mark.parametrize("check", ["raise SystemExit('broken')", "print('FAIL  backend   cannot be reached')"])
def test_a_key_that_nobody_accepts_changes_nothing(pi: Machine, check: str) -> None:
    pi.put(f"credstore/{NAME}", "old\n", 0o600)
    (pi.folder / "opt/cerebrum-cm4/cm4d.py").write_text(check)
    code, out, err = pi.keygen("--rotate", stdin="new\n")
    assert (code, out, len(err.splitlines())) == (1, "", 2)
    assert pi.credential.read_text() == "old\n"


def test_the_key_that_the_pi_has_already(pi: Machine) -> None:
    pi.put(f"credstore/{NAME}", "same\n")
    pi.accept("same")
    code, told, _ = pi.keygen("--rotate", stdin="same\n")
    assert (code, told.splitlines()[0]) == (0, f"{pi.credential}: had this key already.")
    assert pi.reloads("cerebrum-cm4") == 1, "an earlier call may have ended before it"


def test_what_cannot_be_rotated(vps: Machine, pi: Machine, tmp_path: Path) -> None:
    none = Machine(tmp_path / "none")
    word = "expected --rotate vps or --rotate pi"
    env = vps.put("opt/cerebrum-backend/.env", f"#{NAME}=x\n")
    nothing = vps.folder / "nothing"
    cases: list[tuple[Machine, list[str], int, str]] = [
        (none, [], 2, f"neither cerebrum-backend nor cerebrum-cm4 is installed here: {word}, and a FILE"),
        (vps, [], 1, f"expected a key in {vps.credential}, {env}, found none that can be read: run this as root, or "
         "name the FILE"),
        (vps, [str(env)], 1, f"{env}: expected a key, found none; --write makes one, --set takes one over"),
        (vps, [str(nothing)], 1, f"{nothing}: expected a file that can be read; run this as root"),
        (vps, ["/a", "/b"], 2, "expected one FILE, got /a and /b"),
        (vps, ["--force"], 2, "expected --rotate [vps|pi] [--yes] [FILE], got --force"),
    ]  # fmt: skip
    for machine, args, status, said in cases:
        assert machine.keygen("--rotate", *args) == (status, "", f"generate_api_key.sh: {said}\n")
    env.write_text(f"{NAME}=old\n")
    vps.put(f"credstore/{NAME}", "other\n")
    said = f"{env}: {vps.credential} takes precedence; rotate that"
    assert vps.keygen("--rotate", str(env)) == (1, "", f"generate_api_key.sh: {said}\n")
    assert env.read_text() == f"{NAME}=old\n"


# ----------------------------------------------------------------------------------- secrecy, durability

TOOLS = "base64 cat chown cp grep head mkdir mktemp mv python3 readlink realpath rm sleep sync tr wc"


def test_the_key_is_on_no_command_line_and_in_no_environment(vps: Machine, pi: Machine) -> None:
    """And a file is on the disk before it replaces another one."""
    for machine in (vps, pi):
        machine.put(f"credstore/{NAME}", "old-key-of-both\n")
        for tool in TOOLS.split():
            real = sys.executable if tool == "python3" else shutil.which(tool)
            log = machine.folder / "log"
            spy = f'#!/bin/bash\n{{ echo "CALL {tool} $*"; /usr/bin/env; }} >>{log}\nexec {real} "$@"\n'
            machine.put(f"bin/{tool}", spy)
    assert vps.keygen("--rotate")[0] == 0
    key = vps.credential.read_text().partition(",")[0]
    pi.accept(key)
    assert pi.keygen("--rotate", stdin=key)[0] == 0
    assert vps.keygen("--rotate", "--yes")[0] == 0
    for machine in (vps, pi):
        seen = (machine.folder / "log").read_text()
        assert key not in seen
        assert "old-key-of-both" not in seen
        written = re.findall(rf"CALL (sync|mv)\b.*?({machine.credential}\.\w+)", seen)
        steps = [(written[n], written[n + 1]) for n in range(0, len(written), 2)]
        assert steps == [(("sync", draft), ("mv", draft)) for (_, draft), _ in steps]
        assert len(steps) == machine.reloads("cerebrum-backend") + machine.reloads("cerebrum-cm4")


# ----------------------------------------------------------------------------------------- real daemons


@contextlib.contextmanager
def statuses(machine: Machine, unit: str) -> Iterator[str]:
    """Keeps the unit's StatusText as the daemon tells it to systemd. Yields its NOTIFY_SOCKET."""
    path = machine.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))

        def listen() -> None:
            while told := heard.recv(65536).decode():
                for status in re.findall(r"(?m)^STATUS=(.*)$", told):
                    machine.tell(unit, **{"StatusText.new": status})
                    os.replace(*(machine.folder / "units" / unit / name for name in ("StatusText.new", "StatusText")))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield str(path)
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ending:
                ending.sendto(b"", str(path))
            thread.join(PATIENCE)


@pytest.mark.slow
def test_no_request_is_refused_while_the_key_is_rotated(vps: Machine, pi: Machine, tmp_path: Path) -> None:
    def places(machine: Machine, unit: str, notify: str) -> dict[str, str]:
        return {
            "CREDENTIALS_DIRECTORY": str(machine.folder / "credstore"),
            "RUNTIME_DIRECTORY": str(machine.folder / "run" / unit),
            "NOTIFY_SOCKET": notify,
        }

    for machine in (vps, pi):
        machine.put(f"credstore/{NAME}", "the-old-key\n", 0o600)
    with contextlib.ExitStack() as stack:
        notify = stack.enter_context(statuses(vps, "cerebrum-backend"))
        easy = {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MIN_FREE_MB": "0"}
        models = {"CEREBRUM_MODELS_DIR": str(FILES["qwen_0_5b"].parent)}
        settings = easy | models | places(vps, "cerebrum-backend", notify)
        vpsd = stack.enter_context(daemon("vpsd", tmp_path / "vpsd", **settings))
        notify, url = stack.enter_context(statuses(pi, "cerebrum-cm4")), f"http://127.0.0.1:{vpsd.port}"
        settings = {"CEREBRUM_VPS_URL": url, **places(pi, "cerebrum-cm4", notify)}
        cm4d = stack.enter_context(daemon("cm4d", tmp_path / "cm4d", **settings))
        vps.tell("cerebrum-backend", pid=str(vpsd.process.pid))
        pi.tell("cerebrum-cm4", pid=str(cm4d.process.pid), ExecStart=f"{{ argv[]=/x {ROOT}/cm4d.py ; }}")
        client, backend = Client(port=cm4d.port), Client(port=vpsd.port)

        async def status(key: str) -> int:
            return (await backend.get("/v1/models", X_API_Key=key)).status

        async def scenario() -> None:
            stop, served = asyncio.Event(), list[int]()

            async def ask_forever() -> None:
                while not stop.is_set():
                    reply = await client.ask("POST", "/v1/complete", QUESTION, X_API_Key=KEY)
                    assert reply.status == 200, reply.body
                    served.append(reply.status)

            async def served_more() -> None:
                count = len(served)
                await until(lambda: len(served) > count + 2 or asking.done(), "requests")

            async def rotate(machine: Machine, *args: str, stdin: str = "") -> tuple[int, str, str]:
                return await asyncio.to_thread(
                    machine.keygen, "--rotate", *args, stdin=stdin, CEREBRUM_VPS_URL=url, CEREBRUM_CM4_PORT="0"
                )

            asking = asyncio.create_task(ask_forever())
            await served_more()
            code, _, err = await rotate(vps)
            assert (code, err) == (0, "")
            key = vps.credential.read_text().partition(",")[0]
            assert [await status(one) for one in ("the-old-key", key, f"{key},the-old-key")] == [200, 200, 401]
            await served_more()
            code, _, err = await rotate(pi, stdin="a-mistyped-key")
            assert code == 1
            assert "refuses our key (401)" in err
            await served_more()
            code, _, err = await rotate(pi, stdin=vps.credential.read_text())
            assert (code, err) == (0, "")
            await served_more()
            code, _, err = await rotate(vps, "--yes")
            assert (code, err) == (0, "")
            assert [await status("the-old-key"), await status(key)] == [401, 200]
            await served_more()
            stop.set()
            await asking

        run(scenario())
