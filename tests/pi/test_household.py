"""Several people at one Pi: named keys, shares, figures, and https."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import (
    CAPTURED,
    KEY,
    Reply,
    certificate,
    connect,
    copy_program,
    daemon,
    post,
    program,
    read_reply,
    reload,
    run_to_the_end,
    settings,
    until,
)
from harness import Client as Asking
from scripted import CHUNKED as HEAD
from scripted import (
    GOOD,
    HANG,
    Backend,
    Pi,
    answer,
    chunk,
    gated,
    in_a_thread,
    pi_with,
    script,
    statuses,
    token,
)

from cerebrum import http as cerebrum_http
from cerebrum.check import has_health
from cerebrum.pi import completion, dispatcher
from cerebrum.pi.upstream import Upstream
from cerebrum.settings import Client, ConfigError, Environment

ANNA = "annas-key"
BEN = "bens-key"
TOM = "toms-key"
TIM = "tims-key"
HOUSE = {ANNA: Client("anna"), BEN: Client("ben"), TOM: Client("tom", 1)}
FORM = "expected NAME KEY [PLACES], got something else"
KEYS_FILES = [
    ("", {}),
    ("\ufeffanna k1\r\n# family\n\n  ben\tk2 \n", {"k1": Client("anna"), "k2": Client("ben")}),
    ("tom k3 2\n", {"k3": Client("tom", 2)}),
    ("anna k1\n\nanna k2\n", "line 3: expected each name and each key once"),
    ("anna k1\nben k1\n", "line 2: expected each name and each key once"),
    ("".join(f"p{n} k{n}\n" for n in range(33)), "expected at most 32 names, got 33"),
]
for line in ("anna", "anna k1 0", "anna k1 100", "anna k1 2 x", "an/na k1", "anna k,1"):
    KEYS_FILES.append((f"{line}\n", f"line 1: {FORM}"))


@pytest.mark.parametrize(("text", "found"), KEYS_FILES)
def test_the_keys_file(text, found, tmp_path, caplog):
    path = tmp_path / "client-keys"
    path.write_text(text)
    path.chmod(0o600)
    if isinstance(found, dict):
        assert Environment({}).clients("FILE", path) == found
    else:
        with pytest.raises(ConfigError) as refused:
            Environment({"FILE": str(path)}).clients("FILE", tmp_path / "other")
        assert str(refused.value) == f"FILE: {path}: {found}"
    assert not caplog.messages
    assert Environment({}).clients("FILE", tmp_path / "none") is None
    path.chmod(0o640)
    path.write_text("")
    assert Environment({}).clients("FILE", path) == {}
    assert caplog.messages == [f"{path}: expected mode 600: others can read the keys"]


CHATS, TOKENIZE = "/v1/chat/completions", "/tokenize"


def ask(
    pi: Pi, key: str, path: str = "/v1/complete", text: str = "x =", **more: Any
) -> asyncio.Task[Reply]:
    """Ask for a completion of our own API, for a chat, or for tokens."""
    chat = {"messages": [{"role": "user", "content": text}]}
    bodies = {CHATS: chat, TOKENIZE: {"content": text}}
    body = bodies.get(path, {"prompt": text, "language": "python"})
    return asyncio.create_task(pi.post(path, {**body, **more}, X_API_Key=key))


async def figures(pi: Pi, key: str = ANNA) -> str:
    """Each client with its completions, tokens and accepted ones; the days' are the same."""
    entries = (await pi.get("/v1/stats", X_API_Key=key)).json["clients"]
    written = []
    for entry in entries:
        name = entry.pop("name")
        assert entry.pop("today") == entry.pop("month") == entry
        written.append(f"{name} {entry['completions']} {entry['tokens']} {entry['accepted']}")
    return ", ".join(written)


