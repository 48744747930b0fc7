"""All backends: the list, the choice of one for a request, and the probes that keep their state up to date."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cerebrum.fields import describe
from cerebrum.pi.backend import BREAKER_OPEN, NEVER_ASKED, Backend, Job
from cerebrum.pi.upstream import BackendConfig
from cerebrum_common import HttpError, Model

PROBE_SECONDS = 5.0  # between two probes, +- 20 %
PAID_PROBE_SECONDS = 120.0  # for a cloud service, which counts requests
STUCK_SECONDS = 300.0  # without progress of a probe, which takes a minute at most
MAX_SERVED = 512  # sessions and files, each with the backend that served it last

Preferences = Mapping[str, Sequence[str]]  # ids of models, by mode
Options = Sequence[tuple[str, Sequence[Backend]]]  # models, best first, each with the backends that have it


def rank_models(
    catalog: Sequence[Model],
    prefer: Preferences,
    language: str,
    mode: str,
    present: Collection[str] | None,
    any_language: bool = False,
) -> list[str]:
    """The ids, best first, of the models that serve the language and are `present` on a backend. The models that
    [prefer] lists for the mode come first, then the others in the table's order. A chat counts as an instruction.

    With `any_language`, a language that no present model serves goes to any of them. Without it, the only id may be a
    missing model's: a backend's 404 says which file is missing and how to get it. No preferences count until the
    backends' models are known (None)."""
    here = [model for model in catalog if present is None or model.id in present]
    serving = [model.id for model in here if language in model.languages]
    if not language or (any_language and not serving):
        serving = [model.id for model in here]
    if not serving:
        return [next((model for model in catalog if language in model.languages), catalog[0]).id]
    preferred = () if present is None else prefer.get("instruct" if mode == "chat" else mode, ())
    return [*dict.fromkeys([*(id for id in preferred if id in serving), *serving])]


def cache_key(job: Job) -> str:
    """A name for the job's session, or else for its client and file. The backend that last served this key probably has
    the beginning of the prompt in its cache."""
    return job.session or f"{job.client} {job.fields.get('filename') or ''}".lstrip()


def first_there(backends: Sequence[Backend]) -> Backend:
    """The first available backend, or else the first."""
    return next((backend for backend in backends if backend.available), backends[0])


