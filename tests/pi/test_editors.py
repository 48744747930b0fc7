"""The load that editors make: a request per keystroke, most of them abandoned, several clients at a
time.

The VPS is scripted: what is tested is which requests reach it, which of them share a completion,
who waits for whom, and what is served without it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import itemgetter
from typing import Any

import pytest
from harness import PATIENCE, SHIPPED, Reply, rows, until
from scripted import (
    CHUNKED,
    GOOD,
    HANG,
    Backend,
    Pi,
    answer,
    chunk,
    error,
    event,
    gated,
    pi_for,
    pi_with,
    script,
    token,
)

from cerebrum.pi import breaker, broadcast, completion
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi import kind as pi_kind
from cerebrum.pi.completion import Completion, CompletionRequest, text_event
from cerebrum.pi.dialects import INFILL
from cerebrum.request import GenerationRequest
from cerebrum.text.prompt import WINDOW, weigh
from cm4d import native_fields

FILE = {
    "input_prefix": "def add(a, b):\n",
    "prompt": "    ret",
    "input_suffix": "\n\nprint(add(1, 2))\n",
}
STREAM = {"prompt": "def f():\n    ret", "suffix": "\n", "stream": True}
CHATS = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def data(reply: Reply) -> list[Any]:
    """The JSON of each event of a stream in a dialect; "[DONE]" as it is."""
    lines = re.findall(r"(?m)^data: (.*)", reply.body.decode())
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def texts(reply: Reply) -> list[str]:
    """The texts of a stream of OpenAI's, which ends with "[DONE]"."""
    *parts, done = data(reply)
    assert done == "[DONE]"
    found = []
    for part in parts:
        found += [choice["text"] for choice in part["choices"]]
    return found


def start(pi: Pi, path: str, body: dict[str, Any], **headers: str) -> asyncio.Task[Reply]:
    return asyncio.create_task(pi.post(path, body, **{"User_Agent": "editor", **headers}))


def infill(pi: Pi, **more: Any) -> asyncio.Task[Reply]:
    return start(pi, "/infill", {**FILE, **more})


async def in_line(pi: Pi):
    """Wait until a request waits for a place."""
    await until(lambda: len(pi.line) == 1)


async def read_whole(pi: Pi, backend: Backend, count: int = 2):
    """Wait until so many requests were asked for, and none of them still reads ahead."""
    await until(lambda: len(backend.completions) == count and not pi.reads_ahead())


# ----------------------------------------------------------------------------------------- replaced


BEGUN = [CHUNKED, chunk(token("urn", 1)), HANG]


HANGS = [([HANG], False), (BEGUN, False), (BEGUN, True)]


@pytest.mark.parametrize(("hang", "stream"), HANGS)
async def test_a_newer_infill_of_the_file_ends_the_older_one_quietly(hang, stream, caplog):
    caplog.set_level("WARNING")
    async with pi_with(hang, GOOD) as (pi, backend):
        older = infill(pi, stream=stream)
        await backend.begun.wait()
        assert (await infill(pi, prompt="    rex")).json["content"] == "ab"
        reply = await older
        last = data(reply)[-1] if stream else reply.json
        assert (reply.status, reply.clean) == (200, True)
        assert (last["content"], last["stop_type"]) == ("", "limit")
        await backend.left.wait()
        assert backend.most_running == 1, "both were computed at the same time"
        assert (await pi.stats())["replaced"] == 1
    assert caplog.records == []


OTHER_TEXT = {"input_prefix": "import os\n", "prompt": "x", "input_suffix": "os.abort()\n"}


OTHERS = [({"filename": "a.py"}, {"filename": "b.py"}), ({}, OTHER_TEXT)]


@pytest.mark.parametrize(("older", "newer"), OTHERS)
async def test_an_infill_of_another_file_client_or_editor_ends_nothing(older, newer):
    async with pi_with([HANG], GOOD, max_concurrent=3) as (pi, backend):
        running = infill(pi, **older)
        await backend.begun.wait()
        typed = {**FILE, **older, "prompt": "    retu"}
        others = (
            infill(pi, **newer),
            start(pi.from_address("127.0.0.2"), "/infill", typed),
            start(pi, "/infill", typed, User_Agent="another"),
        )
        for other in others:
            assert (await other).status == 200
        assert not running.done()
        assert (await pi.stats())["replaced"] == 0
        running.cancel()
        await backend.left.wait()


