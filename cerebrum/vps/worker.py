"""A thread that owns one loaded model, schedules completions, drafts tokens and keeps prefixes. To
try without HTTP:

    import pathlib, queue
    from cerebrum.vps.llama import Settings, start_library
    from cerebrum.vps.tokens import common_prefix
from cerebrum.vps.vocabulary import CompletionRequest
    from cerebrum.vps.worker import Job, Loader, Worker
    start_library()
    worker = Worker(Loader("qwen", pathlib.Path("model.gguf"), Settings()))
    worker.start()
    events, batch = queue.SimpleQueue(), [{}]
    request = CompletionRequest("def fibonacci(n):", language="python")
    worker.submit(worker.prepare(Job(request, events.put)))
    while "done" not in batch[-1]:
        batch = events.get()
        print(*(event.get("token", "") for event in batch), sep="", end="", flush=True)

Who owns what
- One `Worker` thread for each loaded model owns that model's llama context. Other threads only
  tokenize and abort with it. They add a `Job` to the worker's waiting ones. The worker's thread
  passes events to the job's `deliver`, and every submitted job gets a last event. A flag cancels a
  job. A byte that llama.cpp's abort callback reads aborts a running `llama_decode`.
- A worker schedules sequences. A sequence occupies a slot of the KV cache while it runs, and then
  until the slot is needed. Then the worker parks the sequence in a `PrefixStore` as bytes;
  unloading writes these bytes to disk.
- A `Baton` lets one model decode at a time.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from cerebrum.metrics import CANCELLED, Tally, resident_bytes
from cerebrum.text.ending import Ending
from cerebrum.vps.confidence import Confidence, Judged
from cerebrum.vps.drafts import Drafter, Gain
from cerebrum.vps.encoding import TunedFile, untuned
from cerebrum.vps.llama import (
    ABORTED,
    MAX_CHUNK,
    MAX_DRAFT,
    MB,
    Llama,
    ModelError,
    Sampler,
    Settings,
    Slot,
    check_digest,
    file_stamp,
    llama_log,
)
from cerebrum.vps.prefixes import MIN_PREFIX, STORE_SECONDS, Sequences, load_parked, save_parked
from cerebrum.vps.schedule import (
    PREFILL_SECONDS,
    Baton,
    Costs,
    chunk_size,
    measure_costs,
    share_size,
)
from cerebrum.vps.tokens import common_prefix
from cerebrum.vps.vocabulary import CompletionRequest, begun_answer
from cerebrum_common import HttpError, log, request_id_var

# A step has hung after the longer of STEP_SECONDS (a step takes a few) and SLOWEST times the
# decode's expected time.
STEP_SECONDS, SLOWEST = 120.0, 20.0
DOUBT_TEMPERATURE = (
    0.5  # up to this one, the probability of a token says how sure the model is of it
)
MAX_BACKLOG = 256  # a job pauses when its client has this many deliveries unread
RESUME_BACKLOG = 64  # the reader of the deliveries calls `Worker.wake` when this few are left
GIVE_WAY_SECONDS = (
    0.05  # until a run whose prompt stands still looks again whether another model still works
)
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
        self, request: CompletionRequest, deliver: Deliver, unread: Callable[[], int] = lambda: 0
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


@dataclass(slots=True)
class ModelTally(Tally):
    """Totals of a model's completions and decodes, kept when the model is unloaded. The worker's
    thread writes all fields except the three about loads.
    """

    drafts: int = 0  # decodes that checked a draft
    decodes: int = 0  # calls of llama_decode
    decoded_sequences: int = 0  # sequences per decode, summed over all decodes
    prompt_seconds: float = 0.0  # from the start of each completion to its first token
    token_seconds: float = 0.0  # from the first token of each completion to its last
    loads: int = 0
    failed_loads: int = 0
    load_seconds: float = 0.0  # of the successful loads


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


@dataclass(slots=True)
class Work:
    """One sequence's part in the next decode: tokens to append, the last `outputs` of them with
    logits.
    """

    run: Run
    tokens: list[int]
    outputs: int


class Decoder:
    """What the next `llama_decode` computes for each running sequence, and what becomes of its
    result.

    Owned by a worker; every call is from its thread. `stop(seconds)` is asked before a decode that
    should take so long.
    """

    def __init__(
        self,
        model: Llama,
        sequences: Sequences,
        costs: Costs,
        baton: Baton,
        tally: ModelTally,
        stop: Callable[[float], bool],
        drafting: bool,
    ) -> None:
        self.model, self.sequences, self.costs, self.baton, self.tally = (
            model,
            sequences,
            costs,
            baton,
            tally,
        )
        self.stop, self.gain, self.words = stop, Gain(), model.vocabulary
        self.drafting = drafting and model.max_draft > 0
        self.running: list[Run] = []  # sequences in the current llama_decode; read by other threads
        self.is_long = (
            False  # the current llama_decode takes more than PREFILL_SECONDS; read by other threads
        )

    @property
    def runs(self) -> list[Run]:
        """The jobs that have a slot, in the order of the slots."""
        slots = self.sequences.slots
        return [slot.run for slot in slots if isinstance(slot.run, Run)]

    def yielding(self) -> Run | None:
        """The run that gives its slot to a job of normal priority: one of low priority whose prompt
        is being read. A completion that has begun to write keeps its slot.
        """
        for run in self.runs:
            if run.low and run.prefilling and not run.first_token:
                return run
        return None

    def start(self, job: Job, free: list[Slot]) -> None:
        """Give the job a slot; what the slot lacks of its prompt is prefilled."""
        slot, guide = self.sequences.place(job.prompt, free)
        job.progress("prefill", len(slot.tokens), len(job.prompt))
        if job.cached is None:  # else the job itself has read these tokens, before it gave way
            job.cached = len(slot.tokens)
            self.tally.cached_tokens += job.cached
        slot.run = run = Run(job, slot, guide)
        if self.model.recurrent and self.sequences.store.budget:
            # A later prompt has this one's beginning, or all of it; its last token may be another
            # one.
            run.marks = [
                mark for mark in (job.before - 1, len(job.prompt) - 1) if mark >= MIN_PREFIX
            ]

    def turn(self, runs: list[Run]) -> bool:
        """Decode the next work of every run, together. False if there is none: prompts of low
        priority are read only while no other request needs the CPU.
        """
        is_busy = not all(run.low for run in runs) or self.baton.fastest_other(self) < math.inf
        runs = [run for run in runs if not (is_busy and run.low and run.prefilling)]
        works: list[Work] = []
        for run in runs:
            with self._blamed_on(run):
                works.append(self.next_work(run, runs))
        lengths, before = {len(work.tokens) - 1 for work in works}, self.tally.tokens
        writing = not any(work.run.prefilling for work in works)
        seconds = self._step(works)
        for length in lengths - {0} or {0} if writing else ():
            self.gain.learn(len(runs), length, self.tally.tokens - before, seconds)
        return bool(runs)

    def next_work(self, run: Run, runs: list[Run]) -> Work:
        prompt, slot = run.prompt, run.slot
        if run.pending is None:
            stop = min((mark for mark in run.marks if mark > len(slot.tokens)), default=len(prompt))
            reading = [
                len(other.prompt) - len(other.slot.tokens) for other in runs if other.prefilling
            ]
            # What is read of low priority must end soon when another request comes.
            pace = self._pace(own=run.low or len(reading) < len(runs))
            # An infill is often given up for the next key, and a micro-batch that is not done is
            # lost.
            short = run.hurried or self.model.recurrent or run.job.request.mode == "infill"
            piece = 1 if short else self.model.micro_batch
            size = chunk_size(stop - len(slot.tokens), reading, pace, self.costs, piece)
            end = len(slot.tokens) + min(size, MAX_CHUNK // len(runs))
            outputs = int(end == len(prompt) and run.job.max_tokens > 0)
            return Work(run, prompt[len(slot.tokens) : end], outputs)
        draft = self._draft(run, runs)
        if draft and not self.gain.pays(len(runs), len(draft)):
            draft = []
        return Work(run, [run.pending, *draft], 1 + len(draft))

    def _pace(self, own: bool) -> float:
        """Seconds per token of the fastest stream that waits for a decode, in this model (if `own`)
        or another.
        """
        return min(self.costs(1) if own else math.inf, self.baton.fastest_other(self))

    def _draft(self, run: Run, runs: list[Run]) -> list[int]:
        beside = len(runs) > 1
        # llama.cpp takes tokens back wrongly from one of several recurrent states in a batch.
        if not self.drafting or run.heal or (beside and self.model.recurrent):
            return []
        pace = self._pace(own=beside)
        room = min(
            self.model.max_draft,
            run.job.max_tokens - run.generated - 1,
            self.model.n_ctx - len(run.slot.tokens) - 2,
            MAX_CHUNK // len(runs) - 1,
            share_size(self.costs, pace) - 1 if pace < math.inf else MAX_DRAFT,
        )
        assert run.drafter
        return run.drafter.draft(room)

    def _step(self, works: list[Work]) -> float:
        """Run one llama_decode and handle its result for each sequence. Returns the seconds; 0.0 if
        it was not done.
        """
        self.model.abort_flag[0] = b"\x00"
        try:
            self.running = [work.run for work in works]
            if self.stop(0.0) or all(run.job.cancelled for run in self.running):
                return 0.0
            size = sum(len(work.tokens) for work in works)
            self.is_long = self.costs(size) * self.costs.slowdown > PREFILL_SECONDS
            with self.baton:
                if self.stop(self.costs(size)):
                    return 0.0
                begin = time.perf_counter()
                code = self.model.decode(
                    [(work.run.slot, work.tokens, work.outputs) for work in works]
                )
                seconds = time.perf_counter() - begin
        finally:
            self.running = []
        if code:
            self._after_failure(works, code)
            return 0.0
        self.costs.learn(size, seconds)
        self.tally.decodes += 1
        self.tally.decoded_sequences += len(works)
        base = 0
        for work in works:
            with self._blamed_on(work.run):
                if work.run.prefilling:
                    self._after_prefill(work, base)
                else:
                    self._after_decode(work, base)
            base += len(work.tokens)
        for work in works:
            work.run.flush()
        return time.perf_counter() - begin

    def _after_failure(self, works: list[Work], code: int) -> None:
        """Handle a decode that was aborted or that llama.cpp could not do."""
        for work in works:
            run, slot = work.run, work.run.slot
            tokens = slot.tokens[:]
            if self.model.recurrent:  # nobody knows how far the state has gone
                self.sequences.cut(slot, 0)
            elif run.prefilling:  # the tokens read before the abort stay useful as a prefix
                # The prompt's last token is left out: its logits are missing, so it must be decoded
                # again.
                read = min(self.model.computed(slot) - len(slot.tokens), len(work.tokens) - 1)
                slot.tokens += work.tokens[: max(0, read)]
                self.tally.prompt_tokens += max(0, read)
                run.hurried = True
            self._continue(run, tokens)
            if code != ABORTED:
                log.error("llama_decode answered %d", code)
                self.fail(run, HttpError("INTERNAL_ERROR", "the model could not be evaluated"))

    def _continue(self, run: Run, tokens: list[int]) -> None:
        """Drop what was decoded behind the slot's tokens. If `tokens`, those of the run, cannot all
        be kept, the run reads them again.
        """
        self.sequences.cut(run.slot, len(run.slot.tokens))
        if run.pending is not None and len(run.slot.tokens) < len(tokens):
            run.prompt, run.pending = [*tokens, run.pending], None

    @contextlib.contextmanager
    def _blamed_on(self, run: Run) -> Iterator[None]:
        """An exception in the work for one request ends that request alone."""
        try:
            yield
        except Exception:
            log.exception("request %s", run.job.request_id)
            self.fail(run, HttpError("INTERNAL_ERROR", "internal error; see the log"))
            self.sequences.cut(run.slot, 0)  # its tokens and its cells may no longer agree

    def _after_prefill(self, work: Work, base: int) -> None:
        run, slot = work.run, work.run.slot
        slot.tokens += work.tokens
        self.tally.prompt_tokens += len(work.tokens)
        run.job.progress("prefill", len(slot.tokens), len(run.prompt))
        if len(slot.tokens) in run.marks:
            self.sequences.keep(slot)
        if len(slot.tokens) < len(run.prompt):
            return
        if not work.outputs:
            self._finish(run, "length")
            return
        run.job.progress("decode", 0, run.job.max_tokens)
        run.pending = run.sample(self.model, base + len(work.tokens) - 1)
        ended = self._emit(run, run.pending)
        run.flush()
        if not ended:  # only now: a Drafter takes a millisecond for each thousand tokens
            run.drafter = Drafter(run.prompt, run.guide)
            run.drafter.advance(run.pending)

    def _after_decode(self, work: Work, base: int) -> None:
        """Accept drafted tokens as long as each equals the model's own choice at its position."""
        run, slot, drafted = work.run, work.run.slot, len(work.tokens) - 1
        accepted = 0
        for i, token in enumerate(work.tokens):
            slot.tokens.append(token)
            run.pending = run.sample(self.model, base + i)
            if self._emit(run, run.pending) or i == drafted or run.pending != work.tokens[i + 1]:
                break
            accepted += 1
        if drafted:
            self._continue(run, slot.tokens[:])
            run.drafted += drafted
            run.accepted += accepted
            self.tally.drafts += 1
            self.tally.draft_tokens += drafted
            self.tally.accepted_tokens += accepted

    def _emit(self, run: Run, token: int) -> bool:
        """Account for one sampled token; True if the completion ends with it."""
        run.last_token = time.monotonic()
        if not run.generated:
            run.first_token = run.last_token
        if self.words.is_end(token):
            run.confidence.add("", run.probability)
            self._finish(run, "stop")
            return True
        piece = self.words.piece(token)
        known = min(len(piece), len(run.heal))
        run.heal, piece = run.heal[known:], piece[known:]
        counts = (
            bool(piece) or not known
        )  # a token that only repeats the healed text does not count
        run.generated += counts
        self.tally.tokens += counts
        if run.drafter:
            run.drafter.advance(token)
        reason = run.feed(piece)
        full = len(run.slot.tokens) + 1 >= self.model.n_ctx
        run.has_line = run.has_line or b"\n" in piece
        limit = run.job.request.predict_ms
        late = limit > 0 and run.has_line and 1000 * (run.last_token - run.first_token) > limit
        cut = not reason and (run.generated >= run.job.max_tokens or full or late)
        if reason := "length" if cut else reason:
            self._finish(run, reason, flush=cut or reason == "unsure")
        return reason is not None

    def _finish(self, run: Run, reason: str, flush: bool = True) -> None:
        if flush:
            run.send(run.ending.flush(reason == "stop"))
        run.judge(run.confidence.last())
        run.outbox.append(run.result(reason))
        self.release(run, reason)

    def fail(self, run: Run, error: HttpError) -> None:
        if run.slot.run is run:  # otherwise it has had its last event
            run.outbox.append(error)
            self.release(run, error.code)

    def release(self, run: Run, reason: str = "") -> None:
        """Make the slot idle again. Its sequence stays as a prefix for later prompts. Without a
        reason, the job has not ended: it gives way, and starts again.
        """
        run.slot.run = None
        tally = self.tally
        tally.prompt_seconds += (run.first_token or time.monotonic()) - run.started
        if run.first_token:
            tally.token_seconds += run.last_token - run.first_token
            tally.spoke(
                run.first_token - run.job.submitted,
                run.last_token - run.job.submitted,
                run.generated,
            )
        if reason:
            tally.end(reason)
        run.slot.used = time.monotonic()
        run.sampler.close()
        run.flush()


