"""The Pi's page in a real browser: Debian's Chromium, driven by playwright, and axe-core for
accessibility.

A script stands for the VPS, so every text is exact. Each visit also asserts that the page logs no
error, opens no dialog, and sends no request to another origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import KEY, SHIPPED, rows, until
from scripted import CHUNKED, HANG, Backend, Pi, chunk, error, event, pi_for, token
from scripted import script as completion
from test_page import settings_for_editors
from test_peers import needs
from test_vscode import installed

from cerebrum.pi.counting import Usage
from cerebrum.settings import Client

pytestmark = pytest.mark.clients

EXPECT_MS = 20_000
SETTINGS = ["language", "model", "tokens", "temperature"]
DEFAULTS = {"max_tokens": 512, "temperature": 0.4}
CODE = "def add(a, b):\n    return "
HOSTILE = '</textarea><script>window.pwned=1</script><img src=x onerror="window.pwned=1">\'"&amp;'
BIDI = "a\u202eb\u2066c\x07d\x1b[2J\U000e0041"
BIDI_SPELLED = "a⟨U+202E⟩b⟨U+2066⟩c⟨U+0007⟩d⟨U+001B⟩[2J⟨U+E0041⟩"
# Playwright's options of a screen.
WIDE = {"viewport": {"width": 1440, "height": 900}}
PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}
CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}
A = chunk(token("a", 1))


# -------------------------------------------------------------------------------------- the browser


@dataclass
class Visit:
    """A page that a scripted VPS stands behind."""

    page: Any
    backend: Backend
    pi: Pi
    complaints: list[str] = field(default_factory=list)  # errors, dialogs, requests to elsewhere
    asked: list[str] = field(default_factory=list)  # paths

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.pi.port}/"

    @property
    def evaluate(self) -> Any:
        """Run JavaScript in the page."""
        return self.page.evaluate

    def find(self, selector: str) -> Any:
        return self.page.locator(selector)

    async def see(self, selector: str, text: str | re.Pattern[str]):
        """Wait until the element has this text."""
        await expect(self.find(selector)).to_have_text(text)

    async def see_part(self, selector: str, text: str | re.Pattern[str]):
        await expect(self.find(selector)).to_contain_text(text)

    async def holds(self, text: str, mark: str = ""):
        """Wait until the editor holds this text, and `mark` of it is marked."""
        await expect(self.find("#editor")).to_have_value(text)
        await self.see("#mark", mark)

    async def is_up(self):
        """Wait until the page says that the Pi reaches its VPS."""
        await expect(self.find("#light")).to_have_class("up")

    async def offers(self, id: str):
        """Wait until this button or field has the focus."""
        await expect(self.find(f"#{id}")).to_be_focused()

    async def ended(self):
        await expect(self.find("#stop")).to_be_disabled()

    async def write(self, text: str, at: int | None = None):
        """Put a text into the editor as a paste does, and the cursor at its end or where asked."""
        await self.find("#editor").focus()
        await self.press("Control+a")
        await (self.page.keyboard.insert_text(text) if text else self.press("Delete"))
        at = len(text) if at is None else at
        await self.select(at, at)

    async def select(self, start: int, end: int):
        await self.find("#editor").evaluate(
            "(box, [start, end]) => box.setSelectionRange(start, end)", [start, end]
        )

    async def press(self, *keys: str, holds: str | None = None, mark: str = ""):
        for key in keys:
            await self.page.keyboard.press(key)
        if holds is not None:
            await self.holds(holds, mark)

    async def click(self, *ids: str, holds: str | None = None, mark: str = ""):
        for id in ids:
            await self.find(f"#{id}").click()
        await self.press(holds=holds, mark=mark)

    async def enter_key(self, key: str):
        await self.find("#key").fill(key)
        await self.press("Enter")

    async def instruct(self, text: str, instruction: str, offers: str = ""):
        """Ask for a change of `text`, and wait until it is proposed and this button has the focus,
        if any.
        """
        await self.write(text)
        await self.find("#instruction").fill(instruction)
        await self.press("Enter")
        if offers:
            await self.offers(offers)

    async def ask(self, text: str, at: int | None = None, mark: str = ""):
        """Complete `text` at its end or where asked, and wait until `mark` is marked, if there is
        one.
        """
        await self.write(text, at)
        await self.press("Control+Enter")
        if mark:
            await self.see("#mark", mark)

    async def complete(self, text: str, pending: str):
        """Complete `text` at its end, and wait until `pending` is marked and the stream has
        ended.
        """
        await self.ask(text, mark=pending)
        await self.ended()

    async def saved(self) -> tuple[str, bytes]:
        """The name and the content of the file that the page saves."""
        async with self.page.expect_download() as downloaded:
            await self.click("save")
        file = await downloaded.value
        return str(file.suggested_filename), await asyncio.to_thread(
            Path(await file.path()).read_bytes
        )

    async def drop(self, name: str, content: bytes):
        carried = await self.page.evaluate_handle(
            "([name, bytes]) => { const carried = new DataTransfer();"
            " carried.items.add(new File([Uint8Array.from(bytes, c => c.charCodeAt())], name)); "
            "return carried }",
            [name, content.decode("latin-1")],
        )
        await self.page.dispatch_event("#editor", "drop", {"dataTransfer": carried})

    async def diff(self) -> list[str]:
        return list(await self.find("#diff > *").all_text_contents())

    async def focused(self) -> str:
        return str(await self.evaluate("document.activeElement.id"))

    def watch(self):
        def on_console(message: Any):  # a resource fails to load by its status, or offline
            if message.type == "error" and not message.text.startswith("Failed to load resource"):
                self.complaints.append(message.text)

        def on_request(request: Any):
            if request.url.startswith(self.url):
                self.asked.append(request.url.removeprefix(self.url[:-1]))
            elif not request.url.startswith(("data:", "blob:")):
                self.complaints.append(request.url)

        async def on_dialog(dialog: Any):
            if dialog.type != "beforeunload":
                self.complaints.append(dialog.message)
            await dialog.accept()

        self.page.on("console", on_console)
        self.page.on("pageerror", lambda fault: self.complaints.append(str(fault)))
        self.page.on("request", on_request)
        self.page.on("dialog", on_dialog)


@contextlib.asynccontextmanager
async def visiting(
    browser: Any,
    *scripts: Sequence[Any],
    before: Callable[[Visit], Awaitable[None]] | None = None,
    context: dict[str, Any] | None = None,
    fragment: str = "",
    **config: Any,
) -> AsyncIterator[Visit]:
    """Open the page, with a `fragment` behind its address, and wait until it knows the state of the
    VPS, which completes "a + b" by default, unless the Pi has keys.
    """
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend(scripts or [completion("a + b")]))
        pi = await stack.enter_async_context(pi_for(backend.port, **config))
        opened = await browser.new_context(**WIDE | (context or {}))
        stack.push_async_callback(opened.close)
        visit = Visit(await opened.new_page(), backend, pi)
        visit.watch()
        if before:
            await before(visit)
        await visit.page.goto(visit.url + fragment)
        if not pi.gateway.config.access.needs_key:
            await expect(visit.find("#light.up, #light.down")).to_be_visible()
        yield visit
        assert await visit.evaluate("typeof window.pwned") == "undefined"
        assert visit.complaints == []


def expect(what: Any) -> Any:
    from playwright.async_api import expect as playwright_expect

    playwright_expect.set_options(timeout=EXPECT_MS)
    return playwright_expect(what)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Runs all tests of this file: one browser serves them all, and lives in one event loop."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def chrome(runner: asyncio.Runner) -> Iterator[Any]:
    api = pytest.importorskip("playwright.async_api", reason="please run: ./run.sh setup clients")
    chromium = needs("chromium")
    driver = runner.run(api.async_playwright().start())
    browser = runner.run(driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]))
    yield browser
    runner.run(browser.close())
    runner.run(driver.stop())


@pytest.fixture(scope="module")
def axe() -> str:
    """The accessibility checker's source."""
    return (installed({"axe-core": "4"}) / "axe-core/axe.min.js").read_text()