# A case; two gaps, each of its prompt, its suffix and its file's name; whether one is typed on. For
# ~ stand 1,000 letters.
TEXTS = r"""
typed              | a = 1\nb      | c\n      |      | a = 1\nb = 2   | c\n       | | yes
the window moved   | ~~~\nb\n      | d\ne\n   |      | ~~\nb\nc\n     | d\ne\nf\n | | yes
a word corrected   | a = 1\nb = fo | c\n      |      | a = 1\nb = bar | c\n       | | yes
a closed bracket   | f             | \nc\n    |      | f(             | )\nc\n     | | yes
another function   | import os\n\ndef a():\n\x20   | | | import os\n\ndef b():\n\x20   | | | no
another name       | import os\n\na =\x20 | | | import os\n\nb =\x20 | | | no
two of one text    | a\nb =\x20    | \nc = 2\n |      | a\nb = 1\nc =\x20 | \n     | | no
two far apart      | a\n           |          |      | a\n~~          |           | | no
one is empty       |               | \n       |      | x = 1\n         | y\n       | | no
one has a name     | a\n           |          | x.py | a\n            |           | | no
"""


@pytest.mark.parametrize("case", rows(TEXTS), ids=itemgetter(0))
def test_is_typed_on(case):
    _, *gaps, same = [text.replace("~", "a" * 1000) for text in case]
    first, second = (
        GenerationRequest(prompt, suffix=suffix, filename=filename)
        for prompt, suffix, filename in (gaps[:3], gaps[3:])
    )
    assert broadcast.is_typed_on(first, second) == (same == "yes")
    assert broadcast.is_typed_on(second, first) == (same == "yes")


# ------------------------------------------------------------------------------------------- shared


async def test_identical_requests_share_one_completion():
    alive, go = asyncio.Event(), asyncio.Event()
    # Signs of life are not kept.
    slow = [*GOOD[:2], alive.wait, chunk(b": keep-alive\n\n"), go.wait, *GOOD[2:]]
    async with pi_with(slow) as (pi, backend):
        reader, writer = await pi.open("POST", "/v1/completions", STREAM, User_Agent="editor")
        asked = [start(pi, "/v1/completions", STREAM)]
        readers = pi.readers
        await until(lambda: [reading.at for reading in readers] == [2, 2])
        alive.set()
        await reader.readuntil(b": keep-alive\n\n")
        asked.append(start(pi, "/v1/completions", STREAM))
        await until(lambda: [reading.at for reading in readers] == [2, 2, 2])
        go.set()
        await reader.readuntil(b"[DONE]")
        writer.transport.abort()
        for reply in await asyncio.gather(*asked):
            assert ("".join(texts(reply)), reply.clean) == ("ab", True)
        assert len(backend.completions) == 1
        assert [(await pi.stats())[name] for name in COUNTS] == [3, 2, 0]


COUNTS = ("requests_total", "shared", "replaced")
SAMPLED = {"temperature": 0.9}
SEEDED = SAMPLED | {"seed": 7}
SHARED = [
    # What is beside the prompts of two requests at a time, and how many are computed.
    ({}, {"n_predict": 512}, 1),
    ({}, {"n_predict": 9}, 2),
    ({"prompt": "a\nb\nc\n1"}, {"prompt": "a\nb\nc\n2"}, 2),  # without a suffix nothing is replaced
    (SAMPLED, SAMPLED, 2),
    (SEEDED, SEEDED, 1),
]


@pytest.mark.parametrize(("first", "second", "computed"), SHARED, ids=str)
async def test_which_requests_share_a_completion(first, second, computed):
    go = asyncio.Event()
    async with pi_with(gated(go)) as (pi, backend):
        asked = [start(pi, "/completion", {"prompt": "x"} | more) for more in (first, second)]
        await until(lambda: len(pi.readers) == 2 and backend.running == computed)
        go.set()
        assert [reply.json["content"] for reply in await asyncio.gather(*asked)] == ["ab"] * 2
        assert len(backend.completions) == computed
        assert (await pi.stats())["shared"] == 2 - computed


