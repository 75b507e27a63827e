"""Who takes part in the race: commands, best flags and forms, ours and the peers'.

The flags are the fastest ones found on two cores (see README.md beside this file). Knows where `bench.peers` puts
things; starts nothing.
"""

from __future__ import annotations

import ctypes.util
import functools
import os
import sys
from pathlib import Path

import torch

from bench import forms, soft_prompts
from bench.server import Contestant
from bench.workload import load_tokenizer

BASE = "base"  # what the bare model is called at every contestant
CONTEXT = 2048


def ours(checkpoint: Path, store: Path, prompts: Path, names: tuple[str, ...], level: str | None = None) -> Contestant:
    """promptstitch in bf16, or at a level and multiplying as it does there; prompts are uploaded once it serves."""
    name, kind = ("promptstitch", "bf16") if level is None else (f"promptstitch-{level}", level)
    command = [str(Path(sys.executable).with_name("promptstitch")), "serve", str(checkpoint), "--dtype", "bfloat16"]
    command += ["--port", "{port}", "--store", str(store / name), "--served-model-name", BASE]
    command += ["--compute", "bf16"] if level is None else ["--level", level]
    upload = functools.partial(soft_prompts.upload, folder=prompts, names=names, level=level or "dense")
    return Contestant(name, kind, command, forms.named(BASE), prepare=upload)


def vllm(checkpoint: Path, root: Path, prompts: Path, concurrency: int) -> Contestant:
    """vLLM's CPU build in bf16, compiled, bound to every core; prompts travel as vectors in each request."""
    venv = (root / "vllm").absolute()
    preload = [f for f in (ctypes.util.find_library("tcmalloc_minimal"), str(venv / "lib/libiomp5.so")) if f]
    cores = os.cpu_count() or 1
    env = {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", BASE, "--dtype", "bfloat16", "--port", "{port}", "--enable-prompt-embeds"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(concurrency), "--block-size", "64"]
    command += ["--disable-uvicorn-access-log", "--no-enable-log-requests"]
    form = forms.prompt_embeds(BASE, load_tokenizer(checkpoint), checkpoint, prompts, torch.bfloat16)
    return Contestant("vllm", "bf16", command, form, env)


def llama_cpp(checkpoint: Path, root: Path, quantisation: str, concurrency: int, rows: int) -> Contestant:
    """llama.cpp's server, a slot for each client; a text prefix of a prompt's length stays in the slot's cache."""
    command = [str(root / "llamacpp/build/bin/llama-server"), "--model", str(root / f"gguf/{quantisation}.gguf")]
    command += ["--alias", BASE, "--port", "{port}", "--threads", str(os.cpu_count()), "--flash-attn", "on"]
    command += ["--parallel", str(concurrency), "--ctx-size", str(512 * concurrency)]
    form = forms.text_prefix(BASE, load_tokenizer(checkpoint), rows)
    return Contestant(f"llama.cpp-{quantisation}", quantisation, command, form)
