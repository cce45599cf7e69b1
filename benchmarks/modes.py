"""Three ways to run a contender: one call, a compiled graph of layers, a CUDA graph of layers.

Both kinds of graph hold one layer for each copy of the weight, so that one run exceeds the cache,
as a model does; the time is divided by the number of layers. In a CUDA graph, a layer starts when
the one before it has ended. The graph is warmed up on a side stream, captured once, and replayed
for ``LAP_SECONDS``, so that launch and synchronisation are less than 1 % of the time.

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
        run: computes ``layers`` layers, given the number of the round, and returns the result of
            the last.
        layers: how many layers one run computes.
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

    code = chain.__code__.replace()  # torch counts recompiles, of which it allows 8, by code object
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
    """Return how many replays of a graph take ``LAP_SECONDS``."""
    graph.replay()
    torch.cuda.synchronize()
    before = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return max(1, math.ceil(LAP_SECONDS / (time.perf_counter() - before)))
