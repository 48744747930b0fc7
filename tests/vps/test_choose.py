"""`choose`: the samples that imitate models, and the choice among them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from families import FAMILIES, make
from harness import SHIPPED, disk_of

import vpsd
from cerebrum.vps import choose, encoding, llama
from cerebrum.vps.choose import Speed
from cerebrum.vps.encoding import DECODES, Timing
from cerebrum.vps.fetch import Bar
from cerebrum.vps.llama import ModelError, Settings, start_library

DENSE = {
    "layers": 8,
    "width": 128,
    "heads": 4,
    "kv_heads": 2,
    "head": 64,
    "feed_forward": 512,
    "vocabulary": 4096,
    "experts": 0,
    "used": 0,
}
EXPERTS = {**DENSE, "width": 256, "feed_forward": 256, "experts": 4, "used": 2}


def script_times(patch: pytest.MonkeyPatch, reads: Iterator[float], decode: float) -> None:
    """The samples' seconds for a token that is read, and for a decode."""
    decodes = dict.fromkeys(DECODES, decode)
    patch.setattr(choose, "measure", lambda *_: Timing(next(reads), decodes))


def without_samples(patch: pytest.MonkeyPatch, write: Any) -> None:
    patch.setattr(choose, "write_sample", write)
    patch.setattr(choose, "opened", lambda *_: contextlib.nullcontext())


def types_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and the shape in weights of each matrix of a file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            shape = tuple(map(int, reversed(tensor.shape)))
            found[tensor.name.removesuffix(".weight")] = (tensor.tensor_type.name, shape)
    return found


