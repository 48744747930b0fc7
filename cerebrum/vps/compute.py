"""Calls of `llama_decode` by a worker, and what is counted of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cerebrum.metrics import Tally
from cerebrum.vps.job import Run
from cerebrum.vps.llama import ABORTED, Llama, Part
from cerebrum.vps.schedule import PREFILL_SECONDS, Baton, Costs
from cerebrum_common import log


@dataclass(slots=True)
class ModelTally(Tally):
    """Totals of a model's completions and decodes, kept when the model is unloaded. The worker's
    thread writes all fields except the three about loads.
    """

    drafts: int = 0  # decodes that checked a draft
    # Of those tokens of the model that the draft model was asked for before: how many, and how many
    # it expected.
    foreseeable_tokens: int = 0
    foreseen_tokens: int = 0
    ahead_steps: int = 0  # decodes before which the draft model was asked
    ahead_tokens: int = 0  # that these decodes wrote
    ahead_seconds: float = 0.0  # that the draft model computed
    checking_seconds: float = 0.0  # that these decodes took
    decodes: int = 0  # calls of llama_decode
    decoded_sequences: int = 0  # sequences per decode, summed over all decodes
    prompt_seconds: float = 0.0  # from the start of each completion to its first token
    token_seconds: float = 0.0  # from the first token of each completion to its last
    loads: int = 0
    failed_loads: int = 0
    load_seconds: float = 0.0  # of the successful loads

    @property
    def acceptance(self) -> float:
        """The share of the model's tokens that the draft model expected."""
        return self.foreseen_tokens / (self.foreseeable_tokens or 1)


@dataclass(eq=False)
class Compute:
    """Decodes in turn with the other models, and nothing for clients that have all left.

    Owned by a worker; its thread calls it. Before a decode that should take so many seconds,
    `give_up(seconds)` is asked whether to leave it out; the call also tells the watchdog.
    """

    baton: Baton
    give_up: Callable[[float], bool]
    # Other threads read these: the sequences in the current llama_decode (an empty list if nobody
    # needs it yet, None if there is no decode), and whether it takes more than PREFILL_SECONDS.
    running: Sequence[Run] | None = None
    is_long: bool = False

    def decode(
        self, model: Llama, costs: Costs, runs: Sequence[Run], parts: Sequence[Part]
    ) -> tuple[int | None, float]:
        """One llama_decode for these runs; without any, one that any request may abort. Returns
        llama.cpp's answer, or None if nobody waits for the result; and when the decode began.
        """
        size = sum(len(tokens) for _, tokens, _ in parts)
        self.is_long = costs(size) * costs.slowdown > PREFILL_SECONDS
        self.running = runs  # from now on, whoever wants an abort asks what it would hit
        model.abort_flag[0] = b"\x00"
        try:
            with self.baton:
                have_left = runs and all(run.job.cancelled for run in runs)
                if self.give_up(costs(size)) or have_left:
                    return None, 0.0
                begin = time.perf_counter()
                code = model.decode(parts)
                seconds = time.perf_counter() - begin
        finally:
            self.running = None
        if not code:
            costs.learn(size, seconds)
        elif code != ABORTED:
            log.error("llama_decode answered %d", code)
        return code, begin
