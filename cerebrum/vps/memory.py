"""A model's file: how much memory and disk it takes, how much there is, and which context fits; its
digest, and whether llama.cpp accepts it.

llama.cpp itself reports what a model takes: it makes the model and its context without allocating
them. It ends the process at some headers, so a child process reads each file first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import psutil

from cerebrum.vps.llama import (
    MB,
    Llama,
    ModelError,
    Settings,
    Slot,
    check_kind,
    context_params,
    llama_log,
    load_model,
)
from cerebrum.vps.vocabulary import api

MIN_FIT_TOKENS = 2048  # a shorter context holds too little of a file beside its completion
FIT_STEP_TOKENS = 256  # llama.cpp rounds a context up to this
FIT_STEPS = 16  # contexts of different length that are tried

# Bytes that a model takes in time, by what they are for: `weights`, `kv`, `compute` and `prompts`.
Parts = dict[str, int]
Need = Callable[[Path, Sequence[Settings]], Sequence[Parts]]  # as `needed`


def candidates_of(settings: Settings) -> list[Settings]:
    """These settings, then shorter contexts of MIN_FIT_TOKENS or more, then all of these with fewer
    and fewer sequences.
    """
    most = settings.n_ctx
    shortest = min(MIN_FIT_TOKENS, most)
    step = FIT_STEP_TOKENS * max(1, (most - shortest) // (FIT_STEPS * FIT_STEP_TOKENS))
    lengths = [most, *reversed(range(shortest, most, step))]
    found = []
    for sequences in range(settings.sequences, 0, -1):
        found += [replace(settings, sequences=sequences, n_ctx=n_ctx) for n_ctx in lengths]
    return found


def fit_context(path: Path, settings: Settings, free: float, need: Need) -> tuple[Settings, Parts]:
    """The settings of a model file with the longest context that fits into `free` bytes, and what
    they take; if nothing fits, the smallest settings.
    """
    # The given ones alone first: mostly they fit, and each candidate costs a context.
    for candidates in ([settings], candidates_of(settings)):
        for candidate, parts in zip(candidates, need(path, candidates), strict=True):
            if sum(parts.values()) <= free:
                return candidate, parts
    return candidate, parts


# ---------------------------------------------------------------------------------- IO: the machine


def available_mb() -> float:
    return float(psutil.virtual_memory().available / MB)


def cgroup_left_bytes(
    table: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Bytes that the MemoryMax= of our unit still allows; infinity without a limit. The kernel's
    file cache does not count as used, since the kernel gives it back.
    """
    try:
        group = root / table.read_text().rpartition("0::/")[2].strip()
        limit = int((group / "memory.max").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        counts = dict(line.split() for line in lines)
        return limit - int((group / "memory.current").read_text()) + int(counts["file"])
    except (OSError, ValueError, KeyError):  # "max" is no limit; an older kernel has no such files
        return math.inf


# ---------------------------------------------------------------------------------------- IO: files


def file_digest(path: Path, tick: Callable[[int], None]) -> str:
    """The file's sha256. After each block `tick` gets the number of bytes read; its exceptions end
    the reading.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(4 * MB):
            digest.update(data)
            tick(file.tell())
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """The file's size and its ctime in nanoseconds. Programs can set a file's mtime back, but not
    its ctime.
    """
    stat = path.stat()
    return f"{stat.st_size}.{stat.st_ctime_ns}"


def file_size(path: Path) -> int:
    """In bytes; 0 if there is no file."""
    return path.stat().st_size if path.exists() else 0


def check_digest(path: Path, sha256: str, state_dir: Path, stopping: Callable[[], bool]) -> None:
    """ModelError unless the file has this sha256 (empty: not checked). A match is remembered under
    the file's stamp.
    """
    if not sha256:
        return
    stamp = state_dir / "verified" / f"{path.name}.{file_stamp(path)}.{sha256[:16]}"
    if os.path.exists(stamp):
        return

    def tick(_done: int) -> None:
        if stopping():
            raise ModelError("cancelled")

    if (got := file_digest(path, tick)) != sha256:
        raise ModelError(f"expected sha256 {sha256}, got {got}; fetch it again")
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


SPARE_DISK = 100 * MB  # bytes that stay free, for what the daemon saves


def check_disk(folder: Path, need: int) -> None:
    """OSError with the figures unless a folder's disk has `need` bytes free, and SPARE_DISK
    beside them.
    """
    need += SPARE_DISK
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"expected {need / MB:.0f} MB of free disk in {folder}, got {free / MB:.0f} MB"
        )


# ------------------------------------------------------------------------------------ IO: llama.cpp

HEADER_BYTES = 32 << 20  # a large vocabulary takes 15 MB
OUTPUT_NAME = (13).to_bytes(8, "little") + b"output.weight"  # in a header a name follows its length
# In llama.cpp's log: of a KV cache or of recurrent states, and of the compute buffers.
KV_SIZE_MB = re.compile(r": size = +([\d.]+) MiB")
COMPUTE_SIZE_MB = re.compile(r"compute buffer size = +([\d.]+) MiB")
Q8_0_BLOCK_BYTES = 34  # for 32 weights

READ_HEADER = """
import contextlib, ctypes, os, signal, sys
os.environ["GGML_NO_BACKTRACE"] = "1"
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the process that waits
# A minute, and a second for each 20 MB of the file: about five minutes for a 7B on a slow disk.
signal.alarm(60 + os.path.getsize(sys.argv[1]) // 20_000_000)
with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")  # dies before the daemon does
from cerebrum.vps.memory import read_header
sys.exit(read_header(sys.argv[1]))
"""
_asking = threading.Lock()

DECODE_TOKENS = 300
DECODE_SECONDS = 0.5
REFUSED = 3  # the status of a child process to which llama.cpp has refused a file


@functools.lru_cache(64)
def accepts(path: Path, _stamp: str) -> bool:
    """Whether llama.cpp can load a model file; a child process asks. ModelError if llama.cpp ends
    that process, OSError if something else does, such as too little memory.
    """
    command = [sys.executable, "-c", READ_HEADER, str(path.absolute())]
    status = subprocess.run(command, cwd=Path(__file__).resolve().parents[2]).returncode
    if status < 0 and status != -signal.SIGKILL:  # which the system sends if memory runs out
        raise ModelError("llama.cpp ends the process that reads this file, or takes too long")
    if status not in (0, REFUSED):
        raise OSError(f"expected a process that reads the header, got its status {status}")
    return status == 0


def end_checks() -> None:
    """End the processes that read a file: the daemon's end waits for the threads that wait for
    them.
    """
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            process.kill()


def needed(path: Path, forms: Sequence[Settings]) -> list[Parts]:
    """What a model file takes with each of these settings. OSError or ModelError if the file cannot
    be used.
    """
    path.open("rb").close()
    stamp = file_stamp(path)
    known = forms[0].state_dir / "verified" / f"{path.name}.{stamp}.{llama_cpp.__version__}"
    if not os.path.exists(known) and accepts(path, stamp):
        with contextlib.suppress(OSError):  # only the daemon makes the folder
            known.touch()
    with _asking:  # two threads that ask about one file would both wait for llama.cpp
        return _needed(path, stamp, tuple(forms))


@functools.lru_cache(64)  # a large vocabulary takes half a second
def _needed(path: Path, _stamp: str, forms: tuple[Settings, ...]) -> list[Parts]:
    model = load_model(path, weights=False)
    try:
        vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        weights = file_size(path)
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if OUTPUT_NAME not in header:  # llama.cpp may repack a copy of the embedding, as Q8_0
            weights += vocabulary * api.llama_model_n_embd(model) * Q8_0_BLOCK_BYTES // 32
        return [{"weights": weights, **_beside_weights(model, vocabulary, form)} for form in forms]
    finally:
        api.llama_model_free(model)
        ctypes.CDLL(None).malloc_trim(0)


def _beside_weights(model: Any, vocabulary: int, settings: Settings) -> Parts:
    """The bytes of a model's context, from what llama.cpp logs when it makes one."""
    llama_log.lines.clear()
    context = api.llama_init_from_model(model, context_params(model, settings))
    try:
        check_kind(model, context)
    finally:
        api.llama_free(context)
    log = "\n".join(llama_log.lines)
    compute_mb = sum(map(float, COMPUTE_SIZE_MB.findall(log)))
    if not compute_mb:
        raise ModelError("llama.cpp cannot make a context for this model")
    # Floats, in two buffers.
    logits = 2 * 4 * (settings.sequences + settings.early) * settings.outputs * vocabulary
    return {
        "kv": math.ceil(sum(map(float, KV_SIZE_MB.findall(log))) * MB),
        "compute": math.ceil(compute_mb * MB) + logits,
        "prompts": settings.cache_mb * MB,
    }


def read_header(path: str) -> int:
    """Let llama.cpp make the model, its vocabulary and a context, and decode more than a
    micro-batch. Returns the status for `accepts`.
    """
    settings = Settings(n_ctx=512, sequences=1)
    try:
        llama = Llama(Path(path), settings, mapped=True)
    except (ModelError, OSError):
        return REFUSED
    llama.vocabulary.tokenize("def f(x):\n    return 'é'\n", True)
    # Long enough for each kind of layer, even of a large model.
    ending = threading.Timer(DECODE_SECONDS, llama.abort)
    ending.daemon = True
    ending.start()
    llama.decode([(Slot(0), [0] * DECODE_TOKENS, 1)])
    return 0
