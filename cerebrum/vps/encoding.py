"""The encoding of the weights: find the tensor types that this machine computes fastest, and write
a file in them.

`tune` writes the *tuned file*: the published model in the types that are faster on this CPU. It
makes only changes that preserve the weights (`FAITHFUL`).

- The types of the file and those that may replace them are timed, each by a *sample*: a small model
  whose matrices all have this type. `choose` predicts the speed of models by the same samples.
- The whole tuned file, with and without flash attention and with more threads, and the published
  one do the same work in turns. The fastest is used, if it saves MIN_GAIN of the time.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import llama_cpp

from cerebrum.vps.gguf import Source, Types, write_sample
from cerebrum.vps.llama import MAX_CHUNK, MAX_DRAFT, MB, Llama, Settings, Slot, cpus
from cerebrum.vps.memory import check_disk, file_size, file_stamp, needed
from cerebrum.vps.schedule import decode
from cerebrum.vps.vocabulary import api

# ------------------------------------------------------------------------------------- the passport


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
    flash_attention: bool
    types: Types  # changed types, old to new; if empty, the published file is used
    size: int  # of the file in use
    # Seconds of the decodes of DECODES, by the published file with the usual settings, and by the
    # one in use; equal: nothing is faster; empty: unknown.
    published: Sequence[float] = ()
    here: Sequence[float] = ()

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


def read_passport(tuned: Path) -> Passport:
    """The passport of a tuned file. OSError, or ValueError or TypeError if it is none."""
    found = json.loads(passport_path(tuned).read_text())
    # Other versions may write more.
    return Passport(**{name: found[name] for name in Passport._fields if name in found})


def machine() -> dict[str, Any]:
    """The fields of a passport that are the same for each model here."""
    return {"library": llama_cpp.__version__, "cpu": cpu_features(), "cpus": cpus()}


def find_tuned(
    published: Path, settings: Settings, sha256: str = ""
) -> tuple[TunedFile | None, str]:
    """The tuned file for a published one, or None and the reason. OSError if there is no published
    file.

    `sha256` is the digest that the published file should have; `check_digest` verifies it. If it is
    unknown (empty), the published file must not have been touched since.
    """
    path = tuned_path(settings.state_dir, published)
    expected = machine()
    if settings.fixed_threads:
        expected["threads"] = settings.threads
    if sha256:
        expected["source"] = sha256
    else:
        expected["file"] = file_stamp(published)
    try:
        passport = read_passport(path)
    except FileNotFoundError:
        return None, "there is no tuned file"
    except (OSError, ValueError, TypeError):
        return None, "its passport cannot be read"
    for name, here in expected.items():
        made_for = getattr(passport, name)
        if made_for != here:
            return None, f"it was tuned for {name} {made_for}, here it is {here}"
    if passport.types and passport.size != file_size(path):
        return None, "its tuned file is missing or cut short"
    used = replace(settings, threads=passport.threads, flash_attention=passport.flash_attention)
    return TunedFile(path if passport.types else published, used, passport), ""


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
MIN_GAIN = 0.03  # share of the time that other types or settings must save
# The new type by the old one. Q4_1 stores the same weights as Q4_K, with scales rounded to fp16.
# The steps of Q8_0 are 1/127 of a block's largest weight, which changes less than the rounding in
# kernels.
FAITHFUL = {"Q4_K": "Q4_1", "Q5_0": "Q8_0", "Q6_K": "Q8_0"}


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

    def rows(self) -> dict[str, float]:
        """Its times by the names of their rows in the table."""
        rows = {"a token of a prompt, ms": self.read}
        rows |= {f"a decode of {size}, ms": seconds for size, seconds in self.decode.items()}
        return rows | {f"{READ_TOKENS} tokens read, 128 written, ms": self.work}


def fastest(timings: Sequence[Timing]) -> int:
    """The index of the fastest, 0 if it saves less than MIN_GAIN of the first one's time."""
    work = [timing.work for timing in timings]
    best = min(work)
    return work.index(best) if best <= (1 - MIN_GAIN) * work[0] else 0


def faster_types(timings: Mapping[str, Timing]) -> dict[str, str]:
    """The changes of types that pay, by the times of the types."""
    return {old: new for old, new in FAITHFUL.items() if fastest([timings[old], timings[new]])}