# --------------------------------------------------------------------------------------- completing


async def test_a_completion_streams_in_is_marked_and_accepted(chrome):
    gate = asyncio.Event()
    scripts = completion("a", gate.wait, " + b\r", "\n"), completion("c")
    async with visiting(chrome, *scripts) as visit:
        await visit.ask(CODE, mark="a")  # before the rest was written
        await visit.see_part("#stage", "Writing, 1 token")
        gate.set()
        await visit.holds(CODE + "a + b\n", mark="a + b\n")
        await visit.ended()
        await visit.press("Tab", holds=CODE + "a + b\n")
        await visit.press("Control+z", holds=CODE)
        await visit.press("Control+Shift+z", holds=CODE + "a + b\n")
        await visit.press("Control+Enter", holds=CODE + "a + b\nc", mark="c")
        await visit.press("Escape", holds=CODE + "a + b\n")
        await visit.press("Control+y", holds=CODE + "a + b\nc")  # who pressed Esc too late
        await visit.press(*["Control+z"] * 3, holds="")
        sent, second = visit.backend.completions
        assert sent["session"] == second["session"]
        expected = {"mode": "complete", "prompt": CODE, "language": "python", "progress": True}
        assert sent == sent | expected | DEFAULTS
        assert "suffix" not in sent


