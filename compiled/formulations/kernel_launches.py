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
from collections.abc import Callable
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
        words: words of a row that a thread block reads at a time.
        warps: warps per thread block.
        stages: stages of the pipeline of loads.
    """

    outputs: int
    words: int
    warps: int
    stages: int


def launching(launch: Launch, words_of_a_row: int) -> Callable[..., Any]:
    """Return a backend for torch.compile that fixes the launch of one kernel.

    Args:
        launch: the launch of that kernel.
        words_of_a_row: the length of its reduction, which identifies the kernel.
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
        """Inductor's choices, except the launch of the kernel that reads the words."""

        def __init__(self, launch: Launch, words_of_a_row: int) -> None:
            super().__init__()
            self.launch, self.words_of_a_row = launch, words_of_a_row

        def uuid(self) -> str:
            """Return the choices that the compiled code depends on, as a cache key."""
            return f"int4-lora {asdict(self.launch)} {self.words_of_a_row}"

        def triton_kernel_kwargs(
            self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]
        ) -> dict[str, Any]:
            """Return the arguments that a kernel is constructed with."""
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
