"""The draft model answers while the large one reads: when it does, what it reads, and what goes
wrong on the way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from harness import rows, wait_until
from test_draft_model import Clock, Held, pair_of, scripted
from test_draft_model import clock as clock  # a fixture
from test_draft_model import models as models  # a fixture
from test_engine import Ask, Loads, ScriptedLlama, ask, running, worker_of
from test_engine import loads as loads  # a fixture
from test_families import EXACT

from cerebrum.metrics import CANCELLED
from cerebrum.vps import llama
from cerebrum.vps import worker as vps_worker
from cerebrum.vps.decoder import AHEAD_TOKENS
from cerebrum.vps.job import Run
from cerebrum.vps.llama import MAX_CHUNK, ModelError
from cerebrum.vps.plan import LoadPlan
from cerebrum.vps.schedule import Costs
from cerebrum.vps.worker import Worker

SLOW = {1: 0.12, 16: 0.8}  # seconds of decodes by their tokens, of a 7B's shapes
LINES = "x = abc\n" * 300  # each character is a token
HINT = {"prompt_ms": 500, "min_confidence": 0.001, "stop": ["f"]}
AHEAD = {"max_tokens": 0}
ONE = "small"  # the draft model
EARLY = [ONE], "bcde"
QUICK = {1: 1e-5, 16: 1e-4}


@pytest.fixture
def loader(loads: Loads, tmp_path: Path, patch) -> LoadPlan:
    """A 7B and its draft model, both scripted."""
    patch(ScriptedLlama, "probability", lambda *_: 0.99)
    return scripted(tmp_path, patch, SLOW, early=2)


@pytest.fixture
def pair(loader: LoadPlan, patch) -> Iterator[Worker]:
    with running(worker_of(loader)) as worker:
        # Which would hide what an answer has read.
        patch(worker.decoder.draft_model, "read_idle", lambda _: False)
        yield worker


def hint(worker: Worker, prompt: str = f"{LINES}a", **more) -> Ask:
    return ask(worker, prompt, **HINT | {"model": "m"} | more)


def told(asked: Ask) -> tuple[list[str], str, int, bool]:
    """Who answers, the text, the tokens of the prompt that is read, and whether this is cut."""
    text, done = asked.outcome()
    return asked.writers, text, done["prompt_tokens"], "prompt_cut" in done


NEAR, NEARER = 1143, 503  # tokens of this text that are near the cursor


def test_it_answers_until_the_large_model_has_read_the_window(pair: Worker, clock: Clock):
    """Nothing changes in the text when the large model takes over."""
    assert told(hint(pair)) == ([ONE], "bcde", NEAR, True)
    assert told(hint(pair, f"{LINES}ab")) == ([ONE], "cde", NEAR + 1, True)
    read = [size for size in clock.sizes("draft") if size > 1]
    assert (sum(read), max(read)) == (NEAR, AHEAD_TOKENS)
    assert clock.sizes("target") == []
    assert told(ask(pair, f"{LINES}ab", **AHEAD)) == ([], "", len(LINES) + 2, False)
    assert told(hint(pair, f"{LINES}abc")) == ([], "de", len(LINES) + 3, False)


def test_it_reads_all_of_a_window_if_there_is_time(pair: Worker):
    pair.decoder.draft_model.costs = Costs(QUICK)
    assert told(hint(pair)) == ([ONE], "bcde", len(LINES) + 1, True)


def test_two_clients_at_one_place_read_it_once(pair: Worker, clock: Clock):
    held = Held(clock)
    one = hint(pair)
    with held:
        other = hint(pair, f"{LINES}a", stop=["e"])
    assert (told(one)[0], told(other)[:2]) == ([ONE], ([ONE], "bcd"))
    assert sum(size for size in clock.sizes("draft") if size > 2) == NEAR


def test_two_files_do_not_displace_each_other(pair: Worker, clock: Clock):
    others = LINES.replace("x", "other")
    for prompt in (LINES, others, LINES, others):
        assert told(hint(pair, f"{prompt}a"))[0] == [ONE]
        clock.log.append(("key", 0, 0.0))
    keys = [at for at, (whose, _, _) in enumerate(clock.log) if whose == "key"]
    assert max(size for _, size, _ in clock.log[keys[1] :]) == 1


def test_drafts_begin_with_what_an_answer_has_read(pair: Worker, clock: Clock):
    pair.decoder.draft_model.costs = Costs(QUICK)
    assert told(hint(pair))[0] == [ONE]
    before = len(clock.log)
    ask(pair, f"{LINES}a", max_tokens=24).outcome()
    assert max(size for whose, size, _ in clock.log[before:] if whose == "draft") < 9


# What a request is, and who answers it then. Without a least confidence a person has asked; low
# priority is a guest's.
ASKED = json.loads(r"""[
    [{}, ["small"], "bcde"],
    [{"min_confidence": null}, [], "bcde"],
    [{"min_confidence": 0.0}, [], "bcde"],
    [{"prompt_ms": 0}, [], "bcde"],
    [{"prompt_ms": 600000}, [], "bcde"],
    [{"mode": "infill", "suffix": "\nx = abc\n"}, ["small"], "bcde"],
    [{"max_tokens": 1}, ["small"], ""],
    [{"max_tokens": 0}, ["small"], ""],
    [{"stop": ["d"]}, ["small"], "bc"],
    [{"priority": "low"}, ["small"], "bcde"],
    [{"special": true}, [], "bcde"]]""")


@pytest.mark.parametrize(("more", "writers", "text"), ASKED, ids=str)
def test_whose_answer_a_request_gets(more, writers, text, pair: Worker):
    assert told(hint(pair, **more))[:2] == (writers, text)
    assert not Ask("x", **HINT | {"temperature": 0.1}).job.may_be_early


def test_a_guest_waits_while_others_need_the_cpu(pair: Worker):
    pair.baton.note(None, 0.1)
    asked = hint(pair, priority="low")
    wait_until(lambda: bool(pair.decoder.draft_model.runs), "it has a slot")
    assert pair.decoder.draft_model.runs[0].slot.tokens == []
    pair.baton.note(None, None)
    pair.wake()
    assert told(asked)[:2] == EARLY


# ------------------------------------------------------------------------------------------- faults


def fails_at(pair: Worker, number: int) -> None:
    """The draft model's decode of this number fails."""
    model: Any = pair.decoder.draft_model.model
    real, calls = model.decode, list[int]()

    def decode(parts) -> int:
        calls.append(1)
        if len(calls) != number:
            return int(real(parts))
        return 1  # llama.cpp has no free cells

    model.decode = decode


