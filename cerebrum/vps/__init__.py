"""The rooms of the VPS's daemon. Never imports cerebrum/pi."""

import os

# llama.cpp's threads meet at a barrier hundreds of times for each token, and by default they spin
# there for milliseconds. If another program occupies a core, the spinning keeps the thread that
# everyone waits for from running, and a token can take ten times as long. A much lower value makes
# the threads sleep too often on a quiet machine. libgomp reads the variable once, when it is
# loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