# The types and shapes of the published matrices, one per layer of a sample.
DENSE_LAYER = {
    "attn_q": ("Q5_0", (256, 128)),  # rows of 128 are no multiple of 256
    "attn_k": ("Q5_0", (128, 128)),
    "attn_v": ("Q5_0", (128, 128)),
    "attn_output": ("Q4_K", (128, 256)),
    "ffn_gate": ("Q5_0", (512, 128)),
    "ffn_up": ("Q5_0", (512, 128)),
    "ffn_down": ("Q4_K", (128, 512)),
}
EXPERTS_LAYER = {
    "attn_q": ("Q4_K", (256, 256)),
    "attn_k": ("Q4_K", (128, 256)),
    "attn_v": ("Q4_K", (128, 256)),
    "attn_output": ("Q4_K", (256, 256)),
    "ffn_gate_exps": ("Q4_K", (4, 256, 256)),
    "ffn_up_exps": ("Q4_K", (4, 256, 256)),
    "ffn_down_exps": ("Q4_K", (4, 256, 256)),
    "ffn_gate_inp": ("F32", (4, 256)),
}
SAMPLES = [
    (DENSE, DENSE_LAYER, "Q8_0", "ffn_down"),
    (EXPERTS, EXPERTS_LAYER, "Q6_K", "ffn_down_exps"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layer", "better", "down"), SAMPLES, ids=["dense", "experts"])
def test_a_sample_is_a_part_of_the_model(shape, layer, better, down, tmp_path, monkeypatch):
    """llama.cpp computes it. Its times become the whole model's, those of the faster types."""
    seen = []
    times = iter([0.004, 0.005, 0.006, 0.003])
    real = encoding.opened

    @contextlib.contextmanager
    def opened(path, settings):
        seen.append(types_of(path))
        with real(path, settings) as model:
            assert set(encoding.measure(model, 8).decode) == set(DECODES)
            yield model

    monkeypatch.setattr(choose, "opened", opened)
    script_times(monkeypatch, times, 0.01)
    # The least: two layers of eight, and so a quarter of the tokens.
    monkeypatch.setattr(choose, "SAMPLE_WEIGHTS", 1)
    monkeypatch.setattr(llama, "SPARE_DISK", 0)
    decode = dict.fromkeys(DECODES, 0.04)
    assert choose.predict(shape, Settings(), tmp_path) == Speed(25.0, 12.0, decode)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.gguf"]
    published, same, tuned, _ = seen
    assert published == same
    tokens = (1024, shape["width"])
    expected = {"output": (better, tokens), "token_embd": ("F16", tokens)}
    expected |= {f"blk.0.{name}": matrix for name, matrix in layer.items()}
    expected |= {f"blk.1.{name}": matrix for name, matrix in layer.items()}
    expected["blk.1.attn_v"] = (better, layer["attn_v"][1])
    expected[f"blk.1.{down}"] = ("Q6_K", layer[down][1])
    assert published == expected
    for name, (kind, size) in published.items():
        assert tuned.pop(name) == (encoding.FAITHFUL.get(kind, kind), size)
    assert not tuned


def test_a_sample_has_enough_weights(tmp_path, monkeypatch):
    """So that it does not stay in a CPU's cache; a small model is measured whole."""
    made = []
    without_samples(monkeypatch, lambda _path, _shape, *sample: made.append(sample))
    script_times(monkeypatch, itertools.repeat(1.0), 1.0)
    for model in SHIPPED:
        choose.predict(model.shape, Settings(), tmp_path)
        weights, layers, _ = made[-2]
        assert choose.SAMPLE_WEIGHTS <= sum(math.prod(size) for _, _, size in weights) < 1.3e9
        assert layers % 2 == 0 or layers == model.shape["layers"]


# --------------------------------------------------------------------------------------- the choice

URL = '\nsources = [{kind = "url", url = "http://x"}]\n'
ENTRY = """
[[models]]
id = "{0}"
name = "M"
languages = {1}
parameters = "{2}B"
quantization = "Q4"
file = "{0}.gguf"
memory_mb = {3}
shape = {{layers = {2}, SHAPE}}
"""
SHAPE = [f"{name} = {value}" for name, value in DENSE.items() if name != "layers"]
ENTRY = ENTRY.replace("SHAPE", ", ".join(SHAPE))


def catalog(*entries: tuple[str, str, int, int, str]) -> str:
    return "".join(ENTRY.format(*entry) + entry[4] for entry in entries)


MODELS = (
    ("huge", '["c", "go"]', 30, 20_000, URL),  # other programs leave too little memory
    ("away", '["c", "go"]', 20, 0, ""),  # neither here nor at an address
    ("few", '["go"]', 3, 100, URL),  # serves fewer languages
    ("slow", '["c", "go"]', 7, 5400, "size = 4_700_000_000" + URL),
    ("here", '["c", "go"]', 2, 0, ""),
    ("last", '["c", "go", "cobol"]', 1, 900, URL),
)
TABLE = """\
                               memory  tokens/s  first of 1,000     hint      file
  few            3B            0.1 GB      30.0           3.0 s    1.4 s         ?
  slow           7B            5.4 GB       8.0          21.0 s    7.2 s    4.7 GB
  here           2B            0.0 GB      10.0          12.0 s    4.8 s         ?
  last           1B            0.9 GB      24.0           5.0 s    2.0 s         ?
"""
SPEEDS = {
    3: Speed(30.0, 3.0, {}),
    7: Speed(8.0, 21.0, {}),
    2: Speed(10.0, 12.0, {}),
    1: Speed(24.0, 5.0, {}),
}
PREDICT = choose.predict


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Any:
    """`vpsd.py choose` with a models.toml, on a machine where a model's speed depends on its
    size.
    """
    memory = type("Memory", (), {"total": 64 << 30, "available": 16 << 30})
    monkeypatch.setattr(choose, "predict", lambda shape, *_: SPEEDS[shape["layers"]])
    monkeypatch.setattr(vpsd.psutil, "virtual_memory", memory)
    monkeypatch.setattr(vpsd, "wait_for_quiet", lambda: None)
    monkeypatch.setenv("CEREBRUM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("CEREBRUM_MODELS_FILE", str(tmp_path / "models.toml"))
    monkeypatch.setenv("CEREBRUM_MODELS_DIR", str(tmp_path))
    start_library()  # which keeps llama.cpp's log off stderr
    make(tmp_path / "here.gguf", FAMILIES["dense"])

    def run(text, *options):
        (tmp_path / "models.toml").write_text(text)
        status = vpsd.main(["choose", *options])
        out, err = capsys.readouterr()
        return status, out, re.sub("^measuring .*\n", "", err, flags=re.M)

    return run


def test_the_first_whose_hints_are_quick_enough_is_chosen(run, monkeypatch):
    """Not the one that has a language more, nor the one that has few."""
    assert run(catalog(*MODELS)) == (0, TABLE.replace("\n  here ", "\n* here "), "")
    for seconds, chosen in {"7.2": "slow", "7.1": "here", "1.5": "last"}.items():
        monkeypatch.setenv("CEREBRUM_HINT_SECONDS", seconds)  # of none the quickest
        _, out, _ = run(catalog(*MODELS))
        assert re.findall(r"^\* (\w+)", out, re.M) == [chosen]


def test_a_tuning_begins_only_when_all_are_measured(run, tmp_path, monkeypatch):
    """It would spoil what was measured, and its samples take the disk."""
    lock = tmp_path / "state/tuned/.lock"
    lock.parent.mkdir(parents=True)
    begun = []
    show = Bar.show

    def tune(bar, done, last=False):
        show(bar, done, last)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(tuning, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun.append(last)

    monkeypatch.setattr(Bar, "show", tune)
    monkeypatch.setattr(choose, "predict", PREDICT)
    without_samples(monkeypatch, lambda *_: None)
    script_times(monkeypatch, itertools.repeat(0.01), 0.04)
    with lock.open("w") as tuning:
        status, out, err = run(catalog(*MODELS))
    assert (status, err, begun) == (0, "", [True])
    measured = re.findall(r"^(..\w+) .* 25\.0 .* 10\.0 s", out, re.M)
    assert measured == ["  few", "* slow", "  here", "  last"]


def test_choose_can_fetch(run, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(vpsd, "fetch_model", lambda model, _config: fetched.append(model.id))
    assert run(catalog(*MODELS), "--fetch")[0] == 0
    assert fetched == ["here"]
    status, out, err = run(catalog(*MODELS[:2]), "--fetch")
    assert (status, fetched, out.count("\n*")) == (1, ["here"], 0)
    assert err == "vpsd choose: expected a model for 15360 MB of memory, got none\n"


DRAFTED = {
    7: Speed(2.0, 21.0, {1: 0.5, 4: 0.6, 16: 0.9}),
    1: Speed(24.0, 5.0, {1: 1 / 24, 4: 0.1, 16: 0.2}),
}
SLOW_ROW = "  slow           7B            5.4 GB       {0}          21.0 s   {1} s    4.7 GB"


def test_drafts_count_as_usual(run, monkeypatch):
    monkeypatch.setattr(choose, "predict", lambda shape, *_: DRAFTED[shape["layers"]])
    pair = catalog(MODELS[-3], MODELS[-1])
    pair = pair.replace('id = "slow"', 'id = "slow"\ndraft = "last"')
    assert [run(pair)[1].splitlines()[row] for row in (1, -1)] == [
        SLOW_ROW.format("5.6", " 8.5"),
        "slow: with the drafts of last, if as many are right as usual",
    ]
    monkeypatch.setenv("CEREBRUM_DRAFT", "0")
    assert run(pair)[1].splitlines()[1] == SLOW_ROW.format("2.0", "16.2")


NOTHING = "vpsd choose: expected a speed for at least one model, got none\n"


def test_without_a_shape_a_model_has_no_speed(run):
    bare = re.sub("shape = .*", "", catalog(MODELS[-1]))
    row = "  last           1B            0.9 GB         ?               ?        ?         ?"
    assert run(bare, "--fetch") == (1, f"{TABLE.splitlines()[0]}\n{row}\n", NOTHING)


def test_a_full_disk_measures_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "predict", PREDICT)
    with disk_of("1m", tmp_path / "state") as state:
        status, out, err = run(catalog(*MODELS[-3:]))
        assert sorted(path.name for path in state.rglob("*")) == [".lock", "tuned"]
    disk = rf"expected 10\d MB of free disk in {state}/tuned/\S+, got 1 MB\n"
    lines = [f"vpsd choose: {id}: {disk}" for id, *_ in MODELS[-3:]]
    assert re.fullmatch("".join(lines) + NOTHING, err)
    assert (status, out.count("?"), "*" in out) == (1, 11, False)


def test_a_model_that_cannot_be_measured_is_named(run, monkeypatch):
    def fail(shape, *_):
        if shape["layers"] == 2:
            raise ModelError("llama.cpp cannot load this file")
        return Speed(9.0, 1.0, {})

    monkeypatch.setattr(choose, "predict", fail)
    status, out, err = run(catalog(*MODELS[-2:]))
    assert (status, err) == (0, "vpsd choose: here: llama.cpp cannot load this file\n")
    assert [line[:6] for line in out.splitlines()[1:]] == ["  here", "* last"]
