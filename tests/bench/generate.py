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
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from servers import parser_of, prose, ratio, vpsd, weights_of

# The first sets how long llama.cpp's threads spin.
from cerebrum.vps.llama import np, start_library, usable_cores
from cerebrum.vps.vocabulary import api

OPTIONS = {"model": "qwen_0_5b", "tokens": 128, "rounds": 7, "quick": False, "bare": ""}


def bare_loop(path: str, threads: int) -> None:
    """Read `[prompt, tokens]` lines and write `[tokens/s, text]` lines: llama_decode and an argmax,
    nothing else.
    """
    start_library()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    vocab = api.llama_model_get_vocab(model)
    params = api.llama_context_default_params()
    n_vocab = api.llama_vocab_n_tokens(vocab)
    params.n_ctx = 8192
    params.n_batch = 512
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    context = api.llama_init_from_model(model, params)
    buffer = ctypes.create_string_buffer(256)
    print("[]", flush=True)
    for line in sys.stdin:
        prompt, most = json.loads(line)
        data = prompt.encode()
        todo = (api.llama_token * (len(data) + 8))()
        count = api.llama_tokenize(vocab, data, len(data), todo, len(todo), True, True)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        text = b""
        produced = 0
        begin = 0.0
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
            todo = (api.llama_token * 1)(token)
            count = 1
        rate = (produced - 1) / (end - begin)
        print(json.dumps([rate, text.decode("utf-8", "replace")]), flush=True)


def main() -> None:
    options = parser_of(__doc__, threads=usable_cores(), **OPTIONS).parse_args()
    model, threads = options.model, options.threads
    if options.bare:
        bare_loop(options.bare, threads)
        return
    tokens, rounds = (24, 2) if options.quick else (options.tokens, options.rounds)
    command = [sys.executable, __file__, "--bare", weights_of(model), "--threads", f"{threads}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    rates: dict[str, list[float]] = {"plain": [], "drafts": [], "bare": []}
    same = drafted = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = stack.enter_context(vpsd(folder, "plain", model, threads, CEREBRUM_DRAFT="0"))
        drafts = stack.enter_context(vpsd(folder, "drafts", model, threads))
        loop = stack.enter_context(subprocess.Popen(command, **pipes))
        loop.stdout.readline()
        for number in range(-1, rounds):  # the first one warms up
            prompt = prose(number + 1)
            ours = plain.complete(prompt, tokens)
            fast = drafts.complete(prompt, tokens)
            print(json.dumps([prompt.chat_ml(), tokens]), file=loop.stdin)
            rate, text = json.loads(loop.stdout.readline())
            if number >= 0:
                rates["plain"].append(ours.rate)
                rates["drafts"].append(fast.rate)
                rates["bare"].append(rate)
                same += text == ours.text
                drafted += fast.done["draft_tokens"]
        loop.stdin.close()

    found: dict[str, object] = {"model": model, "threads": threads, "rounds": rounds}
    found |= {f"{name}_tok_s": round(median(values), 2) for name, values in rates.items()}
    found["ratio"] = ratio(rates["plain"], rates["bare"])
    found["ratio_drafts"] = ratio(rates["drafts"], rates["bare"])
    found |= {"same_text": f"{same} of {rounds}", "draft_tokens": drafted}
    print(json.dumps({"benchmark": "generate", **found}))


if __name__ == "__main__":
    main()