async def test_a_shared_completion_ends_with_its_last_reader():
    async with pi_with([CHUNKED, chunk(token("a", 1)), HANG], GOOD) as (pi, backend):
        readers = pi.readers
        first, second = infill(pi), infill(pi)
        await until(lambda: len(readers) == 2)
        await backend.begun.wait()
        first.cancel()
        await until(lambda: len(readers) == 1)
        assert backend.running == 1, "one of two left, and the completion ended"
        second.cancel()
        await backend.left.wait()
        await until(lambda: not pi.active)
        again = await infill(pi)
        assert again.json["content"] == "ab", "it joined what nobody computes any more"


async def test_the_error_of_a_shared_completion_reaches_every_reader():
    go = asyncio.Event()
    body = {"prompt": "x", "stream": True}
    refused = [go.wait, error(503, "RESOURCE_EXHAUSTED", "too little memory")]
    async with pi_with(refused) as (pi, _):
        asked = [start(pi, "/v1/completions", body) for _ in range(2)]
        await until(lambda: len(pi.readers) == 2)
        pi.readers[0].broadcast.wake()  # as where another reader is replaced
        go.set()
        for reply in await asyncio.gather(*asked):
            assert (reply.status, reply.json["error"]["message"]) == (503, "too little memory")


async def test_a_reader_that_does_not_read_delays_nobody():
    go, pieces = asyncio.Event(), ["x" * 4000] * 199
    async with pi_with(script(go.wait, *pieces)) as (pi, backend):
        body = {"prompt": "x", "stream": True}
        _, deaf = await pi.open("POST", "/v1/completions", body)
        await backend.begun.wait()
        other = start(pi, "/v1/completions", body)
        await until(lambda: len(pi.readers) == 2)
        go.set()
        assert texts(await other) == [*pieces, ""]
        deaf.transport.abort()


# ------------------------------------------------------------------------------------------- places


@asynccontextmanager
async def busy(pi: Pi, backend: Backend, path: str, body: dict[str, Any]) -> AsyncIterator[None]:
    """While a request runs that never ends."""
    running = backend.running
    task = start(pi, path, body)
    await until(lambda: backend.running == running + 1)
    yield
    task.cancel()
    await backend.left.wait()


async def test_a_late_reader_of_a_job_in_line_has_a_patience_of_its_own(monkeypatch):
    monkeypatch.setitem(completion.WAIT_SECONDS, "completion", 0.5)
    body = {"prompt": "x"}
    async with pi_with([HANG], max_concurrent=1) as (pi, backend), busy(pi, backend, CHATS, CHAT):
        first = start(pi, "/v1/completions", body)
        await until(lambda: any(one.deadline - time.monotonic() < 0.4 for one in pi.line))
        began = time.monotonic()
        for reply in await asyncio.gather(start(pi, "/v1/completions", body), first):
            message = "expected at most 1 completions at a time; try again later"
            assert (reply.status, reply.json["error"]["message"]) == (429, message)
        assert pi.gateway.broadcasts.shared == 1
        assert time.monotonic() - began >= 0.5
        assert pi.line == {}


async def test_a_stream_that_waits_is_told_its_place(monkeypatch):
    monkeypatch.setattr(broadcast, "WAITING_SECONDS", 0.01)
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 2 * PATIENCE)  # the place that is left does it
    go = asyncio.Event()
    async with pi_with(gated(go), GOOD, max_concurrent=1) as (pi, backend):
        running = start(pi, CHATS, CHAT)
        await backend.begun.wait()
        waiting = []
        for path, body in (("/v1/completions", {"prompt": "x"}), (CHATS, CHAT)):
            waiting.append(await pi.open("POST", path, {**body, "stream": True}))
            await until(lambda: len(pi.line) == len(waiting))
        for place, (reader, _) in enumerate(waiting, 1):
            said = b": waiting, place %d in the line\n\n" % place
            begun = await reader.readuntil(b"\r\n" + said)
            assert begun.startswith(b"HTTP/1.1 200 OK\r\n")
            assert said in await reader.readuntil(said)  # and again
        assert (await pi.stats())["requests_waiting"] == 2
        go.set()
        for reader, _ in waiting:
            assert b'"a"' in await reader.readuntil(b"data: [DONE]\n\n")
        assert (await running).status == 200


