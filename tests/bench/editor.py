"""Someone types in an editor: what llama.vim asks for, through both daemons, with real weights.

    python tests/bench/editor.py [--seconds 60] [--keys 6] [--model qwen_0_5b] [--suggest often]
    python tests/bench/editor.py --pairs 9 [--model qwen_0_5b]
    python tests/bench/editor.py --jump REPOSITORY,… [--look 2] [--before FOLDER] [--llama]
        [--models FOLDER] [--places 20]

REPOSITORY is a folder of that name with a git repository `repo`; its files of about 300 lines that
were added in or after 2025 are used, which are newer than the models. Prints one line of JSON:

    typing        Two methods of the standard library are typed, --keys characters a second, with
                  pauses as people make them. Each key asks for an infill and abandons the
                  request before it. (llama.vim waits for its running request.) `seen`: answers with
                  text that came before the next key, and their models (`by`); `type_through`: those
                  that asked no VPS; `slowest`: seconds of nine of ten of the others at most;
                  `errors`: answers other than 200; `read`: tokens of prompts that the VPS reads a
                  second; `idle`: the same, while it reads another file and nobody types
    other         with --pairs: the time to the first token of another client's infill, with a
                  speculative request under way over without one, median; `other_reading`: with a
                  reading
    jump          in each of --places files the cursor jumps four times, by 20 to 200 lines, looks
                  for --look seconds, and one key is typed. --look 0: until nothing is read any more
                  Our own editors have the place of the cursor read (`now`). File by file in turns,
                  with --before another tree's daemons (`before`), and with --llama llama-server,
                  asked as by llama.vim (`llama`). With --model deep the models are a file of a 7B's
                  cost with the text of the 1.5B, which is made in the folder --models, and the 0.5B
                  as its draft model. Of each: medians of the seconds to the first text and to the
                  whole hint, what 90 % of the first texts take (`most`), how many are `right`, the
                  characters that are shown within 5 s, right and wrong (`shown`), and hints by
                  model (`by`); `over`: medians of the ratios of `now` to the other, with 95 %
                  intervals by drawing files anew
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import servers
from engine import deep_models
from engines import llama_server_binary
from gaps import new_code
from harness import KEY, MODELS, Client, Daemon, Reply, wait_until

LINES_BEFORE, LINES_AFTER = 64, 32
PAUSES = 8  # characters typed on average between two pauses
PAUSE_SECONDS = 1.5
IDLE_SECONDS = 20.0
READ_METRIC = "llamacpp:prompt_tokens_total"
FILE = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
OPTIONS = {
    "seconds": 60.0,
    "keys": 6.0,
    "model": "qwen_0_5b",
    "suggest": "often",
    "places": 20,
    "pairs": 0,
    "jump": "",
    "look": 2.0,
    "before": "",
    "llama": False,
    "models": f"{MODELS}",
}
# What each request of llama.vim has.
LLAMA_VIM = json.loads("""{
    "n_predict": 64, "t_max_predict_ms": 1000, "cache_prompt": true, "temperature": 0}""")


class Infill(NamedTuple):
    """An answer to llama.vim, which came so many seconds after the request."""

    reply: Reply
    seconds: float

    @property
    def text(self) -> str:
        return str(self.reply.json.get("content", ""))


async def infill(port: int, model: str, before: str, after: str, **more: Any) -> Infill:
    """One request as llama.vim makes it. To cancel it abandons it."""
    above = before.splitlines(keepends=True)
    body = {"model": model, "input_suffix": after, **LLAMA_VIM, **more}
    body |= {"prompt": above.pop(), "input_prefix": "".join(above)}
    began = time.perf_counter()
    reply = await Client(port=port).post("/infill", body, User_Agent="llama.vim")
    return Infill(reply, time.perf_counter() - began)


async def tokens_read(vps: Daemon) -> int:
    """Tokens of prompts that were computed since the VPS's start."""
    reply = await Client(port=vps.port).get("/metrics", X_API_Key=KEY)
    rows = reply.body.decode().splitlines()
    return sum(int(row.split()[-1]) for row in rows if row.startswith(f"{READ_METRIC}{{"))


