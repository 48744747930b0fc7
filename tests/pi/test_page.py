"""The page as the Pi sends it, and the counts of the last half hour that it shows. test_browser.py
opens the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from harness import KEY, ROOT, until
from scripted import (
    GOOD,
    MODELS,
    Backend,
    answer,
    error,
    pi_for,
    pi_with,
)

import cm4d
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi.counting import HISTORY_STEP_SECONDS, HISTORY_STEPS, History
from cerebrum.pi.files import FILES, headers_of
from cerebrum.text.languages import LANGUAGES

FILE = ROOT / "cerebrum/pi/page.html"
MAX_BYTES = 50 << 10


# ----------------------------------------------------------------------------------------- the page


def test_the_page_is_small_and_has_nothing_from_elsewhere():
    text = FILE.read_text("utf-8")
    assert len(text.encode()) <= MAX_BYTES
    counts = [text.count(tag) for tag in ("<script", "<style", "<script>", "<style>")]
    assert counts == [1, 1, 1, 1]
    elsewhere = re.findall(r"https?:(?!//www\.w3\.org/)", text)  # but for the name of SVG
    shown, _, script = text.partition("<script>")
    elsewhere += re.findall(r"<[^>]* (?:style|on\w+)=", shown)
    names = r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|eval|new Function"
    elsewhere += re.findall(rf"\b(?:{names})\b", script)
    assert elsewhere == []


def settings_for_editors(address: str) -> list[str]:
    """The blocks of our documents that have a key to fill in, and VS Code's, with this address of
    the Pi.
    """
    documents = (ROOT / "README.md").read_text() + (ROOT / "docs/editors.md").read_text()
    blocks: list[str] = re.findall(r"^```\w+\n(.*?)^```", documents, re.M | re.S)
    needed = [block for block in blocks if re.search(r"\bKEY\b|cerebrum\.vsix", block)]
    return [block.replace("http://pi.local:7000", address) for block in needed]


def test_the_settings_for_editors_are_those_of_the_documents():
    shown = re.findall(
        r'<pre title="[^"]+"(?: class=\w+)?>\n(.*?)</pre>', FILE.read_text("utf-8"), re.S
    )
    assert sorted(map(html.unescape, shown)) == sorted(settings_for_editors("ADDRESS"))
    assert len(shown) == 13


async def test_the_page_is_confined_and_needs_no_key_nor_does_the_language_server():
    async with pi_with(client_keys=("k",)) as (pi, _):
        reply = await pi.get("/")
        assert reply.body == FILE.read_bytes()
        policy = {"connect-src 'self'", "img-src data:", "require-trusted-types-for 'script'"}
        for what in ("default-src", "base-uri", "form-action", "frame-ancestors"):
            policy.add(f"{what} 'none'")
        for tag in ("script", "style"):
            (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), reply.body, re.S)
            digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
            policy.add(f"{tag}-src 'sha256-{digest}'")
        assert set(reply.one("content-security-policy").split("; ")) == policy
        names = ("x-content-type-options", "x-frame-options", "referrer-policy")
        assert [reply.one(name) for name in names] == ["nosniff", "DENY", "no-referrer"]
        server = await pi.get("/cerebrum_lsp.py")
        assert server.body == (ROOT / "cerebrum_lsp.py").read_bytes()


async def test_without_its_files_the_daemon_lives(monkeypatch, caplog):
    monkeypatch.setattr(cm4d, "HERE", Path("/nonexistent"))
    async with pi_with() as (pi, _):
        for path in FILES:
            reply = await pi.get(path)
            assert reply.status == 404
            assert reply.json["code"] == "NOT_FOUND"
            assert re.match("expected .* beside cm4d.py, got none", reply.json["message"])
        assert (await pi.complete()).status == 200
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    sources = ("cerebrum/pi/page.html", "cerebrum_lsp.py", "cerebrum_lsp.py", "vscode/package.json")
    assert logged == [
        f"nothing at {path}: [Errno 2] No such file or directory: '/nonexistent/{source}'"
        for path, source in zip(FILES, sources, strict=True)
    ]


def test_a_page_from_a_checkout_with_crlf_and_one_with_no_script():
    assert headers_of(b"<script>\r\nf()\r\n</script>") == headers_of(b"<script>\nf()\n</script>")
    assert "; script-src 'none';" in dict(headers_of(b"<p>a"))["Content-Security-Policy"]


async def test_its_requests_fill_no_log(caplog):
    """It asks every few seconds, and the Pi's log is on an SD card."""
    caplog.set_level("INFO")
    async with pi_for(1, probing=False, client_keys=(KEY,)) as pi:
        for path, key in (("/v1/activity", KEY), ("/v1/activity", "x"), ("/v1/stats", KEY)):
            await pi.get(path, X_API_Key=key)
    asked = re.findall(r"GET /\S+ \d+", caplog.text)
    assert asked == ["GET /v1/activity 401", "GET /v1/stats 200"]


