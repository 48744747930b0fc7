"""`cm4d.py --check` and `vpsd.py --check`: what keeps a daemon from working and how to mend it, one
finding a line.

    ok    key       CEREBRUM_API_KEY is set
    warn  version   vps has 0.1.0, this is 0.2.0: copy all files of one version
    FAIL  address   0.0.0.0 port 7000 is taken: `ss -ltnp 'sport = :7000'` shows by whom

The exit status is 1 if there is a FAIL, else 0. A check changes nothing, prints no key and works
beside the running daemon. Requests to other machines end within seconds. Wrong settings end the
check, since the rest depends on them.

The daemons pass their own `load_config` and `Backend`, because no module imports a daemon. Standard
library only, except for the VPS's part.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from cerebrum.fields import printable
from cerebrum.settings import ConfigError, Environment, read_environment
from cerebrum_common import VERSION, HttpError, Model, log

Load = Callable[[Environment], Any]  # load_config: raises ConfigError
Make = Callable[[Any, Sequence[Model]], Any]  # cm4d's Backend
MB = 1 << 20
ASK_SECONDS = 5.0  # for an answer from this machine
BACKEND_SECONDS = 15.0  # for answers from all backends, which are asked at the same time
MAX_BYTES = 1 << 16
CREDENTIALS = Path("/etc/credstore")  # where the units' LoadCredential= looks
SOCKET_UNITS = [
    Path(f"/{place}/systemd/system/cerebrum-backend.socket") for place in ("etc", "usr/lib")
]
SET_KEY = "`generate_api_key.sh --set FILE` sets it"
MIN_KEY_CHARACTERS = 16  # generate_api_key.sh makes 43
PI_MB = 64  # of memory: cm4d takes 36, its clients need more
BARE_MB = 150  # memory of vpsd without a model: 90 at its start, plus connections
SYSTEM_MB = 250  # memory that a small Debian takes, with Tailscale
SPARE_MB = 512  # for memory that a model's estimate leaves out, and for reading its file
LLAMA_CPP = (
    "0.3.36"  # the version of llama-cpp-python whose C structures cerebrum/vps/llama.py knows
)


RENAMED = {"CEREBRUM_MIN_TOKENS_PER_SECOND": "CEREBRUM_HINT_SECONDS takes its place"}


class Report:
    """Prints findings."""

    status = 0  # the exit status

    def add(self, level: str, name: str, text: str) -> None:
        """`level` is "ok", "warn" or "FAIL"."""
        self.status |= level == "FAIL"
        print(f"{level:<5} {name:<9} {printable(text)}", flush=True)


def begin(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function in a thread that does not delay the program's end: looking up a name may
    hang.
    """
    future = Future[Any]()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


# ------------------------------------------------------------------------------------ both machines


def read_settings(report: Report, folder: Path, load: Load) -> Any:
    """The daemon's Config; None if a setting is wrong."""
    given, place = dict(os.environ), (folder / ".env").resolve()  # a link in the packages
    if os.access(CREDENTIALS, os.R_OK | os.X_OK):
        given.setdefault("CREDENTIALS_DIRECTORY", str(CREDENTIALS))
    elif CREDENTIALS.is_dir() and "CREDENTIALS_DIRECTORY" not in given:
        report.add(
            "warn",
            "settings",
            f"{CREDENTIALS} cannot be read and may hold keys: run this as root (sudo)",
        )
    try:
        environ = read_environment(given, folder)
        config = load(environ)
    except ConfigError as error:
        report.add(
            "FAIL", "settings", f"{error}: correct it in the environment, {place} or models.toml"
        )
        return None
    report.add("ok", "settings", f"those of the environment, {place} and models.toml are valid")
    with contextlib.suppress(OSError):
        known = {
            *re.findall(r"CEREBRUM_\w+", (folder / ".env.example").read_text()),
            "CEREBRUM_URL",
        }  # the REPL's
        named = {one.key_env for one in getattr(config, "backends", ())}
        for name in sorted(environ.values.keys() - known - named):
            if name.startswith("CEREBRUM_"):
                mend = RENAMED.get(name, ".env.example lists all variables")
                report.add("warn", "settings", f"nothing reads {name}: {mend}")
    return config


