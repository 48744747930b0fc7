"""The draft model: what it may be paired with, what it follows, when it is asked, and that it never
changes a text.
"""

from __future__ import annotations

import doctest
import itertools
import json
import math
import random
import re
import string
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import families
import pytest
from harness import NO_FILE, PATIENCE, rows, wait_until, warnings_in
from test_engine import Loads, ask, running, worker_of
from test_engine import loads as loads  # a fixture
from test_families import EXACT, check_against_a_greedy_loop

from cerebrum.metrics import CANCELLED
from cerebrum.vps import decoder, drafts, llama, schedule
from cerebrum.vps import plan as vps_plan
from cerebrum.vps import worker as vps_worker
from cerebrum.vps.decoder import DraftModel
from cerebrum.vps.draft_model import check_pair
from cerebrum.vps.drafts import AGAIN, TRIAL_TOKENS, Drafter, Gain, pair_rate
from cerebrum.vps.encoding import TunedFile
from cerebrum.vps.llama import MB, ModelError, Settings, Slot, start_library
from cerebrum.vps.memory import Parts
from cerebrum.vps.plan import LoadPlan, plan_pair
from cerebrum.vps.prefixes import Sequences
from cerebrum.vps.schedule import Costs
from cerebrum.vps.worker import Worker
from cerebrum_common import Model

# Seconds of decodes by their tokens, of a 7B's shapes: an Intel with AVX-512, and an AMD EPYC.
INTEL = {1: 0.292, 2: 0.457, 4: 0.527, 8: 0.662, 16: 0.825}
AMD = {1: 0.096, 2: 0.170, 4: 0.263, 8: 0.455, 16: 0.543}

# ------------------------------------------------------------------------------------ what it saves


RATES = [  # of the large model's decodes, seconds of the small one's, and the gain
    (INTEL, 0.031, 1.853),
    (INTEL, 0.292, 1.0),  # it is as slow as the model
    (AMD, 0.015, 1.054),
    ({1: 0.1, 16: 1.6}, 0.01, 1.0),  # a second token costs as much as the first
]


def test_the_rate_of_a_pair() -> None:
    for costs, draft_seconds, gain in RATES:
        rate = pair_rate(Costs(costs), draft_seconds)
        assert rate * costs[1] == pytest.approx(gain, abs=0.005)
    assert doctest.testmod(drafts).failed == 0


# --------------------------------------------------------------------------------- what it is given


class Cells:
    """Stands for a draft model with a context of 1,024 tokens: remembers what is in its cells."""

    n_ctx, n_vocab = 1024, 1000
    cut = llama.Llama.cut
    unified, recurrent = True, False

    def __init__(self, can_trim: bool) -> None:
        self.can_trim = can_trim
        self.dropped: list[int] = []

    def trim(self, _slot, length: int) -> bool:
        self.dropped.append(length)
        return self.can_trim or not length


# What the draft model has, the sequence, how much of it the model keeps, and whether it reads the
# rest.
FOLLOWED = """
nothing is known                    |            | 5 999        | 0    | reads
one token more                      | 0:9        | 0:10         | 9    | reads
the same again                      | 0:9        | 0:9          | 8    | reads
tokens were taken back              | 0:9        | 0:4          | 3    | reads
another word                        | 0:9        | 0:5 7 7      | 5    | reads
another text                        | 7:16       | 0:1000       | 0    | reads
an id that only the large model has |            | 5 1000       | 0    |
as much as its own context has      |            | 0:1000 0:8   | 0    | reads
a text beyond its own context       | 0:1000 0:8 | 0:1000 0:8 5 | 1008 |
cells that cannot be continued      | 0:9        | 0:8          | 0    | reads
"""


def tokens_of(text: str) -> list[int]:
    """ "0:3 7" has the tokens 0, 1, 2 and 7."""
    tokens: list[int] = []
    for word in text.split():
        first, _, end = word.partition(":")
        tokens += range(int(first), int(end or int(first) + 1))
    return tokens


