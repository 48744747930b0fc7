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
  is faster. Other settings alone are dropped if they cost more than MIN_GAIN there.

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
import signal
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import llama_cpp

from cerebrum.settings import write_atomically
from cerebrum.vps.gguf import Source, Tensor, Types, Values
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
)
from cerebrum.vps.memory import needed
from cerebrum.vps.schedule import decode
from cerebrum.vps.vocabulary import api

# ------------------------------------------------------------------------------------- the passport

PASSPORT_FORMAT = 3
CHOSEN = ("threads", "micro_batch", "flash_attention")  # settings that `tune` chooses


@functools.cache  # llama.cpp writes the text into one buffer for all threads
def cpu_features() -> str:
    """A hash of the CPU's features that llama.cpp uses. It counts only those that it was built
    for.
    """
    return hashlib.sha256(api.llama_print_system_info()).hexdigest()[:16]


def cpu_name() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


class Passport(NamedTuple):
    """The source, the machine and the settings that a tuned file was made for."""

    source: str  # sha256 of the published file
    file: str  # its `file_stamp`
    library: str  # version of llama-cpp-python
    cpu: str  # `cpu_features`
    cpus: int  # that the process may use
    threads: int
    micro_batch: int
    flash_attention: bool
    types: Types  # changed types, old to new; if empty, the published file is used
    size: int  # of the file in use
    # Seconds of the decodes of DECODES, by the published file and the one in use; empty: unknown.
    published: Sequence[float] = ()
    here: Sequence[float] = ()
    format: int = PASSPORT_FORMAT

    @property
    def encoding(self) -> str:
        """The changed types in words, as shown by `/v1/models`."""
        if not self.types:
            return "published"
        return "tuned: " + ", ".join(f"{old} to {new}" for old, new in self.types.items())


class TunedFile(NamedTuple):
    """The model in an encoding that is faster on this machine."""

    path: Path  # the published file itself, if only the settings differ
    settings: Settings
    passport: Passport


def tuned_path(state_dir: Path, published: Path) -> Path:
    return state_dir / "tuned" / published.name


def passport_path(tuned: Path) -> Path:
    return tuned.with_name(f"{tuned.name}.json")


def machine() -> dict[str, Any]:
    """The fields of a passport that are the same for each model here."""
    return {"library": llama_cpp.__version__, "cpu": cpu_features(), "cpus": cpus()}


def expected_passport(published: Path, settings: Settings, sha256: str) -> dict[str, Any]:
    """The fields that a passport must have to be used; see `find_tuned`."""
    expected = {"format": PASSPORT_FORMAT, **machine()}
    if settings.fixed_threads:
        expected["threads"] = settings.threads
    if sha256:
        expected["source"] = sha256
    else:
        expected["file"] = file_stamp(published)
    return expected


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
    for name, here in expected_passport(published, settings, sha256).items():
        made_for = getattr(passport, name)
        if made_for != here:
            return None, f"it was tuned for {name} {made_for}, here it is {here}"
    if passport.types and passport.size != file_size(path):
        return None, "its tuned file is missing or cut short"
    chosen = {name: getattr(passport, name) for name in CHOSEN}
    used = replace(settings, **chosen)
    file = path if passport.types else published
    return TunedFile(file, used, passport), ""


def untuned(model_id: str, reason: str) -> str:
    """The message of the log and of `--check`."""
    return (
        f"{model_id} runs untuned: {reason}: `vpsd.py tune {model_id}` finds its fastest encoding"
    )


# ------------------------------------------------------------------------------- policy: the choice

# Encodings are compared by the time to read this many tokens and to write the 128 of DECODES.
READ_TOKENS = 1000
# Number of decodes by size in tokens; half of the tokens are written as drafts.
DECODES = {1: 64, 4: 8, 16: 2}
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
        writing = sum(count * self.decode[size] for size, count in DECODES.items())
        return READ_TOKENS * self.read + writing


def change_types(tensors: Sequence[Tensor], recipe: Types) -> Types:
    """Apply a recipe, which has the new type by the old one, to the matrices that are multiplied:
    those of the layers, and the one that gives the logits.
    """
    matrices = {tensor.name: tensor for tensor in tensors if tensor.is_matrix}
    output = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    types = {}
    for name, matrix in matrices.items():
        is_used = matrix.layer is not None or name == output
        new = recipe.get(matrix.type)
        if is_used and new and matrix.can_be(new):
            types[name] = new
    return types


