"""`choose`: the samples that imitate models, and the choice among them."""

from __future__ import annotations

import contextlib
import fcntl
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from families import FAMILIES, make
from harness import ROOT, SHIPPED, disk_of

import vpsd
from cerebrum.vps import choose, encoding, llama
from cerebrum.vps.choose import Speed
from cerebrum.vps.encoding import DECODES, Timing
from cerebrum.vps.fetch import Bar
from cerebrum.vps.llama import ModelError, Settings, start_library

assert ROOT
DENSE = {"layers": 8, "width": 128, "heads": 4, "kv_heads": 2, "head": 64, "feed_forward": 512, "vocabulary": 4096,
         "experts": 0, "used": 0}  # fmt: skip
EXPERTS = {**DENSE, "width": 256, "feed_forward": 256, "experts": 4, "used": 2}


def types_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and the shape in weights of each matrix of a file."""
    found = {}
    for one in gguf.GGUFReader(path).tensors:
        if len(one.shape) > 1:
            found[one.name.removesuffix(".weight")] = (
                one.tensor_type.name,
                tuple(map(int, reversed(one.shape))),
            )
    return found


@pytest.mark.parametrize("shape", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_sample_is_a_part_of_the_model(
    shape: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp computes it. Its times become the whole model's, those of the faster types."""
    seen, times = list[dict[str, Any]](), iter([0.004, 0.005, 0.006, 0.003])
    real = encoding.opened

    @contextlib.contextmanager
    def opened(path: Path, settings: Settings) -> Iterator[Any]:
        seen.append(types_of(path))
        with real(path, settings) as model:
            assert set(encoding.measure(model, 8).decode) == set(DECODES)
            yield model

    monkeypatch.setattr(choose, "opened", opened)
    monkeypatch.setattr(
        choose, "measure", lambda model, read: Timing(next(times), dict.fromkeys(DECODES, 0.01))
    )
    monkeypatch.setattr(
        choose, "SAMPLE_WEIGHTS", 1
    )  # the least: two layers of eight, and so a quarter of the tokens
    monkeypatch.setattr(llama, "SPARE_DISK", 0)
    assert choose.predict(shape, Settings(), tmp_path) == Speed(25.0, 12.0)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.gguf"]
    published, same, tuned, _ = seen
    assert published == same
    small = shape is DENSE  # its rows of 128 are no multiple of 256
    q4, q6 = ("Q5_0", "Q8_0") if small else ("Q4_K", "Q6_K")
    keys, heads, width, forward = 128, 256, shape["width"], shape["feed_forward"]
    count, name = ((), "") if small else ((4,), "_exps")
    layer = {
        "attn_q": (q4, (heads, width)),
        "attn_k": (q4, (keys, width)),
        "attn_v": (q4, (keys, width)),
        "attn_output": ("Q4_K", (width, heads)),
        f"ffn_gate{name}": (q4, (*count, forward, width)),
        f"ffn_up{name}": (q4, (*count, forward, width)),
        f"ffn_down{name}": ("Q4_K", (*count, width, forward)),
        **({} if small else {"ffn_gate_inp": ("F32", (4, width))}),
    }
    better = layer | {
        "attn_v": (q6, (keys, width)),
        f"ffn_down{name}": ("Q6_K", (*count, width, forward)),
    }
    whole = {
        f"blk.{number}.{name}": one
        for number, part in enumerate((layer, better))
        for name, one in part.items()
    }
    assert published == whole | {
        "output": (q6, (1024, width)),
        "token_embd": ("F16", (1024, width)),
    }
    faithful = encoding.FAITHFUL
    assert tuned == {
        name: (faithful.get(kind, kind), size) for name, (kind, size) in published.items()
    }


