"""Check that an adapter's matrices fit a weight.

delta = B A, so that B has the rows of the weight and A its columns.

Source: arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from int4_lora.integration.adapter.adapter import Adapter

__all__ = ["check_shape"]


def check_shape(adapter: Adapter, name: str, out_features: int, in_features: int) -> None:
    """Check that an adapter's pair of matrices fits a weight ``[out_features, in_features]``.

    Args:
        adapter: an adapter.
        name: one of its modules.
        out_features: rows of the weight.
        in_features: columns of the weight.

    Raises:
        ValueError: the pair does not fit; the message names both shapes.
    """
    module = adapter.modules[name]
    shape = (module.b.shape[0], module.a.shape[1])
    if shape != (out_features, in_features):
        raise ValueError(
            f"{adapter.path}: {name}: the adapter is for a weight of {list(shape)}, "
            f"the base has [{out_features}, {in_features}]"
        )
