"""How many completions are right, and how many tokens they take: HumanEval, HumanEval by chat, and
gaps.

    python tests/bench/quality.py [--limit 20] [--model ID] [--published]
        [--only complete,raw,instruct,infill]

This starts both daemons. The VPS uses the model's tuned file if this user has one, unless
--published is given: two runs say what tuning changes. --limit is the number of problems, and of
gaps of each kind. Everything is greedy (temperature 0). Prints one line of JSON:

    complete   HumanEval's prompts as they are, by /v1/complete
    raw        the same by the VPS with "stop_at": "none", as returned and cut at the usual stop
               words
    instruct   the same problems as instructions
    infill     Gaps of one line, several lines and a span in HumanEval's solutions, with the Pi's
               default settings: tokens generated, the share of them in the returned text, seconds,
               and how many programs pass the tests
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import servers
from gaps import KINDS, Problem, of_human_eval, passes, problems
from harness import link_tuned

from cerebrum.vps.encoding import find_tuned, tuned_path  # harness has set the path to it
from cerebrum.vps.llama import Settings

MAX_TOKENS = 512
STOPS = re.compile(r"\n(class |def |#|if |print\(|@|```)")  # where users of HumanEval usually cut
INSTRUCTION = "Complete this function."


@dataclass
class Tiers:
    """Where the daemons listen, and how to ask them."""

    vps: str
    pi: str
    model: str

    def ask(self, url: str, **body: Any) -> Any:
        return servers.ask(url, model=self.model, temperature=0, **body)

    def complete(self, **body: Any) -> Any:
        return self.ask(f"{self.pi}/v1/complete", language="python", **body)


def whole_program(problem: Problem, code: str) -> str:
    """The answer to an instruction, below the imports and helpers that precede the function in the
    prompt.
    """
    prompt = problem["prompt"]
    if f"def {problem['entry_point']}(" not in code:
        return prompt + code
    return prompt[: prompt.rindex("def ")] + "\n" + code


def solve(tiers: Tiers, tasks: list[Problem], **asked: str) -> dict[str, Any]:
    solved = tokens = 0
    for task in tasks:
        ours = tiers.complete(prompt=task["prompt"], max_tokens=MAX_TOKENS, **asked)
        solved += passes(task, whole_program(task, ours["completion"]))
        tokens += ours["total_tokens"]
    each = round(tokens / len(tasks), 1)
    return {"problems": len(tasks), "solved": solved, "tokens_each": each}


def raw(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    url = f"{tiers.vps}/v1/inference"
    solved = cut = tokens = 0
    for task in tasks:
        prompt = task["prompt"]
        answer = tiers.ask(url, prompt=prompt, stop_at="none", max_tokens=MAX_TOKENS)
        text = answer["completion"]
        solved += passes(task, prompt + text)
        cut += passes(task, prompt + STOPS.split(text)[0])
        tokens += answer["total_tokens"]
    each = round(tokens / len(tasks), 1)
    return {"problems": len(tasks), "solved": solved, "cut_solved": cut, "tokens_each": each}


def infill(tiers: Tiers, count: int) -> dict[str, Any]:
    cases = [*of_human_eval()]
    tasks = {task["task_id"]: task for task in problems()}
    result = {}
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
    options = servers.parser_of(
        __doc__, limit=164, only="complete,instruct,infill", model="qwen_0_5b", published=False
    ).parse_args()
    limit = options.limit
    tasks = problems()
    tasks = tasks[:: max(1, len(tasks) // limit)][:limit]  # spread: the first are the easiest
    parts = {
        "complete": partial(solve, tasks=tasks, mode="complete"),
        "raw": partial(raw, tasks=tasks),
        "instruct": partial(solve, tasks=tasks, instruction=INSTRUCTION),
        "infill": partial(infill, count=limit),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let ExitStack end the daemons
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = servers.weights_of(options.model)
        if not options.published and find_tuned(weights, Settings())[0]:
            link_tuned(folder / "vpsd", tuned_path(Settings().state_dir, weights))
        vps, pi = (f"http://127.0.0.1:{daemon.port}" for daemon in servers.both(stack, folder))
        tiers = Tiers(vps, pi, options.model)
        models = {model["id"]: model for model in servers.ask(f"{tiers.vps}/v1/models")["models"]}
        result = {"encoding": models[options.model]["encoding"]}
        for name in options.only.split(","):
            result[name] = parts[name](tiers)
            print(name, result[name], file=sys.stderr)
    print(json.dumps({"benchmark": "quality", "model": options.model, **result}))


if __name__ == "__main__":
    main()
