"""Packed layers multiply, and differentiate, as the dense weights that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from llama import linear, packed
from llama.formats.bitsandbytes import NF4_VALUES
from llama.int4 import BLOCKS, GROUPS, Int4Linear, interleave, kernel_block
from llama.linear import DenseLinear, FusedLinear
from llama.packed import KERNEL_ROWS, TWOS_COMPLEMENT, CodebookLinear, Int8Linear, scale_dtype

CPU = torch.device("cpu")
ROWS = (1, 8, 40, 300)
DTYPES = (torch.float32, torch.bfloat16)
N, K = 192, 256
BLOCK = kernel_block()
assert min(ROWS) <= KERNEL_ROWS < max(ROWS)

needs_kernel = pytest.mark.skipif(BLOCK is None, reason="the 4-bit kernel of this CPU has another layout")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(bits, n=N, k=K, seed=0):
    top = 2 ** (bits - 1)
    return torch.randint(-top, top, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def affine(dtype, group, offsets, n=N, k=K):
    """Scales and offsets (N, K / group), as they are kept beside `dtype`."""
    kept = scale_dtype(dtype)
    scales = (rand(n, k // group, seed=1).abs() * 0.02 + 0.001).to(kept)
    return scales, (rand(n, k // group, seed=2) * 0.05).to(kept) if offsets else None


def plain(codes, scales, offsets, dtype):
    """code * scale + offset, in fp32, rounded once."""
    group = codes.shape[1] // scales.shape[1]
    weight = codes.float() * scales.float().repeat_interleave(group, 1)
    if offsets is not None:
        weight = weight + offsets.float().repeat_interleave(group, 1)
    return weight.to(dtype)


def stored(weight, order):
    """Columns come in stored order; W in the order of the inputs."""
    return weight if order is None else weight[:, order.argsort()]


def permutation(act_order):
    return torch.randperm(K, generator=torch.Generator().manual_seed(9)) if act_order else None


def codebook(dtype, group=64, offsets=False, order=None, bias=None, bits=4):
    codes, (scales, off) = integers(bits), affine(dtype, group, offsets)
    layer = CodebookLinear((N, K), TWOS_COMPLEMENT, group, scale_dtype(dtype), dtype, CPU, bias, order, offsets)
    layer.fill(0, codes[:64], scales[:64], None if off is None else off[:64])
    layer.fill(64, codes[64:], scales[64:], None if off is None else off[64:])
    return layer, stored(plain(codes, scales, off, dtype), order)


def int8(dtype, group=64, offsets=False, order=None, bias=None):
    codes, (scales, off) = integers(8), affine(dtype, group, offsets)
    layer = Int8Linear((N, K), group, dtype, CPU, bias, order, offsets)
    layer.fill(0, codes[:64], scales[:64], None if off is None else off[:64])
    layer.fill(64, codes[64:], scales[64:], None if off is None else off[64:])
    return layer, stored(plain(codes, scales, off, dtype), order)


def int4(dtype=torch.bfloat16, group=64, offsets=False, order=None, bias=None, bits=4):
    codes, (scales, off) = integers(bits), affine(dtype, group, offsets)
    layer = Int4Linear((N, K), group, BLOCK, bias, order)
    layer.fill(0, codes[:64], scales[:64], None if off is None else off[:64])
    layer.fill(64, codes[64:], scales[64:], None if off is None else off[64:])
    return layer, stored(plain(codes, scales, off, dtype), order)


def dense(dtype, bias=None, prepare=False):
    weight = (rand(N, K) * 0.1).to(dtype)
    layer = DenseLinear(weight.clone(), bias)
    if prepare:
        layer.prepare()
    return layer, weight


def check(layer, weight, dtype, bias=None):
    """The dense form bit for bit; product and gradient as of that form, in fp32, within the dtype's rounding."""
    assert (layer.out_features, layer.in_features) == tuple(weight.shape)
    assert torch.equal(layer.dense(), weight)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for rows in ROWS:
        x = rand(rows, weight.shape[1], seed=3).to(dtype)
        dy = rand(rows, weight.shape[0], seed=4).to(dtype)
        expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        with torch.inference_mode():
            served = layer(x)
        leaf = x.clone().requires_grad_()
        learned = layer(leaf)
        learned.backward(dy)
        assert served.dtype == learned.dtype == leaf.grad.dtype == dtype
        assert torch.equal(served, learned), "a prompt is learned through another product than it is served by"
        assert (served.float() - expected).norm() <= bound * expected.norm()
        gradient = dy.float() @ weight.float()
        assert (leaf.grad.float() - gradient).norm() <= bound * gradient.norm()


@pytest.fixture(params=[False, True], ids=["in one block", "in many blocks"])
def blocks(request, monkeypatch):
    """Layers small enough for tests fit one block; the second time they do not."""
    if request.param:
        monkeypatch.setattr(packed, "BLOCK_WEIGHTS", {"cpu": 64 * K, "cuda": 64 * K})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.usefixtures("blocks")
class TestEveryPackedLayer:
    @pytest.mark.parametrize("group", [32, 64, 256])
    @pytest.mark.parametrize("biased", [False, True])
    def test_codebook(self, dtype, group, offsets, act_order, biased):
        bias = rand(N, seed=5).to(dtype) if biased else None
        check(*codebook(dtype, group, offsets, permutation(act_order), bias), dtype, bias)

    @pytest.mark.parametrize("group", [32, 64, 256])
    @pytest.mark.parametrize("biased", [False, True])
    def test_int8(self, dtype, group, offsets, act_order, biased):
        bias = rand(N, seed=5).to(dtype) if biased else None
        check(*int8(dtype, group, offsets, permutation(act_order), bias), dtype, bias)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("make", [codebook, pytest.param(int4, marks=needs_kernel)])