# Whether a request is told its place by then, and the head of its answer.
WAITED = [
    ("/v1/completions", {"prompt": "x", "stream": True}, 0.01, 200),
    ("/v1/completions", {"prompt": "x", "stream": True}, 5.0, 429),
    ("/v1/completions", {"prompt": "x"}, 0.01, 429),
    ("/api/generate", {"prompt": "x", "raw": True}, 0.01, 429),
]


@pytest.mark.parametrize(("path", "body", "seconds", "status"), WAITED)
async def test_an_error_is_an_event_only_behind_a_place(path, body, seconds, status, monkeypatch):
    assert completion.WAIT_SECONDS["infill"] < broadcast.WAITING_SECONDS
    monkeypatch.setattr(broadcast, "WAITING_SECONDS", seconds)
    monkeypatch.setitem(completion.WAIT_SECONDS, "completion", 0.2)
    async with pi_with([HANG], max_concurrent=1) as (pi, backend), busy(pi, backend, CHATS, CHAT):
        reply = await start(pi, path, body)
        assert (reply.status, reply.clean) == (status, status == 429)
        assert (b": waiting, place 1 in the line" in reply.body) == (status == 200)
        assert b"expected at most 1 completions at a time" in reply.body
        if status == 200:
            assert data(reply)[-1]["error"]["code"] == "RATE_LIMIT"


async def test_a_place_that_passes_to_another_client_lets_the_first_one_go_on(monkeypatch):
    # Otherwise the end of the wait or a probe would do it.
    monkeypatch.setitem(completion.WAIT_SECONDS, "infill", PATIENCE)
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 2 * PATIENCE)
    async with pi_with(GOOD, [HANG], GOOD) as (pi, backend):
        await infill(pi.from_address("127.0.0.2"))
        owner = infill(pi, filename="a.py")
        await until(lambda: len(backend.completions) == 2)
        other = infill(pi.from_address("127.0.0.2"), filename="a.py")
        await until(lambda: pi.gateway.broadcasts.shared == 1)
        waiting = infill(pi, filename="b.py")
        await in_line(pi)
        owner.cancel()
        assert (await waiting).status == 200
        assert not other.done()
        other.cancel()


@pytest.mark.parametrize("path", [CHATS, "/tokenize"])
async def test_a_trial_that_succeeds_admits_the_jobs_that_wait_for_its_end(monkeypatch, path):
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 2 * PATIENCE)
    monkeypatch.setitem(completion.WAIT_SECONDS, "completion", PATIENCE)
    go = asyncio.Event()
    chats = [CHUNKED, go.wait, GOOD[1], HANG]  # its first token is enough
    counts = [go.wait, answer(200, {"tokens": [1]})]
    async with pi_with(chats if path == CHATS else counts, GOOD) as (pi, backend):
        tried = pi.first.breaker
        tried.open(0.0)
        tried.healthy(time.monotonic())
        async with busy(pi, backend, path, {**CHAT, "content": "a b"}):
            waiting = start(pi, "/v1/completions", {"prompt": "x"})
            await in_line(pi)
            native = await pi.complete()
            assert (native.status, native.json["message"]) == (503, breaker.BREAKER_OPEN)
            go.set()
            assert (await waiting).status == 200


# ----------------------------------------------------------------------------------------- warm-ups

WARM_UP = json.loads("""{
    "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "response_fields": [""],
    "input_extra": [{"filename": "b.py", "text": "import os\\n"}], "t_max_prompt_ms": 1}""")


