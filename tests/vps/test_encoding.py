"""Tuning: what is tried, chosen, written, and used. Times are scripted here; the slow tests
measure.
"""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import llama_cpp
import pytest
from harness import FILES, ROOT, command_of, disk_of
from harness import settings as daemon_settings

import vpsd as backend
from cerebrum.settings import Environment
from cerebrum.vps import encoding
from cerebrum.vps.encoding import (
    DECODES,
    FAITHFUL,
    MIN_GAIN,
    Passport,
    Timing,
    TunedFile,
    TuneError,
    comparison,
    find_tuned,
    passport_path,
    tune,
    tuned_path,
)
from cerebrum.vps.gguf import Source
from cerebrum.vps.llama import MB, Settings, Slot, start_library
from cerebrum.vps.memory import file_stamp

MODEL = FILES["qwen_0_5b"]
ROOM = 4 << 30
NO_FLASH = 100_000  # bytes of memory more without flash attention
NONE = None, "there is no tuned file"
TYPES = {*FAITHFUL, *FAITHFUL.values()}
FASTER = {"Q5_0": 3.0, "Q8_0": 1.0, "Q4_K": 2.0, "Q4_1": 1.0, "Q6_K": 2.0}
Whole = Callable[[bool, Settings], float]  # a whole file's seconds: whether it is tuned


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return families.write_quantized(tmp_path_factory.mktemp("models") / "m.gguf")


def timing(seconds: float) -> Timing:
    return Timing(seconds, dict.fromkeys(DECODES, seconds))


def half(is_tuned: bool, _used: Settings) -> float:
    return 0.5 if is_tuned else 1.0


def quiet(*_) -> None:
    pass


@dataclass
class Lab:
    """A published file, and a machine whose times are scripted."""

    published: Path
    settings: Settings
    patch: Any

    def script(self, costs: Mapping[str, float], whole: Whole = half) -> list[Sequence[Any]]:
        """Let samples have these seconds, by type. Returns the variants of each comparison."""
        compared = []

        def compare(variants: Sequence[Any], _report) -> list[Timing]:
            compared.append(variants)
            return [timing(whole(path.name == "tuned", used)) for path, used in variants]

        samples = {kind: timing(costs[kind]) for kind in TYPES}
        self.patch(encoding, "time_types", lambda *_: samples)
        self.patch(encoding, "compare", compare)
        return compared

    def tune(self, room: int = ROOM, report=quiet, **more) -> Passport:
        more = {"output": io.StringIO()} | more
        return tune(self.published, "abc", self.settings, room, report, **more)

    @property
    def path(self) -> Path:
        """Where the tuned file is written."""
        return tuned_path(self.settings.state_dir, self.published)

    def found(self) -> tuple[TunedFile | None, str]:
        return find_tuned(self.published, self.settings)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.glob("*") if path.name != ".lock")


@pytest.fixture
def lab(published, tmp_path, patch) -> Lab:
    def needed(path, forms):
        weights = path.stat().st_size
        return [
            {"weights": weights, "compute": NO_FLASH * (not form.flash_attention)} for form in forms
        ]

    patch(encoding, "needed", needed)  # llama.cpp cannot load the file
    settings = Settings(threads=2, state_dir=tmp_path / "state", fixed_threads=True)
    lab = Lab(published, settings, patch)
    lab.script(FASTER)
    return lab


# --------------------------------------------------------------------------------------- the choice