@pytest.mark.parametrize("row", rows(FOLLOWED), ids=itemgetter(0))
def test_a_sequence_is_followed(row: list[str]):
    what, had, sequence, count, reads = row
    tokens, kept = tokens_of(sequence), int(count)
    cells: Any = Cells(what != "cells that cannot be continued")
    nothing: Any = None
    slot = Slot(0, tokens_of(had))
    sequences = Sequences(cells, 1, 0)
    sequences.slots = [slot]
    follower = DraftModel(cells, sequences, [], Costs(INTEL), nothing, nothing, [])
    assert follower.follow(0, tokens) == (tokens[kept:] if reads else [])
    assert (slot.tokens, cells.dropped[-1]) == (tokens[:kept], kept)


# -------------------------------------------------------------------------------- the text is equal


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models that share their tokens, and some that do not."""
    start_library()
    folder = tmp_path_factory.mktemp("pairs")
    dense = families.FAMILIES["dense"]
    made = {name: families.FAMILIES[name] for name in ("dense", "recurrent", "window")}
    padding = [f"<pad{number}>" for number in range(257)]
    made["padded"] = replace(dense, plain=padding[:256], printable=True)
    made["overfull"] = replace(dense, plain=padding)
    made["renamed"] = replace(dense, marks=[*dense.marks[:-1], "<|other|>"])
    made["otherwise"] = replace(dense, marks=dense.marks[::-1])
    made["spelt"] = families.MARKED["codellama"]
    for name, family in made.items():
        families.make(folder / f"{name}.gguf", family)
    families.make(folder / "another.gguf", dense, seed=2)
    (folder / "damaged.gguf").write_bytes((folder / "dense.gguf").read_bytes()[:-5000])
    return folder


@pytest.fixture
def eager(patch) -> None:
    """Each draft is made and written to its full length, whatever it costs."""
    patch(Gain, "wants", lambda self, case, *_: case[0] in self.plain)
    free = {1: 1e-9, 16: 2e-9}
    patch(vps_worker, "measure_costs", lambda *_: Costs(free))


def pair_of(folder: Path, target: str, draft: str, settings: Settings) -> LoadPlan:
    small = LoadPlan(draft, folder / f"{draft}.gguf", replace(settings, cache_mb=0, outputs=1))
    return LoadPlan("tiny", folder / f"{target}.gguf", settings, draft=small)


# The target, the draft model, and the share of tokens that it expects, if that is certain.
PAIRS = json.loads("""[
    ["dense", "dense", 1.0],
    ["dense", "another", 0.0],
    ["padded", "dense", null],
    ["dense", "padded", null],
    ["window", "window", 0.9]]""")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("seed", "rounds"), [(0, 20), pytest.param(1, 200, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("target", "draft", "share"), PAIRS)
def test_the_text_is_that_of_a_greedy_loop_without_a_draft_model(
    target,
    draft,
    share,
    seed,
    rounds,
    models: Path,
    tmp_path,
    patch,
):
    if target == "padded":  # it soon writes an id of its own: nothing is left for later
        patch(decoder, "AHEAD_TOKENS", 512)
    loader = pair_of(models, target, draft, replace(EXACT, state_dir=tmp_path))
    draw = random.Random(f"{target} {draft} {seed}")
    tally = check_against_a_greedy_loop(loader, rounds, draw)
    assert tally.ahead_steps > 5
    if share is not None:
        assert tally.foreseen_tokens / tally.foreseeable_tokens == pytest.approx(share, abs=0.1)
    if share:
        assert tally.ahead_tokens > 2 * tally.ahead_steps


@pytest.mark.usefixtures("eager")
def test_sampled_and_healed_texts_are_those_of_the_model_alone(models: Path, tmp_path, patch):
    """A first token that is healed is not foreseen, even where the draft model could write it."""
    patch(Drafter, "draft", lambda *_: [])  # no drafts of text
    patch(llama, "HEAL_CANDIDATES", 64)  # of 269 tokens
    settings = replace(EXACT, state_dir=tmp_path, cache_mb=0)
    pair = pair_of(models, "dense", "dense", settings)
    texts = []
    for loader in (pair, pair._replace(draft=None)):
        with running(worker_of(loader)) as worker:
            texts.append([])
            for seed in range(40):
                prompt = f"def f{seed}(x):\n    retu"
                sampled = {"max_tokens": 16, "temperature": 1.0, "seed": seed, "heal": True}
                texts[-1].append(ask(worker, prompt, **sampled).outcome()[0])
        assert bool(worker.tally.ahead_steps > 40) == bool(loader.draft)
        assert (worker.tally.accepted_tokens > 40) == bool(loader.draft)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 20


# ------------------------------------------------------------------------------ what may be paired

DAMAGED = "llama.cpp cannot load this file; it is damaged, cut short or of an unknown kind"
REFUSED = """
dense     | recurrent | a recurrent model cannot take back tokens
recurrent | dense     | a recurrent model cannot take back tokens
dense     | overfull  | it has 526 tokens instead of 269
dense     | renamed   | its token 268 is another one
dense     | otherwise | its vocabulary is of another type, or begins and ends texts otherwise
dense     | spelt     | its vocabulary is of another type, or begins and ends texts otherwise
"""


def test_which_models_may_be_a_pair(models: Path):
    def check(target: str, draft: str) -> None:
        check_pair(models / f"{target}.gguf", models / f"{draft}.gguf")

    for target, draft, _ in PAIRS:
        check(target, draft)
    for target, draft, reason in rows(REFUSED):
        with pytest.raises(ModelError, match=f"^{reason}$"):
            check(target, draft)


@pytest.mark.parametrize(("draft", "why"), [("damaged", DAMAGED), ("dense", "it cannot decode")])
def test_a_draft_model_that_cannot_be_used_is_left_out_with_a_line_in_the_log(
    models: Path, tmp_path, caplog, monkeypatch, draft, why
):
    measure = vps_worker.measure_costs
    measured = []

    def fail_second(*asked: Any) -> Any:
        measured.append(asked)
        if len(measured) == 2:  # the large model's come first
            raise ModelError(why)
        return measure(*asked)

    monkeypatch.setattr(vps_worker, "measure_costs", fail_second)
    loader = pair_of(models, "dense", draft, replace(EXACT, state_dir=tmp_path))
    with running(worker_of(loader)) as worker:
        assert worker.decoder.draft_model is None
        assert ask(worker, "def f", max_tokens=3).outcome()[1]["done"]
    assert warnings_in(caplog) == [f"model tiny: {draft} writes no drafts: {why}"]


# ----------------------------------------------------------------------------- when it is asked

DRAFT = {1: 0.031, 16: 0.1}
LETTERS = string.ascii_lowercase * 5  # as both models write them


class Clock:
    """The seconds that decodes take here, by their costs. The draft model is as sure as `sure`."""

    def __init__(self, worker: Worker, patch) -> None:
        self.now = 0.0
        self.sure = 0.99
        self.log: list[tuple[str, int, float]] = []  # of each decode: whose, tokens, end
        self.before: dict[str, Any] = {"target": bool, "draft": bool}  # called before each decode
        decoder: Any = worker.decoder
        model, draft = decoder.model, decoder.draft_model.model
        for name, owner in (("target", decoder), ("draft", decoder.draft_model)):
            patch(owner.model, "decode", self._decode(name, owner))
        draft.abort_flag = model.abort_flag
        draft.probability = lambda *_: self.sure
        patch(vps_worker.time, "perf_counter", lambda: self.now)
        patch(Drafter, "draft", lambda *_: [])  # no drafts of text

    def _decode(self, name: str, owner) -> Any:
        real, costs = owner.model.decode, owner.costs

        def decode(parts) -> int:
            self.before[name]()
            size = sum(len(tokens) for _, tokens, _ in parts)
            self.now += costs(size)
            self.log.append((name, size, self.now))
            return int(real(parts))

        return decode

    def sizes(self, name: str) -> list[int]:
        return [size for whose, size, _ in self.log if whose == name]


def scripted(folder: Path, patch, costs, early: int = 0) -> LoadPlan:
    """A scripted model with these costs, and its draft model, which is always right."""
    measured = itertools.cycle([costs, DRAFT])
    patch(vps_worker, "measure_costs", lambda *_: Costs(next(measured)))
    for name in ("m.gguf", "small.gguf"):
        (folder / name).write_bytes(b"weights")
    settings = Settings(threads=1, state_dir=folder)
    small = LoadPlan("small", folder / "small.gguf", replace(settings, early=early))
    return LoadPlan("m", folder / "m.gguf", settings, draft=small)


@pytest.fixture
def pair(loads: Loads, tmp_path: Path, patch) -> Iterator[Worker]:
    with running(worker_of(scripted(tmp_path, patch, INTEL))) as worker:
        yield worker


@pytest.fixture
def clock(pair: Worker, patch) -> Clock:
    return Clock(pair, patch)


@pytest.mark.parametrize(
    ("sure", "most"),
    [
        (0.5, 1),  # even its first token is not worth 165 ms
        (0.6, 4),  # after the third it is not worth 31 ms more to write another
        (0.99, 16),
    ],
)
def test_it_writes_as_far_as_that_is_worth_its_time(sure, most, pair: Worker, clock: Clock):
    clock.sure = sure
    for prompt in ("a", "k", "u", "e", "o"):
        text, done = ask(pair, prompt, max_tokens=24).outcome()
        assert done["total_tokens"] == 24
        assert text == LETTERS[ord(prompt) - 96 :][:24]
    sizes = clock.sizes("target")
    assert max(sizes) == most
    tally = pair.tally
    assert tally.foreseen_tokens == tally.foreseeable_tokens >= tally.ahead_steps
    if most == 1:
        assert tally.draft_tokens == 0


def test_it_costs_little_where_it_does_not_pay(pair: Worker, clock: Clock, patch):
    """When its drafts have been wrong, it is tried again now and then, and soon used once they are
    right.
    """
    patch(pair.decoder.draft_model, "read_idle", lambda _: False)  # which costs nobody anything
    draft = pair.decoder.draft_model
    right = draft.model.greedy
    draft.model.greedy = lambda _index: 7  # always wrong

    def write(completions: int) -> None:
        for number in range(completions):
            assert ask(pair, "akueo"[number % 5], max_tokens=24).outcome()[1]["total_tokens"] == 24

    write(40)
    plain = 40 * 24 * INTEL[1]
    once = DRAFT[16] + 15 * DRAFT[1] + INTEL[16]
    assert AGAIN * plain < clock.now - plain < TRIAL_TOKENS * INTEL[1] + once + AGAIN * plain
    assert pair.tally.foreseen_tokens == 0
    draft.model.greedy = right
    write(40)
    before = clock.now
    write(4)
    assert clock.now - before < 4 * 24 * INTEL[1] / 2
    assert max(clock.sizes("target")) == 16


def test_no_other_stream_waits_longer_than_for_a_chunk(pair: Worker, clock: Clock):
    for _ in range(8):
        both = [ask(pair, prompt, max_tokens=25) for prompt in ("a", "k" * 100)]
        assert [asked.outcome()[1]["total_tokens"] for asked in both] == [25, 25]
    ends = [end for whose, _, end in clock.log if whose == "target"]
    longest = max(after - before for before, after in itertools.pairwise(ends))
    costs = Costs(INTEL)  # beside a chunk the running stream has a token of its own
    assert INTEL[16] < longest < schedule.longest_delay(INTEL[1]) + costs.further


def test_a_client_may_leave_while_it_writes(pair: Worker, clock: Clock):
    """Nobody's draft is checked, and the next request gets its text."""
    ask(pair, "a", max_tokens=24).outcome()
    left = list[int]()

    def leave() -> None:
        if pair.decoder.runs and not left:
            left.append(len(clock.sizes("target")))
            pair.cancel(pair.decoder.runs[0].job)

    clock.before["draft"] = leave
    ask(pair, "f", max_tokens=25)
    wait_until(lambda: CANCELLED in pair.tally.ended, "it has left")
    assert len(clock.sizes("target")) == left[0]
    assert ask(pair, "f", max_tokens=24).outcome()[0] == "ghijklmnopqrstuvwxyzabcd"


