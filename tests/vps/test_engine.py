"""The engine without a model: schedule, drafts, prefixes, text, files, and faults of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import queue
import random
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import tuned_passport
from harness import PATIENCE, rows, until, wait_until, warnings_in
from test_admission import config
from test_ending import splits

import vpsd
from cerebrum.request import GenerationRequest
from cerebrum.settings import write_atomically
from cerebrum.vps import drafts, llama, memory, schedule
from cerebrum.vps import job as vps_job
from cerebrum.vps import worker as vps_worker
from cerebrum.vps.decoder import Current, ModelTally
from cerebrum.vps.drafts import Drafter, Gain
from cerebrum.vps.encoding import TunedFile
from cerebrum.vps.job import Event, Job, Run
from cerebrum.vps.llama import MAX_CHUNK, MAX_DRAFT, MB
from cerebrum.vps.memory import Parts, fit_context
from cerebrum.vps.plan import LoadPlan
from cerebrum.vps.prefixes import (
    Parked,
    PrefixStore,
    Sequences,
    common_prefix,
    decode_parked,
    encode_parked,
    load_parked,
    save_parked,
)
from cerebrum.vps.schedule import Baton, Costs, chunk_size, longest_delay
from cerebrum.vps.vocabulary import PromptPart, heal_from
from cerebrum.vps.worker import Worker
from cerebrum_common import HttpError

# Seconds of a decode of one token and of 16: a 0.5B on an AMD EPYC.
ONE, MANY = 0.0147, 0.082


# ------------------------------------------------------------------------------------- the schedule


def test_costs() -> None:
    """They are exact where they were measured and linear between and beyond; a long chunk is never
    cheap, and a longer one never cheaper.
    """
    table = Costs({1: 1.0, 2: 3.0, 4: 4.0, 16: 16.0})
    assert [table(n) for n in (1, 2, 3, 4, 16, 512)] == [1.0, 3.0, 3.5, 4.0, 16.0, 512.0]
    assert [table.longest(seconds) for seconds in (0.5, 2.9, 3.0, 4.0, 7.5)] == [1, 1, 2, 4, 7]
    assert (table.longest(1e6), table.longest(math.inf)) == (MAX_CHUNK, MAX_CHUNK)
    busy = Costs({1: 1.0, 2: 9.0, 4: 4.0, 16: 16.0})  # while two tokens were measured
    assert [busy(n) for n in (1, 2, 4, 10, 16)] == [1.0, 4.0, 4.0, 10.0, 16.0]
    for one in (15.0, 16.0, 1000.0):  # busy while one token was measured
        assert Costs({1: one, 16: 16.0})(31) == 16.0 + min(one, 16.0)


# A decode's tokens, its seconds, and the slowdown then.
SLOWDOWNS = """
32 | 0.2   | 1.3   # twice the measured time: the slowdown follows by 30 %
32 | 0.05  | 0.85
32 | 100.0 | 3.1   # one odd decode counts as at most 8 times the usual time
32 | 0.0   | 0.85  # one odd decode counts as at least half of the usual time
4  | 100.0 | 1.0   # too few tokens to learn from
"""


def test_costs_learn_the_real_time_of_chunks() -> None:
    for tokens, seconds, slowdown in rows(SLOWDOWNS):
        table = Costs({1: 0.007, 16: 0.052})
        table.learn(int(tokens), float(seconds))
        assert table.slowdown == pytest.approx(float(slowdown))
        assert (table(1), table(32)) == (0.007, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("tokens", "begun", "tried"),
    [
        (4, [False, *[True] * drafts.RETRY] * 4, 256),
        (2, [False, *[True] * 9, *[False] * 113, True, *[False] * 113, True], 11),
    ],
)
def test_drafts_are_made_while_they_pay_and_tried_again(tokens, begun, tried) -> None:
    """A decode with a draft takes three times as long."""
    gain, made = Gain(), list[bool]()
    case, other = (2, 7), (2, drafts.MODEL)
    for _ in range(260):
        made.append(gain.wants(case))
        if made[-1]:
            gain.learn(case, 2 * tokens, 0.125)
        else:
            gain.learn_plain(2, 2, 0.04)
    assert (made[: len(begun)], made.count(True)) == (begun, tried)
    assert not gain.wants((1, 7))  # with one stream there is nothing to compare with
    gain.learn_plain(2, 2, 0.04)
    assert gain.wants(other, drafts.TRIAL_TOKENS * 0.0199)
    assert not gain.wants(other, drafts.TRIAL_TOKENS * 0.0201)
    gain.charge(other, -100.0)  # it was often right
    gain.charge(other, drafts.MOST_TOKENS * 0.0199)
    assert gain.wants(other)
    gain.charge(other, 0.01)
    assert not gain.wants(other)


# What is missing of each prompt, seconds of a running stream's token (inf: there is none), a 0.5B
# (fast) or a 7B, its slowdown, the tokens of a piece; then how many of the first prompt are read.
CHUNKS = f"""
10      | inf   | fast | 1 | 256 | 10
10000   | inf   | fast | 1 | 256 | {MAX_CHUNK}
10000   | {ONE} | fast | 1 | 256 | 53  # in PAUSE_SECONDS
10000   | {ONE} | fast | 4 | 256 | 11
10000   | 0.5     | slow | 1 | 256 | 26  # six of its own tokens take longer than the pause
10000   | inf   | fast | 4 | 1   | 220  # alone it comes in whole pieces, at least in one
10000   | inf   | fast | 4 | 100 | 200
10000   | inf   | fast | 4 | 256 | 256
70 40   | inf   | fast | 1 | 256 | 70  # two share a chunk unless the shorter would wait
900 40  | inf   | fast | 1 | 256 | 80
900 800 | inf   | fast | 1 | 256 | 443
"""


def test_the_chunk_size_bounds_the_pause_of_a_running_stream() -> None:
    times = {"fast": {1: ONE, 16: MANY}, "slow": {1: 0.5, 16: 2.0}}
    for row in rows(CHUNKS):
        prompts, pace, speed, slowdown, piece, read = row
        costs, missing = Costs(times[speed]), [*map(int, prompts.split())]
        costs.slowdown = float(slowdown)
        assert chunk_size(missing[0], missing, float(pace), costs, int(piece)) == int(read), row


# Seconds that the large model needs to read all of a window, 400 tokens and 200; and those of the
# draft model (none: it may not answer). Then who answers, and which part is read in half a second.
ANSWERS = """
0.5 0.4 0.2    | 0.01 0.01 | large 0  # all in time
30 13 6.5      | 0.4 0.2   | small 0  # as much as it can in time
30 13 6.5      | 2.3 1.0   | small 1  # at least 400 tokens
30 13 6.5      | 2.3 2.2   | large 2  # not much sooner
3.0 3.0 3.0    | 1.0 1.0   | small 0
2.9 2.9 2.9    | 1.0 1.0   | large 0
0.6 13 6.5     | 0.02 1.0  | small 0  # a key later, while the large one reads
0.5 13 6.5     | 0.02 1.0  | large 0  # it has read the window
0.6 13 6.5     | 2.3 1.0   | large 0  # all of it is read sooner than a part
6.6 0.4 6.5    | 0.02 0.02 | large 1  # a part in time
1.0 0.6 0.3    |           | large 2
3.0 1.05 1.0   |           | large 1  # 200 tokens would not come sooner
0.7            | 0.02      | small 0  # one part
0.7            |           | large 0
30 13 6.5      | inf 1.0   | small 1  # more than its context has
30 13 6.5      | inf inf   | large 2
"""


def test_who_answers_in_time() -> None:
    for row in rows(ANSWERS):
        large, small, answer = row
        seconds = [[*map(float, times.split())] for times in (large, small)]
        is_early, part = schedule.who_answers(seconds[0], seconds[1], 0.5)
        assert f"{'small' if is_early else 'large'} {part}" == answer, row


# What is computed for a run, and for whom it makes way then, in a short decode and in a long one.
WAYS = """
text              | STAYS STAYS
text left         | AT_ONCE AT_ONCE
text low          | STAYS STAYS
prompt            | STAYS FOR_OTHERS
prompt left       | FOR_OTHERS FOR_OTHERS
prompt hurried    | FOR_HURRIED FOR_HURRIED
prompt low left   | WITH_SLOT WITH_SLOT
prompt low again  | FOR_HURRIED FOR_HURRIED
"""


def run_of(words: str) -> Any:
    """A run of which these words are true."""
    job = SimpleNamespace(cancelled="left" in words)
    run = SimpleNamespace(prefilling="prompt" in words, job=job, low="low" in words)
    run.first_token, run.makes_way_for_hurried = "again" in words, "hurried" in words
    return run


def test_who_makes_way_for_whom() -> None:
    for words, ways in rows(WAYS):
        for is_long, way in enumerate(ways.split()):
            assert vps_worker.way_offered(run_of(words), bool(is_long)) == vps_worker.Way[way], (
                words
            )


# ------------------------------------------------------------------------------------------- drafts


def test_a_draft_is_as_long_as_the_streak_and_fills_a_decode() -> None:
    drafter, lengths = Drafter([*FILE, 1, 2]), []
    for token in FILE[:70]:
        drafter.advance(token)
        lengths.append(len(drafter.draft(MAX_DRAFT)))
    assert Counter(lengths) == {0: 2, 3: 4, 7: 8, 15: 16, 31: 32, 63: 8}
    assert lengths == sorted(lengths)
    rooms = {0: 0, 2: 0, 3: 3, 6: 3, 7: 7, 14: 7, 15: 15}
    assert {room: len(drafter.draft(room)) for room in rooms} == rooms
    assert drafter.draft(15) == FILE[70:85]


FILE = random.Random(7).sample(range(1000, 50_000), 400)  # no token twice


PARTS = {name: FILE[40 * number : 40 * number + 40] for number, name in enumerate("ABCD")}


def tokens_of(text: str) -> list[int]:
    """ "A:3 7 B" has the first three tokens of part A of FILE, the token 7 and all of part B."""
    tokens: list[int] = []
    for word in text.split():
        start, _, stop = word[1:].rpartition(":")
        if word.isdecimal():
            tokens.append(int(word))
        else:
            tokens += PARTS[word[0]][int(start or 0) : int(stop or 40)]
    return tokens


# What the prompt holds, what has been written since, and the draft then.
COPIED = """
nothing repeats                       | A B             | C          |
fewer than three tokens repeat        | A 1 2           | B:2        |
three do                              | A B 1 2         | B:3        | B3:6
as many as are right                  | A B 1 2         | B:7        | B7:14
a prompt that repeats itself          | A B 1 2 B:7     |            | B7:14
it goes on otherwise                  | A 7 8 9 B       | A 3 7 8    |
in another place then                 | A 7 8 9 B       | A 3 7 8 9  | B:3
a place is skipped                    | A B C           | A 7 B:3    | B3:6
where it came last                    | A:9 1 A:9 2 3 4 | A:9        | 2 3 4 A:4
where it came first, if not so        | A:9 1 A:9 2 3 4 | A:9 1      | A:3
one token again and again             | 7 7 7           |            |
so that one is left to copy           | 7 7 7 7         |            |
up to the end of what there is        | 7 7 7           | 5 7 7 7    | 5 7 7
shorter than a gram                   | 1 2             |            |
as short, then it repeats             | 1 2             | 3 1 2 3    | 1 2 3
"""


@pytest.mark.parametrize("row", rows(COPIED), ids=itemgetter(0))
def test_a_draft_is_a_copy_of_what_came_last_and_ends_where_it_is_wrong(row: list[str]):
    _, source, written, expected = row
    drafter = Drafter(tokens_of(source))
    for token in tokens_of(written):
        drafter.advance(token)
    assert drafter.draft(MAX_DRAFT) == tokens_of(expected)


def test_no_draft_goes_beyond_the_end_of_its_source() -> None:
    draw = random.Random(3)
    for alphabet in (2, 3, 6):
        tokens = [draw.randrange(alphabet) for _ in range(30)]
        drafter = Drafter(tokens)
        for _ in range(2000):
            draft = drafter.draft(MAX_DRAFT)
            token = draft[0] if draft and draw.random() < 0.7 else draw.randrange(alphabet)
            tokens.append(token)
            drafter.advance(token)
            assert not drafter.streak or drafter.at < len(tokens)
        assert drafter.tokens == tokens


# ----------------------------------------------------------------------------------------- prefixes


def test_common_prefix() -> None:
    for length in (0, 1, 63, 64, 65, 200):
        same = [*range(length)]
        for ends in itertools.product(([], [-1]), ([], [-2])):
            assert common_prefix(*(same + end for end in ends)) == length


def parked(*tokens: int, size: int = 100) -> Parked:
    return Parked([*tokens], bytes(size))


def kept(store: PrefixStore) -> list[list[int]]:
    return [entry.tokens for entry in store.entries]


# What is done with a store of 300 bytes, and what it keeps then, the most recently used last. A
# letter is a token: +ab adds a sequence, +a:50 one of 50 instead of 100 bytes, +a- one of low
# priority; ?abx=2 finds two tokens of a prompt, and !a=1 renews one that covers a.
STORES = {
    "the least recently used is dropped": """
        +aa → aa | +bb → aa bb | +cc → aa bb cc | ?aae=2 → aa bb cc | +d → bb cc d
        | !c=1 → bb d cc | +e:101 → cc e | +f:301 → cc e""",
    "what is of low priority displaces nothing else": """
        +aa → aa | +bb- → aa bb | +cc → aa bb cc | +dd- → aa cc dd | +aae- → aa cc aae
        | +f → aa cc f | +g- → aa cc f""",
    "what is extended is dropped": """
        ?ab=0 → | +ab → ab | +ac → ab ac | +abc → ac abc | +ac:50 → abc ac | !ab=1 → ac abc
        | !abcd=0 → ac abc | !b=0 → ac abc | +abde → ac abc abde | ?abcx=3 → ac abc abde
        | ?abdx=3 → ac abc abde | ?x=0 → ac abc abde""",
}


@pytest.mark.parametrize("case", STORES)
def test_what_a_store_keeps(case: str):
    store = PrefixStore(300, False)
    for row in STORES[case].split("|"):
        step, left = map(str.strip, row.split("→"))
        what, _, number = step[1:].replace("=", ":").partition(":")
        tokens = [ord(letter) for letter in what.strip("-")]
        if step[0] == "+":
            store.add(Parked(tokens, bytes(int(number or 100)), what.endswith("-")))
        elif step[0] == "?":
            assert store.best(tokens)[1] == int(number), step
        else:
            assert store.renew(tokens, False) == (number == "1"), step
        assert " ".join("".join(map(chr, entry)) for entry in kept(store)) == left, step


def test_a_state_is_copied_only_where_it_is_kept_and_once_there_is_room() -> None:
    model = ScriptedLlama()
    model.state_size = lambda slot: len(slot.tokens)  # type: ignore[method-assign]
    sequences = Sequences(model, 1, 23)  # type: ignore[arg-type]
    slot, store = sequences.slots[0], sequences.store
    store.add(parked(7, size=23))
    slot.tokens = [*range(24)]
    sequences.back_up(slot)
    assert (model.saved, store.size) == (0, 23)
    slot.tokens = [*range(23)]
    model.fails = "save"  # with what was kept before, that would take twice the budget
    with pytest.raises(MemoryError):
        sequences.back_up(slot)
    assert store.size == 0
    model.fails = ""
    sequences.back_up(slot)
    assert (model.saved, store.size) == (1, len(b"state"))


def test_a_text_that_begins_otherwise_is_no_guide() -> None:
    """Whoever it was for: the counts of drafts in an answer would tell of it."""
    model: Any = ScriptedLlama()
    sequences = Sequences(model, 1, 64)
    slot = sequences.slots[0]
    for common, guide in ((16, [7] * 24), (15, [])):
        slot.tokens = [7] * 24
        prompt = [7] * common + [8] * 9
        assert sequences.take_slot(prompt, [slot], False) == (slot, guide)


def test_a_rejected_state_may_have_gone_already() -> None:
    model = ScriptedLlama()
    model.restore = lambda *_: False  # type: ignore[method-assign]
    sequences = Sequences(model, 1, 64)  # type: ignore[arg-type]
    slot, store = sequences.slots[0], sequences.store
    prompt = [*range(40)]
    store.add(Parked(prompt[:30], bytes(60)))
    slot.tokens = [7] * 24  # parked first, with 5 bytes
    assert sequences.take_slot(prompt, [slot], False) == (slot, prompt[:30])
    assert (slot.tokens, kept(store)) == ([], [[7] * 24])


ENTRY = Parked([1, 2, 151_643, 7], b"the state of four tokens")


def test_parked_with_any_byte_changed_or_missing_is_refused() -> None:
    data = b"".join(encode_parked(ENTRY, "key"))
    assert decode_parked(data, "key") == ENTRY
    for number, byte in enumerate(data):
        begin, rest = data[:number], data[number + 1 :]
        changed = [begin + bytes([byte ^ bit]) + rest for bit in (1, 0x80)]
        for damaged in (*changed, begin + rest, begin, data + b"\0"):
            with pytest.raises(ValueError, match="damaged"):
                decode_parked(damaged, "key")


def test_parked_files_are_read_in_order_and_bad_ones_removed(tmp_path: Path):
    folder = tmp_path / "kv"
    entries = [Parked([number], b"state %d" % number) for number in range(12)]
    save_parked(folder, "key", entries, bool)
    names = sorted(path.name for path in folder.iterdir())
    assert list(load_parked(folder, "key")) == entries
    for path in (folder, folder / names[0]):
        assert path.stat().st_mode & 0o077 == 0

    whole = (folder / names[5]).read_bytes()
    foreign = encode_parked(entries[6], "other")
    bad = (b"", whole[:-1], whole, b"".join(foreign))
    for name, data in zip(names[3:], bad, strict=False):
        (folder / name).write_bytes(data)
    (folder / "foreign.txt").write_text("hello")
    left = [*entries[:3], entries[5], *entries[7:]]
    assert list(load_parked(folder, "key")) == left
    assert len(list(folder.iterdir())) == len(left)

    save_parked(folder, "key", entries[:1], bool)
    assert list(load_parked(folder, "key")) == entries[:1]
    assert list(load_parked(tmp_path / "none", "key")) == []


# --------------------------------------------------------------------------------------------- text


def started(request: GenerationRequest) -> Run:
    """A completion of which no token has come."""
    model: Any = ScriptedLlama()
    job = Job(request, lambda _: None)
    job.prepare(model)
    return Run(job, llama.Slot(0), [])


def fed(run: Run, pieces: Sequence[bytes]) -> tuple[str, str | None]:
    """The text for the client after these pieces, and why the completion has ended."""
    reason = next(filter(None, map(run.feed, pieces)), None)
    # type: ignore[operator]
    return "".join(event["token"] for event in run.outbox if "token" in event), reason


# The bytes of a model, the text for the client, and why the completion has ended.
WRITTEN = [
    ("aé€😀".encode(), "aé€😀", None),
    ("ab→€c".encode(), "ab", "stop"),
    (b"a\xffb", "a\ufffdb", None),
    (b"a\xf0\x9f\x98", "a", None),  # a character that is cut at the end is dropped
    ("a→".encode(), "a→", None),  # but not the beginning of a possible stop string
]


def test_characters_and_stop_strings_over_every_split_of_their_bytes() -> None:
    for written, text, reason in WRITTEN:
        for pieces in splits(written):
            run = started(GenerationRequest("x", stop_at="none", stop=["→€"]))
            got, ended = fed(run, pieces)
            assert (got + ("" if ended else run.job.ending.flush()), ended) == (text, reason)


# What is behind the bar is left to healing.
HEALED = json.loads(r"""[
    "import| nump", "x = self|.nam", "x = self.first|_nam", "f|(wid", "x = 'übe|", "# 漢字|",
    "def f():\n|    ", "x =| ", "x = 12|", "def f(n)|:", "x = f|(", "x = f(|)", "os|.",
    "area_of|_", "is|__", "# 漢字。|", "def f():\n|", "|word", "|   ", "|",
    "x =| aaaaaaaaaaaaaaaaaaaaaaaa", "x = aaaaaaaaaaaaaaaaaaaaaaaaa|"]""")


def test_the_text_that_is_left_to_healing() -> None:
    for text in HEALED:
        assert heal_from(text.replace("|", "")) == text.index("|"), text


# ------------------------------------------------------------------------------------------- memory


# Context, sequences, free megabytes; context and sequences that fit.
FITTED = """
  4096 | 2 |  8096 |  4096 | 2
  4096 | 2 |  8095 |  3840 | 2
  4096 | 2 |  6048 |  2048 | 2
  4096 | 2 |  6047 |  3840 | 1
  4096 | 2 |     0 |  2048 | 1  # which does not fit either
  3000 | 1 |  5300 |  2560 | 1
  1000 | 2 |  5000 |  1000 | 2  # a context that a person has set is not shortened below 2,048
  1000 | 2 |     0 |  1000 | 1
  1000 | 1 |     0 |  1000 | 1  # there is nothing shorter
