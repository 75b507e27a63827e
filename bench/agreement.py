"""A compressed checkpoint of ours in vLLM: the same text tokens, teacher-forced, through both servers in bf16.

    python -m bench.peers
    python -m bench.agreement runs/compressed/w4g64 --text held-out.txt

Prints one JSON document: the share of places where both find the same token the most likely, and what each makes of the
text. One server runs after the other; both are asked the same over HTTP.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from bench import lineup, peers
from bench.machine import describe
from bench.server import Contestant, serving
from bench.workload import load_tokenizer


@dataclass(frozen=True, slots=True)
class Place:
    """What a server makes of one token: its log-probability in nats, and which token would be the most likely."""

    logprob: float
    top: str


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that both servers load.")],
    text: Annotated[Path, typer.Option(help="A text that neither has seen.")],
    window: Annotated[int, typer.Option(help="Tokens at a time.")] = 256,
    windows: Annotated[int, typer.Option(help="At most.")] = 40,
    root: Annotated[Path, typer.Option(help="Where the environments live.")] = peers.ROOT,
) -> None:
    """Hold a checkpoint in vLLM against the same in ours."""
    ids = load_tokenizer(checkpoint).encode(text.read_text(encoding="utf-8")).ids[: window * windows]
    pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
    with tempfile.TemporaryDirectory() as folder:
        sides = (
            lineup.ours(checkpoint, Path(folder, "store"), Path(folder), ()),
            lineup.vllm(checkpoint, root, Path(folder), 4),
        )
        ours, vllm = (places(side, pieces, Path(folder, f"{side.name}.log")) for side in sides)
    shared = [a.top == b.top for a, b in zip(ours, vllm, strict=True)]
    apart = [abs(a.logprob - b.logprob) for a, b in zip(ours, vllm, strict=True)]
    report = {
        "checkpoint": str(checkpoint),
        "places": len(ours),
        "same_top_token": statistics.mean(shared),
        "perplexity": {"promptstitch": perplexity(ours), "vllm": perplexity(vllm)},
        "nats_apart": {"median": statistics.median(apart), "largest": max(apart)},
        "commands": [side.command_line() for side in sides],
        "machine": describe(),
        "peers": peers.pins(),
    }
    print(json.dumps(report, indent=2))


def places(side: Contestant, pieces: Sequence[list[int]], log: Path) -> list[Place]:
    """Of all tokens but each piece's first, which nothing predicts."""
    found = []
    with serving(side, log) as running, httpx.Client(base_url=running.url, timeout=300) as client:
        for piece in pieces:
            asked = {"model": lineup.BASE, "prompt": piece, "echo": True, "logprobs": 1, "max_tokens": 1}
            answer = client.post("/v1/completions", json=asked | {"temperature": 0}).raise_for_status().json()
            found += _places(answer["choices"][0]["logprobs"], len(piece))
    return found


def perplexity(of: Sequence[Place]) -> float:
    return math.exp(-statistics.mean(place.logprob for place in of))


def _places(logprobs: dict[str, Any], length: int) -> list[Place]:
    each = zip(logprobs["token_logprobs"][1:length], logprobs["top_logprobs"][1:length], strict=True)
    return [Place(logprob, max(top, key=top.get)) for logprob, top in each]


if __name__ == "__main__":
    typer.run(main)
