"""vpsd's bookkeeping: places for requests, loading and unloading models, and faults on the way.

The workers are scripted, because a real one decides itself when it has loaded and when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import FILES, PATIENCE, ROOT, until

import vpsd
from cerebrum.settings import Environment
from cerebrum.vps import encoding, memory, pool
from cerebrum.vps.encoding import TunedFile
from cerebrum.vps.llama import MB, Settings
from cerebrum.vps.pool import Instance
from cerebrum.vps.worker import Loader
from cerebrum_common import SSE_COMMENT, HttpError
from vpsd import Completion, Engine, events_of, load_config

A, B, C = "qwen_0_5b", "qwen_1_5b", "qwen_7b"


class ScriptedWorker:
    """Stands for a worker's thread. The test sets `ready` when it has loaded, and `ended` when it has ended."""

    made: list[ScriptedWorker]

    def __init__(self, loader: Loader, _baton: Any, tally: Any) -> None:
        self.loader, self.model_id, self.tuned, self.tally = loader, loader.model_id, loader.tuned, tally
        self.ready: Future[None] = Future()
        self.ending: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.due = float("inf")
        self.stopping = False
        self.model, self.stored_bytes, self.memory_bytes = SimpleNamespace(n_ctx=4096), 0, 0
        self.submitted: list[Any] = []
        self.cancelled: list[Any] = []
        self.fails: Exception | None = None
        self.made.append(self)

    def start(self) -> None:
        pass

    join = start

    def stop(self) -> None:
        self.stopping = True

    def fail(self) -> None:
        self.ending.set_result(None)
        self.ready.set_exception(HttpError("MODEL_LOAD_FAILED", "it is damaged"))
        self.ended.set_result(None)

    def prepare(self, job: Any) -> Any:
        if self.fails:
            raise self.fails
        return job

    def submit(self, job: Any) -> None:
        self.submitted.append(job)

    def give_way(self) -> None:
        pass

    def cancel(self, job: Any) -> None:
        self.cancelled.append(job)


