"""Tuning: what is tried, chosen, written, and used. Times are scripted here; the slow tests
measure.
"""

from __future__ import annotations

import ast
import bdb
import difflib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import families
import llama_cpp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from harness import FILES, ROOT, command_of, disk_of
from harness import settings as daemon_settings

import vpsd as backend
from cerebrum.settings import Environment
from cerebrum.vps import encoding
from cerebrum.vps.encoding import (
    Outcome,
    Passport,
    Timing,
    TunedFile,
    TuneError,
    find_tuned,
    passport_path,
    tune,
    tuned_path,
)
from cerebrum.vps.gguf import Source, Tensor
from cerebrum.vps.llama import MB, Settings, api, file_stamp, start_library

MODEL = FILES["qwen_0_5b"]
WIDTH, FEED = families.QUANTIZED_WIDTH, families.QUANTIZED_FEED


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return families.write_quantized(tmp_path_factory.mktemp("models") / "m.gguf")


class Script:
    """Stands for the measurements: a model's seconds follow from its types of matrices and its
    settings. `whole` is the factor of the whole file that is compared with the published one.
    """

    def __init__(
        self, costs: Mapping[str, float], factor: Any = lambda _: 1.0, whole: Any = None
    ) -> None:
        self.costs = costs
        self.factor = factor
        self.whole = whole
        self.agreement = 0.99  # of the tuned file
        self.sizes: list[int] = []
        # By each comparison: the weights by their types, and micro-batch and flash attention.
        self.compared = []
        self.used = []

    def __call__(
        self, variants: Sequence[tuple[Path, Settings]], _read: int, step: Any
    ) -> list[Timing]:
        found = []
        self.used.append({(used.micro_batch, used.flash_attention) for _, used in variants})
        self.compared.append([])
        for path, settings in variants:
            self.sizes.append(path.stat().st_size)
            weights = weights_of(Source(path))
            self.compared[-1].append(weights)
            spent = sum(count * self.costs.get(kind, 1.0) for kind, count in weights.items()) / 1e9
            is_tuned = found and variants[0][0].name == "m.gguf"
            spent *= self.whole if is_tuned and self.whole else self.factor(settings)
            found.append(Timing(spent, dict.fromkeys(encoding.DECODES, spent)))
            step()
        return found


def weights_of(source: Source) -> Counter[str]:
    """The weights that are multiplied, by type."""
    names = {tensor.name for tensor in source.tensors}
    blocks = {tensor.layer for tensor in source.tensors} - {None}
    assert source.reader.fields["qwen2.block_count"].contents() == len(blocks)
    unused = "token_embd.weight" if "output.weight" in names else ""
    weights = Counter[str]()
    for tensor in source.tensors:
        if tensor.is_matrix and tensor.name != unused:
            size, width = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
            weights[tensor.type] += tensor.data.nbytes // width * size
    return weights


ROOM = 4 << 30
NONE = None, "there is no tuned file"
FASTER = {"Q5_0": 3.0, "Q8_0": 1.0, "Q4_K": 2.0, "Q4_1": 1.0, "Q6_K": 2.0}


def quiet(*_: Any) -> None:
    pass


@dataclass
class Lab:
    """A published file, and a machine whose times are scripted."""

    published: Path
    settings: Settings
    monkeypatch: pytest.MonkeyPatch

    def script(self, costs: Mapping[str, float], **more: Any) -> Script:
        made = Script(costs, **more)
        self.monkeypatch.setattr(encoding, "compare", made)
        self.monkeypatch.setattr(encoding, "agreement", lambda *_: made.agreement)
        return made

    def tune(self, room: int = ROOM, told: Any = quiet, path: Any = None, **more: Any) -> Outcome:
        more = {"output": io.StringIO()} | more
        return tune(path or self.published, "abc", self.settings, room, told, **more)

    @property
    def path(self) -> Path:
        """Where the tuned file is written."""
        return tuned_path(self.settings.state_dir, self.published)

    def found(self) -> tuple[TunedFile | None, str]:
        return find_tuned(self.published, self.settings)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.glob("*") if path.name != ".lock")


@pytest.fixture
def lab(published, tmp_path, monkeypatch) -> Lab:
    def needed(path, forms):
        weights = path.stat().st_size
        return [{"weights": weights, "compute": 10_000 * form.micro_batch} for form in forms]

    monkeypatch.setattr(encoding, "needed", needed)  # llama.cpp cannot load the file
    settings = Settings(threads=2, state_dir=tmp_path / "state", fixed_threads=True)
    lab = Lab(published, settings, monkeypatch)
    lab.script(FASTER)
    return lab


