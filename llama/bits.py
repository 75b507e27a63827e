"""Small unsigned integers inside 32-bit words, least significant bits first.

Knows bit positions; knows no format's zero points, scales or axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stream_words(count: int, bits: int) -> int:
    """Words that `count` values take when they follow one another without a gap."""
    return -(-count * bits // 32)


def padded_words(count: int, bits: int) -> int:
    """Words that `count` values take when none crosses a word: the gap is at the top of each."""
    return -(-count // (32 // bits))


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """words (R, stream_words) int32 → (R, count) uint8. Values may cross from one word into the next."""
    octets = words.contiguous().view(torch.uint8)  # little-endian, as safetensors stores them
    groups = -(-count // 8)  # 8 values are `bits` whole bytes
    wanted = groups * bits
    octets = F.pad(octets, (0, wanted - octets.shape[1])) if octets.shape[1] < wanted else octets[:, :wanted]
    octets = octets.reshape(len(words), groups, bits)
    values = octets.new_empty(len(words), groups, 8)
    for place in range(8):
        octet, shift = divmod(place * bits, 8)
        value = octets[..., octet] >> shift
        if shift + bits > 8:
            value = value | octets[..., octet + 1] << (8 - shift)
        values[..., place] = value & (2**bits - 1)
    return values.view(len(words), -1)[:, :count]


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """words (R, padded_words) int32 → (R, count) uint8."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=words.device)
    values = (words[..., None] >> shifts) & (2**bits - 1)  # the sign that >> drags in is masked away
    flat: Tensor = values.to(torch.uint8).reshape(len(words), -1)
    return flat[:, :count]


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """(R, C) uint8, each below 2**bits → (R, stream_words) int32: what `unpack_stream` takes apart."""
    ones = (values[..., None] >> torch.arange(bits, dtype=torch.uint8, device=values.device)) & 1
    flat = ones.flatten(1)
    flat = F.pad(flat, (0, -flat.shape[1] % 32)).view(len(values), -1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=values.device)
    return (flat * weights).sum(-1, dtype=torch.uint8).view(torch.int32)
