"""Three ways to run a contender: one call, a compiled graph of layers, a CUDA graph of layers.

Both kinds of graph hold one layer for each copy of the weight, so that one run exceeds the cache,
as in a model; the time is divided by the number of layers. In a CUDA graph, a layer starts when the
layer before it has ended. The layers are warmed up on a side stream, captured once as a graph, and
replayed for ``LAP_SECONDS``, so that launch and synchronisation take less than 1 % of the time.

Source: ``torch.cuda.graph``'s documentation, and that of ``torch._dynamo.config.recompile_limit``.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

LAP_SECONDS = 2e-3
WARM_UPS = 3


@dataclass(frozen=True)
class Ready:
    """A contender that can be timed.

    Args:
        run: takes the number of the round, computes ``layers`` layers, and returns the last
            result.
        layers: the number of layers that one run computes.
    """

    run: Callable[[int], Tensor]
    layers: int


def one_call(contender):
    """Return a contender that calls one layer, on the next copy in each round."""
    layer, weights = contender.layer, contender.weights
    return Ready(lambda number: layer(weights[number % len(weights)]), 1)


def compiled_graph(contender):
    """Return a contender whose layers are compiled into one graph."""
    layer, weights = contender.layer, contender.weights

    def chain():
        return [layer(weight) for weight in weights]

    code = chain.__code__.replace()  # torch allows 8 recompiles per code object
    copy = FunctionType(code, chain.__globals__, closure=chain.__closure__)
    compiled = torch.compile(copy, fullgraph=True, dynamic=False)
    return Ready(lambda number: compiled()[-1], len(weights))


def cuda_graph(contender):
    """Return a contender whose layers are captured in one CUDA graph, which is replayed."""
    layer, weights = contender.layer, contender.weights

    def chain():
        for weight in weights:
            y = layer(weight)
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            chain()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        y = chain()
    laps = _laps(graph)

    def replay(number):
        for _ in range(laps):
            graph.replay()
        return y

    return Ready(replay, laps * len(weights))


def _laps(graph):
    """Return the number of replays of a graph that take ``LAP_SECONDS``, at least 1."""
    graph.replay()
    torch.cuda.synchronize()
    before = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return max(1, math.ceil(LAP_SECONDS / (time.perf_counter() - before)))