# What is wrong: the decode that fails, or what the draft model has. Then who answers, and how many
# tokens of the prompt are read.
PREPARED = f"""
it cannot read the prompt        | fails   | 1    | small m | {NEARER}
nor a later piece                | fails   | 3    | small m | {NEARER}
it cannot have all of the prompt | n_ctx   | 2000 | small   | {NEAR}
nor what is near                 | n_ctx   | 1000 |         | {NEARER}
it lacks a token                 | n_vocab | 120  |         | {NEARER}
"""


@pytest.mark.parametrize("row", rows(PREPARED), ids=itemgetter(0))
def test_the_large_model_answers_instead(row: list[str], pair: Worker):
    _, what, number, writers, read = row
    if what == "fails":
        fails_at(pair, int(number))
    else:
        setattr(pair.decoder.draft_model.model, what, int(number))
    assert told(hint(pair)) == (writers.split(), "bcde", int(read), True)
    assert pair.decoder.draft_model.runs == []


def test_a_text_that_has_begun_ends_with_an_error(pair: Worker):
    fails_at(pair, 20)
    asked = hint(pair)
    text, error = asked.outcome()
    assert (asked.writers, text, error.code) == ([ONE], "", "INTERNAL_ERROR")
    assert told(hint(pair))[:2] == EARLY


@pytest.mark.parametrize("missing", ["broken", "not loaded", "switched off"])
def test_without_it_the_large_model_reads_what_is_near(missing, loader: LoadPlan, loads: Loads):
    small = loader.draft
    assert small
    if missing == "broken":
        loads.broken["small.gguf"] = ModelError("damaged")
    elif missing == "not loaded":
        loader = loader._replace(draft=None)
    else:
        settings = replace(small.settings, early=0)
        loader = loader._replace(draft=small._replace(settings=settings))
    with running(worker_of(loader)) as worker:
        assert told(hint(worker)) == ([], "bcde", NEARER, True)
        assert told(hint(worker, prompt_ms=0)) == ([], "bcde", len(LINES) + 1, False)


