"""How a daemon lives under its supervisor: the log, signals, and systemd's readiness, reloads,
watchdog and sockets.

    service = Service(reload, stuck)     # from here on, signals are handled
    await service.run(task)              # until SIGTERM or SIGINT comes, or the task ends by itself

- SIGTERM and SIGINT end `run`. A second one ends the process at once, even if the event loop is
  blocked.
- SIGHUP calls `reload`. If `reload` fails, the daemon keeps its current settings but for the keys.
  The outcome is in systemd's RUNTIME_DIRECTORY, where `cerebrum/reload.py` waits for it.
- The event loop feeds systemd's watchdog as long as `stuck` reports no part that has stalled.
- While the log file cannot be written, its lines are dropped: a full disk must not end the service.

Without systemd's environment variables, the calls to systemd do nothing. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cerebrum.fields import printable
from cerebrum.settings import ConfigError, write_atomically
from cerebrum_common import VERSION, log, request_id_var, timestamp

if TYPE_CHECKING:
    import argparse

# --------------------------------------------------------------------------------------------- logs

MAX_LOG_BYTES = 5_000_000  # 20 MB in all: some 200,000 requests
OLD_LOGS = 3


class LogFormatter(logging.Formatter):
    """`2025-12-25 12:00:00 - INFO - [request id] message`: always one line, whatever outside text
    the message holds.

    A traceback follows on indented lines, none of which can pass for a record.
    """

    converter = staticmethod(time.gmtime)  # UTC

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s - %(levelname)s - [%(request_id)s] %(message)s", "%Y-%m-%d %H:%M:%S"
        )

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        record.request_id = request_id_var.get()
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(
            "    " + printable(line) for line in super().formatException(ei).split("\n")
        )


def set_up_logging(level: str, file: str) -> None:
    """Log to standard output and to `file` (empty: no file). Another call reopens the file.

    Requests go to the file alone while it can be written: an SD card should not store them twice,
    there and in systemd's journal.
    """
    logging.raiseExceptions = False  # if the reader of standard output ends, the daemon goes on
    output = logging.StreamHandler(sys.stdout)
    handlers: list[logging.Handler] = [output]
    if file:
        log_file = _log_file(file)
        handlers.append(log_file)
        output.addFilter(lambda record: log_file.reason or not hasattr(record, "is_request"))
    for handler in handlers:
        handler.setFormatter(LogFormatter())
    old = log.handlers
    for logger in (log, logging.getLogger("asyncio")):  # asyncio logs uncaught exceptions there
        logger.handlers = handlers
        logger.propagate = False
        logger.setLevel(level)
    for handler in old:
        handler.close()


def _log_file(path: str) -> Any:
    from logging.handlers import RotatingFileHandler  # takes 1 MB of memory, needed only here

    class LogFile(RotatingFileHandler):
        """Reports once that the file cannot be written, drops the lines, and tries again with each
        new line.
        """

        reason = ""  # why the last line was not written

        def emit(self, record: logging.LogRecord) -> None:
            before = self.reason
            self.reason = ""
            if self.stream and not os.fstat(self.stream.fileno()).st_nlink:
                self.close()  # somebody has removed the file
            super().emit(record)
            if self.reason and not before:
                problem = f"CEREBRUM_LOG_FILE: cannot write {path}: {self.reason}"
                with contextlib.suppress(OSError):
                    print(f"{problem}; going on without it", flush=True)

        def handleError(self, record: logging.LogRecord) -> None:
            error = sys.exc_info()[1]
            self.reason = getattr(error, "strerror", None) or repr(error)
            with contextlib.suppress(OSError):
                self.close()  # the next line reopens the file

    with contextlib.suppress(OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    return LogFile(path, maxBytes=MAX_LOG_BYTES, backupCount=OLD_LOGS, encoding="utf-8", delay=True)


# ------------------------------------------------------------------------------------------ systemd

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START
FEEDS = 4  # per watchdog timeout: some may be late on a busy machine


def notify(line: str) -> None:
    """Send a line such as `READY=1` to systemd, if systemd started us; see sd_notify(3)."""
    with (  # an OSError if nobody listens
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier,
    ):
        notifier.connect(os.environ.get("NOTIFY_SOCKET", ""))
        notifier.send(line.encode())


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that systemd has opened for us; see sd_listen_fds(3)."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    end = FIRST_SOCKET + int(environ["LISTEN_FDS"])
    return [socket.socket(fileno=number) for number in range(FIRST_SOCKET, end)]


# ------------------------------------------------------------------------------------------ options

HELP = """\
configuration; the first source that sets a variable wins:
  files named like the variable in $CREDENTIALS_DIRECTORY
  the environment
  .env beside the daemon; .env.example lists all variables
  models.toml beside the daemon has the models, and the backends of the Pi
