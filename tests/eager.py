"""vpsd whose draft models write their drafts to the full length, whatever that costs here.

ROOM_MB=3000 python tests/eager.py     # with so much memory for all models and the reserve
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vpsd
from cerebrum.metrics import resident_bytes
from cerebrum.vps import drafts, pool, schedule, worker


def put(holder: object, name: str, value: Any) -> None:
    """Replace what a module or a class has under this name."""
    assert hasattr(holder, name), f"{holder} has no {name}"
    setattr(holder, name, value)


put(worker, "measure_costs", lambda *_: schedule.Costs({1: 1e-9, 16: 2e-9}))
put(drafts.Gain, "wants", lambda self, case, *_: case[0] in self.plain and case[1] == drafts.MODEL)

if "ROOM_MB" in os.environ:
    room_mb = float(os.environ["ROOM_MB"])
    for module in (vpsd, pool):
        put(module, "available_mb", lambda: room_mb - resident_bytes() / 2**20)

if __name__ == "__main__":
    sys.exit(vpsd.main([]))
