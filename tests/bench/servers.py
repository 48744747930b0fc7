"""What benchmarks share: their options, the daemons and llama-server as processes, a client for
each, and prompts.

It sets the path to the harness of the tests, so a benchmark imports it before that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import Engine, free_port, started
from harness import FILES, KEY, MODELS, ROOT, Daemon, daemon, link_tuned, program, settings

# importing the engine sets it in this process, but a server must choose its own
SPIN = "GOMP_SPINCOUNT"
HEADERS = {"Content-Type": "application/json", "X-API-Key": KEY}
EASY = {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MIN_FREE_MB": "0"}


def parser_of(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with an option for each of the defaults, of its type. The benchmark's docstring
    explains them.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(value), default=value)
    return parser


def weights_of(model: str) -> Path:
    """The published file of a model. Where it is missing, the benchmark ends."""
    if not FILES[model].exists():
        print(f"{Path(sys.argv[0]).stem}: skipped, {FILES[model]} is missing")
        sys.exit()
    return FILES[model]


def request(url: str, **body: Any) -> urllib.request.Request:
    """A POST of these fields; without any, a GET."""
    data = json.dumps(body).encode() if body else None
    return urllib.request.Request(url, data, HEADERS)


def ask(url: str, **body: Any) -> Any:
    """The answer to a request. See `request`."""
    with urllib.request.urlopen(request(url, **body), timeout=600) as answer:
        return json.load(answer)


@contextlib.contextmanager
def events_of(url: str, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The events that answer a request. Leaving early closes the connection."""
    with urllib.request.urlopen(request(url, **body), timeout=600) as answer:
        yield (json.loads(line[6:]) for line in answer if line.startswith(b"data: {"))


def cpu_ns(pid: int) -> int:
    """CPU time of all threads, from the scheduler's clock: /proc/PID/stat has a grain of 10 ms."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(task.read_text().split()[0])
    return total


@dataclass
class Result:
    """One completion as its client saw it. `marks` has (seconds since the request, tokens so far)
    for each event.
    """

    marks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.marks[0][0]

    @property
    def tokens(self) -> int:
        return self.marks[-1][1]

    @property
    def rate(self) -> float:
        """Tokens/s, counted from the first token."""
        begin, first = self.marks[0]
        end, last = self.marks[-1]
        return (last - first) / max(1e-9, end - begin)


@dataclass
class Server:
    pid: int
    port: int
    model: str = ""  # the model id of vpsd; "" means llama-server

    def events(
        self, prompt: str, tokens: int, stop: str = "", **more: Any
    ) -> AbstractContextManager[Iterator[dict[str, Any]]]:
        """The events of one completion. See `events_of`."""
        url = f"http://127.0.0.1:{self.port}"
        asked = prompt.chat_ml() if isinstance(prompt, Question) else ""
        body = {"temperature": 0, "stop": [stop] if stop else []}
        if not self.model:
            body["prompt"] = asked or prompt
            body |= {"n_predict": tokens, "stream": True, "cache_prompt": True}
            return events_of(f"{url}/completion", **body)
        if asked:
            # Mode "instruct" would hold the answer back until it cannot be a fenced block any more.
            body["mode"] = "complete"
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {"model": self.model, "max_tokens": tokens, "stop_at": "none", **more}
        return events_of(f"{url}/v1/inference/stream", **body)

    def complete(self, prompt: str, tokens: int, stop: str = "", **more: Any) -> Result:
        result = Result()
        count = 0
        begin = time.perf_counter()
        with self.events(prompt, tokens, stop, **more) as events:
            for event in events:
                now = time.perf_counter() - begin
                if event.get("error"):
                    raise SystemExit(f"{event}")
                text = event.get("token") or event.get("content") or ""
                if self.model and text:
                    count = event["total_tokens"]
                else:
                    count += len(event.get("tokens", ()))
                # A model may end at once.
                if text or (not result.marks and (event.get("done") or event.get("stop"))):
                    result.marks.append((now, count))
        return result


def inherited() -> dict[str, str]:
    """The environment of a server: this process's own, so that its settings reach the server."""
    return {name: value for name, value in os.environ.items() if name != SPIN}


def both(
    stack: contextlib.ExitStack, folder: Path, models: Path = MODELS, tree: Path = ROOT
) -> tuple[Daemon, Daemon]:
    """The VPS's daemon, with the models of a folder, and the Pi's, which asks for no key; of a
    tree.
    """

    def start(name: str, **more: str) -> Daemon:
        environment = settings(folder / name, inherited(), **more)
        command = [sys.executable, f"{tree}/{name}.py"]
        return stack.enter_context(program(name, command, folder / name, environment))

    vps = start("vpsd", CEREBRUM_MODELS_DIR=f"{models}", **EASY)
    url = f"http://127.0.0.1:{vps.port}"
    return vps, start("cm4d", CEREBRUM_VPS_URL=url, CEREBRUM_CM4_API_KEY="")


