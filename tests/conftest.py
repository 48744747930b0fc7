"""Makes Ctrl-C possible."""

import signal

# A shell that starts the tests in the background has them ignore SIGINT, which every child would inherit, and a bash
# that ignores it at its start cannot trap it. A handler of our own is not inherited: children have the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