class House:
    """An engine with scripted workers, on a machine with memory for `room` models."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.room = engine, 2

    def worker(self, model: str) -> ScriptedWorker:
        return [worker for worker in ScriptedWorker.made if worker.model_id == model][-1]

    def ask(self, model: str, **more: Any) -> Completion:
        return self.engine.admit(vpsd.parse_inference({"model": model, "prompt": "x", **more}), {})

    async def loaded(self, model: str) -> Completion:
        """A completion that has reached its worker."""
        completion = self.ask(model)
        await until(lambda: model in self.engine.pool.instances)
        worker = self.worker(model)
        if not worker.ready.done():
            worker.ready.set_result(None)
        await until(lambda: completion.job in worker.submitted)
        return completion

    async def begun(self, model: str) -> ScriptedWorker:
        """The worker of a load that a completion waits for."""
        await until(lambda: model in self.engine.pool.instances and self.engine.pool.instances[model].users)
        return self.worker(model)

    async def idle(self, model: str) -> ScriptedWorker:
        self.engine.finish(await self.loaded(model))
        return self.worker(model)


@pytest.fixture
def house(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[House]:
    """A house in which the files of all models exist. After the test every place must be free again."""
    given = {
        "CEREBRUM_MODELS_FILE": str(ROOT / "models.toml"),
        "CEREBRUM_MODELS_DIR": str(tmp_path),
        "CEREBRUM_STATE_DIR": str(tmp_path / "state"),
        "CEREBRUM_IDLE_MINUTES": "0",
    }
    config = load_config(Environment(given), Path("/nonexistent"))
    for model in config.models:
        (tmp_path / model.file).write_bytes(b"GGUF")
    ScriptedWorker.made = []
    engine = Engine(config)
    house = House(engine)
    monkeypatch.setattr(pool, "Worker", ScriptedWorker)
    monkeypatch.setattr(encoding, "needed", lambda _, forms: [{"weights": MB}] * len(forms))
    monkeypatch.setattr(engine.pool, "_free_mb", lambda: house.room - len(engine.pool.instances))
    for module in (vpsd, pool):
        monkeypatch.setattr(module, "available_mb", lambda: 1 << 20)
    yield house
    for worker in ScriptedWorker.made:
        if not worker.ended.done():
            worker.ended.set_result(None)
    runner.run(asyncio.wait_for(engine.stop(), PATIENCE))
    assert engine.pool.instances == {}
    assert engine.completions == {}


async def error_of(completion: Completion) -> HttpError:
    events = await completion.next_events(PATIENCE)
    assert isinstance(events[-1], HttpError)
    return events[-1]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The texts of the warnings and errors in the log."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


NOT_TUNED = "the published file is used, not the tuned one: "


def tuned_file(folder: Path, model: str) -> TunedFile:
    return TunedFile(folder / f"tuned-{model}", Settings(micro_batch=128), "abc", "tuned: Q4_K to Q4_1")


async def test_a_model_is_loaded_from_its_tuned_file_or_the_log_says_why_not(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {house.engine.pool.models[A].file: (tuned_file(tmp_path, A), "")}
    why = "made for cpus 4, here it is 2"
    monkeypatch.setattr(encoding, "find_tuned", lambda path, *_: found.get(path.name, (None, why)))
    assert (await house.idle(A)).tuned == tuned_file(tmp_path, A)
    assert (await house.idle(B)).tuned is None
    assert warnings(caplog) == [f"model {B}: {NOT_TUNED}{why}"]


async def test_a_tuned_file_that_does_not_fit_is_not_used(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tuned_file(tmp_path, A)
    monkeypatch.setattr(encoding, "find_tuned", lambda *_: (tuned, ""))
    monkeypatch.setattr(encoding, "needed", lambda path, _: [{"weights": (9 if path == tuned.path else 1) * MB}])
    other = await house.idle(B)
    assert (await house.idle(A)).tuned is None
    assert not other.stopping  # nothing was unloaded in vain
    why = f"{NOT_TUNED}it needs 9 MB, and 2 MB can be freed beside the reserve"
    assert warnings(caplog) == [f"model {B}: {why}", f"model {A}: {why}"]


async def test_a_tuned_file_with_a_damaged_header_is_not_used(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tuned_file(tmp_path, A)
    tuned.path.write_bytes(b"GGUF, cut short")
    (tmp_path / house.engine.pool.models[A].file).unlink()
    (tmp_path / house.engine.pool.models[A].file).symlink_to(FILES[A])
    monkeypatch.setattr(encoding, "find_tuned", lambda *_: (tuned, ""))
    monkeypatch.setattr(encoding, "needed", memory.needed)
    monkeypatch.setattr(house.engine.pool, "_free_mb", lambda: 1e6)
    assert (await house.idle(A)).tuned is None
    assert warnings(caplog)[-1].startswith(f"model {A}: {NOT_TUNED}llama.cpp cannot load this file; it is damaged")


async def test_a_model_that_does_not_fit_gets_a_shorter_context(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def listed() -> dict[str, tuple[int, bool]]:
        entries: Any = (await vpsd.models(house.engine, SimpleNamespace())).body  # type: ignore[arg-type]
        return {entry["id"]: (entry["n_ctx"], entry["available"]) for entry in entries["models"]}

    monkeypatch.setattr(encoding, "needed", lambda _, forms: [{"kv": one.sequences * one.n_ctx << 10} for one in forms])
    monkeypatch.setattr(house.engine.pool, "_free_mb", lambda: 5.0)
    monkeypatch.setattr(encoding, "find_tuned", lambda _, used, __: (TunedFile(tmp_path, used, "abc", "tuned"), ""))
    assert (await listed())[A] == (2560, True)
    settings = (await house.idle(A)).loader.tuned.settings
    assert (settings.n_ctx, settings.sequences) == (2560, 2)
    assert warnings(caplog) == [f"model {A}: memory allows only a context of 2,560 tokens and 2 at a time"]
    monkeypatch.setattr(encoding, "needed", memory.needed)
    assert (await listed())[C] == (4096, False)  # its file is damaged


@pytest.mark.parametrize("by_hand", [False, True])
async def test_a_request_during_a_clean_up_keeps_its_model(house: House, by_hand: bool) -> None:
    first, second = await house.idle(A), await house.idle(B)
    cleanup = vpsd.cleanup(house.engine, SimpleNamespace()) if by_hand else house.engine.pool.unload_unused()  # type: ignore[arg-type]
    cleaning = asyncio.ensure_future(cleanup)
    await until(lambda: first.stopping)
    completion = await house.loaded(B)
    first.ended.set_result(None)
    result: Any = await cleaning
    assert (result.body["models_unloaded"] if by_hand else list(result)) == [A]
    assert (list(house.engine.pool.instances), second.stopping) == ([B], False)
    house.engine.finish(completion)


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError("of a header"), FileNotFoundError(2, "gone", "/secret"), KeyError()]
)
@pytest.mark.parametrize("place", ["prepare", "_load", "relieve"])
async def test_any_fault_on_the_way_becomes_a_response(
    house: House, monkeypatch: pytest.MonkeyPatch, fault: Exception, place: str
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise fault

    if place == "prepare":
        (await house.idle(A)).fails = fault
    else:
        monkeypatch.setattr(house.engine.pool, place, fail)
    completions = [house.ask(A), house.ask(A)]
    for completion in completions:
        error = await error_of(completion)
        assert (error.status, error.code) == (500, "INTERNAL_ERROR")
        assert "secret" not in error.message
        house.engine.finish(completion)
    monkeypatch.undo()
    assert len(house.engine.completions) == 0


async def test_a_model_file_that_vanishes_is_a_load_that_failed(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoding, "needed", memory.needed)
    completion = house.ask(A)
    (tmp_path / house.engine.pool.models[A].file).unlink()
    error = await error_of(completion)
    assert (error.status, error.code) == (500, "MODEL_LOAD_FAILED")
    assert error.message.endswith(": the file cannot be read")
    assert str(tmp_path) not in error.message
    house.engine.finish(completion)


class Block:
    """Holds a load up before its worker starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.end = 0, threading.Event()
        monkeypatch.setattr(encoding, "find_tuned", self._wait)

    def _wait(self, *_: Any) -> tuple[None, str]:
        self.reached += 1
        self.end.wait(PATIENCE)
        return None, ""


