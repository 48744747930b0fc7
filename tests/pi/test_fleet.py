"""150 clients, and five backends that fail now and then: what must hold for each request.

Every prompt has a mark of its own, and each text names its backend and its mark. The Pi chooses the
backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from harness import Reply, until
from scripted import (
    CHUNKED,
    RESET,
    Backend,
    backend_at,
    chunk,
    error,
    event,
    pi_for,
    token,
)

from cerebrum.pi import breaker, fleet

CLIENTS = 150
AT_ONCE = 40
SEED = 1
PACE = 0.002  # seconds between two tokens
# Faults before the first token, and behind it.
BEFORE = ("resets", "closes", "an error event", "503", "429")
AMID = ("resets amid", "an error event amid")
# The same backend may get the request again: no byte came, or it was busy.
REPEATED = {"resets", "closes", "429"}
CODES = {"503": "RESOURCE_EXHAUSTED", "429": "RATE_LIMIT"}
ERRORS = {"RATE_LIMIT": 429, "VPS_UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 503}


def text_of(backend: str, mark: str) -> str:
    return f"{backend} {mark}" + " word" * random.Random(f"{backend} {mark}").randint(3, 12)


@dataclass
class Engine(Backend):
    """A backend. Two of five answers have a fault. `seen` has what happened to each mark, in
    order.
    """

    id: str = ""
    places: int = 2
    seen: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    busy: int = 0
    most_busy: int = 0

    def script(self, path: str, body: bytes) -> Iterator[Any]:
        (mark,) = {found.decode() for found in re.findall(rb"mark-\d+-\d+", body)}
        seen, end = self.seen[mark], "gone"
        chance = random.Random(f"{SEED} {self.id} {mark} {len(seen)}")
        fault = chance.choice((*BEFORE, *AMID)) if chance.random() < 0.4 else ""
        seen.append(("asked", self.id))
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            words = re.findall(r" ?\S+", text_of(self.id, mark))
            *steps, last = self._steps(fault, words)
            for number, step in enumerate(steps):
                if number == 1:  # behind the head
                    seen.append(("token", self.id))
                yield step
                yield lambda: asyncio.sleep(PACE)
            end = fault or "finished"
        finally:
            self.busy -= 1  # as vpsd does, before its last chunk
            seen.append((end, self.id))
        yield last

    def _steps(self, fault: str, words: list[str]) -> list[Any]:
        if fault in CODES:
            return [error(int(fault), CODES[fault])]
        wrong = event(error=True, message="no", code="RESOURCE_EXHAUSTED")
        end = event(done=True, finish_reason="stop")
        chunks = [chunk(token(word, n)) for n, word in enumerate(words, 1)]
        return {
            "resets": [RESET],
            "closes": [b""],
            "an error event": [CHUNKED + chunk(wrong)],
            "resets amid": [CHUNKED, *chunks[:2], RESET],
            "an error event amid": [CHUNKED, *chunks[:2], chunk(wrong)],
            "": [CHUNKED, *chunks, chunk(end) + b"0\r\n\r\n"],
        }[fault]


def request_of(number: int, mark: str) -> tuple[str, dict[str, Any]]:
    """The path and the body of a client's request: our own API or a chat, as a stream or in one
    piece.
    """
    if number % 4 > 1:
        messages = [{"role": "user", "content": mark}]
        return "/v1/chat/completions", {"messages": messages, "stream": number % 4 == 2}
    body = {"prompt": f"# {mark}\nx =", "language": "python", "mode": "complete", "stop_at": "none"}
    return ("/v1/complete/stream", "/v1/complete")[number % 4], body


def read_answer(reply: Reply) -> tuple[str, bool, str]:
    """The text of an answer, whether it is whole, and the code of its error."""
    text = code = ""
    ended = False
    for data in re.findall(rb"^(?:data: )?({.*)$", reply.body, re.MULTILINE):
        members = json.loads(data)
        choice = members.get("choices", [{}])[0]
        if wrong := members.get("error"):
            code = (wrong if isinstance(wrong, dict) else members)["code"]
        said = choice.get("delta") or choice.get("message") or {}
        text += members.get("token") or members.get("completion") or said.get("content") or ""
        if choice.get("finish_reason") or not members.keys().isdisjoint({"done", "completion"}):
            ended = True
    return text, ended, code


def check_answer(reply: Reply, mark: str, seen: list[tuple[str, str]]) -> None:
    """A client gets the whole text of one backend, or an error. Before the head an error is a
    status, later an event and a cut.
    """
    text, ended, code = read_answer(reply)
    spoke = [id for what, id in seen if what == "token"]
    assert ended != bool(code)
    if ended:
        assert (reply.status, reply.clean, text) == (200, True, text_of(spoke[0], mark))
        assert seen[-1] == ("finished", spoke[0])
    else:
        assert (reply.status, reply.clean) in ((ERRORS[code], True), (200, False))
        assert text_of(spoke[0], mark).startswith(text) if spoke else not text
        assert not spoke or seen[-1][0] in AMID


def check_way(seen: list[tuple[str, str]]) -> None:
    """After the first token nobody else sees a request, and before it nobody sees it twice without
    a reason.
    """
    whats = [what for what, _ in seen]
    assert "token" not in whats or "asked" not in whats[whats.index("token") :]
    for engine in {id for _, id in seen}:
        ends = [what for what, id in seen if id == engine and what not in ("asked", "token")]
        assert set(ends[:-1]) <= REPEATED


async def test_no_request_is_lost_or_sent_twice(monkeypatch):
    monkeypatch.setattr(fleet, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(breaker, "OPEN_SECONDS", 0.1)
    places = {"a": 4, "b": 2, "visitor": 3, "c": 4, "d": 1}
    seen = defaultdict[str, list[tuple[str, str]]](list)
    replies, done = dict[str, Reply](), list[int]()
    engines = {id: Engine(id=id, places=count, seen=seen) for id, count in places.items()}
    visitor = engines["visitor"]
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines.values():
            await stack.enter_async_context(engine)
        configs = [
            backend_at(engine.port, engine.id, max_concurrent=engine.places)
            for engine in engines.values()
        ]
        pi = await stack.enter_async_context(pi_for(*configs))
        gate = asyncio.Semaphore(AT_ONCE)

        async def client(number: int) -> None:
            async with gate:
                for attempt in itertools.count():  # it comes again after a 429
                    mark = f"mark-{number}-{attempt}"
                    replies[mark] = await pi.ask("POST", *request_of(number, mark))
                    if read_answer(replies[mark])[2] != "RATE_LIMIT":
                        break
                    await asyncio.sleep(10 * PACE)
            done.append(number)

        async def visit() -> None:
            await until(lambda: len(done) > CLIENTS / 3 and visitor.busy)
            await visitor.__aexit__()
            await until(lambda: len(done) > CLIENTS * 2 / 3)
            await visitor.__aenter__()

        await asyncio.gather(visit(), *map(client, range(CLIENTS)))
        await until(lambda: not any(engine.busy for engine in engines.values()))
        await until(lambda: not pi.gateway.dispatcher.active)
        state = pi.gateway.dispatcher.state
        assert (state.places, state.line, pi.readers) == ({}, {}, [])
    for mark, reply in replies.items():
        # A token of the visitor may never have come.
        if "gone" not in [what for what, _ in seen[mark]]:
            check_answer(reply, mark, seen[mark])
            check_way(seen[mark])
    assert all(engine.most_busy <= engine.places for engine in engines.values())
    whats = {what for what, _ in itertools.chain(*seen.values())}
    assert len(whats & {*BEFORE, *AMID}) > 4, "the simulation shows less than it seems to"
    assert "gone" in whats
    moved = [way for way in seen.values() if len({id for _, id in way}) > 1]
    assert len(moved) > 5, "few were asked elsewhere"
