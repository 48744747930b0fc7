"""vpsd with a llama.cpp that hangs as no test can make the real one hang.

    GOOD_DECODES=100 python tests/wedged.py     # the next decode never returns

Decodes are counted from the load on; those that measure the model's costs are not. A step may take
3 s here, so that a test need not wait for two minutes.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vpsd
from cerebrum.vps import llama
from cerebrum.vps import worker as vps_worker

vps_worker.HUNG_SECONDS = 3.0


class Wedged(llama.Llama):
    left = int(os.environ["GOOD_DECODES"])

    def decode(self, parts: Any) -> int:
        worker = threading.current_thread()
        if (
            isinstance(worker, vps_worker.Worker)
            and worker.decoder is not None
            and worker.decoder.compute.running
        ):
            self.left -= 1
            if self.left < 0:
                threading.Event().wait()
        return super().decode(parts)


vps_worker.Llama = Wedged  # type: ignore[misc]

if __name__ == "__main__":
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a test aborts this process: no dump of all weights
    sys.exit(vpsd.main([]))
