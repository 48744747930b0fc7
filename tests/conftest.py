"""Makes the daemons, which lie beside tests/, importable, and Ctrl-C possible."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# A shell that starts the tests in the background has them ignore SIGINT, which every child would inherit, and a bash
# that ignores it at its start cannot trap it. A handler of our own is not inherited: children have the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
