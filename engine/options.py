"""How large the engine is: its knobs, each written once, and what they come to for a given model.

Knows shapes and bytes; knows no requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention import STRETCH, KVPages
from engine.graphs import sizes
from llama.model import Llama

CPU_KV_BYTES = 2 << 30
CUDA_KV_SHARE = 0.9  # of what is free once the weights are there


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes in tokens unless said."""

    page_size: int = 16
    kv_bytes: int | None = None  # None = 2 GiB on the CPU; see `_default_bytes` for CUDA
    kept_folder: Path | None = None  # where prefixes of soft prompts are kept; None = nowhere
    kept_bytes: int = 1 << 30  # of them
    max_running: int = 256  # sequences in a batch
    max_batch_tokens: int = 512  # computed in one step
    max_waiting: int = 512  # requests
    max_waiting_tokens: int = 1 << 20
    max_model_len: int | None = None  # None = the model's context
    max_virtual_tokens: int = 512
    max_row_norm: float = 1e4  # of a rows prompt, in largest norms of the embedding table's rows
    max_choices: int = 64  # n of one request
    max_logprobs: int = 20

    def num_pages(self, model: Llama) -> int:
        """Pages that the budget buys. Raises ValueError if it buys no useful number."""
        page_bytes = KVPages.bytes_per_page(model.config, self.page_size, model.dtype)
        budget = self.kv_bytes or self._default_bytes(model)
        pages = budget // page_bytes
        if pages < 8:
            raise ValueError(
                f"the KV budget of {budget} bytes holds {pages} pages of {page_bytes} bytes; "
                f"at least 8 are needed: raise --kv-memory to {8 * page_bytes} bytes or more, or lower --max-running "
                "or --max-model-len"
            )
        most = self.max_running * -(-(model.config.max_len + self.max_virtual_tokens) // self.page_size)
        return min(pages, most + 8)

    def context(self, model: Llama, num_pages: int) -> int:
        """Positions one request may take, so that a lone one always fits: one page is blank, one is a prompt's tail."""
        return min(model.config.max_len, self.max_model_len or model.config.max_len, (num_pages - 2) * self.page_size)

    def _default_bytes(self, model: Llama) -> int:
        """On CUDA a share of what is free, less what steps take: stretches of attention twice, in graphs and beside
        them, and the logits that each graph keeps."""
        if model.device.type != "cuda":
            return CPU_KV_BYTES
        c, (free, _) = model.config, torch.cuda.mem_get_info(model.device)
        stretches = -(-min(c.max_len, self.max_model_len or c.max_len) // STRETCH)
        partial = 4 * self.max_running * c.num_heads * stretches * (c.head_dim + 2)
        logits = 4 * c.vocab_size * sum(sizes(self.max_running))
        return max(0, int(free * CUDA_KV_SHARE) - 2 * partial - logits)
