"""A completion's way: a place at a backend, an attempt there, the next one after a failure, and the
result.

`Runner.run` yields all of it as pairs of (event, value). It owns no state: the places are the
dispatcher's, what was sent and what came is the attempt's, and the totals are `Counting`'s.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from cerebrum.fields import JsonObject
from cerebrum.pi.backend import Backend
from cerebrum.pi.completion import NOTHING_SENT, PREEMPTED, Attempt, Completion, Pairs
from cerebrum.pi.counting import Counting
from cerebrum.pi.dispatcher import Dispatcher
from cerebrum.pi.fleet import Fleet
from cerebrum_common import HttpError, log, timestamp


@dataclass
class Runner:
    """Runs completions."""

    fleet: Fleet
    dispatcher: Dispatcher
    counting: Counting
    logs_prompts: bool = False

    async def run(self, completion: Completion) -> Pairs:
        """One completion as pairs, "started" first. All resources are acquired in this body, so
        they are released when the generator ends or is closed; a generator that was never started
        holds nothing.
        """
        if self.logs_prompts:
            log.info("prompt: %s", completion.request.fields.texts())
        with self.counting.completion(completion):
            while True:
                async with self.dispatcher.place(completion) as (attempt, backend):
                    try:
                        async with contextlib.aclosing(self._answer(attempt, backend)) as pairs:
                            async for pair in pairs:
                                yield pair
                        return
                    except HttpError as error:
                        attempt.settle(error)
                        if attempt.may_be_repeated:
                            # Both hold the prompt as it was sent.
                            error.__traceback__ = None
                            attempt.sent = NOTHING_SENT
                        elif attempt.evicted == PREEMPTED:
                            break
                        else:
                            raise
            # It ends like a whole answer.
            yield "started", self.beginning(completion)
            yield "done", self._result(attempt, {"finish_reason": PREEMPTED})

    async def _answer(self, attempt: Attempt, backend: Backend) -> Pairs:
        """The pairs of one attempt. "started" comes first, and again when the backend responds: the
        prompt may have been fitted again meanwhile.
        """
        has_begun = False
        async with contextlib.aclosing(backend.answer(attempt)) as pairs:
            async for event, value in pairs:
                if event == "begun" or not has_begun:
                    has_begun = True
                    yield "started", self.beginning(attempt.completion)
                if event == "text" and attempt.first_heard == attempt.last_heard:
                    self.dispatcher.changed()  # others may have waited for the end of a trial
                elif event == "done":
                    self.counting.work(attempt.model, value)
                    value = self._result(attempt, value)
                if event != "begun":
                    yield event, value

    def beginning(self, completion: Completion) -> JsonObject:
        """The value of the pair "started"."""
        attempt = completion.attempt
        model = attempt.model if attempt else self.fleet.route(completion.request)
        sent = attempt.sent if attempt else NOTHING_SENT
        return {
            "model": model,
            "n_ctx": sent.n_ctx or self.fleet.n_ctx(model),
            "kept": sent.kept,
        }

    def _result(self, attempt: Attempt, done: JsonObject) -> JsonObject:
        """The result of a whole answer: our own members, then the backend's."""
        fields = attempt.request.fields
        result: JsonObject = {
            "language": fields.language,
            "model": attempt.model,
            "total_tokens": attempt.tokens,
            "inference_time": time.monotonic() - attempt.completion.started,
            "timestamp": timestamp(),
            "mode": fields.mode,
        }
        if len(self.fleet.backends) > 1:
            result["backend"] = attempt.backend
        result |= done
        result["inference_time"] = round(result["inference_time"], 3)
        if attempt.sent.kept:
            result["kept"] = attempt.sent.kept
        return result