131072 | 1 | 36000 | 57600 | 1  # in steps of a sixteenth
"""


@pytest.mark.parametrize("row", rows(FITTED), ids=str)
def test_the_longest_context_that_fits(row: list[str]):
    def need(_: Path, forms: Sequence[llama.Settings]) -> list[Parts]:
        assert forms
        return [
            {"weights": 4000 * MB, "kv": form.sequences * form.n_ctx * MB // 2} for form in forms
        ]

    n_ctx, sequences, free_mb, *fitted = map(int, row)
    given = llama.Settings(threads=1, n_ctx=n_ctx, sequences=sequences)
    got, parts = fit_context(Path(), given, free_mb * MB, need)
    assert [got.n_ctx, got.sequences] == fitted
    assert parts["kv"] == fitted[0] * fitted[1] * MB // 2
    assert replace(got, n_ctx=n_ctx, sequences=sequences) == given


# -------------------------------------------------------------------------------------------- baton


def test_baton_is_passed_on_in_the_order_of_requests() -> None:
    baton = Baton()
    order, threads = list[int](), list[threading.Thread]()

    def take(number: int) -> None:
        with baton:
            order.append(number)

    with baton:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            wait_until(
                lambda number=number: len(baton._queue) > number + 1,
                f"thread {number} waits for the baton",
            )
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    for _ in range(2):  # the holder's failure passes it on
        with pytest.raises(ZeroDivisionError), baton:
            raise ZeroDivisionError


# ------------------------------------------------------------------------------------ files of ours


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path, patch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / ".file").write_bytes(b"what a killed process left")
    for data in (b"one", b"two"):
        write_atomically(tmp_path / "file", data)
        assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [
            ("file", data)
        ]
    patch(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"three")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"two")]


def test_the_costs_of_a_model_are_measured_when_it_is_warm(patch: Any):
    sizes = list[int]()

    def decode(_model, _slot, tokens: list[int], outputs: int) -> float:
        assert outputs == len(tokens)
        sizes.append(len(tokens))
        return 0.01 + 0.03 * len(tokens) + 5.0 * (len(sizes) == 1)

    patch(schedule, "decode", decode)
    model: Any = SimpleNamespace(n_vocab=1000, outputs=16, cut=lambda *_: None)
    costs = schedule.measure_costs(model, Baton(), lambda: False)
    assert sizes == [1, 1, 2, 4, 8, 16, 1, 16]
    assert [costs(n) for n in (1, 4, 16)] == pytest.approx([0.04, 0.13, 0.49])
    with pytest.raises(llama.ModelError, match="cancelled"):
        schedule.measure_costs(model, Baton(), lambda: len(sizes) == 13)


def test_digest_is_checked_once_for_an_unchanged_file(tmp_path: Path):
    path, data = tmp_path / "m.gguf", random.Random(5).randbytes(300_000)
    path.write_bytes(data)
    right = hashlib.sha256(data).hexdigest()

    def check(sha256: str = right, stopping: bool = False) -> None:
        memory.check_digest(path, sha256, tmp_path / "state", lambda: stopping)

    check("")
    assert not (tmp_path / "state").exists()
    with pytest.raises(llama.ModelError, match="cancelled"):
        check(stopping=True)
    with pytest.raises(
        llama.ModelError, match=f"expected sha256 {'0' * 64}, got {right}; fetch it again"
    ):
        check("0" * 64)
    check()
    check(stopping=True)  # not read again
    path.write_bytes(data + b"more")
    with pytest.raises(llama.ModelError, match="fetch it again"):
        check()


# ------------------------------------------------------------------------------------------- worker


class ScriptedLlama:
    """Stands for a model. It writes the letters a, b, c, …, and fails in the call that `fails`
    names.
    """

    def __init__(self, *_) -> None:
        self.vocabulary = self
        self.n_ctx, self.micro_batch = 4096, 256
        self.n_vocab = 1000
        self.max_draft, self.layout = MAX_DRAFT, "spmv2"
        self.recurrent = self.closed = False
        self.fails = ""
        self.abort_flag = [b"\x00"]
        self.saved = 0
        # A decode sets the second event, then waits for the first.
        self.hold, self.decoding = threading.Event(), threading.Event()
        self.hold.set()

    def _fail(self, place: str) -> None:
        if self.fails == place:
            raise MemoryError(f"no memory for {place}")

    def encode(self, request: GenerationRequest) -> PromptPart:
        return PromptPart([ord(char) for char in request.prompt or ""])

    cut = llama.Llama.cut

    def decode(self, parts) -> int:
        self._fail("decode")
        self.decoding.set()
        assert self.hold.wait(PATIENCE)
        read = itertools.chain.from_iterable(tokens for _, tokens, _ in parts)
        self.next = [(token - 96) % 26 + 97 for token in read]
        return llama.ABORTED if self.abort_flag[0] == b"\x01" else 0

    def abort(self) -> None:
        self.abort_flag[0] = b"\x01"

    def computed(self, slot) -> int:
        """A decode that is aborted has read 20 tokens of a prompt."""
        return len(slot.tokens) + 20

    def greedy(self, index: int) -> int:
        return self.next[index]

    def probability(self, *_) -> float:
        return 0.5

    def piece(self, token: int) -> bytes:
        self._fail("piece")
        return bytes([token])

    def is_end(self, _token: int) -> bool:
        return False

    def state_size(self, _slot) -> int:
        return 5

    def save(self, _slot) -> bytes:
        self._fail("save")
        self.saved += 1
        return b"state"

    def close(self) -> None:
        self.closed = True
        self._fail("close")

    def trim(self, *_) -> bool:
        return True

    copy_prefix = restore = trim
    unified = True


class Ask:
    """A job for a worker, and its events."""

    def __init__(self, prompt: str, **more) -> None:
        self.events: queue.SimpleQueue[list[Event | HttpError]] = queue.SimpleQueue()
        plain: dict[str, Any] = {"stop_at": "none", "temperature": 0}
        self.job = Job(GenerationRequest(prompt, **plain | more), self.events.put)
        self.writers = list[str]()  # who answers, if it is not the model itself

    def outcome(self) -> tuple[str, Any]:
        """The whole text and the last event."""
        text = ""
        while True:
            for event in self.events.get(timeout=PATIENCE):
                if isinstance(event, HttpError) or "done" in event:
                    return text, event
                self.writers += [event["model"]] if "model" in event else []
                text += event.get("token", "")

    def error(self) -> str:
        """The code of the error that the job ends with."""
        return str(self.outcome()[1].code)


def worker_of(loader: LoadPlan) -> Worker:
    """A worker beside no other."""
    return Worker(loader, Baton(), ModelTally())


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[Worker]:
    """Start a worker, and stop it in the end."""
    worker.start()
    worker.ready.result(PATIENCE)
    yield worker
    worker.stop()
    worker.ended.result(PATIENCE)


class Loads:
    """Loads a ScriptedLlama from any file but those in `broken`, which has the error of each."""

    def __init__(self) -> None:
        self.broken, self.loaded = dict[str, Exception](), list[str]()

    def __call__(self, path: Path, settings: llama.Settings, *_) -> ScriptedLlama:
        self.loaded.append(f"{path.name} {settings.micro_batch}")
        if path.name in self.broken:
            raise self.broken[path.name]
        return ScriptedLlama()


@pytest.fixture
def loads(patch) -> Loads:
    """How each worker loads its model; it measures nothing."""
    patch(vps_worker, "Llama", loads := Loads())
    patch(vps_worker, "measure_costs", lambda *_: Costs({1: ONE, 16: MANY}))
    return loads


@pytest.fixture
def worker(request: pytest.FixtureRequest, tmp_path: Path, loads: Loads) -> Iterator[Worker]:
    """A worker with a ScriptedLlama, and with two sequences or the number in the parameter."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    sequences = getattr(request, "param", 2)
    settings = llama.Settings(threads=1, sequences=sequences, draft=False, state_dir=tmp_path)
    with running(worker_of(LoadPlan("m", path, settings))) as worker:
        yield worker


