"""The engine against llama-server: same weights, threads and prompts, in turn.

    python tests/bench/engine.py --llama-server PATH [--model qwen_0_5b] [--only one,two,…]
        [--quick]

vpsd uses the model's tuned file, if this user has one (`vpsd.py tune`); `encoding` names it.
llama-server uses the published file. What comes from the encoding alone is seen by `published`,
vpsd with the published file and the settings found beside it, and by `llama_server_tuned`,
llama-server with the tuned one. --published leaves out the tuned file and its settings. With --spin
llama-server's threads spin as briefly as vpsd's. --quick has few and short rounds, to see whether
everything works. A text that ends by itself counts for nobody.

Prints one line of JSON. Each part is a median over rounds with different prompts; `ratio` is vpsd's
figure over llama-server's, `ratio_published` that of vpsd with the published file, and so on.
Without --llama-server the parts that need it are left out. The last column is the target, for the
0.5B and the 1.5B on a CPU with VNNI or AMX.

    one       tokens/s of one stream that goes on with code; `plain` is vpsd without drafts    >=
              1.4, >= 1.3
    prose     the same with prose, the answer to a question
    long      the same after a prompt of 1,500 tokens
    two       tokens/s of two streams of code at once, added up                 >= 1.6, >= 1.3
    two_prose    the same with prose
    new       ms to the first token of a prompt of 1,000 tokens that was never seen    <= 0.4, <=
              0.9
    rewrite   tokens/s of writing a file of 70 lines again, the first time and the second, against
              llama-server's default (>= 2.2), the fastest of its n-gram modes (>= 1.0), and vpsd
              with the published file (>= 1.25)
    ttft      ms to the first token of a prompt that was just answered, and of the same with one
              line more   <= 1.0
    cancel    ms until the cores are idle, after a client left while its prompt of 2,000 tokens was
              read     <= 100
    pause     ms, the longest pause of a running stream while another prompt of 1,000 tokens is read
    restart   ms to the first token of a prompt of 2,000 tokens: computed, and restored after a
              restart      >= 50 x
    loss      tokens/s of text that hardly repeats, with drafts over without    >= 0.98
    ties      the number of greedy texts that differ with and without drafts. `gaps` has, where a
              text leaves the path of a plain greedy loop, the lead in logits of the loop's token:
              small leads are near-ties
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import servers
from families import Reference
from servers import (
    Question,
    Result,
    Server,
    code,
    copying,
    llama_server,
    prose,
    ratio,
    together,
    vpsd,
    words,
)

from cerebrum.vps import llama
from cerebrum.vps.encoding import cpu_name, find_tuned, tuned_path

NGRAM_MODES = (
    ("--spec-type", "ngram-simple"),
    (
        "--spec-type",
        "ngram-simple",
        "--spec-ngram-simple-size-n",
        "4",
        "--spec-ngram-simple-size-m",
        "32",
    ),
    ("--spec-type", "ngram-map-k"),
    (
        "--spec-type",
        "ngram-map-k",
        "--spec-ngram-map-k-size-n",
        "4",
        "--spec-ngram-map-k-size-m",
        "32",
    ),
    ("--spec-type", "ngram-map-k4v"),
    ("--spec-type", "ngram-mod"),
    ("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "12", "--spec-ngram-mod-n-min", "8"),
    ("--spec-type", "ngram-cache"),
)


class Bench:
    """The options, the running servers, and the folder for their files."""

    def __init__(self, options: Any, folder: Path, stack: ExitStack) -> None:
        self.options, self.folder, self.stack = options, folder, stack
        self.weights = servers.weights_of(options.model)
        # `share` divides the lengths of prompts.
        self.rounds, self.tokens, self.share = (
            (2, 24, 8) if options.quick else (options.rounds, 128, 1)
        )
        self.numbers = iter(range(10_000))
        settings = llama.Settings()
        if options.threads:
            settings = replace(settings, threads=options.threads, fixed_threads=True)
        found, reason = (
            find_tuned(self.weights, settings) if not options.published else (None, "as asked")
        )
        options.threads = found.settings.threads if found else settings.threads
        self.encoding = found.encoding if found else f"published: {reason}"
        self.tuned = tuned_path(settings.state_dir, self.weights) if found else None
        self.has_weights = found is not None and found.path == self.tuned
        self._servers: dict[tuple[str, ...], Server] = {}

    def ours(self, name: str = "vpsd", published: bool = False, **more: str) -> Server:
        model, threads = self.options.model, self.options.threads
        return self._start(
            ("vpsd", name), vpsd(self.folder, name, model, threads, self.tuned, published, **more)
        )

    def _start(self, key: tuple[str, ...], server: AbstractContextManager[Server]) -> Server:
        if key not in self._servers:
            self._servers[key] = self.stack.enter_context(server)
        return self._servers[key]

    def theirs(self, *options: str, file: Path | None = None) -> Server | None:
        binary, threads = self.options.llama_server, self.options.threads
        if not binary:
            return None
        file, more = (
            file or self.weights,
            {servers.SPIN: os.environ[servers.SPIN]} if self.options.spin else {},
        )
        return self._start(
            (str(file), *options),
            llama_server(self.folder, binary, file, threads, *options, **more),
        )

    def sides(self, plain: bool = False, encodings: bool = False) -> dict[str, Server]:
        """The servers to compare: vpsd; vpsd without drafts if `plain`; llama-server if its path
        was given; with `encodings` also vpsd with the published file, and llama-server with the
        tuned one.
        """
        theirs, sides = self.theirs(), {"vpsd": self.ours()}
        sides |= {"plain": self.plain()} if plain else {}
        sides |= {"llama_server": theirs} if theirs else {}
        if encodings and self.has_weights:
            sides["published"] = self.published()
            if same := self.theirs(file=self.tuned):
                sides["llama_server_tuned"] = same
        return sides

    def plain(self) -> Server:
        return self.ours("plain", CEREBRUM_DRAFT="0")

    def published(self) -> Server:
        return self.ours("published", published=True)

    def rounds_of(
        self, sides: dict[str, Server], measure: Callable[[Server, int], float], rounds: int
    ) -> dict[str, list[float]]:
        """The values of `measure(server, number)` by side, in turns, every other time in reverse,
        after a round to warm up. A number for which a side has 0.0, because a text ended by itself,
        counts for no side.
        """
        values: dict[str, list[float]] = {name: [] for name in sides}
        for count in range(-1, 4 * rounds):
            number = next(self.numbers)
            found = {
                name: measure(sides[name], number)
                for name in list(sides)[:: 1 if count % 2 else -1]
            }
            if count >= 0 and all(found.values()):
                for name, value in found.items():
                    values[name].append(value)
            if len(next(iter(values.values()))) == rounds:
                break
        return values

    def compare(
        self,
        measure: Callable[[Server, int], float],
        scale: float = 1.0,
        plain: bool = False,
        encodings: bool = False,
    ) -> dict[str, Any]:
        """The medians of `measure(server, number) * scale` for all sides."""
        sides = self.sides(plain, encodings)
        values = self.rounds_of(sides, measure, self.rounds)
        found: dict[str, Any] = {
            name: round(scale * median(list_), 2) for name, list_ in values.items()
        }
        for name in set(values) - {"llama_server"} if "llama_server" in values else ():
            found["ratio" if name == "vpsd" else f"ratio_{name}"] = ratio(
                values[name], values["llama_server"]
            )
        return found


def rate(results: Sequence[Result], tokens: int) -> float:
    """Tokens/s of completions that run together, added up; 0.0 if one of them ended by itself."""
    if any(
        result.tokens < tokens - 2 for result in results
    ):  # the last ones may have no text of their own
        return 0.0
    # While all of them write: a server may let one begin before it has read the other's prompt.
    begin, end = (
        max(result.marks[0][0] for result in results),
        min(result.marks[-1][0] for result in results),
    )
    counts = [
        [count for moment, count in result.marks if begin <= moment <= end] for result in results
    ]
    return (
        sum(count[-1] - count[0] for count in counts if count) / (end - begin)
        if begin < end
        else 0.0
    )


def streams(bench: Bench, ask: Callable[[int], str], count: int = 1) -> dict[str, Any]:
    drafted = 0

    def measure(server: Server, number: int) -> float:
        nonlocal drafted
        prompts = [ask(count * number + place) for place in range(count)]
        results = together(*(partial(server.complete, prompt, bench.tokens) for prompt in prompts))
        drafted += sum(result.done.get("draft_tokens", 0) for result in results)
        return rate(results, bench.tokens)

    return bench.compare(measure, plain=True, encodings=True) | {"draft_tokens": drafted}


def long(bench: Bench) -> dict[str, Any]:
    return streams(
        bench, lambda number: Question(f"{words(number, 1500 // bench.share)}\n{prose(number)}")
    )


def rewriting(bench: Bench, server: Server, number: int, tokens: int = 1024) -> Result:
    return server.complete(copying(number, 70 // bench.share), tokens // bench.share, stop="```")


def rate_of_mode(bench: Bench, mode: tuple[str, ...]) -> float:
    """Of writing a file again that is not among those that are measured later."""
    binary, threads = bench.options.llama_server, bench.options.threads
    with llama_server(bench.folder, binary, bench.weights, threads, *mode) as candidate:
        return rewriting(bench, candidate, 8, 400).rate


def rewrite(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sides = bench.sides() | ({"published": bench.published()} if bench.has_weights else {})
    if bench.options.llama_server:
        modes = {mode: rate_of_mode(bench, mode) for mode in NGRAM_MODES}
        found["ngram_modes"] = {
            " ".join(mode[1::2]): round(rate, 1) for mode, rate in modes.items()
        }
        best = max(modes, key=lambda mode: modes[mode])
        found["best_mode"], sides["ngram"] = " ".join(best), bench.theirs(*best)
    rates: dict[str, list[float]] = {}
    accepted = drafted = 0
    for count in range(min(bench.rounds, 8)):
        for name in list(sides)[:: 1 if count % 2 else -1]:
            for turn in ("first", "again"):
                result = rewriting(bench, sides[name], count)
                rates.setdefault(f"{name}_{turn}", []).append(result.rate)
                if name == "vpsd":
                    drafted += result.done["draft_tokens"]
                    accepted += result.done["accepted_tokens"]
    found |= {name: round(median(list_), 1) for name, list_ in rates.items()}
    for turn in ("first", "again"):
        for side, word in (
            ("llama_server", "default"),
            ("ngram", "ngram"),
            ("published", "published"),
        ):
            if f"{side}_{turn}" in rates:
                found[f"ratio_{word}_{turn}"] = ratio(
                    rates[f"vpsd_{turn}"], rates[f"{side}_{turn}"]
                )
    return found | {"draft_tokens": drafted, "accepted_tokens": accepted}


def ttft(bench: Bench) -> dict[str, Any]:
    known: dict[str, int] = {}

    def first_token(kind: str, more: str, server: Server, number: int) -> float:
        prompt = words(number, 1000 // bench.share)
        server.complete(prompt, 8)
        result = server.complete(prompt + more, 8)
        if server.model:
            known[kind] = result.done["prompt_tokens"] - result.done["cached_tokens"]
        return result.ttft

    kinds = {"repeated": "", "extended": " and one more line of it\n"}
    times = {
        kind: bench.compare(partial(first_token, kind, more), 1000) for kind, more in kinds.items()
    }
    return times | {"computed": known}


def new(bench: Bench) -> dict[str, Any]:
    def first_token(server: Server, number: int) -> float:
        return server.complete(words(5000 + number, 1000 // bench.share), 1).ttft

    return bench.compare(first_token, 1000, encodings=True)


def cancel(bench: Bench) -> dict[str, Any]:
    """The server is idle from the first of 5 successive readings, 2 ms apart, in which no thread
    did any work.
    """
    server, times = bench.ours(), []
    for _ in range(bench.rounds):
        prompt = words(next(bench.numbers), 2000 // bench.share)
        with server.events(prompt, 8, progress=True) as events:
            next(event for event in events if event.get("progress", {}).get("stage") == "prefill")
            time.sleep(0.1)  # into the first chunk
            begin = time.perf_counter()
        quiet, idle, busy = 0, begin, servers.cpu_ns(server.pid)
        while quiet < 5:
            time.sleep(0.002)
            before, busy = busy, servers.cpu_ns(server.pid)
            quiet = quiet + 1 if busy - before < 500_000 else 0
            idle = idle if quiet else time.perf_counter()
        times.append(1000 * (idle - begin))
    return {"ms": round(median(times), 1), "worst_ms": round(max(times), 1)}


def pause(bench: Bench) -> dict[str, Any]:
    def measure(server: Server, number: int) -> float:
        with server.events(words(9000 + number, 100), 2000) as events:
            marks = [next(events) and time.perf_counter() for _ in range(4)]
            prompt, others = words(number, 1000 // bench.share), list[Result]()
            other = threading.Thread(target=lambda: others.append(server.complete(prompt, 1)))
            other.start()
            while not others and next(events, None):
                marks.append(time.perf_counter())
            other.join()
        return max(b - a for a, b in itertools.pairwise(marks))

    return bench.compare(measure, 1000)


def restart(bench: Bench) -> dict[str, Any]:
    prompts = [
        words(next(bench.numbers), 2000 // bench.share)
        for _ in range(1 if bench.options.quick else 5)
    ]
    runs = list[list[Result]]()
    for _ in range(2):
        with vpsd(
            bench.folder, "restart", bench.options.model, bench.options.threads, bench.tuned
        ) as server:
            runs.append([server.complete(prompt, 4) for prompt in prompts])
    computed, known = ([result.ttft for result in results] for results in runs)
    return {
        "computed_ms": round(1000 * median(computed), 1),
        "known_ms": round(1000 * median(known), 1),
        "ratio": round(ratio(computed, known), 1),
        "prompt_tokens": runs[1][0].done["prompt_tokens"],
        "cached_tokens": [result.done["cached_tokens"] for result in runs[1]],
    }


def loss(bench: Bench) -> dict[str, Any]:
    sides, drafted, accepted = {"drafts": bench.ours(), "plain": bench.plain()}, 0, 0

    def measure(server: Server, number: int) -> float:
        nonlocal drafted, accepted
        result = server.complete(prose(number), bench.tokens)
        drafted += result.done["draft_tokens"]
        accepted += result.done["accepted_tokens"]
        return result.rate

    rates = bench.rounds_of(sides, measure, 2 * bench.rounds)
    return {
        "ratio": ratio(rates["drafts"], rates["plain"]),
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
    }


def ties(bench: Bench) -> dict[str, Any]:
    drafting, plain, differ, drafted = bench.ours(), bench.plain(), 0, 0
    loop, gaps = Reference(bench.weights), {"drafts": list[float](), "plain": list[float]()}
    numbers = range(4 if bench.options.quick else 16)
    for prompt in (
        *(prose(500 + number) for number in numbers),
        *(copying(number, 20) for number in numbers),
    ):
        results = {
            "drafts": drafting.complete(prompt, bench.tokens),
            "plain": plain.complete(prompt, bench.tokens),
        }
        drafted += results["drafts"].done["draft_tokens"]
        differ += results["drafts"].text != results["plain"].text
        chat = isinstance(prompt, Question)
        pieces, leads = loop.greedy(
            loop.tokenize(prompt.chat_ml() if chat else prompt, chat), bench.tokens
        )
        for name, result in results.items():
            path = zip(
                itertools.accumulate(pieces), leads[: result.done["total_tokens"]], strict=False
            )
            gaps[name] += [
                round(lead, 3) for text, lead in path if not result.text.encode().startswith(text)
            ][:1]
    return {"texts": 2 * len(numbers), "differ": differ, "gaps": gaps, "draft_tokens": drafted}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "one": partial(streams, ask=code),
    "prose": partial(streams, ask=prose),
    "two": partial(streams, ask=code, count=2),
    "two_prose": partial(streams, ask=prose, count=2),
    **{
        part.__name__: part
        for part in (long, rewrite, new, ttft, cancel, pause, restart, loss, ties)
    },
}


def main() -> None:
    what, how = (
        {"llama_server": "", "model": "qwen_0_5b", "only": ",".join(PARTS)},
        {"rounds": 5, "threads": 0},
    )
    options = servers.parser_of(
        __doc__, **what, **how, published=False, spin=False, quick=False
    ).parse_args()
    found: dict[str, Any] = {"benchmark": "engine", "model": options.model, "cpu": cpu_name()}
    found |= (
        {} if options.llama_server else {"llama_server": "skipped: --llama-server was not given"}
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        found |= {"threads": options.threads, "encoding": bench.encoding}
        for name in options.only.split(","):
            found[name] = PARTS[name](bench)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
