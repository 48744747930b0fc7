"""The engine against llama-server: same weights, threads and prompts, in turn.

    python tests/bench/engine.py --llama-server PATH [--model qwen_0_5b] [--only prose,new,…]
        [--rounds 5] [--tokens 128]

vpsd uses the model's tuned file, if this user has one (`vpsd.py tune`); `encoding` names it.
llama-server uses the published file. Two more sides show what the encoding alone does: `published`
is vpsd with the published file and the settings found beside it, `llama_server_tuned` is
llama-server with the tuned file. --published leaves out the tuned file and its settings. A
text that ends by itself counts for no side. `best` is llama-server with `best_flags`: those of
WRITING_FLAGS or PROMPT_FLAGS with which it did best in a trial with other prompts.

Prints one line of JSON. Each part is a median over rounds with different prompts; `ratio` is vpsd's
figure over llama-server's with its defaults, `ratio_published` that of vpsd with the published
file, and so on; `ratio_best` is vpsd's figure over that of `best`.
Without --llama-server the parts that need it are left out. Targets are in brackets: two are for the
0.5B and the 1.5B, on a CPU with VNNI or AMX.

    prose     tokens/s of one stream of prose, the answer to a question; `plain` is vpsd without
              drafts
    two_prose tokens/s of two such streams at once, added up
    new       ms to the first token of a prompt of 1,000 tokens that was never seen [<= 0.4, <= 0.9]
    rewrite   tokens/s of writing a file of 70 lines again, the first time and the second, against
              llama-server's default [>= 2.2], with its best flags [>= 1.0], and vpsd with the
              published file [>= 1.25]
    ttft      ms to the first token of a prompt that was just answered, and of the same prompt with
              one more line [<= 1.0]
    pause     ms, the longest pause of a running stream while another prompt of 1,000 tokens is read
    draft     ms a token of five gaps of 48 tokens in this project's code, with a file that writes
              the 1.5B's text at a 7B's cost: vpsd with the 0.5B as draft model (`on`), and without
              drafts (`off`); llama-server with this draft model; then `tuned`, vpsd with the tuned
              files of both, and llama-server without a draft model. The prompts were read before.
              The variable NEW_PYTHON names a folder of other new code [on/off <= 0.63,
              on/llama_server_draft <= 0.91, tuned/llama_server <= 0.45]
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import servers
from families import copy_with
from harness import FILES, ROOT, settings
from servers import Result, Server, copying, llama_server, prose, ratio, vpsd, words

from cerebrum.vps import llama
from cerebrum.vps.encoding import cpu_name, find_tuned, tuned_path
from cerebrum.vps.gguf import Source

# llama.cpp's build 11434 accepts all of these. The first are for writing, the others for prompts.
WRITING_FLAGS = (
    "--spec-type ngram-simple",
    "--spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-ngram-simple-size-m 32",
    "--spec-type ngram-map-k",
    "--spec-type ngram-map-k --spec-ngram-map-k-size-n 4 --spec-ngram-map-k-size-m 32",
    "--spec-type ngram-map-k4v",
    "--spec-type ngram-mod",
    "--spec-type ngram-mod --spec-ngram-mod-n-match 12 --spec-ngram-mod-n-min 8",
    "--spec-type ngram-cache",
    f"-md {FILES['qwen_0_5b']} --spec-type draft-simple,ngram-mod",
)
PROMPT_FLAGS = (
    "--cache-reuse 256 --cache-ram 8192",
    "--cache-reuse 256 --cache-ram 0",
    "--cache-reuse 256 --kv-unified",
)
Sides = dict[str, Server]
Rates = dict[str, list[float]]
Measure = Callable[[Server, int], float]  # of a prompt's number


def in_turn(sides: Sides, count: int) -> Iterable[tuple[str, Server]]:
    """The sides in their order, every other time in reverse."""
    return list(sides.items())[:: 1 if count % 2 else -1]


@dataclass
class Bench:
    """The options, the running servers, and the folder for their files."""

    options: Any
    folder: Path
    stack: ExitStack

    def __post_init__(self):
        options = self.options
        self.weights = servers.weights_of(options.model)
        self.rounds, self.tokens = options.rounds, options.tokens
        self.numbers = itertools.count()
        settings = llama.Settings()
        found = None
        reason = "as asked"
        if not options.published:
            found, reason = find_tuned(self.weights, settings)
        self.encoding = found.passport.encoding if found else f"published: {reason}"
        self.tuned = tuned_path(settings.state_dir, self.weights) if found else None
        self.has_weights = found is not None and found.path == self.tuned
        self.threads = (found.settings if found else settings).threads
        self._servers = dict[str, Server]()

    def ours(self, name: str = "vpsd", published: bool = False, **more: str) -> Server:
        model = self.options.model
        server = vpsd(self.folder, name, model, self.threads, self.tuned, published, **more)
        return self._start(name, server)

    def _start(self, key: str, server: AbstractContextManager[Server]) -> Server:
        if key not in self._servers:
            self._servers[key] = self.stack.enter_context(server)
        return self._servers[key]

    def theirs(self, flags: str = "", file: Path | None = None) -> Server | None:
        if not self.options.llama_server:
            return None
        file = file or self.weights
        return self._start(f"{file} {flags}", self._llama_server(flags, file))

    def _llama_server(self, flags: str, file: Path) -> AbstractContextManager[Server]:
        binary = self.options.llama_server
        return llama_server(self.folder, binary, file, self.threads, *flags.split())

    def best_flags(self, candidates: Sequence[str], trial: Callable[[Server], float]) -> str:
        """Those with which llama-server has the highest value of a trial."""
        values = {}
        for flags in candidates:
            with self._llama_server(flags, self.weights) as server:
                values[flags] = trial(server)
        return max(values, key=lambda flags: values[flags])

    def sides(self, plain: bool = False, encodings: bool = False) -> Sides:
        """The servers to compare: vpsd; vpsd without drafts if `plain`; llama-server if its path
        was given; with `encodings` also vpsd with the published file, and llama-server with the
        tuned one.
        """
        sides = {"vpsd": self.ours()}
        if plain:
            sides["plain"] = self.ours("plain", CEREBRUM_DRAFT="0")
        if theirs := self.theirs():
            sides["llama_server"] = theirs
        if encodings and self.has_weights:
            sides["published"] = self.published()
            if same := self.theirs(file=self.tuned):
                sides["llama_server_tuned"] = same
        return sides

    def published(self) -> Server:
        return self.ours("published", published=True)

    def compare(self, measure: Measure, of_prompt: bool = False, **which: bool) -> dict[str, Any]:
        """The medians of `measure(server, number)` for all sides, in turns, after a round to warm
        up: tokens/s, or if it is `of_prompt` the milliseconds of its seconds. A number for which a
        side has 0.0, because a text ended by itself, counts for no side. `which`: see `sides`.
        """
        sides = self.sides(**which)
        found = {}
        if "llama_server" in sides:
            candidates, sign = (PROMPT_FLAGS, -1) if of_prompt else (WRITING_FLAGS, 1)
            numbers = [next(self.numbers) for _ in range(2)]

            def trial(server: Server) -> float:
                return sign * fmean(measure(server, number) for number in numbers)

            found["best_flags"] = self.best_flags(candidates, trial)
            sides["best"] = self.theirs(found["best_flags"])
        values = {name: list[float]() for name in sides}
        for count in range(-1, 4 * self.rounds):
            number = next(self.numbers)
            taken = {name: measure(server, number) for name, server in in_turn(sides, count)}
            if count >= 0 and all(taken.values()):
                for name, value in taken.items():
                    values[name].append(value)
            if min(map(len, values.values())) == self.rounds:
                break
        scale = 1000 if of_prompt else 1
        found |= {side: round(scale * median(values[side]), 2) for side in values}
        if theirs := values.pop("llama_server", None):
            ours = values.pop("vpsd")
            found["ratio"] = ratio(ours, theirs)
            found["ratio_best"] = ratio(ours, values.pop("best"))
            found |= {f"ratio_{side}": ratio(values[side], theirs) for side in values}
        return found


def rate(results: Sequence[Result], tokens: int) -> float:
    """Tokens/s of completions that run together, added up; 0.0 if one of them ended by itself."""
    # The last ones may have no text of their own.
    if any(result.tokens < tokens - 2 for result in results):
        return 0.0
    # While all of them write: a server may let one begin before it has read the other's prompt.
    begin = max(result.marks[0][0] for result in results)
    end = min(result.marks[-1][0] for result in results)
    if begin >= end:
        return 0.0
    written = 0
    for result in results:
        if counts := [count for moment, count in result.marks if begin <= moment <= end]:
            written += counts[-1] - counts[0]
    return written / (end - begin)


def streams(bench: Bench, count: int = 1) -> dict[str, Any]:
    def measure(server: Server, number: int) -> float:
        prompts = [prose(count * number + place) for place in range(count)]
        calls = [partial(server.complete, prompt, bench.tokens) for prompt in prompts]
        return rate(servers.together(*calls), bench.tokens)

    return bench.compare(measure, plain=True, encodings=True)


def rewriting(bench: Bench, server: Server, number: int, tokens: int = 1024) -> Result:
    prompt = copying(number, 70)
    return server.complete(prompt, tokens, stop="```")


def rewriting_rates(bench: Bench, sides: Sides) -> Rates:
    """Tokens/s by side and turn, `vpsd_first` and so on."""
    rates = Rates()
    for count in range(min(bench.rounds, 8)):
        for side, server in in_turn(sides, count):
            for turn in ("first", "again"):
                result = rewriting(bench, server, count)
                rates.setdefault(f"{side}_{turn}", []).append(result.rate)
    return rates


def rewrite(bench: Bench) -> dict[str, Any]:
    found = {}
    others = {"llama_server": "default"}
    sides = bench.sides()
    if bench.has_weights:
        sides["published"] = bench.published()
    if bench.options.llama_server:

        def trial(server: Server) -> float:
            return rewriting(bench, server, 8, 400).rate  # a file that is not measured later

        found["best_flags"] = bench.best_flags(WRITING_FLAGS, trial)
        sides["best"] = bench.theirs(found["best_flags"])
    rates = rewriting_rates(bench, sides)
    found |= {name: round(median(values), 1) for name, values in rates.items()}
    for name, values in rates.items():
        side, _, turn = name.rpartition("_")
        if side != "vpsd":
            found[f"ratio_{others.get(side, side)}_{turn}"] = ratio(rates[f"vpsd_{turn}"], values)
    return found


def ttft(bench: Bench) -> dict[str, Any]:
    def first_token(more: str, server: Server, number: int) -> float:
        prompt = words(number, 1000)
        server.complete(prompt, 8)
        return server.complete(prompt + more, 8).ttft

    times = {}
    for kind, more in (("repeated", ""), ("extended", " and one more line of it\n")):
        times[kind] = bench.compare(partial(first_token, more), of_prompt=True)
    return times


def new(bench: Bench) -> dict[str, Any]:
    def first_token(server: Server, number: int) -> float:
        return server.complete(words(5000 + number, 1000), 1).ttft

    return bench.compare(first_token, of_prompt=True, encodings=True)


def wait_idle(pid: int):
    """Wait until in 5 successive readings, 2 ms apart, no thread of a server did any work."""
    quiet = 0
    busy = servers.cpu_ns(pid)
    while quiet < 5:
        time.sleep(0.002)
        before, busy = busy, servers.cpu_ns(pid)
        quiet = quiet + 1 if busy - before < 500_000 else 0


def pause(bench: Bench) -> dict[str, Any]:
    def measure(server: Server, number: int) -> float:
        with server.events(words(9000 + number, 100), 2000) as events:
            marks = [next(events) and time.perf_counter() for _ in range(4)]
            prompt = words(number, 1000)
            others = []
            other = threading.Thread(target=lambda: others.append(server.complete(prompt, 1)))
            other.start()
            while not others and next(events, None):
                marks.append(time.perf_counter())
            other.join()
        return max(b - a for a, b in itertools.pairwise(marks))

    return bench.compare(measure, of_prompt=True)


LAYERS = 5  # times the 1.5B's
# Of new Python. By default it is this project, whose code is harder to foresee than most.
FOLDER = Path(os.environ.get("NEW_PYTHON", ROOT / "cerebrum"))


def write_deep(path: Path):
    """A file of 7B's cost with the text of the 1.5B: its layers, and four copies of them that add
    nothing, since two matrices of each are zero.
    """
    count = 28  # layers of the 1.5B
    source = Source(FILES["qwen_1_5b"])
    tensors = []
    for tensor in source.tensors:
        tensors.append(tensor)
        _, _, rest = tensor.name.partition("blk.")
        number, _, name = rest.partition(".")
        is_last = name.startswith(("attn_output", "ffn_down"))
        data = np.zeros_like(tensor.data) if is_last else tensor.data
        for copy in range(1, LAYERS if rest else 1):
            layer = int(number) + copy * count
            tensors.append(tensor._replace(name=f"blk.{layer}.{name}", data=data))
    source.tensors = tensors
    copy_with(source, path, qwen2__block_count=LAYERS * count)


def deep_models(folder: Path) -> Path:
    """A models.toml in the folder: `deep`, a file of a 7B's cost, and the 0.5B as its draft."""
    folder.mkdir(exist_ok=True)
    if not (folder / "deep.gguf").exists():
        write_deep(folder / "deep.gguf")
        (folder / "small.gguf").symlink_to(FILES["qwen_0_5b"])
    table = folder / "models.toml"
    table.write_text(PAIR)
    return table


