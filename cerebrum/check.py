"""`cm4d.py --check` and `vpsd.py --check`: what keeps a daemon from working and how to mend it, one
finding a line.

    ok    key       CEREBRUM_API_KEY is set
    warn  version   vps has 0.1.0, this is 0.2.0: copy all files of one version
    FAIL  address   0.0.0.0 port 7000 is taken: `ss -ltnp 'sport = :7000'` shows by whom

The exit status is 1 if there is a FAIL, else 0. A check changes nothing, prints no key and works
beside the running daemon. Requests to other machines end within seconds. Wrong settings end the
check, since the rest depends on them.

The daemons pass their own `load_config`, because no module imports a daemon. So a `config` is the
Config of cm4d or of vpsd, whose types are not known here. Standard library only, except for the
VPS's part.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import re
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cerebrum.fields import printable
from cerebrum.settings import ConfigError, Environment, read_environment
from cerebrum_common import VERSION, Model, log

if TYPE_CHECKING:
    from cerebrum.pi.backend import Backend
    from cerebrum.vps.plan import LoadPlan

MB = 1 << 20
ASK_SECONDS = 5.0  # for an answer from this machine
CREDENTIALS = Path("/etc/credstore")  # where the units' LoadCredential= looks
SOCKET_UNITS = [
    Path("/etc/systemd/system/cerebrum-backend.socket"),
    Path("/usr/lib/systemd/system/cerebrum-backend.socket"),
]
SET_KEY = "`generate_api_key.sh --set FILE` sets it"
MIN_KEY_CHARACTERS = 16  # generate_api_key.sh makes 43
BARE_MB = 150  # memory of vpsd without a model: 90 at its start, plus connections
SYSTEM_MB = 250  # memory that a small Debian takes, with Tailscale
SPARE_MB = 512  # for memory that a model's estimate leaves out, and for reading its file
# The version of llama-cpp-python whose C structures cerebrum/vps/llama.py knows.
LLAMA_CPP = "0.3.36"
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
    folder: Path, load: Callable[[Environment], Any], check: Callable[[Any], Findings]
) -> Findings:
    """Check the settings, and if they are valid, the rest: `load` is a daemon's `load_config`,
    `check` its function below.
    """
    given = dict(os.environ)
    if os.access(CREDENTIALS, os.R_OK | os.X_OK):
        given.setdefault("CREDENTIALS_DIRECTORY", str(CREDENTIALS))
    dotenv = (folder / ".env").resolve()  # a link in the packages
    try:
        environ = read_environment(given, folder)
        config = load(environ)
        yield "ok", "settings", f"those of the environment, {dotenv} and models.toml are valid"
        yield from find_unknown(folder, environ)
        yield from check(config)
    except ConfigError as error:
        yield "FAIL", "settings", f"{error}: correct it in the environment, {dotenv} or models.toml"


def find_unknown(folder: Path, environ: Environment) -> Findings:
    """Find misspelt variables. A key may be in any variable, and is missed elsewhere."""
    with contextlib.suppress(OSError):
        example = (folder / ".env.example").read_text()
        known = {*re.findall(r"CEREBRUM_\w+", example), "CEREBRUM_URL"}  # the REPL's
        for name in sorted(environ.values.keys() - known):
            if name.startswith("CEREBRUM_") and not name.endswith("_KEY"):
                yield "warn", "settings", f"nothing reads {name}: .env.example lists all variables"


def check_key(name: str, keys: Sequence[str], missing: str) -> Findings:
    """Check the key of a variable. `missing` says how to set the key if there is none."""
    if not any(keys):
        yield "FAIL", "key", f"{name} is not set: {missing}"
    elif min(map(len, keys)) < MIN_KEY_CHARACTERS:
        mend = "generate_api_key.sh makes a better one"
        yield "warn", "key", f"{name} is short enough to be guessed: {mend}"
    else:
        yield "ok", "key", f"{name} is set"


def check_address(config: Any, prefix: str, member: bytes) -> Findings:
    """Check that the daemon can listen on its address, or already does: only its /health has the
    `member`.
    """
    where = f"{config.host} port {config.port}"
    try:
        asyncio.run(listen(config))
        yield "ok", "address", f"{where} is free"
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", 0) != errno.EADDRINUSE:
            yield "FAIL", "address", f"{where}: {error}: correct {prefix}_HOST or {prefix}_PORT"
        elif asyncio.run(has_health(config, member)):
            yield "ok", "address", f"our daemon answers on {where}"
        else:
            mend = f"`ss -ltnp 'sport = :{config.port}'` shows by whom"
            yield "FAIL", "address", f"{where} is taken: {mend}"


async def listen(config: Any) -> None:
    server = await asyncio.start_server(print, config.host, config.port)
    server.close()


async def has_health(config: Any, member: bytes) -> bool:
    """Whether GET /health at the daemon's address is answered with this member."""
    tls = None
    if getattr(config, "tls", None):
        tls = ssl._create_unverified_context()  # our own certificate names another host
    try:
        async with asyncio.timeout(ASK_SECONDS):
            reader, writer = await asyncio.open_connection(config.host, config.port, ssl=tls)
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            await reader.readuntil(member)
            return True
    except (OSError, EOFError, asyncio.LimitOverrunError):
        return False


