"""A thread that owns one loaded model, schedules completions, drafts tokens and keeps prefixes. To
try without HTTP:

    import pathlib, queue
    from cerebrum.vps.decoder import ModelTally
    from cerebrum.vps.job import Job
    from cerebrum.vps.llama import Settings, start_library
    from cerebrum.vps.plan import LoadPlan
    from cerebrum.vps.schedule import Baton
    from cerebrum.request import GenerationRequest
    from cerebrum.vps.worker import Worker
    start_library()
    plan = LoadPlan("qwen", pathlib.Path("model.gguf"), Settings())
    worker = Worker(plan, Baton(), ModelTally())
    worker.start()
    events, batch = queue.SimpleQueue(), [{}]
    request = GenerationRequest("def fibonacci(n):", language="python")
    worker.submit(worker.prepare(Job(request, events.put)))
    while "done" not in batch[-1]:
        batch = events.get()
        print(*(event.get("token", "") for event in batch), sep="", end="", flush=True)

Who owns what
- One `Worker` thread for each loaded model owns that model's llama context. Other threads only
  tokenize and abort with it. They add a `Job` to the worker's waiting ones. The worker's thread
  passes events to the job's `deliver`; the last event of a job that is not cancelled says that it
  is done, or is an error. A flag cancels a job. A byte that llama.cpp's abort callback reads aborts
  a running `llama_decode`; who may abort whom is the table of `way_offered`.
- The worker's `Decoder` decides what each decode computes, and handles the result.
- A worker schedules sequences. A sequence occupies a slot of the KV cache while it runs, and then
  until the slot is needed. Then the worker parks the sequence in a `PrefixStore` as bytes;
  unloading writes these bytes to disk.
- A `Baton` lets one model decode at a time.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp

from cerebrum.metrics import CANCELLED, resident_bytes
from cerebrum.vps.decoder import Compute, Decoder, DraftModel, ModelTally
from cerebrum.vps.encoding import untuned
from cerebrum.vps.job import Job, Run
from cerebrum.vps.llama import MB, Llama, ModelError, Settings, Slot, llama_log
from cerebrum.vps.memory import check_digest, file_stamp
from cerebrum.vps.plan import LoadPlan
from cerebrum.vps.prefixes import (
    MIN_PREFIX,
    STORE_SECONDS,
    Sequences,
    common_prefix,
    load_parked,
    save_parked,
)
from cerebrum.vps.schedule import Baton, measure_costs
from cerebrum_common import HttpError, internal_error, log

# A worker has hung after the longer of HUNG_SECONDS (a decode takes a few) and SLOWEST times the
# decode's expected time.
HUNG_SECONDS = 120.0
SLOWEST = 20.0
# Until a run whose prompt stands still, or a draft model, looks again whether another model works.
GIVE_WAY_SECONDS = 0.05


# -------------------------------------------------------------------------- policy: who makes way


class Way(IntEnum):
    """How readily the decode of a run is aborted, and for whom. Higher levels include the lower
    ones: a job that needs one level (`way_needed`) aborts a run that offers this or a higher one
    (`way_offered`).
    """

    STAYS = 0  # for nobody
    FOR_OTHERS = 1  # for a job that does not go on with what the run reads
    FOR_HURRIED = 2  # also for a job that does, but has little time
    # For any job, which gets the run's slot if it needs one. `Engine` asks for jobs of normal
    # priority alone.
    WITH_SLOT = 3
    AT_ONCE = 4  # also because its own job is cancelled: nobody needs the result


def way_needed(run: Run, job: Job | None) -> Way:
    """The least that a run must offer for `job` to abort its decode; None: for any job of another
    model. A job that is cancelled aborts only what nobody waits for.
    """
    if job and job.cancelled:
        return Way.AT_ONCE
    if not job or common_prefix(run.prompt, job.part.tokens) < MIN_PREFIX:
        return Way.FOR_OTHERS
    return Way.FOR_HURRIED if job.request.prompt_ms else Way.WITH_SLOT


def way_offered(run: Run, is_long: bool = False) -> Way:
    """For whom the decode of a run is aborted now. `is_long`: it takes more than PREFILL_SECONDS.

        the first row that fits what is computed for it         it offers
        its text, and its client has left                       AT_ONCE
        its text                                                STAYS
        its prompt and no lost text, of low priority            WITH_SLOT
        its prompt and text that it has lost, of low priority   FOR_HURRIED
        its prompt ahead, longer than a key should wait         FOR_HURRIED
        its prompt in a long chunk                              FOR_OTHERS
        its prompt, and its client has left                     FOR_OTHERS, as its next key goes on
        its prompt in a short chunk                             STAYS

    What a decode has read of a prompt until then is kept, in whole micro-batches.
    """
    has_left = run.job.cancelled
    if not run.prefilling:
        return Way.AT_ONCE if has_left else Way.STAYS
    if run.low and not run.first_token:
        return Way.WITH_SLOT
    if run.low or run.makes_way_for_hurried:
        return Way.FOR_HURRIED
    return Way.FOR_OTHERS if is_long or has_left else Way.STAYS


def leaves_more(run: Run, job: Job) -> bool:
    """Whether a prompt that is being read will soon leave more of a job's beginning than its slot
    has now. One of low priority may take long: only another such waits for it.
    """
    if not run.prefilling or run.low > job.low:
        return False
    prompt = job.part.tokens
    return common_prefix(run.prompt, prompt) > common_prefix(run.slot.tokens, prompt) + MIN_PREFIX


def slots_for(job: Job, decoder: Decoder) -> list[Slot]:
    """The slots that a waiting job may get: the idle ones, or the first that makes way for it. No
    slots while it should wait.
    """
    runs = decoder.runs
    # A recurrent state is not shared.
    if not decoder.model.recurrent and any(leaves_more(run, job) for run in runs):
        return []
    idle = [slot for slot in decoder.answer_slots if not slot.run]
    if idle or job.low:
        return idle
    return [run.slot for run in runs if way_offered(run) == Way.WITH_SLOT][:1]


# ------------------------------------------------------------------------------------- IO: loading


class Loaded(NamedTuple):
    """A model in memory, and what it was loaded from: the tuned file or the published one."""

    model: Llama
    path: Path
    settings: Settings
    encoding: str
    key: str  # all that a saved state depends on


def load(plan: LoadPlan, beat: Callable[..., bool], abort_flag: Any = None) -> Loaded:
    """Load the tuned file, or the published one if there is no tuned file or loading it fails.
    `beat` is called now and then, with the share that has been read, and returns whether to give
    up. A draft model gets the `abort_flag` of its model.
    """

    def read(path: Path, settings: Settings, sha256: str, encoding: str) -> Loaded:
        # The published file is checked, also if its tuned copy is loaded, which knows its digest.
        check_digest(plan.path, sha256, settings.state_dir, beat)
        model = Llama(path, settings, beat, plan.fim, plan.layout, abort_flag)
        made = model.n_ctx, model.unified
        key = repr((file_stamp(path), llama_cpp.__version__, made, settings))
        return Loaded(model, path, settings, encoding, key)

    if tuned := plan.tuned:
        passport = tuned.passport
        try:
            return read(tuned.path, tuned.settings, passport.source, passport.encoding)
        except (ModelError, OSError) as error:
            if beat():
                raise
            reason = f"its tuned file cannot be used: {error}"
            log.warning("model %s", untuned(plan.model_id, reason))
    return read(plan.path, plan.settings, plan.sha256, "published")


class Worker(threading.Thread):
    """Owns one model's llama context, from load to unload.

    1. It loads until `ready` is set, to an HttpError if that failed.
    2. It serves until `stop` is called or it fails: then it is `stopping`.
    3. It closes: every submitted job has a last event then, unless it was cancelled.
    4. It is over when `ended` is set, with everything freed.

    The Pool starts and stops it; an Engine submits and cancels jobs from the event loop, and
    prepares them in further threads.
    """

    def __init__(self, plan: LoadPlan, baton: Baton, tally: ModelTally) -> None:
        super().__init__(name=f"worker-{plan.model_id}", daemon=True)
        self.plan = plan
        self.model_id = plan.model_id
        self.baton = baton
        self.ready = Future[None]()
        self.ended = Future[None]()
        self.memory_bytes = 0  # that the load took
        self.stopping = False  # or it has failed
        self.share_read = 0.0  # of the file that is loaded, from 0 to 1
        self.loaded: Loaded | None = None  # the model
        self.draft_loaded: Loaded | None = None  # its draft model
        self.decoder: Decoder | None = None  # from the end of the load until it closes
        # Other threads append; the thread removes, and appends those that lose their slots.
        self.waiting = list[Job]()
        self.tally = tally
        # Bytes to drop of the parked sequences; other threads append, the thread removes.
        self.sheds = list[tuple[int, Future[None]]]()
        self.due = math.inf  # deadline of what it does; monotonic; written by the thread
        self._alarm = threading.Event()  # something has changed that the thread should look at
        self._door = threading.Lock()  # guards `_closed`, after which no job begins to wait
        self._closed = False
        self._farewell = HttpError(
            "SHUTTING_DOWN", f"model {self.model_id} is being unloaded; try again"
        )
        self._error = self._farewell  # of running requests, or of the load

    # -- called by any other thread

    @property
    def decoders(self) -> list[Decoder]:
        """Once the model is loaded: first the draft model's, if there is one."""
        decoder = self.decoder
        return [each for each in (decoder and decoder.draft_model, decoder) if each]

    @property
    def stored_bytes(self) -> int:
        """Memory of the parked sequences."""
        decoder = self.decoder
        return decoder.sequences.store.size if decoder else 0

    def prepare(self, job: Job) -> Job:
        """`Job.prepare`, once the model is loaded. A megabyte of text takes a second, so an event
        loop must use a thread.
        """
        job.prepare(self._loaded())
        return job

    def tokenize(self, text: str, first: bool, special: bool) -> list[int]:
        """`Vocabulary.tokenize`, once the model is loaded."""
        with self._loaded().vocabulary.in_use() as vocabulary:
            return vocabulary.tokenize(text, first, special)

    def _loaded(self) -> Llama:
        self.ready.result()
        assert self.loaded
        return self.loaded.model

    def submit(self, job: Job) -> None:
        """Hand over a prepared job; its events begin to arrive. `Engine` calls `give_way` next."""
        job.progress("queued", 0, 1)
        job.submitted = time.monotonic()
        with self._door:
            if not self._closed:
                self.waiting.append(job)
                self.wake()
                return
        job.deliver([self._farewell])

    def cancel(self, job: Job) -> None:
        """A job's request is over for its client: answered, superseded or left. Abort a decode that
        writes for such jobs alone.
        """
        job.cancelled = True
        self.wake()
        self._abort(job)

    def give_way(self, job: Job | None) -> None:
        """Abort a decode that `job`, or one of another model (None), should not wait for. A
        recurrent model is not aborted, since it would have to read from the beginning.
        """
        if self.loaded and not self.loaded.model.recurrent:
            self._abort(job)

    def _abort(self, job: Job | None) -> None:
        """Abort the current decode if each of its runs offers at least the way that `job` needs;
        also one that is for no run yet. `Compute.decode` clears the byte before it asks a last time
        who has left, so no cancelled job is missed.
        """
        decoder = self.decoder
        current = decoder and decoder.compute.current
        if decoder and current:
            runs = current.runs
            if all(way_offered(run, current.is_long) >= way_needed(run, job) for run in runs):
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
        """Make the thread look at what has changed."""
        self._alarm.set()

    def stop(self) -> None:
        """Make the thread save its sequences and end soon, without waiting for it."""
        self.stopping = True
        self.wake()
        if self.loaded:
            self.loaded.model.abort()

    # -- the thread

    def _beat(self, seconds: float = 0.0) -> bool:
        """Note progress; the next step may take `seconds`. Returns whether to stop."""
        self.due = time.monotonic() + max(HUNG_SECONDS, SLOWEST * seconds)
        return self.stopping

    def _loading(self, share: float = 0.0) -> bool:
        """Note this share of a file as read. Returns whether to stop."""
        self.share_read = share
        return self._beat()

    def run(self) -> None:
        try:
            self._beat()
            try:
                decoder = self._load()
                self.ready.set_result(None)
                self._serve(decoder)
            except Exception as error:
                self._error = self._failure(error)
                self.stopping = True
            self._close()
        finally:
            self.due = math.inf
            if not self.ready.done():  # only now that the model's memory is free
                self.ready.set_exception(self._error)
            self.ended.set_result(None)

    def _serve(self, decoder: Decoder) -> None:
        """Drop what is to be shed, start new jobs, and decode what the running ones need next."""
        while True:
            self._alarm.clear()  # before looking, so that no change is missed
            if self._beat():
                return
            store = decoder.sequences.store
            while self.sheds:
                size, done = self.sheds.pop()
                store.shrink(store.size - size)
                done.set_result(None)
            self._start_jobs(decoder)
            if self._alarm.is_set():
                # More jobs may have come while a sequence was parked, which takes milliseconds.
                continue
            for each in self.decoders:
                some_wait = any(not run.low for run in each.runs)
                self.baton.note(each, each.costs(1) if some_wait else None)
            if not any(each.runs for each in self.decoders):
                self._idle(decoder)
                continue
            turned = [each.turn() for each in self.decoders]
            if not any(turned):
                self._alarm.wait(GIVE_WAY_SECONDS)

    def _failure(self, error: Exception) -> HttpError:
        """Log why the worker ends early, and return the error for its clients."""
        name = f"model {self.model_id}"
        if self.ready.done():
            log.error(
                "%s: the worker failed; the next request loads the model again",
                name,
                exc_info=error,
            )
            return HttpError("INTERNAL_ERROR", f"{name} failed and is loaded again; see the log")
        if self.stopping:
            return HttpError("SHUTTING_DOWN", f"{name}: loading was given up")
        if isinstance(error, ModelError):
            said = " | ".join(llama_log.lines)[-1000:]
            log.error("%s: %s; llama.cpp said: %s", name, error, said)
            return HttpError("MODEL_LOAD_FAILED", f"{name} ({self.plan.path.name}): {error}")
        log.error("%s: loading failed", name, exc_info=error)
        return HttpError("MODEL_LOAD_FAILED", f"{name}: loading failed; see the log")

    def _load(self) -> Decoder:
        before = resident_bytes()
        self.loaded = loaded = load(self.plan, self._loading)
        model = loaded.model
        settings = loaded.settings
        costs = measure_costs(model, self.baton, self._beat)
        compute = Compute(self.baton, self._beat)
        draft_model = self._load_draft(model, compute)
        sequences = Sequences(model, settings.sequences, settings.cache_mb * MB)
        store = sequences.store
        for entry in load_parked(self.plan.kv_dir, loaded.key):
            self._beat()
            store.add(entry)
        # Resident memory that loading added.
        self.memory_bytes = max(0, resident_bytes() - before - store.size)
        parts = model, sequences, sequences.slots, costs, compute, self.tally, self.waiting
        self.decoder = Decoder(*parts, drafting=settings.draft, draft_model=draft_model)
        drafts = f", drafts by {draft_model.writer}" if draft_model else ""
        log.info(
            "model %s loaded (%s%s): %d MB; decode of 1/16 tokens %s ms; %d sequences restored",
            self.model_id,
            loaded.encoding,
            drafts,
            self.memory_bytes // MB,
            f"{1000 * costs(1):.1f}/{1000 * costs(16):.1f}",
            len(store.entries),
        )
        return self.decoder

    def _load_draft(self, large: Llama, compute: Compute) -> DraftModel | None:
        """The draft model, if there is one; None, and a line in the log, if it cannot be loaded."""
        plan = self.plan.draft
        if not plan:
            return None
        try:
            self.draft_loaded = loaded = load(plan, self._loading, large.abort_flag)
            model = loaded.model
            costs = measure_costs(model, self.baton, self._beat)
        except (ModelError, OSError) as error:
            if self._beat():
                raise
            log.warning("model %s: %s writes no drafts: %s", self.model_id, plan.model_id, error)
            return None
        settings = loaded.settings
        sequences = Sequences(model, settings.sequences + settings.early * model.unified, 0)
        # Those before follow the large model's.
        answer_slots = sequences.slots[settings.sequences :]
        parts = model, sequences, answer_slots, costs, compute, self.tally, self.waiting
        return DraftModel(*parts, writer=plan.model_id)

    def _close(self) -> None:
        """Answer every job, save the parked sequences, free the model. Each step runs even if an
        earlier one fails.
        """
        with self._door:
            self._closed = True
        decoder = self.decoder
        for each in self.decoders:  # the draft model's first: its jobs wait for the large one then
            self.baton.note(each, None)
            for run in each.runs:
                with self._logged("ending a request"):
                    each.fail(run, self._error)
        for job in self.waiting:  # they may be sent again, whatever the others have ended by
            with self._logged("refusing a request"):
                job.deliver([self._farewell])
        if decoder and self.loaded:
            with self._logged("saving parked sequences"):
                sequences = decoder.sequences
                for slot in sequences.slots:
                    self._beat()
                    sequences.park(slot)
                entries = sequences.store.entries
                save_parked(self.plan.kv_dir, self.loaded.key, entries, self._beat)
        self.decoder = None
        for loaded in (self.draft_loaded, self.loaded):
            if loaded:
                with self._logged("freeing it"):
                    loaded.model.close()

    @contextlib.contextmanager
    def _logged(self, task: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            log.exception("model %s: %s failed", self.model_id, task)

    def _start_jobs(self, decoder: Decoder) -> None:
        """Drop cancelled jobs, and start waiting ones: low priority last, the oldest first."""
        for each in self.decoders:
            for run in each.runs:
                if run.job.cancelled:
                    each.release(run, CANCELLED)
        for job in sorted(self.waiting, key=lambda job: (job.low, job.submitted)):
            if job.cancelled:
                self.waiting.remove(job)
                self.tally.ended[CANCELLED] += 1
                continue
            chosen = decoder.choose(job)
            if slots := slots_for(job, chosen):
                self.waiting.remove(job)
                self._start(job, slots, chosen)

    def _start(self, job: Job, slots: list[Slot], decoder: Decoder) -> None:
        """Start the job in one of these slots, which are idle, or the only one makes way."""
        try:
            if run := slots[0].run:
                decoder.put_back(run)
                self.wake()  # its job waits again
            decoder.start(job, slots)
        except Exception as error:
            for slot in slots:  # any of them may be half prepared
                decoder.model.cut(slot, 0)
            job.deliver([job.context.run(internal_error, error)])

    def _idle(self, decoder: Decoder) -> None:
        """Wait for the alarm, once the draft model has read what it lacks. Idle sequences are
        stored only after STORE_SECONDS of quiet, because storing 3,500 tokens takes a fifth of a
        second and no request should wait for the storing.
        """
        while decoder.draft_model and decoder.draft_model.read_idle(decoder.answer_slots):
            self._beat()
            if self._alarm.wait(GIVE_WAY_SECONDS if self.baton.busy else 0):
                return
        if self._alarm.wait(STORE_SECONDS):
            return
        for slot in decoder.answer_slots:
            if not slot.run and not self._alarm.is_set():
                decoder.sequences.back_up(slot)
        self.due = math.inf
        self._alarm.wait()