def gap(number: int, lines: int = 30) -> str:
    """A gap in code that no model was trained on, as a text with Qwen's marks."""
    files = sorted(FOLDER.rglob("*.py"))
    long = [text for text in (file.read_text() for file in files) if text.count("\n") > 2 * lines]
    source = long[number % len(long)].splitlines(keepends=True)
    at = lines + 37 * number % (len(source) - 2 * lines)
    before, after = "".join(source[at - lines : at]), "".join(source[at + 8 : at + 24])
    return f"<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"


class Pairs:
    """Servers with a file of a 7B's cost, and the 0.5B beside it."""

    def __init__(self, bench: Bench):
        self.bench, self.models = bench, bench.folder / "pair"
        self.table = deep_models(self.models)
        self.file, self.small = self.models / "deep.gguf", self.models / "small.gguf"

    def sides(self, names: Sequence[str]) -> Sides:
        """The servers of these names; see `draft` at the top. Without a path of llama-server, only
        vpsd's.
        """
        found = {name: self._server(name) for name in names}
        return {name: server for name, server in found.items() if server}

    def _server(self, name: str) -> Server | None:
        if name == "llama_server":
            return self.bench.theirs(ALONE, self.file)
        if name == "llama_server_draft":
            return self.bench.theirs(f"{ALONE} -md {self.small} {WITH_DRAFT}", self.file)
        return self._ours(name)

    def _ours(self, name: str) -> Server:
        bench = self.bench
        given = {
            "MODELS_DIR": f"{self.models}",
            "MODELS_FILE": f"{self.table}",
            "THREADS": f"{bench.threads}",
            "N_CTX": "2048",
            "MAX_CONCURRENT": "1",
            "DRAFT": "0" if name == "off" else "1",
        }
        more = {f"CEREBRUM_{key}": value for key, value in given.items()}
        if name == "tuned":
            environment = settings(bench.folder / name, servers.inherited(), **more)
            for model in ("deep", "small"):
                command = [sys.executable, f"{ROOT}/vpsd.py", "tune", model]
                subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        return bench._start(name, vpsd(bench.folder, name, "deep", bench.threads, **more))