# ------------------------------------------------------------------------------------------- the Pi


def check_pi(config: Any) -> Findings:
    """The checks of cm4d's Config."""
    yield from check_clients(config)
    backends = config.backends
    keys = {b.variable: b.key for b in backends if b.key_env or b.api == "cerebrum"}
    for name, key in sorted(keys.items()):
        yield from check_key(name, [key], SET_KEY)
    yield from check_address(config, "CEREBRUM_CM4", b'"vps_available"')
    yield from check_backends(config)


def check_clients(config: Any) -> Findings:
    """Check the clients' keys, and who else can see them."""
    if config.client_keys:
        yield from check_key("CEREBRUM_CM4_API_KEY", config.client_keys, "")
    if config.clients is not None:
        yield "ok", "key", f"clients have names: {', '.join(config.names) or 'none yet'}"
    if not config.access.needs_key:
        yield "ok", "key", "CEREBRUM_CM4_API_KEY is not set: clients need none"
    elif not config.tls:
        mend = "CEREBRUM_CM4_TLS_CERT encrypts them"
        yield "warn", "key", f"clients' keys cross the LAN in clear: {mend}"


def check_backends(config: Any) -> Findings:
    """Check that each backend can be reached and takes our key, and check its version and models. A
    fault is a FAIL only if no other backend can serve a completion.
    """
    from cerebrum.pi.fleet import Fleet

    log.addHandler(logging.NullHandler())  # a probe's log lines come as findings
    fleet = Fleet()
    fleet.replace(config.backends, config.models, config.prefer)
    asyncio.run(fleet.know())
    served = any(backend.models for backend in fleet.backends if backend.available)
    for backend in fleet.backends:
        yield from check_answer(backend, "warn" if served else "FAIL")


def check_answer(backend: Backend, lacking: str) -> Findings:
    """Check what a backend answered. `lacking` is the level of a backend that serves nothing."""
    id = backend.id
    config = backend.config
    trouble = backend.breaker.trouble
    if trouble:
        mend = SET_KEY if "our key" in trouble else "look whether it runs and has this address"
        yield lacking, "backend", f"{id} ({config.endpoint.authority}): {trouble}: {mend}"
        return
    yield "ok", "backend", f"{id} answers in {backend.response_ms} ms"
    is_vpsd = config.api == "cerebrum"
    version = backend.kind.version or "an unknown version"
    if is_vpsd and version != VERSION:
        mend = "copy all files of one version"
        yield "warn", "version", f"{id} has {version}, this is {VERSION}: {mend}"
    if backend.models:
        yield "ok", "models", f"{id} has {', '.join(backend.models)}"
    else:
        mend = "`vpsd.py fetch` there gets one" if is_vpsd else "list its names as `aliases`"
        yield lacking, "models", f"{id} has no model of models.toml: {mend}"


