"""The attention of single tokens in Triton against the plain one: on CUDA, or by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

from engine import paged  # noqa: E402
from engine.attention import look  # noqa: E402

# The interpreter has no bf16.
KINDS = [(torch.float32, 1e-5), (torch.float16, 4e-3), *([(torch.bfloat16, 3e-2)] if DEVICE == "cuda" else [])]
LENGTHS = [1, 16, 17, 256, 300, 520]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 32), (4, 4, 16), (9, 3, 64), (32, 1, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS)
def test_tokens_see_their_pages_and_no_more(dtype, tolerance, heads, kv_heads, dim):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(60, 16, kv_heads, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    tables = torch.stack([torch.randperm(60, generator=generator)[:33] for _ in LENGTHS]).int().to(DEVICE)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    wide = torch.randn(len(LENGTHS), heads + 3, dim, generator=generator).to(DEVICE, dtype)
    q = wide[:, :heads]  # as the model hands it over: a slice of one product
    got = paged.look(q, keys, values, tables, lengths)
    torch.testing.assert_close(got, look(q, keys, values, tables, lengths), rtol=tolerance, atol=tolerance)
    alone = paged.look(q[4:5], keys, values, tables[4:5], lengths[4:5])
    assert torch.equal(alone[0], got[4])
    values[tables[0, 0].item(), 1:] = torch.nan  # behind what the first token sees
    assert paged.look(q[:1], keys, values, tables[:1], lengths[:1]).isfinite().all()


def test_widths_that_are_taken():
    assert [dim for dim in (8, 16, 64, 80, 128) if paged.takes(dim)] == [16, 64, 128]
