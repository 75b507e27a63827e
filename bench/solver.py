"""The solver against llm-compressor's GPTQ and SparseGPT, at the same settings, from the very same windows.

    python -m bench.solver --checkpoint models/smollm2-135m --data c4 --json runs/solver.json

Both compress the same dense checkpoint at w4g64 (symmetric, static act-order) and at 50 %, all linear layers but the
head, damped by 1 % of the mean: llm-compressor as it does by default, in an environment of its own, made if it is
missing. One scorer, ours in fp32, reads both results on documents that calibrated nothing. Exit code 1: the perplexity
of `ours` is more than 1 % above the peer's. `--every` adds the peer calibrated layer after layer within a block
(`peer-layers`; by default it takes a block at once, ours its four steps), which ours is held to as well, and
`ours-published`, without what goes beyond the published methods (fitted scales, polishing), for information.
What was made and scored is kept in `--root` and not done again: remove its folder after a change of the solver.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # `made_by_peer` runs where nothing of ours but this file is installed
    from torch import Tensor

    from lab.compress.job import Tokens
    from lab.data.windows import Windows

PEER = "llmcompressor==0.14.0.1"
TORCH = "torch==2.13.0"
BOUND = 1.01  # perplexity, ours to the peer's
LEVELS = {"w4g64": "gptq", "s50": "sparsegpt"}
PEERS = {"peer": "blocks", "peer-layers": "layers"}
OURS: dict[str, dict[str, Any]] = {"ours": {}, "ours-published": {"clip": False, "sweeps": 0}}
DEFAULT = ("peer", "ours")
CALL = "import sys; from bench.solver import made_by_peer; made_by_peer(*sys.argv[1:])"


def main() -> None:
    """Make what is missing, score everything, print the table, write the JSON."""
    from llama.identity import identify

    args = arguments()
    python = set_up(args.root / "llmcompressor")
    tokens, calibration = calibrated_on(args)
    who = identify(args.checkpoint)
    place = args.root / f"solver-{who.weights[7:15]}-{calibration[7:15]}"
    place.mkdir(parents=True, exist_ok=True)
    sides = [side for side in (*PEERS, *OURS) if args.every or side in DEFAULT]
    seconds = {f"{level}.{side}": made(python, args, tokens, place, level, side) for level in LEVELS for side in sides}
    results = [
        compared(args.checkpoint, who.base, place, sides, name, windows) for name, windows in texts(args).items()
    ]
    ok = all(verdict["ok"] for result in results for verdict in result["verdicts"])
    told = {
        "checkpoint": str(args.checkpoint),
        "peer": [TORCH, PEER],
        "calibration": {"data": args.data, "windows": len(tokens.ids), "digest": calibration},
        "bound": BOUND,
        "seconds": seconds,
        "results": results,
        "ok": ok,
    }
    show(told)
    if args.json:
        args.json.write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(not ok)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="dense")
    parser.add_argument("--data", default="c4", help="what calibrates; its part `report` is scored")
    parser.add_argument("--also", nargs="*", default=["wikitext2"], help="scored besides, all of it")
    parser.add_argument("--data-root", type=Path, help="where names are looked up first")
    parser.add_argument("--windows", type=int, default=128, help="of 256 tokens that calibrate")
    parser.add_argument("--scored", type=int, default=96, help="windows of 256 tokens of each text")
    parser.add_argument("--every", action="store_true", help="with the variants, which takes as long again")
    parser.add_argument("--root", type=Path, default=Path("runs/peers"), help="where all that is made is kept")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def set_up(venv: Path) -> Path:
    """The Python of llm-compressor's environment. torch comes first, the build that TORCH_INDEX_URL names if any."""
    python = venv / "bin/python"
    if not (venv / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        index = ["--index-url", os.environ["TORCH_INDEX_URL"]] if os.environ.get("TORCH_INDEX_URL") else []
        for what in ([*index, TORCH], [TORCH, PEER]):
            subprocess.run([str(python), "-m", "pip", "install", *what], check=True)
        (venv / "ready").touch()
    return python


def made(python: Path, args: argparse.Namespace, tokens: Tokens, place: Path, level: str, side: str) -> float:
    """Make the checkpoint of a side if it is not there; the seconds that it took, then or now."""
    out, kept = place / f"{level}.{side}", place / f"{level}.{side}.seconds"
    if not kept.exists():
        began = time.monotonic()
        if side in PEERS:
            by_peer(python, args.checkpoint, tokens, LEVELS[level], PEERS[side], out)
        else:
            by_us(args.checkpoint, tokens, level, OURS[side], out)
        kept.write_text(f"{time.monotonic() - began:.1f}")
    return float(kept.read_text())


def calibrated_on(args: argparse.Namespace) -> tuple[Tokens, str]:
    """Windows of the part that calibrates, drawn as `compress` does, and their digest."""
    from lab.compress.job import Tokens
    from lab.data.named import documents
    from lab.data.splits import split
    from lab.data.windows import cut
    from llama.tokenizer import HubTokenizer

    found = split(documents(args.data, args.data_root), "calibration").parts["calibration"]
    windows = cut(found, HubTokenizer(args.checkpoint), 256).drawn(args.windows * 256, 0)
    return Tokens.of(windows.ids, windows.lengths), windows.digest


def by_peer(python: Path, checkpoint: Path, tokens: Tokens, method: str, form: str, out: Path) -> None:
    """`made_by_peer` in its own environment."""
    from safetensors.torch import save_file

    from llama.checkpoint import Checkpoint

    ids = out.with_suffix(".ids.safetensors")
    save_file({"ids": tokens.ids}, ids)
    command = [str(python), "-c", CALL, str(checkpoint), str(ids), method, form, str(out)]
    with out.with_name(f"{out.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    table, theirs = (Checkpoint(folder).tensor("model.embed_tokens.weight") for folder in (checkpoint, out))
    if not torch.equal(table.float(), theirs.float()):  # with a tied head that was not ignored it would be pruned, too
        raise SystemExit(f"{out}: the peer changed the embedding, so that this would be no comparison of solvers")


def made_by_peer(checkpoint: str, calibration: str, method: str, form: str, out: str) -> None:
    """A compressed checkpoint from llm-compressor, in its own process. `form`: one of the values of PEERS."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    grid = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": {**grid, "actorder": "static"}}
    recipe = {
        "gptq": lambda: GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"], dampening_frac=0.01),
        "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, ignore=["re:.*lm_head"], dampening_frac=0.01),
    }[method]()
    ids: Tensor = load_file(calibration)["ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
        sequential_targets=["Linear"] if form == "layers" else None,
    )
    model.save_pretrained(out)


def by_us(checkpoint: Path, tokens: Tokens, level: str, changes: Mapping[str, Any], out: Path) -> None:
    """A checkpoint from `lab.compress`."""
    from lab.compress.compress import Order, compress, planned
    from lab.progress import progress
    from lab.run import open_run

    plan = planned(Order(checkpoint, out, level, LEVELS[level], **changes))
    with open_run(out.with_name(f"{out.name}.run"), plan.config(None), 0) as run, progress() as report:
        compress(plan, tokens, run, report)


def texts(args: argparse.Namespace) -> dict[str, Windows]:
    """What is scored: windows that calibrated nothing, drawn by lot, by the name of the data."""
    from lab.transfer.samples import parts, sample
    from llama.tokenizer import HubTokenizer

    tokenizer, found = HubTokenizer(args.checkpoint), {}
    for name in (args.data, *(f"{name}:report" for name in args.also)):
        documents = parts(name, args.data_root)["report"]
        drawn = sample(name, "report", documents, tokenizer, 256, [], most=args.scored)
        found[name] = drawn.first(args.scored)[0]
    return found


def compared(
    checkpoint: Path, base: str, place: Path, sides: Sequence[str], name: str, windows: Windows
) -> dict[str, Any]:
    """Perplexity of every model on a text, and for each pair of ours and the peer's the ratio, paired by document."""
    folders = {"dense": checkpoint}
    folders |= {name: place / name for level in LEVELS for side in sides for name in (f"{level}.{side}",)}
    losses = {name: nll(folder, base, windows, place / "scores") for name, folder in folders.items()}
    tokens = windows.scored_tokens
    return {
        "text": name,
        "windows": len(windows),
        "digest": windows.digest,
        "perplexity": {each: math.exp(float(loss.double().sum()) / tokens) for each, loss in losses.items()},
        "verdicts": [
            verdict(losses, windows, f"{level}.{ours}", f"{level}.{peer}")
            for level in LEVELS
            for ours in OURS
            for peer in PEERS
            if ours in sides and peer in sides
        ],
    }


def nll(folder: Path, base: str, windows: Windows, cache: Path) -> Tensor:
    """(W, T) nats, as `evaluate` scores them."""
    from lab.evaluate.scorer import Scorer
    from lab.progress import progress
    from llama.load import load

    with progress() as report:
        return Scorer(load(folder, dtype="float32", device="cpu", base=base), cache)(windows, None, report).nll


def verdict(losses: Mapping[str, Tensor], windows: Windows, ours: str, peer: str) -> dict[str, Any]:
    """The ratio of perplexities with its interval. Only what `compress` makes by itself is held to the bound."""
    from lab.evaluate.bootstrap import difference

    found = difference(losses[ours], losses[peer], windows)
    ratio, held = math.exp(found.value), ours.endswith(".ours")
    ends = [math.exp(end) for end in (found.low, found.high) if end is not None]
    told = {"ours": ours, "peer": peer, "ratio": ratio, "interval": ends, "units": found.units, "unit": found.unit}
    return told | {"bound": BOUND if held else None, "ok": not held or ratio <= BOUND}


def show(told: Mapping[str, Any]) -> None:
    """The table."""
    for result in told["results"]:
        print(f"{result['text']}, {result['windows']} windows: perplexity")
        for name, value in result["perplexity"].items():
            print(f"  {name:<24}{value:9.3f}")
        for each in result["verdicts"]:
            ends = " to ".join(f"{end:.4f}" for end in each["interval"])
            bound = "" if each["bound"] is None else f"  at most {each['bound']}: {'ok' if each['ok'] else 'MISSED'}"
            print(f"  {each['ours']} / {each['peer']:<20}{each['ratio']:8.4f}  [{ends}]{bound}")


if __name__ == "__main__":
    main()