async def test_typing_accepts_and_esc_keeps_what_is_there_and_both_stop_the_rest(chrome):
    async with visiting(chrome, [CHUNKED, A, HANG]) as visit:
        await visit.ask(CODE, mark="a")
        assert not visit.backend.left.is_set()
        await visit.press("x", holds=CODE + "ax")
        await visit.backend.left.wait()
        await visit.press("Control+z", holds=CODE + "a")
        await visit.press("Control+z", holds=CODE)
        visit.backend.left.clear()
        await visit.ask(CODE, mark="a")
        await visit.press("Escape")
        await visit.backend.left.wait()
        await visit.see("#outcome", "Stopped. The text received so far is still marked.")
        await visit.holds(CODE + "a", mark="a")
        await visit.press("Escape", holds=CODE)


async def test_an_infill_sends_what_is_around_the_cursor(chrome):
    """With a selection, its end is the cursor. The buttons do the same as the keys."""
    suffix = "\n\n\nprint(add(1, 2))\n"
    async with visiting(chrome) as visit:
        await visit.write(CODE + suffix)
        await visit.select(3, len(CODE))
        await visit.click("complete", holds=CODE + "a + b" + suffix, mark="a + b")
        (sent,) = visit.backend.completions
        assert sent == sent | {"mode": "infill", "prompt": CODE, "suffix": suffix}
        await visit.click("undo", holds=CODE + suffix)
        await visit.click("complete")
        await visit.ended()
        await visit.click("accept", holds=CODE + "a + b" + suffix)
        blank = "\n \n"  # is no suffix, and stays
        await visit.ask(CODE + blank, at=len(CODE), mark="a + b")
        await visit.holds(f"{CODE}a + b{blank}", mark="a + b")
        assert visit.backend.completions[-1]["mode"] == "complete"


async def test_a_user_who_scrolls_keeps_the_position(chrome):
    """Until then, the end of the text that comes stays in view. The mark lies behind its text."""
    more, rest = asyncio.Event(), asyncio.Event()
    script = completion("a\n" * 40, more.wait, "b\n" * 40, rest.wait, "c\n" * 40)
    async with visiting(chrome, script) as visit:
        editor = visit.find("#editor")
        await visit.ask("x = 1\n" * 100, mark="a\n" * 40)
        below = "box => box.scrollHeight - box.clientHeight - box.scrollTop"
        assert await editor.evaluate(below) < 48
        await editor.evaluate("box => { box.scrollTop = 100 }")
        more.set()
        await visit.see("#mark", "a\n" * 40 + "b\n" * 40)
        assert await editor.evaluate("box => box.scrollTop") == 100
        await visit.select(7, 7)
        rest.set()
        await visit.ended()
        place = "box => [box.scrollTop, box.selectionStart, box.selectionEnd]"
        assert await editor.evaluate(place) == [100, 7, 7]
        moved = "transform: translate(0px, -100px);"
        assert await visit.find("#mirror").get_attribute("style") == moved
        names = ("font", "padding", "borderWidth", "tabSize", "whiteSpace", "lineHeight")
        read = f"it => {[*names]}.map(name => getComputedStyle(it)[name])"
        assert await editor.evaluate(read) == await visit.find(".mirror").evaluate(read)


# -------------------------------------------------------------------------------------- instructing


async def test_an_instruction_shows_its_diff_before_it_is_taken(chrome):
    gate = asyncio.Event()
    before = "".join(f"line {n}\n" for n in range(20))
    after = before.replace("line 9\n", "line nine\nmore\n")
    diff = ["… 6 unchanged lines", "  line 6", "  line 7", "  line 8", "- line 9", "+ line nine"]
    diff += ["+ more", "  line 10", "  line 11", "  line 12", "… 7 unchanged lines"]
    async with visiting(chrome, completion(after.removesuffix("\n"), gate.wait)) as visit:
        await visit.instruct(before, "say nine")
        await visit.see_part("#diff", "line nine")  # while it comes
        await expect(visit.find("#take")).to_be_hidden()
        gate.set()
        await visit.see("#proposal-summary", "2 lines added, 1 removed.")
        assert await visit.diff() == diff
        assert await visit.focused() == "take"
        await visit.press("Escape", holds=before)
        await expect(visit.find("#proposal")).to_be_hidden()
        await visit.instruct(before, "say nine", offers="take")
        await visit.press("Enter", holds=after)
        assert await visit.focused() == "editor"
        await visit.press("Control+z", holds=before)
        sent = visit.backend.completions[0]
        assert sent == sent | {"mode": "instruct", "max_tokens": 512}
        assert sent["messages"][0]["content"] == f"say nine\n\n```python\n{before}```"


async def test_an_instruction_for_a_selection_and_for_a_text_that_has_changed(chrome):
    async with visiting(chrome, completion("TWO"), completion("print(1)\n")) as visit:
        await visit.write("one\ntwo\nthree\n")
        await visit.select(4, 8)
        await visit.see("#scope", "(in the selection)")
        await visit.find("#instruction").fill("in capitals")
        await visit.press("Enter")
        await visit.offers("take")
        assert await visit.diff() == ["- two", "+ TWO"]
        await visit.press("Enter", holds="one\nTWO\nthree\n")
        assert "```python\ntwo\n```" in visit.backend.completions[0]["messages"][0]["content"]
        await visit.instruct("x = 1\n", "print one", offers="take")
        await visit.write("z = 3\n")
        await visit.click("take", holds="z = 3\n")
        await visit.see_part("#error", "The text has changed since")


