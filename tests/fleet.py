"""A simulated fleet: scripted backends of every kind, each with its own trouble, and a crowd of clients.

`simulate` runs it in this process and returns what the clients saw. `tests/pi/test_fleet.py` asserts on the result, and
`tests/bench/fleet.py` prints its figures. Every prompt contains the mark of its request. A backend derives its text
from the seed, its name and the mark, so each text identifies its backend and its request. The gateway chooses the
backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from harness import Client, Reply, read_reply, until
from scripted import CHUNKED, MODELS, RESET, Backend, answer, backend_at, chunk, error, event, pi_for, token

import cm4d
from cerebrum.pi import backend as pi_backend
from cerebrum.pi import breaker, dispatcher, engines, upstream
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi.backend import Backend as PiBackend
from cerebrum.pi.completion import Completion
from cerebrum.pi.dialects import CompletionRequest
from cerebrum.pi.dispatcher import Assign, Decision, State, Wait
from cerebrum_common import HttpError

MARK = re.compile(rb"mark-\d+-\d+")
AT_ONCE = 100  # clients, for some 60 places: the Pi takes 256 connections, and one outlives its client a little
CALM, CALM_AT_ONCE = 100, 10  # clients that come back when the rush is over
ADDRESSES = 8
COMES_AGAIN = 60.0  # seconds for which a client that gets 429 does so
SILENCE = 3.0  # seconds after which the gateway gives a silent backend up
TIMES: dict[Any, dict[str, float]] = {
    pi_fleet: {"PROBE_SECONDS": 0.1},
    breaker: {"OPEN_SECONDS": 0.3, "MAX_OPEN_SECONDS": 1.0},
    upstream: {"HEAD_SECONDS": SILENCE, "IDLE_SECONDS": SILENCE},
    engines: {"READING_SECONDS": SILENCE},
    pi_backend: {"READING_SECONDS": SILENCE},
}

# -------------------------------------------------------------------------------------------- backends

BEFORE = ("resets", "closes", "closes after the head", "hangs", "an error event", "503", "429")
AMID = ("resets amid", "an error event amid", "hangs amid")
FILE = next(model.file for model in cm4d.load_catalog(cm4d.HERE / "models.toml").models if model.id == "qwen_0_5b")


@dataclass(frozen=True)
class Plan:
    """A backend, and how many of each ten requests meet its fault, in a row. `pace`: seconds between two tokens."""

    id: str
    api: str
    places: int
    fault: str = ""
    of_ten: int = 0
    pace: float = 0.002


FLEET = (
    Plan("own", "cerebrum", 4),
    Plan("own-resets", "cerebrum", 2, "resets", 3),
    Plan("own-closes", "cerebrum", 3, "closes", 3),
    Plan("own-head", "cerebrum", 2, "closes after the head", 3),
    Plan("own-amid", "cerebrum", 4, "resets amid", 2),
    Plan("own-error", "cerebrum", 2, "an error event", 3),
    Plan("own-late-error", "cerebrum", 2, "an error event amid", 2),
    Plan("own-503", "cerebrum", 1, "503", 10),
    Plan("own-429", "cerebrum", 2, "429", 4),
    Plan("own-hangs", "cerebrum", 2, "hangs", 1),
    Plan("own-slow", "cerebrum", 6, pace=0.02),
    Plan("own-visitor", "cerebrum", 5),
    Plan("own-absent", "cerebrum", 8),
    Plan("vllm", "openai", 8),
    Plan("vllm-amid", "openai", 4, "resets amid", 2),
    Plan("vllm-error", "openai", 3, "an error event", 3),
    Plan("vllm-429", "openai", 2, "429", 4),
    Plan("vllm-hangs", "openai", 2, "hangs amid", 1),
    Plan("llama", "llama.cpp", 1, pace=0.01),
    Plan("llama-resets", "llama.cpp", 2, "resets", 10),
)
VISITOR, ABSENT = "own-visitor", "own-absent"  # one goes away and comes back, the other is never there


@dataclass
class Journal:
    """What has happened at all backends, in order: (what, backend, mark)."""

    entries: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # of the simulation itself, or of the gateway

    def note(self, what: str, engine: str, mark: str) -> None:
        self.entries.append((what, engine, mark))


def listed(api: str) -> bytes:
    names = {"openai": "qwen_0_5b", "llama.cpp": f"/models/{FILE}"}
    return answer(200, {"data": [{"id": names[api]}]} if api in names else MODELS)


def words_of(engine: str, mark: str, call: str, seed: int) -> list[str]:
    """The tokens of an answer."""
    count = random.Random(f"{seed} {engine} {mark} words").randint(3, 12)
    words = [engine, f" {mark}", *(f" w{n}" for n in range(count))]
    if call == "chat":
        return words
    words[0], words[-1] = f'"{words[0]}', f'{words[-1]}"'
    return words if call == "infill" else ["    return", f" {words[0]}", *words[1:], "\n"]


@dataclass
class Engine(Backend):
    """A backend of the fleet. It notices at once when the other side leaves, as real ones do."""

    plan: Plan = FLEET[0]
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    here: bool = False
    fates: dict[str, str] = field(default_factory=dict)  # of each mark: the fault that it met, or ""
    places: set[str] = field(default_factory=set)  # the marks of the requests that have one

    async def __aenter__(self) -> Engine:
        await super().__aenter__()
        self.here = True
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.here:
            self.here = False
            await super().__aexit__()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        top = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        method, path, _ = top.split(" ", 2)
        if method == "get":
            told = {"/v1/models": listed(self.plan.api), "/props": answer(200, {"n_ctx": 4096})}
            writer.write(told.get(path, self.health))
            return
        body = await reader.readexactly(int(re.findall(r"content-length: (\d+)", top)[0]))
        (mark,) = {found.decode() for found in MARK.findall(body)}
        for _ in range(5):  # a request that has left at the same moment may come to this loop later
            await asyncio.sleep(0)
        self.places.add(mark)
        self.running = len(self.places)
        self.most_running = max(self.most_running, self.running)
        self.journal.note("asked", self.plan.id, mark)
        self.fates[mark] = self.plan.fault if len(self.fates) % 10 >= 10 - self.plan.of_ten else ""
        playing = asyncio.create_task(self._tell(mark, path, json.loads(body), reader, writer))
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({playing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.journal.note("gone", self.plan.id, mark)
            raise
        finally:
            self._give_back(mark)
            playing.cancel()
            leaving.cancel()
            told, _ = await asyncio.gather(playing, leaving, return_exceptions=True)
            if isinstance(told, Exception) and not isinstance(told, OSError):
                self.journal.faults.append(f"{self.plan.id}: {told!r}")

    def _give_back(self, mark: str) -> None:
        self.places.discard(mark)
        self.running = len(self.places)

    async def _tell(
        self, mark: str, path: str, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for step in self._script(mark, path, asked):
            await self._step(step, reader, writer)

    def _script(self, mark: str, path: str, asked: dict[str, Any]) -> Iterator[Any]:
        fate, own = self.fates[mark], self.plan.api == "cerebrum"
        gap = "suffix" in asked or path == "/infill" or "<|fim_middle|>" in asked.get("prompt", "")
        call = "chat" if "messages" in asked else "infill" if gap else "complete"
        words = words_of(self.plan.id, mark, call, self.seed)
        cut = random.Random(f"{self.seed} {mark}").randint(1, len(words) - 1) if fate in AMID else len(words)
        wrong = event(error=True, message="no memory", code="RESOURCE_EXHAUSTED") if own else event(error={"code": 500})
        if fate in ("503", "429"):
            self._give_back(mark)
            code = {"503": "RESOURCE_EXHAUSTED", "429": "RATE_LIMIT"}[fate]
            yield error(int(fate), code) if own else answer(int(fate), {"error": {"message": "too much"}})
            return
        if fate == "resets":
            yield RESET
        if fate == "closes":
            return
        yield CHUNKED
        if fate == "hangs":
            yield asyncio.Event().wait
        if fate == "an error event":
            yield chunk(wrong)
        if fate in BEFORE:
            return
        for n, word in enumerate(words[:cut]):
            yield lambda: asyncio.sleep(self.plan.pace)
            if n == 0:
                self.journal.note("token", self.plan.id, mark)
            yield chunk(token(word, n + 1) if own else self._event(path, call, word))
        if fate in AMID:
            yield {"resets amid": RESET, "an error event amid": chunk(wrong), "hangs amid": asyncio.Event().wait}[fate]
            return
        self.journal.note("finished", self.plan.id, mark)
        if own:
            self._give_back(mark)  # as vpsd does, before its last chunk
            yield chunk(event(done=True, total_tokens=len(words), finish_reason="stop")) + b"0\r\n\r\n"
            return
        if call != "chat":  # these engines go on behind the end, until somebody hangs up
            yield chunk(self._event(path, call, '\n\n\nf()\nprint("past")\n'))
            yield asyncio.Event().wait
        self._give_back(mark)
        yield chunk(self._event(path, call, "", reason="stop")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _event(self, path: str, call: str, text: str, reason: str | None = None) -> bytes:
        if path in ("/completion", "/infill"):
            return event(content=text, stop=bool(reason))
        told = {"delta": {"content": text}} if call == "chat" else {"text": text}
        return event(choices=[{"index": 0, "finish_reason": reason, **told}])


# --------------------------------------------------------------------------------------------- clients

SUFFIX = "\n\n\nf()\n"


@dataclass(frozen=True)
class Way:
    """A kind of request."""

    name: str
    path: str
    call: str  # "complete", "infill" or "chat"
    streams: bool = True

    @property
    def native(self) -> bool:
        return self.path.startswith("/v1/complete") and self.path != "/v1/completions"

    def body(self, number: int, mark: str) -> dict[str, Any]:
        prompt = f"# client {number:04} {'-' * pi_backend.SAME_BEGINNING}\n# {mark}\ndef f():\n"
        if self.call == "infill":
            prompt += "    return "
        if self.native:
            gap = {"suffix": SUFFIX} if self.call == "infill" else {}
            return {"prompt": prompt, "language": "python", "session": f"session {number}", **gap}
        stream = {"stream": self.streams}
        if self.call == "chat":
            return {"messages": [{"role": "user", "content": prompt}], **stream}
        if self.call == "infill":
            return {"input_prefix": prompt, "input_suffix": SUFFIX, "filename": f"file{number}.py", **stream}
        return {"prompt": prompt, "filename": f"file{number}.py", **stream}

    def read(self, members: dict[str, Any]) -> str:
        """The text in an answer, or in an event of a stream."""
        if self.native:
            return members.get("token" if self.streams else "completion", "")
        if self.path == "/infill":
            return members.get("content", "")
        choice = members["choices"][0]
        if self.call == "chat":
            return choice["delta" if self.streams else "message"].get("content") or ""
        return choice["text"]

    def ends(self, members: dict[str, Any]) -> bool:
        """Whether an event of a stream says that the text is whole."""
        if self.native:
            return members.get("done", False)
        return members["stop"] if self.path == "/infill" else members["choices"][0]["finish_reason"] is not None


WAYS = (
    Way("native", "/v1/complete/stream", "complete"),
    Way("native infill", "/v1/complete/stream", "infill"),
    Way("native whole", "/v1/complete", "complete", streams=False),
    Way("openai", "/v1/completions", "complete"),
    Way("openai whole", "/v1/completions", "complete", streams=False),
    Way("chat", "/v1/chat/completions", "chat"),
    Way("infill", "/infill", "infill"),
    Way("infill whole", "/infill", "infill", streams=False),
)
SHARES = (4, 2, 3, 2, 1, 2, 2, 1)
LEAVING = 0.1  # of the clients that stream, amid their first answer
RETURNING = 0.25  # of all clients, with a second request


@dataclass
class Outcome:
    """What a client got for one request. `text` is what came before the end or the error."""

    mark: str
    way: Way
    status: int = 0
    text: str = ""
    ended: bool = False  # the answer is whole
    clean: bool = False  # and so is its framing
    code: str = ""  # of the error
    message: str = ""
    backend: str = ""  # that a native answer names
    left: bool = False
    to_first: float | None = None  # seconds
    seconds: float = 0.0


def read_outcome(outcome: Outcome, reply: Reply) -> None:
    outcome.status, outcome.clean, way = reply.status, reply.clean, outcome.way
    if reply.status != 200 or not way.streams:
        events = [reply.json]
        outcome.ended = reply.status == 200
    else:
        *blocks, rest = reply.body.split(b"\n\n")
        assert rest == b"", "half an event"
        events = [json.loads(block[6:]) for block in blocks if block[:1] == b"{" or block[6:7] == b"{"]
    for members in events:
        if wrong := members.get("error"):
            told = wrong if isinstance(wrong, dict) else members
            outcome.code, outcome.message = str(told["code"]), told["message"]
            continue
        outcome.text += way.read(members)
        outcome.ended = outcome.ended or way.ends(members)
        outcome.backend = members.get("backend", outcome.backend)


async def ask(client: Client, number: int, mark: str, way: Way, leaves: bool) -> Outcome:
    """Ask once. Who leaves does so at the first token."""
    outcome, began = Outcome(mark, way), time.perf_counter()
    reader, writer = await client.open("POST", way.path, way.body(number, mark), User_Agent=f"client {number}")
    raw = bytearray()
    try:
        while data := await reader.read(1 << 16):
            raw += data
            if outcome.to_first is None and way.streams and b"data: {" in raw and raw.startswith(b"HTTP/1.1 200"):
                outcome.to_first = time.perf_counter() - began
                if leaves:
                    outcome.left = True
                    return outcome
    finally:
        writer.transport.abort()
        outcome.seconds = time.perf_counter() - began
    replay = asyncio.StreamReader(limit=1 << 22)
    replay.feed_data(bytes(raw))
    replay.feed_eof()
    read_outcome(outcome, await read_reply(replay, "POST"))
    return outcome


# ------------------------------------------------------------------------------------------ the oracle


class Oracle:
    """Looks at each decision of a gateway, and notes those that are wrong."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.decide = journal, dispatcher.decide
        self.last: dict[Any, tuple[str, int]] = {}  # by session or file: its backend, and the number of that decision
        self.decisions = Counter[str]()

    def watch(self, state: State, completion: Completion, now: float) -> Decision:
        """Decide, and judge the decision by simpler rules."""
        decision, request = self.decide(state, completion, now), completion.request
        tried = {attempt.backend for attempt in completion.attempts if attempt.error}
        left = [one for one in state.fleet.backends if one.id not in tried and one.has("qwen_0_5b")]
        left = [one for one in left if one.breaker.admits]
        usable = [one for one in left if not one.breaker.trouble] or left
        free = [one for one in usable if len(state.running([one])) < one.limit]
        wrong = ""
        if isinstance(decision, Assign):
            if decision.backend not in free and decision.backend.id not in tried:  # one that was busy is asked again
                wrong = f"{decision.backend.id} may not be asked"
            self._check_stay(request, decision.backend, [one.id for one in free])
        elif isinstance(decision, HttpError) and not usable:
            self.decisions["nobody"] += 1
        else:
            self.decisions["waits" if isinstance(decision, Wait) else "429"] += 1
            if free and not (request.kind and self._leaves_a_place(state, completion, usable)):
                wrong = "no place although one is free"
        if wrong:
            known = [
                (one.id, len(state.running([one])), one.limit, one.breaker.message) for one in state.fleet.backends
            ]
            self.journal.faults.append(f"{wrong}: {request.kind} tried {tried} of {known}")
        return decision

    def _leaves_a_place(self, state: State, completion: Completion, usable: Sequence[PiBackend]) -> bool:
        """Whether others of its kind already have all places but one of the backends that may answer."""
        running = [(one.completion.client, one.request.kind) for one in state.running(usable)]
        if completion.request.kind == "infill":
            alike = [one for one in running if one == (completion.client, "infill")]
        else:
            alike = [one for one in running if one[1] in ("chat", "completion")]
        return len(alike) >= sum(one.limit for one in usable) - 1

    def _check_stay(self, request: CompletionRequest, backend: PiBackend, free: Sequence[str]) -> None:
        self.decisions["assigned"] += 1
        number, who = self.decisions["assigned"], request.file
        last, then = self.last.get(who, ("", 0))
        if who and last in free and number - then < dispatcher.MAX_SERVED:
            self.decisions["stayed"] += 1
            if backend.id != last:
                self.journal.faults.append(f"{who} moved from {last} to {backend.id}")
        self.last[who] = backend.id, number


