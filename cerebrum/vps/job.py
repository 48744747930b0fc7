"""A completion on its way through a worker: a `Job`, and a `Run` while it has a slot."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable
from typing import Any

from cerebrum.text.ending import Ending
from cerebrum.vps.confidence import Confidence, Judged
from cerebrum.vps.drafts import Drafter
from cerebrum.vps.llama import Llama, Sampler, Slot
from cerebrum.vps.vocabulary import GenerationRequest, begun_answer
from cerebrum_common import HttpError, request_id_var

DOUBT_TEMPERATURE = 0.5  # above it unlikely tokens are chance, and no doubt of the model
# {"token", "total_tokens"}, {"confidence", "characters"}, {"progress": {"stage", "done", "total"}}
# or {"done": True, …}
Event = dict[str, Any]
Deliver = Callable[[list[Event | HttpError]], object]


class Job:
    """A request on its way through a worker.

    The worker's thread calls `deliver` with lists of events; the job's last event is a done event
    or an HttpError. The thread pauses the job while `unread()` is MAX_BACKLOG or more. Only other
    threads set `cancelled`.
    """

    def __init__(
        self, request: GenerationRequest, deliver: Deliver, unread: Callable[[], int] = lambda: 0
    ) -> None:
        self.request, self.deliver, self.unread = request, deliver, unread
        self.low = request.priority == "low"
        self.prompt: list[int] = []
        self.ending: Ending | None = None  # of the completion, once the job is prepared
        self.max_tokens = request.max_tokens
        self.before = 0  # tokens of the prompt up to the cursor
        self.cached: int | None = (
            None  # tokens of the prompt that the cache had when the job first got a slot
        )
        self.heal = b""  # the completion's first bytes, which the client already has
        self.cancelled = False
        self.started = self.submitted = time.monotonic()
        self.request_id = request_id_var.get()

    def prepare(self, model: Llama) -> None:
        """Tokenize the prompt, and read it for the completion's end. HttpError 400 with the counts
        if the prompt does not fit into the context.
        """
        request, turns = self.request, self.request.messages
        self.prompt, self.heal, self.before = model.vocabulary.encode(request)
        count, n_ctx = len(self.prompt), model.n_ctx
        if not 0 < count < n_ctx:
            raise HttpError(
                "INVALID_REQUEST",
                f"prompt: expected 1 to {n_ctx - 1} tokens, got {count}",
                extra={"prompt_tokens": count, "n_ctx": n_ctx},
            )
        self.max_tokens = min(request.max_tokens, n_ctx - count)
        begun = (
            begun_answer(turns)
            if turns
            else ""
            if request.mode == "instruct"
            else request.prompt or ""
        )
        where = request.mode, request.language, begun, request.suffix, request.stop_at
        self.ending = Ending(*where, request.indent, request.stop)

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.request.progress:
            self.deliver([{"progress": {"stage": stage, "done": done, "total": total}}])


class Run:
    """A job in its slot: its state between decodes, and the counters for the result."""

    def __init__(self, job: Job, slot: Slot, guide: list[int]) -> None:
        assert job.ending, "the job was prepared"
        self.job, self.slot, self.guide, self.heal = job, slot, guide, job.heal
        self.prompt = job.prompt  # and what has been generated, if its cells were lost
        self.marks: list[
            int
        ] = []  # lengths of the prompt at which a recurrent state is worth keeping
        self.characters, self.ending = codecs.getincrementaldecoder("utf-8")("replace"), job.ending
        self.sampler, self.confidence = Sampler(job.request), Confidence()
        self.probability = 1.0  # of the latest token
        self.drafter: Drafter | None = None
        self.pending: int | None = None  # sampled, not yet decoded
        self.generated = self.drafted = self.accepted = 0
        self.started, self.first_token, self.last_token = time.monotonic(), 0.0, 0.0
        self.has_line = False  # a line end has been generated
        self.hurried = (
            False  # its reading was aborted for another request, so it is read in short chunks
        )
        self.outbox: list[Event | HttpError] = []

    @property
    def low(self) -> bool:
        return self.job.low

    @property
    def prefilling(self) -> bool:
        return self.pending is None

    def sample(self, model: Llama, index: int) -> int:
        """The next token, by the logits at batch position `index`."""
        if self.heal:
            model.restrict(index, self.heal)
        token = self.sampler.sample(model, index)
        self.probability = model.probability(index, token)
        return token

    def feed(self, piece: bytes) -> str | None:
        """Put the text that the client may have into the outbox. Returns why the completion has
        ended (None: it goes on). Bytes wait until their character is whole.
        """
        written, threshold, mean = (
            self.characters.decode(piece),
            self.job.request.min_confidence,
            1.0,
        )
        if piece:  # not only healed
            mean = self.confidence.add(written, self.probability)
        # At higher temperatures, unlikely tokens are chance and no doubt.
        is_doubt = self.job.request.temperature <= DOUBT_TEMPERATURE
        text, reason = self.ending.feed(written, self.probability if is_doubt else 1.0)
        self.send(text)
        can_end = (
            self.job.request.mode != "instruct"
        )  # the first line of such an answer may be a fence
        return reason or (
            "unsure" if can_end and threshold is not None and mean < threshold else None
        )

    def send(self, text: str) -> None:
        if text:
            self.outbox.append({"token": text, "total_tokens": self.generated})
            self.judge(self.confidence.send(text, self.ending.start))

    def judge(self, lines: list[Judged]) -> None:
        """Say how sure these lines are, if the client asks."""
        if self.job.request.min_confidence is not None:
            self.outbox += [{"confidence": mean, "characters": end} for mean, end in lines]

    def flush(self) -> None:
        """Deliver the events in the outbox."""
        if self.outbox:
            events, self.outbox = self.outbox, []
            self.job.deliver(events)

    def result(self, reason: str) -> Event:
        """The done event."""
        job, span = self.job, self.last_token - self.first_token
        return {
            "done": True,
            "total_tokens": self.generated,
            "inference_time": round(time.monotonic() - job.started, 3),
            "mode": job.request.mode,
            "finish_reason": reason,
            "prompt_tokens": len(job.prompt),
            "cached_tokens": job.cached,
            "load_time": round(job.submitted - job.started, 4),
            "ttft": round(self.first_token - job.submitted, 4) if self.first_token else None,
            "tokens_per_second": round((self.generated - 1) / span, 2) if span > 0 else None,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            **self.confidence.result(),
        }