SIGHUP reads them again. A socket that systemd passes to vpsd is used instead of its own.

exit status:
  0  stopped by a signal, or done; with --check: nothing has failed
  1  a temporary failure, such as a busy port or a failed download; with --check: something has
     failed
  2  wrong configuration or arguments
"""


def make_parser(daemon: str, about: str) -> argparse.ArgumentParser:
    """A parser for the options of both daemons."""
    import argparse  # a daemon that serves does not need argparse

    parser = argparse.ArgumentParser(
        prog=f"{daemon}.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=about,
        epilog=HELP,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check settings, files and backends, and report problems",
    )
    parser.add_argument("--version", action="version", version=f"{daemon} {VERSION}")
    return parser


# ------------------------------------------------------------------------------------------ service

ENDING = (signal.SIGTERM, signal.SIGINT)
STAYS = "not reloaded, the old settings stay but for the keys that can be read"


class Service:
    """A daemon between its start and its end. Lives on the event loop.

    `reload()` applies new settings, or raises and changes nothing but the keys: whatever else is
    wrong, a revoked one must stop working. `stuck(now)` says which part has stopped making
    progress, "" if none has; `now` is monotonic.
    """

    def __init__(self, reload: Callable[[], None], stuck: Callable[[float], str]) -> None:
        self._reload = reload
        self._stuck = stuck
        self._ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_settings)

    def _stop(self) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        self._ending.set()

    async def run(self, *work: asyncio.Task[Any]) -> bool:
        """Run until a signal stops us (False) or a task ends by itself (True), and log that task's
        error. The watchdog is fed until the event loop ends.
        """
        self._feeding = asyncio.create_task(self._feed())
        notify("READY=1")
        tasks = {self._feeding, *work}
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({ending, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        self._ending.set()
        ended = [task for task in tasks if task.done()]
        for task in ended:
            log.error("a task of the daemon has ended", exc_info=task.exception())
        notify("STOPPING=1")
        log.info("stopping")
        return bool(ended)

    def _reload_settings(self) -> None:
        begun_ns = time.monotonic_ns()
        status = "reloaded"
        try:
            self._reload()
            log.info(status)
        except ConfigError as error:
            status = f"{STAYS}: {error}"
            log.error("%s", status)
        except Exception:
            status = STAYS
            log.exception(status)
        status = printable(status)
        notify(f"STATUS={timestamp()} {status}")  # `systemctl status` shows it
        if folder := os.environ.get("RUNTIME_DIRECTORY"):
            with contextlib.suppress(OSError):  # reload.py then reports that no answer came
                write_atomically(Path(folder, "reload"), f"{begun_ns} {status}".encode())

    async def _feed(self) -> None:
        # See sd_watchdog_enabled(3).
        seconds = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / FEEDS
        logged = ""
        while True:
            reason = self._stuck(time.monotonic())
            if reason and reason != logged:
                log.error("%s", reason)
            if not reason and seconds:
                notify("WATCHDOG=1")
            logged = reason
            await asyncio.sleep(seconds or 60.0)
