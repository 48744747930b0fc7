"""All backends: the list, the models that they have, and the probes that keep their state up to
date.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from cerebrum.pi.backend import Backend
from cerebrum.pi.completion import CompletionRequest
from cerebrum.pi.upstream import BackendConfig
from cerebrum_common import Model

PROBE_SECONDS = 5.0  # between two probes
PAID_PROBE_SECONDS = 120.0  # for a cloud service, which counts requests
STUCK_SECONDS = 300.0  # without progress of a probe, which takes a minute at most

# What of its settings makes a backend the same one.
identity_of = attrgetter("id", "api", "endpoint")


class Option(NamedTuple):
    """A model that may answer, at a backend that has it."""

    model: str
    backend: Backend


def first_there(backends: Sequence[Backend]) -> Backend:
    """The first available backend, or else the first."""
    for backend in backends:
        if backend.available:
            return backend
    return backends[0]


class Fleet:
    """Owns the list of backends and the tasks that probe them."""

    def __init__(self) -> None:
        self.backends = list[Backend]()
        self._replaced = asyncio.Event()

    def replace(
        self,
        configs: Sequence[BackendConfig],
        catalog: Sequence[Model],
        prefer: Mapping[str, Sequence[str]],
    ) -> None:
        """Replace the backends. A backend whose id, API and address stay keeps its state; running
        requests continue. `prefer`: ids of models, by mode. ConfigError if the settings cannot be
        used; then nothing has changed.
        """
        wanted = [Backend(config, catalog) for config in configs]
        known = {identity_of(backend.config): backend for backend in self.backends}
        self.backends = []
        for new in wanted:
            old = known.pop(identity_of(new.config), None)
            if old:
                old.adopt(new)
            self.backends.append(old or new)
        self._catalog = catalog
        self._prefer = prefer
        for removed in known.values():  # those that are left
            removed.wake.set()  # ends its probing
            removed.kind.client.close()
        self._replaced.set()

    # State.

    @property
    def available(self) -> bool:
        return self.first.available

    @property
    def first(self) -> Backend:
        """The backend whose figures stand for all."""
        return first_there(self.backends)

    @property
    def message(self) -> str:
        """Why no backend is available; "" if one is."""
        if self.available or len(self.backends) == 1:
            return self.first.breaker.message
        return "; ".join(f"{backend.id}: {backend.breaker.message}" for backend in self.backends)

    @property
    def models(self) -> Collection[str] | None:
        """The ids of the models that some backend lists; None until the first list comes."""
        lists = [backend.models for backend in self.backends if backend.models is not None]
        if not lists:
            return None
        return ChainMap(*lists)

    def n_ctx(self, model: str) -> int:
        """The model's context at the first backend that has it, preferably an available one."""
        having = [backend for backend in self.backends if backend.has(model)]
        return first_there(having or self.backends).n_ctx(model)

    # Probing.

    async def probe_forever(self, probed: Callable[[], object]) -> None:
        """Keep each backend's state up to date: probe every 5 s, and when woken. Call `probed`
        after each probe.
        """
        async with asyncio.TaskGroup() as group:
            watched = set[Backend]()
            while True:
                for backend in set(self.backends) - watched:
                    group.create_task(self._probe_forever(backend, probed))
                watched = set(self.backends)
                self._replaced.clear()
                await self._replaced.wait()

    async def _probe_forever(self, backend: Backend, probed: Callable[[], object]) -> None:
        while backend in self.backends:
            backend.wake.clear()
            await backend.probe()
            probed()
            usual = PAID_PROBE_SECONDS if backend.config.is_paid else PROBE_SECONDS
            retry = backend.breaker.retry_in(time.monotonic())
            delay = min(usual, retry or usual)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await backend.wake.wait()

    async def know(self) -> None:
        """Probe all backends if the daemon has just started and no probe is complete."""
        if not any(backend.probes for backend in self.backends):
            await asyncio.gather(*(backend.probe() for backend in self.backends))

    def stuck(self, now: float) -> str:
        """A message that names a backend whose probe hangs; "" if there is none."""
        for backend in self.backends:
            if now - backend.probed > STUCK_SECONDS:
                return f"the probe of {backend.id} has made no progress for {STUCK_SECONDS:g} s"
        return ""

    # Routing.

    def route(self, request: CompletionRequest) -> str:
        """The id of the requested model, or of the best one, preferably on an available backend."""
        available = [model for model, backend in self.options(request) if backend.available]
        return (available or self.rank(request))[0]

    def options(self, request: CompletionRequest) -> list[Option]:
        """The models that may answer, best first, each at every backend that has it. Judged by the
        lists of models alone.
        """
        ids = self.rank(request)
        pairs = itertools.product(ids, self.backends)
        options = [Option(id, backend) for id, backend in pairs if backend.has(id)]
        if options:
            return options
        # Our own kind says what is missing, and how to get it.
        return [Option(ids[0], backend) for backend in self.backends if backend.kind.is_ours]

    def rank(self, request: CompletionRequest) -> list[str]:
        """The id of the requested model; without one the ids, best first, of the models that serve
        the request's language and are present on a backend. The models that [prefer] lists for the
        request's mode come first, then the others in the table's order. A chat counts as an
        instruction.

        A language that the table does not list goes to any present model. So does, in a dialect,
        one that no present model serves. In our own API, the only id may then be a missing model's,
        the smallest: a backend's 404 says which file is missing and how to get it.
        """
        fields = request.fields
        if fields.model:
            return [fields.model]
        present = self.models
        here = [model for model in self._catalog if present is None or model.id in present]
        listed = [model for model in self._catalog if fields.language in model.languages]
        serving = [model for model in here if model in listed]
        if not listed or (request.in_dialect and not serving):
            serving = here
        if not serving:
            return [(listed or self._catalog)[-1].id]
        ids = [model.id for model in serving]
        mode = fields.mode
        if mode == "chat":
            mode = "instruct"
        preferred = self._prefer.get(mode, ())
        first = [id for id in preferred if id in ids]
        return [*dict.fromkeys([*first, *ids])]