class Held:
    """Holds the draft model's next decode. `with` waits for that, and lets it go on in the end."""

    def __init__(self, clock: Clock) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        clock.before["draft"] = self

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(PATIENCE)

    def __enter__(self) -> None:
        assert self.reached.wait(PATIENCE)

    def __exit__(self, *_: object) -> None:
        self.go_on.set()


def test_while_nobody_waits_it_reads_on_and_gives_way_at_once(pair: Worker, clock: Clock):
    """It goes on when a request of another model has aborted it."""
    draft = pair.decoder.draft_model
    held = Held(clock)
    ask(pair, "xy" * 100, max_tokens=1).outcome()
    with held:
        pair.baton.note(None, 0.1)
        pair.give_way(None)
    wait_until(lambda: pair.decoder.compute.current is None, "it is aborted")
    pair.baton.note(None, None)
    wait_until(lambda: sum(clock.sizes("draft")) >= 64 + 200, "all is read")
    assert clock.sizes("draft") == [64, 64, 64, 64, 8]  # the first was aborted
    assert draft.sequences.slots[0].tokens == list(b"xy" * 100)[:-1]  # the last is read again


def test_while_nobody_waits_a_failure_is_not_repeated(pair: Worker, patch):
    patch(vps_worker, "STORE_SECONDS", 0.01)
    tried = list[int]()

    def fail(_parts) -> int:
        tried.append(1)
        return -1

    pair.decoder.draft_model.model.decode = fail
    ask(pair, "xy" * 100, max_tokens=1).outcome()
    wait_until(lambda: pair.due == math.inf, "the worker rests")
    assert tried == [1]