async def test_names_stand_in_the_log_and_the_figures_and_keys_nowhere(caplog):
    caplog.set_level(logging.INFO)
    async with pi_with(clients=HOUSE, client_keys=("shared",)) as (pi, vps):
        assert (await pi.complete()).status == 401
        assert (await ask(pi, "wrong")).status == 401
        assert (await pi.get("/health")).status == 200
        for path in ("/v1/models", "/v1/stats", "/nothing"):
            assert (await pi.get(path)).status == 401
        assert (await pi.post(CHATS, {})).json["error"]["code"] == "UNAUTHORIZED"
        for key in (ANNA, ANNA, TOM, "shared"):
            assert (await ask(pi, key)).status == 200
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for key in (BEN, TOM):
            reply = await pi.post(CHATS, chat, Authorization=f"Bearer {key}")
            assert reply.status == 200
        assert (await pi.post("/v1/accepted", {"characters": 9}, X_API_Key=BEN)).status == 200
        assert await figures(pi) == "anna 2 4 0, ben 1 2 1, tom 2 4 0"
        low = [fields.get("priority") == "low" for fields in vps.completions]
        assert low == [False, False, True, False, False, True]
        metrics = (await pi.get("/metrics", X_API_Key=BEN)).body.decode()
        assert 'cerebrum_client_tokens_total{client="tom"} 4\n' in metrics
        logged = "".join(caplog.messages)
        for name in ("anna", "ben", "tom"):
            assert f" client={name}" in logged
        stats = (await pi.get("/v1/stats", X_API_Key=BEN)).body.decode()
        shown = metrics + logged + stats
        assert not [key for key in HOUSE if key in shown]


async def test_a_revoked_client_ends_and_the_others_go_on():
    gate = asyncio.Event()
    slow = (HEAD, chunk(token("a", 1)), gate.wait, *GOOD[2:])
    async with pi_with(slow, clients=HOUSE, max_concurrent=4) as (pi, vps):
        asked = [ask(pi, key, "/v1/complete/stream") for key in (ANNA, BEN)]
        await until(lambda: vps.running == 2)
        await until(lambda: all(one.tokens for one in pi.at(0)))
        pi.gateway.reconfigure(
            config := replace(pi.gateway.config, clients={BEN: Client("benjamin")})
        )
        pi.server.use(config.access)
        ended = await asked[0]
        assert ended.said == "a UNAUTHORIZED"
        gate.set()
        assert (await asked[1]).events[-1]["done"]
        assert (await ask(pi, ANNA)).status == 401
        assert await figures(pi, BEN) == "benjamin 0 0 0"
        with pytest.raises(
            ConfigError, match="CEREBRUM_CM4_KEYS_FILE: expected the file, it has gone"
        ):
            pi.gateway.reconfigure(replace(config, clients=None))  # everybody would be let in
        pi.server.use(
            replace(config, clients={}).access
        )  # the last name has gone: nobody has a key
        assert (await pi.complete()).status == 401


async def test_a_request_whose_body_comes_while_its_key_is_revoked_ends():
    body = b'{"prompt": "x =", "language": "python"}'
    async with pi_with(client_keys=("new", KEY)) as (pi, _), connect(pi.port) as (reader, writer):
        raw = post("/v1/complete", body)
        writer.write(raw[:-5])
        await until(
            lambda: [bool(one.exchange.head) for one in pi.server.connections.values()] == [True]
        )
        pi.server.use(replace(pi.gateway.config, client_keys=("new",)).access)
        writer.write(raw[-5:])
        assert (await read_reply(reader)).status == 401


async def infill(pi: Pi, key: str, **more: Any):
    body = {"input_prefix": "", "input_suffix": "\n", "prompt": key, **more}
    assert (await pi.post("/infill", body, X_API_Key=key)).status == 200


async def read_ahead(pi: Pi, key: str):
    await infill(pi, key, n_predict=0)


async def test_a_guests_prompt_is_read_after_those_of_others():
    async with pi_with([HANG], GOOD, clients=HOUSE) as (pi, vps):
        for key, count in ((TOM, 1), (ANNA, 3)):
            await read_ahead(pi, key)
            await until(lambda: len(vps.completions) == count)  # noqa: B023
        await until(lambda: not pi.reads_ahead())
        assert [asked["prompt"] for asked in vps.completions] == [TOM, ANNA, TOM]


@pytest.mark.parametrize("makes_room", [False, True])
async def test_nothing_is_read_ahead_for_a_revoked_client(makes_room, tmp_path):
    """Neither what a backend reads, even if it makes room just now, nor what waits for it."""
    keys = tmp_path / "client-keys"
    keys.write_text(f"ben {BEN}\n")
    async with pi_with([HANG], clients=HOUSE) as (pi, vps):
        own = pi.gateway.dispatcher
        await read_ahead(pi, TOM)
        await read_ahead(pi, ANNA)
        await until(lambda: (len(vps.completions), vps.running, len(own.ahead)) == (2, 1, 2))
        (reading,) = own.state.places
        if makes_room:
            own._supersede(reading)
        pi.gateway.use_keys(Environment({"CEREBRUM_CM4_KEYS_FILE": str(keys)}))
        await until(lambda: reading not in own.state.places and not vps.running, seconds=5)
        assert (own.ahead, own.state.places, len(vps.completions)) == ({}, {}, 2)


