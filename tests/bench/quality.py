"""How many completions are right, and how many tokens they take: HumanEval, and HumanEval by chat.

    python tests/bench/quality.py [--limit 20] [--model ID] [--published]
        [--only complete,raw,instruct]

This starts both daemons. The VPS uses the model's tuned file if this user has one, unless
--published is given: two runs say what tuning changes. --limit is the number of problems.
Everything is greedy (temperature 0). Prints one line of JSON:

    complete   HumanEval's prompts as they are, by /v1/complete
    raw        the same by the VPS with "stop_at": "none", as returned and cut at the usual stop
               words
    instruct   the same problems as instructions
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import servers
from gaps import Problem, passes, problems
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
        return servers.ask(url, model=self.model, temperature=0, max_tokens=MAX_TOKENS, **body)


def whole_program(problem: Problem, code: str) -> str:
    """The answer to an instruction, below the imports and helpers that precede the function in the
    prompt.
    """
    prompt = problem["prompt"]
    if f"def {problem['entry_point']}(" not in code:
        return prompt + code
    return prompt[: prompt.rindex("def ")] + "\n" + code


def solve(tiers: Tiers, tasks: list[Problem], **asked: str) -> dict[str, Any]:
    url = f"{tiers.pi}/v1/complete"
    solved = tokens = 0
    for task in tasks:
        ours = tiers.ask(url, language="python", prompt=task["prompt"], **asked)
        solved += passes(task, whole_program(task, ours["completion"]))
        tokens += ours["total_tokens"]
    each = round(tokens / len(tasks), 1)
    return {"problems": len(tasks), "solved": solved, "tokens_each": each}


def raw(tiers: Tiers, tasks: list[Problem]) -> dict[str, Any]:
    url = f"{tiers.vps}/v1/inference"
    solved = cut = tokens = 0
    for task in tasks:
        prompt = task["prompt"]
        answer = tiers.ask(url, prompt=prompt, stop_at="none")
        text = answer["completion"]
        solved += passes(task, prompt + text)
        cut += passes(task, prompt + STOPS.split(text)[0])
        tokens += answer["total_tokens"]
    each = round(tokens / len(tasks), 1)
    return {"problems": len(tasks), "solved": solved, "cut_solved": cut, "tokens_each": each}


def main() -> None:
    options = servers.parser_of(
        __doc__, limit=164, only="complete,instruct", model="qwen_0_5b", published=False
    ).parse_args()
    limit = options.limit
    tasks = problems()
    tasks = tasks[:: max(1, len(tasks) // limit)][:limit]  # spread: the first are the easiest
    parts = {
        "complete": partial(solve, tasks=tasks, mode="complete"),
        "raw": partial(raw, tasks=tasks),
        "instruct": partial(solve, tasks=tasks, instruction=INSTRUCTION),
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
