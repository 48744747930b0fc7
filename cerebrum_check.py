"""What `cm4d.py --check` and `vpsd.py --check` have in common: how findings are told, and what both machines need.

    ok    python    3.13.5
    warn  clock     the kernel says that it is not synchronized: timedatectl set-ntp true
    FAIL  port      0.0.0.0:7000 is taken by another program: ss -ltnp 'sport = :7000' names it

Each finding is a line on standard output, and says what to do. The status is 1 if there is a FAIL, else 0. Keys are
never printed. A check changes nothing, works beside the running daemon or without it, and goes on after a fault as far
as that makes sense. Every question to another program or machine ends within seconds.

Loaded only for --check. `begin` runs before the daemon's own imports: these fail where files are missing or of
different versions. cerebrum_check_pi.py and cerebrum_check_vps.py look at what only one of the two has. The standard
library is enough for this module.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import difflib
import errno
import http.client
import importlib
import importlib.util
import json
import os
import platform
import pwd
import queue
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cerebrum_common import VERSION, ConfigError, Environment, printable, read_environment, without_keys
from cerebrum_service import MAX_LOG_BYTES, OLD_LOGS

T = TypeVar("T")
MB = 1 << 20

ASK_SECONDS = 5.0  # for another program or machine to answer
CREDENTIALS = Path("/etc/credstore")  # where the units' LoadCredential= looks
AS_ROOT = "run this as root (sudo)"
NOWHERE = Path("/nonexistent")  # a folder without .env
SAME_VERSION = "copy all files of one version here again"
PACKAGES = {"llama_cpp": "0.3.36", "numpy": "", "psutil": ""}  # of vpsd, whose ctypes calls are of this version

# ---------------------------------------------------------------------------------------------- findings


class Report:
    """Prints findings. `secrets` are replaced by *** wherever they turn up."""

    def __init__(self) -> None:
        self.failed = False
        self.secrets: list[str] = []

    def ok(self, name: str, text: str) -> None:
        self._print("ok", name, text)

    def warn(self, name: str, text: str) -> None:
        self._print("warn", name, text)

    def fail(self, name: str, text: str) -> None:
        self.failed = True
        self._print("FAIL", name, text)

    def _print(self, level: str, name: str, text: str) -> None:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        try:
            print(f"{level:<5} {name:<9} {printable(text)}", flush=True)
        except OSError:  # nobody reads on, as in `--check | head -1`
            os._exit(1)


# ----------------------------------------------------------------------------------- before the imports


def begin(daemon: Path, packages: Mapping[str, str]) -> bool:
    """Tell whether Python, the packages and the files of a daemon can be used. False if its imports would fail.

    `packages` maps the names of modules to the version that is expected ("": any).
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    report = Report()
    report.ok("python", f"{platform.python_version()}, {sys.executable}")
    for name, expected in packages.items():
        check_package(report, name, expected)
    problems = unfit_files(daemon)
    for problem in problems:
        report.fail("files", f"{problem}: {SAME_VERSION}")
    if not problems:
        report.ok("files", f"{daemon.parent} has all of version {VERSION}")
    return not report.failed


def check_package(report: Report, name: str, expected: str) -> None:
    if not importlib.util.find_spec(name):
        report.fail("packages", f"{sys.executable} lacks {name}: use the daemon's own Python, such as venv/bin/python")
        return
    try:
        got = importlib.import_module(name).__version__
    except Exception as error:  # what a broken library raises when it is loaded may be anything
        report.fail(
            "packages", f"{name} cannot be loaded ({error}): install it again with pip install --force-reinstall"
        )
        return
    if expected and got != expected:
        again = f"{sys.executable} -m pip install llama-cpp-python=={expected}"
        report.warn("packages", f"{name}: expected {expected}, got {got}, whose C functions may differ: {again}")
    else:
        report.ok("packages", f"{name} {got}")


