"""vpsd's pool of models and its admissions: what is loaded when, and faults on the way.

The workers are scripted, because a real one decides itself when it has loaded and when it has
ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import tuned_passport
from harness import PATIENCE, ROOT, until, variables, warnings_in

import vpsd
from cerebrum.settings import Environment
from cerebrum.vps import memory, plan, pool
from cerebrum.vps.encoding import TunedFile, find_tuned
from cerebrum.vps.llama import MB, ModelError, Settings
from cerebrum.vps.plan import LoadPlan
from cerebrum.vps.pool import Instance
from cerebrum_common import SSE_COMMENT, HttpError
from vpsd import Admission, Engine, events_of, load_config

A = "qwen_0_5b"
B = "qwen_1_5b"
C = "qwen_7b"
CATALOG = {"CEREBRUM_MODELS_FILE": f"{ROOT}/models.toml"}
DAMAGED = HttpError("MODEL_LOAD_FAILED", "it is damaged")


class ScriptedWorker:
    """Stands for a worker's thread. The test sets `ready` when it has loaded, and `ended` when it
    has ended.
    """

    made: list[ScriptedWorker]
    due = float("inf")
    stopping = False
    share_read = 0.0
    stored_bytes = memory_bytes = 0
    prepare_fault: Exception | None = None

    def __init__(self, plan: LoadPlan, _baton, tally) -> None:
        self.plan, self.tally = plan, tally
        self.model_id, self.tuned = plan.model_id, plan.tuned
        self.draft_loaded = plan.draft  # what it could use of it
        self.ready, self.ended = Future[None](), Future[None]()
        model = SimpleNamespace(n_ctx=4096)
        self.loaded = SimpleNamespace(model=model, path=plan.path, encoding="published")
        self.submitted = []
        self.submit = self.submitted.append
        self.made.append(self)

    def start(self, *_) -> None:
        pass

    join = give_way = cancel = start

    def stop(self) -> None:
        self.stopping = True

    def end(self, failure: HttpError) -> None:
        """What it was loading has failed."""
        self.stopping = True
        self.ready.set_exception(failure)
        self.ended.set_result(None)

    def prepare(self, job) -> Any:
        if self.prepare_fault:
            raise self.prepare_fault
        return job


class House:
    """An engine with scripted workers, on a machine with memory for `room` models."""

    def __init__(self, engine: Engine, folder: Path, patch: Callable[..., None], caplog) -> None:
        self.engine, self.pool = engine, engine.pool
        self.folder = folder
        self.room = 2
        self.patch, self.caplog = patch, caplog

    def finish(self, *completions: Admission) -> None:
        for completion in completions:
            self.engine.finish(completion)

    def worker(self, model: str = A) -> ScriptedWorker:
        return [worker for worker in ScriptedWorker.made if worker.model_id == model][-1]

    def file(self, model: str = A) -> Path:
        return self.folder / self.pool.models[model].file

    def ask(self, model: str = A, **more) -> Admission:
        fields = {"model": model, "prompt": "x", **more}
        return self.engine.admit(vpsd.parse_inference(fields), {})

    def refuses(self, model: str = A, **more) -> HttpError:
        with pytest.raises(HttpError) as refused:
            self.ask(model, **more)
        return refused.value

    async def loaded(self, model: str = A) -> Admission:
        """A completion that has reached its worker."""
        completion = self.ask(model)
        await until(lambda: model in self.pool.instances)
        worker = self.worker(model)
        if not worker.ready.done():
            worker.ready.set_result(None)
        await until(lambda: completion.job in worker.submitted)
        return completion

    async def begun(self, model: str = A) -> ScriptedWorker:
        """The worker of a load that a completion waits for."""
        await until(lambda: model in self.pool.instances and self.pool.instances[model].users)
        return self.worker(model)

    async def idle(self, model: str = A) -> ScriptedWorker:
        self.finish(await self.loaded(model))
        return self.worker(model)

    async def error(self, completion: Admission) -> HttpError:
        """The error that ends this completion."""
        events = await completion.next_events(PATIENCE)
        assert isinstance(events[-1], HttpError)
        self.finish(completion)
        return events[-1]

    def reconfigure(self, **changes) -> None:
        self.engine.reconfigure(replace(self.engine.config, **changes))

    async def listed(self, model: str) -> dict[str, Any]:
        """Its entry in the list of models."""
        entries = (await vpsd.models(self.engine, SimpleNamespace())).body["models"]
        (entry,) = (entry for entry in entries if entry["id"] == model)
        return entry

    async def ends(self, model: str = A) -> None:
        """Let its worker end."""
        self.worker(model).ended.set_result(None)
        await until(lambda: model not in self.pool.instances)


@pytest.fixture
def house(runner, patch, tmp_path, caplog):
    """A house in which the files of all models exist, and none has a draft model. After the test
    every place must be free again.
    """
    folders = f"CEREBRUM_MODELS_DIR={tmp_path} CEREBRUM_STATE_DIR={tmp_path}/state"
    given = variables(f"CEREBRUM_IDLE_MINUTES=0 {folders}")
    config = load_config(Environment(CATALOG | given))
    for model in config.models:
        (tmp_path / model.file).write_bytes(b"GGUF")
    config = replace(config, models=tuple(replace(model, draft="") for model in config.models))
    ScriptedWorker.made = []
    house = House(Engine(config), tmp_path, patch, caplog)
    patch(pool, "Worker", ScriptedWorker)
    patch(plan, "needed", lambda _, forms: [{"weights": MB}] * len(forms))
    patch(plan, "check_pair", lambda *_: None)
    patch(house.pool, "_free_mb", lambda: house.room - len(house.pool.instances))
    for module in (vpsd, pool):
        patch(module, "available_mb", lambda: 1 << 20)
    yield house
    for worker in ScriptedWorker.made:
        if not worker.ended.done():
            worker.ended.set_result(None)
    runner.run(asyncio.wait_for(house.engine.stop(), PATIENCE))
    assert (house.pool.instances, house.engine.admissions) == ({}, {})


# ----------------------------------------------------------------------------------- what is loaded


def untuned(model: str, why: str) -> str:
    return f"model {model} runs untuned: {why}: `vpsd.py tune {model}` finds its fastest encoding"


def tuned_file(house: House) -> TunedFile:
    return TunedFile(house.folder / "tuned", Settings(micro_batch=128), tuned_passport())


async def test_a_model_is_loaded_from_its_tuned_file_or_the_log_says_why_not(house):
    tuned, why = tuned_file(house), "it was tuned for cpus 4, here it is 2"
    known = {house.file(): (tuned, ""), house.file(B): (None, why)}
    house.patch(plan, "find_tuned", lambda *given: known.get(given[0]) or find_tuned(*given))
    listed = await house.listed(A)
    assert (listed["path"], listed["encoding"]) == (f"{tuned.path}", "tuned: Q4_K to Q4_1")
    assert (await house.idle(A)).tuned == tuned
    assert (await house.idle(B)).tuned is None
    house.room = 9
    assert (await house.idle(C)).tuned is None
    assert warnings_in(house.caplog) == [untuned(B, why), untuned(C, "there is no tuned file")]


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_tuned_file_that_does_not_fit_or_is_damaged_is_not_used(house, damaged):
    def needed(path, _):
        if path != tuned.path:
            return [{"weights": MB}]
        if damaged:
            raise ModelError("it is damaged")
        return [{"weights": 9 * MB}]

    tuned = tuned_file(house)
    house.patch(plan, "find_tuned", lambda *_: (tuned, ""))
    house.patch(plan, "needed", needed)
    other = await house.idle(B)
    assert (await house.idle()).tuned is None
    assert not other.stopping  # nothing was unloaded in vain
    why = "its tuned file needs 9 MB, and 2 MB can be freed beside the reserve"
    why = "its tuned file cannot be used: it is damaged" if damaged else why
    assert warnings_in(house.caplog) == [untuned(B, why), untuned(A, why)]


async def test_a_model_that_does_not_fit_gets_a_shorter_context(house):
    def needed(_, forms):
        return [{"kv": form.sequences * form.n_ctx << 10} for form in forms]

    def find(_, settings, __):
        return TunedFile(house.folder, settings, tuned_passport()), ""

    house.patch(plan, "needed", needed)
    house.patch(plan, "find_tuned", find)
    house.patch(house.pool, "_free_mb", lambda: 5.0)
    assert (await house.listed(A))["n_ctx"] == 2560
    settings = (await house.idle()).tuned.settings
    assert (settings.n_ctx, settings.sequences) == (2560, 2)
    allowed = "memory allows only a context of 2,560 tokens and 2 at a time"
    assert warnings_in(house.caplog) == [f"model {A}: {allowed}"]
    house.patch(plan, "needed", memory.needed)
    assert not (await house.listed(C))["available"]  # its file is damaged


async def test_a_draft_model_is_loaded_with_its_model_and_listed_unless_it_could_not_be(
    house,
) -> None:
    house.room = 9
    large = replace(house.pool.models[B], draft=A)
    house.reconfigure(models=(house.pool.models[A], large))
    assert (await house.listed(B))["draft"] == A
    worker = await house.idle(B)
    draft = worker.plan.draft
    assert (draft.model_id, draft.path, draft.settings.outputs) == (A, house.file(A), 1)
    assert list(house.pool.ready) == [B]  # it serves nobody itself
    assert house.pool.instances[B].estimate == 2 * MB
    assert (await house.listed(B))["draft"] == A
    worker.draft_loaded = None
    assert (await house.listed(B))["draft"] is None


async def test_what_a_draft_model_did_is_told_by_its_model(house):
    async def drafting():
        return (await vpsd.stats(house.engine, SimpleNamespace())).body["draft_models"]

    tally = house.pool.tallies[B]
    assert await drafting() == {}
    tally.ahead_steps, tally.ahead_tokens = 10, 34
    tally.foreseeable_tokens, tally.foreseen_tokens = 40, 35
    tally.ahead_seconds, tally.checking_seconds = 1.5, 5.0
    figures = {"acceptance": 0.875, "tokens_per_step": 3.4, "draft_ms": 150.0, "target_ms": 500.0}
    assert await drafting() == {B: figures}


# --------------------------------------------------------------------------------- loads and faults


@pytest.mark.parametrize("step", ["prepare", "_load", "relieve"])
async def test_any_fault_on_the_way_becomes_a_response(house, monkeypatch, step):
    async def fail(*_, **__):
        raise fault

    fault = FileNotFoundError(2, "gone", "/secret")
    if step == "prepare":
        (await house.idle()).prepare_fault = fault
    else:
        monkeypatch.setattr(house.pool, step, fail)
    for completion in [house.ask(), house.ask()]:
        error = await house.error(completion)
        assert (error.status, error.code) == (500, "INTERNAL_ERROR")
        assert "secret" not in error.message
    monkeypatch.undo()


async def test_a_model_file_that_vanishes_is_a_load_that_failed(house):
    house.patch(plan, "needed", memory.needed)
    completion, file = house.ask(), house.file()
    file.unlink()
    error = await house.error(completion)
    assert (error.status, error.code) == (500, "MODEL_LOAD_FAILED")
    assert error.message == f"model {A} ({file.name}): the file cannot be read"


class Block:
    """Holds a load up before its worker starts."""

    def __init__(self, house: House) -> None:
        self.reached, self.end = 0, threading.Event()
        house.patch(plan, "find_tuned", self._wait)

    def _wait(self, *_) -> tuple[None, str]:
        self.reached += 1
        self.end.wait(PATIENCE)
        return None, ""


async def test_a_load_is_finished_though_its_client_has_left(house):
    completion, before = house.ask(), time.monotonic()
    worker = await house.begun()
    house.finish(completion)
    assert await house.pool.unload_unused() == {}  # with a limit of 0 minutes
    worker.ready.set_result(None)
    await until(lambda: house.pool.tallies[A].loads == 1)
    assert not worker.stopping
    assert house.pool.instances[A].last_used >= before
    assert await house.idle() is worker


async def test_requests_that_replace_each_other_start_one_load(house):
    """Even if each of them leaves before the worker starts."""
    block = Block(house)
    for _ in range(3):
        last = house.ask(session="s")
        await until(lambda: block.reached)
        await asyncio.sleep(0)  # it gets as far as it can
    block.end.set()
    (await house.begun()).ready.set_result(None)
    await until(lambda: house.worker().submitted == [last.job])
    assert len(ScriptedWorker.made) == 1
    house.finish(last)


async def test_while_a_new_file_is_checked_others_are_planned_and_loaded(house):
    """And it is checked once, by one thread, however often the models are listed."""
    checked, end = [], threading.Event()

    def needed(path, forms):
        if path == house.file():
            checked.append(path)
            end.wait(PATIENCE)
        return [{"weights": MB}] * len(forms)

    house.patch(plan, "needed", needed)
    waiting = house.ask()
    lists = [asyncio.create_task(house.listed(A)) for _ in range(9)]
    await until(lambda: checked)
    await house.idle(B)
    assert len(checked) == 1
    end.set()
    await asyncio.gather(*lists)
    (await house.begun()).ready.set_result(None)
    await until(lambda: house.worker().submitted == [waiting.job])
    house.finish(waiting)


@pytest.mark.parametrize("stopped", ["daemon", "load"])
async def test_a_load_that_has_not_begun_can_be_stopped(house, stopped):
    block, completion = Block(house), house.ask()
    await until(lambda: block.reached)
    if stopped == "daemon":
        await house.engine.stop()
        block.end.set()
        await until(lambda: not house.pool.starting)
        assert ScriptedWorker.made == []
    else:
        house.finish(completion)
        unloading = asyncio.ensure_future(house.pool.unload(A))
        block.end.set()
        await until(lambda: A in house.pool.instances and house.worker().stopping)
        await house.ends()
        assert isinstance(await unloading, float)


@pytest.mark.parametrize("why", ["unload", "memory"])
async def test_a_load_that_nobody_waits_for_can_be_stopped(house, why):
    house.room = 1
    waiting = house.ask()
    worker = await house.begun()
    with pytest.raises(HttpError) as busy:
        await house.pool.unload(A)
    assert (busy.value.code, worker.stopping) == ("MODEL_BUSY", False)
    assert (await house.error(house.ask(B))).code == "RESOURCE_EXHAUSTED"
    house.finish(waiting)
    end = house.pool.unload(A) if why == "unload" else house.idle(B)
    stopping = asyncio.ensure_future(end)
    await until(lambda: worker.stopping)
    worker.end(HttpError("SHUTTING_DOWN", "given up"))
    await stopping
    assert A not in house.pool.instances


async def test_a_file_that_could_not_be_loaded_is_not_read_again_for_each_request(house):
    async def fail():
        """For the client that waits, and for one that comes while the load fails."""
        waiting, worker = house.ask(), await house.begun()
        worker.stopping = True
        late = house.ask()
        await asyncio.sleep(0)  # it gets as far as it can
        worker.end(DAMAGED)
        for completion in (waiting, late):
            assert (await house.error(completion)).message == "it is damaged"
        await until(lambda: A not in house.pool.instances)

    await fail()
    refused = house.refuses()
    assert (refused.code, refused.message) == ("MODEL_LOAD_FAILED", "it is damaged")
    assert len(ScriptedWorker.made) == house.pool.tallies[A].failed_loads == 1
    house.file().write_bytes(b"GGUF again")
    await fail()
    now = time.monotonic()
    house.patch(time, "monotonic", lambda: now + pool.LOAD_AGAIN_SECONDS)
    house.pool.check(A)


async def test_a_loaded_model_needs_no_file(house):
    worker = await house.idle()
    house.file().unlink()
    await house.idle()
    assert ScriptedWorker.made == [worker]
    worker.stopping = True
    assert re.match(f"model {A}: the file .* is missing", house.refuses().message)


# ------------------------------------------------------------------------------------------- memory


async def test_two_requests_both_wait_for_the_idle_model_that_makes_room(house):
    idle = await house.idle()
    house.patch(pool, "available_mb", lambda: (1 << 20) * (A not in house.pool.instances))
    completions = [house.ask(B), house.ask(B)]
    await until(lambda: idle.stopping)
    assert [completion.events.qsize() for completion in completions] == [0, 0]
    await house.ends()
    (await house.begun(B)).ready.set_result(None)
    await until(lambda: len(house.worker(B).submitted) == 2)
    house.finish(*completions)


async def test_saved_prompts_are_dropped_before_a_request_is_refused(house):
    worker = await house.idle()
    dropped, free = [], {"mb": 900}

    def shed(size):
        dropped.append(size)
        free["mb"] += 130
        worker.stored_bytes = 0
        done = Future()
        done.set_result(None)
        return done

    house.patch(pool, "available_mb", lambda: free["mb"])
    worker.shed, worker.stored_bytes = shed, 200 * MB
    await house.idle()
    assert dropped == [124 * MB]
    free["mb"], worker.stored_bytes = 800, 1
    message = "expected 1024 MB of memory available, got 930 MB"
    assert (await house.error(house.ask())).message == message  # all that was saved was too little
    assert (await house.error(house.ask())).message == message


def held(id: str, size: int, state: str, used: float, *users) -> Instance:
    """An instance of so many megabytes, in this state, which was last used then."""
    model = SimpleNamespace(id=id, keep=state == "KEPT")
    worker = SimpleNamespace(stopping=state == "LEAVING")
    instance = Instance(model, worker, size * MB, None, None, last_used=used)
    instance.users = {*users}
    return instance


HELD = [held("a", 500, "READY", 3), held("b", 300, "LOADING", 2), held("c", 100, "LEAVING", 4)]
HELD += [held("d", 9, "READY", 1, "a user")]


def test_room_for_a_model():
    parts = {"weights": 600 * MB, "kv": 400 * MB}
    assert pool.room_for("x", parts, 1000, 50, HELD) is None  # it fits
    for free in (999, 100):  # all that are idle would make enough room; first one that is stopping
        assert pool.room_for("x", parts, free, 50, HELD).model.id == "c"
    need = "model x needs 1000 MB (weights 600 MB, kv 400 MB)"
    message = f"{need}; 999 MB are free beside the reserve of 50 MB"
    with pytest.raises(HttpError, match=f"^{re.escape(message)}$") as refused:
        pool.room_for("x", parts, 99, 50, HELD)  # nothing is unloaded in vain
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    with pytest.raises(HttpError, match=re.escape("reserve of 50 MB and what is kept (k)")):
        pool.room_for("x", parts, 99, 50, [*HELD, held("k", 900, "KEPT", 0)])
    for id, others in (("b", "ca"), ("c", "cba")):  # it makes no room for itself; it is loaded anew
        assert "".join(one.model.id for one in pool.removable(HELD, id)) == others


# The files of the service's group, and the bytes that its limit leaves.
LIMITS = json.loads(r"""[
    [{}, Infinity],
    [{"memory.max": "4000\n"}, Infinity],
    [{"memory.max": "max\n", "memory.current": "3000\n", "memory.stat": "anon 2000\nfile 900\n"},
     Infinity],
    [{"memory.max": "4000\n", "memory.current": "3000\n", "memory.stat": "anon 2000\nfile 900\n"},
     1900]]""")


def test_the_limit_of_the_service_counts(patch, tmp_path):
    """A model that does not fit into MemoryMax= is refused. The kernel would end the daemon."""
    unit = "system.slice/cerebrum-backend.service"
    (tmp_path / "table").write_text(f"1:name=systemd:/x\n0::/{unit}\n")
    group = tmp_path / unit
    group.mkdir(parents=True)
    for files, left in LIMITS:
        for name, text in files.items():
            (group / name).write_text(text)
        assert memory.cgroup_left_bytes(tmp_path / "table", tmp_path) == left
    patch(pool, "cgroup_left_bytes", lambda: 300 * MB)
    assert 0 < Engine(load_config(Environment(CATALOG))).pool._free_mb() <= 300


# ----------------------------------------------------------------------------------------- requests


REQUEST: Any = SimpleNamespace(body=json.dumps({"model": A, "prompt": "x"}).encode(), notes={})


async def test_a_stream_sends_the_events_before_an_error_first(house):
    error, stream = HttpError("INTERNAL_ERROR", "fault"), events_of(house.engine, REQUEST)
    answer = asyncio.ensure_future(anext(stream))
    await house.begun()
    (completion,) = house.engine.admissions
    completion.events.put_nowait([{"token": "x", "total_tokens": 1}, error])
    assert vpsd.write_events(await answer) == b'data: {"token": "x", "total_tokens": 1}\n\n'
    with pytest.raises(HttpError) as raised:
        await anext(stream)
    assert raised.value is error


async def test_a_newer_request_replaces_the_older_of_its_session_unless_it_is_refused(
    house,
):
    older, other = house.ask(session="s"), house.ask(session="t")
    house.engine.cpu.others_percent = 100.0
    for model, code in ((A, "RESOURCE_EXHAUSTED"), ("unknown", "MODEL_NOT_FOUND")):
        assert house.refuses(model, session="s").code == code
    assert list(house.engine.admissions) == [older, other]
    house.engine.cpu.others_percent = 0.0
    newer = house.ask(session="s")
    assert (await house.error(older)).code == "SUPERSEDED"
    house.finish(other, newer)


async def test_a_worker_that_has_hung_is_noticed_and_left(house):
    house.patch(vpsd, "KEEPALIVE_SECONDS", 0.01)
    house.patch(vpsd, "FIRST_EVENT_SECONDS", 0.01)
    await house.idle()
    answer = asyncio.ensure_future(vpsd.inference(house.engine, REQUEST))
    async with contextlib.aclosing(events_of(house.engine, REQUEST)) as stream:
        assert vpsd.write_events(await anext(stream)) == SSE_COMMENT
        await until(lambda: len(house.worker().submitted) == 3)
        assert house.engine.stuck(time.monotonic()) == ""
        house.worker().due = time.monotonic()
        assert house.engine.stuck(time.monotonic()) == f"model {A}: the worker makes no progress"
        assert [block async for block in stream] == []
    with pytest.raises(HttpError, match=f"^model {A}: the worker makes no progress$"):
        await answer


# ---------------------------------------------------------------------------- cleaning up, settings


async def test_a_request_during_a_clean_up_keeps_its_model(house):
    house.patch(vpsd, "CLEANUP_SECONDS", 0.0)
    first, second = await house.idle(A), await house.idle(B)
    cleaning = asyncio.create_task(house.engine.clean_up())
    await until(lambda: first.stopping)
    completion = await house.loaded(B)
    await house.ends(A)
    await until(lambda: house.pool.instances.keys() == {B})
    assert not second.stopping
    cleaning.cancel()
    house.finish(completion)


@pytest.mark.parametrize("task", ["watch_cpu", "clean_up"])
def test_housekeeping_that_fails_ends_the_daemon(patch, tmp_path, task):
    """systemd starts it again. With a frozen CPU meter, every request could be refused."""

    async def fail(_):
        raise OSError(5, "of /proc")

    patch(Engine, task, fail)
    given = f"CEREBRUM_VPS_PORT=0 CEREBRUM_API_KEY=key CEREBRUM_STATE_DIR={tmp_path}/state"
    environ = Environment(CATALOG | variables(given))
    served = asyncio.wait_for(vpsd.serve(environ, load_config(environ)), PATIENCE)
    assert asyncio.run(served) == 1


async def test_new_settings_take_models_and_let_go_on_what_runs(house):
    running, idle = await house.loaded(A), await house.idle(B)
    busy, config = house.worker(), house.engine.config
    other_file = replace(house.pool.models[A], file="newer.gguf")
    renamed = replace(house.pool.models[B], name="renamed")
    (house.folder / "newer.gguf").write_bytes(b"GGUF")
    settings = replace(config.engine, n_ctx=256)
    house.reconfigure(models=(other_file, renamed), idle_minutes=7, engine=settings)
    assert (house.engine.config.idle_minutes, house.pool.settings.n_ctx) == (7, 4096)
    # A new name is no new model.
    assert (await house.pool.unload_unused(), idle.stopping) == ({}, False)
    beside = await house.loaded()  # as long as somebody uses it, it serves
    assert beside.job in busy.submitted
    assert not busy.stopping
    house.finish(beside, running)
    again = house.ask()
    await until(lambda: busy.stopping)
    busy.ended.set_result(None)
    await until(lambda: house.worker() is not busy)
    house.finish(again)


async def test_a_model_to_keep_is_loaded_at_the_start_and_stays(house):
    listed = house.engine.config.models
    stays = tuple(replace(model, keep=model.id in (A, C)) for model in listed)
    house.reconfigure(models=stays, idle_minutes=0)
    house.file(C).unlink()
    await house.pool.measure()
    await house.pool.load_kept()  # as the housekeeping does
    worker = house.worker()
    worker.ready.set_result(None)
    await until(lambda: A in house.pool.ready)
    assert await house.pool.unload_unused() == {}
    house.room = 0
    assert (await house.error(house.ask(B))).message.endswith(f" and what is kept ({A})")
    lines = [line for line in house.caplog.messages if "is to be kept" in line]
    assert [line.split(",")[0] for line in lines] == [f"model {C} is to be kept"]  # logged once
    assert not worker.stopping
    house.reconfigure(models=listed)
    assert [one.model.id for one in pool.removable(house.pool.instances.values())] == [A]


async def test_a_model_that_is_listed_no_more_is_unloaded(house):
    fewer = tuple(model for model in house.engine.config.models if model.id not in (A, B))
    worker, waiting = await house.idle(), house.ask(B)
    loading = await house.begun(B)
    house.reconfigure(models=fewer, idle_minutes=60)
    assert (A in house.pool.models, worker.stopping) == (False, True)
    assert house.refuses().message.startswith("model: expected one of ")
    loading.end(DAMAGED)  # a load that fails after that is still told
    assert (await house.error(waiting)).message == "it is damaged"


# A model, and what changes of it.
CHANGES = json.loads("""[
    ["qwen_0_5b", {"file": "newer.gguf"}],
    ["qwen_0_5b", {"sha256": "1111111111111111111111111111111111111111111111111111111111111111"}],
    ["qwen_1_5b", {"early": false}],
    ["qwen_1_5b", {"fim": ["<a>", "<b>", "<c>"]}],
    ["qwen_1_5b", {"fim_layout": "spm"}]]""")


@pytest.mark.parametrize(("changed", "change"), CHANGES, ids=str)
async def test_what_changes_of_a_pair_reaches_the_loaded_model(house, changed, change):
    """New settings of the draft model, a switch between them, the marks of a gap."""
    models = {A: house.pool.models[A], B: replace(house.pool.models[B], draft=A)}
    house.reconfigure(models=(*models.values(),))
    worker = await house.idle(B)
    renamed = replace(models[A], name="renamed")
    house.reconfigure(models=(renamed, models[B]))
    assert not worker.stopping
    models[changed] = replace(models[changed], **change)
    (house.folder / models[A].file).touch()
    house.reconfigure(models=(*models.values(),))
    assert worker.stopping
    await house.ends(B)
    plan = (await house.idle(B)).plan
    assert (plan.fim, plan.layout) == (models[B].fim, models[B].fim_layout)
    assert (plan.draft.path.name, plan.draft.sha256) == (models[A].file, models[A].sha256)


async def test_what_was_kept_of_a_model_goes_when_it_is_listed_no_more(house):
    """But not because its file or a disk is missing."""
    state, models = house.folder / "state", house.engine.config.models
    tuned = f"tuned/{house.file().name}"
    kept = {f"kv/{A}/0.kv", tuned, f"{tuned}.json"}
    others = {"tuned/.lock", "tuned/.work-1/new"}
    for name in kept | others | {"kv/old/0.kv", "tuned/old.gguf", "tuned/old.gguf.json"}:
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).touch()

    def left():
        return {str(path.relative_to(state)) for path in state.glob("*/**/*") if path.is_file()}

    completion, worker = await house.loaded(), house.worker()
    house.file().unlink()
    house.pool.folder = house.folder / "unmounted"
    house.reconfigure()
    assert left() == kept | others
    house.reconfigure(models=models[:-1])
    assert left() == others
    house.finish(completion)
    saved = state / f"kv/{A}/0.kv"
    saved.parent.mkdir()
    saved.touch()  # by the worker, which saves its prompts at its end
    worker.ended.set_result(None)
    await until(lambda: left() == others)


async def test_a_clock_that_jumps_unloads_nothing(house):
    await house.idle()
    house.reconfigure(idle_minutes=1)
    now = time.time()
    for jump in (86_400, -86_400):
        house.patch(time, "time", lambda jump=jump: now + jump)
        assert await house.pool.unload_unused() == {}
