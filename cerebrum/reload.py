"""`systemctl reload` of both daemons: sends SIGHUP to the daemon, and waits for what comes of it.

The exit status is 1, with the reason on stderr, if the daemon has not reloaded, has ended, or
hangs. Any reload counts that began after this program: two that run at the same time may share one.
systemd sets MAINPID and RUNTIME_DIRECTORY; without systemd, `kill -HUP` does the same, and the
outcome is in the log.

A file of its own, run by the system's Python: it must not wait until vpsd's libraries are loaded.
"""

import contextlib
import os
import select
import signal
import sys
import time

# Below the units' TimeoutStartSec, after which systemd would end this program without a reason.
SECONDS = 20.0
POLL_SECONDS = 0.05


def main() -> str:
    """Why the daemon has not reloaded, "" if it has."""
    begun_ns = time.monotonic_ns()
    daemon = os.pidfd_open(int(os.environ["MAINPID"]))
    signal.pidfd_send_signal(daemon, signal.SIGHUP)
    while time.monotonic_ns() < begun_ns + SECONDS * 1e9:
        if select.select([daemon], [], [], POLL_SECONDS)[0]:
            return "not reloaded: the daemon has ended"
        with (
            contextlib.suppress(FileNotFoundError),
            open(os.environ["RUNTIME_DIRECTORY"] + "/reload") as file,
        ):
            at_ns, _, outcome = file.read().partition(" ")
            if int(at_ns) >= begun_ns:
                return "" if outcome == "reloaded" else outcome
    return f"not reloaded: expected an answer within {SECONDS:g} s, got none; does the daemon hang?"


if __name__ == "__main__":
    sys.exit(main() or 0)
