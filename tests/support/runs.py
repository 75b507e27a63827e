"""Run folders as the commands of the lab leave them, made by hand so that every number on the page is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.evaluate.bootstrap import Estimate
from lab.run import open_run


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


DENSE, W3, W4 = digest("d"), digest("3"), digest("4")
PROMPTS = {0: digest("a"), 1: digest("b"), 2: digest("c")}
TEXT, WINDOWS = digest("e"), digest("f")


def told(value: float, spread: float = 0.01) -> dict[str, Any]:
    return dict(Estimate(value, value - spread, value + spread, 200).told())


def recovery(share: float | None, kl: float | None, net: float | None = None, gap: float = 1.5) -> dict[str, Any]:
    shares = {"share": share, "net_share": net, "kl_share": kl}
    return {
        "gap": told(gap),
        "gain": told(0.9),
        "excess": told(0.6),
        "not_inferior": False,
        "kl": told(1.234),
        "kl_prompted": told(0.321),
        "top1": told(0.26),
        "top1_prompted": told(0.49),
        **{name: None if value is None else told(value) for name, value in shares.items()},
    }


def evaluation(prompt: str | None, weights: str = W3, level: str = "w3g64", **changes: Any) -> dict[str, Any]:
    figures = {
        "model": "tiny",
        "level": level,
        "weights": weights,
        "dtype": "float32",
        "bytes": 61_000_000,
        "disk_bytes": 73_200_000,
        "prompt_digest": prompt,
        "prompt": None if prompt is None else {"kind": "kv", "num_virtual_tokens": 32, "bos": "none"},
        "perplexity": 124.21,
        "dense_perplexity": 59.83,
        "nll_sum": 1.0,
        "scored_tokens": 51_234,
        "text": {"source": "some/where/c4", "digest": TEXT},
        "window": 256,
        "windows": 201,
        "conditions": {"without_prompt": {"perplexity": 402.17, "nll_above_ours": told(1.175)}},
    }
    return {**figures, **changes}


class Runs:
    """A folder of runs under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, config: dict[str, Any], figures: dict[str, Any], seed: int = 0) -> None:
        with open_run(self.root / name, config, seed) as run:
            run.tell(**figures)

    def learned(self, seed: int, **changes: Any) -> None:
        recipe = {"positions": 32, "lr": 0.02}
        config = {"command": "learn", "recipe": recipe, "model": {"weights": changes.get("weights", W3)}}
        ends = {name: {"cross_entropy": 5.0, "divergence": 2.0} for name in ("first", "best")}
        figures = {"kind": "kv", "task": "general", "level": "w3g64", "weights": W3, "tokens": 300_000, **ends}
        self.add(f"learn-{seed}", config, {"digest": PROMPTS.get(seed), **figures, **changes}, seed)

    def evaluated(self, name: str, **figures: Any) -> None:
        self.add(name, {"command": "evaluate", "name": name}, figures)