def comparison(passport: Passport, published: Timing, here: Timing) -> str:
    """A table of the times of the published file with the usual settings, and of what will be used;
    they are one if nothing is faster.
    """
    flash = "on" if passport.flash_attention else "off"
    used = f"{passport.encoding}; flash attention {flash}, threads: {passport.threads}"
    lines = [f"{cpu_name()}; {used}", "", f"{'':34}{'published':>10}{'here':>12}"]
    times = here.rows()
    for name, old in published.rows().items():
        new = times[name]
        lines.append(f"{name:34}{1e3 * old:>10.1f}{1e3 * new:>12.1f}  {old / new:.2f} x")
    if here is published:
        lines.append(
            f"\nnothing is {MIN_GAIN:.0%} faster here than the published file, "
            f"which is used as it is"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ IO: measuring

MEASURE_SECONDS = 0.2  # spent on reading, and on each size of decode; at least one of each
SAMPLE_READ_TOKENS = 512  # so that attention takes about as large a share as in real prompts
OUTPUTS = MAX_DRAFT + 1  # logits that a decode may ask for
Progress = Callable[[str, int, int], None]  # label, done, total


def opened(path: Path, settings: Settings) -> contextlib.closing[Llama]:
    """The model with a context of one sequence that is as long as the measurements need."""
    settings = replace(settings, n_ctx=READ_TOKENS + 2 * OUTPUTS, sequences=1)
    return contextlib.closing(Llama(path, settings))


def measure(model: Llama, read: int) -> Timing:
    """Time this model: a prompt of `read` tokens, then decodes."""
    read = min(read, model.n_ctx - OUTPUTS)
    tokens = [7919 * i % model.n_vocab for i in range(read + OUTPUTS)]  # any tokens will do
    slot = Slot(0)

    def shortest_time(start: int, end: int, outputs: int) -> float:
        """Of decoding these tokens behind those before them."""
        spent = list[float]()
        while sum(spent) < MEASURE_SECONDS:
            model.cut(slot, start)  # a recurrent state begins again
            chunks = [tokens[at : min(end, at + MAX_CHUNK)] for at in range(start, end, MAX_CHUNK)]
            spent.append(sum(decode(model, slot, chunk, outputs) for chunk in chunks))
        return min(spent)

    largest = max(DECODES)
    decode(model, slot, tokens[:largest], largest)  # the first decode after a load is slow
    times = {size: shortest_time(read, read + size, size) for size in DECODES}
    return Timing(shortest_time(0, read, 1) / read, times)


def compare(variants: Sequence[tuple[Path, Settings]], report: Progress) -> list[Timing]:
    """The best times of each variant, measured in turns, so that a slow minute affects all of them
    alike.
    """
    order = [*variants, *reversed(variants)]
    timings = []
    for done, variant in enumerate(order, 1):
        with opened(*variant) as model:
            timings.append(measure(model, READ_TOKENS))
        report("measuring files", done, len(order))
    # The first and the last are of one variant, the second and the last but one of the next.
    pairs = zip(timings, reversed(timings), strict=True)
    return list(map(shortest, pairs))[: len(variants)]


def shortest(timings: Sequence[Timing]) -> Timing:
    """The shortest of each time."""
    decode = {size: min(timing.decode[size] for timing in timings) for size in DECODES}
    return Timing(min(timing.read for timing in timings), decode)


def time_types(settings: Settings, folder: Path, report: Progress) -> dict[str, Timing]:
    """The times of a sample in each type that `FAITHFUL` names. Samples are written to `folder`.
    ModelError if llama.cpp fails, OSError if the disk is too small.
    """
    # Flash attention is slow behind a long context on some CPUs, and little faster on others.
    plain = replace(settings, flash_attention=False)
    types = sorted({*FAITHFUL, *FAITHFUL.values()})
    path = folder / "sample"
    found = {}
    for done, kind in enumerate(types, 1):
        write_sample(path, kind)
        with opened(path, plain) as model:
            found[kind] = measure(model, SAMPLE_READ_TOKENS)
        path.unlink()
        report("measuring types of weights", done, len(types))
    return found


# ----------------------------------------------------------------------------------------- IO: tune


class TuneError(Exception):
    """Why a model cannot be tuned now. The message says what was expected and what came."""


def variants_of(settings: Settings) -> list[Settings]:
    """These settings, and others that may be faster."""
    found = [settings, replace(settings, flash_attention=False)]
    if not settings.fixed_threads and cpus() != settings.threads:
        found.append(replace(settings, threads=cpus()))
    return found


def tune(
    published: Path,
    sha256: str,
    settings: Settings,
    room: int,
    report: Progress,
    output: TextIO,
    dry_run: bool = False,
) -> Passport:
    """Find the fastest encoding of a published file, and put the tuned file in place (not with
    `dry_run`).

    `sha256` is the published file's, `room` the bytes of memory that the model may take. The
    comparison is printed to `output` before the file is used. After a TuneError, ModelError or
    OSError nothing has changed.
    """
    stamp = file_stamp(published)
    candidates = variants_of(settings)
    memory = [sum(parts.values()) for parts in needed(published, candidates)]
    if memory[0] > room:
        raise TuneError(
            f"expected {memory[0] / MB:.0f} MB of memory beside the reserve, got {room / MB:.0f} MB"
        )
    with alone_in(settings.state_dir) as folder:
        check_disk(folder, 3 * file_size(published) // 2)  # of a tuned file
        source = Source(published)
        types = source.changes(faster_types(time_types(settings, folder, report)))
        changed = [tensor for tensor in source.tensors if tensor.name in types]
        growth = sum(tensor.size(types[tensor.name]) - tensor.data.nbytes for tensor in changed)
        file = published
        left = room
        if types and memory[0] + growth <= room:
            file = folder / "tuned"
            source.write(file, types, functools.partial(report, "writing"))
            left -= growth
        fitting = [
            (file, used) for used, need in zip(candidates, memory, strict=True) if need <= left
        ]
        variants = list(dict.fromkeys([(published, settings), *fitting]))
        timings = compare(variants, report)
        best = fastest(timings)
        file, used = variants[best]
        converted = changed if file != published else []
        by_type = sorted((tensor.type, types[tensor.name]) for tensor in converted)
        times = [list(timings[place].decode.values()) for place in (0, best)]
        passport = Passport(
            sha256,
            stamp,
            **machine(),
            threads=used.threads,
            flash_attention=used.flash_attention,
            types=dict(by_type),
            size=file_size(file),
            published=times[0],
            here=times[1],
        )
        table = comparison(passport, timings[0], timings[best])
        print(table, file=output, flush=True)
        if not dry_run:
            put_in_place(folder, passport, tuned_path(settings.state_dir, published))
    return passport


def put_in_place(folder: Path, passport: Passport, target: Path) -> None:
    """Replace the tuned file at `target` by the one in `folder` and its passport; only the passport
    if it has no types.
    """
    draft = folder / "passport"
    # Before anything changes: the disk may be full.
    draft.write_text(json.dumps(passport._asdict()))
    passport_path(target).unlink(missing_ok=True)  # first: weights without a passport are not used
    target.unlink(missing_ok=True)
    if passport.types:
        with (folder / "tuned").open("rb") as written:
            os.fsync(written.fileno())  # otherwise a crash could leave a passport without weights
        os.replace(folder / "tuned", target)
    os.replace(draft, passport_path(target))


def remove_tuned(published: Path, settings: Settings) -> bool:
    """Go back to the published file, with the settings that were found; False if it is in use
    already. TuneError if a model is being tuned.
    """
    target = tuned_path(settings.state_dir, published)
    with alone_in(settings.state_dir) as folder:
        try:
            passport = read_passport(target)
        except (OSError, ValueError, TypeError):
            return False
        # A passport without types, so that the model does not count as untuned.
        put_in_place(folder, passport._replace(types={}, here=passport.published), target)
    return bool(passport.types)


@contextlib.contextmanager
def alone_in(state_dir: Path) -> Iterator[Path]:
    """A folder for temporary files, for one process at a time. TuneError if another process has
    it.
    """
    folder = state_dir / "tuned"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuneError(
                "another process is tuning a model; expected to be the only one"
            ) from None
        for left in folder.glob(".work*"):  # left by a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".work") as temporary:
            yield Path(temporary)