def ask(worker: Worker, prompt: str, **more) -> Ask:
    asked = Ask(prompt, **more)
    worker.prepare(asked.job)
    worker.submit(asked.job)
    return asked


def test_drafts_follow_the_seconds_that_they_took(worker: Worker, patch):
    """What is drafted here is never right, and a decode takes a second for each token."""
    model, decoder = worker.decoder.model, worker.decoder
    now, sizes = [0.0], list[int]()
    decoder.drafting, real = True, model.decode
    patch(vps_worker.time, "perf_counter", lambda: now[0])
    patch(Drafter, "draft", lambda *_: [0] * 3)

    def decode(parts) -> int:
        sizes.append(sum(len(tokens) for _, tokens, _ in parts))
        now[0] += sizes[-1]
        return real(parts)

    model.decode = decode
    assert ask(worker, "a", max_tokens=60).outcome()[1]["total_tokens"] == 60
    assert sizes == [1, 1, *[4] * 6, 1, 4, *[1] * 50]
    assert decoder.gain.plain == {1: 1.0}


TUNED = "tuned: Q4_K to Q4_1"
WEIGHTS_SUM = hashlib.sha256(b"weights").hexdigest()


WRONG_SUM = f"expected sha256 {'0' * 64}, got {WEIGHTS_SUM}; fetch it again"
# Which file is broken, the sha256 that the tuned one was made from, what is loaded in micro-batches
# of which size, and what is said.
LOADED = f"""
      |           | tuned 128             |
tuned |           | tuned 128, m.gguf 256 | llama.cpp cannot load this file
      | {"0" * 64}| m.gguf 256            | {WRONG_SUM}
"""