async def test_an_answer_that_may_lack_a_part_is_not_taken_unwarned(chrome):
    wrong = {"length": "was cut off at 512 tokens", "repeat": "repeats itself"}
    wrong |= {"preempted": "made room for another request"}
    answers = [completion("y = 1", finish_reason=reason) for reason in wrong]
    async with visiting(chrome, *answers, completion("y = 1")) as visit:
        for words in wrong.values():
            await visit.instruct("x = 1\n", "use y")
            await visit.see(
                "#proposal-warning", f"The answer {words}: the end of the text may be missing."
            )
            await visit.offers("leave")
        await expect(visit.find("#take")).to_be_hidden()  # of the preempted one
        await visit.instruct("".join(f"value_{n} = {n}\n" for n in range(500)), "use y")
        words = re.compile(r"The model saw only \d+ of 7785 characters\. The answer may lack")
        await visit.see_part("#proposal-warning", words)
        await visit.offers("leave")
        assert (
            visit.backend.completions[3]["max_tokens"] == 2048
        )  # a third of the characters and 64 would be more


async def test_lines_are_compared(chrome):
    """Both texts can be made from the rows."""
    chance = random.Random(7)
    texts = ["", "a", "a\n", "\n", "a\nb\nc", "b\nc\nd\n"]
    texts += ["".join(chance.choices("ab\n", k=chance.randrange(30))) for _ in range(20)]
    # Too much to compare.
    large = ["\n".join(f"{name}{n}" for n in range(3000)) for name in "xy"]
    pairs = [*itertools.product(texts, texts), ("a\nb\nc\nd", "a\nc\nx\nd"), large]
    async with visiting(chrome) as visit:
        compare = "pairs => pairs.map(([one, other]) => diffLines(one, other))"
        answers = await visit.evaluate(compare, pairs)
    for (old, new), compared in zip(pairs, answers, strict=True):
        before = [line for sign, line in compared if sign in " -"]
        after = [line for sign, line in compared if sign in " +"]
        assert (before, after) == (old.splitlines(True), new.splitlines(True))
    shortest = [sign for sign, _ in answers[-2]]
    assert shortest == [" ", "-", " ", "+", " "]


# ------------------------------------------------------------------------------------------- errors


async def test_the_vps_dies_in_mid_stream_and_then_the_pi(chrome):
    """The error comes before the cut, so that the page can read it. The Pi's own end has no
    event.
    """
    gate = asyncio.Event()
    async with visiting(chrome, [CHUNKED, A, gate.wait], [CHUNKED, A, HANG]) as visit:
        async with visit.page.expect_response("**/v1/complete/stream") as answered:
            await visit.ask(CODE, mark="a")
        gate.set()
        id = (await answered.value).headers["x-request-id"]
        told = r"VPS backend is unavailable \(it ended in the middle of its answer\)\."
        await visit.see("#error", re.compile(f"{told} Request id: {id}"))
        await visit.holds(CODE + "a", mark="a")
        await visit.press("Tab", holds=CODE + "a")
        await visit.ask(CODE, mark="a")
        for each in visit.pi.server.connections.values():
            each.transport.close()
        words = "The connection broke before the end; what had come is still marked."
        await visit.see_part("#error", re.compile(words + " Request id: [0-9a-f-]{36}"))
        await visit.holds(CODE + "a", mark="a")


async def test_a_stream_that_falls_silent(chrome):
    """The Pi sends a comment from time to time. Without any, its connection is lost, whatever the
    network says.
    """
    async with visiting(
        chrome, [CHUNKED, A, HANG], before=lambda visit: visit.page.clock.install()
    ) as visit:
        await visit.ask(CODE)
        await until(lambda: len(visit.backend.completions) == 1)
        await visit.page.clock.run_for(1000)
        await visit.see("#mark", "a")
        await visit.page.clock.run_for(30_000)
        await expect(visit.find("#work")).to_be_visible()
        await visit.page.clock.run_for(15_000)
        await visit.see_part("#error", "The connection broke before the end")
        await visit.backend.left.wait()
        await visit.holds(CODE + "a", mark="a")


