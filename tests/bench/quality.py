"""How many completions are right, and how many tokens they take: HumanEval, HumanEval by chat, and
the gaps of DevBench.

    python tests/bench/quality.py [--limit 20] [--model ID] [--published]
        [--devbench FOLDER [--llama-server PATH]] [--only complete,raw,…]

This starts both daemons. The VPS uses the model's tuned file if this user has one, unless
--published is given: two runs say what tuning changes. --limit is the most problems of each
benchmark. --devbench is a clone of github.com/microsoft/devbench; parts that need it or
llama-server are left out without. Everything is greedy (temperature 0). Prints one line of JSON,
which counts texts as returned and cut at the usual stop words:

    complete   HumanEval's prompts as they are, by /v1/complete
    raw        the same by the VPS with "stop_at": "none"
    instruct   the same problems as instructions
    gaps       DevBench's gaps in Python, by /v1/complete: all of them, and by category
    gaps_raw   the same with "stop_at": "none"
    infill     the same by llama-server's /infill, with the published file
"""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import servers
from gaps import Problem, of_dev_bench, passes, problems
from harness import link_tuned

from cerebrum.vps.encoding import find_tuned, tuned_path  # harness has set the path to it
from cerebrum.vps.llama import Settings

GAP_TOKENS = 128  # HumanEval gets the API's default, 512
STOPS = re.compile(r"\n(class |def |#|if |print\(|@|```)")  # where users of HumanEval usually cut
INSTRUCTION = "Complete this function."

Answer = tuple[str, int]  # a text, and how many tokens it took


def complete(url: str, problem: Problem, **more: Any) -> Answer:
    """What one of the daemons writes."""
    text = {name: problem[name] for name in ("prompt", "suffix") if name in problem}
    answer = servers.ask(url, temperature=0, **text, **more)
    return answer["completion"], answer["total_tokens"]


def infill(port: int, problem: Problem) -> Answer:
    """What llama-server writes."""
    texts = {"input_prefix": problem["prompt"], "input_suffix": problem["suffix"]}
    limits = {"n_predict": GAP_TOKENS, "temperature": 0}
    answer = servers.ask(f"http://127.0.0.1:{port}/infill", **texts, **limits)
    return answer["content"], answer["tokens_predicted"]


def whole_program(problem: Problem, code: str) -> str:
    """The text in its gap; the answer to an instruction, below the imports and helpers that precede
    the function in the prompt.
    """
    prompt = problem["prompt"]
    if "suffix" in problem:
        return prompt + code + problem["suffix"]
    if f"def {problem['entry_point']}(" not in code:
        return prompt + code
    return prompt[: prompt.rindex("def ")] + "\n" + code


def judge(
    tasks: Sequence[Problem], answer: Callable[[Problem], Answer]
) -> dict[str, dict[str, float]]:
    """How many texts are right, and how many tokens they take: all, and by category."""
    sums = {}
    for task in tasks:
        text, tokens = answer(task)
        solved = passes(task, whole_program(task, text))
        cut = passes(task, whole_program(task, STOPS.split(text)[0]))
        for name in sorted({"all", task.get("testsource", "all")}):
            sums.setdefault(name, Counter()).update(
                problems=1, solved=solved, cut_solved=cut, tokens=tokens
            )
    return {
        name: {**found, "tokens_each": round(found["tokens"] / found["problems"], 1)}
        for name, found in sums.items()
    }


def spread(tasks: Sequence[Problem], most: int) -> Sequence[Problem]:
    """At most so many, from the whole list: HumanEval's first are the easiest."""
    return tasks[:: math.ceil(len(tasks) / most)]


def main():
    defaults = {"limit": 1000, "only": "complete,instruct,gaps,gaps_raw,infill"}
    defaults |= {"model": "qwen_0_5b", "published": False, "devbench": "", "llama_server": ""}
    options = servers.parser_of(__doc__, **defaults).parse_args()
    tasks = spread(problems(), options.limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let ExitStack end the daemons
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = servers.weights_of(options.model)
        if not options.published and find_tuned(weights, Settings())[0]:
            link_tuned(folder / "vpsd", tuned_path(Settings().state_dir, weights))
        vps, pi = (f"http://127.0.0.1:{daemon.port}" for daemon in servers.both(stack, folder))
        ours = partial(complete, f"{pi}/v1/complete", model=options.model, language="python")
        raw = partial(complete, f"{vps}/v1/inference", model=options.model, stop_at="none")
        parts = {
            "complete": partial(judge, tasks, partial(ours, mode="complete")),
            "raw": partial(judge, tasks, raw),
            "instruct": partial(judge, tasks, partial(ours, instruction=INSTRUCTION)),
        }
        if options.devbench:
            gaps = spread([*of_dev_bench(options.devbench)], options.limit)
            fill = partial(ours, max_tokens=GAP_TOKENS)
            parts["gaps"] = partial(judge, gaps, fill)
            parts["gaps_raw"] = partial(judge, gaps, partial(fill, stop_at="none"))
            if options.llama_server:
                given = folder, options.llama_server, weights, Settings().threads
                port = stack.enter_context(servers.llama_server(*given)).port
                parts["infill"] = partial(judge, gaps, partial(infill, port))
        models = {model["id"]: model for model in servers.ask(f"{vps}/v1/models")["models"]}
        result = {"encoding": models[options.model]["encoding"]}
        for name in options.only.split(","):
            if name in parts:
                result[name] = parts[name]()
                print(name, result[name], file=sys.stderr)
    print(json.dumps({"benchmark": "quality", "model": options.model, **result}))


if __name__ == "__main__":
    main()
