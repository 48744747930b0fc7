"""A completion on its way through a worker: a `Job`, and a `Run` while it has a slot, with the
`Sampler` that chooses its tokens.
"""

from __future__ import annotations

import codecs
import contextvars
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cerebrum.request import GenerationRequest
from cerebrum.text.ending import Ending
from cerebrum.text.prompt import nearer
from cerebrum.text.stages import Written, confidence_of
from cerebrum.vps.drafts import Drafter
from cerebrum.vps.llama import Llama, Slot
from cerebrum.vps.vocabulary import api, begun_answer
from cerebrum_common import HttpError, timestamp

# Up to this temperature an unlikely token is doubt of the model, above it chance. A request's own
# threshold holds at every temperature.
DOUBT_TEMPERATURE = 0.5
MIN_TEMPERATURE = 1e-6  # below it the likeliest is taken: as floats, the logits would be infinite
# {"model"}, {"token", "total_tokens"}, {"progress": {"stage", "done", "total"}}
# or {"done": True, …}
Event = dict[str, Any]
Events = list[Event | HttpError]
Deliver = Callable[[Events], object]


class Job:
    """A request on its way through a worker.

    The worker's thread calls `deliver` with lists of events; the job's last event is a done event
    or an HttpError. Only other threads set `cancelled`. `prepare`, before it is submitted, finds
    the parts of the prompt, the most tokens to write, and what ends the completion. Each time it
    gets a slot, the worker chooses the `part` that is read and the `writer`.
    """

    def __init__(self, request: GenerationRequest, deliver: Deliver) -> None:
        self.request = request
        self.deliver = deliver
        self.low = request.priority == "low"
        # A hint is wanted soon or never, so a draft model may answer instead of its large one.
        is_hint = bool(request.prompt_ms and request.min_confidence)
        self.may_be_early = is_hint and not request.temperature
        self.writer = ""  # the draft model that answers, if one does
        # Tokens of the prompt that the cache had when the job first got a slot.
        self.cached: int | None = None
        self.cancelled = False
        self.started = self.submitted = time.monotonic()
        self.context = contextvars.copy_context()  # which has the request's id, for the log

    def prepare(self, model: Llama) -> None:
        """Tokenize the prompt, and read it for the completion's end. HttpError 400 with the counts
        if the prompt does not fit into the context.
        """
        request = self.request
        vocabulary = model.vocabulary
        # The whole prompt, then less and less of it; `part` is the one that is read.
        self.parts = [vocabulary.encode(request)]
        if request.prompt_ms and not request.special:
            for fields in nearer(vars(request), vocabulary.layout):
                self.parts.append(vocabulary.encode(replace(request, **fields)))
        self.part = self.parts[0]
        count = len(self.part.tokens)
        n_ctx = model.n_ctx
        if not 0 < count < n_ctx:
            raise HttpError(
                "INVALID_REQUEST",
                f"prompt: expected 1 to {n_ctx - 1} tokens, got {count}",
                extra={"prompt_tokens": count, "n_ctx": n_ctx},
            )
        self.max_tokens = min(request.max_tokens, n_ctx - count)
        begun = "" if request.mode == "instruct" else request.prompt
        if request.messages:
            begun = begun_answer(request.messages)
        where = request.mode, request.language, begun, request.suffix, request.stop_at
        min_confidence = None if request.messages else request.min_confidence
        self.ending = Ending(*where, request.indent, request.stop, min_confidence)

    @property
    def only_reads(self) -> bool:
        """Whether the prompt is only read ahead, for later requests."""
        return not self.max_tokens

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.request.progress:
            self.deliver([{"progress": {"stage": stage, "done": done, "total": total}}])