async def test_a_warm_up_is_answered_at_once_and_read_when_nothing_else_is_to_do():
    go = asyncio.Event()
    async with pi_with(gated(go), script(prompt_tokens=7)) as (pi, backend):
        running = infill(pi)
        await backend.begun.wait()
        chat = await start(pi, CHATS, {**CHAT, "n_predict": 0})
        assert chat.json["choices"][0]["message"] == {"role": "assistant", "content": ""}
        for number in range(3):
            extra = [{"filename": "b.py", "text": f"import n{number}\n"}]
            reply = await start(pi, "/infill", {**WARM_UP, "input_extra": extra})
            assert (reply.status, reply.body) == (200, b"{}")
        assert len(backend.completions) == 1, "a warm-up went to the VPS beside a completion"
        go.set()
        assert (await running).status == 200
        await until(lambda: len(backend.completions) == 2)
        asked = backend.completions[1]
        assert asked == asked | {"max_tokens": 0, "extra": extra, "prompt": "", "suffix": ""}
        counts = await pi.stats()
        assert (counts["requests_total"], counts["requests_active"]) == (1, 0)
        await until(lambda: not pi.reads_ahead())
        tallies = pi.gateway.counting.tallies.values()
        assert sum(tally.prompt_tokens for tally in tallies) == 5 + 7, "reading ahead is work, too"


def read(pi: Pi, prompt: str) -> asyncio.Task[Reply]:
    return infill(pi, prompt=prompt, n_predict=0)


async def test_the_newest_place_of_a_client_is_read_and_its_older_one_never_again():
    async with pi_with([HANG], [HANG], script("a")) as (pi, backend):
        await read(pi, "one")
        await backend.begun.wait()
        await read(pi, "two")
        await until(lambda: len(backend.completions) == 2)
        await infill(pi)
        await read_whole(pi, backend, 4)
        prompts = [asked["prompt"].rpartition("\n")[2] for asked in backend.completions]
        assert prompts == ["one", "two", "    ret", "two"]


async def test_the_rest_of_a_cut_prompt_is_read_before_an_older_place():
    async with pi_with([HANG], script("a", **TOLD)) as (pi, backend):
        await read(pi, "old")
        await backend.begun.wait()
        await infill(pi, **PLACE)
        await until(lambda: len(backend.completions) == 3)
        assert backend.completions[2]["prompt"].endswith("x")


async def test_a_place_that_the_cursor_rests_at_is_read_in_two_steps():
    """All of the window is read after what could be read in time, unless there is a newer place."""
    async with pi_with(script(**TOLD), script("a", **READ)) as (pi, backend):
        await infill(pi, **PLACE, n_predict=0)
        await read_whole(pi, backend)
        assert (await infill(pi, **PLACE | {"prompt": "xy"})).json["content"] == "a"
        near, whole, key = backend.completions
        assert near["max_tokens"] == whole["max_tokens"] == 0
        assert (near["prompt_ms"], "prompt_ms" in whole, key["prompt_ms"]) == (500, False, 500)
        assert key["prompt"] == whole["prompt"] + "y" == near["prompt"] + "y"
        assert not pi.reads_ahead()


@pytest.mark.parametrize("n_predict", [0, 9])
async def test_the_rest_of_an_older_place_is_not_read_instead_of_a_newer_one(n_predict):
    """The user jumps on while a place is read, or while the answer to a prompt that was cut is
    being written.
    """
    go = asyncio.Event()
    slow = script(go.wait, "a", **TOLD)
    async with pi_with(slow, script("b", **TOLD)) as (pi, backend):
        older = infill(pi, **PLACE, n_predict=n_predict)
        await backend.begun.wait()
        await infill(pi, input_prefix="a = 1\n", prompt="there", n_predict=0)
        go.set()
        assert (await older).status == 200
        await read_whole(pi, backend)
        assert backend.completions[1]["prompt"] == "a = 1\nthere"


# ------------------------------------------------------------------------------------- type-through