# ------------------------------------------------------------------------------------------ the VPS


def check_vps(config: Any) -> Findings:
    """The checks of vpsd's Config."""
    from llama_cpp import __version__ as installed

    if installed != LLAMA_CPP:
        mend = f"pip install llama-cpp-python=={LLAMA_CPP}"
        yield "warn", "packages", f"{mend}: its C API differs from {installed}"
    yield from check_key(
        "CEREBRUM_API_KEY", config.access.keys, "`generate_api_key.sh --write FILE` makes one"
    )
    # A connection to systemd's socket could start the daemon.
    if unit := next(filter(Path.exists, SOCKET_UNITS), None):
        yield "ok", "address", f"that of systemd: `systemctl status {unit.name}` shows it"
    else:
        yield from check_address(config, "CEREBRUM_VPS", b'"models_loaded"')
    here = [model for model in config.models if (config.models_dir / model.file).is_file()]
    if not here:
        mend = "`vpsd.py fetch` gets one"
        yield "FAIL", "models", f"{config.models_dir} has none of models.toml: {mend}"
    for model in here:
        yield from check_model(config, model)


def check_model(config: Any, model: Model) -> Findings:
    """Check that a model's file is whole, fits into memory, and is tuned."""
    import psutil

    from cerebrum.vps.encoding import untuned
    from cerebrum.vps.fetch import fault_of
    from cerebrum.vps.llama import ModelError

    total_mb = psutil.virtual_memory().total // MB
    try:
        fault = fault_of(model, config.models_dir / model.file)
        plan, need = needed_mb(model, config, total_mb)
    except (ModelError, OSError) as error:
        fault = str(error)
    if fault:
        yield "FAIL", "models", f"{model.id}: {fault}: `vpsd.py fetch {model.id}` gets it again"
        return
    yield "ok", "models", f"{model.id} is whole"
    most = round(total_mb - config.min_free_mb)
    context = "" if plan.settings == config.engine else f" with {plan.settings.context}"
    needs = f"{model.id} needs {need:,} of {most:,} MB beside CEREBRUM_MIN_FREE_MB{context}"
    if need <= most:
        yield "ok", "memory", needs
    else:
        mend = "choose a smaller model or CEREBRUM_N_CTX, or CEREBRUM_KV_TYPE=q8_0"
        yield "FAIL", "memory", f"{needs}: {mend}"
    if plan.note:
        yield "ok", "drafts", f"{model.id}: {plan.note}"
    if plan.tuned:
        yield (
            "ok",
            "tuned",
            f"{model.id} has the fastest encoding here: {plan.tuned.passport.encoding}",
        )
    else:
        yield "warn", "tuned", untuned(model.id, plan.reason)


def needed_mb(model: Model, config: Any, total_mb: int) -> tuple[LoadPlan, int]:
    """What is loaded of a model on a machine with `total_mb` that does nothing else, and its memory
    in MB. ModelError or OSError if the file cannot be used.
    """
    from cerebrum.vps.plan import plan_pair

    free = (total_mb - config.min_free_mb - BARE_MB - SYSTEM_MB) * MB
    draft = {other.id: other for other in config.models}.get(model.draft)
    plan = plan_pair(model, draft, config.models_dir, config.engine, free)
    return plan, math.ceil(plan.bytes / MB)


def memory_limit(config: Any, total_mb: int) -> list[str]:
    """The output of `vpsd.py memory`: MemoryMax= in MB for `total_mb` of memory, then comments,
    read by setup.sh.
    """
    from cerebrum.vps.encoding import find_tuned
    from cerebrum.vps.llama import ModelError

    bare = BARE_MB + SPARE_MB
    limit = most = max(bare, total_mb - round(config.min_free_mb))
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
    if needs:
        limit = min(most, sum(needs) + bare)
    else:
        comments.append(f"# no model is here; the smallest is {config.models[-1].id}")
    beside = (
        f"# beside models: {bare} MB; at most {most} MB: {total_mb} without CEREBRUM_MIN_FREE_MB"
    )
    return [str(limit), *comments, beside]
