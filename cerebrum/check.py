"""`cm4d.py --check` and `vpsd.py --check`: what keeps a daemon from working and how to mend it, one
finding a line.

    ok    key       CEREBRUM_API_KEY is set
    warn  version   vps has 0.1.0, this is 0.2.0: copy all files of one version
    FAIL  address   0.0.0.0 port 7000 is taken: `ss -ltnp 'sport = :7000'` shows by whom

The exit status is 1 if there is a FAIL, else 0. A check changes nothing, prints no key and works
beside the running daemon. Requests to other machines end within seconds. Wrong settings end the
check, since the rest depends on them.

The daemons pass their own `load_config`, because no module imports a daemon; `PiConfig` and
`VpsConfig` are what a check reads of their Config. Standard library only, except for the VPS's
part.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import logging
import math
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from cerebrum.fields import printable
from cerebrum.http import in_thread
from cerebrum.settings import Client, ConfigError, Environment, read_environment
from cerebrum_common import VERSION, Model, log

if TYPE_CHECKING:
    from cerebrum.http import Access
    from cerebrum.pi.backend import Backend
    from cerebrum.pi.upstream import BackendConfig
    from cerebrum.vps.llama import Settings
    from cerebrum.vps.plan import LoadPlan

MB = 1 << 20
ASK_SECONDS = 5.0  # for an answer from this machine
BACKEND_SECONDS = 15.0  # for answers from all backends, which are asked at the same time
MAX_BYTES = 1 << 16
CREDENTIALS = Path("/etc/credstore")  # where the units' LoadCredential= looks
SOCKET_UNITS = [
    Path("/etc/systemd/system/cerebrum-backend.socket"),
    Path("/usr/lib/systemd/system/cerebrum-backend.socket"),
]
SET_KEY = "`generate_api_key.sh --set FILE` sets it"
MIN_KEY_CHARACTERS = 16  # generate_api_key.sh makes 43
PI_MB = 64  # of memory: cm4d takes 36, its clients need more
BARE_MB = 150  # memory of vpsd without a model: 90 at its start, plus connections
SYSTEM_MB = 250  # memory that a small Debian takes, with Tailscale
SPARE_MB = 512  # for memory that a model's estimate leaves out, and for reading its file
# The version of llama-cpp-python whose C structures cerebrum/vps/llama.py knows.
LLAMA_CPP = "0.3.36"


class Config(Protocol):
    """What the checks read of both daemons' settings."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def models(self) -> Sequence[Model]: ...


class PiConfig(Config, Protocol):
    """What the checks read of cm4d's Config."""

    @property
    def client_keys(self) -> Sequence[str]: ...
    @property
    def clients(self) -> Mapping[str, Client] | None: ...
    @property
    def tls(self) -> object: ...
    @property
    def backends(self) -> Sequence[BackendConfig]: ...


class VpsConfig(Config, Protocol):
    """What the checks read of vpsd's Config."""

    @property
    def access(self) -> Access: ...
    @property
    def engine(self) -> Settings: ...
    @property
    def models_dir(self) -> Path: ...
    @property
    def min_free_mb(self) -> float: ...


C = TypeVar("C")  # the Config of either daemon
Findings = Iterator[tuple[str, str, str]]  # level ("ok", "warn" or "FAIL"), subject, text


# ------------------------------------------------------------------------------------ both machines


def report(findings: Findings) -> int:
    """Print findings as they come, and return the exit status."""
    status = 0
    for level, name, text in findings:
        if level == "FAIL":
            status = 1
        print(f"{level:<5} {name:<9} {printable(text)}", flush=True)
    return status


