"""The activation order of a layer's columns, which all modules merged into the layer must share.

Source: vLLM's ``make_online_process_loader``, which calls loaders of weights that are loaded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ColumnOrder"]


class ColumnOrder:
    """Loads the group of each column of a layer, once for each module merged into it.

    Args:
        layer: the layer's name.
        tensor: the name of the checkpoint's tensor.
        modules: the number of modules merged into the layer.
        usual: int32 ``[in_features]``, the only values that are taken, or None for any.
    """

    def __init__(
        self, layer: str, tensor: str, modules: int = 1, usual: Tensor | None = None
    ) -> None:
        self.layer, self.tensor, self.modules, self.usual = layer, tensor, modules, usual
        self._order: Tensor | None = None
        self._loads = 0

    def load(self, param: nn.Parameter, loaded: Tensor, *shard: Any, **named_shard: Any) -> None:
        """Take the order of a module; a parameter's ``weight_loader``.

        Where weights are loaded again, vLLM first loads into the device meta and counts the copied
        elements. Nothing is copied there: the order of every merged module would count, and vLLM
        would take the layer for complete before its last tensors.

        Args:
            param: int32 ``[in_features]``.
            loaded: the checkpoint's tensor.
            shard: which of the merged modules it belongs to; absent if it belongs to the layer.
            named_shard: the same by name.

        Raises:
            ValueError: the order is not the usual one, or not that of the module before.
        """
        if param.is_meta:
            return
        order = loaded.to(param.device, param.dtype)
        if self.usual is not None and not torch.equal(order, self.usual.to(param.device)):
            raise ValueError(
                f"int4_lora: {self.layer}: {self.tensor} must number the groups in column order "
                "where config.json says desc_act false"
            )
        if self._order is not None and not torch.equal(self._order, order):
            raise ValueError(
                f"int4_lora: the modules that vLLM merges into {self.layer} have different "
                f"{self.tensor}, and the merged layer can have only one: quantise without an "
                "activation order, or serve a dense model (int4-lora unpack)"
            )
        self._order = order
        self._loads += 1 if shard or named_shard else self.modules

    def take(self) -> Tensor | None:
        """Return the order that was loaded, None for column order; the next load begins anew.

        Raises:
            ValueError: some of the merged modules have an order, and others none.
        """
        order, loads = self._order, self._loads
        self._order, self._loads = None, 0
        if 0 < loads < self.modules:
            raise ValueError(
                f"int4_lora: {loads} of the {self.modules} modules that vLLM merges into "
                f"{self.layer} have a {self.tensor}, and the merged layer can have only one: "
                "quantise all of them alike"
            )
        return order