async def test_stages_and_the_time(chrome):
    loading, reading = asyncio.Event(), asyncio.Event()
    writing = asyncio.Event()

    def stage(name: str, done: int, total: int) -> bytes:
        return chunk(event(progress={"stage": name, "done": done, "total": total}))

    pieces = [stage("queued", 0, 1) + stage("loading", 40, 100), loading.wait]
    pieces += [stage("prefill", 300, 900), reading.wait]
    pieces += [stage("decode", 0, 512) + chunk(token("a", 12)), writing.wait]
    told = json.loads("""{
        "total_tokens": 128, "inference_time": 18.2, "load_time": 9.1, "ttft": 4.0,
        "tokens_per_second": 12.1, "prompt_tokens": 900, "cached_tokens": 200}""")
    async with visiting(chrome, completion(*pieces, **told)) as visit:
        await visit.ask(CODE)
        bar = "bar => [bar.value, bar.max]"
        await visit.see("#stage", "Loading the model, 40 %")
        assert await visit.find("progress").evaluate(bar) == [40, 100]
        loading.set()
        await visit.see("#stage", "Reading the prompt, 300 of 900 tokens")
        assert await visit.find("progress").evaluate(bar) == [300, 900]
        reading.set()
        await visit.see_part("#stage", "Writing, 12 tokens")
        writing.set()
        time = "128 tokens in 18.2 s: 9.1 s loading qwen_0_5b, 4.0 s waiting and reading 700 of"
        time += " 900 tokens, then 12.1 tokens/s."
        await visit.see("#outcome", time)
        await expect(visit.find("#work")).to_be_hidden()
        await visit.see_part("#slow", f"Your last request: {time}")


async def test_a_key_is_asked_for_and_kept_in_this_tab_and_then_in_the_browser(chrome):
    """In the browser only if the user wants that, and not one that the Pi refuses."""
    stores = "[sessionStorage.cerebrum, localStorage['cerebrum-key']]"
    async with visiting(chrome, client_keys=(KEY,)) as visit:
        await visit.evaluate("localStorage['cerebrum-key'] = '\"revoked\"'")
        await visit.page.reload()
        await visit.offers("key")
        await visit.ask(CODE)
        await visit.offers("key")
        await visit.press("Escape")
        await visit.see("#outcome", "Stopped.")  # this request is not sent again
        await visit.ask(CODE)
        await visit.offers("key")
        await visit.enter_key("wrong words")
        await visit.see("#key-error", "That key is wrong. Please try again.")
        assert await visit.evaluate(stores) == [None, "null"]
        assert visit.backend.completions == []
        await visit.enter_key(KEY)
        await visit.see("#mark", "a + b")  # the request was sent again
        await expect(visit.find("#key-form")).to_be_hidden()
        assert len(visit.backend.completions) == 1
        own = f'"{KEY}"'
        for says, now in (("Remember", [own, own]), ("Forget", [None, "null"])):
            await visit.is_up()
            await visit.find("#recipes summary").click()
            await visit.see_part("#keep", f"{says} the key")
            await visit.click("keep")
            assert await visit.evaluate(stores) == now
            await visit.evaluate("sessionStorage.clear()")
            await visit.page.reload()


async def test_hostile_texts_are_text(chrome):
    hostile = HOSTILE + BIDI
    spelled = HOSTILE + BIDI_SPELLED
    name = HOSTILE.replace("/", "")
    lies = dict.fromkeys(("vps_message", "requests_active", "breaker"), hostile)
    lies |= {name: [hostile] for name in ("models_loaded", "notes", "load_avg")}
    lies["vps_available"] = False  # the Pi would not pass them on
    scripts = completion(hostile), completion(hostile), [error(500, "MODEL_LOAD_FAILED", hostile)]
    named = tuple(dataclasses.replace(model, name=hostile) for model in SHIPPED)

    async def lie(visit: Visit):
        await visit.page.route("**/v1/activity", lambda route: route.fulfill(json=lies))

    async with visiting(chrome, *scripts, before=lie, models=named) as visit:
        await visit.see("#health", f"{spelled}.")
        await visit.see("#notes", spelled)
        await visit.see("#models td:first-child >> nth=0", spelled)
        await visit.see_part("#model option >> nth=1", spelled)
        await visit.complete("x = ", hostile)
        await visit.holds("x = " + hostile, mark=hostile)
        await visit.see_part("#outcome", "The marked text contains invisible characters.")
        await visit.see_part("#live", spelled)
        await visit.instruct("", HOSTILE, offers="take")
        assert await visit.diff() == [f"+ {spelled}"]
        await visit.drop(f"{name}{BIDI}.rs", b"fn main() {}")
        await visit.see("#file-name", f"File: {name}{BIDI_SPELLED}.rs")
        await visit.press("Control+Enter")
        await visit.see_part("#error", HOSTILE)
        assert await visit.find("img, script:not(:last-child)").count() == 0


# ---------------------------------------------------------------------------------- files, settings


