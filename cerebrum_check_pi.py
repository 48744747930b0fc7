"""What `cm4d.py --check` looks at: the Pi's configuration, the machine, and every backend as the daemon itself sees it.

All backends are asked at the same time, each by a `Backend` of the daemon's own, in a thread that is left behind if it
takes too long. The daemon passes its own `load_config` and `Backend`, since no module imports a daemon. Loaded only for
--check. Standard library only.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from cerebrum_backends import BackendConfig
from cerebrum_check import (
    ASK_SECONDS,
    CREDENTIALS,
    SYNCHRONIZE,
    Report,
    Settings,
    check_configuration,
    check_kernel_clock,
    check_key,
    check_log,
    check_names,
    check_port,
    key_file,
    key_script,
    within,
)
from cerebrum_common import ConfigError, Environment, HttpError, Model, log, served_languages

UNIT = "cerebrum-cm4"
NEED_MB = 64  # of memory: the daemon takes 30, and its clients more
MAX_APART_SECONDS = 60.0  # of two clocks: with more, the two logs of a request cannot be laid side by side
INSPECT_SECONDS = 4 * ASK_SECONDS  # for everything that one backend is asked


def check_pi(
    folder: Path,
    load: Callable[[Environment], Any],
    make: Callable[[BackendConfig, Sequence[Model]], Any],
) -> int:
    """Print all findings, and return the exit status."""
    report = Report()
    if settings := check_configuration(report, folder, load, UNIT):
        config, environ = settings.config, settings.environ
        check_names(report, environ, {backend.key_env for backend in config.backends})
        check_clients(report, settings, folder)
        check_page(report, folder)
        check_log(report, config.log_file, UNIT)
        told = check_port(report, config.host, config.port, ("CEREBRUM_CM4_HOST", "CEREBRUM_CM4_PORT"), "vps_available")
        if not told:
            check_memory(report)
        check_kernel_clock(report)
        if settings.has_catalog:
            if "CEREBRUM_VPS_URL" not in settings.bad:
                check_backends(report, settings, folder, make, told)
        else:
            report.warn("backend", "not asked, since models.toml says which there are")
    return int(report.failed)


def check_clients(report: Report, settings: Settings[Any], folder: Path) -> None:
    environ = settings.environ
    if environ.keys("CEREBRUM_CM4_API_KEY"):
        check_key(report, environ, "CEREBRUM_CM4_API_KEY", folder)
        report.ok("key", "clients need one (CEREBRUM_CM4_API_KEY)")
    elif settings.hidden:
        report.warn("key", f"whether clients need CEREBRUM_CM4_API_KEY: {settings.hidden}")
    elif "CEREBRUM_CM4_API_KEY" not in settings.bad:
        report.ok("key", "clients need none (CEREBRUM_CM4_API_KEY is not set)")
    # One that no backend is sent may be wrong: nobody has looked at it.
    if any(backend.key and backend.key_env == "CEREBRUM_API_KEY" for backend in settings.config.backends):
        check_key(report, environ, "CEREBRUM_API_KEY", folder)


def check_page(report: Report, folder: Path) -> None:
    page = folder / "cerebrum_page.html"
    if not os.path.isfile(page):
        report.warn("files", f"{page.name} is missing, so there is no page at /: copy it beside cm4d.py")


def check_memory(report: Report) -> None:
    """Whether there is memory for a daemon that does not run yet."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    available = next((int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    text = f"{available:,} MB are available"
    if available < NEED_MB:
        report.warn("memory", f"{text}, expected {NEED_MB}: end other programs")
    else:
        report.ok("memory", text)


# ---------------------------------------------------------------------------------------------- backends


@dataclass
class Seen:
    """What was seen of one backend. `backend` has what a probe of the daemon's own found, if one came that far."""

    config: BackendConfig
    unreachable: str = ""  # why nobody answers there
    is_unknown: bool = False  # its host's name has no address here
    status: int = 0  # of GET /v1/models with our key; 0: no answer in HTTP/1.1
    ahead: float | None = None  # seconds by which its clock is ahead of ours; None: it does not tell the time
    backend: Any | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_there(self) -> bool:
        return self.backend is not None and not self.backend.trouble

    @property
    def url(self) -> str:
        endpoint = self.config.endpoint
        return f"{'https' if endpoint.tls else 'http'}://{endpoint.authority}{endpoint.prefix}"