def check_settings(
    folder: Path, load: Callable[[Environment], C], check: Callable[[C], Findings]
) -> Findings:
    """Check the settings, and if they are valid, the rest: `load` is a daemon's `load_config`,
    `check` its function below.
    """
    given = dict(os.environ)
    if os.access(CREDENTIALS, os.R_OK | os.X_OK):
        given.setdefault("CREDENTIALS_DIRECTORY", str(CREDENTIALS))
    elif CREDENTIALS.is_dir() and "CREDENTIALS_DIRECTORY" not in given:
        yield (
            "warn",
            "settings",
            f"{CREDENTIALS} cannot be read and may hold keys: run this as root (sudo)",
        )
    dotenv = (folder / ".env").resolve()  # a link in the packages
    try:
        environ = read_environment(given, folder)
        config = load(environ)
    except ConfigError as error:
        yield "FAIL", "settings", f"{error}: correct it in the environment, {dotenv} or models.toml"
        return
    yield "ok", "settings", f"those of the environment, {dotenv} and models.toml are valid"
    with contextlib.suppress(OSError):
        example = (folder / ".env.example").read_text()
        known = {*re.findall(r"CEREBRUM_\w+", example), "CEREBRUM_URL"}  # the REPL's
        known |= {backend.key_env for backend in getattr(config, "backends", ())}
        for name in sorted(environ.values.keys() - known):
            if name.startswith("CEREBRUM_"):
                mend = ".env.example lists all variables"
                yield "warn", "settings", f"nothing reads {name}: {mend}"
    yield from check(config)


def check_key(name: str, keys: Sequence[str], missing: str = "") -> Findings:
    """Check the key of a variable. `missing` says how to set the key if there is none; "" if the
    key is optional.
    """
    if not any(keys):
        level = "FAIL" if missing else "ok"
        yield level, "key", f"{name} is not set: {missing or 'clients need none'}"
    elif any(len(key) < MIN_KEY_CHARACTERS for key in keys):
        yield (
            "warn",
            "key",
            f"{name} is short enough to be guessed: generate_api_key.sh makes a better one",
        )
    else:
        yield "ok", "key", f"{name} is set"