# .env, client-keys, what a reload says about them, and the keys that work then: those of people,
# and the common one. While .env cannot be read, the common key and where client-keys is stay known,
# and nobody without a key is let in; a line without the key's name revokes it, but as long as
# nobody has a name the common key stays as it was.
RELOADS = json.loads(r"""[
    ["CEREBRUM_CM4_API_KEY=c2\nCEREBRUM_MAX_CONCURRENT=x\nKEYS", "ben b\nanna a2",
        "CEREBRUM_MAX_CONCURRENT: expected a number", "b a2 c2"],
    ["CEREBRUM_CM4_API_KEY=c3\noops\nKEYS", "ben b\nanna a3", ".env: line 2: expected NAME=value",
        "b a3 c3"],
    ["CEREBRUM_CM4_API_KEY=c4\nKEYS", "ben b\n// tom x\nanna a4",
        "keys: line 2: expected NAME KEY [PLACES]", "b a4 c4"],
    ["CEREBRUM_CM4_API_KEY=c6\nCEREBRUM_MODELS_FILE=/none\nKEYS", "ben b\nanna a6",
        "CEREBRUM_MODELS_FILE: ", "b a6 c6"],
    ["\u00ff", "ben b", ".env: ", "b c6"],
    ["CEREBRUM_MAX_CONCURRENT=x", "ben b", "CEREBRUM_MAX_CONCURRENT: ", "b c6"],
    ["CEREBRUM_CM4_API_KEY=c7\nKEYS", "ben b\nanna a7", "", "b a7 c7"],
    ["oops\nKEYS", "ben b\nanna a7", ".env: line 1: ", "b a7"],
    ["CEREBRUM_CM4_API_KEY=c9\nKEYS", "ben b\nanna a9", "", "b a9 c9"],
    ["CEREBRUM_CM4_API_KEY=two words\nKEYS", "ben b\nanna a10\nnew n", "CEREBRUM_CM4_API_KEY: ",
        "b a10 n"],
    ["CEREBRUM_CM4_API_KEY=c9\nKEYS", "ben b", "", "b c9"],
    ["CEREBRUM_CM4_API_KEY=two words\nKEYS", "", "CEREBRUM_CM4_API_KEY: ", "c9"],
    ["CEREBRUM_CM4_API_KEY=c9\nKEYS", "ben b\nanna a9", "", "b a9 c9"],
    ["CEREBRUM_CM4_API_KEY c9\nKEYS", "ben b\nnew n", ".env: line 1: ", "b n"],
    ["CEREBRUM_CM4_API_KEY=c9\nKEYS", "ben b", "", "b c9"],
    ["CEREBRUM_CM4_API_KEY c9\nKEYS", "", ".env: line 1: ", "c9"]
]""")
OWNERS = {"b": "ben", "a": "anna", "n": "new"}
STAYS = "not reloaded, the old settings stay but for the keys that can be read: "


async def test_a_revoked_key_stops_working_whatever_else_is_wrong(tmp_path):
    copy_program("cm4d", tmp_path)
    env, file = tmp_path / ".env", tmp_path / "keys"
    given = settings(tmp_path, RUNTIME_DIRECTORY=str(tmp_path))
    del given["CEREBRUM_CM4_API_KEY"]  # .env has it
    file.touch(0o600)

    def write(variables: str, people: str):
        text = variables.replace("KEYS", f"CEREBRUM_CM4_KEYS_FILE={file}")
        env.write_bytes(text.encode("latin-1"))
        file.write_text(people)

    before = []
    write("CEREBRUM_CM4_API_KEY=c9\nKEYS", "ben b")
    with program("cm4d", [sys.executable, "-S", str(tmp_path / "cm4d.py")], tmp_path, given) as pi:
        for variables, people, said, works in RELOADS:
            write(variables, people)
            status, output = await asyncio.to_thread(reload, pi.process, tmp_path)
            assert (status, output.startswith(STAYS)) == ((1, True) if said else (0, False)), output
            assert said in output
            working = []
            now = works.split()
            for key in {*before, *now}:
                stats = await Asking(port=pi.port).get("/v1/stats", X_API_Key=key)
                if stats.status == 200:
                    working.append(key)
                    names = [one["name"] for one in stats.json["clients"]]
            assert sorted(working) == sorted(now), said
            assert names == [OWNERS[key[0]] for key in now if key[0] in OWNERS]
            before = now


