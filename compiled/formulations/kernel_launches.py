"""Launch one GPU kernel with fixed tiles and warps, through Inductor's own extension point.

Inductor measures its candidate launches at run time and keeps the fastest, so the kernel that runs
is not known in advance. The kernel that reads the words is launched as its formulation says
instead: what ``tox run -e codegen`` reads is what runs. Inductor launches all other kernels as it
likes.

Source: ``InductorChoices.triton_kernel_kwargs`` of ``torch/_inductor/choices.py``, which torch 2.11
and later have.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Launch", "launching"]

FUSE_ALL = {  # the terms stay in the kernel that reads the words, however often they are used
    "realize_acc_reads_threshold": 64,
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 200,
    "split_reductions": False,  # the adapters' first product is one kernel, however wide x is
}


@dataclass(frozen=True)
class Launch:
    """The launch of the kernel that reads the words.

    Args:
        outputs: outputs of a block of threads.
        words: words of a row that a block takes at a time.
        warps: warps of a block.
        stages: depth of the pipeline of loads.
    """

    outputs: int
    words: int
    warps: int
    stages: int


def launching(launch: Launch, words_of_a_row: int) -> Callable[..., Any]:
    """Return a backend for torch.compile that fixes the launch of one kernel.

    Args:
        launch: of that kernel.
        words_of_a_row: the length of its reduction, which identifies it.
    """
    patches: dict[str, Any] = dict(FUSE_ALL)
    make = functools.partial(_make_choices, launch, words_of_a_row)
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


def _make_choices(launch: Launch, words_of_a_row: int) -> Any:
    choices = _choices_class()
    assert choices is not None
    return choices(launch, words_of_a_row)


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
        """Inductor's choices, but for the launch of the kernel that reads the words."""

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
            reads_words = features.is_reduction() and bool(
                features.reduction_numel == self.words_of_a_row
            )
            if not reads_words:
                return kernel_kwargs
            return {
                **kernel_kwargs,
                "fixed_config": triton.FixedTritonConfig(_in_tritons_names(self.launch)),
                "override_persistent_reduction": False,
                "override_cooperative_reduction": False,
            }

    return Choices


def _in_tritons_names(launch: Launch) -> dict[str, int]:
    return {
        "XBLOCK": launch.outputs,
        "R0_BLOCK": launch.words,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
