"""Scaled dot-product attention as torch has it, and which of its kernels computes it on CUDA.

cuDNN's is left out: it makes a plan for each new shape, and behind a mask its slopes may not be numbers (pytorch
196678). Knows no pages and no prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, heads, T, D), k and v (B, KV heads, S, D) → (B, heads, T, D). Without a mask it is causal, and S is T."""
    shared = q.shape[1] // k.shape[1]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)
    if shared > 1 and (mask is not None or q.dtype == torch.float32):
        # Only the kernel that keeps all scores would take these with shared heads.
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    with sdpa_kernel(list(_KERNELS)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)