async def test_files_are_opened_by_dropping_and_by_button(chrome, tmp_path):
    async with visiting(chrome) as visit:
        await visit.write("unsaved = 1\n")
        await visit.drop("main.RS", b"\xef\xbb\xbffn main() {\r\n    ")
        await visit.holds("fn main() {\n    ")
        await visit.see(
            "#outcome", "main.RS is open. Your text before it was not saved: Undo brings it back."
        )
        await visit.press("Control+Enter")
        await visit.see("#mark", "a + b")
        (sent,) = visit.backend.completions
        assert sent["filename"] == "main.RS"
        assert sent["language"] == "rust"
        await visit.press("Tab")
        assert await visit.saved() == ("main.RS", b"\xef\xbb\xbffn main() {\r\n    a + b")
        await visit.click("undo", "undo", holds="unsaved = 1\n")
        (tmp_path / "sum.py").write_text("x = 1\n")
        async with visit.page.expect_file_chooser() as chosen:
            await visit.find("#open").press("Enter")
        await (await chosen.value).set_files(tmp_path / "sum.py")
        await visit.holds("x = 1\n")
        await expect(visit.find("#language")).to_have_value("python")


# A file, its text as it is changed, the file as it is saved.
SAVED = r"""
\xef\xbb\xbfa\r\nb\nc\r\n | unchanged            | \xef\xbb\xbfa\r\nb\nc\r\n
a\r\nb\nc\r\nd\re          | a\nB\nnew\nc\nd\ne\n | a\r\nB\nnew\nc\r\nd\re\r
a\r\nb                     | new\na\nb\nc\n       | new\r\na\r\nb\r\nc\r\n
a\nb\r\n                   |                      |
                           | a\n                  | a\n
"""


async def test_a_saved_file_has_every_byte_that_was_not_changed(chrome):
    async with visiting(chrome) as visit:
        for content, text, saved in rows(SAVED):
            await visit.drop("a.py", content.encode("latin-1"))
            await visit.see_part("#outcome", "a.py is open.")
            if text != "unchanged":
                await visit.write(text)
            for _ in range(2):
                assert await visit.saved() == ("a.py", saved.encode("latin-1"))
            await visit.click("new")


WRONG_FILES = (
    ("a", b"#" * (2 << 20), "is larger than 700 KB"),
    ("b", b"# \xe4", "is not a file of UTF-8 text"),
    ("c", b"a\0b", "is not a file of UTF-8 text"),
)


async def test_files_that_cannot_be_opened(chrome):
    async with visiting(chrome) as visit:
        await visit.write("x = 1\n")
        for name, content, is_wrong in WRONG_FILES:
            await visit.drop(name, content)
            await visit.see("#error", f"{name} {is_wrong}; it was not opened.")
        await visit.holds("x = 1\n")
        await visit.drop("notes.txt", b"text")
        await visit.see_part("#outcome", "The file name shows no language; using python.")


async def test_settings_are_sent_and_remembered(chrome):
    async with visiting(chrome) as visit:

        async def shown() -> list[str]:
            await visit.page.reload()
            await visit.is_up()
            return [await visit.find(f"#{name}").input_value() for name in SETTINGS]

        await visit.find("#language").select_option("go")
        await visit.find("#model").select_option("qwen_1_5b")
        await visit.find("#tokens").fill("99999")
        await visit.find("#temperature").fill("0")
        await visit.complete("func f() {\n", "a + b")
        (sent,) = visit.backend.completions
        chosen = {"language": "go", "model": "qwen_1_5b", "max_tokens": 2048, "temperature": 0}
        assert sent == sent | chosen
        await visit.press("Tab", "Enter", "Tab", holds="func f() {\na + b\n\t")  # Go has tabs
        assert "func" not in await visit.evaluate("Object.values(localStorage).join()")
        assert await shown() == ["go", "qwen_1_5b", "2048", "0"]
        gone = '{"language": "cobol", "model": "gpt", "tokens": "x", "temperature": null}'
        await visit.evaluate("gone => localStorage.setItem('cerebrum', gone)", gone)
        assert await shown() == ["python", "", "512", "0.4"]


# ------------------------------------------------------------------------------------- the keyboard


# A text, where the cursor is if not at its end, the keys, the text then.
INDENTED = r"""
ab                   |   | Tab                           | ab\x20\x20
if x:\n    a\n\nb\n  |   | Control+a Tab                 | \x20   if x:\n        a\n\n    b\n
\x20   a\n\n  b\n    |   | Control+a Shift+Tab           | a\n\nb\n
\x20   a\n\n  b\n    |   | Control+a Shift+Tab Control+z | \x20   a\n\n  b\n
\nabc                | 0 | Tab Shift+Tab Shift+Tab       | \nabc
if x:\n\ta           |   | Tab                           | if x:\n\ta\t
"""


async def test_tab_indents(chrome):
    async with visiting(chrome) as visit:
        for text, at, keys, expected in rows(INDENTED):
            await visit.write(text, int(at or len(text)))
            await visit.press(*keys.split(), holds=expected)
        assert await visit.focused() == "editor"