@pytest.mark.parametrize(("broken", "source", "loaded", "warning"), rows(LOADED))
def test_a_tuned_file_is_loaded_if_it_can_be(
    tmp_path, loads: Loads, caplog, broken, source, loaded, warning
):
    for name in ("m.gguf", "tuned"):
        (tmp_path / name).write_bytes(b"weights")
    loads.broken[broken] = llama.ModelError("llama.cpp cannot load this file")
    settings = llama.Settings(state_dir=tmp_path / "state")
    smaller = replace(settings, micro_batch=128)
    tuned = TunedFile(tmp_path / "tuned", smaller, tuned_passport(source))
    with running(worker_of(LoadPlan("m", tmp_path / "m.gguf", settings, tuned=tuned))) as worker:
        pass
    assert loads.loaded == loaded.split(", ")
    used = worker.loaded
    assert f"{used.path.name} {used.settings.micro_batch}" == loads.loaded[-1]
    assert used.encoding == ("published" if warning else TUNED)
    reason = f"its tuned file cannot be used: {warning}"
    mend = "`vpsd.py tune m` finds its fastest encoding"
    said = f"model m runs untuned: {reason}: {mend}"
    assert warnings_in(caplog) == [said] * bool(warning)


@pytest.mark.usefixtures("loads")
def test_caches_are_kept_apart_by_file_and_settings(tmp_path, patch) -> None:
    settings, keys = llama.Settings(state_dir=tmp_path / "state"), set()

    def load(name: str, **other) -> None:
        (tmp_path / name).write_bytes(name.encode())
        with running(
            worker_of(LoadPlan("m", tmp_path / name, replace(settings, **other)))
        ) as worker:
            keys.add(worker.loaded.key)

    load("m.gguf")
    load("tuned")
    load("tuned", micro_batch=128)
    load("tuned", flash_attention=True)
    # As a larger or smaller cache of prompts may make it.
    patch(ScriptedLlama, "unified", False)
    load("tuned", flash_attention=True)
    assert len(keys) == 5