@dataclass(slots=True)
class Loader:
    """Loads a model: the tuned file or the published one. `path`, `settings` and `encoding` are
    then those in use.
    """

    model_id: str
    path: Path
    settings: Settings
    sha256: str = ""
    tuned: TunedFile | None = None
    fim: Sequence[str] = ()
    layout: str = "psm"
    encoding: str = "published"
    key: str = ""  # of the caches on disk
    done: float = 0.0  # the share of the file that has been read

    def open(self, beat: Callable[[], bool]) -> Llama:
        """Load the tuned file, or the published one if there is no tuned file or loading it fails.
        `beat` is called now and then, and returns whether to give up.
        """

        def progress(done: float) -> bool:
            self.done = done
            return not beat()

        if tuned := self.tuned:
            try:
                check_digest(self.path, tuned.source, self.settings.state_dir, beat)
                model = Llama(tuned.path, tuned.settings, progress, self.fim, self.layout)
                self.path, self.settings, self.encoding = tuned.path, tuned.settings, tuned.encoding
                return model
            except (ModelError, OSError) as error:
                if beat():
                    raise
                log.warning(
                    "model %s", untuned(self.model_id, f"its tuned file cannot be used: {error}")
                )
        check_digest(self.path, self.sha256, self.settings.state_dir, beat)
        return Llama(self.path, self.settings, progress, self.fim, self.layout)

    def set_key(self, model: Llama) -> None:
        """`key`, of all that a saved state depends on."""
        settings = self.settings
        params = f"{settings.sequences} {settings.kv_type} {settings.micro_batch} {settings.uses_flash_attention}"
        key = f"{file_stamp(self.path)} {llama_cpp.__version__} {model.n_ctx} {model.unified} {params}"
        self.key = hashlib.sha256(key.encode()).hexdigest()

    @property
    def kv_dir(self) -> Path:
        return self.settings.state_dir / "kv" / self.model_id


