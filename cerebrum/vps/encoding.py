"""The encoding of the weights: find the tensor types that this machine computes fastest, and write a file in them.

`tune` measures which types make a model faster on this CPU, and writes the *tuned file*: the published model in those
types. Without `--fast` it makes only changes that preserve the weights (`FAITHFUL`). The changes must pay (`MIN_GAIN`).

- A *sample* is the model with a few layers and a small vocabulary, or with one layer and its output matrix. Tensors of
  one type form a group. One sample has every group changed; each of the others differs from that one in one group. The
  differences in time rank all combinations of changes, and `tune` takes the best one that fits into memory.
- Micro-batch, flash attention and the number of threads are compared on a sample in these types, in a long context.
- The whole tuned file and the published one are timed in turns. The tuned file is dropped unless it is faster.

The *passport* is JSON in the tuned file's header: the source, machine and settings of the file. `find_tuned` refuses a
file whose passport is out of date. If no change of types is faster here, the tuned file has a passport and no tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from cerebrum.vps.gguf import Gguf, Part, Tensor, ggml
from cerebrum.vps.llama import MAX_CHUNK, MAX_DRAFT, MB, Llama, ModelError, Settings, Slot, TunedFile, estimate_bytes

# ------------------------------------------------------------------------------------------- the passport

PASSPORT_KEY = "cerebrum.passport"
PASSPORT_FORMAT = 1


def cpus() -> int:
    """The number of hardware threads that this process may use."""
    return len(os.sched_getaffinity(0))


@functools.cache
def cpu_flags() -> str:
    """A hash of the CPU's features as the kernel lists them."""
    words: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            words.update(value.split())
    return hashlib.sha256(" ".join([platform.machine(), *sorted(words)]).encode()).hexdigest()[:16]


@functools.cache
def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True, slots=True)
class Passport:
    """The source, the machine and the settings that a tuned file was made for."""

    source: str  # sha256 of the published file
    library: str  # version of llama-cpp-python
    cpu: str  # `cpu_flags`
    cpu_name: str
    cpus: int  # that the process may use
    threads: int
    micro_batch: int
    flash_attention: bool
    types: Mapping[str, str]  # changed types, old to new; if empty, the published file is used
    fast: bool = False  # made by --fast, so the weights are not quite the same
    format: int = PASSPORT_FORMAT

    def encode(self) -> str:
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def encoding(self) -> str:
        """For people to read, as in `/v1/models`."""
        if not self.types:
            return "published"
        changes = ", ".join(f"{old} to {new}" for old, new in self.types.items())
        return f"{'fast' if self.fast else 'tuned'}: {changes}"


def read_passport(path: Path) -> Passport | None:
    """The passport of a tuned file; None if it is missing, damaged or of another format."""
    try:
        with Gguf(path) as file:
            passport = Passport(**json.loads(file.text(PASSPORT_KEY)))
    except (ValueError, TypeError, ModelError):
        return None
    return passport if passport.format == PASSPORT_FORMAT else None


def tuned_path(state_dir: Path, published: Path) -> Path:
    return state_dir / "tuned" / published.name


def find_tuned(published: Path, settings: Settings, sha256: str = "") -> tuple[TunedFile | None, str]:
    """The tuned file for a published one, or None and the reason ("" if there is no tuned file).

    `sha256` is the digest that the published file should have, empty if unknown. `check_digest` verifies the file.
    """
    path = tuned_path(settings.state_dir, published)
    try:
        passport = read_passport(path)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"the file cannot be read ({error.strerror})"
    if passport is None:
        return None, "expected the passport of this version in the file's header, found another one or none"
    if sha256 and passport.source != sha256:
        return None, f"made from a file of sha256 {passport.source}, expected {sha256}"
    if passport.cpu != cpu_flags():
        return None, f"made for a CPU with other features ({passport.cpu_name}), this one is {cpu_name()}"
    expected = {"library": llama_cpp.__version__, "cpus": cpus()}
    if settings.fixed_threads:
        expected["threads"] = settings.threads
    for name, here in expected.items():
        if (made_for := getattr(passport, name)) != here:
            return None, f"made for {name} {made_for}, here it is {here}"
    used = replace(
        settings,
        threads=passport.threads,
        micro_batch=passport.micro_batch,
        flash_attention=passport.flash_attention,
    )
    return TunedFile(path if passport.types else published, used, passport.source, passport.encoding), ""


