"""`decide`: what happens to a completion that has no place, as one table of cases."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from harness import NO_FILE
from scripted import backend_at

from cerebrum.pi.breaker import Breaker
from cerebrum.pi.completion import (
    SUPERSEDED,
    Attempt,
    Completion,
    CompletionRequest,
    Evicted,
)
from cerebrum.pi.dispatcher import (
    Preempt,
    State,
    Wait,
    decide,
    decide_spare,
)
from cerebrum.pi.fleet import Fleet, Option
from cerebrum.pi.upstream import LATE, BackendFailure, TooLong
from cerebrum.request import GenerationRequest
from cerebrum_common import HttpError, Model

NOW = 1000.0
ASKED = GenerationRequest()
CATALOG = (
    Model("big", "Big", ("python",), "7B", "Q4", **NO_FILE),
    Model("small", "Small", ("python", "rust"), "1B", "Q4", **NO_FILE),
)
BOTH = "big small"
CLOSED, TROUBLE = "closed", "trouble"
OPEN, HALF_OPEN = "open", "half-open"
TRIAL = "trial"
ERRORS = {
    "failed": BackendFailure("connection refused"),
    "late": BackendFailure(LATE),
    "busy": HttpError("RATE_LIMIT", "busy"),
    "missing": HttpError("MODEL_LOAD_FAILED", "no file"),
    "too long": TooLong({}),
}


def breaker(health: str) -> Breaker:
    made = Breaker()
    made.trouble = "it is odd" if health == TROUBLE else ""
    if health in (OPEN, HALF_OPEN, TRIAL):
        made.open(0.0)
    if health in (HALF_OPEN, TRIAL):
        made.healthy(NOW)
    if health == TRIAL:
        made.admit(NOW)
    return made


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, and what `decide` knows when it comes."""

    backends: Mapping[str, str] = field(default_factory=lambda: {"a": BOTH, "b": BOTH})
    health: Mapping[str, str] = field(default_factory=dict)
    api: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    prefer: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # "backend kind client, ..." of those that hold a place
    running: str = ""
    superseded: str = ""
    # backend, model, error; the last one has just ended
    attempts: Sequence[tuple[str, str, str]] = ()
    editors: Mapping[str, float] = field(default_factory=dict)
    served: str = ""
    regular: float = 0  # seconds since somebody else got a place; 0: nobody did
    in_line: bool = False
    rests: Mapping[str, float] = field(default_factory=dict)  # seconds that backends asked for
    # The request.
    affinity_header: str = ""
    kind: str = ""
    session: str = ""
    language: str = "python"
    mode: str = "complete"
    model: str = ""
    ahead: bool = False
    speculative: bool = False
    guest: int = 0
    asked: float = NOW
    now: float = NOW

    @property
    def request(self) -> CompletionRequest:
        fields = GenerationRequest(
            language=self.language, mode=self.mode, model=self.model, filename="f.py"
        )
        kind = "infill" if self.ahead else self.kind
        asked = CompletionRequest(kind, fields, client="me")
        asked = replace(asked, session=self.session, guest=self.guest)
        return replace(asked, ahead=self.ahead, speculative=self.speculative)

    @property
    def places(self) -> list[str]:
        return [place for place in f"{self.running}, {self.superseded}".split(", ") if place]

    def completion(self) -> Completion:
        completion = Completion(self.request)
        completion.requested = self.asked
        for backend, model, error in self.attempts:
            admission = Breaker().admit(NOW)
            attempt = Attempt(completion, backend, model, admission, released=NOW)
            attempt.outcome = ERRORS[error]
            completion.attempts.append(attempt)
        return completion

    def fleet(self) -> Fleet:
        fleet = Fleet()
        configs = []
        for id in self.backends:
            more = {"api": self.api.get(id, "cerebrum"), "max_concurrent": self.limits.get(id, 2)}
            more["affinity_header"] = self.affinity_header
            configs.append(backend_at(1, id, **more))
        fleet.replace(configs, CATALOG, self.prefer)
        for backend in fleet.backends:
            ids = self.backends[backend.id].split()
            backend.models = None if ids == ["unknown"] else {model: {} for model in ids}
            backend.breaker = breaker(self.health.get(backend.id, CLOSED))
            backend.rests_until = NOW + self.rests.get(backend.id, 0)
        return fleet

    def state(self) -> State:
        state = State(self.fleet())
        known = {backend.id: backend for backend in state.fleet.backends}
        for number, place in enumerate(self.places):
            id, kind, client = (*place.split(), "")[:3]
            is_guest = client in ("tom", "tim") or (client == "me" and self.guest > 0)
            other = CompletionRequest(kind.strip("-"), ASKED, client=client, session=client)
            holder = Completion(replace(other, guest=is_guest))
            begun = NOW - 9 + number
            attempt = Attempt(holder, id, "big", known[id].breaker.admit(NOW), begun=begun)
            attempt.outcome = Evicted(SUPERSEDED) if place in self.superseded else None
            state.places[attempt] = known[id]
        state.editors = {client: NOW - ago for client, ago in self.editors.items()}
        if self.regular:
            state.regular_turn = NOW - self.regular
        if self.served:
            state.served[self.request.file] = self.served
        if self.in_line:
            waiting = Completion(replace(self.request, guest=0))
            state.line[waiting] = asyncio.Future(loop=asyncio.new_event_loop())
        return state


