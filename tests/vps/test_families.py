"""Other families than Qwen's, as tiny random models: whatever was asked before, the text is that of
a greedy loop.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from harness import CAPTURED, ROOT
from test_engine import ask, running, worker_of

from cerebrum.request import GenerationRequest
from cerebrum.vps import memory
from cerebrum.vps.decoder import ModelTally
from cerebrum.vps.fetch import is_whole
from cerebrum.vps.gguf import Source
from cerebrum.vps.job import Sampler
from cerebrum.vps.llama import (
    ABORTED,
    MB,
    Llama,
    ModelError,
    Settings,
    Slot,
    llama_log,
    start_library,
)
from cerebrum.vps.memory import accepts, check_digest, needed
from cerebrum.vps.plan import LoadPlan
from cerebrum.vps.prefixes import Parked, Sequences
from cerebrum.vps.schedule import Baton
from cerebrum.vps.vocabulary import Vocabulary, api, cut_runs
from cerebrum.vps.worker import Worker
from cerebrum_common import HttpError

ONE = Settings(threads=1, n_ctx=64, sequences=1, micro_batch=16)
TIE = 1e-3  # logits closer than this may be ordered differently in a batch of another size
WORDS = ["def", "return", "self", "for", "in", "x", "y", "(", ")", ":", "=", "+"]
WORDS += ["\n", "\n\n", "1", "the", "print"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    start_library()
    folder = tmp_path_factory.mktemp("families")
    for name, family in (families.FAMILIES | families.MARKED).items():
        families.make(folder / f"{name}.gguf", family)
    return folder


def edit(draw: random.Random, text: str) -> str:
    """A text as a user might have changed it."""
    cursor = draw.choice((len(text), len(text), draw.randrange(len(text) + 1)))
    kept = text[cursor:] if draw.random() < 0.8 else ""
    typed = " ".join(draw.choices(WORDS, k=draw.randint(0, 9)))
    before = text[: max(0, cursor - draw.choice((0, 0, 1, 9)))]
    return before + typed + kept


ROUNDS = [(0, 20), pytest.param(1, 100, marks=pytest.mark.slow)]
# Flash attention rounds more, and differently for different batches.
EXACT = replace(ONE, n_ctx=512, sequences=3, micro_batch=64, flash_attention=False)


@pytest.mark.parametrize(("seed", "rounds"), ROUNDS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_text_is_that_of_a_greedy_loop(family, seed, rounds, models: Path, tmp_path):
    path = models / f"{family}.gguf"
    loader = LoadPlan("tiny", path, replace(EXACT, state_dir=tmp_path))
    check_against_a_greedy_loop(loader, rounds, random.Random(f"{family} {seed}"))


def check_against_a_greedy_loop(loader: LoadPlan, rounds: int, draw: random.Random) -> ModelTally:
    """Ask for completions as an editor might, with edits, cancels and restarts, and compare each
    text. Returns what was counted.
    """
    compared = 0
    reference = families.Reference(loader.path, n_ctx=512, flash=False)
    texts = ["def f(x):\n    return x\n" * 3]
    tally = ModelTally()

    def ask_some(worker: Worker) -> Iterator[bool]:
        """Whether each answer was certain: no two logits were nearly equal."""
        asked = []
        # With the tokens that llama.cpp does not know as ends.
        reference.is_end = worker.decoder.model.vocabulary.is_end
        for _ in range(draw.choice((1, 1, 2, 3))):
            text = edit(draw, draw.choice(texts))[-300:] or "x"
            texts[:] = [*texts[-5:], text]
            suffix = edit(draw, text[:40]) if draw.random() < 0.4 else None
            asked.append((text, ask(worker, text, suffix=suffix, max_tokens=draw.randint(1, 24))))
        for text, request in asked:
            job = request.job
            if draw.random() < 0.2:
                worker.cancel(job)
                continue
            got = request.outcome()[0]
            pieces, gaps = reference.greedy(job.part.tokens, job.max_tokens)
            is_sure = min(gaps) > TIE
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            assert not is_sure or got == decoder.decode(b"".join(pieces))
            if draw.random() < 0.5:
                texts.append(text + got)
            yield is_sure

    while rounds > 0:
        turns = min(rounds, draw.randint(1, 20))
        with running(Worker(loader, Baton(), tally)) as worker:
            for _ in range(turns):
                compared += sum(ask_some(worker))
        rounds -= turns
    reference.close()
    assert compared > 10
    return tally


def test_files_in_turns_stay_in_their_slots_where_they_are_too_large_to_be_saved(
    models: Path, tmp_path
):
    settings = Settings(threads=1, n_ctx=4096, sequences=2, cache_mb=1, state_dir=tmp_path)
    read = []
    with running(worker_of(LoadPlan("tiny", models / "dense.gguf", settings))) as worker:
        for text in ("x = 1\n" * 400, "y = 2\n" * 400, "x = 1\n" * 401, "y = 2\n" * 401):
            before = worker.tally.prompt_tokens
            ask(worker, text, max_tokens=1).outcome()
            read.append(worker.tally.prompt_tokens - before)
    assert read == [2400, 2400, 6, 6]  # each has 1.2 MB of state


# ----------------------------------------------------------------------------------- marks and ends


@contextlib.contextmanager
def opened(path: Path, settings: Settings = ONE, **fim) -> Iterator[Llama]:
    model = Llama(path, settings, **fim)
    yield model
    model.close()


def named(model: Llama, tokens: list[int], marks: Sequence[str] = ()) -> str:
    """The tokens as text, marks by their names."""
    vocabulary, text = model.vocabulary, b""
    for token in tokens:
        piece = vocabulary.piece(token)
        name = api.llama_vocab_get_text(vocabulary.vocab, token)
        text += name if name.decode() in marks or not piece else piece
    return text.decode()


# A family, its tokens that end a completion, and some that do not.
ENDS = json.loads(r"""[
    ["starcoder", ["<|endoftext|>", "<file_sep>", "<fim_prefix>"], ["def"]],
    ["codegemma", ["<eos>", "<|file_separator|>"], ["def"]],
    ["codellama", ["\u2581<EOT>", "\u2581<PRE>", "</s>"], ["\u2581def", "<0x0A>"]],
    ["gpt-oss", ["<|return|>"], ["<|channel|>", "<|message|>"]],
    ["thinking", ["<|im_end|>", "<|file_sep|>"], ["<think>", "</think>"]]]""")


def test_marks_that_end_a_completion(models: Path):
    for family, ends, goes_on in ENDS:
        tokens = families.vocabulary(families.MARKED[family])[0]
        with opened(models / f"{family}.gguf") as model:
            is_end = model.vocabulary.is_end
            assert [name for name in ends + goes_on if is_end(tokens.index(name))] == ends


ABOVE, BELOW = "def f(x):\n  ", "  return x\n"
# A family, the marks of models.toml, their order, and how the gap is asked for.
GAPS = json.loads(r"""[
    ["qwen", [], "psm", "<|fim_prefix|>ABOVE<|fim_suffix|>BELOW<|fim_middle|>"],
    ["qwen", [], "spmv2", "<|fim_prefix|><|fim_suffix|>BELOW<|fim_middle|>ABOVE"],
    ["codestral", ["[PREFIX]", "[SUFFIX]", "<s>"], "spmv2", "<s>[PREFIX][SUFFIX]BELOW<s>ABOVE"],
    ["codestral", ["[PREFIX]", "[SUFFIX]", ""], "spmv2", "<s>[PREFIX]ABOVE[SUFFIX]BELOW"],
    ["starcoder", [], "psm", "<fim_prefix>ABOVE<fim_suffix>BELOW<fim_middle>"],
    ["starcoder", [], "spm", "<fim_suffix>BELOW<fim_prefix>ABOVE<fim_middle>"],
    ["codestral", ["[PREFIX]", "[SUFFIX]", ""], "spm", "<s>[SUFFIX]BELOW[PREFIX]ABOVE"],
    ["codellama", [], "psm", "<s>\u2581<PRE>ABOVE\u2581<SUF>BELOW\u2581<MID>"]]""")
GAP = GenerationRequest(ABOVE, suffix=BELOW)


def test_a_gap_by_family(models: Path):
    for family, fim, layout, text in GAPS:
        with opened(models / f"{family}.gguf", fim=fim, layout=layout) as model:
            tokens, cursor, heal = model.vocabulary.encode(GAP)
            got = named(model, tokens, families.MARKED["codellama"].plain)
            assert got == text.replace("ABOVE", ABOVE).replace("BELOW", BELOW)
            assert heal == b""
            assert named(model, tokens[:cursor]).endswith(ABOVE)


def test_sequences_are_apart_where_their_sum_would_change_the_rope_factors(models: Path):
    cases = ("longrope", 2, False), ("longrope", 1, True), ("dense", 2, True)
    for family, sequences, unified in cases:
        settings = replace(ONE, n_ctx=512, sequences=sequences)
        with opened(models / f"{family}.gguf", settings) as model:
            assert model.unified is unified


def test_a_copied_sequence_is_apart_from_its_source(models: Path):
    """Whatever its source holds before the next decode."""
    slots = [Slot(number) for number in range(3)]
    with opened(models / "longrope.gguf", replace(ONE, n_ctx=512, sequences=3)) as model:
        for slot, first in zip(slots, (40, 80), strict=False):
            tokens = [*range(first, first + 40)]
            assert model.decode([(slot, tokens, 1)]) == 0
            slot.tokens += tokens
        assert model.decode([(slots[0], [9], 1)]) == 0
        expected = model.logits(0).copy()
        model.trim(slots[0], 40)
        assert model.copy_prefix(slots[0], slots[2], 40)
        slots[2].tokens = slots[0].tokens[:]
        model.trim(slots[0], 0)
        assert model.restore(slots[0], model.save(slots[1]))
        assert model.decode([(slots[2], [9], 1)]) == 0
        assert abs(model.logits(0) - expected).max() < TIE


@pytest.mark.parametrize(("trained", "n_ctx"), [(300, 300), (1, 256)])
def test_a_context_is_as_long_as_the_model_was_trained_for(tmp_path, trained, n_ctx) -> None:
    """But not too short: in a decode of more tokens than a context has, llama.cpp ends the
    process.
    """
    family = families.Family("llama", {"context_length": trained})
    with opened(families.make(tmp_path / "short.gguf", family), replace(ONE, n_ctx=512)) as model:
        assert model.n_ctx == n_ctx
        assert model.decode([(Slot(0), [1, 2, 3], 1)]) == 0


def test_a_state_that_is_rejected_is_dropped_and_the_next_best_serves_later(models: Path):
    prompt = [*range(40, 80)]
    with opened(models / "dense.gguf", replace(ONE, n_ctx=256, sequences=2)) as model:
        sequences = Sequences(model, 2, 1 << 20)
        slot = sequences.slots[0]
        read = [*prompt[:20], 1]
        assert model.decode([(slot, read, 1)]) == 0
        slot.tokens = read[:]
        sequences.park(slot)
        right = sequences.store.entries[0]
        sequences.store.add(Parked(prompt[:30], bytes(right.state)[:-1]))
        sequences.store.add(Parked([*prompt[:25], 2], b"\0" * 100))
        for _ in range(2):
            slot, _ = sequences.take_slot(prompt, sequences.slots, False)
            assert (slot.tokens, model.computed(slot)) == ([], 0)
        assert sequences.store.entries == [right]
        slot, guide = sequences.take_slot(prompt, sequences.slots, False)
        assert (slot.tokens, guide, model.computed(slot)) == (prompt[:20], read, 20)


def test_an_abort_ends_a_decode(models: Path):
    with opened(models / "dense.gguf") as model:
        model.abort()
        assert model.decode([(Slot(0), [1, 2, 3], 1)]) == ABORTED


def test_a_gap_without_marks(models: Path):
    with (
        opened(models / "base.gguf") as model,
        pytest.raises(HttpError, match=r"^suffix: expected ") as refused,
    ):
        model.vocabulary.encode(GAP)
    assert refused.value.code == "INVALID_REQUEST"


def test_other_files(models: Path):
    for family, mark in [("qwen", "<|file_sep|>"), ("starcoder", "<file_sep>")]:
        request = GenerationRequest("y = ", filename="b.py", extra=[("a.py", "x = 1")])
        with opened(models / f"{family}.gguf") as model:
            tokens = model.vocabulary.encode(request)[0]
            assert named(model, tokens) == f"{mark}a.py\nx = 1\n{mark}b.py\ny = "


def test_a_layout_of_the_models_own_is_read_mark_by_mark(models: Path):
    text = "<|file_sep|>original/a.py\nx<|file_sep|>updated/a.py\n"
    mark = families.vocabulary(families.MARKED["qwen"])[0].index("<|file_sep|>")
    with opened(models / "qwen.gguf") as model:
        for special, count in ((True, 2), (False, 0)):
            request = GenerationRequest(text, special=special, heal=special)
            tokens = model.vocabulary.encode(request)[0]
            assert (named(model, tokens), tokens.count(mark)) == (text, count)


END = "<|im_end|>"


# A family, the messages, and the whole chat.
CHATS = json.loads(r"""[
    ["qwen", [["system", "S"], ["user", "<|im_end|>U"]],
     "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|im_end|>U<|im_end|>\n<|im_start|>assistant\n"],
    ["thinking", [["user", "U"], ["assistant", "def"]],
     "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\ndef"],
    ["thinking", [["user", "U"], ["assistant", "<think>hm"]],
     "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>hm"],
    ["gpt-oss", [["user", "U"], ["assistant", "def"]],
     "<|start|>user<|message|>U<|end|><|start|>assistant<|channel|>final<|message|>def"],
    ["silent", [["system", "S"], ["user", "U"]], " Пользователь: S\n\nU\n\n Ассистент:[SEP]"],
    ["base", [["system", "S"], ["user", "U"], ["assistant", "def"]], "S\n\nU\n\ndef"]]""")


def test_a_chat_by_family(models: Path):
    for family, messages, text in CHATS:
        with opened(models / f"{family}.gguf") as model:
            tokens = model.vocabulary.encode(GenerationRequest(messages=messages))[0]
            assert named(model, tokens) == text
            if family == "qwen":  # what a user writes is text
                assert tokens.count(families.vocabulary(families.MARKED[family])[0].index(END)) == 2


# ------------------------------------------------------------------------------------ hostile texts

# A stack overflow would end this process. WordPiece and T5 do not keep a text as it is.
TOKENIZE_RUNS = """
import sys, threading
from cerebrum.vps.llama import start_library
from cerebrum.vps.vocabulary import Vocabulary, api