def test_a_client_may_leave_while_it_reads(pair: Worker, clock: Clock):
    """What was read until then stays."""
    held = Held(clock)
    asked = hint(pair)
    with held:
        pair.cancel(asked.job)
    wait_until(lambda: pair.tally.ended[CANCELLED] == 1, "it has left")
    assert told(hint(pair))[:2] == EARLY
    assert pair.decoder.draft_model.runs == []


def test_it_reads_on_when_another_request_has_aborted_it(pair: Worker, clock: Clock):
    held = Held(clock)
    asked = hint(pair, priority="low")
    with held:
        pair.give_way(None)
    assert told(asked)[:2] == EARLY
    sizes = clock.sizes("draft")
    assert sum(size for size in sizes if size > 1) == NEAR + sizes[0] - 20  # as scripted


def test_unloading_answers_what_it_reads(pair: Worker, clock: Clock):
    held = Held(clock)
    asked = hint(pair)
    with held:
        pair.stop()
    assert asked.error() == "SHUTTING_DOWN"


def test_what_it_reads_is_not_saved(loader: LoadPlan):
    for _ in range(2):
        with running(worker_of(loader)) as worker:
            assert told(hint(worker))[:2] == EARLY
            assert worker.stored_bytes == 0
        assert not list(loader.kv_dir.glob("*"))


# -------------------------------------------------------------------------- reading and answering


def test_the_large_model_reads_in_pieces_that_no_key_waits_for(pair: Worker, clock: Clock):
    """The longer nobody asks, the longer the pieces are."""
    pieces = {0.0: 3, 0.4: 3, 1.0: 9, 8.0: AHEAD_TOKENS}
    draft_model = pair.decoder.draft_model
    for seconds, size in pieces.items():
        text = f"{seconds}{LINES}"
        draft_model.last_end = time.monotonic() - seconds
        clock.log.clear()
        assert told(ask(pair, text, **AHEAD))[2] == len(text)
        assert clock.sizes("target")[0] == size
    clock.log.clear()
    ask(pair, f"y{LINES}", max_tokens=1).outcome()
    assert max(clock.sizes("target")) > MAX_CHUNK / 3, "somebody waits"


@pytest.mark.parametrize(("seconds", "is_kept"), [(0.1, True), (10.0, False)])
def test_a_key_aborts_only_a_long_piece(seconds, is_kept, pair: Worker, clock: Clock):
    draft_model: Any = pair.decoder.draft_model
    draft_model.last_end = time.monotonic() - seconds
    held = Held(clock)
    clock.before |= {"target": held, "draft": bool}
    asked = ask(pair, LINES, **AHEAD)
    with held:
        pair.cancel(asked.job)  # as the Pi does for a key
        key = hint(pair)
        pair.give_way(key.job)
    assert told(key)[:2] == EARLY
    (read,) = [len(slot.tokens) for slot in pair.decoder.answer_slots if slot.tokens]
    assert read == (clock.sizes("target")[0] if is_kept else 20)  # as scripted


# ------------------------------------------------------------------------------------ real tokens


def test_the_text_is_what_the_small_model_writes_alone(models: Path, tmp_path, patch):
    """Also in healed tokens, with its ends and probabilities."""
    patch(llama, "HEAL_CANDIDATES", 64)  # of 269 tokens
    settings = replace(EXACT, state_dir=tmp_path, cache_mb=0)
    loader = pair_of(models, "dense", "another", settings)
    assert loader.draft
    early = replace(loader.draft.settings, early=settings.sequences)
    loader = loader._replace(draft=loader.draft._replace(settings=early))
    alone = LoadPlan("another", models / "another.gguf", settings)
    costs = iter([Costs({1: 1.0, 16: 2.0}), Costs({1: 1e-9, 16: 2e-9}), Costs(SLOW)])
    patch(vps_worker, "measure_costs", lambda *_: next(costs))
    written: list[bytes] = []
    real = Run.feed

    def feed(run: Run, piece: bytes) -> None:
        written.append(piece)
        real(run, piece)  # which finds that random weights are unsure

    patch(Run, "feed", feed)
    for each, more in ((loader, HINT), (alone, HINT | {"prompt_ms": 0})):
        with running(worker_of(each)) as worker:
            for number in range(20):
                prompt = f"def f{number}(x):\n    retu"
                asked = ask(worker, prompt, heal=True, **more | {"max_tokens": 16})
                asked.outcome()
                assert asked.writers == ["another"] * (each is loader)
    half = len(written) // 2
    assert written[:half] == written[half:]
    assert len(set(written)) > 3