def test_fewer_bits_use_part_of_the_nibble(make, bits):
    check(*make(torch.bfloat16, bits=bits), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("blocks")
def test_nf4_blocks_walk_over_the_ends_of_rows(dtype):
    """96 inputs a row, blocks of 64: two rows share three blocks, and only pairs of rows can be unpacked alone."""
    n, k, block = 128, 96, 64
    codes = torch.randint(0, 16, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    absmax = rand(n * k // block, seed=1).abs() * 0.1
    layer = CodebookLinear((n, k), NF4_VALUES, block, torch.float32, dtype, CPU)
    assert layer.row_step == 2
    layer.fill(0, codes[:64], absmax[: 64 * k // block])
    layer.fill(64, codes[64:], absmax[64 * k // block :])
    weight = torch.tensor(NF4_VALUES)[codes.long()].view(-1, block) * absmax[:, None]
    check(layer, weight.view(n, k).to(dtype), dtype)


@pytest.mark.parametrize(("k", "block", "step"), [(64, 64, 1), (32, 64, 2), (7, 7, 2), (48, 64, 4), (256, 64, 1)])
def test_rows_that_a_codebook_unpacks_alone_fill_blocks_and_bytes(k, block, step):
    layer = CodebookLinear((64, k), NF4_VALUES, block, torch.float32, torch.float32, CPU)
    assert layer.row_step == step
    assert step * k % block == 0
    assert step * k % 2 == 0


@needs_kernel
class TestInt4:
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("offsets", [False, True])
    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.usefixtures("blocks")
    def test_products(self, group, offsets, act_order, biased):
        bias = rand(N, seed=5).bfloat16() if biased else None
        check(*int4(torch.bfloat16, group, offsets, permutation(act_order), bias), torch.bfloat16, bias)

    def test_our_layout_is_the_kernels(self):
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        assert torch.equal(interleave(codes, BLOCK), theirs.view(N, K // 2))
        assert BLOCK in BLOCKS

    def test_rows_of_a_middle_block(self):
        """`rows` once mixed up the halves of blocks with groups, unseen while one block had one group."""
        layer, weight = int4(group=32, offsets=True)
        for start in range(0, N, BLOCK):
            assert torch.equal(layer.rows(start, start + BLOCK), weight[start : start + BLOCK])
        assert torch.equal(layer.rows(0, N), weight)

    @pytest.mark.parametrize(("shape", "group"), [((N, K), 16), ((N, 96), 64), ((N + 1, K), 64)])
    def test_what_the_kernel_does_not_take(self, shape, group):
        with pytest.raises(ValueError, match="does not take"):
            Int4Linear(shape, group, BLOCK)


class TestInt8:
    def test_one_scale_a_row_uses_the_kernel_in_bf16_alone(self):
        assert int8(torch.bfloat16, K)[0].kernel
        assert not int8(torch.bfloat16, K, offsets=True)[0].kernel
        assert not int8(torch.bfloat16, 64)[0].kernel
        assert not int8(torch.float32, K)[0].kernel

    @pytest.mark.parametrize("k", [8, 24, 40])
    def test_widths_that_the_kernel_would_read_past(self, k):
        """torch's kernel reads 16 inputs at a time, whatever the width."""
        codes, (scales, _) = integers(8, 64, k), affine(torch.bfloat16, k, False, 64, k)
        layer = Int8Linear((64, k), k, torch.bfloat16, CPU)
        layer.fill(0, codes, scales)
        assert not layer.kernel
        check(layer, plain(codes, scales, None, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
class TestDense:
    @pytest.mark.parametrize("prepare", [False, True])
    def test_products(self, dtype, biased, prepare):
        bias = rand(N, seed=5).to(dtype) if biased else None
        check(*dense(dtype, bias, prepare), dtype, bias)

    def test_preparing_changes_where_weights_lie_and_not_what_they_are(self, dtype, biased):
        bias = rand(N, seed=5).to(dtype) if biased else None
        plainly, weight = dense(dtype, bias)
        prepared, _ = dense(dtype, bias, prepare=True)
        prepared.prepare()  # twice is once
        assert torch.equal(prepared.dense(), weight)
        if dtype == torch.float32:
            assert prepared.weight is not None
        for rows in ROWS:
            x = rand(rows, K, seed=3).to(dtype)
            torch.testing.assert_close(prepared(x), plainly(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_layers_stand_side_by_side(dtype):
    parts = [dense(dtype), codebook(dtype, offsets=True, order=permutation(True)), int8(dtype)]
    fused = FusedLinear([layer for layer, _ in parts])
    check(fused, torch.cat([weight for _, weight in parts]), dtype)
    before = fused.dense()
    fused.prepare()
    assert torch.equal(fused.dense(), before)
    check(fused, before, dtype)


@pytest.mark.parametrize("make", [dense, codebook, int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_never_get_a_gradient(make, dtype):
    layer, _ = make(dtype)
    layer.prepare()
    x = rand(4, K).to(dtype).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    assert all(b.grad is None for b in layer.buffers() if not b.is_mkldnn)


@pytest.mark.parametrize("make", [dense, codebook, int8])
def test_no_rows_give_no_rows(make):
    layer, _ = make(torch.float32)
    assert layer(torch.empty(0, K)).shape == (0, N)


def test_a_layer_says_what_it_lacks():
    for layer in (linear.Linear(), linear.OpaqueLinear()):
        with pytest.raises(TypeError, match="does not say"):
            layer(torch.empty(1, 1))