@contextlib.contextmanager
def vpsd(
    folder: Path,
    name: str,
    model: str,
    threads: int,
    tuned: Path | None = None,
    published: bool = False,
    **more: str,
) -> Iterator[Server]:
    """vpsd with the model loaded, from its tuned file if that is given, or as `published` with the
    settings that were found for that. Its state is below `folder / name`: two of one name share it.
    """
    if tuned:
        link_tuned(folder / name, tuned, published)
    settings = {"MODELS_DIR": f"{MODELS}", "THREADS": f"{threads}", "MAX_CPU_PERCENT": "100"}
    more = {f"CEREBRUM_{key}": value for key, value in settings.items()} | more
    with daemon("vpsd", folder / name, inherited=inherited(), **more) as started:
        server = Server(started.process.pid, started.port, model)
        server.complete("x", 0)
        yield server


@contextlib.contextmanager
def llama_server(
    folder: Path, binary: str, file: Path, threads: int, *options: str
) -> Iterator[Server]:
    """llama-server with these options, and its defaults for everything else."""
    environment = [f"{name}={value}" for name, value in inherited().items()]
    program = [f"{Path(binary).resolve()}", "-m", f"{file}"]

    def command(port: int) -> list[str]:
        given = f"-t {threads} -c 8192 -np 2 --port {port}"
        return ["env", *environment, *program, *given.split(), *options]

    own = Path(tempfile.mkdtemp(dir=folder))
    with started(Engine("llama-server", own, command, free_port(), "")) as engine:
        server = Server(engine.process.pid, engine.port)
        server.complete("x", 1)
        yield server


def ratio(ours: list[float], others: list[float]) -> float:
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    return round(median(ratios), 3)


def together(*calls: Callable[[], Result]) -> list[Result]:
    """The results of calls that run at the same time, each in a thread. Their `marks` count from
    the same moment.
    """
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


SUBJECTS = (
    "a lighthouse keeper, a lame mule and the first snow", "how glass is blown on an island",
    "the night train from Lisbon", "two beekeepers who do not agree",
    "a map that was drawn wrong on purpose", "the smell of rain on a tin roof",
    "a clock that strikes thirteen", "an orchard behind the prison wall",
    "the last speaker of a language", "bread, salt and a borrowed coat",
    "the cartographer's youngest daughter", "a violin found in a drained canal",
)  # fmt: skip
KINDS = ("story", "poem without rhymes", "letter to a friend", "scene of a play")


class Question(str):
    """A prompt for the chat template. The models measured here use ChatML."""

    def chat_ml(self) -> str:
        return f"<|im_start|>user\n{self}<|im_end|>\n<|im_start|>assistant\n"


def prose(number: int) -> Question:
    """A prompt whose answer hardly repeats itself, a different one for each number.

    It is a question, because a small model that merely continues prose at temperature 0 soon
    repeats itself.
    """
    subject = SUBJECTS[number % len(SUBJECTS)]
    kind = KINDS[number // len(SUBJECTS) % 4]
    length = f"in {5 + number} long sentences that all begin differently"
    return Question(f"Write a {kind} about {subject}, {length}.")


def words(number: int, count: int) -> str:
    """Text of about `count` tokens in which nothing repeats, a different one for each number."""
    factor = 7919 * (number + 3)
    numbers = range(1, round(count / 4.74) + 1)
    text = " ".join(f"{(factor * i + number) % 99_991:x}" for i in numbers)
    return f"# {number}: {text}"


MODULES = "queue sched copy heapq shlex fnmatch string pprint textwrap cmd"


def source(number: int) -> list[str]:
    """The lines of a module of the standard library, from the first class or function on."""
    modules = MODULES.split()
    module = modules[number % len(modules)]
    text = Path(os.__file__).with_name(f"{module}.py").read_text()
    lines = text.splitlines()
    heads = (i for i, line in enumerate(lines) if re.match(r"(class|def) ", line))
    return lines[next(heads) :]


def copying(number: int, lines: int) -> str:
    """A prompt that asks for a file of the standard library with one change. `lines` is the length
    of the file.
    """
    file = "\n".join(source(number)[:lines])
    change = "The same file, whole, with `self` renamed to `this`:"
    return f"A file:\n```python\n{file}\n```\n{change}\n```python\n"
