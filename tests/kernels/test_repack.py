"""The packed layout of int4 weights: what each word holds, and the way back, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference, repack
from tests.kernels.gptq import checkpoint

SHAPES = [(128, 128, 128), (256, 24, 32), (192, 136, 64), (192, 8, 128), (320, 264, 320), (640, 128, 256)]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_it_comes_back_bit_for_bit(inputs: int, outputs: int, group: int, zero_offset: int, act_order: bool) -> None:
    qweight, qzeros, scales, g_idx = checkpoint(inputs, outputs, group, act_order=act_order)
    packed = repack.pack_gptq(qweight, qzeros, scales, g_idx, zero_offset)
    assert packed.words.shape == (-(-inputs // 128), -(-outputs // 128) * 128, 16) and packed.words.is_contiguous()
    back = repack.unpack_gptq(packed, zero_offset)
    assert torch.equal(back.qweight, qweight) and torch.equal(back.qzeros, qzeros) and torch.equal(back.scales, scales)
    if g_idx is not None and packed.order is not None:
        assert back.g_idx is not None and torch.equal(back.g_idx, g_idx) and back.g_idx.dtype == torch.int32
    again = repack.PackedInt4.from_tensors(packed.tensors(), inputs, outputs, group)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), packed.tensors().values(), strict=True))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_it_is_the_same_weight(inputs: int, outputs: int, group: int, act_order: bool) -> None:
    tensors = checkpoint(inputs, outputs, group, act_order=act_order)
    packed = repack.pack_gptq(*tensors, 1)
    want = reference.gptq_dequantize(*tensors, 4, 1)
    want = want if packed.order is None else want[:, packed.order.long()]
    assert torch.equal(repack.dequantize(packed), want)


def test_a_word_holds_what_the_layout_says() -> None:
    """Input 32 j + 2 r + h of output 5 alone is 15: bits 4 (j + 4 h) + 3 and up of word r, round the end."""
    for j, r, h in ((0, 0, 0), (1, 7, 0), (2, 15, 1), (3, 3, 0), (3, 9, 1)):
        levels = torch.zeros(128, 8, dtype=torch.int64)
        levels[32 * j + 2 * r + h, 5] = 15
        qweight = torch.stack([sum((levels[8 * w + i] << 4 * i for i in range(8)), torch.zeros(8, dtype=torch.int64))
                               for w in range(16)]).to(torch.int32)  # fmt: skip
        packed = repack.pack_gptq(qweight, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), None, 0)
        bits = 15 << (4 * (j + 4 * h) + 3)
        want = (bits | bits >> 32) & 0xFFFFFFFF
        assert packed.words[0, 5, r].item() & 0xFFFFFFFF == want
        assert packed.words.count_nonzero() == 1


def test_symmetric_zero_points_take_no_room() -> None:
    packed = repack.pack_gptq(*checkpoint(128, 128, 128, symmetric=True), 1)
    assert packed.zeros is None and packed.order is None
    assert packed.nbytes == 128 * 128 // 2 + 128 * 2


def test_magic_numbers_make_floats() -> None:
    """What the kernels rely on, in both dtypes: the word's pair of nibbles becomes base + level."""
    levels = torch.arange(16, dtype=torch.int32)
    for magic, dtype, base in ((0x5800, torch.float16, 128), (0x4180, torch.bfloat16, 16)):
        assert torch.equal((levels << 3 | magic).to(torch.int16).view(dtype).float(), levels + float(base))


def test_what_it_cannot_hold_is_said() -> None:
    qweight, qzeros, scales, _ = checkpoint(128, 16, 32)
    assert repack.unsupported(qweight, scales, None, 8) == "8 bits"
    assert repack.unsupported(qweight, torch.ones(8, 16), None, 4) == "groups of 16"
    uneven = torch.tensor([0] * 40 + [1] * 24 + [2] * 32 + [3] * 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="groups of unequal size has no packed form"):
        repack.pack_gptq(qweight, qzeros, scales, uneven, 1)
    packed = repack.pack_gptq(qweight, qzeros, scales, None, 1)
    with pytest.raises(ValueError, match=r"packed words is torch.int32 \(1, 128, 16\); expected torch.int32 \(2,"):
        repack.PackedInt4.from_tensors(packed.tensors(), 256, 16, 32)
    with pytest.raises(ValueError, match="lacks scales"):
        repack.PackedInt4.from_tensors({"words": packed.words}, 128, 16, 32)
    with pytest.raises(ValueError, match="holds 'bias'"):
        repack.PackedInt4.from_tensors({"bias": scales}, 128, 16, 32)
