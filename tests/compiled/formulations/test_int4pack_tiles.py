"""Blocks of torch's INT4 layout dequantise to the same bits as in the reference."""

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.compiled.formulations import int4pack_tiles
from int4_lora.compiled.formulations.int4pack_tiles import Tile
from int4_lora.compiled.layouts.int4pack import block_rows
from int4_lora.reference import PackedWeight, dequantize, pack
from support.weights import bits_of, random_weight, random_x

pytestmark = pytest.mark.skipif(block_rows() is None, reason="a CPU whose layout is not known")


def in_order(parts, block):
    """Return the result of ``paired`` as rows of the weight, in order."""
    columns = parts.shape[1]
    pairs = parts.transpose(1, 2).reshape(-1, block // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(-1, columns)


def every_scale(rows, groups):
    """Return bfloat16 scales: first the special values, then many others."""
    patterns = torch.arange(0, 2**16, 2**16 // (rows * groups) or 1, dtype=torch.int32)
    special = torch.tensor([0x7F80, -0x80, 0x7FC0, 0x7FFF, -1, 0, -0x8000, 1, 0x7F7F, 0x0080])
    chosen = torch.cat([special, patterns])[: rows * groups]
    return chosen.to(torch.int16).view(torch.bfloat16).view(rows, groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_scale_in_bfloat16_is_rounded_like_the_reference(compiled, dtype):
    rows, columns, groups = 2 * block_rows(), 4096, 128
    codes = (torch.arange(rows * columns) * 7 % 16 - 8).to(torch.int8).view(rows, columns)
    weight = PackedWeight(pack(codes), every_scale(rows, groups), (rows, columns))
    prepared = prepare(weight, layout="int4pack")

    def decode(given):
        scales, tile = int4pack_tiles.scales_of(given), Tile(0, 2, 1)
        if dtype == torch.bfloat16:
            return int4pack_tiles.paired(given, tile, scales)
        return int4pack_tiles.in_rows(given, tile, scales, dtype)

    dense = (torch.compile(decode) if compiled else decode)(prepared)
    assert dense.dtype == dtype
    if dtype == torch.bfloat16:
        mine = in_order(dense, prepared.block)
    else:
        mine = dense.transpose(1, 2).flatten(0, 1).to(torch.bfloat16)
    theirs = dequantize(weight)
    nan, zero = theirs.isnan(), theirs == 0  # with a scale of -0, zeros lose their sign
    assert torch.equal(mine.isnan(), nan)
    assert torch.equal(mine[zero], theirs[zero])
    assert torch.equal(bits_of(mine)[~nan & ~zero], bits_of(theirs)[~nan & ~zero])
    assert nan.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_rounded_like_the_reference(dtype, compiled):
    weight = random_weight(rows=2 * block_rows() + 16, columns=256, dtype=dtype)
    prepared = prepare(weight, layout="int4pack")

    def decode(part):
        return int4pack_tiles.decoded(part, torch.float32)

    decode = torch.compile(decode) if compiled else decode
    ends = [(block_rows(), 2 * block_rows()), (2 * block_rows(), 2 * block_rows() + 16)]
    for start, stop in ends:
        dense = decode(prepared.part(start, stop)).T
        assert torch.equal(dense, dequantize(weight)[start:stop].float())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [16, 48, 64, 112, 192, 208, 448])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_of_any_number_of_rows(rows, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = random_weight(rows=rows, columns=128, dtype=torch.bfloat16)
    prepared = prepare(weight, layout="int4pack")
    x = torch.eye(128)[:5].to(dtype)  # one-hot: the outputs are weights
    for blocks in (0, 1, 2, 100):
        y = int4pack_tiles.base(x, prepared, blocks * prepared.block * 128 * dtype.itemsize)
        assert torch.equal(y, dequantize(weight).to(dtype).T[:5])
    assert int4pack_tiles.base(random_x(3, 128, dtype), prepared, 64).shape == (3, rows)


@pytest.mark.parametrize(
    ("blocks", "threads", "most", "tiles"),
    [
        (8, 2, 2, [(0, 2, 2), (4, 2, 2)]),
        (9, 2, 2, [(0, 2, 2), (4, 2, 2), (8, 1, 1)]),
        (7, 2, 100, [(0, 2, 3), (6, 1, 1)]),
        (3, 4, 100, [(0, 3, 1)]),
        (11, 4, 2, [(0, 4, 2), (8, 3, 1)]),
        (0, 2, 2, []),
    ],
)
def test_tiles_have_a_part_for_each_thread(blocks, threads, most, tiles):
    assert int4pack_tiles._tiles(blocks, threads, most) == [Tile(*one) for one in tiles]