def sample_layers(tensors: Sequence[Tensor]) -> list[int]:
    """About SAMPLE_LAYERS layers, in which the types of tensors are about as frequent as in the
    whole model.
    """
    types = defaultdict(list)
    for tensor in tensors:
        if tensor.layer is not None and tensor.is_matrix:
            types[tensor.layer].append(tensor.type)
    by_types = sorted(types, key=types.__getitem__)
    step = max(1, len(by_types) // SAMPLE_LAYERS)
    return sorted(by_types[step // 2 :: step])


class Form(NamedTuple):
    """A file with the settings to run it: its speed, the file's bytes, and the bytes of memory that
    it takes.
    """

    timing: Timing
    settings: Settings
    file: int
    memory: int  # estimated

    def seconds(self) -> dict[str, float]:
        """Its times by the names of their rows in the table."""
        rows = {"a token of a prompt, ms": self.timing.read}
        for size in DECODES:
            plural = "s" if size > 1 else ""
            rows[f"a decode of {size} token{plural}, ms"] = self.timing.decode[size]
        rows[f"{READ_TOKENS} tokens read, 128 written, ms"] = self.timing.work
        return rows

    def others(self) -> dict[str, int | str]:
        """Whatever else the table shows, by row."""
        return {
            "size of the file, MB": self.file // MB,
            "memory (estimate), MB": self.memory // MB,
            "micro-batch": self.settings.micro_batch,
            "flash attention": "on" if self.settings.uses_flash_attention else "off",
            "threads": self.settings.threads,
        }


class Outcome(NamedTuple):
    """The result of `tune`, and its summary in words."""

    published: Form  # with the usual settings
    tuned: Form | None  # None: nothing here is faster
    passport: Passport
    agreement: float | None  # None: the weights are the published ones

    def table(self) -> str:
        here = self.tuned or self.published
        head = f"{'':34}{'published':>10}{'here':>12}"
        lines = [f"{cpu_name()}; {self.passport.encoding}", "", head]
        seconds = here.seconds()
        for name, old in self.published.seconds().items():
            new = seconds[name]
            lines.append(f"{name:34}{1e3 * old:>10.1f}{1e3 * new:>12.1f}  {old / new:.2f} x")
        others = here.others()
        lines += [
            f"{name:34}{old:>10}{others[name]:>12}" for name, old in self.published.others().items()
        ]
        lines.append("")
        if self.agreement is not None:
            lines.append(
                f"same likeliest token as the published file after {self.agreement:.1%} "
                f"of {AGREEMENT_TOKENS - AGREEMENT_SKIP} tokens of code"
            )
        if not self.tuned:
            lines.append(
                f"nothing is {MIN_GAIN:.0%} faster here than the published file, "
                f"which is used as it is"
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
AGREEMENT_SKIP = 64  # the first tokens of this text are not compared: they have little context
OUTPUTS = MAX_DRAFT + 1  # logits that a decode may ask for
Variant = tuple[Path, Settings]


def opened(path: Path, settings: Settings) -> contextlib.closing[Llama]:
    """The model with a context of one sequence that is as long as the measurements need."""
    one_long = replace(settings, n_ctx=CONTEXT_TOKENS + 2 * OUTPUTS, sequences=1)
    return contextlib.closing(Llama(path, one_long, lambda _: True))


def measure(model: Llama, read: int) -> Timing:
    """Time this model: a prompt of `read` tokens, then decodes."""
    most = model.n_ctx - OUTPUTS
    read = min(read, most)
    tokens = [7919 * i % model.n_vocab for i in range(read)]  # any tokens will do
    slot = Slot(0)

    def fastest(
        length: int, chunks: Sequence[list[int]], outputs: int, seconds: float, least: int
    ) -> float:
        """The shortest time of decoding the chunks behind `length` tokens, tried for `seconds` and
        at least `least` times.
        """
        spent = list[float]()
        while len(spent) < least or (sum(spent) < seconds and len(slot.tokens) < most):
            if model.trim(slot, length):  # a recurrent state cannot be cut, and goes on
                del slot.tokens[length:]
            spent.append(sum(decode(model, slot, chunk, outputs) for chunk in chunks))
        return min(spent)

    largest = max(DECODES)
    decode(model, slot, tokens[:largest], largest)  # the first decode after a load is slow
    chunks = [tokens[start : start + MAX_CHUNK] for start in range(0, len(tokens), MAX_CHUNK)]
    reading = fastest(0, chunks, 1, READ_SECONDS, 1)
    times = {}
    for size in DECODES:
        times[size] = fastest(read, [tokens[:size]], size, DECODE_SECONDS, MIN_DECODES)
    return Timing(reading / read, times)


def likeliest(variant: Variant, text: str) -> list[int]:
    """The likeliest token after each of the first AGREEMENT_TOKENS of a text, except the first
    AGREEMENT_SKIP.
    """
    found = list[int]()
    slot = Slot(0)
    with opened(*variant) as model:
        tokens = model.vocabulary.tokenize(text, True)[:AGREEMENT_TOKENS]
        for start in range(0, len(tokens), OUTPUTS):
            chunk = tokens[start : start + OUTPUTS]
            decode(model, slot, chunk, len(chunk))
            found += map(model.greedy, range(len(chunk)))
    return found[AGREEMENT_SKIP:]


def agreement(published: Variant, tuned: Variant, text: str) -> float:
    """The share of a text's first tokens after which two files have the same likeliest token."""
    expected = likeliest(published, text)
    pairs = zip(expected, likeliest(tuned, text), strict=True)
    return sum(old == new for old, new in pairs) / len(expected)


Progress = Callable[[str, int, int], None]  # label, done, total


def compare(variants: Sequence[Variant], read: int, step: Callable[[], None]) -> list[Timing]:
    """The best times of each variant, measured in turns, so that a slow minute affects all of them
    alike.
    """
    found: list[list[Timing]] = [[] for _ in variants]
    order = list(range(len(variants)))
    for _ in range(TURNS):
        for index in order:
            with opened(*variants[index]) as model:
                found[index].append(measure(model, read))
            step()
        order.reverse()
    return [shortest(timings) for timings in found]


def shortest(timings: Sequence[Timing]) -> Timing:
    """The shortest of each time."""
    decode = {size: min(timing.decode[size] for timing in timings) for size in DECODES}
    return Timing(min(timing.read for timing in timings), decode)


# ----------------------------------------------------------------------------------------- IO: tune


class TuneError(Exception):
    """Why a model cannot be tuned now. The message says what was expected and what came."""


@dataclass
class Tuner:
    """One run of `tune`: the published file, the folder for the files to try, and the progress."""

    path: Path
    sha256: str
    settings: Settings
    folder: Path
    room: int
    report: Progress

    def __post_init__(self) -> None:
        self.stamp = file_stamp(self.path)
        self.source = Source(self.path)
        self.tensors = self.source.tensors
        self.options: list[Types] = []  # the first changes nothing
        for recipe in ({}, TO_Q8_0, FAITHFUL):
            types = change_types(self.tensors, recipe)
            if types not in self.options:
                self.options.append(types)
        self.layers = sample_layers(self.tensors)
        settings = self.settings
        self.candidates = [  # the first fits: `check_room` has asked
            replace(settings, micro_batch=size, flash_attention=flash) for size, flash in KNOBS
        ]
        if not settings.fixed_threads and cpus() != settings.threads:
            self.candidates.append(replace(settings, threads=cpus()))
        self.done = 0
        self.steps = TURNS * (len(self.options) + len(self.candidates) + 2)

    def step(self) -> None:
        self.done += 1
        self.report("measuring", self.done, self.steps)

    def memory(self, types: Types, settings: Settings) -> int:
        """Bytes of memory that the model takes in these types."""
        total = sum(needed(self.path, [settings])[0].values())
        for tensor in self.tensors:
            if tensor.name in types:
                total += tensor.size(types[tensor.name]) - tensor.size(tensor.type)
        return total

    def check_room(self) -> None:
        """TuneError or OSError with the figures if the memory or the disk is too small."""
        need = self.memory({}, self.settings)
        if need > self.room:
            raise TuneError(
                f"expected {need / MB:.0f} MB of memory beside the reserve, "
                f"got {self.room / MB:.0f} MB"
            )
        largest = 3 * self.path.stat().st_size // 2  # of a tuned file; samples take less
        check_disk(self.folder.parent, largest)

    def sample(self, types: Types, layers: Sequence[int]) -> Path:
        """Write a file with these changes, these layers, a small vocabulary and no tokenizer."""
        path = self.folder / f"sample-{len(list(self.folder.iterdir()))}"
        architecture = self.source.architecture
        values: Values = {
            f"{architecture}.block_count": len(layers),
            f"{architecture}.vocab_size": min(SAMPLE_VOCABULARY, self.source.vocabulary),
            "tokenizer.ggml.model": "no_vocab",
        }
        self.source.write(path, types, values, layers, SAMPLE_VOCABULARY)
        return path

    def fastest(self, samples: Sequence[Variant], read: int) -> int:
        """The index of the fastest sample, 0 if the gain is less than MIN_GAIN. Removes the
        samples.
        """
        work = [timing.work for timing in compare(samples, read, self.step)]
        for path in self.folder.iterdir():
            path.unlink()
        best = min(work)
        return work.index(best) if best <= (1 - MIN_GAIN) * work[0] else 0

    def search(self) -> tuple[Types, Settings]:
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
            return types, self.fastest_settings(types, self.sample(types, self.layers[::2]))
        except ModelError:  # llama.cpp derives the kind of a layer from its number
            return {}, self.fastest_settings({}, self.path)

    def fastest_settings(self, types: Types, sample: Path) -> Settings:
        fitting = [
            settings for settings in self.candidates if self.memory(types, settings) <= self.room
        ]
        variants = [(sample, settings) for settings in fitting]
        return fitting[self.fastest(variants, CONTEXT_TOKENS)]

    def passport(self, types: Types, published: Form, here: Form) -> Passport:
        """`here` is the form in use, which changes these types."""
        changes = {}
        for tensor in self.tensors:
            if tensor.name in types:
                old = tensor.type if tensor.layer is not None else f"{tensor.type} (output)"
                changes[old] = types[tensor.name]
        found = {name: getattr(here.settings, name) for name in CHOSEN} | machine()
        found["published"] = list(published.timing.decode.values())
        found["here"] = list(here.timing.decode.values())
        return Passport(
            source=self.sha256,
            file=self.stamp,
            types=dict(sorted(changes.items())),
            size=here.file,
            **found,
        )

    def run(self, path: Path) -> Outcome:
        """Write a tuned file, or none if no types are faster."""
        self.check_room()
        types, settings = self.search()
        published = self.path, self.settings
        tuned = self.path, settings
        if types:
            self.source.write(path, types, report=functools.partial(self.report, "writing"))
            tuned = path, settings
        variants = [published] if tuned == published else [published, tuned]
        timings = compare(variants, WHOLE_READ_TOKENS, self.step)
        if self.done < self.steps:  # some settings do not fit, or there is nothing to compare with
            self.report("measuring", self.steps, self.steps)
        usual = self.form({}, published, timings[0])
        best = self.form(types, tuned, timings[-1])
        # Types must save time. Settings were chosen in a long context, where they save time; in
        # this short one they may hardly cost any.
        limit = 1 - MIN_GAIN if types else 1 + MIN_GAIN
        pays = tuned != published and best.timing.work <= limit * usual.timing.work
        same = None
        if pays and types:
            code = Path(__file__).read_text()  # source code, as in users' prompts
            same = agreement(published, tuned, code[-8 * AGREEMENT_TOKENS :])
            pays = same >= MIN_AGREEMENT
        if not pays:
            return Outcome(usual, None, self.passport({}, usual, usual), None)
        return Outcome(usual, best, self.passport(types, usual, best), same)

    def form(self, types: Types, variant: Variant, timing: Timing) -> Form:
        file, settings = variant
        return Form(timing, settings, file.stat().st_size, self.memory(types, settings))


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
            _put_in_place(path, outcome.passport, target)
    return outcome


def _put_in_place(path: Path, passport: Passport, target: Path) -> None:
    """Replace the tuned file at `target` and its passport; only the passport if it has no types."""
    draft = path.with_name("passport")
    # Before anything changes: the disk may be full.
    draft.write_text(json.dumps(passport._asdict()))
    passport_path(target).unlink(missing_ok=True)  # first: weights without a passport are not used
    target.unlink(missing_ok=True)
    if passport.types:
        with path.open("rb") as written:
            os.fsync(written.fileno())  # otherwise a crash could leave a passport without weights
        os.replace(path, target)
    os.replace(draft, passport_path(target))


def remove_tuned(published: Path, settings: Settings) -> bool:
    """Go back to the published file, with the settings that were found; False if it is in use
    already. TuneError if a model is being tuned.
    """
    target = tuned_path(settings.state_dir, published)
    if not target.parent.exists():
        return False
    passport = {}
    with alone_in(target.parent):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            passport = json.loads(passport_path(target).read_text())
            # Kept without types, so that the model does not count as untuned.
            kept = passport | {"types": {}, "format": PASSPORT_FORMAT}
            kept["here"] = passport.get("published", [])
            write_atomically(passport_path(target), json.dumps(kept).encode())
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

            def end(number: int, _frame: object) -> None:
                # Not by an exception, which would be lost while llama.cpp calls Python.
                shutil.rmtree(temporary, ignore_errors=True)
                os._exit(128 + number)

            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                    signal.signal(number, end)
            yield Path(temporary)