async def test_what_the_user_types_as_predicted_is_served_without_the_vps():
    async with pi_with(script("urn", " a", " + b", prompt_tokens=9)) as (pi, backend):

        async def asked(prompt, **more):
            reply = (await infill(pi, prompt=prompt, **more)).json
            return reply["content"], "type_through" in reply

        whole = "urn a + b"
        assert await asked("    ret") == (whole, False)
        for typed in ("u", "urn", "urn a +"):
            assert await asked("    ret" + typed) == (whole[len(typed) :], True)
        assert len(backend.completions) == 1
        counts = await pi.stats()
        assert (counts["type_through"], counts["requests_total"]) == (3, 4)
        for prompt in ("    retx", "    return a + b"):
            assert await asked(prompt) == (whole, False)
        assert len(backend.completions) == 3
        assert await asked("    ret") == (whole, False)
        assert len(backend.completions) == 3
        for _ in range(broadcast.MAX_FINISHED):  # equal ones are remembered once
            await asked("other", filename="b.py")
        assert await asked("    retu") == (whole[1:], True)


# What is beside a first text and beside its continuation, and how many of both the VPS computes.
CHANCE = {"temperature": 0.5}
CACHED = CHANCE | {"cache_prompt": True}
AGAIN = [
    ({}, {"input_suffix": "x\n"}, 2),
    ({}, {"filename": "b.py"}, 2),
    ({}, {"stop": ["x"]}, 2),
    (CHANCE, CHANCE, 2),
    (CACHED, CACHED, 1),
]


@pytest.mark.parametrize(("first", "then", "computed"), AGAIN, ids=str)
async def test_another_request_is_not_served_from_it(first, then, computed):
    """Nor is text of chance, except where the client asks for caching; and nobody gets another
    client's.
    """
    async with pi_with(script("urn", " a")) as (pi, backend):
        await infill(pi, **first)
        await infill(pi, **{"prompt": "    retu", **then})
        assert len(backend.completions) == computed
        await infill(pi.from_address("127.0.0.2"), **{"prompt": "    retu", **first})
        assert len(backend.completions) == computed + 1


async def test_what_the_user_types_while_it_is_computed_is_not_computed_again():
    go = asyncio.Event()
    async with pi_with(script("urn", " a", go.wait, " + b"), script("x")) as (pi, backend):
        older = infill(pi)
        await until(lambda: pi.active and pi.at(0)[0].tokens == 2)
        newer = infill(pi, prompt="    return")
        assert (await older).json["content"] == ""
        newest = infill(pi, prompt="    return a", stream=True)
        assert (await newer).json["content"] == ""
        go.set()
        *texts, last = data(await newest)
        assert "".join(part["content"] for part in texts) == " + b"
        assert last["stop"] is last["type_through"] is True
        assert len(backend.completions) == 1
        for prompt, text in (("    return a +", " b"), ("    rex", "x")):
            assert (await infill(pi, prompt=prompt)).json["content"] == text
        counts = await pi.stats()
        assert [counts[name] for name in ("type_through", "replaced")] == [3, 2]


# The language that a request names, its file's, the language that counts.
LANGUAGES_NAMED = """
typescriptreact | a.py                | typescript
Shellscript     | untitled:Untitled-1 | shell
vue             | a.py                | python
                | a.py                | python
"""


@pytest.mark.parametrize(("named", "filename", "language"), rows(LANGUAGES_NAMED))
def test_a_language_that_is_named_and_known_counts_before_the_file_name(named, filename, language):
    body = {**FILE, "language": named, "filename": filename}
    assert native_fields(INFILL.read(body), SHIPPED).language == language


def asked_for(prompt: str, **more: Any) -> tuple[Completion, Any]:
    """An infill of this prompt, and its digest."""
    fields = GenerationRequest(prompt, suffix="", temperature=0.0, **more)
    digest = broadcast.digest_of(fields, broadcast.EQUAL_FIELDS)
    return Completion(CompletionRequest("infill", fields)), digest


def finish(prompt: str, text: str, **more: Any) -> broadcast.Remembered | None:
    """What is remembered of an infill's text."""
    running = broadcast.Broadcast(*asked_for(prompt, **more))
    running.pairs = [("started", {"model": "m"}), ("text", text_event(text)), ("done", {})]
    return broadcast.to_remember(running)