def decided(case: Case) -> str:
    """`model@backend`, `end GUEST`, `wait SECONDS`, `never`, or the code of a refusal."""
    state = case.state()
    if case.request.is_spare:
        decision = decide_spare(state, case.request, case.now)
    else:
        decision = decide(state, case.completion(), case.now)
    match decision:
        case Option(model, backend):
            return f"{model}@{backend.id}"
        case Preempt(guest):
            return f"end {case.places[[*state.places].index(guest)]}"
        case Wait(until):
            return f"wait {until - case.now:.1f}"
        case HttpError() as error:
            return error.code
    return "never"


# For each rule, cases and what is decided. It is second 1000.
DECISIONS = json.loads("""{
"Which model, and where.": [
    [{}, "big@a"],
    [{"language": "rust"}, "small@a"],
    [{"language": "cobol"}, "big@a"],
    [{"backends": {"a": "unknown"}}, "big@a"],
    [{"backends": {"a": "unknown"}, "prefer": {"complete": ["small"]}}, "small@a"],
    [{"kind": "infill", "language": "cobol"}, "big@a"],
    [{"model": "small"}, "small@a"],
    [{"prefer": {"complete": ["small"]}}, "small@a"],
    [{"mode": "infill", "prefer": {"infill": ["small"]}}, "small@a"],
    [{"mode": "chat", "language": "", "prefer": {"instruct": ["small"]}}, "small@a"],
    [{"prefer": {"infill": ["small"], "instruct": ["small"]}}, "big@a"],
    [{"language": "rust", "prefer": {"complete": ["big"]}}, "small@a"],
    [{"backends": {"a": "small", "b": "big"}}, "big@b"],
    [{"backends": {"a": "small", "b": "big"}, "running": "b -, b -"}, "small@a"],
    [{"kind": "infill", "language": "rust", "backends": {"a": "big"}}, "big@a"],
    [{"backends": {"a": "small", "b": "small"}, "api": {"a": "openai"}, "model": "big"}, "big@b"],
    [{"backends": {"a": "small"}, "api": {"a": "openai"}, "model": "big"}, "MODEL_NOT_FOUND"]],
"vpsd is asked for a model that it has not: it says what is missing.": [
    [{"backends": {"a": ""}}, "small@a"]],
"The least busy backend, or the one that has read the file.": [
    [{"running": "a -"}, "big@b"],
    [{"running": "a -, b -", "limits": {"b": 4}}, "big@b"],
    [{"running": "b -", "served": "b"}, "big@b"],
    [{"running": "b -, b -", "served": "b"}, "big@a"]],
"No place: our own API gets 429, a dialect waits as long as its clients do.": [
    [{"running": "a -, a -, b -, b -"}, "RATE_LIMIT"],
    [{"kind": "infill", "running": "a -, a -, b -, b -"}, "wait 3.0"],
    [{"kind": "chat", "running": "a -, a -, b -, b -"}, "wait 30.0"],
    [{"kind": "infill", "running": "a -, a -, b -, b -", "asked": 997}, "RATE_LIMIT"]],
"A newer request of a session gets the place of the older one, as does anybody once that ends.": [
    [{"session": "s", "running": "a - s, a -, b -, b -"}, "big@a"],
    [{"session": "t", "running": "a - s, a -, b -, b -"}, "RATE_LIMIT"],
    [{"running": "a -, b -, b -", "superseded": "a - s"}, "big@a"],
    [{"superseded": "a - s"}, "big@b"]],
"A place is kept for an editor that was there a moment ago.": [
    [{"kind": "chat", "running": "a chat, a chat, b chat", "editors": {"you": 5}}, "wait 30.0"],
    [{"kind": "chat", "running": "a chat, a completion, b chat", "editors": {"me": 5}},
        "wait 30.0"],
    [{"kind": "chat", "running": "a chat, a infill, b -", "editors": {"you": 5}}, "big@b"],
    [{"kind": "chat", "running": "a chat, a chat, b chat", "editors": {"you": 60}}, "big@b"],
    [{"kind": "chat", "running": "a -, a -", "editors": {"you": 5},
        "backends": {"a": "big", "b": "small"}, "model": "small"}, "small@b"],
    [{"running": "a chat, a chat, b chat", "editors": {"you": 5}}, "big@b"],
    [{"kind": "infill", "running": "a chat, a chat, b chat", "editors": {"you": 5}}, "big@b"],
    [{"kind": "infill", "running": "a infill me, a infill me, b infill me", "editors": {"you": 5}},
        "wait 3.0"],
    [{"kind": "infill", "running": "a infill me, a infill me, b infill me", "editors": {"me": 5}},
        "big@b"],
    [{"kind": "infill", "running": "a infill me, a infill me, b infill you", "editors": {"you": 5}},
        "big@b"]],
"A backend in trouble is asked if there is no other; a trial's end is worth waiting for.": [
    [{"health": {"a": "open"}}, "big@b"],
    [{"health": {"a": "trouble"}}, "big@b"],
    [{"health": {"a": "trouble"}, "running": "b -, b -"}, "RATE_LIMIT"],
    [{"health": {"a": "open", "b": "open"}}, "VPS_UNAVAILABLE"],
    [{"kind": "infill", "health": {"a": "open", "b": "open"}}, "VPS_UNAVAILABLE"],
    [{"health": {"a": "half-open", "b": "open"}}, "big@a"],
    [{"health": {"a": "trial", "b": "open"}}, "VPS_UNAVAILABLE"],
    [{"kind": "infill", "health": {"a": "trial", "b": "open"}}, "wait 3.0"],
    [{"kind": "infill", "health": {"a": "trial", "b": "open"}, "asked": 997}, "VPS_UNAVAILABLE"],
    [{"health": {"a": "trial"}}, "big@b"]],
"What has failed is not asked again, but another model may be there.": [
    [{"attempts": [["a", "big", "failed"]]}, "big@b"],
    [{"attempts": [["a", "big", "failed"], ["b", "big", "failed"]]}, "VPS_UNAVAILABLE"],
    [{"attempts": [["a", "big", "missing"], ["b", "big", "failed"]]}, "small@a"],
    [{"attempts": [["a", "big", "missing"]]}, "big@b"],
    [{"attempts": [["a", "big", "missing"]], "backends": {"a": "big small"}}, "small@a"],
    [{"attempts": [["a", "big", "missing"], ["b", "big", "failed"]], "model": "big"},
        "MODEL_LOAD_FAILED"],
    [{"attempts": [["a", "big", "failed"]], "running": "b -, b -"}, "VPS_UNAVAILABLE"],
    [{"attempts": [["a", "big", "failed"]], "running": "b -, b -", "kind": "infill"}, "wait 3.0"]],
"A backend that asked for a pause is asked again at its end; our own API does not wait.": [
    [{"rests": {"a": 9}}, "big@b"],
    [{"rests": {"a": 9}, "running": "b -, b -"}, "RATE_LIMIT"],
    [{"rests": {"a": 1, "b": 2}}, "RATE_LIMIT"],
    [{"rests": {"a": 2, "b": 1}, "kind": "infill"}, "wait 1.0"],
    [{"rests": {"a": 1}, "running": "b -, b -", "kind": "infill"}, "wait 1.0"],
    [{"rests": {"a": 9}, "running": "b -, b -", "kind": "infill"}, "wait 3.0"],
    [{"kind": "infill", "backends": {"a": "big"}, "rests": {"a": 3}}, "wait 3.0"],
    [{"kind": "infill", "backends": {"a": "big"}, "rests": {"a": 3.1}}, "RATE_LIMIT"],
    [{"kind": "infill", "backends": {"a": "big"}, "rests": {"a": 1},
        "attempts": [["a", "big", "busy"]]}, "wait 1.0"],
    [{"kind": "infill", "backends": {"a": "big"}, "rests": {"a": 1}, "now": 1001,
        "attempts": [["a", "big", "busy"]]}, "big@a"],
    [{"kind": "infill", "backends": {"a": "big"}, "rests": {"a": 1}, "asked": 997.5}, "RATE_LIMIT"],
    [{"rests": {"a": 1, "b": 1}, "ahead": true}, "never"]],
"Behind a balancer, a second replica is asked, and no third one.": [
    [{"backends": {"a": "big"}, "affinity_header": "X-Replica",
        "attempts": [["a", "big", "failed"]]}, "big@a"],
    [{"backends": {"a": "big"}, "affinity_header": "X-Replica",
        "attempts": [["a", "big", "failed"], ["a", "big", "failed"]]}, "VPS_UNAVAILABLE"]],
"All replicas would refuse it, or be as slow.": [
    [{"backends": {"a": "big"}, "affinity_header": "X-Replica",
        "attempts": [["a", "big", "missing"]], "model": "big"}, "MODEL_LOAD_FAILED"],
    [{"backends": {"a": "big"}, "affinity_header": "X-Replica",
        "attempts": [["a", "big", "too long"]]}, "INVALID_REQUEST"],
    [{"backends": {"a": "big"}, "affinity_header": "X-Replica", "attempts": [["a", "big", "late"]]},
        "VPS_UNAVAILABLE"]],
"Reading ahead waits for an idle backend of a kind that costs nothing, and for those that wait.": [
    [{"ahead": true}, "big@a"],
    [{"ahead": true, "running": "a -, b -"}, "never"],
    [{"ahead": true, "in_line": true}, "never"]],
"It goes where the next request of its file will go, or waits for that backend.": [
    [{"ahead": true, "served": "b"}, "big@b"],
    [{"ahead": true, "served": "b", "running": "b -"}, "never"],
    [{"ahead": true, "backends": {"a": "big", "b": "small"}, "running": "a -"}, "never"],
    [{"ahead": true, "served": "a", "running": "a -", "health": {"b": "trouble"}}, "never"],
    [{"ahead": true, "health": {"a": "half-open", "b": "open"}}, "never"],
    [{"speculative": true}, "big@a"],
    [{"ahead": true, "api": {"a": "openai"}}, "big@b"],
    [{"ahead": true, "api": {"a": "llama.cpp"}}, "big@a"],
    [{"ahead": true, "api": {"a": "openai", "b": "openai"}}, "never"]],
"A guest has so many places, and only if nobody else waits and one place stays free.": [
    [{"kind": "infill", "guest": 3}, "big@a"],
    [{"kind": "infill", "guest": 1, "running": "a - me"}, "wait 3.0"],
    [{"kind": "infill", "guest": 1, "running": "a - tom"}, "big@b"],
    [{"guest": 1, "running": "a - me"}, "RATE_LIMIT"],
    [{"kind": "infill", "guest": 3, "running": "a - me, a - tom, b - me", "regular": 60}, "big@b"],
    [{"kind": "infill", "guest": 3, "running": "a - me, a - tom, b - me", "regular": 5},
        "wait 3.0"],
    [{"kind": "infill", "guest": 3, "running": "a - me, a - tom, b - you", "regular": 5}, "big@b"],
    [{"kind": "infill", "guest": 3, "in_line": true}, "wait 3.0"],
    [{"kind": "infill", "running": "a - me, a - tom, b - me", "in_line": true}, "big@b"]],
"A guest's newer request ends the older one of its session.": [
    [{"guest": 1, "session": "me", "running": "a - me"}, "big@b"]],
"Guests make room for everybody else: the newest first, and infills last.": [
    [{"running": "a - tom, a chat tom, b -, b -"}, "end a chat tom"],
    [{"running": "a chat tom, a infill tom, b -, b -"}, "end a chat tom"],
    [{"running": "a - tom, a - tim, b -, b -"}, "end a - tim"],
    [{"running": "a -, a -, b - tom, b -", "backends": {"a": "big", "b": "small"}}, "end b - tom"],
    [{"running": "a -, a -, b - tom, b -", "backends": {"a": "big", "b": "small"}, "model": "big"},
        "RATE_LIMIT"],
    [{"running": "a - tom, a -, b -, b -", "health": {"a": "open"}}, "RATE_LIMIT"],
    [{"running": "a - tom, a -, b -"}, "big@b"],
    [{"running": "a - tom, a - tim, b -", "superseded": "b - tom"}, "big@b"],
    [{"kind": "infill", "guest": 3, "running": "a - tom, a - tim, b - tom, b - tim"}, "wait 3.0"],
    [{"ahead": true, "running": "a - tom, b - tom"}, "never"]],
"As many as it takes, if a reload has lowered the places.": [
    [{"kind": "infill", "backends": {"a": "big"}, "running": "a - tom, a - tim, a - tim"},
        "end a - tim"],
    [{"kind": "infill", "backends": {"a": "big"}, "running": "a - tom, a - you, a - you"},
        "wait 3.0"]],
"What a guest holds is as good as a free place for an editor.": [
    [{"kind": "chat", "running": "a chat tom, a chat, b chat", "editors": {"you": 5}}, "big@b"],
    [{"kind": "chat", "backends": {"a": "big"}, "running": "a chat tom, a chat tim",
        "editors": {"you": 5}}, "end a chat tim"],
    [{"kind": "chat", "backends": {"a": "big"}, "running": "a chat tom, a chat",
        "editors": {"you": 5}}, "wait 30.0"],
    [{"kind": "chat", "backends": {"a": "big"}, "guest": 1, "running": "a chat tom",
        "editors": {"you": 5}}, "wait 30.0"]],
"Not if it would get no place without them either.": [
    [{"kind": "chat", "running": "a - tom, a chat, b chat, b chat", "editors": {"you": 5}},
        "wait 30.0"],
    [{"kind": "infill", "running": "a infill me, a infill me, a infill me, b - tom",
        "editors": {"you": 5}}, "wait 3.0"]]}""")


