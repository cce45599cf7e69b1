"""Loading the tensors of experts, of which vLLM does not notice that one is missing or cut.

vLLM copies the tensors of one module after the other into a parameter for all experts. What no
tensor was copied to stays as it was allocated, and a tensor that is too small fills a part.

Source: vLLM's ``RoutedExperts.weight_loader``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int4_lora.integration.vllm_plugin.loading import keeping_scale_dtype

__all__ = ["ExpertsLoader"]


class ExpertsLoader:
    """vLLM's loader of the experts of a layer, which compares shapes and knows what was loaded.

    Args:
        load: vLLM's loader.
        layer: the name of the layer.
        names: the last name of the module of each shard: of w1, the gate, w2, down, and w3, up.
        ranks: over how many ranks each expert is split.
        scale_dtypes: each dtype of scales that is loaded is added to it.
    """

    supports_moe_loading = True  # vLLM's models ask the loader of a parameter

    def __init__(
        self,
        load: Callable[..., Any],
        layer: str,
        names: Mapping[str, str],
        ranks: int,
        scale_dtypes: set[torch.dtype],
    ) -> None:
        self._load = keeping_scale_dtype(load, scale_dtypes)
        self.layer, self.names, self.ranks = layer, names, ranks
        self._loaded: set[tuple[str, str, int]] = set()

    def __call__(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> Any:
        """Load a tensor of one module of an expert.

        Raises:
            ValueError: it has another shape than those of the first expert, or than vLLM allocated.
        """
        tensor = _tensor_of(weight_name)
        if tensor != "weight_shape":
            expected = self._shape(param, shard_id)
            if list(loaded_weight.shape) != expected:
                raise ValueError(
                    f"{self._module(shard_id, expert_id)}.{tensor} must be {expected} as of all "
                    f"experts of the layer, got {list(loaded_weight.shape)}"
                )
        done = self._load(
            param,
            loaded_weight,
            weight_name,
            shard_id=shard_id,
            expert_id=expert_id,
            return_success=return_success,
        )
        self._loaded.add((tensor, shard_id, expert_id))
        return done

    def check_complete(self, tensors: tuple[str, ...], experts: int) -> None:
        """Check that every tensor of every expert was loaded; forget which were.

        Args:
            tensors: their names in a module.
            experts: how many there are.

        Raises:
            ValueError: one was not; the message names it.
        """
        missing = [
            f"{self._module(shard, expert)}.{tensor}"
            for expert in range(experts)
            for shard in self.names
            for tensor in tensors
            if (tensor, shard, expert) not in self._loaded
        ]
        self._loaded.clear()
        if missing:
            raise ValueError(
                f"int4_lora: the checkpoint lacks {len(missing)} tensors of the experts of "
                f"{self.layer}; the first is {missing[0]}"
            )

    def _module(self, shard: str, expert: int) -> str:
        return f"{self.layer}.{expert}.{self.names[shard]}"

    def _shape(self, param: nn.Parameter, shard: str) -> list[int]:
        """Return the shape of a module's tensor in the checkpoint."""
        rows, columns = param.shape[1:]
        if shard == "w2":
            split = not getattr(param, "whole_on_each_rank", False)
            return [rows, columns * self.ranks if split else columns]
        return [rows // 2 * self.ranks, columns]


def _tensor_of(weight_name: str) -> str:
    """Return the name of a tensor in its module.

    Example:
        >>> _tensor_of("model.layers.0.mlp.experts.w13_weight_packed")
        'weight_packed'
    """
    return weight_name.rpartition("w13_")[2].rpartition("w2_")[2]
