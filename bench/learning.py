"""Learning against PEFT on the same dequantised weights: tokens a second and peak memory, side by side.

    python -m bench.learning models/smollm2-135m --level w3g64 --kind rows kv

Both learn N positions from the same windows with AdamW and cross-entropy of every token but a window's first. Each
side runs in a process of its own, the sides take turns, and the best round of each counts, so that other work on the
machine disturbs both alike. PEFT computes in bf16 and in fp32, and is held to the faster one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import describe
from lab.learn.compute import blocks_of, choose_compute, for_learning
from lab.learn.forms import PromptForm
from lab.learn.losses import Target, chunked_loss
from lab.learn.start import start
from llama.load import load
from llama.model import Llama
from llama.tokenizer import HubTokenizer

SIDES = ("ours", "peft-bfloat16", "peft-float32")


def main() -> None:
    """Run the sides in turns and print one JSON document."""
    args = arguments()
    if args.side:
        print(json.dumps(measured(args, args.side, args.kind[0])))
        return
    table = []
    for kind in args.kind:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(args.rounds):
            for side in SIDES:
                found = in_a_process(side, kind)
                if side not in best or found["tokens_per_second"] > best[side]["tokens_per_second"]:
                    best[side] = found
        rival = max((best[side] for side in SIDES[1:]), key=lambda found: found["tokens_per_second"])
        ratios = {name: round(best["ours"][name] / rival[name], 3) for name in ("tokens_per_second", "peak_bytes")}
        table.append({"kind": kind, "sides": best, "ours_to_peft": ratios})
    workload = {name: getattr(args, name) for name in ("level", "positions", "window", "batch", "steps", "rounds")}
    print(json.dumps({"machine": describe(), "workload": workload, "results": table}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--level", default="w3g64")
    parser.add_argument("--kind", nargs="+", choices=["rows", "kv"], default=["rows", "kv"])
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", default="auto", help="ours: packed, int8, float32, bfloat16")
    parser.add_argument("--side", choices=SIDES, help="measure just this one, in this process")
    return parser.parse_args()


def in_a_process(side: str, kind: str) -> dict[str, Any]:
    """This very command for one side and one kind."""
    command = [sys.executable, "-m", "bench.learning", *sys.argv[1:], "--side", side, "--kind", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def measured(args: argparse.Namespace, side: str, kind: str) -> dict[str, Any]:
    """Tokens a second of the fastest step, the loss of the last one, and the process's peak memory."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40_000, (args.batch, args.window), generator=generator)
    step = ours(args, kind, ids) if side == "ours" else peft(args, kind, ids, side.partition("-")[2])
    step()
    seconds, loss = [], 0.0
    for _ in range(args.steps):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": round(ids.numel() / min(seconds), 1), "loss": round(loss, 4), "peak_bytes": peak}


def ours(args: argparse.Namespace, kind: str, ids: Tensor) -> Callable[[], float]:
    """One step as the lab takes it."""
    loaded = load(args.model, level=args.level, dtype="bfloat16", device="cpu", prepare=False)
    model = for_learning(loaded.model, choose_compute(args.compute, loaded.model.device))
    tokenizer = HubTokenizer(args.model)
    begun = start(kind, "text", args.positions, None, model, tokenizer, 0)  # type: ignore[arg-type]
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in begun.tensors.items()}
    form, optimiser = PromptForm(model, args.positions), torch.optim.AdamW(tensors.values(), lr=1e-3, weight_decay=0.0)

    def step() -> float:
        optimiser.zero_grad()
        hidden = form.hidden(tensors, ids[:, :-1], args.positions).flatten(0, 1)
        loss = chunked_loss(hidden, model.head, Target(ids[:, 1:].flatten())).total / ids[:, 1:].numel()
        torch.autograd.backward(loss)
        optimiser.step()
        return float(loss)

    return step


def peft(args: argparse.Namespace, kind: str, ids: Tensor, dtype: str) -> Callable[[], float]:
    """One step of PEFT's prompt tuning or prefix tuning."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    config = {"rows": PromptTuningConfig, "kv": PrefixTuningConfig}[kind]
    model = transformers_model(args, getattr(torch, dtype))
    tuned = get_peft_model(model, config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.positions))
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.0)
    labels = ids.clone()
    labels[:, 0] = -100
    mask = torch.ones_like(ids)

    def step() -> float:
        optimiser.zero_grad()
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss
        torch.autograd.backward(loss)
        optimiser.step()
        return float(loss)

    return step


def transformers_model(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The checkpoint in transformers, its linears holding the values that are served at the level."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True).requires_grad_(False)
    served = load(args.model, level=args.level, dtype="bfloat16", device="cpu", prepare=False).model
    check_tables(model, served)
    for layer, block in zip(model.model.layers, blocks_of(served), strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        merged = {
            block.qkv: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.o: (attention.o_proj,),
            block.gate_up: (mlp.gate_proj, mlp.up_proj),
            block.down: (mlp.down_proj,),
        }
        for source, targets in merged.items():
            parts = torch.split(source.dense(), [target.out_features for target in targets])
            for target, part in zip(targets, parts, strict=True):
                target.weight.data = part.to(dtype).contiguous()
    return model.eval()


def check_tables(model: Any, served: Llama) -> None:
    """Both sides read the same embeddings."""
    ids = torch.arange(0, 1000)
    difference = F.embedding(ids, model.get_input_embeddings().weight).float() - served.embed(ids).float()
    if difference.abs().max() > 1e-2:
        raise SystemExit("the embedding tables differ; give the dense checkpoint that is quantised at load")


if __name__ == "__main__":
    main()
