"""How much of the hints stays in the files: what counts as shown and as kept, and the file that has
the figures of each day.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Client as Asking
from harness import daemon
from scripted import Pi, pi_with, script
from test_editors import infill, start
from test_editors import texts as streamed

from cerebrum.pi import counting
from cerebrum.pi.completion import CompletionRequest
from cerebrum.pi.counting import SAVE_SECONDS, Counting, People, Usage
from cerebrum.request import GenerationRequest

NOWHERE = Path("/dev/null/people.json")
LONG = "".join(f"line {number}\n" for number in range(1000)) + "x = "

# For each request, "prompt|text of the answer"; seconds between two; characters shown, and kept. A
# part may be kept, also at the beginning of the file. A hint that is taken and undone before the
# next request is not, nor is the same text at another place. White space is a text.
ANSWERS = json.loads(r"""[
    [["x = |foo(a)", "x = foo(a)\ny| = 1"], 1, 10, 6],
    [["x = |foo(a)", "x = foo(a)|"], 60, 6, 6],
    [["x = |foo(a)", "x = foo(a)|"], 61, 6, 0],
    [["|foo(a)", "f|oo(a)", "fo|o(a)", "foX|"], 1, 6, 2],
    [["x = |foo(a)", "x = b|ar"], 1, 8, 0],
    [["x = |foo(a)", "x = |foo(a)"], 1, 6, 0],
    [["x = |1", "x = 2\ny = |1"], 1, 2, 0],
    [["x =|\n  ", "x =\n|"], 1, 3, 1],
    [["a\r\nx = |foo(\n1)", "a\r\nx = foo(\r\n1)|"], 1, 7, 7],
    [["a\r\nx = |foo(\r\n1)", "a\r\nx = foo(\r\n|1)", "a\r\nx = foo(\r\n1)|"], 1, 7, 7]
]""")
ANSWERS += [
    ([f"{LONG}|foo", f"{LONG[5000:]}foo\ny|"], 1, 3, 3),  # the editor's window moves
    ([f"{LONG}|{LONG}", f"{LONG}{LONG}|"], 1, len(LONG), len(LONG)),
    ([f"{LONG}foo\n{LONG}|foo", f"{LONG}foo\n{LONG}b|"], 1, 3, 0),  # in a copy of the lines above
]


def watch() -> tuple[Counting, dict[str, Usage]]:
    totals = Counting(NOWHERE)
    totals.configure([], ["anna", "ben"])
    return totals, totals.people.total


def answer(totals: Counting, step: str, now: float = 1.0, client: str = "anna", file: str = "a.py"):
    prompt, text = step.split("|")
    request = CompletionRequest("infill", GenerationRequest(prompt, filename=file), client=client)
    totals.count_hint(request, now, text)


@pytest.mark.parametrize(("steps", "seconds", "shown", "kept"), ANSWERS)
def test_a_hint_counts_once_and_as_far_as_it_stays(steps, seconds, shown, kept):
    totals, used = watch()
    for number, step in enumerate(steps):
        answer(totals, step, number * seconds)
    assert (used["anna"].shown, used["anna"].kept) == (shown, kept)


def test_each_client_and_file_has_a_hint_of_its_own():
    totals, used = watch()
    answer(totals, "x = |foo")
    answer(totals, "x = foo|", client="ben")
    answer(totals, "x = foo|", file="b.py")
    assert used["anna"].kept == used["ben"].kept == 0
    answer(totals, "x = foo|")
    assert used["anna"].kept == 3


async def counts(pi: Pi) -> tuple[int, int]:
    today = (await pi.stats())["unnamed"]["today"]
    return today["shown"], today["kept"]


async def test_editors_answers_count_and_others_do_not(tmp_path):
    async with pi_with(script("urn", " a"), script(" + b"), state_dir=tmp_path) as (pi, _):
        await infill(pi)
        assert await counts(pi) == (5, 0)
        assert (await infill(pi, prompt="    return")).json["content"] == " a"
        assert await counts(pi) == (5, 3)
        await infill(pi, prompt="    return a", n_predict=0)
        await infill(pi, prompt="    return a", speculative=True)
        assert await counts(pi) == (5, 3)
        await infill(pi, prompt="    return a")
        assert await counts(pi) == (9, 5)
        body = {"prompt": "x", "suffix": "\n", "stream": True}
        assert "".join(streamed(await start(pi, "/v1/completions", body))) == " + b"
        assert await counts(pi) == (13, 5)
        await start(pi, "/v1/completions", {"prompt": "x +"})
        assert await counts(pi) == (13, 5)
        pi.gateway.probed()
        assert (tmp_path / "people.json").exists()
        metrics = (await pi.get("/metrics")).body
        assert b'cerebrum_client_kept_characters_total{client=""} 5\n' in metrics


# ----------------------------------------------------------------------------------------- the file


def people_of(path: Path, *names: str) -> People:
    people = People(path)
    people.configure(names)
    return people


def spans(people: People) -> list[tuple[str, int, int]]:
    entries: list[dict[str, Any]] = people.describe()
    return [(one["name"], one["today"]["shown"], one["month"]["shown"]) for one in entries]


def test_the_days_are_kept_over_a_restart(tmp_path, monkeypatch):
    clock = SimpleNamespace(today=lambda: date(2025, 12, 25))
    monkeypatch.setattr(counting, "date", clock)
    path = tmp_path / "state/people.json"
    people = people_of(path, "anna", "ben")
    for client in ("anna", "ben", "10.0.0.7"):
        people.add(client, Usage(shown=10, kept=6))
    people.save(0.0)
    clock.today = lambda: date(2026, 1, 23)
    people = people_of(path, "anna")  # ben's key has gone
    people.add("anna", Usage(shown=1))
    assert spans(people) == [("", 0, 10), ("anna", 1, 11)]
    clock.today = lambda: date(2026, 1, 24)
    assert spans(people) == [("", 0, 0), ("anna", 0, 1)]


def test_it_is_written_seldom(tmp_path):
    path = tmp_path / "people.json"
    people = people_of(path)
    people.save(0.0)
    assert not path.exists()  # nothing is new
    for now, written in ((1.0, 1), (SAVE_SECONDS, 1), (SAVE_SECONDS + 1.0, 3)):
        people.add("", Usage(shown=1))
        people.save(now)
        (used,) = json.loads(path.read_text()).values()
        assert Usage(*used).shown == written


HUGE = b'{"2025-12-25 anna": [1' + b" " * (1 << 20) + b"]}"
DAMAGED = [b"\xff", b'{"2025-12-25 anna": {"shown": 1}}', b'{"2025-12-25 anna": [1, "2"]}', HUGE]


@pytest.mark.parametrize("text", DAMAGED, ids=len)
def test_a_damaged_file_costs_the_figures_alone(text, tmp_path, caplog):
    path = tmp_path / "people.json"
    path.write_bytes(text)
    caplog.set_level("INFO")
    people = people_of(path, "anna")
    (said,) = caplog.messages
    assert said.startswith(f"{path}: the figures of days begin anew: ")
    people.add("anna", Usage(shown=1))
    people.save(0.0)
    assert spans(people_of(path, "anna")) == [("", 0, 0), ("anna", 1, 1)]


def test_a_folder_that_cannot_be_written_costs_nothing_else():
    people = people_of(NOWHERE)
    people.add("anna", Usage(shown=1))
    people.save(0.0)
    assert spans(people) == [("", 1, 1)]


async def test_a_daemon_writes_it_when_it_stops(tmp_path):
    for times in (1, 2):
        with daemon("cm4d", tmp_path, CEREBRUM_CM4_API_KEY="") as process:
            pi = Asking(port=process.port)
            await pi.post("/v1/accepted", {"characters": 3, "confidence": 0.9})
            stats = (await pi.get("/v1/stats")).json
            assert stats["unnamed"]["today"]["accepted"] == times
