"""Launch one GPU kernel with fixed tiles and warps, through Inductor's own extension point.

Inductor measures its candidate launches at run time and keeps the fastest, so the kernel that runs
is not known in advance. Here the formulation fixes the launch of the kernel that reads the words,
so that the kernel which ``tox run -e codegen`` checks is the one that runs. Inductor chooses the
launch of all other kernels.

Source: ``InductorChoices.triton_kernel_kwargs`` of ``torch/_inductor/choices.py``, in torch 2.11
and later.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Launch", "launching"]

FUSE_ALL = {  # keeps the terms in the kernel that reads the words, however often they are used
    "realize_acc_reads_threshold": 64,
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 200,
    "split_reductions": False,  # keeps the adapters' first product one kernel, however wide x is
}


@dataclass(frozen=True)
class Launch:
    """The launch of the kernel that reads the words.

    Args:
        outputs: outputs per thread block.
        words: words of a row that a thread block reads at a time; columns if it has a dot.
        warps: warps per thread block.
        stages: stages of the pipeline of loads.
        tokens: tokens per thread block, if the kernel multiplies with ``tl.dot``; else None.
    """

    outputs: int
    words: int
    warps: int
    stages: int
    tokens: int | None = None


def launching(
    launch: Launch, length: int, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Return a backend for torch.compile that fixes the launch of one kernel.

    Args:
        launch: the launch of that kernel.
        length: the length of its reduction, which identifies the kernel.
        options: other options of Inductor.
    """
    patches: dict[str, Any] = {**FUSE_ALL, **(options or {})}
    make = functools.partial(_make_choices, launch, length)
    fixed = _choices_class() is not None
    if fixed:
        patches["inductor_choices_class"] = make  # part of the key of Inductor's caches

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
        if not fixed:
            return compile_fx(graph, inputs, config_patches=patches)
        virtualized = importlib.import_module("torch._inductor.virtualized")
        with virtualized.V.set_choices_handler(make()):  # each thread reads the option only once
            return compile_fx(graph, inputs, config_patches=patches)

    return compile_graph


def _make_choices(launch: Launch, length: int) -> Any:
    choices = _choices_class()
    assert choices is not None
    return choices(launch, length)


@functools.cache
def _choices_class() -> Any:
    """Return a subclass of Inductor's choices, or None where torch has no such extension point."""
    config = importlib.import_module("torch._inductor.config")
    choices = importlib.import_module("torch._inductor.choices")
    triton = importlib.import_module("torch._inductor.codegen.triton")
    extensible = (
        hasattr(config, "inductor_choices_class")
        and hasattr(choices.InductorChoices, "triton_kernel_kwargs")
        and hasattr(triton, "FixedTritonConfig")
    )
    if not extensible:
        return None

    class Choices(choices.InductorChoices):  # type: ignore[misc, name-defined]
        """Inductor's choices, except the launch of the kernel that reads the words."""

        def __init__(self, launch: Launch, length: int) -> None:
            super().__init__()
            self.launch, self.length = launch, length

        def uuid(self) -> str:
            """Return the choices that the compiled code depends on, as a cache key."""
            return f"int4-lora {asdict(self.launch)} {self.length}"

        def triton_kernel_kwargs(
            self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            """Return the arguments that a kernel is constructed with."""
            reads_words = (
                features.is_reduction()
                and bool(features.reduction_numel == self.length)
                and _has_dot(features) == (self.launch.tokens is not None)
            )
            if not reads_words:
                return kernel_kwargs
            tiles = _in_tritons_names(self.launch, groups[0])
            return {
                **kernel_kwargs,
                "fixed_config": triton.FixedTritonConfig(tiles),
                "override_persistent_reduction": False,
                "override_cooperative_reduction": False,
            }

    return Choices


def _has_dot(features: Any) -> bool:
    """Return whether a kernel multiplies with ``tl.dot``."""
    return any(
        node.node is not None and node.node.get_reduction_type() == "dot"
        for node in features.scheduler_nodes()
    )


def _in_tritons_names(launch: Launch, tiling: Mapping[str, Any]) -> dict[str, int]:
    """Return a launch as Inductor fixes it: a block is one slice, if there is an axis of them."""
    tiles = {
        "XBLOCK": launch.outputs,
        "R0_BLOCK": launch.words,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    if launch.tokens is not None:
        tiles["YBLOCK"] = launch.tokens
    if "z" in tiling:
        tiles["ZBLOCK"] = 1
    return tiles