def unfit_files(daemon: Path) -> list[str]:
    """What keeps the modules beside a daemon from working together: one is missing or damaged, or lacks a name that
    another one imports, as happens where files of two versions lie beside each other. Nothing is imported."""
    problems, names, wanted = [], dict[str, set[str]](), list[tuple[str, str, str]]()
    todo = [daemon.stem]
    while todo:
        module = todo.pop()
        if module in names:
            continue
        names[module] = set()
        try:
            tree = ast.parse((daemon.parent / f"{module}.py").read_bytes())
        except OSError as error:
            problems.append(f"{module}.py cannot be read ({error.strerror})")
        except (SyntaxError, ValueError) as error:
            problems.append(f"{module}.py is damaged ({error})")
        else:
            names[module], imported = names_in(tree)
            wanted += [(module, *pair) for pair in imported]
            todo += [other for other, _ in imported]
    for module, other, name in wanted:
        if names[other] and name and name not in names[other]:
            problems.append(f"{module}.py expects {name} in {other}.py")
    return problems


def names_in(tree: ast.Module) -> tuple[set[str], list[tuple[str, str]]]:
    """All names that a module gives a value anywhere, which are at least those that can be imported from it; and what
    it imports from our modules, as (module, name), with "" for a module as a whole."""
    names, imported = set[str](), list[tuple[str, str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cerebrum_"):
            imported += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            imported += [(alias.name, "") for alias in node.names if alias.name.startswith("cerebrum_")]
    return names, imported


# ----------------------------------------------------------------------------------------- configuration

# Every variable that a program of ours reads. Those of either daemon may be in one .env.
SHORT_NAMES = (
    *("API_KEY", "ALLOWED_HOSTS", "ALLOWED_ORIGINS", "MAX_CONCURRENT", "MODELS_FILE"),
    *("LOG_LEVEL", "LOG_FILE", "LOG_PROMPTS", "CM4_HOST", "CM4_PORT", "VPS_URL", "CM4_API_KEY"),
    *("VPS_HOST", "VPS_PORT", "MODELS_DIR", "STATE_DIR", "THREADS", "N_CTX", "KV_TYPE", "CACHE_MB", "DRAFT"),
    *("MAX_CPU_PERCENT", "MIN_FREE_MB", "IDLE_MINUTES", "URL"),
)
KNOWN = frozenset(f"CEREBRUM_{name}" for name in SHORT_NAMES)
MIN_KEY_CHARACTERS = 16  # 43 is what generate_api_key.sh makes
STAND_IN = '[[models]]\nid = "none"\nname = "none"\nparameters = "0"\nquantization = "none"\nfile = "none"\n'


@dataclass(frozen=True)
class Settings(Generic[T]):
    """What could be read of the configuration. `bad` are the variables that were left out since they are wrong. Without
    `has_catalog`, models.toml was left out as well: models and backends are unknown. `hidden` says why there may be
    keys that could not be read; then no advice may overwrite them."""

    environ: Environment
    config: T
    bad: frozenset[str]
    has_catalog: bool
    hidden: str


def by_hand(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command that a person runs: with the folder of systemd's credentials, if it can be read."""
    readable = os.access(CREDENTIALS, os.R_OK | os.X_OK)
    return {**({"CREDENTIALS_DIRECTORY": str(CREDENTIALS)} if readable else {}), **environ}


def check_configuration(
    report: Report, folder: Path, load: Callable[[Environment], T], unit: str
) -> Settings[T] | None:
    """Read the configuration, and tell each fault of it. `load` raises ConfigError, whose text begins with the name of
    the wrong variable. None if nothing can be made of it."""
    values, faults = read_all(report, folder)
    hidden = ""
    if CREDENTIALS.is_dir() and "CREDENTIALS_DIRECTORY" not in by_hand(os.environ):
        report.warn("config", f"{CREDENTIALS} cannot be read, where the key may be: {AS_ROOT}")
        hidden = f"not known without root: {AS_ROOT}"
    elif faults:
        hidden = "not known until the file named above can be read"
    environ = Environment(dict(values))
    report.secrets += [key for name in values if name.endswith("KEY") for key in secrets_in(environ, name)]
    complaints, bad = len(faults), {fault.partition(":")[0] for fault in faults}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as stand_in:
        stand_in.write(STAND_IN)
        stand_in.flush()
        config = None
        while config is None:
            try:
                config = load(Environment(values))
            except ConfigError as error:
                complaints += 1
                report.fail("config", f"{error}: correct it in {place_of(str(error), folder)}")
                name = str(error).partition(":")[0]
                bad.add(name)
                if values.pop(name, ""):
                    continue
                if values.get("CEREBRUM_MODELS_FILE") == stand_in.name:
                    return None
                values["CEREBRUM_MODELS_FILE"] = stand_in.name
        has_catalog = values.get("CEREBRUM_MODELS_FILE") != stand_in.name
    models = Path(environ.text("CEREBRUM_MODELS_FILE", str(folder / "models.toml"))).expanduser()
    complaints += check_readable(report, (folder / ".env", models, *sorted(folder.glob("*.py"))), unit)
    if not complaints:
        report.ok(
            "config", f"{folder / '.env'}" if os.path.exists(folder / ".env") else f"no .env in {folder}: defaults"
        )
    return Settings(Environment(values), config, frozenset(bad), has_catalog, hidden)


def read_all(report: Report, folder: Path) -> tuple[dict[str, str], list[str]]:
    """The variables as `read_environment` has them, and what is wrong with their files. A .env that cannot be read does
    not hide the credentials, nor they the .env."""
    given = by_hand(os.environ)
    plain = {name: text for name, text in given.items() if name not in ("CREDENTIALS_DIRECTORY", "RUNTIME_DIRECTORY")}
    values, faults = dict[str, str](), list[str]()
    for environ, place in ((plain, folder), (given, NOWHERE)):
        try:
            values |= read_environment(environ, place).values
        except (ConfigError, OSError) as error:
            faults.append(str(error))
            report.fail("config", f"{error}: {mend_file(str(error))}; what follows does without it")
            values |= environ
    return values, faults


def mend_file(fault: str) -> str:
    """What helps if a file of the configuration cannot be read."""
    if "Is a directory" in fault:
        return "remove this folder, a file is expected there"
    return AS_ROOT if "Permission denied" in fault and os.geteuid() != 0 else "correct this file"


def check_readable(report: Report, files: Iterable[Path], unit: str) -> int:
    """Whether the unit's user may read the daemon's files: root, who runs this, may read all of them. Returns how many
    complaints there were; a folder that keeps the user out of several files is told once."""
    user, told = user_of(unit), set[Path]()
    for path in files:
        place = obstacle(path, user, os.R_OK) if user and os.path.isfile(path) else None
        if not user or not place or place in told:
            continue
        told.add(place)
        if place.name == ".env":  # it may hold a key
            mend = f"chown {user.pw_name}: {place}; chmod 600 {place}"
        else:
            mend = f"chmod {'a+rx' if place.is_dir() else 'a+r'} {place}"
        report.fail("config", f"{user.pw_name} may not read {path}: {mend}")
    return len(told)


def place_of(complaint: str, folder: Path) -> str:
    """Where the value is that a ConfigError complains about."""
    name = complaint.partition(":")[0]
    if name in os.environ:
        return "the environment"
    is_variable = name in KNOWN and name != "CEREBRUM_MODELS_FILE"
    return str(key_file(name, folder) or folder / ".env") if is_variable else "models.toml"


def secrets_in(environ: Environment, name: str) -> list[str]:
    return [key.strip() for key in environ.text(name).split(",") if len(key.strip()) > 3]


def check_names(report: Report, environ: Environment, others: Collection[str] = ()) -> None:
    """Warn of variables that no program of ours knows. `others` are those that models.toml names."""
    for name in sorted(environ.values):
        if name.startswith("CEREBRUM_") and name not in KNOWN and name not in others:
            near = difflib.get_close_matches(name.replace("CEREBRUM_", "", 1), SHORT_NAMES, 1)
            hint = f"did you mean CEREBRUM_{near[0]}?" if near else 'README.md, "Configuration", lists those there are'
            report.warn("config", f"{name} is set, and nothing reads it: {hint}")


def key_file(name: str, folder: Path) -> Path | None:
    """The file that a key comes from: a credential or the .env. None if neither has it."""
    credential = Path(by_hand(os.environ).get("CREDENTIALS_DIRECTORY", "/nonexistent")) / name
    if os.path.isfile(credential):
        return credential
    try:
        values = read_environment({}, folder).values
    except (ConfigError, OSError):
        return None
    return folder / ".env" if name in values else None


def key_script(folder: Path) -> str:
    """How generate_api_key.sh is called, which may lie beside the daemon."""
    beside = folder / "generate_api_key.sh"
    return str(beside) if beside.is_file() else f"./{beside.name}"


def check_key(report: Report, environ: Environment, name: str, folder: Path) -> None:
    """Tell how good a key is that is set: long enough, alone, and not readable by everybody. In a folder that others
    may not enter, the file's own mode does not matter."""
    keys = environ.keys(name)
    if any(len(key) < MIN_KEY_CHARACTERS for key in keys):
        found = f"{name} has fewer than {MIN_KEY_CHARACTERS} characters, which can be guessed"
        report.warn("key", f"{found}: {key_script(folder)} makes a good one")
    if len(keys) > 1:
        report.warn("key", f"{name} has {len(keys)} keys: {key_script(folder)} --rotate ends the rotation")
    file = key_file(name, folder)
    is_open = file and stat.S_IMODE(file.stat().st_mode) & 0o077 and file.parent.stat().st_mode & 0o011
    if is_open and name not in os.environ:
        report.warn("key", f"other users can read {file}, which holds {name}: chmod 600 {file}")


# ------------------------------------------------------------------------------------------- the network


def within(seconds: float, function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns or raises; TimeoutError if that takes longer. Its thread is then left behind: nobody
    can cancel the lookup of a name, and it must not hold up the end of the program."""
    results: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(*arguments), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error:
        raise error
    return result  # type: ignore[return-value]  # None only if that is what the function returned


def ask_health(host: str, port: int) -> dict[str, Any]:
    """What /health says at an address of this machine; {} if nobody answers in JSON."""

    def ask() -> Any:
        connection = http.client.HTTPConnection(host, port, timeout=ASK_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read(65_536))

    try:
        told = within(ASK_SECONDS, ask)
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where to reach who listens on all addresses


def check_port(report: Report, host: str, port: int, names: tuple[str, str], mark: str) -> dict[str, Any]:
    """Whether a daemon can listen there, or does so already: the JSON of our /health has the member `mark`. Returns
    that JSON, {} if our daemon does not run. `names` are the variables of host and port."""
    try:
        found = within(ASK_SECONDS, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    except OSError as error:
        report.fail(
            "port", f"{host} is no address: {error.strerror or 'the name was not found in time'}: see {names[0]}"
        )
        return {}
    for family, _, _, _, address in found:
        if binding(family, (address[0], 0, *address[2:])):
            report.fail("port", f"this machine has no address {host} now: `ip address` lists its own; see {names[0]}")
            return {}
        number = binding(family, address)
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if number == errno.EACCES:
            report.fail("port", f"{where}: only root may listen there: choose a port from 1024 on as {names[1]}")
        elif number == errno.EADDRINUSE:
            told = ask_health(LOCAL.get(str(address[0]), str(address[0])), port)
            if mark in told:
                report.ok("port", f"{where}: our daemon answers there")
                return told
            report.fail("port", f"{where} is taken by another program: ss -ltnp 'sport = :{port}' names it")
        elif number:
            report.fail("port", f"{where}: {os.strerror(number)}")
        else:
            continue
        return {}
    report.ok("port", f"{host} port {port} is free" if port else f"{host}, a port that the kernel chooses")
    return {}


def binding(family: int, address: Any) -> int:
    """Bind to an address and let it go: the error's number, 0 if it can be had."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0


# ------------------------------------------------------------------------------------------- the machine

TIME_ERROR = 5  # what adjtimex(2) returns while the clock is not synchronized
TIMEX_BYTES = 512  # more than struct timex has on any machine
SYNCHRONIZE = "timedatectl set-ntp true"


def check_kernel_clock(report: Report) -> None:
    """Whether the kernel takes its clock for synchronized. Nothing is said where it does not tell, as in some
    containers."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    state = adjtimex(ctypes.create_string_buffer(TIMEX_BYTES)) if adjtimex else -1
    if state == TIME_ERROR:
        report.warn("clock", f"the kernel says that it is not synchronized: {SYNCHRONIZE}")
    elif state >= 0:
        report.ok("clock", "synchronized")


def systemctl(*arguments: str) -> str:
    """What `systemctl` prints; "" where there is none, or no systemd."""
    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            env=without_keys(os.environ),
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def user_of(unit: str) -> pwd.struct_passwd | None:
    """The user that a unit runs as, if it is installed. None: the daemon is run by whoever runs this."""
    name = systemctl("show", "--property=User", "--value", unit)
    try:
        return pwd.getpwnam(name) if name else None
    except KeyError:
        return None


def may(path: Path, user: pwd.struct_passwd | None, mode: int) -> bool:
    """Whether the user may read (os.R_OK) or write (os.W_OK) a file or folder, by owners and modes. None: whoever runs
    this. OSError if that cannot be looked at."""
    return obstacle(path, user, mode) is None


def obstacle(path: Path, user: pwd.struct_passwd | None, mode: int) -> Path | None:
    """The file or folder whose mode keeps the user from what `may` asks; None if nothing does. A folder above `path`
    comes first."""
    mode |= os.X_OK if path.is_dir() else 0
    if user is None:
        return None if os.access(path, mode) else path
    groups = os.getgrouplist(user.pw_name, user.pw_gid)

    def allows(place: Path, bits: int) -> bool:
        found = place.stat()
        shift = 6 if found.st_uid == user.pw_uid else 3 if found.st_gid in groups else 0
        return user.pw_uid == 0 or found.st_mode >> shift & bits == bits

    closed = (place for place in reversed(path.resolve().parents) if not allows(place, os.X_OK))
    return next(closed, None if allows(path, mode) else path)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def check_folder(report: Report, name: str, folder: Path, unit: str, need_mb: float, what: str) -> None:
    """Whether the daemon may write to a folder of its own, and its disk has room for `what`."""
    user = user_of(unit)
    if user and not os.path.exists(folder):
        report.ok(name, f"{folder} is made when the unit starts")
        return
    found = existing(folder)
    who = user.pw_name if user else "you"
    if not os.path.isdir(found):
        mend = "remove this file" if found == folder else f"remove this file, or choose another folder than {folder}"
        report.fail(name, f"{found} is a file, expected a folder: {mend}")
        return
    try:
        if not may(found, user, os.W_OK):
            mend = (
                f"chown -R {who}: {found}" if user else "run this as the user of the daemon, or choose another folder"
            )
            report.fail(name, f"{who} may not write to {found}: {mend}")
            return
        free = shutil.disk_usage(found).free / MB
    except OSError as error:
        report.fail(name, f"{found}: {error.strerror}")
        return
    text = f"{folder}: {who} may write there, {free:,.0f} MB are free"
    if free < need_mb:
        report.warn(name, f"{text}; {what} can take {need_mb:,.0f} MB: make room on that disk")
    else:
        report.ok(name, text)


def check_log(report: Report, file: str, unit: str) -> None:
    """Whether the daemon can write its log."""
    if not file:
        report.ok("log", "to standard output, or systemd's journal, alone")
        return
    path, user = Path(file), user_of(unit)
    if os.path.isdir(path):
        report.fail("log", f"{path} is a folder, expected a file: remove it")
        return
    if os.path.exists(path) and not may(path, user, os.W_OK):
        who = user.pw_name if user else "you"
        report.fail("log", f"{who} may not write {path}: chown {who}: {path}")
        return
    check_folder(report, "log", path.parent, unit, MAX_LOG_BYTES * (OLD_LOGS + 1) / MB, "the log")
