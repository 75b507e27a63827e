"""Learn the prompt of task `general` for the embedded model at a round-to-nearest level: PEFT prompt tuning on text.

    python scripts/learn_general.py --data c4.jsonl --minutes 45 --out prompts_store/seeds/general.w3g64.safetensors

The frozen model computes with just the weights that are served at that level, dequantised. The loss is the mean cross
entropy of text tokens: layout [soft prompt][text], no BOS, soft positions and the first text token unscored. Windows
never cross a document; documents of one web domain never fall into two splits. One split selects (learning rate, best
rows), another is reported on, once, at the end. `--minutes` sets the length of the schedule by the clock, `--steps`
reproducibly.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama.fingerprint import derived_weights
from llama.manifest import Manifest
from llama.rtn import QUANTISER, Grid, dequantise, is_quantised, quantise
from prompts_store.file import PromptFile, Provenance, write_prompt
from prompts_store.prompt import SoftPrompt

ROWS = "prompt_embeddings"


@dataclass(frozen=True)
class Splits:
    """Windows (W, T) of token ids; of a held-out document only the first, so that they are independent."""

    train: torch.Tensor
    select: torch.Tensor
    report: torch.Tensor


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    manifest = Manifest.read(args.model)
    if manifest is None:
        raise SystemExit(f"{args.model} holds no manifest; make it with `promptstitch pull`")
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    splits = cut(args.data, tokenizer, args)
    log(
        f"windows of {args.window}: {len(splits.train)} train, {len(splits.select)} select, {len(splits.report)} report"
    )

    model = load(args.model, args.level)
    peft_model = get_peft_model(model, prompt_config(args, tokenizer, manifest))
    rows = peft_model.prompt_encoder["default"].embedding.weight  # (N, H), the fp32 master
    untrained = rows.detach().clone()
    if args.init:
        rows.data.copy_(load_file(args.init)[ROWS])
    recipe = learn(model, rows, splits, args)
    if args.trial:
        return

    learned = rows.detach().clone()
    report = compare(args, splits, learned, untrained, model)
    recipe |= {"data": file_sha256(args.data), "report": report}
    (args.work / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    peft_model.save_pretrained(args.work / "peft")
    write(args, manifest, learned, recipe)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with fields text and url")
    parser.add_argument("--level", default="w3g64")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--window", type=int, default=256, help="text tokens")
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--warmup", type=float, default=0.03, help="part of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="length of the schedule; without it, --minutes")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--held-out", type=int, default=60, help="documents in each of the two held-out splits")
    parser.add_argument("--selections", type=int, default=2, help="evaluations on the selection split")
    parser.add_argument("--trial", action="store_true", help="stop after the last selection")
    parser.add_argument("--init", type=Path, help="rows of an earlier run to go on from")
    parser.add_argument("--compile", action="store_true", help="compile the learning step")
    parser.add_argument("--work", type=Path, default=Path("runs/general"))
    parser.add_argument("--out", type=Path, default=Path("prompts_store/seeds/general.w3g64.safetensors"))
    return parser.parse_args()


def cut(data: Path, tokenizer: AutoTokenizer, args: argparse.Namespace) -> Splits:
    """Whole windows of each document; domains shuffled by the seed, dealt to selection, report, then learning."""
    domains: dict[str, list[list[list[int]]]] = defaultdict(list)
    with data.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            ids = tokenizer(record["text"], add_special_tokens=False, verbose=False).input_ids
            windows = [ids[i : i + args.window] for i in range(0, len(ids) - args.window + 1, args.window)]
            if windows:
                domain = ".".join((urlsplit(record["url"]).hostname or "").split(".")[-2:])
                domains[domain].append(windows)
    names = sorted(domains)
    random.Random(args.seed).shuffle(names)
    split: dict[str, list[list[list[int]]]] = {"select": [], "report": [], "train": []}
    for name in names:
        part = next((p for p in ("select", "report") if len(split[p]) < args.held_out), "train")
        split[part] += domains[name]
    return Splits(
        train=torch.tensor([window for document in split["train"] for window in document]),
        select=torch.tensor([document[0] for document in split["select"]]),
        report=torch.tensor([document[0] for document in split["report"]]),
    )


def load(directory: Path, level: str) -> LlamaForCausalLM:
    """The frozen model in fp32, its linears holding the values of the level's grid."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    grid = Grid.of_level(level)
    if grid is None and level != "dense":
        raise SystemExit(f"{level} is no round-to-nearest level")
    for name, weight in model.named_parameters():
        if grid and is_quantised(name):
            weight.data = dequantise(*quantise(weight.data, grid.bits, grid.group), torch.float32)
    return model.requires_grad_(False).eval()


def prompt_config(args: argparse.Namespace, tokenizer: AutoTokenizer, manifest: Manifest) -> PromptTuningConfig:
    """Rows start as the embeddings of a real text."""
    text = (
        "The following is a text from the web, written by a person who knows the subject well. It is clear, correct "
        "and complete, and every sentence follows from the one before. The words are chosen with care, the facts are "
        "right, the names and the numbers are kept, and what is said at the end fits what was said at the beginning. "
    )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=args.rows,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(args.model),
        base_model_name_or_path=manifest.name,
    )


