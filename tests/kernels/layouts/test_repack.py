"""The packed layouts of int4 and int8 weights: what each word holds, and the way back, bit for bit."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference
from qvl_kernels.layouts import gpu as gpu_layout
from qvl_kernels.layouts import interleave, repack
from tests.kernels.gptq import checkpoint

SHAPES = [(128, 128, 128), (256, 24, 32), (192, 136, 64), (192, 8, 128), (320, 264, 320), (640, 128, 256)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_it_comes_back_bit_for_bit(
    inputs: int, outputs: int, group: int, zero_offset: int, act_order: bool, bits: int
) -> None:
    qweight, qzeros, scales, g_idx = checkpoint(inputs, outputs, group, bits=bits, act_order=act_order)
    bias, tile = torch.randn(outputs), 512 // bits
    packed = repack.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    words = packed.tensors["words"]
    assert packed.layout == {4: "gpu-1", 8: "gpu-int8-1"}[bits]
    assert words.shape == (-(-inputs // tile), -(-outputs // 128) * 128, 16) and words.is_contiguous()
    back = repack.unpack_gptq(packed)
    given = reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    if "order" not in packed.tensors:
        given.tensors.pop("g_idx", None)
    assert back.layout == "gptq" and back.fields == given.fields and set(back.tensors) == set(given.tensors)
    for name, tensor in given.tensors.items():
        assert torch.equal(back.tensors[name], tensor) and back.tensors[name].dtype == tensor.dtype, name
    assert torch.equal(repack.unpack_to_qweight(packed), qweight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_it_is_the_same_weight(inputs: int, outputs: int, group: int, act_order: bool, bits: int) -> None:
    tensors = checkpoint(inputs, outputs, group, bits=bits, act_order=act_order)
    packed = repack.packed(gpu_layout.KINDS[bits], *tensors, 1)
    want = reference.gptq_dequantize(*tensors, bits, 1)
    want = want if packed.perm is None else want[:, packed.perm.long()]
    assert torch.equal(repack.dequantize(packed), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_are_laid_out_some_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = checkpoint(320, 264, 64, bits=bits)[0]
    whole = interleave.to_tiles(qweight, bits, 384)
    monkeypatch.setattr(interleave, "_OUTPUTS_AT_ONCE", 96)  # the last piece has 72
    assert torch.equal(interleave.to_tiles(qweight, bits, 384), whole) and not whole[:, 264:].any()
    assert torch.equal(interleave.from_tiles(whole, bits, 264)[: len(qweight)], qweight)


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_in_another_order(bits: int) -> None:
    qweight, places = checkpoint(320, 264, 64, bits=bits)[0], torch.randperm(320)
    levels = reference.unpack_rows(interleave.permute_inputs(qweight, bits, places), bits)
    assert torch.equal(levels, reference.unpack_rows(qweight, bits)[places])


def test_a_word_holds_what_the_layout_says() -> None:
    """Input 32 j + 2 r + h of output 5 alone is 15: bits 4 (j + 4 h) + 3 and up of word r, round the end."""
    for j, r, h in ((0, 0, 0), (1, 7, 0), (2, 15, 1), (3, 3, 0), (3, 9, 1)):
        levels = torch.zeros(128, 8, dtype=torch.int64)
        levels[32 * j + 2 * r + h, 5] = 15
        qweight = torch.stack(
            [sum((levels[8 * w + i] << 4 * i for i in range(8)), torch.zeros(8, dtype=torch.int64)) for w in range(16)]
        ).to(torch.int32)
        packed = repack.packed_int4(qweight, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), None, 0)
        bits = 15 << (4 * (j + 4 * h) + 3)
        want = (bits | bits >> 32) & 0xFFFFFFFF
        assert packed.words[0, 5, r].item() & 0xFFFFFFFF == want
        assert packed.words.count_nonzero() == 1


def test_a_word_of_8_bits_holds_what_the_layout_says() -> None:
    """Input 64 + 32 j + 2 r + h of output 5 alone is 255: byte j + 2 h of word r of the second tile."""
    for j, r, h in ((0, 0, 0), (1, 7, 0), (0, 15, 1), (1, 3, 1)):
        levels = torch.zeros(128, 8, dtype=torch.uint8)
        levels[64 + 32 * j + 2 * r + h, 5] = 255
        qweight = levels.view(32, 4, 8).transpose(1, 2).contiguous().view(torch.int32)[..., 0]
        packed = repack.packed(gpu_layout.PackedInt8, qweight, torch.zeros(1, 2).int(), torch.ones(1, 8), None, 0)
        assert packed.words[1, 5, r].item() & 0xFFFFFFFF == 255 << 8 * (j + 2 * h)
        assert packed.words.count_nonzero() == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_zero_points_take_no_room(bits: int) -> None:
    packed = repack.packed(gpu_layout.KINDS[bits], *checkpoint(128, 128, 128, bits=bits, symmetric=True), 1)
    assert packed.zeros is None and packed.perm is None
    assert packed.nbytes == 128 * 128 * bits // 8 + 128 * 2


def test_magic_numbers_make_floats() -> None:
    """What the kernels rely on, in both dtypes: the word's pair of nibbles becomes base + level."""
    levels = torch.arange(16, dtype=torch.int32)
    for magic, dtype, base in ((0x5800, torch.float16, 128), (0x4180, torch.bfloat16, 16)):
        assert torch.equal((levels << 3 | magic).to(torch.int16).view(dtype).float(), levels + float(base))
    levels = torch.arange(256, dtype=torch.int32)
    assert torch.equal((levels | 0x6400).to(torch.int16).view(torch.float16).float(), levels + 1024.0)
    assert torch.equal((levels | 0x4B000000).view(torch.float32), levels + 2.0**23)
    apart = (levels[:, None] - levels).float()  # level less zero point
    assert torch.equal(apart.bfloat16().float(), apart) and torch.equal(apart.half().float(), apart)


