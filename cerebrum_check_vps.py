"""What `vpsd.py --check` looks at: the backend's configuration, its models, and whether they fit into the machine; and
`vpsd.py memory`, which computes the limit of memory for systemd.

The daemon passes its own `load_config` and `Config`, since no module imports a daemon. Loaded only for these two.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cerebrum_check import (
    CREDENTIALS,
    LOCAL,
    Report,
    Settings,
    ask_health,
    binding,
    check_configuration,
    check_folder,
    check_kernel_clock,
    check_key,
    check_log,
    check_names,
    check_port,
    key_script,
    may,
    systemctl,
    user_of,
)
from cerebrum_common import Environment, Model, served_languages
from cerebrum_encoding import find_tuned
from cerebrum_engine import MB, ModelError, estimate_bytes, file_digest
from cerebrum_gguf import read_shape

UNIT = "cerebrum-backend"
PORT_NAMES = ("CEREBRUM_VPS_HOST", "CEREBRUM_VPS_PORT")
BARE_MB = 150  # of the process without a model: 90 at its start, and connections
SPARE_MB = 512  # for what the estimate of a model does not know, and for reading its file
NEED_STATE_MB = 64  # beside the saved prompts: measurements, stamps
ADDRESS_PLACE = f"/etc/systemd/system/{UNIT}.socket.d/listen.conf"
LIMIT_PLACE = f"/etc/systemd/system/{UNIT}.service.d/memory.conf"


@dataclass(frozen=True)
class Present:
    """A model whose file is here and readable. `need` is in bytes, when loaded; `encoding` says how it is used."""

    model: Model
    need: int
    encoding: str


def measure(model: Model, config: Any) -> Present:
    """What a model needs, in its tuned encoding if there is one. ModelError or OSError if its file cannot be read."""
    path, settings = config.models_dir / model.file, config.engine
    need = sum(estimate_bytes(path.stat().st_size, read_shape(path), settings).values())
    tuned, _ = find_tuned(path, settings, model.sha256)
    if tuned:
        size, shape = tuned.path.stat().st_size, read_shape(tuned.path)
        need = max(need, sum(estimate_bytes(size, shape, tuned.settings).values()))  # it may be dropped at any time
    return Present(model, need, tuned.encoding if tuned else "published")


# ------------------------------------------------------------------------------------- the limit of memory


def memory_limit(config: Any, total_mb: int) -> list[str]:
    """The lines of `vpsd.py memory`: MemoryMax= in MB, then comments that say how it came about. `total_mb` is the
    machine's memory."""
    most = max(BARE_MB + SPARE_MB, total_mb - round(config.min_free_mb))
    machine = f"{most} MB at most: {total_mb} MB of memory without CEREBRUM_MIN_FREE_MB ({config.min_free_mb:.0f} MB)"
    cache, parts, comments = config.engine.cache_mb, 0, []
    for model in config.models:
        if not os.path.isfile(config.models_dir / model.file):
            continue
        try:
            need = -(-measure(model, config).need // MB)
        except (ModelError, OSError) as error:
            comments.append(f"# {model.id}: not counted, {error}")
            continue
        parts += need + cache
        comments.append(f"# {model.id}: {need} MB, and {cache} MB for prompts (CEREBRUM_CACHE_MB)")
    if not parts:
        return [str(most), *comments, "# no model is here yet", f"# {machine}"]
    comments.append(f"# the process without a model: {BARE_MB} MB; to spare: {SPARE_MB} MB")
    return [str(min(most, parts + BARE_MB + SPARE_MB)), *comments, f"# {machine}"]


# ----------------------------------------------------------------------------------------------- the check


def check_vps(folder: Path, load: Callable[[Environment], Any], digest: Callable[[Path, str], str], python: str) -> int:
    """Print all findings, and return the exit status. `digest` computes the sha256 of a file and shows how far it is;
    `python` is how the backend's Python is called in a hint."""
    report = Report()
    settings = check_configuration(report, folder, load, UNIT)
    if not settings:
        return 1
    config, environ = settings.config, settings.environ
    check_names(report, environ)
    check_own_key(report, settings, folder)
    check_log(report, config.log_file, UNIT)
    engine = config.engine
    saved = 2 * engine.cache_mb + NEED_STATE_MB
    check_folder(report, "state", engine.state_dir, UNIT, saved, "what the backend saves")
    health = check_socket(report, config)
    if settings.has_catalog:
        fetch = f"{python} vpsd.py fetch"
        present = check_models(report, config, digest, fetch)
        check_memory(report, config, present, loaded_in(health))
    else:
        report.warn("models", "not read, since models.toml says which there are")
    check_kernel_clock(report)
    return int(report.failed)


def check_own_key(report: Report, settings: Settings[Any], folder: Path) -> None:
    name = "CEREBRUM_API_KEY"
    if settings.environ.keys(name):
        check_key(report, settings.environ, name, folder)
        report.ok("key", f"{name} is set")
    elif name in settings.bad:
        pass  # told as a fault of the configuration
    elif settings.hidden:
        report.warn("key", f"{name}: {settings.hidden}")
    else:
        file = CREDENTIALS / name if CREDENTIALS.is_dir() else folder / ".env"
        report.fail("key", f"{name} is not set: `sudo {key_script(folder)} --write {file}` makes one")


# The network.


def check_socket(report: Report, config: Any) -> dict[str, Any]:
    """Whether the backend can be reached, and what its /health says; {} if it does not run. Where systemd holds the
    socket, nobody connects to it while the backend is off, since that would start it."""
    if systemctl("is-active", f"{UNIT}.socket") != "active":
        return check_port(report, config.host, config.port, PORT_NAMES, "models_loaded")
    listening = systemctl("show", "--property=Listen", "--value", f"{UNIT}.socket")
    address = re.match(r"\[?([0-9A-Fa-f:.]+?)\]?:(\d+) ", f"{listening} ")
    if address and binding(socket.AF_INET6 if ":" in address[1] else socket.AF_INET, (address[1], 0)):
        # FreeBind= lets systemd listen on an address that the machine had once, or never.
        again = f"systemctl daemon-reload; systemctl restart {UNIT}.socket"
        report.fail("port", f"this machine has no address {address[1]} now: correct {ADDRESS_PLACE}, then {again}")
        return {}
    report.ok(
        "port", f"systemd listens for us on {address[1]} port {address[2]}" if address else f"systemd: {listening}"
    )
    if not address or systemctl("is-active", UNIT) != "active":
        return {}
    health = ask_health(LOCAL.get(address[1], address[1]), int(address[2]))
    if "models_loaded" not in health:
        report.fail("port", f"the backend does not answer there: `journalctl -u {UNIT} -n 20` says why")
    return health


def loaded_in(health: dict[str, Any]) -> list[str]:
    told = health.get("models_loaded")
    return [id for id in told if isinstance(id, str)] if isinstance(told, list) else []


# Models.


def check_models(report: Report, config: Any, digest: Callable[[Path, str], str], fetch: str) -> list[Present]:
    """Whether the files that are here are whole and readable, and which languages they serve."""
    present = []
    files = {model.id: config.models_dir / model.file for model in config.models}
    here = [model for model in config.models if os.path.isfile(files[model.id])]
    user = user_of(UNIT)
    for model in here:
        try:
            if not may(files[model.id], user, os.R_OK):
                who = user.pw_name if user else "you"
                report.fail(
                    "models", f"{model.id}: {who} may not read {files[model.id]}: chmod a+r it, a+x its folders"
                )
                continue
            problem = damage(model, files[model.id], digest)
            if problem:
                report.fail("models", f"{model.id}: {problem}: `{fetch} {model.id}` downloads it again")
                continue
            found = measure(model, config)
        except (ModelError, OSError) as error:
            report.fail("models", f"{model.id}: {error}: `{fetch} {model.id}` downloads it again")
            continue
        present.append(found)
        whole = "whole by its sha256" if model.sha256 else "readable; models.toml has no sha256 to check it by"
        report.ok("models", f"{model.id}: {files[model.id].stat().st_size / MB:,.0f} MB, {whole}; {found.encoding}")
        _, reason = find_tuned(files[model.id], config.engine, model.sha256)
        if reason:
            again = fetch.replace("fetch", "tune")
            report.warn(
                "models", f"{model.id}: its tuned file is not used, {reason}: `{again} {model.id}` makes another"
            )
    if not here:
        smallest = config.models[-1].id
        report.fail(
            "models", f"{config.models_dir} has none of models.toml: `{fetch} {smallest}` downloads the smallest"
        )
    listed, served = served_languages(config.models), served_languages([one.model for one in present])
    if lacking := [language for language in listed if language not in served]:
        report.warn("languages", f"no model is here for {', '.join(lacking)}: fetch one that lists them in models.toml")
    else:
        report.ok("languages", ", ".join(served))
    return present


def damage(model: Model, path: Path, digest: Callable[[Path, str], str]) -> str:
    """What is wrong with a model's file by its size and sha256; "" if nothing is, or models.toml tells neither."""
    size = path.stat().st_size
    if model.size and size != model.size:
        return f"expected {model.size} bytes, got {size}"
    if not model.sha256:
        return ""
    shown = sys.stderr.isatty()
    got = digest(path, "checking") if shown else file_digest(path, lambda _done: None)
    return "" if got == model.sha256 else f"expected sha256 {model.sha256}, got {got}"


# Memory.


def check_memory(report: Report, config: Any, present: Sequence[Present], loaded: Sequence[str]) -> None:
    """Whether each model fits: into the machine, into the unit's limit, and beside what runs now."""
    memory = psutil.virtual_memory()
    reserve = config.min_free_mb
    most = memory.total / MB - reserve
    held = sum(one.need for one in present if one.model.id in loaded)  # idle models make room
    free = (memory.available + held) / MB - reserve
    limit = unit_limit_mb()
    for one in present:
        id, need = one.model.id, one.need / MB
        text = f"{id} needs {need:,.0f} MB"
        if need > most:
            smaller = "choose a smaller model, CEREBRUM_N_CTX, or CEREBRUM_KV_TYPE=q8_0"
            report.fail("memory", f"{text}, this machine has {most:,.0f} beside CEREBRUM_MIN_FREE_MB: {smaller}")
        elif need > free and id not in loaded:
            report.warn("memory", f"{text}, {free:,.0f} are free now beside CEREBRUM_MIN_FREE_MB: end other programs")
        else:
            report.ok("memory", f"{text}{', and is loaded' if id in loaded else f', {free:,.0f} are free'}")
        if limit and need + BARE_MB > limit:
            mend = f"install again, or write what `vpsd.py memory` prints into {LIMIT_PLACE}"
            report.warn("memory", f"{text}, and the unit's MemoryMax= is {limit:,.0f} MB: {mend}")


def unit_limit_mb() -> float | None:
    """MemoryMax= of the unit in MB; None if it has none or is not installed."""
    text = systemctl("show", "--property=MemoryMax", "--value", UNIT)
    return int(text) / MB if re.fullmatch(r"[0-9]{1,18}", text) else None