def check_backends(
    report: Report,
    settings: Settings[Any],
    folder: Path,
    make: Callable[[BackendConfig, Sequence[Model]], Any],
    told: Mapping[str, Any],
) -> None:
    """Ask all backends, and tell of each whether it is there, takes our key, and has models. `told` is what /health of
    the running daemon says."""
    config = settings.config
    log.setLevel(100)  # what a probe would log is told as findings
    seen = [Seen(backend) for backend in config.backends]
    for one in seen:
        threading.Thread(target=inspect, args=(one, config.models, make), daemon=True).start()
    deadline = time.monotonic() + INSPECT_SECONDS
    for one in seen:
        if not one.done.wait(max(0.0, deadline - time.monotonic())):
            one.unreachable = one.unreachable or "it did not answer in time"
    some_are_there = any(one.is_there for one in seen)
    for one in seen:
        tell_backend(report, one, settings, folder, some_are_there)
    if some_are_there and told.get("vps_available") is False:
        mend = f"it may have older settings: sudo systemctl restart {UNIT}"
        report.fail("backend", f"the daemon that runs says: {reason_of(told)}: {mend}")
    if some_are_there:
        check_models(report, config.models, seen)
        check_clocks(report, seen)


def reason_of(told: Mapping[str, Any]) -> str:
    """Why no backend is there, as /health of the running daemon says."""
    error = told.get("error")
    message = error.get("message") if isinstance(error, dict) else told.get("message")
    return message if isinstance(message, str) and message else "no backend is there"


def inspect(seen: Seen, models: Sequence[Model], make: Callable[..., Any]) -> None:
    """Ask one backend. Runs in a thread of its own."""
    try:
        seen.ahead = within(ASK_SECONDS, ask_clock, seen.config)
        backend = make(seen.config, models)
        seen.status = asyncio.run(ask_models(backend))
        asyncio.run(asyncio.wait_for(backend.probe(), 2 * ASK_SECONDS))
        seen.backend = backend
    except ConfigError as error:
        seen.unreachable = str(error)
    except TimeoutError:
        seen.unreachable = "it did not answer in time"
    except socket.gaierror as error:
        seen.unreachable, seen.is_unknown = error.strerror or "it has no address", True
    except Exception as error:  # OSError, what http.client does not understand, a name that DNS cannot have
        seen.unreachable = getattr(error, "strerror", None) or str(error) or type(error).__name__
    finally:
        seen.done.set()


def ask_clock(config: BackendConfig) -> float | None:
    """By how many seconds the Date of a backend is ahead of our clock. OSError or HTTPException if nobody answers."""
    endpoint = config.endpoint
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=ASK_SECONDS)
    if endpoint.tls:
        context = ssl.create_default_context(cafile=config.ca_file or None)
        connection = http.client.HTTPSConnection(endpoint.host, endpoint.port, timeout=ASK_SECONDS, context=context)
    try:
        before = time.time()
        connection.request("GET", f"{endpoint.prefix}/health", headers={"Host": endpoint.authority})
        date = connection.getresponse().getheader("Date", "")
        ours = (before + time.time()) / 2
    finally:
        connection.close()
    try:
        return parsedate_to_datetime(date).timestamp() + 0.5 - ours  # a Date has whole seconds
    except ValueError:
        return None


async def ask_models(backend: Any) -> int:
    """The status of GET /v1/models with our key; 0 if the answer is not HTTP as the daemon wants it."""
    try:
        async with asyncio.timeout(ASK_SECONDS), backend.upstream.send("GET", "/v1/models") as answer:
            await answer.read_head("application/json")
            return int(answer.status)
    except (HttpError, OSError):
        return 0