PAIR = """
[[models]]
id = "deep"
name = "deep"
parameters = "7B"
quantization = "Q4"
languages = ["all"]
file = "deep.gguf"
fim_layout = "spmv2"
draft = "small"

[[models]]
id = "small"
name = "small"
parameters = "0.5B"
quantization = "Q4"
languages = ["all"]
file = "small.gguf"
"""
ALONE = "-c 2048 -np 1"
WITH_DRAFT = "--spec-type draft-simple --spec-draft-n-max 8 --spec-draft-p-min 0.6"


def draft(bench: Bench) -> dict[str, Any]:
    found = {}
    groups = [("on", "off", "llama_server_draft")]
    if not bench.options.published:
        groups.append(("tuned", "llama_server"))
    for names in groups:  # five servers with such files do not fit into memory
        with ExitStack() as stack:
            sides = Pairs(Bench(bench.options, bench.folder, stack)).sides(names)
            found |= ms_a_token(bench, sides)
            url = f"http://127.0.0.1:{sides[names[0]].port}/v1/stats"
            found[f"stats_{names[0]}"] = servers.ask(url)["draft_models"]
    return found


def ms_a_token(bench: Bench, sides: Sides) -> dict[str, Any]:
    """Of gaps whose prompts were read before; and the ratio to each side of the first."""
    times = {name: list[float]() for name in sides}

    def measure(server: Server, number: int) -> float:
        """0.0 for a text that ends early."""
        prompt = gap(number)
        server.complete(prompt, 1, **special(server))
        wait_idle(server.pid)
        result = server.complete(prompt, 48, **special(server))
        return 1000 / result.rate if result.tokens >= 24 else 0.0

    for number in itertools.count():
        found = {name: measure(server, number) for name, server in in_turn(sides, number)}
        print(number, found, file=sys.stderr, flush=True)
        if all(found.values()):
            for name, value in found.items():
                times[name].append(value)
        if len(next(iter(times.values()))) == bench.rounds:
            break
    means = {name: round(fmean(values), 1) for name, values in times.items()}
    first, *others = means
    return means | {f"{first}/{name}": round(means[first] / means[name], 3) for name in others}


def special(server: Server) -> dict[str, Any]:
    """The fields that make marks of a prompt's text marks."""
    return {"special": True, "mode": "infill"} if server.model else {}


WHOLE_PARTS = (rewrite, new, ttft, pause, draft)
PARTS = {
    "prose": streams,
    "two_prose": partial(streams, count=2),
    **{part.__name__: part for part in WHOLE_PARTS},
}
OPTIONS = {
    "llama_server": "",
    "model": "qwen_0_5b",
    "only": ",".join(PARTS),
    "rounds": 5,
    "published": False,
    "tokens": 128,
}


def main():
    options = servers.parser_of(__doc__, **OPTIONS).parse_args()
    found = {"benchmark": "engine", "model": options.model, "cpu": cpu_name()}
    if not options.llama_server:
        found["llama_server"] = "skipped: --llama-server was not given"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        found |= {"threads": bench.threads, "encoding": bench.encoding}
        for name in options.only.split(","):
            found[name] = PARTS[name](bench)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
