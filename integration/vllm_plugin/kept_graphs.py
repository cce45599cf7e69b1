"""The compiled graphs of a model on a machine, kept in one file and loaded before any is traced.

Inductor keeps the code that it generates, but each start traces every graph again to find it. The
file holds whole graphs, under the keys by which ``int4_lora.compiled`` knows them.

The file is trusted like code, and its graphs are checked like those that are compiled: if one is
wrong, all of them are discarded, and compiled again.

Source: torch's ``BundledAOTAutogradSerializableCallable``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import pickle
import platform
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import int4_lora.compiled
import int4_lora.reference
from int4_lora.atomic_files import replace_files
from int4_lora.compiled.graphs.cache import Graph, add_graph, forget_graph, known_graphs
from int4_lora.compiled.selection.choice import device_name
from int4_lora.disk_cache import cache_folder
from int4_lora.integration.vllm_plugin.serving_state import as_when_serving

__all__ = ["KeptGraphs", "can_keep_graphs"]

FORMAT = 1  # to be raised when the file's form changes
_functorch: Any = importlib.import_module("torch._functorch.config")


def can_keep_graphs() -> bool:
    """Return whether the installed torch can make bytes of a compiled graph."""
    # torch 2.8 has the option, but nothing that writes what it compiles
    return (
        hasattr(_functorch, "bundled_autograd_cache")
        and importlib.util.find_spec("torch._dynamo.aot_compile_types") is not None
    )


class KeptGraphs:
    """The file of a model's graphs.

    Args:
        model: the checkpoint's folder, or its name on the hub.
    """

    def __init__(self, model: str) -> None:
        self.key = {
            "format": FORMAT,
            "model": model,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sources": _digest_of_sources(),
            "processor": device_name(torch.device("cpu")),
            "instructions": _instructions(),
        }
        name = hashlib.sha256(repr(self.key).encode()).hexdigest()[:32]
        self.file = cache_folder() / "graphs" / f"{name}.pickle"
        self._others = set(known_graphs())  # of this process, before it
        self._contents: dict[Hashable, tuple[tuple[int, ...], bytes]] = {}

    def load(self) -> int:
        """Load the graphs of the file, and return how many these are; 0 without a right file."""
        try:
            with as_when_serving():
                kept = pickle.loads(self.file.read_bytes())
                if kept["key"] != self.key:
                    return 0
                graphs = {
                    key: Graph(_never, _function_of(content), places)
                    for key, (places, content) in kept["graphs"].items()
                }
        except Exception:  # a file that is missing or damaged: unpickling may raise anything
            return 0
        self._contents = kept["graphs"]
        for key, graph in graphs.items():
            add_graph(key, graph)
        return len(graphs)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Compile graphs in such a way that they can be kept."""
        with _functorch.patch(bundled_autograd_cache=True):
            yield

    def keep(self) -> bool:
        """Write the file anew if there are other graphs than it holds; return whether it was."""
        new = {
            key: (graph.places, _bytes_of(graph.direct))
            for key, graph in known_graphs().items()
            if key not in self._others
            and key not in self._contents
            and hasattr(graph.direct, "serialize")
        }
        if not new:
            return False
        self._contents = {**self._contents, **new}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            content = pickle.dumps({"key": self.key, "graphs": self._contents})
            replace_files({self.file: content})
        except (OSError, RuntimeError):  # RuntimeError if there is no home directory
            return False
        return True

    def discard(self) -> bool:
        """Forget the graphs that were loaded, and the file; return whether there were any."""
        if not self._contents:
            return False
        for key in self._contents:
            forget_graph(key)
        self._contents = {}
        self.file.unlink(missing_ok=True)
        return True


def _never(*_: Any) -> Any:
    raise AssertionError("a graph that was loaded is called without Dynamo")


def _callable_type() -> Any:
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

    return BundledAOTAutogradSerializableCallable


def _bytes_of(function: Any) -> bytes:
    """Return a compiled function as bytes."""
    kind = _callable_type()
    content: bytes = kind.serialize_compile_artifacts(kind(function))
    return content


def _function_of(content: bytes) -> Any:
    """Return the compiled function that bytes hold."""
    return _callable_type().deserialize_compile_artifacts(content).compiled_fn


@functools.cache
def _digest_of_sources() -> str:
    """Return a digest of the files that graphs are traced from."""
    digest = hashlib.sha256()
    for package in (int4_lora.reference, int4_lora.compiled):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _instructions() -> str:
    """Return what tells the processor's instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"