async def test_two_places_that_come_at_once_go_to_two_people():
    async with pi_with([HANG], clients=HOUSE, max_concurrent=1) as (pi, vps):
        waiting = pi.line
        asked = []
        for number, key in enumerate((BEN, ANNA, ANNA, BEN)):
            asked.append(ask(pi, key, CHATS, f"{number}"))
            await until(lambda: len(waiting) + vps.running == len(asked))
        (backend,) = pi.gateway.config.backends
        more = replace(pi.gateway.config, backends=(replace(backend, max_concurrent=3),))
        pi.gateway.reconfigure(more)
        assert sorted(attempt.completion.client for attempt in pi.at(0)) == ["anna", "ben", "ben"]
        for task in asked:
            task.cancel()
        await until(lambda: not vps.running)


# ------------------------------------------------------------------------------------------- guests

GUESTS = HOUSE | {TOM: Client("tom", 2), TIM: Client("tim", 1)}


async def test_a_guest_makes_room_with_the_text_so_far():
    slow = [HEAD, chunk(token("a", 1)), HANG]
    gate = asyncio.Event()
    async with pi_with(slow, slow, gated(gate), clients=GUESTS) as (pi, vps):
        whole = ask(pi, TOM, CHATS, "one")
        await until(lambda: [one.tokens for one in pi.at(0)] == [1])
        stream = ask(pi, TOM, "/v1/complete/stream")
        await until(lambda: [one.tokens for one in pi.at(0)] == [1, 1])
        family = [ask(pi, ANNA), ask(pi, BEN, CHATS, "two")]
        *tokens, done = (await stream).events
        assert [one["token"] for one in tokens] == ["a"]
        assert done == done | {"done": True, "finish_reason": "preempted", "total_tokens": 1}
        assert (await stream).clean
        answered = (await whole).json
        (choice,) = answered["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("a", "length")
        assert answered["preempted"] is True
        await until(lambda: len(vps.completions) == 4)
        assert vps.running == vps.most_running == 2
        gate.set()
        assert await statuses(*family) == [200, 200]
        told = (await pi.get("/v1/stats", X_API_Key=ANNA)).json
        assert told["backends"][0]["requests_failed"] == 0
        assert 'ended_total{model="qwen_0_5b",reason="preempted"} 2' in (
            (await pi.get("/metrics", X_API_Key=ANNA)).body.decode()
        )


async def test_a_guest_without_text_starts_again_behind_other_guests():
    reading, gate = [HEAD, HANG], asyncio.Event()
    async with pi_with(reading, gated(gate), GOOD, clients=GUESTS, max_concurrent=1) as (pi, vps):
        tom = ask(pi, TOM, CHATS, "of tom", stream=True)
        await until(lambda: vps.running)
        tim = ask(pi, TIM, CHATS, "of tim")
        await until(lambda: pi.line)
        anna = ask(pi, ANNA, CHATS, "of anna")
        await until(lambda: len(vps.completions) == 2 and len(pi.line) == 2)
        gate.set()
        assert await statuses(tom, tim, anna) == [200] * 3
        order = [one["messages"][0]["content"] for one in vps.completions]
        assert order == ["of tom", "of anna", "of tim", "of tom"]
        assert '"finish_reason":"stop"' in (await tom).body.decode()
        assert (await ask(pi, TOM)).json["finish_reason"] == "stop"


async def test_a_guest_gets_its_turn_when_those_before_it_leave(monkeypatch):
    """A place is free all the time, but for infills, and guests start behind all others."""
    monkeypatch.setitem(completion.WAIT_SECONDS, "infill", 60.0)
    async with pi_with(GOOD, [HANG], GOOD, probing=False, clients=GUESTS) as (pi, vps):
        await infill(pi, ANNA)
        ben, anna = ask(pi, BEN, CHATS), ask(pi, ANNA, CHATS)
        await until(lambda: vps.running and len(pi.line) == 1)
        tom = asyncio.create_task(infill(pi, TOM))
        await until(lambda: len(pi.line) == 2)
        anna.cancel()
        async with asyncio.timeout(10):
            await tom
        ben.cancel()
        await until(lambda: not vps.running)


async def test_a_guest_that_made_room_and_waits_in_vain_counts_as_refused(monkeypatch):
    async with pi_with([HANG], clients=GUESTS, max_concurrent=1) as (pi, vps):
        tom = ask(pi, TOM, CHATS)
        await until(lambda: vps.running)
        anna = ask(pi, ANNA)
        await until(lambda: pi.line)
        monkeypatch.setitem(completion.WAIT_SECONDS, "chat", 0.0)
        pi.gateway.dispatcher.changed()
        assert (await tom).status == 429
        ended = pi.gateway.counting.tallies["qwen_0_5b"].ended
        assert {reason: times for reason, times in ended.items() if times} == {"RATE_LIMIT": 1}
        anna.cancel()
        await until(lambda: not vps.running)


async def test_a_guest_makes_room_while_its_connection_is_opened(monkeypatch):
    monkeypatch.setattr(dispatcher, "ENDING_SECONDS", 0.05)
    asked = asyncio.Event()
    gate = asyncio.Event()
    connect_now = Upstream._connect

    async def connect_late(self: Upstream) -> Any:
        monkeypatch.setattr(Upstream, "_connect", connect_now)
        asked.set()
        await gate.wait()
        return await connect_now(self)

    async with pi_with(clients=GUESTS, max_concurrent=1) as (pi, _):
        monkeypatch.setattr(Upstream, "_connect", connect_late)
        tom = ask(pi, TOM)
        await asked.wait()
        assert (await ask(pi, ANNA)).json["completion"] == "ab"
        gate.set()
        assert (await tom).json["completion"] == ""
        assert (await tom).json["finish_reason"] == "preempted"


async def test_a_shared_or_typed_answer_counts_for_each_who_asked():
    """A guest reads no completion of the family, and nobody what another one has been told."""
    gate = asyncio.Event()
    infill = {
        "input_prefix": "def f():\n",
        "prompt": "    re",
        "input_suffix": "\n",
        "temperature": 0,
    }
    scripts = [gated(gate), gated(gate), script("turn 1", "2")]
    async with pi_with(*scripts, clients=HOUSE) as (pi, vps):
        asked = [ask(pi, key, CHATS, "the same", temperature=0) for key in (ANNA, BEN, BEN, TOM)]
        await until(lambda: len(pi.readers) == 4 and vps.running == 2)
        gate.set()
        await asyncio.gather(*asked)
        assert [one.get("priority") for one in vps.completions] == [None, "low"]
        assert await figures(pi) == "anna 1 0 0, ben 2 2 0, tom 1 2 0"
        for typed in ("", "tu", "turn"):
            reply = await pi.post("/infill", infill | {"prompt": f"    re{typed}"}, X_API_Key=ANNA)
            assert reply.json.get("type_through", False) == bool(typed)
        assert len(vps.completions) == 3
        assert await figures(pi) == "anna 4 2 0, ben 2 2 0, tom 1 2 0"
        # Ben has typed the same in an equal file: none of her text is his.
        reply = await pi.post("/infill", infill | {"prompt": "    retu"}, X_API_Key=BEN)
        assert "type_through" not in reply.json
        assert len(vps.completions) == 4
        assert await figures(pi) == "anna 4 2 0, ben 3 4 0, tom 1 2 0"


def test_guests_share_what_all_may_fill():
    """However many they are: the largest body of the family has room."""
    bodies = Counter[str]()
    guests = [f"guest{number}" for number in range(32)]
    for guest in guests:
        while cerebrum_http.may_grow(bodies, guest, guests, 4096):
            bodies[guest] += 4096
    assert all(bodies.values())
    assert cerebrum_http.may_grow(bodies, "anna", guests, cerebrum_http.MAX_BODY_BYTES)


async def test_bodies_and_tokens_of_a_guest_leave_room_for_others(monkeypatch):
    monkeypatch.setattr(cerebrum_http, "MAX_BODIES_BYTES", 100_000)
    gate = asyncio.Event()
    counted = [gate.wait, answer(200, {"tokens": [1]})]
    async with pi_with(counted, clients=GUESTS) as (pi, vps):
        guests = [ask(pi, TOM, TOKENIZE, "x" * 4900) for _ in range(9)]
        await until(lambda: sum(one.done() for one in guests) == 5)  # a fifth is his
        for refused in [guest for guest in guests if guest.done()]:
            assert (await refused).json["error"]["code"] == "OVERLOADED"
        guests.append(ask(pi, TIM, TOKENIZE, "y"))
        await until(lambda: len(pi.server.bodies) == 2)
        family = [ask(pi, key, TOKENIZE, "z" * 25_000) for key in (ANNA, BEN)]
        await until(lambda: vps.running == 3)  # one of anna, one of ben, and one of the guests
        assert sorted(fields["text"][0] for fields in vps.completions) == ["x", "z", "z"]
        gate.set()
        assert await statuses(*family) == [200, 200]
        assert Counter(await statuses(*guests)) == {200: 5, 503: 5}


# -------------------------------------------------------------------------------------------- https


def curl(
    authority: Path | str, port: int, path: str, *more: str, scheme: str = "https"
) -> tuple[int, str]:
    trusted = ["--cacert", str(authority)] if authority else []
    command = ["curl", "-sS", *trusted, *more, f"{scheme}://localhost:{port}{path}"]
    done = subprocess.run(command, **CAPTURED)
    return done.returncode, done.stdout + done.stderr


def test_https_of_the_daemon(tmp_path):
    first, second = certificate(tmp_path, "first"), certificate(tmp_path, "second")
    mine, other = first["CEREBRUM_CM4_TLS_CERT"], second["CEREBRUM_CM4_TLS_CERT"]
    body = '{"prompt": "x =", "language": "python"}'
    completion = ("-N", "-H", f"X-API-Key: {KEY}", "--json", body)
    with in_a_thread(Backend()) as vps:
        first["CEREBRUM_VPS_URL"] = f"http://127.0.0.1:{vps.port}"
        with daemon("cm4d", tmp_path, **first) as pi:
            pi.wait_for_line("VPS backend is available")
            status, text = curl(mine, pi.port, "/v1/complete/stream", *completion)
            assert status == 0
            assert '"token": "a"' in text
            assert '"done": true' in text
            assert curl("", pi.port, "/health", scheme="http")[0] in (52, 56)
            assert curl(other, pi.port, "/health")[0] == 60
            asked = SimpleNamespace(host="127.0.0.1", port=pi.port, tls=True)
            assert asyncio.run(has_health(asked, b'"vps_available"'))
            assert "pause_writing" not in pi.stdout()  # a client that has left is no fault
            for name in ("crt", "key"):  # a renewed certificate, in the same files
                os.replace(tmp_path / f"second.{name}", tmp_path / f"first.{name}")
            pi.process.send_signal(signal.SIGHUP)
            pi.wait_for_line("reloaded")
            assert curl(mine, pi.port, "/health")[0] == 0
            (tmp_path / "first.key").write_text("no key")
            pi.process.send_signal(signal.SIGHUP)
            pi.wait_for_line(f"{STAYS}CEREBRUM_CM4_TLS_CERT")
            assert curl(mine, pi.port, "/health")[0] == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_tls_begins_and_ends_with_a_restart(scheme, tmp_path):
    tls = certificate(tmp_path, "pi")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    given = {} if scheme == "http" else tls
    for name, file in given.items():
        (credentials / name).write_text(file)
    with daemon("cm4d", tmp_path, CREDENTIALS_DIRECTORY=str(credentials)) as pi:

        def refused(origin: str) -> bool:
            header = ("-H", f"Origin: {origin}://localhost:{pi.port}")
            status, text = curl(
                tls["CEREBRUM_CM4_TLS_CERT"], pi.port, "/health", *header, scheme=scheme
            )
            assert status == 0
            return "FORBIDDEN" in text

        foreign = "http" if scheme == "https" else "https"
        assert not refused(scheme)
        assert refused(foreign)
        for name, file in tls.items():
            (credentials / name).unlink() if given else (credentials / name).write_text(file)
        pi.process.send_signal(signal.SIGHUP)
        pi.wait_for_line(f"{', '.join(tls)} changed: restart the daemon to use it")
        assert not refused(scheme)
        assert refused(foreign)


def test_wrong_settings(tmp_path):
    refused = run_to_the_end("cm4d", tmp_path, CEREBRUM_CM4_TLS_CERT="/x")
    said = refused.stdout + refused.stderr
    assert refused.returncode == 2
    wrong = "CEREBRUM_CM4_TLS_CERT, CEREBRUM_CM4_TLS_KEY: expected both or neither, got one"
    assert f"cm4d.py: {wrong}" in said
    assert KEY not in said
    assert "Traceback" not in said
