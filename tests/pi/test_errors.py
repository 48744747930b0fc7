"""Every kind of request against every answer of a backend that fails: what the client gets, what
the backend is sent, and what is counted.

The promises are those of docs/api.md (errors and their forms), docs/backends.md (what is sent
again), docs/operate.md (places, the circuit breaker) and docs/household.md (a person's figures).
To add a kind of request, add its row to KINDS.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any, NamedTuple
from unittest.mock import ANY

import pytest
from harness import KEY, Reply, until
from scripted import (
    CHUNKED,
    HANG,
    Backend,
    Pi,
    answer,
    backend_at,
    chunk,
    head,
    pi_for,
    script,
    token,
)
from test_backends import LISTED, LONG, llama_chunk, text_chunk

from cerebrum.pi import backend as pi_backend
from cerebrum.pi import engines, native
from cerebrum.pi import kind as pi_kind
from cerebrum.pi.breaker import Breaker
from cerebrum.pi.upstream import APIS

# ------------------------------------------------------------------------------------- the requests

# The path and the body.
KINDS = json.loads(r"""{
    "completion": ["/v1/complete", {"prompt": "TEXT", "language": "python"}],
    "text": ["/v1/completions", {"prompt": "TEXT"}],
    "FIM by tokens": ["/v1/completions",
        {"prompt": "<|fim_prefix|>TEXT<|fim_suffix|>\nf(x)\n<|fim_middle|>"}],
    "Mistral's": ["/v1/fim/completions", {"prompt": "TEXT", "suffix": "y"}],
    "chat": ["/v1/chat/completions", {"messages": [{"role": "user", "content": "TEXT"}]}],
    "infill": ["/infill", {"prompt": "TEXT", "input_suffix": "y", "suggest": "always"}],
    "hint": ["/infill", {"prompt": "TEXT", "input_suffix": "y", "min_confidence": 0.2}],
    "Ollama's generate": ["/api/generate", {"prompt": "TEXT", "suffix": "y"}],
    "Ollama's chat": ["/api/chat", {"messages": [{"role": "user", "content": "TEXT"}]}],
    "speculative": ["/infill", {"prompt": "TEXT", "input_suffix": "y", "speculative": true}],
    "ahead": ["/infill", {"prompt": "TEXT", "input_suffix": "y", "n_predict": 0}],
    "tokenize": ["/tokenize", {"content": "TEXT"}]
}""")
NO_STREAM = ("ahead", "tokenize")
NOBODYS = ("speculative", "ahead", "tokenize")  # no completion of a person
CASES = [(kind, False) for kind in KINDS]
CASES += [(kind, True) for kind in KINDS if kind not in NO_STREAM]

# ------------------------------------------------------------------------- the answers of a backend


class Promise(NamedTuple):
    """What is promised of an answer. No code: the client gets a whole text."""

    status: int
    code: str = ""
    failures: int = 0  # that the breaker counts
    sent: int = 1  # requests that the backend gets
    tokens: int = 0  # of the person
    rests: bool = False  # the backend is not asked in the next second


BAD = Promise(400, "INVALID_REQUEST")
MISSING = Promise(404, "MODEL_NOT_FOUND")
NEWER = Promise(409, "SUPERSEDED")
BUSY = Promise(429, "RATE_LIMIT")
RESTS = BUSY._replace(rests=True)
FULL = Promise(503, "RESOURCE_EXHAUSTED")
REFUSED = Promise(503, "VPS_UNAVAILABLE")
FAILED = REFUSED._replace(failures=1)
CUT = FAILED._replace(tokens=1)
AGAIN = Promise(200, sent=2, tokens=2)
# An API that charges for each token is not asked for what nobody waits for, and counts no tokens.
UNASKED = {
    "ahead": Promise(200, sent=0),
    "speculative": NEWER._replace(sent=0),
    "tokenize": REFUSED._replace(sent=0),
}

SECRET = f"expected /srv/key, got {KEY}"
PAUSE = ("Retry-After: 60",)


def vpsd(status: int, code: str, *headers: str, **more: Any) -> list[bytes]:
    return page(status, {"error": True, "message": SECRET, "code": code, **more}, *headers)


def other(status: int, *headers: str) -> list[bytes]:
    return page(status, {"error": {"message": SECRET}}, *headers)


def page(status: int, members: Any, *headers: str) -> list[bytes]:
    body = json.dumps(members).encode()
    return [head(status, f"Content-Length: {len(body)}", *headers, kind="text/html") + body]


SURE = {"logprob": -0.01, "top_logprobs": [{}]}
ONE = {  # the first token, by the backend's API
    "cerebrum": chunk(token("one ", 1)),
    "llama.cpp": chunk(llama_chunk("one ", 1, completion_probabilities=[SURE])),
    "openai": chunk(text_chunk("one ")),
}
END = b"0\r\n\r\n"
GOOD = {
    "cerebrum": script("one ", "two"),
    "llama.cpp": [CHUNKED, ONE["llama.cpp"], chunk(llama_chunk("two", 2, stop=True)), END],
    "openai": [CHUNKED, ONE["openai"], chunk(text_chunk("two", "stop")), END],
}
TOKENS = [answer(200, {"tokens": [1, 2]})]
LENGTHS = {"prompt_tokens": 900, "n_ctx": 512}
# vpsd's answer, another engine's, and what is promised of either.
ANSWERS: dict[str, tuple[Any, Any, Promise, Promise]] = {
    "400": (vpsd(400, "INVALID_REQUEST"), other(400), BAD, REFUSED),
    "400 too long": (vpsd(400, "INVALID_REQUEST", **LENGTHS), page(400, LONG), BAD, BAD),
    "400 of a proxy": (page(400, SECRET), page(400, SECRET), REFUSED, REFUSED),
    "401": (vpsd(401, "UNAUTHORIZED"), other(401), REFUSED, REFUSED),
    "403": (vpsd(403, "FORBIDDEN"), other(403), REFUSED, REFUSED),
    "404": (vpsd(404, "MODEL_NOT_FOUND"), other(404), MISSING, MISSING),
    "409": (vpsd(409, "SUPERSEDED"), other(409), NEWER, REFUSED),
    "413": (vpsd(413, "PAYLOAD_TOO_LARGE"), other(413), REFUSED, REFUSED),
    "422": (page(422, SECRET), other(422), REFUSED, REFUSED),
    "429": (vpsd(429, "RATE_LIMIT"), other(429), BUSY, BUSY),
    "429 and a pause": (vpsd(429, "RATE_LIMIT", *PAUSE), other(429, *PAUSE), RESTS, RESTS),
    "500": (vpsd(500, "INTERNAL_ERROR"), other(500), REFUSED, FAILED),
    "502 of a proxy": (page(502, SECRET), page(502, SECRET), FAILED, FAILED),
    "503": (vpsd(503, "RESOURCE_EXHAUSTED"), other(503), FULL, FAILED),
    "closed": ([], [], FAILED, FAILED),
    "silent": ([HANG], [HANG], FAILED, FAILED),
    "closed behind the head": ([CHUNKED], [CHUNKED], FAILED, FAILED),
    "closed behind a token": ([CHUNKED, ONE], [CHUNKED, ONE], CUT, CUT),
    "half an event": (*[[CHUNKED, ONE, chunk(b'data: {"tok'), END]] * 2, CUT, CUT),
}


def promised(api: str, kind: str, name: str) -> Promise:
    """The promise of an answer, and its exceptions."""
    promise = ANSWERS[name][2 if api == "cerebrum" else 3]
    if api == "openai" and kind in UNASKED:
        return UNASKED[kind]
    if name == "400 too long" and kind not in ("speculative", "tokenize"):
        promise = AGAIN  # a shorter prompt
    if name == "429" and kind not in ("completion", *NOBODYS):
        promise = AGAIN  # a dialect's request waits
    if kind == "tokenize":
        promise = promise._replace(rests=False)
    if kind in ("speculative", "ahead"):
        promise = promise._replace(failures=0)
    if kind == "ahead":
        promise = promise._replace(status=200, code="")
    return promise


def form_of(path: str, code: str) -> dict[str, Any]:
    """The JSON of an error with this code."""
    if path.startswith("/api/"):
        return {"error": ANY}
    if path == "/v1/complete":
        return {"error": True, "message": ANY, "code": code, "timestamp": ANY}
    return {"error": {"message": ANY, "type": ANY, "param": None, "code": code}}


def outcome(api: str, kind: str, stream: bool, name: str) -> tuple[Any, ...]:
    """What `found` finds: the status, the error, whether a text came, the requests that the backend
    got, the failures that the breaker counts, whether the backend rests, and the person's
    completions and tokens.
    """
    promise = promised(api, kind, name)
    begins = CHUNKED in ANSWERS[name][0] or (name == "silent" and api != "cerebrum")
    status = 200 if stream and begins and promise.sent else promise.status
    has_text = promise.tokens > 0 and (stream or not promise.code) and kind not in NO_STREAM
    person = (0, 0) if kind in NOBODYS else (1, promise.tokens)
    error = form_of(KINDS[kind][0], promise.code) if promise.code else None
    return (status, error, has_text, promise.sent, promise.failures, promise.rests, *person)


def error_in(reply: Reply) -> Any:
    """The JSON of the body, or of the last event of a stream that is cut; None for a whole text."""
    if reply.status == 200 and reply.clean:
        return None
    return json.loads(reply.body.strip().splitlines()[-1].removeprefix(b"data: "))


def hurry(patch: pytest.MonkeyPatch):
    """Give up a silent backend soon, and send its client a comment before."""
    patch.setattr(native, "BEGIN_SECONDS", 0.04)
    patch.setattr(pi_kind, "LOAD_SECONDS", 0.04)
    patch.setattr(engines, "ALIVE_SECONDS", 0.01)
    patch.setattr(engines.Engine, "idle_seconds", 0.04)


NUMBERS = itertools.count()  # no two requests share an answer


async def ask(pi: Pi, kind: str, stream: bool) -> Reply:
    """The answer, once every place has been given back."""
    path, body = KINDS[kind]
    path += "/stream" if stream and kind == "completion" else ""
    asked = json.loads(json.dumps(body).replace("TEXT", f"n{next(NUMBERS)} = "))
    reply = await pi.post(path, asked | {"stream": stream})
    state = pi.gateway.dispatcher.state
    await until(lambda: not (state.places or state.line or pi.readers), seconds=10)
    return reply


async def ask_at(
    pi: Pi, backend: Backend, kind: str, stream: bool, name: str, patch: pytest.MonkeyPatch
) -> Reply:
    """The answer to a request that this backend answers by the answer of this name, then well."""
    api = pi.first.config.api
    steps = ANSWERS[name][api != "cerebrum"]
    good = TOKENS if kind == "tokenize" else GOOD[api]
    backend.scripts = [[ONE[api] if step is ONE else step for step in steps], good]
    backend.asked.clear()
    pi.first.rests_until = 0.0
    pi.first.breaker = Breaker()
    pi.first.breaker.trouble = ""
    pi.first.kind.client.close()  # a spare connection, on which a request may be sent again
    with patch.context() as patched:
        if name == "silent":
            hurry(patched)
        return await ask(pi, kind, stream)


def listing(api: str) -> dict[str, bytes]:
    return {} if api == "cerebrum" else {"models": LISTED}


@pytest.mark.parametrize(("kind", "stream"), CASES)
@pytest.mark.parametrize("api", APIS)
async def test_each_kind_of_request_against_each_error(api, kind, stream, monkeypatch):
    monkeypatch.setattr(pi_backend, "BUSY_SECONDS", 0.01)
    async with Backend(**listing(api)) as backend, pi_for(backend_at(backend.port, api=api)) as pi:
        people = pi.gateway.counting.people.total

        async def found(name: str) -> Any:
            before = people[""]
            reply = await ask_at(pi, backend, kind, stream, name, monkeypatch)
            assert KEY.encode() not in reply.body
            assert api == "cerebrum" or b"/srv" not in reply.body
            answered = reply.status, error_in(reply), b'"one' in reply.body
            rests = pi.first.rests_until > time.monotonic() + 1
            counted = len(backend.completions), pi.first.breaker.failures, rests
            completions = people[""].completions - before.completions
            return (*answered, *counted, completions, people[""].tokens - before.tokens)

        outcomes = {name: await found(name) for name in ANSWERS}
        assert outcomes == {name: outcome(api, kind, stream, name) for name in ANSWERS}


# After these, no other backend is asked: a token has come, or the fault is the request's.
FINAL = {
    "cerebrum": ("closed behind a token", "half an event", "400", "400 too long", "409"),
    "llama.cpp": ("closed behind a token", "half an event", "400 too long"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("api", FINAL)
async def test_which_requests_go_to_the_next_backend(api, kind, monkeypatch):
    """A prompt that is too long fits, the second time."""
    async with (
        Backend(**listing(api)) as backend,
        Backend([GOOD["cerebrum"]]) as other,
        pi_for(backend_at(backend.port, "a", api=api), backend_at(other.port, "b")) as pi,
    ):

        async def found(name: str) -> int:
            other.asked.clear()
            pi.gateway.dispatcher.state.served.clear()
            await ask_at(pi, backend, kind, False, name, monkeypatch)
            return len(other.completions)

        outcomes = {name: await found(name) for name in ANSWERS}
        moves = kind not in NOBODYS
        assert outcomes == {name: int(moves and name not in FINAL[api]) for name in ANSWERS}