# -------------------------------------------------------------------------------------- the simulation


@dataclass
class Result:
    """What everybody saw."""

    outcomes: list[Outcome]
    engines: dict[str, Engine]
    journal: Journal
    decisions: Counter[str]
    gateway: cm4d.Gateway
    seconds: float
    back: int  # journal entries at the time when the visitor came back


@contextlib.contextmanager
def nobody_listens() -> Iterator[int]:
    """A port that refuses connections for as long as this lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Crowd:
    """The clients. Each has an address, a way to ask, a session, a file and a prompt of its own."""

    def __init__(self, port: int, clients: int, seed: int) -> None:
        self.port, self.outcomes, self.done = port, list[Outcome](), 0
        self.attempts = Counter[int]()
        chance = random.Random(seed)
        self.plans = [
            (number, way, way.streams and chance.random() < LEAVING, chance.random() < RETURNING)
            for number, way in enumerate(chance.choices(WAYS, SHARES, k=clients))
        ]

    async def run(self) -> None:
        """All of them at once, as far as the Pi takes connections; then some once more, when most places are free."""
        await self._wave(self.plans, AT_ONCE)
        await self._wave([(number, way, False, False) for number, way, *_ in self.plans[-CALM:]], CALM_AT_ONCE)

    async def _wave(self, plans: Sequence[tuple[int, Way, bool, bool]], at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        async with asyncio.TaskGroup() as group:
            for plan in plans:
                group.create_task(self._client(gate, *plan))

    async def _client(self, gate: asyncio.Semaphore, number: int, way: Way, leaves: bool, returns: bool) -> None:
        async with gate:
            await self._ask(number, way, leaves)
            if returns:
                await self._ask(number, way, leaves=False)
        self.done += 1

    async def _ask(self, number: int, way: Way, leaves: bool) -> None:
        """Ask until the answer is no 429. Each attempt has a mark of its own."""
        client = Client(port=self.port, address=f"127.0.0.{2 + number % ADDRESSES}")
        deadline, delay = time.monotonic() + COMES_AGAIN, 0.02
        while True:
            mark = f"mark-{number}-{self.attempts[number]}"
            self.attempts[number] += 1
            outcome = await ask(client, number, mark, way, leaves)
            self.outcomes.append(outcome)
            if outcome.code != "RATE_LIMIT" or time.monotonic() > deadline:
                return
            await asyncio.sleep(delay * random.Random(mark).uniform(0.5, 1.5))
            delay = min(delay * 2, 0.3)


async def visit(engine: Engine, crowd: Crowd, journal: Journal) -> int:
    """Go away while a part of the clients is served, and come back."""
    clients = len(crowd.plans)
    await until(lambda: crowd.done > clients * 0.2 and engine.running)
    await engine.__aexit__()
    await until(lambda: crowd.done > clients * 0.5)
    await engine.__aenter__()
    return len(journal.entries)


async def simulate(clients: int = 1000, seed: int = 1) -> Result:
    """The whole fleet, until the last client has gone and all is idle."""
    journal = Journal()
    random.seed(seed)
    async with contextlib.AsyncExitStack() as stack:
        for module, times in TIMES.items():
            stack.enter_context(mock.patch.multiple(module, **times))
        engines = {plan.id: Engine(plan=plan, seed=seed, journal=journal) for plan in FLEET}
        for engine in engines.values():
            if engine.plan.id == ABSENT:
                engine.port = stack.enter_context(nobody_listens())
            else:
                await stack.enter_async_context(engine)
        configs = [
            backend_at(engine.port, plan.id, api=plan.api, max_concurrent=plan.places)
            for plan, engine in zip(FLEET, engines.values(), strict=True)
        ]
        pi = await stack.enter_async_context(pi_for(*configs))
        oracle, crowd = Oracle(journal), Crowd(pi.port, clients, seed)
        stack.enter_context(mock.patch.object(dispatcher, "decide", oracle.watch))
        began = time.perf_counter()
        visiting = asyncio.create_task(visit(engines[VISITOR], crowd, journal))
        await crowd.run()
        seconds = time.perf_counter() - began
        await until(lambda: not any(engine.running for engine in engines.values()), "all backends are idle")
        await until(lambda: not pi.gateway.dispatcher.active, "all places are given back")
        back = await visiting
        await until(lambda: not pi.server.connections, "all connections are closed")
    return Result(crowd.outcomes, engines, journal, oracle.decisions, pi.gateway, seconds, back)