def tell_backend(report: Report, seen: Seen, settings: Settings[Any], folder: Path, some_are_there: bool) -> None:
    config, url = seen.config, seen.url
    ours = config.api == "cerebrum"
    is_missing, is_refused = ours and not config.key, seen.status in (401, 403)
    if config.key_env in settings.bad:
        pass  # told as a fault of the configuration
    elif settings.hidden and (is_missing or is_refused):
        report.warn("key", f"{config.key_env or 'key_env'}, the key for {url}: {settings.hidden}")
    elif is_missing:
        name = config.key_env or "key_env"
        report.fail("key", f"{name} is not set, so {url} refuses us: {mend_key(name, folder)}")
    elif is_refused:
        theirs = "`sudo cat /etc/credstore/CEREBRUM_API_KEY` on the VPS shows its key; " if ours else ""
        mend = mend_key(config.key_env or "key_env", folder)
        report.fail("key", f"{url} refuses our key ({seen.status}): {theirs}{mend}")
    if seen.is_unknown:
        host, name = config.endpoint.host, "CEREBRUM_VPS_URL" if config.id == "vps" else "models.toml"
        text = f"{config.id}: the name {host} is not known here: `getent hosts {host}`; or use an IP address in {name}"
        (report.warn if some_are_there else report.fail)("backend", text)
    elif seen.unreachable:
        look = "`systemctl status cerebrum-backend.socket cerebrum-backend`" if ours else "whether the engine runs"
        mend = f"look there for {look}, and whether this address and port are its own"
        text = f"{config.id}: {url} cannot be reached ({seen.unreachable}): {mend}"
        (report.warn if some_are_there else report.fail)("backend", text)
    elif seen.backend and seen.backend.trouble and not is_refused:
        hint = f"unless that helps, look whether a {config.api} backend has this address, and at its log"
        report.fail("backend", f"{config.id}: {url}: {seen.backend.trouble}: {hint}")
    elif seen.backend and seen.is_there:
        if config.key:
            report.ok("key", f"{url} accepts ours")  # generate_api_key.sh --rotate looks for this line
        time_taken = f"answers after {seen.backend.response_ms:.0f} ms" if seen.backend.response_ms else "answers"
        report.ok("backend", f"{config.id}: {url} ({config.api}) {time_taken}")


def mend_key(name: str, folder: Path) -> str:
    """How to set a key here."""
    file = key_file(name, folder) or (CREDENTIALS / name if CREDENTIALS.is_dir() else folder / ".env")
    if file.name == ".env" and name != "CEREBRUM_API_KEY":
        return f"here, set {name} in {file}, then `sudo systemctl restart {UNIT}`"
    # Not `reload`: systemd before 258 passes a changed credential only at a start.
    return f"here, `sudo {key_script(folder)} --set {file}` takes it, then `sudo systemctl restart {UNIT}`"


def check_models(report: Report, models: Sequence[Model], seen: Sequence[Seen]) -> None:
    """Which models the backends have, and the languages that no model serves."""
    had: dict[str, Mapping[str, Any]] = {}
    for one in seen:
        if one.backend and one.is_there:
            own = one.backend.models or {}
            had |= own
            if own:
                report.ok("models", f"{one.config.id} has {', '.join(own)}")
            else:
                mend = "`vpsd.py fetch ID` there gets one" if one.config.api == "cerebrum" else "see `aliases` there"
                report.warn("models", f"{one.config.id} has no model of models.toml: {mend}")
    if not had:
        report.fail("models", "no backend has a model, so no completion can be served")
        return
    serving = served_languages([model for model in models if model.id in had])
    if lacking := [language for language in served_languages(models) if language not in serving]:
        report.warn(
            "languages", f"no model is there for {', '.join(lacking)}: fetch one that lists them in models.toml"
        )
    else:
        report.ok("languages", ", ".join(serving))


def check_clocks(report: Report, seen: Sequence[Seen]) -> None:
    """Whether our clock and those of the backends agree."""
    for one in seen:
        if one.ahead is None or not one.is_there:
            continue
        apart = f"{abs(one.ahead):,.0f} s {'ahead of' if one.ahead > 0 else 'behind'} ours"
        if abs(one.ahead) > MAX_APART_SECONDS:
            report.fail("clock", f"that of {one.config.id} is {apart}: compare `date -u` on both, then {SYNCHRONIZE}")
        else:
            report.ok("clock", f"that of {one.config.id} is {apart}")