def test_what_it_reads_for_later_drafts_is_kept(pair: Worker, clock: Clock, patch):
    """A prompt of which it has nothing, while its completion is being written; whoever comes."""
    patch(pair.decoder.draft_model, "read_idle", lambda _: False)
    held = Held(clock)
    long = ask(pair, "xy" * 100, max_tokens=100)
    with held:
        short = ask(pair, "a", max_tokens=1)
        pair.give_way(short.job)
    assert short.outcome()[0] == "b"
    assert long.outcome()[0] == LETTERS[25:125]
    assert clock.sizes("draft")[:2] == [128, 81]


# ----------------------------------------------------------------------------- what is loaded

OF_SEVEN = {"file": "seven.gguf", "draft": "half"}
SEVEN = Model("seven", "Seven", (), "7B", "Q4", **NO_FILE | OF_SEVEN)
HALF = Model("half", "Half", (), "0.5B", "Q4", **NO_FILE | {"file": "half.gguf"})
# Megabytes of the weights and of all else but the cells, and kilobytes of a cell, by file.
TAKEN = {"half": (469, 80, 12), "seven": (4460, 486, 56), "tuned-seven": (5142, 486, 56)}


def measured(path: Path, forms: Sequence[Settings]) -> list[Parts]:
    """The memory of a 7B and a 0.5B, as llama.cpp measures it."""
    path.stat()
    weights, others, kilobytes = TAKEN[path.stem]
    cells = [form.n_ctx * form.sequences for form in forms]
    return [
        {"weights": weights * MB, "kv": (others + count * kilobytes // 1024) * MB}
        for count in cells
    ]


SLOW = [0.292, 0.527, 0.825]  # decodes of 1, 4 and 16 tokens by the 7B's published file

TINY = [0.031, 0.045, 0.071]


# Free MB; the seconds of the 7B's tuned file, if both models were timed; the file that is loaded,
# its context and sequences; and what is said, each speed in SPEED's words.
PLANS = json.loads("""[
    ["all fit", 9000, [0.21, 0.4, 0.7], ["tuned-seven.gguf", 4096, 2],
     "writes drafts: expected 8.7 @tuned 4,096; without it 4.8 @tuned 4,096"],
    ["a VPS of 7,260 MB", 5836, [0.21, 0.4, 0.7], ["seven.gguf", 2560, 2],
     "writes drafts: expected 6.6 @published 2,560; without it 3.4 @published 4,096"],
    ["the tuned file alone", 6100, [0.1, 0.2, 0.4], ["tuned-seven.gguf", 4096, 2],
     "writes no drafts: expected 10.0 @tuned 4,096; with it 6.6 @published 4,096"],
    ["too little gain", 9000, [0.1, 0.32, 0.9], ["tuned-seven.gguf", 4096, 2],
     "writes no drafts: expected 10.0 @tuned 4,096; with it 10.4 @tuned 4,096"],
    ["it also answers", 9000, [0.1, 0.32, 0.9], ["tuned-seven.gguf", 4096, 2],
     "writes drafts: expected 10.4 @tuned 4,096; without it 10.0 @tuned 4,096"],
    ["neither was timed", 9000, [], ["seven.gguf", 4096, 2], "writes drafts"],
    ["neither was timed, no room", 5836, [], ["seven.gguf", 4096, 2],
     "has no room to write drafts"],
    ["no room at all", 5000, [0.21, 0.4, 0.7], ["seven.gguf", 2048, 1],
     "has no room to write drafts"]]""")
SPEED = r"\1 tokens a second by the \2 file in a context of \3 tokens and 2 at a time"


def unlike(*_) -> None:
    raise ModelError("its token 7 is another one")


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case[0])
def test_what_is_loaded_of_a_pair(case, tmp_path, patch) -> None:
    what, free, here, loaded, said = case
    note = "half " + re.sub(r"([\d.]+) @(\w+) ([\d,]+)", SPEED, said)
    large = replace(SEVEN, early=what != "too little gain")
    passport = families.tuned_passport

    def find_tuned(path: Path, settings: Settings, _sha: str) -> tuple[Any, str]:
        if not here:
            return None, "there is no tuned file"
        if path.stem == "half":
            return TunedFile(path, settings, passport(published=TINY, here=TINY)), ""
        seconds = passport(published=SLOW, here=here)
        return TunedFile(tmp_path / "tuned-seven.gguf", settings, seconds), ""

    for name in ("seven", "half", "tuned-seven"):
        (tmp_path / f"{name}.gguf").write_bytes(b"x" * (100 if name == "half" else 1000))
    patch(vps_plan, "needed", measured)
    patch(vps_plan, "find_tuned", find_tuned)
    patch(vps_plan, "check_pair", lambda *_: None)

    def plan_with(small: Model | None, draft: bool = True) -> LoadPlan:
        settings = Settings(state_dir=tmp_path, draft=draft)
        return plan_pair(large, small, tmp_path, settings, free * MB)

    plan = plan_with(HALF)
    file = plan.tuned.path.name if plan.tuned else SEVEN.file
    assert [file, plan.settings.n_ctx, plan.settings.sequences] == loaded
    assert plan.note == note
    assert bool(plan.draft) == ("half writes drafts" in note) == ("draft" in plan.parts)
    if plan.draft:
        assert plan.bytes <= free * MB
        form = plan.draft.settings
        assert [form.n_ctx, form.sequences] == loaded[1:]
        assert (form.cache_mb, form.outputs, form.early) == (0, 1, loaded[2] * large.early)
    assert plan_with(None).note == ""
    assert plan_with(HALF, draft=False).draft is None
    patch(vps_plan, "check_pair", unlike)
    alone = plan_with(None)
    note = "half writes no drafts: its token 7 is another one"
    assert plan_with(HALF) == alone._replace(note=note)
    (tmp_path / HALF.file).unlink()
    assert plan_with(HALF).note == "half is not here to write drafts"
