"""vpsd whose draft models write their drafts to the full length, whatever that costs here.

ROOM_MB=3000 python tests/eager.py     # with so much memory for all models and the reserve
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vpsd
from cerebrum.metrics import resident_bytes
from cerebrum.vps import draft_model, drafts, pool, schedule, worker

worker.measure_costs = lambda *_: schedule.Costs({1: 1e-9, 16: 2e-9})
worker.saved_seconds = lambda *_: 1.0
draft_model.DraftModel.pays = lambda *_: True  # type: ignore[method-assign]
drafts.Gain.pays = (  # type: ignore[method-assign]
    lambda self, case: case[0] in self.plain and case[1] == drafts.MODEL
)

if "ROOM_MB" in os.environ:
    room_mb = float(os.environ["ROOM_MB"])
    vpsd.available_mb = pool.available_mb = lambda: room_mb - resident_bytes() / 2**20

if __name__ == "__main__":
    sys.exit(vpsd.main([]))
