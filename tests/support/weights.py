"""Packed weights of every format the reference takes, whose groups all differ."""

import itertools

import torch

from int4_lora.reference import Float4Weight, LoRAStack, PackedWeight, pack

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("tensor", "channel", "group", "block", "g_idx", "g_idx_unbalanced", "g_idx_minus_one")


def random_weight(
    layout="group",
    *,
    rows=13,
    columns=44,
    groups=4,
    block=(5, 8),
    bits=4,
    symmetric=True,
    dtype=torch.float32,
    seed=0,
):
    """Return a random weight; widths are ragged in both dimensions by default."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=generator).to(torch.int8)
    table = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": (-(-rows // block[0]), -(-columns // block[1])),
    }.get(layout, (rows, groups))
    scale = (torch.rand(table, generator=generator) + 0.1) * 0.05
    zero_point = torch.randint(low, high, table, generator=generator).to(torch.int8)
    if layout not in ("tensor", "block"):
        zero_point = pack(zero_point, bits=bits, dim=0)
    return PackedWeight(
        packed=pack(codes, bits=bits),
        scale=scale.to(dtype),
        shape=(rows, columns),
        zero_point=None if symmetric else zero_point,
        g_idx=random_g_idx(layout, columns, groups, generator),
        group_size=block if layout == "block" else None,
        bits=bits,
    )


def random_float4(name="nvfp4", *, rows=13, columns=64, seed=0):
    """Return a random FP4 weight of every code, whose groups all differ."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (rows, columns // 2), generator=generator).to(torch.uint8)
    if name == "mxfp4":
        scale = torch.randint(118, 128, (rows, columns // 32), generator=generator)
        return Float4Weight(packed, scale.to(torch.uint8), (rows, columns))
    scale = torch.randint(0x28, 0x7E, (rows, columns // 16), generator=generator).to(torch.uint8)
    global_scale = torch.tensor([2688 / 0.7])
    return Float4Weight(packed, scale.view(torch.float8_e4m3fn), (rows, columns), global_scale)


def random_g_idx(layout, columns, groups, generator):
    """Return a g_idx for the layouts that have one, else None."""
    if not layout.startswith("g_idx"):
        return None
    if layout == "g_idx_unbalanced":
        return torch.randint(groups, (columns,), generator=generator).to(torch.int32)
    order = torch.randperm(columns, generator=generator)
    g_idx = (order // (columns // groups)).to(torch.int32)
    if layout == "g_idx_minus_one":
        g_idx[columns // 2] = -1
    return g_idx


def every_format():
    """Return (name, arguments of random_weight) of every format, for parameterized."""
    return [
        (
            f"{layout}_{'sym' if symmetric else 'asym'}_{bits}bit_{name}",
            {"layout": layout, "symmetric": symmetric, "bits": bits, "dtype": dtype},
        )
        for layout, symmetric, bits, (name, dtype) in itertools.product(
            LAYOUTS, (True, False), (4, 8), SCALE_DTYPES.items()
        )
    ]


def random_stack(
    *, adapters=3, rank=4, rows=13, columns=44, dtype=torch.float32, seed=1, scalings=None
):
    """Return random adapters, their ranks falling from ``rank`` and their scalings differing."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(adapters):
        own = max(1, rank - index)
        a = torch.randn(own, columns, generator=generator).to(dtype)
        b = torch.randn(rows, own, generator=generator).to(dtype)
        pairs.append((a, b, scalings[index] if scalings else (2 / 3, 2.0, 0.37, -1.5)[index % 4]))
    return LoRAStack.stack(pairs)


def narrow(stack, rows, start=0):
    """Return the adapters of ``rows`` outputs of a stack, from ``start``."""
    return LoRAStack(stack.a, stack.b[:, start : start + rows], stack.scaling)


def random_x(tokens=6, columns=44, dtype=torch.float32, seed=2):
    """Return random activations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def bits_of(tensor):
    """Return a float tensor's bit patterns, so that NaN and the sign of zero compare."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)
