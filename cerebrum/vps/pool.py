"""The models in memory: loading and unloading them, and room for them.

Everything here is on the event loop. A model is an `Instance` from the start of its load until its
memory is free again. `room_for` and `removable` decide, `Pool` acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import operator
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cerebrum.fields import describe
from cerebrum.metrics import resident_bytes
from cerebrum.vps.decoder import ModelTally
from cerebrum.vps.encoding import untuned
from cerebrum.vps.llama import MB, ModelError, Settings
from cerebrum.vps.memory import Parts, available_mb, cgroup_left_bytes, file_stamp
from cerebrum.vps.plan import LoadPlan, plan_pair
from cerebrum.vps.schedule import Baton
from cerebrum.vps.worker import Worker
from cerebrum_common import HttpError, Model, internal_error, log

LOAD_TICK_SECONDS = 0.25  # how often a load's progress is reported
# A file that failed to load is tried again after this time, or when it changes.
LOAD_AGAIN_SECONDS = 300.0


@dataclass(eq=False)
class Instance:
    """A model whose worker has memory. Whoever uses the model or waits for its load is in
    `users`.
    """

    model: Model
    worker: Worker
    estimate: int  # bytes it will use in time: attention's buffers fill as contexts grow
    ready: asyncio.Future[None]  # the worker's `ready`, as a future of the loop
    freed: asyncio.Task[None]  # ends when all of the model's memory is free
    loaded_as: object = None  # `Pool._how_loaded`
    users: set[object] = field(default_factory=set)
    # Monotonic: a clock that jumps must not unload a model.
    last_used: float = field(default_factory=time.monotonic)

    @property
    def idle(self) -> bool:
        return not self.users and not self.worker.stopping


how_loaded = operator.attrgetter("id", "file", "sha256", "fim", "fim_layout", "early")


def remove_unlisted(state_dir: Path, models: Collection[Model]) -> None:
    """Remove the saved prompts and the tuned files of models that are not among these. Another
    process may be tuning, in a folder whose name begins with a dot.
    """
    listed = {model.id for model in models} | {model.file for model in models}
    for path in (*state_dir.glob("kv/*"), *state_dir.glob("tuned/[!.]*")):
        if path.name.removesuffix(".json") not in listed:
            log.info("%s: removed, models.toml does not list its model", path)
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # a file
                path.unlink()


# ------------------------------------------------------------------------------------- policy: room


def removable(instances: Collection[Instance], spared: str = "") -> list[Instance]:
    """The instances that make room, in this order: those whose worker is stopping, then the idle
    ones of other models than `spared`, the least recently used first. A model to keep makes no
    room.
    """
    stopping = [instance for instance in instances if instance.worker.stopping]
    others = [one for one in instances if one.model.id != spared and not one.model.keep]
    idle = [instance for instance in others if instance.idle]
    return stopping + sorted(idle, key=operator.attrgetter("last_used"))


def megabytes(instances: Collection[Instance]) -> float:
    """The estimated memory of these instances."""
    return sum(instance.estimate for instance in instances) / MB


def room_for(
    model: str, parts: Parts, free_mb: float, reserve_mb: float, instances: Collection[Instance]
) -> Instance | None:
    """The next instance to unload for a model that takes the memory of `parts`; None if the model
    fits into `free_mb`. HttpError 503 with the figures if it would not fit without all of them.
    """
    need = sum(parts.values()) / MB
    if need <= free_mb:
        return None
    going = removable(instances)
    most = free_mb + megabytes(going)
    if need <= most:
        return going[0]
    figures = ", ".join(f"{name} {size / MB:.0f} MB" for name, size in parts.items())
    left = f"{max(0, most):.0f} MB are free beside the reserve of {reserve_mb:.0f} MB"
    if kept := [instance.model.id for instance in instances if instance.model.keep]:
        left += f" and what is kept ({', '.join(kept)})"
    raise HttpError("RESOURCE_EXHAUSTED", f"model {model} needs {need:.0f} MB ({figures}); {left}")


class Pool:
    """The models in memory and on the way there, and the memory that is left."""

    def __init__(self, folder: Path, settings: Settings, fetch: str) -> None:
        self.folder = folder
        self.settings = settings
        self.fetch = fetch  # the command that downloads a model
        with contextlib.suppress(OSError):  # then each start checks all files again
            (settings.state_dir / "verified").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.models: Mapping[str, Model] = {}  # of models.toml
        self.tallies = dict[str, ModelTally]()  # kept when a model is unloaded
        self.instances = dict[str, Instance]()
        self.baton = Baton()
        self.bare_bytes = resident_bytes()  # of this process without a model
        self.loading = asyncio.Lock()  # memory is checked for one load at a time
        # Of each model, held while it is planned: a new file is checked once, and no thread waits.
        self.planning = defaultdict[str, asyncio.Lock](asyncio.Lock)
        # Loads that have no worker yet, by model.
        self.starting = dict[str, asyncio.Task[HttpError | None]]()
        # Models that could not be loaded: the reason, the file's stamp, and the monotonic time of
        # the next try.
        self.failures = dict[str, tuple[str, str, float]]()
        self.unkept = dict[str, str]()  # models to keep that cannot be loaded: the error's code

    def configure(self, models: Sequence[Model], min_free_mb: float, idle_minutes: float) -> None:
        """Apply models and limits. A loaded model whose entry has changed is unloaded once it is
        idle.
        """
        self.models = {model.id: model for model in models}
        self.tallies = {model_id: ModelTally() for model_id in self.models} | self.tallies
        self.min_free_mb = min_free_mb
        self.idle_minutes = idle_minutes
        remove_unlisted(self.settings.state_dir, models)
        for instance in self.instances.values():
            self._retire(instance)

    @property
    def ready(self) -> dict[str, Instance]:
        """The loaded models."""
        return {
            id: instance
            for id, instance in self.instances.items()
            if instance.ready.done() and not instance.worker.stopping
        }

    def listed(self, model_id: str) -> Model:
        """The model of models.toml with this id, or HttpError 404 MODEL_NOT_FOUND, which names the
        known ids.
        """
        if model_id not in self.models:
            raise HttpError(
                "MODEL_NOT_FOUND",
                f"model: expected one of {', '.join(self.models)}, got {describe(model_id)}",
            )
        return self.models[model_id]

    def check(self, model_id: str) -> None:
        """HttpError if the model is unknown or cannot be used: its file is missing, or loading it
        has failed recently, and each attempt would read a large file.
        """
        model = self.listed(model_id)
        path = self.folder / model.file
        if model_id in self.ready:
            return  # a loaded model needs no file any more
        if not os.path.isfile(path):
            raise HttpError(
                "MODEL_NOT_FOUND",
                f"model {model_id}: the file {model.file} is missing; "
                f"in the backend's folder on the VPS run: {self.fetch} {model_id}",
            )
        message, stamp, until = self.failures.get(model_id, ("", "", 0.0))
        with contextlib.suppress(OSError):  # the file has just gone, and the next load will say so
            if time.monotonic() < until and stamp == file_stamp(path):
                raise HttpError("MODEL_LOAD_FAILED", message)

    # Loading.

    async def acquire(
        self, user: object, model_id: str, progress: Callable[[int], None]
    ) -> Instance:
        """The model's instance, after loading it if needed; HttpError if the load fails. `progress`
        gets percentages. `release` must follow in any case.
        """
        instance = await self._instance(model_id)
        instance.users.add(user)
        reported = -1
        while not instance.ready.done():
            percent = round(100 * instance.worker.share_read)
            if percent > reported:
                reported = percent
                progress(percent)
            await asyncio.wait([instance.ready], timeout=LOAD_TICK_SECONDS)
        instance.ready.result()
        return instance

    async def _instance(self, model_id: str) -> Instance:
        """The model's instance, as soon as there is one that is not stopping."""
        while True:
            instance = self.instances.get(model_id)
            if not instance:
                if error := await asyncio.shield(self._start_load(self.listed(model_id))):
                    raise error
            elif instance.worker.stopping:
                await asyncio.wait([instance.freed])
                self.check(model_id)  # its load may just have failed
            else:
                return instance

    def release(self, user: object, model_id: str) -> None:
        instance = self.instances.get(model_id)
        if instance and user in instance.users:
            instance.users.remove(user)
            instance.last_used = time.monotonic()
            self._retire(instance)

    def _retire(self, instance: Instance) -> None:
        """Unload an idle instance if models.toml no longer lists its model, or changes how to
        load it.
        """
        listed = self.models.get(instance.model.id)
        instance.model = listed or instance.model
        if instance.idle and not (listed and self._how_loaded(listed) == instance.loaded_as):
            log.info("model %s: unloaded, models.toml has changed", instance.model.id)
            instance.worker.stop()

    def _how_loaded(self, model: Model) -> object:
        """What of models.toml a loaded model depends on: of its entry and its draft model's."""
        return [entry and how_loaded(entry) for entry in (model, self.models.get(model.draft))]

    def _start_load(self, model: Model) -> asyncio.Task[HttpError | None]:
        """The task that starts to load the model and returns the error if it cannot. The task
        outlives the users that wait for it: while somebody types, no completion lives as long as a
        load takes.
        """

        async def load() -> HttpError | None:
            try:
                await self.plan(model)  # a new file is checked first; others may load meanwhile
                async with self.loading:
                    await self._load(model)
                return None
            except HttpError as error:
                if error.code == "MODEL_LOAD_FAILED":
                    log.error("%s", error.message)
                return error
            except Exception as exception:
                return internal_error(exception)
            finally:
                del self.starting[model.id]

        if model.id not in self.starting:
            self.starting[model.id] = asyncio.create_task(load())
        return self.starting[model.id]

    def _note_failure(self, model: Model, reason: str) -> None:
        """Note that the model could not be loaded, so that it is not tried again soon."""
        with contextlib.suppress(OSError):  # the file has gone
            stamp = file_stamp(self.folder / model.file)
            self.failures[model.id] = reason, stamp, time.monotonic() + LOAD_AGAIN_SECONDS

    async def plan(self, model: Model) -> LoadPlan:
        """What would be loaded of the model if all idle models were unloaded. HttpError if the file
        cannot be used.
        """
        problem = f"model {model.id} ({model.file})"
        draft = self.models.get(model.draft)
        try:
            async with self.planning[model.id]:
                free = MB * (self._free_mb() + megabytes(removable(self.instances.values())))
                return await asyncio.to_thread(
                    plan_pair, model, draft, self.folder, self.settings, free
                )
        except ModelError as error:
            reason = f"{problem}: {error}"
            # Since each list of models asks.
            self._note_failure(model, reason)
            raise HttpError("MODEL_LOAD_FAILED", reason) from None
        except OSError:
            raise HttpError("MODEL_LOAD_FAILED", f"{problem}: the file cannot be read") from None

    async def measure(self) -> None:
        """Load the models to keep, and let llama.cpp say what each model takes, half a second for a
        file, before a request has to wait for it.
        """
        await self.load_kept()
        for model in self.models.values():
            with contextlib.suppress(HttpError):  # the file is missing or damaged
                await self.plan(model)

    async def load_kept(self) -> None:
        """Load the models to keep, or log once why one of them cannot be loaded."""
        for model in self.models.values():
            try:
                if model.keep:
                    self.check(model.id)
                    await self._instance(model.id)
                    self.unkept.pop(model.id, "")
            except HttpError as error:
                if self.unkept.get(model.id) != error.code:
                    log.error("model %s is to be kept, but is not loaded: %s", model.id, error)
                self.unkept[model.id] = error.code

    async def _load(self, model: Model) -> None:
        """Start to load a model; HttpError if it does not fit into memory or cannot be read."""
        # As the plan has it: models.toml may change meanwhile.
        loaded_as = self._how_loaded(model)
        plan = await self.plan(model)
        if plan.settings != self.settings:
            log.warning("model %s: memory allows only %s", model.id, plan.settings.context)
        if plan.reason:
            log.warning("model %s", untuned(model.id, plan.reason))
        if plan.note:
            log.info("model %s: %s", model.id, plan.note)
        loaded = self.instances.values()
        # The free memory is looked at anew after each: the system changes meanwhile.
        while going := room_for(model.id, plan.parts, self._free_mb(), self.min_free_mb, loaded):
            await self._unload(going)
        start = time.monotonic()
        tally = self.tallies[model.id]
        worker = Worker(plan, self.baton, tally)
        # Before anything waits for the worker's end, since even a thread can fail to start.
        worker.start()
        ready = asyncio.wrap_future(worker.ready)
        freed = asyncio.create_task(self._reap(worker))
        instance = Instance(model, worker, plan.bytes, ready, freed, loaded_as)

        def note_end(future: asyncio.Future[None]) -> None:
            error = future.exception()  # marks it as retrieved, even if nobody waits
            if not error:
                instance.last_used = time.monotonic()
                tally.loads += 1
                tally.load_seconds += instance.last_used - start
            elif isinstance(error, HttpError) and error.code == "MODEL_LOAD_FAILED":
                tally.failed_loads += 1
                self._note_failure(model, error.message)

        ready.add_done_callback(note_end)
        self.instances[model.id] = instance

    async def _reap(self, worker: Worker) -> None:
        """When the worker has ended, for whatever reason, forget it and return its memory to the
        system.
        """
        await asyncio.wait([asyncio.wrap_future(worker.ended)])
        worker.join()  # returns at once
        remove_unlisted(self.settings.state_dir, self.models.values())
        del self.instances[worker.model_id]
        ctypes.CDLL(None).malloc_trim(0)

    # Memory.

    def _free_mb(self) -> float:
        """Megabytes free for one more model, after the reserve and the expected growth of loaded
        models.
        """
        used_mb = (resident_bytes() - self.bare_bytes) / MB
        growth_mb = max(0.0, megabytes(self.instances.values()) - used_mb)
        return min(available_mb() - self.min_free_mb, cgroup_left_bytes() / MB) - growth_mb

    async def relieve(self, wanted: str) -> None:
        """While available memory is below the reserve, unload idle models other than the wanted
        one, then drop saved prompts; HttpError 503 if that is not enough.
        """
        while available_mb() < self.min_free_mb:
            if not (going := removable(self.instances.values(), wanted)):
                break
            await self._unload(going[0])
        for instance in self.ready.values():
            missing_mb = self.min_free_mb - available_mb()
            if missing_mb > 0 and instance.worker.stored_bytes:
                shed = asyncio.wrap_future(instance.worker.shed(math.ceil(missing_mb * MB)))
                await asyncio.wait([shed, instance.freed], return_when=asyncio.FIRST_COMPLETED)
                ctypes.CDLL(None).malloc_trim(0)
        available = available_mb()
        if available < self.min_free_mb:
            raise HttpError(
                "RESOURCE_EXHAUSTED",
                f"expected {self.min_free_mb:.0f} MB of memory available, got {available:.0f} MB",
            )

    # Unloading.

    async def _unload(self, instance: Instance) -> float:
        """Stop an instance, wait until it is gone, and return the megabytes that the process gave
        back.
        """
        before = resident_bytes()
        instance.worker.stop()
        await asyncio.wait([instance.freed])  # which goes on if this wait is cancelled
        return round(max(0, before - resident_bytes()) / MB, 1)

    async def unload(self, model_id: str) -> float | None:
        """Unload a model, or stop its load, and return the megabytes freed. None if there was
        nothing to unload; HttpError 409 if a request uses the model or waits for it.
        """
        if load := self.starting.get(model_id):
            await asyncio.wait([load])
        instance = self.instances.get(model_id)
        if not instance or instance.worker.stopping:
            return None
        if instance.users:
            raise HttpError("MODEL_BUSY", f"model {model_id} is busy; expected an idle one")
        return await self._unload(instance)

    async def unload_unused(self) -> dict[str, float]:
        """Unload models that were unused for the configured minutes. Returns megabytes freed, by
        model.
        """
        freed = {}
        for model_id, instance in self.ready.items():
            idle_minutes = (time.monotonic() - instance.last_used) / 60
            # Looked at only now, since a request may have come meanwhile.
            if instance.idle and not instance.model.keep and idle_minutes >= self.idle_minutes:
                freed[model_id] = await self._unload(instance)
                log.info(
                    "model %s: unloaded, %g idle minutes are over", model_id, self.idle_minutes
                )
        return freed

    async def stop(self) -> None:
        """End all loads, and unload all models. Their workers save the parked sequences."""
        for load in self.starting.values():
            load.cancel()
        await asyncio.gather(*map(self._unload, self.instances.values()))