def test_what_it_cannot_hold_is_said() -> None:
    qweight, qzeros, scales, _ = checkpoint(128, 16, 32)
    assert repack.unsupported(qweight, scales, None, 2) == "2 bits"
    stored = torch.full((4, 4), -1, dtype=torch.int32)  # of zero points 256
    words = torch.zeros(32, 16, dtype=torch.int32)
    assert repack.pack_gptq(words, stored, scales, None, 8, 1).layout == "gptq"
    assert repack.pack_gptq(words, stored, scales, None, 8, 0).layout == "gpu-int8-1"
    assert repack.unsupported(qweight, torch.ones(8, 16), None, 4) == "groups of 16"
    uneven = torch.tensor([0] * 40 + [1] * 24 + [2] * 32 + [3] * 32, dtype=torch.int32)
    assert repack.pack_gptq(qweight, qzeros, scales, uneven, 4, 1).layout == "gptq"
    with pytest.raises(ValueError, match="groups of unequal size has no packed form"):
        repack.packed_int4(qweight, qzeros, scales, uneven, 1)


def test_files_of_another_layout_or_shape_are_refused() -> None:
    packed = repack.pack_gptq(*checkpoint(128, 16, 32), 4, 1)
    with pytest.raises(ValueError, match="read the layout 'gpu-1'; found 'cpu-1'"):
        gpu_layout.PackedInt4.from_packed(packed._replace(layout="cpu-1"))
    with pytest.raises(ValueError, match=r"packed words is torch.int32 \(1, 128, 16\); expected torch.int32 \(2,"):
        gpu_layout.PackedInt4.from_packed(packed._replace(fields=packed.fields | {"inputs": 256}))
    with pytest.raises(ValueError, match="read the layout 'gpu-int8-1'; found 'gpu-1'"):
        gpu_layout.PackedInt8.from_packed(packed)
    with pytest.raises(ValueError, match="read the layouts 'gpu-1' and 'gpu-int8-1'; found 'cpu-1'"):
        repack.unpack_gptq(packed._replace(layout="cpu-1"))
    with pytest.raises(ValueError, match="lacks scales"):
        gpu_layout.PackedInt4.from_packed(packed._replace(tensors={"words": packed.tensors["words"]}))