async def test_a_text_that_was_deleted_or_emptied_comes_back_and_can_be_copied(chrome):
    async with visiting(chrome, context=CLIPBOARD) as visit:
        await visit.click("example")
        await visit.see("#mark", "a + b")
        await visit.write("")
        await visit.find("#editor").press_sequentially("x = 1")
        await visit.press("Control+a", "Delete", "Control+z", holds="x = 1")
        await visit.click("new")
        await visit.see("#outcome", "Emptied. Undo brings the old text back.")
        await visit.holds("")
        await visit.click("undo", holds="x = 1")
        await visit.click("copy")
        await visit.see("#outcome", "Copied.")
        assert await visit.evaluate("navigator.clipboard.readText()") == "x = 1"


async def test_every_control_is_reached_by_tab(chrome):
    """No trap: Esc, then Tab leaves the editor, and Shift-Tab too."""
    code = ["editor", "complete", "accept", "undo", "instruction", "send", "diff", "take", "leave"]
    async with visiting(chrome, completion("y = 1")) as visit:
        await visit.instruct("x = 1\n", "use y", offers="take")
        await visit.complete("x = 1\n", "y = 1")
        await visit.find("#editor").focus()
        await visit.evaluate("state.tabLeaves = true")  # Esc would undo the completion
        reached = [await visit.focused()]
        while reached[-1] != "new" and len(reached) < 40:
            await visit.press("Tab")
            reached.append(await visit.focused())
        assert reached == [*code, *SETTINGS, "open", "save", "copy", "new"]
        await visit.press("Escape", "Escape")  # undoes, and leaves the change
        assert await visit.focused() == "editor"
        await visit.press("Escape", "Shift+Tab")
        assert await visit.focused() == ""  # nothing stands before it
        await visit.press("Tab", "Escape", "a", "Tab")  # another key than Tab takes it back
        assert await visit.focused() == "editor"


async def check_looks(visit: Visit, screen: dict[str, Any]):
    """Axe-core has no complaint, nothing is wider than the screen, and a phone's controls are large
    enough to touch.
    """
    found = await visit.evaluate("axe.run()")
    assert [
        (rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]
    ] == []
    width = screen["viewport"]["width"]
    assert await visit.evaluate("document.documentElement.scrollWidth") == width
    if screen is PHONE:
        controls = await visit.find("button, select, input:not(#key), textarea").all()
        sizes = [
            (box["width"], box["height"]) for one in controls if (box := await one.bounding_box())
        ]
        assert len(sizes) >= 10
        assert [small for small in sizes if min(small) < 44] == []


@pytest.mark.parametrize(("scheme", "screen"), [("light", WIDE), ("dark", PHONE)])
async def test_what_it_looks_like(chrome, axe, scheme, screen):
    scripts = completion("y = 1\n"), completion("x = 1", finish_reason="length"), [CHUNKED, A]
    context = screen | {"color_scheme": scheme}
    async with visiting(chrome, *scripts, client_keys=(KEY,), context=context) as visit:
        await visit.evaluate(axe)
        color = await visit.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (color == "rgb(18, 22, 27)") == (scheme == "dark")
        await expect(visit.find("#key-form")).to_be_visible()
        await check_looks(visit, screen)
        await visit.enter_key(KEY)
        await visit.is_up()
        shown = await visit.find("#editor").evaluate("box => [box.scrollWidth, box.clientWidth]")
        assert shown[0] == shown[1]  # the placeholder is not cut off
        await visit.find("#recipes summary").click()
        await check_looks(visit, screen)
        await visit.complete("x = " + "1 + " * 100, "y = 1\n")
        await check_looks(visit, screen)
        await visit.instruct("x = 1\ny = 1\n", "use y", offers="leave")
        await expect(visit.find("#plot svg")).to_be_visible()
        await check_looks(visit, screen)
        await visit.press("Escape")
        await visit.find("#editor").press("Control+Enter")
        await visit.see_part("#error", "Request id: ")
        await check_looks(visit, screen)


async def test_the_state_of_the_pi_of_its_models_and_of_its_people(chrome):
    clients = {KEY: Client("anna"), "toms-key": Client("tom", 1)}
    async with visiting(chrome, clients=clients) as visit:
        await visit.enter_key(KEY)
        await visit.see("#health", re.compile("^Ready"))
        await visit.see_part("#models tr:last-child", re.compile("Qwen 0.5B.*loaded"))
        await visit.see_part("#models tr:nth-child(2)", "not there")
        await visit.complete(CODE, "a + b")
        await visit.see_part("#plot-words", "1 request, none failed; ")
        assert await visit.find("#plot path.bar").count() == 1
        await visit.see_part(
            "#facts", "Version 1.1.0, vps 1.0.9 · running: 0 · up for 0 min · the VPS answers in "
        )
        await visit.see("#notes", "vps runs version 1.0.9, this Pi 1.1.0: update the older one.")
        figures = r"1 completion, 0 accepted, 1 token, \d+\.\d s"
        await visit.see("#clients tr:nth-child(2)", re.compile(f"^anna{figures}{figures}$"))
        assert await visit.find("#hints").is_hidden()
        visit.pi.gateway.counting.people.add("anna", Usage(shown=100, kept=61))
        words = "of 100 characters shown 61 stayed"
        await visit.see("#stayed tr:nth-child(2)", f"anna{words}{words}")
        await visit.backend.__aexit__()
        await visit.ask(CODE)
        await visit.see_part("#error", "VPS backend is unavailable (connection refused).")
        await visit.see_part("#plot-words", "2 requests, 1 failed")
        assert await visit.find("#plot path.failed").count() == 2  # a bar and its cross