def test_a_sample_has_enough_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does not stay in a CPU's cache; a small model is measured whole."""
    made, sizes = list[tuple[Any, int]](), dict[str, float]()
    monkeypatch.setattr(
        choose,
        "write_sample",
        lambda _path, _shape, weights, layers: made.append((weights, layers)),
    )
    monkeypatch.setattr(choose, "opened", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(choose, "measure", lambda *_: Timing(1.0, dict.fromkeys(DECODES, 1.0)))
    for model in SHIPPED:
        choose.predict(model.shape, Settings(), tmp_path)
        weights, layers = made[-2]  # in the published types
        sizes[model.id] = sum(math.prod(size) for _, _, size in weights)
        assert layers % 2 == 0 or layers == model.shape["layers"]
    assert all(choose.SAMPLE_WEIGHTS <= size < 1.3e9 for size in sizes.values()), sizes


# --------------------------------------------------------------------------------------- the choice

URL = '\nsources = [{kind = "url", url = "http://x"}]\n'
ENTRY = '[[models]]\nid = "{0}"\nname = "M"\nlanguages = {1}\nparameters = "{2}B"\nquantization = "Q4"\n'
ENTRY += 'file = "{0}.gguf"\nmemory_mb = {3}\nshape = {{layers = {2}, '
ENTRY += ", ".join(f"{name} = {value}" for name, value in list(DENSE.items())[1:]) + "}}\n"


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
SPEEDS = {3: Speed(30.0, 3.0), 7: Speed(8.0, 21.0), 2: Speed(10.0, 12.0), 1: Speed(24.0, 5.0)}
PREDICT = choose.predict


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
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

    def run(text: str, *options: str) -> tuple[int, str, str]:
        (tmp_path / "models.toml").write_text(text)
        status = vpsd.main(["choose", *options])
        out, err = capsys.readouterr()
        return (
            status,
            out,
            "".join(line for line in err.splitlines(True) if not line.startswith("measuring ")),
        )

    return run


def test_the_first_whose_hints_are_quick_enough_is_chosen(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that has a language more, nor the one that has few."""
    assert run(catalog(*MODELS)) == (0, TABLE.replace("\n  here ", "\n* here "), "")
    for seconds, chosen in (
        ("7.2", "slow"),
        ("7.1", "here"),
        ("1.5", "last"),
    ):  # of none the quickest
        monkeypatch.setenv("CEREBRUM_HINT_SECONDS", seconds)
        assert re.findall(r"^\* (\w+)", run(catalog(*MODELS))[1], re.M) == [chosen]


def test_a_tuning_begins_only_when_all_are_measured(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would spoil what was measured, and its samples take the disk."""
    (lock := tmp_path / "state/tuned/.lock").parent.mkdir(parents=True)
    begun, show = list[bool](), Bar.show

    def tune(bar: Bar, done: int, last: bool = False) -> None:
        show(bar, done, last)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(tuning, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun.append(last)

    monkeypatch.setattr(Bar, "show", tune)
    monkeypatch.setattr(choose, "predict", PREDICT)
    monkeypatch.setattr(choose, "write_sample", lambda *_: None)
    monkeypatch.setattr(choose, "opened", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(choose, "measure", lambda *_: Timing(0.01, dict.fromkeys(DECODES, 0.04)))
    with lock.open("w") as tuning:
        status, out, err = run(catalog(*MODELS))
    assert (status, re.findall(r"^(..\w+) .* 25\.0 .* 10\.0 s", out, re.M), err, begun) == (
        0, ["  few", "* slow", "  here", "  last"], "", [True]
    )  # fmt: skip


def test_choose_can_fetch(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = list[str]()
    monkeypatch.setattr(vpsd, "fetch_model", lambda model, _config: fetched.append(model.id))
    assert run(catalog(*MODELS), "--fetch")[0] == 0
    assert fetched == ["here"]
    status, out, err = run(catalog(*MODELS[:2]), "--fetch")
    assert (status, fetched, out.count("\n*")) == (1, ["here"], 0)
    assert err == "vpsd choose: expected a model for 15360 MB of memory, got none\n"


NOTHING = "vpsd choose: expected a speed for at least one model, got none\n"


def test_without_a_shape_a_model_has_no_speed(run: Any) -> None:
    bare = re.sub("shape = .*", "", catalog(MODELS[-1]))
    row = "  last           1B            0.9 GB         ?               ?        ?         ?"
    assert run(bare, "--fetch") == (1, f"{TABLE.splitlines()[0]}\n{row}\n", NOTHING)


def test_a_full_disk_measures_and_leaves_nothing(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "predict", PREDICT)
    with disk_of("1m", tmp_path / "state") as state:
        status, out, err = run(catalog(*MODELS[-3:]))
        assert sorted(path.name for path in state.rglob("*")) == [".lock", "tuned"]
    disk = rf"expected 10\d MB of free disk in {state}/tuned/\S+, got 1 MB\n"
    assert re.fullmatch(
        "".join(f"vpsd choose: {one[0]}: {disk}" for one in MODELS[-3:]) + NOTHING, err
    )
    assert (status, out.count("?"), "*" in out) == (1, 11, False)


def test_a_model_that_cannot_be_measured_is_named(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(shape: dict[str, int], *_: Any) -> Speed:
        if shape["layers"] == 2:
            raise ModelError("llama.cpp cannot load this file")
        return Speed(9.0, 1.0)

    monkeypatch.setattr(choose, "predict", fail)
    status, out, err = run(catalog(*MODELS[-2:]))
    assert (status, err) == (0, "vpsd choose: here: llama.cpp cannot load this file\n")
    assert [line[:6] for line in out.splitlines()[1:]] == ["  here", "* last"]