# ------------------------------------------------------------------------------- the last half hour


def test_the_history_is_one_of_steps_and_forgets():
    history = History(now=1000.0)
    for step, counts in ((0, (1, 0, 10)), (1, (1, 1, 40)), (3, (4, 1, 40))):
        history.sample(1000.0 + step * HISTORY_STEP_SECONDS, counts)
    told = history.describe()
    assert (told["step_s"], HISTORY_STEPS) == (30, 60)
    assert told["failed"] == [0] * 57 + [1, 0, 0]
    assert told["requests"] == [0] * 56 + [1, 0, 0, 3]
    assert told["tokens"] == [0] * 56 + [10, 30, 0, 0]
    history.sample(1000.0 + 60 * HISTORY_STEP_SECONDS, (5, 1, 40))
    assert history.describe()["requests"] == [0, 0, 3] + [0] * 56 + [1]


async def test_activity():
    scripts = [GOOD, [error(500, "MODEL_LOAD_FAILED")]]
    health = answer(200, {"status": "healthy", "models_loaded": ["qwen_0_5b"]})
    async with Backend(scripts, health=health) as backend, pi_for(backend.port) as pi:
        assert [(await pi.complete()).status for _ in range(2)] == [200, 500]
        told = (await pi.get("/v1/activity")).json
        assert (told["vps_message"], told["models_loaded"]) == ("", ["qwen_0_5b"])
        assert [sum(told[name]) for name in ("requests", "failed", "tokens")] == [2, 1, 2]
        assert told["requests_total"] == 2
        more = {"timestamp", "notes", "vps_message", "models_loaded", "client", "extension"}
        more |= {"step_s", "requests", "failed", "tokens"}
        assert told.keys() - (await pi.stats()).keys() == more


# What models.toml says of a model, and where it is.
LISTED = {"id", "name", "languages", "parameters", "quantization", "available", "backends"}


async def test_models_have_what_the_vps_reports(monkeypatch):
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 0.02)
    known = {"loaded": True, "encoding": "Q8_0", "memory_mb": 612.5, "n_ctx": 2048}
    loaded = {"id": "qwen_0_5b", **known, "path": "/x"}
    idle = {"id": "qwen_1_5b", "loaded": False, "encoding": "published", "available": True}
    backend = Backend(models=answer(200, {"models": [loaded, idle]}))
    async with backend, pi_for(backend.port, prefer={"infill": ("qwen_0_5b",)}) as pi:
        told = (await pi.get("/v1/models")).json
        models = {one["id"]: one for one in told["models"]}
        small, large = models["qwen_0_5b"], models["qwen_7b"]
        assert small == small | known | {"available": True}
        assert "path" not in small, "a path of the VPS leaks"
        assert large.keys() == LISTED
        assert told.keys() == {"models", "vps_available", "languages", "prefer", "object", "data"}
        assert told["prefer"] == {"infill": ["qwen_0_5b"]}
        assert [one["id"] for one in told["languages"] if one["served"]] == [*LANGUAGES]
        backend.models = answer(200, MODELS)
        # What is loaded has changed: ask again.
        backend.health = answer(200, {"models_loaded": ["qwen_0_5b"]})
        await until(lambda: [*pi.gateway.fleet.models] == ["qwen_0_5b"])


async def test_what_users_accept_is_counted():
    async with pi_for(1, probing=False) as pi:
        for characters, counts in (12, (1, 12)), (5, (2, 17)):
            told = (await pi.post("/v1/accepted", {"characters": characters})).json
            assert (told["accepted"], told["accepted_characters"]) == counts
        assert (await pi.post("/v1/accepted", {"characters": 0})).status == 400
        assert (await pi.stats()).items() >= told.items()
        body = (await pi.get("/metrics")).body
        metrics = re.findall(rb"^cerebrum_accepted_(\w+ \d+)$", body, re.M)
        assert metrics == [b"completions_total 2", b"characters_total 17"]