async def test_the_settings_for_an_editor_have_the_address_and_the_key(chrome, caplog):
    keys = ("odd'key", KEY)
    async with visiting(chrome, client_keys=keys, context=CLIPBOARD) as visit:
        editors = visit.find("#recipe-editor")
        for key in keys:
            await visit.evaluate("sessionStorage.clear()")
            await visit.page.reload()
            await visit.enter_key(key)
            await visit.is_up()
            await visit.find("#recipes summary").click()
            await editors.select_option("Helix, language server")
            note = f"First fetch the language server: curl -O {visit.url}cerebrum_lsp.py"
            note += " Put your key in place of KEY." * (key != KEY)
            await visit.see("#recipe-note", note)
        await visit.click("recipe-copy")
        await visit.see("#recipe-copied", "Copied.")
        copied = await visit.evaluate("navigator.clipboard.readText()")
        settings = settings_for_editors(visit.url[:-1])
        assert f"{copied}\n" in [re.sub(r"\bKEY\b", KEY, text) for text in settings]
        await editors.select_option("VS Code")
        sha256 = hashlib.sha256(visit.pi.gateway.files["/cerebrum.vsix"].body).hexdigest()
        await visit.see_part("#recipe-note", f"The file's sha256 is {sha256}.")
        address = urllib.parse.quote(visit.url[:-1], safe="")
        link = f"vscode://cerebrum.cerebrum/connect?url={address}"
        assert await visit.find("#vscode").get_attribute("href") == link
        await visit.click("key-copy")
        await visit.see("#recipe-copied", "Copied.")
        assert await visit.evaluate("navigator.clipboard.readText()") == KEY
        assert KEY not in visit.page.url + str(visit.asked) + caplog.text


async def test_a_link_brings_a_key_and_a_greeting(chrome, caplog):
    """The key leaves the address at once, stays in this tab, and never replaces another one
    unasked.
    """
    in_tab = "sessionStorage.cerebrum"
    clients = {"annas-key": Client("anna"), "bens-key": Client("ben")}
    async with visiting(chrome, clients=clients, fragment="#key=annas-key") as visit:
        await visit.is_up()
        words = "The settings for your editor are below, with your key filled in."
        await visit.see("#hello", f"Hello anna. {words}")
        assert visit.page.url == visit.url
        assert await visit.evaluate(in_tab) == '"annas-key"'
        await visit.evaluate("window.confirm = (words) => { window.question = words }")
        await visit.page.goto(f"{visit.url}#key=bens-key")
        question = "Use the key of this link instead of the one that this page has?"
        await visit.page.wait_for_function("words => window.question === words", arg=question)
        assert await visit.evaluate(in_tab) == '"annas-key"'
        await visit.page.goto(f"{visit.url}#key=bens-key  shows ben's settings")
        await visit.see("#error", "The link is damaged. Please copy it again, to its end.")
        await visit.page.reload()
        await visit.page.goto(f"{visit.url}#key=bens-key")
        await visit.see("#hello", f"Hello ben. {words}")
        assert visit.complaints == [question]
        visit.complaints.clear()
        assert await visit.evaluate(in_tab) == '"bens-key"'
        assert not any("key" in path for path in visit.asked)
        assert "-key" not in caplog.text


async def test_the_state_is_asked_for_every_five_seconds(chrome):
    """Less often while the Pi does not answer. The list of models is fetched only after a
    change.
    """
    async with visiting(chrome, before=lambda visit: visit.page.clock.install()) as visit:

        def times() -> int:
            return visit.asked.count("/v1/activity")

        assert times() == 1
        await visit.page.clock.run_for(3000)  # real time passes as well
        assert times() == 1
        await visit.page.clock.run_for(2100)
        await until(lambda: times() == 2)
        assert visit.asked.count("/v1/models") == 1
        await visit.page.context.set_offline(True)
        await visit.page.clock.run_for(5100)
        await visit.see("#health", f"Cerebrum at 127.0.0.1:{visit.pi.port} does not answer.")
        await visit.page.context.set_offline(False)
        await visit.page.clock.run_for(4000)
        await visit.is_up()
        assert visit.asked.count("/v1/models") == 2