LINES = [f"line {number}\n" for number in range(300)]  # an editor sends so many before the cursor
TYPED = {
    "typed": ("a = ", "b\nc", "a = b", 1),
    "a line, and the window moved": ("".join(LINES), "a\nbc\n", "".join([*LINES[1:], "a\nb"]), 3),
    "where a line is missing": ("".join(LINES), "a\nbc\n", "".join([*LINES[1:-1], "a"]), 0),
    "more than all": ("a = ", "b", "a = bc", 0),
    "nothing": ("a = ", "b", "a = ", 0),
    "something before": ("a = ", "bc", "xa = b", 0),
    "two periods": ("0, " * 600, "0, " * 4, "0, " * 602, 6),
    "nothing of a period": ("0, " * 600, "0, " * 4, "0, " * 600, 0),
    "a line of equal ones, and the window has moved by two": (
        "x\n" * 2000,
        "x\n" * 9,
        "x\n" * 1999,
        2,
    ),
    "more of a period than was foretold": ("0, " * 600, "0, " * 4, "0, " * 605, 3),
}


@pytest.mark.parametrize("name", TYPED)
def test_typed_of(name):
    asked, text, prompt, typed = TYPED[name]
    assert broadcast.typed_of(asked, text, prompt) == typed
    kept = finish(asked, text + "!")  # with the end of a long prompt
    assert kept
    fields = asked_for(prompt)[0].request.fields
    found = kept.typed_so_far(prompt, broadcast.digest_of(fields, vars(fields)))
    assert found == (0 if prompt == asked else typed or None)


def test_what_is_kept_is_bounded():
    assert finish("x", "y") is None
    assert finish("x", "y" * (broadcast.MAX_FINISHED_CHARS + 1)) is None
    large = "\N{SMILING FACE WITH SUNGLASSES}" * 100_000
    kept = finish(large, large[: broadcast.MAX_FINISHED_CHARS], filename=large, stop=[large])
    assert kept
    parts = (kept.prompt, kept.digest, kept.text)
    assert sum(map(sys.getsizeof, parts)) < 33_000


# ---------------------------------------------------------------------------- the time for a prompt


def word(number: int) -> str:
    """A name without digits, each of which would be a token."""
    return "name_" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


LONG = "".join(f"{word(number)} = other\n" for number in range(2000))
AFTER = "".join(f"after = {word(number)}\n" for number in range(400))
READ = {"prompt_tokens": 200, "cached_tokens": 190, "ttft": 0.1}
TOLD = READ | {"prompt_cut": True}
PLACE = {"input_prefix": LONG, "input_suffix": "", "prompt": "x", "t_max_prompt_ms": 500}


@pytest.mark.parametrize("limit", [0, 1, 2500])
async def test_the_window_is_sent_whole_with_the_time_for_reading(limit):
    """vpsd chooses what to read; llama.vim's warm-ups have 1 ms, and shall be read whole."""
    async with pi_with(script("a", **TOLD)) as (pi, backend):
        await infill(pi, **PLACE | {"input_suffix": AFTER, "t_max_prompt_ms": limit})
        asked = backend.completions[0]
        assert asked.get("prompt_ms", 0) == (limit if limit > 1 else 0)
        assert 900 < weigh(asked["prompt"] + asked["suffix"]) <= WINDOW
        reads = pi.reads_ahead() or len(backend.completions) == 2
        assert reads == (limit > 1)  # what a backend says of no limit counts for nothing
        if limit > 1:
            await read_whole(pi, backend)
            del asked["prompt_ms"]
            assert backend.completions[1] == asked | {"max_tokens": 0}


async def test_what_is_typed_of_a_hint_is_read_once_the_rest_of_its_prompt_is():
    """No key ends a reading, whose chunk would be lost."""
    go = asyncio.Event()
    scripts = script("yzw", **TOLD), script(go.wait, **TOLD), script(**TOLD)
    async with pi_with(*scripts) as (pi, backend):
        await infill(pi, **PLACE)
        for typed in ("xy", "xyz"):
            await until(pi.reads_ahead)
            assert (await infill(pi, **PLACE | {"prompt": typed})).json["type_through"]
        go.set()
        await read_whole(pi, backend, 3)
        _, rest, typed = backend.completions
        assert typed == rest | {"prompt": f"{rest['prompt']}yz"}


