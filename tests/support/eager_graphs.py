"""Run the compiled layer's graphs without Inductor, where a test needs them but not their code."""

import functools

import torch

from int4_lora.compiled.graphs import cache, entry


def without_inductor(monkeypatch):
    """Let all graphs run operator by operator, apart from those that were compiled before."""
    compile_graph = entry.compile_graph

    def eager(key, bucket, function, backend, operands, tensors):
        return compile_graph(key, bucket, function, _forward, operands, tensors)

    monkeypatch.setattr(cache, "_graphs", {})
    monkeypatch.setattr(entry, "compile_graph", eager)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def _forward(graph, examples):
    return graph.forward