async def abandoned(house: House) -> ScriptedWorker:
    """The worker of a load whose only client has left."""
    completion = house.ask(A)
    worker = await house.begun(A)
    house.engine.finish(completion)
    return worker


async def test_a_load_is_finished_though_its_client_has_left(house: House) -> None:
    worker, engine = await abandoned(house), house.engine
    assert await engine.pool.unload_unused() == {}  # with a limit of 0 minutes
    before = time.monotonic()
    worker.ready.set_result(None)
    await until(lambda: engine.pool.tallies[A].loads == 1)
    assert not worker.stopping
    assert engine.pool.instances[A].last_used >= before
    assert await house.idle(A) is worker


async def test_requests_that_replace_each_other_start_one_load(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if each of them leaves before the worker starts."""
    block = Block(monkeypatch)
    for _ in range(3):
        last = house.ask(A, session="s")
        await until(lambda: block.reached)
        await asyncio.sleep(0)  # it gets as far as it can
    block.end.set()
    (await house.begun(A)).ready.set_result(None)
    await until(lambda: house.worker(A).submitted == [last.job])
    assert block.reached == 1
    house.engine.finish(last)


async def test_a_load_that_has_not_begun_ends_with_the_daemon(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(monkeypatch)
    house.ask(A)
    await until(lambda: block.reached)
    await house.engine.stop()
    block.end.set()
    await until(lambda: not house.engine.pool.starting)
    assert ScriptedWorker.made == []


@pytest.mark.parametrize("why", ["unload", "memory"])
async def test_a_load_that_nobody_waits_for_can_be_stopped(house: House, why: str) -> None:
    house.room = 1
    engine, waiting = house.engine, house.ask(A)
    worker = await house.begun(A)
    with pytest.raises(HttpError) as busy:
        await engine.pool.unload(A)
    assert (busy.value.code, worker.stopping) == ("MODEL_BUSY", False)
    other = house.ask(B)
    assert (await error_of(other)).code == "RESOURCE_EXHAUSTED"
    for completion in (other, waiting):
        engine.finish(completion)
    stopping = asyncio.ensure_future(engine.pool.unload(A) if why == "unload" else house.loaded(B))
    await until(lambda: worker.stopping)
    worker.ready.set_exception(HttpError("SHUTTING_DOWN", "given up"))
    worker.ended.set_result(None)
    result = await stopping
    assert A not in engine.pool.instances
    if isinstance(result, Completion):
        engine.finish(result)


async def test_a_load_is_unloaded_as_soon_as_it_has_begun(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    block, completion = Block(monkeypatch), house.ask(A)
    await until(lambda: block.reached)
    house.engine.finish(completion)
    unloading = asyncio.ensure_future(house.engine.pool.unload(A))
    block.end.set()
    await until(lambda: A in house.engine.pool.instances and house.worker(A).stopping)
    house.worker(A).ended.set_result(None)
    assert isinstance(await unloading, float)


async def test_a_load_that_fails_without_a_client_is_remembered(house: House) -> None:
    (await abandoned(house)).fail()
    await until(lambda: A not in house.engine.pool.instances)
    with pytest.raises(HttpError, match=r"^it is damaged$"):
        house.ask(A)
    assert house.engine.pool.tallies[A].failed_loads == 1


async def test_a_request_that_comes_while_a_load_fails_does_not_load_again(house: House) -> None:
    waiting = house.ask(A)
    worker = await house.begun(A)
    worker.ending.set_result(None)
    await until(lambda: worker.stopping)
    late = house.ask(A)
    await asyncio.sleep(0)  # it gets as far as it can
    worker.ready.set_exception(HttpError("MODEL_LOAD_FAILED", "it is damaged"))
    worker.ended.set_result(None)
    for completion in (waiting, late):
        assert (await error_of(completion)).message == "it is damaged"
        house.engine.finish(completion)
    assert ScriptedWorker.made == [worker]


async def test_a_worker_that_ends_by_itself_is_replaced(house: House) -> None:
    house.engine.finish(await house.loaded(A))
    failed = house.worker(A)
    failed.ending.set_result(None)
    await until(lambda: failed.stopping)
    waiting = house.ask(A)
    failed.ended.set_result(None)
    await until(lambda: house.worker(A) is not failed)
    house.worker(A).ready.set_result(None)
    await until(lambda: house.worker(A).submitted == [waiting.job])
    house.engine.finish(waiting)


async def test_two_requests_both_wait_for_the_idle_model_that_makes_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = await house.idle(A)
    monkeypatch.setattr(pool, "available_mb", lambda: (1 << 20) * (A not in house.engine.pool.instances))
    completions = [house.ask(B), house.ask(B)]
    await until(lambda: idle.stopping)
    assert [completion.events.qsize() for completion in completions] == [0, 0]
    idle.ended.set_result(None)
    await until(lambda: B in house.engine.pool.instances)
    worker = house.worker(B)
    worker.ready.set_result(None)
    await until(lambda: len(worker.submitted) == 2)
    for completion in completions:
        house.engine.finish(completion)


async def test_saved_prompts_are_dropped_before_a_request_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, dropped, available = await house.idle(A), list[int](), 900

    def shed(size: int) -> Future[None]:
        nonlocal available
        dropped.append(size)
        available, worker.stored_bytes, done = available + 130, 0, Future[None]()
        done.set_result(None)
        return done

    for module in (vpsd, pool):
        monkeypatch.setattr(module, "available_mb", lambda: available)
    worker.shed, worker.stored_bytes = shed, 200 * MB  # type: ignore[attr-defined]
    house.engine.finish(await house.loaded(A))
    assert dropped == [124 * MB]
    available, worker.stored_bytes = 800, 1
    completion = house.ask(A)
    message = "expected 1024 MB of memory available, got 930 MB"
    assert (await error_of(completion)).message == message  # all that was saved was too little
    house.engine.finish(completion)
    with pytest.raises(HttpError, match=f"^{message}$"):
        house.ask(A)


async def test_a_second_load_waits_for_a_model_that_is_being_unloaded(house: House) -> None:
    house.room = 1
    idle = await house.idle(A)
    unloading = asyncio.ensure_future(house.engine.pool.unload(A))
    await until(lambda: idle.stopping)
    completion = house.ask(B)
    await until(lambda: house.engine.pool.loading.locked())
    assert B not in house.engine.pool.instances
    idle.ended.set_result(None)
    assert await unloading == 0.0
    house.engine.finish(await house.loaded(B))
    house.engine.finish(completion)


async def test_a_model_that_does_not_fit_is_refused_with_figures(house: House) -> None:
    house.room = 1
    busy = await house.loaded(A)
    completion = house.ask(B)
    error = await error_of(completion)
    assert (error.status, error.code) == (503, "RESOURCE_EXHAUSTED")
    assert B in error.message
    assert re.findall(r"\d+ MB", error.message) == ["1 MB", "1 MB", "0 MB", "1024 MB"]
    for one in (busy, completion):
        house.engine.finish(one)


def instances(*given: tuple[str, int, str, float]) -> list[Instance]:
    """Of these ids, megabytes, states or "busy", and times of the last use."""
    made = []
    for id, size, state, used in given:
        one: Any = Instance(SimpleNamespace(id=id), None, size * MB, None, None, last_used=used)  # type: ignore[arg-type]
        one.state = pool.State["READY" if state == "busy" else state]
        one.users = {1} if state == "busy" else set()
        made.append(one)
    return made


HELD = instances(("a", 500, "READY", 3), ("b", 300, "LOADING", 2), ("c", 100, "LEAVING", 4), ("d", 900, "busy", 1))


@pytest.mark.parametrize(
    ("need", "free", "going"),
    [
        (1000, 1000, ""),  # it fits
        (1000, 901, "c"),  # one that is leaving anyway
        (1000, 899, "cb"),  # then the least recently used
        (1000, 600, "cb"),
        (1000, 599, "cba"),
        (1000, 100, "cba"),  # all that are idle
        (1000, 99, None),  # nothing is unloaded in vain
    ],
)
def test_room_for_a_model(need: int, free: float, going: str | None) -> None:
    parts = {"weights": 600 * MB, "kv": (need - 600) * MB}
    if going is not None:
        assert [one.model.id for one in pool.room_for("x", parts, free, 50, HELD)] == [*going]
        return
    message = "model x needs 1000 MB (weights 600 MB, kv 400 MB); 999 MB are free beside the reserve of 50 MB"
    with pytest.raises(HttpError, match=f"^{re.escape(message)}$") as refused:
        pool.room_for("x", parts, free, 50, HELD)
    assert (refused.value.status, refused.value.code) == (503, "RESOURCE_EXHAUSTED")


def test_a_wanted_model_makes_no_room_for_itself() -> None:
    assert [one.model.id for one in pool.removable(HELD, "b")] == ["c", "a"]
    assert [one.model.id for one in pool.removable(HELD, "c")] == ["c", "b", "a"]  # it is loaded anew


def request_for(model: str) -> Any:
    return SimpleNamespace(body=json.dumps({"model": model, "prompt": "x"}).encode(), notes={})


async def test_a_stream_that_never_started_takes_no_place(house: House) -> None:
    async with contextlib.aclosing(events_of(house.engine, request_for(A))):
        pass  # the client reset the connection before the head was written
    assert house.engine.completions == {}


async def test_a_stream_whose_client_leaves_gives_its_place_back(house: House) -> None:
    async with contextlib.aclosing(events_of(house.engine, request_for(A))) as stream:
        answer = asyncio.ensure_future(anext(stream))
        (await house.begun(A)).ready.set_result(None)
        await until(lambda: house.worker(A).submitted)
        (completion,) = house.engine.completions
        completion.events.put_nowait([{"token": "x", "total_tokens": 1}])
        await answer
    assert house.engine.completions == {}
    assert house.worker(A).cancelled == [completion.job]


async def test_a_stream_sends_the_events_before_an_error_first(house: House) -> None:
    error = HttpError("INTERNAL_ERROR", "fault")
    stream = events_of(house.engine, request_for(A))
    answer = asyncio.ensure_future(anext(stream))
    await house.begun(A)
    (completion,) = house.engine.completions
    completion.events.put_nowait([{"token": "x", "total_tokens": 1}, error])
    assert vpsd.write_events(await answer) == b'data: {"token": "x", "total_tokens": 1}\n\n'
    with pytest.raises(HttpError) as raised:
        await anext(stream)
    assert raised.value is error
    assert house.engine.completions == {}


async def test_a_newer_request_of_a_session_replaces_the_older(house: House) -> None:
    older, other = house.ask(A, session="s"), house.ask(A, session="t")
    newer = house.ask(A, session="s")
    error = await error_of(older)
    assert (error.status, error.code) == (409, "SUPERSEDED")
    assert list(house.engine.completions) == [other, newer]
    with pytest.raises(HttpError) as refused:
        house.ask(A)
    assert refused.value.code == "RATE_LIMIT"
    for completion in (other, newer):
        house.engine.finish(completion)


async def test_a_newer_request_that_is_refused_ends_nothing(house: House) -> None:
    older = house.ask(A, session="s")
    house.engine.cpu.others_percent = 100.0
    for model, code in ((A, "RESOURCE_EXHAUSTED"), ("unknown", "MODEL_NOT_FOUND")):
        with pytest.raises(HttpError) as refused:
            house.ask(model, session="s")
        assert refused.value.code == code
    assert list(house.engine.completions) == [older]
    assert not older.job.cancelled
    house.engine.finish(older)


async def test_the_cpu_is_watched_while_a_model_is_unloaded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpsd, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(vpsd, "CLEANUP_SECONDS", 0.0)

    worker, samples = await house.idle(A), list[int]()
    monkeypatch.setattr(house.engine.cpu, "sample", lambda: samples.append(1))
    tasks = [asyncio.create_task(task) for task in (house.engine.watch_cpu(), house.engine.clean_up())]
    await until(lambda: worker.stopping)
    seen = len(samples)
    await until(lambda: len(samples) > seen + 10)
    worker.ended.set_result(None)
    await until(lambda: A not in house.engine.pool.instances)
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("task", ["watch_cpu", "clean_up"])
def test_housekeeping_that_fails_ends_the_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str) -> None:
    """systemd starts it again. With a frozen CPU meter, every request could be refused."""
    given = {
        "CEREBRUM_MODELS_FILE": str(Path(vpsd.__file__).with_name("models.toml")),
        "CEREBRUM_VPS_PORT": "0",
        "CEREBRUM_API_KEY": "key",
    }

    async def fail(_: Any) -> None:
        raise OSError(5, "of /proc")

    monkeypatch.setattr(Engine, task, fail)
    environ = Environment(given)
    served = asyncio.wait_for(vpsd.serve(environ, load_config(environ, tmp_path)), PATIENCE)
    assert asyncio.run(served) == 1


async def test_new_settings_take_models_and_let_go_on_what_runs(house: House, tmp_path: Path) -> None:
    house.room = 3
    engine = house.engine
    running, idle = await house.loaded(A), await house.idle(B)
    first, second = (engine.pool.models[id] for id in (A, B))
    models = dataclasses.replace(first, file="newer.gguf"), dataclasses.replace(second, name="renamed")
    (tmp_path / "newer.gguf").write_bytes(b"GGUF")
    settings = dataclasses.replace(engine.config.engine, n_ctx=256)
    engine.reconfigure(dataclasses.replace(engine.config, models=models, idle_minutes=7, engine=settings))
    assert (engine.config.idle_minutes, engine.config.engine.n_ctx) == (7, 4096)
    assert not house.worker(A).stopping  # its client is still there
    assert engine.pool.unused() == []  # a new name is no new model
    assert not idle.stopping
    busy = house.worker(A)
    beside = house.ask(A)
    await until(lambda: beside.job in busy.submitted)  # as long as somebody uses it, it serves
    assert not busy.stopping
    engine.finish(beside)
    engine.finish(running)
    again = house.ask(A)
    await until(lambda: busy.stopping)
    busy.ended.set_result(None)
    await until(lambda: house.worker(A) is not busy)
    engine.finish(again)


async def test_a_model_that_is_listed_no_more_is_unloaded(house: House) -> None:
    engine, worker = house.engine, await house.idle(A)
    engine.reconfigure(dataclasses.replace(engine.config, models=engine.config.models[:-1], idle_minutes=60))
    assert A not in engine.pool.models
    assert worker.stopping
    with pytest.raises(HttpError, match=r"^model: expected one of "):
        house.ask(A)


async def test_a_clock_that_jumps_unloads_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.idle(A)
    house.engine.reconfigure(dataclasses.replace(house.engine.config, idle_minutes=1))
    now = time.time()
    for jump in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert house.engine.pool.unused() == []


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "4000\n", "memory.current": "3000\n", "memory.stat": "anon 2000\nfile 900\n"}, 1900),
        ({"memory.max": "max\n", "memory.current": "3000\n", "memory.stat": "anon 2000\nfile 900\n"}, float("inf")),
        ({"memory.max": "4000\n"}, float("inf")),
        ({}, float("inf")),
    ],
    ids=["limit", "no limit", "half", "none"],
)
def test_the_limit_of_the_service_counts(tmp_path: Path, files: dict[str, str], left: float) -> None:
    """A model that does not fit into MemoryMax= is refused. The kernel would end the daemon."""
    (tmp_path / "table").write_text("1:name=systemd:/x\n0::/system.slice/cerebrum-backend.service\n")
    group = tmp_path / "system.slice" / "cerebrum-backend.service"
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
    assert memory.cgroup_left_bytes(tmp_path / "table", tmp_path) == left


def test_a_model_beyond_the_limit_of_the_service_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pool, "cgroup_left_bytes", lambda: 300 * MB)
    engine = Engine(load_config(Environment({"CEREBRUM_MODELS_FILE": str(ROOT / "models.toml")}), tmp_path))
    assert 0 < engine.pool._free_mb() <= 300


async def test_a_worker_that_has_hung_is_noticed_and_left(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpsd, "KEEPALIVE_SECONDS", 0.01)
    monkeypatch.setattr(vpsd, "HEAD_SECONDS", 0.01)

    house.engine.finish(await house.loaded(A))
    answer = asyncio.ensure_future(vpsd.inference(house.engine, request_for(A)))
    async with contextlib.aclosing(events_of(house.engine, request_for(A))) as stream:
        assert vpsd.write_events(await anext(stream)) == SSE_COMMENT
        await until(lambda: len(house.worker(A).submitted) == 3)
        assert house.engine.stuck(time.monotonic()) == ""
        house.worker(A).due = time.monotonic()
        assert house.engine.stuck(time.monotonic()) == f"model {A}: the worker makes no progress"
        assert [block async for block in stream] == []
    with pytest.raises(HttpError, match=f"^model {A}: the worker makes no progress$"):
        await answer


async def test_a_loaded_model_needs_no_file(house: House, tmp_path: Path) -> None:
    worker = await house.idle(A)
    (tmp_path / house.engine.pool.models[A].file).unlink()
    await house.idle(A)
    assert ScriptedWorker.made == [worker]
    worker.ending.set_result(None)
    await until(lambda: worker.stopping)
    with pytest.raises(HttpError, match=f"^model {A}: the file .* is missing"):
        house.ask(A)


async def test_a_file_that_could_not_be_loaded_is_not_read_again_for_each_request(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def fail() -> None:
        completion = house.ask(A)
        (await house.begun(A)).fail()
        assert (await error_of(completion)).message == "it is damaged"
        house.engine.finish(completion)
        await until(lambda: A not in house.engine.pool.instances)

    engine = house.engine
    file = tmp_path / engine.pool.models[A].file
    await fail()
    for _ in range(2):
        with pytest.raises(HttpError, match=r"^it is damaged$") as refused:
            house.ask(A)
        assert refused.value.code == "MODEL_LOAD_FAILED"
    assert engine.pool.refusal(engine.pool.models[A])
    assert len(ScriptedWorker.made) == 1
    file.write_bytes(b"GGUF again")
    assert not engine.pool.refusal(engine.pool.models[A])
    await fail()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + pool.LOAD_AGAIN_SECONDS)
    assert not engine.pool.refusal(engine.pool.models[A])


async def test_a_load_that_fails_after_new_settings_have_dropped_its_model_is_still_told(house: House) -> None:
    engine, completion = house.engine, house.ask(A)
    worker = await house.begun(A)
    engine.reconfigure(dataclasses.replace(engine.config, models=engine.config.models[:-1]))
    worker.fail()
    assert (await error_of(completion)).message == "it is damaged"
    engine.finish(completion)


async def test_a_folder_that_cannot_be_looked_into_has_no_models(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_hidden(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", is_hidden)
    monkeypatch.setattr(os, "stat", is_hidden)
    with pytest.raises(HttpError) as refused:
        house.ask(A)
    monkeypatch.undo()
    assert (refused.value.status, refused.value.code) == (404, "MODEL_NOT_FOUND")