# ---------------------------------------------------------------------------------- what can change


def tensor(name: str, kind: str, rows: int = 32) -> Tensor:
    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if size == 1:
        data: Any = np.zeros((rows, 256), np.float32)
    else:
        data = np.zeros((rows, 256 // size * width), np.uint8)
    return Tensor(name, kind, data if rows > 1 else data[0])


MATRICES = {
    "blk.0.ffn_up": "Q4_K",
    "blk.1.ffn_up": "Q6_K",
    "y": "Q4_K",
    "blk.0.attn_q": "F16",
    "token_embd": "Q6_K",
}


def test_only_matrices_that_are_multiplied_change():
    tensors = [tensor(f"{name}.weight", kind) for name, kind in MATRICES.items()]
    tensors += [tensor("blk.0.attn_norm.weight", "F32", 1), tensor("blk.0.x.bias", "Q4_K")]
    tied = {"blk.1.ffn_up.weight": "Q8_0", "token_embd.weight": "Q8_0"}
    assert encoding.change_types(tensors, encoding.TO_Q8_0) == tied
    tensors.append(tensor("output.weight", "Q6_K"))
    up = {"blk.0.ffn_up.weight": "Q4_1", "blk.1.ffn_up.weight": "Q8_0"}
    assert encoding.change_types(tensors, encoding.FAITHFUL) == up | {"output.weight": "Q8_0"}


def test_a_sample_has_the_kinds_of_layers_that_the_model_has():
    """Of 24 layers every third has the larger type: one in three of the sample then has it, or
    nearly.
    """
    tensors = [tensor(f"blk.{i}.ffn_down.weight", "Q4_K" if i % 3 else "Q6_K") for i in range(24)]
    sample = encoding.sample_layers(tensors)
    assert len(sample) == 4
    assert sum(layer % 3 == 0 for layer in sample) == 1
    assert encoding.sample_layers(tensors[:3]) == [0, 1, 2]
    assert encoding.sample_layers(tensors[:1]) == [0]


# --------------------------------------------------------------------------------------- the choice


def test_the_fastest_types_are_chosen_and_written(lab):
    made = lab.script(FASTER, factor=lambda used: 0.9 if used.micro_batch == 512 else 1.0)
    told = []
    outcome = lab.tune(told=lambda *step: told.append(step))
    layers, _, whole = made.compared
    # Two layers of either kind, with an output matrix of few tokens.
    rest, attention = FEED * WIDTH * 2, 4 * 3 * WIDTH**2
    small, large = rest + 1024 * WIDTH, attention + rest + 1024 * WIDTH
    assert layers[0] == {"Q5_0": attention, "Q4_K": rest, "Q6_K": small}
    assert layers[1:] == [{"Q8_0": large, "Q4_K": rest}, {"Q8_0": large, "Q4_1": rest}]
    assert made.used[1] == set(encoding.KNOBS)
    assert [set(types) for types in whole] == [{"Q5_0", "Q4_K", "Q6_K"}, {"Q8_0", "Q4_1"}]
    assert outcome.published.timing.work > 2 * outcome.tuned.timing.work
    expected = PASSPORT | {"micro_batch": 512, "flash_attention": True}
    expected["types"] = encoding.FAITHFUL | {"Q6_K (output)": "Q8_0"}
    expected |= {"file": file_stamp(lab.published), "size": lab.path.stat().st_size}
    forms = {"published": outcome.published, "here": outcome.tuned}
    expected |= {name: [*form.timing.decode.values()] for name, form in forms.items()}
    assert json.loads(passport_path(lab.path).read_text()) == expected
    both = zip(Source(lab.published).tensors, Source(lab.path).tensors, strict=True)
    pairs = {new.name: (before.type, new.type) for before, new in both}
    assert pairs["blk.0.ffn_up_exps.weight"] == ("Q5_0", "Q8_0")
    assert pairs["blk.0.ffn_down.weight"] == ("Q4_K", "Q4_1")
    assert pairs["blk.1.ffn_down.weight"] == pairs["output.weight"] == ("Q6_K", "Q8_0")
    assert pairs["token_embd.weight"] == ("Q6_K", "Q6_K")  # only looked up
    size = lab.published.stat().st_size
    assert outcome.published.file == size
    assert outcome.tuned.file == lab.path.stat().st_size
    assert lab.left() == ["m.gguf", "m.gguf.json"]
    assert max(made.sizes) < 1.5 * size
    steps = {label: [step for step in told if step[0] == label] for label, _, _ in told}
    last = steps["measuring"][-1][1]
    assert {total for _, _, total in steps["measuring"]} == {last}
    written = range(1, len(pairs) + 1)
    assert steps["writing"] == [("writing", done, len(pairs)) for done in written]


@pytest.mark.parametrize(("layers", "types"), [(1, ("Q4_K",)), (3, ("Q4_K", "Q6_K"))])
def test_a_tied_output_matrix_and_few_layers(lab, tmp_path, layers, types):
    lab.script({**FASTER, "Q6_K": 3.0})
    path = families.write_quantized(tmp_path / "m.gguf", layers, output="", types=types)
    assert lab.tune(path=path).tuned
    copy = Source(tuned_path(lab.settings.state_dir, path))
    after = {tensor.name: tensor.type for tensor in copy.tensors}
    assert after["token_embd.weight"] == "Q8_0"
    assert {kind for name, kind in after.items() if "ffn_down" in name} <= {"Q4_1", "Q8_0"}


FASTEST = "tuned: Q4_K to Q4_1, Q5_0 to Q8_0, Q6_K to Q8_0, Q6_K (output) to Q8_0"
HARDLY = 1 - encoding.MIN_GAIN + 0.001


NO_FLASH, LARGE_BATCH = {"flash_attention": False}, {"micro_batch": 512}
CHOICES = [
    (FASTER, NO_FLASH, None, 0.99, FASTEST, NO_FLASH),
    (FASTER, {}, None, 0.9, FASTEST, {}),
    (FASTER, {}, None, 0.89, "published", {}),  # says something else
    (FASTER, {}, 9.0, 0.99, "published", {}),  # what a sample promises must hold for the whole
    ({"Q8_0": HARDLY, "Q4_1": HARDLY}, {}, None, 0.99, "published", {}),  # not worth a file
    ({}, LARGE_BATCH, 1.0, 0.99, "published", LARGE_BATCH),  # pays in a long context alone
]


@pytest.mark.parametrize(("costs", "quicker", "whole", "agreement", "chosen", "changed"), CHOICES)
def test_what_is_chosen_is_found(
    lab,
    costs,
    quicker,
    whole,
    agreement,
    chosen,
    changed,
):
    def factor(used):
        return 0.9 if quicker and replace(used, **quicker) == used else 1.0

    lab.script(costs, factor=factor, whole=whole).agreement = agreement
    assert lab.found() == NONE
    outcome, tuned = lab.tune(), chosen == FASTEST
    file = lab.path if tuned else lab.published
    settings = replace(lab.settings, **changed)
    here = outcome.tuned or outcome.published
    seconds = [[*form.timing.decode.values()] for form in (outcome.published, here)]
    passport = outcome.passport
    assert (passport.source, passport.encoding) == ("abc", chosen)
    assert [passport.published, passport.here] == seconds
    used = TunedFile(file, settings, passport)
    assert find_tuned(lab.published, lab.settings, "abc") == (used, "")
    assert lab.left() == [*(["m.gguf"] if tuned else []), "m.gguf.json"]
    nothing = "nothing is 3% faster here than the published file, which is used as it is"
    assert (outcome.tuned is None) == (nothing in outcome.table()) == (not tuned and not changed)
    other = None, "it was tuned for source abc, here it is def"
    assert find_tuned(lab.published, lab.settings, "def") == other
    assert encoding.remove_tuned(lab.published, lab.settings) == tuned
    # So that nothing tunes it again.
    kept = TunedFile(lab.published, settings, passport._replace(types={}, here=seconds[0]))
    assert lab.found() == (kept, "")
    assert lab.left() == ["m.gguf.json"]
    assert not encoding.remove_tuned(lab.published, lab.settings)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_what_is_fine_already_is_left_alone(lab, tmp_path, kind):
    made = lab.script({"F16": 4.0, "Q8_0": 2.0, "Q5_0": 1.0, "Q4_0": 0.5})
    path = families.write_quantized(tmp_path / "m.gguf", types=(kind,), output="Q8_0")
    lab.tune(path=path)
    for types in made.compared[-1]:
        assert types.keys() == {kind, "Q5_0", "Q8_0"}


def test_the_best_that_fits_into_memory_is_chosen(lab):
    changed = lambda outcome: set(outcome.passport.types.items())  # noqa: E731
    best = lab.tune(ROOM)
    smaller = lab.tune(best.tuned.memory - 10_000)
    assert smaller.tuned.memory < best.tuned.memory
    assert changed(best) - changed(smaller) == {("Q4_K", "Q4_1")}
    assert changed(lab.tune(smaller.published.memory)) == set()
    message = r"expected \d+ MB of memory beside the reserve, got \d+ MB"
    with pytest.raises(TuneError, match=message):
        lab.tune(smaller.published.memory - MB)


def test_more_threads_are_tried_unless_the_user_chose(lab):
    lab.monkeypatch.setattr(encoding, "cpus", lambda: 4)
    lab.script(FASTER, factor=lambda used: 0.8 if used.threads == 4 else 1.0)
    assert lab.tune().passport.threads == 2
    free = replace(lab, settings=replace(lab.settings, fixed_threads=False))
    assert (free.tune().passport.threads, free.found()[0].settings.threads) == (4, 4)
    assert lab.found() == (None, "it was tuned for threads 4, here it is 2")


TABLE = """\
                                   published        here
a token of a prompt, ms                  4.0         1.0  4.00 x
1000 tokens read, 128 written, ms     6520.0      2580.0  2.53 x
size of the file, MB                     469         574
memory (estimate), MB                    850         956
micro-batch                              256         128

same likeliest token as the published file after 98.4% of 256 tokens of code"""


def test_the_table():
    old, new = Settings(threads=2), Settings(threads=2, micro_batch=128)
    before = Timing(0.004, {1: 0.03, 4: 0.05, 16: 0.1})
    after = Timing(0.001, {1: 0.02, 4: 0.025, 16: 0.05})
    published = encoding.Form(before, old, 469 * MB, 850 * MB)
    tuned = encoding.Form(after, new, 574 * MB, 956 * MB)
    outcome = Outcome(published, tuned, Passport(**PASSPORT), 0.984)
    first, _, *lines = outcome.table().splitlines()
    assert first == f"{encoding.cpu_name()}; tuned: Q5_0 to Q8_0"
    assert [line for line in lines if line in TABLE] == TABLE.splitlines()


# ----------------------------------------------------------------------------- what must not happen


def test_the_figures_are_told_before_the_file_is_used_and_a_dry_run_changes_nothing(
    lab,
):
    assert lab.tune(dry_run=True).tuned
    assert lab.left() == []
    output, told = io.StringIO(), []
    lab.monkeypatch.setattr(os, "replace", lambda *_: told.append(output.getvalue()))
    assert f"{lab.tune(output=output).table()}\n" == told[0]


def test_too_little_disk_is_told_with_the_figures(lab):
    made = lab.script(FASTER)
    lab.monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=MB))
    with pytest.raises(OSError, match=r"expected 1\d\d MB of free disk in .*tuned, got 1 MB"):
        lab.tune()
    assert (made.compared, lab.left()) == ([], [])