@pytest.mark.parametrize("rule", DECISIONS)
def test_decide(rule):
    found = [[case, decided(Case(**case))] for case, _ in DECISIONS[rule]]
    assert found == DECISIONS[rule]


def test_the_file_of_a_request():
    """It is the client's, unless our own API names none."""
    for kind in ("", "infill"):
        assert Case(kind=kind).request.file == "me f.py"
        assert Case(kind=kind, session="s").request.file == "s"
        assert CompletionRequest(kind, ASKED, client="me").file == (kind and "me ")


# Those who wait, in the order in which they get places. Dora holds one; the others had a turn so
# many seconds ago.
TURNS = {"anna": NOW - 5, "ben": NOW - 9, "tim": -math.inf}
IN_TURN = [
    ("cora", ""),
    ("ben", "chat"),
    ("anna", "infill"),
    ("anna", "chat"),
    ("dora", "infill"),
    ("tim", "chat"),
    ("tom", "infill"),
]


def test_people_take_turns():
    state = State(Fleet(), turns=TURNS)
    dora = Completion(CompletionRequest("chat", ASKED, client="dora"))
    held = Attempt(dora, "a", "big", Breaker().admit(NOW))
    state.places[held] = Case().fleet().backends[0]
    for name, kind in sorted(IN_TURN):
        request = CompletionRequest(kind, ASKED, client=name, guest=name in ("tom", "tim"))
        state.line[Completion(request)] = asyncio.Future(loop=asyncio.new_event_loop())
    assert [(waits.client, waits.request.kind) for waits in state.in_turn()] == IN_TURN
