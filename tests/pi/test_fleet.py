"""A thousand clients, and twenty backends of which most fail now and then: what must hold for each of them."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict

import pytest
from fleet import AMID, FLEET, VISITOR, Outcome, Result, simulate, words_of
from harness import PATIENCE

SEED = 1
CLIENTS = 1000
ERRORS = {"RATE_LIMIT": 429, "VPS_UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 503}
TOO_SLOW = ("it stopped", "it did not answer in time")  # failures that a stalled test machine causes, too


@pytest.fixture(scope="module")
def result() -> Result:
    return asyncio.run(asyncio.wait_for(simulate(CLIENTS, SEED), PATIENCE))


@pytest.fixture(scope="module")
def by_mark(result: Result) -> dict[str, list[tuple[str, str]]]:
    """Of each mark, (what, backend) in order."""
    seen = defaultdict(list)
    for what, engine, mark in result.journal.entries:
        seen[mark].append((what, engine))
    return seen


def test_no_decision_was_wrong(result: Result) -> None:
    """429 only while all places of the usable backends are taken, 503 only while there are none, a client stays with
    its backend as long as that is free and well, and nobody is asked who must not be."""
    assert result.journal.faults == []
    assert min(result.decisions[what] for what in ("assigned", "429", "waits", "stayed")) > 50


def whole_text(outcome: Outcome, engine: str) -> str:
    return "".join(words_of(engine, outcome.mark, outcome.way.call, SEED))


def test_no_request_was_lost(result: Result, by_mark: dict[str, list[tuple[str, str]]]) -> None:
    """Everybody who stays gets the whole text of one backend, or an error that says that there is no more."""
    assert len({outcome.mark for outcome in result.outcomes}) == len(result.outcomes)
    assert {int(outcome.mark.split("-")[1]) for outcome in result.outcomes} == set(range(CLIENTS))
    for outcome in result.outcomes:
        if outcome.left:
            continue
        seen = by_mark.get(outcome.mark, [])
        told = [engine for what, engine in seen if what == "token"]
        assert outcome.ended != bool(outcome.code), outcome
        if outcome.ended:
            assert (outcome.status, outcome.clean, len(told)) == (200, True, 1), outcome
            assert seen[seen.index(("token", told[0])) + 1] == ("finished", told[0]), outcome
            assert outcome.text == whole_text(outcome, told[0]), outcome
            assert outcome.backend == (told[0] if outcome.way.native else ""), outcome
            continue
        assert outcome.code in ERRORS, outcome
        # Before the head an error is a status, later an event and a cut.
        assert (outcome.status, outcome.clean) in ((ERRORS[outcome.code], True), (200, False)), outcome
        assert outcome.way.streams or outcome.status != 200, outcome
        if not told:
            assert outcome.text == "", outcome
            continue
        assert outcome.text == "" or outcome.way.streams, outcome
        assert whole_text(outcome, told[0]).startswith(outcome.text), outcome
        fate = result.engines[told[0]].fates[outcome.mark]
        gone = ("gone", told[0]) in seen
        assert fate in AMID or gone or any(late in outcome.message for late in TOO_SLOW), outcome


def test_all_but_those_whose_backend_broke_got_an_answer_in_the_end(result: Result) -> None:
    """Those who are told to come again are served when they do."""
    last = {outcome.mark.split("-")[1]: outcome for outcome in result.outcomes}
    assert [outcome for outcome in last.values() if outcome.code == "RATE_LIMIT"] == []


def test_none_was_sent_twice(result: Result, by_mark: dict[str, list[tuple[str, str]]]) -> None:
    """After the first token of a request nobody else sees it, and before it nobody sees it twice, unless a backend
    closes a connection without a byte: if this was a spare one, it gets the request once more."""
    closing = {plan.id for plan in FLEET if plan.fault in ("resets", "closes")}
    busy = {plan.id for plan in FLEET if plan.fault == "429"}  # asked again after a pause
    retried = 0
    for mark, seen in by_mark.items():
        asked = [engine for what, engine in seen if what == "asked" and engine not in busy]
        assert all(times == 1 or (times == 2 and id in closing) for id, times in Counter(asked).items()), (mark, seen)
        # The token of a backend that leaves may never arrive; if it does, the text of another backend shows it.
        came = [what == "token" and ("gone", engine) not in seen for what, engine in seen]
        first = came.index(True) if True in came else len(seen)
        assert len({engine for _, engine in seen[first:]}) <= 1, (mark, seen)
        assert "asked" not in [what for what, _ in seen[first:]], (mark, seen)
        retried += len(asked) > 1
    assert retried > 100


def test_places_were_never_exceeded_and_all_were_given_back(result: Result) -> None:
    for engine in result.engines.values():
        assert engine.most_running <= engine.plan.places, engine.plan
        assert engine.running == 0, engine.plan
    gateway = result.gateway
    state = gateway.dispatcher.state
    assert (state.places, state.line, gateway.broadcasts.subscribers) == ({}, {}, [])
    assert result.decisions["nobody"] == 0


def test_every_trouble_came(result: Result) -> None:
    """Otherwise the assertions above would prove less than they seem to."""
    asked = Counter(engine for what, engine, _ in result.journal.entries if what == "asked")
    assert all(asked[plan.id] for plan in FLEET if result.engines[plan.id].here), asked
    met = {fate for engine in result.engines.values() for fate in engine.fates.values()}
    assert met == {plan.fault for plan in FLEET}, met
    assert sum(outcome.left for outcome in result.outcomes) > 50
    whats = {what for what, engine, _ in result.journal.entries if engine == VISITOR}
    assert "gone" in whats
    assert any(entry[:2] == ("asked", VISITOR) for entry in result.journal.entries[result.back :])