# ------------------------------------------------------------------------------------- policy: the choice

READ_TOKENS = 1000  # encodings are compared by the time of this work: 1,000 tokens read …
DECODES = {1: 64, 4: 8, 16: 2}  # … and 128 written, half of them as drafts: number of decodes by size in tokens
MIN_GAIN = 0.03  # share of the time that a tuned file or a change of settings must save
# Mean KLD in nats: a larger one means a faulty kernel. `vpsd.py tune` measures 0.0011 for the 0.5B and 0.0017 for the
# 1.5B, on an Intel Xeon with AMX.
MAX_DIVERGENCE = 0.02
MIN_GROUP_GAIN = 0.005  # share of a sample's time that a change of one group of tensors must save
SAMPLE_LAYERS = 4
SAMPLE_VOCABULARY = 1024  # so that a sample's output matrix costs nothing
KNOBS = ((256, False), (512, False), (256, True), (128, False))  # micro-batch, flash attention
# The types that each type may become: a type that stores the same weights, exactly or with scales rounded to fp16 (see
# gguf.py), or else Q8_0. The steps of Q8_0 are 1/127 of a block's largest weight, so this rounding changes less than
# the rounding in other kernels. The ternary types and the 1-bit and 4-bit float types are left alone.
FAITHFUL: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("q4_0", "q5_0", "q4_1", "q5_1", "q2_K", "q3_K", "q6_K"), ("q8_0",)),
    **dict.fromkeys(("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), ("q8_0",)),
    "q4_K": ("q4_1", "q8_0"),
    "q5_K": ("q5_1", "q8_0"),
}
LOSSY = "q4_0"  # the type that --fast adds for the layers' tensors
LARGE = ("q8_0", "f16", "bf16")  # no faithful type is faster, but Q4_0 may be worth its loss


def targets(tensor_type: str, output: bool, fast: bool) -> tuple[str, ...]:
    """The types that a tensor of this type may become."""
    lossy = fast and not output and tensor_type != LOSSY and (tensor_type in FAITHFUL or tensor_type in LARGE)
    return FAITHFUL.get(tensor_type, ()) + ((LOSSY,) if lossy else ())


@dataclass(frozen=True, slots=True)
class Timing:
    """A file's speed: seconds per token of a prompt, and seconds of one decode by its number of tokens."""

    read: float
    decode: Mapping[int, float]

    @property
    def work(self) -> float:
        """Seconds for the work of READ_TOKENS and DECODES."""
        return READ_TOKENS * self.read + sum(count * self.decode[size] for size, count in DECODES.items())

    def best(self, other: Timing) -> Timing:
        return Timing(
            min(self.read, other.read), {size: min(self.decode[size], other.decode[size]) for size in DECODES}
        )


class Group(NamedTuple):
    """Tensors that change together: the layers' tensors of one type, or the matrix that gives the logits."""

    type: str
    output: bool

    def __str__(self) -> str:
        return self.type.upper() + (" (output)" if self.output else "")


Types = Mapping[Group, str]  # the groups that change, and their new types


def group_tensors(tensors: Sequence[Tensor], fast: bool = False) -> dict[Group, list[Tensor]]:
    """The matrices that are multiplied, by group, the largest group first."""
    output = next((tensor.name for tensor in tensors if tensor.name == "output.weight"), "token_embd.weight")
    groups: dict[Group, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        group = Group(tensor.type, tensor.name == output)
        if tensor.is_matrix and (tensor.layer is not None or group.output) and targets(*group, fast):
            groups[group].append(tensor)
    return dict(sorted(groups.items(), key=lambda item: -sum(tensor.weights for tensor in item[1])))


def sample_layers(tensors: Sequence[Tensor], layers: int) -> list[int]:
    """SAMPLE_LAYERS layers in which the types of tensors are about as frequent as in the whole model."""
    types: dict[int, list[str]] = defaultdict(list)
    for tensor in sorted(tensors, key=lambda tensor: tensor.kind):
        if tensor.layer is not None and tensor.is_matrix:
            types[tensor.layer].append(tensor.type)
    alike = sorted(range(layers), key=lambda layer: (types[layer], layer))
    count = min(SAMPLE_LAYERS, layers)
    return sorted(alike[(2 * i + 1) * layers // (2 * count)] for i in range(count))


def grown(groups: Mapping[Group, Sequence[Tensor]], types: Types) -> int:
    """Bytes that the changes add to the file."""
    return sum(
        ggml().data_size(target, tensor.weights) - tensor.size
        for group, target in types.items()
        for tensor in groups[group]
    )


def rank(
    groups: Mapping[Group, Sequence[Tensor]], saved: Mapping[tuple[Group, str], float]
) -> list[tuple[float, int, dict[Group, str]]]:
    """All combinations of changes, the best first: (seconds saved of the work, bytes added, the changes). `saved` has
    the seconds that each change saves alone."""
    options = [[group.type, *(target for changed, target in saved if changed == group)] for group in groups]
    combinations = []
    for chosen in itertools.product(*options):
        types = {group: target for group, target in zip(groups, chosen, strict=True) if target != group.type}
        combinations.append((sum(saved[change] for change in types.items()), grown(groups, types), types))
    return sorted(combinations, key=lambda combination: (-combination[0], combination[1]))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the predictions of two files agree: mean Kullback-Leibler divergence in nats, and the share of positions
    at which both have the same likeliest token."""

    divergence: float
    same_top: float
    positions: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of `tune`, for people to read."""

    published: Timing
    tuned: Timing | None  # None: nothing here is faster than the published file with the usual settings
    changes: Sequence[tuple[str, int, str, str]]  # kind of tensor, how many, type before and after
    settings: tuple[Settings, Settings]  # before and after
    file_bytes: tuple[int, int]
    memory_bytes: tuple[int, int]  # estimated
    agreement: Agreement | None
    fast: bool

    def table(self) -> str:
        before, after = self.settings
        lines = [f"{cpu_name()}, {after.threads} threads", ""]
        rows: list[tuple[str, ...]] = [("tensors", "published", "here", "")]
        rows += [(f"{kind} ({count})", old.upper(), new.upper(), "") for kind, count, old, new in self.changes]
        now = self.tuned or self.published
        rows += [
            ("", "", "", ""),
            ("", "published", "here", ""),
            row("reading a prompt, tokens/s", 1 / self.published.read, 1 / now.read, "{:.0f}"),
        ]
        for size in DECODES:
            old, new = 1e3 * self.published.decode[size], 1e3 * now.decode[size]
            rows.append(row(f"a decode of {size} token{'s' * (size > 1)}, ms", old, new, "{:.1f}", less=True))
        title = f"{READ_TOKENS} tokens read, 128 written, s"
        rows.append(row(title, self.published.work, now.work, "{:.2f}", less=True))
        rows.append(("size of the file, MB", *(f"{size / MB:.0f}" for size in self.file_bytes), ""))
        rows.append(("memory (estimate), MB", *(f"{size / MB:.0f}" for size in self.memory_bytes), ""))
        rows.append(("micro-batch", str(before.micro_batch), str(after.micro_batch), ""))
        rows.append(("flash attention", *("on" if s.uses_flash_attention else "off" for s in (before, after)), ""))
        rows.append(("threads", str(before.threads), str(after.threads), ""))
        width = max(len(name) for name, *_ in rows)
        lines += ["  ".join((r[0].ljust(width), *(cell.rjust(10) for cell in r[1:3]), *r[3:])).rstrip() for r in rows]
        lines.append("")
        if self.agreement:
            lines.append(
                f"agreement with the published file on {self.agreement.positions} tokens of code: "
                f"mean KLD {self.agreement.divergence:.4f}, same likeliest token {self.agreement.same_top:.1%}"
            )
        if self.fast:
            lines.append("made by --fast: the model does not say quite the same any more; tune without it goes back")
        if not self.tuned:
            lines.append(f"nothing is {MIN_GAIN:.0%} faster here than the published file, which is used as it is")
        return "\n".join(lines)


def row(title: str, old: float, new: float, form: str, less: bool = False) -> tuple[str, str, str, str]:
    return title, form.format(old), form.format(new), f"{old / new if less else new / old:.2f} x"


# ------------------------------------------------------------------------------------------ IO: measuring

READ_SECONDS = 0.25  # spent on reading; at least once
DECODE_SECONDS = 0.1  # spent on each size of decode; at least MIN_DECODES of them
MIN_DECODES = 2
TURNS = 2
SAMPLE_READ_TOKENS = 128  # read to compare types …
WHOLE_READ_TOKENS = 256  # … and to compare whole files
CONTEXT_TOKENS = 2000  # read to compare settings: the cost of attention grows with the context
AGREEMENT_TOKENS = 320  # tokens of the text on which two files are compared …
AGREEMENT_SKIP = 64  # … except the first ones, which have little context
OUTPUTS = MAX_DRAFT + 1  # logits that a decode may ask for
Variant = tuple[Path, Settings]


@contextlib.contextmanager
def opened(path: Path, settings: Settings) -> Iterator[Llama]:
    """The model with a context of one sequence that is as long as the measurements need."""
    model = Llama(path, replace(settings, n_ctx=CONTEXT_TOKENS + 2 * OUTPUTS, sequences=1), lambda _: True)
    try:
        yield model
    finally:
        model.close()


def decode(model: Llama, slot: Slot, tokens: Sequence[int], outputs: int) -> float:
    """Append the tokens and return the seconds. ModelError if llama.cpp fails."""
    begin = time.perf_counter()
    if model.decode([(slot, list(tokens), outputs)]):
        raise ModelError("llama.cpp cannot evaluate this model")
    seconds = time.perf_counter() - begin
    slot.tokens += tokens
    return seconds


def back_to(model: Llama, slot: Slot, length: int) -> None:
    model.trim(slot, length)
    del slot.tokens[length:]


def measure(model: Llama, read: int) -> Timing:
    """Time this model: a prompt of `read` tokens, then decodes."""
    read = min(read, model.n_ctx - OUTPUTS)
    tokens, slot = [7919 * i % model.n_vocab for i in range(read)], Slot(0)  # any tokens will do
    back_to(model, slot, 0)
    decode(model, slot, tokens[: max(DECODES)], max(DECODES))  # the first decode after a load is slow
    back_to(model, slot, 0)
    reads: list[float] = []
    while sum(reads) < READ_SECONDS:
        back_to(model, slot, 0)
        chunks = [tokens[start : start + MAX_CHUNK] for start in range(0, len(tokens), MAX_CHUNK)]
        reads.append(sum(decode(model, slot, chunk, 1) for chunk in chunks))
    times: dict[int, float] = {}
    for size in DECODES:
        spent: list[float] = []
        while len(spent) < MIN_DECODES or sum(spent) < DECODE_SECONDS:
            spent.append(decode(model, slot, tokens[:size], size))
            back_to(model, slot, len(tokens))
        times[size] = min(spent)
    return Timing(min(reads) / len(tokens), times)


def log_probabilities(model: Llama, text: str, count: int) -> Iterator[npt.NDArray[np.float32]]:
    """Log probabilities of the next token after each of the first `count` tokens except the first AGREEMENT_SKIP:
    float32[vocabulary]."""
    tokens, slot = model.tokenize(text, True)[:count], Slot(0)
    back_to(model, slot, 0)
    for start in range(0, len(tokens), OUTPUTS):
        chunk = tokens[start : start + OUTPUTS]
        decode(model, slot, chunk, len(chunk))
        for i in range(len(chunk) if start >= AGREEMENT_SKIP else 0):
            logits = model.logits(i)
            yield logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))


def agreement(published: Variant, tuned: Variant, text: str, count: int = AGREEMENT_TOKENS) -> Agreement:
    """Compare the predictions of two files on the first `count` tokens of a text."""
    divergences, same = [], 0
    with opened(*published) as model:
        expected = list(log_probabilities(model, text, count))
    with opened(*tuned) as model:
        for one, other in zip(expected, log_probabilities(model, text, count), strict=True):
            divergences.append(float((np.exp(one) * (one - other)).sum()))
            same += int(one.argmax() == other.argmax())
    return Agreement(sum(divergences) / len(divergences), same / len(divergences), len(divergences))


Progress = Callable[[str, int, int], None]  # label, done, total


def compare(variants: Mapping[Any, Variant], read: int, step: Callable[[], None]) -> dict[Any, Timing]:
    """The best times of each variant, measured in turns, so that a slow minute affects all of them alike."""
    found: dict[Any, Timing] = {}
    for turn in range(TURNS):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            with opened(*variants[name]) as model:
                timing = measure(model, read)
            found[name] = found[name].best(timing) if name in found else timing
            step()
    return found


# ---------------------------------------------------------------------------------------------- IO: tune


class TuneError(Exception):
    """Why a model cannot be tuned now. The message says what was expected and what came."""


class Tuner:
    """One run of `tune`: the published file, the folder for the files to try, and the progress."""

    def __init__(
        self, file: Gguf, sha256: str, settings: Settings, folder: Path, room: int, fast: bool, report: Progress
    ) -> None:
        self.file, self.sha256, self.settings, self.folder = file, sha256, settings, folder
        self.room, self.fast, self.report = room, fast, report
        self.shape, self.tensors = file.shape, file.tensors
        self.groups = group_tensors(self.tensors, fast)
        self.layers = sample_layers(self.tensors, self.shape.layers)
        self.size = file.path.stat().st_size
        knobs = [replace(settings, micro_batch=size, flash_attention=flash) for size, flash in KNOBS]
        if not settings.fixed_threads and cpus() != settings.threads:
            knobs.append(replace(settings, threads=cpus()))
        # Settings with the same context count once: with a quantized cache, flash attention is always on.
        alike = {(knob.micro_batch, knob.uses_flash_attention, knob.threads): knob for knob in [*knobs, settings]}
        self.knobs = list(alike.values())
        changes = sum(len(self.targets(group)) for group in self.groups)
        samples = changes + len({group.output for group in self.groups})
        self.done, self.steps = 0, TURNS * (samples + len(self.knobs) + 2)

    def step(self) -> None:
        self.done += 1
        self.report("measuring", self.done, self.steps)

    def targets(self, group: Group) -> tuple[str, ...]:
        return targets(group.type, group.output, self.fast)

    def memory(self, size: int, settings: Settings) -> int:
        return sum(estimate_bytes(size, self.shape, settings).values())

    def check_room(self) -> None:
        """TuneError with the figures if the memory or the disk is too small."""
        if (need := self.memory(self.size, self.settings)) > self.room:
            raise TuneError(f"expected {need / MB:.0f} MB of memory beside the reserve, got {self.room / MB:.0f} MB")
        need = 3 * self.size // 2  # for a tuned file of the usual types; samples take less
        if (free := shutil.disk_usage(self.folder).free) < need:
            raise TuneError(f"expected {need / MB:.0f} MB of free disk in {self.folder.parent}, got {free / MB:.0f} MB")

    def types_of(self, types: Types) -> dict[str, str]:
        """The new types by tensor name."""
        return {tensor.name: target for group, target in types.items() for tensor in self.groups[group]}

    def sample(self, types: Types, layers: Sequence[int], output: bool = False) -> Path:
        """Write a file with these changes, these layers and a small vocabulary (with `output`, the whole vocabulary).
        The file has no tokenizer."""
        path = self.folder / f"sample-{len(list(self.folder.iterdir()))}"
        changed, parts = self.types_of(types), []
        vocabulary = self.shape.vocabulary if output else min(SAMPLE_VOCABULARY, self.shape.vocabulary)
        for tensor in self.tensors:
            name, dimensions = tensor.name, tensor.dimensions
            if tensor.layer is not None:
                if tensor.layer not in layers:
                    continue
                name = name.replace(f"blk.{tensor.layer}.", f"blk.{layers.index(tensor.layer)}.", 1)
            elif self.shape.vocabulary in dimensions:
                dimensions = tuple(vocabulary if size == self.shape.vocabulary else size for size in dimensions)
            parts.append(Part(tensor, changed.get(tensor.name, tensor.type), name, dimensions))
        arch = self.file.architecture
        values: dict[str, str | int] = {
            f"{arch}.block_count": len(layers),
            f"{arch}.vocab_size": vocabulary,
            "tokenizer.ggml.model": "no_vocab",
        }
        self.file.write(path, parts, values, without="tokenizer.", threads=cpus())
        return path

    def clear(self) -> None:
        for sample in self.folder.iterdir():
            sample.unlink()

    def choose_types(self) -> dict[Group, str]:
        """The best combination of changes that fits into memory."""
        saved: dict[tuple[Group, str], float] = {}
        for output in (False, True):
            groups = [group for group in self.groups if group.output == output]
            # The speed of a type's kernels depends on the types around it, so a change is measured among the others.
            usual = {group: self.targets(group)[0] for group in groups}
            changes = [(group, target) for group in groups for target in (group.type, *self.targets(group)[1:])]
            if not changes:
                continue
            layers = self.layers[:1] if output else self.layers
            variants: dict[Any, Variant] = {None: (self.sample(usual, layers, output), self.settings)}
            variants |= {
                (g, target): (self.sample({**usual, g: target}, layers, output), self.settings) for g, target in changes
            }
            found = compare(variants, SAMPLE_READ_TOKENS, self.step)
            self.clear()
            for group in groups:
                kept = found[group, group.type].work
                for target in self.targets(group):
                    gain = kept - found[(group, target) if target != usual[group] else None].work
                    if gain >= MIN_GROUP_GAIN * kept:
                        saved[group, target] = gain * (1 if output else self.shape.layers / len(self.layers))
        for _, added, types in rank(self.groups, saved):
            if self.memory(self.size + added, self.settings) <= self.room:
                return types
        return {}

    def choose_settings(self, types: Types) -> Settings:
        """The fastest micro-batch, attention and thread count for these types, if the gain is MIN_GAIN or more."""
        # Half the layers will do: attention takes the same share of each layer, and the context is long.
        sample, base, size = self.sample(types, self.layers[::2]), self.settings, self.size + grown(self.groups, types)
        fitting = [base, *(knob for knob in self.knobs if knob != base and self.memory(size, knob) <= self.room)]
        found = compare({knob: (sample, knob) for knob in fitting}, CONTEXT_TOKENS, self.step)
        self.clear()
        best = min(fitting, key=lambda knob: found[knob].work)
        return best if found[best].work <= (1 - MIN_GAIN) * found[base].work else base

    def passport(self, types: Types, settings: Settings) -> Passport:
        return Passport(
            source=self.sha256,
            library=llama_cpp.__version__,
            cpu=cpu_flags(),
            cpu_name=cpu_name(),
            cpus=cpus(),
            threads=settings.threads,
            micro_batch=settings.micro_batch,
            flash_attention=settings.flash_attention,
            types={str(group): target.upper() for group, target in types.items()},
            fast=LOSSY in types.values(),
        )

    def run(self) -> tuple[Outcome, Path]:
        """The outcome, and the file to put in place."""
        self.check_room()
        try:
            types = self.choose_types()
            settings = self.choose_settings(types)
        except ModelError as error:
            raise TuneError(f"expected a model of which a few layers can be measured: {error}") from None
        path, size = self.folder / "tuned", self.size
        if types:
            changed = self.types_of(types)
            size = self.file.write(
                path,
                [Part(tensor, changed.get(tensor.name, tensor.type)) for tensor in self.tensors],
                {PASSPORT_KEY: self.passport(types, settings).encode()},
                report=lambda done, total: self.report("writing", done, total),
                threads=cpus(),
            )
        variants = {"published": (self.file.path, self.settings)}
        if types or settings != self.settings:
            variants["tuned"] = (path if types else self.file.path, settings)
        found = compare(variants, WHOLE_READ_TOKENS, self.step)
        if self.done < self.steps:  # some settings do not fit, or there is nothing to compare with
            self.report("measuring", self.steps, self.steps)
        # Settings were chosen in a long context, where they pay. In this short one they must only do no harm.
        limit = found["published"].work * (1 - MIN_GAIN if types else 1)
        better, same = "tuned" in found and found["tuned"].work <= limit, None
        if better and types:
            code = Path(__file__).read_text()[-8 * AGREEMENT_TOKENS :]  # source code, as in users' prompts
            same = agreement(variants["published"], variants["tuned"], code)
            most = math.inf if LOSSY in types.values() else MAX_DIVERGENCE
            better = same.divergence <= most  # False for NaN
        if not better:
            types, settings, size, same = {}, self.settings, self.size, None
        passport = self.passport(types, settings)
        if not types:
            self.file.write(path, [], {PASSPORT_KEY: passport.encode()}, without="tokenizer.")
        return Outcome(
            published=found["published"],
            tuned=found["tuned"] if better else None,
            changes=self.changes(types),
            settings=(self.settings, settings),
            file_bytes=(self.size, size),
            memory_bytes=(self.memory(self.size, self.settings), self.memory(size, settings)),
            agreement=same,
            fast=passport.fast,
        ), path

    def changes(self, types: Types) -> list[tuple[str, int, str, str]]:
        """A row for each kind of matrix and each of its types."""
        after, counts = self.types_of(types), defaultdict[tuple[str, str, str], int](int)
        for tensor in self.tensors:
            if tensor.is_matrix:
                counts[tensor.kind, tensor.type, after.get(tensor.name, tensor.type)] += 1
        return [(kind, count, old, new) for (kind, old, new), count in sorted(counts.items())]


def tune(
    published: Path,
    sha256: str,
    settings: Settings,
    room: int,
    report: Progress,
    *,
    fast: bool = False,
    dry_run: bool = False,
    accept: Callable[[Outcome], None] = lambda _outcome: None,
) -> Outcome:
    """Find the fastest encoding of a published file, and put the tuned file in place (not with `dry_run`).

    `sha256` is the published file's, `room` the bytes of memory that the model may take. `accept` is called with the
    outcome before the file is used. After a TuneError, ModelError or OSError nothing has changed.
    """
    target = tuned_path(settings.state_dir, published)
    with alone_in(target.parent) as folder, Gguf(published) as file:
        outcome, path = Tuner(file, sha256, settings, folder, room, fast, report).run()
        accept(outcome)
        if not dry_run:
            with path.open("rb") as written:
                os.fsync(written.fileno())  # otherwise a crash could leave a valid header without weights
            os.replace(path, target)
    return outcome


def remove_tuned(published: Path, settings: Settings) -> bool:
    """Go back to the published file; False if it is in use already. TuneError if a model is being tuned."""
    target = tuned_path(settings.state_dir, published)
    if not target.parent.exists():
        return False
    with alone_in(target.parent):
        found = target.exists()
        target.unlink(missing_ok=True)
    return found


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """A folder for temporary files in `folder`, for one process at a time. TuneError if another process has one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuneError("another process is tuning a model; expected to be the only one") from None
        for left in folder.glob(".work-*"):  # left by a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as temporary:
            yield Path(temporary)