def test_a_fault_while_a_request_is_set_up_ends_it_alone(worker: Worker, patch):
    real = vps_job.Sampler

    def sampler(request: GenerationRequest) -> vps_job.Sampler:
        if request.prompt == "bad":
            raise RecursionError("of the sampler")
        return real(request)

    patch(vps_job, "Sampler", sampler)
    model: Any = worker.decoder.model
    model.hold.clear()
    beside = ask(worker, "x", max_tokens=3)
    assert model.decoding.wait(PATIENCE)
    bad, waiting = ask(worker, "bad"), ask(worker, "c", max_tokens=2)
    model.hold.set()
    assert bad.error() == "INTERNAL_ERROR"
    text, last = beside.outcome()
    assert (text, last["finish_reason"]) == ("yza", "length")
    assert (last["total_tokens"], last["prompt_tokens"]) == (3, 1)
    assert waiting.outcome()[0] == "de"
    model.fails = "piece"  # with one token
    assert ask(worker, "x").error() == "INTERNAL_ERROR"
    model.fails = ""
    assert ask(worker, "x", max_tokens=2).outcome()[0] == "yz"
    assert [slot.run for slot in worker.decoder.answer_slots] == [None, None]


def test_a_worker_is_due_only_while_it_works_and_saves_when_it_rests(worker: Worker, patch):
    """An idle worker may rest for ever, and one that decodes has a multiple of what the decode
    costs.
    """
    patch(vps_worker, "STORE_SECONDS", 0.01)
    worker.wake()  # it may be waiting for the usual time
    wait_until(lambda: worker.due == math.inf, "the worker rests")
    model: Any = worker.decoder.model
    cases = ("abc" * 9, 100.0, 1.0), ("xyz" * 9, 1.0, 1e6)
    for saved, (prompt, hung_seconds, slowest) in enumerate(cases, 1):
        patch(vps_worker, "HUNG_SECONDS", hung_seconds)
        patch(vps_worker, "SLOWEST", slowest)
        model.hold.clear()
        model.decoding.clear()
        began = time.monotonic()
        asked = ask(worker, prompt, max_tokens=1)
        assert model.decoding.wait(PATIENCE)
        due, now = worker.due, time.monotonic()
        model.hold.set()
        asked.outcome()
        allowed = max(hung_seconds, slowest * worker.decoder.costs(len(prompt)))
        assert began + allowed <= due <= now + allowed
        wait_until(lambda: worker.due == math.inf, "the worker rests")
        assert model.saved == saved


