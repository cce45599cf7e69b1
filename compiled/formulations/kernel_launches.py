"""Tiles and warps of the GPU kernels, given to Inductor at its own extension point.

Inductor's candidates for a product inside a kernel start at tiles that spill registers here, and
which of them wins is measured at run time. So the kernel that reads the words is launched as its
formulation says, and everybody sees the same kernel: the check of ``tox run -e codegen`` reads what
is shipped. All other kernels are launched as Inductor likes.

Source: ``InductorChoices.triton_kernel_kwargs`` of ``torch/_inductor/choices.py``, and
``triton.native_matmul`` of ``torch/_inductor/config.py``; torch 2.11 and later have both.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Launch", "launching", "native_matmul_is_missing"]

FUSE_ALL = {  # the terms stay in the kernel that reads the words, however often they are used
    "realize_acc_reads_threshold": 64,
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 200,
    "split_reductions": False,  # the adapters' first product is one kernel, however wide x is
}


@dataclass(frozen=True)
class Launch:
    """How the kernel that reads the words is launched.

    Args:
        outputs: outputs of a block of threads.
        words: words of a row that are taken at a time.
        warps: warps of a block.
        stages: depth of the pipeline of loads.
        tokens: tokens of a block where the kernel multiplies matrices; 0 where it sums.
    """

    outputs: int
    words: int
    warps: int
    stages: int
    tokens: int = 0


@functools.cache
def native_matmul_is_missing() -> str | None:
    """Return why this torch cannot multiply matrices inside a fused kernel, or None if it can."""
    config = importlib.import_module("torch._inductor.config")
    if not hasattr(config.triton, "native_matmul") or _choices_class() is None:
        return f"torch {torch.__version__} cannot fuse matrix products: 2.11 is needed"
    return None


def launching(launch: Launch, words_of_a_row: int) -> Callable[..., Any]:
    """Return a backend for torch.compile that launches one kernel as told.

    Args:
        launch: how.
        words_of_a_row: the length of the reduction by which that kernel is known.
    """
    patches: dict[str, Any] = dict(FUSE_ALL)
    if launch.tokens:
        patches["triton.native_matmul"] = True
    make = functools.partial(_make_choices, launch, words_of_a_row)
    chosen = _choices_class() is not None
    if chosen:
        patches["inductor_choices_class"] = make  # part of the key of Inductor's caches

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
        if not chosen:
            return compile_fx(graph, inputs, config_patches=patches)
        virtualized = importlib.import_module("torch._inductor.virtualized")
        with virtualized.V.set_choices_handler(make()):  # the option alone is read once a thread
            return compile_fx(graph, inputs, config_patches=patches)

    return compile_graph


def _make_choices(launch: Launch, words_of_a_row: int) -> Any:
    """Return Inductor's choices with one kernel's launch decided."""
    choices = _choices_class()
    assert choices is not None
    return choices(launch, words_of_a_row)


@functools.cache
def _choices_class() -> Any:
    """Return the class of choices, or None where this torch has no such extension point."""
    config = importlib.import_module("torch._inductor.config")
    choices = importlib.import_module("torch._inductor.choices")
    triton = importlib.import_module("torch._inductor.codegen.triton")
    there = (
        hasattr(config, "inductor_choices_class")
        and hasattr(choices.InductorChoices, "triton_kernel_kwargs")
        and hasattr(triton, "FixedTritonConfig")
    )
    if not there:
        return None

    class Choices(choices.InductorChoices):  # type: ignore[misc, name-defined]
        """Inductor's own choices but for the launch of the kernel that reads the words."""

        def __init__(self, launch: Launch, words_of_a_row: int) -> None:
            super().__init__()
            self.launch, self.words_of_a_row = launch, words_of_a_row

        def uuid(self) -> str:
            """Return what the compiled code depends on."""
            return f"int4-lora {asdict(self.launch)} {self.words_of_a_row}"

        def triton_kernel_kwargs(
            self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            """Return the arguments that a kernel is made with."""
            if not _sums_over(features, self.words_of_a_row):
                return kernel_kwargs
            return {
                **kernel_kwargs,
                "fixed_config": triton.FixedTritonConfig(_tiles(self.launch, self.words_of_a_row)),
                "override_persistent_reduction": False,
                "override_cooperative_reduction": False,
            }

    return Choices


def _tiles(launch: Launch, words_of_a_row: int) -> dict[str, int]:
    """Return a launch in Triton's names."""
    words = launch.words
    tiles = {"XBLOCK": launch.outputs}
    if launch.tokens:
        tiles["YBLOCK"] = launch.tokens
        while words_of_a_row % words and words > 16:
            words //= 2  # else both factors of the products are masked in every round
    return {**tiles, "R0_BLOCK": words, "num_warps": launch.warps, "num_stages": launch.stages}


def _sums_over(features: Any, length: int) -> bool:
    """Return whether a kernel's reduction has a length."""
    return features.is_reduction() and bool(features.reduction_numel == length)