def check_key(report: Report, name: str, keys: Sequence[str], missing: str = "") -> None:
    """Check the key of a variable. `missing` says how to set the key if there is none; "" if the
    key is optional.
    """
    if not any(keys):
        report.add(
            "FAIL" if missing else "ok",
            "key",
            f"{name} is not set: {missing or 'clients need none'}",
        )
    elif any(len(key) < MIN_KEY_CHARACTERS for key in keys):
        report.add(
            "warn",
            "key",
            f"{name} is short enough to be guessed: generate_api_key.sh makes a better one",
        )
    else:
        report.add("ok", "key", f"{name} is set")


def check_address(report: Report, host: str, port: int, prefix: str, mark: str) -> None:
    """Check that the daemon can listen on this address, or already does: only its /health has the
    member `mark`.
    """
    address: Any = (host,)
    try:
        found = begin(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        for family, *_, address in found.result(ASK_SECONDS):
            socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:  # the look-up's TimeoutError is an OSError
        if getattr(error, "errno", 0) != errno.EADDRINUSE:
            reason = (getattr(error, "strerror", "") or "no address is known for it").partition(
                " (while"
            )[0]
            report.add(
                "FAIL",
                "address",
                f"{host} port {port}: {reason}: correct {prefix}_HOST or {prefix}_PORT",
            )
        elif has_health(address[0], port, mark):
            report.add("ok", "address", f"our daemon answers on {host} port {port}")
        else:
            report.add(
                "FAIL",
                "address",
                f"{host} port {port} is taken: `ss -ltnp 'sport = :{port}'` shows by whom",
            )
    else:
        report.add("ok", "address", f"{host} port {port} is free")


def has_health(host: str, port: int, member: str) -> bool:
    """Whether the answer to GET /health at an address of this machine has this member, with TLS or
    without.
    """
    unchecked = (
        ssl._create_unverified_context()
    )  # this machine's own certificate names another host
    plain = http.client.HTTPConnection(host, port, timeout=ASK_SECONDS)
    secure = http.client.HTTPSConnection(host, port, timeout=ASK_SECONDS, context=unchecked)
    for connection in (plain, secure):
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", "/health", headers={"Host": "localhost"})
            if f'"{member}"'.encode() in connection.getresponse().read(MAX_BYTES):
                return True
    return False


# ------------------------------------------------------------------------------------------- the Pi


def check_pi(folder: Path, load: Load, make: Make) -> int:
    """Print all findings, and return the exit status."""
    report = Report()
    if config := read_settings(report, folder, load):
        if config.client_keys or config.clients is None:
            check_key(report, "CEREBRUM_CM4_API_KEY", config.client_keys)
        check_clients(report, config)
        needed = {
            one.variable: [one.key]
            for one in config.backends
            if one.key_env or one.api == "cerebrum"
        }
        for name in sorted(needed):
            check_key(report, name, needed[name], SET_KEY)
        check_address(report, config.host, config.port, "CEREBRUM_CM4", "vps_available")
        available = (
            int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) // 1024
        )
        wanted = "" if available >= PI_MB else f", expected {PI_MB}: end other programs"
        report.add("warn" if wanted else "ok", "memory", f"{available:,} MB are available{wanted}")
        check_backends(report, config, make)
    return report.status


def check_clients(report: Report, config: Any) -> None:
    """Check who else can see the clients' keys."""
    if config.clients is not None:
        short = [
            client.name for key, client in config.clients.items() if len(key) < MIN_KEY_CHARACTERS
        ]
        told = f"{len(config.clients)} clients have names: {', '.join(config.names) or 'none yet'}"
        report.add(
            "warn" if short else "ok",
            "key",
            told + "".join(f"; the key of {name} is short" for name in short),
        )
    if (config.client_keys or config.clients) and not config.tls:
        report.add(
            "warn",
            "key",
            "clients' keys cross the LAN in clear: CEREBRUM_CM4_TLS_CERT encrypts them",
        )