def test_a_prompt_of_low_priority_that_goes_on_with_another_leaves_it_in_memory(
    worker: Worker,
):
    decoder: Any = worker.decoder
    ask(worker, "abc" * 20, max_tokens=0).outcome()
    (other,) = [slot.tokens[:] for slot in worker.decoder.answer_slots if slot.tokens]
    ask(worker, "abc" * 15 + "x", max_tokens=0, priority="low").outcome()
    assert kept(decoder.sequences.store) == [other]
    assert [slot.low for slot in worker.decoder.answer_slots if len(slot.tokens) == 46] == [True]
    ask(worker, "abc" * 15 + "xyz", max_tokens=0).outcome()
    assert [slot.low for slot in worker.decoder.answer_slots if len(slot.tokens) == 48] == [False]


def test_saved_prompts_are_dropped_on_request(worker: Worker):
    decoder: Any = worker.decoder
    decoder.sequences.store = store = PrefixStore(1000, False)
    for token in (1, 2, 3):
        store.add(parked(token))
    for size, left in ((0, [1, 2, 3]), (150, [3]), (150, [])):
        worker.shed(size).result(PATIENCE)
        assert kept(store) == [[token] for token in left]


@pytest.mark.parametrize("fails", ["decode", "save", "close"])
def test_a_worker_that_fails_answers_all_requests_and_ends(worker: Worker, fails):
    model: Any = worker.decoder.model
    model.hold.clear()
    running = [ask(worker, "x" * 20), ask(worker, "y" * 20)]
    assert model.decoding.wait(PATIENCE)
    waiting = ask(worker, "z" * 20)
    model.fails = fails
    if fails != "decode":
        worker.stop()
    model.hold.set()
    worker.ended.result(PATIENCE)
    code = "INTERNAL_ERROR" if fails == "decode" else "SHUTTING_DOWN"
    assert [asked.error() for asked in running] == [code] * 2
    for asked in (waiting, ask(worker, "z")):  # nothing of these is lost
        assert asked.error() == "SHUTTING_DOWN"
    assert (model.closed, worker.stopping) == (True, True)


def test_any_fault_of_a_load_is_reported(tmp_path, loads: Loads):
    loads.broken["m.gguf"] = FileNotFoundError(2, "No such file", "/secret/path")
    worker = worker_of(LoadPlan("m", tmp_path / "m.gguf", llama.Settings(state_dir=tmp_path)))
    worker.start()
    error: Any = worker.ready.exception(PATIENCE)
    assert error.code == "MODEL_LOAD_FAILED"
    assert error.message == "model m: loading failed; see the log"
    worker.ended.result(PATIENCE)


def test_a_chunk_is_short_and_low_priority_waits_while_another_model_is_generating(
    worker: Worker,
):
    decoder: Any = worker.decoder
    other, slot = object(), worker.decoder.answer_slots[0]
    normal, low = (Ask("x" * 4000, priority=priority).job for priority in ("normal", "low"))
    for job in (normal, low):
        worker.prepare(job)
    run, slot.run = Run(normal, llama.Slot(0), []), Run(low, slot, [])
    assert len(decoder.next_work(run, [run]).tokens) == MAX_CHUNK
    worker.baton.note(other, 0.01)
    most = decoder.costs.longest(longest_delay(0.01))
    assert len(decoder.next_work(run, [run]).tokens) == most < MAX_CHUNK
    assert not decoder.turn()
    worker.baton.note(other, None)
    assert len(decoder.next_work(run, [run]).tokens) == MAX_CHUNK
    assert decoder.turn()
    assert slot.tokens
    decoder.fail(slot.run, HttpError("SHUTTING_DOWN", ""))


def script(worker: Worker, arrivals: dict[str, Any]) -> list[str]:
    """The first letter and the size of each part of all decodes to come.

    `arrivals` has functions that are called during a decode: that of "l2" during the second one
    that begins with l.
    """
    model: Any = worker.decoder.model
    real, log = model.decode, list[str]()
    # The sizes must not depend on this machine's speed.
    worker.decoder.costs.learn = lambda *_: None

    def decode(parts) -> int:
        log.append(" ".join(f"{chr(tokens[0])}{len(tokens)}" for _, tokens, _ in parts))
        letter = log[-1][0]
        arrivals.get(f"{letter}{sum(entry[0] == letter for entry in log)}", bool)()
        return real(parts)

    model.decode = decode
    return log