class Fleet:
    """Owns the list of backends, and remembers which one served a file last. `is_fair` says whether a job may take one
    of the last free places of some backends, and `probed` is called with a backend after each of its probes."""

    def __init__(self, is_fair: Callable[[Job, Sequence[Backend]], bool], probed: Callable[[Backend], None]) -> None:
        self._is_fair, self._probed = is_fair, probed
        self.backends: list[Backend] = []
        self._catalog: Sequence[Model] = ()
        self._prefer: Preferences = {}
        self._served: dict[str, Backend] = {}  # the last backend of each session or file, by `cache_key`
        self._replaced = asyncio.Event()

    def replace(self, configs: Sequence[BackendConfig], catalog: Sequence[Model], prefer: Preferences) -> None:
        """Replace the backends. A backend whose id and API stay keeps its state; running requests continue.
        ConfigError if the settings cannot be used; then nothing has changed."""
        backends = [Backend(config, catalog) for config in configs]
        known = {(backend.id, backend.config.api): backend for backend in self.backends}
        for number, new in enumerate(backends):
            if old := known.get((new.id, new.config.api)):
                old.adopt(new)
                backends[number] = old
        gone = [backend for backend in self.backends if backend not in backends]
        self.backends, self._catalog, self._prefer = backends, catalog, prefer
        self._served = {key: backend for key, backend in self._served.items() if backend not in gone}
        for backend in gone:
            backend.wake.set()  # ends its probing
            backend.upstream.close()
            if backend.warming:
                backend.warming[1].cancel()
        self._replaced.set()

    # State.

    @property
    def available(self) -> bool:
        return any(backend.available for backend in self.backends)

    @property
    def first(self) -> Backend:
        """The backend whose figures stand for all."""
        return first_there(self.backends)

    @property
    def message(self) -> str:
        """Why no backend is available."""
        if self.available:
            return ""
        named = [f"{backend.id}: {backend.message}" for backend in self.backends]
        return "; ".join(named) if len(named) > 1 else self.first.message

    @property
    def models(self) -> dict[str, dict[str, Any]] | None:
        """Model metadata, taken from the first backend that lists the model; None until the first list comes."""
        lists = [backend.models for backend in self.backends if backend.models is not None]
        return {id: about for models in reversed(lists) for id, about in models.items()} if lists else None

    def n_ctx(self, model: str) -> int:
        """The model's context at the first backend that has it, preferably an available one."""
        having = [backend for backend in self.backends if backend.has(model)]
        return first_there(having or self.backends).n_ctx(model)

    # Probing.

    async def probe_forever(self) -> None:
        """Keep each backend's state up to date: probe every 5 s, and when woken."""
        async with asyncio.TaskGroup() as group:
            probed = set[Backend]()
            while True:
                for backend in set(self.backends) - probed:
                    group.create_task(self._probe_forever(backend))
                probed = set(self.backends)
                self._replaced.clear()
                await self._replaced.wait()

    async def _probe_forever(self, backend: Backend) -> None:
        while backend in self.backends:
            backend.wake.clear()
            await backend.probe()
            self._probed(backend)
            delay = (PAID_PROBE_SECONDS if backend.is_paid else PROBE_SECONDS) * random.uniform(0.8, 1.2)
            delay = min(delay, backend.breaker.retry_in(time.monotonic()) or delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await backend.wake.wait()

    async def know(self) -> None:
        """Probe all backends if the daemon has just started and no probe is complete."""
        if not any(backend.probes for backend in self.backends):
            await asyncio.gather(*(backend.probe() for backend in self.backends))

    def stuck(self, now: float) -> str:
        """A message that names a backend whose probe hangs; "" if there is none."""
        stuck = [backend.id for backend in self.backends if now - backend.probed > STUCK_SECONDS]
        return f"the probe of {stuck[0]} has made no progress for {STUCK_SECONDS:g} s" if stuck else ""

    # Routing.

    def route(self, fields: Mapping[str, Any]) -> str:
        """The id of the requested model, or of the best one, preferably on an available backend."""
        options = self.who_may(fields, any_language=True)
        there = (model for model, having in options if any(backend.available for backend in having))
        return next(there, options[0][0])

    def who_may(self, fields: Mapping[str, Any], any_language: bool) -> Options:
        """The models that may answer and their backends, judged by the lists of models alone."""
        asked, language, mode = fields.get("model"), fields.get("language", ""), fields.get("mode", "")
        if asked is not None:
            ids = [asked]
        else:
            ids = rank_models(self._catalog, self._prefer, language, mode, self.models, any_language)
        options = [(id, [backend for backend in self.backends if backend.has(id)]) for id in ids]
        if not any(having for _, having in options):  # vpsd says what is missing, and how to get it
            options = [(ids[0], [backend for backend in self.backends if backend.api is None])]
        return options

    def choose(self, job: Job) -> tuple[str, Backend] | None:
        """The model and the backend for a job; None if no place is free for it. HttpError if no backend may be asked.
        Backends with a known problem are asked only if there are no others. Of the backends with a free place, take the
        one that probably has the beginning of the prompt in its cache, or else the least busy one. A dialect's job may
        wait for the end of another one's trial: somebody who types ends one trial after the other."""
        options = self.who_may(job.fields, bool(job.kind))
        able = [backend for backend in self.backends if any(backend in having for _, having in options)]
        able = [backend for backend in able if backend not in (*job.tried, *job.busy)]
        usable = [backend for backend in able if backend.breaker.admits()]
        usable = [backend for backend in usable if not backend.trouble] or usable
        if not usable:
            if job.kind and job.patience() > 0 and any(one.breaker.state == "half-open" for one in able):
                return None
            raise job.failure or self._nobody(options)
        if not self._is_fair(job, usable):
            return None
        last = self._served.get(cache_key(job))
        free = [backend for backend in usable if backend.has_place(job)]
        for model, having in options:
            if best := [backend for backend in free if backend in having]:
                return model, last if last in best else min(best, key=lambda one: len(one.active) / one.limit)
        return None

    def _nobody(self, options: Options) -> HttpError:
        if any(having for _, having in options):
            return HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
        if unknown := [backend for backend in self.backends if backend.models is None]:
            return HttpError("VPS_UNAVAILABLE", next((one.message for one in unknown if one.message), NEVER_ASKED))
        expected, got = ", ".join(self.models or ()), describe(options[0][0])
        return HttpError("MODEL_NOT_FOUND", f"expected a model that a backend has ({expected or 'none'}), got {got}")

    def remember_served(self, job: Job, backend: Backend) -> None:
        """Remember that this backend gets the job's prompt."""
        if key := cache_key(job):
            self._served.pop(key, None)
            self._served[key] = backend
            if len(self._served) > MAX_SERVED:
                del self._served[next(iter(self._served))]

    def has_another(self, backend: Backend, job: Job) -> bool:
        """Whether a backend that could not load the job's model has another model for this job."""
        job.without.append((backend, job.model))
        options = self.who_may(job.fields, bool(job.kind))
        others = [id for id, _ in options if backend.has(id) and (backend, id) not in job.without]
        if others:
            backend.forget(job.model)
        return bool(others)
