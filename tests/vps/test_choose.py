"""`choose`: what samples say about models, and the choice among them."""

from __future__ import annotations

import fcntl
import json
import re
from typing import Any

import pytest
from families import FAMILIES, make
from harness import SHIPPED, disk_of

import vpsd
from cerebrum.vps import choose, encoding
from cerebrum.vps.choose import Speed, predict, weights_of
from cerebrum.vps.encoding import DECODES, FAITHFUL, Timing
from cerebrum.vps.gguf import SAMPLE_WEIGHTS
from cerebrum.vps.llama import Settings, start_library

DENSE = json.loads("""{
    "layers": 8, "width": 128, "heads": 4, "kv_heads": 2, "head": 64, "feed_forward": 512,
    "vocabulary": 4096, "experts": 0, "used": 0}""")
EXPERTS = {**DENSE, "width": 256, "feed_forward": 256, "experts": 8, "used": 2}
WEIGHTS = [
    # Rows of 128 are no multiple of 256.
    (DENSE, {"Q5_0": 8 * 128 * (256 + 128 + 64 + 2 * 512), "Q8_0": 128 * (4096 + 8 * 64),
             "Q4_K": 8 * 128 * (256 + 256), "Q6_K": 8 * 128 * 256}),
    (EXPERTS, {"Q4_K": 8 * 256 * (2 * 256 + 128 + 64 + 2 * 512 + 256),
               "Q6_K": 256 * (4096 + 8 * (64 + 256))}),
]  # fmt: skip


def test_the_weights_that_a_token_uses() -> None:
    for shape, weights in WEIGHTS:
        assert {kind: count for kind, count in weights_of(shape).items() if count} == weights