def arrive(worker: Worker, prompt: str, **more) -> Ask:
    """A request of one token, for which others give way."""
    asked = ask(worker, prompt, max_tokens=1, **more)
    worker.give_way(asked.job)
    return asked


@pytest.mark.parametrize("own", [True, False])
def test_a_long_chunk_gives_way_to_another_request_once(worker: Worker, own):
    """What was read of it stays, and from then on its chunks are short."""
    decoder: Any = worker.decoder
    decoder.costs = Costs({1: 0.05, 16: 0.8})
    long, same = Ask("l" * 1000, max_tokens=1), Ask("l" * 1000)
    short = Ask("x", max_tokens=1)
    for asked in (long, same, short):
        worker.prepare(asked.job)

    def arrive() -> None:
        for asked in (long, same):  # neither to itself nor to one that waits for what it reads
            worker.give_way(asked.job)
        assert decoder.model.abort_flag[0] == b"\x00"
        worker.submit(short.job)
        worker.give_way(short.job if own else None)  # or to another model's

    log = script(worker, {"l1": arrive})
    worker.submit(long.job)
    assert [short.outcome()[0], long.outcome()[0]] == ["y", "m"]
    assert log[:2] == ["l256", "l2 x1"]
    assert max(int(chunk[1:]) for chunk in log[2:]) < 256
    assert long.job.part.tokens == [ord("l")] * 1000
    assert decoder.tally.prompt_tokens == 1001


def test_a_decode_is_aborted_if_all_its_runs_make_way(worker: Worker):
    decoder: Any = worker.decoder
    for runs, flag in (["prompt low", "prompt left"], b"\1"), (["prompt low", "text"], b"\0"):
        decoder.model.abort_flag[0] = b"\0"
        decoder.compute.current = Current(list(map(run_of, runs)), is_long=False)
        worker.give_way(run_of("left").job)  # who has left disturbs nobody
        assert decoder.model.abort_flag[0] == b"\0"
        worker.give_way(None)
        assert decoder.model.abort_flag[0] == flag


ONE_SEQUENCE = pytest.mark.parametrize("worker", [1], indirect=True)


SIZES = {
    False: "l53 x17 p17 l53 t17 l53 l53 l4 k30",
    True: "l53 x16 x1 p16 p1 l53 t16 t1 l43 l1 k29 k1",
}


@ONE_SEQUENCE
@pytest.mark.parametrize("recurrent", SIZES)
def test_a_prompt_of_low_priority_gives_up_the_only_sequence(worker: Worker, recurrent):
    """Nothing is read twice. Jobs of low priority keep their order, behind all others."""
    decoder: Any = worker.decoder
    decoder.model.recurrent = decoder.sequences.store.recurrent = recurrent
    asked = dict[str, Ask]()

    def low(prompt: str, **more) -> None:
        asked[prompt[0]] = ask(worker, prompt, max_tokens=1, priority="low", **more)

    def normal(letters: str) -> None:
        asked.update({letter: arrive(worker, letter * 17) for letter in letters})

    def first() -> None:
        for letter in "kc":
            low(letter * 30)
        worker.cancel(asked["c"].job)
        normal("xp")

    log = script(worker, {"l1": first, "l2": lambda: normal("t")})
    low("l" * 150, progress=True)
    stages = list[str]()
    while "done" not in (event := asked["l"].events.get(timeout=PATIENCE)[-1]):
        stages += [event["progress"]["stage"]] if "progress" in event else []
    assert [asked[name].outcome()[0] for name in "xptk"] == ["y", "q", "u", "l"]
    assert " ".join(log) == SIZES[recurrent]
    assert (stages.count("queued"), stages[-1]) == (3, "decode")
    tally = worker.tally
    assert event["cached_tokens"] == tally.cached_tokens == 0
    assert tally.prompt_tokens == 150 + 30 + 3 * 17
    assert tally.ended == {"length": 5, "CANCELLED": 1}


@ONE_SEQUENCE
def test_a_prompt_that_gave_way_is_dropped_with_its_client_and_what_was_read_is_kept(
    worker: Worker,
):
    low, asked = Ask("l" * 150, max_tokens=1, priority="low"), list[Ask]()
    arrivals = {"l1": lambda: asked.append(arrive(worker, "x" * 17))}
    log = script(worker, arrivals | {"x1": lambda: worker.cancel(low.job)})
    worker.submit(worker.prepare(low.job))
    wait_until(lambda: worker.tally.ended == {"length": 1, "CANCELLED": 1}, "both have ended")
    assert log == ["l53", "x17"]
    assert asked[0].outcome()[0] == "y"
    assert ask(worker, "l" * 150, max_tokens=1).outcome()[1]["cached_tokens"] == 20


@ONE_SEQUENCE
@pytest.mark.parametrize(
    ("next_prompt", "prompt_ms", "cached"),
    [("l" * 151, 0, 64), ("l" * 151, 500, 20), ("x" * 17, 0, 20)],
)
def test_a_chunk_that_is_read_ahead_ends_for_those_who_do_not_need_it(
    worker: Worker, next_prompt, prompt_ms, cached
):
    """Its reading is cancelled when the next request comes, and its place is the only one."""
    ahead = Ask("l" * 150, max_tokens=0)

    def leave() -> None:
        worker.cancel(ahead.job)
        arrive(worker, next_prompt, prompt_ms=prompt_ms)

    script(worker, {"l1": leave})
    worker.submit(worker.prepare(ahead.job))
    wait_until(lambda: worker.tally.ended == {"length": 1, "CANCELLED": 1}, "both have ended")
    assert worker.tally.cached_tokens == cached * (next_prompt[0] == "l")
    again = ask(worker, "l" * 150, max_tokens=1).outcome()[1]["cached_tokens"]
    assert again == (149 if next_prompt[0] == "l" else cached)


@ONE_SEQUENCE
@pytest.mark.parametrize("lost", [False, True])
def test_a_completion_of_low_priority_that_has_begun_keeps_its_sequence(worker: Worker, lost):
    """Even while it is read again because its recurrent state was lost."""
    model: Any = worker.decoder.model
    model.recurrent = lost
    asked = list[Ask]()

    def arrive() -> None:
        asked.append(ask(worker, "x", max_tokens=1))
        if lost:
            model.abort()

    log = script(worker, {"m1": arrive})
    assert ask(worker, "l", max_tokens=3, priority="low").outcome()[0] == "mno"
    assert asked[0].outcome()[0] == "y"
    assert log == ["l1", "m1", "l2" if lost else "n1", *["n1"] * lost, "x1"]