async def typing(vps: Daemon, pi: Daemon, options: argparse.Namespace) -> dict[str, Any]:
    source = FILE.read_text()
    position = source.index("\n    def _split(")
    below = source[source.index("\n    def _wrap_chunks(") :].splitlines(keepends=True)
    after = "".join(below[:LINES_AFTER])
    generator = random.Random(1)
    asked = []
    more = LLAMAS | {"suggest": options.suggest}
    before = await tokens_read(vps)
    began = time.monotonic()
    end = began + options.seconds
    while time.monotonic() < end and position < len(source) - 100:
        position += 1
        above = "".join(source[:position].splitlines(keepends=True)[-LINES_BEFORE:])
        request = infill(pi.port, options.model, above, after, **more)
        last = asyncio.create_task(request)
        asked.append(last)
        if generator.random() < 1 / PAUSES:
            await last
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            await asyncio.sleep(generator.uniform(0.5, 1.5) / options.keys)
        last.cancel()
    read = (await tokens_read(vps) - before) / (time.monotonic() - began)
    await asyncio.wait(asked)
    answers = [request.result() for request in asked if not request.cancelled()]
    seen = [answer for answer in answers if answer.text.strip()]
    through = [answer for answer in seen if "type_through" in answer.reply.json]
    seconds = [answer.seconds for answer in answers if answer not in through]
    if len(seconds) < 2:
        sys.exit(f"expected two hints within {options.seconds} --seconds, got {len(seconds)}")
    other = source[:position][::-1]  # nothing of it is in the cache
    await infill(pi.port, options.model, other, "", n_predict=0)
    await asyncio.sleep(IDLE_SECONDS / 2)
    before = await tokens_read(vps)
    await asyncio.sleep(IDLE_SECONDS)
    idle = (await tokens_read(vps) - before) / IDLE_SECONDS
    return {
        "keys": len(asked),
        "seen": len(seen),
        "by": Counter(answer.reply.json["model"] for answer in seen),
        "type_through": len(through),
        "slowest": round(statistics.quantiles(seconds, n=10)[-1], 2),
        "read": round(read, 1),
        "idle": round(idle, 1),
        "errors": sum(answer.reply.status != 200 for answer in answers),
    }


async def other(port: int, model: str, pairs: int, **spare: Any) -> float:
    """What a request for which nobody waits costs another client while it is under way."""
    lines = FILE.read_text().splitlines(keepends=True)
    ratios = []
    more = {"n_predict": 1, "t_max_prompt_ms": 0, "filename": "other.py"}
    for pair in range(pairs):
        seconds = {}
        for is_ahead in (pair % 2 == 0, pair % 2 == 1):
            text = f"# {pair} {is_ahead}\n" + "".join(lines[160:200])
            behind = "".join(lines[: 100 + pair])
            async with asyncio.TaskGroup() as group:
                if is_ahead:
                    group.create_task(infill(port, model, behind, "", **spare))
                    await asyncio.sleep(0.3 + 0.1 * pair)  # it reads, or it writes
                asked = await infill(port, model, text, "".join(lines[200:220]), **more)
            seconds[is_ahead] = asked.seconds
            await asyncio.sleep(0.5)
        ratios.append(seconds[True] / seconds[False])
    return round(statistics.median(ratios), 3)


# ------------------------------------------------------------------------------- the first hint

LINES = range(200, 500)  # of a file
JUMP = range(20, 200)  # lines
JUMPS = 4  # in a file
REST_SECONDS = 0.3  # the cursor rests
MIN_REST = 20  # characters of a line behind a cut
DRAWS = 1000
SHOWN_SECONDS = 5.0  # a hint that comes later is of no use
# What our own editors ask for, and llama.vim.
OURS = json.loads('{"n_predict": 128, "t_max_prompt_ms": 500, "t_max_predict_ms": 1500}')
LLAMAS = json.loads('{"n_predict": 128, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000}')
Place = tuple[str, str, str, str]  # the file's name, and the text before, of and below the line
NOWHERE = ("a.py", "x", "", "")