class Run:
    """A job in its slot: its state between decodes, and the counters for the result. Only the
    worker's thread uses it.

    It reads its prompt while nothing is `pending`, and then writes. If the cells of its text are
    lost, the text is read again as a part of the prompt. A run that gives up its slot has written
    nothing, so the job's `ending` is as new for the next one.
    """

    def __init__(self, job: Job, slot: Slot, guide: list[int]) -> None:
        self.job = job
        self.slot = slot
        self.low = job.low
        self.guide = guide  # an earlier sequence with the same beginning, for drafts
        self.prompt = job.part.tokens  # and the generated tokens, if their cells were lost
        self.heal = job.part.heal  # the first bytes to write, which the client already has
        # Lengths of the prompt at which a recurrent state is worth keeping.
        self.checkpoints = list[int]()
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.sampler = Sampler(job.request)
        self.written = list[Written]()
        self.sent = ""
        self.probability = 1.0  # of the latest token
        self.drafter: Drafter | None = None  # once a token has been generated
        self.pending: int | None = None  # sampled, not yet decoded
        self.generated = self.drafted = self.accepted = 0
        self.started = time.monotonic()
        self.first_token = self.last_token = 0.0
        # Its reading was aborted for another request, so it is read in short chunks.
        self.was_aborted = False
        self.makes_way_for_hurried = False  # see `way_offered`
        self.outbox = Events()

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

    def drop_healed(self, piece: bytes) -> bytes:
        """A token's bytes without those that the client already has."""
        healed = min(len(piece), len(self.heal))
        self.heal = self.heal[healed:]
        return piece[healed:]

    def feed(self, piece: bytes) -> str | None:
        """Put the text that the client may have into the outbox. Returns why the completion has
        ended (None: it goes on). Bytes wait until their character is whole.
        """
        written = self.characters.decode(piece)
        if piece:  # not only healed
            self.written.append((written, self.probability))
        request = self.job.request
        is_doubt = request.temperature <= DOUBT_TEMPERATURE or request.min_confidence
        # Where the client has the text already, the model had no choice.
        probability = self.probability if is_doubt and piece else 1.0
        text, reason = self.job.ending.feed(written, probability)
        self.send(text)
        return reason

    def is_spent(self) -> bool:
        """Whether the request's tokens or its time are used up. The time counts only once a line is
        whole: half of a line is no use to anybody.
        """
        seconds = self.last_token - self.first_token
        is_late = 1000 * seconds > self.job.request.predict_ms > 0
        is_cut = is_late and any("\n" in text for text, _ in self.written)
        return self.generated >= self.job.max_tokens or is_cut

    def send(self, text: str) -> None:
        if text:
            self.outbox.append({"token": text, "total_tokens": self.generated})
            self.sent += text

    def deliver(self) -> None:
        """Deliver the events in the outbox."""
        events, self.outbox = self.outbox, []
        if events:
            self.job.deliver(events)

    def result(self, reason: str) -> Event:
        """The done event."""
        job = self.job
        request = job.request
        event: Event = {
            "done": True,
            "total_tokens": self.generated,
            "inference_time": round(time.monotonic() - job.started, 3),
            "mode": request.mode,
            "language": request.language,
            "model": job.writer or request.model,
        }
        event |= {
            "finish_reason": reason,
            "prompt_tokens": len(job.part.tokens),
            "cached_tokens": job.cached,
            "load_time": round(job.submitted - job.started, 4),
            "ttft": None,
            "tokens_per_second": None,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }
        event["timestamp"] = timestamp()
        if job.writer or job.part != job.parts[0]:
            event["prompt_cut"] = True
        if self.first_token:
            event["ttft"] = round(self.first_token - job.submitted, 4)
        if (seconds := self.last_token - self.first_token) > 0:
            event["tokens_per_second"] = round((self.generated - 1) / seconds, 2)
        return event | confidence_of(self.written, job.ending.start, self.sent)


class Sampler:
    """Chooses the next token of one request: the likeliest at temperature 0, else by top-k 40,
    top-p, min-p, temperature and the seed.

    Drafts do not change the choice: each position is sampled in turn, with one random number per
    token. But the size of a batch changes how logits are rounded, so the same seed gives the same
    text only where the batches are the same.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.chain = None
        if request.temperature < MIN_TEMPERATURE:
            return
        self.chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        seed = api.LLAMA_DEFAULT_SEED if request.seed is None else request.seed
        for sampler in (
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_init_top_p(request.top_p or 0.95, 1),
            api.llama_sampler_init_min_p(0.05, 1),
            api.llama_sampler_init_temp(request.temperature),
            api.llama_sampler_init_dist(seed),
        ):
            api.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, model: Llama, index: int) -> int:
        if not self.chain:
            return model.greedy(index)
        return int(api.llama_sampler_sample(self.chain, model.context, index))

    def close(self) -> None:
        api.llama_sampler_free(self.chain)  # which may be NULL
