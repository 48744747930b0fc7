"""What a model decodes next: each running completion's part of a `llama_decode`, and what becomes
of its result.

`Compute` calls llama.cpp, in turn with other models. A `Decoder` decides for its runs, and counts
in a `ModelTally`. A `DraftModel` is the `Decoder` of a small model beside a large one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from cerebrum.metrics import Tally
from cerebrum.vps.drafts import (
    MODEL,
    MODEL_LENGTH,
    Case,
    Drafter,
    Gain,
    catch_up_seconds,
    is_worth_checking,
    is_worth_reading,
)
from cerebrum.vps.job import Job, Run
from cerebrum.vps.llama import ABORTED, MAX_CHUNK, Llama, Part, Slot
from cerebrum.vps.prefixes import MIN_PREFIX, Sequences
from cerebrum.vps.schedule import (
    PAUSE_SECONDS,
    PREFILL_SECONDS,
    Baton,
    Costs,
    chunk_size,
    longest_delay,
    who_answers,
)
from cerebrum_common import HttpError, internal_error, log

LAST = -1  # the last logits of a decode
# Longest piece of a text that is read before anybody waits for it, or by a draft model that
# answers. A request that does not need the piece aborts it, and the piece is lost; but shorter
# pieces take longer for each token.
AHEAD_TOKENS = 64


@dataclass(slots=True)
class ModelTally(Tally):
    """Totals of a model's completions and decodes, kept when the model is unloaded. The worker's
    thread writes all fields except the three about loads.
    """

    drafts: int = 0  # decodes that checked a draft
    # Tokens that were written where the draft model had a guess; those that it had guessed right.
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


class Decoded(Enum):
    """What became of a decode."""

    DONE = auto()
    ABORTED = auto()  # while it was computed; for whom, see `Way` in worker.py
    FAILED = auto()  # llama.cpp could not do it
    LEFT_OUT = auto()  # before it began: nobody waits for the result any more, or the worker stops


class Current(NamedTuple):
    """The decode that waits for its turn or is being computed."""

    runs: Sequence[Run]  # empty: nobody needs the result yet
    is_long: bool  # it takes more than PREFILL_SECONDS


@dataclass(eq=False)
class Compute:
    """Calls llama.cpp for a worker's decoders: in turn with the other models, and not for clients
    that have all left.

    Owned by a worker, whose thread calls it. Other threads only look at `current`: what it is for
    says whether they may abort it, by the model's byte (`Worker._abort`).
    """

    baton: Baton
    # Asked before a decode that should take so many seconds, whether to leave it out. The watchdog
    # hears of the decode so, too.
    give_up: Callable[[float], bool]
    current: Current | None = None

    def decode(
        self, model: Llama, costs: Costs, runs: Sequence[Run], parts: Sequence[Part]
    ) -> tuple[Decoded, float]:
        """One llama_decode for these runs; without any, one that any request may abort. Also
        returns the seconds that it took.
        """
        size = sum(len(tokens) for _, tokens, _ in parts)
        # 1. From now on, whoever wants an abort finds what it would hit, and sets the byte. So this
        # comes before the last look at who has left.
        self.current = Current(runs, costs.reading(size) > PREFILL_SECONDS)
        model.abort_flag[0] = b"\x00"
        try:
            with self.baton:
                # 2. Does anybody wait for the result?
                have_left = runs and all(run.job.cancelled for run in runs)
                if self.give_up(costs(size)) or have_left:
                    return Decoded.LEFT_OUT, 0.0
                # 3. Decode it.
                begin = time.perf_counter()
                code = model.decode(parts)
                seconds = time.perf_counter() - begin
        finally:
            self.current = None
        if code == ABORTED:
            return Decoded.ABORTED, seconds
        if code:
            log.error("llama_decode answered %d", code)
            return Decoded.FAILED, seconds
        costs.learn(size, seconds)
        return Decoded.DONE, seconds


@dataclass(slots=True)
class Work:
    """One sequence's part in the next decode: tokens to append, the last `outputs` of them with
    logits. If the run is not prefilling, all but the first token are a draft.
    """

    run: Run
    tokens: list[int]
    outputs: int = 1
    case: Case | None = None  # of the draft, as `Gain` judges it; None: it does not
    # What the draft model expects: the draft, and perhaps a token that was not worth checking.
    foreseen: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Decoder:
    """What the next `llama_decode` computes for each run, and what becomes of its result.

    Owned by a worker, whose thread alone calls it:

    1. `choose` and `start` give a job a slot: it becomes a `Run`, which has the completion's state.
    2. Each `turn` finds the `Work` of every run, decodes all of it at once, and handles the result:
       a prompt goes on, or a text does, of which `_emit` accounts for each token.
    3. `release` makes the slot idle: after a text's end (`_finish`), an error (`fail`), because the
       job makes way (`put_back`), or because the worker finds it cancelled.

    From the times of its decodes it learns costs and gains.
    """

    model: Llama
    sequences: Sequences
    answer_slots: list[Slot]  # those of `sequences.slots` in which it answers jobs
    costs: Costs
    compute: Compute
    tally: ModelTally
    waiting: list[Job]  # the worker's; a job that loses its slot goes back there
    writer: str = ""  # the model's id, if it is a draft model
    drafting: bool = False  # whether drafts are made at all
    draft_model: DraftModel | None = None
    gain: Gain = field(default_factory=Gain)
    last_end: float = -math.inf  # of a run; monotonic

    @property
    def runs(self) -> list[Run]:
        """The jobs that have a slot, in the order of the slots."""
        return [slot.run for slot in self.answer_slots if slot.run]

    def choose(self, job: Job) -> Decoder:
        """Who answers now, this model or its draft model. Also chooses the job's part to read."""
        draft_model = self.draft_model if job.may_be_early else None
        prompts = [part.tokens for part in job.parts]
        large = map(self.reading_seconds, prompts)
        # With as little as the last part, a small model is seldom right.
        small = map(draft_model.reading_seconds, prompts[:-1]) if draft_model else ()
        limit = job.request.prompt_ms / 1000 / (1 + len(self.compute.baton.others(self)))
        is_early, number = who_answers([*large], [*small], limit)
        job.part = job.parts[number]
        return draft_model if draft_model and is_early else self

    def reading_seconds(self, prompt: list[int]) -> float:
        """How long reading takes what is missing of a prompt; infinity if that is impossible."""
        model = self.model
        if not self.answer_slots or len(prompt) >= model.n_ctx or max(prompt) >= model.n_vocab:
            return math.inf
        return self.costs.reading(len(prompt) - self.sequences.known(prompt))

    def start(self, job: Job, free: list[Slot]) -> None:
        """Give the job a slot; what the slot lacks of its prompt is prefilled."""
        if job.writer != self.writer:
            job.writer = self.writer
            job.deliver([{"model": self.writer or job.request.model}])
        prompt = job.part.tokens
        slot, guide = self.sequences.take_slot(prompt, free, job.low)
        job.progress("prefill", len(slot.tokens), len(prompt))
        if job.cached is None:  # else the job itself has read these tokens, before it gave way
            job.cached = len(slot.tokens)
            self.tally.cached_tokens += job.cached
        slot.run = run = Run(job, slot, guide)
        if self.model.recurrent and self.sequences.store.budget:
            # A later prompt has its text up to the cursor, or all of it, but for the last token.
            lengths = job.part.cursor - 1, len(prompt) - 1
            run.checkpoints = [length for length in lengths if length >= MIN_PREFIX]

    # -- the next decode

    def turn(self) -> bool:
        """Decode the next work of every run, together. False if there is none."""
        # 1. Whose work is it? While any model works for others, no prompt of low priority is read.
        runs = self.runs
        if self.compute.baton.busy:
            runs = [run for run in runs if not (run.low and run.prefilling)]
        # 2. What does each need?
        works = []
        for run in runs:
            with self._blamed_on(run):
                works.append(self.next_work(run, runs))
        # 3. Decode it.
        if works:
            self._decode(works)
        return bool(runs)

    def _learn(self, works: list[Work], tokens: int, seconds: float) -> None:
        """Whether drafts save time: a decode wrote `tokens` in `seconds`."""
        if all(len(work.tokens) == 1 for work in works):
            self.gain.learn_plain(len(works), tokens, seconds)
        for case in {work.case for work in works if work.case}:
            self.gain.learn(case, tokens, seconds)
        if any(work.foreseen for work in works):
            self.tally.ahead_steps += 1
            self.tally.ahead_tokens += tokens
            self.tally.checking_seconds += seconds

    def next_work(self, run: Run, runs: list[Run]) -> Work:
        """What to decode next of a run's prompt, or of its text with a draft."""
        if run.pending is None:
            return self._next_chunk(run, runs)
        work = Work(run, [run.pending])
        if most := self._most_drafted(run, runs):
            assert run.drafter
            draft = run.drafter.draft(most)
            case = len(runs), len(draft)
            if draft and self.gain.wants(case):
                work.tokens += draft
                work.case = case
            elif self.draft_model and not any(other.prefilling for other in runs):
                # Else reading delays this stream enough.
                self.draft_model.write_ahead(self, work, len(runs), most)
            work.outputs = len(work.tokens)
        return work

    def _most_drafted(self, run: Run, runs: list[Run]) -> int:
        """The most tokens that a draft may have; 0: none is made."""
        beside = len(runs) > 1
        # llama.cpp takes tokens back wrongly from one of several recurrent states in a batch.
        if not self.drafting or run.heal or (beside and self.model.recurrent):
            return 0
        longest = self.costs.longest(longest_delay(self.pace(own=beside)))
        limits = [
            self.model.max_draft,
            run.job.max_tokens - run.generated - 1,
            self.model.n_ctx - len(run.slot.tokens) - 2,  # the first token, and the one to come
            MAX_CHUNK // len(runs) - 1,
            longest - 1,
        ]
        return max(0, min(limits))

    def _next_chunk(self, run: Run, runs: list[Run]) -> Work:
        """The tokens of the prompt to read next, up to a checkpoint or the end."""
        begin = len(run.slot.tokens)
        stop = min((at for at in run.checkpoints if at > begin), default=len(run.prompt))
        prefilling = [other for other in runs if other.prefilling]
        missing = [len(other.prompt) - len(other.slot.tokens) for other in prefilling]
        # Streams of this model wait for the chunk; and one of low priority must end soon when
        # another request comes.
        pace = self.pace(own=run.low or len(prefilling) < len(runs))
        # An infill is often given up for the next key, and an unfinished micro-batch is lost.
        is_short = run.was_aborted or self.model.recurrent or run.job.request.mode == "infill"
        piece = 1 if is_short else self.model.micro_batch  # a chunk is a multiple of it
        size = chunk_size(stop - begin, missing, pace, self.costs, piece)
        if run.job.only_reads:
            rest = self._pause_left()
            run.makes_way_for_hurried = rest > PAUSE_SECONDS
            # While somebody types, no answer waits long for it.
            longest = self.costs.longest(max(PAUSE_SECONDS, rest))
            size = min(size, AHEAD_TOKENS, longest)
        elif self.writer:
            size = min(size, AHEAD_TOKENS)
        end = begin + min(size, MAX_CHUNK // len(runs))
        has_logits = end == len(run.prompt) and not run.job.only_reads
        return Work(run, run.prompt[begin:end], int(has_logits))

    def _pause_left(self) -> float:
        """Seconds for which probably no key comes: a pause is likely to last half as long again as
        it has lasted since a run last ended; infinity before the first end. (That of reading ahead
        counts, too.) Where there is a draft model, it writes the answers that keys wait for, and
        what ends in this model is mostly reading ahead.
        """
        answers = self.draft_model or self
        return (time.monotonic() - answers.last_end) / 2

    def pace(self, own: bool) -> float:
        """Seconds per token of the fastest stream that waits for a decode, in this model (if `own`)
        or another.
        """
        other = min(self.compute.baton.others(self), default=math.inf)
        return min(self.costs(1), other) if own else other

    def _decode(self, works: list[Work]) -> None:
        """Run one llama_decode, and handle its result for each sequence."""
        runs = [work.run for work in works]
        is_prefilling = any(run.prefilling for run in runs)
        written = self.tally.tokens
        parts = [(work.run.slot, work.tokens, work.outputs) for work in works]
        decoded, seconds = self.compute.decode(self.model, self.costs, runs, parts)
        if decoded in (Decoded.ABORTED, Decoded.FAILED):
            self._after_failure(works, decoded)
        if decoded != Decoded.DONE:
            return
        self.tally.decodes += 1
        self.tally.decoded_sequences += len(works)
        base = 0  # batch position of the work's first token
        for work in works:
            with self._blamed_on(work.run):
                if work.run.prefilling:
                    self._after_prefill(work, base)
                else:
                    self._after_decode(work, base)
            base += len(work.tokens)
            work.run.deliver()
        if not is_prefilling:
            self._learn(works, self.tally.tokens - written, seconds)

    # -- its result

    def _after_failure(self, works: list[Work], decoded: Decoded) -> None:
        """Handle a decode that was aborted or that llama.cpp could not do."""
        for work in works:
            run = work.run
            slot = run.slot
            if self.model.recurrent:  # nobody knows how far the state has gone
                self._cut(run, 0)
            elif run.prefilling:  # the tokens read before the abort stay useful as a prefix
                # But for the prompt's last token, which is decoded again for its logits.
                end = min(self.model.computed(slot), len(run.prompt) - 1)
                read = run.prompt[len(slot.tokens) : end]
                slot.tokens += read
                self.tally.prompt_tokens += len(read)
                run.was_aborted = True
            self._cut(run, len(slot.tokens))  # drops the cells of the failed decode
            if decoded is Decoded.FAILED:
                self.fail(run, HttpError("INTERNAL_ERROR", "the model could not be evaluated"))

    def _cut(self, run: Run, length: int) -> None:
        """Cut the run's sequence to `length` tokens, and drop what was decoded behind them. A run
        that has lost tokens of a text that it has begun reads them again.
        """
        tokens = run.slot.tokens[:]
        self.model.cut(run.slot, length)
        if run.pending is not None and len(run.slot.tokens) < len(tokens):
            run.prompt = [*tokens, run.pending]
            run.pending = None

    @contextlib.contextmanager
    def _blamed_on(self, run: Run) -> Iterator[None]:
        """An exception in the work for one request ends that request alone."""
        try:
            yield
        except Exception as error:
            self.fail(run, run.job.context.run(internal_error, error))
            # Its tokens and its cells may no longer agree. `DraftModel.follow` sees to its own.
            self.model.cut(run.slot, 0)

    def _after_prefill(self, work: Work, base: int) -> None:
        run = work.run
        slot = run.slot
        slot.tokens += work.tokens
        self.tally.prompt_tokens += len(work.tokens)
        run.job.progress("prefill", len(slot.tokens), len(run.prompt))
        if len(slot.tokens) in run.checkpoints:
            self.sequences.back_up(slot)
        if len(slot.tokens) < len(run.prompt):
            return
        if run.job.only_reads:
            self._finish(run, "length")
            return
        run.job.progress("decode", 0, run.job.max_tokens)
        run.pending = run.sample(self.model, base + len(work.tokens) - 1)
        if not self._emit(run, run.pending):
            run.deliver()  # first: a Drafter takes a millisecond for each thousand tokens
            run.drafter = Drafter([*run.guide, *run.prompt])
            run.drafter.advance(run.pending)

    def _after_decode(self, work: Work, base: int) -> None:
        """Accept drafted tokens as long as each equals the model's own choice at its position."""
        run = work.run
        slot = run.slot
        drafted = len(work.tokens) - 1
        accepted = 0
        for i, token in enumerate(work.tokens):
            slot.tokens.append(token)
            run.pending = run.sample(self.model, base + i)
            if i < len(work.foreseen):
                self.tally.foreseeable_tokens += 1
                self.tally.foreseen_tokens += run.pending == work.foreseen[i]
            if self._emit(run, run.pending) or i == drafted or run.pending != work.tokens[i + 1]:
                break
            accepted += 1
        if drafted:
            self._cut(run, len(slot.tokens))
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
        vocabulary = self.model.vocabulary
        if vocabulary.is_end(token):
            self._finish(run, "stop")
            return True
        piece = vocabulary.piece(token)
        new = run.drop_healed(piece)
        if new or not piece:  # a token that only repeats the healed text does not count
            run.generated += 1
            self.tally.tokens += 1
        if run.drafter:
            run.drafter.advance(token)
        if reason := run.feed(new):
            self._finish(run, reason, flush=False)  # `Ending.flush` may not follow its own end
        elif run.is_spent() or len(run.slot.tokens) + 1 >= self.model.n_ctx:
            self._finish(run, "length")
        else:
            return False
        return True

    def _finish(self, run: Run, reason: str, flush: bool = True) -> None:
        if flush:
            run.send(run.job.ending.flush(reason == "stop"))
        run.outbox.append(run.result(reason))
        self.release(run, reason)

    def fail(self, run: Run, error: HttpError) -> None:
        """End a run with an error. Where a draft model has not begun, its large model answers."""
        if run.slot.run is not run:
            return  # it has no slot any more: it has ended, or begins again
        if self.writer and not run.first_token:
            run.job.may_be_early = False
            self.put_back(run)
        else:
            run.outbox.append(error)
            self.release(run, error.code)

    def put_back(self, run: Run) -> None:
        """Take the slot from a run whose job has not ended: it waits, and starts again."""
        self.release(run)
        run.job.progress("queued", 0, 1)
        self.waiting.append(run.job)

    def release(self, run: Run, reason: str = "") -> None:
        """Make the slot idle; its sequence stays as a prefix. `reason`: why the job has ended."""
        run.slot.run = None
        tally = self.tally
        tally.prompt_seconds += (run.first_token or time.monotonic()) - run.started
        if run.first_token:
            submitted = run.job.submitted
            tally.token_seconds += run.last_token - run.first_token
            tally.spoke(run.first_token - submitted, run.last_token - submitted, run.generated)
        if reason:
            tally.ended[reason] += 1
        run.slot.used = self.last_end = time.monotonic()
        run.sampler.close()
        run.deliver()


@dataclass(eq=False)
class DraftModel(Decoder):
    """A small model of the same family, with two tasks.

    - It answers where the large model would be too late, as any `Decoder`, in its `answer_slots`.
      If it fails before its first token, the large model answers (`fail`).
    - It follows the large model's sequences, and says which tokens it expects next: the methods
      below. `sequences.slots` begins with the slots for this, which have the numbers of the large
      model's; the `answer_slots` come behind them. All that this takes is charged to the large
      model's `Gain`.
    """

    def follow(self, number: int, tokens: list[int]) -> list[int]:
        """Cut the slot of this number to what is known of a sequence of `tokens`, which are not
        empty, and return what it lacks: at least one token, or none if this model cannot have the
        sequence. The whole sequence is read, since a model that reads only the end of it is right
        less often.
        """
        slot, _ = self.sequences.take_slot(tokens, [self.sequences.slots[number]], False)
        lacking = tokens[len(slot.tokens) :]
        fits = len(tokens) + MODEL_LENGTH < self.model.n_ctx and max(lacking) < self.model.n_vocab
        return lacking if fits else []

    def read(self, number: int, tokens: list[int], runs: Sequence[Run]) -> Decoded:
        """Append these tokens to the slot of this number, for these runs; without any, for nobody
        yet, and any request may abort it.
        """
        slot = self.sequences.slots[number]
        decoded, seconds = self.compute.decode(self.model, self.costs, runs, [(slot, tokens, 1)])
        if runs:  # else nobody waited
            self.tally.ahead_seconds += seconds
        if decoded is Decoded.DONE:  # else `follow` drops the cells that it may have left
            slot.tokens += tokens
        return decoded

    def write_ahead(self, large: Decoder, work: Work, streams: int, most: int) -> None:
        """Read a piece of what is lacking of one of the large model's streams, of which there are
        so many, or write a draft of at most `most` tokens, if that should save more time than it
        takes.
        """
        run = work.run
        case = streams, MODEL
        # 1. What is lacking, and how much of it is read at once? No stream waits long for another's
        # draft, and no request that comes for any.
        lacking = self.follow(run.slot.id, [*run.slot.tokens, *work.tokens])
        delay = longest_delay(large.pace(own=streams > 1)) / streams
        # Nothing of this reading is lost, so its pieces are longer.
        piece = min(2 * AHEAD_TOKENS, self.costs.longest(delay))
        # 2. Should drafts save the time in which it is read?
        seconds = catch_up_seconds(len(lacking), piece, self.costs)
        if not lacking or not large.gain.wants(case, seconds):
            return
        left = run.job.max_tokens - run.generated
        pace = streams * large.gain.plain[streams]
        if not is_worth_reading(seconds, run.generated, left, pace):
            return
        # 3. Read a piece, or the rest, behind which a draft can be written.
        before = self.tally.ahead_seconds
        if len(lacking) > piece:
            self.read(run.slot.id, lacking[:piece], [run])
        else:
            self._write(large, work, streams, lacking, most, time.perf_counter() + delay)
        large.gain.charge(case, self.tally.ahead_seconds - before)

    def _write(
        self,
        large: Decoder,
        work: Work,
        streams: int,
        lacking: list[int],
        most: int,
        deadline: float,
    ) -> None:
        """Read what is lacking, then draft the tokens that this model expects. The draft ends

        1. if this model cannot read on, or the decode is aborted,
        2. before a token that is none to check, or not worth the time to check it,
        3. behind a token after which no other is worth the time to write and check it, or could be
           written before the deadline (`time.perf_counter`),
        4. at its greatest length.
        """
        run = work.run
        size = streams  # of the decode that checks them, without the other streams' drafts
        worth = large.gain.plain[streams]  # the seconds that a right token saves
        unread = lacking
        for _ in range(min(most, MODEL_LENGTH)):
            if self.read(run.slot.id, unread, [run]) != Decoded.DONE:
                return
            token = self.model.greedy(LAST)
            unread = [token]
            work.foreseen.append(token)
            worth *= self.model.probability(LAST, token)  # that all so far are right
            # The large model may lack an id of the padding, and decodes no end of a text.
            known = token < large.model.n_vocab and not large.model.vocabulary.is_end(token)
            if not known or not is_worth_checking(worth, size, large.costs):
                return
            work.tokens.append(token)
            work.case = streams, MODEL
            size += 1
            writing = self.costs(1)
            is_late = time.perf_counter() + writing + large.costs(size + 1) > deadline
            if is_late or not is_worth_checking(worth, size, large.costs, writing):
                return

    def read_idle(self, large_slots: Sequence[Slot]) -> bool:
        """While nobody waits for any model: read a piece of what is lacking of the large model's
        idle sequences, which the next requests will go on with. False if nothing is lacking, or it
        cannot be read.
        """
        for slot in large_slots:
            lacking = self.follow(slot.id, slot.tokens) if slot.tokens else []
            if len(lacking) > 1:
                if self.compute.baton.busy:
                    return True
                return self.read(slot.id, lacking[:AHEAD_TOKENS], []) != Decoded.FAILED
        return False
