"""What the cells of an idle sequence cost a running one: CPU ms of a token of a short sequence alone and beside an idle
one of IDLE tokens, in one cache (unified) or apart. With one thread, CPU time is that of the decode. A JSON line each.

    python tests/bench/idle.py MODEL.gguf [IDLE]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cerebrum.vps.llama import Llama, Settings, Slot, start_library

CHUNK = [1000 + place for place in range(128)]
TURNS, TOKENS = 3, 10


def token_ms(model: Llama, slot: Slot) -> list[float]:
    spent = []
    for _ in range(TOKENS):
        begin = time.process_time()
        assert model.decode([(slot, CHUNK[:1], 1)]) == 0
        spent.append(1000 * (time.process_time() - begin))
        model.trim(slot, len(slot.tokens))
    return spent


def read(model: Llama, slot: Slot, count: int) -> None:
    while len(slot.tokens) < count:
        assert model.decode([(slot, CHUNK, 0)]) == 0
        slot.tokens += CHUNK


def main(path: Path, idle: int) -> None:
    start_library()
    for cache_mb in (256, 1):  # over the budget, sequences are apart
        model = Llama(path, Settings(threads=1, n_ctx=max(1024, idle + 256), cache_mb=cache_mb), lambda _: True)
        running, other = Slot(0), Slot(1)
        read(model, running, len(CHUNK))
        read(model, other, idle)
        saved = model.save(other)
        times: dict[str, list[float]] = {"alone": [], "beside": []}
        for _ in range(TURNS):  # in turns, so that a slow minute affects both alike
            times["beside"] += token_ms(model, running)
            model.trim(other, 0)
            times["alone"] += token_ms(model, running)
            assert model.restore(other, saved)
        alone, beside = (statistics.median(times[name]) for name in ("alone", "beside"))
        figures = {"alone_ms": round(alone, 1), "beside_ms": round(beside, 1), "ratio": round(beside / alone, 3)}
        print(json.dumps({"model": path.name, "idle": idle, "unified": model.unified, **figures}), flush=True)
        model.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
