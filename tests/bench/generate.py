"""What vpsd adds to llama.cpp by its HTTP, scheduler and Python: one stream against a bare
llama_decode loop.

    python tests/bench/generate.py [--model qwen_0_5b] [--tokens 128] [--rounds 7] [--threads N]

All use the same library, threads, prompts and greedy choice. Each runs in a process of its own
(--bare is the loop's), in turn, and each round has a new prompt; --quick has two short ones, to see
whether it works. Prints one line of JSON: tokens/s counted from the first token, and their share of
the bare loop's (medians). `ratio` should reach 0.97. It is of a vpsd without drafts, because drafts
would hide the overhead measured here. `ratio_drafts` is of a vpsd with its defaults; `draft_tokens`
counts the tokens that it drafted, few in text that hardly repeats.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from servers import parser_of, prose, ratio, vpsd, weights_of

from cerebrum.vps.llama import (
    np,
    start_library,
    usable_cores,
)  # sets how long llama.cpp's threads spin
from cerebrum.vps.vocabulary import api


def bare_loop(path: str, threads: int) -> None:
    """Read `[prompt, tokens]` lines and write `[tokens/s, text]` lines: llama_decode and an argmax,
    nothing else.
    """
    start_library()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    vocab, params = api.llama_model_get_vocab(model), api.llama_context_default_params()
    n_vocab = api.llama_vocab_n_tokens(vocab)
    params.n_ctx, params.n_batch, params.n_ubatch = 8192, 512, 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    context, buffer = api.llama_init_from_model(model, params), ctypes.create_string_buffer(256)
    print("[]", flush=True)
    for line in sys.stdin:
        prompt, most = json.loads(line)
        data = prompt.encode()
        todo = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(vocab, data, len(data), todo, len(todo), True, True)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        text, produced, begin = b"", 0, 0.0
        while produced < most:
            api.llama_decode(context, api.llama_batch_get_one(todo, count))
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (n_vocab,))
            token = int(logits.argmax())
            begin = begin or time.perf_counter()
            if api.llama_vocab_is_eog(vocab, token):
                break
            produced += 1
            end = time.perf_counter()
            size = api.llama_token_to_piece(vocab, token, buffer, 256, 0, False)
            text += buffer.raw[:size]
            todo, count = (api.llama_token * 1)(token), 1
        print(
            json.dumps([(produced - 1) / (end - begin), text.decode("utf-8", "replace")]),
            flush=True,
        )


def main() -> None:
    parser = parser_of(
        __doc__,
        model="qwen_0_5b",
        tokens=128,
        rounds=7,
        threads=usable_cores(),
        quick=False,
        bare="",
    )
    options = parser.parse_args()
    if options.bare:
        bare_loop(options.bare, options.threads)
        return
    if options.quick:
        options.tokens, options.rounds = 24, 2
    weights = str(weights_of(options.model))
    command = [sys.executable, __file__, "--bare", weights, "--threads", str(options.threads)]
    rates: dict[str, list[float]] = {"plain": [], "drafts": [], "bare": []}
    same = drafted = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        vpsd(Path(folder), "plain", options.model, options.threads, CEREBRUM_DRAFT="0") as plain,
        vpsd(Path(folder), "drafts", options.model, options.threads) as drafts,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as loop,
    ):
        loop.stdout.readline()
        for number in range(-1, options.rounds):  # the first one warms up
            prompt = prose(number + 1)
            ours, fast = (
                plain.complete(prompt, options.tokens),
                drafts.complete(prompt, options.tokens),
            )
            print(json.dumps([prompt.chat_ml(), options.tokens]), file=loop.stdin)
            rate, text = json.loads(loop.stdout.readline())
            if number >= 0:
                for name, value in (("plain", ours.rate), ("drafts", fast.rate), ("bare", rate)):
                    rates[name].append(value)
                same += text == ours.text
                drafted += fast.done["draft_tokens"]
        loop.stdin.close()

    found: dict[str, object] = {
        name: getattr(options, name) for name in ("model", "threads", "rounds")
    }
    found |= {f"{name}_tok_s": round(median(values), 2) for name, values in rates.items()}
    found |= {
        "ratio": ratio(rates["plain"], rates["bare"]),
        "ratio_drafts": ratio(rates["drafts"], rates["bare"]),
    }
    found |= {"same_text": f"{same} of {options.rounds}", "draft_tokens": drafted}
    print(json.dumps({"benchmark": "generate", **found}))


if __name__ == "__main__":
    main()