def test_a_disk_that_fills_up_leaves_what_was_there(lab):
    made = lab.script(FASTER)
    lab.tune()
    real, before = Tensor.convert, lab.path.read_bytes()

    def convert(self, new):
        if len(made.compared) == 5:  # the samples have been compared
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, new)

    lab.monkeypatch.setattr(Tensor, "convert", convert)
    with pytest.raises(OSError, match="No space left on device"):
        lab.tune()
    assert (lab.left(), lab.path.read_bytes()) == (["m.gguf", "m.gguf.json"], before)


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
    half = lab.path.parent / ".work-abc/tuned"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert lab.found() == NONE
    lab.tune()
    assert lab.left() == ["m.gguf", "m.gguf.json"]


def test_only_one_process_tunes(lab):
    lab.path.parent.mkdir(parents=True)
    with lab.path.with_name(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = "another process is tuning a model; expected to be the only one"
        with pytest.raises(TuneError, match=message):
            lab.tune()


# ------------------------------------------------------------------------------------- what is used

PASSPORT = {
    "source": "abc",
    "library": llama_cpp.__version__,
    "cpu": encoding.cpu_features(),
    "cpus": len(os.sched_getaffinity(0)),
    "threads": 2,
    "micro_batch": 128,
    "flash_attention": False,
    "types": {"Q5_0": "Q8_0"},
    "format": 3,
    "file": "10.20",
    "size": 4,
}
ELSEWHERE = {"library": "0.0.1", "cpu": "z80", "cpus": 99, "threads": 3, "format": 1}
INCOMPLETE = "its tuned file is missing or cut short"
NO_PASSPORT = "its passport is not of this version"


PASSPORTS = [
    ({}, ""),
    ({"new": 1}, NO_PASSPORT),
    (b"", NO_PASSPORT),
    (b"[]", NO_PASSPORT),
    (b"\xff", NO_PASSPORT),
    (None, NO_PASSPORT),
    ({"size": 5}, INCOMPLETE),
    ({"size": 5, "types": {}}, ""),
    ("a folder", "its passport cannot be read (Is a directory)"),
]
for name, there in ELSEWHERE.items():
    differs = f"it was tuned for {name} {there}, here it is {PASSPORT[name]}"
    PASSPORTS.append(({name: there}, differs))


WORK = """
import sys, time
from pathlib import Path
from cerebrum.vps.encoding import alone_in
for _ in range(2):
    with alone_in(Path(sys.argv[1])) as folder:
        (folder / "large").write_text("x")
        if _:
            print("ready", flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_tuning_that_is_ended_leaves_nothing(number, tmp_path):
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_tuning_by_nohup_goes_on_without_its_terminal(tmp_path):
    command = ["nohup", sys.executable, "-c", WORK, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


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
    copied.tune(path=copied.published)
    assert copied.found()[1] == ""
    before = file_stamp(copied.published)
    shutil.copy(lab.published, tmp_path / "new")
    os.replace(tmp_path / "new", copied.published)
    after = file_stamp(copied.published)
    assert copied.found() == (None, f"it was tuned for file {before}, here it is {after}")
    assert find_tuned(copied.published, copied.settings, "abc")[1] == ""
    copied.path.unlink()
    assert find_tuned(copied.published, copied.settings, "abc") == (None, INCOMPLETE)


def test_only_what_llama_cpp_uses_of_a_cpu_counts(monkeypatch):
    def features_of(flags, used):
        encoding.cpu_features.cache_clear()
        monkeypatch.setattr(Path, "read_text", lambda _path: f"model name : A\nflags : {flags}\n")
        monkeypatch.setattr(api, "llama_print_system_info", lambda: used)
        return encoding.cpu_features()

    built_for_both = features_of("avx2 fma", b"CPU : AVX2 = 1 | FMA = 1 | ")
    assert built_for_both == features_of("avx2 fma md_clear", b"CPU : AVX2 = 1 | FMA = 1 | ")
    assert built_for_both != features_of("avx2 fma", b"CPU : AVX2 = 1 | ")
    encoding.cpu_features.cache_clear()


# ----------------------------------------------------------------------------------- the real thing


def vpsd(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = daemon_settings(home, CEREBRUM_MODELS_DIR=str(MODEL.parent), **more)
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


def test_a_busy_machine_is_not_measured(monkeypatch, tmp_path):
    loads = iter([80.0] * backend.QUIET_SECONDS)
    monkeypatch.setattr(backend.psutil, "cpu_percent", lambda _seconds: next(loads))
    given = {"CEREBRUM_MODELS_FILE": str(ROOT / "models.toml")}
    given["CEREBRUM_MODELS_DIR"] = str(MODEL.parent)
    config = backend.load_config(Environment(given))
    message = "expected other programs to use at most 25 % of the CPU, got 80 %"
    with pytest.raises(TuneError, match=message):
        backend.tune_model(config.models[-1], config, sys.stdout)
    assert list(loads) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_llama_cpp_measures_each_family(family, tmp_path, monkeypatch):
    """Also one whose layers depend on their place, so that there is no sample, and one that cannot
    be cut.
    """
    for name in ("READ_SECONDS", "DECODE_SECONDS"):
        monkeypatch.setattr(encoding, name, 1e-9)
    start_library()
    model = families.make(tmp_path / "m.gguf", families.FAMILIES[family])
    # Two threads would mostly wait, where another test runs at the same time.
    settings = Settings(threads=1, state_dir=tmp_path / "state", fixed_threads=True)
    tune(model, "abc", settings, ROOM, quiet, io.StringIO())
    assert find_tuned(model, settings)[0]


@pytest.mark.alone
@pytest.mark.slow
def test_a_real_model_is_tuned_once_and_says_the_same(tmp_path, monkeypatch):
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
    monkeypatch.setattr(encoding, "AGREEMENT_TOKENS", 1024)
    agreements = []
    for module in (ast, bdb, difflib):
        text = Path(module.__file__).read_text()[3000:8000]
        variants = (MODEL, settings), (found.path, found.settings)
        agreements.append(encoding.agreement(*variants, text))
    assert fmean(agreements) >= 0.975