def test_the_faster_types_are_written(lab):
    compared = lab.script(FASTER)
    reported = []
    passport = lab.tune(report=lambda *step: reported.append(step))
    (files,) = compared
    plain = replace(lab.settings, flash_attention=False)
    assert [used for _, used in files] == [lab.settings, lab.settings, plain]
    assert files[0][0] == lab.published != files[1][0] == files[2][0]
    expected = PASSPORT | {"flash_attention": True, "types": FAITHFUL}
    expected |= {"file": file_stamp(lab.published), "size": lab.path.stat().st_size}
    expected |= {"published": [1.0] * 3, "here": [0.5] * 3}
    assert json.loads(passport_path(lab.path).read_text()) == expected
    assert passport._asdict() == expected
    types = {tensor.name: tensor.type for tensor in Source(lab.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q4_1"
    assert lab.left() == ["m.gguf", "m.gguf.json"]
    assert reported == [("writing", done, len(types)) for done in range(1, len(types) + 1)]


FASTEST = "tuned: Q4_K to Q4_1, Q5_0 to Q8_0, Q6_K to Q8_0"
HARDLY = 1 - MIN_GAIN + 0.001
USUAL = {**FASTER, "Q5_0": 1.0, "Q4_K": 1.0, "Q6_K": 1.0}
CHOICES: list[tuple[Mapping[str, float], Whole, str, bool]] = [
    (FASTER, half, FASTEST, True),
    ({**FASTER, "Q4_1": 2.0}, half, "tuned: Q5_0 to Q8_0, Q6_K to Q8_0", True),
    (FASTER, lambda is_tuned, used: 0.9 - 0.1 * (not used.flash_attention), FASTEST, False),
    # What samples promise must hold for the whole.
    (FASTER, lambda is_tuned, _: 1.1 if is_tuned else 1.0, "published", True),
    (FASTER, lambda is_tuned, _: HARDLY if is_tuned else 1.0, "published", True),
    ({**USUAL, "Q8_0": HARDLY, "Q4_1": HARDLY}, half, "published", True),  # not worth a file
    (USUAL, lambda _, used: 1.0 if used.flash_attention else 0.9, "published", False),
]


@pytest.mark.parametrize(("costs", "whole", "chosen", "flash"), CHOICES)
def test_what_is_chosen_is_found(lab, costs, whole, chosen, flash):
    lab.script(costs, whole)
    assert lab.found() == NONE
    passport = lab.tune(output=(printed := io.StringIO()))
    is_tuned = chosen != "published"
    assert (passport.source, passport.encoding) == ("abc", chosen)
    settings = replace(lab.settings, flash_attention=flash)
    used = TunedFile(lab.path if is_tuned else lab.published, settings, passport)
    assert find_tuned(lab.published, lab.settings, "abc") == (used, "")
    assert lab.left() == [*(["m.gguf"] if is_tuned else []), "m.gguf.json"]
    nothing = "nothing is 3% faster here than the published file, which is used as it is"
    pays = passport.here != passport.published
    assert pays == (nothing not in printed.getvalue()) == (is_tuned or not flash)
    other = None, "it was tuned for source abc, here it is def"
    assert find_tuned(lab.published, lab.settings, "def") == other
    assert encoding.remove_tuned(lab.published, lab.settings) == is_tuned
    # So that nothing tunes it again.
    kept = passport._replace(types={}, here=passport.published)
    assert lab.found() == (TunedFile(lab.published, settings, kept), "")
    assert lab.left() == ["m.gguf.json"]
    assert not encoding.remove_tuned(lab.published, lab.settings)


def test_what_does_not_fit_into_memory_is_not_tried(lab):
    compared = lab.script(FASTER)
    size = lab.tune().size
    published = lab.published.stat().st_size
    tried = []
    for room in (size + NO_FLASH, size + 1000, size - 1000, published + 1000):
        is_tuned = lab.tune(room).size > published
        tried.append((len(compared[-1]), is_tuned))
    assert tried == [(3, True), (2, True), (2, False), (1, False)]
    message = r"expected \d+ MB of memory beside the reserve, got \d+ MB"
    with pytest.raises(TuneError, match=message):
        lab.tune(published - MB)


def test_more_threads_are_tried_unless_the_user_chose(lab):
    lab.patch(encoding, "cpus", lambda: 4)
    lab.script(FASTER, lambda _, used: 0.8 if used.threads == 4 else 1.0)
    assert lab.tune().threads == 2
    free = replace(lab, settings=replace(lab.settings, fixed_threads=False))
    assert (free.tune().threads, free.found()[0].settings.threads) == (4, 4)
    assert lab.found() == (None, "it was tuned for threads 4, here it is 2")


TABLE = """
                                   published        here
a token of a prompt, ms                  4.0         1.0  4.00 x
a decode of 1, ms                       30.0        20.0  1.50 x
a decode of 4, ms                       50.0        25.0  2.00 x
a decode of 16, ms                     100.0        50.0  2.00 x
1000 tokens read, 128 written, ms     6520.0      2580.0  2.53 x"""


def test_the_table():
    before = Timing(0.004, {1: 0.03, 4: 0.05, 16: 0.1})
    after = Timing(0.001, {1: 0.02, 4: 0.025, 16: 0.05})
    table = comparison(Passport(**PASSPORT), before, after)
    head = f"{encoding.cpu_name()}; tuned: Q5_0 to Q8_0; flash attention off, threads: 2"
    assert table == f"{head}\n{TABLE}"


# ----------------------------------------------------------------------------- what must not happen


def test_the_figures_are_printed_before_the_file_is_used_and_a_dry_run_changes_nothing(lab):
    assert lab.tune(dry_run=True).types
    assert lab.left() == []
    output, printed = io.StringIO(), []
    lab.patch(os, "replace", lambda *_: printed.append(output.getvalue()))
    lab.tune(output=output)
    assert printed[0] == output.getvalue() != ""


def test_too_little_disk_is_reported_with_the_figures(lab):
    compared = lab.script(FASTER)
    lab.patch(shutil, "disk_usage", lambda _path: SimpleNamespace(free=MB))
    with pytest.raises(OSError, match=r"expected 1\d\d MB of free disk in .*tuned\S*, got 1 MB"):
        lab.tune()
    assert (compared, lab.left()) == ([], [])


def test_a_disk_that_is_full_at_the_end_is_as_before(lab, tmp_path):
    class Filler(io.StringIO):
        """The table is printed when the tuned file is written, but not yet in place."""

        def write(self, _text):
            with (tmp_path / "disk/other").open("wb") as other:
                os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(tmp_path / "disk").free)
            return 0

    with disk_of("200m", tmp_path / "disk") as disk:
        full = replace(lab, settings=replace(lab.settings, state_dir=disk))
        with pytest.raises(OSError, match="No space left on device"):
            full.tune(output=Filler())
        assert full.left() == []


def test_what_a_killed_run_left_is_removed(lab):
    left = lab.path.parent / ".work-abc/tuned"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert lab.found() == NONE
    lab.tune()
    assert lab.left() == ["m.gguf", "m.gguf.json"]


# ------------------------------------------------------------------------------------- what is used

PASSPORT = {
    "source": "abc",
    "library": llama_cpp.__version__,
    "cpu": encoding.cpu_features(),
    "cpus": len(os.sched_getaffinity(0)),
    "threads": 2,
    "flash_attention": False,
    "types": {"Q5_0": "Q8_0"},
    "file": "10.20",
    "size": 4,
}
ELSEWHERE = {"library": "0.0.1", "cpu": "z80", "cpus": 99, "threads": 3}
INCOMPLETE = "its tuned file is missing or cut short"
NO_PASSPORT = "its passport cannot be read"


PASSPORTS = [
    ({}, ""),
    ({"micro_batch": 128}, ""),  # which an older version wrote
    (b"", NO_PASSPORT),
    (b"[]", NO_PASSPORT),
    (b"\xff", NO_PASSPORT),
    (None, "there is no tuned file"),
    ({"size": 5}, INCOMPLETE),
    ({"size": 5, "types": {}}, ""),
    ("a folder", NO_PASSPORT),
]
for name, there in ELSEWHERE.items():
    differs = f"it was tuned for {name} {there}, here it is {PASSPORT[name]}"
    PASSPORTS.append(({name: there}, differs))


@pytest.mark.parametrize(("change", "reason"), PASSPORTS)
def test_a_tuned_file_is_used_only_where_it_was_made(lab, change, reason):
    passport = passport_path(lab.path)
    passport.parent.mkdir(parents=True)
    lab.path.write_bytes(b"GGUF")
    if isinstance(change, str):
        passport.mkdir()
    elif isinstance(change, bytes):
        passport.write_bytes(change)
    elif change is not None:
        passport.write_text(json.dumps(PASSPORT | change))
    found, why = find_tuned(lab.published, lab.settings, "abc")
    assert (found is None, why) == (bool(reason), reason)


def test_a_file_that_is_replaced_or_gone_is_untuned(lab, tmp_path):
    """Whatever its content is, if no sha256 is known. So it is tuned again, and no load reads all
    of it in vain.
    """
    copied = replace(lab, published=shutil.copy(lab.published, tmp_path / "m.gguf"))
    copied.tune()
    assert copied.found()[1] == ""
    before = file_stamp(copied.published)
    shutil.copy(lab.published, tmp_path / "new")
    os.replace(tmp_path / "new", copied.published)
    after = file_stamp(copied.published)
    assert copied.found() == (None, f"it was tuned for file {before}, here it is {after}")
    assert find_tuned(copied.published, copied.settings, "abc")[1] == ""
    copied.path.unlink()
    assert find_tuned(copied.published, copied.settings, "abc") == (None, INCOMPLETE)


# ----------------------------------------------------------------------------------- the real thing


def vpsd(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = daemon_settings(home, CEREBRUM_MODELS_DIR=f"{MODEL.parent}", **more)
    command = [*command_of("vpsd"), *arguments]
    return subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, timeout=600
    )


def test_the_command_tells_what_is_wrong(tmp_path):
    missing = vpsd(tmp_path, "tune", "codellama_7b")
    assert (missing.returncode, missing.stdout) == (1, "")
    expected = f"vpsd tune: expected the file {MODEL.parent}/codellama-7b.Q4_K_M.gguf; "
    assert missing.stderr.startswith(expected)
    nothing = vpsd(tmp_path, "tune", "qwen_0_5b", "--remove")
    assert nothing.returncode == 0
    assert nothing.stdout == "qwen_0_5b: no tuned file, nothing to remove\n"


def test_a_busy_machine_is_not_measured(patch, tmp_path):
    loads = iter([80.0] * backend.QUIET_SECONDS)
    patch(backend.psutil, "cpu_percent", lambda _seconds: next(loads))
    given = {"CEREBRUM_MODELS_FILE": f"{ROOT}/models.toml"}
    given["CEREBRUM_MODELS_DIR"] = f"{MODEL.parent}"
    config = backend.load_config(Environment(given))
    message = "expected other programs to use at most 25 % of the CPU, got 80 %"
    with pytest.raises(TuneError, match=message):
        backend.tune_model(config.models[-1], config, sys.stdout)
    assert list(loads) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_llama_cpp_measures_each_family(family, tmp_path, patch):
    """Also one that cannot be cut."""
    patch(encoding, "MEASURE_SECONDS", 1e-9)
    patch(encoding, "time_types", lambda *_: {kind: timing(1.0) for kind in TYPES})
    start_library()
    model = families.make(tmp_path / "m.gguf", families.FAMILIES[family])
    # Two threads would mostly wait, where another test runs at the same time.
    settings = Settings(threads=1, state_dir=tmp_path / "state", fixed_threads=True)
    tune(model, "abc", settings, ROOM, quiet, io.StringIO())
    assert find_tuned(model, settings)[0]


@pytest.mark.alone
@pytest.mark.slow
def test_a_real_model_is_tuned_once_and_says_the_same(tmp_path):
    settings = Settings(state_dir=tmp_path / "state")
    # It is fetched all the same.
    too_large = vpsd(tmp_path, "fetch", "qwen_0_5b", CEREBRUM_MIN_FREE_MB="1000000")
    assert "vpsd fetch: qwen_0_5b was not tuned: expected " in too_large.stderr
    for plain in (too_large, vpsd(tmp_path, "fetch", "--no-tune", "qwen_0_5b")):
        assert (plain.returncode, plain.stdout) == (0, f"{MODEL}\n")
        assert find_tuned(MODEL, settings) == NONE
    tuned = vpsd(tmp_path, "fetch", "qwen_0_5b")
    assert (tuned.returncode, tuned.stdout) == (0, f"{MODEL}\n")
    assert "a token of a prompt, ms" in tuned.stderr
    again = vpsd(tmp_path, "fetch", "qwen_0_5b")
    assert "qwen_0_5b: measuring" not in again.stderr
    found, reason = find_tuned(MODEL, settings)
    assert found, reason
    if found.path == MODEL:
        return  # on this CPU nothing is faster
    start_library()
    expected, got = (likeliest(*variant) for variant in ((MODEL, settings), found[:2]))
    same = sum(old == new for old, new in zip(expected, got, strict=True))
    assert same >= 0.975 * len(got)


def likeliest(path: Path, settings: Settings) -> list[int]:
    """The likeliest token after each of a text of code, but for the first 64."""
    found = list[int]()
    slot = Slot(0)
    with encoding.opened(path, settings) as model:
        tokens = model.vocabulary.tokenize(Path(ast.__file__).read_text()[3000:8000], True)
        for start in range(0, 1024, 64):
            chunk = tokens[start : start + 64]
            assert model.decode([(slot, chunk, len(chunk))]) == 0
            slot.tokens += chunk
            found += map(model.greedy, range(len(chunk)))
    return found[64:]