async def test_a_jump_down_a_file_ends_the_reading_above():
    async with pi_with(script("y", **TOLD), [CHUNKED, HANG], script(**TOLD)) as (pi, backend):
        await infill(pi, **PLACE | {"input_suffix": AFTER})
        await until(pi.reads_ahead)
        below = {"input_prefix": LONG + "x\n", "input_suffix": AFTER[100:], "n_predict": 0}
        await infill(pi, **PLACE | below)
        await read_whole(pi, backend, 4)
        assert "x\n" in backend.completions[2]["prompt"][-5:]


BY = event(model="qwen_1_5b")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "model"),
    [
        ([BY], "qwen_1_5b"),
        ([BY, event(model="qwen_0_5b")], "qwen_0_5b"),  # the draft model failed
        ([event(model="unknown")], "qwen_0_5b"),
        ([event(model=["qwen_1_5b"])], "qwen_0_5b"),
    ],
)
async def test_the_answer_names_the_model_that_has_written_it(said, model, stream):
    both = answer(200, {"models": [{"id": "qwen_0_5b"}, {"id": "qwen_1_5b"}]})
    steps = script(*map(chunk, said), "a", **READ)
    async with Backend([steps], models=both) as backend, pi_for(backend.port) as pi:
        body = {"prompt": "x", "max_tokens": 5, "model": "qwen_0_5b", "stream": stream}
        reply = await start(pi, "/v1/completions", body)
        if stream:
            events = [line for line in reply.body.split(b"\n") if b'"model"' in line]
            assert events
            assert all(b'"model":"%b"' % model.encode() in line for line in events)
        else:
            assert reply.json["model"] == model
        tallies = pi.gateway.counting.tallies
        assert (tallies[model].tokens, sum(tally.tokens for tally in tallies.values())) == (1, 1)


async def test_a_chat_that_is_too_long_keeps_the_system_turn_and_the_latest_and_says_so():
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": f"turn {n:2} " + "word " * 400}
        for n in range(21)
    ]
    messages = [{"role": "system", "content": "Be brief."}, *turns]
    async with pi_with() as (pi, backend):
        reply = await start(pi, CHATS, {"messages": messages, "max_tokens": 100})
        system, *latest = backend.completions[0]["messages"]
        count = len(latest)
        assert [system, *latest] == [messages[0], *messages[-count:]]
        assert latest[0]["role"] == "user"
        assert 4 <= count <= 11
        kept = f"{1 + count} of 22 messages, {9 + 2008 * count} of {9 + 2008 * 21} characters"
        assert reply.one("X-Cerebrum-Kept") == kept
        whole = await start(pi, CHATS, {"messages": messages[:3], "stream": True})
        assert whole.all("X-Cerebrum-Kept") == []


async def test_an_unknown_model_means_the_default():
    body = {"prompt": "x", "suffix": None, "stop": None}
    async with pi_with() as (pi, backend):
        for model, serves in (
            (None, "qwen_0_5b"),
            ("gpt-4o", "qwen_0_5b"),
            ("qwen_1_5b", "qwen_1_5b"),
        ):
            reply = await start(pi, "/completions/", body | {"model": model})
            assert reply.json["choices"][0]["text"] == "ab"
            assert backend.completions[-1]["model"] == reply.json["model"] == serves


async def test_counting_tokens_opens_the_breaker_of_a_dead_vps_and_waits_for_no_other(monkeypatch):
    def count(pi):
        return start(pi, "/tokenize", {"content": "a b"})

    async with pi_with() as (pi, backend):
        await backend.__aexit__()
        for _ in range(4):
            assert (await count(pi)).status == 503
        assert pi.first.breaker.state == "open"
    monkeypatch.setattr(pi_kind, "LOAD_SECONDS", 0.3)
    monkeypatch.setattr(breaker, "FAILURES_TO_OPEN", 1)
    async with pi_with([HANG]) as (pi, backend):
        people = [pi.from_address(f"127.0.0.{number}") for number in range(2, 8)]
        replies = await asyncio.gather(*map(count, people))
        assert [reply.status for reply in replies] == [503] * 6
        assert len(backend.completions) == 4