def check_address(config: Config, prefix: str, member: str) -> Findings:
    """Check that the daemon can listen on its address, or already does: only its /health has the
    `member`.
    """
    host, port = config.host, config.port
    where = f"{host} port {port}"
    address: Any = (host,)
    try:
        found = in_thread(
            socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, *_, address in found.result(ASK_SECONDS):
            socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:  # the look-up's TimeoutError is an OSError
        if getattr(error, "errno", 0) != errno.EADDRINUSE:
            problem = getattr(error, "strerror", "") or "no address is known for it"
            reason = problem.partition(" (while")[0]
            yield "FAIL", "address", f"{where}: {reason}: correct {prefix}_HOST or {prefix}_PORT"
        elif has_health(address[0], port, member):
            yield "ok", "address", f"our daemon answers on {where}"
        else:
            yield "FAIL", "address", f"{where} is taken: `ss -ltnp 'sport = :{port}'` shows by whom"
    else:
        yield "ok", "address", f"{where} is free"


def has_health(host: str, port: int, member: str) -> bool:
    """Whether the answer to GET /health at an address of this machine has this member, with TLS or
    without.
    """
    unchecked = ssl._create_unverified_context()  # our own certificate names another host
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


def check_pi(config: PiConfig) -> Findings:
    if config.client_keys or config.clients is None:
        yield from check_key("CEREBRUM_CM4_API_KEY", config.client_keys)
    yield from check_clients(config)
    keyed = [b for b in config.backends if b.key_env or b.api == "cerebrum"]
    keys = {backend.variable: backend.key for backend in keyed}
    for name in sorted(keys):
        yield from check_key(name, [keys[name]], SET_KEY)
    yield from check_address(config, "CEREBRUM_CM4", "vps_available")
    yield from check_memory()
    yield from check_backends(config)


def check_clients(config: PiConfig) -> Findings:
    """Check who else can see the clients' keys."""
    if config.clients is not None:
        finding = f"{len(config.clients)} clients have names: "
        finding += ", ".join(client.name for client in config.clients.values()) or "none yet"
        level = "ok"
        for key, client in config.clients.items():
            if len(key) < MIN_KEY_CHARACTERS:
                level = "warn"
                finding += f"; the key of {client.name} is short"
        yield level, "key", finding
    if (config.client_keys or config.clients) and not config.tls:
        yield (
            "warn",
            "key",
            "clients' keys cross the LAN in clear: CEREBRUM_CM4_TLS_CERT encrypts them",
        )


def check_memory() -> Findings:
    table = Path("/proc/meminfo").read_text()
    available = int(table.split("MemAvailable:")[1].split()[0]) // 1024
    finding = f"{available:,} MB are available"
    if available >= PI_MB:
        yield "ok", "memory", finding
    else:
        yield "warn", "memory", f"{finding}, expected {PI_MB}: end other programs"


class Probe(NamedTuple):
    """One backend's answers."""

    backend: Backend | None  # None if it cannot be asked
    trouble: str  # why the backend cannot serve a completion, "" if it can


def check_backends(config: PiConfig) -> Findings:
    """Check that each backend can be reached and takes our key, and check its version and models. A
    fault is a FAIL only if no other backend can serve a completion.
    """
    log.addHandler(logging.NullHandler())  # a probe's log lines come as findings
    answers = [
        in_thread(asyncio.run, ask_backend(backend, config.models)) for backend in config.backends
    ]
    wait(answers, BACKEND_SECONDS)
    probes = []
    for answer in answers:
        try:
            probes.append(answer.result(0.0))
        except Exception as error:  # from the look-up or the certificates, or TimeoutError
            reason = getattr(error, "strerror", None) or str(error) or "it did not answer in time"
            probes.append(Probe(None, reason))
    served = any(probe.backend.models for probe in probes if probe.backend and not probe.trouble)
    lacking = "warn" if served else "FAIL"
    for settings, probe in zip(config.backends, probes, strict=True):
        yield from check_answer(settings, probe, lacking)


def check_answer(config: BackendConfig, probe: Probe, lacking: str) -> Findings:
    """Check what a backend answered. `lacking` is the level of a backend that serves nothing."""
    id, backend = config.id, probe.backend
    if not backend or probe.trouble:
        mend = "look whether it runs and has this address"
        if "our key" in probe.trouble:
            mend = SET_KEY
        yield lacking, "backend", f"{id} ({config.endpoint.authority}): {probe.trouble}: {mend}"
        return
    taken = " and takes our key" if config.key else ""
    yield "ok", "backend", f"{id} answers in {backend.response_ms or 0:.0f} ms{taken}"
    is_vpsd = config.api == "cerebrum"
    version = backend.kind.version or "an unknown version"
    if is_vpsd and version != VERSION:
        yield (
            "warn",
            "version",
            f"{id} has {version}, this is {VERSION}: copy all files of one version",
        )
    if backend.models:
        yield "ok", "models", f"{id} has {', '.join(backend.models)}"
    else:
        mend = "`vpsd.py fetch` there gets one" if is_vpsd else "list its names as `aliases`"
        yield lacking, "models", f"{id} has no model of models.toml: {mend}"


async def ask_backend(config: BackendConfig, models: Sequence[Model]) -> Probe:
    from cerebrum.pi.backend import Backend

    # Here, since asyncio would wait for a look-up that hangs.
    socket.getaddrinfo(config.endpoint.host, config.endpoint.port)
    backend = Backend(config, models)
    await backend.probe()
    return Probe(backend, backend.breaker.trouble)


# ------------------------------------------------------------------------------------------ the VPS


def check_vps(config: VpsConfig) -> Findings:
    from llama_cpp import __version__ as installed

    if installed != LLAMA_CPP:
        mend = f"pip install llama-cpp-python=={LLAMA_CPP}"
        yield "warn", "packages", f"{mend}: its C API differs from {installed}"
    make_key = "`generate_api_key.sh --write FILE` makes one"
    yield from check_key("CEREBRUM_API_KEY", config.access.keys, make_key)
    # A connection to systemd's socket could start the daemon.
    if unit := next(filter(Path.exists, SOCKET_UNITS), None):
        yield "ok", "address", f"that of systemd: `systemctl status {unit.name}` shows it"
    else:
        yield from check_address(config, "CEREBRUM_VPS", "models_loaded")
    yield from check_state(config.engine.state_dir)
    yield from check_models(config)


def check_state(folder: Path) -> Findings:
    paths = (folder, *folder.absolute().parents)
    parent = next(path for path in paths if os.path.exists(path))
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        yield "ok", "state", f"{folder} can be written"
    else:
        yield "FAIL", "state", f"{parent} cannot be written: CEREBRUM_STATE_DIR names the folder"


def check_models(config: VpsConfig) -> Findings:
    """Check that the model files are whole and readable, fit into memory, and are tuned."""
    here = [model for model in config.models if (config.models_dir / model.file).is_file()]
    if not here:
        yield (
            "FAIL",
            "models",
            f"{config.models_dir} has none of models.toml: `vpsd.py fetch` gets one",
        )
    for model in here:
        yield from check_model(config, model)


def check_model(config: VpsConfig, model: Model) -> Findings:
    import psutil

    from cerebrum.vps.encoding import untuned
    from cerebrum.vps.llama import ModelError

    total, available = psutil.virtual_memory()[:2]
    try:
        size = size_of_model(model, config.models_dir / model.file)
        plan, need = needed_mb(model, config, total // MB)
    except (ModelError, OSError) as error:
        yield "FAIL", "models", f"{model.id}: {error}: `vpsd.py fetch {model.id}` gets it again"
        return
    state = "whole" if model.sha256 else "readable"
    yield "ok", "models", f"{model.id} is {state}, {size / MB:,.0f} MB"
    most, free = (max(0, round(bytes / MB - config.min_free_mb)) for bytes in (total, available))
    level = "ok"
    mend = ""
    if need > most:
        level = "FAIL"
        mend = ": choose a smaller model or CEREBRUM_N_CTX, or CEREBRUM_KV_TYPE=q8_0"
    elif need > free:
        level = "warn"
        mend = ": end other programs, unless it is loaded already"
    beside = f"{free:,} of {most:,} MB are available beside CEREBRUM_MIN_FREE_MB"
    context = "" if plan.settings == config.engine else f" with {plan.settings.context}"
    yield level, "memory", f"{model.id} needs {need:,} MB{context}, {beside}{mend}"
    if plan.note:
        yield "ok", "drafts", f"{model.id}: {plan.note}"
    if plan.tuned:
        encoding = plan.tuned.passport.encoding
        yield "ok", "tuned", f"{model.id} has the fastest encoding here: {encoding}"
    else:
        yield "warn", "tuned", untuned(model.id, plan.reason)


def size_of_model(model: Model, path: Path) -> int:
    """The bytes of a model's file. ModelError if its size or sha256 is wrong, OSError if it cannot
    be read.
    """
    from cerebrum.vps.fetch import fault_of
    from cerebrum.vps.llama import ModelError

    size = path.stat().st_size
    if model.size not in (0, size):
        raise ModelError(f"expected {model.size} bytes, got {size}")
    if model.sha256 and (fault := fault_of(model, path)):
        raise ModelError(fault)
    return size


def needed_mb(model: Model, config: VpsConfig, total_mb: int) -> tuple[LoadPlan, int]:
    """What is loaded of a model on a machine with `total_mb` that does nothing else, and its memory
    in MB. ModelError or OSError if the file cannot be used.
    """
    from cerebrum.vps.plan import plan_pair

    free = (total_mb - config.min_free_mb - BARE_MB - SYSTEM_MB) * MB
    draft = {other.id: other for other in config.models}.get(model.draft)
    plan = plan_pair(model, draft, config.models_dir, config.engine, free)
    return plan, math.ceil(plan.bytes / MB)


def memory_limit(config: VpsConfig, total_mb: int) -> list[str]:
    """The output of `vpsd.py memory`: MemoryMax= in MB for `total_mb` of memory, then comments,
    read by setup.sh.
    """
    from cerebrum.vps.encoding import find_tuned
    from cerebrum.vps.llama import ModelError

    bare = BARE_MB + SPARE_MB
    most = max(bare, total_mb - round(config.min_free_mb))
    needs = []
    comments = []
    for model in config.models:
        with contextlib.suppress(ModelError, OSError):  # the file is missing or damaged
            plan, need = needed_mb(model, config, total_mb)
            needs.append(need)
            # Not by `needed_mb`: a tuned file that does not fit would not fit after another tuning
            # either.
            tuned, _ = find_tuned(config.models_dir / model.file, config.engine, model.sha256)
            untuned = "" if tuned else ", untuned"
            comments.append(
                f"# {model.id}: {need} MB with its prompts (CEREBRUM_CACHE_MB){untuned}"
            )
            if plan.note:
                comments.append(f"# drafts for {model.id}: {plan.note}")
    limit = most
    if needs:
        limit = min(most, sum(needs) + bare)
    elif config.models:
        comments = [f"# no model is here; the smallest is {config.models[-1].id}"]
    beside = (
        f"# beside models: {bare} MB; at most {most} MB: {total_mb} without CEREBRUM_MIN_FREE_MB"
    )
    return [str(limit), *comments, beside]