def test_the_size_of_a_published_file_follows_from_the_weights():
    """Of models whose layers are all of the kind that a shape describes."""
    bits = {"Q4_K": 4.5, "Q5_0": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
    for model in SHIPPED:
        if model.size and not model.id.startswith(("qwen35", "granite_h")):
            shape = {**model.shape, "used": model.shape["experts"]}
            found = weights_of(shape)
            found["Q4_K"] += shape["vocabulary"] * shape["width"]  # embeddings are only looked up
            size = sum(bits[kind] * count / 8 for kind, count in found.items())
            assert size == pytest.approx(model.size, rel=0.1), model.id


TYPES = {*FAITHFUL, *FAITHFUL.values()}


def timings(**seconds: float) -> dict[str, Timing]:
    """Of samples by their types, 1 s if nothing is said, to read a token and for each decode."""
    found = {}
    for kind in TYPES:
        spent = seconds.get(kind, 1.0)
        found[kind] = Timing(spent / 100, dict.fromkeys(DECODES, spent))
    return found


def test_a_prediction_counts_the_faster_types():
    samples = sum(weights_of(EXPERTS).values()) / SAMPLE_WEIGHTS
    # Of a prompt the last layer and the output matrix are not computed, in a sample neither.
    read = sum(weights_of({**EXPERTS, "layers": 7, "vocabulary": 0}).values()) / SAMPLE_WEIGHTS
    usual = Speed(1 / samples, 1.2 * 10 * read * 8 / 7)
    assert predict(EXPERTS, timings()) == pytest.approx(usual)
    assert predict(EXPERTS, timings(Q4_1=2.0, Q8_0=2.0)) == pytest.approx(usual)
    faster = Speed(2 * usual.rate, usual.wait / 2)
    assert predict(EXPERTS, timings(Q4_1=0.5, Q8_0=0.5)) == pytest.approx(faster)


@pytest.mark.slow
def test_llama_cpp_computes_a_sample_of_each_type(tmp_path, patch):
    patch(encoding, "MEASURE_SECONDS", 1e-9)
    patch(encoding, "SAMPLE_READ_TOKENS", 1)
    start_library()
    found = encoding.time_types(Settings(threads=1), tmp_path, lambda *_: None)
    assert all(timing.work > 0 for timing in found.values())
    assert found.keys() == TYPES
    assert not [*tmp_path.iterdir()]


# --------------------------------------------------------------------------------------- the choice

URL = 'sources = [{kind = "url", url = "http://x"}]\n'
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
{4}
"""
SHAPE = [f"{name} = {value}" for name, value in DENSE.items() if name != "layers"]
ENTRY = ENTRY.replace("SHAPE", ", ".join(SHAPE))


def catalog(*entries) -> str:
    return "".join(ENTRY.format(*entry).replace("URL", URL) for entry in entries)


# A model's id, its languages, its layers and billions of weights, its megabytes of memory, and its
# file's size and where that can be fetched. For the first other programs leave too little memory,
# the second is neither here nor at an address, the third serves fewer languages.
MODELS = json.loads(r"""[
    ["huge", ["c", "go"], 30, 20000, "URL"],
    ["away", ["c", "go"], 20, 0, ""],
    ["few", ["go"], 3, 100, "URL"],
    ["slow", ["c", "go"], 7, 5400, "size = 4_700_000_000\nURL"],
    ["here", ["c", "go"], 2, 0, ""],
    ["last", ["c", "go", "cobol"], 1, 900, "URL"]]""")
TABLE = """\
                               memory  tokens/s  first of 1,000     hint      file
  few            3B            0.1 GB      30.0           3.0 s    1.4 s         ?
  slow           7B            5.4 GB       8.0          21.0 s    7.2 s    4.7 GB
  here           2B            0.0 GB      10.0          12.0 s    4.8 s         ?
  last           1B            0.9 GB      24.0           5.0 s    2.0 s         ?
"""
SPEEDS = {
    3: Speed(30.0, 3.0),
    7: Speed(8.0, 21.0),
    2: Speed(10.0, 12.0),
    1: Speed(24.0, 5.0),
}
TIME_TYPES = vpsd.time_types


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Any:
    """`vpsd.py choose` with a models.toml, on a machine where a model's speed depends on its
    size.
    """
    memory = type("Memory", (), {"total": 64 << 30, "available": 16 << 30})
    monkeypatch.setattr(choose, "predict", lambda shape, _: SPEEDS[shape["layers"]])
    monkeypatch.setattr(vpsd, "time_types", lambda *_: {})
    monkeypatch.setattr(vpsd.psutil, "virtual_memory", memory)
    monkeypatch.setattr(vpsd, "wait_for_quiet", lambda: None)
    monkeypatch.setenv("CEREBRUM_STATE_DIR", f"{tmp_path}/state")
    monkeypatch.setenv("CEREBRUM_MODELS_FILE", f"{tmp_path}/models.toml")
    monkeypatch.setenv("CEREBRUM_MODELS_DIR", f"{tmp_path}")
    start_library()  # which keeps llama.cpp's log off stderr
    make(tmp_path / "here.gguf", FAMILIES["dense"])

    def run(text, *options):
        (tmp_path / "models.toml").write_text(text)
        status = vpsd.main(["choose", *options])
        return status, *capsys.readouterr()

    return run


def test_the_first_whose_hints_are_quick_enough_is_chosen(run, monkeypatch):
    """Not the one that has a language more, nor the one that has few."""
    assert run(catalog(*MODELS)) == (0, TABLE.replace("\n  here ", "\n* here "), "")
    for seconds, chosen in {"7.2": "slow", "7.1": "here", "1.5": "last"}.items():
        monkeypatch.setenv("CEREBRUM_HINT_SECONDS", seconds)  # of none the quickest
        _, out, _ = run(catalog(*MODELS))
        assert re.findall(r"^\* (\w+)", out, re.M) == [chosen]


def test_a_file_that_cannot_be_checked_is_left_out(run, patch):
    def killed(_):
        raise OSError("it was killed")

    patch(vpsd, "is_whole", killed)
    status, out, err = run(catalog(*MODELS[3:]))
    assert (status, re.findall(r"^[* ] (\w+)", out, re.M)) == (0, ["slow", "last"])
    assert err == "vpsd choose: here: it was killed\n"


def test_nothing_is_measured_while_a_model_is_tuned(run, tmp_path):
    lock = tmp_path / "state/tuned/.lock"
    lock.parent.mkdir(parents=True)
    busy = "vpsd choose: another process is tuning a model; expected to be the only one\n"
    with lock.open("w") as tuning:
        fcntl.flock(tuning, fcntl.LOCK_EX)
        assert run(catalog(*MODELS)) == (1, "", busy)


def test_choose_can_fetch(run, tmp_path, patch):
    fetched = []
    patch(vpsd, "fetch_model", lambda model, _config: fetched.append(model.id))
    assert run(catalog(*MODELS), "--fetch")[0] == 0
    assert fetched == ["here"]
    status, out, err = run(catalog(*MODELS[:2]), "--fetch")
    assert (status, fetched, out.count("\n*")) == (1, ["here"], 0)
    assert err == "vpsd choose: expected a model for 15360 MB of memory, got none\n"


NOTHING = "vpsd choose: expected a speed for at least one model, got none\n"


def test_without_a_shape_a_model_has_no_speed(run):
    bare = re.sub("shape = .*", "", catalog(MODELS[-1]))
    row = "  last           1B            0.9 GB         ?               ?        ?         ?"
    assert run(bare, "--fetch") == (1, f"{TABLE.splitlines()[0]}\n{row}\n", NOTHING)


def test_a_full_disk_measures_and_leaves_nothing(run, tmp_path, patch):
    patch(vpsd, "time_types", TIME_TYPES)
    with disk_of("1m", tmp_path / "state") as state:
        status, out, err = run(catalog(*MODELS))
        assert sorted(path.name for path in state.rglob("*")) == [".lock", "tuned"]
    disk = rf"vpsd choose: expected 2\d\d MB of free disk in {state}/tuned/\S+, got 1 MB\n"
    assert re.fullmatch(disk, err)
    assert (status, out) == (1, "")
