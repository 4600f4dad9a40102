"""The packed layouts of int4 and int8 weights: the contents of each word, and unpacking bit for bit."""

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
def test_unpacking_restores_every_bit(
    inputs: int, outputs: int, group: int, zero_offset: int, act_order: bool, bits: int
) -> None:
    qweight, qzeros, scales, g_idx = checkpoint(inputs, outputs, group, bits=bits, act_order=act_order)
    bias, tile = torch.randn(outputs), 512 // bits
    packed = repack.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    words = packed.tensors["words"]
    assert packed.layout == {4: "gpu-1", 8: "gpu-int8-1"}[bits]
    assert words.shape == (-(-inputs // tile), -(-outputs // 128) * 128, 16) and words.is_contiguous()
    back = repack.unpack_gptq(packed)
    published = reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    if "order" not in packed.tensors:
        published.tensors.pop("g_idx", None)
    assert back.layout == "gptq" and back.fields == published.fields
    assert set(back.tensors) == set(published.tensors)
    for name, tensor in published.tensors.items():
        assert torch.equal(back.tensors[name], tensor) and back.tensors[name].dtype == tensor.dtype, name
    assert torch.equal(repack.unpack_to_qweight(packed), qweight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, outputs, group", SHAPES)
def test_dequantize_returns_the_published_weight(
    inputs: int, outputs: int, group: int, act_order: bool, bits: int
) -> None:
    tensors = checkpoint(inputs, outputs, group, bits=bits, act_order=act_order)
    packed = repack.packed(gpu_layout.KINDS[bits], *tensors, 1)
    want = reference.gptq_dequantize(*tensors, bits, 1)
    want = want if packed.perm is None else want[:, packed.perm.long()]
    assert torch.equal(repack.dequantize(packed), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("at_once", [96 * 16, 264 * 16, 2 * 264 * 16, 1 << 24])  # slices; 1, 2, all of 3 tiles
def test_pieces_of_any_size_give_the_same_words(bits: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight = checkpoint(320 * 4 // bits, 264, 64, bits=bits)[0]
    monkeypatch.setattr(interleave, "_WORDS_AT_ONCE", {"cpu": 264 * 8})
    whole = interleave.to_tiles(qweight, bits, 384)
    monkeypatch.setattr(interleave, "_WORDS_AT_ONCE", {"cpu": at_once})
    assert torch.equal(interleave.to_tiles(qweight, bits, 384), whole) and not whole[:, 264:].any()
    assert torch.equal(interleave.from_tiles(whole, bits, 264)[: len(qweight)], qweight)


@pytest.mark.parametrize("bits", [4, 8])
def test_permute_inputs(bits: int) -> None:
    qweight, perm = checkpoint(320, 264, 64, bits=bits)[0], torch.randperm(320)
    codes = reference.unpack_rows(interleave.permute_inputs(qweight, bits, perm), bits)
    assert torch.equal(codes, reference.unpack_rows(qweight, bits)[perm])


def test_the_layout_of_a_4_bit_word() -> None:
    """Only input 32 j + 2 r + h of output 5 is 15: word r from bit 4 (j + 4 h) + 3, wrapping around."""
    for j, r, h in ((0, 0, 0), (1, 7, 0), (2, 15, 1), (3, 3, 0), (3, 9, 1)):
        codes = torch.zeros(128, 8, dtype=torch.int64)
        codes[32 * j + 2 * r + h, 5] = 15
        qweight = torch.stack(
            [sum((codes[8 * w + i] << 4 * i for i in range(8)), torch.zeros(8, dtype=torch.int64)) for w in range(16)]
        ).to(torch.int32)
        packed = repack.packed_int4(qweight, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), None, 0)
        bits = 15 << (4 * (j + 4 * h) + 3)
        want = (bits | bits >> 32) & 0xFFFFFFFF
        assert packed.words[0, 5, r].item() & 0xFFFFFFFF == want  # type: ignore[operator]
        assert packed.words.count_nonzero() == 1


def test_the_layout_of_an_8_bit_word() -> None:
    """Only input 64 + 32 j + 2 r + h of output 5 is 255: byte j + 2 h of word r of the second tile."""
    for j, r, h in ((0, 0, 0), (1, 7, 0), (0, 15, 1), (1, 3, 1)):
        codes = torch.zeros(128, 8, dtype=torch.uint8)
        codes[64 + 32 * j + 2 * r + h, 5] = 255
        qweight = codes.view(32, 4, 8).transpose(1, 2).contiguous().view(torch.int32)[..., 0]
        packed = repack.packed(gpu_layout.PackedInt8, qweight, torch.zeros(1, 2).int(), torch.ones(1, 8), None, 0)
        assert packed.words[1, 5, r].item() & 0xFFFFFFFF == 255 << 8 * (j + 2 * h)  # type: ignore[operator]
        assert packed.words.count_nonzero() == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_zero_points_are_not_stored(bits: int) -> None:
    packed = repack.packed(gpu_layout.KINDS[bits], *checkpoint(128, 128, 128, bits=bits, symmetric=True), 1)
    assert packed.zeros is None and packed.perm is None
    assert packed.nbytes == 128 * 128 * bits // 8 + 128 * 2


def test_magic_numbers_make_floats() -> None:
    """The kernels rely on this in both dtypes: a code in the mantissa of the magic number is base + code."""
    codes = torch.arange(16, dtype=torch.int32)
    for magic, dtype, base in ((0x5800, torch.float16, 128), (0x4180, torch.bfloat16, 16)):
        assert torch.equal((codes << 3 | magic).to(torch.int16).view(dtype).float(), codes + float(base))
    codes = torch.arange(256, dtype=torch.int32)
    assert torch.equal((codes | 0x6400).to(torch.int16).view(torch.float16).float(), codes + 1024.0)
    assert torch.equal((codes | 0x4B000000).view(torch.float32), codes + 2.0**23)
    differences = (codes[:, None] - codes).float()  # code minus zero point
    assert torch.equal(differences.bfloat16().float(), differences)
    assert torch.equal(differences.half().float(), differences)


def test_unsupported_linears_are_reported() -> None:
    qweight, qzeros, scales, _ = checkpoint(128, 16, 32)
    assert repack.unsupported(qweight, scales, None, 2) == "2 bits"
    stored_zeros = torch.full((4, 4), -1, dtype=torch.int32)  # 255, zero points of 256
    qweight_8bit = torch.zeros(32, 16, dtype=torch.int32)
    assert repack.pack_gptq(qweight_8bit, stored_zeros, scales, None, 8, 1).layout == "gptq"
    assert repack.pack_gptq(qweight_8bit, stored_zeros, scales, None, 8, 0).layout == "gpu-int8-1"
    assert repack.unsupported(qweight, torch.ones(8, 16), None, 4) == "groups of 16"
    uneven = torch.tensor([0] * 40 + [1] * 24 + [2] * 32 + [3] * 32, dtype=torch.int32)
    assert repack.pack_gptq(qweight, qzeros, scales, uneven, 4, 1).layout == "gptq"
    with pytest.raises(ValueError, match="groups of unequal size has no packed form"):
        repack.packed_int4(qweight, qzeros, scales, uneven, 1)


def test_packed_tensors_of_another_layout_or_shape_are_rejected() -> None:
    packed = repack.pack_gptq(*checkpoint(128, 16, 32), 4, 1)
    with pytest.raises(ValueError, match="read the layout 'gpu-1'; found 'cpu-1'"):
        gpu_layout.PackedInt4.from_packed(packed._replace(layout="cpu-1"))
    with pytest.raises(ValueError, match=r"has words int32 \[1, 128, 16\]; expected contiguous int32 \[2, 128, 16\]"):
        gpu_layout.PackedInt4.from_packed(packed._replace(fields=packed.fields | {"inputs": 256}))
    with pytest.raises(ValueError, match="read the layout 'gpu-int8-1'; found 'gpu-1'"):
        gpu_layout.PackedInt8.from_packed(packed)
    with pytest.raises(ValueError, match="read the layouts 'gpu-1' and 'gpu-int8-1'; found 'cpu-1'"):
        repack.unpack_gptq(packed._replace(layout="cpu-1"))
    with pytest.raises(ValueError, match="lacks 'scales'"):
        gpu_layout.PackedInt4.from_packed(packed._replace(tensors={"words": packed.tensors["words"]}))