def texts(repositories: str) -> Iterator[tuple[str, list[str]]]:
    """The names and the lines of files, of each repository in turn."""

    def of(repository: str) -> Iterator[tuple[str, list[str]]]:
        for path, _, lines in new_code(repository):
            if len(lines) in LINES:
                yield path, lines

    turns = itertools.zip_longest(*map(of, repositories.split(",")))
    return filter(None, itertools.chain.from_iterable(turns))


def places(path: str, lines: list[str]) -> Iterator[Place]:
    """Places in a file, each JUMP lines from the one before. Their lines are cut at a word."""
    chance = random.Random(path)
    last = 0
    for number in chance.choices(range(len(lines)), k=200):
        line = lines[number].rstrip()
        cuts = [at.end() for at in re.finditer(r"(?<!\w)(?=\w)", line)]
        cuts = [at for at in cuts if len(line[at:]) >= MIN_REST]
        if abs(number - last) in JUMP and cuts:
            last, cut = number, chance.choice(cuts)
            before = "".join(lines[:number]) + line[:cut]
            yield Path(path).name, before, line[cut:], "\n" + "".join(lines[number + 1 :])


@dataclass
class Arm:
    """A house, or llama-server, and the editor that asks it."""

    port: int
    model: str
    more: dict[str, Any]
    reads: bool = False  # its editor has the place of the cursor read
    vps: Daemon | None = None

    def ask(self, place: Place, typed: int, **more: Any) -> tuple[float, float, str, str]:
        """The seconds to the first text of a hint and to its end, the hint, and who wrote it."""
        name, before, line, below = place
        above = (before + line[:typed]).splitlines(keepends=True) or [""]
        if self.more is LLAMAS:
            above, below = above[-256:], "".join(below.splitlines(keepends=True)[:64])
        body = {**LLAMA_VIM, **self.more, "model": self.model, "filename": name, "stream": True}
        body |= {"prompt": above.pop(), "input_prefix": "".join(above), "input_suffix": below}
        body |= more
        text = writer = ""
        first = 0.0
        began = time.perf_counter()
        url = f"http://127.0.0.1:{self.port}/infill"
        with servers.events_of(url, **body) as events:
            for event in events:
                text += event.get("content", "")
                writer = event.get("model", writer)
                first = first or (time.perf_counter() - began if text else 0.0)
        seconds = time.perf_counter() - began
        return first or seconds, seconds, text, writer

    def rest(self, place: Place):
        """The cursor rests."""
        time.sleep(REST_SECONDS)
        if self.reads:
            self.ask(place, 0, n_predict=0, stream=False)

    def wait(self):
        """Wait until nothing is read any more."""
        if self.vps:
            url = f"http://127.0.0.1:{self.vps.port}/v1/stats"
            is_quiet = False
            while not is_quiet:  # the Pi may be about to ask again
                wait_until(lambda: not servers.ask(url)["requests_active"], seconds=600)
                time.sleep(0.5)
                is_quiet = not servers.ask(url)["requests_active"]


class First(NamedTuple):
    """A first hint at a place: seconds to its first text and to its end, whether it is right, how
    many of its characters are, how many are wrong, and who wrote it.
    """

    first: float
    hint: float
    right: bool
    good: int
    bad: int
    writer: str


def first_hint(arm: Arm, place: Place, look: float) -> First:
    """Someone looks at a place, for as long as the house reads if `look` is 0, and types a key."""
    arm.rest(place)
    if look:
        time.sleep(look - REST_SECONDS)
    else:
        arm.wait()
    first, hint, text, writer = arm.ask(place, 1)
    _, _, line, below = place
    is_right = text.partition("\n")[0].rstrip() == line[1:] != ""
    good = len(commonprefix([text, line[1:] + below]))  # noqa: RUF071
    return First(first, hint, is_right, good, len(text) - good, writer)