def check_backends(report: Report, config: Any, make: Make) -> None:
    """Check that each backend can be reached and takes our key, and check its version and models. A
    fault is a FAIL only if no other backend can serve a completion.
    """
    log.addHandler(logging.NullHandler())  # a probe's log lines come as findings
    answers = [
        (one, begin(asyncio.run, ask_backend(one, config.models, make))) for one in config.backends
    ]
    wait((future for _, future in answers), BACKEND_SECONDS)
    seen = []
    for one, future in answers:
        try:
            seen.append((one, *future.result(0.0)))
        except Exception as error:  # from the look-up or the certificates, or TimeoutError
            reason = getattr(error, "strerror", None) or str(error) or "it did not answer in time"
            seen.append((one, None, "", reason))
    lacking = (
        "warn" if any(backend.models for _, backend, _, trouble in seen if not trouble) else "FAIL"
    )
    for one, backend, version, trouble in seen:
        if trouble:
            mend = SET_KEY if "our key" in trouble else "look whether it runs and has this address"
            report.add(
                lacking, "backend", f"{one.id} ({one.endpoint.authority}): {trouble}: {mend}"
            )
            continue
        taken = " and takes our key" if one.key else ""
        report.add("ok", "backend", f"{one.id} answers in {backend.response_ms or 0:.0f} ms{taken}")
        if one.api == "cerebrum" and version != VERSION:
            report.add(
                "warn",
                "version",
                f"{one.id} has {version}, this is {VERSION}: copy all files of one version",
            )
        if backend.models:
            report.add("ok", "models", f"{one.id} has {', '.join(backend.models)}")
        else:
            mend = (
                "`vpsd.py fetch` there gets one"
                if one.api == "cerebrum"
                else "list its names as `aliases`"
            )
            report.add(lacking, "models", f"{one.id} has no model of models.toml: {mend}")


async def ask_backend(config: Any, models: Sequence[Model], make: Make) -> tuple[Any, str, str]:
    """Probe a backend once. Returns the Backend, its version, and its trouble, "" if none."""
    socket.getaddrinfo(
        config.endpoint.host, config.endpoint.port
    )  # asyncio would wait for a look-up that hangs
    backend, version = make(config, models), "an unknown version"
    await backend.probe()
    if config.api == "cerebrum" and not backend.breaker.trouble:
        with contextlib.suppress(HttpError):
            version = str(
                (await backend.upstream.get("/v1/stats", MAX_BYTES)).get("version", version)
            )
    return backend, version, backend.breaker.trouble


# ------------------------------------------------------------------------------------------ the VPS


def check_vps(folder: Path, load: Load) -> int:
    """Print all findings, and return the exit status."""
    import llama_cpp

    report = Report()
    if config := read_settings(report, folder, load):
        if (got := llama_cpp.__version__) != LLAMA_CPP:
            report.add(
                "warn",
                "packages",
                f"pip install llama-cpp-python=={LLAMA_CPP}: its C API differs from {got}",
            )
        mend = "`generate_api_key.sh --write FILE` makes one"
        check_key(report, "CEREBRUM_API_KEY", config.access.keys, mend)
        if unit := next(
            filter(Path.exists, SOCKET_UNITS), None
        ):  # a connection there could start the daemon
            report.add("ok", "address", f"that of systemd: `systemctl status {unit.name}` shows it")
        else:
            check_address(report, config.host, config.port, "CEREBRUM_VPS", "models_loaded")
        check_state(report, config.engine.state_dir)
        check_models(report, config)
    return report.status


def check_state(report: Report, folder: Path) -> None:
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    fits = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    finding = (
        f"{folder} can be written"
        if fits
        else f"{place} cannot be written: CEREBRUM_STATE_DIR names the folder"
    )
    report.add("ok" if fits else "FAIL", "state", finding)