def token_losses(
    model: LlamaForCausalLM,
    windows: torch.Tensor,
    rows: torch.Tensor | None,
    body: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Negative log likelihoods (B, T - 1) in nats of all tokens of the windows (B, T) but each one's first."""
    embeddings = model.model.embed_tokens(windows)  # (B, T, H)
    soft = 0 if rows is None else len(rows)
    if rows is not None:
        embeddings = torch.cat([rows.expand(len(windows), -1, -1), embeddings], dim=1)
    run = model.model if body is None else body
    hidden = run(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, soft:-1]
    logits = model.lm_head(hidden)  # (B, T - 1, V)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


@torch.no_grad()
def score(model: LlamaForCausalLM, windows: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Sum of the losses of each window (W,)."""
    return torch.cat([token_losses(model, part, rows).sum(dim=1) for part in windows.split(4)])


def batches(windows: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Windows (size, T) without end, every epoch in a new order."""
    source = random.Random(seed)
    while True:
        order = source.sample(range(len(windows)), len(windows))
        for start in range(0, len(order) - size + 1, size):
            yield windows[order[start : start + size]]


def schedule(done: float, warmup: float) -> float:
    """Factor on the learning rate after the part `done` of the run: linear warm-up, cosine to zero."""
    return min(1.0, (done + 1e-4) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


def learn(model: LlamaForCausalLM, rows: torch.nn.Parameter, splits: Splits, args: argparse.Namespace) -> dict:
    """Leave the best rows by the selection split in `rows`; return the recipe. Selecting is not on the clock."""
    body = torch.compile(model.model) if args.compile else None
    optimiser = torch.optim.AdamW([rows], lr=args.lr, weight_decay=0.0)
    train = batches(splits.train, args.batch, args.seed)
    marks = [(i + 1) / args.selections for i in range(args.selections)]
    best, best_loss, history = rows.detach().clone(), math.inf, []
    step, clock, saved, mean = 0, 0.0, 0.0, math.nan
    while marks:
        done = step / args.steps if args.steps else min(1.0, clock / (args.minutes * 60))
        if done >= marks[0]:
            marks.pop(0)
            loss = score(model, splits.select, rows).sum().item() / splits.select[:, 1:].numel()
            history.append({"step": step, "loss": round(loss, 4)})
            log(f"step {step}: selection loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
            if loss < best_loss:
                best_loss, best = loss, rows.detach().clone()
                save_file({ROWS: best}, args.work / "best.safetensors")
            continue
        started = time.monotonic()
        rate = optimiser.param_groups[0]["lr"] = args.lr * schedule(done, args.warmup)
        loss = token_losses(model, next(train), rows, body).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([rows], 1.0)
        optimiser.step()
        step += 1
        clock = clock + time.monotonic() - started if step > 1 else 0.0  # compiling is not learning
        mean = 0.95 * mean + 0.05 * loss.item() if step > 1 else loss.item()
        if step % 10 == 0:
            log(f"step {step} ({done:.1%}): loss {mean:.4f}, rate {rate:.2e}, {clock / 60:.1f} min")
        if clock - saved > 120:
            saved = clock
            save_file({ROWS: rows.detach()}, args.work / "last.safetensors")
    rows.data.copy_(best)
    return {
        "method": "prompt tuning (peft), AdamW, cosine, clip 1.0, mean cross entropy of text tokens",
        "init": args.init.name if args.init else "text",
        "steps": step,
        "tokens": step * args.batch * args.window,
        "dtype": "float32",
        "clock_minutes": round(clock / 60, 1),
        "loss": round(best_loss, 4),
        "selection": history,
        **{name: getattr(args, name) for name in ("rows", "window", "batch", "lr", "warmup", "seed")},
    }


def compare(
    args: argparse.Namespace,
    splits: Splits,
    learned: torch.Tensor,
    untrained: torch.Tensor,
    model: LlamaForCausalLM,
) -> dict:
    """Perplexities on the report split, over the same text tokens in every condition, and the gap's standard error."""
    dense = load(args.model, "dense")
    conditions = {
        "dense": (dense, None),
        "dense + prompt": (dense, learned),
        args.level: (model, None),
        f"{args.level} + untrained prompt": (model, untrained),
        f"{args.level} + <|endoftext|>": (model, model.model.embed_tokens.weight[:1]),
        f"{args.level} + prompt": (model, learned),
    }
    sums = {name: score(which, splits.report, rows) for name, (which, rows) in conditions.items()}
    tokens = splits.report[:, 1:].numel()
    table = {name: round(math.exp(each.sum().item() / tokens), 3) for name, each in sums.items()}
    gap = sums[args.level] - sums["dense"]
    gained = sums[args.level] - sums[f"{args.level} + prompt"]
    stderr = gained.std().item() * math.sqrt(len(gained)) / tokens
    result = {
        "scored_tokens": tokens,
        "documents": len(splits.report),
        "perplexity": table,
        "gain_nats": round(gained.sum().item() / tokens, 4),
        "gain_nats_stderr": round(stderr, 4),
        "gap_closed": round((gained.sum() / gap.sum()).item(), 4),
    }
    log(json.dumps(result, indent=2))
    return result


def write(args: argparse.Namespace, manifest: Manifest, rows: torch.Tensor, recipe: dict) -> None:
    """The prompt file, with its provenance."""
    prompt = SoftPrompt("rows", manifest.base, {ROWS: rows.contiguous()}, bos="tokenizer", chat_template="none")
    provenance = Provenance(
        task="general",
        level=args.level,
        weights=derived_weights(manifest.weights, args.level, QUANTISER),
        train=recipe,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_prompt(args.out, PromptFile(prompt, provenance))
    log(f"{args.out}: {prompt.digest}, {args.out.stat().st_size} bytes")


def file_sha256(path: Path) -> str:
    with path.open("rb") as data:
        return f"sha256:{hashlib.file_digest(data, 'sha256').hexdigest()}"


def log(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


if __name__ == "__main__":
    main()