class Worker(threading.Thread):
    """Owns one model's llama context, from load to unload.

    The thread settles three futures: `ready` when the model is loaded (or with an HttpError if
    loading failed), `ending` when it does no more work, and `ended` when everything is freed. Every
    submitted job gets a last event, whatever happens.
    """

    def __init__(
        self, loader: Loader, baton: Baton | None = None, tally: ModelTally | None = None
    ) -> None:
        super().__init__(name=f"worker-{loader.model_id}", daemon=True)
        self.loader, self.model_id = loader, loader.model_id
        self.baton = baton or Baton()
        self.ready: Future[None] = Future()
        self.ending: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.stopping = False
        self.memory_bytes = 0  # resident memory that loading added
        self.model: Llama | None = None
        self.decoder: Decoder | None = None  # once the model is loaded
        self.waiting: list[
            Job
        ] = []  # other threads append, the thread removes, and appends those that give way
        self.tally = tally or ModelTally()
        self.sheds: list[
            tuple[int, Future[None]]
        ] = []  # a queue: other threads append, the thread removes
        self.due = math.inf  # deadline of the current step; monotonic; written by the thread
        self._alarm = threading.Event()  # something has changed that the thread should look at
        self._door = threading.Lock()  # guards `_closed`, after which no job begins to wait
        self._closed = False
        self._farewell = HttpError(
            "SHUTTING_DOWN", f"model {self.model_id} is being unloaded; try again"
        )
        self._end = self._farewell  # of running requests, or of the load

    # -- called by any other thread

    @property
    def slots(self) -> list[Slot]:
        return decoder.sequences.slots if (decoder := self.decoder) else []

    @property
    def stored_bytes(self) -> int:
        """Memory of the parked sequences."""
        return decoder.sequences.store.size if (decoder := self.decoder) else 0

    def prepare(self, job: Job) -> Job:
        """`Job.prepare`, once the model is loaded. A megabyte of text takes a second, so an event
        loop must use a thread.
        """
        self.ready.result()
        assert self.model
        job.prepare(self.model)
        return job

    def tokenize(self, text: str, first: bool, special: bool) -> list[int]:
        """`Vocabulary.tokenize`, once the model is loaded."""
        self.ready.result()
        assert self.model
        with self.model.vocabulary.in_use() as words:
            return words.tokenize(text, first, special)

    def submit(self, job: Job) -> None:
        """Hand over a prepared job; its events begin to arrive."""
        job.progress("queued", 0, 1)
        job.submitted = time.monotonic()
        with self._door:
            if not self._closed:
                self.waiting.append(job)
                self.wake()
                return
        job.deliver([self._farewell])

    def cancel(self, job: Job) -> None:
        """Cancel a job whose client has left. Abort a running decode that has only cancelled
        jobs.
        """
        job.cancelled = True
        self.wake()
        self._abort_if(lambda run: run.job.cancelled)

    def give_way(self, job: Job) -> None:
        """Abort a running decode that only reads prompts, of low priority or in a long chunk:
        another request has come, this job. The micro-batches that are done stay, but for a
        recurrent model, which would have to begin again.
        """
        if (decoder := self.decoder) and not decoder.model.recurrent:
            is_long, prompt = decoder.is_long, job.prompt

            def is_in_the_way(run: Run) -> bool:
                waited_for = common_prefix(run.prompt, prompt) >= MIN_PREFIX
                return run.prefilling and (run.low or (is_long and not waited_for))

            self._abort_if(is_in_the_way)

    def _abort_if(self, is_meant: Callable[[Run], bool]) -> None:
        """Abort a running decode that is for such runs alone."""
        if (
            (decoder := self.decoder)
            and (running := decoder.running)
            and all(map(is_meant, running))
        ):
            decoder.model.abort()

    def shed(self, size: int) -> Future[None]:
        """Drop the least recently used parked sequences, of `size` bytes or more, or all. The
        future is set after that, but never if the thread ends before.
        """
        done = Future[None]()
        self.sheds.append((size, done))
        self.wake()
        return done

    def wake(self) -> None:
        """Make the thread look at its jobs, for instance when the client of a paused job has read
        on.
        """
        self._alarm.set()

    def stop(self) -> None:
        """Make the thread end soon, without waiting for it. The thread first saves its sequences to
        disk.
        """
        self.stopping = True
        self.wake()
        if self.model:
            self.model.abort()

    # -- the thread

    def _beat(self, seconds: float = 0.0) -> bool:
        """Note progress for the watchdog; the next step may take `seconds`. Returns whether to
        stop.
        """
        self.due = time.monotonic() + max(STEP_SECONDS, SLOWEST * seconds)
        return self.stopping

    def run(self) -> None:
        try:
            self._beat()
            try:
                decoder = self._load()
                self.ready.set_result(None)
                self._serve(decoder)
            except Exception as error:
                self._end = self._failure(error)
            self.ending.set_result(None)
            self._close()
        finally:
            self.due = math.inf
            if not self.ready.done():  # only now that the model's memory is free
                self.ready.set_exception(self._end)
            self.ended.set_result(None)

    def _serve(self, decoder: Decoder) -> None:
        """The worker's loop: start new jobs, and decode what the running ones need next."""
        while True:
            self._alarm.clear()  # before looking, so that no change is missed
            if self._beat():
                return
            while self.sheds:
                size, done = self.sheds.pop()
                decoder.sequences.store.shrink(self.stored_bytes - size)
                done.set_result(None)
            self._start_jobs(decoder)
            if self._alarm.is_set():
                # more jobs may have come while a sequence was parked, which takes milliseconds
                continue
            # Without those whose clients do not keep up.
            runs = [run for run in decoder.runs if run.job.unread() < MAX_BACKLOG]
            self.baton.note(decoder, decoder.costs(1) if not all(run.low for run in runs) else None)
            if not runs:
                self._rest(decoder.sequences)
            elif not decoder.turn(runs):
                self._alarm.wait(GIVE_WAY_SECONDS)

    def _failure(self, error: Exception) -> HttpError:
        """Log why the worker ends early, and return the error for its clients."""
        model = self.model_id
        if self.ready.done():
            self.stopping = True
            log.error(
                "model %s: the worker failed; the next request loads the model again",
                model,
                exc_info=error,
            )
            return HttpError(
                "INTERNAL_ERROR", f"model {model} failed and is loaded again; see the log"
            )
        if self.stopping:
            return HttpError("SHUTTING_DOWN", f"model {model}: loading was given up")
        if isinstance(error, ModelError):
            log.error(
                "model %s: %s; llama.cpp said: %s",
                model,
                error,
                " | ".join(llama_log.lines)[-1000:],
            )
            return HttpError(
                "MODEL_LOAD_FAILED", f"model {model} ({self.loader.path.name}): {error}"
            )
        log.error("model %s: loading failed", model, exc_info=error)
        return HttpError("MODEL_LOAD_FAILED", f"model {model}: loading failed; see the log")

    def _load(self) -> Decoder:
        loader, before = self.loader, resident_bytes()
        self.model = loader.open(self._beat)
        loader.set_key(self.model)
        costs = measure_costs(self.model, self.baton, self._beat)
        settings = loader.settings
        sequences = Sequences(self.model, settings.sequences, settings.cache_mb * MB)
        for entry in load_parked(loader.kv_dir, loader.key, sequences.store.budget):
            self._beat()
            sequences.store.add(entry)
        self.memory_bytes = max(0, resident_bytes() - before - sequences.store.size)
        self.decoder = Decoder(
            self.model, sequences, costs, self.baton, self.tally, self._beat, settings.draft
        )
        log.info(
            "model %s loaded (%s): %d MB; decode of 1/16 tokens %.1f/%.1f ms; %d sequences "
            "restored",
            self.model_id, loader.encoding, self.memory_bytes // MB, *(costs(n) * 1e3 for n in (1, 16)),
            len(sequences.store.entries),
        )  # fmt: skip
        return self.decoder

    def _close(self) -> None:
        """Answer every job, save the parked sequences, free the model. Each step runs even if an
        earlier one fails.
        """
        with self._door:
            self._closed = True
        self.baton.note(self.decoder, None)
        if decoder := self.decoder:
            for run in decoder.runs:
                with self._logged("ending a request"):
                    decoder.fail(run, self._end)
        for job in self.waiting:
            with self._logged("refusing a request"):
                job.deliver([self._farewell])
        if self.decoder:
            with self._logged("saving parked sequences"):
                for slot in self.slots:
                    self._beat()
                    self.decoder.sequences.park(slot)
                save_parked(
                    self.loader.kv_dir,
                    self.loader.key,
                    self.decoder.sequences.store.entries,
                    self._beat,
                )
        self.decoder = None
        if self.model:
            with self._logged("freeing the model"):
                self.model.close()

    @contextlib.contextmanager
    def _logged(self, step: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            log.exception("model %s: %s failed", self.model_id, step)

    def _start_jobs(self, decoder: Decoder) -> None:
        """Drop cancelled jobs, and start waiting ones while there are slots: those of low priority
        last, the oldest first.
        """
        for run in decoder.runs:
            if run.job.cancelled:
                decoder.release(run, CANCELLED)
        for job in sorted(self.waiting, key=lambda job: (job.low, job.submitted)):
            if job.cancelled:
                self.waiting.remove(job)
                self.tally.end(CANCELLED)
                continue
            slots = [slot for slot in self.slots if not slot.run]
            yielding = None if slots or job.low else decoder.yielding()
            if yielding:
                slots = [yielding.slot]
            if slots and not decoder.sequences.is_coming(job.prompt, job.low):
                self.waiting.remove(job)
                self._start(job, slots, yielding, decoder)

    def _start(self, job: Job, slots: list[Slot], yielding: Run | None, decoder: Decoder) -> None:
        """Start the job in one of the slots, after the run that yields its slot has left it."""
        try:
            if yielding:
                decoder.sequences.cut_to_budget(yielding.slot)
                decoder.release(yielding)
                yielding.job.progress("queued", 0, 1)
                self.waiting.append(yielding.job)
            decoder.start(job, slots)
        except Exception:
            log.exception("request %s could not be started", job.request_id)
            for slot in slots:  # any of them may be half prepared
                decoder.sequences.cut(slot, 0)
            job.deliver([HttpError("INTERNAL_ERROR", "internal error; see the log")])

    def _rest(self, sequences: Sequences) -> None:
        """Wait for the alarm. Idle sequences are stored only after STORE_SECONDS of quiet, because
        storing 3,500 tokens takes a fifth of a second and no request should wait for the storing.
        """
        if self._alarm.wait(STORE_SECONDS):
            return
        for slot in self.slots:
            if not slot.run and not self._alarm.is_set():
                sequences.keep(slot)
        self.due = math.inf
        self._alarm.wait()