def check_models(report: Report, config: Any) -> None:
    """Check that the model files are whole and readable, fit into memory, and are tuned."""
    import psutil

    from cerebrum.vps.encoding import untuned
    from cerebrum.vps.fetch import digest_with_bar
    from cerebrum.vps.llama import ModelError

    here = [model for model in config.models if (config.models_dir / model.file).is_file()]
    if not here:
        report.add(
            "FAIL",
            "models",
            f"{config.models_dir} has none of models.toml: `vpsd.py fetch` gets one",
        )
    total, available = psutil.virtual_memory()[:2]
    most, free = (max(0, round(size / MB - config.min_free_mb)) for size in (total, available))
    for model in here:
        try:
            path = config.models_dir / model.file
            size = path.stat().st_size
            if model.size not in (0, size):
                raise ModelError(f"expected {model.size} bytes, got {size}")
            if model.sha256 and (got := digest_with_bar(path)) != model.sha256:
                raise ModelError(f"expected sha256 {model.sha256}, got {got}")
            choice, need = needed_mb(model, config, total // MB)
        except (ModelError, OSError) as error:
            report.add(
                "FAIL", "models", f"{model.id}: {error}: `vpsd.py fetch {model.id}` gets it again"
            )
            continue
        report.add(
            "ok",
            "models",
            f"{model.id} is {'whole' if model.sha256 else 'readable'}, {size / MB:,.0f} MB",
        )
        level, mend = "ok", ""
        if need > most:
            level, mend = (
                "FAIL",
                ": choose a smaller model or CEREBRUM_N_CTX, or CEREBRUM_KV_TYPE=q8_0",
            )
        elif need > free:
            level, mend = "warn", ": end other programs, unless it is loaded already"
        beside = f"{free:,} of {most:,} MB are available beside CEREBRUM_MIN_FREE_MB"
        with_context = (
            "" if choice.settings == config.engine else f" with {choice.settings.context}"
        )
        report.add(level, "memory", f"{model.id} needs {need:,} MB{with_context}, {beside}{mend}")
        fastest = (
            choice.tuned and f"{model.id} has the fastest encoding here: {choice.tuned.encoding}"
        )
        report.add(
            "ok" if fastest else "warn", "tuned", fastest or untuned(model.id, choice.reason)
        )


def needed_mb(model: Model, config: Any, total_mb: int) -> tuple[Any, int]:
    """The LoadPlan of a model on a machine with `total_mb` that does nothing else,
    and its memory in MB. ModelError or OSError if the file cannot be used.
    """
    from cerebrum.vps.encoding import plan_load

    free = (total_mb - config.min_free_mb - BARE_MB - SYSTEM_MB) * MB
    choice = plan_load(config.models_dir / model.file, config.engine, model.sha256, free)
    return choice, -(-sum(choice.parts.values()) // MB)


def memory_limit(config: Any, total_mb: int) -> list[str]:
    """The output of `vpsd.py memory`: MemoryMax= in MB for `total_mb` of memory, then comments,
    read by setup.sh.
    """
    from cerebrum.vps.encoding import find_tuned
    from cerebrum.vps.llama import ModelError

    most = max(BARE_MB + SPARE_MB, total_mb - round(config.min_free_mb))
    needs, comments = list[int](), list[str]()
    for model in config.models:
        with contextlib.suppress(ModelError, OSError):  # the file is missing or damaged
            need = needed_mb(model, config, total_mb)[1]
            needs.append(need)
            # Not by `needed_mb`: a tuned file that does not fit would not fit after another tuning
            # either.
            mark = (
                ""
                if find_tuned(config.models_dir / model.file, config.engine, model.sha256)[0]
                else ", untuned"
            )
            comments.append(f"# {model.id}: {need} MB with its prompts (CEREBRUM_CACHE_MB){mark}")
    if not needs:
        comments = [
            f"# no model is here; the smallest is {model.id}" for model in config.models[-1:]
        ]
    limit = min(most, sum(needs) + BARE_MB + SPARE_MB) if needs else most
    beside = f"# beside models: {BARE_MB + SPARE_MB} MB; at most {most} MB: {total_mb} without CEREBRUM_MIN_FREE_MB"
    return [str(limit), *comments, beside]
