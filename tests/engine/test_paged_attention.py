"""Our attention kernel against the plain one over the same pages."""

from __future__ import annotations

import pytest
import torch

from engine import attention
from engine.attention import KVPages, NativeAttention, PagedAttention, Span, attend
from llama import native
from llama.config import LlamaConfig, RopeConfig

ours = native.kernels()
pytestmark = pytest.mark.skipif(ours is None, reason="the kernels were not built, or this CPU does not run them")
BUILT = {name: found for name in native.LIBRARIES if (found := native.built(name))}
SPANS = [Span([5, 2, 9], 40, 1), Span([1], 0, 1), Span([7, 3, 8], 11, 30), Span([4], 0, 16), Span([6, 11], 16, 1)]
IN_ORDER = sorted(SPANS, key=lambda span: span.length)
LONG = Span([(7 * i + 3) % 20 for i in range(20)], 0, 310)  # several blocks of keys, several tasks


@pytest.fixture(autouse=True, params=BUILT)
def library(request, monkeypatch):
    """Every one that this CPU runs in turn, not only the best."""
    monkeypatch.setitem(globals(), "ours", BUILT[request.param])
    monkeypatch.setattr(attention, "kernels", lambda: BUILT[request.param])


@pytest.fixture(params=["fp32", "dot product", "matrix units"])
def products(request, monkeypatch, library) -> None:
    """Every way to multiply bf16, whichever is the fastest one here."""
    if request.param == "dot product" and not ours.dots:
        pytest.skip("this CPU has no bf16 dot product (AVX512-BF16)")
    if request.param == "matrix units" and not ours.matrix_units:
        pytest.skip("this CPU has no matrix units (AMX)")
    monkeypatch.setattr(native, "dot_is_faster", lambda: request.param == "dot product")
    monkeypatch.setattr(ours, "matrix_units", request.param == "matrix units")


def pages(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> KVPages:
    rope = RopeConfig(1e4)
    config = LlamaConfig(heads * dim, 2, heads, kv_heads, dim, 32, 64, 512, 1e-5, rope, True, False, False)
    kv = KVPages(config, 20, 16, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for store in (kv.keys, kv.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    return kv


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (10, 2, 80), (100, 1, 16), (20, 1, 32)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_decoding_and_prefill_in_one_batch(dtype, tolerance, heads, kv_heads, dim):
    plain, mine = pages(dtype, heads, kv_heads, dim), pages(dtype, heads, kv_heads, dim)
    tokens = sum(span.length for span in IN_ORDER)
    q, k, v = (torch.randn(tokens, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    expected = PagedAttention(plain, IN_ORDER)(1, q, k, v)
    got = NativeAttention(mine, IN_ORDER, ours)(1, q, k, v)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(mine.keys, plain.keys)
    assert torch.equal(mine.values, plain.values)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 80)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_a_long_text_whole_and_in_pieces(dtype, tolerance, heads, kv_heads, dim):
    """Close to the plain one; and whichever tokens stand beside it, a token is the same to the last bit."""
    plain, kv = pages(dtype, heads, kv_heads, dim), pages(dtype, heads, kv_heads, dim)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(310, n, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
    whole = NativeAttention(kv, [LONG], ours)(0, q, k, v)
    torch.testing.assert_close(whole, PagedAttention(plain, [LONG])(0, q, k, v), rtol=tolerance, atol=tolerance)
    for start, stop in ((309, 310), (0, 1), (64, 65), (63, 101), (100, 190), (256, 257), (190, 310)):
        piece = [t[start:stop] for t in (q, k, v)]
        got = NativeAttention(kv, [Span(LONG.table, start, stop - start)], ours)(0, *piece)
        assert torch.equal(got, whole[start:stop])


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (6, 6, 48), (9, 1, 16), (4, 2, 80), (20, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_stand_alone_are_those_of_a_long_text(dtype, heads, kv_heads, dim):
    """A preempted request is computed again as a prefill: to the last bit what decoding gave."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(310, n, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
    whole = NativeAttention(pages(dtype, heads, kv_heads, dim), [LONG], ours)(0, q, k, v)
    each = [Span(LONG.table, start, 1) for start in range(310)]
    assert torch.equal(NativeAttention(pages(dtype, heads, kv_heads, dim), each, ours)(0, q, k, v), whole)


def test_rows_of_a_wider_tensor_are_read_in_place():
    """As the model hands them over: slices of one product."""
    plain, mine = pages(torch.float32, 4, 2, 32), pages(torch.float32, 4, 2, 32)
    tokens = sum(span.length for span in IN_ORDER)
    q, k, v = torch.randn(tokens, 8, 32).split((4, 2, 2), 1)
    expected = PagedAttention(plain, IN_ORDER)(0, q, k, v)
    torch.testing.assert_close(NativeAttention(mine, IN_ORDER, ours)(0, q, k, v), expected)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_behind_a_sequence_does_not_matter(dtype):
    """A page's unused slots may hold anything, even what is not a number."""
    kv = pages(dtype, 4, 2, 32)
    kv.keys[0, 3, 5:], kv.values[0, 3, 5:] = torch.nan, torch.nan
    q, k, v = (torch.randn(1, n, 32).to(dtype) for n in (4, 2, 2))
    assert NativeAttention(kv, [Span([3], 4, 1)], ours)(0, q, k, v).isfinite().all()


def test_the_kernel_is_taken_where_it_fits():
    span = [Span([1], 0, 1)]
    assert isinstance(attend(pages(torch.bfloat16, 4, 2, 32), span), NativeAttention)
    assert isinstance(attend(pages(torch.float16, 4, 2, 32), span), PagedAttention)
    assert isinstance(attend(pages(torch.float32, 4, 2, 24), span), PagedAttention)
