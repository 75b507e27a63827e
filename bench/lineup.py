"""Who takes part in the race: commands, best flags and forms, ours and the peers'.

The flags are the fastest ones found on two cores (see README.md beside this file). Knows where `bench.peers` puts
things; starts nothing.
"""

from __future__ import annotations

import ctypes.util
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from bench import forms, soft_prompts
from bench.server import Contestant
from bench.workload import load_tokenizer

BASE = "base"  # what the bare model is called at every contestant
PACKED = "w4g64"  # ours of 4 bits
CONTEXT = 2304  # the longest text of the race and its answer
CONCURRENCY = 32
FEW, ROWS = 8, 64  # soft prompts of most loads, and the rows of each
TIGHT_MB = 220  # KV pages for 50 prompts of ROWS, and for CONCURRENCY requests of 192 positions


def everybody(
    checkpoint: Path, root: Path, store: Path, names: tuple[str, ...], levels: Sequence[str], llama: Sequence[str]
) -> list[Contestant]:
    """All contestants: ours in bf16, at w4g64, with pages for a quarter of the prompts, and at `levels`; the peers.

    `names` are of soft prompts in `root`/prompts, the first FEW of them in `root`/few; `llama` are llama.cpp's
    quantisations; `store` takes our registries.
    """
    few = root / "few"
    mine = functools.partial(ours, checkpoint, store)
    tight = ("--kv-memory", f"{TIGHT_MB}MB")
    return [
        mine(few, names[:FEW]),
        mine(few, names[:FEW], PACKED),
        mine(root / "prompts", names, PACKED, name=f"tight-{PACKED}", flags=tight),
        *(mine(few, names[:FEW], level) for level in levels),
        vllm(checkpoint, root, few, CONCURRENCY),
        vllm(checkpoint, root, few, CONCURRENCY, weights="w8a8"),
        *(llama_cpp(checkpoint, root, kind, CONCURRENCY, ROWS) for kind in llama),
        *(hugging_face(checkpoint, few, CONCURRENCY, mode) for mode in ("generate", "continuous", "peft")),
    ]


def ours(
    checkpoint: Path,
    store: Path,
    prompts: Path,
    names: tuple[str, ...],
    level: str | None = None,
    *,
    name: str = "",
    flags: tuple[str, ...] = (),
) -> Contestant:
    """promptstitch in bf16, or at a level and multiplying as it does there; prompts are uploaded once it serves.

    `level` may be a folder: the checkpoint of a level that is not made while loading.
    """
    folder, kind = (Path(level), Path(level).name) if level and Path(level).is_dir() else (checkpoint, level)
    name = name or ("promptstitch" if kind is None else f"promptstitch-{kind}")
    command = [str(Path(sys.executable).with_name("promptstitch")), "serve", str(folder.absolute())]
    command += [
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--port",
        "{port}",
        "--store",
        f"{store / name}{{again}}",
        "--served-model-name",
        BASE,
    ]
    command += ["--compute", "bf16"] if kind is None else [] if folder != checkpoint else ["--level", kind]
    upload = functools.partial(soft_prompts.upload, folder=prompts, names=names, level=kind or "dense")
    uploads = f"/v1/prompts/bench-uploads/versions?level={kind or 'dense'}"
    return Contestant(name, kind or "bf16", [*command, *flags], forms.named(BASE), {}, upload, uploads, model_bytes)


def model_bytes(url: str) -> float:
    """What the weights and the pages in use of a promptstitch server take, by its own metrics."""
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    values = {name.partition("{")[0].removeprefix("promptstitch:"): value for name, value in pairs}
    used = float(values["kv_cache_usage_perc"]) + float(values["kv_cache_cached_perc"])
    return float(values["weight_bytes"]) + used * float(values["kv_cache_bytes"])


def allocator() -> str | None:
    """The library that vLLM asks to be preloaded, if this machine has it."""
    return ctypes.util.find_library("tcmalloc_minimal")


def vllm(
    checkpoint: Path, root: Path, prompts: Path, concurrency: int, context: int = CONTEXT, weights: str = "bf16"
) -> Contestant:
    """vLLM's CPU build, compiled, bound to every core; prompts travel as vectors in each request.

    `weights`: bf16, or w8a8, which it multiplies as integers, from the checkpoint that `write_w8a8` made in `root`.
    """
    venv = (root / "vllm").absolute()
    preload = [found for found in (allocator(), str(venv / "lib/libiomp5.so")) if found]
    cores = os.cpu_count() or 1
    env = {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    served = checkpoint if weights == "bf16" else root / weights
    command = [str(venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.absolute())]
    command += ["--served-model-name", BASE, "--dtype", "bfloat16", "--port", "{port}", "--enable-prompt-embeds"]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(concurrency), "--block-size", "64"]
    command += ["--disable-uvicorn-access-log", "--no-enable-log-requests"]
    form = forms.prompt_embeds(BASE, load_tokenizer(checkpoint), checkpoint, prompts)
    return Contestant("vllm" if weights == "bf16" else f"vllm-{weights}", weights, command, form, env)


def llama_cpp(checkpoint: Path, root: Path, quantisation: str, concurrency: int, rows: int) -> Contestant:
    """llama.cpp's server, a slot for each client; a text prefix of a prompt's length stays in the slot's cache."""
    command = [str(root / "llamacpp/build/bin/llama-server"), "--model", str(root / f"gguf/{quantisation}.gguf")]
    command += ["--alias", BASE, "--port", "{port}", "--threads", str(os.cpu_count()), "--flash-attn", "on"]
    command += ["--parallel", str(concurrency), "--ctx-size", str(CONTEXT * concurrency)]
    form = forms.text_prefix(BASE, load_tokenizer(checkpoint), rows)
    return Contestant(f"llama.cpp-{quantisation}", quantisation, command, form)


def hugging_face(checkpoint: Path, prompts: Path, concurrency: int, mode: str) -> Contestant:
    """transformers in bf16 by `generate` or by its continuous batching, or PEFT: a mode of `bench.hf_server`."""
    name = {"generate": "transformers", "continuous": "transformers-continuous", "peft": "peft"}[mode]
    command = [sys.executable, "-m", "bench.hf_server", "--checkpoint", str(checkpoint), "--prompts", str(prompts)]
    command += ["--mode", mode, "--model", BASE, "--batch", str(concurrency), "--port", "{port}"]
    return Contestant(name, "bf16", command, forms.named(BASE), {"HF_HUB_OFFLINE": "1"})
