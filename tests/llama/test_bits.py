"""Unpacking small integers equals an independent packer, bit by bit."""

import numpy as np
import pytest
import torch
from support.packers import bit_stream, gapped_words

from llama.bits import padded_words, stream_words, unpack_padded, unpack_stream


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 31, 32, 64, 576])
def test_unpacking(bits, count):
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, count))
    expected = torch.from_numpy(values).to(torch.uint8)
    stream, gapped = (torch.from_numpy(pack(values, bits).copy()) for pack in (bit_stream, gapped_words))
    assert stream.shape[1] == stream_words(count, bits)
    assert gapped.shape[1] == padded_words(count, bits)
    assert torch.equal(unpack_stream(stream, bits, count), expected)
    assert torch.equal(unpack_padded(gapped, bits, count), expected)


def test_the_three_bit_stream_is_gptq_s():
    """The first GPTQ code packs 32 values of 3 bits by hand, value 10 and 21 split over words."""
    values = np.random.default_rng(0).integers(0, 8, 32)
    words = np.zeros(3, np.uint32)
    for j in range(10):
        words[0] |= np.uint32(values[j] << 3 * j)
        words[1] |= np.uint32(values[11 + j] << (3 * j + 1))
        words[2] |= np.uint32(values[22 + j] << (3 * j + 2))
    words[0] |= np.uint32((int(values[10]) << 30) & 0xFFFFFFFF)
    words[1] |= np.uint32((values[10] >> 2) & 1) | np.uint32((int(values[21]) << 31) & 0xFFFFFFFF)
    words[2] |= np.uint32((values[21] >> 1) & 3)
    packed = torch.from_numpy(words.view(np.int32))[None]
    assert torch.equal(unpack_stream(packed, 3, 32)[0], torch.from_numpy(values).to(torch.uint8))
