"""The same shape as vLLM runs it, with random weights: what a token takes, by vLLM's own Python.

    python bench/vllm_peer.py FOLDER TEXT BATCH [BATCH …]      # FOLDER holds the config.json of the shape

Prints seconds a token by batch, as a line of JSON among those of vLLM. Knows vLLM, and nothing of ours.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

TOKENS = (1, 33)
TRIES = 5


def main(folder: str, text: int, batches: list[int]) -> dict[int, float]:
    """Seconds a token, the texts' own time taken off."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    llm = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=text + TOKENS[-1],
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
    )
    return {batch: _seconds_a_token(llm, text, batch) for batch in batches}


def _seconds_a_token(llm: Any, text: int, batch: int) -> float:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + j) % 100 for j in range(text)]} for i in range(batch)]

    def took(tokens: int) -> float:
        began = time.perf_counter()
        llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )
        return time.perf_counter() - began

    few, many = TOKENS
    took(many)  # warm
    return statistics.median((took(many) - took(few)) / (many - few) for _ in range(TRIES))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), [int(batch) for batch in sys.argv[3:]])))