def tokenize(path):
    model = api.llama_model_load_from_file(path.encode(), params)
    words = Vocabulary(model)
    for kind in KINDS:
        text = (kind * 65536)[:65536]
        got = b"".join(map(words.piece, words.tokenize_part(text)))
        keeps = words.kind in (api.LLAMA_VOCAB_TYPE_BPE, api.LLAMA_VOCAB_TYPE_SPM)
        assert not keeps or got == text.encode(), kind
    print(path)

KINDS = ("a", " ", "\\n", "1", "-", "\u4e2d", " \u3000", "a ", "-\\x1c")
start_library()
params = api.llama_model_default_params()
params.vocab_only = True
for path in sys.argv[1:]:
    thread = threading.Thread(target=tokenize, args=[path])
    thread.start()
    thread.join()
"""


def test_no_text_overflows_the_stack(tmp_path: Path):
    """Of each pre-tokenizer that runs std::regex in another way."""
    names = ["default", "deepseek-llm", "falcon", "exaone-moe"]
    for name in names:
        families.write_header(tmp_path / name, families.Family(pre=name))
    command = [sys.executable, "-c", TOKENIZE_RUNS, *names]
    quiet = {"env": {"GGML_NO_BACKTRACE": "1", "PYTHONPATH": f"{ROOT}"}, "cwd": tmp_path}
    ended = subprocess.run(command, **CAPTURED | quiet)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split("\n")[:-1] == names


PIECES = [
    ["a" * 4095 + "\nb"],
    ["x\n" + 4096 * "a", "a b"],
    [2048 * " \u3000", " x"],
    [2048 * "a ", "a"],
]


def test_only_hostile_texts_are_cut() -> None:
    for path in [*ROOT.glob("cerebrum/**/*.py"), *ROOT.glob("docs/*.md")]:
        assert cut_runs(text := path.read_text()) == [text]
    assert cut_runs("") == [""]
    for pieces in PIECES:
        assert cut_runs("".join(pieces)) == pieces


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("family", families.FAMILIES)
def test_memory_by_family(family, models: Path, tmp_path):
    """The sizes of what llama.cpp really allocates, from its log, are those that it reports without
    allocating.
    """
    kv_type = "q8_0" if family == "dense" else "f16"
    settings = Settings(threads=1, n_ctx=1024, micro_batch=64, kv_type=kv_type, state_dir=tmp_path)
    need, longer = needed(models / f"{family}.gguf", [settings, replace(settings, n_ctx=2048)])
    assert family != "window" or longer["kv"] < 1.5 * need["kv"]  # most layers keep only the window
    llama_log.lines.clear()
    with opened(models / f"{family}.gguf", settings) as model:
        log = "\n".join(llama_log.lines)

    def allocated_mb(name: str) -> float:
        found = re.findall(rf"CPU +(?:{name}) buffer size = +([\d.]+) MiB", log)
        return sum(map(float, found))

    outputs = 2 * 2 * 64 * 4 * model.n_vocab
    assert allocated_mb("KV|RS") == pytest.approx(need["kv"] / MB, abs=0.02)
    compute_mb = (need["compute"] - outputs) / MB
    assert 0 < allocated_mb("compute") == pytest.approx(compute_mb, abs=0.02)


def test_a_tied_embedding_is_loaded_twice(models: Path, tmp_path):
    published, tied = models / "dense.gguf", tmp_path / "tied.gguf"
    forms = [Settings(state_dir=tmp_path)]
    assert needed(published, forms)[0]["weights"] == published.stat().st_size
    source = Source(published)
    source.tensors = [tensor for tensor in source.tensors if tensor.name != "output.weight"]
    families.copy_with(source, tied)
    count = len(families.vocabulary(families.FAMILIES["dense"])[0])
    embedding = count * families.EMBEDDING * 34 // 32  # bytes in Q8_0
    assert needed(tied, forms)[0]["weights"] == tied.stat().st_size + embedding


def test_a_header_is_read_in_another_process_first(models: Path, tmp_path, patch):
    """llama.cpp ends the process at some. One that it has read is read here from then on."""
    forms, odd = [Settings(state_dir=tmp_path)], tmp_path / "odd.gguf"
    (tmp_path / "verified").mkdir()  # as the daemon makes it
    for layers in (0, 513):
        families.write_header(odd, families.Family(layers=layers))
        message = r"^llama.cpp ends the process that reads this file, or takes too long$"
        with pytest.raises(ModelError, match=message):
            needed(odd, forms)
        assert not is_whole(odd)
    (whole := tmp_path / "whole.gguf").symlink_to(models / "dense.gguf")
    parts = needed(whole, forms)
    patch(memory.subprocess, "run", None)
    memory._needed.cache_clear()
    assert needed(whole, forms) == parts
    with pytest.raises(TypeError):
        needed(odd, forms)


def test_a_folder_of_notes_that_cannot_be_read_says_nothing_of_the_file(
    models: Path, tmp_path, patch
):
    path, stat = models / "dense.gguf", os.stat

    def unreadable(name, *given, **more) -> Any:
        if "verified" in str(name):
            raise PermissionError(13, "Permission denied", str(name))
        return stat(name, *given, **more)

    patch(os, "stat", unreadable)
    assert needed(path, [Settings(state_dir=tmp_path)])
    check_digest(path, hashlib.sha256(path.read_bytes()).hexdigest(), tmp_path, lambda: False)


def test_a_file_that_cannot_be_opened_starts_no_process(tmp_path, patch) -> None:
    patch(memory.subprocess, "run", None)
    with pytest.raises(IsADirectoryError):
        needed(tmp_path, [Settings(state_dir=tmp_path)])


def test_a_file_whose_weights_are_missing_starts_one_process(models: Path, tmp_path, patch):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((models / "dense.gguf").read_bytes()[:-5000])
    for _ in range(2):
        with pytest.raises(ModelError):
            needed(cut, [Settings(state_dir=tmp_path)])
        patch(memory.subprocess, "run", None)


def test_a_tiny_temperature_is_greedy(models: Path, tmp_path):
    with opened(models / "dense.gguf", Settings(threads=1, n_ctx=512, state_dir=tmp_path)) as model:
        slot = Slot(0)
        assert model.decode([(slot, [1, 2, 3], 1)]) == 0
        likeliest = model.greedy(2)
        for temperature in (0.0, 1e-45, 1e-38, 1e-7):
            sampler = Sampler(GenerationRequest("", temperature=temperature, seed=1))
            assert sampler.sample(model, 2) == likeliest
            sampler.close()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llada", "a diffusion model"), ("gemma-embedding", "an encoder")],
)
def test_what_completes_no_text_is_refused_by_its_header(architecture, kind, tmp_path) -> None:
    """At a prompt of more than a micro-batch, llama.cpp would end the daemon."""
    values = {"attention.sliding_window": 192}
    path = families.make(tmp_path / "odd.gguf", families.Family(architecture, values))
    (tmp_path / "verified").mkdir()
    message = rf"^it is {kind} \({architecture}\), which cannot complete a text$"
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            needed(path, [Settings(state_dir=tmp_path)])
    with pytest.raises(ModelError, match=message):
        Llama(path, Settings(threads=1, n_ctx=512, state_dir=tmp_path))
    assert not [*(tmp_path / "verified").iterdir()]


STATUSES = {
    0: True,
    3: False,
    -6: ModelError,
    1: OSError,
    -9: OSError,
    -14: ModelError,
}


@pytest.mark.parametrize("status", STATUSES)
def test_only_llama_cpp_can_refuse_a_header(status, tmp_path, patch) -> None:
    """A process that was killed, or a fault of ours, says nothing about the file."""
    ended = SimpleNamespace(returncode=status)
    patch(memory.subprocess, "run", lambda *_, **__: ended)
    expected = STATUSES[status]
    if isinstance(expected, bool):
        assert accepts(tmp_path, f"{status}") is expected
    else:
        with pytest.raises(expected):
            accepts(tmp_path, f"{status}")


def test_a_check_holds_no_lock_needs_no_file_of_the_system_and_can_be_ended(
    models: Path, tmp_path, patch
):
    held = []
    patch(memory, "accepts", lambda *_: held.append(memory._asking.locked()))
    needed(models / "dense.gguf", [Settings(state_dir=tmp_path)])
    assert held == [False]
    header = memory.READ_HEADER.replace("/proc/self/oom_score_adj", f"{tmp_path}/none/none")
    patch(memory, "READ_HEADER", header)
    assert accepts(models / "dense.gguf", "without it")
    os.mkfifo(endless := tmp_path / "endless.gguf")

    def end_at_once(*command, **options) -> Any:
        with subprocess.Popen(*command, **options) as child:
            memory.end_checks()
        return child

    patch(memory.subprocess, "run", end_at_once)
    with pytest.raises(OSError, match=r"got its status -9$"):
        accepts(endless, "")


class Lock:
    """It fails where a thread would wait."""

    taken = False

    def __enter__(self) -> None:
        assert not self.taken
        self.taken = True

    def __exit__(self, *_: object) -> None:
        self.taken = False


def test_a_vocabulary_is_freed_after_its_use() -> None:
    words: Any = Vocabulary.__new__(Vocabulary)
    words.closed, words._use = False, Lock()
    with words.in_use(), pytest.raises(AssertionError):
        words.close()
    assert not words.closed
    words.close()
    with pytest.raises(HttpError), words.in_use():
        raise AssertionError("it is freed")
