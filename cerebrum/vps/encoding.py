"""The encoding of the weights: find the tensor types that this machine computes fastest, and write
a file in them.

`tune` tries a few recipes of types on this CPU, and writes the *tuned file*: the published model in
the fastest types. It makes only changes that preserve the weights (`FAITHFUL`), and only those that
pay (`MIN_GAIN`).

- A *sample* is the model with a few layers and a small vocabulary. Each recipe that fits into
  memory is timed on one.
- Micro-batch, flash attention and the number of threads are compared on a sample in these types, in
  a long context.
- The whole tuned file and the published one are timed in turns. The tuned file is dropped unless it
  is faster; other settings alone, unless they cost hardly anything there.

The *passport* is JSON beside the tuned file: the source, machine and settings of the file.
`find_tuned` refuses a file whose passport is out of date. If no change of types is faster here,
there is only a passport.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import llama_cpp

from cerebrum.vps.gguf import Source, Tensor
from cerebrum.vps.llama import (
    MAX_CHUNK,
    MAX_DRAFT,
    MB,
    Llama,
    ModelError,
    Settings,
    Slot,
    check_disk,
    cpus,
    file_size,
    file_stamp,
    write_atomically,
)
from cerebrum.vps.memory import Parts, fit, needed
from cerebrum.vps.vocabulary import api

# ------------------------------------------------------------------------------------- the passport

PASSPORT_FORMAT = 3
CHOSEN = ("threads", "micro_batch", "flash_attention")  # settings that `tune` chooses


@functools.cache
def cpu_features() -> str:
    """A hash of the CPU's features that llama.cpp uses. It counts only those that it was built
    for.
    """
    return hashlib.sha256(api.llama_print_system_info()).hexdigest()[:16]


@functools.cache
def cpu_name() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


@dataclass(frozen=True, slots=True)
class Passport:
    """The source, the machine and the settings that a tuned file was made for."""

    source: str  # sha256 of the published file
    file: str  # its `file_stamp`
    library: str  # version of llama-cpp-python
    cpu: str  # `cpu_features`
    cpus: int  # that the process may use
    threads: int
    micro_batch: int
    flash_attention: bool
    types: Mapping[str, str]  # changed types, old to new; if empty, the published file is used
    size: int  # of the tuned file
    format: int = PASSPORT_FORMAT

    @property
    def encoding(self) -> str:
        """The changed types in words, as shown by `/v1/models`."""
        if not self.types:
            return "published"
        return "tuned: " + ", ".join(f"{old} to {new}" for old, new in self.types.items())


@dataclass(frozen=True, slots=True)
class TunedFile:
    """The model in an encoding that is faster on this machine."""

    path: Path  # the published file itself, if only the settings differ
    settings: Settings
    source: str  # sha256 that the published file must have
    encoding: str  # in words, for messages


def tuned_path(state_dir: Path, published: Path) -> Path:
    return state_dir / "tuned" / published.name


def passport_path(tuned: Path) -> Path:
    return tuned.with_name(f"{tuned.name}.json")


def find_tuned(
    published: Path, settings: Settings, sha256: str = ""
) -> tuple[TunedFile | None, str]:
    """The tuned file for a published one, or None and the reason. OSError if there is no published
    file.

    `sha256` is the digest that the published file should have; `check_digest` verifies it. If it is
    unknown (empty), the published file must not have been touched since.
    """
    path = tuned_path(settings.state_dir, published)
    foreign = "its passport is not of this version"
    try:
        passport = Passport(**json.loads(passport_path(path).read_text()))
    except FileNotFoundError:
        return None, foreign if path.exists() else "there is no tuned file"
    except OSError as error:
        return None, f"its passport cannot be read ({error.strerror})"
    except (ValueError, TypeError):
        return None, foreign
    expected = {
        "format": PASSPORT_FORMAT,
        "library": llama_cpp.__version__,
        "cpu": cpu_features(),
        "cpus": cpus(),
    }
    expected |= {"threads": settings.threads} if settings.fixed_threads else {}
    expected |= {"source": sha256} if sha256 else {"file": file_stamp(published)}
    for name, here in expected.items():
        if (made_for := getattr(passport, name)) != here:
            return None, f"it was tuned for {name} {made_for}, here it is {here}"
    if passport.types and passport.size != file_size(path):
        return None, "its tuned file is missing or cut short"
    used = replace(settings, **{name: getattr(passport, name) for name in CHOSEN})
    return TunedFile(
        path if passport.types else published, used, passport.source, passport.encoding
    ), ""


class Choice(NamedTuple):
    """What to load of a model."""

    settings: Settings  # the given ones, with a context that fits into memory
    tuned: TunedFile | None
    parts: Parts  # the memory that this takes
    reason: str  # why it runs untuned, "" if it does not


def choose_file(published: Path, settings: Settings, sha256: str, free: float) -> Choice:
    """What to load of a model into `free` bytes of memory. The tuned file is larger, and used only
    with the context that the published file has. ModelError or OSError if the published file cannot
    be used.
    """
    settings, parts = fit(settings, free, functools.partial(needed, published))
    tuned, reason = find_tuned(published, settings, sha256)
    if tuned:
        try:
            (larger,) = needed(tuned.path, [tuned.settings])
            if (need := sum(larger.values())) <= free:
                return Choice(settings, tuned, larger, "")
            reason = f"its tuned file needs {need / MB:.0f} MB, and {free / MB:.0f} MB can be freed beside the reserve"
        except (ModelError, OSError) as error:
            reason = f"its tuned file cannot be used: {error}"
    return Choice(settings, None, parts, reason)


def untuned(model_id: str, reason: str) -> str:
    """The message of the log and of `--check`."""
    return (
        f"{model_id} runs untuned: {reason}: `vpsd.py tune {model_id}` finds its fastest encoding"
    )


# ------------------------------------------------------------------------------- policy: the choice

READ_TOKENS = (
    1000  # encodings are compared by the time to read this many tokens and write the 128 of DECODES
)
DECODES = {
    1: 64,
    4: 8,
    16: 2,
}  # number of decodes by size in tokens; half of the tokens are written as drafts
MIN_GAIN = 0.03  # share of the time that other types must save, and settings in a long context
MIN_AGREEMENT = 0.9  # share of tokens; less means a faulty kernel
SAMPLE_LAYERS = 4
SAMPLE_VOCABULARY = 1024  # so that a sample's output matrix costs nothing
# Micro-batch and flash attention. First the usual ones, which read prompts fastest; on some CPUs
# flash attention makes tokens of a long context slow.
KNOBS = ((256, True), (512, True), (256, False), (512, False))
# A recipe has the new type of each type that it changes. Q4_1 stores the same weights as Q4_K, with
# scales rounded to fp16. The steps of Q8_0 are 1/127 of a block's largest weight, which changes
# less than the rounding in kernels.
TO_Q8_0 = {"Q5_0": "Q8_0", "Q6_K": "Q8_0"}
FAITHFUL = TO_Q8_0 | {"Q4_K": "Q4_1"}


class Timing(NamedTuple):
    """A file's speed: seconds per token of a prompt, and seconds of one decode by its number of
    tokens.
    """

    read: float
    decode: Mapping[int, float]

    @property
    def work(self) -> float:
        """Seconds for the work of READ_TOKENS and DECODES."""
        return READ_TOKENS * self.read + sum(
            count * self.decode[size] for size, count in DECODES.items()
        )


Types = Mapping[str, str]  # of the tensors that change: new type by name


def multiplied(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """The matrices that are multiplied, and which of them gives the logits."""
    matrices = {tensor.name: tensor for tensor in tensors if tensor.is_matrix}
    output = matrices.get("output.weight") or matrices.get("token_embd.weight")
    return [
        tensor for tensor in matrices.values() if tensor.layer is not None or tensor is output
    ], output


def change_types(tensors: Sequence[Tensor], recipe: Mapping[str, str]) -> Types:
    """Apply a recipe."""
    changing = [tensor for tensor in multiplied(tensors)[0] if tensor.type in recipe]
    return {
        tensor.name: recipe[tensor.type]
        for tensor in changing
        if tensor.can_be(recipe[tensor.type])
    }


def sample_layers(tensors: Sequence[Tensor]) -> list[int]:
    """SAMPLE_LAYERS layers in which the types of tensors are about as frequent as in the whole
    model.
    """
    types: dict[int, list[str]] = defaultdict(list)
    for tensor in tensors:
        if tensor.layer is not None and tensor.is_matrix:
            types[tensor.layer].append(tensor.type)
    alike = sorted(types, key=lambda layer: (types[layer], layer))
    count = min(SAMPLE_LAYERS, len(alike))
    return sorted(alike[(2 * i + 1) * len(alike) // (2 * count)] for i in range(count))


class Form(NamedTuple):
    """A file with the settings to run it: its speed, the file's bytes, and the bytes of memory that
    it takes.
    """

    timing: Timing
    settings: Settings
    file: int
    memory: int  # estimated


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of `tune`, and its summary in words."""

    published: Form  # with the usual settings
    tuned: Form | None  # None: nothing here is faster
    passport: Passport
    agreement: float | None  # None: the weights are the published ones

    def table(self) -> str:
        old, new = self.published, self.tuned or self.published
        (old_times, was), (new_times, now) = (old.timing, old.settings), (new.timing, new.settings)
        times = [("a token of a prompt, ms", old_times.read, new_times.read)]
        for n in DECODES:
            times.append(
                (
                    f"a decode of {n} token{'s' * (n > 1)}, ms",
                    old_times.decode[n],
                    new_times.decode[n],
                )
            )
        times.append(
            (f"{READ_TOKENS} tokens read, 128 written, ms", old_times.work, new_times.work)
        )
        others = (
            ("size of the file, MB", old.file // MB, new.file // MB),
            ("memory (estimate), MB", old.memory // MB, new.memory // MB),
            ("micro-batch", was.micro_batch, now.micro_batch),
            (
                "flash attention",
                *("on" if used.uses_flash_attention else "off" for used in (was, now)),
            ),
            ("threads", was.threads, now.threads),
        )
        lines = [
            f"{cpu_name()}; {self.passport.encoding}",
            "",
            f"{'':34}{'published':>10}{'here':>12}",
        ]
        lines += [
            f"{name:34}{1e3 * a:>10.1f}{1e3 * b:>12.1f}  {a / b:.2f} x" for name, a, b in times
        ]
        lines += [f"{name:34}{a:>10}{b:>12}" for name, a, b in others]
        lines.append("")
        if self.agreement is not None:
            tokens = AGREEMENT_TOKENS - AGREEMENT_SKIP
            lines.append(
                f"same likeliest token as the published file after {self.agreement:.1%} of "
                f"{tokens} tokens of code"
            )
        if not self.tuned:
            lines.append(
                f"nothing is {MIN_GAIN:.0%} faster here than the published file, which is used "
                f"as it is"
            )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ IO: measuring

READ_SECONDS = 0.25  # spent on reading; at least once
DECODE_SECONDS = 0.1  # spent on each size of decode; at least MIN_DECODES of them
MIN_DECODES = 2
TURNS = 2
SAMPLE_READ_TOKENS = 128  # read to compare types
WHOLE_READ_TOKENS = 256  # read to compare whole files
CONTEXT_TOKENS = 2000  # read to compare settings: the cost of attention grows with the context
AGREEMENT_TOKENS = 320  # of the text on which two files are compared
AGREEMENT_SKIP = (
    64  # the first tokens of this text are not compared, since they have little context
)
OUTPUTS = MAX_DRAFT + 1  # logits that a decode may ask for
Variant = tuple[Path, Settings]


@contextlib.contextmanager
def opened(path: Path, settings: Settings) -> Iterator[Llama]:
    """The model with a context of one sequence that is as long as the measurements need."""
    model = Llama(
        path, replace(settings, n_ctx=CONTEXT_TOKENS + 2 * OUTPUTS, sequences=1), lambda _: True
    )
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
    """Cut the sequence. A recurrent state cannot be cut, and goes on."""
    if model.trim(slot, length):
        del slot.tokens[length:]


def measure(model: Llama, read: int) -> Timing:
    """Time this model: a prompt of `read` tokens, then decodes."""
    read = min(read, model.n_ctx - OUTPUTS)
    tokens, slot = [7919 * i % model.n_vocab for i in range(read)], Slot(0)  # any tokens will do

    def fastest(chunks: Sequence[Sequence[int]], outputs: int, seconds: float, least: int) -> float:
        """Decode the chunks for `seconds`, at least `least` times; return the shortest time."""
        length, spent = len(slot.tokens), list[float]()
        while len(spent) < least or (
            sum(spent) < seconds and len(slot.tokens) < model.n_ctx - OUTPUTS
        ):
            back_to(model, slot, length)
            spent.append(sum(decode(model, slot, chunk, outputs) for chunk in chunks))
        return min(spent)

    decode(
        model, slot, tokens[: max(DECODES)], max(DECODES)
    )  # the first decode after a load is slow
    back_to(model, slot, 0)
    chunks = [tokens[start : start + MAX_CHUNK] for start in range(0, len(tokens), MAX_CHUNK)]
    reading = fastest(chunks, 1, READ_SECONDS, 1)
    times = {}
    for size in DECODES:
        times[size] = fastest([tokens[:size]], size, DECODE_SECONDS, MIN_DECODES)
        back_to(model, slot, len(tokens))
    return Timing(reading / len(tokens), times)


def likeliest(variant: Variant, text: str, count: int) -> list[int]:
    """The likeliest token after each of the first `count` tokens of a text, except the first
    AGREEMENT_SKIP.
    """
    found, slot = list[int](), Slot(0)
    with opened(*variant) as model:
        tokens = model.vocabulary.tokenize(text, True)[:count]
        for start in range(0, len(tokens), OUTPUTS):
            chunk = tokens[start : start + OUTPUTS]
            decode(model, slot, chunk, len(chunk))
            found += map(model.greedy, range(len(chunk)))
    return found[AGREEMENT_SKIP:]


def agreement(
    published: Variant, tuned: Variant, text: str, count: int = AGREEMENT_TOKENS
) -> float:
    """The share of a text's first `count` tokens after which two files have the same likeliest
    token.
    """
    pairs = list(zip(likeliest(published, text, count), likeliest(tuned, text, count), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


Progress = Callable[[str, int, int], None]  # label, done, total


def compare(
    variants: Mapping[Any, Variant], read: int, step: Callable[[], None]
) -> dict[Any, Timing]:
    """The best times of each variant, measured in turns, so that a slow minute affects all of them
    alike.
    """
    found: dict[Any, list[Timing]] = {name: [] for name in variants}
    for turn in range(TURNS):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            with opened(*variants[name]) as model:
                found[name].append(measure(model, read))
            step()
    return {
        name: Timing(
            min(t.read for t in all_), {size: min(t.decode[size] for t in all_) for size in DECODES}
        )
        for name, all_ in found.items()
    }


# ----------------------------------------------------------------------------------------- IO: tune


class TuneError(Exception):
    """Why a model cannot be tuned now. The message says what was expected and what came."""


class Tuner:
    """One run of `tune`: the published file, the folder for the files to try, and the progress."""

    def __init__(
        self, path: Path, sha256: str, settings: Settings, folder: Path, room: int, report: Progress
    ) -> None:
        self.path, self.sha256, self.settings, self.folder = path, sha256, settings, folder
        self.stamp = file_stamp(path)
        self.room, self.report = room, report
        self.source = Source(path)
        self.tensors = self.source.tensors
        self.options: list[Types] = []  # the first one changes nothing
        for recipe in ({}, TO_Q8_0, FAITHFUL):
            if (types := change_types(self.tensors, recipe)) not in self.options:
                self.options.append(types)
        self.layers = sample_layers(self.tensors)
        self.knobs = [
            replace(settings, micro_batch=size, flash_attention=flash) for size, flash in KNOBS
        ]
        if not settings.fixed_threads and cpus() != settings.threads:
            self.knobs.append(replace(settings, threads=cpus()))
        self.done, self.steps = 0, TURNS * (len(self.options) + len(self.knobs) + 2)

    def step(self) -> None:
        self.done += 1
        self.report("measuring", self.done, self.steps)

    def memory(self, types: Types, settings: Settings) -> int:
        """Bytes of memory that the model takes in these types."""
        changed = (tensor for tensor in self.tensors if tensor.name in types)
        grown = sum(
            tensor.size(types[tensor.name]) - tensor.size(tensor.type) for tensor in changed
        )
        return grown + sum(needed(self.path, [settings])[0].values())

    def check_room(self) -> None:
        """TuneError or OSError with the figures if the memory or the disk is too small."""
        if (need := self.memory({}, self.settings)) > self.room:
            raise TuneError(
                f"expected {need / MB:.0f} MB of memory beside the reserve, got "
                f"{self.room / MB:.0f} MB"
            )
        check_disk(
            self.folder.parent, 3 * self.path.stat().st_size // 2
        )  # a tuned file; samples take less

    def sample(self, types: Types, layers: Sequence[int]) -> Path:
        """Write a file with these changes, these layers, a small vocabulary and no tokenizer."""
        path = self.folder / f"sample-{len(list(self.folder.iterdir()))}"
        values: dict[str, str | int] = {
            f"{self.source.architecture}.block_count": len(layers),
            f"{self.source.architecture}.vocab_size": min(
                SAMPLE_VOCABULARY, self.source.vocabulary
            ),
            "tokenizer.ggml.model": "no_vocab",
        }
        self.source.write(path, types, values, layers, SAMPLE_VOCABULARY)
        return path

    def fastest(self, samples: Sequence[Variant], read: int) -> int:
        """The index of the fastest sample, 0 if the gain is less than MIN_GAIN. Removes the
        samples.
        """
        found = compare(dict(enumerate(samples)), read, self.step)
        for path in self.folder.iterdir():
            path.unlink()
        best = min(found, key=lambda index: found[index].work)
        return best if found[best].work <= (1 - MIN_GAIN) * found[0].work else 0

    def choose(self) -> tuple[Types, Settings]:
        """The fastest types; and micro-batch, attention and thread count for these types, in a long
        context.
        """
        fitting = [
            types for types in self.options if self.memory(types, self.settings) <= self.room
        ]
        try:
            samples = [(self.sample(types, self.layers), self.settings) for types in fitting]
            types = fitting[self.fastest(samples, SAMPLE_READ_TOKENS)]
            # Half the layers: attention takes the same share of each.
            return types, self.choose_settings(types, self.sample(types, self.layers[::2]))
        except ModelError:  # the kind of a layer depends on its place
            return {}, self.choose_settings({}, self.path)

    def choose_settings(self, types: Types, sample: Path) -> Settings:
        knobs = [
            knob
            for knob in self.knobs
            if knob == self.settings or self.memory(types, knob) <= self.room
        ]
        return knobs[self.fastest([(sample, knob) for knob in knobs], CONTEXT_TOKENS)]

    def passport(self, types: Types, settings: Settings, size: int) -> Passport:
        matrices, output = multiplied(self.tensors)
        changed = [tensor for tensor in matrices if tensor.name in types]
        changes = {
            (tensor.type + " (output)" * (tensor is output), types[tensor.name])
            for tensor in changed
        }
        return Passport(
            source=self.sha256,
            file=self.stamp,
            library=llama_cpp.__version__,
            cpu=cpu_features(),
            cpus=cpus(),
            types=dict(sorted(changes)),
            size=size,
            **{name: getattr(settings, name) for name in CHOSEN},
        )

    def run(self, path: Path) -> Outcome:
        """Write a tuned file, or none if no types are faster."""
        self.check_room()
        types, settings = self.choose()
        variants = {"published": (self.path, self.settings)}
        if types:
            self.source.write(path, types, report=functools.partial(self.report, "writing"))
            variants["tuned"] = (path, settings)
        elif settings != self.settings:
            variants["tuned"] = (self.path, settings)
        found = compare(variants, WHOLE_READ_TOKENS, self.step)
        if self.done < self.steps:  # some settings do not fit, or there is nothing to compare with
            self.report("measuring", self.steps, self.steps)
        forms = {
            name: Form(
                found[name],
                used,
                file.stat().st_size,
                self.memory(types if file == path else {}, used),
            )
            for name, (file, used) in variants.items()
        }
        # The settings were chosen in a long context, where they save time. In this short one they
        # may hardly cost any.
        limit = found["published"].work * (1 - MIN_GAIN if types else 1 + MIN_GAIN)
        tuned, same = forms.get("tuned"), None
        if tuned and tuned.timing.work > limit:
            tuned = None
        if tuned and types:
            code = Path(__file__).read_text()[
                -8 * AGREEMENT_TOKENS :
            ]  # source code, as in users' prompts
            same = agreement(variants["published"], variants["tuned"], code)
            if same < MIN_AGREEMENT:
                tuned = same = None
        if not tuned:
            types, settings = {}, self.settings
        return Outcome(
            forms["published"], tuned, self.passport(types, settings, file_size(path)), same
        )


def tune(
    published: Path,
    sha256: str,
    settings: Settings,
    room: int,
    report: Progress,
    output: TextIO,
    dry_run: bool = False,
) -> Outcome:
    """Find the fastest encoding of a published file, and put the tuned file in place (not with
    `dry_run`).

    `sha256` is the published file's, `room` the bytes of memory that the model may take. The table
    of the outcome is printed to `output` before the file is used. After a TuneError, ModelError or
    OSError nothing has changed.
    """
    target = tuned_path(settings.state_dir, published)
    with alone_in(target.parent) as folder:
        path = folder / "tuned"
        outcome = Tuner(published, sha256, settings, folder, room, report).run(path)
        print(outcome.table(), file=output, flush=True)
        if not dry_run:
            passport = folder / "passport"
            passport.write_text(
                json.dumps(asdict(outcome.passport))
            )  # before anything changes: the disk may be full
            _remove(target)
            if outcome.passport.types:
                with path.open("rb") as written:
                    os.fsync(
                        written.fileno()
                    )  # otherwise a crash could leave a passport without weights
                os.replace(path, target)
            os.replace(passport, passport_path(target))
    return outcome


def _remove(tuned: Path) -> None:
    passport_path(tuned).unlink(missing_ok=True)  # first: weights without a passport are not used
    tuned.unlink(missing_ok=True)


def remove_tuned(published: Path, settings: Settings) -> bool:
    """Go back to the published file, with the settings that were found; False if it is in use
    already. TuneError if a model is being tuned.
    """
    target = tuned_path(settings.state_dir, published)
    if not target.parent.exists():
        return False
    with alone_in(target.parent):
        try:
            passport = json.loads(passport_path(target).read_text())
            # Kept without types, so that the model does not count as untuned.
            write_atomically(
                passport_path(target),
                json.dumps(passport | {"types": {}, "format": PASSPORT_FORMAT}).encode(),
            )
        except (FileNotFoundError, ValueError, TypeError):
            passport = {}
        target.unlink(missing_ok=True)
    return bool(passport.get("types"))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """A folder for temporary files in `folder`, for one process at a time. TuneError if another
    process has one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuneError(
                "another process is tuning a model; expected to be the only one"
            ) from None
        for left in folder.glob(".work-*"):  # left by a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as temporary:
            yield Path(temporary)