@pytest.mark.parametrize("fails", [False, True])
def test_one_of_two_prompts_of_low_priority_gives_way(worker: Worker, fails):
    """The other one stands still. If the first cannot be saved, the normal job fails, and both go
    on.
    """
    model: Any = worker.decoder.model
    asked = dict[str, Ask]()

    def two() -> None:
        for letter in "ac":
            asked[letter] = ask(worker, letter * 70, max_tokens=1, priority="low")

    def save(_slot) -> bytes:
        del model.save  # the next one succeeds
        raise MemoryError

    def normal() -> None:
        if fails:
            model.save = save
        asked["x"] = ask(worker, "x" * 17, max_tokens=1)

    log = script(worker, {"s1": two, "a1": normal})
    ask(worker, "s", max_tokens=1).outcome()
    wait_until(lambda: "x" in asked)
    assert [asked[letter].outcome()[0] for letter in "xac"] == ["" if fails else "y", "b", "d"]
    assert log == (
        ["s1", "a53 c53", "a53 c17", "a17"] if fails else ["s1", "a53 c53", "x17", "a17 c17"]
    )


# ------------------------------------------------------------------------------- whose text it is


def next_letter(cells: Sequence[int]) -> int:
    return 97 + zlib.crc32(bytes(cells)) % 3


def written(prompt: str, count: int) -> str:
    """A prompt, and what CellsLlama writes after it."""
    cells = [*prompt.encode()]
    for _ in range(count):
        cells.append(next_letter(cells))
    return bytes(cells).decode()


class CellsLlama(ScriptedLlama):
    """Has the cells of each sequence, all of which its next letter depends on. Some decodes of a
    prompt are aborted, and leave cells that were not computed.
    """

    rng = random.Random("cells")

    def __init__(self, *_) -> None:
        super().__init__()
        self.micro_batch = 16
        self.recurrent, self.unified = KIND == "recurrent", KIND == "unified"
        self.cells = defaultdict[int, list[int]](list)

    def decode(self, parts) -> int:
        self.next, self.known = [], {}
        is_aborted = len(parts[0][1]) > 20 and self.rng.random() < 0.3
        for slot, tokens, _ in parts:
            cells = self.cells[slot.id]
            assert len(cells) == len(slot.tokens)
            self.known[slot.id] = read = len(cells) + min(20, len(tokens))
            for token in tokens:
                cells.append(token)
                self.next.append(next_letter(cells))
            if is_aborted:
                cells[read:] = [0] * len(cells[read:])
        return llama.ABORTED if is_aborted else 0

    def computed(self, slot) -> int:
        return self.known[slot.id]

    def state_size(self, slot) -> int:
        return len(self.cells[slot.id])

    def save(self, slot) -> bytes:
        return bytes(self.cells[slot.id])

    def restore(self, slot, state: bytes) -> bool:
        self.cells[slot.id] = [*state]
        return True

    def copy_prefix(self, source, target, length: int) -> bool:
        cells = self.cells[source.id]
        self.cells[target.id] = cells[:length] if self.unified else cells[:]
        return True

    def trim(self, slot, length: int) -> bool:
        cells = self.cells[slot.id]
        if self.recurrent and 0 < length < len(cells):
            return False
        del cells[length:]
        return True


KIND = "unified"
BEGINNING = "import os\n" * 4
SECRETS = "the key of anna ", "the word of ben "


@pytest.mark.parametrize("kind", ["unified", "separate", "recurrent"])
def test_each_gets_the_text_after_the_own_prompt_whatever_was_kept_of_others(
    kind, tmp_path, patch, caplog
) -> None:
    """Two people whose prompts begin alike, with sequences that are running, parked, stored when
    the worker rests, saved and loaded again, and drafts from the sequences of both.
    """
    caplog.set_level(logging.DEBUG, "cerebrum")
    patch(f"{__name__}.KIND", kind)
    patch(vps_worker, "Llama", CellsLlama)
    patch(vps_worker, "measure_costs", lambda *_: Costs({1: ONE, 16: MANY}))
    patch(vps_worker, "STORE_SECONDS", 0.001)
    for name, stub in (("wants", lambda *_: True), ("learn", lambda *_: None)):
        patch(Gain, name, stub)  # of drafts of the text
    (path := tmp_path / "m.gguf").write_bytes(b"weights")
    settings = llama.Settings(threads=1, sequences=2, draft=True, state_dir=tmp_path)
    rng = random.Random(kind)
    tally = Counter[str]()
    for _ in range(4):
        with running(worker_of(LoadPlan("m", path, settings))) as worker:
            for _ in range(12):
                asked = []
                for secret in rng.choice((SECRETS, SECRETS[:1], SECRETS[1:])):
                    prompt = BEGINNING + secret[: rng.randint(0, 16)] * rng.randint(1, 4)
                    count = rng.randint(1, 30)
                    asked.append((prompt, count, ask(worker, prompt, max_tokens=count)))
                for prompt, count, each in asked:
                    text, last = each.outcome()
                    assert prompt + text == written(prompt, count)
                    assert (last["prompt_tokens"], last["total_tokens"]) == (len(prompt), count)
                    assert last["cached_tokens"] < len(prompt)
                    tally.update(cached=last["cached_tokens"], right=last["accepted_tokens"])
    assert min(tally.values()) > 0
    assert not any(secret[:8] in caplog.text for secret in SECRETS)


async def test_texts_to_tokenize_take_no_threads_from_prompts(worker: Worker, patch):
    """Not even if their clients leave, which ends no thread that tokenizes already."""
    engine = vpsd.Engine(config(CEREBRUM_MIN_FREE_MB="0"))
    gate, begun = threading.Event(), list[str]()

    def tokenize(text: str) -> list[int]:
        begun.append(text)
        gate.wait(PATIENCE)
        return []

    async def acquire(*_) -> Any:
        return SimpleNamespace(worker=worker)

    patch(worker, "tokenize", tokenize)
    for name, stub in (("check", lambda _model: None), ("acquire", acquire)):
        patch(engine.pool, name, stub)
    asked = [engine.tokenize("m", text=str(number)) for number in range(40)]
    tasks = [asyncio.create_task(tokens) for tokens in asked]
    try:
        for task in tasks[:30]:
            await until(lambda: begun)
            task.cancel()
        request = GenerationRequest("a", model="m", max_tokens=1, temperature=0)
        admission = engine.admit(request, {})
        assert (await admission.next_events(PATIENCE))[0] == {"token": "b", "total_tokens": 1}
        assert begun == ["0"]
    finally:
        gate.set()
    await asyncio.wait(tasks)
    assert begun == ["0", *map(str, range(30, 40))]