def first_hints(arms: dict[str, Arm], options: argparse.Namespace) -> dict[str, Any]:
    files: dict[str, list[list[First]]] = {name: [] for name in arms}
    found = texts(options.jump)
    for number, (path, lines) in enumerate(itertools.islice(found, options.places)):
        some = [*itertools.islice(places(path, lines), JUMPS)]
        names = deque(arms)
        names.rotate(number)
        for name in names:
            arm = arms[name]
            files[name].append([first_hint(arm, place, options.look) for place in some])
            # What it still reads would disturb the others; another place ends that.
            arm.rest(NOWHERE)
            arm.wait()
    result = {name: medians(of) for name, of in files.items()}
    for name in files.keys() - {"now"}:
        both = files["now"], files[name]
        result[name]["over"] = {figure: over(*both, figure) for figure in ("first", "hint")}
    return result


def medians(files: list[list[First]]) -> dict[str, Any]:
    hints = list(itertools.chain.from_iterable(files))
    result = {}
    for name in ("first", "hint"):
        result[name] = round(statistics.median(getattr(one, name) for one in hints), 2)
    result["most"] = round(statistics.quantiles([one.first for one in hints], n=10)[-1], 2)
    soon = [one for one in hints if one.hint <= SHOWN_SECONDS]
    result["shown"] = [sum(one.good for one in soon), sum(one.bad for one in soon)]
    result["by"] = Counter(one.writer for one in hints)
    return result | {"right": sum(one.right for one in hints), "of": len(hints)}


def over(now: list[list[First]], other: list[list[First]], name: str) -> list[float]:
    """The median of the ratios of `now` to another arm, and its 95 % interval."""
    files = [
        [getattr(one, name) / getattr(another, name) for one, another in zip(*pair, strict=True)]
        for pair in zip(now, other, strict=True)
    ]
    chance, drawn = random.Random(1), list[float]()
    for _ in range(DRAWS):
        drawn.append(median_of(chance.choices(files, k=len(files))))
    drawn.sort()
    values = median_of(files), drawn[DRAWS // 40], drawn[-DRAWS // 40]
    return [round(value, 2) for value in values]


def median_of(files: Iterable[list[float]]) -> float:
    return statistics.median(itertools.chain.from_iterable(files))


def arms_of(stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Arm]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    arms = {}
    ours = OURS | {"suggest": options.suggest}
    trees = {"now": Path(__file__).resolve().parents[2], "before": Path(options.before)}
    for name, tree in trees.items():
        if name == "now" or options.before:
            vps, pi = servers.both(stack, folder / name, Path(options.models), tree)
            arms[name] = Arm(pi.port, options.model, ours, True, vps)
    if options.llama:
        (file,) = Path(options.models).glob(servers.weights_of(options.model).name)
        more = "--cache-reuse", "256"
        binary = f"{llama_server_binary()}"
        started = servers.llama_server(folder, binary, file, 2, *more)
        arms["llama"] = Arm(stack.enter_context(started).port, "", LLAMAS)
    for arm in arms.values():  # loads the model
        arm.ask(NOWHERE, 0)
    return arms


def main():
    options = servers.parser_of(__doc__, **OPTIONS).parse_args()
    if options.model == "deep":
        os.environ["CEREBRUM_MODELS_FILE"] = f"{deep_models(Path(options.models))}"
    else:
        servers.weights_of(options.model)
    named = {"benchmark": "editor", "model": options.model}
    with contextlib.ExitStack() as stack:
        if options.jump:
            arms = arms_of(stack, options)
            named |= {"look": options.look}
            print(json.dumps(named | first_hints(arms, options)))
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vps, pi = servers.both(stack, folder, Path(options.models))
        asyncio.run(infill(pi.port, options.model, "x", ""))  # loads the model
        if options.pairs:
            pairs = pi.port, options.model, options.pairs
            named["other"] = asyncio.run(other(*pairs, speculative=True))
            named["other_reading"] = asyncio.run(other(*pairs, n_predict=0))
        else:
            named["typing"] = asyncio.run(typing(vps, pi, options))
    print(json.dumps(named))


if __name__ == "__main__":
    main()
